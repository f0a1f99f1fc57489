"""Which of the two kinds of GPU kernels `auto` takes: the one that was faster on the nearest problem measured.

The table, `gpu_choice.json`, is made by `benchmarks/report.py` from the results of `make gpu` and nothing else; it is
empty until there are some. Where it has nothing similar, the order of `effops.backends.BACKENDS` decides; so it does
for layouts other than channels_last, which is what is measured, and in compiled graphs, whose sizes may be symbols.
"""

from __future__ import annotations

import json
import math
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch.compiler import is_compiling

from effops.ops import geometry as G

if TYPE_CHECKING:
    from effops.backends import Call

TABLE_PATH = Path(__file__).with_name("gpu_choice.json")
MAX_DISTANCE = 4.0  # the factors between the sizes of two similar problems multiply to 16 at most


class Kind(NamedTuple):
    """What two similar problems have in common; window and stride are (height, width)."""

    capability: str  # of the GPU: "9.0"
    op: str
    precision: str  # a dtype's name, or "tf32"
    direction: str  # "forward" or "forward+backward"
    window: tuple[int, int]
    stride: tuple[int, int]


class Sizes(NamedTuple):
    """What they may differ in: channels before and behind, and pixels of all output maps."""

    channels: int
    out: int
    pixels: int


class Record(NamedTuple):
    """One measured problem and the backend that was faster."""

    kind: Kind
    sizes: Sizes
    faster: str


def load(path: Path = TABLE_PATH) -> list[Record]:
    """The records of a table."""
    rows = json.loads(path.read_text(encoding="utf-8"))["records"]
    return [
        Record(
            Kind(*(row[key] for key in Kind._fields[:4]), tuple(row["window"]), tuple(row["stride"])),
            Sizes(row["channels"], row["out"], row["pixels"]),
            min(row["us"], key=row["us"].get),
        )
        for row in rows
    ]


records: list[Record] = load()


def distance(a: Sizes, b: Sizes) -> float:
    """Sum of the sizes' ratios as powers of 2."""
    return sum(abs(math.log2(x / y)) for x, y in zip(a, b, strict=True))


@lru_cache(maxsize=4096)
def _nearest(kind: Kind, sizes: Sizes) -> str | None:
    similar = [(distance(sizes, record.sizes), record.faster) for record in records if record.kind == kind]
    least, faster = min(similar, default=(math.inf, None))
    return faster if least <= MAX_DISTANCE else None


def faster(call: Call) -> str | None:
    """The name of the backend that was faster on the nearest problem measured; None where none is near."""
    if not records or is_compiling() or not call.geometry[G.CHANNELS_LAST]:
        return None
    if call.op not in ("dwconv", "dsconv"):
        return None
    n, out, p, q = call.shape
    if n == 0:
        return None
    window, stride = tuple(call.weight.shape[2:]), tuple(call.geometry[:2])
    kind = Kind(_capability(call.input.device), call.op, _precision(call), _direction(call), window, stride)
    return _nearest(kind, Sizes(call.input.shape[1], out, n * p * q))


def _capability(device: torch.device) -> str:
    major, minor = torch.cuda.get_device_capability(device)
    return f"{major}.{minor}"


def _precision(call: Call) -> str:
    if call.op == "dsconv" and call.input.dtype == torch.float32 and G.tf32_allowed():
        return "tf32"
    return str(call.input.dtype).removeprefix("torch.")


def _direction(call: Call) -> str:
    tensors = (call.input, call.weight, call.pw_weight)
    needs = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    return "forward+backward" if needs else "forward"
