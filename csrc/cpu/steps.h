// Lossless deltas on N floats a register: how many numbers lie between two 16-bit floats, counted, packed and walked
// again; and the words that checksums are sums of. See alignvec/formats/lossless.py and alignvec/sums.py.
#pragma once

#include "lanes.h"

namespace alignvec {
namespace {

template <int N>
struct StepLanes {
  typedef int16_t S __attribute__((vector_size(4 * N)));
  typedef uint16_t W __attribute__((vector_size(4 * N)));
  typedef uint8_t B __attribute__((vector_size(2 * N)));
  typedef uint64_t Q __attribute__((vector_size(4 * N)));
  typedef double D __attribute__((vector_size(4 * N)));
};

template <int N>
using S = typename StepLanes<N>::S;
template <int N>
using W = typename StepLanes<N>::W;
template <int N>
using B = typename StepLanes<N>::B;
template <int N>
using Q = typename StepLanes<N>::Q;
template <int N>
using D = typename StepLanes<N>::D;

constexpr int64_t FIELDS = 512;  // packed at a time: whole bytes in every width

// Neighbouring numbers as neighbouring integers, and back.
template <int N>
ALIGNVEC_INLINE S<N> in_order(S<N> bits) {
  return bits ^ ((bits >> 15) & 0x7FFF);
}

template <int N>
ALIGNVEC_INLINE S<N> step_between(S<N> base, S<N> aligned) {
  return bits_of<S<N>>(bits_of<W<N>>(in_order<N>(aligned)) - bits_of<W<N>>(in_order<N>(base)));
}

template <int N>
ALIGNVEC_INLINE S<N> load_16(const uint16_t* p, int64_t left) {
  return left >= 2 * N ? load<S<N>>(p) : load_some<S<N>>(p, left);
}

template <int N>
ALIGNVEC_INLINE S<N> larger(S<N> a, S<N> b) {
  return a > b ? a : b;
}

ALIGNVEC_INLINE int16_t larger_one(int a, int b) { return static_cast<int16_t>(a > b ? a : b); }

template <int N>
int largest_of(S<N> v) {
  int found = 0;
  for (int i = 0; i < 2 * N; ++i) found = v[i] > found ? v[i] : found;
  return found;
}

// Finite float16 values.
template <int N>
ALIGNVEC_INLINE F<N> widen_half(H<N> half) {
  const U<N> bits = __builtin_convertvector(half, U<N>), magnitude = (bits & 0x7FFF) << 13;
  const F<N> normal = bits_of<F<N>>(magnitude + (112u << 23));
  const F<N> subnormal = bits_of<F<N>>(magnitude + (113u << 23)) - 6.103515625e-05f;  // 2^-14
  const F<N> value = magnitude < (1u << 23) ? subnormal : normal;
  return bits_of<F<N>>(bits_of<U<N>>(value) | (bits & 0x8000) << 16);
}

template <int N, bool HALF>
ALIGNVEC_INLINE F<N> widen_16(H<N> value) {
  if constexpr (HALF) return widen_half<N>(value);
  return widen<N>(value);
}

constexpr int64_t COUNTED = 32;  // values that a turn of `count_steps` takes, in any instruction set

template <int N, bool HALF>
void count_steps_of(const uint16_t* base, const uint16_t* aligned, int64_t count, int64_t* counts, double* square) {
  constexpr int VECTORS = COUNTED / (2 * N), LANES = 16;
  constexpr int16_t MOST[] = {0, 1, 3, 7, 15, 31, 63, 127};  // that fields of 1 to 8 bits hold
  constexpr int64_t TURNS = 1 << 14;                         // after which the counters of 16 bits are emptied
  D<N> sums[LANES / (N / 2)] = {};  // lane i of 16 takes the squares i, i + 16, ...: the same sum whatever N
  S<N> most = {};
  for (int64_t k = 0; k < count;) {
    S<N> found[STEP_COUNTS] = {};
    const int64_t stop = count - k < TURNS * COUNTED / VECTORS ? count : k + TURNS * COUNTED / VECTORS;
    for (; k < stop; k += COUNTED) {
      unroll<VECTORS>([&](int v) ALIGNVEC_BODY {
        const int64_t left = count - k - v * 2 * N;
        if (left <= 0) return;
        const S<N> before = load_16<N>(base + k + v * 2 * N, left), after = load_16<N>(aligned + k + v * 2 * N, left);
        const S<N> step = step_between<N>(before, after), reach = step ^ (step >> 15);
        found[0] -= step != 0;
        unroll<STEP_COUNTS - 1>([&](int i) ALIGNVEC_BODY { found[i + 1] -= reach > MOST[i]; });
        most = larger<N>(most, larger<N>(before & 0x7FFF, after & 0x7FFF));
        H<N> one[2], two[2];
        std::memcpy(one, &before, sizeof(before));
        std::memcpy(two, &after, sizeof(after));
        unroll<2>([&](int i) ALIGNVEC_BODY {
          const F<N> delta = widen_16<N, HALF>(two[i]) - widen_16<N, HALF>(one[i]);
          F<N / 2> halves[2];
          std::memcpy(halves, &delta, sizeof(delta));
          unroll<2>([&](int j) ALIGNVEC_BODY {
            const D<N> wide = __builtin_convertvector(halves[j], D<N>);
            sums[(v * 2 * N + i * N + j * (N / 2)) % LANES / (N / 2)] += wide * wide;  // exact in any case
          });
        });
      });
    }
    for (int i = 0; i < STEP_COUNTS; ++i)
      for (int lane = 0; lane < 2 * N; ++lane) counts[i] += found[i][lane];
  }
  double lanes[LANES];
  std::memcpy(lanes, sums, sizeof(lanes));
  for (int lane = 0; lane < LANES; ++lane) *square += lanes[lane];
  if (HALF && largest_of<N>(most) > 0x7BFF) *square = __builtin_inf();
}

template <int N>
void count_steps(const uint16_t* base, const uint16_t* aligned, int64_t count, bool half, int64_t* counts,
                 double* square) {
  if (half) return count_steps_of<N, true>(base, aligned, count, counts, square);
  count_steps_of<N, false>(base, aligned, count, counts, square);
}

// Eight fields of `width` bits, a byte each, to the lower bits of their word; and back.
ALIGNVEC_INLINE uint64_t mask_of(int lane, int size, int at) {
  uint64_t mask = 0;
  for (int pair = 0; pair < 64; pair += 2 * lane) mask |= ((uint64_t{1} << size) - 1) << (pair + at);
  return mask;
}

template <int WIDTH>
void narrow_words(uint64_t* words, int64_t count) {
  constexpr int W1 = WIDTH, W2 = 2 * WIDTH, W4 = 4 * WIDTH;
  for (int64_t i = 0; i < count; ++i) {
    uint64_t w = words[i];
    w = (w & mask_of(8, W1, 0)) | ((w >> (8 - W1)) & mask_of(8, W1, W1));
    w = (w & mask_of(16, W2, 0)) | ((w >> (16 - W2)) & mask_of(16, W2, W2));
    words[i] = (w & mask_of(32, W4, 0)) | ((w >> (32 - W4)) & mask_of(32, W4, W4));
  }
}

template <int WIDTH>
void widen_words(uint64_t* words, int64_t count) {
  constexpr int W1 = WIDTH, W2 = 2 * WIDTH, W4 = 4 * WIDTH;
  for (int64_t i = 0; i < count; ++i) {
    uint64_t w = words[i];
    w = (w & mask_of(32, W4, 0)) | ((w << (32 - W4)) & mask_of(32, W4, 32));
    w = (w & mask_of(16, W2, 0)) | ((w << (16 - W2)) & mask_of(16, W2, 16));
    words[i] = (w & mask_of(8, W1, 0)) | ((w << (8 - W1)) & mask_of(8, W1, 8));
  }
}

// The first `count` of FIELDS fields, zeros after them, into (count * WIDTH + 7) / 8 bytes; and back.
template <int WIDTH>
void pack_fields(uint64_t* words, int64_t count, uint8_t* packed) {
  uint8_t bytes[FIELDS + 8];
  const int64_t used = (count + 7) / 8;
  narrow_words<WIDTH>(words, used);
  for (int64_t i = 0; i < used; ++i) std::memcpy(bytes + i * WIDTH, words + i, 8);
  std::memcpy(packed, bytes, static_cast<size_t>((count * WIDTH + 7) / 8));
}

template <int WIDTH>
void unpack_fields(const uint8_t* packed, int64_t count, uint64_t* words) {
  uint8_t bytes[FIELDS + 8];
  const int64_t used = (count + 7) / 8;
  std::memset(bytes, 0, sizeof(bytes));
  std::memcpy(bytes, packed, static_cast<size_t>((count * WIDTH + 7) / 8));
  for (int64_t i = 0; i < used; ++i) std::memcpy(words + i, bytes + i * WIDTH, 8);
  widen_words<WIDTH>(words, used);
}

template <int N, int WIDTH>
int64_t pack_steps_of(const uint16_t* base, const uint16_t* aligned, int64_t cols, uint8_t* packed, uint16_t* narrow,
                      int32_t* wide, uint16_t* own, int* magnitude) {
  constexpr int16_t HALF = 1 << (WIDTH - 1);
  alignas(64) uint64_t words[FIELDS / 8];
  uint8_t* fields = reinterpret_cast<uint8_t*>(words);
  int64_t aside = 0;
  S<N> most = {};
  for (int64_t first = 0; first < cols; first += FIELDS) {
    const int64_t count = cols - first < FIELDS ? cols - first : FIELDS;
    for (int64_t k = 0; k < count; k += 2 * N) {
      const int64_t left = count - k;
      const S<N> before = load_16<N>(base + first + k, left), after = load_16<N>(aligned + first + k, left);
      const S<N> step = step_between<N>(before, after), reach = step ^ (step >> 15);
      const S<N> beyond = reach > HALF - 1;
      most = larger<N>(most, larger<N>(before & 0x7FFF, after & 0x7FFF));
      store(fields + k, __builtin_convertvector((step & ~beyond) + HALF, B<N>));
      uint64_t far[2 * N / 8];
      const B<N> marks = __builtin_convertvector(beyond, B<N>);
      std::memcpy(far, &marks, sizeof(far));
      for (int i = 0; i < 2 * N / 8; ++i) {
        for (uint64_t w = far[i]; w != 0; ++aside) {
          const int byte = __builtin_ctzll(w) / 8;
          const int64_t column = first + k + 8 * i + byte;
          own[aside] = aligned[column];
          if (wide != nullptr) {
            wide[aside] = static_cast<int32_t>(column);
          } else {
            narrow[aside] = static_cast<uint16_t>(column);
          }
          w &= ~(uint64_t{0xFF} << (8 * byte));
        }
      }
    }
    std::memset(fields + count, 0, static_cast<size_t>(-count & 7));
    pack_fields<WIDTH>(words, count, packed + first * WIDTH / 8);
  }
  const int found = largest_of<N>(most);
  *magnitude = found > *magnitude ? found : *magnitude;
  return aside;
}

template <int N>
int64_t pack_steps(const uint16_t* base, const uint16_t* aligned, int64_t cols, int width, uint8_t* packed,
                   uint16_t* narrow, int32_t* wide, uint16_t* own, int* magnitude) {
  constexpr decltype(&pack_steps_of<N, 2>) of[] = {pack_steps_of<N, 2>, pack_steps_of<N, 3>, pack_steps_of<N, 4>,
                                                   pack_steps_of<N, 5>, pack_steps_of<N, 6>, pack_steps_of<N, 7>,
                                                   pack_steps_of<N, 8>};
  return of[width - 2](base, aligned, cols, packed, narrow, wide, own, magnitude);
}

template <int N, int WIDTH>
void walk_steps_of(const uint16_t* base, const uint8_t* packed, int64_t cols, uint16_t* aligned, int* magnitude) {
  constexpr int16_t HALF = 1 << (WIDTH - 1);
  alignas(64) uint64_t words[FIELDS / 8];
  const uint8_t* fields = reinterpret_cast<const uint8_t*>(words);
  S<N> most = {};
  for (int64_t first = 0; first < cols; first += FIELDS) {
    const int64_t count = cols - first < FIELDS ? cols - first : FIELDS;
    unpack_fields<WIDTH>(packed + first * WIDTH / 8, count, words);
    for (int64_t k = 0; k < count; k += 2 * N) {
      const int64_t left = count - k;
      const S<N> before = load_16<N>(base + first + k, left);
      const W<N> field = __builtin_convertvector(load<B<N>>(fields + k), W<N>);
      const S<N> after = in_order<N>(bits_of<S<N>>(bits_of<W<N>>(in_order<N>(before)) + field - HALF));
      if (left >= 2 * N) {
        most = larger<N>(most, larger<N>(before & 0x7FFF, after & 0x7FFF));
        store(aligned + first + k, after);
        continue;
      }
      for (int64_t i = 0; i < left; ++i) {
        most[0] = larger_one(most[0], larger_one(before[i] & 0x7FFF, after[i] & 0x7FFF));
        aligned[first + k + i] = static_cast<uint16_t>(after[i]);
      }
    }
  }
  const int found = largest_of<N>(most);
  *magnitude = found > *magnitude ? found : *magnitude;
}

template <int N>
void walk_steps(const uint16_t* base, const uint8_t* packed, int64_t cols, int width, uint16_t* aligned,
                int* magnitude) {
  constexpr decltype(&walk_steps_of<N, 2>) of[] = {walk_steps_of<N, 2>, walk_steps_of<N, 3>, walk_steps_of<N, 4>,
                                                   walk_steps_of<N, 5>, walk_steps_of<N, 6>, walk_steps_of<N, 7>,
                                                   walk_steps_of<N, 8>};
  of[width - 2](base, packed, cols, aligned, magnitude);
}

// The sum of a row's words, which are added to `columns`, too.
template <int N>
uint64_t sum_words(const uint16_t* values, uint64_t* columns) {
  Q<N> sum = {};
  for (int64_t j = 0; j < SUM_WORDS; j += N / 2) {
    const Q<N> words = load<Q<N>>(values + 4 * j);
    sum += words;
    store(columns + j, load<Q<N>>(columns + j) + words);
  }
  uint64_t total = 0;
  for (int i = 0; i < N / 2; ++i) total += sum[i];
  return total;
}

// What float16 makes of a finite bfloat16 value: below 2^-14 it counts in 2^-24, from 65536 on it has infinity alone.
inline uint16_t through_half(uint16_t bits) {
  uint32_t magnitude = bits & 0x7FFFu;
  if (magnitude >= SUM_BEYOND) return static_cast<uint16_t>((bits & 0x8000u) | 0x7F80u);
  const float rounded = (bits_of<float>(magnitude << 16) + 0.75f) - 0.75f;
  return static_cast<uint16_t>((bits & 0x8000u) | bits_of<uint32_t>(rounded) >> 16);
}

// What `sum_words` would have to be changed by, were the values those that float16 has: to `columns`, and returned.
template <int N>
uint64_t narrow_words_of(const uint16_t* values, uint64_t* columns) {
  uint64_t total = 0;
  for (int64_t j = 0; j < SUM_WORDS; j += N / 2) {
    const W<N> bits = load<W<N>>(values + 4 * j), twice = bits + bits;
    const W<N> from = twice - 2 * SUM_SMALLEST;
    const B<N> marks = __builtin_convertvector((from >= 2 * (SUM_BEYOND - SUM_SMALLEST)) & (twice != 0), B<N>);
    uint64_t odd[2 * N / 8];
    std::memcpy(odd, &marks, sizeof(odd));
    for (int i = 0; i < 2 * N / 8; ++i) {
      for (uint64_t w = odd[i]; w != 0;) {
        const int byte = __builtin_ctzll(w) / 8;
        const int64_t at = 4 * j + 8 * i + byte;
        const uint64_t added = (uint64_t{through_half(values[at])} - values[at]) << (16 * (at % 4));
        columns[at / 4] += added;
        total += added;
        w &= ~(uint64_t{0xFF} << (8 * byte));
      }
    }
  }
  return total;
}

template <int N>
int magnitude_of(const uint16_t* values, int64_t count) {
  S<N> most = {};
  for (int64_t k = 0; k < count; k += 2 * N) most = larger<N>(most, load_16<N>(values + k, count - k) & 0x7FFF);
  return largest_of<N>(most);
}

template <int N>
void half_to_bf16(const uint16_t* values, int64_t count, uint16_t* out) {
  for (int64_t k = 0; k < count; k += N) store(out + k, to_bf16<N>(widen_half<N>(load<H<N>>(values + k))));
}

}  // namespace
}  // namespace alignvec
