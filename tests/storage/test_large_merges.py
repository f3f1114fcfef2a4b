"""Merges of deltas whose squares float32 does not hold: weights and realised coefficients against float64."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from alignvec import AlignmentVector, convert, extract, merge
from alignvec.errors import AlignvecError
from alignvec.rounding import RealisedCoefficients


def pair(folder: Path, base: torch.Tensor, aligned: torch.Tensor) -> tuple[Path, Path]:
    for name, values in (("base", base), ("aligned", aligned)):
        (folder / name).mkdir()
        save_file({"w": values}, folder / name / "model.safetensors")
        (folder / name / "config.json").write_text("{}")
    return folder / "base", folder / "aligned"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("size", [2.0**66, 2.0**100, 2.0**-80])
@pytest.mark.parametrize("coefficient", [0.0, 0.5, 1.0])
def test_powers_of_two_are_merged_exactly(tmp_path: Path, dtype: torch.dtype, size: float, coefficient: float) -> None:
    base = torch.full((4, 8), size, dtype=dtype)
    folders = pair(tmp_path, base, 3 * base)
    extract(*folders, output=tmp_path / "v")
    report = merge(folders[0], {"v": tmp_path / "v"}, {"v": coefficient}, tmp_path / "m")
    assert report.realised == {"v": coefficient}
    assert json.loads((tmp_path / "m" / "merge_report.json").read_text())["realised"] == {"v": coefficient}
    assert torch.equal(load_file(tmp_path / "m" / "model.safetensors")["w"], (1 + 2 * coefficient) * base)


@pytest.mark.parametrize("size", [1e30, 1.0, 1e-30])
def test_what_rounding_left_is_told_of_every_size(size: float) -> None:
    """Half of the values moved: half of the coefficient was realised."""
    delta = torch.full((64,), size)
    merged = torch.cat([delta[:32], torch.zeros(32)])
    realised = RealisedCoefficients(1)
    realised.update(torch.zeros(64), merged, {0: delta})
    assert realised.solve([1.0]) == [pytest.approx(0.5, rel=1e-6)]


def test_coefficients_that_float64_does_not_tell_are_unknown(tmp_path: Path) -> None:
    base = torch.full((4, 8), 1e300, dtype=torch.float64)
    folders = pair(tmp_path, base, 3 * base)
    vectors = {name: extract(*folders, output=tmp_path / name) for name in "vw"}
    report = merge(folders[0], vectors, {"v": 1.0, "w": 0.0}, tmp_path / "m")
    assert all(math.isnan(value) for value in report.realised.values())
    assert json.loads((tmp_path / "m" / "merge_report.json").read_text())["realised"] == {"v": None, "w": None}
    assert torch.allclose(load_file(tmp_path / "m" / "model.safetensors")["w"], 3 * base, rtol=1e-15)


@pytest.mark.parametrize("format", ["low-rank:rank=2", "auto:0.5", "int8", "sign", "sparse"])
def test_beyond_float32_only_dense_will_do(tmp_path: Path, format: str) -> None:
    base = torch.ones(4, 8, dtype=torch.float64)
    folders = pair(tmp_path, base, 1e151 * base)
    for output in (None, tmp_path / "v"):
        with pytest.raises(AlignvecError, match=r"delta w (leaves float32's range|is too large)"):
            extract(*folders, format=format, output=output)


def test_norms_that_no_file_may_hold_are_refused_before_they_are_written(tmp_path: Path) -> None:
    vector = AlignmentVector({"w": torch.full((64,), 1e151, dtype=torch.float64)})
    with pytest.raises(AlignvecError, match=r"^delta w is too large .* its norm is above 3e\+150"):
        convert(vector, tmp_path / "v", "dense")
