"""Split: one float32 sum for the base and one for each vector; coefficients meet the sums, never a weight.

    y[m, n] = sum_k x[m, k] W[n, k]  +  sum_i c[m, i] sum_k x[m, k] D_i[n, k]

Bytes: W and every D_i once for each tile of tokens, as stored, + tokens (in out / BLOCK_N + out) for x and y. A vector
whose coefficients are 0 for all tokens of a tile is not read. Programs of one tile that share the inputs between them
(split-K) write parts in float32, which `sum_kernel` adds in order.

Codes stay integers in the product, exact in any dtype: a row's scale meets its sum at the end, a group's scale the sum
of a plane. Several projections of the same x (q, k and v) are one launch, with their parameters where they are.
"""

from __future__ import annotations

import triton
import triton.language as tl

from alignvec.kernels.tiles import (
    CODES,
    LOSSLESS,
    LOW_RANK,
    code,
    coefficient,
    dot,
    expand,
    grouped,
    kind,
    operand,
    side_dot,
    stepped,
    table_row,
    weighted,
)


@triton.constexpr_function
def slot(packed, width, j):
    """Entry j of `width` bits of a packed constant."""
    return (packed >> (width * j)) & ((1 << width) - 1)


@triton.constexpr_function
def in_planes(SPECS, i):
    return kind(SPECS, i) in (CODES.value, LOSSLESS.value)


@triton.constexpr_function
def reads_base(SPECS, VECTORS):
    return any(kind(SPECS, i) == LOSSLESS.value for i in range(VECTORS))


@triton.jit(do_not_specialize=["tokens"])
def split_kernel(
    y_ptr,
    x_ptr,
    pointers,
    sizes,
    numbers,
    table_ptr,
    rows_ptr,
    token_rows_ptr,
    tokens,
    in_features,
    y_stride,
    x_stride_m,
    x_stride_k,
    table_stride,
    ENTRIES: tl.constexpr,
    VECTORS: tl.constexpr,
    SPECS: tl.constexpr,
    BIASES: tl.constexpr,
    BASES: tl.constexpr,
    STEPS: tl.constexpr,
    RANK_PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLIT_K: tl.constexpr,
):
    """y[part + s, m, columns] = the sums above over the s-th part of in_features, for each entry.

    An entry is a projection with some of its vectors, those of one plane width, few enough for their sums to stay in
    registers; the first of a projection has the base. All entries run side by side, each with programs of its own.

    Of entry j: pointers[j] = weight, bias, bias deltas, columns, parts of each operand; sizes[j] = `tiles.sizes` with
    the operand's place in columns and log2 of the planes that share a scale; numbers[j] = output features, first column
    of y, first tile, strides of weight [2], bias [1] and bias deltas [2], first part. VECTORS, SPECS, BIASES, BASES: 8,
    32, 2 and 1 bits an entry (a bias, bias deltas; the base). STEPS: log2 of the planes and of a step's inputs, 4 bits
    each.
    """
    pid = tl.program_id(0)
    shared = (x_ptr, x_stride_m, x_stride_k, table_ptr, table_stride, rows_ptr, token_rows_ptr, tokens, in_features)
    for j in tl.static_range(ENTRIES):
        tile = pid - numbers[j][2]
        if ENTRIES == 1 or (tile >= 0) & (tile < tl.cdiv(numbers[j][0], BLOCK_N)):
            _tile(
                y_ptr,
                y_stride,
                shared,
                pointers[j],
                sizes[j],
                numbers[j],
                tile,
                slot(VECTORS, 8, j),
                slot(SPECS, 32, j),
                slot(BIASES, 2, j),
                slot(BASES, 1, j),
                1 << slot(STEPS, 4, 2 * j),
                RANK_PARTS,
                BLOCK_M,
                BLOCK_N,
                1 << slot(STEPS, 4, 2 * j + 1),
                SPLIT_K,
            )


@triton.jit
def _tile(
    y_ptr,
    y_stride,
    shared,
    pointers,
    sizes,
    numbers,
    tile,
    VECTORS: tl.constexpr,
    SPECS: tl.constexpr,
    BIASES: tl.constexpr,
    BASE: tl.constexpr,
    PLANES: tl.constexpr,
    RANK_PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
):
    x_ptr, x_stride_m, x_stride_k, table_ptr, table_stride, rows_ptr, token_rows_ptr, tokens, in_features = shared
    w_ptr, bias_ptr, bias_d_ptr, columns_ptr, parts = pointers
    out_features = numbers[0]
    pid_m, pid_s = tl.program_id(1), tl.program_id(2)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    n = offs_n.to(tl.int64)
    m_mask, n_mask = (offs_m < tokens)[:, None], offs_n < out_features
    x_rows = x_ptr + offs_m.to(tl.int64)[:, None] * x_stride_m
    w_rows = w_ptr + n[None, :] * numbers[3]

    row = table_row(offs_m, tokens, rows_ptr, token_rows_ptr)
    zero = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    acc = zero
    sums = ()
    read = ()  # which outputs of each vector: none where no token of the tile uses it
    for i in tl.static_range(VECTORS):
        c = coefficient(
            table_ptr, table_stride, row, tl.load(columns_ptr + sizes[i][4]), tokens, rows_ptr, token_rows_ptr
        )
        sums = sums + (zero,)
        read = read + (n_mask & (tl.max((c != 0).to(tl.int32), axis=0) > 0),)

    steps = tl.cdiv(in_features, BLOCK_K)
    first, last = pid_s * steps // SPLIT_K, (pid_s + 1) * steps // SPLIT_K
    loads = (x_rows, x_stride_k, m_mask, w_rows, numbers[4], n_mask, in_features, offs_n, read, parts, sizes)
    if PLANES == 1:
        for step in range(first, last):
            acc, sums = _step(step, 0, acc, sums, (), loads, VECTORS, SPECS, BASE, BLOCK_K)
    else:
        for chunk in range(first // PLANES, tl.cdiv(last, PLANES)):
            words = _words(chunk, loads, VECTORS, SPECS, BLOCK_K)
            for plane in range(tl.maximum(first - chunk * PLANES, 0), tl.minimum(last - chunk * PLANES, PLANES)):
                step = chunk * PLANES + plane
                acc, sums = _step(step, plane, acc, sums, words, loads, VECTORS, SPECS, BASE, BLOCK_K)

    # Programs of one tile add up in the second pass; the first of them brings what is not a sum over the inputs.
    once = pid_s == 0
    for i in tl.static_range(VECTORS):
        edit = sums[i]
        if kind(SPECS, i) == CODES and not grouped(SPECS, i):
            edit *= tl.load(parts[i][1] + n, mask=read[i], other=0.0).to(tl.float32)[None, :]
        if kind(SPECS, i) == LOSSLESS:
            base = (w_ptr, numbers[3], numbers[4])
            edit = side_dot(x_rows, x_stride_k, m_mask, *base, parts[i], offs_n, out_features, read[i] & once, edit)
        if kind(SPECS, i) == LOW_RANK:
            edit = expand(x_ptr, parts[i], sizes[i], offs_m, tokens, n, read[i] & once, edit, RANK_PARTS)
        if slot(BIASES, 1, 1):
            at = bias_d_ptr + sizes[i][4] * numbers[6].to(tl.int64) + n * numbers[7]
            edit += tl.load(at, mask=read[i] & once, other=0.0).to(tl.float32)[None, :]
        c = coefficient(
            table_ptr, table_stride, row, tl.load(columns_ptr + sizes[i][4]), tokens, rows_ptr, token_rows_ptr
        )
        acc += weighted(c[:, None], edit)
    if slot(BIASES, 1, 0) and BASE:
        acc += tl.load(bias_ptr + n * numbers[5], mask=n_mask & once, other=0.0).to(tl.float32)[None, :]
    y = y_ptr + ((numbers[8] + pid_s) * tokens.to(tl.int64) + offs_m[:, None]) * y_stride + (numbers[1] + n)[None, :]
    tl.store(y, acc.to(y_ptr.dtype.element_ty), mask=m_mask & n_mask[None, :])


@triton.jit
def _words(chunk, loads, VECTORS: tl.constexpr, SPECS: tl.constexpr, BLOCK_K: tl.constexpr):
    """The words of one chunk of bit planes, int32 [BLOCK_K, BLOCK_N], for each vector that lies in planes."""
    _, _, _, _, _, _, _, offs_n, read, parts, sizes = loads
    at_k = (chunk * BLOCK_K + tl.arange(0, BLOCK_K))[:, None]
    words = ()
    for i in tl.static_range(VECTORS):
        if in_planes(SPECS, i):
            at = parts[i][0] + offs_n.to(tl.int64)[None, :] * sizes[i][0] + at_k
            words = words + (tl.load(at, mask=read[i][None, :], other=0),)
        else:
            words = words + (0,)
    return words


@triton.jit
def _step(
    step,
    plane,
    acc,
    sums,
    words,
    loads,
    VECTORS: tl.constexpr,
    SPECS: tl.constexpr,
    BASE: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The sums after BLOCK_K more inputs, which are one plane of each vector that lies in planes."""
    x_rows, x_stride_k, m_mask, w_rows, w_stride_k, n_mask, in_features, offs_n, read, parts, sizes = loads
    zero = in_features >> 31  # what the compiler does not know to be 0, see `code`
    offs_k = step * BLOCK_K + tl.arange(0, BLOCK_K)
    k, k_mask = offs_k.to(tl.int64), offs_k < in_features
    x = tl.load(x_rows + k[None, :] * x_stride_k, mask=m_mask & k_mask[None, :], other=0.0)
    w = x
    if BASE or reads_base(SPECS, VECTORS):
        w = tl.load(w_rows + k[:, None] * w_stride_k, mask=k_mask[:, None] & n_mask[None, :], other=0.0)
    if BASE:
        acc = dot(x, w, acc)
    after = ()
    for i in tl.static_range(VECTORS):
        if kind(SPECS, i) == LOW_RANK:
            total = sums[i]
        elif kind(SPECS, i) == CODES:
            q = code(SPECS, i, words[i], plane, zero).to(x.dtype)
            if not grouped(SPECS, i):
                total = dot(x, q, sums[i])
            else:
                at = parts[i][1] + offs_n.to(tl.int64) * sizes[i][3] + (step >> sizes[i][5])
                scale = tl.load(at, mask=read[i], other=0.0).to(tl.float32)
                total = sums[i] + dot(x, q, tl.zeros_like(acc)) * scale[None, :]
        elif kind(SPECS, i) == LOSSLESS:
            aligned, _ = stepped(SPECS, i, w, words[i], plane)
            d = aligned - w.to(tl.float32)
            total = dot(x, d.to(w.dtype), sums[i])
        else:
            mask = k_mask[:, None] & read[i][None, :]
            total = dot(x, operand(SPECS, i, parts[i], sizes[i], offs_n, offs_k, mask, w), sums[i])
        after = after + (total,)
    return acc, after


@triton.jit(do_not_specialize=["tokens"])
def sum_kernel(
    y_ptr, parts_ptr, y_stride, columns, tokens, ends, counts, PROJECTIONS: tl.constexpr, BLOCK: tl.constexpr
):
    """y[m, n] = sum_s parts[s, m, n], in order of s: split-K without atomics is deterministic.

    Columns up to ends[j] have counts[j] parts. Bytes: 4 tokens columns counts, and y's.
    """
    m = tl.program_id(1).to(tl.int64)
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    count = tl.zeros((BLOCK,), tl.int32)
    for j in tl.static_range(PROJECTIONS):
        count = tl.where((count == 0) & (offs < ends[j]), counts[j], count)
    acc = tl.zeros((BLOCK,), dtype=tl.float32)
    for s in range(tl.max(count, axis=0)):
        acc += tl.load(parts_ptr + (s * tokens.to(tl.int64) + m) * columns + offs, mask=s < count, other=0.0)
    tl.store(y_ptr + m * y_stride + offs, acc.to(y_ptr.dtype.element_ty), mask=offs < columns)
