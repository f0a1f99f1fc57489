// The caller's scratch, dealt out to the launches of a call.
#pragma once

#include <algorithm>
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
    const std::uintptr_t place = base_ + taken_;
    taken_ += (bytes + kAlignment - 1) / kAlignment * kAlignment;
    most_ = std::max(most_, taken_);
    return reinterpret_cast<void*>(place);
  }
  // f(as many bytes), which are free again for what is launched next.
  template <class F>
  void lend(std::size_t bytes, const F& f) {
    const std::size_t before = taken_;
    f(take(bytes));
    taken_ = before;
  }
  std::size_t used() const { return most_; }  // the most at a time

 private:
  std::uintptr_t base_;
  std::size_t taken_ = 0, most_ = 0;
};

// Where a call runs; `launching` false: nothing is launched, the bytes of scratch are counted.
struct Run {
  const Device& device;
  Scratch scratch;
  Stream stream;
  bool launching;
};

// The bytes that `call` takes; call(run) with the caller's.
template <class Call>
std::size_t count_scratch(const Device& device, const Call& call) {
  Run run{device, Scratch::counting(), nullptr, false};
  call(run);
  return run.scratch.used();
}

inline std::size_t element_bytes(DType dtype) { return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2; }

// A map [N, C, H, W] in scratch, its channels side by side where those of `like` are.
inline TensorRef take_map(Run& run, DType dtype, const TensorRef& like, index_t N, index_t C, index_t H, index_t W) {
  void* const data = run.scratch.take(static_cast<std::size_t>(N * C * H * W) * element_bytes(dtype));
  if (like.c == 1) return {data, H * W * C, 1, W * C, C};
  return {data, C * H * W, H * W, W, 1};
}

}  // namespace effops::cuda
