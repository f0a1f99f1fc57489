// Room mbconv, backward: everything is computed again, band by band. Included inside namespace
// effops::<isa>::{anonymous}; see kernels.inl.
//
//   x rows --We--> e sums -> e -> u (dw sums) -> z [* gates] --Wp--> v -> epilogue backward(v, grad_output) = gv
//   grad Wp += gv^T z     gz = gv Wp [through the gates] -> epilogue backward(u, gz) = gu -> grad dw kernels, ge
//   epilogue backward(e sums, ge) = gs     grad We += gs^T x     grad x = gs We
//
// A band is a range of input rows of one image (BandPlan, backward.h), of so many that its expanded rows take some 512
// KB; its tiles (e, u, z, gz and their neighbours' rows at its edges) lie in scratch memory. With a squeeze-excite a
// band is an image, since its gates depend on all of z. Each slot of tasks has its own partial sums, added in order.

template <class T>
struct MbconvBackward {
  using C = compute<T>;
  using Image = typename ExciteProducts<T>::Image;

  const MbconvBackwardArgs& args;
  const MbconvForwardArgs& fwd;
  const DepthwiseGeometry& g;  // on the expanded channels
  Arena shared{Arena::kCall};
  const index_t in, hidden, K;
  const index_t ldx, ldh, ldk;
  const bool expands, excites;
  const bool want_expanded;  // the gradient at the expanded tensor
  const bool want_hidden;    // the gradient at the depthwise result
  const Panels panels_in, panels_hidden, panels_k;
  const C* dw_weights;
  const Epilogue<C> expand_epilogue, dw_epilogue, epilogue;
  const bool raw_e, raw_u, raw_v;
  const ExciteProducts<T> products;
  BandPlan plan;
  Image* images = nullptr;                                      // of the batch
  const C *expand = nullptr, *project = nullptr;                // packed for e and v
  const C *expand_turned = nullptr, *project_turned = nullptr;  // packed for grad x and gz
  double* dw_sums = nullptr;
  C *expand_sums = nullptr, *project_sums = nullptr;
  EpilogueSums expand_epilogue_sums, dw_epilogue_sums, epilogue_sums_;

  static bool any(const EpilogueGrads& grads) { return grads.bias || grads.scale || grads.shift; }
  static bool any(const ExcitationGrads& grads) {
    return grads.reduce_weight || grads.reduce_bias || grads.expand_weight || grads.expand_bias;
  }

  explicit MbconvBackward(const MbconvBackwardArgs& a)
      : args(a),
        fwd(a.forward),
        g(a.forward.g),
        in(fwd.in_channels),
        hidden(g.C),
        K(fwd.K),
        ldx(row_distance<C>(in)),
        ldh(row_distance<C>(hidden)),
        ldk(row_distance<C>(K)),
        expands(fwd.expand.data != nullptr),
        excites(fwd.excitation.reduce_weight != nullptr),
        want_expanded(a.grad_input.data || a.grad_expand_weight || any(a.expand_grads)),
        want_hidden(want_expanded || a.grad_dw_weight || any(a.dw_grads) || any(a.excitation_grads)),
        panels_in(in, kLanes<C>),
        panels_hidden(hidden, kLanes<C>),
        panels_k(K, kLanes<C>),
        dw_weights(pack_depthwise_weights<T>(shared, g, fwd.dw_weight)),
        expand_epilogue(shared, fwd.expand_epilogue, expands ? hidden : 0),
        dw_epilogue(shared, fwd.dw_epilogue, hidden),
        epilogue(shared, fwd.epilogue, K),
        raw_e(expands && want_expanded && needs_raw(expand_epilogue, a.expand_grads)),
        raw_u(want_hidden && needs_raw(dw_epilogue, a.dw_grads)),
        raw_v(needs_raw(epilogue, a.grads)),
        products(shared, fwd.excitation, excites ? hidden : 0),
        plan(bands()) {
    if (excites) images = products.new_images(shared, g.N);
    if (expands) expand = pack(fwd.expand, in, hidden, panels_hidden, false);
    if (raw_v) project = pack(fwd.project, hidden, K, panels_k, false);
    if (want_hidden) project_turned = pack(fwd.project, K, hidden, panels_hidden, true);
    if (expands && a.grad_input.data) expand_turned = pack(fwd.expand, hidden, in, panels_in, true);
    if (a.grad_dw_weight) dw_sums = partial_sums<double>(shared, plan.slots, dw_size());
    if (a.grad_expand_weight) expand_sums = partial_sums<C>(shared, plan.slots, hidden * ldx);
    if (a.grad_project_weight) project_sums = partial_sums<C>(shared, plan.slots, K * ldh);
    expand_epilogue_sums = epilogue_sums(shared, a.expand_grads, hidden, plan.slots);
    dw_epilogue_sums = epilogue_sums(shared, a.dw_grads, hidden, plan.slots);
    epilogue_sums_ = epilogue_sums(shared, a.grads, K, plan.slots);
  }

  index_t dw_size() const { return g.R * g.S * round_up(hidden, kLanes<C>); }

  BandPlan bands() const {
    const double pixels = static_cast<double>(g.N) * g.P * g.Q, expanded = static_cast<double>(g.N) * g.H * g.W;
    const double products = (pixels * K * 3 + expanded * in * 3) * hidden / kLanes<C>;
    BandPlan result(g, want_expanded, depthwise_cost(g, ldh, kLanes<C>) + products);
    constexpr index_t kBandBytes = 512 * 1024;
    const index_t bytes = g.H * g.W * ldh * static_cast<index_t>(sizeof(C));
    const index_t least = imin(ceil_div(bytes, kBandBytes), imin(g.H, imax(1, g.P)));
    result.per_image = excites ? 1 : imax(result.per_image, least);
    result.count = g.N * result.per_image;
    result.slots = imax(1, imin(result.slots, result.count));
    return result;
  }

  // Rows of the packed matrix are the weight's input channels, or its output channels where it is turned.
  const C* pack(const MatrixRef& weight, index_t k, index_t columns, const Panels& panels, bool turned) {
    C* packed = static_cast<C*>(shared.allocate(k * panels.vectors * kLanes<C> * sizeof(C)));
    const index_t row = turned ? weight.stride_out : weight.stride_in;
    const index_t column = turned ? weight.stride_in : weight.stride_out;
    for (index_t i = 0; i < panels.count; ++i) {
      pack_panel(static_cast<const T*>(weight.data), row, column, k, columns, panels, i,
                 packed + k * panels.first_column(i));
    }
    return packed;
  }

  // y [rows][ldy] = a [rows][lda] times a packed matrix
  static void multiply(const C* a, index_t lda, index_t k, index_t rows, const C* packed, const Panels& panels, C* y,
                       index_t ldy) {
    for (index_t i = 0; i < panels.count; ++i) {
      const index_t column = panels.first_column(i);
      gemm_panel(panels.width(i), rows, {a, lda, 1, k}, packed + k * column, panels.width(i) * kLanes<C>,
                 StoreRaw<C>{y + column, ldy});
    }
  }

  // sums [columns of a][ld of b] += a^T b over `rows` pixels
  static void add_products(const C* a, index_t lda, index_t columns, const C* b, index_t ldb, const Panels& panels,
                           index_t rows, C* sums) {
    for (index_t i = 0; i < panels.count; ++i) {
      const index_t column = panels.first_column(i);
      gemm_panel(panels.width(i), columns, {a, 1, lda, rows}, b + column, ldb, Accumulate<C>{sums + column, ldb});
    }
  }

  void run() {
    run_tasks(plan.slots, [&](index_t slot) {
      for (index_t i = plan.count * slot / plan.slots; i < plan.count * (slot + 1) / plan.slots; ++i) {
        BandWork(*this, slot, plan.band(i)).run();
      }
    });
    if (dw_sums) {
      reduce_slots(dw_sums, plan.slots, dw_size());
      write_depthwise_weight_grad<T>(g, dw_sums, args.grad_dw_weight);
    }
    if (expand_sums) {
      reduce_slots(expand_sums, plan.slots, hidden * ldx);
      copy_rows(expand_sums, ldx, hidden, in, static_cast<T*>(args.grad_expand_weight), in);
    }
    if (project_sums) {
      reduce_slots(project_sums, plan.slots, K * ldh);
      copy_rows(project_sums, ldh, K, hidden, static_cast<T*>(args.grad_project_weight), hidden);
    }
    reduce_epilogue_sums(expand_epilogue_sums, plan.slots, hidden, args.expand_grads);
    reduce_epilogue_sums(dw_epilogue_sums, plan.slots, hidden, args.dw_grads);
    reduce_epilogue_sums(epilogue_sums_, plan.slots, K, args.grads);
    if (excites) products.write_gradients(images, g.N, args.excitation_grads, shared);
  }

  // One band: its rows and tiles, and what happens to them, in the order of the picture above.
  struct BandWork {
    const MbconvBackward& op;
    const DepthwiseGeometry& g;
    const index_t slot;
    const Band band;
    Arena arena{Arena::kTask};
    const index_t p_first, p_last;  // output rows that are computed
    const index_t h_first, h_last;  // input rows that they see, and the band's own
    C *x, *e_sums, *e, *ge;         // [input rows][W][ldx or ldh]
    DepthwiseSlot<C> depthwise;     // has the tiles of gu
    TileOfMap<T> grad_output, residual;
    C *u, *z, *gated, *gz;      // [output rows][Q][ldh]
    C *v, *gv, *grad_residual;  // [output rows][Q][ldk]
    C* gates = nullptr;

    BandWork(const MbconvBackward& o, index_t s, const Band& b)
        : op(o),
          g(o.g),
          slot(s),
          band(b),
          p_first(imin(b.own_begin, b.need_begin)),
          p_last(imax(b.own_end, b.need_end)),
          h_first(imin(b.h_begin, imin(g.H, imax(0, p_first * g.stride_h - g.pad_top)))),
          h_last(
              imax(b.h_end, imin(g.H, imax(0, (p_last - 1) * g.stride_h - g.pad_top + (g.R - 1) * g.dilation_h + 1)))),
          x(input_tile(o.expands, o.ldx)),
          e_sums(input_tile(o.raw_e, o.ldh)),
          e(input_tile(true, o.ldh)),
          ge(input_tile(o.want_expanded, o.ldh)),
          depthwise(arena, g, RowSource<C>(arena, map_of(e), g), o.want_expanded ? map_of(ge) : TensorRef{},
                    o.dw_weights, o.dw_sums ? o.dw_sums + s * o.dw_size() : nullptr, imax(1, p_last - p_first), o.ldh,
                    0),
          grad_output(arena, o.args.grad_output, g, 0, o.K, output_pixels()),
          residual(arena, o.epilogue.post != Activation::none ? o.epilogue.residual : TensorRef{}, g, 0, o.K,
                   output_pixels()),
          u(output_tile(o.raw_u, o.ldh)),
          z(output_tile(true, o.ldh)),
          gated(output_tile(o.excites, o.ldh)),
          gz(output_tile(o.want_hidden, o.ldh)),
          v(output_tile(o.raw_v, o.ldk)),
          gv(output_tile(true, o.ldk)),
          grad_residual(output_tile(o.args.grads.residual.data, o.ldk)) {
      if (o.excites) gates = static_cast<C*>(arena.allocate(2 * o.ldh * sizeof(C)));
    }

    void run() {
      expand();
      if (p_last > p_first) {
        for_each_part([&](const Part& t) { depthwise_forward(t); });
        if (op.excites) excite();
        for_each_part([&](const Part& t) { projection(t); });
      }
      if (!op.want_hidden) return;
      if (p_last > p_first && op.excites) excite_backward();
      depthwise.begin(band);
      for_each_part([&](const Part& t) { depthwise_backward(t); });
      depthwise.end();
      if (op.want_expanded) expansion_backward();
    }

   private:
    struct Part {  // output rows, all owned or none, all needed or none
      index_t p_begin, p_end;
      index_t offset, pixels;  // in the tiles
      index_t begin, end;      // flat pixels of the batch
      bool owned, needed;
    };

    template <class F>
    void for_each_part(const F& f) const {
      op.plan.for_each_tile(band, imax(1, p_last - p_first),
                            [&](index_t p_begin, index_t p_end, bool owned, bool needed) {
                              const index_t begin = (band.n * g.P + p_begin) * g.Q;
                              f(Part{p_begin, p_end, (p_begin - p_first) * g.Q, (p_end - p_begin) * g.Q, begin,
                                     begin + (p_end - p_begin) * g.Q, owned, needed});
                            });
    }

    index_t output_pixels() const { return imax(1, p_last - p_first) * g.Q; }
    C* input_tile(bool want, index_t ld) {
      return want ? static_cast<C*>(arena.allocate((h_last - h_first) * g.W * ld * sizeof(C))) : nullptr;
    }
    C* output_tile(bool want, index_t ld) {
      return want ? static_cast<C*>(arena.allocate(output_pixels() * ld * sizeof(C))) : nullptr;
    }
    // A tile of expanded rows as the map of which it holds some rows.
    TensorRef map_of(C* tile) const { return {tile - h_first * g.W * op.ldh, 0, 1, g.W * op.ldh, op.ldh}; }

    void expand() {
      const index_t begin = (band.n * g.H + h_first) * g.W, pixels = (h_last - h_first) * g.W;
      if (!op.expands) {
        gather_pixels<T>(op.fwd.input, begin, begin + pixels, g.H, g.W, 0, op.in, e, op.ldh);
        return;
      }
      gather_pixels<T>(op.fwd.input, begin, begin + pixels, g.H, g.W, 0, op.in, x, op.ldx);
      multiply(x, op.ldx, op.in, pixels, op.expand, op.panels_hidden, e_sums ? e_sums : e, op.ldh);
      if (e_sums) copy_rows(e_sums, op.ldh, pixels, op.hidden, e, op.ldh);
      apply_epilogue_rows<C>(op.expand_epilogue, pixels, op.hidden, e, op.ldh, nullptr, 0);
    }

    void depthwise_forward(const Part& t) {
      C *rows = z + t.offset * op.ldh, *sums = u ? u + t.offset * op.ldh : nullptr;
      recompute_depthwise<C>(depthwise.source, g, op.dw_weights, op.dw_epilogue, u == nullptr, band.n, t.p_begin,
                             t.p_end, sums ? sums : rows, op.ldh, nullptr);
      if (sums == nullptr) return;
      copy_rows(sums, op.ldh, t.pixels, op.hidden, rows, op.ldh);
      apply_epilogue_rows<C>(op.dw_epilogue, t.pixels, op.hidden, rows, op.ldh, nullptr, 0);
    }

    // The band is the whole image: gates, z * gates.
    void excite() {
      double* sums = zeroed();
      add_pixels<C>({z, op.ldh}, {}, g.P * g.Q, op.hidden, sums);
      op.products.gates(sums, g.P * g.Q, op.images[band.n], gates);
      scale_pixels<C, C>({z, op.ldh}, gates, nullptr, g.P * g.Q, op.hidden, {gated, op.ldh});
    }

    void excite_backward() {
      double* sums = zeroed();
      add_pixels<C>({gz, op.ldh}, {z, op.ldh}, g.P * g.Q, op.hidden, sums);
      C* offset = gates + op.ldh;
      op.products.backward(sums, g.P * g.Q, op.images[band.n], offset);
      scale_pixels<C, C>({gz, op.ldh}, gates, offset, g.P * g.Q, op.hidden, {gz, op.ldh});
    }

    double* zeroed() { return partial_sums<double>(arena, 1, op.hidden); }

    // v, gv, gz, and the projection's own gradients
    void projection(const Part& t) {
      const C* a = (op.excites ? gated : z) + t.offset * op.ldh;
      C* gradient = gv + t.offset * op.ldk;
      if (v) multiply(a, op.ldh, op.hidden, t.pixels, op.project, op.panels_k, v + t.offset * op.ldk, op.ldk);
      C* to_residual = grad_residual ? grad_residual + t.offset * op.ldk : nullptr;
      const EpilogueBackward<C> backward{op.epilogue,
                                         grad_output.read(t.begin, t.end),
                                         {},
                                         v ? v + t.offset * op.ldk : nullptr,
                                         residual.read(t.begin, t.end),
                                         to_residual,
                                         op.ldk};
      backward.run(t.pixels, op.K, gradient, t.owned ? slot_of(op.epilogue_sums_, slot, op.K) : EpilogueSums{});
      if (t.owned && to_residual) {
        scatter_pixels<T>(to_residual, op.ldk, op.args.grads.residual, t.begin, t.end, g.P, g.Q, 0, op.K);
      }
      if (t.owned && op.project_sums) {
        add_products(gradient, op.ldk, op.K, a, op.ldh, op.panels_hidden, t.pixels,
                     op.project_sums + slot * op.K * op.ldh);
      }
      if (gz) {
        multiply(gradient, op.ldk, op.K, t.pixels, op.project_turned, op.panels_hidden, gz + t.offset * op.ldh, op.ldh);
      }
    }

    void depthwise_backward(const Part& t) {
      C* gu = depthwise.place(t.p_end - t.p_begin);
      const EpilogueBackward<C> backward{
          op.dw_epilogue, {gz + t.offset * op.ldh, op.ldh}, {}, u ? u + t.offset * op.ldh : nullptr, {}, nullptr,
          op.ldh};
      backward.run(t.pixels, op.hidden, gu, t.owned ? slot_of(op.dw_epilogue_sums, slot, op.hidden) : EpilogueSums{});
      depthwise.take(band.n, t.p_begin, t.p_end, t.owned, t.needed);
    }

    // ge of the band's own rows is complete: gs, grad We, grad x
    void expansion_backward() {
      const index_t own = (band.h_begin - h_first) * g.W, pixels = (band.h_end - band.h_begin) * g.W;
      const index_t begin = (band.n * g.H + band.h_begin) * g.W;
      C* gradient = ge + own * op.ldh;
      const TensorRef& to = op.args.grad_input;
      if (!op.expands) {
        if (to.data) scatter_pixels<T>(gradient, op.ldh, to, begin, begin + pixels, g.H, g.W, 0, op.in);
        return;
      }
      const EpilogueBackward<C> backward{
          op.expand_epilogue, {gradient, op.ldh}, {}, e_sums ? e_sums + own * op.ldh : nullptr, {}, nullptr, op.ldh};
      backward.run(pixels, op.hidden, gradient, slot_of(op.expand_epilogue_sums, slot, op.hidden));
      C* own_x = x + own * op.ldx;
      if (op.expand_sums) {
        add_products(gradient, op.ldh, op.hidden, own_x, op.ldx, op.panels_in, pixels,
                     op.expand_sums + slot * op.hidden * op.ldx);
      }
      if (to.data == nullptr) return;
      multiply(gradient, op.ldh, op.hidden, pixels, op.expand_turned, op.panels_in, own_x, op.ldx);  // x has been used
      scatter_pixels<T>(own_x, op.ldx, to, begin, begin + pixels, g.H, g.W, 0, op.in);
    }
  };
};

template <class T>
void mbconv_bwd(const MbconvBackwardArgs& args) {
  MbconvBackward<T>(args).run();
}
