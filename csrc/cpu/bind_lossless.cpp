// Lossless deltas and checksums as operators of torch, as bind.cpp has the others. Schemas are defined in
// alignvec/compiled/cpu_lossless.py, which has checked what it passes; sizes are checked here again.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include "lossless.h"
#include "types.h"

namespace alignvec {
namespace {

using torch::stable::Tensor;
using ScalarType = torch::headeronly::ScalarType;

template <typename T>
T* items(const Tensor& t, ScalarType type, int64_t count, const char* name) {
  STD_TORCH_CHECK(t.scalar_type() == type && t.is_contiguous() && t.numel() == count, name, ": it must be contiguous, ",
                  count, " items of its type");
  return static_cast<T*>(t.data_ptr());
}

bool is_half(const Tensor& t) {
  const ScalarType type = t.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Half || type == ScalarType::BFloat16, "values: they must be float16 or bfloat16");
  return type == ScalarType::Half;
}

Packed packed_of(const Tensor& base, int64_t width, const Tensor& fields, const Tensor& start, const Tensor& columns,
                 const Tensor& own) {
  STD_TORCH_CHECK(base.dim() == 2 && width >= 2 && width <= 8, "base: it must be a matrix, and the width 2 to 8");
  Packed packed;
  packed.rows = base.size(0), packed.cols = base.size(1), packed.width = static_cast<int>(width);
  packed.fields = items<uint8_t>(fields, ScalarType::Byte, packed.rows * packed.row_bytes(), "fields");
  packed.start = items<int32_t>(start, ScalarType::Int, packed.rows + 1, "start");
  packed.own = items<uint16_t>(own, ScalarType::Short, own.numel(), "own");
  packed.columns = items<void>(columns, packed.wide() ? ScalarType::Int : ScalarType::Short, own.numel(), "columns");
  return packed;
}

void cpu_count_steps(const Tensor& base, const Tensor& aligned, const Tensor& counts, const Tensor& square) {
  const bool half = is_half(base);
  const int64_t count = base.numel();
  kernels().count_steps(items<uint16_t>(base, base.scalar_type(), count, "base"),
                        items<uint16_t>(aligned, base.scalar_type(), count, "aligned"), count, half,
                        items<int64_t>(counts, ScalarType::Long, STEP_COUNTS, "counts"),
                        items<double>(square, ScalarType::Double, 1, "square"));
}

void cpu_pack_steps(const Tensor& base, const Tensor& aligned, int64_t width, const Tensor& fields, const Tensor& start,
                    const Tensor& columns, const Tensor& own, const Tensor& magnitude) {
  is_half(base);
  const Packed packed = packed_of(base, width, fields, start, columns, own);
  STD_TORCH_CHECK(own.numel() >= base.numel() && base.numel() < int64_t{1} << 31, "own: there must be room for all");
  *items<int32_t>(magnitude, ScalarType::Int, 1, "magnitude") =
      pack(items<uint16_t>(base, base.scalar_type(), base.numel(), "base"),
           items<uint16_t>(aligned, base.scalar_type(), base.numel(), "aligned"), packed);
}

void cpu_unpack_steps(const Tensor& base, int64_t width, const Tensor& fields, const Tensor& start,
                      const Tensor& columns, const Tensor& own, const Tensor& aligned, const Tensor& magnitude) {
  is_half(base);
  const Packed packed = packed_of(base, width, fields, start, columns, own);
  bool valid = packed.start[0] == 0 && packed.start[packed.rows] <= own.numel();
  for (int64_t n = 0; n < packed.rows; ++n) valid &= packed.start[n] <= packed.start[n + 1];
  STD_TORCH_CHECK(valid, "start: rows must begin at 0, ascend, and end within the values");
  *items<int32_t>(magnitude, ScalarType::Int, 1, "magnitude") =
      unpack(items<uint16_t>(base, base.scalar_type(), base.numel(), "base"), packed,
             items<uint16_t>(aligned, base.scalar_type(), base.numel(), "aligned"));
}

void cpu_sums(const Tensor& values, const Tensor& rows, const Tensor& columns, const Tensor& magnitude) {
  const bool half = is_half(values);
  const int64_t count = values.numel(), whole = (count + 4 * SUM_WORDS - 1) / (4 * SUM_WORDS);
  *items<int32_t>(magnitude, ScalarType::Int, 1, "magnitude") =
      sums(items<uint16_t>(values, values.scalar_type(), count, "values"), count, half,
           items<uint64_t>(rows, ScalarType::Long, 2 * whole, "rows"),
           items<uint64_t>(columns, ScalarType::Long, 2 * SUM_WORDS, "columns"));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(alignvec, CPU, m) {
  m.impl("cpu_count_steps", TORCH_BOX(&cpu_count_steps));
  m.impl("cpu_pack_steps", TORCH_BOX(&cpu_pack_steps));
  m.impl("cpu_unpack_steps", TORCH_BOX(&cpu_unpack_steps));
  m.impl("cpu_sums", TORCH_BOX(&cpu_sums));
}

}  // namespace alignvec
