"""Pointwise convolutions of other rooms: dsconv's Triton kernels where all channels pass.

Compiled without a window, the kernels have nothing of the depthwise part in them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from effops.ops import triton_launch as L
from effops.ops.dsconv.triton import (
    BIAS,
    PASSTHROUGH,
    PW_WEIGHT,
    RESIDUAL,
    SCALE,
    SHIFT,
    Gradients,
    Layer,
    forward_of,
    matrix_gradient,
    output_gradient,
    passed_gradient,
)
from effops.ops.epilogue import NONE
from effops.ops.triton_device import Affine, Chain, Sizes


class Pointwise(NamedTuple):
    """A 1x1 convolution and the epilogue behind it, but for a residual.

    Attributes:
        weight: [K,C,1,1], any strides.
        bias, scale, shift: [K] or None.
        chain: its activations.
    """

    weight: Tensor
    bias: Tensor | None
    scale: Tensor | None
    shift: Tensor | None
    chain: Chain


def _pointwise_layer(x: Tensor, conv: Pointwise, residual: Tensor | None, channels_last: int) -> Layer:
    n, _, h, w = x.shape
    activations = (NONE, NONE, conv.chain.ACT, conv.chain.POST)
    geometry = [1, 1, 0, 0, 0, 0, 1, 1, 1, channels_last, *activations, 0, 0, 0]
    return Layer(
        x, x, None, Affine(None, None, None), None, conv.weight, L.affine(conv.bias, conv.scale, conv.shift),
        residual, geometry, [0.0, conv.chain.SLOPE], Sizes(h, w, h, w, n * h * w, 0), None,
    )  # fmt: skip


def pointwise_forward(
    x: Tensor, conv: Pointwise, channels_last: int, residual: Tensor | None = None, gates: Tensor | None = None
) -> Tensor:
    """The convolution of `x` with its epilogue, [N,K,H,W] in the given memory format.

    Args:
        x: [N,C,H,W], any strides.
        residual: [N,K,H,W], any strides, or None.
        gates: [N,C], contiguous, in the accumulators' dtype, by which its channels are multiplied first, or None.
    """
    return forward_of(_pointwise_layer(x, conv, residual, channels_last), gates)


_OF_POINTWISE = (PASSTHROUGH, PW_WEIGHT, BIAS, SCALE, SHIFT, RESIDUAL)


def pointwise_backward(
    grad: Tensor, x: Tensor, conv: Pointwise, channels_last: int, wanted: Sequence[bool], residual: Tensor | None = None
) -> list[Tensor | None]:
    """Gradients of x, weight, bias, scale, shift and residual, each None unless wanted; no gates.

    Args:
        grad: [N,K,H,W], of the result, any strides.
        x, conv, channels_last, residual: as for `pointwise_forward`.
        wanted: whether each of the six is.
    """
    layer = _pointwise_layer(x, conv, residual, channels_last)
    mask = sum(1 << place for place, want in zip(_OF_POINTWISE, wanted, strict=True) if want)
    tensors = (x, x, None, None, None, None, None, conv.weight, conv.bias, conv.scale, conv.shift, residual)
    gradients = Gradients(tensors, mask)
    du = output_gradient(layer, grad, None, gradients)
    passed_gradient(layer, du, grad, gradients)
    if gradients.wants(PW_WEIGHT):
        gradients.found[PW_WEIGHT] = matrix_gradient(layer, du)
    return [gradients.found.get(place) for place in _OF_POINTWISE]
