// Everything an ISA translation unit includes from outside, compiled for the baseline target: this must come before the
// target pragma, so that no inline function of a shared header is emitted with instructions the CPU may not have.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>
#include <utility>

#include "csrc/cpu/table.h"
#include "csrc/cpu/runtime.h"

#if EFFOPS_X86_TARGETS
#include <immintrin.h>
#endif
