"""Micro: calls of microseconds on the tiny model, timed by pytest-benchmark in `bench/test_micro.py`.

`set`, `set_rows` and PEFT's scales are host work; where the device takes part a call waits for it.
"""

from __future__ import annotations

import importlib.util
import json
import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

import alignvec
from bench.layers import Contents, Shape, draw_coefficients, run
from bench.record import Row
from bench.suite import models, switching
from bench.suite.case import Case, Setting
from bench.suite.process import python
from bench.timing import Call

FORMATS = ("base only", "dense", "lossless:width=4", "int8", "int4", "sign", "low-rank:rank=16", "sparse:density=0.1")
VECTORS = 3
HOST = (switching.SET, switching.SET_ROWS, switching.PEFT)
DECODE = {text: f"decode qkv, {text}" for text in FORMATS}
DEVICE = "ALIGNVEC_BENCH_DEVICE"  # the environment variable that names it


def cases(setting: Setting) -> list[Case]:
    absent = "" if importlib.util.find_spec("peft") else "peft is not installed"
    names = (switching.SET, switching.SET_ROWS, switching.PUBLISH, switching.PEFT, *DECODE.values())
    own = {switching.PEFT: absent}
    return [Case("micro", name, {"k": 0 if "base" in name else VECTORS}, missing=own.get(name, "")) for name in names]


def call(setting: Setting, name: str) -> Call:
    """What a case times, without its waiting for the device."""
    if name == switching.PEFT:
        return switching.set_scale(setting)
    if name in DECODE.values():
        text = next(text for text, said in DECODE.items() if said == name)
        return _decode(setting, text)
    model = models.build(setting)
    alignment = alignvec.attach(model, models.vectors(model, "dense", VECTORS))
    return switching.sets(alignment)[name]


def _decode(setting: Setting, text: str) -> Call:
    """One token through q, k and v, three vectors, in one launch where kernels can."""
    config, contents = models.config(setting), Contents(setting.device)
    head = config.hidden_size // config.num_attention_heads
    outs = (config.hidden_size, *[config.num_key_value_heads * head] * 2)
    shape, dtype = Shape("qkv", outs, config.hidden_size), torch.bfloat16
    (weights,) = contents.weights(shape, dtype, 1)
    (vectors,) = contents.vectors(() if text == FORMATS[0] else (text,) * VECTORS, shape, dtype, 1)
    x = torch.ones(1, shape.inputs, dtype=dtype, device=setting.device)
    c = draw_coefficients(vectors[0], weights.projections[0], 1)
    return partial(run, x, weights.projections, vectors, c)


def measure(setting: Setting, cases: Sequence[Case]) -> Iterator[Row]:
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "micro.json"
        options = ["--benchmark-only", f"--benchmark-json={output}", "-q", "-p", "no:cacheprovider"]
        options.append(f"--benchmark-max-time={0.05 if setting.quick else 1}")
        python("pytest", "bench/test_micro.py", *options, **{DEVICE: setting.device})
        yield from rows(json.loads(output.read_text()), cases)


def rows(measured: dict[str, Any], cases: Sequence[Case]) -> Iterator[Row]:
    """The rows of pytest-benchmark's JSON, with all rounds as samples."""
    found = {each["extra_info"]["case"]: each["stats"]["data"] for each in measured["benchmarks"]}
    yield from (case.row(found[case.name]) for case in cases)
