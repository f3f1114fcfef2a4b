"""Embedding lookups."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from alignvec.kernels import operands
from alignvec.ops.backend import by_token, kernel, no_gradients, unview

torch.library.define(
    "alignvec::embedding",
    "(Tensor ids, Tensor weight, str[] specs, Tensor[] parts, Tensor columns, Tensor table, Tensor rows, str backend) "
    "-> Tensor",
)
embedding = torch.ops.alignvec.embedding


@torch.library.impl("alignvec::embedding", "CompositeExplicitAutograd")
def _embedding(
    ids: Tensor,
    weight: Tensor,
    specs: list[str],
    parts: list[Tensor],
    columns: Tensor,
    table: Tensor,
    rows: Tensor,
    backend: str,
) -> Tensor:
    """`E[t] + sum_i table[row, columns[i]] D_i[t]`: ids [...] -> [..., embedding_dim]."""
    vectors = operands.parse(specs, parts, (weight.shape[0], weight.shape[1]))
    run = kernel(weight.device, backend, "embedding", "embedding")
    y: Tensor = run(ids.reshape(-1), weight, vectors, columns, table, rows)
    return unview(y, *ids.shape, weight.shape[1])


@torch.library.register_fake("alignvec::embedding")
def _embedding_fake(ids: Tensor, weight: Tensor, *_: Any) -> Tensor:
    return weight.new_empty(*ids.shape, weight.shape[1])


def _embedding_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.others = no_gradients(inputs[2:])
    ctx.save_for_backward(inputs[0])
    ctx.shape = inputs[1].shape


def _embedding_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (ids,) = ctx.saved_tensors
    grad_weight = grad.new_zeros(ctx.shape).index_add_(0, ids.reshape(-1), by_token(grad))
    return None, grad_weight, *ctx.others


torch.library.register_autograd("alignvec::embedding", _embedding_backward, setup_context=_embedding_context)
