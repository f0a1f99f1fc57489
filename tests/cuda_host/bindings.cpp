// The operators with the CUDA kernels run on the host: `<op>_cuda_host` on CPU tensors, for tests (effops/ops/registration.py
// defines them where EFFOPS_CUDA_HOST names the library).
#include "csrc/bindings/operators.h"
#include "csrc/cuda/kernels_on.h"

namespace effops {
namespace {

// A small GPU, so that small maps already are several blocks and sums have several parts.
class HostContext {
 public:
  explicit HostContext(const Tensor&) {}
  static void check(const Tensor& input) { STD_TORCH_CHECK(input.is_cpu(), "effops: input must be on the CPU"); }
  cuda::Device device() const { return {4, 227 * 1024, 90}; }
  cuda::Stream stream() const { return nullptr; }
};

using Kernels = KernelsOn<HostContext>;

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(effops, CPU, library) { EFFOPS_REGISTER_OPERATORS(library, Kernels, "_cuda_host"); }

}  // namespace effops
