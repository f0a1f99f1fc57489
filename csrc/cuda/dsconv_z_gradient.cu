// Room dsconv, backward: the gradients of z, that is of the passed channels and at the depthwise sums. Unverified on a
// device.
//
//   a block    a box of 64 pixels (dsconv_tile.h) x 64 channels of z (32 of double), passed or depthwise
//
//        two stages in shared memory, 64 output channels (32 of float, 16 of double) each, copied by cp.async
//        +-------------------------+------------------------+
//        | du [64 pixels][64]      | matrix [64][64]        |
//        +-----------+-------------+-----------+------------+
//                    v                         v
//        dz = du * matrix, [64][64] in registers (gemm.h) -> tile
//        patch of x, windows (dsconv_tile.h)              -> tile of the depthwise sums, if their epilogue needs them
//                    |  the stages' place, 8 or 16 bytes a thread; + the kept copy's gradient
//                    v
//        depthwise epilogue backwards -> gradient at the depthwise sums, residual's; its sums over pixels -> a line of
//        partial results. A block of passed channels ends with dz.
//
// A block loads du of its pixels and x under the windows of its channels once, and stores its gradient once. Bytes a
// pixel of 16-bit maps: 2 (K + 2 C + passed) from memory; du for further blocks of channels, the halo and the matrix
// from L2.
//
// Calculated for float16, channels_last, batch 128, 56 x 56 on an H200 (4.3 TB/s, 132 processors), nothing measured:
//   128 -> 128 channels   768 bytes a pixel: 308 MB, 72 us; products 13 GFLOP, 17 us. Some 60 instructions an element
//                         of z (the forward's window, copies and product, and an epilogue's gradient) issue for 104 us.
//   28 + 28 -> 28         224 bytes a pixel: 90 MB, 21 us; 28 of 64 channels of a tile are there, and some 90
//                         instructions for each of 22 million elements take 67 us.
#include "csrc/cuda/dsconv_epilogue.h"
#include "csrc/cuda/dsconv_gradients.h"
#include "csrc/cuda/sum.h"

namespace effops::cuda {
namespace {

// Output channels of a step of the sum over K.
template <class T>
constexpr int kDepth = sizeof(T) == 2 ? 64 : kBlockC<T>;

// Shared memory: tables; two stages of du and the matrix, and in their place the tile of sums and what the depthwise
// sums of its channels take.
struct ZGradientAt {
  TablesAt tables;
  int stages, stage_bytes, matrix;
  int tile, u, lines, patch, taps;
};

template <class T>
struct ZGradient {
  Layer<T> layer;
  ZGradientAt at;
  Map<const T> du;
  Reading read_du;
  int first_block, blocks;  // blocks of channels that are asked for, the passed ones first
  Map<T> passed_grad;
  Meeting passed_meeting;
  Map<const T> kept;  // the gradient of the depthwise channels from `kept_first` on that the output begins with
  int kept_first;
  bool recompute;
  Map<T> sums_grad, residual_grad;
  Meeting meeting;
  Partial<compute<T>> partial;
};

// product += du (slots x K) * matrix (K x N channels)
template <int N, class T, class Product>
EFFOPS_DEVICE void multiply_by_matrix(const ZGradient<T>& a, const Tables& tables, const Origin& origin,
                                      const ColumnBlock& block, Product& product) {
  constexpr int kDuPitch = padded_pitch<T>(kDepth<T>), kMatrixPitch = padded_pitch<T>(N, RowHolds::outer);
  const auto part = [&](int step, int offset) {
    return shared_at<T>(a.at.stages + (step & 1) * a.at.stage_bytes + offset);
  };
  const auto copy = [&](int step) {
    const int k = step * kDepth<T>;
    copy_slots<T, kDepth<T>>(a.layer, tables, origin, a.du, a.read_du, k, a.layer.K, part(step, 0), kDuPitch);
    copy_matrix<T, N>(a.layer, k, kDepth<T>, block, part(step, a.at.matrix), kMatrixPitch);
    copy_async_commit();
  };
  const int steps = ceil_div(a.layer.K, kDepth<T>);
  copy(0);
  EFFOPS_NO_UNROLL
  for (int step = 0; step < steps; ++step) {
    copy_async_wait<0>();
    barrier();
    if (step + 1 < steps) copy(step + 1);
    product.template add<RowHolds::sum, RowHolds::outer, kDepth<T>>(part(step, 0), kDuPitch, part(step, a.at.matrix),
                                                                    kMatrixPitch);
  }
  barrier();
}

// The depthwise sums of N channels, as a tile.
template <int N, class T>
EFFOPS_DEVICE void depthwise_sums_tile(const ZGradient<T>& a, const Tables& tables, const Origin& origin, int first,
                                       compute<T>* u, int pitch) {
  using C = compute<T>;
  T* patch = shared_at<T>(a.at.patch);
  C* taps = shared_at<C>(a.at.taps);
  EFFOPS_NO_UNROLL
  for (int part = 0; part < N; part += kBlockC<T>) {
    if (a.layer.box.patch_rows > 0) copy_patch(a.layer, tables.patch_at, first + part, patch);
    copy_async_commit();
    copy_taps(a.layer, first + part, taps);
    copy_async_wait<0>();
    barrier();
    depthwise_sums(a.layer, tables, origin, first + part, patch, taps,
                   [&](const RunPlace& place, const C(&sums)[kRun][2]) {
                     EFFOPS_UNROLL
                     for (int j = 0; j < kRun; ++j) {
                       if (j >= place.run.count) continue;
                       C* to = u + (place.run.slot + j) * pitch + part + place.channel;
                       to[0] = sums[j][0];
                       to[1] = sums[j][1];
                     }
                   });
    barrier();
  }
}

template <int V, int N, class T>
EFFOPS_DEVICE void write_passed_gradient(const ZGradient<T>& a, const Tables& tables, const Origin& origin, int first,
                                         const compute<T>* tile, int pitch) {
  walk_tile<V, N>(a.passed_meeting.by_pixel, [&](int slot, int column) {
    const Pixel pixel = pixel_of(a.layer, tables, origin, slot);
    const int c = first + column;
    if (!pixel.inside || c >= a.layer.passed) return;
    compute<T> g[V];
    load_channels<V>(tile + slot * pitch + column, g);
    store_channels<V>(a.passed_grad.at(pixel.n, c, pixel.p, pixel.q), g);
  });
}

template <int V, int N, class T>
EFFOPS_DEVICE void write_sums_gradient(const ZGradient<T>& a, const Tables& tables, const Origin& origin,
                                       int tile_index, int first, const compute<T>* tile, const compute<T>* sums,
                                       int pitch) {
  using C = compute<T>;
  const EpilogueBackward<V, T> backward{a.layer.dw, a.residual_grad};
  walk_and_sum<V, N>(a.meeting.by_pixel, shared_at<C>(a.at.lines), a.partial, tile_index, first,
                     [&](int slot, int column, C(&terms)[kAffine][V]) {
                       const Pixel pixel = pixel_of(a.layer, tables, origin, slot);
                       const int o = first + column;
                       if (!pixel.inside || o >= a.layer.g.D) return;
                       C g[V], u[V] = {}, sum[V] = {}, kept[V] = {};
                       load_channels<V>(tile + slot * pitch + column, g);
                       if (o >= a.kept_first) {
                         load_channels<V>(a.kept.at(pixel.n, o - a.kept_first, pixel.p, pixel.q), kept);
                       }
                       if (a.recompute) {
                         read_channels<T>(a.layer.dw.bias, o, C(0), u);
                         load_channels<V>(sums + slot * pitch + column, sum);
                       }
                       EFFOPS_UNROLL
                       for (int j = 0; j < V; ++j) {
                         g[j] += kept[j];
                         u[j] += sum[j];
                       }
                       backward.run(pixel, o, u, g, terms);
                       if (a.sums_grad.data != nullptr) {
                         store_channels<V>(a.sums_grad.at(pixel.n, o, pixel.p, pixel.q), g);
                       }
                     });
}

template <class T, bool TF32, int N>
EFFOPS_KERNEL(kThreads, kBlocks<T>)
dsconv_z_gradient_kernel(EFFOPS_PARAMS ZGradient<T> a) {
  using C = compute<T>;
  const int tile_index = static_cast<int>(blockIdx.x) / a.blocks;
  const ColumnBlock block = column_block(a.layer, a.first_block + static_cast<int>(blockIdx.x) % a.blocks, N);
  const Origin origin = origin_of(a.layer.box, tile_index);
  const Tables tables = tables_of(a.at.tables, shared_at<index_t>(a.at.tables.patch_at));
  const bool recompute = a.recompute && !block.passed;
  number_slots(a.layer.box, a.layer.g, tables);
  if (recompute) locate_patch(a.layer, origin, tables.patch_at);
  barrier();
  C* tile = shared_at<C>(a.at.tile);
  const Meeting meeting = block.passed ? a.passed_meeting : a.meeting;
  const int pitch = tile_pitch(N, meeting.by_pixel);
  {
    BlockProduct<T, TF32, kSlots, N> product;
    product.clear();
    multiply_by_matrix<N>(a, tables, origin, block, product);
    product.store(tile, pitch);
  }
  if (block.passed) {
    barrier();
    if (meeting.vector) {
      write_passed_gradient<kVector<T>, N>(a, tables, origin, block.first, tile, pitch);
    } else {
      write_passed_gradient<1, N>(a, tables, origin, block.first, tile, pitch);
    }
    return;
  }
  C* u = shared_at<C>(a.at.u);
  if (recompute) depthwise_sums_tile<N>(a, tables, origin, block.first, u, pitch);
  barrier();
  if (meeting.vector) {
    write_sums_gradient<kVector<T>, N>(a, tables, origin, tile_index, block.first, tile, u, pitch);
  } else {
    write_sums_gradient<1, N>(a, tables, origin, tile_index, block.first, tile, u, pitch);
  }
}

// ---- host ----

template <class T>
constexpr int kChannels = sizeof(T) == 8 ? 32 : 64;  // of a block

// What stands in the place of the stages.
template <class T>
int carve_tail(const Sizes& g, const Box& box, Carver& all, ZGradientAt& at) {
  using C = compute<T>;
  constexpr int kN = kChannels<T>;
  at.tile = all.take(kSlots * (kN + 8) * sizeof(C));
  at.u = all.take(kSlots * (kN + 8) * sizeof(C));
  at.lines = all.take(kSumLines<kVector<T>, kN> * kAffine * kN * sizeof(C));
  at.patch = all.take(patch_bytes<T>(box, g));
  at.taps = all.take(taps_bytes<T>(g, box.patch_rows > 0));
  return all.used();
}

template <class T>
int carve_z(const Sizes& g, const Box& box, ZGradientAt& at) {
  Carver stage;
  stage.take(kSlots * padded_pitch<T>(kDepth<T>) * sizeof(T));
  at.matrix = stage.take(kDepth<T> * padded_pitch<T>(kChannels<T>, RowHolds::outer) * sizeof(T));
  at.stage_bytes = stage.used();
  Carver all;
  at.tables = carve_tables(all, box, 1);
  at.stages = all.used();
  return std::max(at.stages + 2 * at.stage_bytes, carve_tail<T>(g, box, all, at));
}

template <class T, bool TF32>
void launch_z_gradient(const ZGradientPlan& plan, const DsconvBackwardArgs& args, const TensorRef& du,
                       const TensorRef& sums_grad, void* partial, Stream stream) {
  constexpr int kN = kChannels<T>;
  const DsconvForwardArgs& forward = args.forward;
  ZGradient<T> a{};
  a.layer = layer_of<T>(forward, plan.box);
  const Sizes& g = a.layer.g;
  const int shared = carve_z<T>(g, plan.box, a.at);
  a.du = map_of<const T>(du);
  a.read_du = reading_of<T>(du);
  const int passed_blocks = ceil_div(a.layer.passed, kN);
  a.first_block = args.grad_passthrough.data ? 0 : passed_blocks;
  a.blocks = passed_blocks - a.first_block + (through_depthwise(args) ? ceil_div(g.D, kN) : 0);
  a.passed_grad = map_of<T>(args.grad_passthrough);
  a.passed_meeting = meeting_of<T>(a.layer.passed, {args.grad_passthrough});
  a.kept = map_of<const T>(args.grad_output);
  a.kept_first = narrow(g.D - forward.keep);
  a.recompute = needs_sums(forward.dw_epilogue, args.dw_grads);
  a.sums_grad = map_of<T>(sums_grad);
  a.residual_grad = map_of<T>(args.dw_grads.residual);
  const TensorRef residual = a.layer.dw.post == Activation::none ? TensorRef{} : a.layer.dw.residual;
  const TensorRef kept = forward.keep ? args.grad_output : TensorRef{};
  a.meeting = meeting_of<T>(g.D, {sums_grad, args.dw_grads.residual, residual, kept});
  a.meeting.vector = a.meeting.vector && forward.keep % kVector<T> == 0;
  a.partial = {static_cast<compute<T>*>(partial), g.D};
  launch(dsconv_z_gradient_kernel<T, TF32, kN>, grid_of(plan.lines * a.blocks, kThreads, shared), stream, a);
}

}  // namespace

ZGradientPlan plan_z_gradient(DType dtype, const DsconvForwardArgs& args, const Device& device) {
  return with_types(dtype, false, [&](auto element, auto) {
    using T = decltype(element);
    const Sizes g = sizes_of(args.g);
    ZGradientAt at;
    const std::size_t other = carve_z<T>(g, Box{}, at) + taps_bytes<T>(g, true) + 64;
    const Box box = fitting_box<T>(g, args.g.N, device, other, 1, 1);
    return ZGradientPlan{box, tiles_of(box, args.g.N)};
  });
}

void dsconv_z_gradient(DType dtype, const ZGradientPlan& plan, const DsconvBackwardArgs& args, const TensorRef& du,
                       const TensorRef& sums_grad, void* partial, Stream stream) {
  with_types(dtype, args.forward.tf32, [&](auto element, auto products) {
    launch_z_gradient<decltype(element), decltype(products)::value>(plan, args, du, sums_grad, partial, stream);
  });
}

}  // namespace effops::cuda
