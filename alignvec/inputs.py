"""Which files a vector is read from: no output may take their place while they are needed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from alignvec.computed import Combination, Deltas, Difference
from alignvec.deltas import Stored
from alignvec.integrity import VerifiedCheckpoint
from alignvec.sources import Source, StoredSource

if TYPE_CHECKING:
    from alignvec.vector import AlignmentVector


def read_from(vector: AlignmentVector, *, terms: bool = True) -> list[Path]:
    """The folders and files that the vector's values come from: its own, those of the terms of a sum, and of a base
    that is bound. ``terms=False``: of the base alone."""
    return list(dict.fromkeys(_paths(vector._deltas, terms)))


def _paths(deltas: Deltas, terms: bool) -> Iterator[Path]:
    if isinstance(deltas, Combination):
        for _, term in deltas.terms:
            yield from _paths(term, terms)
        return
    if terms and isinstance(deltas, Stored):
        read = deltas.checkpoint
        yield (read.checkpoint if isinstance(read, VerifiedCheckpoint) else read).path
    if deltas.base is not None:
        yield from _path(deltas.base.source)
    if isinstance(deltas, Difference):
        yield from _path(deltas.right)


def _path(source: Source) -> Iterator[Path]:
    if isinstance(source, StoredSource):
        yield source.checkpoint.path
