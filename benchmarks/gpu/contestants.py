"""Who is measured on a GPU: stock PyTorch eager and compiled, and effops on its backends; channels_last throughout.

eager            cudnn.benchmark; launched call by call, and captured in a CUDA graph
compile          torch.compile(mode="max-autotune"), which brings CUDA graphs of its own
compile-graph    the same autotuning, captured in our CUDA graph: without torch.compile's host time
effops-BACKEND   the public functions and modules; call by call, and captured in a CUDA graph
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from benchmarks.gpu.tasks import Call, plain

OWN = "effops-"
RIVALS = ("eager", "compile", "compile-graph")


class Contestant(NamedTuple):
    """A call, and the modes (timing.MODES) it is timed in."""

    call: Call
    modes: tuple[str, ...]


def _compiled(mode: str):
    def wrap(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> Call:
        torch._dynamo.reset()  # one compiled shape alive at a time
        for tensor in inputs:  # else torch.compile's CUDA graphs copy the inputs into buffers of their own at each call
            torch._dynamo.mark_static_address(tensor)
        compiled = torch.compile(module, mode=mode, dynamic=False, fullgraph=True)
        return lambda: compiled(*inputs)

    return wrap


def build(side: str, task) -> Contestant:
    """The contestant of that name on a task.

    Raises:
        ValueError: no such contestant.
    """
    if side == "eager":
        return Contestant(task.stock(plain), ("calls", "graph"))
    if side == "compile":
        return Contestant(task.stock(_compiled("max-autotune")), ("calls",))
    if side == "compile-graph":
        return Contestant(task.stock(_compiled("max-autotune-no-cudagraphs")), ("graph",))
    if side.startswith(OWN):
        return Contestant(task.effops(side.removeprefix(OWN)), ("calls", "graph"))
    raise ValueError(f"no contestant {side!r}; there are {', '.join(RIVALS)} and {OWN}BACKEND")


def unable(error: BaseException) -> str | None:
    """Why a backend asked for by name declined the call, from effops' refusal; None for any other error."""
    text = str(error)
    if isinstance(error, RuntimeError) and ": backend '" in text and "cannot run input" in text:
        return text.splitlines()[0]
    return None
