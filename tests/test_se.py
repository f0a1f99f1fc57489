"""Squeeze-excite: values and gradients by the budget, messages, the module and its published forms."""

from __future__ import annotations

import copy
import pickle
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from conftest import require_share
from helpers import (
    activate,
    as_leaves,
    assert_within_budget,
    draw,
    generator,
    gradients,
    interpreted,
    lay_out,
    memory_format_of,
    present,
    to_float64,
)
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck

import effops
import effops.functional as EF
from effops import stock
from effops.ops import se as room

BACKENDS = ("reference", "cpp", "triton", "cuda")


@pytest.fixture(params=BACKENDS)
def se_backend(request: pytest.FixtureRequest) -> str:
    """The backends with kernels for it, and the reference."""
    return require_share(request.param, request.node)


@dataclass(frozen=True, kw_only=True)
class Case:
    id: str
    n: int = 2
    c: int = 8
    h: int = 4
    w: int = 5
    between: int = 3  # channels between the products
    layout: str = "contiguous"
    bias: bool = True
    activation: str = "relu"
    gate: str = "sigmoid"
    data: str = "normal"


CASES = {
    case.id: case
    for case in (
        Case(id="c1-1x1", n=1, c=1, h=1, w=1, between=1),
        Case(id="odd_c-nchw", n=3, c=17, h=5, w=7, between=4, activation="silu"),
        Case(id="odd_c-cl", n=3, c=17, h=5, w=7, between=5, layout="channels_last", bias=False, gate="hardsigmoid"),
        Case(id="cl_chunk", c=28, h=9, w=6, between=8, layout="cl_chunk"),
        Case(id="crop", c=9, h=6, between=2, layout="crop", bias=False, activation="hardswish", gate="hardsigmoid"),
        Case(id="expand_batch", n=3, layout="expand_batch", activation="gelu"),
        Case(id="expand_space", n=1, c=24, h=1, w=2, layout="expand_space", between=1, bias=False, activation="none"),
        Case(id="batch0", n=0),
        Case(id="one_image_of_many_pixels", n=1, c=72, h=61, w=47, between=24, layout="channels_last",
             activation="leaky_relu"),
        Case(id="many_channels", c=530, h=7, w=7, between=33, layout="channels_last", activation="none",
             gate="hardsigmoid"),
        Case(id="wide_row", c=40, h=1, w=500, between=8),
    )
}  # fmt: skip


def tensors_of(case: Case, dtype: torch.dtype) -> dict[str, Tensor | None]:
    gen, c, between = generator(f"se-{case.id}"), case.c, case.between
    x = draw((case.n, c, case.h, case.w), gen, case.data, mean=0.0) + 0.5
    return {
        "input": lay_out(x, case.layout, dtype),
        "reduce_weight": draw((between, c, 1, 1), gen, case.data, c**-0.5).to(dtype),
        "reduce_bias": (draw((between,), gen, case.data) * 0.5 + 0.7).to(dtype) if case.bias else None,
        "expand_weight": draw((c, between, 1, 1), gen, case.data, between**-0.5).to(dtype),
        "expand_bias": draw((c,), gen, case.data).to(dtype) if case.bias else None,
    }


def oracle(t: dict[str, Tensor | None], activation: str, gate: str) -> Tensor:
    hidden = activate(F.conv2d(t["input"].mean((2, 3), True), t["reduce_weight"], t["reduce_bias"]), activation, 0.01)
    return t["input"] * activate(F.conv2d(hidden, t["expand_weight"], t["expand_bias"]), gate, 0.01)


def check_values_and_gradients(case: Case, dtype: torch.dtype, backend: str) -> None:
    tensors = tensors_of(case, dtype)
    shape = tensors["input"].shape
    grad_output = draw(shape, generator(f"se-{case.id}-grad"), case.data) + 1

    def run(t: dict[str, Tensor | None]) -> Tensor:
        return EF.squeeze_excite2d(**t, activation=case.activation, gate=case.gate, backend=backend)

    def torchs(t: dict[str, Tensor | None]) -> Tensor:
        return oracle(t, case.activation, case.gate)

    out, grads = gradients(run, tensors, grad_output)
    truth, true_grads = gradients(torchs, to_float64(tensors), grad_output)
    yardstick, torch_grads = gradients(torchs, tensors, grad_output)
    empty = torch.empty(shape, device="meta", memory_format=memory_format_of(tensors["input"]))
    assert out.stride() == empty.stride()
    assert_within_budget(out, truth, yardstick, f"{case.id} output")
    for which, grad in grads.items():
        assert grad.dtype == dtype
        assert_within_budget(grad, true_grads[which], torch_grads[which], f"{case.id} gradient of {which}")


# A result of one element, whose error cannot average out, says nothing in bfloat16.
DTYPED = [(name, dtype) for name in CASES for dtype in (torch.float64, torch.float32, torch.bfloat16)
          if (name, dtype) != ("c1-1x1", torch.bfloat16)]  # fmt: skip


@pytest.mark.parametrize(("name", "dtype"), DTYPED, ids=str)
def test_values_and_gradients(name: str, dtype: torch.dtype, se_backend: str) -> None:
    check_values_and_gradients(CASES[name], dtype, se_backend)


@pytest.mark.parametrize("name", ("odd_c-nchw", "cl_chunk", "batch0"))
def test_float16_in_triton(name: str, triton: str) -> None:
    check_values_and_gradients(CASES[name], torch.float16, triton)


@pytest.mark.parametrize("name", [name for name in CASES if name != "c1-1x1"])
def test_float16(name: str, cuda: str) -> None:
    check_values_and_gradients(CASES[name], torch.float16, cuda)


@pytest.mark.parametrize("check", (gradcheck, gradgradcheck), ids=("once", "twice"))
@pytest.mark.parametrize("gate", ("sigmoid", "hardsigmoid"))
def test_gradcheck(gate: str, check, se_backend: str) -> None:
    gen = generator("se-gradcheck")
    shapes = ((2, 3, 2, 3), (2, 3, 1, 1), (2,), (3, 2, 1, 1), (3,))
    leaves = [draw(shape, gen, "normal").requires_grad_() for shape in shapes]

    def function(*tensors: Tensor) -> Tensor:
        return EF.squeeze_excite2d(*tensors, activation="silu", gate=gate, backend=se_backend)

    assert check(function, leaves, fast_mode=interpreted(se_backend))  # as in test_gradcheck.py


@pytest.mark.parametrize("name", ("cpp", "triton", "cuda"))
@pytest.mark.parametrize("case", ("odd_c-nchw", "many_channels"))
def test_every_mask(case: str, name: str, request: pytest.FixtureRequest) -> None:
    """Gradients come in schema order, only those asked for, the same bits whatever else is asked for."""
    require_share(name, request.node)
    tensors = tensors_of(CASES[case], torch.float64)
    arguments = (tensors["input"] * 2, *tensors.values(), [int(case == "many_channels"), 1, 7])
    every = room.KERNELS[name].backward(*arguments, 0b11111)
    for mask in (0, 1, 2, 4, 8, 16, 21) if interpreted(name) else range(0b11111):
        expected = [grad for bit, grad in enumerate(every) if mask >> bit & 1]
        found = room.KERNELS[name].backward(*arguments, mask)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("layout", ("contiguous", "channels_last"))
def test_threads_and_repetition_give_the_same_bits(layout: str, cpp: str) -> None:
    torch.set_num_threads(2)
    tensors = as_leaves(tensors_of(CASES["one_image_of_many_pixels"], torch.float32))
    runs = []
    for _ in range(2):
        out = EF.squeeze_excite2d(**tensors, backend=cpp)
        runs.append([out, *torch.autograd.grad(out.square().sum(), [tensors[name] for name in present(tensors)])])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_opcheck_and_compile(cpp: str) -> None:
    for layout in ("contiguous", "channels_last"):
        tensors = tensors_of(CASES["odd_c-nchw"], torch.float32)
        tensors["input"] = lay_out(tensors["input"].double(), layout, torch.float32)
        geometry = [int(layout == "channels_last"), 1, 7]
        for sums in (None, tensors["input"].sum((2, 3))):
            arguments = (*tensors.values(), sums, geometry)
            assert set(torch.library.opcheck(torch.ops.effops.se_fwd.default, arguments).values()) == {"SUCCESS"}
        backward = (tensors["input"] * 2, *tensors.values(), geometry, 0b11111)
        assert set(torch.library.opcheck(torch.ops.effops.se_bwd.default, backward).values()) == {"SUCCESS"}
    module = effops.SqueezeExcite(12)
    x = torch.randn(3, 12, 5, 4, requires_grad=True)
    out = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=True)(x)
    torch.testing.assert_close(out, module(x))
    torch.testing.assert_close(*[torch.autograd.grad(y.sum(), x)[0] for y in (out, module(x))])
    with torch.autocast("cpu", torch.bfloat16):
        assert module(x).dtype == torch.bfloat16


def weights(**changes) -> dict:
    base = {
        "input": torch.ones(2, 8, 3, 3),
        "reduce_weight": torch.ones(4, 8, 1, 1),
        "reduce_bias": torch.ones(4),
        "expand_weight": torch.ones(8, 4, 1, 1),
        "expand_bias": torch.ones(8),
    }
    return base | changes


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"input": 3}, TypeError, "input must be a tensor [N,C,H,W]; got 3 (int)"),
        ({"input": torch.ones(2, 8, 0, 3)}, ValueError,
         "input must have positive sizes, only the batch may be 0; got [2,8,0,3]"),
        ({"reduce_weight": torch.ones(4, 9, 1, 1)}, ValueError,
         "reduce_weight must be [Cr,8,1,1] with Cr > 0; got [4,9,1,1]"),
        ({"reduce_weight": torch.ones(4, 8)}, ValueError,
         "reduce_weight must have 4 dimensions [Cr,C,1,1]; got 2: [4,8]"),
        ({"expand_weight": torch.ones(8, 5, 1, 1)}, ValueError, "expand_weight must be [8,4,1,1]; got [8,5,1,1]"),
        ({"expand_bias": torch.ones(4)}, ValueError,
         "expand_bias must be [8], one value an output channel; got [4]"),
        ({"activation": "tanh"}, ValueError, "unknown activation 'tanh'; accepted: none, relu, relu6, leaky_relu, "
         "silu, hardswish, hardsigmoid, sigmoid, gelu"),
        ({"gate": "relu"}, ValueError, "unknown gate 'relu'; accepted: sigmoid, hardsigmoid"),
        ({"gate": 1}, TypeError, "gate must be a string; got int; accepted: sigmoid, hardsigmoid"),
        ({"sums": 1}, TypeError, "sums must be a tensor [N,C] or None; got int"),
        ({"sums": torch.ones(2, 8).double()}, TypeError,
         "sums must be torch.float32 on cpu; got torch.float64 on cpu"),
        ({"sums": torch.ones(2, 7)}, ValueError, "sums must be [2,8]; got [2,7]"),
        ({"sums": torch.ones(2, 8, requires_grad=True)}, ValueError, "sums must not require a gradient; detach them"),
    ],
    ids=str,
)  # fmt: skip
def test_errors(changes: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        EF.squeeze_excite2d(**weights(**changes))
    assert str(caught.value) == f"squeeze_excite2d: {message}"


def test_raw_operator_raises(cpp: str) -> None:
    good = (*weights().values(), [0, 1, 7])
    bad = [
        (1, torch.ones(4, 9, 1, 1)), (3, torch.ones(8, 5, 1, 1)), (2, torch.ones(5)), (4, torch.ones(4)),
        (5, [0, 1]), (5, [0, 99, 7]), (5, [0, 1, 1]), (0, torch.ones(2, 8, 0, 3)), (1, torch.ones(4, 8, 1, 1).double()),
    ]  # fmt: skip

    def forward(arguments: tuple, sums: Tensor | None = None) -> Tensor:
        return torch.ops.effops.se_fwd(*arguments[:5], sums, arguments[5])

    forward(good)
    for at, value in bad:
        arguments = [*good]
        arguments[at] = value
        with pytest.raises(RuntimeError):
            forward(arguments)
        with pytest.raises(RuntimeError):
            torch.ops.effops.se_bwd(torch.ones(2, 8, 3, 3), *arguments, 1)
    forward(good, torch.ones(2, 8))
    for sums in (torch.ones(2, 7), torch.ones(1, 8), torch.ones(2, 8, 1), torch.ones(2, 8).double()):
        with pytest.raises(RuntimeError, match="sums must hold a float32"):
            forward(good, sums)
    for grad, mask in ((torch.ones(2, 8, 3, 4), 1), (torch.ones(2, 8, 3, 3), 1 << 5)):
        with pytest.raises(RuntimeError):
            torch.ops.effops.se_bwd(grad, *good, mask)
    with pytest.raises(RuntimeError):
        torch.ops.effops.se_bwd(torch.ones(2, 8, 3, 3), *good[:2], None, *good[3:], 0b100)


# ---- module ---------------------------------------------------------------------------------------------------------


def test_widths_of_published_networks() -> None:
    """VGNet's and MobileNetV3's rule, which rounds to multiples of 8; parameters of mosaicml's form, without biases."""
    assert [effops.SqueezeExcite(c).reduce.out_channels for c in (16, 40, 56, 72, 120, 168, 672)] == [
        8, 16, 16, 24, 32, 40, 168,
    ]  # fmt: skip
    mosaicml = effops.SqueezeExcite(15, 2, bias=False)
    assert sum(p.numel() for p in mosaicml.parameters()) == 2 * 2 * 15


@pytest.mark.parametrize("gate", ("sigmoid", "hardsigmoid"))
def test_module_matches_its_twin(gate: str, se_backend: str) -> None:
    module = effops.SqueezeExcite(20, act="silu", gate=gate, backend=se_backend).double()
    twin = stock.SqueezeExcite(20, act="silu", gate=gate).double()
    twin.load_state_dict(module.state_dict())
    x = torch.randn(2, 20, 6, 5, dtype=torch.float64)
    torch.testing.assert_close(module(x), twin(x), rtol=1e-12, atol=1e-12)
    copies = (copy.deepcopy(module), pickle.loads(pickle.dumps(module)))
    assert all(torch.equal(other(x), module(x)) for other in copies)


def test_module_says_what_it_cannot_fuse() -> None:
    module = effops.SqueezeExcite(8, act=nn.Tanh)
    assert module.fusion_reasons() == ("act is Tanh(), which the kernels do not know",)
    called = []
    module.reduce.register_forward_hook(lambda *args: called.append(1))
    x = torch.randn(1, 8, 3, 3)
    twin = stock.SqueezeExcite(8, act=nn.Tanh)
    twin.load_state_dict(module.state_dict())
    torch.testing.assert_close(module(x), twin(x))
    assert called and "reduce has forward hooks" in repr(module)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"channels": 8, "gate": "relu"}, "unknown gate 'relu'; accepted: sigmoid, hardsigmoid"),
        ({"channels": 8, "ratio": 0}, "ratio must be above 0, got 0"),
        ({"channels": 0}, "channels must be at least 1, got 0"),
    ],
)
def test_module_errors(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match="SqueezeExcite: ") as caught:
        effops.SqueezeExcite(**arguments)
    assert str(caught.value) == f"SqueezeExcite: {message}"
