"""Truth of the depthwise operators: plain torch ops, any device and dtype, differentiable to any order."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

from effops.ops import geometry as G
from effops.ops.epilogue import Epilogue, apply_epilogue


def expand_bank(weight: Tensor, channels: int) -> Tensor:
    """[B,1,R,S] -> [channels,1,R,S]: output channel o takes kernel `o mod B`."""
    kernels = weight.shape[0]
    if kernels == channels:
        return weight
    return weight.repeat(-(-channels // kernels), 1, 1, 1)[:channels]


def convolve(input: Tensor, weight: Tensor, bias: Tensor | None, geometry: list[int]) -> Tensor:
    """u = depthwise_conv2d(input, weight) (+ bias), the convolution alone."""
    sh, sw, top, bottom, left, right, dh, dw, multiplier = geometry[:9]
    channels = input.shape[1]
    weight = expand_bank(weight, channels * multiplier)
    padding = (top, left)
    if top != bottom or left != right:
        input = F.pad(input, (left, right, top, bottom))
        padding = (0, 0)
    return F.conv2d(input, weight, bias, (sh, sw), padding, (dh, dw), channels)


def dwconv(input: Tensor, weight: Tensor, geometry: list[int], epilogue: Epilogue) -> Tensor:
    """y = post_act(act(depthwise_conv2d(input, weight) + bias) * scale + shift + residual), laid out by `geometry`."""
    bias = epilogue.bias
    if bias is not None and bias.dtype == input.dtype:
        u = convolve(input, weight, bias, geometry)
        epilogue = epilogue._replace(bias=None)
    else:
        u = convolve(input, weight, None, geometry)
    return G.in_format(apply_epilogue(u, epilogue), geometry[G.CHANNELS_LAST])


def without_autocast(input: Tensor) -> AbstractContextManager:
    """Keeps autocast from casting float32 tensors back to the half type they came from."""
    device = input.device.type
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()


def dwconv_stats(input: Tensor, weight: Tensor, bias: Tensor | None, geometry: list[int]) -> tuple[Tensor, Tensor]:
    """Mean and population variance of conv + bias over N, P, Q, per output channel; float32 for half types."""
    if input.dtype in (torch.float16, torch.bfloat16):
        with without_autocast(input):
            u = convolve(input.float(), weight.float(), None, geometry)
    else:
        u = convolve(input, weight, None, geometry)
    if bias is not None:
        u = u + bias.view(-1, 1, 1)
    var, mean = torch.var_mean(u, dim=(0, 2, 3), correction=0)
    return mean, var
