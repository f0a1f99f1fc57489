"""The epilogue that every convolution of effops ends with.

    y = post_activation(activation(conv + bias) * scale + shift + residual)

each part optional, in that order. conv-BN-act networks fold into weight, bias and activation; conv-act-BN networks
(VGNet, arXiv 2207.10318, and the small networks of "Nuts & Bolts") need scale and shift after the activation; ResNet's
add-then-ReLU is the post-activation.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# The index of a name is the code that the kernels receive.
ACTIVATIONS = (
    "none",
    "relu",
    "relu6",
    "leaky_relu",
    "silu",
    "hardswish",
    "hardsigmoid",
    "sigmoid",
    "gelu",
)
ACTIVATION_CODES = {name: code for code, name in enumerate(ACTIVATIONS)}

NONE, RELU, RELU6, LEAKY_RELU, SILU, HARDSWISH, HARDSIGMOID, SIGMOID, GELU = range(len(ACTIVATIONS))


class Epilogue(NamedTuple):
    """What follows a convolution: `post_activation(activation(conv + bias) * scale + shift + residual)`.

    Attributes:
        bias: [K], added to the convolution, or None.
        scale: [K], multiplies the activated value, or None.
        shift: [K], added after the scale, or None.
        residual: the output's shape, added after the shift, or None.
        activation: code of the inner activation (an index of `ACTIVATIONS`).
        post_activation: code of the outer activation.
        negative_slope: slope of `leaky_relu`, for both activations.
    """

    bias: Tensor | None = None
    scale: Tensor | None = None
    shift: Tensor | None = None
    residual: Tensor | None = None
    activation: int = NONE
    post_activation: int = NONE
    negative_slope: float = 0.01


class BatchNorm(NamedTuple):
    """Batch norm in training, in an epilogue's place of scale and shift: on the statistics of the batch itself.

    Attributes:
        weight, bias: [K], or None (ones, zeros).
        running_mean, running_var: [K], updated in place as `F.batch_norm` does, or None.
        momentum: of that update.
        eps: added to the variance.

    Example:
        >>> x, dw, pw = torch.randn(2, 8, 9, 9), torch.randn(8, 1, 3, 3), torch.randn(16, 8, 1, 1)
        >>> norm = EF.BatchNorm(torch.ones(16), torch.zeros(16))
        >>> y = EF.ds_conv2d(x, dw, pw, padding=1, batch_norm=norm)
        >>> torch.allclose(y.mean((0, 2, 3)), torch.zeros(16), atol=1e-5)
        True
    """

    weight: Tensor | None = None
    bias: Tensor | None = None
    running_mean: Tensor | None = None
    running_var: Tensor | None = None
    momentum: float = 0.1
    eps: float = 1e-5


def activate(x: Tensor, code: int, negative_slope: float) -> Tensor:
    """Applies the activation with the given code by torch's own function of that name."""
    if code == NONE:
        return x
    if code == RELU:
        return F.relu(x)
    if code == RELU6:
        return F.relu6(x)
    if code == LEAKY_RELU:
        return F.leaky_relu(x, negative_slope)
    if code == SILU:
        return F.silu(x)
    if code == HARDSWISH:
        return F.hardswish(x)
    if code == HARDSIGMOID:
        # F.hardsigmoid's backward multiplies by 1/6 rounded to float32, in float64 too (torch 2.13: off by 5e-9).
        return F.relu6(x + 3) / 6 if x.dtype == torch.float64 else F.hardsigmoid(x)
    if code == SIGMOID:
        return torch.sigmoid(x)
    if code == GELU:
        return F.gelu(x)
    raise ValueError(
        f"unknown activation code {code}; accepted: 0 to {len(ACTIVATIONS) - 1}, for {', '.join(ACTIVATIONS)}"
    )


def _per_channel(x: Tensor) -> Tensor:
    return x.view(-1, 1, 1)


def apply_epilogue(conv: Tensor, epilogue: Epilogue) -> Tensor:
    """Applies the epilogue to a convolution's result [N, K, P, Q] in plain torch ops, keeping its dtype.

    float32 bias, scale or shift beside a half-precision convolution make the arithmetic float32 (torch's promotion); it
    is rounded once, at the end.
    """
    y = conv
    if epilogue.bias is not None:
        y = y + _per_channel(epilogue.bias)
    y = activate(y, epilogue.activation, epilogue.negative_slope)
    if epilogue.scale is not None:
        y = y * _per_channel(epilogue.scale)
    if epilogue.shift is not None:
        y = y + _per_channel(epilogue.shift)
    if epilogue.residual is not None:
        y = y + epilogue.residual
    return activate(y, epilogue.post_activation, epilogue.negative_slope).to(conv.dtype)


def output_gives_gradient(activation: int, slope: float, post_activation: int, *others: Tensor | None) -> bool:
    """True where the inner activation's derivative can be read off the output, so that nothing has to be recomputed.

    So it is for relu, relu6, leaky_relu with a positive slope and sigmoid, with nothing after them: `others` are scale,
    shift and residual.
    """
    if activation not in (RELU, RELU6, LEAKY_RELU, SIGMOID) or post_activation != NONE:
        return False
    if activation == LEAKY_RELU and not slope > 0:
        return False
    return all(other is None for other in others)
