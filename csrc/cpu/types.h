// What the kernels of a CPU take: matrices, operands as kernels/operands.py lays them out, inputs, and the kernels'
// table.
#pragma once

#include <cstdint>
#include <cstring>

namespace alignvec {

enum class DType { f32, bf16 };
enum class Activation { silu, gelu, gelu_tanh };

inline int64_t item_size(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

// Item i of a row.
inline float item(const char* row, DType dtype, int64_t i) {
  float value;
  uint32_t bits = 0;
  if (dtype == DType::bf16) {
    uint16_t upper;
    std::memcpy(&upper, row + 2 * i, 2);
    bits = static_cast<uint32_t>(upper) << 16;
  } else {
    std::memcpy(&bits, row + 4 * i, 4);
  }
  std::memcpy(&value, &bits, 4);
  return value;
}

// Rows of consecutive values, `stride` values apart.
struct Matrix {
  const void* data = nullptr;
  DType dtype = DType::f32;
  int64_t stride = 0;

  const char* row(int64_t n) const { return static_cast<const char*>(data) + n * stride * item_size(dtype); }
};

enum class Kind { dense, codes, lossless, sparse, low_rank, zero };

// One vector's delta of a matrix [out, in]; see kernels/operands.py for what each part holds.
struct Operand {
  Kind kind = Kind::dense;
  int bits = 0;
  int width = 0;
  int64_t group = 0;
  int64_t out = 0;
  int64_t in = 0;
  Matrix values;                     // dense: the delta; low-rank: A [rank, in]; lossless, sparse: one row of values
  Matrix factor;                     // low-rank: B [out, rank]
  int64_t rank = 0;                  // low-rank
  const int32_t* words = nullptr;    // codes, lossless: fields; sparse: the bitmap
  int64_t words_stride = 0;          // words in a row
  Matrix scales;                     // codes
  int64_t groups = 0;                // scales in a row
  const int32_t* start = nullptr;    // lossless, sparse: where a row's values begin
  const int32_t* columns = nullptr;  // lossless: the columns of the values
};

// Where the fields of the inputs from k on, k a multiple of the width, lie in a row of bit planes.
struct Plane {
  int64_t words;
  int number;
};

inline Plane plane_of(int64_t k, int width, int planes) {
  const int64_t run = k / width;
  return {run / planes * width, static_cast<int>(run % planes)};
}

inline Operand dense_operand(Matrix values, int64_t out, int64_t in) {
  Operand operand;
  operand.values = values;
  operand.out = out;
  operand.in = in;
  return operand;
}

// Activations of all tokens in the layouts that kernels read, rows `stride` values apart and padded with zeros:
// float32, bf16, and bf16 in pairs (see dots_bf16.h) for planes of 16, 32 and 64 inputs. Layouts that no kernel needs
// are null.
struct Inputs {
  const float* f32 = nullptr;
  const uint16_t* bf16 = nullptr;
  const uint16_t* paired[3] = {nullptr, nullptr, nullptr};
  // bf16 as AMX takes it: blocks of 16 tokens, in each [stride / 2, 16] pairs of consecutive inputs.
  const uint32_t* tiles = nullptr;
  int64_t stride = 0;
};

inline int paired_index(int width) { return width == 16 ? 0 : width == 32 ? 1 : 2; }

// Memory that is read next, fetched while packed deltas keep the processor busy: a cache line at each `step`.
struct Ahead {
  const char* next = nullptr;
  const char* end = nullptr;

  void step() {
    if (next < end) __builtin_prefetch(next), next += 64;
  }
};

constexpr int TILE_ROWS = 4;         // output rows that one call of `dots` takes
constexpr int TILE_TOKENS = 4;       // tokens, unless there is one
constexpr int MOST_VECTORS = 16;     // that edit a weight, as kernels/operands.py has it
constexpr int MIX_ROWS = 32;         // rows of a mix that a product takes
constexpr int64_t INPUT_PAD = 128;   // activations are padded to a multiple: two planes of the largest width
constexpr int STEP_COUNTS = 9;       // what `count_steps` counts
constexpr int64_t SUM_WORDS = 4096;  // words of four bfloat16 values in a row of a checksum, as alignvec/sums.py has it
constexpr uint32_t SUM_SMALLEST = 0x3700, SUM_BEYOND = 0x4780;  // magnitudes of bfloat16 between which float16 has all
inline int64_t padded_inputs(int64_t inputs) { return (inputs + INPUT_PAD - 1) / INPUT_PAD * INPUT_PAD; }

// The kernels of one instruction set. `weight` is the base, which lossless deltas are steps from.
struct Kernels {
  const char* name;
  // Whether `dots` reads bf16 activations, where there are any, for this operand: else it reads float32 ones.
  bool (*reads_bf16)(const Operand& operand);
  // sums[r * TILE_TOKENS + m] = sum_k x[m0 + m][k] delta[n0 + r][k] for TILE_ROWS rows, of which those past the last do
  // not count, and for 1 or TILE_TOKENS tokens. Low-rank deltas and none at all are not for it.
  void (*dots)(const Operand& operand, const Matrix& weight, int64_t n0, const Inputs& x, int64_t m0, int tokens,
               Ahead& ahead, float* sums);
  // sums[m * MIX_ROWS + r] = sum_k x[m0 + m][k] (high[r][k] + low[r][k]) for MIX_ROWS rows of bf16, `stride` values
  // apart and as long as padded activations; low may be null, m0 is a multiple of 16. Null where `dots` is all there
  // is.
  void (*product)(const uint16_t* high, const uint16_t* low, int64_t stride, const Inputs& x, int64_t m0,
                  int64_t tokens, float* sums);
  // mix[k] = base[n][first + k] + sum_i c[i] deltas[i][n][first + k], k < in, of up to MOST_VECTORS dense deltas in the
  // base's type.
  void (*mix_dense)(const Matrix& base, const Matrix* deltas, const float* c, int64_t count, int64_t n, int64_t first,
                    int64_t in, float* mix);
  // mix[k] = base[n][k], or += c delta[n][k].
  void (*load_row)(const Matrix& matrix, int64_t n, int64_t in, float* mix);
  void (*add_row)(const Operand& operand, const Matrix& weight, int64_t n, float c, float* mix);
  // out[i] = round(values[i]); low, unless null, takes round(values[i] - out[i]).
  void (*store)(const float* values, int64_t count, DType dtype, void* out, void* low);
  // As `store`, of what nobody reads soon.
  void (*stream)(const float* values, int64_t count, DType dtype, void* out);
  // out[i] = x[i] * scale * (weight[i] + offset), and out[i] = (x[i] - mean) * scale * weight[i] + bias[i]; weight and
  // bias may be null. `moments` gives the sum of values, and of their squares about `center`.
  void (*scale_row)(const float* x, int64_t count, float mean, float scale, const float* weight, float offset,
                    const float* bias, float* out);
  void (*moments)(const float* x, int64_t count, float center, float* sum, float* squares);
  // out = x cos + (-second half of x, first half) sin on the first `rotary` features, x after them.
  void (*rotate)(const void* x, const void* cos, const void* sin, int64_t rotary, int64_t features, DType dtype,
                 void* out);
  // out[k] = activation(gate[k]) up[k].
  void (*gate)(const void* gate, const void* up, int64_t features, DType dtype, Activation activation, void* out);
  // scores[t * TILE_TOKENS + m] of so many keys, in memory for whole tiles of TILE_ROWS, become e^(scale score -
  // maxima[m]), and sums[m] is their sum over the keys.
  void (*weigh)(float* scores, int64_t keys, float scale, float* maxima, float* sums);
  // sums[m * stride + k] += sum_t weights[t * TILE_TOKENS + m] values[first + t][k] for 1 or TILE_TOKENS queries.
  void (*add_values)(const Matrix& values, int64_t first, int64_t keys, int64_t features, const float* weights,
                     int tokens, int64_t stride, float* sums);
  // Lossless deltas, of 16-bit floats: counts[0] += how many of the steps are not 0, counts[i] += how many do not fit a
  // field of i bits, and *square += sum (aligned - base)^2, which is finite where all values and differences are.
  void (*count_steps)(const uint16_t* base, const uint16_t* aligned, int64_t count, bool half, int64_t* counts,
                      double* square);
  // A row's steps as fields of `width` bits in (cols * width + 7) / 8 bytes. Gives how many fit none; their columns go
  // to `wide` or, where that is null, `narrow`, and their aligned values to `own`. *magnitude becomes that of the
  // largest value, as bits, if it is larger. `walk_steps` goes the steps back.
  int64_t (*pack_steps)(const uint16_t* base, const uint16_t* aligned, int64_t cols, int width, uint8_t* packed,
                        uint16_t* narrow, int32_t* wide, uint16_t* own, int* magnitude);
  void (*walk_steps)(const uint16_t* base, const uint8_t* packed, int64_t cols, int width, uint16_t* aligned,
                     int* magnitude);
  // Checksums, of rows of SUM_WORDS words: the sum of a row's words, each also added to its column's; by how much they
  // change where float16 takes the place of bfloat16; the largest magnitude, as bits; float16 as bfloat16.
  uint64_t (*sum_words)(const uint16_t* values, uint64_t* columns);
  uint64_t (*narrow_words)(const uint16_t* values, uint64_t* columns);
  int (*magnitude)(const uint16_t* values, int64_t count);
  void (*half_to_bf16)(const uint16_t* values, int64_t count, uint16_t* out);
};

// The best kernels this CPU runs, or those that ALIGNVEC_CPU names (portable, avx2, avx512, avx512_bf16, amx).
const Kernels& kernels();

}  // namespace alignvec
