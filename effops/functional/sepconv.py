"""Separable convolution with pooling between its halves (room sepconv)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from effops import _checks as check
from effops import backends
from effops._checks import Ints, Padding, Shape
from effops.functional._gradients import run_kernels
from effops.ops import geometry as G
from effops.ops import sepconv as _sepconv
from effops.ops.sepconv.reference import sepconv as _sepconv_reference

_VECTORS = ("row_bias", "row_scale", "row_shift", "col_bias", "scale", "shift")
_ACTIVATIONS = ("row_activation", "row_post_activation", "activation", "post_activation")
POOLS = {"none": 0, "row": _sepconv.POOL_ROW, "both": _sepconv.POOL_ROW | _sepconv.POOL_COL}


class SeparablePoolPlan(NamedTuple):
    """A call as its shapes and settings determine it: the operator's int[] and the output's shape."""

    geometry: list[int]
    shape: Shape


def pool_plan(
    op: str,
    input: Shape,
    row_weight: Shape,
    col_weight: Shape,
    pool: str,
    stride: Ints,
    padding: Padding,
    dilation: Ints,
    strides: Shape,
    row_activations: tuple[str, str],
    activations: tuple[str, str],
) -> SeparablePoolPlan:
    """Checks shapes and settings; the two convolutions are planned one after the other.

    Raises:
        TypeError: a pool or an activation that is no string.
        ValueError: what does not fit.
    """
    check.require_rank(op, "row_weight", row_weight, "[D,1,1,S]")
    check.require_rank(op, "col_weight", col_weight, "[D,1,R,1]")
    if row_weight[2] != 1:
        raise ValueError(f"{op}: row_weight must be [D,1,1,S], one row a kernel; got {check.shape_text(row_weight)}")
    if col_weight[3] != 1:
        raise ValueError(f"{op}: col_weight must be [D,1,R,1], one column a kernel; got {check.shape_text(col_weight)}")
    if not isinstance(pool, str):
        raise TypeError(f"{op}: pool must be a string; got {pool!r}; accepted: {', '.join(POOLS)}")
    if pool not in POOLS:
        raise ValueError(f"{op}: unknown pool {pool!r}; accepted: {', '.join(POOLS)}")
    code = POOLS[pool]
    try:
        (sh, sw, top, bottom, left, right, dh, dw), _, _ = G.window(
            col_weight[2], row_weight[3], stride, padding, dilation
        )
    except ValueError as error:
        raise ValueError(f"{op}: {error}") from None

    codes = [
        check.activation_code(op, name, activation)
        for name, activation in zip(_ACTIVATIONS, (*row_activations, *activations), strict=True)
    ]
    row, (n, d, h, w) = check.depthwise_plan(
        op, "row_weight", input, row_weight, 1, 0, 1, (1, sw), (left, right, 0, 0), (1, dw), strides, "none", "none"
    )
    w = _pooled(op, "width", w) if code & _sepconv.POOL_ROW else w
    if col_weight[0] != d:
        raise ValueError(
            f"{op}: col_weight has {col_weight[0]} kernels but the row convolution gives {d} channels; "
            f"accepted: [{d},1,R,1]"
        )
    _, (n, d, p, q) = check.depthwise_plan(
        op, "col_weight", (n, d, h, w), col_weight, 1, 0, 1, (sh, 1), (0, 0, top, bottom), (dh, 1), strides,
        "none", "none",
    )  # fmt: skip
    p = _pooled(op, "height", p) if code & _sepconv.POOL_COL else p
    window = [sh, sw, top, bottom, left, right, dh, dw]
    return SeparablePoolPlan([*window, *row[8:10], *codes, code], (n, d, p, q))


def _pooled(op: str, what: str, size: int) -> int:
    if size < 2:
        raise ValueError(f"{op}: the pool halves a {what} of {size}; accepted: at least 2")
    return size // 2


_plan = check.cached(pool_plan)


def separable_conv_pool2d(
    input: Tensor,
    row_weight: Tensor,
    col_weight: Tensor,
    row_bias: Tensor | None = None,
    col_bias: Tensor | None = None,
    *,
    pool: str = "row",
    stride: Ints = 1,
    padding: Padding = "same",
    dilation: Ints = 1,
    row_activation: str = "none",
    row_negative_slope: float = 0.01,
    row_scale: Tensor | None = None,
    row_shift: Tensor | None = None,
    row_post_activation: str = "none",
    activation: str = "none",
    negative_slope: float = 0.01,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    post_activation: str = "none",
    backend: str = "auto",
) -> Tensor:
    """y = pool2x1(col_chain(pool1x2(row_chain(input)))), EffNet's separable convolution as one kernel.

        row_chain(x) = row_post_act(row_act(conv1xS(x, row_weight) + row_bias) * row_scale + row_shift)
        col_chain(z) = post_act(act(convRx1(z, col_weight) + col_bias) * scale + shift)

    Both convolutions are depthwise. The pools, each optional, are max pools of two elements with stride 2 that drop an
    odd last one, as `F.max_pool2d` does; what comes before and between them is never stored.

    Args:
        input: [N,C,H,W]; any strides; N may be 0.
        row_weight: [D,1,1,S], D a multiple of C (the depth multiplier is D / C); the input's dtype.
        col_weight: [D,1,R,1].
        row_bias, col_bias: [D], or None.
        pool: "row" halves the width between the convolutions, "both" the height behind them as well, "none" nothing.
        stride, padding, dilation: as `depthwise_conv2d`, of an RxS window: the row convolution has their horizontal
            part, the column convolution the vertical one.
        row_activation, row_negative_slope, row_scale, row_shift, row_post_activation: the row convolution's epilogue.
        activation, negative_slope, scale, shift, post_activation: the column convolution's epilogue.
        backend: "auto" or a backend's name.

    Returns:
        [N,D,P,Q] of the input's dtype, channels_last where the input's strides are.

    Raises:
        TypeError: an argument of a wrong kind or dtype.
        ValueError: a wrong shape, size, device or name.
        RuntimeError: the backend asked for by name cannot run this.

    EffNet (arXiv 1801.06434): 4.2 with "row", the revised block of 6.2 with "both".

    Example:
        >>> x, row, col = torch.randn(2, 8, 16, 16), torch.randn(8, 1, 1, 3), torch.randn(8, 1, 3, 1)
        >>> y = EF.separable_conv_pool2d(x, row, col, pool="both")
        >>> z = F.max_pool2d(F.conv2d(x, row, padding=(0, 1), groups=8), (1, 2))
        >>> stock = F.max_pool2d(F.conv2d(z, col, padding=(1, 0), groups=8), (2, 1))
        >>> y.shape, torch.allclose(y, stock, atol=1e-5)
        (torch.Size([2, 8, 8, 8]), True)
    """
    op = "separable_conv_pool2d"
    if torch._C._is_any_autocast_enabled() and (dtype := check.autocast_dtype(op, input)) is not None:
        input, row_weight, col_weight = [check.cast(t, dtype) for t in (input, row_weight, col_weight)]
        row_bias, col_bias = check.cast(row_bias, dtype), check.cast(col_bias, dtype)
        row_scale, row_shift = check.cast_affine(row_scale, dtype), check.cast_affine(row_shift, dtype)
        scale, shift = check.cast_affine(scale, dtype), check.cast_affine(shift, dtype)
    kind = check.check_input(op, input)
    check.check_like(op, "row_weight", row_weight, kind, "[D,1,1,S]")
    check.check_like(op, "col_weight", col_weight, kind, "[D,1,R,1]")
    stride, padding, dilation = check.as_window(op, stride, padding, dilation)
    geometry, shape = _plan(
        op, input.shape, row_weight.shape, col_weight.shape, pool, stride, padding, dilation, input.stride(),
        (row_activation, row_post_activation), (activation, post_activation),
    )  # fmt: skip
    row, col = (row_bias, row_scale, row_shift), (col_bias, scale, shift)
    check.check_vectors(op, zip(_VECTORS, (*row, *col), strict=True), shape[1], kind)
    slopes = [
        check.check_slope(op, "row_negative_slope", row_negative_slope),
        check.check_slope(op, "negative_slope", negative_slope),
    ]

    taken = backends.choose(backends.Call("sepconv", op, input, row_weight, col_weight, geometry, shape), backend)
    if taken == "reference":
        row_epilogue, col_epilogue = _sepconv.epilogues(row, col, geometry, slopes)
        return _sepconv_reference(input, row_weight, row_epilogue, col_weight, col_epilogue, geometry)
    tensors = (input, row_weight, *row, col_weight, *col)
    return run_kernels(_sepconv.SeparableConvPool2dFunction, _sepconv.KERNELS, taken, tensors, geometry, slopes)
