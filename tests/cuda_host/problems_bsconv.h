// Problems of room bsconv.
#pragma once

#include "tests/cuda_host/problems.h"

namespace effops::problems {

// The layer's depthwise channels are its outputs; it reads `inputs` channels, by way of `between` where that is not 0.
struct BlueprintLayer : Layer {
  index_t inputs, between;

  PointwiseRef pointwise(Memory& m, index_t from, index_t to) const {
    return {m.input(from * to, dtype()), from, 1, from, to, {}};
  }

  BsconvForwardArgs arguments(Memory& m) const {
    BsconvForwardArgs args{};
    args.g = g;
    args.input = read_map(m, inputs, g.H);
    if (between) {
      args.mid = pointwise(m, inputs, between);
      args.mid.epilogue.scale = vector(m, between);
    }
    args.pw = pointwise(m, between ? between : inputs, g.C);
    args.pw.epilogue = epilogue(m, g.C);
    args.pw.epilogue.residual = {};
    args.dw_weight = weight(m);
    args.epilogue = epilogue(m, g.C);
    return args;
  }

  void forward(Memory& m, const Device& device) const {
    BsconvForwardArgs args = arguments(m);
    args.output = written_map(m, g.C, g.P);
    void* scratch = m.scratch(cuda::bsconv_fwd_scratch(dtype(), args, device));
    cuda::bsconv_fwd(dtype(), args, device, scratch, nullptr);
  }

  void backward(Memory& m, const Device& device) const {
    BsconvBackwardArgs args{};
    args.forward = arguments(m);
    args.forward.output = saved_output(m, g.C);
    args.grad_output = read_map(m, g.C, g.P);
    args.grad_input = written_map(m, inputs, g.H);
    if (between) {
      args.grad_mid_weight = m.output(inputs * between, dtype());
      args.mid_grads.scale = m.output(between, dtype());
      args.mid_grads.scale_dtype = dtype();
    }
    args.grad_pw_weight = m.output((between ? between : inputs) * g.C, dtype());
    args.pw_grads = vector_gradients(m, g.C);
    args.grad_dw_weight = m.output(g.bank * g.R * g.S, dtype());
    args.grads = gradients(m, g.C);
    void* scratch = m.scratch(cuda::bsconv_bwd_scratch(dtype(), args, device));
    cuda::bsconv_bwd(dtype(), args, device, scratch, nullptr);
  }
};

inline void visit_blueprint(const BlueprintLayer& layer, const Visit& visit) {
  const std::string name = " " + layer.name() + " from " + std::to_string(layer.inputs) +
                           (layer.between ? " by " + std::to_string(layer.between) : "");
  visit("bsconv_fwd" + name, [&](Memory& m, const Device& device) { layer.forward(m, device); });
  visit("bsconv_bwd" + name, [&](Memory& m, const Device& device) { layer.backward(m, device); });
}

inline void visit_bsconv(std::span<const Maps> sizes, const Visit& visit) {
  // A patch that no shared memory has room for: the expanded map goes through memory.
  for (const Type& type : kTypes) {
    visit_blueprint({{type, geometry({1, 8, 8}, {3, 1, 60}, 1), true, Epilogue::relu}, 16, 0}, visit);
  }
  for_each_layer(sizes, [&](const Layer& layer) {
    if (layer.g.multiplier > 1) return;
    for (index_t inputs : {24, 130}) visit_blueprint({layer, inputs, inputs == 24 ? 0 : 12}, visit);
  });
}

}  // namespace effops::problems
