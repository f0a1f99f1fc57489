// Room bsconv: pointwise [-> pointwise] -> epilogue -> depthwise -> epilogue in one pass. Included inside namespace
// effops::<isa>::{anonymous}; see kernels.inl.
//
//   input rows --gemm--> [mid tile --gemm-->] rings of z, one a panel --dw--> output rows (NHWC: straight from registers)
//   [rows][W][C]          [rows][W][M]        [capacity][W][32 channels]
//
// z = pw_chain(...) is K channels wide at the input's resolution and exists only as the rows that windows still want. A
// task owns a band of output rows of one image and a range of panels (two registers of output channels). It takes a few
// input rows at a time, so many that a panel's ring stays in L1; makes their z, panel by panel; and at once the output
// rows of that panel whose windows are complete. Where one step covers the band (14x14 and 7x7), all panels share one
// ring, and a task takes a few images at a time: 49 pixels are three and a half register tiles, 98 are seven.
//
// Bands recompute the rows of z that two windows share (R - 1 rows of pointwise work a band); ranges of panels read the
// input (and make the mid tile) once each. `plan` takes what is estimated to be faster.
//
// Bytes moved: the input once a range of panels, plus the halo rows of bands; each output once; W once a step (from L2).
// Of z nothing. Floors in fp32 at batch 1, two AVX-512 FMAs a cycle: 56x56, 128 -> 128 is 55 M multiply-adds, 3.4 M
// register FMAs, 1.7 M cycles, beside 1.6 MB read and 1.6 MB written (two kernels move 6.4 MB); 14x14, 512 -> 512 is 52 M,
// 1.6 M cycles, beside 0.4 MB each and W's 1 MB, which is packed first.

template <class T>
struct BsconvForward {
  using C = compute<T>;

  const BsconvForwardArgs& args;
  const DepthwiseGeometry& g;
  const DepthwiseGeometry map;  // the input's
  Arena shared{Arena::kCall};
  PointwiseProduct<T> mid, pw;
  const Epilogue<C> epilogue;
  const bool has_mid, direct;
  const bool stream;   // the output goes past the caches
  const index_t span;  // input rows of a window

  // How the work is cut: each image into `bands` of output rows, the panels into `ranges`; `images` at a time.
  struct Plan {
    index_t bands = 1, ranges = 1, images = 1;
  };

  explicit BsconvForward(const BsconvForwardArgs& a)
      : args(a),
        g(a.g),
        map(input_map(a.g)),
        mid(shared, a.mid),
        pw(shared, a.pw),
        epilogue(shared, a.epilogue, g.C),
        has_mid(a.mid.outputs > 0),
        direct(a.output.c == 1),
        stream(direct && streams<T>(a.output, g.C, g.N * g.P * g.Q * g.C)),
        span((g.R - 1) * g.dilation_h + 1) {}

  void run() {
    if (g.N * g.P * g.Q == 0) return;
    const index_t slots = slots_for(cost(Plan{}) * static_cast<double>(g.N), g.N * g.P * pw.panels.count);
    Plan plan = slots == 1 ? Plan{} : choose_plan(slots);
    plan.images = images_at_a_time(plan, slots);
    const index_t band_rows = rows_of_band(plan), step = rows_at_a_time(band_rows);
    mid.pack_all(shared);
    // Where each panel is used once, its user packs it just before: it is then read from L2 and never written back.
    const bool used_once = g.N * plan.bands == 1 && step == band_rows;
    if (!used_once) pw.pack_all(shared);
    const index_t groups = ceil_div(g.N, plan.images), units = groups * plan.bands,
                  tasks = slots == 1 ? 1 : units * plan.ranges;
    run_tasks(tasks, [&](index_t i) {
      const index_t range = slots == 1 ? 0 : i / units;
      const index_t first = pw.panels.count * range / plan.ranges, last = pw.panels.count * (range + 1) / plan.ranges;
      Arena arena(Arena::kTask);
      const Worker worker(*this, arena, first, last, plan.images, band_rows, step);
      for (index_t u = slots == 1 ? 0 : i % units; u < units; u += slots == 1 ? 1 : units) {
        const index_t group = u / plan.bands, band = u % plan.bands;
        const index_t begin = g.N * group / groups, end = g.N * (group + 1) / groups;
        if (plan.images > 1) {
          worker.run_whole(begin, end);
        } else {
          worker.run(begin, g.P * band / plan.bands, g.P * (band + 1) / plan.bands);
        }
      }
      if (stream) fence_stores();
    });
  }

  // Whole images whose rings L1 holds, and whose input L2, where an image is one step; four tasks a thread remain.
  index_t images_at_a_time(const Plan& plan, index_t slots) const {
    if (plan.bands > 1 || rows_of_band(plan) < g.H || rows_at_a_time(g.H) < g.H) return 1;
    const index_t fit = imin(kRingBytes / (g.H * ring_row()), 2 * kInputBytes / (g.H * input_row()));
    return imax(1, imin(fit, g.N * plan.ranges / (4 * slots)));
  }

  // The most input rows that the windows of a band see.
  index_t rows_of_band(const Plan& plan) const {
    return imin(g.H, (ceil_div(g.P, plan.bands) - 1) * g.stride_h + span);
  }

  // As many as keep a ring in L1 and the input rows in L2, at least enough for two register tiles; all of the band's,
  // where those are not many more.
  index_t rows_at_a_time(index_t band_rows) const {
    constexpr index_t kLeastPixels = 28;
    if (band_rows * ring_row() <= kRingBytes && band_rows * input_row() <= 2 * kInputBytes) return band_rows;
    const index_t wanted = imin(kRingBytes / ring_row() - (span - 1), kInputBytes / input_row());
    return imin(band_rows, imax(wanted, ceil_div(kLeastPixels, g.W)));
  }

  // Bytes of a row of a panel's ring, and of the input.
  static constexpr index_t kRingBytes = 32 * 1024, kInputBytes = 256 * 1024;
  index_t ring_row() const { return g.W * imin(2, pw.panels.vectors) * kLanes<C> * static_cast<index_t>(sizeof(C)); }
  index_t input_row() const { return g.W * map_channels() * static_cast<index_t>(sizeof(C)); }

  // Of one task, in register FMAs.
  double cost(const Plan& plan) const {
    const index_t rows_out = ceil_div(g.P, plan.bands), panels = ceil_div(pw.panels.count, plan.ranges);
    const double pixels = static_cast<double>(rows_of_band(plan)) * g.W;
    const double vectors = static_cast<double>(panels) * pw.panels.vectors / pw.panels.count;
    constexpr double kReadCost = 4;  // of a register of input
    return pixels * (kReadCost * ceil_div(map_channels(), kLanes<C>) + pw.inputs() * vectors) +
           (has_mid ? pixels * mid.cost_per_pixel() : 0) + rows_out * g.Q * vectors * (g.R * g.S + 4);
  }
  index_t map_channels() const { return has_mid ? mid.inputs() : pw.inputs(); }

  Plan choose_plan(index_t slots) const {
    const index_t share = ceil_div(slots, g.N);
    constexpr double kUneven = 0.04;  // what a share that the system holds up costs, where there is one a thread
    Plan best;
    double least = 0;
    for (const index_t bands : {index_t{1}, share, 2 * share, 4 * share}) {
      for (const index_t ranges : {index_t{1}, share, 2 * share, 4 * share}) {
        if (bands > g.P || ranges > pw.panels.count) continue;
        const Plan plan{bands, ranges};
        const index_t tasks = g.N * bands * ranges;
        const double time = static_cast<double>(ceil_div(tasks, slots)) * cost(plan) *
                            (1 + kUneven * static_cast<double>(slots) / tasks);
        if (least == 0 || time < least) best = plan, least = time;
      }
    }
    return best;
  }

  // Computes bands of images, the panels [first, last).
  struct Worker {
    const BsconvForward& op;
    const DepthwiseGeometry& g;
    const index_t first, last, step;
    const bool one_step;     // covers a band
    const index_t capacity;  // rows of a ring
    const index_t widest;    // lanes of a panel
    const index_t mid_ld, ring_size, tile_rows;
    TileOfMap<T> input;
    C *mid_tile = nullptr, *rings = nullptr, *packed = nullptr, *y = nullptr, *residual = nullptr;
    const C** dw_weights;

    Worker(const BsconvForward& o, Arena& arena, index_t f, index_t l, index_t images, index_t band_rows, index_t step_)
        : op(o),
          g(o.g),
          first(f),
          last(l),
          step(step_),
          one_step(step == band_rows),
          capacity(one_step ? step : round_up(o.span - 1 + step, step)),
          widest(imax(imin(2, o.pw.panels.vectors), o.pw.panels.width(l - 1)) * kLanes<C>),
          mid_ld(row_distance<C>(imax(1, o.mid.outputs()))),
          ring_size(capacity * g.W * widest),
          tile_rows(imax(1, tile_pixels(widest * sizeof(C), g.Q) / g.Q)),
          input(arena, o.args.input, o.map, 0, o.map_channels(), images * step * g.W, true) {
      const auto allocate = [&](bool wanted, index_t count) {
        return wanted ? static_cast<C*>(arena.allocate(count * sizeof(C))) : nullptr;
      };
      mid_tile = allocate(op.has_mid, images * step * g.W * mid_ld);
      rings = allocate(true, ring_size * (one_step ? images : last - first));
      packed = allocate(op.pw.packed == nullptr, op.pw.inputs() * widest);
      y = allocate(!op.direct, tile_rows * g.Q * widest);
      residual = allocate(op.epilogue.residual.data != nullptr, tile_rows * g.Q * widest);
      dw_weights = static_cast<const C**>(arena.allocate((last - first) * sizeof(C*)));
      for (index_t i = first; i < last; ++i) {
        const T* weight = static_cast<const T*>(op.args.dw_weight) + op.pw.panels.first_column(i) * g.R * g.S;
        dw_weights[i - first] = pack_depthwise_weights<T>(arena, panel_geometry(i), weight);
      }
    }

    // Output rows [p_begin, p_end) of image n.
    void run(index_t n, index_t p_begin, index_t p_end) const {
      const index_t h_begin = imin(g.H, imax(0, p_begin * g.stride_h - g.pad_top));
      const index_t h_end = imax(h_begin, imin(g.H, (p_end - 1) * g.stride_h - g.pad_top + op.span));
      index_t done = p_begin;
      for (index_t h = h_begin; done < p_end; h += step) {
        const index_t top = imin(h_end, h + step);
        const index_t ready = top == h_end ? p_end : imin(p_end, imax(p_begin, rows_above(top)));
        const PixelRows<const C> a = rows_of_input(n * g.H + h, n * g.H + top);
        for (index_t i = first; i < last; ++i) {
          const index_t ld = op.pw.panels.width(i) * kLanes<C>;
          C* data = rings + (one_step ? 0 : (i - first) * ring_size);
          RingOfRows<C> ring(data, capacity, g.W, ld, h_begin);
          if (top > h) op.pw.run(i, weights_of(i), (top - h) * g.W, a, ring.place(h), ld, true);
          if (ready > done) depthwise(i, ring, n, done, ready);
        }
        done = imax(done, ready);
      }
    }

    // The images [begin, end), whose input is one step.
    void run_whole(index_t begin, index_t end) const {
      const PixelRows<const C> a = rows_of_input(begin * g.H, end * g.H);
      for (index_t i = first; i < last; ++i) {
        const index_t ld = op.pw.panels.width(i) * kLanes<C>;
        op.pw.run(i, weights_of(i), (end - begin) * g.H * g.W, a, rings, ld, true);
        for (index_t n = begin; n < end; ++n) {
          depthwise(i, RingOfRows<C>(rings + (n - begin) * g.H * g.W * ld, g.H, g.W, ld), n, 0, g.P);
        }
      }
    }

   private:
    DepthwiseGeometry panel_geometry(index_t i) const {
      DepthwiseGeometry part = g;
      part.C = part.bank = imin(op.pw.panels.width(i) * kLanes<C>, g.C - op.pw.panels.first_column(i));
      return part;
    }

    // The number of output rows whose windows lie above input row `top`.
    index_t rows_above(index_t top) const {
      const index_t padded = top + g.pad_top - op.span;  // where the last one that fits would start
      return padded < 0 ? 0 : padded / g.stride_h + 1;
    }

    // What the second (or only) pointwise convolution reads: rows [h, top), numbered through the batch.
    PixelRows<const C> rows_of_input(index_t h, index_t top) const {
      const PixelRows<const C> x = input.read(h * g.W, top * g.W);
      if (!op.has_mid) return x;
      op.mid.run_all((top - h) * g.W, x, mid_tile, mid_ld, true);
      return {mid_tile, mid_ld};
    }

    const C* weights_of(index_t i) const {
      if (packed == nullptr) return op.pw.panel(i);
      op.pw.pack(i, packed);
      return packed;
    }

    // Output rows [p0, p1) of panel i of image n.
    void depthwise(index_t i, const RingOfRows<C>& rows, index_t n, index_t p0, index_t p1) const {
      const index_t column = op.pw.panels.first_column(i), ld = op.pw.panels.width(i) * kLanes<C>;
      const DepthwiseGeometry part = panel_geometry(i);
      const Epilogue<C> epilogue = from_channel(op.epilogue, column);
      for (index_t p = p0; p < p1; p += tile_rows) {
        const index_t end = imin(p1, p + tile_rows);
        const index_t begin = (n * g.P + p) * g.Q, stop = (n * g.P + end) * g.Q;
        if (residual) gather_pixels<T>(op.epilogue.residual, begin, stop, g.P, g.Q, column, part.C, residual, ld);
        if (op.direct) {
          const DepthwiseRow<C, T, true> kernel(part, dw_weights[i - first], epilogue, true, op.stream);
          const TensorRef& out = op.args.output;
          T* base = static_cast<T*>(out.data) + n * out.n + column;
          for (index_t q = p; q < end; ++q) {
            kernel.run(rows, n, q, 0, g.Q, base + q * out.h, out.w, residual_row(q - p, ld), ld);
          }
        } else {
          const DepthwiseRow<C, C, false> kernel(part, dw_weights[i - first], epilogue, true);
          for (index_t q = p; q < end; ++q) {
            kernel.run(rows, n, q, 0, g.Q, y + (q - p) * g.Q * ld, ld, residual_row(q - p, ld), ld);
          }
          scatter_pixels<T>(y, ld, op.args.output, begin, stop, g.P, g.Q, column, part.C);
        }
      }
    }
    const C* residual_row(index_t row, index_t ld) const { return residual ? residual + row * g.Q * ld : nullptr; }
  };
};

template <class T>
void bsconv_fwd(const BsconvForwardArgs& args) {
  BsconvForward<T>(args).run();
}
