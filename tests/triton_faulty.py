"""Kernels that the ahead-of-time check must complain of: `python tests/triton_compile.py --problems triton_faulty`."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from types import ModuleType

import torch
import triton
import triton.language as tl

from effops.ops import triton_launch as L

USED = L.Config(BLOCK_M=128, BLOCK_C=128, BLOCK_K=0, num_warps=1, num_stages=1)
SMALL = L.Config(BLOCK_M=1, BLOCK_C=32, BLOCK_K=0, num_warps=1, num_stages=1)
CONFIGS = (USED, L.Config(BLOCK_M=999, BLOCK_C=0, BLOCK_K=0, num_warps=8, num_stages=1))  # nothing launches the second

OPS = ("spilling", "unlisted")


@triton.jit
def _spilling_kernel(x, y, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr):
    """512 elements of a tile a thread, all of them needed twice."""
    place = tl.arange(0, BLOCK_M)[:, None] * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    tile = tl.load(x + place)
    tl.store(y + place, tile / tl.sum(tl.sum(tile, 0), 0))


@triton.jit
def _atomic_kernel(x, y, VEC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr):
    """Reads one element at a time, where VEC says that 8 are possible, and adds in whatever order programs arrive."""
    place = tl.arange(0, BLOCK_C)
    tl.atomic_add(y + place, tl.load(x + 3 * place))


@dataclass(frozen=True)
class Problem:
    op: str
    dtype: torch.dtype = torch.float32
    layout: str = "contiguous"

    @property
    def name(self) -> str:
        return self.op


def room(op: str) -> ModuleType:
    return sys.modules[__name__]


def launch(problem: Problem) -> None:
    x = torch.empty(1 << 16, device="meta")
    if problem.op == "spilling":
        L.launch(_spilling_kernel, 1, x, x, torch.empty_like(x), **_constants(USED))
    else:
        L.launch(_atomic_kernel, 1, x, x, torch.empty_like(x), VEC=4, **_constants(SMALL))


def _constants(config: L.Config) -> dict[str, int]:
    return {name: value for name, value in config._asdict().items() if name != "BLOCK_K"}


PROBLEMS = tuple(map(Problem, OPS))
