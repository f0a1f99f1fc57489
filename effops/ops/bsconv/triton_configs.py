"""Tiles of the Triton kernel of room bsconv: which it takes by dtype, sizes and the accesses that maps allow."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
from torch import Tensor

from effops.ops import triton_launch as L
from effops.ops.dsconv.triton_configs import kind_of
from effops.ops.triton_device import Sizes


class Config(NamedTuple):
    """Pixels of a product, input channels a step, output channels a block, and launch parameters.

    One stage: Triton's pipeline would load from the ring ahead of the barrier.
    """

    BLOCK_X: int
    BLOCK_C: int
    BLOCK_E: int
    num_warps: int
    num_stages: int = 1
    maxnreg: int = 255


# Pixels of a patch: (BLOCK_X, BLOCK_C, BLOCK_E, warps), in order of preference. A thread has 16 elements at most
# of the depthwise tile, and a row of taps of each in flight. Fewer pixels where the patches of a map would not fill the
# device: the halo grows, but waiting processors would be worse.
_FORWARD = {
    "half": {128: (64, 64, 32, 8), 64: (64, 64, 32, 4), 32: (64, 64, 32, 4), 16: (32, 64, 32, 4)},
    "tf32": {64: (64, 32, 32, 8), 32: (32, 32, 32, 4), 16: (32, 32, 32, 4)},
    "ieee": {64: (32, 32, 32, 8), 32: (32, 32, 32, 4), 16: (32, 32, 32, 4)},
    "double": {32: (32, 16, 16, 8), 16: (16, 16, 16, 4)},
}
_INTERPRETED = (Config(64, 32, 32, 4), 32)


def configs() -> dict[str, list[dict[str, Any]]]:
    """What the chooser can return, by kernel, for the ahead-of-time check."""
    entries = {
        (x, e, warps, "tf32" if kind == "tf32" else "ieee")
        for kind, tiles in _FORWARD.items()
        for x, _, e, warps in tiles.values()
    }
    names = ("BLOCK_X", "BLOCK_E", "num_warps", "PRECISION")
    return {"_forward_kernel": [dict(zip(names, entry, strict=True)) for entry in sorted(entries)]}


def forward_config(x: Tensor, sizes: Sizes, channels: int, vec: int) -> tuple[Config, int]:
    """The tile, and the pixels of a patch: the largest patch that gives every processor a program.

    Args:
        channels: the most that a product sums over.
        vec: how many channels an access to the maps takes. Where it is one, the addresses need the registers of the
            largest patch, and the others twice the threads.
    """
    if L.INTERPRETED:
        return _INTERPRETED
    for pixels, (block_x, block_c, block_e, warps) in _FORWARD[kind_of(x)].items():
        if vec == 1 and pixels > 64:
            continue
        warps = 8 if vec == 1 and pixels == 64 else warps
        config = Config(block_x, min(block_c, max(triton.next_power_of_2(channels), 16)), block_e, warps)
        if triton.cdiv(sizes.M, pixels) * triton.cdiv(sizes.D, block_e) >= L.processors(x):
            break
    return config, pixels
