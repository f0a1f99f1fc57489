// Problems of room mbconv.
#pragma once

#include "tests/cuda_host/problems.h"

namespace effops::problems {

// The layer's depthwise channels are the expanded ones. inputs == 0: there is no expansion; between == 0: there is no
// squeeze-excite.
struct InvertedResidual : Layer {
  index_t inputs, outputs, between;

  index_t in_channels() const { return inputs ? inputs : g.C; }

  MbconvForwardArgs arguments(Memory& m) const {
    MbconvForwardArgs args{};
    args.g = g;
    args.in_channels = in_channels();
    args.K = outputs;
    args.input = read_map(m, in_channels(), g.H);
    if (inputs) {
      args.expand = {m.input(g.C * inputs, dtype()), inputs, 1};
      args.expand_epilogue = without_residual(m, g.C);
    }
    args.dw_weight = weight(m);
    args.dw_epilogue = without_residual(m, g.C);
    if (between) {
      ExcitationRef& e = args.excitation;
      e = {m.input(between * g.C, dtype()), m.input(g.C * between, dtype()), vector(m, between), vector(m, g.C)};
      e.between = between;
      e.activation = Activation::relu;
      e.gate = Activation::sigmoid;
    }
    args.project = {m.input(outputs * g.C, dtype()), g.C, 1};
    args.epilogue = epilogue(m, outputs);
    return args;
  }

  void forward(Memory& m, const Device& device) const {
    MbconvForwardArgs args = arguments(m);
    args.output = written_map(m, outputs, g.P);
    void* scratch = m.scratch(cuda::mbconv_fwd_scratch(dtype(), args, device));
    cuda::mbconv_fwd(dtype(), args, device, scratch, nullptr);
  }

  void backward(Memory& m, const Device& device) const {
    MbconvBackwardArgs args{};
    args.forward = arguments(m);
    args.grad_output = read_map(m, outputs, g.P);
    args.grad_input = written_map(m, in_channels(), g.H);
    if (inputs) {
      args.grad_expand_weight = m.output(g.C * inputs, dtype());
      args.expand_grads = vector_gradients(m, g.C);
    }
    args.grad_dw_weight = m.output(g.bank * g.R * g.S, dtype());
    args.dw_grads = vector_gradients(m, g.C);
    args.grad_project_weight = m.output(outputs * g.C, dtype());
    args.grads = gradients(m, outputs);
    if (between) {
      args.excitation_grads = {m.output(between * g.C, dtype()),
                               m.output(g.C * between, dtype()),
                               m.output(between, dtype()),
                               m.output(g.C, dtype()),
                               dtype(),
                               dtype()};
    }
    void* scratch = m.scratch(cuda::mbconv_bwd_scratch(dtype(), args, device));
    cuda::mbconv_bwd(dtype(), args, device, scratch, nullptr);
  }

 private:
  EpilogueRef without_residual(Memory& m, index_t channels) const {
    EpilogueRef e = epilogue(m, channels);
    e.residual = {};
    return e;
  }
};

inline void visit_mbconv(std::span<const Maps> sizes, const Visit& visit) {
  struct Widths {
    index_t inputs, outputs, between;
  };
  for_each_layer(sizes, [&](const Layer& layer) {
    if (layer.g.multiplier > 1) return;
    for (const auto& [inputs, outputs, between] :
         {Widths{16, 24, 0}, {16, 48, 0}, {16, 72, 0}, {80, 40, 6}, {0, 24, 6}}) {
      const InvertedResidual block{layer, inputs, outputs, between};
      const std::string name = " " + layer.name() + " from " + std::to_string(inputs) + " to " +
                               std::to_string(outputs) + (between ? " gated" : "");
      visit("mbconv_fwd" + name, [&](Memory& m, const Device& device) { block.forward(m, device); });
      visit("mbconv_bwd" + name, [&](Memory& m, const Device& device) { block.backward(m, device); });
    }
  });
}

}  // namespace effops::problems
