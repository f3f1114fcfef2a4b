"""The micro level of the suite: `python -m pytest bench/test_micro.py --benchmark-only`."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

from bench.suite import micro
from bench.suite.case import Case, Setting

SETTING = Setting("tiny", os.environ.get(micro.DEVICE, "cuda" if torch.cuda.is_available() else "cpu"))


@pytest.mark.parametrize("case", micro.cases(SETTING), ids=lambda case: case.name)
def test_micro(benchmark: Any, case: Case) -> None:
    if case.missing:
        pytest.skip(case.missing)
    call = micro.call(SETTING, case.name)
    benchmark.extra_info["case"] = case.name
    if SETTING.kind == "cuda" and case.name not in micro.HOST:
        benchmark(lambda: (call(), torch.cuda.synchronize()))
    else:
        benchmark(call)
