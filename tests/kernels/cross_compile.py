"""Compiles the Triton kernels for GPUs that need not be there and prints what each takes, one JSON object a line.

Run as `python -m tests.kernels.cross_compile [part of a case's name/target]`, without TRITON_INTERPRET: in the
interpreter there is no compiler. A case calls a kernel's host function on tensors of the meta device. What it would
launch is recorded and compiled just as the launcher would specialise it: unit strides, alignment, absent tensors.
"""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# A first operand in registers: accumulators in braces, and then braces again where a descriptor would be.
REGISTER_OPERAND = r"wgmma\.mma_async\.sync[^;{]*\{[^}]*\}\s*,\s*\{"
MATRIX = {"cuda": r"(wgmma\.mma|tcgen05\.mma|mma\.sync)", "hip": r"(v_mfma|v_fma_f32|v_pk_fma_f32)"}
WIDE = {  # accesses to global memory of 16 bytes
    "cuda": r"(?:ld|st)\.global\S*\.v(?:4\.b32|2\.b64)|cp\.async\.cg\.shared\.global",
    "hip": r"(?:global|buffer)_(?:load|store)_dwordx4",
}


@dataclasses.dataclass(frozen=True)
class Case:
    """`call` launches kernels on meta tensors for a target. Budgets: registers a thread; `matrix`: the products' size.

    matrix "large": wgmma on Hopper, tcgen05 on Blackwell; "small": mma.sync; on AMD v_mfma for either; "": none needed.
    spills: stack accesses. A few are the assembler's price for one more block on a multiprocessor, at 128 or 168
    registers; a tile that does not fit has hundreds.
    """

    name: str
    call: Callable[[str], Any]
    registers: int = 255
    matrix: str = ""
    spills: int = 8


class Launch(NamedTuple):
    kernel: JITFunction
    arguments: tuple[Any, ...]
    options: dict[str, Any]


def launches(call: Callable[[], Any]) -> list[Launch]:
    """The launches that `call` makes, none of which is carried out."""
    made: list[Launch] = []

    def record(kernel: JITFunction, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        made.append(Launch(kernel, arguments, options))

    with mock.patch.object(JITFunction, "run", record):
        call()
    return made


def compile_case(kernel: JITFunction, arguments: tuple[Any, ...], options: dict[str, Any], target: str) -> dict:
    """What the compiler makes of `kernel[...](*arguments, **options)` on a target."""
    gpu = TARGETS[target]
    backend = make_backend(gpu)
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    parsed, signature, constants, attributes = kernel._pack_args(backend, options, *binder(*arguments, **options))
    source = ASTSource(kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=gpu, options=parsed.__dict__)
    return {"kernel": kernel.__name__, "target": target, **_measure(compiled, gpu.backend)}


def rows(cases: list[Case], wanted: str = "") -> Iterator[dict[str, Any]]:
    for case in cases:
        for target in TARGETS:
            if wanted in f"{case.name}/{target}":
                for launch in launches(lambda case=case, target=target: case.call(target)):
                    blocks = {k: v for k, v in launch.options.items() if k.startswith("BLOCK")}
                    yield {"case": case.name, **blocks, **compile_case(*launch, target)}


def _measure(compiled: CompiledKernel, backend: str) -> dict[str, Any]:
    metadata = compiled.metadata
    row = {"num_warps": metadata.num_warps, "num_stages": metadata.num_stages, "shared": metadata.shared}
    if backend == "cuda":
        text = compiled.asm["ptx"]
        row |= _cubin(compiled.asm["cubin"])
    else:
        text = compiled.asm["amdgcn"]
        numbers = {key: int(re.search(rf"\.{key}:\s+(\d+)", text)[1]) for key in ("vgpr_count", "vgpr_spill_count")}
        row |= {"registers": numbers["vgpr_count"], "spills": numbers["vgpr_spill_count"]}
    wide = len(re.findall(WIDE[backend], text))
    row["register_operand"] = bool(re.search(REGISTER_OPERAND, text))
    return row | {"matrix": sorted(set(re.findall(MATRIX[backend], text))), "wide": wide}


def _cubin(cubin: bytes) -> dict[str, Any]:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, sass = (
            subprocess.run([tool, flag, file.name], capture_output=True, text=True, check=True).stdout
            for flag in ("-res-usage", "-sass")
        )
    # Spills are stack accesses: loads and stores of local memory.
    return {"registers": int(re.search(r"REG:(\d+)", usage)[1]), "spills": len(re.findall(r"\b(?:LDL|STL)\b", sass))}


if __name__ == "__main__":
    from tests.kernels import compile_linear, compile_small, compile_step

    cases = compile_linear.CASES + compile_small.CASES + compile_step.CASES
    for row in rows(cases, sys.argv[1] if len(sys.argv) > 1 else ""):
        print(json.dumps(row), flush=True)
