// Room sepconv, backward. Forward saved its input alone; both stages are computed again, their results and gradients
// are scratch of the compute type, so that the pools choose what forward chose.
//
//   row stage          x -> r, what the column convolution read                          a thread: one element of r
//   stage gradient     of the columns: r, grad_output -> gv, the gradient at their sums  a thread: one pooled pixel after
//                      of the rows: x, gv -> gu                                          the other; its two (or one) sums,
//                                                                                        the larger one's epilogue
//                      backward; for the rows the gradient at r is gathered from gv on the way
//       +--> partial [lines][bias, scale, shift][D] --> sum.h --> the vectors' gradients
//   weight gradients   of the columns from r and gv, of the rows from x and gu           dwconv_weight_gradient.cu
//   input gradient     from gu                                                           dwconv_input_gradient.cu
//
// A block of the stage gradient owns up to 32 channels and a share of the pooled pixels. What leads to no gradient that
// was asked for does not run.
//
//   bytes an input value (fp16, multiplier 1, both pools): x 2, read three times; r 2, gv 2 and gu 4, each written and
//   read twice; grad 0.5; dx 2: 32.5
//
// Roofline, calculated for an H200 (4.3 TB/s), nothing measured: float16, EffNet's first block [128, 32, 32, 32], pool of
// the rows: 138 MB, 32 us; [128, 128, 56, 56], both pools: 1.7 GB, 390 us. Unverified on a GPU.
#include "csrc/cuda/dwconv.h"
#include "csrc/cuda/dwconv_tile.h"
#include "csrc/cuda/scratch.h"

namespace effops::cuda {
namespace {

// One of the two stages: convolution, epilogue, max pool. In: of what it reads, T or the compute type.
template <class T, class In>
struct Stage {
  Map<const In> x;
  const T* weight;
  EpilogueRef epilogue;
  Sizes g;
  int pool_h, pool_w;  // 1 or 2, at most one of them 2
};

// conv + bias of the pixels under pooled pixel (p, q), in the order of torch's pool; without a pool both are one.
template <class T, class In>
EFFOPS_DEVICE void sums_under(const Stage<T, In>& stage, const Cell& cell, int o, compute<T> bias, compute<T> (&u)[2]) {
  EFFOPS_NO_UNROLL
  for (int j = 0; j < stage.pool_h * stage.pool_w; ++j) {
    const int p = cell.p * stage.pool_h + (stage.pool_h > 1 ? j : 0);
    const int q = cell.q * stage.pool_w + (stage.pool_w > 1 ? j : 0);
    compute<T> sum[1];
    window_sums<1>(stage.x, stage.weight, stage.g, cell.n, o, p, q, sum);
    u[0] = j == 0 ? sum[0] + bias : u[0];
    u[1] = sum[0] + bias;
  }
}

// Both of them behind the epilogue.
template <class T>
EFFOPS_DEVICE void activate_pair(const EpilogueRef& epilogue, int o, compute<T> (&v)[2]) {
  const compute<T> none[2] = {};
  apply_epilogue_rows<T, 1>(epilogue, o, none, v);
}

// ---- the row stage's result ----

template <class T>
struct RowResult {
  Stage<T, T> stage;
  Map<compute<T>> r;
  Units units;  // of pooled pixels
  Assignment assignment;
};

template <class T>
EFFOPS_KERNEL(kThreads, 4)
row_result_kernel(EFFOPS_PARAMS RowResult<T> a) {
  using C = compute<T>;
  const Owned owned = owned_by(a.assignment, a.units, global_thread());
  if (owned.unit >= a.units.total) return;
  const Cell cell = cell_of(a.units, owned.unit, a.stage.g.Q / a.stage.pool_w);
  C bias[1], u[2];
  read_channels<T>(a.stage.epilogue.bias, owned.group, C(0), bias);
  sums_under(a.stage, cell, owned.group, bias[0], u);
  activate_pair<T>(a.stage.epilogue, owned.group, u);
  *a.r.at(cell.n, owned.group, cell.p, cell.q) = takes_second(u[0], u[1]) ? u[1] : u[0];
}

// ---- the gradient of a stage ----

template <class T, class In>
struct StageGradient {
  Stage<T, In> stage;
  Map<const T> grad;            // at the stage's result; or absent, and gathered from
  Map<const compute<T>> above;  // the gradient at the sums of the column convolution, by
  const T* above_weight;
  Sizes above_g;
  Map<compute<T>> du;                                        // absent: not wanted
  compute<T>* partial;                                       // [lines][segments][D]
  int segments, bias_segment, scale_segment, shift_segment;  // negative: not wanted
  Units units;                                               // of pooled pixels
  Shares shares;
};

// The gradient that comes back through the column convolution.
template <class T, class In>
EFFOPS_DEVICE compute<T> gathered(const StageGradient<T, In>& a, const Cell& cell, int o) {
  const Sizes& g = a.above_g;
  const T* taps = kernel_of(a.above_weight, g, g.R, o);
  compute<T> sum = 0;
  for (int r = 0; r < g.R; ++r) {
    const int place = cell.p + g.pad_top - r * g.dilation_h, p = place / g.stride_h;
    if (place < 0 || p * g.stride_h != place || p >= g.P) continue;
    sum += *a.above.at(cell.n, o, p, cell.q) * to_compute(load_global_cached(taps + r));
  }
  return sum;
}

template <class T, class In>
EFFOPS_KERNEL(kThreads, kBlocks<T>)
stage_gradient_kernel(EFFOPS_PARAMS StageGradient<T, In> a) {
  using C = compute<T>;
  const Stage<T, In>& stage = a.stage;
  const Share share = share_of<1>(a.shares);
  const int o = share.channel;
  C bias[1] = {}, of_bias[1] = {}, of_scale[1] = {}, of_shift[1] = {};
  if (share.live) read_channels<T>(stage.epilogue.bias, o, C(0), bias);
  for_each_cell(share, a.units, stage.g.Q / stage.pool_w, [&](const Cell& cell) {
    C u[2];
    sums_under(stage, cell, o, bias[0], u);
    C v[2] = {u[0], u[1]};
    activate_pair<T>(stage.epilogue, o, v);
    const int pooled = stage.pool_h * stage.pool_w, chosen = pooled > 1 && takes_second(v[0], v[1]) ? 1 : 0;
    const C gradient =
        a.grad.data != nullptr ? to_compute(*a.grad.at(cell.n, o, cell.p, cell.q)) : gathered(a, cell, o);
    EFFOPS_NO_UNROLL
    for (int j = 0; j < pooled; ++j) {
      const C sum[1] = {j == 0 ? u[0] : u[1]}, none[1] = {};
      C du[1] = {j == chosen ? gradient : C(0)};
      EpilogueTerms<C, 1> terms;
      epilogue_gradient<T>(stage.epilogue, o, sum, none, du, terms);
      of_bias[0] += du[0];
      of_scale[0] += terms.scale[0];
      of_shift[0] += terms.residual[0];
      if (a.du.data == nullptr) continue;
      const int p = cell.p * stage.pool_h + (stage.pool_h > 1 ? j : 0);
      const int q = cell.q * stage.pool_w + (stage.pool_w > 1 ? j : 0);
      *a.du.at(cell.n, o, p, q) = du[0];
    }
  });
  int turn = 0;
  const auto leave = [&](int segment, C(&sum)[1]) {
    if (segment < 0) return;
    block_sums(a.shares.lanes, turn++, sum);
    write_partial(a.partial, a.shares, share, a.segments, segment, stage.g.D, sum);
  };
  leave(a.bias_segment, of_bias);
  leave(a.scale_segment, of_scale);
  leave(a.shift_segment, of_shift);
}

// ---- host ----

bool any(const EpilogueGrads& grads) { return grads.bias || grads.scale || grads.shift; }

// Of a stage with g's convolution, behind its pool.
Extent pooled_maps(const DepthwiseGeometry& g, index_t pool_h, index_t pool_w) {
  return {g.N, g.out_channels(), g.P / pool_h, g.Q / pool_w};
}

// A backward call: the steps in their order. Scratch is taken whether a step is launched or counted.
template <class T>
class Backward {
  using C = compute<T>;

 public:
  Backward(const SepconvBackwardArgs& args, Run& run) : args_(args), forward_(args.forward), run_(run) {
    const bool of_rows = args.grad_input.data || args.grad_row_weight || any(args.row_grads);
    if (!of_rows && !args.grad_col_weight && !any(args.col_grads)) return;
    const Extent rows = pooled_maps(forward_.row, 1, forward_.pool_w);
    r_ = take_map(run, dtype_of<C>, forward_.input, rows.images, rows.channels, rows.height, rows.width);
    row_result(rows);
    if (of_rows || args.grad_col_weight) gv_ = of_sums(forward_.col);
    stage_gradient<C>(column_stage(), args.grad_output, gv_, args.col_grads);
    weight_gradient(forward_.col, {gv_, dtype_of<C>}, r_, dtype_of<C>, args.grad_col_weight);
    if (!of_rows) return;
    if (args.grad_input.data || args.grad_row_weight) gu_ = of_sums(forward_.row);
    stage_gradient<T>(row_stage(), {}, gu_, args.row_grads);
    weight_gradient(forward_.row, {gu_, dtype_of<C>}, forward_.input, dtype_of<T>, args.grad_row_weight);
    if (args.grad_input.data && run.launching) {
      depthwise_input_gradient(dtype_of<T>, forward_.row, {gu_, dtype_of<C>}, forward_.row_weight, args.grad_input,
                               run.device, run.stream);
    }
  }

 private:
  Stage<T, T> row_stage() const {
    return {map_of<const T>(forward_.input),
            static_cast<const T*>(forward_.row_weight),
            forward_.row_epilogue,
            sizes_of(forward_.row),
            1,
            narrow(forward_.pool_w)};
  }
  Stage<T, C> column_stage() const {
    return {map_of<const C>(r_),     static_cast<const T*>(forward_.col_weight),
            forward_.col_epilogue,   sizes_of(forward_.col),
            narrow(forward_.pool_h), 1};
  }
  TensorRef of_sums(const DepthwiseGeometry& g) {
    return take_map(run_, dtype_of<C>, forward_.input, g.N, g.out_channels(), g.P, g.Q);
  }

  void row_result(const Extent& maps) {
    const Units units = units_of(maps, Tiling{}, run_.device);
    if (!run_.launching || units.total == 0) return;
    const RowResult<T> params{row_stage(), map_of<C>(r_), units, {narrow(maps.channels), channels_inside(r_)}};
    launch(row_result_kernel<T>, blocks_for(units.total * maps.channels), run_.stream, params);
  }

  // grad: at the stage's result, or absent: through the column convolution.
  template <class In>
  void stage_gradient(const Stage<T, In>& stage, const TensorRef& grad, const TensorRef& du,
                      const EpilogueGrads& grads) {
    constexpr Tiling kTiling{1, 1, kBlocks<T>};
    const Sizes& g = stage.g;
    const Extent maps{forward_.row.N, g.D, g.P / stage.pool_h, g.Q / stage.pool_w};
    const Units units = units_of(maps, kTiling, run_.device);
    const Shares shares = shares_of(units, g.D, channels_inside(r_), kTiling, run_.device);
    void* const partial = run_.scratch.take(partial_bytes<C>(shares.lines, kMaxVectors, g.D));
    if (!run_.launching) return;
    SumLines sums{partial, shares.lines, 0, g.D, false, {}};
    const auto segment = [&](void* data, DType dtype) {
      if (data == nullptr) return -1;
      sums.vector[sums.segments] = {data, dtype};
      return sums.segments++;
    };
    const int bias = segment(grads.bias, grads.bias_dtype), scale = segment(grads.scale, grads.scale_dtype),
              shift = segment(grads.shift, grads.shift_dtype);
    if (shares.lines > 0) {
      const StageGradient<T, In> params{stage,
                                        map_of<const T>(grad),
                                        map_of<const C>(gv_),
                                        static_cast<const T*>(forward_.col_weight),
                                        sizes_of(forward_.col),
                                        map_of<C>(du),
                                        static_cast<C*>(partial),
                                        sums.segments,
                                        bias,
                                        scale,
                                        shift,
                                        units,
                                        shares};
      launch(stage_gradient_kernel<T, In>, blocks_for(shares, block_sums_bytes<C, 1>(kThreads)), run_.stream, params);
    }
    if (sums.segments > 0) sum_lines<C>(sums, run_.stream);
  }

  void weight_gradient(const DepthwiseGeometry& g, const Gradient& du, const TensorRef& input, DType dtype,
                       void* grad_weight) {
    if (grad_weight == nullptr) return;
    void* const scratch = run_.scratch.take(depthwise_weight_gradient_scratch(dtype, g, du, input, run_.device));
    if (!run_.launching) return;
    depthwise_weight_gradient_as(dtype_of<T>, dtype, g, du, input, grad_weight, run_.device, scratch, run_.stream);
  }

  const SepconvBackwardArgs& args_;
  const SepconvForwardArgs& forward_;
  Run& run_;
  TensorRef r_, gv_, gu_;  // gv_, gu_: the gradients at the column and the row sums
};

}  // namespace

std::size_t sepconv_bwd_scratch(DType dtype, const SepconvBackwardArgs& args, const Device& device) {
  return count_scratch(
      device, [&](Run& run) { with_type(dtype, [&](auto element) { Backward<decltype(element)>(args, run); }); });
}

void sepconv_bwd(DType dtype, const SepconvBackwardArgs& args, const Device& device, void* scratch, Stream stream) {
  Run run{device, Scratch(scratch), stream, true};
  with_type(dtype, [&](auto element) { Backward<decltype(element)>(args, run); });
}

}  // namespace effops::cuda
