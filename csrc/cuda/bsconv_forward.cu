// Pointwise -> epilogue -> depthwise -> epilogue in one kernel, which rooms bsconv and mbconv launch; what stands
// between the two, as wide as the output, never leaves the chip. Unverified on a device: what is said of speed is
// calculated, nothing measured.
//
//   a block    a box of 64 output pixels (dsconv_tile.h) x a range of blocks of 32 channels (16 of double)
//
//        patch of the expanded map in shared memory (expansion.h), a block of channels at a time
//              |  windows and epilogue, 4 pixels x 2 channels a thread (dsconv_tile.h)
//              v
//        z [64 pixels][32] in shared memory, rounded  --8 or 16 bytes a thread-->  y
//              |  for a squeeze-excite: 8 lanes a channel
//              v
//        sums over the box's pixels, [image][box][channel]
//
// As many blocks share the channels of a box as give every processor four; each reads x under the box once a block of
// channels, from L2 but for the first time. Bytes a pixel of 16-bit maps: 2 (C + K) from and to memory, at 3x3 2 C x
// 1.6 K / 32 from L2. What is multiplied twice is the halo: 128 pixels (the existing ones of 100, in steps of 64) for
// 64.
//
// Calculated for float16, channels_last, batch 128, on an H200 (4.3 TB/s, 132 processors at 1.75 GHz):
//   128 -> 128, 56 x 56   512 bytes a pixel: 206 MB, 48 us; from L2 640 bytes more, 260 MB, 45 us at 5.7 TB/s; products
//                         26 GFLOP, 35 us. Counted by hand, 27 instructions an element for its window and epilogue, 2 x
//                         24 for copies, products and the epilogue of the expanded pixels, 6 for the output: 81 x 51
//                         million elements issue for 140 us, so instructions bound it; two perfect kernels take 96 us,
//                         with twice the traffic.
//   512 -> 512, 14 x 14   2048 bytes a pixel: 51 MB, 12 us; 7 x 7 boxes multiply 64 pixels for 49: 17 GFLOP, 23 us.
#include "csrc/cuda/expanded.h"
#include "csrc/cuda/expansion.h"
#include "csrc/cuda/sum.h"

namespace effops::cuda {
namespace {

template <class T>
struct Bsconv {
  Layer<T> layer;
  Expansion<T> expansion;
  ExpansionAt at;
  Kept<T> output;      // all channels
  int ranges, blocks;  // of blocks of channels; of them, those of a range
  compute<T>* sums;    // [N][boxes of an image][channels] over the pixels; null: not wanted
};

// The sums of z over the box's pixels of each image; z is 0 where there is none. As many lanes as there are share a
// channel.
template <class T>
EFFOPS_DEVICE void sum_pixels(const Bsconv<T>& a, const Origin& origin, int tile, int first, const T* z) {
  constexpr int kLanes = kThreads / kBlockC<T>;
  static_assert(kLanes <= kWarp);
  const Box& box = a.layer.box;
  const int lane = static_cast<int>(threadIdx.x) % kLanes, channel = static_cast<int>(threadIdx.x) / kLanes;
  const int pixels = box.rows * box.columns, lines = box.down * box.across;
  EFFOPS_NO_UNROLL
  for (int image = 0; image < box.images; ++image) {
    compute<T> sum = 0;
    EFFOPS_NO_UNROLL
    for (int i = lane; i < pixels; i += kLanes) sum += to_compute(z[(image * pixels + i) * kPitch<T> + channel]);
    EFFOPS_UNROLL
    for (int mask = kLanes / 2; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
    const index_t n = origin.n + image;
    if (lane > 0 || n >= a.layer.N || first + channel >= a.layer.g.D) continue;
    a.sums[(n * lines + tile % lines) * a.layer.g.D + first + channel] = sum;
  }
}

template <class T>
EFFOPS_KERNEL(kThreads, kBlocks<T>)
bsconv_forward_kernel(EFFOPS_PARAMS Bsconv<T> a) {
  const int range = static_cast<int>(blockIdx.x) % a.ranges, first = range * a.blocks;
  const int all = ceil_div(a.layer.g.D, kBlockC<T>), last = all - first < a.blocks ? all : first + a.blocks;
  const int tile = static_cast<int>(blockIdx.x) / a.ranges;
  const Origin origin = origin_of(a.layer.box, tile);
  const Tables tables = tables_of(a.at.tables, shared_at<index_t>(a.at.tables.patch_at));
  number_slots(a.layer.box, a.layer.g, tables);
  const LivePixels pixels = locate_live(a.layer, origin, tables.patch_at, shared_at<int>(a.at.places));
  barrier();
  ExpandedPatches<T> patches(a.layer, a.expansion, a.at, pixels, first, last);
  patches.begin();
  compute<T>* taps = shared_at<compute<T>>(a.at.taps);
  T* z = shared_at<T>(a.at.z);
  EFFOPS_NO_UNROLL
  for (int block = first; block < last; ++block) {
    const int channel = block * kBlockC<T>;
    patches.run(block, [&] { copy_taps(a.layer, channel, taps); });
    depthwise_tile(a.layer, tables, origin, channel, shared_at<T>(a.at.patch), taps, z, kPitch<T>);
    barrier();
    if (a.sums != nullptr) sum_pixels(a, origin, tile, channel, z);
    if (a.output.meeting.vector) {
      keep_channels<kVector<T>>(a.layer, tables, origin, a.output, channel, z);
    } else {
      keep_channels<1>(a.layer, tables, origin, a.output, channel, z);
    }
  }
}

// ---- host ----

// The depthwise half, as room dsconv has it.
DsconvForwardArgs depthwise_half(const BsconvForwardArgs& args) {
  DsconvForwardArgs half{};
  half.g = args.g;
  half.input = args.input;
  half.dw_weight = args.dw_weight;
  half.dw_epilogue = args.epilogue;
  return half;
}

template <class T>
Box box_for(const DepthwiseGeometry& g, const Device& device) {
  return expanded_box<T>(sizes_of(g), g.N, device, 0);
}

template <class T>
void launch_bsconv(const BsconvForwardArgs& args, void* sums, const Device& device, Stream stream) {
  const Box box = box_for<T>(args.g, device);
  Bsconv<T> a{};
  a.layer = layer_of<T>(depthwise_half(args), box);
  a.expansion = expansion_of<T>(args.pw);
  Carver all;
  carve_expansion<T>(a.layer.g, box, all, a.at);
  a.output = {map_of<T>(args.output), 0, a.layer.g.D, meeting_of<T>(args.g.C, {args.output})};
  a.sums = static_cast<compute<T>*>(sums);
  const index_t tiles = tiles_of(box, args.g.N), blocks = ceil_div(a.layer.g.D, kBlockC<T>);
  a.blocks = narrow(ceil_div(blocks, std::min(blocks, ceil_div<index_t>(4 * device.processors, tiles))));
  a.ranges = narrow(ceil_div<index_t>(blocks, a.blocks));
  launch(bsconv_forward_kernel<T>, grid_of(tiles * a.ranges, kThreads, all.used()), stream, a);
}

}  // namespace

bool expands_on_chip(DType dtype, const DepthwiseGeometry& g, const Device& device) {
  return with_types(dtype, false,
                    [&](auto element, auto) { return box_for<decltype(element)>(g, device).patch_rows > 0; });
}

int parts_of_image(DType dtype, const DepthwiseGeometry& g, const Device& device) {
  return with_types(dtype, false, [&](auto element, auto) {
    const Box box = box_for<decltype(element)>(g, device);
    return box.down * box.across;
  });
}

void expanded_depthwise(DType dtype, const BsconvForwardArgs& args, void* sums, const Device& device, Stream stream) {
  with_types(dtype, false, [&](auto element, auto) { launch_bsconv<decltype(element)>(args, sums, device, stream); });
}

}  // namespace effops::cuda
