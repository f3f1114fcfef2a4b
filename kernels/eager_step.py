"""One decode step's operators in plain torch: few calls, since a small model's step on a CPU is mostly calls.

Lengths that lie in host memory are read; elsewhere nothing is, and attention covers the whole cache under a mask.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor
from torch.nn import functional as F

from alignvec.kernels import eager
from alignvec.kernels.mixes import widened


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
    """`residual += x`, rounded to its dtype, then `eager.rms_norm` of it: x, residual [tokens, features]."""
    return eager.rms_norm(residual.add_(x), weight, deltas, columns, table, rows, eps=eps, offset=offset)


def rotary_append(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, lengths: Tensor, keys: Tensor, values: Tensor
) -> Tensor:
    """q and k rotated at `lengths`, in float32 and rounded once; k and v into those slots of the cache.

    q [rows, heads, D], k, v [rows, kv_heads, D], cos, sin [max_length, rotary_dim], keys, values [cache_rows, kv_heads,
    max_length, D] -> [rows, heads, D]. A row whose length is outside the cache writes nothing.
    """
    slots = keys.shape[2]
    at = lengths.clamp(0, slots - 1)
    joined = torch.cat((q, k), 1)
    turned = _rotate(joined, cos.index_select(0, at).unsqueeze_(1), sin.index_select(0, at).unsqueeze_(1))
    q, k = turned[:, : q.shape[1]], turned[:, q.shape[1] :]
    row = torch.arange(len(k), device=k.device)
    if lengths.is_cpu:
        inside = [r for r, length in enumerate(lengths.tolist()) if 0 <= length < slots]
        if len(inside) < len(k):
            row, at, k, v = row[inside], at[inside], k[inside], v[inside]
    else:
        kept = (at == lengths)[:, None, None]
        k, v = torch.where(kept, k, keys[row, :, at]), torch.where(kept, v, values[row, :, at])
    keys[row, :, at] = k.to(keys.dtype)
    values[row, :, at] = v.to(values.dtype)
    return q.contiguous()


def decode_attention(q: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, *, scale: float, window: int) -> Tensor:
    """Attention of row r over positions `max(0, lengths[r] + 1 - window)` to `lengths[r]`, from 0 with window 0.

    q [rows, heads, D], keys, values [cache_rows, kv_heads, max_length, D], lengths int32 [rows] -> [rows, heads D].
    """
    rows, heads, size = q.shape
    # The heads that share keys are the queries of one head.
    grouped = q.reshape(rows, keys.shape[1], heads // keys.shape[1], size)
    if not lengths.is_cpu:
        return attend_masked(grouped, keys[:rows], values[:rows], lengths, scale, window).reshape(rows, heads * size)
    last = keys.shape[2] - 1
    ends = [min(max(length, 0), last) + 1 for length in lengths.tolist()]
    parts, row = [], 0
    for end, same in itertools.groupby(ends):
        block = slice(row, row := row + len(list(same)))
        filled = slice(max(0, end - window) if window else 0, end)
        attended = F.scaled_dot_product_attention(
            grouped[block], keys[block, :, filled], values[block, :, filled], scale=scale
        )
        parts.append(attended)
    return (parts[0] if len(parts) == 1 else torch.cat(parts)).reshape(rows, heads * size)


def gated(gate_up: Tensor, *, activation: str) -> Tensor:
    """`act(gate) up` in float32, rounded once: gate_up [tokens, 2 features] -> [tokens, features]."""
    gate, up = widened(gate_up).chunk(2, -1)
    if activation == "silu":
        gate = F.silu(gate)
    else:
        gate = F.gelu(gate, approximate="tanh" if activation == "gelu_tanh" else "none")
    return gate.mul_(up).to(gate_up.dtype)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`x cos + rotate_half(x) sin` on the first features, as many as cos has: x [rows, heads, D], cos [rows, 1, n]."""
    size = cos.shape[-1]
    wide = widened(x[..., :size])
    half = size // 2
    swapped = torch.cat((-wide[..., half:], wide[..., :half]), -1)
    turned = (wide * widened(cos)).addcmul_(swapped, widened(sin)).to(x.dtype)
    return turned if size == x.shape[-1] else torch.cat((turned, x[..., size:]), -1)


def attend_masked(q: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, scale: float, window: int) -> Tensor:
    """Attention over the whole cache under a mask, with no length read on the host: q [rows, kv_heads, group, D]."""
    position = torch.arange(keys.shape[2], device=keys.device)
    length = lengths.clamp(0, keys.shape[2] - 1)[:, None]
    seen = (position <= length) & (position > length - window) if window else position <= length
    # What lies in slots that are not filled may be NaN, which a weight of 0 does not remove.
    unseen = ~seen[:, None, :, None]
    keys, values = (widened(cache.masked_fill(unseen, 0)) for cache in (keys, values))
    return F.scaled_dot_product_attention(widened(q), keys, values, seen[:, None, None, :], scale=scale).to(q.dtype)
