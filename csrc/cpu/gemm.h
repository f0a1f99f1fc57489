// The matrix product of every room: C[M, N] = A[M, k] * B[k, N] on register tiles of R rows x V vectors.
// Included inside namespace effops::<isa>::{anonymous}; see kernels.inl.
//
//            B panel: k rows of V registers, packed, streamed once per R rows (64 / R bytes of it per FMA)
//            +---------+
//   A: R     | acc     |   R x V accumulators stay in registers for the whole k loop; A is broadcast from L1.
//   rows     | R x V   |   Loads per k: R + V for R * V FMAs, so that the FMA port and not the load port is the limit.
//            +---------+
//
// A may be read transposed (weight gradients: rows of A are channels of a pixel-major tile), hence two strides.
// What happens to the accumulators is a policy: StoreRaw, Accumulate, StoreClamped.

#if EFFOPS_VECTOR_BYTES == 64
// 32 registers: 14 x 2 accumulators. Two registers wide rather than four: a row of B (128 bytes) then feeds 28 FMAs, so
// that streaming B from L2 takes 5 bytes a cycle instead of 11. And 14 divides the maps of ImageNet networks.
constexpr int kMaxV = 3;
constexpr int rows_for(int v) { return v == 3 ? 9 : 14; }
#else
// 16 registers: 6 x 2 accumulators, 2 of B, 1 of A.
constexpr int kMaxV = 2;
constexpr int rows_for(int v) { return v == 2 ? 6 : 8; }
#endif

// How N columns are cut into panels: pairs of registers, and one triple or single where their number is odd.
struct Panels {
  index_t vectors, count;
  index_t lanes;
  Panels(index_t columns, index_t lanes_)
      : vectors(ceil_div(columns, lanes_)),
        count(imax(1, kMaxV == 3 ? vectors / 2 : ceil_div(vectors, 2))),
        lanes(lanes_) {}
  index_t first_vector(index_t panel) const { return panel == count ? vectors : 2 * panel; }
  index_t width(index_t panel) const { return panel + 1 == count ? vectors - 2 * panel : 2; }
  index_t first_column(index_t panel) const { return first_vector(panel) * lanes; }
};

// A sum of 1024 products in one chain of roundings is twice as far from the truth as what torch computes; so a chain is
// folded into a second accumulator every so often. Costs under 1 %.
constexpr index_t kLongChain = 128;

template <class C>
struct StoreRaw {
  static constexpr index_t kChain = kLongChain;
  C* y;
  index_t ld;
  template <int V>
  EFFOPS_INLINE void init(vec<C> (&acc)[V]) const {
    for (int v = 0; v < V; ++v) acc[v] = vec<C>{};
  }
  template <int R, int V>
  EFFOPS_INLINE void finish(index_t row, vec<C> (&acc)[R][V]) const {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) store(y + (row + r) * ld + v * kLanes<C>, acc[r][v]);
    }
  }
};

// The first `columns` columns of the panel to rows of a tensor, the others to y, with whole registers.
template <class C, class T>
struct StoreSplit {
  static constexpr index_t kChain = kLongChain;
  T* first;
  index_t first_ld;
  index_t columns;  // may be negative, or more than there are
  C* y;
  index_t ld;
  template <int V>
  EFFOPS_INLINE void init(vec<C> (&acc)[V]) const {
    for (int v = 0; v < V; ++v) acc[v] = vec<C>{};
  }
  template <int R, int V>
  EFFOPS_INLINE void finish(index_t row, vec<C> (&acc)[R][V]) const {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      const index_t c = v * kLanes<C>, mine = columns - c;
      if (mine >= kLanes<C>) {
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) store(first + (row + r) * first_ld + c, acc[r][v]);
        continue;
      }
      if (mine > 0) {
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) store_partial(first + (row + r) * first_ld + c, acc[r][v], mine);
      }
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) store(y + (row + r) * ld + c, acc[r][v]);
    }
  }
};

// y += A B, with whole registers (y is padded). The sum starts at zero and is added at the end: two levels of summation
// lose less to rounding over many tiles than one running sum.
template <class C>
struct Accumulate {
  static constexpr index_t kChain = 64;  // a sum over pixels of values that are mostly of one sign after a relu
  C* y;
  index_t ld;
  template <int V>
  EFFOPS_INLINE void init(vec<C> (&acc)[V]) const {
    for (int v = 0; v < V; ++v) acc[v] = vec<C>{};
  }
  template <int R, int V>
  EFFOPS_INLINE void finish(index_t row, vec<C> (&acc)[R][V]) const {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      C* p = y + (row + r) * ld;
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) store(p + v * kLanes<C>, load(p + v * kLanes<C>) + acc[r][v]);
    }
  }
};

// clamp(A B + bias, low, high) * scale + shift straight from the registers; covers none, relu and relu6 with or without
// an affine after them. Writes the first `columns` columns only.
template <class T, bool Affine>
struct StoreClamped {
  using C = compute<T>;
  static constexpr index_t kChain = kLongChain;
  T* y;
  index_t ld;
  index_t columns;
  const C *bias, *scale, *shift;  // padded; bias may be null
  C low, high;
  C post_low, post_high;  // behind scale and shift, where there are any
  bool stream;            // past the caches

  // Of an epilogue that this covers, from its channel `column` on.
  EFFOPS_INLINE static StoreClamped of(const Epilogue<C>& e, index_t column, T* y, index_t ld, index_t columns,
                                       bool stream) {
    return {y,
            ld,
            columns,
            e.bias ? e.bias + column : nullptr,
            Affine ? e.scale + column : nullptr,
            Affine ? e.shift + column : nullptr,
            e.low,
            e.high,
            e.post_low,
            e.post_high,
            stream};
  }
  template <int V>
  EFFOPS_INLINE void init(vec<C> (&acc)[V]) const {
    for (int v = 0; v < V; ++v) acc[v] = bias ? load(bias + v * kLanes<C>) : vec<C>{};
  }
  template <int R, int V>
  EFFOPS_INLINE void finish(index_t row, vec<C> (&acc)[R][V]) const {
    const vec<C> lowest = splat(low), highest = splat(high);
    const bool whole = columns == V * kLanes<C>;
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {  // register by register, so that scale and shift are loaded once
      vec<C> a{}, b{};
      if constexpr (Affine) a = load(scale + v * kLanes<C>), b = load(shift + v * kLanes<C>);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        acc[r][v] = at_most<C>(at_least<C>(acc[r][v], lowest), highest);
        if constexpr (Affine) acc[r][v] = at_most<C>(at_least<C>(acc[r][v] * a + b, splat(post_low)), splat(post_high));
      }
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      T* p = y + (row + r) * ld;
#pragma GCC unroll 4
      for (int v = 0; v < V - 1; ++v) {
        if (stream) {
          store_past_caches(p + v * kLanes<C>, acc[r][v]);
        } else {
          store(p + v * kLanes<C>, acc[r][v]);
        }
      }
      if (stream) {
        store_past_caches(p + (V - 1) * kLanes<C>, acc[r][V - 1]);
      } else if (whole) {
        store(p + (V - 1) * kLanes<C>, acc[r][V - 1]);
      } else {
        store_partial(p + (V - 1) * kLanes<C>, acc[r][V - 1], columns - (V - 1) * kLanes<C>);
      }
    }
  }
};

// clamp(A B * scale + shift + residual, low, high) straight from the registers. Writes the first `columns` columns only.
template <class T, bool Residual>
struct StoreScaled {
  using C = compute<T>;
  static constexpr index_t kChain = kLongChain;
  T* y;
  index_t ld;
  index_t columns;
  const C *scale, *shift;  // padded
  C low, high;
  const T* residual;
  index_t residual_ld;
  template <int V>
  EFFOPS_INLINE void init(vec<C> (&acc)[V]) const {
    for (int v = 0; v < V; ++v) acc[v] = vec<C>{};
  }
  template <int R, int V>
  EFFOPS_INLINE void finish(index_t row, vec<C> (&acc)[R][V]) const {
    const vec<C> lowest = splat(low), highest = splat(high);
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      const index_t c = v * kLanes<C>;
      const vec<C> a = load(scale + c), b = load(shift + c);
      if (v + 1 < V || columns == V * kLanes<C>) {
        store_register<R, V, true>(row, acc, v, a, b, lowest, highest);
      } else {
        store_register<R, V, false>(row, acc, v, a, b, lowest, highest);
      }
    }
  }

 private:
  template <int R, int V, bool Full>
  EFFOPS_INLINE void store_register(index_t row, vec<C> (&acc)[R][V], int v, vec<C> a, vec<C> b, vec<C> lowest,
                                    vec<C> highest) const {
    const index_t c = v * kLanes<C>, lanes = columns - c;
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      vec<C> value = acc[r][v] * a + b;
      if constexpr (Residual) value = value + load_lanes<Full>(residual + (row + r) * residual_ld + c, lanes);
      value = at_most<C>(at_least<C>(value, lowest), highest);
      store_lanes<Full>(y + (row + r) * ld + c, value, lanes);
    }
  }
};

// Memory that will be wanted after this product (the input rows of the next tile): the inner loop, which leaves the
// memory pipes idle, asks for one cache line of it per step.
struct Ahead {
  const char* at = nullptr;
  const char* end = nullptr;
  static constexpr index_t kLine = 64;
};

// A, in up to two pieces along k: what precedes the tile in the concatenation (passthrough channels, read where they
// lie) and the tile.
template <class Z>
struct RowsOfA {
  const Z* data[2];
  index_t row[2];  // distance of two rows
  index_t k[2];
  index_t step;  // distance of two elements along k
  Ahead* ahead = nullptr;
  RowsOfA(const Z* a, index_t a_row, index_t a_step, index_t a_k)
      : data{a, nullptr}, row{a_row, 0}, k{a_k, 0}, step(a_step) {}
  RowsOfA(const Z* first, index_t first_row, index_t first_k, const Z* second, index_t second_row, index_t second_k)
      : data{first, second}, row{first_row, second_row}, k{first_k, second_k}, step(1) {}
  EFFOPS_INLINE RowsOfA skip(index_t rows) const {
    RowsOfA result = *this;
    result.data[0] += rows * row[0];
    result.data[1] += rows * row[1];
    return result;
  }
};

template <int R, int V, class C, class Out>
__attribute__((noinline)) void gemm_tile(const RowsOfA<C>& rows, const C* b, index_t b_ld, Out out, index_t row) {
  vec<C> acc[R][V];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) out.template init<V>(acc[r]);
  vec<C> folded[R][V];
  bool any_folded = false;
  const char* ahead = rows.ahead ? rows.ahead->at : nullptr;
  index_t lines = rows.ahead ? (rows.ahead->end - ahead) / Ahead::kLine : 0;
  for (int piece = 0; piece < 2; ++piece) {
    // Two row pointers and the offsets of half the rows: one register a row would be more than there are.
    const C* a = rows.data[piece];
    const index_t a_row = rows.row[piece], a_step = rows.step;
    constexpr int kHalf = (R + 1) / 2;
    const C* upper = a + kHalf * a_row;
    const auto steps = [&](index_t count, auto with_ahead) __attribute__((always_inline)) {
      for (index_t i = count; i > 0; --i) {
        vec<C> w[V];
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) w[v] = load(b + v * kLanes<C>);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
          const vec<C> x = splat(r < kHalf ? a[r * a_row] : upper[(r - kHalf) * a_row]);
#pragma GCC unroll 4
          for (int v = 0; v < V; ++v) acc[r][v] = acc[r][v] + x * w[v];
        }
        if constexpr (decltype(with_ahead)::value) {
          __builtin_prefetch(ahead, 0, 2);
          ahead += Ahead::kLine;
        }
        a += a_step;
        upper += a_step;
        b += b_ld;
      }
    };
    for (index_t left = rows.k[piece]; left > 0;) {
      const index_t count = imin(left, Out::kChain), asking = imin(count, lines);
      left -= count;
      lines -= asking;
      steps(asking, std::true_type{});
      steps(count - asking, std::false_type{});
      if (count == Out::kChain && (left > 0 || (piece == 0 && rows.k[1] > 0))) {
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
          for (int v = 0; v < V; ++v) {
            folded[r][v] = any_folded ? folded[r][v] + acc[r][v] : acc[r][v];
            acc[r][v] = vec<C>{};
          }
        }
        any_folded = true;
      }
    }
  }
  if (any_folded) {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) acc[r][v] = acc[r][v] + folded[r][v];
    }
  }
  if (rows.ahead) rows.ahead->at = ahead;
  out.template finish<R, V>(row, acc);
}

template <int R, int V, class C, class Out>
EFFOPS_INLINE void gemm_some(index_t& row, index_t M, const RowsOfA<C>& rows, const C* b, index_t b_ld,
                             const Out& out) {
  for (; row + R <= M; row += R) gemm_tile<R, V>(rows.skip(row), b, b_ld, out, row);
}

// M rows by as many full tiles as there are, the rest by halves.
template <int V, class C, class Out>
void gemm_panel_rows(index_t M, const RowsOfA<C>& rows, const C* b, index_t b_ld, const Out& out) {
  constexpr int R = rows_for(V);
  index_t row = 0;
  gemm_some<R, V>(row, M, rows, b, b_ld, out);
  if constexpr (R >= 14) gemm_some<7, V>(row, M, rows, b, b_ld, out);
  gemm_some<4, V>(row, M, rows, b, b_ld, out);
  gemm_some<2, V>(row, M, rows, b, b_ld, out);
  gemm_some<1, V>(row, M, rows, b, b_ld, out);
}

// One panel of `width` registers (rows of B b_ld apart; packed: width * lanes) against M rows of A.
template <class C, class Out>
EFFOPS_INLINE void gemm_panel(index_t width, index_t M, const RowsOfA<C>& rows, const C* b, index_t b_ld,
                              const Out& out) {
  switch (width) {
    case 1:
      return gemm_panel_rows<1>(M, rows, b, b_ld, out);
    case 2:
      return gemm_panel_rows<2>(M, rows, b, b_ld, out);
#if EFFOPS_VECTOR_BYTES == 64
    case 3:
      return gemm_panel_rows<3>(M, rows, b, b_ld, out);
#endif
    default:
      __builtin_unreachable();
  }
}

// Packs panel `panel` of B[k, columns], B[i][j] = matrix[i * row_stride + j * column_stride], zero-padded to whole
// registers.
template <class C, class T>
void pack_panel(const T* matrix, index_t row_stride, index_t column_stride, index_t k, index_t columns,
                const Panels& panels, index_t panel, C* dst) {
  const index_t first = panels.first_column(panel);
  const index_t ld = panels.width(panel) * panels.lanes;
  const index_t valid = imin(ld, columns - first);
  gather_segment(matrix + first * column_stride, row_stride, column_stride, k, valid, 1, dst, ld);
  if (valid < ld) {
    for (index_t i = 0; i < k; ++i) {
      for (index_t j = valid; j < ld; ++j) dst[i * ld + j] = C(0);
    }
  }
}

#if EFFOPS_BF16_DOT
// ---- bf16 pairs: acc += a[2i] * b[2i] + a[2i + 1] * b[2i + 1], twice the FMA rate ----

// B as pairs of rows: element [i][j] holds B[2i][j] in its low half and B[2i + 1][j] in its high half.
inline void pack_panel_pairs(const bf16* matrix, index_t row_stride, index_t column_stride, index_t k, index_t columns,
                             const Panels& panels, index_t panel, std::uint32_t* dst) {
  const index_t first = panels.first_column(panel);
  const index_t ld = panels.width(panel) * panels.lanes;
  const index_t valid = imin(ld, columns - first);
  const bf16* source = matrix + first * column_stride;
  const index_t pairs = k / 2;
  if (row_stride == 1 &&
      column_stride % 2 == 0) {  // a pair is one 32-bit word of the row-major weight: a plain transposition
    transpose_block(reinterpret_cast<const float*>(source), column_stride / 2, valid, pairs,
                    reinterpret_cast<float*>(dst), ld);
  } else {
    for (index_t i = 0; i < pairs; ++i) {
      for (index_t j = 0; j < valid; ++j) {
        const bf16* at = source + j * column_stride + 2 * i * row_stride;
        dst[i * ld + j] = at[0].bits | static_cast<std::uint32_t>(at[row_stride].bits) << 16;
      }
    }
  }
  if (k % 2 != 0) {
    for (index_t j = 0; j < valid; ++j) dst[pairs * ld + j] = source[j * column_stride + 2 * pairs * row_stride].bits;
  }
  for (index_t i = 0; i < ceil_div(k, 2); ++i) {
    for (index_t j = valid; j < ld; ++j) dst[i * ld + j] = 0;
  }
}

template <int R, int V, class Out>
__attribute__((noinline)) void gemm_tile_pairs(const RowsOfA<bf16>& rows, const std::uint32_t* b, Out out,
                                               index_t row) {
  vec<float> acc[R][V];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) out.template init<V>(acc[r]);
  for (int piece = 0; piece < 2; ++piece) {
    const bf16* a = rows.data[piece];
    const index_t a_row = rows.row[piece];
    constexpr int kHalf = (R + 1) / 2;
    const bf16* upper = a + kHalf * a_row;
    for (index_t i = rows.k[piece]; i > 0; --i) {
      __m512bh w[V];
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) w[v] = (__m512bh)_mm512_loadu_si512(b + v * 16);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        int pair;
        __builtin_memcpy(&pair, r < kHalf ? a + r * a_row : upper + (r - kHalf) * a_row, 4);
        const __m512bh x = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) acc[r][v] = (vec<float>)_mm512_dpbf16_ps((__m512)acc[r][v], x, w[v]);
      }
      a += 2;
      upper += 2;
      b += V * 16;
    }
  }
  out.template finish<R, V>(row, acc);
}

template <int R, int V, class Out>
EFFOPS_INLINE void gemm_some_pairs(index_t& row, index_t M, const RowsOfA<bf16>& rows, const std::uint32_t* b,
                                   const Out& out) {
  for (; row + R <= M; row += R) gemm_tile_pairs<R, V>(rows.skip(row), b, out, row);
}

template <int V, class Out>
void gemm_panel_rows_pairs(index_t M, const RowsOfA<bf16>& rows, const std::uint32_t* b, const Out& out) {
  index_t row = 0;
  gemm_some_pairs<rows_for(V), V>(row, M, rows, b, out);
  gemm_some_pairs<4, V>(row, M, rows, b, out);
  gemm_some_pairs<1, V>(row, M, rows, b, out);
}

// k counts pairs.
template <class Out>
EFFOPS_INLINE void gemm_panel_pairs(index_t width, index_t M, const RowsOfA<bf16>& rows, const std::uint32_t* b,
                                    const Out& out) {
  switch (width) {
    case 1:
      return gemm_panel_rows_pairs<1>(M, rows, b, out);
    case 2:
      return gemm_panel_rows_pairs<2>(M, rows, b, out);
    case 3:
      return gemm_panel_rows_pairs<3>(M, rows, b, out);
    default:
      __builtin_unreachable();
  }
}
#endif
