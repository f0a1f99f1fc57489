// Room dsconv on CUDA devices: depthwise -> epilogue -> pointwise -> epilogue in one kernel, and its gradients.
// Unverified on a device: what is said of speed is calculated, nothing measured.
//
//   forward   a block: a box of 64 output pixels (dsconv_tile.h) x up to 128 output channels; z never leaves the chip
//
//        two stages in shared memory, the next block of 32 channels (16 of double) copied by cp.async while one is used
//        +--------------+---------+------------------+
//        | patch of x   | taps    | matrix [K][32]   |       passed channels: their pixels stand in the patch's place
//        +------+-------+----+----+--------+---------+       and are z already
//               |  windows   |             |
//               v            v             |                 4 pixels x 2 channels a thread, sums in registers
//        z [64 pixels][32 channels], 16 bits                 rounded to the maps' type, as z in memory would be
//               |  ldmatrix                |  ldmatrix
//               v                          v
//        sums [64][K] in registers, 8 warps (gemm.h) -> shared memory -> epilogue, 8 or 16 bytes a thread -> y
//                                                                        z's kept channels are stored beside y
//
//   output gradient    the same boxes and sums (only where the epilogue's gradient depends on them): g, saved output
//                      -> du
//   z's gradient       64 pixels x 64 channels: du * matrix over K, then the depthwise epilogue backwards with its sums
//                      anew; the passed channels' part is their gradient
//   matrix's gradient  128 x 64 (K x channels): du^T z over a range of boxes with z anew, the next box's du and patches
//                      copied meanwhile; ranges are as few as give every processor two blocks
//   input's, taps'     those of room dwconv (dwconv.h), on the gradient at the depthwise sums
//
// Sums over pixels: a line of partial results a box or range, added by sum.h. Kernels whose results nobody asked for do
// not run; without activation and scale du is the gradient that came in.
//
// Where a patch does not fit shared memory (large dilations) the windows are read from memory; channels that lie apart
// (NCHW, sliced maps, multipliers) are copied element by element. The rest is the same.
//
// Bytes a pixel of 16-bit maps: forward 2 (C + passed + K + keep), x's halo and the matrix from L2: 100 / 64 of x at
// 3x3.
//
// Calculated for float16, channels_last, batch 128, 56 x 56 on an H200 (4.3 TB/s, 132 processors at 1.75 GHz):
//   128 -> 128 channels   512 bytes a pixel: 206 MB, 48 us; products 13 GFLOP, 17 us. Counted by hand, 27 instructions
//                         an element of z for its window and epilogue (9 multiply-adds), 14 for copies, 4 for
//                         products, 10 for the output: 55 x 51 million elements issue for 95 us, so instructions bound
//                         it; two perfect kernels would take 96 us.
//   28 + 28 -> 28         half-identity: x, passed and y, 168 bytes a pixel: 67 MB, 16 us; copies weigh more a channel
//                         of z, and 4 of 32 are padding: some 80 instructions x 11 million, 30 us. Two perfect
//                         kernels: 47 us.
#include <utility>

#include "csrc/cuda/dsconv_tile.h"
#include "csrc/cuda/dwconv.h"
#include "csrc/cuda/kernels.h"
#include "csrc/cuda/launch.h"
#include "csrc/cuda/sum.h"

namespace effops::cuda {
namespace {

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

// Shared memory: tables, and two stages of what a block of channels needs; then, in the stages' place, the tile of
// sums.
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
    load_channels<V>(tile + slot * pitch + column, v);
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

// ---- backward: what its kernels share ----

// post(act(u) * scale + shift + residual) backwards at one place of a map. pixel, c: of the result.
template <int V, class T>
struct EpilogueBackward {
  using C = compute<T>;
  const EpilogueRef& e;
  const Map<T>& residual_grad;

  // g: the gradient of the result, then of u = conv + bias. terms: what the vectors' gradients sum.
  EFFOPS_DEVICE void run(const Pixel& pixel, int c, const C (&u)[V], C (&g)[V], C (&terms)[kAffine][V]) const {
    C residual[V] = {};
    if (e.post != Activation::none && e.residual.data != nullptr) {
      const TensorRef& r = e.residual;
      load_channels<V>(Map<const T>{static_cast<const T*>(r.data), r.n, r.c, r.h, r.w}.at(pixel.n, c, pixel.p, pixel.q),
                       residual);
    }
    EpilogueTerms<C, V> found;
    epilogue_gradient<T>(e, c, u, residual, g, found);
    if (residual_grad.data != nullptr) {
      store_channels<V>(residual_grad.at(pixel.n, c, pixel.p, pixel.q), found.residual);
    }
    EFFOPS_UNROLL
    for (int j = 0; j < V; ++j) {
      terms[0][j] = g[j];
      terms[1][j] = found.scale[j];
      terms[2][j] = found.residual[j];
    }
  }
};

// Where the sums over a tile's pixels go: [tiles][bias, scale, shift][channels]; null: nobody asked for them.
template <class C>
struct Partial {
  C* data;
  int channels;
};

// Lines of [bias, scale, shift][N] that walk_and_sum needs.
template <int V, int N>
constexpr int kSumLines = kThreads / (N / V) > kSlots / kWarp ? kThreads / (N / V) : kSlots / kWarp;

// f(slot, column, terms) for a tile of N columns, and the terms' sums over its pixels: a thread's, or a warp's along
// the pixels, to `lines`; their sum to `partial`.
template <int V, int N, class C, class F>
EFFOPS_DEVICE void walk_and_sum(bool by_pixel, C* lines, const Partial<C>& partial, int tile, int first, const F& f) {
  constexpr int kLine = kAffine * N, kGroups = N / V;
  C sums[kAffine][V] = {};
  walk_tile<V, N>(by_pixel, [&](int slot, int column) {
    C terms[kAffine][V] = {};
    f(slot, column, terms);
    EFFOPS_UNROLL
    for (int i = 0; i < kAffine; ++i) {
      EFFOPS_UNROLL
      for (int j = 0; j < V; ++j) sums[i][j] = (V == 1 && by_pixel ? C(0) : sums[i][j]) + terms[i][j];
    }
    if constexpr (V == 1) {
      if (!by_pixel || partial.data == nullptr) return;
      EFFOPS_UNROLL
      for (int i = 0; i < kAffine; ++i) {
        C sum = sums[i][0];
        EFFOPS_UNROLL
        for (int mask = kWarp / 2; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
        if (slot % kWarp == 0) lines[slot / kWarp * kLine + i * N + column] = sum;
      }
    }
  });
  if (partial.data == nullptr) return;
  if (!by_pixel) {
    C* line = lines + static_cast<int>(threadIdx.x) / kGroups * kLine + static_cast<int>(threadIdx.x) % kGroups * V;
    EFFOPS_UNROLL
    for (int i = 0; i < kAffine; ++i) {
      EFFOPS_UNROLL
      for (int j = 0; j < V; ++j) line[i * N + j] = sums[i][j];
    }
  }
  barrier();
  const int count = by_pixel ? kSlots / kWarp : kThreads / kGroups;
  for (int i = threadIdx.x; i < kLine; i += kThreads) {
    const int channel = first + i % N;
    if (channel >= partial.channels) continue;
    C sum = lines[i];
    for (int line = 1; line < count; ++line) sum += lines[line * kLine + i];
    partial.data[(static_cast<index_t>(tile) * kAffine + i / N) * partial.channels + channel] = sum;
  }
}

// ---- the gradient at the pointwise sums ----

template <class T>
struct OutputGradient {
  Layer<T> layer;
  PointwiseAt at;
  int lines;  // in the stages, behind the tile
  EpilogueRef epilogue;
  Meeting meeting;
  bool recompute;            // the sums themselves
  Map<const T> grad, saved;  // saved: the output, where it tells the derivative
  Map<T> du, residual_grad;
  Partial<compute<T>> partial;
};

template <int V, int N, class T>
EFFOPS_DEVICE void write_output_gradient(const OutputGradient<T>& a, const Tables& tables, const Origin& origin,
                                         int tile_index, int first, const compute<T>* tile, int pitch) {
  using C = compute<T>;
  const C* bias = shared_at<C>(a.at.affine);
  const EpilogueBackward<V, T> backward{a.epilogue, a.residual_grad};
  walk_and_sum<V, N>(a.meeting.by_pixel, shared_at<C>(a.lines), a.partial, tile_index, first,
                     [&](int slot, int column, C(&terms)[kAffine][V]) {
                       const Pixel pixel = pixel_of(a.layer, tables, origin, slot);
                       const int k = first + column;
                       if (!pixel.inside || k >= a.layer.K) return;
                       C g[V], u[V] = {};
                       load_channels<V>(a.grad.at(pixel.n, k, pixel.p, pixel.q), g);
                       if (a.saved.data != nullptr) {
                         load_channels<V>(a.saved.at(pixel.n, k, pixel.p, pixel.q), u);
                         epilogue_gradient_from_output<T>(a.epilogue, u, g);
                         EFFOPS_UNROLL
                         for (int j = 0; j < V; ++j) terms[0][j] = g[j];
                       } else {
                         if (a.recompute) {
                           EFFOPS_UNROLL
                           for (int j = 0; j < V; ++j) u[j] = tile[slot * pitch + column + j] + bias[column + j];
                         }
                         backward.run(pixel, k, u, g, terms);
                       }
                       if (a.du.data != nullptr) store_channels<V>(a.du.at(pixel.n, k, pixel.p, pixel.q), g);
                     });
}

template <class T, bool TF32, int N>
EFFOPS_KERNEL(kThreads, kBlocks<T>)
dsconv_output_gradient_kernel(EFFOPS_PARAMS OutputGradient<T> a) {
  using C = compute<T>;
  using Product = BlockProduct<T, TF32, kSlots, N>;
  const int k_blocks = ceil_div(a.layer.K, N), k = static_cast<int>(blockIdx.x) % k_blocks * N;
  const int tile_index = static_cast<int>(blockIdx.x) / k_blocks;
  const Origin origin = origin_of(a.layer.box, tile_index);
  const Tables tables = tables_of(a.at.tables, shared_at<index_t>(a.at.tables.patch_at));
  number_slots(a.layer.box, a.layer.g, tables);
  if (a.recompute) locate_patch(a.layer, origin, tables.patch_at);
  copy_affine<T>(a.epilogue, k, a.layer.K, N, shared_at<C>(a.at.affine));
  barrier();
  C* tile = shared_at<C>(a.at.stages);
  const int pitch = tile_pitch(N, a.meeting.by_pixel);
  if (a.recompute) {
    Product product;
    PointwiseSums<T, N, Product>(a.layer, a.at, tables, origin, k).run(nullptr, product);
    product.store(tile, pitch);
    barrier();
  }
  if (a.meeting.vector) {
    write_output_gradient<kVector<T>, N>(a, tables, origin, tile_index, k, tile, pitch);
  } else {
    write_output_gradient<1, N>(a, tables, origin, tile_index, k, tile, pitch);
  }
}

// ---- the gradients of z: of the passed channels, and at the depthwise sums ----

// Output channels of a step of the sum over K.
template <class T>
constexpr int kDepth = sizeof(T) == 2 ? 64 : kBlockC<T>;

// Shared memory: tables; two stages of du and the matrix, and in their place the tile of sums and what the depthwise
// sums of its channels take.
struct ZGradientAt {
  TablesAt tables;
  int stages, stage_bytes, matrix;
  int tile, u, lines, patch, taps;
};

template <class T>
struct ZGradient {
  Layer<T> layer;
  ZGradientAt at;
  Map<const T> du;
  Reading read_du;
  int first_block, blocks;  // blocks of channels that are asked for, the passed ones first
  Map<T> passed_grad;
  Meeting passed_meeting;
  Map<const T> kept;  // the gradient of the depthwise channels from `kept_first` on that the output begins with
  int kept_first;
  bool recompute;
  Map<T> sums_grad, residual_grad;
  Meeting meeting;
  Partial<compute<T>> partial;
};

// A block of columns of the pointwise matrix: of the passed channels or of the depthwise ones.
struct ColumnBlock {
  bool passed;
  int first, count, offset;  // channels first ... of `count`, the first of them column `offset`
};

template <class T>
EFFOPS_DEVICE ColumnBlock column_block(const Layer<T>& layer, int block, int columns) {
  const int passed_blocks = ceil_div(layer.passed, columns);
  if (block < passed_blocks) return {true, block * columns, layer.passed, 0};
  return {false, (block - passed_blocks) * columns, layer.g.D, layer.passed};
}

// product += du (slots x K) * matrix (K x N channels)
template <int N, class T, class Product>
EFFOPS_DEVICE void multiply_by_matrix(const ZGradient<T>& a, const Tables& tables, const Origin& origin,
                                      const ColumnBlock& block, Product& product) {
  constexpr int kDuPitch = padded_pitch<T>(kDepth<T>), kMatrixPitch = padded_pitch<T>(N, RowHolds::outer);
  const auto part = [&](int step, int offset) {
    return shared_at<T>(a.at.stages + (step & 1) * a.at.stage_bytes + offset);
  };
  const auto copy = [&](int step) {
    const int k = step * kDepth<T>;
    copy_slots<T, kDepth<T>>(a.layer, tables, origin, a.du, a.read_du, k, a.layer.K, part(step, 0), kDuPitch);
    copy_matrix<T, N>(a.layer, k, kDepth<T>, block.offset, block.first, block.count, part(step, a.at.matrix),
                      kMatrixPitch);
    copy_async_commit();
  };
  const int steps = ceil_div(a.layer.K, kDepth<T>);
  copy(0);
  EFFOPS_NO_UNROLL
  for (int step = 0; step < steps; ++step) {
    copy_async_wait<0>();
    barrier();
    if (step + 1 < steps) copy(step + 1);
    product.template add<RowHolds::sum, RowHolds::outer, kDepth<T>>(part(step, 0), kDuPitch, part(step, a.at.matrix),
                                                                    kMatrixPitch);
  }
  barrier();
}

// The depthwise sums of N channels, as a tile.
template <int N, class T>
EFFOPS_DEVICE void depthwise_sums_tile(const ZGradient<T>& a, const Tables& tables, const Origin& origin, int first,
                                       compute<T>* u, int pitch) {
  using C = compute<T>;
  T* patch = shared_at<T>(a.at.patch);
  C* taps = shared_at<C>(a.at.taps);
  EFFOPS_NO_UNROLL
  for (int part = 0; part < N; part += kBlockC<T>) {
    if (a.layer.box.patch_rows > 0) copy_patch(a.layer, tables.patch_at, first + part, patch);
    copy_async_commit();
    copy_taps(a.layer, first + part, taps);
    copy_async_wait<0>();
    barrier();
    depthwise_sums(a.layer, tables, origin, first + part, patch, taps,
                   [&](const RunPlace& place, const C(&sums)[kRun][2]) {
                     EFFOPS_UNROLL
                     for (int j = 0; j < kRun; ++j) {
                       if (j >= place.run.count) continue;
                       C* to = u + (place.run.slot + j) * pitch + part + place.channel;
                       to[0] = sums[j][0];
                       to[1] = sums[j][1];
                     }
                   });
    barrier();
  }
}

template <int V, int N, class T>
EFFOPS_DEVICE void write_passed_gradient(const ZGradient<T>& a, const Tables& tables, const Origin& origin, int first,
                                         const compute<T>* tile, int pitch) {
  walk_tile<V, N>(a.passed_meeting.by_pixel, [&](int slot, int column) {
    const Pixel pixel = pixel_of(a.layer, tables, origin, slot);
    const int c = first + column;
    if (!pixel.inside || c >= a.layer.passed) return;
    compute<T> g[V];
    load_channels<V>(tile + slot * pitch + column, g);
    store_channels<V>(a.passed_grad.at(pixel.n, c, pixel.p, pixel.q), g);
  });
}

template <int V, int N, class T>
EFFOPS_DEVICE void write_sums_gradient(const ZGradient<T>& a, const Tables& tables, const Origin& origin,
                                       int tile_index, int first, const compute<T>* tile, const compute<T>* sums,
                                       int pitch) {
  using C = compute<T>;
  const EpilogueBackward<V, T> backward{a.layer.dw, a.residual_grad};
  walk_and_sum<V, N>(a.meeting.by_pixel, shared_at<C>(a.at.lines), a.partial, tile_index, first,
                     [&](int slot, int column, C(&terms)[kAffine][V]) {
                       const Pixel pixel = pixel_of(a.layer, tables, origin, slot);
                       const int o = first + column;
                       if (!pixel.inside || o >= a.layer.g.D) return;
                       C g[V], u[V] = {}, sum[V] = {}, kept[V] = {};
                       load_channels<V>(tile + slot * pitch + column, g);
                       if (o >= a.kept_first) {
                         load_channels<V>(a.kept.at(pixel.n, o - a.kept_first, pixel.p, pixel.q), kept);
                       }
                       if (a.recompute) {
                         read_channels<T>(a.layer.dw.bias, o, C(0), u);
                         load_channels<V>(sums + slot * pitch + column, sum);
                       }
                       EFFOPS_UNROLL
                       for (int j = 0; j < V; ++j) {
                         g[j] += kept[j];
                         u[j] += sum[j];
                       }
                       backward.run(pixel, o, u, g, terms);
                       if (a.sums_grad.data != nullptr) {
                         store_channels<V>(a.sums_grad.at(pixel.n, o, pixel.p, pixel.q), g);
                       }
                     });
}

template <class T, bool TF32, int N>
EFFOPS_KERNEL(kThreads, kBlocks<T>)
dsconv_z_gradient_kernel(EFFOPS_PARAMS ZGradient<T> a) {
  using C = compute<T>;
  const int tile_index = static_cast<int>(blockIdx.x) / a.blocks;
  const ColumnBlock block = column_block(a.layer, a.first_block + static_cast<int>(blockIdx.x) % a.blocks, N);
  const Origin origin = origin_of(a.layer.box, tile_index);
  const Tables tables = tables_of(a.at.tables, shared_at<index_t>(a.at.tables.patch_at));
  const bool recompute = a.recompute && !block.passed;
  number_slots(a.layer.box, a.layer.g, tables);
  if (recompute) locate_patch(a.layer, origin, tables.patch_at);
  barrier();
  C* tile = shared_at<C>(a.at.tile);
  const Meeting meeting = block.passed ? a.passed_meeting : a.meeting;
  const int pitch = tile_pitch(N, meeting.by_pixel);
  {
    BlockProduct<T, TF32, kSlots, N> product;
    product.clear();
    multiply_by_matrix<N>(a, tables, origin, block, product);
    product.store(tile, pitch);
  }
  if (block.passed) {
    barrier();
    if (meeting.vector) {
      write_passed_gradient<kVector<T>, N>(a, tables, origin, block.first, tile, pitch);
    } else {
      write_passed_gradient<1, N>(a, tables, origin, block.first, tile, pitch);
    }
    return;
  }
  C* u = shared_at<C>(a.at.u);
  if (recompute) depthwise_sums_tile<N>(a, tables, origin, block.first, u, pitch);
  barrier();
  if (meeting.vector) {
    write_sums_gradient<kVector<T>, N>(a, tables, origin, tile_index, block.first, tile, u, pitch);
  } else {
    write_sums_gradient<1, N>(a, tables, origin, tile_index, block.first, tile, u, pitch);
  }
}

// ---- the gradient of the pointwise matrix ----

// Output channels and columns of a block's sums: 32 registers of a thread, and z computed once up to 128 channels.
template <class T>
constexpr int kMatrixM = sizeof(T) == 2 ? 128 : 64;
template <class T>
constexpr int kMatrixN = sizeof(T) == 2 ? 64 : kBlockC<T>;

// Shared memory: tables, taps of all columns, and two stages of du, z and the patches that z is computed from; then, in
// the stages' place, the tile of sums.
struct MatrixGradientAt {
  TablesAt tables;
  int taps, taps_bytes;
  int stages, stage_bytes, z, patches, patch_bytes;
};

template <class T>
struct MatrixGradient {
  Layer<T> layer;
  MatrixGradientAt at;
  Map<const T> du;
  Reading read_du;
  int tiles, steps;     // of pixels; of them, those that a block takes
  compute<T>* partial;  // [blocks of steps][K][passed + D]
};

// sums (K x channels) += du^T (K x slots) * z (slots x channels), over the tiles of a block, of which the next is
// copied while one is computed.
template <class T, bool TF32>
class MatrixSums {
  using C = compute<T>;
  static constexpr int kM = kMatrixM<T>, kN = kMatrixN<T>;
  static constexpr int kDuPitch = padded_pitch<T>(kM, RowHolds::outer), kZPitch = padded_pitch<T>(kN, RowHolds::outer);

 public:
  EFFOPS_DEVICE MatrixSums(const MatrixGradient<T>& a, const ColumnBlock& block, int k, int first, int last)
      : a_(a), block_(block), k_(k), first_(first), last_(last) {}

  EFFOPS_DEVICE void run(BlockProduct<T, TF32, kM, kN>& product) {
    number_slots(a_.layer.box, a_.layer.g, tables(0));
    locate(first_);
    locate(first_ + 1);
    if (!block_.passed) prepare();
    product.clear();
    barrier();
    copy(first_);
    EFFOPS_NO_UNROLL
    for (int tile = first_; tile < last_; ++tile) {
      copy_async_wait<0>();
      barrier();
      if (tile + 1 < last_) copy(tile + 1);
      if (!block_.passed) compute_z(tile);
      locate(tile + 2);
      barrier();
      product.template add<RowHolds::outer, RowHolds::outer, kSlots>(part(tile, 0), kDuPitch, part(tile, a_.at.z),
                                                                     kZPitch);
    }
    barrier();
  }

 private:
  EFFOPS_DEVICE T* part(int tile, int offset) const {
    return shared_at<T>(a_.at.stages + ((tile - first_) & 1) * a_.at.stage_bytes + offset);
  }
  EFFOPS_DEVICE T* patch(int tile, int columns) const {
    return part(tile, a_.at.patches + columns / kBlockC<T> * a_.at.patch_bytes);
  }
  EFFOPS_DEVICE C* taps(int columns) const {
    return shared_at<C>(a_.at.taps + columns / kBlockC<T> * a_.at.taps_bytes);
  }
  EFFOPS_DEVICE Tables tables(int tile) const {
    return tables_of(a_.at.tables,
                     shared_at<index_t>(a_.at.tables.patch_at) + ((tile - first_) & 1) * a_.layer.box.patch_pixels());
  }

  EFFOPS_DEVICE void locate(int tile) const {
    if (block_.passed || tile >= last_) return;
    locate_patch(a_.layer, origin_of(a_.layer.box, tile), tables(tile).patch_at);
  }

  EFFOPS_DEVICE void prepare() const {
    EFFOPS_NO_UNROLL
    for (int c = 0; c < kN; c += kBlockC<T>) copy_taps(a_.layer, block_.first + c, taps(c));
    clear_empty_slots(a_.layer.box, part(first_, a_.at.z), kZPitch, kN);
    clear_empty_slots(a_.layer.box, part(first_ + 1, a_.at.z), kZPitch, kN);
  }

  EFFOPS_DEVICE void copy(int tile) const {
    const Layer<T>& layer = a_.layer;
    const Origin origin = origin_of(layer.box, tile);
    copy_slots<T, kM>(layer, tables(tile), origin, a_.du, a_.read_du, k_, layer.K, part(tile, 0), kDuPitch);
    if (block_.passed) {
      copy_slots<T, kN>(layer, tables(tile), origin, layer.passthrough, layer.read_passthrough, block_.first,
                        layer.passed, part(tile, a_.at.z), kZPitch);
    } else if (layer.box.patch_rows > 0) {
      EFFOPS_NO_UNROLL
      for (int c = 0; c < kN; c += kBlockC<T>) {
        copy_patch(layer, tables(tile).patch_at, block_.first + c, patch(tile, c));
      }
    }
    copy_async_commit();
  }

  EFFOPS_DEVICE void compute_z(int tile) const {
    const Origin origin = origin_of(a_.layer.box, tile);
    EFFOPS_NO_UNROLL
    for (int c = 0; c < kN; c += kBlockC<T>) {
      depthwise_tile(a_.layer, tables(tile), origin, block_.first + c, patch(tile, c), taps(c), part(tile, a_.at.z) + c,
                     kZPitch);
    }
  }

  const MatrixGradient<T>& a_;
  const ColumnBlock& block_;
  const int k_, first_, last_;
};

template <class T, bool TF32>
EFFOPS_KERNEL(kThreads, kBlocks<T>)
dsconv_matrix_gradient_kernel(EFFOPS_PARAMS MatrixGradient<T> a) {
  using C = compute<T>;
  constexpr int kM = kMatrixM<T>, kN = kMatrixN<T>;
  const int c_blocks = ceil_div(a.layer.passed, kN) + ceil_div(a.layer.g.D, kN), k_blocks = ceil_div(a.layer.K, kM);
  const ColumnBlock block = column_block(a.layer, static_cast<int>(blockIdx.x) % c_blocks, kN);
  const int row = static_cast<int>(blockIdx.x) / c_blocks, k = row % k_blocks * kM, part = row / k_blocks;
  const int last = a.tiles - part * a.steps < a.steps ? a.tiles : (part + 1) * a.steps;
  BlockProduct<T, TF32, kM, kN> product;
  MatrixSums<T, TF32>(a, block, k, part * a.steps, last).run(product);
  C* tile = shared_at<C>(a.at.stages);
  product.store(tile, tile_pitch(kN, false));
  barrier();
  const index_t columns = a.layer.passed + a.layer.g.D;
  for (int i = threadIdx.x; i < kM * kN; i += kThreads) {
    const int m = i / kN, c = i % kN;
    if (k + m >= a.layer.K || block.first + c >= block.count) continue;
    a.partial[(static_cast<index_t>(part) * a.layer.K + k + m) * columns + block.offset + block.first + c] =
        tile[m * tile_pitch(kN, false) + c];
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
Box pointwise_box(const Sizes& g, index_t images, const Device& device, int N, std::size_t behind = 0) {
  PointwiseAt at;
  const std::size_t other = carve_pointwise<T>(Box{}, g, N, behind, at) + 2 * (taps_bytes<T>(g, true) + 64);
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

// ---- host: backward ----

inline bool any(const EpilogueGrads& grads) { return grads.bias || grads.scale || grads.shift || grads.residual.data; }

// The launches of one backward call, and the scratch they share.
template <class T>
class Backward {
  using C = compute<T>;

 public:
  Backward(const DsconvBackwardArgs& args, const Device& device)
      : args_(args), forward_(args.forward), g_(sizes_of(args.forward.g)), device_(device) {
    const EpilogueRef& e = forward_.pw_epilogue;
    const bool linear = e.activation == Activation::none && e.post == Activation::none;
    const bool changed = !linear || e.scale.data;  // by the epilogue, on its way to the sums
    const bool depthwise = args.grad_input.data || args.grad_dw_weight || any(args.dw_grads);
    const bool inside = depthwise || args.grad_passthrough.data || args.grad_pw_weight;
    from_output_ = any(args.pw_grads) || (inside && changed);
    recompute_ = args.pw_grads.scale || !(linear || forward_.output.data);
    to_z_ = depthwise || args.grad_passthrough.data;
    through_depthwise_ = depthwise;
    choose_tiles();
    if (inside && changed) du_ = take(map_bytes(forward_.K));
    if (args.grad_input.data || args.grad_dw_weight) sums_grad_ = take(map_bytes(g_.D));
    if (vectors(args.pw_grads)) pw_partial_ = take(partial_bytes<C>(pw_lines_, kAffine, forward_.K));
    if (vectors(args.dw_grads)) dw_partial_ = take(partial_bytes<C>(z_lines_, kAffine, g_.D));
    if (args.grad_pw_weight) matrix_partial_ = take(partial_bytes<C>(parts_, 1, forward_.K * columns()));
    if (args.grad_dw_weight) {
      // The address decides about the tiles, and so about the bytes; any that is aligned as scratch is will do.
      const TensorRef sums_grad = sums_grad_map(reinterpret_cast<void*>(kAlignment));
      weight_scratch_ =
          take(depthwise_weight_gradient_scratch(dtype_of<T>, forward_.g, gradient(sums_grad), forward_.input, device));
    }
  }

  std::size_t scratch_bytes() const { return used_; }

  template <bool TF32>
  void run(void* scratch, Stream stream) const {
    const TensorRef grad = from_channel<T>(args_.grad_output, forward_.keep);
    const TensorRef du = du_ == kNone ? grad : map_at(scratch, du_, forward_.K);
    const bool pixels = pixels_of(forward_.g) > 0;
    if (pixels && from_output_) output_gradient<TF32>(scratch, grad, du_ == kNone ? TensorRef{} : du, stream);
    if (pixels && to_z_) z_gradient<TF32>(scratch, du, stream);
    if (pixels && args_.grad_pw_weight) matrix_gradient<TF32>(scratch, du, stream);
    sum_vectors(scratch, pw_partial_, pw_lines_, forward_.K, args_.pw_grads, stream);
    sum_vectors(scratch, dw_partial_, z_lines_, g_.D, args_.dw_grads, stream);
    if (args_.grad_pw_weight) {
      const SumTarget target{args_.grad_pw_weight, dtype_of<T>};
      sum_lines<C>({at(scratch, matrix_partial_), lines(parts_), 1, narrow(forward_.K * columns()), false, {target}},
                   stream);
    }
    const TensorRef sums_grad = sums_grad_ == kNone ? TensorRef{} : sums_grad_map(at(scratch, sums_grad_));
    if (args_.grad_input.data) {
      depthwise_input_gradient(dtype_of<T>, forward_.g, gradient(sums_grad), forward_.dw_weight, args_.grad_input,
                               device_, stream);
    }
    if (args_.grad_dw_weight) {
      depthwise_weight_gradient(dtype_of<T>, forward_.g, gradient(sums_grad), forward_.input, args_.grad_dw_weight,
                                device_, at(scratch, weight_scratch_), stream);
    }
  }

 private:
  static constexpr std::size_t kNone = ~std::size_t{0}, kAlignment = 256;
  // Columns of the kernels' tiles of sums.
  static constexpr int kOutputMin = sizeof(T) == 8 ? 32 : 64, kOutputMax = sizeof(T) == 2 ? 128 : kOutputMin;
  static constexpr int kZ = sizeof(T) == 8 ? 32 : 64;

  static bool vectors(const EpilogueGrads& grads) { return grads.bias || grads.scale || grads.shift; }
  static Gradient gradient(const TensorRef& map) { return {map, dtype_of<T>}; }
  index_t columns() const { return forward_.passthrough_channels + g_.D; }
  std::size_t map_bytes(index_t channels) const { return pixels_of(forward_.g) * channels * sizeof(T); }
  int lines(index_t count) const { return pixels_of(forward_.g) > 0 ? narrow(count) : 0; }

  std::size_t take(std::size_t bytes) {
    const std::size_t at = used_;
    used_ += ceil_div(bytes, kAlignment) * kAlignment;
    return at;
  }
  static void* at(void* scratch, std::size_t offset) { return static_cast<char*>(scratch) + offset; }

  // A map of the scratch, laid out as the gradient that comes in.
  TensorRef scratch_map(void* data, index_t channels) const {
    const index_t P = g_.P, Q = g_.Q;
    if (args_.grad_output.c == 1) return {data, P * Q * channels, 1, Q * channels, channels};
    return {data, channels * P * Q, P * Q, Q, 1};
  }
  TensorRef map_at(void* scratch, std::size_t offset, index_t channels) const {
    return scratch_map(at(scratch, offset), channels);
  }
  TensorRef sums_grad_map(void* data) const { return scratch_map(data, g_.D); }

  void choose_tiles() {
    const index_t N = forward_.g.N;
    with_width<kOutputMin, kOutputMax>(forward_.K, ceil_div<index_t>(pixels_of(forward_.g), kSlots), device_,
                                       [&](auto width) { output_width_ = width; });
    output_box_ = pointwise_box<T>(g_, N, device_, output_width_, output_lines_bytes(output_width_));
    pw_lines_ = tiles_of(output_box_, N);
    ZGradientAt of_z;
    z_box_ = fitting_box<T>(g_, N, device_, carve_z(Box{}, of_z) + taps_bytes<T>(g_, true) + 64, 1, 1);
    z_lines_ = tiles_of(z_box_, N);
    constexpr int kPatches = 2 * kMatrixN<T> / kBlockC<T>;
    MatrixGradientAt of_matrix;
    const std::size_t taps = kMatrixN<T> / kBlockC<T> * taps_bytes<T>(g_, true);
    matrix_box_ = fitting_box<T>(g_, N, device_, carve_matrix(Box{}, of_matrix) + taps + 64, kPatches, 2);
    // Two blocks a processor; more parts would only be more partial sums to write and read.
    const index_t tiles = tiles_of(matrix_box_, N);
    steps_ = std::max<index_t>(1, tiles * matrix_blocks() / (2 * device_.processors));
    parts_ = ceil_div(tiles, steps_);
  }

  index_t matrix_blocks() const {
    return ceil_div<index_t>(forward_.K, kMatrixM<T>) *
           (ceil_div<index_t>(forward_.passthrough_channels, kMatrixN<T>) + ceil_div(g_.D, kMatrixN<T>));
  }

  static std::size_t output_lines_bytes(int width) {
    return kThreads / (width / kVector<T>)*kAffine * width * sizeof(C);
  }

  static int carve_tail(const Sizes& g, const Box& box, Carver& all, ZGradientAt& at) {
    at.tile = all.take(kSlots * (kZ + 8) * sizeof(C));
    at.u = all.take(kSlots * (kZ + 8) * sizeof(C));
    at.lines = all.take(kSumLines<kVector<T>, kZ> * kAffine * kZ * sizeof(C));
    at.patch = all.take(patch_bytes<T>(box, g));
    at.taps = all.take(taps_bytes<T>(g, box.patch_rows > 0));
    return all.used();
  }

  int carve_z(const Box& box, ZGradientAt& at) const {
    Carver stage;
    stage.take(kSlots * padded_pitch<T>(kDepth<T>) * sizeof(T));
    at.matrix = stage.take(kDepth<T> * padded_pitch<T>(kZ, RowHolds::outer) * sizeof(T));
    at.stage_bytes = stage.used();
    Carver all;
    at.tables = carve_tables(all, box, 1);
    at.stages = all.used();
    return std::max(at.stages + 2 * at.stage_bytes, carve_tail(g_, box, all, at));
  }

  int carve_matrix(const Box& box, MatrixGradientAt& at) const {
    Carver stage;
    stage.take(kSlots * padded_pitch<T>(kMatrixM<T>, RowHolds::outer) * sizeof(T));
    at.z = stage.take(kSlots * padded_pitch<T>(kMatrixN<T>, RowHolds::outer) * sizeof(T));
    at.patch_bytes = static_cast<int>(patch_bytes<T>(box, g_));
    at.patches = stage.take(kMatrixN<T> / kBlockC<T> * at.patch_bytes);
    at.stage_bytes = stage.used();
    Carver all;
    at.tables = carve_tables(all, box, 2);
    at.taps_bytes = static_cast<int>(taps_bytes<T>(g_, box.patch_rows > 0));
    at.taps = all.take(kMatrixN<T> / kBlockC<T> * at.taps_bytes);
    const std::size_t tile = kMatrixM<T> * tile_pitch(kMatrixN<T>, false) * sizeof(C);
    at.stages = all.take(std::max<std::size_t>(2 * at.stage_bytes, tile));
    return all.used();
  }

  Partial<C> partial_at(void* scratch, std::size_t offset, int channels) const {
    return {offset == kNone ? nullptr : static_cast<C*>(at(scratch, offset)), channels};
  }

  template <bool TF32>
  void output_gradient(void* scratch, const TensorRef& grad, const TensorRef& du, Stream stream) const {
    OutputGradient<T> a{};
    a.layer = layer_of<T>(forward_, output_box_);
    const int shared = carve_pointwise<T>(output_box_, g_, output_width_, output_lines_bytes(output_width_), a.at);
    a.lines = a.at.stages + static_cast<int>(kSlots * (output_width_ + 8) * sizeof(C));
    a.epilogue = forward_.pw_epilogue;
    const TensorRef saved = from_channel<T>(forward_.output, forward_.keep);
    const TensorRef residual = a.epilogue.post == Activation::none ? TensorRef{} : a.epilogue.residual;
    a.meeting = meeting_of<T>(forward_.K, {grad, saved, residual, du, args_.pw_grads.residual});
    a.recompute = recompute_;
    a.grad = map_of<const T>(grad);
    a.saved = map_of<const T>(saved);
    a.du = map_of<T>(du);
    a.residual_grad = map_of<T>(args_.pw_grads.residual);
    a.partial = partial_at(scratch, pw_partial_, narrow(forward_.K));
    const Shape shape = grid_of(pw_lines_ * ceil_div<index_t>(forward_.K, output_width_), kThreads, shared);
    if constexpr (kOutputMin < kOutputMax) {
      if (output_width_ == kOutputMax) {
        launch(dsconv_output_gradient_kernel<T, TF32, kOutputMax>, shape, stream, a);
        return;
      }
    }
    launch(dsconv_output_gradient_kernel<T, TF32, kOutputMin>, shape, stream, a);
  }

  template <bool TF32>
  void z_gradient(void* scratch, const TensorRef& du, Stream stream) const {
    ZGradient<T> a{};
    a.layer = layer_of<T>(forward_, z_box_);
    const int shared = carve_z(z_box_, a.at);
    a.du = map_of<const T>(du);
    a.read_du = reading_of<T>(du);
    const int passed_blocks = ceil_div(a.layer.passed, kZ);
    a.first_block = args_.grad_passthrough.data ? 0 : passed_blocks;
    a.blocks = passed_blocks - a.first_block + (through_depthwise_ ? ceil_div(g_.D, kZ) : 0);
    a.passed_grad = map_of<T>(args_.grad_passthrough);
    a.passed_meeting = meeting_of<T>(a.layer.passed, {args_.grad_passthrough});
    a.kept = map_of<const T>(args_.grad_output);
    a.kept_first = narrow(g_.D - forward_.keep);
    a.recompute = needs_sums(forward_.dw_epilogue, args_.dw_grads);
    const TensorRef sums_grad = sums_grad_ == kNone ? TensorRef{} : sums_grad_map(at(scratch, sums_grad_));
    a.sums_grad = map_of<T>(sums_grad);
    a.residual_grad = map_of<T>(args_.dw_grads.residual);
    const TensorRef residual = a.layer.dw.post == Activation::none ? TensorRef{} : a.layer.dw.residual;
    const TensorRef kept = forward_.keep ? args_.grad_output : TensorRef{};
    a.meeting = meeting_of<T>(g_.D, {sums_grad, args_.dw_grads.residual, residual, kept});
    a.meeting.vector = a.meeting.vector && forward_.keep % kVector<T> == 0;
    a.partial = partial_at(scratch, dw_partial_, g_.D);
    launch(dsconv_z_gradient_kernel<T, TF32, kZ>, grid_of(z_lines_ * a.blocks, kThreads, shared), stream, a);
  }

  template <bool TF32>
  void matrix_gradient(void* scratch, const TensorRef& du, Stream stream) const {
    MatrixGradient<T> a{};
    a.layer = layer_of<T>(forward_, matrix_box_);
    const int shared = carve_matrix(matrix_box_, a.at);
    a.du = map_of<const T>(du);
    a.read_du = reading_of<T>(du);
    a.tiles = narrow(tiles_of(matrix_box_, forward_.g.N));
    a.steps = narrow(steps_);
    a.partial = static_cast<C*>(at(scratch, matrix_partial_));
    launch(dsconv_matrix_gradient_kernel<T, TF32>, grid_of(parts_ * matrix_blocks(), kThreads, shared), stream, a);
  }

  void sum_vectors(void* scratch, std::size_t offset, index_t count, index_t channels, const EpilogueGrads& grads,
                   Stream stream) const {
    if (offset == kNone) return;
    sum_lines<C>({at(scratch, offset),
                  lines(count),
                  kAffine,
                  narrow(channels),
                  false,
                  {{grads.bias, grads.bias_dtype}, {grads.scale, grads.scale_dtype}, {grads.shift, grads.shift_dtype}}},
                 stream);
  }

  const DsconvBackwardArgs& args_;
  const DsconvForwardArgs& forward_;
  const Sizes g_;
  const Device device_;
  bool from_output_, recompute_, to_z_, through_depthwise_;
  Box output_box_, z_box_, matrix_box_;
  int output_width_;
  index_t pw_lines_, z_lines_, steps_, parts_;
  std::size_t used_ = 0;
  std::size_t du_ = kNone, sums_grad_ = kNone, pw_partial_ = kNone, dw_partial_ = kNone, matrix_partial_ = kNone,
              weight_scratch_ = kNone;
};

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

void dsconv_fwd(DType dtype, const DsconvForwardArgs& args, const Device& device, Stream stream) {
  with_types(dtype, args.tf32, [&](auto element, auto products) {
    forward<decltype(element), decltype(products)::value>(args, device, stream);
  });
}

std::size_t dsconv_bwd_scratch(DType dtype, const DsconvBackwardArgs& args, const Device& device) {
  return with_types(dtype, false,
                    [&](auto element, auto) { return Backward<decltype(element)>(args, device).scratch_bytes(); });
}

void dsconv_bwd(DType dtype, const DsconvBackwardArgs& args, const Device& device, void* scratch, Stream stream) {
  with_types(dtype, args.forward.tf32, [&](auto element, auto products) {
    Backward<decltype(element)>(args, device).template run<decltype(products)::value>(scratch, stream);
  });
}

}  // namespace effops::cuda
