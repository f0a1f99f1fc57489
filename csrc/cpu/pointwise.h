// A pointwise convolution on tiles of pixels: what the rooms share that have one in front of their depthwise convolution.
// Included inside namespace effops::<isa>::{anonymous}; see kernels.inl.

// Rows of A may be a whole number of registers long and padded, or lie in a tensor: only their channels are read.
template <class T>
struct PointwiseProduct {
  using C = compute<T>;
  const PointwiseRef& ref;
  const Panels panels;
  const Epilogue<C> epilogue;
  C* packed = nullptr;

  PointwiseProduct(Arena& arena, const PointwiseRef& r)
      : ref(r), panels(r.outputs, kLanes<C>), epilogue(arena, r.epilogue, r.outputs) {}

  index_t inputs() const { return ref.inputs; }
  index_t outputs() const { return ref.outputs; }
  double cost_per_pixel() const { return static_cast<double>(ref.inputs) * panels.vectors; }
  index_t packed_size(index_t panel) const { return ref.inputs * panels.width(panel) * kLanes<C>; }
  const C* panel(index_t i) const { return packed + ref.inputs * panels.first_column(i); }

  void pack(index_t i, C* destination) const {
    pack_panel(static_cast<const T*>(ref.weight), ref.stride_c, ref.stride_k, ref.inputs, ref.outputs, panels, i,
               destination);
  }

  // All panels, by all threads.
  void pack_all(Arena& arena) {
    if (outputs() == 0) return;
    constexpr double kPackCost = 6;  // of a register, in FMAs
    packed = static_cast<C*>(arena.allocate(ref.inputs * panels.vectors * kLanes<C> * sizeof(C)));
    const index_t packers = slots_for(kPackCost * cost_per_pixel(), panels.count);
    run_tasks(packers, [&](index_t s) {
      for (index_t i = panels.count * s / packers; i < panels.count * (s + 1) / packers; ++i) {
        pack(i, packed + ref.inputs * panels.first_column(i));
      }
    });
  }

  // One panel's output channels of `pixels` rows of A, whole registers: y[pixel * ld + channel of the panel].
  void run(index_t i, const C* weights, index_t pixels, const PixelRows<const C>& a, C* y, index_t ld,
           bool with_epilogue) const {
    const index_t column = panels.first_column(i), columns = panels.width(i) * kLanes<C>;
    const RowsOfA<C> rows(a.data, a.ld, 1, ref.inputs);
    if (!with_epilogue || (epilogue.trivial() && epilogue.bias == nullptr)) {
      gemm_panel(panels.width(i), pixels, rows, weights, columns, StoreRaw<C>{y, ld});
    } else if (epilogue.simple()) {
      if (epilogue.affine()) {
        const auto out = StoreClamped<C, true>::of(epilogue, column, y, ld, columns, false);
        gemm_panel(panels.width(i), pixels, rows, weights, columns, out);
      } else {
        const auto out = StoreClamped<C, false>::of(epilogue, column, y, ld, columns, false);
        gemm_panel(panels.width(i), pixels, rows, weights, columns, out);
      }
    } else {
      gemm_panel(panels.width(i), pixels, rows, weights, columns, StoreRaw<C>{y, ld});
      apply_epilogue_rows(from_channel(epilogue, column), pixels, columns, y, ld, static_cast<const C*>(nullptr), 0);
    }
  }

  // All panels: y[pixel * ld + channel].
  void run_all(index_t pixels, const PixelRows<const C>& a, C* y, index_t ld, bool with_epilogue) const {
    for (index_t i = 0; i < panels.count; ++i) {
      run(i, panel(i), pixels, a, y + panels.first_column(i), ld, with_epilogue);
    }
  }
};

// A pointwise convolution whose result is the operator's output map: the last one of a chain. Its epilogue runs on the
// way out of the registers where it is an affine map and a clamp, else on a tile.
template <class T>
struct OutputProduct {
  using C = compute<T>;
  static constexpr index_t kLine = kLanes<C>;

  // Output pixels [begin, end), numbered through the batch, of the rows `a`. y, residual: tiles of ld() for what cannot
  // go straight to memory; null where `direct`, or without a residual.
  struct Pixels {
    index_t begin, end;
    RowsOfA<C> a;
    C *y, *residual;
  };

  const MatrixRef matrix;
  const TensorRef output;
  const index_t P, Q, k, K;
  const Panels panels;
  const FoldedEpilogue<C> folded;
  const Epilogue<C> epilogue;
  const bool direct;  // output registers go straight to memory
  C* packed = nullptr;

  // g: of the map, [N, K, P, Q]. k: rows of the matrix, of all its pieces.
  OutputProduct(Arena& arena, const MatrixRef& m, const EpilogueRef& e, const TensorRef& y, const DepthwiseGeometry& g,
                index_t k_, index_t K_)
      : matrix(m),
        output(y),
        P(g.P),
        Q(g.Q),
        k(k_),
        K(K_),
        panels(K, kLine),
        folded(arena, e, K),
        epilogue(arena, e, K),
        direct(folded.clamps() && y.c == 1 && (e.residual.data == nullptr || evenly_spaced(e.residual, g.N, P, Q))) {}

  index_t ld() const { return row_distance<C>(K); }
  index_t packed_size() const { return k * panels.vectors * kLine; }
  C* panel(index_t i) const { return packed + k * panels.first_column(i); }
  void pack(index_t i) const {
    const index_t rows = k / matrix.pieces, width = panels.width(i) * kLine;
    if (matrix.pieces > 1 && matrix.stride_piece == 1 && matrix.stride_in == matrix.pieces) {
      return pack_interleaved(i, rows, width);
    }
    for (index_t piece = 0; piece < matrix.pieces; ++piece) {
      pack_panel(static_cast<const T*>(matrix.data) + piece * matrix.stride_piece, matrix.stride_in, matrix.stride_out,
                 rows, K, panels, i, panel(i) + piece * rows * width);
    }
  }

  // A weight [K][rows][pieces]: all its rows at once, which is a plain transposition, then each to its piece.
  void pack_interleaved(index_t i, index_t rows, index_t width) const {
    Arena arena(Arena::kTask);
    C* all = static_cast<C*>(arena.allocate(k * width * sizeof(C)));
    pack_panel(static_cast<const T*>(matrix.data), index_t{1}, matrix.stride_out, k, K, panels, i, all);
    for (index_t piece = 0; piece < matrix.pieces; ++piece) {
      copy_rows(all + piece * width, matrix.pieces * width, rows, width, panel(i) + piece * rows * width, width);
    }
  }

  // All panels, by all threads.
  void pack_all(Arena& arena) {
    constexpr double kPackCost = 6;  // of a register, in FMAs
    packed = static_cast<C*>(arena.allocate(packed_size() * sizeof(C)));
    const index_t packers = slots_for(kPackCost * k * panels.vectors, panels.count);
    run_tasks(packers, [&](index_t s) {
      for (index_t i = panels.count * s / packers; i < panels.count * (s + 1) / packers; ++i) pack(i);
    });
  }

  // The output channels of the panels [first, last).
  void run(const Pixels& t, index_t first, index_t last) const {
    for (index_t i = first; i < last; ++i) direct ? to_memory(t, i) : to_tile(t, i);
    if (direct) return;
    const index_t column = panels.first_column(first), columns = imin(K, panels.first_column(last)) - column;
    if (t.residual) {
      gather_pixels<T>(epilogue.residual, t.begin, t.end, P, Q, column, columns, t.residual + column, ld());
    }
    apply_epilogue_rows<C>(from_channel(epilogue, column), t.end - t.begin, columns, t.y + column, ld(),
                           t.residual ? t.residual + column : nullptr, ld());
    scatter_pixels<T>(t.y + column, ld(), output, t.begin, t.end, P, Q, column, columns);
  }

 private:
  void to_tile(const Pixels& t, index_t i) const {
    gemm_panel(panels.width(i), t.end - t.begin, t.a, panel(i), panels.width(i) * kLine,
               StoreRaw<C>{t.y + panels.first_column(i), ld()});
  }

  void to_memory(const Pixels& t, index_t i) const {
    const index_t column = panels.first_column(i), width = panels.width(i);
    const index_t columns = imin(K - column, width * kLine);
    const TensorRef& residual = epilogue.residual;
    for_each_run(output, t.begin, t.end, P, Q, [&](index_t position, index_t count, index_t offset) {
      T* to = static_cast<T*>(output.data) + position + column;
      const RowsOfA<C> a = t.a.skip(offset);
      const C *scale = folded.scale + column, *shift = folded.shift + column;
      if (residual.data) {
        const T* added = static_cast<const T*>(residual.data) + (t.begin + offset) * residual.w + column;
        const StoreScaled<T, true> out{to, output.w, columns, scale, shift, folded.low, folded.high, added, residual.w};
        gemm_panel(width, count, a, panel(i), width * kLine, out);
      } else {
        const StoreScaled<T, false> out{to, output.w, columns, scale, shift, folded.low, folded.high, nullptr, 0};
        gemm_panel(width, count, a, panel(i), width * kLine, out);
      }
    });
  }
};

// The input's pixels in the order of the map itself, for what comes before a depthwise convolution.
inline DepthwiseGeometry input_map(const DepthwiseGeometry& g) {
  DepthwiseGeometry map = g;
  map.P = g.H, map.Q = g.W;
  return map;
}

// Rows of a map that are made one after the other and wanted by windows that move over them: a ring of whole rows,
// [capacity][W][ld], whose first slot is that of row `first`.
template <class C>
class RingOfRows {
 public:
  RingOfRows(C* data, index_t capacity, index_t width, index_t ld, index_t first = 0)
      : data_(data), capacity_(capacity), row_(width * ld), ld_(ld), first_(first) {}

  // As RowSource.
  const C* row(index_t, index_t h) const { return data_ + slot(h) * row_; }
  index_t pixel_stride() const { return ld_; }
  index_t next_row() const { return 0; }
  bool direct() const { return true; }

  C* place(index_t h) const { return data_ + slot(h) * row_; }
  index_t rows_until_wrap(index_t h) const { return capacity_ - slot(h); }

 private:
  index_t slot(index_t h) const { return (h - first_) % capacity_; }
  C* data_;
  index_t capacity_, row_, ld_, first_;
};
