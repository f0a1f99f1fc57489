// Bindings of room bsconv: `Kernels` says which kernels run, on which device (csrc/cpu/bindings.cpp has an example).
#pragma once

#include <limits>

#include "csrc/bindings/binding.h"

namespace effops {

template <class Kernels>
struct BsconvBindings {
  static constexpr std::size_t kGeometry = 14;
  static constexpr int kTensors = 13;

  // A pointwise weight [outputs, inputs, 1, 1] of any strides.
  static PointwiseRef pointwise_ref(const Tensor& weight, const Tensor& input, index_t inputs, const char* name) {
    check_map(weight, input, name);
    PointwiseRef result;
    result.inputs = inputs;
    result.outputs = weight.size(0);
    constexpr index_t kLimit = (index_t{1} << 31) - 1;
    STD_TORCH_CHECK(result.outputs >= 1 && result.outputs <= kLimit, "effops::bsconv: ", name,
                    " must have from 1 to 2^31 - 1 output channels");
    check_sizes(weight, input, result.outputs, inputs, 1, 1, name);
    result.weight = weight.const_data_ptr();
    result.stride_k = weight.stride(0);
    result.stride_c = weight.stride(1);
    return result;
  }

  // The depthwise convolution's geometry: K channels, one kernel each.
  static DepthwiseGeometry depthwise_geometry(const StaticArgs& statics, index_t channels) {
    DepthwiseGeometry g = statics.g;
    STD_TORCH_CHECK(g.multiplier == 1, "effops::bsconv: the multiplier must be 1, got ", g.multiplier);
    STD_TORCH_CHECK(g.bank == channels, "effops::bsconv: dw_weight must have one kernel for each of the ", channels,
                    " output channels of pw_weight, got ", g.bank);
    g.C = channels;
    g.named_bank = 0;
    index_t elements = 0;
    STD_TORCH_CHECK(
        !__builtin_mul_overflow(channels, g.P, &elements) && !__builtin_mul_overflow(elements, g.Q, &elements) &&
            !__builtin_mul_overflow(elements, g.N, &elements) && elements < std::numeric_limits<index_t>::max() / 64,
        "effops::bsconv: the output would have more elements than 64 bits can address");
    return g;
  }

  // Checked forward arguments; `kernel` must outlive them.
  static BsconvForwardArgs forward_args(const StaticArgs& statics, const Tensor& kernel, const Tensor& input,
                                        const OptionalTensor& mid_weight, const OptionalTensor& mid_scale,
                                        const OptionalTensor& mid_shift, const Tensor& pw_weight,
                                        const OptionalTensor& pw_bias, const OptionalTensor& pw_scale,
                                        const OptionalTensor& pw_shift, const OptionalTensor& bias,
                                        const OptionalTensor& scale, const OptionalTensor& shift,
                                        const OptionalTensor& residual, const Ints& geometry,
                                        const std::vector<double>& slopes) {
    STD_TORCH_CHECK(slopes.size() == 2, "effops::bsconv: slopes must hold 2 numbers, got ", slopes.size());
    BsconvForwardArgs args;
    args.input = tensor_ref(input);
    index_t channels = input.size(1);
    if (mid_weight.has_value()) {
      args.mid = pointwise_ref(*mid_weight, input, channels, "mid_weight");
      channels = args.mid.outputs;
      args.mid.epilogue.scale = channel_ref(mid_scale, input, channels, "mid_scale");
      args.mid.epilogue.shift = channel_ref(mid_shift, input, channels, "mid_shift");
    } else {
      STD_TORCH_CHECK(!mid_scale.has_value() && !mid_shift.has_value(),
                      "effops::bsconv: mid_scale and mid_shift need a mid_weight");
    }
    args.pw = pointwise_ref(pw_weight, input, channels, "pw_weight");
    args.g = depthwise_geometry(statics, args.pw.outputs);
    args.pw.epilogue = epilogue_ref(pw_bias, pw_scale, pw_shift, {}, input, args.pw.outputs, args.g);
    args.pw.epilogue.activation = read_activation(geometry[12]);
    args.pw.epilogue.post = read_activation(geometry[13]);
    args.pw.epilogue.slope = slopes[0];
    args.dw_weight = kernel.const_data_ptr();
    args.epilogue = epilogue_ref(bias, scale, shift, residual, input, args.pw.outputs, args.g);
    args.epilogue.activation = statics.activation;
    args.epilogue.post = statics.post;
    args.epilogue.slope = slopes[1];
    return args;
  }

  static Tensor forward(const Tensor& input, const OptionalTensor& mid_weight, const OptionalTensor& mid_scale,
                        const OptionalTensor& mid_shift, const Tensor& pw_weight, const OptionalTensor& pw_bias,
                        const OptionalTensor& pw_scale, const OptionalTensor& pw_shift, const Tensor& dw_weight,
                        const OptionalTensor& bias, const OptionalTensor& scale, const OptionalTensor& shift,
                        const OptionalTensor& residual, const Ints& geometry, const std::vector<double>& slopes) {
    const StaticArgs statics = read_geometry(Kernels::checked(input), dw_weight, geometry, kGeometry, "bsconv_fwd");
    const Tensor kernel = dense(dw_weight);
    BsconvForwardArgs args = forward_args(statics, kernel, input, mid_weight, mid_scale, mid_shift, pw_weight, pw_bias,
                                          pw_scale, pw_shift, bias, scale, shift, residual, geometry, slopes);
    Tensor output = new_map(input, args.g.N, args.g.C, args.g.P, args.g.Q, statics.channels_last);
    args.output = tensor_ref(output);
    Kernels::bsconv_fwd(input, args);
    return output;
  }

  static std::vector<Tensor> backward(const Tensor& grad_output, const OptionalTensor& output, const Tensor& input,
                                      const OptionalTensor& mid_weight, const OptionalTensor& mid_scale,
                                      const OptionalTensor& mid_shift, const Tensor& pw_weight,
                                      const OptionalTensor& pw_bias, const OptionalTensor& pw_scale,
                                      const OptionalTensor& pw_shift, const Tensor& dw_weight,
                                      const OptionalTensor& bias, const OptionalTensor& scale,
                                      const OptionalTensor& shift, const OptionalTensor& residual, const Ints& geometry,
                                      const std::vector<double>& slopes, std::int64_t mask) {
    const StaticArgs statics = read_geometry(Kernels::checked(input), dw_weight, geometry, kGeometry, "bsconv_bwd");
    const Tensor kernel = dense(dw_weight);
    BsconvBackwardArgs args;
    args.forward = forward_args(statics, kernel, input, mid_weight, mid_scale, mid_shift, pw_weight, pw_bias, pw_scale,
                                pw_shift, bias, scale, shift, residual, geometry, slopes);
    const DepthwiseGeometry& g = args.forward.g;
    check_sizes(grad_output, input, g.N, g.C, g.P, g.Q, "grad_output");
    args.grad_output = tensor_ref(grad_output);
    args.forward.output = residual_ref(output, input, g.C, g, "output");
    check_saved_output(args.forward.output, args.forward.epilogue);
    GradList grads(mask, kTensors);
    args.grad_input = grads.map(0, input, statics.channels_last);
    args.grad_mid_weight = grads.dense(1, mid_weight, "mid_weight");
    args.mid_grads.scale = grads.channel(2, mid_scale, args.mid_grads.scale_dtype, "mid_scale");
    args.mid_grads.shift = grads.channel(3, mid_shift, args.mid_grads.shift_dtype, "mid_shift");
    args.grad_pw_weight = grads.dense(4, pw_weight);
    args.pw_grads.bias = grads.channel(5, pw_bias, args.pw_grads.bias_dtype, "pw_bias");
    args.pw_grads.scale = grads.channel(6, pw_scale, args.pw_grads.scale_dtype, "pw_scale");
    args.pw_grads.shift = grads.channel(7, pw_shift, args.pw_grads.shift_dtype, "pw_shift");
    args.grad_dw_weight = grads.dense(8, dw_weight);
    args.grads.bias = grads.channel(9, bias, args.grads.bias_dtype, "bias");
    args.grads.scale = grads.channel(10, scale, args.grads.scale_dtype, "scale");
    args.grads.shift = grads.channel(11, shift, args.grads.shift_dtype, "shift");
    args.grads.residual = grads.map(12, residual, statics.channels_last, "residual");
    Kernels::bsconv_bwd(input, args);
    return grads.take();
  }
};

}  // namespace effops
