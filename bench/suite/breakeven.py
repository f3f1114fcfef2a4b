"""Where merged weights overtake vectors on the fly, and the other way round: by measured rows, and by the cost model.

A mix that serves n tokens costs, merged again for it, `merge / n + merged`; on the fly it costs its own step. They meet
at n = merge / (on the fly - merged). A batch of m mixes costs m steps of merged copies, or one of its own on the fly.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import alignvec
from alignvec import Alignment
from alignvec.planner import cost
from bench.record import Row
from bench.suite.case import Case, Setting, median_of

ONE_PASS = "one-pass re-merge"
TOKENS, MIXES = "break-even, tokens a switch", "break-even, mixes of a batch"
MEASURED, PLANNED = "measured", "cost model"


@dataclass(frozen=True)
class Figures:
    """What the planner's cost model says of all linear layers, in seconds.

    merge: one pass that writes a mix; None where it has none (CPUs). merged: a token by the vendor's product. fly: a
    step on the fly by the number of rows, each with its own mix.
    """

    merge: float | None
    merged: float
    fly: Mapping[int, float]


def figures(alignment: Alignment, rows: int) -> Figures:
    """The cost model's figures for the vectors that are attached, up to so many rows."""
    fly = {}
    for count in (1 << n for n in range(rows.bit_length())):
        plans = alignvec.plan(alignment, tokens=count, rows=count, precision="merged")
        fly[count] = sum(plan.layers * cost.corrected(plan.problem, "split").seconds for plan in plans)
    plans = alignvec.plan(alignment, tokens=1, rows=1, precision="merged")
    passes = [cost.materialise(plan.problem) for plan in plans]
    plain = [cost.corrected(replace(plan.problem, vectors=()), "split").seconds for plan in plans]
    each = [(own, once or (0.0, base)) for own, once, base in zip(plans, passes, plain, strict=True)]
    merged = sum(plan.layers * call for plan, (_, call) in each)
    return Figures(None if None in passes else sum(plan.layers * once for plan, (once, _) in each), merged, fly)


def cases(setting: Setting, formats: Sequence[str], k: int) -> list[Case]:
    made = []
    for text in formats:
        for by in (MEASURED, PLANNED):
            missing = "the cost model has no re-merge on a CPU" if by == PLANNED and setting.kind == "cpu" else ""
            made.append(Case("decode", TOKENS, {"format": text, "k": k, "by": by}, "tokens", missing=missing))
            made.append(Case("decode", MIXES, {"format": text, "k": k, "by": by}, "mixes"))
    return made


def rows(cases: Sequence[Case], measured: Sequence[Row], planned: Mapping[str, Figures], copies: str) -> list[Row]:
    """The rows of `cases`, from those of decode in alignvec's decoder and the cost model's figures by format."""
    made = []
    for case in (case for case in cases if case.name in (TOKENS, MIXES)):
        text, k = case.parameters["format"], case.parameters["k"]
        found = _measured(measured, text, k) if case.parameters["by"] == MEASURED else planned.get(text)
        if found is None or (case.name == TOKENS and found.merge is None):
            made.append(case.skipped("what it follows from was not measured"))
        elif case.name == TOKENS:
            made.append(_tokens(case, found))
        else:
            made.append(_mixes(case, found, copies))
    return made


def _measured(rows: Sequence[Row], text: str, k: int) -> Figures | None:
    merged = median_of(rows, "merged", batch=1, loop="decoder")
    own = [row for row in rows if row["name"] == text and row["parameters"]["k"] == k and row["median"] is not None]
    own = [row for row in own if row["parameters"]["loop"] == "decoder" and row["unit"] == "s"]
    fly = {row["parameters"]["batch"]: row["median"] for row in own if row["parameters"]["mixes"] == "distinct"}
    single = median_of(own, text, batch=1)
    if merged is None or single is None:
        return None
    return Figures(median_of(rows, f"{ONE_PASS}, {text}", k=k), merged, {1: single, **fly})


def _tokens(case: Case, found: Figures) -> Row:
    lost = found.fly[1] - found.merged
    assert found.merge is not None
    return case.row([found.merge / lost]) if lost > 0 else case.skipped("on the fly is no slower than merged")


def _mixes(case: Case, found: Figures, copies: str) -> Row:
    """Where the line between two batches crosses that of as many steps of one row on merged copies."""
    counts = sorted(found.fly)
    gaps = [(count, found.fly[count] - count * found.merged) for count in counts]
    if gaps[0][1] <= 0:
        return case.row([1.0])
    for (low, above), (high, below) in itertools.pairwise(gaps):
        if below <= 0:
            return case.row([low + (high - low) * above / (above - below)])
    return case.skipped(f"up to {counts[-1]} mixes, {copies} are faster")
