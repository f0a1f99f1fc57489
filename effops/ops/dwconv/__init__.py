"""Depthwise convolution with its epilogue, and its batch statistics: fakes and autograd.Functions over the kernels.

Learned, shared and fixed banks are one operator: output channel o of C * multiplier reads input channel o // multiplier
with kernel `weight[o mod B]`, weight [B,1,R,S].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import compress

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from effops.ops import geometry as G
from effops.ops.dwconv import reference
from effops.ops.epilogue import Epilogue, output_gives_gradient
from effops.ops.higher_order import KernelFunction, reference_gradients
from effops.ops.registration import (
    Kernels,
    cuda_kernels,
    fake_gradients,
    fake_output,
    kernels_of,
    packets,
    register_fake,
    triton_kernels,
)

_ops = torch.ops.effops


# A backend joins by adding its operators here (and its entry in effops/backends.py).
KERNELS = {
    "triton": triton_kernels("dwconv", "dwconv_fwd", "dwconv_bwd"),
    "cuda": cuda_kernels("dwconv_fwd", "dwconv_bwd"),
    "cpp": Kernels(_ops.dwconv_fwd.default, _ops.dwconv_bwd.default),
}
STATS_KERNELS = {
    "triton": triton_kernels("dwconv", "dwconv_stats", "dwconv_stats_bwd"),
    "cuda": cuda_kernels("dwconv_stats", "dwconv_stats_bwd"),
    "cpp": Kernels(_ops.dwconv_stats.default, _ops.dwconv_stats_bwd.default),
}


# ---- fakes ----------------------------------------------------------------------------------------------------------


@register_fake("dwconv_fwd")
def _dwconv_fwd(input, weight, bias, scale, shift, residual, geometry, slope):
    n, c, h, w = input.shape
    p, q = G.output_size(h, w, weight.shape[2], weight.shape[3], geometry)
    return fake_output(input, (n, c * geometry[G.MULTIPLIER], p, q), geometry)


@register_fake("dwconv_bwd")
def _dwconv_bwd(grad_output, output, input, weight, bias, scale, shift, residual, geometry, slope, mask):
    return fake_gradients((input, weight, bias, scale, shift, residual), 0b100001, geometry, mask)


@register_fake("dwconv_stats")
def _dwconv_stats(input, weight, bias, geometry):
    channels = input.shape[1] * geometry[G.MULTIPLIER]
    dtype = torch.float64 if input.dtype == torch.float64 else torch.float32
    mean = torch.empty(channels, dtype=dtype, device=input.device)
    return mean, torch.empty_like(mean)


@register_fake("dwconv_stats_bwd")
def _dwconv_stats_bwd(grad_mean, grad_var, mean, input, weight, bias, geometry, mask):
    return fake_gradients((input, weight, bias), 0b001, geometry, mask)


# ---- FLOPs: two a multiply-accumulate, as torch.utils.flop_counter counts torch's own convolutions -------------------


def depthwise_flops(input: Sequence[int], weight: Sequence[int], geometry: list[int]) -> int:
    """FLOPs of the depthwise convolution of these shapes."""
    n, c, h, w = input
    r, s = weight[2:]
    p, q = G.output_size(h, w, r, s, geometry)
    return 2 * n * c * geometry[G.MULTIPLIER] * p * q * r * s


@register_flop_formula(packets("dwconv_fwd"))
def _dwconv_fwd_flops(input, weight, bias, scale, shift, residual, geometry, slope, out_shape=None):
    return depthwise_flops(input, weight, geometry)


@register_flop_formula(packets("dwconv_stats"))
def _dwconv_stats_flops(input, weight, bias, geometry, out_shape=None):
    return depthwise_flops(input, weight, geometry)


# ---- autograd -------------------------------------------------------------------------------------------------------


class DepthwiseConv2dFunction(KernelFunction):
    """y = post_act(act(depthwise_conv2d(input, weight) + bias) * scale + shift + residual).

    Call it as `DepthwiseConv2dFunction.apply(input, weight, bias, scale, shift, residual, geometry, slope, backend)`.
    It checks nothing: `effops.functional.depthwise_conv2d` is the checked door to it.

    Args:
        input: [N,C,H,W].
        weight: [B,1,R,S]; output channel o uses kernel o mod B.
        bias, scale, shift: [K] with K = C * multiplier, or None.
        residual: [N,K,P,Q] or None.
        geometry: the 13 ints of `effops/schemas.inc`.
        slope: negative slope of leaky_relu.
        backend: name of the backend whose kernels run, forward and backward ("triton", "cuda", "cpp").

    Returns:
        [N,K,P,Q].

    Saved for backward are the inputs; the output where the activation's derivative can be read off it; never an
    intermediate. The gradient can be differentiated again (then through the reference).

    Raises:
        RuntimeError: under functorch transforms or forward-mode AD.

    Example:
        >>> x, weight = torch.randn(2, 8, 9, 9), torch.randn(8, 1, 3, 3, requires_grad=True)
        >>> geometry = [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0]  # stride 1, padding 1, dilation 1
        >>> apply = effops.autograd.DepthwiseConv2dFunction.apply
        >>> y = apply(x, weight, None, None, None, None, geometry, 0.0, "cpp")
        >>> y.sum().backward()
        >>> torch.allclose(y, F.conv2d(x, weight, padding=1, groups=8), atol=1e-5), weight.grad.shape
        (True, torch.Size([8, 1, 3, 3]))
    """

    @staticmethod
    def forward(ctx, input, weight, bias, scale, shift, residual, geometry, slope, backend="cpp"):
        kernels = kernels_of(KERNELS, backend, "DepthwiseConv2dFunction")
        output = kernels.forward(input, weight, bias, scale, shift, residual, geometry, slope)
        post = geometry[G.POST_ACTIVATION]
        saved = None
        if output_gives_gradient(geometry[G.ACTIVATION], slope, post, scale, shift, residual):
            saved = output
        # Without a post-activation the residual's gradient is the output's: it takes neither the residual nor a kernel.
        ctx.save_for_backward(input, weight, bias, scale, shift, residual if post else None, saved)
        ctx.static = (geometry, slope, kernels)
        return output

    @staticmethod
    def backward(ctx, grad_output):
        input, weight, bias, scale, shift, residual, output = ctx.saved_tensors
        geometry, slope, kernels = ctx.static
        needs = list(ctx.needs_input_grad[:6])
        pass_residual = needs[5] and not geometry[G.POST_ACTIVATION]
        if pass_residual:
            needs[5] = False
        tensors = (input, weight, bias, scale, shift, residual)
        if torch.is_grad_enabled():
            gradients = reference_gradients(_reference(geometry, slope), tensors, needs, (grad_output,))
        else:
            gradients = kernel_gradients(kernels.backward, (grad_output, output), tensors, (geometry, slope), needs)
        if pass_residual:
            gradients[5] = grad_output
        return (*gradients, None, None, None)


def _reference(geometry, slope):
    def run(input, weight, bias, scale, shift, residual):
        epilogue = Epilogue(bias, scale, shift, residual, geometry[G.ACTIVATION], geometry[G.POST_ACTIVATION], slope)
        return reference.dwconv(input, weight, geometry, epilogue)

    return run


_BITS = tuple(1 << bit for bit in range(32))  # of the masks: no operator takes more tensors


def kernel_gradients(
    kernel: Callable, head: tuple, tensors: tuple, statics: tuple, needs: Sequence[bool]
) -> list[Tensor | None]:
    """Calls a *_bwd operator with the mask of `needs` and puts the gradients it returns into their places."""
    mask = sum(compress(_BITS, needs))
    if not mask:
        return [None] * len(needs)
    found = iter(kernel(*head, *tensors, *statics, mask))
    return [next(found) if need else None for need in needs]


class DepthwiseStatsFunction(KernelFunction):
    """mean, var = batch statistics of u = depthwise_conv2d(input, weight) + bias, without storing u.

    Call it as `DepthwiseStatsFunction.apply(input, weight, bias, geometry, backend)`. It checks nothing:
    `effops.functional.depthwise_stats2d` is the checked door to it.

    Args:
        input, weight, bias, backend: as for `DepthwiseConv2dFunction`.
        geometry: as there, without activations.

    Returns:
        mean [K] and population variance [K] over N, P and Q: float64 for a float64 input, else float32.

    Backward: du = (grad_mean + 2 * grad_var * (u - mean)) / (N * P * Q), with u recomputed.

    Raises:
        RuntimeError: under functorch transforms or forward-mode AD.

    Example:
        >>> x, weight = torch.randn(2, 8, 9, 9), torch.randn(8, 1, 3, 3)
        >>> geometry = [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0]  # stride 1, padding 1, dilation 1
        >>> mean, var = effops.autograd.DepthwiseStatsFunction.apply(x, weight, None, geometry, "cpp")
        >>> torch.allclose(mean, F.conv2d(x, weight, padding=1, groups=8).mean((0, 2, 3)), atol=1e-5)
        True
    """

    @staticmethod
    def forward(ctx, input, weight, bias, geometry, backend="cpp"):
        kernels = kernels_of(STATS_KERNELS, backend, "DepthwiseStatsFunction")
        mean, var = kernels.forward(input, weight, bias, geometry)
        ctx.save_for_backward(input, weight, bias, mean)
        ctx.static = (geometry, kernels)
        return mean, var

    @staticmethod
    def backward(ctx, grad_mean, grad_var):
        input, weight, bias, mean = ctx.saved_tensors
        geometry, kernels = ctx.static
        needs = ctx.needs_input_grad[:3]
        tensors = (input, weight, bias)
        if torch.is_grad_enabled():

            def run(input, weight, bias):
                return reference.dwconv_stats(input, weight, bias, geometry)

            gradients = reference_gradients(run, tensors, needs, (grad_mean, grad_var))
        else:
            gradients = kernel_gradients(kernels.backward, (grad_mean, grad_var, mean), tensors, (geometry,), needs)
        return (*gradients, None, None)
