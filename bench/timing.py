"""Times of calls whose weights come from memory, side by side: each takes its turn, so that a busy or hot machine is so
for all of them."""

from __future__ import annotations

import gc
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

from alignvec import timing

Call = Callable[[], object]
WARM_UP = 3
LEAST = 7
SECONDS = 1.0  # of samples of one case, from LEAST on


@dataclass(frozen=True)
class Times:
    """Seconds of one call, and how often it was timed."""

    median: float
    p20: float
    p80: float
    samples: int = 1

    @classmethod
    def of(cls, samples: Sequence[float]) -> Times:
        low, middle, high = numpy.percentile(samples, (20, 50, 80))
        return cls(float(middle), float(low), float(high), len(samples))


def times(cases: Mapping[str, Sequence[Call]], device: str, repeats: int) -> dict[str, Times]:
    """The times of each case, of `samples`."""
    return {name: Times.of(taken) for name, taken in samples(cases, device, repeats).items()}


def samples(
    cases: Mapping[str, Sequence[Call]], device: str, repeats: int, *, graphs: bool = True, least: int = LEAST
) -> dict[str, list[float]]:
    """Seconds of each case: the same call on as many copies of its weights as the caches cannot hold.

    On a GPU a CUDA graph replays the calls of a case one after another, and a sample is their mean; on a CPU, and on a
    GPU without `graphs`, each sample is the next of them. Slow cases have fewer samples, `least` at the least, and are
    called only once before, not WARM_UP times, where they take longer than SECONDS.
    """
    taken: dict[str, list[float]] = {name: [] for name in cases}
    cuda = device.startswith("cuda")
    graphed = cuda and graphs
    if graphed:
        stream, pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()  # no outputs are read: graphs share memory
        runs = {name: _replay(calls, stream, pool) for name, calls in cases.items()}
    else:
        runs = {name: _in_turn(calls, _until_done if cuda else _on_host) for name, calls in cases.items()}
    counts = {}
    for name, run in runs.items():
        seconds = run()
        for _ in range(WARM_UP - 1 if seconds < SECONDS else 0):
            seconds = run()
        seconds *= len(cases[name]) if graphed else 1
        counts[name] = min(repeats, max(least, int(SECONDS / max(seconds, 1e-9))))
    for turn in range(repeats):
        for name, run in runs.items():
            if turn < counts[name]:
                taken[name].append(run())
    del runs
    gc.collect()  # graphs hold their memory
    if graphed:
        torch.cuda.empty_cache()
    return taken


def host_samples(cases: Mapping[str, Call], device: str, repeats: int) -> dict[str, list[float]]:
    """Seconds until each call returns, in turn; what it left to a GPU is waited for, uncounted."""
    taken: dict[str, list[float]] = {name: [] for name in cases}
    for turn in range(-WARM_UP, repeats):
        for name, call in cases.items():
            seconds = _on_host(call)
            if device.startswith("cuda"):
                torch.cuda.synchronize(device)
            if turn >= 0:
                taken[name].append(seconds)
    return taken


def _replay(calls: Sequence[Call], stream: torch.cuda.Stream, pool: Any) -> Callable[[], float]:
    """Seconds of a call, by a graph of all of them."""
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compiles what is to be captured
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        for call in calls:
            call()

    def run() -> float:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        return 1e-3 * begin.elapsed_time(end) / len(calls)

    return run


def _in_turn(calls: Sequence[Call], clock: Callable[[Call], float]) -> Callable[[], float]:
    turn = 0

    def run() -> float:
        nonlocal turn
        call = calls[turn % len(calls)]
        turn += 1
        return clock(call)

    return run


def _on_host(call: Call) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def _until_done(call: Call) -> float:
    """On the GPU's clock: from where the call begins to queue its work until that is done."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    begin.record()
    call()
    end.record()
    end.synchronize()
    return 1e-3 * begin.elapsed_time(end)


def copies(nbytes: int, device: str) -> int:
    """Copies of weights of that size that no cache holds: together they exceed the last one more than three times."""
    if device.startswith("cuda"):
        return timing.copies(nbytes, device)
    return max(2, -(-3 * last_level_cache() // max(nbytes, 1)) + 1)


def last_level_cache(system: Path = Path("/sys/devices/system/cpu")) -> int:
    """Bytes of the last-level caches of all CPUs that this process may use; 32 MiB where the system does not tell."""
    caches: dict[str, int] = {}  # by the CPUs that share it
    for cpu in os.sched_getaffinity(0) if sys.platform == "linux" else ():
        found = []
        for folder in (system / f"cpu{cpu}" / "cache").glob("index*"):
            level, size, shared = ((folder / name).read_text().strip() for name in ("level", "size", "shared_cpu_list"))
            if size[-1:] == "K":  # as Linux writes all of them
                found.append((int(level), shared, int(size[:-1]) << 10))
        if found:
            _, shared, nbytes = max(found)
            caches[shared] = nbytes
    return sum(caches.values()) or 32 << 20


def read_bandwidth(device: str, repeats: int) -> float:
    """Bytes per second of a large reduction: the best of a sum and a maximum over a few GiB (CPU: 512 MiB)."""
    size = 1 << (32 if device.startswith("cuda") else 29)
    values = torch.ones(size // 4, device=device)
    rows: Tensor = values.view(-1, 1024)
    cases: dict[str, list[Call]] = {"sum": [values.sum], "max": [lambda: rows.amax(0)], "rows": [lambda: rows.amax(1)]}
    return size / min(taken.median for taken in times(cases, device, repeats).values())


def host_seconds(call: Callable[[int], object], repeats: int = 2000) -> Times:
    """Times of a call on the host alone, without waiting for the device; it is given the number of the call."""
    samples = []
    for turn in range(repeats + 100):
        begin = time.perf_counter()
        call(turn)
        if turn >= 100:
            samples.append(time.perf_counter() - begin)
    return Times.of(samples)
