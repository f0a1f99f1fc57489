// Calls of every host function of kernels.h, in the ways that they tell apart.
//
//   problems --dry     which kernels they launch on which device, with how many threads and bytes of shared memory, as JSON
//                      for cuda_compile.py; nothing is run, so maps can be large
//   problems           runs small ones, on memory of exactly the size that a call may touch, and prints a hash of what each
//                      wrote. Exit status 1 if it left something out (NaN stays) or wrote elsewhere. Values are compared
//                      with nothing here. --only TEXT: calls whose name contains it; --every N: one in N; and options.h
#include <cstdio>
#include <set>
#include <span>
#include <string>
#include <tuple>

#include "tests/cuda_host/options.h"
#include "tests/cuda_host/problems_blurmaxpool.h"
#include "tests/cuda_host/problems_bsconv.h"
#include "tests/cuda_host/problems_dsconv.h"
#include "tests/cuda_host/problems_dwconv.h"
#include "tests/cuda_host/problems_mbconv.h"
#include "tests/cuda_host/problems_se.h"
#include "tests/cuda_host/problems_sepconv.h"

extern "C" const char __executable_start;  // the linker's: where the program lies in memory

namespace {

using namespace effops::problems;
using namespace effops;
using cuda_host::settings;

constexpr Device kDevices[] = {{108, 163 << 10, 80}, {132, 227 << 10, 90}, {148, 227 << 10, 100}};
constexpr Device kHost = {2, 163 << 10, 80};  // few processors: blocks have more than one tile each

// Every room has a header of its own.
void visit_all(std::span<const Maps> sizes, const Visit& visit) {
  visit_dwconv(sizes, visit);
  visit_dsconv(sizes, visit);
  visit_bsconv(sizes, visit);
  visit_mbconv(sizes, visit);
  visit_se(sizes, visit);
  visit_blurmaxpool(sizes, visit);
  visit_sepconv(sizes, visit);
}

void record_launches() {
  settings().dry = true;
  std::set<std::tuple<int, std::uint64_t, std::uint64_t, std::size_t>> rows;
  for (const Device& device : kDevices) {
    settings().shared_limit = device.shared_bytes;
    visit_all(kLarge, [&](const std::string&, const Call& call) {
      Memory memory(true);
      call(memory, device);
    });
    for (const auto& [kernel, grid, block, shared_bytes] : settings().launched) {
      const std::uint64_t threads = std::uint64_t{block.x} * block.y * block.z;
      rows.insert({device.capability, static_cast<const char*>(kernel) - &__executable_start, threads, shared_bytes});
    }
    settings().launched.clear();
  }
  const char* separator = "[";
  for (const auto& [arch, address, threads, shared] : rows) {
    std::printf("%s{\"arch\": %d, \"address\": %llu, \"threads\": %llu, \"shared\": %zu}\n", separator, arch,
                static_cast<unsigned long long>(address), static_cast<unsigned long long>(threads), shared);
    separator = ",";
  }
  std::printf("]\n");
}

// How many calls went wrong.
int run_small(const std::string& only, int every) {
  settings().shared_limit = kHost.shared_bytes;
  int number = 0, wrong = 0;
  visit_all(kSmall, [&](const std::string& name, const Call& call) {
    if (name.find(only) == std::string::npos || number++ % every) return;
    try {
      Memory memory(false);
      call(memory, kHost);
      cuda_host::synchronize();
      std::printf("%s: %016llx\n", name.c_str(), static_cast<unsigned long long>(memory.hash()));
    } catch (const std::exception& error) {
      std::printf("%s: %s\n", name.c_str(), error.what());
      ++wrong;
    }
  });
  if (number == 0) throw std::invalid_argument("no call is called " + only);
  return wrong;
}

}  // namespace

int main(int count, char** arguments) try {
  const cuda_host::Options options = cuda_host::parse_options(count, arguments, {"--dry", "--only", "--every"});
  if (options.more.contains("--dry")) {
    record_launches();
    return 0;
  }
  const auto given = [&](const char* name, const char* otherwise) {
    const auto found = options.more.find(name);
    return found == options.more.end() ? std::string(otherwise) : found->second;
  };
  const int wrong = run_small(given("--only", ""), std::stoi(given("--every", "1")));
  if (settings().record) cuda_host::print_sites();
  return wrong ? 1 : 0;
} catch (const std::exception& error) {
  std::fprintf(stderr, "%s\n", error.what());
  return 1;
}
