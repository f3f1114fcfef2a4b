"""What another mix costs, a line for each way and clock."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib import pyplot as plt

from bench.plot.ranges import ranges
from bench.record import Row

COLOURS = {("host", False): "tab:gray", ("device", False): "tab:blue", ("device", True): "tab:green"}


def draw(rows: Sequence[Row], title: str) -> plt.Figure:
    times = sorted((row for row in rows if row["unit"] == "s"), key=lambda row: row["median"])
    clocks = [(row["parameters"]["clock"], row["parameters"]["graph"]) for row in times]
    labels = [f"{row['name']} ({clock}{', graph' * graph})" for row, (clock, graph) in zip(times, clocks, strict=True)]
    figure, axis = plt.subplots(figsize=(9, 0.22 * len(times) + 1.4))
    ranges(axis, times, labels, [COLOURS[clock] for clock in clocks])
    axis.set_xlabel("time of a switch", fontsize=8)
    axis.set_title(title, fontsize=9)
    figure.tight_layout()
    return figure
