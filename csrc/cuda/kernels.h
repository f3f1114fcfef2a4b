// The kernels by the format of a launch's coded vectors; each is compiled in the file of its format.
#pragma once

#include "launch.h"

namespace alignvec::cuda {

using Kernel = void (*)(Launch);

// In the order in which a layer of several formats is launched. Group1: a scale for every plane; Group2: for two or
// more.
enum class Format : uint8_t {
  kPlain,
  kLossless2,
  kLossless4,
  kLossless8,
  kSign,
  kSignGroup1,
  kSignGroup2,
  kInt4Group1,
  kInt4Group2,
  kInt8Group1,
  kInt8Group2,
};
constexpr int kFormats = 11;

// Vectors that share one pass over x: more of them have no room in shared memory beside the base, but for signs of few
// tokens, whose words are short and which would read x as often as words.
constexpr int kStreamVectors = 4, kManySigns = 8, kFewTokens = 4;
inline int stream_vectors(Format format, int tokens) {
  return format == Format::kSign && tokens <= kFewTokens ? kManySigns : kStreamVectors;
}

// tiles: of 8 tokens, 1 or 2. vectors: in a stream at most.
Kernel plain_kernel(int tiles);
Kernel lossless_kernel(int bits, int tiles);
Kernel sign_kernel(int flush, int tiles, int vectors);
Kernel int4_kernel(int flush, int tiles);
Kernel int8_kernel(int flush, int tiles);

inline int bits_of(Format format) {
  switch (format) {
    case Format::kPlain:
      return 0;
    case Format::kLossless2:
      return 2;
    case Format::kLossless4:
    case Format::kInt4Group1:
    case Format::kInt4Group2:
      return 4;
    case Format::kLossless8:
    case Format::kInt8Group1:
    case Format::kInt8Group2:
      return 8;
    default:
      return 1;
  }
}

inline Kernel kernel_of(Format format, int tiles, int vectors) {
  switch (format) {
    case Format::kPlain:
      return plain_kernel(tiles);
    case Format::kLossless2:
    case Format::kLossless4:
    case Format::kLossless8:
      return lossless_kernel(bits_of(format), tiles);
    case Format::kSign:
      return sign_kernel(0, tiles, vectors);
    case Format::kSignGroup1:
      return sign_kernel(1, tiles, vectors);
    case Format::kSignGroup2:
      return sign_kernel(2, tiles, vectors);
    case Format::kInt4Group1:
      return int4_kernel(1, tiles);
    case Format::kInt4Group2:
      return int4_kernel(2, tiles);
    case Format::kInt8Group1:
      return int8_kernel(1, tiles);
    default:
      return int8_kernel(2, tiles);
  }
}

}  // namespace alignvec::cuda
