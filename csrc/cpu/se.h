// Room se: y = x * gate(W2 act(W1 mean(x) + b1) + b2), one image after the other, and its gradient. Included inside
// namespace effops::<isa>::{anonymous}; see kernels.inl.
//
//   x [H W][C] --sums, in tiles--> means -> gates [C] (excitation.h)        one read, none where x's producer took them
//   x [H W][C] --------------------- * gates -----------------------> y     one read, from L2 where an image fits it
//
// A task owns an image; where there are fewer images than threads, a range of an image's pixels, with partial sums that
// are added in order. Floor: 8 + 4 bytes a value in float32, 8 where the second read comes from cache: 28x28x240 (752
// KB) 19 us and 56x56x72 (903 KB) 23 us at 40 GB/s. Backward: one read of x and grad_y for the two sums, mean(x) and
// sum(grad_y x), one of grad_y for grad_x = grad_y * gates + what comes by way of the means.

inline DepthwiseGeometry map_geometry(index_t N, index_t C, index_t H, index_t W) {
  DepthwiseGeometry g{};
  g.N = N, g.C = C, g.H = g.P = H, g.W = g.Q = W;
  g.multiplier = 1;
  return g;
}

template <class T>
class SqueezeExcite {
  using C = compute<T>;

 public:
  explicit SqueezeExcite(const SeForwardArgs& args)
      : args_(args),
        g_(map_geometry(args.N, args.C, args.H, args.W)),
        pixels_(args.H * args.W),
        padded_(round_up(args.C, kLanes<C>)),
        step_(tile_pixels(2 * padded_ * sizeof(C), args.W)),
        products_(shared_, args.excitation, args.C),
        parts_(parts()),
        sums_(partial_sums<double>(shared_, imax(1, args.N) * parts_, 2 * padded_)),
        images_(products_.new_images(shared_, args.N)),
        factors_(static_cast<C*>(shared_.allocate(imax(1, args.N) * 2 * padded_ * sizeof(C)))) {}

  void forward() {
    run(
        [&](index_t part, Arena& arena) {
          if (args_.sums == nullptr) add_sums(part, {}, arena);
        },
        [&](index_t n) { products_.gates(args_.sums ? given(n) : summed(n), pixels_, images_[n], gates(n)); },
        [&](index_t part, Arena& arena) { scale(part, args_.input, nullptr, args_.output, arena); });
  }

  void backward(const SeBackwardArgs& args) {
    run([&](index_t part, Arena& arena) { add_sums(part, args.grad_output, arena); },
        [&](index_t n) {
          const double* sums = summed(n);
          products_.gates(sums, pixels_, images_[n], gates(n));
          products_.backward(sums + padded_, pixels_, images_[n], gates(n) + padded_);
        },
        [&](index_t part, Arena& arena) {
          if (args.grad_input.data) {
            scale(part, args.grad_output, gates(part / parts_) + padded_, args.grad_input, arena);
          }
        });
    products_.write_gradients(images_, args_.N, args.grads, shared_);
  }

 private:
  // Ranges of pixels that an image is cut into.
  index_t parts() const {
    const double cost = 3.0 * args_.N * pixels_ * padded_ / kLanes<C>;
    const index_t slots = slots_for(cost, args_.N * args_.H);
    return args_.N >= slots ? 1 : imin(args_.H, ceil_div(slots, imax(1, args_.N)));
  }

  // The three steps of every image, on its own while it is in cache, or all threads on one image.
  template <class Sum, class Middle, class Scale>
  void run(const Sum& sum, const Middle& middle, const Scale& scale) {
    if (parts_ == 1) {
      run_tasks(args_.N, [&](index_t n) {
        Arena arena(Arena::kTask);
        sum(n, arena);
        middle(n);
        scale(n, arena);
      });
      return;
    }
    const auto with_arena = [&](const auto& body) {
      run_tasks(args_.N * parts_, [&](index_t part) {
        Arena arena(Arena::kTask);
        body(part, arena);
      });
    };
    with_arena(sum);
    for (index_t n = 0; n < args_.N; ++n) middle(n);
    with_arena(scale);
  }

  struct Range {
    index_t begin, end;  // flat pixels
  };
  Range range(index_t part) const {
    const index_t n = part / parts_, k = part % parts_;
    return {n * pixels_ + args_.H * k / parts_ * args_.W, n * pixels_ + args_.H * (k + 1) / parts_ * args_.W};
  }
  C* gates(index_t n) const { return factors_ + n * 2 * padded_; }

  void add_sums(index_t part, const TensorRef& grad_output, Arena& arena) const {
    const TileOfMap<T> input(arena, args_.input, g_, 0, args_.C, step_);
    const TileOfMap<T> grad(arena, grad_output, g_, 0, args_.C, step_);
    const Range r = range(part);
    double* sums = sums_ + part * 2 * padded_;
    for (index_t t = r.begin; t < r.end; t += step_) {
      const index_t stop = imin(r.end, t + step_);
      const PixelRows<const C> x = input.read(t, stop);
      add_pixels<C>(x, {}, stop - t, args_.C, sums);
      if (grad) add_pixels<C>(x, grad.read(t, stop), stop - t, args_.C, sums + padded_);
    }
  }

  // An image's sums, its parts added in order into the first.
  const double* summed(index_t n) const {
    double* sums = sums_ + n * parts_ * 2 * padded_;
    reduce_slots(sums, parts_, 2 * padded_);
    return sums;
  }

  // The sums that the producer of the input took.
  const double* given(index_t n) const {
    double* sums = sums_ + n * parts_ * 2 * padded_;
    for (index_t c = 0; c < args_.C; ++c) sums[c] = static_cast<const C*>(args_.sums)[n * args_.C + c];
    return sums;
  }

  void scale(index_t part, const TensorRef& from, const C* offset, const TensorRef& to, Arena& arena) const {
    const TileOfMap<T> source(arena, from, g_, 0, args_.C, step_), destination(arena, to, g_, 0, args_.C, step_);
    const Range r = range(part);
    for (index_t t = r.begin; t < r.end; t += step_) {
      const index_t stop = imin(r.end, t + step_);
      scale_pixels<C, C>(source.read(t, stop), gates(part / parts_), offset, stop - t, args_.C, destination.at(t));
      destination.wrote(t, stop);
    }
  }

  const SeForwardArgs& args_;
  const DepthwiseGeometry g_;
  Arena shared_{Arena::kCall};
  const index_t pixels_, padded_, step_;
  const ExciteProducts<T> products_;
  const index_t parts_;
  double* sums_;  // of an image's part: of x, then of grad_y x
  typename ExciteProducts<T>::Image* images_;
  C* factors_;  // of an image: gates, then what the means bring
};

template <class T>
void se_fwd(const SeForwardArgs& args) {
  if (args.N > 0) SqueezeExcite<T>(args).forward();
}

template <class T>
void se_bwd(const SeBackwardArgs& args) {
  SqueezeExcite<T>(args.forward).backward(args);
}
