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
//      Loads an output: (Rows + 2) / Rows, 1.7 with the three rows of a 3x3 window at stride 1, instead of 9. Banks
//      whose taps are constants (banks.h) need no registers for them: four rows of blurs, and all kernels of VGNet's
//      banks in a thread, which owns as many channels: 4 in three rows, 8 in one.
//
//   NCHW, 3x3 at padding 1: a thread owns 16 bytes of a row (8 of narrow maps) of one channel and walks down the rows.
//
//        lane 0           lane 1            the row that is loaded: one access, and the elements beside it, which the
//        o[o o o o o o o o][. . . .         neighbours load too (L1); the next row is on its way meanwhile
//          . . . . . . . .                  it goes into the sums of three rows of y, of which the oldest is complete
//
//      In registers: 9 taps, the open sums (3 rows x 8), two rows of x. Loads an output: 3 / 8, and one store in eight.
//
//   Other NCHW maps, odd channel counts: a thread owns one column of four rows, its neighbours the columns beside it.
//
//   bytes an output (fp16)    x 2, y 2, a residual 2
//
// Roofline, calculated for an H200 (132 multiprocessors, 4.3 TB/s), nothing measured: float16 [128, 128, 56, 56], 3x3,
// stride 1: 206 MB, 48 us; [128, 512, 14, 14]: 51 MB, 12 us. Half of the traffic is reads, so at 700 ns of latency
// 2.15 TB/s x 700 ns / 132 = 11 KB have to be in flight on each multiprocessor. What float16 kernels with a clamp
// have (registers from ptxas, instructions of the loop in the SASS of sm_90, at 4 x 1.755 GHz a multiprocessor):
//
//   channels x rows   registers   threads   in flight   of it new   instructions an output, to issue the first shape
//   2 x 3             63          1024      20 KB       12 KB       35, 60 us
//   4 x 3             110         512       20 KB       12 KB       30, 51 us
//   8 x 1             168         256       12 KB       4 KB        40, 69 us
//   NCHW, 8 columns   63          1024      16 KB       16 KB       29, 50 us
//
// Accesses of 16 bytes, 8 channels, leave room for one block: too little is in flight, and two blocks spill. With four
// channels there is as much in flight as with two, from half of the warps: four warps a scheduler issue for 1420 cycles
// while one waits for 1225, eight issue for 1656, so neither is far ahead; two channels keep 50% occupancy and take
// counts like VGNet's 28, so they stay. Both issue for longer than memory takes. Unverified on a GPU.
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

template <class C, int N>
EFFOPS_DEVICE void apply_clamp(const EpilogueRef& e, C (&v)[N]) {
  const C low = e.activation == Activation::none ? C(-INFINITY) : C(0);
  const C high = e.activation == Activation::relu6 ? C(6) : C(INFINITY);
  EFFOPS_UNROLL
  for (int j = 0; j < N; ++j) v[j] = v[j] < low ? low : v[j] > high ? high : v[j];
}

// Clamp: the epilogue is one, see is_clamp(); such a kernel has registers for more rows.
template <class In, class T, class Window, int Rows, int N, bool Clamp, int Blocks>
EFFOPS_KERNEL(kThreads, Blocks)
forward_kernel(EFFOPS_PARAMS Forward<In, T> a) {
  using C = compute<T>;
  constexpr bool kKeepsBias = N < 8;  // sums of eight channels leave no registers for it: it is read for every column
  const Owned owned = owned_by(a.assignment, a.units, global_thread());
  if (owned.unit >= a.units.total) return;
  const Cell cell = cell_of(a.units, owned.unit, a.g.Q);
  const int o = owned.group * N, count = a.g.P - cell.p < Rows ? a.g.P - cell.p : Rows;
  C bias[N];
  if constexpr (kKeepsBias) read_channels<T>(a.epilogue.bias, o, C(0), bias);
  const Depthwise<In, T, Window, Rows, N> sums(a.x, a.weight, a.g, o, a.turned);
  T* y = a.y.at(cell.n, o, cell.p, cell.q);
  sums.run(cell, [&](int q, const C(&u)[Rows][N]) {
    if constexpr (!kKeepsBias) read_channels<T>(a.epilogue.bias, o, C(0), bias);
    if constexpr (Clamp) {
      EFFOPS_UNROLL
      for (int i = 0; i < Rows; ++i) {
        C v[N];
        EFFOPS_UNROLL
        for (int j = 0; j < N; ++j) v[j] = u[i][j] + bias[j];
        apply_clamp(a.epilogue, v);
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

// NCHW: V output columns of one channel a thread.
template <class T, class Window, int V, bool Clamp, int Blocks>
EFFOPS_KERNEL(kThreads, Blocks)
forward_rows_kernel(EFFOPS_PARAMS Forward<T, T> a) {
  using C = compute<T>;
  const Owned owned = owned_by(a.assignment, a.units, global_thread());
  if (owned.unit >= a.units.total) return;
  const Cell cell = cell_of(a.units, owned.unit, a.g.Q);
  const int o = owned.group, left = a.g.P - cell.p;
  C bias[1], taps[Window::kTaps][1];
  read_channels<T>(a.epilogue.bias, o, C(0), bias);
  load_taps<Window, 1>(a.weight, a.g, o, a.turned, taps);
  int p = cell.p;
  descend<Window, V>(a.x, o, a.g, cell, left < a.units.rows ? left : a.units.rows, taps, [&](const C(&u)[V]) {
    C v[V];
    EFFOPS_UNROLL
    for (int j = 0; j < V; ++j) v[j] = u[j] + bias[0];
    if constexpr (Clamp) {
      apply_clamp(a.epilogue, v);
    } else {
      C residual[V];
      load_if_present(const_map<T>(a.epilogue.residual), cell.n, o, p, cell.q, residual);
      apply_epilogue_rows<T, 1>(a.epilogue, o, residual, v);
    }
    store_channels(a.y.at(cell.n, o, p, cell.q), v);
    ++p;
  });
}

// ---- the host's choices ----

// The sums of a convolution along `g` with its epilogue.
template <class In, class T>
struct ForwardJob {
  const DepthwiseGeometry& g;
  TensorRef x, y;
  const void* weight;
  EpilogueRef epilogue;
  bool turned;  // see Forward

  bool clamps() const { return is_clamp(epilogue); }
  Access access() const {
    Access access(g);
    access.need(x, sizeof(In));
    access.need(y, sizeof(T));
    access.need(epilogue.residual, sizeof(T));
    return access;
  }
  // Whether threads can own `count` output columns of a row, at padding 1: rows of whole segments, of elements that lie
  // side by side, at addresses that accesses to as many of them want.
  bool columns(index_t count) const {
    const auto aligned = [](const TensorRef& map, std::size_t element, index_t columns) {
      const auto place = static_cast<index_t>(reinterpret_cast<std::uintptr_t>(map.data) / element);
      return map.data == nullptr || (map.w == 1 && (place | map.n | map.c | map.h) % columns == 0);
    };
    return g.pad_left == 1 && g.W == g.Q * g.stride_w && g.Q % count == 0 &&
           aligned(x, sizeof(In), count * g.stride_w) && aligned(y, sizeof(T), count) &&
           aligned(epilogue.residual, sizeof(T), count);
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

template <class In, class T, class Window, int Rows, int N, bool Clamp, int Blocks>
Choice<Forward<In, T>> kernel_for() {
  const bool walks = N > 1 && !std::is_same_v<Window, AnyWindow>;  // lanes that are columns share a window's in L1
  return {{Rows, N, Blocks, walks ? Walks::along : Walks::no}, forward_kernel<In, T, Window, Rows, N, Clamp, Blocks>};
}

// Taps that are constants leave room for twice the rows, or twice the blocks: blurs and binomials at stride 2.
template <class T>
Choice<Forward<T, T>> choose_blur(const DepthwiseGeometry& g) {
  using Blur = Fixed<Window3Half, kVgnetBlur>;
  using AlternateBlur = Fixed<Window3Half, kVgnetBlurAlternate>;
  using Binomial3 = Fixed<Window3Half, kBinomial3>;
  using Binomial5 = Fixed<Window5Half, kBinomial5>;
  if (Blur::fits(g)) return kernel_for<T, T, Blur, 4, kPair, true, 4>();
  if (AlternateBlur::fits(g)) return kernel_for<T, T, AlternateBlur, 4, kPair, true, 4>();
  if (Binomial3::fits(g)) return kernel_for<T, T, Binomial3, 4, kPair, true, 4>();
  if (Binomial5::fits(g)) return kernel_for<T, T, Binomial5, 2, kPair, true, 4>();
  return {};
}

// ... and VGNet's edge kernels at stride 1, of which a thread has the whole bank.
template <class T, bool Turned>
Choice<Forward<T, T>> choose_edges(const DepthwiseGeometry& g, const Access& access, bool clamps) {
  using Eight = Fixed<Window3, kVgnet8, Turned>;
  using Four = Fixed<Window3, kVgnet4, Turned>;
  if (access.channels(8) && Eight::fits(g)) {
    if (clamps) return kernel_for<T, T, Eight, 1, 8, true, 4>();
    if constexpr (!Turned) return kernel_for<T, T, Eight, 1, 8, false, 2>();
  }
  if (access.channels(4) && Four::fits(g)) {
    if (clamps) return kernel_for<T, T, Four, 3, 4, true, 4>();
    if constexpr (!Turned) return kernel_for<T, T, Four, 2, 4, false, 2>();
  }
  return {};
}

// Two channels a thread, walking along a strip. Half of the threads that a multiprocessor has room for, with nothing
// spilled on any architecture, takes 64 registers. What has fewer threads: 5x5 windows, whose taps alone are 50
// registers, and epilogues with exponentials.
template <class T, class Window, int Rows, int Blocks, int AnyRows, int AnyBlocks>
Choice<Forward<T, T>> pairs_kernel_for(bool clamps) {
  if (clamps) return kernel_for<T, T, Window, Rows, kPair, true, Blocks>();
  return kernel_for<T, T, Window, AnyRows, kPair, false, AnyBlocks>();
}

template <class T>
Choice<Forward<T, T>> choose_pairs(const DepthwiseGeometry& g, bool windows, bool clamps) {
  if (windows && Window3::fits(g)) return pairs_kernel_for<T, Window3, 3, 4, 2, 3>(clamps);
  if (windows && Window3Half::fits(g)) return pairs_kernel_for<T, Window3Half, 2, 4, 2, 2>(clamps);
  if (windows && Window5::fits(g)) return pairs_kernel_for<T, Window5, 2, 2, 2, 2>(clamps);
  if (windows && Window5Half::fits(g)) return pairs_kernel_for<T, Window5Half, 2, 2, 2, 2>(clamps);
  return pairs_kernel_for<T, AnyWindow, 1, 4, 1, 3>(clamps);
}

// V columns of an NCHW row a thread.
template <class T, class Window, int V>
Choice<Forward<T, T>> rows_kernel_for(bool clamps) {
  constexpr int kClamped = 4, kAny = 2;  // blocks a multiprocessor
  if (clamps) return {{1, 1, kClamped, Walks::down, V}, forward_rows_kernel<T, Window, V, true, kClamped>};
  return {{1, 1, kAny, Walks::down, V}, forward_rows_kernel<T, Window, V, false, kAny>};
}

// The widest access that the maps allow: of 16 bytes or of 8.
template <class T>
Choice<Forward<T, T>> choose_rows(const ForwardJob<T, T>& job) {
  constexpr int kWide = 16 / sizeof(T);
  const bool clamps = job.clamps();
  if (Window3::fits(job.g) && job.columns(kWide)) return rows_kernel_for<T, Window3, kWide>(clamps);
  if (Window3::fits(job.g) && job.columns(kWide / 2)) return rows_kernel_for<T, Window3, kWide / 2>(clamps);
  if (Window3Half::fits(job.g) && job.columns(kWide / 2)) return rows_kernel_for<T, Window3Half, kWide / 2>(clamps);
  return {};
}

// One channel and one column a thread, whatever the map.
template <class T>
Choice<Forward<T, T>> choose_single(const DepthwiseGeometry& g, bool windows, bool clamps) {
  if constexpr (kHasPairs<T>) {
    if (windows && Window3::fits(g)) {
      return clamps ? kernel_for<T, T, Window3, 4, 1, true, 4>() : kernel_for<T, T, Window3, 4, 1, false, 3>();
    }
    if (windows && Window3Half::fits(g)) {
      return clamps ? kernel_for<T, T, Window3Half, 2, 1, true, 4>() : kernel_for<T, T, Window3Half, 2, 1, false, 3>();
    }
  }
  return kernel_for<T, T, AnyWindow, 1, 1, false, sizeof(T) == 8 ? 1 : 3>();
}

template <class T>
Choice<Forward<T, T>> choose(const ForwardJob<T, T>& job) {
  const Access access = job.access();
  if constexpr (kHasPairs<T>) {
    if (access.pairs() && access.windows()) {
      const Choice<Forward<T, T>> edges = choose_edges<T, false>(job.g, access, job.clamps());
      if (edges.kernel != nullptr) return edges;
      const Choice<Forward<T, T>> blur = job.clamps() ? choose_blur<T>(job.g) : Choice<Forward<T, T>>{};
      if (blur.kernel != nullptr) return blur;
    }
    if (access.pairs()) return choose_pairs<T>(job.g, access.windows(), job.clamps());
    const Choice<Forward<T, T>> rows = choose_rows(job);
    if (rows.kernel != nullptr) return rows;
  }
  return choose_single<T>(job.g, access.windows(), job.clamps());
}

// ... of the gradient of the input as a convolution of du; without a kernel where the window is not known.
template <class D, class T>
Choice<Forward<D, T>> choose_turned(const ForwardJob<D, T>& job) {
  if constexpr (kHasPairs<T>) {
    const Access access = job.access();
    if (!access.windows()) return {};
    if constexpr (std::is_same_v<D, T>) {
      const Choice<Forward<T, T>> edges = choose_edges<T, true>(job.g, access, true);
      if (edges.kernel != nullptr) return edges;
    }
    if (access.pairs() && Window3::fits(job.g)) return kernel_for<D, T, Window3, 3, kPair, true, 4>();
    if (access.pairs() && Window5::fits(job.g)) return kernel_for<D, T, Window5, 2, kPair, true, 2>();
    if constexpr (std::is_same_v<D, T>) {
      const Choice<Forward<T, T>> rows = choose_rows(job);
      if (rows.kernel != nullptr) return rows;
    }
    if (Window3::fits(job.g)) return kernel_for<D, T, Window3, 4, 1, true, 4>();
  }
  return {};
}

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
    job.run(choose(job), device, stream);
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
    const Choice<Forward<D, T>> choice = choose_turned(job);
    if (choice.kernel != nullptr) job.run(choice, device, stream);
    return choice.kernel != nullptr;
  });
}

}  // namespace effops::cuda
