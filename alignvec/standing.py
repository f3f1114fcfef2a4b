"""That a model's modules and weights stay as they are in a step, for which materialise, restore and detach wait."""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from alignvec.errors import AlignvecError
from alignvec.steps import Values

PATIENCE = 60.0  # seconds that one thread waits for another one's forward pass


@dataclass(frozen=True)
class Reading:
    """What a model computes with, read once.

    weights: the mix that the weights hold; empty while they are the base's.
    mixes: the rows of coefficients that are set; None where the weights hold all that there is.
    """

    weights: Values
    mixes: tuple[Values, ...] | None


class Standing:
    """Any number of steps hold a model as it stands; one thread at a time moves it, while none of them does.

    A thread that waits to move it goes before steps that have not begun, so that it is not kept waiting for ever. What
    is inside of a step already does not wait.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._holders = 0
        self._movers = 0  # threads that move the model or wait for that
        self._moving = False
        self.lost: deque[bool] = deque()  # of threads that ended while they held it; appended to without the lock

    def hold(self, inside: bool) -> None:
        """Keep the model as it stands until `release`. inside: this thread holds it already, or moves it."""
        with self._lock:
            while self._movers and not inside:
                self._changed.wait()
            self._holders += 1

    def release(self) -> None:
        with self._lock:
            self._holders -= 1
            if self._movers:
                self._changed.notify_all()

    @contextlib.contextmanager
    def moving(self, what: str) -> Iterator[None]:
        """No thread holds the model for the length of a with block. what: the call that moves it, for messages.

        Raises:
            AlignvecError: another thread does not let go of it.
        """
        with self._changed:
            self._movers += 1
        moves = False
        try:
            with self._changed:
                if not self._changed.wait_for(lambda: not self._moving and not self._held(), PATIENCE):
                    raise AlignvecError(
                        f"another thread has been inside of a forward pass of this model for {PATIENCE:.0f} seconds, "
                        f"during which its weights stay as they are; call {what} when that thread is done"
                    )
                self._moving = moves = True
            yield
        finally:
            with self._changed:
                self._movers -= 1
                self._moving = self._moving and not moves
                self._changed.notify_all()

    def _held(self) -> int:
        while self.lost:
            self.lost.pop()
            self._holders -= 1
        return self._holders
