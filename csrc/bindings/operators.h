// All operators of one set of kernels, registered in one place: a room that is added here is added on every device.
#pragma once

#include "csrc/bindings/blurmaxpool.h"
#include "csrc/bindings/bsconv.h"
#include "csrc/bindings/dsconv.h"
#include "csrc/bindings/dwconv.h"
#include "csrc/bindings/mbconv.h"
#include "csrc/bindings/se.h"
#include "csrc/bindings/sepconv.h"

// In STABLE_TORCH_LIBRARY_IMPL: operators `<name><suffix>` run on `Kernels`.
#define EFFOPS_REGISTER_OPERATORS(library, Kernels, suffix)                                            \
  do {                                                                                                 \
    library.impl("dwconv_fwd" suffix, TORCH_BOX(&DwconvBindings<Kernels>::forward));                   \
    library.impl("dwconv_bwd" suffix, TORCH_BOX(&DwconvBindings<Kernels>::backward));                  \
    library.impl("dwconv_stats" suffix, TORCH_BOX(&DwconvBindings<Kernels>::statistics));              \
    library.impl("dwconv_stats_bwd" suffix, TORCH_BOX(&DwconvBindings<Kernels>::statistics_backward)); \
    library.impl("dsconv_fwd" suffix, TORCH_BOX(&DsconvBindings<Kernels>::forward));                   \
    library.impl("dsconv_bwd" suffix, TORCH_BOX(&DsconvBindings<Kernels>::backward));                  \
    library.impl("bsconv_fwd" suffix, TORCH_BOX(&BsconvBindings<Kernels>::forward));                   \
    library.impl("bsconv_bwd" suffix, TORCH_BOX(&BsconvBindings<Kernels>::backward));                  \
    library.impl("mbconv_fwd" suffix, TORCH_BOX(&MbconvBindings<Kernels>::forward));                   \
    library.impl("mbconv_bwd" suffix, TORCH_BOX(&MbconvBindings<Kernels>::backward));                  \
    library.impl("se_fwd" suffix, TORCH_BOX(&SeBindings<Kernels>::forward));                           \
    library.impl("se_bwd" suffix, TORCH_BOX(&SeBindings<Kernels>::backward));                          \
    library.impl("blur_max_pool_fwd" suffix, TORCH_BOX(&BlurMaxPoolBindings<Kernels>::forward));       \
    library.impl("blur_max_pool_bwd" suffix, TORCH_BOX(&BlurMaxPoolBindings<Kernels>::backward));      \
    library.impl("sepconv_fwd" suffix, TORCH_BOX(&SepconvBindings<Kernels>::forward));                 \
    library.impl("sepconv_bwd" suffix, TORCH_BOX(&SepconvBindings<Kernels>::backward));                \
  } while (false)
