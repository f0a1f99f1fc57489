"""Row convolution, max pool, column convolution, max pool as one operator: fake and autograd.Function."""

from __future__ import annotations

import torch
from torch.utils.flop_counter import register_flop_formula

from effops.ops import geometry as G
from effops.ops.dwconv import depthwise_flops, kernel_gradients
from effops.ops.epilogue import Epilogue
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
from effops.ops.sepconv import reference
from effops.ops.sepconv.reference import COL_ACTIVATION, COL_POST_ACTIVATION, POOL, POOL_COL, POOL_ROW

_ops = torch.ops.effops

# A backend joins by adding its operators here (and its entry in effops/backends.py).
KERNELS = {
    "triton": triton_kernels("sepconv", "sepconv_fwd", "sepconv_bwd"),
    "cuda": cuda_kernels("sepconv_fwd", "sepconv_bwd"),
    "cpp": Kernels(_ops.sepconv_fwd.default, _ops.sepconv_bwd.default),
}

_TENSORS = 9  # of the forward operator


GEOMETRY = 15  # ints of the geometry


def _between(input, row_weight, geometry) -> tuple[int, int, int, int]:
    """Shape of what the column convolution reads; from shapes, as the others here."""
    n, c, h, w = input
    h, w = G.output_size(h, w, 1, row_weight[3], reference.row_geometry(geometry))
    return n, c * geometry[G.MULTIPLIER], h, w // 2 if geometry[POOL] & POOL_ROW else w


def output_shape(input, row_weight, col_weight, geometry) -> tuple[int, int, int, int]:
    """[N,D,P,Q]."""
    n, d, h, w = _between(input, row_weight, geometry)
    p, q = G.output_size(h, w, col_weight[2], 1, reference.col_geometry(geometry))
    return n, d, p // 2 if geometry[POOL] & POOL_COL else p, q


def flops(input, row_weight, col_weight, geometry) -> int:
    """Two for each product."""
    between = _between(input, row_weight, geometry)
    row = depthwise_flops(input, row_weight, reference.row_geometry(geometry))
    return row + depthwise_flops(between, col_weight, reference.col_geometry(geometry))


@register_fake("sepconv_fwd")
def _sepconv_fwd(
    input, row_weight, row_bias, row_scale, row_shift, col_weight, bias, scale, shift, geometry, slopes,
):  # fmt: skip
    return fake_output(input, output_shape(input.shape, row_weight.shape, col_weight.shape, geometry), geometry)


@register_fake("sepconv_bwd")
def _sepconv_bwd(
    grad_output, input, row_weight, row_bias, row_scale, row_shift, col_weight, bias, scale, shift, geometry, slopes,
    mask,
):  # fmt: skip
    tensors = (input, row_weight, row_bias, row_scale, row_shift, col_weight, bias, scale, shift)
    return fake_gradients(tensors, 0b1, geometry, mask)


@register_flop_formula(packets("sepconv_fwd"))
def _sepconv_fwd_flops(
    input, row_weight, row_bias, row_scale, row_shift, col_weight, bias, scale, shift, geometry, slopes,
    out_shape=None,
):  # fmt: skip
    return flops(input, row_weight, col_weight, geometry)


class SeparableConvPool2dFunction(KernelFunction):
    """y = pool2x1(col_chain(pool1x2(row_chain(input)))), EffNet's separable convolution (arXiv 1801.06434, 4.2).

    row_chain(x) = row_post_act(row_act(conv1xS(x, row_weight) + row_bias) * row_scale + row_shift) and
    col_chain(z) = post_act(act(convRx1(z, col_weight) + bias) * scale + shift), both convolutions depthwise, both pools
    optional. Call it as `SeparableConvPool2dFunction.apply(input, row_weight, row_bias, row_scale, row_shift,
    col_weight, bias, scale, shift, geometry, slopes, backend)`. It checks nothing:
    `effops.functional.separable_conv_pool2d` is the checked door to it.

    Args:
        input: [N,C,H,W].
        row_weight: [D,1,1,S], D = C * multiplier.
        col_weight: [D,1,R,1].
        row_bias, row_scale, row_shift, bias, scale, shift: [D] or None.
        geometry: the 15 ints of `effops/schemas.inc`.
        slopes: [row slope, column slope].
        backend: name of the backend whose kernels run, forward and backward ("triton", "cuda", "cpp").

    Returns:
        [N,D,P,Q].

    Saved for backward are the inputs alone; both results and the pools' choices are recomputed. The gradient can be
    differentiated again (then through the reference).

    Raises:
        RuntimeError: under functorch transforms or forward-mode AD.

    Example:
        >>> x, row, col = torch.randn(2, 8, 16, 16), torch.randn(8, 1, 1, 3), torch.randn(8, 1, 3, 1)
        >>> geometry = [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 1]  # stride 1, padding 1, pool "row"
        >>> tensors = (x, row, None, None, None, col, None, None, None)
        >>> y = effops.autograd.SeparableConvPool2dFunction.apply(*tensors, geometry, [0.0, 0.0], "cpp")
        >>> torch.allclose(y, EF.separable_conv_pool2d(x, row, col), atol=1e-5)
        True
    """

    @staticmethod
    def forward(
        ctx, input, row_weight, row_bias, row_scale, row_shift, col_weight, bias, scale, shift, geometry, slopes,
        backend="cpp",
    ):  # fmt: skip
        kernels = kernels_of(KERNELS, backend, "SeparableConvPool2dFunction")
        tensors = (input, row_weight, row_bias, row_scale, row_shift, col_weight, bias, scale, shift)
        ctx.save_for_backward(*tensors)
        ctx.static = (geometry, slopes, kernels)
        return kernels.forward(*tensors, geometry, slopes)

    @staticmethod
    def backward(ctx, grad_output):
        tensors = ctx.saved_tensors
        geometry, slopes, kernels = ctx.static
        needs = ctx.needs_input_grad[:_TENSORS]
        if torch.is_grad_enabled():
            gradients = reference_gradients(_reference(geometry, slopes), tensors, needs, (grad_output,))
        else:
            gradients = kernel_gradients(kernels.backward, (grad_output,), tensors, (geometry, slopes), needs)
        return (*gradients, None, None, None)


def epilogues(row: tuple, col: tuple, geometry: list[int], slopes: list[float]) -> tuple[Epilogue, Epilogue]:
    """The epilogues of both convolutions from their (bias, scale, shift)."""
    return (
        Epilogue(*row, None, geometry[G.ACTIVATION], geometry[G.POST_ACTIVATION], slopes[0]),
        Epilogue(*col, None, geometry[COL_ACTIVATION], geometry[COL_POST_ACTIVATION], slopes[1]),
    )


def _reference(geometry, slopes):
    def run(input, row_weight, row_bias, row_scale, row_shift, col_weight, bias, scale, shift):
        row, col = epilogues((row_bias, row_scale, row_shift), (bias, scale, shift), geometry, slopes)
        return reference.sepconv(input, row_weight, row, col_weight, col, geometry)

    return run
