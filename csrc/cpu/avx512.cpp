// AVX-512: registers of sixteen floats.
#if defined(__x86_64__)
#include "target.h"
#include "types.h"

ALIGNVEC_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
#include "table.h"

namespace alignvec {

extern const Kernels avx512_kernels;
const Kernels avx512_kernels = table<16>("avx512");

}  // namespace alignvec
ALIGNVEC_TARGET_END
#endif
