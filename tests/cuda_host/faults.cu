// Two small kernels with everything that can be forgotten, for test_cuda_host.py to forget it (options.h).
//
//   input [blocks, tiles, threads] --> rotate_kernel: tiles by asynchronous copies into two stages, each thread takes its
//   neighbour's element, the block sums them in a tree --> partial [blocks] --> finish_kernel --> sum
//
// Prints the sum, exit status 1 if it is wrong.
#include <cstdio>
#include <exception>

#include "csrc/cuda/device.h"
#include "csrc/cuda/launch.h"
#include "tests/cuda_host/buffer.h"
#include "tests/cuda_host/options.h"

using namespace effops::cuda;
using effops::cuda_host::Buffer;
using effops::cuda_host::Options;
namespace host = effops::cuda_host;

namespace {

constexpr int kBlocks = 6, kTiles = 3, kThreads = 64;

struct RotateParams {
  const float* input;
  float* partial;
};

EFFOPS_DEVICE void fetch(float* stage, const float* tile) { copy_async<4>(stage + threadIdx.x, tile + threadIdx.x, 4); }

EFFOPS_KERNEL(kThreads, 1) rotate_kernel(EFFOPS_PARAMS RotateParams params) {
  float* stages = shared_memory<float>();
  const int thread = threadIdx.x;
  const float* tiles = params.input + blockIdx.x * kTiles * kThreads;
  float sum = 0;
  fetch(stages, tiles);
  copy_async_commit();
  for (int tile = 0; tile < kTiles; ++tile) {
    if (tile + 1 < kTiles) fetch(stages + (tile + 1) % 2 * kThreads, tiles + (tile + 1) * kThreads);
    copy_async_commit();
    copy_async_wait<1>();
    barrier();  // the tile is there, for all
    sum += stages[tile % 2 * kThreads + (thread + 1) % kThreads];
    barrier();  // nobody reads this stage any more
  }
  stages[thread] = sum;
  for (int half = kThreads / 2; half > 0; half /= 2) {
    barrier();  // for the tree: the other half is summed
    if (thread < half) stages[thread] += stages[thread + half];
  }
  if (thread == 0) params.partial[blockIdx.x] = stages[0];
}

struct FinishParams {
  const float* partial;
  float* sum;
};

EFFOPS_KERNEL(1, 1) finish_kernel(EFFOPS_PARAMS FinishParams params) {
  float sum = 0;
  for (int block = 0; block < kBlocks; ++block) sum += params.partial[block];
  *params.sum = sum;
}

bool run(const Options& options) {
  Buffer<float> input(options.size("input", kBlocks * kTiles * kThreads));
  Buffer<float> partial(options.size("partial", kBlocks));
  Buffer<float> sum(1);
  float expected = 0;
  for (std::size_t i = 0; i < input.size(); ++i) expected += input[i] = static_cast<float>(i % 31);
  launch(rotate_kernel, {kBlocks, kThreads, 2 * kThreads * sizeof(float)}, nullptr, {input.data(), partial.data()});
  launch(finish_kernel, {1, 1}, nullptr, {partial.data(), sum.data()});
  host::synchronize();
  partial.check("partial");
  sum.check("sum");
  if (host::settings().record) {
    host::print_sites();
  } else {
    std::printf("%g, expected %g\n", sum[0], expected);
  }
  return sum[0] == expected;
}

}  // namespace

int main(int count, char** arguments) try {
  return run(host::parse_options(count, arguments)) ? 0 : 1;
} catch (const std::exception& error) {
  std::fprintf(stderr, "%s\n", error.what());
  return 1;
}
