"""Operations on singular values: truncation, decorrelated singular vectors, an isotropic merge.

They act on matrices, [*, columns] as [rows, columns]; norms, biases and other parameters of one dimension have no
singular values and are kept, or added up.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Unpack

import torch
from torch import Tensor

from alignvec import formats
from alignvec.errors import AlignvecError
from alignvec.formats import Encoded, Spec
from alignvec.formats.spec import matrix
from alignvec.surgery.streamed import ONE, Storage, Vectors, make, opened
from alignvec.vector import AlignmentVector


def truncate(vector: AlignmentVector | str | Path, rank: int, **storage: Unpack[Storage]) -> AlignmentVector:
    """Each matrix reduced to its ``rank`` largest singular values; parameters of one dimension are kept.

    Stored as low-rank factors in float32 by default, which kernels run as they are; ``format="low-rank:rank=..."`` has
    them in bf16. Above 512 on the smaller side subspace iteration is used, as by the format. Raises AlignvecError for a
    rank below 1.
    """
    spec, found = _factors(rank), opened({"vector": vector})

    def compute(name: str, deltas: list[Tensor]) -> list[Tensor | Encoded]:
        return [formats.encode(spec, delta, name=name) if delta.dim() > 1 else delta for delta in deltas]

    return make(found, [ONE], compute, {"operation": "truncate", "rank": rank}, storage, {"vector": vector})[ONE]


def tsv(vectors: Vectors, rank: int | None = None, **storage: Unpack[Storage]) -> dict[str, AlignmentVector]:
    """Task Singular Vectors (arXiv 2412.00081): truncated vectors that do not interfere, each with its own coefficient.

    Of every matrix of the k vectors the ``rank`` largest singular values stay, by default (and at most) the share 1/k
    of them. Then the k sets of left singular vectors, and of right ones, are replaced by the closest orthonormal sets
    (Procrustes: U = P S Q^T becomes P Q^T), so that no vector reads or writes another's directions. The sum of the
    results is the paper's merge, but for parameters of one dimension, which are kept as they are (there: averaged).

    Stored as low-rank factors in float32 by default. Raises AlignvecError for no vectors, different bases or shapes, a
    rank below 1, or a matrix with fewer rows or columns than there are vectors.
    """
    if rank is not None:
        _factors(rank)
    found = opened(vectors)

    def compute(name: str, deltas: list[Tensor]) -> list[Tensor | Encoded]:
        if deltas[0].dim() < 2:
            return list(deltas)
        share = min(matrix(tuple(deltas[0].shape))) // len(deltas)
        if share < 1:
            raise AlignvecError(
                f"delta {name} has shape {list(deltas[0].shape)}, too small to give {len(deltas)} vectors a singular "
                "value each: use fewer vectors"
            )
        return _decorrelated(deltas, share if rank is None else min(rank, share))

    return make(found, list(found), compute, {"operation": "tsv", "rank": rank}, storage, vectors)


def isotropic(vectors: Vectors, **storage: Unpack[Storage]) -> AlignmentVector:
    """One vector by isotropic merging (Iso-C, arXiv 2502.04959): the sum, every singular value replaced by their mean
    (those that are zero stay so).

    Directions that the vectors share no longer drown the others'. Parameters of one dimension are averaged. Raises
    AlignvecError for no vectors, or different bases or shapes.
    """
    found = opened(vectors)

    def compute(name: str, deltas: list[Tensor]) -> list[Tensor | Encoded]:
        whole = torch.stack(deltas).sum(0)
        if whole.dim() < 2:
            return [whole / len(deltas)]
        u, s, vh = torch.linalg.svd(whole.reshape(matrix(tuple(whole.shape))), full_matrices=False)
        count = _rank(s, max(len(u), vh.shape[1]))
        return [(s[:count].mean() * u[:, :count] @ vh[:count]).view_as(whole)]

    return make(found, [ONE], compute, {"operation": "isotropic"}, storage, vectors)[ONE]


def _decorrelated(deltas: list[Tensor], rank: int) -> list[Tensor | Encoded]:
    spec, shape = _factors(rank), tuple(deltas[0].shape)
    halves = [_nonzero(formats.encode(spec, delta).parts) for delta in deltas]
    # Each factor carries the root of the singular values in the norms of its columns (B) or rows (A).
    roots = [b.norm(dim=0) for _, b in halves]
    sizes = [len(root) for root in roots]
    left = _orthonormal(torch.cat([_unit(b, 0) for _, b in halves], dim=1)).split(sizes, dim=1)
    right = _orthonormal(torch.cat([_unit(a, 1) for a, _ in halves], dim=0)).split(sizes, dim=0)
    made: list[Tensor | Encoded] = []
    for u, root, vh in zip(left, roots, right, strict=True):
        parts = {"A": (root[:, None] * vh).contiguous(), "B": (u * root).contiguous()}
        made.append(Encoded("low-rank", shape, dict(_factors(len(root)).options), parts))
    return made


def _nonzero(parts: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """A [rank, columns] and B [rows, rank] without directions of no singular value (of a LoRA adapter, say): those are
    noise, which made orthogonal to the others' would push them aside."""
    count = _rank(parts["A"].norm(dim=1) * parts["B"].norm(dim=0), max(parts["A"].shape[1], parts["B"].shape[0]))
    return parts["A"][:count], parts["B"][:, :count]


def _rank(singular_values: Tensor, size: int) -> int:
    """How many singular values (the largest first) differ from zero, at least 1; as torch.linalg.matrix_rank counts."""
    least = singular_values[0] * size * torch.finfo(singular_values.dtype).eps
    return max(1, int((singular_values > least).sum()))


def _orthonormal(x: Tensor) -> Tensor:
    """The matrix with orthonormal columns or rows that is closest to x (Procrustes)."""
    u, _, vh = torch.linalg.svd(x, full_matrices=False)
    return u @ vh


def _unit(x: Tensor, dim: int) -> Tensor:
    return x / x.norm(dim=dim, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny)


def _factors(rank: int) -> Spec:
    if type(rank) is not int or rank < 1:
        raise AlignvecError(f"rank={rank} must be an integer of at least 1: it is how many singular values stay")
    return formats.parse(Spec("low-rank", {"rank": rank, "dtype": "float32"}))
