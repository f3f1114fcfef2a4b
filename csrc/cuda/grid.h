// Starting a planned launch, on a GPU (grid.cu) or on the emulator.
#pragma once

#include "plan.h"

namespace alignvec::cuda {

// Of the current device.
Device device_facts();

// On `stream`, a cudaStream_t. dependent: the grid may start before the one ahead of it in the stream has ended, for
// whose results it waits. Returns null, or why it could not start.
const char* start(const Plan& plan, void* stream, bool dependent);

}  // namespace alignvec::cuda
