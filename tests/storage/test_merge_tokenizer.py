"""Merged models and tokenizers: the base's is kept, a different one of the tune is said, and can be asked for."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import alignvec
from alignvec import AlignmentVector, merge
from alignvec.errors import AlignvecError
from alignvec.owned import TOKENIZER_FILES as FILES
from alignvec.recipes import model_path
from alignvec.sources import open_source
from alignvec.tokenizer_files import TokenizerWarning, differing, tokenizer_record, traits
from tests.storage.checkpoints import weights, write_checkpoint

ROWS = 61
EMBEDDING = "model.embed_tokens.weight"


def write_tokenizer(folder: Path, added: tuple[str, ...] = (), **config: Any) -> None:
    """A vocabulary of 40 words, tokens added from 40 on."""
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False) | {"special": True}
    entries = [{"id": 40 + i, "content": token} | flags for i, token in enumerate(added)]
    model = {"type": "WordLevel", "unk_token": "w0", "vocab": {f"w{i}": i for i in range(40)}}
    data = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": entries, "model": model}
    (folder / "tokenizer.json").write_text(json.dumps(data))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "w1"} | config))


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = write_checkpoint(tmp_path / "base", weights(), eos_token_id=1)
    write_tokenizer(folder, chat_template="{{ messages }}", transformers_version="4.40")
    return folder


def tune(folder: Path, template: str = "<|im_start|>{{ messages }}") -> Path:
    folder.mkdir()
    write_tokenizer(folder, ("<|im_start|>", "<|im_end|>"), eos_token="<|im_end|>")
    (folder / "chat_template.jinja").write_text(template)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [41, 1], "temperature": 0.2}))
    return folder


def vector(*folders: Path) -> AlignmentVector:
    source: dict[str, Any] = {"aligned": "tune"} | ({"tokenizer": traits(folders[0])} if folders else {})
    return AlignmentVector({EMBEDDING: torch.ones(ROWS, 24)}, source=source)


def test_what_a_tokenizer_is_known_by(base: Path, tmp_path: Path) -> None:
    other = tune(tmp_path / "tune")
    assert differing(traits(base), traits(other)) == ["added tokens", "chat template", "eos_token", "eos_token_id"]
    assert traits(other)["eos_token_id"] == "[1, 41]"
    assert differing(traits(base), {}) == differing({}, traits(base)) == []
    assert tokenizer_record(open_source(base)) == {"tokenizer": traits(base)}
    assert tokenizer_record(open_source(base / "model.safetensors")) == {"tokenizer": traits(base)}
    assert tokenizer_record(open_source(torch.nn.Linear(2, 2))) == {}
    bare = write_checkpoint(tmp_path / "bare", weights())
    (bare / "tokenizer.json").unlink()
    assert tokenizer_record(open_source(bare)) == {}
    (bare / "tokenizer.json").write_text("{")
    assert tokenizer_record(open_source(bare)) == {}


def test_how_files_are_laid_out_does_not_count(base: Path, tmp_path: Path) -> None:
    """The template in a file of its own, tokens as objects, state of a run: as another version writes it."""
    other = tmp_path / "other"
    other.mkdir()
    write_tokenizer(other, eos_token={"content": "w1", "lstrip": False}, model_max_length=7, padding_side="left")
    data = json.loads((other / "tokenizer.json").read_text())
    data |= {"truncation": {"max_length": 7}, "added_tokens": [{"id": 3, "content": "w3"}]}
    (other / "tokenizer.json").write_text(json.dumps(data, indent=2))
    (other / "chat_template.jinja").write_text("{{ messages }}")
    assert differing(traits(base), traits(other)) == []


def test_transformers_saves_what_it_loaded(tmp_path: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_path("base"))
    tokenizer.save_pretrained(tmp_path / "same")
    assert differing(traits(model_path("base")), traits(tmp_path / "same")) == []
    tokenizer.add_tokens(["<|new|>"])
    tokenizer.chat_template = "{{ messages[0] }}"
    tokenizer.save_pretrained(tmp_path / "other")
    assert differing(traits(model_path("base")), traits(tmp_path / "other")) == ["added tokens", "chat template"]


def test_a_different_tokenizer_is_said(base: Path, tmp_path: Path) -> None:
    made = vector(tune(tmp_path / "tune"))
    with pytest.warns(
        TokenizerWarning, match=r"tokenizer of base; vector 'v' comes from tune, .* added tokens, chat t"
    ):
        report = merge(base, {"v": made}, {"v": 1}, tmp_path / "m")
    assert len(report.notes) == 1
    assert json.loads((tmp_path / "m" / "merge_report.json").read_text())["notes"] == list(report.notes)
    assert (tmp_path / "m" / "tokenizer.json").read_text() == (base / "tokenizer.json").read_text()


@pytest.mark.parametrize("case", ["the same", "not recorded", "coefficient 0", "asked for", "damaged"])
def test_nothing_is_said(base: Path, tmp_path: Path, case: str) -> None:
    other = tune(tmp_path / "tune")
    made = {"the same": vector(base), "not recorded": vector()}.get(case, vector(other))
    if case == "damaged":
        (base / "tokenizer.json").write_text("{")
    with warnings.catch_warnings():
        warnings.simplefilter("error", TokenizerWarning)
        given = {"tokenizer": other} if case == "asked for" else {}
        report = merge(base, {"v": made}, {"v": 0 if case == "coefficient 0" else 1}, tmp_path / "m", **given)
    assert report.notes == ()


def test_the_tokenizer_asked_for_is_written(base: Path, tmp_path: Path) -> None:
    other = tune(tmp_path / "tune")
    (other / "additional_chat_templates").mkdir()
    (other / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")
    (base / "special_tokens_map.json").write_text("{}")
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": 1, "top_k": 5}))
    merge(base, {"v": vector(other)}, {"v": 1}, tmp_path / "m", tokenizer=other)
    merged = tmp_path / "m"
    for name in (
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "additional_chat_templates/tools.jinja",
    ):
        assert (merged / name).read_bytes() == (other / name).read_bytes(), name
    assert not (merged / "special_tokens_map.json").exists()
    assert json.loads((merged / "generation_config.json").read_text()) == {"eos_token_id": [41, 1], "top_k": 5}
    assert json.loads((merged / "config.json").read_text())["eos_token_id"] == [41, 1]
    assert differing(traits(merged), traits(other)) == []
    loaded = transformers.PreTrainedTokenizerFast.from_pretrained(merged)
    assert loaded.convert_tokens_to_ids("<|im_end|>") == 41
    again = merge(merged, {"v": vector(other)}, {"v": 1}, tmp_path / "again")
    assert again.notes == ()
    assert (tmp_path / "again" / "additional_chat_templates" / "tools.jinja").is_file()


def test_a_hub_id(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other, asked = tune(tmp_path / "tune"), []

    def download(name: str, revision: str | None = None, allow_patterns: list[str] | None = None) -> str:
        asked.append((name, revision, allow_patterns))
        return str(other)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    merge(base, {"v": vector(other)}, {"v": 1}, tmp_path / "m", tokenizer="owner/tune@main")
    assert asked == [("owner/tune", "main", [*FILES, "generation_config.json", "config.json"])]
    assert (tmp_path / "m" / "chat_template.jinja").read_text() == "<|im_start|>{{ messages }}"


def test_refused(base: Path, tmp_path: Path) -> None:
    before = sorted(path.name for path in tmp_path.iterdir())
    (tmp_path / "empty").mkdir()
    with pytest.raises(AlignvecError, match="empty holds no tokenizer"):
        merge(base, {"v": vector()}, {"v": 1}, tmp_path / "m", tokenizer=tmp_path / "empty")
    (tmp_path / "empty").rmdir()
    large = tmp_path / "large"
    large.mkdir()
    write_tokenizer(large, tuple(f"<{i}>" for i in range(22)))
    with pytest.raises(AlignvecError, match=r"tokens up to 61, and model\.embed_tokens\.weight of .* has 61 rows"):
        merge(base, {"v": vector()}, {"v": 1}, tmp_path / "m", tokenizer=large)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*before, "large"])


def test_the_record_is_kept_by_files_formats_and_parts(base: Path, tmp_path: Path) -> None:
    made = vector(tune(tmp_path / "tune"))
    made.save(tmp_path / "v")
    alignvec.convert(tmp_path / "v", tmp_path / "c", "int8")
    for kept in (alignvec.load(tmp_path / "c"), alignvec.load(tmp_path / "v").select("*embed*")):
        assert kept.source["tokenizer"] == made.source["tokenizer"]
