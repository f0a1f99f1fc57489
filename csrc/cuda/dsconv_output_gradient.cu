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
#include "csrc/cuda/dsconv_output_gradient.h"

namespace effops::cuda {
namespace {

template <class T, bool TF32, int N>
EFFOPS_KERNEL(kThreads, kBlocks<T>)
dsconv_output_gradient_kernel(EFFOPS_PARAMS OutputGradient<T> a) {
  using Product = BlockProduct<T, TF32, kSlots, N>;
  run_output_gradient<N, Product>(a, [&](const Tables& tables, const Origin& origin, int k, Product& product) {
    PointwiseSums<T, N, Product>(a.layer, a.at, tables, origin, k).run(nullptr, product);
  });
}

}  // namespace

OutputGradientPlan plan_output_gradient(DType dtype, const DsconvForwardArgs& args, const Device& device) {
  return with_types(dtype, false, [&](auto element, auto) {
    return plan_output_tiles<decltype(element)>(args, sizes_of(args.g), device);
  });
}

void dsconv_output_gradient(DType dtype, const OutputGradientPlan& plan, const DsconvBackwardArgs& args,
                            const TensorRef& du, void* partial, Stream stream) {
  with_types(dtype, args.forward.tf32, [&](auto element, auto products) {
    using T = decltype(element);
    constexpr bool kTf32 = decltype(products)::value;
    OutputGradient<T> a{};
    const Layer<T> layer = layer_of<T>(args.forward, plan.tile.box);
    const Shape shape = fill_output_gradient<T>(plan, args, layer, du, partial, a);
    with_gradient_width<T>(
        plan, [&](auto width) { launch(dsconv_output_gradient_kernel<T, kTf32, width>, shape, stream, a); });
  });
}

}  // namespace effops::cuda
