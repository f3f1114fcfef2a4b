"""Dense: the difference itself, in the checkpoints' dtype unless told otherwise."""

from __future__ import annotations

import torch
from torch import Tensor


def encode(delta: Tensor, *, base: Tensor | None = None, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """One tensor of ``delta``'s shape, in ``dtype`` or ``delta``'s own, stored under the parameter's name alone."""
    return {"": delta.to(dtype or delta.dtype)}


def decode(tensors: dict[str, Tensor], shape: tuple[int, ...]) -> Tensor:
    """The delta, in its stored dtype and ``shape``."""
    return tensors[""].view(shape)


def nbytes(tensors: dict[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())
