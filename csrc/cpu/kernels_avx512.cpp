// The kernels for AVX-512 (F, BW, DQ, VL).
#include "csrc/cpu/isa_prelude.h"

#if EFFOPS_X86_TARGETS
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi,bmi2")

#define EFFOPS_ISA avx512
#define EFFOPS_ISA_NAME "avx512"
#define EFFOPS_VECTOR_BYTES 64
#define EFFOPS_BF16_DOT 0
#include "csrc/cpu/kernels.inl"
#endif
