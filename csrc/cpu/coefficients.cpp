#include "coefficients.h"

#include <algorithm>
#include <limits>

namespace alignvec {

Coefficients coefficients(const Table& table, int64_t tokens) {
  Coefficients made;
  const int64_t k = made.vectors = table.vectors;
  const bool fits = table.token_rows != nullptr || (table.rows > 0 && tokens % table.rows == 0);
  made.values.assign(static_cast<size_t>(tokens * k), std::numeric_limits<float>::quiet_NaN());
  std::vector<bool> used(static_cast<size_t>(k), !fits);
  for (int64_t m = 0; fits && m < tokens; ++m) {
    const int64_t row = table.token_rows != nullptr ? table.token_rows[m] : m * table.rows / tokens;
    float* own = made.values.data() + m * k;
    for (int64_t i = 0; i < k; ++i) {
      own[i] = table.data[row * table.stride + table.columns[i]];
      if (own[i] != 0) used[static_cast<size_t>(i)] = true;
    }
    if (m > 0 && std::equal(own, own + k, own - k)) {
      made.runs.back().last = m + 1;
    } else {
      made.runs.push_back({m, m + 1});
    }
  }
  for (int64_t i = 0; i < k; ++i)
    if (used[static_cast<size_t>(i)]) made.used.push_back(i);
  return made;
}

}  // namespace alignvec
