"""How a delta is stored: one module a format.

A format module offers ``encode(delta, *, base=None, dtype=None) -> tensors``, ``decode(tensors, shape) -> delta`` and
``nbytes(tensors)``. The keys of ``tensors`` are suffixes that follow the parameter's name in the file.
"""

from __future__ import annotations

from types import ModuleType

from alignvec.errors import AlignvecError
from alignvec.formats import dense

FORMATS: dict[str, ModuleType] = {"dense": dense}


def get(name: str) -> ModuleType:
    """The module of a format; AlignvecError when there is none of that name."""
    if name not in FORMATS:
        raise AlignvecError(f"format {name!r} is not known: choose one of {', '.join(FORMATS)}")
    return FORMATS[name]
