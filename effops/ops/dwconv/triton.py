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

from effops.ops import triton_launch as L
from effops.ops.dwconv import fake_output
from effops.ops.triton_device import (
    Sizes,
    Window,
    accumulator,
    add_window,
    block_of,
    cells_of,
    channels_of,
    depthwise_tile,
    epilogue,
    load_tile,
    offset_at,
    offset_count,
    put,
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
    for k in tl.static_range(offset_count(1, WINDOW, False, False)):
        w = q * WINDOW.SW - WINDOW.LEFT + offset_at(k, 1, WINDOW, False, False)
        in_columns = inside & (w >= 0) & (w < sizes.W)
        for l in tl.static_range(offset_count(ROWS, WINDOW, True, False)):
            h = p * WINDOW.SH - WINDOW.TOP + offset_at(l, ROWS, WINDOW, True, False)
            mask = (in_columns & (h >= 0) & (h < sizes.H))[:, None] & live[None, :]
            value = load_tile(x, n, h, w, o // WINDOW.MULT, mask, VEC).to(sums[0].dtype)
            for i in tl.static_range(ROWS):
                sums = _add_product(sums, tap_between(i, 0, l, k, ROWS, 1, WINDOW, False), g[i], value)
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
    step = 0
    while step < steps:
        m = block_of(block * steps + step, BLOCK_M, WIDE)
        inside = m < cells
        n, p, q = cells_of(m, sizes, ROWS, 1)
        if UNROLLED:
            sums = _add_products(sums, grad, x, n, p, q, inside, o, live, sizes, WINDOW, ROWS, VEC)
        else:
            sums = _add_group(sums, grad, x, n, p, q, inside, o, live, first, sizes, WINDOW, GROUP, VEC)
        step += 1
    row = partial + (block.to(tl.int64) * taps + first) * sizes.D
    for k in tl.static_range(GROUP):
        tl.store(row + (k * sizes.D + o), tl.sum(sums[k], 0), mask=live & (first + k < taps))


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
    L.launch(
        _forward_kernel, triton.cdiv(cells, t.BLOCK_M) * triton.cdiv(sizes.D, t.BLOCK_C), input,
        L.as_map(input), weight.contiguous(), L.affine(bias, scale, shift), L.as_map(residual), L.as_map(output),
        sizes, cells,
        WINDOW=window, CHAIN=L.depthwise_chain(geometry, slope), WIDE=L.needs_wide(maps, sizes, window),
        VEC=L.vector_width(maps, (input.shape[1], sizes.D)), **t._asdict(),
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
    L.launch(
        _input_gradient_kernel, triton.cdiv(cells, t.BLOCK_M) * triton.cdiv(c, t.BLOCK_C), input,
        L.as_map(grad), weight.contiguous(), L.as_map(dx), sizes, cells,
        WINDOW=window, WIDE=L.needs_wide(maps, sizes, window), VEC=L.vector_width(maps, (c, grad.shape[1])),
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
