// The kernels as operators of torch, by its stable ABI: one binary for torch 2.10 and later, any Python.
// Schemas are defined in Python (alignvec/compiled/cpu.py), which has checked what it passes; sizes are checked here
// again, as a wrong one would be read out of bounds.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <initializer_list>
#include <optional>
#include <string>
#include <vector>

#include "elementwise.h"
#include "linear.h"
#include "step.h"

namespace alignvec {
namespace {

using torch::stable::Tensor;
using ScalarType = torch::headeronly::ScalarType;
using Optional = std::optional<Tensor>;

void loop(int64_t count, int64_t grain, void (*body)(int64_t, int64_t, void*), void* context) {
  torch::stable::parallel_for(0, count, grain, [&](int64_t first, int64_t last) { body(first, last, context); });
}

Matrix matrix(const Tensor& t, const char* name) {
  const ScalarType type = t.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16, name, ": it must be float32 or bfloat16");
  STD_TORCH_CHECK(t.dim() > 0 && (t.stride(t.dim() - 1) == 1 || t.size(t.dim() - 1) <= 1), name,
                  ": its last dimension must be contiguous");
  Matrix made;
  made.data = t.data_ptr();
  made.dtype = type == ScalarType::Float ? DType::f32 : DType::bf16;
  made.stride = t.dim() > 1 ? t.stride(0) : 0;
  return made;
}

Matrix matrix(const Tensor& t, int64_t rows, int64_t columns, const char* name) {
  STD_TORCH_CHECK(t.dim() == 2 && t.size(0) == rows && t.size(1) == columns, name, ": it must be [", rows, ", ",
                  columns, "]");
  return matrix(t, name);
}

Matrix row(const Optional& t, int64_t count, const char* name) {
  if (!t.has_value()) return Matrix();
  STD_TORCH_CHECK(t->dim() == 1 && t->size(0) == count, name, ": it must be [", count, "]");
  return matrix(*t, name);
}

Matrix rows_of(const Optional& t, int64_t rows, int64_t columns, const char* name) {
  return t.has_value() ? matrix(*t, rows, columns, name) : Matrix();
}

const int32_t* integers(const Tensor& t, int64_t count, const char* name) {
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Int && t.is_contiguous() && t.numel() >= count, name,
                  ": it must be contiguous int32 with at least ", count, " items");
  return static_cast<const int32_t*>(t.data_ptr());
}

// Rows begin at `start`: from 0, ascending, to no more than there are values.
const int32_t* starts(const Tensor& t, int64_t rows, int64_t values) {
  const int32_t* start = integers(t, rows + 1, "start");
  bool valid = start[0] == 0 && start[rows] <= values;
  for (int64_t n = 0; n < rows; ++n) valid &= start[n] <= start[n + 1];
  STD_TORCH_CHECK(valid, "start: rows must begin at 0, ascend, and end within the values");
  return start;
}

Operand coded(Operand operand, const Tensor& words, int64_t per_word) {
  operand.words_stride = words.dim() == 2 ? words.size(1) : 0;
  operand.words = integers(words, operand.out * operand.words_stride, "words");
  STD_TORCH_CHECK(operand.words_stride * per_word >= operand.in, "words: a row must hold ", operand.in, " inputs");
  return operand;
}

void check_planes(const Operand& operand) {
  const bool bits = operand.bits == 1 || operand.bits == 2 || operand.bits == 4 || operand.bits == 8;
  const bool width = operand.width == 16 || operand.width == 32 || operand.width == 64;
  STD_TORCH_CHECK(bits && width && operand.words_stride % operand.width == 0, "words: planes of ", operand.width,
                  " inputs in ", operand.bits, " bits are not a layout");
}

// The operands that `layout`, four numbers each (kind, bits, width, group), and the tensors of all of them stand for.
std::vector<Operand> operands(const std::vector<int64_t>& layout, const std::vector<Tensor>& parts, int64_t out,
                              int64_t in) {
  STD_TORCH_CHECK(in > 0, "weight: it must have inputs");
  std::vector<Operand> made;
  size_t at = 0;
  const auto next = [&]() -> const Tensor& {
    STD_TORCH_CHECK(at < parts.size(), "parts: there are too few tensors");
    return parts[at++];
  };
  for (size_t i = 0; i + 3 < layout.size(); i += 4) {
    Operand operand;
    operand.kind = static_cast<Kind>(layout[i]);
    operand.bits = static_cast<int>(layout[i + 1]);
    operand.width = static_cast<int>(layout[i + 2]);
    operand.group = layout[i + 3];
    operand.out = out;
    operand.in = in;
    if (operand.kind == Kind::dense) {
      operand.values = matrix(next(), out, in, "a dense delta");
    } else if (operand.kind == Kind::codes) {
      operand = coded(operand, next(), operand.bits > 0 ? 32 / operand.bits : 0);
      check_planes(operand);
      operand.group = operand.group < in ? operand.group : (in + operand.width - 1) / operand.width * operand.width;
      STD_TORCH_CHECK(operand.group > 0 && operand.group % operand.width == 0, "scales: a group must be whole planes");
      operand.groups = (in + operand.group - 1) / operand.group;
      operand.scales = matrix(next(), out, operand.groups, "scales");
    } else if (operand.kind == Kind::lossless) {
      operand = coded(operand, next(), operand.bits > 0 ? 32 / operand.bits : 0);
      check_planes(operand);
      const Tensor &start = next(), &columns = next(), &values = next();
      next();  // the row of each value, which GPUs read
      operand.values = matrix(values, "values");
      operand.start = starts(start, out, values.numel());
      operand.columns = integers(columns, operand.start[out], "columns");
      STD_TORCH_CHECK(operand.values.dtype == DType::bf16, "values: lossless deltas are bfloat16");
    } else if (operand.kind == Kind::sparse) {
      operand = coded(operand, next(), 32);
      next();  // offsets within a row, which GPUs read
      const Tensor &start = next(), &values = next();
      operand.values = matrix(values, "values");
      operand.start = starts(start, out, values.numel());
    } else if (operand.kind == Kind::low_rank) {
      const Tensor &a = next(), &b = next();
      operand.rank = a.size(0);
      operand.values = matrix(a, operand.rank, in, "A");
      operand.factor = matrix(b, out, operand.rank, "B");
    } else {
      STD_TORCH_CHECK(operand.kind == Kind::zero, "layout: there is no kind ", layout[i]);
    }
    made.push_back(operand);
  }
  STD_TORCH_CHECK(at == parts.size(), "parts: there are more tensors than the layout has");
  return made;
}

Table table_of(const Tensor& table, const Tensor& columns, int64_t vectors) {
  STD_TORCH_CHECK(table.scalar_type() == ScalarType::Float && table.dim() == 2 && table.stride(1) == 1,
                  "table: it must be float32 [rows, vectors]");
  Table made;
  made.data = static_cast<const float*>(table.data_ptr());
  made.stride = table.stride(0);
  made.columns = integers(columns, vectors, "columns");
  made.vectors = vectors;
  for (int64_t i = 0; i < vectors; ++i)
    STD_TORCH_CHECK(made.columns[i] >= 0 && made.columns[i] < table.size(1), "columns: the table has no column ",
                    made.columns[i]);
  return made;
}

Table table_of(const Tensor& table, const Tensor& rows, const Tensor& columns, const Optional& token_rows,
               int64_t vectors, int64_t tokens) {
  Table made = table_of(table, columns, vectors);
  made.rows = *integers(rows, 1, "rows");
  STD_TORCH_CHECK(made.rows >= 1 && made.rows <= table.size(0), "rows: the table has ", table.size(0), ", not ",
                  made.rows);
  if (token_rows.has_value()) {
    made.token_rows = integers(*token_rows, tokens, "token_rows");
    for (int64_t m = 0; m < tokens; ++m)
      STD_TORCH_CHECK(made.token_rows[m] >= 0 && made.token_rows[m] < table.size(0),
                      "token_rows: the table has no row ", made.token_rows[m]);
  }
  return made;
}

void cpu_linear(const Tensor& x, const Tensor& weight, const Optional& bias, const std::vector<int64_t>& layout,
                const std::vector<Tensor>& parts, const Optional& bias_deltas, const Tensor& columns,
                const Tensor& table, const Tensor& rows, const Optional& token_rows, int64_t combine_tokens,
                bool merged, const Tensor& y) {
  Linear call;
  call.tokens = x.size(0), call.out = weight.size(0), call.in = weight.size(1);
  const int64_t vectors = static_cast<int64_t>(layout.size() / 4);
  call.x = matrix(x, call.tokens, call.in, "x");
  call.weight = matrix(weight, "weight");
  call.y = matrix(y, call.tokens, call.out, "y");
  STD_TORCH_CHECK(call.x.dtype == call.weight.dtype && call.y.dtype == call.x.dtype,
                  "x: it must have the dtype of the weight, and so must y");
  call.bias = row(bias, call.out, "bias");
  call.bias_deltas = rows_of(bias_deltas, vectors, call.out, "bias_deltas");
  call.operands = operands(layout, parts, call.out, call.in);
  call.table = table_of(table, rows, columns, token_rows, vectors, call.tokens);
  call.combine_tokens = combine_tokens;
  call.merged = merged;
  linear(call, loop);
}

void cpu_materialise(const Tensor& weight, const std::vector<int64_t>& layout, const std::vector<Tensor>& parts,
                     const Tensor& columns, const Tensor& table, const Tensor& out, const Optional& low) {
  Materialise call;
  call.out = weight.size(0), call.in = weight.size(1);
  call.weight = matrix(weight, "weight");
  call.operands = operands(layout, parts, call.out, call.in);
  call.table = table_of(table, columns, static_cast<int64_t>(layout.size() / 4));
  call.mix = matrix(out, call.out, call.in, "out");
  call.low = rows_of(low, call.out, call.in, "low");
  materialise(call, loop);
}

void cpu_embedding(const Tensor& ids, const Tensor& weight, const std::vector<int64_t>& layout,
                   const std::vector<Tensor>& parts, const Tensor& columns, const Tensor& table, const Tensor& rows,
                   const Optional& token_rows, const Tensor& y) {
  Embedding call;
  call.tokens = ids.numel(), call.dim = weight.size(1);
  STD_TORCH_CHECK(ids.scalar_type() == ScalarType::Long && ids.is_contiguous(), "ids: they must be contiguous int64");
  call.ids = static_cast<const int64_t*>(ids.data_ptr());
  for (int64_t t = 0; t < call.tokens; ++t)
    STD_TORCH_CHECK(call.ids[t] >= 0 && call.ids[t] < weight.size(0), "ids: ", call.ids[t], " is not below ",
                    weight.size(0));
  call.weight = matrix(weight, "weight");
  call.operands = operands(layout, parts, weight.size(0), call.dim);
  call.table = table_of(table, rows, columns, token_rows, static_cast<int64_t>(layout.size() / 4), call.tokens);
  call.y = matrix(y, call.tokens, call.dim, "y");
  embedding(call, loop);
}

void cpu_norm(const Tensor& x, const Optional& residual, const Optional& weight, const Optional& bias,
              const Optional& deltas, const Optional& bias_deltas, const Tensor& columns, const Tensor& table,
              const Tensor& rows, const Optional& token_rows, double eps, double offset, bool centre, const Tensor& y) {
  Norm call;
  call.tokens = x.size(0), call.features = x.size(1);
  const int64_t vectors = deltas.has_value() ? deltas->size(0) : bias_deltas.has_value() ? bias_deltas->size(0) : 0;
  call.x = matrix(x, "x");
  call.residual = rows_of(residual, call.tokens, call.features, "residual");
  call.weight = row(weight, call.features, "weight");
  call.bias = row(bias, call.features, "bias");
  call.deltas = rows_of(deltas, vectors, call.features, "deltas");
  call.bias_deltas = rows_of(bias_deltas, vectors, call.features, "bias_deltas");
  call.table = table_of(table, rows, columns, token_rows, vectors, call.tokens);
  call.eps = static_cast<float>(eps), call.offset = static_cast<float>(offset), call.centre = centre;
  call.y = matrix(y, call.tokens, call.features, "y");
  norm(call, loop);
}

Heads heads(const Tensor& t, const Tensor& like, std::initializer_list<int64_t> sizes, const char* name) {
  const int64_t last = static_cast<int64_t>(sizes.size()) - 1;
  bool fits = t.dim() == last + 1 && t.scalar_type() == like.scalar_type() && t.size(0) >= *sizes.begin();
  for (int64_t i = 1; fits && i <= last; ++i) fits = t.size(i) == sizes.begin()[i];
  STD_TORCH_CHECK(fits && (t.stride(last) == 1 || t.size(last) == 1), name,
                  ": its shape, dtype or strides do not fit the queries");
  Heads made;
  made.data = static_cast<char*>(t.data_ptr());
  made.dtype = matrix(t, name).dtype;
  for (int64_t i = 0; i < last; ++i) made.strides[i] = t.stride(i);
  return made;
}

void cpu_rotary_append(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cos, const Tensor& sin,
                       const Tensor& lengths, const Tensor& keys, const Tensor& values, const Tensor& y) {
  STD_TORCH_CHECK(q.dim() == 3 && keys.dim() == 4 && cos.dim() == 2 && keys.size(2) > 0,
                  "q: it must be [rows, heads, D], with a cache of positions and their angles");
  RotaryAppend call;
  call.rows = q.size(0), call.heads = q.size(1), call.features = q.size(2);
  call.kv_heads = keys.size(1), call.max_length = keys.size(2), call.rotary = cos.size(1);
  STD_TORCH_CHECK(call.rotary % 2 == 0 && call.rotary <= call.features && cos.size(0) >= call.max_length,
                  "cos: it must be [max_length, an even number of features]");
  call.q = heads(q, q, {call.rows, call.heads, call.features}, "q");
  call.k = heads(k, q, {call.rows, call.kv_heads, call.features}, "k");
  call.v = heads(v, q, {call.rows, call.kv_heads, call.features}, "v");
  call.y = heads(y, q, {call.rows, call.heads, call.features}, "y");
  call.cos = matrix(cos, cos.size(0), call.rotary, "cos");
  call.sin = matrix(sin, cos.size(0), call.rotary, "sin");
  STD_TORCH_CHECK(call.cos.dtype == call.q.dtype && call.sin.dtype == call.q.dtype,
                  "cos: it must have the dtype of the queries, and so must sin");
  call.lengths = integers(lengths, call.rows, "lengths");
  call.keys = heads(keys, q, {call.rows, call.kv_heads, call.max_length, call.features}, "keys");
  call.values = heads(values, q, {call.rows, call.kv_heads, call.max_length, call.features}, "values");
  rotary_append(call, loop);
}

void cpu_decode_attention(const Tensor& q, const Tensor& keys, const Tensor& values, const Tensor& lengths,
                          double scale, int64_t window, const Tensor& y) {
  STD_TORCH_CHECK(q.dim() == 3 && keys.dim() == 4 && keys.size(2) > 0 && q.size(2) > 0,
                  "q: it must be [rows, heads, D], with a cache of positions");
  Attention call;
  call.rows = q.size(0), call.heads = q.size(1), call.features = q.size(2);
  call.kv_heads = keys.size(1), call.max_length = keys.size(2);
  STD_TORCH_CHECK(call.kv_heads > 0 && call.heads % call.kv_heads == 0, "keys: their heads must divide those of q");
  call.q = heads(q, q, {call.rows, call.heads, call.features}, "q");
  call.keys = heads(keys, q, {call.rows, call.kv_heads, call.max_length, call.features}, "keys");
  call.values = heads(values, q, {call.rows, call.kv_heads, call.max_length, call.features}, "values");
  call.y = heads(y, q, {call.rows, call.heads, call.features}, "y");
  call.lengths = integers(lengths, call.rows, "lengths");
  call.scale = static_cast<float>(scale), call.window = window;
  decode_attention(call, loop);
}

void cpu_gated(const Tensor& gate_up, int64_t activation, const Tensor& y) {
  Gate call;
  STD_TORCH_CHECK(gate_up.dim() == 2, "gate_up: it must be [tokens, 2 features]");
  call.tokens = gate_up.size(0), call.features = gate_up.size(1) / 2;
  call.x = matrix(gate_up, call.tokens, 2 * call.features, "gate_up");
  call.y = matrix(y, call.tokens, call.features, "y");
  STD_TORCH_CHECK(call.y.dtype == call.x.dtype, "y: it must have the dtype of gate_up");
  STD_TORCH_CHECK(activation >= 0 && activation <= static_cast<int64_t>(Activation::gelu_tanh),
                  "activation: there is no number ", activation);
  call.activation = static_cast<Activation>(activation);
  gated(call, loop);
}

std::string cpu_capability() { return kernels().name; }

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(alignvec, CPU, m) {
  m.impl("cpu_linear", TORCH_BOX(&cpu_linear));
  m.impl("cpu_materialise", TORCH_BOX(&cpu_materialise));
  m.impl("cpu_embedding", TORCH_BOX(&cpu_embedding));
  m.impl("cpu_norm", TORCH_BOX(&cpu_norm));
  m.impl("cpu_rotary_append", TORCH_BOX(&cpu_rotary_append));
  m.impl("cpu_decode_attention", TORCH_BOX(&cpu_decode_attention));
  m.impl("cpu_gated", TORCH_BOX(&cpu_gated));
}

STABLE_TORCH_LIBRARY_IMPL(alignvec, CompositeExplicitAutograd, m) {
  m.impl("cpu_capability", TORCH_BOX(&cpu_capability));
}

}  // namespace alignvec

// The version of the schemas that this file implements: alignvec/compiled refuses a library of another one.
extern "C" __attribute__((visibility("default"))) int alignvec_schemas() { return 3; }
