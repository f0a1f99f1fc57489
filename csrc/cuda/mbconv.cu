// Room mbconv: the calls that it is made of, and the scratch they share. Unverified on a device.
//
//   forward     x --one kernel--> y                                                          (mbconv_forward.cu)
//          or   x --expansion, window in one kernel--> z, sums over its pixels     (bsconv_forward.cu)
//               sums --gates--> z * gates, in place, of a squeeze-excite           (se.h)
//               z --projection--> y                                                (pointwise.h)
//
// The second way is a squeeze-excite's, whose gates depend on all of z. It is also the faster one
//   * for more than 128 output channels: a second tile of them would expand all channels once more, some 80
//     instructions an element of z against the four bytes that it takes to write and read it;
//   * for fewer boxes than processors (7 x 7 maps at batch 1): its blocks share the channels too.
// The expanded map is in memory in neither. Without an expansion z is dwconv's, and all of it room dsconv's where there
// is no squeeze-excite either.
//
//   backward    x --expansion--> e                                   computed again, into scratch
//               grad_output, e --dsconv_bwd--> grad_e                and all gradients behind the expansion
//               grad_e, x --pointwise_backward--> grad_x             and those of the expansion and its epilogue
//
//   with a squeeze-excite, between the first and the last line:
//               e --dwconv--> z --sums--> gates, z * gates
//               grad_output, z * gates --pointwise_backward--> g     and those of the projection and its epilogue
//               sums of g * z --se.h--> those of the gates' weights; g = g * gates + what comes by way of the means
//               g, e --dwconv_bwd--> grad_e                          and those of the window and its epilogue
//
//   scratch     forward   z | sums and values of the squeeze-excite | what one call at a time wants
//               backward  e | grad_e | z | z * gates | g | the same
//
// What nobody asked for is left out. Bytes a pixel of 16-bit maps at stride 1: forward with a squeeze-excite
// 2 (C + K + 4 D): z is written, read and written for the gates, and read by the projection. Backward without one
// 2 (3 C + 10 D + 2 K): e is written and read by the gradients of the projection, of its matrix and of the window, the
// gradient at the window's sums is written and twice read, grad_e too; more where epilogues are. float16,
// 24 -> 144 -> 24, 56 x 56, batch 128: 3120 bytes backward, 1.3 GB, 291 us on an H200 (4.3 TB/s). Calculated, nothing
// measured.
#include "csrc/cuda/expanded.h"
#include "csrc/cuda/math.h"
#include "csrc/cuda/pointwise.h"
#include "csrc/cuda/scratch.h"
#include "csrc/cuda/se.h"

namespace effops::cuda {
namespace {

bool any(const EpilogueGrads& grads) { return grads.bias || grads.scale || grads.shift || grads.residual.data; }
bool any(const ExcitationGrads& grads) {
  return grads.reduce_weight || grads.expand_weight || grads.reduce_bias || grads.expand_bias;
}

bool expands(const MbconvForwardArgs& args) { return args.expand.data != nullptr; }
bool excites(const MbconvForwardArgs& args) { return args.excitation.reduce_weight != nullptr; }

PointwiseForwardArgs projection_of(const MbconvForwardArgs& args, const TensorRef& z) {
  const DepthwiseGeometry& g = args.g;
  const MatrixRef& m = args.project;
  return {g.N, g.P, g.Q, {m.data, m.stride_out, m.stride_in, g.C, args.K, args.epilogue}, z, args.output};
}

// The sums of z over parts of an image's pixels, in scratch.
class PixelSums {
 public:
  PixelSums(DType dtype, const GatedMaps& maps, int lines, Run& run)
      : data_(run.scratch.take(static_cast<std::size_t>(maps.N * lines * maps.C) *
                               (dtype == DType::f64 ? sizeof(double) : sizeof(float)))),
        lines_(lines) {}
  void* data() const { return data_; }
  operator ImageSums() const { return {data_, lines_}; }

 private:
  void* data_;
  int lines_;
};

GatedMaps maps_of(const MbconvForwardArgs& args) { return {args.g.N, args.g.C, args.g.P, args.g.Q}; }

// Read from z.
PixelSums sums_of(DType dtype, const GatedMaps& maps, const TensorRef& z, Run& run) {
  PixelSumsArgs args{maps, z, {}};
  const PixelSums sums(dtype, maps, pixel_sum_lines(dtype, args, run.device), run);
  args.sums = sums.data();
  if (run.launching) pixel_sums(dtype, args, run.device, run.stream);
  return sums;
}

// A squeeze-excite of z, whose sums these are.
class Gates {
 public:
  Gates(DType dtype, const MbconvForwardArgs& args, const TensorRef& z, const ImageSums& sums, Run& run)
      : dtype_(dtype), excitation_(args.excitation), maps_(maps_of(args)), z_(z), run_(run) {
    values_ = excitation_values(dtype, maps_, excitation_, run.scratch);
    if (run.launching) excitation(dtype, maps_, sums, excitation_, values_, run.stream);
  }

  // z * gates, which may be z.
  void apply(const TensorRef& gated) const {
    if (run_.launching) scale_pixels(dtype_, {maps_, z_, gated, values_.gates, nullptr}, run_.stream);
  }

  // From the gradient of z * gates, in place, to that of z; `grads`: of weights and biases.
  void backward(const TensorRef& grad, const ExcitationGrads& grads, bool wants_z) const {
    PixelSumsArgs sums{maps_, z_, grad};
    const PixelSums products(dtype_, maps_, pixel_sum_lines(dtype_, sums, run_.device), run_);
    sums.products = products.data();
    ExcitationGradientArgs args{maps_, products, excitation_, values_, grads};
    if (wants_z) args.per_pixel = PixelSums(dtype_, maps_, 1, run_).data();
    if (run_.launching) pixel_sums(dtype_, sums, run_.device, run_.stream);
    excitation_gradient(dtype_, args, run_);
    if (run_.launching && wants_z) {
      scale_pixels(dtype_, {maps_, grad, grad, values_.gates, args.per_pixel}, run_.stream);
    }
  }

 private:
  const DType dtype_;
  const ExcitationRef& excitation_;
  const GatedMaps maps_;
  const TensorRef z_;
  Run& run_;
  ExcitationValues values_{};
};

BsconvForwardArgs before_projection(const MbconvForwardArgs& args, const TensorRef& z) {
  return {args.g, {}, expansion_of(args), args.input, z, args.dw_weight, args.dw_epilogue};
}

// The depthwise result, its epilogue behind it.
void depthwise_half(DType dtype, const MbconvForwardArgs& args, const TensorRef& z, Run& run) {
  if (!expands(args)) {
    if (!run.launching) return;
    dwconv_fwd(dtype, {args.g, args.input, z, args.dw_weight, args.dw_epilogue}, run.device, run.stream);
    return;
  }
  const BsconvForwardArgs half = before_projection(args, z);
  run.scratch.lend(bsconv_fwd_scratch(dtype, half, run.device), [&](void* scratch) {
    if (run.launching) bsconv_fwd(dtype, half, run.device, scratch, run.stream);
  });
}

// The same through the gates of a squeeze-excite; the sums that they are made from are the kernel's, where it can.
void gated_half(DType dtype, const MbconvForwardArgs& args, const TensorRef& z, Run& run) {
  const GatedMaps maps = maps_of(args);
  const BsconvForwardArgs half = before_projection(args, z);
  if (expands(args) && expands_on_chip(dtype, args.g, run.device)) {
    const PixelSums sums(dtype, maps, parts_of_image(dtype, args.g, run.device), run);
    if (run.launching) expanded_depthwise(dtype, half, sums.data(), run.device, run.stream);
    Gates(dtype, args, z, sums, run).apply(z);
    return;
  }
  depthwise_half(dtype, args, z, run);
  Gates(dtype, args, z, sums_of(dtype, maps, z, run), run).apply(z);
}

void forward(DType dtype, const MbconvForwardArgs& args, Run& run) {
  const DepthwiseGeometry& g = args.g;
  if (g.N == 0) return;
  if (!excites(args) && !expands(args)) {
    if (run.launching) dsconv_fwd(dtype, after_expansion(args), run.device, run.stream);
    return;
  }
  if (!excites(args) && pays_in_one_kernel(dtype, args, run.device)) {
    if (run.launching) expanded_separable(dtype, args, run.device, run.stream);
    return;
  }
  const TensorRef z = take_map(run, dtype, args.input, g.N, g.C, g.P, g.Q);
  if (excites(args)) {
    gated_half(dtype, args, z, run);
  } else {
    depthwise_half(dtype, args, z, run);
  }
  if (run.launching) pointwise_forward(dtype, projection_of(args, z), run.device, run.stream);
}

class Backward {
 public:
  Backward(DType dtype, const MbconvBackwardArgs& args, Run& run)
      : dtype_(dtype), args_(args), forward_(args.forward), g_(args.forward.g), run_(run) {
    to_expanded_ = args.grad_input.data || args.grad_expand_weight || any(args.expand_grads);
    to_hidden_ = to_expanded_ || args.grad_dw_weight || any(args.dw_grads);
  }

  void operator()() {
    const bool to_gates = any(args_.excitation_grads);
    if (!to_hidden_ && !to_gates && !args_.grad_project_weight && !any(args_.grads)) return;
    const TensorRef expanded = expands(forward_) ? expand() : forward_.input;
    TensorRef grad_expanded = args_.grad_input;
    if (expands(forward_)) grad_expanded = to_expanded_ ? map(g_.C, g_.H, g_.W) : TensorRef{};
    if (excites(forward_)) {
      through_gates(expanded, grad_expanded, to_gates);
    } else {
      separable(expanded, grad_expanded);
    }
    if (!expands(forward_) || !to_expanded_) return;
    const TensorRef saved = tells_derivative(forward_.expand_epilogue) ? expanded : TensorRef{};
    pointwise({{g_.N, g_.H, g_.W, expansion_of(forward_), forward_.input, saved},
               grad_expanded,
               args_.grad_input,
               args_.grad_expand_weight,
               args_.expand_grads});
  }

 private:
  // In scratch.
  TensorRef map(index_t channels, index_t height, index_t width) {
    return take_map(run_, dtype_, forward_.input, g_.N, channels, height, width);
  }

  TensorRef expand() {
    const TensorRef expanded = map(g_.C, g_.H, g_.W);
    const PointwiseForwardArgs args{g_.N, g_.H, g_.W, expansion_of(forward_), forward_.input, expanded};
    if (run_.launching) pointwise_forward(dtype_, args, run_.device, run_.stream);
    return expanded;
  }

  // What follows the expansion, without a squeeze-excite.
  void separable(const TensorRef& expanded, const TensorRef& grad_expanded) const {
    DsconvBackwardArgs args{};
    args.forward = after_expansion(forward_);
    args.forward.input = expanded;
    args.grad_output = args_.grad_output;
    args.grad_input = grad_expanded;
    args.grad_dw_weight = args_.grad_dw_weight;
    args.grad_pw_weight = args_.grad_project_weight;
    args.dw_grads = args_.dw_grads;
    args.pw_grads = args_.grads;
    run_.scratch.lend(dsconv_bwd_scratch(dtype_, args, run_.device), [&](void* scratch) {
      if (run_.launching) dsconv_bwd(dtype_, args, run_.device, scratch, run_.stream);
    });
  }

  // The same with one.
  void through_gates(const TensorRef& expanded, const TensorRef& grad_expanded, bool to_gates) {
    const TensorRef z = map(g_.C, g_.P, g_.Q), gated = map(g_.C, g_.P, g_.Q);
    const DwconvForwardArgs depthwise{g_, expanded, z, forward_.dw_weight, forward_.dw_epilogue};
    if (run_.launching) dwconv_fwd(dtype_, depthwise, run_.device, run_.stream);
    const Gates gates(dtype_, forward_, z, sums_of(dtype_, maps_of(forward_), z, run_), run_);
    gates.apply(gated);
    const TensorRef grad = to_hidden_ || to_gates ? map(g_.C, g_.P, g_.Q) : TensorRef{};
    PointwiseBackwardArgs projection{projection_of(forward_, gated), args_.grad_output, grad, args_.grad_project_weight,
                                     args_.grads};
    projection.forward.output = {};
    pointwise(projection);
    if (!grad.data) return;
    gates.backward(grad, args_.excitation_grads, to_hidden_);
    if (!to_hidden_) return;
    const DwconvBackwardArgs args{g_,
                                  grad,
                                  {},
                                  expanded,
                                  forward_.dw_weight,
                                  forward_.dw_epilogue,
                                  grad_expanded,
                                  args_.grad_dw_weight,
                                  args_.dw_grads};
    run_.scratch.lend(dwconv_bwd_scratch(dtype_, args, run_.device), [&](void* scratch) {
      if (run_.launching) dwconv_bwd(dtype_, args, run_.device, scratch, run_.stream);
    });
  }

  void pointwise(const PointwiseBackwardArgs& args) const {
    run_.scratch.lend(pointwise_backward_scratch(dtype_, args, run_.device), [&](void* scratch) {
      if (run_.launching) pointwise_backward(dtype_, args, run_.device, scratch, run_.stream);
    });
  }

  const DType dtype_;
  const MbconvBackwardArgs& args_;
  const MbconvForwardArgs& forward_;
  const DepthwiseGeometry& g_;
  Run& run_;
  bool to_expanded_, to_hidden_;  // whether a gradient is asked for that comes by way of the map's
};

}  // namespace

std::size_t mbconv_fwd_scratch(DType dtype, const MbconvForwardArgs& args, const Device& device) {
  return count_scratch(device, [&](Run& run) { forward(dtype, args, run); });
}

void mbconv_fwd(DType dtype, const MbconvForwardArgs& args, const Device& device, void* scratch, Stream stream) {
  Run run{device, Scratch(scratch), stream, true};
  forward(dtype, args, run);
}

std::size_t mbconv_bwd_scratch(DType dtype, const MbconvBackwardArgs& args, const Device& device) {
  return count_scratch(device, [&](Run& run) { Backward(dtype, args, run)(); });
}

void mbconv_bwd(DType dtype, const MbconvBackwardArgs& args, const Device& device, void* scratch, Stream stream) {
  Run run{device, Scratch(scratch), stream, true};
  Backward(dtype, args, run)();
}

}  // namespace effops::cuda
