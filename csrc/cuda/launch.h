// Launches of kernels: the host functions of the rooms go through `launch` and nothing else.
#pragma once

#include <source_location>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "csrc/cuda/kernels.h"
#include "csrc/cuda/platform.h"

namespace effops::cuda {

// How many blocks of how many threads, and their dynamic shared memory.
struct Shape {
  dim3 grid;
  dim3 block;
  std::size_t shared_bytes = 0;
};

#ifdef EFFOPS_CUDA_HOST

template <class Params>
void launch(void (*kernel)(Params), const Shape& shape, Stream, const std::type_identity_t<Params>& params,
            std::source_location where = std::source_location::current()) {
  cuda_host::launch(kernel, shape.grid, shape.block, shape.shared_bytes, params, where);
}

#else

namespace detail {

inline void check(cudaError_t error, const std::source_location& where) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(std::string("effops: a CUDA kernel could not be launched: ") + cudaGetErrorString(error) +
                           " (" + where.file_name() + ":" + std::to_string(where.line()) + ")");
}

}  // namespace detail

// Starts `kernel`, an EFFOPS_KERNEL of one struct, on the stream and does not wait. What went wrong before on the device
// shows here too, as with every launch.
template <class Params>
void launch(void (*kernel)(Params), const Shape& shape, Stream stream, const std::type_identity_t<Params>& params,
            std::source_location where = std::source_location::current()) {
  static_assert(std::is_trivially_copyable_v<Params> && sizeof(Params) <= 4096);
  constexpr std::size_t kWithoutAsking = 48 * 1024;
  if (shape.shared_bytes > kWithoutAsking) {
    detail::check(
        cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(shape.shared_bytes)),
        where);
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = shape.grid;
  config.blockDim = shape.block;
  config.dynamicSmemBytes = shape.shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  detail::check(cudaLaunchKernelEx(&config, kernel, params), where);
  detail::check(cudaGetLastError(), where);
}

#endif

}  // namespace effops::cuda
