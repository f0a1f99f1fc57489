// Room dsconv, backward: the gradient of the pointwise matrix. Unverified on a device.
//
//   a block    128 output channels x 64 channels of z (64 x 32 of float, 64 x 16 of double), over a range of boxes of
//              64 pixels (dsconv_tile.h); ranges are as few as give every processor two blocks
//
//        two stages in shared memory, the next box copied by cp.async while one is used
//        +-------------------+--------------------------+
//        | du [64 pixels][M] | patches of x             |     passed channels: z itself, in z's place
//        +---------+---------+------------+-------------+
//                  |                      |  windows and epilogue, as forward
//                  v                      v
//        sums [M][N] += du^T * z [64][N], in registers (gemm.h) -> partial results [range][K][channels], added by sum.h
//
// A block loads du of its pixels and output channels once a range, x under its windows once a box. Bytes a pixel of
// 16-bit maps: 2 (K + C + passed) from memory; du for further blocks of channels of z, x for further 128 output
// channels and the halo from L2; 4 K (passed + C) bytes of partial results a range.
//
// Calculated for float16, channels_last, batch 128, 56 x 56 on an H200 (4.3 TB/s, 132 processors), nothing measured:
//   128 -> 128 channels   512 bytes a pixel: 206 MB, 48 us, and 132 ranges' sums, 9 MB written and read, 4 us; some 50
//                         instructions an element of z (window, epilogue and copies as forward, du, product) issue for
//                         87 us.
//   28 + 28 -> 28         168 bytes a pixel: 67 MB, 16 us; 28 of 128 output channels and of 64 of z are there: some 150
//                         instructions for each of 22 million elements take 110 us.
#include "csrc/cuda/dsconv_gradients.h"
#include "csrc/cuda/sum.h"

namespace effops::cuda {
namespace {

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
    C* to = a.partial + (static_cast<index_t>(part) * a.layer.K + k + m) * columns + block.offset + block.first + c;
    store_vec<C, 1>(to, {tile[m * tile_pitch(kN, false) + c]});
  }
}

// ---- host ----

template <class T>
int carve_matrix(const Sizes& g, const Box& box, MatrixGradientAt& at) {
  using C = compute<T>;
  constexpr int kM = kMatrixM<T>, kN = kMatrixN<T>, kParts = kN / kBlockC<T>;
  Carver stage;
  stage.take(kSlots * padded_pitch<T>(kM, RowHolds::outer) * sizeof(T));
  at.z = stage.take(kSlots * padded_pitch<T>(kN, RowHolds::outer) * sizeof(T));
  at.patch_bytes = static_cast<int>(patch_bytes<T>(box, g));
  at.patches = stage.take(kParts * at.patch_bytes);
  at.stage_bytes = stage.used();
  Carver all;
  at.tables = carve_tables(all, box, 2);
  at.taps_bytes = static_cast<int>(taps_bytes<T>(g, box.patch_rows > 0));
  at.taps = all.take(kParts * at.taps_bytes);
  at.stages = all.take(std::max<std::size_t>(2 * at.stage_bytes, kM * tile_pitch(kN, false) * sizeof(C)));
  return all.used();
}

template <class T>
index_t matrix_blocks(const DsconvForwardArgs& args) {
  constexpr index_t kM = kMatrixM<T>, kN = kMatrixN<T>;
  return ceil_div(args.K, kM) * (ceil_div(args.passthrough_channels, kN) + ceil_div(args.g.out_channels(), kN));
}

template <class T, bool TF32>
void launch_matrix_gradient(const MatrixGradientPlan& plan, const DsconvForwardArgs& args, const TensorRef& du,
                            void* partial, Stream stream) {
  MatrixGradient<T> a{};
  a.layer = layer_of<T>(args, plan.box);
  const int shared = carve_matrix<T>(a.layer.g, plan.box, a.at);
  a.du = map_of<const T>(du);
  a.read_du = reading_of<T>(du);
  a.tiles = narrow(tiles_of(plan.box, args.g.N));
  a.steps = narrow(plan.steps);
  a.partial = static_cast<compute<T>*>(partial);
  const Shape shape = grid_of(plan.parts * matrix_blocks<T>(args), kThreads, shared);
  launch(dsconv_matrix_gradient_kernel<T, TF32>, shape, stream, a);
}

}  // namespace

MatrixGradientPlan plan_matrix_gradient(DType dtype, const DsconvForwardArgs& args, const Device& device) {
  return with_types(dtype, false, [&](auto element, auto) {
    using T = decltype(element);
    constexpr int kParts = kMatrixN<T> / kBlockC<T>;
    const Sizes g = sizes_of(args.g);
    MatrixGradientAt at;
    const std::size_t other = carve_matrix<T>(g, Box{}, at) + kParts * taps_bytes<T>(g, true) + 64;
    MatrixGradientPlan plan{fitting_box<T>(g, args.g.N, device, other, 2 * kParts, 2), 0, 0};
    // Two blocks a processor; more parts would only be more partial sums to write and read.
    const index_t tiles = tiles_of(plan.box, args.g.N);
    plan.steps = std::max<index_t>(1, tiles * matrix_blocks<T>(args) / (2 * device.processors));
    plan.parts = ceil_div(tiles, plan.steps);
    return plan;
  });
}

void dsconv_matrix_gradient(DType dtype, const MatrixGradientPlan& plan, const DsconvForwardArgs& args,
                            const TensorRef& du, void* partial, Stream stream) {
  with_types(dtype, args.tf32, [&](auto element, auto products) {
    launch_matrix_gradient<decltype(element), decltype(products)::value>(plan, args, du, partial, stream);
  });
}

}  // namespace effops::cuda
