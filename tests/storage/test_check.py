"""The realised coefficient is the requested one, where a merge stored in bfloat16 is far off."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from alignvec import AlignmentVector, check
from alignvec.check import GRID, plot
from alignvec.checkpoint import Checkpoint
from alignvec.errors import AlignvecError
from bench import realised
from tests.storage.checkpoints import write_checkpoint

SHAPES = {
    "model.layers.0.mlp.up_proj.weight": (320, 192),
    "model.layers.0.mlp.experts": (3, 64, 96),
    "model.norm.weight": (999,),
}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    generator = torch.Generator().manual_seed(0)
    tensors = {name: (torch.randn(shape, generator=generator) * 0.02).bfloat16() for name, shape in SHAPES.items()}
    return write_checkpoint(tmp_path / "base", tensors)


def uniform_steps(base: Path, ulps: float) -> AlignmentVector:
    """Every delta is `ulps` units in the last place of its bfloat16 weight, up or down."""
    generator = torch.Generator().manual_seed(1)
    checkpoint = Checkpoint.open(base)
    return AlignmentVector(
        {name: realised.uniform_steps(checkpoint.tensor(name), ulps, generator) for name in checkpoint.tensors}
    )


ULPS = (0.3, 0.6, 1.0, 1.7, 3.0)


def test_realised_coefficients(base: Path, tmp_path: Path) -> None:
    rows = check(base, {f"{ulps} ULP": uniform_steps(base, ulps) for ulps in ULPS})
    assert len(rows) == len(ULPS) * len(GRID)
    assert (min(row.requested for row in rows), max(row.requested for row in rows)) == (-1.3, 1.3)
    assert max(abs(row.alignvec - row.requested) for row in rows) < 1e-3
    assert max(abs(row.naive - row.requested) for row in rows) > 0.35
    plot(rows, tmp_path / "check.png")
    assert (tmp_path / "check.png").stat().st_size > 10_000


def test_a_larger_step_is_realised_better_by_a_merge(base: Path) -> None:
    def error(ulps: float) -> float:
        rows = check(base, {"v": uniform_steps(base, ulps)})
        return max(abs(row.naive - row.requested) for row in rows)

    assert error(0.6) > error(3.0) > error(60.0)
    assert error(60.0) < 0.01


def test_a_float32_model_realises_everything(base: Path) -> None:
    rows = check(base, {"v": uniform_steps(base, 0.5)}, [0.1, 1.0], dtype="float32")
    assert [row.naive for row in rows] == pytest.approx([0.1, 1.0], abs=1e-5)


def test_bad_input(base: Path) -> None:
    vector = uniform_steps(base, 1)
    with pytest.raises(AlignvecError, match="coefficient 0 is nan; it must be finite"):
        check(base, {"v": vector}, [float("nan")])
    with pytest.raises(AlignvecError, match=r"'v' does not fit base: .* no place there \(x\)"):
        check(base, {"v": AlignmentVector({"x": torch.ones(2)})})
    with pytest.raises(AlignvecError, match="dtype int8"):
        check(base, {"v": vector}, dtype="int8")


@pytest.mark.parametrize("name", SHAPES)
def test_float64_deltas_are_checked_as_they_are_attached(base: Path, name: str) -> None:
    delta = torch.full(SHAPES[name], 0.25, dtype=torch.float64)
    (row,) = check(base, {"v": AlignmentVector({name: delta})}, [1.0])
    assert row.alignvec == pytest.approx(1.0, abs=1e-6)
    (row,) = check(base, {"v": AlignmentVector({name: delta * 1e60})}, [1.0], dtype="float64")
    assert row.alignvec == pytest.approx(1.0, abs=1e-6)
    with pytest.raises(AlignvecError, match=f"{name}: a float64 delta goes beyond float32"):
        check(base, {"v": AlignmentVector({name: delta * 1e60})}, [1.0])
