// Room blurmaxpool: max pool of stride 1, then a binomial blur with stride, in one pass, forward and backward.
// Included inside namespace effops::<isa>::{anonymous}; see kernels.inl.
//
//   forward    input rows --max--> line [Wp], one register of channels, L1 --blur along the width--> ring of `size`
//              rows [Q][ld] --blur along the height--> output row
//   backward   grad_output rows --height--> line [Q] --width--> line [Wp] --to each window's first maximum--> ring of
//              window_h rows [W][ld] of grad input
//
// The blur is the outer product of one row of binomial coefficients, so that it goes along one axis at a time: size +
// size / stride multiply-adds a result of the first. The pooled map exists only as lines. A task owns a range of output
// rows (backward: a band of input rows of one image); neighbours both compute the size + window - 2 rows at an edge.
// Moved: the input once, the output once (backward: the input, both gradients): 5 bytes an fp32 input value at stride 2,
// a floor of 0.10 ms at 40 GB/s for 64 channels of 112x112 and 0.013 ms for 128 of 28x28.

// The binomial coefficients of a filter, of sum 1.
template <class C>
struct Binomial {
  static constexpr int kMax = 7;
  C tap[kMax];
  explicit Binomial(index_t size) {
    double row[kMax] = {1};
    for (index_t n = 1; n < size; ++n) {
      for (index_t i = n; i > 0; --i) row[i] = (row[i] + row[i - 1]) / 2;
      row[0] /= 2;
    }
    for (index_t i = 0; i < kMax; ++i) tap[i] = static_cast<C>(i < size ? row[i] : 0);
  }
};

// Where the filter's tap at `position` of an axis reads, or -1 for a zero.
EFFOPS_INLINE index_t blur_source(index_t position, index_t size, bool reflect) {
  if (position >= 0 && position < size) return position;
  if (!reflect) return -1;
  return position < 0 ? -position : 2 * (size - 1) - position;
}

// RowSource needs a window of rows: `rows` of a map of H x W.
inline DepthwiseGeometry rows_of_map(index_t N, index_t C, index_t H, index_t W, index_t rows) {
  DepthwiseGeometry g{};
  g.N = N, g.C = C, g.H = H, g.W = W, g.R = rows;
  g.dilation_h = g.multiplier = g.stride_h = 1;
  return g;
}

// What the rows of the pool's windows are: those of pooled row `h` that lie in the map.
inline TapRange pool_rows(const BlurMaxPoolArgs& args, index_t h) {
  return {imax(0, h - args.pool_top), imin(args.H, h - args.pool_top + args.window_h)};
}
inline TapRange pool_columns(const BlurMaxPoolArgs& args, index_t w) {
  return {imax(0, w - args.pool_left), imin(args.W, w - args.pool_left + args.window_w)};
}

// ---- forward ----

template <class T>
struct BlurMaxPoolForward {
  using C = compute<T>;
  const BlurMaxPoolArgs& args;
  const Binomial<C> filter;
  const index_t ld, before;  // before: padding above and to the left
  const DepthwiseGeometry input_rows;

  explicit BlurMaxPoolForward(const BlurMaxPoolArgs& a)
      : args(a),
        filter(a.size),
        ld(round_up(a.C, kLanes<C>)),
        before((a.size - 1) / 2),
        input_rows(rows_of_map(a.N, a.C, a.H, a.W, a.window_h)) {}

  void run() {
    const index_t rows = args.N * args.P;
    if (rows == 0) return;
    constexpr index_t kRangeRows = 16;
    const double cost = static_cast<double>(args.N) * args.H * args.W * ld / kLanes<C> *
                        (4.0 * (args.window_h + args.window_w) + args.size);
    const index_t slots = slots_for(cost, rows);
    const index_t shares = slots == 1 ? 1 : imax(slots, imin(4 * slots, rows / kRangeRows));
    run_tasks(shares, [&](index_t s) { Task(*this).run(rows * s / shares, rows * (s + 1) / shares); });
  }

  struct Task {
    const BlurMaxPoolForward& op;
    const BlurMaxPoolArgs& args;
    Arena arena{Arena::kTask};
    RowSource<T> source;
    C *ring, *column_max, *pooled, *out = nullptr;
    const T** rows;  // of a window
    index_t* held;

    explicit Task(const BlurMaxPoolForward& o) : op(o), args(o.args), source(arena, args.input, o.input_rows) {
      const auto values = [&](index_t count) { return static_cast<C*>(arena.allocate(count * sizeof(C))); };
      ring = values(args.size * args.Q * op.ld);
      column_max = values(args.W * kLanes<C>);
      pooled = values(args.Wp * kLanes<C>);
      if (args.output.c != 1) out = values(args.Q * op.ld);
      rows = static_cast<const T**>(arena.allocate(args.window_h * sizeof(T*)));
      held = static_cast<index_t*>(arena.allocate(args.size * sizeof(index_t)));
      for (index_t i = 0; i < args.size; ++i) held[i] = -1;
    }

    void run(index_t begin, index_t end) {
      for (index_t i = begin; i < end; ++i) output_row(i / args.P, i % args.P);
    }

   private:
    void output_row(index_t n, index_t p) {
      const C* blurred[Binomial<C>::kMax];  // null: zeros
      for (index_t i = 0; i < args.size; ++i) {
        const index_t h = blur_source(p * args.stride_h - op.before + i, args.Hp, args.reflect);
        blurred[i] = h < 0 ? nullptr : row(n, h);
      }
      T* to = static_cast<T*>(args.output.data) + n * args.output.n + p * args.output.h;
      if (out == nullptr) {
        sum_rows<true>(blurred, to, args.output.w);
      } else {
        sum_rows<false>(blurred, out, op.ld);
        scatter_segment(out, op.ld, args.Q, args.C, 1, to, args.output.w, args.output.c);
      }
    }

    template <bool Exact, class D>
    void sum_rows(const C* const* blurred, D* to, index_t to_ld) const {
      for (index_t q = 0; q < args.Q; ++q) {
        for_each_register<C>(args.C, [&](index_t c, auto whole) __attribute__((always_inline)) {
          vec<C> sum{};
          for (index_t i = 0; i < args.size; ++i) {
            if (blurred[i]) sum = sum + load(blurred[i] + q * op.ld + c) * op.filter.tap[i];
          }
          store_lanes<decltype(whole)::value || !Exact>(to + q * to_ld + c, sum, args.C - c);
        });
      }
    }

    // Row h of the pooled map, blurred along the width.
    const C* row(index_t n, index_t h) {
      const index_t slot = h % args.size;
      C* to = ring + slot * args.Q * op.ld;
      if (held[slot] == n * args.Hp + h) return to;
      held[slot] = n * args.Hp + h;
      const TapRange window = pool_rows(args, h);
      const index_t count = window.end - window.begin;
      for (index_t i = 0; i < count; ++i) rows[i] = source.row(n, window.begin + i);
      for_each_register<C>(args.C, [&](index_t c, auto whole) {
        constexpr bool kFull = decltype(whole)::value;
        count == 2 ? max_of_rows<kFull, 2>(count, c) : max_of_rows<kFull, 0>(count, c);
        max_along_width();
        blur_along_width(to + c);
      });
      return to;
    }

    template <bool Full, int Count>
    void max_of_rows(index_t count, index_t c) const {
      const index_t pixel = source.pixel_stride(), lanes = args.C - c;
      for (index_t w = 0; w < args.W; ++w) {
        vec<C> largest = load_lanes<Full>(rows[0] + w * pixel + c, lanes);
        for (index_t i = 1; i < (Count ? Count : count); ++i) {
          largest = pool_max<C>(largest, load_lanes<Full>(rows[i] + w * pixel + c, lanes));
        }
        store(column_max + w * kLanes<C>, largest);
      }
    }

    void max_along_width() const {
      for (index_t w = 0; w < args.Wp; ++w) {
        const TapRange window = pool_columns(args, w);
        vec<C> largest = load(column_max + window.begin * kLanes<C>);
        for (index_t x = window.begin + 1; x < window.end; ++x) {
          largest = pool_max<C>(largest, load(column_max + x * kLanes<C>));
        }
        store(pooled + w * kLanes<C>, largest);
      }
    }

    void blur_along_width(C* to) const {
      for (index_t q = 0; q < args.Q; ++q) {
        const index_t first = q * args.stride_w - op.before;
        vec<C> sum{};
        if (first >= 0 && first + args.size <= args.Wp) {
          for (index_t t = 0; t < args.size; ++t) sum = sum + load(pooled + (first + t) * kLanes<C>) * op.filter.tap[t];
        } else {
          for (index_t t = 0; t < args.size; ++t) {
            const index_t w = blur_source(first + t, args.Wp, args.reflect);
            if (w >= 0) sum = sum + load(pooled + w * kLanes<C>) * op.filter.tap[t];
          }
        }
        store(to + q * op.ld, sum);
      }
    }
  };
};

template <class T>
void blur_max_pool_fwd(const BlurMaxPoolArgs& args) {
  BlurMaxPoolForward<T>(args).run();
}

// ---- backward ----

template <class T>
struct BlurMaxPoolBackward {
  using C = compute<T>;
  const BlurMaxPoolArgs& args;
  const Binomial<C> filter;
  const index_t ld, before;
  const DepthwiseGeometry input_rows, grad_rows;
  index_t per_image;  // bands

  explicit BlurMaxPoolBackward(const BlurMaxPoolArgs& a)
      : args(a),
        filter(a.size),
        ld(round_up(a.C, kLanes<C>)),
        before((a.size - 1) / 2),
        input_rows(rows_of_map(a.N, a.C, a.H, a.W, a.window_h)),
        grad_rows(rows_of_map(a.N, a.C, a.P, a.Q, a.size)) {
    const double cost =
        static_cast<double>(a.N) * a.H * a.W * ld / kLanes<C> * (6.0 * a.window_h * a.window_w + a.size);
    const index_t slots = slots_for(cost, imax(1, a.N) * a.H);
    per_image = a.N >= slots ? 1 : imin(a.H, ceil_div(slots, imax(1, a.N)));
  }

  // Where the padding reflects, a pooled row went to rows beyond a window's: up to as far as its mirror image lies.
  index_t mirrored_rows() const { return args.reflect ? 2 * args.size : 0; }

  void run() {
    if (args.N == 0) return;
    run_tasks(args.N * per_image, [&](index_t i) {
      const index_t n = i / per_image, k = i % per_image;
      Task(*this, n, args.H * k / per_image, args.H * (k + 1) / per_image).run();
    });
  }

  // The blurred columns that pooled column w went to stand from begin[w] to begin[w + 1], with the taps: searching for
  // them takes divisions.
  struct Targets {
    index_t *begin, *column;
    C* tap;
  };

  struct Task {
    const BlurMaxPoolBackward& op;
    const BlurMaxPoolArgs& args;
    const index_t n, h_begin, h_end;
    Arena arena{Arena::kTask};
    RowSource<T> input, grad_output;
    C *ring, *blurred, *pooled;  // of gradients
    const T** rows;              // of a window
    C** sums;                    // the ring's rows of a window; null outside the band
    Targets columns;

    Task(const BlurMaxPoolBackward& o, index_t image, index_t begin, index_t end)
        : op(o),
          args(o.args),
          n(image),
          h_begin(begin),
          h_end(end),
          input(arena, args.input, o.input_rows),
          grad_output(arena, args.output, o.grad_rows, o.mirrored_rows()) {
      const auto values = [&](index_t count) { return static_cast<C*>(arena.allocate(count * sizeof(C))); };
      ring = values(args.window_h * args.W * op.ld);
      blurred = values(args.Q * kLanes<C>);
      pooled = values(args.Wp * kLanes<C>);
      rows = static_cast<const T**>(arena.allocate(args.window_h * sizeof(T*)));
      sums = static_cast<C**>(arena.allocate(args.window_h * sizeof(C*)));
      columns = targets_of_columns();
    }

    void run() {
      index_t opened = h_begin, flushed = h_begin;
      const auto flush_until = [&](index_t h) {
        for (const index_t stop = imin(h, h_end); flushed < stop; ++flushed) {
          if (opened == flushed) clear(opened++);
          flush(flushed);
        }
      };
      // The windows that reach into the band.
      const index_t first = imax(0, h_begin + args.pool_top - args.window_h + 1);
      const index_t last = imin(args.Hp, h_end + args.pool_top);
      for (index_t h = first; h < last; ++h) {
        const TapRange window = pool_rows(args, h);
        flush_until(window.begin);
        while (opened < imin(window.end, h_end)) clear(opened++);
        for (index_t i = window.begin; i < window.end; ++i) {
          rows[i - window.begin] = input.row(n, i);
          sums[i - window.begin] = i >= h_begin && i < h_end ? slot(i) : nullptr;
        }
        const GradRows from = grad_rows_of(h);
        for_each_register<C>(args.C, [&](index_t c, auto whole) {
          constexpr bool kFull = decltype(whole)::value;
          blur_from_rows<kFull>(from, c);
          blur_along_width();
          for (index_t w = 0; w < args.Wp; ++w)
            to_maximum<kFull>(window.end - window.begin, pool_columns(args, w), w, c);
        });
      }
      flush_until(h_end);
    }

   private:
    C* slot(index_t h) const { return ring + h % args.window_h * args.W * op.ld; }
    void clear(index_t h) const { __builtin_memset(slot(h), 0, args.W * op.ld * sizeof(C)); }
    void flush(index_t h) const {
      const TensorRef& x = args.grad_input;
      scatter_segment(slot(h), op.ld, args.W, args.C, 1, static_cast<T*>(x.data) + n * x.n + h * x.h, x.w, x.c);
    }

    // The rows of grad_output that pooled row h went to, and by which tap: itself and what the padding reflects of it.
    struct GradRows {
      index_t count = 0;
      const T* row[3 * Binomial<C>::kMax];
      C tap[3 * Binomial<C>::kMax];
    };
    GradRows grad_rows_of(index_t h) {
      GradRows found;
      for_each_target(h, args.Hp, args.P, args.stride_h, [&](index_t p, index_t tap) {
        found.row[found.count] = grad_output.row(n, p);
        found.tap[found.count++] = op.filter.tap[tap];
      });
      return found;
    }

    // f(output, tap) for every output of an axis whose filter reads `source` with that tap, in rising order of the
    // positions that the padding maps to it.
    template <class F>
    EFFOPS_INLINE void for_each_target(index_t source, index_t size, index_t outputs, index_t stride,
                                       const F& f) const {
      const index_t mirrored[3] = {-source, source, 2 * (size - 1) - source};
      for (int k = 0; k < 3; ++k) {
        const index_t position = mirrored[k];
        if (k != 1 && (!args.reflect || (position >= 0 && position < size))) continue;
        const index_t padded = position + op.before;  // from the first tap of the first output
        if (padded < 0) continue;
        const index_t last = imin(outputs - 1, padded / stride);
        for (index_t q = ceil_div(imax(0, padded - args.size + 1), stride); q <= last; ++q) f(q, padded - q * stride);
      }
    }

    template <bool Full>
    void blur_from_rows(const GradRows& from, index_t c) const {
      const index_t pixel = grad_output.pixel_stride();
      for (index_t q = 0; q < args.Q; ++q) {
        vec<C> sum{};
        for (index_t i = 0; i < from.count; ++i)
          sum = sum + load_lanes<Full>(from.row[i] + q * pixel + c, args.C - c) * from.tap[i];
        store(blurred + q * kLanes<C>, sum);
      }
    }

    Targets targets_of_columns() {
      const index_t most = args.Wp * args.size * (args.reflect ? 3 : 1);
      const auto indices = [&](index_t count) {
        return static_cast<index_t*>(arena.allocate(count * sizeof(index_t)));
      };
      const Targets found{indices(args.Wp + 1), indices(most), static_cast<C*>(arena.allocate(most * sizeof(C)))};
      index_t count = 0;
      for (index_t w = 0; w < args.Wp; ++w) {
        found.begin[w] = count;
        for_each_target(w, args.Wp, args.Q, args.stride_w, [&](index_t q, index_t tap) {
          found.column[count] = q;
          found.tap[count++] = op.filter.tap[tap];
        });
      }
      found.begin[args.Wp] = count;
      return found;
    }

    void blur_along_width() const {
      for (index_t w = 0; w < args.Wp; ++w) {
        vec<C> sum{};
        for (index_t i = columns.begin[w]; i < columns.begin[w + 1]; ++i)
          sum = sum + load(blurred + columns.column[i] * kLanes<C>) * columns.tap[i];
        store(pooled + w * kLanes<C>, sum);
      }
    }

    // Adds the gradient at the pooled pixel w to its window's maximum: the first of equal ones, the last NaN.
    template <bool Full>
    EFFOPS_INLINE void to_maximum(index_t height, const TapRange& range, index_t w, index_t c) const {
      const index_t pixel = input.pixel_stride(), lanes = args.C - c;
      const auto value = [&](index_t h, index_t x) __attribute__((always_inline)) {
        return load_lanes<Full>(rows[h] + x * pixel + c, lanes);
      };
      vec<C> largest = value(0, range.begin);
      vmask<C> chosen{};
      typename std::remove_reference<decltype(chosen[0])>::type position = 0;
      for (index_t h = 0; h < height; ++h) {
        for (index_t x = range.begin; x < range.end; ++x, ++position) {
          const vec<C> v = value(h, x);
          const vmask<C> taken = takes_second<C>(largest, v);
          largest = taken ? v : largest;
          chosen = taken ? position - vmask<C>{} : chosen;
        }
      }
      const vec<C> grad = load(pooled + w * kLanes<C>), zero{};
      position = 0;
      for (index_t h = 0; h < height; ++h) {
        for (index_t x = range.begin; x < range.end; ++x, ++position) {
          if (sums[h] == nullptr) continue;
          C* at = sums[h] + x * op.ld + c;
          store(at, load(at) + ((vmask<C>)(chosen == position) ? grad : zero));
        }
      }
    }
  };
};

template <class T>
void blur_max_pool_bwd(const BlurMaxPoolArgs& args) {
  BlurMaxPoolBackward<T>(args).run();
}
