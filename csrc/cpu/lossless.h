// Lossless deltas as files hold them, and the sums that checksums are made of: what alignvec/formats/steps.py and
// alignvec/sums.py do in plain torch. One thread: whoever calls has threads of its own.
#pragma once

#include <cstdint>

namespace alignvec {

// A matrix's steps in fields of `width` bits, rows of whole bytes, and those that fit none in a table beside them.
// `start` says where a row's entries begin; columns are 32 bits wide where there are more than 2^16 of them.
struct Packed {
  int64_t rows = 0;
  int64_t cols = 0;
  int width = 0;
  uint8_t* fields = nullptr;
  int32_t* start = nullptr;
  void* columns = nullptr;
  uint16_t* own = nullptr;

  int64_t row_bytes() const { return (cols * width + 7) / 8; }
  bool wide() const { return cols > int64_t{1} << 16; }
};

// Both give the magnitude of the largest value of either side, as bits: that of infinity or NaN is larger than any,
// and so is what `unpack` gives for a column that the rows do not have.
int pack(const uint16_t* base, const uint16_t* aligned, const Packed& packed);
int unpack(const uint16_t* base, const Packed& packed, uint16_t* aligned);

// Sums of whole rows, the last one padded with zeros, into rows[2][...] and columns[2][SUM_WORDS]: of the values as
// bfloat16, and of what float16 has for them (of float16 values: of their bits). Gives the largest magnitude, as bits;
// of float16 values that are not finite the sums are not right.
int sums(const uint16_t* values, int64_t count, bool half, uint64_t* rows, uint64_t* columns);

}  // namespace alignvec
