// What crosses from the bindings (torch headers allowed) to the kernels of every backend (no torch headers). Plain data
// only: the ISA translation units of cpu/ must not instantiate shared templates, or the linker may hand their vector code
// to the baseline path.
#pragma once

#include <cstdint>

namespace effops {

using index_t = std::int64_t;

enum class DType : int { f32 = 0, bf16 = 1, f64 = 2, f16 = 3 };

// The order is effops.ops.epilogue.ACTIVATIONS.
enum class Activation : int { none, relu, relu6, leaky_relu, silu, hardswish, hardsigmoid, sigmoid, gelu };
constexpr int kNumActivations = 9;

// A 4-D tensor: strides in elements, in the order N C H W whatever the memory format. data == nullptr: absent.
struct TensorRef {
  void* data = nullptr;
  index_t n = 0, c = 0, h = 0, w = 0;
};

// A per-channel vector; its dtype is the input's or float32.
struct ChannelRef {
  const void* data = nullptr;
  index_t stride = 0;
  DType dtype = DType::f32;
};

// post(act(conv + bias) * scale + shift + residual); grad_* are filled by the backward kernels where their data is set.
struct EpilogueRef {
  ChannelRef bias, scale, shift;
  TensorRef residual;
  Activation activation = Activation::none;
  Activation post = Activation::none;
  double slope = 0.0;
};

struct EpilogueGrads {
  void* bias = nullptr;
  void* scale = nullptr;
  void* shift = nullptr;
  DType bias_dtype = DType::f32, scale_dtype = DType::f32, shift_dtype = DType::f32;
  TensorRef residual;
};

// Sizes of a depthwise convolution (glossary in csrc/README.md). Output channel o reads input channel o / multiplier
// with the kernel o % bank.
struct DepthwiseGeometry {
  index_t N, C, H, W;
  index_t P, Q;
  index_t R, S;
  index_t stride_h, stride_w, pad_top, pad_left, dilation_h, dilation_w;
  index_t multiplier, bank;
  index_t named_bank = 0;  // 0, or 1 + the place of a bank in effops/ops/dwconv/banks.py whose values the weight holds
  index_t out_channels() const { return C * multiplier; }
};

struct DwconvForwardArgs {
  DepthwiseGeometry g;
  TensorRef input, output;
  const void* weight;  // [bank, R, S] contiguous
  EpilogueRef epilogue;
};

struct DwconvBackwardArgs {
  DepthwiseGeometry g;
  TensorRef grad_output, output, input;
  const void* weight;
  EpilogueRef epilogue;
  TensorRef grad_input;  // data == nullptr: not asked for
  void* grad_weight = nullptr;
  EpilogueGrads grads;
};

struct DwconvStatsArgs {
  DepthwiseGeometry g;
  TensorRef input;
  const void* weight;
  ChannelRef bias;
  void* mean;  // compute type, [out_channels]
  void* var;
};

struct DwconvStatsBackwardArgs {
  DepthwiseGeometry g;
  TensorRef input;
  const void* weight;
  ChannelRef bias;
  const void *grad_mean, *grad_var, *mean;  // compute type, contiguous
  TensorRef grad_input;
  void* grad_weight = nullptr;
  void* grad_bias = nullptr;
  DType grad_bias_dtype = DType::f32;
};

// Batch norm on the batch's own statistics, where the epilogue has scale and shift otherwise: between the pointwise's
// activation and its residual. The kernels write activated, mean and var forward and read them backward.
struct BatchNormRef {
  TensorRef activated;                   // act(conv + bias), [N, K, P, Q]; data == nullptr: no norm
  void *mean = nullptr, *var = nullptr;  // of `activated`, population variance; compute type, [K]
  ChannelRef weight, bias;               // absent: ones, zeros
  double eps = 0;
};

// One depthwise window of several that read the same map side by side (Multiception, MixConv).
struct DepthwisePartArgs {
  DepthwiseGeometry g;  // its own channels, window and pads; a kernel a channel, no multiplier
  const void* weight;
  index_t channel;  // the first input channel it reads
  void* grad_weight = nullptr;
};

struct DsconvForwardArgs {
  DepthwiseGeometry g;
  // Where there are parts, g has the whole input, no dilation and the rows that any window spans; its columns are the
  // first part's. dw_weight is absent then.
  const DepthwisePartArgs* parts = nullptr;
  index_t num_parts = 0;
  index_t passthrough_channels, K, keep;
  bool tf32;  // float32 products may be rounded to TF32; only CUDA kernels do
  TensorRef input, passthrough, output;
  const void* dw_weight = nullptr;
  EpilogueRef dw_epilogue;
  const void* pw_weight;
  index_t pw_stride_k, pw_stride_c;
  EpilogueRef pw_epilogue;
  BatchNormRef norm;     // its parameters' gradients are pw_grads.scale and pw_grads.shift
  void* sums = nullptr;  // [N, K] of the compute type: the sums of the K channels over each image, or not wanted
};

struct DsconvBackwardArgs {
  DsconvForwardArgs forward;  // output: the saved one, or absent
  TensorRef grad_output;
  TensorRef grad_input, grad_passthrough;
  void* grad_dw_weight = nullptr;
  void* grad_pw_weight = nullptr;  // [K, Cz] contiguous
  EpilogueGrads dw_grads, pw_grads;
};

// A pointwise convolution: weight[o, c] at o * stride_k + c * stride_c. outputs == 0: there is none.
struct PointwiseRef {
  const void* weight = nullptr;
  index_t stride_k = 0, stride_c = 0;
  index_t inputs = 0, outputs = 0;
  EpilogueRef epilogue;
};

struct BsconvForwardArgs {
  DepthwiseGeometry g;   // of the depthwise convolution: C is K, H x W the input's
  PointwiseRef mid, pw;  // mid: BSConv-S's first one, or none
  TensorRef input, output;
  const void* dw_weight;  // [K, R, S] contiguous
  EpilogueRef epilogue;
};

struct BsconvBackwardArgs {
  BsconvForwardArgs forward;  // output: the saved one, or absent
  TensorRef grad_output, grad_input;
  void *grad_mid_weight = nullptr, *grad_pw_weight = nullptr;  // contiguous
  void* grad_dw_weight = nullptr;
  EpilogueGrads mid_grads, pw_grads, grads;
};

// 1xS convolution, epilogue, max pool of pool_w along the width, Rx1 convolution, epilogue, max pool of pool_h along
// the height; a pool of 1 is none. row.Q and col.P are multiples of their pools: what a pool drops is not computed. Row
// p of the output is row p / planes of plane p % planes; planes are `plane` elements apart.
struct SepconvForwardArgs {
  DepthwiseGeometry row, col;
  index_t pool_w, pool_h;
  index_t planes = 1, plane = 0;
  TensorRef input, output;
  const void *row_weight, *col_weight;
  EpilogueRef row_epilogue, col_epilogue;
};

struct SepconvBackwardArgs {
  SepconvForwardArgs forward;
  TensorRef grad_output, grad_input;
  void* grad_row_weight = nullptr;
  void* grad_col_weight = nullptr;
  EpilogueGrads row_grads, col_grads;
};

// Max pool of stride 1, then a blur: the binomial filter of `size` with stride. Hp and Wp are the size between the two.
struct BlurMaxPoolArgs {
  index_t N, C, H, W, Hp, Wp, P, Q;
  index_t stride_h, stride_w, size;
  index_t window_h, window_w, pool_top, pool_left;
  bool reflect;
  TensorRef input;
  TensorRef output;      // forward: written; backward: its gradient
  TensorRef grad_input;  // backward
};

// A squeeze-excite's two products: gate(expand(act(reduce(means)))). Contiguous weights [between, C] and [C, between].
struct ExcitationRef {
  const void *reduce_weight = nullptr, *expand_weight = nullptr;  // null: there is none
  ChannelRef reduce_bias, expand_bias;
  index_t between = 0;
  Activation activation = Activation::none;
  Activation gate = Activation::none;
};

struct ExcitationGrads {
  void *reduce_weight = nullptr, *expand_weight = nullptr;
  void *reduce_bias = nullptr, *expand_bias = nullptr;
  DType reduce_bias_dtype = DType::f32, expand_bias_dtype = DType::f32;
};

struct SeForwardArgs {
  index_t N, C, H, W;
  TensorRef input, output;
  ExcitationRef excitation;
  const void* sums = nullptr;  // [N, C] of the compute type: those of the input over each image, where they are known
};

struct SeBackwardArgs {
  SeForwardArgs forward;  // without an output
  TensorRef grad_output, grad_input;
  ExcitationGrads grads;
};

// A pointwise weight [columns, k, 1, 1]; data == nullptr: there is none. In several pieces: their channels one after the
// other along k, each as the first one is, stride_piece elements on.
struct MatrixRef {
  const void* data = nullptr;
  index_t stride_out = 0, stride_in = 0;
  index_t pieces = 1, stride_piece = 0;
};

// Inverted residual. g is the depthwise convolution's, on the expanded channels.
struct MbconvForwardArgs {
  DepthwiseGeometry g;
  index_t in_channels, K;
  TensorRef input, output;
  MatrixRef expand;  // data == nullptr: no expansion
  EpilogueRef expand_epilogue;
  const void* dw_weight;
  EpilogueRef dw_epilogue;
  ExcitationRef excitation;
  MatrixRef project;
  EpilogueRef epilogue;
};

struct MbconvBackwardArgs {
  MbconvForwardArgs forward;  // without an output
  TensorRef grad_output, grad_input;
  void* grad_expand_weight = nullptr;  // [hidden, in] contiguous, as the other weights' gradients
  void* grad_dw_weight = nullptr;
  void* grad_project_weight = nullptr;
  EpilogueGrads expand_grads, dw_grads, grads;
  ExcitationGrads excitation_grads;
};

// EffNet's block: 1x1 convolution, separable convolution with pools, then a 1x1 one, or a 2x1 one of stride (2, 1) where
// `project` has two pieces, one a row. P x Q is the output's size; the separable convolution's last row is dropped where
// it has no second one.
struct EffnetForwardArgs {
  SepconvForwardArgs separable;  // on the expanded map; without input and output
  index_t in_channels, K, P;
  TensorRef input, output;
  MatrixRef expand, project;
  EpilogueRef expand_epilogue, epilogue;
};

}  // namespace effops
