// A stack of its own for each fiber and the switch from one to another. Sanitizers are told where they are in the process;
// this code itself is never instrumented (build.py), so that it may touch what belongs to all fibers.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <system_error>

#if !defined(__x86_64__) || defined(EFFOPS_CUDA_HOST_UCONTEXT)
#include <ucontext.h>
#define EFFOPS_CUDA_HOST_UCONTEXT
#endif

extern "C" {
// Null where the sanitizer is not there.
__attribute__((weak)) void* __tsan_get_current_fiber();
__attribute__((weak)) void* __tsan_create_fiber(unsigned flags);
__attribute__((weak)) void __tsan_destroy_fiber(void* fiber);
__attribute__((weak)) void __tsan_switch_to_fiber(void* fiber, unsigned flags);
__attribute__((weak)) void __tsan_set_fiber_name(void* fiber, const char* name);
__attribute__((weak)) void __tsan_acquire(void* address);
__attribute__((weak)) void __tsan_release(void* address);
__attribute__((weak)) void __sanitizer_start_switch_fiber(void** fake_stack, const void* bottom, std::size_t size);
__attribute__((weak)) void __sanitizer_finish_switch_fiber(void* fake_stack, const void** bottom, std::size_t* size);
__attribute__((weak)) void __asan_unpoison_memory_region(const volatile void* address, std::size_t size);

#ifndef EFFOPS_CUDA_HOST_UCONTEXT
// Pushes what a call must preserve, changes stacks, pops.
void effops_cuda_host_switch(void** from, void* to);
asm(R"(
.text
.p2align 4
.hidden effops_cuda_host_switch
.globl effops_cuda_host_switch
.type effops_cuda_host_switch, @function
effops_cuda_host_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size effops_cuda_host_switch, .-effops_cuda_host_switch
)");
#endif
}

namespace effops::cuda_host {
namespace {

bool under_tsan() { return __tsan_create_fiber != nullptr; }
bool under_asan() { return __sanitizer_start_switch_fiber != nullptr; }

// Names of happens-before edges: `release` by the one who was before, `acquire` by the one who comes after.
void release(void* edge) {
  if (under_tsan()) __tsan_release(edge);
}
void acquire(void* edge) {
  if (under_tsan()) __tsan_acquire(edge);
}

// What can be switched to: a fiber on its own stack, or the thread that launched.
class Context {
 public:
  Context() = default;
  Context(const Context&) = delete;
  Context& operator=(const Context&) = delete;
  ~Context() {
    if (memory_) munmap(memory_, kGuard + kStack);
  }

  // The thread that runs now.
  void adopt() {
    if (under_tsan()) tsan_ = __tsan_get_current_fiber();
    if (!under_asan()) return;
    pthread_attr_t attributes;
    void* bottom = nullptr;
    pthread_getattr_np(pthread_self(), &attributes);
    pthread_attr_getstack(&attributes, &bottom, &size_);
    pthread_attr_destroy(&attributes);
    bottom_ = bottom;
  }

  // A fiber that runs `entry`, which never returns, when it is first switched to. May be called again to start afresh.
  // `number` moves the stack a little: with all tops a multiple of a page apart, few cache lines would serve them all.
  void start(void (*entry)(), unsigned number, const char* name) {
    if (!memory_) map_stack();
    if (under_asan()) __asan_unpoison_memory_region(bottom_, size_);
    if (under_tsan()) {
      if (tsan_) __tsan_destroy_fiber(tsan_);
      tsan_ = __tsan_create_fiber(0);
      __tsan_set_fiber_name(tsan_, name);
    }
    const std::size_t size = size_ - number % 61 * 64;
#ifdef EFFOPS_CUDA_HOST_UCONTEXT
    getcontext(&context_);
    context_.uc_stack.ss_sp = memory_ + kGuard;
    context_.uc_stack.ss_size = size;
    context_.uc_link = nullptr;
    makecontext(&context_, entry, 0);
#else
    auto* top = reinterpret_cast<std::uintptr_t*>(memory_ + kGuard + size);
    *--top = 0;  // where entry would return to: the end of a backtrace; and the alignment of a call
    *--top = reinterpret_cast<std::uintptr_t>(entry);
    for (int saved = 0; saved < 6; ++saved) *--top = 0;
    stack_pointer_ = top;
#endif
  }

  void switch_to(Context& next) {
    void* fake_stack = nullptr;
    if (under_tsan()) __tsan_switch_to_fiber(next.tsan_, kNoSync);
    if (under_asan()) __sanitizer_start_switch_fiber(&fake_stack, next.bottom_, next.size_);
#ifdef EFFOPS_CUDA_HOST_UCONTEXT
    swapcontext(&context_, &next.context_);
#else
    effops_cuda_host_switch(&stack_pointer_, next.stack_pointer_);
#endif
    if (under_asan()) __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
  }

  // The first thing that `entry` does.
  static void arrived() {
    if (under_asan()) __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
  }

  // In the name of this fiber, which will not run again: what it did was before whoever acquires the edge.
  void release_for(void* edge) {
    if (!under_tsan()) return;
    void* self = __tsan_get_current_fiber();
    __tsan_switch_to_fiber(tsan_, kNoSync);
    __tsan_release(edge);
    __tsan_switch_to_fiber(self, kNoSync);
  }

 private:
  static constexpr unsigned kNoSync = 1;
  static constexpr std::size_t kGuard = 4096;
  static constexpr std::size_t kStack = 256 << 10;  // address space; pages are there once touched

  void map_stack() {
    void* memory = mmap(nullptr, kGuard + kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED || mprotect(memory, kGuard, PROT_NONE)) {
      throw std::system_error(errno, std::generic_category(), "the stack of a fiber");
    }
    memory_ = static_cast<unsigned char*>(memory);
    bottom_ = memory_ + kGuard;
    size_ = kStack;
  }

  unsigned char* memory_ = nullptr;
  const void* bottom_ = nullptr;
  std::size_t size_ = 0;
  void* tsan_ = nullptr;
#ifdef EFFOPS_CUDA_HOST_UCONTEXT
  ucontext_t context_ = {};
#else
  void* stack_pointer_ = nullptr;
#endif
};

}  // namespace
}  // namespace effops::cuda_host
