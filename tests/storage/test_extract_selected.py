"""Extraction of some tensors: what is left out is not in the vector, and the base's identity is whole."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

import alignvec
from alignvec import extract, merge
from alignvec.cli import main
from alignvec.errors import AlignvecError
from tests.storage.checkpoints import aligned, weights, write_checkpoint

KEPT = {"model.layers.1.mlp.up_proj.weight", "model.layers.1.mlp.experts"}


@pytest.mark.parametrize("format", ["dense", "lossless", "int4:group=32", "sparse:density=0.2", "auto:0.5"])
@pytest.mark.parametrize("stored", [False, True], ids=["memory", "disk"])
def test_some_tensors(pair: tuple[Path, Path], tmp_path: Path, format: str, stored: bool) -> None:
    whole = extract(*pair, dtype="float32")
    part = extract(*pair, format=format, include="*.mlp.*", output=tmp_path / "v" if stored else None)
    assert set(part.names) == KEPT
    assert part.base == whole.base
    assert part.source["selected"] == [{"include": ["*.mlp.*"], "exclude": None}]
    if format in ("dense", "lossless"):
        for name in KEPT:
            exact = aligned(weights())[name].float() - weights()[name].float()
            assert torch.equal(part[name].float(), exact.to(part[name].dtype).float())
    if format == "auto:0.5":  # the budget is that of the tensors that stay
        dense = sum(2 * whole.tensors[name].numel for name in KEPT)
        assert part.nbytes <= dense // 2
    report = merge(pair[0], {"v": part}, {"v": 0.0}, tmp_path / "m")
    assert report.changed == 0


def test_what_is_left_out_may_differ_in_any_way(tmp_path: Path) -> None:
    after = aligned(weights())
    after["model.position_ids"] = torch.arange(5) + 1
    after["lm_head.weight"] = torch.full((61, 24), torch.nan, dtype=torch.bfloat16)
    pair = write_checkpoint(tmp_path / "b", weights()), write_checkpoint(tmp_path / "a", after)
    with pytest.raises(AlignvecError, match="NaN"):
        extract(*pair, exclude="*.position_ids")
    with pytest.raises(AlignvecError, match="integer tensors differ"):
        extract(*pair, exclude="lm_head.*")
    for format in ("dense", "int8"):
        vector = extract(*pair, format=format, exclude=["*.position_ids", "lm_head.*"])
        assert "lm_head.weight" not in vector
        assert vector.base is not None
        assert "lm_head.weight" in vector.base.tensors


def test_refused(pair: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(AlignvecError, match=r"pattern 'ghost\*' matches none"):
        extract(*pair, exclude="ghost*", output=tmp_path / "v")
    with pytest.raises(AlignvecError, match="hold the same values in the tensors that include and exclude leave"):
        extract(*pair, include="*norm*", output=tmp_path / "v")
    assert not (tmp_path / "v").exists()


def test_the_command_line(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    options = ["--include", "*.mlp.*", "--include", "lm_head.*", "--exclude", "*.experts"]
    monkeypatch.setattr(sys, "argv", ["alignvec", "extract", "base", "aligned", "v", *options])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert not stopped.value.code, capsys.readouterr().err
    assert set(alignvec.load("v").names) == {"lm_head.weight", "model.layers.1.mlp.up_proj.weight"}


def test_the_aligned_tokenizer_is_remembered(pair: tuple[Path, Path], tmp_path: Path) -> None:
    (pair[1] / "chat_template.jinja").write_text("{{ messages }}")
    vector = extract(*pair, output=tmp_path / "v")
    with pytest.warns(UserWarning, match=r"tokenizer of base; vector 'v' comes from aligned, .* another chat template"):
        merge(pair[0], {"v": vector}, {"v": 1}, tmp_path / "m")
    (pair[0] / "chat_template.jinja").write_text("{{ messages }}")
    assert merge(pair[0], {"v": vector}, {"v": 1}, tmp_path / "n").notes == ()
