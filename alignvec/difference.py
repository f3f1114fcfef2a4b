"""What two tensors differ by, rounded once, and what the rounding lost."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

STEP = 1 << 17  # values subtracted at a time
SMALLEST = 1e-28  # a sum of so many float32 squares that is above this has lost none that counts


@dataclass
class Tally:
    """What storing a difference lost: how many values were rounded, the squared error, the squared norm."""

    inexact: int = 0
    error: float = 0.0
    square: float = 0.0

    def add(self, other: Tally) -> None:
        self.inexact += other.inexact
        self.error += other.error
        self.square += other.square


def difference(
    base: Tensor, aligned: Tensor, dtype: torch.dtype, out: Tensor | None = None
) -> tuple[Tensor, Tally] | None:
    """``aligned - base`` of flat tensors, rounded once to ``dtype``; None where nothing differs.

    ``out``: a uint8 buffer for the result.
    """
    if base.dtype == aligned.dtype and same_bytes(base, aligned):
        return None
    wide = torch.float64 if torch.float64 in (base.dtype, aligned.dtype, dtype) else torch.float32
    tally, moved = Tally(), False
    size = base.numel() * dtype.itemsize
    delta = (torch.empty(size, dtype=torch.uint8) if out is None else out[:size]).view(dtype)
    one, two = torch.empty(2, min(STEP, base.numel()), dtype=wide)
    for start in range(0, base.numel(), STEP):  # so short that the scratch stays in cache
        piece = slice(start, start + STEP)
        exact, other, stored = one[: base[piece].numel()], two[: base[piece].numel()], delta[piece]
        torch.sub(exact.copy_(aligned[piece]), other.copy_(base[piece]), out=exact)
        stored.copy_(exact)
        moved = moved or any(float(end) for end in stored.aminmax())
        if dtype != wide:
            tally.square += square(exact)
            error = torch.sub(exact, other.copy_(stored), out=other)
            if inexact := int(error.view(torch.int64 if wide == torch.float64 else torch.int32).count_nonzero()):
                tally.inexact += inexact
                tally.error += square(error)
    return (delta, tally) if moved else None


def square(values: Tensor) -> float:
    """The sum of squares of flat values; in float64 where those of float32 would overflow, or be lost."""
    found = float(torch.dot(values, values))
    if SMALLEST <= found < math.inf or values.dtype == torch.float64 or (not found and not values.any()):
        return found
    return float(torch.dot(wide := values.double(), wide))


def same_bytes(one: Tensor, two: Tensor) -> bool:
    words = torch.uint8 if one.nbytes % 8 or one.data_ptr() % 8 or two.data_ptr() % 8 else torch.int64
    return torch.equal(one.view(words), two.view(words))
