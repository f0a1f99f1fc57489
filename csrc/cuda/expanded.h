// The kernels that begin with a pointwise convolution, as the host functions of rooms bsconv and mbconv launch them.
// Like kernels.h: everything on the stream, nothing allocated.
#pragma once

#include "csrc/cuda/kernels.h"

namespace effops::cuda {

// bsconv_forward.cu: pointwise -> depthwise; args.mid is left aside. Whether shared memory has room for the patch of
// the expanded map under a pixel:
bool expands_on_chip(DType dtype, const DepthwiseGeometry& g, const Device& device);
// `sums`, where it is not null: of the result over parts of an image's pixels, [N][parts_of_image][K] of the compute
// type.
int parts_of_image(DType dtype, const DepthwiseGeometry& g, const Device& device);
void expanded_depthwise(DType dtype, const BsconvForwardArgs& args, void* sums, const Device& device, Stream stream);

// mbconv_forward.cu: pointwise -> depthwise -> pointwise. Whether one kernel is the way to go:
bool pays_in_one_kernel(DType dtype, const MbconvForwardArgs& args, const Device& device);
void expanded_separable(DType dtype, const MbconvForwardArgs& args, const Device& device, Stream stream);

// The two halves of an inverted residual without a squeeze-excite, as rooms bsconv and dsconv have them.
inline PointwiseRef expansion_of(const MbconvForwardArgs& args) {
  const MatrixRef& m = args.expand;
  return {m.data, m.stride_out, m.stride_in, args.in_channels, args.g.C, args.expand_epilogue};
}
inline DsconvForwardArgs after_expansion(const MbconvForwardArgs& args) {
  DsconvForwardArgs rest{};
  rest.g = args.g;
  rest.K = args.K;
  rest.input = args.input;
  rest.output = args.output;
  rest.dw_weight = args.dw_weight;
  rest.dw_epilogue = args.dw_epilogue;
  rest.pw_weight = args.project.data;
  rest.pw_stride_k = args.project.stride_out;
  rest.pw_stride_c = args.project.stride_in;
  rest.pw_epilogue = args.epilogue;
  return rest;
}

}  // namespace effops::cuda
