"""Truth of the separable convolution with pooling: plain torch ops, any device and dtype, any order of gradients."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from effops.ops import geometry as G
from effops.ops.dwconv.reference import dwconv
from effops.ops.epilogue import Epilogue

# Behind the 12 ints that sepconv shares with dwconv.
COL_ACTIVATION, COL_POST_ACTIVATION, POOL = range(12, 15)
POOL_ROW, POOL_COL = 1, 2  # the bits of POOL


def row_geometry(geometry: list[int]) -> list[int]:
    """The 1xS convolution's part, as dwconv takes it."""
    _, stride, _, _, left, right, _, dilation, *others = geometry[: G.POST_ACTIVATION + 1]
    return [1, stride, 0, 0, left, right, 1, dilation, *others, 0]


def col_geometry(geometry: list[int]) -> list[int]:
    """The Rx1 convolution's part, as dwconv takes it."""
    stride, _, top, bottom, _, _, dilation, _ = geometry[:8]
    activations = geometry[COL_ACTIVATION : COL_POST_ACTIVATION + 1]
    return [stride, 1, top, bottom, 0, 0, dilation, 1, 1, geometry[G.CHANNELS_LAST], *activations, 0]


def sepconv(
    input: Tensor,
    row_weight: Tensor,
    row_epilogue: Epilogue,
    col_weight: Tensor,
    col_epilogue: Epilogue,
    geometry: list[int],
) -> Tensor:
    """y = [pool2x1](col_chain([pool1x2](row_chain(input)))), laid out by `geometry`."""
    z = dwconv(input, row_weight, row_geometry(geometry), row_epilogue)
    if geometry[POOL] & POOL_ROW:
        z = F.max_pool2d(z, (1, 2))
    y = dwconv(z, col_weight, col_geometry(geometry), col_epilogue)
    if geometry[POOL] & POOL_COL:
        y = F.max_pool2d(y, (2, 1))
    return G.in_format(y, geometry[G.CHANNELS_LAST])
