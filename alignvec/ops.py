"""The torch.library operators: schemas, fake kernels, gradients, and which backend runs them.

All take the batch-major activations of a layer, the `k` vectors present in it as one stacked delta tensor, the column
of each vector in the coefficient table, and the live table itself. Nothing that shapes a graph depends on a value of
the table or on its number of rows, so compiled and captured graphs follow later writes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from alignvec import planner
from alignvec.coefficients import publish_lock

_SCHEMAS = {
    "linear": "(Tensor x, Tensor weight, Tensor? bias, Tensor deltas, Tensor? bias_deltas, Tensor columns, "
    "Tensor table, Tensor rows, Tensor? token_rows, str execution, str precision, str backend) -> Tensor",
    "embedding": "(Tensor ids, Tensor weight, Tensor deltas, Tensor columns, Tensor table, Tensor rows) -> Tensor",
    "mix": "(Tensor weight, Tensor deltas, Tensor columns, Tensor table, Tensor rows, SymInt batch) -> Tensor",
    "publish": "(Tensor staged_table, Tensor staged_rows, Tensor(a!) table, Tensor(b!) rows) -> ()",
}
for _name, _schema in _SCHEMAS.items():
    torch.library.define(f"alignvec::{_name}", _schema)

linear = torch.ops.alignvec.linear
embedding = torch.ops.alignvec.embedding
mix = torch.ops.alignvec.mix
publish = torch.ops.alignvec.publish


@torch.library.impl("alignvec::linear", "CompositeExplicitAutograd")
def _linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    deltas: Tensor,
    bias_deltas: Tensor | None,
    columns: Tensor,
    table: Tensor,
    rows: Tensor,
    token_rows: Tensor | None,
    execution: str,
    precision: str,
    backend: str,
) -> Tensor:
    """`x W^T + b + sum_i table[row, columns[i]] (x D_i^T + b_i)`: x [..., in_features] -> [..., out_features]."""
    kernel = planner.linear_kernel(x.device, backend)
    y = kernel(
        x.reshape(-1, x.shape[-1]),
        weight,
        bias,
        deltas,
        bias_deltas,
        columns,
        table,
        rows,
        token_rows,
        execution=execution,
        precision=precision,
    )
    return y.view(*x.shape[:-1], weight.shape[0])


@torch.library.register_fake("alignvec::linear")
def _linear_fake(x: Tensor, weight: Tensor, *_: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _linear_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _, deltas, _, columns, table, rows, token_rows, *ctx.choices = inputs
    # The table is cloned (kilobytes): a write before the backward pass must not change this step's gradient.
    ctx.save_for_backward(x, weight, deltas, columns, table.clone(), rows.clone(), token_rows)


def _linear_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, deltas, columns, table, rows, token_rows = ctx.saved_tensors
    grad_x = grad_weight = grad_bias = None
    if ctx.needs_input_grad[0]:
        transposed = (weight.t(), None, deltas.transpose(1, 2), None)
        grad_x = linear(grad.contiguous(), *transposed, columns, table, rows, token_rows, *ctx.choices)
    flat = grad.reshape(-1, grad.shape[-1])
    if ctx.needs_input_grad[1]:
        grad_weight = flat.t() @ x.reshape(-1, x.shape[-1])
    if ctx.needs_input_grad[2]:
        grad_bias = flat.sum(0)
    return grad_x, grad_weight, grad_bias, *(None,) * 9


torch.library.register_autograd("alignvec::linear", _linear_backward, setup_context=_linear_context)


@torch.library.impl("alignvec::embedding", "CompositeExplicitAutograd")
def _embedding(ids: Tensor, weight: Tensor, deltas: Tensor, columns: Tensor, table: Tensor, rows: Tensor) -> Tensor:
    """`E[t] + sum_i table[row, columns[i]] D_i[t]`: ids [...] -> [..., embedding_dim]."""
    from alignvec.kernels import eager

    y = eager.embedding(ids.reshape(-1), weight, deltas, columns, table, rows)
    return y.view(*ids.shape, weight.shape[1])


@torch.library.register_fake("alignvec::embedding")
def _embedding_fake(ids: Tensor, weight: Tensor, *_: Any) -> Tensor:
    return weight.new_empty(*ids.shape, weight.shape[1])


def _embedding_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0])
    ctx.shape = inputs[1].shape


def _embedding_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (ids,) = ctx.saved_tensors
    grad_weight = grad.new_zeros(ctx.shape).index_add_(0, ids.reshape(-1), grad.reshape(-1, grad.shape[-1]))
    return None, grad_weight, None, None, None, None


torch.library.register_autograd("alignvec::embedding", _embedding_backward, setup_context=_embedding_context)


@torch.library.impl("alignvec::mix", "CompositeExplicitAutograd")
def _mix(weight: Tensor, deltas: Tensor, columns: Tensor, table: Tensor, rows: Tensor, batch: int) -> Tensor:
    """`w + sum_i table[row, columns[i]] d_i`, float32, for small parameters: [*shape] -> [batch, *shape]."""
    from alignvec.kernels import eager

    return eager.mix(weight, deltas, columns, table, rows, batch)


@torch.library.register_fake("alignvec::mix")
def _mix_fake(weight: Tensor, deltas: Tensor, columns: Tensor, table: Tensor, rows: Tensor, batch: int) -> Tensor:
    return torch.empty(batch, *weight.shape, dtype=torch.float32, device=weight.device)


def _mix_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.dtype = inputs[0].dtype


def _mix_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return grad.sum(0).to(ctx.dtype), None, None, None, None, None


torch.library.register_autograd("alignvec::mix", _mix_backward, setup_context=_mix_context)


@torch.library.impl("alignvec::publish", "CompositeExplicitAutograd")
def _publish(staged_table: Tensor, staged_rows: Tensor, table: Tensor, rows: Tensor) -> None:
    """Begin a step: the staged coefficients become the live ones."""
    with publish_lock:
        table.copy_(staged_table)
        rows.copy_(staged_rows)


@torch.library.register_fake("alignvec::publish")
def _publish_fake(staged_table: Tensor, staged_rows: Tensor, table: Tensor, rows: Tensor) -> None:
    return None
