// Room dsconv, backward, several depthwise windows side by side: the gradient at the pointwise sums, as
// dsconv_output_gradient.cu computes it; where the sums are computed anew they are those of dsconv_parts.h. Unverified
// on a device.
//
// Bytes a pixel of 16-bit maps: 2 (3 K) with the saved output, 2 (C + 2 K) without. Calculated for float16,
// channels_last, batch 128, 56 x 56, 64 -> 64 channels on an H200 (4.3 TB/s), nothing measured: 384 bytes a pixel either
// way, 154 MB, 36 us; the sums anew issue as the forward's.
#include "csrc/cuda/dsconv_output_gradient.h"
#include "csrc/cuda/dsconv_parts.h"

namespace effops::cuda {
namespace {

template <class T>
struct PartsOutputGradient {
  OutputGradient<T> own;  // its layer spans all parts
  Parts<T> parts;
};

template <class T, int N>
EFFOPS_KERNEL(kThreads, kBlocks<T>)
dsconv_parts_output_gradient_kernel(EFFOPS_PARAMS PartsOutputGradient<T> a) {
  using Product = BlockProduct<T, false, kSlots, N>;
  run_output_gradient<N, Product>(a.own, [&](const Tables& tables, const Origin& origin, int k, Product& product) {
    PartsSums<T, N, Product>(a.parts, a.own.at, tables, origin, k).run(product);
  });
}

}  // namespace

OutputGradientPlan plan_parts_output_gradient(DType dtype, const DsconvForwardArgs& args, const Device& device) {
  return with_types(dtype, false, [&](auto element, auto) {
    return plan_output_tiles<decltype(element)>(args, sizes_of(spanning_window(args)), device);
  });
}

void dsconv_parts_output_gradient(DType dtype, const OutputGradientPlan& plan, const DsconvBackwardArgs& args,
                                  const TensorRef& du, void* partial, Stream stream) {
  with_types(dtype, false, [&](auto element, auto) {
    using T = decltype(element);
    PartsOutputGradient<T> a{};
    a.parts = parts_of<T>(args.forward, plan.tile.box);
    const Layer<T> layer = spanning_layer<T>(args.forward, plan.tile.box);
    const Shape shape = fill_output_gradient<T>(plan, args, layer, du, partial, a.own);
    with_gradient_width<T>(
        plan, [&](auto width) { launch(dsconv_parts_output_gradient_kernel<T, width>, shape, stream, a); });
  });
}

}  // namespace effops::cuda
