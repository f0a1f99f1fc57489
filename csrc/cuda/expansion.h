// What rooms that begin with a pointwise convolution share (bsconv, mbconv): the expanded map under a box of output
// pixels, a block of 32 channels (16 of double) at a time, in shared memory and nowhere else.
//
//   x: the pixels under the box that exist, 64 at a time     matrix: a block's rows
//   +------------------+                                     +------------------+  two stages, 64 input channels (32 of
//   | [64][64]         |                                     | [32][64]         |  float, 16 of double) each, copied by
//   +--------+---------+                                     +--------+---------+  cp.async while one is multiplied
//            +-----------------------+--------------------------------+
//                                    v
//            sums [64][32] in registers (gemm.h) -> epilogue -> rounded to the maps' type, as the map in memory is
//                                    v
//            patch [image][row][column][32], zeros outside the map (its padding comes behind the epilogue)
//                                    v
//            windows of the depthwise convolution (dsconv_tile.h)
//
// Only pixels that exist are multiplied: at the border of the map, and wherever maps are hardly larger than the box,
// that is fewer than the patch has. A box of 8 x 8 pixels of a 3 x 3 window has a patch of 100, two times 64; one of
// 7 x 7 in the corner of a 14 x 14 map 64. x and the matrix are read again, from L2, for every block of channels.
#pragma once

#include <algorithm>

#include "csrc/cuda/dsconv_pointwise.h"

namespace effops::cuda {

// Input channels of a step of the product.
template <class T>
constexpr int kStepC = sizeof(T) == 2 ? 64 : kBlockC<T>;
template <class T>
constexpr int kStepPitch = padded_pitch<T>(kStepC<T>);

// Shared memory: tables, taps, both blocks' vectors, two stages of x and the matrix, the patch, and z.
struct ExpansionAt {
  TablesAt tables;
  int places, taps, affine, affine_bytes;
  int stages, stage_bytes, matrix;
  int patch, z;
};

// Beside a Layer whose x is the input of the pointwise convolution, and whose depthwise channels are its outputs.
template <class T>
struct Expansion {
  int inputs;
  const T* matrix;
  index_t matrix_d, matrix_c;
  Reading read_matrix;
  EpilogueRef epilogue;
};

// The pixels under a box that exist: how many, and in the tables where each is in the input (-1: no window has a tap
// there, it need not be read) and in the patch.
struct LivePixels {
  int count;
  const index_t* at;
  const int* places;
};

// What the box at `origin` has of one axis of the patch: from `first` on, `count`.
struct LiveRange {
  int first, count;
};

EFFOPS_DEVICE LiveRange live_range(int start, int outputs, int stride, int dilation, int taps, int size) {
  const int span = (outputs - 1) * stride + (taps - 1) * dilation + 1;
  const int first = start < 0 ? -start : 0, end = size - start < span ? size - start : span;
  return {first, end > first ? end - first : 0};
}

template <class T>
EFFOPS_DEVICE LivePixels locate_live(const Layer<T>& layer, const Origin& origin, index_t* at, int* places) {
  const Box& box = layer.box;
  const Sizes& g = layer.g;
  const int top = origin.p * g.stride_h - g.pad_top, left = origin.q * g.stride_w - g.pad_left;
  const int below = g.P - origin.p, p_count = below < box.rows ? below : box.rows;
  const int behind = g.Q - origin.q, q_count = behind < box.columns ? behind : box.columns;
  const LiveRange rows = live_range(top, p_count, g.stride_h, g.dilation_h, g.R, g.H);
  const LiveRange columns = live_range(left, q_count, g.stride_w, g.dilation_w, g.S, g.W);
  const index_t images = layer.N - origin.n < box.images ? layer.N - origin.n : box.images;
  const int count = static_cast<int>(images) * rows.count * columns.count;
  EFFOPS_NO_UNROLL
  for (int i = threadIdx.x; i < count; i += kThreads) {
    const int line = i / columns.count, image = line / rows.count;
    const int row = rows.first + line % rows.count, column = columns.first + i % columns.count;
    const bool wanted =
        has_tap(row, p_count, g.R, g.stride_h, g.dilation_h) && has_tap(column, q_count, g.S, g.stride_w, g.dilation_w);
    at[i] = wanted ? (origin.n + image) * layer.x.n + (top + row) * layer.x.h + (left + column) * layer.x.w : -1;
    places[i] = (image * box.patch_rows + row) * box.patch_columns + column;
  }
  return {count, at, places};
}

// The patches of the blocks [first, last) of channels, one after the other. While one step is multiplied the next one's
// operands are copied, also the first of the next patch.
template <class T>
class ExpandedPatches {
  using C = compute<T>;
  using Product = BlockProduct<T, false, kSlots, kBlockC<T>>;

 public:
  EFFOPS_DEVICE ExpandedPatches(const Layer<T>& layer, const Expansion<T>& expansion, const ExpansionAt& at,
                                const LivePixels& pixels, int first, int last)
      : layer_(layer), expansion_(expansion), at_(at), pixels_(pixels), last_(last), next_block_(first) {}

  // The pixels are located; the threads have met since.
  EFFOPS_DEVICE void begin() {
    T* patch = shared_at<T>(at_.patch);
    const int elements = layer_.box.patch_pixels() * kPitch<T>;
    EFFOPS_NO_UNROLL
    for (int i = threadIdx.x; i < elements; i += kThreads) patch[i] = from_compute<T>(0);
    copy_vectors(next_block_);
    copy_step();
  }

  // The patch of one block. start(): once nobody reads what belongs to the block before this one. Behind the call the
  // patch is there, and what start() has stored.
  template <class Start>
  EFFOPS_DEVICE void run(int block, const Start& start) {
    const int parts = ceil_div(expansion_.inputs, kStepC<T>);
    EFFOPS_NO_UNROLL
    for (int first = 0; first == 0 || first < pixels_.count; first += kSlots) {
      Product product;
      product.clear();
      EFFOPS_NO_UNROLL
      for (int part = 0; part < parts; ++part) {
        copy_async_wait<0>();
        barrier();
        if (first == 0 && part == 0) {
          start();
          copy_vectors(block + 1);
        }
        const T* x = stage(0);
        const T* matrix = stage(at_.matrix);
        stage_ ^= 1;
        copy_step();
        product.template add<RowHolds::sum, RowHolds::sum, kStepC<T>>(x, kStepPitch<T>, matrix, kStepPitch<T>);
      }
      finish(block, first, product);
    }
    barrier();
  }

 private:
  EFFOPS_DEVICE T* stage(int offset) const { return shared_at<T>(at_.stages + stage_ * at_.stage_bytes + offset); }
  EFFOPS_DEVICE C* vectors(int block) const { return shared_at<C>(at_.affine + (block & 1) * at_.affine_bytes); }

  EFFOPS_DEVICE void copy_vectors(int block) const {
    if (block >= last_) return;
    copy_affine<T>(expansion_.epilogue, block * kBlockC<T>, layer_.g.D, kBlockC<T>, vectors(block));
  }

  // The operands of the next step, if there is one.
  EFFOPS_DEVICE void copy_step() {
    if (next_block_ == last_) return;
    const int d = next_block_ * kBlockC<T>;
    copy_rows<T, kStepC<T>>(layer_.read_x, stage(0), kStepPitch<T>, kSlots, next_channel_, expansion_.inputs,
                            [&](int i) {
                              const int pixel = next_pixel_ + i;
                              const index_t at = pixel < pixels_.count ? pixels_.at[pixel] : -1;
                              return at < 0 ? nullptr : layer_.x.data + at;
                            });
    const T* origin = expansion_.matrix + d * expansion_.matrix_d;
    copy_rows<T, kStepC<T>>(expansion_.read_matrix, stage(at_.matrix), kStepPitch<T>, kBlockC<T>, next_channel_,
                            expansion_.inputs,
                            [&](int i) { return d + i < layer_.g.D ? origin + i * expansion_.matrix_d : nullptr; });
    copy_async_commit();
    next_channel_ += kStepC<T>;
    if (next_channel_ < expansion_.inputs) return;
    next_channel_ = 0;
    next_pixel_ += kSlots;
    if (next_pixel_ < pixels_.count) return;
    next_pixel_ = 0;
    ++next_block_;
  }

  // The epilogue of 64 pixels from `first` on, and their place in the patch.
  EFFOPS_DEVICE void finish(int block, int first, const Product& product) const {
    const C* affine = vectors(block);
    const EpilogueRef& e = expansion_.epilogue;
    const C slope = static_cast<C>(e.slope);
    C v[Product::kSums];
    EFFOPS_UNROLL
    for (int i = 0; i < Product::kSums; ++i) v[i] = product.sum(i) + affine[Product::column_of(i)];
    activate(e.activation, slope, v);
    EFFOPS_UNROLL
    for (int i = 0; i < Product::kSums; ++i) {
      const C* of_column = affine + Product::column_of(i);
      v[i] = v[i] * of_column[kBlockC<T>] + of_column[2 * kBlockC<T>];
    }
    activate(e.post, slope, v);
    EFFOPS_UNROLL
    for (int i = 0; i < Product::kSums; i += Product::kTogether) {
      const int pixel = first + Product::row_of(i);
      if (pixel >= pixels_.count) continue;
      C together[Product::kTogether];
      EFFOPS_UNROLL
      for (int j = 0; j < Product::kTogether; ++j) together[j] = v[i + j];
      store_channels<Product::kTogether>(
          shared_at<T>(at_.patch) + pixels_.places[pixel] * kPitch<T> + Product::column_of(i), together);
    }
  }

  const Layer<T>& layer_;
  const Expansion<T>& expansion_;
  const ExpansionAt& at_;
  const LivePixels pixels_;
  const int last_;
  int next_block_, next_pixel_ = 0, next_channel_ = 0, stage_ = 0;
};

// ---- host ----

template <class T>
Expansion<T> expansion_of(const PointwiseRef& pw) {
  const int bytes = pw.stride_c == 1 ? copy_bytes<T>(pw.weight, {pw.stride_k}) : 0;
  return {narrow(pw.inputs),
          static_cast<const T*>(pw.weight),
          pw.stride_k,
          pw.stride_c,
          {pw.stride_c, 1, bytes, pw.stride_c > pw.stride_k},
          pw.epilogue};
}

// Into `all`, which has what comes before.
template <class T>
void carve_expansion(const Sizes& g, const Box& box, Carver& all, ExpansionAt& at) {
  using C = compute<T>;
  Carver stage;
  stage.take(kSlots * kStepPitch<T> * sizeof(T));
  at.matrix = stage.take(kBlockC<T> * kStepPitch<T> * sizeof(T));
  at.stage_bytes = stage.used();
  at.tables = carve_tables(all, box, 1);
  at.places = all.take(static_cast<std::size_t>(box.patch_pixels()) * sizeof(int));
  at.taps = all.take(taps_bytes<T>(g, true));
  at.affine_bytes = kAffine * kBlockC<T> * static_cast<int>(sizeof(C));
  at.affine = all.take(2 * at.affine_bytes);
  at.stages = all.take(2 * at.stage_bytes);
  at.z = all.take(kSlots * kPitch<T> * sizeof(T));
  at.patch = all.take(patch_bytes<T>(box, g));
}

// The box with the least work: products of 64 existing pixels, windows of 64 slots. A patch has at most `max_pixels`;
// patch_rows is 0 where none has so few.
inline Box choose_expanded_box(const Sizes& g, index_t N, int max_pixels) {
  constexpr double kProductCost = 3;  // of a pixel of the product and its epilogue, in slots
  Box best{};
  double least = 0;
  for (int columns = 1; columns <= std::min(g.Q, kSlots); ++columns) {
    const int most = std::min(g.P, kSlots / columns);
    for (int rows = most; rows >= (most + 1) / 2; --rows) {
      Box box = box_of(g, N, rows, columns);
      const index_t height = (rows - 1) * static_cast<index_t>(g.stride_h) + (g.R - 1) * g.dilation_h + 1;
      const index_t width = (columns - 1) * static_cast<index_t>(g.stride_w) + (g.S - 1) * g.dilation_w + 1;
      const double pixels = static_cast<double>(height) * static_cast<double>(width) * box.images;
      if (pixels + pixels_behind(g) > max_pixels) continue;
      const index_t live = std::min<index_t>(height, g.H) * std::min<index_t>(width, g.W) * box.images;
      const double cost =
          static_cast<double>(tiles_of(box, N)) *
          (kProductCost * static_cast<double>(ceil_div<index_t>(live, kSlots) * kSlots) + box.runs() * kRun + kSlots);
      if (best.patch_rows > 0 && cost >= least) continue;
      best = box;
      best.patch_rows = static_cast<int>(height);
      best.patch_columns = static_cast<int>(width);
      least = cost;
    }
  }
  return best;
}

// The box of a kernel that takes `other` bytes beside what carve_expansion() does; such that two blocks fit a processor
// where that is possible.
template <class T>
Box expanded_box(const Sizes& g, index_t N, const Device& device, std::size_t other) {
  constexpr std::size_t kSystem = 1024;  // bytes of each block that the system takes
  Carver none;
  ExpansionAt at;
  carve_expansion<T>(g, Box{}, none, at);
  other += none.used() + 64;
  constexpr std::size_t kPixel = kPitch<T> * sizeof(T) + sizeof(index_t) + sizeof(int);
  Box box{};
  for (const std::size_t blocks : {static_cast<std::size_t>(kBlocks<T>), std::size_t{1}}) {
    const std::size_t room = (static_cast<std::size_t>(device.shared_bytes) + kSystem) / blocks - kSystem;
    if (other < room) box = choose_expanded_box(g, N, static_cast<int>((room - other) / kPixel));
    if (box.patch_rows > 0) break;
  }
  return box;
}

}  // namespace effops::cuda
