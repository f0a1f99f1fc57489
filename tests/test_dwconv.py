"""Depthwise convolution: values and gradients of every backend against the float64 oracle."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from cases import ACTIVATIONS, DW_CASES, DwCase, Epi, activation_cases, ids
from conftest import BACKENDS
from helpers import (
    KINKS,
    as_leaves,
    assert_within_budget,
    call,
    check_forward,
    check_gradients,
    gradients,
    interpreted,
    make_grad_output,
    make_tensors,
    memory_format_of,
    oracle,
    present,
    to_float64,
)

import effops.functional as EF
from effops import backends

ACTIVATION_CASES = activation_cases(DwCase)
DTYPES = (torch.float32, torch.bfloat16, torch.float64)


def smooth(case: DwCase) -> bool:
    """In bfloat16 values cannot be kept off a kink: rounding moves them across it, in torch's chain too."""
    return case.epi.activation not in KINKS and case.epi.post_activation not in KINKS


def test_every_backend_is_tested() -> None:
    """A backend added to the package without being added to the tests' fixture fails here."""
    assert set(BACKENDS) | {"auto"} == set(backends.names())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", DW_CASES, ids=ids(DW_CASES))
def test_forward(case: DwCase, dtype: torch.dtype, backend: str) -> None:
    check_forward(case, dtype, backend)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
@pytest.mark.parametrize("case", DW_CASES, ids=ids(DW_CASES))
def test_gradients(case: DwCase, dtype: torch.dtype, backend: str) -> None:
    check_gradients(case, dtype, backend)


@pytest.mark.parametrize("case", [c for c in DW_CASES if smooth(c)], ids=ids([c for c in DW_CASES if smooth(c)]))
def test_gradients_bfloat16(case: DwCase, backend: str) -> None:
    check_gradients(case, torch.bfloat16, backend)


@pytest.mark.parametrize("case", DW_CASES, ids=ids(DW_CASES))
def test_forward_float16(case: DwCase, float16_backend: str) -> None:
    check_forward(case, torch.float16, float16_backend)


@pytest.mark.parametrize("case", [c for c in DW_CASES if smooth(c)], ids=ids([c for c in DW_CASES if smooth(c)]))
def test_gradients_float16(case: DwCase, triton: str) -> None:
    """Not of the reference, which is torch: its own float16 sums over many pixels on a CPU pass the norm's bound."""
    check_gradients(case, torch.float16, triton)


@pytest.mark.parametrize("case", ACTIVATION_CASES, ids=ids(ACTIVATION_CASES))
def test_activations(case: DwCase, backend: str) -> None:
    check_forward(case, torch.float32, backend)
    check_gradients(case, torch.float32, backend)
    check_forward(case, torch.bfloat16, backend)


EVERYTHING = DwCase(
    id="everything", n=2, c=10, h=8, w=7, stride=(2, 1), bank=5,
    epi=Epi(bias=True, scale=True, shift=True, residual=True, activation="gelu", post_activation="leaky_relu"),
)  # fmt: skip


@pytest.mark.parametrize("layout", ("contiguous", "channels_last"))
@pytest.mark.parametrize("name", ("input", "weight", "bias", "scale", "shift", "residual"))
def test_one_gradient_alone(name: str, layout: str, backend: str) -> None:
    check_gradients(replace(EVERYTHING, layout=layout), torch.float32, backend, wanted=[name])


@pytest.mark.parametrize("layout", ("contiguous", "channels_last"))
@pytest.mark.parametrize("size", (3, 9, 13, 16, 23, 30, 45))
def test_sums_over_pixels(size: int, layout: str, backend: str) -> None:
    """Parameters' gradients sum over all pixels: one float32 chain of hundreds of terms loses more than torch does."""
    for seed in range(2 if interpreted(backend) else 6):
        case = DwCase(
            id=f"sums-{seed}", n=1, h=size, w=size, layout=layout, data="positive",
            epi=Epi(bias=True, scale=True, shift=True, activation="silu"),
        )  # fmt: skip
        check_gradients(case, torch.float32, backend)


def test_gradient_only_where_asked(backend: str) -> None:
    tensors = as_leaves(make_tensors(EVERYTHING, torch.float32, kink_free=True), ["weight", "shift"])
    call(tensors, EVERYTHING, backend).sum().backward()
    assert [name for name in tensors if tensors[name].grad is not None] == ["weight", "shift"]


def test_no_graph_without_need(backend: str) -> None:
    tensors = make_tensors(EVERYTHING, torch.float32)
    assert not call(tensors, EVERYTHING, backend).requires_grad
    leaves = as_leaves(tensors)
    with torch.no_grad():
        assert not call(leaves, EVERYTHING, backend).requires_grad
    assert call(leaves, EVERYTHING, backend).requires_grad


@pytest.mark.parametrize("layout", ("contiguous", "channels_last"))
@pytest.mark.parametrize("activation", ("relu", "relu6", "leaky_relu"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_derivative_at_the_kink_is_torchs(activation: str, layout: str, dtype: torch.dtype, backend: str) -> None:
    """Dead regions make exact zeros common: there the subgradient must be the one torch takes. Sums of small integers
    are exact in every order, so the arguments fall exactly on the kinks."""
    case = DwCase(id="kink", c=19, layout=layout, data="exact", epi=Epi(bias=True, activation=activation, slope=0.25))
    tensors = make_tensors(case, dtype)
    value = F.conv2d(tensors["input"], tensors["weight"], tensors["bias"], padding=1, groups=19)
    for kink in KINKS[activation]:
        assert (value == kink).sum() > 5
    grad_output = make_grad_output(case, value.shape)
    _, truth = gradients(lambda t: oracle(t, case), to_float64(tensors), grad_output)
    _, yardstick = gradients(lambda t: oracle(t, case), tensors, grad_output)
    _, actual = gradients(lambda t: call(t, case, backend), tensors, grad_output)
    for name in present(tensors):
        assert_within_budget(actual[name], truth[name], yardstick[name], f"{activation} gradient of {name}")


@pytest.mark.parametrize("layout", ("contiguous", "channels_last"))
@pytest.mark.parametrize("value", (float("nan"), float("inf")))
def test_nonfinite_stays_in_its_receptive_field(value: float, layout: str, backend: str) -> None:
    case = DwCase(id="nonfinite", c=21, h=9, w=12, stride=(1, 2), layout=layout, epi=Epi(bias=True))
    tensors = make_tensors(case, torch.float32)
    tensors["input"][1, 19, 4, 5] = value
    expected = oracle(tensors, case)
    assert 0 < (~expected.isfinite()).sum() <= 6
    assert torch.equal(call(tensors, case, backend).isfinite(), expected.isfinite())


def test_shared_bank(backend: str) -> None:
    """The gradient of a shared bank is the sum over its uses."""
    case = DwCase(id="shared", c=48, bank=6, layout="channels_last", epi=Epi(bias=True))
    tensors = make_tensors(case, torch.float32)
    grad_output = make_grad_output(case, (2, 48, 7, 9))

    def shared(t: dict) -> torch.Tensor:
        return EF.shared_depthwise_conv2d(t["input"], t["weight"], t["bias"], padding=1, backend=backend)

    out, actual = gradients(shared, tensors, grad_output)
    truth_out, truth = gradients(lambda t: oracle(t, case), to_float64(tensors), grad_output)
    yardstick_out, yardstick = gradients(lambda t: oracle(t, case), tensors, grad_output)
    assert_within_budget(out, truth_out, yardstick_out, "shared output")
    for name in ("input", "weight", "bias"):
        assert_within_budget(actual[name], truth[name], yardstick[name], f"shared gradient of {name}")


@pytest.mark.parametrize("channels", (8, 28, 3))
@pytest.mark.parametrize("stride", (1, 2))
def test_fixed_bank(channels: int, stride: int, backend: str) -> None:
    case = DwCase(id=f"fixed-{channels}", c=channels, bank=8, stride=(stride, stride), layout="channels_last")
    tensors = make_tensors(case, torch.float32)
    leaf = tensors["input"].requires_grad_()
    out = EF.fixed_filter_conv2d(leaf, tensors["weight"][:, 0], stride=stride, padding=1, backend=backend)
    double = to_float64(tensors)
    truth = oracle(double, case)
    assert_within_budget(out, truth, oracle(tensors, case), "fixed bank output")
    grad_output = make_grad_output(case, truth.shape)
    (grad,) = torch.autograd.grad(out, leaf, grad_output.float())
    _, expected = gradients(lambda t: oracle(t, case), double, grad_output, ["input"])
    _, yardstick = gradients(lambda t: oracle(t, case), tensors, grad_output, ["input"])
    assert_within_budget(grad, expected["input"], yardstick["input"], "fixed bank gradient")


@pytest.mark.parametrize("padding", (0, 2, (1, 2), (3, 0, 1, 2), "same", "valid"), ids=str)
def test_padding_forms(padding: int | tuple | str, backend: str) -> None:
    left_right_top_bottom = {
        0: (0, 0, 0, 0), 2: (2, 2, 2, 2), (1, 2): (2, 2, 1, 1), (3, 0, 1, 2): (3, 0, 1, 2), "same": (1, 1, 1, 1),
        "valid": (0, 0, 0, 0),
    }  # fmt: skip
    case = DwCase(id="padding", c=5, padding=left_right_top_bottom[padding])
    tensors = make_tensors(case, torch.float32)
    out = EF.depthwise_conv2d(tensors["input"], tensors["weight"], padding=padding, backend=backend)
    assert_within_budget(out, oracle(to_float64(tensors), case), oracle(tensors, case), f"padding {padding}")
    if not isinstance(padding, tuple) or len(padding) == 2:
        stock = F.conv2d(tensors["input"], tensors["weight"], padding=padding, groups=5)
        assert out.shape == stock.shape


def test_same_padding_of_even_kernels_is_torchs(backend: str) -> None:
    """torch puts the odd row and column after."""
    case = DwCase(id="same-even", c=6, kernel=(4, 2), padding=(0, 1, 1, 2))
    tensors = make_tensors(case, torch.float32)
    out = EF.depthwise_conv2d(tensors["input"], tensors["weight"], padding="same", backend=backend)
    stock = F.conv2d(tensors["input"], tensors["weight"], padding="same", groups=6)
    assert_within_budget(out, oracle(to_float64(tensors), case), stock, "same padding")


@pytest.mark.parametrize("shape", ((2, 1, 5, 4), (2, 6, 1, 1), (1, 1, 1, 1), (2, 1, 1, 5), (1, 6, 5, 1)), ids=str)
@pytest.mark.parametrize("memory_format", (torch.contiguous_format, torch.channels_last), ids=str)
def test_ambiguous_strides_follow_conv2d(shape: tuple, memory_format: torch.memory_format, backend: str) -> None:
    """C = 1 and H = W = 1 are contiguous and channels_last at once: F.conv2d decides by stride order, and so do we."""
    x = torch.randn(shape).contiguous(memory_format=memory_format)
    weight = torch.randn(shape[1], 1, 3, 3)
    out = EF.depthwise_conv2d(x, weight, padding=1, backend=backend)
    assert out.stride() == torch.empty(shape, memory_format=memory_format_of(x)).stride()
    torch.testing.assert_close(out, F.conv2d(x, weight, padding=1, groups=shape[1]))


# (No range lies in a tail alone, where torch's own results keep no relative precision.)
_RANGES = ((-0.01, 0.01), (-0.1, 0.1), (-1, 0), (0, 1), (-3, -1), (1, 3), (-7, -1), (3, 7), (-80, 0), (0, 80))


@pytest.mark.parametrize("bounds", _RANGES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS[1:])
def test_activation_over_a_range(activation: str, bounds: tuple[float, float], backend: str) -> None:
    """The activation alone, value and derivative, range by range: beside values of 6 an error at 0.01 is not seen."""
    count = 607 if interpreted(backend) else 6007
    values = torch.linspace(*bounds, count, dtype=torch.float64).float()
    for kink in KINKS.get(activation, ()):
        values = values[(values - kink).abs() > 1e-6]
    case = DwCase(id="range", n=1, c=1, h=1, w=len(values), kernel=(1, 1), padding=(0, 0, 0, 0))
    case = replace(case, epi=Epi(activation=activation, slope=0.1))
    tensors = {**dict.fromkeys(("bias", "scale", "shift", "residual")), "weight": torch.ones(1, 1, 1, 1)}
    tensors["input"] = values.reshape(1, 1, 1, -1)
    results = [
        gradients(function, given, torch.ones(1, 1, 1, len(values), dtype=torch.float64), ["input"])
        for function, given in (
            (lambda t: call(t, case, backend), tensors),
            (lambda t: oracle(t, case), to_float64(tensors)),
            (lambda t: oracle(t, case), tensors),
        )
    ]
    assert_within_budget(*(out for out, _ in results), f"{activation} on {bounds}")
    assert_within_budget(*(grads["input"] for _, grads in results), f"derivative of {activation} on {bounds}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS[1:])
def test_activation_of_huge_values(activation: str, dtype: torch.dtype, backend: str) -> None:
    """Saturated sigmoids are 0 or 1, not nearly so: 1e-38 times 3e38 is not nothing."""
    huge = torch.tensor([1e3, 1e10, 1e30, 3e38], dtype=dtype)
    for sign in (-1, 1):
        x = (sign * huge).reshape(1, 1, 1, -1).requires_grad_()
        out = EF.depthwise_conv2d(
            x, x.new_ones(1, 1, 1, 1), activation=activation, negative_slope=0.25, backend=backend
        )
        (grad,) = torch.autograd.grad(out.sum(), x)
        bounded = {"relu6": 6.0, "hardsigmoid": 1.0, "sigmoid": 1.0}
        if sign < 0:
            value, slope = (0.25 * x, 0.25) if activation == "leaky_relu" else (torch.zeros_like(x), 0.0)
        else:
            value = torch.full_like(x, bounded[activation]) if activation in bounded else x
            slope = float(activation not in bounded)
        if activation in ("hardswish", "gelu") and sign > 0:  # the product may overflow on its way to x, in torch too
            out, grad, value = out[..., :3], grad[..., :3], value[..., :3]
        torch.testing.assert_close(out, value.detach(), rtol=1e-6 if dtype != torch.bfloat16 else 1e-2, atol=1e-30)
        torch.testing.assert_close(grad, torch.full_like(grad, slope), rtol=0, atol=1e-30)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation_keeps_nan(activation: str, backend: str) -> None:
    x = torch.full((1, 3, 2, 9), float("nan"))
    epi = {"activation": activation, "post_activation": activation}
    assert EF.depthwise_conv2d(x, torch.ones(3, 1, 1, 1), **epi, backend=backend).isnan().all()
    ones = torch.ones(5, 3, 1, 1)
    assert EF.ds_conv2d(x, torch.ones(3, 1, 1, 1), ones, **epi, backend=backend).isnan().all()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the allocators' junk fill is set up on Linux only")
def test_poison_reaches_the_kernels(cpp: str) -> None:
    """What the suite's poison rests on: torch.empty holds NaN, with and without deterministic mode, and a kernel's
    output comes from the same allocator (the profiler sees only what it hands out)."""
    case = DW_CASES[4]
    tensors = make_tensors(case, torch.float32)
    assert torch.empty(1000).isnan().all()
    torch.use_deterministic_algorithms(False)
    assert torch.empty(1000).isnan().all()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        out = call(tensors, case, cpp)
    (event,) = [event for event in profile.events() if event.name == "effops::dwconv_fwd"]
    assert event.self_cpu_memory_usage == out.numel() * out.element_size()
