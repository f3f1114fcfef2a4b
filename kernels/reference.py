"""The operators in plain torch: the truth every other backend is tested against. Slow, simple, unrounded.

A coefficient of 0 means that a token does not read the vector: whatever its product is, infinite or NaN, is left out.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from alignvec.kernels.operands import Operand, decode, matrix_shape


def token_coefficients(
    table: Tensor, rows: Tensor, columns: Tensor, tokens: int, token_rows: Tensor | None = None
) -> Tensor:
    """The coefficients of every token, [tokens, k] in the table's dtype.

    Token m reads row `token_rows[m]` of the table, or without `token_rows` row `m * rows // tokens`: batch-major
    activations of B sequences over R rows give sequence b row `b * R // B`. Where `tokens` is not a multiple of `rows`
    there is no such row, and all is NaN. Reads device data only, so nothing synchronises.

    Args:
        table: float32 [max_rows, n_vectors].
        rows: int32 [1], how many rows of the table are in use.
        columns: int32 [k], the column of each vector.
        token_rows: int32 [tokens] or None.
    """
    if token_rows is not None:
        return table[token_rows][:, columns]
    row = torch.arange(tokens, device=table.device) * rows // max(tokens, 1)
    coefficients = table[row][:, columns]
    return torch.where(tokens % rows == 0, coefficients, torch.nan)


def weighted(c: Tensor, edit: Tensor) -> Tensor:
    """`c * edit`, and 0 where c is 0."""
    return torch.where(c == 0, 0, c * edit)


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
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """`y[m] = x[m] W^T + b + sum_i c[m, i] (x[m] D_i^T + b_i)` in `dtype`.

    x [tokens, in], weight [out, in], bias [out], k operands of [out, in], bias_deltas [k, out] -> [tokens, out].
    """
    c = token_coefficients(table, rows, columns, x.shape[0], token_rows).to(dtype)
    x = x.to(dtype)
    y = x @ weight.to(dtype).t()
    if bias is not None:
        y = y + bias.to(dtype)
    for i, operand in enumerate(operands):
        edit = x @ decode(operand, weight).to(dtype).t()
        if bias_deltas is not None:
            edit = edit + bias_deltas[i].to(dtype)
        y = y + weighted(c[:, i, None], edit)
    return y


def embedding(
    ids: Tensor,
    weight: Tensor,
    operands: Sequence[Operand],
    columns: Tensor,
    table: Tensor,
    rows: Tensor,
    token_rows: Tensor | None = None,
    *,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """`y[t] = E[ids[t]] + sum_i c[t, i] D_i[ids[t]]` in `dtype`: ids [tokens] -> [tokens, dim]."""
    c = token_coefficients(table, rows, columns, ids.shape[0], token_rows).to(dtype)
    y = weight[ids].to(dtype)
    for i, operand in enumerate(operands):
        y = y + weighted(c[:, i, None], decode(operand, weight)[ids].to(dtype))
    return y


def mix(
    weight: Tensor,
    operands: Sequence[Operand],
    columns: Tensor,
    table: Tensor,
    rows: Tensor,
    batch: int,
    *,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """`w[b] = w + sum_i c[b, i] D_i` in `dtype`: weight [*, in], operands of [prod(*), in] -> [batch, *, in]."""
    c = token_coefficients(table, rows, columns, batch).to(dtype)
    matrix = weight.reshape(matrix_shape(weight))
    mixed = matrix.to(dtype).expand(batch, *matrix.shape)
    for i, operand in enumerate(operands):
        mixed = mixed + weighted(c[:, i, None, None], decode(operand, matrix).to(dtype))
    return mixed.reshape(batch, *weight.shape)
