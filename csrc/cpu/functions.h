// Elementary functions of N floats in a register, from basic arithmetic alone.
#pragma once

#include "lanes.h"

namespace alignvec {
namespace {

// e^x within 2 units in the last place (below 2^-126, within one of the smallest number there is); NaN stays NaN.
// x = n ln 2 + r with |r| <= ln 2 / 2, and 2^n in two factors, since it may be beyond what a float holds.
template <int N>
ALIGNVEC_INLINE F<N> exponential(F<N> x) {
  constexpr float ROUNDING = 12582912.0f;  // 1.5 2^23: what is added to it becomes an integer, in the last bits
  constexpr uint32_t ROUNDING_BITS = 0x4B400000;
  x = x > 89.0f ? F<N>{} + 89.0f : x;     // infinity
  x = x < -105.0f ? F<N>{} - 105.0f : x;  // zero
  const F<N> shifted = x * 1.44269504f + ROUNDING, n = shifted - ROUNDING;
  const F<N> r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  F<N> p = r * 1.9875691500e-4f + 1.3981999507e-3f;  // Cephes' expf
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const U<N> power = bits_of<U<N>>(shifted) - ROUNDING_BITS;  // n, of either sign
  const U<N> half = ((power + 512) >> 1) - 256;
  return p * bits_of<F<N>>((half + 127) << 23) * bits_of<F<N>>((power - half + 127) << 23);
}

}  // namespace
}  // namespace alignvec
