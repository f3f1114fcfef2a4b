// The linear operator: y[m] = x[m] W^T + b + sum_i c[m, i] (x[m] D_i^T + b_i).
#pragma once

#include <vector>

#include "coefficients.h"
#include "parallel.h"
#include "types.h"

namespace alignvec {

struct Linear {
  int64_t tokens = 0;
  int64_t out = 0;
  int64_t in = 0;
  Matrix x;            // [tokens, in]
  Matrix weight;       // [out, in]
  Matrix bias;         // one row, or null
  Matrix bias_deltas;  // [vectors, out], or null
  std::vector<Operand> operands;
  Table table;
  int64_t combine_tokens = 0;  // tokens a mix from which mixes are formed, on average
  bool merged = false;         // combine rounds each mix to the weight's dtype, as a stored merge would
  Matrix y;                    // [tokens, out], written
};

void linear(const Linear& call, Loop loop);

}  // namespace alignvec
