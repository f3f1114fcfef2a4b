// Fills in a block's Mix, all from device data.
#pragma once

#include "device.cuh"
#include "mix.h"

namespace alignvec::cuda {

// c[m, i] of the reference: table row token_rows[m], or m rows / tokens, and NaN where rows do not divide the tokens.
ALIGNVEC_DEVICE float coefficient(const Launch& launch, const Entry& entry, int vector, int token) {
  int64_t row = 0;
  bool there = true;
  if (launch.token_rows) {
    row = launch.token_rows[token];
  } else {
    const int rows = *launch.rows;
    there = rows > 0 && launch.tokens % rows == 0;
    if (there) row = static_cast<int64_t>(token) * rows / launch.tokens;
  }
  const int column = entry.columns[entry.vectors[vector].place];
  return there ? launch.table[row * launch.table_stride + column] : not_a_number();
}

// sum + c edit; of a token that does not use the vector the sum alone, for its edit may be infinite.
ALIGNVEC_DEVICE float weighted(float c, float edit, float sum) { return c != 0.0f ? sum + c * edit : sum; }

// A vector whose coefficients are all 0 is in no stream. kVectors: coded ones in a stream at most; the base comes with
// the first of them, and `lossless` ones need it in each.
template <int kVectors, bool kLossless>
ALIGNVEC_DEVICE void make_mix(Mix& mix, const Launch& launch, const Entry& entry) {
  const int vectors = entry.coded + entry.dense;
  for (int at = thread_index(); at < kMaxVectors * kMaxTokens; at += block_threads()) {
    const int vector = at / kMaxTokens, token = at % kMaxTokens;
    const float c = vector < vectors && token < launch.tokens ? coefficient(launch, entry, vector, token) : 0.0f;
    mix.coefficient[vector][token] = c;
    const uint32_t used = ballot(c != 0.0f);  // of two vectors
    if (token == 0) mix.tokens_of[vector] = used >> (at % 32) & 0xFFFFu;
  }
  block_barrier();
  if (thread_index() == 0) {
    int count = 0, listed = 0;
    if (entry.base) mix.streams[count++] = {entry.weight, entry.weight_stride, kBase, 0, 0};
    const Vector* last = nullptr;
    for (int i = 0; i < entry.coded; ++i) {
      if (!mix.tokens_of[i]) continue;
      const Vector& vector = entry.vectors[i];
      // The first coded vectors share the base's stream.
      const bool alike =
          last ? last->width_log2 == vector.width_log2 && last->group_log2 == vector.group_log2 : count > 0;
      if (!alike || mix.streams[count - 1].count == kVectors)
        mix.streams[count++] = {kLossless ? entry.weight : nullptr, entry.weight_stride, kNone, listed, 0};
      ++mix.streams[count - 1].count;
      mix.order[listed++] = i;
      last = &vector;
    }
    for (int i = entry.coded; i < vectors; ++i)
      if (mix.tokens_of[i]) {
        const Vector& vector = entry.vectors[i];
        mix.streams[count++] = {static_cast<const uint16_t*>(vector.data), vector.stride, i, listed, 0};
      }
    mix.count = count;
  }
  block_barrier();
}

}  // namespace alignvec::cuda
