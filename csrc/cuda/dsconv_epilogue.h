// The epilogue of a tile of sums backwards, and the sums over its pixels that the gradients of bias, scale and shift
// are made of: a line of partial results a tile, added by sum.h.
#pragma once

#include "csrc/cuda/dsconv_pointwise.h"

namespace effops::cuda {

// post(act(u) * scale + shift + residual) backwards at one place of a map. pixel, c: of the result.
template <int V, class T>
struct EpilogueBackward {
  using C = compute<T>;
  const EpilogueRef& e;
  const Map<T>& residual_grad;

  // g: the gradient of the result, then of u = conv + bias. terms: what the vectors' gradients sum.
  EFFOPS_DEVICE void run(const Pixel& pixel, int c, const C (&u)[V], C (&g)[V], C (&terms)[kAffine][V]) const {
    C residual[V] = {};
    if (e.post != Activation::none && e.residual.data != nullptr) {
      const TensorRef& r = e.residual;
      load_channels<V>(Map<const T>{static_cast<const T*>(r.data), r.n, r.c, r.h, r.w}.at(pixel.n, c, pixel.p, pixel.q),
                       residual);
    }
    EpilogueTerms<C, V> found;
    epilogue_gradient<T>(e, c, u, residual, g, found);
    if (residual_grad.data != nullptr) {
      store_channels<V>(residual_grad.at(pixel.n, c, pixel.p, pixel.q), found.residual);
    }
    EFFOPS_UNROLL
    for (int j = 0; j < V; ++j) {
      terms[0][j] = g[j];
      terms[1][j] = found.scale[j];
      terms[2][j] = found.residual[j];
    }
  }
};

// Where the sums over a tile's pixels go: [tiles][bias, scale, shift][channels]; null: nobody asked for them.
template <class C>
struct Partial {
  C* data;
  int channels;
};

// Lines of [bias, scale, shift][N] that walk_and_sum needs.
template <int V, int N>
constexpr int kSumLines = kThreads / (N / V) > kSlots / kWarp ? kThreads / (N / V) : kSlots / kWarp;

// f(slot, column, terms) for a tile of N columns, and the terms' sums over its pixels: a thread's, or a warp's along
// the pixels, to `lines`; their sum to `partial`.
template <int V, int N, class C, class F>
EFFOPS_DEVICE void walk_and_sum(bool by_pixel, C* lines, const Partial<C>& partial, int tile, int first, const F& f) {
  constexpr int kLine = kAffine * N, kGroups = N / V;
  C sums[kAffine][V] = {};
  walk_tile<V, N>(by_pixel, [&](int slot, int column) {
    C terms[kAffine][V] = {};
    f(slot, column, terms);
    EFFOPS_UNROLL
    for (int i = 0; i < kAffine; ++i) {
      EFFOPS_UNROLL
      for (int j = 0; j < V; ++j) sums[i][j] = (V == 1 && by_pixel ? C(0) : sums[i][j]) + terms[i][j];
    }
    if constexpr (V == 1) {
      if (!by_pixel || partial.data == nullptr) return;
      EFFOPS_UNROLL
      for (int i = 0; i < kAffine; ++i) {
        C sum = sums[i][0];
        EFFOPS_UNROLL
        for (int mask = kWarp / 2; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
        if (slot % kWarp == 0) lines[slot / kWarp * kLine + i * N + column] = sum;
      }
    }
  });
  if (partial.data == nullptr) return;
  if (!by_pixel) {
    C* line = lines + static_cast<int>(threadIdx.x) / kGroups * kLine + static_cast<int>(threadIdx.x) % kGroups * V;
    EFFOPS_UNROLL
    for (int i = 0; i < kAffine; ++i) {
      EFFOPS_UNROLL
      for (int j = 0; j < V; ++j) line[i * N + j] = sums[i][j];
    }
  }
  barrier();
  const int count = by_pixel ? kSlots / kWarp : kThreads / kGroups;
  for (int i = threadIdx.x; i < kLine; i += kThreads) {
    const int channel = first + i % N;
    if (channel >= partial.channels) continue;
    C sum = lines[i];
    for (int line = 1; line < count; ++line) sum += lines[line * kLine + i];
    partial.data[(static_cast<index_t>(tile) * kAffine + i / N) * partial.channels + channel] = sum;
  }
}

}  // namespace effops::cuda
