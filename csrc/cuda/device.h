// Device primitives: one small wrapper for each instruction that C++ has no word for. Under nvcc they are intrinsics and
// PTX that sm_80 has; on the host tests/cuda_host/ emulates and checks them. Fragment layouts are those of the PTX ISA,
// "Matrix Fragments for mma.m16n8k16 / m16n8k8": lane = 4 * g + t holds
//
//   d[0..1]  row g,     columns 2t, 2t+1        a[0] row g,   a[1] row g+8: columns 2t, 2t+1 (tf32: column t)
//   d[2..3]  row g + 8, columns 2t, 2t+1        a[2] row g,   a[3] row g+8: columns 2t+8, 2t+9 (tf32: t+4)
//                                               b[0], b[1] column g: rows 2t, 2t+1 and 2t+8, 2t+9 (tf32: t and t+4)
#pragma once

#include <cstring>
#include <type_traits>

#include "csrc/cuda/platform.h"

namespace effops::cuda {

// ---- conversions: round to nearest, ties to even ----

EFFOPS_DEVICE float to_float(float value) { return value; }
template <class T>
EFFOPS_DEVICE T from_float(float value);
template <>
EFFOPS_DEVICE float from_float<float>(float value) {
  return value;
}

#ifdef EFFOPS_CUDA_HOST

EFFOPS_DEVICE float to_float(half_t value) { return cuda_host::half_to_float(value.bits); }
EFFOPS_DEVICE float to_float(bfloat16_t value) { return cuda_host::bfloat16_to_float(value.bits); }
template <>
EFFOPS_DEVICE half_t from_float<half_t>(float value) {
  return {cuda_host::float_to_half(value)};
}
template <>
EFFOPS_DEVICE bfloat16_t from_float<bfloat16_t>(float value) {
  return {cuda_host::float_to_bfloat16(value)};
}
// Two values in one register, the first in the low half.
template <class T>
EFFOPS_DEVICE std::uint32_t pack(float low, float high) {
  return from_float<T>(low).bits | static_cast<std::uint32_t>(from_float<T>(high).bits) << 16;
}
EFFOPS_DEVICE std::uint32_t to_tf32(float value) { return cuda_host::float_to_tf32(value); }

#else

EFFOPS_DEVICE float to_float(half_t value) { return __half2float(__ushort_as_half(value.bits)); }
EFFOPS_DEVICE float to_float(bfloat16_t value) { return __bfloat162float(__ushort_as_bfloat16(value.bits)); }
template <>
EFFOPS_DEVICE half_t from_float<half_t>(float value) {
  return {__half_as_ushort(__float2half_rn(value))};
}
template <>
EFFOPS_DEVICE bfloat16_t from_float<bfloat16_t>(float value) {
  return {__bfloat16_as_ushort(__float2bfloat16_rn(value))};
}
// Two values in one register, the first in the low half.
template <class T>
EFFOPS_DEVICE std::uint32_t pack(float low, float high) {
  static_assert(std::is_same_v<T, half_t> || std::is_same_v<T, bfloat16_t>);
  std::uint32_t packed;
  if constexpr (std::is_same_v<T, half_t>) {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  }
  return packed;
}
// The one rounding to nearest that sm_80 has for it: ties away from zero.
EFFOPS_DEVICE std::uint32_t to_tf32(float value) {
  std::uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
  return bits;
}

#endif

// ---- the larger of two values, or NaN where one of them is ----

EFFOPS_DEVICE double larger_or_nan(double a, double b) { return b > a || b != b ? b : a; }

#ifdef EFFOPS_CUDA_HOST

EFFOPS_DEVICE float larger_or_nan(float a, float b) { return b > a || b != b ? b : a; }

#else

EFFOPS_DEVICE float larger_or_nan(float a, float b) {
  float larger;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(larger) : "f"(a), "f"(b));
  return larger;
}

#endif

// ---- memory: one access of sizeof(T) * N bytes, to which the address must be aligned ----

template <class T, int N>
struct alignas(sizeof(T) * N) Vec {
  T v[N];
};

// Shared memory starts anew with every block: NaN in the host run, anything on a device. The one dynamic array.
template <class T>
EFFOPS_DEVICE T* shared_memory();

#ifdef EFFOPS_CUDA_HOST

template <class T, int N>
EFFOPS_DEVICE Vec<T, N> load_vec(const T* address, cuda_host::Where where = cuda_host::Where::current()) {
  static_assert(sizeof(T) * N <= 16);
  cuda_host::check_aligned(address, sizeof(T) * N, where);
  cuda_host::trace_access(address, sizeof(T) * N, false);
  Vec<T, N> loaded;
  std::memcpy(&loaded, address, sizeof(loaded));
  return loaded;
}
template <class T, int N>
EFFOPS_DEVICE void store_vec(T* address, const Vec<T, N>& values,
                             cuda_host::Where where = cuda_host::Where::current()) {
  static_assert(sizeof(T) * N <= 16);
  cuda_host::check_aligned(address, sizeof(T) * N, where);
  cuda_host::trace_access(address, sizeof(T) * N, true);
  std::memcpy(address, &values, sizeof(values));
}
// Through the read-only cache: of memory that nothing writes while the kernel runs.
template <class T, int N>
EFFOPS_DEVICE Vec<T, N> load_vec_cached(const T* address, cuda_host::Where where = cuda_host::Where::current()) {
  return load_vec<T, N>(address, where);
}
template <class T>
EFFOPS_DEVICE T load_global_cached(const T* address) {
  return *address;
}
template <class T>
EFFOPS_DEVICE T* shared_memory() {
  return static_cast<T*>(cuda_host::shared_memory());
}

#else

namespace detail {

// The register type of an access.
template <int kBytes>
struct Access;
template <>
struct Access<1> {
  using type = unsigned char;
};
template <>
struct Access<2> {
  using type = unsigned short;
};
template <>
struct Access<4> {
  using type = unsigned int;
};
template <>
struct Access<8> {
  using type = uint2;
};
template <>
struct Access<16> {
  using type = uint4;
};

template <class To, class From>
EFFOPS_DEVICE To reinterpret(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

extern __shared__ uint4 block_memory[];

}  // namespace detail

template <class T, int N>
EFFOPS_DEVICE Vec<T, N> load_vec(const T* address) {
  using Raw = typename detail::Access<sizeof(T) * N>::type;
  const Raw raw = *reinterpret_cast<const Raw*>(address);  // a value: a copy straight from memory would go byte by byte
  return detail::reinterpret<Vec<T, N> >(raw);
}
template <class T, int N>
EFFOPS_DEVICE void store_vec(T* address, const Vec<T, N>& values) {
  using Raw = typename detail::Access<sizeof(T) * N>::type;
  *reinterpret_cast<Raw*>(address) = detail::reinterpret<Raw>(values);
}
// Through the read-only cache: of memory that nothing writes while the kernel runs.
template <class T, int N>
EFFOPS_DEVICE Vec<T, N> load_vec_cached(const T* address) {
  using Raw = typename detail::Access<sizeof(T) * N>::type;
  return detail::reinterpret<Vec<T, N> >(__ldg(reinterpret_cast<const Raw*>(address)));
}
template <class T>
EFFOPS_DEVICE T load_global_cached(const T* address) {
  using Raw = typename detail::Access<sizeof(T)>::type;
  return detail::reinterpret<T>(__ldg(reinterpret_cast<const Raw*>(address)));
}
template <class T>
EFFOPS_DEVICE T* shared_memory() {
  return reinterpret_cast<T*>(detail::block_memory);
}

#endif

// ---- threads of a block, lanes of a warp ----

#ifdef EFFOPS_CUDA_HOST

using cuda_host::barrier;
using cuda_host::shuffle_down;
using cuda_host::shuffle_xor;
using cuda_host::warp_barrier;

#else

// Every thread of the block that has not returned gets here before any goes on, with what they wrote.
EFFOPS_DEVICE void barrier() { __syncthreads(); }
// The same for a warp. A shuffle alone orders no memory.
EFFOPS_DEVICE void warp_barrier() { __syncwarp(); }
// The value of lane ^ mask, of lane + delta (one's own beyond the last lane); 4 or 8 bytes, all lanes take part.
template <class T>
EFFOPS_DEVICE T shuffle_xor(T value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}
template <class T>
EFFOPS_DEVICE T shuffle_down(T value, int delta) {
  return __shfl_down_sync(0xffffffffu, value, delta);
}

#endif

// ---- asynchronous copies from global to shared memory ----

#ifdef EFFOPS_CUDA_HOST

using cuda_host::copy_async;
using cuda_host::copy_async_commit;
using cuda_host::copy_async_wait;

#else

namespace detail {

EFFOPS_DEVICE std::uint32_t shared_address(const void* pointer) {
  return static_cast<std::uint32_t>(__cvta_generic_to_shared(pointer));
}

}  // namespace detail

// Copies `valid_bytes` and writes zeros behind them, kBytes in all (4, 8, 16: what both addresses are aligned to). Where
// valid_bytes is 0 nothing is read. The copy is there for this thread after the wait that covers it, for the others after
// a barrier that follows. Sixteen bytes go past the first-level cache.
template <int kBytes>
EFFOPS_DEVICE void copy_async(void* shared, const void* global, int valid_bytes) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
  const std::uint32_t to = detail::shared_address(shared);
  if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(valid_bytes) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(to), "l"(global), "n"(kBytes), "r"(valid_bytes)
                 : "memory");
  }
}
// Makes one group of the copies issued since the last commit.
EFFOPS_DEVICE void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits for all groups but the last kGroups; copies without a commit are in no group.
template <int kGroups>
EFFOPS_DEVICE void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroups) : "memory");
}

#endif

// ---- tensor cores: all 32 lanes take part; d += a * b, sums in float ----

#ifdef EFFOPS_CUDA_HOST

using cuda_host::load_matrix_x2;
using cuda_host::load_matrix_x2_transposed;
using cuda_host::load_matrix_x4;
using cuda_host::load_matrix_x4_transposed;
using cuda_host::mma_m16n8k8_tf32;

template <class T>
EFFOPS_DEVICE void mma_m16n8k16(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2],
                                cuda_host::Where where = cuda_host::Where::current()) {
  static_assert(std::is_same_v<T, half_t> || std::is_same_v<T, bfloat16_t>);
  cuda_host::mma_m16n8k16(std::is_same_v<T, half_t>, d, a, b, where);
}

#else

// Matrices of 8 x 8 16-bit elements from shared memory: lane 8 * i + j gives the 16-byte aligned address of row j of
// matrix i, lane 4 * g + t gets elements 2t and 2t+1 of row g (transposed: of column g) of matrix i in loaded[i].
// The addresses of lanes 16 and up are not used by the x2 forms.
EFFOPS_DEVICE void load_matrix_x4(std::uint32_t (&loaded)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(loaded[0]), "=r"(loaded[1]), "=r"(loaded[2]), "=r"(loaded[3])
               : "r"(detail::shared_address(row))
               : "memory");
}
EFFOPS_DEVICE void load_matrix_x4_transposed(std::uint32_t (&loaded)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(loaded[0]), "=r"(loaded[1]), "=r"(loaded[2]), "=r"(loaded[3])
               : "r"(detail::shared_address(row))
               : "memory");
}
EFFOPS_DEVICE void load_matrix_x2(std::uint32_t (&loaded)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(loaded[0]), "=r"(loaded[1])
               : "r"(detail::shared_address(row))
               : "memory");
}
EFFOPS_DEVICE void load_matrix_x2_transposed(std::uint32_t (&loaded)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(loaded[0]), "=r"(loaded[1])
               : "r"(detail::shared_address(row))
               : "memory");
}

// half_t or bfloat16_t, two to a register, the lower column (of b: row) in the low half.
template <class T>
EFFOPS_DEVICE void mma_m16n8k16(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]) {
  static_assert(std::is_same_v<T, half_t> || std::is_same_v<T, bfloat16_t>);
  if constexpr (std::is_same_v<T, half_t>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
        "%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, "
        "%2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
}
// Operands from to_tf32; the hardware drops the low 13 bits of anything else.
EFFOPS_DEVICE void mma_m16n8k8_tf32(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

#endif

}  // namespace effops::cuda
