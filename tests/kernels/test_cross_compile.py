"""What the compiler makes of the kernels for GPUs that need not be there: registers, spills, shared memory and more.

`pytest -s` shows the table. The numbers belong to a version of Triton: budgets hold for the one in constraints.txt.
"""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import triton
from rich.console import Console
from rich.table import Table

from tests.kernels import compile_linear, compile_small, compile_step

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
CASES = {case.name: case for case in compile_linear.CASES + compile_small.CASES + compile_step.CASES}

# Shared memory of a block: a consumer GPU's limit, half of a Hopper's or Blackwell's multiprocessor, a CDNA3's limit.
SHARED = {"sm_80": 99 << 10, "sm_90": 113 << 10, "sm_100": 113 << 10, "gfx942": 64 << 10}
LARGE = {"sm_80": "mma.sync", "sm_90": "wgmma.mma", "sm_100": "tcgen05.mma", "gfx942": "v_mfma"}
ADDING = ("sum_kernel", "attention_sum_kernel")  # parts of products
READING = ("materialise_kernel", "norm_kernel", "embedding_kernel", "attention_kernel", "gate_kernel")
SMALL = dict.fromkeys(SHARED, "mma.sync") | {"gfx942": "v_mfma"}


def compile_all(target):
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.kernels.cross_compile", f"/{target}"]
    run = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    return [json.loads(line) for line in run.stdout.splitlines()]


@pytest.fixture(scope="module")
def measured():
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # a process for each target
        rows = [row for compiled in pool.map(compile_all, SHARED) for row in compiled]
    keys = ("num_warps", "num_stages", "registers", "spills", "shared", "wide")
    table = Table("case", "kernel", "target", "tile", *keys, "matrix")
    for r in rows:
        tile = "x".join(str(value) for key, value in r.items() if key.startswith("BLOCK"))
        numbers = (str(r[key]) for key in keys)
        table.add_row(r["case"], r["kernel"], r["target"], tile, *numbers, " ".join(r["matrix"]))
    Console(width=150).print(table)
    return rows


def test_every_case_compiled_for_every_target(measured):
    assert {(row["case"], row["target"]) for row in measured} == {(name, t) for name in CASES for t in SHARED}


@pytest.mark.skipif(not triton.__version__.startswith("3.7."), reason="the budgets are those of Triton 3.7")
@pytest.mark.parametrize("target", SHARED)
def test_budgets(measured, target):
    over = []
    for row in (row for row in measured if row["target"] == target):
        case = CASES[row["case"]]
        needed = {"large": LARGE, "small": SMALL}.get(case.matrix, {}).get(target)
        fine = (
            row["spills"] <= case.spills
            and row["registers"] <= case.registers
            and row["shared"] <= SHARED[target]
            and not row["register_operand"]  # of wgmma: triton-lang/triton#9433
            and (needed is None or needed in row["matrix"] or row["kernel"] in ADDING)
        )
        if not fine:
            over.append(row)
    assert not over, "\n".join(map(json.dumps, over))


def test_memory_is_read_16_bytes_at_a_time(measured):
    rows = [row for row in measured if row["kernel"] in READING]
    assert rows
    # AMD's waves are of 64 threads, for which not every tile has 16 bytes each.
    assert all(row["wide"] for row in rows if row["target"] != "gfx942" or row["case"] == "materialise-dense-k3")
