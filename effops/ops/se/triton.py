"""Triton kernels of room se. None has run on a GPU yet: what is said of speed here is calculated.

    x [N,C,H,W] --sums--> partial [blocks, N C] --triton_sum--> sums [N,C] --/ (H W), W1--> inner [N,Cr]
      |                                                                    --act, W2, gate--> gates [N,C]
      +-------------------------------------------------------------------------------- x * gates --> y

    sums     a program owns BLOCK_P x BLOCK_C of one image (pixels, channels), several such tiles below each other; its
             sums stay in registers until its one line of partial results. In NCHW without gaps the pixels of an image
             are one axis, along which a thread's 16 bytes lie where H W is a multiple of 16; in channels_last they are
             channels of a pixel.
    product  BLOCK_N images x BLOCK_R rows of a matrix; BLOCK_K columns at a time, on the FMA units: the products of a
             block [images, rows, columns] summed up along the columns. Tensor cores have no use for so little.
    scale    the tiles of the sums, one each.

kernel              reads                     writes                                     bytes a value of x (fp16)
sums                x                         partial sums                               2
products            sums, W1, inner, W2       inner, gates                               0
scale               x, gates                  y                                          4, or 2 from HBM and 2 from L2
backward: sums      x, grad                   partial sums of x, of grad x               4
  products          those, W1, W2             their gradients, gates, the mean's gradient 0
  matrix gradients  the gradients, the inputs gradients of the weights and biases        0
  scale             grad, gates               dx = grad gates + gradient of the mean / (H W)  4, or 2 and 2

Roofline, calculated for an H200 (4.3 TB/s), nothing measured: forward of fp16 [128,72,56,56]: 58 MB, read twice and
written once, 40 us; [128,960,7,7]: 12 MB, whose second read comes from L2, 5.6 us; its matrices (960 x 240, 0.9 MB
both) come from L2 once for every four images, 29 MB, and the five launches are what such a call waits for.
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
from effops.ops.epilogue import NONE
from effops.ops.se import ACTIVATION, CHANNELS_LAST, GATE
from effops.ops.se.reference import SLOPE
from effops.ops.triton_device import (
    Sizes,
    Window,
    activate,
    activation_slope,
    block_of,
    channels_of,
    load_tile,
    load_vector,
    store_tile,
)
from effops.ops.triton_sum import partials, sum_partials

# ---- device: maps ---------------------------------------------------------------------------------------------------


@triton.jit
def _own_place(sizes, blocks, WIDE: tl.constexpr, VEC: tl.constexpr, BLOCK_C: tl.constexpr):
    """This program's image, its block of the image's pixels, its channels, and which exist."""
    channel_blocks = tl.cdiv(sizes.D, BLOCK_C)
    c, live = channels_of(tl.program_id(0) % channel_blocks, sizes.D, BLOCK_C, WIDE, VEC)
    n = tl.program_id(0) // channel_blocks // blocks
    if WIDE:
        n = n.to(tl.int64)
    return n, tl.program_id(0) // channel_blocks % blocks, c, live


@triton.jit
def _pixels_of(block, live, sizes, WIDE: tl.constexpr, BLOCK_P: tl.constexpr):
    """Rows and columns of a block of an image's pixels, and the mask of its tile."""
    i = block_of(block, BLOCK_P, WIDE)
    return i // sizes.W, i % sizes.W, (i < sizes.H * sizes.W)[:, None] & live[None, :]


@triton.jit
def _sums_kernel(
    x, grad, sums, products, sizes, blocks, steps,
    WIDE: tl.constexpr, VEC: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """sums[block, n, c] = the sum of x, products[block, n, c] = that of grad * x, over the block's pixels."""
    acc: tl.constexpr = sums.dtype.element_ty
    n, block, c, live = _own_place(sizes, blocks, WIDE, VEC, BLOCK_C)
    total = tl.zeros((BLOCK_P, BLOCK_C), acc)
    product = tl.zeros((BLOCK_P, BLOCK_C), acc)
    for step in range(steps):
        h, w, mask = _pixels_of(block * steps + step, live, sizes, WIDE, BLOCK_P)
        value = load_tile(x, n, h, w, c, mask, VEC).to(acc)
        total += value
        if grad.data is not None:
            product += value * load_tile(grad, n, h, w, c, mask, VEC).to(acc)
    images = sizes.M // (sizes.H * sizes.W)
    at = (block.to(tl.int64) * images + n) * sizes.D + c
    # Float64 beyond a thread's own pixels, as in dwconv's statistics: errors of the gates' gradient add up behind it.
    tl.store(sums + at, tl.sum(total.to(tl.float64), 0), mask=live)
    if grad.data is not None:
        tl.store(products + at, tl.sum(product.to(tl.float64), 0), mask=live)


@triton.jit
def _scale_kernel(
    x, gates, offsets, y, sizes, blocks,
    WIDE: tl.constexpr, VEC: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """y = x * gates[n, c] + offsets[n, c] / pixels; `offsets` may be None."""
    acc: tl.constexpr = gates.dtype.element_ty
    n, block, c, live = _own_place(sizes, blocks, WIDE, VEC, BLOCK_C)
    h, w, mask = _pixels_of(block, live, sizes, WIDE, BLOCK_P)
    at = n.to(tl.int64) * sizes.D + c
    value = load_tile(x, n, h, w, c, mask, VEC).to(acc) * load_vector(gates, at, live, acc)[None, :]
    if offsets is not None:
        value += (load_vector(offsets, at, live, acc) / (sizes.H * sizes.W))[None, :]
    store_tile(y, n, h, w, c, value, mask, VEC)


# ---- device: the two products ---------------------------------------------------------------------------------------


@triton.jit
def _inputs(x, n, k, images, columns, pixels, ACT: tl.constexpr, SLOPE: tl.constexpr):
    """act(x[n, k] / pixels), [images, columns]; `pixels` None: 1. Where masked, act(0)."""
    mask = (n < images)[:, None] & (k < columns)[None, :]
    value = tl.load(x + (n.to(tl.int64) * columns)[:, None] + k[None, :], mask=mask, other=0.0)
    if pixels is not None:
        value = value / pixels
    return activate(value, ACT, SLOPE)


@triton.jit
def _own_block(rows, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr):
    """This program's images and rows, in blocks of an [images, rows] result."""
    row_blocks = tl.cdiv(rows, BLOCK_R)
    n = tl.program_id(0) // row_blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    return n, tl.program_id(0) % row_blocks * BLOCK_R + tl.arange(0, BLOCK_R)


@triton.jit
def _product(
    x, n, pixels, weight, r, images, rows, columns, row_stride, column_stride,
    ACT: tl.constexpr, SLOPE: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """[images n, rows r] of act(x) @ weight^T / pixels (None: 1), weight [rows, columns] with the strides given."""
    total = tl.zeros((n.shape[0], r.shape[0]), x.dtype.element_ty)
    for first in range(0, columns, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        at = (r.to(tl.int64) * row_stride)[:, None] + (k.to(tl.int64) * column_stride)[None, :]
        matrix = tl.load(weight + at, mask=(r < rows)[:, None] & (k < columns)[None, :], other=0.0).to(total.dtype)
        value = _inputs(x, n, k, images, columns, None, ACT, SLOPE)
        total += tl.sum(value[:, None, :] * matrix[None, :, :], 2)
    if pixels is not None:  # once an output, not once an input and block of rows
        total = total / pixels
    return total


@triton.jit
def _product_kernel(
    x, pixels, weight, bias, grad, out, grad_out, images, rows, columns, row_stride, column_stride,
    ACT: tl.constexpr, OUT_ACT: tl.constexpr, SLOPE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """v = act(x) @ weight^T / pixels + bias; out = out_act(v) and grad_out = grad * out_act'(v), where given."""
    n, r = _own_block(rows, BLOCK_N, BLOCK_R)
    v = _product(x, n, pixels, weight, r, images, rows, columns, row_stride, column_stride, ACT, SLOPE, BLOCK_K)
    if bias is not None:
        v += load_vector(bias, r, r < rows, v.dtype)[None, :]
    at = (n.to(tl.int64) * rows)[:, None] + r[None, :]
    mask = (n < images)[:, None] & (r < rows)[None, :]
    if out is not None:
        tl.store(out + at, activate(v, OUT_ACT, SLOPE), mask=mask)
    if grad is not None:
        g = tl.load(grad + at, mask=mask, other=0.0)
        tl.store(grad_out + at, g * activation_slope(v, OUT_ACT, SLOPE), mask=mask)


@triton.jit
def _product_gradient_kernel(
    grad, weight, inner, out, images, rows, columns, row_stride, column_stride,
    ACT: tl.constexpr, SLOPE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out = grad @ weight^T, times act'(inner) where there is an `inner`; the strides are those of a transposed W."""
    none: tl.constexpr = 0
    n, r = _own_block(rows, BLOCK_N, BLOCK_R)
    v = _product(grad, n, None, weight, r, images, rows, columns, row_stride, column_stride, none, SLOPE, BLOCK_K)
    at = (n.to(tl.int64) * rows)[:, None] + r[None, :]
    mask = (n < images)[:, None] & (r < rows)[None, :]
    if inner is not None:
        v *= activation_slope(tl.load(inner + at, mask=mask, other=0.0), ACT, SLOPE)
    tl.store(out + at, v, mask=mask)


@triton.jit
def _matrix_gradient_kernel(
    grad, x, pixels, grad_weight, grad_bias, images, rows, columns,
    ACT: tl.constexpr, SLOPE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """grad_weight = grad^T act(x / pixels), grad_bias = the sum of grad over the images; either may be None."""
    column_blocks = tl.cdiv(columns, BLOCK_K)
    r = tl.program_id(0) // column_blocks * BLOCK_R + tl.arange(0, BLOCK_R)
    k = tl.program_id(0) % column_blocks * BLOCK_K + tl.arange(0, BLOCK_K)
    total = tl.zeros((BLOCK_R, BLOCK_K), x.dtype.element_ty)
    bias = tl.zeros((BLOCK_R,), x.dtype.element_ty)
    for first in range(0, images, BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)
        mask = (n < images)[:, None] & (r < rows)[None, :]
        g = tl.load(grad + (n.to(tl.int64) * rows)[:, None] + r[None, :], mask=mask, other=0.0)
        if grad_weight is not None:
            value = _inputs(x, n, k, images, columns, pixels, ACT, SLOPE)
            total += tl.sum(g[:, :, None] * value[:, None, :], 0)
        bias += tl.sum(g, 0)
    if grad_weight is not None:
        at = (r.to(tl.int64) * columns)[:, None] + k[None, :]
        mask = (r < rows)[:, None] & (k < columns)[None, :]
        tl.store(grad_weight + at, total.to(grad_weight.dtype.element_ty), mask=mask)
    if grad_bias is not None:
        # `(r < rows) & (... == 0)` is no mask to 3.9's interpreter.
        first_columns = tl.where(tl.program_id(0) % column_blocks == 0, r < rows, False)
        tl.store(grad_bias + r, bias.to(grad_bias.dtype.element_ty), mask=first_columns)


# ---- configs --------------------------------------------------------------------------------------------------------

_POINT = Window(1, 1, 1, 1, 0, 0, 1, 1, 1, 0, None)  # a map is read where it is written
_WARPS = 4
_REGISTERS = 168  # at most; left alone the assembler keeps to what gives one program more, and spills
_TILE_BYTES = 2**13  # of a map, in a program: four 16-byte accesses a thread
_PROGRAMS = 2**11  # of the sums: several a multiprocessor
_MATRIX_TILE = 2**11  # elements, for each of _IMAGES
_IMAGES = 4


class Tile(NamedTuple):
    """Pixels and channels of a program, its warps, the bound on a thread's registers."""

    BLOCK_P: int
    BLOCK_C: int
    num_warps: int = _WARPS
    maxnreg: int | None = _REGISTERS


def _tile(x: Tensor, channels_last: bool, pixels: int) -> Tile:
    """The tile of a map: along the axis that lies side by side in memory first, as much as one access of a warp."""
    if L.INTERPRETED:
        return Tile(64, 16, _WARPS, None)
    elements, channels = _TILE_BYTES // x.element_size(), triton.next_power_of_2(x.shape[1])
    if channels_last:
        block_c = min(64, channels)
        return Tile(elements // block_c, block_c)
    block_p = min(256, triton.next_power_of_2(pixels))
    return Tile(block_p, min(elements // block_p, channels))


class ProductTile(NamedTuple):
    """Images, rows and columns of a product's program, and its warps."""

    BLOCK_N: int
    BLOCK_R: int
    BLOCK_K: int
    num_warps: int = _WARPS
    maxnreg: int | None = _REGISTERS


def _product_tile(x: Tensor, rows: int, columns: int, transposed: bool) -> ProductTile:
    """A tile of the matrix as long as may be where it lies side by side: along its columns, or transposed its rows."""
    elements = _MATRIX_TILE * 4 // x.element_size()
    rows, columns = triton.next_power_of_2(rows), triton.next_power_of_2(columns)
    if transposed:
        block_r = min(rows, 64)
        return ProductTile(_IMAGES, block_r, min(columns, elements // block_r))
    block_k = min(columns, 256)
    return ProductTile(_IMAGES, min(rows, elements // block_k), block_k)


def configs() -> dict[str, list[dict[str, Any]]]:
    """What the choosers can return, by kernel, for the ahead-of-time check: blocks follow the sizes."""
    products = ("_product_kernel", "_product_gradient_kernel", "_matrix_gradient_kernel")
    return dict.fromkeys(("_sums_kernel", "_scale_kernel", *products), [{"num_warps": _WARPS, "maxnreg": _REGISTERS}])


# ---- host: maps -----------------------------------------------------------------------------------------------------


def _flat(maps: Sequence[Tensor]) -> list[Tensor]:
    """The maps as [N,C,1,H W] where the rows of all of them follow each other without gaps; else as they are."""
    h, w = maps[0].shape[2:]
    if h > 1 and w > 1 and any(x.stride(2) != x.stride(3) * w for x in maps):
        return list(maps)
    return [x.view(*x.shape[:2], 1, h * w) for x in maps]


class _Plan(NamedTuple):
    """What launches over maps have in common."""

    maps: list[Tensor]
    sizes: Sizes
    tiles: int  # of an image's pixels
    channel_blocks: int
    tile: Tile
    constants: dict[str, Any]


def _plan(maps: Sequence[Tensor]) -> _Plan:
    maps = _flat(maps)
    n, c, h, w = maps[0].shape
    sizes = Sizes(h, w, h, w, n * h * w, c)
    tile = _tile(maps[0], c > 1 and maps[0].stride(1) == 1, h * w)
    constants = {"WIDE": L.needs_wide(maps, sizes, _POINT), "VEC": L.vector_width(maps, (c,)), **tile._asdict()}
    return _Plan(maps, sizes, triton.cdiv(h * w, tile.BLOCK_P), triton.cdiv(c, tile.BLOCK_C), tile, constants)


def pixel_sums(x: Tensor, grad: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """The sums of x, and of grad * x, over an image's pixels: [N,C] in the accumulators' dtype; deterministic.

    Args:
        x, grad: [N,C,H,W], any strides.
    """
    plan = _plan([x] if grad is None else [x, grad])
    n, c = x.shape[:2]
    wanted = triton.cdiv(_PROGRAMS, max(1, n * plan.channel_blocks))
    steps = 3 if L.INTERPRETED else triton.cdiv(plan.tiles, min(plan.tiles, wanted))
    blocks = triton.cdiv(plan.tiles, steps)
    found = [partials(x, blocks, 1, n * c) for _ in plan.maps]
    x, grad = (*plan.maps, None)[:2]
    L.launch(
        _sums_kernel, n * blocks * plan.channel_blocks, x,
        L.as_map(x), L.as_map(grad), found[0], found[-1], plan.sizes, blocks, steps,
        **plan.constants,
    )  # fmt: skip
    sums = [_over_blocks(partial, n, c) for partial in found]
    return sums[0], None if grad is None else sums[1]


def _over_blocks(partial: Tensor, n: int, c: int) -> Tensor:
    """[blocks, 1, N C] -> [N,C]."""
    if partial.shape[0] == 1 or n == 0:
        return partial[0].view(n, c)
    return sum_partials(partial, torch.empty((n, c), dtype=partial.dtype, device=partial.device))


def scale(x: Tensor, gates: Tensor, offsets: Tensor | None, channels_last: int) -> Tensor:
    """x * gates + offsets / (H W), [N,C,H,W] of x's dtype.

    Args:
        x: any strides.
        gates, offsets: [N,C] in the accumulators' dtype; `offsets` may be None.
        channels_last: the result's memory format.
    """
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=G.memory_format(channels_last))
    plan = _plan([y, x])
    flat_y, flat_x = plan.maps
    L.launch(
        _scale_kernel, x.shape[0] * plan.tiles * plan.channel_blocks, x,
        L.as_map(flat_x), gates, offsets, L.as_map(flat_y), plan.sizes, plan.tiles, **plan.constants,
    )  # fmt: skip
    return y


# ---- host: the two products -----------------------------------------------------------------------------------------


def _launch_product(
    kernel: Any, x: Tensor, arguments: tuple, weight: Tensor, transposed: bool, **constants: Any
) -> None:
    """Launches a kernel over [images, rows]: `arguments`, then images, rows, columns and the matrix's strides."""
    rows, columns = weight.shape[:2]
    strides = weight.stride()[:2]
    if transposed:
        rows, columns, strides = columns, rows, strides[::-1]
    tile = _product_tile(x, rows, columns, transposed)
    blocks = triton.cdiv(x.shape[0], tile.BLOCK_N) * triton.cdiv(rows, tile.BLOCK_R)
    L.launch(
        kernel, blocks, x, *arguments, x.shape[0], rows, columns, *strides, SLOPE=SLOPE, **constants, **tile._asdict()
    )  # fmt: skip


def _multiply(
    x: Tensor,
    pixels: int | None,
    weight: Tensor,
    bias: Tensor | None,
    grad: Tensor | None,
    activations: tuple[int, int],
) -> tuple[Tensor, Tensor | None]:
    """(out_act(v), grad * out_act'(v)) of v = act(x) @ weight^T / pixels + bias, [N, rows]; activations: both codes."""
    out = torch.empty((x.shape[0], weight.shape[0]), dtype=x.dtype, device=x.device)
    grad_out = None if grad is None else torch.empty_like(out)
    arguments = (x, pixels, weight, L.vector(bias), grad, out, grad_out)
    _launch_product(_product_kernel, x, arguments, weight, False, ACT=activations[0], OUT_ACT=activations[1])
    return out, grad_out


def _multiply_back(grad: Tensor, weight: Tensor, inner: Tensor | None, activation: int) -> Tensor:
    """grad @ weight, times activation'(inner) where there is one: [N, columns]."""
    out = torch.empty((grad.shape[0], weight.shape[1]), dtype=grad.dtype, device=grad.device)
    _launch_product(_product_gradient_kernel, grad, (grad, weight, inner, out), weight, True, ACT=activation)
    return out


def _matrix_gradient(
    grad: Tensor, x: Tensor, pixels: int | None, activation: int, weight: Tensor | None, bias: Tensor | None
) -> list[Tensor | None]:
    """Gradients of a product's weight and bias, each None where its tensor is."""
    found = [
        None if t is None else torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (weight, bias)
    ]  # fmt: skip
    rows, columns = grad.shape[1], x.shape[1]
    block_r, block_k = min(16, triton.next_power_of_2(rows)), min(32, triton.next_power_of_2(columns))
    blocks = triton.cdiv(rows, block_r) * triton.cdiv(columns, block_k)
    if any(t is not None for t in found):
        L.launch(
            _matrix_gradient_kernel, blocks, x, grad, x, pixels, *found, grad.shape[0], rows, columns,
            ACT=activation, SLOPE=SLOPE, BLOCK_N=8, BLOCK_R=block_r, BLOCK_K=block_k,
            num_warps=_WARPS, maxnreg=_REGISTERS,
        )  # fmt: skip
    return found


class _Excitation(NamedTuple):
    """The two products, and the values between them as far as a backward needs them."""

    inner: Tensor
    gates: Tensor
    grad_outer: Tensor | None


def _excite(
    sums: Tensor, pixels: int, reduce_weight: Tensor, reduce_bias: Tensor | None, expand_weight: Tensor,
    expand_bias: Tensor | None, activation: int, gate: int, grad_gates: Tensor | None = None,
) -> _Excitation:  # fmt: skip
    inner, _ = _multiply(sums, pixels, reduce_weight, reduce_bias, None, (NONE, NONE))
    return _Excitation(inner, *_multiply(inner, None, expand_weight, expand_bias, grad_gates, (activation, gate)))


def excitation(
    sums: Tensor, pixels: int, reduce_weight: Tensor, reduce_bias: Tensor | None, expand_weight: Tensor,
    expand_bias: Tensor | None, activation: int, gate: int,
) -> Tensor:  # fmt: skip
    """The gates of a squeeze-excite: gate(W2 activation(W1 sums / pixels + b1) + b2).

    Args:
        sums: [N,C], contiguous, of an image's pixels, in the accumulators' dtype.
        pixels: how many were summed up.
        reduce_weight, reduce_bias: [Cr,C,1,1], any strides; [Cr] or None. expand_weight, expand_bias: [C,Cr,1,1]; [C].
        activation, gate: codes of effops.ops.epilogue.

    Returns:
        [N,C] in the dtype of `sums`; nothing between is rounded to the maps' dtype.
    """
    return _excite(sums, pixels, reduce_weight, reduce_bias, expand_weight, expand_bias, activation, gate).gates


def excitation_gradient(
    grad_gates: Tensor, sums: Tensor, pixels: int, reduce_weight: Tensor, reduce_bias: Tensor | None,
    expand_weight: Tensor, expand_bias: Tensor | None, activation: int, gate: int, mask: int,
) -> tuple[Tensor | None, list[Tensor | None]]:  # fmt: skip
    """Gradients of `excitation` from that of its gates; what is between is computed anew. Deterministic.

    Args:
        grad_gates: [N,C], contiguous, in the dtype of `sums`.
        mask: bit 0 asks for the mean's gradient, bits 1 to 4 for those of the weights and biases, in their order.

    Returns:
        (gradient at the mean [N,C] in the dtype of `sums`: a pixel's is that divided by `pixels`; gradients of
        reduce_weight, reduce_bias, expand_weight, expand_bias in their dtypes), each None where not asked for.
    """
    tensors = (reduce_weight, reduce_bias, expand_weight, expand_bias)
    excited = _excite(sums, pixels, *tensors, activation, gate, grad_gates)
    return _gradients(excited, sums, pixels, tensors, activation, mask)


def _gradients(
    excited: _Excitation, sums: Tensor, pixels: int, tensors: tuple[Tensor | None, ...], activation: int, mask: int
) -> tuple[Tensor | None, list[Tensor | None]]:
    """What `excitation_gradient` returns."""
    reduce_weight, _, expand_weight, _ = tensors
    wanted = [t if mask >> bit & 1 else None for bit, t in enumerate(tensors, 1)]
    mean, reduced = None, [None, None]
    if mask & 0b00111:
        grad_inner = _multiply_back(excited.grad_outer, expand_weight, excited.inner, activation)
        if mask & 1:
            mean = _multiply_back(grad_inner, reduce_weight, None, NONE)
        reduced = _matrix_gradient(grad_inner, sums, pixels, NONE, *wanted[:2])
    return mean, [*reduced, *_matrix_gradient(excited.grad_outer, excited.inner, None, activation, *wanted[2:])]


# ---- host: the operators --------------------------------------------------------------------------------------------


def se_fwd(
    input: Tensor, reduce_weight: Tensor, reduce_bias: Tensor | None, expand_weight: Tensor,
    expand_bias: Tensor | None, sums: Tensor | None, geometry: list[int],
) -> Tensor:  # fmt: skip
    """The operator `se_fwd` of schemas.inc."""
    if sums is None:
        sums, _ = pixel_sums(input)
    gates = excitation(
        sums, input.shape[2] * input.shape[3], reduce_weight, reduce_bias, expand_weight, expand_bias,
        geometry[ACTIVATION], geometry[GATE],
    )  # fmt: skip
    return scale(input, gates, None, geometry[CHANNELS_LAST])


def se_bwd(
    grad_output: Tensor, input: Tensor, reduce_weight: Tensor, reduce_bias: Tensor | None, expand_weight: Tensor,
    expand_bias: Tensor | None, geometry: list[int], mask: int,
) -> list[Tensor]:  # fmt: skip
    """The operator `se_bwd` of schemas.inc."""
    pixels, activation = input.shape[2] * input.shape[3], geometry[ACTIVATION]
    tensors = (reduce_weight, reduce_bias, expand_weight, expand_bias)
    sums, grad_gates = pixel_sums(input, grad_output)
    excited = _excite(sums, pixels, *tensors, activation, geometry[GATE], grad_gates)
    mean, gradients = _gradients(excited, sums, pixels, tensors, activation, mask)
    if mask & 1:
        gradients.insert(0, scale(grad_output, excited.gates, mean, geometry[CHANNELS_LAST]))
    return [gradient for gradient in gradients if gradient is not None]
