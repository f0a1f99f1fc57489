"""Truth of the depthwise separable operator: plain torch ops, any device and dtype, differentiable to any order."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from effops.ops import geometry as G
from effops.ops.dwconv.reference import dwconv
from effops.ops.epilogue import Epilogue, apply_epilogue


def dsconv(
    input: Tensor,
    passthrough: Tensor | None,
    dw_weight: Tensor,
    dw_epilogue: Epilogue,
    pw_weight: Tensor,
    epilogue: Epilogue,
    geometry: list[int],
) -> Tensor:
    """z = cat[passthrough, dw_chain(input)];  y = cat[z[:, -keep:], pw_chain(z)], laid out by `geometry`."""
    z = dwconv(input, dw_weight, geometry, dw_epilogue)
    if passthrough is not None:
        z = torch.cat((passthrough, z), 1)
    bias = epilogue.bias
    if bias is not None and bias.dtype == z.dtype:
        y = F.conv2d(z, pw_weight, bias)
        epilogue = epilogue._replace(bias=None)
    else:
        y = F.conv2d(z, pw_weight)
    y = apply_epilogue(y, epilogue)
    keep = geometry[G.KEEP]
    if keep:
        y = torch.cat((z[:, z.shape[1] - keep :], y), 1)
    return G.in_format(y, geometry[G.CHANNELS_LAST])
