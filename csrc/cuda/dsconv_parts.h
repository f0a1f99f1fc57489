// dsconv with several depthwise windows side by side (Multiception, MixConv): the parts. To dsconv's kernels each part
// is a layer, with its channels of the input, its window and its columns of the matrix; what is here makes one sum of
// them.
//
// PartsSums takes the parts' blocks of channels one after the other through the shared memory of dsconv_pointwise.h.
// Multiception: every part of a block of channels in turn, on one patch, whose place in memory was read once; MixConv:
// all blocks of a part, then the next part's. The patch is what the windows span together, for every part of MixConv
// too.
//
//        patch under the largest window          part 0, 3x3: starts at pixel (1, 1) of it
//        +-----------+                           part 1, 5x5: at pixel (0, 0)
//        | . . . . . |
//        | . o o o . |   number_slots counts a run's pixel from the patch's corner: patch_shift is the rest of the way
//        | . o o o . |
//        | . o o o . |
//        | . . . . . |
//        +-----------+
#pragma once

#include <algorithm>

#include "csrc/cuda/dsconv_pointwise.h"

namespace effops::cuda {

// As many as a kernel's 4 KB of parameters have room for.
constexpr int kMaxParts = 7;

template <class T>
struct Parts {
  int count;
  bool shared;                 // the parts read the same channels
  int patch_shift[kMaxParts];  // pixels, from the window that spans all to the part's
  Layer<T> layer[kMaxParts];
};

// A block of a part's channels; `patch` counts the patches so far.
struct PartBlock {
  int part, first, patch;
};

template <class T>
EFFOPS_DEVICE PartBlock block_behind(const Parts<T>& parts, const PartBlock& block) {
  if (parts.shared) {
    if (block.part + 1 < parts.count) return {block.part + 1, block.first, block.patch};
    return {0, block.first + kBlockC<T>, block.patch + 1};
  }
  if (block.first + kBlockC<T> < parts.layer[block.part].g.D) {
    return {block.part, block.first + kBlockC<T>, block.patch + 1};
  }
  return {block.part + 1, 0, block.patch + 1};
}

template <class T>
EFFOPS_DEVICE bool exists(const Parts<T>& parts, const PartBlock& block) {
  return block.part < parts.count && block.first < parts.layer[block.part].g.D;
}

// As PointwiseSums: product += z (slots x channels of all parts) * matrix (N output channels from k on)^T.
template <class T, int N, class Product>
class PartsSums {
  using C = compute<T>;

 public:
  EFFOPS_DEVICE PartsSums(const Parts<T>& parts, const PointwiseAt& at, const Tables& tables, const Origin& origin,
                          int k)
      : parts_(parts), at_(at), tables_(tables), origin_(origin), k_(k) {}

  // The tables are there; the threads have met since.
  EFFOPS_DEVICE void run(Product& product) {
    T* z = shared_at<T>(at_.z);
    clear_empty_slots(parts_.layer[0].box, z, kPitch<T>, kBlockC<T>);
    product.clear();
    PartBlock block{0, 0, 0};
    copy_operands(block, 0);
    copy_rows(block);
    bool more = true;
    EFFOPS_NO_UNROLL
    for (int turn = 0; more; ++turn) {
      copy_async_wait<0>();
      barrier();
      const PartBlock next = block_behind(parts_, block);
      more = exists(parts_, next);
      const bool other_patch = more && next.patch != block.patch, patch_in_use = at_.next_patch == 0;
      if (more) copy_operands(next, turn + 1);
      if (other_patch && !patch_in_use) copy_rows(next);
      const Layer<T>& layer = parts_.layer[block.part];
      depthwise_tile(layer, tables_, origin_, block.first, patch_of(block) + parts_.patch_shift[block.part] * kPitch<T>,
                     part<C>(turn, at_.taps), z, kPitch<T>);
      barrier();
      if (other_patch && patch_in_use) copy_rows(next);
      product.template add<RowHolds::sum, RowHolds::sum, kBlockC<T>>(z, kPitch<T>, part<T>(turn, at_.matrix),
                                                                     kPitch<T>);
      block = next;
    }
    barrier();
  }

 private:
  template <class X>
  EFFOPS_DEVICE X* part(int turn, int offset) const {
    return shared_at<X>(at_.stages + (turn & 1) * at_.stage_bytes + offset);
  }
  EFFOPS_DEVICE T* patch_of(const PartBlock& block) const {
    return shared_at<T>(at_.patch + (block.patch & 1) * at_.next_patch);
  }

  EFFOPS_DEVICE void copy_rows(const PartBlock& block) const {
    const Layer<T>& layer = parts_.layer[block.part];
    if (layer.box.patch_rows > 0) copy_patch(layer, tables_.patch_at, block.first, patch_of(block));
    copy_async_commit();
  }

  EFFOPS_DEVICE void copy_operands(const PartBlock& block, int turn) const {
    const Layer<T>& layer = parts_.layer[block.part];
    const ColumnBlock columns{false, block.first, layer.g.D, 0};
    copy_matrix<T, kBlockC<T>>(layer, k_, N, columns, part<T>(turn, at_.matrix), kPitch<T>);
    copy_async_commit();
    copy_taps(layer, block.first, part<C>(turn, at_.taps));
  }

  const Parts<T>& parts_;
  const PointwiseAt& at_;
  const Tables& tables_;
  const Origin& origin_;
  const int k_;
};

// ---- host ----

// Of a per-channel vector from `channel` on, or absent as it is.
inline ChannelRef from_channel(ChannelRef vector, index_t channel, std::size_t element) {
  if (vector.data != nullptr) {
    const std::size_t bytes = vector.dtype == DType::f32 ? sizeof(float) : element;
    vector.data = static_cast<const char*>(vector.data) + channel * vector.stride * static_cast<index_t>(bytes);
  }
  return vector;
}

// The first of a part's channels among those of all parts.
inline index_t first_column(const DsconvForwardArgs& args, index_t part) {
  index_t column = 0;
  for (index_t i = 0; i < part; ++i) column += args.parts[i].g.C;
  return column;
}

// A part as a layer of its own.
template <class T>
DsconvForwardArgs part_of(const DsconvForwardArgs& args, index_t part) {
  const DepthwisePartArgs& own = args.parts[part];
  const index_t column = first_column(args, part);
  DsconvForwardArgs layer = args;
  layer.parts = nullptr;
  layer.num_parts = 0;
  layer.g = own.g;
  layer.input = from_channel<T>(args.input, own.channel);
  layer.dw_weight = own.weight;
  EpilogueRef& e = layer.dw_epilogue;
  e.bias = from_channel(e.bias, column, sizeof(T));
  e.scale = from_channel(e.scale, column, sizeof(T));
  e.shift = from_channel(e.shift, column, sizeof(T));
  layer.pw_weight = static_cast<const T*>(args.pw_weight) + column * args.pw_stride_c;
  return layer;
}

// Whether all parts read the same channels. One part's two ways are the same.
inline bool parts_share(const DsconvForwardArgs& args) { return args.num_parts == 1 || args.parts[1].channel == 0; }

// The window that spans those of all parts, at dilation 1.
inline DepthwiseGeometry spanning_window(const DsconvForwardArgs& args) {
  DepthwiseGeometry all = args.g;
  index_t below = 0, right = 0;
  all.pad_top = all.pad_left = 0;
  for (index_t i = 0; i < args.num_parts; ++i) {
    const DepthwiseGeometry& g = args.parts[i].g;
    all.pad_top = std::max(all.pad_top, g.pad_top);
    all.pad_left = std::max(all.pad_left, g.pad_left);
    below = std::max(below, (g.R - 1) * g.dilation_h - g.pad_top);
    right = std::max(right, (g.S - 1) * g.dilation_w - g.pad_left);
  }
  all.R = all.pad_top + below + 1;
  all.S = all.pad_left + right + 1;
  all.dilation_h = all.dilation_w = 1;
  return all;
}

// The whole call as a layer that has the spanning window; its depthwise operands are the first part's.
template <class T>
Layer<T> spanning_layer(const DsconvForwardArgs& args, const Box& box) {
  DsconvForwardArgs all = part_of<T>(args, 0);
  all.g = spanning_window(args);
  return layer_of<T>(all, box);
}

template <class T>
Parts<T> parts_of(const DsconvForwardArgs& args, const Box& box) {
  const DepthwiseGeometry all = spanning_window(args);
  Parts<T> parts{};
  parts.count = narrow(args.num_parts);
  parts.shared = parts_share(args);
  for (int i = 0; i < parts.count; ++i) {
    const DepthwiseGeometry& g = args.parts[i].g;
    parts.layer[i] = layer_of<T>(part_of<T>(args, i), box);
    parts.patch_shift[i] =
        narrow((all.pad_top - g.pad_top) * box.patch_columns + all.pad_left - g.pad_left);  // 0 columns: no patch
  }
  return parts;
}

inline void check_parts(const DsconvForwardArgs& args) {
  if (args.num_parts > kMaxParts) {
    throw std::runtime_error("effops: the CUDA kernels take 7 depthwise windows side by side at most");
  }
}

// dsconv_parts_output_gradient.cu, as plan_output_gradient and dsconv_output_gradient.
struct OutputGradientPlan;
OutputGradientPlan plan_parts_output_gradient(DType dtype, const DsconvForwardArgs& args, const Device& device);
void dsconv_parts_output_gradient(DType dtype, const OutputGradientPlan& plan, const DsconvBackwardArgs& args,
                                  const TensorRef& du, void* partial, Stream stream);

// dsconv_parts_input_gradient.cu: grad_input, where all parts read the same channels. sums_grads: the gradient at each
// part's depthwise sums.
void dsconv_parts_input_gradient(DType dtype, const DsconvBackwardArgs& args, const TensorRef* sums_grads,
                                 const Device& device, Stream stream);

}  // namespace effops::cuda
