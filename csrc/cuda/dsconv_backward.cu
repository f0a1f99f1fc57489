// Room dsconv, backward: which kernels run, in which order, and the scratch they share.
//
//   output gradient    du from the output's gradient                        dsconv_output_gradient.cu
//   z's gradient       passed channels, and at the depthwise sums           dsconv_z_gradient.cu
//   matrix's gradient                                                       dsconv_matrix_gradient.cu
//   sums over pixels   of bias, scale, shift and the matrix                 sum.h
//   input's, taps'     those of room dwconv, on the gradient at the depthwise sums (dwconv.h)
//
// Kernels whose results nobody asked for do not run; without activation and scale du is the gradient that came in.
// Bytes and rooflines: at the kernels.
//
//   scratch    du | gradient at the depthwise sums | lines of the pointwise vectors, of the depthwise ones, of the
//              matrix | what the taps' gradient wants
#include "csrc/cuda/dsconv_gradients.h"
#include "csrc/cuda/dwconv.h"
#include "csrc/cuda/sum.h"

namespace effops::cuda {
namespace {

template <class T>
class Backward {
  using C = compute<T>;

 public:
  Backward(const DsconvBackwardArgs& args, const Device& device)
      : args_(args), forward_(args.forward), g_(sizes_of(args.forward.g)), device_(device) {
    const EpilogueRef& e = forward_.pw_epilogue;
    const bool changed =  // by the epilogue, on its way to the sums
        e.activation != Activation::none || e.post != Activation::none || e.scale.data;
    to_z_ = through_depthwise(args) || args.grad_passthrough.data;
    const bool inside = to_z_ || args.grad_pw_weight;
    from_output_ = any(args.pw_grads) || (inside && changed);
    output_ = plan_output_gradient(dtype_of<T>, forward_, device);
    z_ = plan_z_gradient(dtype_of<T>, forward_, device);
    matrix_ = plan_matrix_gradient(dtype_of<T>, forward_, device);
    if (inside && changed) du_ = take(map_bytes(forward_.K));
    if (args.grad_input.data || args.grad_dw_weight) sums_grad_ = take(map_bytes(g_.D));
    if (vectors(args.pw_grads)) pw_partial_ = take(partial_bytes<C>(output_.lines, kAffine, forward_.K));
    if (vectors(args.dw_grads)) dw_partial_ = take(partial_bytes<C>(z_.lines, kAffine, g_.D));
    if (args.grad_pw_weight) matrix_partial_ = take(partial_bytes<C>(matrix_.parts, 1, forward_.K * columns()));
    if (args.grad_dw_weight) {
      // The address decides about the tiles, and so about the bytes; any that is aligned as scratch is will do.
      const TensorRef sums_grad = scratch_map(reinterpret_cast<void*>(kAlignment), 0, g_.D);
      weight_scratch_ =
          take(depthwise_weight_gradient_scratch(dtype_of<T>, forward_.g, gradient(sums_grad), forward_.input, device));
    }
  }

  std::size_t scratch_bytes() const { return used_; }

  void run(void* scratch, Stream stream) const {
    const TensorRef kept_du = scratch_map(scratch, du_, forward_.K);
    const TensorRef du = du_ == kNone ? pointwise_gradient<T>(args_) : kept_du;
    const TensorRef sums_grad = scratch_map(scratch, sums_grad_, g_.D);
    if (pixels_of(forward_.g) > 0) {
      if (from_output_) {
        dsconv_output_gradient(dtype_of<T>, output_, args_, kept_du, at(scratch, pw_partial_), stream);
      }
      if (to_z_) dsconv_z_gradient(dtype_of<T>, z_, args_, du, sums_grad, at(scratch, dw_partial_), stream);
      if (args_.grad_pw_weight) {
        dsconv_matrix_gradient(dtype_of<T>, matrix_, forward_, du, at(scratch, matrix_partial_), stream);
      }
    }
    sum_vectors(at(scratch, pw_partial_), output_.lines, forward_.K, args_.pw_grads, stream);
    sum_vectors(at(scratch, dw_partial_), z_.lines, g_.D, args_.dw_grads, stream);
    if (args_.grad_pw_weight) {
      const SumTarget target{args_.grad_pw_weight, dtype_of<T>};
      const int elements = narrow(forward_.K * columns());
      sum_lines<C>({at(scratch, matrix_partial_), lines(matrix_.parts), 1, elements, false, {target}}, stream);
    }
    if (args_.grad_input.data) {
      depthwise_input_gradient(dtype_of<T>, forward_.g, gradient(sums_grad), forward_.dw_weight, args_.grad_input,
                               device_, stream);
    }
    if (args_.grad_dw_weight) {
      depthwise_weight_gradient(dtype_of<T>, forward_.g, gradient(sums_grad), forward_.input, args_.grad_dw_weight,
                                device_, at(scratch, weight_scratch_), stream);
    }
  }

 private:
  static constexpr std::size_t kNone = ~std::size_t{0}, kAlignment = 256;

  static bool vectors(const EpilogueGrads& grads) { return grads.bias || grads.scale || grads.shift; }
  static Gradient gradient(const TensorRef& map) { return {map, dtype_of<T>}; }
  index_t columns() const { return forward_.passthrough_channels + g_.D; }
  std::size_t map_bytes(index_t channels) const { return pixels_of(forward_.g) * channels * sizeof(T); }
  int lines(index_t count) const { return pixels_of(forward_.g) > 0 ? narrow(count) : 0; }

  std::size_t take(std::size_t bytes) {
    const std::size_t at = used_;
    used_ += ceil_div(bytes, kAlignment) * kAlignment;
    return at;
  }
  static void* at(void* scratch, std::size_t offset) {
    return offset == kNone ? nullptr : static_cast<char*>(scratch) + offset;
  }

  // A map of the scratch, laid out as the gradient that comes in; none where none was taken.
  TensorRef scratch_map(void* scratch, std::size_t offset, index_t channels) const {
    void* data = at(scratch, offset);
    if (data == nullptr) return {};
    const index_t P = g_.P, Q = g_.Q;
    if (args_.grad_output.c == 1) return {data, P * Q * channels, 1, Q * channels, channels};
    return {data, channels * P * Q, P * Q, Q, 1};
  }

  void sum_vectors(void* partial, index_t count, index_t channels, const EpilogueGrads& grads, Stream stream) const {
    if (partial == nullptr) return;
    sum_lines<C>({partial,
                  lines(count),
                  kAffine,
                  narrow(channels),
                  false,
                  {{grads.bias, grads.bias_dtype}, {grads.scale, grads.scale_dtype}, {grads.shift, grads.shift_dtype}}},
                 stream);
  }

  const DsconvBackwardArgs& args_;
  const DsconvForwardArgs& forward_;
  const Sizes g_;
  const Device device_;
  bool from_output_, to_z_;
  OutputGradientPlan output_;
  ZGradientPlan z_;
  MatrixGradientPlan matrix_;
  std::size_t used_ = 0;
  std::size_t du_ = kNone, sums_grad_ = kNone, pw_partial_ = kNone, dw_partial_ = kNone, matrix_partial_ = kNone,
              weight_scratch_ = kNone;
};

// f(the launches of a backward call)
template <class F>
decltype(auto) with_backward(DType dtype, const DsconvBackwardArgs& args, const Device& device, const F& f) {
  return with_types(dtype, false, [&](auto element, auto) { return f(Backward<decltype(element)>(args, device)); });
}

}  // namespace

std::size_t dsconv_bwd_scratch(DType dtype, const DsconvBackwardArgs& args, const Device& device) {
  if (args.forward.parts != nullptr) return dsconv_parts_bwd_scratch(dtype, args, device);
  return with_backward(dtype, args, device, [](const auto& backward) { return backward.scratch_bytes(); });
}

void dsconv_bwd(DType dtype, const DsconvBackwardArgs& args, const Device& device, void* scratch, Stream stream) {
  if (args.forward.parts != nullptr) return dsconv_parts_bwd(dtype, args, device, scratch, stream);
  with_backward(dtype, args, device, [&](const auto& backward) { backward.run(scratch, stream); });
}

}  // namespace effops::cuda
