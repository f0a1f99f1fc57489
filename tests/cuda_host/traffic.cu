// Counts what every block of the kernels reads and writes of the maps, each element once, and holds it against what its
// results need: the floor of the kernels' pictures. Maps have channels that vectors of them divide; they are
// channels_last where a case does not say NCHW.
// Prints a line a case; exits with 1 where one is wrong.
#include <algorithm>
#include <cstdio>
#include <functional>
#include <map>
#include <optional>
#include <set>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "csrc/cuda/device.h"
#include "csrc/cuda/kernels.h"
#include "tests/cuda_host/buffer.h"
#include "tests/cuda_host/shim.h"

namespace {

using namespace effops;
using cuda_host::Buffer;

constexpr cuda::Device kDevice{4, 227 << 10, 90};

using Elements = std::set<index_t>;
using Blocks = std::map<std::pair<unsigned, unsigned>, Elements>;  // by launch and block

struct Case {
  const char* name;
  index_t N, C, H, W, R, S, stride, dilation, multiplier;
  bool padded = true, channels_last = true;

  DepthwiseGeometry geometry() const {
    DepthwiseGeometry g{};
    g.N = N, g.C = C, g.H = H, g.W = W, g.R = R, g.S = S;
    g.stride_h = g.stride_w = stride;
    g.dilation_h = g.dilation_w = dilation;
    g.pad_top = padded ? dilation * (R - 1) / 2 : 0;
    g.pad_left = padded ? dilation * (S - 1) / 2 : 0;
    g.P = (H + 2 * g.pad_top - dilation * (R - 1) - 1) / stride + 1;
    g.Q = (W + 2 * g.pad_left - dilation * (S - 1) - 1) / stride + 1;
    g.multiplier = multiplier;
    g.bank = g.out_channels();
    return g;
  }
};

// Without padding, at stride 2: the last column of x is beyond the windows.
constexpr Case kCases[] = {
    {"3x3", 2, 40, 17, 19, 3, 3, 1, 1, 1},
    {"3x3 stride 2", 2, 40, 17, 19, 3, 3, 2, 1, 1},
    {"5x5", 1, 24, 18, 21, 5, 5, 1, 1, 1},
    {"1x5", 1, 24, 9, 31, 1, 5, 1, 1, 1},
    {"7x7", 1, 16, 12, 13, 7, 7, 1, 1, 1},
    {"3x3 dilated", 1, 16, 12, 13, 3, 3, 1, 2, 1},
    {"3x3 stride 2, no padding", 2, 40, 26, 30, 3, 3, 2, 1, 1, false},
};
constexpr Case kRows[] = {
    {"NCHW 3x3", 2, 10, 27, 40, 3, 3, 1, 1, 1, true, false},
    {"NCHW 3x3 stride 2", 2, 10, 27, 64, 3, 3, 2, 1, 1, true, false},
};

// What an output behind pools or a blur of 3x3 needs.
constexpr Case kPooled = {"4x4 stride 2", 2, 40, 18, 22, 4, 4, 2, 1, 1};

// For dsconv besides: windows with gaps between them or in them, in patches and too far apart for one.
constexpr Case kSeparableCases[] = {
    {"1x1 stride 2", 1, 24, 17, 18, 1, 1, 2, 1, 1},
    {"2x2 stride 3", 2, 24, 29, 30, 2, 2, 3, 1, 1},
    {"3x3 dilated by 6", 1, 16, 9, 17, 3, 3, 1, 6, 1},
    {"3x3 dilated by 25", 1, 8, 27, 28, 3, 3, 1, 25, 1},
};

// The elements of `data` that each block loaded or stored, by their `number`; as often as they were stored in `times`.
Blocks touched_of(
    const float* data, std::size_t size, bool store, std::map<index_t, int>* times = nullptr,
    const std::function<index_t(index_t)>& number = [](index_t i) { return i; }) {
  Blocks blocks;
  for (const cuda_host::Access& access : cuda_host::accesses) {
    const index_t first = static_cast<const float*>(access.address) - data;
    if (access.store != store || first < 0 || first >= static_cast<index_t>(size)) continue;
    for (index_t i = first; i < first + access.bytes / 4; ++i) {
      blocks[{access.launch, access.block}].insert(number(i));
      if (times) ++(*times)[number(i)];
    }
  }
  return blocks;
}

// A map [N, C, H, W] of floats. Its elements are numbered as channels_last has them, whatever lies in memory.
class FloatMap {
 public:
  FloatMap(index_t N, index_t C, index_t H, index_t W, bool channels_last = true)
      : C_(C), H_(H), W_(W), channels_last_(channels_last), data_(N * C * H * W) {
    for (std::size_t i = 0; i < data_.size(); ++i) data_[i] = static_cast<float>(i % 7) - 3;
  }
  TensorRef ref() {
    if (channels_last_) return {data_.data(), H_ * W_ * C_, 1, W_ * C_, C_};
    return {data_.data(), H_ * W_ * C_, H_ * W_, W_, 1};
  }
  std::size_t size() const { return data_.size(); }

  Blocks touched(bool store, std::map<index_t, int>* times = nullptr) const {
    return touched_of(data_.data(), data_.size(), store, times, [&](index_t i) { return number_of(i); });
  }

  // How many accesses stored to it.
  std::size_t stores() const {
    return std::count_if(cuda_host::accesses.begin(), cuda_host::accesses.end(), [&](const cuda_host::Access& access) {
      const index_t first = static_cast<const float*>(access.address) - data_.data();
      return access.store && first >= 0 && first < static_cast<index_t>(data_.size());
    });
  }

 private:
  index_t number_of(index_t i) const {
    if (channels_last_) return i;
    const index_t pixel = i % (H_ * W_), plane = i / (H_ * W_);
    return (plane / C_ * H_ * W_ + pixel) * C_ + plane % C_;
  }

  index_t C_, H_, W_;
  bool channels_last_;
  Buffer<float> data_;
};

// Input elements under the window of output element `i` ([N, P, Q, channels] in memory): of its channel, or of all.
void add_window(const DepthwiseGeometry& g, index_t i, index_t channels, bool all, Elements& found) {
  const index_t o = i % channels, q = i / channels % g.Q, p = i / channels / g.Q % g.P, n = i / channels / g.Q / g.P;
  for (index_t r = 0; r < g.R; ++r) {
    for (index_t s = 0; s < g.S; ++s) {
      const index_t h = p * g.stride_h + r * g.dilation_h - g.pad_top;
      const index_t w = q * g.stride_w + s * g.dilation_w - g.pad_left;
      if (h < 0 || h >= g.H || w < 0 || w >= g.W) continue;
      const index_t pixel = ((n * g.H + h) * g.W + w) * g.C;
      for (index_t c = 0; c < g.C; ++c) {
        if (all || c == o / g.multiplier) found.insert(pixel + c);
      }
    }
  }
}

Elements windows(const DepthwiseGeometry& g, const Elements& outputs, index_t channels, bool all) {
  Elements found;
  for (const index_t i : outputs) {
    if (!all || i % channels == *outputs.begin() % channels) add_window(g, i, channels, all, found);
  }
  return found;
}

std::string judge(const Blocks& loaded, const Blocks& wanted) {
  if (wanted.size() < 2) return "only one block: choose a larger map";
  for (const auto& [block, elements] : wanted) {
    const auto found = loaded.find(block);
    const std::size_t count = found == loaded.end() ? 0 : found->second.size();
    if (found == loaded.end() || found->second != elements) {
      return "block " + std::to_string(block.second) + " loads " + std::to_string(count) + " elements, needs " +
             std::to_string(elements.size());
    }
  }
  return loaded.size() == wanted.size() ? "" : "blocks that load without a result";
}

std::string each_once(const std::map<index_t, int>& times, std::size_t size) {
  for (const auto& [element, count] : times) {
    if (count != 1) return "element " + std::to_string(element) + " " + std::to_string(count) + " times";
  }
  return times.size() == size ? "" : std::to_string(size - times.size()) + " elements not at all";
}

template <class Call>
void trace(const Call& call) {
  cuda_host::accesses.clear();
  cuda_host::tracing = true;
  call();
  cuda_host::tracing = false;
}

// What the outputs that each block stores need of x, and that each is stored once. parts: a 1x1 window beside the case's.
std::string forward(const Case& c, index_t K, bool parts = false) {
  const DepthwiseGeometry g = c.geometry();
  DepthwiseGeometry smallest = g;
  smallest.R = smallest.S = 1;
  smallest.pad_top = smallest.pad_left = 0;
  const index_t D = g.out_channels(), channels = K ? K : D;
  FloatMap x(g.N, g.C, g.H, g.W, c.channels_last), y(g.N, channels, g.P, g.Q, c.channels_last);
  Buffer<float> weight(D * g.R * g.S), matrix(channels * D * 2);
  const DepthwisePartArgs windows_of_parts[] = {{smallest, weight.data(), 0}, {g, weight.data(), 0}};
  trace([&] {
    if (K) {
      DsconvForwardArgs args{};
      args.g = g, args.K = K, args.input = x.ref(), args.output = y.ref(), args.dw_weight = weight.data();
      args.pw_weight = matrix.data(), args.pw_stride_k = parts ? 2 * D : D, args.pw_stride_c = 1;
      if (parts) args.parts = windows_of_parts, args.num_parts = 2;
      cuda::dsconv_fwd(DType::f32, args, kDevice, nullptr);
    } else {
      cuda::dwconv_fwd(DType::f32, {g, x.ref(), y.ref(), weight.data(), {}}, kDevice, nullptr);
    }
  });
  std::map<index_t, int> times;
  Blocks wanted = y.touched(true, &times);
  for (auto& [block, elements] : wanted) elements = windows(g, elements, channels, K > 0);
  const std::string wrong = each_once(times, y.size());
  if (!c.channels_last && y.stores() * (4 / c.stride) != y.size()) return "stores narrower than a thread's columns";
  return wrong.empty() ? judge(x.touched(false), wanted) : "stores " + wrong;
}

// The same of rooms bsconv (K == 0) and mbconv, whose blocks need all channels of x under their windows.
std::string expanded(const Case& c, index_t K) {
  constexpr index_t kExpanded = 72;
  constexpr cuda::Device kOneProcessor{1, 227 << 10, 90};  // mbconv takes its one kernel
  const DepthwiseGeometry of_input = c.geometry();
  DepthwiseGeometry g = of_input;
  g.C = g.bank = kExpanded;
  const index_t channels = K ? K : kExpanded;
  FloatMap x(g.N, c.C, g.H, g.W), y(g.N, channels, g.P, g.Q);
  Buffer<float> expansion(kExpanded * c.C), weight(kExpanded * g.R * g.S), projection(channels * kExpanded);
  trace([&] {
    if (K) {
      MbconvForwardArgs args{};
      args.g = g, args.in_channels = c.C, args.K = K, args.input = x.ref(), args.output = y.ref();
      args.expand = {expansion.data(), c.C, 1}, args.project = {projection.data(), kExpanded, 1};
      args.dw_weight = weight.data();
      cuda::mbconv_fwd(DType::f32, args, kOneProcessor, nullptr, nullptr);
    } else {
      BsconvForwardArgs args{};
      args.g = g, args.input = x.ref(), args.output = y.ref(), args.dw_weight = weight.data();
      args.pw = {expansion.data(), c.C, 1, c.C, kExpanded, {}};
      cuda::bsconv_fwd(DType::f32, args, kDevice, nullptr, nullptr);
    }
  });
  std::map<index_t, int> times;
  Blocks wanted = y.touched(true, &times);
  for (auto& [block, elements] : wanted) elements = windows(of_input, elements, channels, true);
  const std::string wrong = each_once(times, y.size());
  return wrong.empty() ? judge(x.touched(false), wanted) : "stores " + wrong;
}

// What each block's elements of the input's gradient need of the gradient at the sums.
std::string input_gradient(const Case& c) {
  const DepthwiseGeometry g = c.geometry();
  const index_t D = g.out_channels();
  FloatMap x(g.N, g.C, g.H, g.W, c.channels_last), grad(g.N, D, g.P, g.Q, c.channels_last);
  FloatMap dx(g.N, g.C, g.H, g.W, c.channels_last);
  Buffer<float> weight(D * g.R * g.S);
  trace([&] {
    DwconvBackwardArgs args{g, grad.ref(), {}, x.ref(), weight.data(), {}, dx.ref()};
    Buffer<char> scratch(cuda::dwconv_bwd_scratch(DType::f32, args, kDevice) + 1);
    cuda::dwconv_bwd(DType::f32, args, kDevice, scratch.data(), nullptr);
  });
  std::map<index_t, Elements> readers;  // outputs whose window covers an input element
  for (index_t i = 0; i < static_cast<index_t>(grad.size()); ++i) {
    Elements covered;
    add_window(g, i, D, false, covered);
    for (const index_t element : covered) readers[element].insert(i);
  }
  std::map<index_t, int> times;
  Blocks wanted = dx.touched(true, &times);
  for (auto& [block, elements] : wanted) {
    Elements needed;
    for (const index_t element : elements) needed.insert(readers[element].begin(), readers[element].end());
    elements = needed;
  }
  const std::string wrong = each_once(times, dx.size());
  return wrong.empty() ? judge(grad.touched(false), wanted) : "stores " + wrong;
}

// Each gradient at the sums is read by one block, with the inputs under its window.
std::string weight_gradient(const Case& c) {
  const DepthwiseGeometry g = c.geometry();
  const index_t D = g.out_channels();
  FloatMap x(g.N, g.C, g.H, g.W), grad(g.N, D, g.P, g.Q);
  Buffer<float> weight(D * g.R * g.S), found(D * g.R * g.S);
  trace([&] {
    DwconvBackwardArgs args{g, grad.ref(), {}, x.ref(), weight.data(), {}, {}, found.data()};
    Buffer<char> scratch(cuda::dwconv_bwd_scratch(DType::f32, args, kDevice) + 1);
    cuda::dwconv_bwd(DType::f32, args, kDevice, scratch.data(), nullptr);
  });
  Blocks wanted = grad.touched(false);
  std::map<index_t, int> owners;
  for (auto& [block, elements] : wanted) {
    for (const index_t element : elements) ++owners[element];
    elements = windows(g, elements, D, false);
  }
  const std::string wrong = each_once(owners, grad.size());
  return wrong.empty() ? judge(x.touched(false), wanted) : "gradients read by blocks: " + wrong;
}

// ---- dsconv's backward pass ----

// Those of the blocks that are among `of`'s.
Blocks only(const Blocks& blocks, const Blocks& of) {
  Blocks found;
  for (const auto& [block, elements] : blocks) {
    if (of.contains(block)) found[block] = elements;
  }
  return found;
}

// Elements of all `channels` at the pixels that the elements of maps of `of` channels stand at.
Elements at_pixels(const Elements& elements, index_t of, index_t first, index_t last, index_t channels) {
  Elements found;
  for (const index_t i : elements) {
    for (index_t c = first; c < last; ++c) found.insert(i / of * channels + c);
  }
  return found;
}

// A layer D -> K whose output begins with `keep` channels of z, and a call of its backward pass.
class Separable {
 public:
  Separable(const Case& c, index_t K, index_t keep)
      : g(c.geometry()),
        D(g.out_channels()),
        channels(keep + K),
        x(g.N, g.C, g.H, g.W),
        grad(g.N, channels, g.P, g.Q),
        output(g.N, channels, g.P, g.Q),
        weight_(D * g.R * g.S),
        matrix_(K * D),
        result_(std::max(x.size(), static_cast<std::size_t>(K * D))) {
    DsconvForwardArgs& forward = args.forward;
    forward.g = g, forward.K = K, forward.keep = keep, forward.input = x.ref(), forward.dw_weight = weight_.data();
    forward.pw_weight = matrix_.data(), forward.pw_stride_k = D, forward.pw_stride_c = 1;
    forward.dw_epilogue.activation = Activation::silu;  // its gradient needs the sums
    args.grad_output = grad.ref();
  }

  void want_input() { args.grad_input = {result_.data(), g.H * g.W * g.C, 1, g.W * g.C, g.C}; }
  void want_matrix() { args.grad_pw_weight = result_.data(); }
  void run() {
    scratch_.emplace((cuda::dsconv_bwd_scratch(DType::f32, args, kDevice) + 3) / 4 + 1);
    trace([&] { cuda::dsconv_bwd(DType::f32, args, kDevice, scratch_->data(), nullptr); });
  }

  // What a call keeps first in its scratch.
  Blocks stored(index_t size, std::map<index_t, int>* times) const {
    return touched_of(scratch_->data(), static_cast<std::size_t>(size), true, times);
  }
  index_t scratch_size() const { return static_cast<index_t>(scratch_->size()); }

  const DepthwiseGeometry g;
  const index_t D, channels;
  FloatMap x, grad, output;
  DsconvBackwardArgs args{};

 private:
  Buffer<float> weight_, matrix_, result_;
  std::optional<Buffer<float>> scratch_;
};

// The gradient at the pointwise sums: each block loads the output's gradient where it stores, and the saved output
// there, or x under all windows.
std::string output_gradient(const Case& c, index_t K, bool saved) {
  Separable layer(c, K, 0);
  layer.args.forward.pw_epilogue.activation = saved ? Activation::relu : Activation::silu;
  if (saved) layer.args.forward.output = layer.output.ref();
  layer.want_matrix();
  layer.run();
  std::map<index_t, int> times;
  const Blocks stored = layer.stored(layer.grad.size(), &times);
  std::string wrong = each_once(times, layer.grad.size());
  if (!wrong.empty()) return "stores " + wrong;
  wrong = judge(layer.grad.touched(false), stored);
  if (wrong.empty() && saved) wrong = judge(layer.output.touched(false), stored);
  Blocks needed;
  for (const auto& [block, elements] : stored) {
    if (!saved) needed[block] = windows(layer.g, elements, K, true);
  }
  const Blocks loaded = only(layer.x.touched(false), stored);
  if (wrong.empty() && saved && !loaded.empty()) wrong = "x loaded beside the saved output";
  return !wrong.empty() || saved ? wrong : judge(loaded, needed);
}

// The gradient at the depthwise sums: the output's at its pixels, that of the kept copies of its channels, and x under
// their windows.
std::string z_gradient(const Case& c, index_t K) {
  constexpr index_t kKeep = 8;
  Separable layer(c, K, kKeep);
  layer.want_input();
  layer.run();
  const index_t size = layer.g.N * layer.g.P * layer.g.Q * layer.D;
  std::map<index_t, int> times;
  const Blocks stored = layer.stored(size, &times);
  std::string wrong = each_once(times, static_cast<std::size_t>(size));
  if (!wrong.empty()) return "stores " + wrong;
  Blocks du, x;
  for (const auto& [block, elements] : stored) {
    du[block] = at_pixels(elements, layer.D, kKeep, layer.channels, layer.channels);
    x[block] = windows(layer.g, elements, layer.D, false);
    for (const index_t i : elements) {
      const index_t kept = i % layer.D - (layer.D - kKeep);
      if (kept >= 0) du[block].insert(i / layer.D * layer.channels + kept);
    }
  }
  wrong = judge(layer.grad.touched(false), du);
  return wrong.empty() ? judge(layer.x.touched(false), x) : "gradient: " + wrong;
}

// The gradient of the matrix: a block stores sums for some output channels and some of z's, over pixels that are its
// own; it loads the gradient of the first and x under the windows of the second there.
std::string matrix_gradient(const Case& c, index_t K) {
  Separable layer(c, K, 0);
  layer.want_matrix();
  layer.run();
  std::map<index_t, int> times;
  const Blocks stored = layer.stored(layer.scratch_size(), &times), grads = layer.grad.touched(false);
  const index_t D = layer.D, parts = static_cast<index_t>(times.size()) / (K * D);
  std::string wrong = each_once(times, static_cast<std::size_t>(parts * K * D));
  if (!wrong.empty()) return "stores " + wrong;
  Blocks du, x;
  std::map<index_t, std::map<index_t, int>> owners;  // of each gradient, by the block's first channel of z
  for (const auto& [block, sums] : stored) {
    if (!grads.contains(block)) return "sums of no gradient";
    const Elements& loaded = grads.at(block);
    Elements outputs;
    for (const index_t i : loaded) ++owners[*sums.begin() % D][i];
    for (const index_t i : sums) {
      const index_t k = i / D % K;
      du[block].merge(at_pixels(loaded, K, k, k + 1, K));
      if (k == *sums.begin() / D % K) outputs.merge(at_pixels(loaded, K, i % D, i % D + 1, D));
    }
    x[block] = windows(layer.g, outputs, D, false);
  }
  for (const auto& [channel, counts] : owners) {
    if (wrong.empty()) wrong = each_once(counts, layer.grad.size());
  }
  if (!wrong.empty()) return "gradients read by blocks: " + wrong;
  wrong = judge(grads, du);
  return wrong.empty() ? judge(layer.x.touched(false), x) : "gradient: " + wrong;
}

// ---- sepconv, blurmaxpool ----

// A call(x, y) whose outputs need `c`'s windows of their channel, and are stored once.
template <class Call>
std::string forward_of(const Case& c, const Call& call) {
  const DepthwiseGeometry g = c.geometry();
  FloatMap x(g.N, g.C, g.H, g.W), y(g.N, g.C, g.P, g.Q);
  trace([&] { call(x.ref(), y.ref()); });
  std::map<index_t, int> times;
  Blocks wanted = y.touched(true, &times);
  for (auto& [block, elements] : wanted) elements = windows(g, elements, g.C, false);
  const std::string wrong = each_once(times, y.size());
  return wrong.empty() ? judge(x.touched(false), wanted) : "stores " + wrong;
}

// 1x3 and 3x1; c.stride 2: both pools.
std::string separable_in_space(const Case& c) {
  Buffer<float> row_weight(c.C * 3), col_weight(c.C * 3);
  return forward_of(c, [&](const TensorRef& x, const TensorRef& y) {
    SepconvForwardArgs args{};
    args.row = Case{"", c.N, c.C, c.H, c.W, 1, 3, 1, 1, 1}.geometry();
    args.col = Case{"", c.N, c.C, c.H, c.W / c.stride, 3, 1, 1, 1, 1}.geometry();
    args.pool_w = args.pool_h = c.stride, args.input = x, args.output = y;
    args.row_weight = row_weight.data(), args.col_weight = col_weight.data();
    cuda::sepconv_fwd(DType::f32, args, kDevice, nullptr);
  });
}

// Pool 2x2, filter 3x3, stride 2.
std::string blurred_max(const Case& c) {
  return forward_of(c, [&](const TensorRef& x, const TensorRef& y) {
    const DepthwiseGeometry g = c.geometry();
    BlurMaxPoolArgs args{};
    args.N = g.N, args.C = g.C, args.H = g.H, args.W = g.W, args.Hp = g.H - 1, args.Wp = g.W - 1;
    args.P = g.P, args.Q = g.Q, args.stride_h = args.stride_w = 2, args.size = 3;
    args.window_h = args.window_w = 2, args.input = x, args.output = y;
    cuda::blur_max_pool_fwd(DType::f32, args, kDevice, nullptr);
  });
}

int report(const char* kernel, const Case& c, const std::string& wrong) {
  std::printf("%s %s: %s\n", kernel, c.name, wrong.empty() ? "each block loads what its results need" : wrong.c_str());
  return wrong.empty() ? 0 : 1;
}

}  // namespace

int main() try {
  int wrong = 0;
  for (const Case& c : kCases) {
    wrong += report("dwconv forward", c, forward(c, 0));
    if (c.R == c.S && c.R < 7 && c.dilation == 1) {  // the gradients of other windows read through plain pointers
      wrong += report("dwconv input gradient", c, input_gradient(c));
      wrong += report("dwconv weight gradient", c, weight_gradient(c));
    }
  }
  for (const std::span<const Case> cases : {std::span<const Case>(kCases), std::span<const Case>(kSeparableCases)}) {
    for (const Case& c : cases) {
      for (const index_t K : {24, 160}) {
        const std::string name = "dsconv to " + std::to_string(K) + ", ";
        wrong += report((name + "forward").c_str(), c, forward(c, K));
        if (c.R % 2 == 1 && c.padded && c.dilation == 1) {  // windows of one output size
          wrong += report((name + "forward of two windows").c_str(), c, forward(c, K, true));
        }
        wrong += report((name + "output gradient").c_str(), c, output_gradient(c, K, false));
        wrong += report((name + "output gradient from the output").c_str(), c, output_gradient(c, K, true));
        wrong += report((name + "z's gradient").c_str(), c, z_gradient(c, K));
        wrong += report((name + "matrix's gradient").c_str(), c, matrix_gradient(c, K));
      }
      if (c.dilation > 20) continue;  // no patch: the expanded map goes through memory
      wrong += report("bsconv forward", c, expanded(c, 0));
      wrong += report("mbconv forward", c, expanded(c, 24));
    }
  }
  for (const Case& c : kRows) {
    wrong += report("dwconv forward", c, forward(c, 0));
    if (c.stride == 1) wrong += report("dwconv input gradient", c, input_gradient(c));
  }
  wrong += report("sepconv forward", kCases[0], separable_in_space(kCases[0]));
  wrong += report("sepconv forward, both pools,", kPooled, separable_in_space(kPooled));
  wrong += report("blurmaxpool forward", kPooled, blurred_max(kPooled));
  return wrong ? 1 : 0;
} catch (const std::exception& error) {
  std::fprintf(stderr, "%s\n", error.what());
  return 1;
}
