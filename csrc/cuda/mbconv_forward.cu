// Room mbconv, forward, without a squeeze-excite: pointwise -> epilogue -> depthwise -> epilogue -> pointwise ->
// epilogue in one kernel; nothing as wide as the expanded map is ever in memory. Unverified on a device: what is said
// of speed is calculated, nothing measured.
//
//   a block    a box of 64 output pixels (dsconv_tile.h) x all output channels, up to 128
//
//        for every 32 expanded channels (16 of double):
//        patch of the expanded map in shared memory (expansion.h)
//              |  windows and epilogue
//              v
//        z [64 pixels][32] in shared memory, rounded    columns of the projection [N][32], copied by cp.async meanwhile
//              +-----------------------+---------------------------+
//                                      v
//        sums [64][N] += z * columns^T in registers (gemm.h), which stay there for all expanded channels
//   -> tile in shared memory, in the place of all that -> epilogue, 8 or 16 bytes a thread -> y
//
// A block reads x under its box from memory once, and from L2 again for every 32 expanded channels. Bytes a pixel of
// 16-bit maps: 2 (C + K), and 2 K for a residual.
//
// Calculated for float16, channels_last, batch 128, on an H200 (4.3 TB/s, 132 processors at 1.75 GHz):
//   24 -> 144 -> 24, 56 x 56   144 bytes a pixel with the residual: 58 MB, 13 us. Products 2 x 160 x (64 x 2 + 32)
//                              flops a pixel, as tiles are wider than these channels: 21 GFLOP, 27 us. Counted by hand,
//                              85 instructions an element of z, 58 million of them, issue for 165 us, so instructions
//                              bound it; three perfect kernels take 121 us, with nine times the traffic.
#include "csrc/cuda/expanded.h"
#include "csrc/cuda/expansion.h"
#include "csrc/cuda/sum.h"

namespace effops::cuda {
namespace {

struct MbconvAt {
  ExpansionAt expansion;
  int affine, projection;
};

template <class T>
struct Mbconv {
  Layer<T> layer;
  Expansion<T> expansion;
  MbconvAt at;
  Output<T> output;
};

template <class T, int N>
EFFOPS_KERNEL(kThreads, kBlocks<T>)
mbconv_forward_kernel(EFFOPS_PARAMS Mbconv<T> a) {
  using C = compute<T>;
  const ExpansionAt& at = a.at.expansion;
  const Origin origin = origin_of(a.layer.box, static_cast<int>(blockIdx.x));
  const Tables tables = tables_of(at.tables, shared_at<index_t>(at.tables.patch_at));
  C* affine = shared_at<C>(a.at.affine);
  C* taps = shared_at<C>(at.taps);
  T* projection = shared_at<T>(a.at.projection);
  T* z = shared_at<T>(at.z);
  number_slots(a.layer.box, a.layer.g, tables);
  clear_empty_slots(a.layer.box, z, kPitch<T>, kBlockC<T>);
  copy_affine<T>(a.output.epilogue, 0, a.layer.K, N, affine);
  const LivePixels pixels = locate_live(a.layer, origin, tables.patch_at, shared_at<int>(at.places));
  barrier();
  BlockProduct<T, false, kSlots, N> product;
  product.clear();
  const int blocks = ceil_div(a.layer.g.D, kBlockC<T>);
  ExpandedPatches<T> patches(a.layer, a.expansion, at, pixels, 0, blocks);
  patches.begin();
  EFFOPS_NO_UNROLL
  for (int block = 0; block < blocks; ++block) {
    const int channel = block * kBlockC<T>;
    patches.run(block, [&] {
      copy_matrix<T, kBlockC<T>>(a.layer, 0, N, {false, channel, a.layer.g.D, 0}, projection, kPitch<T>);
      copy_async_commit();
      copy_taps(a.layer, channel, taps);
    });
    depthwise_tile(a.layer, tables, origin, channel, shared_at<T>(at.patch), taps, z, kPitch<T>);
    copy_async_wait<0>();
    barrier();
    product.template add<RowHolds::sum, RowHolds::sum, kBlockC<T>>(z, kPitch<T>, projection, kPitch<T>);
  }
  barrier();
  C* tile = shared_at<C>(at.stages);
  product.store(tile, tile_pitch(N, a.output.meeting.by_pixel));
  barrier();
  write_output<N>(a.layer, a.output, tables, origin, 0, affine, tile);
}

// ---- host ----

// Output channels of the widest tile.
template <class T>
constexpr int kWidest = sizeof(T) == 8 ? 64 : 128;

template <class T>
int carve_mbconv(const Sizes& g, const Box& box, int columns, MbconvAt& at) {
  using C = compute<T>;
  Carver all;
  at.affine = all.take(kAffine * columns * sizeof(C));
  at.projection = all.take(columns * kPitch<T> * sizeof(T));
  carve_expansion<T>(g, box, all, at.expansion);
  return std::max(all.used(), at.expansion.stages + kSlots * (columns + 8) * static_cast<int>(sizeof(C)));
}

template <class T, int N>
void launch_mbconv(const MbconvForwardArgs& args, const Box& box, Stream stream) {
  const DsconvForwardArgs rest = after_expansion(args);
  Mbconv<T> a{};
  a.layer = layer_of<T>(rest, box);
  a.expansion = expansion_of<T>(expansion_of(args));
  const int shared = carve_mbconv<T>(a.layer.g, box, N, a.at);
  a.output = output_of<T>(rest);
  launch(mbconv_forward_kernel<T, N>, grid_of(tiles_of(box, args.g.N), kThreads, shared), stream, a);
}

// f(the width of the tile, a constant; its box)
template <class T, class F>
void with_tile(const MbconvForwardArgs& args, const Device& device, const F& f) {
  with_width<32, kWidest<T>>(args.K, device.processors, device, [&](auto width) {
    const std::size_t other =
        width * (kAffine * sizeof(compute<T>) + kPitch<T> * sizeof(T)) + kSlots * (width + 8) * sizeof(compute<T>);
    f(width, expanded_box<T>(sizes_of(args.g), args.g.N, device, other));
  });
}

}  // namespace

bool pays_in_one_kernel(DType dtype, const MbconvForwardArgs& args, const Device& device) {
  return with_types(dtype, false, [&](auto element, auto) {
    using T = decltype(element);
    bool pays = false;
    with_tile<T>(args, device, [&](auto, const Box& box) {
      pays = args.K <= kWidest<T> && box.patch_rows > 0 && tiles_of(box, args.g.N) >= device.processors;
    });
    return pays;
  });
}

void expanded_separable(DType dtype, const MbconvForwardArgs& args, const Device& device, Stream stream) {
  with_types(dtype, false, [&](auto element, auto) {
    using T = decltype(element);
    with_tile<T>(args, device, [&](auto width, const Box& box) { launch_mbconv<T, width>(args, box, stream); });
  });
}

}  // namespace effops::cuda
