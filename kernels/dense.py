"""Dense alignment vectors in Triton: the linear operator as two kernels, `split` and `combine`.

    y[m] = x[m] W^T + b + sum_i c[m, i] (x[m] D_i^T + b_i)

Sums are float32 and the result is rounded once. A coefficient is device data: nothing compiled or captured depends on
its value, nor on the number of rows in use. What is built in registers, a mix or half of one, is the second operand of
the matrix instruction, which goes through shared memory: on Hopper, a first operand built in registers can meet a
miscompiled pipeline (triton-lang/triton#9433). Where x itself has to be converted, tiles stay too low for wgmma.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from alignvec.errors import AlignvecError

MAX_VECTORS = 16

# Up to here the weights' bytes bound a layer, not its FLOPs, and "auto" splits.
DECODE_TOKENS = 64

# Programs that keep the memory of a large chip busy; fewer are multiplied by splitting in_features.
PROGRAMS = 256


@dataclass(frozen=True)
class Config:
    """Tile shape and resources of one launch; `split_k` programs share the input features of a tile."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    split_k: int = 1


def choose_config(
    execution: str,
    tokens: int,
    out_features: int,
    in_features: int,
    k: int,
    dtype: torch.dtype,
    weights: torch.dtype,
    hip: bool = torch.version.hip is not None,
) -> Config:
    """The launch for activations [tokens, in_features] of `dtype` and a weight and `k` deltas of `weights`, the dtype
    that holds them all.

    Tiles read full 128-byte lines of the weights. Accumulators stay under about 128 registers a thread and stages
    under 96 KiB of shared memory (64 on AMD): any GPU since sm_80 runs them, large ones two at a time.
    """
    shared = 64 << 10 if hip else 96 << 10
    itemsize = dtype.itemsize if dtype == weights else 4
    block_k = 128 // itemsize
    warps = 8
    if execution == "combine":
        tiles, block_m, block_k = k + 1, 128, 32
        block_n = 128 if k <= 4 else 64 if k <= 8 else 32
        if itemsize == 4 or dtype == torch.float16:  # float32 in shared memory, and perhaps an x that is converted
            block_m, block_n = 64 if dtype == torch.float32 else 32, 32 if dtype == torch.float32 else min(block_n, 64)
    elif k == 1 and tokens > DECODE_TOKENS and itemsize == 2:
        tiles, block_m, block_n, block_k = 2, 128, 128, 32
    else:
        tiles = triton.next_power_of_2(k) + 1
        block_m = min(max(triton.next_power_of_2(tokens), 16), 32 if itemsize == 4 else 64)
        block_n = {2: 64, 3: 32, 5: 32}.get(tiles, 16)
        warps = 8 if block_m == 64 or dtype == torch.float32 else 4
    stage = (tiles * block_n + block_m) * block_k * itemsize
    # One of the stages is in registers, unless the matrix instruction reads shared memory by itself.
    direct = execution == "split" and block_m >= 64
    stages = max(2, min(3, shared // stage + (not direct)))
    programs = triton.cdiv(tokens, block_m) * triton.cdiv(out_features, block_n)
    split_k = 1
    while execution == "split" and programs * split_k < PROGRAMS and in_features >= 8 * block_k * split_k:
        split_k *= 2
    return Config(block_m, block_n, block_k, warps, stages, split_k)


@triton.jit
def _table_row(offs_m, tokens, rows_ptr, token_rows_ptr):
    """The table row of each token, int64 [BLOCK_M]; tokens past the end are taken for the last."""
    m = tl.minimum(offs_m, tokens - 1).to(tl.int64)
    row = m * tl.load(rows_ptr) // tokens if token_rows_ptr is None else tl.load(token_rows_ptr + m).to(tl.int64)
    return row


@triton.jit
def _coefficient(table_ptr, table_stride, row, column, tokens, rows_ptr, token_rows_ptr):
    """`table[row, column]`; NaN where the rows in use do not divide the tokens, so that the output shows it."""
    c = tl.load(table_ptr + row * table_stride + column)
    if token_rows_ptr is None:
        c = tl.where(tokens % tl.load(rows_ptr) == 0, c, float("nan"))
    return c


@triton.jit
def _dot(x, w, acc):
    """`acc + x w`: x [M, K], w [K, N], acc float32 [M, N]. What each pair of dtypes needs to keep w's information:

    float32 x: float32 products. The same 16-bit dtype: the native instruction, whose products are exact in float32.
    Two 16-bit dtypes: TF32, whose 10 bits of fraction and 8 of exponent hold bfloat16 and float16 alike.
    float32 w: w = hi + lo, each with as many bits as the instruction takes, and two products. lo is rounded with a
    dither that walks through the K of a tile: rounding to nearest would leave a bias of up to 2e-3 in the realised
    coefficient of a vector whose deltas all have the same significand, as deltas of one ULP have.
    """
    if x.dtype == tl.float32:
        acc = tl.dot(x, w.to(tl.float32), acc, input_precision="ieee")
    elif x.dtype == w.dtype:
        acc = tl.dot(x, w, acc)
    elif w.dtype != tl.float32:
        acc = tl.dot(x.to(tl.float32), w.to(tl.float32), acc, input_precision="tf32")
    else:
        dither = ((tl.arange(0, w.shape[0]) * 40503) & 0xFFFF)[:, None]  # golden ratio: even over any stretch of K
        if x.dtype == tl.bfloat16:
            hi = w.to(tl.bfloat16)
            lo = (w - hi.to(tl.float32)).to(tl.int32, bitcast=True) + dither
            lo = (lo & -0x10000).to(tl.float32, bitcast=True).to(tl.bfloat16)
            acc = tl.dot(x, lo, tl.dot(x, hi, acc))
        else:
            wide = x.to(tl.float32)
            hi = ((w.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
            lo = (w - hi).to(tl.int32, bitcast=True) + (dither >> 3)
            lo = (lo & -0x2000).to(tl.float32, bitcast=True)
            acc = tl.dot(wide, lo, tl.dot(wide, hi, acc, input_precision="tf32"), input_precision="tf32")
    return acc


@triton.jit(do_not_specialize=["tokens"])
def split_kernel(
    y_ptr,
    x_ptr,
    w_ptr,
    bias_ptr,
    d_ptr,
    bias_d_ptr,
    columns_ptr,
    table_ptr,
    rows_ptr,
    token_rows_ptr,
    tokens,
    out_features,
    in_features,
    x_stride_m,
    x_stride_k,
    w_stride_n,
    w_stride_k,
    bias_stride,
    d_stride_i,
    d_stride_n,
    d_stride_k,
    bias_d_stride_i,
    bias_d_stride_n,
    table_stride,
    VECTORS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
):
    """y[s, m, n] = x W^T + b + sum_i c[m, i] (x D_i^T + b_i) over the s-th part of in_features.

    One accumulator for the base and one for each vector: the vectors of a tile lie side by side as GROUP * BLOCK_N
    columns of one product, and meet their coefficients after the K loop, in float32.
    Bytes: (k + 1) out in for the weights, once, + tokens (in out / BLOCK_N + out), in the dtypes of each.
    """
    pid_n, pid_m, pid_s = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = pid_s * BLOCK_K + tl.arange(0, BLOCK_K)
    side = tl.arange(0, GROUP * BLOCK_N)
    side_i = side // BLOCK_N
    side_n = pid_n * BLOCK_N + side % BLOCK_N

    m, n = offs_m.to(tl.int64), offs_n.to(tl.int64)
    x_rows = x_ptr + m[:, None] * x_stride_m
    w_rows = w_ptr + n[None, :] * w_stride_n
    d_rows = d_ptr + (side_i.to(tl.int64) * d_stride_i + side_n.to(tl.int64) * d_stride_n)[None, :]
    m_mask, n_mask = (offs_m < tokens)[:, None], (offs_n < out_features)[None, :]
    d_mask = ((side_i < VECTORS) & (side_n < out_features))[None, :]

    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    acc_d = tl.zeros((BLOCK_M, GROUP * BLOCK_N), dtype=tl.float32)
    for start in range(0, in_features, BLOCK_K * SPLIT_K):
        at = start + offs_k
        k_mask = at < in_features
        at = at.to(tl.int64)
        x = tl.load(x_rows + at[None, :] * x_stride_k, mask=m_mask & k_mask[None, :], other=0.0)
        w = tl.load(w_rows + at[:, None] * w_stride_k, mask=k_mask[:, None] & n_mask, other=0.0)
        d = tl.load(d_rows + at[:, None] * d_stride_k, mask=k_mask[:, None] & d_mask, other=0.0)
        acc = _dot(x, w, acc)
        acc_d = _dot(x, d, acc_d)

    # Programs of one tile add up in the second pass; the first of them brings the bias.
    vector = tl.arange(0, GROUP)
    column = tl.load(columns_ptr + vector, mask=vector < VECTORS, other=0)
    row = _table_row(offs_m, tokens, rows_ptr, token_rows_ptr)
    c = _coefficient(table_ptr, table_stride, row[:, None], column[None, :], tokens, rows_ptr, token_rows_ptr)
    edit = tl.reshape(acc_d, (BLOCK_M, GROUP, BLOCK_N))
    if bias_d_ptr is not None:
        at = vector.to(tl.int64)[:, None] * bias_d_stride_i + n[None, :] * bias_d_stride_n
        bias_d = tl.load(bias_d_ptr + at, mask=(vector < VECTORS)[:, None] & n_mask & (pid_s == 0), other=0.0)
        edit += bias_d.to(tl.float32)[None, :, :]
    acc += tl.sum(edit * c[:, :, None], axis=1)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + n * bias_stride, mask=(offs_n < out_features) & (pid_s == 0), other=0.0).to(
            tl.float32
        )
    y = y_ptr + (pid_s * tokens.to(tl.int64) + m[:, None]) * out_features + n[None, :]
    tl.store(y, acc.to(y_ptr.dtype.element_ty), mask=m_mask & n_mask)


@triton.jit
def sum_kernel(y_ptr, parts_ptr, size, SPLIT_K: tl.constexpr, BLOCK: tl.constexpr):
    """y = sum_s parts[s], in the order of s: deterministic, unlike atomics. Bytes: (4 SPLIT_K + itemsize) size."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for s in tl.static_range(SPLIT_K):
        total += tl.load(parts_ptr + s * size + offs, mask=offs < size, other=0.0)
    tl.store(y_ptr + offs, total.to(y_ptr.dtype.element_ty), mask=offs < size)


@triton.jit(do_not_specialize=["tokens"])
def combine_kernel(
    y_ptr,
    x_ptr,
    w_ptr,
    bias_ptr,
    d_ptr,
    bias_d_ptr,
    columns_ptr,
    table_ptr,
    rows_ptr,
    token_rows_ptr,
    tokens,
    out_features,
    in_features,
    x_stride_m,
    x_stride_k,
    w_stride_n,
    w_stride_k,
    bias_stride,
    d_stride_i,
    d_stride_n,
    d_stride_k,
    bias_d_stride_i,
    bias_d_stride_n,
    table_stride,
    VECTORS: tl.constexpr,
    MERGED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """y = x (W + sum_i c_i D_i)^T + b + sum_i c_i b_i where the tokens of a tile share a table row, else as `split`.

    The mix of a tile is formed in float32 registers; `_dot` takes it as a pair, MERGED rounds it to the weight's dtype.
    FLOPs: 4 tokens out in (MERGED 2, mixed tiles 2 (k + 1)), + 2 k out in tokens / BLOCK_M for the mix.
    Bytes: (k + 1) out in tokens / BLOCK_M + tokens in out / BLOCK_N + tokens out, most of them from the L2 cache:
    programs run through GROUP_M tiles of tokens before they move on to other weights.
    """
    tiles_m, tiles_n = tl.cdiv(tokens, BLOCK_M), tl.cdiv(out_features, BLOCK_N)
    group = tl.program_id(0) // (GROUP_M * tiles_n)
    within = tl.program_id(0) % (GROUP_M * tiles_n)
    group_m = tl.minimum(tiles_m - group * GROUP_M, GROUP_M)
    pid_m = group * GROUP_M + within % group_m
    pid_n = within // group_m
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)

    m, n = offs_m.to(tl.int64), offs_n.to(tl.int64)
    x_rows = x_ptr + m[:, None] * x_stride_m
    w_rows = w_ptr + n[None, :] * w_stride_n
    d_rows = d_ptr + n[None, :] * d_stride_n
    m_mask, n_mask = (offs_m < tokens)[:, None], (offs_n < out_features)[None, :]
    row = _table_row(offs_m, tokens, rows_ptr, token_rows_ptr)
    first = tl.min(row, axis=0)

    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    if first == tl.max(row, axis=0):
        for start in range(0, in_features, BLOCK_K):
            at = start + offs_k
            k_mask = at < in_features
            at = at.to(tl.int64)
            x = tl.load(x_rows + at[None, :] * x_stride_k, mask=m_mask & k_mask[None, :], other=0.0)
            w_mask = k_mask[:, None] & n_mask
            w = tl.load(w_rows + at[:, None] * w_stride_k, mask=w_mask, other=0.0)
            mix = w.to(tl.float32)
            for i in tl.static_range(VECTORS):
                column = tl.load(columns_ptr + i)
                c = _coefficient(table_ptr, table_stride, first, column, tokens, rows_ptr, token_rows_ptr)
                d_at = d_rows + tl.full((), i, tl.int64) * d_stride_i + at[:, None] * d_stride_k
                mix += c * tl.load(d_at, mask=w_mask, other=0.0).to(tl.float32)
            acc = _dot(x, mix.to(w.dtype) if MERGED else mix, acc)
        bias = tl.zeros((BLOCK_N,), dtype=tl.float32)
        if bias_ptr is not None:
            bias += tl.load(bias_ptr + n * bias_stride, mask=offs_n < out_features, other=0.0).to(tl.float32)
        if bias_d_ptr is not None:
            for i in tl.static_range(VECTORS):
                column = tl.load(columns_ptr + i)
                c = _coefficient(table_ptr, table_stride, first, column, tokens, rows_ptr, token_rows_ptr)
                bias_at = bias_d_ptr + i * bias_d_stride_i + n * bias_d_stride_n
                bias += c * tl.load(bias_at, mask=offs_n < out_features, other=0.0).to(tl.float32)
        if MERGED:
            bias = bias.to(w_ptr.dtype.element_ty).to(tl.float32)
        acc += bias[None, :]
    else:
        # One pass over in_features for the base and one for each vector: two accumulators are enough for any k.
        for start in range(0, in_features, BLOCK_K):
            at = start + offs_k
            k_mask = at < in_features
            at = at.to(tl.int64)
            x = tl.load(x_rows + at[None, :] * x_stride_k, mask=m_mask & k_mask[None, :], other=0.0)
            w = tl.load(w_rows + at[:, None] * w_stride_k, mask=k_mask[:, None] & n_mask, other=0.0)
            acc = _dot(x, w, acc)
        if bias_ptr is not None:
            base_bias = tl.load(bias_ptr + n * bias_stride, mask=offs_n < out_features, other=0.0)
            acc += base_bias.to(tl.float32)[None, :]
        for i in range(VECTORS):
            edit = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
            d_i = d_rows + tl.cast(i, tl.int64) * d_stride_i
            for start in range(0, in_features, BLOCK_K):
                at = start + offs_k
                k_mask = at < in_features
                at = at.to(tl.int64)
                x = tl.load(x_rows + at[None, :] * x_stride_k, mask=m_mask & k_mask[None, :], other=0.0)
                d = tl.load(d_i + at[:, None] * d_stride_k, mask=k_mask[:, None] & n_mask, other=0.0)
                edit = _dot(x, d, edit)
            if bias_d_ptr is not None:
                bias_at = bias_d_ptr + i * bias_d_stride_i + n * bias_d_stride_n
                bias_d = tl.load(bias_at, mask=offs_n < out_features, other=0.0)
                edit += bias_d.to(tl.float32)[None, :]
            column = tl.load(columns_ptr + i)
            c = _coefficient(table_ptr, table_stride, row, column, tokens, rows_ptr, token_rows_ptr)
            acc += c[:, None] * edit
    y = y_ptr + m[:, None] * out_features + n[None, :]
    tl.store(y, acc.to(y_ptr.dtype.element_ty), mask=m_mask & n_mask)


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    deltas: Tensor,
    bias_deltas: Tensor | None,
    columns: Tensor,
    table: Tensor,
    rows: Tensor,
    token_rows: Tensor | None = None,
    *,
    execution: str = "auto",
    precision: str = "exact",
    config: Config | None = None,
) -> Tensor:
    """`y[m] = x[m] W^T + b + sum_i c[m, i] (x[m] D_i^T + b_i)`, rounded once, to x's dtype.

    x [tokens, in], weight [out, in], bias [out], deltas [k, out, in], bias_deltas [k, out] -> [tokens, out]; float32,
    bfloat16 or float16, each its own, with any strides. The other arguments, contiguous, and the row rule, NaN
    included, are those of `reference.token_coefficients`.

    `precision="merged"` rounds the mix to the weight's dtype, as a stored merge would, where the tokens of a tile share
    it; other tiles stay exact, and so does `execution="split"`. `config` replaces the choice of `choose_config`.

    Raises:
        AlignvecError: more than 16 vectors.
    """
    (tokens, in_features), (k, out_features, _) = x.shape, deltas.shape
    if k > MAX_VECTORS:
        raise AlignvecError(f"{k} vectors edit one layer; the Triton kernels take {MAX_VECTORS}, use backend 'torch'")
    y = torch.empty(tokens, out_features, dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    exact = precision == "exact"
    if execution == "auto":
        execution = "split" if exact and tokens <= DECODE_TOKENS else "combine"
    if execution == "combine" and exact and k == 1:
        execution = "split"  # two products like combine's pair, without forming a mix
    weights = torch.promote_types(weight.dtype, deltas.dtype)
    config = config or choose_config(execution, tokens, out_features, in_features, k, x.dtype, weights)
    tensors = (x, weight, bias, deltas, bias_deltas, columns, table, rows, token_rows)
    sizes = (tokens, out_features, in_features)
    strides = (
        *x.stride(),
        *weight.stride(),
        0 if bias is None else bias.stride(0),
        *deltas.stride(),
        *((0, 0) if bias_deltas is None else bias_deltas.stride()),
        table.stride(0),
    )
    blocks = {"BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_K": config.block_k}
    blocks |= {"VECTORS": k, "num_warps": config.num_warps, "num_stages": config.num_stages}
    tiles_m, tiles_n = triton.cdiv(tokens, config.block_m), triton.cdiv(out_features, config.block_n)
    with torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext():
        if execution == "combine":
            combine_kernel[(tiles_m * tiles_n,)](y, *tensors, *sizes, *strides, MERGED=not exact, GROUP_M=8, **blocks)
            return y
        split_k = config.split_k
        parts = y if split_k == 1 else torch.empty(split_k, *y.shape, dtype=torch.float32, device=x.device)
        group = triton.next_power_of_2(k)
        grid = (tiles_n, tiles_m, split_k)
        split_kernel[grid](parts, *tensors, *sizes, *strides, GROUP=group, SPLIT_K=split_k, **blocks)
        if split_k > 1:
            sum_kernel[(triton.cdiv(y.numel(), 1024),)](y, parts, y.numel(), SPLIT_K=split_k, BLOCK=1024)
    return y
