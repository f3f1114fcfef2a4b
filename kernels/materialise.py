"""A mix written into weights, one pass over the base and its vectors in Triton: `out = round(W + sum_i c_i D_i)`.

The pass is bound by memory: the tiles of base and deltas are loaded in 16-byte accesses before anything waits for them,
each byte once. Where vectors hold bit planes of one width, a program loads the words of its inputs once, keeps them in
registers, and has plane after plane of them by a shift, while the next tile of the base is on its way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from alignvec.errors import AlignvecError
from alignvec.kernels import eager, tiles
from alignvec.kernels.operands import MAX_VECTORS, Operand


@dataclass(frozen=True)
class Config:
    """Tiles [block_n outputs, block_k inputs], `steps` of them a program; `planes`: each is a plane of the words."""

    block_k: int
    block_n: int
    num_warps: int = 4
    steps: int = 1
    planes: bool = False


def choose_config(operands: Sequence[Operand], weight: Tensor) -> Config:
    """The launch for `operands` of `weight` [out, in]; tiles are long in the weight's contiguous dimension."""
    coded = [o for o in operands if o.kind in ("codes", "lossless")]
    widths = {o.width for o in coded}
    transposed = weight.stride(0) == 1 and weight.stride(1) != 1
    if any(o.kind == "low-rank" for o in operands):  # factors are read once a tile: large ones
        plain = all(o.kind in ("low-rank", "dense") for o in operands)
        return Config(64, 128 if plain and weight.dtype.itemsize == 2 else 64, 8)
    if len(widths) == 1 and min(widths) >= 32 and all(o.group % o.width == 0 for o in coded):
        steps = min(16, *(32 // o.bits for o in coded))
        return Config(min(widths), 1024 // min(widths), 4, steps, True)
    size = 2048 if len(operands) <= 8 else 1024
    long = triton.next_power_of_2(weight.shape[0 if transposed else 1])
    if transposed:
        block_n = min(long, size // 32)
        return Config(size // block_n, block_n)
    block_k = min(max(long, 32), 512)
    return Config(block_k, size // block_k)


@triton.jit
def _codes(SPECS: tl.constexpr, i: tl.constexpr, word, plane, scale, zero):
    """`value, factor, offset` with scale * field = value * factor + offset: value float32 [N, K], the others as scale.

    A sign is the top bit of 1.0; a wider field takes the first bits of 1.0's fraction, which needs no conversion.
    `zero` is a 0 that the compiler cannot see: a mask and a constant in a register are one instruction.
    """
    bits: tl.constexpr = tiles.bits(SPECS, i)
    one = 0x3F800000 + zero
    if bits == 1:
        value = ((word << (31 - plane)) & -0x80000000) ^ one
        factor, offset = scale, scale * 0
    else:
        value = (((word >> (bits * plane)) << (23 - bits)) & (((1 << bits) - 1) << (23 - bits))) | one
        factor, offset = scale * (1 << bits), scale * (-1.5 * (1 << bits))
    return value.to(tl.float32, bitcast=True), factor, offset


@triton.jit
def _aligned(SPECS: tl.constexpr, i: tl.constexpr, w, word, plane):
    """W stepped on by the fields, float32 [N, K], and where the field is 0 and the step lies in the side table.

    `tiles.stepped` in another order: fewer instructions for tiles that no product takes, more for those that one does.
    """
    bits: tl.constexpr = tiles.bits(SPECS, i)
    half: tl.constexpr = 1 << (bits - 1)
    if w.dtype == tl.bfloat16:  # in the upper half of a float32's bits, which is a bfloat16
        pattern = w.to(tl.float32).to(tl.int32, bitcast=True)
        field = ((word >> (bits * plane)) << 16) & (((1 << bits) - 1) << 16)
        pattern = (pattern ^ ((pattern >> 31) & 0x7FFF0000)) + field - (half << 16)
        aligned = (pattern ^ ((pattern >> 31) & 0x7FFF0000)).to(tl.float32, bitcast=True)
    else:
        pattern = w.to(tl.int16, bitcast=True).to(tl.int32)
        field = (word >> (plane * bits)) & ((1 << bits) - 1)
        pattern = (pattern ^ ((pattern >> 15) & 0x7FFF)) + field - half
        pattern = pattern ^ ((pattern >> 15) & 0x7FFF)
        aligned = pattern.to(tl.int16).to(w.dtype, bitcast=True).to(tl.float32)
    return aligned, field == 0


@triton.jit
def _next(values, cursor, there):
    """Of values that lie row by row, those of a tile: where `there` [N, K] is set, in the order of K, from `cursor`."""
    count = tl.cumsum(there.to(tl.int32), 1)
    value = tl.load(values + cursor + count - 1, mask=there, other=0.0).to(tl.float32)
    return value, cursor + tl.max(count, 1)[:, None]


@triton.jit
def _search(parts, steps, n, n_mask, first):
    """Where in the side table the inputs from `first` on begin, int32 [N, 1]: a binary search for each output."""
    low = tl.load(parts[1] + n, mask=n_mask, other=0)
    high = tl.load(parts[1] + n + 1, mask=n_mask, other=0)
    for _ in range(steps):
        middle = (low + high) // 2
        open = low < high
        before = tl.load(parts[2] + middle, mask=open, other=0) < first
        low = tl.where(open & before, middle + 1, low)
        high = tl.where(open & (before == 0), middle, high)
    return low


@triton.jit
def _sparse(parts, sizes, n, n_mask, first, k, k_mask):
    """Values where the bitmap is set, float32 [N, K]; `first`, the tile's first input, is a multiple of 32."""
    word = tl.load(parts[0] + n * sizes[0] + k // 32, mask=n_mask & k_mask, other=0)
    before = tl.load(parts[1] + n * sizes[0] + first // 32, mask=n_mask, other=0).to(tl.int32) & 0xFFFF
    cursor = tl.load(parts[2] + n, mask=n_mask, other=0) + before
    value, _ = _next(parts[3], cursor, ((word >> (k % 32)) & 1) == 1)
    return value


@triton.jit
def low_rank(parts, sizes, n, n_mask, k, k_mask):
    """B A, float32 [N, K]. Products of 16-bit factors are exact, sums are float32."""
    block: tl.constexpr = 32
    rank = sizes[2]
    acc = tl.zeros((n.shape[0], k.shape[1]), dtype=tl.float32)
    for start in range(0, rank, block):
        r = start + tl.arange(0, block)
        r_mask = r < rank
        b = tl.load(parts[1] + n * sizes[3] + r[None, :], mask=n_mask & r_mask[None, :], other=0.0)
        at = r.to(tl.int64)[:, None] * sizes[0] + k.to(tl.int64) * sizes[1]
        a = tl.load(parts[0] + at, mask=r_mask[:, None] & k_mask, other=0.0)
        if a.dtype == b.dtype and a.dtype != tl.float32:
            acc = tl.dot(b, a, acc)
        else:
            acc = tl.dot(b.to(tl.float32), a.to(tl.float32), acc, input_precision="ieee")
    return acc


@triton.jit
def _low_half(rest, k, dtype: tl.constexpr):
    """`rest` [N, K] rounded to `dtype` with a dither that walks through k, as in `tiles.dot`: its mean is right."""
    dither = (k * 40503) & 0xFFFF
    if dtype == tl.bfloat16:
        bits = (rest.to(tl.int32, bitcast=True) + dither) & -0x10000
        rest = bits.to(tl.float32, bitcast=True)
    elif dtype == tl.float16:
        bits = (rest.to(tl.int32, bitcast=True) + (dither >> 3)) & -0x2000
        small = tl.floor(rest * 16777216.0 + dither.to(tl.float32) / 65536) / 16777216.0  # subnormals: 2^-24 apart
        rest = tl.where(tl.abs(rest) < 6.103515625e-05, small, bits.to(tl.float32, bitcast=True))
    return rest.to(dtype)


@triton.jit
def _begin(SPECS: tl.constexpr, i: tl.constexpr, parts, sizes, n, n_mask, first, offs_k, PLANES: tl.constexpr):
    """What a program keeps of a vector: the words of its inputs [N, K], and its place in the side table [N, 1]."""
    words, cursor = first, first
    if PLANES and (tiles.kind(SPECS, i) == tiles.CODES or tiles.kind(SPECS, i) == tiles.LOSSLESS):
        at = first // tiles.plane_inputs(SPECS, i) * tiles.width(SPECS, i) + offs_k
        words = tl.load(parts[0] + n * sizes[0] + at, mask=n_mask, other=0)
    if tiles.kind(SPECS, i) == tiles.LOSSLESS:
        cursor = _search(parts, sizes[2], n, n_mask, first)
    return words, cursor


@triton.jit
def materialise_kernel(
    out_ptr,
    low_ptr,
    w_ptr,
    columns_ptr,
    table_ptr,
    rows_ptr,
    parts,
    sizes,
    out_features,
    in_features,
    w_stride_n,
    w_stride_k,
    out_stride_n,
    out_stride_k,
    SPECS: tl.constexpr,
    SIDES: tl.constexpr,
    VECTORS: tl.constexpr,
    PLANES: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """out = round(W + sum_i c_i D_i), low = round(W + sum_i c_i D_i - out); the edit is summed first, in float32.

    Bytes: out in (read itemsize + written itemsize, twice with `low`) + those of the vectors whose c_i is not 0.
    Where every c_i is 0, W's own bits; where one is 1 and lossless and the others are 0, the aligned ones: -0.0 too.
    """
    tiles_k = tl.cdiv(in_features, BLOCK_K * STEPS)
    pid_k, pid_n = tl.program_id(0) % tiles_k, tl.program_id(0) // tiles_k
    first = pid_k * (BLOCK_K * STEPS)
    offs_k = tl.arange(0, BLOCK_K)[None, :]
    n = (pid_n * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)[:, None]
    inside = n < out_features

    w_at = w_ptr + n * w_stride_n + (first + offs_k).to(tl.int64) * w_stride_k
    following = tl.load(w_at, mask=inside & (first + offs_k < in_features), other=0.0)

    in_use = tl.load(rows_ptr)
    zero = (in_use < 0).to(tl.int32)
    used = tl.full((), 0, tl.int32)
    coefficients, words, cursors = (), (), ()
    for i in tl.static_range(VECTORS):
        c_i = tl.where(in_use == 1, tl.load(table_ptr + tl.load(columns_ptr + i)), float("nan"))
        used += (c_i != 0).to(tl.int32)
        on = inside & ((c_i != 0).to(tl.int32) == 1)  # an integer: the interpreter cannot widen a float's comparison
        word_i, cursor_i = _begin(SPECS, i, parts[i], sizes[i], n, on, first, offs_k, PLANES)
        coefficients += (c_i,)
        words += (word_i,)
        cursors += (cursor_i,)

    for step in range(STEPS):
        start = first + step * BLOCK_K
        k = start + offs_k
        k_mask = k < in_features
        w = following
        if STEPS > 1:  # in flight while this tile is worked on
            next_mask = inside & (k + BLOCK_K < in_features) & (step + 1 < STEPS)
            following = tl.load(w_at + (step + 1) * BLOCK_K * w_stride_k, mask=next_mask, other=0.0)
        edit = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32)
        offsets = tl.zeros((BLOCK_N, 1), dtype=tl.float32)
        base = w.to(tl.float32)
        same = base
        keep = used == 0
        moved = ()
        for i in tl.static_range(VECTORS):
            c = coefficients[i]
            n_mask = inside & ((c != 0).to(tl.int32) == 1)
            mask = n_mask & k_mask
            cursor = cursors[i]
            if tiles.kind(SPECS, i) == tiles.DENSE:
                at = n * sizes[i][0] + k.to(tl.int64) * sizes[i][1]
                edit += c * tl.load(parts[i][0] + at, mask=mask, other=0.0).to(tl.float32)
            elif tiles.kind(SPECS, i) == tiles.SPARSE:
                edit += c * _sparse(parts[i], sizes[i], n, n_mask, start, k, k_mask)
            elif tiles.kind(SPECS, i) == tiles.LOW_RANK:
                if c != 0:
                    edit += c * low_rank(parts[i], sizes[i], n, n_mask, k, k_mask)
            else:
                if PLANES:
                    word = words[i]
                    plane = first // BLOCK_K % (32 // tiles.bits(SPECS, i)) + step
                else:
                    at = k // tiles.plane_inputs(SPECS, i) * tiles.width(SPECS, i) + k % tiles.width(SPECS, i)
                    word = tl.load(parts[i][0] + n * sizes[i][0] + at, mask=mask, other=0)
                    plane = k // tiles.width(SPECS, i) % (32 // tiles.bits(SPECS, i))
                if tiles.kind(SPECS, i) == tiles.CODES:
                    if PLANES:
                        at, scale_mask = start >> sizes[i][2], n_mask
                    else:
                        at, scale_mask = k >> sizes[i][2], mask
                    scale = tl.load(parts[i][1] + n * sizes[i][3] + at, mask=scale_mask, other=0.0).to(tl.float32) * c
                    value, factor, offset = _codes(SPECS, i, word, plane, scale, zero)
                    edit += value * factor
                    if PLANES:
                        offsets += offset
                    else:
                        edit += offset
                else:
                    aligned, far = _aligned(SPECS, i, w, word, plane)
                    value = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
                    if (SIDES >> i) & 1:
                        value, cursor = _next(parts[i][3], cursor, far & mask)
                    aligned = tl.where(far, value, aligned)
                    edit += c * (aligned - base)
                    if ((c == 1).to(tl.int32) == 1) & (used == 1):
                        same = aligned
                        keep = used == 1
            moved += (cursor,)
        cursors = moved
        mix = tl.where(keep, same, base + (edit + offsets))
        out_mask = inside & k_mask
        out_at = n * out_stride_n + k.to(tl.int64) * out_stride_k
        out = mix.to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + out_at, out, mask=out_mask)
        if low_ptr is not None:
            low = _low_half(mix - out.to(tl.float32), k, low_ptr.dtype.element_ty)
            tl.store(low_ptr + out_at, low, mask=out_mask)


def _sizes(operands: Sequence[Operand]) -> tuple[tuple[int, int, int, int], ...]:
    """Those of `tiles`, but of codes the logarithm of the inputs that share a scale."""
    sizes = zip(operands, tiles.sizes(operands), strict=True)
    return tuple((a, b, o.group.bit_length() - 1 if o.kind == "codes" else c, d) for o, (a, b, c, d) in sizes)


def materialise(
    weight: Tensor,
    operands: Sequence[Operand],
    columns: Tensor,
    table: Tensor,
    rows: Tensor,
    *,
    out: Tensor,
    low: Tensor | None = None,
    config: Config | None = None,
) -> Tensor:
    """Write `W + sum_i c_i D_i`, rounded once, to `out`, and what that rounding lost to `low`; returns `out`.

    weight, out, low [out, in] (a bias is one row), all float32, bfloat16 or float16, any strides, or float64, which
    plain torch takes; columns int32 [k], table float32 [max_rows, n_vectors], rows int32 [1]. c_i is
    `table[0, columns[i]]`, read on the device; all is NaN where more rows than one are in use, which have no one mix.
    `out + low` is the mix to within 2^-17. Deterministic.

    Raises:
        AlignvecError: more than 16 vectors, `out` or `low` of another shape or dtype, or in the weight's own storage.
    """
    operands = list(operands)
    if len(operands) > MAX_VECTORS:
        raise AlignvecError(f"{len(operands)} vectors edit one parameter; materialise takes {MAX_VECTORS}")
    if any(o.group & (o.group - 1) for o in operands):
        raise AlignvecError("materialise takes scales that 2, 4, 8, ... inputs share; encode with such a group")
    storage = weight.untyped_storage().data_ptr()
    for name, tensor in (("out", out), ("low", out if low is None else low)):
        if tensor.shape != weight.shape or tensor.dtype != weight.dtype or tensor.stride() != out.stride():
            raise AlignvecError(f"{name} must be {weight.dtype} {list(weight.shape)}, with the strides of out")
        if storage and tensor.untyped_storage().data_ptr() == storage:
            raise AlignvecError(f"{name} shares the weight's storage; materialise needs the base as it is")
    if weight.numel() == 0:
        return out
    if weight.dtype == torch.float64:
        eager.materialise(weight, operands, columns, table, rows, out=out, low=low)
        return out
    config = config or choose_config(operands, weight)
    out_features, in_features = weight.shape
    grid = (triton.cdiv(in_features, config.block_k * config.steps) * triton.cdiv(out_features, config.block_n),)
    with torch.cuda.device_of(weight):
        materialise_kernel[grid](
            out,
            low,
            weight,
            columns,
            table,
            rows,
            tiles.parts(operands),
            _sizes(operands),
            out_features,
            in_features,
            *weight.stride(),
            *out.stride(),
            SPECS=tiles.specs(operands),
            SIDES=sum(1 << i for i, o in enumerate(operands) if o.kind == "lossless" and o.parts[3].numel()),
            VECTORS=len(operands),
            PLANES=config.planes,
            STEPS=config.steps,
            BLOCK_K=config.block_k,
            BLOCK_N=config.block_n,
            num_warps=config.num_warps,
        )
    return out
