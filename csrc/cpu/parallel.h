// How work is spread over threads: whoever binds the kernels to a framework passes its own loop.
#pragma once

#include <cstdint>

namespace alignvec {

// Calls body(first, last, context) on stretches of [0, count) of at least `grain`, in parallel.
using Loop = void (*)(int64_t count, int64_t grain, void (*body)(int64_t, int64_t, void*), void* context);

template <typename Body>
void parallel(Loop loop, int64_t count, int64_t grain, const Body& body) {
  auto call = [](int64_t first, int64_t last, void* context) { (*static_cast<const Body*>(context))(first, last); };
  loop(count, grain, call, const_cast<void*>(static_cast<const void*>(&body)));
}

}  // namespace alignvec
