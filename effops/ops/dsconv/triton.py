"""Triton kernels of room dsconv. None has run on a GPU yet: what is said of speed here is calculated.

forward      one program: BLOCK_M pixels, pixels numbered through the batch, x BLOCK_K output channels (all, up to 256)

                    C channels, BLOCK_C at a time             K channels
                    passed |  depthwise                     +------------+
                   +-------+----+----+----+      matrix^T   | block of C |   L2 -> registers -> shared, every block
             pixels| z     | z  | z  | z  |   x             +------------+
                   +-------+----+----+----+                 | ...        |
                     load    x: 9 shifted tiles, a row of   +------------+
                     only    taps in flight at a time, sums in registers, epilogue, rounded -> shared
                             tl.dot: BLOCK_M x BLOCK_K float32 sums in registers (tensor memory on sm_100), then
                             the epilogue and one store; z's last channels are stored beside it where they are kept

             x and passed: once from memory, y: once. The window's other eight loads hit L1 (a channel block of the
             patch and its halo: 100 pixels x 64 bytes = 6 KB); patches of 8 x 8 pixels (column strips, see
             strip_pixels_of) read 1.56 times their size from L2, rows of 64 pixels on a 56-wide map 2.8 times.
             Blocks of output channels of the same pixels run side by side; each computes z anew.

pooled       the same for a squeeze-excite behind it: tiles of one image each, whose sums stand beside the output
output       the same tiles; the gradient at the pointwise sums instead of the epilogue: g once (and the saved output,
gradient     or x to compute the sums anew), du once. No kernel where the epilogue is linear without scale: du is g.
z's          BLOCK_M pixels x BLOCK_C channels; sums over k of du * matrix, K blocks prefetched to shared memory by
gradient     cp.async; the depthwise epilogue backwards with its sums anew: du, x once, the result once. du comes from
             L2 for every further block of channels. Passed channels end there: no epilogue.
matrix's     BLOCK_K x BLOCK_C sums of du^T z over a range of pixels, z anew; partial sums, added up in order: ranges
gradient     are as few as give every processor two programs, 8.7 MB of sums at 128 -> 128 channels.
input's and  those of room dwconv, on the gradient at the depthwise sums.
taps'
pointwise    triton_pointwise.py: the same kernels where all channels pass, for other rooms.

Calculated for fp16, channels_last, batch 128, 56 x 56 on an H200 (4.3 TB/s, 790 TFLOP/s):
             128 -> 128 channels    x 103 MB + y 103 MB = 512 bytes a pixel: 48 us; the dot 17 us. The nine loads take
             9 x 103 MB from L1, the matrix and z pass it too, 1.8 GB in all: 62 us at 128 bytes a clock and processor;
             68 instructions an element of z, counted in the sm_90 code: 118 us at four a clock and processor. So
             instructions bound it until they are fewer; two perfect kernels would take 96 us.
             half-identity, 28 + 28 -> 28 channels    x, passed and y 22 MB each = 168 bytes a pixel: 16 us; the dot
             2 us; 116 instructions an element of z, in 8-byte accesses: 44 us. Two perfect kernels: 47 us.

Matrices and taps are small: L1 and L2 hold them. What hides memory's latency is other programs on the processor, not a
pipeline: its buffers for nine shifted tiles would fill shared memory, and cp.async of 16 bytes bypasses L1, so that the
nine would come from L2. The bound on registers (see triton_configs) is there to have those programs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from effops.ops import geometry as G
from effops.ops import triton_launch as L
from effops.ops.dsconv.triton_configs import backward_config, matrix_config, pointwise_config
from effops.ops.dsconv.triton_configs import configs as configs  # the ahead-of-time check looks for it here
from effops.ops.dwconv.triton import input_gradient, weight_gradient
from effops.ops.epilogue import NONE
from effops.ops.registration import fake_output
from effops.ops.triton_device import (
    Affine,
    Chain,
    Sizes,
    Window,
    accumulator,
    block_of,
    channels_of,
    depthwise_tile,
    epilogue,
    epilogue_gradient,
    load_tile,
    slope_from_output,
    store_tile,
    store_vector,
    strip_pixels_of,
)
from effops.ops.triton_sum import partials, sum_partials

# Taps whose loads are in flight together: a row of most windows. The dot's sums leave no registers for nine.
TAPS_IN_FLIGHT = tl.constexpr(7)


class Matrix(NamedTuple):
    """The pointwise weight [K, C]: pointer, strides in elements, K, and how many of its C channels pass through."""

    data: Any
    k: int
    c: int
    K: int
    PASSED: int


class Kept(NamedTuple):
    """Where the last channels of z, from channel `first` on, go to or their gradient comes from; a Map with `first`."""

    data: Any
    n: int
    c: int
    h: int
    w: int
    first: int


class Vectors(NamedTuple):
    """Channels an access may take (constexpr): of z's maps, the output's maps, the kept channels and the matrix."""

    C: int
    K: int
    KEPT: int
    MATRIX: int


# ---- tiles ----------------------------------------------------------------------------------------------------------


@triton.jit
def own_tile(
    COUNT, sizes,
    STRIP: tl.constexpr, WIDE: tl.constexpr, VEC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """This program's pixels and its channels, of COUNT; blocks of channels of the same pixels are neighbours.

    Returns:
        Numbers of the blocks of pixels and of channels; n, p, q and which exist; channels and which exist.
    """
    blocks = tl.cdiv(COUNT, BLOCK_C)
    row = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    m = block_of(row, BLOCK_M, WIDE)
    n, p, q = strip_pixels_of(m, sizes, STRIP)
    c, live = channels_of(block, COUNT, BLOCK_C, WIDE, VEC)
    return row, block, n, p, q, m < sizes.M, c, live


@triton.jit
def matrix_tile(pw, k, c, FIRST, COUNT, VEC: tl.constexpr):
    """matrix[k, FIRST + c] as [k, c]; 0 where k or c (of COUNT) does not exist."""
    row = tl.multiple_of(k * pw.k, VEC)
    column = (FIRST // VEC * VEC + c) * pw.c
    mask = (k < pw.K)[:, None] & (c < COUNT // VEC * VEC)[None, :]
    return tl.load(pw.data + (row[:, None] + column[None, :]), mask=mask, other=0.0)


@triton.jit
def _kept_pointers(kept, n, p, q, c, VEC: tl.constexpr):
    """Pointers to the kept channels' elements for channels c of z, and which c are kept."""
    pixels = tl.multiple_of(n * kept.n + p * kept.h + q * kept.w, VEC)
    first = kept.first // VEC * VEC
    return kept.data + (pixels[:, None] + ((c - first) * kept.c)[None, :]), c >= first


@triton.jit
def _depthwise_result(
    x, bank, affine, residual, n, p, q, inside, o, live, sizes,
    WINDOW: tl.constexpr, CHAIN: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """The depthwise convolution and its epilogue, [pixels, channels], rounded to the maps' dtype."""
    u = depthwise_tile(x, bank, n, p, q, inside, o, live, sizes, WINDOW, VEC, TAPS_IN_FLIGHT)
    added = None
    if residual.data is not None:
        added = load_tile(residual, n, p, q, o, inside[:, None] & live[None, :], VEC)
    return epilogue(u, affine, added, o, live, CHAIN).to(x.data.dtype.element_ty)


@triton.jit
def _gated(z, gates, n, inside, c, live, CHANNELS, VEC: tl.constexpr):
    """z[pixel, c] * gates[n, c], rounded to z's dtype."""
    row = tl.multiple_of(n * (CHANNELS // VEC * VEC), VEC)
    gate = tl.load(gates + (row[:, None] + c[None, :]), mask=inside[:, None] & live[None, :], other=0.0)
    acc: tl.constexpr = accumulator(z.dtype)
    return (z.to(acc) * gate.to(acc)).to(z.dtype)


@triton.jit
def _pointwise_sums(
    x, bank, dw_affine, dw_residual, passed, gates, pw, kept, keeping, n, p, q, inside, k, sizes,
    WINDOW: tl.constexpr, CHAIN: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr, VEC: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """sum over c of z[pixel, c] * matrix[k, c], z computed a block of channels at a time.

    Pixels in the mask `keeping` store their kept channels. Passed channels are multiplied by `gates` [N, channels],
    contiguous, where there are some. Without a WINDOW there are only passed channels.
    """
    acc = tl.zeros((n.shape[0], k.shape[0]), accumulator(pw.data.dtype.element_ty))
    if passed.data is not None:
        for block in range(tl.cdiv(pw.PASSED, BLOCK_C)):
            c, live = channels_of(block, pw.PASSED, BLOCK_C, WIDE, VEC.C)
            z = load_tile(passed, n, p, q, c, inside[:, None] & live[None, :], VEC.C)
            if gates is not None:
                z = _gated(z, gates, n, inside, c, live, pw.PASSED, VEC.C)
            if kept is not None:
                pointers, is_kept = _kept_pointers(kept, n, p, q, c, VEC.KEPT)
                tl.store(pointers, z, mask=keeping[:, None] & (live & is_kept)[None, :])
            w = tl.trans(matrix_tile(pw, k, c, 0, pw.PASSED, VEC.MATRIX))
            acc = tl.dot(z, w, acc, input_precision=PRECISION, out_dtype=acc.dtype)
    if WINDOW is not None:
        for block in range(tl.cdiv(sizes.D, BLOCK_C)):
            c, live = channels_of(block, sizes.D, BLOCK_C, WIDE, VEC.C)
            z = _depthwise_result(
                x, bank, dw_affine, dw_residual, n, p, q, inside, c, live, sizes, WINDOW, CHAIN, VEC.C
            )  # fmt: skip
            if kept is not None:
                pointers, is_kept = _kept_pointers(kept, n, p, q, pw.PASSED + c, VEC.KEPT)
                tl.store(pointers, z, mask=keeping[:, None] & (live & is_kept)[None, :])
            w = tl.trans(matrix_tile(pw, k, c, pw.PASSED, sizes.D, VEC.MATRIX))
            acc = tl.dot(z, w, acc, input_precision=PRECISION, out_dtype=acc.dtype)
    return acc


# ---- forward --------------------------------------------------------------------------------------------------------


@triton.jit
def _forward_kernel(
    x, bank, dw_affine, dw_residual, passed, pw, affine, residual, y, kept, gates, sizes,
    WINDOW: tl.constexpr, DW_CHAIN: tl.constexpr, CHAIN: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
    STRIP: tl.constexpr, VEC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    _, k_block, n, p, q, inside, k, live = own_tile(pw.K, sizes, STRIP, WIDE, VEC.K, BLOCK_M, BLOCK_K)
    keeping = tl.where(k_block == 0, inside, False)  # `inside & (k_block == 0)` is no mask to 3.9's interpreter
    acc = _pointwise_sums(
        x, bank, dw_affine, dw_residual, passed, gates, pw, kept, keeping, n, p, q, inside, k, sizes,
        WINDOW, DW_CHAIN, PRECISION, WIDE, VEC, BLOCK_C,
    )  # fmt: skip
    mask = inside[:, None] & live[None, :]
    added = None
    if residual.data is not None:
        added = load_tile(residual, n, p, q, k, mask, VEC.K)
    store_tile(y, n, p, q, k, epilogue(acc, affine, added, k, live, CHAIN), mask, VEC.K)


@triton.jit
def _pooled_kernel(
    x, bank, dw_affine, dw_residual, passed, pw, affine, residual, y, kept, pooled, sizes,
    WINDOW: tl.constexpr, DW_CHAIN: tl.constexpr, CHAIN: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
    STRIP: tl.constexpr, VEC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The same with pixels of one image to a tile, whose sums, of what is stored, go to pooled[its tile, n, k]."""
    k_blocks = tl.cdiv(pw.K, BLOCK_K)
    k_block = tl.program_id(0) % k_blocks
    an_image = tl.cdiv(sizes.P * sizes.Q, BLOCK_M)
    tile = tl.program_id(0) // k_blocks % an_image
    image = tl.program_id(0) // k_blocks // an_image
    i = block_of(tile, BLOCK_M, WIDE)
    inside = i < sizes.P * sizes.Q
    n, p, q = strip_pixels_of(image.to(i.dtype) * (sizes.P * sizes.Q) + i, sizes, STRIP)
    k, live = channels_of(k_block, pw.K, BLOCK_K, WIDE, VEC.K)
    keeping = tl.where(k_block == 0, inside, False)
    acc = _pointwise_sums(
        x, bank, dw_affine, dw_residual, passed, None, pw, kept, keeping, n, p, q, inside, k, sizes,
        WINDOW, DW_CHAIN, PRECISION, WIDE, VEC, BLOCK_C,
    )  # fmt: skip
    mask = inside[:, None] & live[None, :]
    added = None
    if residual.data is not None:
        added = load_tile(residual, n, p, q, k, mask, VEC.K)
    result = epilogue(acc, affine, added, k, live, CHAIN).to(y.data.dtype.element_ty)
    store_tile(y, n, p, q, k, result, mask, VEC.K)
    sums = tl.sum(tl.where(inside[:, None], result.to(acc.dtype), 0.0), 0)  # those of no channel are not stored
    images = sizes.M // (sizes.P * sizes.Q)
    store_vector(pooled, tile, images * pw.K, image * pw.K + k, live, sums)


# ---- backward -------------------------------------------------------------------------------------------------------


@triton.jit
def _store_sums(partial, row, COUNT, c, live, du, product, shifted):
    """Sums over the tile's pixels to the row of `partial`, an `Affine`: the gradients of bias, scale and shift."""
    store_vector(partial.bias, row, COUNT, c, live, tl.sum(du, 0))
    store_vector(partial.scale, row, COUNT, c, live, tl.sum(product, 0))
    store_vector(partial.shift, row, COUNT, c, live, tl.sum(shifted, 0))


@triton.jit
def end_output_gradient(
    u, affine, residual, grad, output, du, residual_grad, partial, row, n, p, q, inside, k, live, COUNT,
    CHAIN: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """The epilogue of a tile of pointwise sums u backwards: its stores, and its sums to the row of `partial`.

    u: None where nothing depends on it. k, live: output channels, of COUNT, and which exist.
    """
    mask = inside[:, None] & live[None, :]
    added = None
    if residual.data is not None:
        added = load_tile(residual, n, p, q, k, mask, VEC.K)
    g = load_tile(grad, n, p, q, k, mask, VEC.K).to(accumulator(grad.data.dtype.element_ty))
    if output.data is not None:
        y = load_tile(output, n, p, q, k, mask, VEC.K).to(g.dtype)
        g *= slope_from_output(y, CHAIN.ACT, CHAIN.SLOPE)
        store_vector(partial.bias, row, COUNT, k, live, tl.sum(g, 0))
    else:
        g, g_residual, product = epilogue_gradient(g, u, affine, added, k, live, CHAIN)
        _store_sums(partial, row, COUNT, k, live, g, product, g_residual)
        if residual_grad.data is not None:
            store_tile(residual_grad, n, p, q, k, g_residual, mask, VEC.K)
    if du.data is not None:
        store_tile(du, n, p, q, k, g, mask, VEC.K)


@triton.jit
def _output_gradient_kernel(
    x, bank, dw_affine, dw_residual, passed, pw, affine, residual, grad, output, du, residual_grad, partial, sizes,
    WINDOW: tl.constexpr, DW_CHAIN: tl.constexpr, CHAIN: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
    STRIP: tl.constexpr, VEC: tl.constexpr, RECOMPUTE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    row, _, n, p, q, inside, k, live = own_tile(pw.K, sizes, STRIP, WIDE, VEC.K, BLOCK_M, BLOCK_K)
    u = None
    if RECOMPUTE:
        u = _pointwise_sums(
            x, bank, dw_affine, dw_residual, passed, None, pw, None, inside, n, p, q, inside, k, sizes,
            WINDOW, DW_CHAIN, PRECISION, WIDE, VEC, BLOCK_C,
        )  # fmt: skip
    end_output_gradient(
        u, affine, residual, grad, output, du, residual_grad, partial, row, n, p, q, inside, k, live, pw.K, CHAIN, VEC
    )  # fmt: skip


@triton.jit
def _z_gradient(
    du, pw, kept, n, p, q, inside, c, live, first, count,
    PRECISION: tl.constexpr, WIDE: tl.constexpr, VEC: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The gradient of z[pixel, first + c]: sum over k of du[pixel, k] * matrix[k, first + c], and of its kept copy."""
    acc = tl.zeros((n.shape[0], c.shape[0]), accumulator(du.data.dtype.element_ty))
    for block in range(tl.cdiv(pw.K, BLOCK_K)):
        k, live_k = channels_of(block, pw.K, BLOCK_K, WIDE, VEC.K)
        g = load_tile(du, n, p, q, k, inside[:, None] & live_k[None, :], VEC.K)
        w = matrix_tile(pw, k, c, first, count, VEC.MATRIX)
        acc = tl.dot(g, w, acc, input_precision=PRECISION, out_dtype=acc.dtype)
    if kept is not None:
        pointers, is_kept = _kept_pointers(kept, n, p, q, first + c, VEC.KEPT)
        acc += tl.load(pointers, mask=inside[:, None] & (live & is_kept)[None, :], other=0.0).to(acc.dtype)
    return acc


@triton.jit
def _passed_gradient_kernel(
    du, pw, kept, passed_grad, sizes,
    PRECISION: tl.constexpr, WIDE: tl.constexpr, STRIP: tl.constexpr, VEC: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    _, _, n, p, q, inside, c, live = own_tile(pw.PASSED, sizes, STRIP, WIDE, VEC.C, BLOCK_M, BLOCK_C)
    g = _z_gradient(du, pw, kept, n, p, q, inside, c, live, 0, pw.PASSED, PRECISION, WIDE, VEC, BLOCK_K)
    store_tile(passed_grad, n, p, q, c, g, inside[:, None] & live[None, :], VEC.C)


@triton.jit
def _depthwise_gradient_kernel(
    x, bank, dw_affine, dw_residual, du, pw, kept, sums_grad, residual_grad, partial, sizes,
    WINDOW: tl.constexpr, DW_CHAIN: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
    STRIP: tl.constexpr, VEC: tl.constexpr, RECOMPUTE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    row, _, n, p, q, inside, o, live = own_tile(sizes.D, sizes, STRIP, WIDE, VEC.C, BLOCK_M, BLOCK_C)
    mask = inside[:, None] & live[None, :]
    g = _z_gradient(du, pw, kept, n, p, q, inside, o, live, pw.PASSED, sizes.D, PRECISION, WIDE, VEC, BLOCK_K)
    u = None
    if RECOMPUTE:
        u = depthwise_tile(x, bank, n, p, q, inside, o, live, sizes, WINDOW, VEC.C, TAPS_IN_FLIGHT)
    added = None
    if dw_residual.data is not None:
        added = load_tile(dw_residual, n, p, q, o, mask, VEC.C)
    g, g_residual, product = epilogue_gradient(g, u, dw_affine, added, o, live, DW_CHAIN)
    _store_sums(partial, row, sizes.D, o, live, g, product, g_residual)
    if residual_grad.data is not None:
        store_tile(residual_grad, n, p, q, o, g_residual, mask, VEC.C)
    if sums_grad.data is not None:
        store_tile(sums_grad, n, p, q, o, g, mask, VEC.C)


@triton.jit
def _matrix_gradient_kernel(
    x, bank, dw_affine, dw_residual, passed, pw, du, partial, sizes, steps,
    WINDOW: tl.constexpr, DW_CHAIN: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
    STRIP: tl.constexpr, VEC: tl.constexpr, OF_PASSED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    if OF_PASSED:
        first = 0
        count = pw.PASSED
    else:
        first = pw.PASSED
        count = sizes.D
    k_blocks = tl.cdiv(pw.K, BLOCK_K)
    c_blocks = tl.cdiv(count, BLOCK_C)
    part = tl.program_id(0) // (k_blocks * c_blocks)
    k, live_k = channels_of(tl.program_id(0) % k_blocks, pw.K, BLOCK_K, WIDE, VEC.K)
    c, live = channels_of(tl.program_id(0) // k_blocks % c_blocks, count, BLOCK_C, WIDE, VEC.C)
    acc = tl.zeros((BLOCK_K, BLOCK_C), accumulator(pw.data.dtype.element_ty))
    for step in range(steps):
        m = block_of(part * steps + step, BLOCK_M, WIDE)
        inside = m < sizes.M
        n, p, q = strip_pixels_of(m, sizes, STRIP)
        if OF_PASSED:
            z = load_tile(passed, n, p, q, c, inside[:, None] & live[None, :], VEC.C)
        else:
            z = _depthwise_result(
                x, bank, dw_affine, dw_residual, n, p, q, inside, c, live, sizes, WINDOW, DW_CHAIN, VEC.C
            )  # fmt: skip
        g = load_tile(du, n, p, q, k, inside[:, None] & live_k[None, :], VEC.K)  # 0 for pixels that do not exist
        acc = tl.dot(tl.trans(g), z, acc, input_precision=PRECISION, out_dtype=acc.dtype)
    columns = pw.PASSED + sizes.D
    row = (part.to(tl.int64) * pw.K + k) * columns
    tl.store(partial + (row[:, None] + (first + c)[None, :]), acc, mask=live_k[:, None] & live[None, :])


# ---- host -----------------------------------------------------------------------------------------------------------


class Layer(NamedTuple):
    """The operator's arguments, and what follows from them.

    A pointwise convolution alone is one without a window, whose input all passes through.
    """

    input: Tensor
    passthrough: Tensor | None
    bank: Tensor | None
    dw_affine: Affine
    dw_residual: Tensor | None
    pw_weight: Tensor
    affine: Affine
    residual: Tensor | None
    geometry: list[int]
    slopes: list[float]
    sizes: Sizes
    window: Window | None

    @property
    def passed(self) -> int:
        """Channels of z that pass through."""
        return 0 if self.passthrough is None else self.passthrough.shape[1]

    @property
    def deepest(self) -> int:
        """Channels of z's larger part: what a kernel's blocks of channels need not exceed."""
        return max(self.sizes.D, self.passed)

    @property
    def keep(self) -> int:
        """Channels of z that the output begins with."""
        return self.geometry[G.KEEP]

    @property
    def K(self) -> int:
        """Channels of the pointwise convolution's result."""
        return self.pw_weight.shape[0]

    def map_of(self, channels: int) -> Tensor:
        """An empty map of so many channels and the output's size, laid out as the output is."""
        shape = (self.input.shape[0], channels, self.sizes.P, self.sizes.Q)
        return fake_output(self.input, shape, self.geometry)


def layer_of(tensors: Sequence[Tensor | None], geometry: list[int], slopes: list[float]) -> Layer:
    """From the operator's 12 tensors."""
    input, passthrough, dw_weight, *dw_vectors, dw_residual, pw_weight, bias, scale, shift, residual = tensors
    sizes = L.sizes_of(input, dw_weight, geometry)
    vec = L.vector_width((input, dw_residual), (input.shape[1], sizes.D))
    dtype = torch.promote_types(input.dtype, torch.float32)  # the accumulators'
    bank, window = L.bank_of(dw_weight, L.window_of(dw_weight, geometry), sizes, vec, dtype)
    return Layer(
        input, passthrough, bank, L.affine(*dw_vectors), dw_residual, pw_weight, L.affine(bias, scale, shift),
        residual, geometry, slopes, sizes, window,
    )  # fmt: skip


def matrix_of(layer: Layer) -> Matrix:
    k, c = layer.pw_weight.stride()[:2]
    return Matrix(layer.pw_weight, k, c, layer.K, layer.passed)


def _kept(x: Tensor, layer: Layer) -> Kept | None:
    """The channels of `x` (the output or its gradient) that z's last ones are kept in; None where none is."""
    if not layer.keep:
        return None
    return Kept(*L.as_map(x[:, : layer.keep]), layer.passed + layer.sizes.D - layer.keep)


def vectors_of(layer: Layer, inner: Sequence[Tensor | None], outer: Sequence[Tensor | None], whole: Tensor) -> Vectors:
    """Widths of accesses.

    Args:
        inner: further maps with z's channels. outer: maps with the pointwise result's channels.
        whole: the output or its gradient, kept channels included.
    """
    passed, D = layer.passed, layer.sizes.D
    z = (layer.input, layer.passthrough, layer.dw_residual, *inner)
    return Vectors(
        L.vector_width(z, (layer.input.shape[1], D, passed)),
        L.vector_width(outer, (layer.K,)),
        L.vector_width((whole,), (passed, D, layer.keep)),
        L.vector_width((layer.pw_weight,), (passed, D)),
    )


def is_wide(layer: Layer, maps: Sequence[Tensor | None]) -> bool:
    """Whether offsets into the layer's tensors and `maps` need 64 bits."""
    maps = (layer.input, layer.passthrough, layer.dw_residual, layer.residual, *maps)
    return L.needs_wide(maps, layer.sizes, layer.window)


def _is_plain(layer: Layer, vec: int, output: Tensor) -> bool:
    """Whether the forward kernel needs few registers.

    Of a half type, packed bank, 16-byte accesses, 32-bit offsets, nothing added, scaled, passed or kept.
    """
    extras = (*layer.dw_affine[1:], *layer.affine[1:], layer.dw_residual, layer.residual, layer.passthrough)
    simple = not layer.keep and all(extra is None for extra in extras)
    return simple and layer.window.B == 0 and vec == 8 and not is_wide(layer, (output,))


def constants_of(layer: Layer, maps: Sequence[Tensor | None], block_m: int) -> dict[str, Any]:
    """What shapes the code of every kernel here."""
    in_strips = layer.window is not None and layer.geometry[G.CHANNELS_LAST]
    return {
        "WINDOW": layer.window,
        "DW_CHAIN": L.depthwise_chain(layer.geometry, layer.slopes[0]),
        "PRECISION": L.dot_precision(layer.input),
        "WIDE": is_wide(layer, maps),
        "STRIP": L.strip_width(layer.sizes.Q, block_m) if in_strips else layer.sizes.Q,
    }


def pointwise_chain(layer: Layer) -> Chain:
    return Chain(layer.geometry[G.PW_ACTIVATION], layer.geometry[G.PW_POST_ACTIVATION], layer.slopes[1])


def _depthwise_operands(layer: Layer) -> tuple:
    return (
        L.as_map(layer.input), layer.bank, layer.dw_affine, L.as_map(layer.dw_residual), L.as_map(layer.passthrough),
        matrix_of(layer),
    )  # fmt: skip


def forward_of(layer: Layer, gates: Tensor | None) -> Tensor:
    """The output; passed channels are multiplied by `gates` [N, channels] where there are some."""
    output = layer.map_of(layer.keep + layer.K)
    y = output[:, layer.keep :]
    vectors = vectors_of(layer, (), (layer.residual, y), output)
    plain = _is_plain(layer, vectors.C, output)
    config = pointwise_config("forward", layer.input, layer.sizes.M, layer.deepest, layer.K, vectors.C, plain)
    L.launch(
        _forward_kernel, triton.cdiv(layer.sizes.M, config.BLOCK_M) * triton.cdiv(layer.K, config.BLOCK_K), layer.input,
        *_depthwise_operands(layer), layer.affine, L.as_map(layer.residual), L.as_map(y), _kept(output, layer), gates,
        layer.sizes, CHAIN=pointwise_chain(layer), VEC=vectors,
        **constants_of(layer, (output,), config.BLOCK_M), **config._asdict(),
    )  # fmt: skip
    return output


def dsconv_fwd(
    input: Tensor, passthrough: Tensor | None, dw_weight: Tensor, dw_bias: Tensor | None, dw_scale: Tensor | None,
    dw_shift: Tensor | None, dw_residual: Tensor | None, pw_weight: Tensor, bias: Tensor | None, scale: Tensor | None,
    shift: Tensor | None, residual: Tensor | None, geometry: list[int], slopes: list[float],
) -> Tensor:  # fmt: skip
    """The operator `dsconv_fwd` of schemas.inc."""
    tensors = (
        input, passthrough, dw_weight, dw_bias, dw_scale, dw_shift, dw_residual,
        pw_weight, bias, scale, shift, residual,
    )  # fmt: skip
    return forward_of(layer_of(tensors, geometry, slopes), None)


def dsconv_pool_fwd(
    input: Tensor, passthrough: Tensor | None, dw_weight: Tensor, dw_bias: Tensor | None, dw_scale: Tensor | None,
    dw_shift: Tensor | None, dw_residual: Tensor | None, pw_weight: Tensor, bias: Tensor | None, scale: Tensor | None,
    shift: Tensor | None, residual: Tensor | None, geometry: list[int], slopes: list[float],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The operator `dsconv_pool_fwd` of schemas.inc."""
    tensors = (
        input, passthrough, dw_weight, dw_bias, dw_scale, dw_shift, dw_residual,
        pw_weight, bias, scale, shift, residual,
    )  # fmt: skip
    layer = layer_of(tensors, geometry, slopes)
    output = layer.map_of(layer.keep + layer.K)
    y = output[:, layer.keep :]
    vectors = vectors_of(layer, (), (layer.residual, y), output)
    sizes, images = layer.sizes, input.shape[0]
    config = pointwise_config("pooled", input, sizes.M, layer.deepest, layer.K, vectors.C, plain=False)
    tiles = triton.cdiv(sizes.P * sizes.Q, config.BLOCK_M)
    pooled = partials(input, tiles, 1, images * layer.K)
    L.launch(
        _pooled_kernel, images * tiles * triton.cdiv(layer.K, config.BLOCK_K), input,
        *_depthwise_operands(layer), layer.affine, L.as_map(layer.residual), L.as_map(y), _kept(output, layer), pooled,
        sizes, CHAIN=pointwise_chain(layer), VEC=vectors,
        **constants_of(layer, (output,), config.BLOCK_M), **config._asdict(),
    )  # fmt: skip
    return output, sum_partials(pooled, torch.empty((images, layer.K), dtype=pooled.dtype, device=input.device))


# Places of the operator's tensors, and so bits of the gradient mask.
INPUT, PASSTHROUGH, DW_WEIGHT, DW_BIAS, DW_SCALE, DW_SHIFT, DW_RESIDUAL = range(7)
PW_WEIGHT, BIAS, SCALE, SHIFT, RESIDUAL = range(7, 12)


class Gradients:
    """The gradients asked for, and how they come about.

    Attributes:
        tensors: the operator's 12 tensors.
        mask: a bit for each whose gradient is wanted.
        found: the gradients so far, by place.
    """

    def __init__(self, tensors: Sequence[Tensor | None], mask: int):
        self.tensors = tensors
        self.mask = mask
        self.found: dict[int, Tensor] = {}

    def wants(self, *places: int) -> bool:
        """Whether any of these is asked for."""
        return any(self.mask >> place & 1 for place in places)

    def map_of(self, place: int, layer: Layer) -> Tensor | None:
        """An empty gradient of the map there, or None where it is not asked for."""
        if self.wants(place):
            self.found[place] = fake_output(self.tensors[place], self.tensors[place].shape, layer.geometry)
        return self.found.get(place)

    def partial_sums(self, first: int, blocks: int) -> Affine:
        """Scratch for the sums over pixels of the three per-channel vectors from place `first` on."""
        x = self.tensors[INPUT]
        places = range(first, first + 3)
        return Affine(
            *(partials(x, blocks, 1, self.tensors[at].numel()) if self.wants(at) else None for at in places)
        )  # fmt: skip

    def sum_up(self, first: int, partial: Affine) -> None:
        """Turns that scratch into the gradients."""
        for place, sums in enumerate(partial, first):
            if sums is not None:
                vector = self.tensors[place]
                out = torch.empty(vector.shape, dtype=vector.dtype, device=vector.device)
                self.found[place] = sum_partials(sums, out)

    def in_order(self) -> list[Tensor]:
        """Those asked for, in the order of the tensors."""
        return [self.found[place] for place in range(len(self.tensors)) if self.wants(place)]


def output_gradient(layer: Layer, grad_output: Tensor, output: Tensor | None, gradients: Gradients) -> Tensor:
    """The gradient at the pointwise convolution's sums; that of its epilogue's tensors into `gradients`."""
    grad = grad_output[:, layer.keep :]
    chain = pointwise_chain(layer)
    linear = chain.ACT == chain.POST == NONE
    inner = gradients.wants(*range(BIAS)) or gradients.wants(BIAS)
    scaled = not linear or layer.affine.scale is not None
    if not gradients.wants(BIAS, SCALE, SHIFT, RESIDUAL) and not (inner and scaled):
        return grad
    du = layer.map_of(layer.K) if scaled and gradients.wants(*range(BIAS)) else None
    residual_grad = gradients.map_of(RESIDUAL, layer)
    saved = None if output is None else output[:, layer.keep :]
    residual = layer.residual if chain.POST != NONE else None
    recompute = gradients.wants(SCALE) or not (linear or saved is not None)
    vectors = vectors_of(layer, (), (residual, grad, saved, du, residual_grad), grad_output)
    config = pointwise_config(
        "output_gradient", layer.input, layer.sizes.M, layer.deepest, layer.K, vectors.C, plain=False
    )  # fmt: skip
    rows = triton.cdiv(layer.sizes.M, config.BLOCK_M)
    partial = gradients.partial_sums(BIAS, rows)
    L.launch(
        _output_gradient_kernel, rows * triton.cdiv(layer.K, config.BLOCK_K), layer.input,
        *_depthwise_operands(layer), layer.affine, L.as_map(residual), L.as_map(grad), L.as_map(saved),
        L.as_map(du), L.as_map(residual_grad), partial, layer.sizes,
        CHAIN=chain, VEC=vectors, RECOMPUTE=recompute,
        **constants_of(layer, (grad_output, du, residual_grad), config.BLOCK_M), **config._asdict(),
    )  # fmt: skip
    gradients.sum_up(BIAS, partial)
    return grad if du is None else du


def passed_gradient(layer: Layer, du: Tensor, grad_output: Tensor, gradients: Gradients) -> None:
    """The gradient of the passthrough."""
    grad = gradients.map_of(PASSTHROUGH, layer)
    if grad is None:
        return
    vectors = vectors_of(layer, (grad,), (du,), grad_output)
    config = backward_config(layer.input, layer.sizes.M, layer.passed, vectors.C)
    constants = constants_of(layer, (grad_output, du), config.BLOCK_M)
    del constants["WINDOW"], constants["DW_CHAIN"]
    L.launch(
        _passed_gradient_kernel,
        triton.cdiv(layer.sizes.M, config.BLOCK_M) * triton.cdiv(layer.passed, config.BLOCK_C), layer.input,
        L.as_map(du), matrix_of(layer), _kept(grad_output, layer), L.as_map(grad), layer.sizes,
        VEC=vectors, **constants, **config._asdict(),
    )  # fmt: skip


def depthwise_gradient(layer: Layer, du: Tensor, grad_output: Tensor, gradients: Gradients) -> Tensor | None:
    """The gradient at the depthwise convolution's sums; that of its epilogue's tensors into `gradients`."""
    if not gradients.wants(INPUT, *range(DW_WEIGHT, PW_WEIGHT)):
        return None
    chain = L.depthwise_chain(layer.geometry, layer.slopes[0])
    sums_grad = layer.map_of(layer.sizes.D) if gradients.wants(INPUT, DW_WEIGHT) else None
    residual_grad = gradients.map_of(DW_RESIDUAL, layer)
    residual = layer.dw_residual if chain.POST != NONE else None
    recompute = gradients.wants(DW_SCALE) or not chain.ACT == chain.POST == NONE
    vectors = vectors_of(layer, (sums_grad, residual_grad), (du,), grad_output)
    config = backward_config(layer.input, layer.sizes.M, layer.sizes.D, vectors.C)
    rows = triton.cdiv(layer.sizes.M, config.BLOCK_M)
    partial = gradients.partial_sums(DW_BIAS, rows)
    L.launch(
        _depthwise_gradient_kernel, rows * triton.cdiv(layer.sizes.D, config.BLOCK_C), layer.input,
        L.as_map(layer.input), layer.bank, layer.dw_affine, L.as_map(residual), L.as_map(du), matrix_of(layer),
        _kept(grad_output, layer), L.as_map(sums_grad), L.as_map(residual_grad), partial, layer.sizes,
        VEC=vectors, RECOMPUTE=recompute,
        **constants_of(layer, (grad_output, du), config.BLOCK_M), **config._asdict(),
    )  # fmt: skip
    gradients.sum_up(DW_BIAS, partial)
    return sums_grad


def matrix_gradient(layer: Layer, du: Tensor) -> Tensor:
    """The gradient of the pointwise weight: sum over pixels of du[pixel, k] * z[pixel, c], z recomputed."""
    vectors = vectors_of(layer, (), (du,), du)
    config = matrix_config(layer.input, layer.deepest, layer.K, vectors.C)
    tiles = triton.cdiv(layer.K, config.BLOCK_K) * triton.cdiv(layer.deepest, config.BLOCK_C)
    blocks = triton.cdiv(layer.sizes.M, config.BLOCK_M)
    # Two programs a processor; more parts would only be more partial sums to write and read.
    steps = max(1, blocks * tiles // (2 * L.processors(layer.input)))
    parts = triton.cdiv(blocks, steps)
    partial = partials(layer.input, parts, 1, layer.pw_weight.numel())
    for of_passed, channels in ((True, layer.passed), (False, layer.sizes.D)):
        L.launch(
            _matrix_gradient_kernel,
            parts * triton.cdiv(layer.K, config.BLOCK_K) * triton.cdiv(channels, config.BLOCK_C), layer.input,
            *_depthwise_operands(layer), L.as_map(du), partial, layer.sizes, steps,
            VEC=vectors, OF_PASSED=of_passed, **constants_of(layer, (du,), config.BLOCK_M), **config._asdict(),
        )  # fmt: skip
    weight = layer.pw_weight
    return sum_partials(partial, torch.empty(weight.shape, dtype=weight.dtype, device=weight.device))


def dsconv_bwd(
    grad_output: Tensor, output: Tensor | None, input: Tensor, passthrough: Tensor | None, dw_weight: Tensor,
    dw_bias: Tensor | None, dw_scale: Tensor | None, dw_shift: Tensor | None, dw_residual: Tensor | None,
    pw_weight: Tensor, bias: Tensor | None, scale: Tensor | None, shift: Tensor | None, residual: Tensor | None,
    geometry: list[int], slopes: list[float], mask: int,
) -> list[Tensor]:  # fmt: skip
    """The operator `dsconv_bwd` of schemas.inc."""
    tensors = (
        input, passthrough, dw_weight, dw_bias, dw_scale, dw_shift, dw_residual,
        pw_weight, bias, scale, shift, residual,
    )  # fmt: skip
    layer = layer_of(tensors, geometry, slopes)
    gradients = Gradients(tensors, mask)
    du = output_gradient(layer, grad_output, output, gradients)
    passed_gradient(layer, du, grad_output, gradients)
    sums_grad = depthwise_gradient(layer, du, grad_output, gradients)
    if gradients.wants(PW_WEIGHT):
        gradients.found[PW_WEIGHT] = matrix_gradient(layer, du)
    if gradients.wants(INPUT):
        gradients.found[INPUT] = input_gradient(sums_grad, dw_weight, input, geometry)
    if gradients.wants(DW_WEIGHT):
        gradients.found[DW_WEIGHT] = weight_gradient(sums_grad, input, dw_weight, geometry)
    return gradients.in_order()
