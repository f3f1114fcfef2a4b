// AVX-512: registers of sixteen floats.
#if defined(__x86_64__)
#if defined(__GNUC__) && !defined(__clang__)  // its own intrinsics begin from registers of any content
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include <immintrin.h>

#include "target.h"
#include "types.h"

#define ALIGNVEC_AVX512
ALIGNVEC_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,bmi,bmi2,popcnt")
#include "table.h"

namespace alignvec {

extern const Kernels avx512_kernels;
const Kernels avx512_kernels = table<16>("avx512");

}  // namespace alignvec
ALIGNVEC_TARGET_END
#endif
