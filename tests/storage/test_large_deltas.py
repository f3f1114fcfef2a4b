"""Deltas whose squares float32 does not hold, names that no file gives back, and JSON that no reader takes."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import alignvec
from alignvec import AlignmentVector, convert, extract
from alignvec.errors import AlignvecError
from alignvec.folders import nulled, write_json
from alignvec.spool import Spool

SHAPE = (6, 32)
FORMATS = ("dense", "int8", "int4", "sign", "lossless", "sparse:density=0.5", "low-rank:rank=2", "auto:0.6")


def write(folder: Path, **tensors: torch.Tensor) -> Path:
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("size", [1e-25, 1e-20, 2e19, 1e38])
@pytest.mark.parametrize("format", FORMATS)
def test_finite_deltas_of_any_size(format: str, size: float, tmp_path: Path) -> None:
    """The file says the norm and the error that float64 gives, or the vector is refused and the old one stays."""
    signs = torch.randn(SHAPE, generator=torch.Generator().manual_seed(3)).clamp(-2.5, 2.5)
    pair = write(tmp_path / "b", w=torch.zeros(SHAPE).bfloat16()), write(tmp_path / "a", w=(signs * size).bfloat16())
    wanted = (signs * size).bfloat16().double()
    AlignmentVector({"w": torch.ones(2)}).save(tmp_path / "v")
    if size == 1e38 and format == "low-rank:rank=2":
        with pytest.raises(AlignvecError, match="delta w overflows when it is read back"):
            extract(*pair, format=format, output=tmp_path / "v", overwrite=True)
        assert alignvec.load(tmp_path / "v")["w"].tolist() == [1.0, 1.0]
        return
    vector = extract(*pair, format=format, output=tmp_path / "v", overwrite=True)
    found = vector["w"].double()
    error = alignvec.load(tmp_path / "v").errors["w"]
    assert error.relative == pytest.approx(float((found - wanted).norm() / wanted.norm()), rel=1e-4, abs=1e-9)
    assert error.norm is None or error.norm == pytest.approx(float(wanted.norm()), rel=1e-4)
    json.loads((tmp_path / "v" / "alignment_vector.json").read_text(), parse_constant=pytest.fail)


@pytest.mark.parametrize("size", [1e-30, 1e19, 3e38])
def test_rounding_of_large_and_small_deltas_is_told(size: float, tmp_path: Path) -> None:
    values = torch.randn(SHAPE, generator=torch.Generator().manual_seed(4)).clamp(-1, 1) * size
    pair = write(tmp_path / "b", w=torch.zeros(SHAPE)), write(tmp_path / "a", w=values)
    vector = extract(*pair, dtype="bfloat16", output=tmp_path / "v")
    exact, stored = values.double(), values.bfloat16().double()
    relative = float((exact - stored).norm() / exact.norm())
    assert vector.source["rounding_error"] == pytest.approx(relative, rel=1e-4)
    assert vector.errors["w"].norm == pytest.approx(float(exact.norm()), rel=1e-4)


def test_convert_refuses_what_overflows_and_leaves_nothing(tmp_path: Path) -> None:
    vector = AlignmentVector({"w": torch.randn(64, 64).clamp(-3, 3) * 1e38})
    with pytest.raises(AlignvecError, match="delta w overflows when it is read back from this format: choose another"):
        convert(vector, tmp_path / "o", "low-rank:rank=2")
    wide = AlignmentVector({"w": torch.full((4, 32), 1e200, dtype=torch.float64)})
    with pytest.raises(AlignvecError, match="delta w is too large for what encoding loses"):
        convert(wide, tmp_path / "o", "dense")
    assert list(tmp_path.iterdir()) == []


NAMES = ["", "a\0b", "a\nb", "é", "😀", "a/b", '"', "\\", "[/red]", "x" * 1024, "x" * 1025, "__metadata__", "\ud800"]


@pytest.mark.parametrize("name", NAMES, ids=lambda name: ascii(name[:12]))
def test_names_are_given_back_or_refused(name: str, tmp_path: Path) -> None:
    """The safetensors library is who says which names a file holds."""
    vector = AlignmentVector({name: torch.ones(2, 32)})
    if name in ("__metadata__", "\ud800") or len(name) > 1024:
        with pytest.raises(AlignvecError, match="cannot be stored as"):
            vector.save(tmp_path / "v")
        assert list(tmp_path.iterdir()) == []
        return
    vector.save(tmp_path / "dense")
    if len(name) == 1024:  # as a part of a delta it has a longer one
        with pytest.raises(AlignvecError, match=r"cannot be stored as .*, a name of 1030 characters"):
            convert(vector, tmp_path / "sign", "sign")
        return
    convert(vector, tmp_path / "sign", "sign")
    assert list(load_file(tmp_path / "dense" / "alignment_vector.safetensors")) == [name]
    assert f"{name}/signs" in load_file(tmp_path / "sign" / "alignment_vector.safetensors")
    for folder in tmp_path.iterdir():
        assert torch.equal(alignvec.load(folder)[name], torch.ones(2, 32))


def test_two_deltas_by_one_name(tmp_path: Path) -> None:
    int4 = convert(AlignmentVector({"w": torch.ones(2, 32)}), tmp_path / "int4", "int4")
    assert int4 is not None
    both = AlignmentVector({"w": int4.encoded("w"), "w/scales": torch.ones(2)})
    for call in (
        lambda: both.save(tmp_path / "v"),
        lambda: convert(AlignmentVector({"w": torch.ones(2, 32), "w/scales": torch.ones(2)}), tmp_path / "v", "int4"),
    ):
        with pytest.raises(AlignvecError, match="two deltas would be stored as 'w/scales': rename one"):
            call()
    (tmp_path / "s").mkdir()
    with Spool(tmp_path / "s", "1GB") as spool, pytest.raises(AlignvecError, match="__metadata__"):
        spool.write("__metadata__", AlignmentVector({"x": torch.ones(2)}).encoded("x"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["int4", "s"]


@pytest.mark.parametrize("value", [math.nan, math.inf, {1, 2}, torch.ones(2)], ids=["nan", "inf", "set", "tensor"])
def test_json_that_no_reader_takes_is_not_written(value: object, tmp_path: Path) -> None:
    with pytest.raises(AlignvecError, match=r"x\.json cannot be written, for JSON cannot hold"):
        write_json(tmp_path / "x.json", {"a": [value]})
    AlignmentVector({"w": torch.ones(2)}).save(tmp_path / "v")
    with pytest.raises(AlignvecError, match=r"alignment_vector\.json cannot be written"):
        AlignmentVector({"w": torch.zeros(2)}, source={"a": value}).save(tmp_path / "v", overwrite=True)
    assert alignvec.load(tmp_path / "v")["w"].tolist() == [1.0, 1.0]
    assert [path.name for path in tmp_path.iterdir()] == ["v"]


def test_figures_that_are_unknown_become_null() -> None:
    assert nulled({"a": (1.5, math.nan), "b": [{"c": -math.inf}, "d", 3]}) == {
        "a": [1.5, None],
        "b": [{"c": None}, "d", 3],
    }
