"""Time and peak memory of every way to extract and to merge."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib import pyplot as plt

from bench.plot.ranges import ranges
from bench.record import Row


def draw(rows: Sequence[Row], title: str) -> plt.Figure:
    figure, axes = plt.subplots(1, 2, figsize=(11, 3.5))
    for axis, wanted in zip(axes, ("time", "peak memory"), strict=True):
        own = [row for row in rows if row["parameters"]["figure"] == wanted]
        colours = ["tab:gray" if "loop" in row["name"] or "alone" in row["name"] else "tab:blue" for row in own]
        ranges(axis, own, [row["name"] for row in own], colours)
        axis.set_xlabel(wanted, fontsize=8)
    figure.suptitle(title, fontsize=9)
    figure.tight_layout()
    return figure
