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
  const bool stream = direct && streams<T>(args.output, channels, pixels * channels);
  const double cost = static_cast<double>(pixels) * ld / kLanes<C> * (g.R * g.S + 4);
  const index_t shares = shares_for(cost, g.N * g.P);

  run_tasks(shares, [&](index_t share) {
    Arena arena(Arena::kTask);
    RowSource<T> source(arena, args.input, g);
    const index_t begin = g.N * g.P * share / shares * g.Q, end = g.N * g.P * (share + 1) / shares * g.Q;
    if (direct) {
      const DepthwiseRow<T, T, true> kernel(g, weights, epilogue, true, stream);
      for_each_row_segment(begin, end, g.P, g.Q, [&](index_t n, index_t p, index_t q, index_t count, index_t) {
        T* dst = static_cast<T*>(args.output.data) + n * args.output.n + p * args.output.h + q * args.output.w;
        kernel.run(source, n, p, q, count, dst, args.output.w, nullptr, 0);
      });
      if (stream) fence_stores();
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

// Mean and population variance of conv + bias over N, P, Q, never storing it.
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
  Moments* partial = new_moments(shared, channels, slots);

  run_tasks(slots, [&](index_t slot) {
    Arena arena(Arena::kTask);
    RowSource<T> source(arena, args.input, g);
    const DepthwiseRow<T, C, false> kernel(g, weights, epilogue, true);
    const index_t begin = g.N * g.P * slot / slots * g.Q, end = g.N * g.P * (slot + 1) / slots * g.Q;
    const index_t tile = tile_pixels(ld * sizeof(C), g.Q);
    C* u = static_cast<C*>(arena.allocate(tile * ld * sizeof(C)));
    Moments& of_tile = *new_moments(arena, channels, 1);
    for (index_t t = begin; t < end; t += tile) {
      const index_t stop = imin(end, t + tile);
      for_each_row_segment(t, stop, g.P, g.Q, [&](index_t n, index_t p, index_t q, index_t count, index_t offset) {
        kernel.run(source, n, p, q, count, u + offset * ld, ld, nullptr, 0);
      });
      tile_moments(PixelRows<const C>{u, ld}, stop - t, channels, of_tile);
      combine_moments(partial[slot], of_tile, channels);
    }
  });
  write_moments<C>(partial, slots, channels, args.mean, args.var);
}
