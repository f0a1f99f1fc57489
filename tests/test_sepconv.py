"""Separable convolution with pooling: values, gradients, pool choices, errors, raw calls, and how torch sees it."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import ACTIVATIONS, Epi, ids
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
    torchs_own_memory,
)
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import gradcheck, gradgradcheck

import effops
import effops.functional as EF
from effops.ops.sepconv import KERNELS

ops = torch.ops.effops
Tensors = dict[str, Tensor | None]


@pytest.fixture(params=("reference", "cpp", "triton", "cuda"))
def backend(request: pytest.FixtureRequest) -> str:
    """The backends that have the operator."""
    return require_share(request.param, request.node)


@pytest.fixture(params=("cpp", "triton", "cuda"))
def kernels(request: pytest.FixtureRequest) -> str:
    """Those of them with kernels for it."""
    return require_share(request.param, request.node)


# ---------------------------------------------------------------------------------------------------------------------
# Cases and their oracle
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class SepCase:
    """A call; `kernel`, `stride`, `padding` (left, right, top, bottom) and `dilation` of the RxS window."""

    id: str
    n: int = 2
    c: int = 8
    h: int = 7
    w: int = 9
    multiplier: int = 1
    pool: str = "row"
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (1, 1, 1, 1)
    dilation: tuple[int, int] = (1, 1)
    layout: str = "contiguous"
    row: Epi = field(default_factory=Epi)
    col: Epi = field(default_factory=Epi)
    float_params: bool = False
    data: str = "normal"


FULL = Epi(bias=True, scale=True, shift=True, activation="silu", post_activation="sigmoid")
BN_RELU = Epi(scale=True, shift=True, post_activation="relu")
CASES = [
    SepCase(id="effnet_v1-cl", c=32, h=16, w=16, layout="channels_last", row=Epi(scale=True, shift=True)),
    SepCase(id="effnet_v2-cl", c=16, multiplier=2, pool="both", h=8, w=8, layout="channels_last", row=BN_RELU),
    SepCase(id="row-odd_w-odd_c", c=5, row=Epi(bias=True), col=Epi(bias=True)),
    SepCase(id="both-odd_hw-cl", c=17, pool="both", layout="channels_last", row=FULL, col=FULL),
    SepCase(id="both-nchw", c=19, pool="both", h=10, w=6, col=BN_RELU),
    SepCase(id="none-cl", pool="none", c=33, layout="channels_last", row=Epi(bias=True, activation="gelu")),
    SepCase(id="none-nchw", pool="none", row=FULL, col=FULL),
    SepCase(id="multiplier2-nchw", c=20, multiplier=2, h=6, w=18),
    SepCase(id="multiplier2-odd_c-cl", c=37, multiplier=2, pool="both", layout="channels_last", col=Epi(bias=True)),
    SepCase(id="multiplier3-cl", c=3, multiplier=3, layout="channels_last", col=Epi(scale=True)),
    SepCase(id="stride2", c=6, pool="none", h=9, w=11, stride=(2, 2), layout="channels_last"),
    SepCase(id="stride2-pool", c=6, pool="both", h=15, w=17, stride=(2, 2)),
    SepCase(id="stride3_above_kernel", pool="both", h=15, w=17, kernel=(2, 1), stride=(3, 3), padding=(0, 0, 1, 0)),
    SepCase(id="dilation", c=4, h=12, w=14, dilation=(2, 3), padding=(3, 3, 2, 2), layout="channels_last", row=FULL),
    SepCase(id="asymmetric", c=4, pool="both", padding=(3, 0, 1, 2), col=Epi(bias=True)),
    SepCase(id="no_padding", c=4, padding=(0, 0, 0, 0), layout="channels_last"),
    SepCase(id="padding_above_kernel", h=3, w=2, pool="both", padding=(5, 4, 4, 6), row=Epi(bias=True)),
    SepCase(id="k5x1", kernel=(5, 1), padding=(0, 0, 2, 2), layout="channels_last"),
    SepCase(id="k1x7", kernel=(1, 7), padding=(3, 3, 0, 0), pool="both"),
    SepCase(id="even_kernel", kernel=(2, 4), padding=(1, 2, 0, 1), layout="channels_last"),
    SepCase(id="w2-h1", h=1, w=2, layout="channels_last"),
    SepCase(id="c1-1x1_map", n=1, c=1, h=1, w=1, pool="none"),
    SepCase(id="batch0", n=0, pool="both", row=FULL, col=FULL),
    SepCase(id="cl_odd_chunk", c=29, layout="cl_odd_chunk", row=Epi(bias=True)),
    SepCase(id="cl_crop", c=16, layout="cl_crop", pool="both"),
    SepCase(id="every_second", layout="every_second", multiplier=2),
    SepCase(id="expand_channels", n=3, layout="expand_channels", pool="both"),
    SepCase(id="expand_batch", n=3, layout="expand_batch", multiplier=2),
    SepCase(id="transposed", layout="transposed"),
    SepCase(id="float_params", c=24, layout="channels_last", row=FULL, col=FULL, float_params=True),
    SepCase(id="many_rows-cl", n=1, c=40, h=70, w=38, layout="channels_last", pool="both", col=Epi(bias=True)),
    SepCase(id="many_images", n=23, c=12, h=2, w=2, pool="both"),
    SepCase(id="many_channels", n=1, c=261, h=6, w=6, layout="channels_last"),
]  # fmt: skip
NAMES = ("input", "row_weight", "row_bias", "row_scale", "row_shift", "col_weight", "bias", "scale", "shift")


def make_tensors(case: SepCase, dtype: torch.dtype) -> Tensors:
    """The case's tensors, by schema name and in schema order; absent ones are None."""
    gen = generator(case.id)
    param = torch.float32 if case.float_params and dtype.itemsize == 2 else dtype
    channels = case.c * case.multiplier

    def vectors(prefix: str, epi: Epi) -> Tensors:
        return {
            prefix + name: draw((channels,), gen, case.data, mean=0.5).to(param) if getattr(epi, name) else None
            for name in ("bias", "scale", "shift")
        }

    r, s = case.kernel
    x = draw((case.n, case.c, case.h, case.w), gen, case.data, mean=1.0)
    tensors = {"input": lay_out(x, case.layout, dtype)}
    tensors["row_weight"] = draw((channels, 1, 1, s), gen, case.data, s**-0.5).to(dtype)
    tensors |= vectors("row_", case.row)
    tensors["col_weight"] = draw((channels, 1, r, 1), gen, case.data, r**-0.5).to(dtype)
    return tensors | vectors("", case.col)


def call(tensors: Tensors, case: SepCase, backend: str) -> Tensor:
    epilogues = {name: tensors[name] for name in ("row_scale", "row_shift", "scale", "shift")}
    for prefix, epi in (("row_", case.row), ("", case.col)):
        epilogues |= {
            f"{prefix}activation": epi.activation,
            f"{prefix}post_activation": epi.post_activation,
            f"{prefix}negative_slope": epi.slope,
        }
    return EF.separable_conv_pool2d(
        tensors["input"], tensors["row_weight"], tensors["col_weight"], tensors["row_bias"], tensors["bias"],
        pool=case.pool, stride=case.stride, padding=case.padding, dilation=case.dilation, **epilogues, backend=backend,
    )  # fmt: skip


def oracle(t: Tensors, case: SepCase) -> Tensor:
    """The chain in torch's words, every step rounded to the input's dtype."""
    dtype = t["input"].dtype

    def epilogue(value: Tensor, prefix: str, epi: Epi) -> Tensor:
        bias, scale, shift = (
            None if t[prefix + name] is None else t[prefix + name].reshape(1, -1, 1, 1)
            for name in ("bias", "scale", "shift")
        )
        value = activate(value if bias is None else (value + bias).to(dtype), epi.activation, epi.slope)
        value = value if scale is None else (value * scale).to(dtype)
        value = value if shift is None else (value + shift).to(dtype)
        return activate(value, epi.post_activation, epi.slope)

    (sh, sw), (dh, dw), (left, right, top, bottom) = case.stride, case.dilation, case.padding
    groups = case.c
    z = F.conv2d(F.pad(t["input"], (left, right)), t["row_weight"], None, (1, sw), 0, (1, dw), groups)
    z = epilogue(z, "row_", case.row)
    if case.pool != "none":
        z = F.max_pool2d(z, (1, 2))
    y = F.conv2d(F.pad(z, (0, 0, top, bottom)), t["col_weight"], None, (sh, 1), 0, (dh, 1), groups * case.multiplier)
    y = epilogue(y, "", case.col)
    return F.max_pool2d(y, (2, 1)) if case.pool == "both" else y


def grad_output_of(case: SepCase, shape: torch.Size) -> Tensor:
    return draw(shape, generator(case.id + "/grad"), case.data, mean=0.5) + 1


# ---------------------------------------------------------------------------------------------------------------------
# Values and gradients
# ---------------------------------------------------------------------------------------------------------------------


# The reference is torch's own chain: its rounding is torch's, so that float64 tells all.
RUNS = [
    ("reference", torch.float64),
    *((name, dtype) for name in ("cpp", "triton", "cuda") for dtype in (torch.float64, torch.float32)),
]
HALF = [
    ("cpp", torch.bfloat16),
    *((name, dtype) for name in ("triton", "cuda") for dtype in (torch.bfloat16, torch.float16)),
]


@pytest.mark.parametrize(("name", "dtype"), [*RUNS, *HALF], ids=str)
@pytest.mark.parametrize("case", CASES, ids=ids(CASES))
def test_forward(case: SepCase, name: str, dtype: torch.dtype, request: pytest.FixtureRequest) -> None:
    check_forward(case, dtype, require_share(name, request.node))


def check_forward(case: SepCase, dtype: torch.dtype, name: str) -> None:
    tensors = make_tensors(case, dtype)
    out, truth = call(tensors, case, name), oracle(to_float64(tensors), case)
    expected = torch.empty(truth.shape, device="meta", memory_format=memory_format_of(tensors["input"]))
    assert (out.dtype, out.shape, out.stride()) == (dtype, expected.shape, expected.stride())
    assert_within_budget(out, truth, None if dtype == torch.float64 else oracle(tensors, case), case.id)


def check_gradients(case: SepCase, dtype: torch.dtype, backend: str) -> None:
    tensors = make_tensors(case, dtype)
    grad_output = grad_output_of(case, oracle(to_float64(tensors), case).shape)
    _, truth = gradients(lambda t: oracle(t, case), to_float64(tensors), grad_output)
    yardstick: dict[str, Tensor | None] = dict.fromkeys(truth)
    with torchs_own_memory():
        if dtype != torch.float64:
            _, yardstick = gradients(lambda t: oracle(t, case), tensors, grad_output)
    _, actual = gradients(lambda t: call(t, case, backend), tensors, grad_output)
    for name, grad in actual.items():
        assert grad.dtype == tensors[name].dtype
        what = f"{case.id} {backend} gradient of {name}"
        assert_within_budget(grad, truth[name], yardstick[name], what, computed_in=dtype)


@pytest.mark.parametrize(("name", "dtype"), RUNS, ids=str)
@pytest.mark.parametrize("case", CASES, ids=ids(CASES))
def test_gradients(case: SepCase, name: str, dtype: torch.dtype, request: pytest.FixtureRequest) -> None:
    require_share(name, request.node)
    check_gradients(case, dtype, name)


# In half types torch's chain pools rounded values, so its choices differ from the truth's; and see test_dwconv.smooth.
SMOOTH = [replace(c, pool="none") for c in CASES if c.id in ("effnet_v1-cl", "multiplier2-nchw", "float_params")]


@pytest.mark.parametrize(("name", "dtype"), HALF, ids=str)
@pytest.mark.parametrize("case", SMOOTH, ids=ids(SMOOTH))
def test_gradients_half(case: SepCase, name: str, dtype: torch.dtype, request: pytest.FixtureRequest) -> None:
    require_share(name, request.node)
    check_gradients(case, dtype, name)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation: str, kernels: str) -> None:
    for prefix in ("row", "col"):
        epi = Epi(bias=True, shift=True, activation=activation, post_activation=activation, slope=0.2)
        case = replace(CASES[0], id=activation, **{prefix: epi})
        if interpreted(kernels):
            case = replace(case, c=8, h=4, w=6)
        check_gradients(case, torch.float64, kernels)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("layout", ("contiguous", "channels_last"))
@pytest.mark.parametrize("special", (None, float("nan"), float("inf"), float("-inf")))
def test_pool_chooses_as_torch_does(special: float | None, layout: str, dtype: torch.dtype, kernels: str) -> None:
    """Small integers make ties common and every sum exact: gradients are equal to the bit, so are the places of NaN."""
    case = SepCase(id="ties", c=21, h=8, w=10, pool="both", layout=layout, data="exact")
    tensors = make_tensors(case, dtype)
    # A weight of one tap hands values on unchanged, NaNs and infinities side by side included.
    tensors["row_weight"] = torch.zeros(21, 1, 1, 3, dtype=dtype)
    tensors["row_weight"][..., 1] = 1
    if special is not None:
        mask = torch.rand(tensors["input"].shape, generator=generator("special")) < 0.15
        tensors["input"][mask] = special
        tensors["row_weight"] = tensors["row_weight"][..., 1:2].contiguous()  # 0 * inf is NaN
        case = replace(case, kernel=(3, 1), padding=(0, 0, 1, 1))
    grad_output = grad_output_of(case, oracle(tensors, case).shape)
    expected_out, expected = gradients(lambda t: oracle(t, case), tensors, grad_output)
    out, actual = gradients(lambda t: call(t, case, kernels), tensors, grad_output)
    torch.testing.assert_close(out, expected_out, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(actual["input"], expected["input"], rtol=0, atol=0, equal_nan=True)
    for weight in ("row_weight", "col_weight"):
        assert torch.equal(actual[weight].isnan(), expected[weight].isnan())


def test_identities(backend: str) -> None:
    """Without a pool and with kernels of rank one, it is the depthwise RxS convolution; a pool is F.max_pool2d."""
    case = SepCase(id="rank-one", c=6, pool="none", layout="channels_last")
    t = make_tensors(case, torch.float64)
    dense = t["col_weight"] * t["row_weight"]
    expected = F.conv2d(t["input"], dense, padding=1, groups=6)
    torch.testing.assert_close(call(t, case, backend), expected, rtol=1e-12, atol=1e-12)
    one = torch.ones(6, 1, 1, 1, dtype=torch.float64)
    pooled = EF.separable_conv_pool2d(t["input"], one, one, pool="both", backend=backend)
    assert torch.equal(pooled, F.max_pool2d(t["input"], 2))


# ---------------------------------------------------------------------------------------------------------------------
# gradcheck
# ---------------------------------------------------------------------------------------------------------------------

_SMALL = {"n": 2, "c": 2, "h": 4, "w": 5}
GRADCHECK = [
    SepCase(id="row-plain", **_SMALL),
    SepCase(id="both-full-multiplier2", multiplier=2, pool="both", row=FULL, col=FULL, **_SMALL),
    SepCase(id="none-stride2-cl", pool="none", stride=(2, 1), layout="channels_last", row=Epi(bias=True), **_SMALL),
]  # fmt: skip


@pytest.mark.parametrize("check", (gradcheck, gradgradcheck), ids=("once", "twice"))
@pytest.mark.parametrize("case", GRADCHECK, ids=ids(GRADCHECK))
def test_gradcheck(case: SepCase, check: Callable, backend: str) -> None:
    torch.set_num_threads(1)
    leaves = as_leaves(make_tensors(case, torch.float64))
    names = present(leaves)

    def function(*values: Tensor) -> Tensor:
        return call({**leaves, **dict(zip(names, values, strict=True))}, case, backend)

    # One random direction instead of the whole Jacobian for interpreted kernels, as in test_gradcheck.py.
    assert check(function, [leaves[name] for name in names], fast_mode=interpreted(backend))


# ---------------------------------------------------------------------------------------------------------------------
# Raw operators
# ---------------------------------------------------------------------------------------------------------------------

RAW = SepCase(id="raw", c=6, multiplier=2, h=8, w=9, pool="both", row=FULL, col=FULL)


def raw_arguments(case: SepCase, tensors: Tensors) -> dict[str, Any]:
    left, right, top, bottom = case.padding
    code = ACTIVATIONS.index
    geometry = [*case.stride, top, bottom, left, right, *case.dilation, case.multiplier]
    geometry.append(int(memory_format_of(tensors["input"]) == torch.channels_last))
    geometry += [code(name) for epi in (case.row, case.col) for name in (epi.activation, epi.post_activation)]
    geometry.append({"none": 0, "row": 1, "both": 3}[case.pool])
    return {**tensors, "geometry": geometry, "slopes": [case.row.slope, case.col.slope]}


@pytest.mark.parametrize("layout", ("contiguous", "channels_last"))
def test_every_mask_and_any_grad_output(layout: str, kernels: str) -> None:
    """Gradients come in schema order, only those asked for, the same whatever else is asked for."""
    case = replace(RAW, layout=layout)
    arguments = raw_arguments(case, make_tensors(case, torch.float64))
    forward, backward = KERNELS[kernels]
    shape = forward(**arguments).shape
    grad_output = draw(shape, generator("masks"), "normal")
    every = backward(grad_output=grad_output, **arguments, mask=511)
    random = torch.randint(1, 511, (4 if interpreted(kernels) else 20,), generator=generator("m"))
    for mask in [0, *(1 << bit for bit in range(9)), *random.tolist()]:
        found = backward(grad_output=grad_output, **arguments, mask=mask)
        expected = [grad for bit, grad in enumerate(every) if mask >> bit & 1]
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    for name in ("channels_last", "transposed", "cl_odd_chunk", "every_second"):
        strided = lay_out(grad_output, name, torch.float64)
        found = backward(grad_output=strided, **arguments, mask=511)
        for a, b in zip(found, every, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def _geometry(index: int, value: int) -> Callable[[dict], dict]:
    def change(arguments: dict) -> dict:
        g = arguments["geometry"]
        return {"geometry": [*g[:index], value, *g[index + 1 :]]}

    return change


BIG = 2**62
BAD: dict[str, Callable[[dict], dict]] = {
    **{
        f"geometry[{i}]={value}": _geometry(i, value)
        for i, values in enumerate(
            [(0, -1, BIG)] * 2 + [(-1, BIG, 2**63 - 1)] * 4 + [(0, -1, BIG)] * 2 + [(0, 1, 3, BIG)] + [()]
            + [(-1, 9, 2**32)] * 4 + [(-1, 4, BIG)]
        )
        for value in values
    },
    "geometry_short": lambda a: {"geometry": a["geometry"][:-1]},
    "geometry_long": lambda a: {"geometry": [*a["geometry"], 0]},
    "slopes_short": lambda a: {"slopes": [0.1]},
    "input_3d": lambda a: {"input": a["input"][0]},
    "input_narrow": lambda a: {"input": a["input"][..., :1]},
    "input_low": lambda a: {"input": a["input"][:, :, :1]},
    "input_no_width": lambda a: {"input": a["input"][..., :0]},
    "input_double": lambda a: {"input": a["input"].double()},
    "input_meta": lambda a: {"input": a["input"].to("meta")},
    "row_weight_2_rows": lambda a: {"row_weight": a["row_weight"].expand(-1, 1, 2, 3)},
    "row_weight_fewer": lambda a: {"row_weight": a["row_weight"][:-1]},
    "row_weight_half": lambda a: {"row_weight": a["row_weight"][:6]},
    "row_weight_wide": lambda a: {"row_weight": torch.ones(12, 1, 1, 12)},
    "row_weight_3d": lambda a: {"row_weight": a["row_weight"][0]},
    "col_weight_2_columns": lambda a: {"col_weight": a["col_weight"].expand(-1, 1, 3, 2)},
    "col_weight_fewer": lambda a: {"col_weight": a["col_weight"][:-1]},
    "col_weight_more": lambda a: {"col_weight": a["col_weight"].repeat(2, 1, 1, 1)},
    "col_weight_tall": lambda a: {"col_weight": torch.ones(12, 1, 11, 1)},
    "col_weight_double": lambda a: {"col_weight": a["col_weight"].double()},
    "col_weight_3d": lambda a: {"col_weight": a["col_weight"][0]},
    **{f"{name}_short": lambda a, name=name: {name: a[name][:-1]} for name in NAMES if name not in NAMES[0:6:5]
       and "weight" not in name},
    **{f"{name}_int": lambda a, name=name: {name: a[name].int()} for name in NAMES},
}  # fmt: skip


@pytest.mark.parametrize("change", BAD)
def test_bad_raw_call_raises(change: str, cpp: str) -> None:
    arguments = raw_arguments(RAW, make_tensors(RAW, torch.float32))
    grad_output = torch.randn(ops.sepconv_fwd(**arguments).shape)
    changed = {**arguments, **BAD[change](arguments)}
    with pytest.raises(RuntimeError):
        ops.sepconv_fwd(**changed)
    with pytest.raises(RuntimeError):
        ops.sepconv_bwd(grad_output=grad_output, **changed, mask=511)


def test_bad_backward_call_raises(cpp: str) -> None:
    arguments = raw_arguments(RAW, make_tensors(RAW, torch.float32))
    grad_output = torch.randn(ops.sepconv_fwd(**arguments).shape)
    for mask in (-1, 512, 2**62):
        with pytest.raises(RuntimeError, match="mask"):
            ops.sepconv_bwd(grad_output=grad_output, **arguments, mask=mask)
    for bad in (grad_output[..., :-1], grad_output[0], grad_output.double()):
        with pytest.raises(RuntimeError, match="grad_output"):
            ops.sepconv_bwd(grad_output=bad, **arguments, mask=1)
    with pytest.raises(RuntimeError, match="row_bias, which is absent"):
        ops.sepconv_bwd(grad_output=grad_output, **{**arguments, "row_bias": None}, mask=511)


# ---------------------------------------------------------------------------------------------------------------------
# Registration
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ("contiguous", "channels_last"))
def test_opcheck(layout: str, cpp: str) -> None:
    case = replace(RAW, layout=layout)
    arguments = raw_arguments(case, make_tensors(case, torch.float32))
    out = ops.sepconv_fwd(**arguments)
    for operator, given in (
        (ops.sepconv_fwd.default, tuple(arguments.values())),
        (ops.sepconv_bwd.default, (torch.randn_like(out), *arguments.values(), 511)),
        (ops.sepconv_bwd.default, (torch.randn_like(out), *arguments.values(), 0b010010001)),
    ):
        assert set(torch.library.opcheck(operator, given).values()) == {"SUCCESS"}
        real, meta = (
            operator(*[a.to(device) if isinstance(a, Tensor) else a for a in given]) for device in ("cpu", "meta")
        )
        real, meta = ([r] if isinstance(r, Tensor) else r for r in (real, meta))
        assert [(t.shape, t.dtype, t.stride()) for t in real] == [(t.shape, t.dtype, t.stride()) for t in meta]


def chain(x: Tensor, row: Tensor, col: Tensor, bias: Tensor, backend: str) -> Tensor:
    return EF.separable_conv_pool2d(
        x, row, col, bias, row_scale=bias, pool="both", post_activation="silu", backend=backend
    )


def chain_leaves(batch: int) -> list[Tensor]:
    x = torch.randn(batch, 4, 6, 7).contiguous(memory_format=torch.channels_last)
    return [t.requires_grad_() for t in (x, torch.randn(8, 1, 1, 3), torch.randn(8, 1, 3, 1), torch.randn(8))]


def test_compile_fullgraph_with_a_dynamic_batch(backend: str) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda *t: chain(*t, backend), fullgraph=True, backend=counter)
    for batch in (2, 3, 5):
        tensors = chain_leaves(batch)
        found, expected = compiled(*tensors), chain(*tensors, backend)
        torch.testing.assert_close(found, expected)
        assert found.stride() == expected.stride()
        pairs = [torch.autograd.grad(y.sum(), tensors) for y in (found, expected)]
        for a, b in zip(*pairs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert counter.frame_count <= 2


def test_export(cpp: str) -> None:
    class Net(torch.nn.Module):
        def forward(self, *tensors: Tensor) -> Tensor:
            return chain(*tensors, cpp)

    tensors = tuple(t.detach() for t in chain_leaves(2))
    batch = {0: torch.export.Dim("batch", min=2)}
    program = torch.export.export(Net(), tensors, dynamic_shapes=((batch, None, None, None),))
    saved = io.BytesIO()
    torch.export.save(program, saved)
    saved.seek(0)
    other = (torch.randn(5, 4, 6, 7).contiguous(memory_format=torch.channels_last), *tensors[1:])
    torch.testing.assert_close(torch.export.load(saved).module()(*other), chain(*other, cpp))


def test_autocast(backend: str) -> None:
    x, row, col, bias = chain_leaves(2)
    with torch.autocast("cpu", torch.bfloat16):
        y = chain(x, row, col, bias, backend)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert all(t.grad.dtype == torch.float32 for t in (x, row, col, bias))


def test_same_bits_every_time(cpp: str) -> None:
    case = SepCase(id="repeat", n=3, c=24, h=40, w=40, layout="channels_last", pool="both", row=FULL, col=FULL)
    tensors = make_tensors(case, torch.float32)
    grad_output = grad_output_of(case, oracle(tensors, case).shape)
    runs = [gradients(lambda t: call(t, case, cpp), tensors, grad_output) for _ in range(3)]
    for out, grads in runs[1:]:
        assert torch.equal(out, runs[0][0])
        assert all(torch.equal(grads[name], runs[0][1][name]) for name in grads)


def test_flops_and_explain(cpp: str) -> None:
    x, row, col, bias = (t.detach() for t in chain_leaves(2))
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        chain(x, row, col, bias, cpp)
    assert counter.get_total_flops() == 2 * (2 * 8 * 6 * 7 * 3 + 2 * 8 * 6 * 3 * 3)
    (found,) = effops.explain(lambda: chain(x, row, col, bias, "auto")).calls
    assert (found.kernel, found.output, found.backend) == ("1x3 + 3x1", "[2,8,3,3]", "cpp")


# ---------------------------------------------------------------------------------------------------------------------
# Errors
# ---------------------------------------------------------------------------------------------------------------------


def sep(x: Any = None, row: Any = None, col: Any = None, *args: Any, **kwargs: Any) -> Any:
    """separable_conv_pool2d on float32[2,8,6,7], [8,1,1,3] and [8,1,3,1] but for what is given."""
    defaults = (torch.ones(2, 8, 6, 7), torch.ones(8, 1, 1, 3), torch.ones(8, 1, 3, 1))
    tensors = [d if given is None else given for given, d in zip((x, row, col), defaults, strict=True)]
    return EF.separable_conv_pool2d(*tensors, *args, **kwargs)


ones = torch.ones
ERRORS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "input": (lambda: sep([1.0]), TypeError, "input must be a tensor [N,C,H,W]; got list"),
    "row-list": (lambda: sep(row=[1]), TypeError, "row_weight must be a tensor [D,1,1,S]; got list"),
    "row-rank": (lambda: sep(row=ones(8, 3)), ValueError, "row_weight must have 4 dimensions [D,1,1,S]; got 2: [8,3]"),
    "row-rows": (
        lambda: sep(row=ones(8, 1, 3, 3)), ValueError,
        "row_weight must be [D,1,1,S], one row a kernel; got [8,1,3,3]",
    ),
    "row-channels": (
        lambda: sep(row=ones(12, 1, 1, 3)), ValueError,
        "row_weight has 12 kernels but input has 8 channels; accepted: a multiple of the channels",
    ),
    "col-dtype": (
        lambda: sep(col=ones(8, 1, 3, 1).double()), TypeError,
        "col_weight has dtype torch.float64 but input has torch.float32; accepted: the input's dtype",
    ),
    "col-columns": (
        lambda: sep(col=ones(8, 1, 3, 3)), ValueError,
        "col_weight must be [D,1,R,1], one column a kernel; got [8,1,3,3]",
    ),
    "col-channels": (
        lambda: sep(row=ones(16, 1, 1, 3)), ValueError,
        "col_weight has 8 kernels but the row convolution gives 16 channels; accepted: [16,1,R,1]",
    ),
    "pool-word": (lambda: sep(pool="col"), ValueError, "unknown pool 'col'; accepted: none, row, both"),
    "pool-kind": (lambda: sep(pool=2), TypeError, "pool must be a string; got 2; accepted: none, row, both"),
    "pool-width": (
        lambda: sep(ones(2, 8, 6, 1)), ValueError, "the pool halves a width of 1; accepted: at least 2",
    ),
    "pool-height": (
        lambda: sep(ones(2, 8, 1, 6), pool="both"), ValueError, "the pool halves a height of 1; accepted: at least 2",
    ),
    "same-stride": (
        lambda: sep(stride=2), ValueError,
        "padding='same' needs stride 1, as in torch; got stride (2, 2); pass the padding as ints",
    ),
    "window": (
        lambda: sep(ones(2, 8, 1, 6), padding=0), ValueError,
        "the window is larger than the padded input: 3x1 (kernel 3x1, dilation 1x1) against 1x2 (input 1x2, padding "
        "left 0, right 0, top 0, bottom 0); accepted: a window no larger than the padded input",
    ),
    "vector": (
        lambda: sep(row_shift=ones(7)), ValueError, "row_shift must be [8], one value an output channel; got [7]",
    ),
    "col_bias": (lambda: sep(None, None, None, None, 3), TypeError,
                 "col_bias must be a tensor [8], one value an output channel; got 3 (int)"),
    "slope": (lambda: sep(row_negative_slope="x"), TypeError, "row_negative_slope must be a number; got 'x' (str)"),
    "activation": (
        lambda: sep(row_activation="tanh"), ValueError,
        f"unknown row_activation 'tanh'; accepted: {', '.join(ACTIVATIONS)}",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name: str) -> None:
    function, kind, message = ERRORS[name]
    with pytest.raises(kind) as caught:
        function()
    assert str(caught.value) == f"separable_conv_pool2d: {message}"
