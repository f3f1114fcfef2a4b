// AMX's tiles in plain C++, for tests on CPUs that have none: tiles of 16 rows of 64 bytes, bf16 pairs into float32.
#pragma once

#include <cstdint>
#include <cstring>

namespace alignvec {
namespace {

struct Tiles {
  unsigned char bytes[8][16][64];
};
thread_local Tiles emulated_tiles;

inline void tile_load(int tile, const void* from, int64_t stride) {
  for (int row = 0; row < 16; ++row)
    std::memcpy(emulated_tiles.bytes[tile][row], static_cast<const char*>(from) + row * stride, 64);
}

inline void tile_store(int tile, void* to, int64_t stride) {
  for (int row = 0; row < 16; ++row)
    std::memcpy(static_cast<char*>(to) + row * stride, emulated_tiles.bytes[tile][row], 64);
}

inline float tile_value(int tile, int row, int item) {
  uint32_t bits = 0;
  std::memcpy(reinterpret_cast<char*>(&bits) + 2, emulated_tiles.bytes[tile][row] + 2 * item, 2);
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline void tile_multiply(int c, int a, int b) {
  for (int m = 0; m < 16; ++m) {
    float sums[16];
    std::memcpy(sums, emulated_tiles.bytes[c][m], 64);
    for (int k = 0; k < 16; ++k)
      for (int n = 0; n < 16; ++n)
        for (int half = 0; half < 2; ++half) sums[n] += tile_value(a, m, 2 * k + half) * tile_value(b, k, 2 * n + half);
    std::memcpy(emulated_tiles.bytes[c][m], sums, 64);
  }
}

}  // namespace
}  // namespace alignvec

#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#define _tile_loadconfig(config) static_cast<void>(config)
#define _tile_release() static_cast<void>(0)
#define _tile_zero(tile) std::memset(emulated_tiles.bytes[tile], 0, sizeof(emulated_tiles.bytes[tile]))
#define _tile_loadd(tile, from, stride) tile_load(tile, from, stride)
#define _tile_stored(tile, to, stride) tile_store(tile, to, stride)
#define _tile_dpbf16ps(c, a, b) tile_multiply(c, a, b)
