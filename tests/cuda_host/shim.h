// Plays the device for kernels compiled as plain C++ (csrc/cuda/platform.h). No speed is claimed for it; what it is for:
//
//   threads     One fiber for each thread of a block, all on the OS thread that launches. A fiber runs until it waits: for
//               the block at a barrier, for its warp at a shuffle or a matrix instruction. Who returns waits for nobody.
//   blocks      Settings::blocks_in_flight of them take turns. Under ThreadSanitizer fibers are threads of their own, which
//               only barriers order, so a race is reported whichever order they really ran in, between blocks too.
//   memory      Shared memory is NaN when a block starts. The destination of an asynchronous copy is NaN from its issue to
//               the wait that covers it.
//   errors      What a device would leave undefined throws Error out of the launch: a barrier or a warp primitive which not
//               all threads reach, a misaligned vector, more shared memory or threads than there are, writes behind the
//               block's shared memory.
//   mutations   Any barrier or wait of a kernel can be left out by its place in the source (Settings::removed), and launches
//               can be left unordered (Settings::overlap), so that tests can see whether anybody notices.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <source_location>
#include <stdexcept>
#include <type_traits>
#include <vector>

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace effops::cuda_host {

using Where = std::source_location;

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// ---- for tests: how kernels are run ----

enum class Order { forward, backward, shuffled };  // in which threads that could go on are chosen

// Where a kernel waits: what a mutation can leave out.
struct Site {
  const char* file = "";
  unsigned line = 0;

  friend bool operator==(const Site& a, const Site& b) { return a.line == b.line && !std::strcmp(a.file, b.file); }
};

// What a launch asks of a device.
struct Launched {
  const void* kernel;
  dim3 grid, block;
  std::size_t shared_bytes;
};

struct Settings {
  int blocks_in_flight = 0;  // of each launch; 0: as many as suit the sanitizer
  Order order = Order::forward;
  unsigned seed = 1;             // of Order::shuffled
  bool overlap = false;          // launches wait for `synchronize`, which runs them side by side, the last one first
  int shared_limit = 227 << 10;  // bytes of shared memory that a block is granted
  Site removed;                  // this barrier or wait is not there
  bool record = false;           // whether `sites` is filled; not for ThreadSanitizer, which would see that
  std::vector<Site> sites;       // the barriers and waits that were met
  bool dry = false;              // launches are put into `launched` and not run: pointers need not point anywhere
  std::vector<Launched> launched;
};

Settings& settings();

// An access to memory of some bytes, by a block of a launch; launches are counted from 0.
struct Access {
  unsigned launch, block;
  const void* address;
  int bytes;
  bool store;
};
// While `tracing`, what load_vec, store_vec and asynchronous copies touch is added to `accesses`. One element that a
// kernel reads or writes through a plain pointer is not seen.
extern bool tracing;
extern std::vector<Access> accesses;
void note_access(const void* address, int bytes, bool store);
inline void trace_access(const void* address, int bytes, bool store) {
  if (tracing) note_access(address, bytes, store);
}

// Runs what waits because of Settings::overlap.
void synchronize();

// ---- called by kernels through device.h ----

constexpr int kWarp = 32;

// What threadIdx, blockIdx, blockDim and gridDim are for the fiber that runs.
struct Place {
  dim3 thread, block, block_dim, grid_dim;
};
extern Place place;

[[noreturn]] void fail_misaligned(const void* address, std::size_t bytes, const Where& where);

inline void check_aligned(const void* address, std::size_t bytes, const Where& where) {
  if (reinterpret_cast<std::uintptr_t>(address) % bytes) fail_misaligned(address, bytes, where);
}

// The dynamic shared memory of the block that runs.
void* shared_memory();
void check_shared(const void* address, std::size_t bytes, const Where& where);

void barrier(Where where = Where::current());
void warp_barrier(Where where = Where::current());

// What a warp does together: each lane gives `bytes_in`, the last to arrive computes, each takes `bytes_out`.
enum class Collective { barrier, shuffle, load_matrix, mma };
struct Lanes {
  static constexpr int kBytes = 48;
  alignas(16) unsigned char in[kWarp][kBytes];
  alignas(16) unsigned char out[kWarp][kBytes];
};
using Compute = void (*)(Lanes&, int parameter);
struct Deposit {
  const void* from;
  std::size_t bytes;  // a multiple of 4
};
struct Receipt {
  void* to;
  std::size_t bytes;
};
void collective(Collective kind, Deposit given, Receipt taken, Compute compute, int parameter, const Where& where);

void shuffle_xor_lanes(Lanes& lanes, int mask);
void shuffle_down_lanes(Lanes& lanes, int delta);

template <class T>
T shuffle(T value, Compute compute, int parameter, const Where& where) {
  static_assert(std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8));
  T taken;
  collective(Collective::shuffle, {&value, sizeof(T)}, {&taken, sizeof(T)}, compute, parameter, where);
  return taken;
}
template <class T>
T shuffle_xor(T value, int mask, Where where = Where::current()) {
  return shuffle(value, shuffle_xor_lanes, mask, where);
}
template <class T>
T shuffle_down(T value, int delta, Where where = Where::current()) {
  return shuffle(value, shuffle_down_lanes, delta, where);
}

// ---- asynchronous copies ----

struct Copy {
  void* to;
  int bytes;
  int group;
  alignas(16) unsigned char from[16];
};
void remember_copy(const Copy& copy);            // gives it to the group that is next committed
bool next_landing(int groups_left, Copy& copy);  // takes out a copy that a wait covers; false: none is left
bool is_removed(const Where& where);
void copy_async_commit();

// Reads the source now, so that a sanitizer names the line that asked for it.
template <int kBytes>
void copy_async(void* shared, const void* global, int valid_bytes, Where where = Where::current()) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
  check_aligned(shared, kBytes, where);
  check_aligned(global, kBytes, where);
  check_shared(shared, kBytes, where);
  if (valid_bytes > 0) trace_access(global, valid_bytes, false);
  Copy copy{shared, kBytes, 0, {}};
  const auto* from = static_cast<const unsigned char*>(global);
  for (int i = 0; i < valid_bytes; ++i) copy.from[i] = from[i];
  std::memset(shared, 0xff, kBytes);
  remember_copy(copy);
}

constexpr int kAllGroups = -1;  // of copies without a commit too

inline void land(int groups_left) {
  Copy copy;
  while (next_landing(groups_left, copy)) std::memcpy(copy.to, copy.from, copy.bytes);
}

template <int kGroups>
void copy_async_wait(Where where = Where::current()) {
  if (!is_removed(where)) land(kGroups);
}

// ---- matrix fragments ----

void load_matrix_lanes(Lanes& lanes, int count);
void load_matrix_transposed_lanes(Lanes& lanes, int count);

// Each lane reads the row it names itself: to a sanitizer the access is its own.
template <int kCount>
void load_matrix(std::uint32_t (&loaded)[kCount], const void* row, Compute compute, const Where& where) {
  const unsigned lane =
      (place.thread.x + place.block_dim.x * (place.thread.y + place.block_dim.y * place.thread.z)) % kWarp;
  alignas(16) unsigned char elements[16] = {};
  if (lane < 8 * kCount) {
    check_aligned(row, 16, where);
    check_shared(row, 16, where);
    std::memcpy(elements, row, 16);
  }
  collective(Collective::load_matrix, {elements, 16}, {loaded, 4 * kCount}, compute, kCount, where);
}
inline void load_matrix_x4(std::uint32_t (&loaded)[4], const void* row, Where where = Where::current()) {
  load_matrix(loaded, row, load_matrix_lanes, where);
}
inline void load_matrix_x4_transposed(std::uint32_t (&loaded)[4], const void* row, Where where = Where::current()) {
  load_matrix(loaded, row, load_matrix_transposed_lanes, where);
}
inline void load_matrix_x2(std::uint32_t (&loaded)[2], const void* row, Where where = Where::current()) {
  load_matrix(loaded, row, load_matrix_lanes, where);
}
inline void load_matrix_x2_transposed(std::uint32_t (&loaded)[2], const void* row, Where where = Where::current()) {
  load_matrix(loaded, row, load_matrix_transposed_lanes, where);
}

void mma_m16n8k16(bool half, float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2],
                  const Where& where);
void mma_m16n8k8_tf32(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2],
                      Where where = Where::current());

// ---- conversions, round to nearest even ----

inline float bfloat16_to_float(std::uint16_t bits) {
  const std::uint32_t wide = static_cast<std::uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, 4);
  return value;
}
inline std::uint16_t float_to_bfloat16(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if (value != value) return 0x7fff;
  return static_cast<std::uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
// By way of float's own arithmetic: 2^112 moves the exponent where it belongs, subnormals included.
inline float half_to_float(std::uint16_t half) {
  const std::uint32_t magnitude = static_cast<std::uint32_t>(half & 0x7fff) << 13;
  float value;
  std::memcpy(&value, &magnitude, 4);
  value *= 0x1p112f;
  std::uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if ((half & 0x7c00) == 0x7c00) bits |= 0x7f800000;
  bits |= static_cast<std::uint32_t>(half & 0x8000) << 16;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline std::uint16_t float_to_half(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, 4);
  const auto sign = static_cast<std::uint16_t>(bits >> 16 & 0x8000);
  bits &= 0x7fffffff;
  if (bits > 0x7f800000) return 0x7fff;
  if (bits >= 0x477ff000) return sign | 0x7c00;  // 65520 and up round to infinity
  if (bits < 0x38800000) {                       // subnormal: float's addition rounds at the last place, 2^-24
    float magnitude;
    std::memcpy(&magnitude, &bits, 4);
    magnitude += 0.5f;
    std::memcpy(&bits, &magnitude, 4);
    return sign | static_cast<std::uint16_t>(bits - 0x3f000000);
  }
  return sign | static_cast<std::uint16_t>((bits - 0x38000000 + 0xfff + (bits >> 13 & 1)) >> 13);
}
inline std::uint32_t float_to_tf32(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if ((bits & 0x7f800000) == 0x7f800000) return value != value ? 0x7fffffff : bits;
  return (bits + 0x1000) & ~0x1fffu;  // ties away from zero, as cvt.rna
}

// ---- launching ----

// Some kernel, its type put aside.
struct Kernel {
  void (*function)();
  void (*call)(void (*function)(), const void* params);
};
void launch(Kernel kernel, dim3 grid, dim3 block, std::size_t shared_bytes, const void* params,
            std::size_t params_bytes, const Where& where);

template <class Params>
void launch(void (*function)(Params), dim3 grid, dim3 block, std::size_t shared_bytes,
            const std::type_identity_t<Params>& params, const Where& where) {
  static_assert(std::is_trivially_copyable_v<Params> && sizeof(Params) <= 4096);
  const Kernel kernel{reinterpret_cast<void (*)()>(function), [](void (*erased)(), const void* given) {
                        reinterpret_cast<void (*)(Params)>(erased)(*static_cast<const Params*>(given));
                        land(kAllGroups);
                      }};
  launch(kernel, grid, block, shared_bytes, &params, sizeof(params), where);
}

}  // namespace effops::cuda_host

inline const dim3& threadIdx = effops::cuda_host::place.thread;
inline const dim3& blockIdx = effops::cuda_host::place.block;
inline const dim3& blockDim = effops::cuda_host::place.block_dim;
inline const dim3& gridDim = effops::cuda_host::place.grid_dim;
