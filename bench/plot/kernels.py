"""The linear layers' times over those of merged weights."""

from __future__ import annotations

from typing import Any

from matplotlib import pyplot as plt
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from bench.record import Row


def draw(kept: Row) -> plt.Figure:
    """Time over the merged weights' for each number of tokens, with the range from p20 to p80 and the target."""
    totals = [row for row in kept["rows"] if row["shape"] == "all" and row["section"] in ("decode", "prefill")]
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in totals:
        groups.setdefault((row["tokens"], row["dtype"]), []).append(row)
    groups = dict(sorted(groups.items()))
    count, dtypes = len(groups), len({dtype for _, dtype in groups})
    columns = dtypes if dtypes > 1 else min(count, 3)  # dtypes side by side
    sizes = [len(own) for own in groups.values()]
    tall = [max(sizes[first : first + columns]) for first in range(0, count, columns)]
    heights = [0.2 * size + 1.2 for size in tall]
    figure, axes = plt.subplots(
        len(tall), columns, figsize=(6 * columns, sum(heights)), height_ratios=heights, squeeze=False
    )
    for axis in axes.flat[count:]:
        axis.remove()
    for number, (axis, ((tokens, dtype), own)) in enumerate(zip(axes.flat, groups.items(), strict=False)):
        merged = next(row["median_ms"] for row in own if row["way"] == "merged")
        others = [row for row in own if row["way"] != "merged"]
        for at, row in enumerate(others):
            median, low, high = (row[f"{key}_ms"] / merged for key in ("median", "p20", "p80"))
            axis.plot([low, high], [at, at], color="black", linewidth=1)
            axis.plot(median, at, "o", color="tab:blue" if row["way"] == "operator" else "tab:gray", markersize=5)
            axis.plot(row["floor_ms"] / merged, at, "|", color="tab:green", markersize=9, markeredgewidth=2)
            if row.get("target") is not None:
                axis.plot(row["target"], at, "|", color="tab:red", markersize=9, markeredgewidth=2)
        axis.set_yticks(range(len(others)), [_label(row) for row in others], fontsize=7)
        axis.axvline(1, color="black", linewidth=0.6)
        axis.set_ylim(tall[number // columns] - 0.5, -0.5)
        axis.grid(axis="y", linewidth=0.3)
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.set_title(f"{tokens} token{'s' * (tokens > 1)}, {dtype}; merged {1e3 * merged:.0f} us", fontsize=9)
        axis.set_xlabel("times merged (green: bytes at read bandwidth, red: target)", fontsize=7)
    figure.suptitle(f"{kept['device']}, torch {kept['versions']['torch']}, {kept['date'][:10]}", fontsize=10)
    figure.tight_layout(rect=(0, 0, 1, 0.99))
    return figure


def _label(row: Row) -> str:
    parts = [row["case"], f"{row['rows']} row{'s' * (row['rows'] > 1)}"]
    if row["section"] == "prefill" or row["precision"] != "exact":
        parts.append(f"{row['execution']} {row['precision']}")
    return ", ".join(parts)
