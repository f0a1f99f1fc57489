// Which kernels the host functions launch, and with how many threads and bytes of shared memory, for problems that reach
// all they choose from: as JSON, for cuda_compile.py. Nothing is run, so the maps need not be there.
#include <cstdio>
#include <initializer_list>
#include <set>
#include <tuple>

#include "csrc/cuda/kernels.h"
#include "tests/cuda_host/shim.h"

extern "C" const char __executable_start;  // the linker's: where the program lies in memory

namespace {

using namespace effops;
using cuda::Device;
using cuda_host::settings;

constexpr Device kDevices[] = {{108, 163 << 10, 80}, {132, 227 << 10, 90}, {148, 227 << 10, 100}};
constexpr DType kDtypes[] = {DType::f32, DType::bf16, DType::f64, DType::f16};

void* somewhere() { return reinterpret_cast<void*>(std::uintptr_t{1} << 20); }

struct Window {
  index_t size, stride, dilation;
};
constexpr Window kWindows[] = {{3, 1, 1}, {3, 2, 1}, {5, 1, 1}, {5, 2, 1}, {7, 1, 1}, {3, 1, 2}, {1, 1, 1}};

struct Maps {
  index_t images, channels, size;
};
constexpr Maps kMaps[] = {{8, 64, 56}, {1, 512, 7}, {8, 33, 28}, {128, 28, 14}, {1, 8, 112}, {0, 64, 56}};

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

TensorRef map(index_t channels, index_t size, bool channels_last) {
  if (channels_last) return {somewhere(), channels * size * size, 1, size * channels, channels};
  return {somewhere(), channels * size * size, size * size, size, 1};
}

EpilogueRef epilogue(bool full, DType dtype, const TensorRef& residual) {
  EpilogueRef e;
  if (!full) return e;
  e.bias = e.scale = e.shift = {somewhere(), 1, dtype};
  e.residual = residual;
  e.activation = Activation::silu;
  e.post = Activation::relu;
  return e;
}

EpilogueGrads gradients(bool full, DType dtype, const TensorRef& residual) {
  EpilogueGrads grads;
  if (!full) return grads;
  grads.bias = grads.scale = grads.shift = somewhere();
  grads.bias_dtype = grads.scale_dtype = grads.shift_dtype = dtype;
  grads.residual = residual;
  return grads;
}

// One layer, in every way that the host functions tell apart.
struct Problem {
  DType dtype;
  DepthwiseGeometry g;
  bool channels_last, full;
  const Device& device;

  TensorRef input() const { return map(g.C, g.H, channels_last); }
  TensorRef output(index_t channels) const { return map(channels, g.P, channels_last); }
  EpilogueRef epilogue_of(index_t channels) const { return epilogue(full, dtype, output(channels)); }

  void depthwise() const {
    const index_t D = g.out_channels();
    cuda::dwconv_fwd(dtype, {g, input(), output(D), somewhere(), epilogue_of(D)}, device, nullptr);
    DwconvBackwardArgs args{g, output(D), output(D), input(), somewhere(), epilogue_of(D), input()};
    cuda::dwconv_bwd(dtype, args, device, somewhere(), nullptr);
    args.grad_weight = somewhere();
    args.grads = gradients(full, dtype, output(D));
    for (bool saved : {true, false}) {
      if (!saved) args.output = {};
      cuda::dwconv_bwd(dtype, args, device, somewhere(), nullptr);
    }
  }

  void statistics() const {
    const ChannelRef bias{somewhere(), 1, dtype};
    cuda::dwconv_stats(dtype, {g, input(), somewhere(), bias, somewhere(), somewhere()}, device, somewhere(), nullptr);
    DwconvStatsBackwardArgs args{g, input(), somewhere(), bias, somewhere(), somewhere(), somewhere(), somewhere()};
    args.grad_input = input();
    args.grad_weight = args.grad_bias = somewhere();
    args.grad_bias_dtype = dtype;
    cuda::dwconv_stats_bwd(dtype, args, device, somewhere(), nullptr);
  }

  void separable(index_t K, index_t passthrough, bool tf32) const {
    const index_t D = g.out_channels();
    DsconvForwardArgs forward{};
    forward.g = g;
    forward.passthrough_channels = passthrough;
    forward.K = K;
    forward.input = input();
    forward.output = output(K);
    if (passthrough) forward.passthrough = output(passthrough);
    forward.dw_weight = forward.pw_weight = somewhere();
    forward.dw_epilogue = epilogue_of(D);
    forward.pw_stride_k = passthrough + D;
    forward.pw_stride_c = 1;
    forward.pw_epilogue = epilogue_of(K);
    cuda::dsconv_fwd(dtype, forward, tf32, device, nullptr);

    DsconvBackwardArgs backward{forward, output(K), input()};
    if (passthrough) backward.grad_passthrough = output(passthrough);
    backward.grad_dw_weight = backward.grad_pw_weight = somewhere();
    backward.dw_grads = gradients(full, dtype, output(D));
    backward.pw_grads = gradients(full, dtype, output(K));
    for (bool saved : {true, false}) {
      if (!saved) backward.forward.output = {};
      cuda::dsconv_bwd(dtype, backward, tf32, device, somewhere(), nullptr);
    }
  }
};

void launch_all(const Device& device) {
  for (DType dtype : kDtypes) {
    for (const Maps& maps : kMaps) {
      for (const Window& window : kWindows) {
        for (int way = 0; way < 8; ++way) {
          const bool channels_last = way & 1, full = way & 2;
          const Problem problem{dtype, geometry(maps, window, way & 4 ? 2 : 1), channels_last, full, device};
          problem.depthwise();
          problem.statistics();
          for (bool tf32 : {false, true}) {
            for (index_t K : {16, 64, 256}) problem.separable(K, K == 16 ? 0 : maps.channels, tf32);
          }
        }
      }
    }
  }
}

}  // namespace

int main() {
  settings().dry = true;
  std::set<std::tuple<int, std::uint64_t, std::uint64_t, std::size_t>> rows;
  for (const Device& device : kDevices) {
    settings().shared_limit = device.shared_bytes;
    launch_all(device);
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
