// The gradients of a depthwise convolution, by rows, for every room that has one; and how backward work is cut up.
// Included inside namespace effops::<isa>::{anonymous}; see kernels.inl.
//
// A task owns a band of input rows of one image. It walks the output rows that touch the band in order, tile by tile; an
// input-gradient row is finished when no later output row can touch it. Output rows at a band's edge are computed by
// both neighbours; weight gradients count a row only in the band that owns it. No atomics: each slot of tasks has its own partial weight gradients, added
// in the order of the slots.

struct Band {
  index_t n;
  index_t h_begin, h_end;        // input rows whose gradient this task writes
  index_t own_begin, own_end;    // output rows whose weight and epilogue gradients it counts
  index_t need_begin, need_end;  // output rows that touch its input rows
};

struct BandPlan {
  const DepthwiseGeometry& g;
  bool want_input;
  index_t per_image, count, slots;

  // rows: the most input rows of a band.
  BandPlan(const DepthwiseGeometry& geometry, bool want_input_, double cost, index_t rows = index_t{1} << 31)
      : g(geometry), want_input(want_input_) {
    slots = slots_for(cost, imax(1, g.N) * imax(1, g.P));
    per_image = g.N >= slots ? 1 : imax(1, imin(ceil_div(slots, imax(1, g.N)), imin(g.H, imax(1, g.P))));
    per_image = imax(per_image, ceil_div(g.H, rows));
    count = g.N * per_image;
    slots = imax(1, imin(slots, count));
  }

  Band band(index_t i) const {
    Band b;
    b.n = i / per_image;
    const index_t k = i % per_image;
    b.h_begin = g.H * k / per_image;
    b.h_end = g.H * (k + 1) / per_image;
    b.own_begin = g.P * k / per_image;
    b.own_end = g.P * (k + 1) / per_image;
    b.need_begin = b.need_end = b.own_begin;
    if (want_input) {
      const index_t reach = (g.R - 1) * g.dilation_h;
      b.need_begin = imin(g.P, ceil_div(imax(0, b.h_begin + g.pad_top - reach), g.stride_h));
      b.need_end = imax(b.need_begin, imin(g.P, (b.h_end - 1 + g.pad_top) / g.stride_h + 1));
    }
    return b;
  }

  // f(p_begin, p_end, owned, needed): output rows in order, at most `rows` at a time, none twice.
  template <class F>
  void for_each_tile(const Band& b, index_t rows, const F& f) const {
    const index_t stop = imax(b.own_end, b.need_end);
    for (index_t p = imin(b.own_begin, b.need_begin); p < stop;) {
      const bool owned = p >= b.own_begin && p < b.own_end;
      const bool needed = p >= b.need_begin && p < b.need_end;
      index_t end = imin(stop, p + rows);
      for (const index_t edge : {b.own_begin, b.own_end, b.need_begin, b.need_end}) {
        if (edge > p) end = imin(end, edge);
      }
      if (owned || needed) f(p, end, owned, needed);
      p = end;
    }
  }
};

// ---- gradient of the input ----

// At stride 1 and without a multiplier: row h of the gradient is the depthwise convolution, with the kernel turned
// round, of the rows of gradients at the sums that h touched. They stay where they are until then.
template <class T>
class GradInputRows {
  using C = compute<T>;

 public:
  static bool fits(const DepthwiseGeometry& g) { return g.stride_h == 1 && g.stride_w == 1 && g.multiplier == 1; }

  // tile_rows: the most rows that `add` is given at a time. g: the geometry that spans all parts.
  GradInputRows(Arena& arena, const DepthwiseGeometry& g, const DepthwiseParts<C>& parts, const TensorRef& destination,
                index_t tile_rows)
      : g_(g),
        destination_(destination),
        shared_(parts.shared()),
        none_(arena, EpilogueRef{}, g.C),
        add_(arena, with_residual(), g.C),
        ld_(parts.padded_channels()),
        source_{nullptr, history(g) + tile_rows, 0} {
    if (destination.data == nullptr) return;
    parts_ = turned(arena, parts);
    source_.rows = static_cast<const C**>(arena.allocate(source_.capacity * sizeof(C*)));
    if (destination.c == 1 && !shared_) return;
    for (C*& line : lines_) line = static_cast<C*>(arena.allocate(g.W * ld_ * sizeof(C)));
  }

  GradInputRows(Arena& arena, const DepthwiseGeometry& g, const TensorRef& destination, const C* weights,
                index_t tile_rows)
      : GradInputRows(arena, g, one_part<C>(arena, g, weights, EpilogueRef{}), destination, tile_rows) {}

  // How many rows before a tile's own must still be there when the tile is added.
  static index_t history(const DepthwiseGeometry& g) { return (g.R - 1) * g.dilation_h; }

  // Where the rows of the next bands go, if not to where they went before; same strides of pixels and channels.
  void redirect(const TensorRef& destination) { destination_ = destination; }

  void begin(const Band& band) {
    band_ = band;
    next_ = band.h_begin;
  }

  // grad: [rows * Q][grad_ld], the gradients at the sums of output rows [p_begin, p_end). Rows come in order.
  void add(index_t p_begin, index_t p_end, const C* grad, index_t grad_ld) {
    source_.ld = grad_ld;
    for (index_t p = p_begin; p < p_end; ++p) {
      source_.rows[p % source_.capacity] = grad + (p - p_begin) * g_.Q * grad_ld;
    }
    finish_until(p_end - g_.pad_top);
  }

  void end() { finish_until(band_.h_end); }

 private:
  struct Rows {
    const C** rows;
    index_t capacity, ld;
    index_t column = 0;
    const C* row(index_t, index_t p) const { return rows[p % capacity] + column; }
    index_t pixel_stride() const { return ld; }
    index_t next_row() const { return 0; }
  };

  // An epilogue that adds: what `residual` rows are is told by the call.
  static EpilogueRef with_residual() {
    EpilogueRef epilogue;
    epilogue.residual.data = const_cast<char*>(kZeros);
    return epilogue;
  }

  static DepthwiseParts<C> turned(Arena& arena, const DepthwiseParts<C>& parts) {
    auto* back = static_cast<DepthwisePart<C>*>(arena.allocate(parts.count * sizeof(DepthwisePart<C>)));
    for (index_t i = 0; i < parts.count; ++i) {
      const DepthwisePart<C>& part = parts.data[i];
      const index_t taps = part.g.R * part.g.S, ld = part.ld();
      C* flipped = static_cast<C*>(arena.allocate(taps * ld * sizeof(C)));
      for (index_t t = 0; t < taps; ++t)
        __builtin_memcpy(flipped + t * ld, part.weights + (taps - 1 - t) * ld, ld * sizeof(C));
      back[i] = part;
      back[i].g = turned(part.g);
      back[i].weights = flipped;
    }
    return {back, parts.count};
  }

  static DepthwiseGeometry turned(const DepthwiseGeometry& g) {
    DepthwiseGeometry back = g;
    back.H = g.P, back.W = g.Q, back.P = g.H, back.Q = g.W;
    back.pad_top = (g.R - 1) * g.dilation_h - g.pad_top;
    back.pad_left = (g.S - 1) * g.dilation_w - g.pad_left;
    return back;
  }

  void finish_until(index_t h) {
    for (const index_t stop = imin(h, band_.h_end); next_ < stop; ++next_) {
      T* row = static_cast<T*>(destination_.data) + band_.n * destination_.n + next_ * destination_.h;
      const bool in_place = destination_.c == 1;
      C* sum = nullptr;  // of the parts so far, where they share channels
      for (index_t i = 0; i < parts_.count; ++i) {
        const DepthwisePart<C>& part = parts_.data[i];
        if (in_place && (!shared_ || i + 1 == parts_.count)) {
          run_part<T, true>(part, row + part.channel, destination_.w, sum);
        } else {  // another line than the one added: a kernel may compute a pixel twice
          C* line = lines_[shared_ ? i % 2 : 0];
          run_part<C, false>(part, line + part.channel, ld_, sum);
          sum = shared_ ? line : nullptr;
        }
      }
      if (!in_place) {
        const C* line = lines_[shared_ ? (parts_.count - 1) % 2 : 0];
        scatter_segment(line, ld_, g_.W, g_.C, 1, row, destination_.w, destination_.c);
      }
    }
  }

  template <class D, bool Exact>
  void run_part(const DepthwisePart<C>& part, D* dst, index_t dst_ld, const C* sum) {
    source_.column = part.column;
    const DepthwiseRow<C, D, Exact> kernel(part.g, part.weights, sum ? add_ : none_, sum != nullptr);
    kernel.run(source_, band_.n, next_, 0, part.g.Q, dst, dst_ld, sum, ld_);
  }

  DepthwiseGeometry g_;
  TensorRef destination_;
  bool shared_;
  Epilogue<C> none_, add_;
  index_t ld_;
  Rows source_;
  DepthwiseParts<C> parts_{};
  C* lines_[2] = {};
  Band band_{};
  index_t next_ = 0;
};

// Any stride and multiplier: each output row is scattered into a ring of input-gradient rows, and a row leaves the ring
// when no later output row can touch it.
template <class T>
class GradInputRing {
  using C = compute<T>;

 public:
  // g: the geometry that spans all parts.
  GradInputRing(Arena& arena, const DepthwiseGeometry& g, const DepthwiseParts<C>& parts, const TensorRef& destination)
      : g_(g),
        parts_(parts),
        destination_(destination),
        ld_(parts.padded_channels()),
        capacity_((g.R - 1) * g.dilation_h + 1) {
    if (wanted()) ring_ = static_cast<C*>(arena.allocate(capacity_ * g.W * ld_ * sizeof(C)));
  }

  GradInputRing(Arena& arena, const DepthwiseGeometry& g, const TensorRef& destination, const C* weights)
      : GradInputRing(arena, g, one_part<C>(arena, g, weights, EpilogueRef{}), destination) {}

  bool wanted() const { return destination_.data != nullptr; }

  void redirect(const TensorRef& destination) { destination_ = destination; }  // as GradInputRows

  void begin(const Band& band) {
    band_ = band;
    flushed_ = opened_ = band.h_begin;
  }

  // grad: [Q][grad_ld], the gradient at the depthwise sums of output row p. Rows come in order.
  void add(index_t p, const C* grad, index_t grad_ld) {
    flush_until(p * g_.stride_h - g_.pad_top);
    for (const DepthwisePart<C>& part : parts_) add_part(part, p, grad + part.column, grad_ld);
  }

  void end() { flush_until(band_.h_end); }

 private:
  void add_part(const DepthwisePart<C>& part, index_t p, const C* grad, index_t grad_ld) {
    const DepthwiseGeometry& g = part.g;
    const TapRange taps = valid_taps(p, g.stride_h, g.pad_top, g.dilation_h, g.R, g.H);
    for (index_t r = taps.begin; r < taps.end; ++r) {
      const index_t h = p * g.stride_h - g.pad_top + r * g.dilation_h;
      if (h < band_.h_begin || h >= band_.h_end) continue;
      open_until(h + 1);
      for (index_t c = 0; c < part.ld(); c += kLanes<C>) {
        add_row(part, slot(h) + part.channel + c, part.weights + r * g.S * part.ld() + c, grad + c, grad_ld);
      }
    }
  }

  C* slot(index_t h) const { return ring_ + h % capacity_ * g_.W * ld_; }

  void open_until(index_t h) {
    for (; opened_ < h; ++opened_) __builtin_memset(slot(opened_), 0, g_.W * ld_ * sizeof(C));
  }

  void flush_until(index_t h) {
    for (const index_t stop = imin(h, band_.h_end); flushed_ < stop; ++flushed_) {
      open_until(flushed_ + 1);
      T* row = static_cast<T*>(destination_.data) + band_.n * destination_.n + flushed_ * destination_.h;
      scatter_segment(slot(flushed_), ld_, g_.W, g_.C, g_.multiplier, row, destination_.w, destination_.c);
    }
  }

  // One kernel row and one register of channels.
  void add_row(const DepthwisePart<C>& part, C* row, const C* w, const C* grad, index_t grad_ld) const {
    const DepthwiseGeometry& g = part.g;
    for (index_t t = 0; t < g.S; ++t) {
      const vec<C> tap = load(w + t * part.ld());
      const index_t shift = t * g.dilation_w - g.pad_left;
      const index_t first = ceil_div(imax(0, -shift), g.stride_w);
      for (index_t q = first; q < g.Q; ++q) {
        const index_t x = q * g.stride_w + shift;
        if (x >= g.W) break;
        store(row + x * ld_, load(row + x * ld_) + load(grad + q * grad_ld) * tap);
      }
    }
  }

  const DepthwiseGeometry& g_;
  DepthwiseParts<C> parts_;
  TensorRef destination_;
  index_t ld_, capacity_;
  C* ring_ = nullptr;
  Band band_{};
  index_t flushed_ = 0, opened_ = 0;
};

// ---- gradient of the kernels ----

// sums[tap][channel] += input * grad over output rows. Source: RowSource<T>, or what has its row, pixel_stride and direct. The taps of a window stay in registers over several rows, and go
// to doubles before a float chain gets long.
template <class T>
class GradDepthwiseWeight {
  using C = compute<T>;
  // Two sets of accumulators halve the chains and their latency, where there are registers for them.
  static constexpr bool kWide = EFFOPS_VECTOR_BYTES == 64;
  static constexpr int kSets = kWide ? 2 : 1, kPixels = kWide ? 7 : 4;
  static constexpr index_t kChain = 32;
  static constexpr int kMaxRows = kSets * kChain;

 public:
  GradDepthwiseWeight(const DepthwiseGeometry& g, double* sums)
      : g_(g), sums_(sums), ld_(round_up(g.out_channels(), kLanes<C>)) {}
  bool wanted() const { return sums_ != nullptr; }

  // grad: [rows * Q][grad_ld], the gradients at the sums of output rows [p_begin, p_end).
  template <class Source>  // RowSource<T>, or what has its row, pixel_stride and direct
  void add(Source& source, index_t n, index_t p_begin, index_t p_end, const C* grad, index_t grad_ld) const {
    const index_t group = source.direct() ? imax(1, kSets * kChain / g_.Q) : 1;
    for (index_t p = p_begin; p < p_end; p += group) {
      const Rows rows{n, p, imin(p_end, p + group), grad + (p - p_begin) * g_.Q * grad_ld, grad_ld};
      const bool sliding = g_.dilation_w == 1 && g_.stride_w <= 2;
      if (sliding && g_.S == 3 && g_.R == 3) {
        g_.stride_w == 1 ? window<3, 3, 1>(source, rows, 0) : window<3, 3, 2>(source, rows, 0);
      } else if (sliding && g_.S == 3) {
        row_by_row<3>(source, rows);
      } else if (sliding && g_.S == 5) {
        row_by_row<5>(source, rows);
      } else if (sliding && g_.S == 7) {
        row_by_row<7>(source, rows);
      } else {
        any(source, rows);
      }
    }
  }

 private:
  struct Rows {
    index_t n, p_begin, p_end;
    const C* grad;
    index_t grad_ld;
  };

  index_t input_row(index_t p, index_t r) const { return p * g_.stride_h - g_.pad_top + r * g_.dilation_h; }

  // Any window: a row of pixels for each tap.
  template <class Source>
  void any(Source& source, const Rows& rows) const {
    for (index_t p = rows.p_begin; p < rows.p_end; ++p) {
      const TapRange valid = valid_taps(p, g_.stride_h, g_.pad_top, g_.dilation_h, g_.R, g_.H);
      const C* grad = rows.grad + (p - rows.p_begin) * g_.Q * rows.grad_ld;
      for (index_t r = valid.begin; r < valid.end; ++r) {
        const T* x = source.row(rows.n, input_row(p, r));
        for (index_t t = 0; t < g_.S; ++t) {
          for_each_register<C>(g_.out_channels(), [&](index_t c, auto whole) {
            one_tap<decltype(whole)::value>(x + c, source.pixel_stride(), grad + c, rows.grad_ld,
                                            sums_ + (r * g_.S + t) * ld_ + c, g_.out_channels() - c, t);
          });
        }
      }
    }
  }

  template <bool Full>
  void one_tap(const T* x, index_t pixel_stride, const C* grad, index_t grad_ld, double* sums, index_t lanes,
               index_t t) const {
    const index_t shift = t * g_.dilation_w - g_.pad_left;
    vec<C> acc{};
    for (index_t q = shift < 0 ? ceil_div(-shift, g_.stride_w) : 0; q < g_.Q; ++q) {
      const index_t column = q * g_.stride_w + shift;
      if (column >= g_.W) break;
      acc = acc + load_lanes<Full>(x + column * pixel_stride, lanes) * load(grad + q * grad_ld);
    }
    add_to_doubles<C>(sums, acc, kLanes<C>);
  }

  template <int S, class Source>
  EFFOPS_INLINE void row_by_row(Source& source, const Rows& rows) const {
    for (index_t r = 0; r < g_.R; ++r) {
      g_.stride_w == 1 ? window<1, S, 1>(source, rows, r) : window<1, S, 2>(source, rows, r);
    }
  }

  // R x S taps from kernel row r0 on.
  template <int R, int S, int Stride, class Source>
  __attribute__((noinline)) void window(Source& source, const Rows& rows, index_t r0) const {
    const T* x[kMaxRows][R];  // kernel row by kernel row; null outside the map
    for (index_t p = rows.p_begin; p < rows.p_end; ++p) {
      for (int r = 0; r < R; ++r) {
        const index_t h = input_row(p, r0 + r);
        x[p - rows.p_begin][r] = h >= 0 && h < g_.H ? source.row(rows.n, h) : nullptr;
      }
    }
    const index_t pixel_stride = source.pixel_stride(), channels = g_.out_channels(), count = rows.p_end - rows.p_begin;
    for_each_register<C>(channels, [&](index_t c, auto whole) __attribute__((always_inline)) {
      constexpr bool kFull = decltype(whole)::value;
      vec<C> acc[kSets][R][S] = {};
      for (index_t i = 0; i < count; ++i) {
        const C* grad = rows.grad + i * g_.Q * rows.grad_ld + c;
        index_t q = 0;
        for (; q + kPixels <= g_.Q; q += kPixels) {
          const index_t first = q * Stride - g_.pad_left;
          if (first >= 0 && first + (kPixels - 1) * Stride + S <= g_.W) {
            block<kFull, R, S, Stride, kPixels, false>(acc, x[i], c, first, pixel_stride, grad + q * rows.grad_ld,
                                                       rows.grad_ld);
          } else {
            block<kFull, R, S, Stride, kPixels, true>(acc, x[i], c, first, pixel_stride, grad + q * rows.grad_ld,
                                                      rows.grad_ld);
          }
        }
        for (; q < g_.Q; ++q) {
          block<kFull, R, S, Stride, 1, true>(acc, x[i], c, q * Stride - g_.pad_left, pixel_stride,
                                              grad + q * rows.grad_ld, rows.grad_ld);
        }
      }
#pragma GCC unroll 3
      for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
        for (int t = 0; t < S; ++t) {
          const vec<C> sum = kSets == 2 ? acc[0][r][t] + acc[kSets - 1][r][t] : acc[0][r][t];
          add_to_doubles<C>(sums_ + ((r0 + r) * S + t) * ld_ + c, sum, kLanes<C>);
        }
      }
    });
  }

  // Output pixels whose first input pixel is `first`; outside the map (Border) a zero is read.
  template <bool Full, int R, int S, int Stride, int Pixels, bool Border>
  EFFOPS_INLINE void block(vec<C> (&acc)[kSets][R][S], const T* const (&rows)[R], index_t c, index_t first,
                           index_t pixel_stride, const C* grad, index_t grad_ld) const {
    const T* const zero = reinterpret_cast<const T*>(kZeros);
    const index_t width = g_.W, lanes = g_.out_channels() - c;
    vec<C> g[Pixels];
#pragma GCC unroll 8
    for (int j = 0; j < Pixels; ++j) g[j] = load(grad + j * grad_ld);
#pragma GCC unroll 3
    for (int r = 0; r < R; ++r) {
      if (rows[r] == nullptr) continue;
      const T* x = rows[r] + first * pixel_stride + c;
#pragma GCC unroll 32
      for (int k = 0; k < (Pixels - 1) * Stride + S; ++k) {
        const T* at = x + k * pixel_stride;
        if (Border) at = static_cast<std::size_t>(first + k) < static_cast<std::size_t>(width) ? at : zero;
        const vec<C> value = load_lanes<Full>(at, lanes);
#pragma GCC unroll 8
        for (int t = 0; t < S; ++t) {
          if (k >= t && (k - t) % Stride == 0 && (k - t) / Stride < Pixels) {
            const int j = (k - t) / Stride;
            acc[j % kSets][r][t] = acc[j % kSets][r][t] + value * g[j];
          }
        }
      }
    }
  }

  const DepthwiseGeometry& g_;
  double* sums_;
  index_t ld_;
};

// [tap][channel] -> weight gradient [bank][R * S]: the uses of a shared kernel are summed.
template <class T>
void write_depthwise_weight_grad(const DepthwiseGeometry& g, const double* sums, void* destination) {
  const index_t channels = g.out_channels(), taps = g.R * g.S, ld = round_up(channels, kLanes<compute<T>>);
  T* out = static_cast<T*>(destination);
  for (index_t b = 0; b < g.bank; ++b) {
    for (index_t t = 0; t < taps; ++t) {
      double sum = 0;
      for (index_t o = b; o < channels; o += g.bank) sum += sums[t * ld + o];
      out[b * taps + t] = from_compute<T>(static_cast<compute<T>>(sum));
    }
  }
}
