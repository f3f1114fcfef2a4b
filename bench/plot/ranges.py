"""Rows as a dot at the median and a line from p20 to p80, one below the other."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, NullFormatter

from bench.record import Row
from bench.suite.report import shown


def ranges(axis: Axes, rows: Sequence[Row], labels: Sequence[str], colours: Sequence[str]) -> None:
    """Draw rows of one unit on a logarithmic axis; a target is a red mark."""
    for at, (row, colour) in enumerate(zip(rows, colours, strict=True)):
        axis.plot([row["p20"], row["p80"]], [at, at], color="black", linewidth=1)
        axis.plot(row["median"], at, "o", color=colour, markersize=5)
        axis.annotate(
            shown(row["median"], row["unit"]), (row["median"], at), (6, 0), textcoords="offset points", fontsize=7
        )
        if row["target"] is not None:
            axis.plot(row["target"], at, "|", color="tab:red", markersize=9, markeredgewidth=2)
    axis.set_yticks(range(len(rows)), labels, fontsize=7)
    axis.set_ylim(len(rows) - 0.5, -0.5)
    axis.grid(axis="y", linewidth=0.3)
    axis.set_xscale("log")
    axis.margins(x=0.15)
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: shown(value, rows[0]["unit"])))
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.tick_params(axis="x", labelsize=7)
