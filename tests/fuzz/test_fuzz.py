"""A minute of mutated folders in a process of their own, and the cases that failed once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fuzz import mutations
from tests.fuzz.__main__ import KEPT

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks under limits that Linux has")


def fuzzed(*options: str) -> str:
    command = [sys.executable, "-W", "ignore", "-m", "tests.fuzz", *options]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout[-5000:]}\n{done.stderr[-2000:]}"
    return done.stdout


def counted(found: str) -> dict[str, dict[str, float]]:
    """The table that is printed, by kind and column."""
    lines = found.splitlines()
    titles = next(line for line in lines if line.split()[:1] == ["cases"]).split()
    rows = [line.split() for line in lines[lines.index(next(line for line in lines if "cases/s" in line)) + 1 :]]
    return {row[0]: dict(zip(titles, map(float, row[1:]), strict=True)) for row in rows}


def test_cases_that_failed_once_do_not_fail_again() -> None:
    counts = counted(fuzzed("--kept"))
    assert sum(count["cases"] for count in counts.values()) == len(json.loads(KEPT.read_text()))
    assert sum(count["right"] for count in counts.values())
    assert sum(count["refused"] for count in counts.values())


@pytest.mark.slow
def test_mutated_folders_are_read_right_or_refused() -> None:
    """Cases of fixed seeds, as many as a minute has time for; `make fuzz` tries others."""
    counts = counted(fuzzed("--seed", "0", "--minutes", "0.7"))
    assert counts.keys() == {"vector", "adapter", "checkpoint"}
    for kind, count in counts.items():
        assert count["right"]
        assert count["refused"]
        assert not count["failed"]
        assert bool(count["damaged"]) == (kind == "vector"), kind
    assert counts["vector"]["refused"] > counts["vector"]["damaged"] / 2  # checks behind the checksums are reached


def test_a_step_is_one_change_of_a_file(tmp_path: Path) -> None:
    """What a kept case says is what is done."""
    file = tmp_path / "a.json"
    for step, text in (
        ({"do": "value", "at": ["b", 1], "to": "1e999"}, '{"a": 1, "b": [2, 1e999]}'),
        ({"do": "delete", "at": ["a"]}, '{"b": [2, 3]}'),
        ({"do": "twice", "at": ["a"]}, '{"a": 1, "b": [2, 3], "a": 1}'),
        ({"do": "rename", "at": ["a"], "to": "empty text"}, '{"b": [2, 3], "": 1}'),
        ({"do": "wrap", "at": ["b", 0]}, '{"a": 1, "b": [[2], 3]}'),
        ({"do": "number", "at": ["a"], "by": -1}, '{"a": 0, "b": [2, 3]}'),
        ({"do": "swap", "at": ["a"], "with": ["b", 1]}, '{"a": 3, "b": [2, 1]}'),
        ({"do": "cut", "at": 3, "length": 1, "byte": 0}, '{"a'),
        ({"do": "extend", "at": 3, "length": 2, "byte": 48}, '{"a": 1, "b": [2, 3]}00'),
        ({"do": "fill", "at": 1, "length": 2, "byte": 48}, '{00": 1, "b": [2, 3]}'),
        ({"do": "flip", "at": 0, "length": 1, "byte": 0}, 'z"a": 1, "b": [2, 3]}'),
    ):
        file.write_text(json.dumps({"a": 1, "b": [2, 3]}))
        mutations.apply(tmp_path, [{"file": file.name, **step}])
        assert file.read_text() == text
