"""A layer's operators for a caller that makes one call again and again: what stays the same is found out once.

Outside of torch's dispatcher: nothing traces, differentiates or checks these calls.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from types import ModuleType

import torch
from torch import Tensor

from alignvec import planner
from alignvec.kernels.operands import Operand
from alignvec.ops.backend import kernel
from alignvec.ops.linear import joined
from alignvec.ops.step import EAGER

Into = Callable[[Tensor, Tensor], None]  # x, y
Layer = tuple[Tensor, Tensor | None, Sequence[Operand], Tensor | None, Tensor]


def linear_group(
    layers: Sequence[Layer], table: Tensor, rows: Tensor, execution: str, precision: str, backend: str
) -> Callable[[Tensor], Tensor]:
    """`alignvec::linear_group` of these layers: x [tokens, in_features] -> [tokens, sum of out_features].

    layers: weight [out, in], bias [out], operands, their bias deltas [k, out] and columns int32 [k] of each.
    """
    weight, _, operands, *_ = layers[0]
    chosen = planner.resolve_backend(weight.device.type, backend)
    specs = [operand.spec for operand in operands]
    parts = [part for operand in operands for part in operand.parts]
    run = planner.linear_module(chosen)
    how = {"precision": precision}
    if chosen == "cpp":
        calls = [run.prepared(*layer, table, rows, execution, precision) for layer in layers]
        if None not in calls:
            return _side_by_side(calls, [layer[0].shape[0] for layer in layers])
    if chosen in planner.GROUPED:
        from alignvec.kernels.packing import Projection

        projections = [Projection(*layer) for layer in layers]

        def grouped(x: Tensor) -> Tensor:
            own = planner.choose(execution, x, weight, specs, parts, precision)
            return joined(run.linear_group(x, projections, table, rows, None, execution=own, **how))

        return grouped

    def each(x: Tensor) -> Tensor:
        own = planner.choose(execution, x, weight, specs, parts, precision)
        return joined([run.linear(x, *layer, table, rows, None, execution=own, **how) for layer in layers])

    return each


def _side_by_side(calls: Sequence[Into], sizes: Sequence[int]) -> Callable[[Tensor], Tensor]:
    def run(x: Tensor) -> Tensor:
        if x.shape[0] == 1:  # a row's parts are contiguous
            y = x.new_empty(1, sum(sizes))
            for call, part in zip(calls, y.split(sizes, 1), strict=True):
                call(x, part)
            return y
        results = [x.new_empty(x.shape[0], size) for size in sizes]
        for call, part in zip(calls, results, strict=True):
            call(x, part)
        return results[0] if len(results) == 1 else torch.cat(results, 1)

    return run


def add_rms_norm(
    weight: Tensor,
    deltas: Tensor | None,
    columns: Tensor,
    table: Tensor,
    rows: Tensor,
    *,
    eps: float,
    offset: float,
    backend: str,
) -> Callable[[Tensor, Tensor], Tensor]:
    """`alignvec::add_rms_norm` of this norm: x, residual [tokens, features] in one dtype -> [tokens, features]."""
    settled = (weight, deltas, columns, table, rows)
    if (step := _compiled(weight.device, backend)) is not None:
        own: Callable[[Tensor, Tensor], Tensor] | None
        own = step.prepare_add_rms_norm(*settled, eps=eps, offset=offset)
        if own is not None:
            return own
    run = kernel(weight.device, backend, "norm", "add_rms_norm", EAGER)
    return lambda x, residual: run(x, residual, *settled, eps=eps, offset=offset)


def attention(
    cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, *, scale: float, window: int, backend: str
) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """`alignvec::rotary_append`, then `alignvec::decode_attention`, on this cache.

    q [rows, heads, D], k, v [rows, kv_heads, D] in the cache's dtype, lengths int32 [rows] -> [rows, heads D].
    """
    if (step := _compiled(keys.device, backend)) is not None:
        append = step.prepare_rotary_append(cos, sin, keys, values)
        attend = step.prepare_decode_attention(keys, values, scale=scale, window=window)
        if append is not None and attend is not None:
            return lambda q, k, v, lengths: attend(append(q, k, v, lengths), lengths)
    turned = kernel(keys.device, backend, "rotary", "rotary_append", EAGER)
    run = kernel(keys.device, backend, "attention", "decode_attention", EAGER)

    def both(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
        q = turned(q, k, v, cos, sin, lengths, keys, values)
        y: Tensor = run(q, keys, values, lengths, scale=scale, window=window)
        return y

    return both


def gated(like: Tensor, activation: str, backend: str) -> Callable[[Tensor], Tensor]:
    """`alignvec::gated`: gate_up [tokens, 2 features] of the dtype and device of `like` -> [tokens, features]."""
    if (step := _compiled(like.device, backend)) is not None and step.takes(like):
        own: Callable[[Tensor], Tensor] = step.prepare_gated(activation)
        return own
    run = kernel(like.device, backend, "gate", "gated", EAGER)
    return lambda gate_up: run(gate_up, activation=activation)


def _compiled(device: torch.device, backend: str) -> ModuleType | None:
    """csrc/cpu's side of a decode step, where that is what runs."""
    if planner.beside_linear(device.type, backend) != "cpp":
        return None
    return importlib.import_module("alignvec.compiled.cpu_step")  # on first use: it loads a library
