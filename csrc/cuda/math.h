// Arithmetic of one thread on a few channels of a pixel: compute types, activations and their derivatives, the epilogue
// post(act(conv + bias) * scale + shift + residual) and its gradient, all on registers. Shared by the rooms.
//
// Arrays of channels have a compile-time length and are indexed by unrolled loops only, so they are registers. Which
// activation it is, a uniform branch tells at run time.
#pragma once

#include <cmath>
#include <limits>
#include <stdexcept>
#include <type_traits>

#include "csrc/args.h"
#include "csrc/cuda/device.h"

namespace effops::cuda {

// ---- types ----

// What sums and products are made in: float, or double for double.
template <class T>
using compute = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <class T>
EFFOPS_DEVICE compute<T> to_compute(T x) {
  if constexpr (sizeof(T) == 2) {
    return to_float(x);
  } else {
    return x;
  }
}

template <class T>
EFFOPS_DEVICE T from_compute(compute<T> x) {
  if constexpr (sizeof(T) == 2) {
    return from_float<T>(x);
  } else {
    return x;
  }
}

// The DType of T.
template <class T>
constexpr DType dtype_of = std::is_same_v<T, double>       ? DType::f64
                           : std::is_same_v<T, float>      ? DType::f32
                           : std::is_same_v<T, bfloat16_t> ? DType::bf16
                                                           : DType::f16;

// ---- sizes ----

inline int narrow(index_t value) {
  if (value < 0 || value > std::numeric_limits<int>::max())
    throw std::runtime_error(
        "effops: a CUDA kernel counts channels, padded rows, padded columns and blocks in 32 bits");
  return static_cast<int>(value);
}

// ---- maps ----

// A TensorRef whose elements have a type.
template <class T>
struct Map {
  T* data;
  index_t n, c, h, w;
  EFFOPS_DEVICE T* at(index_t image, index_t channel, index_t row, index_t column) const {
    return data + image * n + channel * c + row * h + column * w;
  }
};

template <class T>
Map<T> map_of(const TensorRef& ref) {
  return {static_cast<T*>(ref.data), ref.n, ref.c, ref.h, ref.w};
}

// N elements that lie side by side, as memory has them: in one access where they are 16 bytes at most.
template <class T, int N>
struct Pieces {
  static constexpr int kLength = sizeof(T) * N <= 16 ? N : 16 / sizeof(T);
  Vec<T, kLength> piece[N / kLength];

  EFFOPS_DEVICE void load(const T* at) {
    EFFOPS_UNROLL
    for (int i = 0; i < N / kLength; ++i) piece[i] = load_vec<T, kLength>(at + i * kLength);
  }
  EFFOPS_DEVICE void store(T* at) const {
    EFFOPS_UNROLL
    for (int i = 0; i < N / kLength; ++i) store_vec<T, kLength>(at + i * kLength, piece[i]);
  }
  EFFOPS_DEVICE T& operator[](int j) { return piece[j / kLength].v[j % kLength]; }
  EFFOPS_DEVICE const T& operator[](int j) const { return piece[j / kLength].v[j % kLength]; }
};

// N channels that lie side by side (N == 1: anywhere).
template <int N, class T>
EFFOPS_DEVICE void load_channels(const T* at, compute<T> (&v)[N]) {
  Pieces<std::remove_const_t<T>, N> raw;
  raw.load(at);
  EFFOPS_UNROLL
  for (int j = 0; j < N; ++j) v[j] = to_compute(raw[j]);
}

template <int N, class T>
EFFOPS_DEVICE void store_channels(T* at, const compute<T> (&v)[N]) {
  Pieces<T, N> raw;
  EFFOPS_UNROLL
  for (int j = 0; j < N; ++j) raw[j] = from_compute<T>(v[j]);
  raw.store(at);
}

template <int N, class C>
EFFOPS_DEVICE void fill(C (&v)[N], C value) {
  EFFOPS_UNROLL
  for (int j = 0; j < N; ++j) v[j] = value;
}

// Element i of a per-channel vector, whose dtype is float32 or that of the maps.
template <class T>
EFFOPS_DEVICE compute<T> read_channel(const ChannelRef& vector, int i) {
  const index_t at = i * vector.stride;
  if constexpr (!std::is_same_v<T, float>) {
    if (vector.dtype != DType::f32) return to_compute(static_cast<const T*>(vector.data)[at]);
  }
  return static_cast<const float*>(vector.data)[at];
}

// Channels o .. o + N - 1 of it, or `absent`.
template <class T, int N>
EFFOPS_DEVICE void read_channels(const ChannelRef& vector, int o, compute<T> absent, compute<T> (&v)[N]) {
  fill(v, absent);
  if (vector.data == nullptr) return;
  EFFOPS_UNROLL
  for (int j = 0; j < N; ++j) v[j] = read_channel<T>(vector, o + j);
}

// ---- max pools ----

// Whether a max pool takes the second of two values. As torch's: of equal ones the first, of NaNs the last.
template <class C>
EFFOPS_DEVICE bool takes_second(C first, C second) {
  return second > first || second != second;
}

// ---- activations ----

EFFOPS_DEVICE float exp_of(float x) { return expf(x); }
EFFOPS_DEVICE double exp_of(double x) { return exp(x); }
EFFOPS_DEVICE float erfc_of(float x) { return erfcf(x); }
EFFOPS_DEVICE double erfc_of(double x) { return erfc(x); }

template <class C>
EFFOPS_DEVICE C sigmoid(C u) {
  return C(1) / (C(1) + exp_of(-u));
}

// relu6(u + 3) / 6. Comparisons are written so that a NaN passes.
template <class C>
EFFOPS_DEVICE C hard_gate(C u) {
  const C t = u + C(3);
  return (t < C(0) ? C(0) : t > C(6) ? C(6) : t) / C(6);
}

// The normal distribution function, from the tail: small values far below zero keep their digits.
template <class C>
EFFOPS_DEVICE C normal_cdf(C u) {
  return C(0.5) * erfc_of(u * C(-0.70710678118654752440));
}

// The functions of one value; at the kinks of the derivatives: torch's choice.
template <Activation A, class C>
EFFOPS_DEVICE C activate_one(C u, C slope) {
  if constexpr (A == Activation::relu) return u < C(0) ? C(0) : u;
  if constexpr (A == Activation::relu6) return u < C(0) ? C(0) : u > C(6) ? C(6) : u;
  if constexpr (A == Activation::leaky_relu) return u > C(0) ? u : u * slope;
  if constexpr (A == Activation::silu) return u / (C(1) + exp_of(-u));
  if constexpr (A == Activation::hardswish) return u * hard_gate(u);
  if constexpr (A == Activation::hardsigmoid) return hard_gate(u);
  if constexpr (A == Activation::sigmoid) return sigmoid(u);
  if constexpr (A == Activation::gelu) return u * normal_cdf(u);
  return u;
}

template <Activation A, class C>
EFFOPS_DEVICE C slope_one(C u, C slope) {
  if constexpr (A == Activation::relu) return u > C(0) ? C(1) : C(0);
  if constexpr (A == Activation::relu6) return u > C(0) && u < C(6) ? C(1) : C(0);
  if constexpr (A == Activation::leaky_relu) return u > C(0) ? C(1) : slope;
  if constexpr (A == Activation::hardswish) return u > C(-3) ? (u < C(3) ? u / C(3) + C(0.5) : C(1)) : C(0);
  if constexpr (A == Activation::hardsigmoid) return u > C(-3) && u < C(3) ? C(1) / C(6) : C(0);
  if constexpr (A == Activation::gelu) return normal_cdf(u) + u * C(0.39894228040143267794) * exp_of(u * u * C(-0.5));
  if constexpr (A == Activation::silu || A == Activation::sigmoid) {
    const C s = sigmoid(u);
    return A == Activation::silu ? s * (C(1) + u * (C(1) - s)) : s * (C(1) - s);
  }
  return C(1);
}

// f(constant of the activation): one branch for all that f does.
template <class F>
EFFOPS_DEVICE void with_activation(Activation activation, const F& f) {
  using enum Activation;
  switch (activation) {
    case none:
      return f(std::integral_constant<Activation, none>{});
    case relu:
      return f(std::integral_constant<Activation, relu>{});
    case relu6:
      return f(std::integral_constant<Activation, relu6>{});
    case leaky_relu:
      return f(std::integral_constant<Activation, leaky_relu>{});
    case silu:
      return f(std::integral_constant<Activation, silu>{});
    case hardswish:
      return f(std::integral_constant<Activation, hardswish>{});
    case hardsigmoid:
      return f(std::integral_constant<Activation, hardsigmoid>{});
    case Activation::sigmoid:
      return f(std::integral_constant<Activation, Activation::sigmoid>{});
    case gelu:
      return f(std::integral_constant<Activation, gelu>{});
  }
}

template <int N, class C>
EFFOPS_DEVICE void activate(Activation activation, C slope, C (&v)[N]) {
  with_activation(activation, [&](auto kind) {
    EFFOPS_UNROLL
    for (int j = 0; j < N; ++j) v[j] = activate_one<decltype(kind)::value>(v[j], slope);
  });
}

// g *= activate'(u)
template <int N, class C>
EFFOPS_DEVICE void times_slope(Activation activation, C slope, const C (&u)[N], C (&g)[N]) {
  with_activation(activation, [&](auto kind) {
    EFFOPS_UNROLL
    for (int j = 0; j < N; ++j) g[j] *= slope_one<decltype(kind)::value>(u[j], slope);
  });
}

// The same from y = activate(u), for the activations whose output tells it: relu, relu6, sigmoid, leaky_relu with a
// positive slope.
template <int N, class C>
EFFOPS_DEVICE void times_slope_from_output(Activation activation, C slope, const C (&y)[N], C (&g)[N]) {
  EFFOPS_UNROLL
  for (int j = 0; j < N; ++j) {
    const C high = activation == Activation::relu6 ? C(6) : C(INFINITY);
    const C below = activation == Activation::leaky_relu ? slope : C(0);
    const C step = y[j] > C(0) ? (y[j] < high ? C(1) : C(0)) : below;
    g[j] *= activation == Activation::sigmoid ? y[j] * (C(1) - y[j]) : step;
  }
}

// ---- the epilogue on N channels of one pixel ----

// Kernels take an EpilogueRef as it is. v: M / N pixels of N channels each, from o on, to which `bias` has been added
// already; `residual` is zeros where there is none. Several pixels at a time share the branches and the vectors.
template <class T, int N, int M>
EFFOPS_DEVICE void apply_epilogue_rows(const EpilogueRef& e, int o, const compute<T> (&residual)[M],
                                       compute<T> (&v)[M]) {
  using C = compute<T>;
  const C slope = static_cast<C>(e.slope);
  activate(e.activation, slope, v);
  if (e.scale.data != nullptr || e.shift.data != nullptr) {
    C scale[N], shift[N];
    read_channels<T>(e.scale, o, C(1), scale);
    read_channels<T>(e.shift, o, C(0), shift);
    EFFOPS_UNROLL
    for (int j = 0; j < M; ++j) v[j] = v[j] * scale[j % N] + shift[j % N];
  }
  EFFOPS_UNROLL
  for (int j = 0; j < M; ++j) v[j] += residual[j];
  activate(e.post, slope, v);
}

// The same for one pixel.
template <class T, int N>
EFFOPS_DEVICE void apply_epilogue(const EpilogueRef& e, int o, const compute<T> (&residual)[N], compute<T> (&v)[N]) {
  apply_epilogue_rows<T, N>(e, o, residual, v);
}

// What the gradient of an epilogue gives at one pixel besides that of the sums.
template <class C, int N>
struct EpilogueTerms {
  C residual[N];  // d loss / d residual; summed over pixels: d loss / d shift
  C scale[N];     // summed over pixels: d loss / d scale
};

// Whether the gradient of an epilogue depends on the sums themselves, so that they must be computed again.
inline bool needs_sums(const EpilogueRef& e, const EpilogueGrads& grads) {
  return e.activation != Activation::none || e.post != Activation::none || grads.scale != nullptr;
}

// g: d loss / d output on entry, d loss / d (conv + bias) on exit. u: conv + bias; any value where needs_sums() is
// false. residual: needed under a post activation only, zeros where there is none.
template <class T, int N>
EFFOPS_DEVICE void epilogue_gradient(const EpilogueRef& e, int o, const compute<T> (&u)[N],
                                     const compute<T> (&residual)[N], compute<T> (&g)[N],
                                     EpilogueTerms<compute<T>, N>& terms) {
  using C = compute<T>;
  const C slope = static_cast<C>(e.slope);
  C scale[N], activated[N];
  read_channels<T>(e.scale, o, C(1), scale);
  EFFOPS_UNROLL
  for (int j = 0; j < N; ++j) activated[j] = u[j];
  activate(e.activation, slope, activated);
  if (e.post != Activation::none) {
    C y[N];
    read_channels<T>(e.shift, o, C(0), y);
    EFFOPS_UNROLL
    for (int j = 0; j < N; ++j) y[j] += activated[j] * scale[j] + residual[j];
    times_slope(e.post, slope, y, g);
  }
  EFFOPS_UNROLL
  for (int j = 0; j < N; ++j) {
    terms.residual[j] = g[j];
    terms.scale[j] = g[j] * activated[j];
    g[j] *= scale[j];
  }
  times_slope(e.activation, slope, u, g);
}

// The same under an activation alone whose output y tells the derivative.
template <class T, int N>
EFFOPS_DEVICE void epilogue_gradient_from_output(const EpilogueRef& e, const compute<T> (&y)[N], compute<T> (&g)[N]) {
  times_slope_from_output(e.activation, static_cast<compute<T>>(e.slope), y, g);
}

}  // namespace effops::cuda
