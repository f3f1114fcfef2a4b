// Activations in the layouts that a call's kernels read.
#pragma once

#include <vector>

#include "buffer.h"
#include "parallel.h"
#include "types.h"

namespace alignvec {

// x [tokens, in] padded with zeros to INPUT_PAD inputs and a whole tile of tokens, in the layouts that `operands` need,
// and with `tiles` as products of mixes take it.
class PaddedInputs {
 public:
  PaddedInputs(const Kernels& kernels, const Matrix& x, int64_t tokens, int64_t in,
               const std::vector<Operand>& operands, bool tiles, Loop loop);

  const Inputs& view() const { return inputs_; }

 private:
  Inputs inputs_;
  Buffer<float> f32_;
  Buffer<uint16_t> bf16_;
  Buffer<uint16_t> paired_[3];
  Buffer<uint32_t> tiles_;
};

}  // namespace alignvec
