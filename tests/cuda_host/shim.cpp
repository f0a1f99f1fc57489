// The scheduler behind shim.h. One OS thread at a time is in here; it and its fibers share everything below without locks.
//
//   Machine    the fibers that could go on, and the slots
//   Slot       where blocks run, one after the other: fibers, warps, the shared memory
//   Launch     a grid whose blocks are given to its slots
//
// For ThreadSanitizer there is exactly this order: launch -> its blocks -> launch's end, and in a slot one block after the
// other (they share a stack and shared memory). Blocks of different slots are unordered, whenever they ran.

#include "tests/cuda_host/shim.h"

#include <algorithm>
#include <cstdlib>
#include <exception>
#include <memory>
#include <mutex>
#include <new>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "tests/cuda_host/context.h"

namespace effops::cuda_host {

Place place;
bool tracing = false;
std::vector<Access> accesses;

namespace {

unsigned launches = 0;

constexpr int kMaxThreads = 1024;
constexpr std::size_t kGuardBytes = 256;  // on either side of shared memory
constexpr unsigned char kPoison = 0xff;   // a NaN in every floating-point type

struct Fiber;
struct Slot;

using Word = std::uint32_t __attribute__((may_alias));

// Copied to and fro without memcpy, which ThreadSanitizer would take for the fiber's own access.
void copy_words(void* to, const void* from, std::size_t bytes) {
  auto* target = static_cast<Word*>(to);
  const auto* source = static_cast<const Word*>(from);
  for (std::size_t i = 0; i < bytes / 4; ++i) target[i] = source[i];
}
void fill(void* to, std::size_t bytes) {
  auto* target = static_cast<unsigned char*>(to);
  for (std::size_t i = 0; i < bytes; ++i) target[i] = kPoison;
}

std::string text(const Where& where) { return std::string(where.file_name()) + ":" + std::to_string(where.line()); }
std::string text(const dim3& index) {
  return "(" + std::to_string(index.x) + ", " + std::to_string(index.y) + ", " + std::to_string(index.z) + ")";
}
std::string here() { return "thread " + text(place.thread) + " of block " + text(place.block); }

bool same(const Where& a, const Where& b) {
  return a.line() == b.line() && a.column() == b.column() && !std::strcmp(a.file_name(), b.file_name());
}

// Who has come to a barrier of a block or a warp. Two edges, for who leaves one barrier may be at the next already.
struct Gathering {
  int live = 0;
  int arrived = 0;
  int turn = 0;
  Where where;
  char edges[2] = {};

  bool complete() const { return arrived > 0 && arrived == live; }
  void* edge() { return &edges[turn]; }
  void reset() {
    arrived = 0;
    turn ^= 1;
  }
};

struct Warp : Gathering {
  Collective kind = Collective::barrier;
  int parameter = 0;
  Compute compute = nullptr;
  std::uint32_t present = 0;
  Lanes lanes[2];
};

enum class State { ready, at_barrier, in_warp, done };

struct Fiber {
  Context context;
  Slot* slot = nullptr;
  Warp* warp = nullptr;
  unsigned lane = 0;
  dim3 thread;
  State state = State::done;
  std::vector<Copy> copies;  // not landed yet, from `landed` on
  std::size_t landed = 0;
  int group = 0;  // which the next commit makes
};

struct Launch {
  Kernel kernel;
  dim3 grid, block;
  std::size_t shared_bytes;
  std::vector<unsigned char> params;
  std::uint64_t next_block = 0;

  std::size_t threads() const { return std::size_t{block.x} * block.y * block.z; }
  std::uint64_t blocks() const { return std::uint64_t{grid.x} * grid.y * grid.z; }
};

struct Slot : Gathering {
  Launch* launch = nullptr;
  dim3 block;
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<Warp> warps;
  unsigned char* memory = nullptr;  // shared memory with its guards
  std::size_t shared_bytes = 0;
  char order = 0;  // the edge from block to block, from the launch and to it

  ~Slot() { std::free(memory); }
  // AddressSanitizer has better guards.
  static std::size_t guard() { return under_asan() ? 0 : kGuardBytes; }
  unsigned char* shared() const { return memory + guard(); }
};

// The fibers that could go on.
class Ready {
 public:
  bool empty() const { return size_ == 0; }
  void clear() { size_ = 0; }
  void reserve(std::size_t fibers) {
    std::size_t capacity = 1;
    while (capacity < fibers) capacity *= 2;
    if (capacity > ring_.size()) ring_.assign(capacity, nullptr);
  }
  void push(Fiber* fiber) { at(size_++) = fiber; }
  Fiber* pop() { return take(0); }
  Fiber* pop(std::minstd_rand& random) { return take(random() % size_); }

 private:
  Fiber*& at(std::size_t place) { return ring_[(head_ + place) & (ring_.size() - 1)]; }
  Fiber* take(std::size_t place) {
    std::swap(at(0), at(place));
    Fiber* fiber = at(0);
    ++head_;
    --size_;
    return fiber;
  }

  std::vector<Fiber*> ring_;
  std::size_t head_ = 0, size_ = 0;
};

class Machine {
 public:
  Settings settings;

  void submit(Launch launch) {
    waiting_.push_back(std::move(launch));
    if (!settings.overlap) run_waiting();
  }

  void run_waiting() {
    std::vector<Launch> launches = std::exchange(waiting_, {});
    run(launches);
  }

  // ---- on a fiber ----

  Fiber& current() { return *current_; }

  void barrier(const Where& where) {
    Fiber& fiber = *current_;
    Slot& slot = *fiber.slot;
    if (slot.arrived == 0) {
      slot.where = where;
    } else if (!same(slot.where, where)) {
      throw Error("divergent barrier: " + here() + " is at " + text(where) + ", others are at " + text(slot.where));
    }
    void* edge = slot.edge();
    release(edge);
    ++slot.arrived;
    fiber.state = State::at_barrier;
    if (slot.complete()) {
      open(slot);
    } else {
      yield();
    }
    acquire(edge);
  }

  void collective(Collective kind, Deposit given, Receipt taken, Compute compute, int parameter, const Where& where) {
    Fiber& fiber = *current_;
    Warp& warp = *fiber.warp;
    if (warp.arrived == 0) {
      warp.where = where;
      warp.kind = kind;
      warp.compute = compute;
      warp.parameter = parameter;
    } else if (warp.kind != kind || warp.parameter != parameter || !same(warp.where, where)) {
      throw Error("divergent warp: " + here() + " is at " + name(kind, parameter) + ", " + text(where) +
                  ", others are at " + name(warp.kind, warp.parameter) + ", " + text(warp.where));
    }
    Lanes& lanes = warp.lanes[warp.turn];
    void* edge = warp.edge();
    copy_words(lanes.in[fiber.lane], given.from, given.bytes);
    if (kind == Collective::barrier) release(edge);
    warp.present |= 1u << fiber.lane;
    ++warp.arrived;
    fiber.state = State::in_warp;
    if (warp.complete()) {
      open(warp);
    } else {
      yield();
    }
    if (kind == Collective::barrier) acquire(edge);
    copy_words(taken.to, lanes.out[fiber.lane], taken.bytes);
  }

 private:
  // ---- on the thread that launched ----

  void run(std::vector<Launch>& launches) {
    host_.adopt();
    random_.seed(settings.seed);
    give_slots(launches);
    for (std::size_t i = 0; i < used_; ++i) start_next_block(*slots_[i]);
    try {
      while (busy_ > 0) {
        if (ready_.empty()) throw Error(describe_deadlock());
        resume(host_, *next_ready());
        if (error_) std::rethrow_exception(std::exchange(error_, nullptr));
        if (finished_) retire(*std::exchange(finished_, nullptr));
      }
    } catch (...) {
      abandon();
      throw;
    }
    for (std::size_t i = 0; i < used_; ++i) acquire(&slots_[i]->order);
  }

  // The last launch gets the first slots: if it should have waited for the others, it is seen not to.
  void give_slots(std::vector<Launch>& launches) {
    used_ = 0;
    std::size_t fibers = 0;
    for (auto launch = launches.rbegin(); launch != launches.rend(); ++launch) {
      const std::uint64_t wanted = std::min(blocks_in_flight(*launch), launch->blocks());
      for (std::uint64_t i = 0; i < wanted; ++i) {
        if (used_ == slots_.size()) slots_.push_back(std::make_unique<Slot>());
        prepare(*slots_[used_++], *launch);
        fibers += launch->threads();
      }
    }
    ready_.reserve(fibers);
  }

  std::uint64_t blocks_in_flight(const Launch& launch) const {
    if (settings.blocks_in_flight > 0) return settings.blocks_in_flight;
    // Races between blocks of one slot are not seen: a number that tilings rarely have for a period. More would cost a
    // millisecond a fiber, once.
    return under_tsan() ? std::clamp<std::uint64_t>(1280 / launch.threads(), 2, 5) : 2;
  }

  void prepare(Slot& slot, Launch& launch) {
    slot.launch = &launch;
    while (slot.fibers.size() < launch.threads()) {
      slot.fibers.push_back(std::make_unique<Fiber>());
      slot.fibers.back()->slot = &slot;
      start_fiber(slot, slot.fibers.size() - 1);
    }
    slot.warps.resize((launch.threads() + kWarp - 1) / kWarp);
    allocate_shared_memory(slot, launch.shared_bytes);
    release(&slot.order);
  }

  static void start_fiber(Slot& slot, std::size_t number) {
    slot.fibers[number]->context.start(run_fiber, number, ("thread " + std::to_string(number) + " of a block").c_str());
  }

  // Exactly what was asked for, so that AddressSanitizer's ground begins behind it.
  [[gnu::noinline]] static void allocate_shared_memory(Slot& slot, std::size_t bytes) {
    if (slot.memory && slot.shared_bytes == bytes) return;
    std::free(std::exchange(slot.memory, nullptr));
    void* memory = nullptr;
    if (posix_memalign(&memory, kGuardBytes, bytes + 2 * Slot::guard())) throw std::bad_alloc();
    slot.memory = static_cast<unsigned char*>(memory);
    slot.shared_bytes = bytes;
  }

  void start_next_block(Slot& slot) {
    Launch& launch = *slot.launch;
    const std::uint64_t number = launch.next_block++;
    slot.block = {static_cast<unsigned>(number % launch.grid.x),
                  static_cast<unsigned>(number / launch.grid.x % launch.grid.y),
                  static_cast<unsigned>(number / launch.grid.x / launch.grid.y)};
    fill(slot.memory, slot.shared_bytes + 2 * Slot::guard());
    slot.live = static_cast<int>(launch.threads());
    slot.reset();
    for (Warp& warp : slot.warps) {
      warp.live = 0;
      warp.present = 0;
      warp.reset();
    }
    for (unsigned thread = 0; thread < launch.threads(); ++thread) start_thread(slot, thread);
    wake(slot, 0, launch.threads(), State::ready);
    ++busy_;
  }

  static void start_thread(Slot& slot, unsigned number) {
    Fiber& fiber = *slot.fibers[number];
    const dim3& block = slot.launch->block;
    fiber.thread = {number % block.x, number / block.x % block.y, number / block.x / block.y};
    fiber.lane = number % kWarp;
    fiber.warp = &slot.warps[number / kWarp];
    ++fiber.warp->live;
    fiber.state = State::ready;
    fiber.copies.clear();
    fiber.landed = 0;
    fiber.group = 0;
  }

  void retire(Slot& slot) {
    --busy_;
    check_guards(slot);
    if (slot.launch->next_block < slot.launch->blocks()) start_next_block(slot);
  }

  static void check_guards(const Slot& slot) {
    const unsigned char* behind = slot.shared() + slot.shared_bytes;
    for (std::size_t i = 0; i < Slot::guard(); ++i) {
      if (slot.memory[i] == kPoison && behind[i] == kPoison) continue;
      throw Error("block " + text(slot.block) + " wrote outside of its " + std::to_string(slot.shared_bytes) +
                  " bytes of shared memory");
    }
  }

  std::string describe_deadlock() const {
    for (std::size_t i = 0; i < used_; ++i) {
      const Slot& slot = *slots_[i];
      if (slot.live == 0) continue;
      std::string waiting = "divergence: no thread of block " + text(slot.block) + " can go on";
      if (slot.arrived) waiting += "; " + std::to_string(slot.arrived) + " wait at the barrier of " + text(slot.where);
      for (std::size_t w = 0; w < slot.warps.size(); ++w) {
        const Warp& warp = slot.warps[w];
        if (!warp.arrived) continue;
        waiting += "; " + std::to_string(warp.arrived) + " of warp " + std::to_string(w) + " wait at " +
                   name(warp.kind, warp.parameter) + ", " + text(warp.where);
      }
      return waiting;
    }
    return "divergence: no thread can go on";
  }

  // The fibers that are in the middle of something start anew.
  void abandon() {
    for (std::size_t i = 0; i < used_; ++i) {
      Slot& slot = *slots_[i];
      for (std::size_t number = 0; number < slot.fibers.size(); ++number) {
        Fiber& fiber = *slot.fibers[number];
        if (fiber.state == State::done) continue;
        fiber.context.release_for(&slot.order);
        start_fiber(slot, number);
        fiber.state = State::done;
      }
      slot.live = 0;
      acquire(&slot.order);
    }
    ready_.clear();
    finished_ = nullptr;
    busy_ = 0;
  }

  // ---- switching ----

  Fiber* next_ready() { return settings.order == Order::shuffled ? ready_.pop(random_) : ready_.pop(); }

  void resume(Context& from, Fiber& next) {
    const Launch& launch = *next.slot->launch;
    current_ = &next;
    place = {next.thread, next.slot->block, launch.block, launch.grid};
    from.switch_to(next.context);
  }

  void yield() {
    Context& self = current_->context;
    if (ready_.empty()) {
      self.switch_to(host_);
    } else {
      resume(self, *next_ready());
    }
  }

  // Those of the fibers first to last which are in this state can go on.
  void wake(Slot& slot, std::size_t first, std::size_t last, State state) {
    for (std::size_t i = first; i < last; ++i) {
      Fiber* fiber = slot.fibers[settings.order == Order::backward ? first + last - 1 - i : i].get();
      if (fiber->state != state) continue;
      fiber->state = State::ready;
      if (fiber != current_ || state == State::ready) ready_.push(fiber);
    }
  }

  void open(Slot& slot) {
    slot.reset();
    wake(slot, 0, slot.launch->threads(), State::at_barrier);
  }

  void open(Warp& warp) {
    Slot& slot = *current_->slot;
    Lanes& lanes = warp.lanes[warp.turn];
    const bool whole = warp.present == 0xffffffffu;
    if (!whole && (warp.kind == Collective::load_matrix || warp.kind == Collective::mma)) {
      throw Error("divergent warp: " + name(warp.kind, warp.parameter) + ", " + text(warp.where) +
                  ", without the lanes that have returned");
    }
    for (int lane = 0; lane < kWarp; ++lane) {
      if (!(warp.present >> lane & 1)) fill(lanes.in[lane], Lanes::kBytes);
    }
    if (warp.compute) warp.compute(lanes, warp.parameter);
    warp.present = 0;
    warp.reset();
    const std::size_t first = (&warp - slot.warps.data()) * kWarp;
    wake(slot, first, std::min(first + kWarp, slot.launch->threads()), State::in_warp);
  }

  // What a fiber does with its life: one thread after the other, each of another block.
  [[noreturn]] static void run_fiber();

  void run_thread() {
    Fiber& fiber = *current_;
    Slot& slot = *fiber.slot;
    acquire(&slot.order);
    try {
      slot.launch->kernel.call(slot.launch->kernel.function, slot.launch->params.data());
      return_from_kernel(fiber);
    } catch (...) {
      error_ = std::current_exception();
    }
    if (error_ || finished_) {
      fiber.context.switch_to(host_);
    } else {
      yield();
    }
  }

  void return_from_kernel(Fiber& fiber) {
    Slot& slot = *fiber.slot;
    --fiber.warp->live;
    if (fiber.warp->complete()) open(*fiber.warp);
    --slot.live;
    if (slot.complete()) open(slot);
    if (slot.live == 0) finished_ = &slot;
    fiber.state = State::done;
    release(&slot.order);
  }

  static std::string name(Collective kind, int parameter) {
    constexpr const char* kNames[] = {"a warp barrier", "a shuffle by ", "a matrix load of ", "a matrix product"};
    const std::string name = kNames[static_cast<int>(kind)];
    const bool tells = kind == Collective::shuffle || kind == Collective::load_matrix;
    return tells ? name + std::to_string(parameter) : name;
  }

  Context host_;
  Ready ready_;
  std::vector<std::unique_ptr<Slot>> slots_;
  std::size_t used_ = 0;      // slots, of the launches that run
  std::size_t busy_ = 0;      // of these, with a block
  Fiber* current_ = nullptr;  // who runs, or ran last
  Slot* finished_ = nullptr;  // whose block has just ended
  std::exception_ptr error_;  // what a fiber threw
  std::vector<Launch> waiting_;
  std::minstd_rand random_;
};

// Lives as long as the process: kernels may be launched until its end.
Machine& machine() {
  static auto* const machine = new Machine;
  return *machine;
}

void Machine::run_fiber() {
  Context::arrived();
  for (;;) machine().run_thread();
}

std::mutex& turn_of_threads() {
  static auto* const mutex = new std::mutex;
  return *mutex;
}

void check_limits(const dim3& grid, const dim3& block, std::size_t shared_bytes, const Where& where) {
  const std::string at = ", " + text(where);
  const std::uint64_t threads = std::uint64_t{block.x} * block.y * block.z;
  if (threads == 0 || threads > kMaxThreads || block.z > 64) {
    throw Error("threads: a block of " + text(block) + " threads, 1 to 1024 can be had" + at);
  }
  if (std::uint64_t{grid.x} * grid.y * grid.z == 0 || grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535) {
    throw Error("grid: " + text(grid) + " blocks, at least one and at most (2^31 - 1, 65535, 65535) can be had" + at);
  }
  const auto limit = static_cast<std::size_t>(machine().settings.shared_limit);
  if (shared_bytes > limit) {
    throw Error("shared memory: a block of " + std::to_string(shared_bytes) + " bytes, " + std::to_string(limit) +
                " are granted" + at);
  }
}

// ---- fragments ----

template <class T>
T read(const unsigned char* bytes, int index) {
  T value;
  std::memcpy(&value, bytes + index * sizeof(T), sizeof(T));
  return value;
}
template <class T>
void write(unsigned char* bytes, int index, T value) {
  std::memcpy(bytes + index * sizeof(T), &value, sizeof(T));
}

// What a lane gives to a matrix product.
constexpr int kGivesD = 0, kGivesA = 16, kGivesB = 32, kGives = 40;

// d = a * b + d for fragments whose elements are in `a` and `b` already.
template <int kDepth>
void multiply(Lanes& lanes, const float (&a)[16][kDepth], const float (&b)[kDepth][8]) {
  float d[16][8];
  for (int lane = 0; lane < kWarp; ++lane) {
    for (int i = 0; i < 4; ++i)
      d[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2] = read<float>(lanes.in[lane] + kGivesD, i);
  }
  for (int row = 0; row < 16; ++row) {
    for (int k = 0; k < kDepth; ++k) {
      for (int column = 0; column < 8; ++column) d[row][column] += a[row][k] * b[k][column];
    }
  }
  for (int lane = 0; lane < kWarp; ++lane) {
    for (int i = 0; i < 4; ++i) write(lanes.out[lane], i, d[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2]);
  }
}

void multiply_16_bit(Lanes& lanes, int half) {
  const auto widen = [half](std::uint16_t bits) { return half ? half_to_float(bits) : bfloat16_to_float(bits); };
  float a[16][16], b[16][8];
  for (int lane = 0; lane < kWarp; ++lane) {
    const int group = lane / 4, pair = lane % 4 * 2;
    for (int i = 0; i < 8;
         ++i) {  // a0 a1 | a2 a3 | a4 a5 | a6 a7: the next register is 8 rows down, the one after 8 right
      a[group + i / 2 % 2 * 8][pair + i % 2 + i / 4 * 8] = widen(read<std::uint16_t>(lanes.in[lane] + kGivesA, i));
    }
    for (int i = 0; i < 4; ++i) {
      b[pair + i % 2 + i / 2 * 8][group] = widen(read<std::uint16_t>(lanes.in[lane] + kGivesB, i));
    }
  }
  multiply<16>(lanes, a, b);
}

void multiply_tf32(Lanes& lanes, int) {
  const auto widen = [](std::uint32_t bits) {
    bits &= ~0x1fffu;
    return read<float>(reinterpret_cast<const unsigned char*>(&bits), 0);
  };
  float a[16][8], b[8][8];
  for (int lane = 0; lane < kWarp; ++lane) {
    const int group = lane / 4, column = lane % 4;
    for (int i = 0; i < 4; ++i) {
      a[group + i % 2 * 8][column + i / 2 * 4] = widen(read<std::uint32_t>(lanes.in[lane] + kGivesA, i));
    }
    for (int i = 0; i < 2; ++i) b[column + i * 4][group] = widen(read<std::uint32_t>(lanes.in[lane] + kGivesB, i));
  }
  multiply<8>(lanes, a, b);
}

void product(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2], Compute compute, int parameter,
             const Where& where) {
  alignas(16) unsigned char given[kGives];
  copy_words(given + kGivesD, d, 16);
  copy_words(given + kGivesA, a, 16);
  copy_words(given + kGivesB, b, 8);
  machine().collective(Collective::mma, {given, kGives}, {d, 16}, compute, parameter, where);
}

}  // namespace

// ---- shim.h ----

Settings& settings() { return machine().settings; }

void note_access(const void* address, int bytes, bool store) {
  accesses.push_back({launches - 1, place.block.x, address, bytes, store});
}

void synchronize() {
  const std::lock_guard turn(turn_of_threads());
  machine().run_waiting();
}

void launch(Kernel kernel, dim3 grid, dim3 block, std::size_t shared_bytes, const void* params,
            std::size_t params_bytes, const Where& where) {
  const std::lock_guard turn(turn_of_threads());
  check_limits(grid, block, shared_bytes, where);
  if (Settings& settings = machine().settings; settings.dry) {
    settings.launched.push_back({reinterpret_cast<const void*>(kernel.function), grid, block, shared_bytes});
    return;
  }
  ++launches;
  const auto* bytes = static_cast<const unsigned char*>(params);
  machine().submit({kernel, grid, block, shared_bytes, {bytes, bytes + params_bytes}});
}

void fail_misaligned(const void* address, std::size_t bytes, const Where& where) {
  throw Error("misaligned vector access: " + std::to_string(bytes) + " bytes at an address that is " +
              std::to_string(reinterpret_cast<std::uintptr_t>(address) % bytes) + " bytes off, " + here() + ", " +
              text(where));
}

void* shared_memory() { return machine().current().slot->shared(); }

void check_shared(const void* address, std::size_t bytes, const Where& where) {
  const Slot& slot = *machine().current().slot;
  const std::uintptr_t offset =
      reinterpret_cast<std::uintptr_t>(address) - reinterpret_cast<std::uintptr_t>(slot.shared());
  if (offset <= slot.shared_bytes && bytes <= slot.shared_bytes - offset) return;
  throw Error("not in shared memory: " + std::to_string(bytes) + " bytes at offset " +
              std::to_string(static_cast<std::int64_t>(offset)) + " of a block that has " +
              std::to_string(slot.shared_bytes) + ", " + here() + ", " + text(where));
}

bool is_removed(const Where& where) {
  Settings& settings = machine().settings;
  const Site site{where.file_name(), where.line()};
  if (settings.record && std::find(settings.sites.begin(), settings.sites.end(), site) == settings.sites.end()) {
    settings.sites.push_back(site);
  }
  return settings.removed.line && settings.removed == site;
}

void barrier(Where where) {
  if (!is_removed(where)) machine().barrier(where);
}

void warp_barrier(Where where) {
  if (!is_removed(where)) machine().collective(Collective::barrier, {}, {}, nullptr, 0, where);
}

void collective(Collective kind, Deposit given, Receipt taken, Compute compute, int parameter, const Where& where) {
  machine().collective(kind, given, taken, compute, parameter, where);
}

void shuffle_xor_lanes(Lanes& lanes, int mask) {
  for (int lane = 0; lane < kWarp; ++lane) copy_words(lanes.out[lane], lanes.in[(lane ^ mask) % kWarp], 8);
}

void shuffle_down_lanes(Lanes& lanes, int delta) {
  for (int lane = 0; lane < kWarp; ++lane) {
    copy_words(lanes.out[lane], lanes.in[lane + delta < kWarp ? lane + delta : lane], 8);
  }
}

void remember_copy(const Copy& copy) {
  Fiber& fiber = machine().current();
  fiber.copies.push_back(copy);
  fiber.copies.back().group = fiber.group;
}

bool next_landing(int groups_left, Copy& copy) {
  Fiber& fiber = machine().current();
  if (fiber.landed == fiber.copies.size() || fiber.copies[fiber.landed].group >= fiber.group - groups_left)
    return false;
  copy = fiber.copies[fiber.landed++];
  if (fiber.landed == fiber.copies.size()) {
    fiber.copies.clear();
    fiber.landed = 0;
  }
  return true;
}

void copy_async_commit() { ++machine().current().group; }

void load_matrix_lanes(Lanes& lanes, int count) {
  for (int lane = 0; lane < kWarp; ++lane) {
    for (int i = 0; i < count; ++i) {
      write(lanes.out[lane], i, read<std::uint32_t>(lanes.in[8 * i + lane / 4], lane % 4));
    }
  }
}

void load_matrix_transposed_lanes(Lanes& lanes, int count) {
  for (int lane = 0; lane < kWarp; ++lane) {
    for (int i = 0; i < 2 * count; ++i) {
      const int row = lane % 4 * 2 + i % 2;
      write(lanes.out[lane], i, read<std::uint16_t>(lanes.in[8 * (i / 2) + row], lane / 4));
    }
  }
}

void mma_m16n8k16(bool half, float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2],
                  const Where& where) {
  product(d, a, b, multiply_16_bit, half, where);
}

void mma_m16n8k8_tf32(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2], Where where) {
  product(d, a, b, multiply_tf32, 0, where);
}

}  // namespace effops::cuda_host
