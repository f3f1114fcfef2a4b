"""What alignvec is measured against: merged weights, one product over concatenated K, plain torch, and re-merging."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from alignvec.kernels.operands import Operand
from alignvec.kernels.reference import token_coefficients
from bench.layers import Coefficients, Weights

Call = Callable[[], object]
EXPRESSION, COMPILED = "torch expression", "torch.compile"
CHAIN = "torch copy, add_"  # what users write to merge again


def merged(x: Tensor, weights: Weights) -> Tensor:
    """The vendor's product with weights that a mix is merged into: one mix for all rows."""
    return F.linear(x, weights.matrix)


def concatenated(x: Tensor, weights: Weights, vectors: Sequence[Sequence[Operand]], c: Coefficients) -> Call:
    """Dense vectors as one product: [x, c_1 x, ..., c_k x] [W, D_1, ..., D_k]^T. Both sides are laid out before."""
    factors = token_coefficients(c.table, c.rows, c.columns, x.shape[0])
    left = torch.cat([x, *(factors[:, i, None].to(x.dtype) * x for i in range(factors.shape[1]))], 1)
    right = torch.cat([weights.matrix, *_stacked(vectors)], 1)
    return lambda: F.linear(left, right)


def low_rank(x: Tensor, weights: Weights, vectors: Sequence[Sequence[Operand]], c: Coefficients) -> Call:
    """Adapters side by side: x W^T + (c * (x A^T)) B^T, A [k rank, in] and B [out, k rank] of each projection."""
    a = torch.cat([operand.parts[0] for own in vectors for operand in own])
    b = [torch.cat([operand.parts[1] for operand in own], 1).t() for own in vectors]
    outs, ranks = [factor.shape[1] for factor in b], [factor.shape[0] for factor in b]
    factors = token_coefficients(c.table, c.rows, c.columns, x.shape[0])
    scale = factors.repeat_interleave(ranks[0] // factors.shape[1], 1).repeat(1, len(outs)).to(x.dtype)

    def call() -> Tensor:
        y, t = F.linear(x, weights.matrix), F.linear(x, a) * scale
        for part, left, right in zip(y.split(outs, 1), t.split(ranks, 1), b, strict=True):
            part.addmm_(left, right)
        return y

    return call


def kept(x: Tensor, high: Tensor, low: Tensor) -> Tensor:
    """A materialised mix that has not changed, as the sum of two 16-bit halves: two products, added as float32."""
    if not x.is_cuda:
        return (F.linear(x.float(), high.float()) + F.linear(x.float(), low.float())).to(x.dtype)
    total = torch.mm(x, high.t(), out_dtype=torch.float32)
    total += torch.mm(x, low.t(), out_dtype=torch.float32)
    return total.to(x.dtype)


def remerges(
    weights: Weights, vectors: Sequence[Sequence[Operand]], c: Coefficients, out: Tensor, compiled: bool
) -> dict[str, Call]:
    """Ways to write the mix of row 0 of dense vectors into `out`, by name."""
    w, deltas = weights.matrix, _stacked(vectors)
    factors = [float(value) for value in c.table[0, c.columns]]
    live = c.table[0, c.columns]

    calls: dict[str, Call] = {
        EXPRESSION: partial(expression, out, w, factors, deltas),
        CHAIN: partial(in_place, out, w, factors, deltas),
    }
    if compiled:
        run = compiled_mix()
        calls[COMPILED] = lambda: run(out, w, live, *deltas)
    return calls


def expression(out: Tensor, w: Tensor, factors: Sequence[float], deltas: Sequence[Tensor]) -> None:
    """The formula as it is written down: w + c_1 d_1 + ... + c_k d_k, a tensor a step."""
    total = w
    for factor, delta in zip(factors, deltas, strict=True):
        total = total + factor * delta
    out.copy_(total)


def in_place(out: Tensor, w: Tensor, factors: Sequence[float], deltas: Sequence[Tensor]) -> None:
    """Additions into the copy that is written."""
    out.copy_(w)
    for factor, delta in zip(factors, deltas, strict=True):
        out.add_(delta, alpha=factor)


def compiled_mix() -> Callable[..., None]:
    """`_mix(out, w, live, *deltas)` by torch.compile: float32 sums, coefficients float32 [k] on the device."""
    return torch.compile(_mix, dynamic=False, fullgraph=True)


def _mix(out: Tensor, w: Tensor, live: Tensor, *deltas: Tensor) -> None:
    total = w.float()
    for i, delta in enumerate(deltas):
        total = total + live[i] * delta.float()
    out.copy_(total)


def _stacked(vectors: Sequence[Sequence[Operand]]) -> list[Tensor]:
    """Each dense vector of the projections, one below the other: [out, in]."""
    return [torch.cat([own[i].parts[0] for own in vectors]) for i in range(len(vectors[0]))]
