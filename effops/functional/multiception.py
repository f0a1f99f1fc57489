"""Depthwise convolutions of several window sizes side by side and a pointwise one behind them (room dsconv)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_compiling

from effops import _checks as check
from effops import backends
from effops._checks import Ints, Padding, Shape
from effops.functional._gradients import distinct, needs_grad
from effops.ops.dsconv import parts as _parts
from effops.ops.dsconv.reference import dsconv_parts as _reference
from effops.ops.epilogue import Epilogue
from effops.ops.geometry import DILATION_H, PAD_RIGHT, PAD_TOP, orders_channels_last

PartPaddings = Sequence[Padding] | None


class PartsPlan(NamedTuple):
    """A call as its shapes and settings determine it: the operator's int[], depthwise channels, the output's shape."""

    geometry: list[int]
    dw_channels: int
    shape: Shape


def parts_plan(
    op: str,
    split: bool,
    input: Shape,
    weights: tuple[Shape, ...],
    pw_weight: Shape,
    stride: Ints,
    paddings: tuple[Padding, ...] | None,
    dilation: Ints,
    strides: Shape,
    dw_activation: str,
    dw_post_activation: str,
    activation: str,
    post_activation: str,
) -> PartsPlan:
    """Checks shapes and settings.

    Args:
        op: the public function, for messages.
        split: each part has channels of its own.
        input, weights, pw_weight: shapes.
        stride, dilation: as `check.as_window` returns them.
        paddings: one for each part as the caller gave it, or None for k // 2 * dilation.
        strides: the input's, which tell the output's memory format.
        dw_activation, dw_post_activation, activation, post_activation: names.

    Raises:
        TypeError: an activation that is no string.
        ValueError: what does not fit.
    """
    check.require_rank(op, "input", input, "[N,C,H,W]")
    check.require_rank(op, "pw_weight", pw_weight, "[K,C,1,1]")
    _check_channels(op, split, input, weights)
    plans = []
    for i, weight in enumerate(weights):
        padding = _same_size(weight, dilation) if paddings is None else check.as_window(op, 1, paddings[i], 1)[1]
        part = (input[0], max(1, weight[0]), *input[2:])
        plans.append(
            check.depthwise_plan(
                op, f"dw_weights[{i}]", part, weight, 1, 0, 1, stride, padding, dilation, strides, "none", "none"
            )
        )  # fmt: skip
    sizes = [plan.shape[2:] for plan in plans]
    if len(set(sizes)) > 1:
        listed = ", ".join(f"{p}x{q}" for p, q in sizes)
        raise ValueError(
            f"{op}: the parts must have one output size; got {listed}; accepted: odd windows with the default padding, "
            "or a padding for each that makes them equal"
        )
    dw_channels = sum(plan.shape[1] for plan in plans)
    k, pw_channels, r, s = pw_weight
    if r != 1 or s != 1 or k == 0:
        raise ValueError(f"{op}: pw_weight must be [K,C,1,1] with K > 0; got {check.shape_text(pw_weight)}")
    if pw_channels != dw_channels:
        raise ValueError(
            f"{op}: pw_weight takes {pw_channels} channels but the depthwise convolutions give {dw_channels} in all; "
            f"accepted: [K,{dw_channels},1,1]"
        )
    shape = (input[0], k, *sizes[0])
    check.require_countable(op, shape)
    codes = [
        check.activation_code(op, name, value)
        for name, value in (
            ("dw_activation", dw_activation),
            ("dw_post_activation", dw_post_activation),
            ("activation", activation),
            ("post_activation", post_activation),
        )
    ]
    pads = [pad for plan in plans[1:] for pad in plan.geometry[PAD_TOP : PAD_RIGHT + 1]]
    first = plans[0].geometry
    channels_last = int(orders_channels_last(input, strides))
    return PartsPlan([*first[: DILATION_H + 3], channels_last, *codes, int(split), *pads], dw_channels, shape)


def _same_size(weight: Shape, dilation: Ints) -> tuple[int, int]:
    """Half the window, as the authors pad: an odd window then keeps the size at stride 1."""
    dilation_h, dilation_w = (dilation, dilation) if isinstance(dilation, int) else dilation
    return weight[2] // 2 * dilation_h, weight[3] // 2 * dilation_w


def _check_channels(op: str, split: bool, input: Shape, weights: tuple[Shape, ...]) -> None:
    for i, weight in enumerate(weights):
        check.require_rank(op, f"dw_weights[{i}]", weight, "[C,1,R,S]")
        if weight[0] != input[1] and not split:
            raise ValueError(
                f"{op}: dw_weights[{i}] has {weight[0]} kernels but input has {input[1]} channels; accepted: one "
                "kernel a channel in each"
            )
    total = sum(weight[0] for weight in weights)
    if split and total != input[1]:
        counts = " + ".join(str(weight[0]) for weight in weights)
        raise ValueError(
            f"{op}: dw_weights have {counts} = {total} kernels but input has {input[1]} channels; accepted: one kernel "
            "a channel in all"
        )


plan_parts = check.cached(parts_plan)


def _parts_conv(
    op, split, input, dw_weights, pw_weight, dw_bias, pw_bias, stride, padding, dilation,
    dw_activation, dw_negative_slope, dw_scale, dw_shift, dw_post_activation,
    activation, negative_slope, scale, shift, residual, post_activation, backend,
):  # fmt: skip
    """The body of both functions: check, choose, call."""
    if not isinstance(dw_weights, (list, tuple)):
        raise TypeError(f"{op}: dw_weights must be a list of tensors [C,1,R,S]; got {type(dw_weights).__name__}")
    if not dw_weights:
        raise ValueError(f"{op}: dw_weights is empty; accepted: a tensor [C,1,R,S] for each part")
    if torch._C._is_any_autocast_enabled() and (dtype := check.autocast_dtype(op, input)) is not None:
        input, residual, dw_bias, pw_weight, pw_bias = [
            check.cast(t, dtype) for t in (input, residual, dw_bias, pw_weight, pw_bias)
        ]
        dw_weights = [check.cast(t, dtype) for t in dw_weights]
        dw_scale, dw_shift = check.cast_affine(dw_scale, dtype), check.cast_affine(dw_shift, dtype)
        scale, shift = check.cast_affine(scale, dtype), check.cast_affine(shift, dtype)
    kind = check.check_input(op, input)
    for i, weight in enumerate(dw_weights):
        check.check_like(op, f"dw_weights[{i}]", weight, kind, "[C,1,R,S]")
    check.check_like(op, "pw_weight", pw_weight, kind, "[K,C,1,1]")
    stride, _, dilation = check.as_window(op, stride, 0, dilation)
    geometry, dw_channels, shape = plan_parts(
        op, split, input.shape, tuple([weight.shape for weight in dw_weights]), pw_weight.shape, stride,
        _as_paddings(op, padding, len(dw_weights)), dilation, input.stride(),
        dw_activation, dw_post_activation, activation, post_activation,
    )  # fmt: skip
    dw_vectors = [("dw_bias", dw_bias), ("dw_scale", dw_scale), ("dw_shift", dw_shift)]
    check.check_vectors(op, dw_vectors, dw_channels, kind)
    check.check_vectors(op, [("pw_bias", pw_bias), ("scale", scale), ("shift", shift)], shape[1], kind)
    if residual is not None:
        check.check_residual(op, "residual", residual, shape, kind)
    dw_slope = check.check_slope(op, "dw_negative_slope", dw_negative_slope)
    slope = check.check_slope(op, "negative_slope", negative_slope)

    call = backends.Call("dsconv_parts", op, input, tuple(dw_weights), pw_weight, geometry, shape)
    taken = backends.choose(call, backend)
    if taken == "reference":
        return _reference(
            input,
            dw_weights,
            Epilogue(dw_bias, dw_scale, dw_shift, None, geometry[10], geometry[11], dw_slope),
            pw_weight,
            Epilogue(pw_bias, scale, shift, residual, geometry[12], geometry[13], slope),
            geometry,
        )
    others = (dw_bias, dw_scale, dw_shift, pw_weight, pw_bias, scale, shift, residual)
    tensors = (input, *others, *dw_weights)
    if torch.is_grad_enabled() and needs_grad(tensors):
        if is_compiling():
            tensors = distinct(tensors)
        count = 1 + len(others)
        statics = (geometry, [dw_slope, slope], taken)
        return _parts.DSConvParts2dFunction.apply(*tensors[:count], *statics, *tensors[count:])
    return _parts.PARTS_KERNELS[taken].forward(input, dw_weights, *others, geometry, [dw_slope, slope])


def _as_paddings(op: str, padding: Any, parts: int) -> tuple[Any, ...] | None:
    """One padding for each part, or None for the default."""
    if padding is None:
        return None
    if not isinstance(padding, (list, tuple)):
        raise TypeError(
            f"{op}: padding must be None (half the window) or a list with the padding of each part; got {padding!r}"
        )
    if len(padding) != parts:
        raise ValueError(f"{op}: padding has {len(padding)} elements for {parts} parts; accepted: one a part")
    return tuple(padding)


def multiception_conv2d(
    input: Tensor,
    dw_weights: Sequence[Tensor],
    pw_weight: Tensor,
    dw_bias: Tensor | None = None,
    pw_bias: Tensor | None = None,
    stride: Ints = 1,
    padding: PartPaddings = None,
    dilation: Ints = 1,
    *,
    dw_activation: str = "none",
    dw_negative_slope: float = 0.01,
    dw_scale: Tensor | None = None,
    dw_shift: Tensor | None = None,
    dw_post_activation: str = "none",
    activation: str = "none",
    negative_slope: float = 0.01,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    post_activation: str = "none",
    backend: str = "auto",
) -> Tensor:
    """y = pw_chain(cat of dw_chain_k(input)), every window over all channels, as one kernel: the cat is not stored.

        z = cat_k depthwise_conv2d(input, dw_weights[k])            scale-major: all channels of the first window first
        z = dw_post_act(dw_act(z + dw_bias) * dw_scale + dw_shift)  a batch norm's scale and shift, in eval
        y = post_act(act(conv2d(z, pw_weight, stride=stride) + pw_bias) * scale + shift + residual)

    The stride is the pointwise convolution's over maps of stride 1, which is the depthwise convolutions' at the strided
    positions: only those are computed.

    Args:
        input: [N,C,H,W]; any strides; N may be 0.
        dw_weights: one [C,1,R,S] a window.
        pw_weight: [K,D,1,1], D = len(dw_weights) * C.
        dw_bias, dw_scale, dw_shift: [D], or None.
        pw_bias, scale, shift: [K], or None.
        stride, dilation: an int or (height, width).
        padding: None for half of each window (k // 2 * dilation: all parts then have one size where the windows are
            odd), or a list with the padding of each, as `depthwise_conv2d` takes it.
        dw_activation, dw_negative_slope, dw_post_activation: what else follows the depthwise convolutions.
        activation, negative_slope, residual, post_activation: the pointwise's epilogue; residual is [N,K,P,Q].
        backend: "auto" or a backend's name.

    Returns:
        [N,K,P,Q] of the input's dtype, channels_last where the input's strides are.

    Raises:
        TypeError: an argument of a wrong kind or dtype.
        ValueError: a wrong shape, size, device or name; parts of different output sizes.
        RuntimeError: the backend asked for by name cannot run this.

    Bao, Graeber and Wang, "Depthwise Multiception Convolution for Reducing Network Parameters without Sacrificing
    Accuracy", section III and Algorithm 1. It has C * sum(R * S) + D * K weights; the paper's Eq. 6, 3 C (sum(R * S) +
    K), counts the depthwise weights three times.

    Example:
        >>> x, pw = torch.randn(2, 8, 9, 9), torch.randn(16, 24, 1, 1)
        >>> dws = [torch.randn(8, 1, k, k) for k in (3, 5, 7)]
        >>> y = EF.multiception_conv2d(x, dws, pw)
        >>> parts = [F.conv2d(x, dw, padding="same", groups=8) for dw in dws]
        >>> y.shape, torch.allclose(y, F.conv2d(torch.cat(parts, 1), pw), atol=1e-3)
        (torch.Size([2, 16, 9, 9]), True)
    """
    return _parts_conv(
        "multiception_conv2d", False, input, dw_weights, pw_weight, dw_bias, pw_bias, stride, padding, dilation,
        dw_activation, dw_negative_slope, dw_scale, dw_shift, dw_post_activation,
        activation, negative_slope, scale, shift, residual, post_activation, backend,
    )  # fmt: skip


def mix_conv2d(
    input: Tensor,
    dw_weights: Sequence[Tensor],
    pw_weight: Tensor,
    dw_bias: Tensor | None = None,
    pw_bias: Tensor | None = None,
    stride: Ints = 1,
    padding: PartPaddings = None,
    dilation: Ints = 1,
    *,
    dw_activation: str = "none",
    dw_negative_slope: float = 0.01,
    dw_scale: Tensor | None = None,
    dw_shift: Tensor | None = None,
    dw_post_activation: str = "none",
    activation: str = "none",
    negative_slope: float = 0.01,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    post_activation: str = "none",
    backend: str = "auto",
) -> Tensor:
    """y = pw_chain(cat of dw_chain_i(input[its channels])): the channels are split, one window a part; one kernel.

    Args:
        input: [N,C,H,W]; any strides; N may be 0.
        dw_weights: one [Ci,1,R,S] a part, in the order of the channels; the Ci add up to C.
        pw_weight: [K,C,1,1].
        dw_bias, dw_scale, dw_shift: [C], or None.
        The others: as `multiception_conv2d`.

    Returns:
        [N,K,P,Q] of the input's dtype, channels_last where the input's strides are.

    Raises:
        TypeError, ValueError, RuntimeError: as `multiception_conv2d`.

    MixConv (arXiv 1907.09595, section 3), with the pointwise convolution that follows it.

    Example:
        >>> x, pw = torch.randn(2, 8, 9, 9), torch.randn(16, 8, 1, 1)
        >>> dws = [torch.randn(4, 1, k, k) for k in (3, 5)]
        >>> y = EF.mix_conv2d(x, dws, pw)
        >>> parts = [F.conv2d(part, dw, padding="same", groups=4) for part, dw in zip(x.chunk(2, 1), dws)]
        >>> y.shape, torch.allclose(y, F.conv2d(torch.cat(parts, 1), pw), atol=1e-4)
        (torch.Size([2, 16, 9, 9]), True)
    """
    return _parts_conv(
        "mix_conv2d", True, input, dw_weights, pw_weight, dw_bias, pw_bias, stride, padding, dilation,
        dw_activation, dw_negative_slope, dw_scale, dw_shift, dw_post_activation,
        activation, negative_slope, scale, shift, residual, post_activation, backend,
    )  # fmt: skip
