"""Problems of the rooms beyond dwconv and dsconv, for the ahead-of-time check of `triton_problems.py`.

A room's problems are what `problems()` of `tests/triton_problems_<room>.py` yields; the file's existence lists it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

DTYPES_AND_LAYOUTS = (
    (torch.float16, "channels_last"),
    (torch.float16, "contiguous"),
    (torch.bfloat16, "channels_last"),  # in NCHW it is float16 but for two conversions
    (torch.float32, "channels_last"),
    (torch.float32, "contiguous"),
    (torch.float64, "channels_last"),
    (torch.float64, "contiguous"),
)
# The same in an order of which every second or third has every dtype or both layouts.
MIXED_DTYPES_AND_LAYOUTS = tuple(DTYPES_AND_LAYOUTS[place] for place in (0, 1, 3, 5, 4, 2, 6))


@dataclass(frozen=True)
class RoomProblem:
    """A host function of a Triton room and how to make its arguments.

    Attributes:
        op: the host function, a name of effops/schemas.inc.
        module: where it is, `effops.ops.<room>.triton`.
        id: what the case is called.
        arguments: makes them, in the schema's order; called where tensors are meta tensors by default.
        tf32: whether torch allows TF32 in float32 convolutions.
    """

    op: str
    module: str
    id: str
    dtype: torch.dtype
    layout: str
    arguments: Callable[[], tuple[Any, ...]]
    tf32: bool = False

    @property
    def name(self) -> str:
        return " ".join(part for part in (self.op, self.id, "tf32" if self.tf32 else "") if part)

    def launch(self) -> None:
        """Calls it on meta tensors."""
        torch.backends.cudnn.conv.fp32_precision = "tf32" if self.tf32 else "ieee"
        with torch.device("meta"):
            arguments = self.arguments()
        getattr(importlib.import_module(self.module), self.op)(*arguments)


def room_problems() -> Iterator[RoomProblem]:
    """Every room's problems."""
    for path in sorted(Path(__file__).parent.glob("triton_problems_*.py")):
        yield from importlib.import_module(path.stem).problems()
