"""Fixtures of the storage tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.storage.checkpoints import aligned, weights, write_checkpoint


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """A base in three shards and its aligned descendant in two."""
    base = weights()
    return write_checkpoint(tmp_path / "base", base, 3), write_checkpoint(tmp_path / "aligned", aligned(base), 2)


@pytest.fixture
def unchanged(tmp_path: Path) -> Callable[[], bool]:
    """Says whether the test's folder still holds what it held when this was first called."""
    before: list[set[Path]] = []

    def same() -> bool:
        now = set(tmp_path.rglob("*"))
        before.append(now)
        return now == before[0]

    return same
