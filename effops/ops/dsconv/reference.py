"""Truth of the depthwise separable operator: plain torch ops, any device and dtype, differentiable to any order."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from effops.ops import geometry as G
from effops.ops.dwconv.reference import dwconv
from effops.ops.epilogue import NONE, BatchNorm, Epilogue, apply_epilogue


def dsconv(
    input: Tensor,
    passthrough: Tensor | None,
    dw_weight: Tensor,
    dw_epilogue: Epilogue,
    pw_weight: Tensor,
    epilogue: Epilogue,
    geometry: list[int],
    norm: BatchNorm | None = None,
) -> Tensor:
    """z = cat[passthrough, dw_chain(input)];  y = cat[z[:, -keep:], pw_chain(z)], laid out by `geometry`.

    `norm` stands in pw_chain where scale and shift stand otherwise.
    """
    z = dwconv(input, dw_weight, geometry, dw_epilogue)
    if passthrough is not None:
        z = torch.cat((passthrough, z), 1)
    y, epilogue = _pointwise(z, pw_weight, epilogue)
    if norm is None:
        y = apply_epilogue(y, epilogue)
    else:
        ahead = epilogue._replace(residual=None, post_activation=NONE)
        y = normalise(apply_epilogue(y, ahead), norm, epilogue)
    keep = geometry[G.KEEP]
    if keep:
        y = torch.cat((z[:, z.shape[1] - keep :], y), 1)
    return G.in_format(y, geometry[G.CHANNELS_LAST])


def _pointwise(z: Tensor, pw_weight: Tensor, epilogue: Epilogue) -> tuple[Tensor, Epilogue]:
    """The convolution, with the bias where torch's takes it, and what is left of its epilogue."""
    bias = epilogue.bias
    if bias is not None and bias.dtype == z.dtype:
        return F.conv2d(z, pw_weight, bias), epilogue._replace(bias=None)
    return F.conv2d(z, pw_weight), epilogue


def dsconv_parts(
    input: Tensor,
    dw_weights: Sequence[Tensor],
    dw_epilogue: Epilogue,
    pw_weight: Tensor,
    epilogue: Epilogue,
    geometry: list[int],
) -> Tensor:
    """y = pw_chain(cat of the parts' dw_chain), each part over all channels of the input or over its own (split)."""
    z, column, channel = [], 0, 0
    for part, weight in enumerate(dw_weights):
        channels = weight.shape[0]
        columns = slice(column, column + channels)
        of_part = dw_epilogue._replace(
            bias=None if dw_epilogue.bias is None else dw_epilogue.bias[columns],
            scale=None if dw_epilogue.scale is None else dw_epilogue.scale[columns],
            shift=None if dw_epilogue.shift is None else dw_epilogue.shift[columns],
        )
        x = input[:, channel : channel + channels]
        z.append(dwconv(x, weight, G.part_geometry(geometry, part), of_part))
        column += channels
        channel += channels if geometry[G.SPLIT] else 0
    y, epilogue = _pointwise(torch.cat(z, 1), pw_weight, epilogue)
    return G.in_format(apply_epilogue(y, epilogue), geometry[G.CHANNELS_LAST])


def normalise(activated: Tensor, norm: BatchNorm, epilogue: Epilogue) -> Tensor:
    """post_activation(norm(activated) + residual), with those two of `epilogue`; updates the running statistics."""
    y = F.batch_norm(
        activated, norm.running_mean, norm.running_var, norm.weight, norm.bias, True, norm.momentum, norm.eps
    )
    behind = Epilogue(
        residual=epilogue.residual,
        post_activation=epilogue.post_activation,
        negative_slope=epilogue.negative_slope,
    )
    return apply_epilogue(y, behind)
