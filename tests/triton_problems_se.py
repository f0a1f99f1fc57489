"""Problems of room se for the ahead-of-time check (see triton_rooms.py)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from helpers import lay_out
from triton_rooms import DTYPES_AND_LAYOUTS, RoomProblem

from effops.ops.epilogue import GELU, HARDSIGMOID, RELU, SIGMOID, SILU


@dataclass(frozen=True)
class Case:
    id: str
    shape: tuple[int, int, int, int]
    between: int
    bias: bool = True
    activation: int = RELU
    gate: int = SIGMOID


CASES = (
    Case("c240-28x28", (32, 240, 28, 28), 64, activation=GELU),
    Case("c64-1024x1024-64_bit", (64, 64, 1024, 1024), 16),
)
MORE = (  # in fewer dtypes
    Case("c960-7x7-mobile", (32, 960, 7, 7), 240, gate=HARDSIGMOID),
    Case("c28-56x56-8_bytes", (32, 28, 56, 56), 16, bias=False, activation=SILU),
    Case("c17-19x23-one_by_one", (2, 17, 19, 23), 4),
    Case("c1-1x1", (1, 1, 1, 1), 1),
)


def arguments(op: str, case: Case, dtype: torch.dtype, layout: str) -> tuple[Any, ...]:
    """Of the operator, every gradient asked for."""
    c, between = case.shape[1], case.between
    x = lay_out(torch.empty(case.shape), layout, dtype)
    biases = [torch.empty(size, dtype=dtype) if case.bias else None for size in (between, c)]
    weights = torch.empty((between, c, 1, 1), dtype=dtype), torch.empty((c, between, 1, 1), dtype=dtype)
    forward = (
        x,
        weights[0],
        biases[0],
        weights[1],
        biases[1],
    )
    statics = [int(layout == "channels_last"), case.activation, case.gate]
    mask = 0b11111 if case.bias else 0b01011
    return (*forward, None, statics) if op == "se_fwd" else (torch.empty_like(x), *forward, statics, mask)


def problems() -> Iterator[RoomProblem]:
    """Both operators on every case."""
    for case in (*CASES, *MORE):
        for dtype, layout in DTYPES_AND_LAYOUTS[:: 1 if case in CASES else 3]:
            for op in ("se_fwd", "se_bwd"):
                made = partial(arguments, op, case, dtype, layout)
                yield RoomProblem(op, "effops.ops.se.triton", case.id, dtype, layout, made)
