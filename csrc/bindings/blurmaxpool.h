// Bindings of room blurmaxpool: `Kernels` says which kernels run, on which device (csrc/cpu/bindings.cpp has an
// example).
#pragma once

#include "csrc/bindings/binding.h"

namespace effops {

template <class Kernels>
struct BlurMaxPoolBindings {
  static constexpr std::size_t kGeometry = 9;
  static constexpr index_t kMaxSize = 7;  // of the filter
  static constexpr index_t kLimit = (index_t{1} << 31) - 1;

  static BlurMaxPoolArgs check(const Tensor& input, const Ints& g, const char* op) {
    check_map(Kernels::checked(input), input, "input");
    STD_TORCH_CHECK(g.size() == kGeometry, "effops::", op, ": geometry must hold ", kGeometry, " integers, got ",
                    g.size());
    for (std::size_t i = 0; i < kGeometry; ++i) {
      STD_TORCH_CHECK(g[i] >= (i < 5 ? 1 : 0) && g[i] <= kLimit, "effops::", op, ": geometry[", i, "] = ", g[i],
                      " is out of range");
    }
    STD_TORCH_CHECK(g[2] <= kMaxSize, "effops::", op, ": the blur's size must be at most ", kMaxSize, ", got ", g[2]);
    STD_TORCH_CHECK(2 * g[5] <= g[3] && 2 * g[6] <= g[4], "effops::", op,
                    ": the pool's padding must be at most half of its window");
    const auto x = input.sizes();
    for (int i = 1; i < 4; ++i) {
      STD_TORCH_CHECK(x[i] >= 1 && x[i] <= kLimit, "effops::", op,
                      ": channels, height and width must be from 1 to 2^31 - 1");
    }
    BlurMaxPoolArgs a;
    a.N = x[0], a.C = x[1], a.H = x[2], a.W = x[3];
    a.stride_h = g[0], a.stride_w = g[1], a.size = g[2];
    a.window_h = g[3], a.window_w = g[4], a.pool_top = g[5], a.pool_left = g[6];
    a.reflect = g[7] != 0;
    a.Hp = a.H + 2 * a.pool_top - a.window_h + 1;
    a.Wp = a.W + 2 * a.pool_left - a.window_w + 1;
    STD_TORCH_CHECK(a.Hp >= 1 && a.Wp >= 1, "effops::", op, ": the pool's window is larger than the padded input");
    const index_t behind = a.size / 2;
    STD_TORCH_CHECK(!a.reflect || (behind < a.Hp && behind < a.Wp), "effops::", op, ": a reflection needs more than ",
                    behind, " rows and columns");
    a.P = (a.Hp - 1) / a.stride_h + 1;  // the padding is one less than the filter
    a.Q = (a.Wp - 1) / a.stride_w + 1;
    a.input = tensor_ref(input);
    return a;
  }

  static Tensor forward(const Tensor& input, const Ints& geometry) {
    BlurMaxPoolArgs args = check(input, geometry, "blur_max_pool_fwd");
    Tensor output = new_map(input, args.N, args.C, args.P, args.Q, geometry[8] != 0);
    args.output = tensor_ref(output);
    Kernels::blur_max_pool_fwd(input, args);
    return output;
  }

  static Tensor backward(const Tensor& grad_output, const Tensor& input, const Ints& geometry) {
    BlurMaxPoolArgs args = check(input, geometry, "blur_max_pool_bwd");
    check_sizes(grad_output, input, args.N, args.C, args.P, args.Q, "grad_output");
    args.output = tensor_ref(grad_output);
    Tensor grad_input = new_map(input, args.N, args.C, args.H, args.W, geometry[8] != 0);
    args.grad_input = tensor_ref(grad_input);
    Kernels::blur_max_pool_bwd(input, args);
    return grad_input;
  }
};

}  // namespace effops
