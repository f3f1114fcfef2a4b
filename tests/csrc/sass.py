"""Compiles csrc/cuda for GPUs that need not be there and reads what the assembler made of it.

`python -m tests.csrc.sass` prints a line a kernel: registers a thread, instructions that multiply a stage of the base,
instructions that each vector adds. A stage is, for a warp, 16 outputs and 128 inputs.
"""

from __future__ import annotations

import dataclasses
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

SOURCES = Path(__file__).parents[2] / "csrc" / "cuda"
TARGETS = ("sm_80", "sm_90a", "sm_100")
FILES = ("plain", "sign", "int4", "int8", "lossless")
PIECES = 8  # products of 16 inputs that a warp makes of a stage, for each 8 tokens
NAME = re.compile(r"StorageILi(\d+)ELi(\d+)ELb([01])ELi(\d+)EEELi(\d)E")


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One kernel on one target. vectors: in a stream at most; tiles: of 8 tokens.

    stage: instructions of the stage loop beside the vectors' products, copies of all kinds among them, each branch
    counted once. each: those that one vector's product adds.
    """

    name: str
    target: str
    vectors: int
    tiles: int
    registers: int
    spills: int
    stage: int
    each: int
    opcodes: Counter[str]
    wide_copies: int


def nvcc() -> str | None:
    return shutil.which("nvcc")


def disassembler() -> str | None:
    spec = find_spec("triton")
    own = Path(spec.origin).parent / "backends/nvidia/bin/cuobjdump" if spec and spec.origin else None
    return str(own) if own and own.exists() else shutil.which("cuobjdump")


def kernels() -> list[Kernel]:
    """Every kernel on every target."""
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as pool:
        jobs = [(file, target, Path(folder) / f"{file}.{target}.cubin") for file in FILES for target in TARGETS]
        return [kernel for found in pool.map(lambda job: _compile(*job), jobs) for kernel in found]


def _compile(file: str, target: str, cubin: Path) -> list[Kernel]:
    options = ["-O3", "-std=c++17", f"-arch={target}", "-cubin", "-Werror", "all-warnings"]
    run = subprocess.run(
        [nvcc(), *options, str(SOURCES / f"{file}.cu"), "-o", str(cubin)], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    usage, sass = (
        subprocess.run([disassembler(), flag, str(cubin)], capture_output=True, text=True, check=True).stdout
        for flag in ("-res-usage", "-sass")
    )
    registers = {name: int(used) for name, used in re.findall(r"Function (\S+):\s+REG:(\d+)", usage)}
    return [_measure(file, target, text, registers) for text in sass.split("Function : ")[1:]]


def _measure(file: str, target: str, text: str, registers: dict[str, int]) -> Kernel:
    name = text.split("\n", 1)[0].strip()
    bits, flush, _, vectors, tiles = map(int, NAME.search(name).groups())
    code = [(int(at, 16), line) for at, line in re.findall(r"/\*([0-9a-f]{4,5})\*/\s+([^;]*);", text)]
    opcodes = Counter(_opcode(line) for _, line in code)
    products = PIECES * tiles
    loop = _stage_loop(code, products * (1 + vectors))
    ends = [i for i, line in enumerate(loop) if _opcode(line) == "HMMA"]
    # From the last product of one vector to the last of the next: the third's, past what the first one prepares.
    each = ends[4 * products - 1] - ends[3 * products - 1] if vectors else 0
    return Kernel(
        name=f"{file}{f'-group{flush}' if flush else ''}" + (f"-{bits}bits" if file == "lossless" else ""),
        target=target,
        vectors=vectors,
        tiles=tiles,
        registers=registers[name],
        spills=opcodes["LDL"] + opcodes["STL"],
        stage=len(loop) - vectors * each,
        each=each,
        opcodes=opcodes,
        wide_copies=len(re.findall(r"LDGSTS\.E\.BYPASS\.LTC128B\.128", text)),
    )


def _opcode(line: str) -> str:
    return re.sub(r"^@!?U?P\w+\s+", "", line.strip()).split()[0].split(".")[0]


def _stage_loop(code: list[tuple[int, str]], products: int) -> list[str]:
    """The smallest loop with all products: from the target of a branch backwards to the branch."""
    found: list[list[str]] = []
    for at, line in code:
        target = re.search(r"\bBRA\S*\s.*?0x([0-9a-f]+)", line)
        if target and int(target[1], 16) < at:
            body = [other for where, other in code if int(target[1], 16) <= where <= at]
            if sum(_opcode(other) == "HMMA" for other in body) == products:
                found.append(body)
    assert found, "no loop has the products of a stage"
    return min(found, key=len)


if __name__ == "__main__":
    for k in kernels():
        print(f"{k.target:7} {k.name:16} x{k.vectors} {8 * k.tiles:2} tokens  {k.registers:3} registers", end="  ")
        print(f"{k.spills} spills  stage {k.stage}  each vector {k.each}")
