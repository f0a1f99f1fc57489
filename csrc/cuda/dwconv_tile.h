// What the kernels of room dwconv share: who owns which pixels and channels, the sums of a thread's cell, the host's
// choices. Each job is a source of its own and opens with its own picture; bytes are those an output:
//
//   source                     kernels                  reads                  writes                     fp16 bytes
//   dwconv_forward.cu          forward, input gradient  x (residual)           y                          4 (6)
//   dwconv_input_gradient.cu   other input gradients    du                     dx                         4
//   dwconv_weight_gradient.cu  weight gradient          x, du                  partial [lines][taps][D]   4
//   dwconv_backward.cu         epilogue gradient        grad, x or the output  du, partial [lines][3][D]  6
//   dwconv_statistics.cu       batch statistics         x                      partial [lines][3][D]      2
//
//   channels_last: a thread owns two channels (one access) of a strip of output pixels and walks along it.
//
//        lane 0 1 2 ...                columns of x ->
//        channels                      . . . . . +     the column that is loaded, once: Rows + 2 accesses in flight
//        +--+--+--+                    . . . . . +
//        |  |  |  |  a warp's access:  . . . . . +     it is added to the sums of the three output columns that it
//        +--+--+--+  128 bytes of a    . . . . . +     reaches; the oldest is complete and handed on
//                    pixel (float16)   . . . . . +
//
//   NCHW and odd channel counts: a thread owns one channel and one output column of a few rows; neighbouring lanes are
//   neighbouring columns (channels, where those are nearer) and share the columns of their windows in L1. The forward
//   pass has a kernel of its own for NCHW rows of whole 8 or 16 bytes.
//
//   Windows other than 3x3 and 5x5 at strides 1 and 2, dilations, channel multipliers: a loop over the taps, one output
//   pixel a thread; x comes from L1 once a tap. The taps of a 7x7 window alone would be 98 registers.
//
// Gradients and statistics that sum over pixels run as blocks of 256 threads with up to 32 channel lanes and as many
// pixel lanes as are left; each leaves one line of partial sums (sum.h).
//
// Nothing here has run on a GPU.
#pragma once

#include <algorithm>
#include <cstdint>

#include "csrc/cuda/banks.h"
#include "csrc/cuda/sum.h"
#include "csrc/cuda/window.h"

namespace effops::cuda {

constexpr int kThreads = 256;

// ---- units of work ----

// A unit is a strip of `columns` output columns in a band of `rows` output rows; units are numbered through the batch.
struct Units {
  int rows, columns, strips, bands;
  index_t total;
};

// a / b for 0 <= a: the common case without a 64-bit division.
EFFOPS_DEVICE index_t quotient(index_t a, int b) {
  return a >> 31 == 0 ? static_cast<unsigned>(a) / static_cast<unsigned>(b) : a / b;
}

EFFOPS_DEVICE Cell cell_of(const Units& units, index_t unit, int width) {
  const index_t band = quotient(unit, units.strips), n = quotient(band, units.bands);
  const int q = static_cast<int>(unit - band * units.strips) * units.columns;
  const int left = width - q;
  return {n, static_cast<int>(band - n * units.bands) * units.rows, q, left < units.columns ? left : units.columns};
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

// A thread's: N channels from `channel` on, the units first, first + step, ... One beyond the channels is not live: it
// has no unit, and goes to the barriers all the same.
struct Share {
  int channel, line;
  index_t first, step;
  bool live;
};

template <int N>
EFFOPS_DEVICE Share share_of(const Shares& shares) {
  const int block = static_cast<int>(blockIdx.x), pixels = shares.lanes.pixels(kThreads);
  const int line = block / shares.tiles;
  const int group = (block - line * shares.tiles) * shares.lanes.channel_lanes + shares.lanes.channel();
  return {group * N, line, static_cast<index_t>(line) * pixels + shares.lanes.pixel(),
          static_cast<index_t>(shares.lines) * pixels, group < shares.groups};
}

// f(cell) for each of its units, in maps of `width` columns.
template <class F>
EFFOPS_DEVICE void for_each_cell(const Share& share, const Units& units, int width, const F& f) {
  for (index_t unit = share.live ? share.first : units.total; unit < units.total; unit += share.step) {
    f(cell_of(units, unit, width));
  }
}

// Whether it is the thread that has a block's sums of its channels in the end.
EFFOPS_DEVICE bool leads(const Share& share, const Shares& shares) { return share.live && shares.lanes.pixel() == 0; }

// Writes a block's sums of one segment.
template <class C, int N>
EFFOPS_DEVICE void write_partial(C* partial, const Shares& shares, const Share& share, int segments, int segment, int D,
                                 const C (&sums)[N]) {
  if (!leads(share, shares)) return;
  C* line = partial + (static_cast<index_t>(share.line) * segments + segment) * D + share.channel;
  EFFOPS_UNROLL
  for (int j = 0; j < N; ++j) line[j] = sums[j];
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
      column_sums<Window, Rows>(x, o, g, cell, taps, sums);
      emit(cell.q, sums);
    } else {
      slide<Window, Rows, N>(x, o, g, cell, taps, emit);
    }
  }
};

template <class T>
EFFOPS_DEVICE Map<const T> const_map(const TensorRef& ref) {
  return {static_cast<const T*>(ref.data), ref.n, ref.c, ref.h, ref.w};
}

// N neighbours from an element on, or zeros where the map is absent.
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

// ---- the host's choices ----

// What a thread owns, and how many blocks of such threads fit a multiprocessor.
enum class Walks { no, along, down };  // a strip's columns, its rows
struct Tiling {
  int rows = 1, channels = 1, blocks = 1;
  Walks walks = Walks::no;
  int columns = 1;  // side by side in one access, where it walks down
};

template <class Params>
struct Choice : Tiling {
  void (*kernel)(Params) = nullptr;
};

using Window3 = Window<3, 3, 1>;
using Window3Half = Window<3, 3, 2>;  // half the rows, half the columns
using Window5 = Window<5, 5, 1>;
using Window5Half = Window<5, 5, 2>;

// Channels of a thread where they lie side by side; a warp's access is then 128 bytes of 16-bit channels, whole lines.
// Why not more of them: dwconv_forward.cu.
constexpr int kPair = 2;
template <class T>
constexpr bool kHasPairs = sizeof(T) <= 4;
// Blocks a multiprocessor where a thread has one channel: half of its threads; a quarter with sums in double.
template <class T>
constexpr int kBlocks = sizeof(T) == 8 ? 2 : 4;

// How threads can reach the maps of a call.
class Access {
 public:
  explicit Access(const DepthwiseGeometry& g) : channels_(g.multiplier == 1 ? g.C : 1) {}

  void need(const TensorRef& map, std::size_t element) {
    if (map.data == nullptr) return;
    const index_t place = static_cast<index_t>(reinterpret_cast<std::uintptr_t>(map.data) / element);
    channels_ |= map.c == 1 ? place | map.n | map.h | map.w : 1;
    windows_ = windows_ && short_rows(map);
  }
  // `count` channels, a power of two, lie side by side wherever a group of them starts, which is a multiple of them.
  bool channels(int count) const { return channels_ % count == 0; }
  bool pairs() const { return channels(kPair); }
  // As the kernels with a known window want them.
  bool windows() const { return windows_; }

 private:
  index_t channels_;  // all that has to be a multiple of a group's channels, in one number: their common powers of two
  bool windows_ = true;
};

// Whether neighbouring channels are nearer than neighbouring columns.
inline bool channels_inside(const TensorRef& map) { return map.c <= map.w; }

inline index_t ceil_div(index_t a, index_t b) { return (a + b - 1) / b; }

// Strips as long as they can be with two rounds of blocks on every multiprocessor: the ends of a strip load what others
// load too. `strips`: of one length that there are in all.
constexpr int kShortestStrip = 8;
inline index_t strip_length(index_t length, index_t strips, const Tiling& tiling, const Device& device) {
  const index_t threads = static_cast<index_t>(device.processors) * tiling.blocks * kThreads * 2;
  index_t strip = length;
  while (strip > kShortestStrip && strips * ceil_div(length, strip) < threads) strip = ceil_div(strip, 2);
  return strip;
}

// Maps that are cut into units.
struct Extent {
  index_t images, channels, height, width;
};

inline Units units_of(const Extent& maps, const Tiling& tiling, const Device& device) {
  const index_t planes = maps.images * (maps.channels / tiling.channels);
  index_t rows = tiling.rows, columns = tiling.columns;
  if (tiling.walks == Walks::along) {
    columns = strip_length(maps.width, planes * ceil_div(maps.height, rows), tiling, device);
  } else if (tiling.walks == Walks::down) {
    rows = strip_length(maps.height, planes * ceil_div(maps.width, columns), tiling, device);
  }
  const index_t strips = ceil_div(maps.width, columns), bands = ceil_div(maps.height, rows);
  narrow(strips * bands);
  return {narrow(rows), narrow(columns), narrow(strips), narrow(bands), maps.images * strips * bands};
}

inline Extent sums_of(const DepthwiseGeometry& g) { return {g.N, g.out_channels(), g.P, g.Q}; }

// `inside`: neighbouring lanes are neighbouring channels.
inline Shares shares_of(const Units& units, index_t channels, bool inside, const Tiling& tiling, const Device& device) {
  const int groups = narrow(channels / tiling.channels);
  const Lanes lanes{inside ? channel_lanes_for(groups) : 1};
  const index_t tiles = ceil_div(groups, lanes.channel_lanes), pixels = kThreads / lanes.channel_lanes;
  const index_t wanted = ceil_div(static_cast<index_t>(device.processors) * tiling.blocks, tiles);
  return {lanes, groups, narrow(tiles), narrow(std::min(wanted, ceil_div(units.total, pixels)))};
}

// Blocks for threads that have one unit each; for shares of them.
inline Shape blocks_for(index_t threads) { return grid_of(ceil_div(threads, kThreads), kThreads, 0); }
inline Shape blocks_for(const Shares& shares, std::size_t shared_bytes) {
  return grid_of(static_cast<index_t>(shares.lines) * shares.tiles, kThreads, shared_bytes);
}

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

}  // namespace effops::cuda
