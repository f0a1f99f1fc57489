"""The differentiable branch of every backward: gradients of the reference, which torch can differentiate again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

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


def transformed() -> bool:
    """True under a functorch transform or inside a forward-mode AD level: kernels cannot follow there."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


class KernelFunction(torch.autograd.Function):
    """Base of the autograd.Functions over kernels: refuses transforms that a kernel cannot follow, in one sentence.

    The refusal stands in `apply`, because Dynamo does not trace a Function that defines `jvp` or `vmap`, and
    `setup_context`, which functorch wants, costs 15 us a call.
    """

    @classmethod
    def apply(cls, *args: Any) -> Any:
        """Runs the operator; raises RuntimeError under functorch transforms and forward-mode AD."""
        if transformed():
            raise RuntimeError(REFUSAL.format(name=cls.__name__))
        # Past torch.autograd.Function.apply, which only serves setup_context and dead functorch wrappers: 2 us a call.
        return super(torch.autograd.Function, cls).apply(*args)
