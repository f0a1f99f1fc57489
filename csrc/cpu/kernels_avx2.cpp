// The kernels for AVX2 and FMA.
#include "csrc/cpu/isa_prelude.h"

#if EFFOPS_X86_TARGETS
#pragma GCC target("avx2,fma,f16c,bmi,bmi2")

#define EFFOPS_ISA avx2
#define EFFOPS_ISA_NAME "avx2"
#define EFFOPS_VECTOR_BYTES 32
#define EFFOPS_BF16_DOT 0
#include "csrc/cpu/kernels.inl"
#endif
