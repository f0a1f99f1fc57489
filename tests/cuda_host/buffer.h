// Memory to hand to a kernel: exactly as many elements as it may touch. Under AddressSanitizer its red zones are around
// them; otherwise guards are, NaN to who reads them, and `check` says whether somebody wrote there.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <new>
#include <span>
#include <stdexcept>
#include <string>

namespace effops::cuda_host {

#ifdef __SANITIZE_ADDRESS__
constexpr std::size_t kBufferGuard = 0;
#else
constexpr std::size_t kBufferGuard = 4096;
#endif

template <class T>
class Buffer {
 public:
  static constexpr std::size_t kAlignment = 256;

  // Filled with NaN: what a kernel leaves out is seen.
  explicit Buffer(std::size_t size) : size_(size) {
    void* memory = nullptr;
    if (posix_memalign(&memory, kAlignment, bytes() + 2 * kBufferGuard)) throw std::bad_alloc();
    memory_ = static_cast<unsigned char*>(memory);
    std::memset(memory_, kPoison, bytes() + 2 * kBufferGuard);
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { std::free(memory_); }

  std::size_t size() const { return size_; }
  T* data() { return reinterpret_cast<T*>(memory_ + kBufferGuard); }
  const T* data() const { return reinterpret_cast<const T*>(memory_ + kBufferGuard); }
  T& operator[](std::size_t index) { return data()[index]; }
  const T& operator[](std::size_t index) const { return data()[index]; }
  std::span<const T> span() const { return {data(), size_}; }

  // After the launch.
  void check(const char* name) const {
    const unsigned char* behind = memory_ + kBufferGuard + bytes();
    for (std::size_t i = 0; i < kBufferGuard; ++i) {
      if (memory_[i] == kPoison && behind[i] == kPoison) continue;
      throw std::runtime_error(std::string("written outside of the buffer: ") + name);
    }
  }

 private:
  static constexpr unsigned char kPoison = 0xff;
  std::size_t bytes() const { return size_ * sizeof(T); }

  std::size_t size_;
  unsigned char* memory_;
};

}  // namespace effops::cuda_host
