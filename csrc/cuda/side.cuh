// The side table of lossless vectors: aligned weights whose step does not fit a field, by row and input.
#pragma once

#include "fields.cuh"

namespace alignvec::cuda {

// sums[row, m] += c[m] sum_e (value[e] - W'[row, k[e]]) x[m, k[e]], where W' is what the fields' 0 made of W. Eight
// threads take a row, all rows of the block at once, for it is latency that this costs; the order of a sum is always
// the same. Bytes: 6 an entry, and a sector of W, lately read.
template <int kBits, int kTiles>
ALIGNVEC_DEVICE void add_side(float* sums, int pitch, const Launch& launch, const Entry& entry, const Mix& mix,
                              int first_row) {
  constexpr int kLanes = 8;
  const int r = thread_index() / kLanes, lane = thread_index() % kLanes;
  const bool there = first_row + r < entry.out_features;
  const int64_t n = there ? first_row + r : 0;
  const uint16_t* weight = entry.weight + n * entry.weight_stride;
  for (int i = 0; i < entry.coded; ++i) {
    if (!mix.tokens_of[i]) continue;
    const Vector& vector = entry.vectors[i];
    const auto* start = static_cast<const int32_t*>(vector.scales);
    const int end = there ? start[n + 1] : 0;
    float edit[8 * kTiles] = {};
#pragma unroll 4
    for (int at = start[n] + lane; at < end; at += kLanes) {
      const int k = vector.columns[at];
      const uint32_t stepped = uncounted(counted<kBits>(weight[k]));
      const float delta = to_float(vector.values[at]) - to_float(static_cast<uint16_t>(stepped));
#pragma unroll
      for (int m = 0; m < 8 * kTiles; ++m)
        if (m < launch.tokens) edit[m] += delta * to_float(launch.x[static_cast<int64_t>(m) * launch.x_stride + k]);
    }
#pragma unroll
    for (int m = 0; m < 8 * kTiles; ++m) {
      if (m >= launch.tokens) break;
#pragma unroll
      for (int mask = kLanes / 2; mask; mask /= 2) edit[m] += shuffle_xor(edit[m], mask);
      if (lane == 0) sums[r * pitch + m] = weighted(mix.coefficient[i][m], edit[m], sums[r * pitch + m]);
    }
  }
}

}  // namespace alignvec::cuda
