// Problems of room dsconv.
#pragma once

#include "tests/cuda_host/problems.h"

namespace effops::problems {

struct SeparableLayer : Layer {
  // The pointwise half: K channels from the depthwise ones and `passthrough` others.
  DsconvForwardArgs arguments(Memory& m, index_t K, index_t passthrough, bool tf32) const {
    DsconvForwardArgs args{};
    args.g = g;
    args.passthrough_channels = passthrough;
    args.K = K;
    args.tf32 = tf32;
    args.input = read_map(m, g.C, g.H);
    if (passthrough) args.passthrough = read_map(m, passthrough, g.P);
    args.dw_weight = weight(m);
    args.dw_epilogue = epilogue(m, D());
    args.pw_weight = m.input(K * (passthrough + D()), dtype());
    args.pw_stride_k = passthrough + D();
    args.pw_stride_c = 1;
    args.pw_epilogue = epilogue(m, K);
    return args;
  }

  void forward(Memory& m, const Device& device, index_t K, index_t passthrough, bool tf32) const {
    DsconvForwardArgs args = arguments(m, K, passthrough, tf32);
    args.output = written_map(m, K, g.P);
    cuda::dsconv_fwd(dtype(), args, device, nullptr);
  }

  void backward(Memory& m, const Device& device, index_t K, index_t passthrough, bool tf32) const {
    DsconvBackwardArgs args{arguments(m, K, passthrough, tf32), read_map(m, K, g.P), written_map(m, g.C, g.H), {}};
    args.forward.output = saved_output(m, K);
    if (passthrough) args.grad_passthrough = written_map(m, passthrough, g.P);
    args.grad_dw_weight = m.output(g.bank * g.R * g.S, dtype());
    args.grad_pw_weight = m.output(K * (passthrough + D()), dtype());
    args.dw_grads = gradients(m, D());
    args.pw_grads = gradients(m, K);
    void* scratch = m.scratch(cuda::dsconv_bwd_scratch(dtype(), args, device));
    cuda::dsconv_bwd(dtype(), args, device, scratch, nullptr);
  }
};

inline void visit_separable(const Layer& plain, const Visit& visit) {
  const SeparableLayer layer{plain};
  for (index_t K : {16, 72, 256}) {
    const index_t passthrough = K == 16 ? 0 : layer.g.C;
    for (bool tf32 : {false, true}) {
      if (tf32 && layer.dtype() != DType::f32) continue;
      using M = Memory&;
      using V = const Device&;
      const std::string name = " " + layer.name() + " to " + std::to_string(K) + (tf32 ? " tf32" : "");
      visit("dsconv_fwd" + name, [&](M m, V device) { layer.forward(m, device, K, passthrough, tf32); });
      visit("dsconv_bwd" + name, [&](M m, V device) { layer.backward(m, device, K, passthrough, tf32); });
    }
  }
}

inline void visit_dsconv(std::span<const Maps> sizes, const Visit& visit) {
  // In float32 at stride 2: blocks have one patch, which two blocks of channels fill in turn.
  const Maps one_patch{1, 40, 17};
  visit_separable({kTypes[0], geometry(one_patch, {3, 2, 1}, 1), true, Epilogue::full}, visit);
  for_each_layer(sizes, [&](const Layer& layer) { visit_separable(layer, visit); });
}

}  // namespace effops::problems
