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

import triton
import triton.language as tl
from torch import Tensor

from effops.ops import geometry as G
from effops.ops import triton_launch as L
from effops.ops.registration import fake_output
from effops.ops.triton_device import (
    Chain,
    block_of,
    channels_of,
    depthwise_tile,
    epilogue,
    load_tile,
    pixels_of,
    store_tile,
)


@triton.jit
def _forward_kernel(
    x, weight, affine, residual, y, sizes,
    WINDOW: tl.constexpr, CHAIN: tl.constexpr, WIDE: tl.constexpr, VEC: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    channel_blocks = tl.cdiv(sizes.D, BLOCK_C)
    m = block_of(tl.program_id(0) // channel_blocks, BLOCK_M, WIDE)
    o, live = channels_of(tl.program_id(0) % channel_blocks, sizes, BLOCK_C, VEC)
    inside = m < sizes.M
    n, p, q = pixels_of(m, sizes)
    u = depthwise_tile(x, weight, n, p, q, inside, o, live, sizes, WINDOW, VEC)
    mask = inside[:, None] & live[None, :]
    added = None
    if residual.data is not None:
        added = load_tile(residual, n, p, q, o, mask, VEC)
    store_tile(y, n, p, q, o, epilogue(u, affine, added, o, live, CHAIN), mask, VEC)


def config(x: Tensor, weight: Tensor, geometry: list[int]) -> L.Config:
    return L.Config(16, 16, 0, 4, 2) if L.INTERPRETED else L.Config(64, 64, 0, 4, 2)


def dwconv_fwd(
    input: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None, shift: Tensor | None,
    residual: Tensor | None, geometry: list[int], slope: float,
) -> Tensor:  # fmt: skip
    sizes, window = L.sizes_of(input, weight, geometry), L.window_of(weight, geometry)
    output = fake_output(input, (input.shape[0], sizes.D, sizes.P, sizes.Q), geometry)
    maps = (input, residual, output)
    c = config(input, weight, geometry)
    L.launch(
        _forward_kernel, triton.cdiv(sizes.M, c.BLOCK_M) * triton.cdiv(sizes.D, c.BLOCK_C), input,
        L.as_map(input), weight.contiguous(), L.affine(bias, scale, shift), L.as_map(residual), L.as_map(output), sizes,
        WINDOW=window, CHAIN=L.depthwise_chain(geometry, slope), WIDE=L.needs_wide(maps, sizes, window),
        VEC=L.vector_width(maps, (input.shape[1], sizes.D)), BLOCK_M=c.BLOCK_M, BLOCK_C=c.BLOCK_C,
        num_warps=c.num_warps, num_stages=c.num_stages,
    )  # fmt: skip
    return output
