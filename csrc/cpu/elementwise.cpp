#include "elementwise.h"

#include <algorithm>
#include <cmath>

#include "buffer.h"

namespace alignvec {
namespace {

constexpr int64_t GRAIN = 1 << 15;  // values that are worth a thread

int64_t grain(int64_t values) { return std::max<int64_t>(1, GRAIN / std::max<int64_t>(values, 1)); }

void* row_of(const Matrix& matrix, int64_t n) {
  return matrix.data == nullptr ? nullptr : const_cast<char*>(matrix.row(n));
}

uint16_t ordered_one(uint16_t bits) { return bits & 0x8000 ? bits ^ 0x7FFF : bits; }

// The aligned checkpoint's own bits, -0.0 too: the base's with a lossless delta's steps, and the side table's values.
void aligned_row(const Operand& operand, const Matrix& weight, int64_t n, uint16_t* out) {
  const uint16_t* base = reinterpret_cast<const uint16_t*>(weight.row(n));
  const int32_t* words = operand.words + n * operand.words_stride;
  const int planes = 32 / operand.bits, zero = 1 << (operand.bits - 1), mask = (1 << operand.bits) - 1;
  for (int64_t k0 = 0; k0 < operand.in; k0 += operand.width) {
    const Plane plane = plane_of(k0, operand.width, planes);
    const int32_t* at = words + plane.words;
    const int shift = plane.number * operand.bits;
    for (int64_t j = 0; j < operand.width && k0 + j < operand.in; ++j) {
      const int field = (at[j] >> shift) & mask;
      const int step = field == 0 ? 0 : field - zero;
      out[k0 + j] = ordered_one(static_cast<uint16_t>(ordered_one(base[k0 + j]) + step));
    }
  }
  const uint16_t* values = static_cast<const uint16_t*>(operand.values.data);
  for (int32_t e = operand.start[n]; e < operand.start[n + 1]; ++e) out[operand.columns[e]] = values[e];
}

// vector + sum_i c_i deltas[i] for the tokens that share a mix: made anew where the mix changes.
class RowVector {
 public:
  RowVector(const Kernels& kernels, const Matrix& vector, const Matrix& deltas, int64_t features)
      : kernels_(kernels), vector_(vector), deltas_(deltas), mix_(vector.data == nullptr ? 0 : features) {}

  const float* of(const Coefficients& c, int64_t token) {
    if (mix_.empty()) return nullptr;
    const float* own = c.of(token);
    if (last_ != nullptr && std::equal(own, own + c.vectors, last_)) return mix_.data();
    const int64_t features = static_cast<int64_t>(mix_.size());
    kernels_.load_row(vector_, 0, features, mix_.data());
    for (int64_t i = 0; deltas_.data != nullptr && i < c.vectors; ++i) {
      if (own[i] == 0) continue;
      const Operand delta = dense_operand({deltas_.row(i), deltas_.dtype, 0}, 1, features);
      kernels_.add_row(delta, vector_, 0, own[i], mix_.data());
    }
    last_ = own;
    return mix_.data();
  }

 private:
  const Kernels& kernels_;
  Matrix vector_, deltas_;
  std::vector<float> mix_;
  const float* last_ = nullptr;
};

// The dense deltas in use and their coefficients; none unless all that are in use are dense and of the base's type.
struct DenseMix {
  std::vector<Matrix> deltas;
  std::vector<float> c;

  DenseMix(const Materialise& call, const Coefficients& all) {
    for (int64_t i : all.used) {
      const Operand& operand = call.operands[static_cast<size_t>(i)];
      if (operand.kind == Kind::dense && operand.values.dtype == call.weight.dtype) deltas.push_back(operand.values);
      c.push_back(all.of(0)[i]);
    }
    if (deltas.size() != c.size() || c.size() > MOST_VECTORS) deltas.clear();
  }

  // A row of the mix, so many inputs at a time that they stay in a first-level cache between sum and store.
  void write(const Kernels& kernels, const Materialise& call, int64_t n, float* mix) const {
    constexpr int64_t PART = 2048;
    for (int64_t k = 0; k < call.in; k += PART) {
      const int64_t count = std::min(PART, call.in - k);
      kernels.mix_dense(call.weight, deltas.data(), c.data(), static_cast<int64_t>(c.size()), n, k, count, mix);
      kernels.stream(mix, count, call.mix.dtype,
                     static_cast<char*>(row_of(call.mix, n)) + k * item_size(call.mix.dtype));
    }
  }
};

}  // namespace

void materialise(const Materialise& call, Loop loop) {
  const Kernels& own = kernels();
  const Coefficients c = coefficients(call.table, 1);
  const bool aligned = c.used.size() == 1 && c.of(0)[c.used[0]] == 1.0f &&
                       call.operands[static_cast<size_t>(c.used[0])].kind == Kind::lossless;
  const DenseMix dense(call, c);
  parallel(loop, call.out, grain(call.in), [&](int64_t first, int64_t last) {
    Buffer<float> mix(static_cast<size_t>(call.in));
    for (int64_t n = first; n < last; ++n) {
      void *high = row_of(call.mix, n), *low = row_of(call.low, n);
      if (aligned) {
        aligned_row(call.operands[static_cast<size_t>(c.used[0])], call.weight, n, static_cast<uint16_t*>(high));
        if (low != nullptr) own.store(mix.data(), call.in, call.low.dtype, low, nullptr);  // zeros
        continue;
      }
      if (!dense.deltas.empty() && low == nullptr) {
        dense.write(own, call, n, mix.data());
        continue;
      }
      own.load_row(call.weight, n, call.in, mix.data());
      for (int64_t i : c.used)
        own.add_row(call.operands[static_cast<size_t>(i)], call.weight, n, c.of(0)[i], mix.data());
      if (low == nullptr) {
        own.stream(mix.data(), call.in, call.mix.dtype, high);
      } else {
        own.store(mix.data(), call.in, call.mix.dtype, high, low);
      }
    }
  });
}

void embedding(const Embedding& call, Loop loop) {
  const Kernels& own = kernels();
  const Coefficients c = coefficients(call.table, call.tokens);
  parallel(loop, call.tokens, grain(call.dim), [&](int64_t first, int64_t last) {
    std::vector<float> row(static_cast<size_t>(call.dim));
    for (int64_t t = first; t < last; ++t) {
      own.load_row(call.weight, call.ids[t], call.dim, row.data());
      for (int64_t i : c.used) {
        const float own_c = c.of(t)[i];
        if (own_c != 0) own.add_row(call.operands[static_cast<size_t>(i)], call.weight, call.ids[t], own_c, row.data());
      }
      own.store(row.data(), call.dim, call.y.dtype, row_of(call.y, t), nullptr);
    }
  });
}

void norm(const Norm& call, Loop loop) {
  const Kernels& own = kernels();
  const Coefficients c = coefficients(call.table, call.tokens);
  parallel(loop, call.tokens, grain(call.features), [&](int64_t first, int64_t last) {
    RowVector weight(own, call.weight, call.deltas, call.features);
    RowVector bias(own, call.bias, call.bias_deltas, call.features);
    std::vector<float> row(static_cast<size_t>(call.features));
    const float count = static_cast<float>(call.features);
    for (int64_t t = first; t < last; ++t) {
      float sum, squares, mean = 0;
      if (call.residual.data == nullptr) {
        own.load_row(call.x, t, call.features, row.data());
      } else {
        own.load_row(call.residual, t, call.features, row.data());
        own.add_row(dense_operand(call.x, call.tokens, call.features), call.x, t, 1.0f, row.data());
        own.store(row.data(), call.features, call.residual.dtype, row_of(call.residual, t), nullptr);
        if (call.residual.dtype != DType::f32) own.load_row(call.residual, t, call.features, row.data());
      }
      if (call.centre) {
        own.moments(row.data(), call.features, 0, &sum, &squares);
        mean = sum / count;
      }
      own.moments(row.data(), call.features, mean, &sum, &squares);
      const float scale = 1.0f / std::sqrt(squares / count + call.eps);
      own.scale_row(row.data(), call.features, mean, scale, weight.of(c, t), call.offset, bias.of(c, t), row.data());
      own.store(row.data(), call.features, call.y.dtype, row_of(call.y, t), nullptr);
    }
  });
}

}  // namespace alignvec
