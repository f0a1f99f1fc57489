// What the problems of the rooms are made of: types, sizes, the memory of a call, a layer's maps, vectors and gradients.
// Each room has its own in problems_<room>.h:
//
//   inline void visit_<room>(std::span<const Maps> sizes, const Visit& visit)
//
// calls visit(name, call) for every call of the room's host functions, in the ways that they tell apart; the name begins
// with the function's. problems.cu says what is done with them.
#pragma once

#include <cmath>
#include <cstdlib>
#include <functional>
#include <memory>
#include <span>
#include <stdexcept>
#include <string>
#include <vector>

#include "csrc/cuda/device.h"
#include "csrc/cuda/kernels.h"
#include "tests/cuda_host/buffer.h"

namespace effops::problems {

using cuda::Device;
using cuda_host::Buffer;

struct Type {
  DType dtype;
  const char* name;
  std::size_t bytes;
};
inline constexpr Type kTypes[] = {
    {DType::f32, "f32", 4}, {DType::bf16, "bf16", 2}, {DType::f64, "f64", 8}, {DType::f16, "f16", 2}};

inline const Type& type_of(DType dtype) { return kTypes[static_cast<int>(dtype)]; }
inline DType compute_type(DType dtype) { return dtype == DType::f64 ? dtype : DType::f32; }

struct Window {
  index_t size, stride, dilation;
};
inline constexpr Window kWindows[] = {{3, 1, 1}, {3, 2, 1}, {5, 1, 1}, {5, 2, 1}, {7, 1, 1}, {3, 1, 2}, {1, 1, 1}};

struct Maps {
  index_t images, channels, size;
};
inline constexpr Maps kLarge[] = {{8, 64, 56}, {1, 512, 7}, {8, 33, 28}, {128, 28, 14}, {1, 8, 112}, {0, 64, 56}};
inline constexpr Maps kSmall[] = {{2, 16, 9}, {3, 33, 5}, {1, 8, 14}};

// ---- what a call reads and writes ----

inline double value_at(const void* data, std::size_t i, DType dtype) {
  switch (dtype) {
    case DType::f32:
      return static_cast<const float*>(data)[i];
    case DType::f64:
      return static_cast<const double*>(data)[i];
    case DType::bf16:
      return cuda::to_float(static_cast<const cuda::bfloat16_t*>(data)[i]);
    case DType::f16:
      return cuda::to_float(static_cast<const cuda::half_t*>(data)[i]);
  }
  std::abort();
}

inline void set_value(void* data, std::size_t i, DType dtype, float value) {
  switch (dtype) {
    case DType::f32:
      static_cast<float*>(data)[i] = value;
      return;
    case DType::f64:
      static_cast<double*>(data)[i] = value;
      return;
    case DType::bf16:
      static_cast<cuda::bfloat16_t*>(data)[i] = cuda::from_float<cuda::bfloat16_t>(value);
      return;
    case DType::f16:
      static_cast<cuda::half_t*>(data)[i] = cuda::from_float<cuda::half_t>(value);
      return;
  }
}

// Of one call. In a dry run pointers point nowhere.
class Memory {
 public:
  explicit Memory(bool dry) : dry_(dry) {}

  void* input(index_t size, DType dtype) {
    void* data = take(size, dtype, false);
    for (index_t i = 0; i < (dry_ ? 0 : size); ++i) {
      random_ = random_ * 1664525u + 1013904223u;
      set_value(data, i, dtype, static_cast<float>(random_ >> 8) * 0x1p-23f - 1.f);
    }
    return data;
  }
  void* output(index_t size, DType dtype) { return take(size, dtype, true); }
  void* scratch(std::size_t bytes) {
    return bytes ? take(static_cast<index_t>((bytes + 3) / 4), DType::f32, false) : nullptr;
  }

  // A hash of all outputs, which are complete and are all that was written.
  std::uint64_t hash() const {
    std::uint64_t hash = 14695981039346656037u;
    for (const Part& part : parts_) {
      part.bytes->check("of a call");
      if (!part.written) continue;
      for (index_t i = 0; i < part.size; ++i) {
        if (std::isnan(value_at(part.bytes->data(), i, part.dtype))) throw std::runtime_error("NaN in the results");
      }
      for (unsigned char byte : part.bytes->span()) hash = (hash ^ byte) * 1099511628211u;
    }
    return hash;
  }

 private:
  struct Part {
    std::unique_ptr<Buffer<unsigned char>> bytes;
    index_t size;
    DType dtype;
    bool written;
  };

  void* take(index_t size, DType dtype, bool written) {
    if (dry_) return reinterpret_cast<void*>(std::uintptr_t{1} << 20);
    auto bytes = std::make_unique<Buffer<unsigned char>>(size * type_of(dtype).bytes);
    parts_.push_back({std::move(bytes), size, dtype, written});
    return parts_.back().bytes->data();
  }

  bool dry_;
  std::uint32_t random_ = 1;
  std::vector<Part> parts_;
};

inline DepthwiseGeometry geometry(const Maps& maps, const Window& window, index_t multiplier) {
  DepthwiseGeometry g{};
  g.N = maps.images;
  g.C = maps.channels;
  g.H = g.W = maps.size;
  g.R = g.S = window.size;
  g.stride_h = g.stride_w = window.stride;
  g.dilation_h = g.dilation_w = window.dilation;
  g.pad_top = g.pad_left = window.dilation * (window.size - 1) / 2;
  g.P = g.Q = (maps.size + 2 * g.pad_top - window.dilation * (window.size - 1) - 1) / window.stride + 1;
  g.multiplier = multiplier;
  g.bank = g.out_channels();
  return g;
}

// What comes after a convolution: nothing; a bias and relu, whose derivative its output tells; everything there is.
enum class Epilogue { none, relu, full };

// One layer: what the rooms' problems are made of.
struct Layer {
  const Type& type;
  DepthwiseGeometry g;
  bool channels_last;
  Epilogue kind;

  DType dtype() const { return type.dtype; }
  index_t D() const { return g.out_channels(); }

  std::string name() const {
    const auto number = [](index_t value) { return std::to_string(value); };
    return std::string(type.name) + " " + number(g.N) + "x" + number(g.C) + "x" + number(g.H) + " window " +
           number(g.R) + "/" + number(g.stride_h) + "/" + number(g.dilation_h) + " x" + number(g.multiplier) +
           (channels_last ? " channels_last" : " contiguous") +
           (kind == Epilogue::none   ? ""
            : kind == Epilogue::relu ? " relu"
                                     : " full");
  }

  TensorRef map(void* data, index_t channels, index_t size) const {
    if (channels_last) return {data, channels * size * size, 1, size * channels, channels};
    return {data, channels * size * size, size * size, size, 1};
  }
  TensorRef read_map(Memory& m, index_t channels, index_t size) const {
    return map(m.input(g.N * channels * size * size, dtype()), channels, size);
  }
  TensorRef written_map(Memory& m, index_t channels, index_t size) const {
    return map(m.output(g.N * channels * size * size, dtype()), channels, size);
  }
  const void* weight(Memory& m) const { return m.input(g.bank * g.R * g.S, dtype()); }
  ChannelRef vector(Memory& m, index_t channels) const { return {m.input(channels, dtype()), 1, dtype()}; }

  EpilogueRef epilogue(Memory& m, index_t channels) const {
    EpilogueRef e;
    if (kind == Epilogue::none) return e;
    e.bias = vector(m, channels);
    e.activation = Activation::relu;
    if (kind == Epilogue::relu) return e;
    e.scale = vector(m, channels);
    e.shift = vector(m, channels);
    e.residual = read_map(m, channels, g.P);
    e.activation = Activation::silu;
    e.post = Activation::relu;
    return e;
  }
  EpilogueGrads vector_gradients(Memory& m, index_t channels) const {
    EpilogueGrads grads;
    grads.bias_dtype = grads.scale_dtype = grads.shift_dtype = dtype();
    if (kind == Epilogue::none) return grads;
    grads.bias = m.output(channels, dtype());
    if (kind == Epilogue::relu) return grads;
    grads.scale = m.output(channels, dtype());
    grads.shift = m.output(channels, dtype());
    return grads;
  }
  EpilogueGrads gradients(Memory& m, index_t channels) const {
    EpilogueGrads grads = vector_gradients(m, channels);
    if (kind == Epilogue::full) grads.residual = written_map(m, channels, g.P);
    return grads;
  }
  TensorRef saved_output(Memory& m, index_t channels) const {
    return kind == Epilogue::relu ? read_map(m, channels, g.P) : TensorRef{};
  }
};

using Call = std::function<void(Memory&, const Device&)>;
using Visit = std::function<void(const std::string&, const Call&)>;

// f(layer) for the types, sizes, windows, multipliers, epilogues and formats that rooms of depthwise convolutions tell
// apart.
template <class F>
void for_each_layer(std::span<const Maps> sizes, const F& f) {
  for (const Type& type : kTypes) {
    for (const Maps& maps : sizes) {
      for (const Window& window : kWindows) {
        for (int way = 0; way < 12; ++way) {
          const DepthwiseGeometry g = geometry(maps, window, 1 + way / 6);
          f(Layer{type, g, way % 2 == 1, static_cast<Epilogue>(way / 2 % 3)});
        }
      }
    }
  }
}

}  // namespace effops::problems
