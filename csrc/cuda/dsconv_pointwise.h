// What dsconv's forward and backward kernels share beyond the boxes of dsconv_tile.h: how tiles of sums meet maps, and
// the pointwise sums of a box, computed from x.
//
//      +--------------------+------------------+------------------+
//      | patch of x         | taps             | matrix [N][32]   |  shared memory, two of each: the next block of
//      +------+-------------+----+-------------+---------+--------+  32 channels (16 of double) is copied by cp.async
//             |     windows      |                       |           while one is used. One patch where two would
//             v                  v                       |           leave room for one block (pointwise_tile)
//      z [64 pixels][32 channels], 16 bits               |  4 pixels x 2 channels a thread, sums in registers, rounded
//             |  ldmatrix                                |  to the maps' type, as z in memory would be
//             v                                          v  ldmatrix
//      sums [64][N] in registers, 8 warps (gemm.h) -> a tile in shared memory, in the place of all that
//
// Passed channels are z already. Where a patch does not fit (large dilations) windows are read from memory; channels
// that lie apart (NCHW, sliced maps, multipliers) are copied element by element. The rest is the same.
#pragma once

#include <algorithm>
#include <initializer_list>
#include <type_traits>

#include "csrc/cuda/dsconv_tile.h"
#include "csrc/cuda/kernels.h"

namespace effops::cuda {

// Channels of one access to a map whose channels lie side by side: 8 bytes of a half type (28 channels are no multiple
// of 16 bytes, and a warp's accesses are whole lines all the same), 16 of the others.
template <class T>
constexpr int kVector = sizeof(T) == 8 ? 2 : 4;

// How a tile of results meets the maps that it goes to and comes from.
struct Meeting {
  bool vector;    // all maps' channels lie side by side and aligned: kVector of them at a time
  bool by_pixel;  // else: lanes along the pixels, or along the channels
};

// The pitch of a tile of sums: rows that ldmatrix's fragments are stored to without meeting a bank twice, or columns
// that are read without.
EFFOPS_HOST_DEVICE constexpr int tile_pitch(int columns, bool by_pixel) { return columns + (by_pixel ? 1 : 8); }

// Blocks that shall fit a processor: 128 registers a thread, or 255 for double. A fourth of the occupancy there could
// be, because a thread holds the product's sums (32) over the window's sums and pixels (26), their addresses and the
// epilogue; half as many would mean half the products for each element of z. Two blocks hide each other's barriers.
template <class T>
constexpr int kBlocks = sizeof(T) == 8 ? 1 : 2;

template <class T>
EFFOPS_DEVICE T* shared_at(int offset) {
  return reinterpret_cast<T*>(shared_memory<char>() + offset);
}

EFFOPS_DEVICE Tables tables_of(const TablesAt& at, index_t* patch_at) {
  return {shared_at<int>(at.slots), shared_at<Run>(at.runs), patch_at};
}

// f(slot, column) for all elements of a tile of N columns, V columns at a time. Every thread of the block makes the
// same number of calls; along the channels its column is always the same.
template <int V, int N, class F>
EFFOPS_DEVICE void walk_tile(bool by_pixel, const F& f) {
  constexpr int kGroups = N / V;
  static_assert(kThreads % kGroups == 0 && kSlots * kGroups % kThreads == 0);
  EFFOPS_NO_UNROLL
  for (int i = threadIdx.x; i < kSlots * kGroups; i += kThreads) {
    if (by_pixel) {
      f(i % kSlots, i / kSlots * V);
    } else {
      f(i / kGroups, i % kGroups * V);
    }
  }
}

// ---- the sums of the pointwise convolution ----

// Shared memory: tables, z, and of what a block of channels needs two stages of matrix and taps, and one patch or two;
// then, in the place of stages and patches, the tile of sums.
struct PointwiseAt {
  TablesAt tables;
  int affine, z, stages, stage_bytes, matrix, taps;
  int patch, next_patch;  // next_patch: bytes to the other one, or 0
};

// z's last channels, which the output begins with.
template <class T>
struct Kept {
  Map<T> map;
  int first, count;  // of the depthwise channels
  Meeting meeting;
};

template <int V, class T>
EFFOPS_DEVICE void keep_channels(const Layer<T>& layer, const Tables& tables, const Origin& origin, const Kept<T>& kept,
                                 int first, const T* z) {
  walk_tile<V, kBlockC<T>>(kept.meeting.by_pixel, [&](int slot, int column) {
    const int c = first + column - kept.first;
    const Pixel pixel = pixel_of(layer, tables, origin, slot);
    if (!pixel.inside || c < 0 || c >= kept.count) return;
    store_vec<T, V>(kept.map.at(pixel.n, c, pixel.p, pixel.q), load_vec<T, V>(z + slot * kPitch<T> + column));
  });
}

// product += z (slots x channels) * matrix (N output channels from k on)^T, a block of channels at a time: while one is
// computed the next is copied; its patch, where there is only one, from the moment that z is there.
//
// Passed channels are their own z: they stand in the places of z and of the first patch by turns, the last of them in
// z's, so that the patch is free for the first depthwise block.
template <class T, int N, class Product>
class PointwiseSums {
  using C = compute<T>;

 public:
  EFFOPS_DEVICE PointwiseSums(const Layer<T>& layer, const PointwiseAt& at, const Tables& tables, const Origin& origin,
                              int k)
      : layer_(layer), at_(at), tables_(tables), origin_(origin), k_(k) {}

  // The tables are there; the threads have met since.
  EFFOPS_DEVICE void run(const Kept<T>* kept, Product& product) {
    const int passed_blocks = layer_.passed_blocks(), blocks = layer_.blocks();
    T* z = shared_at<T>(at_.z);
    if (passed_blocks == 0) clear_empty_slots(layer_.box, z, kPitch<T>, kBlockC<T>);  // passed ones do it
    product.clear();
    copy_operands(0);
    copy_rows(0);
    EFFOPS_NO_UNROLL
    for (int block = 0; block < blocks; ++block) {
      copy_async_wait<0>();
      barrier();
      const bool passed = block < passed_blocks, more = block + 1 < blocks;
      const bool patch_in_use = !passed && at_.next_patch == 0;
      if (more) copy_operands(block + 1);
      if (more && !patch_in_use) copy_rows(block + 1);
      if (!passed) {
        const int first = (block - passed_blocks) * kBlockC<T>;
        depthwise_tile(layer_, tables_, origin_, first, rows_at(block), part<C>(block, at_.taps), z, kPitch<T>);
        barrier();
        if (more && patch_in_use) copy_rows(block + 1);
        if (kept != nullptr && first + kBlockC<T> > kept->first) keep(*kept, first, z);
      }
      product.template add<RowHolds::sum, RowHolds::sum, kBlockC<T>>(passed ? rows_at(block) : z, kPitch<T>,
                                                                     part<T>(block, at_.matrix), kPitch<T>);
    }
    barrier();
  }

 private:
  template <class X>
  EFFOPS_DEVICE X* part(int block, int offset) const {
    return shared_at<X>(at_.stages + (block & 1) * at_.stage_bytes + offset);
  }

  EFFOPS_DEVICE void keep(const Kept<T>& kept, int first, const T* z) const {
    if (kept.meeting.vector) {
      keep_channels<kVector<T>>(layer_, tables_, origin_, kept, first, z);
    } else {
      keep_channels<1>(layer_, tables_, origin_, kept, first, z);
    }
  }

  // Where the passed channels of a block, or the patch of the depthwise ones, stand.
  EFFOPS_DEVICE T* rows_at(int block) const {
    const int to_depthwise = layer_.passed_blocks() - block;  // blocks
    if (to_depthwise > 0) return shared_at<T>(to_depthwise % 2 == 1 ? at_.z : at_.patch);
    return shared_at<T>(at_.patch + (-to_depthwise & 1) * at_.next_patch);
  }

  EFFOPS_DEVICE void copy_rows(int block) const {
    const int passed_blocks = layer_.passed_blocks();
    if (block < passed_blocks) {
      copy_slots<T, kBlockC<T>>(layer_, tables_, origin_, layer_.passthrough, layer_.read_passthrough,
                                block * kBlockC<T>, layer_.passed, rows_at(block), kPitch<T>);
    } else if (layer_.box.patch_rows > 0) {
      copy_patch(layer_, tables_.patch_at, (block - passed_blocks) * kBlockC<T>, rows_at(block));
    }
    copy_async_commit();
  }

  EFFOPS_DEVICE void copy_operands(int block) const {
    const ColumnBlock columns = column_block(layer_, block, kBlockC<T>);
    copy_matrix<T, kBlockC<T>>(layer_, k_, N, columns, part<T>(block, at_.matrix), kPitch<T>);
    copy_async_commit();
    if (!columns.passed) copy_taps(layer_, columns.first, part<C>(block, at_.taps));
  }

  const Layer<T>& layer_;
  const PointwiseAt& at_;
  const Tables& tables_;
  const Origin& origin_;
  const int k_;
};

// ---- the output ----

template <class T>
struct Output {
  Map<T> y;  // K channels
  EpilogueRef epilogue;
  Meeting meeting;
};

template <int V, int N, class T>
EFFOPS_DEVICE void write_columns(const Layer<T>& layer, const Output<T>& output, const Tables& tables,
                                 const Origin& origin, int first, const compute<T>* affine, const compute<T>* tile) {
  using C = compute<T>;
  const TensorRef& ref = output.epilogue.residual;
  const Map<const T> residual{static_cast<const T*>(ref.data), ref.n, ref.c, ref.h, ref.w};
  const int pitch = tile_pitch(N, output.meeting.by_pixel);
  walk_tile<V, N>(output.meeting.by_pixel, [&](int slot, int column) {
    const Pixel pixel = pixel_of(layer, tables, origin, slot);
    const int k = first + column;
    if (!pixel.inside || k >= layer.K) return;
    C v[V];
    load_channels<V>(tile + slot * pitch + column, v);
    finish_sums<V>(output.epilogue, affine + column, N, v, [&](C(&sum)[V]) {
      C added[V];
      load_channels<V>(residual.at(pixel.n, k, pixel.p, pixel.q), added);
      EFFOPS_UNROLL
      for (int j = 0; j < V; ++j) sum[j] += added[j];
    });
    store_channels<V>(output.y.at(pixel.n, k, pixel.p, pixel.q), v);
  });
}

// A tile of N columns of sums, from output channel `first` on, through the epilogue to memory. affine: copy_affine's.
template <int N, class T>
EFFOPS_DEVICE void write_output(const Layer<T>& layer, const Output<T>& output, const Tables& tables,
                                const Origin& origin, int first, const compute<T>* affine, const compute<T>* tile) {
  if (output.meeting.vector) {
    write_columns<kVector<T>, N>(layer, output, tables, origin, first, affine, tile);
  } else {
    write_columns<1, N>(layer, output, tables, origin, first, affine, tile);
  }
}

// ---- host ----

template <class T>
Layer<T> layer_of(const DsconvForwardArgs& a, const Box& box) {
  Layer<T> layer{};
  layer.g = sizes_of(a.g);
  layer.N = a.g.N;
  layer.box = box;
  layer.passed = narrow(a.passthrough_channels);
  layer.K = narrow(a.K);
  layer.x = map_of<const T>(a.input);
  layer.passthrough = map_of<const T>(a.passthrough);
  layer.read_x = reading_of<T>(a.input, layer.g.multiplier);
  layer.read_passthrough = reading_of<T>(a.passthrough);
  layer.dw_weight = static_cast<const T*>(a.dw_weight);
  layer.dw = a.dw_epilogue;
  layer.matrix = static_cast<const T*>(a.pw_weight);
  layer.matrix_k = a.pw_stride_k;
  layer.matrix_c = a.pw_stride_c;
  const int bytes = a.pw_stride_c == 1 ? copy_bytes<T>(a.pw_weight, {a.pw_stride_k, a.passthrough_channels}) : 0;
  layer.read_matrix = {a.pw_stride_c, 1, bytes, a.pw_stride_c > a.pw_stride_k};
  return layer;
}

// A map from channel `first` on.
template <class T>
TensorRef from_channel(TensorRef map, index_t first) {
  if (map.data != nullptr) map.data = static_cast<T*>(map.data) + first * map.c;
  return map;
}

// `channels` of each of the maps that are there.
template <class T>
Meeting meeting_of(index_t channels, std::initializer_list<TensorRef> maps) {
  constexpr int kBytes = kVector<T> * static_cast<int>(sizeof(T));
  bool vector = channels % kVector<T> == 0, by_pixel = false;
  for (const TensorRef& map : maps) {
    if (map.data == nullptr) continue;
    vector = vector && map.c == 1 && copy_bytes<T>(map.data, {map.n, map.h, map.w}) >= kBytes;
    by_pixel = by_pixel || map.c > map.w;
  }
  return {vector, by_pixel && !vector};
}

template <class T>
Output<T> output_of(const DsconvForwardArgs& args) {
  const TensorRef y = from_channel<T>(args.output, args.keep);
  return {map_of<T>(y), args.pw_epilogue, meeting_of<T>(args.K, {y, args.pw_epilogue.residual})};
}

inline index_t pixels_of(const DepthwiseGeometry& g) { return g.N * g.P * g.Q; }

// A tile with the pointwise sums of `columns` channels.
struct PointwiseTile {
  Box box;
  int columns;
  std::size_t behind;  // bytes that the kernel wants behind the tile of sums
  int patches;
};

// Its shared memory.
template <class T>
int carve_pointwise(const PointwiseTile& tile, const Sizes& g, PointwiseAt& at) {
  using C = compute<T>;
  Carver stage;
  at.matrix = stage.take(tile.columns * kPitch<T> * sizeof(T));
  at.taps = stage.take(taps_bytes<T>(g, tile.box.patch_rows > 0));
  at.stage_bytes = stage.used();
  Carver all;
  at.tables = carve_tables(all, tile.box, 1);
  at.affine = all.take(kAffine * tile.columns * sizeof(C));
  at.z = all.take(kSlots * kPitch<T> * sizeof(T));
  const int patch = static_cast<int>(patch_bytes<T>(tile.box, g));
  at.next_patch = tile.patches == 2 ? patch : 0;
  at.stages = all.take(std::max<std::size_t>(2 * at.stage_bytes + tile.patches * patch,
                                             kSlots * (tile.columns + 8) * sizeof(C) + tile.behind));
  at.patch = at.stages + 2 * at.stage_bytes;
  return all.used();
}

// Two patches where two blocks fit a processor all the same, else one where they do then, else what fits one block.
//
// The box is the same in each case, and with it the traffic an output. What one patch costs is that its copy has the
// product's time alone; what one block a processor costs is that nobody computes while it waits: float32, 3x3 at stride
// 2, 128 -> 128 channels, 285 pixels a patch. A block of 32 channels copies 36 KB, 2000 cycles of an H200's memory
// (18.6 bytes a cycle and processor), and computes some 430 for z and 2050 for the product, which the copy fits. A tile
// of four such blocks waits 2700 for its first patch and 1800 for its stores:
//   one block, two patches    134 KB   4 x 2480 + 4500 = 14400 cycles a tile
//   two blocks, one patch      92 KB   9900 cycles of instructions, 9800 of memory; waits are filled by the other block
// At stride 1 two blocks with two patches fit anyway. TF32 only makes the waits a larger share.
template <class T>
PointwiseTile pointwise_tile(const Sizes& g, index_t images, const Device& device, int columns,
                             std::size_t behind = 0) {
  constexpr int kSystem = 1024;  // bytes of each block that the system takes
  PointwiseAt at;
  PointwiseTile tile{{}, columns, behind, 1};
  const std::size_t other = carve_pointwise<T>(tile, g, at) + 2 * (taps_bytes<T>(g, true) + 64);
  tile.box = fitting_box<T>(g, images, device, other, 1, 1);
  for (const int blocks : {kBlocks<T>, 1}) {
    for (const int patches : {2, 1}) {
      tile.patches = patches;
      if ((carve_pointwise<T>(tile, g, at) + kSystem) * blocks <= device.shared_bytes + kSystem) return tile;
    }
  }
  return tile;
}

// The widest tile that K fills, halved while a processor has no block. f: takes the width as a constant.
template <int MIN, int MAX, class F>
void with_width(index_t K, index_t tiles, const Device& device, const F& f) {
  if constexpr (MIN < MAX) {
    constexpr int kHalf = MAX / 2;
    if (K <= kHalf || tiles * ceil_div<index_t>(K, MAX) < device.processors) {
      return with_width<MIN, kHalf>(K, tiles, device, f);
    }
  }
  f(std::integral_constant<int, MAX>{});
}

// f(a value of the type that dtype names, whether products are TF32) as constants.
template <class F>
decltype(auto) with_types(DType dtype, bool tf32, const F& f) {
  switch (dtype) {
    case DType::f16:
      return f(half_t{}, std::false_type{});
    case DType::bf16:
      return f(bfloat16_t{}, std::false_type{});
    case DType::f64:
      return f(double{}, std::false_type{});
    case DType::f32:
      break;
  }
  return tf32 ? f(float{}, std::true_type{}) : f(float{}, std::false_type{});
}

}  // namespace effops::cuda
