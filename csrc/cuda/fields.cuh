// Bit planes as operands of a product: the words of kernels/operands.py become pairs of bfloat16 numbers in registers.
//
// A chunk of `width` words holds 32 / bits planes of `width` inputs. A thread takes two pairs of neighbouring words of
// a row: in every plane, the inputs of two registers of a fragment. The lower halves of a pair, put side by side, hold
// pairs of neighbouring inputs of the first planes, the upper halves of the others; a plane is then a shift and a mask.
#pragma once

#include "ring.cuh"

namespace alignvec::cuda {

// Tables of `logic`, for the compiler makes two instructions of an expression with two constants.
constexpr int kAndXor = (0xF0 & 0xCC) ^ 0xAA;
constexpr int kXorWhere = ((0xF0 ^ 0xCC) & 0xAA) | (~0xF0 & ~0xAA & 0xFF);  // c ? a ^ b : ~a
constexpr int kXorNotOr = 0xF0 ^ ((~0xCC & 0xFF) | 0xAA);                   // a ^ (~b | c)

constexpr int kPieces = 8;  // of 16 inputs and one plane each, that a warp takes from a stage

// The fields of a thread's words in eight neighbouring planes: two 16-bit halves of a register, for the four registers
// of a fragment (rows g and g + 8 by turns, then the inputs' second half).
template <int kBits>
struct Fields {
  static constexpr int kPlanes = 32 / kBits;
  static constexpr int kHalves = kBits <= 2 ? 1 : kBits / 2;  // of a word, that eight planes take
  uint32_t halves[kHalves][4];

  // words: row g of the tile in shared memory, and rows 8 further on; unit: of the slice's first
  // four words; plane: the first of the eight.
  ALIGNVEC_DEVICE void load(const unsigned char* words, int g, int unit, int width, int plane) {
    constexpr int kSets = kBits == 8 ? 2 : 1;  // chunks that eight planes lie in
#pragma unroll
    for (int set = 0; set < kSets; ++set) {
      uint2 row[2][2];  // of rows g and g + 8, in the first and the second eight words of the slice
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int at = swizzled(g, unit + set * width / 4 + i % 2 * 2) * 16 + i / 2 * 8 * kWordPitch<kBits>;
        row[i / 2][i % 2] = *reinterpret_cast<const uint2*>(words + at);
      }
#pragma unroll
      for (int half = 0; half < kHalves / kSets; ++half) {
        uint32_t selector = half ? 0x7632u : 0x5410u;
        if (kBits == 1) selector = static_cast<uint32_t>(plane) / 8 * 0x0101u + 0x0400u;  // one byte of each
        if (kBits == 2) selector = plane ? 0x7632u : 0x5410u;
        uint32_t (&to)[4] = halves[set * (kHalves / kSets) + half];
#pragma unroll
        for (int r = 0; r < 4; ++r) to[r] = bytes(row[r % 2][r / 2].x, row[r % 2][r / 2].y, selector);
      }
    }
  }

  // The fields of piece i, below 2^bits, in register r.
  ALIGNVEC_DEVICE uint32_t field(int i, int r) const {
    constexpr uint32_t kMask = ((1u << kBits) - 1) * 0x00010001u;
    const uint32_t word = halves[i * kBits / 16][r];
    if (kBits == 8) return i % 2 ? bytes(word, 0, 0x4341) : word & kMask;
    return (word >> (i * kBits % 16)) & kMask;
  }

  // The codes of piece i in units of code_unit(), bfloat16.
  ALIGNVEC_DEVICE uint32_t code(int i, int r) const {
    // Bits 0 to 7 alone are n 2^-133, subnormal or not; 2^126 n 2^-133 - half 2^-7 is exact. The upper nibble of
    // a byte stays where it is, 16 times as large.
    if constexpr (kBits == 1) {
      return logic<kAndXor>(halves[0][r] << (15 - i % 8), 0x80008000u, 0x3F803F80u);  // a sign of 1.0
    } else if constexpr (kBits == 4) {
      const uint32_t word = halves[i / 4][r] >> (i % 4 / 2 * 8);
      return i % 2 ? fma_halves(word & 0x00F000F0u, 0x7C807C80u, 0xBD80BD80u)
                   : fma_halves(word & 0x000F000Fu, 0x7E807E80u, 0xBD80BD80u);
    } else {
      return fma_halves(field(i, r), 0x7E807E80u, 0xBF80BF80u);
    }
  }

  static ALIGNVEC_DEVICE float code_unit() { return kBits == 1 ? 1.0f : 128.0f; }
};

// The bits of two 16-bit floats as numbers that count ULPs, the lowest float at 0, less 2^(bits - 1): what a field is
// added to. That is never below 0, save beside numbers of 2^127 and more.
template <int kBits>
ALIGNVEC_DEVICE uint32_t counted(uint32_t pair) {
  return logic<kXorWhere>(pair, signs(pair), 0x7FFF7FFFu) - (1u << (kBits - 1)) * 0x00010001u;
}

ALIGNVEC_DEVICE uint32_t uncounted(uint32_t count) {
  return logic<kXorNotOr>(count, signs(count), 0x80008000u);  // the top bit back, those below it where it says negative
}

}  // namespace alignvec::cuda
