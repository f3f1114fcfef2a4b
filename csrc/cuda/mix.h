// What a block works out before it multiplies: its tokens' coefficients, and the streams of weights that it reads.
#pragma once

#include "launch.h"

namespace alignvec::cuda {

// One pass over the inputs: of the base with coded vectors, of more coded vectors, or of a dense vector as a matrix.
struct Stream {
  const uint16_t* weight;  // or null
  int32_t stride;
  int32_t term;          // whose product the weight's is: a vector of the entry, kBase, or kNone
  int32_t first, count;  // coded vectors, in `Mix::order`
};
constexpr int kBase = -1, kNone = -2;

struct Mix {
  float coefficient[kMaxVectors][kMaxTokens];  // by the entry's vector
  uint32_t tokens_of[kMaxVectors];             // bits of the tokens that use a vector
  Stream streams[kMaxVectors + 1];
  int32_t order[kMaxVectors];  // the coded vectors that are read
  int32_t count;               // of streams
};

}  // namespace alignvec::cuda
