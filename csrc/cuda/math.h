// Arithmetic of one thread on a few channels of a pixel: compute types, activations and their derivatives, the epilogue
// post(act(conv + bias) * scale + shift + residual) and its gradient, all on registers. Shared by the rooms.
//
// Arrays of channels have a compile-time length and are indexed by unrolled loops only, so they are registers. Which
// activation it is, a uniform branch tells at run time.
#pragma once

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

// N channels that lie side by side (N == 1: anywhere), in one access.
template <int N, class T>
EFFOPS_DEVICE void load_channels(const T* at, compute<T> (&v)[N]) {
  const auto raw = load_vec<std::remove_const_t<T>, N>(at);
#pragma unroll
  for (int j = 0; j < N; ++j) v[j] = to_compute(raw.v[j]);
}

template <int N, class T>
EFFOPS_DEVICE void store_channels(T* at, const compute<T> (&v)[N]) {
  Vec<T, N> raw;
#pragma unroll
  for (int j = 0; j < N; ++j) raw.v[j] = from_compute<T>(v[j]);
  store_vec<T, N>(at, raw);
}

template <int N, class C>
EFFOPS_DEVICE void fill(C (&v)[N], C value) {
#pragma unroll
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
#pragma unroll
  for (int j = 0; j < N; ++j) v[j] = read_channel<T>(vector, o + j);
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

template <int N, class C>
EFFOPS_DEVICE void activate(Activation activation, C slope, C (&v)[N]) {
  switch (activation) {
    case Activation::none:
      return;
    case Activation::relu:
#pragma unroll
      for (int j = 0; j < N; ++j) v[j] = v[j] < C(0) ? C(0) : v[j];
      return;
    case Activation::relu6:
#pragma unroll
      for (int j = 0; j < N; ++j) v[j] = v[j] < C(0) ? C(0) : v[j] > C(6) ? C(6) : v[j];
      return;
    case Activation::leaky_relu:
#pragma unroll
      for (int j = 0; j < N; ++j) v[j] = v[j] > C(0) ? v[j] : v[j] * slope;
      return;
    case Activation::silu:
#pragma unroll
      for (int j = 0; j < N; ++j) v[j] = v[j] / (C(1) + exp_of(-v[j]));
      return;
    case Activation::hardswish:
#pragma unroll
      for (int j = 0; j < N; ++j) v[j] *= hard_gate(v[j]);
      return;
    case Activation::hardsigmoid:
#pragma unroll
      for (int j = 0; j < N; ++j) v[j] = hard_gate(v[j]);
      return;
    case Activation::sigmoid:
#pragma unroll
      for (int j = 0; j < N; ++j) v[j] = sigmoid(v[j]);
      return;
    case Activation::gelu:
#pragma unroll
      for (int j = 0; j < N; ++j) v[j] *= normal_cdf(v[j]);
      return;
  }
}

// d activate(u) / du of one value. At the kinks: torch's choice.
template <class C>
EFFOPS_DEVICE C slope_at(Activation activation, C slope, C u) {
  switch (activation) {
    case Activation::none:
      return C(1);
    case Activation::relu:
      return u > C(0) ? C(1) : C(0);
    case Activation::relu6:
      return u > C(0) && u < C(6) ? C(1) : C(0);
    case Activation::leaky_relu:
      return u > C(0) ? C(1) : slope;
    case Activation::silu: {
      const C s = sigmoid(u);
      return s * (C(1) + u * (C(1) - s));
    }
    case Activation::hardswish:
      return u > C(-3) ? (u < C(3) ? u / C(3) + C(0.5) : C(1)) : C(0);
    case Activation::hardsigmoid:
      return u > C(-3) && u < C(3) ? C(1) / C(6) : C(0);
    case Activation::sigmoid: {
      const C s = sigmoid(u);
      return s * (C(1) - s);
    }
    case Activation::gelu:
      return normal_cdf(u) + u * C(0.39894228040143267794) * exp_of(u * u * C(-0.5));
  }
  return C(0);
}

// g *= activate'(u)
template <int N, class C>
EFFOPS_DEVICE void times_slope(Activation activation, C slope, const C (&u)[N], C (&g)[N]) {
  if (activation == Activation::none) return;
#pragma unroll
  for (int j = 0; j < N; ++j) g[j] *= slope_at(activation, slope, u[j]);
}

// The same from y = activate(u), for the activations whose output tells it: relu, relu6, sigmoid, leaky_relu with a
// positive slope.
template <int N, class C>
EFFOPS_DEVICE void times_slope_from_output(Activation activation, C slope, const C (&y)[N], C (&g)[N]) {
  if (activation == Activation::sigmoid) {
#pragma unroll
    for (int j = 0; j < N; ++j) g[j] *= y[j] * (C(1) - y[j]);
  } else {
#pragma unroll
    for (int j = 0; j < N; ++j) g[j] *= slope_at(activation, slope, y[j]);
  }
}

// ---- the epilogue on N channels of one pixel ----

// Kernels take an EpilogueRef as it is; `bias` has been added to v already, `residual` is zeros where there is none.
template <class T, int N>
EFFOPS_DEVICE void apply_epilogue(const EpilogueRef& e, int o, const compute<T> (&residual)[N], compute<T> (&v)[N]) {
  using C = compute<T>;
  const C slope = static_cast<C>(e.slope);
  activate(e.activation, slope, v);
  if (e.scale.data != nullptr) {
#pragma unroll
    for (int j = 0; j < N; ++j) v[j] *= read_channel<T>(e.scale, o + j);
  }
  if (e.shift.data != nullptr) {
#pragma unroll
    for (int j = 0; j < N; ++j) v[j] += read_channel<T>(e.shift, o + j);
  }
#pragma unroll
  for (int j = 0; j < N; ++j) v[j] += residual[j];
  activate(e.post, slope, v);
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
#pragma unroll
  for (int j = 0; j < N; ++j) activated[j] = u[j];
  activate(e.activation, slope, activated);
  if (e.post != Activation::none) {
    C y[N];
    read_channels<T>(e.shift, o, C(0), y);
#pragma unroll
    for (int j = 0; j < N; ++j) y[j] += activated[j] * scale[j] + residual[j];
    times_slope(e.post, slope, y, g);
  }
#pragma unroll
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
