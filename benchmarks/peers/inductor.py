"""torch.compile (Inductor) with freezing: constants folded, convolutions prepacked, epilogues fused; both formats."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch._dynamo
import torch._inductor.config

from benchmarks.problems import FORMATS

torch._inductor.config.freezing = True  # takes effect under no_grad, where the worker runs everything but training


def candidates(problem) -> Iterator[tuple[str, Callable[[], object]]]:
    """Yield the compiled stock module's call once for each memory format; compiled statically for the shape."""
    for variant in FORMATS:
        module, inputs = problem.stock(variant)
        torch._dynamo.reset()  # one compiled shape alive at a time: guards of earlier ones would slow the call
        compiled = torch.compile(module, dynamic=False, fullgraph=True)
        yield variant, lambda compiled=compiled, inputs=inputs: compiled(*inputs)
