"""EffNet's block as one kernel, for inference (room effnet)."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from effops import _checks as check
from effops import backends
from effops._checks import Ints, Padding, Shape
from effops.functional._gradients import needs_grad
from effops.functional.sepconv import pool_plan
from effops.ops import effnet as _effnet
from effops.ops import geometry as G

_OP = "EffNetBlock"
_WEIGHTS = ("expand.weight", "row.weight", "col.weight", "project.weight")


class Step(NamedTuple):
    """One convolution of the block.

    Attributes:
        weight: its weight.
        bias: its bias, or None.
        epilogue: what follows, as keyword arguments of the public functions: activation, negative_slope, scale, shift,
            post_activation, and of the last one residual.
    """

    weight: Tensor
    bias: Tensor | None
    epilogue: dict[str, Any]

    def tensors(self) -> tuple[Tensor | None, ...]:
        weight, bias, epilogue = self
        return weight, bias, epilogue.get("scale"), epilogue.get("shift")

    def activations(self) -> tuple[str, str]:
        epilogue = self.epilogue
        return epilogue.get("activation", "none"), epilogue.get("post_activation", "none")


class EffNetPlan(NamedTuple):
    """A call as its shapes and settings determine it: the operator's int[] and the output's shape."""

    geometry: list[int]
    shape: Shape


def _effnet_plan(
    input: Shape,
    weights: tuple[Shape, Shape, Shape, Shape],
    pool: str,
    stride: Ints,
    padding: Padding,
    strides: Shape,
    activations: tuple[tuple[str, str], ...],
) -> EffNetPlan:
    """Checks shapes and settings.

    Raises:
        TypeError, ValueError: what does not fit.
    """
    expand, row, col, project = weights
    check.require_rank(_OP, "input", input, "[N,C,H,W]")
    check.require_rank(_OP, "expand.weight", expand, "[E,C,1,1]")
    if expand[1:] != (input[1], 1, 1):
        raise ValueError(
            f"{_OP}: input has {input[1]} channels; accepted: {expand[1]}, as expand.weight "
            f"{check.shape_text(expand)} says"
        )
    last = int(G.orders_channels_last(input, strides))  # the strides are not those of the expanded map
    separable, between = pool_plan(
        _OP, (input[0], expand[0], *input[2:]), row, col, pool, stride, padding, (1, 1), strides, *activations[1:3]
    )
    rows = project[2]
    if project[1:] != (between[1], rows, 1) or rows not in (1, 2) or between[2] < rows:
        raise ValueError(
            f"{_OP}: project.weight must be [K,{between[1]},1,1], or [K,{between[1]},2,1] where the map before it has "
            f"two rows; got {check.shape_text(project)} behind {check.shape_text(between)}"
        )
    separable[G.CHANNELS_LAST] = last
    names = ("expand.act", "expand.post_act", "act", "post_act")
    codes = [check.activation_code(_OP, n, a) for n, a in zip(names, activations[0] + activations[3], strict=True)]
    return EffNetPlan([*separable, *codes], (input[0], project[0], between[2] // rows, between[3]))


_plan = check.cached(_effnet_plan)


def effnet_block(
    input: Tensor,
    expand: Step,
    row: Step,
    col: Step,
    project: Step,
    *,
    pool: str,
    stride: Ints,
    padding: Padding,
    backend: str,
) -> Tensor | None:
    """The whole block in one call, or None where the call is not served: the caller then runs it in three.

    It is served without gradients and autocast, where the backend has kernels for it. Steps are those of
    `separable_conv_pool2d` with a 1x1 convolution ahead of them, and behind them another one, or one of 2x1 with stride
    (2, 1), by the rows of its weight.

    Args:
        input: [N,C,H,W].
        expand, row, col, project: weights [E,C,1,1], [D,1,1,S], [D,1,R,1] and [K,D,1,1] or [K,D,2,1].
        pool, stride, padding, backend: as `separable_conv_pool2d`.

    Returns:
        [N,K,P,Q], channels_last where the input's strides are, or None.

    Raises:
        TypeError, ValueError: an argument of a wrong kind, shape, dtype or device.
    """
    steps = (expand, row, col, project)
    residual = project.epilogue.get("residual")
    tensors = (input, *expand.tensors(), *row.tensors(), *col.tensors(), *project.tensors(), residual)
    if torch._C._is_any_autocast_enabled() or (torch.is_grad_enabled() and needs_grad(tensors)):
        return None
    kind = check.check_input(_OP, input)
    weights = (expand.weight, row.weight, col.weight, project.weight)
    for name, weight in zip(_WEIGHTS, weights, strict=True):
        check.check_like(_OP, name, weight, kind, "a convolution's weight")
    window = check.as_window(_OP, stride, padding, 1)
    geometry, shape = _plan(
        input.shape, tuple([weight.shape for weight in weights]), pool, *window[:2], input.stride(),
        tuple([step.activations() for step in steps]),
    )  # fmt: skip
    # Vectors come from the modules whose weights were checked; the operator checks them itself.
    if residual is not None:
        check.check_residual(_OP, "residual", residual, shape, kind)
    call = backends.Call("effnet", _OP, input, row.weight, col.weight, geometry, shape)
    taken = backends.taken_among(_effnet.KERNELS, call, backend)
    if taken is None:
        return None
    slopes = [float(step.epilogue.get("negative_slope", 0.01)) for step in steps]
    return _effnet.KERNELS[taken](*tensors, geometry, slopes)
