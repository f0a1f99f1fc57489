"""The rooms beyond dwconv and dsconv on CUDA: values and gradients of their named cases by the budget, CUDA graphs.

The truth is the oracle's in float64 on the CPU; the yardstick is torch's own unfused chain on the same GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytest
import test_blurmaxpool
import test_dsconv_pool
import test_mbconv
import test_multiception
import test_se
import test_sepconv
import torch
from cases import BS_CASES
from draws import has_kinks, smooth_mbconv, smooth_squeeze_excite
from helpers import (
    Tensors,
    assert_within_budget,
    call,
    draw,
    generator,
    gradients,
    make_tensors,
    move_all,
    oracle,
    present,
    to_float64,
)
from test_gpu import DEVICE, GPU_BACKENDS, HALF
from torch import Tensor

import effops.functional as EF
from effops import backends

pytestmark = pytest.mark.gpu


class Room(NamedTuple):
    """How a room's cases are made and called.

    Attributes:
        op: its name among a backend's `operators`.
        cases: the named cases.
        make: a case's tensors by name, on the CPU.
        call: the public function on them, on a backend.
        oracle: the same in torch's words.
        smooth: whether no rounding can move an argument across a kink, or a maximum to another place.
    """

    op: str
    cases: Sequence[Any]
    make: Callable[[Any, torch.dtype], Tensors]
    call: Callable[[Tensors, Any, str], Tensor]
    oracle: Callable[[Tensors, Any], Tensor]
    smooth: Callable[[Any], bool]


def _pool_tensors(case: test_blurmaxpool.PoolCase, dtype: torch.dtype) -> Tensors:
    return {"input": test_blurmaxpool.make(case, dtype)[0]}


def _call_se(t: Tensors, case: test_se.Case, backend: str) -> Tensor:
    return EF.squeeze_excite2d(**t, activation=case.activation, gate=case.gate, backend=backend)


ROOMS = {
    "bsconv": Room("bsconv", BS_CASES, make_tensors, call, oracle, lambda c: not has_kinks(c.pw, c.epi)),
    "parts": Room(
        "dsconv_parts",
        test_multiception.CASES,
        test_multiception.make_tensors,
        test_multiception.call,
        test_multiception.oracle,
        lambda c: not has_kinks(c.dw, c.pw),
    ),
    "mbconv": Room(
        "mbconv",
        test_mbconv.CASES,
        test_mbconv.make_tensors,
        test_mbconv.call,
        test_mbconv.oracle,
        smooth_mbconv,
    ),
    "sepconv": Room(
        "sepconv",
        test_sepconv.CASES,
        test_sepconv.make_tensors,
        test_sepconv.call,
        test_sepconv.oracle,
        lambda c: not has_kinks(c.row, c.col) and c.pool == "none",
    ),
    "se": Room(
        "se",
        list(test_se.CASES.values()),
        test_se.tensors_of,
        _call_se,
        lambda t, c: test_se.oracle(t, c.activation, c.gate),
        lambda c: smooth_squeeze_excite(c.activation, c.gate),
    ),
    "pooled": Room(
        "dsconv",
        [case for case in test_dsconv_pool.CASES if case.n],
        make_tensors,
        test_dsconv_pool.excited,
        test_dsconv_pool.oracle_excited,
        lambda c: not has_kinks(c.dw, c.pw),
    ),
    "blur_max_pool": Room(
        "blur_max_pool",
        test_blurmaxpool.CASES,
        _pool_tensors,
        lambda t, c, backend: test_blurmaxpool.call(t["input"], c, backend),
        lambda t, c: test_blurmaxpool.oracle(t["input"], c),
        lambda c: True,  # maxima of the input itself: nothing is rounded before them
    ),
}
EVERY = [pytest.param(room, case, id=f"{name}-{case.id}") for name, room in ROOMS.items() for case in room.cases]
SMOOTH = [param for param in EVERY if param.values[0].smooth(param.values[1])]
# A result of one element, or of windows in the padding alone, says nothing in half precision.
TELLING = [param for param in SMOOTH if "1x1" not in param.id and "padding_above" not in param.id]


@pytest.fixture(params=[name for name in GPU_BACKENDS if name != "reference"])
def gpu_kernels(request: pytest.FixtureRequest) -> str:
    """The backends with GPU kernels, in turn."""
    return request.param


def require_kernels(room: Room, name: str) -> None:
    (backend,) = (candidate for candidate in backends.BACKENDS if candidate.name == name)
    if room.op not in backend.operators:
        pytest.skip(f"backend {name}: it has no kernels for {room.op}")


def check(room: Room, case: Any, dtype: torch.dtype, backend: str, with_gradients: bool, device: str = DEVICE) -> None:
    """Values, and gradients of every present tensor, on the device."""
    on_cpu = room.make(case, dtype)
    tensors, double = move_all(on_cpu, device), to_float64(on_cpu)

    def compare(actual: Tensor, true: Tensor, torchs: Tensor, what: str) -> None:
        yardstick = None if dtype == torch.float64 else torchs
        assert_within_budget(actual.cpu(), true, yardstick, f"{case.id} {backend} {what}", computed_in=dtype)

    truth = room.oracle(double, case)
    if not with_gradients:
        with torch.no_grad():
            compare(room.call(tensors, case, backend), truth, room.oracle(tensors, case), "output")
        return
    grad = draw(truth.shape, generator(f"{case.id}/gpu"), "normal", mean=0.5) + 1
    _, true = gradients(lambda t: room.oracle(t, case), double, grad)
    _, torchs = gradients(lambda t: room.oracle(t, case), tensors, grad)
    _, actual = gradients(lambda t: room.call(t, case, backend), tensors, grad)
    for name in actual:
        compare(actual[name], true[name], torchs[name], f"gradient of {name}")


@pytest.mark.parametrize("dtype", (torch.float16, torch.float32, torch.bfloat16, torch.float64), ids=str)
@pytest.mark.parametrize(("room", "case"), EVERY)
def test_forward(room: Room, case: Any, dtype: torch.dtype, gpu_kernels: str) -> None:
    require_kernels(room, gpu_kernels)
    check(room, case, dtype, gpu_kernels, with_gradients=False)


@pytest.mark.parametrize(("room", "case"), EVERY)
def test_gradients_float64(room: Room, case: Any, gpu_kernels: str) -> None:
    """No argument comes near enough to a kink to matter."""
    require_kernels(room, gpu_kernels)
    check(room, case, torch.float64, gpu_kernels, with_gradients=True)


@pytest.mark.parametrize("dtype", (torch.float32, *HALF), ids=str)
@pytest.mark.parametrize(("room", "case"), TELLING)
def test_gradients(room: Room, case: Any, dtype: torch.dtype, gpu_kernels: str) -> None:
    require_kernels(room, gpu_kernels)
    check(room, case, dtype, gpu_kernels, with_gradients=True)


@pytest.mark.parametrize("name", ROOMS)
def test_cuda_graph(name: str, gpu_kernels: str) -> None:
    """Captured, replayed on other values, equal to the bit to the call itself: no synchronisation, no host copies."""
    room = ROOMS[name]
    require_kernels(room, gpu_kernels)
    case = next(c for c in room.cases if c.n > 1)
    tensors = move_all(room.make(case, torch.float32), DEVICE)
    leaves = {key: None if t is None else t.detach().requires_grad_() for key, t in tensors.items()}
    wanted = [leaves[key] for key in present(leaves)]

    def step() -> tuple[Tensor, ...]:
        out = room.call(leaves, case, gpu_kernels)
        return (out.detach(), *torch.autograd.grad(out, wanted, torch.ones_like(out)))

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        leaves["input"].copy_(leaves["input"] * 0.5 + 0.25)
    graph.replay()
    for found, expected in zip(captured, step(), strict=True):
        assert torch.equal(found, expected)
