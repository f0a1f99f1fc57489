// Bindings of room effnet: `Kernels` says which kernels run, on which device (csrc/cpu/bindings.cpp has an example).
#pragma once

#include "csrc/bindings/sepconv.h"

namespace effops {

template <class Kernels>
struct EffnetBindings {
  static constexpr std::size_t kSeparable = SepconvBindings<Kernels>::kGeometry, kGeometry = kSeparable + 4;

  static EpilogueRef epilogue(const OptionalTensor& bias, const OptionalTensor& scale, const OptionalTensor& shift,
                              const OptionalTensor& residual, const Tensor& input, const DepthwiseGeometry& map,
                              index_t channels, const std::int64_t* codes, double slope) {
    EpilogueRef e = epilogue_ref(bias, scale, shift, residual, input, channels, map);
    e.activation = read_activation(codes[0]);
    e.post = read_activation(codes[1]);
    e.slope = slope;
    return e;
  }

  static Tensor forward(const Tensor& input, const Tensor& expand_weight, const OptionalTensor& expand_bias,
                        const OptionalTensor& expand_scale, const OptionalTensor& expand_shift,
                        const Tensor& row_weight, const OptionalTensor& row_bias, const OptionalTensor& row_scale,
                        const OptionalTensor& row_shift, const Tensor& col_weight, const OptionalTensor& col_bias,
                        const OptionalTensor& col_scale, const OptionalTensor& col_shift, const Tensor& project_weight,
                        const OptionalTensor& bias, const OptionalTensor& scale, const OptionalTensor& shift,
                        const OptionalTensor& residual, const Ints& geometry, const std::vector<double>& slopes) {
    constexpr const char* op = "effnet_fwd";
    STD_TORCH_CHECK(geometry.size() == kGeometry, "effops::", op, ": geometry must hold ", kGeometry, " integers, got ",
                    geometry.size());
    STD_TORCH_CHECK(slopes.size() == 4, "effops::", op, ": slopes must hold 4 numbers, got ", slopes.size());
    check_map(Kernels::checked(input), input, "input");
    check_map(expand_weight, input, "expand_weight");
    check_map(project_weight, input, "project_weight");
    const index_t hidden = expand_weight.size(0), rows = project_weight.size(2);
    check_sizes(expand_weight, input, hidden, input.size(1), 1, 1, "expand_weight");
    STD_TORCH_CHECK(rows == 1 || rows == 2, "effops::", op, ": project_weight must have 1 or 2 rows, got ", rows);

    const typename SepconvBindings<Kernels>::Parameters parameters{row_weight, row_bias, row_scale, row_shift,
                                                                   col_weight, col_bias, col_scale, col_shift};
    const Ints separable(geometry.begin(), geometry.begin() + kSeparable);
    auto checked =
        SepconvBindings<Kernels>::check_expanded(input, hidden, parameters, separable, {slopes[1], slopes[2]}, op);
    EffnetForwardArgs args;
    args.separable = checked.args;
    DepthwiseGeometry& col = args.separable.col;
    const index_t height = col.P / args.separable.pool_h;
    STD_TORCH_CHECK(height >= rows, "effops::", op, ": project_weight has ", rows, " rows, the map before it ", height);
    args.P = height / rows;
    col.P = args.P * rows * args.separable.pool_h;
    args.in_channels = input.size(1);
    args.K = project_weight.size(0);
    STD_TORCH_CHECK(args.K >= 1, "effops::", op, ": project_weight must have at least one output channel");
    check_sizes(project_weight, input, args.K, col.C, rows, 1, "project_weight");
    args.expand = {expand_weight.const_data_ptr(), expand_weight.stride(0), expand_weight.stride(1)};
    args.project = {project_weight.const_data_ptr(), project_weight.stride(0), project_weight.stride(1), rows,
                    project_weight.stride(2)};
    DepthwiseGeometry map = col;
    map.P = args.P;
    const std::int64_t* codes = geometry.data() + kSeparable;
    args.expand_epilogue =
        epilogue(expand_bias, expand_scale, expand_shift, {}, input, args.separable.row, hidden, codes, slopes[0]);
    args.epilogue = epilogue(bias, scale, shift, residual, input, map, args.K, codes + 2, slopes[3]);
    args.input = tensor_ref(input);
    Tensor output = new_map(input, map.N, args.K, map.P, map.Q, checked.channels_last);
    args.output = tensor_ref(output);
    Kernels::effnet_fwd(input, args);
    return output;
  }
};

}  // namespace effops
