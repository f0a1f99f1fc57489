// Problems of room blurmaxpool.
#pragma once

#include "tests/cuda_host/problems.h"

namespace effops::problems {

struct Pooling {
  index_t window, padding, filter, stride;
  bool reflect;
};
// mosaicml's, Zhang's behind ResNet's stem, and one that is unlike either.
inline constexpr Pooling kPoolings[] = {{2, 0, 3, 2, false}, {3, 1, 4, 2, true}, {4, 2, 5, 1, true}};

struct PooledLayer : Layer {
  Pooling pooling;

  BlurMaxPoolArgs arguments(Memory& m) const {
    const index_t pooled = g.H + 2 * pooling.padding - pooling.window + 1, size = (pooled - 1) / pooling.stride + 1;
    BlurMaxPoolArgs args{};
    args.N = g.N, args.C = g.C, args.H = g.H, args.W = g.W;
    args.Hp = args.Wp = pooled, args.P = args.Q = size;
    args.stride_h = args.stride_w = pooling.stride, args.size = pooling.filter;
    args.window_h = args.window_w = pooling.window, args.pool_top = args.pool_left = pooling.padding;
    args.reflect = pooling.reflect;
    args.input = read_map(m, g.C, g.H);
    return args;
  }

  void forward(Memory& m, const Device& device) const {
    BlurMaxPoolArgs args = arguments(m);
    args.output = written_map(m, g.C, args.P);
    cuda::blur_max_pool_fwd(dtype(), args, device, nullptr);
  }

  void backward(Memory& m, const Device& device) const {
    BlurMaxPoolArgs args = arguments(m);
    args.output = read_map(m, g.C, args.P);
    args.grad_input = written_map(m, g.C, g.H);
    cuda::blur_max_pool_bwd(dtype(), args, device, nullptr);
  }
};

inline void visit_blurmaxpool(std::span<const Maps> sizes, const Visit& visit) {
  for (const Type& type : kTypes) {
    for (const Maps& maps : sizes) {
      for (const Pooling& pooling : kPoolings) {
        for (const bool channels_last : {false, true}) {
          const PooledLayer layer{{type, geometry(maps, {1, 1, 1}, 1), channels_last, Epilogue::none}, pooling};
          const std::string name = " " + layer.name() + " pool " + std::to_string(pooling.window);
          visit("blur_max_pool_fwd" + name, [=](Memory& m, const Device& device) { layer.forward(m, device); });
          visit("blur_max_pool_bwd" + name, [=](Memory& m, const Device& device) { layer.backward(m, device); });
        }
      }
    }
  }
}

}  // namespace effops::problems
