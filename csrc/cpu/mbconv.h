// Room mbconv: 1x1 -> epilogue -> depthwise -> epilogue [-> squeeze-excite] -> 1x1 -> epilogue + residual in one pass.
// Included inside namespace effops::<isa>::{anonymous}; see kernels.inl.
//
//   x rows [W][C] --gemm, a panel of We--> ring of expanded rows [W][32 of D] --dw--> z [pixels][D] --gemm, Wp--> y
//                    for every panel of D: 32 expanded channels at a time, which L1 holds
//
// Nothing of the width D but z ever exists, and z for a group of output rows only. Two ways to go about it:
//   bands   A task owns a band of output rows of one image and walks it in groups of as many rows as keep a panel's
//           ring in L1. A ring a panel stays from group to group, so that an input row is expanded once (and once more
//           where two bands meet). Where the whole map is one group (14x14, 7x7), one ring serves all panels.
//   panels  Fewer images than threads, small maps: threads share the panels of D, each packing its own of We, and then
//           the pixels and panels of y. No row is expanded twice, no weight of the expansion is read by two threads.
// With a squeeze-excite the group is the whole image: z is stored once, its means are taken as it is made (row by row,
// in cache), and it is multiplied by the gates before the projection reads it. Per register of z that is a write and
// two more reads, some 2 cycles from L2 and 5 from L3. The alternative, computing z a second time, takes (C + R S) / 2
// cycles or more, 12 for the smallest expansion (C = 16), and without one 4.5 beside the reads of x, which are as many
// as those of z. So z is always stored.
//
// Bytes moved: x once (a panel's further reads of it hit L2), y once, the residual once, We and Wp once a group or
// image from L2. Floors at 560 GFLOP/s on two threads: 56x56, 24 -> 144 -> 24, 25.7 MMAC: 0.105 ms with the projection's 24
// columns as 32; 14x14, 96 -> 576 -> 96, 22.7 MMAC: 0.081 ms.

template <class T>
struct MbconvForward {
  using C = compute<T>;
  static constexpr index_t kLine = kLanes<C>;

  const MbconvForwardArgs& args;
  const DepthwiseGeometry& g;  // on the expanded channels
  Arena shared{Arena::kCall};
  const index_t hidden, ldz, span;
  const Panels hidden_panels;
  const bool expands, excites;
  const FoldedEpilogue<C> expand_folded, dw_folded;
  const Epilogue<C> expand_epilogue, dw_epilogue;
  OutputProduct<T> project;
  const index_t ring_rows;   // output rows that a panel's ring serves at a time
  const index_t group_rows;  // output rows whose z exists at a time
  const ExciteProducts<T> products;
  C* packed_expand = nullptr;

  explicit MbconvForward(const MbconvForwardArgs& a)
      : args(a),
        g(a.g),
        hidden(g.C),
        ldz(row_distance<C>(hidden)),
        span((g.R - 1) * g.dilation_h + 1),
        hidden_panels(hidden, kLine),
        expands(a.expand.data != nullptr),
        excites(a.excitation.reduce_weight != nullptr),
        expand_folded(shared, a.expand_epilogue, expands ? hidden : 0),
        dw_folded(shared, a.dw_epilogue, hidden),
        expand_epilogue(shared, a.expand_epilogue, expands ? hidden : 0),
        dw_epilogue(shared, dw_folded.folds() ? dw_folded.without_scale() : a.dw_epilogue, hidden),
        project(shared, a.project, a.epilogue, a.output, g, hidden, a.K),
        ring_rows(rows_in_l1()),
        group_rows(excites || ring_rows >= g.P ? g.P : ring_rows),
        products(shared, a.excitation, excites ? hidden : 0) {}

  // ---- sizes ----

  index_t rows_in_l1() const {
    constexpr index_t kRingBytes = 32 * 1024;
    const index_t row = g.W * 2 * kLine * static_cast<index_t>(sizeof(C));
    const index_t rows = kRingBytes / row;  // of the input
    return imin(g.P, rows <= span ? 1 : (rows - span) / g.stride_h + 1);
  }
  index_t ring_capacity() const { return imin(g.H, (ring_rows - 1) * g.stride_h + span); }
  index_t ring_size() const { return ring_capacity() * g.W * kMaxV * kLine; }

  double cost() const {
    const double expansion = expands ? static_cast<double>(g.H) * g.W * args.in_channels * hidden_panels.vectors : 0;
    const double outputs = static_cast<double>(g.P) * g.Q;
    return static_cast<double>(g.N) *
           (expansion + outputs * hidden_panels.vectors * (g.R * g.S + 4) + outputs * hidden * project.panels.vectors);
  }

  // ---- weights ----

  void pack_expand(index_t panel, C* to) const {
    pack_panel(static_cast<const T*>(args.expand.data), args.expand.stride_in, args.expand.stride_out, args.in_channels,
               hidden, hidden_panels, panel, to);
  }
  C* expand_panel(index_t panel) const { return packed_expand + args.in_channels * hidden_panels.first_column(panel); }

  void pack(bool expansion) {
    constexpr double kPackCost = 6;  // of a register, in FMAs
    const index_t expand_panels = expands && expansion ? hidden_panels.count : 0;
    if (expand_panels > 0) {
      packed_expand = static_cast<C*>(shared.allocate(args.in_channels * hidden_panels.vectors * kLine * sizeof(C)));
    }
    project.packed = static_cast<C*>(shared.allocate(project.packed_size() * sizeof(C)));
    const double registers = static_cast<double>(hidden) * project.panels.vectors +
                             static_cast<double>(expand_panels) * args.in_channels * 2;
    const index_t panels = expand_panels + project.panels.count, shares = shares_for(kPackCost * registers, panels);
    run_tasks(shares, [&](index_t s) {
      for (index_t i = panels * s / shares; i < panels * (s + 1) / shares; ++i) {
        if (i < expand_panels) {
          pack_expand(i, expand_panel(i));
        } else {
          project.pack(i - expand_panels);
        }
      }
    });
  }

  // ---- input ----

  // Input rows [first, ...) of one image with their channels side by side, in the compute type.
  struct InputRows {
    const C* data = nullptr;
    index_t ld = 0, row = 0, first = 0;
    const C* at(index_t h) const { return data + (h - first) * row; }
  };

  bool input_in_place() const { return std::is_same_v<T, C> && args.input.c == 1; }

  // Rows [begin, end) of image n; `tile` receives them where they cannot be read in place.
  InputRows input_rows(index_t n, index_t begin, index_t end, C* tile, index_t ld) const {
    const TensorRef& x = args.input;
    const T* source = static_cast<const T*>(x.data) + n * x.n + begin * x.h;
    if constexpr (std::is_same_v<T, C>) {
      if (x.c == 1) return {source, x.w, x.h, begin};
    }
    for (index_t h = begin; h < end; ++h) {
      gather_segment(source + (h - begin) * x.h, x.w, x.c, g.W, args.in_channels, 1, tile + (h - begin) * g.W * ld, ld);
    }
    return {tile, ld, g.W * ld, begin};
  }
  index_t ld_input() const { return row_distance<C>(args.in_channels); }

  // Input rows that the output rows [p_begin, p_end) see.
  index_t first_row(index_t p_begin) const { return imin(g.H, imax(0, p_begin * g.stride_h - g.pad_top)); }
  index_t end_row(index_t p_end) const { return imin(g.H, imax(0, (p_end - 1) * g.stride_h - g.pad_top + span)); }

  // ---- one panel of expanded channels ----

  // Its expanded rows: the last `capacity` of one image, row h in slot h % capacity.
  struct Ring {
    C* data;
    index_t capacity, width, ld;
    index_t end = 0;  // rows from end - capacity on are there

    const C* row(index_t, index_t h) const { return data + h % capacity * width * ld; }
    index_t pixel_stride() const { return ld; }
    index_t next_row() const { return 0; }
  };

  // The depthwise side of a panel: geometry, weights with the folded scale, epilogue.
  struct DepthwisePanel {
    DepthwiseGeometry g;
    const C* weights;
    Epilogue<C> epilogue;

    DepthwisePanel(const MbconvForward& op, index_t panel, C* packed)
        : g(op.g), weights(packed), epilogue(from_channel(op.dw_epilogue, op.hidden_panels.first_column(panel))) {
      const index_t first = op.hidden_panels.first_column(panel), taps = g.R * g.S;
      g.C = g.bank = imin(op.hidden - first, op.hidden_panels.width(panel) * kLine);
      const index_t ld = round_up(g.C, kLine);
      transpose_block(static_cast<const T*>(op.args.dw_weight) + first * taps, taps, g.C, taps, packed, ld);
      for (index_t t = 0; t < taps; ++t) {
        for (index_t c = g.C; c < ld; ++c) packed[t * ld + c] = C(0);
        if (!op.dw_folded.folds()) continue;
        for (index_t c = 0; c < ld; c += kLine) {
          C* at = packed + t * ld + c;
          store(at, load(at) * load(op.dw_folded.scale + first + c));
        }
      }
    }
  };
  index_t dw_weights_size() const { return g.R * g.S * kMaxV * kLine; }

  // Expands input rows [begin, end) into the ring.
  void expand(index_t panel, const C* weights, const InputRows& input, index_t begin, index_t end, Ring& ring) const {
    const index_t column = hidden_panels.first_column(panel), width = hidden_panels.width(panel);
    const bool plane = input.row == g.W * input.ld;
    for (index_t h = begin; h < end;) {
      const index_t slot = h % ring.capacity, run = plane ? imin(end - h, ring.capacity - slot) : 1;
      C* to = ring.data + slot * g.W * ring.ld;
      const RowsOfA<C> a(input.at(h), input.ld, 1, args.in_channels);
      if (expand_folded.clamps()) {
        const StoreScaled<C, false> out{to,
                                        ring.ld,
                                        width * kLine,
                                        expand_folded.scale + column,
                                        expand_folded.shift + column,
                                        expand_folded.low,
                                        expand_folded.high,
                                        nullptr,
                                        0};
        gemm_panel(width, run * g.W, a, weights, width * kLine, out);
      } else {
        gemm_panel(width, run * g.W, a, weights, width * kLine, StoreRaw<C>{to, ring.ld});
        apply_epilogue_rows<C>(from_channel(expand_epilogue, column), run * g.W, imin(hidden - column, width * kLine),
                               to, ring.ld, nullptr, 0);
      }
      h += run;
    }
    ring.end = end;
  }

  // z of output rows [p_begin, p_end) of image n, a panel's columns of it. sums: of its channels, for the means; or
  // null.
  template <class Source, class Expand>
  void fill(const DepthwisePanel& dw, Source& source, index_t n, index_t p_begin, index_t p_end, C* z, double* sums,
            const Expand& expand_until) const {
    using Input = std::remove_const_t<std::remove_pointer_t<decltype(source.row(0, 0))>>;
    const DepthwiseRow<Input, C, false> kernel(dw.g, dw.weights, dw.epilogue, true);
    for (index_t first = p_begin; first < p_end; first += ring_rows) {
      const index_t last = imin(p_end, first + ring_rows);
      expand_until(first_row(first), end_row(last));
      C* rows = z + (first - p_begin) * g.Q * ldz;
      for (index_t p = first; p < last; ++p) {
        kernel.run(source, n, p, 0, g.Q, rows + (p - first) * g.Q * ldz, ldz, nullptr, 0);
      }
      if (sums) add_pixels<C>({rows, ldz}, {}, (last - first) * g.Q, dw.g.C, sums);
    }
  }

  void fill_expanded(index_t panel, const DepthwisePanel& dw, const C* weights, const InputRows& input, Ring& ring,
                     index_t n, index_t p_begin, index_t p_end, C* z, double* sums) const {
    fill(dw, ring, n, p_begin, p_end, z, sums, [&](index_t begin, index_t end) {
      const index_t next = imax(begin, ring.end);
      if (next < end) expand(panel, weights, input, next, end, ring);
    });
  }

  // Without an expansion: the panel's channels of the input itself.
  void fill_from_input(index_t panel, const DepthwisePanel& dw, Arena& arena, index_t n, index_t p_begin, index_t p_end,
                       C* z, double* sums) const {
    TensorRef part = args.input;
    part.data = static_cast<T*>(part.data) + hidden_panels.first_column(panel) * part.c;
    RowSource<T> source(arena, part, dw.g);
    fill(dw, source, n, p_begin, p_end, z, sums, [](index_t, index_t) {});
  }

  // ---- the ways to go about it ----

  void run() {
    if (g.N * g.P * g.Q == 0) return;
    constexpr index_t kSmallMap = 256;  // pixels of an output whose z threads share
    const index_t slots = slots_for(cost(), g.N * g.P);
    if (g.N < slots && (excites || (ring_rows >= g.P && g.P * g.Q <= kSmallMap))) {
      run_by_panels();
    } else {
      run_by_bands(slots);
    }
  }

  // What a task of run_by_bands keeps for its bands.
  struct Scratch {
    C *input = nullptr, *rings = nullptr, *z, *y = nullptr, *residual = nullptr;
    DepthwisePanel* depthwise;  // one a panel
    double* sums = nullptr;
    C* gates = nullptr;
    typename ExciteProducts<T>::Image* image = nullptr;

    Scratch(const MbconvForward& op, Arena& arena, bool ring_each) {
      const DepthwiseGeometry& g = op.g;
      const auto values = [&](index_t count) { return static_cast<C*>(arena.allocate(count * sizeof(C))); };
      const index_t input_rows = imin(g.H, (op.group_rows - 1) * g.stride_h + op.span);
      if (op.expands && !op.input_in_place()) input = values(input_rows * g.W * op.ld_input());
      if (op.expands) rings = values((ring_each ? op.hidden_panels.count : 1) * op.ring_size());
      depthwise = static_cast<DepthwisePanel*>(arena.allocate(op.hidden_panels.count * sizeof(DepthwisePanel)));
      for (index_t i = 0; i < op.hidden_panels.count; ++i) {
        depthwise[i] = DepthwisePanel(op, i, values(op.dw_weights_size()));
      }
      z = values(op.group_rows * g.Q * op.ldz);
      if (!op.project.direct) y = values(op.group_rows * g.Q * op.project.ld());
      if (y && op.args.epilogue.residual.data) residual = values(op.group_rows * g.Q * op.project.ld());
      if (op.excites) {
        sums = static_cast<double*>(arena.allocate(op.hidden * sizeof(double)));
        gates = values(op.hidden);
        image = op.products.new_images(arena, 1);
      }
    }
  };

  void run_by_bands(index_t slots) {
    pack(true);
    // An image a task where that is an even share; else every image in bands, which expand a few rows twice.
    const index_t bands = excites || g.N % slots == 0 || g.N >= 4 * slots ? 1 : imin(g.P, slots);
    run_tasks(g.N * bands, [&](index_t task) {
      Arena arena(Arena::kTask);
      const index_t n = task / bands, k = task % bands;
      const index_t p_begin = g.P * k / bands, p_end = g.P * (k + 1) / bands;
      const bool ring_each = p_end - p_begin > group_rows;
      const Scratch scratch(*this, arena, ring_each);
      run_band(n, p_begin, p_end, scratch, ring_each, arena);
    });
  }

  void run_band(index_t n, index_t p_begin, index_t p_end, const Scratch& s, bool ring_each, Arena& arena) const {
    index_t expanded = 0;  // input rows before this one are in the rings, where each panel has its own
    for (index_t p = p_begin; p < p_end; p += group_rows) {
      const index_t stop = imin(p_end, p + group_rows);
      const index_t from = imax(expanded, first_row(p)), until = imax(from, end_row(stop));
      const InputRows input = expands ? input_rows(n, from, until, s.input, ld_input()) : InputRows{};
      for (index_t i = 0; i < hidden_panels.count; ++i) {
        const index_t column = hidden_panels.first_column(i);
        const DepthwisePanel& dw = s.depthwise[i];
        double* sums = s.sums ? s.sums + column : nullptr;
        if (sums) __builtin_memset(sums, 0, dw.g.C * sizeof(double));
        if (expands) {
          Ring ring{s.rings + (ring_each ? i * ring_size() : 0), ring_capacity(), g.W, hidden_panels.width(i) * kLine,
                    expanded};
          fill_expanded(i, dw, expand_panel(i), input, ring, n, p, stop, s.z + column, sums);
        } else {
          fill_from_input(i, dw, arena, n, p, stop, s.z + column, sums);
        }
      }
      if (ring_each) expanded = until;
      const index_t begin = (n * g.P + p) * g.Q, end = (n * g.P + stop) * g.Q;
      if (excites) {
        products.gates(s.sums, g.P * g.Q, *s.image, s.gates);
        scale_pixels<C, C>({s.z, ldz}, s.gates, nullptr, end - begin, hidden, {s.z, ldz});
      }
      project.run({begin, end, {s.z, ldz, 1, hidden}, s.y, s.residual}, 0, project.panels.count);
    }
  }

  void run_by_panels() {
    const index_t ld_x = ld_input();
    const auto values = [&](index_t count) { return static_cast<C*>(shared.allocate(count * sizeof(C))); };
    C* gathered = expands && !input_in_place() ? values(g.H * g.W * ld_x) : nullptr;
    C* z = values(g.P * g.Q * ldz);
    C* y = project.direct ? nullptr : values(g.P * g.Q * project.ld());
    C* residual = y && args.epilogue.residual.data ? values(g.P * g.Q * project.ld()) : nullptr;
    double* sums = excites ? static_cast<double*>(shared.allocate(hidden * sizeof(double))) : nullptr;
    C* gates = excites ? values(hidden) : nullptr;
    const auto* image = excites ? products.new_images(shared, 1) : nullptr;
    pack(false);
    for (index_t n = 0; n < g.N; ++n) {
      const InputRows input = expands ? shared_input(n, gathered, ld_x) : InputRows{};
      if (sums) __builtin_memset(sums, 0, hidden * sizeof(double));
      run_tasks(hidden_panels.count, [&](index_t i) { fill_panel(n, i, input, z, sums); });
      if (excites) products.gates(sums, g.P * g.Q, *image, gates);
      // Pixels in pieces of whole register tiles, some 8 of them a thread with the panels.
      constexpr index_t kPiece = 98;
      const index_t pixels = g.P * g.Q, pieces = ceil_div(pixels, kPiece);
      const auto piece = [&](index_t k) { return imin(pixels, round_up(pixels * k / pieces, 14)); };
      if (excites) {
        run_tasks(pieces, [&](index_t k) {
          C* rows = z + piece(k) * ldz;
          scale_pixels<C, C>({rows, ldz}, gates, nullptr, piece(k + 1) - piece(k), hidden, {rows, ldz});
        });
      }
      run_tasks(pieces * project.panels.count, [&](index_t task) {
        const index_t i = task / pieces, begin = piece(task % pieces), end = piece(task % pieces + 1);
        const index_t at = begin * project.ld();
        project.run({n * pixels + begin,
                     n * pixels + end,
                     {z + begin * ldz, ldz, 1, hidden},
                     y ? y + at : nullptr,
                     residual ? residual + at : nullptr},
                    i, i + 1);
      });
    }
  }

  // The whole of image n, gathered by all threads where it cannot be read in place.
  InputRows shared_input(index_t n, C* gathered, index_t ld) const {
    if (gathered == nullptr) return input_rows(n, 0, g.H, nullptr, ld);
    const index_t shares = shares_for(2.0 * g.H * g.W * ceil_div(args.in_channels, kLine), g.H);
    run_tasks(shares, [&](index_t s) {
      const index_t begin = g.H * s / shares, end = g.H * (s + 1) / shares;
      input_rows(n, begin, end, gathered + begin * g.W * ld, ld);
    });
    return {gathered, ld, g.W * ld, 0};
  }

  void fill_panel(index_t n, index_t i, const InputRows& input, C* z, double* sums) const {
    Arena arena(Arena::kTask);
    const auto values = [&](index_t count) { return static_cast<C*>(arena.allocate(count * sizeof(C))); };
    const index_t column = hidden_panels.first_column(i);
    const DepthwisePanel dw(*this, i, values(dw_weights_size()));
    double* own = sums ? sums + column : nullptr;
    if (!expands) return fill_from_input(i, dw, arena, n, 0, g.P, z + column, own);
    C* weights = values(args.in_channels * kMaxV * kLine);
    pack_expand(i, weights);
    Ring ring{values(ring_size()), ring_capacity(), g.W, hidden_panels.width(i) * kLine};
    fill_expanded(i, dw, weights, input, ring, n, 0, g.P, z + column, own);
  }
};

template <class T>
void mbconv_fwd(const MbconvForwardArgs& args) {
  MbconvForward<T>(args).run();
}
