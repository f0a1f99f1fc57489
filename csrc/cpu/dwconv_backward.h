// Room dwconv, backward: of the convolution with its epilogue, and of its batch statistics.
// Included inside namespace effops::<isa>::{anonymous}; see kernels.inl.

inline double depthwise_cost(const DepthwiseGeometry& g, index_t ld, index_t lanes) {
  return static_cast<double>(g.N) * g.P * g.Q * ld / lanes * (3 * g.R * g.S + 8);
}

// What every backward kernel with a depthwise convolution does with a tile once the gradient at the sums is there.
// Source hands out rows of its input, as RowSource does.
template <class T, class Source = RowSource<T>>
class DepthwiseSlot {
  using C = compute<T>;

 public:
  Source source;

  // Tiles have at most `rows` output rows of pixels `ld` apart; the depthwise channels start at `first`. g spans all
  // parts.
  DepthwiseSlot(Arena& arena, const DepthwiseGeometry& g, const DepthwiseParts<C>& parts, const Source& rows_of_input,
                const TensorRef& grad_input, double* weight_sums, index_t rows, index_t ld, index_t first)
      : source(rows_of_input),
        g_(g),
        parts_(parts),
        wanted_(grad_input.data != nullptr),
        whole_rows_(GradInputRows<T>::fits(g)),
        grad_rows_(arena, g, parts, wanted_ && whole_rows_ ? grad_input : TensorRef{}, rows),
        grad_ring_(arena, g, parts, wanted_ && !whole_rows_ ? grad_input : TensorRef{}),
        weight_sums_(weight_sums),
        ld_(ld),
        first_(first) {
    // Room for the rows that finished tiles must leave for later ones, wherever in it a tile starts.
    capacity_ = wanted_ && whole_rows_ ? 2 * rows + GradInputRows<T>::history(g) : rows;
    tiles_ = static_cast<C*>(arena.allocate(capacity_ * g.Q * ld * sizeof(C)));
  }

  DepthwiseSlot(Arena& arena, const DepthwiseGeometry& g, const Source& rows_of_input, const TensorRef& grad_input,
                const C* weights, double* weight_sums, index_t rows, index_t ld, index_t first)
      : DepthwiseSlot(arena, g, one_part<C>(arena, g, weights, EpilogueRef{}), rows_of_input, grad_input, weight_sums,
                      rows, ld, first) {}

  // Where the gradient of the next `rows` output rows goes: [rows * Q][ld].
  C* place(index_t rows) {
    if (used_ + rows > capacity_) used_ = 0;
    tile_ = tiles_ + used_ * g_.Q * ld_;
    used_ += rows;
    return tile_;
  }

  void redirect(const TensorRef& grad_input) {
    whole_rows_ ? grad_rows_.redirect(grad_input) : grad_ring_.redirect(grad_input);
  }

  void begin(const Band& band) {
    if (!wanted_) return;
    whole_rows_ ? grad_rows_.begin(band) : grad_ring_.begin(band);
  }

  // The tile placed last holds output rows [p_begin, p_end) of image n.
  void take(index_t n, index_t p_begin, index_t p_end, bool owned, bool needed) {
    const C* grad = tile_ + first_;
    if (owned && weight_sums_) add_weights(n, p_begin, p_end, grad);
    if (!needed || !wanted_) return;
    if (whole_rows_) {
      grad_rows_.add(p_begin, p_end, grad, ld_);
    } else {
      for (index_t p = p_begin; p < p_end; ++p) grad_ring_.add(p, grad + (p - p_begin) * g_.Q * ld_, ld_);
    }
  }

  void end() {
    if (!wanted_) return;
    whole_rows_ ? grad_rows_.end() : grad_ring_.end();
  }

 private:
  // Of the rows that come through a ring, one at a time for all parts.
  void add_weights(index_t n, index_t p_begin, index_t p_end, const C* grad) {
    const index_t step = source.direct() || parts_.count == 1 ? p_end - p_begin : 1;
    for (index_t p = p_begin; p < p_end; p += step) {
      for (const DepthwisePart<C>& part : parts_) {
        PartRows<Source> rows{source, part.channel};
        const GradDepthwiseWeight<T> sums(part.g, weight_sums_ + part.tap);
        sums.add(rows, n, p, p + step, grad + (p - p_begin) * g_.Q * ld_ + part.column, ld_);
      }
    }
  }

  const DepthwiseGeometry& g_;
  DepthwiseParts<C> parts_;
  bool wanted_, whole_rows_;
  GradInputRows<T> grad_rows_;
  GradInputRing<T> grad_ring_;
  double* weight_sums_;
  index_t ld_, first_;
  C *tiles_ = nullptr, *tile_ = nullptr;
  index_t capacity_ = 0, used_ = 0;
};

// Raw sums (no bias) of output rows [p_begin, p_end) -> [rows * Q][ld].
template <class T, class Source>
void recompute_depthwise(Source& source, const DepthwiseGeometry& g, const compute<T>* weights,
                         const Epilogue<compute<T>>& epilogue, bool with_epilogue, index_t n, index_t p_begin,
                         index_t p_end, compute<T>* u, index_t ld, const compute<T>* residual) {
  const DepthwiseRow<T, compute<T>, false> kernel(g, weights, epilogue, with_epilogue);
  for (index_t p = p_begin; p < p_end; ++p) {
    const index_t at = (p - p_begin) * g.Q * ld;
    kernel.run(source, n, p, 0, g.Q, u + at, ld, residual ? residual + at : nullptr, ld);
  }
}

// Whether the gradient of an epilogue depends on the sums themselves.
template <class C>
bool needs_raw(const Epilogue<C>& epilogue, const EpilogueGrads& grads) {
  return epilogue.activation != Activation::none || epilogue.post != Activation::none || grads.scale != nullptr;
}

template <class T>
void dwconv_bwd(const DwconvBackwardArgs& args) {
  using C = compute<T>;
  const DepthwiseGeometry& g = args.g;
  const index_t channels = g.out_channels(), ld = round_up(channels, kLanes<C>), taps = g.R * g.S;
  Arena shared(Arena::kCall);
  const C* weights = pack_depthwise_weights<T>(shared, g, args.weight);
  const Epilogue<C> epilogue(shared, args.epilogue, channels);
  const bool from_output = args.output.data != nullptr;
  const bool raw = !from_output && needs_raw(epilogue, args.grads);
  const BandPlan plan(g, args.grad_input.data != nullptr, depthwise_cost(g, ld, kLanes<C>));
  double* weight_sums = args.grad_weight ? partial_sums<double>(shared, plan.slots, taps * ld) : nullptr;
  const EpilogueSums sums = epilogue_sums(shared, args.grads, channels, plan.slots);

  run_tasks(plan.slots, [&](index_t slot) {
    Arena arena(Arena::kTask);
    const index_t rows = imax(1, tile_pixels(2 * ld * sizeof(C), g.Q) / g.Q);
    DepthwiseSlot<T> work(arena, g, RowSource<T>(arena, args.input, g), args.grad_input, weights,
                          weight_sums ? weight_sums + slot * taps * ld : nullptr, rows, ld, 0);
    const EpilogueSums own_sums = slot_of(sums, slot, channels), no_sums;
    const auto tile = [&](bool want) {
      return want ? static_cast<C*>(arena.allocate(rows * g.Q * ld * sizeof(C))) : nullptr;
    };
    const TileOfMap<T> grad_output(arena, args.grad_output, g, 0, channels, rows * g.Q);
    const TileOfMap<T> saved(arena, args.output, g, 0, channels, rows * g.Q);
    const TileOfMap<T> residual(arena, epilogue.post != Activation::none ? epilogue.residual : TensorRef{}, g, 0,
                                channels, rows * g.Q);
    C *u = tile(raw), *grad_residual = tile(args.grads.residual.data);
    for (index_t i = plan.count * slot / plan.slots; i < plan.count * (slot + 1) / plan.slots; ++i) {
      const Band band = plan.band(i);
      work.begin(band);
      plan.for_each_tile(band, rows, [&](index_t p_begin, index_t p_end, bool owned, bool needed) {
        const index_t begin = (band.n * g.P + p_begin) * g.Q, end = (band.n * g.P + p_end) * g.Q;
        if (u) recompute_depthwise<T>(work.source, g, weights, epilogue, false, band.n, p_begin, p_end, u, ld, nullptr);
        const EpilogueBackward<C> backward{epilogue, grad_output.read(begin, end), saved.read(begin, end),
                                           u,        residual.read(begin, end),    grad_residual,
                                           ld};
        backward.run(end - begin, channels, work.place(p_end - p_begin), owned ? own_sums : no_sums);
        if (owned && grad_residual)
          scatter_pixels<T>(grad_residual, ld, args.grads.residual, begin, end, g.P, g.Q, 0, channels);
        work.take(band.n, p_begin, p_end, owned, needed);
      });
      work.end();
    }
  });
  if (weight_sums) {
    reduce_slots(weight_sums, plan.slots, taps * ld);
    write_depthwise_weight_grad<T>(g, weight_sums, args.grad_weight);
  }
  reduce_epilogue_sums(sums, plan.slots, channels, args.grads);
}

// d / d(sum) of (mean, population variance): (grad_mean + 2 grad_var (u - mean)) / count.
template <class T>
void dwconv_stats_bwd(const DwconvStatsBackwardArgs& args) {
  using C = compute<T>;
  const DepthwiseGeometry& g = args.g;
  const index_t channels = g.out_channels(), ld = round_up(channels, kLanes<C>), taps = g.R * g.S;
  Arena shared(Arena::kCall);
  const C* weights = pack_depthwise_weights<T>(shared, g, args.weight);
  EpilogueRef only_bias;
  only_bias.bias = args.bias;
  const Epilogue<C> epilogue(shared, only_bias, channels);
  // gradient = offset + slope * u
  C* slope = static_cast<C*>(shared.allocate(ld * sizeof(C)));
  C* offset = static_cast<C*>(shared.allocate(ld * sizeof(C)));
  const double count = static_cast<double>(g.N) * g.P * g.Q;
  for (index_t c = 0; c < ld; ++c) {
    const bool inside = c < channels;
    const double mean = inside ? static_cast<const C*>(args.mean)[c] : 0;
    const double twice = inside ? 2 * static_cast<double>(static_cast<const C*>(args.grad_var)[c]) / count : 0;
    slope[c] = static_cast<C>(twice);
    offset[c] = static_cast<C>((inside ? static_cast<const C*>(args.grad_mean)[c] / count : 0) - twice * mean);
  }
  const BandPlan plan(g, args.grad_input.data != nullptr, depthwise_cost(g, ld, kLanes<C>));
  double* weight_sums = args.grad_weight ? partial_sums<double>(shared, plan.slots, taps * ld) : nullptr;
  EpilogueGrads grads;
  grads.bias = args.grad_bias;
  grads.bias_dtype = args.grad_bias_dtype;
  const EpilogueSums sums = epilogue_sums(shared, grads, channels, plan.slots);

  run_tasks(plan.slots, [&](index_t slot) {
    Arena arena(Arena::kTask);
    const index_t rows = imax(1, tile_pixels(ld * sizeof(C), g.Q) / g.Q);
    DepthwiseSlot<T> work(arena, g, RowSource<T>(arena, args.input, g), args.grad_input, weights,
                          weight_sums ? weight_sums + slot * taps * ld : nullptr, rows, ld, 0);
    const EpilogueSums own_sums = slot_of(sums, slot, channels);
    for (index_t i = plan.count * slot / plan.slots; i < plan.count * (slot + 1) / plan.slots; ++i) {
      const Band band = plan.band(i);
      work.begin(band);
      plan.for_each_tile(band, rows, [&](index_t p_begin, index_t p_end, bool owned, bool needed) {
        C* u = work.place(p_end - p_begin);
        recompute_depthwise<T>(work.source, g, weights, epilogue, true, band.n, p_begin, p_end, u, ld, nullptr);
        const index_t tile_pixels = (p_end - p_begin) * g.Q;
        for (index_t c = 0; c < ld; c += kLanes<C>) {
          for (index_t first = 0; first < tile_pixels; first += kShortChain) {
            vec<C> total{};
            for (index_t t = first; t < imin(tile_pixels, first + kShortChain); ++t) {
              const vec<C> value = load(u + t * ld + c) * load(slope + c) + load(offset + c);
              store(u + t * ld + c, value);
              total = total + value;
            }
            if (owned && own_sums.bias) add_to_doubles<C>(own_sums.bias + c, total, channels - c);
          }
        }
        work.take(band.n, p_begin, p_end, owned, needed);
      });
      work.end();
    }
  });
  if (weight_sums) {
    reduce_slots(weight_sums, plan.slots, taps * ld);
    write_depthwise_weight_grad<T>(g, weight_sums, args.grad_weight);
  }
  reduce_epilogue_sums(sums, plan.slots, channels, grads);
}
