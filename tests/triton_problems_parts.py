"""Problems of dsconv's several windows side by side (effops/ops/dsconv/triton_parts.py); see `triton_rooms.py`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from cases import ACTIVATIONS
from torch import Tensor
from triton_rooms import DTYPES_AND_LAYOUTS, RoomProblem

MODULE = "effops.ops.dsconv.triton_parts"
FORMATS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}


@dataclass(frozen=True)
class Case:
    """A layer: square maps and windows, padded to keep the size at stride 1.

    Attributes:
        parts: channels of each part where they are split; None: each part has all of them.
        full: every part of the epilogues; else a batch norm behind the windows and relu6 behind the matrix.
        wanted: the gradients, as the mask's bits, of what there is; None: all.
    """

    id: str
    n: int
    c: int
    k: int
    size: int
    kernels: tuple[int, ...] = (3, 5, 7)
    parts: tuple[int, ...] | None = None
    stride: int = 1
    full: bool = False
    wanted: int | None = None

    @property
    def channels(self) -> tuple[int, ...]:
        return self.parts or (self.c,) * len(self.kernels)

    @property
    def output_size(self) -> int:
        return (self.size - 1) // self.stride + 1

    @property
    def geometry(self) -> list[int]:
        pads = [[kernel // 2] * 4 for kernel in self.kernels]
        names = ("gelu", "silu", "gelu", "silu") if self.full else ("none", "none", "relu6", "none")
        codes = [ACTIVATIONS.index(name) for name in names]
        strides = [self.stride, self.stride]
        split = int(self.parts is not None)
        return [*strides, *pads[0], 1, 1, 1, 0, *codes, split, *(pad for more in pads[1:] for pad in more)]

    def tensors(self, dtype: torch.dtype, layout: str) -> tuple[Any, ...]:
        """The operator's, in the schema's order."""
        size, mid = self.output_size, sum(self.channels)

        def vectors(channels: int, bias: bool, norm: bool) -> list[Tensor | None]:
            return [torch.empty(channels, dtype=dtype) if there else None for there in (bias, norm, norm)]

        x = torch.empty((self.n, self.c, self.size, self.size), dtype=dtype, memory_format=FORMATS[layout])
        weights = [
            torch.empty((channels, 1, kernel, kernel), dtype=dtype)
            for channels, kernel in zip(self.channels, self.kernels, strict=True)
        ]
        residual = torch.empty((self.n, self.k, size, size), dtype=dtype, memory_format=FORMATS[layout])
        return (
            x, weights, *vectors(mid, self.full, True), torch.empty((self.k, mid, 1, 1), dtype=dtype),
            *vectors(self.k, True, self.full), residual if self.full else None,
        )  # fmt: skip

    def forward(self, dtype: torch.dtype, layout: str) -> tuple[Any, ...]:
        geometry = self.geometry
        geometry[9] = int(layout == "channels_last")
        return (*self.tensors(dtype, layout), geometry, [0.1, 0.2])

    def backward(self, dtype: torch.dtype, layout: str) -> tuple[Any, ...]:
        arguments = self.forward(dtype, layout)
        output = torch.ops.effops.dsconv_parts_fwd(*arguments)  # its fake: shapes alone
        every = sum(1 << bit for bit, tensor in enumerate(arguments[:10]) if tensor is not None)
        mask = every if self.wanted is None else every & self.wanted
        return (output, None if self.full else output, *arguments, mask)


POINTWISE = 0b111_000_000  # bias, scale and shift: the kernel at the pointwise sums alone

CASES = [
    Case("k357-c96-k320-28x28-every_part", n=32, c=96, k=320, size=28, full=True),
    Case("k357-split240-k240-14x14-every_part", n=128, c=240, k=240, size=14, parts=(80, 80, 80), full=True),
    Case("k35-c32-k64-56x56-s2", n=32, c=32, k=64, size=56, kernels=(3, 5), stride=2),
    Case("k33-c17-k13-19x19-one_by_one", n=2, c=17, k=13, size=19, kernels=(3, 3)),
    Case("k357-c64-k64-56x56", n=32, c=64, k=64, size=56, wanted=POINTWISE),
    Case("k3579-split120-k24-28x28", n=32, c=120, k=24, size=28, kernels=(3, 5, 7, 9), parts=(30, 30, 30, 30),
         wanted=POINTWISE),
    Case("k31-c64-k128-56x56", n=32, c=64, k=128, size=56, kernels=(3, 1), wanted=POINTWISE),
]  # fmt: skip
FEW_PROGRAMS = [
    Case(f"k3-c64-k{k}-{size}x{size}-few_programs", n=1, c=64, k=k, size=size, kernels=(3,), full=True,
         wanted=POINTWISE)
    for k in (256, 128, 64, 32)
    for size in (70, 50)
]  # fmt: skip
WIDE = Case(
    "k35-c64-k64-1024x1024-64_bit", n=64, c=64, k=64, size=1024, kernels=(3, 5), full=True, wanted=1 | POINTWISE
)


def problems() -> Iterator[RoomProblem]:
    for dtype, layout in DTYPES_AND_LAYOUTS:
        more = [*FEW_PROGRAMS, WIDE] if layout == "channels_last" else []
        for case in (*CASES, *more):
            for op, arguments in (("dsconv_parts_fwd", case.forward), ("dsconv_parts_bwd", case.backward)):
                for tf32 in (False, True) if dtype == torch.float32 else (False,):
                    yield RoomProblem(op, MODULE, case.id, dtype, layout, partial(arguments, dtype, layout), tf32)
