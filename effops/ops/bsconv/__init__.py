"""Pointwise convolution(s), epilogue, depthwise convolution, epilogue as one operator: fake and autograd.Function."""

from __future__ import annotations

import torch
from torch.utils.flop_counter import register_flop_formula

from effops.ops import geometry as G
from effops.ops.bsconv import reference
from effops.ops.dwconv import kernel_gradients
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
    "triton": triton_kernels("bsconv", "bsconv_fwd", "bsconv_bwd"),
    "cuda": cuda_kernels("bsconv_fwd", "bsconv_bwd"),
    "cpp": Kernels(_ops.bsconv_fwd.default, _ops.bsconv_bwd.default),
}

# Positions among the 13 tensors of the operator.
_TENSORS, _RESIDUAL = 13, 12
_IMAGES = 1 | 1 << _RESIDUAL


@register_fake("bsconv_fwd")
def _bsconv_fwd(
    input, mid_weight, mid_scale, mid_shift, pw_weight, pw_bias, pw_scale, pw_shift,
    dw_weight, bias, scale, shift, residual, geometry, slopes,
):  # fmt: skip
    n, _, h, w = input.shape
    p, q = G.output_size(h, w, dw_weight.shape[2], dw_weight.shape[3], geometry)
    return fake_output(input, (n, dw_weight.shape[0], p, q), geometry)


@register_fake("bsconv_bwd")
def _bsconv_bwd(
    grad_output, output, input, mid_weight, mid_scale, mid_shift, pw_weight, pw_bias, pw_scale, pw_shift,
    dw_weight, bias, scale, shift, residual, geometry, slopes, mask,
):  # fmt: skip
    tensors = (
        input, mid_weight, mid_scale, mid_shift, pw_weight, pw_bias, pw_scale, pw_shift,
        dw_weight, bias, scale, shift, residual,
    )  # fmt: skip
    return fake_gradients(tensors, _IMAGES, geometry, mask)


@register_flop_formula(packets("bsconv_fwd"))
def _bsconv_fwd_flops(
    input, mid_weight, mid_scale, mid_shift, pw_weight, pw_bias, pw_scale, pw_shift,
    dw_weight, bias, scale, shift, residual, geometry, slopes, *, out_shape,
):  # fmt: skip
    n, _, h, w = input
    pointwise = n * h * w * (pw_weight[0] * pw_weight[1] + (mid_weight[0] * mid_weight[1] if mid_weight else 0))
    n, k, p, q = out_shape
    return 2 * (pointwise + n * k * p * q * dw_weight[2] * dw_weight[3])


class BSConv2dFunction(KernelFunction):
    """y = dw_chain(pw_chain(mid_chain(input))).

    mid_chain(x) = conv2d(x, mid_weight) * mid_scale + mid_shift (nothing where mid_weight is None),
    pw_chain(m) = pw_post_act(pw_act(conv2d(m, pw_weight) + pw_bias) * pw_scale + pw_shift) and
    dw_chain(z) = post_act(act(depthwise_conv2d(z, dw_weight) + bias) * scale + shift + residual). Call it as
    `BSConv2dFunction.apply(input, mid_weight, mid_scale, mid_shift, pw_weight, pw_bias, pw_scale, pw_shift, dw_weight,
    bias, scale, shift, residual, geometry, slopes, backend)`. It checks nothing: `effops.functional.bs_conv2d` is the
    checked door to it.

    Args:
        input: [N,C,H,W].
        mid_weight: [M,C,1,1] or None.
        mid_scale, mid_shift: [M] or None.
        pw_weight: [K,M,1,1], or [K,C,1,1] without mid_weight.
        pw_bias, pw_scale, pw_shift: [K] or None.
        dw_weight: [K,1,R,S].
        bias, scale, shift: [K] or None.
        residual: [N,K,P,Q] or None.
        geometry: the 14 ints of `effops/schemas.inc`.
        slopes: [pointwise slope, depthwise slope].
        backend: name of the backend whose kernels run, forward and backward ("triton", "cuda", "cpp").

    Returns:
        [N,K,P,Q].

    Saved for backward are the inputs, and the output where the last activation's derivative can be read off it; what
    stands between the convolutions is recomputed. The gradient can be differentiated again (then through the
    reference).

    Raises:
        RuntimeError: under functorch transforms or forward-mode AD.

    "Rethinking Depthwise Separable Convolutions" (arXiv 2003.13549), sections 3.3.1 and 3.3.2.

    Example:
        >>> x, pw, dw = torch.randn(2, 8, 9, 9), torch.randn(16, 8, 1, 1), torch.randn(16, 1, 3, 3)
        >>> geometry = [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0]  # stride 1, padding 1, dilation 1
        >>> tensors = (x, None, None, None, pw, None, None, None, dw, None, None, None, None)
        >>> y = effops.autograd.BSConv2dFunction.apply(*tensors, geometry, [0.0, 0.0], "cpp")
        >>> torch.allclose(y, EF.bs_conv2d(x, pw, dw, padding=1), atol=1e-4)
        True
    """

    @staticmethod
    def forward(
        ctx, input, mid_weight, mid_scale, mid_shift, pw_weight, pw_bias, pw_scale, pw_shift,
        dw_weight, bias, scale, shift, residual, geometry, slopes, backend="cpp",
    ):  # fmt: skip
        kernels = kernels_of(KERNELS, backend, "BSConv2dFunction")
        output = kernels.forward(
            input, mid_weight, mid_scale, mid_shift, pw_weight, pw_bias, pw_scale, pw_shift,
            dw_weight, bias, scale, shift, residual, geometry, slopes,
        )  # fmt: skip
        post = geometry[G.POST_ACTIVATION]
        saved = None
        if output_gives_gradient(geometry[G.ACTIVATION], slopes[1], post, scale, shift, residual):
            saved = output
        # Without a post-activation the residual's gradient is the output's: it takes neither the residual nor a kernel.
        ctx.save_for_backward(
            input, mid_weight, mid_scale, mid_shift, pw_weight, pw_bias, pw_scale, pw_shift,
            dw_weight, bias, scale, shift, residual if post else None, saved,
        )  # fmt: skip
        ctx.static = (geometry, slopes, kernels)
        return output

    @staticmethod
    def backward(ctx, grad_output):
        *tensors, output = ctx.saved_tensors
        geometry, slopes, kernels = ctx.static
        needs = list(ctx.needs_input_grad[:_TENSORS])
        pass_residual = needs[_RESIDUAL] and not geometry[G.POST_ACTIVATION]
        if pass_residual:
            needs[_RESIDUAL] = False
        if torch.is_grad_enabled():
            gradients = reference_gradients(_reference(geometry, slopes), tensors, needs, (grad_output,))
        else:
            gradients = kernel_gradients(kernels.backward, (grad_output, output), tensors, (geometry, slopes), needs)
        if pass_residual:
            gradients[_RESIDUAL] = grad_output
        return (*gradients, None, None, None)


def _reference(geometry, slopes):
    """The operator in plain torch, a function of its 13 tensors."""

    def run(
        input, mid_weight, mid_scale, mid_shift, pw_weight, pw_bias, pw_scale, pw_shift,
        dw_weight, bias, scale, shift, residual,
    ):  # fmt: skip
        return reference.bsconv(
            input,
            mid_weight,
            Epilogue(scale=mid_scale, shift=mid_shift),
            pw_weight,
            Epilogue(
                pw_bias, pw_scale, pw_shift, None, geometry[G.PW_ACTIVATION], geometry[G.PW_POST_ACTIVATION], slopes[0]
            ),
            dw_weight,
            Epilogue(bias, scale, shift, residual, geometry[G.ACTIVATION], geometry[G.POST_ACTIVATION], slopes[1]),
            geometry,
        )

    return run
