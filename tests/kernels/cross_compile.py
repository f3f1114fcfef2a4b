"""Compiles the Triton kernels for GPUs that need not be there and prints what each takes, one JSON object a line.

Run as `python -m tests.kernels.cross_compile`, without TRITON_INTERPRET: in the interpreter there is no compiler.
"""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from alignvec.kernels import dense

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}


@dataclasses.dataclass(frozen=True)
class Case:
    """One launch as `dense.linear` makes it, on Mistral-7B's fused gate and up projection unless told otherwise."""

    execution: str
    tokens: int
    k: int
    dtype: torch.dtype = torch.bfloat16
    delta: torch.dtype | None = None
    merged: bool = False
    token_rows: bool = False
    bias: bool = False
    transposed: bool = False
    out_features: int = 28672
    in_features: int = 4096

    @property
    def name(self) -> str:
        parts = [self.execution, f"m{self.tokens}", f"k{self.k}", str(self.dtype).removeprefix("torch.")]
        parts += [f"delta-{str(self.delta).removeprefix('torch.')}"] if self.delta else []
        return "-".join(
            parts + [flag for flag in ("merged", "token_rows", "bias", "transposed") if getattr(self, flag)]
        )


CASES = [
    Case("split", 16, 3, out_features=1024),
    Case("split", 16, 3, delta=torch.float32, bias=True),
    Case("split", 16, 16, token_rows=True),
    Case("split", 64, 8, bias=True, transposed=True),
    Case("split", 16, 3, torch.float16, delta=torch.float32),
    Case("split", 16, 3, torch.float32),
    Case("split", 2048, 1),
    Case("combine", 2048, 3),
    Case("combine", 2048, 3, merged=True, bias=True),
    Case("combine", 2048, 16, token_rows=True),
    Case("combine", 2048, 3, torch.float16),
    Case("combine", 2048, 3, torch.float32),
    Case("combine", 2048, 3, delta=torch.float16),
]


def source(case: Case, target: str) -> tuple[ASTSource, dense.Config]:
    """What the launcher would specialise `case` to: absent tensors, unit strides, and sizes that 16 divides."""
    shape = (case.execution, case.tokens, case.out_features, case.in_features, case.k)
    weights = torch.promote_types(case.dtype, case.delta or case.dtype)
    config = dense.choose_config(*shape, case.dtype, weights, hip=target.startswith("gfx"))
    values: dict[str, Any] = {
        "y_ptr": "*fp32" if config.split_k > 1 else POINTERS[case.dtype],
        "x_ptr": POINTERS[case.dtype],
        "w_ptr": POINTERS[case.dtype],
        "bias_ptr": POINTERS[case.dtype] if case.bias else None,
        "d_ptr": POINTERS[case.delta or case.dtype],
        "bias_d_ptr": POINTERS[case.delta or case.dtype] if case.bias else None,
        "columns_ptr": "*i32",
        "table_ptr": "*fp32",
        "rows_ptr": "*i32",
        "token_rows_ptr": "*i32" if case.token_rows else None,
        "tokens": "i32",
        "table_stride": "i32",
        "bias_stride": 1 if case.bias else 0,
        "bias_d_stride_i": "i32",
        "bias_d_stride_n": 1 if case.bias else 0,
        "x_stride_k": 1,
        ("w_stride_n" if case.transposed else "w_stride_k"): 1,
        ("d_stride_n" if case.transposed else "d_stride_k"): 1,
        "VECTORS": case.k,
        "GROUP": triton.next_power_of_2(case.k),
        "MERGED": case.merged,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "SPLIT_K": config.split_k,
        "GROUP_M": 8,
    }
    kernel = dense.split_kernel if case.execution == "split" else dense.combine_kernel
    arguments = {name: values.get(name, "i32") for name in kernel.arg_names}
    signature = {name: value if isinstance(value, str) else "constexpr" for name, value in arguments.items()}
    constants = {(i,): value for i, value in enumerate(arguments.values()) if not isinstance(value, str)}
    unaligned = {"tokens", "table_stride", "bias_d_stride_i"}
    aligned = [i for i, (name, type_) in enumerate(signature.items()) if type_ != "constexpr" and name not in unaligned]
    return ASTSource(kernel, signature, constants, {(i,): [["tt.divisibility", 16]] for i in aligned}), config


def measure(case: Case, target: str) -> dict[str, Any]:
    src, config = source(case, target)
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    compiled = triton.compile(src, target=TARGETS[target], options=options)
    row = {"case": case.name, "target": target, "shared": compiled.metadata.shared, **dataclasses.asdict(config)}
    if target.startswith("sm_"):
        return (
            row | _cubin(compiled.asm["cubin"]) | _matrix(compiled.asm["ptx"], r"(wgmma\.mma|tcgen05\.mma|mma\.sync)")
        )
    text = compiled.asm["amdgcn"]
    numbers = {key: int(re.search(rf"\.{key}:\s+(\d+)", text)[1]) for key in ("vgpr_count", "vgpr_spill_count")}
    row |= {"registers": numbers["vgpr_count"], "spills": numbers["vgpr_spill_count"]}
    return row | _matrix(text, r"(v_mfma|v_fma_f32|v_pk_fma_f32)")


def _matrix(text: str, pattern: str) -> dict[str, Any]:
    return {"matrix": sorted(set(re.findall(pattern, text)))}


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
    wanted = sys.argv[1] if len(sys.argv) > 1 else ""
    for case in CASES:
        for target in TARGETS:
            if wanted in f"{case.name}/{target}":
                print(json.dumps(measure(case, target)), flush=True)
