"""--include, --exclude and --tokenizer."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch

import alignvec
from alignvec.checkpoint import Checkpoint
from alignvec.cli import main
from alignvec.tokenizer_files import traits
from tests.storage.checkpoints import aligned, weights, write_checkpoint
from tests.storage.descriptions import change_description

HEAD = "lm_head.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A base, a tune, and their vector, dense and lossless."""
    base = write_checkpoint(tmp_path / "base", weights())
    tune = write_checkpoint(tmp_path / "tune", aligned(weights()))
    (tune / "chat_template.jinja").write_text("{{ messages }}")
    alignvec.extract(base, tune, output=tmp_path / "av")
    alignvec.extract(base, tune, format="lossless", output=tmp_path / "exact")
    return tmp_path


@pytest.fixture
def cli(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):  # type: ignore[no-untyped-def]
    monkeypatch.chdir(folder)
    monkeypatch.setenv("COLUMNS", "160")

    def run(line: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["alignvec", *line.split()])
        with pytest.raises(SystemExit) as stopped:
            main()
        captured = capsys.readouterr()
        return int(stopped.value.code or 0), captured.out, captured.err

    return run


def test_convert_keeps_what_matches(cli, folder: Path) -> None:  # type: ignore[no-untyped-def]
    status, output, _ = cli("convert av part --include *.mlp.* --include *.bias --exclude *.experts --format int8")
    assert status == 0
    assert "2 tensors" in output
    names = ("model.layers.0.self_attn.q_proj.bias", "model.layers.1.mlp.up_proj.weight")
    assert set(alignvec.load(folder / "part").names) == set(names)
    assert cli("convert exact part --exclude *.mlp.* --overwrite")[0] == 0
    assert alignvec.load(folder / "part").needs_base


@pytest.mark.parametrize("vector", ["av", "exact"])
def test_merge_leaves_out(cli, folder: Path, vector: str) -> None:  # type: ignore[no-untyped-def]
    assert cli(f"merge base m -v x={vector} -m x=1 --exclude lm_head.* --exclude *embed*")[0] == 0
    merged, after = Checkpoint.open(folder / "m"), aligned(weights())
    for name, before in weights().items():
        wanted = before if name in (HEAD, "model.embed_tokens.weight") else after[name]
        if vector == "exact" or not before.is_floating_point():
            assert torch.equal(merged.tensor(name), wanted), name
        else:  # the delta was rounded to bfloat16
            torch.testing.assert_close(merged.tensor(name), wanted, rtol=2**-7, atol=2**-15)


def test_patterns_that_match_nothing_are_named(cli, folder: Path) -> None:  # type: ignore[no-untyped-def]
    for line in ("convert av out --exclude nothing*", "merge base out -v x=av -m x=1 --include nothing*"):
        status, _, errors = cli(line)
        assert status == 2
        assert "the pattern 'nothing*' matches none of the vector's 7 tensors" in errors
        assert not (folder / "out").exists()


def test_a_tokenizer_of_the_tune(cli, folder: Path) -> None:  # type: ignore[no-untyped-def]
    change_description(folder / "av", lambda data: data["source"].update(tokenizer=traits(folder / "tune")))
    status, output, errors = cli("merge base m -v av -m av=1")
    assert (status, errors.strip()) == (0, "")
    assert re.search(r"tokenizer of base; vector 'av' comes from tune, .* another chat template: .*--tokenizer", output)
    assert not (folder / "m" / "chat_template.jinja").exists()
    status, output, _ = cli("merge base m -v av -m av=1 --tokenizer tune --overwrite")
    assert status == 0
    assert "comes from" not in output
    assert (folder / "m" / "chat_template.jinja").read_text() == "{{ messages }}"
