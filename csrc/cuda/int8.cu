// Vectors of 8-bit integers with a scale a group; one scale a row is one long group.
#include "decode.cuh"

namespace alignvec::cuda {

namespace {
template <int kFlush>
using Integers = Storage<8, kFlush, false, kStreamVectors>;
}  // namespace

Kernel int8_kernel(int flush, int tiles) {
  return flush == 1 ? kernel_for<Integers<1>>(tiles) : kernel_for<Integers<2>>(tiles);
}

}  // namespace alignvec::cuda
