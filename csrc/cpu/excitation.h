// The two products of a squeeze-excite, image by image, forward and backward: what the rooms se and mbconv share.
// Included inside namespace effops::<isa>::{anonymous}; see kernels.inl.
//
//   means [C] --W1 [between, C]--> inner [between] --act--> hidden --W2 [C, between]--> outer [C] --gate--> gates [C]

// y = x * factor + offset, channel by channel; offset may be null. y may be x.
template <class C, class D>
void scale_pixels(const PixelRows<const C>& x, const C* factor, const C* offset, index_t pixels, index_t channels,
                  const PixelRows<D>& y) {
  for (index_t i = 0; i < pixels; ++i) {
    for_each_register<C>(channels, [&](index_t c, auto whole) __attribute__((always_inline)) {
      constexpr bool kFull = decltype(whole)::value;
      const index_t lanes = channels - c;
      vec<C> value = load_lanes<kFull>(x.data + i * x.ld + c, lanes) * load_lanes<kFull>(factor + c, lanes);
      if (offset) value = value + load_lanes<kFull>(offset + c, lanes);
      store_lanes<kFull>(y.data + i * y.ld + c, value, lanes);
    });
  }
}

template <class T>
class ExciteProducts {
  using C = compute<T>;
  static constexpr double kSlope = 0.01;  // of a leaky_relu, torch's default

 public:
  // One image's values; a backward needs those of the whole batch.
  struct Image {
    C *means, *inner, *hidden, *outer;
    double *grad_inner, *grad_outer;
  };

  ExciteProducts(Arena& arena, const ExcitationRef& ref, index_t channels)
      : ref_(ref),
        channels_(channels),
        between_(ref.between),
        reduce_(weight(arena, ref.reduce_weight)),
        expand_(weight(arena, ref.expand_weight)),
        reduce_bias_(channel_vector<C>(arena, ref.reduce_bias, between_)),
        expand_bias_(channel_vector<C>(arena, ref.expand_bias, channels)) {}

  Image* new_images(Arena& arena, index_t count) const {
    Image* images = static_cast<Image*>(arena.allocate(imax(1, count) * sizeof(Image)));
    const auto values = [&](index_t n) { return static_cast<C*>(arena.allocate(n * sizeof(C))); };
    const auto doubles = [&](index_t n) { return static_cast<double*>(arena.allocate(n * sizeof(double))); };
    for (index_t i = 0; i < count; ++i) {
      images[i] = {values(channels_), values(between_),  values(between_),
                   values(channels_), doubles(between_), doubles(channels_)};
    }
    return images;
  }

  // Sums over `count` pixels -> gates; both [channels].
  void gates(const double* sums, index_t count, const Image& image, C* gates) const {
    for (index_t c = 0; c < channels_; ++c) image.means[c] = static_cast<C>(sums[c] / static_cast<double>(count));
    multiply(reduce_, image.means, reduce_bias_, between_, channels_, image.inner);
    apply(ref_.activation, image.inner, between_, image.hidden);
    multiply(expand_, image.hidden, expand_bias_, channels_, between_, image.outer);
    apply(ref_.gate, image.outer, channels_, gates);
  }

  // grad_gates: d loss / d gates -> what each of the `count` pixels gets by way of the means.
  void backward(const double* grad_gates, index_t count, const Image& image, C* per_pixel) const {
    derivative(ref_.gate, image.outer, channels_, grad_gates, image.grad_outer);
    for (index_t r = 0; r < between_; ++r) image.grad_inner[r] = 0;
    for (index_t c = 0; c < channels_; ++c) {
      const C* row = expand_ + c * between_;
      for (index_t r = 0; r < between_; ++r) image.grad_inner[r] += image.grad_outer[c] * static_cast<double>(row[r]);
    }
    derivative(ref_.activation, image.inner, between_, image.grad_inner, image.grad_inner);
    for (index_t c = 0; c < channels_; ++c) {
      double sum = 0;
      for (index_t r = 0; r < between_; ++r)
        sum += image.grad_inner[r] * static_cast<double>(reduce_[r * channels_ + c]);
      per_pixel[c] = static_cast<C>(sum / static_cast<double>(count));
    }
  }

  // The gradients of the weights and biases, over all images in their order.
  void write_gradients(const Image* images, index_t count, const ExcitationGrads& grads, Arena& arena) const {
    if (grads.expand_weight) {
      outer_products<T>(images, count, &Image::grad_outer, channels_, &Image::hidden, between_, arena,
                        grads.expand_weight);
    }
    if (grads.reduce_weight) {
      outer_products<T>(images, count, &Image::grad_inner, between_, &Image::means, channels_, arena,
                        grads.reduce_weight);
    }
    write_sum(images, count, &Image::grad_outer, channels_, arena, grads.expand_bias, grads.expand_bias_dtype);
    write_sum(images, count, &Image::grad_inner, between_, arena, grads.reduce_bias, grads.reduce_bias_dtype);
  }

 private:
  // Both weights have between * channels elements, without gaps.
  const C* weight(Arena& arena, const void* data) const {
    if constexpr (std::is_same_v<T, C>) return static_cast<const C*>(data);
    C* copy = static_cast<C*>(arena.allocate(between_ * channels_ * sizeof(C)));
    for (index_t i = 0; i < between_ * channels_; ++i) copy[i] = to_compute(static_cast<const T*>(data)[i]);
    return copy;
  }

  static void multiply(const C* weight, const C* x, const C* bias, index_t rows, index_t columns, C* y) {
    for (index_t r = 0; r < rows; ++r) {
      const C* row = weight + r * columns;
      vec<C> total{};
      for_each_register<C>(columns, [&](index_t c, auto whole) __attribute__((always_inline)) {
        constexpr bool kFull = decltype(whole)::value;
        total = total + load_lanes<kFull>(row + c, columns - c) * load_lanes<kFull>(x + c, columns - c);
      });
      C sum = bias ? bias[r] : C(0);
      for (index_t i = 0; i < kLanes<C>; ++i) sum += total[i];
      y[r] = sum;
    }
  }

  static void apply(Activation activation, const C* x, index_t n, C* y) {
    for_each_register<C>(n, [&](index_t i, auto whole) {
      constexpr bool kFull = decltype(whole)::value;
      vec<C> value = load_lanes<kFull>(x + i, n - i);
      activate<C>(activation, static_cast<C>(kSlope), value);
      store_lanes<kFull>(y + i, value, n - i);
    });
  }

  // result = grad * activation'(x)
  static void derivative(Activation activation, const C* x, index_t n, const double* grad, double* result) {
    for_each_register<C>(n, [&](index_t i, auto whole) {
      vec<C> value = load_lanes<decltype(whole)::value>(x + i, n - i);
      activate_grad<C>(activation, static_cast<C>(kSlope), value);
      for (index_t j = 0; j < imin(kLanes<C>, n - i); ++j) result[i + j] = grad[i + j] * static_cast<double>(value[j]);
    });
  }

  // destination [rows, columns] = the sum over images of left (x) right
  template <class D>
  static void outer_products(const Image* images, index_t count, double* Image::* left, index_t rows, C* Image::* right,
                             index_t columns, Arena& arena, void* destination) {
    double* sums = static_cast<double*>(arena.allocate(columns * sizeof(double)));
    for (index_t r = 0; r < rows; ++r) {
      for (index_t c = 0; c < columns; ++c) sums[c] = 0;
      for (index_t i = 0; i < count; ++i) {
        const double factor = (images[i].*left)[r];
        const C* values = images[i].*right;
        for (index_t c = 0; c < columns; ++c) sums[c] += factor * static_cast<double>(values[c]);
      }
      for (index_t c = 0; c < columns; ++c) {
        static_cast<D*>(destination)[r * columns + c] = from_compute<D>(static_cast<C>(sums[c]));
      }
    }
  }

  static void write_sum(const Image* images, index_t count, double* Image::* values, index_t n, Arena& arena,
                        void* destination, DType dtype) {
    if (destination == nullptr) return;
    double* sums = static_cast<double*>(arena.allocate(n * sizeof(double)));
    for (index_t j = 0; j < n; ++j) {
      sums[j] = 0;
      for (index_t i = 0; i < count; ++i) sums[j] += (images[i].*values)[j];
    }
    write_channel_vector(sums, n, destination, dtype);
  }

  ExcitationRef ref_;
  index_t channels_, between_;
  const C *reduce_, *expand_, *reduce_bias_, *expand_bias_;
};
