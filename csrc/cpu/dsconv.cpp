// Bindings of room dsconv for the CPU key.
#include "csrc/cpu/binding.h"
#include "csrc/cpu/runtime.h"

namespace effops {
namespace {

constexpr std::size_t kGeometry = 16;

// Checked forward arguments; `kernel` must outlive them.
DsconvForwardArgs forward_args(const StaticArgs& statics, const Tensor& kernel, const Tensor& input,
                               const OptionalTensor& passthrough, const OptionalTensor& dw_bias,
                               const OptionalTensor& dw_scale, const OptionalTensor& dw_shift,
                               const OptionalTensor& dw_residual, const Tensor& pw_weight, const OptionalTensor& bias,
                               const OptionalTensor& scale, const OptionalTensor& shift, const OptionalTensor& residual,
                               const Ints& geometry, const std::vector<double>& slopes) {
  STD_TORCH_CHECK(slopes.size() == 2, "effops::dsconv: slopes must hold 2 numbers, got ", slopes.size());
  DsconvForwardArgs args;
  args.g = statics.g;
  const DepthwiseGeometry& g = args.g;
  const index_t dw_channels = g.out_channels();
  args.input = tensor_ref(input);
  args.passthrough_channels = 0;
  if (passthrough.has_value()) {
    check_map(*passthrough, "passthrough");
    args.passthrough_channels = passthrough->size(1);
    check_sizes(*passthrough, g.N, args.passthrough_channels, g.P, g.Q, "passthrough");
    check_same_dtype(*passthrough, input, "passthrough");
    args.passthrough = tensor_ref(*passthrough);
  }
  check_map(pw_weight, "pw_weight");
  check_same_dtype(pw_weight, input, "pw_weight");
  args.K = pw_weight.size(0);
  STD_TORCH_CHECK(args.K >= 1, "effops::dsconv: pw_weight must have at least one output channel");
  check_sizes(pw_weight, args.K, args.passthrough_channels + dw_channels, 1, 1, "pw_weight");
  args.keep = geometry[14];
  STD_TORCH_CHECK(args.keep <= dw_channels, "effops::dsconv: keep = ", args.keep, " is more than the ", dw_channels,
                  " depthwise channels");
  args.dw_weight = kernel.const_data_ptr();
  args.dw_epilogue = epilogue_ref(dw_bias, dw_scale, dw_shift, dw_residual, input, dw_channels, g);
  args.dw_epilogue.activation = statics.activation;
  args.dw_epilogue.post = statics.post;
  args.dw_epilogue.slope = slopes[0];
  args.pw_weight = pw_weight.const_data_ptr();
  args.pw_stride_k = pw_weight.stride(0);
  args.pw_stride_c = pw_weight.stride(1);
  args.pw_epilogue = epilogue_ref(bias, scale, shift, residual, input, args.K, g);
  args.pw_epilogue.activation = read_activation(geometry[12]);
  args.pw_epilogue.post = read_activation(geometry[13]);
  args.pw_epilogue.slope = slopes[1];
  return args;
}

Tensor dsconv_fwd(const Tensor& input, const OptionalTensor& passthrough, const Tensor& dw_weight,
                  const OptionalTensor& dw_bias, const OptionalTensor& dw_scale, const OptionalTensor& dw_shift,
                  const OptionalTensor& dw_residual, const Tensor& pw_weight, const OptionalTensor& bias,
                  const OptionalTensor& scale, const OptionalTensor& shift, const OptionalTensor& residual,
                  const Ints& geometry, const std::vector<double>& slopes) {
  const StaticArgs statics = read_geometry(input, dw_weight, geometry, kGeometry, "dsconv_fwd");
  const Tensor kernel = dense(dw_weight);
  DsconvForwardArgs args = forward_args(statics, kernel, input, passthrough, dw_bias, dw_scale, dw_shift, dw_residual,
                                        pw_weight, bias, scale, shift, residual, geometry, slopes);
  Tensor output = new_map(input, args.g.N, args.keep + args.K, args.g.P, args.g.Q, statics.channels_last);
  args.output = tensor_ref(output);
  kernels().dsconv_fwd[static_cast<int>(dtype_of(input, "input"))](args);
  return output;
}

std::vector<Tensor> dsconv_bwd(const Tensor& grad_output, const OptionalTensor& output, const Tensor& input,
                               const OptionalTensor& passthrough, const Tensor& dw_weight,
                               const OptionalTensor& dw_bias, const OptionalTensor& dw_scale,
                               const OptionalTensor& dw_shift, const OptionalTensor& dw_residual,
                               const Tensor& pw_weight, const OptionalTensor& bias, const OptionalTensor& scale,
                               const OptionalTensor& shift, const OptionalTensor& residual, const Ints& geometry,
                               const std::vector<double>& slopes, std::int64_t mask) {
  const StaticArgs statics = read_geometry(input, dw_weight, geometry, kGeometry, "dsconv_bwd");
  const Tensor kernel = dense(dw_weight);
  DsconvBackwardArgs args;
  args.forward = forward_args(statics, kernel, input, passthrough, dw_bias, dw_scale, dw_shift, dw_residual, pw_weight,
                              bias, scale, shift, residual, geometry, slopes);
  const index_t channels = args.forward.keep + args.forward.K;
  check_sizes(grad_output, args.forward.g.N, channels, args.forward.g.P, args.forward.g.Q, "grad_output");
  check_same_dtype(grad_output, input, "grad_output");
  args.grad_output = tensor_ref(grad_output);
  args.forward.output = residual_ref(output, input, channels, args.forward.g, "output");
  check_saved_output(args.forward.output, args.forward.pw_epilogue);
  GradList grads(mask, 12);
  args.grad_input = grads.map(0, input, statics.channels_last);
  args.grad_passthrough = grads.map(1, passthrough, statics.channels_last, "passthrough");
  args.grad_dw_weight = grads.dense(2, dw_weight);
  args.dw_grads.bias = grads.channel(3, dw_bias, args.dw_grads.bias_dtype, "dw_bias");
  args.dw_grads.scale = grads.channel(4, dw_scale, args.dw_grads.scale_dtype, "dw_scale");
  args.dw_grads.shift = grads.channel(5, dw_shift, args.dw_grads.shift_dtype, "dw_shift");
  args.dw_grads.residual = grads.map(6, dw_residual, statics.channels_last, "dw_residual");
  args.grad_pw_weight = grads.dense(7, pw_weight);
  args.pw_grads.bias = grads.channel(8, bias, args.pw_grads.bias_dtype, "bias");
  args.pw_grads.scale = grads.channel(9, scale, args.pw_grads.scale_dtype, "scale");
  args.pw_grads.shift = grads.channel(10, shift, args.pw_grads.shift_dtype, "shift");
  args.pw_grads.residual = grads.map(11, residual, statics.channels_last, "residual");
  kernels().dsconv_bwd[static_cast<int>(dtype_of(input, "input"))](args);
  return grads.take();
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(effops, CPU, library) {
  library.impl("dsconv_fwd", TORCH_BOX(&dsconv_fwd));
  library.impl("dsconv_bwd", TORCH_BOX(&dsconv_bwd));
}

}  // namespace effops
