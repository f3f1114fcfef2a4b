#include "inputs.h"

#include <algorithm>
#include <cstring>

namespace alignvec {
namespace {

// x[b + j], x[b + width + j] side by side for each j < width of every 2 width inputs from b on.
void pair_up(const uint16_t* x, int64_t in, int64_t width, uint16_t* paired) {
  for (int64_t b = 0; b < in; b += 2 * width) {
    for (int64_t j = 0; j < width; ++j) {
      paired[b + 2 * j] = x[b + j];
      paired[b + 2 * j + 1] = x[b + width + j];
    }
  }
}

}  // namespace

PaddedInputs::PaddedInputs(const Kernels& kernels, const Matrix& x, int64_t tokens, int64_t in,
                           const std::vector<Operand>& operands, bool tiles, Loop loop) {
  const int64_t stride = inputs_.stride = padded_inputs(in);
  const size_t size = static_cast<size_t>((tokens + TILE_TOKENS - 1) * stride);
  bool f32 = false, bf16 = false, paired[3] = {false, false, false};
  for (const Operand& operand : operands) {
    const bool narrow = x.dtype == DType::bf16 && kernels.reads_bf16(operand);
    (narrow ? bf16 : f32) = true;
    if (narrow && operand.kind != Kind::dense) paired[paired_index(operand.width)] = true;
  }
  tiles = tiles && bf16;
  if (tiles)
    tiles_.resize(static_cast<size_t>(((tokens + 15) / 16 * 16 + 16) * stride / 2));  // read two blocks at a time
  if (f32) f32_.resize(size);
  if (bf16) bf16_.resize(size);
  for (int i = 0; i < 3; ++i)
    if (paired[i]) paired_[i].resize(size);
  parallel(loop, tokens, std::max<int64_t>(1, 32768 / in), [&](int64_t first, int64_t last) {
    for (int64_t m = first; m < last; ++m) {
      if (f32) kernels.load_row(x, m, in, f32_.data() + m * stride);
      if (bf16) std::memcpy(bf16_.data() + m * stride, x.row(m), static_cast<size_t>(in) * 2);
      for (int i = 0; i < 3; ++i)
        if (paired[i]) pair_up(bf16_.data() + m * stride, stride, 16 << i, paired_[i].data() + m * stride);
      for (int64_t pair = 0; tiles && pair < stride / 2; ++pair)
        std::memcpy(tiles_.data() + (m / 16 * (stride / 2) + pair) * 16 + m % 16, bf16_.data() + m * stride + 2 * pair,
                    4);
    }
  });
  inputs_.tiles = tiles ? tiles_.data() : nullptr;
  inputs_.f32 = f32 ? f32_.data() : nullptr;
  inputs_.bf16 = bf16 ? bf16_.data() : nullptr;
  for (int i = 0; i < 3; ++i) inputs_.paired[i] = paired[i] ? paired_[i].data() : nullptr;
}

}  // namespace alignvec
