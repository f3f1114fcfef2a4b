// Vectors of signs, with a scale a row or a group.
#include "decode.cuh"

namespace alignvec::cuda {

namespace {
template <int kFlush, int kVectors = kStreamVectors>
using Signs = Storage<1, kFlush, false, kVectors>;
}  // namespace

Kernel sign_kernel(int flush, int tiles, int vectors) {
  if (vectors == kManySigns) return decode_kernel<Signs<0, kManySigns>, 1>;
  if (flush == 0) return kernel_for<Signs<0>>(tiles);
  return flush == 1 ? kernel_for<Signs<1>>(tiles) : kernel_for<Signs<2>>(tiles);
}

}  // namespace alignvec::cuda
