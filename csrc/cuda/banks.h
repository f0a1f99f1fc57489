// Fixed banks of effops/ops/dwconv/banks.py whose taps the kernels have as constants in their instructions: those with
// one or two kernels, so that it is known which kernel a pair of neighbouring channels uses. The taps of larger banks
// depend on the thread; they are read once a strip, as learned ones are. A test compares the values with banks.py.
#pragma once

#include <utility>

#include "csrc/cuda/math.h"

namespace effops::cuda {

struct FixedBank {
  const char* name;
  int code;           // DepthwiseGeometry::named_bank
  int size, kernels;  // each of size x size taps
  double taps[25];
};

// clang-format off
inline constexpr FixedBank kFixedBanks[] = {
    {"vgnet_blur", 3, 3, 1, {0.0811, 0.1226, 0.0811, 0.1226, 0.1853, 0.1226, 0.0811, 0.1226, 0.0811}},
    {"vgnet_blur_alternate", 4, 3, 2, {0.0811, 0.1226, 0.0811, 0.1226, 0.1853, 0.1226, 0.0811, 0.1226, 0.0811, -0.0811, -0.1226, -0.0811, -0.1226, -0.1853, -0.1226, -0.0811, -0.1226, -0.0811}},
    {"binomial3", 5, 3, 1, {0.0625, 0.125, 0.0625, 0.125, 0.25, 0.125, 0.0625, 0.125, 0.0625}},
    {"binomial5", 6, 5, 1, {0.00390625, 0.015625, 0.0234375, 0.015625, 0.00390625, 0.015625, 0.0625, 0.09375, 0.0625, 0.015625, 0.0234375, 0.09375, 0.140625, 0.09375, 0.0234375, 0.015625, 0.0625, 0.09375, 0.0625, 0.015625, 0.00390625, 0.015625, 0.0234375, 0.015625, 0.00390625}},
};
// clang-format on

// The nearest value with `digits` binary digits, ties to even.
constexpr double rounded(double value, int digits) {
  if (value == 0) return 0;
  double magnitude = value < 0 ? -value : value, scale = 1;
  const double top = static_cast<double>(1 << digits);
  for (; magnitude * scale < top / 2; scale *= 2) {
  }
  const double exact = magnitude * scale;
  auto whole = static_cast<std::int64_t>(exact);
  const double rest = exact - static_cast<double>(whole);
  if (rest > 0.5 || (rest == 0.5 && whole % 2 == 1)) ++whole;
  magnitude = static_cast<double>(whole) / scale;
  return value < 0 ? -magnitude : magnitude;
}

// A tap as a weight of type T holds it.
template <class T>
constexpr compute<T> stored_tap(double value) {
  const auto single = static_cast<float>(value);  // on the way to 16 bits, as torch goes
  if constexpr (sizeof(T) == 2) return static_cast<float>(rounded(single, std::is_same_v<T, half_t> ? 11 : 8));
  if constexpr (sizeof(T) == 4) return single;
  return static_cast<compute<T>>(value);
}

// A window with the taps of kFixedBanks[Index].
template <class Window, int Index>
struct Fixed : Window {
  static constexpr FixedBank kBank = kFixedBanks[Index];
  static_assert(kBank.size == Window::R && kBank.size == Window::S && kBank.kernels <= 2);
  static bool fits(const DepthwiseGeometry& g) { return g.named_bank == kBank.code && Window::fits(g); }

  template <class T, int Tap>
  static constexpr compute<T> kTap = stored_tap<T>(kFixedBanks[Index].taps[Tap]);
};

template <class Window>
constexpr bool kIsFixed = requires { Window::kBank; };

// The taps of N channels, the first of which is a multiple of the bank's kernels.
template <class Window, class T, int N, int... Index>
EFFOPS_DEVICE void fixed_taps(compute<T> (&taps)[Window::kTaps][N], std::integer_sequence<int, Index...>) {
  ((taps[Index / N][Index % N] =
        Window::template kTap<T, Index % N % Window::kBank.kernels * Window::kTaps + Index / N>),
   ...);
}

}  // namespace effops::cuda
