// What the kernels of room dsconv share: boxes of output pixels, their input patches in shared memory, the depthwise
// convolution of a block of channels from such a patch, and the tile z that the pointwise product reads.
//
//   box: images x rows x columns <= 64 output pixels ("slots")        block of 32 channels (16 of double)
//
//     input patch of the box in shared memory          sums of a thread            z tile (or raw sums)
//     [image][row][column][channels + pad]      -->    4 pixels of a row     -->   [slot][channels + pad]
//     cp.async, zeros outside the map                  x 2 channels                rounded to the maps' type
//
// A thread reads every input element of its four pixels' window once, in pairs of channels: six loads a row of a 3 x 3
// kernel for eight products of each tap. The taps and the depthwise epilogue's vectors lie beside the patch.
#pragma once

#include <algorithm>
#include <cstdint>
#include <initializer_list>

#include "csrc/cuda/gemm.h"
#include "csrc/cuda/kernels.h"
#include "csrc/cuda/window.h"

namespace effops::cuda {

constexpr int kSlots = 64;  // pixels of a box
constexpr int kRun = 4;     // pixels of a row that a thread computes together
constexpr int kAffine = 3;  // vectors of an epilogue: bias, scale, shift

// Channels of a block, and elements from one pixel's to the next's.
template <class T>
constexpr int kBlockC = sizeof(T) == 8 ? 16 : 32;
template <class T>
constexpr int kPitch = padded_pitch<T>(kBlockC<T>);

template <class I>
EFFOPS_HOST_DEVICE constexpr I ceil_div(I a, I b) {
  return (a + b - 1) / b;
}

// ---- boxes ----

// Slot i of a box is pixel i in the order image, row, column; what is left of the 64 slots is empty.
struct Box {
  int images, rows, columns;
  int down, across;               // boxes along P and Q
  int patch_rows, patch_columns;  // input under one image of the box; 0: read from memory as it is needed
  int runs_in_row;

  EFFOPS_HOST_DEVICE int runs() const { return images * rows * runs_in_row; }
  EFFOPS_HOST_DEVICE int patch_pixels() const { return images * patch_rows * patch_columns; }
};

struct Run {
  short slot, count;  // the first slot, and how many
  int pixel;          // of the patch: the first tap of the first slot
};

struct Origin {
  index_t n;
  int p, q;
};

struct Pixel {
  index_t n;
  int p, q;
  bool inside;
};

// Shared memory that says where pixels are, so that no thread divides.
struct Tables {
  int* slots;         // image << 16 | row << 8 | column in the box, or -1
  Run* runs;          // every image's, row's and column's
  index_t* patch_at;  // offset of each pixel of the patch in the input, or -1 outside
};

// ---- operands ----

// How rows of channels are read: in asynchronous copies of `bytes`, or, where that is 0, element by element: channel c
// at c / repeat * step, lanes along the rows or along the channels.
struct Reading {
  index_t step;
  int repeat, bytes;
  bool by_row;
};

// What every kernel knows of the call.
template <class T>
struct Layer {
  Sizes g;
  index_t N;
  Box box;
  int passed, K;
  Map<const T> x, passthrough;
  Reading read_x, read_passthrough, read_matrix;
  const T* dw_weight;
  EpilogueRef dw;
  const T* matrix;
  index_t matrix_k, matrix_c;

  EFFOPS_DEVICE int passed_blocks() const { return ceil_div(passed, kBlockC<T>); }
  EFFOPS_DEVICE int blocks() const { return passed_blocks() + ceil_div(g.D, kBlockC<T>); }
};

EFFOPS_DEVICE Origin origin_of(const Box& box, int tile) {
  const int row = tile / box.across;
  return {static_cast<index_t>(row / box.down) * box.images, row % box.down * box.rows,
          tile % box.across * box.columns};
}

template <class T>
EFFOPS_DEVICE Pixel pixel_of(const Layer<T>& layer, const Tables& tables, const Origin& origin, int slot) {
  const int code = tables.slots[slot];
  Pixel pixel{origin.n + (code >> 16), origin.p + (code >> 8 & 255), origin.q + (code & 255), false};
  pixel.inside = code >= 0 && pixel.n < layer.N && pixel.p < layer.g.P && pixel.q < layer.g.Q;
  return pixel;
}

template <class T>
EFFOPS_DEVICE const T* element_of(const Map<const T>& map, const Pixel& pixel) {
  return pixel.inside ? map.at(pixel.n, 0, pixel.p, pixel.q) : nullptr;
}

EFFOPS_DEVICE void number_slots(const Box& box, const Sizes& g, const Tables& tables) {
  EFFOPS_NO_UNROLL
  for (int i = threadIdx.x; i < kSlots; i += kThreads) {
    const int row = i / box.columns, n = row / box.rows;
    tables.slots[i] = n < box.images ? n << 16 | row % box.rows << 8 | i % box.columns : -1;
  }
  EFFOPS_NO_UNROLL
  for (int i = threadIdx.x; i < box.runs(); i += kThreads) {
    const int row = i / box.runs_in_row, q = i % box.runs_in_row * kRun;
    const int patch_row = row / box.rows * box.patch_rows + row % box.rows * g.stride_h;
    const int left = box.columns - q;
    tables.runs[i] = {static_cast<short>(row * box.columns + q), static_cast<short>(left < kRun ? left : kRun),
                      patch_row * box.patch_columns + q * g.stride_w};
  }
}

// Whether windows of `count` outputs have a tap on row (or column) i of the input under the first one's first tap.
EFFOPS_DEVICE bool has_tap(int i, int count, int taps, int stride, int dilation) {
  if (i > (count - 1) * stride + (taps - 1) * dilation) return false;
  if (dilation == 1 && stride <= taps) return true;
  EFFOPS_NO_UNROLL
  for (int tap = 0; tap < taps; ++tap, i -= dilation) {
    if (i >= 0 && i % stride == 0 && i / stride < count) return true;
  }
  return false;
}

// Of the box at `origin`. Pixels between and beyond the windows count as outside.
template <class T>
EFFOPS_DEVICE void locate_patch(const Layer<T>& layer, const Origin& origin, index_t* patch_at) {
  const Box& box = layer.box;
  const Sizes& g = layer.g;
  const int rows = g.P - origin.p < box.rows ? g.P - origin.p : box.rows;
  const int columns = g.Q - origin.q < box.columns ? g.Q - origin.q : box.columns;
  const int top = origin.p * g.stride_h - g.pad_top, left = origin.q * g.stride_w - g.pad_left;
  EFFOPS_NO_UNROLL
  for (int i = threadIdx.x; i < box.patch_pixels(); i += kThreads) {
    const int line = i / box.patch_columns, row = line % box.patch_rows, column = i % box.patch_columns;
    const int h = top + row, w = left + column;
    const index_t n = origin.n + line / box.patch_rows;
    const bool exists = n < layer.N && inside(h, g.H) && inside(w, g.W) &&
                        has_tap(row, rows, g.R, g.stride_h, g.dilation_h) &&
                        has_tap(column, columns, g.S, g.stride_w, g.dilation_w);
    patch_at[i] = exists ? n * layer.x.n + h * layer.x.h + w * layer.x.w : -1;
  }
}

// ---- copies to shared memory ----

template <class T, int COLUMNS, int BYTES, class RowAt>
EFFOPS_DEVICE void copy_rows_async(T* to, int pitch, int rows, int first, int count, const RowAt& row_at) {
  constexpr int kEach = BYTES / static_cast<int>(sizeof(T)), kPieces = COLUMNS / kEach;
  EFFOPS_NO_UNROLL
  for (int i = threadIdx.x; i < rows * kPieces; i += kThreads) {
    const int row = i / kPieces, column = i % kPieces * kEach;
    const T* from = row_at(row);
    const int left = count - first - column;
    const int live = from == nullptr || left < 0 ? 0 : left < kEach ? left : kEach;
    copy_async<BYTES>(to + row * pitch + column, live > 0 ? from + first + column : nullptr,
                      live * static_cast<int>(sizeof(T)));
  }
}

template <class T, int COLUMNS, class RowAt>
EFFOPS_DEVICE void copy_elements(const Reading& reading, T* to, int pitch, int rows, int first, int count,
                                 const RowAt& row_at) {
  EFFOPS_NO_UNROLL
  for (int i = threadIdx.x; i < rows * COLUMNS; i += kThreads) {
    const int row = reading.by_row ? i % rows : i / COLUMNS;
    const int column = reading.by_row ? i / rows : i % COLUMNS;
    const T* from = first + column < count ? row_at(row) : nullptr;
    const int channel = reading.repeat == 1 ? first + column : (first + column) / reading.repeat;
    to[row * pitch + column] = from == nullptr ? from_compute<T>(0) : load_global_cached(from + channel * reading.step);
  }
}

// Channels first .. first + COLUMNS - 1, of `count`, of `rows` rows; zeros for those that do not exist. row_at(i)
// points to channel 0 of row i, or is null. Belongs to the caller's group of asynchronous copies.
template <class T, int COLUMNS, class RowAt>
EFFOPS_DEVICE void copy_rows(const Reading& reading, T* to, int pitch, int rows, int first, int count,
                             const RowAt& row_at) {
  if (reading.bytes == 16) {
    copy_rows_async<T, COLUMNS, 16>(to, pitch, rows, first, count, row_at);
  } else if (reading.bytes == 8) {
    copy_rows_async<T, COLUMNS, 8>(to, pitch, rows, first, count, row_at);
  } else {
    if constexpr (sizeof(T) <= 4) {
      if (reading.bytes == 4) {
        copy_rows_async<T, COLUMNS, 4>(to, pitch, rows, first, count, row_at);
        return;
      }
    }
    copy_elements<T, COLUMNS>(reading, to, pitch, rows, first, count, row_at);
  }
}

template <class T>
EFFOPS_DEVICE void copy_patch(const Layer<T>& layer, const index_t* patch_at, int first, T* patch) {
  const Box& box = layer.box;
  copy_rows<T, kBlockC<T>>(layer.read_x, patch, kPitch<T>, box.patch_pixels(), first, layer.g.D, [&](int i) {
    const index_t at = patch_at[i];
    return at < 0 ? nullptr : layer.x.data + at;
  });
}

// A map's pixels under the box, slot by slot.
template <class T, int COLUMNS>
EFFOPS_DEVICE void copy_slots(const Layer<T>& layer, const Tables& tables, const Origin& origin,
                              const Map<const T>& map, const Reading& reading, int first, int count, T* to, int pitch) {
  copy_rows<T, COLUMNS>(reading, to, pitch, kSlots, first, count,
                        [&](int slot) { return element_of(map, pixel_of(layer, tables, origin, slot)); });
}

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

// `rows` rows of the pointwise matrix from row k on, COLUMNS columns of it.
template <class T, int COLUMNS>
EFFOPS_DEVICE void copy_matrix(const Layer<T>& layer, int k, int rows, const ColumnBlock& block, T* to, int pitch) {
  const T* origin = layer.matrix + k * layer.matrix_k + block.offset * layer.matrix_c;
  copy_rows<T, COLUMNS>(layer.read_matrix, to, pitch, rows, block.first, block.count,
                        [&](int i) { return k + i < layer.K ? origin + i * layer.matrix_k : nullptr; });
}

// An epilogue's vectors for channels first .. first + width - 1 of `count`, as rows of `width`: bias, scale, shift;
// those that are absent leave values as they are.
template <class T>
EFFOPS_DEVICE void copy_affine(const EpilogueRef& e, int first, int count, int width, compute<T>* to) {
  EFFOPS_NO_UNROLL
  for (int i = threadIdx.x; i < width; i += kThreads) {
    const bool live = first + i < count;
    to[i] = live && e.bias.data != nullptr ? read_channel<T>(e.bias, first + i) : compute<T>(0);
    to[width + i] = live && e.scale.data != nullptr ? read_channel<T>(e.scale, first + i) : compute<T>(1);
    to[2 * width + i] = live && e.shift.data != nullptr ? read_channel<T>(e.shift, first + i) : compute<T>(0);
  }
}

// The same for the depthwise block from channel `first` on, and behind them a row for each tap of the window.
template <class T>
EFFOPS_DEVICE void copy_taps(const Layer<T>& layer, int first, compute<T>* to) {
  constexpr int kChannels = kBlockC<T>;
  copy_affine<T>(layer.dw, first, layer.g.D, kChannels, to);
  if (layer.box.patch_rows == 0) return;
  // A thread stays with its channel, so that it looks for its kernel once.
  const int taps = layer.g.R * layer.g.S, channel = static_cast<int>(threadIdx.x) % kChannels, o = first + channel;
  const T* kernel = o < layer.g.D ? kernel_of(layer.dw_weight, layer.g, taps, o) : nullptr;
  EFFOPS_NO_UNROLL
  for (int t = static_cast<int>(threadIdx.x) / kChannels; t < taps; t += kThreads / kChannels) {
    to[(kAffine + t) * kChannels + channel] =
        kernel != nullptr ? to_compute(load_global_cached(kernel + t)) : compute<T>(0);
  }
}

// ---- depthwise sums ----

// One row of a window S wide, whose pixels lie STRIDE apart.
template <int S, int STRIDE, class T>
EFFOPS_DEVICE void add_row(const T* x, const compute<T>* taps, compute<T> (&sums)[kRun][2]) {
  constexpr int kColumns = (kRun - 1) * STRIDE + S;
  compute<T> v[kColumns][2];
  EFFOPS_UNROLL
  for (int i = 0; i < kColumns; ++i) load_channels<2>(x + i * kPitch<T>, v[i]);
  EFFOPS_UNROLL
  for (int s = 0; s < S; ++s) {
    const Vec<compute<T>, 2> tap = load_vec<compute<T>, 2>(taps + s * kBlockC<T>);
    EFFOPS_UNROLL
    for (int j = 0; j < kRun; ++j) {
      EFFOPS_UNROLL
      for (int e = 0; e < 2; ++e) sums[j][e] += v[j * STRIDE + s][e] * tap.v[e];
    }
  }
}

// One row of any window: a load for each pixel and tap.
template <class T>
EFFOPS_DEVICE void add_any_row(const Sizes& g, const T* x, const compute<T>* taps, compute<T> (&sums)[kRun][2]) {
  EFFOPS_NO_UNROLL
  for (int s = 0; s < g.S; ++s) {
    const Vec<compute<T>, 2> tap = load_vec<compute<T>, 2>(taps + s * kBlockC<T>);
    EFFOPS_UNROLL
    for (int j = 0; j < kRun; ++j) {
      compute<T> v[2];
      load_channels<2>(x + (j * g.stride_w + s * g.dilation_w) * kPitch<T>, v);
      EFFOPS_UNROLL
      for (int e = 0; e < 2; ++e) sums[j][e] += v[e] * tap.v[e];
    }
  }
}

// x: the run's first tap; taps: of its pair of channels.
template <class T>
EFFOPS_DEVICE void patch_sums(const Layer<T>& layer, const T* x, const compute<T>* taps, compute<T> (&sums)[kRun][2]) {
  const Sizes& g = layer.g;
  const int next_row = g.dilation_h * layer.box.patch_columns * kPitch<T>, next_taps = g.S * kBlockC<T>;
  if (g.S == 3 && g.dilation_w == 1 && g.stride_w == 1) {
    EFFOPS_NO_UNROLL
    for (int r = 0; r < g.R; ++r) add_row<3, 1>(x + r * next_row, taps + r * next_taps, sums);
  } else if (g.S == 3 && g.dilation_w == 1 && g.stride_w == 2) {
    EFFOPS_NO_UNROLL
    for (int r = 0; r < g.R; ++r) add_row<3, 2>(x + r * next_row, taps + r * next_taps, sums);
  } else if (g.S == 5 && g.dilation_w == 1 && g.stride_w == 1) {
    EFFOPS_NO_UNROLL
    for (int r = 0; r < g.R; ++r) add_row<5, 1>(x + r * next_row, taps + r * next_taps, sums);
  } else {
    EFFOPS_NO_UNROLL
    for (int r = 0; r < g.R; ++r) add_any_row(g, x + r * next_row, taps + r * next_taps, sums);
  }
}

// The same straight from memory, for windows whose patch does not fit. One at a time: the registers of eight of these
// would cost every call the occupancy.
template <class T>
EFFOPS_DEVICE void gathered_sums(const Layer<T>& layer, const Pixel& pixel, int live, int o,
                                 compute<T> (&sums)[kRun][2]) {
  EFFOPS_NO_UNROLL
  for (int i = 0; i < live * 2; ++i) {
    if (o + i % 2 >= layer.g.D) continue;
    compute<T> sum[1];
    window_sums<1>(layer.x, layer.dw_weight, layer.g, pixel.n, o + i % 2, pixel.p, pixel.q + i / 2, sum);
    EFFOPS_UNROLL
    for (int k = 0; k < kRun * 2; ++k) sums[k / 2][k % 2] = k == i ? sum[0] : sums[k / 2][k % 2];
  }
}

// What a thread has computed: the sums of `run`'s pixels, of which `live` lie inside the map, and channels
// `channel`, `channel` + 1 of the block.
struct RunPlace {
  Run run;
  Pixel pixel;  // the first
  int live, channel;
};

// emit(place, sums) for all runs of the box and the depthwise channels from `first` on.
template <class T, class Emit>
EFFOPS_DEVICE void depthwise_sums(const Layer<T>& layer, const Tables& tables, const Origin& origin, int first,
                                  const T* patch, const compute<T>* taps, const Emit& emit) {
  constexpr int kPairs = kBlockC<T> / 2;
  const Box& box = layer.box;
  EFFOPS_NO_UNROLL
  for (int i = threadIdx.x; i < box.runs() * kPairs; i += kThreads) {
    RunPlace place;
    place.run = tables.runs[i / kPairs];
    place.channel = i % kPairs * 2;
    place.pixel = pixel_of(layer, tables, origin, place.run.slot);
    const int left = place.pixel.inside ? layer.g.Q - place.pixel.q : 0;
    place.live = left < place.run.count ? left : place.run.count;
    compute<T> sums[kRun][2] = {};
    if (box.patch_rows > 0) {
      patch_sums(layer, patch + place.run.pixel * kPitch<T> + place.channel,
                 taps + kAffine * kBlockC<T> + place.channel, sums);
    } else {
      gathered_sums(layer, place.pixel, place.live, first + place.channel, sums);
    }
    emit(place, sums);
  }
}

// ---- epilogues ----

// post(act(v + bias) * scale + shift + residual) of sums v, element i of channel i % WIDTH. affine: the rows of
// copy_affine at the first channel, `next` apart; add_residual(v) adds the residual.
template <int WIDTH, int N, class C, class AddResidual>
EFFOPS_DEVICE void finish_sums(const EpilogueRef& e, const C* affine, int next, C (&v)[N],
                               const AddResidual& add_residual) {
  Vec<C, WIDTH> vectors[kAffine];
  EFFOPS_UNROLL
  for (int i = 0; i < kAffine; ++i) vectors[i] = load_vec<C, WIDTH>(affine + i * next);
  EFFOPS_UNROLL
  for (int i = 0; i < N; ++i) v[i] += vectors[0].v[i % WIDTH];
  activate(e.activation, static_cast<C>(e.slope), v);
  EFFOPS_UNROLL
  for (int i = 0; i < N; ++i) v[i] = v[i] * vectors[1].v[i % WIDTH] + vectors[2].v[i % WIDTH];
  if (e.residual.data != nullptr) add_residual(v);
  activate(e.post, static_cast<C>(e.slope), v);
}

// The depthwise residual of a run's pixels and channels o, o + 1. One element at a time, as in gathered_sums.
template <class T>
EFFOPS_DEVICE void add_depthwise_residual(const Layer<T>& layer, const RunPlace& place, int o,
                                          compute<T> (&v)[kRun * 2]) {
  const TensorRef& residual = layer.dw.residual;
  const T* at = static_cast<const T*>(residual.data) + place.pixel.n * residual.n + o * residual.c +
                place.pixel.p * residual.h + place.pixel.q * residual.w;
  EFFOPS_NO_UNROLL
  for (int i = 0; i < place.live * 2; ++i) {
    if (o + i % 2 >= layer.g.D) continue;
    const compute<T> value = to_compute(load_global_cached(at + i / 2 * residual.w + i % 2 * residual.c));
    EFFOPS_UNROLL
    for (int k = 0; k < kRun * 2; ++k) v[k] += k == i ? value : compute<T>(0);
  }
}

// z of the depthwise channels from `first` on, [slot][pitch]; zeros where pixel or channel does not exist.
template <class T>
EFFOPS_DEVICE void depthwise_tile(const Layer<T>& layer, const Tables& tables, const Origin& origin, int first,
                                  const T* patch, const compute<T>* taps, T* z, int pitch) {
  using C = compute<T>;
  depthwise_sums(layer, tables, origin, first, patch, taps, [&](const RunPlace& place, const C(&sums)[kRun][2]) {
    const int o = first + place.channel;
    C v[kRun * 2];
    EFFOPS_UNROLL
    for (int i = 0; i < kRun * 2; ++i) v[i] = sums[i / 2][i % 2];
    finish_sums<2>(layer.dw, taps + place.channel, kBlockC<T>, v,
                   [&](C(&sum)[kRun* 2]) { add_depthwise_residual(layer, place, o, sum); });
    EFFOPS_UNROLL
    for (int j = 0; j < kRun; ++j) {
      if (j >= place.run.count) continue;
      C rounded[2];
      EFFOPS_UNROLL
      for (int e = 0; e < 2; ++e) rounded[e] = j < place.live && o + e < layer.g.D ? v[j * 2 + e] : C(0);
      store_channels<2>(z + (place.run.slot + j) * pitch + place.channel, rounded);
    }
  });
}

// Slots that no pixel of the box has: zeros, once.
template <class T>
EFFOPS_DEVICE void clear_empty_slots(const Box& box, T* z, int pitch, int columns) {
  const int used = box.images * box.rows * box.columns;
  EFFOPS_NO_UNROLL
  for (int i = used * columns + threadIdx.x; i < kSlots * columns; i += kThreads) {
    z[i / columns * pitch + i % columns] = from_compute<T>(0);
  }
}

// ---- host: choice of the box ----

// Where the parts of a kernel's shared memory lie.
class Carver {
 public:
  int take(std::size_t bytes) {
    const std::size_t at = used_;
    used_ += ceil_div(bytes, std::size_t{16}) * 16;
    return static_cast<int>(at);
  }
  int used() const { return static_cast<int>(used_); }

 private:
  std::size_t used_ = 0;
};

// The widest asynchronous copy of a map's channels, which lie side by side, that is aligned in every pixel, or 0.
template <class T>
int copy_bytes(const void* data, std::initializer_list<index_t> strides) {
  for (const int bytes : {16, 8, 4}) {
    bool aligned = static_cast<std::size_t>(bytes) >= sizeof(T) && reinterpret_cast<std::uintptr_t>(data) % bytes == 0;
    for (const index_t stride : strides) aligned = aligned && stride * static_cast<index_t>(sizeof(T)) % bytes == 0;
    if (aligned) return bytes;
  }
  return 0;
}

template <class T>
Reading reading_of(const TensorRef& map, int repeat = 1) {
  const bool together = map.c == 1 && repeat == 1;
  return {map.c, repeat, together ? copy_bytes<T>(map.data, {map.n, map.h, map.w}) : 0, map.c > map.w};
}

// Elements of a patch's buffer: a row's last run may read (but not use) pixels behind it, and passed channels of all
// slots use the buffer too.
inline int pixels_behind(const Sizes& g) { return (kRun - 1) * g.stride_w; }

template <class T>
std::size_t patch_bytes(const Box& box, const Sizes& g) {
  const int pixels = box.patch_rows > 0 ? box.patch_pixels() + pixels_behind(g) : 0;
  return std::max(kSlots, pixels) * kPitch<T> * sizeof(T);
}

// Bytes of a block's vectors and taps.
template <class T>
std::size_t taps_bytes(const Sizes& g, bool staged) {
  return (kAffine + (staged ? static_cast<std::size_t>(g.R) * g.S : 0)) * kBlockC<T> * sizeof(compute<T>);
}

inline Box box_of(const Sizes& g, index_t N, int rows, int columns) {
  Box box{};
  box.rows = rows;
  box.columns = columns;
  const bool whole = rows == g.P && columns == g.Q;
  box.images = whole ? static_cast<int>(std::clamp<index_t>(N, 1, kSlots / (rows * columns))) : 1;
  box.down = ceil_div(g.P, rows);
  box.across = ceil_div(g.Q, columns);
  box.runs_in_row = ceil_div(columns, kRun);
  return box;
}

inline index_t tiles_of(const Box& box, index_t N) { return ceil_div<index_t>(N, box.images) * box.down * box.across; }

// The box whose slots, and whose patches, are the fewest over all pixels. A patch has at most `max_pixels`.
inline Box choose_box(const Sizes& g, index_t N, int max_pixels) {
  // What a slot costs, in pixels of a patch: a run of instructions for every channel against a copy of 16 bytes.
  constexpr double kSlotCost = 4;
  Box staged{}, unstaged{};
  double least = 0, fewest = 0;
  for (int columns = 1; columns <= std::min(g.Q, kSlots); ++columns) {
    Box box = box_of(g, N, std::min(g.P, kSlots / columns), columns);
    const double tiles = static_cast<double>(tiles_of(box, N));
    if (unstaged.rows == 0 || tiles <= fewest) {
      unstaged = box;
      fewest = tiles;
    }
    const index_t rows = (box.rows - 1) * static_cast<index_t>(g.stride_h) + (g.R - 1) * g.dilation_h + 1;
    const index_t width = (box.columns - 1) * static_cast<index_t>(g.stride_w) + (g.S - 1) * g.dilation_w + 1;
    const double pixels = static_cast<double>(rows) * static_cast<double>(width) * box.images;
    if (pixels + pixels_behind(g) > max_pixels) continue;
    const double cost = tiles * (pixels + kSlotCost * (box.runs() * kRun + kSlots));
    if (staged.rows > 0 && cost > least) continue;
    staged = box;
    staged.patch_rows = static_cast<int>(rows);
    staged.patch_columns = static_cast<int>(width);
    least = cost;
  }
  return staged.rows > 0 ? staged : unstaged;
}

// Shared memory of the tables; `patches`: how many patches are located at a time.
struct TablesAt {
  int slots, runs, patch_at;
};
inline TablesAt carve_tables(Carver& carver, const Box& box, int patches) {
  return {carver.take(kSlots * sizeof(int)), carver.take(kSlots * sizeof(Run)),
          carver.take(static_cast<std::size_t>(patches) * box.patch_pixels() * sizeof(index_t))};
}

// The box of a kernel whose shared memory, apart from `patches` patches and their `tables`, takes `other` bytes.
template <class T>
Box fitting_box(const Sizes& g, index_t N, const Device& device, std::size_t other, int patches, int tables) {
  const std::size_t room = static_cast<std::size_t>(device.shared_bytes);
  const std::size_t pixel_bytes = patches * kPitch<T> * sizeof(T) + tables * sizeof(index_t);
  return choose_box(g, N, other < room ? static_cast<int>((room - other) / pixel_bytes) : 0);
}

}  // namespace effops::cuda
