"""What vectors have in common, as a vector of its own."""

from __future__ import annotations

from functools import reduce
from typing import Unpack

import torch
from torch import Tensor

from alignvec.errors import AlignvecError
from alignvec.surgery.pieces import make_by_pieces
from alignvec.surgery.streamed import Storage, Vectors, opened
from alignvec.vector import AlignmentVector

SHARED = "shared"


def remove_shared_mean(vectors: Vectors, **storage: Unpack[Storage]) -> dict[str, AlignmentVector]:
    """The vectors less their mean, by name, and the mean itself as "shared".

    Vectors of several domains often share a direction (a level rather than a domain), so that turning one turns them
    all; apart, it has a coefficient of its own. c times a vector is c times its rest and c times "shared". Raises
    AlignvecError for fewer than two vectors, different bases or shapes, or a vector that is called "shared".
    """
    if SHARED in vectors:
        raise AlignvecError(f'"{SHARED}" is the name of the mean: give the vector of that name another one')
    if len(vectors) == 1:
        raise AlignvecError("one vector is its own mean: give two at least")
    found = opened(vectors)

    def compute(name: str, deltas: list[Tensor]) -> list[Tensor]:
        mean = reduce(torch.add, deltas) / len(deltas)
        return [*(delta - mean for delta in deltas), mean]

    return make_by_pieces(found, [*found, SHARED], compute, {"operation": "remove_shared_mean"}, storage, vectors)
