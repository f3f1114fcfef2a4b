// The ring in shared memory that all operands come through: a stage holds kInputs inputs of a block's tile.
//
// Rows of the base (or of a dense vector) and of x are kPitch bytes apart, 16 more than they hold, so that eight rows
// of a matrix lie in different banks. Words lie in rows of kWordPitch bytes, whose units of 16 bytes are exchanged so
// that four rows of a pair of units do. A chunk of words longer than a stage stays in the slot of its first stage.
#pragma once

#include "coefficients.cuh"

namespace alignvec::cuda {

ALIGNVEC_DEVICE int swizzled(int row, int unit) { return unit ^ (row & 3) << 1; }

// kRows: output rows of the block. Of a stage: the base's rows, x's, and those of each coded vector's words.
template <int kBits, int kRows>
struct Ring {
  static constexpr int kUnits = kInputs / 8;  // of 16 bytes, in a row
  static constexpr int kPasses = 8;           // that the threads make over the rows
  static constexpr int kX = kRows * kPitch;
  static constexpr int kWords = kRows * kWordPitch<kBits>;  // bytes of a vector

  const Launch& launch;
  const Entry& entry;
  unsigned char* memory;
  int first_row;

  ALIGNVEC_DEVICE unsigned char* stage(int slot) const { return memory + slot * launch.stage_bytes; }
  ALIGNVEC_DEVICE unsigned char* words(int slot, int vector) const {
    return stage(slot) + kX + launch.tokens * kPitch + vector * kWords;
  }
  // A row of the layer; for outputs past the last one that one, and the results are dropped.
  ALIGNVEC_DEVICE int row(int r) const {
    const int n = first_row + r;
    return n < entry.out_features ? n : entry.out_features - 1;
  }

  // Inputs past the last one, and rows, come as zeros.
  ALIGNVEC_DEVICE void copy_weights(int slot, const uint16_t* weight, int stride, int input) const {
    const int r = thread_index() / kUnits, unit = thread_index() % kUnits;
    const int rows = input + unit * 8 < launch.in_features ? entry.out_features - first_row - r : 0;
    const uint16_t* from = weight + static_cast<int64_t>(first_row + r) * stride + input + unit * 8;
    const int64_t step = static_cast<int64_t>(kRows / kPasses) * stride;
    unsigned char* to = stage(slot) + r * kPitch + unit * 16;
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass, from += step, to += kRows / kPasses * kPitch)
      copy_16(to, from, pass * (kRows / kPasses) < rows);
  }

  ALIGNVEC_DEVICE void copy_x(int slot, int input) const {
    const int m = thread_index() / kUnits, unit = thread_index() % kUnits;
    const bool there = input + unit * 8 < launch.in_features;
    const uint16_t* from = launch.x + static_cast<int64_t>(m) * launch.x_stride + input + unit * 8;
    const int64_t step = static_cast<int64_t>(kRows / kPasses) * launch.x_stride;
    unsigned char* to = stage(slot) + kX + m * kPitch + unit * 16;
#pragma unroll
    for (int pass = 0; pass < kPasses / 2; ++pass, from += step, to += kRows / kPasses * kPitch) {
      if (m + pass * (kRows / kPasses) >= launch.tokens) break;
      copy_16(to, from, there);
    }
  }

  ALIGNVEC_DEVICE void copy_words(int slot, int place, const Vector& vector, int input) const {
    const int width_log2 = vector.width_log2, chunk_log2 = width_log2 + kPlanesLog2<kBits>;
    const int units_log2 = (chunk_log2 > kInputsLog2 ? width_log2 : kInputsLog2 - kPlanesLog2<kBits>)-2;
    int r = thread_index() >> units_log2;
    const int unit = thread_index() & ((1 << units_log2) - 1);
    const int word = (input >> chunk_log2 << width_log2) + unit * 4;
    const int rows = word < vector.stride ? entry.out_features - first_row : 0;
    const int step = 32 * kWarps * (kRows / 16) >> units_log2;  // a multiple of 4: units keep their places
    const uint32_t* from =
        static_cast<const uint32_t*>(vector.data) + static_cast<int64_t>(first_row + r) * vector.stride + word;
    unsigned char* to = words(slot, place) + r * kWordPitch<kBits> + swizzled(r, unit) * 16;
    for (; r < kRows; r += step, from += static_cast<int64_t>(step) * vector.stride, to += step * kWordPitch<kBits>)
      copy_16(to, from, r < rows);
  }
};

}  // namespace alignvec::cuda
