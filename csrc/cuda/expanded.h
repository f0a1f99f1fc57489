// The kernels that begin with a pointwise convolution, as the host functions of rooms bsconv and mbconv launch them.
// Like kernels.h: everything on the stream, nothing allocated.
#pragma once

#include "csrc/cuda/kernels.h"

namespace effops::cuda {

// bsconv_forward.cu: pointwise -> depthwise; args.mid is left aside. Whether shared memory has room for the patch of
// the expanded map under a pixel:
bool expands_on_chip(DType dtype, const DepthwiseGeometry& g, const Device& device);
void expanded_depthwise(DType dtype, const BsconvForwardArgs& args, const Device& device, Stream stream);

// mbconv_forward.cu: pointwise -> depthwise -> pointwise. Whether one kernel is the way to go:
bool pays_in_one_kernel(DType dtype, const MbconvForwardArgs& args, const Device& device);
void expanded_separable(DType dtype, const MbconvForwardArgs& args, const Device& device, Stream stream);

}  // namespace effops::cuda
