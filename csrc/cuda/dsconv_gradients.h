// The three products of dsconv's backward pass, a source each, as dsconv_backward.cu launches them. Like kernels.h:
// everything on the stream, nothing allocated. A plan depends on the call and the device alone: the tiles, and so the
// lines of partial sums that they leave. `du`: d loss / d pointwise sums, [N, K, P, Q], of the maps' dtype.
#pragma once

#include "csrc/cuda/dsconv_pointwise.h"

namespace effops::cuda {

inline bool any(const EpilogueGrads& grads) { return grads.bias || grads.scale || grads.shift || grads.residual.data; }

// Whether a gradient is asked for that comes through the depthwise convolution's result.
inline bool through_depthwise(const DsconvBackwardArgs& args) {
  return args.grad_input.data || args.grad_dw_weight || any(args.dw_grads);
}

// The output's gradient, K channels of the output.
template <class T>
TensorRef pointwise_gradient(const DsconvBackwardArgs& args) {
  return from_channel<T>(args.grad_output, args.forward.keep);
}

// dsconv_output_gradient.cu: du (data == nullptr: not wanted), the residual's gradient, and to `partial`
// [lines][bias, scale, shift][K].
struct OutputGradientPlan {
  PointwiseTile tile;
  index_t lines;
};
OutputGradientPlan plan_output_gradient(DType dtype, const DsconvForwardArgs& args, const Device& device);
void dsconv_output_gradient(DType dtype, const OutputGradientPlan& plan, const DsconvBackwardArgs& args,
                            const TensorRef& du, void* partial, Stream stream);

// dsconv_z_gradient.cu: the passed channels' gradient, the gradient at the depthwise sums (data == nullptr: not
// wanted), the depthwise residual's, and to `partial` [lines][bias, scale, shift][D].
struct ZGradientPlan {
  Box box;
  index_t lines;
};
ZGradientPlan plan_z_gradient(DType dtype, const DsconvForwardArgs& args, const Device& device);
void dsconv_z_gradient(DType dtype, const ZGradientPlan& plan, const DsconvBackwardArgs& args, const TensorRef& du,
                       const TensorRef& sums_grad, void* partial, Stream stream);

// dsconv_matrix_gradient.cu: to `partial` [parts][K][passed + D].
struct MatrixGradientPlan {
  Box box;
  index_t steps, parts;  // boxes of a part
};
MatrixGradientPlan plan_matrix_gradient(DType dtype, const DsconvForwardArgs& args, const Device& device);
void dsconv_matrix_gradient(DType dtype, const MatrixGradientPlan& plan, const DsconvForwardArgs& args,
                            const TensorRef& du, void* partial, Stream stream);

}  // namespace effops::cuda
