// device.cuh for hosts: a thread of a block is a fiber, and instructions do what the device's manual says of them.
//
// What makes mistakes show: shared memory begins as NaN; a copy's target is NaN from its issue to the wait that covers
// it; a warp runs until it has to wait for others, in an order that tests turn round.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#define ALIGNVEC_DEVICE inline
#define __global__
#define __grid_constant__
#define __launch_bounds__(...)

struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};

namespace alignvec::emulator {

// Of the running thread.
int thread_index();
int block_threads();
int block_index();
unsigned char* shared_memory();
void block_barrier();
void copy_16(void* shared, const void* global, bool there);
void copy_commit();
void copy_wait(int pending);

// Puts `size` bytes in and returns those of all 32 threads of the warp, once each has come.
const unsigned char* exchange(const void* mine, int size);
constexpr int kExchanged = 32;  // bytes of a thread at most

}  // namespace alignvec::emulator

namespace alignvec::cuda {

using emulator::block_barrier;
using emulator::block_index;
using emulator::block_threads;
using emulator::copy_16;
using emulator::copy_commit;
using emulator::shared_memory;
using emulator::thread_index;

template <int kPending>
void copy_wait() {
  emulator::copy_wait(kPending);
}

inline float from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline uint32_t to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

template <class T>
T of_lane(const unsigned char* exchanged, int lane) {
  T value;
  std::memcpy(&value, exchanged + lane * emulator::kExchanged, sizeof(T));
  return value;
}

inline uint32_t ballot(bool predicate) {
  const unsigned char* all = emulator::exchange(&predicate, sizeof predicate);
  uint32_t set = 0;
  for (int lane = 0; lane < 32; ++lane) set |= static_cast<uint32_t>(of_lane<bool>(all, lane)) << lane;
  return set;
}

inline float shuffle_xor(float value, int mask) {
  return of_lane<float>(emulator::exchange(&value, sizeof value), (thread_index() % 32) ^ mask);
}

inline float to_float(uint16_t bfloat16) { return from_bits(static_cast<uint32_t>(bfloat16) << 16); }
inline uint16_t to_bfloat16(float value) {
  if (std::isnan(value)) return 0x7FFF;
  const uint32_t bits = to_bits(value);
  return static_cast<uint16_t>((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}
inline float not_a_number() { return from_bits(0x7FFFFFFFu); }

inline void load_matrices(uint32_t (&to)[4], const void* row) {
  const unsigned char* all = emulator::exchange(&row, sizeof row);
  for (int i = 0; i < 4; ++i) {
    const auto* from = of_lane<const unsigned char*>(all, 8 * i + thread_index() % 32 / 4);
    std::memcpy(&to[i], from + thread_index() % 4 * 4, 4);
  }
}

inline void multiply_add(float (&sum)[4], const uint32_t (&a)[4], const uint32_t* b) {
  struct {
    uint32_t a[4], b[2];
  } mine = {{a[0], a[1], a[2], a[3]}, {b[0], b[1]}};
  static_assert(sizeof mine <= emulator::kExchanged);
  const unsigned char* all = emulator::exchange(&mine, sizeof mine);
  const int g = thread_index() % 32 / 4, t = thread_index() % 4;
  const auto half = [](uint32_t word, int upper) { return to_float(static_cast<uint16_t>(word >> (16 * upper))); };
  for (int i = 0; i < 4; ++i) {
    const int row = g + 8 * (i / 2), column = 2 * t + i % 2;
    for (int k = 0; k < 16; ++k) {
      // Of row r and input k: register r / 8 + 2 (k / 8) of lane (r % 8, k % 8 / 2); of B alike, with the column as g.
      const auto left = of_lane<decltype(mine)>(all, row % 8 * 4 + k % 8 / 2);
      const auto right = of_lane<decltype(mine)>(all, column * 4 + k % 8 / 2);
      sum[i] += half(left.a[row / 8 + k / 8 * 2], k % 2) * half(right.b[k / 8], k % 2);
    }
  }
}

inline uint32_t bytes(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t pair = static_cast<uint64_t>(b) << 32 | a;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t nibble = selector >> (4 * i) & 15;
    uint32_t byte = pair >> (8 * (nibble & 7)) & 255;
    if (nibble & 8) byte = byte & 128 ? 255 : 0;
    result |= byte << (8 * i);
  }
  return result;
}
inline uint32_t signs(uint32_t halves) { return bytes(halves, 0, 0xBB99); }

template <int kTable>
uint32_t logic(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t result = 0;
  for (int row = 0; row < 8; ++row)
    if (kTable >> row & 1) result |= (row & 4 ? a : ~a) & (row & 2 ? b : ~b) & (row & 1 ? c : ~c);
  return result;
}

inline uint32_t fma_halves(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t result = 0;
  for (int shift = 0; shift < 32; shift += 16) {
    const auto half = [shift](uint32_t word) { return to_float(static_cast<uint16_t>(word >> shift)); };
    const float exact = std::fma(half(a), half(b), half(c));  // as it is in all uses: nothing is rounded twice
    result |= static_cast<uint32_t>(to_bfloat16(exact)) << shift;
  }
  return result;
}

inline void wait_for_earlier_grid() {}
inline void start_later_grid() {}

}  // namespace alignvec::cuda
