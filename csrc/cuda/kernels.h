// The host functions of the CUDA kernels, as the bindings and the host run call them. They launch on the given stream,
// allocate nothing and wait for nothing, so a CUDA graph can capture them. Errors of a launch are std::runtime_error.
#pragma once

#include <cstddef>

#include "csrc/args.h"

namespace effops::cuda {

using Stream = void*;  // a cudaStream_t

// What the tiles are chosen by.
struct Device {
  int processors;    // multiprocessors
  int shared_bytes;  // shared memory that one block may ask for
  int capability;    // 80, 90, 100
};

// Bytes of scratch that the call needs; the caller allocates them, aligned to 256 bytes, and they are free again once
// what was launched is done.
std::size_t dwconv_bwd_scratch(DType dtype, const DwconvBackwardArgs& args, const Device& device);
std::size_t dwconv_stats_scratch(DType dtype, const DwconvStatsArgs& args, const Device& device);
std::size_t dwconv_stats_bwd_scratch(DType dtype, const DwconvStatsBackwardArgs& args, const Device& device);
std::size_t dsconv_bwd_scratch(DType dtype, const DsconvBackwardArgs& args, const Device& device);

void dwconv_fwd(DType dtype, const DwconvForwardArgs& args, const Device& device, Stream stream);
void dwconv_bwd(DType dtype, const DwconvBackwardArgs& args, const Device& device, void* scratch, Stream stream);
void dwconv_stats(DType dtype, const DwconvStatsArgs& args, const Device& device, void* scratch, Stream stream);
void dwconv_stats_bwd(DType dtype, const DwconvStatsBackwardArgs& args, const Device& device, void* scratch,
                      Stream stream);

void dsconv_fwd(DType dtype, const DsconvForwardArgs& args, const Device& device, Stream stream);
void dsconv_bwd(DType dtype, const DsconvBackwardArgs& args, const Device& device, void* scratch, Stream stream);

// Where args.parts are there, those three are these.
std::size_t dsconv_parts_bwd_scratch(DType dtype, const DsconvBackwardArgs& args, const Device& device);
void dsconv_parts_fwd(DType dtype, const DsconvForwardArgs& args, const Device& device, Stream stream);
void dsconv_parts_bwd(DType dtype, const DsconvBackwardArgs& args, const Device& device, void* scratch, Stream stream);

}  // namespace effops::cuda
