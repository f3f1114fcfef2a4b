// AVX-512 with bf16 products and byte permutations (Zen 4, Sapphire Rapids and later).
#if defined(__x86_64__)
#if defined(__GNUC__) && !defined(__clang__)  // its own intrinsics begin from registers of any content
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include <immintrin.h>

#include "target.h"
#include "types.h"

#define ALIGNVEC_AVX512
ALIGNVEC_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vbmi,avx512vbmi2,avx2,fma,bmi2,popcnt")
#include "dots_bf16.h"
#include "table.h"

namespace alignvec {
namespace {

// As `store_row`, by the CPU's own rounding.
void store_bf16(const float* values, int64_t count, DType dtype, void* out, void* low) {
  if (dtype == DType::f32) return store_row<16>(values, count, dtype, out, low);
  uint16_t *high = static_cast<uint16_t*>(out), *rest = static_cast<uint16_t*>(low);
  int64_t k = 0;
  for (; k + 32 <= count; k += 32) {
    const __m512 first = _mm512_loadu_ps(values + k), second = _mm512_loadu_ps(values + k + 16);
    const Bits rounded = bits_of<Bits>(_mm512_cvtne2ps_pbh(second, first));
    _mm512_storeu_si512(high + k, rounded);
    if (rest == nullptr) continue;
    const H<16> halves[2] = {bits_of<H<16>>(_mm512_castsi512_si256(rounded)),
                             bits_of<H<16>>(_mm512_extracti64x4_epi64(rounded, 1))};
    const __m512 remainders[2] = {first - bits_of<__m512>(widen<16>(halves[0])),
                                  second - bits_of<__m512>(widen<16>(halves[1]))};
    _mm512_storeu_si512(rest + k, bits_of<Bits>(_mm512_cvtne2ps_pbh(remainders[1], remainders[0])));
  }
  store_row<16>(values + k, count - k, dtype, high + k, rest == nullptr ? nullptr : rest + k);
}

constexpr Kernels with_bf16() {
  Kernels kernels = table<16>("avx512_bf16");
  kernels.reads_bf16 = reads_bf16;
  kernels.dots = dots_bf16;
  kernels.store = store_bf16;
  return kernels;
}

}  // namespace

extern const Kernels avx512_bf16_kernels;
const Kernels avx512_bf16_kernels = with_bf16();

}  // namespace alignvec
ALIGNVEC_TARGET_END
#endif
