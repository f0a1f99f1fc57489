"""Deterministic sums of partial results, for every Triton room: no atomics, always in the same order."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from effops.ops import triton_launch as L


@triton.jit
def _sum_kernel(
    partial, out, blocks, TAPS: tl.constexpr, CHANNELS, KERNELS, BLOCK_ROWS: tl.constexpr, BLOCK_B: tl.constexpr
):
    tap = tl.program_id(0) % TAPS
    b = tl.program_id(0) // TAPS * BLOCK_B + tl.arange(0, BLOCK_B)
    uses = tl.cdiv(CHANNELS, KERNELS)
    rows = blocks * uses
    total = tl.zeros((BLOCK_ROWS, BLOCK_B), partial.dtype.element_ty)
    for first in range(0, rows, BLOCK_ROWS):
        row = first + tl.arange(0, BLOCK_ROWS)
        channel = (row % uses)[:, None] * KERNELS + b[None, :]
        mask = (row < rows)[:, None] & (b < KERNELS)[None, :] & (channel < CHANNELS)
        at = ((row // uses).to(tl.int64) * TAPS + tap) * CHANNELS
        total += tl.load(partial + (at[:, None] + channel), mask=mask, other=0.0)
    value = tl.sum(total, 0).to(out.dtype.element_ty)
    tl.store(out + b * TAPS + tap, value, mask=b < KERNELS)


def configs() -> dict[str, list[dict[str, Any]]]:
    """The launches' constants, by kernel, for the ahead-of-time check."""
    return {"_sum_kernel": [{"num_warps": 4}]}


def sum_partials(partial: Tensor, out: Tensor) -> Tensor:
    """out[b, t] = sum of partial[i, t, o] over the blocks i and the channels o with o mod B = b; rounded once.

    Args:
        partial: [blocks, taps, channels], contiguous, float32 or float64; blocks may be 0.
        out: contiguous, B * taps elements in the order [B, taps], any floating dtype; returned.
    """
    blocks, taps, channels = partial.shape
    kernels = out.numel() // taps
    block_b = min(256 if L.INTERPRETED else 32, triton.next_power_of_2(kernels))
    rows = 8 if L.INTERPRETED else 1024 // block_b
    L.launch(
        _sum_kernel, taps * triton.cdiv(kernels, block_b), out, partial, out, blocks,
        TAPS=taps, CHANNELS=channels, KERNELS=kernels, BLOCK_ROWS=rows, BLOCK_B=block_b, num_warps=4, num_stages=1,
    )  # fmt: skip
    return out


def partials(x: Tensor, blocks: int, taps: int, channels: int) -> Tensor:
    """Scratch for `sum_partials` in the accumulators' dtype of maps like `x`."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return torch.empty((blocks, taps, channels), dtype=dtype, device=x.device)
