// Room blurmaxpool, forward: the pooled map exists in registers only.
//
//   A thread owns one output pixel of two channels (channels_last, an access each) or of one (its neighbours are then
//   the pixels beside it), and runs down the rows of x that it needs; neighbours share them in L1.
//
//      pool 2x2, blur 3x3: 4 x 4 of x        each row of x: maxima of neighbours along the row -> with the last row's:
//        x x x x   -> m m m                  a row of the pooled map -> its weights along the width -> one value a
//        x x x x      m m m  -> . . . -> s   channel -> the weight of the row -> the sum
//        x x x x      m m m
//        x x x x                             in registers: one row of x, one row of maxima, weights of the columns
//
//   Other pools and filters: the same in loops; a pixel of x is loaded for each window that has it.
//
//   bytes an output (fp16, stride 2)    x 8, y 2
//
// Roofline, calculated for an H200 (4.3 TB/s), nothing measured: float16 [128, 64, 112, 112], pool 2x2, blur 3x3,
// stride 2: 257 MB, 60 us; [128, 128, 28, 28]: 32 MB, 7.5 us. Unverified on a GPU.
#include "csrc/cuda/blurmaxpool.h"

namespace effops::cuda {
namespace {

template <class T>
struct Forward {
  Map<const T> x;
  Map<T> y;
  PoolSizes pool;
  Blur blur;
  Units units;  // of output pixels
  Assignment assignment;
};

// `largest` and the values at a pixel of N channels; `there` false: the pixel is padding, which is less than anything.
template <int N, class T>
EFFOPS_DEVICE void take_larger(const T* at, bool there, compute<T> (&largest)[N]) {
  if (!there) return;
  compute<T> value[N];
  load_channels<N>(at, value);
  EFFOPS_UNROLL
  for (int j = 0; j < N; ++j) largest[j] = takes_second(largest[j], value[j]) ? value[j] : largest[j];
}

// Filter and pool windows of any size.
template <class T, int N>
EFFOPS_DEVICE void blurred_any(const Forward<T>& a, const Cell& cell, int channel, compute<T> (&sum)[N]) {
  using C = compute<T>;
  const BlurRange rows = positions_of(a.blur, a.blur.rows, cell.p);
  const BlurRange columns = positions_of(a.blur, a.blur.columns, cell.q);
  const T* image = a.x.at(cell.n, channel, 0, 0);
  for (int h = rows.begin; h < rows.end; ++h) {
    C line[N] = {};
    for (int w = columns.begin; w < columns.end; ++w) {
      C largest[N];
      fill(largest, C(-INFINITY));
      for (int i = 0; i < a.pool.window_h; ++i) {
        const int row = h - a.pool.pool_top + i;
        for (int k = 0; k < a.pool.window_w; ++k) {
          const int column = w - a.pool.pool_left + k;
          const bool there = inside(row, a.pool.H) && inside(column, a.pool.W);
          take_larger(image + row * a.x.h + column * a.x.w, there, largest);
        }
      }
      const C weight = blur_weight<C>(a.blur, a.blur.columns, w, cell.q);
      EFFOPS_UNROLL
      for (int j = 0; j < N; ++j) line[j] += weighted(weight, largest[j]);
    }
    const C weight = blur_weight<C>(a.blur, a.blur.rows, h, cell.p);
    EFFOPS_UNROLL
    for (int j = 0; j < N; ++j) sum[j] += weighted(weight, line[j]);
  }
}

// A filter of Size x Size and windows of Window x Window, unrolled.
template <class T, int N, int Size, int Window>
EFFOPS_DEVICE void blurred(const Forward<T>& a, const Cell& cell, int channel, compute<T> (&sum)[N]) {
  using C = compute<T>;
  constexpr int kReach = Size / 2, kPooled = 2 * kReach + 1, kSide = kPooled + Window - 1;
  const int h = cell.p * a.blur.rows.stride - kReach, w = cell.q * a.blur.columns.stride - kReach;
  const int row = h - a.pool.pool_top, column = w - a.pool.pool_left;
  C weights[kPooled];
  EFFOPS_UNROLL
  for (int k = 0; k < kPooled; ++k) weights[k] = blur_weight<C>(a.blur, a.blur.columns, w + k, cell.q);
  C maxima[Window][kPooled][N] = {};  // along the last rows, the newest first
  const T* at = a.x.at(cell.n, channel, 0, 0) + row * a.x.h + column * a.x.w;
  EFFOPS_UNROLL
  for (int i = 0; i < kSide; ++i, at += a.x.h) {
    C values[kSide][N];
    EFFOPS_UNROLL
    for (int k = 0; k < kSide; ++k) {
      fill(values[k], C(-INFINITY));
      if (inside(row + i, a.pool.H) && inside(column + k, a.pool.W)) load_channels<N>(at + k * a.x.w, values[k]);
    }
    EFFOPS_UNROLL
    for (int k = 0; k < kPooled; ++k) {
      EFFOPS_UNROLL
      for (int j = 0; j < N; ++j) {
        EFFOPS_UNROLL
        for (int older = Window - 1; older > 0; --older) maxima[older][k][j] = maxima[older - 1][k][j];
        maxima[0][k][j] = values[k][j];
        EFFOPS_UNROLL
        for (int beside = 1; beside < Window; ++beside) {
          const C second = values[k + beside][j];
          maxima[0][k][j] = takes_second(maxima[0][k][j], second) ? second : maxima[0][k][j];
        }
      }
    }
    if (i < Window - 1) continue;
    const C weight = blur_weight<C>(a.blur, a.blur.rows, h + i - (Window - 1), cell.p);
    EFFOPS_UNROLL
    for (int j = 0; j < N; ++j) {
      C line = 0;
      EFFOPS_UNROLL
      for (int k = 0; k < kPooled; ++k) {
        C largest = maxima[Window - 1][k][j];
        EFFOPS_UNROLL
        for (int newer = Window - 2; newer >= 0; --newer) {
          largest = takes_second(largest, maxima[newer][k][j]) ? maxima[newer][k][j] : largest;
        }
        line += weighted(weights[k], largest);
      }
      sum[j] += weighted(weight, line);
    }
  }
}

// Size == 0: only the parameters know.
template <class T, int N, int Size, int Window>
EFFOPS_KERNEL(kThreads, 4)
blur_max_pool_kernel(EFFOPS_PARAMS Forward<T> a) {
  const Owned owned = owned_by(a.assignment, a.units, global_thread());
  if (owned.unit >= a.units.total) return;
  const Cell cell = cell_of(a.units, owned.unit, a.blur.columns.outputs);
  const int channel = owned.group * N;
  compute<T> sum[N] = {};
  if constexpr (Size == 0) {
    blurred_any<T, N>(a, cell, channel, sum);
  } else {
    blurred<T, N, Size, Window>(a, cell, channel, sum);
  }
  store_channels(a.y.at(cell.n, channel, cell.p, cell.q), sum);
}

template <class T>
Choice<Forward<T>> choose(const BlurMaxPoolArgs& args) {
  if constexpr (kHasPairs<T>) {
    const bool known = args.size == 3 && args.window_h == 2 && args.window_w == 2;
    if (access_of<T>(args).pairs()) {
      if (known) return {{1, kPair, 4}, blur_max_pool_kernel<T, kPair, 3, 2>};
      return {{1, kPair, 4}, blur_max_pool_kernel<T, kPair, 0, 0>};
    }
    if (known) return {{1, 1, 4}, blur_max_pool_kernel<T, 1, 3, 2>};
  }
  return {{1, 1, 4}, blur_max_pool_kernel<T, 1, 0, 0>};
}

template <class T>
void forward(const BlurMaxPoolArgs& args, const Device& device, Stream stream) {
  const Choice<Forward<T>> choice = choose<T>(args);
  const Units units = units_of(Extent{args.N, args.C, args.P, args.Q}, choice, device);
  if (units.total == 0) return;
  const index_t groups = args.C / choice.channels;
  const Forward<T> params{map_of<const T>(args.input),
                          map_of<T>(args.output),
                          pool_sizes(args),
                          blur_of(args),
                          units,
                          {narrow(groups), channels_inside(args.output)}};
  launch(choice.kernel, blocks_for(units.total * groups), stream, params);
}

}  // namespace

void blur_max_pool_fwd(DType dtype, const BlurMaxPoolArgs& args, const Device& device, Stream stream) {
  with_type(dtype, [&](auto element) { forward<decltype(element)>(args, device, stream); });
}

}  // namespace effops::cuda
