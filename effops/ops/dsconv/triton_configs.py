"""Tiles of the Triton kernels of room dsconv: which a kernel takes by dtype, sizes and the accesses that maps allow."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from effops.ops import triton_launch as L


class Config(NamedTuple):
    """A kernel's tile (pixels, channels of the depthwise convolution, output channels) and its launch parameters."""

    BLOCK_M: int
    BLOCK_C: int
    BLOCK_K: int
    num_warps: int
    num_stages: int
    maxnreg: int | None = None  # bound on a thread's registers; None leaves it to the assembler


_INTERPRETED = Config(64, 32, 64, 4, 1)

# (BLOCK_M, BLOCK_K): (BLOCK_C, warps), in order of preference for a given BLOCK_K.
# half    64 pixels fill a wgmma; 32 channels are 64 bytes, two sectors, of a pixel, and a thread holds 8 or 16
#         elements of z: more, times a row of taps in flight, would halve the programs a processor holds. Few pixels:
#         64 channels, so that the sum over C takes half as many steps, each a trip to memory.
# tf32    the same in twice the bytes: 16 channels where a thread would hold 16 elements of 4 bytes.
# ieee    FMA, not tensor cores: bound by arithmetic from 64 channels on; shared memory feeds 8 x 4 sums a thread.
# double  DMMA on sm_80 and 90: tiles are small, as everything is twice as wide.
_FORWARD = {
    "half": {
        (64, 256): (32, 8), (32, 256): (32, 8), (16, 256): (64, 8),
        (64, 128): (32, 4), (32, 128): (32, 4), (16, 128): (64, 4),
        (64, 64): (32, 4), (32, 64): (32, 4), (16, 64): (64, 4),
        (64, 32): (32, 4), (32, 32): (32, 4), (16, 32): (64, 4),
    },
    "tf32": {
        (32, 256): (32, 8), (16, 256): (32, 8),
        (64, 128): (32, 8), (32, 128): (32, 4), (16, 128): (32, 4),
        (64, 64): (32, 8), (32, 64): (32, 4), (16, 64): (32, 4),
        (64, 32): (16, 4), (32, 32): (32, 4), (16, 32): (32, 4),
    },
    "ieee": {
        (64, 128): (16, 8), (32, 128): (16, 8), (16, 128): (16, 4),
        (64, 64): (16, 8), (32, 64): (16, 4), (16, 64): (16, 4),
        (64, 32): (16, 4), (32, 32): (16, 4), (16, 32): (16, 4),
    },
    "double": {
        (32, 64): (16, 8), (16, 64): (16, 4),
        (32, 32): (16, 4), (16, 32): (16, 4),
    },
}  # fmt: skip

# The same for the gradient at the pointwise sums: its epilogue needs the registers of as many sums again.
_OUTPUT_GRADIENT = {
    "half": {
        (32, 128): (32, 8), (16, 128): (64, 8),
        (64, 64): (32, 8), (32, 64): (32, 4), (16, 64): (64, 4),
        (64, 32): (32, 4), (32, 32): (32, 4), (16, 32): (64, 4),
    },
    "tf32": {
        (32, 128): (32, 8), (16, 128): (32, 8),
        (64, 64): (32, 8), (32, 64): (32, 4), (16, 64): (32, 4),
        (64, 32): (16, 4), (32, 32): (32, 4), (16, 32): (32, 4),
    },
    "ieee": {
        (64, 64): (16, 8), (32, 64): (16, 4), (16, 64): (16, 4),
        (64, 32): (16, 4), (32, 32): (16, 4), (16, 32): (16, 4),
    },
    "double": {
        (16, 64): (16, 8),
        (32, 32): (16, 8), (16, 32): (16, 4),
    },
}  # fmt: skip

# Several windows' code behind one another keeps more addresses beside the widest tile's sums than there is room for.
_PARTS = _FORWARD | {"ieee": {tile: rest for tile, rest in _FORWARD["ieee"].items() if tile != (64, 128)}}

# The sums that stand beside the output, and their mask: too much beside 32 rows of doubles.
_POOLED = _FORWARD | {"double": {(16, 64): (16, 8), (16, 32): (16, 4)}}

_POINTWISE = {"forward": _FORWARD, "pooled": _POOLED, "parts": _PARTS, "output_gradient": _OUTPUT_GRADIENT}

# BLOCK_M: (BLOCK_C, BLOCK_K, warps, stages) of the kernels that sum over k, in order of preference. The loop over k has
# nothing but loads and a dot, so it is pipelined: three stages of (64 + 64) x 64 halves are 48 KB, of 227 a processor.
_BACKWARD = {
    "half": {64: (64, 64, 8, 3), 32: (64, 64, 8, 3), 16: (64, 64, 4, 3)},
    "tf32": {64: (32, 32, 8, 2), 32: (32, 32, 4, 2), 16: (32, 32, 4, 2)},
    "ieee": {64: (32, 32, 8, 2), 32: (32, 32, 8, 2), 16: (32, 32, 4, 2)},
    "double": {32: (16, 32, 4, 2), 16: (16, 32, 4, 2)},
}

# (BLOCK_M, BLOCK_C, BLOCK_K) of the kernel that sums over pixels; the second where maps are read channel by channel.
# 128 of K, so that z is computed once for most layers; each further block of channels reads du again, from L2.
_MATRIX = {
    "half": ((64, 64, 128), (64, 32, 128)),
    "tf32": ((64, 32, 128), (64, 32, 128)),
    "ieee": ((32, 32, 128), (32, 32, 128)),
    "double": ((32, 16, 64), (32, 16, 64)),
}


def pointwise_configs(kernel: str) -> list[dict[str, Any]]:
    """What `pointwise_config` can return, for the ahead-of-time check."""
    tables = _POINTWISE[kernel].items()
    tiles = {(m, k, "tf32" if kind == "tf32" else "ieee") for kind, tiles in tables for m, k in tiles}
    return [{"BLOCK_M": m, "BLOCK_K": k, "PRECISION": precision} for m, k, precision in sorted(tiles)]


def configs() -> dict[str, list[dict[str, Any]]]:
    """What the choosers can return, by kernel, for the ahead-of-time check."""
    backward = {(m, k, warps) for tiles in _BACKWARD.values() for m, (_, k, warps, _) in tiles.items()}
    over_k = [{"BLOCK_M": m, "BLOCK_K": k, "num_warps": warps} for m, k, warps in sorted(backward)]
    return {
        "_forward_kernel": pointwise_configs("forward"),
        "_pooled_kernel": pointwise_configs("pooled"),
        "_output_gradient_kernel": pointwise_configs("output_gradient"),
        # The same tiles; no problem of the check has so few pixels beside passed channels as the smallest needs.
        "_passed_gradient_kernel": [{"BLOCK_K": k} for k in sorted({k for _, k, _ in backward})],
        "_depthwise_gradient_kernel": over_k,
        "_matrix_gradient_kernel": [{"BLOCK_M": m} for m in sorted({m for pair in _MATRIX.values() for m, *_ in pair})],
    }


def kind_of(x: Tensor) -> str:
    """The part of a table of tiles that is for products of this map."""
    if x.element_size() == 2:
        return "half"
    return "double" if x.dtype == torch.float64 else L.dot_precision(x)


def pointwise_config(kernel: str, x: Tensor, pixels: int, channels: int, k: int, vec: int, plain: bool) -> Config:
    """The widest tile of the table that gives every processor a program, pixels given up before channels.

    Args:
        kernel: "forward", the same with its sums, "pooled", or of several windows, "parts"; or "output_gradient".
        x: the input.
        pixels: of the output.
        channels: of z's larger part, depthwise or passed.
        k: the pointwise convolution's output channels.
        vec: how many channels an access to z's maps takes. Where it is one, the addresses need the registers of the
            largest tile, and the others twice the threads.
        plain: whether threads get by with 128 registers, or 160 where four warps hold 64 x 128 sums: programs of 12 to
            16 warps in all on a processor, some loading while others compute. Others take what they need: without a
            bound the assembler aims at an occupancy of its own and may spill for it.
    """
    if L.INTERPRETED:
        return _INTERPRETED
    tiles = _POINTWISE[kernel][kind_of(x)]
    widest = max(triton.next_power_of_2(k), min(block_k for _, block_k in tiles))
    deepest = max(triton.next_power_of_2(channels), 16)
    for (block_m, block_k), (block_c, warps) in tiles.items():
        if block_k > widest or (vec == 1 and block_m * block_k > 64 * 128):
            continue
        warps = 8 if vec == 1 and block_m == 64 else warps
        bound = (160 if (block_m, block_k, warps) == (64, 128, 4) else 128) if plain else 255
        config = Config(block_m, min(block_c, deepest), block_k, warps, 2, bound)
        if triton.cdiv(pixels, block_m) * triton.cdiv(k, block_k) >= L.processors(x):
            break
    return config


def backward_config(x: Tensor, pixels: int, channels: int, vec: int) -> Config:
    """As `pointwise_config`, for a kernel whose programs own a block of `channels`, each summing over all K."""
    if L.INTERPRETED:
        return _INTERPRETED
    for block_m, (block_c, block_k, warps, stages) in _BACKWARD[kind_of(x)].items():
        block_c = min(block_c, 32) if vec == 1 else block_c  # read one by one: their addresses take registers too
        block_c = min(block_c, max(triton.next_power_of_2(channels), 16))
        config = Config(block_m, block_c, block_k, warps, stages, 255)
        if triton.cdiv(pixels, block_m) * triton.cdiv(channels, block_c) >= L.processors(x):
            break
    return config


def matrix_config(x: Tensor, channels: int, k: int, vec: int) -> Config:
    """The tile of the pointwise weight's gradient: BLOCK_K x BLOCK_C sums, BLOCK_M pixels a step."""
    if L.INTERPRETED:
        return _INTERPRETED
    block_m, block_c, block_k = _MATRIX[kind_of(x)][vec == 1]
    block_c = min(block_c, max(triton.next_power_of_2(channels), 16))
    block_k = min(block_k, max(triton.next_power_of_2(k), 32))
    return Config(block_m, block_c, block_k, 8, 1, 255)
