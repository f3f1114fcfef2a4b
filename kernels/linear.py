"""The linear operator on Triton: which kernels a call launches, on which operands, in which tiles."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import triton
from torch import Tensor

from alignvec.errors import AlignvecError
from alignvec.kernels import configs, tiles, tiling
from alignvec.kernels.combine import combine_kernel
from alignvec.kernels.configs import Config
from alignvec.kernels.materialise import materialise
from alignvec.kernels.operands import Operand
from alignvec.kernels.shrink import shrink_kernel
from alignvec.kernels.split import split_kernel, sum_kernel

MAX_VECTORS = 16


@dataclass(frozen=True)
class Projection:
    """One linear layer: weight [out, in], bias [out], an operand for each vector, bias deltas [k, out], columns [k]."""

    weight: Tensor
    bias: Tensor | None
    operands: Sequence[Operand]
    bias_deltas: Tensor | None
    columns: Tensor


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
    float32, bfloat16 or float16, each its own, with any strides. The other arguments, contiguous, and the row rule, NaN
    included, are those of `reference.token_coefficients`.

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
    tokens, exact = x.shape[0], precision == "exact"
    if execution == "auto":
        execution = "split" if exact and tokens <= tiling.DECODE_TOKENS else "combine"
    outs = [p.weight.shape[0] for p in projections]
    y = torch.empty(tokens, sum(outs), dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return list(y.split(outs, 1))
    coefficients = (table, rows, token_rows)
    with torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext():
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
    launches = [(key, _config("split", x, projections, key, config)) for key in _plane_keys(projections)]
    count = sum(c.split_k for _, c in launches)
    parts = y if count == 1 else torch.empty(count, *y.shape, dtype=torch.float32, device=x.device)
    first = 0
    for number, (key, c) in enumerate(launches):
        chosen = [_members(p, key, with_plain=number == 0) for p in projections]
        arguments, constants, tiles_n = _pack(projections, chosen, c.block_n)
        split_kernel[(tiles_n, triton.cdiv(tokens, c.block_m), c.split_k)](
            *(parts, x, *arguments, *coefficients, tokens, in_features, parts.stride(-2), *x.stride(), table.stride(0)),
            first,
            PROJECTIONS=len(projections),
            **constants,
            BASE=number == 0,
            PLANES=32 // key[0] if key[0] else 1,
            RANK_PARTS=rank_parts,
            SPLIT_K=c.split_k,
            **_blocks(c),
        )
        first += c.split_k
    if count > 1:
        grid = (triton.cdiv(y.shape[1], 1024), tokens)
        sum_kernel[grid](y, parts, y.stride(0), y.shape[1], tokens, count, BLOCK=1024)


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
    c = _config("combine", x, [projection], chosen=config)
    (pointers, sizes, numbers), constants, tiles_n = _pack([projection], [range(len(projection.operands))], c.block_n)
    del constants["VECTORS"]
    combine_kernel[(triton.cdiv(tokens, c.block_m) * tiles_n,)](
        *(y, x, pointers[0], sizes[0], numbers[0], *coefficients, tokens, in_features, y.stride(0), *x.stride()),
        table.stride(0),
        VECTORS=len(projection.operands),
        **constants,
        MERGED=not exact,
        RANK_PARTS=rank_parts,
        GROUP_M=8,
        **_blocks(c),
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


Key = tuple[int, int]  # bits and width of the fields that a launch takes; (0, 0): none


def _plane_keys(projections: Sequence[Projection]) -> list[Key]:
    """A launch each. The first has the base and what lies in no planes; lossless leads, for it needs the base."""
    coded = [o for p in projections for o in p.operands if o.width]
    coded.sort(key=lambda o: o.kind != "lossless")
    return list(dict.fromkeys((o.bits, o.width) for o in coded)) or [(0, 0)]


def _members(projection: Projection, key: Key, with_plain: bool) -> list[int]:
    return [i for i, o in enumerate(projection.operands) if (o.bits, o.width) == key or (with_plain and not o.width)]


def _pack(
    projections: Sequence[Projection], chosen: Sequence[Sequence[int]], block_n: int
) -> tuple[tuple[tuple[object, ...], ...], dict[str, int], int]:
    """pointers, sizes and numbers of the kernels, their packed constants, and the tiles of outputs there are in all."""
    pointers, sizes, numbers = [], [], []
    packed = {"VECTORS": 0, "SPECS": 0, "BIASES": 0}
    column = tile = 0
    for j, (p, own) in enumerate(zip(projections, chosen, strict=True)):
        operands = [p.operands[i] for i in own]
        bias, bias_d = p.bias, p.bias_deltas
        pointers.append(
            (
                p.weight,
                p.weight if bias is None else bias,
                p.weight if bias_d is None else bias_d,
                p.columns,
                tiles.parts(operands),
            )
        )
        steps = [(o.group // max(o.width, 1)).bit_length() - 1 for o in operands]  # log2 of the planes of a group
        sizes.append(tuple((*s, i, step) for s, i, step in zip(tiles.sizes(operands), own, steps, strict=True)))
        strides = (0 if bias is None else bias.stride(0), *((0, 0) if bias_d is None else bias_d.stride()))
        numbers.append((p.weight.shape[0], column, tile, *p.weight.stride(), *strides))
        packed["VECTORS"] |= len(own) << 8 * j
        packed["SPECS"] |= tiles.specs(operands) << 128 * j
        packed["BIASES"] |= ((bias is not None) | (bias_d is not None) << 1) << 2 * j
        column += p.weight.shape[0]
        tile += triton.cdiv(p.weight.shape[0], block_n)
    return (tuple(pointers), tuple(sizes), tuple(numbers)), packed, tile


def _shrunk(x: Tensor, projections: Sequence[Projection]) -> tuple[list[Projection], int]:
    """The projections with `x A^T` in the place of each low-rank operand's A, and in how many parts it comes."""
    low_rank = [o for p in projections for o in p.operands if o.kind == "low-rank"]
    if not low_rank:
        return list(projections), 1
    tokens, in_features = x.shape
    block_m = min(max(triton.next_power_of_2(tokens), 16), 64)
    block_r, block_k = 32, 32 if x.dtype == torch.float32 else 128
    counts = [triton.cdiv(o.parts[0].shape[0], block_r) for o in low_rank]
    split_k = 1
    while split_k < 8 and tokens <= 16 and in_features >= 4 * block_k * split_k:
        split_k *= 2
    t = [torch.empty(split_k, tokens, o.parts[0].shape[0], dtype=torch.float32, device=x.device) for o in low_rank]
    firsts = [sum(counts[:i]) for i in range(len(counts))]
    numbers = tuple((o.parts[0].shape[0], f, *o.parts[0].stride()) for o, f in zip(low_rank, firsts, strict=True))
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


def _config(
    execution: str, x: Tensor, projections: Sequence[Projection], key: Key = (0, 0), chosen: Config | None = None
) -> Config:
    """The tiles that the caller, the GPU's tuned table or the shape asks for; planes set the inputs of a step."""
    tokens, in_features = x.shape
    outs = sum(p.weight.shape[0] for p in projections)
    operands = [o for p in projections for o in p.operands]
    weight = projections[0].weight.dtype
    bits, width = key
    if chosen is None and x.is_cuda:
        specs = [o.spec for o in projections[0].operands]
        name = torch.cuda.get_device_name(x.device)
        chosen = configs.lookup(name, execution, specs, str(weight).removeprefix("torch."), tokens, outs, in_features)
    if chosen is None:
        plain = [o.parts[-1].dtype for o in operands if o.kind in ("dense", "sparse")]
        weights = functools.reduce(torch.promote_types, plain, weight)
        k = max(1, *(len(p.operands) for p in projections))
        if execution == "combine":
            return tiling.combine_config(k, x.dtype, weights, plain=all(o.kind == "dense" for o in operands))
        planes = 32 // bits if bits else 1
        return tiling.split_config(tokens, outs, in_features, k, x.dtype, weights, planes, width)
    return replace(chosen, block_k=width or chosen.block_k)


def _blocks(c: Config) -> dict[str, int]:
    blocks = {"BLOCK_M": c.block_m, "BLOCK_N": c.block_n, "BLOCK_K": c.block_k}
    return blocks | {"num_warps": c.num_warps, "num_stages": c.num_stages}
