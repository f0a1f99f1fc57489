// What differs between nvcc and the host run. Kernel sources are compiled twice: by nvcc for a device, and by a plain C++
// compiler with EFFOPS_CUDA_HOST, where tests/cuda_host/shim.h plays the device. They use the words below, and the
// primitives of device.h, in place of CUDA's own; threadIdx, blockIdx, blockDim, gridDim and dim3 are as in CUDA.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>

#ifdef EFFOPS_CUDA_HOST

#include "tests/cuda_host/shim.h"

#define EFFOPS_DEVICE inline
#define EFFOPS_HOST_DEVICE inline
#define EFFOPS_KERNEL(threads, blocks) void
#define EFFOPS_PARAMS const
#define EFFOPS_UNROLL
#define EFFOPS_NO_UNROLL

#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

// A function of kernels; one of kernels and the host (constexpr goes with either).
#define EFFOPS_DEVICE __device__ __forceinline__
#define EFFOPS_HOST_DEVICE __host__ __device__ __forceinline__
// EFFOPS_KERNEL(128, 4) name(EFFOPS_PARAMS Params params): launched with at most 128 threads a block, of which at least 4
// blocks shall fit a multiprocessor. One plain struct of parameters, which stays in constant memory.
#define EFFOPS_KERNEL(threads, blocks) __global__ void __launch_bounds__(threads, blocks)
#define EFFOPS_PARAMS const __grid_constant__
// Before a loop.
#define EFFOPS_UNROLL _Pragma("unroll")
#define EFFOPS_NO_UNROLL _Pragma("unroll 1")

#endif

namespace effops::cuda {

constexpr int kWarp = 32;

// 16-bit storage; arithmetic is done in float (to_float, from_float in device.h).
struct half_t {
  std::uint16_t bits;
};
struct bfloat16_t {
  std::uint16_t bits;
};

}  // namespace effops::cuda
