"""Stock PyTorch in eager mode, in NCHW and in channels_last (weights too)."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from benchmarks.problems import FORMATS


def candidates(problem) -> Iterator[tuple[str, Callable[[], object]]]:
    """Yield the stock module's call once for each memory format."""
    if hasattr(problem, "candidates"):  # training: blocks instead of one call
        yield from problem.candidates("eager")
        return
    for variant in FORMATS:
        module, inputs = problem.stock(variant)
        yield variant, lambda module=module, inputs=inputs: module(*inputs)
