"""How deltas are stored. Dense, the only format yet: each delta whole, under its parameter's name."""

from __future__ import annotations

from alignvec.errors import AlignvecError

FORMATS = ("dense",)


def require(name: str) -> None:
    """AlignvecError when there is no format of that name."""
    if name not in FORMATS:
        raise AlignvecError(f"format {name!r} is not known: choose one of {', '.join(FORMATS)}")
