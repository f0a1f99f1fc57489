"""Max pooling with a blur before it subsamples (room blurmaxpool)."""

from __future__ import annotations

import torch
from torch import Tensor

from effops import _checks as check
from effops import backends
from effops._checks import Ints, Shape
from effops.ops import blurmaxpool as _blurmaxpool
from effops.ops import geometry as G
from effops.ops.blurmaxpool import reference

MAX_FILTER_SIZE = 7
PADDING_MODES = ("zeros", "reflect")
_PAIR = "an int or a pair (height, width) of ints"


def _pair(op: str, name: str, value: Ints, least: int) -> tuple[int, int]:
    try:
        value = G.as_ints(name, value, (2,), _PAIR)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{op}: {error}") from None
    pair = value if isinstance(value, tuple) else (value, value)
    for element in pair:
        if not least <= element <= G.MAX_INT:
            raise ValueError(f"{op}: {name} must be from {least} to 2**31 - 1; got {element}")
    return pair


def _pool_plan(
    op: str,
    input: Shape,
    kernel_size: Ints,
    stride: Ints,
    padding: Ints,
    filter_size: int,
    padding_mode: str,
    strides: Shape,
) -> tuple[list[int], Shape]:
    """Checks shape and settings: the operator's int[] and the output's shape.

    Raises:
        TypeError, ValueError: what does not fit.
    """
    check.require_rank(op, "input", input, "[N,C,H,W]")
    if 0 in input[1:]:
        raise ValueError(
            f"{op}: input must have positive sizes, only the batch may be 0; got {check.shape_text(input)}"
        )
    window, blur = _pair(op, "kernel_size", kernel_size, 1), _pair(op, "stride", stride, 1)
    pads = _pair(op, "padding", padding, 0)
    if 2 * pads[0] > window[0] or 2 * pads[1] > window[1]:
        raise ValueError(f"{op}: padding must be at most half of kernel_size {kernel_size!r}; got {padding!r}")
    filter_size = check.check_int(op, "filter_size", filter_size, 1)
    if filter_size > MAX_FILTER_SIZE:
        raise ValueError(f"{op}: filter_size must be at most {MAX_FILTER_SIZE}; got {filter_size}")
    if padding_mode not in PADDING_MODES:
        raise ValueError(f"{op}: unknown padding_mode {padding_mode!r}; accepted: {', '.join(PADDING_MODES)}")
    n, c, h, w = input
    reflect = padding_mode == "reflect"
    geometry = [*blur, filter_size, *window, *pads, int(reflect), int(G.orders_channels_last(input, strides))]
    rows, columns = reference.pooled_size(h, w, geometry)
    if rows < 1 or columns < 1:
        raise ValueError(
            f"{op}: the pool's window is larger than the padded input: {window[0]}x{window[1]} against "
            f"{h + 2 * pads[0]}x{w + 2 * pads[1]}; accepted: a window no larger than the padded input"
        )
    behind = filter_size // 2
    if reflect and (rows <= behind or columns <= behind):
        raise ValueError(
            f"{op}: a filter of size {filter_size} reflects {behind} rows and columns of the max pool's {rows}x"
            f"{columns} result; accepted: a larger result, a smaller filter, or padding_mode='zeros'"
        )
    return geometry, (n, c, *reference.output_size(h, w, geometry))


_plan = check.cached(_pool_plan)


def blur_max_pool2d(
    input: Tensor,
    kernel_size: Ints = 2,
    stride: Ints = 2,
    padding: Ints = 0,
    *,
    filter_size: int = 3,
    padding_mode: str = "zeros",
    backend: str = "auto",
) -> Tensor:
    """y = blur(max_pool2d(input, kernel_size, 1, padding), stride), as one kernel: the pooled map is never stored.

    The blur is the binomial filter ([1 2 1] / 4 along each axis for size 3), padded by (filter_size - 1) // 2 before
    and filter_size // 2 behind. The defaults are mosaicml's BlurMaxPool2d; Zhang's max blur pool (arXiv 1904.11486, as
    his package has it) is filter_size=4, padding_mode="reflect".

    Args:
        input: [N,C,H,W]; any strides; N may be 0.
        kernel_size: of the max pool, whose stride is 1.
        stride: of the blur.
        padding: of the max pool, at most half of its window.
        filter_size: of the blur, 1 to 7.
        padding_mode: of the blur, "zeros" or "reflect".
        backend: "auto" or a backend's name.

    Returns:
        [N,C,P,Q] of the input's dtype, channels_last where the input's strides are. As of `F.max_pool2d` the gradient
        at a maximum goes to the first of equal values, and a NaN is a maximum.

    Raises:
        TypeError: an argument of a wrong kind or dtype.
        ValueError: a wrong shape, size or name.
        RuntimeError: the backend asked for by name cannot run this.

    Making Convolutional Networks Shift-Invariant Again (arXiv 1904.11486), 3.2.

    Example:
        >>> x = torch.randn(1, 8, 14, 14)
        >>> y = EF.blur_max_pool2d(x)
        >>> stock = EF.fixed_filter_conv2d(F.max_pool2d(x, 2, 1), "binomial3", stride=2)
        >>> y.shape, torch.allclose(y, stock, atol=1e-6)
        (torch.Size([1, 8, 7, 7]), True)
    """
    op = "blur_max_pool2d"
    if torch._C._is_any_autocast_enabled() and (dtype := check.autocast_dtype(op, input)) is not None:
        input = check.cast(input, dtype)  # the blur is a convolution
    check.check_input(op, input)
    geometry, shape = _plan(
        op, input.shape, kernel_size, stride, padding, filter_size, padding_mode, input.stride()
    )  # fmt: skip
    taken = backends.choose(backends.Call("blur_max_pool", op, input, None, None, geometry, shape), backend)
    if taken == "reference":
        return reference.blur_max_pool(input, geometry)
    if torch.is_grad_enabled() and input.requires_grad:
        return _blurmaxpool.BlurMaxPool2dFunction.apply(input, geometry, taken)
    return _blurmaxpool.KERNELS[taken].forward(input, geometry)
