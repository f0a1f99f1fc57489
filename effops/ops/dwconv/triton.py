"""Triton kernels of room dwconv.

A cell is ROWS output pixels below each other; cells are numbered row by row through the batch. One program:

    channels ->                               BLOCK_M cells x BLOCK_C channels, all sums in registers. Down a column of
    cells  +------+------+------+             the window each row of x is loaded once and added to every row of the
      |    | 0    | 1    | 2    |             cell that it reaches: (ROWS + 2) * 3 loads for ROWS outputs of a 3x3
      v    +------+------+------+             window at stride 1, 4.5 an output at ROWS = 4 instead of 9.
           | 3    | 4    | 5    |             channels_last: a thread's 16 bytes are channels of a pixel; NCHW:
           +------+------+------+             BLOCK_C = 1 and a warp's lanes are pixels of a row.

kernel               reads                               writes                              bytes an output (fp16, s1)
forward              x (residual)                        y                                   4 (6)
epilogue gradient    grad, x or the saved output         du, partial sums of the vectors     6
input gradient       du; a cell is ROWS x stride pixels  dx                                  4
weight gradient      du, x                               partial [blocks, taps, channels]    4
statistics           x                                   count, mean, squares [blocks, D]    2
statistics gradient  x                                   du in float32                       6

Each element once plus the window's halo, which neighbouring programs share in L2; the shifted loads of one program hit
L1. Programs of gradients and statistics take several tiles and leave one line of partial results each, which a second
kernel sums in a fixed order. Windows looped over (see the table) load x once a tap, from L1. The weight gradient reads
du and x once for windows of up to 49 taps: above 25 the lanes of a program share them; a larger window's are shared
among programs too, up to 112 each.

Roofline, calculated for an H200 (4.3 TB/s), nothing measured: forward of fp16 [128,128,56,56], 3x3, stride 1: 206 MB,
48 us, 0.9 GFLOP (19 TFLOP/s at that time, on the FMA units); [128,512,14,14]: 51 MB, 12 us. Unverified on a GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from effops.ops import geometry as G
from effops.ops import triton_launch as L
from effops.ops.dwconv.triton_configs import configs as configs  # the ahead-of-time check looks for it here
from effops.ops.dwconv.triton_configs import steps_of, tile, weight_tile
from effops.ops.epilogue import NONE
from effops.ops.registration import fake_output
from effops.ops.triton_device import (
    Affine,
    Sizes,
    accumulator,
    add_window,
    block_of,
    cells_of,
    channels_of,
    depthwise_tile,
    epilogue,
    epilogue_gradient,
    load_tile,
    load_vector,
    offset_at,
    offset_count,
    own_cells,
    put,
    slope_from_output,
    store_tile,
    store_vector,
    tap_between,
    tap_vector,
    zero_tiles,
)
from effops.ops.triton_sum import partials, sum_partials

# ---- device: tiles --------------------------------------------------------------------------------------------------


@triton.jit
def _sums(
    x, weight, n, p, q, inside, o, live, sizes,
    WINDOW: tl.constexpr, ROWS: tl.constexpr, UNROLLED: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """The depthwise sums of output pixels (p + i, q), i < ROWS, as a tuple of tiles; ROWS is 1 unless UNROLLED."""
    if UNROLLED:
        u = zero_tiles(ROWS, n.shape[0], o.shape[0], accumulator(x.data.dtype.element_ty))
        h = p * WINDOW.SH - WINDOW.TOP
        w = q * WINDOW.SW - WINDOW.LEFT
        u = add_window(
            u, x, weight, n, h, w, inside, o // WINDOW.MULT, o, live, sizes, WINDOW, ROWS, 1, False, VEC
        )  # fmt: skip
    else:
        u = (depthwise_tile(x, weight, n, p, q, inside, o, live, sizes, WINDOW, VEC, 9),)  # nine taps in flight
    return u


# ---- forward --------------------------------------------------------------------------------------------------------


@triton.jit
def _forward_kernel(
    x, weight, affine, residual, y, sizes, cells,
    WINDOW: tl.constexpr, CHAIN: tl.constexpr, WIDE: tl.constexpr, VEC: tl.constexpr,
    UNROLLED: tl.constexpr, ROWS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    n, p, q, inside, o, live = own_cells(sizes, cells, ROWS, 1, WIDE, VEC, BLOCK_M, BLOCK_C)
    u = _sums(x, weight, n, p, q, inside, o, live, sizes, WINDOW, ROWS, UNROLLED, VEC)
    for i in tl.static_range(ROWS):
        mask = (inside & (p + i < sizes.P))[:, None] & live[None, :]
        added = None
        if residual.data is not None:
            added = load_tile(residual, n, p + i, q, o, mask, VEC)
        store_tile(y, n, p + i, q, o, epilogue(u[i], affine, added, o, live, CHAIN), mask, VEC)


# ---- input gradient -------------------------------------------------------------------------------------------------


@triton.jit
def gather_taps(
    u, grad, weight, n, h, w, inside, c, live, sizes, WINDOW: tl.constexpr, VEC: tl.constexpr
):  # fmt: skip
    """The input gradient of one pixel (h, w) a lane, in a loop over the taps: for windows too large to unroll."""
    taps: tl.constexpr = WINDOW.R * WINDOW.S
    products: tl.constexpr = taps * WINDOW.MULT
    for k in range(products):
        tap = k % taps
        o = c
        if WINDOW.MULT > 1:  # else a channel number that is known to be aligned
            o = c * WINDOW.MULT + k // taps
        y = h + WINDOW.TOP - tap // WINDOW.S * WINDOW.DH
        x = w + WINDOW.LEFT - tap % WINDOW.S * WINDOW.DW
        p = y // WINDOW.SH
        q = x // WINDOW.SW
        reached = (y >= 0) & (x >= 0) & (y % WINDOW.SH == 0) & (x % WINDOW.SW == 0) & (p < sizes.H) & (q < sizes.W)
        mask = (inside & reached)[:, None] & live[None, :]
        value = load_tile(grad, n, p, q, o, mask, VEC).to(u.dtype)
        u += value * tap_vector(weight, o, live, tap, WINDOW, u.dtype)[None, :]
    return u


@triton.jit
def _input_gradient_kernel(
    grad, weight, dx, sizes, cells,
    WINDOW: tl.constexpr, WIDE: tl.constexpr, VEC: tl.constexpr,
    UNROLLED: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    # sizes: H and W are those of the sums, P and Q those of the input, D the input's channels.
    multiplier: tl.constexpr = WINDOW.MULT
    n, h, w, inside, c, live = own_cells(sizes, cells, ROWS, COLS, WIDE, VEC, BLOCK_M, BLOCK_C)
    u = zero_tiles(ROWS * COLS, BLOCK_M, BLOCK_C, accumulator(dx.data.dtype.element_ty))
    if UNROLLED:
        for j in range(multiplier):
            o = c * WINDOW.MULT + j
            u = add_window(
                u, grad, weight, n, h // WINDOW.SH, w // WINDOW.SW, inside, o, o, live, sizes,
                WINDOW, ROWS, COLS, True, VEC,
            )  # fmt: skip
    else:
        u = (gather_taps(u[0], grad, weight, n, h, w, inside, c, live, sizes, WINDOW, VEC),)
    for i in tl.static_range(ROWS):
        for j in tl.static_range(COLS):
            mask = (inside & (h + i < sizes.P) & (w + j < sizes.Q))[:, None] & live[None, :]
            store_tile(dx, n, h + i, w + j, c, u[i * COLS + j], mask, VEC)


# ---- weight gradient ------------------------------------------------------------------------------------------------
#
# A thread keeps a sum for each of its elements and taps. Where the window has too many, its taps are cut into groups of
# GROUP_R x GROUP_S, and PARTS groups lie side by side in a program: each part of the tile's lanes has the sums of one
# group, at the same cells as every other part, so that the program still reads the maps once. 7x7, four parts of 2x7:
#
#     lanes ->   | cells, rows 0 1 | the same, rows 2 3 | the same, rows 4 5 | the same, row 6 |
#
# 14 sums an element instead of 49 leave room for 16-byte accesses and two rows a cell. What it costs: the parts load du
# each, three of the four loads from L1, and an eighth of the sums, of a row that is none, is for nothing.


@triton.constexpr_function
def _group_of(window, rows, columns):
    """The first fields of a window, of the group of its taps that begins at its origin."""
    return (rows, columns, *window[2:8])  # not TAPS: Triton 3.9 passes no tuple on that has a None in it


@triton.jit
def _first_tap(group, WINDOW: tl.constexpr, GROUP_R: tl.constexpr, GROUP_S: tl.constexpr):
    """Row and column in the window of the first tap of a group; the groups are numbered row by row."""
    columns: tl.constexpr = tl.cdiv(WINDOW.S, GROUP_S)
    return group // columns * GROUP_R, group % columns * GROUP_S


@triton.jit
def _add_product(sums, TAP: tl.constexpr, g, value):
    if TAP >= 0:
        sums = put(sums, TAP, sums[TAP] + g * value)
    return sums


@triton.jit
def _add_products(
    sums, grad, x, n, p, q, inside, row, column, o, live, sizes,
    WINDOW: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """sums[tap] += grad * the input pixel under that tap, for ROWS output rows; each input tile once.

    Args:
        row, column: the first tap of each lane's group in the window; None where the group is the window.
    """
    g = ()
    for i in tl.static_range(ROWS):
        mask = (inside & (p + i < sizes.P))[:, None] & live[None, :]
        g = g + (load_tile(grad, n, p + i, q, o, mask, VEC).to(sums[0].dtype),)
    top = p * WINDOW.SH - WINDOW.TOP
    left = q * WINDOW.SW - WINDOW.LEFT
    if row is not None:
        top += row * WINDOW.DH
        left += column * WINDOW.DW
    for dx in tl.static_range(offset_count(1, GROUP, False, False)):
        w = left + offset_at(dx, 1, GROUP, False, False)
        in_columns = inside & (w >= 0) & (w < sizes.W)
        if row is not None:  # the window may end inside a group
            in_columns = in_columns & (w <= q * WINDOW.SW - WINDOW.LEFT + (WINDOW.S - 1) * WINDOW.DW)
        for dy in tl.static_range(offset_count(ROWS, GROUP, True, False)):
            h = top + offset_at(dy, ROWS, GROUP, True, False)
            in_map = in_columns & (h >= 0) & (h < sizes.H)
            if row is not None:
                in_map = in_map & (h <= (p + (ROWS - 1)) * WINDOW.SH - WINDOW.TOP + (WINDOW.R - 1) * WINDOW.DH)
            value = load_tile(x, n, h, w, o // WINDOW.MULT, in_map[:, None] & live[None, :], VEC).to(sums[0].dtype)
            for i in tl.static_range(ROWS):
                sums = _add_product(sums, tap_between(i, 0, dy, dx, ROWS, 1, GROUP, False), g[i], value)
    return sums


@triton.jit
def _store_groups(
    lines, sums, first_group, o, live, COUNT,
    WINDOW: tl.constexpr, GROUP_R: tl.constexpr, GROUP_S: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """lines[tap, o] = the sums of each part's group over its lanes."""
    row, column = _first_tap(first_group + tl.arange(0, PARTS), WINDOW, GROUP_R, GROUP_S)
    for k in tl.static_range(GROUP_R * GROUP_S):
        r = row + k // GROUP_S
        s = column + k % GROUP_S
        total = tl.sum(tl.reshape(sums[k], (PARTS, sums[k].shape[0] // PARTS, o.shape[0])), 1)
        mask = ((r < WINDOW.R) & (s < WINDOW.S))[:, None] & live[None, :]
        tl.store(lines + (((r * WINDOW.S + s) * COUNT)[:, None] + o[None, :]), total, mask=mask)


@triton.jit
def _weight_gradient_kernel(
    grad, x, partial, sizes, cells, steps,
    WINDOW: tl.constexpr, WIDE: tl.constexpr, VEC: tl.constexpr,
    GROUP_R: tl.constexpr, GROUP_S: tl.constexpr, PARTS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    taps: tl.constexpr = WINDOW.R * WINDOW.S
    rounds: tl.constexpr = tl.cdiv(tl.cdiv(WINDOW.R, GROUP_R) * tl.cdiv(WINDOW.S, GROUP_S), PARTS)
    split: tl.constexpr = taps > GROUP_R * GROUP_S
    group: tl.constexpr = _group_of(WINDOW, GROUP_R, GROUP_S)
    cells_at_once: tl.constexpr = BLOCK_M // PARTS
    channel_blocks = tl.cdiv(sizes.D, BLOCK_C)
    o, live = channels_of(tl.program_id(0) % channel_blocks, sizes.D, BLOCK_C, WIDE, VEC)
    first_group = tl.program_id(0) // channel_blocks % rounds * PARTS
    block = tl.program_id(0) // channel_blocks // rounds
    row = None
    column = None
    cell = tl.arange(0, BLOCK_M)
    if split:
        row, column = _first_tap(first_group + cell // cells_at_once, WINDOW, GROUP_R, GROUP_S)
        cell = cell % cells_at_once
    sums = zero_tiles(GROUP_R * GROUP_S, BLOCK_M, BLOCK_C, partial.dtype.element_ty)
    for step in range(steps):
        first = block * steps + step
        if WIDE:
            first = first.to(tl.int64)
        m = first * cells_at_once + cell
        n, p, q = cells_of(m, sizes, ROWS, 1)
        sums = _add_products(
            sums, grad, x, n, p, q, m < cells, row, column, o, live, sizes,
            WINDOW, group, ROWS, VEC,
        )  # fmt: skip
    lines = partial + block.to(tl.int64) * taps * sizes.D
    if split:
        _store_groups(lines, sums, first_group, o, live, sizes.D, WINDOW, GROUP_R, GROUP_S, PARTS)
    else:
        for k in tl.static_range(taps):
            tl.store(lines + (k * sizes.D + o), tl.sum(sums[k], 0), mask=live)


# ---- gradient at the sums -------------------------------------------------------------------------------------------


@triton.jit
def _add_to(total, value, wanted):
    """A [channels] vector plus the tile's sums over its pixels; unchanged where `wanted` is None."""
    if wanted is not None:
        total += tl.sum(value, 0)
    return total


@triton.jit
def _epilogue_gradient_kernel(
    grad, output, x, weight, affine, residual, du, grad_residual, partial, sizes, cells, steps,
    WINDOW: tl.constexpr, CHAIN: tl.constexpr, RECOMPUTE: tl.constexpr, WIDE: tl.constexpr, VEC: tl.constexpr,
    UNROLLED: tl.constexpr, ROWS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    acc: tl.constexpr = accumulator(x.data.dtype.element_ty)
    channel_blocks = tl.cdiv(sizes.D, BLOCK_C)
    o, live = channels_of(tl.program_id(0) % channel_blocks, sizes.D, BLOCK_C, WIDE, VEC)
    block = tl.program_id(0) // channel_blocks
    zero = tl.zeros((BLOCK_C,), acc)
    totals = Affine(zero, zero, zero)
    for step in range(steps):
        m = block_of(block * steps + step, BLOCK_M, WIDE)
        inside = m < cells
        n, p, q = cells_of(m, sizes, ROWS, 1)
        if RECOMPUTE:
            u = _sums(x, weight, n, p, q, inside, o, live, sizes, WINDOW, ROWS, UNROLLED, VEC)
        for i in tl.static_range(ROWS):
            mask = (inside & (p + i < sizes.P))[:, None] & live[None, :]
            g = load_tile(grad, n, p + i, q, o, mask, VEC).to(acc)
            if output.data is not None:
                g *= slope_from_output(
                    load_tile(output, n, p + i, q, o, mask, VEC).to(acc), CHAIN.ACT, CHAIN.SLOPE
                )  # fmt: skip
                totals = Affine(_add_to(totals.bias, g, partial.bias), totals.scale, totals.shift)
                d = g
            else:
                sums = None
                if RECOMPUTE:
                    sums = u[i]
                added = None
                if residual.data is not None:
                    added = load_tile(residual, n, p + i, q, o, mask, VEC)
                d, g, product = epilogue_gradient(g, sums, affine, added, o, live, CHAIN)
                totals = Affine(
                    _add_to(totals.bias, d, partial.bias),
                    _add_to(totals.scale, product, partial.scale),
                    _add_to(totals.shift, g, partial.shift),
                )
            if du.data is not None:
                store_tile(du, n, p + i, q, o, d, mask, VEC)
            if grad_residual.data is not None:
                store_tile(grad_residual, n, p + i, q, o, g, mask, VEC)
    store_vector(partial.bias, block, sizes.D, o, live, totals.bias)
    store_vector(partial.scale, block, sizes.D, o, live, totals.scale)
    store_vector(partial.shift, block, sizes.D, o, live, totals.shift)


# ---- statistics -----------------------------------------------------------------------------------------------------


@triton.jit
def _statistics_kernel(
    x, weight, bias, counts, means, squares, sizes, cells, steps,
    WINDOW: tl.constexpr, WIDE: tl.constexpr, VEC: tl.constexpr,
    UNROLLED: tl.constexpr, ROWS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Of a program's pixels: their number, the mean of the sums, and the squares of their distances from it.

    Float64 beyond a thread's own pixels: a long chain in float32 would be worse than torch's.
    """
    acc: tl.constexpr = accumulator(x.data.dtype.element_ty)
    channel_blocks = tl.cdiv(sizes.D, BLOCK_C)
    o, live = channels_of(tl.program_id(0) % channel_blocks, sizes.D, BLOCK_C, WIDE, VEC)
    block = tl.program_id(0) // channel_blocks
    count = tl.zeros((1,), tl.float64)
    mean = tl.zeros((BLOCK_C,), tl.float64)
    square = tl.zeros((BLOCK_C,), tl.float64)
    for step in range(steps):
        m = block_of(block * steps + step, BLOCK_M, WIDE)
        inside = m < cells
        n, p, q = cells_of(m, sizes, ROWS, 1)
        u = _sums(x, weight, n, p, q, inside, o, live, sizes, WINDOW, ROWS, UNROLLED, VEC)
        total = tl.zeros((BLOCK_M, BLOCK_C), acc)
        pixels = tl.zeros((BLOCK_M,), acc)
        for i in tl.static_range(ROWS):  # a pixel that does not exist has a sum of zero: the map is masked
            exists = inside & (p + i < sizes.P)
            total += tl.where(exists[:, None], u[i], 0.0)
            pixels += exists.to(acc)
        found = tl.sum(pixels.to(tl.float64), 0)
        own = tl.sum(total.to(tl.float64), 0) / tl.maximum(found, 1)
        spread = tl.zeros((BLOCK_M, BLOCK_C), acc)
        for i in tl.static_range(ROWS):
            distance = tl.where((inside & (p + i < sizes.P))[:, None], u[i] - own.to(acc)[None, :], 0.0)
            spread += distance * distance
        # Chan, Golub and LeVeque: no difference of large numbers, as sums of squares would need.
        delta = own - mean
        after = tl.maximum(count + found, 1)
        mean += delta * (found / after)
        square += tl.sum(spread.to(tl.float64), 0) + delta * delta * (count * found / after)
        count += found
    if bias is not None:
        mean += load_vector(bias, o, live, tl.float64)
    at = block.to(tl.int64) * sizes.D + o
    tl.store(counts + at, count + tl.zeros((BLOCK_C,), tl.float64), mask=live)
    tl.store(means + at, mean, mask=live)
    tl.store(squares + at, square, mask=live)


@triton.jit
def _combine_statistics_kernel(
    counts, means, squares, mean_out, var_out, blocks, channels, BLOCK_ROWS: tl.constexpr, BLOCK_C: tl.constexpr
):
    """The overall mean first, then every block's squares about it: two passes over partial results alone."""
    acc: tl.constexpr = means.dtype.element_ty
    o = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    live = (o < channels)[None, :]
    total = tl.zeros((BLOCK_ROWS, BLOCK_C), acc)
    number = tl.zeros((BLOCK_ROWS, BLOCK_C), acc)
    for first in range(0, blocks, BLOCK_ROWS):
        row = first + tl.arange(0, BLOCK_ROWS)
        at = row.to(tl.int64)[:, None] * channels + o[None, :]
        mask = (row < blocks)[:, None] & live
        count = tl.load(counts + at, mask=mask, other=0.0)
        number += count
        total += count * tl.load(means + at, mask=mask, other=0.0)
    pixels = tl.sum(number, 0)
    mean = tl.sum(total, 0) / pixels
    square = tl.zeros((BLOCK_ROWS, BLOCK_C), acc)
    for first in range(0, blocks, BLOCK_ROWS):
        row = first + tl.arange(0, BLOCK_ROWS)
        at = row.to(tl.int64)[:, None] * channels + o[None, :]
        mask = (row < blocks)[:, None] & live
        delta = tl.load(means + at, mask=mask, other=0.0) - mean[None, :]
        square += tl.load(squares + at, mask=mask, other=0.0)
        square += tl.load(counts + at, mask=mask, other=0.0) * delta * delta
    tl.store(mean_out + o, mean, mask=o < channels)
    tl.store(var_out + o, tl.sum(square, 0) / pixels, mask=o < channels)


@triton.jit
def _statistics_gradient_kernel(
    grad_mean, grad_var, mean, x, weight, bias, du, sizes, cells, pixels,
    WINDOW: tl.constexpr, WIDE: tl.constexpr, VEC: tl.constexpr,
    UNROLLED: tl.constexpr, ROWS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """du = (grad_mean + 2 grad_var (u - mean)) / pixels."""
    acc: tl.constexpr = mean.dtype.element_ty
    n, p, q, inside, o, live = own_cells(sizes, cells, ROWS, 1, WIDE, VEC, BLOCK_M, BLOCK_C)
    u = _sums(x, weight, n, p, q, inside, o, live, sizes, WINDOW, ROWS, UNROLLED, VEC)
    centre = load_vector(mean, o, live, acc)
    if bias is not None:
        centre -= load_vector(bias, o, live, acc)
    offset = load_vector(grad_mean, o, live, acc) / pixels
    slope = 2 * load_vector(grad_var, o, live, acc) / pixels
    for i in tl.static_range(ROWS):
        mask = (inside & (p + i < sizes.P))[:, None] & live[None, :]
        store_tile(du, n, p + i, q, o, offset[None, :] + slope[None, :] * (u[i] - centre[None, :]), mask, VEC)


# ---- host -----------------------------------------------------------------------------------------------------------


def _cells(n: int, p: int, q: int, rows: int, cols: int) -> int:
    return n * triton.cdiv(p, rows) * triton.cdiv(q, cols)


def dwconv_fwd(
    input: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None, shift: Tensor | None,
    residual: Tensor | None, geometry: list[int], slope: float,
) -> Tensor:  # fmt: skip
    """The operator `dwconv_fwd` of schemas.inc."""
    sizes, window = L.sizes_of(input, weight, geometry), L.window_of(weight, geometry)
    output = fake_output(input, (input.shape[0], sizes.D, sizes.P, sizes.Q), geometry)
    maps = (input, residual, output)
    wide = L.needs_wide(maps, sizes, window)
    t = tile("forward", input, sizes.D, window, geometry[G.CHANNELS_LAST], wide)
    cells = _cells(input.shape[0], sizes.P, sizes.Q, t.ROWS, 1)
    vec = L.vector_width(maps, (input.shape[1], sizes.D))
    bank, window = L.bank_of(weight, window, sizes, vec)
    L.launch(
        _forward_kernel, triton.cdiv(cells, t.BLOCK_M) * triton.cdiv(sizes.D, t.BLOCK_C), input,
        L.as_map(input), bank, L.affine(bias, scale, shift), L.as_map(residual), L.as_map(output), sizes, cells,
        WINDOW=window, CHAIN=L.depthwise_chain(geometry, slope), WIDE=wide, VEC=vec,
        **t._asdict(),
    )  # fmt: skip
    return output


def input_gradient(
    grad: Tensor, weight: Tensor, input: Tensor, geometry: list[int], into: Tensor | None = None
) -> Tensor:  # fmt: skip
    """Gradient of the depthwise convolution's input from the gradient of its sums.

    Args:
        grad: [N,D,P,Q], gradient of the sums before bias; any strides and floating dtype (it may be float32 beside
            half maps).
        weight: [B,1,R,S], any strides.
        input: only its shape, dtype and device are read.
        geometry: the ints of schemas.inc, of either room.
        into: where it goes, [N,C,H,W] in the input's dtype, any strides; None: a new map in the geometry's format.

    Returns:
        That map. Sums are float32 (float64 for float64).
    """
    n, c, h, w = input.shape
    window = L.window_of(weight, geometry)
    dx = fake_output(input, input.shape, geometry) if into is None else into
    sizes = Sizes(grad.shape[2], grad.shape[3], h, w, n * h * w, c)
    maps = (grad, dx)
    wide = L.needs_wide(maps, sizes, window)
    t = tile("input_gradient", grad, c, window, geometry[G.CHANNELS_LAST], wide)
    cols = window.SW if t.UNROLLED else 1
    cells = _cells(n, h, w, t.ROWS, cols)
    vec = L.vector_width(maps, (c, grad.shape[1]))
    packs = t.UNROLLED and window.MULT == 1  # else the taps of a thread's channels do not lie side by side
    bank, window = L.bank_of(weight, window, sizes, vec if packs else 1)
    L.launch(
        _input_gradient_kernel, triton.cdiv(cells, t.BLOCK_M) * triton.cdiv(c, t.BLOCK_C), input,
        L.as_map(grad), bank, L.as_map(dx), sizes, cells,
        WINDOW=window, WIDE=wide, VEC=vec, COLS=cols, **t._asdict(),
    )  # fmt: skip
    return dx


def weight_gradient(grad: Tensor, input: Tensor, weight: Tensor, geometry: list[int]) -> Tensor:
    """Gradient of the depthwise convolution's weight from the gradient of its sums; deterministic.

    Args:
        grad: as for `input_gradient`.
        input: [N,C,H,W], any strides.
        weight: only its shape, dtype and device are read.
        geometry: the ints of schemas.inc, of either room.

    Returns:
        [B,1,R,S], contiguous, in the weight's dtype: summed over pixels and over the channels o with o mod B = b in
        float32 (float64 for float64), rounded once.
    """
    sizes, window = L.sizes_of(input, weight, geometry), L.window_of(weight, geometry)._replace(TAPS=None)
    maps = (grad, input)
    wide = L.needs_wide(maps, sizes, window)
    t = weight_tile(input, sizes.D, window, geometry[G.CHANNELS_LAST], wide)
    rounds = t.rounds(window)
    cells = _cells(input.shape[0], sizes.P, sizes.Q, t.ROWS, 1)
    channel_blocks = triton.cdiv(sizes.D, t.BLOCK_C)
    # A program leaves a sum a tap: of a large window they would be more bytes than the maps, were programs as many.
    steps = steps_of(triton.cdiv(cells, t.cells), channel_blocks * t.PARTS * rounds)
    blocks = triton.cdiv(cells, t.cells * steps)
    partial = partials(input, blocks, window.R * window.S, sizes.D)
    L.launch(
        _weight_gradient_kernel, blocks * rounds * channel_blocks, input,
        L.as_map(grad), L.as_map(input), partial, sizes, cells, steps,
        WINDOW=window, WIDE=wide, VEC=L.vector_width(maps, (input.shape[1], sizes.D)), **t._asdict(),
    )  # fmt: skip
    return sum_partials(partial, torch.empty(weight.shape, dtype=weight.dtype, device=weight.device))


def _epilogue_gradient(
    grad: Tensor, output: Tensor | None, input: Tensor, weight: Tensor, vectors: tuple[Tensor | None, ...],
    residual: Tensor | None, geometry: list[int], slope: float, wanted: tuple[bool, ...],
) -> tuple[Tensor | None, list[Tensor | None]]:  # fmt: skip
    """Gradients at the sums and of bias, scale, shift, residual, each None unless wanted.

    Args:
        vectors: bias, scale, shift.
        wanted: whether each of sums, bias, scale, shift and residual needs its gradient.
    """
    sizes, window = L.sizes_of(input, weight, geometry), L.window_of(weight, geometry)
    chain = L.depthwise_chain(geometry, slope)
    recompute = output is None and (chain.ACT != NONE or chain.POST != NONE or wanted[2])
    shape = (input.shape[0], sizes.D, sizes.P, sizes.Q)
    du = fake_output(input, shape, geometry) if wanted[0] else None
    grad_residual = fake_output(residual, shape, geometry) if wanted[4] else None
    maps = (grad, output, input, residual if chain.POST != NONE else None, du, grad_residual)
    wide = L.needs_wide(maps, sizes, window)
    t = tile("epilogue_gradient", input, sizes.D, window, geometry[G.CHANNELS_LAST], wide)
    if not recompute:
        t = t._replace(ROWS=1)
    cells, channel_blocks = _cells(input.shape[0], sizes.P, sizes.Q, t.ROWS, 1), triton.cdiv(sizes.D, t.BLOCK_C)
    steps = steps_of(triton.cdiv(cells, t.BLOCK_M), channel_blocks)
    blocks = triton.cdiv(cells, t.BLOCK_M * steps)
    partial = [partials(input, blocks, 1, sizes.D) if want else None for want in wanted[1:4]]
    vec = L.vector_width(maps, (input.shape[1], sizes.D))
    bank, window = L.bank_of(weight, window, sizes, vec if recompute else 1)
    L.launch(
        _epilogue_gradient_kernel, blocks * channel_blocks, input,
        L.as_map(grad), L.as_map(output), L.as_map(input), bank, L.affine(*vectors), L.as_map(maps[3]),
        L.as_map(du), L.as_map(grad_residual), Affine(*partial), sizes, cells, steps,
        WINDOW=window, CHAIN=chain, RECOMPUTE=recompute, WIDE=wide, VEC=vec,
        **t._asdict(),
    )  # fmt: skip
    sums = [
        None if p is None else sum_partials(p, torch.empty(v.shape, dtype=v.dtype, device=v.device))
        for p, v in zip(partial, vectors, strict=True)
    ]
    return du, [*sums, grad_residual]


def dwconv_bwd(
    grad_output: Tensor, output: Tensor | None, input: Tensor, weight: Tensor, bias: Tensor | None,
    scale: Tensor | None, shift: Tensor | None, residual: Tensor | None, geometry: list[int], slope: float, mask: int,
) -> list[Tensor]:  # fmt: skip
    """The operator `dwconv_bwd` of schemas.inc."""
    wants = [bool(mask >> bit & 1) for bit in range(6)]
    linear = geometry[G.ACTIVATION] == NONE and geometry[G.POST_ACTIVATION] == NONE and scale is None
    sums_wanted = wants[0] or wants[1]
    du, others = grad_output, [None] * 4
    if any(wants[2:]) or (sums_wanted and not linear):
        found, others = _epilogue_gradient(
            grad_output, output, input, weight, (bias, scale, shift), residual, geometry, slope,
            (sums_wanted and not linear, *wants[2:]),
        )  # fmt: skip
        du = grad_output if linear else found
    gradients = [
        input_gradient(du, weight, input, geometry) if wants[0] else None,
        weight_gradient(du, input, weight, geometry) if wants[1] else None,
        *others,
    ]
    return [gradient for gradient in gradients if gradient is not None]


def dwconv_stats(input: Tensor, weight: Tensor, bias: Tensor | None, geometry: list[int]) -> tuple[Tensor, Tensor]:
    """The operator `dwconv_stats` of schemas.inc."""
    sizes, window = L.sizes_of(input, weight, geometry), L.window_of(weight, geometry)
    wide = L.needs_wide((input,), sizes, window)
    t = tile("statistics", input, sizes.D, window, geometry[G.CHANNELS_LAST], wide)
    cells, channel_blocks = _cells(input.shape[0], sizes.P, sizes.Q, t.ROWS, 1), triton.cdiv(sizes.D, t.BLOCK_C)
    steps = steps_of(triton.cdiv(cells, t.BLOCK_M), channel_blocks)
    blocks = triton.cdiv(cells, t.BLOCK_M * steps)
    counts, means, squares = torch.empty((3, blocks, sizes.D), dtype=torch.float64, device=input.device)
    vec = L.vector_width((input,), (input.shape[1], sizes.D))
    bank, window = L.bank_of(weight, window, sizes, vec)
    L.launch(
        _statistics_kernel, blocks * channel_blocks, input,
        L.as_map(input), bank, L.vector(bias), counts, means, squares, sizes, cells, steps,
        WINDOW=window, WIDE=wide, VEC=vec, **t._asdict(),
    )  # fmt: skip
    dtype = torch.float64 if input.dtype == torch.float64 else torch.float32
    mean = torch.empty(sizes.D, dtype=dtype, device=input.device)
    var = torch.empty_like(mean)
    L.launch(
        _combine_statistics_kernel, triton.cdiv(sizes.D, 16), input,
        counts, means, squares, mean, var, blocks, sizes.D, BLOCK_ROWS=64, BLOCK_C=16, num_warps=4,
    )  # fmt: skip
    return mean, var


def dwconv_stats_bwd(
    grad_mean: Tensor, grad_var: Tensor, mean: Tensor, input: Tensor, weight: Tensor, bias: Tensor | None,
    geometry: list[int], mask: int,
) -> list[Tensor]:  # fmt: skip
    """The operator `dwconv_stats_bwd` of schemas.inc."""
    gradients = []
    if mask & 3:
        du = _statistics_gradient(grad_mean, grad_var, mean, input, weight, bias, geometry)
        if mask & 1:
            gradients.append(input_gradient(du, weight, input, geometry))
        if mask & 2:
            gradients.append(weight_gradient(du, input, weight, geometry))
    if mask & 4:  # the bias moves the mean and nothing else
        pixels = L.sizes_of(input, weight, geometry).M
        gradients.append(grad_mean.to(bias.dtype, copy=True) if pixels else torch.zeros_like(bias))
    return gradients


def _statistics_gradient(
    grad_mean: Tensor, grad_var: Tensor, mean: Tensor, input: Tensor, weight: Tensor, bias: Tensor | None,
    geometry: list[int],
) -> Tensor:  # fmt: skip
    """Gradient at the sums, float32 (float64 for float64): divided by the pixels' number, half types would lose it."""
    sizes, window = L.sizes_of(input, weight, geometry), L.window_of(weight, geometry)
    du = torch.empty(
        (input.shape[0], sizes.D, sizes.P, sizes.Q), dtype=mean.dtype, device=input.device,
        memory_format=G.memory_format(geometry[G.CHANNELS_LAST]),
    )  # fmt: skip
    maps = (input, du)
    wide = L.needs_wide(maps, sizes, window)
    t = tile("forward", input, sizes.D, window, geometry[G.CHANNELS_LAST], wide)
    cells = _cells(input.shape[0], sizes.P, sizes.Q, t.ROWS, 1)
    vec = L.vector_width(maps, (input.shape[1], sizes.D))
    bank, window = L.bank_of(weight, window, sizes, vec)
    L.launch(
        _statistics_gradient_kernel, triton.cdiv(cells, t.BLOCK_M) * triton.cdiv(sizes.D, t.BLOCK_C), input,
        L.vector(grad_mean), L.vector(grad_var), L.vector(mean), L.as_map(input), bank, L.vector(bias), L.as_map(du),
        sizes, cells, sizes.M,
        WINDOW=window, WIDE=wide, VEC=vec, **t._asdict(),
    )  # fmt: skip
    return du
