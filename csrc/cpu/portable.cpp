// What every CPU runs: registers of four floats, SSE2 on x86 and NEON on arm64.
#include "table.h"

namespace alignvec {

extern const Kernels portable_kernels;
const Kernels portable_kernels = table<4>("portable");

}  // namespace alignvec
