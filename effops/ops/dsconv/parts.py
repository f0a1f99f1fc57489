"""Several depthwise windows side by side, then one pointwise convolution, as one operator: fake and autograd.Function.

The parts are Multiception's kernel sizes (each over all channels) or MixConv's (each over its own channels).
"""

from __future__ import annotations

import torch
from torch.utils.flop_counter import register_flop_formula

from effops.ops import geometry as G
from effops.ops.dsconv import reference
from effops.ops.dwconv import depthwise_flops
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
PARTS_KERNELS = {
    "triton": triton_kernels("dsconv", "dsconv_parts_fwd", "dsconv_parts_bwd", "triton_parts"),
    "cuda": cuda_kernels("dsconv_parts_fwd", "dsconv_parts_bwd"),
    "cpp": Kernels(_ops.dsconv_parts_fwd.default, _ops.dsconv_parts_bwd.default),
}

# Positions in the schema; in DSConvParts2dFunction the weights come last, behind the arguments that are no tensors.
_WEIGHTS, _TENSORS = 1, 10
_STATICS = 3


@register_fake("dsconv_parts_fwd")
def _parts_fwd(
    input, dw_weights, dw_bias, dw_scale, dw_shift, pw_weight, bias, scale, shift, residual, geometry, slopes
):  # fmt: skip
    n, _, h, w = input.shape
    p, q = G.output_size(h, w, dw_weights[0].shape[2], dw_weights[0].shape[3], geometry)
    return fake_output(input, (n, pw_weight.shape[0], p, q), geometry)


@register_fake("dsconv_parts_bwd")
def _parts_bwd(
    grad_output, output, input, dw_weights, dw_bias, dw_scale, dw_shift, pw_weight, bias, scale, shift, residual,
    geometry, slopes, mask,
):  # fmt: skip
    tensors = (input, *dw_weights, dw_bias, dw_scale, dw_shift, pw_weight, bias, scale, shift, residual)
    count = len(dw_weights)
    behind = mask >> (_WEIGHTS + 1)
    of_weights = (1 << count) - 1 if mask >> _WEIGHTS & 1 else 0
    flat_mask = mask & 1 | of_weights << _WEIGHTS | behind << (_WEIGHTS + count)
    return fake_gradients(tensors, 1 | 1 << (len(tensors) - 1), geometry, flat_mask)


@register_flop_formula(packets("dsconv_parts_fwd"))
def _parts_fwd_flops(
    input, dw_weights, dw_bias, dw_scale, dw_shift, pw_weight, bias, scale, shift, residual, geometry, slopes,
    *, out_shape,
):  # fmt: skip
    n, _, h, w = input
    depthwise = sum(
        depthwise_flops((n, weight[0], h, w), weight, G.part_geometry(geometry, part))
        for part, weight in enumerate(dw_weights)
    )
    n, _, p, q = out_shape
    return depthwise + 2 * n * pw_weight[0] * pw_weight[1] * p * q


class DSConvParts2dFunction(KernelFunction):
    """z = cat of the parts' dw_chain;  y = pw_chain(z). The concatenation is never stored.

    dw_chain(x) = dw_post_act(dw_act(depthwise_conv2d(x, dw_weight) + dw_bias) * dw_scale + dw_shift) and pw_chain(z) =
    post_act(act(conv2d(z, pw_weight) + bias) * scale + shift + residual). Call it as
    `DSConvParts2dFunction.apply(input, dw_bias, dw_scale, dw_shift, pw_weight, bias, scale, shift, residual, geometry,
    slopes, backend, *dw_weights)`. It checks nothing: `effops.functional.multiception_conv2d` and `mix_conv2d` are the
    checked doors to it.

    Args:
        input: [N,C,H,W].
        dw_bias, dw_scale, dw_shift: [D] or None, D the sum of the parts' channels, in the order of the parts.
        pw_weight: [K,D,1,1].
        bias, scale, shift: [K] or None.
        residual: [N,K,P,Q] or None.
        geometry: the ints of `effops/schemas.inc`.
        slopes: [depthwise slope, pointwise slope].
        backend: name of the backend whose kernels run, forward and backward.
        dw_weights: [C,1,R,S] each; with `split` in the geometry [Ci,1,R,S], the Ci adding up to C.

    Returns:
        [N,K,P,Q].

    Saved for backward are the inputs, and the output where the pointwise activation's derivative can be read off it;
    z is recomputed. The gradient can be differentiated again (then through the reference).

    Raises:
        RuntimeError: under functorch transforms or forward-mode AD.

    Multiception (Bao, Graeber and Wang, "Depthwise Multiception Convolution for Reducing Network Parameters without
    Sacrificing Accuracy", section III); MixConv (arXiv 1907.09595).

    Example:
        >>> x, pw = torch.randn(2, 8, 9, 9), torch.randn(16, 16, 1, 1)
        >>> dws = [torch.randn(8, 1, 3, 3), torch.randn(8, 1, 5, 5)]
        >>> geometry = [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 2, 2, 2, 2]  # paddings 1 and 2
        >>> tensors = (x, None, None, None, pw, None, None, None, None)
        >>> y = effops.autograd.DSConvParts2dFunction.apply(*tensors, geometry, [0.0, 0.0], "cpp", *dws)
        >>> torch.allclose(y, EF.multiception_conv2d(x, dws, pw), atol=1e-4)
        True
    """

    @staticmethod
    def forward(
        ctx, input, dw_bias, dw_scale, dw_shift, pw_weight, bias, scale, shift, residual, geometry, slopes, backend,
        *dw_weights,
    ):  # fmt: skip
        kernels = kernels_of(PARTS_KERNELS, backend, "DSConvParts2dFunction")
        output = kernels.forward(
            input, dw_weights, dw_bias, dw_scale, dw_shift, pw_weight, bias, scale, shift, residual, geometry, slopes
        )
        post = geometry[G.PW_POST_ACTIVATION]
        saved = None
        if output_gives_gradient(geometry[G.PW_ACTIVATION], slopes[1], post, scale, shift, residual):
            saved = output
        # Without a post-activation the residual's gradient is the output's: it takes neither the residual nor a kernel.
        ctx.save_for_backward(
            input, dw_bias, dw_scale, dw_shift, pw_weight, bias, scale, shift, residual if post else None,
            *dw_weights, saved,
        )  # fmt: skip
        ctx.static = (geometry, slopes, kernels)
        return output

    @staticmethod
    def backward(ctx, grad_output):
        *tensors, output = ctx.saved_tensors
        geometry, slopes, kernels = ctx.static
        others = _TENSORS - 1
        needs = [*ctx.needs_input_grad[:others], *ctx.needs_input_grad[others + _STATICS :]]
        pass_residual = needs[others - 1] and not geometry[G.PW_POST_ACTIVATION]
        if pass_residual:
            needs[others - 1] = False
        if torch.is_grad_enabled():
            gradients = reference_gradients(_reference(geometry, slopes), tensors, needs, (grad_output,))
        else:
            gradients = _kernel_gradients(kernels.backward, (grad_output, output), tensors, (geometry, slopes), needs)
        if pass_residual:
            gradients[others - 1] = grad_output
        return (*gradients[:others], *[None] * _STATICS, *gradients[others:])


def _kernel_gradients(kernel, head, tensors, statics, needs):
    """The gradients in `needs`, in the order of the Function's tensors: the kernel's, with the weights moved back."""
    others, weights = tensors[: _TENSORS - 1], tensors[_TENSORS - 1 :]
    of_others, of_weights = needs[: _TENSORS - 1], needs[_TENSORS - 1 :]
    in_order = [of_others[0], any(of_weights), *of_others[1:]]
    mask = sum(1 << bit for bit, need in enumerate(in_order) if need)
    if not mask:
        return [None] * len(needs)
    found = iter(kernel(*head, others[0], weights, *others[1:], *statics, mask))
    first = next(found) if of_others[0] else None
    found_weights = [next(found) for _ in weights] if any(of_weights) else [None] * len(weights)
    rest = [next(found) if need else None for need in of_others[1:]]
    return [first, *rest, *(g if need else None for g, need in zip(found_weights, of_weights, strict=True))]


def _reference(geometry, slopes):
    """The operator in plain torch, a function of the Function's tensors."""

    def run(input, dw_bias, dw_scale, dw_shift, pw_weight, bias, scale, shift, residual, *dw_weights):
        dw_epilogue = Epilogue(
            dw_bias, dw_scale, dw_shift, None, geometry[G.ACTIVATION], geometry[G.POST_ACTIVATION], slopes[0]
        )
        epilogue = Epilogue(
            bias, scale, shift, residual, geometry[G.PW_ACTIVATION], geometry[G.PW_POST_ACTIVATION], slopes[1]
        )
        return reference.dsconv_parts(input, dw_weights, dw_epilogue, pw_weight, epilogue, geometry)

    return run
