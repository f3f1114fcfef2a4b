"""RMS and layer norms whose weight and bias depend on the token's row, in Triton: one program a token, or several.

    y[t] = x[t] / sqrt(mean(x[t]^2) + eps) * (w + offset + sum_i c[t, i] d_i)
    y[t] = (x[t] - mean(x[t])) / sqrt(var(x[t]) + eps) * (w + sum_i c[t, i] d_i) + b + sum_i c[t, i] b_i

All is float32 and rounded once. At coefficient 0 that is what nn.LayerNorm and Gemma's norms (offset 1) compute;
Llama's and Mistral's round the normalised x to its dtype before they multiply, and are the less exact ones.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from alignvec.errors import AlignvecError
from alignvec.kernels import eager, tiles
from alignvec.kernels.operands import MAX_VECTORS

MAX_FEATURES = 1 << 15  # a token's features lie in the registers of one program


@triton.jit(do_not_specialize=["tokens"])
def norm_kernel(
    y_ptr,
    x_ptr,
    residual_ptr,
    w_ptr,
    bias_ptr,
    d_ptr,
    bias_d_ptr,
    columns_ptr,
    table_ptr,
    rows_ptr,
    token_rows_ptr,
    tokens,
    features,
    x_stride,
    residual_stride,
    d_stride,
    bias_d_stride,
    table_stride,
    eps,
    OFFSET: tl.constexpr,
    CENTRE: tl.constexpr,
    VECTORS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """y = (x - CENTRE mean) / rms (w + OFFSET + sum_i c_i d_i) + b + sum_i c_i b_i, as the head of this file says.

    With a residual, x is `residual + x` rounded to the residual's dtype, which is written back.
    Bytes: 2 tokens features itemsize (4 with a residual), + (k + 1) features for the weight (twice with a bias), from
    L2 for each program.
    """
    offs_t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    d = tl.arange(0, BLOCK_D)
    d_mask = d < features
    mask = (offs_t < tokens)[:, None] & d_mask[None, :]
    t = offs_t.to(tl.int64)[:, None]
    x = tl.load(x_ptr + t * x_stride + d[None, :], mask=mask, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        at = residual_ptr + t * residual_stride + d[None, :]
        total = (x + tl.load(at, mask=mask, other=0.0).to(tl.float32)).to(residual_ptr.dtype.element_ty)
        tl.store(at, total, mask=mask)
        x = total.to(tl.float32)
    if CENTRE:
        x = tl.where(d_mask[None, :], x - (tl.sum(x, 1) / features)[:, None], 0.0)
    y = x * (1 / tl.sqrt(tl.sum(x * x, 1) / features + eps))[:, None]

    row = tiles.table_row(offs_t, tokens, rows_ptr, token_rows_ptr)
    scale = tl.full((1, BLOCK_D), 1.0, tl.float32)
    if w_ptr is not None:
        scale = tl.load(w_ptr + d, mask=d_mask, other=0.0).to(tl.float32)[None, :] + OFFSET
    shift = tl.zeros((1, BLOCK_D), tl.float32)
    if bias_ptr is not None:
        shift += tl.load(bias_ptr + d, mask=d_mask, other=0.0).to(tl.float32)[None, :]
    for i in tl.static_range(VECTORS):
        column = tl.load(columns_ptr + i)
        c = tiles.coefficient(table_ptr, table_stride, row, column, tokens, rows_ptr, token_rows_ptr)[:, None]
        if d_ptr is not None:
            at = d_ptr + tl.full((), i, tl.int64) * d_stride + d
            scale += c * tl.load(at, mask=d_mask, other=0.0).to(tl.float32)[None, :]
        if bias_d_ptr is not None:
            at = bias_d_ptr + tl.full((), i, tl.int64) * bias_d_stride + d
            shift += c * tl.load(at, mask=d_mask, other=0.0).to(tl.float32)[None, :]
    y *= scale
    if bias_ptr is not None or bias_d_ptr is not None:
        y += shift
    tl.store(y_ptr + t * features + d[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


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
    """`x / sqrt(mean(x^2) + eps) * (weight + offset + sum_i c[t, i] deltas[i])`, rounded once, to x's dtype.

    x [tokens, features], weight [features], deltas [k, features] or None, each float32, bfloat16 or float16; -> as x.
    float64 runs in plain torch.
    The other arguments and the row rule, NaN included, are those of `reference.token_coefficients`. offset: 1 for norms
    that store their weight less 1 (Gemma's).

    Raises:
        AlignvecError: more than 16 vectors or 32,768 features.
    """
    return _norm(x, None, weight, None, deltas, None, columns, table, rows, token_rows, eps, offset, False)


def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    deltas: Tensor | None,
    columns: Tensor,
    table: Tensor,
    rows: Tensor,
    *,
    eps: float,
    offset: float = 0.0,
) -> Tensor:
    """`residual += x`, rounded to its dtype, then `rms_norm` of it, in one pass.

    x, residual [tokens, features], the residual's features contiguous; all else as in `rms_norm`.
    """
    return _norm(x, residual, weight, None, deltas, None, columns, table, rows, None, eps, offset, False)


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
    """`(x - mean) / sqrt(var + eps) * (weight + sum_i c[t, i] deltas[i]) + bias + sum_i c[t, i] bias_deltas[i]`.

    x [tokens, features], weight, bias [features], deltas, bias_deltas [k, features]; what is None is left out. Rounded
    once, to x's dtype; all else as in `rms_norm`.
    """
    return _norm(x, None, weight, bias, deltas, bias_deltas, columns, table, rows, token_rows, eps, 0.0, True)


def _norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    deltas: Tensor | None,
    bias_deltas: Tensor | None,
    columns: Tensor,
    table: Tensor,
    rows: Tensor,
    token_rows: Tensor | None,
    eps: float,
    offset: float,
    centre: bool,
) -> Tensor:
    if x.dtype == torch.float64:
        x = x if residual is None else residual.add_(x)
        shared = (columns, table, rows, token_rows)
        if centre:
            return eager.layer_norm(x, weight, bias, deltas, bias_deltas, *shared, eps=eps)
        assert weight is not None
        return eager.rms_norm(x, weight, deltas, *shared, eps=eps, offset=offset)
    tokens, features = x.shape
    k = columns.shape[0]
    if k > MAX_VECTORS or features > MAX_FEATURES:
        raise AlignvecError(
            f"{k} vectors edit a norm of {features} features; the Triton kernels take {MAX_VECTORS} and {MAX_FEATURES}"
        )
    y = torch.empty(tokens, features, dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    weight, bias, deltas, bias_deltas, x = (
        t if t is None or t.stride(-1) == 1 else t.contiguous() for t in (weight, bias, deltas, bias_deltas, x)
    )
    block_d = triton.next_power_of_2(features)
    # With many tokens, several of them share what a program loads of the weights; few fill the chip one by one.
    block_t = max(1, (8192 if tokens >= 4096 else 2048) // block_d)
    warps = min(max(block_t * block_d // 1024, 1), 16 if block_d < 32768 else 32)
    with torch.cuda.device_of(x):
        norm_kernel[(triton.cdiv(tokens, block_t),)](
            y,
            x,
            residual,
            weight,
            bias,
            deltas,
            bias_deltas,
            columns,
            table,
            rows,
            token_rows,
            tokens,
            features,
            x.stride(0),
            0 if residual is None else residual.stride(0),
            0 if deltas is None else deltas.stride(0),
            0 if bias_deltas is None else bias_deltas.stride(0),
            table.stride(0),
            eps,
            OFFSET=offset,
            CENTRE=centre,
            VECTORS=k,
            BLOCK_T=block_t,
            BLOCK_D=block_d,
            num_warps=warps,
        )
    return y
