// Room dsconv, forward: depthwise -> epilogue -> pointwise -> epilogue in one kernel; z never leaves the chip.
// Unverified on a device: what is said of speed is calculated, nothing measured.
//
//   a block    a box of 64 output pixels (dsconv_tile.h) x up to 128 output channels; blocks of output channels of the
//              same pixels run side by side, each computes z anew
//   its sums   as in dsconv_pointwise.h -> tile in shared memory -> epilogue, 8 or 16 bytes a thread -> y; z's kept
//              channels are stored beside y by the first block
//
// A block loads x under its windows and the passed channels of its pixels once, and stores y once. Bytes a pixel of
// 16-bit maps: 2 (C + passed + K + keep) from memory; the halo (100 / 64 of x at 3x3), the matrix and x for further
// blocks of output channels from L2.
//
// Calculated for float16, channels_last, batch 128, 56 x 56 on an H200 (4.3 TB/s, 132 processors at 1.75 GHz):
//   128 -> 128 channels   512 bytes a pixel: 206 MB, 48 us; products 13 GFLOP, 17 us. Counted by hand, 27 instructions
//                         an element of z for its window and epilogue (9 multiply-adds), 14 for copies, 4 for
//                         products, 10 for the output: 55 x 51 million elements issue for 95 us, so instructions bound
//                         it; two perfect kernels would take 96 us.
//   28 + 28 -> 28         half-identity: x, passed and y, 168 bytes a pixel: 67 MB, 16 us; copies weigh more a channel
//                         of z, and 4 of 32 are padding: some 80 instructions x 11 million, 30 us. Two perfect
//                         kernels: 47 us.
#include "csrc/cuda/dsconv_forward.h"

#include "csrc/cuda/sum.h"

namespace effops::cuda {
namespace {

template <class T>
struct Forward {
  Layer<T> layer;
  PointwiseAt at;
  Output<T> output;
  Kept<T> kept;
};

template <class T, bool TF32, int N>
EFFOPS_KERNEL(kThreads, kBlocks<T>)
dsconv_forward_kernel(EFFOPS_PARAMS Forward<T> a) {
  using C = compute<T>;
  using Product = BlockProduct<T, TF32, kSlots, N>;
  const int k_blocks = ceil_div(a.layer.K, N), k_block = static_cast<int>(blockIdx.x) % k_blocks;
  const Origin origin = origin_of(a.layer.box, static_cast<int>(blockIdx.x) / k_blocks);
  const Tables tables = tables_of(a.at.tables, shared_at<index_t>(a.at.tables.patch_at));
  number_slots(a.layer.box, a.layer.g, tables);
  locate_patch(a.layer, origin, tables.patch_at);
  copy_affine<T>(a.output.epilogue, k_block * N, a.layer.K, N, shared_at<C>(a.at.affine));
  barrier();
  Product product;
  PointwiseSums<T, N, Product>(a.layer, a.at, tables, origin, k_block * N)
      .run(k_block == 0 && a.kept.count > 0 ? &a.kept : nullptr, product);
  write_product<N>(a.layer, a.output, a.at, tables, origin, k_block * N, product);
}

// ---- host ----

template <class T, bool TF32, int N>
void launch_forward(const DsconvForwardArgs& args, const Device& device, Stream stream) {
  const Sizes g = sizes_of(args.g);
  const PointwiseTile tile = pointwise_tile<T>(g, args.g.N, device, N);
  Forward<T> a{};
  a.layer = layer_of<T>(args, tile.box);
  const int shared = carve_pointwise<T>(tile, g, a.at);
  a.output = output_of<T>(args);
  a.kept = {map_of<T>(args.output), narrow(g.D - args.keep), narrow(args.keep), {}};
  a.kept.meeting = meeting_of<T>(args.keep, {args.output});
  a.kept.meeting.vector = a.kept.meeting.vector && a.kept.first % kVector<T> == 0;
  const index_t blocks = tiles_of(tile.box, args.g.N) * ceil_div<index_t>(args.K, N);
  launch(dsconv_forward_kernel<T, TF32, N>, grid_of(blocks, kThreads, shared), stream, a);
}

template <class T, bool TF32>
void forward(const DsconvForwardArgs& args, const Device& device, Stream stream) {
  if (pixels_of(args.g) == 0) return;
  with_output_width<T>(args, device, [&](auto width) { launch_forward<T, TF32, width>(args, device, stream); });
}

}  // namespace

void dsconv_fwd(DType dtype, const DsconvForwardArgs& args, const Device& device, Stream stream) {
  if (args.parts != nullptr) return dsconv_parts_fwd(dtype, args, device, stream);
  with_types(dtype, args.tf32, [&](auto element, auto products) {
    forward<decltype(element), decltype(products)::value>(args, device, stream);
  });
}

}  // namespace effops::cuda
