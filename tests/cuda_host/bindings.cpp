// The operators with the CUDA kernels run on the host: `<op>_cuda_host` on CPU tensors, for tests (effops/ops/registration.py
// defines them where EFFOPS_CUDA_HOST names the library).
#include "csrc/bindings/dsconv.h"
#include "csrc/bindings/dwconv.h"
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

using Dwconv = DwconvBindings<KernelsOn<HostContext>>;
using Dsconv = DsconvBindings<KernelsOn<HostContext>>;

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(effops, CPU, library) {
  library.impl("dwconv_fwd_cuda_host", TORCH_BOX(&Dwconv::forward));
  library.impl("dwconv_bwd_cuda_host", TORCH_BOX(&Dwconv::backward));
  library.impl("dwconv_stats_cuda_host", TORCH_BOX(&Dwconv::statistics));
  library.impl("dwconv_stats_bwd_cuda_host", TORCH_BOX(&Dwconv::statistics_backward));
  library.impl("dsconv_fwd_cuda_host", TORCH_BOX(&Dsconv::forward));
  library.impl("dsconv_bwd_cuda_host", TORCH_BOX(&Dsconv::backward));
}

}  // namespace effops
