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
