// The kernels of one instruction set, as the bindings call them.
#pragma once

#include "csrc/args.h"

// The x86 levels are selected by GCC's target pragma; other compilers and CPUs get the baseline translation unit alone.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define EFFOPS_X86_TARGETS 1
#else
#define EFFOPS_X86_TARGETS 0
#endif

namespace effops {

constexpr int kNumDTypes = 3;  // those with CPU kernels: f32, bf16, f64

// One per ISA; the arrays are indexed by DType.
struct KernelTable {
  const char* isa;
  void (*dwconv_fwd[kNumDTypes])(const DwconvForwardArgs&);
  void (*dwconv_bwd[kNumDTypes])(const DwconvBackwardArgs&);
  void (*dwconv_stats[kNumDTypes])(const DwconvStatsArgs&);
  void (*dwconv_stats_bwd[kNumDTypes])(const DwconvStatsBackwardArgs&);
  void (*dsconv_fwd[kNumDTypes])(const DsconvForwardArgs&);
  void (*dsconv_bwd[kNumDTypes])(const DsconvBackwardArgs&);
  void (*bsconv_fwd[kNumDTypes])(const BsconvForwardArgs&);
  void (*bsconv_bwd[kNumDTypes])(const BsconvBackwardArgs&);
  void (*sepconv_fwd[kNumDTypes])(const SepconvForwardArgs&);
  void (*sepconv_bwd[kNumDTypes])(const SepconvBackwardArgs&);
  void (*blur_max_pool_fwd[kNumDTypes])(const BlurMaxPoolArgs&);
  void (*blur_max_pool_bwd[kNumDTypes])(const BlurMaxPoolArgs&);
  void (*se_fwd[kNumDTypes])(const SeForwardArgs&);
  void (*se_bwd[kNumDTypes])(const SeBackwardArgs&);
  void (*mbconv_fwd[kNumDTypes])(const MbconvForwardArgs&);
  void (*mbconv_bwd[kNumDTypes])(const MbconvBackwardArgs&);
  void (*effnet_fwd[kNumDTypes])(const EffnetForwardArgs&);
};

}  // namespace effops
