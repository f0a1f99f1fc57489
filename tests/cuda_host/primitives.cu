// Checks of device.h as the host run plays it, each against plain loops: `primitives NAME` runs one. Exit status 1 and a
// line on stderr where it fails.
#include <cmath>
#include <cstdio>
#include <functional>
#include <map>
#include <random>
#include <string>
#include <vector>

#include "csrc/cuda/device.h"
#include "csrc/cuda/launch.h"
#include "tests/cuda_host/buffer.h"

using namespace effops::cuda;
using effops::cuda_host::Buffer;
using effops::cuda_host::settings;
namespace host = effops::cuda_host;

namespace {

void require(bool holds, const std::string& what) {
  if (!holds) throw std::runtime_error(what);
}

// `call` must throw, and say so.
void require_error(const std::string& says, const std::function<void()>& call) {
  try {
    call();
  } catch (const host::Error& error) {
    require(std::string(error.what()).find(says) != std::string::npos,
            "expected an error about '" + says + "', got: " + error.what());
    std::printf("%s\n", error.what());
    return;
  }
  throw std::runtime_error("no error, expected one about '" + says + "'");
}

std::uint16_t bits_of(float value, std::true_type) { return from_float<half_t>(value).bits; }
std::uint16_t bits_of(float value, std::false_type) { return from_float<bfloat16_t>(value).bits; }

// ---- conversions: every value, and what lies between it and its neighbour ----

template <class T>
void check_rounding(int infinity) {
  const std::is_same<T, half_t> is_half;
  for (int bits = 0; bits < infinity; ++bits) {
    const float value = to_float(T{static_cast<std::uint16_t>(bits)});
    require(bits_of(value, is_half) == bits, "not its own nearest: " + std::to_string(bits));
    require(bits_of(-value, is_half) == (bits | 0x8000), "negative: " + std::to_string(bits));
    if (bits + 1 == infinity) break;
    const float next = to_float(T{static_cast<std::uint16_t>(bits + 1)});
    const float middle = 0.5f * value + 0.5f * next;
    require(value < next, "not monotonous at " + std::to_string(bits));
    require(bits_of(middle, is_half) == bits + bits % 2, "a tie not to even: " + std::to_string(bits));
    require(bits_of(std::nextafter(middle, 0.f), is_half) == bits, "below a tie: " + std::to_string(bits));
    require(bits_of(std::nextafter(middle, INFINITY), is_half) == bits + 1, "above a tie: " + std::to_string(bits));
  }
  require(to_float(T{static_cast<std::uint16_t>(infinity)}) == INFINITY, "infinity");
  require(bits_of(INFINITY, is_half) == infinity, "to infinity");
  require(std::isnan(to_float(from_float<T>(NAN))), "NaN");
  require(pack<T>(1.f, -2.f) == (from_float<T>(1.f).bits | std::uint32_t{from_float<T>(-2.f).bits} << 16), "pack");
}

void conversions() {
  check_rounding<half_t>(0x7c00);
  check_rounding<bfloat16_t>(0x7f80);
  require(from_float<half_t>(65519.f).bits == 0x7bff && from_float<half_t>(65520.f).bits == 0x7c00, "overflow");
  require(to_float(half_t{1}) == 0x1p-24f && to_float(half_t{0x3c00}) == 1.f, "absolute values");
  require(to_float(bfloat16_t{0x3f80}) == 1.f, "absolute values");
}

// ---- places ----

struct CountParams {
  int* visits;  // of every thread of the grid
};

EFFOPS_KERNEL(1024, 1) count_kernel(EFFOPS_PARAMS CountParams params) {
  const unsigned block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  const unsigned thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  params.visits[block * blockDim.x * blockDim.y * blockDim.z + thread] += 1;
}

void places() {
  const dim3 grid(3, 2, 5), block(7, 3, 2);
  Buffer<int> visits(3 * 2 * 5 * 7 * 3 * 2);
  for (std::size_t i = 0; i < visits.size(); ++i) visits[i] = 0;
  launch(count_kernel, {grid, block}, nullptr, {visits.data()});
  for (int visit : visits.span()) require(visit == 1, "a thread that ran " + std::to_string(visit) + " times");
  visits.check("visits");
}

// ---- barriers ----

struct SumParams {
  const float* input;
  float* output;  // one a block
  int live;       // threads beyond these return before the first barrier
};

// The sum of the live threads' values by a tree in shared memory.
EFFOPS_KERNEL(256, 1) tree_kernel(EFFOPS_PARAMS SumParams params) {
  const int thread = threadIdx.x, width = blockDim.x;
  float* values = shared_memory<float>();
  values[thread] = thread < params.live ? params.input[blockIdx.x * width + thread] : 0.f;
  for (int half = width / 2; half > 0; half /= 2) {
    barrier();
    if (thread < half) values[thread] += values[thread + half];
  }
  if (thread == 0) params.output[blockIdx.x] = values[0];
}

void tree_sum() {
  constexpr int kBlocks = 5, kThreads = 256;
  Buffer<float> input(kBlocks * kThreads), output(kBlocks);
  for (std::size_t i = 0; i < input.size(); ++i) input[i] = static_cast<float>(i % 97);
  for (auto order : {host::Order::forward, host::Order::backward, host::Order::shuffled}) {
    settings().order = order;
    launch(tree_kernel, {kBlocks, kThreads, kThreads * sizeof(float)}, nullptr,
           {input.data(), output.data(), kThreads});
    for (int block = 0; block < kBlocks; ++block) {
      float sum = 0;
      for (int i = 0; i < kThreads; ++i) sum += input[block * kThreads + i];
      require(output[block] == sum, "the sum of block " + std::to_string(block));
    }
  }
}

// Half of the threads are gone before the barrier, which must not wait for them.
EFFOPS_KERNEL(256, 1) early_return_kernel(EFFOPS_PARAMS SumParams params) {
  float* values = shared_memory<float>();
  const int thread = threadIdx.x;
  if (thread >= params.live) return;
  values[thread] = params.input[thread];
  barrier();
  params.output[thread] = values[params.live - 1 - thread];
}

void early_return() {
  for (int live : {1, 31, 32, 63, 64, 128}) {
    Buffer<float> input(live), output(live);
    for (int i = 0; i < live; ++i) input[i] = static_cast<float>(i);
    launch(early_return_kernel, {1, 128, sizeof(float) * live}, nullptr, {input.data(), output.data(), live});
    for (int i = 0; i < live; ++i) require(output[i] == static_cast<float>(live - 1 - i), "an element");
    output.check("output");
  }
}

struct TraceParams {
  std::vector<int>* trace;  // of blocks, whenever the first thread of one gets further
};

EFFOPS_KERNEL(32, 1) trace_kernel(EFFOPS_PARAMS TraceParams params) {
  for (int phase = 0; phase < 2; ++phase) {
    barrier();
    if (threadIdx.x == 0) params.trace->push_back(blockIdx.x);
  }
}

void blocks_take_turns() {
  std::vector<int> trace;
  launch(trace_kernel, {2, 32}, nullptr, {&trace});
  require(trace == std::vector<int>({0, 1, 0, 1}), "the blocks ran one after the other");
}

// ---- shuffles ----

struct ShuffleParams {
  double* output;  // [kinds, threads]
};

EFFOPS_KERNEL(64, 1) shuffle_kernel(EFFOPS_PARAMS ShuffleParams params) {
  const int thread = threadIdx.x;
  double* output = params.output + thread;
  for (int mask = 1; mask < 32; mask *= 2) {
    *output = shuffle_xor(static_cast<float>(thread), mask);
    output += blockDim.x;
  }
  for (int delta = 1; delta < 32; delta += 5) {
    *output = shuffle_down(thread, delta);
    output += blockDim.x;
  }
  *output = shuffle_xor(thread + 0x1p-40, 31);
}

void shuffles() {
  constexpr int kThreads = 64;
  Buffer<double> output(kThreads * (5 + 7 + 1));
  launch(shuffle_kernel, {1, kThreads}, nullptr, {output.data()});
  const double* got = output.data();
  for (int mask = 1; mask < 32; mask *= 2, got += kThreads) {
    for (int i = 0; i < kThreads; ++i) require(got[i] == (i ^ mask), "xor " + std::to_string(mask));
  }
  for (int delta = 1; delta < 32; delta += 5, got += kThreads) {
    for (int i = 0; i < kThreads; ++i) {
      require(got[i] == (i % 32 + delta < 32 ? i + delta : i), "down " + std::to_string(delta));
    }
  }
  for (int i = 0; i < kThreads; ++i) require(got[i] == (i ^ 31) + 0x1p-40, "eight bytes");
  output.check("output");
}

// ---- vectors ----

struct VectorParams {
  const float* input;
  float* output;
  int offset;
};

EFFOPS_KERNEL(32, 1) vector_kernel(EFFOPS_PARAMS VectorParams params) {
  const int at = 4 * threadIdx.x;
  const auto cached = load_vec_cached<float, 4>(params.input + at);
  const auto plain = load_vec<float, 4>(params.input + at + params.offset);
  Vec<float, 4> sum;
  for (int i = 0; i < 4; ++i) sum.v[i] = cached.v[i] + plain.v[i] + load_global_cached(params.input);
  store_vec<float, 4>(params.output + at, sum);
}

void vectors() {
  constexpr int kSize = 4 * 32;
  Buffer<float> input(kSize + 4), output(kSize);
  for (std::size_t i = 0; i < input.size(); ++i) input[i] = 1.f + i;
  launch(vector_kernel, {1, 32}, nullptr, {input.data(), output.data(), 4});
  for (int i = 0; i < kSize; ++i) require(output[i] == (1.f + i) + (5.f + i) + 1.f, "an element");
  output.check("output");
  for (int offset : {1, 2, 3}) {
    require_error("misaligned vector access: 16 bytes at an address that is " + std::to_string(4 * offset) +
                      " bytes off, thread (0, 0, 0) of block (0, 0, 0), " + __FILE__,
                  [&] { launch(vector_kernel, {1, 32}, nullptr, {input.data(), output.data(), offset}); });
  }
}

// ---- asynchronous copies ----

struct CopyParams {
  const float* input;
  float* output;  // [moments, 3 copies of 4]
};

EFFOPS_KERNEL(1, 1) copy_kernel(EFFOPS_PARAMS CopyParams params) {
  float* tile = shared_memory<float>();
  float* output = params.output;
  const auto look = [&] {
    for (int i = 0; i < 12; ++i) *output++ = tile[i];
  };
  for (int i = 0; i < 12; ++i) tile[i] = -1;
  copy_async<16>(tile, params.input, 16);
  copy_async_commit();
  copy_async<16>(tile + 4, params.input + 4, 8);
  copy_async_commit();
  copy_async<16>(tile + 8, nullptr, 0);
  look();
  copy_async_wait<1>();
  look();
  copy_async_wait<0>();
  look();
  copy_async_commit();
  copy_async_wait<0>();
  look();
}

void copies() {
  Buffer<float> input(6), output(4 * 12);
  for (int i = 0; i < 6; ++i) input[i] = 1.f + i;
  launch(copy_kernel, {1, 1, 12 * sizeof(float)}, nullptr, {input.data(), output.data()});
  const float kNothing = NAN;
  const float kFirst[] = {1, 2, 3, 4}, kSecond[] = {5, 6, 0, 0};
  for (int moment = 0; moment < 4; ++moment) {
    for (int i = 0; i < 12; ++i) {
      const float value = i < 4 ? kFirst[i] : i < 8 ? kSecond[i - 4] : 0;
      const float expected = i / 4 < moment ? value : kNothing;
      const float got = output[12 * moment + i];
      require(got == expected || (std::isnan(got) && std::isnan(expected)),
              "element " + std::to_string(i) + " at moment " + std::to_string(moment) + ": " + std::to_string(got));
    }
  }
}

EFFOPS_KERNEL(32, 1) copy_outside_kernel(EFFOPS_PARAMS CopyParams params) {
  copy_async<16>(shared_memory<float>() + 4 * threadIdx.x, params.input, 16);
}

EFFOPS_KERNEL(32, 1) copy_misaligned_kernel(EFFOPS_PARAMS CopyParams params) {
  copy_async<8>(shared_memory<float>(), params.input + 1, 8);
}

void copy_errors() {
  Buffer<float> input(4);
  require_error("not in shared memory: 16 bytes at offset 256 of a block that has 256",
                [&] { launch(copy_outside_kernel, {1, 32, 256}, nullptr, {input.data(), nullptr}); });
  require_error("misaligned vector access: 8 bytes",
                [&] { launch(copy_misaligned_kernel, {1, 32, 256}, nullptr, {input.data(), nullptr}); });
}

// ---- matrix fragments: by the formulas of device.h, and against a product ----

template <class T>
struct ProductParams {
  const T *a, *b;        // [16, depth], [depth, 8]
  const float* c;        // [16, 8]
  float* d;              // [16, 8]
  std::uint32_t* loads;  // [4 kinds, 4, 32] of the matrix loads
};

template <class T>
EFFOPS_KERNEL(32, 1)
product_kernel(EFFOPS_PARAMS ProductParams<T> params) {
  const int lane = threadIdx.x, g = lane / 4, t = lane % 4;
  T* a = shared_memory<T>();  // rows of 24: 16-byte aligned, and not what a dense matrix would be
  T* b = a + 16 * 24;
  for (int i = lane; i < 16 * 16; i += kWarp) a[i / 16 * 24 + i % 16] = params.a[i];
  for (int i = lane; i < 16 * 8; i += kWarp) b[i / 8 * 24 + i % 8] = params.b[i];
  barrier();

  std::uint32_t fragment_a[4], fragment_b[2], other[4], pair[2];
  load_matrix_x4(fragment_a, a + lane % 16 * 24 + lane / 16 * 8);
  load_matrix_x2_transposed(fragment_b, b + lane % 16 * 24);
  load_matrix_x4_transposed(other, a + lane % 16 * 24 + lane / 16 * 8);
  load_matrix_x2(pair, b + lane % 16 * 24);
  for (int i = 0; i < 4; ++i) {
    params.loads[i * kWarp + lane] = fragment_a[i];
    params.loads[(8 + i) * kWarp + lane] = other[i];
  }
  for (int i = 0; i < 2; ++i) {
    params.loads[(4 + i) * kWarp + lane] = fragment_b[i];
    params.loads[(12 + i) * kWarp + lane] = pair[i];
  }

  float d[4];
  for (int i = 0; i < 4; ++i) d[i] = params.c[(g + i / 2 * 8) * 8 + 2 * t + i % 2];
  mma_m16n8k16<T>(d, fragment_a, fragment_b);
  for (int i = 0; i < 4; ++i) params.d[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = d[i];
}

void check_product(const std::vector<double>& a, const std::vector<double>& b, const Buffer<float>& c,
                   const Buffer<float>& d, int depth) {
  for (int row = 0; row < 16; ++row) {
    for (int column = 0; column < 8; ++column) {
      double sum = c[row * 8 + column], size = std::abs(sum);
      for (int k = 0; k < depth; ++k) {
        const double term = a[row * depth + k] * b[k * 8 + column];
        sum += term;
        size += std::abs(term);
      }
      const double error = std::abs(d[row * 8 + column] - sum);
      require(error <= depth * 0x1p-24 * size,
              "element " + std::to_string(row) + ", " + std::to_string(column) + " is off by " + std::to_string(error));
    }
  }
}

template <class T>
void check_16_bit_product() {
  std::mt19937 random(5);
  std::normal_distribution<float> normal;
  Buffer<T> a(16 * 16), b(16 * 8);
  Buffer<float> c(16 * 8), d(16 * 8);
  Buffer<std::uint32_t> loads(16 * kWarp);
  std::vector<double> wide_a, wide_b;
  for (std::size_t i = 0; i < a.size(); ++i) wide_a.push_back(to_float(a[i] = from_float<T>(normal(random))));
  for (std::size_t i = 0; i < b.size(); ++i) wide_b.push_back(to_float(b[i] = from_float<T>(normal(random))));
  for (std::size_t i = 0; i < c.size(); ++i) c[i] = normal(random);
  launch(product_kernel<T>, {1, 32, 32 * 24 * sizeof(T)}, nullptr,
         {a.data(), b.data(), c.data(), d.data(), loads.data()});
  check_product(wide_a, wide_b, c, d, 16);

  const auto two = [](T low, T high) { return low.bits | static_cast<std::uint32_t>(high.bits) << 16; };
  for (int lane = 0; lane < kWarp; ++lane) {
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; ++i) {  // matrix i: rows from 8 * (i % 2), columns from 8 * (i / 2)
      const T* matrix = a.data() + i % 2 * 8 * 16 + i / 2 * 8;
      require(loads[i * kWarp + lane] == two(matrix[g * 16 + 2 * t], matrix[g * 16 + 2 * t + 1]), "x4");
      require(loads[(8 + i) * kWarp + lane] == two(matrix[2 * t * 16 + g], matrix[(2 * t + 1) * 16 + g]),
              "x4 transposed");
    }
    for (int i = 0; i < 2; ++i) {
      const T* matrix = b.data() + i * 8 * 8;
      require(loads[(4 + i) * kWarp + lane] == two(matrix[2 * t * 8 + g], matrix[(2 * t + 1) * 8 + g]),
              "x2 transposed");
      require(loads[(12 + i) * kWarp + lane] == two(matrix[g * 8 + 2 * t], matrix[g * 8 + 2 * t + 1]), "x2");
    }
  }
}

void half_product() { check_16_bit_product<half_t>(); }
void bfloat16_product() { check_16_bit_product<bfloat16_t>(); }

EFFOPS_KERNEL(32, 1) tf32_kernel(EFFOPS_PARAMS ProductParams<float> params) {
  const int lane = threadIdx.x, g = lane / 4, t = lane % 4;
  const auto bits = [](float value) { return to_tf32(value); };
  const float *a = params.a, *b = params.b;
  const std::uint32_t fragment_a[4] = {bits(a[g * 8 + t]), bits(a[(g + 8) * 8 + t]), bits(a[g * 8 + t + 4]),
                                       bits(a[(g + 8) * 8 + t + 4])};
  const std::uint32_t fragment_b[2] = {bits(b[t * 8 + g]), bits(b[(t + 4) * 8 + g])};
  float d[4];
  for (int i = 0; i < 4; ++i) d[i] = params.c[(g + i / 2 * 8) * 8 + 2 * t + i % 2];
  mma_m16n8k8_tf32(d, fragment_a, fragment_b);
  for (int i = 0; i < 4; ++i) params.d[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = d[i];
}

void tf32_product() {
  std::mt19937 random(5);
  std::normal_distribution<float> normal;
  Buffer<float> a(16 * 8), b(8 * 8), c(16 * 8), d(16 * 8);
  std::vector<double> wide_a, wide_b;
  const auto eleven_bits = [](float value) {  // 10 and the leading one; nearest, no ties in what is tested
    const double unit = std::ldexp(1.0, std::ilogb(value) - 10);
    return unit * std::round(value / unit);
  };
  for (std::size_t i = 0; i < a.size(); ++i) wide_a.push_back(eleven_bits(a[i] = normal(random)));
  for (std::size_t i = 0; i < b.size(); ++i) wide_b.push_back(eleven_bits(b[i] = normal(random)));
  for (std::size_t i = 0; i < c.size(); ++i) c[i] = normal(random);
  launch(tf32_kernel, {1, 32}, nullptr, {a.data(), b.data(), c.data(), d.data(), nullptr});
  check_product(wide_a, wide_b, c, d, 8);
}

// ---- what a device leaves undefined ----

struct DivergeParams {
  int how;
};

EFFOPS_KERNEL(64, 1) diverging_kernel(EFFOPS_PARAMS DivergeParams params) {
  const int thread = threadIdx.x;
  float d[4] = {};
  const std::uint32_t a[4] = {}, b[2] = {};
  if (params.how == 0) {  // two barriers
    if (thread < 40) {
      barrier();
    } else {
      barrier();
    }
  } else if (params.how == 1) {  // a barrier and a shuffle
    if (thread < 32) barrier();
    shuffle_xor(thread, 1);
    if (thread >= 32) barrier();
    if (thread == 3) barrier();
    shuffle_xor(thread, 1);
  } else if (params.how == 2) {  // a shuffle of half a warp, while the other half waits for the block
    if (thread % 32 < 16) shuffle_xor(thread, 1);
    barrier();
  } else if (params.how == 3) {  // two warp primitives
    if (thread % 32 < 16) {
      shuffle_xor(thread, 1);
    } else {
      warp_barrier();
    }
  } else if (params.how == 4) {  // a product without a lane
    if (thread == 7) return;
    mma_m16n8k16<half_t>(d, a, b);
  } else if (params.how == 5) {  // one shuffle by different distances
    shuffle_xor(thread, 1 << thread % 2);
  }
}

void divergence() {
  const auto diverge = [](int how) { return [how] { launch(diverging_kernel, {2, 64}, nullptr, {how}); }; };
  require_error("divergent barrier: thread (40, 0, 0) of block (0, 0, 0) is at", diverge(0));
  require_error("divergent", diverge(1));
  require_error("no thread of block (0, 0, 0) can go on; 32 wait at the barrier of", diverge(2));
  require_error("; 16 of warp 0 wait at a shuffle by 1", diverge(2));
  require_error("divergent warp: thread (16, 0, 0) of block (0, 0, 0) is at a warp barrier", diverge(3));
  require_error("divergent warp: a matrix product, ", diverge(4));
  require_error("divergent warp: thread (1, 0, 0) of block (0, 0, 0) is at a shuffle by 2", diverge(5));
  diverge(9)();  // and the next launch is as good as any
  tree_sum();
}

EFFOPS_KERNEL(32, 1) overrun_kernel(EFFOPS_PARAMS SumParams params) { shared_memory<float>()[params.live] = 1; }

// Under AddressSanitizer this is its report instead (test_cuda_host.py).
void shared_overrun() {
  for (int index : {8, -1, 60}) {
    require_error("wrote outside of its 32 bytes of shared memory",
                  [&] { launch(overrun_kernel, {1, 1, 32}, nullptr, {nullptr, nullptr, index}); });
  }
  launch(overrun_kernel, {1, 1, 32}, nullptr, {nullptr, nullptr, 7});
}

EFFOPS_KERNEL(32, 1) write_kernel(EFFOPS_PARAMS SumParams params) { params.output[params.live] = 1; }

void buffer_guards() {
  for (int index : {4, -1}) {
    Buffer<float> output(4);
    launch(write_kernel, {1, 1}, nullptr, {nullptr, output.data(), index});
    try {
      output.check("output");
    } catch (const std::runtime_error& error) {
      require(std::string(error.what()) == "written outside of the buffer: output", error.what());
      continue;
    }
    throw std::runtime_error("nobody noticed");
  }
}

void limits() {
  const auto start = [](dim3 grid, dim3 block, std::size_t shared_bytes) {
    return [=] { launch(diverging_kernel, {grid, block, shared_bytes}, nullptr, {9}); };
  };
  require_error("threads: a block of (1025, 1, 1) threads", start(1, 1025, 0));
  require_error("threads: ", start(1, dim3(32, 33), 0));
  require_error("threads: ", start(1, 0, 0));
  require_error("grid: ", start(0, 32, 0));
  require_error("grid: ", start(dim3(1, 65536), 32, 0));
  require_error("shared memory: a block of 232449 bytes, 232448 are granted", start(1, 32, 232449));
  start(1, dim3(32, 32), 232448)();
}

const std::map<std::string, void (*)()> kChecks = {
    {"conversions", conversions},
    {"places", places},
    {"tree_sum", tree_sum},
    {"early_return", early_return},
    {"blocks_take_turns", blocks_take_turns},
    {"shuffles", shuffles},
    {"vectors", vectors},
    {"copies", copies},
    {"copy_errors", copy_errors},
    {"half_product", half_product},
    {"bfloat16_product", bfloat16_product},
    {"tf32_product", tf32_product},
    {"divergence", divergence},
    {"shared_overrun", shared_overrun},
    {"buffer_guards", buffer_guards},
    {"limits", limits},
};

}  // namespace

int main(int count, char** arguments) {
  for (int i = 1; i < count; ++i) {
    try {
      settings() = {};
      kChecks.at(arguments[i])();
    } catch (const std::exception& error) {
      std::fprintf(stderr, "%s: %s\n", arguments[i], error.what());
      return 1;
    }
  }
  if (count == 1) {
    for (const auto& [name, check] : kChecks) std::printf("%s\n", name.c_str());
  }
}
