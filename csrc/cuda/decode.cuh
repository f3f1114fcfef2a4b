// Decode: a linear layer with vectors for few tokens, each with its own coefficients.
//
//   y[m, n] = sum_k x[m, k] W[n, k] + b[n] + sum_i c[m, i] (s_i[n] sum_k x[m, k] code_i[n, k] + b_i[n])
//
// One float32 sum for the base and one for each vector; scales and coefficients meet the sums. Bytes: W and every D_i
// once, as stored, and x once for each block's 16 kTiles outputs. Weights are operand A of mma.sync m16n8k16, 16
// outputs, x operand B, 8 tokens; the order of the 16 inputs is any, the same for both.
//
// A block has four warps for each 16 outputs. Of a stage of 512 inputs a warp takes eight pieces of 16, the same words
// of eight neighbouring bit planes; the warps' sums meet in shared memory, in order, so that results repeat.
#pragma once

#include "block.cuh"
#include "kernels.h"
#include "side.cuh"

namespace alignvec::cuda {

// kTiles: tiles of 8 tokens, and of 16 outputs in a block: x is as much again of what a block reads for every 8 tokens.
template <class F, int kTiles>
__global__ void __launch_bounds__(32 * kWarps * kTiles, kTiles == 1 ? 3 : 1)
    decode_kernel(const __grid_constant__ Launch launch) {
  constexpr int kRows = 16 * kTiles, kPitchOfSums = 8 * kTiles + 1;
  unsigned char* memory = shared_memory();
  Mix& mix = *reinterpret_cast<Mix*>(memory);
  memory += (sizeof(Mix) + 15) / 16 * 16;

  int number = 0;
  while (number + 1 < launch.entries && block_index() >= launch.entry[number + 1].first_block) ++number;
  const Entry& entry = launch.entry[number];
  Block<F, kTiles> block(launch, entry, mix, memory);

  // The base's first stages depend on nothing that the grid before may still write.
  int early = 0;
  if (entry.base)
    for (; early < launch.stages - 1 && early * kInputs < launch.in_features; ++early)
      block.ring.copy_weights(early, entry.weight, entry.weight_stride, early * kInputs);
  wait_for_earlier_grid();
  make_mix<F::kVectors, F::kLossless>(mix, launch, entry);
  for (int stage = 0; stage < launch.stages - 1; ++stage) block.fill(early);
  for (int stream = 0; stream < mix.count; ++stream) block.run(mix.streams[stream]);
  start_later_grid();
  copy_wait<0>();
  block_barrier();

  // Sums of the warps that share an output, and of the side table: [warps + 1][outputs][tokens].
  auto* sums = reinterpret_cast<float*>(memory);
  constexpr int kPart = kRows * kPitchOfSums;
#pragma unroll
  for (int m = 0; m < kTiles; ++m)
#pragma unroll
    for (int r = 0; r < 4; ++r)
      sums[block.slice * kPart + (16 * block.tile + block.g + r / 2 * 8) * kPitchOfSums + 8 * m + 2 * block.t + r % 2] =
          block.total[m][r];
  float* side = sums + kWarps * kPart;
  if constexpr (F::kLossless) {
    for (int at = thread_index(); at < kPart; at += block_threads()) side[at] = 0.0f;
    block_barrier();
    add_side<F::kBits, kTiles>(side, kPitchOfSums, launch, entry, mix, block.ring.first_row);
  }
  block_barrier();

  for (int at = thread_index(); at < kRows * launch.tokens; at += block_threads()) {
    const int r = at % kRows, m = at / kRows;
    const int64_t n = block.ring.first_row + r;
    if (n >= entry.out_features) continue;
    float sum = 0.0f;
#pragma unroll
    for (int slice = 0; slice < kWarps; ++slice) sum += sums[slice * kPart + r * kPitchOfSums + m];
    if (F::kLossless) sum += side[r * kPitchOfSums + m];
    if (entry.base && entry.bias) sum += read(entry.bias, entry.wide_bias, n);
    if (entry.bias_deltas)
      for (int i = 0; i < entry.coded + entry.dense; ++i)
        if (mix.tokens_of[i]) {
          const int64_t of_bias = static_cast<int64_t>(entry.vectors[i].place) * entry.bias_delta_stride + n;
          sum = weighted(mix.coefficient[i][m], read(entry.bias_deltas, entry.wide_bias_deltas, of_bias), sum);
        }
    const int64_t column = entry.first_column + n;
    float* partial = launch.partial + m * launch.outputs + column;
    if (entry.add_partial) sum += *partial;
    if (entry.keep_partial)
      *partial = sum;
    else
      launch.y[m * static_cast<int64_t>(launch.y_stride) + column] = to_bfloat16(sum);
  }
}

template <class F>
Kernel kernel_for(int tiles) {
  return tiles == 1 ? decode_kernel<F, 1> : decode_kernel<F, 2>;
}

}  // namespace alignvec::cuda
