// One row of a matrix at a time in float32: a mix is formed, and stored, a row after another; and what norms need.
#pragma once

#include "lanes.h"

namespace alignvec {
namespace {

// Rows of a matrix follow each other: what lies some way ahead is read soon, in this row or the next.
constexpr int64_t AHEAD = 8192;
constexpr int64_t AHEAD_OF_MANY = 2048;  // bytes in each of several matrices
ALIGNVEC_INLINE void prefetch(const void* at, int64_t ahead = AHEAD) {
  __builtin_prefetch(static_cast<const char*>(at) + ahead);
}

template <int N, typename T>
ALIGNVEC_INLINE void load_row_of(const T* row, int64_t in, float* mix) {
  int64_t k = 0;
  for (; k + N <= in; k += N) {
    prefetch(row + k);
    store(mix + k, load_wide<N>(row + k));
  }
  for (; k < in; ++k) mix[k] = widen_one(row[k]);
}

template <int N>
void load_row(const Matrix& matrix, int64_t n, int64_t in, float* mix) {
  const char* row = matrix.row(n);
  if (matrix.dtype == DType::f32) return load_row_of<N>(reinterpret_cast<const float*>(row), in, mix);
  load_row_of<N>(reinterpret_cast<const uint16_t*>(row), in, mix);
}

template <int N, typename T>
ALIGNVEC_INLINE void add_dense(const T* row, int64_t in, float c, float* mix) {
  int64_t k = 0;
  for (; k + N <= in; k += N) {
    prefetch(row + k);
    store(mix + k, load<F<N>>(mix + k) + c * load_wide<N>(row + k));
  }
  for (; k < in; ++k) mix[k] += c * widen_one(row[k]);
}

// mix[k .. k + N) += values, of which the row has `in - k`.
template <int N>
ALIGNVEC_INLINE void add_lanes(float* mix, int64_t k, int64_t in, F<N> values) {
  if (k + N <= in) {
    store(mix + k, load<F<N>>(mix + k) + values);
  } else {
    for (int64_t i = 0; k + i < in; ++i) mix[k + i] += values[i];
  }
}

template <int N, int BITS>
void add_codes(const Operand& operand, int64_t n, float c, float* mix) {
  constexpr int PLANES = 32 / BITS;
  const int32_t* words = operand.words + n * operand.words_stride;
  const char* scales = operand.scales.row(n);
  for (int64_t g = 0; g < operand.groups; ++g) {
    const int64_t first = g * operand.group;
    const int64_t last = operand.in - first < operand.group ? operand.in : first + operand.group;
    const float scale = c * item(scales, operand.scales.dtype, g);
    for (int64_t k0 = first; k0 < last; k0 += operand.width) {
      const Plane plane = plane_of(k0, operand.width, PLANES);
      const int32_t* at = words + plane.words;
      for (int64_t k = k0; k < k0 + operand.width && k < last; k += N) {
        if (plane.number == 0) prefetch(at + k - k0, 4 * operand.words_stride);  // the next row's
        add_lanes<N>(mix, k, last, scale * field<N, BITS>(load<I<N>>(at + k - k0), plane.number));
      }
    }
  }
}

template <int N, int BITS>
void add_lossless(const Operand& operand, const Matrix& weight, int64_t n, float c, float* mix) {
  constexpr int PLANES = 32 / BITS;
  const int32_t* words = operand.words + n * operand.words_stride;
  const uint16_t* base = reinterpret_cast<const uint16_t*>(weight.row(n));
  for (int64_t k0 = 0; k0 < operand.in; k0 += operand.width) {
    const Plane plane = plane_of(k0, operand.width, PLANES);
    const int32_t* at = words + plane.words;
    for (int64_t k = k0; k < k0 + operand.width && k < operand.in; k += N) {
      if (plane.number == 0) prefetch(at + k - k0, 4 * operand.words_stride);
      F<N> w = k + N <= operand.in ? load_wide<N>(base + k) : load_wide_some<N>(base + k, operand.in - k);
      add_lanes<N>(mix, k, operand.in, c * stepped<N, BITS>(load<I<N>>(at + k - k0), plane.number, w));
    }
  }
  const uint16_t* values = reinterpret_cast<const uint16_t*>(operand.values.data);
  for (int32_t e = operand.start[n]; e < operand.start[n + 1]; ++e) {
    const int32_t k = operand.columns[e];
    mix[k] += c * (widen_one(values[e]) - widen_one(base[k]));
  }
}

template <int N, typename T>
void add_sparse(const Operand& operand, int64_t n, float c, float* mix) {
  const int32_t* bitmap = operand.words + n * operand.words_stride;
  const T* values = reinterpret_cast<const T*>(operand.values.data) + operand.start[n];
  for (int64_t word = 0; word < operand.words_stride; ++word) {
    for (int j = 0; j < 32; j += N) {
      const uint32_t mask = (static_cast<uint32_t>(bitmap[word]) >> j) & ((1u << N) - 1);
      if (N >= 16 || mask != 0) add_lanes<N>(mix, word * 32 + j, operand.in, c * Spread<N>::of(mask, values));
    }
  }
}

// The low-rank delta's row, B[n] A: `rank` rows of A, each read once.
template <int N>
void add_low_rank(const Operand& operand, int64_t n, float c, float* mix) {
  for (int64_t r = 0; r < operand.rank; ++r) {
    const float b = item(operand.factor.row(n), operand.factor.dtype, r);
    const char* row = operand.values.row(r);
    if (operand.values.dtype == DType::f32) {
      add_dense<N>(reinterpret_cast<const float*>(row), operand.in, c * b, mix);
    } else {
      add_dense<N>(reinterpret_cast<const uint16_t*>(row), operand.in, c * b, mix);
    }
  }
}

template <int N>
void add_row(const Operand& operand, const Matrix& weight, int64_t n, float c, float* mix) {
  const bool wide = operand.values.dtype == DType::f32;
  switch (operand.kind) {
    case Kind::dense:
      return wide ? add_dense<N>(reinterpret_cast<const float*>(operand.values.row(n)), operand.in, c, mix)
                  : add_dense<N>(reinterpret_cast<const uint16_t*>(operand.values.row(n)), operand.in, c, mix);
    case Kind::codes:
      if (operand.bits == 1) return add_codes<N, 1>(operand, n, c, mix);
      if (operand.bits == 4) return add_codes<N, 4>(operand, n, c, mix);
      return add_codes<N, 8>(operand, n, c, mix);
    case Kind::lossless:
      if (operand.bits == 2) return add_lossless<N, 2>(operand, weight, n, c, mix);
      if (operand.bits == 4) return add_lossless<N, 4>(operand, weight, n, c, mix);
      return add_lossless<N, 8>(operand, weight, n, c, mix);
    case Kind::sparse:
      return wide ? add_sparse<N, float>(operand, n, c, mix) : add_sparse<N, uint16_t>(operand, n, c, mix);
    case Kind::low_rank:
      return add_low_rank<N>(operand, n, c, mix);
    case Kind::zero:
      return;
  }
}

// Dense deltas and the base side by side, mix[k] = base[n][first + k] + sum_i c[i] deltas[i][n][first + k]: one pass
// over all of them.
template <int N, typename T>
void mix_rows(const Matrix& base, const Matrix* deltas, const float* c, int64_t count, int64_t n, int64_t first,
              int64_t in, float* mix) {
  const T* rows[MOST_VECTORS + 1] = {reinterpret_cast<const T*>(base.row(n)) + first};
  for (int64_t i = 0; i < count; ++i) rows[i + 1] = reinterpret_cast<const T*>(deltas[i].row(n)) + first;
  int64_t k = 0;
  for (; k + 2 * N <= in; k += 2 * N) {
    prefetch(rows[0] + k, AHEAD_OF_MANY);
    F<N> low = load_wide<N>(rows[0] + k), high = load_wide<N>(rows[0] + k + N);
    for (int64_t i = 0; i < count; ++i) {
      prefetch(rows[i + 1] + k, AHEAD_OF_MANY);
      low += c[i] * load_wide<N>(rows[i + 1] + k);
      high += c[i] * load_wide<N>(rows[i + 1] + k + N);
    }
    store(mix + k, low);
    store(mix + k + N, high);
  }
  for (; k < in; ++k) {
    mix[k] = widen_one(rows[0][k]);
    for (int64_t i = 0; i < count; ++i) mix[k] += c[i] * widen_one(rows[i + 1][k]);
  }
}

template <int N>
void mix_dense(const Matrix& base, const Matrix* deltas, const float* c, int64_t count, int64_t n, int64_t first,
               int64_t in, float* mix) {
  if (base.dtype == DType::f32) return mix_rows<N, float>(base, deltas, c, count, n, first, in, mix);
  mix_rows<N, uint16_t>(base, deltas, c, count, n, first, in, mix);
}

template <int N>
void store_row(const float* values, int64_t count, DType dtype, void* out, void* low) {
  if (dtype == DType::f32) {
    std::memcpy(out, values, static_cast<size_t>(count) * sizeof(float));
    if (low != nullptr) std::memset(low, 0, static_cast<size_t>(count) * sizeof(float));
    return;
  }
  uint16_t* high = static_cast<uint16_t*>(out);
  uint16_t* rest = static_cast<uint16_t*>(low);
  int64_t k = 0;
  for (; k + N <= count; k += N) {
    const F<N> v = load<F<N>>(values + k);
    const H<N> rounded = to_bf16<N>(v);
    store(high + k, rounded);
    if (rest != nullptr) store(rest + k, to_bf16<N>(v - widen<N>(rounded)));
  }
  if (k < count) {
    const size_t left = static_cast<size_t>(count - k) * 2;
    const F<N> v = load_some<F<N>>(values + k, count - k);
    const H<N> rounded = to_bf16<N>(v), remainder = to_bf16<N>(v - widen<N>(rounded));
    std::memcpy(high + k, &rounded, left);
    if (rest != nullptr) std::memcpy(rest + k, &remainder, left);
  }
}

// As `store_row` of what nobody reads soon: past the caches, so that the lines written to are not read first.
template <int N>
void stream_row(const float* values, int64_t count, DType dtype, void* out) {
  int64_t k = 0;
#if defined(ALIGNVEC_AVX512)
  char* to = static_cast<char*>(out);
  const int64_t line = 64 / item_size(dtype);
  if (reinterpret_cast<uintptr_t>(out) % 64 == 0) {
    for (; k + line <= count; k += line, to += 64) {
      if (dtype == DType::f32) {
        _mm512_stream_ps(reinterpret_cast<float*>(to), load<__m512>(values + k));
      } else {
        const __m256i first = bits_of<__m256i>(to_bf16<16>(load<F<16>>(values + k)));
        const __m256i second = bits_of<__m256i>(to_bf16<16>(load<F<16>>(values + k + 16)));
        _mm512_stream_si512(reinterpret_cast<__m512i*>(to),
                            _mm512_inserti64x4(_mm512_castsi256_si512(first), second, 1));
      }
    }
    _mm_sfence();
  }
#endif
  store_row<N>(values + k, count - k, dtype, static_cast<char*>(out) + k * item_size(dtype), nullptr);
}

template <int N>
void scale_row(const float* x, int64_t count, float mean, float scale, const float* weight, float offset,
               const float* bias, float* out) {
  for (int64_t k = 0; k < count; ++k) {
    const float factor = weight == nullptr ? 1.0f : weight[k] + offset;
    out[k] = (x[k] - mean) * scale * factor + (bias == nullptr ? 0.0f : bias[k]);
  }
}

template <int N>
void moments(const float* x, int64_t count, float center, float* sum, float* squares) {
  F<N> sums = {}, products = {};
  int64_t k = 0;
  for (; k + N <= count; k += N) {
    F<N> v = load<F<N>>(x + k) - center;
    sums += v;
    products += v * v;
  }
  if (k < count) {
    F<N> v = load_some<F<N>>(x + k, count - k);
    for (int64_t i = 0; i < count - k; ++i) v[i] -= center;
    sums += v;
    products += v * v;
  }
  *sum = Sum<N>::of(sums);
  *squares = Sum<N>::of(products);
}

}  // namespace
}  // namespace alignvec
