// The command line of a driver: how to run its kernels, and what to break.
//
//   --sites              print every barrier and wait that the kernels meet, FILE:LINE, in the order of the first visit
//   --without FILE:LINE  leave that one out
//   --overlap            do not let launches wait for one another
//   --order ORDER        forward, backward, shuffled: in which threads take turns
//   --short NAME         of the buffer with this name the driver allocates one element less
#pragma once

#include <cstdio>
#include <cstdlib>
#include <map>
#include <set>
#include <stdexcept>
#include <string>

#include "tests/cuda_host/shim.h"

namespace effops::cuda_host {

struct Options {
  std::string shortened;
  std::map<std::string, std::string> more;  // a driver's own

  // How many elements of this buffer to allocate.
  std::size_t size(const char* name, std::size_t needed) const { return needed - (shortened == name); }
};

inline Order order_named(const std::string& name) {
  static const std::map<std::string, Order> kOrders = {
      {"forward", Order::forward}, {"backward", Order::backward}, {"shuffled", Order::shuffled}};
  return kOrders.at(name);
}

// `own`: names of a driver's own options, each with a value; one called --dry goes without. The arguments stay where the
// settings point at them.
inline Options parse_options(int count, char** arguments, const std::set<std::string>& own = {}) {
  Options options;
  for (int i = 1; i < count; ++i) {
    const std::string name = arguments[i];
    const auto value = [&] {
      if (i + 1 == count) throw std::invalid_argument(name + " wants a value");
      return arguments[++i];
    };
    if (name == "--sites") {
      settings().record = true;
    } else if (name == "--without") {
      char* site = value();
      char* colon = std::strrchr(site, ':');
      if (!colon) throw std::invalid_argument("--without wants FILE:LINE");
      *colon = 0;
      settings().removed = {site, static_cast<unsigned>(std::atoi(colon + 1))};
    } else if (name == "--overlap") {
      settings().overlap = true;
    } else if (name == "--order") {
      settings().order = order_named(value());
    } else if (name == "--short") {
      options.shortened = value();
    } else if (own.contains(name)) {
      options.more[name] = name == "--dry" ? "" : value();
    } else {
      throw std::invalid_argument("unknown option: " + name);
    }
  }
  return options;
}

inline void print_sites() {
  for (const Site& site : settings().sites) std::printf("%s:%u\n", site.file, site.line);
}

}  // namespace effops::cuda_host
