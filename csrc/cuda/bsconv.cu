// Room bsconv: the calls that it is made of, and the scratch they share. Unverified on a device.
//
//   forward     x [--mid--> m] --pw, epilogue, window, epilogue in one kernel--> y          (bsconv_forward.cu)
//
// m, of BSConv-S, has a fourth of y's channels, say, and goes through memory, by pointwise.h's kernel. So does what
// stands before the window where no shared memory has room for the patch under one pixel (dilations of 20 and more).
//
//   backward    x [--mid--> m] --pw--> e                          computed again, into scratch (pointwise.h)
//               grad_output, e --dwconv_bwd--> grad_e             and the gradients of the window and its epilogue
//               grad_e, m --pointwise_backward--> grad_m          and those of pw and its epilogue
//               grad_m, x --pointwise_backward--> grad_x          and those of mid
//
//   scratch     m | e | grad_e | grad_m | what one call at a time wants
//
// What nobody asked for is left out. e and grad_e are maps of K channels at the input's resolution that live as long as
// the call; eager keeps e, and what each part of the epilogue makes of it, from forward to backward.
//
// Bytes a pixel of 16-bit maps, backward without m, all gradients, linear epilogues: e written and read, grad_e written
// and twice read, grad_output twice, x read twice and grad_x written: 2 (7 K + 3 C). float16, 128 -> 128, 56 x 56,
// batch 128: 2560 bytes, 1 GB, 239 us on an H200 (4.3 TB/s); the kernels' own bounds stand at them. Calculated, nothing
// measured.
#include "csrc/cuda/expanded.h"
#include "csrc/cuda/math.h"
#include "csrc/cuda/pointwise.h"
#include "csrc/cuda/scratch.h"

namespace effops::cuda {
namespace {

bool any(const EpilogueGrads& grads) { return grads.bias || grads.scale || grads.shift || grads.residual.data; }

void forward(DType dtype, const BsconvForwardArgs& args, Run& run) {
  const DepthwiseGeometry& g = args.g;
  if (g.N == 0) return;
  const auto to_scratch = [&](const PointwiseRef& pw, const TensorRef& input) {
    const TensorRef output = take_map(run, dtype, input, g.N, pw.outputs, g.H, g.W);
    if (run.launching) pointwise_forward(dtype, {g.N, g.H, g.W, pw, input, output}, run.device, run.stream);
    return output;
  };
  BsconvForwardArgs rest = args;
  if (args.mid.outputs > 0) rest.input = to_scratch(args.mid, args.input);
  if (expands_on_chip(dtype, g, run.device)) {
    if (run.launching) expanded_depthwise(dtype, rest, nullptr, run.device, run.stream);
    return;
  }
  const TensorRef expanded = to_scratch(args.pw, rest.input);
  if (!run.launching) return;
  dwconv_fwd(dtype, {g, expanded, args.output, args.dw_weight, args.epilogue}, run.device, run.stream);
}

class Backward {
 public:
  Backward(DType dtype, const BsconvBackwardArgs& args, Run& run)
      : dtype_(dtype), args_(args), forward_(args.forward), g_(args.forward.g), run_(run) {}

  void operator()() {
    const bool has_mid = forward_.mid.outputs > 0;
    const bool to_input = has_mid ? args_.grad_input.data || args_.grad_mid_weight || any(args_.mid_grads)
                                  : args_.grad_input.data != nullptr;
    const bool to_expanded = to_input || args_.grad_pw_weight || any(args_.pw_grads);
    const bool needs_expanded =
        args_.grad_dw_weight || (!forward_.output.data && needs_sums(forward_.epilogue, args_.grads));
    TensorRef input = forward_.input;
    if (has_mid) {
      input = map(forward_.mid.outputs);
      if (to_expanded || needs_expanded) pointwise(forward_.mid, forward_.input, input);
    }
    const TensorRef expanded = map(g_.C);
    if (needs_expanded) pointwise(forward_.pw, input, expanded);
    const TensorRef grad_expanded = to_expanded ? map(g_.C) : TensorRef{};
    depthwise(expanded, grad_expanded);
    if (!to_expanded) return;
    const TensorRef grad_input = !has_mid ? args_.grad_input : to_input ? map(forward_.mid.outputs) : TensorRef{};
    const bool saved = needs_expanded && tells_derivative(forward_.pw.epilogue);
    pointwise_gradients({{g_.N, g_.H, g_.W, forward_.pw, input, saved ? expanded : TensorRef{}},
                         grad_expanded,
                         grad_input,
                         args_.grad_pw_weight,
                         args_.pw_grads});
    if (!has_mid || !to_input) return;
    pointwise_gradients({{g_.N, g_.H, g_.W, forward_.mid, forward_.input, {}},
                         grad_input,
                         args_.grad_input,
                         args_.grad_mid_weight,
                         args_.mid_grads});
  }

 private:
  // In scratch, at the input's resolution.
  TensorRef map(index_t channels) { return take_map(run_, dtype_, forward_.input, g_.N, channels, g_.H, g_.W); }

  void pointwise(const PointwiseRef& pw, const TensorRef& input, const TensorRef& output) const {
    if (run_.launching) pointwise_forward(dtype_, {g_.N, g_.H, g_.W, pw, input, output}, run_.device, run_.stream);
  }

  void depthwise(const TensorRef& expanded, const TensorRef& grad_expanded) const {
    const DwconvBackwardArgs args{g_,
                                  args_.grad_output,
                                  forward_.output,
                                  expanded,
                                  forward_.dw_weight,
                                  forward_.epilogue,
                                  grad_expanded,
                                  args_.grad_dw_weight,
                                  args_.grads};
    run_.scratch.lend(dwconv_bwd_scratch(dtype_, args, run_.device), [&](void* scratch) {
      if (run_.launching) dwconv_bwd(dtype_, args, run_.device, scratch, run_.stream);
    });
  }

  void pointwise_gradients(const PointwiseBackwardArgs& args) const {
    run_.scratch.lend(pointwise_backward_scratch(dtype_, args, run_.device), [&](void* scratch) {
      if (run_.launching) pointwise_backward(dtype_, args, run_.device, scratch, run_.stream);
    });
  }

  const DType dtype_;
  const BsconvBackwardArgs& args_;
  const BsconvForwardArgs& forward_;
  const DepthwiseGeometry& g_;
  Run& run_;
};

}  // namespace

std::size_t bsconv_fwd_scratch(DType dtype, const BsconvForwardArgs& args, const Device& device) {
  return count_scratch(device, [&](Run& run) { forward(dtype, args, run); });
}

void bsconv_fwd(DType dtype, const BsconvForwardArgs& args, const Device& device, void* scratch, Stream stream) {
  Run run{device, Scratch(scratch), stream, true};
  forward(dtype, args, run);
}

std::size_t bsconv_bwd_scratch(DType dtype, const BsconvBackwardArgs& args, const Device& device) {
  return count_scratch(device, [&](Run& run) { Backward(dtype, args, run)(); });
}

void bsconv_bwd(DType dtype, const BsconvBackwardArgs& args, const Device& device, void* scratch, Stream stream) {
  Run run{device, Scratch(scratch), stream, true};
  Backward(dtype, args, run)();
}

}  // namespace effops::cuda
