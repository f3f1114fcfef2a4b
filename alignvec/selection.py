"""Which tensors of a vector stay: shell patterns on their names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from alignvec.errors import AlignvecError

if TYPE_CHECKING:
    from alignvec.vector import AlignmentVector

Patterns = str | Sequence[str] | None


def selected(names: Iterable[str], include: Patterns = None, exclude: Patterns = None) -> list[str]:
    """The names that match any pattern of ``include`` (None: all) and none of ``exclude``, in their order.

    Patterns are those of ``fnmatch``, case counts: ``*`` stands for anything, dots too, ``?`` for one character,
    ``[01]`` for one of several. Raises AlignvecError for a pattern that matches no name, and when none is left.
    """
    names, wanted, unwanted = list(names), as_patterns(include), as_patterns(exclude)
    for pattern in (*(wanted or ()), *(unwanted or ())):
        if not any(fnmatchcase(name, pattern) for name in names):
            some = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
            raise AlignvecError(f"the pattern {pattern!r} matches none of the vector's {len(names)} tensors ({some})")
    kept = [
        name
        for name in names
        if (wanted is None or any(fnmatchcase(name, pattern) for pattern in wanted))
        and not any(fnmatchcase(name, pattern) for pattern in unwanted or ())
    ]
    if not kept:
        raise AlignvecError(f"no tensor is left with include={wanted} and exclude={unwanted}: loosen the patterns")
    return kept


def selected_in_each(
    vectors: Mapping[str, AlignmentVector], include: Patterns = None, exclude: Patterns = None
) -> dict[str, AlignmentVector]:
    """``select`` on several vectors that do not all have the same tensors.

    A pattern has to match in one vector at least. Raises AlignvecError for one that does not, and for a vector of which
    no tensor is left.
    """
    selected(dict.fromkeys(name for vector in vectors.values() for name in vector), include, exclude)
    chosen = {}
    for label, vector in vectors.items():
        wanted, unwanted = (
            [pattern for pattern in as_patterns(patterns) or () if any(fnmatchcase(name, pattern) for name in vector)]
            for patterns in (include, exclude)
        )
        if as_patterns(include) and not wanted:
            raise AlignvecError(f"no tensor of vector {label!r} matches include={as_patterns(include)}: leave it out")
        try:
            chosen[label] = vector.select(wanted, unwanted)
        except AlignvecError as error:
            raise AlignvecError(f"vector {label!r}: {error}") from None
    return chosen


def as_patterns(patterns: Patterns) -> list[str] | None:
    """One pattern or several as a list; None, and no pattern at all, as None."""
    if patterns is None:
        return None
    found = [patterns] if isinstance(patterns, str) else list(patterns)
    for pattern in found:
        if not isinstance(pattern, str):
            raise AlignvecError(f"a pattern of tensor names is text such as '*.mlp.*', not {pattern!r}")
    return found or None
