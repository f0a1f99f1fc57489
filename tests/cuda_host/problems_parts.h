// Problems of room dsconv with several windows side by side.
#pragma once

#include <vector>

#include "tests/cuda_host/problems.h"

namespace effops::problems {

// Layer::g has the largest window.
struct PartsLayer : Layer {
  std::vector<index_t> sizes;  // of the windows
  bool split;                  // channels are the parts' own
  index_t K;

  // With the weights; `of_gradients`: and room for their gradients.
  std::vector<DepthwisePartArgs> parts(Memory& m, bool of_gradients) const {
    std::vector<DepthwisePartArgs> found;
    const index_t count = static_cast<index_t>(sizes.size());
    index_t channel = 0;
    for (index_t i = 0; i < count; ++i) {
      DepthwiseGeometry own = geometry({g.N, g.C, g.H}, {sizes[i], g.stride_h, g.dilation_h}, 1);
      if (split) own.C = i + 1 < count ? g.C / count : g.C - channel;
      own.bank = own.C;
      const index_t elements = own.C * own.R * own.S;
      found.push_back({own, m.input(elements, dtype()), channel});
      if (of_gradients) found.back().grad_weight = m.output(elements, dtype());
      if (split) channel += own.C;
    }
    return found;
  }
  index_t columns() const { return split ? g.C : g.C * static_cast<index_t>(sizes.size()); }

  DsconvForwardArgs arguments(Memory& m, const std::vector<DepthwisePartArgs>& parts) const {
    DsconvForwardArgs args{};
    args.g = g;
    args.parts = parts.data();
    args.num_parts = static_cast<index_t>(parts.size());
    args.K = K;
    args.input = read_map(m, g.C, g.H);
    args.dw_epilogue = epilogue(m, columns());
    args.dw_epilogue.residual = {};
    args.pw_weight = m.input(K * columns(), dtype());
    args.pw_stride_k = columns();
    args.pw_stride_c = 1;
    args.pw_epilogue = epilogue(m, K);
    return args;
  }

  void forward(Memory& m, const Device& device) const {
    const std::vector<DepthwisePartArgs> windows = parts(m, false);
    DsconvForwardArgs args = arguments(m, windows);
    args.output = written_map(m, K, g.P);
    cuda::dsconv_fwd(dtype(), args, device, nullptr);
  }

  void backward(Memory& m, const Device& device) const {
    const std::vector<DepthwisePartArgs> windows = parts(m, true);
    DsconvBackwardArgs args{arguments(m, windows), read_map(m, K, g.P), written_map(m, g.C, g.H), {}};
    args.forward.output = saved_output(m, K);
    args.grad_pw_weight = m.output(K * columns(), dtype());
    args.dw_grads = vector_gradients(m, columns());
    args.pw_grads = gradients(m, K);
    cuda::dsconv_bwd(dtype(), args, device, m.scratch(cuda::dsconv_bwd_scratch(dtype(), args, device)), nullptr);
  }

  EpilogueGrads vector_gradients(Memory& m, index_t channels) const {
    EpilogueGrads grads;
    grads.bias_dtype = grads.scale_dtype = grads.shift_dtype = dtype();
    if (kind != Epilogue::none) grads.bias = m.output(channels, dtype());
    if (kind != Epilogue::full) return grads;
    grads.scale = m.output(channels, dtype());
    grads.shift = m.output(channels, dtype());
    return grads;
  }
};

inline void visit_part_layer(const PartsLayer& layer, const Visit& visit) {
  std::string name = " " + layer.name() + (layer.split ? " split" : " shared");
  for (const index_t size : layer.sizes) name += " " + std::to_string(size);
  name += " to " + std::to_string(layer.K);
  visit("dsconv_parts_fwd" + name, [&](Memory& m, const Device& device) { layer.forward(m, device); });
  visit("dsconv_parts_bwd" + name, [&](Memory& m, const Device& device) { layer.backward(m, device); });
}

inline void visit_parts(std::span<const Maps> maps, const Visit& visit) {
  // Blocks of float32 have one patch here, which blocks of channels fill in turn, each for two windows.
  const Layer one_patch{kTypes[0], geometry({1, 40, 17}, {3, 2, 1}, 1), true, Epilogue::full};
  visit_part_layer({one_patch, {3, 1}, false, 16}, visit);
  for (const Type& type : kTypes) {
    for (const Maps& size : maps) {
      for (int way = 0; way < 12; ++way) {
        const Window largest = way % 3 == 0 ? Window{7, 1, 1} : way % 3 == 1 ? Window{5, 2, 1} : Window{3, 1, 2};
        const std::vector<index_t> sizes =
            way % 3 == 0 ? std::vector<index_t>{3, 5, 7} : std::vector<index_t>{largest.size, 1};
        const Layer layer{type, geometry(size, largest, 1), way % 2 == 1, static_cast<Epilogue>(way / 4)};
        const index_t K = way % 3 == 0 ? 72 : way % 3 == 1 ? 256 : 16;
        for (const bool split : {false, true}) visit_part_layer({layer, sizes, split, K}, visit);
      }
    }
  }
}

}  // namespace effops::problems
