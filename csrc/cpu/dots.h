// Sums over the inputs in float32: dots[r][m] = sum_k x[m][k] delta[r][k], one output row's delta at a time in
// registers. Reads each row of the operand once for a tile of tokens; decoded values never leave registers.
#pragma once

#include "lanes.h"

namespace alignvec {
namespace {

// A tile's sums, lanes not yet added up.
template <int N, int R, int M>
struct Tile {
  F<N> sum[R][M];

  ALIGNVEC_INLINE void clear() {
    unroll<R>([&](int r) ALIGNVEC_BODY { unroll<M>([&](int m) ALIGNVEC_BODY { sum[r][m] = F<N>{}; }); });
  }

  ALIGNVEC_INLINE void write(float* sums) const {
#if defined(ALIGNVEC_AVX512)
    if constexpr (N == 16) {
      __m512 own[TILE_ROWS * TILE_TOKENS] = {};
      unroll<R>([&](int r) ALIGNVEC_BODY {
        unroll<M>([&](int m) ALIGNVEC_BODY { own[r * TILE_TOKENS + m] = bits_of<__m512>(sum[r][m]); });
      });
      _mm512_mask_storeu_ps(sums, static_cast<__mmask16>((1u << (R * TILE_TOKENS)) - 1), sums_of(own));
      return;
    }
#endif
    unroll<R>([&](int r) ALIGNVEC_BODY {
      unroll<M>([&](int m) ALIGNVEC_BODY { sums[r * TILE_TOKENS + m] = Sum<N>::of(sum[r][m]); });
    });
  }
};

// Rows n0 to n0 + R of an operand: rows past the last are the last again, and their sums are not used.
ALIGNVEC_INLINE int64_t clamped(int64_t n, const Operand& operand) { return n < operand.out ? n : operand.out - 1; }

// Asks for the same words of the next tile's rows, at a chunk's first plane: packed rows are too short for the CPU to
// see them coming.
template <int R>
ALIGNVEC_INLINE void prefetch_tile(const Operand& operand, const int32_t* words) {
  __builtin_prefetch(words + R * operand.words_stride);
}

template <int N, int R, int M, typename T>
void dots_dense(const Operand& operand, int64_t n0, const float* x, int64_t stride, float* sums) {
  const T* rows[R];
  unroll<R>([&](int r)
                ALIGNVEC_BODY { rows[r] = reinterpret_cast<const T*>(operand.values.row(clamped(n0 + r, operand))); });
  Tile<N, R, M> tile;
  tile.clear();
  int64_t k = 0;
  for (; k + N <= operand.in; k += N) {
    F<N> xs[M];
    unroll<M>([&](int m) ALIGNVEC_BODY { xs[m] = load<F<N>>(x + m * stride + k); });
    unroll<R>([&](int r) ALIGNVEC_BODY {
      F<N> w = load_wide<N>(rows[r] + k);
      unroll<M>([&](int m) ALIGNVEC_BODY { tile.sum[r][m] += w * xs[m]; });
    });
  }
  if (k < operand.in) {
    unroll<R>([&](int r) ALIGNVEC_BODY {
      F<N> w = load_wide_some<N>(rows[r] + k, operand.in - k);
      unroll<M>([&](int m) ALIGNVEC_BODY { tile.sum[r][m] += w * load<F<N>>(x + m * stride + k); });
    });
  }
  tile.write(sums);
}

// Integers are summed a group of inputs at a time; the group's scale meets the sum.
template <int N, int R, int M, int BITS>
void dots_codes(const Operand& operand, int64_t n0, const float* x, int64_t stride, float* sums) {
  constexpr int PLANES = 32 / BITS;
  const int32_t* words[R];
  unroll<R>([&](int r) ALIGNVEC_BODY { words[r] = operand.words + clamped(n0 + r, operand) * operand.words_stride; });
  Tile<N, R, M> total;
  total.clear();
  for (int64_t g = 0; g < operand.groups; ++g) {
    const int64_t first = g * operand.group;
    const int64_t last = operand.in - first < operand.group ? operand.in : first + operand.group;
    Tile<N, R, M> tile;
    tile.clear();
    for (int64_t k = first; k < last; k += operand.width) {
      const Plane plane = plane_of(k, operand.width, PLANES);
      for (int j = 0; j < operand.width; j += N) {
        F<N> xs[M];
        unroll<M>([&](int m) ALIGNVEC_BODY { xs[m] = load<F<N>>(x + m * stride + k + j); });
        unroll<R>([&](int r) ALIGNVEC_BODY {
          if (plane.number == 0) prefetch_tile<R>(operand, words[r] + plane.words + j);
          F<N> w = field<N, BITS>(load<I<N>>(words[r] + plane.words + j), plane.number);
          unroll<M>([&](int m) ALIGNVEC_BODY { tile.sum[r][m] += w * xs[m]; });
        });
      }
    }
    unroll<R>([&](int r) ALIGNVEC_BODY {
      const float scale = item(operand.scales.row(clamped(n0 + r, operand)), operand.scales.dtype, g);
      unroll<M>([&](int m) ALIGNVEC_BODY { total.sum[r][m] += scale * tile.sum[r][m]; });
    });
  }
  total.write(sums);
}

// What the side table adds to the sums of a row: those weights have no step.
template <int M, typename X>
ALIGNVEC_INLINE void add_side(const Operand& operand, const uint16_t* weight, int64_t n, const X* x, int64_t stride,
                              float* sums) {
  const uint16_t* values = reinterpret_cast<const uint16_t*>(operand.values.data);
  for (int32_t e = operand.start[n]; e < operand.start[n + 1]; ++e) {
    const int32_t k = operand.columns[e];
    const float delta = widen_one(values[e]) - widen_one(weight[k]);
    for (int m = 0; m < M; ++m) sums[m] += delta * widen_one(x[m * stride + k]);
  }
}

template <int N, int R, int M, int BITS>
void dots_lossless(const Operand& operand, const Matrix& weight, int64_t n0, const float* x, int64_t stride,
                   float* sums) {
  constexpr int PLANES = 32 / BITS;
  const int32_t* words[R];
  const uint16_t* base[R];
  for (int r = 0; r < R; ++r) {
    words[r] = operand.words + clamped(n0 + r, operand) * operand.words_stride;
    base[r] = reinterpret_cast<const uint16_t*>(weight.row(clamped(n0 + r, operand)));
  }
  Tile<N, R, M> tile;
  tile.clear();
  for (int64_t k0 = 0; k0 < operand.in; k0 += operand.width) {
    const Plane plane = plane_of(k0, operand.width, PLANES);
    for (int j = 0; j < operand.width && k0 + j < operand.in; j += N) {
      const int64_t k = k0 + j;
      F<N> xs[M];
      unroll<M>([&](int m) ALIGNVEC_BODY { xs[m] = load<F<N>>(x + m * stride + k); });
      unroll<R>([&](int r) ALIGNVEC_BODY {
        F<N> w = k + N <= operand.in ? load_wide<N>(base[r] + k) : load_wide_some<N>(base[r] + k, operand.in - k);
        if (plane.number == 0) prefetch_tile<R>(operand, words[r] + plane.words + j);
        F<N> delta = stepped<N, BITS>(load<I<N>>(words[r] + plane.words + j), plane.number, w);
        unroll<M>([&](int m) ALIGNVEC_BODY { tile.sum[r][m] += delta * xs[m]; });
      });
    }
  }
  tile.write(sums);
  for (int r = 0; r < R; ++r)
    if (n0 + r < operand.out) add_side<M>(operand, base[r], n0 + r, x, stride, sums + r * TILE_TOKENS);
}

template <int N, int R, int M, typename T>
void dots_sparse(const Operand& operand, int64_t n0, const float* x, int64_t stride, float* sums) {
  for (int r = 0; r < R && n0 + r < operand.out; ++r) {
    const int32_t* bitmap = operand.words + (n0 + r) * operand.words_stride;
    const T* values = reinterpret_cast<const T*>(operand.values.data) + operand.start[n0 + r];
    Tile<N, 1, M> tile;
    tile.clear();
    for (int64_t word = 0; word < operand.words_stride; ++word) {
      for (int j = 0; j < 32; j += N) {
        const uint32_t mask = (static_cast<uint32_t>(bitmap[word]) >> j) & ((1u << N) - 1);
        if (N < 16 && mask == 0) continue;  // where it is likely
        const F<N> delta = Spread<N>::of(mask, values);
        const float* at = x + word * 32 + j;
        unroll<M>([&](int m) ALIGNVEC_BODY { tile.sum[0][m] += delta * load<F<N>>(at + m * stride); });
      }
    }
    tile.write(sums + r * TILE_TOKENS);
  }
}

template <int N, int R, int M>
void dots_tile(const Operand& operand, const Matrix& weight, int64_t n0, const float* x, int64_t stride, float* sums) {
  const bool wide = operand.values.dtype == DType::f32;
  switch (operand.kind) {
    case Kind::dense:
      return wide ? dots_dense<N, R, M, float>(operand, n0, x, stride, sums)
                  : dots_dense<N, R, M, uint16_t>(operand, n0, x, stride, sums);
    case Kind::codes:
      if (operand.bits == 1) return dots_codes<N, R, M, 1>(operand, n0, x, stride, sums);
      if (operand.bits == 4) return dots_codes<N, R, M, 4>(operand, n0, x, stride, sums);
      return dots_codes<N, R, M, 8>(operand, n0, x, stride, sums);
    case Kind::lossless:
      if (operand.bits == 2) return dots_lossless<N, R, M, 2>(operand, weight, n0, x, stride, sums);
      if (operand.bits == 4) return dots_lossless<N, R, M, 4>(operand, weight, n0, x, stride, sums);
      return dots_lossless<N, R, M, 8>(operand, weight, n0, x, stride, sums);
    case Kind::sparse:
      return wide ? dots_sparse<N, R, M, float>(operand, n0, x, stride, sums)
                  : dots_sparse<N, R, M, uint16_t>(operand, n0, x, stride, sums);
    case Kind::low_rank:
    case Kind::zero:
      return;
  }
}

template <int N>
void dots_f32(const Operand& operand, const Matrix& weight, int64_t n0, const Inputs& x, int64_t m0, int tokens, Ahead&,
              float* sums) {
  const float* first = x.f32 + m0 * x.stride;
  if (tokens == 1) return dots_tile<N, TILE_ROWS, 1>(operand, weight, n0, first, x.stride, sums);
  dots_tile<N, TILE_ROWS, TILE_TOKENS>(operand, weight, n0, first, x.stride, sums);
}

}  // namespace
}  // namespace alignvec
