// Room blurmaxpool, forward: the pooled map exists in registers only.
//
//   A thread owns one column of outputs of two channels (channels_last, an access each) or of one (its neighbours are
//   then the columns beside it), and walks down the rows of x; the next row is on its way meanwhile.
//
//      pool 2x2, blur 3x3, stride 2:      four columns of a row of x
//        x x x x -> m m m                 maxima along the row -> the larger of these and the last row's: a row of the
//                   m m m -> . . . -> s   pooled map -> its weights along the width, which stay in registers -> one value
//        the last three values s, a row's weight each, are an output at every second row
//
//      Columns beyond the map are its outermost one again: they are part of no window with a weight, or of one that has
//      that column anyway. So there are no conditions on the way.
//
//   Other pools and filters: an output pixel a thread, in loops; a pixel of x is loaded for each window that has it.
//
//   bytes an output (fp16, stride 2)    x 8, y 2
//
// Roofline, calculated for an H200 (4.3 TB/s), nothing measured: float16 [128, 64, 112, 112], pool 2x2, blur 3x3,
// stride 2: 257 MB, 60 us; [128, 128, 28, 28]: 32 MB, 7.5 us. Issuing takes longer: 99 instructions a row of x and 65 an
// output of two channels (SASS of sm_90, no edge near), at 4 x 1.755 GHz a multiprocessor 115 us for the first shape.
// Unverified on a GPU.
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

// ---- any pool and filter ----

template <class T, int N>
EFFOPS_KERNEL(kThreads, 4)
blur_max_pool_any_kernel(EFFOPS_PARAMS Forward<T> a) {
  using C = compute<T>;
  const Owned owned = owned_by(a.assignment, a.units, global_thread());
  if (owned.unit >= a.units.total) return;
  const Cell cell = cell_of(a.units, owned.unit, a.blur.columns.outputs);
  const int channel = owned.group * N;
  C sum[N] = {};
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
  store_channels(a.y.at(cell.n, channel, cell.p, cell.q), sum);
}

// ---- known ones ----

template <class T, int N, int Size, int Window, int Stride, int Blocks>
EFFOPS_KERNEL(kThreads, Blocks)
blur_max_pool_kernel(EFFOPS_PARAMS Forward<T> a) {
  using C = compute<T>;
  constexpr int kReach = Size / 2, kPooled = 2 * kReach + 1, kColumns = kPooled + Window - 1;
  constexpr int kBefore = kPooled - Size;  // positions without a weight, where no edge is near
  constexpr std::uint64_t kCoefficients = binomial_coefficients(Size);
  const Owned owned = owned_by(a.assignment, a.units, global_thread());
  if (owned.unit >= a.units.total) return;
  const Cell cell = cell_of(a.units, owned.unit, a.blur.columns.outputs);
  const int channel = owned.group * N, w = cell.q * Stride - kReach, left = a.blur.rows.outputs - cell.p;
  const int count = left < a.units.rows ? left : a.units.rows;
  int columns[kColumns];
  EFFOPS_UNROLL
  for (int k = 0; k < kColumns; ++k) {
    columns[k] = clamped(w - a.pool.pool_left + k, a.pool.W) * static_cast<int>(a.x.w);
  }
  C weights[kPooled];
  EFFOPS_UNROLL
  for (int k = 0; k < kPooled; ++k) weights[k] = blur_weight<C>(a.blur, a.blur.columns, w + k, cell.q);
  C maxima[Window][kPooled][N] = {};  // along the last rows of x, the newest first
  C lines[kPooled][N] = {};           // the last rows of the pooled map, blurred along the width, the newest last
  const T* image = a.x.at(cell.n, channel, 0, 0);
  T* y = a.y.at(cell.n, channel, cell.p, cell.q);
  int row = cell.p * Stride - kReach - a.pool.pool_top, p = cell.p, until_output = kColumns;
  const int end = row + (count - 1) * Stride + kColumns;
  Pieces<T, N> next[kColumns];
  const auto load_row = [&] {
    const T* at = image + clamped(row, a.pool.H) * a.x.h;
    EFFOPS_UNROLL
    for (int k = 0; k < kColumns; ++k) next[k].load(at + columns[k]);
  };
  load_row();
  EFFOPS_NO_UNROLL
  while (row < end) {
    C values[kColumns][N];
    EFFOPS_UNROLL
    for (int k = 0; k < kColumns; ++k) {
      EFFOPS_UNROLL
      for (int j = 0; j < N; ++j) values[k][j] = to_compute(next[k][j]);
    }
    ++row;
    if (row < end) load_row();
    EFFOPS_UNROLL
    for (int j = 0; j < N; ++j) {
      C line = 0;
      EFFOPS_UNROLL
      for (int k = 0; k < kPooled; ++k) {
        EFFOPS_UNROLL
        for (int older = Window - 1; older > 0; --older) maxima[older][k][j] = maxima[older - 1][k][j];
        maxima[0][k][j] = values[k][j];
        EFFOPS_UNROLL
        for (int beside = 1; beside < Window; ++beside) {
          maxima[0][k][j] = larger_or_nan(maxima[0][k][j], values[k + beside][j]);
        }
        C largest = maxima[0][k][j];
        EFFOPS_UNROLL
        for (int older = 1; older < Window; ++older) largest = larger_or_nan(largest, maxima[older][k][j]);
        line += weighted(weights[k], largest);
      }
      EFFOPS_UNROLL
      for (int i = 0; i < kPooled; ++i) lines[i][j] = i + 1 < kPooled ? lines[i + 1 < kPooled ? i + 1 : i][j] : line;
    }
    if (--until_output > 0) continue;
    until_output = Stride;
    const int first = p * Stride - kReach;
    const bool inner = first >= 0 && first + kPooled <= a.blur.rows.length;
    C sum[N] = {};
    EFFOPS_UNROLL
    for (int i = 0; i < kPooled; ++i) {
      const auto coefficient = static_cast<int>(i < kBefore ? 0 : kCoefficients >> (kByte * (i - kBefore)) & 0xff);
      const C inner_weight = static_cast<C>(coefficient) / C(1 << (Size - 1));
      const C weight = inner ? inner_weight : blur_weight<C>(a.blur, a.blur.rows, first + i, p);
      EFFOPS_UNROLL
      for (int j = 0; j < N; ++j) sum[j] += weighted(weight, lines[i][j]);
    }
    store_channels(y, sum);
    ++p, y += a.y.h;
  }
}

template <class T, int N, int Size, int Window, int Blocks>
Choice<Forward<T>> walk_down() {
  return {{1, N, Blocks, Walks::down}, blur_max_pool_kernel<T, N, Size, Window, 2, Blocks>};
}

template <class T>
Choice<Forward<T>> choose(const BlurMaxPoolArgs& args) {
  if constexpr (kHasPairs<T>) {
    const bool pairs = pairs_of<T>(args);
    if (is_known<2, 3, 2>(args)) return pairs ? walk_down<T, kPair, 3, 2, 4>() : walk_down<T, 1, 3, 2, 4>();
    if (is_known<3, 4, 2>(args)) return pairs ? walk_down<T, kPair, 4, 3, 2>() : walk_down<T, 1, 4, 3, 3>();
    if (pairs) return {{1, kPair, 4}, blur_max_pool_any_kernel<T, kPair>};
  }
  return {{1, 1, 4}, blur_max_pool_any_kernel<T, 1>};
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
