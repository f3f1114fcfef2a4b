"""What the compiler makes of the kernels for GPUs that need not be there: registers, spills, shared memory and more.

`pytest -s` shows the table. The numbers belong to a version of Triton: budgets hold for the one in constraints.txt.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import triton
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[2]

# Shared memory of a block: a consumer GPU's limit, half of a Hopper's or Blackwell's multiprocessor, a CDNA3's limit.
SHARED = {"sm_80": 99 << 10, "sm_90": 113 << 10, "sm_100": 113 << 10, "gfx942": 64 << 10}
# Registers a thread, by rows of the tile: three blocks of 128 threads at least run together while decoding.
REGISTERS = {16: 160}


def _matrix_instruction(case: str, target: str, block_m: int) -> set[str]:
    """What must carry the products. Float32 products are exact on the ordinary units of an NVIDIA GPU only."""
    if target == "gfx942":
        return {"v_mfma"}
    if "-float32" in case and "delta" not in case:
        return set()
    if target == "sm_80" or block_m < 64:
        return {"mma.sync"}
    return {"wgmma.mma"} if target == "sm_90" else {"tcgen05.mma"}


@pytest.fixture(scope="module")
def measured():
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.kernels.cross_compile"]
    run = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    rows = [json.loads(line) for line in run.stdout.splitlines()]
    table = Table("case", "target", "tile", "warps", "stages", "split_k", "registers", "spills", "shared", "matrix")
    for r in rows:
        tile = f"{r['block_m']}x{r['block_n']}x{r['block_k']}"
        numbers = (r[key] for key in ("num_warps", "num_stages", "split_k", "registers", "spills", "shared"))
        table.add_row(r["case"], r["target"], tile, *map(str, numbers), " ".join(r["matrix"]))
    Console(width=150).print(table)
    return rows


def test_every_case_compiled_for_every_target(measured):
    targets = {row["target"] for row in measured}
    assert targets == set(SHARED)
    assert len(measured) == len({row["case"] for row in measured}) * len(targets)


@pytest.mark.skipif(not triton.__version__.startswith("3.7."), reason="the budgets are those of Triton 3.7")
@pytest.mark.parametrize("target", SHARED)
def test_budgets(measured, target):
    over = []
    for row in (row for row in measured if row["target"] == target):
        needed = _matrix_instruction(row["case"], target, row["block_m"])
        fine = (
            row["spills"] == 0
            and row["registers"] <= REGISTERS.get(row["block_m"], 255)
            and row["shared"] <= SHARED[target]
            and needed <= set(row["matrix"])
            and not row.get("register_operand")  # wgmma with a first operand in registers: triton-lang/triton#9433
        )
        if not fine:
            over.append(row)
    assert not over
