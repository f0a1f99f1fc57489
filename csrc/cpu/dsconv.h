// Room dsconv: depthwise -> epilogue -> pointwise -> epilogue in one pass; with passthrough channels in front of the depthwise ones and
// the last `keep` depthwise channels copied to the output (VGNet).
// Included inside namespace effops::<isa>::{anonymous}; see kernels.inl.
//
//   input rows --dw--> z tile [pixels][Cz] in L1/L2 --gemm with packed panels of W--> output rows (NHWC: straight from the registers)
//   passthrough ------^                              `--> scratch tile, second pass of the epilogue, transposed store (everything else)
//
// The depthwise result exists only as the tile. Work is cut into ranges of output pixels; where there are too few pixels to go round
// (7x7 maps at batch 1), into ranges of output channels, each recomputing the depthwise, which is 9/K of the work.
// Bytes moved: each input once plus the halo rows of a range, each output once, W once per range and tile (from L2).

template <class T>
struct DsconvForward {
  using C = compute<T>;
#if EFFOPS_BF16_DOT
  static constexpr bool kDot = sizeof(T) == 2;  // bf16 pairs into vdpbf16ps
#else
  static constexpr bool kDot = false;
#endif
  using Z = std::conditional_t<kDot, bf16, C>;            // what the z tile holds
  using W = std::conditional_t<kDot, std::uint32_t, C>;  // what a packed weight element is: a pair, or one

  const DsconvForwardArgs& args;
  const DepthwiseGeometry& g;
  Arena shared{Arena::kCall};
  const index_t dw_channels, Cz, ldz, k_steps, pixels;
  const Panels panels;
  const C* dw_weights;
  Epilogue<C> dw_epilogue, pw_epilogue;
  W* packed;
  bool direct, simple;

  explicit DsconvForward(const DsconvForwardArgs& a)
      : args(a),
        g(a.g),
        dw_channels(g.out_channels()),
        Cz(a.passthrough_channels + dw_channels),
        ldz(round_up(a.passthrough_channels + round_up(dw_channels, kLanes<C>), kLanes<C>) + (kDot ? kLanes<C> : 0)),
        k_steps(kDot ? ceil_div(Cz, 2) : Cz),
        pixels(g.N * g.P * g.Q),
        panels(a.K, kLanes<C>),
        dw_weights(pack_depthwise_weights<T>(shared, g, a.dw_weight)),
        dw_epilogue(shared, a.dw_epilogue, dw_channels),
        pw_epilogue(shared, a.pw_epilogue, a.K),
        packed(static_cast<W*>(shared.allocate(k_steps * panels.vectors * kLanes<C> * sizeof(W)))),
        direct(a.output.c == 1),
        simple(pw_epilogue.simple()) {}

  W* panel_weights(index_t panel) const { return packed + k_steps * panels.first_column(panel); }

  void pack(index_t panel) const {
    const T* weight = static_cast<const T*>(args.pw_weight);
    if constexpr (kDot) {
      pack_panel_pairs(weight, args.pw_stride_c, args.pw_stride_k, Cz, args.K, panels, panel, panel_weights(panel));
    } else {
      pack_panel(weight, args.pw_stride_c, args.pw_stride_k, Cz, args.K, panels, panel, panel_weights(panel));
    }
  }

  void run() {
    if (pixels == 0 || args.K + args.keep == 0) return;
    const double cost = static_cast<double>(pixels) * (k_steps * panels.vectors + dw_channels / kLanes<C> * g.R * g.S);
    // A range of fewer pixels than this would stream all of W for too little work.
    constexpr index_t kMinPixels = 40;
    const index_t threads = slots_for(cost, imax(pixels, panels.count));
    const index_t pixel_slots = imax(1, imin(threads, pixels / kMinPixels));
    const index_t panel_slots = pixel_slots == 1 ? imin(threads, panels.count) : 1;
    if (panel_slots == 1) {
      const index_t packers = imin(threads, panels.count);
      run_slots(packers, [&](index_t s) {
        for (index_t i = panels.count * s / packers; i < panels.count * (s + 1) / packers; ++i) pack(i);
      });
      run_slots(pixel_slots, [&](index_t s) { range(pixels * s / pixel_slots, pixels * (s + 1) / pixel_slots, 0, panels.count); });
    } else {
      run_slots(panel_slots, [&](index_t s) {
        const index_t first = panels.count * s / panel_slots, last = panels.count * (s + 1) / panel_slots;
        for (index_t i = first; i < last; ++i) pack(i);
        range(0, pixels, first, last);
      });
    }
  }

  // Output pixels [begin, end), panels [first, last).
  void range(index_t begin, index_t end, index_t first, index_t last) const {
    Arena arena(Arena::kTask);
    RowSource<T> source(arena, args.input, g);
    const index_t column = panels.first_column(first), columns = imin(args.K, panels.first_column(last)) - column;
    const index_t ldy = (panels.first_vector(last) - panels.first_vector(first)) * kLanes<C>;
    const index_t tile = imin(tile_pixels(ldz * sizeof(Z)), end - begin);
    Z* z = static_cast<Z*>(arena.allocate(tile * ldz * sizeof(Z)));
    const bool two_pass = !(direct && simple);
    C* y = two_pass ? static_cast<C*>(arena.allocate(tile * ldy * sizeof(C))) : nullptr;
    C* residual = pw_epilogue.residual.data ? static_cast<C*>(arena.allocate(tile * ldy * sizeof(C))) : nullptr;
    C* dw_residual = dw_epilogue.residual.data ? static_cast<C*>(arena.allocate(tile * ldz * sizeof(C))) : nullptr;
    for (index_t t = begin; t < end; t += tile) {
      const index_t stop = imin(end, t + tile);
      fill_z(source, t, stop, z, dw_residual);
      if (args.keep > 0 && first == 0) scatter_pixels<T>(z + Cz - args.keep, ldz, args.output, t, stop, g.P, g.Q, 0, args.keep);
      if (!two_pass) {
        gemm_direct(z, t, stop, first, last);
      } else {
        gemm_scratch(z, stop - t, first, last, y, ldy);
        if (!simple) {
          if (residual) gather_pixels<T>(pw_epilogue.residual, t, stop, g.P, g.Q, column, columns, residual, ldy);
          finish_rows(stop - t, column, columns, y, ldy, residual);
        }
        scatter_pixels<T>(y, ldy, args.output, t, stop, g.P, g.Q, args.keep + column, columns);
      }
    }
  }

  void fill_z(RowSource<T>& source, index_t begin, index_t end, Z* z, C* dw_residual) const {
    const index_t passthrough = args.passthrough_channels;
    if (passthrough > 0) gather_pixels<T>(args.passthrough, begin, end, g.P, g.Q, 0, passthrough, z, ldz);
    if (dw_residual) gather_pixels<T>(dw_epilogue.residual, begin, end, g.P, g.Q, 0, dw_channels, dw_residual, ldz);
    const DepthwiseRow<T, Z, false> kernel(g, dw_weights, dw_epilogue, true);
    for_each_row_segment(begin, end, g.P, g.Q, [&](index_t n, index_t p, index_t q, index_t count, index_t offset) {
      kernel.run(source, n, p, q, count, z + offset * ldz + passthrough, ldz, dw_residual ? dw_residual + offset * ldz : nullptr, ldz);
    });
    if constexpr (kDot) {
      if (Cz % 2 != 0) {  // the odd channel's partner: its weight is zero, so it must not be NaN
        for (index_t i = 0; i < end - begin; ++i) z[i * ldz + Cz] = bf16{0};
      }
    }
  }

  template <class Out>
  EFFOPS_INLINE void multiply(index_t panel, index_t rows, const Z* z, const Out& out) const {
    if constexpr (kDot) {
      gemm_panel_pairs(panels.width(panel), rows, z, ldz, panel_weights(panel), k_steps, out);
    } else {
      gemm_panel(panels.width(panel), rows, z, ldz, 1, panel_weights(panel), panels.width(panel) * kLanes<C>, k_steps, out);
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
            pw_epilogue.high};
  }

  template <class D>
  EFFOPS_INLINE void multiply_clamped(index_t panel, index_t rows, const Z* z, D* y, index_t ld, index_t columns) const {
    if (pw_epilogue.affine()) {
      multiply(panel, rows, z, clamped<D, true>(y, ld, panel, columns));
    } else {
      multiply(panel, rows, z, clamped<D, false>(y, ld, panel, columns));
    }
  }

  void gemm_direct(const Z* z, index_t begin, index_t end, index_t first, index_t last) const {
    for (index_t panel = first; panel < last; ++panel) {
      const index_t c = panels.first_column(panel);
      const index_t columns = imin(args.K - c, panels.width(panel) * kLanes<C>);
      for_each_run(args.output, begin, end, g.P, g.Q, [&](index_t position, index_t count, index_t offset) {
        T* y = static_cast<T*>(args.output.data) + position + args.keep + c;
        multiply_clamped<T>(panel, count, z + offset * ldz, y, args.output.w, columns);
      });
    }
  }

  void gemm_scratch(const Z* z, index_t rows, index_t first, index_t last, C* y, index_t ldy) const {
    for (index_t panel = first; panel < last; ++panel) {
      C* to = y + (panels.first_vector(panel) - panels.first_vector(first)) * kLanes<C>;
      if (simple) {
        multiply_clamped<C>(panel, rows, z, to, ldy, panels.width(panel) * kLanes<C>);
      } else {
        multiply(panel, rows, z, StoreRaw<C>{to, ldy});
      }
    }
  }

  void finish_rows(index_t rows, index_t column, index_t columns, C* y, index_t ldy, const C* residual) const {
    Epilogue<C> part = pw_epilogue;  // the same epilogue, seen from `column` on
    if (part.bias) part.bias += column;
    if (part.affine()) {
      part.scale += column;
      part.shift += column;
    }
    apply_epilogue_rows(part, rows, columns, y, ldy, residual, ldy);
  }
};

template <class T>
void dsconv_fwd(const DsconvForwardArgs& args) {
  DsconvForward<T>(args).run();
}
