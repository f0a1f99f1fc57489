// Room se: y = x * gate(W2 act(W1 mean(x) + b1) + b2), forward and backward: which kernels run, in which order, and those
// that touch the maps, which are memory-bound.
//
//   forward     x --sums over pixels--> lines --means, two products--> gates [N][C]                  (se_excitation.cu)
//               x ------------------------------------------------- * gates ------> y
//
//   backward    x, grad --sums of x and of x * grad, one read--> means, gates again; gradient at the gates
//               --the products backward--> gradients of weights and biases; `per pixel` [N][C]
//               grad * gates + per pixel -> grad_input
//
//   Three passes over a map forward, two where x's producer took the sums, four backward, whatever the layout; everything
//   else is [N][C].
//
//   An access is 8 bytes: channels of a pixel (channels_last), or pixels of a channel (NCHW); one element where the map
//   does not allow that. A thread has four of them in flight (of each map): 32 KB a multiprocessor at 50% occupancy.
//
//   sums, channels_last    a block: up to 32 groups of channels x as many pixel lanes as are left, a share of an image
//   sums, NCHW             a warp: a share of one channel's pixels
//
//        lane: channels -> o o o o          registers -> shuffles -> a line of shared memory a warp
//        pixels            o o o o   ---->  --> partial [N][lines][C], whose lines the excitation adds in order
//          |               o o o o          Every addition is in an order that the sizes and the device alone decide.
//
//   scale                  a thread: four accesses of one group of channels, whose gates it reads once
//
//   bytes a value (fp16)   forward: 2 + 2 read, 2 written; backward: 4 + 2 read, 2 written
//
// Roofline, calculated for an H200 (4.3 TB/s), nothing measured: float16 [128, 240, 28, 28], 48 MB a map: forward 34 us,
// of which the second read may come from L2 (50 MB); backward 45 us. [128, 672, 14, 14], 34 MB: 24 and 31 us. Unverified
// on a GPU.
#include <initializer_list>

#include "csrc/cuda/dwconv_tile.h"
#include "csrc/cuda/se.h"

namespace effops::cuda {
namespace {

constexpr int kAccessBytes = 8, kAtOnce = 4, kBlocksAtOnce = 4;
template <class T>
constexpr int kWide = kAccessBytes / static_cast<int>(sizeof(T));

// The accesses of an image, each of N channels of a pixel or V pixels of a channel.
struct Accesses {
  int groups;  // of channels
  int steps;   // along the pixels
  int width;   // pixels of a row
};

template <int V, class T>
EFFOPS_DEVICE T* place_of(const Map<T>& map, const Accesses& all, index_t n, int channel, index_t step) {
  const unsigned pixel = static_cast<unsigned>(step) * V, row = pixel / static_cast<unsigned>(all.width);
  return map.at(n, channel, row, pixel - row * static_cast<unsigned>(all.width));
}

// ---- sums ----

template <class T>
struct PixelSums {
  Map<const T> x, factor;
  compute<T>*sums, *products;  // null: not wanted
  Accesses accesses;
  Lanes lanes;  // of a block that owns several channels
  int C, lines, tiles;
  index_t planes;  // N * C
};

// Adds the accesses first, first + step, ... of N channels: in chains of a few, so that long sums lose no digits.
template <class T, int N, int V>
EFFOPS_DEVICE void add_accesses(const PixelSums<T>& a, index_t n, int channel, index_t first, index_t step,
                                compute<T> (&sums)[N], compute<T> (&products)[N]) {
  using C = compute<T>;
  constexpr int kElements = N * V;
  for (index_t i = first; i < a.accesses.steps; i += kAtOnce * step) {
    Pieces<T, kElements> x[kAtOnce] = {}, factor[kAtOnce] = {};
    EFFOPS_UNROLL
    for (int k = 0; k < kAtOnce; ++k) {
      if (i + k * step >= a.accesses.steps) break;
      x[k].load(place_of<V>(a.x, a.accesses, n, channel, i + k * step));
      if (a.products != nullptr) factor[k].load(place_of<V>(a.factor, a.accesses, n, channel, i + k * step));
    }
    C part[N] = {}, product[N] = {};
    EFFOPS_UNROLL
    for (int k = 0; k < kAtOnce; ++k) {
      EFFOPS_UNROLL
      for (int e = 0; e < kElements; ++e) {
        part[e % N] += to_compute(x[k][e]);
        product[e % N] += to_compute(x[k][e]) * to_compute(factor[k][e]);
      }
    }
    EFFOPS_UNROLL
    for (int j = 0; j < N; ++j) {
      sums[j] += part[j];
      products[j] += product[j];
    }
  }
}

template <class C, int N>
EFFOPS_DEVICE void write_sums(C* to, index_t at, const C (&sums)[N]) {
  if (to == nullptr) return;
  EFFOPS_UNROLL
  for (int j = 0; j < N; ++j) to[at + j] = sums[j];
}

// N channels a thread, side by side.
template <class T, int N>
EFFOPS_KERNEL(kThreads, kBlocksAtOnce)
channel_sums_kernel(EFFOPS_PARAMS PixelSums<T> a) {
  using C = compute<T>;
  const index_t block = blockIdx.x, line_of_all = quotient(block, a.tiles), n = quotient(line_of_all, a.lines);
  const int tile = static_cast<int>(block - line_of_all * a.tiles), pixels = a.lanes.pixels(kThreads);
  const int line = static_cast<int>(line_of_all - n * a.lines);
  const int group = tile * a.lanes.channel_lanes + a.lanes.channel();
  const bool live = group < a.accesses.groups;
  C sums[N] = {}, products[N] = {};
  if (live) {
    add_accesses<T, N, 1>(a, n, group * N, static_cast<index_t>(line) * pixels + a.lanes.pixel(),
                          static_cast<index_t>(a.lines) * pixels, sums, products);
  }
  if (a.sums != nullptr) block_sums(a.lanes, 0, sums);
  if (a.products != nullptr) block_sums(a.lanes, 1, products);
  if (!live || a.lanes.pixel() > 0) return;
  const index_t at = line_of_all * a.C + group * N;
  write_sums(a.sums, at, sums);
  write_sums(a.products, at, products);
}

// A warp owns a share of one channel.
template <class T, int V>
EFFOPS_KERNEL(kThreads, kBlocksAtOnce)
plane_sums_kernel(EFFOPS_PARAMS PixelSums<T> a) {
  using C = compute<T>;
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  const index_t share = static_cast<index_t>(blockIdx.x) * (kThreads / kWarp) + warp, plane = quotient(share, a.lines);
  if (plane >= a.planes) return;
  const index_t line = share - plane * a.lines, n = quotient(plane, a.C);
  const int channel = static_cast<int>(plane - n * a.C);
  C sums[1] = {}, products[1] = {};
  add_accesses<T, 1, V>(a, n, channel, line * kWarp + lane, static_cast<index_t>(a.lines) * kWarp, sums, products);
  EFFOPS_UNROLL
  for (int mask = kWarp / 2; mask > 0; mask /= 2) {
    sums[0] += shuffle_xor(sums[0], mask);
    products[0] += shuffle_xor(products[0], mask);
  }
  if (lane > 0) return;
  const index_t at = (n * a.lines + line) * a.C + channel;
  write_sums(a.sums, at, sums);
  write_sums(a.products, at, products);
}

// ---- scale ----

template <class T>
struct ScalePixels {
  Map<const T> x;
  Map<T> y;
  const compute<T>*factors, *offsets;
  Accesses accesses;
  Assignment assignment;
  Units units;  // of accesses: those of a thread are a strip's first, and as far apart as there are strips
  int C;
};

template <class T, int N, int V>
EFFOPS_KERNEL(kThreads, kBlocksAtOnce)
scale_pixels_kernel(EFFOPS_PARAMS ScalePixels<T> a) {
  using C = compute<T>;
  const Owned owned = owned_by(a.assignment, a.units, global_thread());
  if (owned.unit >= a.units.total) return;
  const index_t n = quotient(owned.unit, a.units.strips), first = owned.unit - n * a.units.strips;
  const int channel = owned.group * N;
  Pieces<T, N * V> loaded[kAtOnce];
  EFFOPS_UNROLL
  for (int k = 0; k < kAtOnce; ++k) {
    const index_t step = first + static_cast<index_t>(k) * a.units.strips;
    if (step < a.accesses.steps) loaded[k].load(place_of<V>(a.x, a.accesses, n, channel, step));
  }
  C factor[N], offset[N];
  load_channels<N>(a.factors + n * a.C + channel, factor);
  fill(offset, C(0));
  if (a.offsets != nullptr) load_channels<N>(a.offsets + n * a.C + channel, offset);
  EFFOPS_UNROLL
  for (int k = 0; k < kAtOnce; ++k) {
    const index_t step = first + static_cast<index_t>(k) * a.units.strips;
    if (step >= a.accesses.steps) return;
    EFFOPS_UNROLL
    for (int e = 0; e < N * V; ++e) {
      loaded[k][e] = from_compute<T>(to_compute(loaded[k][e]) * factor[e % N] + offset[e % N]);
    }
    loaded[k].store(place_of<V>(a.y, a.accesses, n, channel, step));
  }
}

// ---- the host's choices ----

enum class Form { single, channels, pixels };  // what an access has several of

// How the maps of a call can be reached.
template <class T>
class Reach {
 public:
  Reach(const GatedMaps& maps, std::initializer_list<TensorRef> refs) : maps_(maps) {
    index_t of_channels = maps.C, of_pixels = 0;
    bool flat = true, channels = true, pixels = true;
    for (const TensorRef& ref : refs) {
      if (ref.data == nullptr) continue;
      const auto place = static_cast<index_t>(reinterpret_cast<std::uintptr_t>(ref.data) / sizeof(T));
      of_channels |= place | ref.n | ref.h | ref.w;
      of_pixels |= place | ref.n | ref.c | ref.h;
      flat = flat && ref.h == maps.W * ref.w;
      channels = channels && ref.c == 1;
      pixels = pixels && ref.w == 1;
      inside_ = channels_inside(ref);  // the last one's: of the result, where there is one
    }
    width_ = flat ? maps.pixels() : maps.W;
    if (pixels && (of_pixels | width_) % kWide<T> == 0) form_ = Form::pixels;
    // A map of one value a channel (space expanded) has its channels side by side and yet no channel inside a pixel.
    if (channels && inside_ && of_channels % kWide<T> == 0) form_ = Form::channels;
    if (kWide<T> == 1) form_ = Form::single;
  }
  Form form() const { return form_; }
  // Whether neighbouring threads own neighbouring channels.
  bool channels_first() const { return inside_ && form_ != Form::pixels; }
  Accesses accesses() const {
    const index_t groups = form_ == Form::channels ? maps_.C / kWide<T> : maps_.C;
    const index_t steps = form_ == Form::pixels ? maps_.pixels() / kWide<T> : maps_.pixels();
    return {narrow(groups), narrow(steps), narrow(width_)};
  }

 private:
  GatedMaps maps_;
  Form form_ = Form::single;
  bool inside_ = false;
  index_t width_;
};

template <class T>
class PixelSumsPlan {
 public:
  PixelSumsPlan(const PixelSumsArgs& args, const Device& device)
      : args_(args), reach_(args.maps, {args.factor, args.x}) {
    const Accesses all = reach_.accesses();
    planes_ = !reach_.channels_first();
    if (!planes_) lanes_.channel_lanes = channel_lanes_for(all.groups);
    tiles_ = planes_ ? all.groups : ceil_div(all.groups, lanes_.channel_lanes);
    // Two rounds of blocks, where every thread has as many accesses as it can have in flight.
    const index_t threads = planes_ ? kWarp : kThreads, per_line = threads / lanes_.channel_lanes;
    const index_t wanted = 2 * static_cast<index_t>(device.processors) * kBlocksAtOnce * kThreads / threads;
    const index_t shares = std::max<index_t>(args.maps.N * tiles_, 1);
    lines_ = std::clamp<index_t>(wanted / shares, 1, ceil_div(all.steps, per_line * kAtOnce));
  }
  int lines() const { return narrow(lines_); }

  void run(Stream stream) const {
    using C = compute<T>;
    const PixelSums<T> params{map_of<const T>(args_.x),
                              map_of<const T>(args_.factor),
                              static_cast<C*>(args_.sums),
                              static_cast<C*>(args_.products),
                              reach_.accesses(),
                              lanes_,
                              narrow(args_.maps.C),
                              lines(),
                              narrow(tiles_),
                              args_.maps.N * args_.maps.C};
    const index_t shares = args_.maps.N * tiles_ * lines_;
    if (shares == 0) return;
    const Shape warps = grid_of(ceil_div(shares, kThreads / kWarp), kThreads, 0);
    const Shape blocks = grid_of(shares, kThreads, block_sums_bytes<C, kWide<T>>(kThreads));
    if (reach_.form() == Form::pixels) return launch(plane_sums_kernel<T, kWide<T>>, warps, stream, params);
    if (planes_) return launch(plane_sums_kernel<T, 1>, warps, stream, params);
    if (reach_.form() == Form::channels) return launch(channel_sums_kernel<T, kWide<T>>, blocks, stream, params);
    launch(channel_sums_kernel<T, 1>, blocks, stream, params);
  }

 private:
  const PixelSumsArgs& args_;
  Reach<T> reach_;
  bool planes_;
  Lanes lanes_{1};
  index_t tiles_, lines_;
};

template <class T>
void scale(const ScalePixelsArgs& args, Stream stream) {
  using C = compute<T>;
  const Reach<T> reach(args.maps, {args.x, args.y});
  const Accesses all = reach.accesses();
  const index_t strips = ceil_div(all.steps, kAtOnce);
  const Units units{1, kAtOnce, narrow(strips), 1, args.maps.N * strips};
  if (units.total == 0) return;
  const ScalePixels<T> params{map_of<const T>(args.x),
                              map_of<T>(args.y),
                              static_cast<const C*>(args.factors),
                              static_cast<const C*>(args.offsets),
                              all,
                              {all.groups, reach.channels_first()},
                              units,
                              narrow(args.maps.C)};
  const Shape blocks = blocks_for(units.total * all.groups);
  switch (reach.form()) {
    case Form::channels:
      return launch(scale_pixels_kernel<T, kWide<T>, 1>, blocks, stream, params);
    case Form::pixels:
      return launch(scale_pixels_kernel<T, 1, kWide<T>>, blocks, stream, params);
    case Form::single:
      return launch(scale_pixels_kernel<T, 1, 1>, blocks, stream, params);
  }
}

}  // namespace

int pixel_sum_lines(DType dtype, const PixelSumsArgs& args, const Device& device) {
  return with_type(dtype, [&](auto element) { return PixelSumsPlan<decltype(element)>(args, device).lines(); });
}

void pixel_sums(DType dtype, const PixelSumsArgs& args, const Device& device, Stream stream) {
  with_type(dtype, [&](auto element) { PixelSumsPlan<decltype(element)>(args, device).run(stream); });
}

void scale_pixels(DType dtype, const ScalePixelsArgs& args, Stream stream) {
  with_type(dtype, [&](auto element) { scale<decltype(element)>(args, stream); });
}

// ---- the order of a call ----

namespace {

GatedMaps maps_of(const SeForwardArgs& args) { return {args.N, args.C, args.H, args.W}; }

// Room for one kind of sums.
void* take_sums(DType dtype, const GatedMaps& maps, int lines, Scratch& scratch) {
  const std::size_t element = dtype == DType::f64 ? sizeof(double) : sizeof(float);
  return scratch.take(static_cast<std::size_t>(maps.N * lines * maps.C) * element);
}

void forward(DType dtype, const SeForwardArgs& args, Run& run) {
  const GatedMaps maps = maps_of(args);
  PixelSumsArgs sums{maps, args.input, {}};
  ImageSums taken{args.sums, 1};
  if (taken.data == nullptr) {
    taken.lines = pixel_sum_lines(dtype, sums, run.device);
    taken.data = sums.sums = take_sums(dtype, maps, taken.lines, run.scratch);
  }
  const ExcitationValues values = excitation_values(dtype, maps, args.excitation, run.scratch);
  if (!run.launching) return;
  if (sums.sums != nullptr) pixel_sums(dtype, sums, run.device, run.stream);
  excitation(dtype, maps, taken, args.excitation, values, run.stream);
  scale_pixels(dtype, {maps, args.input, args.output, values.gates, nullptr}, run.stream);
}

void backward(DType dtype, const SeBackwardArgs& args, Run& run) {
  const SeForwardArgs& forward = args.forward;
  const GatedMaps maps = maps_of(forward);
  PixelSumsArgs sums{maps, forward.input, args.grad_output};
  const int lines = pixel_sum_lines(dtype, sums, run.device);
  sums.sums = take_sums(dtype, maps, lines, run.scratch);
  sums.products = take_sums(dtype, maps, lines, run.scratch);
  ExcitationGradientArgs gradient{maps, {sums.products, lines}, forward.excitation, {}, args.grads};
  gradient.values = excitation_values(dtype, maps, forward.excitation, run.scratch);
  if (args.grad_input.data) gradient.per_pixel = take_sums(dtype, maps, 1, run.scratch);
  if (run.launching) {
    pixel_sums(dtype, sums, run.device, run.stream);
    excitation(dtype, maps, {sums.sums, lines}, forward.excitation, gradient.values, run.stream);
  }
  excitation_gradient(dtype, gradient, run);
  if (run.launching && args.grad_input.data) {
    scale_pixels(dtype, {maps, args.grad_output, args.grad_input, gradient.values.gates, gradient.per_pixel},
                 run.stream);
  }
}

}  // namespace

std::size_t se_fwd_scratch(DType dtype, const SeForwardArgs& args, const Device& device) {
  return count_scratch(device, [&](Run& run) { forward(dtype, args, run); });
}

void se_fwd(DType dtype, const SeForwardArgs& args, const Device& device, void* scratch, Stream stream) {
  Run run{device, Scratch(scratch), stream, true};
  forward(dtype, args, run);
}

std::size_t se_bwd_scratch(DType dtype, const SeBackwardArgs& args, const Device& device) {
  return count_scratch(device, [&](Run& run) { backward(dtype, args, run); });
}

void se_bwd(DType dtype, const SeBackwardArgs& args, const Device& device, void* scratch, Stream stream) {
  Run run{device, Scratch(scratch), stream, true};
  backward(dtype, args, run);
}

}  // namespace effops::cuda
