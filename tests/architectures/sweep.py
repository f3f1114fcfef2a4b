"""Runs the checks of each architecture in a process of its own, so that one that hangs or dies stops only itself."""

from __future__ import annotations

import json
import os
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

import torch

from tests.architectures.cases import CHECKS
from tests.architectures.configurations import Architecture, build
from tests.architectures.outcomes import Outcome, last_line, outcome
from tests.architectures.reads import missed_parameters, read_past_forward
from tests.architectures.subject import Subject, logits

LIMIT_S = 90
Record = dict[str, Any]


def examine(architecture: Architecture) -> Record:
    """What every check shows of one architecture, or why it cannot be built tiny."""
    began = time.time()
    record: Record = {**asdict(architecture), "name": architecture.name}
    try:
        base = build(architecture)
        values = logits(base)
        if not torch.isfinite(values).all():
            raise ValueError("its outputs are not finite")
        if not torch.equal(values, logits(base)):
            raise ValueError("its outputs differ from one call to the next")
    except Exception as problem:
        return record | {"reason": last_line(problem), "seconds": round(time.time() - began, 1)}
    subject = Subject(base)
    moved = float((logits(subject.tuned) - values).norm() / values.norm())
    record |= {"parameters": sum(p.numel() for p in base.parameters()), "moved": moved}
    record["read_past_forward"] = _or_none(lambda: read_past_forward(base))
    record["checks"] = {name: asdict(outcome(subject, check)) for name, check in CHECKS.items()}
    record["missed"] = _or_none(lambda: missed_parameters(subject))
    if record["missed"] and record["checks"]["uniform"]["status"] == "right":
        detail = "misses " + ", ".join(record["missed"])
        record["checks"]["uniform"] = asdict(Outcome("wrong", record["checks"]["uniform"]["error"], detail))
    if record["checks"]["rows"]["status"] == "wrong":
        record["missed_rows"] = _or_none(lambda: missed_parameters(subject, rows=True))
    return record | {"seconds": round(time.time() - began, 1)}


def _or_none(fn: Callable[[], list[str]]) -> list[str] | None:
    try:
        return fn()
    except Exception:
        return None


def sweep(
    chosen: Sequence[Architecture], jobs: int, work: Callable[[Architecture], Record] = examine
) -> Iterator[Record]:
    """The record of each architecture, as they are done; `jobs` of them at a time, each under a time limit."""
    torch.set_num_threads(1)
    waiting = list(chosen)
    running: dict[int, tuple[Architecture, int]] = {}
    while waiting or running:
        while waiting and len(running) < jobs:
            architecture = waiting.pop(0)
            pid, pipe = _fork(architecture, work)
            running[pid] = (architecture, pipe)
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid in running:
            architecture, pipe = running.pop(pid)
            with os.fdopen(pipe) as stream:
                text = stream.read()
            died = f"the process died of signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else "no result"
            if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGALRM:
                died = f"stopped after {LIMIT_S} s"
            yield json.loads(text) if text else {**asdict(architecture), "name": architecture.name, "reason": died}
        else:
            time.sleep(0.02)


def _fork(architecture: Architecture, work: Callable[[Architecture], Record]) -> tuple[int, int]:
    read, write = os.pipe()
    pid = os.fork()
    if pid:
        os.close(write)
        return pid, read
    signal.alarm(LIMIT_S)  # the default action ends the process
    try:
        with os.fdopen(write, "w") as stream:
            json.dump(work(architecture), stream)
    except BaseException:
        traceback.print_exc()
    os._exit(0)
