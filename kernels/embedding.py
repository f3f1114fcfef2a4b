"""An embedding under alignment vectors, in Triton: rows of the table and of every delta, gathered and mixed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from alignvec.errors import AlignvecError
from alignvec.kernels import eager, tiles
from alignvec.kernels.materialise import low_rank
from alignvec.kernels.operands import MAX_VECTORS, Operand


@triton.jit(do_not_specialize=["tokens"])
def embedding_kernel(
    y_ptr,
    ids_ptr,
    w_ptr,
    columns_ptr,
    table_ptr,
    rows_ptr,
    token_rows_ptr,
    parts,
    sizes,
    tokens,
    vocabulary,
    features,
    w_stride_n,
    w_stride_k,
    table_stride,
    SPECS: tl.constexpr,
    VECTORS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """y[t] = round(E[id_t] + sum_i c[t, i] D_i[id_t]); the edit is summed first, in float32.

    Bytes: tokens (2 features itemsize + features of the rows of each delta whose coefficient is not 0 + 8 for the id).
    """
    offs_t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    ids = tl.load(ids_ptr + offs_t, mask=offs_t < tokens, other=0).to(tl.int64)
    known = (offs_t < tokens) & (ids >= 0) & (ids < vocabulary)
    d_mask = (d < features)[:, None]
    mask = d_mask & known[None, :]
    w_at = w_ptr + ids[None, :] * w_stride_n + d.to(tl.int64)[:, None] * w_stride_k
    w = tl.load(w_at, mask=mask, other=0.0)
    row = tiles.table_row(offs_t, tokens, rows_ptr, token_rows_ptr)
    edit = tl.zeros((BLOCK_D, BLOCK_T), dtype=tl.float32)
    used = tl.zeros((BLOCK_T,), dtype=tl.int32)
    for i in tl.static_range(VECTORS):
        column = tl.load(columns_ptr + i)
        c = tiles.coefficient(table_ptr, table_stride, row, column, tokens, rows_ptr, token_rows_ptr)
        on = known & (c != 0)
        used += on.to(tl.int32)
        if tiles.kind(SPECS, i) == tiles.LOW_RANK:
            delta = tl.trans(
                low_rank(parts[i], sizes[i], ids[:, None], on[:, None], d[None, :], (d < features)[None, :])
            )
        else:
            delta = tiles.decode(SPECS, i, parts[i], sizes[i], ids, d, mask & on[None, :], w, True)
        edit += c[None, :] * delta
    y = tl.where((used > 0)[None, :], w.to(tl.float32) + edit, w.to(tl.float32))
    y = tl.where(known[None, :], y, float("nan"))
    y_at = y_ptr + offs_t.to(tl.int64)[None, :] * features + d[:, None]
    tl.store(y_at, y.to(y_ptr.dtype.element_ty), mask=d_mask & (offs_t < tokens)[None, :])


def embedding(
    ids: Tensor,
    weight: Tensor,
    operands: Sequence[Operand],
    columns: Tensor,
    table: Tensor,
    rows: Tensor,
    token_rows: Tensor | None = None,
) -> Tensor:
    """`y[t] = E[ids[t]] + sum_i c[t, i] D_i[ids[t]]`, rounded once, to the weight's dtype.

    ids int64 or int32 [tokens], weight [vocabulary, features] in float32, bfloat16 or float16 -> [tokens, features];
    float64 runs in plain torch.
    The other arguments and the row rule, NaN included, are those of `reference.token_coefficients`. An id that is not
    in the vocabulary gives NaN.

    Raises:
        AlignvecError: more than 16 vectors.
    """
    operands = list(operands)
    if len(operands) > MAX_VECTORS:
        raise AlignvecError(f"{len(operands)} vectors edit one embedding; the Triton kernels take {MAX_VECTORS}")
    if weight.dtype == torch.float64:
        return eager.embedding(ids, weight, operands, columns, table, rows, token_rows)
    (tokens,), (vocabulary, features) = ids.shape, weight.shape
    y = torch.empty(tokens, features, dtype=weight.dtype, device=weight.device)
    if y.numel() == 0:
        return y
    products = any(o.kind == "low-rank" for o in operands)
    block_t = 16 if products else 1 if tokens <= 64 else 4  # 16: what a matrix instruction takes
    block_d = 64 if products else min(max(triton.next_power_of_2(features), 32), 1024 if block_t == 1 else 512)
    with torch.cuda.device_of(weight):
        embedding_kernel[(triton.cdiv(tokens, block_t), triton.cdiv(features, block_d))](
            y,
            ids.contiguous(),
            weight,
            columns,
            table,
            rows,
            token_rows,
            tiles.parts(operands),
            tiles.sizes(operands),
            tokens,
            vocabulary,
            features,
            *weight.stride(),
            table.stride(0),
            SPECS=tiles.specs(operands),
            VECTORS=len(operands),
            BLOCK_T=block_t,
            BLOCK_D=block_d,
        )
    return y
