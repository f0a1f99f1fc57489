"""Room mbconv's problems for the ahead-of-time check of its Triton kernels."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from cases import ACTIVATIONS, Epi
from torch import Tensor
from triton_rooms import DTYPES_AND_LAYOUTS, RoomProblem

_ALL = {"bias": True, "scale": True, "shift": True}
_HEAVIEST = Epi(**_ALL, activation="gelu", post_activation="silu")
_FULL = {"expand": _HEAVIEST, "dw": _HEAVIEST, "pw": replace(_HEAVIEST, residual=True)}
_NORM6 = Epi(scale=True, shift=True, post_activation="relu6")
_MOBILE = {"expand": _NORM6, "dw": _NORM6, "pw": Epi(scale=True, shift=True)}
_ADD = _MOBILE | {"pw": Epi(scale=True, shift=True, residual=True)}


@dataclass(frozen=True, kw_only=True)
class Case:
    """An inverted residual with the padding that keeps the size at stride 1; d None: no expansion; se 0: no SE."""

    id: str
    n: int = 32
    c: int
    d: int | None
    k: int
    h: int
    w: int
    kernel: int = 3
    stride: int = 1
    layout: str = "contiguous"
    se: int = 0
    gate: str = "sigmoid"
    expand: Epi = field(default_factory=Epi)
    dw: Epi = field(default_factory=Epi)
    pw: Epi = field(default_factory=Epi)


CASES = [
    Case(id="k3-c32-d192-k128-28x28-every_part", c=32, d=192, k=128, h=28, w=28, **_FULL),
    Case(id="k5-c96-d576-k256-14x14-every_part", c=96, d=576, k=256, h=14, w=14, kernel=5, **_FULL),
    Case(id="k3-c24-d144-k24-56x56-mobile", c=24, d=144, k=24, h=56, w=56, **_ADD),
    Case(id="k3s2-c32-d192-k64-28x28-mobile", c=32, d=192, k=64, h=28, w=28, stride=2, **_MOBILE),
    Case(id="k3-c160-d960-k320-7x7-one_image", n=1, c=160, d=960, k=320, h=7, w=7, **_MOBILE),
    *(Case(id=f"k3-c64-d192-k{k}-{size}x{size}-few_programs", n=1, c=64, d=192, k=k, h=size, w=size, **_MOBILE)
      for k in (256, 128, 64, 32) for size in (70, 50)),
    Case(id="k3-c13-d37-k19-19x23-one_by_one", n=2, c=13, d=37, k=19, h=19, w=23, **_FULL),
    Case(id="k3-c13-d37-k67-57x57-one_by_one", n=8, c=13, d=37, k=67, h=57, w=57, **_FULL),
    Case(id="k3-c1-d1-k1-4x4-tiny", n=1, c=1, d=1, k=1, h=4, w=4),
    Case(id="k3-c64-d64-k64-1024x1024-64_bit", n=64, c=64, d=64, k=64, h=1024, w=1024, **_FULL),
    Case(id="k5s2-c24-d72-k40-56x56-excited", c=24, d=72, k=40, h=56, w=56, kernel=5, stride=2, se=24,
         gate="hardsigmoid", **_MOBILE),
    Case(id="k3-c13-d37-k19-19x23-excited_one_by_one", n=2, c=13, d=37, k=19, h=19, w=23, se=5, **_FULL),
    Case(id="k3-c32-k16-112x112-excited_without_expansion", c=32, d=None, k=16, h=112, w=112, se=8, **_MOBILE),
]  # fmt: skip
# The backward is kernels of other rooms, compiled for their own problems too: here those forms that only this room has.
BACKWARD = [case for case in CASES if case.id.endswith(("-56x56-mobile", "excited", "excited_one_by_one"))]


def _tensors(case: Case, dtype: torch.dtype) -> list[Tensor | None]:
    """The operator's 18 tensors."""
    hidden, size = case.d or case.c, ((case.h - 1) // case.stride + 1, (case.w - 1) // case.stride + 1)
    layout = torch.channels_last if case.layout == "channels_last" else torch.contiguous_format

    def empty(wanted: Any, *shape: int) -> Tensor | None:
        return torch.empty(shape, dtype=dtype) if wanted else None

    def image(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, memory_format=layout)

    def vectors(epi: Epi, channels: int) -> list[Tensor | None]:
        return [empty(wanted, channels) for wanted in (epi.bias, epi.scale, epi.shift)]

    return [
        image(case.n, case.c, case.h, case.w),
        empty(case.d, hidden, case.c, 1, 1), *vectors(case.expand if case.d else Epi(), hidden),
        empty(True, hidden, 1, case.kernel, case.kernel), *vectors(case.dw, hidden),
        empty(case.se, case.se, hidden, 1, 1), empty(case.se, case.se),
        empty(case.se, hidden, case.se, 1, 1), empty(case.se, hidden),
        empty(True, case.k, hidden, 1, 1), *vectors(case.pw, case.k),
        image(case.n, case.k, *size) if case.pw.residual else None,
    ]  # fmt: skip


def forward_arguments(case: Case, dtype: torch.dtype) -> tuple[Any, ...]:
    """Those of mbconv_fwd."""
    expand = case.expand if case.d else Epi()
    names = [name for epi in (case.dw, case.pw, expand) for name in (epi.activation, epi.post_activation)]
    codes = map(ACTIVATIONS.index, (*names, "silu", case.gate))
    window = [case.stride] * 2 + [case.kernel // 2] * 4 + [1, 1, 1]
    geometry = [*window, int(case.layout == "channels_last"), *codes, 0]
    return (*_tensors(case, dtype), geometry, [0.1, 0.2, 0.3])


def backward_arguments(case: Case, dtype: torch.dtype) -> tuple[Any, ...]:
    """Those of mbconv_bwd, every gradient asked for."""
    *tensors, geometry, slopes = forward_arguments(case, dtype)
    mask = sum(1 << bit for bit, tensor in enumerate(tensors) if tensor is not None)
    return torch.ops.effops.mbconv_fwd(*tensors, geometry, slopes), *tensors, geometry, slopes, mask


def problems() -> Iterator[RoomProblem]:
    """Cases in every dtype, most in both layouts, forward and some backward."""
    for case in CASES:
        operators = [("mbconv_fwd", forward_arguments)]
        if case in BACKWARD:
            operators.append(("mbconv_bwd", backward_arguments))
        for dtype, layout in DTYPES_AND_LAYOUTS:
            if layout == "contiguous" and "few_programs" in case.id:
                continue
            laid_out = replace(case, layout=layout)
            for op, arguments in operators:
                for tf32 in (False, True)[: 2 if dtype == torch.float32 else 1]:
                    made = partial(arguments, laid_out, dtype)
                    yield RoomProblem(op, "effops.ops.mbconv.triton", case.id, dtype, layout, made, tf32)
