// N floats in a register, by the compilers' vector extensions: one source for SSE, NEON, AVX2 and AVX-512.
// Included once by each instruction set's file, under its target; everything has internal linkage.
#pragma once

#include <cstdint>
#include <cstring>

#include "types.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define ALIGNVEC_INLINE inline __attribute__((always_inline))
#define ALIGNVEC_BODY __attribute__((always_inline))

namespace alignvec {
namespace {

template <int N>
struct Lanes {
  typedef float F __attribute__((vector_size(4 * N)));
  typedef int32_t I __attribute__((vector_size(4 * N)));
  typedef uint32_t U __attribute__((vector_size(4 * N)));
  typedef uint16_t H __attribute__((vector_size(2 * N)));
};

template <int N>
using F = typename Lanes<N>::F;
template <int N>
using I = typename Lanes<N>::I;
template <int N>
using U = typename Lanes<N>::U;
template <int N>
using H = typename Lanes<N>::H;

// body(0), ..., body(COUNT - 1), written out: what a body indexes by its argument stays in registers.
template <int COUNT, typename Body>
ALIGNVEC_INLINE void unroll(const Body& body) {
  if constexpr (COUNT > 0) {
    unroll<COUNT - 1>(body);
    body(COUNT - 1);
  }
}

template <typename To, typename From>
ALIGNVEC_INLINE To bits_of(From from) {
  static_assert(sizeof(To) == sizeof(From), "only the type changes");
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

template <typename V, typename T>
ALIGNVEC_INLINE V load(const T* p) {
  V v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}

// The first `count` items, zeros after them: nothing beyond them is touched.
template <typename V, typename T>
ALIGNVEC_INLINE V load_some(const T* p, int64_t count) {
  V v = {};
  std::memcpy(&v, p, static_cast<size_t>(count) * sizeof(T));
  return v;
}

template <typename V, typename T>
ALIGNVEC_INLINE void store(T* p, V v) {
  std::memcpy(p, &v, sizeof(v));
}

template <int N>
ALIGNVEC_INLINE F<N> widen(F<N> v) {
  return v;
}

template <int N>
ALIGNVEC_INLINE F<N> widen(H<N> v) {
  return bits_of<F<N>>(__builtin_convertvector(v, U<N>) << 16);
}

ALIGNVEC_INLINE float widen_one(float v) { return v; }
ALIGNVEC_INLINE float widen_one(uint16_t v) { return bits_of<float>(static_cast<uint32_t>(v) << 16); }

// Rounded to nearest even, NaN stays NaN.
template <int N>
ALIGNVEC_INLINE H<N> to_bf16(F<N> v) {
  U<N> u = bits_of<U<N>>(v);
  U<N> rounded = (u + 0x7FFF + ((u >> 16) & 1)) >> 16;
  U<N> nan = bits_of<U<N>>(v != v);
  return __builtin_convertvector((rounded & ~nan) | (((u >> 16) | 0x40) & nan), H<N>);
}

#if defined(ALIGNVEC_BF16)
template <>
ALIGNVEC_INLINE H<16> to_bf16<16>(F<16> v) {
  return bits_of<H<16>>(_mm512_cvtneps_pbh(bits_of<__m512>(v)));
}
#endif

// Registers of a type as vectors of `float` and of 16-bit weights.
template <int N, typename T>
struct Register;
template <int N>
struct Register<N, float> {
  typedef F<N> type;
};
template <int N>
struct Register<N, uint16_t> {
  typedef H<N> type;
};

template <int N, typename T>
ALIGNVEC_INLINE F<N> load_wide(const T* p) {
  return widen<N>(load<typename Register<N, T>::type>(p));
}

template <int N, typename T>
ALIGNVEC_INLINE F<N> load_wide_some(const T* p, int64_t count) {
  return widen<N>(load_some<typename Register<N, T>::type>(p, count));
}

// The sum of all lanes, by halves.
template <int N>
struct Sum {
  static ALIGNVEC_INLINE float of(F<N> v) {
    F<N / 2> halves[2];
    std::memcpy(halves, &v, sizeof(v));
    return Sum<N / 2>::of(halves[0] + halves[1]);
  }
};
template <>
struct Sum<2> {
  static ALIGNVEC_INLINE float of(F<2> v) { return v[0] + v[1]; }
};

#if defined(ALIGNVEC_AVX512)  // the file's target, which the preprocessor does not see
// The sums of 16 registers' lanes, one a lane: 45 instructions, a third of 16 sums'.
ALIGNVEC_INLINE __m512 sums_of(const __m512* v) {
  __m512 pairs[8], quads[4], halves[2];
  unroll<8>([&](int i) ALIGNVEC_BODY {
    pairs[i] = _mm512_unpacklo_ps(v[2 * i], v[2 * i + 1]) + _mm512_unpackhi_ps(v[2 * i], v[2 * i + 1]);
  });
  unroll<4>([&](int i) ALIGNVEC_BODY {
    const __m512d first = _mm512_castps_pd(pairs[2 * i]), second = _mm512_castps_pd(pairs[2 * i + 1]);
    quads[i] =
        _mm512_castpd_ps(_mm512_unpacklo_pd(first, second)) + _mm512_castpd_ps(_mm512_unpackhi_pd(first, second));
  });
  unroll<2>([&](int i) ALIGNVEC_BODY {
    halves[i] = _mm512_shuffle_f32x4(quads[2 * i], quads[2 * i + 1], 0x44) +
                _mm512_shuffle_f32x4(quads[2 * i], quads[2 * i + 1], 0xEE);
  });
  return _mm512_shuffle_f32x4(halves[0], halves[1], 0x88) + _mm512_shuffle_f32x4(halves[0], halves[1], 0xDD);
}
#endif

// The next values of a sparse row at the set bits of `mask`, zeros elsewhere; `values` moves past them.
template <int N>
struct Spread {
  template <typename T>
  static ALIGNVEC_INLINE F<N> of(uint32_t mask, const T*& values) {
    F<N> v = {};
    for (; mask; mask &= mask - 1) v[__builtin_ctz(mask)] = widen_one(*values++);
    return v;
  }
};

#if defined(ALIGNVEC_AVX512)
template <>
struct Spread<16> {
  static ALIGNVEC_INLINE F<16> packed(__mmask16 few, const float* values) {
    return bits_of<F<16>>(_mm512_maskz_loadu_ps(few, values));
  }
  static ALIGNVEC_INLINE F<16> packed(__mmask16 few, const uint16_t* values) {
    return widen<16>(bits_of<H<16>>(_mm256_maskz_loadu_epi16(few, values)));
  }
  template <typename T>
  static ALIGNVEC_INLINE F<16> of(uint32_t mask, const T*& values) {
    const int count = __builtin_popcount(mask);
    const F<16> next = packed(static_cast<__mmask16>((1u << count) - 1), values);
    values += count;
    return bits_of<F<16>>(_mm512_maskz_expand_ps(static_cast<__mmask16>(mask), bits_of<__m512>(next)));
  }
};
#endif

// Fields of plane p of a word, as floats: +1 and -1 of one bit, n - 2^(bits - 1) of more.
template <int N, int BITS>
ALIGNVEC_INLINE F<N> field(I<N> words, int plane) {
  if (BITS == 1) {
    U<N> sign = (bits_of<U<N>>(words) << (31 - plane)) & 0x80000000u;
    return bits_of<F<N>>(sign ^ 0x3F800000u);
  }
  I<N> n = (words >> (plane * BITS)) & ((1 << BITS) - 1);
  return __builtin_convertvector(n - (1 << (BITS - 1)), F<N>);
}

// A 16-bit float's pattern as an integer that counts ULPs, its own inverse, in the upper half of each lane.
template <int N>
ALIGNVEC_INLINE I<N> ordered(I<N> upper) {
  return upper ^ ((upper >> 31) & 0x7FFF0000);
}

// The delta of weights [N] at `w`, by the steps in plane p of the words; the field 0 is no step.
template <int N, int BITS>
ALIGNVEC_INLINE F<N> stepped(I<N> words, int plane, F<N> w) {
  I<N> n = (words >> (plane * BITS)) & ((1 << BITS) - 1);
  I<N> step = (n - (1 << (BITS - 1))) & ~(n == 0);
  I<N> aligned = ordered<N>(ordered<N>(bits_of<I<N>>(w)) + (step << 16));
  return bits_of<F<N>>(aligned) - w;
}

}  // namespace
}  // namespace alignvec
