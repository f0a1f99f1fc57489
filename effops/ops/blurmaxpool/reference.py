"""Truth of the blurred max pool: plain torch ops, any device and dtype, differentiable to any order."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from effops.ops import geometry as G
from effops.ops.dwconv import banks

# Positions in the int[] of the operators (schemas.inc).
STRIDE_H, STRIDE_W, SIZE, WINDOW_H, WINDOW_W, PAD_H, PAD_W, REFLECT, CHANNELS_LAST = range(9)


def pooled_size(height: int, width: int, geometry: list[int]) -> tuple[int, int]:
    """What the max pool of stride 1 leaves of a height and a width."""
    return (
        height + 2 * geometry[PAD_H] - geometry[WINDOW_H] + 1,
        width + 2 * geometry[PAD_W] - geometry[WINDOW_W] + 1,
    )


def output_size(height: int, width: int, geometry: list[int]) -> tuple[int, int]:
    """(P, Q): the blur's padding is one less than its filter."""
    h, w = pooled_size(height, width, geometry)
    return (h - 1) // geometry[STRIDE_H] + 1, (w - 1) // geometry[STRIDE_W] + 1


def blur_max_pool(input: Tensor, geometry: list[int]) -> Tensor:
    """y = blur(max_pool(input)), laid out by `geometry`."""
    size, channels = geometry[SIZE], input.shape[1]
    window, padding = geometry[WINDOW_H:PAD_H], geometry[PAD_H:REFLECT]
    y = F.max_pool2d(input, window, 1, padding)
    before, behind = (size - 1) // 2, size // 2
    y = F.pad(y, (before, behind, before, behind), "reflect" if geometry[REFLECT] else "constant")
    kernel = torch.tensor(banks.binomial(size), dtype=y.dtype, device=y.device).expand(channels, 1, size, size)
    y = F.conv2d(y, kernel, None, geometry[STRIDE_H : STRIDE_W + 1], groups=channels)
    return G.in_format(y, geometry[CHANNELS_LAST])
