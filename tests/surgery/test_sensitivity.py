"""Sensitivity of rates to coefficients, on rates that are known."""

from __future__ import annotations

import pytest
import torch

from alignvec import AlignvecError
from alignvec.evaluate.sensitivity import sensitivity


def test_it_is_the_slope_of_each_domain() -> None:
    slopes = torch.arange(12.0, dtype=torch.float64).view(2, 3, 2)  # [vectors, domains, levels]
    seen: list = []

    def measure(mixes):  # type: ignore[no-untyped-def]
        seen.extend(mixes)
        c = torch.tensor([[mix.get("a", 0.0), mix.get("b", 0.0)] for mix in mixes], dtype=torch.float64)
        return (torch.einsum("mv,vdl->mdl", c, slopes) + (c**2).sum(1)[:, None, None] + 0.3).numpy()

    torch.testing.assert_close(sensitivity(measure, ["a", "b"], coefficient=0.25), slopes)
    assert seen == [{"a": 0.25}, {"a": -0.25}, {"b": 0.25}, {"b": -0.25}]


def test_it_refuses_what_it_cannot_measure() -> None:
    for names, coefficient, rates, message in (
        ([], 0.5, None, "names"),
        (["a", "a"], 0.5, None, "once"),
        (["a"], 0.0, None, "coefficient"),
        (["a"], 0.5, torch.zeros(2, 3), "shape"),
    ):
        with pytest.raises(AlignvecError, match=message):
            sensitivity(lambda _, rates=rates: rates, names, coefficient=coefficient)
