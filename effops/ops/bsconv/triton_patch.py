"""A pointwise convolution in front of a depthwise one, patch by patch, for the Triton kernels of bsconv and mbconv.

A program owns a patch of ROWS x COLS output pixels. The pixels under the patch's windows, cut to the map, are its
region: those at which the pointwise convolution has to be known, BLOCK_E of its channels at a time.

                    region: 10 x 10 for 8 x 8 outputs of a 3x3 window at stride 1
    x              +------------------+        ring: scratch of the program's own, [pixel, channel], in the maps' dtype
    [pixels, C]    | pixel 0 1 2 ...  |        two buffers in turn: while a thread still reads one, others write the
       |           |   +----------+   |        next, and one barrier a block of channels is enough
       | BLOCK_X   |   |  patch   |   |
       v pixels    |   |          |   |        out of the map nothing is stored and the windows read zeros: the padding
    tl.dot with -> |   +----------+   |  ->    comes after the pointwise epilogue
    the matrix     +------------------+
    epilogue, rounded, stored       barrier    depthwise_tile gathers each pixel's taps, as it does from any map

Programs are as many as the device holds at once and take patches in turn, so that scratch is bounded whatever the batch
(64 MB, of which 10 is usual) and its lines, rewritten every few microseconds, stay in L2. The depthwise taps read what
the program itself has just written: from L1 where stores leave it there, else from L2.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from effops.ops import triton_launch as L
from effops.ops.dsconv.triton import matrix_tile
from effops.ops.triton_device import Map, Sizes, Window, accumulator, channels_of, epilogue, load_tile, store_tile

_SCRATCH_BYTES = 2**26
_WARPS_A_PROCESSOR = 16  # what programs of 128 registers a thread leave room for

# ---- device ---------------------------------------------------------------------------------------------------------


class Region(NamedTuple):
    """Pixels [top, top + rows) x [left, left + columns) of image n."""

    n: int
    top: int
    left: int
    rows: int
    columns: int


@triton.jit
def patches_an_image(sizes, ROWS: tl.constexpr, COLS: tl.constexpr):
    """How many patches cover an image."""
    return tl.cdiv(sizes.P, ROWS) * tl.cdiv(sizes.Q, COLS)


@triton.jit
def patch_of(number, sizes, ROWS: tl.constexpr, COLS: tl.constexpr, WIDE: tl.constexpr):
    """Image and first pixel (n, p, q) of a patch; patches are numbered row by row through the batch."""
    across = tl.cdiv(sizes.Q, COLS)
    n = number // patches_an_image(sizes, ROWS, COLS)
    p = number // across % tl.cdiv(sizes.P, ROWS) * ROWS
    q = number % across * COLS
    if WIDE:
        n = n.to(tl.int64)
        p = p.to(tl.int64)
        q = q.to(tl.int64)
    return n, p, q


@triton.jit
def pixels_of(n, p, q, sizes, ROWS: tl.constexpr, COLS: tl.constexpr):
    """The patch's pixels (n, p, q), row by row, and which exist."""
    i = tl.arange(0, ROWS * COLS)
    p += i // COLS
    q += i % COLS
    return n + tl.zeros_like(p), p, q, (p < sizes.P) & (q < sizes.Q)


@triton.jit
def region_of(n, p, q, sizes, WINDOW: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """The region of the patch that begins at (n, p, q); empty where all its windows lie in the padding."""
    last_p = tl.minimum(p + ROWS, sizes.P) - 1
    last_q = tl.minimum(q + COLS, sizes.Q) - 1
    bottom = tl.minimum(last_p * WINDOW.SH - WINDOW.TOP + (WINDOW.R - 1) * WINDOW.DH + 1, sizes.H)
    right = tl.minimum(last_q * WINDOW.SW - WINDOW.LEFT + (WINDOW.S - 1) * WINDOW.DW + 1, sizes.W)
    top = tl.maximum(p * WINDOW.SH - WINDOW.TOP, 0)
    left = tl.maximum(q * WINDOW.SW - WINDOW.LEFT, 0)
    return Region(n, top, left, tl.maximum(bottom - top, 0), tl.maximum(right - left, 0))


@triton.jit
def scratch_map(data, region, first, WIDTH):
    """Scratch as the map of the region: its pixels lie one after the other, WIDTH channels each, from channel `first`.

    WIDTH is a multiple of 16.
    """
    origin = (region.top * region.columns + region.left) * WIDTH + first
    return Map(data + (-origin), 0, 1, region.columns * WIDTH, WIDTH)


@triton.jit
def pointwise_into(
    target, x, pw, affine, region, o, live,
    CHAIN: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr, VEC: tl.constexpr, VEC_MATRIX: tl.constexpr,
    VEC_TARGET: tl.constexpr, BLOCK_X: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """target[o] = the pointwise convolution of x and its epilogue, rounded, at every pixel of the region.

    Args:
        target: the Map of `scratch_map`.
        x: the input's Map, or that of a former result in scratch.
        pw: the Matrix, all of whose channels pass.
        o, live: output channels, and which exist.
        VEC, VEC_MATRIX, VEC_TARGET: channels an access may take, of x, the matrix and the target.
    """
    count = region.rows * region.columns
    for first in range(0, count, BLOCK_X):
        i = first + tl.arange(0, BLOCK_X)
        inside = i < count
        h = region.top + i // region.columns
        w = region.left + i % region.columns
        acc = tl.zeros((BLOCK_X, o.shape[0]), accumulator(pw.data.dtype.element_ty))
        for block in range(tl.cdiv(pw.PASSED, BLOCK_C)):
            c, c_live = channels_of(block, pw.PASSED, BLOCK_C, WIDE, VEC)
            value = load_tile(x, region.n, h, w, c, inside[:, None] & c_live[None, :], VEC)
            weight = tl.trans(matrix_tile(pw, o, c, 0, pw.PASSED, VEC_MATRIX))
            acc = tl.dot(value, weight, acc, input_precision=PRECISION, out_dtype=acc.dtype)
        result = epilogue(acc, affine, None, o, live, CHAIN)
        store_tile(target, 0, h, w, o, result, inside[:, None] & live[None, :], VEC_TARGET)


# ---- host -----------------------------------------------------------------------------------------------------------


class Tiling(NamedTuple):
    """How maps are cut into patches.

    Attributes:
        rows, columns: of a patch, powers of two.
        an_image: patches of an image.
        patches: of the batch.
        pixels: of a region, at most.
    """

    rows: int
    columns: int
    an_image: int
    patches: int
    pixels: int


def tiling_of(pixels: int, step: int, sizes: Sizes, window: Window) -> Tiling:
    """Patches of so many pixels, of the form in which their regions have the fewest blocks of `step` pixels.

    Square ones where the map is large; whole rows, or the whole map, where it is small: they have no halo.
    """

    def of(rows: int, columns: int) -> Tiling:
        an_image = triton.cdiv(sizes.P, rows) * triton.cdiv(sizes.Q, columns)
        high = min((rows - 1) * window.SH + (window.R - 1) * window.DH + 1, sizes.H)
        wide = min((columns - 1) * window.SW + (window.S - 1) * window.DW + 1, sizes.W)
        return Tiling(rows, columns, an_image, sizes.M // (sizes.P * sizes.Q) * an_image, high * wide)

    forms = [of(pixels >> shift, 1 << shift) for shift in range(pixels.bit_length())]
    return min(forms, key=lambda t: (t.an_image * triton.cdiv(t.pixels, step), abs(t.rows - t.columns)))


class Scratch(NamedTuple):
    """Scratch of all programs: the ring [programs, 2, pixels, BLOCK_E], and [programs, pixels, width] or None."""

    ring: Tensor
    middle: Tensor | None

    @property
    def programs(self) -> int:
        """How many programs it is for."""
        return self.ring.shape[0]


def scratch_of(x: Tensor, items: int, pixels: int, block_e: int, warps: int, middle: int = 0) -> Scratch:
    """For as many programs as the device holds at once, no more than there are items and 64 MB are enough for.

    Args:
        x: a map; its dtype and device are read.
        pixels: of a region.
        middle: channels of a former result that is to be kept for a whole region, a multiple of 16, or 0.
    """
    bytes_each = pixels * (2 * block_e + middle) * x.element_size()
    programs = 2 if L.INTERPRETED else L.processors(x) * max(1, _WARPS_A_PROCESSOR // warps)
    programs = min(items, max(1, min(programs, _SCRATCH_BYTES // bytes_each)))
    ring = torch.empty((programs, 2, pixels, block_e), dtype=x.dtype, device=x.device)
    if not middle:
        return Scratch(ring, None)
    return Scratch(ring, torch.empty((programs, pixels, middle), dtype=x.dtype, device=x.device))


def steps_of(blocks: int, patches: int, x: Tensor) -> int:
    """Blocks of channels that a program takes of its patch: all where patches alone fill the device."""
    parts = min(blocks, triton.cdiv(L.processors(x), max(1, patches)))
    return triton.cdiv(blocks, parts)
