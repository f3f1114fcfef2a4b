"""Models and tokenizers whose folders bring code: nothing of it runs, and nobody is asked."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

import alignvec
from alignvec.errors import AlignvecError
from alignvec.loading import load_model, load_tokenizer
from alignvec.recipes import model_path
from tests.models import tiny

CODE = "raise SystemExit('code of the folder ran')\n"


def brought(folder: Path, **options: Any) -> Path:
    """A folder whose configurations name classes of its own."""
    tiny().save_pretrained(folder)
    (folder / "own.py").write_text(CODE)
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | options))
    (folder / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": ["own.T", None]}}))
    return folder


def test_code_of_a_folder_neither_runs_nor_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked at the terminal"))
    own = {"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"}
    folder = brought(tmp_path / "own", model_type="own", auto_map=own)
    with pytest.raises(AlignvecError, match="holds no causal language model that transformers loads by itself"):
        load_model(folder)
    with pytest.raises(AlignvecError, match="holds no tokenizer that transformers loads by itself"):
        load_tokenizer(folder)
    assert type(load_model(brought(tmp_path / "known", auto_map=own))).__name__ == "MistralForCausalLM"


@pytest.mark.parametrize("option", ["attn_implementation", "_attn_implementation", "experts_implementation"])
def test_kernels_of_the_hub_are_refused(option: str, tmp_path: Path) -> None:
    folder = brought(tmp_path / "model", **{option: "someone/kernel"})
    with pytest.raises(AlignvecError, match="someone/kernel', which is code of the hub"):
        load_model(folder)


def test_the_shipped_model_loads() -> None:
    assert load_tokenizer(model_path("base")).vocab_size <= load_model(model_path("base")).config.vocab_size


def test_nothing_else_in_the_library_loads_by_auto_classes() -> None:
    root = Path(alignvec.__file__).parent
    pattern = re.compile(r"\bAuto\w+\.(from_pretrained|from_config)\((?![^)]*trust_remote_code=False)", re.S)
    found = {
        path.relative_to(root).as_posix()
        for path in root.rglob("*.py")
        if pattern.search(path.read_text(encoding="utf-8"))
    }
    assert found <= {"recipes/pretrain.py"}  # from a configuration that the recipe makes
