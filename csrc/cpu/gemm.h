// The matrix product of every room: C[M, N] = A[M, k] * B[k, N] on register tiles of R rows x V vectors.
// Included inside namespace effops::<isa>::{anonymous}; see kernels.inl.
//
//            B panel: k rows of V registers, packed, streamed once per R rows (64 V / R bytes per FMA row: L2 keeps up from R = 4 on)
//            +---------+
//   A: R     | acc     |   R x V accumulators stay in registers for the whole k loop; A is broadcast element by element from L1.
//   rows     | R x V   |   Loads per k: R + V for R * V FMAs, so that the FMA port and not the load port is the limit.
//            +---------+
//
// A may be read transposed (weight gradients: rows of A are channels of a pixel-major tile), hence two strides.
// What happens to the accumulators is a policy: StoreRaw, Accumulate, StoreClamped.

#if EFFOPS_VECTOR_BYTES == 64
constexpr int kMaxV = 4;  // 32 registers: 6 x 4 accumulators, 4 of B, 1 of A
constexpr int rows_for(int v) { return v == 4 ? 6 : 8; }
#else
constexpr int kMaxV = 2;  // 16 registers: 6 x 2 accumulators, 2 of B, 1 of A
constexpr int rows_for(int v) { return v == 2 ? 6 : 8; }
#endif

// How N columns are cut into panels of at most kMaxV registers, as evenly as possible (5 registers: 3 + 2, not 4 + 1).
struct Panels {
  index_t vectors, count;
  index_t lanes;
  Panels(index_t columns, index_t lanes_) : vectors(ceil_div(columns, lanes_)), count(ceil_div(vectors, kMaxV)), lanes(lanes_) {}
  index_t first_vector(index_t panel) const { return vectors / count * panel + imin(panel, vectors % count); }
  index_t width(index_t panel) const { return vectors / count + (panel < vectors % count ? 1 : 0); }
  index_t first_column(index_t panel) const { return first_vector(panel) * lanes; }
};

template <class C>
struct StoreRaw {
  C* y;
  index_t ld;
  template <int V>
  EFFOPS_INLINE void init(vec<C> (&acc)[V]) const {
    for (int v = 0; v < V; ++v) acc[v] = vec<C>{};
  }
  template <int V>
  EFFOPS_INLINE void finish(index_t row, vec<C> (&acc)[V]) const {
    for (int v = 0; v < V; ++v) store(y + row * ld + v * kLanes<C>, acc[v]);
  }
};

// y += A B, with whole registers (y is padded). The sum starts at zero and is added at the end: two levels of summation lose less
// to rounding over many tiles than one running sum.
template <class C>
struct Accumulate {
  C* y;
  index_t ld;
  template <int V>
  EFFOPS_INLINE void init(vec<C> (&acc)[V]) const {
    for (int v = 0; v < V; ++v) acc[v] = vec<C>{};
  }
  template <int V>
  EFFOPS_INLINE void finish(index_t row, vec<C> (&acc)[V]) const {
    C* p = y + row * ld;
    for (int v = 0; v < V; ++v) store(p + v * kLanes<C>, load(p + v * kLanes<C>) + acc[v]);
  }
};

// clamp(A B + bias, low, high) * scale + shift straight from the registers; covers none, relu and relu6 with or without an affine
// after them. Writes the first `columns` columns only.
template <class T, bool Affine>
struct StoreClamped {
  using C = compute<T>;
  T* y;
  index_t ld;
  index_t columns;
  const C *bias, *scale, *shift;  // padded; bias may be null
  C low, high;
  template <int V>
  EFFOPS_INLINE void init(vec<C> (&acc)[V]) const {
    for (int v = 0; v < V; ++v) acc[v] = bias ? load(bias + v * kLanes<C>) : vec<C>{};
  }
  template <int V>
  EFFOPS_INLINE void finish(index_t row, vec<C> (&acc)[V]) const {
    T* p = y + row * ld;
    for (int v = 0; v < V; ++v) {
      vec<C> value = at_most<C>(at_least<C>(acc[v], splat(low)), splat(high));
      if constexpr (Affine) value = value * load(scale + v * kLanes<C>) + load(shift + v * kLanes<C>);
      if (v < V - 1 || columns == V * kLanes<C>) {
        store(p + v * kLanes<C>, value);
      } else {
        store_partial(p + v * kLanes<C>, value, columns - v * kLanes<C>);
      }
    }
  }
};

template <int R, int V, class C, class Out>
__attribute__((noinline)) void gemm_tile(const C* __restrict a, index_t a_row, index_t a_k, const C* __restrict b, index_t b_ld, index_t k, const Out& out,
                                         index_t row) {
  vec<C> acc[R][V];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) out.template init<V>(acc[r]);
  for (index_t i = 0; i < k; ++i) {
    vec<C> w[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) w[v] = load(b + v * kLanes<C>);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const vec<C> x = splat(a[r * a_row]);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) acc[r][v] = acc[r][v] + x * w[v];
    }
    a += a_k;
    b += b_ld;
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) out.template finish<V>(row + r, acc[r]);
}

// The last R rows of a block whose height is known only at run time.
template <int R, int V, class C, class Out>
EFFOPS_INLINE void gemm_remainder(index_t rows, const C* a, index_t a_row, index_t a_k, const C* b, index_t b_ld, index_t k, const Out& out, index_t row) {
  if constexpr (R > 0) {
    if (rows == R) {
      gemm_tile<R, V>(a, a_row, a_k, b, b_ld, k, out, row);
    } else {
      gemm_remainder<R - 1, V>(rows, a, a_row, a_k, b, b_ld, k, out, row);
    }
  }
}

template <int V, class C, class Out>
void gemm_panel_rows(index_t M, const C* a, index_t a_row, index_t a_k, const C* b, index_t b_ld, index_t k, const Out& out) {
  constexpr int R = rows_for(V);
  index_t row = 0;
  for (; row + R <= M; row += R) gemm_tile<R, V>(a + row * a_row, a_row, a_k, b, b_ld, k, out, row);
  gemm_remainder<R - 1, V>(M - row, a + row * a_row, a_row, a_k, b, b_ld, k, out, row);
}

// One panel of `width` registers (rows of B b_ld apart; packed: width * lanes) against M rows of A.
template <class C, class Out>
EFFOPS_INLINE void gemm_panel(index_t width, index_t M, const C* a, index_t a_row, index_t a_k, const C* b, index_t b_ld, index_t k, const Out& out) {
  switch (width) {
    case 1:
      return gemm_panel_rows<1>(M, a, a_row, a_k, b, b_ld, k, out);
    case 2:
      return gemm_panel_rows<2>(M, a, a_row, a_k, b, b_ld, k, out);
#if EFFOPS_VECTOR_BYTES == 64
    case 3:
      return gemm_panel_rows<3>(M, a, a_row, a_k, b, b_ld, k, out);
    case 4:
      return gemm_panel_rows<4>(M, a, a_row, a_k, b, b_ld, k, out);
#endif
    default:
      __builtin_unreachable();
  }
}

// Packs panel `panel` of B[k, columns], B[i][j] = matrix[i * row_stride + j * column_stride], zero-padded to whole registers.
template <class C, class T>
void pack_panel(const T* matrix, index_t row_stride, index_t column_stride, index_t k, index_t columns, const Panels& panels, index_t panel, C* dst) {
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
// ---- bf16 pairs: acc += a[2i] * b[2i] + a[2i + 1] * b[2i + 1], twice the FMA rate ------------------------------------------------

// B as pairs of rows: element [i][j] holds B[2i][j] in its low half and B[2i + 1][j] in its high half.
inline void pack_panel_pairs(const bf16* matrix, index_t row_stride, index_t column_stride, index_t k, index_t columns, const Panels& panels,
                             index_t panel, std::uint32_t* dst) {
  const index_t first = panels.first_column(panel);
  const index_t ld = panels.width(panel) * panels.lanes;
  const index_t valid = imin(ld, columns - first);
  const bf16* source = matrix + first * column_stride;
  const index_t pairs = k / 2;
  if (row_stride == 1 && column_stride % 2 == 0) {  // a pair is one 32-bit word of the row-major weight: a plain transposition
    transpose_block(reinterpret_cast<const float*>(source), column_stride / 2, valid, pairs, reinterpret_cast<float*>(dst), ld);
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
__attribute__((noinline)) void gemm_tile_pairs(const bf16* __restrict a, index_t a_row, const std::uint32_t* __restrict b, index_t k, const Out& out,
                                               index_t row) {
  vec<float> acc[R][V];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) out.template init<V>(acc[r]);
  for (index_t i = 0; i < k; ++i) {
    __m512bh w[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) w[v] = (__m512bh)_mm512_loadu_si512(b + v * 16);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      int pair;
      __builtin_memcpy(&pair, a + r * a_row + 2 * i, 4);
      const __m512bh x = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) acc[r][v] = (vec<float>)_mm512_dpbf16_ps((__m512)acc[r][v], x, w[v]);
    }
    b += V * 16;
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) out.template finish<V>(row + r, acc[r]);
}

template <int R, int V, class Out>
EFFOPS_INLINE void gemm_remainder_pairs(index_t rows, const bf16* a, index_t a_row, const std::uint32_t* b, index_t k, const Out& out, index_t row) {
  if constexpr (R > 0) {
    if (rows == R) {
      gemm_tile_pairs<R, V>(a, a_row, b, k, out, row);
    } else {
      gemm_remainder_pairs<R - 1, V>(rows, a, a_row, b, k, out, row);
    }
  }
}

template <int V, class Out>
void gemm_panel_rows_pairs(index_t M, const bf16* a, index_t a_row, const std::uint32_t* b, index_t k, const Out& out) {
  constexpr int R = rows_for(V);
  index_t row = 0;
  for (; row + R <= M; row += R) gemm_tile_pairs<R, V>(a + row * a_row, a_row, b, k, out, row);
  gemm_remainder_pairs<R - 1, V>(M - row, a + row * a_row, a_row, b, k, out, row);
}

template <class Out>
EFFOPS_INLINE void gemm_panel_pairs(index_t width, index_t M, const bf16* a, index_t a_row, const std::uint32_t* b, index_t k, const Out& out) {
  switch (width) {
    case 1:
      return gemm_panel_rows_pairs<1>(M, a, a_row, b, k, out);
    case 2:
      return gemm_panel_rows_pairs<2>(M, a, a_row, b, k, out);
    case 3:
      return gemm_panel_rows_pairs<3>(M, a, a_row, b, k, out);
    case 4:
      return gemm_panel_rows_pairs<4>(M, a, a_row, b, k, out);
    default:
      __builtin_unreachable();
  }
}
#endif
