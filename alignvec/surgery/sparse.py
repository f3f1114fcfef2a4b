"""Operations that keep some of the values: TIES and DARE."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Unpack

import torch
from torch import Tensor

from alignvec import formats
from alignvec.errors import AlignvecError
from alignvec.formats import Encoded, Spec
from alignvec.formats.sparse import threshold
from alignvec.surgery.streamed import ONE, Storage, Vectors, make, opened
from alignvec.vector import AlignmentVector


def ties(
    vectors: Vectors, density: float = 0.2, *, disjoint: str = "mean", **storage: Unpack[Storage]
) -> AlignmentVector:
    """One vector by TIES-merging (arXiv 2306.01708): trim, elect a sign, merge what agrees with it.

    Trim: of each vector, all its parameters together, the share ``density`` of largest magnitude stays. Elect: a
    weight's sign is that of the sum over the vectors, positive where they cancel. Merge: the ``disjoint`` "mean" of the
    values of that sign (the paper's), or their "sum". A vector counts for more when it is multiplied beforehand.

    Raises AlignvecError for no vectors, different bases or shapes, a density outside (0, 1] or another ``disjoint``.
    """
    return _ties(vectors, density, disjoint, storage, merge=True)[ONE]


def ties_parts(
    vectors: Vectors, density: float = 0.2, *, disjoint: str = "sum", **storage: Unpack[Storage]
) -> dict[str, AlignmentVector]:
    """The summands of ``ties``, by name: each vector trimmed, without the values whose sign lost, so that every one
    keeps a coefficient of its own. At coefficients 1 they add up to ``ties`` with the same ``disjoint``.

    By "sum", the default here, remaining values are the vector's own; by "mean" they are divided by how many vectors
    have one there. Raises AlignvecError as ``ties``.
    """
    return _ties(vectors, density, disjoint, storage, merge=False)


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
    vectors: Vectors, density: float, disjoint: str, storage: Storage, *, merge: bool
) -> dict[str, AlignmentVector]:
    if disjoint not in ("mean", "sum"):
        raise AlignvecError(f'disjoint must be "mean" or "sum", not {disjoint!r}')
    _density(density)
    found = opened(vectors)
    least = [threshold(partial(_pieces, vector), density) for vector in found.values()]

    def compute(name: str, deltas: list[Tensor]) -> list[Tensor | Encoded]:
        kept = _elected(deltas, least)
        if disjoint == "mean":
            kept /= (kept != 0).sum(0).clamp(min=1)
        return [kept.sum(0)] if merge else list(kept)

    source = {"operation": "ties" if merge else "ties_parts", "density": density, "disjoint": disjoint}
    return make(found, [ONE] if merge else list(found), compute, source, storage, vectors)


def _elected(deltas: list[Tensor], least: list[float]) -> Tensor:
    """[k, *shape]: values of at least the magnitude ``least`` that have the elected sign, 0 elsewhere."""
    trimmed = torch.stack([torch.where(d.float().abs() >= t, d, 0) for d, t in zip(deltas, least, strict=True)])
    sign = torch.where(trimmed.sum(0) >= 0, 1, -1)
    return torch.where(trimmed * sign > 0, trimmed, 0)


def _density(density: float) -> float:
    if not 0 < density <= 1:
        raise AlignvecError(f"density={density} must be above 0 and at most 1: it is the share of values that stay")
    return float(density)


def _pieces(vector: AlignmentVector) -> Iterator[Tensor]:
    return (piece for name in vector for piece in vector.chunks(name))
