// Room dsconv, backward, several depthwise windows over the same channels (Multiception): the gradient of their input,
// the sum over the parts, rounded once. Unverified on a device.
//
//   a block    32 channels (16 of double) x pixels of dx, 4 channels of a pixel a thread where they lie side by side
//              (8 bytes of a half type, 16 of the others), else one and neighbouring threads own neighbouring pixels
//
//        taps of all parts in shared memory [tap][channel]; read from memory where they do not fit
//        du of part 0 ----- taps that reach the pixel -----+
//        du of part 1 ----- ... ---------------------------+--> sum in registers -> dx
//
// Each part's gradient at its sums is loaded once a tap, from L1 but for the first time, dx stored once. Bytes a pixel of
// 16-bit maps at stride 1: 2 C (parts + 1) from memory.
//
// Calculated for float16, channels_last, batch 128, 56 x 56, 64 channels, 3x3 + 5x5 + 7x7 on an H200 (4.3 TB/s, 132
// processors at 1.75 GHz), nothing measured: 512 bytes a pixel, 206 MB, 48 us; 83 taps take 4.3 GB from L1, 144 us at
// 128 bytes a clock and processor, and 5 instructions an element and tap 360 us.
#include "csrc/cuda/dsconv_parts.h"
#include "csrc/cuda/launch.h"
#include "csrc/cuda/sum.h"

namespace effops::cuda {
namespace {

template <class T>
struct SourcePart {
  Map<const T> du;
  const T* weight;
  Sizes g;
};

template <class T>
struct PartsInputGradient {
  int count, C, H, W;
  index_t pixels;
  int steps;      // of a block along the pixels
  bool by_pixel;  // neighbouring threads own neighbouring pixels, not channels
  bool staged;    // the taps are in shared memory
  Map<T> dx;
  SourcePart<T> part[kMaxParts];
};

// The taps of the block's channels, one part behind the other: a row of channels each.
template <class T>
EFFOPS_DEVICE void stage_taps(const PartsInputGradient<T>& a, int first, compute<T>* to) {
  constexpr int kChannels = kBlockC<T>;
  EFFOPS_NO_UNROLL
  for (int i = 0; i < a.count; ++i) {
    const SourcePart<T>& part = a.part[i];
    const int taps = part.g.R * part.g.S, channel = static_cast<int>(threadIdx.x) % kChannels;
    EFFOPS_NO_UNROLL
    for (int t = static_cast<int>(threadIdx.x) / kChannels; t < taps; t += kThreads / kChannels) {
      const bool live = first + channel < a.C;
      to[t * kChannels + channel] =
          live ? to_compute(load_global_cached(part.weight + static_cast<index_t>(first + channel) * taps + t))
               : compute<T>(0);
    }
    to += taps * kChannels;
  }
}

// sum += what the part's outputs whose windows cover input pixel (n, h, w) send to channels c .. c + V - 1.
template <int V, class T>
EFFOPS_DEVICE void gather_part(const SourcePart<T>& part, index_t n, int c, int h, int w, const compute<T>* staged,
                               compute<T> (&sum)[V]) {
  using C = compute<T>;
  const Sizes& g = part.g;
  const T* const image = part.du.at(n, c, 0, 0);
  EFFOPS_NO_UNROLL
  for (int r = 0; r < g.R; ++r) {
    const int y = h + g.pad_top - r * g.dilation_h, p = y / g.stride_h;
    if (y < 0 || p * g.stride_h != y || p >= g.P) continue;
    const T* const row = image + p * part.du.h;
    EFFOPS_NO_UNROLL
    for (int s = 0; s < g.S; ++s) {
      const int x = w + g.pad_left - s * g.dilation_w, q = x / g.stride_w;
      if (x < 0 || q * g.stride_w != x || q >= g.Q) continue;
      const int t = r * g.S + s;
      C value[V], tap[V];
      load_channels<V>(row + q * part.du.w, value);
      EFFOPS_UNROLL
      for (int j = 0; j < V; ++j) {
        tap[j] = staged != nullptr
                     ? staged[t * kBlockC<T> + j]
                     : to_compute(load_global_cached(part.weight + static_cast<index_t>(c + j) * g.R * g.S + t));
      }
      EFFOPS_UNROLL
      for (int j = 0; j < V; ++j) sum[j] += value[j] * tap[j];
    }
  }
}

template <class T, int V>
EFFOPS_KERNEL(kThreads, 4)
dsconv_parts_input_gradient_kernel(EFFOPS_PARAMS PartsInputGradient<T> a) {
  using C = compute<T>;
  constexpr int kGroups = kBlockC<T> / V, kPixels = kThreads / kGroups;
  const int channel_blocks = ceil_div(a.C, kBlockC<T>), thread = static_cast<int>(threadIdx.x);
  const int first = static_cast<int>(blockIdx.x) % channel_blocks * kBlockC<T>;
  const int group = a.by_pixel ? thread / kPixels : thread % kGroups, c = first + group * V;
  C* const taps = shared_memory<C>();
  if (a.staged) {
    stage_taps(a, first, taps);
    barrier();
  }
  if (c >= a.C) return;
  index_t pixel = static_cast<index_t>(blockIdx.x) / channel_blocks * a.steps * kPixels +
                  (a.by_pixel ? thread % kPixels : thread / kGroups);
  EFFOPS_NO_UNROLL
  for (int step = 0; step < a.steps && pixel < a.pixels; ++step, pixel += kPixels) {
    const index_t line = pixel / a.W, n = line / a.H;
    const int h = static_cast<int>(line % a.H), w = static_cast<int>(pixel % a.W);
    const C* staged = a.staged ? taps + group * V : nullptr;
    C sum[V] = {};
    EFFOPS_NO_UNROLL
    for (int i = 0; i < a.count; ++i) {
      gather_part<V>(a.part[i], n, c, h, w, staged, sum);
      if (a.staged) staged += a.part[i].g.R * a.part[i].g.S * kBlockC<T>;
    }
    store_channels<V>(a.dx.at(n, c, h, w), sum);
  }
}

// ---- host ----

template <class T, int V>
void launch_input_gradient(PartsInputGradient<T>& a, const Device& device, std::size_t taps_bytes, Stream stream) {
  constexpr index_t kPixels = kThreads / (kBlockC<T> / V);
  const index_t channel_blocks = ceil_div<index_t>(a.C, kBlockC<T>);
  // Taps are staged once a block: several pixels a thread, as long as four blocks a processor are left.
  a.steps = narrow(std::clamp<index_t>(a.pixels * channel_blocks / (kPixels * 4 * device.processors), 1, 16));
  const index_t blocks = ceil_div<index_t>(a.pixels, kPixels * a.steps) * channel_blocks;
  launch(dsconv_parts_input_gradient_kernel<T, V>, grid_of(blocks, kThreads, a.staged ? taps_bytes : 0), stream, a);
}

template <class T>
void input_gradient(const DsconvBackwardArgs& args, const TensorRef* sums_grads, const Device& device, Stream stream) {
  const DsconvForwardArgs& forward = args.forward;
  const DepthwiseGeometry& g = forward.g;
  PartsInputGradient<T> a{};
  a.count = narrow(forward.num_parts);
  a.C = narrow(g.C);
  a.H = narrow(g.H);
  a.W = narrow(g.W);
  a.pixels = g.N * g.H * g.W;
  if (a.pixels == 0) return;
  a.dx = map_of<T>(args.grad_input);
  Meeting meeting = meeting_of<T>(g.C, {args.grad_input});
  std::size_t taps = 0;
  for (int i = 0; i < a.count; ++i) {
    const DepthwisePartArgs& part = forward.parts[i];
    const Meeting own = meeting_of<T>(g.C, {sums_grads[i]});
    meeting = {meeting.vector && own.vector, meeting.by_pixel || own.by_pixel};
    a.part[i] = {map_of<const T>(sums_grads[i]), static_cast<const T*>(part.weight), sizes_of(part.g)};
    taps += static_cast<std::size_t>(part.g.R * part.g.S) * kBlockC<T> * sizeof(compute<T>);
  }
  a.by_pixel = meeting.by_pixel && !meeting.vector;
  constexpr std::size_t kMost = 40 * 1024;  // four blocks' on every processor
  a.staged = taps <= kMost;
  if (meeting.vector) {
    launch_input_gradient<T, kVector<T>>(a, device, taps, stream);
  } else {
    launch_input_gradient<T, 1>(a, device, taps, stream);
  }
}

}  // namespace

void dsconv_parts_input_gradient(DType dtype, const DsconvBackwardArgs& args, const TensorRef* sums_grads,
                                 const Device& device, Stream stream) {
  with_types(dtype, false,
             [&](auto element, auto) { input_gradient<decltype(element)>(args, sums_grads, device, stream); });
}

}  // namespace effops::cuda
