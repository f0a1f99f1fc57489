// Room dwconv: mean and variance of a convolution's output over the batch, without storing the output.
//
//   channels_last: a block owns up to 32 pairs of channels and a share of the strips of the batch; a thread walks along
//   one strip after the other as the forward pass does (window.h: Walk) and keeps the moments of what comes out.
//
//        x strip --> sums of a column --> a thread: sum and squares of the distance from its first value
//        a block:  Chan's formula over the pixel lanes, shuffles, then one line of shared memory a warp
//        --> partial [line of the block][count, mean, squares][D] --> combine: the same formula, in double
//
//   bytes an output (fp16)    x 2
//
// Roofline, calculated for an H200 (4.3 TB/s), nothing measured: float16 [128, 128, 56, 56], 3x3, stride 1: 103 MB,
// 24 us; [128, 512, 14, 14]: 26 MB, 6 us. The forward pass computes as many products in twice the time: the bound
// here is issuing instructions, not memory. Unverified on a GPU.
#include "csrc/cuda/kernels.h"
#include "csrc/cuda/dwconv_tile.h"

namespace effops::cuda {
namespace {

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
  const Share share = share_of<N>(a.shares);
  RunningMoments<C, N> moments;
  if (share.live) {
    const Depthwise<T, T, Window, Rows, N> sums(a.x, a.weight, a.g, share.channel, false);
    for_each_cell(share, a.units, a.g.Q, [&](const Cell& cell) {
      sums.run(cell, [&](int, const C(&u)[Rows][N]) {
        EFFOPS_UNROLL
        for (int i = 0; i < Rows; ++i) {
          if (cell.p + i < a.g.P) moments.add(u[i]);
        }
      });
    });
  }
  EFFOPS_UNROLL
  for (int j = 0; j < N; ++j) {
    Moments<C> m = moments.of(j);
    block_moments(a.shares.lanes, j, m);
    if (!leads(share, a.shares)) continue;
    C* line = a.partial + static_cast<index_t>(share.line) * kMomentSegments * a.g.D + share.channel + j;
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

// ---- statistics: host ----

template <class T>
struct StatisticsPlan {
  Choice<Statistics<T>> choice;
  Units units;
  Shares shares;

  StatisticsPlan(const DwconvStatsArgs& args, const Device& device) {
    const DepthwiseGeometry& g = args.g;
    Access access(g);
    access.need(args.input, sizeof(T));
    choice = choose(g, access);
    units = units_of(sums_of(g), choice, device);
    shares = shares_of(units, g.out_channels(), channels_inside(args.input), choice, device);
  }
  std::size_t bytes(const DepthwiseGeometry& g) const {
    return partial_bytes<compute<T>>(shares.lines, kMomentSegments, g.out_channels());
  }

 private:
  static Choice<Statistics<T>> choose(const DepthwiseGeometry& g, const Access& access) {
    if constexpr (kHasPairs<T>) {
      if (access.pairs() && access.windows()) {
        if (Window3::fits(g)) return {{2, kPair, 4, Walks::along}, statistics_kernel<T, Window3, 2, kPair, 4>};
        if (Window3Half::fits(g)) return {{1, kPair, 4, Walks::along}, statistics_kernel<T, Window3Half, 1, kPair, 4>};
        if (Window5::fits(g)) return {{2, kPair, 2, Walks::along}, statistics_kernel<T, Window5, 2, kPair, 2>};
      }
      if (access.pairs()) return {{1, kPair, 3}, statistics_kernel<T, AnyWindow, 1, kPair, 3>};
    }
    return {{1, 1, kBlocks<T>}, statistics_kernel<T, AnyWindow, 1, 1, kBlocks<T>>};
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
    launch(plan.choice.kernel, blocks_for(plan.shares, 2 * kThreads * sizeof(Moments<C>)), stream, params);
  }
  const CombineMoments<C> combine{partial,   plan.shares.lines,          g.D,
                                  args.bias, static_cast<C*>(args.mean), static_cast<C*>(args.var)};
  launch(combine_moments_kernel<T>, grid_of(ceil_div(g.D, kWarp), kSumThreads, kSumThreads * sizeof(Moments<double>)),
         stream, combine);
}

}  // namespace

std::size_t dwconv_stats_scratch(DType dtype, const DwconvStatsArgs& args, const Device& device) {
  return with_type(dtype, [&](auto element) { return StatisticsPlan<decltype(element)>(args, device).bytes(args.g); });
}

void dwconv_stats(DType dtype, const DwconvStatsArgs& args, const Device& device, void* scratch, Stream stream) {
  with_type(dtype, [&](auto element) { statistics<decltype(element)>(args, device, scratch, stream); });
}

}  // namespace effops::cuda
