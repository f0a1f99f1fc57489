// Room se: y = x * gate(W2 act(W1 mean(x) + b1) + b2), forward and backward: which kernels run, in which order.
//
//   forward     x --sums over pixels--> lines --means, two products--> gates [N][C]            (se_pixels, se_excitation)
//               x ------------------------------------------------- * gates ------> y          (se_pixels)
//
//   backward    x, grad --sums of x and of x * grad, one read--> means, gates again; gradient at the gates
//               --the products backward--> gradients of weights and biases; `per pixel` [N][C]
//               grad * gates + per pixel -> grad_input
//
// Three passes over a map forward, four backward, whatever the layout; everything else is [N][C]. Bytes and
// rooflines: se_pixels.cu. Nothing here has run on a GPU.
#include "csrc/cuda/se.h"

#include "csrc/cuda/math.h"

namespace effops::cuda {
namespace {

GatedMaps maps_of(const SeForwardArgs& args) { return {args.N, args.C, args.H, args.W}; }

// Room for one kind of sums.
void* take_sums(DType dtype, const GatedMaps& maps, int lines, Scratch& scratch) {
  const std::size_t element = dtype == DType::f64 ? sizeof(double) : sizeof(float);
  return scratch.take(static_cast<std::size_t>(maps.N * lines * maps.C) * element);
}

void forward(DType dtype, const SeForwardArgs& args, Run& run) {
  const GatedMaps maps = maps_of(args);
  PixelSumsArgs sums{maps, args.input, {}};
  const int lines = pixel_sum_lines(dtype, sums, run.device);
  sums.sums = take_sums(dtype, maps, lines, run.scratch);
  const ExcitationValues values = excitation_values(dtype, maps, args.excitation, run.scratch);
  if (!run.launching) return;
  pixel_sums(dtype, sums, run.device, run.stream);
  excitation(dtype, maps, {sums.sums, lines}, args.excitation, values, run.stream);
  scale_pixels(dtype, {maps, args.input, args.output, values.gates, nullptr}, run.stream);
}

void backward(DType dtype, const SeBackwardArgs& args, Run& run) {
  const SeForwardArgs& forward = args.forward;
  const GatedMaps maps = maps_of(forward);
  PixelSumsArgs sums{maps, forward.input, args.grad_output};
  const int lines = pixel_sum_lines(dtype, sums, run.device);
  sums.sums = take_sums(dtype, maps, lines, run.scratch);
  sums.products = take_sums(dtype, maps, lines, run.scratch);
  ExcitationGradientArgs gradient{maps, {sums.products, lines}, forward.excitation, {}, args.grads};
  gradient.values = excitation_values(dtype, maps, forward.excitation, run.scratch);
  if (args.grad_input.data) gradient.per_pixel = take_sums(dtype, maps, 1, run.scratch);
  if (run.launching) {
    pixel_sums(dtype, sums, run.device, run.stream);
    excitation(dtype, maps, {sums.sums, lines}, forward.excitation, gradient.values, run.stream);
  }
  excitation_gradient(dtype, gradient, run);
  if (run.launching && args.grad_input.data) {
    scale_pixels(dtype, {maps, args.grad_output, args.grad_input, gradient.values.gates, gradient.per_pixel},
                 run.stream);
  }
}

}  // namespace

std::size_t se_fwd_scratch(DType dtype, const SeForwardArgs& args, const Device& device) {
  return count_scratch(device, [&](Run& run) { forward(dtype, args, run); });
}

void se_fwd(DType dtype, const SeForwardArgs& args, const Device& device, void* scratch, Stream stream) {
  Run run{device, Scratch(scratch), stream, true};
  forward(dtype, args, run);
}

std::size_t se_bwd_scratch(DType dtype, const SeBackwardArgs& args, const Device& device) {
  return count_scratch(device, [&](Run& run) { backward(dtype, args, run); });
}

void se_bwd(DType dtype, const SeBackwardArgs& args, const Device& device, void* scratch, Stream stream) {
  Run run{device, Scratch(scratch), stream, true};
  backward(dtype, args, run);
}

}  // namespace effops::cuda
