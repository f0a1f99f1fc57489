"""Depthwise-then-pointwise convolution: values and gradients of every backend against the float64 oracle."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from cases import DS_CASES, DsCase, Epi, activation_cases, ids
from helpers import (
    DS_NAMES,
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
    oracle,
    present,
    to_float64,
)

import effops.functional as EF

ACTIVATION_CASES = activation_cases(DsCase)
DTYPES = (torch.float32, torch.bfloat16, torch.float64)
SMOOTH_CASES = [
    case
    for case in DS_CASES
    if not {case.dw.activation, case.dw.post_activation, case.pw.activation, case.pw.post_activation} & set(KINKS)
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", DS_CASES, ids=ids(DS_CASES))
def test_forward(case: DsCase, dtype: torch.dtype, backend: str) -> None:
    check_forward(case, dtype, backend)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
@pytest.mark.parametrize("case", DS_CASES, ids=ids(DS_CASES))
def test_gradients(case: DsCase, dtype: torch.dtype, backend: str) -> None:
    check_gradients(case, dtype, backend)


@pytest.mark.parametrize("case", SMOOTH_CASES, ids=ids(SMOOTH_CASES))
def test_gradients_bfloat16(case: DsCase, backend: str) -> None:
    check_gradients(case, torch.bfloat16, backend)


@pytest.mark.parametrize("case", DS_CASES, ids=ids(DS_CASES))
def test_forward_float16(case: DsCase, float16_backend: str) -> None:
    check_forward(case, torch.float16, float16_backend)


@pytest.mark.parametrize("case", SMOOTH_CASES, ids=ids(SMOOTH_CASES))
def test_gradients_float16(case: DsCase, triton: str) -> None:
    """Not of the reference, which is torch: its own float16 sums over many pixels on a CPU pass the norm's bound."""
    check_gradients(case, torch.float16, triton)


@pytest.mark.parametrize("case", ACTIVATION_CASES, ids=ids(ACTIVATION_CASES))
def test_activations(case: DsCase, backend: str) -> None:
    check_forward(case, torch.float32, backend)
    check_gradients(case, torch.float32, backend)
    check_forward(case, torch.bfloat16, backend)


@pytest.mark.parametrize("keep", (0, 16))
@pytest.mark.parametrize("k", (32, 33), ids=("aligned", "not_aligned"))
def test_output_larger_than_the_caches(k: int, keep: int, cpp: str) -> None:
    """30 MB, which the C++ kernels write past the caches; whole cache lines and not."""
    case = DsCase(
        id="large", n=2, c=16, k=k, h=340, w=341, keep=keep, layout="channels_last",
        pw=Epi(bias=True, scale=True, shift=True, activation="relu6"),
    )  # fmt: skip
    check_forward(case, torch.float32, cpp)


_EPI = Epi(bias=True, scale=True, shift=True, residual=True, activation="gelu", post_activation="leaky_relu", slope=0.1)
EVERYTHING = DsCase(
    id="everything", n=2, c=10, k=13, h=8, w=7, stride=(2, 1), multiplier=2, bank=5, passthrough=3, keep=6,
    dw=_EPI, pw=replace(_EPI, slope=0.3),
)  # fmt: skip


@pytest.mark.parametrize("layout", ("contiguous", "channels_last"))
@pytest.mark.parametrize("name", DS_NAMES)
def test_one_gradient_alone(name: str, layout: str, backend: str) -> None:
    check_gradients(replace(EVERYTHING, layout=layout), torch.float32, backend, wanted=[name])


@pytest.mark.parametrize(
    "epi", (Epi(bias=True, activation="relu"), Epi(bias=True), Epi(scale=True)), ids=lambda e: e.parts
)
@pytest.mark.parametrize("wanted", (("input", "dw_weight"), ("pw_weight",), ("input",)), ids="+".join)
def test_some_gradients(wanted: tuple[str, ...], epi: Epi, backend: str) -> None:
    """Frozen parts, with the output saved (relu), recomputed (scale) or not needed (none)."""
    case = DsCase(id="some", c=17, k=19, layout="channels_last", dw=Epi(bias=True, activation="relu6"), pw=epi)
    check_gradients(case, torch.float32, backend, wanted=wanted)


@pytest.mark.parametrize("layout", ("contiguous", "channels_last"))
@pytest.mark.parametrize("size", (3, 9, 13, 16, 23, 30, 45))
def test_sums_over_pixels(size: int, layout: str, backend: str) -> None:
    """Parameters' gradients sum over all pixels: one float32 chain of hundreds of terms loses more than torch does."""
    for seed in range(2 if interpreted(backend) else 6):
        case = DsCase(
            id=f"sums-{seed}", n=1, k=9, h=size, w=size, layout=layout, data="positive",
            dw=Epi(bias=True, scale=True, shift=True), pw=Epi(bias=True, scale=True, shift=True, activation="silu"),
        )  # fmt: skip
        check_gradients(case, torch.float32, backend)


def test_gradient_only_where_asked(backend: str) -> None:
    tensors = as_leaves(make_tensors(EVERYTHING, torch.float32, kink_free=True), ["dw_weight", "passthrough", "shift"])
    call(tensors, EVERYTHING, backend).sum().backward()
    assert {name for name in tensors if tensors[name].grad is not None} == {"dw_weight", "passthrough", "shift"}


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
    """Small integers: every sum is exact in every order, so arguments of both activations fall exactly on the kinks."""
    epi = Epi(bias=True, activation=activation, slope=0.25)
    case = DsCase(id="kink", c=5, k=9, layout=layout, data="exact", dw=epi, pw=epi)
    tensors = make_tensors(case, dtype)
    stages: dict = {}
    oracle(tensors, case, stages)
    for value, _ in (stages["dw_bias"], stages["bias"]):
        for kink in KINKS[activation]:
            assert (value == kink).sum() > 0
    grad_output = make_grad_output(case, (2, 9, 7, 9))
    _, truth = gradients(lambda t: oracle(t, case), to_float64(tensors), grad_output)
    _, yardstick = gradients(lambda t: oracle(t, case), tensors, grad_output)
    _, actual = gradients(lambda t: call(t, case, backend), tensors, grad_output)
    for name in present(tensors):
        assert_within_budget(actual[name], truth[name], yardstick[name], f"{activation} gradient of {name}")


@pytest.mark.parametrize("layout", ("contiguous", "channels_last"))
@pytest.mark.parametrize("where", ("input", "passthrough"))
def test_nonfinite_stays_in_its_receptive_field(where: str, layout: str, backend: str) -> None:
    case = DsCase(
        id="nonfinite", c=21, k=11, passthrough=5, keep=4, h=9, w=12, stride=(1, 2), layout=layout,
        dw=Epi(bias=True), pw=Epi(bias=True),
    )  # fmt: skip
    tensors = make_tensors(case, torch.float32)
    tensors[where][1, 2, 4, 5] = float("nan")
    expected = oracle(tensors, case)
    assert 0 < (~expected.isfinite()).sum() <= 6 * 15
    assert torch.equal(call(tensors, case, backend).isfinite(), expected.isfinite())


def test_padding_is_zero_after_nothing_else(backend: str) -> None:
    """The depthwise bias and activation act on the border as on the rest, and never leak into the padding: a map of
    zeros gives act(bias) everywhere, border included."""
    bias = torch.tensor([1.5, -2.0, 3.0])
    pw_weight = torch.eye(3).reshape(3, 3, 1, 1)
    out = EF.ds_conv2d(
        torch.zeros(1, 3, 5, 6),
        torch.randn(3, 1, 3, 3),
        pw_weight,
        bias,
        padding=1,
        dw_activation="relu",
        backend=backend,
    )
    assert torch.equal(out, bias.relu().reshape(1, 3, 1, 1).expand(1, 3, 5, 6))


@pytest.mark.parametrize("layout", ("contiguous", "channels_last", "cl_chunk"))
@pytest.mark.parametrize(
    "epi", (Epi(), Epi(bias=True, scale=True, shift=True, activation="relu")), ids=lambda e: e.parts
)
def test_half_identity(epi: Epi, layout: str, backend: str) -> None:
    """VGNet's block: (right, pw(cat[left, dw(right)]))."""
    case = DsCase(
        id="half", c=14, k=14, passthrough=14, h=8, w=8, layout=layout, passthrough_layout=layout, pw=epi
    )  # fmt: skip
    tensors = make_tensors(case, torch.float32, kink_free=True)
    right_out = []

    def half(t: dict) -> torch.Tensor:
        right, new = EF.half_identity2d(
            t["passthrough"], t["input"], t["dw_weight"], t["pw_weight"], None, t["bias"], activation=epi.activation,
            scale=t["scale"], shift=t["shift"], backend=backend,
        )  # fmt: skip
        right_out.append((right, t["input"]))
        return new

    grad_output = make_grad_output(case, (2, 14, 8, 8))
    out, actual = gradients(half, tensors, grad_output)
    assert right_out[0][0] is right_out[0][1]
    truth_out, truth = gradients(lambda t: oracle(t, case), to_float64(tensors), grad_output)
    yardstick_out, yardstick = gradients(lambda t: oracle(t, case), tensors, grad_output)
    assert_within_budget(out, truth_out, yardstick_out, "half identity output")
    for name in actual:
        assert_within_budget(actual[name], truth[name], yardstick[name], f"half identity gradient of {name}")


@pytest.mark.parametrize("keep", (0, 5, 12))
@pytest.mark.parametrize("bank", (12, 1, 8))
def test_downsampling(bank: int, keep: int, backend: str) -> None:
    """VGNet's block: cat[y[:, -keep:], pw(y)] with y the depthwise result, of a learned or a fixed bank."""
    case = DsCase(id="down", c=12, k=10, h=9, w=8, stride=(2, 2), bank=bank, keep=keep, layout="channels_last")
    tensors = make_tensors(case, torch.float32)

    def down(t: dict) -> torch.Tensor:
        weight = t["dw_weight"] if bank == 12 else t["dw_weight"][:, 0]
        return EF.downsampling2d(t["input"], weight, t["pw_weight"], keep=keep, backend=backend)

    grad_output = make_grad_output(case, (2, keep + 10, 5, 4))
    out, actual = gradients(down, tensors, grad_output)
    truth_out, truth = gradients(lambda t: oracle(t, case), to_float64(tensors), grad_output)
    yardstick_out, yardstick = gradients(lambda t: oracle(t, case), tensors, grad_output)
    assert_within_budget(out, truth_out, yardstick_out, "downsampling output")
    for name in actual:
        assert_within_budget(actual[name], truth[name], yardstick[name], f"downsampling gradient of {name}")


def test_matches_two_stock_convolutions(backend: str) -> None:
    """The oracle aside: what a user would write with torch.nn.functional."""
    x = torch.randn(2, 6, 9, 8)
    dw_weight, pw_weight = torch.randn(6, 1, 3, 3), torch.randn(11, 6, 1, 1) / 6
    dw_bias, pw_bias = torch.randn(6), torch.randn(11)
    stock = F.conv2d(F.relu(F.conv2d(x, dw_weight, dw_bias, 2, 1, groups=6)), pw_weight, pw_bias)
    out = EF.ds_conv2d(x, dw_weight, pw_weight, dw_bias, pw_bias, 2, 1, dw_activation="relu", backend=backend)
    torch.testing.assert_close(out, stock)
