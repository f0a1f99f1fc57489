// Products of two tiles of shared memory, summed in the registers of a block of 256 threads.
//
//   sums[m][n] += sum over d of A(m, d) * B(n, d)         m < M, n < N, d < DEPTH
//
// BlockProduct<T, TF32, M, N> is one of these, with one interface (clear, add, store; sum, row_of and column_of of a
// thread's kSums sums, of which kTogether at a time stand in columns side by side):
//
//   TensorProduct<Fragments16>     half types: mma m16n8k16, operands by ldmatrix, float sums
//   TensorProduct<FragmentsTf32>   float rounded to TF32 where that is allowed: mma m16n8k8
//   FmaProduct                     float and double: (M / 16) x (N / 16) sums a thread, 16 x 16 threads
//
// A warp of a tensor product owns a rectangle of M / kWarpsM x N / kWarpsN sums. Rows of the tiles are padded (see
// padded_pitch): eight rows' 16-byte pieces, or eight rows' words of four columns, then lie in different banks.
#pragma once

#include <cstdint>
#include <type_traits>

#include "csrc/cuda/device.h"
#include "csrc/cuda/math.h"

namespace effops::cuda {

constexpr int kThreads = 256, kWarps = kThreads / 32;

// What a row of an operand's tile holds: all d of one m (or n), or all m (or n) of one d.
enum class RowHolds { sum, outer };

// Elements between the rows of a tile: an odd number of 16-byte pieces, so that ldmatrix meets no bank twice; tiles of
// 4-byte elements whose rows hold the outer axis are read eight columns of four rows at a time.
template <class T>
EFFOPS_HOST_DEVICE constexpr int padded_pitch(int columns, RowHolds holds = RowHolds::sum) {
  return columns + (sizeof(T) == 4 && holds == RowHolds::outer ? 8 : 16 / static_cast<int>(sizeof(T)));
}

// The rectangles of the warps: four side by side, or as many as there are 16 columns.
template <int M, int N>
struct WarpGrid {
  static constexpr int kColumns = N / 16 < 4 ? N / 16 : 4, kRows = kWarps / kColumns;
  static constexpr int kM = M / kRows, kN = N / kColumns;  // of one warp
  static_assert(kM % 16 == 0 && kN % 16 == 0, "a warp's rectangle is made of 16 x 16 sums");

  EFFOPS_DEVICE static int row() { return static_cast<int>(threadIdx.x) / 32 / kColumns * kM; }
  EFFOPS_DEVICE static int column() { return static_cast<int>(threadIdx.x) / 32 % kColumns * kN; }
};

// How the lanes of a warp hold the operands of one mma: 16 rows of A and twice 8 columns of B, kDepth elements deep. m,
// n, d: the first row, column and element of the sum.
//
// ldmatrix takes four 8 x 8 matrices, each by the addresses of eight lanes, and transposes them where rows of the tile
// hold the outer axis.
template <class T>
struct Fragments16 {
  using Element = T;
  static constexpr int kDepth = 16;

  // First the two matrices of d .. d + 7, then the two of d + 8 .. d + 15.
  template <RowHolds HOLDS>
  EFFOPS_DEVICE static void load_a(std::uint32_t (&a)[4], const T* tile, int pitch, int m, int d) {
    load<HOLDS>(a, tile, pitch, m + matrix() % 2 * 8, d + matrix() / 2 * 8);
  }

  // First the two matrices of n .. n + 7, then the two of n + 8 .. n + 15.
  template <RowHolds HOLDS>
  EFFOPS_DEVICE static void load_b(std::uint32_t (&b)[2][2], const T* tile, int pitch, int n, int d) {
    std::uint32_t both[4];
    load<HOLDS>(both, tile, pitch, n + matrix() / 2 * 8, d + matrix() % 2 * 8);
    EFFOPS_UNROLL
    for (int i = 0; i < 4; ++i) b[i / 2][i % 2] = both[i];
  }

  EFFOPS_DEVICE static void multiply(float (&sums)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]) {
    mma_m16n8k16<T>(sums, a, b);
  }

 private:
  // The one that this lane gives an address of.
  EFFOPS_DEVICE static int matrix() { return static_cast<int>(threadIdx.x) % 32 / 8; }

  template <RowHolds HOLDS>
  EFFOPS_DEVICE static void load(std::uint32_t (&fragment)[4], const T* tile, int pitch, int outer, int d) {
    const int row = static_cast<int>(threadIdx.x) % 8;
    if constexpr (HOLDS == RowHolds::sum) {
      load_matrix_x4(fragment, tile + (outer + row) * pitch + d);
    } else {
      load_matrix_x4_transposed(fragment, tile + (d + row) * pitch + outer);
    }
  }
};

struct FragmentsTf32 {
  using Element = float;
  static constexpr int kDepth = 8;

  template <RowHolds HOLDS>
  EFFOPS_DEVICE static void load_a(std::uint32_t (&a)[4], const float* tile, int pitch, int m, int d) {
    EFFOPS_UNROLL
    for (int i = 0; i < 4; ++i) a[i] = element<HOLDS>(tile, pitch, m + i % 2 * 8, d + i / 2 * 4);
  }

  template <RowHolds HOLDS>
  EFFOPS_DEVICE static void load_b(std::uint32_t (&b)[2][2], const float* tile, int pitch, int n, int d) {
    EFFOPS_UNROLL
    for (int i = 0; i < 4; ++i) b[i / 2][i % 2] = element<HOLDS>(tile, pitch, n + i / 2 * 8, d + i % 2 * 4);
  }

  EFFOPS_DEVICE static void multiply(float (&sums)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]) {
    mma_m16n8k8_tf32(sums, a, b);
  }

 private:
  // Lane l's of an 8 x 4 matrix: row l / 4, column l % 4.
  template <RowHolds HOLDS>
  EFFOPS_DEVICE static std::uint32_t element(const float* tile, int pitch, int outer, int d) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    outer += lane / 4;
    d += lane % 4;
    return to_tf32(tile[HOLDS == RowHolds::sum ? outer * pitch + d : d * pitch + outer]);
  }
};

// On the tensor cores, a warp a rectangle. Of lane l, sum i of an m16n8 product stands at row l / 4 + 8 * (i / 2) and
// column l % 4 * 2 + i % 2.
template <class Fragments, int M, int N>
class TensorProduct {
  using T = typename Fragments::Element;
  using Grid = WarpGrid<M, N>;
  static constexpr int kTilesM = Grid::kM / 16, kTilesN = Grid::kN / 8;

 public:
  static constexpr int kSums = kTilesM * kTilesN * 4, kTogether = 2;
  EFFOPS_DEVICE float sum(int i) const { return sums_[i / 4 / kTilesN][i / 4 % kTilesN][i % 4]; }
  EFFOPS_DEVICE static int row_of(int i) { return Grid::row() + i / 4 / kTilesN * 16 + lane() / 4 + i % 4 / 2 * 8; }
  EFFOPS_DEVICE static int column_of(int i) { return Grid::column() + i / 4 % kTilesN * 8 + lane() % 4 * 2 + i % 2; }

  EFFOPS_DEVICE void clear() {
    EFFOPS_UNROLL
    for (int i = 0; i < kTilesM; ++i) {
      EFFOPS_UNROLL
      for (int j = 0; j < kTilesN; ++j) fill(sums_[i][j], 0.f);
    }
  }

  template <RowHolds A, RowHolds B, int DEPTH>
  EFFOPS_DEVICE void add(const T* a, int pitch_a, const T* b, int pitch_b) {
    static_assert(DEPTH % Fragments::kDepth == 0);
    EFFOPS_UNROLL
    for (int d = 0; d < DEPTH; d += Fragments::kDepth) {
      std::uint32_t of_a[kTilesM][4];
      EFFOPS_UNROLL
      for (int i = 0; i < kTilesM; ++i) {
        Fragments::template load_a<A>(of_a[i], a, pitch_a, Grid::row() + i * 16, d);
      }
      EFFOPS_UNROLL
      for (int j = 0; j < kTilesN; j += 2) {
        std::uint32_t of_b[2][2];
        Fragments::template load_b<B>(of_b, b, pitch_b, Grid::column() + j * 8, d);
        EFFOPS_UNROLL
        for (int i = 0; i < kTilesM; ++i) {
          Fragments::multiply(sums_[i][j], of_a[i], of_b[0]);
          Fragments::multiply(sums_[i][j + 1], of_a[i], of_b[1]);
        }
      }
    }
  }

  EFFOPS_DEVICE void store(float* tile, int pitch) const {
    float* to = tile + (Grid::row() + lane() / 4) * pitch + Grid::column() + lane() % 4 * 2;
    EFFOPS_UNROLL
    for (int i = 0; i < kTilesM; ++i) {
      EFFOPS_UNROLL
      for (int j = 0; j < kTilesN; ++j) {
        EFFOPS_UNROLL
        for (int e = 0; e < 4; ++e) to[(i * 16 + e / 2 * 8) * pitch + j * 8 + e % 2] = sums_[i][j][e];
      }
    }
  }

 private:
  EFFOPS_DEVICE static int lane() { return static_cast<int>(threadIdx.x) % 32; }

  float sums_[kTilesM][kTilesN][4];
};

// Thread (y, x) of 16 x 16 owns the sums of rows y, y + 16, ... and columns x, x + 16, ...
template <class T, int M, int N>
class FmaProduct {
  static constexpr int kRows = M / 16, kColumns = N / 16;

 public:
  static constexpr int kSums = kRows * kColumns, kTogether = 1;
  EFFOPS_DEVICE T sum(int i) const { return sums_[i / kColumns][i % kColumns]; }
  EFFOPS_DEVICE static int row_of(int i) { return y() + i / kColumns * 16; }
  EFFOPS_DEVICE static int column_of(int i) { return x() + i % kColumns * 16; }

  EFFOPS_DEVICE void clear() {
    EFFOPS_UNROLL
    for (int i = 0; i < kRows; ++i) {
      EFFOPS_UNROLL
      for (int j = 0; j < kColumns; ++j) sums_[i][j] = 0;
    }
  }

  template <RowHolds A, RowHolds B, int DEPTH>
  EFFOPS_DEVICE void add(const T* a, int pitch_a, const T* b, int pitch_b) {
    // 16 bytes of each row at a time where both tiles' rows go along the sum.
    constexpr int kStep = A == RowHolds::sum && B == RowHolds::sum ? 16 / static_cast<int>(sizeof(T)) : 1;
    // Sums over pixels have thousands of terms, and one chain of roundings would be far less exact than torch's: each
    // tile's pixels are summed apart. Sums over channels are short, and their tiles leave no registers for it.
    constexpr bool kApart = sizeof(T) == 4 && A == RowHolds::outer && B == RowHolds::outer;
    T apart[kApart ? kRows : 1][kApart ? kColumns : 1] = {};
    // Unrolled whole, sums apart from others would have more loads in flight than registers for them.
    constexpr int kChunk = kApart ? 8 * kStep : DEPTH;
    static_assert(DEPTH % kChunk == 0);
    EFFOPS_NO_UNROLL
    for (int first = 0; first < DEPTH; first += kChunk) {
      EFFOPS_UNROLL
      for (int d = first; d < first + kChunk; d += kStep) {
        Vec<T, kStep> of_a[kRows];
        EFFOPS_UNROLL
        for (int i = 0; i < kRows; ++i) of_a[i] = elements<A, kStep>(a, pitch_a, y() + i * 16, d);
        EFFOPS_UNROLL
        for (int j = 0; j < kColumns; ++j) {
          const Vec<T, kStep> of_b = elements<B, kStep>(b, pitch_b, x() + j * 16, d);
          EFFOPS_UNROLL
          for (int i = 0; i < kRows; ++i) {
            EFFOPS_UNROLL
            for (int e = 0; e < kStep; ++e) {
              T& sum = kApart ? apart[kApart ? i : 0][kApart ? j : 0] : sums_[i][j];
              sum += of_a[i].v[e] * of_b.v[e];
            }
          }
        }
      }
    }
    if constexpr (kApart) {
      EFFOPS_UNROLL
      for (int i = 0; i < kRows; ++i) {
        EFFOPS_UNROLL
        for (int j = 0; j < kColumns; ++j) sums_[i][j] += apart[i][j];
      }
    }
  }

  EFFOPS_DEVICE void store(T* tile, int pitch) const {
    EFFOPS_UNROLL
    for (int i = 0; i < kRows; ++i) {
      EFFOPS_UNROLL
      for (int j = 0; j < kColumns; ++j) tile[(y() + i * 16) * pitch + x() + j * 16] = sums_[i][j];
    }
  }

 private:
  EFFOPS_DEVICE static int y() { return static_cast<int>(threadIdx.x) / 16; }
  EFFOPS_DEVICE static int x() { return static_cast<int>(threadIdx.x) % 16; }

  template <RowHolds HOLDS, int COUNT>
  EFFOPS_DEVICE static Vec<T, COUNT> elements(const T* tile, int pitch, int outer, int d) {
    if constexpr (COUNT > 1) {
      return load_vec<T, COUNT>(tile + outer * pitch + d);
    } else {
      return {{tile[HOLDS == RowHolds::sum ? outer * pitch + d : d * pitch + outer]}};
    }
  }

  T sums_[kRows][kColumns];
};

template <class T, bool TF32, int M, int N>
using BlockProduct =
    std::conditional_t<sizeof(T) == 2, TensorProduct<Fragments16<T>, M, N>,
                       std::conditional_t<TF32, TensorProduct<FragmentsTf32, M, N>, FmaProduct<T, M, N>>>;

}  // namespace effops::cuda
