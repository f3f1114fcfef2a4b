"""The linear operator on Triton: which kernels a call launches, on which operands, in which tiles."""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import torch
import triton
from torch import Tensor

from alignvec.errors import AlignvecError
from alignvec.kernels import configs, eager, packing, tiles, tiling
from alignvec.kernels.combine import combine_kernel
from alignvec.kernels.configs import Config
from alignvec.kernels.materialise import materialise
from alignvec.kernels.operands import MAX_VECTORS, Operand
from alignvec.kernels.packing import Projection
from alignvec.kernels.shrink import shrink_kernel
from alignvec.kernels.split import split_kernel, sum_kernel


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
    config: Config | None = None,
) -> Tensor:
    """`y[m] = x[m] W^T + b + sum_i c[m, i] (x[m] D_i^T + b_i)`, rounded once, to x's dtype.

    x [tokens, in], weight [out, in], bias [out], operands k deltas [out, in], bias_deltas [k, out] -> [tokens, out];
    float32, bfloat16 or float16, each its own, with any strides; float64 runs in plain torch. The other arguments,
    contiguous, and the row rule, NaN included, are those of `reference.token_coefficients`.

    `precision="merged"` rounds each row's mix to the weight's dtype, as a stored merge would; `execution="split"` stays
    exact, and so do low-rank vectors unless they are materialised. `execution="materialise"` takes row 0 of the table
    for all tokens. `config` replaces the choice of tiles.

    Raises:
        AlignvecError: more than 16 vectors.
    """
    layer = Projection(weight, bias, operands, bias_deltas, columns)
    return linear_group(x, [layer], table, rows, token_rows, execution=execution, precision=precision, config=config)[0]


def linear_group(
    x: Tensor,
    projections: Sequence[Projection],
    table: Tensor,
    rows: Tensor,
    token_rows: Tensor | None = None,
    *,
    execution: str = "auto",
    precision: str = "exact",
    config: Config | None = None,
) -> list[Tensor]:
    """`linear` for several layers that read the same x, such as q, k and v: one launch when they split.

    The results, [tokens, out] each, may be columns of one tensor.
    """
    for p in projections:
        if len(p.operands) > MAX_VECTORS:
            raise AlignvecError(
                f"{len(p.operands)} vectors edit one layer; the Triton kernels take {MAX_VECTORS}, use backend 'torch'"
            )
    if x.dtype == torch.float64:
        shared = (table, rows, token_rows)
        return [
            eager.linear(
                *(x, p.weight, p.bias, p.operands, p.bias_deltas, p.columns, *shared),
                execution=execution,
                precision=precision,
            )
            for p in projections
        ]
    tokens, exact = x.shape[0], precision == "exact"
    if execution == "auto":
        execution = "split" if exact and tokens <= tiling.DECODE_TOKENS else "combine"
    outs = [p.weight.shape[0] for p in projections]
    y = torch.empty(tokens, sum(outs), dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return list(y.split(outs, 1))
    coefficients = (table, rows, token_rows)
    with torch.cuda.device_of(x):
        if execution == "split":
            _split(y, x, projections, coefficients, config)
        else:
            for p, part in zip(projections, y.split(outs, 1), strict=True):
                if execution == "materialise":
                    _materialise(part, x, p, table, rows, exact)
                elif exact and len(p.operands) == 1:
                    _split(part, x, [p], coefficients, config)  # two products like combine's, without forming a mix
                else:
                    _combine(part, x, p, coefficients, exact, config)
    return list(y.split(outs, 1))


def _split(
    y: Tensor,
    x: Tensor,
    projections: Sequence[Projection],
    coefficients: tuple[Tensor, Tensor, Tensor | None],
    config: Config | None,
) -> None:
    (tokens, in_features), table = x.shape, coefficients[0]
    projections, rank_parts = _shrunk(x, projections)
    found = packing.entries(projections)
    c = config or _tuned("split", x, projections)
    if c is None:
        k, width = max(len(e.own) for e in found), min((e.width for e in found if e.width), default=0)
        plain = all(o.kind in ("dense", "low-rank") for p in projections for o in p.operands)
        sizes = (tokens, y.shape[1], in_features, k, x.dtype, _widest(projections), width, plain)
        c = tiling.split_config(*sizes, wgmma=tiling.has_wgmma(x.device))
    arguments, constants, tiles_n = packing.pack(found, c.block_n, c.block_k, c.split_k)
    entries = Counter(e.number for e in found)
    counts = tuple(entries[number] * c.split_k for number in range(len(projections)))
    most = max(counts)
    parts = y if most == 1 else torch.empty(most, *y.shape, dtype=torch.float32, device=x.device)
    split_kernel[(tiles_n, triton.cdiv(tokens, c.block_m), c.split_k)](
        *(parts, x, *arguments, *coefficients, tokens, in_features, parts.stride(-2), *x.stride(), table.stride(0)),
        **constants,
        RANK_PARTS=rank_parts,
        BLOCK_M=c.block_m,
        BLOCK_N=c.block_n,
        SPLIT_K=c.split_k,
        num_warps=c.num_warps,
        num_stages=c.num_stages,
    )
    if most > 1:
        ends = tuple(itertools.accumulate(p.weight.shape[0] for p in projections))
        grid = (triton.cdiv(y.shape[1], 1024), tokens)
        shape = (y.stride(0), y.shape[1], tokens)
        sum_kernel[grid](y, parts, *shape, ends, counts, PROJECTIONS=len(projections), BLOCK=1024)


def _combine(
    y: Tensor,
    x: Tensor,
    projection: Projection,
    coefficients: tuple[Tensor, Tensor, Tensor | None],
    exact: bool,
    config: Config | None,
) -> None:
    (tokens, in_features), table = x.shape, coefficients[0]
    (projection,), rank_parts = _shrunk(x, [projection])
    k = len(projection.operands)
    c = config or _tuned("combine", x, [projection], "exact" if exact else "merged")
    if c is None:
        plain = all(o.kind == "dense" for o in projection.operands)  # low-rank vectors take registers here
        c = tiling.combine_config(k, x.dtype, _widest([projection]), plain)
    arguments = packing.layer(projection, range(k), 0, 0, 0)
    combine_kernel[(triton.cdiv(tokens, c.block_m) * triton.cdiv(y.shape[1], c.block_n),)](
        *(y, x, *arguments, *coefficients, tokens, in_features, y.stride(0), *x.stride(), table.stride(0)),
        VECTORS=k,
        SPECS=tiles.specs(projection.operands),
        BIASES=packing.biases(projection),
        MERGED=not exact,
        RANK_PARTS=rank_parts,
        BLOCK_M=c.block_m,
        BLOCK_N=c.block_n,
        BLOCK_K=c.block_k,
        GROUP_M=8,
        num_warps=c.num_warps,
        num_stages=c.num_stages,
    )


def _materialise(y: Tensor, x: Tensor, p: Projection, table: Tensor, rows: Tensor, exact: bool) -> None:
    """The mix of table row 0, or a high and a low half of it, in scratch, and the vendor's products with it."""
    high = torch.empty_like(p.weight)
    low = torch.empty_like(p.weight) if exact and p.weight.dtype != torch.float32 else None
    materialise(p.weight, p.operands, p.columns, table, rows, out=high, low=low)
    total = _product(x, high)
    if low is not None:
        total += _product(x, low)
    if p.bias is not None:
        total += p.bias
    if p.bias_deltas is not None:
        total += table[0, p.columns] @ p.bias_deltas.float()
    y.copy_(total)


def _product(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T as float32 sums."""
    if x.is_cuda and x.dtype == weight.dtype and x.dtype != torch.float32:
        return torch.mm(x, weight.t(), out_dtype=torch.float32)
    return x.float() @ weight.float().t()


def _shrunk(x: Tensor, projections: Sequence[Projection]) -> tuple[list[Projection], int]:
    """The projections with `x A^T` in the place of each low-rank operand's A, and in how many parts it comes."""
    low_rank = [o for p in projections for o in p.operands if o.kind == "low-rank"]
    if not low_rank:
        return list(projections), 1
    tokens, in_features = x.shape
    # An x that has to be converted is in registers: 32 rows keep it from wgmma, as in `tiling`.
    native = all(o.parts[0].dtype in (x.dtype, torch.float32) for o in low_rank) and x.dtype == torch.bfloat16
    block_m = min(max(triton.next_power_of_2(tokens), 16), 64 if native else 32)
    block_r, block_k = 32, 32 if x.dtype == torch.float32 else 128
    counts = [triton.cdiv(o.parts[0].shape[0], block_r) for o in low_rank]
    split_k = 1
    while split_k < 8 and tokens <= 16 and in_features >= 4 * block_k * split_k:
        split_k *= 2
    t = [torch.empty(split_k, tokens, o.parts[0].shape[0], dtype=torch.float32, device=x.device) for o in low_rank]
    firsts = itertools.accumulate(counts, initial=0)  # and, unused, their sum
    numbers = tuple((o.parts[0].shape[0], f, *o.parts[0].stride()) for o, f in zip(low_rank, firsts, strict=False))
    shrink_kernel[(sum(counts), triton.cdiv(tokens, block_m), split_k)](
        *(tuple(t), x, tuple(o.parts[0] for o in low_rank), numbers, tokens, in_features, *x.stride()),
        VECTORS=len(low_rank),
        BLOCK_M=block_m,
        BLOCK_R=block_r,
        BLOCK_K=block_k,
        SPLIT_K=split_k,
        num_warps=4,
        num_stages=3,
    )
    products = iter(t)
    swapped = []
    for p in projections:
        operands = [replace(o, parts=(next(products), o.parts[1])) if o.kind == "low-rank" else o for o in p.operands]
        swapped.append(replace(p, operands=operands))
    return swapped, split_k


def _tuned(execution: str, x: Tensor, projections: Sequence[Projection], precision: str = "exact") -> Config | None:
    """The tiles of the GPU's tuned table, if it has any for such a call."""
    if not x.is_cuda:
        return None
    (tokens, in_features), first = x.shape, projections[0]
    outs = sum(p.weight.shape[0] for p in projections)
    specs, dtype = [o.spec for o in first.operands], str(first.weight.dtype).removeprefix("torch.")
    name = torch.cuda.get_device_name(x.device)
    return configs.lookup(name, execution, specs, dtype, tokens, outs, in_features, precision)


def _widest(projections: Sequence[Projection]) -> torch.dtype:
    """The dtype that holds the weights and all values that are stored as such."""
    stored = [o.parts[-1].dtype for p in projections for o in p.operands if o.kind in ("dense", "sparse")]
    return functools.reduce(torch.promote_types, stored, projections[0].weight.dtype)
