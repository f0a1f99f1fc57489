// Moving tiles between a tensor of any strides and scratch rows "one pixel after the other, channels contiguous".
// Included inside namespace effops::<isa>::{anonymous}; see kernels.inl.

// Interleaves the low (or high) halves of two registers: a0 b0 a1 b1 ...
template <class V, class M, std::size_t... I>
EFFOPS_INLINE V zip_low(V a, V b, std::index_sequence<I...>) {
  constexpr int n = sizeof...(I);
  return __builtin_shuffle(a, b, M{(I % 2 == 0 ? int(I) / 2 : n + int(I) / 2)...});
}
template <class V, class M, std::size_t... I>
EFFOPS_INLINE V zip_high(V a, V b, std::index_sequence<I...>) {
  constexpr int n = sizeof...(I);
  return __builtin_shuffle(a, b, M{(I % 2 == 0 ? (n + int(I)) / 2 : n + (n + int(I)) / 2)...});
}

// The elements First, First + 2, ... of two registers, one after the other.
template <class V, class M, int First, std::size_t... I>
EFFOPS_INLINE V every_second(V a, V b, std::index_sequence<I...>) {
  return __builtin_shuffle(a, b, M{(2 * int(I) + First)...});
}

#if EFFOPS_VECTOR_BYTES == 64
// 16x16 floats: two steps inside the 128-bit lanes, two of whole lanes. Unlike the general form below none needs an
// index register, which halves the time; packing a weight for a 7x7 map was 20 % of the layer.
EFFOPS_INLINE void transpose_floats(vec<float> (&rows)[16]) {
  __m512 pairs[16], quads[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    pairs[i] = _mm512_unpacklo_ps((__m512)rows[i], (__m512)rows[i + 1]);
    pairs[i + 1] = _mm512_unpackhi_ps((__m512)rows[i], (__m512)rows[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {  // quads[i + j]: column j of every lane of rows i .. i + 3
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      const __m512d a = _mm512_castps_pd(pairs[i + j]), b = _mm512_castps_pd(pairs[i + 2 + j]);
      quads[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
      quads[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
    }
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {  // a 4x4 transposition of lanes gives the columns j, 4 + j, 8 + j, 12 + j
    const __m512 a = _mm512_shuffle_f32x4(quads[j], quads[4 + j], 0x88),
                 b = _mm512_shuffle_f32x4(quads[j], quads[4 + j], 0xdd);
    const __m512 c = _mm512_shuffle_f32x4(quads[8 + j], quads[12 + j], 0x88);
    const __m512 d = _mm512_shuffle_f32x4(quads[8 + j], quads[12 + j], 0xdd);
    rows[j] = (vec<float>)_mm512_shuffle_f32x4(a, c, 0x88);
    rows[4 + j] = (vec<float>)_mm512_shuffle_f32x4(b, d, 0x88);
    rows[8 + j] = (vec<float>)_mm512_shuffle_f32x4(a, c, 0xdd);
    rows[12 + j] = (vec<float>)_mm512_shuffle_f32x4(b, d, 0xdd);
  }
}
#endif

// Transposes L registers of L lanes in place: log2(L) perfect shuffles.
template <class C>
EFFOPS_INLINE void transpose(vec<C> (&rows)[kLanes<C>]) {
#if EFFOPS_VECTOR_BYTES == 64
  if constexpr (std::is_same_v<C, float>) return transpose_floats(rows);
#endif
  constexpr int L = kLanes<C>;
  using Index = std::make_index_sequence<L>;
#pragma GCC unroll 8
  for (int step = 1; step < L; step *= 2) {
    vec<C> next[L];
#pragma GCC unroll 16
    for (int i = 0; i < L / 2; ++i) {
      next[2 * i] = zip_low<vec<C>, vmask<C>>(rows[i], rows[i + L / 2], Index{});
      next[2 * i + 1] = zip_high<vec<C>, vmask<C>>(rows[i], rows[i + L / 2], Index{});
    }
#pragma GCC unroll 16
    for (int i = 0; i < L; ++i) rows[i] = next[i];
  }
}

// dst[j * dst_ld + i] = src[i * src_ld + j] for i < rows, j < columns; both sides contiguous along their inner index.
template <class D, class S>
__attribute__((noinline)) void transpose_block(const S* src, index_t src_ld, index_t rows, index_t columns, D* dst,
                                               index_t dst_ld) {
  using C = compute<S>;
  constexpr index_t L = kLanes<C>;
  for (index_t i = 0; i < rows; i += L) {
    const index_t ni = imin(L, rows - i);
    for (index_t j = 0; j < columns; j += L) {
      const index_t nj = imin(L, columns - j);
      vec<C> r[L];
      if (ni == L && nj == L) {
#pragma GCC unroll 16
        for (index_t k = 0; k < L; ++k) r[k] = load(src + (i + k) * src_ld + j);
        transpose<C>(r);
#pragma GCC unroll 16
        for (index_t k = 0; k < L; ++k) store(dst + (j + k) * dst_ld + i, r[k]);
      } else {
        for (index_t k = 0; k < L; ++k) r[k] = k < ni ? load_partial(src + (i + k) * src_ld + j, nj) : vec<C>{};
        transpose<C>(r);
        for (index_t k = 0; k < nj; ++k) store_partial(dst + (j + k) * dst_ld + i, r[k], ni);
      }
    }
  }
}

// dst[i * dst_ld + j] = src[i * src_ld + j], converting.
template <class D, class S>
EFFOPS_INLINE void copy_rows(const S* src, index_t src_ld, index_t rows, index_t columns, D* dst, index_t dst_ld) {
  constexpr index_t L = kLanes<compute<S>>;
  for (index_t i = 0; i < rows; ++i) {
    const S* s = src + i * src_ld;
    D* d = dst + i * dst_ld;
    index_t j = 0;
    for (; j + L <= columns; j += L) store(d + j, load(s + j));
    if (j < columns) store_partial(d + j, load_partial(s + j, columns - j), columns - j);
  }
}

// [c0 c1 ...] at pixel[channels] -> [c0 c0 c1 c1 ...] at pixel[0]. In place: what a register becomes never reaches the
// next one to be read.
template <class D>
void double_channels(D* pixel, index_t channels) {
  using C = compute<D>;
  using Index = std::make_index_sequence<kLanes<C>>;
  const D* source = pixel + channels;
  for (index_t c = 0; c < channels; c += kLanes<C>) {
    const index_t written = 2 * imin(kLanes<C>, channels - c);
    const vec<C> v = load_partial(source + c, written / 2);
    D* to = pixel + 2 * c;
    store_partial(to, zip_low<vec<C>, vmask<C>>(v, v, Index{}), imin(kLanes<C>, written));
    if (written > kLanes<C>)
      store_partial(to + kLanes<C>, zip_high<vec<C>, vmask<C>>(v, v, Index{}), written - kLanes<C>);
  }
}

// [a0 a1 b0 b1 ...] -> [a0 + a1, b0 + b1, ...], `channels` of them: the gradient of the above.
template <class T, class S>
void add_pairs(const S* source, index_t channels, T* destination) {
  using C = compute<S>;
  using Index = std::make_index_sequence<kLanes<C>>;
  constexpr index_t L = kLanes<C>;
  index_t c = 0;
  for (; c + L <= channels; c += L) {
    const vec<C> a = load(source + 2 * c), b = load(source + 2 * c + L);
    store(destination + c,
          every_second<vec<C>, vmask<C>, 0>(a, b, Index{}) + every_second<vec<C>, vmask<C>, 1>(a, b, Index{}));
  }
  for (; c < channels; ++c) destination[c] = from_compute<T>(to_compute(source[2 * c]) + to_compute(source[2 * c + 1]));
}

// One segment of pixels at a constant distance -> dst[pixel * ld + channel]. Each channel is written `repeat` times in
// a row (depth multiplier).
template <class D, class T>
void gather_segment(const T* src, index_t pixel_stride, index_t channel_stride, index_t pixels, index_t channels,
                    index_t repeat, D* dst, index_t ld) {
  if (repeat == 1 && channel_stride == 1) {
    copy_rows(src, pixel_stride, pixels, channels, dst, ld);
  } else if (repeat == 1 && pixel_stride == 1) {
    transpose_block(src, channel_stride, channels, pixels, dst, ld);
  } else if (repeat == 2 && (channel_stride == 1 || pixel_stride == 1)) {
    gather_segment(src, pixel_stride, channel_stride, pixels, channels, 1, dst + channels, ld);
    for (index_t i = 0; i < pixels; ++i) double_channels(dst + i * ld, channels);
  } else {
    for (index_t i = 0; i < pixels; ++i) {
      for (index_t c = 0; c < channels; ++c) {
        const D value = from_compute<D>(to_compute(src[i * pixel_stride + c * channel_stride]));
        for (index_t k = 0; k < repeat; ++k) dst[i * ld + c * repeat + k] = value;
      }
    }
  }
}

// The inverse: src[pixel * ld + channel] -> a tensor. With repeat > 1 the copies of a channel are summed (the gradient
// of the above).
template <class T, class C>
void scatter_segment(const C* src, index_t ld, index_t pixels, index_t channels, index_t repeat, T* dst,
                     index_t pixel_stride, index_t channel_stride) {
  if (repeat == 1 && channel_stride == 1) {
    copy_rows(src, ld, pixels, channels, dst, pixel_stride);
  } else if (repeat == 1 && pixel_stride == 1) {
    transpose_block(src, ld, pixels, channels, dst, channel_stride);
  } else if (repeat == 2 && channel_stride == 1) {
    for (index_t i = 0; i < pixels; ++i) add_pairs(src + i * ld, channels, dst + i * pixel_stride);
  } else {
    for (index_t i = 0; i < pixels; ++i) {
      for (index_t c = 0; c < channels; ++c) {
        compute<C> sum = 0;
        for (index_t k = 0; k < repeat; ++k) sum += to_compute(src[i * ld + c * repeat + k]);
        dst[i * pixel_stride + c * channel_stride] = from_compute<T>(sum);
      }
    }
  }
}

// Walks the flat output pixels [begin, end) of N images of P x Q in row segments and hands each to f(n, p, q, count,
// offset).
template <class F>
EFFOPS_INLINE void for_each_row_segment(index_t begin, index_t end, index_t P, index_t Q, const F& f) {
  index_t q = begin % Q, p = begin / Q % P, n = begin / Q / P;
  for (index_t t = begin; t < end;) {
    const index_t count = imin(Q - q, end - t);
    f(n, p, q, count, t - begin);
    t += count;
    q = 0;
    if (++p == P) {
      p = 0;
      ++n;
    }
  }
}

// The same in the longest runs of pixels at a constant distance: whole images where rows follow each other without a
// gap.
template <class F>
EFFOPS_INLINE void for_each_run(const TensorRef& tensor, index_t begin, index_t end, index_t P, index_t Q, const F& f) {
  const bool plane = tensor.h == Q * tensor.w;
  const index_t rows = plane ? 1 : P;
  const index_t columns = plane ? P * Q : Q;
  for_each_row_segment(
      begin, end, rows, columns,
      [&](index_t n, index_t p, index_t q, index_t count, index_t offset)
          __attribute__((always_inline)) { f(n * tensor.n + p * tensor.h + q * tensor.w, count, offset); });
}

// Flat pixels [begin, end), `channels` channels from `first` on -> dst[pixel - begin][channel].
template <class T, class D>
void gather_pixels(const TensorRef& tensor, index_t begin, index_t end, index_t P, index_t Q, index_t first,
                   index_t channels, D* dst, index_t ld) {
  const T* data = static_cast<const T*>(tensor.data) + first * tensor.c;
  for_each_run(tensor, begin, end, P, Q, [&](index_t position, index_t count, index_t offset) {
    gather_segment(data + position, tensor.w, tensor.c, count, channels, 1, dst + offset * ld, ld);
  });
}

template <class T, class C>
void scatter_pixels(const C* src, index_t ld, const TensorRef& tensor, index_t begin, index_t end, index_t P, index_t Q,
                    index_t first, index_t channels) {
  T* data = static_cast<T*>(tensor.data) + first * tensor.c;
  for_each_run(tensor, begin, end, P, Q, [&](index_t position, index_t count, index_t offset) {
    scatter_segment(src + offset * ld, ld, count, channels, 1, data + position, tensor.w, tensor.c);
  });
}

// Whether all pixels of the batch follow each other at the distance `tensor.w`, each with its channels side by side.
inline bool evenly_spaced(const TensorRef& tensor, index_t N, index_t P, index_t Q) {
  return tensor.c == 1 && tensor.h == Q * tensor.w && (N == 1 || tensor.n == P * tensor.h);
}

// Whether a map of `channels` is better written past the caches: one that no cache will hold until somebody reads it need
// not be fetched before it is written, a third of its traffic. The size is that of two thirds of a 32 MB L3. Only whole,
// aligned lines.
template <class T>
bool streams(const TensorRef& y, index_t channels, index_t elements) {
  constexpr index_t kBytes = index_t{20} << 20, kElement = sizeof(T), kLine = 64 / kElement;
  const bool aligned =
      y.c == 1 && (y.n | y.h | y.w | channels) % kLine == 0 && reinterpret_cast<std::uintptr_t>(y.data) % 64 == 0;
  return kCanStream<T> && aligned && elements * kElement >= kBytes;
}

// Pixels one after the other with contiguous channels. Only the channels may be read and written: what follows them may
// be the next pixel's.
template <class C>
struct PixelRows {
  C* data = nullptr;
  index_t ld = 0;
};

// The distance of two rows of a tile of A, at least `elements`. Rows a multiple of 512 bytes apart share so few sets of
// an 8-way L1 that 14 of them and a stream of B do not fit: one register more spreads them.
template <class Z>
index_t row_distance(index_t elements) {
  constexpr index_t unit = kLanes<compute<Z>>;
  const index_t rounded = round_up(elements, unit);
  return rounded * static_cast<index_t>(sizeof(Z)) % 512 == 0 ? rounded + unit : rounded;
}

// Hands out tiles of a map as PixelRows: where they lie, if they lie so and need no conversion, else through a tile of
// its own. An absent tensor gives null rows.
template <class T>
class TileOfMap {
  using C = compute<T>;

 public:
  // `channels` of them from `first` on, at most `pixels` at a time. `for_product`: 14 rows are read side by side, over
  // and over; rows whose distance puts them all into the same few sets of L1 are copied first.
  TileOfMap(Arena& arena, const TensorRef& tensor, const DepthwiseGeometry& g, index_t first, index_t channels,
            index_t pixels, bool for_product = false)
      : tensor_(tensor),
        g_(g),
        first_(first),
        channels_(channels),
        ld_(for_product ? row_distance<C>(channels) : round_up(channels, kLanes<C>)) {
    const bool crowded = for_product && tensor.w * static_cast<index_t>(sizeof(T)) % kCrowded == 0;
    in_place_ = std::is_same_v<T, C> && evenly_spaced(tensor, g.N, g.P, g.Q) && !crowded;
    if (tensor.data != nullptr && !in_place_) tile_ = static_cast<C*>(arena.allocate(pixels * ld_ * sizeof(C)));
  }

  explicit operator bool() const { return tensor_.data != nullptr; }

  PixelRows<const C> read(index_t begin, index_t end) const {
    if (tile_ != nullptr) gather_pixels<T>(tensor_, begin, end, g_.P, g_.Q, first_, channels_, tile_, ld_);
    const PixelRows<C> rows = at(begin);
    return {rows.data, rows.ld};
  }

  // Where to put the pixels from `begin` on; `wrote` takes them to the tensor.
  PixelRows<C> at(index_t begin) const {
    if (tensor_.data == nullptr) return {};
    if (tile_ != nullptr) return {tile_, ld_};
    return {static_cast<C*>(tensor_.data) + begin * tensor_.w + first_, tensor_.w};
  }
  void wrote(index_t begin, index_t end) const {
    if (tile_ != nullptr) scatter_pixels<T>(tile_, ld_, tensor_, begin, end, g_.P, g_.Q, first_, channels_);
  }

 private:
  // Half of what a way of an L1 holds: 14 rows then fall into two sets of 8 or 12 lines.
  static constexpr index_t kCrowded = 2048;
  TensorRef tensor_;
  const DepthwiseGeometry& g_;
  index_t first_, channels_, ld_;
  bool in_place_;
  C* tile_ = nullptr;
};

// f(c, whole): every register of channels; `whole`, a compile-time constant, says that all its lanes are channels.
template <class C, class F>
EFFOPS_INLINE void for_each_register(index_t channels, const F& f) {
  index_t c = 0;
  for (; c + kLanes<C> <= channels; c += kLanes<C>) f(c, std::true_type{});
  if (c < channels) f(c, std::false_type{});
}

// A per-channel vector in the compute type, padded with zeros to whole registers; null stays null.
template <class C>
C* channel_vector(Arena& arena, const ChannelRef& source, index_t channels) {
  if (source.data == nullptr) return nullptr;
  const index_t padded = round_up(channels, kLanes<C>);
  C* result = static_cast<C*>(arena.allocate(padded * sizeof(C)));
  for (index_t i = 0; i < channels; ++i) {
    switch (source.dtype) {
      case DType::f32:
        result[i] = static_cast<const float*>(source.data)[i * source.stride];
        break;
      case DType::bf16:
        result[i] = to_compute(static_cast<const bf16*>(source.data)[i * source.stride]);
        break;
      case DType::f64:
        result[i] = static_cast<C>(static_cast<const double*>(source.data)[i * source.stride]);
        break;
      case DType::f16:  // the bindings let none through to the CPU
        break;
    }
  }
  for (index_t i = channels; i < padded; ++i) result[i] = 0;
  return result;
}

template <class C>
void write_channel_vector(const C* values, index_t channels, void* destination, DType dtype) {
  for (index_t i = 0; i < channels; ++i) {
    switch (dtype) {
      case DType::f32:
        static_cast<float*>(destination)[i] = static_cast<float>(values[i]);
        break;
      case DType::bf16:
        static_cast<bf16*>(destination)[i] = from_compute<bf16>(static_cast<float>(values[i]));
        break;
      case DType::f64:
        static_cast<double*>(destination)[i] = values[i];
        break;
      case DType::f16:
        break;
    }
  }
}
