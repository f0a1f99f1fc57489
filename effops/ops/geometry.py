"""Static geometry of a convolution: stride, padding, dilation, output size and memory format."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

MAX_INT = 2**31 - 1

# Positions in the int[] that every operator receives (schemas.inc).
STRIDE_H, STRIDE_W, PAD_TOP, PAD_BOTTOM, PAD_LEFT, PAD_RIGHT, DILATION_H, DILATION_W = range(8)
MULTIPLIER, CHANNELS_LAST, ACTIVATION, POST_ACTIVATION = range(8, 12)
PW_ACTIVATION, PW_POST_ACTIVATION, KEEP, TF32 = range(12, 16)
SPLIT, MORE_PADS = range(14, 16)  # of dsconv_parts_*, where the pads of the second part start
BANK = -1  # the last of either room: 0, or 1 + the place in banks.BANKS of the named bank that the weight holds


class Geometry(NamedTuple):
    """A normalised convolution window.

    Attributes:
        ints: (stride_h, stride_w, pad_top, pad_bottom, pad_left, pad_right, dilation_h, dilation_w).
        spare_h: padding minus window height; the output height is (H + spare_h) // stride_h + 1 where H + spare_h >= 0.
        spare_w: the same for the width.
    """

    ints: tuple[int, ...]
    spare_h: int
    spare_w: int

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """(P, Q) of an input of the given size."""
        return (height + self.spare_h) // self.ints[0] + 1, (width + self.spare_w) // self.ints[1] + 1


def as_ints(name: str, value: object, lengths: tuple[int, ...], words: str) -> int | tuple[int, ...]:
    """Returns `value` as an int or a tuple of ints; raises TypeError / ValueError naming the argument otherwise.

    Args:
        name: the argument's name, for the message.
        value: what the caller passed.
        lengths: the accepted tuple lengths.
        words: what is accepted, in words.
    """
    if isinstance(value, (tuple, list)):
        if len(value) not in lengths:
            raise ValueError(f"{name} has {len(value)} elements: {value!r}; accepted: {words}")
        for element in value:
            if type(element) is not int:
                return tuple([_as_int(name, element, value, words) for element in value])
        return value if type(value) is tuple else tuple(value)
    return _as_int(name, value, value, words)


def _as_int(name: str, element: object, value: object, words: str) -> int:
    if type(element) is int:
        return element
    # bool is an int to Python, but stride=True is a mistake; numpy integers have __index__ and are fine.
    if isinstance(element, bool) or not hasattr(element, "__index__") or isinstance(element, Tensor):
        raise TypeError(f"{name} must be {words}; got {value!r} ({type(element).__name__})")
    return int(element.__index__())


def _pair(name: str, value: int | tuple[int, ...], least: int) -> tuple[int, int]:
    first, second = (value, value) if isinstance(value, int) else value
    for element in (first, second):
        if element < least:
            raise ValueError(f"{name} must be at least {least}; got {value!r}")
        if element > MAX_INT:
            raise ValueError(f"{name} must be at most 2**31 - 1 = {MAX_INT}; got {value!r}")
    return first, second


def _pads(
    padding: int | str | tuple[int, ...], kernel: tuple[int, int], stride: tuple[int, int], dilation: tuple[int, int]
) -> tuple[int, int, int, int]:
    """(top, bottom, left, right)."""
    if isinstance(padding, str):
        if padding == "valid":
            return 0, 0, 0, 0
        if padding != "same":
            raise ValueError(
                f"unknown padding {padding!r}; accepted: 'same', 'valid', an int, (height, width) or "
                "(left, right, top, bottom)"
            )
        if stride != (1, 1):
            raise ValueError(
                f"padding='same' needs stride 1, as in torch; got stride {stride}; pass the padding as ints"
            )
        # An even window has one more row below than above, as torch pads it.
        rows, columns = dilation[0] * (kernel[0] - 1), dilation[1] * (kernel[1] - 1)
        return rows // 2, rows - rows // 2, columns // 2, columns - columns // 2
    if isinstance(padding, tuple) and len(padding) == 4:
        left, right, top, bottom = padding
        _pair("padding", (left, right), 0)
        _pair("padding", (top, bottom), 0)
        return top, bottom, left, right
    height, width = _pair("padding", padding, 0)
    return height, height, width, width


def window(
    kernel_h: int,
    kernel_w: int,
    stride: int | tuple[int, ...],
    padding: int | str | tuple[int, ...],
    dilation: int | tuple[int, ...],
) -> Geometry:
    """Normalises stride, padding and dilation, which are ints or tuples of ints already (`as_ints`).

    Raises:
        ValueError: non-positive stride or dilation, negative padding, a value over 2**31 - 1, an unknown padding word.
    """
    stride_pair = _pair("stride", stride, 1)
    dilation_pair = _pair("dilation", dilation, 1)
    top, bottom, left, right = _pads(padding, (kernel_h, kernel_w), stride_pair, dilation_pair)
    return Geometry(
        (*stride_pair, top, bottom, left, right, *dilation_pair),
        top + bottom - dilation_pair[0] * (kernel_h - 1) - 1,
        left + right - dilation_pair[1] * (kernel_w - 1) - 1,
    )


def tf32_allowed() -> bool:
    """Whether torch lets its convolutions round float32 products to TF32; in a traced graph: did at its tracing."""
    return torch.backends.cudnn.conv.fp32_precision == "tf32"


# Dynamo does not trace that setting. What torch.compiler.assume_constant_result does, without importing Dynamo.
tf32_allowed._dynamo_marked_constant = True  # type: ignore[attr-defined]


def with_tf32(geometry: list[int]) -> list[int]:
    """The operator's int[] with torch's present setting in it."""
    return [*geometry[:TF32], int(tf32_allowed()), *geometry[TF32 + 1 :]]


def output_size(height: int, width: int, kernel_h: int, kernel_w: int, geometry: list[int]) -> tuple[int, int]:
    """(P, Q) from the int[] that an operator received."""
    sh, sw, top, bottom, left, right, dh, dw = geometry[:8]
    return (
        (height + top + bottom - dh * (kernel_h - 1) - 1) // sh + 1,
        (width + left + right - dw * (kernel_w - 1) - 1) // sw + 1,
    )


def part_geometry(geometry: list[int], part: int) -> list[int]:
    """The depthwise convolution's 12 ints of one part of `dsconv_parts_*`, without its activations."""
    more = MORE_PADS + 4 * (part - 1)
    pads = geometry[PAD_TOP : PAD_RIGHT + 1] if part == 0 else geometry[more : more + 4]
    return [*geometry[:PAD_TOP], *pads, *geometry[DILATION_H:ACTIVATION], 0, 0]


def is_channels_last(x: Tensor) -> bool:
    """True where `suggest_memory_format` of c10 says channels_last: by the order of a 4-D tensor's strides alone.

    Unlike `is_contiguous(memory_format=torch.channels_last)` it is True for a channels_last chunk `x[:, 8:]`, and
    unlike it False for an NCHW tensor with C = 1 or H = W = 1, where both formats describe the same memory. It is the
    rule by which `F.conv2d` lays out its output.
    """
    return orders_channels_last(x.shape, x.stride())


def orders_channels_last(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """`is_channels_last` of a tensor of these sizes and strides."""
    stride_n, stride_c, stride_h, stride_w = strides
    if stride_w < stride_c:  # the usual NCHW case leaves here
        return False
    n, c, h, w = shape
    if n == 0 or c == 0 or h == 0 or w == 0 or stride_c == 0:
        return False
    least = stride_c * c
    if stride_w < least:
        return False
    least = stride_w * w
    if stride_h < least:
        return False
    least = stride_h * h
    # least == stride_c: N111, where identical strides tell nothing; NCHW by definition.
    return bool(stride_n >= least) and bool(least != stride_c)


def memory_format(channels_last: int | bool) -> torch.memory_format:
    """The torch memory format of the `channels_last` entry of a geometry."""
    return torch.channels_last if channels_last else torch.contiguous_format


def in_format(x: Tensor, channels_last: int | bool) -> Tensor:
    """Returns `x` laid out as a fresh tensor of that memory format would be, strides of size-1 dimensions included.

    `Tensor.contiguous` keeps the strides it finds where C = 1 or H = W = 1, and `F.conv2d` of an empty batch returns
    strides of 0: two backends could return different ones.
    """
    if torch._C._are_functorch_transforms_active():  # vmap has its own layout and refuses memory formats
        return x
    _, c, h, w = x.shape
    expected = (h * w * c, 1, w * c, c) if channels_last else (c * h * w, h * w, w, 1)
    if x.stride() == expected:
        return x
    return x.clone(memory_format=memory_format(channels_last))
