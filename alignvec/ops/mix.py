"""A parameter with its vectors added: for modules that use it in ways of their own, and for `Alignment.materialise`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from alignvec.kernels import operands
from alignvec.kernels.operands import Operand
from alignvec.ops.backend import kernel, no_gradients

torch.library.define(
    "alignvec::mix",
    "(Tensor weight, str[] specs, Tensor[] parts, Tensor columns, Tensor table, Tensor rows, SymInt batch) -> Tensor",
)
torch.library.define(
    "alignvec::materialise",
    "(Tensor weight, str[] specs, Tensor[] parts, Tensor columns, Tensor table, Tensor rows, Tensor(a!) out, "
    "str backend) -> ()",
)
mix = torch.ops.alignvec.mix
materialise = torch.ops.alignvec.materialise


@torch.library.impl("alignvec::mix", "CompositeExplicitAutograd")
def _mix(
    weight: Tensor,
    specs: list[str],
    parts: list[Tensor],
    columns: Tensor,
    table: Tensor,
    rows: Tensor,
    batch: int,
) -> Tensor:
    """`W + sum_i table[row, columns[i]] D_i`, summed in float32, in float64 of a float64 weight.

    weight [*, in], operands of [prod(*), in] -> [batch, *, in].
    """
    from alignvec.kernels import eager

    return eager.mix(weight, _operands(specs, parts, weight), columns, table, rows, batch)


def _operands(specs: list[str], parts: list[Tensor], weight: Tensor) -> list[Operand]:
    return operands.parse(specs, parts, operands.matrix_shape(weight))


@torch.library.register_fake("alignvec::mix")
def _mix_fake(
    weight: Tensor,
    specs: list[str],
    parts: list[Tensor],
    columns: Tensor,
    table: Tensor,
    rows: Tensor,
    batch: int,
) -> Tensor:
    dtype = torch.promote_types(weight.dtype, torch.float32)
    return torch.empty(batch, *weight.shape, dtype=dtype, device=weight.device)


def _mix_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.others = no_gradients(inputs[1:])
    ctx.dtype = inputs[0].dtype


def _mix_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return grad.sum(0).to(ctx.dtype), *ctx.others


torch.library.register_autograd("alignvec::mix", _mix_backward, setup_context=_mix_context)


@torch.library.impl("alignvec::materialise", "CompositeExplicitAutograd")
def _materialise(
    weight: Tensor,
    specs: list[str],
    parts: list[Tensor],
    columns: Tensor,
    table: Tensor,
    rows: Tensor,
    out: Tensor,
    backend: str,
) -> None:
    """`out = round(W + sum_i table[0, columns[i]] D_i)` in W's dtype, one pass: weight and out [rows, in], apart."""
    run = kernel(weight.device, backend, "materialise", "materialise")
    run(weight, _operands(specs, parts, weight), columns, table, rows, out=out)


@torch.library.register_fake("alignvec::materialise")
def _materialise_fake(*_: Any) -> None:
    return None
