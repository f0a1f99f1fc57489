// A pointwise convolution as a call of room dsconv without depthwise channels.
//
//   x [N, C, H, W] --passed through--> z = x --matrix, epilogue--> y [N, K, H, W]
//
// Where the pixels of all maps lie evenly spaced (dense channels_last maps throughout the batch, NCHW ones an image at
// a time) they are told to the kernels as one row: no box of 64 pixels ends early because a row or an image does. At
// 7x7 that is 64 of 64 pixels of a product instead of 49.
//
// Bytes a pixel of 16-bit maps: 2 (C + K). Calculated for float16, channels_last, batch 128, on an H200 (4.3 TB/s,
// 132 processors at 1.75 GHz), nothing measured: 56 x 56, 24 -> 144 channels 135 MB, 31 us; 7 x 7, 960 -> 160 channels
// 14 MB, 3.3 us. Unverified on a device.
#include "csrc/cuda/pointwise.h"

#include <initializer_list>
#include <limits>

namespace effops::cuda {
namespace {

struct Extent {
  index_t N, H, W;
};

// The pixels as few rows as `maps` allow.
Extent join_rows(Extent e, std::initializer_list<TensorRef> maps) {
  bool rows = true, images = true;
  for (const TensorRef& map : maps) {
    if (map.data == nullptr) continue;
    rows = rows && (e.H == 1 || map.h == e.W * map.w);
    images = images && (e.N == 1 || map.n == e.H * e.W * map.w);
  }
  constexpr index_t kLongest = std::numeric_limits<int>::max() / 4;  // sums of sizes stay below 2^31
  if (rows && e.H * e.W <= kLongest) {
    e = {e.N, 1, e.H * e.W};
    if (images && e.N > 0 && e.N * e.W <= kLongest) e = {1, 1, e.N * e.W};
  }
  return e;
}

DsconvForwardArgs without_depthwise(const PointwiseForwardArgs& args, const Extent& e) {
  DsconvForwardArgs all{};
  DepthwiseGeometry& g = all.g;
  g.N = e.N;
  g.H = g.P = e.H;
  g.W = g.Q = e.W;
  g.R = g.S = g.stride_h = g.stride_w = g.dilation_h = g.dilation_w = g.multiplier = g.bank = 1;
  all.passthrough_channels = args.pw.inputs;
  all.K = args.pw.outputs;
  all.passthrough = args.input;
  all.output = args.output;
  all.pw_weight = args.pw.weight;
  all.pw_stride_k = args.pw.stride_k;
  all.pw_stride_c = args.pw.stride_c;
  all.pw_epilogue = args.pw.epilogue;
  return all;
}

DsconvBackwardArgs without_depthwise(const PointwiseBackwardArgs& args) {
  const PointwiseForwardArgs& f = args.forward;
  const TensorRef& residual = f.pw.epilogue.residual;
  DsconvBackwardArgs all{};
  all.forward = without_depthwise(f, join_rows({f.N, f.H, f.W}, {f.input, f.output, residual, args.grad_output,
                                                                 args.grad_input, args.grads.residual}));
  all.grad_output = args.grad_output;
  all.grad_passthrough = args.grad_input;
  all.grad_pw_weight = args.grad_weight;
  all.pw_grads = args.grads;
  return all;
}

}  // namespace

void pointwise_forward(DType dtype, const PointwiseForwardArgs& args, const Device& device, Stream stream) {
  const Extent extent = join_rows({args.N, args.H, args.W}, {args.input, args.output, args.pw.epilogue.residual});
  dsconv_fwd(dtype, without_depthwise(args, extent), device, stream);
}

std::size_t pointwise_backward_scratch(DType dtype, const PointwiseBackwardArgs& args, const Device& device) {
  return dsconv_bwd_scratch(dtype, without_depthwise(args), device);
}

void pointwise_backward(DType dtype, const PointwiseBackwardArgs& args, const Device& device, void* scratch,
                        Stream stream) {
  dsconv_bwd(dtype, without_depthwise(args), device, scratch, stream);
}

bool tells_derivative(const EpilogueRef& e) {
  const bool monotone = e.activation == Activation::relu || e.activation == Activation::relu6 ||
                        e.activation == Activation::sigmoid || (e.activation == Activation::leaky_relu && e.slope > 0);
  return monotone && e.post == Activation::none && !e.scale.data && !e.shift.data && !e.residual.data;
}

}  // namespace effops::cuda
