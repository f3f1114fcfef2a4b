"""Norms whose weight and bias differ for every row."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from alignvec.kernels import eager
from alignvec.kernels.mixes import widened
from alignvec.kernels.reference import token_coefficients
from alignvec.ops.backend import by_token, kernel, unview

torch.library.define(
    "alignvec::rms_norm",
    "(Tensor x, Tensor weight, Tensor? deltas, Tensor columns, Tensor table, Tensor rows, float eps, float offset, "
    "str backend) -> Tensor",
)
torch.library.define(
    "alignvec::layer_norm",
    "(Tensor x, Tensor? weight, Tensor? bias, Tensor? deltas, Tensor? bias_deltas, Tensor columns, Tensor table, "
    "Tensor rows, float eps, str backend) -> Tensor",
)
rms_norm = torch.ops.alignvec.rms_norm
layer_norm = torch.ops.alignvec.layer_norm


@torch.library.impl("alignvec::rms_norm", "CompositeExplicitAutograd")
def _rms_norm(
    x: Tensor,
    weight: Tensor,
    deltas: Tensor | None,
    columns: Tensor,
    table: Tensor,
    rows: Tensor,
    eps: float,
    offset: float,
    backend: str,
) -> Tensor:
    """`x / rms(x) (offset + w + sum_i table[row, columns[i]] d_i)`: x [..., features], deltas [k, features] or None."""
    run = kernel(x.device, backend, "norm", "rms_norm")
    flat = by_token(x)
    y: Tensor = run(flat, weight, deltas, columns, table, rows, eps=eps, offset=offset)
    return unview(y, *x.shape)


@torch.library.impl("alignvec::layer_norm", "CompositeExplicitAutograd")
def _layer_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    deltas: Tensor | None,
    bias_deltas: Tensor | None,
    columns: Tensor,
    table: Tensor,
    rows: Tensor,
    eps: float,
    backend: str,
) -> Tensor:
    """`(x - mean(x)) / std(x) w' + b'` with w' and b' of each row: x [..., features], deltas [k, features]."""
    run = kernel(x.device, backend, "norm", "layer_norm")
    flat = by_token(x)
    y: Tensor = run(flat, weight, bias, deltas, bias_deltas, columns, table, rows, eps=eps)
    return unview(y, *x.shape)


@torch.library.register_fake("alignvec::rms_norm")
@torch.library.register_fake("alignvec::layer_norm")
def _norm_fake(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape)


def _rms_norm_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, deltas, columns, table, rows, ctx.eps, ctx.offset, _ = inputs
    ctx.save_for_backward(x, weight, deltas, columns, table.clone(), rows.clone())


def _rms_norm_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, deltas, columns, table, rows = ctx.saved_tensors
    flat, g = widened(by_token(x)), widened(by_token(grad))
    scale = torch.rsqrt(flat.square().mean(-1, keepdim=True) + ctx.eps)
    unit = flat * scale
    mixed = _mixed(weight, deltas, columns, table, rows, len(flat)) + ctx.offset
    inner = g * mixed
    grad_x = scale * (inner - unit * (inner * unit).mean(-1, keepdim=True))
    grad_weight = (g * unit).sum(0).to(weight.dtype)
    return grad_x.to(x.dtype).view(x.shape), grad_weight, *(None,) * 7


def _layer_norm_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, deltas, _, columns, table, rows, ctx.eps, _ = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(x, weight, deltas, columns, table.clone(), rows.clone())


def _layer_norm_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, deltas, columns, table, rows = ctx.saved_tensors
    flat, g = widened(by_token(x)), widened(by_token(grad))
    centred = flat - flat.mean(-1, keepdim=True)
    scale = torch.rsqrt(centred.square().mean(-1, keepdim=True) + ctx.eps)
    unit = centred * scale
    inner = g if weight is None else g * _mixed(weight, deltas, columns, table, rows, len(flat))
    grad_x = scale * (inner - inner.mean(-1, keepdim=True) - unit * (inner * unit).mean(-1, keepdim=True))
    grad_weight = None if weight is None else (g * unit).sum(0).to(weight.dtype)
    grad_bias = None if ctx.bias_dtype is None else g.sum(0).to(ctx.bias_dtype)
    return grad_x.to(x.dtype).view(x.shape), grad_weight, grad_bias, *(None,) * 7


def _mixed(weight: Tensor, deltas: Tensor | None, columns: Tensor, table: Tensor, rows: Tensor, tokens: int) -> Tensor:
    """The weight of each token, [tokens, features], or where no vector edits it [features]; reads device data only."""
    if deltas is None:
        return widened(weight)
    return eager.token_vectors(weight, deltas, token_coefficients(table, rows, columns, tokens))


torch.library.register_autograd("alignvec::rms_norm", _rms_norm_backward, setup_context=_rms_norm_context)
torch.library.register_autograd("alignvec::layer_norm", _layer_norm_backward, setup_context=_layer_norm_context)
