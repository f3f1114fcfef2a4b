"""Lossless deltas are steps from the bits of the base's values: which tensors have those bits."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from alignvec.fingerprint import checksum, exact

if TYPE_CHECKING:
    from alignvec.vector import AlignmentVector


def steps_from(vector: AlignmentVector, name: str) -> str | None:
    """The 16-bit dtype whose bits a lossless delta is steps from; None for other deltas, and where there is none."""
    spec = vector.format_of(name) if name in vector else None
    return str(spec.options["dtype"]) if spec is not None and spec.name == "lossless" else None


def has_base_bits(vector: AlignmentVector, name: str, values: Tensor) -> bool:
    """Whether these are the values, bit for bit, that the lossless delta `name` is steps from."""
    dtype = steps_from(vector, name)
    if vector.base is None or dtype is None:
        return False
    return checksum(exact(values, dtype)) == vector.base.tensors[name].bits(dtype)


def unrecorded(vector: AlignmentVector, name: str) -> bool:
    """Whether `name` is lossless and the base's identity does not tell its bits, as in vectors that early versions made
    of float16 checkpoints."""
    dtype = steps_from(vector, name)
    if vector.base is None or dtype is None:
        return False
    identity = vector.base.tensors[name]
    return identity.bits(dtype) is None or (dtype == "float16" and not identity.knows_bits)
