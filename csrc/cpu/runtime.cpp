#include "csrc/cpu/runtime.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <new>
#include <string>
#include <vector>

namespace effops {

void parallel_tasks(index_t count, void (*body)(void*, index_t), void* context) {
  if (count == 1) {
    body(context, 0);
    return;
  }
  std::atomic<index_t> next{0};
  const index_t workers = std::min<index_t>(count, thread_count());
  torch::stable::parallel_for(0, workers, 1, [&](index_t, index_t) {
    for (index_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) body(context, i);
  });
}

int thread_count() { return static_cast<int>(torch::stable::get_num_threads()); }

// ---- Arena ----

namespace {
constexpr std::size_t kAlignment = 64;
constexpr std::size_t kKeepLimit = std::size_t{64} << 20;  // what a thread may hold on to between calls
}  // namespace

struct Arena::Store {
  struct Block {
    char* data;
    std::size_t size;
  };
  std::vector<Block> blocks;
  std::size_t used = 0;   // of the last block
  std::size_t total = 0;  // handed out since the arena was opened
  bool busy = false;

  ~Store() { free_all(); }
  void free_all() {
    for (Block& block : blocks) ::operator delete(block.data, std::align_val_t(kAlignment));
    blocks.clear();
  }
  void add_block(std::size_t size) {
    blocks.reserve(blocks.size() + 1);
    blocks.push_back({static_cast<char*>(::operator new(size, std::align_val_t(kAlignment))), size});
    used = 0;
  }
};

Arena::Arena(Level level) {
  thread_local Store stores[2];
  store_ = &stores[level];
  if (store_->busy)
    throw std::bad_alloc();  // a task that opens a second arena of its level is a bug, not a user's error
  store_->busy = true;
  store_->used = store_->total = 0;
}

Arena::~Arena() {
  store_->busy = false;
  // One block next time. It is not touched before it is used, so that pages nobody needs cost nothing.
  if (store_->blocks.size() > 1 || store_->total > kKeepLimit) {
    store_->free_all();
    if (store_->total <= kKeepLimit) {
      try {
        store_->add_block(store_->total);
      } catch (const std::bad_alloc&) {  // the next call will ask again
      }
    }
  }
}

void* Arena::allocate(std::size_t bytes) {
  const std::size_t rounded = (bytes + kAlignment - 1) / kAlignment * kAlignment + kAlignment;
  Store& store = *store_;
  if (store.blocks.empty() || store.used + rounded > store.blocks.back().size) store.add_block(rounded);
  void* result = store.blocks.back().data + store.used;
  store.used += rounded;
  store.total += rounded;
  return result;
}

// ---- ISA ----

namespace baseline {
const KernelTable& table();
}
#if EFFOPS_X86_TARGETS
namespace avx2 {
const KernelTable& table();
}
namespace avx512 {
const KernelTable& table();
}
namespace avx512bf16 {
const KernelTable& table();
}
#endif

namespace {

struct Candidate {
  const char* name;
  const KernelTable& (*table)();
  bool (*supported)();
};

// Worst first: EFFOPS_CPU_ISA names the last one that may be taken.
const Candidate kCandidates[] = {
    {"baseline", baseline::table, [] { return true; }},
#if EFFOPS_X86_TARGETS
    {"avx2", avx2::table, [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }},
    {"avx512", avx512::table,
     [] {
       return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
              __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
     }},
    {"avx512bf16", avx512bf16::table,
     [] {
       return __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
              __builtin_cpu_supports("avx512bf16");
     }},
#endif
};

const KernelTable& choose_table() {
  const char* limit = std::getenv("EFFOPS_CPU_ISA");
  const Candidate* best = nullptr;
  bool limit_known = limit == nullptr || *limit == '\0';
  for (const Candidate& candidate : kCandidates) {
    if (candidate.supported()) best = &candidate;
    if (!limit_known && std::strcmp(limit, candidate.name) == 0) {
      limit_known = true;
      break;
    }
  }
  if (!limit_known) {
    std::fprintf(stderr, "effops: EFFOPS_CPU_ISA=%s is not one of baseline, avx2, avx512, avx512bf16; ignored\n",
                 limit);
  }
  return best->table();
}

}  // namespace

const KernelTable& kernels() {
  static const KernelTable& table = choose_table();
  return table;
}

}  // namespace effops

// JSON for `effops info`; read by ctypes, so that it needs no tensor and no dispatcher.
extern "C" __attribute__((visibility("default"))) const char* effops_build_info() {
  static const std::string json = [] {
    std::string text = "{\"isa\": \"";
    text += effops::kernels().isa;
    text += "\", \"compiled_isas\": [";
    bool first = true;
    for (const auto& candidate : effops::kCandidates) {
      text += first ? "\"" : ", \"";
      text += candidate.name;
      text += "\"";
      first = false;
    }
    text += "], \"compiler\": \"" __VERSION__ "\"}";
    return text;
  }();
  return json.c_str();
}
