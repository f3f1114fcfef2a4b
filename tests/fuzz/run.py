"""Cases in a process of their own, under limits of memory and time, so that a crash or a hang is one case's result."""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.fuzz import mutations, subjects
from tests.fuzz.uses import Uses, outcome

SECONDS = 20  # of a processor that all uses of one case may take
PATIENCE = 120  # seconds by the clock, of what waits, or of a machine that has other things to do
MEMORY = 3 << 30  # bytes of addresses beyond those of the process that the cases begin in
BATCH = 60  # cases a process


@dataclass(frozen=True)
class Case:
    """A subject and what is done to it; `seed` is where it comes from, if it was drawn."""

    kind: str
    subject: str
    steps: list[mutations.Step]
    seed: int | None = None

    def to_json(self) -> dict[str, Any]:
        return {"kind": self.kind, "subject": self.subject, "steps": self.steps}


class Fuzz:
    """The whole subjects, in a temporary folder, and cases run on copies of them."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.whole = folder, folder / "whole"
        subjects.make(self.whole)
        self.uses = Uses(self.whole, folder)
        for (
            kind
        ) in subjects.KINDS:  # every import and cache, once, before processes are forked; and the whole are right
            for subject in sorted((self.whole / kind).iterdir()):
                for use in self.uses.of(kind):
                    found = outcome(use, subject)
                    if found != "right" and use.__name__ not in ("adapter_alone", "tokenizer"):
                        raise AssertionError(f"{use.__name__} of the whole {subject.name}: {found}")

    def draw(self, seed: int, kind: str | None = None) -> Case:
        """The case of a seed."""
        draw = random.Random(seed)
        kind = kind or draw.choice(subjects.KINDS)
        subject = draw.choice(sorted(each.name for each in (self.whole / kind).iterdir()))
        return Case(kind, subject, mutations.plan(draw, self.whole / kind / subject), seed)

    def run(self, cases: list[Case]) -> Iterator[tuple[Case, str, str]]:
        """Case, use and outcome of every use of every case, in order."""
        waiting = list(cases)
        while waiting:
            done, died = self._batch(waiting[:BATCH])
            for index, name, found in done:
                yield waiting[index], name, found
            finished = len({index for index, name, _ in done if name == "end"})
            if died:
                yield waiting[finished], "any", died
                finished += 1
            waiting = waiting[max(finished, 1) :]

    def _batch(self, cases: list[Case]) -> tuple[list[tuple[int, str, str]], str]:
        """What a process said of the cases, and how it ended, if not well."""
        reader, writer = os.pipe()
        sys.stdout.flush()
        if (child := os.fork()) == 0:
            os.close(reader)
            code = 1
            try:
                self._child(cases, lambda line: os.write(writer, line.encode("utf-8", "backslashreplace")))
                code = 0
            finally:
                os._exit(code)
        os.close(writer)
        with open(reader, encoding="utf-8") as said:
            lines = [line.rstrip("\n").split("\t", 2) for line in said]
        _, status = os.waitpid(child, 0)
        died = ""
        if os.WIFSIGNALED(status):
            number = os.WTERMSIG(status)
            slow = {signal.SIGPROF: f"computed for {SECONDS} s", signal.SIGALRM: f"waited for {PATIENCE} s"}
            died = slow.get(number, f"died of {signal.Signals(number).name}")
        elif status:
            died = f"exit status {os.WEXITSTATUS(status)}"
        return [(int(index), name, found) for index, name, found in lines], died

    def _child(self, cases: list[Case], say: Callable[[str], object]) -> None:
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        limit = _address_space() + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        for index, case in enumerate(cases):
            signal.setitimer(signal.ITIMER_PROF, SECONDS)  # the signals' default action ends the process
            signal.alarm(PATIENCE)
            folder = self.folder / "case"
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(self.whole / case.kind / case.subject, folder)
            mutations.apply(folder, case.steps)
            for use in self.uses.of(case.kind):
                say(f"{index}\t{use.__name__}\t{outcome(use, folder)}\n")
            say(f"{index}\tend\t\n")


def report(cases: Iterator[tuple[Case, str, str]], counts: Counter[tuple[str, str]]) -> Iterator[tuple[Case, str]]:
    """Counts outcomes by kind and gives the failures."""
    for case, use, found in cases:
        if use == "end":
            continue
        good = found in ("right", "refused")
        counts[case.kind, found if good else "failed"] += 1
        if not good:
            yield case, f"{use}: {found}"


def opened() -> Fuzz:
    """A Fuzz in a temporary folder."""
    return Fuzz(Path(tempfile.mkdtemp(prefix="alignvec-fuzz-")))


def _address_space() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
