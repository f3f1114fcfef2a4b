// The coefficients of every token, by the row rule of kernels/reference.py, and the stretches of tokens that share a
// mix.
#pragma once

#include <cstdint>
#include <vector>

namespace alignvec {

// The live table [rows, n_vectors] and the column of each vector; token_rows [tokens] is null for the row rule.
struct Table {
  const float* data = nullptr;
  int64_t stride = 0;
  int64_t rows = 1;
  const int32_t* columns = nullptr;
  int64_t vectors = 0;
  const int32_t* token_rows = nullptr;
};

struct Run {
  int64_t first;
  int64_t last;
};

struct Coefficients {
  int64_t vectors = 0;
  std::vector<float> values;  // [tokens, vectors]
  std::vector<int64_t> used;  // vectors that some token takes
  std::vector<Run> runs;      // empty where the rows do not divide the tokens

  const float* of(int64_t token) const { return values.data() + token * vectors; }
};

// All NaN where the rows do not divide the tokens.
Coefficients coefficients(const Table& table, int64_t tokens);

}  // namespace alignvec
