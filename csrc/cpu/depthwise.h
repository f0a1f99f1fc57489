// The depthwise convolution on rows of pixels with contiguous channels, forward and its two gradients: what the rooms
// dwconv and dsconv share. Included inside namespace effops::<isa>::{anonymous}; see kernels.inl.
//
// A vector register holds kLanes channels of one pixel. For a block of B output pixels of a row and one register of
// channels, the kernel keeps B accumulators and the S taps of one kernel row in registers and slides over the (B - 1) *
// stride + S input pixels of each of the R input rows: for 3x3 and B = 7 that is 27 + 9 loads for 63 FMAs. Where a
// block touches the border, pixels outside are read from a zero.

// ---- geometry of one row ----

// The taps t in [begin, end) of an axis for which output * stride - pad + t * dilation lies inside [0, size).
struct TapRange {
  index_t begin, end;
};
EFFOPS_INLINE TapRange valid_taps(index_t output, index_t stride, index_t pad, index_t dilation, index_t taps,
                                  index_t size) {
  const index_t start = output * stride - pad;
  const index_t begin = start >= 0 ? 0 : ceil_div(-start, dilation);
  const index_t end = start >= size ? 0 : imin(taps, ceil_div(size - start, dilation));
  return {imin(begin, taps), imax(imin(begin, taps), end)};
}

// ---- weights ----

// [R * S][padded channels] in the compute type; channel o takes kernel o % bank, so that shared and fixed banks cost
// nothing later on.
template <class T>
compute<T>* pack_depthwise_weights(Arena& arena, const DepthwiseGeometry& g, const void* weight) {
  using C = compute<T>;
  const index_t channels = g.out_channels(), taps = g.R * g.S, ld = round_up(channels, kLanes<C>);
  C* packed = static_cast<C*>(arena.allocate(taps * ld * sizeof(C)));
  const T* source = static_cast<const T*>(weight);
  if (g.bank == channels) {
    transpose_block(source, taps, channels, taps, packed, ld);
  } else {
    for (index_t t = 0; t < taps; ++t) {
      for (index_t o = 0; o < channels; ++o) packed[t * ld + o] = to_compute(source[o % g.bank * taps + t]);
    }
  }
  for (index_t t = 0; t < taps; ++t) {
    for (index_t o = channels; o < ld; ++o) packed[t * ld + o] = C(0);
  }
  return packed;
}

// ---- input rows ----

// Hands out input rows as [W][channels], channels contiguous: straight from the tensor where it lies that way, else
// through a ring of as many rows as a window spans (each row is rearranged once while the window slides over it; the
// depth multiplier is applied here).
template <class T>
class RowSource {
 public:
  // spare_rows: how many rows beyond a window's the ring holds, for callers that come back to them.
  RowSource(Arena& arena, const TensorRef& tensor, const DepthwiseGeometry& g, index_t spare_rows = 0)
      : tensor_(tensor), g_(g), direct_(tensor.c == 1 && g.multiplier == 1) {
    if (direct_) {
      pixel_stride_ = tensor.w;
      return;
    }
    pixel_stride_ = round_up(g.out_channels(), kLanes<compute<T>>);
    capacity_ = (g.R - 1) * g.dilation_h + 1 + spare_rows;
    ring_ = static_cast<T*>(arena.allocate(capacity_ * g.W * pixel_stride_ * sizeof(T)));
    held_ = static_cast<index_t*>(arena.allocate(capacity_ * sizeof(index_t)));
    for (index_t i = 0; i < capacity_; ++i) held_[i] = -1;
  }

  index_t pixel_stride() const { return pixel_stride_; }
  bool direct() const { return direct_; }  // rows stay where they are
  // How far below a row its successor in the window starts; 0 where rows come through the ring.
  index_t next_row() const { return direct_ ? g_.stride_h * tensor_.h : 0; }

  const T* row(index_t n, index_t h) {
    const T* source = static_cast<const T*>(tensor_.data) + n * tensor_.n + h * tensor_.h;
    if (direct_) return source;
    const index_t slot = h % capacity_;
    T* destination = ring_ + slot * g_.W * pixel_stride_;
    if (held_[slot] != n * g_.H + h) {
      held_[slot] = n * g_.H + h;
      gather_segment(source, tensor_.w, tensor_.c, g_.W, g_.C, g_.multiplier, destination, pixel_stride_);
    }
    return destination;
  }

 private:
  TensorRef tensor_;
  const DepthwiseGeometry& g_;
  bool direct_;
  index_t pixel_stride_, capacity_ = 0;
  T* ring_ = nullptr;
  index_t* held_ = nullptr;
};

// ---- parts ----

// One depthwise window of several that read the same map side by side; most operators have one part.
template <class C>
struct DepthwisePart {
  DepthwiseGeometry g;  // its own channels, window and pads
  const C* weights;     // packed
  Epilogue<C> epilogue;
  index_t channel = 0;  // the first input channel it reads
  index_t column = 0;   // the first depthwise channel it gives
  index_t tap = 0;      // where its taps stand among the packed taps of all parts

  index_t ld() const { return round_up(g.out_channels(), kLanes<C>); }
  index_t taps() const { return g.R * g.S * ld(); }
};

template <class C>
struct DepthwiseParts {
  DepthwisePart<C>* data;
  index_t count;

  const DepthwisePart<C>* begin() const { return data; }
  const DepthwisePart<C>* end() const { return data + count; }
  const DepthwisePart<C>& last() const { return data[count - 1]; }
  index_t channels() const { return last().column + last().g.out_channels(); }
  index_t taps() const { return last().tap + last().taps(); }
  // Channels up to the end of every part's last register, in the order of the columns or of the input's channels.
  index_t padded_columns() const {
    index_t end = 0;
    for (const DepthwisePart<C>& part : *this) end = imax(end, part.column + part.ld());
    return end;
  }
  index_t padded_channels() const {
    index_t end = 0;
    for (const DepthwisePart<C>& part : *this) end = imax(end, part.channel + part.ld());
    return end;
  }
  bool shared() const { return count > 1 && data[1].channel == 0; }  // all read the same channels
};

template <class C>
DepthwiseParts<C> one_part(Arena& arena, const DepthwiseGeometry& g, const C* weights, const EpilogueRef& epilogue) {
  auto* part = static_cast<DepthwisePart<C>*>(arena.allocate(sizeof(DepthwisePart<C>)));
  *part = DepthwisePart<C>{g, weights, Epilogue<C>(arena, epilogue, g.out_channels())};
  return {part, 1};
}

// The rows of a source as a part sees them: from its first channel on. A ring keeps every row that any part still needs
// where all parts do one output row before the next.
template <class Source>
struct PartRows {
  Source& source;
  index_t channel;
  auto row(index_t n, index_t h) { return source.row(n, h) + channel; }
  index_t pixel_stride() const { return source.pixel_stride(); }
  index_t next_row() const { return source.next_row(); }
  bool direct() const { return source.direct(); }
};

// ---- forward ----

// 7 divides the maps of ImageNet networks, 4 and 8 those of CIFAR's; the wide blocks need more than 16 registers. A block
// of 8 has as many chains of sums as two FMA ports of latency 4 take.
constexpr int kSmallBlock = 4;
constexpr int kWideBlock = EFFOPS_VECTOR_BYTES == 64 ? 7 : 4;
constexpr int kFullBlock = EFFOPS_VECTOR_BYTES == 64 ? 8 : 4;

alignas(64) constexpr char kZeros[EFFOPS_VECTOR_BYTES] = {};  // a pixel outside the map

// One output row segment. D is what the destination holds; tail lanes beyond `channels` are stored unless Exact. stream:
// past the caches, as `streams` allows it; the caller fences.
template <class T, class D, bool Exact>
class DepthwiseRow {
  using C = compute<T>;

 public:
  DepthwiseRow(const DepthwiseGeometry& g, const C* weights, const Epilogue<C>& epilogue, bool with_epilogue,
               bool stream = false)
      : g_(g),
        channels_(g.out_channels()),
        ld_(round_up(channels_, kLanes<C>)),
        weights_(weights),
        epilogue_(epilogue),
        out_{with_epilogue ? epilogue.bias : nullptr,
             with_epilogue && epilogue.clamps() ? epilogue.low : -static_cast<C>(__builtin_inff()),
             with_epilogue && epilogue.clamps() ? epilogue.high : static_cast<C>(__builtin_inff()),
             with_epilogue && !(epilogue.simple() && !epilogue.affine()), stream} {}

  // dst[(q - q0) * dst_ld + c] for q in [q0, q0 + count) of output row p of image n. residual: the same layout, or
  // null.
  template <class Source>  // RowSource<T>, or what has its row, pixel_stride and next_row
  void run(Source& source, index_t n, index_t p, index_t q0, index_t count, D* dst, index_t dst_ld, const C* residual,
           index_t residual_ld) const {
    const TapRange r = valid_taps(p, g_.stride_h, g_.pad_top, g_.dilation_h, g_.R, g_.H);
    Segment segment{{},     r.begin,  r.end,      source.pixel_stride(), source.next_row(), q0, count, dst,
                    dst_ld, residual, residual_ld};
    constexpr index_t kMaxRows = 16;  // taller kernels are summed by the slow path in slices
    if (r.end - r.begin <= kMaxRows) {
      const T* rows[kMaxRows];
      for (index_t i = r.begin; i < r.end; ++i)
        rows[i - r.begin] = source.row(n, p * g_.stride_h - g_.pad_top + i * g_.dilation_h);
      segment.rows = rows;
      choose_kernel(segment);
    } else {
      tall(source, n, p, segment);
    }
  }

 private:
  struct Segment {
    const T* const* rows;  // the valid kernel rows, from r_begin on
    index_t r_begin, r_end;
    index_t pixel_stride, next_row;
    index_t q0, count;
    D* dst;
    index_t dst_ld;
    const C* residual;
    index_t residual_ld;
  };

  void choose_kernel(const Segment& s) const {
    if (g_.dilation_w == 1 && g_.S == 3 && g_.stride_w == 1) {
      sliding<3, 1>(s);
    } else if (g_.dilation_w == 1 && g_.S == 3 && g_.stride_w == 2) {
      sliding<3, 2>(s);
    } else if (g_.dilation_w == 1 && g_.S == 5 && g_.stride_w == 1) {
      sliding<5, 1>(s);
    } else if (g_.dilation_w == 1 && g_.S == 5 && g_.stride_w == 2) {
      sliding<5, 2>(s);
    } else if (g_.dilation_w == 1 && g_.S == 7 && g_.stride_w == 1) {
      sliding<7, 1>(s);
    } else if (g_.dilation_w == 1 && g_.S == 7 && g_.stride_w == 2) {
      sliding<7, 2>(s);
    } else if (g_.S == 1) {
      sliding<1, 0>(s);
    } else {
      for (index_t i = 0; i < s.count; ++i) pixel(out_, s, i);
    }
  }

  // The epilogue as most layers have it: bias, then a clamp. Copied into locals by the kernels, since every store might
  // alias `this`.
  struct Clamp {
    const C* bias;
    C low, high;
    bool more;  // there is more to it: epilogue_.apply
    bool stream;
    EFFOPS_INLINE vec<C> start(index_t c) const { return bias ? load(bias + c) : vec<C>{}; }
  };

  // The results of Count pixels side by side, from pixel i of the segment on.
  template <bool Full, int Count>
  EFFOPS_INLINE void finish(const Clamp& out, const Segment& s, index_t c, index_t i,
                            const vec<C> (&sums)[Count]) const {
    D* to = s.dst + i * s.dst_ld + c;
    if (out.more) [[unlikely]] {
      const C* residual = s.residual ? s.residual + i * s.residual_ld + c : nullptr;
#pragma GCC unroll 8
      for (int j = 0; j < Count; ++j) {
        const vec<C> other = residual ? load(residual + j * s.residual_ld) : vec<C>{};
        put<Full>(out, to + j * s.dst_ld, c, epilogue_.apply(sums[j], c, other));
      }
      return;
    }
    const vec<C> low = splat(out.low), high = splat(out.high);
    const bool ahead = Exact && !out.stream;  // a map: the same pixels of its next row are written soon
    const index_t below = g_.Q * s.dst_ld;
#pragma GCC unroll 8
    for (int j = 0; j < Count; ++j) {
      if (ahead) __builtin_prefetch(to + below, 1, 2);
      put<Full>(out, to, c, at_most<C>(at_least<C>(sums[j], low), high));
      to += s.dst_ld;
      keep_pointer(to);
    }
  }

  template <bool Full>
  EFFOPS_INLINE void put(const Clamp& out, D* to, index_t c, vec<C> v) const {
    if (Full && out.stream) [[unlikely]]
      return store_past_caches(to, v);
    store_lanes<Full || !Exact>(to, v, imin(kLanes<C>, channels_ - c));
  }

  // Any kernel, any border: one pixel.
  void pixel(const Clamp& out, const Segment& s, index_t i) const {
    const index_t q = s.q0 + i;
    const TapRange taps = valid_taps(q, g_.stride_w, g_.pad_left, g_.dilation_w, g_.S, g_.W);
    for_each_register<C>(channels_, [&](index_t c, auto whole) __attribute__((always_inline)) {
      constexpr bool kFull = decltype(whole)::value;
      vec<C> acc = out.start(c);
      for (index_t r = s.r_begin; r < s.r_end; ++r) {
        const T* x = s.rows[r - s.r_begin] + (q * g_.stride_w - g_.pad_left) * s.pixel_stride + c;
        const C* w = weights_ + r * g_.S * ld_ + c;
        for (index_t t = taps.begin; t < taps.end; ++t) {
          acc = acc + load_lanes<kFull>(x + t * g_.dilation_w * s.pixel_stride, channels_ - c) * load(w + t * ld_);
        }
      }
      finish<kFull>(out, s, c, i, {acc});
    });
  }

  // S and the stride known at compile time, dilation 1; Stride 0: a 1-tap row at any stride. Blocks of pixels outside,
  // channels inside: memory is walked in the order it lies, whatever the distance of two pixels.
  template <int S, int Stride>
  __attribute__((noinline)) void sliding(const Segment& segment) const {
    const Segment s = segment;
    const Clamp out = out_;
    constexpr int kWide = S <= 3 ? kWideBlock : kSmallBlock;
    if (S > 1 && s.count >= kFullBlock && (S > 3 || (s.count % kFullBlock == 0 && s.count % kWide != 0))) {
      blocks<S, Stride, S == 1 ? kWide : kFullBlock>(out, s);
    } else if (s.count >= kWide && round_up(s.count, kWide) <= round_up(s.count, kSmallBlock)) {
      blocks<S, Stride, kWide>(out, s);
    } else if (s.count >= kSmallBlock) {
      blocks<S, Stride, kSmallBlock>(out, s);
    } else {
      for (index_t i = 0; i < s.count; ++i) pixel(out, s, i);
    }
  }

  // The last block is moved back so that it ends with the segment: a few pixels are computed twice instead of one at a
  // time.
  template <int S, int Stride, int Block>
  EFFOPS_INLINE void blocks(const Clamp& out, const Segment& s) const {
    const index_t stride = Stride ? Stride : g_.stride_w, span = (Block - 1) * stride + S;
    for (index_t i = 0; i < s.count; i += Block) {
      const index_t at = imin(i, s.count - Block);
      const index_t x = (s.q0 + at) * stride - g_.pad_left;  // the first input pixel of the block
      if (x >= 0 && x + span <= g_.W) {
        for_each_register<C>(channels_, [&](index_t c, auto whole) __attribute__((always_inline)) {
          block<decltype(whole)::value, S, Stride, Block, false>(out, s, c, at, x);
        });
        continue;
      }
      if constexpr (S > 1) {  // a row of one tap is inside or it is not
        if (x > -S && x + span < g_.W + S) {
          for_each_register<C>(channels_, [&](index_t c, auto whole) __attribute__((always_inline)) {
            block<decltype(whole)::value, S, Stride, Block, true>(out, s, c, at, x);
          });
          continue;
        }
      }
      for (index_t j = at; j < at + Block; ++j) pixel(out, s, j);
    }
  }

  // Border: of the pixels read up to S - 1 on either side may lie outside the map.
  template <bool Full, int S, int Stride, int Block, bool Border>
  EFFOPS_INLINE void block(const Clamp& out, const Segment& s, index_t c, index_t i, index_t x0) const {
    const T* const zero = reinterpret_cast<const T*>(kZeros);
    const index_t apart = Stride ? 1 : g_.stride_w, step = apart * s.pixel_stride;  // of the pixels read
    const index_t width = g_.W;
    vec<C> acc[Block];
#pragma GCC unroll 8
    for (int j = 0; j < Block; ++j) acc[j] = out.start(c);
    for (index_t r = s.r_begin; r < s.r_end; ++r) {
      const T* x = s.rows[r - s.r_begin] + x0 * s.pixel_stride + c;
      const C* w = weights_ + r * S * ld_ + c;
      vec<C> tap[S];
#pragma GCC unroll 8
      for (int t = 0; t < S; ++t) tap[t] = load(w + t * ld_);
      constexpr int kPixels = Stride ? (Block - 1) * Stride + S : Block;
#pragma GCC unroll 32
      for (int k = 0; k < kPixels; ++k) {
        const T* at = x;
        if (Border && (k < S - 1 || k > kPixels - S))
          at = static_cast<std::size_t>(x0 + k * apart) < static_cast<std::size_t>(width) ? at : zero;
        vec<C> value = load_lanes<Full>(at, channels_ - c);
        keep_vector(value);
#pragma GCC unroll 8
        for (int t = 0; t < S; ++t) {
          const int j = Stride ? (k - t) / (Stride ? Stride : 1) : k;
          if (Stride == 0 || (k >= t && (k - t) % (Stride ? Stride : 1) == 0 && j < Block))
            acc[j] = acc[j] + value * tap[t];
        }
        x += step;
        keep_pointer(x);
      }
    }
    // Of the rows of the next window only the last ones are new, as many as the stride; into L2, which is what they miss.
    // A window wholly in the padding has no row to go on from.
    if (s.next_row != 0) {
      for (index_t r = imax(s.r_begin, s.r_end - g_.stride_h); r < s.r_end; ++r) {
        const T* below = s.rows[r - s.r_begin] + s.next_row + x0 * s.pixel_stride + c;
#pragma GCC unroll 16
        for (int j = 0; j < Block * (Stride ? Stride : 1); ++j) {
          __builtin_prefetch(below, 0, 2);
          below += s.pixel_stride;
          keep_pointer(below);
        }
      }
    }
    finish<Full>(out, s, c, i, acc);
  }

  // More kernel rows than a ring of pointers holds: pixel by pixel, row pointers fetched one at a time. Correct before
  // fast; no net uses it.
  template <class Source>
  void tall(Source& source, index_t n, index_t p, const Segment& s) const {
    for (index_t c = 0; c < channels_; c += kLanes<C>) {
      for (index_t i = 0; i < s.count; ++i) {
        const index_t q = s.q0 + i;
        const TapRange taps = valid_taps(q, g_.stride_w, g_.pad_left, g_.dilation_w, g_.S, g_.W);
        vec<C> acc = out_.start(c);
        for (index_t r = s.r_begin; r < s.r_end; ++r) {
          const T* x = source.row(n, p * g_.stride_h - g_.pad_top + r * g_.dilation_h) +
                       (q * g_.stride_w - g_.pad_left) * s.pixel_stride + c;
          for (index_t t = taps.begin; t < taps.end; ++t) {
            acc = acc + load_partial(x + t * g_.dilation_w * s.pixel_stride, imin(kLanes<C>, channels_ - c)) *
                            load(weights_ + (r * g_.S + t) * ld_ + c);
          }
        }
        finish<false>(out_, s, c, i, {acc});
      }
    }
  }

  const DepthwiseGeometry& g_;
  index_t channels_, ld_;
  const C* weights_;
  const Epilogue<C>& epilogue_;
  Clamp out_;
};
