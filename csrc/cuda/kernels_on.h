// The CUDA kernels as the bindings call them. A `Context` says on which device and stream a call runs: a GPU's
// (bindings.cpp), or the host where tests run the same kernels (tests/cuda_host).
#pragma once

#include "csrc/bindings/binding.h"
#include "csrc/cuda/kernels.h"

namespace effops {

template <class Context>
struct KernelsOn {
  static const Tensor& checked(const Tensor& input) {
    Context::check(input);
    return input;
  }
  static DType dtype(const Tensor& input) { return dtype_of(input, "input"); }

  static void dwconv_fwd(const Tensor& input, const DwconvForwardArgs& args) {
    const Context on(input);
    cuda::dwconv_fwd(dtype(input), args, on.device(), on.stream());
  }
  static void dwconv_bwd(const Tensor& input, const DwconvBackwardArgs& args) {
    const Context on(input);
    Tensor scratch = new_bytes(input, cuda::dwconv_bwd_scratch(dtype(input), args, on.device()));
    cuda::dwconv_bwd(dtype(input), args, on.device(), scratch.mutable_data_ptr(), on.stream());
  }
  static void dwconv_stats(const Tensor& input, const DwconvStatsArgs& args) {
    const Context on(input);
    Tensor scratch = new_bytes(input, cuda::dwconv_stats_scratch(dtype(input), args, on.device()));
    cuda::dwconv_stats(dtype(input), args, on.device(), scratch.mutable_data_ptr(), on.stream());
  }
  static void dwconv_stats_bwd(const Tensor& input, const DwconvStatsBackwardArgs& args) {
    const Context on(input);
    Tensor scratch = new_bytes(input, cuda::dwconv_stats_bwd_scratch(dtype(input), args, on.device()));
    cuda::dwconv_stats_bwd(dtype(input), args, on.device(), scratch.mutable_data_ptr(), on.stream());
  }
  static void dsconv_fwd(const Tensor& input, const DsconvForwardArgs& args) {
    const Context on(input);
    cuda::dsconv_fwd(dtype(input), args, on.device(), on.stream());
  }
  static void dsconv_bwd(const Tensor& input, const DsconvBackwardArgs& args) {
    const Context on(input);
    Tensor scratch = new_bytes(input, cuda::dsconv_bwd_scratch(dtype(input), args, on.device()));
    cuda::dsconv_bwd(dtype(input), args, on.device(), scratch.mutable_data_ptr(), on.stream());
  }
  static void bsconv_fwd(const Tensor& input, const BsconvForwardArgs& args) {
    const Context on(input);
    Tensor scratch = new_bytes(input, cuda::bsconv_fwd_scratch(dtype(input), args, on.device()));
    cuda::bsconv_fwd(dtype(input), args, on.device(), scratch.mutable_data_ptr(), on.stream());
  }
  static void bsconv_bwd(const Tensor& input, const BsconvBackwardArgs& args) {
    const Context on(input);
    Tensor scratch = new_bytes(input, cuda::bsconv_bwd_scratch(dtype(input), args, on.device()));
    cuda::bsconv_bwd(dtype(input), args, on.device(), scratch.mutable_data_ptr(), on.stream());
  }
  static void mbconv_fwd(const Tensor& input, const MbconvForwardArgs& args) {
    const Context on(input);
    Tensor scratch = new_bytes(input, cuda::mbconv_fwd_scratch(dtype(input), args, on.device()));
    cuda::mbconv_fwd(dtype(input), args, on.device(), scratch.mutable_data_ptr(), on.stream());
  }
  static void mbconv_bwd(const Tensor& input, const MbconvBackwardArgs& args) {
    const Context on(input);
    Tensor scratch = new_bytes(input, cuda::mbconv_bwd_scratch(dtype(input), args, on.device()));
    cuda::mbconv_bwd(dtype(input), args, on.device(), scratch.mutable_data_ptr(), on.stream());
  }
  static void se_fwd(const Tensor& input, const SeForwardArgs& args) {
    const Context on(input);
    Tensor scratch = new_bytes(input, cuda::se_fwd_scratch(dtype(input), args, on.device()));
    cuda::se_fwd(dtype(input), args, on.device(), scratch.mutable_data_ptr(), on.stream());
  }
  static void se_bwd(const Tensor& input, const SeBackwardArgs& args) {
    const Context on(input);
    Tensor scratch = new_bytes(input, cuda::se_bwd_scratch(dtype(input), args, on.device()));
    cuda::se_bwd(dtype(input), args, on.device(), scratch.mutable_data_ptr(), on.stream());
  }
  static void blur_max_pool_fwd(const Tensor& input, const BlurMaxPoolArgs& args) {
    const Context on(input);
    cuda::blur_max_pool_fwd(dtype(input), args, on.device(), on.stream());
  }
  static void blur_max_pool_bwd(const Tensor& input, const BlurMaxPoolArgs& args) {
    const Context on(input);
    cuda::blur_max_pool_bwd(dtype(input), args, on.device(), on.stream());
  }
  static void sepconv_fwd(const Tensor& input, const SepconvForwardArgs& args) {
    const Context on(input);
    cuda::sepconv_fwd(dtype(input), args, on.device(), on.stream());
  }
  static void sepconv_bwd(const Tensor& input, const SepconvBackwardArgs& args) {
    const Context on(input);
    Tensor scratch = new_bytes(input, cuda::sepconv_bwd_scratch(dtype(input), args, on.device()));
    cuda::sepconv_bwd(dtype(input), args, on.device(), scratch.mutable_data_ptr(), on.stream());
  }
};

}  // namespace effops
