// The depthwise window on registers: sizes, bounds, taps, bank indexing, and the sums of a cell of output pixels.
// Shared by the rooms.
#pragma once

#include "csrc/cuda/math.h"

namespace effops::cuda {

// ---- sizes ----

// A DepthwiseGeometry in 32 bits; D: output channels.
struct Sizes {
  int C, H, W, D, P, Q, R, S;
  int stride_h, stride_w, pad_top, pad_left, dilation_h, dilation_w;
  int multiplier, bank;
};

inline Sizes sizes_of(const DepthwiseGeometry& g) {
  // No sum or product of sizes that a kernel forms is larger than these.
  narrow(g.H + g.pad_top + g.P * g.stride_h + g.R * g.dilation_h);
  narrow(g.W + g.pad_left + g.Q * g.stride_w + g.S * g.dilation_w);
  narrow(g.R * g.S);
  return {narrow(g.C),          narrow(g.H),          narrow(g.W),          narrow(g.out_channels()),
          narrow(g.P),          narrow(g.Q),          narrow(g.R),          narrow(g.S),
          narrow(g.stride_h),   narrow(g.stride_w),   narrow(g.pad_top),    narrow(g.pad_left),
          narrow(g.dilation_h), narrow(g.dilation_w), narrow(g.multiplier), narrow(g.bank)};
}

// A window known at compile time, at dilation 1 and the same stride along both axes.
template <int Rows, int Columns, int Stride>
struct Window {
  static constexpr int R = Rows, S = Columns, kStride = Stride, kTaps = R * S;
  static bool fits(const DepthwiseGeometry& g) {
    return g.R == R && g.S == S && g.stride_h == Stride && g.stride_w == Stride && g.dilation_h == 1 &&
           g.dilation_w == 1;
  }
};

// One that only the Sizes know.
struct AnyWindow {
  static constexpr int R = 1, S = 1, kStride = 1, kTaps = 1;
};

// The taps t in [begin, end) of an axis for which start + t * dilation lies inside [0, size).
struct TapRange {
  int begin, end;
};
EFFOPS_DEVICE TapRange valid_taps(int start, int dilation, int taps, int size) {
  const int begin = start >= 0 ? 0 : (-start + dilation - 1) / dilation;
  const int end = start >= size ? 0 : (size - 1 - start) / dilation + 1;
  return {begin, end < taps ? end : taps};
}

EFFOPS_DEVICE bool inside(int i, int size) { return static_cast<unsigned>(i) < static_cast<unsigned>(size); }

// Some columns of a band of output rows of an image.
struct Cell {
  index_t n;
  int p, q, count;
};

// ---- taps ----

// Where the kernel of output channel o starts.
template <class T>
EFFOPS_DEVICE const T* kernel_of(const T* weight, const Sizes& g, int taps, int o) {
  return weight + static_cast<index_t>(o % g.bank) * taps;
}

// The taps of output channels o .. o + N - 1. `turned`: by half a turn, as the gradient of the input wants them.
template <class Window, int N, class T>
EFFOPS_DEVICE void load_taps(const T* weight, const Sizes& g, int o, bool turned,
                             compute<T> (&taps)[Window::kTaps][N]) {
  EFFOPS_UNROLL
  for (int j = 0; j < N; ++j) {
    const T* tap = kernel_of(weight, g, Window::kTaps, o + j) + (turned ? Window::kTaps - 1 : 0);
    EFFOPS_UNROLL
    for (int t = 0; t < Window::kTaps; ++t, tap += turned ? -1 : 1) taps[t][j] = to_compute(load_global_cached(tap));
  }
}

// ---- sums ----

// Rows of a window are told apart in 32 bits: one multiply-add an address.
template <class T>
EFFOPS_DEVICE int row_stride_of(const Map<T>& map) {
  return static_cast<int>(map.h);
}
// Whether they can be.
inline bool short_rows(const TensorRef& map) {
  constexpr index_t kRowsOfAnyCell = 32;
  return map.h * kRowsOfAnyCell <= std::numeric_limits<int>::max();
}

// One column of a strip: the values of N channels in Rows consecutive rows from `row` on; zeros outside the map. All
// accesses are issued before the first is used.
template <int Rows, int N, class T>
struct Column {
  Pieces<T, N> raw[Rows];

  // at: the element of this column in row `row`, which need not exist. row_stride: see short_rows().
  EFFOPS_DEVICE void load(const T* at, int row_stride, unsigned rows) {
    EFFOPS_UNROLL
    for (int i = 0; i < Rows; ++i) {
      if (rows >> i & 1) {
        raw[i].load(at + i * row_stride);
      } else {
        raw[i] = Pieces<T, N>{};
      }
    }
  }
  EFFOPS_DEVICE void values(int row, compute<T> (&v)[N]) const {
    EFFOPS_UNROLL
    for (int j = 0; j < N; ++j) v[j] = to_compute(raw[row][j]);
  }
};

// Bit i: whether row + i is inside the map.
template <int Rows>
EFFOPS_DEVICE unsigned rows_inside(int row, int height) {
  unsigned rows = 0;
  EFFOPS_UNROLL
  for (int i = 0; i < Rows; ++i) rows |= inside(row + i, height) ? 1u << i : 0u;
  return rows;
}

// add(output, r) for each of a cell's output rows that row i of its x reaches, and the row r of the window it meets there.
template <class Window, int Rows, class Add>
EFFOPS_DEVICE void outputs_under(int i, const Add& add) {
  EFFOPS_UNROLL
  for (int output = 0; output < Rows; ++output) {
    const int r = i - output * Window::kStride;
    if (r >= 0 && r < Window::R) add(output, r);
  }
}

// A walk along the columns of x that the output columns of `cell` need, and no further; every element is loaded once
// and meets each of the output columns that it reaches, of which kOpen = ceil(S / stride) are open at a time.
//
//      input rows   x  x  x  x      the columns of one step, stride 1, 3x3, Rows = 2
//      p - 1        .  .  .  o ---> output columns q, q - 1, q - 2: open = 0, 1, 2, columns 0, 1, 2 of the taps
//      p            .  .  .  o      column q - 2 is complete behind this step
//      p + 1        .  .  .  o
//      p + 2        .  .  .  o
//
// At step 1 - kOpen .. count - 1, after which output column cell.q + step is complete: before(step), then
// add(open, output, tap, values of N channels) for each product, then after(step). o: the thread's first channel, of N
// that lie side by side.
template <class Window, int Rows>
struct Walk {
  static constexpr int kStride = Window::kStride;
  static constexpr int kRows = (Rows - 1) * kStride + Window::R;
  static constexpr int kOpen = (Window::S + kStride - 1) / kStride;
  static constexpr int kLast =
      Window::S - (kOpen - 1) * kStride;  // columns of the last step that the last output needs

  template <int N, class T, class Before, class Add, class After>
  EFFOPS_DEVICE static void along(const Map<const T>& x, int o, const Sizes& g, const Cell& cell, const Before& before,
                                  const Add& add, const After& after) {
    const int row = cell.p * kStride - g.pad_top;
    int column = cell.q * kStride - g.pad_left;
    const unsigned rows = rows_inside<kRows>(row, g.H);
    const T* at = x.at(cell.n, o, 0, 0) + row * x.h + column * x.w;
    EFFOPS_NO_UNROLL
    for (int step = 1 - kOpen; step < cell.count; ++step) {
      before(step);
      EFFOPS_UNROLL
      for (int k = 0; k < kStride; ++k, ++column, at += x.w) {
        const bool needed = k < kLast || step + 1 < cell.count;
        Column<kRows, N, T> loaded;
        loaded.load(at, row_stride_of(x), needed && inside(column, g.W) ? rows : 0u);
        EFFOPS_UNROLL
        for (int i = 0; i < kRows; ++i) {
          compute<T> values[N];
          loaded.values(i, values);
          EFFOPS_UNROLL
          for (int open = 0; open < kOpen; ++open) {
            const int s = open * kStride + k;
            if (s >= Window::S) continue;
            outputs_under<Window, Rows>(i, [&](int output, int r) { add(open, output, r * Window::S + s, values); });
          }
        }
      }
      after(step);
    }
  }
};

// emit(q, sums[Rows][N]) for each output column of a cell.
template <class Window, int Rows, int N, class T, class Emit>
EFFOPS_DEVICE void slide(const Map<const T>& x, int o, const Sizes& g, const Cell& cell,
                         const compute<T> (&taps)[Window::kTaps][N], const Emit& emit) {
  using C = compute<T>;
  constexpr int kOpen = Walk<Window, Rows>::kOpen;
  C sums[kOpen][Rows][N] = {};
  Walk<Window, Rows>::template along<N>(
      x, o, g, cell, [](int) {},
      [&](int open, int output, int tap, const C(&values)[N]) {
        EFFOPS_UNROLL
        for (int j = 0; j < N; ++j) sums[open][output][j] += values[j] * taps[tap][j];
      },
      [&](int step) {
        if (step >= 0) emit(cell.q + step, sums[kOpen - 1]);
        EFFOPS_UNROLL
        for (int open = kOpen - 1; open >= 0; --open) {
          EFFOPS_UNROLL
          for (int output = 0; output < Rows; ++output) {
            EFFOPS_UNROLL
            for (int j = 0; j < N; ++j) {
              sums[open][output][j] = open > 0 ? sums[open > 0 ? open - 1 : 0][output][j] : C(0);
            }
          }
        }
      });
}

// The sums of one channel in one output column, where neighbouring threads own neighbouring columns and share its input
// in L1.
template <class Window, int Rows, class T>
EFFOPS_DEVICE void column_sums(const Map<const T>& x, int o, const Sizes& g, const Cell& cell,
                               const compute<T> (&taps)[Window::kTaps][1], compute<T> (&sums)[Rows][1]) {
  constexpr int kRows = Walk<Window, Rows>::kRows;
  const int row = cell.p * Window::kStride - g.pad_top, column = cell.q * Window::kStride - g.pad_left;
  const unsigned rows = rows_inside<kRows>(row, g.H);
  const T* at = x.at(cell.n, o / g.multiplier, 0, 0) + row * x.h + column * x.w;
  EFFOPS_UNROLL
  for (int output = 0; output < Rows; ++output) fill(sums[output], compute<T>(0));
  EFFOPS_UNROLL
  for (int s = 0; s < Window::S; ++s, at += x.w) {
    Column<kRows, 1, T> loaded;
    loaded.load(at, row_stride_of(x), inside(column + s, g.W) ? rows : 0u);
    EFFOPS_UNROLL
    for (int i = 0; i < kRows; ++i) {
      compute<T> value[1];
      loaded.values(i, value);
      outputs_under<Window, Rows>(i,
                                  [&](int output, int r) { sums[output][0] += value[0] * taps[r * Window::S + s][0]; });
    }
  }
}

// What a thread that owns V neighbouring output columns takes of one row of x: the columns above them, in accesses of
// 16 bytes at most, and those beside them, which its neighbours load too. For windows of three columns at padding 1.
template <class Window, int V, class T>
struct RowSegment {
  static_assert(Window::S == 3);
  static constexpr int kMiddle = V * Window::kStride;
  static constexpr bool kBehind = Window::kStride == 1;
  Pieces<T, kMiddle> middle;
  Vec<T, 1> before, behind;

  EFFOPS_DEVICE void load(const T* at, bool there, bool has_before, bool has_behind) {
    middle = Pieces<T, kMiddle>{};
    before = behind = Vec<T, 1>{};
    if (!there) return;
    middle.load(at);
    if (has_before) before = load_vec<T, 1>(at - 1);
    if (kBehind && has_behind) behind = load_vec<T, 1>(at + kMiddle);
  }
  // Of the window's columns, 0: the one before.
  EFFOPS_DEVICE compute<T> value(int column) const {
    if (column == 0) return to_compute(before.v[0]);
    return to_compute(column <= kMiddle ? middle[column <= kMiddle ? column - 1 : 0] : behind.v[0]);
  }
};

// The way down `rows` rows of V output columns of one channel, where columns lie side by side: every row of x is loaded
// once and added to each of the output rows that it reaches; the next one is on its way meanwhile. emit(sums[V]) for
// one output row after the other.
template <class Window, int V, class T, class Emit>
EFFOPS_DEVICE void descend(const Map<const T>& x, int o, const Sizes& g, const Cell& cell, int rows,
                           const compute<T> (&taps)[Window::kTaps][1], const Emit& emit) {
  using C = compute<T>;
  constexpr int kStride = Window::kStride, kOpen = (Window::R + kStride - 1) / kStride;
  C sums[kOpen][V] = {};
  int row = cell.p * kStride - g.pad_top;
  const int end = row + (rows - 1) * kStride + Window::R;
  const bool has_before = cell.q > 0, has_behind = cell.q + V < g.Q;
  const T* at = x.at(cell.n, o / g.multiplier, 0, 0) + row * x.h + cell.q * kStride;
  RowSegment<Window, V, T> next;
  next.load(at, inside(row, g.H), has_before, has_behind);
  EFFOPS_NO_UNROLL
  for (int step = 1 - kOpen; step < rows; ++step) {
    EFFOPS_UNROLL
    for (int k = 0; k < kStride; ++k) {
      const RowSegment<Window, V, T> loaded = next;
      ++row, at += x.h;
      next.load(at, row < end && inside(row, g.H), has_before, has_behind);
      EFFOPS_UNROLL
      for (int open = 0; open < kOpen; ++open) {
        const int r = open * kStride + k;
        if (r >= Window::R) continue;
        EFFOPS_UNROLL
        for (int output = 0; output < V; ++output) {
          EFFOPS_UNROLL
          for (int s = 0; s < Window::S; ++s) {
            sums[open][output] += loaded.value(output * kStride + s) * taps[r * Window::S + s][0];
          }
        }
      }
    }
    if (step >= 0) emit(sums[kOpen - 1]);
    EFFOPS_UNROLL
    for (int open = kOpen - 1; open >= 0; --open) {
      EFFOPS_UNROLL
      for (int output = 0; output < V; ++output)
        sums[open][output] = open > 0 ? sums[open > 0 ? open - 1 : 0][output] : C(0);
    }
  }
}

// The sums of output channels o .. o + N - 1 at one pixel for any window, stride and dilation, in a loop over the taps.
// N > 1 wants channels side by side and multiplier 1.
template <int N, class In, class T>
EFFOPS_DEVICE void window_sums(const Map<const In>& x, const T* weight, const Sizes& g, index_t n, int o, int p, int q,
                               compute<T> (&sums)[N]) {
  const int row = p * g.stride_h - g.pad_top, column = q * g.stride_w - g.pad_left;
  const TapRange r_range = valid_taps(row, g.dilation_h, g.R, g.H);
  const TapRange s_range = valid_taps(column, g.dilation_w, g.S, g.W);
  const In* image = x.at(n, o / g.multiplier, 0, 0);
  const T* kernels[N];
  EFFOPS_UNROLL
  for (int j = 0; j < N; ++j) kernels[j] = kernel_of(weight, g, g.R * g.S, o + j);
  fill(sums, compute<T>(0));
  for (int r = r_range.begin; r < r_range.end; ++r) {
    const In* line = image + (row + r * g.dilation_h) * x.h;
    for (int s = s_range.begin; s < s_range.end; ++s) {
      compute<T> value[N];
      load_channels<N>(line + (column + s * g.dilation_w) * x.w, value);
      EFFOPS_UNROLL
      for (int j = 0; j < N; ++j) {
        sums[j] += value[j] * to_compute(load_global_cached(kernels[j] + r * g.S + s));
      }
    }
  }
}

}  // namespace effops::cuda
