#include "grid.h"

#include <cuda_runtime.h>

namespace alignvec::cuda {

Device device_facts() {
  int device = 0;
  Device facts{};
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&facts.multiprocessors, cudaDevAttrMultiProcessorCount, device);
  cudaDeviceGetAttribute(&facts.shared, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device);
  cudaDeviceGetAttribute(&facts.block_shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  return facts;
}

const char* start(const Plan& plan, void* stream, bool dependent) {
  const Kernel kernel = kernel_of(plan.format, plan.tiles, plan.vectors);
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, plan.shared_bytes);
  if (error != cudaSuccess) return cudaGetErrorString(error);
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(plan.blocks));
  config.blockDim = dim3(static_cast<unsigned>(plan.threads));
  config.dynamicSmemBytes = static_cast<size_t>(plan.shared_bytes);
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &attribute;
  config.numAttrs = dependent ? 1 : 0;
  error = cudaLaunchKernelEx(&config, kernel, plan.launch);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace alignvec::cuda
