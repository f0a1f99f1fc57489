// Room dsconv, backward: the gradient at the pointwise sums, du, from the output's. Unverified on a device.
//
//   a block    the forward's box of 64 pixels x up to 128 output channels. Where the epilogue's gradient depends on the
//              sums they are computed as forward (dsconv_pointwise.h), not where the saved output tells it
//
//      g, saved output or residual  --8 or 16 bytes a thread-->  epilogue backwards, in registers  -->  du, residual's
//      tile of sums in shared memory  ------------------------>                                          gradient
//                                                     sums over the box's pixels  -->  a line of partial results
//
// Each element of g, of the saved output and of the residual is loaded once, du stored once; for the sums x and the
// passed channels as forward. Bytes a pixel of 16-bit maps: 2 (3 K) with the saved output, 2 (C + passed + 2 K)
// without.
//
// Calculated for float16, channels_last, batch 128, 56 x 56 on an H200 (4.3 TB/s), nothing measured:
//   128 -> 128 channels   768 bytes a pixel either way: 308 MB, 72 us. The sums anew issue as the forward's, 95 us.
//   28 + 28 -> 28         168 bytes a pixel with the saved output, 67 MB, 16 us; 224 without, 90 MB, 21 us, where
//                         instructions take the forward's 30 us.
#include "csrc/cuda/dsconv_epilogue.h"
#include "csrc/cuda/dsconv_gradients.h"
#include "csrc/cuda/sum.h"

namespace effops::cuda {
namespace {

template <class T>
struct OutputGradient {
  Layer<T> layer;
  PointwiseAt at;
  int lines;  // in the stages, behind the tile
  EpilogueRef epilogue;
  Meeting meeting;
  bool recompute;            // the sums themselves
  Map<const T> grad, saved;  // saved: the output, where it tells the derivative
  Map<T> du, residual_grad;
  Partial<compute<T>> partial;
};

template <int V, int N, class T>
EFFOPS_DEVICE void write_output_gradient(const OutputGradient<T>& a, const Tables& tables, const Origin& origin,
                                         int tile_index, int first, const compute<T>* tile, int pitch) {
  using C = compute<T>;
  const C* bias = shared_at<C>(a.at.affine);
  const EpilogueBackward<V, T> backward{a.epilogue, a.residual_grad};
  walk_and_sum<V, N>(a.meeting.by_pixel, shared_at<C>(a.lines), a.partial, tile_index, first,
                     [&](int slot, int column, C(&terms)[kAffine][V]) {
                       const Pixel pixel = pixel_of(a.layer, tables, origin, slot);
                       const int k = first + column;
                       if (!pixel.inside || k >= a.layer.K) return;
                       C g[V], u[V] = {};
                       load_channels<V>(a.grad.at(pixel.n, k, pixel.p, pixel.q), g);
                       if (a.saved.data != nullptr) {
                         load_channels<V>(a.saved.at(pixel.n, k, pixel.p, pixel.q), u);
                         epilogue_gradient_from_output<T>(a.epilogue, u, g);
                         EFFOPS_UNROLL
                         for (int j = 0; j < V; ++j) terms[0][j] = g[j];
                       } else {
                         if (a.recompute) {
                           EFFOPS_UNROLL
                           for (int j = 0; j < V; ++j) u[j] = tile[slot * pitch + column + j] + bias[column + j];
                         }
                         backward.run(pixel, k, u, g, terms);
                       }
                       if (a.du.data != nullptr) store_channels<V>(a.du.at(pixel.n, k, pixel.p, pixel.q), g);
                     });
}

template <class T, bool TF32, int N>
EFFOPS_KERNEL(kThreads, kBlocks<T>)
dsconv_output_gradient_kernel(EFFOPS_PARAMS OutputGradient<T> a) {
  using C = compute<T>;
  using Product = BlockProduct<T, TF32, kSlots, N>;
  const int k_blocks = ceil_div(a.layer.K, N), k = static_cast<int>(blockIdx.x) % k_blocks * N;
  const int tile_index = static_cast<int>(blockIdx.x) / k_blocks;
  const Origin origin = origin_of(a.layer.box, tile_index);
  const Tables tables = tables_of(a.at.tables, shared_at<index_t>(a.at.tables.patch_at));
  number_slots(a.layer.box, a.layer.g, tables);
  if (a.recompute) locate_patch(a.layer, origin, tables.patch_at);
  copy_affine<T>(a.epilogue, k, a.layer.K, N, shared_at<C>(a.at.affine));
  barrier();
  C* tile = shared_at<C>(a.at.stages);
  const int pitch = tile_pitch(N, a.meeting.by_pixel);
  if (a.recompute) {
    Product product;
    PointwiseSums<T, N, Product>(a.layer, a.at, tables, origin, k).run(nullptr, product);
    product.store(tile, pitch);
    barrier();
  }
  if (a.meeting.vector) {
    write_output_gradient<kVector<T>, N>(a, tables, origin, tile_index, k, tile, pitch);
  } else {
    write_output_gradient<1, N>(a, tables, origin, tile_index, k, tile, pitch);
  }
}

// ---- host ----

// Columns of the tiles of sums.
template <class T>
constexpr int kNarrowest = sizeof(T) == 8 ? 32 : 64;
template <class T>
constexpr int kWidest = sizeof(T) == 2 ? 128 : kNarrowest<T>;

template <class T>
std::size_t lines_bytes(int columns) {
  return kThreads / (columns / kVector<T>)*kAffine * columns * sizeof(compute<T>);
}

template <class T, bool TF32, int N>
void launch_output_gradient(const OutputGradientPlan& plan, const DsconvBackwardArgs& args, const TensorRef& du,
                            void* partial, Stream stream) {
  using C = compute<T>;
  const DsconvForwardArgs& forward = args.forward;
  const EpilogueRef& e = forward.pw_epilogue;
  OutputGradient<T> a{};
  a.layer = layer_of<T>(forward, plan.tile.box);
  const int shared = carve_pointwise<T>(plan.tile, a.layer.g, a.at);
  a.lines = a.at.stages + static_cast<int>(kSlots * (N + 8) * sizeof(C));
  a.epilogue = e;
  const TensorRef grad = pointwise_gradient<T>(args), saved = from_channel<T>(forward.output, forward.keep);
  const TensorRef residual = e.post == Activation::none ? TensorRef{} : e.residual;
  a.meeting = meeting_of<T>(forward.K, {grad, saved, residual, du, args.pw_grads.residual});
  const bool linear = e.activation == Activation::none && e.post == Activation::none;
  a.recompute = args.pw_grads.scale || !(linear || forward.output.data);
  a.grad = map_of<const T>(grad);
  a.saved = map_of<const T>(saved);
  a.du = map_of<T>(du);
  a.residual_grad = map_of<T>(args.pw_grads.residual);
  a.partial = {static_cast<C*>(partial), a.layer.K};
  const Shape shape = grid_of(plan.lines * ceil_div<index_t>(forward.K, N), kThreads, shared);
  launch(dsconv_output_gradient_kernel<T, TF32, N>, shape, stream, a);
}

}  // namespace

OutputGradientPlan plan_output_gradient(DType dtype, const DsconvForwardArgs& args, const Device& device) {
  return with_types(dtype, false, [&](auto element, auto) {
    using T = decltype(element);
    const Sizes g = sizes_of(args.g);
    OutputGradientPlan plan;
    with_width<kNarrowest<T>, kWidest<T>>(
        args.K, ceil_div<index_t>(pixels_of(args.g), kSlots), device,
        [&](auto width) { plan.tile = pointwise_tile<T>(g, args.g.N, device, width, lines_bytes<T>(width)); });
    plan.lines = tiles_of(plan.tile.box, args.g.N);
    return plan;
  });
}

void dsconv_output_gradient(DType dtype, const OutputGradientPlan& plan, const DsconvBackwardArgs& args,
                            const TensorRef& du, void* partial, Stream stream) {
  with_types(dtype, args.forward.tf32, [&](auto element, auto products) {
    using T = decltype(element);
    constexpr bool kTf32 = decltype(products)::value;
    if constexpr (kNarrowest<T> < kWidest<T>) {
      if (plan.tile.columns == kWidest<T>) {
        launch_output_gradient<T, kTf32, kWidest<T>>(plan, args, du, partial, stream);
        return;
      }
    }
    launch_output_gradient<T, kTf32, kNarrowest<T>>(plan, args, du, partial, stream);
  });
}

}  // namespace effops::cuda
