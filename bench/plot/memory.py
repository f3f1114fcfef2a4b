"""Bytes over the number of mixes, a line for merged copies and for each format."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib import pyplot as plt
from matplotlib.ticker import FuncFormatter, NullFormatter

from bench.record import Row
from bench.suite.report import shown


def draw(rows: Sequence[Row], title: str) -> plt.Figure:
    figure, axis = plt.subplots(figsize=(8, 4.5))
    for name in dict.fromkeys(row["name"] for row in rows):
        own = [(row["parameters"]["mixes"], row["median"]) for row in rows if row["name"] == name]
        line = "s--" if name == "merged copies" else "o-"
        axis.plot(*zip(*own, strict=True), line, markersize=4, label=name)
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xticks(sorted({row["parameters"]["mixes"] for row in rows}))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: shown(value, "B")))
    axis.yaxis.set_minor_formatter(FuncFormatter(lambda value, _: shown(value, "B")))
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.tick_params(axis="y", which="both", labelsize=7)
    axis.set_xlabel("mixes")
    axis.set_title(title, fontsize=9)
    axis.grid(linewidth=0.3)
    axis.legend(fontsize=7)
    figure.tight_layout()
    return figure
