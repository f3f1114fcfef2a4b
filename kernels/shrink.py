"""Low-rank vectors, first half: t_i = x A_i^T. The second, t_i B_i^T, rides on the layer's kernel (`tiles.expand`).

Bytes: rank in for each A, once for each tile of tokens, as stored, + x, + 4 tokens rank for t.
"""

from __future__ import annotations

import triton
import triton.language as tl

from alignvec.kernels.tiles import dot


@triton.jit(do_not_specialize=["tokens"])
def shrink_kernel(
    t,
    x_ptr,
    factors,
    numbers,
    tokens,
    in_features,
    x_stride_m,
    x_stride_k,
    VECTORS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
):
    """t[i][s, m, r] = sum_k x[m, k] A_i[r, k] over the s-th part of in_features, float32.

    numbers[i]: rank, the vector's first tile, strides of A.
    """
    pid, pid_m, pid_s = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    m, m_mask = offs_m.to(tl.int64), (offs_m < tokens)[:, None]
    steps = tl.cdiv(in_features, BLOCK_K)
    for i in tl.static_range(VECTORS):
        rank = numbers[i][0]
        tile = pid - numbers[i][1]
        if (tile >= 0) & (tile < tl.cdiv(rank, BLOCK_R)):
            offs_r = tile * BLOCK_R + tl.arange(0, BLOCK_R)
            r_mask = (offs_r < rank)[None, :]
            acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
            for step in range(pid_s * steps // SPLIT_K, (pid_s + 1) * steps // SPLIT_K):
                offs_k = step * BLOCK_K + tl.arange(0, BLOCK_K)
                k, k_mask = offs_k.to(tl.int64), offs_k < in_features
                at = x_ptr + m[:, None] * x_stride_m + k[None, :] * x_stride_k
                x = tl.load(at, mask=m_mask & k_mask[None, :], other=0.0)
                at = factors[i] + offs_r.to(tl.int64)[None, :] * numbers[i][2] + k[:, None] * numbers[i][3]
                acc = dot(x, tl.load(at, mask=k_mask[:, None] & r_mask, other=0.0), acc)
            at = t[i] + (pid_s * tokens.to(tl.int64) + m[:, None]) * rank + offs_r[None, :]
            tl.store(at, acc, mask=m_mask & r_mask)
