"""Attention of one token a row over a key/value cache, in Triton: split over the filled keys, for few rows.

    y[r, h] = sum_n p[n] v[r, g, n] / sum_n p[n],  p[n] = exp(scale q[r, h] . k[r, g, n] - max),  g = h // group

A row's positions, `max(0, length + 1 - window)` to `length`, are shared among a fixed number of programs by what its
length is on the device: the grid depends on no length, so a captured graph holds for every one. Each program walks its
stretch with a running maximum and sum (online softmax, arXiv 1805.02867) and leaves both and its part of the sum in
float32; a second kernel adds the parts of a head up, always in one order. For the product with the values, p is rounded
to their dtype.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

GROUP = 16  # query heads of a program: what mma.sync takes, and too few for wgmma
PROGRAMS = 8  # a multiprocessor: several are resident, and rows of different lengths even out
COMBINED = 8192  # numbers of the parts that are added up at a time


@triton.jit
def _stretch(lengths_ptr, row, max_length, window, SPLITS: tl.constexpr, BLOCK_N: tl.constexpr):
    """Of a row: its first position, the one after its last, and how many each split takes, in whole blocks."""
    length = tl.load(lengths_ptr + row)
    end = tl.minimum(tl.maximum(length, 0), max_length - 1) + 1
    first = tl.where(window > 0, tl.maximum(end - window, 0), 0)
    blocks = tl.cdiv(end - first, BLOCK_N)
    return first, end, tl.cdiv(blocks, SPLITS) * BLOCK_N


@triton.jit
def attention_kernel(
    y_ptr,
    stats_ptr,
    q_ptr,
    keys_ptr,
    values_ptr,
    lengths_ptr,
    heads,
    group,
    max_length,
    window,
    scale,
    q_strides,
    keys_strides,
    values_strides,
    SIZE: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The part of one split for up to BLOCK_M heads that share keys: maximum (of base 2), sum and sum of values.

    y is float32 [rows, heads, SPLITS, SIZE] and stats [rows, heads, SPLITS, 2]; with one split y is the result, [rows,
    heads, SIZE]. Bytes: 2 rows kv_heads filled SIZE itemsize, + 8 rows heads SIZE for each split in use.
    """
    # Splits that a short row leaves empty come last, and do not stand before another row's.
    row, split = tl.program_id(1).to(tl.int64), tl.program_id(2)
    first, end, share = _stretch(lengths_ptr, row, max_length, window, SPLITS, BLOCK_N)
    first += split * share
    end = tl.minimum(end, first + share)
    if first >= end:
        return
    blocks = tl.cdiv(group, BLOCK_M)
    kv_head = tl.program_id(0) // blocks
    m = tl.program_id(0) % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    head = kv_head * group + m
    n, d = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    d_mask = (d < SIZE)[None, :]
    mask = (m < group)[:, None] & d_mask
    q = tl.load(q_ptr + row * q_strides[0] + head[:, None] * q_strides[1] + d[None, :], mask=mask, other=0.0)
    at_head, at = kv_head.to(tl.int64), first.to(tl.int64)
    keys_at = keys_ptr + row * keys_strides[0] + at_head * keys_strides[1] + at * keys_strides[2]
    values_at = values_ptr + row * values_strides[0] + at_head * values_strides[1] + at * values_strides[2]
    keys_tile = n[:, None] * keys_strides[2] + d[None, :]
    values_tile = n[:, None] * values_strides[2] + d[None, :]

    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for start in tl.range(first, end, BLOCK_N):
        n_mask = n < end - start
        # Slots that are not filled may hold NaN: they are read as 0.
        k = tl.load(keys_at + keys_tile, mask=n_mask[:, None] & d_mask, other=0.0)
        score = tl.dot(q, tl.trans(k), input_precision="ieee") * (scale * 1.4426950408889634)
        score = tl.where(n_mask[None, :], score, float("-inf"))
        higher = tl.maximum(top, tl.max(score, 1))
        p = tl.exp2(score - higher[:, None])
        fade = tl.exp2(top - higher)
        v = tl.load(values_at + values_tile, mask=n_mask[:, None] & d_mask, other=0.0)
        acc = tl.dot(p.to(v.dtype), v, acc * fade[:, None], input_precision="ieee")
        total = total * fade + tl.sum(p, 1)
        top = higher
        keys_at += BLOCK_N * keys_strides[2]
        values_at += BLOCK_N * values_strides[2]

    part = (row * heads + head) * SPLITS + split
    if SPLITS == 1:
        acc /= total[:, None]
    else:
        tl.store(stats_ptr + 2 * part, top, mask=m < group)
        tl.store(stats_ptr + 2 * part + 1, total, mask=m < group)
    tl.store(y_ptr + part[:, None] * SIZE + d[None, :], acc.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def attention_sum_kernel(
    y_ptr,
    parts_ptr,
    stats_ptr,
    lengths_ptr,
    heads,
    max_length,
    window,
    SIZE: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """y[r, h] = sum_s w_s part_s / sum_s w_s total_s, w_s = 2^(top_s - max top), over the splits that row r uses.

    Bytes: rows heads SIZE (4 for each split in use + itemsize), from L2.
    """
    program = tl.program_id(0).to(tl.int64)
    first, end, share = _stretch(lengths_ptr, program // heads, max_length, window, SPLITS, BLOCK_N)
    used = tl.cdiv(end - first, share)
    s, d = tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_D)
    top = tl.full((), float("-inf"), tl.float32)
    total = tl.zeros((), tl.float32)
    acc = tl.zeros((BLOCK_D,), tl.float32)
    for start in tl.range(0, used, BLOCK_S):
        mask = start + s < used
        at = program * SPLITS + start + s
        tops = tl.load(stats_ptr + 2 * at, mask=mask, other=float("-inf"))
        higher = tl.maximum(top, tl.max(tops, 0))
        weight = tl.exp2(tops - higher)
        fade = tl.exp2(top - higher)
        total = total * fade + tl.sum(weight * tl.load(stats_ptr + 2 * at + 1, mask=mask, other=0.0), 0)
        parts_at = parts_ptr + at[:, None] * SIZE + d[None, :]
        parts = tl.load(parts_at, mask=mask[:, None] & (d < SIZE)[None, :], other=0.0)
        acc = acc * fade + tl.sum(weight[:, None] * parts, 0)
        top = higher
    tl.store(y_ptr + program * SIZE + d, (acc / total).to(y_ptr.dtype.element_ty), mask=d < SIZE)


def decode_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    *,
    scale: float,
    window: int,
    splits: int | None = None,
) -> Tensor:
    """Attention of row r over positions `max(0, lengths[r] + 1 - window)` to `lengths[r]`, from 0 with window 0.

    q [rows, heads, D], keys, values [cache_rows, kv_heads, max_length, D], all in float32, bfloat16 or float16 and with
    their last dimension contiguous; lengths int32 [rows], taken for the nearest inside the cache -> [rows, heads D].
    splits: programs that share a row and key head; None chooses by the GPU and the shapes. The same call gives the same
    bits; another number of rows may split otherwise and round otherwise.
    """
    rows, heads, size = q.shape
    kv_heads, max_length = keys.shape[1:3]
    y = torch.empty(rows, heads * size, dtype=q.dtype, device=q.device)
    if y.numel() == 0:
        return y
    group = heads // kv_heads
    head_blocks = kv_heads * triton.cdiv(group, GROUP)
    block_d = max(triton.next_power_of_2(size), 16)
    block_n = max(16384 // (block_d * q.dtype.itemsize), 16)  # 16 KiB of keys
    if splits is None:
        splits = triton.cdiv(PROGRAMS * _multiprocessors(q.device), rows * head_blocks)
    splits = min(splits, triton.cdiv(max_length, block_n))
    parts, stats = y, None
    if splits > 1:
        parts = torch.empty(rows, heads, splits, size, dtype=torch.float32, device=q.device)
        stats = torch.empty(rows, heads, splits, 2, dtype=torch.float32, device=q.device)
    with torch.cuda.device_of(q):
        attention_kernel[(head_blocks, rows, splits)](
            parts,
            stats,
            q,
            keys,
            values,
            lengths,
            heads,
            group,
            max_length,
            window,
            scale,
            q.stride()[:2],
            keys.stride()[:3],
            values.stride()[:3],
            SIZE=size,
            SPLITS=splits,
            BLOCK_M=GROUP,
            BLOCK_N=block_n,
            BLOCK_D=block_d,
            num_warps=4,
            num_stages=2,
        )
        if stats is not None:
            attention_sum_kernel[(rows * heads,)](
                y,
                parts,
                stats,
                lengths,
                heads,
                max_length,
                window,
                SIZE=size,
                SPLITS=splits,
                BLOCK_N=block_n,
                BLOCK_S=COMBINED // block_d,
                BLOCK_D=block_d,
                num_warps=4,
            )
    return y


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
