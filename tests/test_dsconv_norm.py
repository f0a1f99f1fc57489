"""Training batch norm behind the pointwise convolution, as a part of the operator: values, gradients, statistics.

The tensors `scale` and `shift` of a case are the norm's weight and bias.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from cases import DsCase, Epi, ids
from helpers import (
    Tensors,
    activate,
    as_leaves,
    assert_within_budget,
    gradients,
    interpreted,
    make_grad_output,
    make_tensors,
    oracle_depthwise,
    oracle_epilogue,
    present,
    to_float64,
)
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import effops.functional as EF
from effops.ops import dsconv

EPS, MOMENTUM = 1e-3, 0.3
_AFFINE = {"scale": True, "shift": True}

CASES = [
    DsCase(id="vgnet-28", c=28, k=28, h=9, w=11, passthrough=28, layout="channels_last",
           passthrough_layout="channels_last", pw=Epi(bias=True, activation="relu", **_AFFINE)),
    DsCase(id="small_map", n=3, c=40, k=56, h=7, w=7, passthrough=8, layout="channels_last",
           pw=Epi(bias=True, activation="relu6", **_AFFINE)),
    DsCase(id="nchw", c=17, k=19, h=10, w=9, pw=Epi(bias=True, activation="leaky_relu", slope=0.2, **_AFFINE)),
    DsCase(id="not_affine", c=12, k=9, layout="channels_last", pw=Epi(bias=True, activation="sigmoid")),
    DsCase(id="weight_alone", c=12, k=9, pw=Epi(activation="silu", scale=True)),
    DsCase(id="conv-norm-act", c=9, k=21, layout="channels_last", pw=Epi(post_activation="silu", **_AFFINE)),
    DsCase(id="residual", c=9, k=21, residual_layout="cl_odd_chunk", layout="channels_last",
           pw=Epi(activation="gelu", residual=True, **_AFFINE)),
    DsCase(id="residual-post", c=9, k=21, residual_layout="channels_last",
           pw=Epi(bias=True, activation="silu", post_activation="gelu", residual=True, **_AFFINE)),
    DsCase(id="keep", c=20, k=12, keep=14, stride=(2, 2), h=11, w=12, layout="channels_last",
           pw=Epi(bias=True, activation="relu", **_AFFINE)),
    DsCase(id="keep-nchw-residual", c=8, k=12, keep=8, h=11, w=12,
           pw=Epi(activation="silu", residual=True, post_activation="sigmoid", **_AFFINE)),
    DsCase(id="dw_epilogue-multiplier2", c=6, k=33, multiplier=2, bank=3, layout="channels_last",
           dw=Epi(bias=True, scale=True, shift=True, activation="silu"), pw=Epi(activation="silu", **_AFFINE)),
    DsCase(id="one_channel", n=5, c=1, k=1, h=4, w=3, pw=Epi(activation="silu", **_AFFINE)),
    DsCase(id="1x1_map", n=7, c=5, k=6, h=1, w=1, pw=Epi(activation="silu", **_AFFINE)),
    DsCase(id="wide_rows", n=1, c=16, k=8, h=3, w=400, layout="channels_last", pw=Epi(activation="silu", **_AFFINE)),
]  # fmt: skip


def _exact_norm(a: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    mean, var = a.mean((0, 2, 3), keepdim=True), a.var((0, 2, 3), unbiased=False, keepdim=True)
    y = (a - mean) * (var + EPS).rsqrt()
    y = y if weight is None else y * weight.view(1, -1, 1, 1)
    return y if bias is None else y + bias.view(1, -1, 1, 1)


def _torchs_norm(a: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    return F.batch_norm(a, None, None, weight, bias, True, 0.0, EPS)


def _torchs_norm_of_a_chunk(a: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """Of the last channels of a channels_last map, as a backend without a norm of its own meets them under `keep`."""
    whole = torch.cat([torch.zeros_like(a[:, :3]), a], 1).contiguous(memory_format=torch.channels_last)
    return _torchs_norm(whole[:, -a.shape[1] :], weight, bias)


def _torchs_norm_in_channels_last(a: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    return _torchs_norm(a.contiguous(memory_format=torch.channels_last), weight, bias)


def _activated(tensors: Tensors, case: DsCase) -> tuple[Tensor, Tensor]:
    """z = cat[passthrough, dw chain] and what the norm is taken of."""
    z = oracle_depthwise(tensors["input"], tensors["dw_weight"], tensors["dw_bias"], case)
    z = oracle_epilogue(z, tensors, "dw_", case.dw)
    if tensors["passthrough"] is not None:
        z = torch.cat([tensors["passthrough"], z], 1)
    return z, activate(F.conv2d(z, tensors["pw_weight"], tensors["bias"]), case.pw.activation, case.pw.slope)


def _oracle(tensors: Tensors, case: DsCase, norm: Callable[..., Tensor]) -> Tensor:
    z, activated = _activated(tensors, case)
    y = norm(activated, tensors["scale"], tensors["shift"])
    y = y if tensors["residual"] is None else y + tensors["residual"]
    y = activate(y, case.pw.post_activation, case.pw.slope)
    return torch.cat([z[:, z.shape[1] - case.keep :], y], 1) if case.keep else y


def _call(tensors: Tensors, case: DsCase, backend: str, running: tuple[Tensor, Tensor] = (None, None)) -> Tensor:
    dw = {f"dw_{name}": tensors[f"dw_{name}"] for name in ("scale", "shift", "residual")}
    channels = case.c * case.multiplier
    return EF.ds_conv2d(
        tensors["input"], tensors["dw_weight"], tensors["pw_weight"], tensors["dw_bias"], tensors["bias"],
        case.stride, case.padding, case.dilation, **dw, dw_activation=case.dw.activation,
        activation=case.pw.activation, negative_slope=case.pw.slope, residual=tensors["residual"],
        post_activation=case.pw.post_activation, passthrough=tensors["passthrough"], keep=case.keep,
        batch_norm=EF.BatchNorm(tensors["scale"], tensors["shift"], *running, MOMENTUM, EPS),
        dw_share=channels // case.bank if case.bank else 1, backend=backend,
    )  # fmt: skip


def _check(case: DsCase, dtype: torch.dtype, backend: str) -> None:
    tensors = make_tensors(case, dtype, kink_free=dtype != torch.bfloat16)
    running = [torch.full((case.k,), value, dtype=dtype) for value in (0.5, 2.0)]
    found = _call(tensors, case, backend, running)
    truth, yardstick = _oracle(to_float64(tensors), case, _exact_norm), _oracle(tensors, case, _torchs_norm)
    assert_within_budget(found, truth, yardstick, f"{case.id} {backend} output")

    _, exact = _activated(to_float64(tensors), case)
    _, torchs = _activated(tensors, case)
    statistics = [torch.full((case.k,), value, dtype=dtype) for value in (0.5, 2.0)]
    F.batch_norm(torchs, *statistics, training=True, momentum=MOMENTUM)
    expected = [torch.full((case.k,), value, dtype=torch.float64) for value in (0.5, 2.0)]
    F.batch_norm(exact, *expected, training=True, momentum=MOMENTUM)
    for name, actual, want, torchs_own in zip(("mean", "var"), running, expected, statistics, strict=True):
        assert_within_budget(actual, want, torchs_own, f"{case.id} {backend} running {name}")

    grad_output = make_grad_output(case, found.shape)
    _, truth = gradients(lambda t: _oracle(t, case, _exact_norm), to_float64(tensors), grad_output)
    norms = [_torchs_norm]
    if backend not in dsconv.NORM_KERNELS:  # such a backend takes torch's norm, whose kernels differ by memory format
        norms += [_torchs_norm_in_channels_last, _torchs_norm_of_a_chunk]
    yardsticks = [gradients(lambda t: _oracle(t, case, norm), tensors, grad_output)[1] for norm in norms]  # noqa: B023
    _, actual = gradients(lambda t: _call(t, case, backend), tensors, grad_output)
    for name in present(tensors):
        yardstick = max((found[name] for found in yardsticks), key=lambda y: (y - truth[name]).abs().max())  # noqa: B023
        assert_within_budget(actual[name], truth[name], yardstick, f"{case.id} {backend} gradient of {name}")


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
@pytest.mark.parametrize("case", CASES, ids=ids(CASES))
def test_matches_torch(case: DsCase, dtype: torch.dtype, backend: str) -> None:
    _check(case, dtype, backend)


@pytest.mark.parametrize("name", ("silu", "none"))
@pytest.mark.parametrize("layout", ("contiguous", "channels_last"))
def test_bfloat16(layout: str, name: str, cpp: str) -> None:
    """Activations without a kink: in bfloat16 no pre-activation keeps off one. (torch itself misses the norm bound.)"""
    case = DsCase(id="bf16", n=4, c=28, k=30, h=9, w=8, layout=layout, pw=Epi(activation=name, **_AFFINE))
    _check(case, torch.bfloat16, cpp)


@pytest.mark.parametrize("threads", (1, 2))
def test_many_tiles(threads: int, cpp: str) -> None:
    """(torch's channels_last norm itself misses the norm bound on as many pixels.)"""
    torch.set_num_threads(threads)
    epi = Epi(bias=True, activation="relu", **_AFFINE)
    _check(DsCase(id="many_tiles", n=2, c=33, k=47, h=45, w=44, layout="channels_last", pw=epi), torch.float32, cpp)


@pytest.mark.parametrize("name", ("vgnet-28", "keep-nchw-residual", "residual-post"))
def test_a_backend_without_the_norm_runs_it_behind(name: str, cpp: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dsconv, "NORM_KERNELS", {})
    (case,) = [case for case in CASES if case.id == name]
    _check(case, torch.float32, cpp)


@pytest.mark.parametrize("threads", (1, 2, 3))
def test_the_same_bits_every_time(threads: int, cpp: str) -> None:
    torch.set_num_threads(threads)
    case = DsCase(id="bits", n=3, c=28, k=28, h=30, w=29, layout="channels_last", pw=Epi(activation="relu", **_AFFINE))
    tensors = make_tensors(case, torch.float32)
    grad_output = make_grad_output(case, (3, 28, 30, 29))
    first = gradients(lambda t: _call(t, case, cpp), tensors, grad_output)
    for _ in range(3):
        again = gradients(lambda t: _call(t, case, cpp), tensors, grad_output)
        assert torch.equal(first[0], again[0])
        assert all(torch.equal(first[1][name], again[1][name]) for name in present(tensors))


@pytest.mark.parametrize("layout", ("contiguous", "channels_last"))
def test_large_mean(layout: str, cpp: str) -> None:
    """E[a^2] - E[a]^2 in float32 would leave nothing of the variance here."""
    case = DsCase(id="large", n=4, c=8, k=9, h=33, w=31, layout=layout, pw=Epi(bias=True, **_AFFINE))
    tensors = make_tensors(case, torch.float32)
    tensors["bias"] = tensors["bias"] + 1000
    running = [torch.zeros(9), torch.zeros(9)]
    _call(tensors, case, cpp, running)
    _, exact = _activated(to_float64(tensors), case)
    # At 1000 a value is rounded to 3e-5; of the variance, about 1, that leaves 1e-4 at worst.
    unbiased = exact.var((0, 2, 3)) * MOMENTUM
    assert ((running[1].double() - unbiased) / unbiased).abs().max() < 1e-4


@pytest.mark.parametrize("mask", ([], ["scale"], ["shift", "input"], ["pw_weight"], ["passthrough"]), ids="+".join)
def test_some_gradients(mask: list[str], backend: str) -> None:
    case = replace(CASES[0], id="some")
    tensors = make_tensors(case, torch.float32, kink_free=True)
    every = _call(as_leaves(tensors), case, backend)
    some = _call(leaves := as_leaves(tensors, mask), case, backend)
    assert some.requires_grad is bool(mask)
    if mask:
        some.sum().backward()
    assert [name for name in present(tensors) if leaves[name].grad is not None] == sorted(
        mask, key=present(tensors).index
    )
    torch.testing.assert_close(some, every)


_SMALL = {"n": 2, "c": 3, "h": 4, "w": 3, "k": 3}
GRADCHECK_CASES = [
    DsCase(id="relu-cl", passthrough=2, layout="channels_last",
           pw=Epi(bias=True, activation="relu", **_AFFINE), **_SMALL),
    DsCase(id="full", keep=2, dw=Epi(activation="silu"),
           pw=Epi(bias=True, activation="gelu", post_activation="silu", residual=True, **_AFFINE), **_SMALL),
    DsCase(id="conv-norm-act", pw=Epi(post_activation="sigmoid", residual=True), **_SMALL),
]  # fmt: skip


@pytest.mark.parametrize("check", (gradcheck, gradgradcheck), ids=("once", "twice"))
@pytest.mark.parametrize("case", GRADCHECK_CASES, ids=ids(GRADCHECK_CASES))
def test_gradcheck(case: DsCase, check: Callable[..., bool], backend: str) -> None:
    torch.set_num_threads(1)
    leaves = as_leaves(make_tensors(case, torch.float64, kink_free=True))
    names = present(leaves)

    def function(*values: Tensor) -> Tensor:
        return _call({**leaves, **dict(zip(names, values, strict=True))}, case, backend)

    # One random direction instead of the whole Jacobian for interpreted kernels, as in test_gradcheck.py.
    assert check(function, [leaves[name] for name in names], fast_mode=interpreted(backend))


def test_empty_batch_and_one_value_as_torch(backend: str) -> None:
    case = DsCase(id="edge", n=1, c=4, k=5, h=1, w=1, pw=Epi(**_AFFINE))
    tensors = make_tensors(case, torch.float32)
    with pytest.raises(
        ValueError, match=r"Expected more than 1 value per channel when training, got input size .*5, 1, 1"
    ):
        _call(tensors, case, backend)
    tensors["input"] = tensors["input"][:0]
    assert _call(tensors, case, backend).shape == (0, 5, 1, 1)


def test_no_leak_of_the_statistics_graph(backend: str) -> None:
    """Running statistics are buffers: nothing of the graph may hang on them."""
    case = CASES[0]
    tensors = as_leaves(make_tensors(case, torch.float32))
    running = [torch.zeros(case.k), torch.ones(case.k)]
    _call(tensors, case, backend, running).sum().backward()
    assert not any(statistic.requires_grad for statistic in running)
