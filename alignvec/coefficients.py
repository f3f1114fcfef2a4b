"""The coefficient table of an attached model: written by the host in microseconds, read by every kernel of a step."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor

from alignvec.errors import AlignvecError
from alignvec.numbers import BEYOND_FLOAT32, float32_number
from alignvec.pickling import NotPickled
from alignvec.printable import quoted
from alignvec.standing import PATIENCE, Hold, Standing, patiently
from alignvec.steps import Place, Step, Values
from alignvec.table import Table, stream_capturing

# One lock for all tables: it is held for the copy of a few kilobytes, and a plain module global survives deepcopy.
publish_lock = threading.Lock()
_steps_ended = threading.Condition(publish_lock)


class _Thread(threading.local):
    """What differs by thread: its step, how it holds or moves the model besides, and of the call that
    torch.compile traces how deep in steps it is, its sequences, and the row that is alone."""

    def __init__(self) -> None:
        self.step: Step | None = None
        self.holds: set[Hold] = set()
        self.traced_depth = 0
        self.traced_batch: int | None = None
        self.traced_row: int | None = None


class Coefficients(NotPickled):
    """Coefficients of `names` for up to `max_rows` rows, staged by the host and published to the devices once a step.

    A write goes to the *staged* tables. Each step begins by copying staged to *live*, and its kernels read only live.
    While a step reads the live tables nothing else writes to them: a step of another thread under other mixes, and a
    step whose gradients may be asked for later, have tables of their own.

    Row rule: a batch of B sequences over R rows of coefficients gives sequence b row `b * R // B`. One row serves
    everyone, B rows serve one each, and beams or `num_return_sequences`, which repeat each sequence in place, follow.
    """

    def __init__(self, names: Sequence[str], max_rows: int, device: torch.device) -> None:
        self.names = tuple(names)
        self.max_rows = max_rows
        self.mixes: list[Values] = [(0.0,) * len(self.names)]
        # Whether the views stand nowhere in the model: what holds one of them all the same gets what the model holds.
        self.suspended = False
        # Called before rows differ; it raises AlignvecError where the model cannot have these.
        self.before_rows: Callable[[Sequence[Values]], None] | None = None
        self._rows: tuple[Values, ...] = tuple(self.mixes)  # what is staged: one row where all are alike
        self._host = torch.zeros(max_rows, len(self.names), device="cpu")
        self._column = {name: i for i, name in enumerate(self.names)}
        self._staged: dict[torch.device, Table] = {}
        self._live: dict[torch.device, Table] = {}
        self._ones: dict[torch.device, Tensor] = {}
        self._version = 0
        self._published: dict[torch.device, object] = {}  # a version, or the rows that were lent
        self._settle()
        self.live(device)

    def _settle(self) -> None:
        """State of threads, which a copy begins without."""
        self.thread = _Thread()
        self.standing = Standing()
        self._readers: WeakSet[Step] = WeakSet()  # open steps that read the live tables, none of a thread that ended
        self._backward: dict[int, list[Step]] = {}  # steps whose gradients are being computed, by autograd's graph task

    def __deepcopy__(
        self, memo: dict[int, Any], leave_out: Sequence[str] = ("thread", "standing", "_readers", "_backward")
    ) -> Coefficients:
        twin: Coefficients = super().__deepcopy__(memo, leave_out)
        twin._settle()
        return twin

    @property
    def rows(self) -> int:
        """Rows of coefficients that are staged: 1 where every sequence shares a mix."""
        return len(self._rows)

    @property
    def step(self) -> Step | None:
        """The step that this thread is in."""
        step = self.thread.step
        return None if step is None or step.over else step  # another thread may have closed it, as that of a generator

    @property
    def one_mix(self) -> bool:
        """Whether all rows of the step share a mix, also when a captured graph is replayed."""
        return self.step is not None and self.step.rows == 1 and not self.capturing

    @property
    def capturing(self) -> bool:
        """Whether a CUDA graph is being captured: its replays will read other coefficients."""
        return any(stream_capturing(device) for device in self._live)

    def live(self, device: torch.device) -> Table:
        """The table that captured and compiled steps on `device` read; made on first use."""
        if device not in self._live:
            with publish_lock:
                self._staged[device] = Table(self.max_rows, len(self.names), device)
                self._live[device] = Table(self.max_rows, len(self.names), device)
                self._stage(device)
                self._staged[device].copy_to(self._live[device])
                self._published[device] = self._version
        return self._live[device]

    def staged(self, device: torch.device) -> Table:
        """The table that the next step on `device` will begin with."""
        self.live(device)
        return self._staged[device]

    def one(self, device: torch.device) -> Tensor:
        """The number of rows, int32 [1], of a step with one row."""
        if device not in self._ones:
            with torch.inference_mode(False):
                self._ones[device] = torch.ones(1, dtype=torch.int32, device=device)
        return self._ones[device]

    @property
    def devices(self) -> tuple[torch.device, ...]:
        return tuple(self._live)

    def mix(self, values: Mapping[str, float]) -> Values:
        """Values by name as one row of the table; names left out are 0."""
        if type(values) is not dict and not isinstance(values, Mapping):
            raise AlignvecError(f"{quoted(values)} is no mix: give coefficients by name, as in {{'medical': 0.7}}")
        row = [0.0] * len(self.names)
        for name, value in values.items():
            column = self._column.get(name)
            if column is None:
                known = ", ".join(self.names)
                raise AlignvecError(f"no vector named {name!r} is attached; the attached ones are: {known}")
            fine = type(value) is float and -BEYOND_FLOAT32 < value < BEYOND_FLOAT32  # as nearly all are
            row[column] = value if fine else float32_number(value, "the coefficient of", name)
        return tuple(row)

    def write(self, mixes: Sequence[Values], *, live: bool = False) -> bool:
        """Stage one mix per row; the next step uses them. All devices, no synchronisation.

        live: only where coefficients apply; False comes back, and nothing is staged, while they are suspended.

        Raises:
            AlignvecError: no rows, more than `max_rows`, or rows that differ on a model that cannot have them.
        """
        if not mixes:
            raise AlignvecError("no rows of coefficients were given; give at least one mix")
        if len(mixes) > self.max_rows:
            raise AlignvecError(
                f"{len(mixes)} rows of coefficients do not fit a table of {self.max_rows}; "
                f"attach with max_rows={len(mixes)} or more"
            )
        rows = _distinct(mixes)
        if len(rows) > 1:
            self._prove_rows(rows)
        self.end_abandoned()
        with publish_lock:
            if live and self.suspended:
                return False
            self.mixes, self._rows = list(mixes), rows
            self._host.numpy()[: len(rows)] = rows
            self._version += 1
            for device in self._staged:
                self._stage(device)
        return True

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """The model stays as it stands for the length of a with block: one mix is not materialised, or restored, in
        the middle of it."""
        self.end_abandoned()
        hold = self.standing.hold(self._inside)
        try:
            self.thread.holds.add(hold)
            yield
        finally:
            self.thread.holds.discard(hold)
            self.standing.release(hold)

    @contextlib.contextmanager
    def moving(self, what: str) -> Iterator[None]:
        """No step is under way for the length of a with block. what: the call that this is, for messages.

        Raises:
            AlignvecError: this thread is inside of a step, or another one does not leave its own.
        """
        self.end_abandoned()
        if self._inside:
            raise AlignvecError(
                f"{what} changes the model's weights or modules, and a forward pass or decode step of it is under way "
                f"in this thread; call {what} after it"
            )
        with self.standing.moving(what) as move:
            try:
                self.thread.holds.add(move)
                yield
            finally:
                self.thread.holds.discard(move)

    @property
    def _inside(self) -> bool:
        return self.step is not None or bool(self.thread.holds)

    def begin(self, batch: int | None) -> Step:
        """A step under what is staged; `end` has to follow. While a CUDA graph is captured staged is copied to live in
        any case: a replay then begins with what is staged at that time. While coefficients are suspended it is one of
        the base, and holds the weights that there are.

        Raises:
            AlignvecError: a batch that the rows do not divide; a layer that is computed again in a backward pass when
                the mix of its forward pass is not known.
        """
        if torch.is_grad_enabled() and not self.suspended and (recomputed := self._recomputed()) is not None:
            return recomputed
        hold = self.standing.hold(self._inside)
        try:
            if self.suspended:
                return Step(self, [(0.0,) * len(self.names)], batch, hold=hold)
            return self._published_step(batch, hold)
        except BaseException:
            self.standing.release(hold)
            raise

    def _published_step(self, batch: int | None, hold: Hold) -> Step:
        with publish_lock:
            if batch is not None and batch % len(self.mixes):
                raise AlignvecError(
                    f"a batch of {batch} does not divide over the {len(self.mixes)} rows of coefficients; "
                    "call set_rows with one mix per sequence, or set() for one mix for all"
                )
            capturing = self.capturing
            current = all(version == self._version for version in self._published.values())
            live = capturing or current or not self._readers
            if live:
                for device, table in self._live.items():
                    if stream_capturing(device) or self._published[device] != self._version:
                        self._staged[device].copy_to(table)
                        self._published[device] = self._version
            own = torch.is_grad_enabled() and not capturing  # the backward pass may come after other writes
            step = Step(self, self._rows, batch, self.devices if live and not own else (), hold)
            if live:
                self._readers.add(step)
            return step

    def end(self, step: Step) -> None:
        """Let go of the live tables and of the model."""
        if self.thread.step is step:
            self.thread.step = None
        step.closed()
        with publish_lock:
            self._readers.discard(step)
            _steps_ended.notify_all()
        if step.hold is not None:
            self.standing.release(step.hold)

    def enter(self, step: Step | None) -> None:
        """Let this thread be in that step."""
        self.thread.step = step

    @contextlib.contextmanager
    def within(self, step: Step) -> Iterator[Step]:
        """This thread is in that step for the length of a with block."""
        before = self.step
        self.thread.step = step
        try:
            yield step
        finally:
            self.thread.step = before

    @contextlib.contextmanager
    def call(self, batch: int | None) -> Iterator[Step]:
        """A step for the call of one edited module outside of any other step."""
        step = self.begin(batch)
        self.thread.step = step
        try:
            yield step
        finally:
            self.thread.step = None  # also where an interrupt comes before `end` begins
            self.end(step)

    def end_abandoned(self) -> None:
        """Close this thread's step if the call that opened it was interrupted (KeyboardInterrupt passes by hooks)."""
        step = self.step
        if step is not None and step.abandoned():
            self.end(step)

    @contextlib.contextmanager
    def lent(self, mixes: Sequence[Values], batch: int) -> Iterator[None]:
        """Steps of `batch` sequences within read these rows; what is staged waits for the first step after.

        The live tables are written in the order of the stream, before any kernel of these steps: a captured graph that
        is replayed within reads them, too.

        Raises:
            AlignvecError: rows that differ on a model that cannot have them; a forward pass that is under way.
        """
        rows = tuple(mixes)
        if len(rows) > 1:
            self._prove_rows(rows)
        self.end_abandoned()
        if self.step is not None:
            raise AlignvecError("a forward pass of this model is under way, inside of which it cannot be decoded")
        hold = self.standing.hold(self._inside)
        try:
            step = self._lent_step(rows, batch, hold)
        except BaseException:
            self.standing.release(hold)
            raise
        self.thread.step = step
        try:
            yield
        finally:
            self.thread.step = None
            self.end(step)

    def _lent_step(self, rows: tuple[Values, ...], batch: int, hold: Hold) -> Step:
        step = Step(self, rows, batch, self.devices, hold)
        with publish_lock:
            if not patiently(_steps_ended, lambda: not self._readers):
                raise AlignvecError(
                    f"another thread has been inside of a forward pass of this model for {PATIENCE:.0f} seconds; "
                    "let one thread at a time decode"
                )
            self._readers.add(step)
            for device, live in self._live.items():  # each time: a compiled or captured step may have published since
                live.copy_rows(rows)
                self._published[device] = rows
        return step

    def began_backward(self, step: Step) -> None:
        """Gradients of a step are being computed, in this thread's graph task of autograd."""
        task = torch._C._current_graph_task_id()
        with publish_lock:
            known = self._backward.setdefault(task, [])
            known.append(step)
        if len(known) == 1:
            engine: Any = torch.autograd.Variable._execution_engine
            engine.queue_callback(lambda: self._backward.pop(task, None))

    def _recomputed(self) -> Step | None:
        """In a backward pass (gradient checkpointing) the step whose gradients are being computed; else None."""
        task = torch._C._current_graph_task_id()
        if task == -1:
            return None
        with publish_lock:
            steps = self._backward.get(task) or [step for steps in self._backward.values() for step in steps]
        if not steps:
            raise AlignvecError(
                "a layer is computed again in a backward pass whose forward pass did not go through the attached "
                "model, so the mix of that pass is not known; compute the loss from the model's own outputs"
            )
        if len({step.mixes for step in steps}) > 1:
            raise AlignvecError(
                "a layer is computed again in a backward pass through several forward passes under different mixes, "
                "and it is not known to which it belongs; call backward() for each, or do without checkpointing"
            )
        return steps[0].again()

    def _prove_rows(self, rows: Sequence[Values]) -> None:
        if self.before_rows is not None:
            self.before_rows(rows)

    def _stage(self, device: torch.device) -> None:
        self._staged[device].copy_(self._host, len(self._rows))

    def traced(self, device: torch.device) -> Place:
        """The table that a compiled graph reads: the live one, or that of a step that has one of its own."""
        step, row = self.thread.step, self.thread.traced_row
        if step is None or step.reads_live or self.suspended:
            live = self.live(device)
            table, rows = live.table, live.rows
        else:
            table, rows = step.places[device]
        return (table, rows) if row is None else (table[row : row + 1], self.one(device))


def _distinct(mixes: Sequence[Values]) -> tuple[Values, ...]:
    """The mixes, or one where all are alike."""
    return tuple(mixes[:1] if all(mix == mixes[0] for mix in mixes) else mixes)
