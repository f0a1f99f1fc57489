// Bindings of room mbconv: `Kernels` says which kernels run, on which device (csrc/cpu/bindings.cpp has an example).
#pragma once

#include <limits>

#include "csrc/bindings/se.h"

namespace effops {

template <class Kernels>
struct MbconvBindings {
  static constexpr std::size_t kGeometry = 19;

  // The checked call; holds what the args point to.
  struct Call {
    bool channels_last = false;
    Tensor kernel;
    Excitation excitation;
    MbconvForwardArgs args;
  };

  static MatrixRef pointwise_ref(const Tensor& weight, const Tensor& input, index_t columns, index_t k,
                                 const char* name) {
    check_sizes(weight, input, columns, k, 1, 1, name);
    return {weight.const_data_ptr(), weight.stride(0), weight.stride(1)};
  }

  static void set_activations(EpilogueRef& epilogue, const Ints& geometry, std::size_t at, double slope) {
    epilogue.activation = read_activation(geometry[at]);
    epilogue.post = read_activation(geometry[at + 1]);
    epilogue.slope = slope;
  }

  static Call checked(const char* op, const Tensor& input, const OptionalTensor& expand_weight,
                      const OptionalTensor& expand_bias, const OptionalTensor& expand_scale,
                      const OptionalTensor& expand_shift, const Tensor& dw_weight, const OptionalTensor& dw_bias,
                      const OptionalTensor& dw_scale, const OptionalTensor& dw_shift,
                      const OptionalTensor& se_reduce_weight, const OptionalTensor& se_reduce_bias,
                      const OptionalTensor& se_expand_weight, const OptionalTensor& se_expand_bias,
                      const Tensor& project_weight, const OptionalTensor& bias, const OptionalTensor& scale,
                      const OptionalTensor& shift, const OptionalTensor& residual, const Ints& geometry,
                      const std::vector<double>& slopes) {
    const StaticArgs statics = read_geometry(Kernels::checked(input), dw_weight, geometry, kGeometry, op);
    STD_TORCH_CHECK(slopes.size() == 3, "effops::", op, ": slopes must hold 3 numbers, got ", slopes.size());
    STD_TORCH_CHECK(statics.g.multiplier == 1, "effops::", op, ": the multiplier must be 1");
    Call call{statics.channels_last, dense(dw_weight), {}, {}};
    MbconvForwardArgs& args = call.args;
    args.g = statics.g;
    DepthwiseGeometry& g = args.g;
    args.in_channels = g.C;
    g.C = g.bank;  // the depthwise convolution is on the expanded channels
    index_t elements = 0;
    STD_TORCH_CHECK(!__builtin_mul_overflow(g.C, g.H * g.W, &elements) &&
                        !__builtin_mul_overflow(elements, g.N, &elements) &&
                        elements < std::numeric_limits<index_t>::max() / 64 && g.C <= (index_t{1} << 31),
                    "effops::", op, ": the expanded tensor would have more elements than 64 bits can address");
    args.input = tensor_ref(input);
    if (expand_weight.has_value()) {
      args.expand = pointwise_ref(*expand_weight, input, g.C, args.in_channels, "expand_weight");
      args.expand_epilogue = epilogue_ref(expand_bias, expand_scale, expand_shift, {}, input, g.C, g);
      set_activations(args.expand_epilogue, geometry, 14, slopes[0]);
    } else {
      STD_TORCH_CHECK(g.C == args.in_channels, "effops::", op, ": without an expansion dw_weight must have ",
                      args.in_channels, " kernels, got ", g.C);
      STD_TORCH_CHECK(!expand_bias.has_value() && !expand_scale.has_value() && !expand_shift.has_value(),
                      "effops::", op, ": the expansion's epilogue is given without its weight");
    }
    args.dw_weight = call.kernel.const_data_ptr();
    args.dw_epilogue = epilogue_ref(dw_bias, dw_scale, dw_shift, {}, input, g.C, g);
    set_activations(args.dw_epilogue, geometry, 10, slopes[1]);
    STD_TORCH_CHECK(se_reduce_weight.has_value() == se_expand_weight.has_value() &&
                        (se_reduce_weight.has_value() || (!se_reduce_bias.has_value() && !se_expand_bias.has_value())),
                    "effops::", op, ": a squeeze-excite has both weights or nothing");
    if (se_reduce_weight.has_value()) {
      call.excitation = Excitation(input, g.C, *se_reduce_weight, se_reduce_bias, *se_expand_weight, se_expand_bias,
                                   geometry[16], geometry[17]);
      args.excitation = call.excitation.ref;
    }
    check_map(project_weight, input, "project_weight");
    args.K = project_weight.size(0);
    STD_TORCH_CHECK(args.K >= 1, "effops::", op, ": project_weight must have at least one output channel");
    args.project = pointwise_ref(project_weight, input, args.K, g.C, "project_weight");
    args.epilogue = epilogue_ref(bias, scale, shift, residual, input, args.K, g);
    set_activations(args.epilogue, geometry, 12, slopes[2]);
    return call;
  }

  static Tensor forward(const Tensor& input, const OptionalTensor& expand_weight, const OptionalTensor& expand_bias,
                        const OptionalTensor& expand_scale, const OptionalTensor& expand_shift, const Tensor& dw_weight,
                        const OptionalTensor& dw_bias, const OptionalTensor& dw_scale, const OptionalTensor& dw_shift,
                        const OptionalTensor& se_reduce_weight, const OptionalTensor& se_reduce_bias,
                        const OptionalTensor& se_expand_weight, const OptionalTensor& se_expand_bias,
                        const Tensor& project_weight, const OptionalTensor& bias, const OptionalTensor& scale,
                        const OptionalTensor& shift, const OptionalTensor& residual, const Ints& geometry,
                        const std::vector<double>& slopes) {
    Call call = checked("mbconv_fwd", input, expand_weight, expand_bias, expand_scale, expand_shift, dw_weight, dw_bias,
                        dw_scale, dw_shift, se_reduce_weight, se_reduce_bias, se_expand_weight, se_expand_bias,
                        project_weight, bias, scale, shift, residual, geometry, slopes);
    const DepthwiseGeometry& g = call.args.g;
    Tensor output = new_map(input, g.N, call.args.K, g.P, g.Q, call.channels_last);
    call.args.output = tensor_ref(output);
    Kernels::mbconv_fwd(input, call.args);
    return output;
  }

  static EpilogueGrads vector_grads(GradList& grads, int first, const OptionalTensor& bias, const OptionalTensor& scale,
                                    const OptionalTensor& shift) {
    EpilogueGrads result;
    result.bias = grads.channel(first, bias, result.bias_dtype, "bias");
    result.scale = grads.channel(first + 1, scale, result.scale_dtype, "scale");
    result.shift = grads.channel(first + 2, shift, result.shift_dtype, "shift");
    return result;
  }

  static std::vector<Tensor> backward(
      const Tensor& grad_output, const Tensor& input, const OptionalTensor& expand_weight,
      const OptionalTensor& expand_bias, const OptionalTensor& expand_scale, const OptionalTensor& expand_shift,
      const Tensor& dw_weight, const OptionalTensor& dw_bias, const OptionalTensor& dw_scale,
      const OptionalTensor& dw_shift, const OptionalTensor& se_reduce_weight, const OptionalTensor& se_reduce_bias,
      const OptionalTensor& se_expand_weight, const OptionalTensor& se_expand_bias, const Tensor& project_weight,
      const OptionalTensor& bias, const OptionalTensor& scale, const OptionalTensor& shift,
      const OptionalTensor& residual, const Ints& geometry, const std::vector<double>& slopes, std::int64_t mask) {
    const Call call = checked("mbconv_bwd", input, expand_weight, expand_bias, expand_scale, expand_shift, dw_weight,
                              dw_bias, dw_scale, dw_shift, se_reduce_weight, se_reduce_bias, se_expand_weight,
                              se_expand_bias, project_weight, bias, scale, shift, residual, geometry, slopes);
    MbconvBackwardArgs args;
    args.forward = call.args;
    const DepthwiseGeometry& g = args.forward.g;
    check_sizes(grad_output, input, g.N, args.forward.K, g.P, g.Q, "grad_output");
    args.grad_output = tensor_ref(grad_output);
    GradList grads(mask, 18);
    args.grad_input = grads.map(0, input, call.channels_last);
    if (expand_weight.has_value()) {
      args.grad_expand_weight = grads.dense(1, *expand_weight);
      args.expand_grads = vector_grads(grads, 2, expand_bias, expand_scale, expand_shift);
    } else {
      STD_TORCH_CHECK((mask & 0b11110) == 0, "effops: the mask asks for gradients of an expansion, which is absent");
    }
    args.grad_dw_weight = grads.dense(5, dw_weight);
    args.dw_grads = vector_grads(grads, 6, dw_bias, dw_scale, dw_shift);
    if (se_reduce_weight.has_value()) {
      args.excitation_grads =
          excitation_grads(grads, 9, *se_reduce_weight, se_reduce_bias, *se_expand_weight, se_expand_bias);
    } else {
      STD_TORCH_CHECK((mask & 0b1111 << 9) == 0,
                      "effops: the mask asks for gradients of a squeeze-excite, which is absent");
    }
    args.grad_project_weight = grads.dense(13, project_weight);
    args.grads = vector_grads(grads, 14, bias, scale, shift);
    args.grads.residual = grads.map(17, residual, call.channels_last, "residual");
    Kernels::mbconv_bwd(input, args);
    return grads.take();
  }
};

}  // namespace effops
