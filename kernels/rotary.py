"""Rotary positions and the append to the key/value cache in Triton, one launch: a token of each row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_HEADS = 4


@triton.jit
def rotary_kernel(
    y_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    cos_ptr,
    sin_ptr,
    lengths_ptr,
    keys_ptr,
    values_ptr,
    heads,
    kv_heads,
    max_length,
    q_strides,
    k_strides,
    v_strides,
    keys_strides,
    values_strides,
    cos_stride,
    sin_stride,
    SIZE: tl.constexpr,
    ROTARY: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """y = rotate(q[r]); keys[r, :, n] = rotate(k[r]), values[r, :, n] = v[r] at n = lengths[r], if there is that slot.

    rotate(x) = x1 cos1 - x2 sin1, x2 cos2 + x1 sin2 for the halves of the first ROTARY of SIZE features, in float32.
    Programs share the heads of q, then those of k and v. Bytes: 2 rows (heads + 2 kv_heads) SIZE itemsize.
    """
    r = tl.program_id(0).to(tl.int64)
    n = tl.load(lengths_ptr + r)
    inside = (n >= 0) & (n < max_length)
    position = tl.minimum(tl.maximum(n, 0), max_length - 1).to(tl.int64)
    cos_at, sin_at = cos_ptr + position * cos_stride, sin_ptr + position * sin_stride
    q_blocks = tl.cdiv(heads, BLOCK_H)
    block = tl.program_id(1)
    if block < q_blocks:
        h = block * BLOCK_H + tl.arange(0, BLOCK_H)
        q_at, y_at = q_ptr + r * q_strides[0], y_ptr + r * heads * SIZE
        _rotate(q_at, q_strides[1], y_at, SIZE, cos_at, sin_at, h, h < heads, SIZE, ROTARY, BLOCK_D)
    else:
        h = (block - q_blocks) * BLOCK_H + tl.arange(0, BLOCK_H)
        mask = (h < kv_heads) & inside
        k_at, slot = k_ptr + r * k_strides[0], keys_ptr + r * keys_strides[0] + position * keys_strides[2]
        _rotate(k_at, k_strides[1], slot, keys_strides[1], cos_at, sin_at, h, mask, SIZE, ROTARY, BLOCK_D)
        d = tl.arange(0, 2 * BLOCK_D)[None, :]
        mask = mask[:, None] & (d < SIZE)
        v = tl.load(v_ptr + r * v_strides[0] + h[:, None] * v_strides[1] + d, mask=mask)
        slot = values_ptr + r * values_strides[0] + position * values_strides[2]
        at = slot + h.to(tl.int64)[:, None] * values_strides[1] + d
        tl.store(at, v.to(values_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _rotate(
    x_ptr,
    x_stride,
    y_ptr,
    y_stride,
    cos_ptr,
    sin_ptr,
    h,
    h_mask,
    SIZE: tl.constexpr,
    ROTARY: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Heads h [BLOCK_H] of one row of x to y, those of h_mask; the features of both are contiguous."""
    half: tl.constexpr = ROTARY // 2
    d = tl.arange(0, BLOCK_D)
    d_mask = d < half
    cos1, cos2 = _halves(cos_ptr, half, d, d_mask)
    sin1, sin2 = _halves(sin_ptr, half, d, d_mask)
    x_at = x_ptr + h[:, None] * x_stride + d[None, :]
    y_at = y_ptr + h.to(tl.int64)[:, None] * y_stride + d[None, :]
    mask = h_mask[:, None] & d_mask[None, :]
    x1, x2 = _halves(x_at, half, 0, mask)
    tl.store(y_at, (x1 * cos1[None, :] - x2 * sin1[None, :]).to(y_ptr.dtype.element_ty), mask=mask)
    tl.store(y_at + half, (x2 * cos2[None, :] + x1 * sin2[None, :]).to(y_ptr.dtype.element_ty), mask=mask)
    if ROTARY < SIZE:
        d = tl.arange(0, 2 * BLOCK_D)[None, :]
        mask = h_mask[:, None] & (d >= ROTARY) & (d < SIZE)
        x = tl.load(x_ptr + h[:, None] * x_stride + d, mask=mask)
        tl.store(y_ptr + h.to(tl.int64)[:, None] * y_stride + d, x.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _halves(ptr, half: tl.constexpr, d, mask):
    first = tl.load(ptr + d, mask=mask, other=0.0).to(tl.float32)
    return first, tl.load(ptr + half + d, mask=mask, other=0.0).to(tl.float32)


def rotary_append(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, lengths: Tensor, keys: Tensor, values: Tensor
) -> Tensor:
    """q rotated at each row's length, [rows, heads, D]; k, rotated, and v go to that slot of the cache.

    q [rows, heads, D], k, v [rows, kv_heads, D], cos, sin [max_length or more, rotary_dim], lengths int32 [rows], keys,
    values [cache_rows, kv_heads, max_length, D], each in float32, bfloat16 or float16 and with its last dimension
    contiguous. A length outside the cache writes nothing there, and q is rotated as at the nearest that is inside.
    """
    rows, heads, size = q.shape
    kv_heads, max_length = keys.shape[1:3]
    y = torch.empty(rows, heads, size, dtype=q.dtype, device=q.device)
    if y.numel() == 0:
        return y
    rotary = cos.shape[1]
    blocks = triton.cdiv(heads, BLOCK_HEADS) + triton.cdiv(kv_heads, BLOCK_HEADS)
    with torch.cuda.device_of(q):
        rotary_kernel[(rows, blocks)](
            y,
            q,
            k,
            v,
            cos,
            sin,
            lengths,
            keys,
            values,
            heads,
            kv_heads,
            max_length,
            q.stride()[:2],
            k.stride()[:2],
            v.stride()[:2],
            keys.stride()[:3],
            values.stride()[:3],
            cos.stride(0),
            sin.stride(0),
            SIZE=size,
            ROTARY=rotary,
            BLOCK_H=BLOCK_HEADS,
            BLOCK_D=max(triton.next_power_of_2(size) // 2, 1),
        )
    return y
