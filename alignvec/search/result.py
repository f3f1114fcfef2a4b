"""What a search found, what it cost, and how soon it got there."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy
from torch import Tensor

from alignvec.errors import AlignvecError
from alignvec.search.landscape import Landscape, View
from alignvec.search.target import Target

Targets = Target | str | Sequence[Target | str]


@dataclass(frozen=True)
class Result:
    """The best mix that a search found for a target.

    Where one search served several targets, `evaluations`, `seconds` and `overhead` are the whole search's in each of
    their results.
    """

    method: str
    target: Target
    mix: dict[str, float]
    score: float  # mean rate of the wanted levels
    rates: Tensor  # float64 [domains, levels]
    evaluations: int  # distinct mixes that the search asked for
    seconds: float  # what measuring them takes, whether it was done now or before
    overhead: float  # seconds of the search itself, measuring apart
    trace: list[float] = field(
        repr=False
    )  # best score after each evaluation; NaN while no constraint-abiding mix is known
    front: list[dict[str, float]] = field(default_factory=list, repr=False)  # Pareto-optimal mixes, of NSGA-II alone

    @property
    def reached(self) -> bool:
        """`Target.reached` of the rates."""
        return bool(self.target.reached(self.rates))

    @property
    def feasible(self) -> bool:
        """Whether the mix keeps the target's constraints."""
        return bool(self.target.feasible(self.rates))

    @property
    def seconds_per_evaluation(self) -> float:
        return self.seconds / self.evaluations

    def to_json(self) -> dict[str, Any]:
        """Plain values for a JSON file; rates by domain and level."""
        levels = self.target.levels
        rates = {
            domain: dict(zip(levels, row, strict=True))
            for domain, row in zip(self.target.domains, self.rates.tolist(), strict=True)
        }
        return {
            "method": self.method,
            "target": str(self.target),
            "mix": self.mix,
            "score": self.score,
            "rates": rates,
            "reached": self.reached,
            "feasible": self.feasible,
            "evaluations": self.evaluations,
            "seconds": self.seconds,
            "overhead": self.overhead,
            "trace": [None if math.isnan(score) else score for score in self.trace],
            "front": self.front,
        }


def order(target: Target, coefficients: Tensor, rates: Tensor) -> list[int]:
    """Indices of mixes, best first: constraints kept, then the score, then the smaller Euclidean norm.

    Among mixes that break constraints, those that break them least come first. `coefficients` are [mixes, names],
    `rates` [mixes, domains, levels].
    """
    broken, norms = target.violations(rates).clamp(min=0).sum(-1), coefficients.norm(dim=-1)
    columns = (broken, -target.score(rates), norms, *coefficients.T)
    return numpy.lexsort([column.numpy().round(9) for column in columns[::-1]]).tolist()  # its last key is the first


def trace(target: Target, rates: Tensor) -> list[float]:
    """Best score after each evaluation among mixes that keep the constraints; NaN before the first such mix."""
    scores = target.score(rates).masked_fill(~target.feasible(rates), -1.0).cummax(0).values
    return [score if score >= 0 else math.nan for score in scores.tolist()]


def results(
    method: str, targets: Sequence[Target], view: View, begun: float, front: Sequence[dict[str, float]] = ()
) -> list[Result]:
    """The best of all mixes that a search asked its view for, a result a target.

    `begun`: `time.perf_counter()` when the search started.
    """
    coefficients, rates = view.known()
    found = []
    for target in targets:
        best = order(target, coefficients, rates)[0]
        mix = dict(zip(view.names, coefficients[best].tolist(), strict=True))
        found.append((target, mix, float(target.score(rates[best])), rates[best], trace(target, rates)))
    seconds, overhead = view.seconds, max(0.0, time.perf_counter() - begun - view.waited)
    return [
        Result(method, target, mix, score, rate, len(rates), seconds, overhead, curve, list(front))
        for target, mix, score, rate, curve in found
    ]


def parsed(landscape: Landscape | View, targets: Targets) -> list[Target]:
    """One target or several, texts or not, as targets on a landscape's domains and levels.

    Raises AlignvecError for none, a text that is no target, or a target on other domains or levels.
    """
    given = [targets] if isinstance(targets, (Target, str)) else list(targets)
    if not given:
        raise AlignvecError("there is no target to search for: give one, such as medical=expert")
    made = [Target.parse(t, landscape.domains, landscape.levels) if isinstance(t, str) else t for t in given]
    for target in made:
        if (target.domains, target.levels) != (landscape.domains, landscape.levels):
            raise AlignvecError(f"the target {target} was made for other domains or levels than the landscape's")
    return made


def evaluations_to_reach(found: Result | Sequence[float], best: float, within: float = 0.02) -> int | None:
    """Evaluations until the score was within `within` (2 points) of `best`, the grid's score; None if it never was.

    `found`: a result, or a trace.
    """
    scores = found.trace if isinstance(found, Result) else found
    return next((i for i, score in enumerate(scores, 1) if score >= best - within - 1e-9), None)


def seconds_to_reach(found: Result, best: float, within: float = 0.02) -> float | None:
    """Seconds of measuring until then: the evaluations at the search's mean cost of one; `found.overhead` is apart."""
    count = evaluations_to_reach(found, best, within)
    return None if count is None else count * found.seconds_per_evaluation
