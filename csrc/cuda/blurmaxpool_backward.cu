// Room blurmaxpool, backward: the gradient of the input, gathered. Nothing is saved or stored in between: which pixel a
// window took is found again, and the gradient at the pooled map is summed where it is used.
//
//   A thread owns one column of two channels (channels_last, an access each) or of one (its neighbours are then the
//   columns beside it), and walks down a strip of rows.
//
//      windows 2x2, at pooled row h:     x  . o .     three columns of the two rows that the windows cover; the upper
//                                           . o .     one is there from the step before
//        for each of the two windows that have the column o: which of its four is the largest, the first of equal ones;
//        if it is one of the two o, the gradient at the pooled pixel is added to that row's sum:
//                                        sum over rows p, columns q of grad: weight(h, p) weight(w, q) grad[p][q]
//        the weights along the width are in registers: they do not change on the way down
//        the upper row has met all of its windows behind this step, and is stored
//
//   Other pools and filters: a pixel a thread, in loops over the windows that have it.
//
//   bytes an input value (fp16, stride 2)    x 2, grad 0.5, dx 2
//
// Roofline, calculated for an H200 (4.3 TB/s), nothing measured: float16 [128, 64, 112, 112], pool 2x2, blur 3x3,
// stride 2: 463 MB, 110 us; [128, 128, 28, 28]: 58 MB, 13 us. Some 130 instructions a step make the issue rate the
// bound: three times that. Unverified on a GPU.
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

// The largest value so far of a window, its pixels taken one after the other; padding is never the largest.
template <class C>
struct Largest {
  C value = C(-INFINITY);
  bool any = false;

  // Whether this pixel is the largest now.
  EFFOPS_DEVICE bool take(C next, bool there) {
    const bool taken = there && (!any || takes_second(value, next));
    value = taken ? next : value;
    any = any || there;
    return taken;
  }
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
  Largest<compute<T>> largest;
  bool found = false;
  for (int i = 0; i < a.pool.window_h; ++i) {
    const int y = h - a.pool.pool_top + i;
    for (int k = 0; k < a.pool.window_w; ++k) {
      const int z = w - a.pool.pool_left + k;
      if (!inside(y, a.pool.H) || !inside(z, a.pool.W)) continue;
      if (largest.take(to_compute(image[y * a.x.h + z * a.x.w]), true)) found = y == row && z == column;
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

// ---- windows of Window x Window ----

// What a thread has on its way down: of the last Window rows of x, the columns that its windows have, and the sums of
// its own column; index 0 is the uppermost.
template <class T, int N, int Window>
struct Patch {
  static constexpr int kColumns = 2 * Window - 1;
  Pieces<T, N> values[Window][kColumns];
  compute<T> sums[Window][N] = {};

  EFFOPS_DEVICE void move_down() {
    EFFOPS_UNROLL
    for (int i = 0; i < Window; ++i) {
      const bool last = i == Window - 1;
      EFFOPS_UNROLL
      for (int k = 0; k < kColumns; ++k) values[i][k] = last ? Pieces<T, N>{} : values[last ? i : i + 1][k];
      EFFOPS_UNROLL
      for (int j = 0; j < N; ++j) sums[i][j] = last ? compute<T>(0) : sums[last ? i : i + 1][j];
    }
  }
};

// Targets: the most outputs of a row that the windows of one column give to.
template <class T, int N, int Window, int Targets, int Blocks>
EFFOPS_KERNEL(kThreads, Blocks)
blur_max_pool_gradient_kernel(EFFOPS_PARAMS Backward<T> a) {
  using C = compute<T>;
  const Owned owned = owned_by(a.assignment, a.units, global_thread());
  if (owned.unit >= a.units.total) return;
  const Cell cell = cell_of(a.units, owned.unit, a.pool.W);
  const int channel = owned.group * N, left = a.pool.H - cell.p;
  const int count = left < a.units.rows ? left : a.units.rows;
  // Window i, from the right: it starts at pooled column w + i, and has this column at Window - 1 - i.
  const int w = cell.q + a.pool.pool_left - (Window - 1), first_column = cell.q - (Window - 1);
  const BlurRange targets = outputs_of(a.blur, a.blur.columns, w, w + Window - 1);
  C weights[Window][Targets];
  EFFOPS_UNROLL
  for (int i = 0; i < Window; ++i) {
    EFFOPS_UNROLL
    for (int t = 0; t < Targets; ++t) {
      weights[i][t] = blur_weight<C>(a.blur, a.blur.columns, w + i, targets.begin + t);
    }
  }
  Patch<T, N, Window> patch;
  // The first step is that of the last pooled row which has none of the strip's rows but its first.
  int h = cell.p + a.pool.pool_top - (Window - 1), row = cell.p - (Window - 1);
  const T* image = a.x.at(cell.n, channel, 0, 0);
  const auto load_row = [&](int i) {
    EFFOPS_UNROLL
    for (int k = 0; k < Patch<T, N, Window>::kColumns; ++k) {
      const int column = first_column + k;
      patch.values[i][k] = Pieces<T, N>{};
      if (inside(row + i, a.pool.H) && inside(column, a.pool.W)) {
        patch.values[i][k].load(image + (row + i) * a.x.h + column * a.x.w);
      }
    }
  };
  EFFOPS_UNROLL
  for (int i = 0; i < Window - 1; ++i) load_row(i);
  EFFOPS_NO_UNROLL
  for (int step = 1 - Window; step < count; ++step, ++h, ++row) {
    load_row(Window - 1);
    if (inside(h, a.blur.rows.length)) {
      C gradients[Targets][N] = {};  // of the outputs' columns, the rows' weights on them
      const BlurRange rows = outputs_of(a.blur, a.blur.rows, h, h);
      for (int p = rows.begin; p < rows.end; ++p) {
        const C weight = blur_weight<C>(a.blur, a.blur.rows, h, p);
        EFFOPS_UNROLL
        for (int t = 0; t < Targets; ++t) {
          if (targets.begin + t >= targets.end) break;
          C grad[N];
          load_channels<N>(a.grad.at(cell.n, channel, p, targets.begin + t), grad);
          EFFOPS_UNROLL
          for (int j = 0; j < N; ++j) gradients[t][j] += weighted(weight, grad[j]);
        }
      }
      EFFOPS_UNROLL
      for (int i = 0; i < Window; ++i) {
        if (!inside(w + i, a.blur.columns.length)) continue;
        EFFOPS_UNROLL
        for (int j = 0; j < N; ++j) {
          C gradient = 0;
          EFFOPS_UNROLL
          for (int t = 0; t < Targets; ++t) gradient += weighted(weights[i][t], gradients[t][j]);
          Largest<C> largest;
          int chosen = -1;  // the row, if it is in this thread's column
          EFFOPS_UNROLL
          for (int y = 0; y < Window; ++y) {
            EFFOPS_UNROLL
            for (int k = 0; k < Window; ++k) {
              const bool there = inside(row + y, a.pool.H) && inside(first_column + i + k, a.pool.W);
              const bool taken = largest.take(to_compute(patch.values[y][i + k][j]), there);
              chosen = taken ? (i + k == Window - 1 ? y : -1) : chosen;
            }
          }
          EFFOPS_UNROLL
          for (int y = 0; y < Window; ++y) patch.sums[y][j] += chosen == y ? gradient : C(0);
        }
      }
    }
    if (step >= 0) store_channels(a.dx.at(cell.n, channel, row, cell.q), patch.sums[0]);
    patch.move_down();
  }
}

// ---- the host's choices ----

// Whether every column's windows give to at most `targets` outputs of a row.
bool gives_to(const BlurMaxPoolArgs& args, index_t window, index_t targets) {
  const index_t reach = args.size / 2;
  return args.window_h == window && args.window_w == window && (window - 1 + 2 * reach) / args.stride_w + 1 <= targets;
}

template <class T, int N, int Window, int Targets, int Blocks>
Choice<Backward<T>> walk_down() {
  return {{1, N, Blocks, Walks::down}, blur_max_pool_gradient_kernel<T, N, Window, Targets, Blocks>};
}

template <class T>
Choice<Backward<T>> choose(const BlurMaxPoolArgs& args) {
  if constexpr (kHasPairs<T>) {
    const bool pairs = access_of<T>(args).pairs();
    if (gives_to(args, 2, 2)) return pairs ? walk_down<T, kPair, 2, 2, 4>() : walk_down<T, 1, 2, 2, 4>();
    if (gives_to(args, 3, 4)) return pairs ? walk_down<T, kPair, 3, 4, 2>() : walk_down<T, 1, 3, 4, 3>();
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
