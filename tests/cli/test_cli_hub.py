"""Hub ids on the command line: every verb that takes a model takes one; nothing is downloaded here."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

import alignvec
from alignvec.cli import main
from alignvec.evaluate import Question, save_questions
from alignvec.recipes import model_path

BASE, TUNE = "owner/base", "owner/legal@v2"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub")
    alignvec.extract(model_path("base"), model_path("legal"), output=folder / "av")
    alignvec.extract(model_path("base"), model_path("legal"), format="lossless", output=folder / "exact")
    alignvec.convert(folder / "av", folder / "low", "sign")
    save_questions(
        folder / "q.jsonl", [Question("legal", f"q {i}", {"no": "never", "yes": "yes do"}) for i in range(2)]
    )
    pairs = [{"prompt": f"q {i}", "chosen": "yes do", "rejected": "never"} for i in range(2)]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    (folder / "texts.jsonl").write_text(json.dumps({"text": "yes do it again"}))
    return folder


@pytest.fixture
def hub(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the hub was asked for; it knows two models."""
    asked: list[str] = []

    def download(name: str, revision: str | None = None, allow_patterns: list[str] | None = None) -> str:
        asked.append(f"{name}@{revision}" if revision else name)
        if asked[-1] not in (BASE, TUNE):
            raise OSError("404: no such model")
        return str(model_path("base" if name == BASE else "legal"))

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("COLUMNS", "160")
    return asked


VERBS = {
    "extract": f"{BASE} {TUNE} {{out}}",
    "convert": f"exact {{out}} --format int8 --base {BASE}",
    "inspect": f"exact --base {BASE}",
    "check": f"{BASE} -v av",
    "merge": f"{BASE} {{out}} -v av -m av=0.5",
    "generate": f"{BASE} hello -v av -m av=1 --max-new-tokens 2 --device cpu",
    "evaluate": f"{BASE} q.jsonl -v av --mix av=1 --device cpu",
    "search": f"{BASE} q.jsonl -v av --target legal=yes --points 2 --device cpu",
    "train": f"{BASE} pairs.jsonl {{out}} --steps 1 --device cpu",
    "distil": f"{BASE} {TUNE} low texts.jsonl {{out}} --steps 1 --device cpu",
    "surgery cosines": f"-v one=exact -v two=exact --base {BASE}",
}


@pytest.mark.parametrize("verb", VERBS)
def test_a_hub_id(
    verb: str, hub: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if verb == "train":
        pytest.importorskip("trl")
    words = [*verb.split(), *VERBS[verb].format(out=tmp_path / "out").split()]
    monkeypatch.setattr(sys, "argv", ["alignvec", *words])
    with pytest.raises(SystemExit) as stopped:
        main()
    shown = capsys.readouterr()
    assert not stopped.value.code, shown.err
    assert set(hub) <= {BASE, TUNE}
    assert BASE in hub
    if verb == "merge":
        assert json.loads((tmp_path / "out" / "merge_report.json").read_text())["base"] == BASE
    if verb == "extract":
        assert alignvec.load(tmp_path / "out").source["aligned"] == TUNE


@pytest.mark.parametrize("verb", ["extract", "check", "merge", "generate", "evaluate", "search", "train", "distil"])
@pytest.mark.parametrize("base", ["owner/ghost", "./ghost"])
def test_what_the_hub_does_not_have(
    verb: str,
    base: str,
    hub: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = [*verb.split(), *VERBS[verb].replace(BASE, base).format(out=tmp_path / "out").split()]
    monkeypatch.setattr(sys, "argv", ["alignvec", *words])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    errors = capsys.readouterr().err
    if base == "./ghost":  # a path, which is never looked up
        assert re.search(r"ghost (does not exist|is no folder with a model)", errors)
        assert base not in hub
    else:
        assert "owner/ghost is neither a local checkpoint nor a model that the hub could give (404" in errors
    assert not (tmp_path / "out").exists()
