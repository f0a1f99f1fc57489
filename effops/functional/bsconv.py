"""Blueprint separable convolutions: pointwise, then depthwise (room bsconv)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from effops import _checks as check
from effops import backends
from effops._checks import Ints, Padding, Shape
from effops.functional._gradients import run_kernels
from effops.ops import bsconv as _bsconv
from effops.ops.bsconv.reference import bsconv as _bsconv_reference
from effops.ops.epilogue import Epilogue
from effops.ops.geometry import (
    ACTIVATION,
    CHANNELS_LAST,
    POST_ACTIVATION,
    PW_ACTIVATION,
    PW_POST_ACTIVATION,
    orders_channels_last,
)


class BlueprintPlan(NamedTuple):
    """A blueprint separable call as its shapes and settings determine it: the operator's int[], the output's shape."""

    geometry: list[int]
    shape: Shape


def blueprint_plan(
    op: str,
    input: Shape,
    mid_weight: Shape | None,
    pw_weight: Shape,
    dw_weight: Shape,
    stride: Ints,
    padding: Padding,
    dilation: Ints,
    strides: Shape,
    pw_activation: str,
    pw_post_activation: str,
    activation: str,
    post_activation: str,
) -> BlueprintPlan:
    """Checks a blueprint separable convolution's shapes and settings; arguments as `_checks.depthwise_plan`.

    Raises:
        TypeError: an activation that is no string.
        ValueError: what does not fit.
    """
    check.require_rank(op, "input", input, "[N,C,H,W]")
    if 0 in input[1:]:
        what = "input must have positive sizes, only the batch may be 0"
        raise ValueError(f"{op}: {what}; got {check.shape_text(input)}")
    channels, source = input[1], "input has"
    if mid_weight is not None:
        channels, source = _pointwise(op, "mid_weight", mid_weight, channels, source), "mid_weight gives"
    channels = _pointwise(op, "pw_weight", pw_weight, channels, source)
    check.require_rank(op, "dw_weight", dw_weight, "[K,1,R,S]")
    if dw_weight[0] != channels:
        raise ValueError(
            f"{op}: dw_weight has {dw_weight[0]} kernels but pw_weight gives {channels} channels; "
            f"accepted: [{channels},1,R,S]"
        )
    between = (input[0], channels, *input[2:])
    geometry, shape = check.depthwise_plan(
        op, "dw_weight", between, dw_weight, 1, 0, 1, stride, padding, dilation, strides, "none", "none"
    )
    codes = (
        check.activation_code(op, "activation", activation),
        check.activation_code(op, "post_activation", post_activation),
        check.activation_code(op, "pw_activation", pw_activation),
        check.activation_code(op, "pw_post_activation", pw_post_activation),
    )
    channels_last = int(orders_channels_last(input, strides))
    return BlueprintPlan([*geometry[:CHANNELS_LAST], channels_last, *codes], shape)


_plan = check.cached(blueprint_plan)


def _pointwise(op: str, name: str, weight: Shape, channels: int, source: str) -> int:
    """The output channels of a pointwise weight that takes `channels` of them."""
    letter = "M" if name == "mid_weight" else "K"
    check.require_rank(op, name, weight, f"[{letter},C,1,1]")
    if weight[2:] != (1, 1) or weight[0] == 0:
        raise ValueError(f"{op}: {name} must be [{letter},C,1,1] with {letter} > 0; got {check.shape_text(weight)}")
    if weight[1] != channels:
        raise ValueError(
            f"{op}: {name} takes {weight[1]} channels but {source} {channels}; accepted: [{letter},{channels},1,1]"
        )
    return weight[0]


def bs_conv2d(
    input: Tensor,
    pw_weight: Tensor,
    dw_weight: Tensor,
    dw_bias: Tensor | None = None,
    stride: Ints = 1,
    padding: Padding = 0,
    dilation: Ints = 1,
    *,
    mid_weight: Tensor | None = None,
    mid_scale: Tensor | None = None,
    mid_shift: Tensor | None = None,
    pw_bias: Tensor | None = None,
    pw_activation: str = "none",
    pw_negative_slope: float = 0.01,
    pw_scale: Tensor | None = None,
    pw_shift: Tensor | None = None,
    pw_post_activation: str = "none",
    activation: str = "none",
    negative_slope: float = 0.01,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    post_activation: str = "none",
    backend: str = "auto",
) -> Tensor:
    """y = dw_chain(pw_chain(mid_chain(input))), a blueprint separable convolution as one kernel: only y is stored.

        mid_chain(x) = conv2d(x, mid_weight) * mid_scale + mid_shift      (BSConv-S; nothing without mid_weight)
        pw_chain(m) = pw_post_act(pw_act(conv2d(m, pw_weight) + pw_bias) * pw_scale + pw_shift)
        dw_chain(z) = post_act(act(depthwise_conv2d(z, dw_weight) + dw_bias) * scale + shift + residual)

    Zero padding is zero after pw_chain: no bias or shift of it leaks into the border.

    Args:
        input: [N,C,H,W]; any strides; N may be 0.
        pw_weight: [K,C,1,1]; [K,M,1,1] with a mid_weight.
        dw_weight: [K,1,R,S].
        dw_bias, pw_bias: [K], or None; so are scale, shift, pw_scale and pw_shift.
        stride, padding, dilation: the depthwise convolution's, as `depthwise_conv2d`.
        mid_weight: [M,C,1,1], the first pointwise convolution of BSConv-S, or None.
        mid_scale, mid_shift: [M], or None: a batch norm behind it.
        pw_activation, pw_negative_slope, pw_scale, pw_shift, pw_post_activation: the pointwise's epilogue.
        activation, negative_slope, scale, shift, residual, post_activation: the depthwise's epilogue; residual is
            [N,K,P,Q].
        backend: "auto" or a backend's name.

    Returns:
        [N,K,P,Q] of the input's dtype, channels_last where the input's strides are.

    Raises:
        TypeError: an argument of a wrong kind or dtype.
        ValueError: a wrong shape, size, device or name; mid_scale or mid_shift without mid_weight.
        RuntimeError: the backend asked for by name cannot run this.

    "Rethinking Depthwise Separable Convolutions" (arXiv 2003.13549), sections 3.3.1 (BSConv-U) and 3.3.2 (BSConv-S).

    Example:
        >>> x, pw, dw = torch.randn(2, 8, 9, 9), torch.randn(16, 8, 1, 1), torch.randn(16, 1, 3, 3)
        >>> y = EF.bs_conv2d(x, pw, dw, padding=1, activation="relu")
        >>> stock = F.relu(F.conv2d(F.conv2d(x, pw), dw, padding=1, groups=16))
        >>> y.shape, torch.allclose(y, stock, atol=1e-4)
        (torch.Size([2, 16, 9, 9]), True)
    """
    op = "bs_conv2d"
    if torch._C._is_any_autocast_enabled() and (dtype := check.autocast_dtype(op, input)) is not None:
        plain = (input, pw_weight, dw_weight, dw_bias, mid_weight, pw_bias, residual)
        input, pw_weight, dw_weight, dw_bias, mid_weight, pw_bias, residual = [check.cast(t, dtype) for t in plain]
        affine = (mid_scale, mid_shift, pw_scale, pw_shift, scale, shift)
        mid_scale, mid_shift, pw_scale, pw_shift, scale, shift = [check.cast_affine(t, dtype) for t in affine]
    kind = check.check_input(op, input)
    check.check_like(op, "pw_weight", pw_weight, kind, "[K,C,1,1]")
    check.check_like(op, "dw_weight", dw_weight, kind, "[K,1,R,S]")
    if mid_weight is not None:
        check.check_like(op, "mid_weight", mid_weight, kind, "[M,C,1,1]")
    stride, padding, dilation = check.as_window(op, stride, padding, dilation)
    geometry, shape = _plan(
        op, input.shape, None if mid_weight is None else mid_weight.shape, pw_weight.shape, dw_weight.shape,
        stride, padding, dilation, input.stride(), pw_activation, pw_post_activation, activation, post_activation,
    )  # fmt: skip
    _check_mid_affine(op, mid_weight, mid_scale, mid_shift, kind)
    vectors = (pw_bias, pw_scale, pw_shift, dw_bias, scale, shift)
    check.check_vectors(op, zip(_VECTORS, vectors, strict=True), shape[1], kind)
    if residual is not None:
        check.check_residual(op, "residual", residual, shape, kind)
    slopes = [
        check.check_slope(op, "pw_negative_slope", pw_negative_slope),
        check.check_slope(op, "negative_slope", negative_slope),
    ]

    taken = backends.choose(backends.Call("bsconv", op, input, dw_weight, pw_weight, geometry, shape), backend)
    if taken == "reference":
        return _bsconv_reference(
            input,
            mid_weight,
            Epilogue(scale=mid_scale, shift=mid_shift),
            pw_weight,
            Epilogue(
                pw_bias, pw_scale, pw_shift, None, geometry[PW_ACTIVATION], geometry[PW_POST_ACTIVATION], slopes[0]
            ),
            dw_weight,
            Epilogue(dw_bias, scale, shift, residual, geometry[ACTIVATION], geometry[POST_ACTIVATION], slopes[1]),
            geometry,
        )
    tensors = (
        input, mid_weight, mid_scale, mid_shift, pw_weight, pw_bias, pw_scale, pw_shift,
        dw_weight, dw_bias, scale, shift, residual,
    )  # fmt: skip
    return run_kernels(_bsconv.BSConv2dFunction, _bsconv.KERNELS, taken, tensors, geometry, slopes)


_VECTORS = ("pw_bias", "pw_scale", "pw_shift", "dw_bias", "scale", "shift")


def _check_mid_affine(
    op: str, mid_weight: Tensor | None, mid_scale: Tensor | None, mid_shift: Tensor | None, kind: check.Kind
) -> None:
    for name, vector in (("mid_scale", mid_scale), ("mid_shift", mid_shift)):
        if vector is None:
            continue
        if mid_weight is None:
            raise ValueError(f"{op}: {name} is given without mid_weight, whose result it belongs to")
        check.check_vector(op, name, vector, mid_weight.shape[0], kind)
