"""effops.functional (EF): checked functions over the operators, in torch's argument order and words.

Every function checks its arguments (TypeError: a wrong kind; ValueError: a wrong value; the message says what was
wrong, what was got, what is accepted), casts under autocast as `F.conv2d` does, picks the output's memory format as
`F.conv2d` does, chooses the backend and calls it. Output shape, dtype and memory format depend on the inputs alone.

Shared by all of them:
    epilogue: `post_activation(activation(conv + bias) * scale + shift + residual)`, each part optional. Activations:
        none, relu, relu6, leaky_relu, silu, hardswish, hardsigmoid, sigmoid, gelu; `negative_slope` belongs to
        leaky_relu. bias, scale and shift are [K], of the input's dtype or float32; residual has the convolution's
        output shape.
    stride, dilation: an int or (height, width).
    padding: an int, (height, width), (left, right, top, bottom) as `F.pad` orders it, "same" (stride 1) or "valid".
    backend: "auto", or a name of `effops.backends.names()`. One asked for by name never falls back.

Dimensions: N batch, C input channels, H W input size, R S window, P Q output size, K output channels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from effops import backends
from effops.ops import dsconv as _dsconv
from effops.ops import dwconv as _dwconv
from effops.ops import geometry as G
from effops.ops.dsconv.reference import dsconv as _dsconv_reference
from effops.ops.dwconv import banks
from effops.ops.dwconv.reference import dwconv as _dwconv_reference
from effops.ops.dwconv.reference import dwconv_stats as _dwconv_stats_reference
from effops.ops.epilogue import ACTIVATION_CODES, ACTIVATIONS, Epilogue

__all__ = [
    "depthwise_conv2d",
    "depthwise_stats2d",
    "downsampling2d",
    "ds_conv2d",
    "fixed_filter_conv2d",
    "half_identity2d",
    "shared_depthwise_conv2d",
]

Ints = int | tuple[int, int]
Padding = int | tuple[int, int] | tuple[int, int, int, int] | str

_FLOATS = frozenset((torch.float32, torch.float64, torch.float16, torch.bfloat16))
_PAIR = "an int or a pair (height, width) of ints"
_PADDING = "an int, a pair (height, width), four ints (left, right, top, bottom), 'same' or 'valid'"
_MAX_NUMEL = 2**63 - 1


# ---- checks ---------------------------------------------------------------------------------------------------------
# The functions test everything by few cheap conditions; where one fails, a function below finds the words.


def _shape(t: Tensor) -> str:
    return f"{str(t.dtype).removeprefix('torch.')}[{','.join(map(str, t.shape))}]"


def _require_image(op: str, name: str, x: object, what: str = "[N,C,H,W]") -> None:
    """x is a 4-D strided tensor of a real floating dtype with no empty dimension but the batch."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor {what}; got {type(x).__name__}")
    if x.layout is not torch.strided:
        raise TypeError(f"{op}: {name} must be a dense (strided) tensor; got layout {x.layout}")
    if x.dtype not in _FLOATS:
        raise TypeError(f"{op}: {name} has dtype {x.dtype}; accepted: float32, float64, float16, bfloat16")
    if x.dim() != 4:
        raise ValueError(f"{op}: {name} must have 4 dimensions {what}; got {_shape(x)}")
    if 0 in x.shape[1:]:
        raise ValueError(f"{op}: {name} must have positive sizes (only the batch may be 0); got {_shape(x)}")


def _require_like(op: str, name: str, t: Tensor, input: Tensor) -> None:
    if t.dtype != input.dtype:
        raise TypeError(f"{op}: {name} has dtype {t.dtype} but input has {input.dtype}; accepted: the input's dtype")
    if t.device != input.device:
        raise ValueError(f"{op}: {name} is on {t.device} but input is on {input.device}; accepted: one device for all")


def _require_weight(op: str, name: str, weight: object, input: Tensor) -> None:
    _require_image(op, name, weight, "[K,1,R,S]")
    if 0 in weight.shape:
        raise ValueError(f"{op}: {name} must have positive sizes; got {_shape(weight)}")
    _require_like(op, name, weight, input)
    if weight.shape[1] != 1:
        raise ValueError(f"{op}: {name} must be [K,1,R,S], one input channel a kernel; got {_shape(weight)}")


def _vector(op: str, name: str, t: Tensor, channels: int, input: Tensor) -> None:
    """t is a per-channel vector [channels] of the input's dtype or float32."""
    if (
        isinstance(t, Tensor)
        and t.shape == (channels,)
        and (t.dtype is input.dtype or t.dtype is torch.float32)
        and t.device == input.device
    ):
        return
    if not isinstance(t, Tensor):
        raise TypeError(
            f"{op}: {name} must be a tensor [{channels}], one value an output channel; got {type(t).__name__}"
        )
    if t.dtype not in (input.dtype, torch.float32):
        raise TypeError(f"{op}: {name} has dtype {t.dtype}; accepted: the input's {input.dtype}, or torch.float32")
    if t.device != input.device:
        raise ValueError(f"{op}: {name} is on {t.device} but input is on {input.device}; accepted: one device for all")
    raise ValueError(f"{op}: {name} must be [{channels}], one value an output channel; got {_shape(t)}")


def _image(op: str, name: str, t: Tensor, shape: tuple[int, ...], input: Tensor) -> None:
    """t has exactly that shape, and the input's dtype and device."""
    if isinstance(t, Tensor) and t.shape == shape and t.dtype is input.dtype and t.device == input.device:
        return
    if not isinstance(t, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor {list(shape)}; got {type(t).__name__}")
    _require_like(op, name, t, input)
    raise ValueError(f"{op}: {name} must be {list(shape)}; got {list(t.shape)}")


def _activation(op: str, name: str, value: str) -> int:
    """The code of an activation."""
    if type(value) is not str:
        raise TypeError(f"{op}: {name} must be a string; got {value!r} ({type(value).__name__})")
    code = ACTIVATION_CODES.get(value)
    if code is None:
        raise ValueError(f"{op}: unknown {name} {value!r}; accepted: {', '.join(ACTIVATIONS)}")
    return code


def _slope(op: str, name: str, value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{op}: {name} must be a number; got {value!r} ({type(value).__name__})")
    if value != value or value in (float("inf"), float("-inf")):
        raise ValueError(f"{op}: {name} must be finite; got {value!r}")
    return float(value)


def _window(op: str, input: Tensor, weight: Tensor, stride: Ints, padding: Padding, dilation: Ints) -> G.Geometry:
    """The normalised window, checked to fit into the padded input."""
    try:
        if type(stride) is not int:
            stride = G.as_ints("stride", stride, (2,), _PAIR)
        if type(padding) is not int and type(padding) is not str:
            padding = G.as_ints("padding", padding, (2, 4), _PADDING)
        if type(dilation) is not int:
            dilation = G.as_ints("dilation", dilation, (2,), _PAIR)
        _, _, r, s = weight.shape
        compiling = torch.compiler.is_compiling()
        window = (G.window if compiling else G.cached_window)(r, s, stride, padding, dilation)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{op}: {error}") from None
    _, _, h, w = input.shape
    if h + window.spare_h < 0 or w + window.spare_w < 0:
        _, _, top, bottom, left, right, dh, dw = window.ints
        raise ValueError(
            f"{op}: the window is larger than the padded input: {dh * (r - 1) + 1}x{dw * (s - 1) + 1} "
            f"(kernel {r}x{s}, dilation {dh}x{dw}) against {h + top + bottom}x{w + left + right} "
            f"(input {h}x{w}, padding left {left}, right {right}, top {top}, bottom {bottom}); "
            "accepted: a window no larger than the padded input"
        )
    return window


def _count(op: str, shape: tuple[int, ...]) -> None:
    """The output's size and strides fit into int64."""
    n, k, p, q = shape
    if (n or 1) * k * p * q > _MAX_NUMEL:
        raise ValueError(f"{op}: the output {list(shape)} would have more than 2**63 - 1 elements; accepted: fewer")


def _autocast(input: Tensor, *tensors: Tensor | None) -> list[Tensor | None]:
    """Casts as autocast does for F.conv2d: floating tensors other than float64, to the device's autocast dtype."""
    dtype = torch.get_autocast_dtype(input.device.type)
    return [_cast(t, dtype) for t in (input, *tensors)]


def _cast(t: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    if not isinstance(t, Tensor) or t.dtype is dtype or t.dtype not in _FLOATS or t.dtype is torch.float64:
        return t
    return t.to(dtype)


def _cast_affine(t: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """As `_cast`, but a float32 scale or shift stays: the kernels take it as it is."""
    return t if isinstance(t, Tensor) and t.dtype is torch.float32 else _cast(t, dtype)


_BANK = 0  # `share` of a fixed bank: any number of kernels


def _weight(
    op: str, name: str, weight: Tensor | str, input: Tensor, share: int, multiplier: int = 1
) -> tuple[Tensor, int]:
    """The depthwise weight as [B,1,R,S], and the channel multiplier.

    4-D: learned, shared by `share` chunks of channels, or a bank where share is `_BANK`. 3-D or a name: a bank. A bank
    has any length, so it does not tell the multiplier: it is the one given.
    """
    if isinstance(weight, Tensor):
        if weight.dim() == 3:
            weight, share = weight.unsqueeze(1), _BANK
    elif isinstance(weight, str):
        try:
            weight, share = banks.bank(weight, dtype=input.dtype, device=input.device), _BANK
        except ValueError as error:
            raise ValueError(f"{op}: {error}") from None
    else:
        raise TypeError(
            f"{op}: {name} must be a tensor [K,1,R,S], a bank [K,R,S] or a bank's name; got {type(weight).__name__}"
        )
    shape = weight.shape
    if not (
        len(shape) == 4
        and shape[1] == 1
        and 0 not in shape
        and weight.dtype is input.dtype
        and weight.layout is torch.strided
        and weight.device == input.device
    ):
        _require_weight(op, name, weight, input)
    if share == _BANK:
        return weight, multiplier
    channels, kernels = input.shape[1], shape[0] * share
    if kernels % channels:
        raise ValueError(_channel_mismatch(op, name, shape[0], share, channels))
    return weight, kernels // channels


def _channel_mismatch(op: str, name: str, kernels: int, share: int, channels: int) -> str:
    got = f"{op}: {name} has {kernels} kernels" + (f" shared by {share} chunks of channels" if share != 1 else "")
    hint = f"; for one kernel in {channels // kernels} channels see share" if channels % kernels == 0 else ""
    return f"{got} but input has {channels} channels; accepted: a multiple of the channels{hint}"


def _positive(op: str, name: str, value: int) -> int:
    if type(value) is not int:
        raise TypeError(f"{op}: {name} must be an int; got {value!r} ({type(value).__name__})")
    if value < 1:
        raise ValueError(f"{op}: {name} must be at least 1; got {value!r}")
    return value


def _input(op: str, input: Tensor) -> None:
    """input is [N,C,H,W]; the cheap test first."""
    if (
        isinstance(input, Tensor)
        and input.dtype in _FLOATS
        and input.layout is torch.strided
        and input.dim() == 4
        and 0 not in input.shape[1:]
    ):
        return
    _require_image(op, "input", input)


def _needs_grad(*tensors: Tensor | None) -> bool:
    for t in tensors:  # noqa: SIM110  any() over a generator takes three times as long
        if t is not None and t.requires_grad:
            return True
    return False


def _distinct(tensors: tuple) -> tuple:
    """The tensors, where compiling with an alias for one that comes twice (a block's input as its residual).

    Dynamo does not trace an autograd.Function that is given one tensor in two places.
    """
    if not torch.compiler.is_compiling():
        return tensors
    found: list[Tensor | None] = []
    for t in tensors:
        repeated = t is not None and any(t is other for other in found)
        found.append(t.view_as(t) if repeated else t)
    return tuple(found)


# ---- depthwise ------------------------------------------------------------------------------------------------------


def _depthwise(
    op, input, weight, bias, stride, padding, dilation, share, multiplier,
    activation, negative_slope, scale, shift, residual, post_activation, backend,
):  # fmt: skip
    """The body of the three depthwise functions: check, choose, call."""
    _input(op, input)
    if torch.is_autocast_enabled(input.device.type):
        input, weight, bias, residual = _autocast(input, weight, bias, residual)
        scale, shift = _cast_affine(scale, input.dtype), _cast_affine(shift, input.dtype)
    weight, multiplier = _weight(op, "weight", weight, input, share, multiplier)
    window = _window(op, input, weight, stride, padding, dilation)
    n, c, h, w = input.shape
    k = c * multiplier
    p, q = window.output_size(h, w)
    if not torch.compiler.is_compiling():
        _count(op, (n, k, p, q))
    if bias is not None:
        _vector(op, "bias", bias, k, input)
    if scale is not None:
        _vector(op, "scale", scale, k, input)
    if shift is not None:
        _vector(op, "shift", shift, k, input)
    if residual is not None:
        _image(op, "residual", residual, (n, k, p, q), input)
    act = _activation(op, "activation", activation)
    post = _activation(op, "post_activation", post_activation)
    slope = _slope(op, "negative_slope", negative_slope)
    geometry = [*window.ints, multiplier, int(G.is_channels_last(input)), act, post]

    taken = backends.choose(backends.Call("dwconv", op, input, weight, None, geometry, (p, q)), backend)
    if taken == "reference":
        epilogue = Epilogue(bias, scale, shift, residual, act, post, slope)
        return _dwconv_reference(input, weight, geometry, epilogue)
    tensors = (input, weight, bias, scale, shift, residual)
    if torch.is_grad_enabled() and _needs_grad(*tensors):
        return _dwconv.DepthwiseConv2dFunction.apply(*_distinct(tensors), geometry, slope, taken)
    return _dwconv.KERNELS[taken].forward(*tensors, geometry, slope)


def depthwise_conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Ints = 1,
    padding: Padding = 0,
    dilation: Ints = 1,
    *,
    activation: str = "none",
    negative_slope: float = 0.01,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    post_activation: str = "none",
    backend: str = "auto",
) -> Tensor:
    """y = post_act(act(depthwise_conv2d(input, weight) + bias) * scale + shift + residual), as one kernel.

    Without an epilogue this is `F.conv2d(input, weight, bias, stride, padding, dilation, groups=C)`: output channel k
    reads input channel k // multiplier, with multiplier = K / C.

    Args:
        input: [N,C,H,W]; any strides; N may be 0.
        weight: [K,1,R,S], K a multiple of C; the input's dtype.
        bias: [K], or None.
        stride: an int or (height, width).
        padding: an int, (height, width), (left, right, top, bottom), "same" (stride 1) or "valid".
        dilation: an int or (height, width).
        activation: applied to conv + bias.
        negative_slope: of leaky_relu.
        scale: [K], multiplied after the activation, or None.
        shift: [K], added after the scale, or None.
        residual: [N,K,P,Q], added after the shift, or None.
        post_activation: applied last.
        backend: "auto" or a backend's name.

    Returns:
        [N,K,P,Q] of the input's dtype, channels_last where the input's strides are.

    Raises:
        TypeError: an argument of a wrong kind or dtype.
        ValueError: a wrong shape, size, device or name.
        RuntimeError: the backend asked for by name cannot run this.

    The first half of the depthwise separable convolution (MobileNets, arXiv 1704.04861, 3.1).
    """
    return _depthwise(
        "depthwise_conv2d", input, weight, bias, stride, padding, dilation, 1, 1,
        activation, negative_slope, scale, shift, residual, post_activation, backend,
    )  # fmt: skip


def shared_depthwise_conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Ints = 1,
    padding: Padding = 0,
    dilation: Ints = 1,
    *,
    activation: str = "none",
    negative_slope: float = 0.01,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    post_activation: str = "none",
    backend: str = "auto",
) -> Tensor:
    """y = depthwise_conv2d(input, weight.repeat(C / B, 1, 1, 1)): channel c uses kernel c mod B.

    The gradient of a kernel is the sum over the channels that use it.

    Args:
        input: [N,C,H,W].
        weight: [B,1,R,S], B a divisor of C: one bank for C / B consecutive chunks of channels.
        bias: [C], or None.
        stride, padding, dilation, backend: as `depthwise_conv2d`.
        activation, negative_slope, scale, shift, residual, post_activation: the epilogue, as `depthwise_conv2d`.

    Returns:
        [N,C,P,Q].

    Raises:
        TypeError, ValueError, RuntimeError: as `depthwise_conv2d`.

    VGNet's last depthwise convolution (arXiv 2207.10318), with C / B = 8.
    """
    op = "shared_depthwise_conv2d"
    share = 1
    if isinstance(input, Tensor) and isinstance(weight, Tensor) and input.dim() == 4 and weight.dim() == 4:
        c, b = input.shape[1], weight.shape[0]
        if b == 0 or c % b:
            raise ValueError(
                f"{op}: weight has {b} kernels but input has {c} channels; accepted: a divisor of the channels"
            )
        share = c // b
    elif isinstance(weight, Tensor) and weight.dim() == 3:
        raise ValueError(f"{op}: weight must have 4 dimensions [B,1,R,S]; got {_shape(weight)}")
    return _depthwise(
        op, input, weight, bias, stride, padding, dilation, share, 1,
        activation, negative_slope, scale, shift, residual, post_activation, backend,
    )  # fmt: skip


def fixed_filter_conv2d(
    input: Tensor,
    bank: str | Tensor,
    stride: Ints = 1,
    padding: Padding = 1,
    dilation: Ints = 1,
    *,
    multiplier: int = 1,
    bias: Tensor | None = None,
    activation: str = "none",
    negative_slope: float = 0.01,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    post_activation: str = "none",
    backend: str = "auto",
) -> Tensor:
    """Depthwise convolution with a bank of fixed kernels: output channel o uses kernel o mod K.

    Args:
        input: [N,C,H,W].
        bank: a name of `effops.ops.dwconv.banks.BANKS` ("vgnet8", "vgnet4", "vgnet_blur", "vgnet_blur_alternate",
            "binomial3", "binomial5"), or the kernels [K,R,S] or [K,1,R,S], of the input's dtype. A name builds its
            tensor on every call: pass a tensor where calls are short.
        stride, padding, dilation, backend: as `depthwise_conv2d`.
        multiplier: output channels an input channel; with multiplier = K every channel goes through every kernel.
        bias: [C * multiplier], or None.
        activation, negative_slope, scale, shift, residual, post_activation: the epilogue, as `depthwise_conv2d`.

    Returns:
        [N,C * multiplier,P,Q].

    Raises:
        TypeError, ValueError, RuntimeError: as `depthwise_conv2d`; ValueError for an unknown bank.

    VGNet's fixed edge and Gaussian kernels (arXiv 2207.10318, Appendix D); blur before subsampling (arXiv 1904.11486).
    """
    _positive("fixed_filter_conv2d", "multiplier", multiplier)
    return _depthwise(
        "fixed_filter_conv2d", input, bank, bias, stride, padding, dilation, _BANK, multiplier,
        activation, negative_slope, scale, shift, residual, post_activation, backend,
    )  # fmt: skip


def depthwise_stats2d(
    input: Tensor,
    weight: Tensor | str,
    bias: Tensor | None = None,
    stride: Ints = 1,
    padding: Padding = 0,
    dilation: Ints = 1,
    *,
    share: int = 1,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """mean, var = batch statistics of u = depthwise_conv2d(input, weight) + bias over N, P, Q; u is never stored.

    What a batch norm between the two convolutions needs in training: its scale and shift then go to `ds_conv2d` as
    dw_scale = gamma * rsqrt(var + eps) and dw_shift = beta - mean * dw_scale.

    Args:
        input: [N,C,H,W].
        weight: [K,1,R,S], K * share a multiple of C; or a bank [B,R,S] or a bank's name, as `ds_conv2d`.
        bias: [K], or None.
        stride, padding, dilation, backend: as `depthwise_conv2d`.
        share: number of channel chunks that share the weight.

    Returns:
        mean [K] and population variance [K]: float64 for a float64 input, else float32.

    Raises:
        TypeError, ValueError, RuntimeError: as `depthwise_conv2d`.
    """
    op = "depthwise_stats2d"
    _input(op, input)
    if torch.is_autocast_enabled(input.device.type):
        input, weight, bias = _autocast(input, weight, bias)
    weight, multiplier = _weight(op, "weight", weight, input, _positive(op, "share", share))
    window = _window(op, input, weight, stride, padding, dilation)
    n, c, h, w = input.shape
    k = c * multiplier
    p, q = window.output_size(h, w)
    if not torch.compiler.is_compiling():
        _count(op, (n, k, p, q))
    if bias is not None:
        _vector(op, "bias", bias, k, input)
    geometry = [*window.ints, multiplier, int(G.is_channels_last(input)), 0, 0]

    taken = backends.choose(backends.Call("dwconv_stats", op, input, weight, None, geometry, (p, q)), backend)
    if taken == "reference":
        return _dwconv_stats_reference(input, weight, bias, geometry)
    if torch.is_grad_enabled() and _needs_grad(input, weight, bias):
        return _dwconv.DepthwiseStatsFunction.apply(input, weight, bias, geometry, taken)
    return _dwconv.STATS_KERNELS[taken].forward(input, weight, bias, geometry)


# ---- depthwise separable --------------------------------------------------------------------------------------------


def _separable(
    op, input, passthrough, dw_weight, dw_bias, pw_weight, pw_bias, stride, padding, dilation, dw_share, keep,
    dw_activation, dw_negative_slope, dw_scale, dw_shift, dw_residual, dw_post_activation,
    activation, negative_slope, scale, shift, residual, post_activation, backend,
):  # fmt: skip
    """The body of the depthwise separable functions: check, choose, call."""
    _input(op, input)
    if torch.is_autocast_enabled(input.device.type):
        input, passthrough, dw_weight, dw_bias, dw_residual, pw_weight, pw_bias, residual = _autocast(
            input, passthrough, dw_weight, dw_bias, dw_residual, pw_weight, pw_bias, residual
        )
        dw_scale, dw_shift = _cast_affine(dw_scale, input.dtype), _cast_affine(dw_shift, input.dtype)
        scale, shift = _cast_affine(scale, input.dtype), _cast_affine(shift, input.dtype)
    bank_multiplier = 1
    if type(dw_weight) is str or (isinstance(dw_weight, Tensor) and dw_weight.dim() == 3):
        bank_multiplier = _bank_multiplier(input, passthrough, pw_weight)
    share = _positive(op, "dw_share", dw_share)
    dw_weight, multiplier = _weight(op, "dw_weight", dw_weight, input, share, bank_multiplier)
    window = _window(op, input, dw_weight, stride, padding, dilation)
    n, c, h, w = input.shape
    d = c * multiplier
    p, q = window.output_size(h, w)
    k = _pointwise(op, pw_weight, passthrough, d, (n, p, q), input)
    keep = _keep(op, keep, d)
    if not torch.compiler.is_compiling():
        _count(op, (n, max(keep + k, d), p, q))
    if dw_bias is not None:
        _vector(op, "dw_bias", dw_bias, d, input)
    if dw_scale is not None:
        _vector(op, "dw_scale", dw_scale, d, input)
    if dw_shift is not None:
        _vector(op, "dw_shift", dw_shift, d, input)
    if dw_residual is not None:
        _image(op, "dw_residual", dw_residual, (n, d, p, q), input)
    if pw_bias is not None:
        _vector(op, "pw_bias", pw_bias, k, input)
    if scale is not None:
        _vector(op, "scale", scale, k, input)
    if shift is not None:
        _vector(op, "shift", shift, k, input)
    if residual is not None:
        _image(op, "residual", residual, (n, k, p, q), input)
    dw_act = _activation(op, "dw_activation", dw_activation)
    dw_post = _activation(op, "dw_post_activation", dw_post_activation)
    act = _activation(op, "activation", activation)
    post = _activation(op, "post_activation", post_activation)
    slopes = [_slope(op, "dw_negative_slope", dw_negative_slope), _slope(op, "negative_slope", negative_slope)]
    geometry = [*window.ints, multiplier, int(G.is_channels_last(input)), dw_act, dw_post, act, post, keep]

    taken = backends.choose(backends.Call("dsconv", op, input, dw_weight, pw_weight, geometry, (p, q)), backend)
    if taken == "reference":
        return _dsconv_reference(
            input,
            passthrough,
            dw_weight,
            Epilogue(dw_bias, dw_scale, dw_shift, dw_residual, dw_act, dw_post, slopes[0]),
            pw_weight,
            Epilogue(pw_bias, scale, shift, residual, act, post, slopes[1]),
            geometry,
        )
    tensors = (
        input, passthrough, dw_weight, dw_bias, dw_scale, dw_shift, dw_residual,
        pw_weight, pw_bias, scale, shift, residual,
    )  # fmt: skip
    if torch.is_grad_enabled() and _needs_grad(*tensors):
        return _dsconv.DSConv2dFunction.apply(*_distinct(tensors), geometry, slopes, taken)
    return _dsconv.KERNELS[taken].forward(*tensors, geometry, slopes)


def _bank_multiplier(input: Tensor, passthrough: Tensor | None, pw_weight: Tensor) -> int:
    """Depthwise channels an input channel gives, where dw_weight, a bank, does not tell; `_pointwise` checks it."""
    if not isinstance(pw_weight, Tensor) or pw_weight.dim() != 4:
        return 1
    through = passthrough.shape[1] if isinstance(passthrough, Tensor) and passthrough.dim() == 4 else 0
    return max(1, (pw_weight.shape[1] - through) // input.shape[1])


def _pointwise(
    op: str, weight: Tensor, passthrough: Tensor | None, channels: int, size: tuple[int, int, int], input: Tensor
) -> int:
    """Checks the pointwise weight and the passthrough; returns K. `channels` come from the depthwise convolution."""
    n, p, q = size
    through = 0
    if passthrough is not None:
        _require_image(op, "passthrough", passthrough)
        through = passthrough.shape[1]
        _image(op, "passthrough", passthrough, (n, through, p, q), input)
    if not (
        isinstance(weight, Tensor)
        and weight.dim() == 4
        and weight.dtype is input.dtype
        and weight.layout is torch.strided
        and weight.device == input.device
    ):
        _require_image(op, "pw_weight", weight, "[K,C,1,1]")
        _require_like(op, "pw_weight", weight, input)
    k, c, r, s = weight.shape
    if r != 1 or s != 1 or k == 0:
        raise ValueError(f"{op}: pw_weight must be [K,C,1,1] with K > 0; got {_shape(weight)}")
    if c != channels + through:
        parts = f"{channels} channels" + (f" beside {through} of passthrough" if through else "")
        raise ValueError(
            f"{op}: pw_weight takes {c} channels but the depthwise convolution gives {parts}; "
            f"accepted: [K,{channels + through},1,1]"
        )
    return k


def _keep(op: str, value: int, channels: int) -> int:
    if type(value) is not int:
        raise TypeError(f"{op}: keep must be an int; got {value!r} ({type(value).__name__})")
    if not 0 <= value <= channels:
        raise ValueError(f"{op}: keep must be from 0 to the depthwise convolution's {channels} channels; got {value!r}")
    return value


def ds_conv2d(
    input: Tensor,
    dw_weight: Tensor | str,
    pw_weight: Tensor,
    dw_bias: Tensor | None = None,
    pw_bias: Tensor | None = None,
    stride: Ints = 1,
    padding: Padding = 0,
    dilation: Ints = 1,
    *,
    dw_activation: str = "none",
    dw_negative_slope: float = 0.01,
    dw_scale: Tensor | None = None,
    dw_shift: Tensor | None = None,
    dw_residual: Tensor | None = None,
    dw_post_activation: str = "none",
    activation: str = "none",
    negative_slope: float = 0.01,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    post_activation: str = "none",
    passthrough: Tensor | None = None,
    keep: int = 0,
    dw_share: int = 1,
    backend: str = "auto",
) -> Tensor:
    """y = pw_chain(dw_chain(input)), a depthwise separable convolution as one kernel: dw_chain's result is not stored.

        dw_chain(x) = dw_post_act(dw_act(depthwise_conv2d(x, dw_weight) + dw_bias) * dw_scale + dw_shift + dw_residual)
        pw_chain(z) = post_act(act(conv2d(z, pw_weight) + pw_bias) * scale + shift + residual)

    With a passthrough, z = cat[passthrough, dw_chain(input)]; with keep, y = cat[z[:, -keep:], pw_chain(z)].

    Args:
        input: [N,C,H,W]; any strides; N may be 0.
        dw_weight: [D,1,R,S], D a multiple of C (with dw_share: [D / dw_share,1,R,S]); or a bank [B,R,S] of any length,
            or its name, whose kernel c mod B serves depthwise channel c (D then follows from pw_weight).
        pw_weight: [K,Cp+D,1,1], with Cp the channels of passthrough (0 without).
        dw_bias: [D], or None; so are dw_scale and dw_shift.
        pw_bias: [K], or None; so are scale and shift.
        stride, padding, dilation: the depthwise convolution's, as `depthwise_conv2d`.
        dw_activation, dw_negative_slope, dw_scale, dw_shift, dw_residual, dw_post_activation: the depthwise's epilogue;
            dw_residual is [N,D,P,Q].
        activation, negative_slope, scale, shift, residual, post_activation: the pointwise's epilogue; residual is
            [N,K,P,Q].
        passthrough: [N,Cp,P,Q], goes to the pointwise convolution beside the depthwise's result, or None.
        keep: so many of the last depthwise channels are put out before the pointwise's.
        dw_share: number of channel chunks that share dw_weight (`shared_depthwise_conv2d`).
        backend: "auto" or a backend's name.

    Returns:
        [N,keep+K,P,Q] of the input's dtype, channels_last where the input's strides are.

    Raises:
        TypeError: an argument of a wrong kind or dtype.
        ValueError: a wrong shape, size, device or name.
        RuntimeError: the backend asked for by name cannot run this.

    MobileNets (arXiv 1704.04861, 3.1); with passthrough and keep, VGNet's blocks (arXiv 2207.10318).
    """
    return _separable(
        "ds_conv2d", input, passthrough, dw_weight, dw_bias, pw_weight, pw_bias, stride, padding, dilation,
        dw_share, keep, dw_activation, dw_negative_slope, dw_scale, dw_shift, dw_residual, dw_post_activation,
        activation, negative_slope, scale, shift, residual, post_activation, backend,
    )  # fmt: skip


def half_identity2d(
    left: Tensor,
    right: Tensor,
    dw_weight: Tensor | str,
    pw_weight: Tensor,
    dw_bias: Tensor | None = None,
    pw_bias: Tensor | None = None,
    padding: Padding = 1,
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
) -> tuple[Tensor, Tensor]:
    """VGNet's half-identity block on a pair of halves: (right, pw_chain(cat[left, dw_chain(right)])), as one kernel.

    Args:
        left: [N,Cl,H,W], goes to the pointwise convolution as it is.
        right: [N,C,H,W], goes through the depthwise convolution; and out as the new left half.
        dw_weight: [C,1,R,S], or a fixed bank as in `ds_conv2d`.
        pw_weight: [K,Cl+C,1,1].
        dw_bias: [C], or None.
        pw_bias: [K], or None.
        padding, dilation: the depthwise convolution's; its stride is 1 and it must keep the size.
        dw_activation, dw_negative_slope, dw_scale, dw_shift, dw_post_activation: the depthwise's epilogue (a batch norm
            follows VGNet's fixed kernels).
        activation, negative_slope, scale, shift, residual, post_activation: the pointwise's epilogue, as `ds_conv2d`.
        backend: "auto" or a backend's name.

    Returns:
        right, unchanged, and the new half [N,K,H,W].

    Raises:
        TypeError, ValueError, RuntimeError: as `ds_conv2d`.

    VGNet (arXiv 2207.10318), HalfIdentityBlock.
    """
    op = "half_identity2d"
    _require_image(op, "left", left)
    _require_image(op, "right", right)
    new = _separable(
        op, right, left, dw_weight, dw_bias, pw_weight, pw_bias, 1, padding, dilation, 1, 0,
        dw_activation, dw_negative_slope, dw_scale, dw_shift, None, dw_post_activation,
        activation, negative_slope, scale, shift, residual, post_activation, backend,
    )  # fmt: skip
    return right, new


def downsampling2d(
    input: Tensor,
    dw_weight_or_bank: Tensor | str,
    pw_weight: Tensor,
    dw_bias: Tensor | None = None,
    pw_bias: Tensor | None = None,
    stride: Ints = 2,
    padding: Padding = 1,
    dilation: Ints = 1,
    *,
    keep: int,
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
    """VGNet's downsampling block: z = dw_chain(input); y = cat[z[:, -keep:], pw_chain(z)], as one kernel.

    Args:
        input: [N,C,H,W].
        dw_weight_or_bank: [C,1,R,S] learned kernels, or a fixed bank (blur) [B,R,S] or its name.
        pw_weight: [K,C,1,1].
        dw_bias: [C], or None.
        pw_bias: [K], or None.
        stride, padding, dilation: the depthwise convolution's.
        keep: number of depthwise channels, the last ones, that go out beside the pointwise's (VGNet: min(out // 2, C)).
        dw_activation, dw_negative_slope, dw_scale, dw_shift, dw_post_activation: the depthwise's epilogue.
        activation, negative_slope, scale, shift, residual, post_activation: the pointwise's epilogue, as `ds_conv2d`.
        backend: "auto" or a backend's name.

    Returns:
        [N,keep+K,P,Q].

    Raises:
        TypeError, ValueError, RuntimeError: as `ds_conv2d`.

    VGNet (arXiv 2207.10318), DownsamplingBlock.
    """
    return _separable(
        "downsampling2d", input, None, dw_weight_or_bank, dw_bias, pw_weight, pw_bias, stride, padding, dilation,
        1, keep,
        dw_activation, dw_negative_slope, dw_scale, dw_shift, None, dw_post_activation,
        activation, negative_slope, scale, shift, residual, post_activation, backend,
    )  # fmt: skip
