// Problems of room sepconv.
#pragma once

#include "tests/cuda_host/problems.h"

namespace effops::problems {

// Of a layer's square window the first row and the first column; pools: 0 none, 1 of the rows, 2 of both.
struct SeparableInSpaceLayer : Layer {
  int pools;

  DepthwiseGeometry row() const {
    DepthwiseGeometry row = g;
    row.R = row.stride_h = row.dilation_h = 1, row.pad_top = 0, row.P = g.H;
    if (pools > 0) row.Q = row.Q / 2 * 2;
    return row;
  }
  DepthwiseGeometry col() const {
    DepthwiseGeometry col = g;
    col.C = g.out_channels(), col.multiplier = 1;
    col.S = col.stride_w = col.dilation_w = 1, col.pad_left = 0;
    col.W = col.Q = row().Q / (pools > 0 ? 2 : 1);
    if (pools > 1) col.P = col.P / 2 * 2;
    return col;
  }
  index_t height() const { return col().P / (pools > 1 ? 2 : 1); }

  TensorRef output_map(void* data) const {
    const index_t P = height(), Q = col().Q;
    if (channels_last) return {data, D() * P * Q, 1, Q * D(), D()};
    return {data, D() * P * Q, P * Q, Q, 1};
  }
  index_t outputs() const { return g.N * D() * height() * col().Q; }

  EpilogueRef vectors(Memory& m) const {
    EpilogueRef e;
    if (kind == Epilogue::none) return e;
    e.bias = vector(m, D());
    e.activation = Activation::relu;
    if (kind == Epilogue::relu) return e;
    e.scale = vector(m, D());
    e.shift = vector(m, D());
    e.activation = Activation::silu;
    e.post = Activation::relu;
    return e;
  }
  EpilogueGrads vector_gradients(Memory& m) const {
    EpilogueGrads grads;
    grads.bias_dtype = grads.scale_dtype = grads.shift_dtype = dtype();
    if (kind == Epilogue::none) return grads;
    grads.bias = m.output(D(), dtype());
    if (kind == Epilogue::relu) return grads;
    grads.scale = m.output(D(), dtype());
    grads.shift = m.output(D(), dtype());
    return grads;
  }

  SepconvForwardArgs arguments(Memory& m) const {
    SepconvForwardArgs args{};
    args.row = row(), args.col = col();
    args.pool_w = pools > 0 ? 2 : 1, args.pool_h = pools > 1 ? 2 : 1;
    args.input = read_map(m, g.C, g.H);
    args.row_weight = m.input(D() * g.S, dtype());
    args.col_weight = m.input(D() * g.R, dtype());
    args.row_epilogue = vectors(m);
    args.col_epilogue = vectors(m);
    return args;
  }

  void forward(Memory& m, const Device& device) const {
    SepconvForwardArgs args = arguments(m);
    args.output = output_map(m.output(outputs(), dtype()));
    cuda::sepconv_fwd(dtype(), args, device, nullptr);
  }

  void backward(Memory& m, const Device& device) const {
    SepconvBackwardArgs args{arguments(m), output_map(m.input(outputs(), dtype())), written_map(m, g.C, g.H)};
    args.grad_row_weight = m.output(D() * g.S, dtype());
    args.grad_col_weight = m.output(D() * g.R, dtype());
    args.row_grads = vector_gradients(m);
    args.col_grads = vector_gradients(m);
    cuda::sepconv_bwd(dtype(), args, device, m.scratch(cuda::sepconv_bwd_scratch(dtype(), args, device)), nullptr);
  }
};

inline void visit_sepconv(std::span<const Maps> sizes, const Visit& visit) {
  for_each_layer(sizes, [&](const Layer& plain) {
    for (const int pools : {0, 1, 2}) {
      const SeparableInSpaceLayer layer{plain, pools};
      const std::string name = " " + layer.name() + " pools " + std::to_string(pools);
      visit("sepconv_fwd" + name, [=](Memory& m, const Device& device) { layer.forward(m, device); });
      visit("sepconv_bwd" + name, [=](Memory& m, const Device& device) { layer.backward(m, device); });
    }
  });
}

}  // namespace effops::problems
