// The kernels for any CPU: 16-byte vectors, no target pragma.
#include "csrc/cpu/isa_prelude.h"

#define EFFOPS_ISA baseline
#define EFFOPS_ISA_NAME "baseline"
#define EFFOPS_VECTOR_BYTES 16
#define EFFOPS_BF16_DOT 0
#include "csrc/cpu/kernels.inl"
