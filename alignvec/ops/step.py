"""What a decode step does beside its projections, one token a row: norms after a residual, attention, activations.

They read no value on the host where the tensors are on a GPU, so that a step can be captured. None has a gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from alignvec.errors import AlignvecError
from alignvec.ops.backend import kernel
from alignvec.planner.backends import check_choice

ACTIVATIONS = ("silu", "gelu", "gelu_tanh")
EAGER = "eager_step"

torch.library.define(
    "alignvec::add_rms_norm",
    "(Tensor x, Tensor(a!) residual, Tensor weight, Tensor? deltas, Tensor columns, Tensor table, Tensor rows, "
    "float eps, float offset, str backend) -> Tensor",
)
torch.library.define(
    "alignvec::rotary_append",
    "(Tensor q, Tensor k, Tensor v, Tensor cos, Tensor sin, Tensor lengths, Tensor(a!) keys, Tensor(b!) values, "
    "str backend) -> Tensor",
)
torch.library.define(
    "alignvec::decode_attention",
    "(Tensor q, Tensor keys, Tensor values, Tensor lengths, float scale, int window, str backend) -> Tensor",
)
torch.library.define("alignvec::gated", "(Tensor gate_up, str activation, str backend) -> Tensor")
add_rms_norm = torch.ops.alignvec.add_rms_norm
rotary_append = torch.ops.alignvec.rotary_append
decode_attention = torch.ops.alignvec.decode_attention
gated = torch.ops.alignvec.gated


@torch.library.impl("alignvec::add_rms_norm", "CompositeExplicitAutograd")
def _add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    deltas: Tensor | None,
    columns: Tensor,
    table: Tensor,
    rows: Tensor,
    eps: float,
    offset: float,
    backend: str,
) -> Tensor:
    """`residual += x`, rounded to its dtype, and `residual / rms(residual) (offset + w + sum_i c_i d_i)`, rounded once.

    x, residual [tokens, features], deltas [k, features] or None for a norm without vectors -> [tokens, features].
    """
    if x.shape != residual.shape or x.dtype != residual.dtype:
        raise AlignvecError(
            f"add_rms_norm adds x {list(x.shape)} {x.dtype} to residual {list(residual.shape)} {residual.dtype}; "
            "pass two of one shape and dtype"
        )
    if residual.stride(-1) != 1:
        raise AlignvecError("add_rms_norm writes to residual, whose features must be contiguous; pass it so")
    run = kernel(x.device, backend, "norm", "add_rms_norm", EAGER)
    y: Tensor = run(x, residual, weight, deltas, columns, table, rows, eps=eps, offset=offset)
    return y


@torch.library.impl("alignvec::rotary_append", "CompositeExplicitAutograd")
def _rotary_append(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    lengths: Tensor,
    keys: Tensor,
    values: Tensor,
    backend: str,
) -> Tensor:
    """q rotated at each row's length; k, rotated, and v go to that slot of the cache, if it has such a slot.

    q [rows, heads, D], k, v [rows, kv_heads, D] with D contiguous; cos, sin [at least max_length, rotary_dim], with
    rotary_dim <= D and the halves of transformers' `rotate_half`; lengths int32 [rows]; keys, values [at least rows,
    kv_heads, max_length, D] -> [rows, heads, D], contiguous. float32 inside, rounded once.
    """
    _check_cache("rotary_append", q, lengths, keys, values)
    rotary = cos.shape[-1]
    if cos.shape != sin.shape or rotary > q.shape[2] or rotary % 2 or cos.shape[0] < keys.shape[2]:
        raise AlignvecError(
            f"rotary_append got cos {list(cos.shape)} and sin {list(sin.shape)} for heads of {q.shape[2]} and a cache "
            f"of {keys.shape[2]} positions; both must be [at least max_length, an even rotary_dim up to D]"
        )
    if k.shape != v.shape or k.shape != (q.shape[0], keys.shape[1], q.shape[2]):
        raise AlignvecError(
            f"rotary_append got k {list(k.shape)} and v {list(v.shape)} for q {list(q.shape)} and a cache of "
            f"{keys.shape[1]} heads; both must be [rows, kv_heads, D]"
        )
    run = kernel(q.device, backend, "rotary", "rotary_append", EAGER)
    turned: Tensor = run(q, k, v, cos, sin, lengths, keys, values)
    return turned


@torch.library.impl("alignvec::decode_attention", "CompositeExplicitAutograd")
def _decode_attention(
    q: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, scale: float, window: int, backend: str
) -> Tensor:
    """Attention of row r over positions `max(0, lengths[r] + 1 - window)` to `lengths[r]`, from 0 with window 0.

    q [rows, heads, D], keys, values [at least rows, kv_heads, max_length, D] in q's dtype, heads a multiple of
    kv_heads; lengths int32 [rows], taken for the nearest that the cache has -> [rows, heads D]. Softmax in float32.
    """
    _check_cache("decode_attention", q, lengths, keys, values)
    if q.dtype != keys.dtype or q.dtype != values.dtype:
        raise AlignvecError(
            f"decode_attention got q in {q.dtype} and a cache in {keys.dtype} and {values.dtype}; use one dtype"
        )
    if window < 0:
        raise AlignvecError(f"decode_attention got window {window}; pass a number of positions, or 0 for all of them")
    run = kernel(q.device, backend, "attention", "decode_attention", EAGER)
    attended: Tensor = run(q, keys, values, lengths, scale=scale, window=window)
    return attended


@torch.library.impl("alignvec::gated", "CompositeExplicitAutograd")
def _gated(gate_up: Tensor, activation: str, backend: str) -> Tensor:
    """`act(gate) up` of gate_up [tokens, 2 features] -> [tokens, features]; float32 inside, rounded once.

    activation: "silu", "gelu" or "gelu_tanh".
    """
    check_choice("activation", activation, ACTIVATIONS)
    if gate_up.shape[-1] % 2:
        raise AlignvecError(f"gated got {gate_up.shape[-1]} features; pass gate and up of the same size side by side")
    y: Tensor = kernel(gate_up.device, backend, "gate", "gated", EAGER)(gate_up, activation=activation)
    return y


def _check_cache(operator: str, q: Tensor, lengths: Tensor, keys: Tensor, values: Tensor) -> None:
    rows, heads, size = q.shape
    if keys.shape != values.shape or keys.shape[0] < rows or keys.shape[3] != size or heads % keys.shape[1]:
        raise AlignvecError(
            f"{operator} got q {list(q.shape)}, keys {list(keys.shape)} and values {list(values.shape)}; a cache must "
            "be [at least rows, a divisor of heads, max_length, D]"
        )
    if lengths.shape != (rows,) or lengths.dtype != torch.int32:
        raise AlignvecError(
            f"{operator} got lengths {list(lengths.shape)} in {lengths.dtype}; pass int32 [{rows}], one a row of q"
        )


@torch.library.register_fake("alignvec::add_rms_norm")
def _add_rms_norm_fake(x: Tensor, *_: object) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.register_fake("alignvec::rotary_append")
def _rotary_append_fake(q: Tensor, *_: object) -> Tensor:
    return q.new_empty(q.shape)


@torch.library.register_fake("alignvec::decode_attention")
def _decode_attention_fake(q: Tensor, *_: object) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[1] * q.shape[2])


@torch.library.register_fake("alignvec::gated")
def _gated_fake(gate_up: Tensor, *_: object) -> Tensor:
    return gate_up.new_empty(*gate_up.shape[:-1], gate_up.shape[-1] // 2)
