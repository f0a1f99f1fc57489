// Bindings of room dwconv: `Kernels` says which kernels run, on which device (csrc/cpu/bindings.cpp has an example).
#pragma once

#include "csrc/bindings/binding.h"

namespace effops {

template <class Kernels>
struct DwconvBindings {
  static constexpr std::size_t kGeometry = 13;

  static Tensor forward(const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
                        const OptionalTensor& scale, const OptionalTensor& shift, const OptionalTensor& residual,
                        const Ints& geometry, double slope) {
    const StaticArgs statics = read_geometry(Kernels::checked(input), weight, geometry, kGeometry, "dwconv_fwd");
    const Tensor kernel = dense(weight);
    DwconvForwardArgs args;
    args.g = statics.g;
    args.input = tensor_ref(input);
    args.weight = kernel.const_data_ptr();
    args.epilogue = epilogue_ref(bias, scale, shift, residual, input, args.g.out_channels(), args.g);
    args.epilogue.activation = statics.activation;
    args.epilogue.post = statics.post;
    args.epilogue.slope = slope;
    Tensor output = new_map(input, args.g.N, args.g.out_channels(), args.g.P, args.g.Q, statics.channels_last);
    args.output = tensor_ref(output);
    Kernels::dwconv_fwd(input, args);
    return output;
  }

  static std::vector<Tensor> backward(const Tensor& grad_output, const OptionalTensor& output, const Tensor& input,
                                      const Tensor& weight, const OptionalTensor& bias, const OptionalTensor& scale,
                                      const OptionalTensor& shift, const OptionalTensor& residual, const Ints& geometry,
                                      double slope, std::int64_t mask) {
    const StaticArgs statics = read_geometry(Kernels::checked(input), weight, geometry, kGeometry, "dwconv_bwd");
    const Tensor kernel = dense(weight);
    DwconvBackwardArgs args;
    args.g = statics.g;
    const index_t channels = args.g.out_channels();
    check_sizes(grad_output, input, args.g.N, channels, args.g.P, args.g.Q, "grad_output");
    args.grad_output = tensor_ref(grad_output);
    args.output = residual_ref(output, input, channels, args.g, "output");
    args.input = tensor_ref(input);
    args.weight = kernel.const_data_ptr();
    args.epilogue = epilogue_ref(bias, scale, shift, residual, input, channels, args.g);
    args.epilogue.activation = statics.activation;
    args.epilogue.post = statics.post;
    args.epilogue.slope = slope;
    check_saved_output(args.output, args.epilogue);
    GradList grads(mask, 6);
    args.grad_input = grads.map(0, input, statics.channels_last);
    args.grad_weight = grads.dense(1, weight);
    args.grads.bias = grads.channel(2, bias, args.grads.bias_dtype, "bias");
    args.grads.scale = grads.channel(3, scale, args.grads.scale_dtype, "scale");
    args.grads.shift = grads.channel(4, shift, args.grads.shift_dtype, "shift");
    args.grads.residual = grads.map(5, residual, statics.channels_last, "residual");
    Kernels::dwconv_bwd(input, args);
    return grads.take();
  }

  static std::tuple<Tensor, Tensor> statistics(const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
                                               const Ints& geometry) {
    const StaticArgs statics = read_geometry(Kernels::checked(input), weight, geometry, kGeometry, "dwconv_stats");
    STD_TORCH_CHECK(statics.g.N > 0, "effops::dwconv_stats: an empty batch has no mean");
    const Tensor kernel = dense(weight);
    DwconvStatsArgs args;
    args.g = statics.g;
    args.input = tensor_ref(input);
    args.weight = kernel.const_data_ptr();
    args.bias = channel_ref(bias, input, args.g.out_channels(), "bias");
    Tensor mean = new_statistic(input, args.g.out_channels()), var = new_statistic(input, args.g.out_channels());
    args.mean = mean.mutable_data_ptr();
    args.var = var.mutable_data_ptr();
    Kernels::dwconv_stats(input, args);
    return {mean, var};
  }

  static std::vector<Tensor> statistics_backward(const Tensor& grad_mean, const Tensor& grad_var, const Tensor& mean,
                                                 const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
                                                 const Ints& geometry, std::int64_t mask) {
    const StaticArgs statics = read_geometry(Kernels::checked(input), weight, geometry, kGeometry, "dwconv_stats_bwd");
    const Tensor kernel = dense(weight);
    DwconvStatsBackwardArgs args;
    args.g = statics.g;
    args.input = tensor_ref(input);
    args.weight = kernel.const_data_ptr();
    const index_t channels = args.g.out_channels();
    args.bias = channel_ref(bias, input, channels, "bias");
    const Tensor dense_mean = statistic(mean, input, channels, "mean"),
                 dense_grad_mean = statistic(grad_mean, input, channels, "grad_mean"),
                 dense_grad_var = statistic(grad_var, input, channels, "grad_var");
    args.mean = dense_mean.const_data_ptr();
    args.grad_mean = dense_grad_mean.const_data_ptr();
    args.grad_var = dense_grad_var.const_data_ptr();
    GradList grads(mask, 3);
    args.grad_input = grads.map(0, input, statics.channels_last);
    args.grad_weight = grads.dense(1, weight);
    args.grad_bias = grads.channel(2, bias, args.grad_bias_dtype, "bias");
    Kernels::dwconv_stats_bwd(input, args);
    return grads.take();
  }
};

}  // namespace effops
