"""Batch norm as the scale and shift of a kernel's epilogue, and its running statistics."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

HALF_TYPES = (torch.float16, torch.bfloat16)

Affine = tuple[Tensor, Tensor]


def takes_batch_statistics(norm: nn.Module) -> bool:
    """torch's rule: in training, or where there are no running statistics."""
    return isinstance(norm, nn.BatchNorm2d) and (norm.training or norm.running_mean is None)


def affine_of(norm: nn.BatchNorm2d, mean: Tensor, var: Tensor) -> Affine:
    """(scale, shift) such that norm(x) = x * scale + shift; at least float32."""
    if mean.dtype in HALF_TYPES:
        mean, var = mean.float(), var.float()
    weight, bias = norm.weight, norm.bias
    scale = (var + norm.eps).rsqrt_()
    if weight is not None:
        scale = (weight if weight.dtype == mean.dtype else weight.to(mean.dtype)) * scale
    if bias is None:
        return scale, -mean * scale
    return scale, torch.addcmul(bias if bias.dtype == mean.dtype else bias.to(mean.dtype), mean, scale, value=-1)


def running_affine(norm: nn.BatchNorm2d) -> Affine | None:
    """The affine form on the running statistics; None where the norm takes those of the batch."""
    if norm.training or (mean := norm.running_mean) is None:
        return None
    return affine_of(norm, mean, norm.running_var)


def check_batch_size(values_per_channel: int, shape: Sequence[int]) -> None:
    if values_per_channel == 1:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {torch.Size(shape)}")


@torch.no_grad()
def update_running_statistics(norm: nn.BatchNorm2d, mean: Tensor, var: Tensor, count: int) -> None:
    """What torch's BatchNorm2d does to its buffers in training: unbiased variance, cumulative for momentum None."""
    if not (norm.training and norm.track_running_stats):
        return
    momentum = norm.momentum
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
        if momentum is None:
            momentum = 1.0 / float(norm.num_batches_tracked)
    if norm.running_mean is None:
        return
    momentum = 0.0 if momentum is None else momentum
    unbiased = var * (count / (count - 1))
    for running, batch in ((norm.running_mean, mean), (norm.running_var, unbiased)):
        running.mul_(1 - momentum).add_(batch.to(running.dtype), alpha=momentum)
