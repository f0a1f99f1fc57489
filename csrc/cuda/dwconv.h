// The gradients of the depthwise convolution, as dwconv_bwd and dsconv_bwd launch them. Like kernels.h: everything on
// the stream, nothing allocated. `du` is d loss / d sums, [N, D, P, Q], of the maps' dtype or, for maps of 16 bits,
// float32.
#pragma once

#include "csrc/cuda/kernels.h"

namespace effops::cuda {

struct Gradient {
  TensorRef map;
  DType dtype;
};

// grad_input [N, C, H, W], every element of it.
void depthwise_input_gradient(DType dtype, const DepthwiseGeometry& g, const Gradient& du, const void* weight,
                              const TensorRef& grad_input, const Device& device, Stream stream);

// The same as a convolution of du by the taps turned by half a turn, which it is at stride 1. False: nothing was done,
// the forward kernels do not know the window.
bool depthwise_turned(DType dtype, const DepthwiseGeometry& g, const Gradient& du, const void* weight,
                      const TensorRef& grad_input, const Device& device, Stream stream);

// grad_weight [bank, R, S], contiguous, of dtype `dtype`. scratch: as many bytes, for the same arguments.
std::size_t depthwise_weight_gradient_scratch(DType dtype, const DepthwiseGeometry& g, const Gradient& du,
                                              const TensorRef& input, const Device& device);
void depthwise_weight_gradient(DType dtype, const DepthwiseGeometry& g, const Gradient& du, const TensorRef& input,
                               void* grad_weight, const Device& device, void* scratch, Stream stream);

// The same for an input of dtype `dtype` and a gradient of dtype `weight_dtype`.
void depthwise_weight_gradient_as(DType weight_dtype, DType dtype, const DepthwiseGeometry& g, const Gradient& du,
                                  const TensorRef& input, void* grad_weight, const Device& device, void* scratch,
                                  Stream stream);

}  // namespace effops::cuda
