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
std::size_t bsconv_fwd_scratch(DType dtype, const BsconvForwardArgs& args, const Device& device);
std::size_t bsconv_bwd_scratch(DType dtype, const BsconvBackwardArgs& args, const Device& device);
std::size_t mbconv_fwd_scratch(DType dtype, const MbconvForwardArgs& args, const Device& device);
std::size_t mbconv_bwd_scratch(DType dtype, const MbconvBackwardArgs& args, const Device& device);
std::size_t se_fwd_scratch(DType dtype, const SeForwardArgs& args, const Device& device);
std::size_t se_bwd_scratch(DType dtype, const SeBackwardArgs& args, const Device& device);
std::size_t sepconv_bwd_scratch(DType dtype, const SepconvBackwardArgs& args, const Device& device);

void dwconv_fwd(DType dtype, const DwconvForwardArgs& args, const Device& device, Stream stream);
void dwconv_bwd(DType dtype, const DwconvBackwardArgs& args, const Device& device, void* scratch, Stream stream);
void dwconv_stats(DType dtype, const DwconvStatsArgs& args, const Device& device, void* scratch, Stream stream);
void dwconv_stats_bwd(DType dtype, const DwconvStatsBackwardArgs& args, const Device& device, void* scratch,
                      Stream stream);

void dsconv_fwd(DType dtype, const DsconvForwardArgs& args, const Device& device, Stream stream);
void dsconv_bwd(DType dtype, const DsconvBackwardArgs& args, const Device& device, void* scratch, Stream stream);

void bsconv_fwd(DType dtype, const BsconvForwardArgs& args, const Device& device, void* scratch, Stream stream);
void bsconv_bwd(DType dtype, const BsconvBackwardArgs& args, const Device& device, void* scratch, Stream stream);

void mbconv_fwd(DType dtype, const MbconvForwardArgs& args, const Device& device, void* scratch, Stream stream);
void mbconv_bwd(DType dtype, const MbconvBackwardArgs& args, const Device& device, void* scratch, Stream stream);

void se_fwd(DType dtype, const SeForwardArgs& args, const Device& device, void* scratch, Stream stream);
void se_bwd(DType dtype, const SeBackwardArgs& args, const Device& device, void* scratch, Stream stream);

void blur_max_pool_fwd(DType dtype, const BlurMaxPoolArgs& args, const Device& device, Stream stream);
void blur_max_pool_bwd(DType dtype, const BlurMaxPoolArgs& args, const Device& device, Stream stream);

void sepconv_fwd(DType dtype, const SepconvForwardArgs& args, const Device& device, Stream stream);
void sepconv_bwd(DType dtype, const SepconvBackwardArgs& args, const Device& device, void* scratch, Stream stream);

}  // namespace effops::cuda
