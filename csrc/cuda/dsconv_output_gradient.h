// What the kernels of dsconv's output gradient do with a tile of pointwise sums, whichever windows z came from.
#pragma once

#include "csrc/cuda/dsconv_epilogue.h"
#include "csrc/cuda/dsconv_gradients.h"
#include "csrc/cuda/sum.h"

namespace effops::cuda {

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

// All that an output gradient's block of N channels does: compute_sums(tables, origin, k, product) where they are
// needed.
template <int N, class Product, class T, class ComputeSums>
EFFOPS_DEVICE void run_output_gradient(const OutputGradient<T>& a, const ComputeSums& compute_sums) {
  using C = compute<T>;
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
    compute_sums(tables, origin, k, product);
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
constexpr int kNarrowestGradient = sizeof(T) == 8 ? 32 : 64;
template <class T>
constexpr int kWidestGradient = sizeof(T) == 2 ? 128 : kNarrowestGradient<T>;

// For windows of `g`, which may span those of several parts.
template <class T>
OutputGradientPlan plan_output_tiles(const DsconvForwardArgs& args, const Sizes& g, const Device& device) {
  OutputGradientPlan plan;
  with_width<kNarrowestGradient<T>, kWidestGradient<T>>(
      args.K, ceil_div<index_t>(pixels_of(args.g), kSlots), device, [&](auto width) {
        const std::size_t lines = kThreads / (width / kVector<T>)*kAffine * width * sizeof(compute<T>);
        plan.tile = pointwise_tile<T>(g, args.g.N, device, width, lines);
      });
  plan.lines = tiles_of(plan.tile.box, args.g.N);
  return plan;
}

// f(columns of the plan's tiles as a constant)
template <class T, class F>
void with_gradient_width(const OutputGradientPlan& plan, const F& f) {
  if constexpr (kNarrowestGradient<T> < kWidestGradient<T>) {
    if (plan.tile.columns == kWidestGradient<T>) return f(std::integral_constant<int, kWidestGradient<T>>{});
  }
  f(std::integral_constant<int, kNarrowestGradient<T>>{});
}

// What the kernel is launched with: its parameters and its shape, for a layer whose windows are those of the plan.
template <class T>
Shape fill_output_gradient(const OutputGradientPlan& plan, const DsconvBackwardArgs& args, const Layer<T>& layer,
                           const TensorRef& du, void* partial, OutputGradient<T>& a) {
  using C = compute<T>;
  const DsconvForwardArgs& forward = args.forward;
  const EpilogueRef& e = forward.pw_epilogue;
  const int columns = plan.tile.columns;
  a.layer = layer;
  const int shared = carve_pointwise<T>(plan.tile, layer.g, a.at);
  a.lines = a.at.stages + static_cast<int>(kSlots * (columns + 8) * sizeof(C));
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
  a.partial = {static_cast<C*>(partial), layer.K};
  return grid_of(plan.lines * ceil_div<index_t>(forward.K, columns), kThreads, shared);
}

}  // namespace effops::cuda
