"""Inverted residuals: values and gradients by the budget, registration, messages."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import ACTIVATIONS, Epi, ids
from conftest import require_backend, require_share
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
    oracle_epilogue,
    present,
    sized_for,
    to_float64,
)
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import effops.functional as EF
from effops import backends


@pytest.fixture(params=("reference", "cpp", "triton", "cuda"))
def mb_backend(request: pytest.FixtureRequest) -> str:
    """The backends with kernels for it, and the reference."""
    return require_share(request.param, request.node)


@pytest.fixture(params=("cpp", "cuda"))
def kernels(request: pytest.FixtureRequest) -> str:
    require_backend(request.param)
    return request.param


@dataclass(frozen=True, kw_only=True)
class Case:
    id: str
    n: int = 2
    c: int = 8
    d: int | None = 24  # expanded channels; None: no expansion
    k: int = 8
    h: int = 7
    w: int = 9
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (1, 1, 1, 1)  # left, right, top, bottom
    dilation: tuple[int, int] = (1, 1)
    layout: str = "contiguous"
    residual_layout: str = "contiguous"
    se: int = 0  # channels between the products of the squeeze-excite
    se_activation: str = "relu"
    se_gate: str = "sigmoid"
    interpreted: tuple[int, int] | None = None  # h and w for interpreted kernels
    expand: Epi = field(default_factory=Epi)
    dw: Epi = field(default_factory=Epi)
    pw: Epi = field(default_factory=Epi)
    data: str = "normal"

    @property
    def hidden(self) -> int:
        return self.d or self.c

    @property
    def out(self) -> tuple[int, int, int, int]:
        left, right, top, bottom = self.padding
        p = (self.h + top + bottom - self.dilation[0] * (self.kernel[0] - 1) - 1) // self.stride[0] + 1
        q = (self.w + left + right - self.dilation[1] * (self.kernel[1] - 1) - 1) // self.stride[1] + 1
        return self.n, self.k, p, q


BN6 = Epi(scale=True, shift=True, post_activation="relu6")  # a batch norm, then an activation
SMOOTH = Epi(bias=True, scale=True, shift=True, activation="silu", post_activation="gelu")
SILU = Epi(scale=True, shift=True, post_activation="silu")
LINEAR = Epi(scale=True, shift=True)
ADD = Epi(scale=True, shift=True, residual=True)
CL = {"layout": "channels_last", "residual_layout": "channels_last"}

CASES = [
    Case(id="plain-nchw"),
    Case(id="c1-d1-1x1_map", n=1, c=1, d=1, k=1, h=1, w=1),
    Case(id="mobilenet-cl", c=16, d=96, k=16, expand=BN6, dw=BN6, pw=ADD, **CL),
    Case(id="mobilenet-nchw", c=16, d=96, k=16, expand=BN6, dw=BN6, pw=ADD),
    Case(id="mobilenet-s2-odd", c=24, d=144, k=32, h=13, w=11, stride=(2, 2), expand=BN6, dw=BN6, pw=LINEAR, **CL),
    # Larger than one group of rows, in several bands and with a ring that wraps.
    Case(id="mobilenet-56-rings", n=3, c=16, d=72, k=24, h=45, w=56, expand=BN6, dw=BN6, pw=LINEAR,
         interpreted=(9, 13), **CL),
    Case(id="s2-112-rings", n=1, c=8, d=40, k=24, h=41, w=112, stride=(2, 2), expand=BN6, dw=BN6, pw=LINEAR,
         interpreted=(19, 25), **CL),
    Case(id="14x14-panels", n=1, c=32, d=208, k=40, h=14, w=14, expand=BN6, dw=BN6, pw=LINEAR,
         interpreted=(5, 7), **CL),
    Case(id="14x14-panels-nchw", n=1, c=32, d=176, k=32, h=14, w=14, expand=BN6, dw=BN6, pw=ADD, interpreted=(6, 5)),
    Case(id="7x7-n5", n=5, c=20, d=130, k=33, h=7, w=7, expand=BN6, dw=BN6, pw=LINEAR, interpreted=(3, 4), **CL),
    Case(id="odd_channels-general_epilogues", c=13, d=37, k=19, expand=SMOOTH, dw=SMOOTH, pw=SMOOTH),
    Case(id="full-cl", c=9, d=50, k=9, expand=SMOOTH, dw=SMOOTH, **CL,
         pw=Epi(bias=True, scale=True, shift=True, residual=True, activation="sigmoid", post_activation="silu")),
    Case(id="act-then-affine", c=9, d=40, k=12, expand=Epi(bias=True, activation="silu", scale=True), **CL,
         dw=Epi(bias=True, activation="silu", shift=True), pw=Epi(bias=True, activation="silu", scale=True)),
    Case(id="bias_relu", c=10, d=33, k=7, expand=Epi(bias=True, activation="relu"), **CL,
         dw=Epi(bias=True, activation="relu"), pw=Epi(bias=True, activation="relu")),
    Case(id="k5s2-dilated", c=8, d=48, k=16, h=15, w=14, kernel=(5, 5), stride=(2, 2), padding=(4, 4, 4, 4),
         dilation=(2, 2), expand=SILU, dw=SILU, pw=LINEAR, **CL),
    Case(id="k1x3-asymmetric", c=8, d=20, k=12, kernel=(1, 3), padding=(2, 0, 0, 1), expand=SILU, dw=SILU),
    Case(id="padding_above_kernel", c=8, d=20, k=12, h=4, w=3, padding=(5, 4, 4, 6), expand=SMOOTH, dw=SMOOTH, **CL),
    Case(id="stride_above_kernel", c=8, d=20, k=12, h=11, w=13, stride=(4, 5), expand=SILU, dw=SILU, **CL),
    Case(id="no_padding", c=8, d=20, k=12, padding=(0, 0, 0, 0), expand=BN6, dw=BN6, **CL),
    Case(id="batch0", n=0, expand=SILU, dw=SILU, pw=ADD, se=4),
    Case(id="cl_odd_chunk", c=21, d=64, k=21, layout="cl_odd_chunk", residual_layout="cl_chunk", expand=BN6, pw=ADD),
    Case(id="cl_crop", c=16, d=64, k=24, layout="cl_crop", residual_layout="cl_crop", expand=BN6, pw=ADD),
    Case(id="every_second", c=6, d=20, k=9, layout="every_second", residual_layout="transposed", pw=ADD),
    Case(id="expanded_inputs", n=3, c=6, d=20, k=9, layout="expand_batch", residual_layout="expand_space", pw=ADD),
    Case(id="one_long_row", n=1, c=12, d=40, k=16, h=1, w=700, expand=BN6, dw=BN6, interpreted=(1, 90), **CL),
    Case(id="se-nchw", c=8, d=40, k=10, se=10, expand=SILU, dw=SILU, pw=LINEAR),
    Case(id="se-v3-cl", c=16, d=72, k=24, h=15, w=13, kernel=(5, 5), stride=(2, 2), padding=(2, 2, 2, 2), se=24,
         se_gate="hardsigmoid", expand=BN6, dw=BN6, pw=LINEAR, **CL),
    Case(id="se-one_image", n=1, c=16, d=96, k=16, h=30, w=28, se=8, se_activation="silu", expand=SILU, dw=SILU, pw=ADD,
         interpreted=(11, 12), **CL),
    Case(id="se-no_expansion-cl", c=32, d=None, k=16, h=20, w=18, se=8, se_activation="silu", dw=SILU, pw=LINEAR, **CL),
    Case(id="se-no_expansion-nchw", n=1, c=19, d=None, k=16, h=20, w=18, se=8, dw=BN6, pw=LINEAR),
    Case(id="no_expansion", c=32, d=None, k=16, dw=BN6, pw=LINEAR, **CL),
]  # fmt: skip


def make_tensors(case: Case, dtype: torch.dtype) -> dict[str, Tensor | None]:
    """By the names of the public function; absent ones are None."""
    gen = generator(f"mbconv-{case.id}")
    kh, kw = case.kernel

    def weight(*shape: int) -> Tensor:
        return draw(shape, gen, case.data, (shape[1] * shape[2] * shape[3]) ** -0.5).to(dtype)

    def vectors(prefix: str, epi: Epi, channels: int) -> dict[str, Tensor | None]:
        return {
            prefix + name: (draw((channels,), gen, case.data) * 0.5 + 1).to(dtype) if getattr(epi, name) else None
            for name in ("bias", "scale", "shift")
        }

    shape = (case.n, case.c, case.h, case.w)
    t: dict[str, Tensor | None] = {"input": lay_out(draw(shape, gen, case.data, mean=1.0), case.layout, dtype)}
    t["expand_weight"] = weight(case.d, case.c, 1, 1) if case.d else None
    t |= vectors("expand_", case.expand if case.d else Epi(), case.hidden)
    t["dw_weight"] = weight(case.hidden, 1, kh, kw)
    t |= vectors("dw_", case.dw, case.hidden)
    for name in ("se_reduce_weight", "se_reduce_bias", "se_expand_weight", "se_expand_bias"):
        t[name] = None
    if case.se:
        t["se_reduce_weight"] = weight(case.se, case.hidden, 1, 1)
        t["se_reduce_bias"] = (draw((case.se,), gen, case.data) + 0.5).to(dtype)
        t["se_expand_weight"] = weight(case.hidden, case.se, 1, 1)
        t["se_expand_bias"] = draw((case.hidden,), gen, case.data).to(dtype)
    t["project_weight"] = weight(case.k, case.hidden, 1, 1)
    t |= vectors("", case.pw, case.k)
    residual = lay_out(draw(case.out, gen, case.data, mean=1.0), case.residual_layout, dtype)
    t["residual"] = residual if case.pw.residual else None
    return t


def oracle(t: dict[str, Tensor | None], case: Case) -> Tensor:
    t = t | {"expand_residual": None, "dw_residual": None}
    e = t["input"]
    if case.d:
        e = oracle_epilogue(F.conv2d(e, t["expand_weight"], t["expand_bias"]), t, "expand_", case.expand)
    u = F.conv2d(F.pad(e, case.padding), t["dw_weight"], t["dw_bias"], case.stride, 0, case.dilation, case.hidden)
    z = oracle_epilogue(u, t, "dw_", case.dw)
    if case.se:
        inner = F.conv2d(z.mean((2, 3), True), t["se_reduce_weight"], t["se_reduce_bias"])
        outer = F.conv2d(activate(inner, case.se_activation, 0.01), t["se_expand_weight"], t["se_expand_bias"])
        z = z * activate(outer, case.se_gate, 0.01)
    return oracle_epilogue(F.conv2d(z, t["project_weight"], t["bias"]), t, "", case.pw)


def call(t: dict[str, Tensor | None], case: Case, backend: str) -> Tensor:
    named = dict(t)
    named["project_bias"] = named.pop("bias")
    codes: dict[str, Any] = {"se_activation": case.se_activation, "se_gate": case.se_gate}
    for prefix, epi in (("expand_", case.expand if case.d else Epi()), ("dw_", case.dw), ("", case.pw)):
        codes |= {f"{prefix}activation": epi.activation, f"{prefix}post_activation": epi.post_activation}
        codes[f"{prefix}negative_slope"] = epi.slope
    window = {"stride": case.stride, "padding": case.padding, "dilation": case.dilation}
    return EF.inverted_residual2d(**named, **codes, **window, backend=backend)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float64), ids=str)
@pytest.mark.parametrize("case", CASES, ids=ids(CASES))
def test_values(case: Case, dtype: torch.dtype, mb_backend: str) -> None:
    case = sized_for(case, mb_backend)
    tensors = make_tensors(case, dtype)
    kept = {name: None if t is None else t.clone() for name, t in tensors.items()}
    out = call(tensors, case, mb_backend)
    truth = oracle(to_float64(tensors), case)
    expected = torch.empty(case.out, device="meta", memory_format=memory_format_of(tensors["input"]))
    assert out.dtype == dtype and out.stride() == expected.stride()
    assert_within_budget(out, truth, oracle(tensors, case), f"{case.id} output")
    assert all(torch.equal(tensors[name], kept[name]) for name in present(tensors))


@pytest.mark.parametrize("case", CASES[::3], ids=ids(CASES[::3]))
def test_values_float16(case: Case, cuda: str) -> None:
    test_values(case, torch.float16, cuda)


def smooth(case: Case) -> Case:
    """Without kinks, at which a rounding more or less would change a gradient."""
    swap = {"relu": "silu", "relu6": "gelu"}
    parts = {}
    for name in ("expand", "dw", "pw"):
        epi = getattr(case, name)
        parts[name] = replace(
            epi,
            activation=swap.get(epi.activation, epi.activation),
            post_activation=swap.get(epi.post_activation, epi.post_activation),
        )
    gate = "sigmoid" if case.se_gate == "hardsigmoid" else case.se_gate
    return replace(case, **parts, se_activation="silu", se_gate=gate)


# In float64 no argument comes near enough to a kink to matter: the cases as they are.
@pytest.mark.parametrize("normed", (True, False), ids=("after a norm", "after a bias"))
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_behind_what_is_folded(name: str, normed: bool, mb_backend: str) -> None:
    """A norm, or nothing but a bias, ahead of an activation is folded; the activation keeps its slope."""
    epi = Epi(scale=True, shift=True, post_activation=name) if normed else Epi(bias=True, activation=name)
    epi = replace(epi, slope=0.3)
    case = Case(id=name, expand=epi, dw=epi, pw=epi, **CL)
    test_values(case, torch.float32, mb_backend)


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32), ids=str)
@pytest.mark.parametrize("case", CASES, ids=ids(CASES))
def test_gradients(case: Case, dtype: torch.dtype, mb_backend: str) -> None:
    if dtype != torch.float64:
        case = smooth(case)
    check_gradients(case, dtype, mb_backend)


@pytest.mark.parametrize("name", ("mobilenet-cl", "se-nchw", "cl_odd_chunk"))
def test_bfloat16_gradients(name: str, mb_backend: str) -> None:
    (case,) = (case for case in CASES if case.id == name)
    check_gradients(smooth(case), torch.bfloat16, mb_backend)


@pytest.mark.parametrize("name", ("mobilenet-cl", "se-nchw", "cl_odd_chunk"))
def test_float16_gradients(name: str, cuda: str) -> None:
    (case,) = (case for case in CASES if case.id == name)
    check_gradients(smooth(case), torch.float16, cuda)


def check_gradients(case: Case, dtype: torch.dtype, backend: str) -> None:
    case = sized_for(case, backend)
    tensors = make_tensors(case, dtype)
    grad_output = draw(case.out, generator(f"mbconv-{case.id}-grad"), "normal") + 1
    _, actual = gradients(lambda t: call(t, case, backend), tensors, grad_output)
    _, truth = gradients(lambda t: oracle(t, case), to_float64(tensors), grad_output)
    _, yardstick = gradients(lambda t: oracle(t, case), tensors, grad_output)
    for name, grad in actual.items():
        assert grad.dtype == dtype
        assert_within_budget(grad, truth[name], yardstick[name], f"{case.id} gradient of {name}")


@pytest.mark.parametrize("name", ("bias_relu", "full-cl", "se-nchw"))
def test_float16(name: str, triton: str) -> None:
    (case,) = (case for case in CASES if case.id == name)
    test_values(case, torch.float16, triton)
    check_gradients(smooth(case), torch.float16, triton)


def test_every_mask(triton: str) -> None:
    """Gradients come in schema order, only those asked for, the same bits whatever else is asked for."""
    for case in (FULL, replace(FULL, se=0), replace(FULL, c=6, d=None), replace(FULL, c=6, d=None, se=0)):
        case = replace(case, n=1, h=3, w=4)
        given = raw_arguments(case, torch.float64)
        present_mask = sum(1 << bit for bit, tensor in enumerate(given[:18]) if tensor is not None)
        run = partial(torch.ops.effops.mbconv_bwd_triton, draw(case.out, generator("mask"), "normal"), *given)
        places = [bit for bit in range(18) if present_mask >> bit & 1]
        every = dict(zip(places, run(present_mask), strict=True))
        for wanted in (0, 1, 1 << 13, 0b01_0101_0101_0101_0101, 0b10_1010_1010_1010_1010, 0b00_0011_0001_1111_0000):
            mask = wanted & present_mask
            found = run(mask)
            expected = [every[bit] for bit in places if mask >> bit & 1]
            assert len(found) == len(expected) and all(map(torch.equal, found, expected)), f"{case} mask {mask:#x}"


def test_single_gradients(kernels: str) -> None:
    """Each alone: what the kernel then leaves out must not be missed."""
    (with_se,) = (case for case in CASES if case.id == "se-nchw")
    for case in (replace(with_se, n=3), replace(with_se, se=0, n=3)):
        tensors = make_tensors(case, torch.float64)
        grad_output = draw(case.out, generator("mbconv-single"), "normal")
        _, truth = gradients(lambda t: oracle(t, case), tensors, grad_output)  # noqa: B023
        for name in present(tensors):
            _, alone = gradients(lambda t: call(t, case, kernels), tensors, grad_output, [name])  # noqa: B023
            assert_within_budget(alone[name], truth[name], None, f"gradient of {name} alone")


TINY = {"n": 1, "c": 2, "d": 3, "k": 2, "h": 3, "w": 3}
CHECKED = [
    Case(id="silu-residual", expand=SILU, dw=SILU, pw=replace(ADD, post_activation="sigmoid"), **TINY),
    Case(id="se", expand=SILU, dw=SMOOTH, se=2, se_activation="silu", **TINY),
    Case(id="se-no_expansion-cl", dw=SILU, se=2, se_activation="gelu", **(TINY | {"d": None}), layout="channels_last"),
]


@pytest.mark.parametrize("check", (gradcheck, gradgradcheck), ids=("once", "twice"))
@pytest.mark.parametrize("case", CHECKED, ids=ids(CHECKED))
def test_gradcheck(case: Case, check, mb_backend: str) -> None:
    torch.set_num_threads(1)
    leaves = as_leaves(make_tensors(case, torch.float64))
    names = present(leaves)
    assert check(
        lambda *values: call({**leaves, **dict(zip(names, values, strict=True))}, case, mb_backend),
        [leaves[name] for name in names],
        fast_mode=check is gradgradcheck or interpreted(mb_backend),
    )


@pytest.mark.parametrize("threads", (1, 2))
def test_same_bits_every_time(threads: int, cpp: str) -> None:
    torch.set_num_threads(threads)
    for case in CASES:
        if case.id in ("mobilenet-56-rings", "14x14-panels", "se-one_image"):
            leaves = as_leaves(make_tensors(case, torch.float32))
            runs = []
            for _ in range(2):
                out = call(leaves, case, cpp)
                runs.append([out, *torch.autograd.grad(out.sum(), [leaves[name] for name in present(leaves)])])
            assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_the_padding_is_zero_whatever_the_expansion_makes_of_zero(mb_backend: str) -> None:
    """An expanded 1 everywhere, summed by the depthwise convolution: the border sees fewer of them."""
    x = torch.zeros(1, 2, 4, 5)
    out = EF.inverted_residual2d(
        x, torch.ones(3, 2, 1, 1), torch.ones(3, 1, 3, 3), torch.full((1, 3, 1, 1), 1 / 3), torch.ones(3), padding=1,
        backend=mb_backend,
    )  # fmt: skip
    counts = F.conv2d(torch.ones(1, 1, 4, 5), torch.ones(1, 1, 3, 3), padding=1)
    torch.testing.assert_close(out, counts)


def test_the_input_as_its_own_residual(mb_backend: str) -> None:
    x = torch.randn(2, 8, 6, 5, dtype=torch.float64, requires_grad=True)
    weights = [torch.randn(*shape, dtype=torch.float64) for shape in ((24, 8, 1, 1), (24, 1, 3, 3), (8, 24, 1, 1))]
    out = EF.inverted_residual2d(x, *weights, padding=1, expand_activation="silu", residual=x, backend=mb_backend)
    inner = F.conv2d(F.conv2d(F.silu(F.conv2d(x, weights[0])), weights[1], padding=1, groups=24), weights[2])
    torch.testing.assert_close(out, inner + x)
    torch.testing.assert_close(*[torch.autograd.grad(y.square().sum(), x)[0] for y in (out, inner + x)])


def test_without_expansion_and_squeeze_excite_it_is_ds_conv2d(cpp: str) -> None:
    x, dw, pw = torch.randn(1, 8, 6, 6), torch.randn(8, 1, 3, 3), torch.randn(4, 8, 1, 1)
    found = backends.explain(lambda: EF.inverted_residual2d(x, None, dw, pw, padding=1)).calls
    assert [call.kernel for call in found] == ["3x3 + 1x1"]


# ---- registration ---------------------------------------------------------------------------------------------------


def raw_arguments(case: Case, dtype: torch.dtype = torch.float32) -> tuple:
    tensors = make_tensors(case, dtype)
    left, right, top, bottom = case.padding
    last = int(memory_format_of(tensors["input"]) == torch.channels_last)
    geometry = [*case.stride, top, bottom, left, right, *case.dilation, 1, last, 4, 1, 0, 4, 4, 2, 1, 7, 0]
    return (*tensors.values(), geometry, [0.1, 0.2, 0.3])


FULL = Case(id="raw", se=5, expand=SMOOTH, dw=SMOOTH, pw=replace(SMOOTH, residual=True))


@pytest.mark.parametrize("layout", ("contiguous", "channels_last"))
def test_opcheck(layout: str, cpp: str) -> None:
    arguments = raw_arguments(replace(FULL, layout=layout))
    ops = torch.ops.effops
    assert set(torch.library.opcheck(ops.mbconv_fwd.default, arguments).values()) == {"SUCCESS"}
    for mask in ((1 << 18) - 1, 0b100000000000100001):
        backward = (torch.randn(FULL.out), *arguments, mask)
        assert set(torch.library.opcheck(ops.mbconv_bwd.default, backward).values()) == {"SUCCESS"}


def test_raw_operator_raises(cpp: str) -> None:
    good = raw_arguments(FULL)
    ops = torch.ops.effops
    geometry = good[18]
    bad = [(i, t.new_ones(*t.shape[:-1], t.shape[-1] + 1)) for i, t in enumerate(good[1:18], 1)]
    bad += [(i, t.double()) for i, t in enumerate(good[1:18], 1)]
    bad += [(1, None), (9, None), (11, None), (18, geometry[:-1]), (19, [0.1, 0.2])]
    bad += [
        (18, geometry[:i] + [value] + geometry[i + 1 :]) for i, value in ((0, 0), (8, 2), (12, 99), (14, -1), (17, 1))
    ]
    for at, value in bad:
        arguments = [*good]
        arguments[at] = value
        with pytest.raises(RuntimeError):
            ops.mbconv_fwd(*arguments)
        with pytest.raises(RuntimeError):
            ops.mbconv_bwd(torch.ones(FULL.out), *arguments, 1)
    for grad, mask in ((torch.ones(1, 2, 3, 4), 1), (torch.ones(FULL.out), 1 << 18)):
        with pytest.raises(RuntimeError):
            ops.mbconv_bwd(grad, *good, mask)
    for absent, mask in ((range(1, 5), 0b10), (range(9, 13), 1 << 9), ([17], 1 << 17)):
        arguments = [None if i in absent else value for i, value in enumerate(good)]
        if 1 in absent:
            arguments[0] = torch.ones(2, 24, 7, 9)
        ops.mbconv_fwd(*arguments)
        with pytest.raises(RuntimeError, match="absent"):
            ops.mbconv_bwd(torch.ones(FULL.out), *arguments, mask)


def test_compile_export_autocast(cpp: str) -> None:
    case = Case(id="compile", expand=SILU, dw=SILU, pw=LINEAR, se=4)
    tensors = make_tensors(case, torch.float32)

    class Block(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return call({**tensors, "input": x}, case, "auto")

    x = tensors["input"].clone().requires_grad_()
    compiled = torch.compile(Block(), fullgraph=True, backend="aot_eager", dynamic=True)
    for batch in (2, 3):
        inputs = torch.cat([x] * 2)[:batch].detach().requires_grad_()
        results = [(y, torch.autograd.grad(y.sum(), inputs)[0]) for y in (compiled(inputs), Block()(inputs))]
        torch.testing.assert_close(*results)
    program = torch.export.export(Block(), (x.detach(),))
    assert "effops.mbconv_fwd" in str(program.graph)
    with torch.autocast("cpu", torch.bfloat16):
        assert Block()(x.detach()).dtype == torch.bfloat16


# ---- messages -------------------------------------------------------------------------------------------------------


def arguments(**changes: Any) -> dict[str, Any]:
    base: dict[str, Any] = {
        "input": torch.ones(2, 8, 5, 5),
        "expand_weight": torch.ones(16, 8, 1, 1),
        "dw_weight": torch.ones(16, 1, 3, 3),
        "project_weight": torch.ones(6, 16, 1, 1),
    }
    return base | changes


SE = {"se_reduce_weight": torch.ones(4, 16, 1, 1), "se_expand_weight": torch.ones(16, 4, 1, 1)}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"input": [1.0]}, TypeError, "input must be a tensor [N,C,H,W]; got list"),
        ({"input": torch.ones(2, 0, 5, 5), "expand_weight": torch.ones(16, 0, 1, 1)}, ValueError,
         "input must have positive sizes, only the batch may be 0; got [2,0,5,5]"),
        ({"expand_weight": torch.ones(16, 9, 1, 1)}, ValueError,
         "expand_weight must be [D,8,1,1] with D > 0; got [16,9,1,1]"),
        ({"expand_weight": torch.ones(16, 8)}, ValueError,
         "expand_weight must have 4 dimensions [D,C,1,1]; got 2: [16,8]"),
        ({"dw_weight": torch.ones(8, 1, 3, 3)}, ValueError,
         "dw_weight must be [16,1,R,S], one kernel for each of the 16 expanded channels; got [8,1,3,3]"),
        ({"expand_weight": None}, ValueError,
         "dw_weight must be [8,1,R,S], one kernel for each of the 8 input channels; got [16,1,3,3]"),
        ({"expand_weight": None, "expand_bias": torch.ones(16), "expand_activation": "relu"}, ValueError,
         "expand_bias, expand_activation given without expand_weight; accepted: with it"),
        ({"project_weight": torch.ones(6, 15, 1, 1)}, ValueError,
         "project_weight must be [K,16,1,1] with K > 0; got [6,15,1,1]"),
        ({"expand_scale": torch.ones(8)}, ValueError,
         "expand_scale must be [16], one value an output channel; got [8]"),
        ({"dw_shift": torch.ones(8)}, ValueError, "dw_shift must be [16], one value an output channel; got [8]"),
        ({"scale": torch.ones(16)}, ValueError, "scale must be [6], one value an output channel; got [16]"),
        ({"residual": torch.ones(2, 6, 5, 5)}, ValueError,
         "residual must be [2,6,3,3], the convolution's output shape; got [2,6,5,5]"),
        ({"expand_post_activation": "tanh"}, ValueError,
         "unknown expand_post_activation 'tanh'; accepted: none, relu, relu6, leaky_relu, silu, hardswish, "
         "hardsigmoid, sigmoid, gelu"),
        ({"se_reduce_weight": SE["se_reduce_weight"]}, ValueError,
         "se_expand_weight is missing; accepted: both weights of the squeeze-excite, or neither"),
        ({"se_reduce_bias": torch.ones(4)}, ValueError,
         "a bias of the squeeze-excite is given without its weights; accepted: with them"),
        ({**SE, "se_reduce_weight": torch.ones(4, 8, 1, 1)}, ValueError,
         "se_reduce_weight must be [Cr,16,1,1] with Cr > 0; got [4,8,1,1]"),
        ({**SE, "se_reduce_bias": torch.ones(16)}, ValueError,
         "se_reduce_bias must be [4], one value an output channel; got [16]"),
        ({**SE, "se_gate": "tanh"}, ValueError, "unknown se_gate 'tanh'; accepted: sigmoid, hardsigmoid"),
        ({"dw_negative_slope": "a"}, TypeError, "dw_negative_slope must be a number; got 'a' (str)"),
    ],
    ids=str,
)  # fmt: skip
def test_errors(changes: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        EF.inverted_residual2d(**arguments(**changes))
    assert str(caught.value) == f"inverted_residual2d: {message}"
