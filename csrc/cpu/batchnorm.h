// Batch norm on the batch's own statistics, around a convolution: the moments of tiles, the normalisation, the sums and
// the formula of its gradient. Included inside namespace effops::<isa>::{anonymous}; see kernels.inl.
//
//   forward   a = act(conv + bias), tile by tile, moments of each tile while it is in cache -> mean, var
//             y = post((a - mean) * scale + bias + residual): one read, one write        scale = weight / sqrt(var + eps)
//   backward  g = d loss / d norm(a) = grad_y * post'(y);  sum g and sum g (a - mean): one read of grad_y and a
//             d loss / d a = scale * (g - sum g / n - (a - mean) / (var + eps) * sum g (a - mean) / n), wherever it is
//             wanted; never stored

// ---- moments: tiles by two passes, tiles and slots combined by Chan's formula in double ----

struct Moments {
  double count = 0;
  double *mean, *m2;  // [channels]; m2: sum of squared distances from the mean
};

inline Moments* new_moments(Arena& arena, index_t channels, index_t slots) {
  Moments* result = static_cast<Moments*>(arena.allocate(slots * sizeof(Moments)));
  for (index_t s = 0; s < slots; ++s) {
    double* mean = static_cast<double*>(arena.allocate(channels * sizeof(double)));
    double* m2 = static_cast<double*>(arena.allocate(channels * sizeof(double)));
    for (index_t c = 0; c < channels; ++c) mean[c] = m2[c] = 0;
    result[s] = {0, mean, m2};
  }
  return result;
}

inline void combine_moments(Moments& into, const Moments& other, index_t channels) {
  const double total = into.count + other.count;
  if (total == 0) return;
  const double share = other.count / total, weight = into.count * share;
  for (index_t c = 0; c < channels; ++c) {
    const double delta = other.mean[c] - into.mean[c];
    into.mean[c] += delta * share;
    into.m2[c] += other.m2[c] + delta * delta * weight;
  }
  into.count = total;
}

// f(pixel, chain) for every pixel; consecutive pixels go to different chains, so that dependent additions do not wait.
constexpr int kChains = 4;
template <class F>
EFFOPS_INLINE void in_chains(index_t pixels, const F& f) {
  index_t i = 0;
  for (; i + kChains <= pixels; i += kChains) {
#pragma GCC unroll 4
    for (int k = 0; k < kChains; ++k) f(i + k, k);
  }
  for (; i < pixels; ++i) f(i, 0);
}

template <class V>
EFFOPS_INLINE V sum_of_chains(const V (&chains)[kChains]) {
  return (chains[0] + chains[1]) + (chains[2] + chains[3]);
}

// Of one register of channels: x = the first pixel's, `lanes` of them count. The mean is summed in double: its error
// would otherwise be that of a float chain, which torch's is not.
template <bool Full, class C>
EFFOPS_INLINE void register_moments(const C* x, index_t ld, index_t pixels, index_t lanes, double* mean, double* m2) {
  constexpr int kParts = DoubleLanes<C>::kParts;
  vec<double> sums[kParts][kChains]{};
  in_chains(pixels, [&](index_t i, int k) __attribute__((always_inline)) {
    const DoubleLanes<C> wide = to_doubles(load_lanes<Full>(x + i * ld, lanes));
#pragma GCC unroll 2
    for (int p = 0; p < kParts; ++p) sums[p][k] = sums[p][k] + wide.part[p];
  });
  double exact[kLanes<C>];
  vec<C> centre;
#pragma GCC unroll 2
  for (int p = 0; p < kParts; ++p) {
    store(exact + p * kLanes<double>, sum_of_chains(sums[p]) / splat(static_cast<double>(pixels)));
  }
  for (int j = 0; j < kLanes<C>; ++j) centre[j] = static_cast<C>(exact[j]);
  vec<C> squares[kChains]{};
  in_chains(pixels, [&](index_t i, int k) __attribute__((always_inline)) {
    const vec<C> d = load_lanes<Full>(x + i * ld, lanes) - centre;
    squares[k] = squares[k] + d * d;
  });
  const vec<C> square = sum_of_chains(squares);
  for (index_t j = 0; j < imin(lanes, kLanes<C>); ++j) {
    const double off = exact[j] - centre[j];  // what rounding the mean took away
    mean[j] = exact[j];
    m2[j] = square[j] - off * off * static_cast<double>(pixels);
  }
}

template <class C>
void tile_moments(const PixelRows<const C>& tile, index_t pixels, index_t channels, Moments& result) {
  result.count = static_cast<double>(pixels);
  for_each_register<C>(channels, [&](index_t c, auto whole) {
    register_moments<decltype(whole)::value>(tile.data + c, tile.ld, pixels, channels - c, result.mean + c,
                                             result.m2 + c);
  });
}

// Adds the slots in their order into the first one and writes the result.
template <class C>
void write_moments(Moments* slots, index_t count, index_t channels, void* mean, void* var) {
  for (index_t s = 1; s < count; ++s) combine_moments(slots[0], slots[s], channels);
  for (index_t c = 0; c < channels; ++c) {
    static_cast<C*>(mean)[c] = static_cast<C>(slots[0].mean[c]);
    static_cast<C*>(var)[c] = static_cast<C>(slots[0].m2[c] / slots[0].count);
  }
}

// ---- forward ----

// The epilogue with the norm as its scale and shift: norm(a) = a * scale + shift.
template <class C>
EpilogueRef epilogue_with_norm(Arena& arena, EpilogueRef epilogue, const BatchNormRef& norm, index_t channels) {
  const C *weight = channel_vector<C>(arena, norm.weight, channels),
          *bias = channel_vector<C>(arena, norm.bias, channels);
  C* scale = static_cast<C*>(arena.allocate(channels * sizeof(C)));
  C* shift = static_cast<C*>(arena.allocate(channels * sizeof(C)));
  for (index_t c = 0; c < channels; ++c) {
    const double var = static_cast<const C*>(norm.var)[c], mean = static_cast<const C*>(norm.mean)[c];
    const double factor = (weight ? static_cast<double>(weight[c]) : 1.0) / __builtin_sqrt(var + norm.eps);
    scale[c] = static_cast<C>(factor);
    shift[c] = static_cast<C>((bias ? static_cast<double>(bias[c]) : 0.0) - mean * factor);
  }
  constexpr DType dtype = sizeof(C) == sizeof(double) ? DType::f64 : DType::f32;
  epilogue.scale = {scale, 1, dtype};
  epilogue.shift = {shift, 1, dtype};
  return epilogue;
}

// output[:, first:] = post(norm(activated) + residual)
template <class T>
void normalise(const DepthwiseGeometry& g, const BatchNormRef& norm, const EpilogueRef& ref, const TensorRef& output,
               index_t first, index_t channels) {
  using C = compute<T>;
  Arena shared(Arena::kCall);
  EpilogueRef behind = epilogue_with_norm<C>(shared, ref, norm, channels);
  behind.bias = {};
  behind.activation = Activation::none;
  const Epilogue<C> epilogue(shared, behind, channels);
  const index_t pixels = g.N * g.P * g.Q, vectors = ceil_div(channels, kLanes<C>);
  const index_t shares = shares_for(4.0 * pixels * vectors, g.N * g.P);
  run_tasks(shares, [&](index_t share) {
    Arena arena(Arena::kTask);
    const index_t begin = pixels * share / shares, end = pixels * (share + 1) / shares;
    const index_t step = tile_pixels(2 * channels * sizeof(C), g.Q);
    const TileOfMap<T> source(arena, norm.activated, g, 0, channels, step);
    const TileOfMap<T> residual(arena, epilogue.residual, g, 0, channels, step);
    const TileOfMap<T> destination(arena, output, g, first, channels, step);
    for (index_t t = begin; t < end; t += step) {
      const index_t stop = imin(end, t + step);
      const PixelRows<const C> a = source.read(t, stop), r = residual.read(t, stop);
      const PixelRows<C> y = destination.at(t);
      for (index_t i = 0; i < stop - t; ++i) {
        for_each_register<C>(channels, [&](index_t c, auto whole) __attribute__((always_inline)) {
          constexpr bool kFull = decltype(whole)::value;
          const index_t lanes = channels - c;
          const vec<C> added = r.data ? load_lanes<kFull>(r.data + i * r.ld + c, lanes) : vec<C>{};
          const vec<C> value = epilogue.apply(load_lanes<kFull>(a.data + i * a.ld + c, lanes), c, added);
          store_lanes<kFull>(y.data + i * y.ld + c, value, lanes);
        });
      }
      destination.wrote(t, stop);
    }
  });
}

// ---- backward ----

// The gradient at the norm's result, g = grad_output * post'(norm(a) + residual).
template <class C>
struct NormGradOutput {
  const Epilogue<C>& epilogue;  // scale and shift are the norm's
  PixelRows<const C> grad, activated, residual;

  template <bool Full>
  EFFOPS_INLINE vec<C> at(index_t pixel, index_t c, index_t lanes, vec<C>& a) const {
    vec<C> g = load_lanes<Full>(grad.data + pixel * grad.ld + c, lanes);
    a = load_lanes<Full>(activated.data + pixel * activated.ld + c, lanes);
    // A register of channels of some pixels, then the next: hardware does not see what comes behind these pixels.
    __builtin_prefetch(grad.data + (pixel + kShortChain) * grad.ld + c, 0, 2);
    __builtin_prefetch(activated.data + (pixel + kShortChain) * activated.ld + c, 0, 2);
    if (epilogue.post != Activation::none) [[unlikely]] {
      vec<C> y = a * load(epilogue.scale + c) + load(epilogue.shift + c);
      if (residual.data) y = y + load_lanes<Full>(residual.data + pixel * residual.ld + c, lanes);
      activate_grad<C>(epilogue.post, epilogue.slope, y);
      g = g * y;
    }
    return g;
  }
};

// d loss / d a = g * scale + (a - mean) * slope + offset; all padded to whole registers.
template <class C>
struct NormGradient {
  const C* mean = nullptr;
  C *slope = nullptr, *offset = nullptr;
};

// sum g and sum g (a - mean) over the batch. Writes the gradients of the norm's parameters, returns the formula.
template <class T>
NormGradient<compute<T>> norm_gradient(Arena& shared, const DepthwiseGeometry& g, const BatchNormRef& norm,
                                       const Epilogue<compute<T>>& epilogue, const TensorRef& grad_output,
                                       index_t first, index_t channels, const EpilogueGrads& grads) {
  using C = compute<T>;
  constexpr DType dtype = sizeof(C) == sizeof(double) ? DType::f64 : DType::f32;
  const index_t pixels = g.N * g.P * g.Q, padded = round_up(channels, kLanes<C>);
  NormGradient<C> result;
  const C* mean = result.mean = channel_vector<C>(shared, {norm.mean, 1, dtype}, channels);
  const index_t slots = slots_for(4.0 * pixels * padded / kLanes<C>, g.N * g.P);
  double* sums = partial_sums<double>(shared, slots, 2 * padded);

  run_tasks(slots, [&](index_t slot) {
    Arena arena(Arena::kTask);
    double *sum_g = sums + slot * 2 * padded, *sum_ga = sum_g + padded;
    const index_t begin = pixels * slot / slots, end = pixels * (slot + 1) / slots;
    const index_t step = round_up(tile_pixels(2 * channels * sizeof(C), g.Q), kShortChain);
    const TileOfMap<T> grad(arena, grad_output, g, first, channels, step);
    const TileOfMap<T> activated(arena, norm.activated, g, 0, channels, step);
    const TileOfMap<T> residual(arena, epilogue.residual, g, 0, channels, step);
    for (index_t t = begin; t < end; t += step) {
      const index_t stop = imin(end, t + step);
      const NormGradOutput<C> rows{epilogue, grad.read(t, stop), activated.read(t, stop), residual.read(t, stop)};
      for (index_t i = 0; i < stop - t; i += kShortChain) {
        const index_t last = imin(stop - t, i + kShortChain);
        for_each_register<C>(channels, [&](index_t c, auto whole) __attribute__((always_inline)) {
          const vec<C> centre = load(mean + c);
          vec<C> total{}, weighted{}, a;
          for (index_t j = i; j < last; ++j) {
            const vec<C> value = rows.template at<decltype(whole)::value>(j, c, channels - c, a);
            total = total + value;
            weighted = weighted + value * (a - centre);
          }
          add_to_doubles<C>(sum_g + c, total, kLanes<C>);
          add_to_doubles<C>(sum_ga + c, weighted, kLanes<C>);
        });
      }
    }
  });
  reduce_slots(sums, slots, 2 * padded);

  result.slope = static_cast<C*>(shared.allocate(padded * sizeof(C)));
  result.offset = static_cast<C*>(shared.allocate(padded * sizeof(C)));
  double *sum_g = sums, *sum_ga = sums + padded;
  const double share = 1.0 / static_cast<double>(pixels);
  for (index_t c = 0; c < padded; ++c) {
    const double scale = c < channels ? static_cast<double>(epilogue.scale[c]) : 0.0;
    const double var = c < channels ? static_cast<double>(static_cast<const C*>(norm.var)[c]) + norm.eps : 1.0;
    result.slope[c] = static_cast<C>(-scale * sum_ga[c] * share / var);
    result.offset[c] = static_cast<C>(-scale * sum_g[c] * share);
    sum_ga[c] /= __builtin_sqrt(var);
  }
  if (grads.scale) write_channel_vector(sum_ga, channels, grads.scale, grads.scale_dtype);
  if (grads.shift) write_channel_vector(sum_g, channels, grads.shift, grads.shift_dtype);
  return result;
}

// Turns the gradient at a block's output into d loss / d (conv sum): through post activation, norm and activation.
template <class C>
struct NormBackward {
  NormGradOutput<C> output;
  NormGradient<C> norm;
  const C* raw;  // conv sums without bias, where the activation's derivative cannot be read off its result; or null
  C* grad_residual;
  index_t ld;  // of raw, grad_residual and the result

  // A few pixels at a time, all their channels: the rows are read from memory in the order they lie.
  void run(index_t pixels, index_t channels, C* result, const EpilogueSums& sums) const {
    for (index_t first = 0; first < pixels; first += kShortChain) {
      const index_t last = imin(pixels, first + kShortChain);
      for_each_register<C>(channels, [&](index_t c, auto whole) __attribute__((always_inline)) {
        constexpr bool kFull = decltype(whole)::value;
        const Coefficients at{load(output.epilogue.scale + c), load(norm.mean + c), load(norm.slope + c),
                              load(norm.offset + c)};
        vec<C> sum_bias{};
        for (index_t i = first; i < last; ++i) {
          const vec<C> g = one_vector<kFull>(i, c, channels - c, at);
          sum_bias = sum_bias + g;
          store(result + i * ld + c, g);
        }
        if (sums.bias) add_to_doubles<C>(sums.bias + c, sum_bias, channels - c);
      });
    }
  }

 private:
  struct Coefficients {
    vec<C> scale, mean, slope, offset;
  };

  template <bool Full>
  EFFOPS_INLINE vec<C> one_vector(index_t pixel, index_t c, index_t lanes, const Coefficients& at) const {
    const Epilogue<C>& epilogue = output.epilogue;
    vec<C> a;
    vec<C> g = output.template at<Full>(pixel, c, lanes, a);
    if (grad_residual) store(grad_residual + pixel * ld + c, g);
    g = g * at.scale + ((a - at.mean) * at.slope + at.offset);
    if (raw != nullptr) {
      vec<C> u = load(raw + pixel * ld + c);
      if (epilogue.bias) u = u + load(epilogue.bias + c);
      activate_grad<C>(epilogue.activation, epilogue.slope, u);
      return g * u;
    }
    if (epilogue.activation == Activation::none) return g;
    return g * activate_grad_from_output<C>(epilogue.activation, epilogue.slope, a);
  }
};
