"""A batch norm's statistics and parameters as the scale and shift of an epilogue: operator, fake and reference."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.compiler import is_compiling

from effops import _library
from effops.ops.higher_order import transformed

_operator = torch.ops.effops.batch_norm_affine.default


@torch.library.register_fake("effops::batch_norm_affine", lib=_library.lib)
def _batch_norm_affine(weight, bias, running_mean, running_var, eps):
    return torch.empty_like(running_mean), torch.empty_like(running_mean)


def reference(
    weight: Tensor | None, bias: Tensor | None, mean: Tensor, var: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """(scale, shift) such that the batch norm of x is x * scale + shift, in plain torch ops; at least float32."""
    if mean.dtype in (torch.float16, torch.bfloat16):
        mean, var = mean.float(), var.float()
    scale = (var + eps).rsqrt_()
    if weight is not None:
        scale = (weight if weight.dtype == mean.dtype else weight.to(mean.dtype)) * scale
    if bias is None:
        return scale, -mean * scale
    return scale, torch.addcmul(bias if bias.dtype == mean.dtype else bias.to(mean.dtype), mean, scale, value=-1)


def affine(weight: Tensor | None, bias: Tensor | None, mean: Tensor, var: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`reference`, by one operator instead of four torch calls where it serves: the calls are the cost, not the values.

    It has no gradient, and a compiler does better with the four.
    """
    if not is_compiling() and _operator_serves((weight, bias, mean, var)):
        return _operator(weight, bias, mean, var, eps)
    return reference(weight, bias, mean, var, eps)


def _operator_serves(tensors: tuple[Tensor | None, ...]) -> bool:
    dtype = tensors[2].dtype
    if not _library.kernels_loaded or (dtype is not torch.float32 and dtype is not torch.float64) or transformed():
        return False
    needs_gradient = torch.is_grad_enabled()
    for t in tensors:
        if t is not None and (not t.is_cpu or t.dtype is not dtype or (needs_gradient and t.requires_grad)):
            return False
    return True
