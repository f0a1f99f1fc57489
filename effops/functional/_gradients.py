"""How a checked call reaches the kernels: through the autograd.Function where something needs a gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from effops.ops.registration import Kernels


def run_kernels(
    function: type[torch.autograd.Function],
    kernels: dict[str, Kernels],
    taken: str,
    tensors: tuple[Tensor | None, ...],
    *statics: Any,
) -> Tensor:
    """The result of an operator on the backend `taken`.

    Args:
        function: the operator's, called with the tensors, the statics and the backend's name.
        kernels: the operator's, by backend.
        tensors: its tensors, absent ones as None.
        statics: its other arguments.
    """
    if torch.is_grad_enabled() and needs_grad(tensors):
        if is_compiling():
            tensors = distinct(tensors)
        return function.apply(*tensors, *statics, taken)
    return kernels[taken].forward(*tensors, *statics)


def needs_grad(tensors: tuple[Tensor | None, ...]) -> bool:
    for t in tensors:  # noqa: SIM110  any() over a generator takes three times as long
        if t is not None and t.requires_grad:
            return True
    return False


def distinct(tensors: tuple) -> tuple:
    """The tensors, with an alias for one that comes twice (a block's input as its residual).

    Dynamo does not trace an autograd.Function that is given one tensor in two places.
    """
    found: list[Tensor | None] = []
    for t in tensors:
        repeated = t is not None and any(t is other for other in found)
        found.append(t.view_as(t) if repeated else t)
    return tuple(found)
