"""One number of the suite, what it was asked of, and the row that it becomes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from bench import record
from bench.record import Row

MODELS = ("mistral-7b", "small", "tiny")


@dataclass(frozen=True)
class Setting:
    """The model (one of MODELS) and the device that a run measures; `quick`: few samples, to see that all runs."""

    model: str
    device: str
    quick: bool = False

    @property
    def kind(self) -> str:
        """ "cuda" or "cpu"."""
        return torch.device(self.device).type

    @property
    def repeats(self) -> int:
        """Most samples of each time."""
        return 3 if self.quick else 20


@dataclass(frozen=True)
class Case:
    """One number.

    Attributes:
        section, name, parameters: what is measured; together they are unique.
        unit: "s", "B", "B/s", "tokens/s" or "x" (a ratio): base units, so that a row needs no context.
        better: "lower" or "higher".
        target: the value that is meant to be reached, where there is one.
        missing: why it cannot be measured in this setting; empty where it can.
    """

    section: str
    name: str
    parameters: Mapping[str, Any] = field(default_factory=dict, hash=False)
    unit: str = "s"
    better: str = "lower"
    target: float | None = None
    missing: str = ""

    def row(self, samples: Sequence[float]) -> Row:
        """What was measured, in the case's unit; at least one sample."""
        return {**asdict(self), "missing": None, **record.spread(samples)}

    def skipped(self, reason: str) -> Row:
        """No value, and why."""
        return {**asdict(self), "missing": reason, **record.spread(())}


def median_of(rows: Sequence[Row], name: str, **parameters: Any) -> float | None:
    """The median of the first row of that name whose parameters include these; None where it is missing."""
    for row in rows:
        if row["name"] == name and parameters.items() <= row["parameters"].items():
            return row["median"]
    return None
