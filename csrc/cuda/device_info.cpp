#include "csrc/cuda/device_info.h"

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace effops::cuda {
namespace {

int attribute(cudaDeviceAttr what, int index) {
  int value = 0;
  const cudaError_t error = cudaDeviceGetAttribute(&value, what, index);
  if (error != cudaSuccess) {
    throw std::runtime_error("effops: GPU " + std::to_string(index) + " cannot be asked: " + cudaGetErrorString(error));
  }
  return value;
}

}  // namespace

Device device_info(int index) {
  const int capability =
      10 * attribute(cudaDevAttrComputeCapabilityMajor, index) + attribute(cudaDevAttrComputeCapabilityMinor, index);
  if (capability < 80) {
    throw std::runtime_error("effops: the CUDA kernels need compute capability 8.0 or newer, GPU " +
                             std::to_string(index) + " has " + std::to_string(capability / 10) + "." +
                             std::to_string(capability % 10));
  }
  return {attribute(cudaDevAttrMultiProcessorCount, index), attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, index),
          capability};
}

}  // namespace effops::cuda
