// What the operators' bindings share, on any device: checked views of torch's tensors, allocation in the asked-for memory
// format, geometry. Every check of effops.functional that memory safety depends on is repeated here, because
// torch.ops.effops.* can be called directly.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

#include "csrc/args.h"

namespace effops {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Ints = std::vector<std::int64_t>;

DType dtype_of(const Tensor& tensor, const char* name);

// On the device of input.
void check_device(const Tensor& tensor, const Tensor& input, const char* name);
// A float tensor of rank 4 with the dtype and device of input.
void check_map(const Tensor& tensor, const Tensor& input, const char* name);
void check_sizes(const Tensor& tensor, const Tensor& input, index_t n, index_t c, index_t h, index_t w,
                 const char* name);

TensorRef tensor_ref(const Tensor& tensor);

// The tensor, contiguous; without a call of the dispatcher where it is already.
Tensor dense(const Tensor& tensor);

// `geometry` of the schemas. The first 12 entries are the depthwise convolution's.
struct StaticArgs {
  DepthwiseGeometry g;
  bool channels_last;
  Activation activation, post;
};
StaticArgs read_geometry(const Tensor& input, const Tensor& weight, const Ints& geometry, std::size_t expected_size,
                         const char* op);
// The same for an input that exists as sizes alone: what a convolution before this one would give.
StaticArgs read_geometry(const std::array<index_t, 4>& input, const Tensor& weight, const Ints& geometry,
                         std::size_t expected_size, const char* op);
Activation read_activation(std::int64_t code);

// The per-channel vector or residual of an epilogue, checked; absent where the optional is empty.
ChannelRef channel_ref(const OptionalTensor& vector, const Tensor& input, index_t channels, const char* name);
TensorRef residual_ref(const OptionalTensor& residual, const Tensor& input, index_t channels,
                       const DepthwiseGeometry& g, const char* name);
EpilogueRef epilogue_ref(const OptionalTensor& bias, const OptionalTensor& scale, const OptionalTensor& shift,
                         const OptionalTensor& residual, const Tensor& input, index_t channels,
                         const DepthwiseGeometry& g);

Tensor new_map(const Tensor& like, index_t n, index_t c, index_t h, index_t w, bool channels_last);
// A saved output may replace the recomputed sums only where the activation's derivative can be read off it.
void check_saved_output(const TensorRef& output, const EpilogueRef& epilogue);

// Per-channel statistics are float32, float64 for float64 input.
Tensor new_statistic(const Tensor& input, index_t channels);
Tensor statistic(const Tensor& tensor, const Tensor& input, index_t channels,
                 const char* name);  // checked and contiguous

// Sums over the pixels of each image, [N, channels] of the same dtypes.
Tensor new_sums(const Tensor& input, index_t channels);
Tensor sums_of(const Tensor& sums, const Tensor& input, index_t channels);  // checked and contiguous

Tensor new_bytes(const Tensor& like, std::size_t bytes);  // scratch on the device of `like`
Tensor new_like_shape(const Tensor& like);                // contiguous, the same sizes and dtype

// The gradients a backward operator returns: allocated when their bit is set, listed in the order of the bits.
class GradList {
 public:
  GradList(std::int64_t mask, int tensors);  // of a forward operator with that many tensors
  TensorRef map(int bit, const Tensor& like, bool channels_last);
  TensorRef map(int bit, const OptionalTensor& like, bool channels_last, const char* name);
  void* dense(int bit, const Tensor& like);
  void* dense(int bit, const OptionalTensor& like, const char* name);
  void* channel(int bit, const OptionalTensor& like, DType& dtype, const char* name);
  std::vector<Tensor> take();

 private:
  bool wanted(int bit) const { return (mask_ >> bit & 1) != 0; }
  std::int64_t mask_;
  std::vector<Tensor> tensors_;
};

}  // namespace effops
