// What dsconv's forward kernels do with a tile of pointwise sums, whichever windows z came from.
#pragma once

#include "csrc/cuda/dsconv_pointwise.h"

namespace effops::cuda {

// The product becomes a tile in the place of the stages, and the tile the output from channel `first` on.
template <int N, class T, class Product>
EFFOPS_DEVICE void write_product(const Layer<T>& layer, const Output<T>& output, const PointwiseAt& at,
                                 const Tables& tables, const Origin& origin, int first, const Product& product) {
  using C = compute<T>;
  C* tile = shared_at<C>(at.stages);
  product.store(tile, tile_pitch(N, output.meeting.by_pixel));
  barrier();
  write_output<N>(layer, output, tables, origin, first, shared_at<C>(at.affine), tile);
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
