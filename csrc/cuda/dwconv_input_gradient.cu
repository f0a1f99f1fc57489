// Room dwconv: the input gradient at stride 2, and of windows that the forward kernels do not know.
//
//   channels_last, stride 2: a thread owns two channels of a strip of 2 x 2 blocks of dx and walks along it. Each tap
//   meets one of the four pixels of a block, so nothing is computed for the zeros between the pixels of du.
//
//        du                 dx, 3x3, pad 1                  a column of du (2 rows for 3x3, 3 for 5x5: the accesses in
//        +---+---+          +-------+-------+               flight) reaches the blocks of its own place and behind it,
//        | a | c |          | . . . | . . . |               which are open at a time (2 for 3x3, 3 for 5x5); the block
//        +---+---+   --->   | .[a a]|[c c]. |               behind which no column of du is left is stored
//        | b | d |          | .[a a]|[c c]. |
//        +---+---+          +-------+-------+               in registers: 18 taps, 2 blocks x 4 pixels x 2 channels
//
//   Otherwise: a thread owns one pixel of one channel and gathers over the taps that reach it.
//
//   bytes an output pixel of dx (fp16)    du 0.5, dx 2; at stride 1: 2 and 2
//
// Roofline, calculated for an H200 (4.3 TB/s), nothing measured: dx of float16 [128, 128, 56, 56], 3x3, stride 2:
// 129 MB, 30 us; [128, 512, 14, 14]: 32 MB, 7.5 us. Unverified on a GPU.
#include "csrc/cuda/dwconv.h"
#include "csrc/cuda/dwconv_tile.h"

namespace effops::cuda {
namespace {

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
  const Cell cell = cell_of(a.units, owned.unit, a.g.W);
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
  Cell cell = cell_of(a.units, owned.unit, blocks - first_block);
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
      C values[N];
      loaded.values(i, values);
      EFFOPS_UNROLL
      for (int side = 0; side < 2; ++side) {
        const int r = 2 * (kRows - 1 - i) + side;
        if (r >= Window::R) continue;
        EFFOPS_UNROLL
        for (int s = 0; s < Window::S; ++s) {
          EFFOPS_UNROLL
          for (int j = 0; j < N; ++j) {
            sums[s / 2][2 * side + s % 2][j] += values[j] * taps[r * Window::S + s][j];
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

// ---- the host's choices ----

constexpr int kSide = 2;  // of the blocks of input pixels at stride 2

template <class D, class T>
Choice<InputGradient<D, T>> choose(const DepthwiseGeometry& g, const Access& access) {
  if constexpr (kHasPairs<T>) {
    if (access.pairs() && access.windows()) {
      if (Window3Half::fits(g)) {
        return {{1, kPair, 4, Walks::along}, input_gradient_kernel<D, T, Window3Half, kPair, 4>};
      }
      if (Window5Half::fits(g)) {
        return {{1, kPair, 2, Walks::along}, input_gradient_kernel<D, T, Window5Half, kPair, 2>};
      }
    }
  }
  return {{1, 1, 4}, input_gradient_any_kernel<D, T, 4>};
}

// What is counted as rows and columns: pixels, or blocks of them, the first of which starts in the padding.
Extent extent_of(const DepthwiseGeometry& g, bool in_blocks) {
  if (!in_blocks) return {g.N, g.C, g.H, g.W};
  const auto blocks = [](index_t pixels, index_t pad) { return (pixels - 1 + pad) / kSide + 1 - pad / kSide; };
  return {g.N, g.C, blocks(g.H, g.pad_top), blocks(g.W, g.pad_left)};
}

template <class D, class T>
void input_gradient(const DepthwiseGeometry& g, const TensorRef& du, const void* weight, const TensorRef& dx,
                    const Device& device, Stream stream) {
  Access access(g);
  access.need(du, sizeof(D));
  access.need(dx, sizeof(T));
  const Choice<InputGradient<D, T>> choice = choose<D, T>(g, access);
  const Units units = units_of(extent_of(g, choice.walks == Walks::along), choice, device);
  if (units.total == 0) return;
  const index_t groups = g.C / choice.channels;
  const InputGradient<D, T> params{map_of<const D>(du), map_of<T>(dx), static_cast<const T*>(weight),
                                   sizes_of(g),         units,         {narrow(groups), channels_inside(dx)}};
  launch(choice.kernel, blocks_for(units.total * groups), stream, params);
}

}  // namespace

void depthwise_input_gradient(DType dtype, const DepthwiseGeometry& g, const Gradient& du, const void* weight,
                              const TensorRef& grad_input, const Device& device, Stream stream) {
  if (depthwise_turned(dtype, g, du, weight, grad_input, device, stream)) return;
  with_types(du.dtype, dtype, [&](auto gradient, auto element) {
    input_gradient<decltype(gradient), decltype(element)>(g, du.map, weight, grad_input, device, stream);
  });
}

}  // namespace effops::cuda
