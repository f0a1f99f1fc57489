// A pointwise convolution with an epilogue, forward and backward, for the rooms that begin with one. Its kernels are
// room dsconv's: all channels are passed through, none is depthwise. Like kernels.h: everything on the stream, nothing
// allocated.
#pragma once

#include "csrc/cuda/kernels.h"

namespace effops::cuda {

struct PointwiseForwardArgs {
  index_t N, H, W;
  PointwiseRef pw;
  TensorRef input, output;  // [N, pw.inputs, H, W], [N, pw.outputs, H, W]
};

struct PointwiseBackwardArgs {
  PointwiseForwardArgs forward;  // output: saved where it tells the derivative (tells_derivative), or absent
  TensorRef grad_output, grad_input;
  void* grad_weight = nullptr;  // [outputs, inputs] contiguous
  EpilogueGrads grads;
};

void pointwise_forward(DType dtype, const PointwiseForwardArgs& args, const Device& device, Stream stream);

std::size_t pointwise_backward_scratch(DType dtype, const PointwiseBackwardArgs& args, const Device& device);
void pointwise_backward(DType dtype, const PointwiseBackwardArgs& args, const Device& device, void* scratch,
                        Stream stream);

// Whether the derivative of an epilogue can be read off its result.
bool tells_derivative(const EpilogueRef& epilogue);

}  // namespace effops::cuda
