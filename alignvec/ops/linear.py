"""Linear layers: one, several that read the same input, and the gradient to the input."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from alignvec import planner
from alignvec.kernels import operands
from alignvec.kernels.operands import Operand
from alignvec.ops.backend import by_token, no_gradients, unview

_TABLE = "Tensor table, Tensor rows, Tensor? token_rows, str execution, str precision, str backend"
torch.library.define(
    "alignvec::linear",
    "(Tensor x, Tensor weight, Tensor? bias, str[] specs, Tensor[] parts, Tensor? bias_deltas, Tensor columns, "
    f"{_TABLE}) -> Tensor",
)
torch.library.define(
    "alignvec::linear_group",
    "(Tensor x, Tensor[] weights, Tensor[] biases, str[] specs, int[] vectors, Tensor[] parts, "
    f"Tensor?[] bias_deltas, Tensor[] columns, {_TABLE}) -> Tensor",
)
torch.library.define(
    "alignvec::linear_input_grad",
    f"(Tensor grad, Tensor weight, str[] specs, Tensor[] parts, Tensor columns, {_TABLE}) -> Tensor",
)
linear = torch.ops.alignvec.linear
linear_group = torch.ops.alignvec.linear_group
linear_input_grad = torch.ops.alignvec.linear_input_grad


@torch.library.impl("alignvec::linear", "CompositeExplicitAutograd")
def _linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    specs: list[str],
    parts: list[Tensor],
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
    execution = planner.choose(execution, x, weight, specs, parts, precision)
    y = planner.linear_kernel(x.device, backend)(
        by_token(x),
        weight,
        bias,
        _operands(specs, parts, weight),
        bias_deltas,
        columns,
        table,
        rows,
        token_rows,
        execution=execution,
        precision=precision,
    )
    return unview(y, *x.shape[:-1], weight.shape[0])


def _operands(specs: list[str], parts: list[Tensor], weight: Tensor) -> list[Operand]:
    return operands.parse(specs, parts, (weight.shape[0], weight.shape[1]))


@torch.library.register_fake("alignvec::linear")
def _linear_fake(x: Tensor, weight: Tensor, *_: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _linear_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _, ctx.specs, parts, _, columns, table, rows, token_rows, *ctx.choices = inputs
    ctx.others = no_gradients(inputs[3:])
    # The table is cloned (kilobytes): a write before the backward pass must not change this step's gradient.
    ctx.save_for_backward(x, weight, columns, table.clone(), rows.clone(), token_rows, *parts)


def _linear_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, columns, table, rows, token_rows, *parts = ctx.saved_tensors
    grad_x = grad_weight = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = linear_input_grad(grad, weight, ctx.specs, parts, columns, table, rows, token_rows, *ctx.choices)
    flat = by_token(grad)
    if ctx.needs_input_grad[1]:
        grad_weight = flat.t() @ by_token(x)
    if ctx.needs_input_grad[2]:
        grad_bias = flat.sum(0)
    return grad_x, grad_weight, grad_bias, *ctx.others


torch.library.register_autograd("alignvec::linear", _linear_backward, setup_context=_linear_context)


@torch.library.impl("alignvec::linear_group", "CompositeExplicitAutograd")
def _linear_group(
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    specs: list[str],
    vectors: list[int],
    parts: list[Tensor],
    bias_deltas: list[Tensor | None],
    columns: list[Tensor],
    table: Tensor,
    rows: Tensor,
    token_rows: Tensor | None,
    execution: str,
    precision: str,
    backend: str,
) -> Tensor:
    """`linear` of several layers with the same x: [..., in_features] -> [..., sum of out_features], one after another.

    `vectors` says how many each layer has; `specs` and `parts` are those of all layers, one after another. Either all
    layers have biases or none.
    """
    flat = by_token(x)
    optional: Sequence[Tensor | None] = biases or [None] * len(weights)
    layers = _per_layer(weights, specs, vectors, parts)
    members = zip(weights, optional, layers, bias_deltas, columns, strict=True)
    shared = (table, rows, token_rows)
    first = [part for operand in layers[0] for part in operand.parts]
    execution = planner.choose(execution, x, weights[0], specs[: vectors[0]], first, precision)
    chosen = planner.resolve_backend(x.device.type, backend)
    run = planner.linear_module(chosen)
    if chosen in planner.GROUPED:
        from alignvec.kernels.packing import Projection

        projections = [Projection(*member) for member in members]
        results = run.linear_group(flat, projections, *shared, execution=execution, precision=precision)
    else:
        results = [run.linear(flat, *member, *shared, execution=execution, precision=precision) for member in members]
    return unview(joined(results), *x.shape[:-1], -1)


def joined(results: list[Tensor]) -> Tensor:
    """The results side by side; not copied where they are the columns of one tensor already."""
    first, width = results[0], sum(y.shape[1] for y in results)
    storage, offset = first.untyped_storage().data_ptr(), first.storage_offset()
    for y in results:
        if y.stride() != (width, 1) or y.storage_offset() != offset or y.untyped_storage().data_ptr() != storage:
            return torch.cat(results, 1)
        offset += y.shape[1]
    return first.as_strided((first.shape[0], width), (width, 1))


def _per_layer(weights: list[Tensor], specs: list[str], vectors: list[int], parts: list[Tensor]) -> list[list[Operand]]:
    layers, first, position = [], 0, 0
    for weight, count in zip(weights, vectors, strict=True):
        own = specs[first : first + count]
        size = sum(operands.PARTS[spec.split(":")[0]] for spec in own)
        layers.append(_operands(own, parts[position : position + size], weight))
        first, position = first + count, position + size
    return layers


@torch.library.register_fake("alignvec::linear_group")
def _linear_group_fake(x: Tensor, weights: list[Tensor], *_: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], sum(weight.shape[0] for weight in weights))


def _linear_group_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weights, biases, ctx.specs, ctx.vectors, parts, _, columns, table, rows, token_rows, *ctx.choices = inputs
    ctx.count, ctx.biased, ctx.others = len(weights), bool(biases), no_gradients(inputs[3:])
    ctx.save_for_backward(x, table.clone(), rows.clone(), token_rows, *weights, *columns, *parts)


def _linear_group_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, table, rows, token_rows, *rest = ctx.saved_tensors
    weights, columns, parts = rest[: ctx.count], rest[ctx.count : 2 * ctx.count], rest[2 * ctx.count :]
    layers = _per_layer(weights, ctx.specs, ctx.vectors, parts)
    grad_x: Tensor | None = None
    grad_weights, grad_biases = [], []
    for part, weight, own, column in zip(
        grad.split([weight.shape[0] for weight in weights], -1), weights, layers, columns, strict=True
    ):
        if ctx.needs_input_grad[0]:
            flat_parts = [tensor for operand in own for tensor in operand.parts]
            own_specs = [operand.spec for operand in own]
            own_grad = linear_input_grad(
                part, weight, own_specs, flat_parts, column, table, rows, token_rows, *ctx.choices
            )
            grad_x = own_grad if grad_x is None else grad_x + own_grad
        flat = by_token(part)
        grad_weights.append(flat.t() @ by_token(x))
        grad_biases += [flat.sum(0)] if ctx.biased else []
    return grad_x, grad_weights, grad_biases, *ctx.others


torch.library.register_autograd("alignvec::linear_group", _linear_group_backward, setup_context=_linear_group_context)


@torch.library.impl("alignvec::linear_input_grad", "CompositeExplicitAutograd")
def _linear_input_grad(
    grad: Tensor,
    weight: Tensor,
    specs: list[str],
    parts: list[Tensor],
    columns: Tensor,
    table: Tensor,
    rows: Tensor,
    token_rows: Tensor | None,
    execution: str,
    precision: str,
    backend: str,
) -> Tensor:
    """`g W + sum_i table[row, columns[i]] g D_i`: grad [..., out_features] -> [..., in_features].

    Where every operand has a transpose Triton's linear kernel runs on it; the others are decoded in plain torch.
    """
    vectors = _operands(specs, parts, weight)
    flat = by_token(grad)
    transposable = all(operand.kind in ("dense", "low-rank") for operand in vectors)
    if transposable and planner.beside_linear(grad.device.type, backend) == "triton":
        transposed = [_transposed(operand) for operand in vectors]
        layer = (weight.t(), None, transposed, None, columns)
        run = planner.linear_module("triton").linear
        grad_x: Tensor = run(
            flat.contiguous(), *layer, table, rows, token_rows, execution=execution, precision=precision
        )
    else:
        from alignvec.kernels import eager

        grad_x = eager.linear_input_grad(flat, weight, vectors, columns, table, rows, token_rows)
    return unview(grad_x, *grad.shape[:-1], weight.shape[1])


def _transposed(operand: Operand) -> Operand:
    transposed = operand.transpose()
    if operand.kind == "low-rank":  # kernels want the rank of B contiguous
        return operands.low_rank(*(part.contiguous() for part in transposed.parts))
    return transposed


@torch.library.register_fake("alignvec::linear_input_grad")
def _linear_input_grad_fake(grad: Tensor, weight: Tensor, *_: Any) -> Tensor:
    return grad.new_empty(*grad.shape[:-1], weight.shape[1])


def _linear_input_grad_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    grad, weight, ctx.specs, parts, columns, table, rows, token_rows, *ctx.choices = inputs
    ctx.others = no_gradients(inputs[2:])
    ctx.save_for_backward(grad, weight, columns, table.clone(), rows.clone(), token_rows, *parts)


def _linear_input_grad_backward(ctx: Any, second: Tensor) -> tuple[Tensor | None, ...]:
    grad, weight, columns, table, rows, token_rows, *parts = ctx.saved_tensors
    grad_grad = grad_weight = None
    if ctx.needs_input_grad[0]:
        layer = (weight, None, ctx.specs, parts, None, columns)
        grad_grad = linear(second, *layer, table, rows, token_rows, *ctx.choices)
    if ctx.needs_input_grad[1]:
        grad_weight = by_token(grad).t() @ by_token(second)
    return grad_grad, grad_weight, *ctx.others


torch.library.register_autograd(
    "alignvec::linear_input_grad", _linear_input_grad_backward, setup_context=_linear_input_grad_context
)
