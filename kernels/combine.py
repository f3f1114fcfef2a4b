"""Combine: the mix of a tile is formed in registers, then one product.

    y[m, n] = sum_k x[m, k] (W[n, k] + sum_i c_i D_i[n, k])

A tile whose tokens have several rows of the table is computed once for each of them, and each writes its own tokens:
batches are long runs of one row, so that few tiles are; that is decided by each tile on device data.

The mix is the second operand of the matrix instruction, which goes through shared memory: on Hopper, a first operand
built in registers can meet a miscompiled pipeline (triton-lang/triton#9433).

Bytes: W and every D_i once for each tile of tokens and row of the table in it, + in (tokens out / BLOCK_N + out) for x
and y. A vector whose coefficient is 0 is not read. Low-rank vectors and side tables join after the inputs.
"""

from __future__ import annotations

import triton
import triton.language as tl

from alignvec.kernels.tiles import (
    LOSSLESS,
    LOW_RANK,
    coefficient,
    decode,
    dot,
    expand,
    kind,
    side_dot,
    table_row,
)


@triton.jit(do_not_specialize=["tokens"])
def combine_kernel(
    y_ptr,
    x_ptr,
    pointers,
    sizes,
    numbers,
    table_ptr,
    rows_ptr,
    token_rows_ptr,
    tokens,
    in_features,
    y_stride,
    x_stride_m,
    x_stride_k,
    table_stride,
    VECTORS: tl.constexpr,
    SPECS: tl.constexpr,
    BIASES: tl.constexpr,
    MERGED: tl.constexpr,
    RANK_PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """Arguments as of `split_kernel`, for one projection. MERGED: the mix is rounded to the weight's dtype."""
    w_ptr, bias_ptr, bias_d_ptr, columns_ptr, parts = pointers
    out_features = numbers[0]
    # Neighbouring programs take GROUP_M tiles of tokens under one tile of outputs: the weights stay in the L2 cache.
    tiles_m, tiles_n = tl.cdiv(tokens, BLOCK_M), tl.cdiv(out_features, BLOCK_N)
    pid = tl.program_id(0)
    group = pid // (GROUP_M * tiles_n)
    rows_of_group = tl.minimum(tiles_m - group * GROUP_M, GROUP_M)
    inside = pid % (GROUP_M * tiles_n)
    offs_m = (group * GROUP_M + inside % rows_of_group) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = inside // rows_of_group * BLOCK_N + tl.arange(0, BLOCK_N)
    n = offs_n.to(tl.int64)
    m_mask, n_mask = (offs_m < tokens)[:, None], offs_n < out_features
    x_rows = x_ptr + offs_m.to(tl.int64)[:, None] * x_stride_m
    w_rows = w_ptr + n[None, :] * numbers[3]

    row = table_row(offs_m, tokens, rows_ptr, token_rows_ptr)
    for r in range(tl.min(row, axis=0), tl.max(row, axis=0) + 1):
        here = (row == r) & (offs_m < tokens)
        if tl.max(here.to(tl.int32), axis=0) > 0:
            acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
            for start in range(0, in_features, BLOCK_K):
                offs_k = start + tl.arange(0, BLOCK_K)
                k, k_mask = offs_k.to(tl.int64), offs_k < in_features
                x = tl.load(x_rows + k[None, :] * x_stride_k, mask=m_mask & k_mask[None, :], other=0.0)
                mask = k_mask[:, None] & n_mask[None, :]
                w = tl.load(w_rows + k[:, None] * numbers[4], mask=mask, other=0.0)
                mix = w.to(tl.float32)
                for i in tl.static_range(VECTORS):
                    if kind(SPECS, i) != LOW_RANK:
                        column = tl.load(columns_ptr + sizes[i][4])
                        c = coefficient(table_ptr, table_stride, r, column, tokens, rows_ptr, token_rows_ptr)
                        used = mask & ((c != 0).to(tl.int32) > 0)
                        mix += c * decode(SPECS, i, parts[i], sizes[i], offs_n, offs_k, used, w, MERGED)
                acc = dot(x, mix.to(w.dtype) if MERGED else mix, acc)

            bias = tl.zeros((BLOCK_N,), tl.float32)
            if BIASES & 1:
                bias += tl.load(bias_ptr + n * numbers[5], mask=n_mask, other=0.0).to(tl.float32)
            for i in tl.static_range(VECTORS):
                column = tl.load(columns_ptr + sizes[i][4])
                c = coefficient(table_ptr, table_stride, r, column, tokens, rows_ptr, token_rows_ptr)
                zero = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
                if kind(SPECS, i) == LOSSLESS and not MERGED:  # a rounded mix has the side table in it already
                    base = (w_ptr, numbers[3], numbers[4])
                    edit = side_dot(x_rows, x_stride_k, m_mask, *base, parts[i], offs_n, out_features, n_mask, zero)
                    acc = tl.where(c != 0, acc + c * edit, acc)
                if kind(SPECS, i) == LOW_RANK:  # noqa: SIM102  (a constant, then a value on the device)
                    if c != 0:
                        acc += c * expand(x_ptr, parts[i], sizes[i], offs_m, tokens, n, n_mask, zero, RANK_PARTS)
                if BIASES & 2:
                    at = bias_d_ptr + sizes[i][4] * numbers[6].to(tl.int64) + n * numbers[7]
                    bias += c * tl.load(at, mask=n_mask, other=0.0).to(tl.float32)
            if MERGED:
                bias = bias.to(w_ptr.dtype.element_ty).to(tl.float32)
            y = y_ptr + offs_m.to(tl.int64)[:, None] * y_stride + (numbers[1] + n)[None, :]
            tl.store(y, (acc + bias[None, :]).to(y_ptr.dtype.element_ty), mask=here[:, None] & n_mask[None, :])
