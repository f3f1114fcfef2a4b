"""What all Triton kernels share: coefficients, exact products, and tiles of a delta in every form of `operands`.

A kernel takes the vectors of a parameter as tuples: `parts`, the pointers of each operand, and `sizes`, its strides and
numbers. Which kinds they are is `SPECS`, a compile-time constant of eight bits a vector.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from alignvec.kernels.operands import Operand

KINDS = ("dense", "codes", "lossless", "sparse", "low-rank")
DENSE, CODES, LOSSLESS, SPARSE, LOW_RANK = (tl.constexpr(kind) for kind in range(5))


def specs(operands: Sequence[Operand]) -> int:
    """The constant of `operands`: kind, log2 bits, log2 width / 16 and whether scales have groups, eight bits each."""
    packed = 0
    for i, o in enumerate(operands):
        shape = max(o.bits, 1).bit_length() - 1 << 3 | (max(o.width, 16) // 16).bit_length() - 1 << 5
        packed |= (KINDS.index(o.kind) | shape | (o.kind == "codes" and o.parts[1].shape[1] > 1) << 7) << 8 * i
    return packed


def parts(operands: Sequence[Operand]) -> tuple[tuple[torch.Tensor, ...], ...]:
    """The tensors of each operand."""
    return tuple(o.parts for o in operands)


def sizes(operands: Sequence[Operand]) -> tuple[tuple[int, int, int, int], ...]:
    """Four numbers of each operand: stride of an output row, of an input, and two that depend on the kind.

    codes: inputs that share a scale, scales in a row. lossless: steps of a binary search in a row of the side table.
    low-rank: stride of a row of A and of an input, the rank, stride of a row of B, whose rank is contiguous.
    """
    rows = []
    for o in operands:
        first, last = o.parts[0], o.parts[-1]
        numbers = (first.stride(0), first.stride(1))
        if o.kind == "codes":
            rows.append((*numbers, o.group, last.shape[1]))
        elif o.kind == "lossless":
            rows.append((*numbers, o.shape[1].bit_length() if last.numel() else 0, 0))
        elif o.kind == "low-rank":
            rows.append((*numbers, last.shape[1], last.stride(0)))
        else:
            rows.append((*numbers, 0, 0))
    return tuple(rows)


@triton.constexpr_function
def kind(SPECS, i):
    return (SPECS >> (8 * i)) & 7


@triton.constexpr_function
def bits(SPECS, i):
    return 1 << ((SPECS >> (8 * i + 3)) & 3)


@triton.constexpr_function
def width(SPECS, i):
    return 16 << ((SPECS >> (8 * i + 5)) & 3)


@triton.constexpr_function
def grouped(SPECS, i):
    return (SPECS >> (8 * i + 7)) & 1


@triton.constexpr_function
def plane_inputs(SPECS, i):
    """Inputs in a chunk of bit planes."""
    return width(SPECS, i) * 32 // bits(SPECS, i)


@triton.jit
def table_row(offs_m, tokens, rows_ptr, token_rows_ptr):
    """The table row of each token, int64 [BLOCK_M]; tokens past the end are taken for the last."""
    m = tl.minimum(offs_m, tokens - 1).to(tl.int64)
    return m * tl.load(rows_ptr) // tokens if token_rows_ptr is None else tl.load(token_rows_ptr + m).to(tl.int64)


@triton.jit
def coefficient(table_ptr, table_stride, row, column, tokens, rows_ptr, token_rows_ptr):
    """`table[row, column]`; NaN where the rows in use do not divide the tokens, so that the output shows it."""
    c = tl.load(table_ptr + row * table_stride + column)
    if token_rows_ptr is None:
        c = tl.where(tokens % tl.load(rows_ptr) == 0, c, float("nan"))
    return c


@triton.jit
def weighted(c, edit):
    """`c * edit`, and 0 where c is 0: the product of a token that does not read a vector may be infinite."""
    return c * tl.where(c != 0, edit, 0.0)


@triton.jit
def dot(x, w, acc):
    """`acc + x w`: x [M, K], w [K, N], acc float32 [M, N]. What each pair of dtypes needs to keep w's information:

    float32 x: float32 products. The same 16-bit dtype: the native instruction, whose products are exact in float32.
    Two 16-bit dtypes: TF32, whose 10 bits of fraction and 8 of exponent hold bfloat16 and float16 alike.
    float32 w: w = hi + lo, each with as many bits as the instruction takes, and two products. lo is rounded with a
    dither that walks through the K of a tile: rounding to nearest would leave a bias of up to 2e-3 in the realised
    coefficient of a vector whose deltas all have the same significand, as deltas of one ULP have.
    """
    if x.dtype == tl.float32:
        acc = tl.dot(x, w.to(tl.float32), acc, input_precision="ieee")
    elif x.dtype == w.dtype:
        acc = tl.dot(x, w, acc)
    elif w.dtype != tl.float32:
        acc = tl.dot(x.to(tl.float32), w.to(tl.float32), acc, input_precision="tf32")
    else:
        dither = ((tl.arange(0, w.shape[0]) * 40503) & 0xFFFF)[:, None]  # golden ratio: even over any stretch of K
        if x.dtype == tl.bfloat16:
            hi = w.to(tl.bfloat16)
            lo = (w - hi.to(tl.float32)).to(tl.int32, bitcast=True) + dither
            lo = (lo & -0x10000).to(tl.float32, bitcast=True).to(tl.bfloat16)
            acc = tl.dot(x, lo, tl.dot(x, hi, acc))
        else:
            wide = x.to(tl.float32)
            hi = ((w.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
            lo = (w - hi).to(tl.int32, bitcast=True) + (dither >> 3)
            lo = (lo & -0x2000).to(tl.float32, bitcast=True)
            acc = tl.dot(wide, lo, tl.dot(wide, hi, acc, input_precision="tf32"), input_precision="tf32")
    return acc


@triton.jit
def code(SPECS: tl.constexpr, i: tl.constexpr, word, plane, zero):
    """The codes of one plane of a chunk as float32: +1 or -1 for a sign, else `field`.

    Put together from bits, for a conversion from integers takes as long as several other steps: a sign is the top bit
    of 1.0, a wider field n the last bits of 2^23 + n. `zero` is 0 in a form that a compiler cannot see through: a mask
    and a constant become one instruction when the constant is in a register.
    """
    if bits(SPECS, i) == 1:
        value = (((word << (31 - plane)) & -0x80000000) ^ (0x3F800000 + zero)).to(tl.float32, bitcast=True)
    else:
        mask: tl.constexpr = (1 << bits(SPECS, i)) - 1
        value = ((word >> (plane * bits(SPECS, i))) & mask) | (0x4B000000 + zero)
        value = value.to(tl.float32, bitcast=True) - (8388608.0 + (1 << (bits(SPECS, i) - 1)))
    return value


@triton.jit
def stepped(SPECS: tl.constexpr, i: tl.constexpr, w, word, plane):
    """W stepped on by the fields of one plane of a chunk, float32; where a field is 0, W itself, and that it is.

    The bits of a float, those below its sign turned over where it is negative, count its ULPs.
    """
    mask: tl.constexpr = (1 << bits(SPECS, i)) - 1
    half: tl.constexpr = 1 << (bits(SPECS, i) - 1)
    n = (word >> (plane * bits(SPECS, i))) & mask
    pattern = w.to(tl.int16, bitcast=True).to(tl.int32)
    pattern = (pattern ^ ((pattern >> 15) & 0x7FFF)) - half + tl.where(n == 0, half, n)
    pattern = pattern ^ ((pattern >> 15) & 0x7FFF)
    return pattern.to(tl.int16).to(w.dtype, bitcast=True).to(tl.float32), n == 0


@triton.jit
def decode(SPECS: tl.constexpr, i: tl.constexpr, parts, sizes, n, k, mask, w, SIDE: tl.constexpr):
    """Delta i at output rows n [N] and inputs k [K], float32 [K, N], 0 where mask [K, N] is not set.

    Every element on its own, for any n and k. `w` is the base's tile [K, N], which lossless needs; without `SIDE` the
    deltas in its side table are left out, and `side_dot` adds their part of a product. Low-rank is not for here.
    """
    at_n = n.to(tl.int64)[None, :]
    if kind(SPECS, i) == DENSE:
        d = _dense(parts, sizes, n, k, mask).to(tl.float32)
    elif kind(SPECS, i) == SPARSE:
        d = _sparse(parts, sizes, n, k, mask)
    else:
        chunk = k // plane_inputs(SPECS, i)
        plane = k // width(SPECS, i) % (32 // bits(SPECS, i))
        at = at_n * sizes[0] + (chunk * width(SPECS, i) + k % width(SPECS, i))[:, None]
        word = tl.load(parts[0] + at, mask=mask, other=0)
        if kind(SPECS, i) == CODES:
            at = at_n * sizes[3] + (k // sizes[2])[:, None]
            scale = tl.load(parts[1] + at, mask=mask, other=0.0).to(tl.float32)
            d = code(SPECS, i, word, plane[:, None], 0) * scale
        else:
            aligned, far = stepped(SPECS, i, w, word, plane[:, None])
            d = aligned - w.to(tl.float32)
            if SIDE:
                value = _side(parts, sizes[2], at_n, k, mask & far)
                d = tl.where(far, value - w.to(tl.float32), d)
            d = tl.where(mask, d, 0.0)
    return d


@triton.jit
def operand(SPECS: tl.constexpr, i: tl.constexpr, parts, sizes, n, k, mask, w):
    """The tile of `decode` as the operand of a product: in the narrowest dtype that holds it, no side table."""
    if kind(SPECS, i) == DENSE:
        d = _dense(parts, sizes, n, k, mask)
    else:
        d = decode(SPECS, i, parts, sizes, n, k, mask, w, False)
        if kind(SPECS, i) == LOSSLESS:
            d = d.to(w.dtype)
        elif kind(SPECS, i) == SPARSE:
            d = d.to(parts[3].dtype.element_ty)
    return d


@triton.jit
def _dense(parts, sizes, n, k, mask):
    at = n.to(tl.int64)[None, :] * sizes[0] + k.to(tl.int64)[:, None] * sizes[1]
    return tl.load(parts[0] + at, mask=mask, other=0.0)


@triton.jit
def _side(parts, steps, n, k, mask):
    """Aligned weights of the side table at rows n [1, N] and inputs k [K] where mask [K, N] is set: a binary search."""
    start = parts[1] + n + tl.zeros_like(k)[:, None]
    first, end = tl.load(start, mask=mask, other=0), tl.load(start + 1, mask=mask, other=0)
    for _ in range(steps):
        middle = (first + end) // 2
        open = mask & (first < end)
        left = tl.load(parts[2] + middle, mask=open, other=0) < k[:, None]
        first = tl.where(open & left, middle + 1, first)
        end = tl.where(open & ~left, middle, end)
    return tl.load(parts[3] + first, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _sparse(parts, sizes, n, k, mask):
    at_n = n.to(tl.int64)[None, :]
    at = at_n * sizes[0] + (k // 32)[:, None]
    word = tl.load(parts[0] + at, mask=mask, other=0)
    bit = (k % 32)[:, None]
    there = mask & (((word >> bit) & 1) == 1)
    # The rank of a value in its row: what the words before it hold, and the bits set below it in its own.
    below = word & ((1 << bit) - 1)
    below = below - ((below >> 1) & 0x55555555)
    below = (below & 0x33333333) + ((below >> 2) & 0x33333333)
    below = (below + (below >> 4)) & 0x0F0F0F0F
    below = (below * 0x01010101) >> 24
    rank = tl.load(parts[1] + at, mask=mask, other=0).to(tl.int32) & 0xFFFF
    start = tl.load(parts[2] + at_n + tl.zeros_like(at), mask=there, other=0)
    return tl.load(parts[3] + start + rank + below, mask=there, other=0.0).to(tl.float32)


@triton.jit
def side_dot(x_rows, x_stride_k, m_mask, w_ptr, w_stride_n, w_stride_k, parts, offs_n, out_features, mask, acc):
    """`acc + x D^T` for the side table of a lossless delta: output rows offs_n [N], those of mask [N].

    The table lists its entries by row, so those of a tile lie together; it is short, or another format would be taken.
    """
    block: tl.constexpr = 16
    used = tl.max(mask.to(tl.int32), axis=0)
    end = tl.load(parts[1] + tl.minimum(tl.max(offs_n, axis=0) + 1, out_features))
    first = tl.load(parts[1] + tl.min(offs_n, axis=0))
    for start in tl.range(first, end * used, block, num_stages=1):
        at = start + tl.arange(0, block)
        there = at < end
        column = tl.load(parts[2] + at, mask=there, other=0).to(tl.int64)
        row = tl.load(parts[4] + at, mask=there, other=-1)
        w = tl.load(w_ptr + row.to(tl.int64) * w_stride_n + column * w_stride_k, mask=there, other=0.0)
        value = tl.load(parts[3] + at, mask=there, other=0.0).to(tl.float32) - w.to(tl.float32)
        x = tl.load(x_rows + column[None, :] * x_stride_k, mask=m_mask & there[None, :], other=0.0).to(tl.float32)
        d = tl.where(row[:, None] == offs_n[None, :], value[:, None], 0.0)
        acc = tl.dot(x, d, acc, input_precision="ieee")
    return acc


@triton.jit
def expand(x_ptr, parts, sizes, offs_m, tokens, n, mask, acc, RANK_PARTS: tl.constexpr):
    """`acc + t B^T` of a low-rank delta: parts are t = x A^T, float32 [RANK_PARTS, tokens, rank] to be added up, and B.

    t keeps its float32: beside 16-bit activations it meets B as the sum of two bfloat16. It is the second operand: what
    is built in registers must not be a wide product's first one on Hopper (triton-lang/triton#9433).
    """
    block: tl.constexpr = 32
    rank = sizes[2]
    m, m_mask = offs_m.to(tl.int64)[None, :], (offs_m < tokens)[None, :]
    total = tl.zeros((n.shape[0], offs_m.shape[0]), tl.float32)
    for start in tl.range(0, rank, block, num_stages=1):
        r = start + tl.arange(0, block)
        r_mask = r < rank
        t = tl.zeros((block, offs_m.shape[0]), tl.float32)
        for s in range(RANK_PARTS):
            at = parts[0] + (s * tokens.to(tl.int64) + m) * rank + r[:, None]
            t += tl.load(at, mask=m_mask & r_mask[:, None], other=0.0)
        at = parts[1] + n[:, None] * sizes[3] + r[None, :]
        b = tl.load(at, mask=r_mask[None, :] & mask[:, None], other=0.0)
        if x_ptr.dtype.element_ty != tl.float32 and b.dtype == tl.bfloat16:
            high = t.to(tl.bfloat16)
            low = (t - high.to(tl.float32)).to(tl.bfloat16)
            total = tl.dot(b, low, tl.dot(b, high, total))
        else:
            total = tl.dot(b.to(tl.float32), t, total, input_precision="ieee")
    return acc + tl.trans(total)
