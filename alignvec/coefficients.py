"""The coefficient table of an attached model: written by the host in microseconds, read by every kernel of a step."""

from __future__ import annotations

import contextlib
import copy
import math
import threading
from collections.abc import Iterator, Mapping, Sequence

import torch

from alignvec.errors import AlignvecError

# One lock for all tables: it is held for the copy of a few kilobytes, and a plain module global survives deepcopy.
publish_lock = threading.Lock()


class Table:
    """`table` float32 [max_rows, n_vectors] and `rows` int32 [1], on one device, at addresses that never change."""

    def __init__(self, max_rows: int, n_vectors: int, device: torch.device) -> None:
        # Normal tensors even when the caller is in inference mode: later writes may come from outside it.
        with torch.inference_mode(False):
            self.table = torch.zeros(max_rows, n_vectors, dtype=torch.float32, device=device)
            self.rows = torch.ones(1, dtype=torch.int32, device=device)
        self._settle()

    def _settle(self) -> None:
        self._used: torch.cuda.Event | None = None
        if self.table.device.type == "cuda":
            # Lets inductor's CUDA graphs read the table in place; a copy per replay would freeze the coefficients.
            torch._dynamo.mark_static_address(self.table)
            torch._dynamo.mark_static_address(self.rows)
            self._used = torch.cuda.Event()

    def __deepcopy__(self, memo: dict[int, object]) -> Table:
        twin = Table.__new__(Table)  # events cannot be copied; modules refer to these very tensors, so memo decides
        twin.table, twin.rows = copy.deepcopy(self.table, memo), copy.deepcopy(self.rows, memo)
        twin._settle()
        return twin

    def copy_(self, table: torch.Tensor, rows: torch.Tensor | int) -> None:
        """Take over a table [max_rows, n_vectors], and how many of its rows are in use."""
        with self._ordered():
            # From pageable host memory on purpose: the driver takes its own copy of so few bytes before it returns.
            self.table.copy_(table, non_blocking=True)
            if isinstance(rows, int):
                self.rows.fill_(rows)
            else:
                self.rows.copy_(rows, non_blocking=True)

    def copy_rows(self, mixes: Sequence[tuple[float, ...]]) -> None:
        """Write mixes to the first rows, and put those in use."""
        with self._ordered():
            self.table[: len(mixes)].copy_(torch.tensor(mixes, dtype=torch.float32, device="cpu"), non_blocking=True)
            self.rows.fill_(len(mixes))

    def copy_to(self, other: Table) -> None:
        """Publish into `other`."""
        with self._ordered():
            other.copy_(self.table, self.rows)

    @contextlib.contextmanager
    def _ordered(self) -> Iterator[None]:
        """On CUDA: after the last use of this table on any stream, and before the next."""
        if self._used is None or _capturing(self.table.device):
            yield
            return
        stream = torch.cuda.current_stream(self.table.device)
        stream.wait_event(self._used)
        yield
        self._used.record(stream)


class Coefficients:
    """Coefficients of `names` for up to `max_rows` rows, staged by the host and published to the devices once a step.

    A write goes to the *staged* tables. Each step of the model begins by copying staged to *live*, and its kernels read
    only live: a step that is under way keeps the mix it began with, whatever other threads write meanwhile.

    Row rule: a batch of B sequences over R rows of coefficients gives sequence b row `b * R // B`. One row serves
    everyone, B rows serve one each, and beams or `num_return_sequences`, which repeat each sequence in place, follow.
    """

    def __init__(self, names: Sequence[str], max_rows: int, device: torch.device) -> None:
        self.names = tuple(names)
        self.max_rows = max_rows
        self.mixes: list[tuple[float, ...]] = [(0.0,) * len(self.names)]
        # Of the step under way: its sequences, and the rows of the live table.
        self.batch: int | None = None
        self.live_rows = 1
        self._host = torch.zeros(max_rows, len(self.names), device="cpu")
        self._column = {name: i for i, name in enumerate(self.names)}
        self._staged: dict[torch.device, Table] = {}
        self._live: dict[torch.device, Table] = {}
        self._version = 0
        self._published: dict[torch.device, object] = {}  # a version, or the rows that were lent
        self._lent = False
        self.live(device)

    @property
    def rows(self) -> int:
        """Rows of coefficients in use: 1 when every sequence shares a mix."""
        return len(self.mixes)

    def live(self, device: torch.device) -> Table:
        """The table that kernels on `device` read; made on first use."""
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

    @property
    def devices(self) -> tuple[torch.device, ...]:
        return tuple(self._live)

    def mix(self, values: Mapping[str, float]) -> tuple[float, ...]:
        """Values by name as one row of the table; names left out are 0."""
        row = [0.0] * len(self.names)
        for name, value in values.items():
            column = self._column.get(name)
            if column is None:
                known = ", ".join(self.names)
                raise AlignvecError(f"no vector named {name!r} is attached; the attached ones are: {known}")
            try:
                row[column] = float(value)
            except (TypeError, ValueError):
                raise AlignvecError(f"the coefficient of {name!r} must be a number, not {value!r}") from None
            if not math.isfinite(row[column]):
                raise AlignvecError(f"the coefficient of {name!r} is {value}; it must be finite")
        return tuple(row)

    def write(self, mixes: Sequence[tuple[float, ...]]) -> None:
        """Stage one mix per row; the next step uses them. All devices, no synchronisation.

        Raises:
            AlignvecError: no rows, or more than `max_rows`.
        """
        if not 1 <= len(mixes) <= self.max_rows:
            raise AlignvecError(
                f"{len(mixes)} rows of coefficients do not fit a table of 1 to {self.max_rows}; "
                f"attach with max_rows={len(mixes)} or more"
            )
        with publish_lock:
            self.mixes = list(mixes)
            self._host.numpy()[: len(mixes)] = mixes
            self._version += 1
            for device in self._staged:
                self._stage(device)

    def publish(self) -> None:
        """Copy staged to live where something was written since; the first act of every step.

        While a CUDA graph is captured the copy is always made: a replay then begins with what is staged at that time.
        """
        if self._lent:
            return
        with publish_lock:
            self.live_rows = len(self.mixes)
            for device, live in self._live.items():
                if _capturing(device) or self._published[device] != self._version:
                    self._staged[device].copy_to(live)
                    self._published[device] = self._version

    @contextlib.contextmanager
    def lent(self, mixes: Sequence[tuple[float, ...]], batch: int) -> Iterator[None]:
        """Steps of `batch` sequences within read these rows; what is staged waits for the first step after.

        The tables are written in the order of the stream, before any kernel of these steps: a captured graph that is
        replayed within reads them, too.
        """
        rows = tuple(mixes)
        with publish_lock:
            self._lent, self.live_rows, self.batch = True, len(rows), batch
            for device, live in self._live.items():  # each time: a compiled or captured step may have published since
                live.copy_rows(rows)
                self._published[device] = rows
        try:
            yield
        finally:
            self._lent = False

    def published(self, device: torch.device) -> object:
        """What changes when the live table does."""
        return self._published.get(device)

    def _stage(self, device: torch.device) -> None:
        self._staged[device].copy_(self._host, len(self.mixes))


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
