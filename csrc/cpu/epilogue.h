// post(act(conv + bias) * scale + shift + residual) on vectors and on tiles, and its gradient.
// Included inside namespace effops::<isa>::{anonymous}; see kernels.inl.

template <class C>
struct Epilogue {
  const C *bias = nullptr, *scale = nullptr, *shift = nullptr;  // padded to whole registers
  TensorRef residual;
  Activation activation, post;
  C slope;
  C low, high;            // the activation as a clamp, where it is one
  C post_low, post_high;  // the same of the post-activation

  Epilogue(Arena& arena, const EpilogueRef& ref, index_t channels)
      : bias(channel_vector<C>(arena, ref.bias, channels)),
        scale(channel_vector<C>(arena, ref.scale, channels)),
        shift(channel_vector<C>(arena, ref.shift, channels)),
        residual(ref.residual),
        activation(ref.activation),
        post(ref.post),
        slope(static_cast<C>(ref.slope)) {
    set_limits();
    if ((scale == nullptr) != (shift == nullptr)) complete_affine(arena, channels);
  }

  static bool is_clamp(Activation a) {
    return a == Activation::none || a == Activation::relu || a == Activation::relu6;
  }
  bool clamps() const { return is_clamp(activation); }
  bool affine() const { return scale != nullptr; }
  // What registers can do on the way out, without a second pass: clamp, then an affine map and its clamp, if any.
  bool simple() const {
    return clamps() && residual.data == nullptr && (post == Activation::none || (affine() && is_clamp(post)));
  }
  bool trivial() const {
    return activation == Activation::none && post == Activation::none && residual.data == nullptr && !affine();
  }

  // An affine right behind the sum can go into the kernels and the bias.
  bool foldable() const { return affine() && activation == Activation::none && residual.data == nullptr; }
  void fold(const C* folded_bias) {
    bias = folded_bias;
    scale = shift = nullptr;
    activation = post;
    post = Activation::none;
    set_limits();
  }

  // For the channels from c on; v already holds conv + bias, r the residual.
  EFFOPS_INLINE vec<C> apply(vec<C> v, index_t c, vec<C> r) const {
    if (clamps()) {
      v = at_most<C>(at_least<C>(v, splat(low)), splat(high));
    } else {
      activate<C>(activation, slope, v);
    }
    if (affine()) v = v * load(scale + c) + load(shift + c);
    v = v + r;
    if (post != Activation::none) activate<C>(post, slope, v);
    return v;
  }

 private:
  static C lowest(Activation a) {
    return is_clamp(a) && a != Activation::none ? C(0) : -static_cast<C>(__builtin_inff());
  }
  static C highest(Activation a) { return a == Activation::relu6 ? C(6) : static_cast<C>(__builtin_inff()); }
  void set_limits() {
    low = lowest(activation), high = highest(activation);
    post_low = lowest(post), post_high = highest(post);
  }

  // Kernels know both or neither of scale and shift.
  void complete_affine(Arena& arena, index_t channels) {
    const index_t padded = round_up(channels, kLanes<C>);
    C* fill = static_cast<C*>(arena.allocate(padded * sizeof(C)));
    for (index_t i = 0; i < padded; ++i) fill[i] = scale == nullptr ? C(1) : C(0);
    (scale == nullptr ? scale : shift) = fill;
  }
};

// The same as an affine map and one activation, activation(conv * scale + shift + residual), where it is one: what a batch
// norm ahead of an activation comes to.
template <class C>
struct FoldedEpilogue {
  const C *scale = nullptr, *shift = nullptr;  // padded with zeros to whole registers; null: it does not fold
  Activation activation = Activation::none;
  double slope;
  C low = 0, high = 0;  // the activation as a clamp, where it is one

  FoldedEpilogue(Arena& arena, const EpilogueRef& ref, index_t channels)
      : activation(ref.activation == Activation::none ? ref.post : ref.activation), slope(ref.slope) {
    const bool affine_last = ref.scale.data || ref.shift.data || ref.residual.data || ref.post != Activation::none;
    if (ref.activation != Activation::none && affine_last) return;
    const C* bias = channel_vector<C>(arena, ref.bias, channels);
    const C* given_scale = channel_vector<C>(arena, ref.scale, channels);
    const C* given_shift = channel_vector<C>(arena, ref.shift, channels);
    const index_t padded = round_up(channels, kLanes<C>);
    C* factor = static_cast<C*>(arena.allocate(padded * sizeof(C)));
    C* offset = static_cast<C*>(arena.allocate(padded * sizeof(C)));
    for (index_t c = 0; c < padded; ++c) {
      factor[c] = c >= channels ? C(0) : given_scale ? given_scale[c] : C(1);
      offset[c] = (bias ? bias[c] * factor[c] : C(0)) + (given_shift ? given_shift[c] : C(0));
    }
    scale = factor, shift = offset;
    constexpr C kInfinity = static_cast<C>(__builtin_inff());
    low = activation == Activation::none ? -kInfinity : C(0);
    high = activation == Activation::relu6 ? C(6) : kInfinity;
  }

  bool folds() const { return scale != nullptr; }
  // Registers can do all of it on the way out.
  bool clamps() const {
    return folds() &&
           (activation == Activation::none || activation == Activation::relu || activation == Activation::relu6);
  }
  // Without the scale, which its user has put into the weights.
  EpilogueRef without_scale() const {
    EpilogueRef result;
    constexpr DType dtype = sizeof(C) == sizeof(double) ? DType::f64 : DType::f32;
    result.bias = {shift, 1, dtype};
    result.activation = activation;
    result.slope = slope;
    return result;
  }
};

// The same epilogue, seen from channel `column` on (residual rows are the caller's to find).
template <class C>
Epilogue<C> from_channel(Epilogue<C> epilogue, index_t column) {
  if (epilogue.bias) epilogue.bias += column;
  if (epilogue.affine()) {
    epilogue.scale += column;
    epilogue.shift += column;
  }
  return epilogue;
}

// Applies the epilogue in place to a tile of raw sums (bias not yet added). residual: tile of the same kind, or null.
template <class C>
void apply_epilogue_rows(const Epilogue<C>& epilogue, index_t pixels, index_t channels, C* tile, index_t ld,
                         const C* residual, index_t residual_ld) {
  constexpr index_t L = kLanes<C>;
  for (index_t i = 0; i < pixels; ++i) {
    C* row = tile + i * ld;
    const C* r = residual ? residual + i * residual_ld : nullptr;
    for (index_t c = 0; c < channels; c += L) {
      vec<C> v = load(row + c);
      if (epilogue.bias) v = v + load(epilogue.bias + c);
      store(row + c, epilogue.apply(v, c, r ? load(r + c) : vec<C>{}));
    }
  }
}

// Sums over pixels are kept in double and fed from registers every kShortChain pixels: a float chain of a few hundred
// terms already loses more than torch's pairwise sums do.
constexpr index_t kShortChain = 16;

// sums[i] += value[i] for the first `lanes` lanes.
template <class C>
EFFOPS_INLINE void add_to_doubles(double* sums, vec<C> value, index_t lanes) {
  if (lanes >= kLanes<C>) {
    const DoubleLanes<C> wide = to_doubles(value);
#pragma GCC unroll 2
    for (int i = 0; i < DoubleLanes<C>::kParts; ++i) {
      double* at = sums + i * kLanes<double>;
      store(at, load(at) + wide.part[i]);
    }
  } else {
    for (index_t i = 0; i < lanes; ++i) sums[i] += value[i];
  }
}

// sums[c] += the pixels of `rows`, with a factor each or without.
template <class C>
void add_pixels(const PixelRows<const C>& rows, const PixelRows<const C>& factors, index_t pixels, index_t channels,
                double* sums) {
  for (index_t first = 0; first < pixels; first += kShortChain) {
    const index_t last = imin(pixels, first + kShortChain);
    for_each_register<C>(channels, [&](index_t c, auto whole) __attribute__((always_inline)) {
      constexpr bool kFull = decltype(whole)::value;
      vec<C> total{};
      for (index_t i = first; i < last; ++i) {
        vec<C> value = load_lanes<kFull>(rows.data + i * rows.ld + c, channels - c);
        if (factors.data) value = value * load_lanes<kFull>(factors.data + i * factors.ld + c, channels - c);
        total = total + value;
      }
      add_to_doubles<C>(sums + c, total, channels - c);
    });
  }
}

// The per-channel sums that the gradient of an epilogue needs, one set per slot of tasks. Null where not asked for.
struct EpilogueSums {
  double *bias = nullptr, *scale = nullptr, *shift = nullptr;
};

inline EpilogueSums epilogue_sums(Arena& arena, const EpilogueGrads& wanted, index_t channels, index_t slots) {
  const auto make = [&](void* want) -> double* {
    if (want == nullptr) return nullptr;
    double* sums = static_cast<double*>(arena.allocate(slots * channels * sizeof(double)));
    for (index_t i = 0; i < slots * channels; ++i) sums[i] = 0;
    return sums;
  };
  return {make(wanted.bias), make(wanted.scale), make(wanted.shift)};
}

inline EpilogueSums slot_of(const EpilogueSums& sums, index_t slot, index_t channels) {
  const auto at = [&](double* base) { return base ? base + slot * channels : nullptr; };
  return {at(sums.bias), at(sums.scale), at(sums.shift)};
}

// Adds the slots in their order (the same bits every call) and writes the result.
inline void reduce_sums(double* sums, index_t slots, index_t channels, void* destination, DType dtype) {
  if (sums == nullptr) return;
  for (index_t s = 1; s < slots; ++s) {
    for (index_t c = 0; c < channels; ++c) sums[c] += sums[s * channels + c];
  }
  write_channel_vector(sums, channels, destination, dtype);
}

inline void reduce_epilogue_sums(const EpilogueSums& sums, index_t slots, index_t channels,
                                 const EpilogueGrads& grads) {
  reduce_sums(sums.bias, slots, channels, grads.bias, grads.bias_dtype);
  reduce_sums(sums.scale, slots, channels, grads.scale, grads.scale_dtype);
  reduce_sums(sums.shift, slots, channels, grads.shift, grads.shift_dtype);
}

// Turns `incoming` (d loss / d epilogue output) into `grad`, d loss / d (conv sum); they may be the same.
//   incoming  rows that may lie in the tensor itself, as may those of `saved` and `residual`
//   raw       conv sums without bias, or null where the activation is none and no scale gradient is wanted
//   saved     the epilogue's output, used instead of raw where given (the caller checked that it tells the derivative)
//   residual  needed only under a post activation;  grad_residual  tile that receives d loss / d residual, or null
// A few pixels at a time, all their channels: rows that lie in a tensor are read in the order they lie.
template <class C>
struct EpilogueBackward {
  const Epilogue<C>& epilogue;
  PixelRows<const C> incoming, saved;
  const C* raw;
  PixelRows<const C> residual;
  C* grad_residual;
  index_t ld;  // of the other tiles

  void run(index_t pixels, index_t channels, C* grad, const EpilogueSums& sums) const {
    if (epilogue.trivial() && incoming.data == grad && grad_residual == nullptr && sums.bias == nullptr &&
        sums.scale == nullptr && sums.shift == nullptr)
      return;
    for (index_t first = 0; first < pixels; first += kShortChain) {
      const index_t last = imin(pixels, first + kShortChain);
      for_each_register<C>(channels, [&](index_t c, auto whole) __attribute__((always_inline)) {
        vec<C> sum_bias{}, sum_scale{}, sum_shift{};
        for (index_t i = first; i < last; ++i) {
          one_vector<decltype(whole)::value>(i, c, channels - c, grad, sum_bias, sum_scale, sum_shift);
        }
        if (sums.bias) add_to_doubles<C>(sums.bias + c, sum_bias, channels - c);
        if (sums.scale) add_to_doubles<C>(sums.scale + c, sum_scale, channels - c);
        if (sums.shift) add_to_doubles<C>(sums.shift + c, sum_shift, channels - c);
      });
    }
  }

 private:
  template <bool Full>
  EFFOPS_INLINE void one_vector(index_t pixel, index_t c, index_t lanes, C* grad, vec<C>& sum_bias, vec<C>& sum_scale,
                                vec<C>& sum_shift) const {
    const index_t at = pixel * ld + c;
    vec<C> g = load_lanes<Full>(incoming.data + pixel * incoming.ld + c, lanes);
    if (saved.data != nullptr) {
      const vec<C> y = load_lanes<Full>(saved.data + pixel * saved.ld + c, lanes);
      g = g * activate_grad_from_output<C>(epilogue.activation, epilogue.slope, y);
    } else if (raw != nullptr) {
      vec<C> u = load(raw + at);
      if (epilogue.bias) u = u + load(epilogue.bias + c);
      vec<C> a = u;
      activate<C>(epilogue.activation, epilogue.slope, a);
      if (epilogue.post != Activation::none) {
        vec<C> y = a;
        if (epilogue.affine()) y = y * load(epilogue.scale + c) + load(epilogue.shift + c);
        if (residual.data) y = y + load_lanes<Full>(residual.data + pixel * residual.ld + c, lanes);
        activate_grad<C>(epilogue.post, epilogue.slope, y);
        g = g * y;
      }
      if (grad_residual) store(grad_residual + at, g);
      sum_shift = sum_shift + g;
      sum_scale = sum_scale + g * a;
      if (epilogue.affine()) g = g * load(epilogue.scale + c);
      activate_grad<C>(epilogue.activation, epilogue.slope, u);
      g = g * u;
    } else {  // no activation anywhere, at most an affine whose scale needs no gradient
      if (grad_residual) store(grad_residual + at, g);
      sum_shift = sum_shift + g;
      if (epilogue.affine()) g = g * load(epilogue.scale + c);
    }
    sum_bias = sum_bias + g;
    store(grad + at, g);
  }
};
