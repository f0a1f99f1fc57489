#include "csrc/bindings/binding.h"

#include <limits>
#include <utility>

namespace effops {

DType dtype_of(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return DType::f32;
    case ScalarType::BFloat16:
      return DType::bf16;
    case ScalarType::Double:
      return DType::f64;
    case ScalarType::Half:
      return DType::f16;
    default:
      STD_TORCH_CHECK(false, "effops: ", name, " must be float32, float16, bfloat16 or float64");
  }
}

namespace {

std::int32_t device_type(const Tensor& tensor) {
  std::int32_t type = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(tensor.get(), &type));
  return type;
}

}  // namespace

void check_device(const Tensor& tensor, const Tensor& input, const char* name) {
  STD_TORCH_CHECK(device_type(tensor) == device_type(input) && tensor.get_device_index() == input.get_device_index(),
                  "effops: ", name, " must be on the device of input");
}

void check_map(const Tensor& tensor, const Tensor& input, const char* name) {
  check_device(tensor, input, name);
  STD_TORCH_CHECK(tensor.dim() == 4, "effops: ", name, " must have 4 dimensions (N, C, H, W), got ", tensor.dim());
  dtype_of(tensor, name);
  STD_TORCH_CHECK(tensor.scalar_type() == input.scalar_type(), "effops: ", name, " must have the dtype of input");
}

void check_sizes(const Tensor& tensor, const Tensor& input, index_t n, index_t c, index_t h, index_t w,
                 const char* name) {
  check_map(tensor, input, name);
  const auto sizes = tensor.sizes();
  STD_TORCH_CHECK(sizes[0] == n && sizes[1] == c && sizes[2] == h && sizes[3] == w, "effops: ", name,
                  " must have shape [", n, ", ", c, ", ", h, ", ", w, "], got [", sizes[0], ", ", sizes[1], ", ",
                  sizes[2], ", ", sizes[3], "]");
}

TensorRef tensor_ref(const Tensor& tensor) {
  const auto sizes = tensor.sizes();
  const auto strides = tensor.strides();
  TensorRef ref{const_cast<void*>(tensor.const_data_ptr()), strides[0], strides[1], strides[2], strides[3]};
  // Strides of axes of length 1 say nothing; give them the value that makes the most of the layout.
  if (sizes[1] == 1) ref.c = 1;
  if (sizes[3] == 1) ref.w = sizes[2] == 1 ? 1 : ref.h;
  if (sizes[2] == 1) ref.h = sizes[3] * ref.w;
  return ref;
}

Tensor dense(const Tensor& tensor) { return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor); }

Activation read_activation(std::int64_t code) {
  STD_TORCH_CHECK(code >= 0 && code < kNumActivations, "effops: unknown activation code ", code);
  return static_cast<Activation>(code);
}

namespace {

// Static arguments stay below 2^31, so that no sum or product of two of them overflows.
constexpr index_t kLimit = (index_t{1} << 31) - 1;

index_t output_size(index_t input, index_t pad_a, index_t pad_b, index_t kernel, index_t stride, index_t dilation,
                    const char* axis) {
  const index_t span = (kernel - 1) * dilation + 1;
  STD_TORCH_CHECK(input + pad_a + pad_b >= span, "effops: the kernel spans ", span, " pixels along ", axis,
                  ", the padded input has ", input + pad_a + pad_b);
  return (input + pad_a + pad_b - span) / stride + 1;
}

}  // namespace

StaticArgs read_geometry(const Tensor& input, const Tensor& weight, const Ints& geometry, std::size_t expected_size,
                         const char* op) {
  check_map(input, input, "input");
  check_map(weight, input, "weight");
  const auto sizes = input.sizes();
  return read_geometry(std::array<index_t, 4>{sizes[0], sizes[1], sizes[2], sizes[3]}, weight, geometry, expected_size,
                       op);
}

StaticArgs read_geometry(const std::array<index_t, 4>& x, const Tensor& weight, const Ints& geometry,
                         std::size_t expected_size, const char* op) {
  STD_TORCH_CHECK(geometry.size() == expected_size, "effops::", op, ": geometry must hold ", expected_size,
                  " integers, got ", geometry.size());
  for (std::size_t i = 0; i < geometry.size(); ++i) {
    const bool positive = i < 2 || (i >= 6 && i <= 8);  // strides, dilations, multiplier
    STD_TORCH_CHECK(geometry[i] >= (positive ? 1 : 0) && geometry[i] <= kLimit, "effops::", op, ": geometry[", i,
                    "] = ", geometry[i], " is out of range");
  }
  const auto w = weight.sizes();
  STD_TORCH_CHECK(x[1] >= 1 && x[2] >= 1 && x[3] >= 1, "effops::", op,
                  ": input must not be empty except along the batch");
  STD_TORCH_CHECK(w[0] >= 1 && w[1] == 1 && w[2] >= 1 && w[3] >= 1 && w[2] <= kLimit && w[3] <= kLimit, "effops::", op,
                  ": the depthwise weight must have shape [bank, 1, kh, kw] with sizes >= 1");
  STD_TORCH_CHECK(x[1] <= kLimit && x[2] <= kLimit && x[3] <= kLimit, "effops::", op,
                  ": channels, height and width must be below 2^31");

  StaticArgs result;
  DepthwiseGeometry& g = result.g;
  g.N = x[0], g.C = x[1], g.H = x[2], g.W = x[3];
  g.R = w[2], g.S = w[3], g.bank = w[0];
  g.stride_h = geometry[0], g.stride_w = geometry[1];
  g.pad_top = geometry[2], g.pad_left = geometry[4];
  g.dilation_h = geometry[6], g.dilation_w = geometry[7];
  g.multiplier = geometry[8];
  g.named_bank = geometry.back();
  g.P = output_size(g.H, geometry[2], geometry[3], g.R, g.stride_h, g.dilation_h, "the height");
  g.Q = output_size(g.W, geometry[4], geometry[5], g.S, g.stride_w, g.dilation_w, "the width");
  index_t elements = 0;
  STD_TORCH_CHECK(
      !__builtin_mul_overflow(g.C, g.multiplier, &elements) && !__builtin_mul_overflow(elements, g.P, &elements) &&
          !__builtin_mul_overflow(elements, g.Q, &elements) && !__builtin_mul_overflow(elements, g.N, &elements) &&
          elements < std::numeric_limits<index_t>::max() / 64,
      "effops::", op, ": the output would have more elements than 64 bits can address");
  result.channels_last = geometry[9] != 0;
  result.activation = read_activation(geometry[10]);
  result.post = read_activation(geometry[11]);
  return result;
}

ChannelRef channel_ref(const OptionalTensor& vector, const Tensor& input, index_t channels, const char* name) {
  if (!vector.has_value()) return {};
  check_device(*vector, input, name);
  STD_TORCH_CHECK(vector->dim() == 1 && vector->size(0) == channels, "effops: ", name, " must be a vector of ",
                  channels, " elements");
  const DType dtype = dtype_of(*vector, name);
  STD_TORCH_CHECK(dtype == DType::f32 || vector->scalar_type() == input.scalar_type(), "effops: ", name,
                  " must have the dtype of input or float32");
  return {vector->const_data_ptr(), vector->stride(0), dtype};
}

TensorRef residual_ref(const OptionalTensor& residual, const Tensor& input, index_t channels,
                       const DepthwiseGeometry& g, const char* name) {
  if (!residual.has_value()) return {};
  check_sizes(*residual, input, g.N, channels, g.P, g.Q, name);
  return tensor_ref(*residual);
}

EpilogueRef epilogue_ref(const OptionalTensor& bias, const OptionalTensor& scale, const OptionalTensor& shift,
                         const OptionalTensor& residual, const Tensor& input, index_t channels,
                         const DepthwiseGeometry& g) {
  EpilogueRef e;
  e.bias = channel_ref(bias, input, channels, "bias");
  e.scale = channel_ref(scale, input, channels, "scale");
  e.shift = channel_ref(shift, input, channels, "shift");
  e.residual = residual_ref(residual, input, channels, g, "residual");
  return e;
}

namespace {

std::int32_t dtype_code(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return aoti_torch_dtype_float32();
    case ScalarType::BFloat16:
      return aoti_torch_dtype_bfloat16();
    case ScalarType::Half:
      return aoti_torch_dtype_float16();
    case ScalarType::Byte:
      return aoti_torch_dtype_uint8();
    default:
      return aoti_torch_dtype_float64();
  }
}

// Empty, on the device of `like`.
Tensor new_strided(const Tensor& like, ScalarType type, const std::int64_t* sizes, const std::int64_t* strides,
                   std::int64_t dim) {
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(dim, sizes, strides, dtype_code(type), device_type(like),
                                                         like.get_device_index(), &handle));
  return Tensor(handle);
}

}  // namespace

Tensor new_map(const Tensor& like, index_t n, index_t c, index_t h, index_t w, bool channels_last) {
  const std::array<std::int64_t, 4> sizes{n, c, h, w};
  const std::array<std::int64_t, 4> strides = channels_last ? std::array<std::int64_t, 4>{h * w * c, 1, w * c, c}
                                                            : std::array<std::int64_t, 4>{c * h * w, h * w, w, 1};
  return new_strided(like, like.scalar_type(), sizes.data(), strides.data(), 4);
}

Tensor new_bytes(const Tensor& like, std::size_t bytes) {
  const std::int64_t size = static_cast<std::int64_t>(bytes), stride = 1;
  return new_strided(like, ScalarType::Byte, &size, &stride, 1);
}

Tensor new_like_shape(const Tensor& like) {
  std::array<std::int64_t, 4> sizes{}, strides{};
  const std::int64_t dim = like.dim();
  std::int64_t step = 1;
  for (std::int64_t i = dim - 1; i >= 0; --i) {
    sizes[i] = like.size(i);
    strides[i] = step;
    step *= sizes[i];
  }
  return new_strided(like, like.scalar_type(), sizes.data(), strides.data(), dim);
}

void check_saved_output(const TensorRef& output, const EpilogueRef& e) {
  if (output.data == nullptr) return;
  const bool readable = e.activation == Activation::relu || e.activation == Activation::relu6 ||
                        e.activation == Activation::sigmoid || (e.activation == Activation::leaky_relu && e.slope > 0);
  STD_TORCH_CHECK(readable && e.post == Activation::none && e.scale.data == nullptr && e.shift.data == nullptr &&
                      e.residual.data == nullptr,
                  "effops: output may be given only under relu, relu6, sigmoid or leaky_relu without scale, shift, "
                  "residual or post activation");
}

static ScalarType statistics_type(const Tensor& input) {
  return input.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

Tensor new_statistic(const Tensor& input, index_t channels) {
  const std::int64_t size = channels, stride = 1;
  return new_strided(input, statistics_type(input), &size, &stride, 1);
}

Tensor new_sums(const Tensor& input, index_t channels) {
  const std::int64_t sizes[] = {input.size(0), channels}, strides[] = {channels, 1};
  return new_strided(input, statistics_type(input), sizes, strides, 2);
}

Tensor sums_of(const Tensor& sums, const Tensor& input, index_t channels) {
  check_device(sums, input, "sums");
  STD_TORCH_CHECK(sums.dim() == 2 && sums.size(0) == input.size(0) && sums.size(1) == channels &&
                      sums.scalar_type() == statistics_type(input),
                  "effops: sums must hold a float32 (float64 for float64 input) for each of ", input.size(0),
                  " images and ", channels, " channels");
  return dense(sums);
}

Tensor statistic(const Tensor& tensor, const Tensor& input, index_t channels, const char* name) {
  check_device(tensor, input, name);
  STD_TORCH_CHECK(tensor.dim() == 1 && tensor.size(0) == channels && tensor.scalar_type() == statistics_type(input),
                  "effops: ", name, " must be a vector of ", channels, " statistics");
  return dense(tensor);
}

GradList::GradList(std::int64_t mask, int tensors) : mask_(mask) {
  STD_TORCH_CHECK(mask >= 0 && mask >> tensors == 0, "effops: mask = ", mask, " asks for more than the ", tensors,
                  " tensors of the forward operator");
}

TensorRef GradList::map(int bit, const Tensor& like, bool channels_last) {
  if (!wanted(bit)) return {};
  const auto s = like.sizes();
  tensors_.push_back(new_map(like, s[0], s[1], s[2], s[3], channels_last));
  return tensor_ref(tensors_.back());
}

TensorRef GradList::map(int bit, const OptionalTensor& like, bool channels_last, const char* name) {
  if (!wanted(bit)) return {};
  STD_TORCH_CHECK(like.has_value(), "effops: the mask asks for the gradient of ", name, ", which is absent");
  return map(bit, *like, channels_last);
}

void* GradList::dense(int bit, const Tensor& like) {
  if (!wanted(bit)) return nullptr;
  tensors_.push_back(new_like_shape(like));
  return tensors_.back().mutable_data_ptr();
}

void* GradList::dense(int bit, const OptionalTensor& like, const char* name) {
  if (!wanted(bit)) return nullptr;
  STD_TORCH_CHECK(like.has_value(), "effops: the mask asks for the gradient of ", name, ", which is absent");
  return dense(bit, *like);
}

void* GradList::channel(int bit, const OptionalTensor& like, DType& dtype, const char* name) {
  if (!wanted(bit)) return nullptr;
  STD_TORCH_CHECK(like.has_value(), "effops: the mask asks for the gradient of ", name, ", which is absent");
  dtype = dtype_of(*like, name);
  return dense(bit, *like);
}

std::vector<Tensor> GradList::take() { return std::move(tensors_); }

}  // namespace effops
