// A decode step beside its projections and norms, one token a row: rotation with the append, attention, gates.
#pragma once

#include "parallel.h"
#include "types.h"

namespace alignvec {

// Rows of consecutive values by the indices before them: [rows, heads] of a step, [rows, heads, positions] of a cache.
struct Heads {
  char* data = nullptr;
  DType dtype = DType::f32;
  int64_t strides[3] = {0, 0, 0};  // in values

  char* at(int64_t row, int64_t head, int64_t position = 0) const {
    return data + (row * strides[0] + head * strides[1] + position * strides[2]) * item_size(dtype);
  }
};

// y[r, h] = q[r, h] turned by the angles of position lengths[r], and so k[r, h], which goes with v[r, h] into that
// position of the cache, unless it has none of that number. All of one dtype.
struct RotaryAppend {
  int64_t rows = 0;
  int64_t heads = 0;
  int64_t kv_heads = 0;
  int64_t features = 0;
  int64_t rotary = 0;
  int64_t max_length = 0;
  Heads q;
  Heads k;
  Heads v;
  Matrix cos;
  Matrix sin;
  const int32_t* lengths = nullptr;
  Heads keys;
  Heads values;
  Heads y;
};

void rotary_append(const RotaryAppend& call, Loop loop);

// y[r, h] = softmax(scale q[r, h] K^T) V over positions max(0, lengths[r] + 1 - window) to lengths[r] of the cache
// (from 0 with window 0), lengths taken for the nearest that it has. Reads each key and value once for all the query
// heads that share it. Keys are split by the lengths alone: the same bits with any number of threads.
struct Attention {
  int64_t rows = 0;
  int64_t heads = 0;
  int64_t kv_heads = 0;
  int64_t features = 0;
  int64_t max_length = 0;
  Heads q;
  Heads keys;
  Heads values;
  const int32_t* lengths = nullptr;
  float scale = 1;
  int64_t window = 0;
  Heads y;
};

void decode_attention(const Attention& call, Loop loop);

// y[t] = activation(x[t, : features]) x[t, features :].
struct Gate {
  int64_t tokens = 0;
  int64_t features = 0;
  Matrix x;
  Activation activation = Activation::silu;
  Matrix y;
};

void gated(const Gate& call, Loop loop);

}  // namespace alignvec
