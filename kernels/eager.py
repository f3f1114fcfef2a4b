"""The operator in fast plain torch: what CPUs run, and any other device without Triton.

Where the coefficients lie in host memory they are read: vectors at zero then cost nothing, and neighbouring tokens
with one mix share its formation. Elsewhere nothing is read back, and every token carries its coefficients.
Weights of 16 bits are raised to float32 a block of output rows at a time, small enough to stay in cache: products are
exact, sums are float32, the result is rounded once, and no float32 copy of a large weight is ever made.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor
from torch.nn import functional as F

from alignvec.kernels.reference import token_coefficients

# Weights in a block: 1 MiB as float32, a second-level cache. Much smaller blocks would starve a GEMM's threads.
BLOCK_WEIGHTS = 1 << 18

# Forming a mix moves 12 bytes a weight and vector; a further GEMM spends 2 FLOPs a weight, vector and token. At 30 GB/s
# and 60 GFLOP/s a core, small GEMMs being slower, they break even near 8 tokens a mix. Weights of 16 bits have to be
# raised to float32 for the GEMM anyway, which is half of the work of mixing them.
COMBINE_TOKENS = {2: 4, 4: 8, 8: 8}

# One mix as (vector, coefficient) pairs without the zeros, and a span of tokens [first, last) that share it.
Mix = list[tuple[int, float]]
Run = tuple[int, int, Mix]


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    deltas: Tensor,
    bias_deltas: Tensor | None,
    columns: Tensor,
    table: Tensor,
    rows: Tensor,
    token_rows: Tensor | None = None,
    *,
    execution: str = "auto",
    precision: str = "exact",
) -> Tensor:
    """`y[m] = x[m] W^T + b + sum_i c[m, i] (x[m] D_i^T + b_i)`, rounded once, to x's dtype.

    x [tokens, in], weight [out, in], bias [out], deltas [k, out, in], bias_deltas [k, out] -> [tokens, out]; the other
    arguments and the row rule are those of `reference.token_coefficients`.

    `execution="split"` adds weighted products, "combine" forms one mix for each run of tokens, "auto" takes the
    cheaper. `precision="merged"` rounds the mix to the weight's dtype, as a stored merge would, where all tokens share
    it; tokens of different mixes stay exact, and so does "split".
    """
    runs = _runs(x.shape[0], columns, table, rows, token_rows) if x.is_cpu else None
    if runs:
        merged = precision == "merged" and len(runs) == 1
        if execution == "auto":
            break_even = COMBINE_TOKENS[weight.element_size()] * len(runs)
            execution = "combine" if merged or x.shape[0] >= break_even else "split"
        if execution == "combine":
            return _combine(x, weight, bias, deltas, bias_deltas, runs, merged)
        if len(runs) == 1:
            return _split(x, weight, bias, deltas, bias_deltas, runs[0][2])
    c = token_coefficients(table, rows, columns, x.shape[0], token_rows)
    used = {i for *_, mix in runs for i, _ in mix} if runs else range(len(columns))
    return _split(x, weight, bias, deltas, bias_deltas, [(i, c[:, i, None]) for i in used])


def _split(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    deltas: Tensor,
    bias_deltas: Tensor | None,
    mix: Mix | list[tuple[int, Tensor]],
) -> Tensor:
    """A product for the base and one for each vector; coefficients are floats, or [tokens, 1] one for each token."""
    compute = torch.promote_types(x.dtype, torch.float32)
    wide = x.to(compute)
    y: Tensor | None = None
    for block in _blocks(weight):
        part = F.linear(wide, _widen(weight, block, compute), None if bias is None else _widen(bias, block, compute))
        for i, c in mix:
            delta = _widen(deltas[i], block, compute).t()
            if isinstance(c, float):
                part.addmm_(wide, delta, alpha=c)
            else:  # scaling x [tokens, in] costs one float32 rounding; the weights stay as they are
                part.addmm_(wide * c, delta)
            if bias_deltas is not None:
                part += _widen(bias_deltas[i], block, compute) * c
        y = _store(y, part, x, weight, slice(None), block)
    assert y is not None  # there is always a block
    return y


def _combine(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    deltas: Tensor,
    bias_deltas: Tensor | None,
    runs: list[Run],
    merged: bool,
) -> Tensor:
    """One product for each run of tokens, with a mix formed in float32 block by block."""
    compute = torch.promote_types(x.dtype, torch.float32)
    wide = x.to(compute)
    y: Tensor | None = None
    for block in _blocks(weight):
        base = _widen(weight, block, compute)
        base_bias = None if bias is None else _widen(bias, block, compute)
        if base_bias is None and bias_deltas is not None:
            base_bias = x.new_zeros((), dtype=compute)
        for start, stop, mix in runs:
            mixed, mixed_bias = base, base_bias
            for i, c in mix:
                mixed = torch.add(mixed, deltas[i] if block is None else deltas[i, block], alpha=c)
                if bias_deltas is not None and mixed_bias is not None:
                    mixed_bias = torch.add(mixed_bias, _widen(bias_deltas[i], block, compute), alpha=c)
            if merged:
                mixed = mixed.to(weight.dtype).to(compute)
                mixed_bias = None if mixed_bias is None else mixed_bias.to(weight.dtype).to(compute)
            if mixed_bias is not None:
                mixed_bias = mixed_bias.expand(mixed.shape[0])
            part = F.linear(wide[start:stop] if len(runs) > 1 else wide, mixed, mixed_bias)
            y = _store(y, part, x, weight, slice(start, stop), block)
    assert y is not None  # there is always a block, and a run
    return y


def _blocks(weight: Tensor) -> list[slice | None]:
    """The output rows of `weight` in blocks of about BLOCK_WEIGHTS; None is all of a small one, without a view."""
    size = max(16, BLOCK_WEIGHTS // max(weight.shape[1], 1))
    if weight.shape[0] <= size:
        return [None]
    return [slice(start, start + size) for start in range(0, weight.shape[0], size)]


def _widen(t: Tensor, block: slice | None, dtype: torch.dtype) -> Tensor:
    """`t[block]` in `dtype`, without a call into torch where there is nothing to do: small layers feel each of them."""
    if block is not None:
        t = t[block]
    return t if t.dtype == dtype else t.to(dtype)


def _store(y: Tensor | None, part: Tensor, x: Tensor, weight: Tensor, tokens: slice, block: slice | None) -> Tensor:
    """`part` rounded into its place in y, made when there is none; a part that is all of y becomes y."""
    if y is None:
        if part.shape == (x.shape[0], weight.shape[0]):
            return part if part.dtype == x.dtype else part.to(x.dtype)
        y = x.new_empty(x.shape[0], weight.shape[0])
    y[tokens, slice(None) if block is None else block] = part
    return y


def _runs(tokens: int, columns: Tensor, table: Tensor, rows: Tensor, token_rows: Tensor | None) -> list[Run] | None:
    """The tokens in runs of one mix each, read from host memory; None for no tokens, or where `rows` does not fit."""
    if token_rows is not None:
        mixes = table.tolist()
        spans = [(row, len(list(span))) for row, span in itertools.groupby(token_rows.tolist())]
    else:
        count = int(rows)
        if tokens == 0 or tokens % count:
            return None
        mixes = table[:count].tolist()
        spans = [(row, tokens // count) for row in range(count)]
    used = columns.tolist()
    runs: list[Run] = []
    start = 0
    for row, length in spans:
        mix = [(i, mixes[row][column]) for i, column in enumerate(used) if mixes[row][column] != 0]
        first = runs.pop()[0] if runs and runs[-1][2] == mix else start
        start += length
        runs.append((first, start, mix))
    return runs


def embedding(
    ids: Tensor,
    weight: Tensor,
    deltas: Tensor,
    columns: Tensor,
    table: Tensor,
    rows: Tensor,
    token_rows: Tensor | None = None,
) -> Tensor:
    """`y[t] = E[ids[t]] + sum_i c[t, i] D_i[ids[t]]`, summed in float32, rounded once, to the weight's dtype.

    ids [tokens], weight [vocabulary, dim], deltas [k, vocabulary, dim] -> [tokens, dim].
    """
    compute = torch.promote_types(weight.dtype, torch.float32)
    c = token_coefficients(table, rows, columns, ids.shape[0], token_rows)
    y = F.embedding(ids, weight).to(compute)
    for i in range(len(columns)):
        y = torch.addcmul(y, c[:, i, None], F.embedding(ids, deltas[i]))
    return y.to(weight.dtype)


def mix(weight: Tensor, deltas: Tensor, columns: Tensor, table: Tensor, rows: Tensor, batch: int) -> Tensor:
    """`w[b] = w + sum_i c[b, i] d_i` in float32, for norms and other small parameters.

    weight [*shape], deltas [k, *shape] -> [batch, *shape].
    """
    c = token_coefficients(table, rows, columns, batch)
    mixed = torch.addmm(weight.float().view(1, -1), c, deltas.float().flatten(1))
    return mixed.view(batch, *weight.shape)
