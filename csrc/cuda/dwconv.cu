// Room dwconv on CUDA devices: forward, epilogue gradient, input gradient, weight gradient, batch statistics.
//
//   channels_last: a thread owns two channels (one access) of a strip of output pixels and walks along it.
//
//        lane 0 1 2 ...                columns of x ->
//        channels                      . . . . . +     the column that is loaded, once: Rows + 2 accesses in flight
//        +--+--+--+                    . . . . . +
//        |  |  |  |  a warp's access:  . . . . . +     it is added to the sums of the three output columns that it
//        +--+--+--+  128 bytes of a    . . . . . +     reaches; the oldest is complete, gets its epilogue and is stored
//                    pixel (float16)   . . . . . +
//
//      In registers: the taps of both channels (18), the open sums (3 columns x Rows x 2), one column of x.
//      Loads an output: (Rows + 2) / Rows, 1.7 with the three rows of a 3x3 window at stride 1, instead of 9.
//
//   NCHW and odd channel counts: a thread owns one channel and one output column of four rows; neighbouring lanes are
//   neighbouring columns (channels, where those are nearer) and share the columns of their windows in L1.
//
//   Windows other than 3x3 and 5x5 at strides 1 and 2, dilations, channel multipliers: a loop over the taps, one output
//   pixel a thread; x comes from L1 once a tap. The taps of a 7x7 window alone would be 98 registers.
//
// Gradients and statistics that sum over pixels run as blocks of 256 threads with up to 32 channel lanes and as many
// pixel lanes as are left; each leaves one line of partial sums (sum.h).
//
//   kernel               reads                               writes                              bytes an output (fp16)
//   forward              x (residual)                        y                                   4 (6)
//   epilogue gradient    grad, x or the saved output         du, partial sums of the vectors     6
//   input gradient       du; stride 1: forward, taps turned  dx                                  4
//                        stride 2: 2 x 2 blocks of dx, to which the columns of du are added as above
//   weight gradient      x, du; the last columns of du       partial [lines][taps][D]            4
//                        and the sums of all taps in registers
//   statistics           x                                   partial [lines][3][D]               2
//   statistics gradient  x                                   du in float                         6
//
// Without activation and scale du is grad itself, and is neither computed nor stored.
//
// Roofline, calculated for an H200 (4.3 TB/s), nothing measured: forward of float16 [128, 128, 56, 56], 3x3, stride 1:
// 206 MB, 48 us; [128, 512, 14, 14]: 51 MB, 12 us. By hand some 22 instructions an output, 9 of them multiply-adds: the
// first shape issues for about 38 us of those 48, so memory should be the bound, but not by far. Unverified on a GPU.
#include "csrc/cuda/dwconv.h"

#include <algorithm>
#include <cstdint>

#include "csrc/cuda/banks.h"
#include "csrc/cuda/sum.h"
#include "csrc/cuda/window.h"

namespace effops::cuda {
namespace {

constexpr int kThreads = 256;

// ---- units of work ----

// A unit is a strip of `columns` output columns in a band of a few output rows; units are numbered through the batch.
struct Units {
  int columns, strips, bands;
  index_t total;
};

struct Cell {
  index_t n;
  int p, q, count;
};

// a / b for 0 <= a: the common case without a 64-bit division.
EFFOPS_DEVICE index_t quotient(index_t a, int b) {
  return a >> 31 == 0 ? static_cast<unsigned>(a) / static_cast<unsigned>(b) : a / b;
}

EFFOPS_DEVICE Cell cell_of(const Units& units, index_t unit, int rows, int width) {
  const index_t band = quotient(unit, units.strips), n = quotient(band, units.bands);
  const int q = static_cast<int>(unit - band * units.strips) * units.columns;
  const int left = width - q;
  return {n, static_cast<int>(band - n * units.bands) * rows, q, left < units.columns ? left : units.columns};
}

// Which channels and which unit a thread has where every thread has one unit. channels_inside: neighbouring threads own
// neighbouring channels; else neighbouring units.
struct Assignment {
  int groups;  // of N channels
  bool channels_inside;
};

struct Owned {
  index_t unit;
  int group;
};

EFFOPS_DEVICE Owned owned_by(const Assignment& a, const Units& units, index_t thread) {
  if (a.channels_inside) {
    const index_t unit = quotient(thread, a.groups);
    return {unit, static_cast<int>(thread - unit * a.groups)};
  }
  const int per_image = units.strips * units.bands;
  const index_t plane = quotient(thread, per_image), n = quotient(plane, a.groups);
  return {n * per_image + (thread - plane * per_image), static_cast<int>(plane - n * a.groups)};
}

EFFOPS_DEVICE index_t global_thread() { return static_cast<index_t>(blockIdx.x) * blockDim.x + threadIdx.x; }

// Where every block has a tile of channels and a share of the units, of which it leaves one line of partial sums.
struct Shares {
  Lanes lanes;
  int groups, tiles, lines;
};

struct Share {
  int group, line;
  index_t first, step;
  bool live;
};

EFFOPS_DEVICE Share share_of(const Shares& shares) {
  const int block = static_cast<int>(blockIdx.x), pixels = shares.lanes.pixels(kThreads);
  const int line = block / shares.tiles;
  const int group = (block - line * shares.tiles) * shares.lanes.channel_lanes + shares.lanes.channel();
  return {group, line, static_cast<index_t>(line) * pixels + shares.lanes.pixel(),
          static_cast<index_t>(shares.lines) * pixels, group < shares.groups};
}

// ---- the sums of a cell ----

// The taps of a thread's N channels, and what they are applied to.
template <class In, class T, class Window, int Rows, int N>
struct Depthwise {
  using C = compute<T>;
  static constexpr bool kAny = std::is_same_v<Window, AnyWindow>;
  const Map<const In>& x;
  const T* weight;
  const Sizes& g;
  int o;
  C taps[Window::kTaps][N];

  EFFOPS_DEVICE Depthwise(const Map<const In>& map, const T* kernels, const Sizes& sizes, int channel, bool turned)
      : x(map), weight(kernels), g(sizes), o(channel) {
    if constexpr (kIsFixed<Window>) {
      fixed_taps<Window, T>(taps, std::make_integer_sequence<int, Window::kTaps * N>());
    } else if constexpr (!kAny) {
      load_taps<Window, N>(weight, g, o, turned, taps);
    }
  }

  // emit(q, sums[Rows][N]) for each column of the cell.
  template <class Emit>
  EFFOPS_DEVICE void run(const Cell& cell, const Emit& emit) const {
    if constexpr (kAny) {
      static_assert(Rows == 1);
      C sums[1][N];
      window_sums<N>(x, weight, g, cell.n, o, cell.p, cell.q, sums[0]);
      emit(cell.q, sums);
    } else if constexpr (N == 1) {
      C sums[Rows][N];
      column_sums<Window, Rows, N>(x, x.at(cell.n, o / g.multiplier, 0, 0), g, cell.p, cell.q, taps, sums);
      emit(cell.q, sums);
    } else {
      slide<Window, Rows, N>(x, x.at(cell.n, o, 0, 0), g, cell.p, cell.q, cell.count, taps, emit);
    }
  }
};

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

template <class T>
EFFOPS_DEVICE Map<const T> const_map(const TensorRef& ref) {
  return {static_cast<const T*>(ref.data), ref.n, ref.c, ref.h, ref.w};
}

// The channels of a pixel, or zeros where the map is absent.
template <class T, int N>
EFFOPS_DEVICE void load_if_present(const Map<const T>& map, index_t n, int o, int p, int q, compute<T> (&v)[N]) {
  if (map.data == nullptr) return fill(v, compute<T>(0));
  load_channels<N>(map.at(n, o, p, q), v);
}

// f(row, values of N channels) for the first `count` rows, in a loop that is not unrolled: what f does is there once,
// and so are its registers. The rows move up past the one place that f sees.
template <int Rows, int N, class C, class F>
EFFOPS_DEVICE void row_by_row(const C (&u)[Rows][N], int count, const F& f) {
  C rows[Rows][N];
  EFFOPS_UNROLL
  for (int i = 0; i < Rows; ++i) {
    EFFOPS_UNROLL
    for (int j = 0; j < N; ++j) rows[i][j] = u[i][j];
  }
  EFFOPS_NO_UNROLL
  for (int row = 0; row < count; ++row) {
    f(row, rows[0]);
    EFFOPS_UNROLL
    for (int i = 1; i < Rows; ++i) {
      EFFOPS_UNROLL
      for (int j = 0; j < N; ++j) rows[i - 1][j] = rows[i][j];
    }
  }
}

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
  const Cell cell = cell_of(a.units, owned.unit, Rows, a.g.Q);
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

// ---- epilogue gradient ----

struct NoWindow {};

// The gradient at the sums of the batch statistics: (grad_mean + 2 grad_var (u - mean)) / pixels, u with bias.
template <class C>
struct StatisticsGradient {
  const C *mean, *grad_mean, *grad_var;  // mean == nullptr: this is an epilogue's gradient
  C share;                               // 1 / pixels
};

template <class T>
struct EpilogueGradient {
  Map<const T> x, grad, saved;  // saved: the epilogue's output, or absent
  Map<T> grad_residual;         // absent: not wanted
  TensorRef du;                 // of T or float
  bool wide;                    // it is of float
  const T* weight;
  EpilogueRef epilogue;
  StatisticsGradient<compute<T>> statistics;
  compute<T>* partial;                                       // [lines][segments][D]
  int segments, bias_segment, scale_segment, shift_segment;  // negative: not wanted
  Sizes g;
  Units units;
  Shares shares;
};

template <class T, int N>
EFFOPS_DEVICE void store_du(const EpilogueGradient<T>& a, index_t n, int o, int p, int q, const compute<T> (&v)[N]) {
  if (a.du.data == nullptr) return;
  const index_t at = n * a.du.n + o * a.du.c + p * a.du.h + q * a.du.w;
  if constexpr (sizeof(T) == 2) {
    if (a.wide) return store_channels(static_cast<float*>(a.du.data) + at, v);
  }
  store_channels(static_cast<T*>(a.du.data) + at, v);
}

// What is summed over pixels for the gradients of the vectors.
template <class C, int N>
struct EpilogueSums {
  C bias[N] = {}, scale[N] = {}, shift[N] = {};

  EFFOPS_DEVICE void add(const C (&du)[N], const EpilogueTerms<C, N>& terms) {
    EFFOPS_UNROLL
    for (int j = 0; j < N; ++j) {
      bias[j] += du[j];
      scale[j] += terms.scale[j];
      shift[j] += terms.residual[j];
    }
  }
};

// d loss / d sums at one pixel from u = conv + bias.
template <class T, int N>
EFFOPS_DEVICE void gradient_from_sums(const EpilogueGradient<T>& a, index_t n, int o, int p, int q,
                                      const compute<T> (&u)[N], EpilogueSums<compute<T>, N>& sums) {
  using C = compute<T>;
  C du[N];
  EpilogueTerms<C, N> terms;
  if (a.statistics.mean != nullptr) {
    EFFOPS_UNROLL
    for (int j = 0; j < N; ++j) {
      const C away = u[j] - a.statistics.mean[o + j];
      du[j] = (a.statistics.grad_mean[o + j] + C(2) * a.statistics.grad_var[o + j] * away) * a.statistics.share;
      terms.residual[j] = terms.scale[j] = C(0);
    }
  } else {
    C residual[N];
    Map<const T> map = const_map<T>(a.epilogue.residual);
    if (a.epilogue.post == Activation::none) map.data = nullptr;  // not needed
    load_if_present(map, n, o, p, q, residual);
    load_channels<N>(a.grad.at(n, o, p, q), du);
    epilogue_gradient<T>(a.epilogue, o, u, residual, du, terms);
    if (a.grad_residual.data != nullptr) store_channels(a.grad_residual.at(n, o, p, q), terms.residual);
  }
  store_du(a, n, o, p, q, du);
  sums.add(du, terms);
}

// The same where the sums are not needed: from the output, or of an affine epilogue. All loads of a few columns are
// issued before the first is used.
constexpr int kColumnsAtOnce = 4;

template <class T, int N>
EFFOPS_DEVICE void gradient_without_sums(const EpilogueGradient<T>& a, const Cell& cell, int o,
                                         const compute<T> (&scale)[N], EpilogueSums<compute<T>, N>& sums) {
  using C = compute<T>;
  const T* grad = a.grad.at(cell.n, o, cell.p, cell.q);
  const T* saved = a.saved.at(cell.n, o, cell.p, cell.q);
  for (int first = 0; first < cell.count; first += kColumnsAtOnce) {
    Vec<T, N> loaded[kColumnsAtOnce], outputs[kColumnsAtOnce] = {};
    EFFOPS_UNROLL
    for (int i = 0; i < kColumnsAtOnce; ++i) {
      if (first + i >= cell.count) break;
      loaded[i] = load_vec<T, N>(grad + (first + i) * a.grad.w);
      if (a.saved.data != nullptr) outputs[i] = load_vec<T, N>(saved + (first + i) * a.saved.w);
    }
    EFFOPS_UNROLL
    for (int i = 0; i < kColumnsAtOnce; ++i) {
      if (first + i >= cell.count) break;
      const int q = cell.q + first + i;
      C du[N], y[N];
      EpilogueTerms<C, N> terms;
      EFFOPS_UNROLL
      for (int j = 0; j < N; ++j) {
        terms.residual[j] = to_compute(loaded[i].v[j]);
        terms.scale[j] = C(0);  // would need the sums
        du[j] = terms.residual[j] * scale[j];
        y[j] = to_compute(outputs[i].v[j]);
      }
      if (a.saved.data != nullptr) epilogue_gradient_from_output<T>(a.epilogue, y, du);
      if (a.grad_residual.data != nullptr) store_channels(a.grad_residual.at(cell.n, o, cell.p, q), terms.residual);
      store_du(a, cell.n, o, cell.p, q, du);
      sums.add(du, terms);
    }
  }
}

template <class C, int N>
EFFOPS_DEVICE void write_partial(C* partial, const Shares& shares, const Share& share, int segments, int segment, int D,
                                 const C (&sums)[N]) {
  if (!share.live || shares.lanes.pixel() > 0) return;
  C* line = partial + (static_cast<index_t>(share.line) * segments + segment) * D + share.group * N;
  EFFOPS_UNROLL
  for (int j = 0; j < N; ++j) line[j] = sums[j];
}

// Window: NoWindow where the sums are not needed.
template <class T, class Window, int Rows, int N, int Blocks>
EFFOPS_KERNEL(kThreads, Blocks)
epilogue_gradient_kernel(EFFOPS_PARAMS EpilogueGradient<T> a) {
  using C = compute<T>;
  const Share share = share_of(a.shares);
  const int o = share.group * N;
  EpilogueSums<C, N> sums;
  if constexpr (std::is_same_v<Window, NoWindow>) {
    C scale[N];
    if (share.live) read_channels<T>(a.epilogue.scale, o, C(1), scale);
    for (index_t unit = share.live ? share.first : a.units.total; unit < a.units.total; unit += share.step) {
      gradient_without_sums(a, cell_of(a.units, unit, 1, a.g.Q), o, scale, sums);
    }
  } else if (share.live) {
    C bias[N];
    read_channels<T>(a.epilogue.bias, o, C(0), bias);
    const Depthwise<T, T, Window, Rows, N> depthwise(a.x, a.weight, a.g, o, false);
    for (index_t unit = share.first; unit < a.units.total; unit += share.step) {
      const Cell cell = cell_of(a.units, unit, Rows, a.g.Q);
      const int count = a.g.P - cell.p < Rows ? a.g.P - cell.p : Rows;
      depthwise.run(cell, [&](int q, const C(&raw)[Rows][N]) {
        row_by_row(raw, count, [&](int i, const C(&sum)[N]) {
          C u[N];
          EFFOPS_UNROLL
          for (int j = 0; j < N; ++j) u[j] = sum[j] + bias[j];
          gradient_from_sums(a, cell.n, o, cell.p + i, q, u, sums);
        });
      });
    }
  }
  int turn = 0;
  const auto leave = [&](int segment, C(&sum)[N]) {
    if (segment < 0) return;
    block_sums(a.shares.lanes, turn++, sum);
    write_partial(a.partial, a.shares, share, a.segments, segment, a.g.D, sum);
  };
  leave(a.bias_segment, sums.bias);
  leave(a.scale_segment, sums.scale);
  leave(a.shift_segment, sums.shift);
}

// ---- input gradient ----

template <class D, class T>
struct InputGradient {
  Map<const D> du;
  Map<T> dx;
  const T* weight;
  Sizes g;
  Units units;  // of input pixels
  Assignment assignment;
};

// One input element for any window: gathered over the taps that reach it.
template <class D, class T, int Blocks>
EFFOPS_KERNEL(kThreads, Blocks)
input_gradient_any_kernel(EFFOPS_PARAMS InputGradient<D, T> a) {
  const Owned owned = owned_by(a.assignment, a.units, global_thread());
  if (owned.unit >= a.units.total) return;
  const Cell cell = cell_of(a.units, owned.unit, 1, a.g.W);
  compute<T> sum = 0;
  for (int m = 0; m < a.g.multiplier; ++m) {
    const int o = owned.group * a.g.multiplier + m;
    const T* kernel = kernel_of(a.weight, a.g, a.g.R * a.g.S, o);
    const D* plane = a.du.at(cell.n, o, 0, 0);
    for (int r = 0; r < a.g.R; ++r) {
      const int y = cell.p + a.g.pad_top - r * a.g.dilation_h, p = y / a.g.stride_h;
      if (y < 0 || p * a.g.stride_h != y || p >= a.g.P) continue;
      for (int s = 0; s < a.g.S; ++s) {
        const int x = cell.q + a.g.pad_left - s * a.g.dilation_w, q = x / a.g.stride_w;
        if (x < 0 || q * a.g.stride_w != x || q >= a.g.Q) continue;
        sum += to_compute(plane[p * a.du.h + q * a.du.w]) * to_compute(load_global_cached(kernel + r * a.g.S + s));
      }
    }
  }
  *a.dx.at(cell.n, owned.group, cell.p, cell.q) = from_compute<T>(sum);
}

// Stride 2: a unit is `columns` blocks of 2 x 2 input pixels; block i starts at row and column 2 i - pad. Column q of
// du reaches the blocks q .. q + (S - 1) / 2, which are open at a time; block q is complete behind it.
template <class D, class T, class Window, int N, int Blocks>
EFFOPS_KERNEL(kThreads, Blocks)
input_gradient_kernel(EFFOPS_PARAMS InputGradient<D, T> a) {
  using C = compute<T>;
  static_assert(Window::kStride == 2);
  constexpr int kOpen = (Window::S + 1) / 2, kRows = (Window::R + 1) / 2;
  const Owned owned = owned_by(a.assignment, a.units, global_thread());
  if (owned.unit >= a.units.total) return;
  const int first_block = a.g.pad_left / 2, blocks = (a.g.W - 1 + a.g.pad_left) / 2 + 1;
  Cell cell = cell_of(a.units, owned.unit, 1, blocks - first_block);
  const int o = owned.group * N, q0 = cell.q + first_block, p0 = cell.p + a.g.pad_top / 2;
  C taps[Window::kTaps][N];
  load_taps<Window, N>(a.weight, a.g, o, false, taps);
  const int row = p0 - (kRows - 1);  // of du
  const unsigned rows = rows_inside<kRows>(row, a.g.P);
  const D* at = a.du.at(cell.n, o, 0, 0) + row * a.du.h + (q0 - (kOpen - 1)) * a.du.w;
  T* const image = a.dx.at(cell.n, o, 0, 0);
  C sums[kOpen][4][N] = {};  // of a block: 2 * row + column
  EFFOPS_NO_UNROLL
  for (int step = 1 - kOpen; step < cell.count; ++step, at += a.du.w) {
    const int q = q0 + step;
    Column<kRows, N, D> loaded;
    loaded.load(at, row_stride_of(a.du), inside(q, a.g.Q) ? rows : 0u);
    EFFOPS_UNROLL
    for (int i = 0; i < kRows; ++i) {
      EFFOPS_UNROLL
      for (int side = 0; side < 2; ++side) {
        const int r = 2 * (kRows - 1 - i) + side;
        if (r >= Window::R) continue;
        EFFOPS_UNROLL
        for (int s = 0; s < Window::S; ++s) {
          EFFOPS_UNROLL
          for (int j = 0; j < N; ++j) {
            sums[s / 2][2 * side + s % 2][j] += loaded.value(i, j) * taps[r * Window::S + s][j];
          }
        }
      }
    }
    const int h = 2 * p0 - a.g.pad_top, w = 2 * q - a.g.pad_left;
    EFFOPS_UNROLL
    for (int k = 0; k < 4; ++k) {
      if (step >= 0 && inside(h + k / 2, a.g.H) && inside(w + k % 2, a.g.W)) {
        store_channels(image + (h + k / 2) * a.dx.h + (w + k % 2) * a.dx.w, sums[0][k]);
      }
      EFFOPS_UNROLL
      for (int open = 0; open < kOpen; ++open) {
        EFFOPS_UNROLL
        for (int j = 0; j < N; ++j) {
          sums[open][k][j] = open + 1 < kOpen ? sums[open + 1 < kOpen ? open + 1 : 0][k][j] : C(0);
        }
      }
    }
  }
}

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

// All taps of a thread's channels in registers; x and du are loaded once a strip, as in slide().
template <class D, class T, class Window, int Rows, int N, int Blocks>
EFFOPS_KERNEL(kThreads, Blocks)
weight_gradient_kernel(EFFOPS_PARAMS WeightGradient<D, T> a) {
  using C = compute<T>;
  constexpr int kStride = Window::kStride;
  constexpr int kRows = (Rows - 1) * kStride + Window::R, kOpen = (Window::S + kStride - 1) / kStride;
  const Share share = share_of(a.shares);
  const int o = share.group * N;
  C sums[Window::kTaps][N] = {};
  for (index_t unit = share.live ? share.first : a.units.total; unit < a.units.total; unit += share.step) {
    const Cell cell = cell_of(a.units, unit, Rows, a.g.Q);
    const int row = cell.p * kStride - a.g.pad_top;
    int column = cell.q * kStride - a.g.pad_left;
    const unsigned rows = rows_inside<kRows>(row, a.g.H), du_rows = rows_inside<Rows>(cell.p, a.g.P);
    const T* x = a.x.at(cell.n, o, 0, 0) + row * a.x.h + column * a.x.w;
    const D* at = a.du.at(cell.n, o, cell.p, cell.q);
    C du[kOpen][Rows][N] = {};  // the columns that the next column of x reaches, the newest first
    EFFOPS_NO_UNROLL
    for (int step = 0; step < cell.count + kOpen - 1; ++step, at += a.du.w) {
      Column<Rows, N, D> newest;
      newest.load(at, row_stride_of(a.du), step < cell.count ? du_rows : 0u);
      EFFOPS_UNROLL
      for (int output = 0; output < Rows; ++output) {
        EFFOPS_UNROLL
        for (int j = 0; j < N; ++j) {
          EFFOPS_UNROLL
          for (int open = kOpen - 1; open > 0; --open) du[open][output][j] = du[open - 1][output][j];
          du[0][output][j] = newest.value(output, j);
        }
      }
      EFFOPS_UNROLL
      for (int k = 0; k < kStride; ++k, ++column, x += a.x.w) {
        Column<kRows, N, T> loaded;
        loaded.load(x, row_stride_of(a.x), inside(column, a.g.W) ? rows : 0u);
        EFFOPS_UNROLL
        for (int i = 0; i < kRows; ++i) {
          EFFOPS_UNROLL
          for (int open = 0; open < kOpen; ++open) {
            const int s = open * kStride + k;
            if (s >= Window::S) continue;
            EFFOPS_UNROLL
            for (int output = 0; output < Rows; ++output) {
              const int r = i - output * kStride;
              if (r < 0 || r >= Window::R) continue;
              EFFOPS_UNROLL
              for (int j = 0; j < N; ++j) sums[r * Window::S + s][j] += loaded.value(i, j) * du[open][output][j];
            }
          }
        }
      }
    }
  }
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
  const Share share = share_of(a.shares);
  const int o = share.group, taps = a.g.R * a.g.S;
  for (int first = 0; first < taps; first += kTapGroup) {
    C sums[kTapGroup][1] = {};
    int down[kTapGroup], right[kTapGroup];
    EFFOPS_UNROLL
    for (int k = 0; k < kTapGroup; ++k) {
      const int r = (first + k) / a.g.S, s = first + k - r * a.g.S;
      down[k] = first + k < taps ? r * a.g.dilation_h : a.g.H + a.g.pad_top;  // outside wherever the window is
      right[k] = s * a.g.dilation_w;
    }
    for (index_t unit = share.live ? share.first : a.units.total; unit < a.units.total; unit += share.step) {
      const Cell cell = cell_of(a.units, unit, 1, a.g.Q);
      const C du = to_compute(*a.du.at(cell.n, o, cell.p, cell.q));
      const T* image = a.x.at(cell.n, o / a.g.multiplier, 0, 0);
      const int row = cell.p * a.g.stride_h - a.g.pad_top, column = cell.q * a.g.stride_w - a.g.pad_left;
      EFFOPS_UNROLL
      for (int k = 0; k < kTapGroup; ++k) {
        const int h = row + down[k], w = column + right[k];
        if (inside(h, a.g.H) && inside(w, a.g.W)) sums[k][0] += du * to_compute(image[h * a.x.h + w * a.x.w]);
      }
    }
    EFFOPS_UNROLL
    for (int k = 0; k < kTapGroup; ++k) {
      if (first + k >= taps) break;
      block_sums(a.shares.lanes, first + k, sums[k]);
      write_partial(a.partial, a.shares, share, taps, first + k, a.g.D, sums[k]);
    }
  }
}

// ---- batch statistics ----

template <class T>
struct Statistics {
  Map<const T> x;
  const T* weight;
  compute<T>* partial;  // [lines][count, mean, squares][D]
  Sizes g;
  Units units;
  Shares shares;
};

constexpr int kMomentSegments = 3;

// Of one channel: the number of values, their mean and the sum of their squared distances from it.
template <class C>
struct Moments {
  C count = 0, mean = 0, squares = 0;

  // Chan's formula.
  EFFOPS_DEVICE void add(const Moments& other) {
    const C total = count + other.count;
    if (total == C(0)) return;
    const C share = other.count / total, delta = other.mean - mean;
    mean += delta * share;
    squares += other.squares + delta * delta * count * share;
    count = total;
  }
};

// Sums of values and of squares, of the distance from the first value: the mean taken away, they lose no digits.
template <class C, int N>
struct RunningMoments {
  C origin[N] = {}, sum[N] = {}, squares[N] = {};
  int count = 0;

  EFFOPS_DEVICE void add(const C (&v)[N]) {
    EFFOPS_UNROLL
    for (int j = 0; j < N; ++j) {
      if (count == 0) origin[j] = v[j];
      const C away = v[j] - origin[j];
      sum[j] += away;
      squares[j] += away * away;
    }
    ++count;
  }
  EFFOPS_DEVICE Moments<C> of(int j) const {
    if (count == 0) return {};
    const C mean = sum[j] / static_cast<C>(count);
    return {static_cast<C>(count), origin[j] + mean, squares[j] - sum[j] * mean};
  }
};

// Over the pixel lanes of a block, as block_sums; of one channel a thread.
template <class C>
EFFOPS_DEVICE void block_moments(const Lanes& lanes, int turn, Moments<C>& m) {
  const int thread = static_cast<int>(threadIdx.x), warps = kThreads / kWarp, lane = thread % kWarp;
  for (int mask = lanes.channel_lanes; mask < kWarp; mask *= 2) {
    m.add({shuffle_xor(m.count, mask), shuffle_xor(m.mean, mask), shuffle_xor(m.squares, mask)});
  }
  Moments<C>* lines = shared_memory<Moments<C>>() + (turn & 1) * kThreads;  // [warps][channel lanes]
  if (lane < lanes.channel_lanes) lines[thread / kWarp * lanes.channel_lanes + lane] = m;
  barrier();
  if (thread >= lanes.channel_lanes) return;
  m = lines[thread];
  for (int warp = 1; warp < warps; ++warp) m.add(lines[warp * lanes.channel_lanes + thread]);
}

template <class T, class Window, int Rows, int N, int Blocks>
EFFOPS_KERNEL(kThreads, Blocks)
statistics_kernel(EFFOPS_PARAMS Statistics<T> a) {
  using C = compute<T>;
  const Share share = share_of(a.shares);
  const int o = share.group * N;
  RunningMoments<C, N> moments;
  if (share.live) {
    const Depthwise<T, T, Window, Rows, N> sums(a.x, a.weight, a.g, o, false);
    for (index_t unit = share.first; unit < a.units.total; unit += share.step) {
      const Cell cell = cell_of(a.units, unit, Rows, a.g.Q);
      sums.run(cell, [&](int, const C(&u)[Rows][N]) {
        EFFOPS_UNROLL
        for (int i = 0; i < Rows; ++i) {
          if (cell.p + i < a.g.P) moments.add(u[i]);
        }
      });
    }
  }
  EFFOPS_UNROLL
  for (int j = 0; j < N; ++j) {
    Moments<C> m = moments.of(j);
    block_moments(a.shares.lanes, j, m);
    if (!share.live || a.shares.lanes.pixel() > 0) continue;
    C* line = a.partial + static_cast<index_t>(share.line) * kMomentSegments * a.g.D + o + j;
    line[0] = m.count;
    line[a.g.D] = m.mean;
    line[2 * static_cast<index_t>(a.g.D)] = m.squares;
  }
}

template <class C>
struct CombineMoments {
  const C* partial;
  int lines, D;
  ChannelRef bias;
  C *mean, *var;
};

// A block owns 32 channels; warp i combines the lines i, i + 8, ..., the first warp what the others have. The bias
// moves the mean alone, so the sums went without it.
template <class T>
EFFOPS_KERNEL(kSumThreads, 4)
combine_moments_kernel(EFFOPS_PARAMS CombineMoments<compute<T>> a) {
  using C = compute<T>;
  auto* shared = shared_memory<Moments<double>>();  // [8][32]
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarp, group = thread / kWarp;
  const int o = static_cast<int>(blockIdx.x) * kWarp + lane;
  Moments<double> m;
  for (int line = group; o < a.D && line < a.lines; line += kSumGroups) {
    const C* at = a.partial + static_cast<index_t>(line) * kMomentSegments * a.D + o;
    m.add({static_cast<double>(at[0]), static_cast<double>(at[a.D]),
           static_cast<double>(at[2 * static_cast<index_t>(a.D)])});
  }
  shared[thread] = m;
  barrier();
  if (group > 0 || o >= a.D) return;
  for (int i = 1; i < kSumGroups; ++i) m.add(shared[i * kWarp + lane]);
  C bias[1];
  read_channels<T>(a.bias, o, C(0), bias);
  a.mean[o] = static_cast<C>(m.mean + bias[0]);
  a.var[o] = static_cast<C>(m.squares / m.count);
}

// ---- the host's choices ----

// A kernel, the rows and channels of a thread's cell, and how many of its blocks fit a multiprocessor.
template <class Params>
struct Choice {
  void (*kernel)(Params) = nullptr;
  int rows = 1, channels = 1, blocks = 1;
  bool walks = false;  // see kWalks
};

using Window3 = Window<3, 3, 1>;
using Window3Half = Window<3, 3, 2>;  // half the rows, half the columns
using Window5 = Window<5, 5, 1>;
using Window5Half = Window<5, 5, 2>;

// Channels of a thread where they lie side by side. A warp's access is then 128 bytes of 16-bit channels, whole lines;
// wider accesses (compiled: four) fetch no more of a line and need 102 to 112 registers for two rows, where two
// channels have three rows in 64. Counts like VGNet's 28 need no other variant.
constexpr int kPair = 2;
template <class T>
constexpr bool kHasPairs = sizeof(T) <= 4;
// Whether a thread walks along the columns of a strip. Where lanes are columns they share a window's columns in L1.
template <class Window, int N>
constexpr bool kWalks = N > 1 && !std::is_same_v<Window, AnyWindow>;

// Blocks a multiprocessor where a thread has one channel: half of its threads; a quarter with sums in double.
template <class T>
constexpr int kBlocks = sizeof(T) == 8 ? 2 : 4;

// How threads can reach a set of maps.
struct Access {
  bool pairs = true;    // kPair channels in one access
  bool windows = true;  // as the kernels with a known window want them
  void need(const TensorRef& map, std::size_t element) {
    if (map.data == nullptr) return;
    const auto even = [](index_t stride) { return stride % kPair == 0; };
    pairs = pairs && map.c == 1 && even(map.n) && even(map.h) && even(map.w) &&
            reinterpret_cast<std::uintptr_t>(map.data) % (kPair * element) == 0;
    windows = windows && short_rows(map);
  }
};

// Whether neighbouring channels are nearer than neighbouring columns.
bool channels_inside(const TensorRef& map) { return map.c <= map.w; }

index_t ceil_div(index_t a, index_t b) { return (a + b - 1) / b; }

// Strips as long as they can be with `threads` threads at work: their ends load columns that others load too.
constexpr int kShortestStrip = 8;
Units units_of(index_t images, index_t height, index_t width, int rows, bool walks, index_t threads_a_unit,
               index_t threads) {
  const index_t bands = ceil_div(height, rows);
  index_t columns = walks ? width : 1;
  while (columns > kShortestStrip && images * bands * ceil_div(width, columns) * threads_a_unit < threads) {
    columns = ceil_div(columns, 2);
  }
  const index_t strips = ceil_div(width, columns);
  narrow(strips * bands);
  return {narrow(columns), narrow(strips), narrow(bands), images * strips * bands};
}

// Two rounds of blocks on every multiprocessor.
index_t threads_wanted(const Device& device, int blocks) {
  return static_cast<index_t>(device.processors) * blocks * kThreads * 2;
}

Shares shares_of(int groups, bool inside, const Units& units, int blocks, const Device& device) {
  const Lanes lanes{inside ? channel_lanes_for(groups) : 1};
  const index_t tiles = ceil_div(groups, lanes.channel_lanes), pixels = kThreads / lanes.channel_lanes;
  const index_t wanted = ceil_div(static_cast<index_t>(device.processors) * blocks, tiles);
  return {lanes, groups, narrow(tiles), narrow(std::min(wanted, ceil_div(units.total, pixels)))};
}

Shape blocks_for(index_t threads) { return grid_of(ceil_div(threads, kThreads), kThreads, 0); }

// Pieces of the caller's scratch, one after the other. To learn how many bytes they are, any aligned address will do:
// what is chosen by addresses is then chosen the same way.
class Scratch {
 public:
  static constexpr std::uintptr_t kAlignment = 256;
  explicit Scratch(const void* data) : base_(reinterpret_cast<std::uintptr_t>(data)) {}
  static Scratch counting() { return Scratch(reinterpret_cast<const void*>(kAlignment)); }
  void* take(std::size_t bytes) {
    const std::uintptr_t place = base_ + used_;
    used_ += (bytes + kAlignment - 1) / kAlignment * kAlignment;
    return reinterpret_cast<void*>(place);
  }
  std::size_t used() const { return used_; }

 private:
  std::uintptr_t base_;
  std::size_t used_ = 0;
};

template <class F>
auto with_type(DType dtype, const F& f) {
  switch (dtype) {
    case DType::f32:
      return f(float{});
    case DType::f16:
      return f(half_t{});
    case DType::bf16:
      return f(bfloat16_t{});
    case DType::f64:
      return f(double{});
  }
  throw std::runtime_error("effops: unknown dtype");
}

// f(element of du, element of the maps)
template <class F>
auto with_types(DType du, DType dtype, const F& f) {
  return with_type(dtype, [&](auto element) {
    if constexpr (sizeof(element) == 2) {
      if (du == DType::f32) return f(float{}, element);
    }
    return f(element, element);
  });
}

// ---- forward: host ----

template <class In, class T, class Window, int Rows, int N, bool Clamp, int Blocks>
Choice<Forward<In, T>> forward_choice() {
  return {forward_kernel<In, T, Window, Rows, N, Clamp, Blocks>, Rows, N, Blocks, kWalks<Window, N>};
}

// Blurs and binomials at stride 2. Taps that are constants leave room for twice the rows, or twice the blocks.
template <class T>
Choice<Forward<T, T>> choose_fixed(const DepthwiseGeometry& g) {
  using Blur = Fixed<Window3Half, 0>;
  using AlternateBlur = Fixed<Window3Half, 1>;
  using Binomial3 = Fixed<Window3Half, 2>;
  using Binomial5 = Fixed<Window5Half, 3>;
  if (Blur::fits(g)) return forward_choice<T, T, Blur, 4, kPair, true, 4>();
  if (AlternateBlur::fits(g)) return forward_choice<T, T, AlternateBlur, 4, kPair, true, 4>();
  if (Binomial3::fits(g)) return forward_choice<T, T, Binomial3, 4, kPair, true, 4>();
  if (Binomial5::fits(g)) return forward_choice<T, T, Binomial5, 2, kPair, true, 4>();
  return {};
}

// Half of the threads that a multiprocessor has room for, with no register spilled on any architecture, takes 64
// registers. What has fewer: 5x5 windows, whose taps alone are 50 registers, and epilogues with exponentials.
template <class T>
Choice<Forward<T, T>> choose_forward(const DepthwiseGeometry& g, const Access& access, bool clamp) {
  if constexpr (kHasPairs<T>) {
    if (access.pairs && access.windows) {
      if (clamp && g.named_bank > 0) {
        const Choice<Forward<T, T>> fixed = choose_fixed<T>(g);
        if (fixed.kernel != nullptr) return fixed;
      }
      if (Window3::fits(g))
        return clamp ? forward_choice<T, T, Window3, 3, kPair, true, 4>()
                     : forward_choice<T, T, Window3, 2, kPair, false, 3>();
      if (Window3Half::fits(g))
        return clamp ? forward_choice<T, T, Window3Half, 2, kPair, true, 4>()
                     : forward_choice<T, T, Window3Half, 2, kPair, false, 2>();
      if (Window5::fits(g))
        return clamp ? forward_choice<T, T, Window5, 2, kPair, true, 2>()
                     : forward_choice<T, T, Window5, 2, kPair, false, 2>();
      if (Window5Half::fits(g))
        return clamp ? forward_choice<T, T, Window5Half, 2, kPair, true, 2>()
                     : forward_choice<T, T, Window5Half, 2, kPair, false, 2>();
    }
    if (access.pairs)
      return clamp ? forward_choice<T, T, AnyWindow, 1, kPair, true, 4>()
                   : forward_choice<T, T, AnyWindow, 1, kPair, false, 3>();
    if (access.windows && Window3::fits(g))
      return clamp ? forward_choice<T, T, Window3, 4, 1, true, 4>() : forward_choice<T, T, Window3, 4, 1, false, 3>();
    if (access.windows && Window3Half::fits(g))
      return clamp ? forward_choice<T, T, Window3Half, 2, 1, true, 4>()
                   : forward_choice<T, T, Window3Half, 2, 1, false, 3>();
  }
  return forward_choice<T, T, AnyWindow, 1, 1, false, sizeof(T) == 8 ? 1 : 3>();
}

// The sums of a convolution along `g` with its epilogue. `turned`: see Forward.
template <class In, class T>
void launch_forward(const DepthwiseGeometry& g, const Choice<Forward<In, T>>& choice, const TensorRef& x,
                    const TensorRef& y, const void* weight, const EpilogueRef& epilogue, bool turned,
                    const Device& device, Stream stream) {
  const index_t groups = g.out_channels() / choice.channels;
  const Units units = units_of(g.N, g.P, g.Q, choice.rows, choice.walks, groups, threads_wanted(device, choice.blocks));
  if (units.total == 0) return;
  const Forward<In, T> params{map_of<const In>(x), map_of<T>(y), static_cast<const T*>(weight),        epilogue,
                              sizes_of(g),         units,        {narrow(groups), channels_inside(y)}, turned};
  launch(choice.kernel, blocks_for(units.total * groups), stream, params);
}

// ---- gradients: host ----

// Of the gradient of the input as a convolution of du, at stride 1 and dilation 1.
DepthwiseGeometry turned_geometry(const DepthwiseGeometry& g) {
  DepthwiseGeometry turned = g;
  turned.H = g.P, turned.W = g.Q, turned.P = g.H, turned.Q = g.W;
  turned.pad_top = g.R - 1 - g.pad_top, turned.pad_left = g.S - 1 - g.pad_left;
  return turned;
}

// The kernel for it, where the window is known.
template <class D, class T>
Choice<Forward<D, T>> choose_turned(const DepthwiseGeometry& g, const Access& access) {
  if constexpr (kHasPairs<T>) {
    if (!access.windows || g.multiplier > 1 || g.pad_top >= g.R || g.pad_left >= g.S) return {};
    if (access.pairs && Window3::fits(g)) return forward_choice<D, T, Window3, 3, kPair, true, 4>();
    if (access.pairs && Window5::fits(g)) return forward_choice<D, T, Window5, 2, kPair, true, 2>();
    if (Window3::fits(g)) return forward_choice<D, T, Window3, 4, 1, true, 4>();
  }
  return {};
}

template <class D, class T>
Choice<InputGradient<D, T>> choose_input_gradient(const DepthwiseGeometry& g, const Access& access) {
  if constexpr (kHasPairs<T>) {
    if (access.pairs && access.windows) {
      if (Window3Half::fits(g)) return {input_gradient_kernel<D, T, Window3Half, kPair, 4>, 2, kPair, 4, true};
      if (Window5Half::fits(g)) return {input_gradient_kernel<D, T, Window5Half, kPair, 2>, 2, kPair, 2, true};
    }
  }
  return {input_gradient_any_kernel<D, T, 4>, 1, 1, 4};
}

template <class D, class T>
void input_gradient(const DepthwiseGeometry& g, const TensorRef& du, const void* weight, const TensorRef& dx,
                    const Device& device, Stream stream) {
  Access access;
  access.need(du, sizeof(D));
  access.need(dx, sizeof(T));
  access.pairs = access.pairs && g.multiplier == 1 && g.C % kPair == 0;
  const Choice<Forward<D, T>> turned = choose_turned<D, T>(g, access);
  if (turned.kernel != nullptr) {
    launch_forward<D, T>(turned_geometry(g), turned, du, dx, weight, {}, true, device, stream);
    return;
  }
  const Choice<InputGradient<D, T>> choice = choose_input_gradient<D, T>(g, access);
  const index_t groups = g.C / choice.channels;
  // Blocks of `rows` x `rows` pixels, the first of which start in the padding.
  const index_t top = g.pad_top / choice.rows, left = g.pad_left / choice.rows;
  const index_t height = choice.walks ? (g.H - 1 + g.pad_top) / choice.rows + 1 - top : g.H;
  const index_t width = choice.walks ? (g.W - 1 + g.pad_left) / choice.rows + 1 - left : g.W;
  const Units units = units_of(g.N, height, width, 1, choice.walks, groups, threads_wanted(device, choice.blocks));
  if (units.total == 0) return;
  const InputGradient<D, T> params{map_of<const D>(du), map_of<T>(dx), static_cast<const T*>(weight),
                                   sizes_of(g),         units,         {narrow(groups), channels_inside(dx)}};
  launch(choice.kernel, blocks_for(units.total * groups), stream, params);
}

template <class D, class T>
Choice<WeightGradient<D, T>> choose_weight_gradient(const DepthwiseGeometry& g, const Access& access) {
  if constexpr (kHasPairs<T>) {
    if (access.pairs && access.windows) {
      if (Window3::fits(g)) return {weight_gradient_kernel<D, T, Window3, 2, kPair, 4>, 2, kPair, 4, true};
      if (Window3Half::fits(g)) return {weight_gradient_kernel<D, T, Window3Half, 1, kPair, 4>, 1, kPair, 4, true};
      if (Window5::fits(g)) return {weight_gradient_kernel<D, T, Window5, 2, kPair, 2>, 2, kPair, 2, true};
      if (Window5Half::fits(g)) return {weight_gradient_kernel<D, T, Window5Half, 1, kPair, 2>, 1, kPair, 2, true};
    }
  }
  return {weight_gradient_any_kernel<D, T, kBlocks<T>>, 1, 1, kBlocks<T>};
}

template <class D, class T>
struct WeightPlan {
  Choice<WeightGradient<D, T>> choice;
  Units units;
  Shares shares;

  WeightPlan(const DepthwiseGeometry& g, const TensorRef& du, const TensorRef& x, const Device& device) {
    Access access;
    access.need(du, sizeof(D));
    access.need(x, sizeof(T));
    access.pairs = access.pairs && g.multiplier == 1 && g.C % kPair == 0;
    choice = choose_weight_gradient<D, T>(g, access);
    const int groups = narrow(g.out_channels() / choice.channels);
    units = units_of(g.N, g.P, g.Q, choice.rows, choice.walks, groups, threads_wanted(device, choice.blocks));
    shares = shares_of(groups, channels_inside(du), units, choice.blocks, device);
  }
  std::size_t bytes(const DepthwiseGeometry& g) const {
    return partial_bytes<compute<T>>(shares.lines, g.R * g.S, g.out_channels());
  }
};

template <class D, class T>
void weight_gradient(const DepthwiseGeometry& g, const TensorRef& du, const TensorRef& x, void* grad_weight,
                     const Device& device, void* scratch, Stream stream) {
  using C = compute<T>;
  const WeightPlan<D, T> plan(g, du, x, device);
  const Sizes sizes = sizes_of(g);
  if (plan.shares.lines > 0) {
    const WeightGradient<D, T> params{map_of<const D>(du), map_of<const T>(x), static_cast<C*>(scratch), sizes,
                                      plan.units,          plan.shares};
    const index_t blocks = static_cast<index_t>(plan.shares.lines) * plan.shares.tiles;
    launch(plan.choice.kernel, grid_of(blocks, kThreads, block_sums_bytes<C, kPair>(kThreads)), stream, params);
  }
  sum_weight<C>(scratch, plan.shares.lines, sizes.R * sizes.S, sizes.D, sizes.bank, {grad_weight, dtype_of<T>}, stream);
}

// Two blocks a multiprocessor where the sums are recomputed: activations and their derivatives, beside taps and sums,
// spill at three.
template <class T>
Choice<EpilogueGradient<T>> choose_epilogue_gradient(const DepthwiseGeometry& g, const Access& access, bool recompute) {
  if constexpr (kHasPairs<T>) {
    if (access.pairs && !recompute) return {epilogue_gradient_kernel<T, NoWindow, 1, kPair, 4>, 1, kPair, 4, true};
    if (access.pairs && access.windows) {
      if (Window3::fits(g)) return {epilogue_gradient_kernel<T, Window3, 2, kPair, 2>, 2, kPair, 2, true};
      if (Window3Half::fits(g)) return {epilogue_gradient_kernel<T, Window3Half, 2, kPair, 2>, 2, kPair, 2, true};
    }
    if (access.pairs) return {epilogue_gradient_kernel<T, AnyWindow, 1, kPair, 2>, 1, kPair, 2};
  }
  if (!recompute) return {epilogue_gradient_kernel<T, NoWindow, 1, 1, 4>, 1, 1, 4};
  return {epilogue_gradient_kernel<T, AnyWindow, 1, 1, 2>, 1, 1, 2};
}

// What both gradients that lead to du, of an epilogue and of the statistics, are asked for.
template <class T>
struct EpilogueGradientJob {
  const DepthwiseGeometry& g;
  TensorRef input, grad_output, saved, du;
  bool wide;       // du is of float
  bool recompute;  // from input and weight
  const void* weight;
  EpilogueRef epilogue;
  EpilogueGrads grads;
  StatisticsGradient<compute<T>> statistics{};

  // Scratch for the partial results.
  std::size_t bytes(const Device& device) const {
    return partial_bytes<compute<T>>(plan(device).shares.lines, kMaxVectors, g.out_channels());
  }

  void run(const Device& device, void* scratch, Stream stream) const {
    using C = compute<T>;
    const Plan p = plan(device);
    SumLines sums{scratch, p.shares.lines, 0, narrow(g.out_channels()), false, {}};
    const auto segment = [&](void* data, DType dtype) {
      if (data == nullptr) return -1;
      sums.vector[sums.segments] = {data, dtype};
      return sums.segments++;
    };
    const int bias = segment(grads.bias, grads.bias_dtype), scale = segment(grads.scale, grads.scale_dtype),
              shift = segment(grads.shift, grads.shift_dtype);
    if (p.shares.lines > 0) {
      const EpilogueGradient<T> params{map_of<const T>(input),
                                       map_of<const T>(grad_output),
                                       map_of<const T>(saved),
                                       map_of<T>(grads.residual),
                                       du,
                                       wide,
                                       static_cast<const T*>(weight),
                                       epilogue,
                                       statistics,
                                       static_cast<C*>(scratch),
                                       sums.segments,
                                       bias,
                                       scale,
                                       shift,
                                       sizes_of(g),
                                       p.units,
                                       p.shares};
      const index_t blocks = static_cast<index_t>(p.shares.lines) * p.shares.tiles;
      launch(p.choice.kernel, grid_of(blocks, kThreads, block_sums_bytes<C, kPair>(kThreads)), stream, params);
    }
    if (sums.segments > 0) sum_lines<C>(sums, stream);
  }

 private:
  struct Plan {
    Choice<EpilogueGradient<T>> choice;
    Units units;
    Shares shares;
  };
  Plan plan(const Device& device) const {
    Access access;
    if (recompute) access.need(input, sizeof(T));
    access.need(grad_output, sizeof(T));
    access.need(saved, sizeof(T));
    access.need(du, wide ? sizeof(float) : sizeof(T));
    access.need(grads.residual, sizeof(T));
    if (epilogue.post != Activation::none) access.need(epilogue.residual, sizeof(T));
    access.pairs = access.pairs && g.multiplier == 1 && g.C % kPair == 0;
    Plan p;
    p.choice = choose_epilogue_gradient<T>(g, access, recompute);
    const int groups = narrow(g.out_channels() / p.choice.channels);
    p.units = units_of(g.N, g.P, g.Q, p.choice.rows, p.choice.walks, groups, threads_wanted(device, p.choice.blocks));
    p.shares = shares_of(groups,
                         channels_inside(grad_output.data ? grad_output
                                         : du.data        ? du
                                                          : input),
                         p.units, p.choice.blocks, device);
    return p;
  }
};

// A map [N, D, P, Q] in scratch, in the order of `like`.
TensorRef scratch_map(Scratch& scratch, const DepthwiseGeometry& g, const TensorRef& like, std::size_t element) {
  const index_t channels = g.out_channels(), pixels = g.P * g.Q;
  void* const data = scratch.take(static_cast<std::size_t>(g.N * channels * pixels) * element);
  if (channels_inside(like)) return {data, pixels * channels, 1, g.Q * channels, channels};
  return {data, channels * pixels, pixels, g.Q, 1};
}

// Where a backward pass runs; `launching` false: nothing is launched, the bytes of scratch are counted.
struct Run {
  const Device& device;
  Scratch scratch;
  Stream stream;
  bool launching;
};

// What follows from du.
void from_sums(DType dtype, const DepthwiseGeometry& g, const Gradient& du, const TensorRef& input, const void* weight,
               const TensorRef& grad_input, void* grad_weight, Run& run) {
  if (grad_weight != nullptr) {
    void* const partial = run.scratch.take(depthwise_weight_gradient_scratch(dtype, g, du, input, run.device));
    if (run.launching) depthwise_weight_gradient(dtype, g, du, input, grad_weight, run.device, partial, run.stream);
  }
  if (run.launching && grad_input.data != nullptr) {
    depthwise_input_gradient(dtype, g, du, weight, grad_input, run.device, run.stream);
  }
}

template <class T>
void to_sums(const EpilogueGradientJob<T>& job, Run& run) {
  void* const partial = run.scratch.take(job.bytes(run.device));
  if (run.launching) job.run(run.device, partial, run.stream);
}

template <class T>
void backward(const DwconvBackwardArgs& args, Run& run) {
  const DepthwiseGeometry& g = args.g;
  const EpilogueRef& e = args.epilogue;
  const EpilogueGrads& grads = args.grads;
  const bool vectors = grads.bias || grads.scale || grads.shift || grads.residual.data;
  const bool wants_du = args.grad_input.data || args.grad_weight;
  // The gradient at the sums is that of the output, and is not stored again.
  const bool same = e.activation == Activation::none && e.post == Activation::none && e.scale.data == nullptr;
  const bool recompute = args.output.data == nullptr && needs_sums(e, grads);
  TensorRef stored;
  if (wants_du && !same) stored = scratch_map(run.scratch, g, args.input, sizeof(T));
  if (vectors || stored.data) {
    to_sums<T>({g, args.input, args.grad_output, args.output, stored, false, recompute, args.weight, e, grads}, run);
  }
  from_sums(dtype_of<T>, g, {stored.data ? stored : args.grad_output, dtype_of<T>}, args.input, args.weight,
            args.grad_input, args.grad_weight, run);
}

template <class T>
void statistics_backward(const DwconvStatsBackwardArgs& args, Run& run) {
  using C = compute<T>;
  const DepthwiseGeometry& g = args.g;
  // In the compute type: divided by the pixels of a large batch, the gradient is too small for float16.
  const TensorRef du = scratch_map(run.scratch, g, args.input, sizeof(C));
  EpilogueRef only_bias;
  only_bias.bias = args.bias;
  EpilogueGrads grads;
  grads.bias = args.grad_bias;
  grads.bias_dtype = args.grad_bias_dtype;
  const double pixels = static_cast<double>(g.N) * static_cast<double>(g.P) * static_cast<double>(g.Q);
  to_sums<T>({g,
              args.input,
              {},
              {},
              du,
              sizeof(T) == 2,
              true,
              args.weight,
              only_bias,
              grads,
              {static_cast<const C*>(args.mean), static_cast<const C*>(args.grad_mean),
               static_cast<const C*>(args.grad_var), static_cast<C>(1 / pixels)}},
             run);
  from_sums(dtype_of<T>, g, {du, dtype_of<C>}, args.input, args.weight, args.grad_input, args.grad_weight, run);
}

// ---- statistics: host ----

template <class T>
struct StatisticsPlan {
  Choice<Statistics<T>> choice;
  Units units;
  Shares shares;

  StatisticsPlan(const DwconvStatsArgs& args, const Device& device) {
    const DepthwiseGeometry& g = args.g;
    Access access;
    access.need(args.input, sizeof(T));
    access.pairs = access.pairs && g.multiplier == 1 && g.C % kPair == 0;
    choice = choose(g, access);
    const int groups = narrow(g.out_channels() / choice.channels);
    units = units_of(g.N, g.P, g.Q, choice.rows, choice.walks, groups, threads_wanted(device, choice.blocks));
    shares = shares_of(groups, channels_inside(args.input), units, choice.blocks, device);
  }
  std::size_t bytes(const DepthwiseGeometry& g) const {
    return partial_bytes<compute<T>>(shares.lines, kMomentSegments, g.out_channels());
  }

 private:
  static Choice<Statistics<T>> choose(const DepthwiseGeometry& g, const Access& access) {
    if constexpr (kHasPairs<T>) {
      if (access.pairs && access.windows) {
        if (Window3::fits(g)) return {statistics_kernel<T, Window3, 2, kPair, 4>, 2, kPair, 4, true};
        if (Window3Half::fits(g)) return {statistics_kernel<T, Window3Half, 1, kPair, 4>, 1, kPair, 4, true};
        if (Window5::fits(g)) return {statistics_kernel<T, Window5, 2, kPair, 2>, 2, kPair, 2, true};
      }
      if (access.pairs) return {statistics_kernel<T, AnyWindow, 1, kPair, 3>, 1, kPair, 3};
    }
    return {statistics_kernel<T, AnyWindow, 1, 1, kBlocks<T>>, 1, 1, kBlocks<T>};
  }
};

template <class T>
void statistics(const DwconvStatsArgs& args, const Device& device, void* scratch, Stream stream) {
  using C = compute<T>;
  const StatisticsPlan<T> plan(args, device);
  const Sizes g = sizes_of(args.g);
  C* const partial = static_cast<C*>(scratch);
  if (plan.shares.lines > 0) {
    const Statistics<T> params{
        map_of<const T>(args.input), static_cast<const T*>(args.weight), partial, g, plan.units, plan.shares};
    const index_t blocks = static_cast<index_t>(plan.shares.lines) * plan.shares.tiles;
    launch(plan.choice.kernel, grid_of(blocks, kThreads, 2 * kThreads * sizeof(Moments<C>)), stream, params);
  }
  const CombineMoments<C> combine{partial,   plan.shares.lines,          g.D,
                                  args.bias, static_cast<C*>(args.mean), static_cast<C*>(args.var)};
  launch(combine_moments_kernel<T>, grid_of(ceil_div(g.D, kWarp), kSumThreads, kSumThreads * sizeof(Moments<double>)),
         stream, combine);
}

}  // namespace

// ---- the host functions ----

void depthwise_input_gradient(DType dtype, const DepthwiseGeometry& g, const Gradient& du, const void* weight,
                              const TensorRef& grad_input, const Device& device, Stream stream) {
  with_types(du.dtype, dtype, [&](auto gradient, auto element) {
    input_gradient<decltype(gradient), decltype(element)>(g, du.map, weight, grad_input, device, stream);
  });
}

std::size_t depthwise_weight_gradient_scratch(DType dtype, const DepthwiseGeometry& g, const Gradient& du,
                                              const TensorRef& input, const Device& device) {
  return with_types(du.dtype, dtype, [&](auto gradient, auto element) {
    return WeightPlan<decltype(gradient), decltype(element)>(g, du.map, input, device).bytes(g);
  });
}

void depthwise_weight_gradient(DType dtype, const DepthwiseGeometry& g, const Gradient& du, const TensorRef& input,
                               void* grad_weight, const Device& device, void* scratch, Stream stream) {
  with_types(du.dtype, dtype, [&](auto gradient, auto element) {
    weight_gradient<decltype(gradient), decltype(element)>(g, du.map, input, grad_weight, device, scratch, stream);
  });
}

void dwconv_fwd(DType dtype, const DwconvForwardArgs& args, const Device& device, Stream stream) {
  with_type(dtype, [&](auto element) {
    using T = decltype(element);
    Access access;
    access.need(args.input, sizeof(T));
    access.need(args.output, sizeof(T));
    access.need(args.epilogue.residual, sizeof(T));
    access.pairs = access.pairs && args.g.multiplier == 1 && args.g.C % kPair == 0;
    launch_forward<T, T>(args.g, choose_forward<T>(args.g, access, is_clamp(args.epilogue)), args.input, args.output,
                         args.weight, args.epilogue, false, device, stream);
  });
}

std::size_t dwconv_bwd_scratch(DType dtype, const DwconvBackwardArgs& args, const Device& device) {
  Run run{device, Scratch::counting(), nullptr, false};
  with_type(dtype, [&](auto element) { backward<decltype(element)>(args, run); });
  return run.scratch.used();
}

void dwconv_bwd(DType dtype, const DwconvBackwardArgs& args, const Device& device, void* scratch, Stream stream) {
  Run run{device, Scratch(scratch), stream, true};
  with_type(dtype, [&](auto element) { backward<decltype(element)>(args, run); });
}

std::size_t dwconv_stats_scratch(DType dtype, const DwconvStatsArgs& args, const Device& device) {
  return with_type(dtype, [&](auto element) { return StatisticsPlan<decltype(element)>(args, device).bytes(args.g); });
}

void dwconv_stats(DType dtype, const DwconvStatsArgs& args, const Device& device, void* scratch, Stream stream) {
  with_type(dtype, [&](auto element) { statistics<decltype(element)>(args, device, scratch, stream); });
}

std::size_t dwconv_stats_bwd_scratch(DType dtype, const DwconvStatsBackwardArgs& args, const Device& device) {
  Run run{device, Scratch::counting(), nullptr, false};
  with_type(dtype, [&](auto element) { statistics_backward<decltype(element)>(args, run); });
  return run.scratch.used();
}

void dwconv_stats_bwd(DType dtype, const DwconvStatsBackwardArgs& args, const Device& device, void* scratch,
                      Stream stream) {
  Run run{device, Scratch(scratch), stream, true};
  with_type(dtype, [&](auto element) { statistics_backward<decltype(element)>(args, run); });
}

}  // namespace effops::cuda
