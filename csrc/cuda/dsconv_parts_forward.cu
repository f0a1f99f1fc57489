// Room dsconv, forward, several depthwise windows side by side: one kernel as dsconv_forward.cu; z, the parts'
// concatenation, never leaves the chip. Unverified on a device: what is said of speed is calculated, nothing measured.
//
//   a block    a box of 64 output pixels (dsconv_tile.h) x up to 128 output channels
//   its sums   the parts' blocks of channels one after the other (dsconv_parts.h) -> tile in shared memory -> epilogue
//              -> y
//
// A block loads x under what the windows span once, whichever of Multiception's windows want it, and stores y once.
// Bytes a pixel of 16-bit maps: 2 (C + K) from memory; the halo, the matrix and x for further blocks of output channels
// from L2.
//
// Calculated for float16, channels_last, batch 128 on an H200 (4.3 TB/s, 132 processors at 1.75 GHz):
//   Multiception 3x3, 5x5, 7x7, 64 -> 64 channels, 56 x 56    256 bytes a pixel: 103 MB, 24 us; products 10 GFLOP,
//                         12 us. The 7x7 has a load a tap: some 35, 60 and 200 instructions an element of z for the
//                         three windows and 20 for epilogue, matrix and product of each, 355 x 26 million: 310 us, so
//                         instructions bound it. Eager's z, written and read, is 308 MB: 72 us more of memory.
//   MixConv 3x3, 5x5, 7x7, 80 + 80 + 80 -> 240, 14 x 14       960 bytes a pixel: 24 MB, 6 us; 120 instructions for each
//                         of 6 million elements: 25 us.
#include "csrc/cuda/dsconv_forward.h"
#include "csrc/cuda/dsconv_parts.h"
#include "csrc/cuda/sum.h"

namespace effops::cuda {
namespace {

template <class T>
struct PartsForward {
  Layer<T> layer;  // spans all parts
  PointwiseAt at;
  Output<T> output;
  Parts<T> parts;
};

template <class T, int N>
EFFOPS_KERNEL(kThreads, kBlocks<T>)
dsconv_parts_forward_kernel(EFFOPS_PARAMS PartsForward<T> a) {
  using C = compute<T>;
  using Product = BlockProduct<T, false, kSlots, N>;
  const int k_blocks = ceil_div(a.layer.K, N), k = static_cast<int>(blockIdx.x) % k_blocks * N;
  const Origin origin = origin_of(a.layer.box, static_cast<int>(blockIdx.x) / k_blocks);
  const Tables tables = tables_of(a.at.tables, shared_at<index_t>(a.at.tables.patch_at));
  number_slots(a.layer.box, a.layer.g, tables);
  locate_patch(a.layer, origin, tables.patch_at);
  copy_affine<T>(a.output.epilogue, k, a.layer.K, N, shared_at<C>(a.at.affine));
  barrier();
  Product product;
  PartsSums<T, N, Product>(a.parts, a.at, tables, origin, k).run(product);
  write_product<N>(a.layer, a.output, a.at, tables, origin, k, product);
}

// ---- host ----

template <class T, int N>
void launch_parts_forward(const DsconvForwardArgs& args, const Device& device, Stream stream) {
  const Sizes g = sizes_of(spanning_window(args));
  const PointwiseTile tile = pointwise_tile<T>(g, args.g.N, device, N);
  PartsForward<T> a{};
  a.layer = spanning_layer<T>(args, tile.box);
  const int shared = carve_pointwise<T>(tile, g, a.at);
  a.output = output_of<T>(args);
  a.parts = parts_of<T>(args, tile.box);
  const index_t blocks = tiles_of(tile.box, args.g.N) * ceil_div<index_t>(args.K, N);
  launch(dsconv_parts_forward_kernel<T, N>, grid_of(blocks, kThreads, shared), stream, a);
}

}  // namespace

void dsconv_parts_fwd(DType dtype, const DsconvForwardArgs& args, const Device& device, Stream stream) {
  check_parts(args);
  if (pixels_of(args.g) == 0) return;
  with_types(dtype, false, [&](auto element, auto) {
    using T = decltype(element);
    with_output_width<T>(args, device, [&](auto width) { launch_parts_forward<T, width>(args, device, stream); });
  });
}

}  // namespace effops::cuda
