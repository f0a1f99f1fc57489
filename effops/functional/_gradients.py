"""What the functions ask before they take an autograd.Function."""

from __future__ import annotations

from torch import Tensor


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
