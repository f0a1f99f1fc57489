// Activations and their derivatives on vectors. Included inside namespace effops::<isa>::{anonymous}; see kernels.inl.

// exp for float by Cody-Waite reduction and a degree-6 polynomial: 2 ulp where the result is normal, 0 and infinity
// beyond.
EFFOPS_INLINE vec<float> exp_vec(vec<float> x) {
  typedef vmask<float> ivec;
  x = at_most<float>(at_least<float>(x, splat(-88.0f)), splat(89.0f));  // n = -127 gives 0, n = 128 infinity
  const vec<float> magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer in the low mantissa bits
  const vec<float> biased = x * 1.44269504088896341f + magic;
  const vec<float> n = biased - magic;
  vec<float> r = x - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  vec<float> p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const ivec exponent = ((ivec)biased - (ivec)magic + 127) << 23;
  return p * (vec<float>)exponent;
}
EFFOPS_INLINE vec<double> exp_vec(vec<double> x) {
  for (index_t i = 0; i < kLanes<double>; ++i) x[i] = __builtin_exp(x[i]);
  return x;
}

// The normal distribution function, gelu's factor. For float: near zero an even polynomial times u (relative error
// 1e-9); further out Abramowitz and Stegun 7.1.26, from the tail and not from 1 - erf, so that small values far below
// zero keep their digits.
EFFOPS_INLINE vec<float> normal_cdf(vec<float> u) {
  const vec<float> x = u * 0.70710678f, square = x * x;
  vec<float> q = splat(7.8538505477e-5f);
  q = q * square - 8.0101902103e-4f;
  q = q * square + 5.1883272827e-3f;
  q = q * square - 2.6853810996e-2f;
  q = q * square + 1.1283585429e-1f;
  q = q * square - 3.7612625957e-1f;
  q = q * square + 1.1283791065f;
  const vec<float> near = 0.5f + 0.5f * x * q;
  const vec<float> a = x < 0.0f ? -x : x;
  const vec<float> t = 1.0f / (1.0f + 0.3275911f * a);
  vec<float> p = splat(1.061405429f);
  p = p * t - 1.453152027f;
  p = p * t + 1.421413741f;
  p = p * t - 0.284496736f;
  p = p * t + 0.254829592f;
  const vec<float> tail = 0.5f * p * t * exp_vec(-square);
  const vec<float> far = x < 0.0f ? tail : 1.0f - tail;
  return a <= 1.0f ? near : far;
}
EFFOPS_INLINE vec<double> normal_cdf(vec<double> u) {
  for (index_t i = 0; i < kLanes<double>; ++i) u[i] = 0.5 * __builtin_erfc(u[i] * -0.70710678118654752440);
  return u;
}

template <class C>
EFFOPS_INLINE vec<C> sigmoid_vec(vec<C> x) {
  return C(1) / (C(1) + exp_vec(-x));
}

// Not inlined: one copy an ISA; the callers test for `none` and for clamps themselves.
template <class C>
__attribute__((noinline)) void activate(Activation activation, C slope, vec<C>& v) {
  const vec<C> zero{};
  switch (activation) {
    case Activation::none:
      break;
    case Activation::relu:
      v = at_least<C>(v, zero);
      break;
    case Activation::relu6:
      v = at_most<C>(at_least<C>(v, zero), splat(C(6)));
      break;
    case Activation::leaky_relu:
      v = v > zero ? v : v * slope;
      break;
    case Activation::silu:
      v = v / (C(1) + exp_vec(-v));
      break;
    case Activation::hardswish:
      v = v * at_most<C>(at_least<C>(v + C(3), zero), splat(C(6))) / C(6);
      break;
    case Activation::hardsigmoid:
      v = at_most<C>(at_least<C>(v + C(3), zero), splat(C(6))) / C(6);
      break;
    case Activation::sigmoid:
      v = sigmoid_vec<C>(v);
      break;
    case Activation::gelu:
      v = v * normal_cdf(v);
      break;
  }
}

// d activate(u) / du. At the kinks: torch's choice.
template <class C>
__attribute__((noinline)) void activate_grad(Activation activation, C slope, vec<C>& u) {
  const vec<C> zero{}, one = splat(C(1));
  switch (activation) {
    case Activation::none:
      u = one;
      break;
    case Activation::relu:
      u = u > zero ? one : zero;
      break;
    case Activation::relu6:
      u = u > zero ? (u < splat(C(6)) ? one : zero) : zero;
      break;
    case Activation::leaky_relu:
      u = u > zero ? one : splat(slope);
      break;
    case Activation::silu: {
      const vec<C> s = sigmoid_vec<C>(u);
      u = s * (C(1) + u * (C(1) - s));
      break;
    }
    case Activation::hardswish: {
      const vec<C> inner = u / C(3) + C(0.5);
      u = u > splat(C(-3)) ? (u < splat(C(3)) ? inner : one) : zero;
      break;
    }
    case Activation::hardsigmoid:
      u = u > splat(C(-3)) ? (u < splat(C(3)) ? splat(C(1) / C(6)) : zero) : zero;
      break;
    case Activation::sigmoid: {
      const vec<C> s = sigmoid_vec<C>(u);
      u = s * (C(1) - s);
      break;
    }
    case Activation::gelu: {
      u = normal_cdf(u) + u * C(0.39894228040143267794) * exp_vec(u * u * C(-0.5));
      break;
    }
  }
}

// Whether y = activate(u) tells the derivative.
inline bool output_gives_gradient(Activation activation, double slope) {
  return activation == Activation::relu || activation == Activation::relu6 || activation == Activation::sigmoid ||
         (activation == Activation::leaky_relu && slope > 0);
}

// The same derivative from y, for those activations.
template <class C>
EFFOPS_INLINE vec<C> activate_grad_from_output(Activation activation, C slope, vec<C> y) {
  const vec<C> zero{}, one = splat(C(1));
  if (activation == Activation::relu) return y > zero ? one : zero;
  if (activation == Activation::relu6) return y > zero ? (y < splat(C(6)) ? one : zero) : zero;
  if (activation == Activation::leaky_relu) return y > zero ? one : splat(slope);
  return y * (C(1) - y);  // sigmoid
}
