#include "linear.h"

#include <algorithm>
#include <cstring>

#include "inputs.h"

namespace alignvec {
namespace {

// Tokens of the base alone that are worth holding its rows in cache for.
constexpr int64_t PRODUCT_TOKENS = 32;

// Bytes of the mixes that one thread forms at a time: half of a second-level cache of 1 MiB.
constexpr int64_t MIX_BYTES = 1 << 19;

float rounded(float value, DType dtype) {
  if (dtype == DType::f32) return value;
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  bits = value != value ? bits | 0x400000 : bits + 0x7FFF + ((bits >> 16) & 1);
  bits &= 0xFFFF0000u;
  std::memcpy(&value, &bits, 4);
  return value;
}

float value_of(const Matrix& matrix, int64_t n, int64_t i) { return item(matrix.row(n), matrix.dtype, i); }

void write(const Matrix& y, int64_t m, int64_t n, float value) {
  char* at = const_cast<char*>(y.row(m)) + n * item_size(y.dtype);
  if (y.dtype == DType::f32) {
    std::memcpy(at, &value, 4);
  } else {
    const float narrow = rounded(value, DType::bf16);
    std::memcpy(at, reinterpret_cast<const char*>(&narrow) + 2, 2);
  }
}

// A vector's operand with the activations it multiplies: x, or of a low-rank one x A^T.
struct Factor {
  int64_t vector;
  Operand operand;
  Inputs x;
};

// Rows of one mix: float32, or where kernels read bf16 activations its upper half and, unless it is to be rounded, the
// rest.
struct Mix {
  Mix(const Inputs& x, bool rounded, DType weight)
      : stride(x.stride), rounds(rounded && weight == DType::bf16), values(static_cast<size_t>(stride)) {
    const size_t size = static_cast<size_t>(MIX_ROWS * stride);
    if (x.bf16 == nullptr) {
      values.resize(size);
      if (rounds) pair.resize(static_cast<size_t>(stride));
      return;
    }
    pair.resize(rounded ? size : 2 * size);
    high = pair.data();
    low = rounded ? nullptr : high + size;
  }

  float* row(int64_t r) { return values.data() + (high == nullptr ? r * stride : 0); }

  void finish(const Kernels& kernels, int64_t r, int64_t in) {
    if (high != nullptr) {
      kernels.store(row(r), in, DType::bf16, high + r * stride, low == nullptr ? nullptr : low + r * stride);
    } else if (rounds) {
      kernels.store(row(r), in, DType::bf16, pair.data(), nullptr);
      kernels.load_row({pair.data(), DType::bf16, stride}, 0, in, row(r));
    }
  }

  Matrix half(int index, int64_t k) const {
    if (high == nullptr) return {values.data() + k, DType::f32, stride};
    return {(index == 0 ? high : low) + k, DType::bf16, stride};
  }

  int64_t stride;
  bool rounds;
  Buffer<float> values;
  Buffer<uint16_t> pair;
  uint16_t* high = nullptr;
  uint16_t* low = nullptr;
  Buffer<float> sums;
};

// What the executions share: padded activations, coefficients, and the low-rank vectors' first products.
class Call {
 public:
  Call(const Linear& call, Loop loop)
      : call_(call),
        loop_(loop),
        kernels_(kernels()),
        base_(dense_operand(call.weight, call.out, call.in)),
        c_(coefficients(call.table, call.tokens)) {}

  void run() {
    const int64_t mixes = static_cast<int64_t>(c_.runs.size());
    const int64_t combine_tokens = c_.used.empty() ? PRODUCT_TOKENS : call_.combine_tokens;
    if (mixes > 0 && call_.tokens >= combine_tokens * mixes) {
      run_combine();
    } else {
      run_split();
    }
  }

 private:
  void run_split();
  void run_combine();
  std::vector<Factor> factors(const Inputs& x, bool low_rank_only);
  void combine_rows(int64_t n0, int64_t n1, const Inputs& x, const std::vector<Factor>& narrow, Mix& mix);

  const Linear& call_;
  Loop loop_;
  const Kernels& kernels_;
  Operand base_;
  Coefficients c_;
  std::vector<Buffer<float>> low_;
};

std::vector<Factor> Call::factors(const Inputs& x, bool low_rank_only) {
  std::vector<Factor> made;
  for (int64_t i : c_.used) {
    const Operand& own = call_.operands[static_cast<size_t>(i)];
    if (own.kind != Kind::low_rank) {
      if (!low_rank_only) made.push_back({i, own, x});
      continue;
    }
    Inputs narrow;
    narrow.stride = padded_inputs(own.rank);
    low_.emplace_back(static_cast<size_t>((call_.tokens + TILE_TOKENS) * narrow.stride), 0.0f);
    float* t = low_.back().data();
    const Operand a = dense_operand(own.values, own.rank, own.in);
    parallel(loop_, (own.rank + TILE_ROWS - 1) / TILE_ROWS, 4, [&](int64_t first, int64_t last) {
      float sums[TILE_ROWS * TILE_TOKENS];
      Ahead none;
      for (int64_t n = first * TILE_ROWS; n < last * TILE_ROWS; n += TILE_ROWS) {
        for (int64_t m = 0; m < call_.tokens; m += TILE_TOKENS) {
          kernels_.dots(a, call_.weight, n, x, m, call_.tokens == 1 ? 1 : TILE_TOKENS, none, sums);
          for (int64_t r = 0; r < TILE_ROWS && n + r < own.rank; ++r)
            for (int64_t j = 0; j < TILE_TOKENS && m + j < call_.tokens; ++j)
              t[(m + j) * narrow.stride + n + r] = sums[r * TILE_TOKENS + j];
        }
      }
    });
    narrow.f32 = t;
    made.push_back({i, dense_operand(own.factor, own.out, own.rank), narrow});
  }
  return made;
}

// The operands that read x itself, low-rank ones by their A.
std::vector<Operand> readers(const Linear& call, const Coefficients& c, const Operand& base, bool all) {
  std::vector<Operand> made = {base};
  for (int64_t i : c.used) {
    const Operand& own = call.operands[static_cast<size_t>(i)];
    if (own.kind == Kind::low_rank) {
      made.push_back(dense_operand(own.values, own.rank, own.in));
    } else if (all && own.kind != Kind::zero) {
      made.push_back(own);
    }
  }
  return made;
}

// A sum for the base and one for each vector, which meet their coefficients after the last input: rows may differ.
void Call::run_split() {
  const std::vector<Operand> reading = readers(call_, c_, base_, true);
  const PaddedInputs padded(kernels_, call_.x, call_.tokens, call_.in, reading, false, loop_);
  const std::vector<Factor> vectors = factors(padded.view(), false);
  const int tile = call_.tokens == 1 ? 1 : TILE_TOKENS;
  const bool biased = call_.bias.data != nullptr, edited = call_.bias_deltas.data != nullptr;
  parallel(loop_, (call_.out + TILE_ROWS - 1) / TILE_ROWS, 4, [&](int64_t first, int64_t last) {
    float total[TILE_ROWS * TILE_TOKENS], sums[TILE_ROWS * TILE_TOKENS];
    for (int64_t n = first * TILE_ROWS; n < std::min(last * TILE_ROWS, call_.out); n += TILE_ROWS) {
      const int64_t rows = std::min<int64_t>(TILE_ROWS, call_.out - n);
      Ahead none, ahead;
      if (n + TILE_ROWS < std::min(last * TILE_ROWS, call_.out))
        ahead = {call_.weight.row(n + TILE_ROWS), call_.weight.row(std::min(n + 2 * TILE_ROWS, call_.out))};
      for (int64_t m = 0; m < call_.tokens; m += tile) {
        const int64_t tokens = std::min<int64_t>(tile, call_.tokens - m);
        kernels_.dots(base_, call_.weight, n, padded.view(), m, tile, none, total);
        for (int64_t r = 0; biased && r < rows; ++r)
          for (int64_t j = 0; j < tokens; ++j) total[r * TILE_TOKENS + j] += value_of(call_.bias, 0, n + r);
        for (const Factor& factor : vectors) {
          float c[TILE_TOKENS];
          bool used = false;
          for (int64_t j = 0; j < tokens; ++j) used |= (c[j] = c_.of(m + j)[factor.vector]) != 0;
          if (!used) continue;
          if (factor.operand.kind == Kind::zero) {
            std::memset(sums, 0, sizeof(sums));  // its bias may still be edited
          } else {
            kernels_.dots(factor.operand, call_.weight, n, factor.x, m, tile, ahead, sums);
          }
          for (int64_t r = 0; r < rows; ++r) {
            const float bias = edited ? value_of(call_.bias_deltas, factor.vector, n + r) : 0.0f;
            for (int64_t j = 0; j < tokens; ++j)
              if (c[j] != 0) total[r * TILE_TOKENS + j] += c[j] * (sums[r * TILE_TOKENS + j] + bias);
          }
        }
        for (int64_t r = 0; r < rows; ++r)
          for (int64_t j = 0; j < tokens; ++j) write(call_.y, m + j, n + r, total[r * TILE_TOKENS + j]);
      }
    }
  });
}

// The mix of a few rows at a time, in cache, for each run of tokens that share it. Low-rank vectors stay out of it,
// unless it is rounded: their own products are cheaper.
void Call::run_combine() {
  Operand mixed = base_;
  mixed.values.dtype = call_.x.dtype;
  std::vector<Operand> reading = readers(call_, c_, base_, false);
  reading[0] = mixed;
  if (call_.merged) reading.resize(1);
  const PaddedInputs padded(kernels_, call_.x, call_.tokens, call_.in, reading, kernels_.product != nullptr, loop_);
  const std::vector<Factor> narrow = call_.merged ? std::vector<Factor>() : factors(padded.view(), true);
  const int64_t tiles = std::clamp<int64_t>(MIX_BYTES / (call_.in * 4) / TILE_ROWS, 1, MIX_ROWS / TILE_ROWS);
  const int64_t block = kernels_.product != nullptr ? MIX_ROWS : tiles * TILE_ROWS;
  parallel(loop_, (call_.out + block - 1) / block, 1, [&](int64_t first, int64_t last) {
    Mix mix(padded.view(), call_.merged || c_.used.empty(), call_.weight.dtype);
    for (int64_t b = first; b < last; ++b)
      combine_rows(b * block, std::min((b + 1) * block, call_.out), padded.view(), narrow, mix);
  });
}

// Inputs that a tile of rows and one of tokens take at a time: both stay in a first-level cache.
constexpr int64_t PRODUCT_INPUTS = 2048;

// sums[m * MIX_ROWS + r] of a mix that is held in cache, for all tokens of a run.
void products(const Kernels& kernels, const Mix& mix, int64_t rows, int64_t in, const Inputs& x, const Run& run,
              float* sums) {
  const int64_t tokens = run.last - run.first;
  if (mix.high != nullptr && x.tiles != nullptr && run.first % 16 == 0 && tokens > 1)
    return kernels.product(mix.high, mix.low, mix.stride, x, run.first, tokens, sums);
  const int tile = tokens == 1 ? 1 : TILE_TOKENS;
  std::memset(sums, 0, static_cast<size_t>(tokens * MIX_ROWS) * sizeof(float));
  float part[TILE_ROWS * TILE_TOKENS];
  Ahead none;
  for (int64_t k = 0; k < in; k += PRODUCT_INPUTS) {
    const int64_t count = std::min(PRODUCT_INPUTS, in - k);
    Inputs from = x;
    if (from.f32 != nullptr) from.f32 += k;
    if (from.bf16 != nullptr) from.bf16 += k;
    for (int64_t m = 0; m < tokens; m += tile) {
      for (int half = 0; half < (mix.low == nullptr ? 1 : 2); ++half) {
        const Operand own = dense_operand(mix.half(half, k), rows, count);
        for (int64_t n = 0; n < rows; n += TILE_ROWS) {
          kernels.dots(own, own.values, n, from, run.first + m, tile, none, part);
          for (int64_t j = 0; j < std::min<int64_t>(tile, tokens - m); ++j)
            for (int64_t r = 0; r < TILE_ROWS; ++r) sums[(m + j) * MIX_ROWS + n + r] += part[r * TILE_TOKENS + j];
        }
      }
    }
  }
}

void Call::combine_rows(int64_t n0, int64_t n1, const Inputs& x, const std::vector<Factor>& narrow, Mix& mix) {
  const int64_t in = call_.in, rows = n1 - n0;
  float biases[MIX_ROWS], part[TILE_ROWS * TILE_TOKENS];
  Ahead none;
  for (const Run& run : c_.runs) {
    const float* c = c_.of(run.first);
    for (int64_t r = 0; r < rows; ++r) {
      float* row = mix.row(r);
      kernels_.load_row(call_.weight, n0 + r, in, row);
      float bias = call_.bias.data == nullptr ? 0.0f : value_of(call_.bias, 0, n0 + r);
      for (int64_t i : c_.used) {
        const Operand& own = call_.operands[static_cast<size_t>(i)];
        if (c[i] == 0) continue;
        if (own.kind != Kind::low_rank || call_.merged) kernels_.add_row(own, call_.weight, n0 + r, c[i], row);
        if (call_.bias_deltas.data != nullptr) bias += c[i] * value_of(call_.bias_deltas, i, n0 + r);
      }
      biases[r] = call_.merged ? rounded(bias, call_.weight.dtype) : bias;
      mix.finish(kernels_, r, in);
    }
    const int64_t tokens = run.last - run.first;
    mix.sums.resize(static_cast<size_t>(tokens * MIX_ROWS));
    float* sums = mix.sums.data();
    products(kernels_, mix, rows, in, x, run, sums);
    for (const Factor& factor : narrow) {
      if (c[factor.vector] == 0) continue;
      for (int64_t m = 0; m < tokens; m += TILE_TOKENS) {
        for (int64_t n = 0; n < rows; n += TILE_ROWS) {
          kernels_.dots(factor.operand, call_.weight, n0 + n, factor.x, run.first + m, TILE_TOKENS, none, part);
          for (int64_t j = 0; j < std::min<int64_t>(TILE_TOKENS, tokens - m); ++j)
            for (int64_t r = 0; r < TILE_ROWS; ++r)
              sums[(m + j) * MIX_ROWS + n + r] += c[factor.vector] * part[r * TILE_TOKENS + j];
        }
      }
    }
    for (int64_t m = 0; m < tokens; ++m)
      for (int64_t r = 0; r < rows; ++r) write(call_.y, run.first + m, n0 + r, sums[m * MIX_ROWS + r] + biases[r]);
  }
}

}  // namespace

void linear(const Linear& call, Loop loop) {
  if (call.tokens > 0 && call.out > 0) Call(call, loop).run();
}

}  // namespace alignvec
