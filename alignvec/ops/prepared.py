"""Linear layers for a caller that makes one call again and again: what does not depend on x is found out once.

Outside of torch's dispatcher: nothing traces or differentiates these calls.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from alignvec import planner
from alignvec.kernels.operands import Operand
from alignvec.ops.linear import joined

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


def _side_by_side(
    calls: Sequence[Callable[[Tensor, Tensor], None]], sizes: Sequence[int]
) -> Callable[[Tensor], Tensor]:
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
