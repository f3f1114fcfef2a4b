// The ring in shared memory that all operands come through: a stage holds kInputs inputs of a block's tile.
//
// Rows of the base (or of a dense vector) and of x are kPitch bytes apart, 32 more than they hold, so that eight rows of
// a fragment lie in different banks. Words lie in rows of kWordPitch bytes, those of odd rows with their halves of 128
// bytes swapped, for the same reason. A chunk of words longer than a stage stays in the slot of its first stage.
#pragma once

#include "coefficients.cuh"

namespace alignvec::cuda {


ALIGNVEC_DEVICE int swizzled(int row, int unit) { return unit ^ (row & 1) << 2; }

// kRows: output rows of the block. Of a stage: the base's rows, x's, and those of each coded vector's words.
template <int kBits, int kRows>
struct Ring {
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
  // Rows past the last output are read as the last one, and their results dropped.
  ALIGNVEC_DEVICE int64_t row(int r) const {
    const int n = first_row + r;
    return n < entry.out_features ? n : entry.out_features - 1;
  }

  // Inputs past the last one come as zeros.
  ALIGNVEC_DEVICE void copy_weights(int slot, const uint16_t* weight, int stride, int input) const {
    constexpr int kUnits = kInputs / 8;  // of 16 bytes, in a row
    const int unit = thread_index() % kUnits;
    const bool there = input + unit * 8 < launch.in_features;
    const uint16_t* from = weight + input + unit * 8;
    unsigned char* to = stage(slot) + unit * 16;
#pragma unroll
    for (int pass = 0; pass < 8; ++pass) {
      const int r = thread_index() / kUnits + pass * (kRows / 8);
      copy_16(to + r * kPitch, from + row(r) * stride, there);
    }
  }

  ALIGNVEC_DEVICE void copy_x(int slot, int input) const {
    constexpr int kUnits = kInputs / 8;
    const int unit = thread_index() % kUnits;
    const bool there = input + unit * 8 < launch.in_features;
    for (int m = thread_index() / kUnits; m < launch.tokens; m += kRows / 8)
      copy_16(stage(slot) + kX + m * kPitch + unit * 16,
              launch.x + static_cast<int64_t>(m) * launch.x_stride + input + unit * 8, there);
  }

  ALIGNVEC_DEVICE void copy_words(int slot, int place, const Vector& vector, int input) const {
    const int width_log2 = vector.width_log2, chunk_log2 = width_log2 + kPlanesLog2<kBits>;
    const int first = input >> chunk_log2 << width_log2;
    const int units_log2 = (chunk_log2 > kInputsLog2 ? width_log2 : kInputsLog2 - kPlanesLog2<kBits>) - 2;
    const auto* data = static_cast<const uint32_t*>(vector.data);
    for (int at = thread_index(); at < kRows << units_log2; at += block_threads()) {
      const int r = at >> units_log2, unit = at & ((1 << units_log2) - 1);
      const int word = first + unit * 4;
      copy_16(words(slot, place) + r * kWordPitch<kBits> + swizzled(r, unit) * 16,
              data + row(r) * vector.stride + word, word < vector.stride);
    }
  }
};

}  // namespace alignvec::cuda
