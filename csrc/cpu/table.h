// The table of an instruction set whose registers hold N floats.
#pragma once

#include "attend.h"
#include "dots.h"
#include "halves.h"
#include "rows.h"
#include "steps.h"

namespace alignvec {
namespace {

inline bool reads_f32(const Operand&) { return false; }

template <int N>
constexpr Kernels table(const char* name) {
  return {name,         reads_f32,          dots_f32<N>,     nullptr,        mix_dense<N>,  load_row<N>,
          add_row<N>,   store_row<N>,       stream_row<N>,   scale_row<N>,   moments<N>,    rotate<N>,
          gate<N>,      weigh<N>,           add_values<N>,   count_steps<N>, pack_steps<N>, walk_steps<N>,
          sum_words<N>, narrow_words_of<N>, magnitude_of<N>, half_to_bf16<N>};
}

}  // namespace
}  // namespace alignvec
