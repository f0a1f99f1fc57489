"""Kernels that the ahead-of-time check must complain of: `python tests/triton_compile.py --problems triton_faulty`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from effops.ops import triton_launch as L

OPS = ("spilling", "atomic")


@triton.jit
def _spilling_kernel(x, y, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr):
    """512 elements of a tile a thread, all of them needed twice."""
    place = tl.arange(0, BLOCK_M)[:, None] * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    tile = tl.load(x + place)
    tl.store(y + place, tile / tl.sum(tl.sum(tile, 0), 0))


@triton.jit
def _atomic_kernel(x, y, VEC: tl.constexpr, BLOCK_C: tl.constexpr):
    """Reads one element at a time, where VEC says that 4 are possible, and adds in whatever order programs arrive."""
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


def launch(problem: Problem) -> None:
    x = torch.empty(1 << 16, device="meta")
    if problem.op == "spilling":
        L.launch(_spilling_kernel, 1, x, x, torch.empty_like(x), BLOCK_M=128, BLOCK_C=128, num_warps=1, num_stages=1)
    else:
        L.launch(_atomic_kernel, 1, x, x, torch.empty_like(x), VEC=4, BLOCK_C=32, num_warps=1, num_stages=1)


def configs() -> dict[str, list[dict[str, int]]]:
    """One that nothing launches, and none for what is launched."""
    return {"_spilling_kernel": [{"BLOCK_M": 128, "num_warps": 1}], "_atomic_kernel": [{"BLOCK_C": 999}]}


PROBLEMS = tuple(map(Problem, OPS))
