// Room blurmaxpool: max pool of stride 1, then a binomial blur with stride, in one pass, forward and backward.
// Included inside namespace effops::<isa>::{anonymous}; see kernels.inl.
//
//   forward    input rows --max, blur along the width--> ring of `size` rows [Q][ld] --blur along the height--> output
//              row; windows of 2x2 in registers, others by way of a line [Wp] of one register of channels, L1
//   backward   grad_output rows --height--> line [Q] --width--> line [Wp] --to each window's first maximum--> for windows
//              of 2x2 the upper row of grad input, and a line [W][ld] for the next; for others a ring of window_h rows
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

// Windows of 2x2 without padding, as everybody's are: pooled row h is rows h and h + 1 of the map.
inline bool pools_pairs(const BlurMaxPoolArgs& args) {
  return args.window_h == 2 && args.window_w == 2 && args.Hp == args.H - 1 && args.Wp == args.W - 1;
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
    // Cycles of a register of channels: measured for windows of 2x2, counted for others.
    const double per_pixel = pools_pairs(args) ? 10.0 : 4.0 * (args.window_h + args.window_w) + args.size;
    const double cost = static_cast<double>(args.N) * args.H * args.W * ld / kLanes<C> * per_pixel;
    const index_t slots = slots_for(cost, rows);
    const index_t shares = slots == 1 ? 1 : imax(slots, imin(4 * slots, rows / kRangeRows));
    run_tasks(shares, [&](index_t s) { Task(*this).run(rows * s / shares, rows * (s + 1) / shares); });
  }

  struct Task {
    const BlurMaxPoolForward& op;
    const BlurMaxPoolArgs& args;
    Arena arena{Arena::kTask};
    RowSource<T> source;
    C *ring, *zeros, *column_max, *pooled, *out = nullptr;
    const T** rows;  // of a window
    index_t* held;

    explicit Task(const BlurMaxPoolForward& o) : op(o), args(o.args), source(arena, args.input, o.input_rows) {
      const auto values = [&](index_t count) { return static_cast<C*>(arena.allocate(count * sizeof(C))); };
      ring = values(args.size * args.Q * op.ld);
      zeros = values(args.Q * op.ld);
      __builtin_memset(zeros, 0, args.Q * op.ld * sizeof(C));
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
      const C* blurred[Binomial<C>::kMax];
      for (index_t i = 0; i < args.size; ++i) {
        const index_t h = blur_source(p * args.stride_h - op.before + i, args.Hp, args.reflect);
        blurred[i] = h < 0 ? zeros : row(n, h);
      }
      T* to = static_cast<T*>(args.output.data) + n * args.output.n + p * args.output.h;
      if (out == nullptr) {
        for_size([&](auto size) { sum_rows<size, true>(blurred, to, args.output.w); });
      } else {
        for_size([&](auto size) { sum_rows<size, false>(blurred, out, op.ld); });
        scatter_segment(out, op.ld, args.Q, args.C, 1, to, args.output.w, args.output.c);
      }
    }

    // f(size of the filter): known at compile time for the two in use, 0 for others.
    template <class F>
    EFFOPS_INLINE void for_size(const F& f) const {
      if (args.size == 3) return f(std::integral_constant<int, 3>{});
      if (args.size == 4) return f(std::integral_constant<int, 4>{});
      f(std::integral_constant<int, 0>{});
    }

    template <int Size, bool Exact, class D>
    void sum_rows(const C* const* blurred, D* to, index_t to_ld) const {
      const index_t size = Size ? Size : args.size;
      for (index_t q = 0; q < args.Q; ++q) {
        for_each_register<C>(args.C, [&](index_t c, auto whole) __attribute__((always_inline)) {
          vec<C> sum{};
#pragma GCC unroll 4
          for (index_t i = 0; i < size; ++i) sum = sum + load(blurred[i] + q * op.ld + c) * op.filter.tap[i];
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
      const bool in_registers = pools_pairs(args) && args.stride_w == 2 && (args.size == 3 || args.size == 4);
      for_each_register<C>(args.C, [&](index_t c, auto whole) {
        constexpr bool kFull = decltype(whole)::value;
        if (in_registers) {
          args.size == 3 ? pairs_along_width<kFull, 3>(c, to + c) : pairs_along_width<kFull, 4>(c, to + c);
        } else {
          max_of_rows<kFull>(count, c);
          max_along_width();
          blur_along_width(to + c);
        }
      });
      return to;
    }

    // The whole way for windows of 2x2 without padding and a stride of 2: two input columns a result are new, the rest
    // stays in registers.
    template <bool Full, int Size>
    void pairs_along_width(index_t c, C* to) const {
      const index_t pixel = source.pixel_stride(), lanes = args.C - c, next_row = source.next_row();
      const T *upper = rows[0] + c, *lower = rows[1] + c;
      const auto column = [&](index_t w) __attribute__((always_inline)) {
        const T* below = lower + w * pixel;
        __builtin_prefetch(below + next_row, 0, 2);
        return pool_max<C>(load_lanes<Full>(upper + w * pixel, lanes), load_lanes<Full>(below, lanes));
      };
      const auto edge = [&](index_t q) {
        vec<C> sum{};
        for (index_t t = 0; t < Size; ++t) {
          const index_t w = blur_source(2 * q - op.before + t, args.Wp, args.reflect);
          if (w >= 0) sum = sum + pool_max<C>(column(w), column(w + 1)) * op.filter.tap[t];
        }
        store(to + q * op.ld, sum);
      };
      // Inside: the filter reads pooled columns 2 q - before to 2 q - before + Size - 1.
      const index_t begin = imin(args.Q, ceil_div(op.before, 2));
      const index_t end = imax(begin, imin(args.Q, (args.Wp + op.before - Size + 2) / 2));
      for (index_t q = 0; q < begin; ++q) edge(q);
      if (begin < end) {
        index_t w = 2 * begin - op.before;
        vec<C> last = column(w), pooled[Size];
        const auto next = [&]() __attribute__((always_inline)) {
          const vec<C> before = last;
          last = column(++w);
          return pool_max<C>(before, last);
        };
#pragma GCC unroll 4
        for (int t = 0; t < Size - 2; ++t) pooled[t] = next();
        for (index_t q = begin; q < end; ++q) {
          vec<C> sum{};
#pragma GCC unroll 4
          for (int t = 0; t < Size; ++t) {
            if (t >= Size - 2) pooled[t] = next();
            sum = sum + pooled[t] * op.filter.tap[t];
          }
          store(to + q * op.ld, sum);
#pragma GCC unroll 4
          for (int t = 0; t < Size - 2; ++t) pooled[t] = pooled[t + 2];
        }
      }
      for (index_t q = end; q < args.Q; ++q) edge(q);
    }

    template <bool Full>
    void max_of_rows(index_t count, index_t c) const {
      const index_t pixel = source.pixel_stride(), lanes = args.C - c;
      for (index_t w = 0; w < args.W; ++w) {
        vec<C> largest = load_lanes<Full>(rows[0] + w * pixel + c, lanes);
        for (index_t i = 1; i < count; ++i) {
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
    // As forward.
    const double per_pixel = pools_pairs(a) ? 15.0 : 6.0 * a.window_h * a.window_w + a.size;
    const double cost = static_cast<double>(a.N) * a.H * a.W * ld / kLanes<C> * per_pixel;
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

    void run() { pools_pairs(args) ? run_pairs() : run_windows(); }

   private:
    void run_windows() {
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

    // A row of the map is in two rows of windows: `ring` is what the upper ones gave it.
    void run_pairs() {
      const TensorRef& x = args.grad_input;
      T* const image = static_cast<T*>(x.data) + n * x.n;
      __builtin_memset(ring, 0, args.W * op.ld * sizeof(C));
      for (index_t h = imax(0, h_begin - 1); h < imin(args.Hp, h_end); ++h) {
        rows[0] = input.row(n, h), rows[1] = input.row(n, h + 1);
        const GradRows from = grad_rows_of(h);
        T* const to = h >= h_begin ? image + h * x.h : nullptr;
        for_each_register<C>(args.C, [&](index_t c, auto whole) {
          constexpr bool kFull = decltype(whole)::value;
          blur_from_rows<kFull>(from, c);
          blur_along_width();
          if (to == nullptr) {
            to_maxima<kFull>(c, [](index_t, vec<C>) {});
          } else if (x.c == 1) {
            to_maxima<kFull>(c, [&](index_t w, vec<C> v) __attribute__((always_inline)) {
              store_lanes<kFull>(to + w * x.w + c, v, args.C - c);
            });
          } else {
            C* line = slot(1) + c;
            to_maxima<kFull>(c,
                             [&](index_t w, vec<C> v) __attribute__((always_inline)) { store(line + w * op.ld, v); });
          }
        });
        if (to != nullptr && x.c != 1) scatter_segment(slot(1), op.ld, args.W, args.C, 1, to, x.w, x.c);
      }
      if (h_end == args.H) scatter_segment(ring, op.ld, args.W, args.C, 1, image + (args.H - 1) * x.h, x.w, x.c);
    }

    // Every pooled pixel's gradient to its window's maximum: the first of equal ones, the last NaN. put(w, the sum of the
    // upper row's pixel w); the lower row's stay in `ring`. From window to window go the right pixels' values and sums.
    template <bool Full, class Put>
    EFFOPS_INLINE void to_maxima(index_t c, const Put& put) const {
      const index_t pixel = input.pixel_stride(), next_row = input.next_row(), lanes = args.C - c;
      const T *upper = rows[0] + c, *lower = rows[1] + c;
      C* below = ring + c;
      const vec<C> zero{};
      vec<C> top_sum{}, bottom_sum{}, top = load_lanes<Full>(upper, lanes), bottom = load_lanes<Full>(lower, lanes);
      for (index_t w = 0; w < args.Wp; ++w, below += op.ld) {
        upper += pixel, lower += pixel;
        __builtin_prefetch(lower + next_row, 0, 2);
        const vec<C> top_right = load_lanes<Full>(upper, lanes), bottom_right = load_lanes<Full>(lower, lanes);
        const vmask<C> right = takes_second<C>(top, top_right);
        const vec<C> of_two = right ? top_right : top;
        const vmask<C> lower_left = takes_second<C>(of_two, bottom);
        const vec<C> of_three = lower_left ? bottom : of_two;
        const vmask<C> lower_right = takes_second<C>(of_three, bottom_right);
        const vec<C> grad = load(pooled + w * kLanes<C>);
        const vec<C> to_upper = (lower_left | lower_right) ? zero : grad, to_left = lower_right ? zero : grad;
        put(w, load(below) + top_sum + (right ? zero : to_upper));
        store(below, bottom_sum + (lower_left ? to_left : zero));
        top_sum = right ? to_upper : zero;
        bottom_sum = lower_right ? grad : zero;
        top = top_right, bottom = bottom_right;
      }
      put(args.Wp, load(below) + top_sum);
      store(below, bottom_sum);
    }

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
      const index_t q_end = args.Q - 2;  // of those inside: no mirror image, and blurred columns on both sides
      if (args.stride_w != 2 || (args.size != 3 && args.size != 4) || q_end <= 2) return blur_columns(0, args.Wp);
      blur_columns(0, 4);
      args.size == 3 ? blur_pairs<3>(2, q_end) : blur_pairs<4>(2, q_end);
      blur_columns(2 * q_end, args.Wp);
    }

    void blur_columns(index_t begin, index_t end) const {
      for (index_t w = begin; w < end; ++w) {
        vec<C> sum{};
        for (index_t i = columns.begin[w]; i < columns.begin[w + 1]; ++i)
          sum = sum + load(blurred + columns.column[i] * kLanes<C>) * columns.tap[i];
        store(pooled + w * kLanes<C>, sum);
      }
    }

    // Pooled columns 2 q and 2 q + 1, to which blurred columns q - 1 (a filter of 4), q and q + 1 read.
    template <int Size>
    void blur_pairs(index_t begin, index_t end) const {
      const C* tap = op.filter.tap;
      vec<C> before = load(blurred + (begin - 1) * kLanes<C>), here = load(blurred + begin * kLanes<C>);
      for (index_t q = begin; q < end; ++q) {
        const vec<C> after = load(blurred + (q + 1) * kLanes<C>);
        const vec<C> even = here * tap[1];
        store(pooled + 2 * q * kLanes<C>, Size == 3 ? even : even + before * tap[3]);
        store(pooled + (2 * q + 1) * kLanes<C>, here * tap[2] + after * tap[0]);
        before = here, here = after;
      }
    }

    // Adds the gradient at the pooled pixel w to its window's maximum, as to_maxima does.
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
