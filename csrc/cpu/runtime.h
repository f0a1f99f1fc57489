// Services the kernels need from outside their ISA: threads, scratch memory, and the choice of the ISA.
#pragma once

#include <cstddef>

#include "csrc/cpu/table.h"

namespace effops {

// Runs body(context, i) for i in [0, count) on torch's threads, which take the indices in order as they become free.
void parallel_tasks(index_t count, void (*body)(void* context, index_t i), void* context);
int thread_count();

// Scratch memory of a thread: a bump allocator whose block survives between calls, so that a steady state allocates
// nothing. Contents never survive a call (no cache of packed weights: an in-place edit of a parameter must take effect
// at once).
class Arena {
 public:
  // Two levels: kCall holds what one call shares between its tasks, kTask what one task uses; the calling thread uses
  // both at once.
  enum Level { kCall, kTask };
  explicit Arena(Level level);
  ~Arena();
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;
  void* allocate(std::size_t bytes);  // 64-byte aligned; throws std::bad_alloc

 private:
  struct Store;
  Store* store_;
};

// The table of the best ISA that this CPU has, that was compiled in and that EFFOPS_CPU_ISA (baseline, avx2, avx512,
// avx512bf16) allows.
const KernelTable& kernels();

}  // namespace effops
