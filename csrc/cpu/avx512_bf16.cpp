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
#define ALIGNVEC_BF16
ALIGNVEC_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vbmi,avx512vbmi2,avx2,fma,bmi2,popcnt")
#include "dots_bf16.h"
#include "table.h"

namespace alignvec {
namespace {

constexpr Kernels with_bf16() {
  Kernels kernels = table<16>("avx512_bf16");
  kernels.reads_bf16 = reads_bf16;
  kernels.dots = dots_bf16;
  return kernels;
}

}  // namespace

extern const Kernels avx512_bf16_kernels;
const Kernels avx512_bf16_kernels = with_bf16();

}  // namespace alignvec
ALIGNVEC_TARGET_END
#endif
