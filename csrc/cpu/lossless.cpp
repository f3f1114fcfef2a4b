// Steps and sums, row by row.
#include "lossless.h"

#include <cstring>

#include "buffer.h"
#include "types.h"

namespace alignvec {

int pack(const uint16_t* base, const uint16_t* aligned, const Packed& packed) {
  const Kernels& kernel = kernels();
  uint16_t* narrow = packed.wide() ? nullptr : static_cast<uint16_t*>(packed.columns);
  int32_t* wide = packed.wide() ? static_cast<int32_t*>(packed.columns) : nullptr;
  int magnitude = 0;
  int64_t at = 0;
  packed.start[0] = 0;
  for (int64_t n = 0; n < packed.rows; ++n) {
    at += kernel.pack_steps(base + n * packed.cols, aligned + n * packed.cols, packed.cols, packed.width,
                            packed.fields + n * packed.row_bytes(), narrow == nullptr ? nullptr : narrow + at,
                            wide == nullptr ? nullptr : wide + at, packed.own + at, &magnitude);
    packed.start[n + 1] = static_cast<int32_t>(at);
  }
  return magnitude;
}

int unpack(const uint16_t* base, const Packed& packed, uint16_t* aligned) {
  const Kernels& kernel = kernels();
  int magnitude = 0;
  for (int64_t n = 0; n < packed.rows; ++n) {
    uint16_t* row = aligned + n * packed.cols;
    kernel.walk_steps(base + n * packed.cols, packed.fields + n * packed.row_bytes(), packed.cols, packed.width, row,
                      &magnitude);
    for (int32_t e = packed.start[n]; e < packed.start[n + 1]; ++e) {
      const int64_t column = packed.wide() ? static_cast<const int32_t*>(packed.columns)[e]
                                           : static_cast<const uint16_t*>(packed.columns)[e];
      if (column < 0 || column >= packed.cols) return 1 << 16;
      row[column] = packed.own[e];
    }
  }
  return magnitude;
}

int sums(const uint16_t* values, int64_t count, bool half, uint64_t* rows, uint64_t* columns) {
  constexpr int64_t ROW = 4 * SUM_WORDS;
  const Kernels& kernel = kernels();
  const int64_t whole = (count + ROW - 1) / ROW;
  Buffer<uint16_t> padded(count % ROW ? ROW : 0), rounded(half ? ROW : 0);
  std::memset(columns, 0, 2 * SUM_WORDS * sizeof(uint64_t));
  for (int64_t n = 0; n < whole; ++n) {
    const uint16_t* row = values + n * ROW;
    if (n == count / ROW) {
      std::memcpy(padded.data(), row, static_cast<size_t>(count % ROW) * sizeof(uint16_t));
      row = padded.data();
    }
    if (half) {
      kernel.half_to_bf16(row, ROW, rounded.data());
      rows[n] = kernel.sum_words(rounded.data(), columns);
      rows[whole + n] = kernel.sum_words(row, columns + SUM_WORDS);
    } else {
      rows[n] = kernel.sum_words(row, columns);
      rows[whole + n] = rows[n] + kernel.narrow_words(row, columns + SUM_WORDS);
    }
  }
  for (int64_t j = 0; !half && j < SUM_WORDS; ++j) columns[SUM_WORDS + j] += columns[j];
  return kernel.magnitude(values, count);
}

}  // namespace alignvec
