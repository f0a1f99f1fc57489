"""Problems of room blurmaxpool for the ahead-of-time check (see triton_rooms.py)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from helpers import lay_out
from triton_rooms import MIXED_DTYPES_AND_LAYOUTS, RoomProblem

from effops.ops.blurmaxpool.reference import output_size


@dataclass(frozen=True)
class Case:
    """A call; `some`: of every so many dtypes and layouts one."""

    id: str
    shape: tuple[int, int, int, int]
    window: int = 2
    padding: int = 0
    size: int = 3
    reflect: int = 0
    some: int = 1


CASES = (
    Case("3x3-size4-c64-112x112-zhang", (128, 64, 112, 112), 3, 1, 4, 1),
    Case("2x2-size3-c64-112x112-mosaicml", (128, 64, 112, 112)),
    Case("2x2-size4-c128-28x28-zhang", (128, 128, 28, 28), size=4, reflect=1, some=3),
    Case("4x4-size7-c64-28x28-a_loop", (8, 64, 28, 28), 4, 2, 7, 1, some=3),
    Case("2x2-size3-c17-19x23-one_by_one", (2, 17, 19, 23), some=3),
    Case("3x3-size3-c64-1024x1024-64_bit", (64, 64, 1024, 1024), 3, 1, some=2),
)


def arguments(op: str, case: Case, dtype: torch.dtype, layout: str) -> tuple[Any, ...]:
    """Of the operator."""
    geometry = [2, 2, case.size, case.window, case.window, case.padding, case.padding, case.reflect]
    geometry.append(int(layout == "channels_last"))
    x = lay_out(torch.empty(case.shape), layout, dtype)
    if op == "blur_max_pool_fwd":
        return x, geometry
    shape = (*case.shape[:2], *output_size(*case.shape[2:], geometry))
    return lay_out(torch.empty(shape), layout, dtype), x, geometry


def problems() -> Iterator[RoomProblem]:
    """Both operators on every case."""
    for case in CASES:
        for dtype, layout in MIXED_DTYPES_AND_LAYOUTS[:: case.some]:
            for op in ("blur_max_pool_fwd", "blur_max_pool_bwd"):
                made = partial(arguments, op, case, dtype, layout)
                yield RoomProblem(op, "effops.ops.blurmaxpool.triton", case.id, dtype, layout, made)
