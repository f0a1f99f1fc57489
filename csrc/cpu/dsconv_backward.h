// Room dsconv, backward, in one pass over tiles of output rows; the depthwise tile and, where the derivative needs it,
// the pointwise sums are recomputed. Included inside namespace effops::<isa>::{anonymous}; see kernels.inl.
//
//   x rows -> u (dw sums) -> z = [passthrough | epilogue(u)] -> v = z W^T -> epilogue backward(v, grad_output) = gv
//   grad W += gv^T z      gz = gv W (+ grad_output of the kept channels)      -> grad passthrough
//   epilogue backward(u, gz) = gu -> grad dw kernels, grad x (see backward.h)
//
// With a norm its two sums come first, in a pass of their own over grad_output and activated (batchnorm.h); gv then goes
// through the norm as well.

template <class T>
struct DsconvBackward {
  using C = compute<T>;
  const DsconvBackwardArgs& args;
  const DsconvForwardArgs& fwd;
  const DepthwiseGeometry& g;
  Arena shared{Arena::kCall};
  const DepthwiseParts<C> parts;
  const index_t dw_channels, passthrough, Cz, K;
  const index_t ld_dw, ldz, ldk;
  const bool has_norm;
  const Epilogue<C> dw_epilogue, pw_epilogue;
  const TensorRef saved;   // act(conv + bias), where it is there
  const bool from_output;  // and tells the derivative
  const bool want_dw_weight;
  const bool want_gz;  // anything before the pointwise
  const bool raw_v, raw_u, want_z;
  const BandPlan plan;
  const Panels panels_k, panels_c;
  C *packed_forward = nullptr, *packed_backward = nullptr;  // W^T for v, W for gz
  double* dw_sums = nullptr;
  C* pw_sums = nullptr;
  EpilogueSums dw_epilogue_sums, pw_epilogue_sums;
  EpilogueGrads pw_grads;  // those of pw_epilogue; a norm's are in args alone
  NormGradient<C> norm;

  static bool any(const EpilogueGrads& grads) {
    return grads.bias || grads.scale || grads.shift || grads.residual.data;
  }

  // The pointwise's residual, in the derivative of what comes after it.
  bool needs_residual() const { return (has_norm || raw_v) && pw_epilogue.post != Activation::none; }

  explicit DsconvBackward(const DsconvBackwardArgs& a)
      : args(a),
        fwd(a.forward),
        g(a.forward.g),
        parts(pack_parts<T>(shared, a.forward)),
        dw_channels(parts.channels()),
        passthrough(fwd.passthrough_channels),
        Cz(passthrough + dw_channels),
        K(fwd.K),
        ld_dw(round_up(dw_channels, kLanes<C>)),
        ldz(row_distance<C>(passthrough + imax(ld_dw, parts.padded_columns()))),
        ldk(row_distance<C>(K)),
        has_norm(fwd.norm.activated.data != nullptr),
        dw_epilogue(shared, fwd.dw_epilogue, dw_channels),
        pw_epilogue(shared, has_norm ? epilogue_with_norm<C>(shared, fwd.pw_epilogue, fwd.norm, K) : fwd.pw_epilogue,
                    K),
        saved(has_norm ? fwd.norm.activated : fwd.output),
        from_output(has_norm ? output_gives_gradient(fwd.pw_epilogue.activation, fwd.pw_epilogue.slope)
                             : saved.data != nullptr),
        want_dw_weight(fwd.parts ? fwd.parts[0].grad_weight != nullptr : a.grad_dw_weight != nullptr),
        want_gz(a.grad_input.data || a.grad_passthrough.data || want_dw_weight || any(a.dw_grads)),
        raw_v(!from_output &&
              (has_norm ? pw_epilogue.activation != Activation::none : needs_raw(pw_epilogue, a.pw_grads))),
        raw_u(want_gz && needs_raw(dw_epilogue, a.dw_grads)),
        want_z(raw_v || a.grad_pw_weight),
        plan(g, a.grad_input.data != nullptr,
             parts_cost() + static_cast<double>(g.N) * g.P * g.Q * (1 + want_gz + raw_v) * Cz * ldk / kLanes<C>),
        panels_k(K, kLanes<C>),
        panels_c(Cz, kLanes<C>) {
    if (raw_v) packed_forward = pack(fwd.pw_stride_c, fwd.pw_stride_k, Cz, K, panels_k);
    if (want_gz) packed_backward = pack(fwd.pw_stride_k, fwd.pw_stride_c, K, Cz, panels_c);
    if (want_dw_weight) dw_sums = partial_sums<double>(shared, plan.slots, parts.taps());
    if (a.grad_pw_weight) pw_sums = partial_sums<C>(shared, plan.slots, K * ldz);
    dw_epilogue_sums = epilogue_sums(shared, a.dw_grads, dw_channels, plan.slots);
    pw_grads = a.pw_grads;
    if (has_norm) {
      pw_grads.scale = pw_grads.shift = nullptr;
      norm = norm_gradient<T>(shared, g, fwd.norm, pw_epilogue, a.grad_output, fwd.keep, K, a.pw_grads);
    }
    pw_epilogue_sums = epilogue_sums(shared, pw_grads, K, plan.slots);
  }

  double parts_cost() const {
    double cost = 0;
    for (const DepthwisePart<C>& part : parts) cost += depthwise_cost(part.g, part.ld(), kLanes<C>);
    return cost;
  }

  C* pack(index_t row_stride, index_t column_stride, index_t k, index_t columns, const Panels& panels) {
    C* packed = static_cast<C*>(shared.allocate(k * panels.vectors * kLanes<C> * sizeof(C)));
    for (index_t i = 0; i < panels.count; ++i) {
      pack_panel(static_cast<const T*>(fwd.pw_weight), row_stride, column_stride, k, columns, panels, i,
                 packed + k * panels.first_column(i));
    }
    return packed;
  }

  void run() {
    run_tasks(plan.slots, [&](index_t slot) { Slot(*this, slot).run(); });
    if (dw_sums) {
      reduce_slots(dw_sums, plan.slots, parts.taps());
      for (index_t i = 0; i < parts.count; ++i) {
        void* destination = fwd.parts ? fwd.parts[i].grad_weight : args.grad_dw_weight;
        write_depthwise_weight_grad<T>(parts.data[i].g, dw_sums + parts.data[i].tap, destination);
      }
    }
    if (pw_sums) {
      reduce_slots(pw_sums, plan.slots, K * ldz);
      copy_rows(pw_sums, ldz, K, Cz, static_cast<T*>(args.grad_pw_weight), Cz);
    }
    reduce_epilogue_sums(dw_epilogue_sums, plan.slots, dw_channels, args.dw_grads);
    reduce_epilogue_sums(pw_epilogue_sums, plan.slots, K, pw_grads);
  }

  // The tiles of one slot and what happens to one of them, in the order of the picture above.
  struct Slot {
    const DsconvBackward& op;
    const DepthwiseGeometry& g;
    index_t slot;
    Arena arena{Arena::kTask};
    index_t rows;
    DepthwiseSlot<T> depthwise;  // has the tiles of gz
    EpilogueSums dw_own, pw_own;
    TileOfMap<T> grad_output, saved, pw_residual;                     // K channels
    C *gv, *v, *pw_grad_residual;                                     // [pixels][ldk]
    C *z, *u, *gz = nullptr, *kept, *dw_residual, *dw_grad_residual;  // [pixels][ldz]

    Slot(const DsconvBackward& o, index_t s)
        : op(o),
          g(o.g),
          slot(s),
          rows(imax(1, tile_pixels((o.ldz + o.ldk) * sizeof(C), o.g.Q) / o.g.Q)),
          depthwise(arena, o.g, o.parts, RowSource<T>(arena, o.fwd.input, o.g), o.args.grad_input,
                    o.dw_sums ? o.dw_sums + s * o.parts.taps() : nullptr, rows, o.ldz, o.passthrough),
          dw_own(slot_of(o.dw_epilogue_sums, s, o.dw_channels)),
          pw_own(slot_of(o.pw_epilogue_sums, s, o.K)),
          grad_output(arena, o.args.grad_output, g, o.fwd.keep, o.K, rows * g.Q),
          saved(arena, o.has_norm || o.from_output ? o.saved : TensorRef{}, g, o.has_norm ? 0 : o.fwd.keep, o.K,
                rows * g.Q),
          pw_residual(arena, o.needs_residual() ? o.pw_epilogue.residual : TensorRef{}, g, 0, o.K, rows * g.Q) {
      const auto tile = [&](bool want, index_t ld) {
        return want ? static_cast<C*>(arena.allocate(rows * g.Q * ld * sizeof(C))) : nullptr;
      };
      gv = tile(true, op.ldk);
      v = tile(op.raw_v, op.ldk);
      pw_grad_residual = tile(op.args.pw_grads.residual.data, op.ldk);
      z = tile(op.want_z, op.ldz);
      u = tile(op.raw_u, op.ldz);
      kept = tile(op.want_gz && op.fwd.keep > 0, op.ldz);
      dw_residual = tile(op.dw_epilogue.residual.data && (op.want_z || op.raw_u), op.ldz);
      dw_grad_residual = tile(op.args.dw_grads.residual.data, op.ldz);
    }

    void run() {
      for (index_t i = op.plan.count * slot / op.plan.slots; i < op.plan.count * (slot + 1) / op.plan.slots; ++i) {
        const Band band = op.plan.band(i);
        depthwise.begin(band);
        op.plan.for_each_tile(band, rows, [&](index_t p_begin, index_t p_end, bool owned, bool needed) {
          const Tile t{band.n, p_begin, p_end, (band.n * g.P + p_begin) * g.Q, (band.n * g.P + p_end) * g.Q, owned};
          recompute(t);
          pointwise_sums(t);
          if (owned && op.pw_sums) add_pointwise_weight(t);
          if (op.want_gz) {
            pointwise_input(t);
            depthwise_sums(t);
            depthwise.take(t.n, p_begin, p_end, owned, needed);
          }
        });
        depthwise.end();
      }
    }

   private:
    struct Tile {
      index_t n, p_begin, p_end;
      index_t begin, end;  // flat pixels
      bool owned;
      index_t pixels() const { return end - begin; }
    };

    void gather(const TensorRef& tensor, const Tile& t, index_t first, index_t channels, C* dst, index_t ld) const {
      gather_pixels<T>(tensor, t.begin, t.end, g.P, g.Q, first, channels, dst, ld);
    }
    void scatter(const C* src, index_t ld, const TensorRef& tensor, const Tile& t, index_t channels) const {
      scatter_pixels<T>(src, ld, tensor, t.begin, t.end, g.P, g.Q, 0, channels);
    }

    // u and z
    void recompute(const Tile& t) {
      if (dw_residual) gather(op.dw_epilogue.residual, t, 0, op.dw_channels, dw_residual, op.ldz);
      if (u) recompute_parts(t, false, u, nullptr);
      if (z == nullptr) return;
      if (op.passthrough > 0) gather(op.fwd.passthrough, t, 0, op.passthrough, z, op.ldz);
      C* dw_part = z + op.passthrough;
      if (u) {
        copy_rows(u, op.ldz, t.pixels(), op.ld_dw, dw_part, op.ldz);
        apply_epilogue_rows(op.dw_epilogue, t.pixels(), op.dw_channels, dw_part, op.ldz, dw_residual, op.ldz);
      } else {
        recompute_parts(t, true, dw_part, dw_residual);
      }
    }

    void recompute_parts(const Tile& t, bool with_epilogue, C* tile, const C* residual) {
      for (index_t p = t.p_begin; p < t.p_end; ++p) {
        const index_t at = (p - t.p_begin) * g.Q * op.ldz;
        for (const DepthwisePart<C>& part : op.parts) {
          PartRows<RowSource<T>> rows{depthwise.source, part.channel};
          const DepthwiseRow<T, C, false> kernel(part.g, part.weights, part.epilogue, with_epilogue);
          kernel.run(rows, t.n, p, 0, g.Q, tile + at + part.column, op.ldz, residual ? residual + at : nullptr, op.ldz);
        }
      }
    }

    // gv: the gradient at the pointwise sums
    void pointwise_sums(const Tile& t) {
      if (v) {
        for (index_t i = 0; i < op.panels_k.count; ++i) {
          const index_t ld = op.panels_k.width(i) * kLanes<C>, column = op.panels_k.first_column(i);
          gemm_panel(op.panels_k.width(i), t.pixels(), {z, op.ldz, 1, op.Cz}, op.packed_forward + op.Cz * column, ld,
                     StoreRaw<C>{v + column, op.ldk});
        }
      }
      const PixelRows<const C> grad = grad_output.read(t.begin, t.end), a = saved.read(t.begin, t.end);
      const PixelRows<const C> residual = pw_residual.read(t.begin, t.end);
      const EpilogueSums sums = t.owned ? pw_own : EpilogueSums{};
      if (op.has_norm) {
        const NormBackward<C> backward{{op.pw_epilogue, grad, a, residual}, op.norm, v, pw_grad_residual, op.ldk};
        backward.run(t.pixels(), op.K, gv, sums);
      } else {
        const EpilogueBackward<C> backward{op.pw_epilogue, grad, a, v, residual, pw_grad_residual, op.ldk};
        backward.run(t.pixels(), op.K, gv, sums);
      }
      if (t.owned && pw_grad_residual) scatter(pw_grad_residual, op.ldk, op.args.pw_grads.residual, t, op.K);
    }

    void add_pointwise_weight(const Tile& t) {
      C* sums = op.pw_sums + slot * op.K * op.ldz;
      for (index_t i = 0; i < op.panels_c.count; ++i) {
        const index_t column = op.panels_c.first_column(i);
        gemm_panel(op.panels_c.width(i), op.K, {gv, 1, op.ldk, t.pixels()}, z + column, op.ldz,
                   Accumulate<C>{sums + column, op.ldz});
      }
    }

    // gz: the gradient at [passthrough | depthwise result]
    void pointwise_input(const Tile& t) {
      gz = depthwise.place(t.p_end - t.p_begin);
      const TensorRef& passthrough = op.args.grad_passthrough;
      const bool wanted = t.owned && passthrough.data, direct = wanted && evenly_spaced(passthrough, g.N, g.P, g.Q);
      T* const first = direct ? static_cast<T*>(passthrough.data) + t.begin * passthrough.w : nullptr;
      for (index_t i = 0; i < op.panels_c.count; ++i) {
        const index_t ld = op.panels_c.width(i) * kLanes<C>, column = op.panels_c.first_column(i);
        const StoreSplit<C, T> out{first + (direct ? column : 0), passthrough.w, direct ? op.passthrough - column : 0,
                                   gz + column, op.ldz};
        gemm_panel(op.panels_c.width(i), t.pixels(), {gv, op.ldk, 1, op.K}, op.packed_backward + op.K * column, ld,
                   out);
      }
      if (kept) {
        const index_t keep = op.fwd.keep, first = op.Cz - keep;
        gather(op.args.grad_output, t, 0, keep, kept, op.ldz);
        for (index_t i = 0; i < t.pixels(); ++i) {
          for (index_t c = 0; c < keep; ++c) gz[i * op.ldz + first + c] += kept[i * op.ldz + c];
        }
      }
      if (wanted && !direct) scatter(gz, op.ldz, passthrough, t, op.passthrough);
    }

    // gz's depthwise part -> the gradient at the depthwise sums, in place
    void depthwise_sums(const Tile& t) {
      C* grad = gz + op.passthrough;
      const EpilogueBackward<C> backward{op.dw_epilogue,        {grad, op.ldz},   {},    u,
                                         {dw_residual, op.ldz}, dw_grad_residual, op.ldz};
      backward.run(t.pixels(), op.dw_channels, grad, t.owned ? dw_own : EpilogueSums{});
      if (t.owned && dw_grad_residual) scatter(dw_grad_residual, op.ldz, op.args.dw_grads.residual, t, op.dw_channels);
    }
  };
};

template <class T>
void dsconv_bwd(const DsconvBackwardArgs& args) {
  DsconvBackward<T>(args).run();
}
