// Bindings of room sepconv: `Kernels` says which kernels run, on which device (csrc/cpu/bindings.cpp has an example).
#pragma once

#include "csrc/bindings/binding.h"

namespace effops {

template <class Kernels>
struct SepconvBindings {
  static constexpr std::size_t kGeometry = 15;

  // The operator's tensors behind the input, as they came; all must outlive the call.
  struct Parameters {
    const Tensor& row_weight;
    const OptionalTensor &row_bias, &row_scale, &row_shift;
    const Tensor& col_weight;
    const OptionalTensor &bias, &scale, &shift;
  };

  struct Checked {
    SepconvForwardArgs args;
    bool channels_last;
    Tensor row_weight, col_weight;  // contiguous
  };

  static index_t pooled(index_t& size, bool pool, const char* op, const char* axis) {
    if (!pool) return 1;
    STD_TORCH_CHECK(size >= 2, "effops::", op, ": the pool needs ", axis, " of at least 2, got ", size);
    size = size / 2 * 2;
    return 2;
  }

  static EpilogueRef epilogue(const OptionalTensor& bias, const OptionalTensor& scale, const OptionalTensor& shift,
                              const Tensor& input, const StaticArgs& statics, double slope) {
    EpilogueRef e = epilogue_ref(bias, scale, shift, {}, input, statics.g.out_channels(), statics.g);
    e.activation = statics.activation;
    e.post = statics.post;
    e.slope = slope;
    return e;
  }

  static Checked check(const Tensor& input, const Parameters& p, const Ints& g, const std::vector<double>& slopes,
                       const char* op) {
    check_map(Kernels::checked(input), input, "input");
    return check_expanded(input, input.size(1), p, g, slopes, op);
  }

  // On a map of the input's size with another number of channels.
  static Checked check_expanded(const Tensor& input, index_t channels_in, const Parameters& p, const Ints& g,
                                const std::vector<double>& slopes, const char* op) {
    STD_TORCH_CHECK(g.size() == kGeometry, "effops::", op, ": geometry must hold ", kGeometry, " integers, got ",
                    g.size());
    STD_TORCH_CHECK(slopes.size() == 2, "effops::", op, ": slopes must hold 2 numbers, got ", slopes.size());
    STD_TORCH_CHECK(g[14] >= 0 && g[14] <= 3, "effops::", op, ": pool must be 0 to 3, got ", g[14]);
    const Ints row_ints{1, g[1], 0, 0, g[4], g[5], 1, g[7], g[8], g[9], g[10], g[11], 0};
    check_map(p.row_weight, input, "row_weight");
    check_map(p.col_weight, input, "col_weight");
    const std::array<index_t, 4> map{input.size(0), channels_in, input.size(2), input.size(3)};
    StaticArgs row = read_geometry(map, p.row_weight, row_ints, row_ints.size(), op);
    Checked result{{}, row.channels_last, dense(p.row_weight), dense(p.col_weight)};
    SepconvForwardArgs& args = result.args;
    args.pool_w = pooled(row.g.Q, (g[14] & 1) != 0, op, "a width");
    const index_t channels = row.g.out_channels();
    const Ints col_ints{g[0], 1, g[2], g[3], 0, 0, g[6], 1, 1, g[9], g[12], g[13], 0};
    const std::array<index_t, 4> between{row.g.N, channels, row.g.P, row.g.Q / args.pool_w};
    StaticArgs col = read_geometry(between, p.col_weight, col_ints, col_ints.size(), op);
    args.pool_h = pooled(col.g.P, (g[14] & 2) != 0, op, "a height");
    STD_TORCH_CHECK(row.g.R == 1 && row.g.bank == channels && col.g.S == 1 && col.g.bank == channels, "effops::", op,
                    ": the weights must have shapes [", channels, ", 1, 1, S] and [", channels, ", 1, R, 1]");
    args.row = row.g;
    args.col = col.g;
    args.input = tensor_ref(input);
    args.row_weight = result.row_weight.const_data_ptr();
    args.col_weight = result.col_weight.const_data_ptr();
    args.row_epilogue = epilogue(p.row_bias, p.row_scale, p.row_shift, input, row, slopes[0]);
    args.col_epilogue = epilogue(p.bias, p.scale, p.shift, input, col, slopes[1]);
    return result;
  }

  static Tensor forward(const Tensor& input, const Tensor& row_weight, const OptionalTensor& row_bias,
                        const OptionalTensor& row_scale, const OptionalTensor& row_shift, const Tensor& col_weight,
                        const OptionalTensor& bias, const OptionalTensor& scale, const OptionalTensor& shift,
                        const Ints& geometry, const std::vector<double>& slopes) {
    const Parameters parameters{row_weight, row_bias, row_scale, row_shift, col_weight, bias, scale, shift};
    Checked checked = check(input, parameters, geometry, slopes, "sepconv_fwd");
    SepconvForwardArgs& args = checked.args;
    Tensor output = new_map(input, args.col.N, args.col.C, args.col.P / args.pool_h, args.col.Q, checked.channels_last);
    args.output = tensor_ref(output);
    Kernels::sepconv_fwd(input, args);
    return output;
  }

  static std::vector<Tensor> backward(const Tensor& grad_output, const Tensor& input, const Tensor& row_weight,
                                      const OptionalTensor& row_bias, const OptionalTensor& row_scale,
                                      const OptionalTensor& row_shift, const Tensor& col_weight,
                                      const OptionalTensor& bias, const OptionalTensor& scale,
                                      const OptionalTensor& shift, const Ints& geometry,
                                      const std::vector<double>& slopes, std::int64_t mask) {
    const Parameters parameters{row_weight, row_bias, row_scale, row_shift, col_weight, bias, scale, shift};
    const Checked checked = check(input, parameters, geometry, slopes, "sepconv_bwd");
    SepconvBackwardArgs args;
    args.forward = checked.args;
    const DepthwiseGeometry& col = args.forward.col;
    check_sizes(grad_output, input, col.N, col.C, col.P / args.forward.pool_h, col.Q, "grad_output");
    args.grad_output = tensor_ref(grad_output);
    GradList grads(mask, 9);
    args.grad_input = grads.map(0, input, checked.channels_last);
    args.grad_row_weight = grads.dense(1, row_weight);
    args.row_grads.bias = grads.channel(2, row_bias, args.row_grads.bias_dtype, "row_bias");
    args.row_grads.scale = grads.channel(3, row_scale, args.row_grads.scale_dtype, "row_scale");
    args.row_grads.shift = grads.channel(4, row_shift, args.row_grads.shift_dtype, "row_shift");
    args.grad_col_weight = grads.dense(5, col_weight);
    args.col_grads.bias = grads.channel(6, bias, args.col_grads.bias_dtype, "bias");
    args.col_grads.scale = grads.channel(7, scale, args.col_grads.scale_dtype, "scale");
    args.col_grads.shift = grads.channel(8, shift, args.col_grads.shift_dtype, "shift");
    Kernels::sepconv_bwd(input, args);
    return grads.take();
  }
};

}  // namespace effops
