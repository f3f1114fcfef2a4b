"""Norms, products and realised coefficients of deltas whose squares leave float32's range, or float64's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from alignvec import AlignmentVector, merge
from alignvec.errors import AlignvecError
from alignvec.surgery import cosines
from tests.storage.checkpoints import write_checkpoint

NAME = "model.norm.weight"


def of(*values: float, dtype: torch.dtype = torch.float64) -> AlignmentVector:
    return AlignmentVector({NAME: torch.tensor(values, dtype=dtype)})


@pytest.mark.parametrize("delta", [2.0**120, 2.0**70, 2.0**-70, 2.0**-120])
def test_the_report_of_a_merge_tells_coefficients_of_any_delta_that_a_model_holds(tmp_path: Path, delta: float) -> None:
    """Float32 has no square of these, so that they came out as NaN, or as what was asked for."""
    base = write_checkpoint(tmp_path / "base", {NAME: torch.tensor([0.0, 1.0, 1.0], dtype=torch.bfloat16)})
    vector = AlignmentVector({NAME: torch.tensor([delta, 0.0, 0.0], dtype=torch.bfloat16)})
    assert merge(base, {"v": vector}, {"v": 0.5}, tmp_path / "merged").realised["v"] == 0.5
    lost = AlignmentVector({NAME: torch.tensor([0.0, delta, 0.0], dtype=torch.bfloat16)})
    realised = merge(base, {"v": lost}, {"v": 0.5}, tmp_path / "lost").realised["v"]
    assert realised == (0.5 if delta > 1 else 0.0)  # 1 + 2**-71 is 1 in bfloat16


def test_norms_and_products_that_overflow_are_refused_by_what_they_are_of() -> None:
    huge = of(1e200, 0.0)
    with pytest.raises(AlignvecError, match="the norm of the vector cannot be told"):
        huge.norm()
    with pytest.raises(AlignvecError, match=f"the norm of delta {NAME} cannot be told"):
        huge.norm(NAME)
    with pytest.raises(AlignvecError, match="inner product"):
        huge.dot(huge)
    with pytest.raises(AlignvecError, match="norm"):
        huge.cosine(of(1.0, 0.0))
    with pytest.raises(AlignvecError, match=NAME):
        huge.statistics()
    with pytest.raises(AlignvecError, match="cosines"):
        cosines({"a": huge, "b": of(1.0, 0.0)})
    assert (huge * 1e-200).norm() == pytest.approx(1.0)


def test_cosines_of_vectors_whose_norms_multiply_to_more_than_float64_holds() -> None:
    """Each norm is sqrt(2) 1e154, their product 2e308."""
    one, other = of(1e154, 1e154 / 2), of(1e154 / 2, 1e154)
    assert one.cosine(other) == pytest.approx(0.8)
    assert float(cosines({"a": one, "b": other}).overall[0, 1]) == pytest.approx(0.8)
    small = of(1e-160, 0.0), of(1e-160, 1e-160)
    assert small[0].cosine(small[1]) == pytest.approx(0.5**0.5, rel=1e-2)
