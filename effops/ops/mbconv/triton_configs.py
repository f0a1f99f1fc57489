"""Tiles of the Triton kernel of room mbconv: which it takes by dtype, sizes and the accesses that maps allow."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
from torch import Tensor

from effops.ops import triton_launch as L
from effops.ops.dsconv.triton_configs import kind_of
from effops.ops.triton_device import Sizes


class Config(NamedTuple):
    """Pixels of an expansion's product, input channels a step, expanded channels a block, output channels; launching.

    One stage: Triton's pipeline would load from the ring ahead of the barrier.
    """

    BLOCK_X: int
    BLOCK_C: int
    BLOCK_E: int
    BLOCK_K: int
    num_warps: int
    num_stages: int = 1
    maxnreg: int = 255


# (pixels of a patch, BLOCK_K): (BLOCK_X, BLOCK_C, BLOCK_E, warps), in order of preference for a given BLOCK_K. As much
# as registers hold of the projection's sums, 32 to 64 a thread, beside the depthwise tile's 8 to 16 elements: every
# further block of output channels expands the patch anew. Then the largest patch: the smaller, the larger its halo.
_FORWARD = {
    "half": {
        (64, 256): (64, 64, 32, 8), (32, 256): (64, 64, 32, 8), (16, 256): (32, 64, 32, 8),
        (64, 128): (64, 64, 32, 8), (32, 128): (64, 64, 32, 4), (16, 128): (32, 64, 32, 4),
        (128, 64): (64, 64, 32, 8), (64, 64): (64, 64, 32, 4), (32, 64): (64, 64, 32, 4), (16, 64): (32, 64, 32, 4),
        (128, 32): (64, 64, 32, 8), (64, 32): (64, 64, 32, 4), (32, 32): (64, 64, 32, 4), (16, 32): (32, 64, 32, 4),
    },
    "tf32": {
        (32, 256): (32, 32, 32, 8), (16, 256): (32, 32, 32, 8),
        (64, 128): (32, 32, 32, 8), (32, 128): (32, 32, 32, 8), (16, 128): (32, 32, 32, 4),
        (64, 64): (32, 32, 32, 8), (32, 64): (32, 32, 32, 4), (16, 64): (32, 32, 32, 4),
        (64, 32): (64, 32, 32, 8), (32, 32): (32, 32, 32, 4), (16, 32): (32, 32, 32, 4),
    },
    "ieee": {
        (64, 128): (32, 16, 16, 8), (32, 128): (32, 16, 16, 8), (16, 128): (32, 16, 16, 4),
        (64, 64): (32, 16, 16, 8), (32, 64): (32, 16, 16, 4), (16, 64): (32, 16, 16, 4),
        (64, 32): (32, 16, 16, 4), (32, 32): (32, 16, 16, 4), (16, 32): (32, 16, 16, 4),
    },
    "double": {
        (16, 64): (16, 16, 16, 8),
        (32, 32): (32, 16, 16, 8), (16, 32): (16, 16, 16, 4),
    },
}  # fmt: skip
_INTERPRETED = (Config(64, 32, 32, 32, 4), 32)


def configs() -> dict[str, list[dict[str, Any]]]:
    """What the chooser can return, by kernel, for the ahead-of-time check."""
    entries = {
        (k, x, e, warps, "tf32" if kind == "tf32" else "ieee")
        for kind, tiles in _FORWARD.items()
        for (_, k), (x, _, e, warps) in tiles.items()
    }
    names = ("BLOCK_K", "BLOCK_X", "BLOCK_E", "num_warps", "PRECISION")
    return {"_forward_kernel": [dict(zip(names, entry, strict=True)) for entry in sorted(entries)]}


def forward_config(x: Tensor, sizes: Sizes, k: int, vec: int) -> tuple[Config, int]:
    """The tile, and the pixels of a patch: the widest that gives every processor a program.

    Args:
        x: the input.
        k: output channels.
        vec: how many channels an access to the maps takes. Where it is one, the addresses need the registers of the
            largest tiles, and others twice the threads.
    """
    if L.INTERPRETED:
        return _INTERPRETED
    tiles = _FORWARD[kind_of(x)]
    widest = max(triton.next_power_of_2(k), min(block_k for _, block_k in tiles))
    for (pixels, block_k), (block_x, block_c, block_e, warps) in tiles.items():
        if block_k > widest or (vec == 1 and pixels * block_k > 64 * 64):
            continue
        warps = 8 if vec == 1 and pixels * block_k >= 32 * 128 else warps
        config = Config(block_x, min(block_c, max(triton.next_power_of_2(x.shape[1]), 16)), block_e, block_k, warps)
        if triton.cdiv(sizes.M, pixels) * triton.cdiv(k, block_k) >= L.processors(x):
            break
    return config, pixels
