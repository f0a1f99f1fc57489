"""Triton kernels of room sepconv. None has run on a GPU yet: what is said of speed here is calculated.

forward: a program owns BLOCK_M cells of ROWS output pixels below each other x BLOCK_C channels; nothing between is
stored. For each row of the map that the column windows of a cell reach, from top to bottom:

    x, a row of it                row sums     epilogue, max     rounded          the column sums of all the cell's rows
      . . . .   S + 1 loads  -->    u u    -->      z       -->  z x its taps --> v       v of two rows --> max --> y
                                    (1x2 pool: two columns)                       v       (2x1 pool)

    With ROWS output rows a cell computes ROWS (times 2, pooled) + R - 1 rows of z for as many rows of v.

backward: what is between is stored for a while, in the map's dtype: less than what torch keeps from its forward.

    x --pairs (max)--> z    grad --pairs back--> gy --dwconv_bwd of z--> column gradients, gz --pairs back--> gr
                                 (2x1 pool)                              gr --dwconv_bwd of x--> row gradients, dx

    A program of `pairs` owns BLOCK_M cells of two results of a depthwise convolution, side by side or one above the
    other: their sums and epilogues in registers, then the larger, or the gradient to where the larger was and 0 to the
    other. Without a pool z is what dwconv_fwd gives, and a gradient needs no routing.

kernel                reads         writes         bytes a pixel of x (fp16, pool "row", multiplier 1)
forward               x             y              3
backward: pairs       x             z              3
  dwconv_bwd of z     grad, z       gv, gz, taps   grad 1, z 2, gv 1 + 2, gz 1
  pairs back          x, gz         gr             5
  dwconv_bwd of x     gr, x         gu, dx, taps   gr 2, x 4, gu 2 + 4, dx 2

The bytes of dwconv_bwd are those with an activation; without, gv and gu are what was given. Windows too large to unroll
are loops, which compute z anew for every tap of the column.

Roofline, calculated for an H200 (4.3 TB/s), nothing measured: forward of fp16 with pool "row", EffNet's first block,
[128,32,32,32]: 12.6 MB, 2.9 us; its second, [128,64,16,16]: 6.3 MB, 1.5 us; a launch takes longer than either.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from effops.ops import geometry as G
from effops.ops import triton_launch as L
from effops.ops.dwconv.triton import dwconv_bwd, dwconv_fwd
from effops.ops.registration import fake_output
from effops.ops.sepconv.reference import (
    POOL,
    POOL_COL,
    POOL_ROW,
    col_geometry,
    row_geometry,
)
from effops.ops.triton_device import (
    Chain,
    Sizes,
    Window,
    accumulator,
    add_tap,
    add_window,
    depthwise_tile,
    epilogue,
    load_tile,
    offset_at,
    offset_count,
    own_cells,
    store_tile,
    takes_second,
    tap_between,
    tap_vector,
    zero_tiles,
)

# ---- device: forward ------------------------------------------------------------------------------------------------


@triton.jit
def _pool_max(first, second):
    return tl.where(takes_second(first, second), second, first)


@triton.jit
def _row_sums(
    x, weight, n, h, q, inside, o, live, sizes,
    WINDOW: tl.constexpr, COUNT: tl.constexpr, UNROLLED: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """The row convolution's sums of the pixels (h, q + j), j < COUNT, as a tuple of tiles."""
    if UNROLLED:
        u = zero_tiles(COUNT, n.shape[0], o.shape[0], accumulator(x.data.dtype.element_ty))
        w = q * WINDOW.SW - WINDOW.LEFT
        u = add_window(u, x, weight, n, h, w, inside, o // WINDOW.MULT, o, live, sizes, WINDOW, 1, COUNT, False, VEC)
    else:
        u = ()
        for j in tl.static_range(COUNT):
            u = u + (depthwise_tile(x, weight, n, h, q + j, inside, o, live, sizes, WINDOW, VEC, 9),)
    return u


@triton.jit
def _pooled_row(
    x, weight, affine, n, h, q, inside, o, live, sizes,
    WINDOW: tl.constexpr, CHAIN: tl.constexpr, POOL_W: tl.constexpr, UNROLLED: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """z of the pixels (h, q), rounded as torch rounds it; 0 above and below the map, where the column's padding is."""
    in_map = inside & (h >= 0) & (h < sizes.H)
    u = _row_sums(x, weight, n, h, q * POOL_W, in_map, o, live, sizes, WINDOW, POOL_W, UNROLLED, VEC)
    z = epilogue(u[0], affine, None, o, live, CHAIN)
    if POOL_W == 2:
        z = _pool_max(z, epilogue(u[1], affine, None, o, live, CHAIN))
    return tl.where(in_map[:, None], z, 0.0).to(x.data.dtype.element_ty).to(z.dtype)


@triton.jit
def _column_sums(
    x, row_weight, row_affine, col_weight, n, p, q, inside, o, live, sizes,
    ROW: tl.constexpr, COL: tl.constexpr, ROW_CHAIN: tl.constexpr, POOL_W: tl.constexpr, COUNT: tl.constexpr,
    UNROLLED: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """The column convolution's sums of the pixels (p + i, q), i < COUNT, as a tuple of tiles."""
    acc: tl.constexpr = accumulator(x.data.dtype.element_ty)
    top = p * COL.SH - COL.TOP
    if UNROLLED:
        v = zero_tiles(COUNT, n.shape[0], o.shape[0], acc)
        for dy in tl.static_range(offset_count(COUNT, COL, True, False)):
            z = _pooled_row(
                x, row_weight, row_affine, n, top + offset_at(dy, COUNT, COL, True, False), q, inside, o, live, sizes,
                ROW, ROW_CHAIN, POOL_W, True, VEC,
            )  # fmt: skip
            for i in tl.static_range(COUNT):
                v = add_tap(
                    v, i, z, col_weight, o, live, tap_between(i, 0, dy, 0, COUNT, 1, COL, False), sizes, COL, VEC
                )  # fmt: skip
    else:
        v = ()
        for i in tl.static_range(COUNT):
            total = tl.zeros((n.shape[0], o.shape[0]), acc)
            for r in range(COL.R):
                z = _pooled_row(
                    x, row_weight, row_affine, n, top + i * COL.SH + r * COL.DH, q, inside, o, live, sizes,
                    ROW, ROW_CHAIN, POOL_W, False, VEC,
                )  # fmt: skip
                total += z * tap_vector(col_weight, o, live, r, COL, acc)[None, :]
            v = v + (total,)
    return v


@triton.jit
def _forward_kernel(
    x, row_weight, row_affine, col_weight, col_affine, y, sizes, cells,
    ROW: tl.constexpr, COL: tl.constexpr, ROW_CHAIN: tl.constexpr, COL_CHAIN: tl.constexpr,
    POOL_W: tl.constexpr, POOL_H: tl.constexpr, WIDE: tl.constexpr, VEC: tl.constexpr,
    UNROLLED: tl.constexpr, ROWS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    # sizes: H and W are the input's, P and Q the output's, behind the pools.
    n, p, q, inside, o, live = own_cells(sizes, cells, ROWS, 1, WIDE, VEC, BLOCK_M, BLOCK_C)
    v = _column_sums(
        x, row_weight, row_affine, col_weight, n, p * POOL_H, q, inside, o, live, sizes,
        ROW, COL, ROW_CHAIN, POOL_W, ROWS * POOL_H, UNROLLED, VEC,
    )  # fmt: skip
    for i in tl.static_range(ROWS):
        value = epilogue(v[i * POOL_H], col_affine, None, o, live, COL_CHAIN)
        if POOL_H == 2:
            value = _pool_max(value, epilogue(v[i * POOL_H + 1], col_affine, None, o, live, COL_CHAIN))
        store_tile(y, n, p + i, q, o, value, (inside & (p + i < sizes.P))[:, None] & live[None, :], VEC)


# ---- device: pairs --------------------------------------------------------------------------------------------------


@triton.jit
def _pair_sums(
    x, weight, n, p, q, inside, o, live, sizes,
    WINDOW: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, UNROLLED: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """The sums of a depthwise convolution's pixels (p, q) and (p + ROWS - 1, q + COLS - 1), the cell's two."""
    if UNROLLED:
        u = zero_tiles(2, n.shape[0], o.shape[0], accumulator(x.data.dtype.element_ty))
        h = p * WINDOW.SH - WINDOW.TOP
        w = q * WINDOW.SW - WINDOW.LEFT
        u = add_window(
            u, x, weight, n, h, w, inside, o // WINDOW.MULT, o, live, sizes, WINDOW, ROWS, COLS, False, VEC
        )  # fmt: skip
    else:
        first = depthwise_tile(x, weight, n, p, q, inside, o, live, sizes, WINDOW, VEC, 9)
        second = depthwise_tile(
            x, weight, n, p + (ROWS - 1), q + (COLS - 1), inside, o, live, sizes, WINDOW, VEC, 9
        )  # fmt: skip
        u = (first, second)
    return u


@triton.jit
def _pairs_kernel(
    x, weight, affine, z, sizes, cells,
    WINDOW: tl.constexpr, CHAIN: tl.constexpr, WIDE: tl.constexpr, VEC: tl.constexpr,
    UNROLLED: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """z = the larger of the two results of each cell; sizes.P and Q are a whole number of cells."""
    n, p, q, inside, o, live = own_cells(sizes, cells, ROWS, COLS, WIDE, VEC, BLOCK_M, BLOCK_C)
    u = _pair_sums(x, weight, n, p, q, inside, o, live, sizes, WINDOW, ROWS, COLS, UNROLLED, VEC)
    first = epilogue(u[0], affine, None, o, live, CHAIN)
    second = epilogue(u[1], affine, None, o, live, CHAIN)
    store_tile(z, n, p // ROWS, q // COLS, o, _pool_max(first, second), inside[:, None] & live[None, :], VEC)


@triton.jit
def _pairs_gradient_kernel(
    x, weight, affine, grad, routed, sizes, cells,
    WINDOW: tl.constexpr, CHAIN: tl.constexpr, WIDE: tl.constexpr, VEC: tl.constexpr,
    UNROLLED: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """routed = grad at the larger of the two results of each cell, 0 at the other; 0 at a last one without a pair."""
    n, p, q, inside, o, live = own_cells(sizes, cells, ROWS, COLS, WIDE, VEC, BLOCK_M, BLOCK_C)
    u = _pair_sums(x, weight, n, p, q, inside, o, live, sizes, WINDOW, ROWS, COLS, UNROLLED, VEC)
    first = epilogue(u[0], affine, None, o, live, CHAIN)
    second = epilogue(u[1], affine, None, o, live, CHAIN)
    chosen = takes_second(first, second)
    both = (inside & (p + (ROWS - 1) < sizes.P) & (q + (COLS - 1) < sizes.Q))[:, None] & live[None, :]
    g = load_tile(grad, n, p // ROWS, q // COLS, o, both, VEC)
    store_tile(routed, n, p, q, o, tl.where(chosen, 0.0, g), inside[:, None] & live[None, :], VEC)
    store_tile(routed, n, p + (ROWS - 1), q + (COLS - 1), o, tl.where(chosen, g, 0.0), both, VEC)


# ---- configs --------------------------------------------------------------------------------------------------------

_WARPS = 4
_UNROLLED_LOADS = 36  # at most so many of a cell are unrolled
# Bytes of an element: (channels_last, NCHW), each (elements of a row of a cell a thread, rows of a forward's cell, the
# bound on registers: left alone the assembler starts every load at once).
_TILES = {2: ((8, 2, 255), (2, 2, 128)), 4: ((4, 2, 168), (2, 2, 128)), 8: ((2, 2, 255), (1, 2, 168))}


class Tile(NamedTuple):
    """Cells and channels of a program, rows of a cell, whether windows are unrolled, warps, the bound on registers."""

    BLOCK_M: int
    BLOCK_C: int
    ROWS: int
    UNROLLED: bool
    num_warps: int
    maxnreg: int | None


def configs() -> dict[str, list[dict[str, Any]]]:
    """What the chooser can return, by kernel, for the ahead-of-time check: blocks follow the channels."""
    either = [{"UNROLLED": unrolled, "num_warps": _WARPS} for unrolled in (True, False)]
    return dict.fromkeys(("_forward_kernel", "_pairs_kernel", "_pairs_gradient_kernel"), either)


def _tile(x: Tensor, channels: int, channels_last: int, wide: bool, loads_of_rows: Callable[[int], int]) -> Tile:
    """The tile by dtype, layout and offsets; `loads_of_rows`: loads of a cell of so many rows."""
    side_by_side = channels_last and channels >= 8
    elements, rows, maxnreg = _TILES[x.element_size()][0 if side_by_side else 1]
    if wide or channels % 8:  # addresses take registers too: of 64 bits, and of channels read one by one
        rows, maxnreg = 1, 255
    # Of half the loads a thread of eight halves has them all in registers: Triton 3.9 spilled 40 bytes at 24.
    most = 20 if side_by_side and x.element_size() == 2 else _UNROLLED_LOADS
    while rows > 1 and loads_of_rows(rows) > most:
        rows //= 2
    unrolled = loads_of_rows(rows) <= _UNROLLED_LOADS
    if L.INTERPRETED:
        return Tile(128, 32, rows, unrolled, _WARPS, None)
    block_c = min(64, triton.next_power_of_2(channels)) if channels_last else 1
    return Tile(max(1, elements * 32 * _WARPS // block_c), block_c, rows, unrolled, _WARPS, maxnreg)


# ---- host -----------------------------------------------------------------------------------------------------------

Vectors = tuple[Tensor | None, Tensor | None, Tensor | None]


class _Convolution(NamedTuple):
    """One of the two depthwise convolutions: its input may be a map that is still to come."""

    weight: Tensor
    vectors: Vectors
    geometry: list[int]
    slope: float
    pooled: bool

    @property
    def chain(self) -> Chain:
        return L.depthwise_chain(self.geometry, self.slope)

    def size(self, x: Tensor) -> tuple[int, int]:
        """Rows and columns of the result, before the pool."""
        return G.output_size(*x.shape[2:], *self.weight.shape[2:], self.geometry)

    def forward(self, x: Tensor) -> Tensor:
        """The results, without the pool."""
        return dwconv_fwd(x, self.weight, *self.vectors, None, self.geometry, self.slope)

    def backward(self, grad: Tensor, x: Tensor, mask: int) -> list[Tensor]:
        """Gradients of x, weight, bias, scale and shift, those in the mask, from that of the results."""
        return dwconv_bwd(grad, None, x, self.weight, *self.vectors, None, self.geometry, self.slope, mask)


def convolutions(
    row_weight: Tensor, row: Vectors, col_weight: Tensor, col: Vectors, geometry: list[int], slopes: list[float]
) -> tuple[_Convolution, _Convolution]:
    return (
        _Convolution(row_weight, row, row_geometry(geometry), slopes[0], bool(geometry[POOL] & POOL_ROW)),
        _Convolution(col_weight, col, col_geometry(geometry), slopes[1], bool(geometry[POOL] & POOL_COL)),
    )


def _launch_pairs(
    kernel: Any, x: Tensor, convolution: _Convolution, shape: tuple[int, int], rows: int, maps: tuple[Tensor, ...]
) -> None:
    """Launches a kernel over pairs of results, side by side (rows: 1) or one above the other (2).

    Args:
        shape: the rows and columns of results that are paired.
        maps: the kernel's arguments beside the convolution's.
    """
    weight, geometry, cols = convolution.weight, convolution.geometry, 3 - rows
    n, c, h, w = x.shape
    channels = c * geometry[G.MULTIPLIER]
    sizes, window = Sizes(h, w, *shape, n * shape[0] * shape[1], channels), L.window_of(weight, geometry)
    wide = L.needs_wide((x, *maps), sizes, window)

    def loads(_rows: int) -> int:
        return offset_count(rows, window, True, False) * offset_count(cols, window, False, False)

    t = _tile(x, channels, geometry[G.CHANNELS_LAST], wide, loads)._replace(ROWS=rows)
    cells = n * triton.cdiv(shape[0], rows) * triton.cdiv(shape[1], cols)
    vec = L.vector_width((x, *maps), (c, channels))
    bank, window = L.bank_of(weight, window, sizes, vec)
    L.launch(
        kernel, triton.cdiv(cells, t.BLOCK_M) * triton.cdiv(channels, t.BLOCK_C), x,
        L.as_map(x), bank, L.affine(*convolution.vectors), *map(L.as_map, maps), sizes, cells,
        WINDOW=window, CHAIN=convolution.chain, WIDE=wide, VEC=vec, COLS=cols, **t._asdict(),
    )  # fmt: skip


def row_result(x: Tensor, row: _Convolution) -> Tensor:
    """z: what the column convolution reads."""
    if not row.pooled:
        return row.forward(x)
    h, w = row.size(x)
    z = fake_output(x, (x.shape[0], row.weight.shape[0], h, w // 2), row.geometry)
    _launch_pairs(_pairs_kernel, x, row, (h, w // 2 * 2), 1, (z,))
    return z


def through_pool(grad: Tensor, x: Tensor, convolution: _Convolution, rows: int) -> Tensor:
    """The gradient at the convolution's results from that of what the pool made of them."""
    if not convolution.pooled:
        return grad
    size = convolution.size(x)
    routed = fake_output(x, (x.shape[0], convolution.weight.shape[0], *size), convolution.geometry)
    _launch_pairs(_pairs_gradient_kernel, x, convolution, size, rows, (grad, routed))
    return routed


def sepconv_fwd(
    input: Tensor, row_weight: Tensor, row_bias: Tensor | None, row_scale: Tensor | None, row_shift: Tensor | None,
    col_weight: Tensor, bias: Tensor | None, scale: Tensor | None, shift: Tensor | None, geometry: list[int],
    slopes: list[float],
) -> Tensor:  # fmt: skip
    """The operator `sepconv_fwd` of schemas.inc."""
    row, col = convolutions(
        row_weight, (row_bias, row_scale, row_shift), col_weight, (bias, scale, shift), geometry, slopes
    )
    n, c, h, w = input.shape
    pool_w, pool_h = 1 + row.pooled, 1 + col.pooled
    row_window, col_window = L.window_of(row_weight, row.geometry), L.window_of(col_weight, col.geometry)
    z_h, z_w = row.size(input)
    p, q = G.output_size(z_h, z_w // pool_w, *col_weight.shape[2:], col.geometry)
    sizes = Sizes(h, w, p // pool_h, q, n * (p // pool_h) * q, c * geometry[G.MULTIPLIER])
    output = fake_output(input, (n, sizes.D, sizes.P, sizes.Q), geometry)
    maps = (input, output)
    reach = Window(col_window.R, row_window.S, pool_h * col_window.SH, pool_w * row_window.SW, 0, 0,
                   col_window.DH, row_window.DW, 1, 0, None)  # fmt: skip
    wide = L.needs_wide(maps, sizes, reach)

    def loads(rows: int) -> int:
        of_columns = offset_count(pool_w, row_window, False, False)
        return offset_count(rows * pool_h, col_window, True, False) * of_columns

    t = _tile(input, sizes.D, geometry[G.CHANNELS_LAST], wide, loads)
    cells = n * triton.cdiv(sizes.P, t.ROWS) * sizes.Q
    vec = L.vector_width(maps, (c, sizes.D))
    row_bank, row_window = L.bank_of(row_weight, row_window, sizes, vec if t.UNROLLED else 1)
    col_bank, col_window = L.bank_of(col_weight, col_window, sizes, vec if t.UNROLLED else 1)
    L.launch(
        _forward_kernel, triton.cdiv(cells, t.BLOCK_M) * triton.cdiv(sizes.D, t.BLOCK_C), input,
        L.as_map(input), row_bank, L.affine(*row.vectors), col_bank, L.affine(*col.vectors), L.as_map(output),
        sizes, cells,
        ROW=row_window, COL=col_window, ROW_CHAIN=row.chain, COL_CHAIN=col.chain, POOL_W=pool_w, POOL_H=pool_h,
        WIDE=wide, VEC=vec, **t._asdict(),
    )  # fmt: skip
    return output


def sepconv_bwd(
    grad_output: Tensor, input: Tensor, row_weight: Tensor, row_bias: Tensor | None, row_scale: Tensor | None,
    row_shift: Tensor | None, col_weight: Tensor, bias: Tensor | None, scale: Tensor | None, shift: Tensor | None,
    geometry: list[int], slopes: list[float], mask: int,
) -> list[Tensor]:  # fmt: skip
    """The operator `sepconv_bwd` of schemas.inc."""
    row, col = convolutions(
        row_weight, (row_bias, row_scale, row_shift), col_weight, (bias, scale, shift), geometry, slopes
    )
    row_mask = mask & 0b11111
    z = row_result(input, row)
    grad = through_pool(grad_output, z, col, 2)
    gradients = col.backward(grad, z, mask >> 5 << 1 | (row_mask != 0))
    if not row_mask:
        return gradients
    grad = through_pool(gradients.pop(0), input, row, 1)
    return row.backward(grad, input, row_mask) + gradients
