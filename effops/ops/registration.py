"""How a room's operators are registered: kernels of each backend, fakes, and the Triton twins of the operators.

`effops::<name>` is the C++ operator of `schemas.inc`. `effops::<name>_triton` has the same schema and is implemented in
Python by the function `<name>` of `effops/ops/<room>/triton.py` or a module beside it, for CUDA tensors, and for CPU
tensors where Triton interprets its kernels (TRITON_INTERPRET=1 when Python starts: slow, for tests). That module, and
Triton, are imported by the first call. `effops::<name>_cuda_host` runs the CUDA kernels' sources on the CPU; it is
there for tests alone.
"""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from effops import _library
from effops.ops import geometry as G

_twins: dict[str, list[str]] = {}  # other operators of the same schema and the same fake, by name

# Read once, like Triton's own decorator does: kernels are either compiled or interpreted for the whole process.
INTERPRETING = os.environ.get("TRITON_INTERPRET", "0") == "1"
# A library that runs the CUDA kernels on the host (tests/cuda_host/build.py makes it): then CPU tensors take them.
CUDA_HOST = os.environ.get("EFFOPS_CUDA_HOST", "")


class Kernels(NamedTuple):
    """The operators that one backend brings for one autograd.Function."""

    forward: Callable
    backward: Callable


def kernels_of(table: dict[str, Kernels], backend: str, function: str) -> Kernels:
    """The backend's kernels.

    Raises:
        ValueError: the backend has none (the reference runs in plain torch ops, outside any Function).
    """
    if backend not in table:
        accepted = ", ".join(map(repr, table))
        raise ValueError(f"{function}: no kernels of a backend {backend!r}; accepted: {accepted}")
    return table[backend]


def register_fake(name: str) -> Callable:
    """Registers a fake for operator `name` and its twins; it runs only where all tensors are on one device.

    A meta tensor among real ones makes the dispatcher take the fake; without the check it would answer with
    uninitialised memory.
    """

    def register(fake: Callable) -> Callable:
        @functools.wraps(fake)
        def checked(*args):
            devices = {arg.device for arg in args if isinstance(arg, Tensor)}
            if len(devices) > 1:
                found = ", ".join(sorted(map(str, devices)))
                raise RuntimeError(f"effops::{name}: all tensors must be on one device, got {found}")
            return fake(*args)

        for operator in (name, *_twins.get(name, ())):
            torch.library.register_fake(f"effops::{operator}", checked, lib=_library.lib)
        return fake

    return register


def packets(*names: str) -> list[Any]:
    """These operators and their twins, as `register_flop_formula` wants them."""
    every = [operator for name in names for operator in (name, *_twins.get(name, ()))]
    return [getattr(torch.ops.effops, operator) for operator in every]


def fake_output(input: Tensor, shape: Sequence[int], geometry: list[int]) -> Tensor:
    """An empty tensor as the kernels allocate it: the input's dtype and device, the geometry's memory format."""
    return torch.empty(
        shape, dtype=input.dtype, device=input.device, memory_format=G.memory_format(geometry[G.CHANNELS_LAST])
    )


def sums_dtype(input: Tensor) -> torch.dtype:
    """Of statistics and sums over a map's pixels."""
    return torch.float64 if input.dtype == torch.float64 else torch.float32


def fake_gradients(tensors: Sequence[Tensor | None], images: int, geometry: list[int], mask: int) -> list[Tensor]:
    """Empty gradients of the tensors in `mask`; the ones at the bits of `images` are laid out by the geometry."""
    gradients = []
    for bit, tensor in enumerate(tensors):
        if mask >> bit & 1:
            if tensor is None:
                raise RuntimeError(f"the gradient mask {mask:#x} asks for tensor {bit}, which is absent")
            if images >> bit & 1:
                gradients.append(fake_output(tensor, tensor.shape, geometry))
            else:
                gradients.append(torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device))
    return gradients


# ---- Triton ---------------------------------------------------------------------------------------------------------


def triton_kernels(room: str, forward: str, backward: str, module: str = "triton") -> Kernels:
    """Registers the Triton twins of two operators, functions of `effops.ops.<room>.<module>`, and returns them."""
    return Kernels(*(triton_operator(room, name, module) for name in (forward, backward)))


def triton_operator(room: str, name: str, module: str = "triton") -> Callable:
    """One of them alone."""
    module = f"effops.ops.{room}.{module}"
    launcher: Callable | None = None

    def run(*args: Any) -> Any:
        nonlocal launcher
        if launcher is None:
            launcher = getattr(importlib.import_module(module), name)
        return launcher(*args)

    twin = f"{name}_triton"
    _library.define_twin(name, twin)
    _twins.setdefault(name, []).append(twin)
    for key in ("CUDA", "CPU") if INTERPRETING else ("CUDA",):
        _library.lib.impl(twin, run, key)
    return getattr(torch.ops.effops, twin).default


# ---- CUDA C++ -------------------------------------------------------------------------------------------------------


def cuda_kernels(forward: str, backward: str) -> Kernels:
    """The CUDA C++ kernels of two operators, on GPUs or, where EFFOPS_CUDA_HOST names a library, on the host."""
    return Kernels(
        *(_host_twin(name) if CUDA_HOST else getattr(torch.ops.effops, name).default for name in (forward, backward))
    )


def _host_twin(name: str) -> Callable:
    twin = f"{name}_cuda_host"
    _library.define_twin(name, twin)
    _twins.setdefault(name, []).append(twin)
    _load_cuda_host()
    return getattr(torch.ops.effops, twin).default


@functools.cache
def _load_cuda_host() -> None:
    torch.ops.load_library(CUDA_HOST)
