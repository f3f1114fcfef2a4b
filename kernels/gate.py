"""The gated activation of an MLP in Triton, on the output of gate and up side by side."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


@triton.jit
def gate_kernel(y_ptr, x_ptr, features, x_stride, ACTIVATION: tl.constexpr, BLOCK_D: tl.constexpr):
    """y[t] = act(x[t, :features]) x[t, features:], in float32, rounded once.

    silu: g / (1 + e^-g). gelu: g (1 + erf(g / sqrt(2))) / 2. gelu_tanh: g / (1 + e^(-2 u)) with
    u = sqrt(2 / pi) (g + 0.044715 g^3), which is g (1 + tanh u) / 2. Bytes: 3 tokens features itemsize.
    """
    t = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask = d < features
    at = x_ptr + t * x_stride + d
    gate = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(at + features, mask=mask, other=0.0).to(tl.float32)
    if ACTIVATION == "gelu":
        active = 0.5 * gate * (1 + tl.erf(gate * 0.7071067811865476))
    else:
        inner = gate
        if ACTIVATION == "gelu_tanh":
            inner = 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)
        active = gate / (1 + tl.exp(-inner))
    tl.store(y_ptr + t * features + d, (active * up).to(y_ptr.dtype.element_ty), mask=mask)


def gated(gate_up: Tensor, *, activation: str) -> Tensor:
    """`act(gate) up`: gate_up [tokens, 2 features], gate first -> [tokens, features].

    float32, bfloat16 or float16; activation: "silu", "gelu" or "gelu_tanh".
    """
    if gate_up.stride(-1) != 1:
        gate_up = gate_up.contiguous()
    tokens, features = gate_up.shape[0], gate_up.shape[1] // 2
    y = torch.empty(tokens, features, dtype=gate_up.dtype, device=gate_up.device)
    if y.numel() == 0:
        return y
    with torch.cuda.device_of(gate_up):
        gate_kernel[(tokens, triton.cdiv(features, BLOCK))](
            y, gate_up, features, gate_up.stride(0), ACTIVATION=activation, BLOCK_D=BLOCK
        )
    return y
