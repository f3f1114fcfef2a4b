"""The sections of the suite, in the order in which they run."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from types import ModuleType

from alignvec.errors import AlignvecError
from bench.record import Row

SECTIONS = (
    "kernels",
    "micro",
    "switching",
    "decode",
    "prompting",
    "memory",
    "blend",
    "merge",
)


def section(name: str) -> ModuleType:
    """The module of a section."""
    return importlib.import_module(f"bench.suite.{name}")


def chosen(names: Iterable[str]) -> list[str]:
    """Those named, or all, in the suite's order. Raises AlignvecError for a name that is no section's."""
    wanted = list(names)
    if unknown := [name for name in wanted if name not in SECTIONS]:
        raise AlignvecError(f"there is no section {unknown[0]!r}; choose among {', '.join(SECTIONS)}")
    return [name for name in SECTIONS if not wanted or name in wanted]


def ordered(rows: Iterable[Row]) -> list[Row]:
    """Rows in the order of their sections; within one they stay as they are."""
    return sorted(rows, key=lambda row: SECTIONS.index(row["section"]))
