"""Kernels: the sums over a model's linear layers that `bench.kernels` measures, and its re-merges.

`bench.kernels` runs as it does alone; the setting's model plays no part. On a GPU its own file in bench/results is
written, too, which has every shape; a CPU, where all of it takes longer than the whole suite may, measures what
`--quick` does. Ratios are shown where they have a target.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from bench import cases as table
from bench import opponents, record
from bench.record import Row
from bench.suite.case import Case, Setting
from bench.suite.process import python

SHOWN = ("tokens", "rows", "dtype", "execution", "precision", "way")
RATIO, SPEEDUP, SHARE = "times merged", f"speed, times {opponents.CHAIN}", "share of the read bandwidth"


def cases(setting: Setting) -> list[Case]:
    made, quick = [], _quick(setting)
    for tokens in (table.QUICK if quick else table.TOKENS)[setting.kind]:
        for case in table.cases(setting.kind, tokens, quick):
            said = {key: getattr(case, key) for key in SHOWN}
            made.append(Case("kernels", case.name, said))
            if case.target is not None:
                made.append(Case("kernels", f"{case.name}, {RATIO}", said, "x", "lower", case.target))
    ways = [name for name, own in table.FORMATS.items() if own and (name == "dense" or not quick)]
    ways += [opponents.EXPRESSION, opponents.CHAIN, *([opponents.COMPILED] if setting.kind == "cuda" else [])]
    made += [Case("kernels", f"re-merge, {name}", {"dtype": "bfloat16"}) for name in ways]
    figure, target = (SHARE, table.REMERGE) if setting.kind == "cuda" else (SPEEDUP, table.REMERGE_CPU)
    return [*made, Case("kernels", f"re-merge, dense, {figure}", {"dtype": "bfloat16"}, "x", "higher", target)]


def measure(setting: Setting, cases: Sequence[Case]) -> Iterator[Row]:
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "kernels.json" if _quick(setting) else record.results_file("kernels", setting.device)
        quick = ["--quick"] if _quick(setting) else []
        python("bench.kernels", "--device", setting.device, "--output", str(output), *quick)
        kept = record.read(output)
    yield from rows(kept["rows"], cases)


def _quick(setting: Setting) -> bool:
    return setting.quick or setting.kind == "cpu"


def rows(measured: Sequence[Row], cases: Sequence[Case]) -> Iterator[Row]:
    """The rows of `bench.kernels` that are sums over all layers, as those of the suite."""
    found = {}
    for total in measured:
        if total["shape"] == "all" and total["section"] != "set":
            again = total["section"] == "re-merge"
            name = f"re-merge, {total['case']}" if again else total["case"]
            said = {"dtype": total["dtype"]} if again else {key: total[key] for key in SHOWN}
            for figure, spread in _figures(total).items():
                found[f"{name}, {figure}" if figure else name, *said.values()] = spread
    for case in cases:
        yield case.row([0.0]) | found[case.name, *case.parameters.values()]


def _figures(total: Row) -> dict[str, Row]:
    """The time in seconds, and what it is compared with; of a speed p20 is that of the slow calls."""
    times = [total[f"{key}_ms"] for key in ("p20", "median", "p80")]
    figures = {"": [1e-3 * time for time in times]}
    if "ratio" in total:
        figures[RATIO] = [total["ratio"] * time / times[1] for time in times]
    for name, key in ((SPEEDUP, "speedup"), (SHARE, "share_of_floor")):
        if key in total:
            figures[name] = [total[key] * times[1] / time for time in reversed(times)]
    return {
        name: dict(zip(("p20", "median", "p80"), values, strict=True)) | {"samples": total["samples"]}
        for name, values in figures.items()
    }
