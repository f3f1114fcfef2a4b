// AVX2 and FMA: registers of eight floats.
#if defined(__x86_64__)
#include <immintrin.h>

#include "target.h"
#include "types.h"

ALIGNVEC_TARGET_BEGIN("avx2,fma,bmi,bmi2,popcnt")
#include "table.h"

namespace alignvec {

extern const Kernels avx2_kernels;
const Kernels avx2_kernels = table<8>("avx2");

}  // namespace alignvec
ALIGNVEC_TARGET_END
#endif
