"""The threshold that a share of the values reaches: what sorting gives, in every dtype and however it is cut up."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from alignvec.formats import threshold as module
from alignvec.formats.threshold import threshold

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def sorted_(values: list[Tensor], density: float) -> float:
    flat = torch.cat([v.float().flatten() for v in values]).abs().sort(descending=True).values
    return max(float(flat[max(1, round(density * len(flat))) - 1]), 2.0**-149)


@pytest.mark.parametrize("dtypes", [*[(dtype,) for dtype in DTYPES], DTYPES])
@pytest.mark.parametrize("density", [1e-9, 0.1, 0.5, 0.999, 1.0])
def test_it_is_the_kth_of_all(dtypes: tuple[torch.dtype, ...], density: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "STEP", 100)
    generator = torch.Generator().manual_seed(0)
    scales = (1.0, 1e-3, 1e-7, 1e4)
    values = [
        (torch.randn(40, 17, generator=generator) * scale).to(dtype)
        for dtype in dtypes
        for scale in scales[: 3 if dtype == torch.float16 else 4]
    ]
    values += [torch.zeros(30, dtype=dtypes[0]), torch.ones(50, dtype=dtypes[0]), torch.empty(0, dtype=dtypes[0])]
    values.append(values[0].t())  # not contiguous
    assert threshold(lambda: (value.clone for value in values), density) == sorted_(values, density)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_bit_of_the_magnitude_counts(dtype: torch.dtype) -> None:
    """Neighbours of each other, in the last bit that the dtype has."""
    start = torch.tensor(0.0123, dtype=dtype)
    values = [start]
    for _ in range(20):
        values.append(torch.nextafter(values[-1], torch.tensor(1.0, dtype=dtype)))
    together = torch.stack(values)[torch.randperm(21)] * torch.tensor([1, -1, 1] * 7, dtype=dtype)
    for k in range(1, 22):
        assert threshold(lambda: [together.clone], k / 21) == sorted_([together], k / 21)


def test_a_16_bit_value_is_read_once() -> None:
    reads = []

    def read(value: Tensor) -> Tensor:
        reads.append(value.dtype)
        return value

    pieces = [torch.randn(8).to(dtype) for dtype in DTYPES]
    threshold(lambda: (partial(read, piece) for piece in pieces), 0.3)
    assert {dtype: reads.count(dtype) for dtype in DTYPES} == dict(zip(DTYPES, (1, 1, 2, 2), strict=True))


@pytest.mark.parametrize("pieces", [[], [torch.zeros(3, 4).clone], [torch.empty(0).clone]])
def test_of_zeros_or_nothing_it_is_the_smallest_number(pieces: list) -> None:  # type: ignore[type-arg]
    assert threshold(lambda: pieces, 0.5) == 2.0**-149
