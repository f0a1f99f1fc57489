// What the two directions of room blurmaxpool share: sizes, the max pool's choice, the blur's weights along an axis.
//
//   input [H][W] --max, windows side by side--> pooled [Hp][Wp] --blur, stride--> output [P][Q]
//
// The blur is the outer product of one row of binomial coefficients. Along one axis, with reach = size / 2:
//
//   position `from` of the pooled map gives to output `to` only where |from - to * stride| <= reach: its weight is the
//   tap that falls on it and those that reflected padding puts on it. That is the same range seen from either side, so
//   that forward runs over the positions of an output and backward over the outputs of a position.
//
// A weight of 0 is no weight: 0 times an infinity would be a NaN.
#pragma once

#include "csrc/cuda/dwconv_tile.h"

namespace effops::cuda {

// ---- sizes ----

struct PoolSizes {
  int C, H, W;
  int window_h, window_w, pool_top, pool_left;
};

// One axis of the blur.
struct BlurAxis {
  int length, outputs, stride;  // length: of the pooled map
};

constexpr unsigned kByte = 8, kLastByte = 7;  // a size is 7 at most, so that the last byte is 0
struct Blur {
  std::uint64_t coefficients;  // the binomial ones, a byte each; zeros behind them
  float share;                 // 1 / their sum, a power of two
  int size;
  bool reflect;
  BlurAxis rows, columns;

  EFFOPS_HOST_DEVICE int reach() const { return size / 2; }
};

// Row `size` of Pascal's triangle, each the last one and its shift: no byte carries.
EFFOPS_HOST_DEVICE constexpr std::uint64_t binomial_coefficients(index_t size) {
  std::uint64_t row = 1;
  for (index_t n = 1; n < size; ++n) row += row << kByte;
  return row;
}

inline PoolSizes pool_sizes(const BlurMaxPoolArgs& a) {
  narrow(2 * (a.H + 2 * a.pool_top) + a.size);  // no sum of positions that a kernel forms is larger
  narrow(2 * (a.W + 2 * a.pool_left) + a.size);
  return {narrow(a.C),        narrow(a.H),        narrow(a.W),        narrow(a.window_h),
          narrow(a.window_w), narrow(a.pool_top), narrow(a.pool_left)};
}

inline Blur blur_of(const BlurMaxPoolArgs& a) {
  return {binomial_coefficients(a.size),
          1.f / static_cast<float>(1 << (a.size - 1)),
          narrow(a.size),
          a.reflect,
          {narrow(a.Hp), narrow(a.P), narrow(a.stride_h)},
          {narrow(a.Wp), narrow(a.Q), narrow(a.stride_w)}};
}

// Whether threads can own pairs of channels; whether columns of a row are told apart in 32 bits.
template <class T>
bool pairs_of(const BlurMaxPoolArgs& a) {
  DepthwiseGeometry g{};
  g.C = a.C, g.multiplier = 1;
  Access access(g);
  for (const TensorRef& map : {a.input, a.output, a.grad_input}) access.need(map, sizeof(T));
  return access.pairs();
}
inline bool short_columns(const BlurMaxPoolArgs& a) {
  return std::max(a.input.w * a.W, a.output.w * a.Q) <= std::numeric_limits<int>::max();
}

// Windows of Window x Window and a filter of Size x Size with stride Stride.
template <int Window, int Size, int Stride>
bool is_known(const BlurMaxPoolArgs& a) {
  return a.window_h == Window && a.window_w == Window && a.size == Size && a.stride_h == Stride &&
         a.stride_w == Stride && short_columns(a);
}

// ---- the blur ----

template <class C>
EFFOPS_DEVICE C blur_tap(const Blur& blur, int tap) {
  const unsigned place = static_cast<unsigned>(tap), byte = place < kLastByte ? place : kLastByte;
  return static_cast<C>(static_cast<unsigned>(blur.coefficients >> (kByte * byte)) & 0xffu) *
         static_cast<C>(blur.share);
}

template <class C>
EFFOPS_DEVICE C blur_weight(const Blur& blur, const BlurAxis& axis, int from, int to) {
  if (!inside(from, axis.length) || !inside(to, axis.outputs)) return C(0);
  const int first = to * axis.stride - (blur.size - 1) / 2;  // where the first tap falls
  C weight = blur_tap<C>(blur, from - first);
  if (blur.reflect) {
    if (from > 0) weight += blur_tap<C>(blur, -from - first);
    if (from < axis.length - 1) weight += blur_tap<C>(blur, 2 * (axis.length - 1) - from - first);
  }
  return weight;
}

template <class C>
EFFOPS_DEVICE C weighted(C weight, C value) {
  return weight == C(0) ? C(0) : weight * value;
}

// The nearest position of an axis. What is loaded for a position beyond an edge has no weight; what a pool window has
// there is one of its own pixels once more.
EFFOPS_DEVICE int clamped(int position, int length) {
  return position < 0 ? 0 : position < length ? position : length - 1;
}

// begin .. end - 1
struct BlurRange {
  int begin, end;
};
// The positions that an output takes from.
EFFOPS_DEVICE BlurRange positions_of(const Blur& blur, const BlurAxis& axis, int to) {
  const int begin = to * axis.stride - blur.reach(), end = to * axis.stride + blur.reach() + 1;
  return {begin < 0 ? 0 : begin, end < axis.length ? end : axis.length};
}
// The outputs that take from positions first .. last.
EFFOPS_DEVICE BlurRange outputs_of(const Blur& blur, const BlurAxis& axis, int first, int last) {
  const int lowest = first - blur.reach(), end = (last + blur.reach()) / axis.stride + 1;
  return {lowest <= 0 ? 0 : (lowest + axis.stride - 1) / axis.stride, end < axis.outputs ? end : axis.outputs};
}

}  // namespace effops::cuda
