// Room dsconv: depthwise -> epilogue -> pointwise -> epilogue in one pass; with passthrough channels in front of the
// depthwise ones and the last `keep` depthwise channels copied to the output (VGNet); or with several depthwise windows,
// the parts, side by side (Multiception, MixConv). Included inside namespace effops::<isa>::{anonymous}; see kernels.inl.
//
//   input rows --dw--> z tile [pixels][Cz] in L1/L2 --gemm with packed W--> output rows (NHWC: straight from registers)
//   passthrough ------^                                                 `--> scratch, epilogue, transposed store
//
//   with parts:   input row h  --dw 3x3--> z [pixels][0, C)
//   (a row is read once         --dw 5x5-->   [pixels][C, 2C)      the concatenation is the tile; parts of shared
//    for all windows)           --dw 7x7-->   [pixels][2C, 3C)     channels or each of its own
//
// The depthwise result exists only as the tile. Work is cut into ranges of output rows; where the whole map is one tile
// (14x14 and 7x7 at batch 1), into ranges of output channels. Bytes moved: each input once plus the halo rows of a
// range, each output once, W once per range and tile (from L2).
//
// With a norm the K output channels go to norm.activated, the moments of each tile are taken while it is in cache, and
// `normalise` (batchnorm.h) makes the output of it. The sums over each image that a squeeze-excite wants are taken of each
// tile likewise.

// A per-channel vector and an epilogue from channel `first` on.
inline ChannelRef from_channel(ChannelRef vector, index_t first) {
  const index_t size = vector.dtype == DType::f64 ? 8 : vector.dtype == DType::f32 ? 4 : 2;
  if (vector.data != nullptr) vector.data = static_cast<const char*>(vector.data) + first * vector.stride * size;
  return vector;
}
inline EpilogueRef from_channel(EpilogueRef epilogue, index_t first) {
  epilogue.bias = from_channel(epilogue.bias, first);
  epilogue.scale = from_channel(epilogue.scale, first);
  epilogue.shift = from_channel(epilogue.shift, first);
  return epilogue;
}

// The depthwise convolutions of a call: one, or its parts.
template <class T>
DepthwiseParts<compute<T>> pack_parts(Arena& arena, const DsconvForwardArgs& args) {
  using C = compute<T>;
  if (args.parts == nullptr) {
    return one_part<C>(arena, args.g, pack_depthwise_weights<T>(arena, args.g, args.dw_weight), args.dw_epilogue);
  }
  auto* parts = static_cast<DepthwisePart<C>*>(arena.allocate(args.num_parts * sizeof(DepthwisePart<C>)));
  index_t column = 0, tap = 0;
  for (index_t i = 0; i < args.num_parts; ++i) {
    const DepthwisePartArgs& part = args.parts[i];
    const Epilogue<C> epilogue(arena, from_channel(args.dw_epilogue, column), part.g.out_channels());
    parts[i] = {part.g, pack_depthwise_weights<T>(arena, part.g, part.weight), epilogue, part.channel, column, tap};
    column += part.g.out_channels();
    tap += parts[i].taps();
  }
  return {parts, args.num_parts};
}

// A batch norm in eval between the convolutions: with its scale in the depthwise kernels and its shift in the bias, the
// registers end with a bias and a clamp.
template <class C>
void fold_affine(Arena& arena, DepthwisePart<C>& part) {
  const Epilogue<C>& e = part.epilogue;
  if (!e.foldable()) return;
  const index_t ld = part.ld(), taps = part.g.R * part.g.S;
  C* weights = static_cast<C*>(arena.allocate(taps * ld * sizeof(C)));
  C* bias = static_cast<C*>(arena.allocate(ld * sizeof(C)));
  for (index_t t = 0; t < taps; ++t) {
    for (index_t c = 0; c < ld; ++c) weights[t * ld + c] = part.weights[t * ld + c] * e.scale[c];
  }
  for (index_t c = 0; c < ld; ++c) bias[c] = (e.bias ? e.bias[c] : C(0)) * e.scale[c] + e.shift[c];
  part.weights = weights;
  part.epilogue.fold(bias);
}

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
  const DepthwiseParts<C> parts;
  const index_t dw_channels, Cz, ldz, k_steps, pixels;
  const Panels panels;
  Epilogue<C> pw_epilogue;
  const TensorRef result;      // the pointwise's K channels
  Moments* moments = nullptr;  // with a norm: one a task
  double* sums = nullptr;      // over images, where they are wanted: [images or more][K]
  bool direct, simple;
  bool stream;  // the output goes past the caches

  explicit DsconvForward(const DsconvForwardArgs& a)
      : args(a),
        g(a.g),
        parts(pack_parts<T>(shared, a)),
        dw_channels(parts.channels()),
        Cz(a.passthrough_channels + dw_channels),
        ldz(row_distance<Z>(a.passthrough_channels +
                            imax(parts.padded_columns(), round_up(dw_channels + (kDot ? 1 : 0), kLanes<C>)))),
        k_steps(kDot ? ceil_div(Cz, 2) : Cz),
        pixels(g.N * g.P * g.Q),
        panels(a.K, kLanes<C>),
        pw_epilogue(shared, ahead_of_norm(a), a.K),
        result(pointwise_result(a)),
        direct(result.c == 1),
        simple(pw_epilogue.simple()),
        stream(can_stream()) {
    for (index_t i = 0; i < parts.count; ++i) fold_affine(shared, parts.data[i]);
  }

  bool has_norm() const { return args.norm.activated.data != nullptr; }
  bool pools() const { return args.sums != nullptr; }
  bool reads_back() const { return has_norm() || pools(); }  // the finished tile

  // What the norm's statistics are taken of: its own place in the epilogue and all after it come later.
  static EpilogueRef ahead_of_norm(const DsconvForwardArgs& a) {
    EpilogueRef epilogue = a.pw_epilogue;
    if (a.norm.activated.data) {
      epilogue.residual = {};
      epilogue.post = Activation::none;
    }
    return epilogue;
  }

  static TensorRef pointwise_result(const DsconvForwardArgs& a) {
    if (a.norm.activated.data) return a.norm.activated;
    TensorRef result = a.output;
    result.data = static_cast<T*>(result.data) + a.keep * result.c;
    return result;
  }

  bool can_stream() const {
    return one_pass() && !reads_back() && streams<T>(result, args.K, pixels * (args.K + args.keep));
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
    constexpr index_t kWholePixels = 256, kWholeBytes = 512 * 1024;
    const index_t slots = slots_for(depthwise_cost() + product_cost(), pixels);
    const bool small = pixels <= kWholePixels && pixels * ldz * static_cast<index_t>(sizeof(Z)) <= kWholeBytes;
    const bool divides = slots == 1 || panels.count >= 3 * slots;  // enough panels for an even share each
    if (small && divides) {
      run_by_panels();
    } else {
      run_by_pixels(slots);
    }
  }

  double depthwise_cost() const {
    double cost = 0;
    for (const DepthwisePart<C>& part : parts) cost += part.ld() / kLanes<C> * (part.g.R * part.g.S + 4);
    return static_cast<double>(pixels) * cost;
  }
  double product_cost() const { return static_cast<double>(pixels) * k_steps * panels.vectors; }

  // Small maps (14x14 and 7x7 at batch 1): first the whole of z, by rows; then the panels, by output channels. A panel
  // is packed just before its one use, so that it is read from L2 and never written back, and no thread reads more of W
  // than its own part.
  void run_by_panels() {
    const index_t rows = g.N * g.P, loaders = slots_for(depthwise_cost(), rows);
    Z* z = static_cast<Z*>(shared.allocate(pixels * ldz * sizeof(Z)));
    run_tasks(loaders, [&](index_t s) {
      Arena arena(Arena::kTask);
      const index_t begin = rows * s / loaders * g.Q, end = rows * (s + 1) / loaders * g.Q;
      Loader(*this, arena, end - begin).load(begin, end, z + begin * ldz);
    });
    const Tile tile{0, pixels, z, passthrough_in_place(0), nullptr};
    const index_t shares = shares_for(product_cost(), panels.count);
    if (has_norm()) moments = new_moments(shared, args.K, 1);  // each task has its own channels
    if (pools()) sums = partial_sums<double>(shared, g.N, args.K);
    run_tasks(shares, [&](index_t s) {
      const index_t first = panels.count * s / shares, last = panels.count * (s + 1) / shares;
      Arena arena(Arena::kTask);
      W* packed = static_cast<W*>(arena.allocate(k_steps * kMaxV * kLanes<C> * sizeof(W)));
      const Writer writer(*this, arena, pixels, first, last);
      for (index_t i = first; i < last; ++i) {
        pack(i, packed);
        writer.multiply(tile, i, packed);
      }
      writer.finish(tile);
      if (has_norm()) {
        Moments own{0, moments->mean + writer.column, moments->m2 + writer.column};
        writer.add_moments(tile, own);
      }
      if (pools()) writer.add_sums(tile, sums);
    });
    for (index_t n = 0; pools() && n < g.N; ++n) write_sums(n, n, n);
    if (has_norm()) {
      moments->count = static_cast<double>(pixels);
      write_moments<C>(moments, 1, args.K, args.norm.mean, args.norm.var);
    }
  }

  // Everything else: W is packed once by all threads, then ranges of output pixels, of whole rows where there are
  // enough.
  void run_by_pixels(index_t slots) {
    W* packed = static_cast<W*>(shared.allocate(k_steps * panels.vectors * kLanes<C> * sizeof(W)));
    const auto panel_weights = [&](index_t i) { return packed + k_steps * panels.first_column(i); };
    constexpr double kPackCost = 6;  // of a register, in FMAs
    const index_t packers = slots_for(kPackCost * k_steps * panels.vectors, panels.count);
    run_tasks(packers, [&](index_t s) {
      for (index_t i = panels.count * s / packers; i < panels.count * (s + 1) / packers; ++i) pack(i, panel_weights(i));
    });
    // Each range streams all of W from L2 or L3: not for less than some 200 pixels.
    constexpr index_t kRangePixels = 196;
    const index_t rows = g.N * g.P;
    const index_t shares = slots == 1 ? 1 : slots * imax(1, imin(4, pixels / (slots * kRangePixels)));
    const auto edge = [&](index_t s) { return rows >= shares ? rows * s / shares * g.Q : pixels * s / shares; };
    if (has_norm()) moments = new_moments(shared, args.K, shares);
    // A range's sums of image n are row n + its number: ranges share no row, since neighbours share one image at most.
    if (pools()) sums = partial_sums<double>(shared, g.N + shares - 1, args.K);
    run_tasks(shares, [&](index_t s) {
      Arena arena(Arena::kTask);
      const index_t end = edge(s + 1), step = imin(tile_pixels(ldz * sizeof(Z), g.Q), end - edge(s));
      Loader loader(*this, arena, step);
      const Writer writer(*this, arena, step, 0, panels.count);
      Z* z = static_cast<Z*>(arena.allocate(step * ldz * sizeof(Z)));
      for (index_t begin = edge(s); begin < end; begin += step) {
        Ahead ahead = input_after(begin + step);
        const Tile tile{begin, imin(end, begin + step), z, passthrough_in_place(begin), &ahead};
        loader.load(tile.begin, tile.end, z);
        for (index_t i = 0; i < panels.count; ++i) writer.multiply(tile, i, panel_weights(i));
        writer.finish(tile);
        if (has_norm()) writer.add_moments(tile, moments[s]);
        if (pools()) writer.add_sums(tile, sums + s * args.K);
      }
      if (stream) fence_stores();
    });
    if (has_norm()) write_moments<C>(moments, shares, args.K, args.norm.mean, args.norm.var);
    if (!pools()) return;
    for (index_t n = 0, first = 0; n < g.N; ++n) {
      while (edge(first + 1) <= n * g.P * g.Q) ++first;
      index_t last = first;
      while (edge(last + 1) < (n + 1) * g.P * g.Q) ++last;
      write_sums(n, n + first, n + last);
    }
  }

  // Image n's sums: those of the rows [first, last], in their order.
  void write_sums(index_t n, index_t first, index_t last) const {
    C* to = static_cast<C*>(args.sums) + n * args.K;
    for (index_t k = 0; k < args.K; ++k) {
      double total = 0;
      for (index_t row = first; row <= last; ++row) total += sums[row * args.K + k];
      to[k] = static_cast<C>(total);
    }
  }

  // Flat output pixels [begin, end) and their z.
  struct Tile {
    index_t begin, end;
    const Z* z;
    const Z* in_place;  // the passthrough channels, where they are read from their tensor
    Ahead* ahead;
  };

  // Computes z.
  struct Loader {
    const DsconvForward& op;
    RowSource<T> source;
    C* dw_residual = nullptr;

    Loader(const DsconvForward& o, Arena& arena, index_t tile_pixels) : op(o), source(arena, op.args.input, op.g) {
      if (op.args.dw_epilogue.residual.data) {
        dw_residual = static_cast<C*>(arena.allocate(tile_pixels * op.ldz * sizeof(C)));
      }
    }

    void load(index_t begin, index_t end, Z* z) {
      op.fill_z(source, begin, end, z, op.passthrough_in_place(begin) == nullptr, dw_residual);
      if (op.args.keep > 0) {
        scatter_pixels<T>(z + op.Cz - op.args.keep, op.ldz, op.args.output, begin, end, op.g.P, op.g.Q, 0,
                          op.args.keep);
      }
    }
  };

  // Turns z into output channels: those of the panels [first, last).
  struct Writer {
    const DsconvForward& op;
    const index_t column, columns, ldy;
    C *y = nullptr, *residual = nullptr;
    Moments* of_tile = nullptr;
    TileOfMap<T> written;

    Writer(const DsconvForward& o, Arena& arena, index_t tile_pixels, index_t first, index_t last)
        : op(o),
          column(op.panels.first_column(first)),
          columns(imin(op.args.K, op.panels.first_column(last)) - column),
          ldy(row_distance<C>(op.panels.first_column(last) - column)),
          written(arena, op.reads_back() && op.one_pass() ? op.result : TensorRef{}, op.g, column, columns,
                  tile_pixels) {
      if (!op.one_pass()) y = static_cast<C*>(arena.allocate(tile_pixels * ldy * sizeof(C)));
      if (op.pw_epilogue.residual.data) residual = static_cast<C*>(arena.allocate(tile_pixels * ldy * sizeof(C)));
      if (op.has_norm()) of_tile = new_moments(arena, columns, 1);
    }

    void multiply(const Tile& t, index_t panel, const W* weights) const {
      const index_t c = op.panels.first_column(panel);
      if (!op.one_pass()) {
        C* to = y + c - column;
        const RowsOfA<Z> a = op.rows_of_a(t, 0);
        if (op.simple) {
          op.multiply_clamped(panel, weights, t.end - t.begin, a, to, ldy, op.panels.width(panel) * kLanes<C>);
        } else {
          op.multiply(panel, weights, t.end - t.begin, a, StoreRaw<C>{to, ldy});
        }
        return;
      }
      const index_t width = imin(op.args.K - c, op.panels.width(panel) * kLanes<C>);
      const TensorRef& output = op.result;
      for_each_run(output, t.begin, t.end, op.g.P, op.g.Q, [&](index_t position, index_t count, index_t offset) {
        T* to = static_cast<T*>(output.data) + position + c;
        op.multiply_clamped(panel, weights, count, op.rows_of_a(t, offset), to, output.w, width);
      });
    }

    void finish(const Tile& t) const {
      if (op.one_pass()) return;
      if (!op.simple) {
        if (residual) {
          gather_pixels<T>(op.pw_epilogue.residual, t.begin, t.end, op.g.P, op.g.Q, column, columns, residual, ldy);
        }
        apply_epilogue_rows(from_channel(op.pw_epilogue, column), t.end - t.begin, columns, y, ldy, residual, ldy);
      }
      scatter_pixels<T>(y, ldy, op.result, t.begin, t.end, op.g.P, op.g.Q, column, columns);
    }

    // The finished tile's moments, to those of the task's channels.
    void add_moments(const Tile& t, Moments& moments) const {
      tile_moments(finished(t), t.end - t.begin, columns, *of_tile);
      combine_moments(moments, *of_tile, columns);
    }

    // Its sums, each image's to the row of its number.
    void add_sums(const Tile& t, double* sums) const {
      const PixelRows<const C> rows = finished(t);
      const index_t image = op.g.P * op.g.Q;
      for (index_t begin = t.begin, end; begin < t.end; begin = end) {
        const index_t n = begin / image;
        end = imin(t.end, (n + 1) * image);
        const PixelRows<const C> own{rows.data + (begin - t.begin) * rows.ld, rows.ld};
        add_pixels<C>(own, {}, end - begin, columns, sums + n * op.args.K + column);
      }
    }

   private:
    PixelRows<const C> finished(const Tile& t) const {
      return y ? PixelRows<const C>{y, ldy} : written.read(t.begin, t.end);
    }
  };

  // Where the product can read the passthrough channels of the tile that starts at flat pixel `begin`, or null: then
  // they are copied. They must lie pixel after pixel at one distance over all images, and in whole pairs for the bf16
  // product.
  const Z* passthrough_in_place(index_t begin) const {
    if constexpr (std::is_same_v<T, Z>) {
      const TensorRef& p = args.passthrough;
      const bool pairs = !kDot || args.passthrough_channels % 2 == 0;
      if (p.data != nullptr && evenly_spaced(p, g.N, g.P, g.Q) && pairs)
        return static_cast<const Z*>(p.data) + begin * p.w;
    }
    return nullptr;
  }

  void fill_z(RowSource<T>& source, index_t begin, index_t end, Z* z, bool copy_passthrough, C* dw_residual) const {
    const index_t passthrough = args.passthrough_channels;
    if (passthrough > 0 && copy_passthrough)
      gather_pixels<T>(args.passthrough, begin, end, g.P, g.Q, 0, passthrough, z, ldz);
    if (dw_residual)
      gather_pixels<T>(args.dw_epilogue.residual, begin, end, g.P, g.Q, 0, dw_channels, dw_residual, ldz);
    for_each_row_segment(begin, end, g.P, g.Q, [&](index_t n, index_t p, index_t q, index_t count, index_t offset) {
      for (const DepthwisePart<C>& part : parts) {  // in order: the last register of one reaches into the next
        PartRows<RowSource<T>> rows{source, part.channel};
        const DepthwiseRow<T, Z, false> kernel(part.g, part.weights, part.epilogue, true);
        kernel.run(rows, n, p, q, count, z + offset * ldz + passthrough + part.column, ldz,
                   dw_residual ? dw_residual + offset * ldz : nullptr, ldz);
      }
    });
    if constexpr (kDot) {
      if (Cz % 2 != 0) {  // the odd channel's partner: its weight is zero, so it must not be NaN
        for (index_t i = 0; i < end - begin; ++i) z[i * ldz + Cz] = bf16{0};
      }
    }
  }

  // The rows of A from pixel `offset` of the tile on.
  EFFOPS_INLINE RowsOfA<Z> rows_of_a(const Tile& t, index_t offset) const {
    constexpr index_t unit = kDot ? 2 : 1;
    const Z* tile = t.z + offset * ldz;
    const index_t skipped = t.in_place ? args.passthrough_channels : 0;
    RowsOfA<Z> a = t.in_place ? RowsOfA<Z>(t.in_place + offset * args.passthrough.w, args.passthrough.w, skipped / unit,
                                           tile + skipped, ldz, k_steps - skipped / unit)
                              : RowsOfA<Z>(tile, ldz, 1, k_steps);
    a.ahead = t.ahead;
    return a;
  }

  // The input rows that the tile starting at flat pixel `begin` needs and the one before did not, where they lie in one
  // piece.
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
    return StoreClamped<D, Affine>::of(pw_epilogue, panels.first_column(panel), y, ld, columns, stream);
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
  if (args.norm.activated.data) {
    normalise<T>(args.g, args.norm, args.pw_epilogue, args.output, args.keep, args.K);
  }
}
