// The side table of lossless vectors: aligned weights whose step does not fit a field, by row and input.
#pragma once

#include "fields.cuh"

namespace alignvec::cuda {

// sums[row, m] += c[m] sum_e (value[e] - W'[row, k[e]]) x[m, k[e]], where W' is what the fields' 0 made of W. A warp
// takes a row, its lanes every 32nd entry; the order of the sum is always the same. Bytes: 6 an entry, and a sector of W.
template <int kBits>
ALIGNVEC_DEVICE void add_side(float* sums, int pitch, const Launch& launch, const Entry& entry, const Mix& mix,
                              int first_row, int rows) {
  const int lane = thread_index() % 32;
  for (int r = thread_index() / 32; r < rows && first_row + r < entry.out_features; r += block_threads() / 32) {
    const int64_t n = first_row + r;
    for (int i = 0; i < entry.coded; ++i) {
      if (!mix.tokens_of[i]) continue;
      const Vector& vector = entry.vectors[i];
      const auto* start = static_cast<const int32_t*>(vector.scales);
      const int end = start[n + 1];
      float edit[kMaxTokens] = {};
      for (int at = start[n] + lane; at < end; at += 32) {
        const int k = vector.columns[at];
        const uint32_t stepped = uncounted(counted<kBits>(entry.weight[n * entry.weight_stride + k]));
        const float delta = to_float(vector.values[at]) - to_float(static_cast<uint16_t>(stepped));
#pragma unroll
        for (int m = 0; m < kMaxTokens; ++m)
          if (m < launch.tokens) edit[m] += delta * to_float(launch.x[static_cast<int64_t>(m) * launch.x_stride + k]);
      }
      if (start[n] == end) continue;
#pragma unroll
      for (int m = 0; m < kMaxTokens; ++m) {
        if (m >= launch.tokens) continue;
#pragma unroll
        for (int mask = 16; mask; mask /= 2) edit[m] += shuffle_xor(edit[m], mask);
        if (lane == 0) sums[r * pitch + m] += mix.coefficient[i][m] * edit[m];
      }
    }
  }
}

}  // namespace alignvec::cuda
