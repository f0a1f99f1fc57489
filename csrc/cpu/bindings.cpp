// The operators for the CPU key.
#include "csrc/bindings/effnet.h"
#include "csrc/bindings/operators.h"
#include "csrc/cpu/runtime.h"

namespace effops {
namespace {

// The kernels of the instruction set that was chosen.
struct CpuKernels {
  static const Tensor& checked(const Tensor& input) {
    STD_TORCH_CHECK(input.is_cpu(), "effops: input must be on the CPU");
    STD_TORCH_CHECK(input.scalar_type() != ScalarType::Half,
                    "effops: input must be float32, bfloat16 or float64 on the CPU");
    return input;
  }
  static int row(const Tensor& input) { return static_cast<int>(dtype_of(input, "input")); }

  static void dwconv_fwd(const Tensor& input, const DwconvForwardArgs& args) { kernels().dwconv_fwd[row(input)](args); }
  static void dwconv_bwd(const Tensor& input, const DwconvBackwardArgs& args) {
    kernels().dwconv_bwd[row(input)](args);
  }
  static void dwconv_stats(const Tensor& input, const DwconvStatsArgs& args) {
    kernels().dwconv_stats[row(input)](args);
  }
  static void dwconv_stats_bwd(const Tensor& input, const DwconvStatsBackwardArgs& args) {
    kernels().dwconv_stats_bwd[row(input)](args);
  }
  static void dsconv_fwd(const Tensor& input, const DsconvForwardArgs& args) { kernels().dsconv_fwd[row(input)](args); }
  static void dsconv_bwd(const Tensor& input, const DsconvBackwardArgs& args) {
    kernels().dsconv_bwd[row(input)](args);
  }
  static void bsconv_fwd(const Tensor& input, const BsconvForwardArgs& args) { kernels().bsconv_fwd[row(input)](args); }
  static void bsconv_bwd(const Tensor& input, const BsconvBackwardArgs& args) {
    kernels().bsconv_bwd[row(input)](args);
  }
  static void sepconv_fwd(const Tensor& input, const SepconvForwardArgs& args) {
    kernels().sepconv_fwd[row(input)](args);
  }
  static void sepconv_bwd(const Tensor& input, const SepconvBackwardArgs& args) {
    kernels().sepconv_bwd[row(input)](args);
  }
  static void blur_max_pool_fwd(const Tensor& input, const BlurMaxPoolArgs& args) {
    kernels().blur_max_pool_fwd[row(input)](args);
  }
  static void blur_max_pool_bwd(const Tensor& input, const BlurMaxPoolArgs& args) {
    kernels().blur_max_pool_bwd[row(input)](args);
  }
  static void se_fwd(const Tensor& input, const SeForwardArgs& args) { kernels().se_fwd[row(input)](args); }
  static void se_bwd(const Tensor& input, const SeBackwardArgs& args) { kernels().se_bwd[row(input)](args); }
  static void mbconv_fwd(const Tensor& input, const MbconvForwardArgs& args) { kernels().mbconv_fwd[row(input)](args); }
  static void mbconv_bwd(const Tensor& input, const MbconvBackwardArgs& args) {
    kernels().mbconv_bwd[row(input)](args);
  }
  static void effnet_fwd(const Tensor& input, const EffnetForwardArgs& args) { kernels().effnet_fwd[row(input)](args); }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(effops, CPU, library) {
  EFFOPS_REGISTER_OPERATORS(library, CpuKernels, "");
  library.impl("dsconv_pool_fwd", TORCH_BOX(&DsconvBindings<CpuKernels>::pool_forward));
  library.impl("dsconv_norm_fwd", TORCH_BOX(&DsconvBindings<CpuKernels>::norm_forward));
  library.impl("dsconv_norm_bwd", TORCH_BOX(&DsconvBindings<CpuKernels>::norm_backward));
  library.impl("effnet_fwd", TORCH_BOX(&EffnetBindings<CpuKernels>::forward));
}

}  // namespace effops
