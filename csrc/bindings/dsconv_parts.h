// Bindings of room dsconv with several depthwise windows side by side (Multiception, MixConv): the kernels are dsconv's,
// given parts.
#pragma once

#include <algorithm>

#include "csrc/bindings/binding.h"

namespace effops {

template <class Kernels>
struct DsconvPartsBindings {
  static constexpr std::size_t kGeometry = 15, kPads = 4;  // for one part, and more for each further one

  // The depthwise windows of one call; holds their contiguous weights.
  struct Parts {
    StaticArgs statics;  // g spans all windows
    std::vector<Tensor> kernels;
    std::vector<DepthwisePartArgs> args;
    index_t channels = 0;  // of all of them
    bool split = false;
  };

  // `geometry` as one depthwise convolution has it (schemas.inc), for one of the parts.
  static Ints part_geometry(const Ints& geometry, std::size_t part) {
    Ints own(geometry.begin(), geometry.begin() + 12);
    if (part > 0) std::copy_n(geometry.begin() + kGeometry + kPads * (part - 1), kPads, own.begin() + 2);
    own.push_back(0);  // no named bank
    return own;
  }

  static Parts read_parts(const Tensor& input, const std::vector<Tensor>& weights, const Ints& geometry,
                          const char* op) {
    STD_TORCH_CHECK(!weights.empty(), "effops::", op, ": dw_weights must hold at least one tensor");
    const std::size_t expected = kGeometry + kPads * (weights.size() - 1);
    STD_TORCH_CHECK(geometry.size() == expected, "effops::", op, ": geometry must hold ", expected, " integers for ",
                    weights.size(), " parts, got ", geometry.size());
    STD_TORCH_CHECK(geometry[8] == 1, "effops::", op, ": multiplier must be 1, got ", geometry[8]);
    STD_TORCH_CHECK(geometry[14] == 0 || geometry[14] == 1, "effops::", op, ": split must be 0 or 1, got ",
                    geometry[14]);
    Parts parts;
    parts.split = geometry[14] == 1;
    for (std::size_t i = 0; i < weights.size(); ++i) {
      const Ints own = part_geometry(geometry, i);
      const StaticArgs statics = read_geometry(input, weights[i], own, own.size(), op);
      if (i == 0) parts.statics = statics;
      add_part(parts, statics.g, weights[i], input.size(1), op);
    }
    STD_TORCH_CHECK(!parts.split || parts.channels == input.size(1), "effops::", op, ": dw_weights hold ",
                    parts.channels, " kernels, input has ", input.size(1), " channels");
    span_all(parts);
    return parts;
  }

  static void add_part(Parts& parts, DepthwiseGeometry g, const Tensor& weight, index_t input_channels,
                       const char* op) {
    const index_t kernels = weight.size(0);
    STD_TORCH_CHECK(parts.split || kernels == input_channels, "effops::", op, ": each of dw_weights must hold ",
                    input_channels, " kernels, as input has channels; got ", kernels);
    const DepthwiseGeometry& first = parts.statics.g;
    STD_TORCH_CHECK(g.P == first.P && g.Q == first.Q, "effops::", op, ": the parts must have one output size; got ",
                    first.P, "x", first.Q, " and ", g.P, "x", g.Q);
    g.C = g.bank = kernels;
    parts.kernels.push_back(dense(weight));
    parts.args.push_back({g, parts.kernels.back().const_data_ptr(), parts.split ? parts.channels : 0});
    parts.channels += kernels;
  }

  // The rows that any window spans become the window of statics.g.
  static void span_all(Parts& parts) {
    DepthwiseGeometry& all = parts.statics.g;
    index_t below = -all.pad_top;
    for (const DepthwisePartArgs& part : parts.args) {
      all.pad_top = std::max(all.pad_top, part.g.pad_top);
      below = std::max(below, (part.g.R - 1) * part.g.dilation_h - part.g.pad_top);
    }
    all.R = all.pad_top + below + 1;
    all.dilation_h = 1;
    all.bank = all.C;
  }

  // Checked forward arguments; `parts` must outlive them.
  static DsconvForwardArgs forward_args(const Parts& parts, const Tensor& input, const OptionalTensor& dw_bias,
                                        const OptionalTensor& dw_scale, const OptionalTensor& dw_shift,
                                        const Tensor& pw_weight, const OptionalTensor& bias,
                                        const OptionalTensor& scale, const OptionalTensor& shift,
                                        const OptionalTensor& residual, const Ints& geometry,
                                        const std::vector<double>& slopes) {
    STD_TORCH_CHECK(slopes.size() == 2, "effops::dsconv_parts: slopes must hold 2 numbers, got ", slopes.size());
    DsconvForwardArgs args;
    args.g = parts.statics.g;
    args.parts = parts.args.data();
    args.num_parts = static_cast<index_t>(parts.args.size());
    args.input = tensor_ref(input);
    args.passthrough_channels = args.keep = 0;
    args.tf32 = false;  // the operator's integers have no place for it
    check_map(pw_weight, input, "pw_weight");
    args.K = pw_weight.size(0);
    STD_TORCH_CHECK(args.K >= 1, "effops::dsconv_parts: pw_weight must have at least one output channel");
    check_sizes(pw_weight, input, args.K, parts.channels, 1, 1, "pw_weight");
    args.dw_epilogue = epilogue_ref(dw_bias, dw_scale, dw_shift, {}, input, parts.channels, args.g);
    args.dw_epilogue.activation = parts.statics.activation;
    args.dw_epilogue.post = parts.statics.post;
    args.dw_epilogue.slope = slopes[0];
    args.pw_weight = pw_weight.const_data_ptr();
    args.pw_stride_k = pw_weight.stride(0);
    args.pw_stride_c = pw_weight.stride(1);
    args.pw_epilogue = epilogue_ref(bias, scale, shift, residual, input, args.K, args.g);
    args.pw_epilogue.activation = read_activation(geometry[12]);
    args.pw_epilogue.post = read_activation(geometry[13]);
    args.pw_epilogue.slope = slopes[1];
    return args;
  }

  static Tensor forward(const Tensor& input, const std::vector<Tensor>& dw_weights, const OptionalTensor& dw_bias,
                        const OptionalTensor& dw_scale, const OptionalTensor& dw_shift, const Tensor& pw_weight,
                        const OptionalTensor& bias, const OptionalTensor& scale, const OptionalTensor& shift,
                        const OptionalTensor& residual, const Ints& geometry, const std::vector<double>& slopes) {
    const Parts parts = read_parts(Kernels::checked(input), dw_weights, geometry, "dsconv_parts_fwd");
    DsconvForwardArgs args = forward_args(parts, input, dw_bias, dw_scale, dw_shift, pw_weight, bias, scale, shift,
                                          residual, geometry, slopes);
    Tensor output = new_map(input, args.g.N, args.K, args.g.P, args.g.Q, parts.statics.channels_last);
    args.output = tensor_ref(output);
    Kernels::dsconv_fwd(input, args);
    return output;
  }

  static std::vector<Tensor> backward(const Tensor& grad_output, const OptionalTensor& output, const Tensor& input,
                                      const std::vector<Tensor>& dw_weights, const OptionalTensor& dw_bias,
                                      const OptionalTensor& dw_scale, const OptionalTensor& dw_shift,
                                      const Tensor& pw_weight, const OptionalTensor& bias, const OptionalTensor& scale,
                                      const OptionalTensor& shift, const OptionalTensor& residual, const Ints& geometry,
                                      const std::vector<double>& slopes, std::int64_t mask) {
    Parts parts = read_parts(Kernels::checked(input), dw_weights, geometry, "dsconv_parts_bwd");
    DsconvBackwardArgs args;
    args.forward = forward_args(parts, input, dw_bias, dw_scale, dw_shift, pw_weight, bias, scale, shift, residual,
                                geometry, slopes);
    const DepthwiseGeometry& g = args.forward.g;
    check_sizes(grad_output, input, g.N, args.forward.K, g.P, g.Q, "grad_output");
    args.grad_output = tensor_ref(grad_output);
    args.forward.output = residual_ref(output, input, args.forward.K, g, "output");
    check_saved_output(args.forward.output, args.forward.pw_epilogue);
    const bool channels_last = parts.statics.channels_last;
    GradList grads(mask, 10);
    args.grad_input = grads.map(0, input, channels_last);
    for (std::size_t i = 0; i < dw_weights.size(); ++i) parts.args[i].grad_weight = grads.dense(1, dw_weights[i]);
    args.dw_grads.bias = grads.channel(2, dw_bias, args.dw_grads.bias_dtype, "dw_bias");
    args.dw_grads.scale = grads.channel(3, dw_scale, args.dw_grads.scale_dtype, "dw_scale");
    args.dw_grads.shift = grads.channel(4, dw_shift, args.dw_grads.shift_dtype, "dw_shift");
    args.grad_pw_weight = grads.dense(5, pw_weight);
    args.pw_grads.bias = grads.channel(6, bias, args.pw_grads.bias_dtype, "bias");
    args.pw_grads.scale = grads.channel(7, scale, args.pw_grads.scale_dtype, "scale");
    args.pw_grads.shift = grads.channel(8, shift, args.pw_grads.shift_dtype, "shift");
    args.pw_grads.residual = grads.map(9, residual, channels_last, "residual");
    Kernels::dsconv_bwd(input, args);
    return grads.take();
  }
};

}  // namespace effops
