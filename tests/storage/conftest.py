"""Fixtures of the storage tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.storage.checkpoints import aligned, weights, write_checkpoint


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """A base in three shards and its aligned descendant in two."""
    base = weights()
    return write_checkpoint(tmp_path / "base", base, 3), write_checkpoint(tmp_path / "aligned", aligned(base), 2)
