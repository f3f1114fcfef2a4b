"""Decode: seconds of a step over the batch, throughput, and where a re-merge a switch overtakes vectors on the fly."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter

from bench.record import Row
from bench.suite import decode
from bench.suite.breakeven import MEASURED, ONE_PASS, PLANNED, TOKENS
from bench.suite.case import median_of
from bench.suite.report import shown

SERVED = [1 << n for n in range(11)]  # tokens that a mix serves before the next


def draw(rows: Sequence[Row], title: str) -> plt.Figure:
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(15, 5))
    for name, colour in zip(
        (decode.MERGED, decode.BASE, *decode.FORMATS), plt.rcParams["axes.prop_cycle"].by_key()["color"], strict=False
    ):
        k = 0 if name == decode.MERGED else decode.K
        seconds = _steps(rows, name, k)
        if not seconds:
            continue
        line = "s--" if name == decode.MERGED else "o-"
        left.plot(list(seconds), list(seconds.values()), line, color=colour, markersize=4, label=name)
        rates = [batch / value for batch, value in seconds.items()]
        middle.plot(list(seconds), rates, line, color=colour, markersize=4, label=name)
        merged = median_of(rows, decode.MERGED, loop=decode.DECODER, batch=1)
        merge = median_of(rows, f"{ONE_PASS}, {name}")
        if merge is not None and merged is not None and 1 in seconds:
            right.plot(SERVED, [merge / n + merged for n in SERVED], "--", color=colour, linewidth=1)
            right.axhline(seconds[1], color=colour, linewidth=1, label=name)
            for by, mark in ((MEASURED, "o"), (PLANNED, "x")):
                at = median_of(rows, TOKENS, format=name, by=by)
                if at is not None:
                    right.plot(at, seconds[1], mark, color=colour, markersize=6)
    _axis(left, "s", "sequences, each with its own mix (merged: one for all)", "a step")
    _axis(middle, "tokens/s", "sequences", "tokens a second")
    _axis(
        right,
        "s",
        "tokens served by a mix; dashed: merged again for each;\no measured, x by the cost model",
        "a token, one sequence",
    )
    figure.suptitle(title, fontsize=9)
    figure.tight_layout()
    return figure


def _steps(rows: Sequence[Row], name: str, k: int) -> dict[int, float]:
    """Seconds of a step in alignvec's decoder by batch, every sequence with its own mix where it can have one."""
    found = {}
    for batch in sorted({row["parameters"]["batch"] for row in rows if "batch" in row["parameters"]}):
        mixes = "uniform" if batch == 1 or name == decode.MERGED else "distinct"
        value = median_of(rows, name, k=k, batch=batch, mixes=mixes, loop=decode.DECODER)
        if value is not None:
            found[batch] = value
    return found


def _axis(axis: Axes, unit: str, below: str, beside: str) -> None:
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: shown(value, unit)))
    axis.yaxis.set_minor_formatter(FuncFormatter(lambda value, _: shown(value, unit)))
    axis.tick_params(which="both", labelsize=7)
    axis.set_xlabel(below, fontsize=8)
    axis.set_ylabel(beside, fontsize=8)
    axis.grid(linewidth=0.3)
    axis.legend(fontsize=7)
