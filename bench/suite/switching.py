"""Switching: what another mix costs, as k floats, as a merge on the device or from files, and as PEFT's adapter scales.

The clock "host" stops when the call returns, "device" when its work is done. On a CPU that is the same, one of them is
shown, and there are no CUDA graphs. A step begins with `publish`, the copy of what `set` wrote: that is what a graph of
a step holds, and the write is no part of one. PEFT's scales are Python numbers: a captured step does not follow them,
and to capture it again is not counted here.
"""

from __future__ import annotations

import importlib.util
import itertools
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
import transformers

import alignvec
from alignvec import Alignment, ops
from bench import opponents
from bench.record import Row
from bench.suite import models
from bench.suite.case import Case, Setting, median_of
from bench.suite.remerge import Remerge, store
from bench.timing import Call, host_samples, samples

VECTORS, ROWS = 3, 16
MIX = models.mixes(1, VECTORS)[0]
FORMATS = ("dense", "int4", "sign")
SET, PUBLISH, SWITCH, SET_ROWS = "set", "publish", "set, publish", f"set_rows, {ROWS} mixes"
ONE_PASS = {text: f"one-pass re-merge, {text}" for text in FORMATS}
MATERIALISE = "materialise, coefficients checked"
LOAD, FROM_FILES = "load a merged checkpoint", "merge base and vectors from files"
PEFT = "PEFT set_scale"
RATIO, TARGET = "one-pass re-merge, dense, over set, publish", 1000.0
CLOCKS = {"host": ("host", False), "device": ("device", False), "graph": ("device", True)}
WAYS: dict[str, tuple[str, ...]] = {
    SET: ("host",),
    PUBLISH: ("host", "device", "graph"),
    SWITCH: ("host", "device"),
    SET_ROWS: ("host",),
    **dict.fromkeys(
        (*ONE_PASS.values(), opponents.EXPRESSION, opponents.CHAIN, opponents.COMPILED), ("host", "device", "graph")
    ),
    MATERIALISE: ("device",),
    LOAD: ("device",),
    FROM_FILES: ("device",),
    PEFT: ("host",),
}
QUICK_CALLS = 10  # times as many samples of what takes microseconds
FILE_REPEATS = 3
LEAST = 3  # samples of what takes seconds


def cases(setting: Setting) -> list[Case]:
    """Each way by its clocks."""
    made = []
    for name, clocks in WAYS.items():
        for way in clocks if setting.kind == "cuda" or "device" not in clocks else ("device",):
            clock, graph = CLOCKS[way]
            said = {"k": VECTORS, "clock": clock, "graph": graph}
            made.append(Case("switching", name, said, missing=_missing(setting, name)))
    target = TARGET if setting.model != "tiny" else None
    return [*made, Case("switching", RATIO, {"k": VECTORS, "clock": "device"}, "x", "higher", target)]


def _missing(setting: Setting, name: str) -> str:
    if name == PEFT and importlib.util.find_spec("peft") is None:
        return "peft is not installed"
    if name == opponents.COMPILED and setting.kind == "cpu":
        return "compiling for a CPU takes longer than this section may"
    return ""


def measure(setting: Setting, cases: Sequence[Case]) -> Iterator[Row]:
    """Dense vectors and all that is compared with them, other formats, and PEFT's scales."""
    model = models.build(setting)
    rows: list[Row] = []
    for text in FORMATS:
        vectors = models.vectors(model, text, VECTORS)
        alignment = alignvec.attach(model, vectors, max_rows=ROWS)
        merge = Remerge(alignment, MIX)
        calls: dict[str, Call] = {ONE_PASS[text]: merge.one_pass}
        if text == "dense":
            rows += _timed(setting, cases, sets(alignment), QUICK_CALLS * setting.repeats)
            calls |= merge.by_torch()
        rows += _timed(setting, cases, calls, setting.repeats)
        yield from rows
        if text == "dense":
            of = {name: median_of(rows, name, clock="device", graph=False) for name in (ONE_PASS[text], SWITCH)}
            yield next(case for case in cases if case.name == RATIO).row([of[ONE_PASS[text]] / of[SWITCH]])
            with tempfile.TemporaryDirectory() as folder:
                yield from _from_files(setting, cases, merge, vectors, Path(folder))
        rows.clear()
        del merge, vectors, calls  # a GPU has no room for both copies of the weights
        if text == "dense":
            yield from _timed(setting, cases, {MATERIALISE: partial(alignment.materialise, MIX)}, setting.repeats)
        alignment.detach()
    if any(case.name == PEFT for case in cases):
        yield from _timed(setting, cases, {PEFT: set_scale(setting)}, QUICK_CALLS * setting.repeats)


def _timed(setting: Setting, cases: Sequence[Case], calls: Mapping[str, Call], repeats: int) -> Iterator[Row]:
    """The rows of those calls by each clock, side by side where a clock is the same."""
    for clock, graph in CLOCKS.values():
        said = {"k": VECTORS, "clock": clock, "graph": graph}
        own = {case.name: case for case in cases if case.name in calls and case.parameters == said}
        if clock == "host":
            taken = host_samples({name: calls[name] for name in own}, setting.device, repeats)
        else:
            taken = samples({name: [calls[name]] for name in own}, setting.device, repeats, graphs=graph, least=LEAST)
        yield from (case.row(taken[name]) for name, case in own.items())


def sets(alignment: Alignment) -> dict[str, Call]:
    """Writes of coefficients that change every time, and the copy that the next step begins with."""
    turn = itertools.count()
    several = itertools.cycle([models.mixes(ROWS, VECTORS), models.mixes(ROWS + 1, VECTORS)[:ROWS]])
    tables = alignment._coefficients
    (device,) = tables.devices
    staged, live = tables.staged(device), tables.live(device)

    def one() -> None:
        alignment.set(v1=1e-3 * (next(turn) % 1000), v2=0.3, v3=-0.2)

    def publish() -> None:
        ops.publish(staged.table, staged.rows, live.table, live.rows)

    def both() -> None:
        one()
        tables.end(tables.begin(None))

    return {SET: one, PUBLISH: publish, SWITCH: both, SET_ROWS: lambda: alignment.set_rows(next(several))}


def _from_files(
    setting: Setting,
    cases: Sequence[Case],
    merge: Remerge,
    vectors: Mapping[str, alignvec.AlignmentVector],
    folder: Path,
) -> Iterator[Row]:
    """Files that were just written, so that the page cache holds what it can: a disk itself is slower."""
    nbytes, free = models.parameter_bytes(merge.model), shutil.disk_usage(folder).free
    fits = {name: 1.1 * count * nbytes < free for name, count in ((LOAD, 1), (FROM_FILES, 1 + VECTORS))}
    for case in (case for case in cases if not fits.get(case.name, True)):
        yield case.skipped(f"its files do not fit in the {1e-9 * free:.0f} GB that are free in {folder.parent}")
    if not fits[LOAD]:
        return
    base, *others = store(folder, merge.model, vectors if fits[FROM_FILES] else {})
    calls: dict[str, Call] = {LOAD: partial(merge.load, base)}
    if fits[FROM_FILES]:
        calls[FROM_FILES] = partial(merge.from_files, base, tuple(others))
    yield from _timed(setting, cases, calls, FILE_REPEATS)


def set_scale(setting: Setting) -> Call:
    """New scales of as many LoRA adapters on every linear layer; no tensor takes part, so they are on no device."""
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora import LoraLayer

    config = models.config(setting)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
        lora = LoraConfig(r=64, target_modules="all-linear")
        adapted = get_peft_model(model, lora, adapter_name="v1", low_cpu_mem_usage=True)
        for name in list(MIX)[1:]:
            adapted.add_adapter(name, lora, low_cpu_mem_usage=True)
    layers = [module for module in adapted.modules() if isinstance(module, LoraLayer)]

    def call() -> None:
        for layer in layers:
            for name, scale in MIX.items():
                layer.set_scale(name, scale)

    return call
