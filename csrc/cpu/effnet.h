// Room effnet: EffNet's block, 1x1 -> epilogue -> room sepconv's chain -> 1x1, or 2x1 of stride (2, 1) -> epilogue, in one
// call. Included inside namespace effops::<isa>::{anonymous}; see kernels.inl.
//
//   x pixels --gemm, We--> e [image][H][W][lde] --1x3, pool, 3x1 [, pool]--> z [plane][image][P][Q][ldz] --gemm, Wp--> y
//   (112 at a time)        (L2)                  a row at a time             (L2)                       (112 at a time)
//
// The 2x1 convolution is a product over two rows: even rows of z lie in one plane, odd ones in the other, and a row of A
// is a pixel of the first and then the same pixel of the second.
//   images  A task takes some images through all three steps; as many at a time as leave e and z in its L2, so that the
//           products have enough rows: a last stage of 4x4 pixels would be two register tiles of unlike heights.
//   shares  Fewer images than threads: threads share each step of one image.
// Bytes moved: x once, y once, the residual once; e and z pass through L2, which the products hide. Floors of CIFAR-10's
// blocks at 250 GFLOP/s on one thread: version 1, 64 -> 128 channels on 16x16, 4.2 MMAC: 34 us an image; the separable
// part adds 3 to 4 us to it.

template <class T>
struct EffnetForward {
  using C = compute<T>;
  static constexpr index_t kPixels = 112;  // of a product at a time: whole register tiles, rows of A that L1 holds

  const EffnetForwardArgs& args;
  const DepthwiseGeometry& first;  // of the row convolution, on the expanded map
  const DepthwiseGeometry map;     // of the output
  Arena shared{Arena::kCall};
  const PointwiseRef expand_ref;
  PointwiseProduct<T> expand;
  OutputProduct<T> project;
  const index_t made, lde, ldz, in_pixels, out_pixels;
  const SepconvForwardArgs separable_args;  // with all but the maps
  const SepconvForward<C, T> separable;

  explicit EffnetForward(const EffnetForwardArgs& a)
      : args(a),
        first(a.separable.row),
        map(output_map(a)),
        expand_ref{a.expand.data, a.expand.stride_out, a.expand.stride_in, a.in_channels, first.C, a.expand_epilogue},
        expand(shared, expand_ref),
        project(shared, a.project, a.epilogue, a.output, map, a.separable.col.C * a.project.pieces, a.K),
        made(a.separable.col.C),
        lde(row_distance<C>(first.C)),
        ldz(row_distance<C>(made)),
        in_pixels(first.H * first.W),
        out_pixels(map.P * map.Q),
        separable_args(separable_of(a)),
        separable(shared, separable_args) {}

  static DepthwiseGeometry output_map(const EffnetForwardArgs& a) {
    DepthwiseGeometry g = a.separable.col;
    g.P = a.P;
    return g;
  }

  static SepconvForwardArgs separable_of(const EffnetForwardArgs& a) {
    SepconvForwardArgs s = a.separable;
    s.planes = a.project.pieces;
    return s;
  }

  // ---- the maps between the steps, of a few images ----

  struct Maps {
    C *e, *z;
    index_t plane;  // distance of z's planes
  };
  Maps new_maps(Arena& arena, index_t images) const {
    const index_t plane = images * out_pixels * ldz;
    return {static_cast<C*>(arena.allocate(images * in_pixels * lde * sizeof(C))),
            static_cast<C*>(arena.allocate(args.project.pieces * plane * sizeof(C))), plane};
  }

  // Pixels [begin, end) of the expanded maps of the images from n on.
  void expand_pixels(const Maps& m, index_t n, index_t begin, index_t end, Arena& arena) const {
    const DepthwiseGeometry pixels = input_map(first);
    const TileOfMap<T> x(arena, args.input, pixels, 0, args.in_channels, kPixels);
    for (index_t i = begin; i < end; i += kPixels) {
      const index_t stop = imin(end, i + kPixels);
      expand.run_all(stop - i, x.read(n * in_pixels + i, n * in_pixels + stop), m.e + i * lde, lde, true);
    }
  }

  SepconvForwardArgs on_maps(const Maps& m, index_t images) const {
    SepconvForwardArgs s = separable_args;
    s.row.N = s.col.N = images;
    s.plane = m.plane;
    s.input = {m.e, in_pixels * lde, 1, first.W * lde, lde};
    s.output = {m.z, out_pixels * ldz, 1, map.Q * ldz, ldz};
    return s;
  }
  index_t rows_of_z() const { return separable_args.col.P / separable_args.pool_h; }
  void separate(const SepconvForwardArgs& maps, index_t begin, index_t end, Arena& arena) const {
    typename SepconvForward<C, T>::Task(separable, maps, arena).run(begin, end);
  }

  // Output pixels [begin, end) of the images from n on, to the channels of the panels [from, to).
  void project_pixels(const Maps& m, index_t n, index_t begin, index_t end, index_t from, index_t to,
                      Arena& arena) const {
    C *y = nullptr, *residual = nullptr;
    if (!project.direct) {
      y = static_cast<C*>(arena.allocate(kPixels * project.ld() * sizeof(C)));
      if (args.epilogue.residual.data) {
        residual = static_cast<C*>(arena.allocate(kPixels * project.ld() * sizeof(C)));
      }
    }
    for (index_t i = begin; i < end; i += kPixels) {
      const C* z = m.z + i * ldz;
      const RowsOfA<C> a =
          args.project.pieces == 1 ? RowsOfA<C>(z, ldz, 1, made) : RowsOfA<C>(z, ldz, made, z + m.plane, ldz, made);
      const index_t at = n * out_pixels;
      project.run({at + i, at + imin(end, i + kPixels), a, y, residual}, from, to);
    }
  }

  // ---- the ways to go about it ----

  double cost() const {
    const double products =
        expand.cost_per_pixel() * in_pixels + static_cast<double>(project.k) * project.panels.vectors * out_pixels;
    return first.N * products + sepconv_cost(separable_args, round_up(made, kLanes<C>), kLanes<C>);
  }

  void run() {
    if (first.N * out_pixels == 0) return;
    expand.pack_all(shared);
    project.pack_all(shared);
    const index_t slots = slots_for(cost(), imax(first.N, rows_of_z()));
    if (first.N >= slots) {
      run_by_images(slots);
    } else {
      const Maps m = new_maps(shared, 1);
      for (index_t n = 0; n < first.N; ++n) run_by_shares(m, n, slots);
    }
  }

  // Images whose maps a core's L2 holds beside the weights.
  index_t together(index_t most) const {
    constexpr index_t kBytes = 512 * 1024;
    const index_t image = (in_pixels * lde + args.project.pieces * out_pixels * ldz) * static_cast<index_t>(sizeof(C));
    return imax(1, imin(most, kBytes / image));
  }

  void run_by_images(index_t slots) const {
    run_tasks(slots, [&](index_t s) {
      const index_t begin = first.N * s / slots, end = first.N * (s + 1) / slots, step = together(end - begin);
      for (index_t n = begin; n < end; n += step) {
        Arena arena(Arena::kTask);
        const index_t images = imin(step, end - n);
        const Maps m = new_maps(arena, images);
        expand_pixels(m, n, 0, images * in_pixels, arena);
        const SepconvForwardArgs own = on_maps(m, images);
        separate(own, 0, images * rows_of_z(), arena);
        project_pixels(m, n, 0, images * out_pixels, 0, project.panels.count, arena);
      }
    });
  }

  void run_by_shares(const Maps& m, index_t n, index_t slots) const {
    const auto shared_by = [&](index_t units, index_t grain, const auto& body) {
      const index_t shares = imin(4 * slots, ceil_div(units, grain));
      const auto at = [&](index_t s) { return imin(units, round_up(units * s / shares, grain)); };
      run_tasks(shares, [&](index_t s) {
        Arena arena(Arena::kTask);
        if (at(s) < at(s + 1)) body(at(s), at(s + 1), arena);
      });
    };
    constexpr index_t kTile = 14;  // rows of the products' register tiles
    shared_by(in_pixels, kTile, [&](index_t b, index_t e, Arena& arena) { expand_pixels(m, n, b, e, arena); });
    const SepconvForwardArgs maps = on_maps(m, 1);
    shared_by(rows_of_z(), 2, [&](index_t b, index_t e, Arena& arena) { separate(maps, b, e, arena); });
    // Fewer pixels than channels in the last stages: threads share the panels.
    shared_by(project.panels.count, 1,
              [&](index_t b, index_t e, Arena& arena) { project_pixels(m, n, 0, out_pixels, b, e, arena); });
  }
};

template <class T>
void effnet_fwd(const EffnetForwardArgs& args) {
  EffnetForward<T>(args).run();
}
