"""Inverted residual, 1x1 -> depthwise [-> squeeze-excite] -> 1x1, as one operator: fake and autograd.Function."""

from __future__ import annotations

import torch
from torch.utils.flop_counter import register_flop_formula

from effops.ops import geometry as G
from effops.ops.dwconv import depthwise_flops, kernel_gradients
from effops.ops.epilogue import Epilogue
from effops.ops.higher_order import KernelFunction, reference_gradients
from effops.ops.mbconv import reference
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
from effops.ops.se.reference import Excitation

_ops = torch.ops.effops

# A backend joins by adding its operators here (and its entry in effops/backends.py).
KERNELS = {
    "triton": triton_kernels("mbconv", "mbconv_fwd", "mbconv_bwd"),
    "cuda": cuda_kernels("mbconv_fwd", "mbconv_bwd"),
    "cpp": Kernels(_ops.mbconv_fwd.default, _ops.mbconv_bwd.default),
}

# Positions in the geometry behind those of the depthwise convolution (schemas.inc).
ACTIVATION, POST_ACTIVATION, EXPAND_ACTIVATION, EXPAND_POST_ACTIVATION, SE_ACTIVATION, SE_GATE = range(12, 18)

# Positions among the 18 tensors of the operator.
TENSORS, _RESIDUAL = 18, 17
_IMAGES = 1 | 1 << _RESIDUAL


@register_fake("mbconv_fwd")
def _mbconv_fwd(
    input, expand_weight, expand_bias, expand_scale, expand_shift, dw_weight, dw_bias, dw_scale, dw_shift,
    se_reduce_weight, se_reduce_bias, se_expand_weight, se_expand_bias,
    project_weight, bias, scale, shift, residual, geometry, slopes,
):  # fmt: skip
    n, _, h, w = input.shape
    p, q = G.output_size(h, w, dw_weight.shape[2], dw_weight.shape[3], geometry)
    return fake_output(input, (n, project_weight.shape[0], p, q), geometry)


@register_fake("mbconv_bwd")
def _mbconv_bwd(
    grad_output, input, expand_weight, expand_bias, expand_scale, expand_shift, dw_weight, dw_bias, dw_scale, dw_shift,
    se_reduce_weight, se_reduce_bias, se_expand_weight, se_expand_bias,
    project_weight, bias, scale, shift, residual, geometry, slopes, mask,
):  # fmt: skip
    tensors = (
        input, expand_weight, expand_bias, expand_scale, expand_shift, dw_weight, dw_bias, dw_scale, dw_shift,
        se_reduce_weight, se_reduce_bias, se_expand_weight, se_expand_bias,
        project_weight, bias, scale, shift, residual,
    )  # fmt: skip
    return fake_gradients(tensors, _IMAGES, geometry, mask)


@register_flop_formula(packets("mbconv_fwd"))
def _mbconv_fwd_flops(
    input, expand_weight, expand_bias, expand_scale, expand_shift, dw_weight, dw_bias, dw_scale, dw_shift,
    se_reduce_weight, se_reduce_bias, se_expand_weight, se_expand_bias,
    project_weight, bias, scale, shift, residual, geometry, slopes, *, out_shape,
):  # fmt: skip
    n, k, p, q = out_shape
    hidden, channels = project_weight[1], input[1]
    expansion = 0 if expand_weight is None else 2 * n * channels * hidden * input[2] * input[3]
    excitation = 0 if se_reduce_weight is None else 4 * n * hidden * se_reduce_weight[0]
    depthwise = depthwise_flops([n, hidden, *input[2:]], dw_weight, geometry)
    return expansion + depthwise + excitation + 2 * n * hidden * k * p * q


class InvertedResidual2dFunction(KernelFunction):
    """y = project_chain(excite(dw_chain(expand_chain(input)))).

    expand_chain(x) = post_act(act(conv2d(x, expand_weight) + expand_bias) * expand_scale + expand_shift), dw_chain and
    project_chain likewise, the latter with a residual before its post-activation; excite(z) = z * gate(W2 act(W1
    mean(z) + b1) + b2). Call it as `InvertedResidual2dFunction.apply(input, expand_weight, expand_bias, expand_scale,
    expand_shift, dw_weight, dw_bias, dw_scale, dw_shift, se_reduce_weight, se_reduce_bias, se_expand_weight,
    se_expand_bias, project_weight, bias, scale, shift, residual, geometry, slopes, backend)`. It checks nothing:
    `effops.functional.inverted_residual2d` is the checked door to it.

    Args:
        input: [N,C,H,W].
        expand_weight: [D,C,1,1], or None: there is no expansion, D = C.
        expand_bias, expand_scale, expand_shift: [D] or None.
        dw_weight: [D,1,R,S].
        dw_bias, dw_scale, dw_shift: [D] or None.
        se_reduce_weight, se_reduce_bias: W1 [Dr,D,1,1], b1 [Dr] or None; None both: there is no squeeze-excite.
        se_expand_weight, se_expand_bias: W2 [D,Dr,1,1], b2 [D] or None.
        project_weight: [K,D,1,1].
        bias, scale, shift: [K] or None.
        residual: [N,K,P,Q] or None.
        geometry: the 19 ints of `effops/schemas.inc`.
        slopes: [expansion's, depthwise's, projection's].
        backend: name of the backend whose kernels run, forward and backward ("triton", "cuda", "cpp").

    Returns:
        [N,K,P,Q].

    Saved for backward are the inputs alone: the expanded and the depthwise result are computed again. The gradient can
    be differentiated again (then through the reference).

    Raises:
        RuntimeError: under functorch transforms or forward-mode AD.

    Example:
        >>> x, expand = torch.randn(2, 8, 9, 9), torch.randn(48, 8, 1, 1)
        >>> dw, project = torch.randn(48, 1, 3, 3), torch.randn(8, 48, 1, 1)
        >>> geometry = [1, 1, 1, 1, 1, 1, 1, 1, 1, *[0] * 10]  # stride 1, padding 1, dilation 1, no activations
        >>> none = (None,) * 3
        >>> tensors = (x, expand, *none, dw, *none, *none, None, project, *none, None)
        >>> y = effops.autograd.InvertedResidual2dFunction.apply(*tensors, geometry, [0.0] * 3, "cpp")
        >>> torch.allclose(y, EF.inverted_residual2d(x, expand, dw, project, padding=1), atol=1e-3)
        True
    """

    @staticmethod
    def forward(ctx, *args):
        *tensors, geometry, slopes, backend = args
        kernels = kernels_of(KERNELS, backend, "InvertedResidual2dFunction")
        output = kernels.forward(*tensors, geometry, slopes)
        # Without a post-activation the residual's gradient is the output's: it takes neither the residual nor a kernel.
        if not geometry[POST_ACTIVATION]:
            tensors[_RESIDUAL] = None
        ctx.save_for_backward(*tensors)
        ctx.static = (geometry, slopes, kernels)
        return output

    @staticmethod
    def backward(ctx, grad_output):
        tensors = ctx.saved_tensors
        geometry, slopes, kernels = ctx.static
        needs = list(ctx.needs_input_grad[:TENSORS])
        pass_residual = needs[_RESIDUAL] and not geometry[POST_ACTIVATION]
        if pass_residual:
            needs[_RESIDUAL] = False
        if torch.is_grad_enabled():
            gradients = reference_gradients(_reference(geometry, slopes), tensors, needs, (grad_output,))
        else:
            gradients = kernel_gradients(kernels.backward, (grad_output,), tensors, (geometry, slopes), needs)
        if pass_residual:
            gradients[_RESIDUAL] = grad_output
        return (*gradients, None, None, None)


def run_reference(tensors, geometry, slopes):
    """The operator in plain torch, on its 18 tensors."""
    (
        input, expand_weight, expand_bias, expand_scale, expand_shift, dw_weight, dw_bias, dw_scale, dw_shift,
        se_reduce_weight, se_reduce_bias, se_expand_weight, se_expand_bias,
        project_weight, bias, scale, shift, residual,
    ) = tensors  # fmt: skip
    codes = geometry[EXPAND_ACTIVATION], geometry[EXPAND_POST_ACTIVATION]
    expand_epilogue = Epilogue(expand_bias, expand_scale, expand_shift, None, *codes, slopes[0])
    codes = geometry[G.ACTIVATION], geometry[G.POST_ACTIVATION]
    dw_epilogue = Epilogue(dw_bias, dw_scale, dw_shift, None, *codes, slopes[1])
    codes = geometry[ACTIVATION], geometry[POST_ACTIVATION]
    epilogue = Epilogue(bias, scale, shift, residual, *codes, slopes[2])
    excitation = None
    if se_reduce_weight is not None:
        weights = (se_reduce_weight, se_reduce_bias, se_expand_weight, se_expand_bias)
        excitation = Excitation(*weights, geometry[SE_ACTIVATION], geometry[SE_GATE])
    return reference.mbconv(
        input, expand_weight, expand_epilogue, dw_weight, dw_epilogue, excitation, project_weight, epilogue, geometry
    )


def _reference(geometry, slopes):
    return lambda *tensors: run_reference(tensors, geometry, slopes)
