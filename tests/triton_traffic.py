"""What interpreted Triton kernels read and write: every program's addresses, from its own index arithmetic.

The interpreter hands every masked load and store to its builder; a program's addresses are noted there.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import pytest
from torch import Tensor

from effops.ops import triton_launch


@dataclass
class Program:
    """One program of a launch, and the addresses it loads and stores, in the order of its accesses."""

    kernel: str
    loads: list[np.ndarray] = field(default_factory=list)
    stores: list[np.ndarray] = field(default_factory=list)

    def loaded(self, x: Tensor) -> set[tuple[int, ...]]:
        """Indices of the distinct elements of `x` that are loaded."""
        return set(map(tuple, _indices(self.loads, x)))

    def stored(self, x: Tensor) -> list[tuple[int, ...]]:
        """Indices of the elements of `x` that are stored, as often as they are."""
        return list(map(tuple, _indices(self.stores, x)))


def _indices(addresses: list[np.ndarray], x: Tensor) -> np.ndarray:
    """Indices in `x`, which is dense, of those of the addresses that lie in it."""
    found = np.concatenate(addresses) if addresses else np.empty(0, np.uint64)
    offsets = (found.astype(np.int64) - x.data_ptr()) // x.element_size()
    offsets = offsets[(offsets >= 0) & (offsets < x.numel())]
    order = sorted(range(x.dim()), key=lambda axis: (-x.stride(axis), x.shape[axis] == 1))
    if not x.permute(order).is_contiguous():
        raise ValueError(f"strides {x.stride()} of shape {tuple(x.shape)} are not dense")
    along = np.unravel_index(offsets, [x.shape[axis] for axis in order])
    return np.stack([along[order.index(axis)] for axis in range(x.dim())], 1)


@contextmanager
def recorded() -> Iterator[list[Program]]:
    """The programs of every launch inside, in their order."""
    from triton.runtime.interpreter import interpreter_builder as builder

    programs: dict[tuple[int, tuple[int, ...]], Program] = {}
    launches: list[str] = []
    found: list[Program] = []

    def program() -> Program:
        key = (len(launches), tuple(builder.grid_idx))
        if key not in programs:
            programs[key] = Program(launches[-1])
            found.append(programs[key])
        return programs[key]

    launch, load, store = triton_launch.launch, builder.create_masked_load, builder.create_masked_store

    def noted_launch(kernel, *arguments, **constants):
        launches.append(kernel.fn.__name__)
        launch(kernel, *arguments, **constants)

    def noted_load(ptrs, mask, *rest):
        program().loads.append(ptrs.data[mask.data].ravel())
        return load(ptrs, mask, *rest)

    def noted_store(ptrs, value, mask, *rest):
        program().stores.append(ptrs.data[mask.data].ravel())
        return store(ptrs, value, mask, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_launch, "launch", noted_launch)
        patch.setattr(builder, "create_masked_load", noted_load)
        patch.setattr(builder, "create_masked_store", noted_store)
        yield found
