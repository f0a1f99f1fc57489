// Bindings of room dsconv: `Kernels` says which kernels run, on which device (csrc/cpu/bindings.cpp has an example).
#pragma once

#include "csrc/bindings/binding.h"

namespace effops {

template <class Kernels>
struct DsconvBindings {
  static constexpr std::size_t kGeometry = 17;

  // Checked forward arguments; `kernel` must outlive them.
  static DsconvForwardArgs forward_args(const StaticArgs& statics, const Tensor& kernel, const Tensor& input,
                                        const OptionalTensor& passthrough, const OptionalTensor& dw_bias,
                                        const OptionalTensor& dw_scale, const OptionalTensor& dw_shift,
                                        const OptionalTensor& dw_residual, const Tensor& pw_weight,
                                        const OptionalTensor& bias, const OptionalTensor& scale,
                                        const OptionalTensor& shift, const OptionalTensor& residual,
                                        const Ints& geometry, const std::vector<double>& slopes) {
    STD_TORCH_CHECK(slopes.size() == 2, "effops::dsconv: slopes must hold 2 numbers, got ", slopes.size());
    DsconvForwardArgs args;
    args.g = statics.g;
    const DepthwiseGeometry& g = args.g;
    const index_t dw_channels = g.out_channels();
    args.input = tensor_ref(input);
    args.passthrough_channels = 0;
    if (passthrough.has_value()) {
      check_map(*passthrough, input, "passthrough");
      args.passthrough_channels = passthrough->size(1);
      check_sizes(*passthrough, input, g.N, args.passthrough_channels, g.P, g.Q, "passthrough");
      args.passthrough = tensor_ref(*passthrough);
    }
    check_map(pw_weight, input, "pw_weight");
    args.K = pw_weight.size(0);
    STD_TORCH_CHECK(args.K >= 1, "effops::dsconv: pw_weight must have at least one output channel");
    check_sizes(pw_weight, input, args.K, args.passthrough_channels + dw_channels, 1, 1, "pw_weight");
    args.keep = geometry[14];
    STD_TORCH_CHECK(args.keep <= dw_channels, "effops::dsconv: keep = ", args.keep, " is more than the ", dw_channels,
                    " depthwise channels");
    args.tf32 = geometry[15] != 0;
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

  static Tensor forward(const Tensor& input, const OptionalTensor& passthrough, const Tensor& dw_weight,
                        const OptionalTensor& dw_bias, const OptionalTensor& dw_scale, const OptionalTensor& dw_shift,
                        const OptionalTensor& dw_residual, const Tensor& pw_weight, const OptionalTensor& bias,
                        const OptionalTensor& scale, const OptionalTensor& shift, const OptionalTensor& residual,
                        const Ints& geometry, const std::vector<double>& slopes) {
    const StaticArgs statics = read_geometry(Kernels::checked(input), dw_weight, geometry, kGeometry, "dsconv_fwd");
    const Tensor kernel = dense(dw_weight);
    return run(input, statics,
               forward_args(statics, kernel, input, passthrough, dw_bias, dw_scale, dw_shift, dw_residual, pw_weight,
                            bias, scale, shift, residual, geometry, slopes));
  }

  static std::tuple<Tensor, Tensor> pool_forward(const Tensor& input, const OptionalTensor& passthrough,
                                                 const Tensor& dw_weight, const OptionalTensor& dw_bias,
                                                 const OptionalTensor& dw_scale, const OptionalTensor& dw_shift,
                                                 const OptionalTensor& dw_residual, const Tensor& pw_weight,
                                                 const OptionalTensor& bias, const OptionalTensor& scale,
                                                 const OptionalTensor& shift, const OptionalTensor& residual,
                                                 const Ints& geometry, const std::vector<double>& slopes) {
    const StaticArgs statics =
        read_geometry(Kernels::checked(input), dw_weight, geometry, kGeometry, "dsconv_pool_fwd");
    const Tensor kernel = dense(dw_weight);
    DsconvForwardArgs args = forward_args(statics, kernel, input, passthrough, dw_bias, dw_scale, dw_shift, dw_residual,
                                          pw_weight, bias, scale, shift, residual, geometry, slopes);
    Tensor sums = new_sums(input, args.K);
    args.sums = sums.mutable_data_ptr();
    return {run(input, statics, args), sums};
  }

  // The output of checked arguments.
  static Tensor run(const Tensor& input, const StaticArgs& statics, DsconvForwardArgs args) {
    Tensor output = new_map(input, args.g.N, args.keep + args.K, args.g.P, args.g.Q, statics.channels_last);
    args.output = tensor_ref(output);
    Kernels::dsconv_fwd(input, args);
    return output;
  }

  // The batch norm of one call; its tensors must outlive it.
  static BatchNormRef batch_norm_ref(const DsconvForwardArgs& conv, const Tensor& input, const OptionalTensor& weight,
                                     const OptionalTensor& bias, double eps) {
    BatchNormRef norm;
    norm.weight = channel_ref(weight, input, conv.K, "norm_weight");
    norm.bias = channel_ref(bias, input, conv.K, "norm_bias");
    STD_TORCH_CHECK(eps >= 0, "effops: eps must be a number of at least 0, got ", eps);
    norm.eps = eps;
    return norm;
  }

  static std::tuple<Tensor, Tensor, Tensor, Tensor> norm_forward(
      const Tensor& input, const OptionalTensor& passthrough, const Tensor& dw_weight, const OptionalTensor& dw_bias,
      const OptionalTensor& dw_scale, const OptionalTensor& dw_shift, const OptionalTensor& dw_residual,
      const Tensor& pw_weight, const OptionalTensor& bias, const OptionalTensor& norm_weight,
      const OptionalTensor& norm_bias, const OptionalTensor& residual, const Ints& geometry,
      const std::vector<double>& slopes, double eps) {
    const StaticArgs statics =
        read_geometry(Kernels::checked(input), dw_weight, geometry, kGeometry, "dsconv_norm_fwd");
    STD_TORCH_CHECK(statics.g.N > 0, "effops::dsconv_norm_fwd: an empty batch has no mean");
    const Tensor kernel = dense(dw_weight);
    DsconvForwardArgs args = forward_args(statics, kernel, input, passthrough, dw_bias, dw_scale, dw_shift, dw_residual,
                                          pw_weight, bias, {}, {}, residual, geometry, slopes);
    const DepthwiseGeometry& g = args.g;
    Tensor output = new_map(input, g.N, args.keep + args.K, g.P, g.Q, statics.channels_last);
    Tensor activated = new_map(input, g.N, args.K, g.P, g.Q, statics.channels_last);
    Tensor mean = new_statistic(input, args.K), var = new_statistic(input, args.K);
    args.output = tensor_ref(output);
    args.norm = batch_norm_ref(args, input, norm_weight, norm_bias, eps);
    args.norm.activated = tensor_ref(activated);
    args.norm.mean = mean.mutable_data_ptr();
    args.norm.var = var.mutable_data_ptr();
    Kernels::dsconv_fwd(input, args);
    return {output, activated, mean, var};
  }

  static void set_grad_output(DsconvBackwardArgs& args, const Tensor& grad_output, const Tensor& input) {
    const DepthwiseGeometry& g = args.forward.g;
    check_sizes(grad_output, input, g.N, args.forward.keep + args.forward.K, g.P, g.Q, "grad_output");
    args.grad_output = tensor_ref(grad_output);
  }

  // Allocates what the mask asks for. A norm's weight and bias stand in the places of scale and shift.
  static void set_gradients(DsconvBackwardArgs& args, GradList& grads, bool channels_last, const Tensor& input,
                            const OptionalTensor& passthrough, const Tensor& dw_weight, const OptionalTensor& dw_bias,
                            const OptionalTensor& dw_scale, const OptionalTensor& dw_shift,
                            const OptionalTensor& dw_residual, const Tensor& pw_weight, const OptionalTensor& bias,
                            const OptionalTensor& scale, const OptionalTensor& shift, const OptionalTensor& residual) {
    args.grad_input = grads.map(0, input, channels_last);
    args.grad_passthrough = grads.map(1, passthrough, channels_last, "passthrough");
    args.grad_dw_weight = grads.dense(2, dw_weight);
    args.dw_grads.bias = grads.channel(3, dw_bias, args.dw_grads.bias_dtype, "dw_bias");
    args.dw_grads.scale = grads.channel(4, dw_scale, args.dw_grads.scale_dtype, "dw_scale");
    args.dw_grads.shift = grads.channel(5, dw_shift, args.dw_grads.shift_dtype, "dw_shift");
    args.dw_grads.residual = grads.map(6, dw_residual, channels_last, "dw_residual");
    args.grad_pw_weight = grads.dense(7, pw_weight);
    args.pw_grads.bias = grads.channel(8, bias, args.pw_grads.bias_dtype, "bias");
    args.pw_grads.scale = grads.channel(9, scale, args.pw_grads.scale_dtype, "scale");
    args.pw_grads.shift = grads.channel(10, shift, args.pw_grads.shift_dtype, "shift");
    args.pw_grads.residual = grads.map(11, residual, channels_last, "residual");
  }

  static std::vector<Tensor> backward(const Tensor& grad_output, const OptionalTensor& output, const Tensor& input,
                                      const OptionalTensor& passthrough, const Tensor& dw_weight,
                                      const OptionalTensor& dw_bias, const OptionalTensor& dw_scale,
                                      const OptionalTensor& dw_shift, const OptionalTensor& dw_residual,
                                      const Tensor& pw_weight, const OptionalTensor& bias, const OptionalTensor& scale,
                                      const OptionalTensor& shift, const OptionalTensor& residual, const Ints& geometry,
                                      const std::vector<double>& slopes, std::int64_t mask) {
    const StaticArgs statics = read_geometry(Kernels::checked(input), dw_weight, geometry, kGeometry, "dsconv_bwd");
    const Tensor kernel = dense(dw_weight);
    DsconvBackwardArgs args;
    args.forward = forward_args(statics, kernel, input, passthrough, dw_bias, dw_scale, dw_shift, dw_residual,
                                pw_weight, bias, scale, shift, residual, geometry, slopes);
    set_grad_output(args, grad_output, input);
    args.forward.output = residual_ref(output, input, args.forward.keep + args.forward.K, args.forward.g, "output");
    check_saved_output(args.forward.output, args.forward.pw_epilogue);
    GradList grads(mask, 12);
    set_gradients(args, grads, statics.channels_last, input, passthrough, dw_weight, dw_bias, dw_scale, dw_shift,
                  dw_residual, pw_weight, bias, scale, shift, residual);
    Kernels::dsconv_bwd(input, args);
    return grads.take();
  }

  static std::vector<Tensor> norm_backward(const Tensor& grad_output, const Tensor& activated, const Tensor& mean,
                                           const Tensor& var, const Tensor& input, const OptionalTensor& passthrough,
                                           const Tensor& dw_weight, const OptionalTensor& dw_bias,
                                           const OptionalTensor& dw_scale, const OptionalTensor& dw_shift,
                                           const OptionalTensor& dw_residual, const Tensor& pw_weight,
                                           const OptionalTensor& bias, const OptionalTensor& norm_weight,
                                           const OptionalTensor& norm_bias, const OptionalTensor& residual,
                                           const Ints& geometry, const std::vector<double>& slopes, double eps,
                                           std::int64_t mask) {
    const StaticArgs statics =
        read_geometry(Kernels::checked(input), dw_weight, geometry, kGeometry, "dsconv_norm_bwd");
    STD_TORCH_CHECK(statics.g.N > 0, "effops::dsconv_norm_bwd: an empty batch has no mean");
    const Tensor kernel = dense(dw_weight);
    DsconvBackwardArgs args;
    DsconvForwardArgs& forward = args.forward;
    forward = forward_args(statics, kernel, input, passthrough, dw_bias, dw_scale, dw_shift, dw_residual, pw_weight,
                           bias, {}, {}, residual, geometry, slopes);
    set_grad_output(args, grad_output, input);
    const Tensor dense_mean = statistic(mean, input, forward.K, "mean"),
                 dense_var = statistic(var, input, forward.K, "var");
    forward.norm = batch_norm_ref(forward, input, norm_weight, norm_bias, eps);
    forward.norm.activated = residual_ref(activated, input, forward.K, forward.g, "activated");
    forward.norm.mean = const_cast<void*>(dense_mean.const_data_ptr());
    forward.norm.var = const_cast<void*>(dense_var.const_data_ptr());
    GradList grads(mask, 12);
    set_gradients(args, grads, statics.channels_last, input, passthrough, dw_weight, dw_bias, dw_scale, dw_shift,
                  dw_residual, pw_weight, bias, norm_weight, norm_bias, residual);
    Kernels::dsconv_bwd(input, args);
    return grads.take();
  }
};

}  // namespace effops
