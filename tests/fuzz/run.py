"""Cases in a process of their own, under limits of memory and time, so that a crash or a hang is one case's result."""

from __future__ import annotations

import builtins
import contextlib
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
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
        # Every import and cache, once, before processes are forked; and the whole are right.
        for kind in subjects.KINDS:
            for subject in sorted((self.whole / kind).iterdir()):
                for use in self.uses.of(kind):
                    found = outcome(use, subject)
                    if found != "right" and use.__name__ not in ("adapter_alone", "peft"):
                        raise AssertionError(f"{use.__name__} of the whole {subject.name}: {found}")
        self.written = {
            each.name: self.uses.values(each)
            for each in (self.whole / "vector").iterdir()
            if each.name != "schema-1"  # which has no checksums
        }

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
        quiet = os.open(os.devnull, os.O_RDWR)
        builtins.input = _asked
        os.dup2(quiet, 0)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        limit = _address_space() + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        for index, case in enumerate(cases):
            signal.setitimer(signal.ITIMER_PROF, SECONDS)  # the signals' default action ends the process
            signal.alarm(PATIENCE)
            begun, folder, whole = time.monotonic(), self.folder / "case", self.whole / case.kind / case.subject
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(whole, folder)
            mutations.apply(folder, case.steps)
            self.uses.written = self.written.get(case.subject) if mutations.kept_seal(case.steps) else None
            alternate = {"do": "alternate"} in case.steps
            before = None if alternate else listed(folder)
            with alternating(folder, whole) if alternate else contextlib.nullcontext():
                for use in self.uses.of(case.kind):
                    found = outcome(use, folder)
                    if found in OUTCOMES:
                        found = self._left_behind(folder, before) or found
                    say(f"{index}\t{use.__name__}\t{found}\n")
            say(f"{index}\tend\t{time.monotonic() - begun}\n")

    def _left_behind(self, folder: Path, before: list[tuple[str, int, int]] | None) -> str:
        """What a use has done beside its result, which has to be nothing."""
        if os.environ.pop(mutations.RAN, None):
            return "code of the folder was run"
        if before is not None and listed(folder) != before:
            return "the folder was written to"
        if hidden := [file.name for file in self.folder.iterdir() if file.name.startswith(".")]:
            return f"{hidden[0]} was left behind"
        return self.uses.changed()


@dataclass
class Count:
    """What came of the cases of one kind: seconds that they took, and their uses by outcome."""

    cases: int = 0
    seconds: float = 0.0
    uses: Counter[str] = field(default_factory=Counter)

    def line(self, kind: str) -> str:
        speed = self.cases / self.seconds if self.seconds else 0.0
        return " ".join(
            [f"{kind:>10} {self.cases:>8}", *(f"{self.uses[each]:>9}" for each in OUTCOMES), f"{speed:>9.1f}"]
        )


OUTCOMES = ("right", "damaged", "refused", "failed")
TITLE = " ".join([f"{'':>10} {'cases':>8}", *(f"{each:>9}" for each in OUTCOMES), f"{'cases/s':>9}"])


def report(cases: Iterator[tuple[Case, str, str]], counts: dict[str, Count]) -> Iterator[tuple[Case, str]]:
    """Counts outcomes by kind and gives the failures."""
    for case, use, found in cases:
        count = counts.setdefault(case.kind, Count())
        if use == "end":
            count.cases += 1
            count.seconds += float(found)
            continue
        good = found in OUTCOMES
        count.uses[found if good else "failed"] += 1
        if not good:
            yield case, f"{use}: {found}"


def listed(folder: Path) -> list[tuple[str, int, int]]:
    """Names, sizes and times of change of all that a folder holds."""
    found = [(str(folder), os.lstat(folder))]
    found += [(entry.path, entry.stat(follow_symlinks=False)) for entry in os.scandir(folder)]
    return sorted((name, stat.st_size, stat.st_mtime_ns) for name, stat in found)


@contextlib.contextmanager
def alternating(folder: Path, whole: Path) -> Iterator[None]:
    """While the block runs, a thread puts the whole files in the places of the changed ones, and back, at random."""
    stopped = threading.Event()
    spare = folder.with_name("spare")
    shutil.rmtree(spare, ignore_errors=True)
    spare.mkdir()
    names = [file.name for file in whole.iterdir() if file.is_file() and not (folder / file.name).is_dir()]
    for name in names:
        shutil.copyfile(whole / name, spare / f"whole.{name}")
        if os.path.lexists(folder / name):
            (folder / name).rename(spare / f"changed.{name}")
            os.link(spare / f"changed.{name}", folder / name, follow_symlinks=False)

    def alternate() -> None:
        draw = random.Random(0)
        while not stopped.wait(draw.choice((0, 1e-4, 1e-3, 1e-2))):
            name = draw.choice(names)
            with contextlib.suppress(OSError):
                os.link(spare / f"{draw.choice(('whole', 'changed'))}.{name}", spare / "next", follow_symlinks=False)
                os.replace(spare / "next", folder / name)
            (spare / "next").unlink(missing_ok=True)  # a link that is replaced by one to the same file stays

    thread = threading.Thread(target=alternate)
    thread.start()
    try:
        yield
    finally:
        stopped.set()
        thread.join()


def _asked(*words: object) -> str:
    raise RuntimeError(f"a question was asked at the terminal: {words}")


def opened() -> Fuzz:
    """A Fuzz in a temporary folder."""
    return Fuzz(Path(tempfile.mkdtemp(prefix="alignvec-fuzz-")))


def _address_space() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
