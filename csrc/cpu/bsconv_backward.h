// Room bsconv, backward, in one pass over bands of input rows; what stands between the convolutions is recomputed.
// Included inside namespace effops::<isa>::{anonymous}; see kernels.inl.
//
//   x rows [-> a = mid_chain(x)] -> z = pw_chain(a), into a ring of rows          (R - 1 rows more than the band's)
//   grad_output rows -> epilogue backward (v = dw(z) recomputed where it needs it) = gv
//   grad dw kernels += gv * z      gz = gv turned round * dw kernels: the band's rows (see backward.h)
//   epilogue backward (u = a W^T recomputed where it needs it): gz -> gu, in place
//   grad W += gu^T a      ga = gu W [-> mid's affine backward -> gm; grad W1 += gm^T x; gm W1] -> grad x
//
// A band is so small that z, gv and gz stay in L2. The ring keeps the rows of z that the next band's windows want too:
// only where a slot begins are they made twice. gv at a band's edge is made by both neighbours.

template <class T>
struct BsconvBackward {
  using C = compute<T>;
  const BsconvBackwardArgs& args;
  const BsconvForwardArgs& fwd;
  const DepthwiseGeometry& g;
  const DepthwiseGeometry map;  // the input's
  Arena shared{Arena::kCall};
  PointwiseProduct<T> mid, pw;
  const Epilogue<C> epilogue;
  const bool has_mid;
  const index_t K, inputs;      // of z; of x
  const index_t ldk, lda, ldx;  // of tiles of K channels, of what pw reads, of x
  const C* dw_weights;
  const bool from_output;          // the saved output tells the derivative
  const bool want_ga, want_gz;     // anything before pw, before the depthwise
  const bool raw_v, raw_u, raw_m;  // the sums of the depthwise, of pw, of mid
  const bool want_z;
  const BandPlan plan;
  const Panels panels_a, panels_x;                    // of what pw reads, of x
  C *pw_backward = nullptr, *mid_backward = nullptr;  // W and W1, packed
  double* dw_sums = nullptr;
  C *pw_sums = nullptr, *mid_sums = nullptr;
  EpilogueSums dw_epilogue_sums, pw_epilogue_sums, mid_epilogue_sums;

  static bool any(const EpilogueGrads& grads) {
    return grads.bias || grads.scale || grads.shift || grads.residual.data;
  }

  explicit BsconvBackward(const BsconvBackwardArgs& a)
      : args(a),
        fwd(a.forward),
        g(a.forward.g),
        map(input_map(a.forward.g)),
        mid(shared, fwd.mid),
        pw(shared, fwd.pw),
        epilogue(shared, fwd.epilogue, g.C),
        has_mid(fwd.mid.outputs > 0),
        K(g.C),
        inputs(has_mid ? mid.inputs() : pw.inputs()),
        ldk(row_distance<C>(K)),
        lda(row_distance<C>(pw.inputs())),
        ldx(row_distance<C>(inputs)),
        dw_weights(pack_depthwise_weights<T>(shared, g, fwd.dw_weight)),
        from_output(fwd.output.data != nullptr),
        want_ga(a.grad_input.data || a.grad_mid_weight || any(a.mid_grads)),
        want_gz(want_ga || a.grad_pw_weight || any(a.pw_grads)),
        raw_v(!from_output && needs_raw(epilogue, a.grads)),
        raw_u(want_gz && needs_raw(pw.epilogue, a.pw_grads)),
        raw_m(has_mid && want_ga && needs_raw(mid.epilogue, a.mid_grads)),
        want_z(raw_v || a.grad_dw_weight),
        plan(g, want_gz, cost(), band_rows()),
        panels_a(pw.inputs(), kLanes<C>),
        panels_x(inputs, kLanes<C>) {
    if (want_z || raw_u) pw.pack_all(shared);
    if (has_mid) mid.pack_all(shared);
    if (want_ga) pw_backward = pack_backward(fwd.pw, panels_a);
    if (has_mid && a.grad_input.data) mid_backward = pack_backward(fwd.mid, panels_x);
    if (a.grad_dw_weight) dw_sums = partial_sums<double>(shared, plan.slots, g.R * g.S * dw_ld());
    if (a.grad_pw_weight) pw_sums = partial_sums<C>(shared, plan.slots, K * lda);
    if (a.grad_mid_weight) mid_sums = partial_sums<C>(shared, plan.slots, mid.outputs() * ldx);
    dw_epilogue_sums = epilogue_sums(shared, a.grads, K, plan.slots);
    pw_epilogue_sums = epilogue_sums(shared, a.pw_grads, K, plan.slots);
    mid_epilogue_sums = epilogue_sums(shared, a.mid_grads, pw.inputs(), plan.slots);
  }

  index_t dw_ld() const { return round_up(K, kLanes<C>); }

  double cost() const {
    const double pixels = static_cast<double>(g.N) * g.H * g.W;
    return depthwise_cost(g, dw_ld(), kLanes<C>) +
           pixels * (3 * pw.cost_per_pixel() + (has_mid ? 3 * mid.cost_per_pixel() : 0));
  }

  // Bands whose tiles fill half of L2, of at least a few register tiles of pixels.
  index_t band_rows() const {
    constexpr index_t kBandBytes = 512 * 1024, kLeastPixels = 56;
    const index_t row = g.W * (3 * ldk + lda + ldx) * static_cast<index_t>(sizeof(C));
    return imax(kBandBytes / row, ceil_div(kLeastPixels, g.W));
  }

  // W as the right-hand side of gradient * W.
  C* pack_backward(const PointwiseRef& ref, const Panels& panels) {
    C* packed = static_cast<C*>(shared.allocate(ref.outputs * panels.vectors * kLanes<C> * sizeof(C)));
    for (index_t i = 0; i < panels.count; ++i) {
      pack_panel(static_cast<const T*>(ref.weight), ref.stride_k, ref.stride_c, ref.outputs, ref.inputs, panels, i,
                 packed + ref.outputs * panels.first_column(i));
    }
    return packed;
  }

  void run() {
    run_tasks(plan.slots, [&](index_t slot) { Slot(*this, slot).run(); });
    if (dw_sums) {
      reduce_slots(dw_sums, plan.slots, g.R * g.S * dw_ld());
      write_depthwise_weight_grad<T>(g, dw_sums, args.grad_dw_weight);
    }
    write_weight(pw_sums, K, pw.inputs(), lda, args.grad_pw_weight);
    write_weight(mid_sums, mid.outputs(), inputs, ldx, args.grad_mid_weight);
    reduce_epilogue_sums(dw_epilogue_sums, plan.slots, K, args.grads);
    reduce_epilogue_sums(pw_epilogue_sums, plan.slots, K, args.pw_grads);
    reduce_epilogue_sums(mid_epilogue_sums, plan.slots, pw.inputs(), args.mid_grads);
  }

  void write_weight(C* sums, index_t rows, index_t columns, index_t ld, void* destination) const {
    if (sums == nullptr) return;
    reduce_slots(sums, plan.slots, rows * ld);
    copy_rows(sums, ld, rows, columns, static_cast<T*>(destination), columns);
  }

  // The input rows of a band whose z is wanted: those that its windows see.
  struct Rows {
    index_t begin, end;
  };
  Rows rows_of_z(const Band& b) const {
    index_t p_begin = b.own_begin, p_end = b.own_end;
    if (raw_v && b.need_end > b.need_begin) {
      p_begin = p_end > p_begin ? imin(p_begin, b.need_begin) : b.need_begin;
      p_end = imax(p_end, b.need_end);
    }
    if (p_end <= p_begin) return {0, 0};
    const index_t begin = imin(g.H, imax(0, p_begin * g.stride_h - g.pad_top));
    return {begin, imax(begin, imin(g.H, (p_end - 1) * g.stride_h - g.pad_top + (g.R - 1) * g.dilation_h + 1))};
  }

  index_t ring_rows() const {
    index_t most = 1;
    for (index_t i = 0; i < imin(plan.count, plan.per_image); ++i) {
      const Rows rows = rows_of_z(plan.band(i));
      most = imax(most, rows.end - rows.begin);
    }
    return most;
  }

  // Whether rows of a map can be the right-hand side of a product, which reads whole registers of them.
  bool whole_registers(const TensorRef& tensor, index_t channels) const {
    return std::is_same_v<T, C> && channels % kLanes<C> == 0 && evenly_spaced(tensor, g.N, g.H, g.W);
  }

  // The bands of one slot and what happens to one of them, in the order of the picture above.
  struct Slot {
    const BsconvBackward& op;
    const DepthwiseGeometry& g;
    const index_t slot;
    Arena arena{Arena::kTask};
    const index_t band_rows, dw_rows;           // the most input rows of a band; output rows at a time
    C *z, *gz;                                  // the ring; of a band: [pixels][ldk]
    DepthwiseSlot<C, RingOfRows<C>> depthwise;  // has the tiles of gv
    EpilogueSums dw_own, pw_own, mid_own;
    TileOfMap<T> grad_output, saved, residual;  // output rows
    TileOfMap<T> grad_input;                    // input rows
    C *v, *grad_residual;                       // [pixels][ldk]
    C* u;                                       // of a band: [pixels][ldk]
    C *x, *a, *m, *ga, *spill;                  // [pixels][ldx], three times [lda], and what of grad x is no channel
    index_t z_image = -1, z_end = 0;            // the ring holds rows up to z_end of this image

    Slot(const BsconvBackward& o, index_t s)
        : op(o),
          g(o.g),
          slot(s),
          band_rows(ceil_div(o.g.H, o.plan.per_image)),
          dw_rows(imax(1, tile_pixels(2 * o.ldk * sizeof(C), o.g.Q) / o.g.Q)),
          z(o.want_z ? static_cast<C*>(arena.allocate(o.ring_rows() * o.g.W * o.ldk * sizeof(C))) : nullptr),
          gz(o.want_gz ? static_cast<C*>(arena.allocate(band_rows * o.g.W * o.ldk * sizeof(C))) : nullptr),
          depthwise(arena, o.g, RingOfRows<C>(z, o.want_z ? o.ring_rows() : 1, o.g.W, o.ldk), rows_of_gz(0),
                    o.dw_weights, o.dw_sums ? o.dw_sums + s * o.g.R * o.g.S * o.dw_ld() : nullptr, dw_rows, o.ldk, 0),
          dw_own(slot_of(o.dw_epilogue_sums, s, o.K)),
          pw_own(slot_of(o.pw_epilogue_sums, s, o.K)),
          mid_own(slot_of(o.mid_epilogue_sums, s, o.pw.inputs())),
          grad_output(arena, o.args.grad_output, g, 0, o.K, dw_rows * g.Q),
          saved(arena, o.fwd.output, g, 0, o.K, dw_rows * g.Q),
          residual(arena, o.epilogue.post != Activation::none ? o.epilogue.residual : TensorRef{}, g, 0, o.K,
                   dw_rows * g.Q),
          grad_input(arena, o.args.grad_input, o.map, 0, o.inputs, band_rows * g.W) {
      const auto tile = [&](bool want, index_t pixels, index_t ld) {
        return want ? static_cast<C*>(arena.allocate(pixels * ld * sizeof(C))) : nullptr;
      };
      const index_t pixels = band_rows * g.W;
      v = tile(op.raw_v, dw_rows * g.Q, op.ldk);
      grad_residual = tile(op.args.grads.residual.data, dw_rows * g.Q, op.ldk);
      u = tile(op.raw_u, pixels, op.ldk);
      x = tile(!op.whole_registers(op.fwd.input, op.inputs), pixels, op.ldx);
      a = tile(op.has_mid, pixels, op.lda);
      m = tile(op.raw_m, pixels, op.lda);
      ga = tile(op.has_mid && op.want_ga, pixels, op.lda);
      spill = tile(op.args.grad_input.data, pixels, op.ldx);
    }

    void run() {
      for (index_t i = op.plan.count * slot / op.plan.slots; i < op.plan.count * (slot + 1) / op.plan.slots; ++i) {
        const Band band = op.plan.band(i);
        if (op.want_z) make_z(band);
        depthwise_gradients(band);
        if (op.want_gz && band.h_end > band.h_begin) pointwise_gradients(band);
      }
    }

   private:
    // gz as a map whose row `first` is the tile's first one.
    TensorRef rows_of_gz(index_t first) const {
      const index_t row = op.g.W * op.ldk;
      return {gz ? gz - first * row : nullptr, 0, 1, row, op.ldk};
    }

    // Pixels of the input's map.
    PixelRows<const C> input_rows(index_t n, index_t h_begin, index_t h_end) const {
      const index_t begin = (n * g.H + h_begin) * g.W, end = (n * g.H + h_end) * g.W;
      const TensorRef& input = op.fwd.input;
      if (x == nullptr) return {static_cast<const C*>(input.data) + begin * input.w, input.w};
      gather_pixels<T>(input, begin, end, g.H, g.W, 0, op.inputs, x, op.ldx);
      return {x, op.ldx};
    }

    // What pw reads, of at most band_rows rows.
    PixelRows<const C> pointwise_rows(const PixelRows<const C>& in, index_t pixels) const {
      if (!op.has_mid) return in;
      op.mid.run_all(pixels, in, a, op.lda, true);
      return {a, op.lda};
    }

    // The rows of z that the band wants and the ring has not.
    void make_z(const Band& band) {
      const auto [begin, end] = op.rows_of_z(band);
      if (end <= begin) return;
      index_t h = z_image == band.n && z_end >= begin ? z_end : begin;
      while (h < end) {
        const index_t rows = imin(imin(end - h, band_rows), depthwise.source.rows_until_wrap(h));
        const PixelRows<const C> in = pointwise_rows(input_rows(band.n, h, h + rows), rows * g.W);
        op.pw.run_all(rows * g.W, in, depthwise.source.place(h), op.ldk, true);
        h += rows;
      }
      z_image = band.n;
      z_end = h;
    }

    // gv, tile by tile; of it the gradients of the kernels and gz.
    void depthwise_gradients(const Band& band) {
      if (op.want_gz) depthwise.redirect(rows_of_gz(band.h_begin));
      depthwise.begin(band);
      op.plan.for_each_tile(band, dw_rows, [&](index_t p_begin, index_t p_end, bool owned, bool needed) {
        const index_t begin = (band.n * g.P + p_begin) * g.Q, end = (band.n * g.P + p_end) * g.Q;
        if (v) {
          recompute_depthwise<C>(depthwise.source, g, op.dw_weights, op.epilogue, false, band.n, p_begin, p_end, v,
                                 op.ldk, nullptr);
        }
        const EpilogueBackward<C> backward{op.epilogue, grad_output.read(begin, end), saved.read(begin, end),
                                           v,           residual.read(begin, end),    grad_residual,
                                           op.ldk};
        backward.run(end - begin, op.K, depthwise.place(p_end - p_begin), owned ? dw_own : EpilogueSums{});
        if (owned && grad_residual) {
          scatter_pixels<T>(grad_residual, op.ldk, op.args.grads.residual, begin, end, g.P, g.Q, 0, op.K);
        }
        depthwise.take(band.n, p_begin, p_end, owned, needed);
      });
      depthwise.end();
    }

    // gz of the band -> everything before it.
    void pointwise_gradients(const Band& band) {
      const index_t pixels = (band.h_end - band.h_begin) * g.W;
      const PixelRows<const C> in = input_rows(band.n, band.h_begin, band.h_end);
      const PixelRows<const C> rows = op.raw_u || op.pw_sums ? pointwise_rows(in, pixels) : PixelRows<const C>{};
      if (u) op.pw.run_all(pixels, rows, u, op.ldk, false);
      const EpilogueBackward<C> backward{op.pw.epilogue, {gz, op.ldk}, {}, u, {}, nullptr, op.ldk};
      backward.run(pixels, op.K, gz, pw_own);
      if (op.pw_sums)
        add_weight(gz, op.ldk, op.K, rows, op.panels_a, pixels, op.pw_sums + slot * op.K * op.lda, op.lda);
      if (!op.want_ga) return;
      if (!op.has_mid) return write_grad_input(band, gz, op.ldk, op.K, op.pw_backward);
      for (index_t i = 0; i < op.panels_a.count; ++i) {
        const index_t width = op.panels_a.width(i), column = op.panels_a.first_column(i);
        gemm_panel(width, pixels, RowsOfA<C>(gz, op.ldk, 1, op.K), op.pw_backward + op.K * column, width * kLanes<C>,
                   StoreRaw<C>{ga + column, op.lda});
      }
      middle_gradients(band, in, pixels);
    }

    void middle_gradients(const Band& band, const PixelRows<const C>& in, index_t pixels) {
      const index_t M = op.pw.inputs();
      if (m) op.mid.run_all(pixels, in, m, op.lda, false);
      const EpilogueBackward<C> backward{op.mid.epilogue, {ga, op.lda}, {}, m, {}, nullptr, op.lda};
      backward.run(pixels, M, ga, mid_own);
      if (op.mid_sums) add_weight(ga, op.lda, M, in, op.panels_x, pixels, op.mid_sums + slot * M * op.ldx, op.ldx);
      if (op.args.grad_input.data) write_grad_input(band, ga, op.lda, M, op.mid_backward);
    }

    // sums[k][c] += grad[pixel][k] * rows[pixel][c]
    void add_weight(const C* grad, index_t grad_ld, index_t outputs, const PixelRows<const C>& rows,
                    const Panels& panels, index_t pixels, C* sums, index_t ld) const {
      for (index_t i = 0; i < panels.count; ++i) {
        const index_t column = panels.first_column(i);
        gemm_panel(panels.width(i), outputs, RowsOfA<C>(grad, 1, grad_ld, pixels), rows.data + column, rows.ld,
                   Accumulate<C>{sums + column, ld});
      }
    }

    // grad x = grad W
    void write_grad_input(const Band& band, const C* grad, index_t grad_ld, index_t outputs, const C* weights) const {
      const index_t begin = (band.n * g.H + band.h_begin) * g.W, end = (band.n * g.H + band.h_end) * g.W;
      const PixelRows<C> destination = grad_input.at(begin);
      for (index_t i = 0; i < op.panels_x.count; ++i) {
        const index_t width = op.panels_x.width(i), column = op.panels_x.first_column(i);
        const StoreSplit<C, C> out{destination.data + column, destination.ld, op.inputs - column, spill + column,
                                   op.ldx};
        gemm_panel(width, end - begin, RowsOfA<C>(grad, grad_ld, 1, outputs), weights + outputs * column,
                   width * kLanes<C>, out);
      }
      grad_input.wrote(begin, end);
    }
  };
};

template <class T>
void bsconv_bwd(const BsconvBackwardArgs& args) {
  BsconvBackward<T>(args).run();
}
