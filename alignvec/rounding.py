"""The arithmetic of a stored mix: one float32 sum, one rounding, and the coefficients that the rounding left."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from types import EllipsisType

import torch
from torch import Tensor

from alignvec.difference import SMALLEST
from alignvec.errors import AlignvecError

STEP = 1 << 17  # values at a time: float32 scratch stays in cache
ROUNDINGS = ("nearest", "stochastic")


def mix_(
    out: Tensor,
    base: Tensor,
    deltas: Sequence[Tensor],
    coefficients: Sequence[float],
    rounding: str = "nearest",
    generator: torch.Generator | None = None,
) -> Tensor:
    """``out = round(base + sum_i coefficients[i] * deltas[i])``, all of one shape; ``out`` may be ``base`` itself.

    The edit is summed in float32 (float64 when a float64 tensor takes part), added to the base, and rounded once to
    ``out``'s dtype: to the nearest value, or to one of the two neighbours at random such that the mean is right.
    """
    if rounding not in ROUNDINGS:
        raise AlignvecError(f"rounding {rounding!r} is not known: choose one of {', '.join(ROUNDINGS)}")
    tensors = (base, out, *deltas)
    wide = torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32
    for piece in _slices(base):
        edit: Tensor | None = None
        for delta, coefficient in zip(deltas, coefficients, strict=True):
            values = delta[piece].to(base.device, wide)
            edit = values * coefficient if edit is None else edit.add_(values, alpha=coefficient)
        total = base[piece].to(wide)
        total = total if edit is None else edit.add_(total)
        if rounding == "stochastic" and out.dtype.itemsize == 2:
            out[piece] = stochastic(total, out.dtype, generator)
        else:
            out[piece] = total
    return out


def stochastic(values: Tensor, dtype: torch.dtype, generator: torch.Generator | None = None) -> Tensor:
    """``values`` in a 16-bit ``dtype``, each one up or down at random so that its mean is the value.

    The nearest value is replaced by its neighbour on the other side with probability error / distance.
    """
    nearest = values.to(dtype)
    error = values - nearest.to(values.dtype)
    bits = nearest.view(torch.int16)
    outwards = (error > 0) == (nearest > 0)  # the neighbour lies further from zero
    smallest = torch.where(error < 0, torch.full_like(bits, -(2**15)), torch.zeros_like(bits)) + 1  # sign bit and 1
    neighbour = torch.where(nearest == 0, smallest, torch.where(outwards, bits + 1, bits - 1)).view(dtype)
    distance = (neighbour.to(values.dtype) - nearest.to(values.dtype)).abs()
    draw = torch.rand(values.shape, dtype=values.dtype, device=values.device, generator=generator)
    return torch.where(draw * distance < error.abs(), neighbour, nearest)


class RealisedCoefficients:
    """Least squares of a realised edit on the vectors, gathered tensor by tensor, or piece by piece.

    Products are float32 within a piece of 2**17 values (float64 for float64 tensors, and where float32 does not hold
    the squares), their sums float64.
    """

    def __init__(self, count: int) -> None:
        self._gram = torch.zeros(count, count, dtype=torch.float64)
        self._edit = torch.zeros(count, dtype=torch.float64)

    def update(self, base: Tensor, merged: Tensor, deltas: Mapping[int, Tensor]) -> None:
        """Take a tensor before and after, and the deltas (by the vector's number) that it has; one shape for all."""
        if not deltas:
            return
        numbers = torch.tensor(list(deltas))
        tensors = [*deltas.values(), merged, base]
        wide = torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32
        for piece in _slices(merged):
            pieces = [tensor[piece] for tensor in tensors]
            products = _products(pieces, wide)
            if wide == torch.float32 and not _held(products, pieces):
                products = _products(pieces, torch.float64)
            self._gram[numbers[:, None], numbers] += products[:, :-1]
            self._edit[numbers] += products[:, -1]

    def add(self, other: RealisedCoefficients) -> None:
        """Take what another one has gathered."""
        self._gram += other._gram
        self._edit += other._edit

    def solve(self, requested: Sequence[float] | None = None) -> list[float]:
        """The coefficients that explain the edit best; among equally good ones (zero or collinear vectors), those
        nearest to ``requested`` (zeros if it is not given). NaN where float64 does not hold the squares."""
        if not (self._gram.isfinite().all() and self._edit.isfinite().all()):
            return [math.nan] * len(self._edit)
        wanted = (
            torch.zeros_like(self._edit) if requested is None else torch.tensor(list(requested), dtype=torch.float64)
        )
        scale = self._gram.diagonal().sqrt()
        scale = torch.where(scale > 0, scale, torch.ones_like(scale))
        gram = self._gram / scale[:, None] / scale
        off = (self._edit - self._gram @ wanted) / scale
        return (wanted + torch.linalg.pinv(gram, rtol=1e-10, hermitian=True) @ off / scale).tolist()


def _products(tensors: Sequence[Tensor], wide: torch.dtype) -> Tensor:
    """Of the deltas with each other and with the edit, [n, n + 1], float64; the tensors: n deltas, merged, base."""
    rows = torch.empty(len(tensors), *tensors[-1].shape, dtype=wide, device=tensors[-2].device)
    for row, tensor in zip(rows, tensors, strict=True):
        row.copy_(tensor)
    rows[-2].sub_(rows[-1])
    flat = rows[:-1].flatten(1)
    return (flat[:-1] @ flat.T).double().cpu()


def _held(products: Tensor, tensors: Sequence[Tensor]) -> bool:
    """Whether float32 held the products: none overflowed, and no delta's squares vanished."""
    squares = products.diagonal()
    small = [bool(tensor.any()) for tensor, square in zip(tensors, squares, strict=False) if square < SMALLEST]
    return bool(products.isfinite().all()) and not any(small)


def _slices(tensor: Tensor) -> Iterator[slice | EllipsisType]:
    """Pieces of about STEP values along the first dimension (the whole of a scalar)."""
    if tensor.dim() == 0:
        return iter([...])
    rows = max(1, STEP * tensor.shape[0] // max(tensor.numel(), 1))
    return (slice(start, start + rows) for start in range(0, tensor.shape[0], rows))
