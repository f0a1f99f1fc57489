// The operators for the CUDA key. The batch norm of dsconv_norm_*, without a kernel here, is torch's
// (effops/functional/dsconv.py).
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include "csrc/bindings/operators.h"
#include "csrc/cuda/device_info.h"
#include "csrc/cuda/kernels_on.h"

namespace effops {
namespace {

// The input's GPU, made current for the call, and torch's current stream there.
class CudaContext {
 public:
  explicit CudaContext(const Tensor& input) : index_(input.get_device_index()), guard_(index_) {}
  static void check(const Tensor& input) { STD_TORCH_CHECK(input.is_cuda(), "effops: input must be on a GPU"); }
  cuda::Device device() const { return cuda::device_info(index_); }
  cuda::Stream stream() const {
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index_, &stream));
    return stream;
  }

 private:
  std::int32_t index_;
  torch::stable::accelerator::DeviceGuard guard_;
};

using Kernels = KernelsOn<CudaContext>;

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(effops, CUDA, library) { EFFOPS_REGISTER_OPERATORS(library, Kernels, ""); }

}  // namespace effops
