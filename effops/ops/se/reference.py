"""Truth of squeeze-excite: plain torch ops, any device and dtype, differentiable to any order."""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from effops.ops import geometry as G
from effops.ops.epilogue import HARDSIGMOID, RELU, SIGMOID, activate

GATES = {"sigmoid": SIGMOID, "hardsigmoid": HARDSIGMOID}
SLOPE = 0.01  # of a leaky_relu: torch's default


class Excitation(NamedTuple):
    """The two products of a squeeze-excite.

    Attributes:
        reduce_weight, reduce_bias: [Cr,C,1,1]; [Cr] or None.
        expand_weight, expand_bias: [C,Cr,1,1]; [C] or None.
        activation: code of what is between them.
        gate: code of the gate, sigmoid or hardsigmoid.
    """

    reduce_weight: Tensor
    reduce_bias: Tensor | None
    expand_weight: Tensor
    expand_bias: Tensor | None
    activation: int = RELU
    gate: int = SIGMOID


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A 1x1 convolution; a float32 bias beside half-precision tensors is added in float32."""
    if bias is None or bias.dtype == x.dtype:
        return F.conv2d(x, weight, bias)
    return (F.conv2d(x, weight) + bias.view(-1, 1, 1)).to(x.dtype)


def excite(input: Tensor, excitation: Excitation) -> Tensor:
    """input * gate(expand(activation(reduce(mean of input over H and W))))."""
    pooled = input.mean((2, 3), keepdim=True)
    hidden = activate(_product(pooled, excitation.reduce_weight, excitation.reduce_bias), excitation.activation, SLOPE)
    gate = activate(_product(hidden, excitation.expand_weight, excitation.expand_bias), excitation.gate, SLOPE)
    return input * gate


def squeeze_excite(input: Tensor, excitation: Excitation, channels_last: int) -> Tensor:
    """`excite` in the memory format that the operator's geometry gives."""
    return G.in_format(excite(input, excitation), channels_last)
