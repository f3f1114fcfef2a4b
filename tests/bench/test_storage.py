"""What files cost is measured in processes of their own and kept as data."""

from __future__ import annotations

import json
from pathlib import Path

from bench import storage


def test_jobs_run_and_are_kept(tmp_path: Path) -> None:
    storage.main(tmp_path / "storage.json", mb=17, repeats=1, only="read")
    kept = json.loads((tmp_path / "storage.json").read_text())
    assert [row["job"] for row in kept["rows"]] == ["read", "read, verify=False"]
    assert all(row[key]["samples"] == 1 for row in kept["rows"] for key in ("wall_s", "cpu_s", "memory_mb"))
    assert all(row["wall_s"]["median"] > 0 for row in kept["rows"])
