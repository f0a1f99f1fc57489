"""Argument checks of effops.functional: what was wrong, what was got, what is accepted.

A call is checked in two steps. What depends on the tensors themselves (kind, dtype, device, layout) is tested by a few
cheap conditions each time; only where one fails a function looks for the words. What depends on shapes and settings
alone is a *plan*, a function of hashable values: computed once for each such combination and cached, since these are
static in a network and a short kernel must not wait for Python.

TypeError: a wrong kind or dtype. ValueError: a wrong value, shape or device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import lru_cache, wraps
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_compiling

from effops.ops import geometry as G
from effops.ops.dwconv import banks
from effops.ops.epilogue import ACTIVATION_CODES, ACTIVATIONS, BatchNorm

Ints = int | tuple[int, int]
Padding = int | tuple[int, int] | tuple[int, int, int, int] | str
Shape = tuple[int, ...]

Kind = tuple[torch.dtype, torch.device]  # the input's, which the other tensors share; read once a call

FLOATS = frozenset((torch.float32, torch.float64, torch.float16, torch.bfloat16))
BANK = 0  # `share` of a bank: any number of kernels
_PAIR = "an int or a pair (height, width) of ints"
_PADDING = "an int, a pair (height, width), four ints (left, right, top, bottom), 'same' or 'valid'"
_MAX_NUMEL = 2**63 - 1
_DENSE = torch.strided  # looking it up in torch takes as long as a comparison


# ---- tensors --------------------------------------------------------------------------------------------------------


def check_input(op: str, input: Tensor) -> Kind:
    """input is a dense tensor of a real floating dtype; returns its dtype and device. The plan looks at its shape."""
    if isinstance(input, Tensor) and input.layout is _DENSE and (dtype := input.dtype) in FLOATS:
        return dtype, input.device
    return require_image(op, "input", input, "[N,C,H,W]")


def check_like(op: str, name: str, t: Tensor, kind: Kind, what: str) -> None:
    """t is a dense tensor of the input's dtype and device. The plan looks at its shape."""
    dtype, device = kind
    if isinstance(t, Tensor) and t.dtype is dtype and t.device == device and t.layout is _DENSE:
        return
    require_image(op, name, t, what)
    _require_kind(op, name, t, kind)


def check_vector(op: str, name: str, t: Tensor, channels: int, kind: Kind) -> None:
    """t is a per-channel vector [channels] of the input's dtype or float32."""
    dtype, device = kind
    if (
        isinstance(t, Tensor)
        and t.shape == (channels,)
        and (t.dtype is dtype or t.dtype is torch.float32)
        and t.device == device
        and t.layout is _DENSE
    ):
        return
    what = f"[{channels}], one value an output channel"
    if not isinstance(t, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor {what}; got {_described(t)}")
    _require_dense(op, name, t)
    if t.dtype not in (dtype, torch.float32):
        raise TypeError(f"{op}: {name} has dtype {t.dtype}; accepted: the input's {dtype}, or torch.float32")
    _require_device(op, name, t, device)
    raise ValueError(f"{op}: {name} must be {what}; got {shape_text(t.shape)}")


def check_vectors(op: str, vectors: Iterable[tuple[str, Tensor | None]], channels: int, kind: Kind) -> None:
    """Those of the named vectors that are there are as `check_vector` wants them."""
    for name, vector in vectors:
        if vector is not None:
            check_vector(op, name, vector, channels, kind)


def check_batch_norm(
    op: str, norm: BatchNorm, scale: Tensor | None, shift: Tensor | None, shape: Shape, kind: Kind
) -> None:
    """norm is a `BatchNorm` for a convolution's result of `shape`, and the only thing in its place."""
    if not isinstance(norm, BatchNorm):
        raise TypeError(f"{op}: batch_norm must be an effops.functional.BatchNorm or None; got {_described(norm)}")
    if scale is not None or shift is not None:
        raise ValueError(f"{op}: batch_norm stands in the place of scale and shift; give one or the other")
    for name in ("weight", "bias", "running_mean", "running_var"):
        if (vector := getattr(norm, name)) is not None:
            check_vector(op, f"batch_norm.{name}", vector, shape[1], kind)
    if shape[0] * shape[2] * shape[3] == 1:  # torch's words
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {torch.Size(shape)}")


def check_residual(op: str, name: str, t: Tensor, shape: Shape, kind: Kind) -> None:
    """t has the convolution's output shape, and the input's dtype and device."""
    dtype, device = kind
    if isinstance(t, Tensor) and t.shape == shape and t.dtype is dtype and t.device == device and t.layout is _DENSE:
        return
    what = f"{shape_text(shape)}, the convolution's output shape"
    if not isinstance(t, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor {what}; got {_described(t)}")
    _require_dense(op, name, t)
    _require_kind(op, name, t, kind)
    raise ValueError(f"{op}: {name} must be {what}; got {shape_text(t.shape)}")


def require_image(op: str, name: str, x: object, what: str) -> Kind:
    """The dtype and device of x; raises unless it is a dense 4-D tensor of a real floating dtype."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor {what}; got {_described(x)}")
    _require_dense(op, name, x)
    if x.dtype not in FLOATS:
        raise TypeError(f"{op}: {name} has dtype {x.dtype}; accepted: float32, float64, float16, bfloat16")
    require_rank(op, name, x.shape, what)
    return x.dtype, x.device


def require_rank(op: str, name: str, shape: Shape, what: str) -> None:
    if len(shape) != 4:
        raise ValueError(f"{op}: {name} must have 4 dimensions {what}; got {len(shape)}: {shape_text(shape)}")


def _require_dense(op: str, name: str, t: Tensor) -> None:
    if t.layout is not _DENSE:
        raise TypeError(f"{op}: {name} has layout {t.layout}; accepted: a dense (strided) tensor")


def _require_kind(op: str, name: str, t: Tensor, kind: Kind) -> None:
    dtype, device = kind
    if t.dtype != dtype:
        raise TypeError(f"{op}: {name} has dtype {t.dtype} but input has {dtype}; accepted: the input's dtype")
    _require_device(op, name, t, device)


def _require_device(op: str, name: str, t: Tensor, device: torch.device) -> None:
    if t.device != device:
        raise ValueError(f"{op}: {name} is on {t.device} but input is on {device}; accepted: one device for all")


def shape_text(shape: Shape) -> str:
    return f"[{','.join(map(str, shape))}]"


def _described(value: object) -> str:
    return f"{value!r} ({type(value).__name__})" if isinstance(value, (int, float, str)) else type(value).__name__


def as_weight(
    op: str, name: str, weight: Tensor | str | banks.NamedBank, kind: Kind, share: int
) -> tuple[Tensor, int, int]:
    """The depthwise weight as [B,1,R,S] of the input's dtype and device; `share`, BANK for a bank; a named bank's code.

    A 3-D tensor [B,R,S], a name or a `NamedBank` is a bank.
    """
    dtype, device = kind
    if (
        isinstance(weight, Tensor)
        and weight.dtype is dtype
        and weight.device == device
        and weight.layout is _DENSE
        and weight.dim() == 4
    ):
        return weight, share, 0
    if isinstance(weight, str):
        code = banks.CODES.get(weight, 0)
        try:
            return banks.bank(weight, dtype=dtype, device=device), BANK, code
        except ValueError as error:
            raise ValueError(f"{op}: {error}") from None
    if isinstance(weight, banks.NamedBank):
        check_like(op, name, weight.values, kind, "[K,1,R,S]")
        return weight.values, BANK, weight.code
    if not isinstance(weight, Tensor):
        what = "a tensor [K,1,R,S], a bank [B,R,S] or a bank's name"
        raise TypeError(f"{op}: {name} must be {what}; got {_described(weight)}")
    if weight.dim() == 3:
        weight, share = weight.unsqueeze(1), BANK
    check_like(op, name, weight, kind, "[K,1,R,S]")
    return weight, share, 0


# ---- settings -------------------------------------------------------------------------------------------------------


def check_slope(op: str, name: str, value: float) -> float:
    """The slope as a finite float."""
    if type(value) is float and -1e38 < value < 1e38:
        return value
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{op}: {name} must be a number; got {_described(value)}")
    if not -1e38 < value < 1e38:
        raise ValueError(f"{op}: {name} must be finite and of magnitude below 1e38; got {value!r}")
    return float(value)


def check_bool(op: str, name: str, value: bool) -> None:
    """A flag is True or False, nothing that merely counts as one.

    Raises:
        TypeError: it is something else.
    """
    if not isinstance(value, bool):
        raise TypeError(f"{op}: {name} must be True or False; got {_described(value)}")


def check_int(op: str, name: str, value: int, least: int) -> int:
    """An int of at least `least`."""
    if type(value) is int and value >= least:
        return value
    if isinstance(value, bool) or not hasattr(value, "__index__") or isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} must be an int; got {_described(value)}")
    value = value.__index__()
    if value < least:
        raise ValueError(f"{op}: {name} must be at least {least}; got {value}")
    return value


def as_window(op: str, stride: Ints, padding: Padding, dilation: Ints) -> tuple[Any, Any, Any]:
    """stride, padding and dilation as plain ints, tuples of plain ints, or the padding's word."""
    try:
        if type(stride) is not int:
            stride = G.as_ints("stride", stride, (2,), _PAIR)
        if type(padding) is not int and type(padding) is not str:
            padding = G.as_ints("padding", padding, (2, 4), _PADDING)
        if type(dilation) is not int:
            dilation = G.as_ints("dilation", dilation, (2,), _PAIR)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{op}: {error}") from None
    return stride, padding, dilation


# ---- plans ----------------------------------------------------------------------------------------------------------


class DepthwisePlan(NamedTuple):
    """A depthwise call as its shapes and settings determine it: the operator's int[] and the output's shape."""

    geometry: list[int]
    shape: Shape


class SeparablePlan(NamedTuple):
    """A depthwise separable call: the operator's int[], the shapes of both convolutions' results."""

    geometry: list[int]
    dw_shape: Shape
    pw_shape: Shape


def depthwise_plan(
    op: str,
    name: str,
    input: Shape,
    weight: Shape,
    share: int,
    bank: int,
    multiplier: int,
    stride: Ints,
    padding: Padding,
    dilation: Ints,
    strides: Shape,
    activation: str,
    post_activation: str,
) -> DepthwisePlan:
    """Checks a depthwise convolution's shapes and settings.

    Args:
        op: the public function, for messages.
        name: the weight's name, for messages.
        input, weight: shapes [N,C,H,W] and [B,1,R,S].
        share: number of channel chunks that share the weight, or BANK.
        bank: code of a named bank, or 0.
        multiplier: of a bank, which does not tell it.
        stride, padding, dilation: as `as_window` returns them.
        strides: the input's, which tell the output's memory format.
        activation, post_activation: names.

    Raises:
        TypeError: an activation that is no string.
        ValueError: what does not fit.
    """
    require_rank(op, "input", input, "[N,C,H,W]")
    require_rank(op, name, weight, "[K,1,R,S]")
    for argument, shape in (("input", input), (name, weight)):
        if 0 in shape[1:] or (argument != "input" and shape[0] == 0):
            which = "only the batch may be 0" if argument == "input" else "none may be 0"
            raise ValueError(f"{op}: {argument} must have positive sizes, {which}; got {shape_text(shape)}")
    n, c, h, w = input
    kernels, one, r, s = weight
    if one != 1:
        raise ValueError(f"{op}: {name} must be [K,1,R,S], one input channel a kernel; got {shape_text(weight)}")
    if share != BANK:
        if kernels * share % c:
            raise ValueError(_channel_mismatch(op, name, kernels, share, c))
        multiplier = kernels * share // c
    try:
        window = G.window(r, s, stride, padding, dilation)
    except ValueError as error:
        raise ValueError(f"{op}: {error}") from None
    if h + window.spare_h < 0 or w + window.spare_w < 0:
        raise ValueError(_window_too_large(op, (h, w), (r, s), window))
    shape = (n, c * multiplier, *window.output_size(h, w))
    require_countable(op, shape)
    codes = (activation_code(op, "activation", activation), activation_code(op, "post_activation", post_activation))
    return DepthwisePlan([*window.ints, multiplier, int(G.orders_channels_last(input, strides)), *codes, bank], shape)


def separable_plan(
    op: str,
    input: Shape,
    passthrough: Shape | None,
    weight: Shape,
    pw_weight: Shape,
    share: int,
    bank: int,
    keep: int,
    stride: Ints,
    padding: Padding,
    dilation: Ints,
    strides: Shape,
    dw_activation: str,
    dw_post_activation: str,
    activation: str,
    post_activation: str,
) -> SeparablePlan:
    """Checks a depthwise separable convolution's shapes and settings; arguments as `depthwise_plan`.

    Raises:
        TypeError: an activation that is no string.
        ValueError: what does not fit.
    """
    require_rank(op, "input", input, "[N,C,H,W]")
    require_rank(op, "pw_weight", pw_weight, "[K,C,1,1]")
    if passthrough is not None:
        require_rank(op, "passthrough", passthrough, "[N,C,P,Q]")
    k, pw_channels, r, s = pw_weight
    through = passthrough[1] if passthrough is not None else 0
    # A bank serves any number of channels: how many there are, the pointwise weight tells.
    multiplier = max(1, (pw_channels - through) // max(1, input[1]))
    dw_geometry, dw_shape = depthwise_plan(
        op,
        "dw_weight",
        input,
        weight,
        share,
        bank,
        multiplier,
        stride,
        padding,
        dilation,
        strides,
        "none",
        "none",
    )
    n, d, p, q = dw_shape
    if passthrough is not None and (through == 0 or passthrough != (n, through, p, q)):
        name = "left" if op == "half_identity2d" else "passthrough"
        what = f"[N,C,P,Q] of the depthwise convolution's output size, [{n},C,{p},{q}] with C > 0"
        raise ValueError(f"{op}: {name} must be {what}; got {shape_text(passthrough)}")
    if r != 1 or s != 1 or k == 0:
        raise ValueError(f"{op}: pw_weight must be [K,C,1,1] with K > 0; got {shape_text(pw_weight)}")
    if pw_channels != through + d:
        parts = f"{d} channels" + (f", beside {through} of passthrough" if through else "")
        raise ValueError(
            f"{op}: pw_weight takes {pw_channels} channels but the depthwise convolution gives {parts}; "
            f"accepted: [K,{through + d},1,1]"
        )
    if keep > d:
        raise ValueError(f"{op}: keep must be from 0 to the depthwise convolution's {d} channels; got {keep}")
    require_countable(op, (n, keep + k, p, q))
    codes = (
        activation_code(op, "dw_activation", dw_activation),
        activation_code(op, "dw_post_activation", dw_post_activation),
        activation_code(op, "activation", activation),
        activation_code(op, "post_activation", post_activation),
    )
    return SeparablePlan([*dw_geometry[:10], *codes, keep, 0, bank], dw_shape, (n, k, p, q))


def cached(plan: Callable[..., Any]) -> Callable[..., Any]:
    """The plan, from a cache where the arguments have a hash (symbolic sizes have none; Dynamo warns of a cache)."""
    remembered = lru_cache(maxsize=4096)(plan)

    @wraps(plan)
    def look_up(*arguments: Any) -> Any:
        if is_compiling():
            return plan(*arguments)
        try:
            return remembered(*arguments)
        except TypeError:
            return plan(*arguments)

    return look_up


plan_depthwise = cached(depthwise_plan)
plan_separable = cached(separable_plan)


def activation_code(op: str, name: str, activation: str) -> int:
    """The activation's code."""
    if not isinstance(activation, str):
        raise TypeError(
            f"{op}: {name} must be a string; got {_described(activation)}; accepted: {', '.join(ACTIVATIONS)}"
        )
    code = ACTIVATION_CODES.get(activation)
    if code is None:
        raise ValueError(f"{op}: unknown {name} {activation!r}; accepted: {', '.join(ACTIVATIONS)}")
    return code


def _channel_mismatch(op: str, name: str, kernels: int, share: int, channels: int) -> str:
    got = f"{op}: {name} has {kernels} kernels" + (f" shared by {share} chunks of channels" if share != 1 else "")
    hint = f" (one kernel for {channels // kernels} channels each: see share)" if channels % kernels == 0 else ""
    return f"{got} but input has {channels} channels; accepted: a multiple of the channels{hint}"


def _window_too_large(op: str, size: tuple[int, int], kernel: tuple[int, int], window: G.Geometry) -> str:
    _, _, top, bottom, left, right, dh, dw = window.ints
    (h, w), (r, s) = size, kernel
    return (
        f"{op}: the window is larger than the padded input: {dh * (r - 1) + 1}x{dw * (s - 1) + 1} "
        f"(kernel {r}x{s}, dilation {dh}x{dw}) against {h + top + bottom}x{w + left + right} "
        f"(input {h}x{w}, padding left {left}, right {right}, top {top}, bottom {bottom}); "
        "accepted: a window no larger than the padded input"
    )


def require_countable(op: str, shape: Shape) -> None:
    """The output's strides and size fit into int64. Symbolic sizes are left alone: a guard on them would bind them."""
    if is_compiling():
        return
    n, k, p, q = shape
    if (n or 1) * k * p * q > _MAX_NUMEL:
        raise ValueError(
            f"{op}: the output {shape_text(shape)} would have more than 2**63 - 1 elements; accepted: fewer"
        )


# ---- autocast -------------------------------------------------------------------------------------------------------


def autocast_dtype(op: str, input: Tensor) -> torch.dtype | None:
    """The dtype that autocast asks for on the input's device, or None."""
    check_input(op, input)
    device = input.device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


def cast(t: Tensor | banks.NamedBank | None, dtype: torch.dtype) -> Tensor | banks.NamedBank | None:
    """Casts as autocast does for F.conv2d: floating tensors other than float64."""
    if isinstance(t, banks.NamedBank):
        return t._replace(values=cast(t.values, dtype))
    if not isinstance(t, Tensor) or t.dtype is dtype or t.dtype not in FLOATS or t.dtype is torch.float64:
        return t
    return t.to(dtype)


def cast_affine(t: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """As `cast`, but a float32 scale or shift stays: the operators take it as it is."""
    return t if isinstance(t, Tensor) and t.dtype is torch.float32 else cast(t, dtype)
