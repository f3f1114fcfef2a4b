"""Blend: a step of several policies, in one batch and one after another, times that of one policy."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib import pyplot as plt

from bench.record import Row
from bench.suite import blend
from bench.suite.case import median_of

WAYS = {blend.BLEND: "o-", blend.SEPARATE: "s--", blend.MODELS: "^:"}


def draw(rows: Sequence[Row], title: str) -> plt.Figure:
    figure, axes = plt.subplots(1, len(blend.FORMATS), figsize=(4 * len(blend.FORMATS), 4), sharey=True)
    for axis, text in zip(axes, blend.FORMATS, strict=True):
        one = median_of(rows, blend.ONE, format=text, prompts=1)
        for name, line in WAYS.items():
            values = {n: median_of(rows, name, format=text, prompts=1, policies=n) for n in blend.POLICIES}
            points = [(1, 1.0)] + [(n, value / one) for n, value in values.items() if value is not None and one]
            axis.plot(*zip(*points, strict=True), line, markersize=4, label=name)
        axis.set_title(text, fontsize=8)
        axis.set_xlabel("policies", fontsize=8)
        axis.set_xticks([1, *blend.POLICIES])
        axis.grid(linewidth=0.3)
        axis.tick_params(labelsize=7)
    axes[0].set_ylabel("times a step of one policy", fontsize=8)
    axes[0].legend(fontsize=7)
    figure.suptitle(title, fontsize=9)
    figure.tight_layout()
    return figure
