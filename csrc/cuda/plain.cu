// The base alone, and dense vectors.
#include "decode.cuh"

namespace alignvec::cuda {

Kernel plain_kernel(int tiles) { return kernel_for<Storage<0, 0, false, 0>>(tiles); }

}  // namespace alignvec::cuda
