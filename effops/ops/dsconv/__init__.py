"""Depthwise convolution, epilogue, pointwise convolution, epilogue as one operator: fake and autograd.Function."""

from __future__ import annotations

import torch
from torch.utils.flop_counter import register_flop_formula

from effops.ops import geometry as G
from effops.ops.dsconv import reference
from effops.ops.dwconv import depthwise_flops, kernel_gradients
from effops.ops.epilogue import BatchNorm, Epilogue, output_gives_gradient
from effops.ops.higher_order import KernelFunction, reference_gradients
from effops.ops.registration import (
    Kernels,
    cuda_kernels,
    fake_gradients,
    fake_output,
    kernels_of,
    packets,
    register_fake,
    sums_dtype,
    triton_kernels,
    triton_operator,
)

_ops = torch.ops.effops

# A backend joins by adding its operators here (and its entry in effops/backends.py).
KERNELS = {
    "triton": triton_kernels("dsconv", "dsconv_fwd", "dsconv_bwd"),
    "cuda": cuda_kernels("dsconv_fwd", "dsconv_bwd"),
    "cpp": Kernels(_ops.dsconv_fwd.default, _ops.dsconv_bwd.default),
}
# One without an entry here takes the sums of its result in a pass of their own (functional/dsconv.py). The sums are not
# differentiated: backward is the convolution's.
POOL_KERNELS = {
    "triton": Kernels(triton_operator("dsconv", "dsconv_pool_fwd"), KERNELS["triton"].backward),
    "cpp": Kernels(_ops.dsconv_pool_fwd.default, KERNELS["cpp"].backward),
}
# One without an entry here gets the norm as an operator of torch behind its convolution (functional/dsconv.py).
NORM_KERNELS = {"cpp": Kernels(_ops.dsconv_norm_fwd.default, _ops.dsconv_norm_bwd.default)}

# Positions among the 12 tensors of the operator.
_PASSTHROUGH, _DW_RESIDUAL, _RESIDUAL = 1, 6, 11
_IMAGES = 1 | 1 << _PASSTHROUGH | 1 << _DW_RESIDUAL | 1 << _RESIDUAL


@register_fake("dsconv_fwd")
def _dsconv_fwd(
    input, passthrough, dw_weight, dw_bias, dw_scale, dw_shift, dw_residual,
    pw_weight, bias, scale, shift, residual, geometry, slopes,
):  # fmt: skip
    n, _, h, w = input.shape
    p, q = G.output_size(h, w, dw_weight.shape[2], dw_weight.shape[3], geometry)
    return fake_output(input, (n, geometry[G.KEEP] + pw_weight.shape[0], p, q), geometry)


@register_fake("dsconv_pool_fwd")
def _dsconv_pool_fwd(
    input, passthrough, dw_weight, dw_bias, dw_scale, dw_shift, dw_residual,
    pw_weight, bias, scale, shift, residual, geometry, slopes,
):  # fmt: skip
    n, _, h, w = input.shape
    p, q = G.output_size(h, w, dw_weight.shape[2], dw_weight.shape[3], geometry)
    channels = pw_weight.shape[0]
    sums = torch.empty((n, channels), dtype=sums_dtype(input), device=input.device)
    return fake_output(input, (n, geometry[G.KEEP] + channels, p, q), geometry), sums


@register_fake("dsconv_bwd")
def _dsconv_bwd(
    grad_output, output, input, passthrough, dw_weight, dw_bias, dw_scale, dw_shift, dw_residual,
    pw_weight, bias, scale, shift, residual, geometry, slopes, mask,
):  # fmt: skip
    tensors = (
        input, passthrough, dw_weight, dw_bias, dw_scale, dw_shift, dw_residual,
        pw_weight, bias, scale, shift, residual,
    )  # fmt: skip
    return fake_gradients(tensors, _IMAGES, geometry, mask)


@register_fake("dsconv_norm_fwd")
def _dsconv_norm_fwd(
    input, passthrough, dw_weight, dw_bias, dw_scale, dw_shift, dw_residual,
    pw_weight, bias, norm_weight, norm_bias, residual, geometry, slopes, eps,
):  # fmt: skip
    n, _, h, w = input.shape
    p, q = G.output_size(h, w, dw_weight.shape[2], dw_weight.shape[3], geometry)
    channels = pw_weight.shape[0]
    mean = torch.empty(channels, dtype=sums_dtype(input), device=input.device)
    return (
        fake_output(input, (n, geometry[G.KEEP] + channels, p, q), geometry),
        fake_output(input, (n, channels, p, q), geometry),
        mean,
        torch.empty_like(mean),
    )


@register_fake("dsconv_norm_bwd")
def _dsconv_norm_bwd(
    grad_output, activated, mean, var, input, passthrough, dw_weight, dw_bias, dw_scale, dw_shift, dw_residual,
    pw_weight, bias, norm_weight, norm_bias, residual, geometry, slopes, eps, mask,
):  # fmt: skip
    tensors = (
        input, passthrough, dw_weight, dw_bias, dw_scale, dw_shift, dw_residual,
        pw_weight, bias, norm_weight, norm_bias, residual,
    )  # fmt: skip
    return fake_gradients(tensors, _IMAGES, geometry, mask)


@register_flop_formula(packets("dsconv_fwd", "dsconv_norm_fwd", "dsconv_pool_fwd"))
def _dsconv_fwd_flops(
    input, passthrough, dw_weight, dw_bias, dw_scale, dw_shift, dw_residual,
    pw_weight, bias, scale, shift, residual, geometry, slopes, eps=None, *, out_shape,
):  # fmt: skip
    n, _, p, q = (
        out_shape[0] if isinstance(out_shape[0], tuple | list | torch.Size) else out_shape
    )  # the first of several
    return depthwise_flops(input, dw_weight, geometry) + 2 * n * pw_weight[0] * pw_weight[1] * p * q


class DSConv2dFunction(KernelFunction):
    """z = cat[passthrough, dw_chain(input)];  y = cat[z[:, -keep:], pw_chain(z)].

    dw_chain(x) = dw_post_act(dw_act(depthwise_conv2d(x, dw_weight) + dw_bias) * dw_scale + dw_shift + dw_residual) and
    pw_chain(z) = post_act(act(conv2d(z, pw_weight) + bias) * scale + shift + residual). Call it as
    `DSConv2dFunction.apply(input, passthrough, dw_weight, dw_bias, dw_scale, dw_shift, dw_residual, pw_weight, bias,
    scale, shift, residual, geometry, slopes, backend)`. It checks nothing: `effops.functional.ds_conv2d` is the checked
    door to it.

    Args:
        input: [N,C,H,W].
        passthrough: [N,Cp,P,Q] or None, goes to the pointwise convolution before the depthwise's channels.
        dw_weight: [B,1,R,S]; depthwise output channel o of D = C * multiplier uses kernel o mod B.
        dw_bias, dw_scale, dw_shift: [D] or None.
        dw_residual: [N,D,P,Q] or None.
        pw_weight: [K,Cp+D,1,1].
        bias, scale, shift: [K] or None.
        residual: [N,K,P,Q] or None.
        geometry: the 17 ints of `effops/schemas.inc`.
        slopes: [depthwise slope, pointwise slope].
        backend: name of the backend whose kernels run, forward and backward ("triton", "cuda", "cpp").

    Returns:
        [N,keep+K,P,Q].

    Saved for backward are the inputs, and the output where the pointwise activation's derivative can be read off it;
    the depthwise result z is recomputed. The gradient can be differentiated again (then through the reference).

    Raises:
        RuntimeError: under functorch transforms or forward-mode AD.

    Example:
        >>> x, dw, pw = torch.randn(2, 8, 9, 9), torch.randn(8, 1, 3, 3), torch.randn(16, 8, 1, 1)
        >>> geometry = [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0]  # stride 1, padding 1, dilation 1
        >>> tensors = (x, None, dw, None, None, None, None, pw, None, None, None, None)
        >>> y = effops.autograd.DSConv2dFunction.apply(*tensors, geometry, [0.0, 0.0], "cpp")
        >>> torch.allclose(y, EF.ds_conv2d(x, dw, pw, padding=1), atol=1e-4)
        True
    """

    @staticmethod
    def forward(
        ctx, input, passthrough, dw_weight, dw_bias, dw_scale, dw_shift, dw_residual,
        pw_weight, bias, scale, shift, residual, geometry, slopes, backend="cpp",
    ):  # fmt: skip
        kernels = kernels_of(KERNELS, backend, "DSConv2dFunction")
        output = kernels.forward(
            input, passthrough, dw_weight, dw_bias, dw_scale, dw_shift, dw_residual,
            pw_weight, bias, scale, shift, residual, geometry, slopes,
        )  # fmt: skip
        tensors = (
            input, passthrough, dw_weight, dw_bias, dw_scale, dw_shift, dw_residual,
            pw_weight, bias, scale, shift, residual,
        )  # fmt: skip
        _save(ctx, tensors, output, geometry, slopes, kernels)
        return output

    @staticmethod
    def backward(ctx, grad_output):
        return _gradients(ctx, grad_output)


def _save(ctx, tensors, output, geometry, slopes, kernels) -> None:
    """Keeps what `_gradients` wants."""
    *others, scale, shift, residual = tensors
    post = geometry[G.PW_POST_ACTIVATION]
    saved = None
    if output_gives_gradient(geometry[G.PW_ACTIVATION], slopes[1], post, scale, shift, residual):
        saved = output
    # Without a post-activation the residual's gradient is the output's: it takes neither the residual nor a kernel.
    ctx.save_for_backward(*others, scale, shift, residual if post else None, saved)
    ctx.static = (geometry, slopes, kernels)


def _gradients(ctx, grad_output) -> tuple[torch.Tensor | None, ...]:
    """Of all the arguments of `apply`."""
    *tensors, output = ctx.saved_tensors
    geometry, slopes, kernels = ctx.static
    needs = list(ctx.needs_input_grad[:12])
    pass_residual = needs[_RESIDUAL] and not geometry[G.PW_POST_ACTIVATION]
    if pass_residual:
        needs[_RESIDUAL] = False
    if torch.is_grad_enabled():
        gradients = reference_gradients(_reference(geometry, slopes), tensors, needs, (grad_output,))
    else:
        gradients = kernel_gradients(kernels.backward, (grad_output, output), tensors, (geometry, slopes), needs)
    if pass_residual:
        gradients[_RESIDUAL] = grad_output[:, geometry[G.KEEP] :]
    return (*gradients, None, None, None)


class DSConvPool2dFunction(KernelFunction):
    """`DSConv2dFunction` that also returns the sums of its K pointwise channels over each image.

    Call it as `DSConvPool2dFunction.apply(...)`. It checks nothing: `effops.functional.ds_conv2d(..., pool=True)` is
    the checked door to it.

    Args:
        The others: as for `DSConv2dFunction`.

    Returns:
        [N,keep+K,P,Q]; sums [N,K], float64 for a float64 input, else float32, which are not differentiable (they are
        there for the squeeze-excite that reads the output, whose gradient is the output's).

    Raises:
        RuntimeError: under functorch transforms or forward-mode AD.

    Example:
        >>> x, dw, pw = torch.randn(2, 8, 9, 9), torch.randn(8, 1, 3, 3), torch.randn(16, 8, 1, 1)
        >>> geometry = [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0]  # stride 1, padding 1, dilation 1
        >>> tensors = (x, None, dw, None, None, None, None, pw, None, None, None, None)
        >>> y, sums = effops.autograd.DSConvPool2dFunction.apply(*tensors, geometry, [0.0, 0.0], "cpp")
        >>> torch.allclose(sums, y.sum((2, 3)), atol=1e-3)
        True
    """

    @staticmethod
    def forward(
        ctx, input, passthrough, dw_weight, dw_bias, dw_scale, dw_shift, dw_residual,
        pw_weight, bias, scale, shift, residual, geometry, slopes, backend="cpp",
    ):  # fmt: skip
        kernels = kernels_of(POOL_KERNELS, backend, "DSConvPool2dFunction")
        output, sums = kernels.forward(
            input, passthrough, dw_weight, dw_bias, dw_scale, dw_shift, dw_residual,
            pw_weight, bias, scale, shift, residual, geometry, slopes,
        )  # fmt: skip
        tensors = (
            input, passthrough, dw_weight, dw_bias, dw_scale, dw_shift, dw_residual,
            pw_weight, bias, scale, shift, residual,
        )  # fmt: skip
        _save(ctx, tensors, output, geometry, slopes, kernels)
        ctx.mark_non_differentiable(sums)
        return output, sums

    @staticmethod
    def backward(ctx, grad_output, _grad_sums):
        return _gradients(ctx, grad_output)


class DSConvNorm2dFunction(KernelFunction):
    """z = cat[passthrough, dw_chain(input)];  y = cat[z[:, -keep:], post_act(norm(act(conv2d(z, pw_weight) + bias)) +
    residual)], norm(a) = (a - mean) / sqrt(var + eps) * norm_weight + norm_bias on this batch's statistics of a.

    Call it as `DSConvNorm2dFunction.apply(input, passthrough, dw_weight, dw_bias, dw_scale, dw_shift, dw_residual,
    pw_weight, bias, norm_weight, norm_bias, residual, geometry, slopes, eps, backend)`. It checks nothing:
    `effops.functional.ds_conv2d(..., batch_norm=...)` is the checked door to it.

    Args:
        norm_weight, norm_bias: [K] or None (ones, zeros).
        eps: added to the variance.
        The others: as for `DSConv2dFunction`.

    Returns:
        [N,keep+K,P,Q]; mean [K] and population variance [K] of a, float64 for a float64 input, else float32, which are
        not differentiable (they are there for running statistics).

    Saved for backward are the inputs and a; the depthwise result z is recomputed. The gradient can be differentiated
    again (then through the reference).

    Raises:
        RuntimeError: under functorch transforms or forward-mode AD.

    Example:
        >>> x, dw, pw = torch.randn(2, 8, 9, 9), torch.randn(8, 1, 3, 3), torch.randn(16, 8, 1, 1)
        >>> geometry = [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0]  # stride 1, padding 1, dilation 1
        >>> tensors = (x, None, dw, None, None, None, None, pw, None, None, None, None)
        >>> y, mean, var = effops.autograd.DSConvNorm2dFunction.apply(*tensors, geometry, [0.0, 0.0], 1e-5, "cpp")
        >>> torch.allclose(y, EF.ds_conv2d(x, dw, pw, padding=1, batch_norm=EF.BatchNorm()), atol=1e-5)
        True
    """

    @staticmethod
    def forward(
        ctx, input, passthrough, dw_weight, dw_bias, dw_scale, dw_shift, dw_residual,
        pw_weight, bias, norm_weight, norm_bias, residual, geometry, slopes, eps, backend="cpp",
    ):  # fmt: skip
        kernels = kernels_of(NORM_KERNELS, backend, "DSConvNorm2dFunction")
        output, activated, mean, var = kernels.forward(
            input, passthrough, dw_weight, dw_bias, dw_scale, dw_shift, dw_residual,
            pw_weight, bias, norm_weight, norm_bias, residual, geometry, slopes, eps,
        )  # fmt: skip
        ctx.save_for_backward(
            input, passthrough, dw_weight, dw_bias, dw_scale, dw_shift, dw_residual,
            pw_weight, bias, norm_weight, norm_bias, residual if geometry[G.PW_POST_ACTIVATION] else None,
            activated, mean, var,
        )  # fmt: skip
        ctx.mark_non_differentiable(mean, var)
        ctx.static = (geometry, slopes, eps, kernels)
        return output, mean, var

    @staticmethod
    def backward(ctx, grad_output, _grad_mean, _grad_var):
        *tensors, activated, mean, var = ctx.saved_tensors
        geometry, slopes, eps, kernels = ctx.static
        needs = list(ctx.needs_input_grad[:12])
        pass_residual = needs[_RESIDUAL] and not geometry[G.PW_POST_ACTIVATION]
        if pass_residual:
            needs[_RESIDUAL] = False
        if torch.is_grad_enabled():
            reference = _reference(geometry, slopes, eps)
            gradients = reference_gradients(reference, tensors, needs, (grad_output,))
        else:
            head = (grad_output, activated, mean, var)
            gradients = kernel_gradients(kernels.backward, head, tensors, (geometry, slopes, eps), needs)
        if pass_residual:
            gradients[_RESIDUAL] = grad_output[:, geometry[G.KEEP] :]
        return (*gradients, None, None, None, None)


def _reference(geometry, slopes, eps=None):
    """The operator in plain torch, a function of its 12 tensors; with `eps`, the one with the batch norm."""

    def run(
        input, passthrough, dw_weight, dw_bias, dw_scale, dw_shift, dw_residual,
        pw_weight, bias, scale, shift, residual,
    ):  # fmt: skip
        norm = None
        if eps is not None:
            norm, scale, shift = BatchNorm(scale, shift, eps=eps), None, None
        dw_epilogue = Epilogue(
            dw_bias, dw_scale, dw_shift, dw_residual, geometry[G.ACTIVATION], geometry[G.POST_ACTIVATION], slopes[0]
        )
        epilogue = Epilogue(
            bias, scale, shift, residual, geometry[G.PW_ACTIVATION], geometry[G.PW_POST_ACTIVATION], slopes[1]
        )
        return reference.dsconv(input, passthrough, dw_weight, dw_epilogue, pw_weight, epilogue, geometry, norm)

    return run
