"""Prompting: the time of a request without its instruction, as a share of that with it; dotted: half."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib import pyplot as plt
from matplotlib.ticker import FuncFormatter

from bench.record import Row
from bench.suite import prompting


def draw(rows: Sequence[Row], title: str) -> plt.Figure:
    ratios = [row["parameters"] | {"ratio": row["median"]} for row in rows if row["name"] == prompting.RATIO]
    panels = sorted({(row["cached"], row["turns"]) for row in ratios})
    figure, axes = plt.subplots(1, len(panels), figsize=(3.6 * len(panels), 4.2), sharey=True, squeeze=False)
    for axis, (cached, turns) in zip(axes[0], panels, strict=True):
        own = [row for row in ratios if (row["cached"], row["turns"]) == (cached, turns)]
        for way, answer, k in dict.fromkeys((row["way"], row["answer"], row["preferences"]) for row in own):
            some = [row for row in own if (row["way"], row["answer"], row["preferences"]) == (way, answer, k)]
            points = sorted((row["instruction"], row["ratio"]) for row in some)
            label = f"{way}, {k} preference{'s' * (k > 1)}, answers of {answer}"
            axis.plot(*zip(*points, strict=True), "o-" if k == 1 else "s--", markersize=3, label=label)
        axis.axhline(prompting.CLAIM, color="black", linestyle=":", linewidth=1)
        axis.axhline(1, color="black", linewidth=0.5)
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_title(f"{turns} turn{'s' * (turns > 1)}, {'prefix kept' if cached else 'nothing kept'}", fontsize=8)
        axis.set_xlabel("tokens of the instruction for a preference", fontsize=8)
        axis.tick_params(labelsize=7)
        axis.grid(linewidth=0.3)
    axes[0][0].set_ylabel("times a request with instructions", fontsize=8)
    axes[0][0].legend(fontsize=6)
    figure.suptitle(title, fontsize=9)
    figure.tight_layout()
    return figure
