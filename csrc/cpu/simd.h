// One vector register of the ISA this file is included for, as a GCC vector type: arithmetic is written with operators,
// and what the operators can't say (partial loads, conversions, min/max that keep NaN) stands here once. Included
// inside namespace effops::<isa>::{anonymous}; see kernels.inl.

template <class T>
struct VecOf;
template <>
struct VecOf<float> {
  typedef float type __attribute__((vector_size(EFFOPS_VECTOR_BYTES), may_alias));
  typedef std::int32_t mask __attribute__((vector_size(EFFOPS_VECTOR_BYTES), may_alias));
};
template <>
struct VecOf<double> {
  typedef double type __attribute__((vector_size(EFFOPS_VECTOR_BYTES), may_alias));
  typedef std::int64_t mask __attribute__((vector_size(EFFOPS_VECTOR_BYTES), may_alias));
};
template <class C>
using vec = typename VecOf<C>::type;
template <class C>
using vmask = typename VecOf<C>::mask;

typedef std::uint32_t u32v __attribute__((vector_size(EFFOPS_VECTOR_BYTES), may_alias));
typedef std::uint16_t u16h __attribute__((vector_size(EFFOPS_VECTOR_BYTES / 2), may_alias));

struct bf16 {
  std::uint16_t bits;
};

// What a dtype is computed in.
template <class T>
struct ComputeOf {
  using type = T;
};
template <>
struct ComputeOf<bf16> {
  using type = float;
};
template <class T>
using compute = typename ComputeOf<T>::type;

template <class C>
constexpr index_t kLanes = EFFOPS_VECTOR_BYTES / sizeof(C);

#define EFFOPS_INLINE inline __attribute__((always_inline))

EFFOPS_INLINE index_t imin(index_t a, index_t b) { return a < b ? a : b; }
EFFOPS_INLINE index_t imax(index_t a, index_t b) { return a > b ? a : b; }
EFFOPS_INLINE index_t ceil_div(index_t a, index_t b) { return (a + b - 1) / b; }
EFFOPS_INLINE index_t round_up(index_t a, index_t b) { return ceil_div(a, b) * b; }

// Hides where a value comes from, so that it stays in its register: GCC else loads it anew at every use, as the memory
// operand of an FMA, and keeps a multiple of a stride for each address.
template <class V>
EFFOPS_INLINE void keep_vector(V& value) {
#if EFFOPS_VECTOR_BYTES == 64
  asm("" : "+v"(value));
#elif defined(__x86_64__)
  asm("" : "+x"(value));
#endif
}
template <class T>
EFFOPS_INLINE void keep_pointer(T*& pointer) {
  asm("" : "+r"(pointer));
}

template <class C>
EFFOPS_INLINE vec<C> splat(C value) {
  return value - vec<C>{};  // value - 0, not 0 + value: keeps the sign of a zero
}

// ---- scalar conversions ----

EFFOPS_INLINE float to_compute(bf16 value) {
  const std::uint32_t bits = static_cast<std::uint32_t>(value.bits) << 16;
  float result;
  __builtin_memcpy(&result, &bits, 4);
  return result;
}
EFFOPS_INLINE float to_compute(float value) { return value; }
EFFOPS_INLINE double to_compute(double value) { return value; }

template <class T>
EFFOPS_INLINE T from_compute(compute<T> value) {
  return value;
}
template <>
EFFOPS_INLINE bf16 from_compute<bf16>(float value) {
  std::uint32_t bits;
  __builtin_memcpy(&bits, &value, 4);
  if (value != value) return bf16{0x7fc0};
  return bf16{static_cast<std::uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}

// ---- loads ----

EFFOPS_INLINE vec<float> load(const float* p) {
  vec<float> v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}
EFFOPS_INLINE vec<double> load(const double* p) {
  vec<double> v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}
EFFOPS_INLINE vec<float> widen(u16h half) { return (vec<float>)(__builtin_convertvector(half, u32v) << 16); }
EFFOPS_INLINE vec<float> load(const bf16* p) {
  u16h half;
  __builtin_memcpy(&half, p, sizeof(half));
  return widen(half);
}

// The first n lanes (0 < n <= lanes); the others are zero. Never reads past them.
EFFOPS_INLINE vec<float> load_partial(const float* p, index_t n) {
#if EFFOPS_VECTOR_BYTES == 64
  return (vec<float>)_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1), p);
#else
  vec<float> v{};
  for (index_t i = 0; i < n; ++i) v[i] = p[i];
  return v;
#endif
}
EFFOPS_INLINE vec<double> load_partial(const double* p, index_t n) {
#if EFFOPS_VECTOR_BYTES == 64
  return (vec<double>)_mm512_maskz_loadu_pd(static_cast<__mmask8>((1u << n) - 1), p);
#else
  vec<double> v{};
  for (index_t i = 0; i < n; ++i) v[i] = p[i];
  return v;
#endif
}
EFFOPS_INLINE vec<float> load_partial(const bf16* p, index_t n) {
#if EFFOPS_VECTOR_BYTES == 64
  return widen((u16h)_mm256_maskz_loadu_epi16(static_cast<__mmask16>((1u << n) - 1), p));
#else
  vec<float> v{};
  for (index_t i = 0; i < n; ++i) v[i] = to_compute(p[i]);
  return v;
#endif
}

// Full is a compile-time promise that all lanes are there.
template <bool Full, class T>
EFFOPS_INLINE vec<compute<T>> load_lanes(const T* p, index_t n) {
  if constexpr (Full) {
    return load(p);
  } else {
    return load_partial(p, n);
  }
}

// The lanes of a register as doubles, in their order.
template <class C>
struct DoubleLanes {
  static constexpr int kParts = sizeof(double) / sizeof(C);
  vec<double> part[kParts];
};
EFFOPS_INLINE DoubleLanes<double> to_doubles(vec<double> v) { return {{v}}; }
EFFOPS_INLINE DoubleLanes<float> to_doubles(vec<float> v) {
  typedef float half __attribute__((vector_size(EFFOPS_VECTOR_BYTES / 2)));
  half halves[2];
  __builtin_memcpy(halves, &v, sizeof(v));
  return {{__builtin_convertvector(halves[0], vec<double>), __builtin_convertvector(halves[1], vec<double>)}};
}

// ---- stores ----

EFFOPS_INLINE u16h narrow(vec<float> v) {
#if EFFOPS_BF16_DOT
  return (u16h)_mm512_cvtneps_pbh((__m512)v);
#else
  const u32v bits = (u32v)v;
  const u32v rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const u32v quiet = (u32v)(v != v);  // all ones where NaN
  return __builtin_convertvector((rounded & ~quiet) | (quiet & 0x7fc0), u16h);
#endif
}

EFFOPS_INLINE void store(float* p, vec<float> v) { __builtin_memcpy(p, &v, sizeof(v)); }
EFFOPS_INLINE void store(double* p, vec<double> v) { __builtin_memcpy(p, &v, sizeof(v)); }
EFFOPS_INLINE void store(bf16* p, vec<float> v) {
  const u16h half = narrow(v);
  __builtin_memcpy(p, &half, sizeof(half));
}
// Whole aligned cache lines that nobody reads soon: not fetched before they are written. Other types and ISAs: an
// ordinary store. fence_stores() must follow before another thread reads them.
template <class T>
constexpr bool kCanStream = EFFOPS_VECTOR_BYTES == 64 && std::is_same_v<T, float>;
template <class T>
EFFOPS_INLINE void store_past_caches(T* p, vec<compute<T>> v) {
#if EFFOPS_VECTOR_BYTES == 64
  if constexpr (kCanStream<T>) return _mm512_stream_ps(p, (__m512)v);
#endif
  store(p, v);
}
EFFOPS_INLINE void fence_stores() {
#if EFFOPS_VECTOR_BYTES == 64
  _mm_sfence();
#endif
}
EFFOPS_INLINE void store_partial(float* p, vec<float> v, index_t n) {
#if EFFOPS_VECTOR_BYTES == 64
  _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1), (__m512)v);
#else
  for (index_t i = 0; i < n; ++i) p[i] = v[i];
#endif
}
EFFOPS_INLINE void store_partial(double* p, vec<double> v, index_t n) {
#if EFFOPS_VECTOR_BYTES == 64
  _mm512_mask_storeu_pd(p, static_cast<__mmask8>((1u << n) - 1), (__m512d)v);
#else
  for (index_t i = 0; i < n; ++i) p[i] = v[i];
#endif
}
EFFOPS_INLINE void store_partial(bf16* p, vec<float> v, index_t n) {
  const u16h half = narrow(v);
#if EFFOPS_VECTOR_BYTES == 64
  _mm256_mask_storeu_epi16(p, static_cast<__mmask16>((1u << n) - 1), (__m256i)half);
#else
  for (index_t i = 0; i < n; ++i) p[i].bits = half[i];
#endif
}
template <bool Full, class T>
EFFOPS_INLINE void store_lanes(T* p, vec<compute<T>> v, index_t n) {
  if constexpr (Full) {
    store(p, v);
  } else {
    store_partial(p, v, n);
  }
}

// ---- min and max ----
// Both return v where v is NaN (x86 min/max return the second operand then), as torch's relu and clamp do.

template <class C>
EFFOPS_INLINE vec<C> at_least(vec<C> v, vec<C> low) {
#if EFFOPS_VECTOR_BYTES == 64
  if constexpr (sizeof(C) == 4) {
    return (vec<C>)_mm512_max_ps((__m512)low, (__m512)v);
  } else {
    return (vec<C>)_mm512_max_pd((__m512d)low, (__m512d)v);
  }
#elif EFFOPS_VECTOR_BYTES == 32
  if constexpr (sizeof(C) == 4) {
    return (vec<C>)_mm256_max_ps((__m256)low, (__m256)v);
  } else {
    return (vec<C>)_mm256_max_pd((__m256d)low, (__m256d)v);
  }
#else
  return low > v ? low : v;
#endif
}
template <class C>
EFFOPS_INLINE vec<C> at_most(vec<C> v, vec<C> high) {
#if EFFOPS_VECTOR_BYTES == 64
  if constexpr (sizeof(C) == 4) {
    return (vec<C>)_mm512_min_ps((__m512)high, (__m512)v);
  } else {
    return (vec<C>)_mm512_min_pd((__m512d)high, (__m512d)v);
  }
#elif EFFOPS_VECTOR_BYTES == 32
  if constexpr (sizeof(C) == 4) {
    return (vec<C>)_mm256_min_ps((__m256)high, (__m256)v);
  } else {
    return (vec<C>)_mm256_min_pd((__m256d)high, (__m256d)v);
  }
#else
  return high < v ? high : v;
#endif
}
