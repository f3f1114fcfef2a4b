"""What a check shows: the results of an attached model held to those of the plain ones."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from alignvec import AlignvecError
from tests.architectures.subject import Results, Subject

TOLERANCE = 1e-3  # of float32 results, relative to the norm of the truth

# The truth, from plain models, and the same results from attached ones.
Check = tuple[Callable[[Subject], Results], Callable[[Subject], Results]]


@dataclass(frozen=True)
class Outcome:
    """right, refused, wrong, crashed or n/a; the worst relative error where there is one, and where it was or why."""

    status: str
    error: float | None = None
    detail: str = ""


def outcome(subject: Subject, check: Check) -> Outcome:
    """What a check shows of a subject; n/a where the plain model itself cannot do it."""
    plain, attached = check
    try:
        truth = plain(subject)
    except Exception as problem:
        return Outcome("n/a", detail=last_line(problem))
    if not truth:
        return Outcome("n/a", detail="the plain model gives nothing to compare")
    for name, value in truth.items():
        if not torch.isfinite(value).all():
            return Outcome("n/a", detail=f"{name} of the plain model is not finite")
    try:
        found = attached(subject)
    except AlignvecError as refusal:
        return Outcome("refused", detail=str(refusal))
    except Exception as problem:
        return Outcome("crashed", detail=last_line(problem))
    error, where = worst(found, truth)
    return Outcome("right", error, where) if error < TOLERANCE else Outcome("wrong", error, where)


def worst(found: Results, truth: Results) -> tuple[float, str]:
    """The largest relative error, and the names of the results that are off; infinite where one is missing or NaN."""
    floor = 1e-2 * max(float(value.double().norm()) for value in truth.values())
    errors = {name: _error(found.get(name), value, floor) for name, value in truth.items()}
    off = [name for name, error in errors.items() if not error < TOLERANCE]
    return max(errors.values()), ", ".join(off[:8]) + (f" and {len(off) - 8} more" if len(off) > 8 else "")


def _error(found: Tensor | None, truth: Tensor, floor: float) -> float:
    if found is None or found.shape != truth.shape:
        return float("inf")
    if not truth.is_floating_point():
        return float((found != truth).float().mean())
    error = float((found.double() - truth.double()).norm()) / max(float(truth.double().norm()), floor, 1e-30)
    return error if error == error else float("inf")


def last_line(problem: Exception) -> str:
    frame = next((f for f in reversed(traceback.extract_tb(problem.__traceback__))), None)
    where = f" ({frame.filename.rsplit('/', 1)[-1]}:{frame.lineno})" if frame else ""
    return f"{type(problem).__name__}: {' '.join(str(problem).split())[:300]}{where}"
