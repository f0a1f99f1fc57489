// Room dsconv, backward, several depthwise windows side by side: which kernels run, in which order, and the scratch they
// share.
//
//   output gradient    du from the output's gradient                        dsconv_parts_output_gradient.cu
//   for each part, a layer of its own (dsconv_parts.h):
//     z's gradient     at its depthwise sums                                dsconv_z_gradient.cu
//     matrix's         its columns                                          dsconv_matrix_gradient.cu
//     taps'            that of room dwconv, on the gradient at its sums     dwconv.h
//   sums over pixels   of bias, scale, shift and the matrix                 sum.h
//   input's            MixConv: room dwconv's, each part into its channels; Multiception: one kernel that adds the
//                      parts up, dsconv_parts_input_gradient.cu
//
//   scratch    du | each part's gradient at its sums | lines of the pointwise vectors | what one part after the other
//              uses: lines of its vectors, of its columns of the matrix, what its taps' gradient wants
#include <algorithm>
#include <vector>

#include "csrc/cuda/dsconv_gradients.h"
#include "csrc/cuda/dsconv_parts.h"
#include "csrc/cuda/dwconv.h"
#include "csrc/cuda/sum.h"

namespace effops::cuda {
namespace {

// Places in scratch; to learn how many bytes it has, any aligned address will do.
class Taken {
 public:
  static constexpr std::size_t kAlignment = 256;
  explicit Taken(void* data) : base_(static_cast<char*>(data)) {}
  void* take(std::size_t bytes) {
    char* at = base_ + used_;
    used_ += ceil_div(bytes, kAlignment) * kAlignment;
    most_ = std::max(most_, used_);
    return at;
  }
  std::size_t used() const { return used_; }
  void back_to(std::size_t used) { used_ = used; }
  std::size_t most() const { return most_; }

 private:
  char* base_;
  std::size_t used_ = 0, most_ = 0;
};

bool vectors(const EpilogueGrads& grads) { return grads.bias || grads.scale || grads.shift; }

void* gradient_from(void* vector, DType dtype, DType of_maps, std::size_t element, index_t channel) {
  if (vector == nullptr) return nullptr;
  return static_cast<char*>(vector) + channel * static_cast<index_t>(dtype == of_maps ? element : sizeof(float));
}

// Counts its scratch where `launching` is false; then nothing is launched.
template <class T>
class PartsBackward {
  using C = compute<T>;

 public:
  PartsBackward(const DsconvBackwardArgs& args, const Device& device, void* scratch, Stream stream, bool launching)
      : args_(args),
        forward_(args.forward),
        device_(device),
        scratch_(scratch),
        stream_(stream),
        launching_(launching),
        pixels_(pixels_of(args.forward.g)) {}

  // Bytes of scratch.
  std::size_t run() {
    const TensorRef du = output_gradient();
    for (index_t i = 0; i < forward_.num_parts; ++i) sums_grads_.push_back(sums_gradient_map(i));
    const std::size_t used = scratch_.used();
    for (index_t i = 0; i < forward_.num_parts; ++i) {
      part_gradients(i, du);
      scratch_.back_to(used);
    }
    if (args_.grad_input.data && launching_) input_gradient();
    return scratch_.most();
  }

 private:
  bool vectors_of_parts() const { return vectors(args_.dw_grads); }
  bool asks_for_taps() const { return forward_.num_parts > 0 && forward_.parts[0].grad_weight; }
  bool to_sums() const { return args_.grad_input.data || asks_for_taps() || vectors_of_parts(); }
  static Gradient gradient(const TensorRef& map) { return {map, dtype_of<T>}; }
  index_t columns() const { return first_column(forward_, forward_.num_parts); }
  int lines(index_t count) const { return pixels_ > 0 ? narrow(count) : 0; }

  // A map of so many channels in scratch, laid out as the gradient that comes in.
  TensorRef scratch_map(index_t channels) {
    void* data = scratch_.take(pixels_ * channels * sizeof(T));
    const index_t P = forward_.g.P, Q = forward_.g.Q;
    if (args_.grad_output.c == 1) return {data, P * Q * channels, 1, Q * channels, channels};
    return {data, channels * P * Q, P * Q, Q, 1};
  }

  TensorRef sums_gradient_map(index_t part) {
    if (!args_.grad_input.data && !asks_for_taps()) return {};
    return scratch_map(forward_.parts[part].g.C);
  }

  void sum_vectors(void* partial, index_t count, index_t channels, const EpilogueGrads& grads) const {
    if (partial == nullptr || !launching_) return;
    sum_lines<C>({partial,
                  lines(count),
                  kAffine,
                  narrow(channels),
                  false,
                  {{grads.bias, grads.bias_dtype}, {grads.scale, grads.scale_dtype}, {grads.shift, grads.shift_dtype}}},
                 stream_);
  }

  // du: the gradient at the pointwise sums.
  TensorRef output_gradient() {
    const EpilogueRef& e = forward_.pw_epilogue;
    const bool changed = e.activation != Activation::none || e.post != Activation::none || e.scale.data;
    const bool inside = to_sums() || args_.grad_pw_weight;
    const TensorRef kept = inside && changed ? scratch_map(forward_.K) : TensorRef{};
    if (kept.data || any(args_.pw_grads)) {
      const OutputGradientPlan plan = plan_parts_output_gradient(dtype_of<T>, forward_, device_);
      void* partial =
          vectors(args_.pw_grads) ? scratch_.take(partial_bytes<C>(plan.lines, kAffine, forward_.K)) : nullptr;
      if (launching_ && pixels_ > 0) {
        dsconv_parts_output_gradient(dtype_of<T>, plan, args_, kept, partial, stream_);
      }
      sum_vectors(partial, plan.lines, forward_.K, args_.pw_grads);
    }
    return kept.data ? kept : args_.grad_output;
  }

  // The call's gradients as those of the part alone.
  DsconvBackwardArgs part_args(index_t part) const {
    const index_t column = first_column(forward_, part);
    DsconvBackwardArgs own = args_;
    own.forward = part_of<T>(forward_, part);
    own.grad_dw_weight = forward_.parts[part].grad_weight;
    EpilogueGrads& grads = own.dw_grads;
    grads.bias = gradient_from(grads.bias, grads.bias_dtype, dtype_of<T>, sizeof(T), column);
    grads.scale = gradient_from(grads.scale, grads.scale_dtype, dtype_of<T>, sizeof(T), column);
    grads.shift = gradient_from(grads.shift, grads.shift_dtype, dtype_of<T>, sizeof(T), column);
    return own;
  }

  void part_gradients(index_t part, const TensorRef& du) {
    const DsconvBackwardArgs own = part_args(part);
    const index_t channels = own.forward.g.C;
    const TensorRef& sums_grad = sums_grads_[part];
    if (to_sums()) {
      const ZGradientPlan plan = plan_z_gradient(dtype_of<T>, own.forward, device_);
      void* partial = vectors_of_parts() ? scratch_.take(partial_bytes<C>(plan.lines, kAffine, channels)) : nullptr;
      if (launching_ && pixels_ > 0) {
        dsconv_z_gradient(dtype_of<T>, plan, own, du, sums_grad, partial, stream_);
      }
      sum_vectors(partial, plan.lines, channels, own.dw_grads);
    }
    if (args_.grad_pw_weight) matrix_gradient(part, own.forward, du);
    if (own.grad_dw_weight) {
      const auto& g = own.forward.g;
      const TensorRef& input = own.forward.input;
      void* scratch =
          scratch_.take(depthwise_weight_gradient_scratch(dtype_of<T>, g, gradient(sums_grad), input, device_));
      if (launching_) {
        depthwise_weight_gradient(dtype_of<T>, g, gradient(sums_grad), input, own.grad_dw_weight, device_, scratch,
                                  stream_);
      }
    }
  }

  // The part's columns of the matrix.
  void matrix_gradient(index_t part, const DsconvForwardArgs& own, const TensorRef& du) {
    const MatrixGradientPlan plan = plan_matrix_gradient(dtype_of<T>, own, device_);
    const int channels = narrow(own.g.C);
    void* partial = scratch_.take(partial_bytes<C>(plan.parts, 1, own.K * channels));
    if (!launching_) return;
    if (pixels_ > 0) dsconv_matrix_gradient(dtype_of<T>, plan, own, du, partial, stream_);
    T* first = static_cast<T*>(args_.grad_pw_weight) + first_column(forward_, part);
    const SumTarget target{first, dtype_of<T>, channels, columns()};
    sum_lines<C>({partial, lines(plan.parts), 1, narrow(own.K * channels), false, {target}}, stream_);
  }

  void input_gradient() const {
    if (parts_share(forward_)) {
      dsconv_parts_input_gradient(dtype_of<T>, args_, sums_grads_.data(), device_, stream_);
      return;
    }
    for (index_t i = 0; i < forward_.num_parts; ++i) {
      const DepthwisePartArgs& part = forward_.parts[i];
      depthwise_input_gradient(dtype_of<T>, part.g, gradient(sums_grads_[i]), part.weight,
                               from_channel<T>(args_.grad_input, part.channel), device_, stream_);
    }
  }

  const DsconvBackwardArgs& args_;
  const DsconvForwardArgs& forward_;
  const Device device_;
  Taken scratch_;
  const Stream stream_;
  const bool launching_;
  const index_t pixels_;
  std::vector<TensorRef> sums_grads_;
};

std::size_t backward(DType dtype, const DsconvBackwardArgs& args, const Device& device, void* scratch, Stream stream,
                     bool launching) {
  check_parts(args.forward);
  return with_types(dtype, false, [&](auto element, auto) {
    return PartsBackward<decltype(element)>(args, device, scratch, stream, launching).run();
  });
}

}  // namespace

std::size_t dsconv_parts_bwd_scratch(DType dtype, const DsconvBackwardArgs& args, const Device& device) {
  return backward(dtype, args, device, reinterpret_cast<void*>(Taken::kAlignment), nullptr, false);
}

void dsconv_parts_bwd(DType dtype, const DsconvBackwardArgs& args, const Device& device, void* scratch, Stream stream) {
  backward(dtype, args, device, scratch, stream, true);
}

}  // namespace effops::cuda
