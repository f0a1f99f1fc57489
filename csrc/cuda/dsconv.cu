#include <utility>

#include "csrc/cuda/dsconv_tile.h"
#include "csrc/cuda/kernels.h"
#include "csrc/cuda/launch.h"
#include "csrc/cuda/sum.h"

namespace effops::cuda {
namespace {

// Channels of one access to a map whose channels lie side by side: 8 bytes of a half type (28 channels are no multiple of
// 16 bytes, and a warp's accesses are whole lines all the same), 16 of the others.
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

// Blocks that shall fit a processor: 128 registers a thread, or 255 for double. A fourth of the occupancy there could be,
// because a thread holds the product's sums (32) over the window's sums and pixels (26), their addresses and the
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

// f(slot, column) for all elements of a tile of N columns, V columns at a time. Every thread of the block makes the same
// number of calls; along the channels its column is always the same.
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

// Shared memory: tables, and two stages of what a block of channels needs; then, in the stages' place, the tile of sums.
struct PointwiseAt {
  TablesAt tables;
  int affine, z, stages, stage_bytes, patch, matrix, taps;
};

// z's last channels, which the output begins with.
template <class T>
struct Kept {
  Map<T> map;
  int first, count;  // of the depthwise channels
  Meeting meeting;
};

template <int V, class T>
EFFOPS_DEVICE void keep_channels(const Layer<T>& layer, const Tables& tables, const Origin& origin,
                                 const Kept<T>& kept, int first, const T* z) {
  walk_tile<V, kBlockC<T>>(kept.meeting.by_pixel, [&](int slot, int column) {
    const int c = first + column - kept.first;
    const Pixel pixel = pixel_of(layer, tables, origin, slot);
    if (!pixel.inside || c < 0 || c >= kept.count) return;
    store_vec<T, V>(kept.map.at(pixel.n, c, pixel.p, pixel.q), load_vec<T, V>(z + slot * kPitch<T> + column));
  });
}

// product += z (slots x channels) * matrix (N output channels from k on)^T, a block of channels at a time: while one is
// computed the next is copied.
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
    clear_empty_slots(layer_.box, z, kPitch<T>, kBlockC<T>);
    product.clear();
    copy(0);
    EFFOPS_NO_UNROLL
    for (int block = 0; block < blocks; ++block) {
      copy_async_wait<0>();
      barrier();
      if (block + 1 < blocks) copy(block + 1);
      const T* rows = part<T>(block, at_.patch);
      if (block >= passed_blocks) {
        const int first = (block - passed_blocks) * kBlockC<T>;
        depthwise_tile(layer_, tables_, origin_, first, rows, part<C>(block, at_.taps), z, kPitch<T>);
        barrier();
        if (kept != nullptr && first + kBlockC<T> > kept->first) keep(*kept, first, z);
        rows = z;
      }
      product.template add<RowHolds::sum, RowHolds::sum, kBlockC<T>>(rows, kPitch<T>, part<T>(block, at_.matrix),
                                                                    kPitch<T>);
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

  EFFOPS_DEVICE void copy(int block) const {
    const bool passed = block < layer_.passed_blocks();
    const int first = (passed ? block : block - layer_.passed_blocks()) * kBlockC<T>;
    T* rows = part<T>(block, at_.patch);
    if (passed) {
      copy_slots<T, kBlockC<T>>(layer_, tables_, origin_, layer_.passthrough, layer_.read_passthrough, first,
                                layer_.passed, rows, kPitch<T>);
    } else if (layer_.box.patch_rows > 0) {
      copy_patch(layer_, tables_.patch_at, first, rows);
    }
    copy_matrix<T, kBlockC<T>>(layer_, k_, N, passed ? 0 : layer_.passed, first, passed ? layer_.passed : layer_.g.D,
                               part<T>(block, at_.matrix), kPitch<T>);
    copy_async_commit();
    if (!passed) copy_taps(layer_, first, part<C>(block, at_.taps));
  }

  const Layer<T>& layer_;
  const PointwiseAt& at_;
  const Tables& tables_;
  const Origin& origin_;
  const int k_;
};

// ---- forward ----

template <class T>
struct Forward {
  Layer<T> layer;
  PointwiseAt at;
  Map<T> y;  // K channels
  EpilogueRef epilogue;
  Meeting meeting;
  Kept<T> kept;
};

template <int V, int N, class T>
EFFOPS_DEVICE void write_output(const Forward<T>& a, const Tables& tables, const Origin& origin, int first,
                                const compute<T>* tile, int pitch) {
  using C = compute<T>;
  const TensorRef& ref = a.epilogue.residual;
  const Map<const T> residual{static_cast<const T*>(ref.data), ref.n, ref.c, ref.h, ref.w};
  const C* affine = shared_at<C>(a.at.affine);
  walk_tile<V, N>(a.meeting.by_pixel, [&](int slot, int column) {
    const Pixel pixel = pixel_of(a.layer, tables, origin, slot);
    const int k = first + column;
    if (!pixel.inside || k >= a.layer.K) return;
    C v[V];
    EFFOPS_UNROLL
    for (int j = 0; j < V; ++j) v[j] = tile[slot * pitch + column + j];
    finish_sums<V>(a.epilogue, affine + column, N, v, [&](C(&sum)[V]) {
      C added[V];
      load_channels<V>(residual.at(pixel.n, k, pixel.p, pixel.q), added);
      EFFOPS_UNROLL
      for (int j = 0; j < V; ++j) sum[j] += added[j];
    });
    store_channels<V>(a.y.at(pixel.n, k, pixel.p, pixel.q), v);
  });
}

template <class T, bool TF32, int N>
EFFOPS_KERNEL(kThreads, kBlocks<T>)
dsconv_forward_kernel(EFFOPS_PARAMS Forward<T> a) {
  using C = compute<T>;
  using Product = BlockProduct<T, TF32, kSlots, N>;
  const int k_blocks = ceil_div(a.layer.K, N), k_block = static_cast<int>(blockIdx.x) % k_blocks;
  const Origin origin = origin_of(a.layer.box, static_cast<int>(blockIdx.x) / k_blocks);
  const Tables tables = tables_of(a.at.tables, shared_at<index_t>(a.at.tables.patch_at));
  number_slots(a.layer.box, a.layer.g, tables);
  locate_patch(a.layer, origin, tables.patch_at);
  copy_affine<T>(a.epilogue, k_block * N, a.layer.K, N, shared_at<C>(a.at.affine));
  barrier();
  Product product;
  PointwiseSums<T, N, Product>(a.layer, a.at, tables, origin, k_block * N)
      .run(k_block == 0 && a.kept.count > 0 ? &a.kept : nullptr, product);
  C* tile = shared_at<C>(a.at.stages);
  const int pitch = tile_pitch(N, a.meeting.by_pixel);
  product.store(tile, pitch);
  barrier();
  if (a.meeting.vector) {
    write_output<kVector<T>, N>(a, tables, origin, k_block * N, tile, pitch);
  } else {
    write_output<1, N>(a, tables, origin, k_block * N, tile, pitch);
  }
}

// ---- host: what the kernels share ----

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

inline index_t pixels_of(const DepthwiseGeometry& g) { return g.N * g.P * g.Q; }

// Shared memory of the kernels with the pointwise sums of N channels; `behind`: bytes that they want behind the tile.
template <class T>
int carve_pointwise(const Box& box, const Sizes& g, int N, std::size_t behind, PointwiseAt& at) {
  using C = compute<T>;
  Carver stage;
  at.patch = stage.take(patch_bytes<T>(box, g));
  at.matrix = stage.take(N * kPitch<T> * sizeof(T));
  at.taps = stage.take(taps_bytes<T>(g, box.patch_rows > 0));
  at.stage_bytes = stage.used();
  Carver all;
  at.tables = carve_tables(all, box, 1);
  at.affine = all.take(kAffine * N * sizeof(C));
  at.z = all.take(kSlots * kPitch<T> * sizeof(T));
  at.stages = all.take(std::max<std::size_t>(2 * at.stage_bytes, kSlots * (N + 8) * sizeof(C) + behind));
  return all.used();
}

// The box for that: what everything but patches takes is known before it.
template <class T>
Box pointwise_box(const Sizes& g, index_t images, const Device& device, int N) {
  PointwiseAt at;
  Box none{};
  const std::size_t other = carve_pointwise<T>(none, g, N, 0, at) + 2 * (taps_bytes<T>(g, true) + 64);
  return fitting_box<T>(g, images, device, other, 2, 1);
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

template <class T, bool TF32, int N>
void launch_forward(const DsconvForwardArgs& args, const Device& device, Stream stream) {
  const Sizes g = sizes_of(args.g);
  const Box box = pointwise_box<T>(g, args.g.N, device, N);
  Forward<T> a{};
  a.layer = layer_of<T>(args, box);
  const int shared = carve_pointwise<T>(box, g, N, 0, a.at);
  const TensorRef y = from_channel<T>(args.output, args.keep);
  a.y = map_of<T>(y);
  a.epilogue = args.pw_epilogue;
  a.meeting = meeting_of<T>(args.K, {y, args.pw_epilogue.residual});
  a.kept = {map_of<T>(args.output), narrow(g.D - args.keep), narrow(args.keep), {}};
  a.kept.meeting = meeting_of<T>(args.keep, {args.output});
  a.kept.meeting.vector = a.kept.meeting.vector && a.kept.first % kVector<T> == 0;
  const index_t blocks = tiles_of(box, args.g.N) * ceil_div<index_t>(args.K, N);
  launch(dsconv_forward_kernel<T, TF32, N>, grid_of(blocks, kThreads, shared), stream, a);
}

// The widest tiles: 64 x 256 sums are 64 registers of a thread; float and double have a fourth of a warp's products.
template <class T>
constexpr int kWidest = sizeof(T) == 8 ? 64 : 128;

template <class T, bool TF32>
void forward(const DsconvForwardArgs& args, const Device& device, Stream stream) {
  if (pixels_of(args.g) == 0) return;
  const index_t tiles = ceil_div<index_t>(pixels_of(args.g), kSlots);
  with_width<32, kWidest<T>>(args.K, tiles, device,
                             [&](auto width) { launch_forward<T, TF32, width>(args, device, stream); });
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

}  // namespace

void dsconv_fwd(DType dtype, const DsconvForwardArgs& args, bool tf32, const Device& device, Stream stream) {
  with_types(dtype, tf32, [&](auto element, auto products) {
    forward<decltype(element), decltype(products)::value>(args, device, stream);
  });
}

}  // namespace effops::cuda
