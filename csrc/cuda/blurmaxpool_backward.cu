// Room blurmaxpool, backward: the gradient of the input, gathered. Nothing is saved or stored in between: which pixel a
// window took is found again, and the gradient at the pooled map is summed where it is used.
//
//   A thread owns one column of two channels (channels_last, an access each) or of one (its neighbours are then the
//   columns beside it), and walks down a strip of rows; the next row is on its way meanwhile.
//
//      windows 2x2, at pooled row h:     x  o  x     three columns of the two rows that the windows cover; the upper
//                                        x  o  x     one is there from the step before
//
//        for each of the two windows that have the column o: which of its four is the largest, the first of equal ones;
//        if it is one of the two o, the gradient at the pooled pixel is added to that row's sum:
//                                        sum over rows p, columns q of grad: weight(h, p) weight(w, q) grad[p][q]
//        the weights along the width are in registers: they do not change on the way down
//        the upper row has met all of its windows behind this step, and is stored
//
//      What would be beyond the map is its outermost row or column again, and counts as that: as values that come first
//      or last of a window, copies change no choice.
//
//   Other pools and filters: a pixel a thread, in loops over the windows that have it.
//
//   bytes an input value (fp16, stride 2)    x 2, grad 0.5, dx 2
//
// Roofline, calculated for an H200 (4.3 TB/s), nothing measured: float16 [128, 64, 112, 112], pool 2x2, blur 3x3,
// stride 2: 463 MB, 110 us; [128, 128, 28, 28]: 58 MB, 13 us. Issuing takes longer: 300 instructions a step of two
// channels (SASS of sm_90, no edge near), at 4 x 1.755 GHz a multiprocessor 520 us for the first shape; half of them
// find the two windows' choices. Unverified on a GPU.
#include "csrc/cuda/blurmaxpool.h"

namespace effops::cuda {
namespace {

template <class T>
struct Backward {
  Map<const T> x, grad;
  Map<T> dx;
  PoolSizes pool;
  Blur blur;
  Units units;  // of input pixels
  Assignment assignment;
};

// ---- any pool and filter ----

template <class T>
EFFOPS_DEVICE compute<T> pooled_gradient(const Backward<T>& a, index_t n, int channel, int h, int w) {
  using C = compute<T>;
  const BlurRange rows = outputs_of(a.blur, a.blur.rows, h, h), columns = outputs_of(a.blur, a.blur.columns, w, w);
  C sum = 0;
  for (int q = columns.begin; q < columns.end; ++q) {
    C line = 0;
    for (int p = rows.begin; p < rows.end; ++p) {
      line += weighted(blur_weight<C>(a.blur, a.blur.rows, h, p), to_compute(*a.grad.at(n, channel, p, q)));
    }
    sum += weighted(blur_weight<C>(a.blur, a.blur.columns, w, q), line);
  }
  return sum;
}

// Whether the window of pooled pixel (h, w) took the input pixel (row, column).
template <class T>
EFFOPS_DEVICE bool took(const Backward<T>& a, const T* image, int h, int w, int row, int column) {
  compute<T> largest = 0;
  bool any = false, found = false;  // whether there was a pixel before; whether it is the largest so far
  for (int i = 0; i < a.pool.window_h; ++i) {
    const int y = h - a.pool.pool_top + i;
    for (int k = 0; k < a.pool.window_w; ++k) {
      const int z = w - a.pool.pool_left + k;
      if (!inside(y, a.pool.H) || !inside(z, a.pool.W)) continue;
      const compute<T> value = to_compute(image[y * a.x.h + z * a.x.w]);
      if (any && !takes_second(largest, value)) continue;
      any = true, largest = value, found = y == row && z == column;
    }
  }
  return found;
}

template <class T>
EFFOPS_KERNEL(kThreads, 4)
blur_max_pool_gradient_any_kernel(EFFOPS_PARAMS Backward<T> a) {
  const Owned owned = owned_by(a.assignment, a.units, global_thread());
  if (owned.unit >= a.units.total) return;
  const Cell cell = cell_of(a.units, owned.unit, a.pool.W);
  const int channel = owned.group, last_h = cell.p + a.pool.pool_top, last_w = cell.q + a.pool.pool_left;
  const T* image = a.x.at(cell.n, channel, 0, 0);
  compute<T> sum = 0;
  for (int h = last_h - a.pool.window_h + 1; h <= last_h; ++h) {
    if (!inside(h, a.blur.rows.length)) continue;
    for (int w = last_w - a.pool.window_w + 1; w <= last_w; ++w) {
      if (!inside(w, a.blur.columns.length) || !took(a, image, h, w, cell.p, cell.q)) continue;
      sum += pooled_gradient(a, cell.n, channel, h, w);
    }
  }
  *a.dx.at(cell.n, channel, cell.p, cell.q) = from_compute<T>(sum);
}

// ---- known ones ----

// The weights of the rows of `grad` on pooled row h, and the columns' shares of it: sum over p of weight(h, p) grad[p].
template <class T, int N, int Rows, int Columns>
EFFOPS_DEVICE void weigh_rows(const Backward<T>& a, const T* image, int h, const int (&columns)[Columns],
                              compute<T> (&sums)[Columns][N]) {
  using C = compute<T>;
  const int first = outputs_of(a.blur, a.blur.rows, h, h).begin;
  EFFOPS_UNROLL
  for (int i = 0; i < Rows; ++i) {
    const C weight = blur_weight<C>(a.blur, a.blur.rows, h, first + i);
    const T* at = image + clamped(first + i, a.blur.rows.outputs) * a.grad.h;
    EFFOPS_UNROLL
    for (int t = 0; t < Columns; ++t) {
      C grad[N];
      load_channels<N>(at + columns[t], grad);
      EFFOPS_UNROLL
      for (int j = 0; j < N; ++j) sums[t][j] += weighted(weight, grad[j]);
    }
  }
}

template <class T, int N, int Size, int Window, int Stride, int Blocks>
EFFOPS_KERNEL(kThreads, Blocks)
blur_max_pool_gradient_kernel(EFFOPS_PARAMS Backward<T> a) {
  using C = compute<T>;
  constexpr int kColumns = 2 * Window - 1, kReach = Size / 2;
  constexpr int kRowsOfGrad = 2 * kReach / Stride + 1, kColumnsOfGrad = (Window - 1 + 2 * kReach) / Stride + 1;
  const Owned owned = owned_by(a.assignment, a.units, global_thread());
  if (owned.unit >= a.units.total) return;
  const Cell cell = cell_of(a.units, owned.unit, a.pool.W);
  const int channel = owned.group * N, left = a.pool.H - cell.p;
  const int count = left < a.units.rows ? left : a.units.rows;
  // Window i starts at pooled column w + i and at column first_column + i, and has this column at Window - 1 - i.
  const int w = cell.q + a.pool.pool_left - (Window - 1), first_column = cell.q - (Window - 1);
  const int first_target = outputs_of(a.blur, a.blur.columns, w, w + Window - 1).begin;
  int columns[kColumns], targets[kColumnsOfGrad];
  bool own[kColumns];  // whether this is the thread's column, or a copy of it
  EFFOPS_UNROLL
  for (int k = 0; k < kColumns; ++k) {
    const int column = clamped(first_column + k, a.pool.W);
    own[k] = column == cell.q;
    columns[k] = column * static_cast<int>(a.x.w);
  }
  C weights[Window][kColumnsOfGrad];
  EFFOPS_UNROLL
  for (int t = 0; t < kColumnsOfGrad; ++t) {
    targets[t] = clamped(first_target + t, a.blur.columns.outputs) * static_cast<int>(a.grad.w);
    EFFOPS_UNROLL
    for (int i = 0; i < Window; ++i) weights[i][t] = blur_weight<C>(a.blur, a.blur.columns, w + i, first_target + t);
  }
  const T* image = a.x.at(cell.n, channel, 0, 0);
  const T* grad_image = a.grad.at(cell.n, channel, 0, 0);
  T* dx = a.dx.at(cell.n, channel, cell.p, cell.q);
  Pieces<T, N> values[Window][kColumns], next[kColumns];  // of the rows from `row` on; of the one behind them
  C sums[Window][N] = {};
  const auto load_row = [&](int place, Pieces<T, N>(&to)[kColumns]) {
    const T* at = image + clamped(place, a.pool.H) * a.x.h;
    EFFOPS_UNROLL
    for (int k = 0; k < kColumns; ++k) to[k].load(at + columns[k]);
  };
  // The first step is that of the first pooled row which has a row of the strip.
  int row = cell.p - (Window - 1);
  EFFOPS_UNROLL
  for (int i = 0; i < Window - 1; ++i) load_row(row + i, values[i + 1]);
  load_row(row + Window - 1, next);
  EFFOPS_NO_UNROLL
  for (int step = 1 - Window; step < count; ++step, ++row) {
    EFFOPS_UNROLL
    for (int k = 0; k < kColumns; ++k) {
      EFFOPS_UNROLL
      for (int i = 0; i < Window; ++i) values[i][k] = i + 1 < Window ? values[i + 1 < Window ? i + 1 : i][k] : next[k];
    }
    if (step + 1 < count) load_row(row + Window, next);
    C gradients[kColumnsOfGrad][N] = {};
    weigh_rows<T, N, kRowsOfGrad>(a, grad_image, row + a.pool.pool_top, targets, gradients);
    EFFOPS_UNROLL
    for (int i = 0; i < Window; ++i) {
      EFFOPS_UNROLL
      for (int j = 0; j < N; ++j) {
        C gradient = 0;
        EFFOPS_UNROLL
        for (int t = 0; t < kColumnsOfGrad; ++t) gradient += weighted(weights[i][t], gradients[t][j]);
        C largest = 0;
        int chosen = -1;  // the row from `row` on, if it is in this thread's column
        EFFOPS_UNROLL
        for (int y = 0; y < Window; ++y) {
          const int place = clamped(row + y, a.pool.H) - row;
          EFFOPS_UNROLL
          for (int k = 0; k < Window; ++k) {
            const C value = to_compute(values[y][i + k][j]);
            const bool taken = y + k == 0 || takes_second(largest, value);
            largest = taken ? value : largest;
            chosen = taken ? (own[i + k] ? place : -1) : chosen;
          }
        }
        EFFOPS_UNROLL
        for (int y = 0; y < Window; ++y) sums[y][j] += chosen == y ? gradient : C(0);
      }
    }
    if (step >= 0) {
      store_channels(dx, sums[0]);
      dx += a.dx.h;
    }
    EFFOPS_UNROLL
    for (int i = 0; i < Window; ++i) {
      EFFOPS_UNROLL
      for (int j = 0; j < N; ++j) sums[i][j] = i + 1 < Window ? sums[i + 1 < Window ? i + 1 : i][j] : C(0);
    }
  }
}

// ---- the host's choices ----

template <class T, int N, int Size, int Window, int Blocks>
Choice<Backward<T>> walk_down() {
  return {{1, N, Blocks, Walks::down}, blur_max_pool_gradient_kernel<T, N, Size, Window, 2, Blocks>};
}

template <class T>
Choice<Backward<T>> choose(const BlurMaxPoolArgs& args) {
  if constexpr (kHasPairs<T>) {
    const bool pairs = pairs_of<T>(args);
    constexpr int kOfPairs = sizeof(T) == 4 ? 3 : 4;  // blocks a multiprocessor: pairs of 8 bytes spill at four
    if (is_known<2, 3, 2>(args)) return pairs ? walk_down<T, kPair, 3, 2, kOfPairs>() : walk_down<T, 1, 3, 2, 4>();
    if (is_known<3, 4, 2>(args)) return pairs ? walk_down<T, kPair, 4, 3, 2>() : walk_down<T, 1, 4, 3, 2>();
  }
  return {{1, 1, 4}, blur_max_pool_gradient_any_kernel<T>};
}

template <class T>
void backward(const BlurMaxPoolArgs& args, const Device& device, Stream stream) {
  const Choice<Backward<T>> choice = choose<T>(args);
  const Units units = units_of(Extent{args.N, args.C, args.H, args.W}, choice, device);
  if (units.total == 0) return;
  const index_t groups = args.C / choice.channels;
  const Backward<T> params{map_of<const T>(args.input),
                           map_of<const T>(args.output),
                           map_of<T>(args.grad_input),
                           pool_sizes(args),
                           blur_of(args),
                           units,
                           {narrow(groups), channels_inside(args.grad_input)}};
  launch(choice.kernel, blocks_for(units.total * groups), stream, params);
}

}  // namespace

void blur_max_pool_bwd(DType dtype, const BlurMaxPoolArgs& args, const Device& device, Stream stream) {
  with_type(dtype, [&](auto element) { backward<decltype(element)>(args, device, stream); });
}

}  // namespace effops::cuda
