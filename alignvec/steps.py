"""A step: one call of the outermost edited object, inside of which everything sees the same mixes.

A step opens at the model that vectors were attached to, at a model inside of it (a backbone, an encoder, a tower), or,
where neither is being called, at the first edited module that is. It belongs to the thread that opened it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch import nn

    from alignvec.coefficients import Coefficients
    from alignvec.standing import Hold

Values = tuple[float, ...]  # one row of the coefficient table
Place = tuple[Tensor, Tensor]  # the table float32 [rows, n_vectors] that kernels read, and its number of rows int32 [1]


class Step:
    """What a step fixes: its rows of coefficients, the batch that they belong to, and where kernels read them.

    mixes: one row of coefficients for all sequences, or several; rows: how many. batch: sequences of the outermost
    inputs; None where these do not tell. given: parameters to use in the place of a module's own, by the module's id.
    calls: where not None, every call of an edited module is appended (`rowcheck.py`).
    """

    def __init__(
        self,
        coefficients: Coefficients,
        mixes: Sequence[Values],
        batch: int | None,
        live: Sequence[torch.device] = (),
        hold: Hold | None = None,
    ) -> None:
        """live: devices whose live tables hold these mixes for as long as the step lasts; on others it makes its own.
        hold: what keeps the model as it stands for the step.
        """
        self.coefficients = coefficients
        self.mixes = tuple(mixes)
        self.rows = len(self.mixes)
        self.batch = batch
        self.hold = hold
        self.over = False
        self.given: dict[int, dict[str, Tensor]] = {}
        self.calls: list[Any] | None = None
        self.depth = 0
        self.alone = False  # whether it is the call of one module, whose inputs are the batch
        self.opener: nn.Module | None = None
        self._frame: FrameType | None = None
        self._live = tuple(live)
        self.reads_live = bool(live)
        self.places: dict[torch.device, Place] = {}
        self._values: dict[tuple[int, str], Tensor] = {}
        self._parent: tuple[Step, int] | None = None
        self._alone: dict[int, Step] = {}
        self._same: dict[tuple[int, ...], bool] = {}

    def on(self, device: torch.device) -> Place:
        """The table that kernels on `device` read in this step."""
        place = self.places.get(device)
        if place is None:
            place = self.places[device] = self._make(device)
        return place

    def row(self, number: int) -> Step:
        """The step of one row alone: its sequences, under its mix."""
        if number not in self._alone:
            batch = None if self.batch is None else self.batch // self.rows
            part = Step(self.coefficients, self.mixes[number : number + 1], batch)
            part._parent = (self, number)
            part.calls = self.calls
            self._alone[number] = part
        return self._alone[number]

    def again(self) -> Step:
        """The same mixes once more, for a layer that is computed again in the backward pass."""
        twin = Step(self.coefficients, self.mixes, self.batch)
        twin.places = self.places
        return twin

    def alike(self, columns: tuple[int, ...]) -> bool:
        """Whether all rows have the same coefficients of these vectors, now and when a captured graph is replayed."""
        found = self._same.get(columns)
        if found is None:
            first = self.mixes[0]
            same = all(mix[c] == first[c] for mix in self.mixes for c in columns)
            found = self._same[columns] = self.rows == 1 or (same and not self.coefficients.capturing)
        return found

    def value(self, key: tuple[int, str], form: Callable[[], Tensor]) -> Tensor:
        """A tensor that is formed once in a step."""
        found = self._values.get(key)
        if found is None:
            found = self._values[key] = form()
        return found

    def opened_by(self, module: nn.Module, frame: FrameType | None) -> None:
        self.opener, self._frame, self.depth = module, frame, 1

    def closed(self) -> None:
        """The step is over. Let go of the call that opened it, whose frame holds its results."""
        self.opener = self._frame = None
        self.over = True

    def abandoned(self) -> bool:
        """Whether the call that opened the step is over: it was interrupted, and nothing closed the step."""
        if self._frame is None:
            return False
        try:
            self._frame.clear()
        except RuntimeError:  # "cannot clear an executing frame"
            return False
        return True

    def _make(self, device: torch.device) -> Place:
        if self._parent is not None:
            whole, number = self._parent
            return whole.on(device)[0][number : number + 1], self.coefficients.one(device)
        if device in self._live:
            live = self.coefficients.live(device)
            return live.table, live.rows
        with torch.inference_mode(False):
            table = torch.tensor(self.mixes, dtype=torch.float32, device="cpu").to(device)
            return table, torch.full((1,), self.rows, dtype=torch.int32, device=device)
