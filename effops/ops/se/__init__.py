"""Squeeze-excite as one operator: fake and autograd.Function."""

from __future__ import annotations

import torch
from torch.utils.flop_counter import register_flop_formula

from effops.ops import geometry as G
from effops.ops.dwconv import kernel_gradients
from effops.ops.higher_order import KernelFunction, reference_gradients
from effops.ops.registration import (
    Kernels,
    cuda_kernels,
    fake_gradients,
    kernels_of,
    packets,
    register_fake,
    triton_kernels,
)
from effops.ops.se import reference

_ops = torch.ops.effops

# A backend joins by adding its operators here (and its entry in effops/backends.py).
KERNELS = {
    "triton": triton_kernels("se", "se_fwd", "se_bwd"),
    "cuda": cuda_kernels("se_fwd", "se_bwd"),
    "cpp": Kernels(_ops.se_fwd.default, _ops.se_bwd.default),
}

# Positions in the geometry (schemas.inc).
CHANNELS_LAST, ACTIVATION, GATE = range(3)


def _formatted(geometry: list[int]) -> list[int]:
    """A geometry whose memory format stands where `fake_gradients` looks for it."""
    return [0] * G.CHANNELS_LAST + [geometry[CHANNELS_LAST]]


@register_fake("se_fwd")
def _se_fwd(input, reduce_weight, reduce_bias, expand_weight, expand_bias, sums, geometry):
    return torch.empty(
        input.shape,
        dtype=input.dtype,
        device=input.device,
        memory_format=G.memory_format(geometry[CHANNELS_LAST]),
    )


@register_fake("se_bwd")
def _se_bwd(grad_output, input, reduce_weight, reduce_bias, expand_weight, expand_bias, geometry, mask):
    tensors = (input, reduce_weight, reduce_bias, expand_weight, expand_bias)
    return fake_gradients(tensors, 1, _formatted(geometry), mask)


@register_flop_formula(packets("se_fwd"))
def _se_fwd_flops(input, reduce_weight, reduce_bias, expand_weight, expand_bias, sums, geometry, *, out_shape):
    return 4 * input[0] * reduce_weight[0] * reduce_weight[1]  # the two products, as for convolutions


class SqueezeExcite2dFunction(KernelFunction):
    """y = input * gate(W2 activation(W1 mean(input) + b1) + b2), mean over H and W.

    Call it as `SqueezeExcite2dFunction.apply(input, reduce_weight, reduce_bias, expand_weight, expand_bias, sums,
    geometry, backend)`. It checks nothing: `effops.functional.squeeze_excite2d` is the checked door to it.

    Args:
        input: [N,C,H,W].
        reduce_weight, reduce_bias: W1 [Cr,C,1,1], b1 [Cr] or None.
        expand_weight, expand_bias: W2 [C,Cr,1,1], b2 [C] or None.
        sums: those of the input over H and W, [N,C] in at least float32, where its producer took them, or None; a
            value that is known already, not differentiated: the gradient by way of the means goes to the input.
        geometry: the 3 ints of `effops/schemas.inc`.
        backend: name of the backend whose kernels run, forward and backward ("triton", "cuda", "cpp").

    Returns:
        [N,C,H,W].

    Saved for backward are the inputs alone; the means are taken again. The gradient can be differentiated again (then
    through the reference).

    Raises:
        RuntimeError: under functorch transforms or forward-mode AD.

    Example:
        >>> x, w1, w2 = torch.randn(2, 16, 9, 9), torch.randn(4, 16, 1, 1), torch.randn(16, 4, 1, 1)
        >>> geometry = [0, 1, 7]  # contiguous, ReLU between the products, sigmoid
        >>> y = effops.autograd.SqueezeExcite2dFunction.apply(x, w1, None, w2, None, None, geometry, "cpp")
        >>> torch.allclose(y, EF.squeeze_excite2d(x, w1, None, w2, None), atol=1e-5)
        True
    """

    @staticmethod
    def forward(ctx, input, reduce_weight, reduce_bias, expand_weight, expand_bias, sums, geometry, backend="cpp"):
        kernels = kernels_of(KERNELS, backend, "SqueezeExcite2dFunction")
        tensors = (input, reduce_weight, reduce_bias, expand_weight, expand_bias)
        ctx.save_for_backward(*tensors)
        ctx.static = (geometry, kernels)
        return kernels.forward(*tensors, sums, geometry)

    @staticmethod
    def backward(ctx, grad_output):
        tensors = ctx.saved_tensors
        geometry, kernels = ctx.static
        needs = ctx.needs_input_grad[:5]
        if torch.is_grad_enabled():
            gradients = reference_gradients(_reference(geometry), tensors, needs, (grad_output,))
        else:
            gradients = kernel_gradients(kernels.backward, (grad_output,), tensors, (geometry,), needs)
        return (*gradients, None, None, None)


def _reference(geometry):
    """The operator in plain torch, a function of its 5 tensors."""

    def run(input, *weights):
        excitation = reference.Excitation(*weights, geometry[ACTIVATION], geometry[GATE])
        return reference.squeeze_excite(input, excitation, geometry[CHANNELS_LAST])

    return run
