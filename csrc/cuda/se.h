// The steps of a squeeze-excite, as se_fwd and se_bwd launch them, and mbconv. Like kernels.h: everything on the stream,
// nothing allocated. Values that are [N][C] or [N][between] are of the compute type, without gaps.
#pragma once

#include "csrc/cuda/scratch.h"

namespace effops::cuda {

// The maps whose channels are gated.
struct GatedMaps {
  index_t N, C, H, W;
  index_t pixels() const { return H * W; }
};

// Sums over parts of an image's pixels, [N][lines][C]: whoever reads them adds the lines, in their order.
struct ImageSums {
  const void* data;
  int lines;
};

// ---- se.cu ----

// The sums of x and of x * factor over the pixels of each image; those whose pointer is null are not wanted.
struct PixelSumsArgs {
  GatedMaps maps;
  TensorRef x, factor;
  void *sums = nullptr, *products = nullptr;  // [N][lines][C]
};
// The lines of either; pointers to sums need not be set.
int pixel_sum_lines(DType dtype, const PixelSumsArgs& args, const Device& device);
void pixel_sums(DType dtype, const PixelSumsArgs& args, const Device& device, Stream stream);

// y = x * factors + offsets, both [N][C]; offsets may be null, y may be x.
struct ScalePixelsArgs {
  GatedMaps maps;
  TensorRef x, y;
  const void *factors, *offsets;
};
void scale_pixels(DType dtype, const ScalePixelsArgs& args, Stream stream);

// ---- se_excitation.cu ----

// What the products make of a batch: means [N][C] -> inner [N][between] -> activation -> hidden -> outer [N][C] -> gate
// -> gates.
struct ExcitationValues {
  void *means, *inner, *hidden, *outer, *gates;
};
ExcitationValues excitation_values(DType dtype, const GatedMaps& maps, const ExcitationRef& excitation,
                                   Scratch& scratch);

// All of the values from the sums of the maps' pixels.
void excitation(DType dtype, const GatedMaps& maps, const ImageSums& sums, const ExcitationRef& excitation,
                const ExcitationValues& values, Stream stream);

// From d loss / d gates, as sums over parts of an image, and the values: `per_pixel` [N][C], what each pixel's gradient
// gets by way of the means (null: not wanted), and the gradients of weights and biases.
struct ExcitationGradientArgs {
  GatedMaps maps;
  ImageSums grad_gates;
  ExcitationRef excitation;
  ExcitationValues values;
  ExcitationGrads grads;
  void* per_pixel = nullptr;
};
void excitation_gradient(DType dtype, const ExcitationGradientArgs& args, Run& run);

}  // namespace effops::cuda
