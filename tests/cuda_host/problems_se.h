// Problems of room se.
#pragma once

#include "tests/cuda_host/problems.h"

namespace effops::problems {

struct GatedLayer : Layer {
  index_t between;
  bool biases;

  ExcitationRef excitation(Memory& m) const {
    ExcitationRef e;
    e.reduce_weight = m.input(between * g.C, dtype());
    e.expand_weight = m.input(between * g.C, dtype());
    if (biases) e.reduce_bias = vector(m, between), e.expand_bias = vector(m, g.C);
    e.between = between;
    e.activation = biases ? Activation::silu : Activation::relu;
    e.gate = biases ? Activation::sigmoid : Activation::hardsigmoid;
    return e;
  }
  SeForwardArgs arguments(Memory& m) const { return {g.N, g.C, g.H, g.W, read_map(m, g.C, g.H), {}, excitation(m)}; }

  void forward(Memory& m, const Device& device) const {
    SeForwardArgs args = arguments(m);
    args.output = written_map(m, g.C, g.H);
    cuda::se_fwd(dtype(), args, device, m.scratch(cuda::se_fwd_scratch(dtype(), args, device)), nullptr);
  }

  void backward(Memory& m, const Device& device) const {
    SeBackwardArgs args{arguments(m), read_map(m, g.C, g.H), written_map(m, g.C, g.H), {}};
    args.grads.reduce_weight = m.output(between * g.C, dtype());
    args.grads.expand_weight = m.output(between * g.C, dtype());
    if (biases) {
      args.grads.reduce_bias = m.output(between, dtype()), args.grads.expand_bias = m.output(g.C, dtype());
      args.grads.reduce_bias_dtype = args.grads.expand_bias_dtype = dtype();
    }
    cuda::se_bwd(dtype(), args, device, m.scratch(cuda::se_bwd_scratch(dtype(), args, device)), nullptr);
  }
};

inline void visit_se(std::span<const Maps> sizes, const Visit& visit) {
  const Window none{1, 1, 1};
  for (const Type& type : kTypes) {
    for (const Maps& maps : sizes) {
      for (const index_t between : {3, 40}) {
        for (const bool channels_last : {false, true}) {
          const GatedLayer layer{
              {type, geometry(maps, none, 1), channels_last, Epilogue::none}, between, between == 40};
          const std::string name = " " + layer.name() + " through " + std::to_string(between);
          visit("se_fwd" + name, [=](Memory& m, const Device& device) { layer.forward(m, device); });
          visit("se_bwd" + name, [=](Memory& m, const Device& device) { layer.backward(m, device); });
        }
      }
    }
  }
}

}  // namespace effops::problems
