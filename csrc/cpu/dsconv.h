// Room dsconv: depthwise -> epilogue -> pointwise -> epilogue in one pass; with passthrough channels in front of the depthwise ones and
// the last `keep` depthwise channels copied to the output (VGNet).
// Included inside namespace effops::<isa>::{anonymous}; see kernels.inl.
//
//   input rows --dw--> z tile [pixels][Cz] in L1/L2 --gemm with packed panels of W--> output rows (NHWC: straight from the registers)
//   passthrough ------^                              `--> scratch tile, second pass of the epilogue, transposed store (everything else)
//
// The depthwise result exists only as the tile. Work is cut into ranges of output rows; where the whole map is one tile (7x7 at batch 1),
// into ranges of output channels, each recomputing the depthwise, which is 9/K of the work.
// Bytes moved: each input once plus the halo rows of a range, each output once, W once per range and tile (from L2).

template <class T>
struct DsconvForward {
  using C = compute<T>;
#if EFFOPS_BF16_DOT
  static constexpr bool kDot = sizeof(T) == 2;  // bf16 pairs into vdpbf16ps
#else
  static constexpr bool kDot = false;
#endif
  using Z = std::conditional_t<kDot, bf16, C>;           // what the z tile holds
  using W = std::conditional_t<kDot, std::uint32_t, C>;  // what a packed weight element is: a pair, or one

  const DsconvForwardArgs& args;
  const DepthwiseGeometry& g;
  Arena shared{Arena::kCall};
  const index_t dw_channels, Cz, ldz, k_steps, pixels;
  const Panels panels;
  const C* dw_weights;
  Epilogue<C> dw_epilogue, pw_epilogue;
  bool direct, simple;
  bool stream;  // the output goes past the caches

  explicit DsconvForward(const DsconvForwardArgs& a)
      : args(a),
        g(a.g),
        dw_channels(g.out_channels()),
        Cz(a.passthrough_channels + dw_channels),
        ldz(row_distance<Z>(a.passthrough_channels + round_up(dw_channels + (kDot ? 1 : 0), kLanes<C>))),
        k_steps(kDot ? ceil_div(Cz, 2) : Cz),
        pixels(g.N * g.P * g.Q),
        panels(a.K, kLanes<C>),
        dw_weights(pack_depthwise_weights<T>(shared, g, a.dw_weight)),
        dw_epilogue(shared, a.dw_epilogue, dw_channels),
        pw_epilogue(shared, a.pw_epilogue, a.K),
        direct(a.output.c == 1),
        simple(pw_epilogue.simple()),
        stream(can_stream()) {}

  // An output that no cache will hold until somebody reads it need not be fetched before it is written: a third of its traffic. The size
  // is that of two thirds of a 32 MB L3. Only whole, aligned lines.
  bool can_stream() const {
    constexpr index_t kBytes = index_t{20} << 20;
    constexpr index_t line = 64 / sizeof(T);
    const TensorRef& y = args.output;
    const bool aligned =
        (y.n | y.h | y.w | args.K | args.keep) % line == 0 && reinterpret_cast<std::uintptr_t>(y.data) % 64 == 0;
    return kCanStream<T> && one_pass() && aligned &&
           pixels * (args.K + args.keep) * static_cast<index_t>(sizeof(T)) >= kBytes;
  }

  // The output's registers go straight to memory; else they pass through a scratch tile.
  bool one_pass() const { return direct && simple; }

  void pack(index_t panel, W* packed) const {
    const T* weight = static_cast<const T*>(args.pw_weight);
    if constexpr (kDot) {
      pack_panel_pairs(weight, args.pw_stride_c, args.pw_stride_k, Cz, args.K, panels, panel, packed);
    } else {
      pack_panel(weight, args.pw_stride_c, args.pw_stride_k, Cz, args.K, panels, panel, packed);
    }
  }

  void run() {
    if (pixels == 0 || args.K + args.keep == 0) return;
    const double cost =
        static_cast<double>(pixels) * (k_steps * panels.vectors + ceil_div(dw_channels, kLanes<C>) * g.R * g.S);
    if (pixels <= tile_pixels(ldz * sizeof(Z), g.Q) || g.N * g.P == 1) {
      run_by_panels(slots_for(cost, panels.count));
    } else {
      run_by_pixels(shares_for(cost, g.N * g.P));
    }
  }

  // Small maps: ranges of output channels, each with the whole (cheap) depthwise; a panel is packed just before its one use, so that it is
  // read from L2 and never written back.
  void run_by_panels(index_t slots) {
    run_tasks(slots, [&](index_t s) {
      const index_t first = panels.count * s / slots, last = panels.count * (s + 1) / slots;
      Arena arena(Arena::kTask);
      index_t widest = 0;
      for (index_t i = first; i < last; ++i) widest = imax(widest, panels.width(i));
      W* packed = static_cast<W*>(arena.allocate(k_steps * widest * kLanes<C> * sizeof(W)));
      Range range(*this, arena, pixels, first, last);
      for (index_t begin = 0; begin < pixels;
           begin += range.tile) {  // one turn, except for a single row longer than a tile
        range.load(begin, imin(pixels, begin + range.tile));
        for (index_t i = first; i < last; ++i) {
          pack(i, packed);
          range.multiply(i, packed);
        }
        range.finish();
      }
      if (stream) fence_stores();
    });
  }

  // Everything else: W is packed once by all threads, then ranges of whole output rows.
  void run_by_pixels(index_t shares) {
    const index_t rows = g.N * g.P;
    W* packed = static_cast<W*>(shared.allocate(k_steps * panels.vectors * kLanes<C> * sizeof(W)));
    const auto panel_weights = [&](index_t i) { return packed + k_steps * panels.first_column(i); };
    const auto pack_one = [&](index_t i) { pack(i, panel_weights(i)); };
    if (slots_for(k_steps * panels.vectors, panels.count) > 1) {
      run_tasks(panels.count, pack_one);
    } else {
      for (index_t i = 0; i < panels.count; ++i) pack_one(i);
    }
    run_tasks(shares, [&](index_t s) {
      Arena arena(Arena::kTask);
      const index_t end = rows * (s + 1) / shares * g.Q;
      index_t begin = rows * s / shares * g.Q;
      Range range(*this, arena, end - begin, 0, panels.count);
      for (; begin < end; begin += range.tile) {
        range.load(begin, imin(end, begin + range.tile));
        for (index_t i = 0; i < panels.count; ++i) range.multiply(i, panel_weights(i));
        range.finish();
      }
      if (stream) fence_stores();
    });
  }

  // One task's tiles: its scratch, and the steps on the current tile of flat output pixels [begin, end) for the panels [first, last).
  struct Range {
    const DsconvForward& op;
    const index_t first, last;
    const index_t column, columns, ldy;
    const index_t tile;
    RowSource<T> source;
    Z* z;
    C *y, *residual, *dw_residual;
    index_t begin = 0, end = 0;
    const Z* in_place = nullptr;
    mutable Ahead ahead;

    Range(const DsconvForward& o, Arena& arena, index_t pixels, index_t first_, index_t last_)
        : op(o),
          first(first_),
          last(last_),
          column(op.panels.first_column(first)),
          columns(imin(op.args.K, op.panels.first_column(last)) - column),
          ldy(row_distance<C>(op.panels.first_column(last) - column)),
          tile(imin(tile_pixels(op.ldz * sizeof(Z), op.g.Q), pixels)),
          source(arena, op.args.input, op.g),
          z(static_cast<Z*>(arena.allocate(tile * op.ldz * sizeof(Z)))) {
      const auto scratch = [&](bool want, index_t ld) {
        return want ? static_cast<C*>(arena.allocate(tile * ld * sizeof(C))) : nullptr;
      };
      y = scratch(!op.one_pass(), ldy);
      residual = scratch(op.pw_epilogue.residual.data, ldy);
      dw_residual = scratch(op.dw_epilogue.residual.data, op.ldz);
    }

    void load(index_t tile_begin, index_t tile_end) {
      begin = tile_begin;
      end = tile_end;
      in_place = op.passthrough_in_place(begin);
      ahead = op.input_after(end);
      op.fill_z(source, begin, end, z, in_place == nullptr, dw_residual);
      if (op.args.keep > 0 && first == 0) {
        scatter_pixels<T>(z + op.Cz - op.args.keep, op.ldz, op.args.output, begin, end, op.g.P, op.g.Q, 0,
                          op.args.keep);
      }
    }

    void multiply(index_t panel, const W* weights) const {
      const index_t c = op.panels.first_column(panel);
      if (!op.one_pass()) {
        C* to = y + c - column;
        const RowsOfA<Z> a = op.rows_of_a(z, in_place, 0, &ahead);
        if (op.simple) {
          op.multiply_clamped(panel, weights, end - begin, a, to, ldy, op.panels.width(panel) * kLanes<C>);
        } else {
          op.multiply(panel, weights, end - begin, a, StoreRaw<C>{to, ldy});
        }
        return;
      }
      const index_t width = imin(op.args.K - c, op.panels.width(panel) * kLanes<C>);
      for_each_run(op.args.output, begin, end, op.g.P, op.g.Q, [&](index_t position, index_t count, index_t offset) {
        T* to = static_cast<T*>(op.args.output.data) + position + op.args.keep + c;
        op.multiply_clamped(panel, weights, count, op.rows_of_a(z, in_place, offset, &ahead), to, op.args.output.w,
                            width);
      });
    }

    void finish() const {
      if (op.one_pass()) return;
      if (!op.simple) {
        if (residual)
          gather_pixels<T>(op.pw_epilogue.residual, begin, end, op.g.P, op.g.Q, column, columns, residual, ldy);
        Epilogue<C> part = op.pw_epilogue;  // the same epilogue, seen from `column` on
        if (part.bias) part.bias += column;
        if (part.affine()) {
          part.scale += column;
          part.shift += column;
        }
        apply_epilogue_rows(part, end - begin, columns, y, ldy, residual, ldy);
      }
      scatter_pixels<T>(y, ldy, op.args.output, begin, end, op.g.P, op.g.Q, op.args.keep + column, columns);
    }
  };

  // Where the product can read the passthrough channels of the tile that starts at flat pixel `begin`, or null: then they are copied. They
  // must lie pixel after pixel at one distance over all images, and in whole pairs for the bf16 product.
  const Z* passthrough_in_place(index_t begin) const {
    if constexpr (std::is_same_v<T, Z>) {
      const TensorRef& p = args.passthrough;
      const bool even = p.c == 1 && p.h == g.Q * p.w && (g.N == 1 || p.n == g.P * p.h);
      const bool pairs = !kDot || args.passthrough_channels % 2 == 0;
      if (p.data != nullptr && even && pairs) return static_cast<const Z*>(p.data) + begin * p.w;
    }
    return nullptr;
  }

  void fill_z(RowSource<T>& source, index_t begin, index_t end, Z* z, bool copy_passthrough, C* dw_residual) const {
    const index_t passthrough = args.passthrough_channels;
    if (passthrough > 0 && copy_passthrough)
      gather_pixels<T>(args.passthrough, begin, end, g.P, g.Q, 0, passthrough, z, ldz);
    if (dw_residual) gather_pixels<T>(dw_epilogue.residual, begin, end, g.P, g.Q, 0, dw_channels, dw_residual, ldz);
    const DepthwiseRow<T, Z, false> kernel(g, dw_weights, dw_epilogue, true);
    for_each_row_segment(begin, end, g.P, g.Q, [&](index_t n, index_t p, index_t q, index_t count, index_t offset) {
      kernel.run(source, n, p, q, count, z + offset * ldz + passthrough, ldz,
                 dw_residual ? dw_residual + offset * ldz : nullptr, ldz);
    });
    if constexpr (kDot) {
      if (Cz % 2 != 0) {  // the odd channel's partner: its weight is zero, so it must not be NaN
        for (index_t i = 0; i < end - begin; ++i) z[i * ldz + Cz] = bf16{0};
      }
    }
  }

  // The rows of A from pixel `offset` of the tile on.
  EFFOPS_INLINE RowsOfA<Z> rows_of_a(const Z* z, const Z* in_place, index_t offset, Ahead* ahead) const {
    constexpr index_t unit = kDot ? 2 : 1;
    const Z* tile = z + offset * ldz;
    const index_t skipped = in_place ? args.passthrough_channels : 0;
    RowsOfA<Z> a = in_place ? RowsOfA<Z>(in_place + offset * args.passthrough.w, args.passthrough.w, skipped / unit,
                                         tile + skipped, ldz, k_steps - skipped / unit)
                            : RowsOfA<Z>(tile, ldz, 1, k_steps);
    a.ahead = ahead;
    return a;
  }

  // The input rows that the tile starting at flat pixel `begin` needs and the one before did not, where they lie in one piece.
  Ahead input_after(index_t begin) const {
    const TensorRef& x = args.input;
    if (begin >= pixels || x.c != 1 || x.h != g.W * x.w) return {};
    const index_t n = begin / (g.P * g.Q), p = begin / g.Q % g.P;
    const index_t overlap = p > 0 ? imax(0, (g.R - 1) * g.dilation_h + 1 - g.stride_h) : 0;  // rows the last window had
    const index_t first = imax(0, imin(g.H, p * g.stride_h - g.pad_top + overlap));
    const index_t output_rows = imax(1, tile_pixels(ldz * sizeof(Z), g.Q) / g.Q);
    const index_t rows = imin(g.H - first, output_rows * g.stride_h + g.R - 1 - overlap);
    if (rows <= 0) return {};
    const char* at = static_cast<const char*>(x.data) + (n * x.n + first * x.h) * static_cast<index_t>(sizeof(T));
    return {at, at + rows * x.h * static_cast<index_t>(sizeof(T))};
  }

  template <class Out>
  EFFOPS_INLINE void multiply(index_t panel, const W* weights, index_t rows, const RowsOfA<Z>& a,
                              const Out& out) const {
    if constexpr (kDot) {
      gemm_panel_pairs(panels.width(panel), rows, a, weights, out);
    } else {
      gemm_panel(panels.width(panel), rows, a, weights, panels.width(panel) * kLanes<C>, out);
    }
  }

  template <class D, bool Affine>
  EFFOPS_INLINE StoreClamped<D, Affine> clamped(D* y, index_t ld, index_t panel, index_t columns) const {
    const index_t c = panels.first_column(panel);
    return {y,
            ld,
            columns,
            pw_epilogue.bias ? pw_epilogue.bias + c : nullptr,
            Affine ? pw_epilogue.scale + c : nullptr,
            Affine ? pw_epilogue.shift + c : nullptr,
            pw_epilogue.low,
            pw_epilogue.high,
            stream};
  }

  template <class D>
  EFFOPS_INLINE void multiply_clamped(index_t panel, const W* weights, index_t rows, const RowsOfA<Z>& a, D* y,
                                      index_t ld, index_t columns) const {
    if (pw_epilogue.affine()) {
      multiply(panel, weights, rows, a, clamped<D, true>(y, ld, panel, columns));
    } else {
      multiply(panel, weights, rows, a, clamped<D, false>(y, ld, panel, columns));
    }
  }
};

template <class T>
void dsconv_fwd(const DsconvForwardArgs& args) {
  DsconvForward<T>(args).run();
}
