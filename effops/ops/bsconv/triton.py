"""Triton kernels of room bsconv. None has run on a GPU yet: what is said of speed here is calculated.

forward      one program: a patch of output pixels, and some or all blocks of BLOCK_E output channels (triton_patch.py
             shows the patch, its region and the ring)

             [BSConv-S: x at the region's pixels -> tl.dot -> scale, shift -> middle, in scratch beside the ring]
             a block of output channels at a time:
                 x or middle  [BLOCK_X pixels, BLOCK_C] -> tl.dot with the matrix's block, sums in registers
                 epilogue, rounded -> ring; barrier
                 the window's taps from the ring, sums in registers; epilogue, residual -> y, stored once

             x once from memory plus the halo (1.4 times at patches of 16 x 8 and a 3x3 window, from L2 where the
             neighbour's program has just read it), y once; what stands between the convolutions never. The products are
             those of the region: 1.4 times as many as of the map.
backward     what stood between is computed again, into scratch that is as large as eager's saved tensor but gone when
             the operator returns; then room dwconv's kernels on it, then the pointwise convolution's gradients by room
             dsconv's kernels (`pointwise_backward`), of BSConv-S both. Deterministic.

Calculated for fp16, channels_last, batch 128, 56 x 56, 3x3 on an H200 (4.3 TB/s, 790 TFLOP/s):
             128 -> 128 channels    x 103 MB + y 103 MB = 512 bytes a pixel: 48 us; the dots 1.4 x 17 us. Through L1
             pass the ring, written once and read nine times (10.4 x 103 MB), and x for each of four blocks (5.6 x 103
             MB): 56 us at 128 bytes a clock and processor. Two perfect kernels would take 96 us.
             64 -> 128, middle 16 (BSConv-S)    x 51 MB + y 103 MB = 384 bytes a pixel: 36 us; the dots 4 us. L1:
             the ring as above, 1.2 GB with the rest, 41 us. Three perfect kernels: 90 us.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from effops.ops import geometry as G
from effops.ops import triton_launch as L
from effops.ops.bsconv.triton_configs import configs as configs  # the ahead-of-time check looks for it here
from effops.ops.bsconv.triton_configs import forward_config
from effops.ops.bsconv.triton_patch import (
    patch_of,
    patches_an_image,
    pixels_of,
    pointwise_into,
    region_of,
    scratch_map,
    scratch_of,
    steps_of,
    tiling_of,
)
from effops.ops.dsconv.triton import Matrix
from effops.ops.dsconv.triton_pointwise import Pointwise, pointwise_backward, pointwise_forward
from effops.ops.dwconv.triton import dwconv_bwd
from effops.ops.epilogue import NONE
from effops.ops.registration import fake_output
from effops.ops.triton_device import (
    Chain,
    accumulator,
    channels_of,
    depthwise_tile,
    epilogue,
    load_tile,
    store_tile,
    store_vector,
)
from effops.ops.triton_sum import partials, sum_partials

_LINEAR = Chain(NONE, NONE, 0.0)  # behind the first product of BSConv-S is nothing but scale and shift

# Taps whose loads are in flight together: a row of most windows.
_TAPS_IN_FLIGHT = tl.constexpr(7)


class Vectors(NamedTuple):
    """Channels an access may take (constexpr).

    Attributes:
        X: of the input.
        SOURCE: of what the second product reads, the middle or the input.
        Y: of the output and the residual.
        MID_MATRIX, MATRIX: of the two products' weights.
    """

    X: int
    SOURCE: int
    Y: int
    MID_MATRIX: int
    MATRIX: int


# ---- forward --------------------------------------------------------------------------------------------------------


@triton.jit
def _middle(
    data, x, mid, affine, region, WIDTH,
    CHAIN: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr, VEC: tl.constexpr,
    BLOCK_X: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """The first pointwise convolution of BSConv-S at the region's pixels, all channels, into scratch; its Map."""
    target = scratch_map(data, region, 0, WIDTH)
    for block in range(tl.cdiv(mid.K, BLOCK_E)):
        o, live = channels_of(block, mid.K, BLOCK_E, WIDE, VEC.SOURCE)
        pointwise_into(
            target, x, mid, affine, region, o, live,
            CHAIN, PRECISION, WIDE, VEC.X, VEC.MID_MATRIX, VEC.SOURCE, BLOCK_X, BLOCK_C,
        )  # fmt: skip
    tl.debug_barrier()
    return target


@triton.jit
def _store_pooled(pooled, patch, n, o, live, z, sizes, ROWS: tl.constexpr, COLS: tl.constexpr):
    """pooled[patch of the image, n, o] = z's sum over the patch's pixels."""
    an_image = patches_an_image(sizes, ROWS, COLS)
    images = sizes.M // (sizes.P * sizes.Q)
    store_vector(pooled, patch % an_image, images * sizes.D, n * sizes.D + o, live, tl.sum(z, 0))


@triton.jit
def _forward_kernel(
    x, mid, mid_affine, pw, pw_affine, bank, affine, residual, y, pooled, ring, middle, sizes, capacity, width, items,
    parts, steps,
    WINDOW: tl.constexpr, MID_CHAIN: tl.constexpr, PW_CHAIN: tl.constexpr, CHAIN: tl.constexpr,
    PRECISION: tl.constexpr, WIDE: tl.constexpr, VEC: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    BLOCK_X: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    for turn in range(tl.cdiv(items - tl.program_id(0), tl.num_programs(0))):
        item = tl.program_id(0) + turn * tl.num_programs(0)
        patch = item // parts
        n, first_p, first_q = patch_of(patch, sizes, ROWS, COLS, WIDE)
        region = region_of(n, first_p, first_q, sizes, WINDOW, ROWS, COLS)
        pixel_n, p, q, inside = pixels_of(n, first_p, first_q, sizes, ROWS, COLS)
        source = x
        if mid is not None:
            source = _middle(
                middle + program * capacity * width, x, mid, mid_affine, region, width,
                MID_CHAIN, PRECISION, WIDE, VEC, BLOCK_X, BLOCK_C, BLOCK_E,
            )  # fmt: skip
        for step in range(steps):
            block = item % parts * steps + step
            o, live = channels_of(block, sizes.D, BLOCK_E, WIDE, VEC.Y)
            buffer = ring + (program * 2 + (turn * steps + step) % 2) * capacity * BLOCK_E
            e = scratch_map(buffer, region, block * BLOCK_E, BLOCK_E)
            pointwise_into(
                e, source, pw, pw_affine, region, o, live,
                PW_CHAIN, PRECISION, WIDE, VEC.SOURCE, VEC.MATRIX, VEC.Y, BLOCK_X, BLOCK_C,
            )  # fmt: skip
            tl.debug_barrier()
            u = depthwise_tile(e, bank, pixel_n, p, q, inside, o, live, sizes, WINDOW, VEC.Y, _TAPS_IN_FLIGHT)
            mask = inside[:, None] & live[None, :]
            added = None
            if residual.data is not None:
                added = load_tile(residual, pixel_n, p, q, o, mask, VEC.Y)
            z = epilogue(u, affine, added, o, live, CHAIN)
            store_tile(y, pixel_n, p, q, o, z, mask, VEC.Y)
            if pooled is not None:  # of what is stored: rounded
                rounded = z.to(y.data.dtype.element_ty).to(accumulator(y.data.dtype.element_ty))
                _store_pooled(pooled, patch, n, o, live, tl.where(mask, rounded, 0.0), sizes, ROWS, COLS)


# ---- host -----------------------------------------------------------------------------------------------------------


class Depthwise(NamedTuple):
    """A depthwise convolution and its epilogue.

    Attributes:
        weight: [D,1,R,S]. bias, scale, shift: [D] or None. residual: [N,D,P,Q] or None.
        geometry: the 13 ints of dwconv_* (schemas.inc).
        slope: of its leaky_relu.
    """

    weight: Tensor
    bias: Tensor | None
    scale: Tensor | None
    shift: Tensor | None
    residual: Tensor | None
    geometry: list[int]
    slope: float


def matrix_of(weight: Tensor) -> Matrix:
    """A pointwise weight all of whose channels pass."""
    k, c = weight.stride()[:2]
    return Matrix(weight, k, c, weight.shape[0], weight.shape[1])


def _vectors(x: Tensor, mid: Pointwise | None, pw: Pointwise, outer: tuple[Tensor | None, ...]) -> Vectors:
    own, matrix = L.vector_width((x,), (x.shape[1],)), L.vector_width((pw.weight,), (pw.weight.shape[1],))
    y = L.vector_width(outer, (pw.weight.shape[0],))
    if mid is None:
        return Vectors(own, own, y, 1, matrix)
    middle = math.gcd(16 // x.element_size(), mid.weight.shape[0])  # in scratch, where pixels are aligned
    return Vectors(own, middle, y, L.vector_width((mid.weight,), (x.shape[1],)), matrix)


def pointwise_depthwise(
    x: Tensor, mid: Pointwise | None, pw: Pointwise, dw: Depthwise, pool: bool = False
) -> tuple[Tensor, Tensor | None]:
    """[mid,] pw and dw, one after the other, in one kernel.

    Returns:
        The result [N,D,P,Q], and, where `pool` says so, its sums over P and Q, [N,D] in the accumulators' dtype.
    """
    sizes = L.sizes_of(x, dw.weight, dw.geometry)._replace(D=pw.weight.shape[0])
    window = L.window_of(dw.weight, dw.geometry)
    output = fake_output(x, (x.shape[0], sizes.D, sizes.P, sizes.Q), dw.geometry)
    between = 0 if mid is None else mid.weight.shape[0]
    vectors = _vectors(x, mid, pw, (dw.residual, output))
    config, pixels = forward_config(x, sizes, max(x.shape[1], between), min(vectors.X, vectors.Y))
    tiling = tiling_of(pixels, config.BLOCK_X, sizes, window)
    blocks = triton.cdiv(sizes.D, config.BLOCK_E)
    steps = steps_of(blocks, tiling.patches, x)
    parts = triton.cdiv(blocks, steps)
    width = triton.cdiv(between, 16) * 16
    scratch = scratch_of(x, tiling.patches * parts, tiling.pixels, config.BLOCK_E, config.num_warps, width)
    pooled = partials(x, tiling.an_image, 1, x.shape[0] * sizes.D) if pool else None
    bank, window = L.bank_of(dw.weight, window, sizes, vectors.Y, torch.promote_types(x.dtype, torch.float32))
    L.launch(
        _forward_kernel, scratch.programs, x,
        L.as_map(x), None if mid is None else matrix_of(mid.weight),
        None if mid is None else L.affine(*mid[1:4]), matrix_of(pw.weight), L.affine(*pw[1:4]),
        bank, L.affine(*dw[1:4]), L.as_map(dw.residual), L.as_map(output), pooled, *scratch, sizes, tiling.pixels,
        width, tiling.patches * parts, parts, steps,
        WINDOW=window, MID_CHAIN=_LINEAR, PW_CHAIN=pw.chain, CHAIN=L.depthwise_chain(dw.geometry, dw.slope),
        PRECISION=L.dot_precision(x), WIDE=L.needs_wide((x, dw.residual, output), sizes, window), VEC=vectors,
        ROWS=tiling.rows, COLS=tiling.columns, **config._asdict(),
    )  # fmt: skip
    if pooled is None:
        return output, None
    if tiling.an_image == 1 or x.shape[0] == 0:
        return output, pooled.view(x.shape[0], sizes.D)
    return output, sum_partials(pooled, torch.empty((x.shape[0], sizes.D), dtype=pooled.dtype, device=x.device))


def _convolutions(
    tensors: tuple[Tensor | None, ...], geometry: list[int], slopes: list[float]
) -> tuple[Pointwise | None, Pointwise, Depthwise]:
    """The three from the operator's tensors behind its input."""
    mid_weight, mid_scale, mid_shift, pw_weight, pw_bias, pw_scale, pw_shift, *depthwise = tensors
    mid = None
    if mid_weight is not None:
        mid = Pointwise(mid_weight, None, mid_scale, mid_shift, _LINEAR)
    chain = Chain(geometry[G.PW_ACTIVATION], geometry[G.PW_POST_ACTIVATION], slopes[0])
    pw = Pointwise(pw_weight, pw_bias, pw_scale, pw_shift, chain)
    return mid, pw, Depthwise(*depthwise, [*geometry[: G.PW_ACTIVATION], 0], slopes[1])


def bsconv_fwd(
    input: Tensor, mid_weight: Tensor | None, mid_scale: Tensor | None, mid_shift: Tensor | None, pw_weight: Tensor,
    pw_bias: Tensor | None, pw_scale: Tensor | None, pw_shift: Tensor | None, dw_weight: Tensor, bias: Tensor | None,
    scale: Tensor | None, shift: Tensor | None, residual: Tensor | None, geometry: list[int], slopes: list[float],
) -> Tensor:  # fmt: skip
    """The operator `bsconv_fwd` of schemas.inc."""
    tensors = (
        mid_weight, mid_scale, mid_shift, pw_weight, pw_bias, pw_scale, pw_shift,
        dw_weight, bias, scale, shift, residual,
    )  # fmt: skip
    return pointwise_depthwise(input, *_convolutions(tensors, geometry, slopes))[0]


def bsconv_bwd(
    grad_output: Tensor, output: Tensor | None, input: Tensor, mid_weight: Tensor | None, mid_scale: Tensor | None,
    mid_shift: Tensor | None, pw_weight: Tensor, pw_bias: Tensor | None, pw_scale: Tensor | None,
    pw_shift: Tensor | None, dw_weight: Tensor, bias: Tensor | None, scale: Tensor | None, shift: Tensor | None,
    residual: Tensor | None, geometry: list[int], slopes: list[float], mask: int,
) -> list[Tensor]:  # fmt: skip
    """The operator `bsconv_bwd` of schemas.inc."""
    tensors = (
        mid_weight, mid_scale, mid_shift, pw_weight, pw_bias, pw_scale, pw_shift,
        dw_weight, bias, scale, shift, residual,
    )  # fmt: skip
    mid, pw, dw = _convolutions(tensors, geometry, slopes)
    last = geometry[G.CHANNELS_LAST]
    wants = [bool(mask >> bit & 1) for bit in range(13)]
    middle = input if mid is None else pointwise_forward(input, mid, last)
    expanded = pointwise_forward(middle, pw, last)
    # Of each convolution: the gradient of its input, where anything ahead asks for one, and those of its own tensors.
    found: list[Tensor | None] = [None] * 13
    behind, *found[8:] = depthwise_gradients(grad_output, output, expanded, dw, [any(wants[:8]), *wants[8:]])
    del expanded
    if any(wants[:8]):
        wanted = [any(wants[:4]) if mid else wants[0], *wants[4:8], False]
        behind, *found[4:8], _ = pointwise_backward(behind, middle, pw, last, wanted)
    if mid is not None and any(wants[:4]):
        wanted = [wants[0], wants[1], False, wants[2], wants[3], False]
        behind, found[1], _, found[2], found[3], _ = pointwise_backward(behind, input, mid, last, wanted)
    found[0] = behind
    return [gradient for gradient, wanted in zip(found, wants, strict=True) if wanted]


def depthwise_gradients(
    grad: Tensor, output: Tensor | None, x: Tensor, dw: Depthwise, wanted: list[bool]
) -> list[Tensor | None]:
    """Gradients of x, weight, bias, scale, shift and residual, each None unless wanted (room dwconv's kernels)."""
    mask = sum(1 << bit for bit, want in enumerate(wanted) if want)
    found = iter(dwconv_bwd(grad, output, x, *dw, mask) if mask else ())
    return [next(found) if want else None for want in wanted]
