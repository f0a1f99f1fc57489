"""EffNet's block, 1x1 -> separable convolution with pools -> 1x1 or 2x1, as one operator: fake and FLOPs.

It is for inference: with gradients the block is `dsconv`, `sepconv` and `dsconv` one after the other, which is what it
computes, so that it has no reference and no autograd.Function of its own.
"""

from __future__ import annotations

import torch
from torch.utils.flop_counter import register_flop_formula

from effops.ops import sepconv
from effops.ops.registration import fake_output, packets, register_fake

KERNELS = {"cpp": torch.ops.effops.effnet_fwd.default}


def output_shape(input, expand_weight, row_weight, col_weight, project_weight, geometry) -> tuple[int, int, int, int]:
    """[N,K,P,Q] from the shapes of the input and the four weights."""
    expanded = (input[0], expand_weight[0], *input[2:])
    n, _, p, q = sepconv.output_shape(expanded, row_weight, col_weight, geometry[: sepconv.GEOMETRY])
    return n, project_weight[0], p // project_weight[2], q


@register_fake("effnet_fwd")
def _effnet_fwd(
    input, expand_weight, expand_bias, expand_scale, expand_shift, row_weight, row_bias, row_scale, row_shift,
    col_weight, col_bias, col_scale, col_shift, project_weight, bias, scale, shift, residual, geometry, slopes,
):  # fmt: skip
    weights = (expand_weight, row_weight, col_weight, project_weight)
    return fake_output(input, output_shape(input.shape, *(w.shape for w in weights), geometry), geometry)


@register_flop_formula(packets("effnet_fwd"))
def _effnet_fwd_flops(
    input, expand_weight, expand_bias, expand_scale, expand_shift, row_weight, row_bias, row_scale, row_shift,
    col_weight, col_bias, col_scale, col_shift, project_weight, bias, scale, shift, residual, geometry, slopes,
    *, out_shape,
):  # fmt: skip
    n, channels, h, w = input
    hidden = expand_weight[0]
    separable = sepconv.flops((n, hidden, h, w), row_weight, col_weight, geometry[: sepconv.GEOMETRY])
    n, k, p, q = out_shape
    product = 2 * n * k * project_weight[1] * project_weight[2] * p * q
    return 2 * n * channels * hidden * h * w + separable + product
