"""csrc/cpu: the operators on a CPU, with the arguments of `kernels.eager`.

float32 and bfloat16 are compiled, for activations, weights and deltas with consecutive inputs; float16, transposed
weights, weights in another dtype than the activations and layers without inputs go to `kernels.eager`. Coefficients
are read on the host.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from alignvec import compiled
from alignvec.compiled.layout import layout
from alignvec.kernels import eager
from alignvec.kernels.operands import Operand
from alignvec.planner.cpu import NEVER, combine_tokens

torch.library.define(
    "alignvec::cpu_linear",
    "(Tensor x, Tensor weight, Tensor? bias, int[] layout, Tensor[] parts, Tensor? bias_deltas, Tensor columns, "
    "Tensor table, Tensor rows, Tensor? token_rows, int combine_tokens, bool merged, Tensor(a!) y) -> ()",
)
torch.library.define(
    "alignvec::cpu_materialise",
    "(Tensor weight, int[] layout, Tensor[] parts, Tensor columns, Tensor table, Tensor(a!) out, Tensor(b!)? low) "
    "-> ()",
)
torch.library.define(
    "alignvec::cpu_embedding",
    "(Tensor ids, Tensor weight, int[] layout, Tensor[] parts, Tensor columns, Tensor table, Tensor rows, "
    "Tensor? token_rows, Tensor(a!) y) -> ()",
)
torch.library.define(
    "alignvec::cpu_norm",
    "(Tensor x, Tensor(b!)? residual, Tensor? weight, Tensor? bias, Tensor? deltas, Tensor? bias_deltas, "
    "Tensor columns, Tensor table, Tensor rows, Tensor? token_rows, float eps, float offset, bool centre, "
    "Tensor(a!) y) -> ()",
)
torch.library.define("alignvec::cpu_capability", "() -> str")

compiled.load("cpu")

DTYPES = (torch.float32, torch.bfloat16)


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
    """`kernels.eager.linear`, compiled: x [tokens, in], weight [out, in] -> [tokens, out]."""
    shared = (columns, table, rows, token_rows)
    vectors = _with_zeros(operands)
    if weight.dtype != x.dtype or not takes(x, weight, bias, bias_deltas, operands=vectors):
        return eager.linear(x, weight, bias, operands, bias_deltas, *shared, execution=execution, precision=precision)
    y = x.new_empty(x.shape[0], weight.shape[0])
    choices = _choices(x.dtype, operands, execution, precision)
    torch.ops.alignvec.cpu_linear(x, weight, bias, *layout(vectors), bias_deltas, *shared, *choices, y)
    return y


def prepared(
    weight: Tensor,
    bias: Tensor | None,
    operands: Sequence[Operand],
    bias_deltas: Tensor | None,
    columns: Tensor,
    table: Tensor,
    rows: Tensor,
    execution: str,
    precision: str,
) -> Callable[[Tensor, Tensor], None] | None:
    """`linear` into a given y [tokens, out], for x in the weight's dtype; None where plain torch has to run it.

    What does not depend on x is found out once.
    """
    vectors = _with_zeros(operands)
    if not takes(weight, bias, bias_deltas, operands=vectors):
        return None
    numbers, parts = layout(vectors)
    shared = (bias, numbers, parts, bias_deltas, columns, table, rows, None)
    choices = _choices(weight.dtype, operands, execution, precision)
    run = torch.ops.alignvec.cpu_linear.default
    return lambda x, y: run(x, weight, *shared, *choices, y)


def _choices(dtype: torch.dtype, operands: Sequence[Operand], execution: str, precision: str) -> tuple[int, bool]:
    """From how many tokens of a mix on the mix is formed, and whether it is rounded."""
    merged = precision == "merged"
    if execution == "auto" and not merged:
        return combine_tokens(((o.kind, o.bits) for o in operands), pair=dtype == torch.bfloat16), merged
    return NEVER if execution == "split" else 0, merged  # a materialised mix is not kept here


def embedding(
    ids: Tensor,
    weight: Tensor,
    operands: Sequence[Operand],
    columns: Tensor,
    table: Tensor,
    rows: Tensor,
    token_rows: Tensor | None = None,
) -> Tensor:
    """`kernels.eager.embedding`, compiled: ids [tokens], weight [vocabulary, dim] -> [tokens, dim]."""
    shared = (columns, table, rows, token_rows)
    vectors = _with_zeros(operands)
    if not takes(weight, operands=vectors):
        return eager.embedding(ids, weight, operands, *shared)
    y = weight.new_empty(ids.shape[0], weight.shape[1])
    torch.ops.alignvec.cpu_embedding(ids.long().contiguous(), weight, *layout(vectors), *shared, y)
    return y


def materialise(
    weight: Tensor,
    operands: Sequence[Operand],
    columns: Tensor,
    table: Tensor,
    rows: Tensor,
    *,
    out: Tensor,
    low: Tensor | None = None,
) -> None:
    """`kernels.eager.materialise`, compiled: weight, out and low [out, in], in storage of their own."""
    vectors = _with_zeros(operands)
    if takes(weight, out, low, operands=vectors):
        torch.ops.alignvec.cpu_materialise(weight, *layout(vectors), columns, table, out, low)
    else:
        eager.materialise(weight, operands, columns, table, rows, out=out, low=low)


def rms_norm(
    x: Tensor,
    weight: Tensor,
    deltas: Tensor | None,
    columns: Tensor,
    table: Tensor,
    rows: Tensor,
    token_rows: Tensor | None = None,
    *,
    eps: float,
    offset: float = 0.0,
) -> Tensor:
    """`kernels.eager.rms_norm`, compiled: x [tokens, features], deltas [k, features] -> [tokens, features]."""
    shared = (columns, table, rows, token_rows)
    if not takes(x, weight, deltas):
        return eager.rms_norm(x, weight, deltas, *shared, eps=eps, offset=offset)
    y = x.new_empty(x.shape)
    torch.ops.alignvec.cpu_norm(x, None, weight, None, deltas, None, *shared, eps, offset, False, y)
    return y


def layer_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    deltas: Tensor | None,
    bias_deltas: Tensor | None,
    columns: Tensor,
    table: Tensor,
    rows: Tensor,
    token_rows: Tensor | None = None,
    *,
    eps: float,
) -> Tensor:
    """`kernels.eager.layer_norm`, compiled: x [tokens, features], deltas [k, features] -> [tokens, features]."""
    shared = (columns, table, rows, token_rows)
    if not takes(x, weight, bias, deltas, bias_deltas):
        return eager.layer_norm(x, weight, bias, deltas, bias_deltas, *shared, eps=eps)
    y = x.new_empty(x.shape)
    torch.ops.alignvec.cpu_norm(x, None, weight, bias, deltas, bias_deltas, *shared, eps, 0.0, True, y)
    return y


def takes(*tensors: Tensor | None, operands: Sequence[Operand] = ()) -> bool:
    """Whether csrc/cpu has what these tensors and operands need."""
    rows = [t for t in tensors if t is not None]
    if any(0 in t.shape[-1:] for t in rows):
        return False
    for operand in operands:
        if operand.kind != "codes":
            rows += [part for part in operand.parts if part.is_floating_point()]
    return all(t.dtype in DTYPES and (t.dim() == 0 or t.stride(-1) == 1 or t.shape[-1] < 2) for t in rows)


def _with_zeros(operands: Sequence[Operand]) -> list[Operand]:
    """The operands, those of vectors that leave the weight alone (one zero, expanded) marked as such."""
    return [Operand("zero", (), operand.shape) if _is_zero(operand) else operand for operand in operands]


def _is_zero(operand: Operand) -> bool:
    values = operand.parts[0]
    return operand.kind == "dense" and values.stride() == (0, 0) and values.numel() > 0 and not values[0, 0].item()
