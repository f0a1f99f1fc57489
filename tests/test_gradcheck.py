"""gradcheck and gradgradcheck in float64: every operator, every backend, every tensor at once."""

from __future__ import annotations

import pytest
import torch
from cases import DsCase, DwCase, Epi, ids
from helpers import (
    as_leaves,
    assert_within_budget,
    call,
    draw,
    generator,
    interpreted,
    make_tensors,
    oracle_stats,
    present,
    stats_call,
    to_float64,
)
from torch.autograd import gradcheck, gradgradcheck


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Thousands of tiny calls: waking a second thread for each would take most of the time."""
    torch.set_num_threads(1)


_SMALL = {"n": 2, "c": 3, "h": 4, "w": 5}
_TINY = {"n": 1, "c": 2, "h": 3, "w": 4}
_ALL = {"bias": True, "scale": True, "shift": True, "residual": True}

DW_CASES = [
    DwCase(id="plain", **_SMALL),
    DwCase(id="bias-relu-from_output", epi=Epi(bias=True, activation="relu"), **_SMALL),
    DwCase(id="sigmoid-from_output", epi=Epi(activation="sigmoid"), layout="channels_last", **_SMALL),
    DwCase(id="leaky-from_output", epi=Epi(bias=True, activation="leaky_relu", slope=0.3), **_SMALL),
    DwCase(id="leaky-slope0", epi=Epi(bias=True, activation="leaky_relu", slope=0.0), **_SMALL),
    DwCase(id="leaky-negative_slope_below_0", epi=Epi(bias=True, activation="leaky_relu", slope=-0.5), **_SMALL),
    DwCase(id="full-silu-relu6", epi=Epi(**_ALL, activation="silu", post_activation="relu6"), **_SMALL),
    DwCase(id="full-gelu-sigmoid-cl", epi=Epi(**_ALL, activation="gelu", post_activation="sigmoid"),
           layout="channels_last", residual_layout="channels_last", **_SMALL),
    DwCase(id="hardswish-hardsigmoid", epi=Epi(**_ALL, activation="hardswish", post_activation="hardsigmoid"),
           **_SMALL),
    DwCase(id="stride2-asymmetric", stride=(2, 1), padding=(0, 2, 1, 0), epi=Epi(bias=True), **_SMALL),
    DwCase(id="dilation2-k3x2", kernel=(3, 2), dilation=(2, 1), padding=(1, 0, 2, 2), layout="channels_last", **_SMALL),
    DwCase(id="multiplier2", multiplier=2, epi=Epi(bias=True, scale=True), **_SMALL),
    DwCase(id="bank1", bank=1, layout="channels_last", **_SMALL),
    DwCase(id="bank2-does_not_divide", bank=2, epi=Epi(**_ALL), **_SMALL),
    DwCase(id="cl_chunk", layout="cl_odd_chunk", epi=Epi(bias=True, activation="gelu"), **_SMALL),
]  # fmt: skip

DS_CASES = [
    DsCase(id="plain", k=4, **_SMALL),
    DsCase(id="relu6-relu6", k=4, dw=Epi(bias=True, activation="relu6"), pw=Epi(bias=True, activation="relu6"),
           **_SMALL),
    DsCase(id="leaky-leaky-two_slopes-cl", k=4, dw=Epi(bias=True, activation="leaky_relu", slope=0.2),
           pw=Epi(bias=True, activation="leaky_relu", slope=0.4), layout="channels_last", **_SMALL),
    DsCase(id="full-full", k=3, dw=Epi(**_ALL, activation="gelu", post_activation="silu"),
           pw=Epi(**_ALL, activation="hardswish", post_activation="sigmoid"), **_SMALL),
    DsCase(id="passthrough-cl", k=3, passthrough=2, layout="channels_last", passthrough_layout="cl_odd_chunk",
           pw=Epi(scale=True, shift=True, activation="silu"), **_SMALL),
    DsCase(id="keep-stride2", k=3, keep=2, stride=(2, 2), pw=Epi(bias=True, activation="sigmoid"), **_SMALL),
    DsCase(id="passthrough-keep-full", k=3, passthrough=2, keep=2, dw=Epi(**_ALL, activation="silu"),
           pw=Epi(**_ALL, post_activation="gelu"), layout="channels_last", **_SMALL),
    DsCase(id="passthrough-keep_all-multiplier2", k=2, passthrough=1, keep=6, multiplier=2, bank=3,
           dw=Epi(bias=True, post_activation="gelu"), pw=Epi(bias=True), **_SMALL),
    DsCase(id="bank2-dilation2", k=3, bank=2, dilation=(2, 2), padding=(2, 2, 2, 2), **_SMALL),
    DsCase(id="bn_between", k=3, dw=Epi(scale=True, shift=True, post_activation="relu"), layout="channels_last",
           **_SMALL),
]  # fmt: skip

DOUBLE_DW_CASES = [
    DwCase(id="plain", **_TINY),
    DwCase(id="full-silu-gelu", epi=Epi(**_ALL, activation="silu", post_activation="gelu"), **_TINY),
    DwCase(id="sigmoid-from_output-cl", epi=Epi(bias=True, activation="sigmoid"), layout="channels_last", **_TINY),
    DwCase(id="relu-stride2-bank1", bank=1, stride=(2, 1), epi=Epi(bias=True, activation="relu"), **_TINY),
]

DOUBLE_DS_CASES = [
    DsCase(id="plain", k=2, **_TINY),
    DsCase(id="full", k=2, dw=Epi(**_ALL, activation="gelu"), pw=Epi(**_ALL, post_activation="silu"), **_TINY),
    DsCase(id="passthrough-keep-sigmoid-cl", k=2, passthrough=1, keep=1, layout="channels_last",
           dw=Epi(bias=True, activation="silu"), pw=Epi(bias=True, activation="sigmoid"), **_TINY),
]  # fmt: skip

STATS_CASES = [
    DwCase(id="plain", **_SMALL),
    DwCase(id="bias-stride2-cl", stride=(2, 1), epi=Epi(bias=True), layout="channels_last", **_SMALL),
    DwCase(id="multiplier2-bank4", multiplier=2, bank=3, epi=Epi(bias=True), **_SMALL),
]


def _check(check, function, values: list[torch.Tensor], backend: str) -> None:
    """One random direction instead of the whole Jacobian for interpreted kernels: 4 calls, not 500 of 0.1 s."""
    assert check(function, values, fast_mode=interpreted(backend))


def _check_layer(check, case: DwCase | DsCase, backend: str) -> None:
    leaves = as_leaves(make_tensors(case, torch.float64, kink_free=True))
    names = present(leaves)

    def function(*values: torch.Tensor) -> torch.Tensor:
        return call({**leaves, **dict(zip(names, values, strict=True))}, case, backend)

    _check(check, function, [leaves[name] for name in names], backend)


@pytest.mark.parametrize("case", DW_CASES, ids=ids(DW_CASES))
def test_dwconv(case: DwCase, backend: str) -> None:
    _check_layer(gradcheck, case, backend)


@pytest.mark.parametrize("case", DS_CASES, ids=ids(DS_CASES))
def test_dsconv(case: DsCase, backend: str) -> None:
    _check_layer(gradcheck, case, backend)


@pytest.mark.parametrize("case", DOUBLE_DW_CASES, ids=ids(DOUBLE_DW_CASES))
def test_dwconv_twice(case: DwCase, backend: str) -> None:
    _check_layer(gradgradcheck, case, backend)


@pytest.mark.parametrize("case", DOUBLE_DS_CASES, ids=ids(DOUBLE_DS_CASES))
def test_dsconv_twice(case: DsCase, backend: str) -> None:
    _check_layer(gradgradcheck, case, backend)


@pytest.mark.parametrize("check", (gradcheck, gradgradcheck), ids=("once", "twice"))
@pytest.mark.parametrize("case", STATS_CASES, ids=ids(STATS_CASES))
def test_stats(case: DwCase, check, backend: str) -> None:
    leaves = as_leaves(make_tensors(case, torch.float64))
    names = present(leaves)

    def function(*values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return stats_call({**leaves, **dict(zip(names, values, strict=True))}, case, backend)

    _check(check, function, [leaves[name] for name in names], backend)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float64), ids=str)
@pytest.mark.parametrize("case", STATS_CASES, ids=ids(STATS_CASES))
def test_stats_values(case: DwCase, dtype: torch.dtype, backend: str) -> None:
    tensors = make_tensors(case, dtype)
    found = stats_call(tensors, case, backend)
    truth, yardstick = oracle_stats(to_float64(tensors), case), oracle_stats(tensors, case)
    for name, actual, expected, measure in zip(("mean", "var"), found, truth, yardstick, strict=True):
        assert actual.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert_within_budget(actual, expected, measure, f"{case.id} {backend} {name}", computed_in=dtype)


def test_stats_of_a_large_mean(backend: str) -> None:
    """E[u^2] - E[u]^2 in float32 would leave nothing of the variance here."""
    case = DwCase(id="large-mean", n=4, c=8, h=33, w=31, layout="channels_last", padding=(0, 0, 0, 0))
    tensors = make_tensors(case, torch.float32)
    tensors["input"] = tensors["input"] + 1000
    tensors["weight"] = tensors["weight"].abs() + 0.1
    truth = oracle_stats(to_float64(tensors), case)
    yardstick = oracle_stats(tensors, case)
    mean, var = stats_call(tensors, case, backend)
    assert_within_budget(mean, truth[0], yardstick[0], "mean")
    relative = ((var.double() - truth[1]).abs() / truth[1]).max().item()
    torch_relative = ((yardstick[1].double() - truth[1]).abs() / truth[1]).max().item()
    # The convolution itself rounds at 1000 * 9 * eps; statistics may not add to what torch's own variance loses.
    assert relative <= max(4 * torch_relative, 1e-4), f"variance off by {relative:.1e}, torch's by {torch_relative:.1e}"


def test_half_a_gradient_twice(backend: str) -> None:
    """Gradient penalty: a second derivative through some inputs only."""
    case = DsCase(id="penalty", k=3, pw=Epi(bias=True, activation="silu"), **_SMALL)
    leaves = as_leaves(make_tensors(case, torch.float64), ["input", "pw_weight"])
    out = call(leaves, case, backend)
    weights = draw(out.shape, generator("penalty"), "normal")
    (grad,) = torch.autograd.grad((out * weights).sum(), leaves["input"], create_graph=True)
    (second,) = torch.autograd.grad(grad.square().sum(), leaves["pw_weight"])
    twin = as_leaves(leaves, ["input", "pw_weight"])
    out = call(twin, case, "reference")
    (grad,) = torch.autograd.grad((out * weights).sum(), twin["input"], create_graph=True)
    (expected,) = torch.autograd.grad(grad.square().sum(), twin["pw_weight"])
    torch.testing.assert_close(second, expected, rtol=1e-10, atol=1e-12)
