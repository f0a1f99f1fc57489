// The fixed banks of effops/ops/dwconv/banks.py, whose taps the kernels have as constants in their instructions. So that
// the constants do not depend on the thread, a thread owns as many neighbouring channels as its bank has kernels, or two:
//
//   vgnet8, vgnet4    3x3, stride 1: VGNet's edge kernels; 8 and 4 channels. Where the channels are no multiple of that,
//                     the taps are read, as learned ones are
//   the others        3x3 and 5x5, stride 2: VGNet's blurs, the binomials; 2 channels
//
// A test compares the values with banks.py.
#pragma once

#include <utility>

#include "csrc/cuda/math.h"

namespace effops::cuda {

struct FixedBank {
  const char* name;
  int code;           // DepthwiseGeometry::named_bank
  int size, kernels;  // each of size x size taps
  int stride;         // at which they are constants
  double taps[72];
};

// clang-format off
inline constexpr FixedBank kFixedBanks[] = {
    {"vgnet8", 1, 3, 8, 1,
     {-0.5, -1, -0.5, 0, 0, 0, 0.5, 1, 0.5,
      -0.5, 0, 0.5, -1, 0, 1, -0.5, 0, 0.5,
      -0.08333333333333333, -0.16666666666666666, -0.08333333333333333, -0.16666666666666666, 1, -0.16666666666666666, -0.08333333333333333, -0.16666666666666666, -0.08333333333333333,
      0, -0.25, 0, -0.25, 1, -0.25, 0, -0.25, 0,
      -1, -0.6666666666666666, -0.3333333333333333, -0.6666666666666666, 0, 0.6666666666666666, 0.3333333333333333, 0.6666666666666666, 1,
      -0.3333333333333333, -0.6666666666666666, -1, 0.6666666666666666, 0, -0.6666666666666666, 1, 0.6666666666666666, 0.3333333333333333,
      0.0811, 0.1226, 0.0811, 0.1226, 0.1853, 0.1226, 0.0811, 0.1226, 0.0811,
      0.0277, 0.111, 0.0277, 0.111, 0.4452, 0.111, 0.0277, 0.111, 0.0277}},
    {"vgnet4", 2, 3, 4, 1,
     {-0.5, -1, -0.5, 0, 0, 0, 0.5, 1, 0.5,
      -0.5, 0, 0.5, -1, 0, 1, -0.5, 0, 0.5,
      -0.08333333333333333, -0.16666666666666666, -0.08333333333333333, -0.16666666666666666, 1, -0.16666666666666666, -0.08333333333333333, -0.16666666666666666, -0.08333333333333333,
      0, -0.25, 0, -0.25, 1, -0.25, 0, -0.25, 0}},
    {"vgnet_blur", 3, 3, 1, 2,
     {0.0811, 0.1226, 0.0811, 0.1226, 0.1853, 0.1226, 0.0811, 0.1226, 0.0811}},
    {"vgnet_blur_alternate", 4, 3, 2, 2,
     {0.0811, 0.1226, 0.0811, 0.1226, 0.1853, 0.1226, 0.0811, 0.1226, 0.0811,
      -0.0811, -0.1226, -0.0811, -0.1226, -0.1853, -0.1226, -0.0811, -0.1226, -0.0811}},
    {"binomial3", 5, 3, 1, 2,
     {0.0625, 0.125, 0.0625, 0.125, 0.25, 0.125, 0.0625, 0.125, 0.0625}},
    {"binomial5", 6, 5, 1, 2,
     {0.00390625, 0.015625, 0.0234375, 0.015625, 0.00390625, 0.015625, 0.0625, 0.09375, 0.0625, 0.015625, 0.0234375, 0.09375, 0.140625, 0.09375, 0.0234375, 0.015625, 0.0625, 0.09375, 0.0625, 0.015625, 0.00390625, 0.015625, 0.0234375, 0.015625, 0.00390625}},
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

// Places in kFixedBanks.
enum BankIndex { kVgnet8, kVgnet4, kVgnetBlur, kVgnetBlurAlternate, kBinomial3, kBinomial5 };

// A window with the taps of kFixedBanks[Index]; Turned: by half a turn.
template <class Window, int Index, bool Turned = false>
struct Fixed : Window {
  static constexpr FixedBank kBank = kFixedBanks[Index];
  static_assert(kBank.size == Window::R && kBank.size == Window::S && kBank.stride == Window::kStride);
  static bool fits(const DepthwiseGeometry& g) { return g.named_bank == kBank.code && Window::fits(g); }

  template <class T, int Kernel, int Tap>
  static constexpr compute<T> kTap =
      stored_tap<T>(kBank.taps[Kernel * Window::kTaps + (Turned ? Window::kTaps - 1 - Tap : Tap)]);
};

template <class Window>
constexpr bool kIsFixed = requires { Window::kBank; };

// The taps of N channels, the first of which is a multiple of the bank's kernels.
template <class Window, class T, int N, int... Index>
EFFOPS_DEVICE void fixed_taps(compute<T> (&taps)[Window::kTaps][N], std::integer_sequence<int, Index...>) {
  static_assert(N % Window::kBank.kernels == 0);
  ((taps[Index / N][Index % N] = Window::template kTap<T, Index % N % Window::kBank.kernels, Index / N>), ...);
}

}  // namespace effops::cuda
