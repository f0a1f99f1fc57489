"""Depthwise separable convolutions and VGNet's blocks of them (room dsconv)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.compiler import is_compiling

from effops import _checks as check
from effops import backends
from effops._checks import Ints, Padding
from effops.functional._gradients import distinct, needs_grad, run_kernels
from effops.ops import dsconv as _dsconv
from effops.ops.dsconv.reference import dsconv as _dsconv_reference
from effops.ops.dsconv.reference import normalise as _normalise
from effops.ops.epilogue import NONE, BatchNorm, Epilogue
from effops.ops.geometry import CHANNELS_LAST, KEEP, PW_POST_ACTIVATION, in_format, with_tf32
from effops.ops.registration import sums_dtype


def _separable(
    op, input, passthrough, dw_weight, dw_bias, pw_weight, pw_bias, stride, padding, dilation, dw_share, keep,
    dw_activation, dw_negative_slope, dw_scale, dw_shift, dw_residual, dw_post_activation,
    activation, negative_slope, scale, shift, residual, post_activation, batch_norm, pool, backend,
):  # fmt: skip
    """The body of the depthwise separable functions: check, choose, call."""
    if torch._C._is_any_autocast_enabled() and (dtype := check.autocast_dtype(op, input)) is not None:
        images = (input, passthrough, dw_residual, residual)
        input, passthrough, dw_residual, residual = [check.cast(t, dtype) for t in images]
        weights = (dw_weight, dw_bias, pw_weight, pw_bias)
        dw_weight, dw_bias, pw_weight, pw_bias = [check.cast(t, dtype) for t in weights]
        dw_scale, dw_shift = check.cast_affine(dw_scale, dtype), check.cast_affine(dw_shift, dtype)
        scale, shift = check.cast_affine(scale, dtype), check.cast_affine(shift, dtype)
    kind = check.check_input(op, input)
    dw_share = check.check_int(op, "dw_share", dw_share, 1)
    dw_weight, dw_share, bank = check.as_weight(op, "dw_weight", dw_weight, kind, dw_share)
    check.check_like(op, "pw_weight", pw_weight, kind, "[K,C,1,1]")
    if passthrough is not None:
        check.check_like(op, "passthrough", passthrough, kind, "[N,C,P,Q]")
    stride, padding, dilation = check.as_window(op, stride, padding, dilation)
    keep = check.check_int(op, "keep", keep, 0)
    geometry, dw_shape, pw_shape = check.plan_separable(
        op, input.shape, None if passthrough is None else passthrough.shape, dw_weight.shape, pw_weight.shape,
        dw_share, bank, keep, stride, padding, dilation, input.stride(),
        dw_activation, dw_post_activation, activation, post_activation,
    )  # fmt: skip
    if dw_bias is not None:
        check.check_vector(op, "dw_bias", dw_bias, dw_shape[1], kind)
    if dw_scale is not None:
        check.check_vector(op, "dw_scale", dw_scale, dw_shape[1], kind)
    if dw_shift is not None:
        check.check_vector(op, "dw_shift", dw_shift, dw_shape[1], kind)
    if dw_residual is not None:
        check.check_residual(op, "dw_residual", dw_residual, dw_shape, kind)
    if pw_bias is not None:
        check.check_vector(op, "pw_bias", pw_bias, pw_shape[1], kind)
    if scale is not None:
        check.check_vector(op, "scale", scale, pw_shape[1], kind)
    if shift is not None:
        check.check_vector(op, "shift", shift, pw_shape[1], kind)
    if residual is not None:
        check.check_residual(op, "residual", residual, pw_shape, kind)
    dw_slope = check.check_slope(op, "dw_negative_slope", dw_negative_slope)
    slope = check.check_slope(op, "negative_slope", negative_slope)
    if batch_norm is not None:
        check.check_batch_norm(op, batch_norm, scale, shift, pw_shape, kind)
    check.check_bool(op, "pool", pool)

    taken = backends.choose(backends.Call("dsconv", op, input, dw_weight, pw_weight, geometry, pw_shape), backend)
    if taken == "reference":
        output = _dsconv_reference(
            input,
            passthrough,
            dw_weight,
            Epilogue(dw_bias, dw_scale, dw_shift, dw_residual, geometry[10], geometry[11], dw_slope),
            pw_weight,
            Epilogue(pw_bias, scale, shift, residual, geometry[12], geometry[13], slope),
            geometry,
            batch_norm,
        )
        return _with_sums(output, keep) if pool else output
    if taken == "cuda" and input.dtype == torch.float32:
        geometry = with_tf32(geometry)
    if batch_norm is not None:
        tensors = (
            input, passthrough, dw_weight, dw_bias, dw_scale, dw_shift, dw_residual,
            pw_weight, pw_bias, batch_norm.weight, batch_norm.bias, residual,
        )  # fmt: skip
        output = _separable_norm(tensors, geometry, [dw_slope, slope], batch_norm, taken)
        return _with_sums(output, keep) if pool else output
    tensors = (
        input, passthrough, dw_weight, dw_bias, dw_scale, dw_shift, dw_residual,
        pw_weight, pw_bias, scale, shift, residual,
    )  # fmt: skip
    slopes = [dw_slope, slope]
    if pool and taken in _dsconv.POOL_KERNELS:
        return run_kernels(_dsconv.DSConvPool2dFunction, _dsconv.POOL_KERNELS, taken, tensors, geometry, slopes)
    output = run_kernels(_dsconv.DSConv2dFunction, _dsconv.KERNELS, taken, tensors, geometry, slopes)
    return _with_sums(output, keep) if pool else output


def _with_sums(output: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    """An output and the sums of its pointwise channels over each image, in a pass of their own."""
    return output, output.detach()[:, keep:].sum((2, 3), dtype=sums_dtype(output))


def _separable_norm(tensors, geometry, slopes, norm, taken):
    """A checked call with a batch norm: one kernel where the backend has it, else its convolution and torch's norm."""
    if is_compiling():
        tensors = distinct(tensors)
    differentiable = torch.is_grad_enabled() and needs_grad(tensors)
    if taken in _dsconv.NORM_KERNELS and len(tensors[0]) > 0:  # an empty batch has no statistics; torch lets it pass
        if differentiable:
            output, mean, var = _dsconv.DSConvNorm2dFunction.apply(*tensors, geometry, slopes, norm.eps, taken)
        else:
            output, _, mean, var = _dsconv.NORM_KERNELS[taken].forward(*tensors, geometry, slopes, norm.eps)
        n, _, p, q = output.shape
        _update_running_statistics(norm, mean, var, n * p * q)
        return output
    post, residual = geometry[PW_POST_ACTIVATION], tensors[11]
    geometry = [*geometry]
    geometry[PW_POST_ACTIVATION] = NONE
    convolution = (*tensors[:9], None, None, None)
    if differentiable:
        output = _dsconv.DSConv2dFunction.apply(*convolution, geometry, slopes, taken)
    else:
        output = _dsconv.KERNELS[taken].forward(*convolution, geometry, slopes)
    kept, activated = output[:, : geometry[KEEP]], output[:, geometry[KEEP] :]
    y = _normalise(activated, norm, Epilogue(residual=residual, post_activation=post, negative_slope=slopes[1]))
    return in_format(torch.cat((kept, y), 1) if geometry[KEEP] else y, geometry[CHANNELS_LAST])


def _update_running_statistics(norm: BatchNorm, mean: Tensor, var: Tensor, count: int) -> None:
    """What `F.batch_norm` does to the running statistics: those of the batch, the variance unbiased, come in."""
    if norm.running_mean is not None:
        norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), norm.momentum)
    if norm.running_var is not None:
        unbiased = var * (count / (count - 1))
        norm.running_var.lerp_(unbiased.to(norm.running_var.dtype), norm.momentum)


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
    batch_norm: BatchNorm | None = None,
    passthrough: Tensor | None = None,
    keep: int = 0,
    dw_share: int = 1,
    pool: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """y = pw_chain(dw_chain(input)), a depthwise separable convolution as one kernel: dw_chain's result is not stored.

        dw_chain(x) = dw_post_act(dw_act(depthwise_conv2d(x, dw_weight) + dw_bias) * dw_scale + dw_shift + dw_residual)
        pw_chain(z) = post_act(act(conv2d(z, pw_weight) + pw_bias) * scale + shift + residual)

    With a passthrough, z = cat[passthrough, dw_chain(input)]; with keep, y = cat[z[:, -keep:], pw_chain(z)].

    Args:
        input: [N,C,H,W]; any strides; N may be 0.
        dw_weight: [D,1,R,S], D a multiple of C (with dw_share: [D / dw_share,1,R,S]); or a bank [B,R,S] of any length,
            its name or a `NamedBank`, whose kernel c mod B serves depthwise channel c (D then follows from pw_weight).
        pw_weight: [K,Cp+D,1,1], with Cp the channels of passthrough (0 without).
        dw_bias: [D], or None; so are dw_scale and dw_shift.
        pw_bias: [K], or None; so are scale and shift.
        stride, padding, dilation: the depthwise convolution's, as `depthwise_conv2d`.
        dw_activation, dw_negative_slope, dw_scale, dw_shift, dw_residual, dw_post_activation: the depthwise's epilogue;
            dw_residual is [N,D,P,Q].
        batch_norm: a `BatchNorm`, training batch norm in the place of scale and shift: statistics of the batch, taken
            as the kernel goes; the running statistics are updated in place.
        activation, negative_slope, scale, shift, residual, post_activation: the pointwise's epilogue; residual is
            [N,K,P,Q].
        passthrough: [N,Cp,P,Q], goes to the pointwise convolution beside the depthwise's result, or None.
        keep: so many of the last depthwise channels are put out before the pointwise's.
        dw_share: number of channel chunks that share dw_weight (`shared_depthwise_conv2d`).
        pool: also returns the sums over each image of the pointwise's K channels, which the kernel takes as it stores
            them: what `squeeze_excite2d(..., sums=...)` then need not read again.
        backend: "auto" or a backend's name.

    Returns:
        [N,keep+K,P,Q] of the input's dtype, channels_last where the input's strides are. With pool also the sums
        [N,K], float64 for a float64 input, else float32, which carry no gradient.

    Raises:
        TypeError: an argument of a wrong kind or dtype.
        ValueError: a wrong shape, size, device or name; batch_norm beside scale or shift, or with one value a channel.
        RuntimeError: the backend asked for by name cannot run this.

    MobileNets (arXiv 1704.04861, 3.1); with passthrough and keep, VGNet's blocks (arXiv 2207.10318, 4).

    Example:
        >>> x, dw, pw = torch.randn(2, 8, 9, 9), torch.randn(8, 1, 3, 3), torch.randn(16, 8, 1, 1)
        >>> y = EF.ds_conv2d(x, dw, pw, stride=2, padding=1, dw_activation="relu6")
        >>> stock = F.conv2d(F.relu6(F.conv2d(x, dw, stride=2, padding=1, groups=8)), pw)
        >>> y.shape, torch.allclose(y, stock, atol=1e-4)
        (torch.Size([2, 16, 5, 5]), True)
    """
    return _separable(
        "ds_conv2d", input, passthrough, dw_weight, dw_bias, pw_weight, pw_bias, stride, padding, dilation,
        dw_share, keep, dw_activation, dw_negative_slope, dw_scale, dw_shift, dw_residual, dw_post_activation,
        activation, negative_slope, scale, shift, residual, post_activation, batch_norm, pool, backend,
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
    batch_norm: BatchNorm | None = None,
    pool: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, ...]:
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
        activation, negative_slope, scale, shift, residual, post_activation, batch_norm: the pointwise's epilogue, as
            `ds_conv2d`.
        pool: also returns the sums of the new half over each image, as `ds_conv2d`.
        backend: "auto" or a backend's name.

    Returns:
        right, unchanged, and the new half [N,K,H,W]; with pool its sums [N,K] as well.

    Raises:
        TypeError, ValueError, RuntimeError: as `ds_conv2d`.

    VGNet (arXiv 2207.10318, 4 and Figure 8b), HalfIdentityBlock.

    Example:
        >>> left, right = torch.randn(2, 16, 9, 9).chunk(2, 1)
        >>> dw, pw = torch.randn(8, 1, 3, 3), torch.randn(8, 16, 1, 1)
        >>> kept, new = EF.half_identity2d(left, right, dw, pw, activation="relu")
        >>> stock = F.relu(F.conv2d(torch.cat([left, F.conv2d(right, dw, padding=1, groups=8)], 1), pw))
        >>> kept is right, torch.allclose(new, stock, atol=1e-4)
        (True, True)
    """
    op = "half_identity2d"
    check.require_image(op, "left", left, "[N,C,H,W]")
    check.require_image(op, "right", right, "[N,C,H,W]")
    new = _separable(
        op, right, left, dw_weight, dw_bias, pw_weight, pw_bias, 1, padding, dilation, 1, 0,
        dw_activation, dw_negative_slope, dw_scale, dw_shift, None, dw_post_activation,
        activation, negative_slope, scale, shift, residual, post_activation, batch_norm, pool, backend,
    )  # fmt: skip
    return (right, *new) if pool else (right, new)


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
    batch_norm: BatchNorm | None = None,
    pool: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
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
        activation, negative_slope, scale, shift, residual, post_activation, batch_norm: the pointwise's epilogue, as
            `ds_conv2d`.
        pool: also returns the sums of the K new channels over each image, as `ds_conv2d`.
        backend: "auto" or a backend's name.

    Returns:
        [N,keep+K,P,Q], the kept channels first; with pool the sums [N,K] as well.

    Raises:
        TypeError, ValueError, RuntimeError: as `ds_conv2d`.

    VGNet (arXiv 2207.10318, 4 and Figure 8a), DownsamplingBlock.

    Example:
        >>> x, pw = torch.randn(2, 8, 14, 14), torch.randn(24, 8, 1, 1)
        >>> y = EF.downsampling2d(x, "vgnet_blur", pw, keep=8, activation="relu")
        >>> blurred = EF.fixed_filter_conv2d(x, "vgnet_blur", stride=2)
        >>> y.shape, torch.allclose(y[:, :8], blurred, atol=1e-5)
        (torch.Size([2, 32, 7, 7]), True)
    """
    return _separable(
        "downsampling2d", input, None, dw_weight_or_bank, dw_bias, pw_weight, pw_bias, stride, padding, dilation,
        1, keep,
        dw_activation, dw_negative_slope, dw_scale, dw_shift, None, dw_post_activation,
        activation, negative_slope, scale, shift, residual, post_activation, batch_norm, pool, backend,
    )  # fmt: skip
