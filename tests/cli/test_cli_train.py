"""`alignvec train` and `alignvec distil` end to end on a tiny model, and what they refuse before they begin."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import alignvec
from alignvec.cli import main
from tests.models import random_vector, tiny

pytest.importorskip("trl")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base/ with a tokenizer of letters, dense/ (a vector), pairs.jsonl, questions.jsonl and texts.jsonl."""
    folder = tmp_path_factory.mktemp("train")
    model = tiny()
    model.save_pretrained(folder / "base")
    vocabulary = {"<s>": 1, "</s>": 2} | {letter: 10 + i for i, letter in enumerate("abcdefghij")}
    made = Tokenizer(models.WordLevel(vocabulary, "<s>"))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    fast = PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="</s>")
    fast.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    fast.save_pretrained(folder / "base")
    random_vector(model, 1).save(folder / "dense")
    pairs = [{"prompt": "abc", "chosen": "de", "rejected": "fgh"}, {"prompt": "b", "chosen": "ij", "rejected": "c"}]
    questions = [{"domain": "d", "query": "ab", "responses": {"no": "cd", "yes": "efg"}}]
    for name, rows in (("pairs", pairs), ("questions", questions), ("texts", [{"text": "abcdefgh"}])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def cli(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):  # type: ignore[no-untyped-def]
    monkeypatch.chdir(folder)
    monkeypatch.setenv("COLUMNS", "160")

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["alignvec", *arguments])
        with pytest.raises(SystemExit) as stopped:
            main()
        captured = capsys.readouterr()
        return int(stopped.value.code or 0), captured.out, captured.err

    return run


def test_a_lora_becomes_a_low_rank_vector(cli, folder: Path) -> None:
    common = ("--method", "lora", "--rank", "2", "--steps", "1", "--batch-size", "2", "--learning-rate", "0.01")
    status, out, err = cli("train", "base", "pairs.jsonl", "lora", *common, "--device", "cpu")
    assert status == 0, err
    assert "lora:" in out
    vector = alignvec.load(folder / "lora")
    assert {vector.format_of(name).name for name in vector} == {"low-rank"}
    assert vector.norm() > 0
    assert cli("train", "base", "pairs.jsonl", "lora", *common)[0] == 2  # it is there already


def test_questions_train_all_weights_and_signs_are_distilled(cli, folder: Path) -> None:
    options = ("--prefer", "d=yes", "--steps", "1", "--batch-size", "1", "--learning-rate", "0.01", "--device", "cpu")
    status, _, err = cli("train", "base", "questions.jsonl", "signs", *options, "--format", "sign")
    assert status == 0, err
    assert alignvec.load(folder / "signs").format == "sign"
    assert cli("convert", "dense", "low", "--format", "sign")[0] == 0
    status, _, err = cli(
        "distil", "base", "dense", "low", "texts.jsonl", "distilled", "--steps", "2", "--device", "cpu"
    )
    assert status == 0, err
    before, after = alignvec.load(folder / "low"), alignvec.load(folder / "distilled")
    assert after.nbytes == before.nbytes
    assert (after - before).norm() > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("train", "nowhere", "pairs.jsonl", "out"), "nowhere is neither a local checkpoint nor"),
        (("train", "base", "texts.jsonl", "out"), "texts.jsonl, line 1"),
        (("train", "base", "questions.jsonl", "out", "--prefer", "d"), "--prefer takes"),
        (("train", "base", "pairs.jsonl", "out", "--format", "int5"), "int5"),
        (("distil", "base", "dense", "dense", "texts.jsonl", "out"), "dense"),
    ],
)
def test_refusals_leave_nothing_behind(cli, folder: Path, arguments: tuple[str, ...], message: str) -> None:
    before = sorted(path.name for path in folder.iterdir())
    status, _, err = cli(*arguments)
    assert status == 2
    assert message in err
    assert len(err.strip().splitlines()) == 1
    assert sorted(path.name for path in folder.iterdir()) == before
