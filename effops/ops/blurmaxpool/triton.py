"""Triton kernels of room blurmaxpool. None has run on a GPU yet: what is said of speed here is calculated.

forward: a program owns BLOCK_M output pixels x BLOCK_C channels. What its blurs reach of the pooled map, SIZE x SIZE
pixels an output, is never stored:

    x, (SIZE + window - 1)^2 pixels an output      maxima down each column      pooled pixels, a column at a time
      . . . .                                        m m m m                       o o o
      . . . .      each loaded once, column   ->     m m m m    a window's    ->   o o o     x the taps, summed up -> y
      . . . .      by column                         m m m m    columns            o o o
      . . . .

    Where the blur's padding reflects, a pixel beyond the edge is its mirror image, which is in the patch too (with one
    row and column more before it where SIZE is even): its tap is added to the mirror image's weight, pixel by pixel.

backward: a program owns BLOCK_M input pixels. Of the windows that a pixel lies in, which have it as their first maximum
is found from the (2 window - 1)^2 pixels around it; each gradient of the output that the blurs of these windows reach
is then loaded once, and multiplied by the sum of its taps on the windows that the pixel wins. No scratch, no atomics.

kernel     reads    loads an element (2x2 window, SIZE 3, stride 2)        writes   bytes (fp16)
forward    x        16 an output, of which 12 hit L1                       y        2.5 an input pixel
backward   x, grad  9 of x and 4 of grad an input pixel, 1.25 from memory  dx       4.5 an input pixel

Windows and filters beyond the limits below are loops, which load every element of every window of every tap, from L1.

Roofline, calculated for an H200 (4.3 TB/s), nothing measured: forward of fp16 [128,64,112,112]: 257 MB, 60 us;
[128,128,28,28]: 32 MB, 7.5 us. Backward 108 and 13 us from memory; its 13 loads, 26 bytes an element from L1 at 128
bytes a clock and processor, would take 90 and 11 us.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from effops.ops import geometry as G
from effops.ops import triton_launch as L
from effops.ops.blurmaxpool import reference
from effops.ops.triton_device import (
    Sizes,
    Window,
    accumulator,
    block_of,
    channels_of,
    load_tile,
    put,
    store_tile,
    takes_second,
    tile_pointers,
)


class Pool(NamedTuple):
    """What shapes the code (constexpr).

    Attributes:
        WH, WW: the max pool's window.
        TOP, LEFT: its padding.
        SH, SW: the blur's stride.
        SIZE: of the blur; BEFORE of it stand before a pixel.
        TAPS: its values along an axis, of sum 1.
        REFLECT: whether the blur's padding reflects.
        MORE: rows and columns before the filter's first tap that a reflection may reach.
    """

    WH: int
    WW: int
    TOP: int
    LEFT: int
    SH: int
    SW: int
    SIZE: int
    BEFORE: int
    TAPS: tuple
    REFLECT: bool
    MORE: int


class Extent(NamedTuple):
    """Rows and columns of the input, of the pooled map and of the output; channels; target pixels in the batch."""

    H: int
    W: int
    HP: int
    WP: int
    P: int
    Q: int
    D: int
    M: int


# ---- device: shared -------------------------------------------------------------------------------------------------


@triton.jit
def _own_pixels(
    rows, columns, extent, WIDE: tl.constexpr, VEC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr
):
    """This program's pixels (n, p, q) of maps of so many rows and columns, which exist, its channels, which exist."""
    channel_blocks = tl.cdiv(extent.D, BLOCK_C)
    m = block_of(tl.program_id(0) // channel_blocks, BLOCK_M, WIDE)
    c, live = channels_of(tl.program_id(0) % channel_blocks, extent.D, BLOCK_C, WIDE, VEC)
    lines = m // columns
    return lines // rows, lines % rows, m % columns, m < extent.M, c, live


@triton.constexpr_function
def _covers(place, offset, count):
    """Whether a window of so many rows has the one `offset` behind its row `place` too."""
    return 0 <= place + offset < count


@triton.constexpr_function
def _outputs(pool, pixels, stride):
    """Rows of the output, at most, whose filters reach so many neighbouring rows of the pooled map."""
    size, more = pool[6], pool[10]  # a bare tuple by now, no Pool
    return -(-(size + more + pixels - 1) // stride)


@triton.jit
def _tap(t, POOL: tl.constexpr, ACC: tl.constexpr):
    """The filter's tap number t, a vector; 0 where it has none."""
    taps: tl.constexpr = POOL.TAPS
    size: tl.constexpr = POOL.SIZE
    value = tl.zeros(t.shape, ACC)
    for i in tl.static_range(size):
        value = tl.where(t == i, tl.full(t.shape, taps[i], ACC), value)
    return value


@triton.jit
def _blur_weight(r, first, count, POOL: tl.constexpr, ACC: tl.constexpr):
    """By what a filter whose first tap stands on row `first` takes row r of `count`; 0: not at all."""
    weight = _tap(r - first, POOL, ACC)
    if POOL.REFLECT:
        weight += tl.where(r > 0, _tap(-r - first, POOL, ACC), 0.0)
        weight += tl.where(r < count - 1, _tap(2 * (count - 1) - r - first, POOL, ACC), 0.0)
    return tl.where((r >= 0) & (r < count), weight, 0.0)


@triton.jit
def _load_pixel(x, n, h, w, inside, c, live, extent, ACC: tl.constexpr, VEC: tl.constexpr):
    """x[n, c, h, w], -inf outside the map, and which pixels are in it."""
    in_map = inside & (h >= 0) & (h < extent.H) & (w >= 0) & (w < extent.W)
    mask = in_map[:, None] & live[None, :]
    return tl.load(tile_pointers(x, n, h, w, c, VEC), mask=mask, other=float("-inf")).to(ACC), in_map


@triton.jit
def _larger(first, second):
    return tl.where(takes_second(first, second), second, first)


@triton.jit
def _add_weighted(u, value, weight):
    """u + value * weight; what has no weight is not read, an infinity neither."""
    return u + tl.where(weight != 0, value, 0.0) * weight


# ---- forward --------------------------------------------------------------------------------------------------------


@triton.jit
def _take_row(maxima, INDEX: tl.constexpr, value, TAKEN: tl.constexpr):
    if TAKEN:
        maxima = put(maxima, INDEX, _larger(maxima[INDEX], value))
    return maxima


@triton.jit
def _where_read(inside, weight, PERHAPS: tl.constexpr):
    """The pixels whose patch has this row or column: those without a weight for it do not where it is one of MORE."""
    if PERHAPS:
        inside = inside & (weight != 0)
    return inside


@triton.jit
def _blur(u, x, n, p, q, inside, c, live, extent, POOL: tl.constexpr, VEC: tl.constexpr):
    """The blurred maxima of output pixels (p, q), unrolled: every input pixel of the patch is loaded once."""
    acc: tl.constexpr = u.dtype
    window_h: tl.constexpr = POOL.WH
    window_w: tl.constexpr = POOL.WW
    reach: tl.constexpr = POOL.SIZE + POOL.MORE
    first_row = p * POOL.SH - POOL.BEFORE
    first_column = q * POOL.SW - POOL.BEFORE
    row_weights = ()
    column_weights = ()
    for i in tl.static_range(reach):
        row_weights = row_weights + (_blur_weight(first_row - POOL.MORE + i, first_row, extent.HP, POOL, acc),)
        column_weights = column_weights + (
            _blur_weight(first_column - POOL.MORE + i, first_column, extent.WP, POOL, acc),
        )
    columns = ()  # of each input column the maxima that the pooled rows have there
    for dx in tl.static_range(reach + window_w - 1):
        in_column = _where_read(inside, column_weights[0], dx < POOL.MORE)
        maxima = ()
        for _ in tl.static_range(reach):
            maxima = maxima + (tl.full(u.shape, float("-inf"), acc),)
        for dy in tl.static_range(reach + window_h - 1):
            h = first_row - POOL.MORE + dy - POOL.TOP
            w = first_column - POOL.MORE + dx - POOL.LEFT
            read = _where_read(in_column, row_weights[0], dy < POOL.MORE)
            value, _in_map = _load_pixel(x, n, h, w, read, c, live, extent, acc, VEC)
            for i in tl.static_range(reach):
                maxima = _take_row(maxima, i, value, _covers(0, dy - i, window_h))
        columns = columns + maxima
        if dx >= window_w - 1:
            for i in tl.static_range(reach):
                pooled = columns[(dx - (window_w - 1)) * reach + i]
                for b in tl.static_range(1, window_w):
                    pooled = _larger(pooled, columns[(dx - (window_w - 1) + b) * reach + i])
                weight = row_weights[i] * column_weights[dx - (window_w - 1)]
                u = _add_weighted(u, pooled, weight[:, None])
    return u


@triton.jit
def _blur_looped(u, x, n, p, q, inside, c, live, extent, POOL: tl.constexpr, VEC: tl.constexpr):
    """The same in loops over the taps and the window."""
    acc: tl.constexpr = u.dtype
    reach: tl.constexpr = POOL.SIZE + POOL.MORE
    first_row = p * POOL.SH - POOL.BEFORE
    first_column = q * POOL.SW - POOL.BEFORE
    for tap in range(reach * reach):
        row = first_row - POOL.MORE + tap // reach
        column = first_column - POOL.MORE + tap % reach
        pooled = tl.full(u.shape, float("-inf"), acc)
        for k in range(POOL.WH * POOL.WW):
            h = row - POOL.TOP + k // POOL.WW
            w = column - POOL.LEFT + k % POOL.WW
            value, _in_map = _load_pixel(x, n, h, w, inside, c, live, extent, acc, VEC)
            pooled = _larger(pooled, value)
        row_weight = _blur_weight(row, first_row, extent.HP, POOL, acc)
        column_weight = _blur_weight(column, first_column, extent.WP, POOL, acc)
        u = _add_weighted(u, pooled, (row_weight * column_weight)[:, None])
    return u


@triton.jit
def _forward_kernel(
    x, y, extent,
    POOL: tl.constexpr, WIDE: tl.constexpr, VEC: tl.constexpr,
    UNROLLED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    n, p, q, inside, c, live = _own_pixels(extent.P, extent.Q, extent, WIDE, VEC, BLOCK_M, BLOCK_C)
    u = tl.zeros((BLOCK_M, BLOCK_C), accumulator(x.data.dtype.element_ty))
    if UNROLLED:
        u = _blur(u, x, n, p, q, inside, c, live, extent, POOL, VEC)
    else:
        u = _blur_looped(u, x, n, p, q, inside, c, live, extent, POOL, VEC)
    store_tile(y, n, p, q, c, u, inside[:, None] & live[None, :], VEC)


# ---- backward -------------------------------------------------------------------------------------------------------


@triton.jit
def _load_gradient(grad, n, p, q, inside, c, live, extent, ACC: tl.constexpr, VEC: tl.constexpr):
    """grad[n, c, p, q], 0 outside."""
    in_map = inside & (p >= 0) & (p < extent.P) & (q >= 0) & (q < extent.Q)
    return load_tile(grad, n, p, q, c, in_map[:, None] & live[None, :], VEC).to(ACC)


@triton.jit
def _wins(own, value, in_map, EARLIER):
    """Whether a window keeps the pixel `own` against another one of it; the earlier of equal ones, the last NaN."""
    return tl.where(EARLIER, takes_second(value, own) | ~in_map[:, None], ~takes_second(own, value))


@triton.constexpr_function
def _places(pool, dy, dx):
    """Bits a * WW + b of the places in a window whose neighbour (dy, dx) is in the window too."""
    window_h, window_w = pool[0], pool[1]
    places = [(a, b) for a in range(window_h) for b in range(window_w)]
    return sum(
        1 << (a * window_w + b) for a, b in places if 0 <= a + dy < window_h and 0 <= b + dx < window_w
    )  # fmt: skip


@triton.jit
def _against(
    won, x, own, n, h, w, inside, c, live, extent,
    DY: tl.constexpr, DX: tl.constexpr, POOL: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """`won` without the windows in which the pixel (h + DY, w + DX) is the maximum rather than `own`."""
    lost: tl.constexpr = _places(POOL, DY, DX)
    value, in_map = _load_pixel(x, n, h + DY, w + DX, inside, c, live, extent, own.dtype, VEC)
    return tl.where(_wins(own, value, in_map, DY < 0 or (DY == 0 and DX < 0)), won, won & ~lost)


@triton.jit
def _windows_won(x, own, n, h, w, inside, c, live, extent, POOL: tl.constexpr, VEC: tl.constexpr):
    """Bits a * WW + b: whether the pixel is the maximum of the window that has it in row a and column b.

    An integer an element: as so many truth values they would want more predicate registers than there are.
    """
    window_h: tl.constexpr = POOL.WH
    window_w: tl.constexpr = POOL.WW
    won = tl.full(own.shape, (1 << (window_h * window_w)) - 1, tl.int32)
    for y in tl.static_range(2 * window_h - 1):
        for z in tl.static_range(2 * window_w - 1):
            if y != window_h - 1 or z != window_w - 1:
                won = _against(
                    won, x, own, n, h, w, inside, c, live, extent, y - (window_h - 1), z - (window_w - 1), POOL, VEC
                )  # fmt: skip
    return won


@triton.jit
def _gather(u, grad, won, n, h, w, inside, c, live, extent, POOL: tl.constexpr, VEC: tl.constexpr):
    """The gradients at the maxima of the windows won, unrolled: every gradient of the output is loaded once."""
    acc: tl.constexpr = u.dtype
    window_h: tl.constexpr = POOL.WH
    window_w: tl.constexpr = POOL.WW
    rows: tl.constexpr = _outputs(POOL, window_h, POOL.SH)
    columns: tl.constexpr = _outputs(POOL, window_w, POOL.SW)
    last_p = (h + POOL.TOP + POOL.MORE + POOL.BEFORE) // POOL.SH
    last_q = (w + POOL.LEFT + POOL.MORE + POOL.BEFORE) // POOL.SW
    for k in tl.static_range(rows):
        p = last_p - k
        of_rows = tl.zeros(h.shape, acc)  # 0: no window's blur reaches the row p
        of_columns = ()  # of each column of windows, the sum of the rows' weights where the window is won
        for b in tl.static_range(window_w):
            weight = tl.zeros(u.shape, acc)
            for a in tl.static_range(window_h):
                row_weight = _blur_weight(h + POOL.TOP - a, p * POOL.SH - POOL.BEFORE, extent.HP, POOL, acc)
                weight += tl.where((won & (1 << (a * window_w + b))) != 0, row_weight[:, None], 0.0)
                of_rows += row_weight
            of_columns = of_columns + (weight,)
        for j in tl.static_range(columns):
            q = last_q - j
            reached = tl.zeros(h.shape, acc)
            weight = tl.zeros(u.shape, acc)
            for b in tl.static_range(window_w):
                column_weight = _blur_weight(w + POOL.LEFT - b, q * POOL.SW - POOL.BEFORE, extent.WP, POOL, acc)
                weight += of_columns[b] * column_weight[:, None]
                reached += column_weight
            read = inside & (of_rows != 0) & (reached != 0)
            u = _add_weighted(u, _load_gradient(grad, n, p, q, read, c, live, extent, acc, VEC), weight)
    return u


@triton.jit
def _gather_looped(u, x, grad, own, n, h, w, inside, c, live, extent, POOL: tl.constexpr, VEC: tl.constexpr):
    """What the windows won bring, in loops over the windows, their elements and their blurs."""
    acc: tl.constexpr = u.dtype
    rows: tl.constexpr = _outputs(POOL, 1, POOL.SH)
    columns: tl.constexpr = _outputs(POOL, 1, POOL.SW)
    for place in range(POOL.WH * POOL.WW):
        top = h - place // POOL.WW
        left = w - place % POOL.WW
        won = inside[:, None] & live[None, :]
        for k in range(POOL.WH * POOL.WW):
            value, in_map = _load_pixel(
                x, n, top + k // POOL.WW, left + k % POOL.WW, inside, c, live, extent, acc, VEC
            )  # fmt: skip
            won = won & (_wins(own, value, in_map, k < place) | (k == place))
        row = top + POOL.TOP
        column = left + POOL.LEFT
        for k in range(rows * columns):
            p = (row + POOL.MORE + POOL.BEFORE) // POOL.SH - k // columns
            q = (column + POOL.MORE + POOL.BEFORE) // POOL.SW - k % columns
            weight = _blur_weight(row, p * POOL.SH - POOL.BEFORE, extent.HP, POOL, acc)
            weight *= _blur_weight(column, q * POOL.SW - POOL.BEFORE, extent.WP, POOL, acc)
            g = _load_gradient(grad, n, p, q, inside & (weight != 0), c, live, extent, acc, VEC)
            u = _add_weighted(u, g, tl.where(won, weight[:, None], 0.0))
    return u


@triton.jit
def _backward_kernel(
    x, grad, dx, extent,
    POOL: tl.constexpr, WIDE: tl.constexpr, VEC: tl.constexpr,
    UNROLLED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    acc: tl.constexpr = accumulator(x.data.dtype.element_ty)
    n, h, w, inside, c, live = _own_pixels(extent.H, extent.W, extent, WIDE, VEC, BLOCK_M, BLOCK_C)
    own, _in_map = _load_pixel(x, n, h, w, inside, c, live, extent, acc, VEC)
    u = tl.zeros((BLOCK_M, BLOCK_C), acc)
    if UNROLLED:
        won = _windows_won(x, own, n, h, w, inside, c, live, extent, POOL, VEC)
        u = _gather(u, grad, won, n, h, w, inside, c, live, extent, POOL, VEC)
    else:
        u = _gather_looped(u, x, grad, own, n, h, w, inside, c, live, extent, POOL, VEC)
    store_tile(dx, n, h, w, c, u, inside[:, None] & live[None, :], VEC)


# ---- configs --------------------------------------------------------------------------------------------------------

_WARPS = 4
_UNROLLED_LOADS = 49  # at most so many are unrolled: the paper's 3x3 window under a filter of size 4
_UNROLLED_SUMS = 144  # backward: of weights, for each gradient and window
# Bytes of an element: elements a thread, (channels_last, NCHW); fewer where a thread would hold more values than
# that: of a forward the maxima of a window's columns, of a backward the weights of what was won.
_ELEMENTS = {2: (8, 2), 4: (4, 2), 8: (2, 1)}
_VALUES = 100


class Tile(NamedTuple):
    """Pixels and channels of a program, whether windows are unrolled, warps."""

    BLOCK_M: int
    BLOCK_C: int
    UNROLLED: bool
    num_warps: int = _WARPS


def configs() -> dict[str, list[dict[str, Any]]]:
    """What the chooser can return, by kernel, for the ahead-of-time check: blocks follow the channels."""
    either = [{"UNROLLED": unrolled, "num_warps": _WARPS} for unrolled in (True, False)]
    return {"_forward_kernel": either, "_backward_kernel": either}


def _tile(x: Tensor, channels_last: int, unrolled: bool, values: int) -> Tile:
    """The tile by dtype and layout; `values`: those a thread holds for an element, where windows are unrolled."""
    if L.INTERPRETED:
        return Tile(128, 32, unrolled)
    channels = x.shape[1]
    elements = _ELEMENTS[x.element_size()][0 if channels_last and channels >= 8 else 1]
    while unrolled and elements * values > _VALUES:
        elements //= 2
    block_c = min(64, triton.next_power_of_2(channels)) if channels_last else 1
    return Tile(max(1, elements * 32 * _WARPS // block_c), block_c, unrolled)


def _forward_tile(x: Tensor, channels_last: int, pool: Pool) -> Tile:
    reach = pool.SIZE + pool.MORE
    unrolled = (reach + pool.WH - 1) * (reach + pool.WW - 1) <= _UNROLLED_LOADS
    return _tile(x, channels_last, unrolled, reach * pool.WW)


def _backward_tile(x: Tensor, channels_last: int, pool: Pool) -> Tile:
    gradients = _outputs(pool, pool.WH, pool.SH) * _outputs(pool, pool.WW, pool.SW)
    around = (2 * pool.WH - 1) * (2 * pool.WW - 1)
    unrolled = around <= _UNROLLED_LOADS and gradients * pool.WH * pool.WW <= _UNROLLED_SUMS
    return _tile(x, channels_last, unrolled, 4 * (pool.WW + 1))


# ---- host -----------------------------------------------------------------------------------------------------------


def _pool_of(geometry: list[int]) -> Pool:
    stride_h, stride_w, size, window_h, window_w, top, left, reflect, _ = geometry
    taps = tuple(math.comb(size - 1, i) / 2 ** (size - 1) for i in range(size))
    more = int(reflect and size % 2 == 0)
    return Pool(
        window_h, window_w, top, left, stride_h, stride_w, size, (size - 1) // 2, taps, bool(reflect), more
    )  # fmt: skip


def _launch(
    kernel: Any, x: Tensor, maps: tuple[Tensor, ...], pixels: tuple[int, int], tile_of: Any, geometry: list[int]
) -> None:
    """Launches a kernel over maps of so many rows and columns; `maps` are its arguments."""
    n, c, h, w = x.shape
    pool = _pool_of(geometry)
    pooled, output = reference.pooled_size(h, w, geometry), reference.output_size(h, w, geometry)
    extent = Extent(h, w, *pooled, *output, c, n * pixels[0] * pixels[1])
    window = Window(pool.SIZE + pool.WH, pool.SIZE + pool.WW, pool.SH, pool.SW, 0, 0, 1, 1, 1, 0, None)
    wide = L.needs_wide(maps, Sizes(h, w, *output, extent.M, c), window)
    tile = tile_of(x, geometry[reference.CHANNELS_LAST], pool)
    L.launch(
        kernel, triton.cdiv(extent.M, tile.BLOCK_M) * triton.cdiv(c, tile.BLOCK_C), x, *map(L.as_map, maps), extent,
        POOL=pool, WIDE=wide, VEC=L.vector_width(maps, (c,)), **tile._asdict(),
    )  # fmt: skip


def _empty(input: Tensor, shape: tuple[int, ...], geometry: list[int]) -> Tensor:
    memory_format = G.memory_format(geometry[reference.CHANNELS_LAST])
    return torch.empty(shape, dtype=input.dtype, device=input.device, memory_format=memory_format)


def blur_max_pool_fwd(input: Tensor, geometry: list[int]) -> Tensor:
    """The operator `blur_max_pool_fwd` of schemas.inc."""
    pixels = reference.output_size(*input.shape[2:], geometry)
    output = _empty(input, (*input.shape[:2], *pixels), geometry)
    _launch(_forward_kernel, input, (input, output), pixels, _forward_tile, geometry)
    return output


def blur_max_pool_bwd(grad_output: Tensor, input: Tensor, geometry: list[int]) -> Tensor:
    """The operator `blur_max_pool_bwd` of schemas.inc."""
    grad_input = _empty(input, input.shape, geometry)
    maps = (input, grad_output, grad_input)
    _launch(_backward_kernel, input, maps, input.shape[2:], _backward_tile, geometry)
    return grad_input
