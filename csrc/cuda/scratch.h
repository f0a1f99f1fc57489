// The scratch of a call: pieces of one allocation, and how a call learns how many bytes they are.
#pragma once

#include <cstddef>
#include <cstdint>

#include "csrc/cuda/kernels.h"

namespace effops::cuda {

// Pieces of the caller's scratch, one after the other. To learn how many bytes they are, any aligned address will do:
// what is chosen by addresses is then chosen the same way.
class Scratch {
 public:
  static constexpr std::uintptr_t kAlignment = 256;
  explicit Scratch(const void* data) : base_(reinterpret_cast<std::uintptr_t>(data)) {}
  static Scratch counting() { return Scratch(reinterpret_cast<const void*>(kAlignment)); }
  void* take(std::size_t bytes) {
    const std::uintptr_t place = base_ + used_;
    used_ += (bytes + kAlignment - 1) / kAlignment * kAlignment;
    return reinterpret_cast<void*>(place);
  }
  std::size_t used() const { return used_; }

 private:
  std::uintptr_t base_;
  std::size_t used_ = 0;
};

// Where a call runs; `launching` false: nothing is launched, the bytes of scratch are counted.
struct Run {
  const Device& device;
  Scratch scratch;
  Stream stream;
  bool launching;
};

// Bytes of scratch that `call(run)` takes.
template <class Call>
std::size_t count_scratch(const Device& device, const Call& call) {
  Run run{device, Scratch::counting(), nullptr, false};
  call(run);
  return run.scratch.used();
}

}  // namespace effops::cuda
