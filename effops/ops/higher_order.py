"""The differentiable branch of every backward: gradients of the reference, which torch can differentiate again."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

REFUSAL = (
    "{name} supports neither functorch transforms (vmap, grad, jvp) nor forward-mode AD: "
    "call effops.functional with backend='reference', which does"
)


def reference_gradients(
    function: Callable[..., Tensor | tuple[Tensor, ...]],
    tensors: Sequence[Tensor | None],
    needs: Sequence[bool],
    grad_outputs: Sequence[Tensor],
) -> list[Tensor | None]:
    """Gradients of `function(*tensors)` for the tensors in `needs`, connected to the graph of `tensors`.

    Each tensor is aliased first: where one tensor is passed twice (a block's input that is its residual too) the two
    gradients must stay apart, or they would both be the sum.
    """
    with torch.enable_grad():
        aliases = [None if t is None else t.view_as(t) for t in tensors]
        outputs = function(*aliases)
        wanted = [alias for alias, need in zip(aliases, needs, strict=True) if need]
        gradients = iter(torch.autograd.grad(outputs, wanted, grad_outputs, create_graph=True, allow_unused=True))
    return [next(gradients) if need else None for need in needs]


class KernelFunction(torch.autograd.Function):
    """Base of the autograd.Functions over kernels: refuses transforms that a kernel cannot follow, in one sentence."""

    @classmethod
    def apply(cls, *args):
        if torch._C._are_functorch_transforms_active():
            raise RuntimeError(REFUSAL.format(name=cls.__name__))
        return super().apply(*args)

    @staticmethod
    def jvp(ctx, *tangents):
        raise RuntimeError(REFUSAL.format(name="this operator's autograd.Function"))

    @staticmethod
    def vmap(info, in_dims, *args):
        raise RuntimeError(REFUSAL.format(name="this operator's autograd.Function"))
