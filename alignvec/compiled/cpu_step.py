"""csrc/cpu: the operators of a decode step on a CPU, with the arguments of `kernels.eager_step`.

float32 and bfloat16 are compiled, of one dtype in a call and with consecutive features; everything else goes to
`kernels.eager_step`. Lengths are read on the host.

What `prepare_...` returns is a call whose other arguments are settled and known to be compiled: it looks at what it is
given no more than the kernel does. None where torch has to run it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from alignvec.compiled.cpu import takes
from alignvec.kernels import eager_step

torch.library.define(
    "alignvec::cpu_rotary_append",
    "(Tensor q, Tensor k, Tensor v, Tensor cos, Tensor sin, Tensor lengths, Tensor(a!) keys, Tensor(b!) values, "
    "Tensor(c!) y) -> ()",
)
torch.library.define(
    "alignvec::cpu_decode_attention",
    "(Tensor q, Tensor keys, Tensor values, Tensor lengths, float scale, int window, Tensor(a!) y) -> ()",
)
torch.library.define("alignvec::cpu_gated", "(Tensor gate_up, int activation, Tensor(a!) y) -> ()")

ACTIVATIONS = {"silu": 0, "gelu": 1, "gelu_tanh": 2}  # csrc/cpu/types.h


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
    """`kernels.eager_step.add_rms_norm`, compiled: x, residual [tokens, features] -> [tokens, features]."""
    shared = (weight, deltas, columns, table, rows)
    run = prepare_add_rms_norm(*shared, eps=eps, offset=offset) if takes(x, residual) else None
    return run(x, residual) if run else eager_step.add_rms_norm(x, residual, *shared, eps=eps, offset=offset)


def prepare_add_rms_norm(
    weight: Tensor,
    deltas: Tensor | None,
    columns: Tensor,
    table: Tensor,
    rows: Tensor,
    *,
    eps: float,
    offset: float,
) -> Callable[[Tensor, Tensor], Tensor] | None:
    """x, residual [tokens, features] in float32 or bfloat16 -> [tokens, features]."""
    if not takes(weight, deltas):
        return None
    settled = (weight, None, deltas, None, columns, table, rows, None, eps, offset, False)
    kernel = torch.ops.alignvec.cpu_norm.default

    def run(x: Tensor, residual: Tensor) -> Tensor:
        y = x.new_empty(x.shape)
        kernel(x, residual, *settled, y)
        return y

    return run


def rotary_append(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, lengths: Tensor, keys: Tensor, values: Tensor
) -> Tensor:
    """`kernels.eager_step.rotary_append`, compiled: q [rows, heads, D] -> [rows, heads, D]."""
    run = prepare_rotary_append(cos, sin, keys, values) if _alike(q, k, v, keys) else None
    return run(q, k, v, lengths) if run else eager_step.rotary_append(q, k, v, cos, sin, lengths, keys, values)


def prepare_rotary_append(
    cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor
) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor] | None:
    """q [rows, heads, D], k, v [rows, kv_heads, D] in the cache's dtype, lengths int32 [rows] -> [rows, heads, D]."""
    if not _alike(keys, values, cos, sin):
        return None
    kernel = torch.ops.alignvec.cpu_rotary_append.default

    def run(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
        y = q.new_empty(q.shape)
        kernel(q, k, v, cos, sin, lengths, keys, values, y)
        return y

    return run


def decode_attention(q: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, *, scale: float, window: int) -> Tensor:
    """`kernels.eager_step.decode_attention`, compiled: q [rows, heads, D] -> [rows, heads D]."""
    run = prepare_decode_attention(keys, values, scale=scale, window=window) if _alike(q, keys) else None
    return run(q, lengths) if run else eager_step.decode_attention(q, keys, values, lengths, scale=scale, window=window)


def prepare_decode_attention(
    keys: Tensor, values: Tensor, *, scale: float, window: int
) -> Callable[[Tensor, Tensor], Tensor] | None:
    """q [rows, heads, D] in the cache's dtype, lengths int32 [rows] -> [rows, heads D]."""
    if not _alike(keys, values):
        return None
    kernel = torch.ops.alignvec.cpu_decode_attention.default

    def run(q: Tensor, lengths: Tensor) -> Tensor:
        y = q.new_empty(q.shape)
        kernel(q, keys, values, lengths, scale, window, y)
        return y.flatten(1)

    return run


def gated(gate_up: Tensor, *, activation: str) -> Tensor:
    """`kernels.eager_step.gated`, compiled: gate_up [tokens, 2 features] -> [tokens, features]."""
    if gate_up.dim() == 2 and takes(gate_up):
        return prepare_gated(activation)(gate_up)
    return eager_step.gated(gate_up, activation=activation)


def prepare_gated(activation: str) -> Callable[[Tensor], Tensor]:
    """gate_up [tokens, 2 features] in float32 or bfloat16 -> [tokens, features]."""
    number, kernel = ACTIVATIONS[activation], torch.ops.alignvec.cpu_gated.default

    def run(gate_up: Tensor) -> Tensor:
        y = gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)
        kernel(gate_up, number, y)
        return y

    return run


def _alike(*tensors: Tensor) -> bool:
    """Whether they are of one dtype that csrc/cpu has, with consecutive features."""
    return takes(*tensors) and len({t.dtype for t in tensors}) == 1
