// Room sepconv, forward: dw 1xS -> epilogue -> [1x2 max pool] -> dw Rx1 -> epilogue -> [2x1 max pool], nothing stored in
// between.
//
//   1x3 and 3x1 at stride and dilation 1: a thread owns two channels (channels_last) or one, one column, and walks down.
//
//      row h of x   o o o o     pool of the row stage: the four columns of two sums; without it three, of one
//                   \_____/
//        row sums --epilogue--> larger one: r(h), zero outside the map
//                                 +--> third tap: the column sums of two rows above, complete: epilogue, [larger of two
//                                 |    rows], y
//                                 +--> second and first tap: the two sums that stay open
//
//      A row of the row stage is computed once a strip, and the two rows above a strip once more. In registers: six taps
//      of each channel, the open sums, the row that waits for its pool.
//
//   Channels of a pair read the same input channel where there is a multiplier of 2 ("spread"), else neighbours.
//   Other windows, strides and dilations: a thread owns one output pixel of one channel and computes the R row results.
//
//   bytes an output (fp16, pool of the rows, multiplier 1)    x 4, y 2
//
// Roofline, calculated for an H200 (4.3 TB/s), nothing measured: float16, EffNet's first block [128, 32, 32, 32] ->
// [128, 32, 32, 16]: 13 MB, 2.9 us; [128, 128, 56, 56] with both pools: 128 MB, 30 us. Unverified on a GPU.
#include "csrc/cuda/dwconv_tile.h"

namespace effops::cuda {
namespace {

template <class T>
struct Forward {
  Map<const T> x;
  Map<T> y;
  const T *row_weight, *col_weight;
  EpilogueRef row_epilogue, col_epilogue;
  Sizes row, col;
  int pool_w, pool_h;
  Units units;  // of output pixels
  Assignment assignment;
};

// first = the max pool of the two.
template <class C, int N>
EFFOPS_DEVICE void take_larger(C (&first)[N], const C (&second)[N]) {
  EFFOPS_UNROLL
  for (int j = 0; j < N; ++j) first[j] = takes_second(first[j], second[j]) ? second[j] : first[j];
}

template <class T, int N, int M>
EFFOPS_DEVICE void finish(const EpilogueRef& epilogue, int o, const compute<T> (&bias)[N], compute<T> (&sums)[M]) {
  const compute<T> none[M] = {};
  EFFOPS_UNROLL
  for (int j = 0; j < M; ++j) sums[j] += bias[j % N];
  apply_epilogue_rows<T, N>(epilogue, o, none, sums);
}

// ---- any window ----

template <class T>
EFFOPS_KERNEL(kThreads, kBlocks<T>)
separable_any_kernel(EFFOPS_PARAMS Forward<T> a) {
  using C = compute<T>;
  const Owned owned = owned_by(a.assignment, a.units, global_thread());
  if (owned.unit >= a.units.total) return;
  const Cell cell = cell_of(a.units, owned.unit, a.col.Q);
  const int o = owned.group;
  C row_bias[1], col_bias[1], result[1] = {};
  read_channels<T>(a.row_epilogue.bias, o, C(0), row_bias);
  read_channels<T>(a.col_epilogue.bias, o, C(0), col_bias);
  const T* taps = kernel_of(a.col_weight, a.col, a.col.R, o);
  EFFOPS_NO_UNROLL
  for (int j = 0; j < a.pool_h; ++j) {
    const int first = (cell.p * a.pool_h + j) * a.col.stride_h - a.col.pad_top;
    const TapRange range = valid_taps(first, a.col.dilation_h, a.col.R, a.row.H);
    C sum[1] = {};
    EFFOPS_NO_UNROLL
    for (int r = range.begin; r < range.end; ++r) {
      C larger[1] = {};
      EFFOPS_NO_UNROLL
      for (int i = 0; i < a.pool_w; ++i) {
        C u[1];
        window_sums<1>(a.x, a.row_weight, a.row, cell.n, o, first + r * a.col.dilation_h, cell.q * a.pool_w + i, u);
        finish<T>(a.row_epilogue, o, row_bias, u);
        larger[0] = i == 0 || takes_second(larger[0], u[0]) ? u[0] : larger[0];
      }
      sum[0] += larger[0] * to_compute(load_global_cached(taps + r));
    }
    finish<T>(a.col_epilogue, o, col_bias, sum);
    result[0] = j == 0 || takes_second(result[0], sum[0]) ? sum[0] : result[0];
  }
  store_channels(a.y.at(cell.n, o, cell.p, cell.q), result);
}

// ---- 1x3 and 3x1 ----

using Taps = Window<1, 3, 1>;  // of either convolution: three in a line

// Pool: of the row stage. Spread: the N channels read one input channel.
template <class T, int N, int Pool, bool Spread>
struct RowStage {
  using C = compute<T>;
  static constexpr int kColumns = Pool + Taps::S - 1, kInputs = Spread ? 1 : N;
  const Forward<T>& a;
  int o;
  unsigned columns;  // bit k: whether the map has it
  C taps[Taps::kTaps][N], bias[N];

  EFFOPS_DEVICE RowStage(const Forward<T>& params, int channel, int column) : a(params), o(channel), columns(0) {
    load_taps<Taps, N>(a.row_weight, a.row, o, false, taps);
    read_channels<T>(a.row_epilogue.bias, o, C(0), bias);
    EFFOPS_UNROLL
    for (int k = 0; k < kColumns; ++k) columns |= inside(column + k, a.row.W) ? 1u << k : 0u;
  }

  // at: the first column, which need not exist, in a row that does.
  EFFOPS_DEVICE void run(const T* at, C (&result)[N]) const {
    Pieces<T, kInputs> x[kColumns] = {};
    EFFOPS_UNROLL
    for (int k = 0; k < kColumns; ++k) {
      if (columns >> k & 1) x[k].load(at + k * a.x.w);
    }
    C sums[Pool * N] = {};
    EFFOPS_UNROLL
    for (int i = 0; i < Pool; ++i) {
      EFFOPS_UNROLL
      for (int s = 0; s < Taps::S; ++s) {
        EFFOPS_UNROLL
        for (int j = 0; j < N; ++j) sums[i * N + j] += to_compute(x[i + s][Spread ? 0 : j]) * taps[s][j];
      }
    }
    finish<T>(a.row_epilogue, o, bias, sums);
    EFFOPS_UNROLL
    for (int j = 0; j < N; ++j) {
      result[j] = sums[j];
      const C second = sums[(Pool - 1) * N + j];
      if (Pool > 1) result[j] = takes_second(result[j], second) ? second : result[j];
    }
  }
};

template <class T, int N, int Pool, bool Spread, int Blocks>
EFFOPS_KERNEL(kThreads, Blocks)
separable_kernel(EFFOPS_PARAMS Forward<T> a) {
  using C = compute<T>;
  const Owned owned = owned_by(a.assignment, a.units, global_thread());
  if (owned.unit >= a.units.total) return;
  const Cell cell = cell_of(a.units, owned.unit, a.col.Q);
  const int o = owned.group * N, column = cell.q * Pool - a.row.pad_left, left = a.col.P / a.pool_h - cell.p;
  const int steps = (left < a.units.rows ? left : a.units.rows) * a.pool_h;
  const RowStage<T, N, Pool, Spread> row_stage(a, o, column);
  C taps[Taps::kTaps][N], bias[N];
  load_taps<Taps, N>(a.col_weight, a.col, o, false, taps);
  read_channels<T>(a.col_epilogue.bias, o, C(0), bias);
  int h = cell.p * a.pool_h - a.col.pad_top;
  const T* at = a.x.at(cell.n, Spread || N == 1 ? o / a.row.multiplier : o, h, column);
  T* y = a.y.at(cell.n, o, cell.p, cell.q);
  C open[2][N] = {}, held[N] = {};
  EFFOPS_NO_UNROLL
  for (int step = -2; step < steps; ++step, ++h, at += a.x.h) {
    C result[N] = {}, v[N];
    if (inside(h, a.row.H)) row_stage.run(at, result);
    EFFOPS_UNROLL
    for (int j = 0; j < N; ++j) {
      v[j] = open[1][j] + result[j] * taps[2][j];
      open[1][j] = open[0][j] + result[j] * taps[1][j];
      open[0][j] = result[j] * taps[0][j];
    }
    if (step < 0) continue;
    finish<T>(a.col_epilogue, o, bias, v);
    if (a.pool_h > 1) {
      if (step % 2 == 0) {
        EFFOPS_UNROLL
        for (int j = 0; j < N; ++j) held[j] = v[j];
        continue;
      }
      take_larger(held, v);
      store_channels(y, held);
    } else {
      store_channels(y, v);
    }
    y += a.y.h;
  }
}

// ---- the host's choices ----

bool in_line(const DepthwiseGeometry& g) {
  return g.R * g.S == 3 && g.stride_h == 1 && g.stride_w == 1 && g.dilation_h == 1 && g.dilation_w == 1;
}

template <class T, int Pool>
Choice<Forward<T>> choose_walk(bool pairs, bool spread) {
  if (pairs && spread) return {{1, kPair, 3, Walks::down}, separable_kernel<T, kPair, Pool, true, 3>};
  if (pairs) return {{1, kPair, 3, Walks::down}, separable_kernel<T, kPair, Pool, false, 3>};
  return {{1, 1, 4, Walks::down}, separable_kernel<T, 1, Pool, false, 4>};
}

template <class T>
Choice<Forward<T>> choose(const SepconvForwardArgs& args) {
  if constexpr (kHasPairs<T>) {
    if (in_line(args.row) && in_line(args.col)) {
      const bool spread = args.row.multiplier > 1;
      Access access(args.col);
      access.need(args.output, sizeof(T));
      if (!spread) access.need(args.input, sizeof(T));
      const bool pairs = access.pairs() && (!spread || args.row.multiplier % kPair == 0);
      return args.pool_w > 1 ? choose_walk<T, 2>(pairs, spread) : choose_walk<T, 1>(pairs, spread);
    }
  }
  return {{1, 1, kBlocks<T>}, separable_any_kernel<T>};
}

template <class T>
void forward(const SepconvForwardArgs& args, const Device& device, Stream stream) {
  const Choice<Forward<T>> choice = choose<T>(args);
  const DepthwiseGeometry& col = args.col;
  const Units units = units_of(Extent{col.N, col.C, col.P / args.pool_h, col.Q}, choice, device);
  if (units.total == 0) return;
  const index_t groups = col.C / choice.channels;
  const Forward<T> params{map_of<const T>(args.input),
                          map_of<T>(args.output),
                          static_cast<const T*>(args.row_weight),
                          static_cast<const T*>(args.col_weight),
                          args.row_epilogue,
                          args.col_epilogue,
                          sizes_of(args.row),
                          sizes_of(col),
                          narrow(args.pool_w),
                          narrow(args.pool_h),
                          units,
                          {narrow(groups), channels_inside(args.output)}};
  launch(choice.kernel, blocks_for(units.total * groups), stream, params);
}

}  // namespace

void sepconv_fwd(DType dtype, const SepconvForwardArgs& args, const Device& device, Stream stream) {
  with_type(dtype, [&](auto element) { forward<decltype(element)>(args, device, stream); });
}

}  // namespace effops::cuda
