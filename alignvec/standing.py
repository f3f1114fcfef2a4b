"""That a model's modules and weights stay as they are in a step, for which materialise, restore and detach wait."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from weakref import WeakSet

from alignvec.errors import AlignvecError
from alignvec.steps import Values

PATIENCE = 60.0  # seconds that one thread waits for another one's forward pass
AGAIN = 0.1  # seconds after which who waits looks again: of a thread that ended or was interrupted nobody says so


@dataclass(frozen=True)
class Reading:
    """What a model computes with, read once.

    weights: the mix that the weights hold; empty while they are the base's.
    mixes: the rows of coefficients that are set; None where the weights hold all that there is.
    """

    weights: Values
    mixes: tuple[Values, ...] | None


def patiently(changed: threading.Condition, ready: Callable[[], bool]) -> bool:
    """Whether it is ready within `PATIENCE` seconds. The lock of `changed` is held."""
    end = time.monotonic() + PATIENCE
    while not ready():
        left = end - time.monotonic()
        if left <= 0:
            return False
        changed.wait(min(left, AGAIN))
    return True


class Hold:
    """That somebody holds the model, or moves it, for as long as this object is there and not given back."""

    __slots__ = ("__weakref__",)


class Standing:
    """Any number of steps hold a model as it stands; one thread at a time moves it, while none of them does.

    A thread that waits to move it goes before steps that have not begun, so that it is not kept waiting for ever. What
    is inside of a step already does not wait. A thread that ends or is interrupted at any place lets go of the model:
    a hold is an object of who has it, to which nothing here keeps a reference.
    """

    def __init__(self) -> None:
        # The lock is taken as itself, not through the condition, which an interrupt can leave locked.
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._holders: WeakSet[Hold] = WeakSet()
        self._movers: dict[Hold, bool] = {}  # of threads that wait to move the model: whether they do by now

    def hold(self, inside: bool) -> Hold:
        """Keep the model as it stands until `release`. inside: this thread holds it already, or moves it."""
        hold = Hold()
        with self._lock:
            while not inside and self._movers:
                self._changed.wait(AGAIN)
            self._holders.add(hold)
        return hold

    def release(self, hold: Hold) -> None:
        with self._lock:
            self._holders.discard(hold)
            if self._movers:
                self._changed.notify_all()

    @contextlib.contextmanager
    def moving(self, what: str) -> Iterator[Hold]:
        """No thread holds the model for the length of a with block. what: the call that moves it, for messages.

        Raises:
            AlignvecError: another thread does not let go of it.
        """
        move = Hold()
        try:
            with self._lock:
                self._movers[move] = False
                if not patiently(self._changed, lambda: not self._holders and not any(self._movers.values())):
                    raise AlignvecError(
                        f"another thread has been inside of a forward pass of this model for {PATIENCE:.0f} seconds, "
                        f"during which its weights stay as they are; call {what} when that thread is done"
                    )
                self._movers[move] = True
            yield move
        finally:
            self._movers.pop(move, None)  # one call, which an interrupt comes before or after
            with self._lock:
                self._changed.notify_all()
