"""Depthwise convolutions: learned, shared and fixed kernels, and their batch statistics (room dwconv)."""

from __future__ import annotations

import torch
from torch import Tensor

from effops import _checks as check
from effops import backends
from effops._checks import BANK, Ints, Padding
from effops.functional._gradients import run_kernels
from effops.ops import dwconv as _dwconv
from effops.ops.dwconv.banks import NamedBank
from effops.ops.dwconv.reference import dwconv as _dwconv_reference
from effops.ops.dwconv.reference import dwconv_stats as _dwconv_stats_reference
from effops.ops.epilogue import Epilogue


def _depthwise(
    op, input, weight, bias, stride, padding, dilation, share, multiplier,
    activation, negative_slope, scale, shift, residual, post_activation, backend,
):  # fmt: skip
    """The body of the three depthwise functions: check, choose, call."""
    if torch._C._is_any_autocast_enabled() and (dtype := check.autocast_dtype(op, input)) is not None:
        input, weight, bias, residual = [check.cast(t, dtype) for t in (input, weight, bias, residual)]
        scale, shift = check.cast_affine(scale, dtype), check.cast_affine(shift, dtype)
    kind = check.check_input(op, input)
    weight, share, bank = check.as_weight(op, "weight", weight, kind, share)
    stride, padding, dilation = check.as_window(op, stride, padding, dilation)
    geometry, shape = check.plan_depthwise(
        op, "weight", input.shape, weight.shape, share, bank, multiplier, stride, padding, dilation,
        input.stride(), activation, post_activation,
    )  # fmt: skip
    if bias is not None:
        check.check_vector(op, "bias", bias, shape[1], kind)
    if scale is not None:
        check.check_vector(op, "scale", scale, shape[1], kind)
    if shift is not None:
        check.check_vector(op, "shift", shift, shape[1], kind)
    if residual is not None:
        check.check_residual(op, "residual", residual, shape, kind)
    slope = check.check_slope(op, "negative_slope", negative_slope)

    taken = backends.choose(backends.Call("dwconv", op, input, weight, None, geometry, shape), backend)
    if taken == "reference":
        epilogue = Epilogue(bias, scale, shift, residual, geometry[10], geometry[11], slope)
        return _dwconv_reference(input, weight, geometry, epilogue)
    tensors = (input, weight, bias, scale, shift, residual)
    return run_kernels(_dwconv.DepthwiseConv2dFunction, _dwconv.KERNELS, taken, tensors, geometry, slope)


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

    Example:
        >>> x, weight, bias = torch.randn(2, 8, 9, 9), torch.randn(8, 1, 3, 3), torch.randn(8)
        >>> y = EF.depthwise_conv2d(x, weight, bias, padding=1, activation="relu")
        >>> stock = F.relu(F.conv2d(x, weight, bias, padding=1, groups=8))
        >>> y.shape, torch.allclose(y, stock, atol=1e-5)
        (torch.Size([2, 8, 9, 9]), True)
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

    VGNet's last depthwise convolution (arXiv 2207.10318, Table 1: SharedDWConv2d), with C / B = 8.

    Example:
        >>> x, weight = torch.randn(2, 16, 9, 9), torch.randn(2, 1, 3, 3)
        >>> y = EF.shared_depthwise_conv2d(x, weight, padding=1)
        >>> stock = F.conv2d(x, weight.repeat(8, 1, 1, 1), padding=1, groups=16)
        >>> y.shape, torch.allclose(y, stock, atol=1e-5)
        (torch.Size([2, 16, 9, 9]), True)
    """
    op = "shared_depthwise_conv2d"
    check.check_input(op, input)
    check.require_image(op, "weight", weight, "[B,1,R,S]")
    channels, kernels = input.shape[1], weight.shape[0]
    if kernels == 0 or channels % kernels:
        raise ValueError(
            f"{op}: weight has {kernels} kernels but input has {channels} channels; accepted: a divisor of the channels"
        )
    share = channels // kernels
    return _depthwise(
        op, input, weight, bias, stride, padding, dilation, share, 1,
        activation, negative_slope, scale, shift, residual, post_activation, backend,
    )  # fmt: skip


def fixed_filter_conv2d(
    input: Tensor,
    bank: str | Tensor | NamedBank,
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
    """y[n, o] = conv(input[n, o // multiplier], bank[o mod K]): a depthwise convolution with fixed kernels.

    Args:
        input: [N,C,H,W].
        bank: a name of `effops.ops.dwconv.banks.BANKS` ("vgnet8", "vgnet4", "vgnet_blur", "vgnet_blur_alternate",
            "binomial3", "binomial5"), or the kernels [K,R,S] or [K,1,R,S], of the input's dtype. A name builds its
            tensor on every call: where calls are short pass a tensor, or a `NamedBank` of the same module, which tells
            the name of the bank that a tensor holds.
        stride, padding, dilation, backend: as `depthwise_conv2d`.
        multiplier: output channels an input channel; with multiplier = K every channel goes through every kernel.
        bias: [C * multiplier], or None.
        activation, negative_slope, scale, shift, residual, post_activation: the epilogue, as `depthwise_conv2d`.

    Returns:
        [N,C * multiplier,P,Q].

    Raises:
        TypeError, ValueError, RuntimeError: as `depthwise_conv2d`; ValueError for an unknown bank.

    VGNet's fixed edge and Gaussian kernels (arXiv 2207.10318, Appendix D); blur before subsampling (arXiv 1904.11486).

    Example:
        >>> x = torch.randn(2, 6, 14, 14)
        >>> y = EF.fixed_filter_conv2d(x, "binomial3", stride=2)
        >>> sobel = torch.tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]])
        >>> edges = EF.fixed_filter_conv2d(x, torch.stack([sobel, sobel.T]), multiplier=2)
        >>> y.shape, edges.shape
        (torch.Size([2, 6, 7, 7]), torch.Size([2, 12, 14, 14]))
    """
    multiplier = check.check_int("fixed_filter_conv2d", "multiplier", multiplier, 1)
    return _depthwise(
        "fixed_filter_conv2d", input, bank, bias, stride, padding, dilation, BANK, multiplier,
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
        weight: [K / share,1,R,S], K a multiple of C; or a bank [B,R,S], its name or a `NamedBank`: then K = C.
        bias: [K], or None.
        stride, padding, dilation, backend: as `depthwise_conv2d`.
        share: number of channel chunks that share the weight.

    Returns:
        mean [K] and population variance [K]: float64 for a float64 input, else float32.

    Raises:
        TypeError, ValueError, RuntimeError: as `depthwise_conv2d`.

    What batch normalisation takes of a batch (arXiv 1502.03167, Algorithm 1).

    Example:
        >>> x, weight = torch.randn(2, 8, 9, 9), torch.randn(8, 1, 3, 3)
        >>> mean, var = EF.depthwise_stats2d(x, weight, padding=1)
        >>> stored = F.conv2d(x, weight, padding=1, groups=8)
        >>> torch.allclose(mean, stored.mean((0, 2, 3)), atol=1e-5)
        True
        >>> torch.allclose(var, stored.var((0, 2, 3), correction=0), rtol=1e-4)
        True
    """
    op = "depthwise_stats2d"
    if torch._C._is_any_autocast_enabled() and (dtype := check.autocast_dtype(op, input)) is not None:
        input, weight, bias = [check.cast(t, dtype) for t in (input, weight, bias)]
    kind = check.check_input(op, input)
    weight, share, bank = check.as_weight(op, "weight", weight, kind, check.check_int(op, "share", share, 1))
    stride, padding, dilation = check.as_window(op, stride, padding, dilation)
    geometry, shape = check.plan_depthwise(
        op, "weight", input.shape, weight.shape, share, bank, 1, stride, padding, dilation,
        input.stride(), "none", "none",
    )  # fmt: skip
    if bias is not None:
        check.check_vector(op, "bias", bias, shape[1], kind)

    taken = backends.choose(backends.Call("dwconv_stats", op, input, weight, None, geometry, shape), backend)
    if taken == "reference":
        return _dwconv_stats_reference(input, weight, bias, geometry)
    tensors = (input, weight, bias)
    return run_kernels(_dwconv.DepthwiseStatsFunction, _dwconv.STATS_KERNELS, taken, tensors, geometry)
