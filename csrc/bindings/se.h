// Bindings of room se: `Kernels` says which kernels run, on which device (csrc/cpu/bindings.cpp has an example).
#pragma once

#include <array>

#include "csrc/bindings/binding.h"

namespace effops {

// A squeeze-excite's tensors, checked, with contiguous weights; must outlive what `ref` points to.
class Excitation {
 public:
  // `channels` of them are gated; the codes are activation and gate.
  Excitation(const Tensor& input, index_t channels, const Tensor& reduce_weight, const OptionalTensor& reduce_bias,
             const Tensor& expand_weight, const OptionalTensor& expand_bias, std::int64_t activation,
             std::int64_t gate) {
    check_map(reduce_weight, input, "reduce_weight");
    ref.between = reduce_weight.size(0);
    STD_TORCH_CHECK(ref.between >= 1, "effops: reduce_weight must have at least one output channel");
    check_sizes(reduce_weight, input, ref.between, channels, 1, 1, "reduce_weight");
    check_sizes(expand_weight, input, channels, ref.between, 1, 1, "expand_weight");
    weights_[0] = dense(reduce_weight);
    weights_[1] = dense(expand_weight);
    ref.reduce_weight = weights_[0]->const_data_ptr();
    ref.expand_weight = weights_[1]->const_data_ptr();
    ref.reduce_bias = channel_ref(reduce_bias, input, ref.between, "reduce_bias");
    ref.expand_bias = channel_ref(expand_bias, input, channels, "expand_bias");
    ref.activation = read_activation(activation);
    ref.gate = read_activation(gate);
    STD_TORCH_CHECK(ref.gate == Activation::sigmoid || ref.gate == Activation::hardsigmoid,
                    "effops: the gate must be sigmoid or hardsigmoid, got activation code ", gate);
  }
  Excitation() = default;

  ExcitationRef ref;

 private:
  std::array<OptionalTensor, 2> weights_;
};

// The gradients of its four tensors, whose bits start at `first`.
inline ExcitationGrads excitation_grads(GradList& grads, int first, const Tensor& reduce_weight,
                                        const OptionalTensor& reduce_bias, const Tensor& expand_weight,
                                        const OptionalTensor& expand_bias) {
  ExcitationGrads result;
  result.reduce_weight = grads.dense(first, reduce_weight);
  result.reduce_bias = grads.channel(first + 1, reduce_bias, result.reduce_bias_dtype, "reduce_bias");
  result.expand_weight = grads.dense(first + 2, expand_weight);
  result.expand_bias = grads.channel(first + 3, expand_bias, result.expand_bias_dtype, "expand_bias");
  return result;
}

template <class Kernels>
struct SeBindings {
  static SeForwardArgs forward_args(const Tensor& input, const Excitation& excitation) {
    SeForwardArgs args;
    args.N = input.size(0), args.C = input.size(1), args.H = input.size(2), args.W = input.size(3);
    args.input = tensor_ref(input);
    args.excitation = excitation.ref;
    return args;
  }

  static Excitation checked_excitation(const Tensor& input, const Tensor& reduce_weight,
                                       const OptionalTensor& reduce_bias, const Tensor& expand_weight,
                                       const OptionalTensor& expand_bias, const Ints& geometry) {
    check_map(Kernels::checked(input), input, "input");
    STD_TORCH_CHECK(input.size(1) >= 1 && input.size(2) >= 1 && input.size(3) >= 1,
                    "effops::se: input must not be empty except along the batch");
    STD_TORCH_CHECK(geometry.size() == 3, "effops::se: geometry must hold 3 integers, got ", geometry.size());
    return Excitation(input, input.size(1), reduce_weight, reduce_bias, expand_weight, expand_bias, geometry[1],
                      geometry[2]);
  }

  static Tensor forward(const Tensor& input, const Tensor& reduce_weight, const OptionalTensor& reduce_bias,
                        const Tensor& expand_weight, const OptionalTensor& expand_bias, const OptionalTensor& sums,
                        const Ints& geometry) {
    const Excitation excitation =
        checked_excitation(input, reduce_weight, reduce_bias, expand_weight, expand_bias, geometry);
    SeForwardArgs args = forward_args(input, excitation);
    OptionalTensor dense_sums;
    if (sums.has_value()) {
      dense_sums = sums_of(*sums, input, args.C);
      args.sums = dense_sums->const_data_ptr();
    }
    Tensor output = new_map(input, args.N, args.C, args.H, args.W, geometry[0] != 0);
    args.output = tensor_ref(output);
    Kernels::se_fwd(input, args);
    return output;
  }

  static std::vector<Tensor> backward(const Tensor& grad_output, const Tensor& input, const Tensor& reduce_weight,
                                      const OptionalTensor& reduce_bias, const Tensor& expand_weight,
                                      const OptionalTensor& expand_bias, const Ints& geometry, std::int64_t mask) {
    const Excitation excitation =
        checked_excitation(input, reduce_weight, reduce_bias, expand_weight, expand_bias, geometry);
    SeBackwardArgs args;
    args.forward = forward_args(input, excitation);
    const SeForwardArgs& forward = args.forward;
    check_sizes(grad_output, input, forward.N, forward.C, forward.H, forward.W, "grad_output");
    args.grad_output = tensor_ref(grad_output);
    GradList grads(mask, 5);
    args.grad_input = grads.map(0, input, geometry[0] != 0);
    args.grads = excitation_grads(grads, 1, reduce_weight, reduce_bias, expand_weight, expand_bias);
    Kernels::se_bwd(input, args);
    return grads.take();
  }
};

}  // namespace effops
