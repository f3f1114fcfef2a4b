"""Coarse to fine: a wide lattice first, then ever closer neighbours of the best mixes found."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Iterator

from alignvec.errors import AlignvecError
from alignvec.search.landscape import Landscape, View
from alignvec.search.lattice import lattice
from alignvec.search.result import Result, Targets, order, parsed, results
from alignvec.search.target import Target

Cell = tuple[int, ...]  # a mix as indices into the lattice, in the order of the names


def hierarchical(
    landscape: Landscape | View,
    targets: Targets,
    points: int = 21,
    low: float = -1.0,
    high: float = 1.0,
    *,
    coarse: int = 3,
    keep: int = 3,
) -> list[Result]:
    """Search coarse to fine on the grid's own lattice: a result a target (arXiv 2410.19206 proposes it as future work).

    First `coarse` points a vector, in every combination. Then the spacing is halved (1.0, 0.5, 0.2, 0.1), and at each
    spacing the neighbours of the `keep` best mixes, one coefficient up or down, are measured until the best one stays.
    Of mixes with one score that of the smaller norm is better. A round's mixes go to the evaluator together.

    Several targets are searched side by side, each choosing from what was measured for any of them: their results count
    the evaluations of the whole. Search them one by one, each with `landscape.view()`, for what one costs alone.

    Raises AlignvecError for a lattice with fewer points than `coarse`, and as `Landscape.rates`.
    """
    axis = lattice(points, low, high)
    if not 2 <= coarse <= points or keep < 1:
        raise AlignvecError(f"coarse={coarse} must lie between 2 and points={points}, and keep={keep} be at least 1")
    wanted, view, begun = parsed(landscape, targets), landscape.view(), time.perf_counter()
    known: dict[Cell, None] = {}

    def measure(cells: Iterable[Cell]) -> None:
        new = [cell for cell in dict.fromkeys(cells) if cell not in known]
        if new:
            view.rates([{name: axis[i] for name, i in zip(view.names, cell, strict=True)} for cell in new])
            known.update(dict.fromkeys(new))

    def best(searched: Iterable[Target]) -> dict[Target, list[Cell]]:
        cells, (coefficients, rates) = list(known), view.known()
        return {target: [cells[i] for i in order(target, coefficients, rates)[:keep]] for target in searched}

    spacing = (points - 1) // (coarse - 1)
    first = sorted({*range(0, points - 1, spacing), points - 1})
    measure(itertools.product(first, repeat=len(view.names)))
    while spacing > 1:
        spacing //= 2
        active = best(wanted)
        while active:
            measure(near for cells in active.values() for cell in cells for near in _neighbours(cell, spacing, points))
            active = {target: cells for target, cells in best(active).items() if cells[0] != active[target][0]}
    return results("hierarchical", wanted, view, begun)


def _neighbours(cell: Cell, spacing: int, points: int) -> Iterator[Cell]:
    """The cells that differ in one coefficient by the spacing, or by what is left of it to the lattice's end."""
    for i, index in enumerate(cell):
        for moved in (max(0, index - spacing), min(points - 1, index + spacing)):
            yield (*cell[:i], moved, *cell[i + 1 :])
