// The gradients of a depthwise convolution, by rows, for every room that has one; and how backward work is cut up.
// Included inside namespace effops::<isa>::{anonymous}; see kernels.inl.
//
// A task owns a band of input rows of one image. It walks the output rows that touch the band in order, tile by tile;
// each tile's gradient at the depthwise sums is scattered into a ring of input-gradient rows, and a row leaves the ring
// when no later output row can touch it. Output rows at a band's edge are computed by both neighbours; weight gradients
// count a row only in the band that owns it. No atomics: each slot of tasks has its own partial weight gradients, added
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

  BandPlan(const DepthwiseGeometry& geometry, bool want_input_, double cost) : g(geometry), want_input(want_input_) {
    slots = slots_for(cost, imax(1, g.N) * imax(1, g.P));
    per_image = g.N >= slots ? 1 : imax(1, imin(ceil_div(slots, imax(1, g.N)), imin(g.H, imax(1, g.P))));
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

template <class T>
class GradInputRing {
  using C = compute<T>;

 public:
  GradInputRing(Arena& arena, const DepthwiseGeometry& g, const TensorRef& destination, const C* weights)
      : g_(g),
        destination_(destination),
        weights_(weights),
        ld_(round_up(g.out_channels(), kLanes<C>)),
        capacity_((g.R - 1) * g.dilation_h + 1) {
    if (wanted()) ring_ = static_cast<C*>(arena.allocate(capacity_ * g.W * ld_ * sizeof(C)));
  }

  bool wanted() const { return destination_.data != nullptr; }

  void begin(const Band& band) {
    band_ = band;
    flushed_ = opened_ = band.h_begin;
  }

  // grad: [Q][grad_ld], the gradient at the depthwise sums of output row p. Rows come in order.
  void add(index_t p, const C* grad, index_t grad_ld) {
    const index_t top = p * g_.stride_h - g_.pad_top;
    flush_until(top);
    const TapRange taps = valid_taps(p, g_.stride_h, g_.pad_top, g_.dilation_h, g_.R, g_.H);
    for (index_t r = taps.begin; r < taps.end; ++r) {
      const index_t h = top + r * g_.dilation_h;
      if (h < band_.h_begin || h >= band_.h_end) continue;
      open_until(h + 1);
      for (index_t c = 0; c < ld_; c += kLanes<C>) {
        if (g_.stride_w == 1 && g_.dilation_w == 1 && g_.S == 3) {
          add_sliding<3>(slot(h) + c, weights_ + r * g_.S * ld_ + c, grad + c, grad_ld);
        } else if (g_.stride_w == 1 && g_.dilation_w == 1 && g_.S == 5) {
          add_sliding<5>(slot(h) + c, weights_ + r * g_.S * ld_ + c, grad + c, grad_ld);
        } else {
          add_any(slot(h) + c, weights_ + r * g_.S * ld_ + c, grad + c, grad_ld, 0, g_.W);
        }
      }
    }
  }

  void end() { flush_until(band_.h_end); }

 private:
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

  // Input pixels [begin, end) of one kernel row and one register of channels.
  void add_any(C* row, const C* w, const C* grad, index_t grad_ld, index_t begin, index_t end) const {
    for (index_t t = 0; t < g_.S; ++t) {
      const vec<C> tap = load(w + t * ld_);
      const index_t shift = t * g_.dilation_w - g_.pad_left;
      const index_t first = ceil_div(imax(0, begin - shift), g_.stride_w);
      for (index_t q = first; q < g_.Q; ++q) {
        const index_t x = q * g_.stride_w + shift;
        if (x >= end) break;
        store(row + x * ld_, load(row + x * ld_) + load(grad + q * grad_ld) * tap);
      }
    }
  }

  template <int S>
  __attribute__((noinline)) void add_sliding(C* row, const C* w, const C* grad, index_t grad_ld) const {
    constexpr int kPixels = 4;
    vec<C> tap[S];
#pragma GCC unroll 8
    for (int t = 0; t < S; ++t) tap[t] = load(w + t * ld_);
    // input pixel x receives grad[x + pad - t] * tap[t]
    const index_t first = imin(g_.W, imax(0, S - 1 - g_.pad_left)), last = imax(first, imin(g_.W, g_.Q - g_.pad_left));
    index_t x = first;
    for (; x + kPixels <= last; x += kPixels) {
      vec<C> acc[kPixels];
#pragma GCC unroll 8
      for (int j = 0; j < kPixels; ++j) acc[j] = load(row + (x + j) * ld_);
      const C* at = grad + (x + g_.pad_left - (S - 1)) * grad_ld;
#pragma GCC unroll 16
      for (int k = 0; k < kPixels + S - 1; ++k) {
        const vec<C> value = load(at + k * grad_ld);
#pragma GCC unroll 8
        for (int t = 0; t < S; ++t) {
          const int j = k - (S - 1) + t;
          if (j >= 0 && j < kPixels) acc[j] = acc[j] + value * tap[t];
        }
      }
#pragma GCC unroll 8
      for (int j = 0; j < kPixels; ++j) store(row + (x + j) * ld_, acc[j]);
    }
    if (first > 0) add_any(row, w, grad, grad_ld, 0, first);
    if (x < g_.W) add_any(row, w, grad, grad_ld, x, g_.W);
  }

  const DepthwiseGeometry& g_;
  TensorRef destination_;
  const C* weights_;
  index_t ld_, capacity_;
  C* ring_ = nullptr;
  Band band_{};
  index_t flushed_ = 0, opened_ = 0;
};

// ---- gradient of the kernels ----

// sums[tap][channel] += input * grad over one output row.
template <class T>
class GradDepthwiseWeight {
  using C = compute<T>;

 public:
  GradDepthwiseWeight(const DepthwiseGeometry& g, double* sums)
      : g_(g), sums_(sums), ld_(round_up(g.out_channels(), kLanes<C>)) {}
  bool wanted() const { return sums_ != nullptr; }

  void add(RowSource<T>& source, index_t n, index_t p, const C* grad, index_t grad_ld) const {
    const TapRange taps = valid_taps(p, g_.stride_h, g_.pad_top, g_.dilation_h, g_.R, g_.H);
    const index_t channels = g_.out_channels(), pixel_stride = source.pixel_stride();
    for (index_t r = taps.begin; r < taps.end; ++r) {
      const T* row = source.row(n, p * g_.stride_h - g_.pad_top + r * g_.dilation_h);
      double* sums = sums_ + r * g_.S * ld_;
      for (index_t c = 0; c < channels; c += kLanes<C>) {
        if (c + kLanes<C> <= channels) {
          one_register<true>(row + c, pixel_stride, grad + c, grad_ld, sums + c, channels - c);
        } else {
          one_register<false>(row + c, pixel_stride, grad + c, grad_ld, sums + c, channels - c);
        }
      }
    }
  }

 private:
  template <bool Full>
  EFFOPS_INLINE void one_register(const T* x, index_t pixel_stride, const C* grad, index_t grad_ld, double* sums,
                                  index_t lanes) const {
    if (g_.S == 3 && g_.dilation_w == 1 && g_.stride_w == 1) {
      taps_together<Full, 3, 1>(x, pixel_stride, grad, grad_ld, sums, lanes);
    } else if (g_.S == 3 && g_.dilation_w == 1 && g_.stride_w == 2) {
      taps_together<Full, 3, 2>(x, pixel_stride, grad, grad_ld, sums, lanes);
    } else {
      for (index_t t = 0; t < g_.S; ++t) one_tap<Full>(x, pixel_stride, grad, grad_ld, sums, lanes, t, 0, g_.Q);
    }
  }

  template <bool Full>
  void one_tap(const T* x, index_t pixel_stride, const C* grad, index_t grad_ld, double* sums, index_t lanes, index_t t,
               index_t begin, index_t end) const {
    const index_t shift = t * g_.dilation_w - g_.pad_left;
    vec<C> acc{};
    for (index_t q = imax(begin, shift < 0 ? ceil_div(-shift, g_.stride_w) : 0); q < end; ++q) {
      const index_t column = q * g_.stride_w + shift;
      if (column >= g_.W) break;
      acc = acc + load_lanes<Full>(x + column * pixel_stride, lanes) * load(grad + q * grad_ld);
    }
    add_to_doubles<C>(sums + t * ld_, acc, kLanes<C>);
  }

  template <bool Full, int S, int Stride>
  __attribute__((noinline)) void taps_together(const T* x, index_t pixel_stride, const C* grad, index_t grad_ld,
                                               double* sums, index_t lanes) const {
    constexpr int kPixels = 4;
    const index_t first = imin(g_.Q, ceil_div(g_.pad_left, Stride));
    const index_t room = g_.W - S + g_.pad_left;
    const index_t last = imax(first, imin(g_.Q, room >= 0 ? room / Stride + 1 : 0));
    vec<C> acc[2][S];  // two sets: the chain of dependent additions would be the limit otherwise
#pragma GCC unroll 8
    for (int t = 0; t < S; ++t) acc[0][t] = acc[1][t] = vec<C>{};
    index_t q = first;
    for (; q + kPixels <= last; q += kPixels) {
      vec<C> g[kPixels];
#pragma GCC unroll 8
      for (int j = 0; j < kPixels; ++j) g[j] = load(grad + (q + j) * grad_ld);
      const T* at = x + (q * Stride - g_.pad_left) * pixel_stride;
#pragma GCC unroll 16
      for (int k = 0; k < (kPixels - 1) * Stride + S; ++k) {
        const vec<C> value = load_lanes<Full>(at + k * pixel_stride, lanes);
#pragma GCC unroll 8
        for (int t = 0; t < S; ++t) {
          if (k - t >= 0 && (k - t) % Stride == 0 && (k - t) / Stride < kPixels) {
            const int j = (k - t) / Stride;
            acc[j % 2][t] = acc[j % 2][t] + value * g[j];
          }
        }
      }
    }
#pragma GCC unroll 8
    for (int t = 0; t < S; ++t) add_to_doubles<C>(sums + t * ld_, acc[0][t] + acc[1][t], kLanes<C>);
    for (index_t t = 0; t < S; ++t) {
      if (first > 0) one_tap<Full>(x, pixel_stride, grad, grad_ld, sums, lanes, t, 0, first);
      if (q < g_.Q) one_tap<Full>(x, pixel_stride, grad, grad_ld, sums, lanes, t, q, g_.Q);
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
