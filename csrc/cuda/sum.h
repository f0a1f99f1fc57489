// Deterministic sums of partial results: no atomics, every addition in an order that the sizes alone decide.
//
//   a thread    sums over its pixels, in registers                                            (the rooms' kernels)
//   a block     block_sums: shuffles, then one line of shared memory a warp
//   -> partial  [lines][segments][D]: one line a block; segment: a tap of the weight, or one of bias, scale, shift
//   sum_lines   adds the lines: 32 columns x 8 lines a block, in double -> the vectors' gradients, or the first line
//   fold_bank   where channels share kernels: a warp adds the channels o % bank of a tap -> the weight's gradient
//
// Partial results are of the compute type.
#pragma once

#include <algorithm>

#include "csrc/cuda/launch.h"
#include "csrc/cuda/math.h"

namespace effops::cuda {

// ---- in a block ----

// How the threads of a block share pixels and groups of N channels: thread = pixel_lane * channel_lanes + channel_lane,
// channel_lanes a power of two of at most 32.
struct Lanes {
  int channel_lanes;
  EFFOPS_DEVICE int channel() const { return static_cast<int>(threadIdx.x) % channel_lanes; }
  EFFOPS_DEVICE int pixel() const { return static_cast<int>(threadIdx.x) / channel_lanes; }
  EFFOPS_DEVICE int pixels(int threads) const { return threads / channel_lanes; }
};

// The fewest lanes that cover the groups, up to a warp.
inline int channel_lanes_for(index_t groups) {
  int lanes = 1;
  while (lanes < kWarp && lanes < groups) lanes *= 2;
  return lanes;
}

// Shared memory that block_sums needs.
template <class C, int N>
constexpr int block_sums_bytes(int threads) {
  return 2 * (threads / kWarp) * kWarp * N * static_cast<int>(sizeof(C));
}

// Over the pixel lanes of a block, one call after the other: v becomes the block's sums in the threads of pixel lane 0.
// All threads of the block call it. `turn` counts the calls: neighbours use different halves of the shared memory, so
// that one barrier a call is enough.
template <int N, class C>
EFFOPS_DEVICE void block_sums(const Lanes& lanes, int turn, C (&v)[N]) {
  const int thread = static_cast<int>(threadIdx.x), warps = static_cast<int>(blockDim.x) / kWarp;
  EFFOPS_UNROLL
  for (int j = 0; j < N; ++j) {
    for (int mask = lanes.channel_lanes; mask < kWarp; mask *= 2) v[j] += shuffle_xor(v[j], mask);
  }
  C* lines = shared_memory<C>() + (turn & 1) * warps * kWarp * N;  // [warps][N][channel lanes]
  const int line = lanes.channel_lanes * N, lane = thread % kWarp;
  if (lane < lanes.channel_lanes) {
    EFFOPS_UNROLL
    for (int j = 0; j < N; ++j) lines[thread / kWarp * line + j * lanes.channel_lanes + lane] = v[j];
  }
  barrier();
  if (thread >= lanes.channel_lanes) return;
  EFFOPS_UNROLL
  for (int j = 0; j < N; ++j) {
    C total = lines[j * lanes.channel_lanes + thread];
    for (int warp = 1; warp < warps; ++warp) total += lines[warp * line + j * lanes.channel_lanes + thread];
    v[j] = total;
  }
}

// ---- over the blocks ----

// Where a segment's sums go; data == nullptr: they are not wanted.
struct SumTarget {
  void* data = nullptr;
  DType dtype = DType::f32;
  int row = 0;  // elements of a row, where rows lie `pitch` elements apart; 0: there is one
  index_t pitch = 0;
};

constexpr int kMaxVectors = 3;  // bias, scale, shift

struct SumLines {
  void* partial;  // [lines][segments][D]; with no lines, room for one all the same
  int lines, segments, D;
  bool in_place;  // the sums go to the first line, for fold_bank; else `vector`, one a segment
  SumTarget vector[kMaxVectors];
};

struct FoldBank {
  const void* sums;  // [taps][D]
  int taps, D, bank;
  SumTarget weight;  // [bank][taps]
};

EFFOPS_DEVICE void store_as(const SumTarget& target, index_t at, double value) {
  switch (target.dtype) {
    case DType::f32:
      static_cast<float*>(target.data)[at] = static_cast<float>(value);
      return;
    case DType::f64:
      static_cast<double*>(target.data)[at] = value;
      return;
    case DType::bf16:
      static_cast<bfloat16_t*>(target.data)[at] = from_float<bfloat16_t>(static_cast<float>(value));
      return;
    case DType::f16:
      static_cast<half_t*>(target.data)[at] = from_float<half_t>(static_cast<float>(value));
      return;
  }
}

constexpr int kSumThreads = 256, kSumGroups = kSumThreads / kWarp;

// A block owns 32 columns; warp i adds the lines i, i + 8, ..., the first warp what the others have.
template <class C>
EFFOPS_KERNEL(kSumThreads, 8)
sum_lines_kernel(EFFOPS_PARAMS SumLines a) {
  double* shared = shared_memory<double>();  // [8][32]
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarp, group = thread / kWarp;
  const index_t width = static_cast<index_t>(a.segments) * a.D;
  const index_t column = static_cast<index_t>(blockIdx.x) * kWarp + lane;
  C* partial = static_cast<C*>(a.partial);
  double sum = 0;
  if (column < width) {
    for (int line = group; line < a.lines; line += kSumGroups) sum += partial[line * width + column];
  }
  shared[thread] = sum;
  barrier();
  if (group > 0 || column >= width) return;
  for (int i = 1; i < kSumGroups; ++i) sum += shared[i * kWarp + lane];
  if (a.in_place) {
    partial[column] = static_cast<C>(sum);
    return;
  }
  const int segment = static_cast<int>(column / a.D), o = static_cast<int>(column % a.D);
  EFFOPS_UNROLL
  for (int i = 0; i < kMaxVectors; ++i) {  // a constant index: the parameters stay where they are
    const SumTarget& to = a.vector[i];
    if (segment != i || to.data == nullptr) continue;
    store_as(to, to.row == 0 ? o : o / to.row * to.pitch + o % to.row, sum);
  }
}

// A warp owns one tap of one kernel.
template <class C>
EFFOPS_KERNEL(kSumThreads, 8)
fold_bank_kernel(EFFOPS_PARAMS FoldBank a) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  const index_t element = static_cast<index_t>(blockIdx.x) * kSumGroups + warp;
  const index_t kernel = element / a.taps, tap = element % a.taps;
  const C* sums = static_cast<const C*>(a.sums) + tap * a.D;
  double sum = 0;
  for (index_t o = kernel + static_cast<index_t>(lane) * a.bank; o < a.D; o += static_cast<index_t>(kWarp) * a.bank) {
    sum += sums[o];
  }
  EFFOPS_UNROLL
  for (int mask = kWarp / 2; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
  if (lane == 0 && kernel < a.bank) store_as(a.weight, element, sum);
}

// A grid along x: the one axis with room for 2^31 blocks.
inline Shape grid_of(index_t blocks, int threads, std::size_t shared_bytes) {
  return {dim3(static_cast<unsigned>(narrow(blocks))), dim3(static_cast<unsigned>(threads)), shared_bytes};
}

// Bytes of the partial results.
template <class C>
std::size_t partial_bytes(index_t lines, index_t segments, index_t D) {
  const std::size_t bytes = static_cast<std::size_t>(std::max<index_t>(lines, 1)) * segments * D * sizeof(C);
  return (bytes + 255) / 256 * 256;
}

template <class C>
void sum_lines(const SumLines& job, Stream stream) {
  const index_t blocks = (static_cast<index_t>(job.segments) * job.D + kWarp - 1) / kWarp;
  launch(sum_lines_kernel<C>, grid_of(blocks, kSumThreads, kSumThreads * sizeof(double)), stream, job);
}

// partial [lines][taps][D] -> the gradient of the weight [bank][taps].
template <class C>
void sum_weight(void* partial, int lines, int taps, int D, int bank, const SumTarget& weight, Stream stream) {
  sum_lines<C>({partial, lines, taps, D, true, {}}, stream);
  const index_t blocks = (static_cast<index_t>(bank) * taps + kSumGroups - 1) / kSumGroups;
  launch(fold_bank_kernel<C>, grid_of(blocks, kSumThreads, 0), stream, FoldBank{partial, taps, D, bank, weight});
}

}  // namespace effops::cuda
