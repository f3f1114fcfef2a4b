"""Pictures of a search: sweeps, slices of a landscape, convergence. All need matplotlib."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from alignvec.errors import AlignvecError
from alignvec.pictures import write_picture
from alignvec.search.landscape import Landscape, View, show
from alignvec.search.lattice import Sweep, lattice
from alignvec.search.result import Result
from alignvec.search.target import Target

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = ("tab:red", "0.5", "tab:blue", "tab:green", "tab:orange", "tab:purple")  # of levels, in order


def plot_sweeps(sweeps: Sequence[Sweep], output: str | Path, intervals: Sequence[Tensor] | None = None) -> Figure:
    """Level rates over each swept coefficient, a row a vector and a column a domain; written to a picture file.

    `intervals`: for each sweep the ends of intervals, [coefficients, domains, levels, 2], as `Scores.intervals` gives.
    """
    domains, levels = sweeps[0].domains, sweeps[0].levels
    figure = _figure(3.6 * len(domains), 2.8 * len(sweeps))
    panels = figure.subplots(len(sweeps), len(domains), squeeze=False, sharex="row", sharey=True)
    for i, swept in enumerate(sweeps):
        for d, domain in enumerate(domains):
            axes = panels[i, d]
            for j, level in enumerate(levels):
                colour = COLOURS[j % len(COLOURS)]
                axes.plot(swept.coefficients, swept.rates[:, d, j].tolist(), ".-", color=colour, label=level)
                if intervals is not None:
                    ends = intervals[i][:, d, j].tolist()
                    axes.fill_between(
                        swept.coefficients, *zip(*ends, strict=True), color=colour, alpha=0.15, linewidth=0
                    )
            axes.set(title=f"{domain} questions", xlabel=f"coefficient of {swept.name}", ylim=(-0.03, 1.03))
        panels[i, 0].set_ylabel("share of questions")
    panels[0, 0].legend(frameon=False)
    write_picture(figure, output)
    return figure


def plot_slices(
    landscape: Landscape | View,
    target: Target,
    x: str,
    y: str,
    output: str | Path,
    at: Sequence[Mapping[str, float]] = ({},),
    points: int = 21,
    low: float = -1.0,
    high: float = 1.0,
) -> Figure:
    """The target's score over the coefficients of `x` and `y`, a heat map for each setting of the others in `at`.

    What the landscape does not know is measured.
    """
    for name in (x, y):
        if name not in landscape.names or x == y:
            raise AlignvecError(f"a slice lies along two of {', '.join(landscape.names)}, not {x!r} and {y!r}")
    axis = lattice(points, low, high)
    half = (axis[1] - axis[0]) / 2
    figure = _figure(3.6 * len(at) + 0.8, 3.6)
    panels = figure.subplots(1, len(at), squeeze=False, sharey=True)[0]
    for axes, others in zip(panels, at, strict=True):
        rates = landscape.rates([{**others, x: right, y: up} for up in axis for right in axis])
        scores = target.score(rates).view(points, points)
        box = (axis[0] - half, axis[-1] + half) * 2
        image = axes.imshow(scores.tolist(), origin="lower", extent=box, vmin=0, vmax=1, cmap="viridis", aspect="equal")
        axes.set(title=show(others) or "others at 0", xlabel=f"coefficient of {x}")
    panels[0].set_ylabel(f"coefficient of {y}")
    figure.suptitle(str(target), fontsize="medium")
    figure.colorbar(image, ax=list(panels), label="score")
    write_picture(figure, output)
    return figure


def plot_convergence(
    found: Mapping[str, Result | Sequence[float]], output: str | Path, best: float | None = None, within: float = 0.02
) -> Figure:
    """Best score after each evaluation, a curve a search (results or traces by label), evaluations on a log scale.

    `best`: the grid's score, drawn with a band of `within` below it.
    """
    figure = _figure(6, 4)
    axes = figure.subplots()
    if best is not None:
        axes.axhspan(best - within, best, color="0.85", label=f"within {within * 100:g} points of the grid's best")
    for label, entry in found.items():
        scores = entry.trace if isinstance(entry, Result) else entry
        points = [(i, score) for i, score in enumerate(scores, 1) if not math.isnan(score)]
        if points:
            axes.step(*zip(*points, strict=True), where="post", label=label)
    axes.set(xscale="log", xlabel="evaluations", ylabel="best score so far")
    axes.legend(frameon=False)
    write_picture(figure, output)
    return figure


def _figure(width: float, height: float) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise AlignvecError('pictures need matplotlib: pip install "alignvec[search]"') from None
    return Figure(figsize=(width, height), layout="constrained")
