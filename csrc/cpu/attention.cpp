#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "buffer.h"
#include "step.h"

namespace alignvec {
namespace {

constexpr int64_t STRETCH = 128;    // keys at most that are taken by themselves, their weights in a first-level cache
constexpr int64_t CHUNK = 32;       // values that stay in it while all query heads are added up
constexpr int64_t PAD = 32;         // `dots` reads queries a whole register at a time
constexpr int64_t GRAIN = 1 << 15;  // values that are worth a thread

// One row's keys from `first` to `end`, cut into `count` stretches that differ by one key at most.
struct Span {
  int64_t first;
  int64_t end;
  int64_t count;

  int64_t cut(int64_t stretch) const { return first + (end - first) * stretch / count; }
};

Span span_of(const Attention& call, int64_t row) {
  const int64_t end = std::clamp<int64_t>(call.lengths[row], 0, call.max_length - 1) + 1;
  const int64_t first = call.window > 0 ? std::max<int64_t>(0, end - call.window) : 0;
  return {first, end, (end - first + STRETCH - 1) / STRETCH};
}

// What a stretch adds to each of `group` query heads: a maximum of scores, the sum of their exponentials relative to
// it, and of values so weighted.
struct Layout {
  int64_t group;
  int64_t tiles;    // of query heads
  int64_t tokens;   // in a tile: 1 or TILE_TOKENS
  int64_t stride;   // of a head's features, padded
  int64_t queries;  // whole tiles

  explicit Layout(const Attention& call)
      : group(call.heads / call.kv_heads),
        tiles((group + TILE_TOKENS - 1) / TILE_TOKENS),
        tokens(group == 1 ? 1 : TILE_TOKENS),
        stride((call.features + PAD - 1) / PAD * PAD),
        queries(tiles * TILE_TOKENS) {}

  int64_t size() const { return queries * (2 + stride); }
  float* maxima(float* part) const { return part; }
  float* sums(float* part) const { return part + queries; }
  float* values(float* part, int64_t query) const { return part + 2 * queries + query * stride; }
};

// Scratch of a thread, and one stretch's share by it.
class Stretch {
 public:
  Stretch(const Attention& call, const Layout& layout)
      : own_(kernels()),
        call_(call),
        layout_(layout),
        f32_(static_cast<size_t>(layout.queries * layout.stride)),
        bf16_(f32_.size()),
        scores_(static_cast<size_t>(layout.tiles * SCORES)) {}

  void add(int64_t row, int64_t head, int64_t first, int64_t end, float* part) {
    const int64_t keys = end - first;
    const Operand operand = dense_operand(matrix(call_.keys, row, head, first), keys, call_.features);
    const Inputs queries = load_queries(row, head * layout_.group, own_.reads_bf16(operand));
    const int tokens = static_cast<int>(layout_.tokens);
    Ahead none;
    for (int64_t t = 0; t < keys; t += TILE_ROWS)
      for (int64_t i = 0; i < layout_.tiles; ++i)
        own_.dots(operand, operand.values, t, queries, i * TILE_TOKENS, tokens, none, scores(i, t));
    for (int64_t i = 0; i < layout_.tiles; ++i) {
      float *maxima = layout_.maxima(part) + i * TILE_TOKENS, *sums = layout_.sums(part) + i * TILE_TOKENS;
      own_.weigh(scores(i, 0), keys, call_.scale, maxima, sums);
    }
    const Matrix values = matrix(call_.values, row, head, first);
    for (int64_t t = 0; t < keys; t += CHUNK)
      for (int64_t i = 0; i < layout_.tiles; ++i)
        own_.add_values(values, t, std::min(CHUNK, keys - t), call_.features, scores(i, t), tokens, layout_.stride,
                        layout_.values(part, i * TILE_TOKENS));
  }

 private:
  static constexpr int64_t SCORES = STRETCH * TILE_TOKENS;  // of a tile, STRETCH being whole tiles of keys

  float* scores(int64_t tile, int64_t key) { return scores_.data() + tile * SCORES + key * TILE_TOKENS; }

  static Matrix matrix(const Heads& cache, int64_t row, int64_t head, int64_t first) {
    return {cache.at(row, head, first), cache.dtype, cache.strides[2]};
  }

  Inputs load_queries(int64_t row, int64_t head, bool bf16) {
    for (int64_t g = 0; g < layout_.group; ++g) {
      const char* q = call_.q.at(row, head + g);
      if (bf16) {
        std::memcpy(bf16_.data() + g * layout_.stride, q, static_cast<size_t>(call_.features) * 2);
      } else {
        own_.load_row({q, call_.q.dtype, 0}, 0, call_.features, f32_.data() + g * layout_.stride);
      }
    }
    Inputs made;
    made.f32 = bf16 ? nullptr : f32_.data();
    made.bf16 = bf16 ? bf16_.data() : nullptr;
    made.stride = layout_.stride;
    return made;
  }

  const Kernels& own_;
  const Attention& call_;
  const Layout& layout_;
  Buffer<float> f32_;
  Buffer<uint16_t> bf16_;
  Buffer<float> scores_;
};

// The stretches' shares of a head, in their order; the first takes the sum.
void join(const Layout& layout, int64_t features, float* parts, int64_t count, int64_t query) {
  float most = layout.maxima(parts)[query], total = 0;
  for (int64_t s = 1; s < count; ++s) most = std::max(most, layout.maxima(parts + s * layout.size())[query]);
  float* y = layout.values(parts, query);
  for (int64_t s = 0; s < count; ++s) {
    float* part = parts + s * layout.size();
    const float weight = std::exp(layout.maxima(part)[query] - most), *values = layout.values(part, query);
    total += weight * layout.sums(part)[query];
    for (int64_t k = 0; k < features; ++k) y[k] = s == 0 ? weight * y[k] : y[k] + weight * values[k];
  }
  for (int64_t k = 0; k < features; ++k) y[k] /= total;
}

}  // namespace

void decode_attention(const Attention& call, Loop loop) {
  const Kernels& own = kernels();
  const Layout layout(call);
  struct Item {
    int64_t row;
    int64_t head;
    int64_t stretch;
  };
  std::vector<Span> spans;
  std::vector<Item> items;
  std::vector<int64_t> begins;  // the first item of a row and key head
  int64_t keys = 0;
  for (int64_t r = 0; r < call.rows; ++r) {
    spans.push_back(span_of(call, r));
    keys += spans.back().end - spans.back().first;
    for (int64_t h = 0; h < call.kv_heads; ++h) {
      begins.push_back(static_cast<int64_t>(items.size()));
      for (int64_t s = 0; s < spans.back().count; ++s) items.push_back({r, h, s});
    }
  }
  begins.push_back(static_cast<int64_t>(items.size()));
  const int64_t count = begins.back(), size = layout.size();
  Buffer<float> parts(static_cast<size_t>(count * size));
  const int64_t reads = std::max<int64_t>(1, 2 * keys * call.kv_heads * call.features / std::max<int64_t>(1, count));
  parallel(loop, count, std::max<int64_t>(1, GRAIN / reads), [&](int64_t first, int64_t last) {
    Stretch stretch(call, layout);
    for (int64_t i = first; i < last; ++i) {
      const Item& item = items[static_cast<size_t>(i)];
      const Span& span = spans[static_cast<size_t>(item.row)];
      stretch.add(item.row, item.head, span.cut(item.stretch), span.cut(item.stretch + 1), parts.data() + i * size);
    }
  });
  const int64_t grain = std::max<int64_t>(1, GRAIN / (layout.group * call.features));
  parallel(loop, call.rows * call.kv_heads, grain, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const int64_t begin = begins[static_cast<size_t>(i)], stretches = begins[static_cast<size_t>(i) + 1] - begin;
      float* own_parts = parts.data() + begin * size;
      for (int64_t g = 0; g < layout.group; ++g) {
        join(layout, call.features, own_parts, stretches, g);
        own.store(layout.values(own_parts, g), call.features, call.y.dtype,
                  call.y.at(i / call.kv_heads, i % call.kv_heads * layout.group + g), nullptr);
      }
    }
  });
}

}  // namespace alignvec
