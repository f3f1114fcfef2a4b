// AMX: products of 16 x 32 weights with 32 x 16 activations, for mixes held in cache. All else is as without AMX.
#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>

#include "target.h"
#include "types.h"

#if defined(ALIGNVEC_AMX_EMULATED)
#include "amx_emulated.h"
#endif

namespace alignvec {

extern const Kernels avx512_bf16_kernels;

// Whether the CPU has AMX for bf16 and the kernel lets this process use it, which it has to be asked for.
bool amx_runs() {
#if defined(ALIGNVEC_AMX_EMULATED)
  return true;
#else
  constexpr int ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  const bool bf16 = d & (1u << 22), tiles = d & (1u << 24);
  return bf16 && tiles && syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
#endif
}

namespace {

struct alignas(64) TileConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

}  // namespace
}  // namespace alignvec

ALIGNVEC_TARGET_BEGIN("amx-tile,amx-bf16,avx512f")
namespace alignvec {
namespace {

constexpr int64_t SIDE = 16;

// Tiles 0 and 1 hold weights of 32 rows, 2 and 3 activations of 32 tokens, 4 to 7 their sums [rows, tokens].
void add_products(const uint16_t* weights, int64_t stride, const uint32_t* x, int64_t x_block, int64_t in) {
  for (int64_t k = 0; k < in; k += 2 * SIDE) {
    _tile_loadd(0, weights + k, stride * 2);
    _tile_loadd(1, weights + SIDE * stride + k, stride * 2);
    _tile_loadd(2, x + k / 2 * SIDE, 64);
    _tile_loadd(3, x + x_block + k / 2 * SIDE, 64);
    _tile_dpbf16ps(4, 0, 2);
    _tile_dpbf16ps(5, 0, 3);
    _tile_dpbf16ps(6, 1, 2);
    _tile_dpbf16ps(7, 1, 3);
  }
}

void product(const uint16_t* high, const uint16_t* low, int64_t stride, const Inputs& x, int64_t m0, int64_t tokens,
             float* sums) {
  const TileConfig config;
  _tile_loadconfig(&config);
  const int64_t x_block = x.stride / 2 * SIDE;
  alignas(64) float tiles[2][2][SIDE][SIDE];
  for (int64_t m = 0; m < tokens; m += 2 * SIDE) {
    const uint32_t* at = x.tiles + (m0 + m) / SIDE * x_block;
    _tile_zero(4);
    _tile_zero(5);
    _tile_zero(6);
    _tile_zero(7);
    add_products(high, stride, at, x_block, stride);
    if (low != nullptr) add_products(low, stride, at, x_block, stride);
    _tile_stored(4, tiles[0][0], 64);
    _tile_stored(5, tiles[0][1], 64);
    _tile_stored(6, tiles[1][0], 64);
    _tile_stored(7, tiles[1][1], 64);
    const int64_t own = std::min(2 * SIDE, tokens - m);
    for (int64_t j = 0; j < own; ++j)
      for (int64_t r = 0; r < MIX_ROWS; ++r)
        sums[(m + j) * MIX_ROWS + r] = tiles[r / SIDE][j / SIDE][r % SIDE][j % SIDE];
  }
  _tile_release();
}

}  // namespace
}  // namespace alignvec
ALIGNVEC_TARGET_END

namespace alignvec {

Kernels amx_kernels() {
  Kernels made = avx512_bf16_kernels;
  made.name = "amx";
  made.product = product;
  return made;
}

}  // namespace alignvec
#endif
