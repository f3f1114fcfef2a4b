// Rows of two halves that meet: features turned by an angle, and a gate with what it lets through. float32 inside,
// rounded once.
#pragma once

#include <cmath>

#include "functions.h"

namespace alignvec {
namespace {

// Up to N values from or to a row.
template <int N, typename T>
ALIGNVEC_INLINE F<N> read(const T* p, int64_t count) {
  return count >= N ? load_wide<N>(p) : load_wide_some<N>(p, count);
}

template <int N>
ALIGNVEC_INLINE void write(float* p, F<N> v, int64_t count) {
  if (count >= N) return store(p, v);
  std::memcpy(p, &v, static_cast<size_t>(count) * sizeof(float));
}

template <int N>
ALIGNVEC_INLINE void write(uint16_t* p, F<N> v, int64_t count) {
  const H<N> rounded = to_bf16<N>(v);
  if (count >= N) return store(p, rounded);
  std::memcpy(p, &rounded, static_cast<size_t>(count) * sizeof(uint16_t));
}

template <int N, typename T>
ALIGNVEC_INLINE void rotate_row(const T* x, const T* cos, const T* sin, int64_t rotary, int64_t features, T* out) {
  const int64_t half = rotary / 2;
  for (int64_t k = 0; k < half; k += N) {
    const int64_t count = half - k;
    const F<N> first = read<N>(x + k, count), second = read<N>(x + half + k, count);
    const F<N> low = first * read<N>(cos + k, count) - second * read<N>(sin + k, count);
    const F<N> high = second * read<N>(cos + half + k, count) + first * read<N>(sin + half + k, count);
    write<N>(out + k, low, count);
    write<N>(out + half + k, high, count);
  }
  std::memcpy(out + rotary, x + rotary, static_cast<size_t>(features - rotary) * sizeof(T));
}

template <int N>
void rotate(const void* x, const void* cos, const void* sin, int64_t rotary, int64_t features, DType dtype, void* out) {
  if (dtype == DType::f32) {
    return rotate_row<N>(static_cast<const float*>(x), static_cast<const float*>(cos), static_cast<const float*>(sin),
                         rotary, features, static_cast<float*>(out));
  }
  rotate_row<N>(static_cast<const uint16_t*>(x), static_cast<const uint16_t*>(cos), static_cast<const uint16_t*>(sin),
                rotary, features, static_cast<uint16_t*>(out));
}

// silu: g / (1 + e^-g). gelu: g erfc(-g / sqrt(2)) / 2. gelu_tanh: g (1 + tanh(u)) / 2 = g / (1 + e^(-2 u)) with
// u = sqrt(2 / pi) (g + 0.044715 g^3).
template <int N, Activation ACTIVATION>
ALIGNVEC_INLINE F<N> activated(F<N> g) {
  if constexpr (ACTIVATION == Activation::silu) return g / (1.0f + exponential<N>(-g));
  if constexpr (ACTIVATION == Activation::gelu_tanh)
    return g / (1.0f + exponential<N>(g * (g * g * -0.0713548163f - 1.59576912f)));
  F<N> y;
  for (int i = 0; i < N; ++i) y[i] = 0.5f * g[i] * std::erfc(g[i] * -0.707106781f);
  return y;
}

template <int N, Activation ACTIVATION, typename T>
void gate_row(const T* gate, const T* up, int64_t features, T* out) {
  for (int64_t k = 0; k < features; k += N) {
    const int64_t count = features - k;
    write<N>(out + k, activated<N, ACTIVATION>(read<N>(gate + k, count)) * read<N>(up + k, count), count);
  }
}

template <int N, typename T>
void gate_by(const T* gate, const T* up, int64_t features, Activation activation, T* out) {
  if (activation == Activation::silu) return gate_row<N, Activation::silu>(gate, up, features, out);
  if (activation == Activation::gelu) return gate_row<N, Activation::gelu>(gate, up, features, out);
  gate_row<N, Activation::gelu_tanh>(gate, up, features, out);
}

template <int N>
void gate(const void* gate, const void* up, int64_t features, DType dtype, Activation activation, void* out) {
  if (dtype == DType::f32) {
    return gate_by<N>(static_cast<const float*>(gate), static_cast<const float*>(up), features, activation,
                      static_cast<float*>(out));
  }
  gate_by<N>(static_cast<const uint16_t*>(gate), static_cast<const uint16_t*>(up), features, activation,
             static_cast<uint16_t*>(out));
}

}  // namespace
}  // namespace alignvec
