// What this machine can do: FMA peak in fp32 and bf16 (dot product instructions), and copy bandwidth of memory and of the
// last cache. Prints one line of JSON.
// Built by benchmarks/probe.py at benchmark time: g++ -O3 -march=native -fopenmp probe.cpp -o probe;  usage: probe THREADS
#include <omp.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64, kChains = 24;  // 32 registers; 24 chains hide 4 cycles of latency on two FMA ports
#elif defined(__AVX__)
constexpr int kVectorBytes = 32, kChains = 12;  // 16 registers
#else
constexpr int kVectorBytes = 16, kChains = 12;
#endif
typedef float Vector __attribute__((vector_size(kVectorBytes)));
constexpr int kLanes = kVectorBytes / sizeof(float);
constexpr int kRepeats = 5;

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

// Chains of dependent multiply-adds that live in registers. The multiplier is read through the asm so nothing folds.
void fma_chains(long steps, float* sink) {
  Vector acc[kChains], a, b;
  for (int i = 0; i < kLanes; ++i) a[i] = 0.999f, b[i] = 1e-3f;
  for (int i = 0; i < kChains; ++i) acc[i] = b * static_cast<float>(i);
  for (long s = 0; s < steps; ++s) {
    asm volatile("" : "+x"(a), "+x"(b));
#pragma GCC unroll 24
    for (int i = 0; i < kChains; ++i) acc[i] = acc[i] * a + b;
  }
  Vector total = acc[0];
  for (int i = 1; i < kChains; ++i) total += acc[i];
  sink[0] = total[0];
}

#ifdef __AVX512BF16__
void bf16_chains(long steps, float* sink) {
  __m512 acc[kChains];
  __m512bh a = (__m512bh)_mm512_set1_epi16(0x3c00), b = (__m512bh)_mm512_set1_epi16(0x3c00);
  for (int i = 0; i < kChains; ++i) acc[i] = _mm512_set1_ps(static_cast<float>(i));
  for (long s = 0; s < steps; ++s) {
    asm volatile("" : "+v"(a), "+v"(b));
#pragma GCC unroll 24
    for (int i = 0; i < kChains; ++i) acc[i] = _mm512_dpbf16_ps(acc[i], a, b);
  }
  __m512 total = acc[0];
  for (int i = 1; i < kChains; ++i) total = _mm512_add_ps(total, acc[i]);
  sink[0] = _mm512_cvtss_f32(total);
}
#endif

// GFLOP/s of `chains` on all threads together: best of a few runs of about 40 ms.
template <class Chains>
double peak(Chains chains, int threads, double flops_per_step) {
  std::vector<float> sinks(static_cast<size_t>(threads) * 64);
  auto run = [&](long steps) {
    double start = 0;
#pragma omp parallel num_threads(threads)
    {
#pragma omp barrier
#pragma omp master
      start = now();
      chains(steps, &sinks[static_cast<size_t>(omp_get_thread_num()) * 64]);
    }
    return now() - start;
  };
  run(100000);
  const long steps = std::max(100000L, static_cast<long>(100000 * 0.04 / run(100000)));
  double best = 0;
  for (int r = 0; r < kRepeats; ++r) best = std::max(best, steps * flops_per_step * threads / run(steps));
  return best * 1e-9;
}

// GB/s of memcpy between two blocks of `bytes`, bytes read + bytes written: the best of a few runs that copy 512 MB.
double copy_bandwidth(int threads, size_t bytes) {
  std::unique_ptr<char, decltype(&std::free)> from(static_cast<char*>(std::aligned_alloc(64, bytes)), &std::free);
  std::unique_ptr<char, decltype(&std::free)> to(static_cast<char*>(std::aligned_alloc(64, bytes)), &std::free);
  if (!from || !to) return 0;
  const size_t part = bytes / threads, copies = (size_t{512} << 20) / bytes;
  double best = 0;
  for (int r = 0; r < kRepeats + 1; ++r) {  // the first run also touches the pages
    const double start = now();
#pragma omp parallel num_threads(threads)
    {
      const size_t offset = part * omp_get_thread_num();
      if (r == 0) std::memset(from.get() + offset, 1, part);
      for (size_t i = 0; i < copies; ++i) {
        std::memcpy(to.get() + offset, from.get() + offset, part);
        asm volatile("" ::: "memory");
      }
    }
    if (r > 0) best = std::max(best, 2.0 * part * threads * copies / (now() - start));
  }
  return best * 1e-9;
}

// The same between blocks that the last cache holds: an eighth of it each. 0 where its size is not known.
double cache_bandwidth(int threads) {
  const long bytes = sysconf(_SC_LEVEL3_CACHE_SIZE);
  return bytes > 0 ? copy_bandwidth(threads, static_cast<size_t>(bytes) / 512 * 64) : 0;
}

}  // namespace

int main(int argc, char** argv) {
  const int threads = argc > 1 ? std::atoi(argv[1]) : 1;
  if (threads < 1) {
    std::fprintf(stderr, "usage: probe THREADS (got '%s')\n", argv[1]);
    return 2;
  }
  const double fp32 = peak(fma_chains, threads, 2.0 * kLanes * kChains);
#ifdef __AVX512BF16__
  const double bf16 = peak(bf16_chains, threads, 4.0 * kLanes * kChains);
#else
  const double bf16 = 0;  // no bf16 dot product instruction
#endif
  std::printf(
      "{\"threads\": %d, \"vector_bits\": %d, \"fp32_gflops\": %.2f, \"bf16_gflops\": %.2f, \"copy_gbs\": %.2f, "
      "\"cache_copy_gbs\": %.2f}\n",
      threads, kVectorBytes * 8, fp32, bf16, copy_bandwidth(threads, size_t{512} << 20), cache_bandwidth(threads));
  return 0;
}
