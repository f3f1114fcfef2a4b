"""Operations that keep some of the values: TIES and DARE."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial, reduce
from pathlib import Path
from typing import Unpack

import torch
from torch import Tensor
from torch.nn import functional as F

from alignvec import formats
from alignvec.deltas import STEP
from alignvec.errors import AlignvecError
from alignvec.formats import Encoded, Spec
from alignvec.formats.threshold import threshold
from alignvec.surgery.pieces import make_by_pieces
from alignvec.surgery.streamed import ONE, Storage, Vectors, make, opened
from alignvec.vector import AlignmentVector


def ties(
    vectors: Vectors,
    density: float = 0.2,
    *,
    disjoint: str = "mean",
    trim: str = "vector",
    **storage: Unpack[Storage],
) -> AlignmentVector:
    """One vector by TIES-merging (arXiv 2306.01708): trim, elect a sign, merge what agrees with it.

    Trim: of each "vector", all its parameters together (the paper's way, and PEFT's for each parameter that it is
    given), or of each "tensor" by itself (mergekit's), the share ``density`` of largest magnitude stays, with all that
    are as large as the last of them. Elect: a weight's sign is that of the sum over the vectors, positive where they
    cancel. Merge: the ``disjoint`` "mean" of the values of that sign (the paper's), or their "sum". A vector counts for
    more when it is multiplied beforehand.

    Vectors are read twice, by pieces, and a dense result is written as they are read. Raises AlignvecError for no
    vectors, different bases or shapes, a density outside (0, 1], or another ``disjoint`` or ``trim``.
    """
    return _ties(vectors, density, disjoint, trim, storage, merge=True)[ONE]


def ties_parts(
    vectors: Vectors,
    density: float = 0.2,
    *,
    disjoint: str = "sum",
    trim: str = "vector",
    **storage: Unpack[Storage],
) -> dict[str, AlignmentVector]:
    """The summands of ``ties``, by name: each vector trimmed, without the values whose sign lost, so that every one
    keeps a coefficient of its own. At coefficients 1 they add up to ``ties`` with the same ``disjoint`` and ``trim``.

    By "sum", the default here, remaining values are the vector's own; by "mean" they are divided by how many vectors
    have one there. Raises AlignvecError as ``ties``.
    """
    return _ties(vectors, density, disjoint, trim, storage, merge=False)


def dare(
    vector: AlignmentVector | str | Path, density: float = 0.1, *, seed: int = 0, **storage: Unpack[Storage]
) -> AlignmentVector:
    """Drop and rescale (DARE, arXiv 2311.03099): each value stays with probability ``density``, divided by it.

    The paper's drop rate is ``1 - density``. Norms and biases are dropped, too. What stays depends on ``seed`` and the
    parameter's name alone: vectors that are to be combined need different seeds, or they keep the same places. Matrices
    are made as the format ``sparse:method=dare`` makes them, and stored so by default.
    Raises AlignvecError for a density outside (0, 1] or a negative seed.
    """
    spec = formats.parse(Spec("sparse", {"method": "dare", "density": _density(density), "seed": seed}))
    found = opened({"vector": vector})

    def compute(name: str, deltas: list[Tensor]) -> list[Tensor | Encoded]:
        (delta,) = deltas
        if delta.dim() > 1:
            return [formats.encode(spec, delta, name=name)]
        return [formats.decode(formats.encode(spec, delta.view(1, -1), name=name)).view_as(delta)]

    source = {"operation": "dare", "density": density, "seed": seed}
    return make(found, [ONE], compute, source, storage, {"vector": vector})[ONE]


def _ties(
    vectors: Vectors, density: float, disjoint: str, trim: str, storage: Storage, *, merge: bool
) -> dict[str, AlignmentVector]:
    if disjoint not in ("mean", "sum"):
        raise AlignvecError(f'disjoint must be "mean" or "sum", not {disjoint!r}')
    if trim not in ("vector", "tensor"):
        raise AlignvecError(f'trim must be "vector" or "tensor", not {trim!r}: what the density is a share of')
    _density(density)
    found = opened(vectors)
    least = [_least(vector, density, trim) for vector in found.values()]

    def compute(name: str, deltas: list[Tensor]) -> list[Tensor]:
        trimmed = [_trimmed(delta, own.get(name, 0.0)) for delta, own in zip(deltas, least, strict=True)]
        sign = torch.copysign(torch.ones((), dtype=deltas[0].dtype), reduce(torch.add, trimmed))
        kept = [(values * sign).relu_() for values in trimmed]  # magnitudes of the elected sign, 0 elsewhere
        if disjoint == "mean":
            count = reduce(torch.add, [values.sign() for values in kept]).clamp_(min=1)
            kept = [values.div_(count) for values in kept]
        if merge:
            kept = [reduce(torch.add, kept)]
        return [(values * sign).add_(0.0) for values in kept]  # 0 is added so that none is -0.0

    source = {"operation": "ties" if merge else "ties_parts", "density": density, "disjoint": disjoint, "trim": trim}
    return make_by_pieces(found, [ONE] if merge else list(found), compute, source, storage, vectors)


def _least(vector: AlignmentVector, density: float, trim: str) -> dict[str, float]:
    """The smallest magnitude that stays, by parameter."""
    if trim == "vector":
        return dict.fromkeys(vector, threshold(lambda: _pieces(vector, vector.names), density))
    return {name: threshold(partial(_pieces, vector, [name]), density) for name in vector}


def _trimmed(delta: Tensor, least: float) -> Tensor:
    """The values whose magnitude, as float32, is at least that; 0 elsewhere."""
    if delta.dtype == torch.float64:
        return torch.where(delta.float().abs() >= least, delta, 0)
    below = torch.nextafter(torch.tensor(least), torch.tensor(0.0))
    return F.hardshrink(delta, float(below))  # which keeps what is above its limit


def _density(density: float) -> float:
    if not 0 < density <= 1:
        raise AlignvecError(f"density={density} must be above 0 and at most 1: it is the share of values that stay")
    return float(density)


def _pieces(vector: AlignmentVector, names: Iterable[str]) -> Iterator[Callable[[], Tensor]]:
    for name in names:
        numel = vector.tensors[name].numel
        yield from (partial(vector.read, name, start, min(start + STEP, numel)) for start in range(0, numel, STEP))
