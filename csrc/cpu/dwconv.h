// Room dwconv: depthwise convolution (learned, shared and fixed banks) with its epilogue.
// Included inside namespace effops::<isa>::{anonymous}; see kernels.inl.

template <class T>
void dwconv_fwd(const DwconvForwardArgs& args) {
  using C = compute<T>;
  const DepthwiseGeometry& g = args.g;
  const index_t channels = g.out_channels(), ld = round_up(channels, kLanes<C>), pixels = g.N * g.P * g.Q;
  if (pixels == 0 || channels == 0) return;
  Arena shared(Arena::kCall);
  const C* weights = pack_depthwise_weights<T>(shared, g, args.weight);
  const Epilogue<C> epilogue(shared, args.epilogue, channels);
  const bool direct = args.output.c == 1 && epilogue.residual.data == nullptr;
  const double cost = static_cast<double>(pixels) * ld / kLanes<C> * (g.R * g.S + 4);
  const index_t shares = shares_for(cost, g.N * g.P);

  run_tasks(shares, [&](index_t share) {
    Arena arena(Arena::kTask);
    RowSource<T> source(arena, args.input, g);
    const index_t begin = g.N * g.P * share / shares * g.Q, end = g.N * g.P * (share + 1) / shares * g.Q;
    if (direct) {
      const DepthwiseRow<T, T, true> kernel(g, weights, epilogue, true);
      for_each_row_segment(begin, end, g.P, g.Q, [&](index_t n, index_t p, index_t q, index_t count, index_t) {
        T* dst = static_cast<T*>(args.output.data) + n * args.output.n + p * args.output.h + q * args.output.w;
        kernel.run(source, n, p, q, count, dst, args.output.w, nullptr, 0);
      });
      return;
    }
    const DepthwiseRow<T, C, false> kernel(g, weights, epilogue, true);
    const index_t tile = tile_pixels(ld * sizeof(C), g.Q);
    C* y = static_cast<C*>(arena.allocate(tile * ld * sizeof(C)));
    C* residual = epilogue.residual.data ? static_cast<C*>(arena.allocate(tile * ld * sizeof(C))) : nullptr;
    for (index_t t = begin; t < end; t += tile) {
      const index_t stop = imin(end, t + tile);
      if (residual) gather_pixels<T>(epilogue.residual, t, stop, g.P, g.Q, 0, channels, residual, ld);
      for_each_row_segment(t, stop, g.P, g.Q, [&](index_t n, index_t p, index_t q, index_t count, index_t offset) {
        kernel.run(source, n, p, q, count, y + offset * ld, ld, residual ? residual + offset * ld : nullptr, ld);
      });
      scatter_pixels<T>(y, ld, args.output, t, stop, g.P, g.Q, 0, channels);
    }
  });
}

// Mean and population variance of conv + bias over N, P, Q, never storing it: tiles by two passes in scratch, tiles and
// slots combined by Chan's formula in double.
struct Moments {
  double count = 0;
  double *mean, *m2;  // [channels]
};

inline void combine_moments(Moments& into, const Moments& other, index_t channels) {
  const double total = into.count + other.count;
  if (total == 0) return;
  for (index_t c = 0; c < channels; ++c) {
    const double delta = other.mean[c] - into.mean[c];
    into.mean[c] += delta * other.count / total;
    into.m2[c] += other.m2[c] + delta * delta * into.count * other.count / total;
  }
  into.count = total;
}

template <class C>
void tile_moments(const C* tile, index_t ld, index_t pixels, index_t channels, Moments& result) {
  constexpr index_t L = kLanes<C>;
  result.count = static_cast<double>(pixels);
  for (index_t c = 0; c < channels; c += L) {
    vec<C> sum{};
    for (index_t i = 0; i < pixels; ++i) sum = sum + load(tile + i * ld + c);
    const vec<C> mean = sum / splat(static_cast<C>(pixels));
    vec<C> m2{}, rest{};
    for (index_t i = 0; i < pixels; ++i) {
      const vec<C> d = load(tile + i * ld + c) - mean;
      m2 = m2 + d * d;
      rest = rest + d;
    }
    for (index_t j = 0; j < imin(L, channels - c); ++j) {  // `rest` takes back what rounding the mean lost
      const double correction = static_cast<double>(rest[j]) / pixels;
      result.mean[c + j] = mean[j] + correction;
      result.m2[c + j] = m2[j] - correction * correction * pixels;
    }
  }
}

inline Moments new_moments(Arena& arena, index_t channels) {
  Moments m;
  m.mean = static_cast<double*>(arena.allocate(channels * sizeof(double)));
  m.m2 = static_cast<double*>(arena.allocate(channels * sizeof(double)));
  for (index_t c = 0; c < channels; ++c) m.mean[c] = m.m2[c] = 0;
  return m;
}

template <class T>
void dwconv_stats(const DwconvStatsArgs& args) {
  using C = compute<T>;
  const DepthwiseGeometry& g = args.g;
  const index_t channels = g.out_channels(), ld = round_up(channels, kLanes<C>), pixels = g.N * g.P * g.Q;
  Arena shared(Arena::kCall);
  const C* weights = pack_depthwise_weights<T>(shared, g, args.weight);
  EpilogueRef only_bias;
  only_bias.bias = args.bias;
  const Epilogue<C> epilogue(shared, only_bias, channels);
  const index_t slots = slots_for(static_cast<double>(pixels) * ld / kLanes<C> * (g.R * g.S + 4), g.N * g.P);
  Moments* partial = static_cast<Moments*>(shared.allocate(slots * sizeof(Moments)));
  for (index_t s = 0; s < slots; ++s) partial[s] = new_moments(shared, channels);

  run_tasks(slots, [&](index_t slot) {
    Arena arena(Arena::kTask);
    RowSource<T> source(arena, args.input, g);
    const DepthwiseRow<T, C, false> kernel(g, weights, epilogue, true);
    const index_t begin = g.N * g.P * slot / slots * g.Q, end = g.N * g.P * (slot + 1) / slots * g.Q;
    const index_t tile = tile_pixels(ld * sizeof(C), g.Q);
    C* u = static_cast<C*>(arena.allocate(tile * ld * sizeof(C)));
    Moments of_tile = new_moments(arena, channels);
    for (index_t t = begin; t < end; t += tile) {
      const index_t stop = imin(end, t + tile);
      for_each_row_segment(t, stop, g.P, g.Q, [&](index_t n, index_t p, index_t q, index_t count, index_t offset) {
        kernel.run(source, n, p, q, count, u + offset * ld, ld, nullptr, 0);
      });
      tile_moments(u, ld, stop - t, channels, of_tile);
      combine_moments(partial[slot], of_tile, channels);
    }
  });
  for (index_t s = 1; s < slots; ++s) combine_moments(partial[0], partial[s], channels);
  for (index_t c = 0; c < channels; ++c) {
    static_cast<C*>(args.mean)[c] = static_cast<C>(partial[0].mean[c]);
    static_cast<C*>(args.var)[c] = static_cast<C>(partial[0].m2[c] / partial[0].count);
  }
}
