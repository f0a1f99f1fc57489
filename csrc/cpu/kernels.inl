// The body of an ISA translation unit. Everything sits in an anonymous namespace inside a namespace named after the
// ISA: no symbol is shared between the units (a linker would keep one copy and might keep the one the CPU can't run),
// and a disassembly shows by the name of a function which ISA it belongs to.

#pragma GCC diagnostic ignored "-Wpsabi"  // vector arguments of always-inline functions never cross an ABI boundary
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12's own _mm512_max_ps (GCC bug 105593)
#pragma GCC diagnostic ignored "-Wuninitialized"

#if EFFOPS_BF16_DOT
namespace effops::avx512 {
const KernelTable& table();
}
#endif

namespace effops::EFFOPS_ISA {
namespace {

// clang-format off: the order matters
#include "csrc/cpu/simd.h"
#include "csrc/cpu/activation.h"
#include "csrc/cpu/layout.h"
#include "csrc/cpu/tasks.h"
#include "csrc/cpu/epilogue.h"
#include "csrc/cpu/gemm.h"
#include "csrc/cpu/batchnorm.h"
#include "csrc/cpu/depthwise.h"
#include "csrc/cpu/dwconv.h"
#include "csrc/cpu/dsconv.h"
#include "csrc/cpu/pointwise.h"
#include "csrc/cpu/bsconv.h"
#include "csrc/cpu/backward.h"
#include "csrc/cpu/dwconv_backward.h"
#include "csrc/cpu/dsconv_backward.h"
#include "csrc/cpu/bsconv_backward.h"
#include "csrc/cpu/sepconv.h"
#include "csrc/cpu/sepconv_backward.h"
#include "csrc/cpu/blurmaxpool.h"
#include "csrc/cpu/excitation.h"
#include "csrc/cpu/se.h"
#include "csrc/cpu/mbconv.h"
#include "csrc/cpu/mbconv_backward.h"
#include "csrc/cpu/effnet.h"
// clang-format on

}  // namespace

const KernelTable& table();
const KernelTable& table() {
#if EFFOPS_BF16_DOT
  // Only what the instruction changes; everything else is avx512's.
  static const KernelTable result = [] {
    KernelTable table = avx512::table();
    table.isa = EFFOPS_ISA_NAME;
    table.dsconv_fwd[static_cast<int>(DType::bf16)] = dsconv_fwd<bf16>;
    return table;
  }();
#else
  static const KernelTable result = {
      EFFOPS_ISA_NAME,
      {dwconv_fwd<float>, dwconv_fwd<bf16>, dwconv_fwd<double>},
      {dwconv_bwd<float>, dwconv_bwd<bf16>, dwconv_bwd<double>},
      {dwconv_stats<float>, dwconv_stats<bf16>, dwconv_stats<double>},
      {dwconv_stats_bwd<float>, dwconv_stats_bwd<bf16>, dwconv_stats_bwd<double>},
      {dsconv_fwd<float>, dsconv_fwd<bf16>, dsconv_fwd<double>},
      {dsconv_bwd<float>, dsconv_bwd<bf16>, dsconv_bwd<double>},
      {bsconv_fwd<float>, bsconv_fwd<bf16>, bsconv_fwd<double>},
      {bsconv_bwd<float>, bsconv_bwd<bf16>, bsconv_bwd<double>},
      {sepconv_fwd<float>, sepconv_fwd<bf16>, sepconv_fwd<double>},
      {sepconv_bwd<float>, sepconv_bwd<bf16>, sepconv_bwd<double>},
      {blur_max_pool_fwd<float>, blur_max_pool_fwd<bf16>, blur_max_pool_fwd<double>},
      {blur_max_pool_bwd<float>, blur_max_pool_bwd<bf16>, blur_max_pool_bwd<double>},
      {se_fwd<float>, se_fwd<bf16>, se_fwd<double>},
      {se_bwd<float>, se_bwd<bf16>, se_bwd<double>},
      {mbconv_fwd<float>, mbconv_fwd<bf16>, mbconv_fwd<double>},
      {mbconv_bwd<float>, mbconv_bwd<bf16>, mbconv_bwd<double>},
      {effnet_fwd<float>, effnet_fwd<bf16>, effnet_fwd<double>},
  };
#endif
  return result;
}

}  // namespace effops::EFFOPS_ISA
