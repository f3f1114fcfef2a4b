"""csrc/cuda: the linear operator for few tokens on NVIDIA GPUs, with the arguments of `kernels.linear`.

It takes bfloat16 activations and weights of 1 to 16 tokens with dense, coded and lossless vectors; `serves` says why a
call goes to the Triton kernels instead. Everything is read on the device: coefficients, and how many rows there are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from alignvec import compiled
from alignvec.compiled.layout import layout
from alignvec.kernels.operands import MAX_VECTORS, ROW, Operand

if TYPE_CHECKING:
    from alignvec.kernels.packing import Projection

torch.library.define(
    "alignvec::cuda_linear",
    "(Tensor x, Tensor[] weights, Tensor?[] biases, int[] layout, int[] vectors, Tensor[] parts, "
    "Tensor?[] bias_deltas, Tensor[] columns, Tensor table, Tensor rows, Tensor? token_rows, Tensor(a!)? partial, "
    "int stages, bool dependent, Tensor(b!) y) -> ()",
)

MAX_TOKENS = 16
KINDS = ("dense", "codes", "lossless")


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    operands: Sequence[Operand],
    bias_deltas: Tensor | None,
    columns: Tensor,
    table: Tensor,
    rows: Tensor,
    token_rows: Tensor | None = None,
    *,
    execution: str = "auto",
    precision: str = "exact",
) -> Tensor:
    """`kernels.linear.linear`, in CUDA C++ where it serves the call: x [tokens, in], weight [out, in] -> [tokens, out].

    Raises:
        AlignvecError: csrc/cuda cannot run here, or more than 16 vectors.
    """
    from alignvec.kernels.packing import Projection

    layer = Projection(weight, bias, operands, bias_deltas, columns)
    return linear_group(x, [layer], table, rows, token_rows, execution=execution, precision=precision)[0]


def linear_group(
    x: Tensor,
    projections: Sequence[Projection],
    table: Tensor,
    rows: Tensor,
    token_rows: Tensor | None = None,
    *,
    execution: str = "auto",
    precision: str = "exact",
) -> list[Tensor]:
    """`linear` for several layers that read the same x: a launch for each format that their vectors have.

    The results, [tokens, out] each, are columns of one tensor, or where Triton serves the call what that returns.
    """
    if serves(x, projections, token_rows, execution=execution, precision=precision) is not None:
        from alignvec.kernels import linear as triton

        return triton.linear_group(x, projections, table, rows, token_rows, execution=execution, precision=precision)
    compiled.load("cuda")
    return decode(x, projections, table, rows, token_rows)


def serves(
    x: Tensor,
    projections: Sequence[Projection],
    token_rows: Tensor | None = None,
    *,
    execution: str = "auto",
    precision: str = "exact",
) -> str | None:
    """None, or in a sentence why a call is not for these kernels."""
    if execution == "combine" or execution == "materialise" or (execution == "auto" and precision != "exact"):
        return f"csrc/cuda splits; execution '{execution}' with precision '{precision}' forms mixes"
    if not 1 <= x.shape[0] <= MAX_TOKENS:
        return f"csrc/cuda decodes 1 to {MAX_TOKENS} tokens, not {x.shape[0]}"
    if x.shape[1] == 0 or x.shape[1] % 8:
        return f"csrc/cuda reads inputs by eights, and there are {x.shape[1]}"
    if not _in_rows(x):
        return "csrc/cuda needs bfloat16 activations in rows that begin at multiples of 16 bytes"
    if token_rows is not None and token_rows.dtype != torch.int32:
        return "csrc/cuda needs token_rows to be int32"
    for p in projections:
        if not _in_rows(p.weight):
            return "csrc/cuda needs bfloat16 weights in rows that begin at multiples of 16 bytes"
        if len(p.operands) > MAX_VECTORS:
            return f"csrc/cuda takes {MAX_VECTORS} vectors a layer, not {len(p.operands)}"
        if not all(b is None or (b.dtype in _FLOATS and b.stride(-1) == 1) for b in (p.bias, p.bias_deltas)):
            return "csrc/cuda needs contiguous biases and bias deltas in bfloat16 or float32"
        for o in p.operands:
            if o.kind not in KINDS:
                return f"csrc/cuda has no kernel for {o.kind} deltas"
            if o.kind == "dense" and not _in_rows(o.parts[0]):
                return "csrc/cuda needs dense deltas in bfloat16 rows that begin at multiples of 16 bytes"
            if o.kind == "codes" and o.bits not in (1, 4, 8):
                return f"csrc/cuda has no kernel for codes of {o.bits} bits"
            if o.kind == "codes" and not (o.parts[1].dtype == torch.bfloat16 or (o.bits == 1 and o.group == ROW)):
                return "csrc/cuda needs bfloat16 scales, or for signs one float32 a row"
    return None


_FLOATS = (torch.bfloat16, torch.float32)


def _in_rows(t: Tensor) -> bool:
    """Whether rows are contiguous and every one begins at a multiple of 16 bytes."""
    return t.dtype == torch.bfloat16 and t.stride(1) == 1 and t.stride(0) % 8 == 0 and t.data_ptr() % 16 == 0


def decode(
    x: Tensor,
    projections: Sequence[Projection],
    table: Tensor,
    rows: Tensor,
    token_rows: Tensor | None = None,
    *,
    stages: int = 0,
    dependent: bool = False,
) -> list[Tensor]:
    """What `linear_group` does of a call that it serves.

    stages: of the ring in shared memory, 2 to 4, or 0 for as many as fit the shape. dependent: the kernel may start
    before the one ahead of it in the stream has ended (programmatic dependent launch, Hopper and later), for whose
    results it then waits; that one must not write the weights.
    """
    outs = [p.weight.shape[0] for p in projections]
    y = torch.empty(x.shape[0], sum(outs), dtype=x.dtype, device=x.device)
    if y.numel():
        mixed = any(len({o.spec for o in p.operands if o.kind != "dense"}) > 1 for p in projections)
        partial = torch.empty(y.shape, dtype=torch.float32, device=x.device) if mixed else None
        numbers, parts = layout(o for p in projections for o in p.operands)
        torch.ops.alignvec.cuda_linear(
            x,
            [p.weight for p in projections],
            [p.bias for p in projections],
            numbers,
            [len(p.operands) for p in projections],
            parts,
            [p.bias_deltas for p in projections],
            [p.columns for p in projections],
            *(table, rows, token_rows, partial, stages, dependent, y),
        )
    return list(y.split(outs, 1))
