"""A coefficient table on one device."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence

import torch


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
        if self._used is None or stream_capturing(self.table.device):
            yield
            return
        stream = torch.cuda.current_stream(self.table.device)
        stream.wait_event(self._used)
        yield
        self._used.record(stream)


def stream_capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured there."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
