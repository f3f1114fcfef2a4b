#include "../grid.h"

#include <cstdlib>

#include "run.h"

namespace alignvec::cuda {

Device device_facts() { return {132, 228 << 10, 227 << 10}; }  // an H200's

const char* start(const Plan& plan, void*, bool) {
  const Kernel kernel = kernel_of(plan.format, plan.tiles, plan.vectors);
  const bool backwards = std::getenv("ALIGNVEC_EMULATE_BACKWARDS") != nullptr;
  emulator::run(plan.blocks, plan.threads, plan.shared_bytes, backwards, [&] { kernel(plan.launch); });
  return nullptr;
}

}  // namespace alignvec::cuda
