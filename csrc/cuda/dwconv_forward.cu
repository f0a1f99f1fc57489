// Room dwconv: the forward pass, which is the input gradient too where that is a convolution of du, at stride 1.
//
//   channels_last: a thread owns two channels of a strip of output pixels, Rows rows high, and walks along it.
//
//        columns of x ->
//        . . . . . +     the column that is loaded: Rows + 2 accesses in flight, 4 bytes each of a float16 map
//        . . . . . +     each element goes into the sums of the columns of y that it reaches (window.h: Walk);
//        . . . . . +     the oldest column is complete, gets its epilogue and is stored
//        . . . . . +
//        . . . . . +     in registers: 18 taps, the open sums (3 columns x Rows x 2), one column of x
//
//      Loads an output: (Rows + 2) / Rows, 1.7 with the three rows of a 3x3 window at stride 1, instead of 9.
//
//   NCHW: a thread owns one column of four rows, its neighbours in a warp the columns beside it.
//
//   bytes an output (fp16)    x 2, y 2, a residual 2
//
// Roofline, calculated for an H200 (4.3 TB/s), nothing measured: float16 [128, 128, 56, 56], 3x3, stride 1: 206 MB,
// 48 us; [128, 512, 14, 14]: 51 MB, 12 us. By hand some 22 instructions an output, 9 of them multiply-adds: the first
// shape issues for about 38 us of those 48, so memory should be the bound, but not by far. Unverified on a GPU.
#include "csrc/cuda/dwconv.h"
#include "csrc/cuda/dwconv_tile.h"

namespace effops::cuda {
namespace {

// ---- forward ----

template <class In, class T>
struct Forward {
  Map<const In> x;
  Map<T> y;
  const T* weight;
  EpilogueRef epilogue;
  Sizes g;
  Units units;
  Assignment assignment;
  bool turned;  // the taps, by half a turn: the gradient of the input at stride 1
};

// An epilogue that is a bias and a clamp, as most layers have it.
inline bool is_clamp(const EpilogueRef& e) {
  const bool clamp =
      e.activation == Activation::none || e.activation == Activation::relu || e.activation == Activation::relu6;
  return clamp && e.post == Activation::none && !e.scale.data && !e.shift.data && !e.residual.data;
}

// Clamp: the epilogue is one, see is_clamp(); such a kernel has registers for more rows.
template <class In, class T, class Window, int Rows, int N, bool Clamp, int Blocks>
EFFOPS_KERNEL(kThreads, Blocks)
forward_kernel(EFFOPS_PARAMS Forward<In, T> a) {
  using C = compute<T>;
  const Owned owned = owned_by(a.assignment, a.units, global_thread());
  if (owned.unit >= a.units.total) return;
  const Cell cell = cell_of(a.units, owned.unit, a.g.Q);
  const int o = owned.group * N, count = a.g.P - cell.p < Rows ? a.g.P - cell.p : Rows;
  C bias[N];
  read_channels<T>(a.epilogue.bias, o, C(0), bias);
  const Depthwise<In, T, Window, Rows, N> sums(a.x, a.weight, a.g, o, a.turned);
  T* y = a.y.at(cell.n, o, cell.p, cell.q);
  sums.run(cell, [&](int q, const C(&u)[Rows][N]) {
    if constexpr (Clamp) {
      const C low = a.epilogue.activation == Activation::none ? C(-INFINITY) : C(0);
      const C high = a.epilogue.activation == Activation::relu6 ? C(6) : C(INFINITY);
      EFFOPS_UNROLL
      for (int i = 0; i < Rows; ++i) {
        C v[N];
        EFFOPS_UNROLL
        for (int j = 0; j < N; ++j) {
          v[j] = u[i][j] + bias[j];
          v[j] = v[j] < low ? low : v[j] > high ? high : v[j];
        }
        if (i < count) store_channels(y + i * row_stride_of(a.y), v);
      }
    } else {
      row_by_row(u, count, [&](int i, const C(&sum)[N]) {
        C v[N], residual[N];
        EFFOPS_UNROLL
        for (int j = 0; j < N; ++j) v[j] = sum[j] + bias[j];
        load_if_present(const_map<T>(a.epilogue.residual), cell.n, o, cell.p + i, q, residual);
        apply_epilogue<T>(a.epilogue, o, residual, v);
        store_channels(y + i * row_stride_of(a.y), v);
      });
    }
    y += a.y.w;
  });
}

// ---- the host's choices ----

template <class In, class T, class Window, int Rows, int N, bool Clamp, int Blocks>
Choice<Forward<In, T>> kernel_for() {
  const bool walks = N > 1 && !std::is_same_v<Window, AnyWindow>;  // lanes that are columns share a window's in L1
  return {{Rows, N, Blocks, walks ? Walks::along : Walks::no}, forward_kernel<In, T, Window, Rows, N, Clamp, Blocks>};
}

// Blurs and binomials at stride 2. Taps that are constants leave room for twice the rows, or twice the blocks.
template <class T>
Choice<Forward<T, T>> choose_fixed(const DepthwiseGeometry& g) {
  using Blur = Fixed<Window3Half, 0>;
  using AlternateBlur = Fixed<Window3Half, 1>;
  using Binomial3 = Fixed<Window3Half, 2>;
  using Binomial5 = Fixed<Window5Half, 3>;
  if (Blur::fits(g)) return kernel_for<T, T, Blur, 4, kPair, true, 4>();
  if (AlternateBlur::fits(g)) return kernel_for<T, T, AlternateBlur, 4, kPair, true, 4>();
  if (Binomial3::fits(g)) return kernel_for<T, T, Binomial3, 4, kPair, true, 4>();
  if (Binomial5::fits(g)) return kernel_for<T, T, Binomial5, 2, kPair, true, 4>();
  return {};
}

// Two channels a thread, walking along a strip. Half of the threads that a multiprocessor has room for, with nothing
// spilled on any architecture, takes 64 registers. What has fewer threads: 5x5 windows, whose taps alone are 50
// registers, and epilogues with exponentials.
template <class T>
Choice<Forward<T, T>> choose_pairs(const DepthwiseGeometry& g, bool windows, bool clamp) {
  if (windows && Window3::fits(g)) {
    return clamp ? kernel_for<T, T, Window3, 3, kPair, true, 4>() : kernel_for<T, T, Window3, 2, kPair, false, 3>();
  }
  if (windows && Window3Half::fits(g)) {
    return clamp ? kernel_for<T, T, Window3Half, 2, kPair, true, 4>()
                 : kernel_for<T, T, Window3Half, 2, kPair, false, 2>();
  }
  if (windows && Window5::fits(g)) {
    return clamp ? kernel_for<T, T, Window5, 2, kPair, true, 2>() : kernel_for<T, T, Window5, 2, kPair, false, 2>();
  }
  if (windows && Window5Half::fits(g)) {
    return clamp ? kernel_for<T, T, Window5Half, 2, kPair, true, 2>()
                 : kernel_for<T, T, Window5Half, 2, kPair, false, 2>();
  }
  return clamp ? kernel_for<T, T, AnyWindow, 1, kPair, true, 4>() : kernel_for<T, T, AnyWindow, 1, kPair, false, 3>();
}

template <class T>
Choice<Forward<T, T>> choose(const DepthwiseGeometry& g, const Access& access, bool clamp) {
  if constexpr (kHasPairs<T>) {
    if (access.pairs() && access.windows() && clamp) {
      const Choice<Forward<T, T>> fixed = choose_fixed<T>(g);
      if (fixed.kernel != nullptr) return fixed;
    }
    if (access.pairs()) return choose_pairs<T>(g, access.windows(), clamp);
    if (access.windows() && Window3::fits(g)) {
      return clamp ? kernel_for<T, T, Window3, 4, 1, true, 4>() : kernel_for<T, T, Window3, 4, 1, false, 3>();
    }
    if (access.windows() && Window3Half::fits(g)) {
      return clamp ? kernel_for<T, T, Window3Half, 2, 1, true, 4>() : kernel_for<T, T, Window3Half, 2, 1, false, 3>();
    }
  }
  return kernel_for<T, T, AnyWindow, 1, 1, false, sizeof(T) == 8 ? 1 : 3>();
}

// ... of the gradient of the input as a convolution of du; without a kernel where the window is not known.
template <class D, class T>
Choice<Forward<D, T>> choose_turned(const DepthwiseGeometry& g, const Access& access) {
  if constexpr (kHasPairs<T>) {
    if (!access.windows()) return {};
    if (access.pairs() && Window3::fits(g)) return kernel_for<D, T, Window3, 3, kPair, true, 4>();
    if (access.pairs() && Window5::fits(g)) return kernel_for<D, T, Window5, 2, kPair, true, 2>();
    if (Window3::fits(g)) return kernel_for<D, T, Window3, 4, 1, true, 4>();
  }
  return {};
}

// The sums of a convolution along `g` with its epilogue.
template <class In, class T>
struct ForwardJob {
  const DepthwiseGeometry& g;
  TensorRef x, y;
  const void* weight;
  EpilogueRef epilogue;
  bool turned;  // see Forward

  Access access() const {
    Access access(g);
    access.need(x, sizeof(In));
    access.need(y, sizeof(T));
    access.need(epilogue.residual, sizeof(T));
    return access;
  }
  void run(const Choice<Forward<In, T>>& choice, const Device& device, Stream stream) const {
    const Units units = units_of(sums_of(g), choice, device);
    if (units.total == 0) return;
    const index_t groups = g.out_channels() / choice.channels;
    const Forward<In, T> params{map_of<const In>(x), map_of<T>(y), static_cast<const T*>(weight),        epilogue,
                                sizes_of(g),         units,        {narrow(groups), channels_inside(y)}, turned};
    launch(choice.kernel, blocks_for(units.total * groups), stream, params);
  }
};

// Of the gradient of the input as a convolution of du, at stride 1 and dilation 1.
DepthwiseGeometry turned_geometry(const DepthwiseGeometry& g) {
  DepthwiseGeometry turned = g;
  turned.H = g.P, turned.W = g.Q, turned.P = g.H, turned.Q = g.W;
  turned.pad_top = g.R - 1 - g.pad_top, turned.pad_left = g.S - 1 - g.pad_left;
  return turned;
}

}  // namespace

void dwconv_fwd(DType dtype, const DwconvForwardArgs& args, const Device& device, Stream stream) {
  with_type(dtype, [&](auto element) {
    using T = decltype(element);
    const ForwardJob<T, T> job{args.g, args.input, args.output, args.weight, args.epilogue, false};
    job.run(choose<T>(args.g, job.access(), is_clamp(args.epilogue)), device, stream);
  });
}

bool depthwise_turned(DType dtype, const DepthwiseGeometry& g, const Gradient& du, const void* weight,
                      const TensorRef& grad_input, const Device& device, Stream stream) {
  if (g.multiplier > 1 || g.pad_top >= g.R || g.pad_left >= g.S) return false;
  const DepthwiseGeometry turned = turned_geometry(g);
  return with_types(du.dtype, dtype, [&](auto gradient, auto element) {
    using D = decltype(gradient);
    using T = decltype(element);
    const ForwardJob<D, T> job{turned, du.map, grad_input, weight, {}, true};
    const Choice<Forward<D, T>> choice = choose_turned<D, T>(turned, job.access());
    if (choice.kernel != nullptr) job.run(choice, device, stream);
    return choice.kernel != nullptr;
  });
}

}  // namespace effops::cuda
