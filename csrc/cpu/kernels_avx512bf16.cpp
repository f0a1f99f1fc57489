// The kernels for AVX-512 with its bf16 dot product: bfloat16 forward kernels; the rest is avx512's table.
#include "csrc/cpu/isa_prelude.h"

#if EFFOPS_X86_TARGETS
#pragma GCC target("avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi,bmi2")

#define EFFOPS_ISA avx512bf16
#define EFFOPS_ISA_NAME "avx512bf16"
#define EFFOPS_VECTOR_BYTES 64
#define EFFOPS_BF16_DOT 1
#include "csrc/cpu/kernels.inl"
#endif
