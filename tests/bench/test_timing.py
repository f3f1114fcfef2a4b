"""How many copies of weights no cache holds."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from bench import timing

MIB = 1 << 20


def _cache(system: Path, cpu: int, level: int, size: str, shared: str) -> None:
    folder = system / f"cpu{cpu}" / "cache" / f"index{level}"
    folder.mkdir(parents=True)
    for name, text in {"level": str(level), "size": size, "shared_cpu_list": shared}.items():
        (folder / name).write_text(f"{text}\n")


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells the caches in files")
def test_caches_that_the_process_may_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for cpu in range(6):  # three pairs, each with a cache of 16 MiB; the process may not use the last
        _cache(tmp_path, cpu, 2, "65536K", str(cpu))
        _cache(tmp_path, cpu, 3, "16384K", f"{cpu // 2 * 2}-{cpu // 2 * 2 + 1}")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3})
    assert timing.last_level_cache(tmp_path) == 32 * MIB
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {1})
    assert timing.last_level_cache(tmp_path) == 16 * MIB
    assert timing.last_level_cache(tmp_path / "nothing") == 32 * MIB


@pytest.mark.parametrize("nbytes", [1, MIB, 10 * MIB, 1000 * MIB])
def test_copies_exceed_the_caches_more_than_three_times(nbytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "last_level_cache", lambda: 7 * MIB)
    count = timing.copies(nbytes, "cpu")
    assert count >= 2
    assert count * nbytes > 3 * 7 * MIB
    assert count == 2 or (count - 2) * nbytes <= 3 * 7 * MIB


def test_each_case_takes_its_turn_and_each_copy_its_own() -> None:
    order: list[str] = []
    calls = {name: [lambda text=f"{name}{i}": order.append(text) for i in range(3)] for name in "ab"}
    timing.times(calls, "cpu", repeats=4)
    turns = order[2 * timing.WARM_UP :]
    assert turns == ["a0", "b0", "a1", "b1", "a2", "b2", "a0", "b0"]
