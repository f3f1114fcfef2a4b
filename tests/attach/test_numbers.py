"""Coefficients are float32 on the device: what is not finite there is refused by the vector's name."""

from __future__ import annotations

from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy
import pytest
import torch

import alignvec
from alignvec import AlignvecError
from tests.models import random_vector, tiny

LARGEST = (2.0 - 2.0**-23) * 2.0**127  # of float32
HALFWAY = 2.0**128 - 2.0**103  # rounds to an even number, which is infinity
TOO_LARGE = [1e39, -3.5e38, HALFWAY, -HALFWAY, 10**400, -(10**400), 10**5000, 2**128, Decimal("1e39"), Decimal("1e400")]
NOT_FINITE = [float("nan"), float("-inf"), Decimal("NaN"), numpy.float64(1e39), numpy.float32("inf"), Fraction(10**50)]
NO_NUMBER = [
    "0.5",
    b"0.5",
    None,
    "much",
    1j,
    [1.0],
    {},
    Decimal("sNaN"),
    torch.ones(2),
    numpy.ones(2),
    torch.tensor(1j),
]

WRITES: dict[str, Callable[[alignvec.Alignment, Any], Any]] = {
    "set": lambda a, value: a.set(b=0.5, a=value),
    "a mapping": lambda a, value: a.set({"b": 0.5, "a": value}),
    "set_rows": lambda a, value: a.set_rows([{"b": 0.5}, {"a": value}]),
    "using": lambda a, value: a.using(a=value).__enter__(),
    "materialise": lambda a, value: a.materialise(a=value),
    "decoder": lambda a, value: a.decoder(max_length=16).join([3, 4], {"a": value}),
    "table": lambda a, value: a.decoder(max_length=16).join([3, 4], [{}, {"a": value}]),
    "function": lambda a, value: a.decoder(max_length=16).join([3, 4], lambda token: {"a": value}),
    "blend": lambda a, value: a.decoder(max_length=16).generate(
        torch.tensor([[3, 4]]), max_new_tokens=2, blend=[({"a": value}, 1.0)]
    ),
}


@pytest.fixture(scope="module")
def alignment() -> alignvec.Alignment:
    model = tiny(num_hidden_layers=1)
    return alignvec.attach(model, {"a": random_vector(model, 1), "b": random_vector(model, 2)})


@pytest.mark.parametrize("way", WRITES)
def test_what_is_infinite_in_the_table_is_refused(alignment: alignvec.Alignment, way: str) -> None:
    alignment.set(a=0.25)
    values = [*TOO_LARGE, *NOT_FINITE] if way in ("set", "set_rows") else [1e39, 10**400, Decimal("1e39")]
    for value in values:
        with pytest.raises(
            AlignvecError, match=r"the coefficient of 'a' is .*must be finite, also in float32"
        ) as refusal:
            WRITES[way](alignment, value)
        assert len(str(refusal.value)) < 200
        assert alignment.coefficients == {"a": 0.25, "b": 0.0}
        assert not alignment.weights


@pytest.mark.parametrize("value", NO_NUMBER, ids=lambda value: type(value).__name__)
def test_what_is_no_number_is_refused(alignment: alignvec.Alignment, value: Any) -> None:
    alignment.set(a=0.25)
    with pytest.raises(AlignvecError, match="the coefficient of 'a' must be a number"):
        alignment.set(a=value)
    assert alignment.coefficients == {"a": 0.25, "b": 0.0}


@pytest.mark.parametrize("mix", [5, "a", ["a"], [("a", 1.0)], None], ids=str)
def test_what_is_no_mix_is_refused(alignment: alignvec.Alignment, mix: Any) -> None:
    for call in (alignment.set_rows, alignment.decoder(max_length=16).generate):
        with pytest.raises(AlignvecError):
            call([mix])
    if mix is not None:
        for call in (alignment.set, alignment.materialise):
            with pytest.raises(AlignvecError, match="is no mix: give coefficients by name"):
                call(mix)


@pytest.mark.parametrize(
    "value", [LARGEST, -LARGEST, 3, True, numpy.float16(0.5), numpy.int64(2), Decimal("0.5"), Fraction(1, 2), -0.0]
)
def test_numbers_of_every_kind(alignment: alignvec.Alignment, value: Any) -> None:
    alignment.set(a=value)
    assert alignment.coefficients == {"a": float(value), "b": 0.0}
    assert torch.isfinite(alignment.table.staged(torch.device("cpu")).table).all()
    alignment.set(a=torch.tensor(0.5))
    assert alignment.coefficients["a"] == 0.5  # type: ignore[call-overload]
