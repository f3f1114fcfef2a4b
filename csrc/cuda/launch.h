// What a launch of a decode kernel is told: plain structures, passed by value as its parameter.
#pragma once

#include <cstdint>

namespace alignvec::cuda {

constexpr int kMaxVectors = 16;  // that edit one layer
constexpr int kMaxEntries = 4;   // layers in a launch
constexpr int kMaxTokens = 16;
constexpr int kStages = 4;  // of shared memory at most
constexpr int kWarps = 4;   // that share an output
constexpr int kInputsLog2 = 9;
constexpr int kInputs = 1 << kInputsLog2;  // of a stage

enum class Kind : uint8_t { kDense, kCodes, kLossless };

// Bytes from row to row of a stage: of weights and x; of words, 64 or, of 8-bit fields, 128.
constexpr int kPitch = kInputs * 2 + 16;
constexpr int word_pitch(int bits) { return bits == 8 ? 512 : bits ? 256 : 0; }
template <int kBits>
constexpr int kWordPitch = word_pitch(kBits);
template <int kBits>
constexpr int kPlanesLog2 = kBits == 1   ? 5
                            : kBits == 2 ? 4
                            : kBits == 4 ? 3
                                         : 2;

// One operand of kernels/operands.py: its parts and its numbers.
struct Vector {
  const void* data;        // dense: bfloat16 values [out, in]; else words
  const void* scales;      // codes: float32 [out, 1] or bfloat16 [out, groups]; lossless: `start`
  const int32_t* columns;  // lossless: the side table's inputs,
  const uint16_t* values;  // and its aligned weights
  int32_t stride;          // of a row of data, in its elements
  int32_t groups;          // scales in a row
  uint8_t place;           // among the layer's vectors
  Kind kind;
  uint8_t bits;
  uint8_t width_log2;
  uint8_t group_log2;  // of the inputs that share a scale
  uint8_t wide_scales;
};

// One layer, or those of its vectors that a launch serves: coded ones first, of one width and group side by side.
struct Entry {
  const uint16_t* weight;
  const void* bias;         // [out], or null
  const void* bias_deltas;  // [vectors, out], or null
  const int32_t* columns;   // of the table, by place
  int32_t weight_stride, bias_delta_stride;
  int32_t out_features;
  int32_t first_column;  // of y
  int32_t first_block;
  uint8_t coded, dense;                 // vectors
  uint8_t base;                         // whether this launch adds the base's product and bias
  uint8_t add_partial;                  // to what the launch before left in `partial`,
  uint8_t keep_partial;                 // and leave the sum there, for the next one
  uint8_t wide_bias, wide_bias_deltas;  // float32
  Vector vectors[kMaxVectors];
};

// The arguments that layers share, and how the ring in shared memory is laid out.
struct Launch {
  const uint16_t* x;  // bfloat16 [tokens, in]
  uint16_t* y;        // bfloat16 [tokens, all outputs]
  float* partial;     // the same shape, contiguous; null where one launch does it all
  const float* table;
  const int32_t* rows;
  const int32_t* token_rows;  // or null
  int32_t tokens, in_features, x_stride, y_stride, table_stride;
  int32_t outputs;  // of all layers: a row of `partial`
  int32_t stages, stage_bytes;
  int32_t entries;
  Entry entry[kMaxEntries];
};
static_assert(sizeof(Launch) <= 4096, "kernel parameters of sm_80 end at 4 KiB");

}  // namespace alignvec::cuda
