// Room dwconv: the gradient of the epilogue, and the order of a backward pass.
//
//     grad, output or x --> epilogue gradient --> du (scratch) --> weight gradient --> grad_weight
//                              |                     +-----------> input gradient ---> grad_input
//                              +--> partial [lines][bias, scale, shift][D] --> sum.h --> the vectors' gradients
//
//   Without activation and scale du is grad itself, and is neither computed nor stored. The gradient of the batch
//   statistics goes the same way: its du follows from x, mean and the gradients of mean and var, and is float32.
//
//   channels_last: a block owns up to 32 pairs of channels and a share of the strips; a thread takes one strip after
//   the other and keeps the three sums of its channels.
//
//        from the output, or an affine epilogue:    the sums are needed (an activation that its output does not tell):
//        grad    + + + +                            x   . . . +       computed again column by column, as the forward
//        output  + + + +   four columns at once     .   . . . +  ---> pass does, two rows high; grad is read where a
//        du      > > > >   8 accesses in flight         . . . +       column is complete
//
//   bytes an output (fp16)    grad 2, output or x 2, du 2; of the statistics: x 2, du 4
//
// Roofline, calculated for an H200 (4.3 TB/s), nothing measured: float16 [128, 128, 56, 56]: 308 MB, 72 us;
// [128, 512, 14, 14]: 77 MB, 18 us. Unverified on a GPU.
#include "csrc/cuda/dwconv.h"
#include "csrc/cuda/dwconv_tile.h"
#include "csrc/cuda/scratch.h"

namespace effops::cuda {
namespace {

// ---- epilogue gradient ----

struct NoWindow {};

// The gradient at the sums of the batch statistics: (grad_mean + 2 grad_var (u - mean)) / pixels, u with bias.
template <class C>
struct StatisticsGradient {
  const C *mean, *grad_mean, *grad_var;  // mean == nullptr: this is an epilogue's gradient
  C share;                               // 1 / pixels
};

template <class T>
struct EpilogueGradient {
  Map<const T> x, grad, saved;  // saved: the epilogue's output, or absent
  Map<T> grad_residual;         // absent: not wanted
  TensorRef du;                 // of T or float
  bool wide;                    // it is of float
  const T* weight;
  EpilogueRef epilogue;
  StatisticsGradient<compute<T>> statistics;
  compute<T>* partial;                                       // [lines][segments][D]
  int segments, bias_segment, scale_segment, shift_segment;  // negative: not wanted
  Sizes g;
  Units units;
  Shares shares;
};

template <class T, int N>
EFFOPS_DEVICE void store_du(const EpilogueGradient<T>& a, index_t n, int o, int p, int q, const compute<T> (&v)[N]) {
  if (a.du.data == nullptr) return;
  const index_t at = n * a.du.n + o * a.du.c + p * a.du.h + q * a.du.w;
  if constexpr (sizeof(T) == 2) {
    if (a.wide) return store_channels(static_cast<float*>(a.du.data) + at, v);
  }
  store_channels(static_cast<T*>(a.du.data) + at, v);
}

// What is summed over pixels for the gradients of the vectors.
template <class C, int N>
struct EpilogueSums {
  C bias[N] = {}, scale[N] = {}, shift[N] = {};

  EFFOPS_DEVICE void add(const C (&du)[N], const EpilogueTerms<C, N>& terms) {
    EFFOPS_UNROLL
    for (int j = 0; j < N; ++j) {
      bias[j] += du[j];
      scale[j] += terms.scale[j];
      shift[j] += terms.residual[j];
    }
  }
};

// d loss / d sums at one pixel from u = conv + bias.
template <class T, int N>
EFFOPS_DEVICE void gradient_from_sums(const EpilogueGradient<T>& a, index_t n, int o, int p, int q,
                                      const compute<T> (&u)[N], EpilogueSums<compute<T>, N>& sums) {
  using C = compute<T>;
  C du[N];
  EpilogueTerms<C, N> terms;
  if (a.statistics.mean != nullptr) {
    EFFOPS_UNROLL
    for (int j = 0; j < N; ++j) {
      const C away = u[j] - a.statistics.mean[o + j];
      du[j] = (a.statistics.grad_mean[o + j] + C(2) * a.statistics.grad_var[o + j] * away) * a.statistics.share;
      terms.residual[j] = terms.scale[j] = C(0);
    }
  } else {
    C residual[N];
    Map<const T> map = const_map<T>(a.epilogue.residual);
    if (a.epilogue.post == Activation::none) map.data = nullptr;  // not needed
    load_if_present(map, n, o, p, q, residual);
    load_channels<N>(a.grad.at(n, o, p, q), du);
    epilogue_gradient<T>(a.epilogue, o, u, residual, du, terms);
    if (a.grad_residual.data != nullptr) store_channels(a.grad_residual.at(n, o, p, q), terms.residual);
  }
  store_du(a, n, o, p, q, du);
  sums.add(du, terms);
}

// The same where the sums are not needed: from the output, or of an affine epilogue. All loads of a few columns are
// issued before the first is used.
constexpr int kColumnsAtOnce = 4;

template <class T, int N>
EFFOPS_DEVICE void gradient_without_sums(const EpilogueGradient<T>& a, const Cell& cell, int o,
                                         const compute<T> (&scale)[N], EpilogueSums<compute<T>, N>& sums) {
  using C = compute<T>;
  const T* grad = a.grad.at(cell.n, o, cell.p, cell.q);
  const T* saved = a.saved.at(cell.n, o, cell.p, cell.q);
  for (int first = 0; first < cell.count; first += kColumnsAtOnce) {
    Vec<T, N> loaded[kColumnsAtOnce], outputs[kColumnsAtOnce] = {};
    EFFOPS_UNROLL
    for (int i = 0; i < kColumnsAtOnce; ++i) {
      if (first + i >= cell.count) break;
      loaded[i] = load_vec<T, N>(grad + (first + i) * a.grad.w);
      if (a.saved.data != nullptr) outputs[i] = load_vec<T, N>(saved + (first + i) * a.saved.w);
    }
    EFFOPS_UNROLL
    for (int i = 0; i < kColumnsAtOnce; ++i) {
      if (first + i >= cell.count) break;
      const int q = cell.q + first + i;
      C du[N], y[N];
      EpilogueTerms<C, N> terms;
      EFFOPS_UNROLL
      for (int j = 0; j < N; ++j) {
        terms.residual[j] = to_compute(loaded[i].v[j]);
        terms.scale[j] = C(0);  // would need the sums
        du[j] = terms.residual[j] * scale[j];
        y[j] = to_compute(outputs[i].v[j]);
      }
      if (a.saved.data != nullptr) epilogue_gradient_from_output<T>(a.epilogue, y, du);
      if (a.grad_residual.data != nullptr) store_channels(a.grad_residual.at(cell.n, o, cell.p, q), terms.residual);
      store_du(a, cell.n, o, cell.p, q, du);
      sums.add(du, terms);
    }
  }
}

// Window: NoWindow where the sums are not needed.
template <class T, class Window, int Rows, int N, int Blocks>
EFFOPS_KERNEL(kThreads, Blocks)
epilogue_gradient_kernel(EFFOPS_PARAMS EpilogueGradient<T> a) {
  using C = compute<T>;
  const Share share = share_of<N>(a.shares);
  const int o = share.channel;
  EpilogueSums<C, N> sums;
  if constexpr (std::is_same_v<Window, NoWindow>) {
    C scale[N];
    if (share.live) read_channels<T>(a.epilogue.scale, o, C(1), scale);
    for_each_cell(share, a.units, a.g.Q, [&](const Cell& cell) { gradient_without_sums(a, cell, o, scale, sums); });
  } else if (share.live) {
    C bias[N];
    read_channels<T>(a.epilogue.bias, o, C(0), bias);
    const Depthwise<T, T, Window, Rows, N> depthwise(a.x, a.weight, a.g, o, false);
    for_each_cell(share, a.units, a.g.Q, [&](const Cell& cell) {
      const int count = a.g.P - cell.p < Rows ? a.g.P - cell.p : Rows;
      depthwise.run(cell, [&](int q, const C(&raw)[Rows][N]) {
        row_by_row(raw, count, [&](int i, const C(&sum)[N]) {
          C u[N];
          EFFOPS_UNROLL
          for (int j = 0; j < N; ++j) u[j] = sum[j] + bias[j];
          gradient_from_sums(a, cell.n, o, cell.p + i, q, u, sums);
        });
      });
    });
  }
  int turn = 0;
  const auto leave = [&](int segment, C(&sum)[N]) {
    if (segment < 0) return;
    block_sums(a.shares.lanes, turn++, sum);
    write_partial(a.partial, a.shares, share, a.segments, segment, a.g.D, sum);
  };
  leave(a.bias_segment, sums.bias);
  leave(a.scale_segment, sums.scale);
  leave(a.shift_segment, sums.shift);
}

// Two blocks a multiprocessor where the sums are recomputed: activations and their derivatives, beside taps and sums,
// spill at three.
template <class T>
Choice<EpilogueGradient<T>> choose_epilogue_gradient(const DepthwiseGeometry& g, const Access& access, bool recompute) {
  if constexpr (kHasPairs<T>) {
    if (access.pairs() && !recompute)
      return {{1, kPair, 4, Walks::along}, epilogue_gradient_kernel<T, NoWindow, 1, kPair, 4>};
    if (access.pairs() && access.windows()) {
      if (Window3::fits(g)) return {{2, kPair, 2, Walks::along}, epilogue_gradient_kernel<T, Window3, 2, kPair, 2>};
      if (Window3Half::fits(g))
        return {{2, kPair, 2, Walks::along}, epilogue_gradient_kernel<T, Window3Half, 2, kPair, 2>};
    }
    if (access.pairs()) return {{1, kPair, 2}, epilogue_gradient_kernel<T, AnyWindow, 1, kPair, 2>};
  }
  if (!recompute) return {{1, 1, 4}, epilogue_gradient_kernel<T, NoWindow, 1, 1, 4>};
  return {{1, 1, 2}, epilogue_gradient_kernel<T, AnyWindow, 1, 1, 2>};
}

// What both gradients that lead to du, of an epilogue and of the statistics, are asked for.
template <class T>
struct EpilogueGradientJob {
  const DepthwiseGeometry& g;
  TensorRef input, grad_output, saved, du;
  bool wide;       // du is of float
  bool recompute;  // from input and weight
  const void* weight;
  EpilogueRef epilogue;
  EpilogueGrads grads;
  StatisticsGradient<compute<T>> statistics{};

  // Scratch for the partial results.
  std::size_t bytes(const Device& device) const {
    return partial_bytes<compute<T>>(plan(device).shares.lines, kMaxVectors, g.out_channels());
  }

  void run(const Device& device, void* scratch, Stream stream) const {
    using C = compute<T>;
    const Plan p = plan(device);
    SumLines sums{scratch, p.shares.lines, 0, narrow(g.out_channels()), false, {}};
    const auto segment = [&](void* data, DType dtype) {
      if (data == nullptr) return -1;
      sums.vector[sums.segments] = {data, dtype};
      return sums.segments++;
    };
    const int bias = segment(grads.bias, grads.bias_dtype), scale = segment(grads.scale, grads.scale_dtype),
              shift = segment(grads.shift, grads.shift_dtype);
    if (p.shares.lines > 0) {
      const EpilogueGradient<T> params{map_of<const T>(input),
                                       map_of<const T>(grad_output),
                                       map_of<const T>(saved),
                                       map_of<T>(grads.residual),
                                       du,
                                       wide,
                                       static_cast<const T*>(weight),
                                       epilogue,
                                       statistics,
                                       static_cast<C*>(scratch),
                                       sums.segments,
                                       bias,
                                       scale,
                                       shift,
                                       sizes_of(g),
                                       p.units,
                                       p.shares};
      launch(p.choice.kernel, blocks_for(p.shares, block_sums_bytes<C, kPair>(kThreads)), stream, params);
    }
    if (sums.segments > 0) sum_lines<C>(sums, stream);
  }

 private:
  struct Plan {
    Choice<EpilogueGradient<T>> choice;
    Units units;
    Shares shares;
  };
  Plan plan(const Device& device) const {
    Access access(g);
    if (recompute) access.need(input, sizeof(T));
    access.need(grad_output, sizeof(T));
    access.need(saved, sizeof(T));
    access.need(du, wide ? sizeof(float) : sizeof(T));
    access.need(grads.residual, sizeof(T));
    if (epilogue.post != Activation::none) access.need(epilogue.residual, sizeof(T));
    Plan p;
    p.choice = choose_epilogue_gradient<T>(g, access, recompute);
    const TensorRef& map = grad_output.data ? grad_output : du.data ? du : input;
    p.units = units_of(sums_of(g), p.choice, device);
    p.shares = shares_of(p.units, g.out_channels(), channels_inside(map), p.choice, device);
    return p;
  }
};

// A map [N, D, P, Q] in scratch, in the order of `like`.
TensorRef scratch_map(Scratch& scratch, const DepthwiseGeometry& g, const TensorRef& like, std::size_t element) {
  const index_t channels = g.out_channels(), pixels = g.P * g.Q;
  void* const data = scratch.take(static_cast<std::size_t>(g.N * channels * pixels) * element);
  if (channels_inside(like)) return {data, pixels * channels, 1, g.Q * channels, channels};
  return {data, channels * pixels, pixels, g.Q, 1};
}

// What follows from du.
void from_sums(DType dtype, const DepthwiseGeometry& g, const Gradient& du, const TensorRef& input, const void* weight,
               const TensorRef& grad_input, void* grad_weight, Run& run) {
  if (grad_weight != nullptr) {
    void* const partial = run.scratch.take(depthwise_weight_gradient_scratch(dtype, g, du, input, run.device));
    if (run.launching) depthwise_weight_gradient(dtype, g, du, input, grad_weight, run.device, partial, run.stream);
  }
  if (run.launching && grad_input.data != nullptr) {
    depthwise_input_gradient(dtype, g, du, weight, grad_input, run.device, run.stream);
  }
}

template <class T>
void to_sums(const EpilogueGradientJob<T>& job, Run& run) {
  void* const partial = run.scratch.take(job.bytes(run.device));
  if (run.launching) job.run(run.device, partial, run.stream);
}

template <class T>
void backward(const DwconvBackwardArgs& args, Run& run) {
  const DepthwiseGeometry& g = args.g;
  const EpilogueRef& e = args.epilogue;
  const EpilogueGrads& grads = args.grads;
  const bool vectors = grads.bias || grads.scale || grads.shift || grads.residual.data;
  const bool wants_du = args.grad_input.data || args.grad_weight;
  // The gradient at the sums is that of the output, and is not stored again.
  const bool same = e.activation == Activation::none && e.post == Activation::none && e.scale.data == nullptr;
  const bool recompute = args.output.data == nullptr && needs_sums(e, grads);
  TensorRef stored;
  if (wants_du && !same) stored = scratch_map(run.scratch, g, args.input, sizeof(T));
  if (vectors || stored.data) {
    to_sums<T>({g, args.input, args.grad_output, args.output, stored, false, recompute, args.weight, e, grads}, run);
  }
  from_sums(dtype_of<T>, g, {stored.data ? stored : args.grad_output, dtype_of<T>}, args.input, args.weight,
            args.grad_input, args.grad_weight, run);
}

template <class T>
void statistics_backward(const DwconvStatsBackwardArgs& args, Run& run) {
  using C = compute<T>;
  const DepthwiseGeometry& g = args.g;
  // In the compute type: divided by the pixels of a large batch, the gradient is too small for float16.
  const TensorRef du = scratch_map(run.scratch, g, args.input, sizeof(C));
  EpilogueRef only_bias;
  only_bias.bias = args.bias;
  EpilogueGrads grads;
  grads.bias = args.grad_bias;
  grads.bias_dtype = args.grad_bias_dtype;
  const double pixels = static_cast<double>(g.N) * static_cast<double>(g.P) * static_cast<double>(g.Q);
  to_sums<T>({g,
              args.input,
              {},
              {},
              du,
              sizeof(T) == 2,
              true,
              args.weight,
              only_bias,
              grads,
              {static_cast<const C*>(args.mean), static_cast<const C*>(args.grad_mean),
               static_cast<const C*>(args.grad_var), static_cast<C>(1 / pixels)}},
             run);
  from_sums(dtype_of<T>, g, {du, dtype_of<C>}, args.input, args.weight, args.grad_input, args.grad_weight, run);
}

}  // namespace

std::size_t dwconv_bwd_scratch(DType dtype, const DwconvBackwardArgs& args, const Device& device) {
  return count_scratch(
      device, [&](Run& run) { with_type(dtype, [&](auto element) { backward<decltype(element)>(args, run); }); });
}

void dwconv_bwd(DType dtype, const DwconvBackwardArgs& args, const Device& device, void* scratch, Stream stream) {
  Run run{device, Scratch(scratch), stream, true};
  with_type(dtype, [&](auto element) { backward<decltype(element)>(args, run); });
}

std::size_t dwconv_stats_bwd_scratch(DType dtype, const DwconvStatsBackwardArgs& args, const Device& device) {
  return count_scratch(device, [&](Run& run) {
    with_type(dtype, [&](auto element) { statistics_backward<decltype(element)>(args, run); });
  });
}

void dwconv_stats_bwd(DType dtype, const DwconvStatsBackwardArgs& args, const Device& device, void* scratch,
                      Stream stream) {
  Run run{device, Scratch(scratch), stream, true};
  with_type(dtype, [&](auto element) { statistics_backward<decltype(element)>(args, run); });
}

}  // namespace effops::cuda
