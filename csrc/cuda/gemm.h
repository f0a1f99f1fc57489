// Products of two tiles of shared memory, summed in the registers of a block of 256 threads.
//
//   sums[m][n] += sum over d of A(m, d) * B(n, d)         m < M, n < N, d < DEPTH
//
// BlockProduct<T, TF32, M, N> is one of three classes with one interface (clear, add, store):
//
//   TensorProduct16    half types: mma m16n8k16, operands by ldmatrix, float sums
//   TensorProductTf32  float rounded to TF32 where that is allowed: mma m16n8k8
//   FmaProduct         float and double: (M / 16) x (N / 16) sums a thread, 16 x 16 threads
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

// Where the fragments of an m16n8 product keep their sums: of lane l, sum i stands at row l / 4 + 8 * (i / 2) and
// column l % 4 * 2 + i % 2.
template <int M, int N>
class FragmentSums {
 public:
  EFFOPS_DEVICE void clear() {
    EFFOPS_UNROLL
    for (int i = 0; i < kTilesM; ++i) {
      EFFOPS_UNROLL
      for (int j = 0; j < kTilesN; ++j) {
        EFFOPS_UNROLL
        for (int e = 0; e < 4; ++e) sums_[i][j][e] = 0;
      }
    }
  }

  EFFOPS_DEVICE void store(float* tile, int pitch) const {
    const int lane = threadIdx.x % 32;
    float* to = tile + (Grid::row() + lane / 4) * pitch + Grid::column() + lane % 4 * 2;
    EFFOPS_UNROLL
    for (int i = 0; i < kTilesM; ++i) {
      EFFOPS_UNROLL
      for (int j = 0; j < kTilesN; ++j) {
        EFFOPS_UNROLL
        for (int e = 0; e < 4; ++e) to[(i * 16 + e / 2 * 8) * pitch + j * 8 + e % 2] = sums_[i][j][e];
      }
    }
  }

 protected:
  using Grid = WarpGrid<M, N>;
  static constexpr int kTilesM = Grid::kM / 16, kTilesN = Grid::kN / 8;
  float sums_[kTilesM][kTilesN][4];
};

template <class T, int M, int N>
class TensorProduct16 : public FragmentSums<M, N> {
  using Base = FragmentSums<M, N>;
  using typename Base::Grid;

 public:
  template <RowHolds A, RowHolds B, int DEPTH>
  EFFOPS_DEVICE void add(const T* a, int pitch_a, const T* b, int pitch_b) {
    static_assert(DEPTH % 16 == 0);
    EFFOPS_UNROLL
    for (int d = 0; d < DEPTH; d += 16) {
      std::uint32_t of_a[Base::kTilesM][4];
      EFFOPS_UNROLL
      for (int i = 0; i < Base::kTilesM; ++i) load_a<A>(of_a[i], a, pitch_a, Grid::row() + i * 16, d);
      EFFOPS_UNROLL
      for (int j = 0; j < Base::kTilesN; j += 2) {
        std::uint32_t of_b[4];
        load_b<B>(of_b, b, pitch_b, Grid::column() + j * 8, d);
        const std::uint32_t left[2] = {of_b[0], of_b[1]}, right[2] = {of_b[2], of_b[3]};
        EFFOPS_UNROLL
        for (int i = 0; i < Base::kTilesM; ++i) {
          mma_m16n8k16<T>(this->sums_[i][j], of_a[i], left);
          mma_m16n8k16<T>(this->sums_[i][j + 1], of_a[i], right);
        }
      }
    }
  }

 private:
  // Rows m .. m + 15 and d .. d + 15. Four 8 x 8 matrices, each given by the addresses of eight lanes: first the two of
  // d .. d + 7, then the two of d + 8 .. d + 15.
  template <RowHolds HOLDS>
  EFFOPS_DEVICE static void load_a(std::uint32_t (&fragment)[4], const T* tile, int pitch, int m, int d) {
    const int lane = threadIdx.x % 32, matrix = lane / 8, row = lane % 8;
    const int lower = matrix % 2 * 8, later = matrix / 2 * 8;
    if constexpr (HOLDS == RowHolds::sum) {
      load_matrix_x4(fragment, tile + (m + lower + row) * pitch + d + later);
    } else {
      load_matrix_x4_transposed(fragment, tile + (d + later + row) * pitch + m + lower);
    }
  }

  // Columns n .. n + 15: the two matrices of n .. n + 7, d before d + 8, then those of n + 8 .. n + 15.
  template <RowHolds HOLDS>
  EFFOPS_DEVICE static void load_b(std::uint32_t (&fragment)[4], const T* tile, int pitch, int n, int d) {
    const int lane = threadIdx.x % 32, matrix = lane / 8, row = lane % 8;
    const int later = matrix % 2 * 8, lower = matrix / 2 * 8;
    if constexpr (HOLDS == RowHolds::sum) {
      load_matrix_x4(fragment, tile + (n + lower + row) * pitch + d + later);
    } else {
      load_matrix_x4_transposed(fragment, tile + (d + later + row) * pitch + n + lower);
    }
  }
};

template <int M, int N>
class TensorProductTf32 : public FragmentSums<M, N> {
  using Base = FragmentSums<M, N>;
  using typename Base::Grid;

 public:
  template <RowHolds A, RowHolds B, int DEPTH>
  EFFOPS_DEVICE void add(const float* a, int pitch_a, const float* b, int pitch_b) {
    static_assert(DEPTH % 8 == 0);
    const int lane = threadIdx.x % 32, outer = lane / 4, inner = lane % 4;
    EFFOPS_UNROLL
    for (int d = 0; d < DEPTH; d += 8) {
      std::uint32_t of_a[Base::kTilesM][4];
      EFFOPS_UNROLL
      for (int i = 0; i < Base::kTilesM; ++i) {
        EFFOPS_UNROLL
        for (int e = 0; e < 4; ++e) {
          of_a[i][e] = element<A>(a, pitch_a, Grid::row() + i * 16 + outer + e % 2 * 8, d + inner + e / 2 * 4);
        }
      }
      EFFOPS_UNROLL
      for (int j = 0; j < Base::kTilesN; ++j) {
        const int n = Grid::column() + j * 8 + outer;
        const std::uint32_t of_b[2] = {element<B>(b, pitch_b, n, d + inner), element<B>(b, pitch_b, n, d + inner + 4)};
        EFFOPS_UNROLL
        for (int i = 0; i < Base::kTilesM; ++i) mma_m16n8k8_tf32(this->sums_[i][j], of_a[i], of_b);
      }
    }
  }

 private:
  template <RowHolds HOLDS>
  EFFOPS_DEVICE static std::uint32_t element(const float* tile, int pitch, int outer, int d) {
    return to_tf32(tile[HOLDS == RowHolds::sum ? outer * pitch + d : d * pitch + outer]);
  }
};

// Thread (y, x) of 16 x 16 owns the sums of rows y, y + 16, ... and columns x, x + 16, ...
template <class T, int M, int N>
class FmaProduct {
  static constexpr int kRows = M / 16, kColumns = N / 16;

 public:
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
    EFFOPS_UNROLL
    for (int d = 0; d < DEPTH; d += kStep) {
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
using BlockProduct = std::conditional_t<sizeof(T) == 2, TensorProduct16<T, M, N>,
                                        std::conditional_t<TF32, TensorProductTf32<M, N>, FmaProduct<T, M, N>>>;

}  // namespace effops::cuda
