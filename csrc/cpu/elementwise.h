// Everything but products: a mix written out, embedding lookups, norms.
#pragma once

#include <vector>

#include "coefficients.h"
#include "parallel.h"
#include "types.h"

namespace alignvec {

// out[n] = round(W[n] + sum_i c_i D_i[n]) with row 0 of the table; low, unless it is null, takes the rest. Reads every
// weight and delta once and writes out once.
struct Materialise {
  int64_t out = 0;
  int64_t in = 0;
  Matrix weight;
  std::vector<Operand> operands;
  Table table;
  Matrix mix;
  Matrix low;
};

void materialise(const Materialise& call, Loop loop);

// y[t] = E[ids[t]] + sum_i c[t, i] D_i[ids[t]].
struct Embedding {
  int64_t tokens = 0;
  int64_t dim = 0;
  const int64_t* ids = nullptr;
  Matrix weight;
  std::vector<Operand> operands;
  Table table;
  Matrix y;
};

void embedding(const Embedding& call, Loop loop);

// y[m] = (x[m] - mean) / sqrt(mean((x[m] - mean)^2) + eps) (offset + w + sum_i c[m, i] d_i) + b + sum_i c[m, i] b_i;
// without `centre` the mean is taken for 0. weight, bias and their deltas [vectors, features] may be null; a residual
// that is not gets x added, rounded, and is what the norm is of.
struct Norm {
  int64_t tokens = 0;
  int64_t features = 0;
  Matrix x;
  Matrix residual;
  Matrix weight;
  Matrix bias;
  Matrix deltas;
  Matrix bias_deltas;
  Table table;
  float eps = 0;
  float offset = 0;
  bool centre = false;
  Matrix y;
};

void norm(const Norm& call, Loop loop);

}  // namespace alignvec
