// The decode kernels as an operator of torch, by its stable ABI. Its schema is defined in alignvec/compiled/cuda.py,
// whose `serves` says which calls it takes; what would be read out of bounds is checked here again.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

#include "grid.h"

namespace alignvec::cuda {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;

void check(bool fine, const char* name, const char* what) { STD_TORCH_CHECK(fine, name, " must be ", what); }

// A matrix of bfloat16 whose rows are read 16 bytes at a time.
const uint16_t* rows_of(const Tensor& t, int64_t rows, int64_t columns, const char* name) {
  check(t.dim() == 2 && t.size(0) == rows && t.size(1) == columns, name, "a matrix of the layer's shape");
  check(t.scalar_type() == ScalarType::BFloat16, name, "bfloat16");
  check(t.stride(1) == 1 && t.stride(0) % 8 == 0 && reinterpret_cast<uintptr_t>(t.data_ptr()) % 16 == 0, name,
        "in rows that begin at multiples of 16 bytes");
  check(t.stride(0) < INT32_MAX, name, "in rows less than 2^31 apart");
  return static_cast<const uint16_t*>(t.data_ptr());
}

const int32_t* integers(const Tensor& t, int64_t count, const char* name) {
  check(t.scalar_type() == ScalarType::Int && t.is_contiguous() && t.numel() >= count, name,
        "contiguous, int32, and long enough");
  return static_cast<const int32_t*>(t.data_ptr());
}

bool is_wide(const Tensor& t, const char* name) {
  const bool wide = t.scalar_type() == ScalarType::Float;
  check(wide || t.scalar_type() == ScalarType::BFloat16, name, "float32 or bfloat16");
  return wide;
}

uint8_t log2_of(int64_t value) {
  uint8_t log2 = 0;
  while (int64_t{2} << log2 <= value) ++log2;
  return log2;
}

// Reads the tensors of one call one after another, each where a layout says what it is.
class Parts {
 public:
  explicit Parts(const std::vector<Tensor>& tensors) : tensors_(tensors) {}

  const Tensor& next() {
    STD_TORCH_CHECK(at_ < tensors_.size(), "parts: there are fewer tensors than the layout has");
    return tensors_[at_++];
  }

  Vector vector(const int64_t* layout, int place, int64_t out, int64_t in) {
    Vector v{};
    v.place = static_cast<uint8_t>(place);
    v.kind = static_cast<Kind>(layout[0]);
    STD_TORCH_CHECK(layout[0] >= 0 && layout[0] <= 2, "layout: sparse and low-rank deltas are not for these kernels");
    const Tensor& data = next();
    if (v.kind == Kind::kDense) {
      v.data = rows_of(data, out, in, "a dense delta");
      v.stride = static_cast<int32_t>(data.stride(0));
      return v;
    }
    const int64_t bits = layout[1], width = layout[2], group = layout[3];
    STD_TORCH_CHECK(bits == 1 || bits == 2 || bits == 4 || bits == 8, "layout: fields have 1, 2, 4 or 8 bits");
    STD_TORCH_CHECK(width == 16 || width == 32 || width == 64, "layout: planes have 16, 32 or 64 inputs");
    v.bits = static_cast<uint8_t>(bits);
    v.width_log2 = log2_of(width);
    v.data = integers(data, out * data.size(1), "words");
    v.stride = static_cast<int32_t>(data.size(1));
    check(data.size(0) == out && data.size(1) % width == 0 && data.size(1) * (32 / bits) >= in, "words",
          "[out, words] with a row's inputs in each");
    if (v.kind == Kind::kCodes) {
      STD_TORCH_CHECK(bits != 2, "layout: codes have 1, 4 or 8 bits");
      const Tensor& scales = next();
      v.groups = static_cast<int32_t>(scales.size(1));
      v.group_log2 = v.groups == 1 ? 30 : log2_of(group);
      check(scales.is_contiguous() && scales.size(0) == out && scales.numel() < INT32_MAX, "scales",
            "contiguous [out, groups], less than 2^31");
      check(v.groups == 1 || (group >= width && !(group & (group - 1)) && group * v.groups >= in), "scales",
            "one for each group of a power of two of inputs, whole planes");
      v.wide_scales = is_wide(scales, "scales");
      check(!v.wide_scales || (bits == 1 && v.groups == 1), "scales", "bfloat16, other than one a row of signs");
      v.scales = scales.data_ptr();
    } else {
      STD_TORCH_CHECK(bits != 1, "layout: steps have 2, 4 or 8 bits");
      v.scales = integers(next(), out + 1, "start");
      const Tensor &columns = next(), &values = next();
      next();  // the row of each value
      v.columns = integers(columns, values.numel(), "columns");
      check(values.scalar_type() == ScalarType::BFloat16 && values.is_contiguous(), "values", "contiguous bfloat16");
      v.values = static_cast<const uint16_t*>(values.data_ptr());
    }
    return v;
  }

  void end() const { STD_TORCH_CHECK(at_ == tensors_.size(), "parts: there are more tensors than the layout has"); }

 private:
  const std::vector<Tensor>& tensors_;
  size_t at_ = 0;
};

void linear(const Tensor& x, const std::vector<Tensor>& weights, const std::vector<Optional>& biases,
            const std::vector<int64_t>& layout, const std::vector<int64_t>& vectors, const std::vector<Tensor>& parts,
            const std::vector<Optional>& bias_deltas, const std::vector<Tensor>& columns, const Tensor& table,
            const Tensor& rows, const Optional& token_rows, const Optional& partial, int64_t stages, bool dependent,
            const Tensor& y) {
  const size_t count = weights.size();
  STD_TORCH_CHECK(
      biases.size() == count && vectors.size() == count && bias_deltas.size() == count && columns.size() == count,
      "weights, biases, vectors, bias_deltas and columns must have one item for each layer");
  const int64_t tokens = x.size(0), in = x.size(1);
  STD_TORCH_CHECK(tokens >= 1 && tokens <= kMaxTokens, "x must have 1 to ", kMaxTokens, " rows, not ", tokens);
  STD_TORCH_CHECK(stages == 0 || (stages >= 2 && stages <= kStages), "stages must be 0 or 2 to ", kStages);
  Launch call{};
  call.x = rows_of(x, tokens, in, "x");
  check(in > 0 && in % 8 == 0, "in_features", "a multiple of 8");
  call.x_stride = static_cast<int32_t>(x.stride(0));
  call.tokens = static_cast<int32_t>(tokens);
  call.in_features = static_cast<int32_t>(in);
  check(table.scalar_type() == ScalarType::Float && table.dim() == 2 && table.stride(1) == 1, "table",
        "float32 [rows, vectors]");
  call.table = static_cast<const float*>(table.data_ptr());
  call.table_stride = static_cast<int32_t>(table.stride(0));
  call.rows = integers(rows, 1, "rows");
  call.token_rows = token_rows ? integers(*token_rows, tokens, "token_rows") : nullptr;

  std::vector<Entry> layers;
  Parts reader(parts);
  size_t at = 0;
  int64_t outputs = 0;
  for (size_t i = 0; i < count; ++i) {
    Entry layer{};
    const int64_t out = weights[i].size(0);
    layer.weight = rows_of(weights[i], out, in, "weight");
    layer.weight_stride = static_cast<int32_t>(weights[i].stride(0));
    layer.out_features = static_cast<int32_t>(out);
    layer.first_column = static_cast<int32_t>(outputs);
    outputs += out;
    if (biases[i]) {
      check(biases[i]->is_contiguous() && biases[i]->numel() == out, "bias", "contiguous [out]");
      layer.wide_bias = is_wide(*biases[i], "bias");
      layer.bias = biases[i]->data_ptr();
    }
    if (bias_deltas[i]) {
      const Tensor& deltas = *bias_deltas[i];
      check(deltas.dim() == 2 && deltas.size(0) == vectors[i] && deltas.size(1) == out && deltas.stride(1) == 1,
            "bias_deltas", "[vectors, out] in contiguous rows");
      layer.wide_bias_deltas = is_wide(deltas, "bias_deltas");
      layer.bias_deltas = deltas.data_ptr();
      layer.bias_delta_stride = static_cast<int32_t>(deltas.stride(0));
    }
    layer.columns = integers(columns[i], vectors[i], "columns");
    STD_TORCH_CHECK(vectors[i] >= 0 && vectors[i] <= kMaxVectors, "a layer may have ", kMaxVectors, " vectors, not ",
                    vectors[i]);
    STD_TORCH_CHECK(layout.size() >= at + 4 * static_cast<size_t>(vectors[i]), "layout must have 4 numbers a vector");
    for (int place = 0; place < vectors[i]; ++place, at += 4) {
      layer.vectors[place] = reader.vector(&layout[at], place, out, in);
      ++(layer.vectors[place].kind == Kind::kDense ? layer.dense : layer.coded);
    }
    layers.push_back(layer);
  }
  reader.end();

  check(y.scalar_type() == ScalarType::BFloat16 && y.dim() == 2 && y.size(0) == tokens && y.size(1) == outputs &&
            y.stride(1) == 1,
        "y", "bfloat16 [tokens, all outputs] in contiguous rows");
  call.y = static_cast<uint16_t*>(y.data_ptr());
  call.y_stride = static_cast<int32_t>(y.stride(0));
  call.outputs = static_cast<int32_t>(outputs);
  if (partial) {
    check(
        partial->scalar_type() == ScalarType::Float && partial->is_contiguous() && partial->numel() >= tokens * outputs,
        "partial", "contiguous float32 [tokens, all outputs]");
    call.partial = static_cast<float*>(partial->data_ptr());
  }
  STD_TORCH_CHECK(partial || !chains(layers), "partial is needed where a layer's vectors differ in format");

  void* stream = nullptr;
#ifdef USE_CUDA
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
#endif
  for (const Plan& each : plan(call, layers, device_facts(), static_cast<int>(stages))) {
    const char* obstacle = start(each, stream, dependent);
    STD_TORCH_CHECK(!obstacle, "a decode kernel did not start: ", obstacle ? obstacle : "");
  }
}

}  // namespace
}  // namespace alignvec::cuda

#ifdef USE_CUDA
STABLE_TORCH_LIBRARY_IMPL(alignvec, CUDA, m) {
#else
STABLE_TORCH_LIBRARY_IMPL(alignvec, CPU, m) {  // the emulator
#endif
  m.impl("cuda_linear", TORCH_BOX(&alignvec::cuda::linear));
}

// The version of the schemas that this file implements: alignvec/compiled refuses a library of another one.
extern "C" __attribute__((visibility("default"))) int alignvec_schemas() { return 3; }
