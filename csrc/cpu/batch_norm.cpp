// Room batch_norm for the CPU key: a batch norm's statistics and parameters as the scale and shift of an epilogue. So few
// values that the call is the cost, and one instruction set will do.
#include <cmath>

#include "csrc/bindings/binding.h"

namespace effops {
namespace {

// The vector, contiguous, or an empty optional.
OptionalTensor checked(const OptionalTensor& vector, const Tensor& mean, const char* name) {
  if (!vector.has_value()) return {};
  STD_TORCH_CHECK(vector->is_cpu() && vector->dim() == 1 && vector->size(0) == mean.size(0) &&
                      vector->scalar_type() == mean.scalar_type(),
                  "effops::batch_norm_affine: ", name, " must be a CPU vector of the size and dtype of running_mean");
  return dense(*vector);
}

template <class T>
void fold(const OptionalTensor& weight, const OptionalTensor& bias, const Tensor& mean, const Tensor& var, double eps,
          Tensor& scale, Tensor& shift) {
  const auto read = [](const Tensor& t) { return static_cast<const T*>(t.const_data_ptr()); };
  const T *m = read(mean), *v = read(var);
  const T e = static_cast<T>(eps);
  T *a = static_cast<T*>(scale.mutable_data_ptr()), *b = static_cast<T*>(shift.mutable_data_ptr());
  const index_t channels = mean.size(0);
  for (index_t c = 0; c < channels; ++c) a[c] = 1 / std::sqrt(v[c] + e);
  if (weight.has_value()) {
    const T* gamma = read(*weight);
    for (index_t c = 0; c < channels; ++c) a[c] *= gamma[c];
  }
  for (index_t c = 0; c < channels; ++c) b[c] = -m[c] * a[c];
  if (bias.has_value()) {
    const T* beta = read(*bias);
    for (index_t c = 0; c < channels; ++c) b[c] += beta[c];
  }
}

std::tuple<Tensor, Tensor> batch_norm_affine(const OptionalTensor& weight, const OptionalTensor& bias,
                                             const Tensor& running_mean, const Tensor& running_var, double eps) {
  const bool wide = running_mean.scalar_type() == ScalarType::Double;
  STD_TORCH_CHECK(
      running_mean.is_cpu() && running_mean.dim() == 1 && (wide || running_mean.scalar_type() == ScalarType::Float),
      "effops::batch_norm_affine: running_mean must be a float32 or float64 CPU vector");
  const Tensor mean = dense(running_mean);
  const OptionalTensor var = checked(running_var, mean, "running_var"), gamma = checked(weight, mean, "weight"),
                       beta = checked(bias, mean, "bias");
  Tensor scale = new_like_shape(mean), shift = new_like_shape(mean);
  if (wide) {
    fold<double>(gamma, beta, mean, *var, eps, scale, shift);
  } else {
    fold<float>(gamma, beta, mean, *var, eps, scale, shift);
  }
  return {scale, shift};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(effops, CPU, library) { library.impl("batch_norm_affine", TORCH_BOX(&batch_norm_affine)); }

}  // namespace effops
