#include "step.h"

#include <algorithm>
#include <cstring>

namespace alignvec {
namespace {

constexpr int64_t GRAIN = 1 << 14;  // values that are worth a thread
constexpr int64_t FEATURES = 1024;  // of a gate that are done at a time

}  // namespace

void rotary_append(const RotaryAppend& call, Loop loop) {
  const Kernels& own = kernels();
  const DType dtype = call.q.dtype;
  const int64_t grain = std::max<int64_t>(1, GRAIN / ((call.heads + call.kv_heads) * call.features));
  parallel(loop, call.rows, grain, [&](int64_t first, int64_t last) {
    for (int64_t r = first; r < last; ++r) {
      const int64_t length = call.lengths[r], at = std::clamp<int64_t>(length, 0, call.max_length - 1);
      const char *cos = call.cos.row(at), *sin = call.sin.row(at);
      for (int64_t h = 0; h < call.heads; ++h)
        own.rotate(call.q.at(r, h), cos, sin, call.rotary, call.features, dtype, call.y.at(r, h));
      for (int64_t h = 0; length == at && h < call.kv_heads; ++h) {
        own.rotate(call.k.at(r, h), cos, sin, call.rotary, call.features, dtype, call.keys.at(r, h, at));
        std::memcpy(call.values.at(r, h, at), call.v.at(r, h), static_cast<size_t>(call.features * item_size(dtype)));
      }
    }
  });
}

void gated(const Gate& call, Loop loop) {
  const Kernels& own = kernels();
  const int64_t parts = (call.features + FEATURES - 1) / FEATURES, size = item_size(call.x.dtype);
  parallel(loop, call.tokens * parts, GRAIN / FEATURES, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const int64_t t = i / parts, k = i % parts * FEATURES;
      const char* gate = call.x.row(t) + k * size;
      char* y = const_cast<char*>(call.y.row(t)) + k * size;
      own.gate(gate, gate + call.features * size, std::min(FEATURES, call.features - k), call.x.dtype, call.activation,
               y);
    }
  });
}

}  // namespace alignvec
