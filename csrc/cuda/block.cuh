// A block's sums over its streams: fragments of weights, x and codes from the ring to the tensor cores.
#pragma once

#include "fields.cuh"

namespace alignvec::cuda {

// How a launch's coded vectors are stored. kFlush: planes after which a scale meets the sum, 0 for one scale a row.
template <int kBitsOfField, int kPlanesOfScale, bool kStepsOfBase, int kMostVectors>
struct Storage {
  static constexpr int kBits = kBitsOfField, kFlush = kPlanesOfScale, kVectors = kMostVectors;
  static constexpr bool kLossless = kStepsOfBase;
};

// Where a stream is, in inputs and in slots of the ring.
struct Cursor {
  int stream = 0, input = 0, slot = 0, word_slot = -1;

  // Called at a stage: words' chunks begin with it, or it is in one.
  ALIGNVEC_DEVICE bool begins_chunk(int chunk_log2) const {
    return (input & ((chunk_log2 > kInputsLog2 ? 1 << chunk_log2 : kInputs) - 1)) == 0;
  }
  ALIGNVEC_DEVICE void next_word_slot(int stages) { word_slot = word_slot + 1 == stages ? 0 : word_slot + 1; }
  ALIGNVEC_DEVICE void next(int in_features, int stages) {
    slot = slot + 1 == stages ? 0 : slot + 1;
    input += kInputs;
    if (input >= in_features) {
      input = 0;
      ++stream;
    }
  }
};

ALIGNVEC_DEVICE float read(const void* values, bool wide, int64_t at) {
  return wide ? static_cast<const float*>(values)[at] : to_float(static_cast<const uint16_t*>(values)[at]);
}

template <class F, int kTiles>
struct Block {
  using Ring = cuda::Ring<F::kBits, 16 * kTiles>;
  static constexpr int kSums = F::kVectors ? F::kVectors : 1;

  const Launch& launch;
  const Entry& entry;
  const Mix& mix;
  Ring ring;
  int tile, slice, g, t;
  int rows[2];  // of the layer: g, g + 8
  Cursor writes, reads;
  float total[kTiles][4], base[kTiles][4], sums[kSums][kTiles][4];

  ALIGNVEC_DEVICE Block(const Launch& l, const Entry& e, const Mix& m, unsigned char* memory)
      : launch(l), entry(e), mix(m), ring{l, e, memory, (block_index() - e.first_block) * 16 * kTiles} {
    const int warp = thread_index() / 32, lane = thread_index() % 32;
    tile = warp / kWarps;
    slice = warp % kWarps;
    g = lane / 4;
    t = lane % 4;
    rows[0] = ring.row(16 * tile + g);
    rows[1] = ring.row(16 * tile + g + 8);
    clear(total);
  }

  static ALIGNVEC_DEVICE void clear(float (&sum)[kTiles][4]) {
#pragma unroll
    for (auto& part : sum)
#pragma unroll
      for (float& value : part) value = 0.0f;
  }

  ALIGNVEC_DEVICE const Vector& coded(const Stream& stream, int j) const {
    return entry.vectors[mix.order[stream.first + j]];
  }

  // Begins the copies of the next stage, if there is one, as a group of their own. early: stages whose weights
  // were begun before.
  ALIGNVEC_DEVICE void fill(int early = 0) {
    if (writes.stream < mix.count) {
      const Stream& stream = mix.streams[writes.stream];
      const bool begun = writes.stream == 0 && writes.input < early * kInputs;
      if (stream.weight && !begun) ring.copy_weights(writes.slot, stream.weight, stream.stride, writes.input);
      ring.copy_x(writes.slot, writes.input);
      if (F::kVectors && stream.count && writes.begins_chunk(coded(stream, 0).width_log2 + kPlanesLog2<F::kBits>)) {
        writes.next_word_slot(launch.stages);
        for (int j = 0; j < stream.count; ++j) ring.copy_words(writes.word_slot, j, coded(stream, j), writes.input);
      }
      writes.next(launch.in_features, launch.stages);
    }
    copy_commit();
  }

  ALIGNVEC_DEVICE void wait() const {
    if (launch.stages == 2)
      copy_wait<0>();
    else if (launch.stages == 3)
      copy_wait<1>();
    else
      copy_wait<2>();
    block_barrier();
  }

  // All stages of a stream, whose sums then meet their coefficients.
  ALIGNVEC_DEVICE void run(const Stream& stream) {
    clear(base);
#pragma unroll
    for (auto& sum : sums) clear(sum);
    const int width_log2 = F::kVectors && stream.count ? coded(stream, 0).width_log2 : 6;
    for (int input = 0; input < launch.in_features; input += kInputs) {
      wait();
      fill();
      if (F::kVectors && stream.count && reads.begins_chunk(width_log2 + kPlanesLog2<F::kBits>))
        reads.next_word_slot(launch.stages);
      multiply(stream, width_log2);
      reads.next(launch.in_features, launch.stages);
    }
    add_up(stream);
  }

  // A stage: piece i of this warp are the inputs from (i + 8 eighth) width + column.
  ALIGNVEC_DEVICE void multiply(const Stream& stream, int width_log2) {
    const int slices_log2 = width_log2 - 4, width = 1 << width_log2;
    const int eighth = slice >> slices_log2, column = (slice & ((1 << slices_log2) - 1)) * 16;
    const int first = (eighth << (3 + width_log2)) + column;
    const unsigned char* stage = ring.stage(reads.slot) + first * 2;
    const int lane = thread_index() % 32;

    X x;
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
      // Tokens past the last one repeat it; a column of the product depends on no other.
      const int token = 8 * m + lane % 8 < launch.tokens ? 8 * m + lane % 8 : launch.tokens - 1;
      const unsigned char* at =
          stage + Ring::kX + token * kPitch + lane / 8 % 2 * 16 + ((lane / 16) << (width_log2 + 1));
#pragma unroll
      for (int i = 0; i < kPieces; i += 2) load_matrices(x[i / 2][m], at + (i << (width_log2 + 1)));
    }

    uint32_t counts[F::kLossless ? kPieces : 1][4];
    if (stream.weight) {
      const unsigned char* at = stage + (16 * tile + lane % 16) * kPitch + lane / 16 * 16;
      float odd[kTiles][4];
      clear(odd);
#pragma unroll
      for (int i = 0; i < kPieces; ++i) {
        uint32_t a[4];
        load_matrices(a, at + (i << (width_log2 + 1)));
        multiply_piece(i % 2 ? odd : base, a, x, i);
        if constexpr (F::kLossless)
#pragma unroll
          for (int r = 0; r < 4; ++r) counts[i][r] = counted<F::kBits>(a[r]);
      }
      add(base, odd);
    }

    if constexpr (F::kVectors > 0) {
      constexpr int kPlanes = kPlanesLog2<F::kBits>;
      const int plane = ((reads.input >> width_log2) + 8 * eighth) & ((1 << kPlanes) - 1);
      const int begin = (8 * eighth >> kPlanes) << width_log2;  // this warp's chunk in the slot
      const int unit = (begin + column) / 4 + t / 2;
      const int row = (16 * tile + g) * kWordPitch<F::kBits>;
#pragma unroll
      for (int j = 0; j < F::kVectors; ++j) {
        if (j >= stream.count) break;
        Fields<F::kBits> fields;
        fields.load(ring.words(reads.word_slot, j) + row + t % 2 * 8, g, unit, width, plane);
        if constexpr (F::kLossless)  // the aligned weights' product: the base's is subtracted at the end
          dot(sums[j], x, [&](int i, int r) { return uncounted(counts[i][r] + fields.field(i, r)); });
        else if constexpr (F::kFlush == 0)
          dot(sums[j], x, [&](int i, int r) { return fields.code(i, r); });
        else
          grouped(sums[j], fields, x, coded(stream, j), reads.input + first, width_log2);
      }
    }
  }

  using X = uint32_t[kPieces / 2][kTiles][4];  // fragments of two pieces each

  static ALIGNVEC_DEVICE void multiply_piece(float (&sum)[kTiles][4], const uint32_t (&a)[4], const X& x, int i) {
#pragma unroll
    for (int m = 0; m < kTiles; ++m) multiply_add(sum[m], a, &x[i / 2][m][i % 2 * 2]);
  }

  static ALIGNVEC_DEVICE void add(float (&sum)[kTiles][4], const float (&part)[kTiles][4]) {
#pragma unroll
    for (int m = 0; m < kTiles; ++m)
#pragma unroll
      for (int r = 0; r < 4; ++r) sum[m][r] += part[m][r];
  }

  // Of all pieces. Every other one goes to a sum of its own: products that wait for each other's sums are half as many.
  template <class A>
  static ALIGNVEC_DEVICE void dot(float (&sum)[kTiles][4], const X& x, const A& operand) {
    float odd[kTiles][4];
    clear(odd);
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      uint32_t a[4];
#pragma unroll
      for (int r = 0; r < 4; ++r) a[r] = operand(i, r);
      multiply_piece(i % 2 ? odd : sum, a, x, i);
    }
    add(sum, odd);
  }

  // Scales of groups of kFlush planes or more meet the sum of every kFlush planes.
  ALIGNVEC_DEVICE void grouped(float (&sum)[kTiles][4], const Fields<F::kBits>& fields, const X& x,
                               const Vector& vector, int input, int width_log2) const {
    constexpr int kFlush = F::kFlush ? F::kFlush : 1;
    const auto* scales = static_cast<const uint16_t*>(vector.scales);
    float scale[kPieces / kFlush][2];
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int i = 0; i < kPieces / kFlush; ++i) {
        const int group = (input + (i * kFlush << width_log2)) >> vector.group_log2;
        // Scales are less than 2^31: an address is one multiplication.
        const uint32_t at = rows[half] * vector.groups + (group < vector.groups ? group : vector.groups - 1);
        scale[i][half] = to_float(scales[at]);
      }
#pragma unroll
    for (int i = 0; i < kPieces; i += kFlush) {
      float part[kTiles][4];
      clear(part);
#pragma unroll
      for (int piece = i; piece < i + kFlush; ++piece) {
        uint32_t a[4];
#pragma unroll
        for (int r = 0; r < 4; ++r) a[r] = fields.code(piece, r);
        multiply_piece(part, a, x, piece);
      }
#pragma unroll
      for (int m = 0; m < kTiles; ++m)
#pragma unroll
        for (int r = 0; r < 4; ++r) sum[m][r] += scale[i / kFlush][r / 2] * part[m][r];
    }
  }

  // Sum r of a fragment is that of output g + 8 (r / 2) and token 2 t + r % 2.
  ALIGNVEC_DEVICE void add_up(const Stream& stream) {
#pragma unroll
    for (int m = 0; m < kTiles; ++m)
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const int token = 8 * m + 2 * t + r % 2;
        if (stream.term == kBase) total[m][r] += base[m][r];
        if (stream.term >= 0) total[m][r] = weighted(mix.coefficient[stream.term][token], base[m][r], total[m][r]);
        if constexpr (F::kVectors > 0) {
#pragma unroll
          for (int j = 0; j < F::kVectors; ++j) {
            if (j >= stream.count) break;
            float edit = sums[j][m][r];
            if (F::kLossless)
              edit -= base[m][r];
            else
              edit *= Fields<F::kBits>::code_unit();
            if (!F::kLossless && F::kFlush == 0)
              edit *= read(coded(stream, j).scales, coded(stream, j).wide_scales, rows[r / 2]);
            total[m][r] = weighted(mix.coefficient[mix.order[stream.first + j]][token], edit, total[m][r]);
          }
        }
      }
  }
};

}  // namespace alignvec::cuda
