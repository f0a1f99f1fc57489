"""Blueprint separable convolutions: values, gradients, registration and messages of the operator."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import BS_CASES, BsCase, Epi, ids
from conftest import require_backend, require_share
from helpers import (
    BS_NAMES,
    KINKS,
    as_leaves,
    assert_within_budget,
    call,
    check_forward,
    check_gradients,
    generator,
    geometry_of,
    gradients,
    interpreted,
    lay_out,
    make_grad_output,
    make_tensors,
    oracle,
    present,
    to_float64,
)
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.export import Dim, export
from torch.utils.flop_counter import FlopCounterMode

import effops
import effops.functional as EF
from effops.ops.bsconv import KERNELS
from effops.ops.bsconv.reference import materialise

ops = torch.ops.effops
_ALL = {"bias": True, "scale": True, "shift": True}
FULL_CASE = BsCase(
    id="bs-full", c=7, k=9, m=3, h=8, w=7, mid=Epi(scale=True, shift=True),
    pw=Epi(**_ALL, activation="silu", post_activation="sigmoid"),
    epi=Epi(**_ALL, residual=True, activation="gelu", post_activation="silu"),
)  # fmt: skip
SMOOTH_CASES = [
    case
    for case in BS_CASES
    if not {case.pw.activation, case.pw.post_activation, case.epi.activation, case.epi.post_activation} & set(KINKS)
]
# Where the windows see more padding than map, torch's own float16 gradient is beyond the norm's bound.
HALF_CASES = [case for case in SMOOTH_CASES[::3] if "padding_above_kernel" not in case.id]


@pytest.fixture(params=("reference", "cpp", "triton", "cuda"))
def backend(request: pytest.FixtureRequest) -> str:
    """The backends that have the operator."""
    return require_share(request.param, request.node)


# ---- values and gradients -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float64), ids=str)
@pytest.mark.parametrize("case", BS_CASES, ids=ids(BS_CASES))
def test_forward(case: BsCase, dtype: torch.dtype, backend: str) -> None:
    check_forward(case, dtype, backend)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
@pytest.mark.parametrize("case", BS_CASES, ids=ids(BS_CASES))
def test_gradients(case: BsCase, dtype: torch.dtype, backend: str) -> None:
    check_gradients(case, dtype, backend)


@pytest.mark.parametrize("case", SMOOTH_CASES, ids=ids(SMOOTH_CASES))
def test_gradients_bfloat16(case: BsCase, cpp: str) -> None:
    check_gradients(case, torch.bfloat16, cpp)


@pytest.mark.parametrize("case", BS_CASES[::2], ids=ids(BS_CASES[::2]))
def test_forward_float16(case: BsCase, cuda: str) -> None:
    check_forward(case, torch.float16, cuda)


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=str)
@pytest.mark.parametrize("case", HALF_CASES, ids=ids(HALF_CASES))
def test_gradients_of_half_types(case: BsCase, dtype: torch.dtype, cuda: str) -> None:
    check_gradients(case, dtype, cuda)


@pytest.mark.parametrize(
    "name", ("k3s2-c28-56-odd_w-cl", "k3s1-c24-32-full-float_params", "k3s2-c4-9-padding_above_kernel")
)
def test_float16_in_triton(name: str, triton: str) -> None:
    (case,) = (case for case in BS_CASES if case.id == name)
    check_forward(case, torch.float16, triton)
    check_gradients(
        replace(case, epi=replace(case.epi, activation="silu", post_activation="none")), torch.float16, triton
    )


@pytest.mark.parametrize("threads", (2, 3))
@pytest.mark.parametrize(("n", "size", "channels"), ((1, 33, (40, 72)), (3, 20, (24, 40)), (1, 14, (64, 160))), ids=str)
@pytest.mark.parametrize("layout", ("contiguous", "channels_last"))
def test_threads(layout: str, n: int, size: int, channels: tuple[int, int], threads: int, cpp: str) -> None:
    """Bands of rows and ranges of channels: large enough for a share each, small enough to be odd ones."""
    torch.set_num_threads(threads)
    case = BsCase(id="threads", n=n, c=channels[0], k=channels[1], m=16, h=size, w=size + 1, layout=layout)
    for wanted in (case, replace(case, m=0, stride=(2, 2), epi=Epi(bias=True, activation="silu"))):
        check_forward(wanted, torch.float32, cpp)
        check_gradients(wanted, torch.float32, cpp)


_SMALL = {"n": 2, "c": 3, "k": 4, "h": 4, "w": 5}
CHECKED = [
    BsCase(id="plain", **_SMALL),
    BsCase(id="subspace-stride2-cl", m=2, stride=(2, 1), mid=Epi(scale=True, shift=True), layout="channels_last",
           **_SMALL),
    BsCase(id="relu-from_output", epi=Epi(bias=True, activation="relu"), pw=Epi(bias=True, activation="relu6"),
           **_SMALL),
    replace(FULL_CASE, id="full", h=3, w=4, c=2, k=2, m=2, n=1),
]  # fmt: skip


def check_derivatives(check: Callable, case: BsCase, backend: str) -> None:
    torch.set_num_threads(1)
    leaves = as_leaves(make_tensors(case, torch.float64, kink_free=True))
    names = present(leaves)

    def function(*values: Tensor) -> Tensor:
        return call({**leaves, **dict(zip(names, values, strict=True))}, case, backend)

    assert check(function, [leaves[name] for name in names], fast_mode=interpreted(backend))  # as in test_gradcheck.py


@pytest.mark.parametrize("case", CHECKED, ids=ids(CHECKED))
def test_gradcheck(case: BsCase, backend: str) -> None:
    check_derivatives(gradcheck, case, backend)


@pytest.mark.parametrize("case", CHECKED[1:], ids=ids(CHECKED[1:]))
def test_gradgradcheck(case: BsCase, backend: str) -> None:
    check_derivatives(gradgradcheck, case, backend)


# ---- what it is -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mid", (0, 3))
@pytest.mark.parametrize(("stride", "padding", "dilation"), (((1, 1), (1, 1), (1, 1)), ((2, 1), (2, 0), (1, 2))))
def test_is_a_dense_convolution(mid: int, stride: tuple, padding: tuple, dilation: tuple, backend: str) -> None:
    """The paper's Eq. 2 and 5: kernel k is one blueprint, scaled for each input channel."""
    x, dw = torch.randn(2, 5, 9, 8).double(), torch.randn(7, 1, 3, 3).double()
    pw = torch.randn(7, mid or 5, 1, 1).double()
    mid_weight = torch.randn(mid, 5, 1, 1).double() if mid else None
    out = EF.bs_conv2d(x, pw, dw, None, stride, padding, dilation, mid_weight=mid_weight, backend=backend)
    dense = F.conv2d(x, materialise(pw, dw, mid_weight), None, stride, padding, dilation)
    torch.testing.assert_close(out, dense, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("layout", ("contiguous", "channels_last"))
def test_padding_is_zero_behind_the_pointwise(layout: str, backend: str) -> None:
    """A map of zeros becomes pw_shift everywhere, and the window sees it inside the map alone."""
    x = lay_out(torch.zeros(1, 3, 4, 4), layout, torch.float32)
    out = EF.bs_conv2d(
        x, torch.randn(2, 3, 1, 1), torch.ones(2, 1, 3, 3), padding=1, pw_shift=torch.tensor([1.0, 2.0]),
        backend=backend,
    )  # fmt: skip
    seen = torch.tensor([4.0, 6, 6, 4, 6, 9, 9, 6, 6, 9, 9, 6, 4, 6, 6, 4]).reshape(1, 1, 4, 4)
    assert torch.equal(out, torch.cat([seen, 2 * seen], 1))


@pytest.mark.parametrize("layout", ("contiguous", "channels_last"))
def test_nonfinite_stays_in_its_receptive_field(layout: str, backend: str) -> None:
    case = BsCase(id="nonfinite", c=21, k=11, h=9, w=12, stride=(1, 2), layout=layout, epi=Epi(bias=True))
    tensors = make_tensors(case, torch.float32)
    tensors["input"][1, 2, 4, 5] = float("nan")
    expected = oracle(tensors, case)
    assert 0 < (~expected.isfinite()).sum() <= 6 * 11
    assert torch.equal(call(tensors, case, backend).isfinite(), expected.isfinite())


# ---- raw operators --------------------------------------------------------------------------------------------------


def raw_arguments(case: BsCase, tensors: dict, **changes: Any) -> dict[str, Any]:
    statics = {"geometry": geometry_of(case, tensors["input"]), "slopes": [case.pw.slope, case.epi.slope]}
    return {**tensors, **statics, **changes}


@pytest.mark.parametrize("name", ("cpp", "cuda"))
@pytest.mark.parametrize("layout", ("contiguous", "channels_last"))
def test_every_gradient_alone(layout: str, name: str) -> None:
    """In schema order, only those asked for, each right whatever else is asked for."""
    require_backend(name)
    case = replace(FULL_CASE, layout=layout)
    tensors = make_tensors(case, torch.float32)
    grad_output = make_grad_output(case, oracle(tensors, case).shape)
    _, truth = gradients(lambda t: oracle(t, case), to_float64(tensors), grad_output)
    _, yardstick = gradients(lambda t: oracle(t, case), tensors, grad_output)
    masks = [0, *(1 << bit for bit in range(13)), 8191, *torch.randint(1, 8192, (15,)).tolist()]
    for mask in masks:
        wanted = [name for bit, name in enumerate(BS_NAMES) if mask >> bit & 1]
        found = KERNELS[name].backward(grad_output.float(), None, **raw_arguments(case, tensors, mask=mask))
        for which, grad in zip(wanted, found, strict=True):
            assert_within_budget(grad, truth[which], yardstick[which], f"mask {mask:#x} gradient of {which}")


def test_every_gradient_alone_in_triton(triton: str) -> None:
    """The same bits whatever else is asked for."""
    case = replace(FULL_CASE, h=3, w=4, layout="channels_last")
    tensors = make_tensors(case, torch.float64)
    grad_output = make_grad_output(case, oracle(tensors, case).shape)
    every = ops.bsconv_bwd_triton(grad_output, None, **raw_arguments(case, tensors, mask=8191))
    for mask in (0, *(1 << bit for bit in range(13)), 0b1_0100_1000_1100):
        found = ops.bsconv_bwd_triton(grad_output, None, **raw_arguments(case, tensors, mask=mask))
        expected = [grad for bit, grad in enumerate(every) if mask >> bit & 1]
        assert len(found) == len(expected) and all(map(torch.equal, found, expected)), f"mask {mask:#x}"


@pytest.mark.parametrize("layout", ("transposed", "expand_space", "cl_odd_chunk"))
def test_grad_output_of_any_strides(layout: str, cpp: str) -> None:
    tensors = make_tensors(FULL_CASE, torch.float32)
    grad_output = lay_out(make_grad_output(FULL_CASE, oracle(tensors, FULL_CASE).shape), layout, torch.float32)
    _, truth = gradients(lambda t: oracle(t, FULL_CASE), to_float64(tensors), grad_output.double())
    _, yardstick = gradients(lambda t: oracle(t, FULL_CASE), tensors, grad_output)
    found = ops.bsconv_bwd(grad_output, None, **raw_arguments(FULL_CASE, tensors, mask=8191))
    for name, grad in zip(present(tensors), found, strict=True):
        assert_within_budget(grad, truth[name], yardstick[name], f"gradient of {name}")


BAD: dict[str, dict[str, Any]] = {
    "rank": {"input": torch.ones(2, 7, 8)},
    "mid_weight_takes_other_channels": {"mid_weight": torch.ones(3, 6, 1, 1)},
    "pw_weight_takes_other_channels": {"pw_weight": torch.ones(9, 4, 1, 1)},
    "pw_weight_3x3": {"pw_weight": torch.ones(9, 3, 3, 3)},
    "no_output_channel": {"pw_weight": torch.ones(0, 3, 1, 1)},
    "dw_weight_of_other_channels": {"dw_weight": torch.ones(8, 1, 3, 3)},
    "dw_weight_of_two_channels": {"dw_weight": torch.ones(9, 2, 3, 3)},
    "window_too_large": {"dw_weight": torch.ones(9, 1, 13, 3)},
    "mid_scale_length": {"mid_scale": torch.ones(9)},
    "mid_scale_without_mid_weight": {"mid_weight": None, "pw_weight": torch.ones(9, 7, 1, 1), "mid_shift": None},
    "pw_bias_length": {"pw_bias": torch.ones(3)},
    "bias_dtype": {"bias": torch.ones(9, dtype=torch.float64)},
    "residual_shape": {"residual": torch.ones(2, 9, 8, 8)},
    "weight_dtype": {"dw_weight": torch.ones(9, 1, 3, 3, dtype=torch.float64)},
    "multiplier": {"geometry": [1, 1, 1, 1, 1, 1, 1, 1, 2, 0, 0, 0, 0, 0]},
    "geometry_length": {"geometry": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0]},
    "geometry_stride": {"geometry": [0, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0]},
    "activation": {"geometry": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 9, 0]},
    "post_activation": {"geometry": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 9]},
    "slopes": {"slopes": [0.1]},
    "half": {"input": torch.ones(2, 7, 8, 7, dtype=torch.float16)},
}


@pytest.mark.parametrize("change", BAD)
def test_a_bad_raw_call_raises(change: str, cpp: str) -> None:
    tensors = make_tensors(FULL_CASE, torch.float32)
    ops.bsconv_fwd(**raw_arguments(FULL_CASE, tensors))  # is right without the change
    with pytest.raises(RuntimeError):
        ops.bsconv_fwd(**raw_arguments(FULL_CASE, tensors, **BAD[change]))
    grad_output = torch.ones(2, 9, 8, 7)
    with pytest.raises(RuntimeError):
        ops.bsconv_bwd(grad_output, None, **raw_arguments(FULL_CASE, tensors, mask=8191, **BAD[change]))


def test_a_bad_raw_backward_raises(cpp: str) -> None:
    tensors = make_tensors(FULL_CASE, torch.float32)
    arguments = raw_arguments(FULL_CASE, tensors)
    grad_output = torch.ones(2, 9, 8, 7)
    for changes in (
        {"grad_output": torch.ones(2, 9, 8, 8)},
        {"mask": 8192},
        {"mask": -1},
        {"output": grad_output},  # a gelu cannot be read off the output
        {"mid_weight": None, "mid_scale": None, "mid_shift": None, "pw_weight": torch.ones(9, 7, 1, 1), "mask": 2},
    ):
        with pytest.raises(RuntimeError):
            ops.bsconv_bwd(**{"grad_output": grad_output, "output": None, "mask": 1, **arguments, **changes})


# ---- registration ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ("contiguous", "channels_last"))
def test_opcheck(layout: str, cpp: str) -> None:
    case = replace(FULL_CASE, layout=layout, residual_layout=layout)
    tensors = make_tensors(case, torch.float32)
    arguments = tuple(raw_arguments(case, tensors).values())
    backward = (torch.ones(2, 9, 8, 7), None, *arguments)
    calls = [(ops.bsconv_fwd, arguments), (ops.bsconv_bwd, (*backward, 8191)), (ops.bsconv_bwd, (*backward, 4370))]
    for operator, given in calls:
        result = torch.library.opcheck(operator.default, given)
        assert set(result.values()) == {"SUCCESS"}, (operator, result)


def chain(x: Tensor, pw: Tensor, dw: Tensor, bias: Tensor, backend: str = "auto") -> Tensor:
    return EF.bs_conv2d(x, pw, dw, bias, padding=1, activation="relu", pw_shift=bias, backend=backend)


def leaves(batch: int) -> list[Tensor]:
    gen = generator(f"leaves {batch}")
    shapes = ((batch, 5, 7, 6), (6, 5, 1, 1), (6, 1, 3, 3), (6,))
    return [torch.randn(shape, generator=gen).requires_grad_() for shape in shapes]


def test_compile_fullgraph_with_a_dynamic_batch(backend: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(chain, fullgraph=True, backend="aot_eager", dynamic=True)
    for batch in (2, 3):
        found, expected = leaves(batch), leaves(batch)
        y, z = compiled(*found, backend), chain(*expected, backend)
        torch.testing.assert_close(y, z)
        for one, other in zip(torch.autograd.grad(y.sum(), found), torch.autograd.grad(z.sum(), expected), strict=True):
            torch.testing.assert_close(one, other)


def test_export_with_a_dynamic_batch(backend: str) -> None:
    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = effops.BSConvS(6, 8, 3, padding=1, backend=backend)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x)

    layer = Layer()
    program = export(layer, (torch.randn(2, 6, 9, 8),), dynamic_shapes=({0: Dim("n")},))
    x = torch.randn(5, 6, 9, 8)
    torch.testing.assert_close(program.module()(x), layer(x))


def test_autocast(backend: str) -> None:
    x, pw, dw, bias = (t.detach() for t in leaves(2))
    with torch.autocast("cpu", torch.bfloat16):
        out = EF.bs_conv2d(x, pw, dw, bias, padding=1, pw_shift=bias, backend=backend)
        assert F.conv2d(x, pw).dtype == out.dtype == torch.bfloat16
    half = (t.bfloat16() for t in (x, pw, dw, bias))
    expected = EF.bs_conv2d(*half, padding=1, pw_shift=bias, backend=backend)
    assert torch.equal(out, expected)


def test_bitwise_repeats(cpp: str) -> None:
    torch.set_num_threads(2)
    case = BsCase(id="repeat", n=3, c=24, k=72, m=8, h=30, w=29, layout="channels_last", epi=Epi(bias=True))
    tensors = make_tensors(case, torch.float32)
    grad_output = make_grad_output(case, (3, 72, 30, 29))
    first, again = (gradients(lambda t: call(t, case, cpp), tensors, grad_output) for _ in range(2))
    assert torch.equal(first[0], again[0])
    for name in first[1]:
        assert torch.equal(first[1][name], again[1][name]), name


def test_flops_are_two_a_multiply_accumulate(backend: str) -> None:
    """Of the unfused chain: both pointwise convolutions at the input's size, the depthwise at the output's."""
    x, mid, pw, dw = (torch.randn(shape) for shape in ((2, 6, 9, 8), (3, 6, 1, 1), (4, 3, 1, 1), (4, 1, 3, 3)))
    with FlopCounterMode(display=False) as counter:
        EF.bs_conv2d(x, pw, dw, None, 2, 1, mid_weight=mid, backend=backend)
    assert counter.get_total_flops() == 2 * 2 * (9 * 8 * (6 * 3 + 3 * 4) + 5 * 4 * 4 * 9)


def test_explain(cpp: str) -> None:
    x, pw, dw, _ = (t.detach() for t in leaves(1))
    (explained,) = effops.explain(lambda: EF.bs_conv2d(x, pw, dw, stride=2)).calls
    assert (explained.kernel, explained.output, explained.backend) == ("1x1 + 3x3 stride 2x2", "[1,6,3,2]", "cpp")


def test_a_plain_residual_takes_no_kernel(cpp: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, pw, dw, _ = (t.detach() for t in leaves(1))
    residual = torch.randn(1, 6, 7, 6, requires_grad=True)
    out = EF.bs_conv2d(x, pw, dw, padding=1, residual=residual, backend=cpp)
    monkeypatch.setattr(effops.ops.bsconv, "kernel_gradients", lambda *_: [None] * 13)
    (grad,) = torch.autograd.grad(out.sum(), residual)
    assert torch.equal(grad, torch.ones_like(residual))


# ---- memory ---------------------------------------------------------------------------------------------------------

# The kernel's own record of the resident set's peak (test_memory.py says why); effops first, since a peak only grows.
_PEAK = """
import torch
import effops.functional as EF
import torch.nn.functional as F

torch.set_num_threads(2)
def step(function, size):
    x = torch.ones(1, 8, size, size).contiguous(memory_format=torch.channels_last)
    leaves = [x, torch.ones(160, 8, 1, 1), torch.ones(160, 1, 3, 3)]
    y = function(*[t.requires_grad_() for t in leaves])
    return torch.autograd.grad(y.sum(), leaves)
def peak():
    (line,) = [line for line in open("/proc/self/status") if line.startswith("VmHWM")]
    return int(line.split()[1]) / 1024
def fused(x, pw, dw):
    return EF.bs_conv2d(x, pw, dw, None, 4, 1, backend="cpp")
def stock(x, pw, dw):
    return F.conv2d(F.conv2d(x, pw), dw, None, 4, 1, 1, 160)
for function in (fused, stock):
    step(function, 32)
    before = peak()
    step(function, 256)
    print(peak() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")
def test_peak_of_a_training_step_has_no_room_for_the_intermediate(cpp: str) -> None:
    """Input, output and their gradients are 9 MiB; the intermediate would be 40, and its gradient too."""
    root = Path(__file__).resolve().parent.parent
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), *sys.path])}
    command = [sys.executable, "-c", _PEAK]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr[-2000:]
    fused, stock = map(float, result.stdout.split())
    assert fused < 9 + 20, f"peak grows by {fused:.1f} MiB"
    assert stock > 40, f"the measure does not see the stock chain's intermediate: {stock:.1f} MiB"


# ---- messages -------------------------------------------------------------------------------------------------------


def bs(**changes: Any) -> Tensor:
    arguments = {
        "input": torch.ones(2, 8, 9, 10),
        "pw_weight": torch.ones(6, 8, 1, 1),
        "dw_weight": torch.ones(6, 1, 3, 3),
    }
    return EF.bs_conv2d(**{**arguments, **changes})


MESSAGES: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "input-kind": ({"input": 3}, TypeError, "input must be a tensor [N,C,H,W]; got 3 (int)"),
    "input-rank": (
        {"input": torch.ones(8, 9, 9)}, ValueError, "input must have 4 dimensions [N,C,H,W]; got 3: [8,9,9]",
    ),
    "input-empty": (
        {"input": torch.ones(2, 8, 0, 9)}, ValueError,
        "input must have positive sizes, only the batch may be 0; got [2,8,0,9]",
    ),
    "pw-kind": ({"pw_weight": None}, TypeError, "pw_weight must be a tensor [K,C,1,1]; got NoneType"),
    "pw-dtype": (
        {"pw_weight": torch.ones(6, 8, 1, 1).double()}, TypeError,
        "pw_weight has dtype torch.float64 but input has torch.float32; accepted: the input's dtype",
    ),
    "pw-rank": (
        {"pw_weight": torch.ones(6, 8)}, ValueError, "pw_weight must have 4 dimensions [K,C,1,1]; got 2: [6,8]",
    ),
    "pw-3x3": (
        {"pw_weight": torch.ones(6, 8, 3, 3)}, ValueError, "pw_weight must be [K,C,1,1] with K > 0; got [6,8,3,3]",
    ),
    "pw-channels": (
        {"pw_weight": torch.ones(6, 7, 1, 1)}, ValueError,
        "pw_weight takes 7 channels but input has 8; accepted: [K,8,1,1]",
    ),
    "pw-channels-of-mid": (
        {"mid_weight": torch.ones(3, 8, 1, 1)}, ValueError,
        "pw_weight takes 8 channels but mid_weight gives 3; accepted: [K,3,1,1]",
    ),
    "mid-channels": (
        {"mid_weight": torch.ones(3, 5, 1, 1)}, ValueError,
        "mid_weight takes 5 channels but input has 8; accepted: [M,8,1,1]",
    ),
    "mid_scale-alone": (
        {"mid_scale": torch.ones(3)}, ValueError, "mid_scale is given without mid_weight, whose result it belongs to",
    ),
    "mid_shift-length": (
        {"mid_weight": torch.ones(3, 8, 1, 1), "pw_weight": torch.ones(6, 3, 1, 1), "mid_shift": torch.ones(4)},
        ValueError, "mid_shift must be [3], one value an output channel; got [4]",
    ),
    "dw-kind": ({"dw_weight": "blur"}, TypeError, "dw_weight must be a tensor [K,1,R,S]; got 'blur' (str)"),
    "dw-channels": (
        {"dw_weight": torch.ones(12, 1, 3, 3)}, ValueError,
        "dw_weight has 12 kernels but pw_weight gives 6 channels; accepted: [6,1,R,S]",
    ),
    "dw-dense": (
        {"dw_weight": torch.ones(6, 2, 3, 3)}, ValueError,
        "dw_weight must be [K,1,R,S], one input channel a kernel; got [6,2,3,3]",
    ),
    "pw_bias-length": (
        {"pw_bias": torch.ones(8)}, ValueError, "pw_bias must be [6], one value an output channel; got [8]",
    ),
    "dw_bias-dtype": (
        {"dw_bias": torch.ones(6).double()}, TypeError,
        "dw_bias has dtype torch.float64; accepted: the input's torch.float32, or torch.float32",
    ),
    "residual-shape": (
        {"residual": torch.ones(2, 6, 9, 10)}, ValueError,
        "residual must be [2,6,7,8], the convolution's output shape; got [2,6,9,10]",
    ),
    "stride": ({"stride": 0}, ValueError, "stride must be at least 1; got 0"),
    "slope": ({"pw_negative_slope": "0"}, TypeError, "pw_negative_slope must be a number; got '0' (str)"),
    "activation": (
        {"pw_activation": "mish"}, ValueError,
        "unknown pw_activation 'mish'; accepted: none, relu, relu6, leaky_relu, silu, hardswish, hardsigmoid, sigmoid, "
        "gelu",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", MESSAGES)
def test_message(case: str) -> None:
    changes, kind, message = MESSAGES[case]
    with pytest.raises(kind) as caught:
        bs(**changes)
    assert type(caught.value) is kind
    assert str(caught.value).partition("\n")[0] == f"bs_conv2d: {message}"
