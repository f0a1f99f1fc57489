// Room sepconv, backward, in one pass over rows; both convolutions' results and the pools' choices are recomputed.
// Included inside namespace effops::<isa>::{anonymous}; see kernels.inl.
//
//   x row -> u (row sums) -> r = pool(epilogue(u)), rings of rows [Q][ld] -> v (column sums)
//   grad_output --pool's choice--> --epilogue backward(v)--> gv, a ring of rows; grad column kernels += r gv
//   a row of r that no later window touches:  gr = sum over taps gv w --pool's choice--> --epilogue backward(u)--> gu
//                                             -> grad row kernels, grad x (DepthwiseSlot)
//
// A task owns a band of input rows of one image (BandPlan of the column convolution): it writes their part of grad x
// and counts them for the row convolution's parameters; of the column convolution it counts the output rows it owns and
// computes gv of all that touch its band. Scratch: the rings, some 10 rows of the map.

// What backward needs of the rows of r, held in rings of `capacity`: r itself; u, where a derivative takes it; which of
// two pixels the pool took.
template <class T>
class RecomputedRows {
  using C = compute<T>;

 public:
  RecomputedRows(Arena& arena, RowSource<T>& source, const SepconvForwardArgs& args, const C* weights,
                 const Epilogue<C>& epilogue, bool keep_raw, index_t capacity)
      : source_(source),
        args_(args),
        epilogue_(epilogue),
        kernel_(args.row, weights, epilogue, !keep_raw),
        channels_(args.row.out_channels()),
        ld_(round_up(channels_, kLanes<C>)),
        capacity_(capacity),
        pools_(args.pool_w > 1) {
    const auto rows = [&](bool want, index_t count, index_t width) {
      return want ? static_cast<C*>(arena.allocate(count * width * ld_ * sizeof(C))) : nullptr;
    };
    ring_ = rows(true, capacity, args.col.W);
    raw_ = rows(keep_raw, capacity, args.row.Q);
    taken_ = rows(pools_, capacity, args.col.W);
    line_ = rows(pools_, 1, args.row.Q);
    held_ = static_cast<index_t*>(arena.allocate(capacity * sizeof(index_t)));
    for (index_t i = 0; i < capacity; ++i) held_[i] = -1;
  }

  // As the kernels ask for a source of rows.
  index_t pixel_stride() const { return ld_; }
  index_t next_row() const { return 0; }
  bool direct() const { return false; }
  const C* row(index_t n, index_t h) {
    hold(n, h);
    return pooled(h);
  }

  // Of a row that `hold` was called for last: u, or null.
  const C* raw(index_t h) const { return raw_ ? raw_ + h % capacity_ * args_.row.Q * ld_ : nullptr; }
  // The gradient at r -> the gradient at the row convolution's epilogue, [row.Q][ld].
  void unpool(index_t h, const C* grad, C* to) const {
    const C* taken = taken_ + h % capacity_ * args_.col.W * ld_;
    route_to_pairs(grad, ld_, taken, args_.col.W, channels_, to, to + ld_, 2 * ld_, ld_);
  }

  void hold(index_t n, index_t h) {
    index_t& held = held_[h % capacity_];
    if (held == n * args_.row.H + h) return;
    held = n * args_.row.H + h;
    C *activated = pools_ ? line_ : pooled(h), *sums = raw_ ? raw_ + h % capacity_ * args_.row.Q * ld_ : activated;
    kernel_.run(source_, n, h, 0, args_.row.Q, sums, ld_, nullptr, 0);
    if (raw_) {
      __builtin_memcpy(activated, sums, args_.row.Q * ld_ * sizeof(C));
      apply_epilogue_rows(epilogue_, args_.row.Q, channels_, activated, ld_, static_cast<const C*>(nullptr), 0);
    }
    if (pools_) {
      C* taken = taken_ + h % capacity_ * args_.col.W * ld_;
      pool_pairs<false>(line_, line_ + ld_, 2 * ld_, args_.col.W, channels_, pooled(h), ld_, taken);
    }
  }

  // first[i] or second[i] = grad[i], as `taken` says; the other one is zero.
  static void route_to_pairs(const C* grad, index_t grad_ld, const C* taken, index_t pixels, index_t channels, C* first,
                             C* second, index_t step, index_t taken_ld) {
    for (index_t i = 0; i < pixels; ++i) {
      for_each_register<C>(channels, [&](index_t c, auto whole) __attribute__((always_inline)) {
        const vec<C> g = load_lanes<decltype(whole)::value>(grad + i * grad_ld + c, channels - c), zero{};
        const vmask<C> choice = (vmask<C>)load(taken + i * taken_ld + c);
        store(first + i * step + c, choice ? zero : g);
        store(second + i * step + c, choice ? g : zero);
      });
    }
  }

 private:
  C* pooled(index_t h) const { return ring_ + h % capacity_ * args_.col.W * ld_; }

  RowSource<T>& source_;
  const SepconvForwardArgs& args_;
  const Epilogue<C>& epilogue_;
  DepthwiseRow<T, C, false> kernel_;
  index_t channels_, ld_, capacity_;
  bool pools_;
  C *ring_ = nullptr, *raw_ = nullptr, *taken_ = nullptr, *line_ = nullptr;
  index_t* held_ = nullptr;
};

template <class T>
struct SepconvBackward {
  using C = compute<T>;
  const SepconvBackwardArgs& args;
  const SepconvForwardArgs& fwd;
  const DepthwiseGeometry &row, &col;
  Arena shared{Arena::kCall};
  const index_t channels, ld;
  const C *row_weights, *col_weights;
  const Epilogue<C> row_epilogue, col_epilogue;
  const bool want_rows;  // anything before the column convolution
  const bool raw_rows, raw_cols;
  const BandPlan plan;
  DepthwiseGeometry out;  // of the output: its P is behind the pool
  double *row_sums = nullptr, *col_sums = nullptr;
  EpilogueSums row_epilogue_sums, col_epilogue_sums;

  explicit SepconvBackward(const SepconvBackwardArgs& a)
      : args(a),
        fwd(a.forward),
        row(fwd.row),
        col(fwd.col),
        channels(col.C),
        ld(round_up(channels, kLanes<C>)),
        row_weights(pack_depthwise_weights<T>(shared, row, fwd.row_weight)),
        col_weights(pack_depthwise_weights<T>(shared, col, fwd.col_weight)),
        row_epilogue(shared, fwd.row_epilogue, channels),
        col_epilogue(shared, fwd.col_epilogue, channels),
        want_rows(a.grad_input.data || a.grad_row_weight || a.row_grads.bias || a.row_grads.scale || a.row_grads.shift),
        raw_rows(want_rows && needs_raw(row_epilogue, a.row_grads)),
        raw_cols(fwd.pool_h > 1 || needs_raw(col_epilogue, a.col_grads)),
        plan(col, want_rows, 3 * sepconv_cost(fwd, ld, kLanes<C>)),
        out(col) {
    out.P = col.P / fwd.pool_h;
    if (a.grad_row_weight) row_sums = partial_sums<double>(shared, plan.slots, row.S * ld);
    if (a.grad_col_weight) col_sums = partial_sums<double>(shared, plan.slots, col.R * ld);
    row_epilogue_sums = epilogue_sums(shared, a.row_grads, channels, plan.slots);
    col_epilogue_sums = epilogue_sums(shared, a.col_grads, channels, plan.slots);
  }

  void run() {
    run_tasks(plan.slots, [&](index_t slot) { Slot(*this, slot).run(); });
    if (row_sums) {
      reduce_slots(row_sums, plan.slots, row.S * ld);
      write_depthwise_weight_grad<T>(row, row_sums, args.grad_row_weight);
    }
    if (col_sums) {
      reduce_slots(col_sums, plan.slots, col.R * ld);
      write_depthwise_weight_grad<T>(col, col_sums, args.grad_col_weight);
    }
    reduce_epilogue_sums(row_epilogue_sums, plan.slots, channels, args.row_grads);
    reduce_epilogue_sums(col_epilogue_sums, plan.slots, channels, args.col_grads);
  }

  // The column convolution's bands, counted in output rows: with a pool two of its rows are one.
  Band band(index_t i) const {
    Band b = plan.band(i);
    b.own_begin /= fwd.pool_h;
    b.own_end /= fwd.pool_h;
    b.need_begin /= fwd.pool_h;
    b.need_end = ceil_div(b.need_end, fwd.pool_h);
    return b;
  }

  struct Slot {
    const SepconvBackward& op;
    const SepconvForwardArgs& fwd;
    const DepthwiseGeometry &row, &col;
    const index_t slot, channels, ld, line;  // line: elements of a row [Q][ld]
    const index_t held_rows;                 // of r: from the first row not finished to the end of the last window
    const index_t held_grads;                // of gv, a multiple of the pool
    Arena arena{Arena::kTask};
    DepthwiseSlot<T> row_work;
    RecomputedRows<T> rows;
    GradDepthwiseWeight<C> col_weight;
    EpilogueSums row_own, col_own;
    TileOfMap<T> grad_output;
    C *gv, *v = nullptr, *pooled = nullptr, *gr;
    Band band{};
    index_t next_ = 0;  // the first row of r that is not finished

    Slot(const SepconvBackward& o, index_t s)
        : op(o),
          fwd(o.fwd),
          row(o.row),
          col(o.col),
          slot(s),
          channels(o.channels),
          ld(o.ld),
          line(col.Q * ld),
          held_rows((fwd.pool_h - 1) * col.stride_h + imax((col.R - 1) * col.dilation_h + 1, col.stride_h)),
          held_grads(round_up((col.R - 1) * col.dilation_h / col.stride_h + fwd.pool_h, fwd.pool_h)),
          row_work(arena, row, RowSource<T>(arena, fwd.input, row, held_rows), o.args.grad_input, o.row_weights,
                   o.row_sums ? o.row_sums + s * row.S * ld : nullptr, 1, ld, 0),
          rows(arena, row_work.source, fwd, o.row_weights, o.row_epilogue, o.raw_rows, held_rows),
          col_weight(col, o.col_sums ? o.col_sums + s * col.R * ld : nullptr),
          row_own(slot_of(o.row_epilogue_sums, s, channels)),
          col_own(slot_of(o.col_epilogue_sums, s, channels)),
          grad_output(arena, o.args.grad_output, o.out, 0, channels, col.Q) {
      const auto lines = [&](index_t count) { return static_cast<C*>(arena.allocate(count * line * sizeof(C))); };
      gv = lines(held_grads);
      gr = lines(1);
      if (op.raw_cols) v = lines(fwd.pool_h);
      if (fwd.pool_h > 1) pooled = lines(2 * fwd.pool_h);
    }

    void run() {
      for (index_t i = op.plan.count * slot / op.plan.slots; i < op.plan.count * (slot + 1) / op.plan.slots; ++i) {
        band = op.band(i);
        next_ = band.h_begin;
        row_work.begin(band);
        op.plan.for_each_tile(band, 1, [&](index_t y, index_t, bool owned, bool needed) {
          column_sums(y, owned);
          if (needed) finish_until((y + 1) * fwd.pool_h * col.stride_h - col.pad_top);
        });
        if (op.want_rows) finish_until(band.h_end);
        row_work.end();
      }
    }

   private:
    C* grad_row(index_t p) const { return gv + p % held_grads * line; }

    // gv of the column convolution's rows that output row y is made of, and what its parameters get from them
    void column_sums(index_t y, bool owned) {
      const index_t first = y * fwd.pool_h, pixels = fwd.pool_h * col.Q;
      const index_t begin = (band.n * op.out.P + y) * col.Q;
      PixelRows<const C> grad = grad_output.read(begin, begin + col.Q);
      if (v) {
        const DepthwiseRow<C, C, false> kernel(col, op.col_weights, op.col_epilogue, false);
        for (index_t j = 0; j < fwd.pool_h; ++j)
          kernel.run(rows, band.n, first + j, 0, col.Q, v + j * line, ld, nullptr, 0);
      }
      if (pooled) {
        C *values = pooled, *grads = pooled + 2 * line;
        __builtin_memcpy(values, v, 2 * line * sizeof(C));
        apply_epilogue_rows(op.col_epilogue, pixels, channels, values, ld, static_cast<const C*>(nullptr), 0);
        // Of the pool's two results backward needs the choice alone: it takes the place of the first row's values.
        pool_pairs<false>(values, values + line, ld, col.Q, channels, values + line, ld, values);
        rows.route_to_pairs(grad.data, grad.ld, values, col.Q, channels, grads, grads + line, ld, ld);
        grad = {grads, ld};
      }
      const C* raw = needs_raw(op.col_epilogue, op.args.col_grads) ? v : nullptr;
      const EpilogueBackward<C> backward{op.col_epilogue, grad, {}, raw, {}, nullptr, ld};
      backward.run(pixels, channels, grad_row(first), owned ? col_own : EpilogueSums{});
      if (owned && col_weight.wanted()) col_weight.add(rows, band.n, first, first + fwd.pool_h, grad_row(first), ld);
    }

    void finish_until(index_t h) {
      for (const index_t stop = imin(h, band.h_end); next_ < stop; ++next_) row_sums(next_);
    }

    // Row h of the row convolution: the gradient at its sums, and what lies before them
    void row_sums(index_t h) {
      gather_columns(h);
      rows.hold(band.n, h);
      C *grad = row_work.place(1), *incoming = gr;
      if (fwd.pool_w > 1) {
        rows.unpool(h, gr, grad);
        incoming = grad;
      }
      const EpilogueBackward<C> backward{op.row_epilogue, {incoming, ld}, {}, rows.raw(h), {}, nullptr, ld};
      backward.run(row.Q, channels, grad, row_own);
      row_work.take(band.n, h, h + 1, true, true);
    }

    // gr = sum over taps of gv * w: row h of the transposed column convolution
    void gather_columns(index_t h) const {
      bool found = false;
      for (index_t r = 0; r < col.R; ++r) {
        const index_t at = h + col.pad_top - r * col.dilation_h;
        if (at < 0 || at % col.stride_h != 0 || at / col.stride_h >= col.P) continue;
        const C *from = grad_row(at / col.stride_h), *w = op.col_weights + r * ld;
        for (index_t q = 0; q < col.Q; ++q) {
          for (index_t c = 0; c < ld; c += kLanes<C>) {
            const vec<C> product = load(from + q * ld + c) * load(w + c);
            store(gr + q * ld + c, found ? load(gr + q * ld + c) + product : product);
          }
        }
        found = true;
      }
      if (!found) __builtin_memset(gr, 0, line * sizeof(C));
    }
  };
};

template <class T>
void sepconv_bwd(const SepconvBackwardArgs& args) {
  SepconvBackward<T>(args).run();
}
