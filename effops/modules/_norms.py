"""Batch norm as the scale and shift of a kernel's epilogue, and its running statistics."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from effops import backends
from effops.ops import batch_norm
from effops.ops.epilogue import BatchNorm

HALF_TYPES = (torch.float16, torch.bfloat16)

Affine = tuple[Tensor, Tensor]


def batch_norm_of(norm: nn.BatchNorm2d) -> BatchNorm:
    """The norm, on the statistics of the next batch, for a kernel's epilogue; counts the batch as `norm(x)` does."""
    running = norm.training and norm.track_running_stats
    momentum = norm.momentum
    if running and norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
        if momentum is None:
            momentum = 1.0 / float(norm.num_batches_tracked)
    return BatchNorm(
        norm.weight,
        norm.bias,
        norm.running_mean if running else None,
        norm.running_var if running else None,
        0.0 if momentum is None else momentum,
        norm.eps,
    )


def takes_batch_statistics(norm: nn.Module) -> bool:
    """torch's rule: in training, or where there are no running statistics."""
    return isinstance(norm, nn.BatchNorm2d) and (norm.training or norm.running_mean is None)


def affine_of(norm: nn.BatchNorm2d, mean: Tensor, var: Tensor) -> Affine:
    """(scale, shift) such that norm(x) = x * scale + shift; at least float32; differentiable."""
    return batch_norm.reference(norm.weight, norm.bias, mean, var, norm.eps)


def running_affine(norm: nn.BatchNorm2d, backend: str) -> Affine | None:
    """The affine form on the running statistics; None where the norm takes those of the batch."""
    if norm.training:
        return None
    weight, bias, mean, var = _tensors_of(norm)
    if mean is None:
        return None
    fold = batch_norm.affine if backends.allows("cpp", backend) else batch_norm.reference
    return fold(weight, bias, mean, var, norm.eps)


def _tensors_of(norm: nn.BatchNorm2d) -> tuple[Tensor | None, ...]:
    """weight, bias, running_mean, running_var; each would take half a microsecond as an attribute."""
    parameters, buffers = norm._parameters, norm._buffers
    try:
        return parameters["weight"], parameters["bias"], buffers["running_mean"], buffers["running_var"]
    except KeyError:  # one was replaced by a plain attribute
        return norm.weight, norm.bias, norm.running_mean, norm.running_var


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
