// Room sepconv: dw 1xS -> epilogue -> [1x2 max pool] -> dw Rx1 -> epilogue -> [2x1 max pool] in one pass (EffNet).
// Included inside namespace effops::<isa>::{anonymous}; see kernels.inl.
//
//   input row --1xS--> line [row.Q][ld] --pairs--> ring of rows [Q][ld] --Rx1--> output row, or
//                      (L1)                        (as many as a window spans)   2 lines --pairs--> output row
//
// A task owns a range of output rows; a row of the ring is computed when a window first reaches it, so the R - 1 rows at
// the upper edge of a range are computed by two tasks. Line and ring are scratch of the task: 10 KB at 32 channels and
// 32 pixels. Moved: the input once (plus those rows), the output once. At 40 GB/s that is a floor of 4.9 us an image for
// EffNet's first block (32 channels, 32x32 -> 32x16, 197 KB) and 2.5 us for its second (64 channels, 16x16 -> 16x8);
// where the caches hold it, the floor is the arithmetic, S + R / 2 FMAs an input value: 1.1 and 0.5 us at 137 FMAs a
// nanosecond.

// torch's max pool keeps the first of two equal values, and a NaN wherever it is: the second of the two is taken where
// it is larger or NaN.
template <class C>
EFFOPS_INLINE vmask<C> takes_second(vec<C> first, vec<C> second) {
  return (vmask<C>)(second > first) | (vmask<C>)(second != second);
}

template <class C>
EFFOPS_INLINE vec<C> pool_max(vec<C> first, vec<C> second) {
  const vec<C> larger = at_least<C>(second, first);  // the second where either is NaN
  return (vmask<C>)(first != first) ? first : larger;
}

// out[i] = max pool of first[i] and second[i], i < pixels; `step` is the distance of two pixels of either. `taken`,
// where given, receives takes_second, for the gradient: rows like `out`, whose lanes are masks.
template <bool Exact, class T, class C>
void pool_pairs(const C* first, const C* second, index_t step, index_t pixels, index_t channels, T* out, index_t out_ld,
                C* taken = nullptr) {
  for (index_t i = 0; i < pixels; ++i) {
    for_each_register<C>(channels, [&](index_t c, auto whole) __attribute__((always_inline)) {
      const vec<C> a = load(first + i * step + c), b = load(second + i * step + c);
      const vmask<C> choice = takes_second<C>(a, b);
      store_lanes<decltype(whole)::value || !Exact>(out + i * out_ld + c, choice ? b : a, channels - c);
      if (taken) store(taken + i * out_ld + c, (vec<C>)choice);
    });
  }
}

// Rows of the row convolution's result, pooled, as the column convolution's kernels read them: a ring of `capacity`
// rows [col.W][ld], each computed when it is asked for and not there.
template <class T>
class PooledRows {
  using C = compute<T>;

 public:
  PooledRows(Arena& arena, RowSource<T>& source, const SepconvForwardArgs& args, const C* weights,
             const Epilogue<C>& epilogue, index_t capacity)
      : source_(source),
        args_(args),
        kernel_(args.row, weights, epilogue, true),
        channels_(args.row.out_channels()),
        ld_(round_up(channels_, kLanes<C>)),
        capacity_(capacity) {
    ring_ = static_cast<C*>(arena.allocate(capacity * args.col.W * ld_ * sizeof(C)));
    held_ = static_cast<index_t*>(arena.allocate(capacity * sizeof(index_t)));
    for (index_t i = 0; i < capacity; ++i) held_[i] = -1;
    if (args.pool_w > 1) line_ = static_cast<C*>(arena.allocate(args.row.Q * ld_ * sizeof(C)));
  }

  index_t pixel_stride() const { return ld_; }
  index_t next_row() const { return 0; }

  const C* row(index_t n, index_t h) {
    C* pooled = ring_ + h % capacity_ * args_.col.W * ld_;
    index_t& held = held_[h % capacity_];
    if (held == n * args_.row.H + h) return pooled;
    held = n * args_.row.H + h;
    C* line = line_ ? line_ : pooled;
    kernel_.run(source_, n, h, 0, args_.row.Q, line, ld_, nullptr, 0);
    if (line_) pool_pairs<false>(line, line + ld_, 2 * ld_, args_.col.W, channels_, pooled, ld_);
    return pooled;
  }

 private:
  RowSource<T>& source_;
  const SepconvForwardArgs& args_;
  DepthwiseRow<T, C, false> kernel_;
  index_t channels_, ld_, capacity_;
  C *ring_ = nullptr, *line_ = nullptr;
  index_t* held_ = nullptr;
};

inline double sepconv_cost(const SepconvForwardArgs& args, index_t ld, index_t lanes) {
  constexpr double kAround = 4;  // loads, stores and epilogue of a result, in FMAs
  const double rows = static_cast<double>(args.row.N) * args.row.H * args.row.Q * (args.row.S + kAround);
  const double columns = static_cast<double>(args.col.N) * args.col.P * args.col.Q * (args.col.R + kAround);
  return (rows + columns) * ld / lanes;
}

// T: of the maps; W: of the weights, of the same compute type.
template <class T, class W = T>
struct SepconvForward {
  using C = compute<T>;
  const SepconvForwardArgs& args;
  const index_t channels, ld, rows_out;  // rows_out: output rows of all images
  const C *row_weights, *col_weights;
  const Epilogue<C> row_epilogue, col_epilogue;

  SepconvForward(Arena& shared, const SepconvForwardArgs& a)
      : args(a),
        channels(a.col.C),
        ld(round_up(channels, kLanes<C>)),
        rows_out(a.col.N * (a.col.P / a.pool_h)),
        row_weights(pack_depthwise_weights<W>(shared, a.row, a.row_weight)),
        col_weights(pack_depthwise_weights<W>(shared, a.col, a.col_weight)),
        row_epilogue(shared, a.row_epilogue, channels),
        col_epilogue(shared, a.col_epilogue, channels) {}

  void run() {
    if (rows_out == 0) return;
    // A range repeats the R - 1 rows above it: not for less than some 16.
    constexpr index_t kRangeRows = 16;
    const index_t slots = slots_for(sepconv_cost(args, ld, kLanes<C>), rows_out);
    const index_t shares = slots == 1 ? 1 : imax(slots, imin(4 * slots, rows_out / kRangeRows));
    run_tasks(shares, [&](index_t s) {
      Arena arena(Arena::kTask);
      Task(*this, args, arena).run(rows_out * s / shares, rows_out * (s + 1) / shares);
    });
  }

  struct Task {
    const SepconvForward& op;
    const SepconvForwardArgs& args;
    RowSource<T> source;
    PooledRows<T> rows;
    C* lines = nullptr;  // [pool_h][Q][ld], where results do not go straight to the output

    // The maps are those of `a`, which differs from the operator's args in batch, input and output at most.
    Task(const SepconvForward& o, const SepconvForwardArgs& a, Arena& arena)
        : op(o),
          args(a),
          source(arena, args.input, args.row),
          rows(arena, source, args, o.row_weights, o.row_epilogue, (args.col.R - 1) * args.col.dilation_h + 1) {
      if (!direct()) lines = static_cast<C*>(arena.allocate(args.pool_h * args.col.Q * op.ld * sizeof(C)));
    }

    bool direct() const { return args.output.c == 1 && args.pool_h == 1; }

    void run(index_t begin, index_t end) {
      const index_t P = args.col.P / args.pool_h;
      for (index_t i = begin; i < end; ++i) {
        const index_t n = i / P, p = i % P;
        T* to = static_cast<T*>(args.output.data) + n * args.output.n + p / args.planes * args.output.h +
                p % args.planes * args.plane;
        direct() ? convolve<T, true>(n, p, to, args.output.w) : through_lines(n, p, to);
      }
    }

    template <class D, bool Exact>
    void convolve(index_t n, index_t p, D* to, index_t to_ld) {
      const DepthwiseRow<C, D, Exact> kernel(args.col, op.col_weights, op.col_epilogue, true);
      kernel.run(rows, n, p, 0, args.col.Q, to, to_ld, nullptr, 0);
    }

    void through_lines(index_t n, index_t p, T* to) {
      const index_t Q = args.col.Q, size = Q * op.ld;
      for (index_t j = 0; j < args.pool_h; ++j) convolve<C, false>(n, p * args.pool_h + j, lines + j * size, op.ld);
      const TensorRef& y = args.output;
      if (args.pool_h > 1 && y.c == 1) {
        pool_pairs<true>(lines, lines + size, op.ld, Q, op.channels, to, y.w);
        return;
      }
      if (args.pool_h > 1) pool_pairs<false>(lines, lines + size, op.ld, Q, op.channels, lines, op.ld);
      scatter_segment(lines, op.ld, Q, op.channels, 1, to, y.w, y.c);
    }
  };
};

template <class T>
void sepconv_fwd(const SepconvForwardArgs& args) {
  Arena shared(Arena::kCall);
  SepconvForward<T>(shared, args).run();
}
