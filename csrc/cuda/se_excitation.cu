// Room se: from the sums of the maps' pixels to the gates, and the way back. All values are small and stay in L2; what
// the kernels share is that weights are read once for kImages images and every sum has one fixed order.
//
//   sums [N][lines][C] --add lines--> means --W1--> inner, hidden --W2--> outer, gates
//
//   product               a warp: a row of the weight for 4 images, its lanes along the row, shuffles at the end
//   transposed product    a block: 32 columns of the weight for 4 images; its 8 warps take turns at the rows, their
//                         sums meet in shared memory
//   outer products        a thread: one element of a weight's gradient (the last of a row: of the bias), over the images
//
//   backward: grad_outer = gate' * (lines of grad gates added) --W2^T, act'--> grad_inner --W1^T--> per pixel
//             grad_outer (x) hidden -> grad W2, grad_inner (x) means -> grad W1; without a partner: the biases
//
// Moved for C = 672, between = 168: 226 KB of each float16 weight, N / 4 times, from L2: 15 MB for 128 images, a few us
// on an H200 (calculated; a block an image would read 58 MB and have 128 of them). Unverified on a GPU.
#include "csrc/cuda/dwconv_tile.h"
#include "csrc/cuda/se.h"

namespace effops::cuda {
namespace {

constexpr int kImages = 4, kWarps = kThreads / kWarp, kBlocksAtOnce = 4;
constexpr double kSlope = 0.01;  // of a leaky_relu: torch's default

// The images kImages * block, ...; those beyond the last are the last, and are not written.
EFFOPS_DEVICE int image_of(int block, int k, int images) {
  const int image = block * kImages + k;
  return image < images ? image : images - 1;
}

// ---- adding lines ----

template <class C>
struct AddLines {
  const C* partial;  // [N][lines][channels]
  C* sums;           // [N][channels]
  double divisor;
  const C* raw;  // not null: the sum is the gradient at activation(raw), and the gradient at raw is wanted
  Activation activation;
  int lines, channels;
  index_t total;  // N * channels
};

template <class C>
EFFOPS_DEVICE void gradient_at(Activation activation, const C* raw, C& gradient) {
  if (raw == nullptr) return;
  const C u[1] = {*raw};
  C g[1] = {gradient};
  times_slope(activation, static_cast<C>(kSlope), u, g);
  gradient = g[0];
}

template <class C>
EFFOPS_KERNEL(kThreads, kBlocksAtOnce)
add_lines_kernel(EFFOPS_PARAMS AddLines<C> a) {
  const index_t at = global_thread();
  if (at >= a.total) return;
  const index_t n = quotient(at, a.channels), channel = at - n * a.channels;
  const C* line = a.partial + n * a.lines * a.channels + channel;
  double sum = 0;
  for (int i = 0; i < a.lines; ++i, line += a.channels) sum += *line;
  C result = static_cast<C>(sum / a.divisor);
  gradient_at(a.activation, a.raw == nullptr ? nullptr : a.raw + at, result);
  a.sums[at] = result;
}

// ---- products ----

// raw[n][o] = sum of weight[o][i] x[n][i] over i, + bias[o]; activated = activation(raw).
template <class T>
struct Product {
  const T* weight;
  ChannelRef bias;
  const compute<T>* x;
  compute<T>*raw, *activated;
  Activation activation;
  int images, rows, columns, row_blocks;
};

template <class T>
EFFOPS_KERNEL(kThreads, kBlocksAtOnce)
product_kernel(EFFOPS_PARAMS Product<T> a) {
  using C = compute<T>;
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  const int images = static_cast<int>(blockIdx.x) / a.row_blocks;
  const int o = (static_cast<int>(blockIdx.x) - images * a.row_blocks) * kWarps + warp;
  if (o >= a.rows) return;
  const T* row = a.weight + static_cast<index_t>(o) * a.columns;
  const C* x[kImages];
  C sums[kImages] = {};
  EFFOPS_UNROLL
  for (int k = 0; k < kImages; ++k) x[k] = a.x + static_cast<index_t>(image_of(images, k, a.images)) * a.columns;
  for (int i = lane; i < a.columns; i += kWarp) {
    const C tap = to_compute(load_global_cached(row + i));
    EFFOPS_UNROLL
    for (int k = 0; k < kImages; ++k) sums[k] += tap * x[k][i];
  }
  C own[1] = {};  // lane k has image k
  EFFOPS_UNROLL
  for (int k = 0; k < kImages; ++k) {
    EFFOPS_UNROLL
    for (int mask = kWarp / 2; mask > 0; mask /= 2) sums[k] += shuffle_xor(sums[k], mask);
    own[0] = lane == k ? sums[k] : own[0];
  }
  const int n = images * kImages + lane;
  if (lane >= kImages || n >= a.images) return;
  C bias[1];
  read_channels<T>(a.bias, o, C(0), bias);
  own[0] += bias[0];
  const index_t at = static_cast<index_t>(n) * a.rows + o;
  a.raw[at] = own[0];
  activate(a.activation, static_cast<C>(kSlope), own);
  a.activated[at] = own[0];
}

// y[n][o] = sum of x[n][i] weight[i][o] over i, / divisor, * activation'(raw[n][o]) where there is raw.
template <class T>
struct TransposedProduct {
  const T* weight;
  const compute<T>* x;
  compute<T>* y;
  double divisor;
  const compute<T>* raw;
  Activation activation;
  int images, rows, columns, column_blocks;
};

template <class T>
EFFOPS_KERNEL(kThreads, kBlocksAtOnce)
transposed_product_kernel(EFFOPS_PARAMS TransposedProduct<T> a) {
  using C = compute<T>;
  static_assert(kImages <= kWarps);
  C* shared = shared_memory<C>();  // [warps][images][32]
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  const int images = static_cast<int>(blockIdx.x) / a.column_blocks;
  const int o = (static_cast<int>(blockIdx.x) - images * a.column_blocks) * kWarp + lane;
  C sums[kImages] = {};
  for (int i = warp; o < a.columns && i < a.rows; i += kWarps) {
    const C tap = to_compute(load_global_cached(a.weight + static_cast<index_t>(i) * a.columns + o));
    EFFOPS_UNROLL
    for (int k = 0; k < kImages; ++k) {
      sums[k] += tap * a.x[static_cast<index_t>(image_of(images, k, a.images)) * a.rows + i];
    }
  }
  EFFOPS_UNROLL
  for (int k = 0; k < kImages; ++k) shared[(warp * kImages + k) * kWarp + lane] = sums[k];
  barrier();
  const int n = images * kImages + warp;  // warp k has image k
  if (warp >= kImages || n >= a.images || o >= a.columns) return;
  double sum = 0;
  for (int i = 0; i < kWarps; ++i) sum += shared[(i * kImages + warp) * kWarp + lane];
  const index_t at = static_cast<index_t>(n) * a.columns + o;
  C result = static_cast<C>(sum / a.divisor);
  gradient_at(a.activation, a.raw == nullptr ? nullptr : a.raw + at, result);
  a.y[at] = result;
}

// weight[r][c] = sum of left[n][r] right[n][c] over n; vector[r] = sum of left[n][r].
template <class C>
struct OuterProducts {
  const C *left, *right;
  SumTarget weight, vector;  // data == nullptr: not wanted
  int images, rows, columns;
};

template <class C>
EFFOPS_KERNEL(kThreads, kBlocksAtOnce)
outer_products_kernel(EFFOPS_PARAMS OuterProducts<C> a) {
  const index_t element = global_thread(), row = quotient(element, a.columns + 1);
  const index_t column = element - row * (a.columns + 1);
  if (row >= a.rows) return;
  const bool of_vector = column == a.columns;
  if ((of_vector ? a.vector : a.weight).data == nullptr) return;
  double sum = 0;
  for (int n = 0; n < a.images; ++n) {
    const double factor = a.left[static_cast<index_t>(n) * a.rows + row];
    sum += of_vector ? factor : factor * a.right[static_cast<index_t>(n) * a.columns + column];
  }
  if (of_vector) {
    store_as(a.vector, row, sum);
  } else {
    store_as(a.weight, row * a.columns + column, sum);
  }
}

// ---- host ----

// The products of one call, by the names of their values.
template <class T>
class Products {
  using C = compute<T>;

 public:
  Products(const GatedMaps& maps, const ExcitationRef& ref, const ExcitationValues& values, Stream stream)
      : ref_(ref),
        images_(narrow(maps.N)),
        channels_(narrow(maps.C)),
        between_(narrow(ref.between)),
        means_(static_cast<C*>(values.means)),
        inner_(static_cast<C*>(values.inner)),
        hidden_(static_cast<C*>(values.hidden)),
        outer_(static_cast<C*>(values.outer)),
        gates_(static_cast<C*>(values.gates)),
        pixels_(static_cast<double>(maps.pixels())),
        stream_(stream) {
    narrow(ceil_div(maps.N, kImages) * ceil_div(std::max(maps.C, ref.between), kWarps));  // blocks
  }

  void forward(const ImageSums& sums) const {
    add(sums, means_, pixels_, nullptr, Activation::none);
    multiply(ref_.reduce_weight, ref_.reduce_bias, means_, inner_, hidden_, ref_.activation, between_, channels_);
    multiply(ref_.expand_weight, ref_.expand_bias, hidden_, outer_, gates_, ref_.gate, channels_, between_);
  }

  // grad_outer, grad_inner: scratch.
  void backward(const ExcitationGradientArgs& args, C* grad_outer, C* grad_inner) const {
    const ExcitationGrads& grads = args.grads;
    add(args.grad_gates, grad_outer, 1, outer_, ref_.gate);
    if (args.per_pixel || grads.reduce_weight || grads.reduce_bias) {
      multiply_transposed(ref_.expand_weight, grad_outer, grad_inner, 1, inner_, channels_, between_);
    }
    if (args.per_pixel) {
      multiply_transposed(ref_.reduce_weight, grad_inner, static_cast<C*>(args.per_pixel), pixels_, nullptr, between_,
                          channels_);
    }
    outer_products(grad_outer, hidden_, grads.expand_weight, {grads.expand_bias, grads.expand_bias_dtype}, channels_,
                   between_);
    outer_products(grad_inner, means_, grads.reduce_weight, {grads.reduce_bias, grads.reduce_bias_dtype}, between_,
                   channels_);
  }

 private:
  void add(const ImageSums& sums, C* to, double divisor, const C* raw, Activation activation) const {
    const AddLines<C> params{
        static_cast<const C*>(sums.data),         to, divisor, raw, activation, sums.lines, channels_,
        static_cast<index_t>(images_) * channels_};
    if (params.total > 0) launch(add_lines_kernel<C>, blocks_for(params.total), stream_, params);
  }
  void multiply(const void* weight, const ChannelRef& bias, const C* x, C* raw, C* activated, Activation activation,
                int rows, int columns) const {
    if (images_ == 0) return;
    const index_t row_blocks = ceil_div(rows, kWarps);
    const Product<T> params{
        static_cast<const T*>(weight), bias, x, raw, activated, activation, images_, rows, columns, narrow(row_blocks)};
    launch(product_kernel<T>, grid_of(row_blocks * ceil_div(images_, kImages), kThreads, 0), stream_, params);
  }
  // `raw`: null, or inner.
  void multiply_transposed(const void* weight, const C* x, C* y, double divisor, const C* raw, int rows,
                           int columns) const {
    if (images_ == 0) return;
    const index_t column_blocks = ceil_div(columns, kWarp);
    const TransposedProduct<T> params{
        static_cast<const T*>(weight), x, y, divisor, raw, ref_.activation, images_, rows, columns,
        narrow(column_blocks)};
    launch(transposed_product_kernel<T>,
           grid_of(column_blocks * ceil_div(images_, kImages), kThreads, kThreads * kImages * sizeof(C)), stream_,
           params);
  }
  void outer_products(const C* left, const C* right, void* weight, const SumTarget& vector, int rows,
                      int columns) const {
    if (weight == nullptr && vector.data == nullptr) return;
    const OuterProducts<C> params{left, right, {weight, dtype_of<T>}, vector, images_, rows, columns};
    const index_t elements = static_cast<index_t>(rows) * (static_cast<index_t>(columns) + 1);
    launch(outer_products_kernel<C>, blocks_for(elements), stream_, params);
  }

  const ExcitationRef& ref_;
  int images_, channels_, between_;
  C *means_, *inner_, *hidden_, *outer_, *gates_;
  double pixels_;
  Stream stream_;
};

std::size_t value_bytes(DType dtype, index_t images, index_t count) {
  return static_cast<std::size_t>(images * count) * (dtype == DType::f64 ? sizeof(double) : sizeof(float));
}

}  // namespace

ExcitationValues excitation_values(DType dtype, const GatedMaps& maps, const ExcitationRef& excitation,
                                   Scratch& scratch) {
  const auto of_channels = [&] { return scratch.take(value_bytes(dtype, maps.N, maps.C)); };
  const auto between = [&] { return scratch.take(value_bytes(dtype, maps.N, excitation.between)); };
  return {of_channels(), between(), between(), of_channels(), of_channels()};
}

void excitation(DType dtype, const GatedMaps& maps, const ImageSums& sums, const ExcitationRef& excitation,
                const ExcitationValues& values, Stream stream) {
  with_type(dtype, [&](auto element) { Products<decltype(element)>(maps, excitation, values, stream).forward(sums); });
}

void excitation_gradient(DType dtype, const ExcitationGradientArgs& args, Run& run) {
  void* const grad_outer = run.scratch.take(value_bytes(dtype, args.maps.N, args.maps.C));
  void* const grad_inner = run.scratch.take(value_bytes(dtype, args.maps.N, args.excitation.between));
  if (!run.launching) return;
  with_type(dtype, [&](auto element) {
    using C = compute<decltype(element)>;
    Products<decltype(element)>(args.maps, args.excitation, args.values, run.stream)
        .backward(args, static_cast<C*>(grad_outer), static_cast<C*>(grad_inner));
  });
}

}  // namespace effops::cuda
