"""Triton kernels of room dwconv.

forward      one program: BLOCK_M pixels x BLOCK_C channels of the output, pixels numbered through the batch

             channels ->                      for each tap: a [pixels, channels] tile of x, shifted by the tap,
     pixels  +------+------+------+           times the tap's vector; sums in registers, epilogue, one store
        |    | 0    | 1    | 2    |
        v    +------+------+------+           x: once from memory (the shifted loads of a window hit L1 / L2, and
             | 3    | 4    | 5    |              channel blocks of the same pixels run side by side)
             +------+------+------+           y: once
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from effops.ops import geometry as G
from effops.ops import triton_launch as L
from effops.ops.dwconv import fake_output
from effops.ops.epilogue import NONE
from effops.ops.triton_device import (
    Affine,
    Sizes,
    Window,
    accumulator,
    activate,
    activation_slope,
    add_window,
    block_of,
    cells_of,
    channels_of,
    depthwise_tile,
    epilogue,
    load_tile,
    load_vector,
    offset_at,
    offset_count,
    put,
    slope_from_output,
    store_tile,
    tap_between,
    tap_vector,
    window_pixels,
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
        u = (depthwise_tile(x, weight, n, p, q, inside, o, live, sizes, WINDOW, VEC),)
    return u


# ---- forward --------------------------------------------------------------------------------------------------------


@triton.jit
def _forward_kernel(
    x, weight, affine, residual, y, sizes, cells,
    WINDOW: tl.constexpr, CHAIN: tl.constexpr, WIDE: tl.constexpr, VEC: tl.constexpr,
    UNROLLED: tl.constexpr, ROWS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    channel_blocks = tl.cdiv(sizes.D, BLOCK_C)
    m = block_of(tl.program_id(0) // channel_blocks, BLOCK_M, WIDE)
    o, live = channels_of(tl.program_id(0) % channel_blocks, sizes, BLOCK_C, VEC)
    inside = m < cells
    n, p, q = cells_of(m, sizes, ROWS, 1)
    u = _sums(x, weight, n, p, q, inside, o, live, sizes, WINDOW, ROWS, UNROLLED, VEC)
    for i in tl.static_range(ROWS):
        mask = (inside & (p + i < sizes.P))[:, None] & live[None, :]
        added = None
        if residual.data is not None:
            added = load_tile(residual, n, p + i, q, o, mask, VEC)
        store_tile(y, n, p + i, q, o, epilogue(u[i], affine, added, o, live, CHAIN), mask, VEC)


# ---- input gradient -------------------------------------------------------------------------------------------------


@triton.jit
def _gather_taps(
    u, grad, weight, n, h, w, inside, c, live, sizes, WINDOW: tl.constexpr, VEC: tl.constexpr
):  # fmt: skip
    """The input gradient of one pixel (h, w) a lane, in a loop over the taps: for windows too large to unroll."""
    taps: tl.constexpr = WINDOW.R * WINDOW.S
    products: tl.constexpr = taps * WINDOW.MULT
    for k in range(products):
        tap = k % taps
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
    channel_blocks = tl.cdiv(sizes.D, BLOCK_C)
    m = block_of(tl.program_id(0) // channel_blocks, BLOCK_M, WIDE)
    c, live = channels_of(tl.program_id(0) % channel_blocks, sizes, BLOCK_C, VEC)
    inside = m < cells
    n, h, w = cells_of(m, sizes, ROWS, COLS)
    u = zero_tiles(ROWS * COLS, BLOCK_M, BLOCK_C, accumulator(dx.data.dtype.element_ty))
    if UNROLLED:
        for j in range(multiplier):
            o = c * WINDOW.MULT + j
            u = add_window(
                u, grad, weight, n, h // WINDOW.SH, w // WINDOW.SW, inside, o, o, live, sizes,
                WINDOW, ROWS, COLS, True, VEC,
            )  # fmt: skip
    else:
        u = (_gather_taps(u[0], grad, weight, n, h, w, inside, c, live, sizes, WINDOW, VEC),)
    for i in tl.static_range(ROWS):
        for j in tl.static_range(COLS):
            mask = (inside & (h + i < sizes.P) & (w + j < sizes.Q))[:, None] & live[None, :]
            store_tile(dx, n, h + i, w + j, c, u[i * COLS + j], mask, VEC)


# ---- weight gradient ------------------------------------------------------------------------------------------------


@triton.jit
def _add_product(sums, TAP: tl.constexpr, g, value):
    if TAP >= 0:
        sums = put(sums, TAP, sums[TAP] + g * value)
    return sums


@triton.jit
def _add_products(
    sums, grad, x, n, p, q, inside, o, live, sizes,
    WINDOW: tl.constexpr, ROWS: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """sums[tap] += grad * the input pixel under that tap, for ROWS output rows; unrolled, each input tile once."""
    g = ()
    for i in tl.static_range(ROWS):
        mask = (inside & (p + i < sizes.P))[:, None] & live[None, :]
        g = g + (load_tile(grad, n, p + i, q, o, mask, VEC).to(sums[0].dtype),)
    for dx in tl.static_range(offset_count(1, WINDOW, False, False)):
        w = q * WINDOW.SW - WINDOW.LEFT + offset_at(dx, 1, WINDOW, False, False)
        in_columns = inside & (w >= 0) & (w < sizes.W)
        for dy in tl.static_range(offset_count(ROWS, WINDOW, True, False)):
            h = p * WINDOW.SH - WINDOW.TOP + offset_at(dy, ROWS, WINDOW, True, False)
            mask = (in_columns & (h >= 0) & (h < sizes.H))[:, None] & live[None, :]
            value = load_tile(x, n, h, w, o // WINDOW.MULT, mask, VEC).to(sums[0].dtype)
            for i in tl.static_range(ROWS):
                sums = _add_product(sums, tap_between(i, 0, dy, dx, ROWS, 1, WINDOW, False), g[i], value)
    return sums


@triton.jit
def _add_group(
    sums, grad, x, n, p, q, inside, o, live, first, sizes,
    WINDOW: tl.constexpr, GROUP: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """The same for the taps first + [0, GROUP) of a window too large to unroll."""
    g = load_tile(grad, n, p, q, o, inside[:, None] & live[None, :], VEC).to(sums[0].dtype)
    for k in tl.static_range(GROUP):
        tap = first + k
        h, w, in_map = window_pixels(p, q, tap // WINDOW.S, tap % WINDOW.S, sizes, WINDOW)
        mask = (inside & in_map)[:, None] & live[None, :]
        sums = put(sums, k, sums[k] + g * load_tile(x, n, h, w, o // WINDOW.MULT, mask, VEC).to(sums[0].dtype))
    return sums


@triton.jit
def _weight_gradient_kernel(
    grad, x, partial, sizes, cells, steps,
    WINDOW: tl.constexpr, WIDE: tl.constexpr, VEC: tl.constexpr,
    UNROLLED: tl.constexpr, ROWS: tl.constexpr, GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    taps: tl.constexpr = WINDOW.R * WINDOW.S
    channel_blocks = tl.cdiv(sizes.D, BLOCK_C)
    groups: tl.constexpr = tl.cdiv(taps, GROUP)
    o, live = channels_of(tl.program_id(0) % channel_blocks, sizes, BLOCK_C, VEC)
    first = tl.program_id(0) // channel_blocks % groups * GROUP
    block = tl.program_id(0) // channel_blocks // groups
    sums = zero_tiles(GROUP, BLOCK_M, BLOCK_C, partial.dtype.element_ty)
    for step in range(steps):
        m = block_of(block * steps + step, BLOCK_M, WIDE)
        inside = m < cells
        n, p, q = cells_of(m, sizes, ROWS, 1)
        if UNROLLED:
            sums = _add_products(sums, grad, x, n, p, q, inside, o, live, sizes, WINDOW, ROWS, VEC)
        else:
            sums = _add_group(sums, grad, x, n, p, q, inside, o, live, first, sizes, WINDOW, GROUP, VEC)
    row = partial + (block.to(tl.int64) * taps + first) * sizes.D
    for k in tl.static_range(GROUP):
        tl.store(row + (k * sizes.D + o), tl.sum(sums[k], 0), mask=live & (first + k < taps))


# ---- gradient at the sums -------------------------------------------------------------------------------------------


@triton.jit
def _add_to(total, value, wanted):
    """A [channels] vector plus the tile's sums over its pixels; unchanged where `wanted` is None."""
    if wanted is not None:
        total += tl.sum(value, 0)
    return total


@triton.jit
def _undo_epilogue(g, u, affine, added, o, live, totals, partial, CHAIN: tl.constexpr):
    """(gradient at the sums, gradient at the residual, totals) from that at the output.

    Args:
        g: gradient at the output, [pixels, channels].
        u: the sums, before bias.
        added: the residual's tile, or None.
        totals: `Affine` of [channels] vectors: the gradients of bias, scale and shift so far.
        partial: `Affine` with None where they are not wanted.
    """
    if affine.bias is not None:
        u += load_vector(affine.bias, o, live, u.dtype)[None, :]
    activated = activate(u, CHAIN.ACT, CHAIN.SLOPE)
    v = activated
    if affine.scale is not None:
        scale = load_vector(affine.scale, o, live, u.dtype)[None, :]
        v = v * scale
    if affine.shift is not None:
        v += load_vector(affine.shift, o, live, u.dtype)[None, :]
    if added is not None:
        v += added.to(u.dtype)
    g *= activation_slope(v, CHAIN.POST, CHAIN.SLOPE)
    du = g
    if affine.scale is not None:
        du = du * scale
    du *= activation_slope(u, CHAIN.ACT, CHAIN.SLOPE)
    totals = Affine(
        _add_to(totals.bias, du, partial.bias),
        _add_to(totals.scale, g * activated, partial.scale),
        _add_to(totals.shift, g, partial.shift),
    )
    return du, g, totals


@triton.jit
def _store_total(partial, block, sizes, o, live, total):
    if partial is not None:
        tl.store(partial + (block.to(tl.int64) * sizes.D + o), total, mask=live)


@triton.jit
def _epilogue_gradient_kernel(
    grad, output, x, weight, affine, residual, du, grad_residual, partial, sizes, cells, steps,
    WINDOW: tl.constexpr, CHAIN: tl.constexpr, RECOMPUTE: tl.constexpr, WIDE: tl.constexpr, VEC: tl.constexpr,
    UNROLLED: tl.constexpr, ROWS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    acc: tl.constexpr = accumulator(x.data.dtype.element_ty)
    channel_blocks = tl.cdiv(sizes.D, BLOCK_C)
    o, live = channels_of(tl.program_id(0) % channel_blocks, sizes, BLOCK_C, VEC)
    block = tl.program_id(0) // channel_blocks
    zero = tl.zeros((BLOCK_C,), acc)
    totals = Affine(zero, zero, zero)
    for step in range(steps):
        m = block_of(block * steps + step, BLOCK_M, WIDE)
        inside = m < cells
        n, p, q = cells_of(m, sizes, ROWS, 1)
        if RECOMPUTE:
            u = _sums(x, weight, n, p, q, inside, o, live, sizes, WINDOW, ROWS, UNROLLED, VEC)
        else:  # nothing below depends on them but through the saved output
            u = zero_tiles(ROWS, BLOCK_M, BLOCK_C, acc)
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
                added = None
                if residual.data is not None:
                    added = load_tile(residual, n, p + i, q, o, mask, VEC)
                d, g, totals = _undo_epilogue(g, u[i], affine, added, o, live, totals, partial, CHAIN)
            if du.data is not None:
                store_tile(du, n, p + i, q, o, d, mask, VEC)
            if grad_residual.data is not None:
                store_tile(grad_residual, n, p + i, q, o, g, mask, VEC)
    _store_total(partial.bias, block, sizes, o, live, totals.bias)
    _store_total(partial.scale, block, sizes, o, live, totals.scale)
    _store_total(partial.shift, block, sizes, o, live, totals.shift)


# ---- statistics -----------------------------------------------------------------------------------------------------


@triton.jit
def _statistics_kernel(
    x, weight, bias, counts, means, squares, sizes, cells, steps,
    WINDOW: tl.constexpr, WIDE: tl.constexpr, VEC: tl.constexpr,
    UNROLLED: tl.constexpr, ROWS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Of a program's pixels: their number, the mean of the sums, and the squares of their distances from it."""
    acc: tl.constexpr = means.dtype.element_ty
    channel_blocks = tl.cdiv(sizes.D, BLOCK_C)
    o, live = channels_of(tl.program_id(0) % channel_blocks, sizes, BLOCK_C, VEC)
    block = tl.program_id(0) // channel_blocks
    count = tl.zeros((1,), acc)
    mean = tl.zeros((BLOCK_C,), acc)
    square = tl.zeros((BLOCK_C,), acc)
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
        found = tl.sum(pixels, 0)
        own = tl.sum(total, 0) / tl.maximum(found, 1)
        spread = tl.zeros((BLOCK_M, BLOCK_C), acc)
        for i in tl.static_range(ROWS):
            distance = tl.where((inside & (p + i < sizes.P))[:, None], u[i] - own[None, :], 0.0)
            spread += distance * distance
        # Chan, Golub and LeVeque: no difference of large numbers, as sums of squares would need.
        delta = own - mean
        after = tl.maximum(count + found, 1)
        mean += delta * (found / after)
        square += tl.sum(spread, 0) + delta * delta * (count * found / after)
        count += found
    if bias is not None:
        mean += load_vector(bias, o, live, acc)
    at = block.to(tl.int64) * sizes.D + o
    tl.store(counts + at, count + tl.zeros((BLOCK_C,), acc), mask=live)
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
    channel_blocks = tl.cdiv(sizes.D, BLOCK_C)
    m = block_of(tl.program_id(0) // channel_blocks, BLOCK_M, WIDE)
    o, live = channels_of(tl.program_id(0) % channel_blocks, sizes, BLOCK_C, VEC)
    inside = m < cells
    n, p, q = cells_of(m, sizes, ROWS, 1)
    u = _sums(x, weight, n, p, q, inside, o, live, sizes, WINDOW, ROWS, UNROLLED, VEC)
    centre = load_vector(mean, o, live, acc)
    if bias is not None:
        centre -= load_vector(bias, o, live, acc)
    offset = load_vector(grad_mean, o, live, acc) / pixels
    slope = 2 * load_vector(grad_var, o, live, acc) / pixels
    for i in tl.static_range(ROWS):
        mask = (inside & (p + i < sizes.P))[:, None] & live[None, :]
        store_tile(du, n, p + i, q, o, offset[None, :] + slope[None, :] * (u[i] - centre[None, :]), mask, VEC)


# ---- host: configuration --------------------------------------------------------------------------------------------


class Tile(NamedTuple):
    """A kernel's tile and launch parameters.

    Attributes:
        BLOCK_M, BLOCK_C: cells and channels of a tile.
        ROWS: target rows of a cell; 1 where the window is not unrolled.
        UNROLLED: whether the window is unrolled.
        num_warps: warps a program.
    """

    BLOCK_M: int
    BLOCK_C: int
    ROWS: int
    UNROLLED: bool
    num_warps: int


def tile(kernel: str, x: Tensor, channels: int, window: Window, geometry: list[int]) -> Tile:
    unrolled = window.R * window.S <= 25 and window.SH * window.SW <= 4
    rows = 2 * window.SH if kernel == "input_gradient" else 2
    if not unrolled:
        rows = 1
    if L.INTERPRETED:
        return Tile(64, 16, rows, unrolled, 4)
    return Tile(16, 64, rows, unrolled, 4)


def _cells(n: int, p: int, q: int, rows: int, cols: int) -> int:
    return n * triton.cdiv(p, rows) * triton.cdiv(q, cols)


# ---- host -----------------------------------------------------------------------------------------------------------


def dwconv_fwd(
    input: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None, shift: Tensor | None,
    residual: Tensor | None, geometry: list[int], slope: float,
) -> Tensor:  # fmt: skip
    """The operator `dwconv_fwd` of schemas.inc."""
    sizes, window = L.sizes_of(input, weight, geometry), L.window_of(weight, geometry)
    output = fake_output(input, (input.shape[0], sizes.D, sizes.P, sizes.Q), geometry)
    maps = (input, residual, output)
    t = tile("forward", input, sizes.D, window, geometry)
    cells = _cells(input.shape[0], sizes.P, sizes.Q, t.ROWS, 1)
    vec = L.vector_width(maps, (input.shape[1], sizes.D))
    bank, window = L.bank_of(weight, window, sizes, vec)
    L.launch(
        _forward_kernel, triton.cdiv(cells, t.BLOCK_M) * triton.cdiv(sizes.D, t.BLOCK_C), input,
        L.as_map(input), bank, L.affine(bias, scale, shift), L.as_map(residual), L.as_map(output), sizes, cells,
        WINDOW=window, CHAIN=L.depthwise_chain(geometry, slope), WIDE=L.needs_wide(maps, sizes, window), VEC=vec,
        **t._asdict(),
    )  # fmt: skip
    return output


def input_gradient(grad: Tensor, weight: Tensor, input: Tensor, geometry: list[int]) -> Tensor:
    """Gradient of the depthwise convolution's input from the gradient of its sums.

    Args:
        grad: [N,D,P,Q], gradient of the sums before bias; any strides and floating dtype (it may be float32 beside
            half maps).
        weight: [B,1,R,S], any strides.
        input: only its shape, dtype and device are read.
        geometry: the ints of schemas.inc, of either room.

    Returns:
        [N,C,H,W] in the input's dtype and the geometry's memory format. Sums are float32 (float64 for float64).
    """
    n, c, h, w = input.shape
    window = L.window_of(weight, geometry)
    dx = fake_output(input, input.shape, geometry)
    sizes = Sizes(grad.shape[2], grad.shape[3], h, w, n * h * w, c)
    t = tile("input_gradient", input, c, window, geometry)
    cols = window.SW if t.UNROLLED else 1
    cells = _cells(n, h, w, t.ROWS, cols)
    maps = (grad, dx)
    vec = L.vector_width(maps, (c, grad.shape[1]))
    packs = t.UNROLLED and window.MULT == 1  # else the taps of a thread's channels do not lie side by side
    bank, window = L.bank_of(weight, window, sizes, vec if packs else 1)
    L.launch(
        _input_gradient_kernel, triton.cdiv(cells, t.BLOCK_M) * triton.cdiv(c, t.BLOCK_C), input,
        L.as_map(grad), bank, L.as_map(dx), sizes, cells,
        WINDOW=window, WIDE=L.needs_wide(maps, sizes, window), VEC=vec,
        COLS=cols, **t._asdict(),
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
    t = tile("weight_gradient", input, sizes.D, window, geometry)
    taps = window.R * window.S
    group = taps if t.UNROLLED else 8
    cells = _cells(input.shape[0], sizes.P, sizes.Q, t.ROWS, 1)
    channel_blocks = triton.cdiv(sizes.D, t.BLOCK_C)
    steps = _steps(triton.cdiv(cells, t.BLOCK_M), channel_blocks)
    blocks = triton.cdiv(cells, t.BLOCK_M * steps)
    partial = partials(input, blocks, taps, sizes.D)
    maps = (grad, input)
    L.launch(
        _weight_gradient_kernel, blocks * triton.cdiv(taps, group) * channel_blocks, input,
        L.as_map(grad), L.as_map(input), partial, sizes, cells, steps,
        WINDOW=window, WIDE=L.needs_wide(maps, sizes, window), VEC=L.vector_width(maps, (input.shape[1], sizes.D)),
        GROUP=group, **t._asdict(),
    )  # fmt: skip
    return sum_partials(partial, torch.empty(weight.shape, dtype=weight.dtype, device=weight.device))


def _steps(tiles: int, channel_blocks: int) -> int:
    """Tiles that one program sums up: so many that programs still fill the device several times over."""
    if L.INTERPRETED:
        return 3
    return max(1, min(64, tiles * channel_blocks // 4096))


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
    t = tile("epilogue_gradient", input, sizes.D, window, geometry)
    if not recompute:
        t = t._replace(ROWS=1)
    cells, channel_blocks = _cells(input.shape[0], sizes.P, sizes.Q, t.ROWS, 1), triton.cdiv(sizes.D, t.BLOCK_C)
    steps = _steps(triton.cdiv(cells, t.BLOCK_M), channel_blocks)
    blocks = triton.cdiv(cells, t.BLOCK_M * steps)
    shape = (input.shape[0], sizes.D, sizes.P, sizes.Q)
    du = fake_output(input, shape, geometry) if wanted[0] else None
    grad_residual = fake_output(residual, shape, geometry) if wanted[4] else None
    partial = [partials(input, blocks, 1, sizes.D) if want else None for want in wanted[1:4]]
    maps = (grad, output, input, residual if chain.POST != NONE else None, du, grad_residual)
    vec = L.vector_width(maps, (input.shape[1], sizes.D))
    bank, window = L.bank_of(weight, window, sizes, vec if recompute else 1)
    L.launch(
        _epilogue_gradient_kernel, blocks * channel_blocks, input,
        L.as_map(grad), L.as_map(output), L.as_map(input), bank, L.affine(*vectors), L.as_map(maps[3]),
        L.as_map(du), L.as_map(grad_residual), Affine(*partial), sizes, cells, steps,
        WINDOW=window, CHAIN=chain, RECOMPUTE=recompute, WIDE=L.needs_wide(maps, sizes, window), VEC=vec,
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
    t = tile("statistics", input, sizes.D, window, geometry)
    cells, channel_blocks = _cells(input.shape[0], sizes.P, sizes.Q, t.ROWS, 1), triton.cdiv(sizes.D, t.BLOCK_C)
    steps = _steps(triton.cdiv(cells, t.BLOCK_M), channel_blocks)
    blocks = triton.cdiv(cells, t.BLOCK_M * steps)
    counts, means, squares = (partials(input, blocks, 1, sizes.D) for _ in range(3))
    vec = L.vector_width((input,), (input.shape[1], sizes.D))
    bank, window = L.bank_of(weight, window, sizes, vec)
    L.launch(
        _statistics_kernel, blocks * channel_blocks, input,
        L.as_map(input), bank, L.vector(bias), counts, means, squares, sizes, cells, steps,
        WINDOW=window, WIDE=L.needs_wide((input,), sizes, window), VEC=vec, **t._asdict(),
    )  # fmt: skip
    mean = torch.empty(sizes.D, dtype=means.dtype, device=input.device)
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
    t = tile("forward", input, sizes.D, window, geometry)
    cells = _cells(input.shape[0], sizes.P, sizes.Q, t.ROWS, 1)
    maps = (input, du)
    vec = L.vector_width(maps, (input.shape[1], sizes.D))
    bank, window = L.bank_of(weight, window, sizes, vec)
    L.launch(
        _statistics_gradient_kernel, triton.cdiv(cells, t.BLOCK_M) * triton.cdiv(sizes.D, t.BLOCK_C), input,
        L.vector(grad_mean), L.vector(grad_var), L.vector(mean), L.as_map(input), bank, L.vector(bias), L.as_map(du),
        sizes, cells, sizes.M,
        WINDOW=window, WIDE=L.needs_wide(maps, sizes, window), VEC=vec, **t._asdict(),
    )  # fmt: skip
    return du
