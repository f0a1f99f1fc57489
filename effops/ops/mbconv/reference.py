"""Truth of the inverted residual: plain torch ops, any device and dtype, differentiable to any order."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from effops.ops import geometry as G
from effops.ops.dwconv.reference import dwconv
from effops.ops.epilogue import Epilogue, apply_epilogue
from effops.ops.se.reference import Excitation, excite


def pointwise(input: Tensor, weight: Tensor, epilogue: Epilogue) -> Tensor:
    """A 1x1 convolution and its epilogue."""
    bias = epilogue.bias
    if bias is not None and bias.dtype == input.dtype:
        return apply_epilogue(F.conv2d(input, weight, bias), epilogue._replace(bias=None))
    return apply_epilogue(F.conv2d(input, weight), epilogue)


def mbconv(
    input: Tensor,
    expand_weight: Tensor | None,
    expand_epilogue: Epilogue,
    dw_weight: Tensor,
    dw_epilogue: Epilogue,
    excitation: Excitation | None,
    project_weight: Tensor,
    epilogue: Epilogue,
    geometry: list[int],
) -> Tensor:
    """project_chain(excite(dw_chain(expand_chain(input)))), laid out by `geometry`; the absent parts left out."""
    e = input if expand_weight is None else pointwise(input, expand_weight, expand_epilogue)
    z = dwconv(e, dw_weight, geometry, dw_epilogue)
    if excitation is not None:
        z = excite(z, excitation)
    return G.in_format(pointwise(z, project_weight, epilogue), geometry[G.CHANNELS_LAST])
