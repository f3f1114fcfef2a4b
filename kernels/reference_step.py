"""The operators of a decode step in plain torch and float64: the truth every backend is tested against."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from alignvec.kernels.reference import token_coefficients


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
) -> tuple[Tensor, Tensor]:
    """`residual + x` in the residual's dtype, and the norm of that, float64; both [tokens, features]."""
    total = (x.double() + residual.double()).to(residual.dtype)
    wide = total.double()
    scale = offset + weight.double()
    if deltas is not None:
        scale = scale + token_coefficients(table, rows, columns, len(x)).double() @ deltas.double()
    return total, wide / (wide.square().mean(-1, keepdim=True) + eps).sqrt() * scale


def rotate(x: Tensor, cos: Tensor, sin: Tensor, lengths: Tensor) -> Tensor:
    """Each row of x [rows, heads, D] turned to position `lengths[row]`, float64: cos, sin [max_length, rotary_dim]."""
    size = cos.shape[1]
    wide, at = x.double(), lengths.long()
    first, second = wide[..., :size].chunk(2, -1)
    turned = wide[..., :size] * cos[at, None].double() + torch.cat((-second, first), -1) * sin[at, None].double()
    return torch.cat((turned, wide[..., size:]), -1)


def decode_attention(q: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, scale: float, window: int) -> Tensor:
    """Row by row and head by head, float64: q [rows, heads, D], keys, values [rows, kv_heads, max_length, D]."""
    rows, heads, _ = q.shape
    y = torch.zeros(q.shape, dtype=torch.float64, device=q.device)
    for row in range(rows):
        end = int(lengths[row]) + 1
        filled = slice(max(0, end - window) if window else 0, end)
        for head in range(heads):
            kv_head = head * keys.shape[1] // heads
            scores = scale * keys[row, kv_head, filled].double() @ q[row, head].double()
            y[row, head] = scores.softmax(0) @ values[row, kv_head, filled].double()
    return y.flatten(1)


def gated(gate_up: Tensor, activation: str) -> Tensor:
    """`act(gate) up` of gate_up [tokens, 2 features], float64."""
    gate, up = gate_up.double().chunk(2, -1)
    if activation == "silu":
        return F.silu(gate) * up
    return F.gelu(gate, approximate="tanh" if activation == "gelu_tanh" else "none") * up
