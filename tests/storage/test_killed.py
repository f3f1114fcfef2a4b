"""Writers killed at random moments: their output is the old or the new, whole, and the next write goes well."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest

from tests.storage.children import VALUES, WRITERS, context, found, killed, prepare, write


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    prepare(folder)
    return folder


def start(writer: str, folder: Path, value: int, output: Path, exchanging: bool = True):  # type: ignore[no-untyped-def]
    """A child that has begun to write."""
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=write, args=(writer, folder, value, output, exchanging, there))
    process.start()
    there.close()
    here.recv()
    return process, here


def kill_often(writer: str, folder: Path, place: Path, kills: int, seed: int) -> dict[str, int]:
    rng, output, counts = random.Random(seed), place / "out", {"old": 0, "new": 0, "none": 0}
    print(f"{writer}: seed {seed}")
    process, pipe = start(writer, folder, 1, place / "first")
    begun = time.perf_counter()
    pipe.recv()
    took = time.perf_counter() - begun
    process.join()
    for number in range(kills):
        old, new, last = rng.sample(VALUES, 3)
        if rng.random() < 0.7:
            WRITERS[writer](folder, old, output)
        else:
            shutil.rmtree(output, ignore_errors=True)
        before = found(output) if output.exists() else None
        process, _ = start(writer, folder, new, output, exchanging=rng.random() < 0.7)
        time.sleep(1.2 * took * rng.random() ** 0.5)  # most moments that matter come late
        killed(process, rng.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM]))
        state = f"kill {number} of seed {seed}: {sorted(path.name for path in place.iterdir())}"
        if before is not None or output.exists():
            values = found(output)  # which mends what was killed between two renames
            assert values in (before, {float(new)}), state
            counts["new" if values == {float(new)} else "old"] += 1
        else:
            counts["none"] += 1
        WRITERS[writer](folder, last, output)
        assert found(output) == {float(last)}, state
        assert sorted(path.name for path in place.iterdir()) == ["first", "out"], state
    return counts


@pytest.mark.parametrize("writer", WRITERS)
def test_a_few_kills(writer: str, folder: Path, tmp_path: Path) -> None:
    kill_often(writer, folder, tmp_path, 5, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("writer", WRITERS)
def test_many_kills(writer: str, folder: Path, tmp_path: Path) -> None:
    counts = kill_often(writer, folder, tmp_path, 25, seed=random.SystemRandom().randrange(2**32))
    print(f"{writer}: {counts}")


def test_what_a_living_writer_fills_is_left_to_it(folder: Path, tmp_path: Path) -> None:
    """One is stopped in the middle, another writes to the same place, then the first goes on: the last one wins."""
    output = tmp_path / "out"
    for value, other in ((1, 2), (2, 1)):
        process, pipe = start("extract", folder, value, output)
        while not any(tmp_path.glob(".*.partial/*")) and not pipe.poll():
            time.sleep(0.0005)
        told(process.pid, signal.SIGSTOP)
        hidden = list(tmp_path.glob(".*.partial"))
        WRITERS["extract"](folder, other, output)
        assert found(output) == {float(other)}
        assert list(tmp_path.glob(".*.partial")) == hidden
        told(process.pid, signal.SIGCONT)
        process.join(60)
        assert process.exitcode == 0
        assert found(output) in ({float(value)}, {float(other)})
        assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def told(pid: int, number: signal.Signals) -> None:
    os.kill(pid, number)
    time.sleep(0.02)


@pytest.mark.parametrize("exchanging", [True, False], ids=["exchanged", "renamed twice"])
def test_two_processes_that_write_at_once(folder: Path, tmp_path: Path, exchanging: bool) -> None:
    output = tmp_path / "out"
    for _ in range(5):
        pairs = [start(w, folder, v, output, exchanging) for w, v in (("extract", 1), ("save", 2), ("extract", 3))]
        for process, _ in pairs:
            process.join(60)
        assert [process.exitcode for process, _ in pairs].count(0) >= 1
        assert found(output) in ({1.0}, {2.0}, {3.0})
        assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
