// Calls of every host function of kernels.h, in the ways that they tell apart.
//
//   problems --dry     which kernels they launch on which device, with how many threads and bytes of shared memory, as JSON
//                      for cuda_compile.py; nothing is run, so maps can be large
//   problems           runs small ones, on memory of exactly the size that a call may touch, and prints a hash of what each
//                      wrote. Exit status 1 if it left something out (NaN stays) or wrote elsewhere. Values are compared
//                      with nothing here. --only TEXT: calls whose name contains it; --every N: one in N; and options.h
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <set>
#include <string>
#include <tuple>
#include <vector>

#include "csrc/cuda/banks.h"
#include "csrc/cuda/device.h"
#include "csrc/cuda/kernels.h"
#include "tests/cuda_host/buffer.h"
#include "tests/cuda_host/options.h"

extern "C" const char __executable_start;  // the linker's: where the program lies in memory

namespace {

using namespace effops;
using cuda::Device;
using cuda_host::Buffer;
using cuda_host::settings;

constexpr Device kDevices[] = {{108, 163 << 10, 80}, {132, 227 << 10, 90}, {148, 227 << 10, 100}};
constexpr Device kHost = {2, 163 << 10, 80};  // few processors: blocks have more than one tile each

struct Type {
  DType dtype;
  const char* name;
  std::size_t bytes;
};
constexpr Type kTypes[] = {
    {DType::f32, "f32", 4}, {DType::bf16, "bf16", 2}, {DType::f64, "f64", 8}, {DType::f16, "f16", 2}};

const Type& type_of(DType dtype) { return kTypes[static_cast<int>(dtype)]; }
DType compute_type(DType dtype) { return dtype == DType::f64 ? dtype : DType::f32; }

struct Window {
  index_t size, stride, dilation;
};
constexpr Window kWindows[] = {{3, 1, 1}, {3, 2, 1}, {5, 1, 1}, {5, 2, 1}, {7, 1, 1}, {3, 1, 2}, {1, 1, 1}};

struct Maps {
  index_t images, channels, size;
};
constexpr Maps kLarge[] = {{8, 64, 56}, {1, 512, 7}, {8, 33, 28}, {128, 28, 14}, {1, 8, 112}, {0, 64, 56}};
constexpr Maps kSmall[] = {{2, 16, 9}, {3, 33, 5}, {1, 8, 14}};
// In float32 at stride 2: dsconv's blocks have one patch, which two blocks of channels fill in turn.
constexpr Maps kOnePatch = {1, 40, 17};

// ---- what a call reads and writes ----

double value_at(const void* data, std::size_t i, DType dtype) {
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

void set_value(void* data, std::size_t i, DType dtype, float value) {
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

DepthwiseGeometry geometry(const Maps& maps, const Window& window, index_t multiplier) {
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

// One layer.
struct Problem {
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
  EpilogueGrads gradients(Memory& m, index_t channels) const {
    EpilogueGrads grads;
    grads.bias_dtype = grads.scale_dtype = grads.shift_dtype = dtype();
    if (kind == Epilogue::none) return grads;
    grads.bias = m.output(channels, dtype());
    if (kind == Epilogue::relu) return grads;
    grads.scale = m.output(channels, dtype());
    grads.shift = m.output(channels, dtype());
    grads.residual = written_map(m, channels, g.P);
    return grads;
  }
  TensorRef saved_output(Memory& m, index_t channels) const {
    return kind == Epilogue::relu ? read_map(m, channels, g.P) : TensorRef{};
  }

  void forward(Memory& m, const Device& device) const {
    const DwconvForwardArgs args{g, read_map(m, g.C, g.H), written_map(m, D(), g.P), weight(m), epilogue(m, D())};
    cuda::dwconv_fwd(dtype(), args, device, nullptr);
  }

  void backward(Memory& m, const Device& device) const {
    const TensorRef output = saved_output(m, D());
    DwconvBackwardArgs args{g, read_map(m, D(), g.P), output, read_map(m, g.C, g.H), weight(m), epilogue(m, D()), {}};
    args.grad_input = written_map(m, g.C, g.H);
    args.grad_weight = m.output(g.bank * g.R * g.S, dtype());
    args.grads = gradients(m, D());
    cuda::dwconv_bwd(dtype(), args, device, m.scratch(cuda::dwconv_bwd_scratch(dtype(), args, device)), nullptr);
  }

  void statistics(Memory& m, const Device& device) const {
    const DType wide = compute_type(dtype());
    const DwconvStatsArgs args{
        g, read_map(m, g.C, g.H), weight(m), vector(m, D()), m.output(D(), wide), m.output(D(), wide)};
    cuda::dwconv_stats(dtype(), args, device, m.scratch(cuda::dwconv_stats_scratch(dtype(), args, device)), nullptr);
  }

  void statistics_backward(Memory& m, const Device& device) const {
    const DType wide = compute_type(dtype());
    const auto one = [&] { return m.input(D(), wide); };
    DwconvStatsBackwardArgs args{g, read_map(m, g.C, g.H), weight(m), vector(m, D()), one(), one(), one(), one(), {}};
    args.grad_input = written_map(m, g.C, g.H);
    args.grad_weight = m.output(g.bank * g.R * g.S, dtype());
    args.grad_bias = m.output(D(), dtype());
    args.grad_bias_dtype = dtype();
    void* scratch = m.scratch(cuda::dwconv_stats_bwd_scratch(dtype(), args, device));
    cuda::dwconv_stats_bwd(dtype(), args, device, scratch, nullptr);
  }

  // The pointwise half: K channels from the depthwise ones and `passthrough` others.
  DsconvForwardArgs separable(Memory& m, index_t K, index_t passthrough, bool tf32) const {
    DsconvForwardArgs args{};
    args.g = g;
    args.passthrough_channels = passthrough;
    args.K = K;
    args.tf32 = tf32;
    args.input = read_map(m, g.C, g.H);
    if (passthrough) args.passthrough = read_map(m, passthrough, g.P);
    args.dw_weight = weight(m);
    args.dw_epilogue = epilogue(m, D());
    args.pw_weight = m.input(K * (passthrough + D()), dtype());
    args.pw_stride_k = passthrough + D();
    args.pw_stride_c = 1;
    args.pw_epilogue = epilogue(m, K);
    return args;
  }

  void separable_forward(Memory& m, const Device& device, index_t K, index_t passthrough, bool tf32) const {
    DsconvForwardArgs args = separable(m, K, passthrough, tf32);
    args.output = written_map(m, K, g.P);
    cuda::dsconv_fwd(dtype(), args, device, nullptr);
  }

  void separable_backward(Memory& m, const Device& device, index_t K, index_t passthrough, bool tf32) const {
    DsconvBackwardArgs args{separable(m, K, passthrough, tf32), read_map(m, K, g.P), written_map(m, g.C, g.H), {}};
    args.forward.output = saved_output(m, K);
    if (passthrough) args.grad_passthrough = written_map(m, passthrough, g.P);
    args.grad_dw_weight = m.output(g.bank * g.R * g.S, dtype());
    args.grad_pw_weight = m.output(K * (passthrough + D()), dtype());
    args.dw_grads = gradients(m, D());
    args.pw_grads = gradients(m, K);
    void* scratch = m.scratch(cuda::dsconv_bwd_scratch(dtype(), args, device));
    cuda::dsconv_bwd(dtype(), args, device, scratch, nullptr);
  }
};

// `visit(name, call)` for every call of every host function that this layer stands for; call(memory, device).
template <class Visit>
void visit_calls(const Problem& problem, Visit visit) {
  using M = Memory&;
  using V = const Device&;
  const std::string name = " " + problem.name();
  visit("dwconv_fwd" + name, [&](M m, V device) { problem.forward(m, device); });
  visit("dwconv_stats" + name, [&](M m, V device) { problem.statistics(m, device); });
  visit("dwconv_stats_bwd" + name, [&](M m, V device) { problem.statistics_backward(m, device); });
  visit("dwconv_bwd" + name, [&](M m, V device) { problem.backward(m, device); });
  for (index_t K : {16, 72, 256}) {
    const index_t passthrough = K == 16 ? 0 : problem.g.C;
    for (bool tf32 : {false, true}) {
      if (tf32 && problem.dtype() != DType::f32) continue;
      const std::string layer = name + " to " + std::to_string(K) + (tf32 ? " tf32" : "");
      visit("dsconv_fwd" + layer, [&](M m, V device) { problem.separable_forward(m, device, K, passthrough, tf32); });
      visit("dsconv_bwd" + layer, [&](M m, V device) { problem.separable_backward(m, device, K, passthrough, tf32); });
    }
  }
}

template <std::size_t kCount, class Visit>
void visit_all(const Maps (&sizes)[kCount], Visit visit) {
  for (const Type& type : kTypes) {
    for (const Maps& maps : sizes) {
      for (const cuda::FixedBank& bank : cuda::kFixedBanks) {
        for (const Epilogue kind : {Epilogue::relu, Epilogue::full}) {
          Problem problem{type, geometry(maps, {bank.size, bank.stride, 1}, 1), true, kind};
          problem.g.bank = bank.kernels;
          problem.g.named_bank = bank.code;
          const std::string name = problem.name() + " " + bank.name;
          visit("dwconv_fwd " + name, [&](Memory& m, const Device& device) { problem.forward(m, device); });
          visit("dwconv_bwd " + name, [&](Memory& m, const Device& device) { problem.backward(m, device); });
        }
      }
      if (type.dtype == DType::f32 && &maps == sizes) {
        visit_calls(Problem{type, geometry(kOnePatch, {3, 2, 1}, 1), true, Epilogue::full}, visit);
      }
      for (const Window& window : kWindows) {
        for (int way = 0; way < 12; ++way) {
          const DepthwiseGeometry g = geometry(maps, window, 1 + way / 6);
          visit_calls(Problem{type, g, way % 2 == 1, static_cast<Epilogue>(way / 2 % 3)}, visit);
        }
      }
    }
  }
}

void record_launches() {
  settings().dry = true;
  std::set<std::tuple<int, std::uint64_t, std::uint64_t, std::size_t>> rows;
  for (const Device& device : kDevices) {
    settings().shared_limit = device.shared_bytes;
    visit_all(kLarge, [&](const std::string&, auto call) {
      Memory memory(true);
      call(memory, device);
    });
    for (const auto& [kernel, grid, block, shared_bytes] : settings().launched) {
      const std::uint64_t threads = std::uint64_t{block.x} * block.y * block.z;
      rows.insert({device.capability, static_cast<const char*>(kernel) - &__executable_start, threads, shared_bytes});
    }
    settings().launched.clear();
  }
  const char* separator = "[";
  for (const auto& [arch, address, threads, shared] : rows) {
    std::printf("%s{\"arch\": %d, \"address\": %llu, \"threads\": %llu, \"shared\": %zu}\n", separator, arch,
                static_cast<unsigned long long>(address), static_cast<unsigned long long>(threads), shared);
    separator = ",";
  }
  std::printf("]\n");
}

// How many calls went wrong.
int run_small(const std::string& only, int every) {
  settings().shared_limit = kHost.shared_bytes;
  int number = 0, wrong = 0;
  visit_all(kSmall, [&](const std::string& name, auto call) {
    if (name.find(only) == std::string::npos || number++ % every) return;
    try {
      Memory memory(false);
      call(memory, kHost);
      cuda_host::synchronize();
      std::printf("%s: %016llx\n", name.c_str(), static_cast<unsigned long long>(memory.hash()));
    } catch (const std::exception& error) {
      std::printf("%s: %s\n", name.c_str(), error.what());
      ++wrong;
    }
  });
  if (number == 0) throw std::invalid_argument("no call is called " + only);
  return wrong;
}

}  // namespace

int main(int count, char** arguments) try {
  const cuda_host::Options options = cuda_host::parse_options(count, arguments, {"--dry", "--only", "--every"});
  if (options.more.contains("--dry")) {
    record_launches();
    return 0;
  }
  const auto given = [&](const char* name, const char* otherwise) {
    const auto found = options.more.find(name);
    return found == options.more.end() ? std::string(otherwise) : found->second;
  };
  const int wrong = run_small(given("--only", ""), std::stoi(given("--every", "1")));
  if (settings().record) cuda_host::print_sites();
  return wrong ? 1 : 0;
} catch (const std::exception& error) {
  std::fprintf(stderr, "%s\n", error.what());
  return 1;
}
