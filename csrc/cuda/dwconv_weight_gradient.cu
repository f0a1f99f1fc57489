// Room dwconv: the weight gradient.
//
//   channels_last: a block owns up to 32 pairs of channels and a share of the strips of the batch; a thread walks along
//   one strip after the other as the forward pass does (window.h: Walk).
//
//        lanes: channels ->          x          du
//        +--+--+--+- ... -+         . . . +
//      s |  |  |  |       |         . . . +     + +     the columns of du that the column of x meets, the newest of
//      t +--+--+--+- ... -+         . . . +     + +     which is loaded: Rows + 2 and Rows accesses in flight
//      r |  |  |  |       |         . . . +
//      i +--+--+--+- ... -+
//      p          |                 in registers: the sums of all taps (18 for 3x3), 3 columns x Rows x 2 of du
//      s          v
//        partial [line of the block][taps][D]  --> sum.h, in a fixed order --> grad_weight [bank, R, S]
//
//   NCHW and other windows: one channel a thread, its pixel lanes over the pixels; nine taps at a time, du read again
//   for each group of nine.
//
//   bytes an output (fp16)    x 2, du 2 (of the batch statistics: float32, 4)
//
// Roofline, calculated for an H200 (4.3 TB/s), nothing measured: float16 [128, 128, 56, 56], 3x3, stride 1: 206 MB,
// 48 us; [128, 512, 14, 14]: 51 MB, 12 us. The partial results are smaller than 1% of either. Unverified on a GPU.
#include "csrc/cuda/dwconv.h"
#include "csrc/cuda/dwconv_tile.h"

namespace effops::cuda {
namespace {

// ---- weight gradient ----

template <class D, class T>
struct WeightGradient {
  Map<const D> du;
  Map<const T> x;
  compute<T>* partial;  // [lines][taps][D]
  Sizes g;
  Units units;
  Shares shares;
};

// All taps of a thread's channels in registers; x and du are loaded once a strip.
template <class D, class T, class Window, int Rows, int N, int Blocks>
EFFOPS_KERNEL(kThreads, Blocks)
weight_gradient_kernel(EFFOPS_PARAMS WeightGradient<D, T> a) {
  using C = compute<T>;
  constexpr int kOpen = Walk<Window, Rows>::kOpen;
  const Share share = share_of<N>(a.shares);
  const int o = share.channel;
  C sums[Window::kTaps][N] = {};
  for_each_cell(share, a.units, a.g.Q, [&](const Cell& cell) {
    const unsigned du_rows = rows_inside<Rows>(cell.p, a.g.P);
    const D* at = a.du.at(cell.n, o, cell.p, cell.q);
    C du[kOpen][Rows][N] = {};  // the columns that the next column of x reaches, the newest first
    Walk<Window, Rows>::template along<N>(
        a.x, o, a.g, cell,
        [&](int step) {
          Column<Rows, N, D> newest;
          newest.load(at, row_stride_of(a.du), step + kOpen - 1 < cell.count ? du_rows : 0u);
          at += a.du.w;
          EFFOPS_UNROLL
          for (int output = 0; output < Rows; ++output) {
            EFFOPS_UNROLL
            for (int open = kOpen - 1; open > 0; --open) {
              EFFOPS_UNROLL
              for (int j = 0; j < N; ++j) du[open][output][j] = du[open - 1][output][j];
            }
            newest.values(output, du[0][output]);
          }
        },
        [&](int open, int output, int tap, const C(&values)[N]) {
          EFFOPS_UNROLL
          for (int j = 0; j < N; ++j) sums[tap][j] += values[j] * du[open][output][j];
        },
        [](int) {});
  });
  EFFOPS_UNROLL
  for (int t = 0; t < Window::kTaps; ++t) {
    block_sums(a.shares.lanes, t, sums[t]);
    write_partial(a.partial, a.shares, share, Window::kTaps, t, a.g.D, sums[t]);
  }
}

// Any window, one channel a thread: as many taps at a time as a 3x3 window has; du is read again for every group.
constexpr int kTapGroup = 9;

template <class D, class T, int Blocks>
EFFOPS_KERNEL(kThreads, Blocks)
weight_gradient_any_kernel(EFFOPS_PARAMS WeightGradient<D, T> a) {
  using C = compute<T>;
  const Share share = share_of<1>(a.shares);
  const int o = share.channel, taps = a.g.R * a.g.S;
  for (int first = 0; first < taps; first += kTapGroup) {
    C sums[kTapGroup][1] = {};
    int down[kTapGroup], right[kTapGroup];
    EFFOPS_UNROLL
    for (int k = 0; k < kTapGroup; ++k) {
      const int r = (first + k) / a.g.S, s = first + k - r * a.g.S;
      down[k] = first + k < taps ? r * a.g.dilation_h : a.g.H + a.g.pad_top;  // outside wherever the window is
      right[k] = s * a.g.dilation_w;
    }
    for_each_cell(share, a.units, a.g.Q, [&](const Cell& cell) {
      const C du = to_compute(*a.du.at(cell.n, o, cell.p, cell.q));
      const T* image = a.x.at(cell.n, o / a.g.multiplier, 0, 0);
      const int row = cell.p * a.g.stride_h - a.g.pad_top, column = cell.q * a.g.stride_w - a.g.pad_left;
      EFFOPS_UNROLL
      for (int k = 0; k < kTapGroup; ++k) {
        const int h = row + down[k], w = column + right[k];
        if (inside(h, a.g.H) && inside(w, a.g.W)) sums[k][0] += du * to_compute(image[h * a.x.h + w * a.x.w]);
      }
    });
    EFFOPS_UNROLL
    for (int k = 0; k < kTapGroup; ++k) {
      if (first + k >= taps) break;
      block_sums(a.shares.lanes, first + k, sums[k]);
      write_partial(a.partial, a.shares, share, taps, first + k, a.g.D, sums[k]);
    }
  }
}

template <class D, class T>
Choice<WeightGradient<D, T>> choose_weight_gradient(const DepthwiseGeometry& g, const Access& access) {
  if constexpr (kHasPairs<T>) {
    if (access.pairs() && access.windows()) {
      if (Window3::fits(g)) return {{2, kPair, 4, Walks::along}, weight_gradient_kernel<D, T, Window3, 2, kPair, 4>};
      if (Window3Half::fits(g))
        return {{1, kPair, 4, Walks::along}, weight_gradient_kernel<D, T, Window3Half, 1, kPair, 4>};
      if (Window5::fits(g)) return {{2, kPair, 2, Walks::along}, weight_gradient_kernel<D, T, Window5, 2, kPair, 2>};
      if (Window5Half::fits(g))
        return {{1, kPair, 2, Walks::along}, weight_gradient_kernel<D, T, Window5Half, 1, kPair, 2>};
    }
  }
  return {{1, 1, kBlocks<T>}, weight_gradient_any_kernel<D, T, kBlocks<T>>};
}

template <class D, class T>
struct WeightPlan {
  Choice<WeightGradient<D, T>> choice;
  Units units;
  Shares shares;

  WeightPlan(const DepthwiseGeometry& g, const TensorRef& du, const TensorRef& x, const Device& device) {
    Access access(g);
    access.need(du, sizeof(D));
    access.need(x, sizeof(T));
    choice = choose_weight_gradient<D, T>(g, access);
    units = units_of(sums_of(g), choice, device);
    shares = shares_of(units, g.out_channels(), channels_inside(du), choice, device);
  }
  std::size_t bytes(const DepthwiseGeometry& g) const {
    return partial_bytes<compute<T>>(shares.lines, g.R * g.S, g.out_channels());
  }
};

template <class D, class T>
void weight_gradient(const DepthwiseGeometry& g, const TensorRef& du, const TensorRef& x, const SumTarget& target,
                     const Device& device, void* scratch, Stream stream) {
  using C = compute<T>;
  const WeightPlan<D, T> plan(g, du, x, device);
  const Sizes sizes = sizes_of(g);
  if (plan.shares.lines > 0) {
    const WeightGradient<D, T> params{map_of<const D>(du), map_of<const T>(x), static_cast<C*>(scratch), sizes,
                                      plan.units,          plan.shares};
    launch(plan.choice.kernel, blocks_for(plan.shares, block_sums_bytes<C, kPair>(kThreads)), stream, params);
  }
  sum_weight<C>(scratch, plan.shares.lines, sizes.R * sizes.S, sizes.D, sizes.bank, target, stream);
}

}  // namespace

std::size_t depthwise_weight_gradient_scratch(DType dtype, const DepthwiseGeometry& g, const Gradient& du,
                                              const TensorRef& input, const Device& device) {
  return with_types(du.dtype, dtype, [&](auto gradient, auto element) {
    return WeightPlan<decltype(gradient), decltype(element)>(g, du.map, input, device).bytes(g);
  });
}

void depthwise_weight_gradient_as(DType weight_dtype, DType dtype, const DepthwiseGeometry& g, const Gradient& du,
                                  const TensorRef& input, void* grad_weight, const Device& device, void* scratch,
                                  Stream stream) {
  with_types(du.dtype, dtype, [&](auto gradient, auto element) {
    weight_gradient<decltype(gradient), decltype(element)>(g, du.map, input, {grad_weight, weight_dtype}, device,
                                                           scratch, stream);
  });
}

void depthwise_weight_gradient(DType dtype, const DepthwiseGeometry& g, const Gradient& du, const TensorRef& input,
                               void* grad_weight, const Device& device, void* scratch, Stream stream) {
  depthwise_weight_gradient_as(dtype, dtype, g, du, input, grad_weight, device, scratch, stream);
}

}  // namespace effops::cuda
