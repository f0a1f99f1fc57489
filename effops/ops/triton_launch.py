"""The host side that every Triton room shares: tensors as kernel arguments, alignment, 64-bit offsets, launching."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from effops.ops import geometry as G
from effops.ops.dwconv import banks
from effops.ops.registration import INTERPRETING as INTERPRETED
from effops.ops.triton_device import Affine, Chain, Map, Sizes, Window

if INTERPRETED:
    from effops.ops import triton_interpreter

    triton_interpreter.mend()

_interpreting = threading.Lock()  # the interpreter keeps the program's number, and more, in globals

_ACCESS_BYTES = 16  # the widest load of a thread
_MAX_INT = 2**31 - 1


def as_map(x: Tensor | None) -> Map:
    """The tensor as a kernel sees it; strides of axes of length 1 say nothing and become 0, which is aligned."""
    if x is None:
        return Map(None, 0, 0, 0, 0)
    n, c, h, w = (0 if size == 1 else stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return Map(x, n, 1 if x.shape[1] == 1 else c, h, w)


def vector(x: Tensor | None) -> Tensor | None:
    """A per-channel vector, contiguous."""
    return None if x is None else x.contiguous()


def affine(bias: Tensor | None, scale: Tensor | None, shift: Tensor | None) -> Affine:
    """The per-channel vectors of an epilogue."""
    return Affine(vector(bias), vector(scale), vector(shift))


def depthwise_chain(geometry: list[int], slope: float) -> Chain:
    """The activations after the depthwise convolution."""
    return Chain(geometry[G.ACTIVATION], geometry[G.POST_ACTIVATION], slope)


def sizes_of(x: Tensor, weight: Tensor, geometry: list[int]) -> Sizes:
    """Sizes of the depthwise convolution of `x` with `weight`."""
    n, c, h, w = x.shape
    p, q = G.output_size(h, w, weight.shape[2], weight.shape[3], geometry)
    return Sizes(h, w, p, q, n * p * q, c * geometry[G.MULTIPLIER])


def window_of(weight: Tensor, geometry: list[int]) -> Window:
    """The constexpr part of a depthwise convolution; fixed taps are rounded to the weight's dtype, as the tensor is."""
    kernels, _, r, s = weight.shape
    sh, sw, top, _, left, _, dh, dw, multiplier = geometry[:9]
    taps = None
    if geometry[G.BANK] and r * s <= 25:
        name = list(banks.BANKS)[geometry[G.BANK] - 1]
        values = banks.bank(name, dtype=weight.dtype).double().flatten(1).tolist()
        taps = tuple(tuple(kernel) for kernel in values)
    return Window(r, s, sh, sw, top, left, dh, dw, multiplier, kernels, taps)


def vector_width(maps: Iterable[Tensor | None], channels: Iterable[int]) -> int:
    """How many channels of a pixel one access may take: what divides every pointer, stride and channel count.

    1 where a map does not have its channels side by side.
    """
    common = math.gcd(*channels)
    for x in maps:
        if x is not None:
            n, c, h, w = (0 if size == 1 else stride for size, stride in zip(x.shape, x.stride(), strict=True))
            if x.shape[1] != 1 and c != 1:
                return 1
            size = x.element_size()
            common = math.gcd(common, _ACCESS_BYTES // size, n, h, w)
            common = math.gcd(common, math.gcd(x.data_ptr(), _ACCESS_BYTES) // size)
    return common


def needs_wide(maps: Iterable[Tensor | None], sizes: Sizes, window: Window | None) -> bool:
    """Whether an index or an offset of the kernels passes 31 bits; without a window no pixel reads others."""
    reach = sizes.M + 2**16  # the last block overshoots
    if window is not None:
        reach = max(
            reach, sizes.P * window.SH + window.R * window.DH, sizes.Q * window.SW + window.S * window.DW
        )  # fmt: skip
    for x in maps:
        if x is not None:
            last = sum((size - 1) * abs(stride) for size, stride in zip(x.shape, x.stride(), strict=True))
            reach = max(reach, last)  # offsets of masked accesses may wrap: nothing is read or written there
    return reach > _MAX_INT


def dot_precision(x: Tensor) -> str:
    """How `tl.dot` may round float32: TF32 where torch lets its own convolutions, else not at all."""
    tf32 = x.dtype == torch.float32 and G.tf32_allowed()
    return "tf32" if tf32 else "ieee"


def processors(x: Tensor) -> int:
    """Multiprocessors of the tensor's device; an H200's where there is none."""
    if x.is_cuda:
        return torch.cuda.get_device_properties(x.device).multi_processor_count
    return 132


def strip_width(columns: int, pixels: int) -> int:
    """Width of the column strips in which a block of so many pixels is about square: a divisor of `columns`.

    All of them where every narrower divisor is too narrow to be worth it.
    """
    for width in range(min(math.isqrt(pixels) * 3 // 2, columns), 3, -1):
        if columns % width == 0:
            return width
    return columns


def bank_of(
    weight: Tensor, window: Window, sizes: Sizes, vec: int, dtype: torch.dtype | None = None
) -> tuple[Tensor, Window]:
    """The bank as `depthwise_tile` reads it: as it is, or packed [R*S, channels] where a copy first pays.

    In the order of the weight a thread that holds eight channels of a pixel reads a tap of each by itself: four times
    as many loads as of the map. Packed, the eight are one load. Not worth a kernel for little work, and of no use
    where channels do not lie side by side in the maps.

    `dtype` is the packed taps' (default: the weight's). In the accumulators' no thread has to convert them: half of all
    conversions where a thread holds one pixel.
    """
    enough = 2**10 if INTERPRETED else 2**23
    if window.TAPS is not None or vec == 1 or enough > sizes.M * sizes.D:
        return weight.contiguous(), window
    packed = weight.flatten(1).t().to(dtype or weight.dtype, copy=True, memory_format=torch.contiguous_format)
    if window.B != sizes.D:
        packed = packed.repeat(1, -(-sizes.D // window.B))[:, : sizes.D].contiguous()
    return packed, window._replace(B=0)


class Launch(NamedTuple):
    """A launch on meta tensors: recorded, not run. The ahead-of-time check (tests/triton_compile.py) compiles it."""

    kernel: Callable
    blocks: int
    arguments: tuple
    constants: dict[str, Any]

    def compile(self) -> Any:
        """Triton's compiled kernel, for the active driver's target."""
        return self.kernel.warmup(*self.arguments, grid=(self.blocks,), **self.constants)


recorded: list[Launch] = []  # the launches on meta tensors


def launch(kernel: Callable, blocks: int, on: Tensor, *arguments: Any, **constants: Any) -> None:
    """Runs `kernel` with `blocks` programs on the device of `on`, on its current stream; nothing for no blocks.

    Raises:
        RuntimeError: more programs than a grid can have.
    """
    if blocks == 0:
        return
    if blocks > _MAX_INT:
        raise RuntimeError(f"effops: {blocks} programs are more than a grid can have (2**31 - 1)")
    constants["enable_fp_fusion"] = True  # a * b + c as one FMA: said aloud, for Triton 3.10 turns the default off
    if on.is_cuda:
        with torch.cuda.device(on.device):
            kernel[(blocks,)](*arguments, **constants)
    elif on.device.type == "meta":
        recorded.append(Launch(kernel, blocks, arguments, constants))
    else:
        with _interpreting:
            kernel[(blocks,)](*arguments, **constants)
