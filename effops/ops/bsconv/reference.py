"""Truth of the blueprint separable operator: plain torch ops, any device and dtype, differentiable to any order."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from effops.ops.dwconv.reference import dwconv
from effops.ops.epilogue import Epilogue, apply_epilogue


def bsconv(
    input: Tensor,
    mid_weight: Tensor | None,
    mid_epilogue: Epilogue,
    pw_weight: Tensor,
    pw_epilogue: Epilogue,
    dw_weight: Tensor,
    epilogue: Epilogue,
    geometry: list[int],
) -> Tensor:
    """y = dw_chain(pw_chain(mid_chain(input))), laid out by `geometry`; without a mid_weight mid_chain is nothing.

    Zeros are padded to pw_chain's result, after its epilogue: `dwconv` pads what it is given.
    """
    if mid_weight is not None:
        input = apply_epilogue(F.conv2d(input, mid_weight), mid_epilogue)
    bias = pw_epilogue.bias
    if bias is not None and bias.dtype == input.dtype:
        z = F.conv2d(input, pw_weight, bias)
        pw_epilogue = pw_epilogue._replace(bias=None)
    else:
        z = F.conv2d(input, pw_weight)
    return dwconv(apply_epilogue(z, pw_epilogue), dw_weight, geometry, epilogue)


def materialise(pw_weight: Tensor, dw_weight: Tensor, mid_weight: Tensor | None = None) -> Tensor:
    """The dense kernel [K,C,R,S] that a blueprint convolution is: kernel k's blueprint times its weight for channel c.

    W[k,c] = dw_weight[k] * pw[k,c] with pw = pw_weight, or pw_weight @ mid_weight (arXiv 2003.13549, Eq. 2 and 5).
    """
    pointwise = pw_weight[:, :, 0, 0]
    if mid_weight is not None:
        pointwise = pointwise @ mid_weight[:, :, 0, 0]
    return dw_weight * pointwise[:, :, None, None]
