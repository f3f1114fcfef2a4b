// Runs a grid on the calling thread, block after block.
#pragma once

#include <functional>

namespace alignvec::emulator {

// backwards: later threads of a block run first. `shared` bytes begin as NaN in every block.
void run(int blocks, int threads, int shared, bool backwards, const std::function<void()>& kernel);

}  // namespace alignvec::emulator
