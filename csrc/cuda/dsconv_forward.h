// What dsconv's forward kernels do with a tile of pointwise sums, whichever windows z came from.
#pragma once

#include "csrc/cuda/dsconv_pointwise.h"

namespace effops::cuda {

// Where a forward kernel's tile of sums goes.
template <class T>
struct Output {
  Map<T> y;  // K channels
  EpilogueRef epilogue;
  Meeting meeting;
};

template <class T>
Output<T> output_of(const DsconvForwardArgs& args) {
  const TensorRef y = from_channel<T>(args.output, args.keep);
  return {map_of<T>(y), args.pw_epilogue, meeting_of<T>(args.K, {y, args.pw_epilogue.residual})};
}

// affine: the epilogue's vectors for the output channels from `first` on.
template <int V, int N, class T>
EFFOPS_DEVICE void write_output(const Layer<T>& layer, const Output<T>& output, const compute<T>* affine,
                                const Tables& tables, const Origin& origin, int first, const compute<T>* tile,
                                int pitch) {
  using C = compute<T>;
  const TensorRef& ref = output.epilogue.residual;
  const Map<const T> residual{static_cast<const T*>(ref.data), ref.n, ref.c, ref.h, ref.w};
  walk_tile<V, N>(output.meeting.by_pixel, [&](int slot, int column) {
    const Pixel pixel = pixel_of(layer, tables, origin, slot);
    const int k = first + column;
    if (!pixel.inside || k >= layer.K) return;
    C v[V];
    load_channels<V>(tile + slot * pitch + column, v);
    finish_sums<V>(output.epilogue, affine + column, N, v, [&](C(&sum)[V]) {
      C added[V];
      load_channels<V>(residual.at(pixel.n, k, pixel.p, pixel.q), added);
      EFFOPS_UNROLL
      for (int j = 0; j < V; ++j) sum[j] += added[j];
    });
    store_channels<V>(output.y.at(pixel.n, k, pixel.p, pixel.q), v);
  });
}

// The product becomes a tile in the place of the stages, and the tile the output from channel `first` on.
template <int N, class T, class Product>
EFFOPS_DEVICE void write_product(const Layer<T>& layer, const Output<T>& output, const PointwiseAt& at,
                                 const Tables& tables, const Origin& origin, int first, const Product& product) {
  using C = compute<T>;
  C* tile = shared_at<C>(at.stages);
  const C* affine = shared_at<C>(at.affine);
  const int pitch = tile_pitch(N, output.meeting.by_pixel);
  product.store(tile, pitch);
  barrier();
  if (output.meeting.vector) {
    write_output<kVector<T>, N>(layer, output, affine, tables, origin, first, tile, pitch);
  } else {
    write_output<1, N>(layer, output, affine, tables, origin, first, tile, pitch);
  }
}

// The widest tiles: 64 x 256 sums are 64 registers of a thread; float and double have a fourth of a warp's products.
template <class T>
constexpr int kWidestOutput = sizeof(T) == 8 ? 64 : 128;

// f(columns of the forward kernels' tiles as a constant)
template <class T, class F>
void with_output_width(const DsconvForwardArgs& args, const Device& device, const F& f) {
  with_width<32, kWidestOutput<T>>(args.K, ceil_div<index_t>(pixels_of(args.g), kSlots), device, f);
}

}  // namespace effops::cuda
