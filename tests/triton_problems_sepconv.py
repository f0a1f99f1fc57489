"""Problems of room sepconv for the ahead-of-time check (see triton_rooms.py)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from helpers import lay_out
from triton_rooms import MIXED_DTYPES_AND_LAYOUTS, RoomProblem

from effops.ops import geometry as G
from effops.ops.epilogue import GELU, NONE, RELU, SILU
from effops.ops.sepconv import POOL_COL, POOL_ROW
from effops.ops.sepconv.reference import col_geometry, row_geometry


@dataclass(frozen=True)
class Case:
    """A call.

    Attributes:
        some: of so many dtypes and layouts one is compiled; backward, which has dwconv's launches too, of its square.
    """

    id: str
    shape: tuple[int, int, int, int]
    pool: int
    kernel: int = 3
    multiplier: int = 1
    vectors: bool = True
    activations: tuple[int, int, int, int] = (GELU, SILU, GELU, SILU)
    some: int = 1


CASES = (
    Case("3x3-c64-32x32-both-every_part", (128, 64, 32, 32), POOL_ROW | POOL_COL),
    Case("3x3-c64-32x32-effnet_v1", (128, 64, 32, 32), POOL_ROW, vectors=False, activations=(NONE,) * 4, some=3),
    Case("3x3-c32-16x16-effnet_v2", (128, 32, 16, 16), POOL_ROW | POOL_COL, multiplier=2, some=3,
         activations=(NONE, RELU, NONE, RELU)),
    Case("5x5-c32-32x32-none", (32, 32, 32, 32), 0, 5, some=3),
    Case("9x9-c32-32x32-a_loop", (32, 32, 32, 32), POOL_ROW | POOL_COL, 9, some=3),
    # Pairs loop under windows wider than 34 alone.
    Case("37x37-c32-16x48-a_loop_of_pairs", (8, 32, 16, 48), POOL_ROW | POOL_COL, 37, some=6),
    Case("3x3-c17-19x23-one_by_one", (2, 17, 19, 23), POOL_ROW | POOL_COL, some=3),
    Case("3x3-c64-1024x1024-64_bit", (64, 64, 1024, 1024), POOL_ROW | POOL_COL, some=2),
)  # fmt: skip


def arguments(op: str, case: Case, dtype: torch.dtype, layout: str) -> tuple[Any, ...]:
    """Of the operator, every gradient asked for."""
    pad, channels = case.kernel // 2, case.shape[1] * case.multiplier
    geometry = [1, 1, pad, pad, pad, pad, 1, 1, case.multiplier, int(layout == "channels_last")]
    geometry += [*case.activations, case.pool]
    x = lay_out(torch.empty(case.shape), layout, dtype)
    vectors = [torch.empty(channels, dtype=dtype) if case.vectors else None for _ in range(6)]
    row, col = (torch.empty((channels, 1, *k), dtype=dtype) for k in ((1, case.kernel), (case.kernel, 1)))
    forward = (x, row, *vectors[:3], col, *vectors[3:], geometry, [0.01, 0.01])
    if op == "sepconv_fwd":
        return forward
    n, _, h, w = case.shape
    h, w = G.output_size(h, w, 1, case.kernel, row_geometry(geometry))
    w //= 1 + bool(case.pool & POOL_ROW)
    h, w = G.output_size(h, w, case.kernel, 1, col_geometry(geometry))
    grad = lay_out(torch.empty((n, channels, h // (1 + bool(case.pool & POOL_COL)), w)), layout, dtype)
    return grad, *forward, 0b111111111 if case.vectors else 0b000100011


def problems() -> Iterator[RoomProblem]:
    """Both operators on every case."""
    for case in CASES:
        for op, some in (("sepconv_fwd", case.some), ("sepconv_bwd", case.some**2)):
            for dtype, layout in MIXED_DTYPES_AND_LAYOUTS[::some]:
                made = partial(arguments, op, case, dtype, layout)
                yield RoomProblem(op, "effops.ops.sepconv.triton", case.id, dtype, layout, made)
