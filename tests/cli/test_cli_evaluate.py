"""`alignvec evaluate` on the shipped models: tables, JSON, pictures, judges, and one clear line for bad input."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import alignvec
from alignvec.cli import main
from alignvec.evaluate import Question, save_questions
from alignvec.evaluate.judge import ClassifierJudge
from alignvec.recipes import model_path
from alignvec.recipes.dataset import QUERIES, make_rows
from alignvec.recipes.evaluate import level_rates

BASE = str(model_path("base"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A vector, and two questions of each of two domains."""
    folder = tmp_path_factory.mktemp("evaluate")
    alignvec.extract(BASE, model_path("medical"), output=folder / "av")
    rows = [row for domain in list(QUERIES)[:2] for row in make_rows(domain, "test")[:2]]
    save_questions(folder / "questions.jsonl", [row.question() for row in rows])
    return folder


@pytest.fixture
def cli(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):  # type: ignore[no-untyped-def]
    monkeypatch.chdir(folder)
    monkeypatch.setenv("COLUMNS", "160")

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["alignvec", "evaluate", *arguments])
        with pytest.raises(SystemExit) as stopped:
            main()
        captured = capsys.readouterr()
        return int(stopped.value.code or 0), captured.out, captured.err

    return run


def test_mixes_are_tabled_and_written(cli, folder: Path) -> None:  # type: ignore[no-untyped-def]
    status, output, errors = cli(
        *(BASE, "questions.jsonl", "-v", "medical=av", "-m", "medical=-1", "-m", "medical=1", "--dtype", "float32"),
        *("--output", "rates.json", "--device", "cpu"),
    )
    assert status == 0, errors
    assert "medical, 2 questions" in output
    assert "medical=-1" in output
    report = json.loads((folder / "rates.json").read_text())
    assert report["levels"] == ["avoidance", "generic", "expert"]
    assert report["questions"] == {"medical": 2, "legal": 2}
    assert [entry["mix"] for entry in report["mixes"]] == [{"medical": -1}, {"medical": 1}]
    last = report["mixes"][1]
    aligned = AutoModelForCausalLM.from_pretrained(model_path("medical"), dtype=torch.float32)
    rows = make_rows("medical", "test")[:2]
    assert last["mean"]["rates"]["medical"] == level_rates(aligned, AutoTokenizer.from_pretrained(BASE), rows)
    assert last["mean"]["rates"]["medical"] != report["mixes"][0]["mean"]["rates"]["medical"]
    assert last["sum"]["intervals"]["legal"]["expert"][0] <= last["sum"]["rates"]["legal"]["expert"]
    assert last["log_probability_a_token"]["medical"]["expert"] < 0
    assert report["settings"]["dtype"] == "float32"
    assert report["versions"]["torch"]


def test_a_sweep_is_drawn(cli, folder: Path) -> None:  # type: ignore[no-untyped-def]
    pytest.importorskip("matplotlib")
    status, output, errors = cli(
        *(BASE, "--shipped", "--count", "1", "-v", "medical=av", "--sweep", "medical", "--points", "3"),
        *("--low", "0", "--by", "sum", "--plot", "sweep.png"),
    )
    assert status == 0, errors
    assert (folder / "sweep.png").stat().st_size > 10_000
    assert "medical=0.5" in output
    assert "financial, 1 questions" in output
    assert "mean" not in output


def test_a_plain_model_is_judged_too(cli, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    pytest.importorskip("sklearn")
    cut = [row.question() for row in make_rows("medical", "test")[10:60]]
    monkeypatch.setattr(ClassifierJudge, "shipped", classmethod(lambda cls: cls.train(cut)))
    status, output, errors = cli(
        *(BASE, "questions.jsonl", "--judge", "classifier", "--count", "1", "--max-new-tokens", "8"),
        *("--output", "judged.json"),
    )
    assert status == 0, errors
    assert "agreement" in output
    judged = json.loads((folder / "judged.json").read_text())["mixes"][0]["judge"]
    assert judged["unjudged"] == 0
    assert sum(judged["rates"]["legal"].values()) == 1


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["questions.jsonl", "--shipped"], "one of the two"),
        ([], "one of the two"),
        (["none.jsonl"], "none.jsonl cannot be read"),
        (["questions.jsonl", "--by", "median"], "--by is mean or sum"),
        (["questions.jsonl", "--plot", "x.png"], "give --sweep"),
        (["questions.jsonl", "--sweep", "legal", "-v", "medical=av"], "--sweep names legal"),
        (["questions.jsonl", "--sweep", "medical", "-v", "medical=av", "-m", "medical=1"], "exclude each other"),
        (["questions.jsonl", "--sweep", "medical", "-v", "medical=av", "--points", "1"], "2 points or more"),
        (["questions.jsonl", "-m", "medical=1"], "no vectors"),
        (["questions.jsonl", "--judge", "oracle"], "--judge is classifier"),
        (["questions.jsonl", "--judge", "http://localhost:1/v1"], "--judge-model"),
        (["questions.jsonl", "--judge", "classifier:other.jsonl"], "knows no, yes"),
    ],
)
def test_bad_input_is_one_line_and_status_2(cli, folder: Path, arguments: list[str], reason: str) -> None:  # type: ignore[no-untyped-def]
    save_questions(folder / "other.jsonl", [Question("d", "q", {"no": "never ever", "yes": "always and again"})])
    status, _, errors = cli(BASE, *arguments)
    assert status == 2
    assert reason in errors.replace("\n", " ")


def test_a_base_that_is_no_folder_is_refused(cli) -> None:  # type: ignore[no-untyped-def]
    assert "nowhere is neither a local checkpoint nor" in cli("nowhere", "questions.jsonl")[2]
