// Sums over the inputs of bf16 activations by vdpbf16ps, which adds two products to each float32 sum: exact products,
// twice the rate of float32. Stored integers become bf16 values in two instructions for 32 of them.
//
// Words of a chunk hold one input of every plane. A 32-bit lane takes the inputs of planes 2q and 2q + 1 at its word,
// so that activations are read "in pairs": x[j], x[width + j] side by side for each j < width of every 2 width inputs.
#pragma once

#include <immintrin.h>

#include "dots.h"

namespace alignvec {
namespace {

typedef __m512i Bits;

ALIGNVEC_INLINE __m512bh as_bf16(Bits v) { return bits_of<__m512bh>(v); }

ALIGNVEC_INLINE Bits load_bits(const void* p) { return _mm512_loadu_si512(p); }

template <int R, int M>
struct TileBf16 : Tile<16, R, M> {
  ALIGNVEC_INLINE void add(int r, Bits weights, const Bits* x) {
    unroll<M>([&](int m) ALIGNVEC_BODY {
      const __m512 before = bits_of<__m512>(this->sum[r][m]);
      this->sum[r][m] = bits_of<F<16>>(_mm512_dpbf16_ps(before, as_bf16(weights), as_bf16(x[m])));
    });
  }
};

template <int M>
ALIGNVEC_INLINE void load_inputs(const uint16_t* x, int64_t stride, Bits* xs) {
  unroll<M>([&](int m) ALIGNVEC_BODY { xs[m] = load_bits(x + m * stride); });
}

template <int R, int M>
void dots_dense_bf16(const Operand& operand, int64_t n0, const uint16_t* x, int64_t stride, float* sums) {
  const uint16_t* rows[R];
  unroll<R>([&](int r) ALIGNVEC_BODY {
    rows[r] = reinterpret_cast<const uint16_t*>(operand.values.row(clamped(n0 + r, operand)));
  });
  TileBf16<R, M> tile;
  tile.clear();
  Bits xs[M];
  int64_t k = 0;
  for (; k + 32 <= operand.in; k += 32) {
    load_inputs<M>(x + k, stride, xs);
    unroll<R>([&](int r) ALIGNVEC_BODY { tile.add(r, load_bits(rows[r] + k), xs); });
  }
  if (k < operand.in) {
    const __mmask32 left = (1u << (operand.in - k)) - 1;
    load_inputs<M>(x + k, stride, xs);
    unroll<R>([&](int r) ALIGNVEC_BODY { tile.add(r, _mm512_maskz_loadu_epi16(left, rows[r] + k), xs); });
  }
  tile.write(sums);
}

// Of 8 bytes that _mm512_multishift_epi64_epi8 picks from a pair of words: bytes 0 and 2 of each word (with `byte` 1
// its bytes 1 and 3) become the 8 bits from `first` and `second` on.
constexpr int64_t pick(int first, int second, int byte) {
  uint64_t control = 0;
  for (int word = 0; word < 2; ++word) {
    control |= static_cast<uint64_t>((first + 32 * word) & 63) << (32 * word + 8 * byte);
    control |= static_cast<uint64_t>((second + 32 * word) & 63) << (32 * word + 16 + 8 * byte);
  }
  return static_cast<int64_t>(control);
}

// The bf16 pattern of an integer below 256.
constexpr uint16_t integer_bf16(int value) {
  if (value == 0) return 0;
  int magnitude = value < 0 ? -value : value, exponent = 7;
  for (; magnitude < 128; magnitude *= 2) --exponent;
  return static_cast<uint16_t>((value < 0 ? 0x8000 : 0) | ((127 + exponent) << 7) | (magnitude & 127));
}

// The integers of 16 words in planes 2q and 2q + 1 as bf16, in one part, or two whose sum they are: n - 8 of 4 bits;
// the lower half of 8 bits, and 16 (n / 16 - 8).
template <int BITS>
struct Integers {
  static constexpr int PARTS = BITS == 8 ? 2 : 1;
  static constexpr int PAIRS = 16 / BITS;
  int64_t controls[PAIRS][PARTS];
  uint16_t tables[PARTS][32];

  constexpr Integers() : controls(), tables() {
    for (int part = 0; part < PARTS; ++part) {
      for (int q = 0; q < PAIRS; ++q)
        controls[q][part] =
            BITS == 1 ? pick(2 * q - 7, 2 * q - 6, 1) : pick(2 * q * BITS + 4 * part, (2 * q + 1) * BITS + 4 * part, 0);
      for (int i = 0; i < 32; ++i)  // an index has 5 bits, of which the last is noise
        tables[part][i] = BITS == 4 ? integer_bf16(i % 16 - 8) : integer_bf16(part == 0 ? i % 16 : 16 * (i % 16 - 8));
    }
  }

  ALIGNVEC_INLINE Bits part(int q, int part, Bits words) const {
    const Bits fields = _mm512_multishift_epi64_epi8(_mm512_set1_epi64(controls[q][part]), words);
    if (BITS == 1)  // a sign onto 1.0: (fields & 0x8000) ^ 0x3F80
      return _mm512_ternarylogic_epi32(fields, _mm512_set1_epi32(0x80008000), _mm512_set1_epi32(0x3F803F80), 0x6A);
    return _mm512_permutexvar_epi16(fields, load_bits(tables[part]));
  }
};

template <int BITS>
constexpr Integers<BITS> INTEGERS;

template <int R, int M, int BITS, int WIDTH>
void dots_planes_bf16(const Operand& operand, int64_t n0, const uint16_t* x, int64_t stride, Ahead& ahead,
                      float* sums) {
  const int64_t width = WIDTH == 0 ? operand.width : WIDTH;
  const int32_t* words[R];
  const char* scales[R];
  unroll<R>([&](int r) ALIGNVEC_BODY {
    words[r] = operand.words + clamped(n0 + r, operand) * operand.words_stride;
    scales[r] = operand.scales.row(clamped(n0 + r, operand));
  });
  TileBf16<R, M> total;
  total.clear();
  int64_t at = 0;
  int q = 0;
  for (int64_t g = 0; g < operand.groups; ++g) {
    const int64_t first = g * operand.group;
    const int64_t last = operand.in - first < operand.group ? operand.in : first + operand.group;
    TileBf16<R, M> tile;
    tile.clear();
    for (int64_t k = first; k < last; k += 2 * width) {
      for (int64_t j = 0; j < width; j += 16) {
        ahead.step();
        Bits xs[M];
        load_inputs<M>(x + k + 2 * j, stride, xs);
        unroll<R>([&](int r) ALIGNVEC_BODY {
          if (q == 0) prefetch_tile<R>(operand, words[r] + at + j);
          const Bits own = load_bits(words[r] + at + j);
          for (int i = 0; i < Integers<BITS>::PARTS; ++i) tile.add(r, INTEGERS<BITS>.part(q, i, own), xs);
        });
      }
      if (++q == Integers<BITS>::PAIRS) q = 0, at += width;
    }
    unroll<R>([&](int r) ALIGNVEC_BODY {
      const float scale = item(scales[r], operand.scales.dtype, g);
      unroll<M>([&](int m) ALIGNVEC_BODY { total.sum[r][m] += scale * tile.sum[r][m]; });
    });
  }
  total.write(sums);
}

template <int R, int M, int BITS>
void dots_codes_bf16(const Operand& operand, int64_t n0, const uint16_t* x, int64_t stride, Ahead& ahead, float* sums) {
  if (operand.width == 64) return dots_planes_bf16<R, M, BITS, 64>(operand, n0, x, stride, ahead, sums);
  dots_planes_bf16<R, M, BITS, 0>(operand, n0, x, stride, ahead, sums);
}

template <int R, int M>
void dots_codes_bf16(const Operand& operand, int64_t n0, const uint16_t* x, int64_t stride, Ahead& ahead, float* sums) {
  if (operand.bits == 1) return dots_codes_bf16<R, M, 1>(operand, n0, x, stride, ahead, sums);
  if (operand.bits == 4) return dots_codes_bf16<R, M, 4>(operand, n0, x, stride, ahead, sums);
  dots_codes_bf16<R, M, 8>(operand, n0, x, stride, ahead, sums);
}

// A bf16 pattern as an int16 that counts ULPs, its own inverse.
ALIGNVEC_INLINE Bits ordered_bf16(Bits v) {
  return _mm512_ternarylogic_epi32(v, _mm512_srai_epi16(v, 15), _mm512_set1_epi16(0x7FFF), 0x78);  // a ^ (b & c)
}

// Steps of 16 words in planes 2q and 2q + 1 as int16; the field 0 is no step.
template <int BITS>
ALIGNVEC_INLINE Bits steps(Bits words, Bits control) {
  const Bits zero = _mm512_set1_epi16(1 << (BITS - 1));
  Bits fields = _mm512_maskz_multishift_epi64_epi8(0x5555555555555555u, control, words);
  if (BITS < 8) fields = _mm512_and_si512(fields, _mm512_set1_epi16((1 << BITS) - 1));
  return _mm512_maskz_sub_epi16(_mm512_test_epi16_mask(fields, fields), fields, zero);
}

// The aligned weights' products less the base's: both are exact, and so is what a sum of them is rounded to beside the
// base's own products.
template <int R, int M, int BITS>
void dots_lossless_bf16(const Operand& operand, const Matrix& weight, int64_t n0, const Inputs& inputs, int64_t m0,
                        float* sums) {
  constexpr int PAIRS = 16 / BITS;
  const int32_t* words[R];
  const uint16_t* base[R];
  unroll<R>([&](int r) ALIGNVEC_BODY {
    words[r] = operand.words + clamped(n0 + r, operand) * operand.words_stride;
    base[r] = reinterpret_cast<const uint16_t*>(weight.row(clamped(n0 + r, operand)));
  });
  const uint16_t* x = inputs.paired[paired_index(operand.width)] + m0 * inputs.stride;
  uint16_t order[32];
  for (int i = 0; i < 32; ++i) order[i] = static_cast<uint16_t>(i / 2 + 32 * (i % 2));
  const Bits interleave = load_bits(order);
  TileBf16<R, M> tile;
  tile.clear();
  const int64_t step = 2 * operand.width;
  for (int64_t k = 0; k < operand.in; k += step) {
    const int64_t pair = k / step;
    const int64_t at = pair / PAIRS * operand.width;
    const int q = static_cast<int>(pair % PAIRS);
    const Bits control = _mm512_set1_epi64(pick(2 * q * BITS, (2 * q + 1) * BITS, 0));
    for (int64_t j = 0; j < operand.width; j += 16) {
      Bits xs[M], negative[M];
      load_inputs<M>(x + k + 2 * j, inputs.stride, xs);
      unroll<M>([&](int m) ALIGNVEC_BODY { negative[m] = _mm512_xor_si512(xs[m], _mm512_set1_epi16(-0x8000)); });
      const int64_t left[2] = {operand.in - k - j, operand.in - k - j - operand.width};
      unroll<R>([&](int r) ALIGNVEC_BODY {
        Bits halves[2];
        for (int h = 0; h < 2; ++h) {
          const uint16_t* from = base[r] + k + j + h * operand.width;
          const __mmask16 mask = static_cast<__mmask16>(left[h] >= 16 ? 0xFFFF : left[h] > 0 ? (1 << left[h]) - 1 : 0);
          halves[h] = _mm512_castsi256_si512(_mm256_maskz_loadu_epi16(mask, from));
        }
        const Bits w = _mm512_permutex2var_epi16(halves[0], interleave, halves[1]);
        if (q == 0) prefetch_tile<R>(operand, words[r] + at + j);
        const Bits own = load_bits(words[r] + at + j);
        const Bits aligned = ordered_bf16(_mm512_add_epi16(ordered_bf16(w), steps<BITS>(own, control)));
        tile.add(r, aligned, xs);
        tile.add(r, w, negative);
      });
    }
  }
  tile.write(sums);
  const uint16_t* natural = inputs.bf16 + m0 * inputs.stride;
  for (int r = 0; r < R; ++r)
    if (n0 + r < operand.out) add_side<M>(operand, base[r], n0 + r, natural, inputs.stride, sums + r * TILE_TOKENS);
}

// A word of the bitmap spreads the row's next values over 32 inputs.
template <int M>
void dots_sparse_bf16(const Operand& operand, int64_t n, const uint16_t* x, int64_t stride, float* sums) {
  const int32_t* bitmap = operand.words + n * operand.words_stride;
  const uint16_t* values = reinterpret_cast<const uint16_t*>(operand.values.data) + operand.start[n];
  TileBf16<1, M> tile;
  tile.clear();
  for (int64_t word = 0; word < operand.words_stride; ++word) {
    const uint32_t mask = static_cast<uint32_t>(bitmap[word]);
    __builtin_prefetch(values + 512);  // a KiB on: values of all rows lie in one stretch
    const int count = __builtin_popcount(mask);
    const Bits packed = _mm512_maskz_loadu_epi16(static_cast<__mmask32>((uint64_t{1} << count) - 1), values);
    values += count;
    Bits xs[M];
    load_inputs<M>(x + 32 * word, stride, xs);
    tile.add(0, _mm512_maskz_expand_epi16(mask, packed), xs);
  }
  tile.write(sums);
}

// Groups that end within a pair of planes are left to float32, as are float32 deltas.
inline bool reads_bf16(const Operand& operand) {
  if (operand.kind == Kind::dense || operand.kind == Kind::sparse) return operand.values.dtype == DType::bf16;
  if (operand.kind == Kind::lossless) return true;
  return operand.kind == Kind::codes && (operand.group >= operand.in || operand.group % (2 * operand.width) == 0);
}

template <int R, int M>
void dots_tile_bf16(const Operand& operand, const Matrix& weight, int64_t n0, const Inputs& x, int64_t m0, Ahead& ahead,
                    float* sums) {
  if (operand.kind == Kind::dense) return dots_dense_bf16<R, M>(operand, n0, x.bf16 + m0 * x.stride, x.stride, sums);
  if (operand.kind == Kind::sparse) {
    for (int r = 0; r < R && n0 + r < operand.out; ++r)
      dots_sparse_bf16<M>(operand, n0 + r, x.bf16 + m0 * x.stride, x.stride, sums + r * TILE_TOKENS);
    return;
  }
  if (operand.kind == Kind::lossless) {
    if (operand.bits == 2) return dots_lossless_bf16<R, M, 2>(operand, weight, n0, x, m0, sums);
    if (operand.bits == 4) return dots_lossless_bf16<R, M, 4>(operand, weight, n0, x, m0, sums);
    return dots_lossless_bf16<R, M, 8>(operand, weight, n0, x, m0, sums);
  }
  const uint16_t* paired = x.paired[paired_index(operand.width)] + m0 * x.stride;
  if (operand.groups > 1 && M > 1) {  // a group's sums and the row's are in registers together
    for (int r = 0; r < R; r += 2)
      dots_codes_bf16<2, M>(operand, n0 + r, paired, x.stride, ahead, sums + r * TILE_TOKENS);
    return;
  }
  dots_codes_bf16<R, M>(operand, n0, paired, x.stride, ahead, sums);
}

void dots_bf16(const Operand& operand, const Matrix& weight, int64_t n0, const Inputs& x, int64_t m0, int tokens,
               Ahead& ahead, float* sums) {
  if (x.bf16 == nullptr || !reads_bf16(operand)) return dots_f32<16>(operand, weight, n0, x, m0, tokens, ahead, sums);
  if (tokens == 1) return dots_tile_bf16<TILE_ROWS, 1>(operand, weight, n0, x, m0, ahead, sums);
  dots_tile_bf16<TILE_ROWS, TILE_TOKENS>(operand, weight, n0, x, m0, ahead, sums);
}

}  // namespace
}  // namespace alignvec
