// Problems of room dwconv: learned and fixed windows.
#pragma once

#include "csrc/cuda/banks.h"
#include "tests/cuda_host/problems.h"

namespace effops::problems {

struct DepthwiseLayer : Layer {
  void forward(Memory& m, const Device& device) const {
    const DwconvForwardArgs args{g, read_map(m, g.C, g.H), written_map(m, D(), g.P), weight(m), epilogue(m, D())};
    cuda::dwconv_fwd(dtype(), args, device, nullptr);
  }

  void backward(Memory& m, const Device& device) const {
    const TensorRef output = saved_output(m, D());
    DwconvBackwardArgs args{g, read_map(m, D(), g.P), output, read_map(m, g.C, g.H), weight(m), epilogue(m, D()), {}};
    args.grad_input = written_map(m, g.C, g.H);
    args.grad_weight = m.output(g.bank * g.R * g.S, dtype());
    args.grads = gradients(m, D());
    cuda::dwconv_bwd(dtype(), args, device, m.scratch(cuda::dwconv_bwd_scratch(dtype(), args, device)), nullptr);
  }

  void statistics(Memory& m, const Device& device) const {
    const DType wide = compute_type(dtype());
    const DwconvStatsArgs args{
        g, read_map(m, g.C, g.H), weight(m), vector(m, D()), m.output(D(), wide), m.output(D(), wide)};
    cuda::dwconv_stats(dtype(), args, device, m.scratch(cuda::dwconv_stats_scratch(dtype(), args, device)), nullptr);
  }

  void statistics_backward(Memory& m, const Device& device) const {
    const DType wide = compute_type(dtype());
    const auto one = [&] { return m.input(D(), wide); };
    DwconvStatsBackwardArgs args{g, read_map(m, g.C, g.H), weight(m), vector(m, D()), one(), one(), one(), one(), {}};
    args.grad_input = written_map(m, g.C, g.H);
    args.grad_weight = m.output(g.bank * g.R * g.S, dtype());
    args.grad_bias = m.output(D(), dtype());
    args.grad_bias_dtype = dtype();
    void* scratch = m.scratch(cuda::dwconv_stats_bwd_scratch(dtype(), args, device));
    cuda::dwconv_stats_bwd(dtype(), args, device, scratch, nullptr);
  }
};

// Of a bank whose taps the kernels have as constants.
inline void visit_fixed_banks(std::span<const Maps> sizes, const Visit& visit) {
  for (const Type& type : kTypes) {
    for (const Maps& maps : sizes) {
      for (const cuda::FixedBank& bank : cuda::kFixedBanks) {
        for (const Epilogue kind : {Epilogue::relu, Epilogue::full}) {
          DepthwiseLayer layer{{type, geometry(maps, {bank.size, bank.stride, 1}, 1), true, kind}};
          layer.g.bank = bank.kernels;
          layer.g.named_bank = bank.code;
          const std::string name = layer.name() + " " + bank.name;
          visit("dwconv_fwd " + name, [&](Memory& m, const Device& device) { layer.forward(m, device); });
          visit("dwconv_bwd " + name, [&](Memory& m, const Device& device) { layer.backward(m, device); });
        }
      }
    }
  }
}

inline void visit_dwconv(std::span<const Maps> sizes, const Visit& visit) {
  visit_fixed_banks(sizes, visit);
  for_each_layer(sizes, [&](const Layer& plain) {
    using M = Memory&;
    using V = const Device&;
    const DepthwiseLayer layer{plain};
    const std::string name = " " + layer.name();
    visit("dwconv_fwd" + name, [&](M m, V device) { layer.forward(m, device); });
    visit("dwconv_stats" + name, [&](M m, V device) { layer.statistics(m, device); });
    visit("dwconv_stats_bwd" + name, [&](M m, V device) { layer.statistics_backward(m, device); });
    visit("dwconv_bwd" + name, [&](M m, V device) { layer.backward(m, device); });
  });
}

}  // namespace effops::problems
