// Room dwconv, backward: of the convolution with its epilogue, and of its batch statistics.
// Included inside namespace effops::<isa>::{anonymous}; see kernels.inl.

inline double depthwise_cost(const DepthwiseGeometry& g, index_t ld, index_t lanes) {
  return static_cast<double>(g.N) * g.P * g.Q * ld / lanes * (3 * g.R * g.S + 8);
}

// What both backward kernels of the room do with a tile once the gradient at the sums is there.
template <class T>
struct DepthwiseSlot {
  using C = compute<T>;
  RowSource<T> source;
  GradInputRing<T> grad_input;
  GradDepthwiseWeight<T> grad_weight;

  DepthwiseSlot(Arena& arena, const DepthwiseGeometry& g, const TensorRef& input, const TensorRef& grad_input_,
                const C* weights, double* weight_sums)
      : source(arena, input, g), grad_input(arena, g, grad_input_, weights), grad_weight(g, weight_sums) {}

  // grad: [rows * Q][ld] for output rows [p_begin, p_end) of image n
  void take(const DepthwiseGeometry& g, index_t n, index_t p_begin, index_t p_end, bool owned, bool needed,
            const C* grad, index_t ld) {
    for (index_t p = p_begin; p < p_end; ++p) {
      const C* row = grad + (p - p_begin) * g.Q * ld;
      if (owned && grad_weight.wanted()) grad_weight.add(source, n, p, row, ld);
      if (needed && grad_input.wanted()) grad_input.add(p, row, ld);
    }
  }
};

// Raw sums (no bias) of output rows [p_begin, p_end) -> [rows * Q][ld].
template <class T>
void recompute_depthwise(RowSource<T>& source, const DepthwiseGeometry& g, const compute<T>* weights,
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
    DepthwiseSlot<T> work(arena, g, args.input, args.grad_input, weights,
                          weight_sums ? weight_sums + slot * taps * ld : nullptr);
    const EpilogueSums own_sums = slot_of(sums, slot, channels), no_sums;
    const index_t rows = imax(1, tile_pixels(2 * ld * sizeof(C), g.Q) / g.Q);
    const auto tile = [&](bool want) {
      return want ? static_cast<C*>(arena.allocate(rows * g.Q * ld * sizeof(C))) : nullptr;
    };
    const TileOfMap<T> grad_output(arena, args.grad_output, g, 0, channels, rows * g.Q);
    const TileOfMap<T> saved(arena, args.output, g, 0, channels, rows * g.Q);
    const TileOfMap<T> residual(arena, epilogue.post != Activation::none ? epilogue.residual : TensorRef{}, g, 0,
                                channels, rows * g.Q);
    C *grad = tile(true), *u = tile(raw), *grad_residual = tile(args.grads.residual.data);
    for (index_t i = plan.count * slot / plan.slots; i < plan.count * (slot + 1) / plan.slots; ++i) {
      const Band band = plan.band(i);
      work.grad_input.begin(band);
      plan.for_each_tile(band, rows, [&](index_t p_begin, index_t p_end, bool owned, bool needed) {
        const index_t begin = (band.n * g.P + p_begin) * g.Q, end = (band.n * g.P + p_end) * g.Q;
        if (u) recompute_depthwise<T>(work.source, g, weights, epilogue, false, band.n, p_begin, p_end, u, ld, nullptr);
        const EpilogueBackward<C> backward{epilogue, grad_output.read(begin, end), saved.read(begin, end),
                                           u,        residual.read(begin, end),    grad_residual,
                                           ld};
        backward.run(end - begin, channels, grad, owned ? own_sums : no_sums);
        if (owned && grad_residual)
          scatter_pixels<T>(grad_residual, ld, args.grads.residual, begin, end, g.P, g.Q, 0, channels);
        work.take(g, band.n, p_begin, p_end, owned, needed, grad, ld);
      });
      if (work.grad_input.wanted()) work.grad_input.end();
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
    DepthwiseSlot<T> work(arena, g, args.input, args.grad_input, weights,
                          weight_sums ? weight_sums + slot * taps * ld : nullptr);
    const EpilogueSums own_sums = slot_of(sums, slot, channels);
    const index_t rows = imax(1, tile_pixels(ld * sizeof(C), g.Q) / g.Q);
    C* u = static_cast<C*>(arena.allocate(rows * g.Q * ld * sizeof(C)));
    for (index_t i = plan.count * slot / plan.slots; i < plan.count * (slot + 1) / plan.slots; ++i) {
      const Band band = plan.band(i);
      work.grad_input.begin(band);
      plan.for_each_tile(band, rows, [&](index_t p_begin, index_t p_end, bool owned, bool needed) {
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
        work.take(g, band.n, p_begin, p_end, owned, needed, u, ld);
      });
      if (work.grad_input.wanted()) work.grad_input.end();
    }
  });
  if (weight_sums) {
    reduce_slots(weight_sums, plan.slots, taps * ld);
    write_depthwise_weight_grad<T>(g, weight_sums, args.grad_weight);
  }
  reduce_epilogue_sums(sums, plan.slots, channels, grads);
}
