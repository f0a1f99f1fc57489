"""Max pool of stride 1 and a binomial blur with stride as one operator: fake and autograd.Function."""

from __future__ import annotations

import torch

from effops.ops import geometry as G
from effops.ops.blurmaxpool import reference
from effops.ops.higher_order import KernelFunction, reference_gradients
from effops.ops.registration import Kernels, cuda_kernels, kernels_of, register_fake, triton_kernels

_ops = torch.ops.effops

# A backend joins by adding its operators here (and its entry in effops/backends.py).
KERNELS = {
    "triton": triton_kernels("blurmaxpool", "blur_max_pool_fwd", "blur_max_pool_bwd"),
    "cuda": cuda_kernels("blur_max_pool_fwd", "blur_max_pool_bwd"),
    "cpp": Kernels(_ops.blur_max_pool_fwd.default, _ops.blur_max_pool_bwd.default),
}


def _empty(input, shape, geometry):
    memory_format = G.memory_format(geometry[reference.CHANNELS_LAST])
    return torch.empty(shape, dtype=input.dtype, device=input.device, memory_format=memory_format)


@register_fake("blur_max_pool_fwd")
def _blur_max_pool_fwd(input, geometry):
    n, c, h, w = input.shape
    return _empty(input, (n, c, *reference.output_size(h, w, geometry)), geometry)


@register_fake("blur_max_pool_bwd")
def _blur_max_pool_bwd(grad_output, input, geometry):
    return _empty(input, input.shape, geometry)


class BlurMaxPool2dFunction(KernelFunction):
    """y = blur(max_pool(input)): the max pool has stride 1, the binomial blur subsamples (arXiv 1904.11486).

    Call it as `BlurMaxPool2dFunction.apply(input, geometry, backend)`. It checks nothing:
    `effops.functional.blur_max_pool2d` is the checked door to it.

    Args:
        input: [N,C,H,W].
        geometry: the 9 ints of `effops/schemas.inc`.
        backend: name of the backend whose kernels run, forward and backward ("triton", "cuda", "cpp").

    Returns:
        [N,C,P,Q].

    Saved for backward is the input alone; the choices of the max pool are recomputed. The gradient can be
    differentiated again (then through the reference).

    Raises:
        RuntimeError: under functorch transforms or forward-mode AD.

    Example:
        >>> x = torch.randn(1, 8, 14, 14, requires_grad=True)
        >>> geometry = [2, 2, 3, 2, 2, 0, 0, 0, 0]  # blur 3x3 of stride 2 behind a 2x2 window
        >>> y = effops.autograd.BlurMaxPool2dFunction.apply(x, geometry, "cpp")
        >>> y.sum().backward()
        >>> torch.allclose(y, EF.blur_max_pool2d(x)), x.grad.shape
        (True, torch.Size([1, 8, 14, 14]))
    """

    @staticmethod
    def forward(ctx, input, geometry, backend="cpp"):
        kernels = kernels_of(KERNELS, backend, "BlurMaxPool2dFunction")
        ctx.save_for_backward(input)
        ctx.static = (geometry, kernels)
        return kernels.forward(input, geometry)

    @staticmethod
    def backward(ctx, grad_output):
        (input,) = ctx.saved_tensors
        geometry, kernels = ctx.static
        if torch.is_grad_enabled():

            def run(input):
                return reference.blur_max_pool(input, geometry)

            (gradient,) = reference_gradients(run, (input,), (True,), (grad_output,))
        else:
            gradient = kernels.backward(grad_output, input, geometry)
        return gradient, None, None
