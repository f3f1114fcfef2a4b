"""The operator in fast plain torch: what CPUs run, and any other device without Triton.

Where the coefficients lie in host memory they are read: vectors at zero then cost nothing, and neighbouring tokens
with one mix share its formation. Elsewhere nothing is read back, and every token carries its coefficients.
Weights of 16 bits are raised to float32 a block of output rows at a time, small enough to stay in cache: products are
exact, sums are float32, the result is rounded once, and no float32 copy of a large weight is ever made. Operands that
are not dense are decoded block by block alike; low-rank ones are two small products, never a matrix.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from alignvec.kernels.mixes import DeviceMix, Mix, Run, device_mix_of, readers, runs_of, widened
from alignvec.kernels.operands import Operand, aligned, decode, matrix_shape
from alignvec.kernels.reference import token_coefficients

# Weights in a block: 1 MiB as float32, a second-level cache. Much smaller blocks would starve a GEMM's threads.
BLOCK_WEIGHTS = 1 << 18

# Forming a mix moves 12 bytes a weight and vector; a further GEMM spends 2 FLOPs a weight, vector and token. At 30 GB/s
# and 60 GFLOP/s a core, small GEMMs being slower, they break even near 8 tokens a mix. Weights of 16 bits have to be
# raised to float32 for the GEMM anyway, which is half of the work of mixing them.
COMBINE_TOKENS = {2: 4, 4: 8, 8: 8}


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    operands: Sequence[Operand],
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

    x [tokens, in], weight [out, in], bias [out], k operands of [out, in], bias_deltas [k, out] -> [tokens, out]; the
    other arguments and the row rule are those of `reference.token_coefficients`.

    `execution="split"` adds weighted products, "combine" (and "materialise", whose mix is never kept here) forms one
    mix for each run of tokens, "auto" takes the cheaper. `precision="merged"` rounds each mix to the weight's dtype, as
    a stored merge would; "split" stays exact, and so does all where coefficients are not in host memory.
    """
    runs = runs_of(x.shape[0], columns, table, rows, token_rows) if x.is_cpu else None
    if runs:
        merged = precision == "merged"
        if execution == "auto":
            execution = "combine" if merged or _combining_pays(x, weight, runs) else "split"
        if execution in ("combine", "materialise"):
            return _combine(x, weight, bias, operands, bias_deltas, runs, merged)
        if len(runs) == 1:
            return _split(x, weight, bias, operands, bias_deltas, runs[0][2])
    return _split(
        x, weight, bias, operands, bias_deltas, device_mix_of(x.shape[0], runs, columns, table, rows, token_rows)
    )


def _combining_pays(x: Tensor, weight: Tensor, runs: list[Run]) -> bool:
    return x.shape[0] >= COMBINE_TOKENS[weight.element_size()] * len(runs)


def _split(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    operands: Sequence[Operand],
    bias_deltas: Tensor | None,
    mix: Mix | DeviceMix,
) -> Tensor:
    """A product for the base and one for each vector; coefficients are floats, or one for each token."""
    compute = torch.promote_types(x.dtype, torch.float32)
    wide = x.to(compute)
    narrow = _narrow(wide, operands, mix)
    y: Tensor | None = None
    for block in _blocks(weight):
        part = F.linear(wide, _widen(weight, block, compute), None if bias is None else _widen(bias, block, compute))
        for i, c in mix:
            left, delta = narrow.get(i, wide), _factor(operands[i], weight, block, compute).t()
            if isinstance(c, float):
                part.addmm_(left, delta, alpha=c)
                if bias_deltas is not None:
                    part += _widen(bias_deltas[i], block, compute) * c
                continue
            c.add_product(part, left, delta)
            if bias_deltas is not None:
                c.add(part, _widen(bias_deltas[i], block, compute))
        y = _store(y, part, x, weight, slice(None), block)
    assert y is not None  # there is always a block
    return y


def _combine(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    operands: Sequence[Operand],
    bias_deltas: Tensor | None,
    runs: list[Run],
    merged: bool,
) -> Tensor:
    """One product for each run of tokens, with a mix formed in float32 block by block.

    Low-rank vectors stay out of the mix unless it is rounded: their own two products are cheaper.
    """
    compute = torch.promote_types(x.dtype, torch.float32)
    wide = x.to(compute)
    used = {i: 1.0 for *_, mix in runs for i, _ in mix}
    narrow = {} if merged else _narrow(wide, operands, list(used.items()))
    y: Tensor | None = None
    for block in _blocks(weight):
        base = _widen(weight, block, compute)
        base_bias = None if bias is None else _widen(bias, block, compute)
        if base_bias is None and bias_deltas is not None:
            base_bias = x.new_zeros((), dtype=compute)
        deltas = {i: _delta(operands[i], weight, block) for i in used if i not in narrow}
        for start, stop, mix in runs:
            mixed, mixed_bias = base, base_bias
            for i, c in mix:
                if i in deltas:
                    mixed = torch.add(mixed, deltas[i], alpha=c)
                if bias_deltas is not None and mixed_bias is not None:
                    mixed_bias = torch.add(mixed_bias, _widen(bias_deltas[i], block, compute), alpha=c)
            if merged:
                mixed = mixed.to(weight.dtype).to(compute)
                mixed_bias = None if mixed_bias is None else mixed_bias.to(weight.dtype).to(compute)
            if mixed_bias is not None:
                mixed_bias = mixed_bias.expand(mixed.shape[0])
            part = F.linear(wide[start:stop] if len(runs) > 1 else wide, mixed, mixed_bias)
            for i, c in mix:
                if i in narrow:
                    part.addmm_(narrow[i][start:stop], _factor(operands[i], weight, block, compute).t(), alpha=c)
            y = _store(y, part, x, weight, slice(start, stop), block)
    assert y is not None  # there is always a block, and a run
    return y


def linear_input_grad(
    grad: Tensor,
    weight: Tensor,
    operands: Sequence[Operand],
    columns: Tensor,
    table: Tensor,
    rows: Tensor,
    token_rows: Tensor | None = None,
) -> Tensor:
    """`dx[m] = g[m] W + sum_i c[m, i] g[m] D_i`, rounded once, to g's dtype: grad [tokens, out] -> [tokens, in]."""
    compute = torch.promote_types(grad.dtype, torch.float32)
    wide = grad.to(compute)
    tokens = grad.shape[0]
    runs = runs_of(tokens, columns, table, rows, token_rows) if grad.is_cpu else None
    total = wide.new_zeros(tokens, weight.shape[1])
    if runs and _combining_pays(grad, weight, runs):
        used = {i for *_, mix in runs for i, _ in mix}
        for block in _blocks(weight):
            base, part = _widen(weight, block, compute), _columns(wide, block)
            deltas = {i: _delta(operands[i], weight, block) for i in used}
            for start, stop, mix in runs:
                mixed = base
                for i, c in mix:
                    mixed = torch.add(mixed, deltas[i], alpha=c)
                total[start:stop].addmm_(part[start:stop], mixed)
        return total.to(grad.dtype)
    device_mix = device_mix_of(tokens, runs, columns, table, rows, token_rows)
    narrow = {
        i: wide.new_zeros(tokens, operands[i].parts[0].shape[0]) for i, _ in device_mix if _is_low_rank(operands[i])
    }
    for block in _blocks(weight):
        part = _columns(wide, block)
        total.addmm_(part, _widen(weight, block, compute))
        for i, own in device_mix:
            own.add_product(narrow.get(i, total), part, _factor(operands[i], weight, block, compute))
    for i, left in narrow.items():
        total.addmm_(left, operands[i].parts[0].to(compute))
    return total.to(grad.dtype)


def _is_low_rank(operand: Operand) -> bool:
    return operand.kind == "low-rank"


def _narrow(x: Tensor, operands: Sequence[Operand], mix: Mix | DeviceMix) -> dict[int, Tensor]:
    """`x A^T` [tokens, rank] of the low-rank vectors in use: the first of their two products."""
    return {i: x @ operands[i].parts[0].to(x.dtype).t() for i, _ in mix if _is_low_rank(operands[i])}


def _factor(operand: Operand, weight: Tensor, block: slice | None, dtype: torch.dtype) -> Tensor:
    """The output rows of a block, in `dtype`: of the delta [rows, in], or of a low-rank one's B [rows, rank]."""
    if _is_low_rank(operand):
        return _widen(operand.parts[1], block, dtype)
    delta = _delta(operand, weight, block)
    return delta if delta.dtype == dtype else delta.to(dtype)


def _delta(operand: Operand, weight: Tensor, block: slice | None) -> Tensor:
    """The delta at the output rows of a block [rows, in], float32 or, without a copy, as a dense one is."""
    if operand.kind == "dense":
        return operand.parts[0] if block is None else operand.parts[0][block]
    return decode(operand, weight, _rows(block))


def _rows(block: slice | None) -> slice:
    return slice(None) if block is None else block


def _columns(grad: Tensor, block: slice | None) -> Tensor:
    return grad if block is None else grad[:, block]


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


def embedding(
    ids: Tensor,
    weight: Tensor,
    operands: Sequence[Operand],
    columns: Tensor,
    table: Tensor,
    rows: Tensor,
    token_rows: Tensor | None = None,
) -> Tensor:
    """`y[t] = E[ids[t]] + sum_i c[t, i] D_i[ids[t]]`, summed in float32, rounded once, to the weight's dtype.

    ids [tokens], weight [vocabulary, dim], k operands of the same -> [tokens, dim].
    """
    compute = torch.promote_types(weight.dtype, torch.float32)
    c = token_coefficients(table, rows, columns, ids.shape[0], token_rows)
    base = F.embedding(ids, weight)
    y = base.to(compute)
    for i, (operand, (some, every)) in enumerate(zip(operands, readers(c), strict=True)):
        if not some:
            continue
        own = c[:, i, None]
        delta = F.embedding(ids, operand.parts[0]) if operand.kind == "dense" else decode(take(operand, ids), base)
        sums = torch.addcmul(y, own, delta)
        y = sums if every else torch.where(own == 0, y, sums)
    return y.to(weight.dtype)


def take(operand: Operand, ids: Tensor) -> Operand:
    """The operand whose output rows are rows `ids` [n] of this one."""
    first, *others = operand.parts
    parts: tuple[Tensor, ...]
    if operand.kind == "low-rank":
        parts = (first, others[0][ids])
    elif operand.kind == "lossless":
        start, entries, row = _entries(others[0], ids)
        parts = (first[ids], start, others[1][entries], others[2][entries], row)
    elif operand.kind == "sparse":
        start, entries, _ = _entries(others[1], ids)
        parts = (first[ids], others[0][ids], start, others[2][entries])
    else:
        parts = tuple(part[ids] for part in operand.parts)
    return dataclasses.replace(operand, parts=parts, shape=(len(ids), operand.shape[1]))


def _entries(start: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of lists that begin at `start` [rows + 1], those of rows `ids`: their new start, entries, and row of each."""
    counts = (start[ids + 1] - start[ids]).long()
    new = F.pad(counts.cumsum(0), (1, 0))
    row = torch.repeat_interleave(counts)
    entries = torch.arange(row.shape[0], device=ids.device) + (start[ids] - new[:-1])[row]
    return new, entries, row


def mix(
    weight: Tensor, operands: Sequence[Operand], columns: Tensor, table: Tensor, rows: Tensor, batch: int
) -> Tensor:
    """`w[b] = w + sum_i c[b, i] D_i` in float32, or of a float64 parameter in float64, for modules that use it in ways
    of their own.

    weight [*, in], operands of [prod(*), in] -> [batch, *, in].
    """
    c = token_coefficients(table, rows, columns, batch)
    matrix = weight.reshape(matrix_shape(weight))
    base = mixed = matrix.to(torch.promote_types(weight.dtype, torch.float32)).expand(batch, *matrix.shape)
    for i, (operand, (some, every)) in enumerate(zip(operands, readers(c), strict=True)):
        if not some:
            continue
        own = c[:, i, None, None]
        sums = torch.addcmul(mixed, own, _delta(operand, matrix, None))
        mixed = sums if every else torch.where(own == 0, mixed, sums)
    if mixed is base:  # what is given back is never the parameter's own memory
        mixed = base.clone()
    return mixed.reshape(batch, *weight.shape)


def materialise(
    weight: Tensor,
    operands: Sequence[Operand],
    columns: Tensor,
    table: Tensor,
    rows: Tensor,
    *,
    out: Tensor,
    low: Tensor | None = None,
) -> None:
    """`out = round(W + sum_i c_i D_i)` with the coefficients of row 0 of the table, summed in float32.

    weight [out, in], out and low alike, in storage of their own; low takes the rest, so that out + low is the mix.
    """
    mix: Sequence[tuple[int, float | Tensor]]
    if weight.is_cpu:
        mix = [(i, c) for i, c in enumerate(table[0, columns].tolist()) if c != 0]
    else:
        mix = [(i, c) for i, c in enumerate(table[0, columns].unbind())]
    compute = torch.promote_types(weight.dtype, torch.float32)
    for block in _blocks(weight):
        total = _widen(weight, block, compute)
        for i, c in mix:
            if isinstance(c, Tensor):
                total = torch.where(c == 0, total, torch.addcmul(total, c, _delta(operands[i], weight, block)))
            elif c == 1 and len(mix) == 1 and operands[i].kind == "lossless":
                total = aligned(operands[i], weight, _rows(block)).to(compute)  # the checkpoint's own bits, -0.0 too
            else:
                total = torch.add(total, _delta(operands[i], weight, block), alpha=c)
        part = _rows(block)
        out[part] = total
        if low is not None:
            low[part] = total - out[part].to(compute)


def rms_norm(
    x: Tensor,
    weight: Tensor,
    deltas: Tensor | None,
    columns: Tensor,
    table: Tensor,
    rows: Tensor,
    token_rows: Tensor | None = None,
    *,
    eps: float,
    offset: float = 0.0,
) -> Tensor:
    """`y[m] = x[m] / sqrt(mean(x[m]^2) + eps) (offset + w + sum_i c[m, i] d_i)`, float32 inside, rounded once.

    x [tokens, features], weight [features], deltas [k, features] -> [tokens, features].
    """
    scale = row_vectors(weight, deltas, columns, table, rows, x.shape[0], token_rows)
    return (F.rms_norm(widened(x), x.shape[1:], None, eps) * (scale + offset)).to(x.dtype)


def layer_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    deltas: Tensor | None,
    bias_deltas: Tensor | None,
    columns: Tensor,
    table: Tensor,
    rows: Tensor,
    token_rows: Tensor | None = None,
    *,
    eps: float,
) -> Tensor:
    """`y[m] = (x[m] - mean) / sqrt(var + eps) (w + sum_i c[m, i] d_i) + b + sum_i c[m, i] b_i`, rounded once.

    x [tokens, features], weight and bias [features], their deltas [k, features] -> [tokens, features].
    """
    coefficients = (columns, table, rows, x.shape[0], token_rows)
    y = F.layer_norm(widened(x), x.shape[1:], None, None, eps)
    if weight is not None:
        y = y * row_vectors(weight, deltas, *coefficients)
    if bias is not None:
        y = y + row_vectors(bias, bias_deltas, *coefficients)
    return y.to(x.dtype)


def row_vectors(
    vector: Tensor,
    deltas: Tensor | None,
    columns: Tensor,
    table: Tensor,
    rows: Tensor,
    tokens: int,
    token_rows: Tensor | None = None,
) -> Tensor:
    """`v + sum_i c[m, i] d_i`, as wide as v: [tokens, features], or [features] where all tokens are seen to share it.

    vector [features], deltas [k, features] or None.
    """
    total = widened(vector)
    if deltas is None:
        return total
    if token_rows is None and rows.is_cpu and int(rows) == 1:
        return torch.addmv(total, deltas.to(total.dtype).t(), table[0, columns].to(total.dtype))
    return token_vectors(vector, deltas, token_coefficients(table, rows, columns, tokens, token_rows))


def token_vectors(vector: Tensor, deltas: Tensor, c: Tensor) -> Tensor:
    """`v + sum_i c[m, i] d_i`: vector [features], deltas [k, features], c [tokens, k] -> [tokens, features].

    Deltas are finite, which `attach` sees to: 0 times one of them adds nothing.
    """
    total = widened(vector)
    return torch.addmm(total, c.to(total.dtype), deltas.to(total.dtype))
