// Softmax and the sum of values over a stretch of keys, for TILE_TOKENS queries that share them. Scores lie as `dots`
// writes them, [keys, TILE_TOKENS], so that a register holds the scores of N / TILE_TOKENS keys.
#pragma once

#include "functions.h"

namespace alignvec {
namespace {

// Scores, of whole tiles of TILE_ROWS keys, become e^(scale score - maximum), and 0 past the last key.
template <int N>
void weigh(float* scores, int64_t keys, float scale, float* maxima, float* sums) {
  const int64_t last = keys * TILE_TOKENS, end = (keys + TILE_ROWS - 1) / TILE_ROWS * TILE_ROWS * TILE_TOKENS;
  F<N> most = F<N>{} - __builtin_inff(), sum = {};
  for (int64_t i = 0; i < end; i += N) {
    const F<N> score = load<F<N>>(scores + i) * scale;
    store(scores + i, score);
    most = score > most ? score : most;
  }
  for (int64_t i = last; i < end; ++i) scores[i] = -__builtin_inff();
  for (int m = 0; m < TILE_TOKENS; ++m) {
    for (int i = m; i < N; i += TILE_TOKENS) maxima[m] = i == m || most[i] > maxima[m] ? most[i] : maxima[m];
    for (int i = m; i < N; i += TILE_TOKENS) most[i] = maxima[m];
  }
  for (int64_t i = 0; i < end; i += N) {
    const F<N> weight = exponential<N>(load<F<N>>(scores + i) - most);
    store(scores + i, weight);
    sum += weight;
  }
  for (int m = 0; m < TILE_TOKENS; ++m) {
    sums[m] = sum[m];
    for (int i = m + TILE_TOKENS; i < N; i += TILE_TOKENS) sums[m] += sum[i];
  }
}

// R registers of each of M sums, from feature k on.
template <int N, int R, int M, typename T>
ALIGNVEC_INLINE void add_features(const Matrix& values, int64_t first, int64_t keys, int64_t k, const float* weights,
                                  int64_t stride, float* sums) {
  F<N> own[R][M];
  unroll<R>([&](int r) ALIGNVEC_BODY {
    unroll<M>([&](int m) ALIGNVEC_BODY { own[r][m] = load<F<N>>(sums + m * stride + k + r * N); });
  });
  for (int64_t t = 0; t < keys; ++t) {
    const T* row = reinterpret_cast<const T*>(values.row(first + t)) + k;
    F<N> read[R];
    unroll<R>([&](int r) ALIGNVEC_BODY { read[r] = load_wide<N>(row + r * N); });
    unroll<M>([&](int m) ALIGNVEC_BODY {
      const float weight = weights[t * TILE_TOKENS + m];
      unroll<R>([&](int r) ALIGNVEC_BODY { own[r][m] += weight * read[r]; });
    });
  }
  unroll<R>([&](int r) ALIGNVEC_BODY {
    unroll<M>([&](int m) ALIGNVEC_BODY { store(sums + m * stride + k + r * N, own[r][m]); });
  });
}

template <int N, int M, typename T>
void add_values_of(const Matrix& values, int64_t first, int64_t keys, int64_t features, const float* weights,
                   int64_t stride, float* sums) {
  constexpr int R = N == 16 ? 4 : 2;  // as many sums as there are registers for
  int64_t k = 0;
  for (; k + R * N <= features; k += R * N) add_features<N, R, M, T>(values, first, keys, k, weights, stride, sums);
  for (; k + N <= features; k += N) add_features<N, 1, M, T>(values, first, keys, k, weights, stride, sums);
  for (; k < features; ++k) {
    for (int64_t t = 0; t < keys; ++t) {
      const float value = widen_one(reinterpret_cast<const T*>(values.row(first + t))[k]);
      for (int m = 0; m < M; ++m) sums[m * stride + k] += weights[t * TILE_TOKENS + m] * value;
    }
  }
}

template <int N>
void add_values(const Matrix& values, int64_t first, int64_t keys, int64_t features, const float* weights, int tokens,
                int64_t stride, float* sums) {
  const bool wide = values.dtype == DType::f32;
  if (tokens == 1) {
    return wide ? add_values_of<N, 1, float>(values, first, keys, features, weights, stride, sums)
                : add_values_of<N, 1, uint16_t>(values, first, keys, features, weights, stride, sums);
  }
  return wide ? add_values_of<N, TILE_TOKENS, float>(values, first, keys, features, weights, stride, sums)
              : add_values_of<N, TILE_TOKENS, uint16_t>(values, first, keys, features, weights, stride, sums);
}

}  // namespace
}  // namespace alignvec
