// Vectors of ULP steps.
#include "decode.cuh"

namespace alignvec::cuda {

namespace {
template <int kBits>
using Steps = Storage<kBits, 0, true, kStreamVectors>;
}  // namespace

Kernel lossless_kernel(int bits, int tiles) {
  if (bits == 2) return kernel_for<Steps<2>>(tiles);
  return bits == 4 ? kernel_for<Steps<4>>(tiles) : kernel_for<Steps<8>>(tiles);
}

}  // namespace alignvec::cuda
