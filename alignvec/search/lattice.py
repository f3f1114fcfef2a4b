"""Evenly spaced coefficients: one vector at a time, or every combination of them all."""

from __future__ import annotations

import itertools
import math
import time
from dataclasses import dataclass

from torch import Tensor

from alignvec.errors import AlignvecError
from alignvec.search.landscape import Landscape, View
from alignvec.search.result import Result, Targets, parsed, results

LARGEST = 1_000_000  # mixes of a grid


@dataclass(frozen=True)
class Sweep:
    """One vector's coefficients, the others at 0, and the rates there: float64 [coefficients, domains, levels]."""

    name: str
    coefficients: tuple[float, ...]
    domains: tuple[str, ...]
    levels: tuple[str, ...]
    rates: Tensor


def lattice(points: int = 21, low: float = -1.0, high: float = 1.0) -> tuple[float, ...]:
    """`points` evenly spaced coefficients from `low` to `high`, both included, to six decimals."""
    if points < 2 or not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise AlignvecError(
            f"coefficients go from a low to a high end in 2 points or more, not {points} of {low}..{high}"
        )
    return tuple(round(low + (high - low) * i / (points - 1), 6) for i in range(points))


def combinations(landscape: Landscape | View, points: int, low: float, high: float) -> list[dict[str, float]]:
    """Every combination of the lattice's coefficients, the last name's changing first."""
    count = points ** len(landscape.names)
    if count > LARGEST:
        raise AlignvecError(
            f"a grid of {points} points for {len(landscape.names)} vectors has {count:,} mixes: "
            "take fewer points, or another method"
        )
    axis = lattice(points, low, high)
    return [
        dict(zip(landscape.names, chosen, strict=True))
        for chosen in itertools.product(axis, repeat=len(landscape.names))
    ]


def sweep(landscape: Landscape | View, name: str, points: int = 21, low: float = -1.0, high: float = 1.0) -> Sweep:
    """Rates over the coefficient of one vector, the others at 0. Raises AlignvecError as `Landscape.rates`."""
    axis = lattice(points, low, high)
    rates = landscape.rates([{name: coefficient} for coefficient in axis])
    return Sweep(name, axis, landscape.domains, landscape.levels, rates)


def sweeps(
    landscape: Landscape | View, targets: Targets, points: int = 21, low: float = -1.0, high: float = 1.0
) -> list[Result]:
    """The best mix with a single vector, a result a target: what turning one knob at a time gets."""
    wanted, view, begun = parsed(landscape, targets), landscape.view(), time.perf_counter()
    for name in landscape.names:
        sweep(view, name, points, low, high)
    return results("sweep", wanted, view, begun)


def grid(
    landscape: Landscape | View, targets: Targets, points: int = 21, low: float = -1.0, high: float = 1.0
) -> list[Result]:
    """The best of every combination of coefficients, a result a target: one grid serves all (arXiv 2410.19206).

    With 21 points (steps of 0.1) and three vectors that is 9,261 mixes. A landscape with a storage goes on where it was
    stopped. Raises AlignvecError for a grid above a million mixes, and as `Landscape.rates`.
    """
    wanted, view, begun = parsed(landscape, targets), landscape.view(), time.perf_counter()
    view.rates(combinations(landscape, points, low, high))
    return results("grid", wanted, view, begun)
