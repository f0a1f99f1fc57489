"""Modules against their stock twins: a module, its twin in its own dtype and its twin in float64, compared."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from helpers import assert_within_budget
from torch import Tensor, nn

from effops import backends, modules, stock
from effops.ops import geometry as G

BN = nn.BatchNorm2d
Inputs = tuple[Tensor, ...]


def randomise(module: nn.Module, seed: int = 0) -> None:
    """Batch norms as after some training: no scale is 1 and no shift is 0."""
    generator = torch.Generator().manual_seed(seed)
    for norm in module.modules():
        if isinstance(norm, nn.modules.batchnorm._BatchNorm):
            for name, low, high in (("weight", 0.5, 1.5), ("bias", -0.5, 0.5)):
                if getattr(norm, name) is not None:
                    getattr(norm, name).data.uniform_(low, high, generator=generator)
            if norm.running_mean is not None:
                norm.running_mean.uniform_(-0.5, 0.5, generator=generator)
                norm.running_var.uniform_(0.5, 2.0, generator=generator)


def trio(make: Callable[[Any], nn.Module], dtype: torch.dtype, backend: str) -> tuple[nn.Module, nn.Module, nn.Module]:
    """(effops module, stock twin, stock twin in float64) with the same state; `make` takes the namespace."""
    module, twin = make(modules), make(stock)
    randomise(module)
    module.to(dtype)
    twin.to(dtype)
    assert list(twin.state_dict()) == list(module.state_dict())
    twin.load_state_dict(module.state_dict())
    for part in module.modules():
        if hasattr(part, "backend"):
            part.backend = backend
    return module, twin, copy.deepcopy(twin).double()


def as_tuple(value: Any) -> Inputs:
    return value if isinstance(value, tuple) else (value,)


def run(module: nn.Module, inputs: Inputs, grads: bool) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Outputs, and the gradients of every parameter and input; a tuple of inputs is passed as one argument."""
    inputs = tuple(x.detach().clone().requires_grad_(grads) for x in inputs)
    with torch.set_grad_enabled(grads):
        outputs = as_tuple(module(inputs if len(inputs) > 1 else inputs[0]))
    named = {f"output {index}": y.detach() for index, y in enumerate(outputs)}
    if not grads:
        return named, {}
    generator = torch.Generator().manual_seed(7)
    loss = sum((y * torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.dtype)).sum() for y in outputs)
    leaves = {f"input {index}": x for index, x in enumerate(inputs)} | dict(module.named_parameters())
    found = torch.autograd.grad(loss, list(leaves.values()))
    return named, dict(zip(leaves, found, strict=True))


def compare(
    make: Callable[[Any], nn.Module],
    inputs: Inputs,
    backend: str,
    *,
    dtype: torch.dtype = torch.float64,
    train: bool = False,
    grads: bool = False,
) -> nn.Module:
    """Outputs, gradients and buffers of the effops module are within the error budget of its twin's."""
    module, twin, truth = trio(make, dtype, backend)
    inputs = tuple(x.to(dtype) for x in inputs)
    results = []
    for network in (module, twin, truth):
        network.train(train)
        wanted = tuple(x.double() for x in inputs) if network is truth else inputs
        outputs, gradients = run(network, wanted, grads)
        kept = network.state_dict()
        buffers = {name: b for name, b in network.named_buffers() if name in kept and b.is_floating_point()}
        results.append(outputs | gradients | buffers)
        counts = {name: b.item() for name, b in network.named_buffers() if name.endswith("num_batches_tracked")}
        assert counts == dict.fromkeys(counts, int(train))
    actual, yardstick, expected = results
    assert list(actual) == list(expected)
    for name in expected:
        assert actual[name].dtype == dtype
        stand = None if dtype == torch.float64 else yardstick[name]
        assert_within_budget(actual[name], expected[name], stand, f"{name} (train={train})")
    return module


def image(*shape: int, seed: int = 1, channels_last: bool = False) -> Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x.contiguous(memory_format=torch.channels_last) if channels_last else x


@contextmanager
def bank_codes() -> Iterator[list[int]]:
    """The code of a named bank, 0 for none, of each call inside that chooses a backend by itself."""
    seen: list[int] = []

    class Spy(backends.Backend):
        name = "spy"

        def why_not(self, call: backends.Call) -> list[str]:
            return ["only looks"]

        def worth_it(self, call: backends.Call) -> bool:
            seen.append(call.geometry[G.BANK])
            return True

    backends.BACKENDS.insert(0, Spy())
    try:
        yield seen
    finally:
        del backends.BACKENDS[0]
