"""Several depthwise windows side by side: values and gradients of every backend that has them against the oracle."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import ACTIVATIONS, Epi, ids
from helpers import (
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
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import gradcheck, gradgradcheck
from torch.export import Dim, export
from torch.utils.flop_counter import FlopCounterMode

import effops
import effops.functional as EF
from effops.autograd import DSConvParts2dFunction

ops = torch.ops.effops
Pair = tuple[int, int]
Tensors = dict[str, Tensor | None]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Hundreds of tiny calls: waking a second thread for each would take most of the time."""
    torch.set_num_threads(1)


@dataclass(frozen=True, kw_only=True)
class PartsCase:
    id: str
    split: bool = False
    n: int = 2
    c: int = 12
    h: int = 7
    w: int = 9
    k: int = 10
    kernels: tuple[Pair, ...] = ((3, 3), (5, 5))
    stride: Pair = (1, 1)
    dilation: Pair = (1, 1)
    padding: tuple[tuple[int, int, int, int], ...] | None = None  # left, right, top, bottom of each
    layout: str = "contiguous"
    dw: Epi = field(default_factory=Epi)
    pw: Epi = field(default_factory=Epi)
    float_params: bool = False
    data: str = "normal"
    interpreted: Pair | None = None  # (h, w) where kernels are interpreted

    @property
    def channels(self) -> list[int]:
        """Of each part."""
        count = len(self.kernels)
        if not self.split:
            return [self.c] * count
        return [self.c - self.c // count * (count - 1), *[self.c // count] * (count - 1)]

    @property
    def pads(self) -> list[tuple[int, int, int, int]]:
        if self.padding is not None:
            return list(self.padding)
        (dh, dw), halves = self.dilation, [(kh // 2, kw // 2) for kh, kw in self.kernels]
        return [(b * dw, b * dw, a * dh, a * dh) for a, b in halves]

    @property
    def output_size(self) -> tuple[int, int]:
        left, right, top, bottom = self.pads[0]
        kh, kw = self.kernels[0]
        return (
            (self.h + top + bottom - self.dilation[0] * (kh - 1) - 1) // self.stride[0] + 1,
            (self.w + left + right - self.dilation[1] * (kw - 1) - 1) // self.stride[1] + 1,
        )


K357 = ((3, 3), (5, 5), (7, 7))
_BN = Epi(scale=True, shift=True)
_BIAS_BN = Epi(bias=True, scale=True, shift=True)
_FULL = Epi(bias=True, scale=True, shift=True, residual=True, activation="silu", post_activation="gelu")
_DW_FULL = Epi(bias=True, scale=True, shift=True, activation="sigmoid", post_activation="silu")

CASES = [
    PartsCase(id="k357-c16-stage1-cl", c=16, k=16, w=16, kernels=K357, layout="channels_last", dw=_BN, pw=_BIAS_BN,
              interpreted=(5, 6)),
    PartsCase(id="k357-s2-c5-nchw", c=5, kernels=K357, stride=(2, 2), h=9, dw=_BN, pw=Epi(bias=True)),
    # The last register of each part reaches into the next one, that of the last past the end.
    PartsCase(id="k33-c33-s2-cl-twice_the_same", c=33, k=17, kernels=((3, 3), (3, 3)), stride=(2, 2),
              layout="channels_last", dw=_BIAS_BN, pw=Epi(bias=True, activation="sigmoid")),
    PartsCase(id="k3-one_part", kernels=((3, 3),), stride=(2, 1), dw=_BN),
    PartsCase(id="k13_31-pairs", kernels=((1, 3), (3, 1)), layout="channels_last", dw=Epi(bias=True)),
    PartsCase(id="k731-largest_first-nchw", kernels=((7, 7), (3, 3), (1, 1)), c=19, dw=_DW_FULL),
    PartsCase(id="k35-dilated-stride_pair", dilation=(2, 1), stride=(1, 2), h=11, layout="channels_last"),
    PartsCase(id="k2_3-even-asymmetric", kernels=((2, 2), (3, 3)), padding=((0, 1, 1, 0), (2, 0, 0, 2)), dw=_BN),
    PartsCase(id="k13x3_9x5-taller_than_the_map", kernels=((13, 3), (9, 5)), h=6, dw=_BN),
    PartsCase(id="k19x3-slices", kernels=((19, 3), (3, 3)), h=21, w=6, c=4, layout="channels_last"),
    PartsCase(id="split-c19-nchw", split=True, c=19, kernels=K357, dw=_BIAS_BN, pw=_FULL),
    PartsCase(id="split-c40-s2-cl", split=True, c=40, k=33, kernels=K357, stride=(2, 2), h=10, layout="channels_last",
              dw=_DW_FULL, pw=Epi(bias=True, activation="silu")),
    PartsCase(id="split-c2-k357-cl_odd_chunk", split=True, c=3, kernels=K357, layout="cl_odd_chunk", dw=_BN),
    PartsCase(id="split-stride_pair-nchw", split=True, c=34, stride=(1, 2), dw=_BN),
    PartsCase(id="batch0", n=0, kernels=K357, dw=_BN, pw=_FULL),
    PartsCase(id="cl_odd_chunk-full", c=29, layout="cl_odd_chunk", dw=_DW_FULL, pw=_FULL),
    PartsCase(id="expanded-full-float_params", n=3, layout="expand_batch", dw=_DW_FULL, pw=_FULL, float_params=True),
    PartsCase(id="transposed", layout="transposed", pw=Epi(residual=True)),
    PartsCase(id="c40-29x21-tiles-cl", n=1, c=40, k=24, h=29, w=21, layout="channels_last", dw=_BIAS_BN,
              interpreted=(9, 10)),
    PartsCase(id="c20-29x21-tiles-nchw", n=1, c=20, k=24, h=29, w=21, kernels=K357, dw=_BN,
              interpreted=(9, 10)),
    PartsCase(id="c70-k210-4x4-panels", n=1, c=70, k=210, h=4, w=4, layout="channels_last", dw=_BN, pw=_BIAS_BN),
    PartsCase(id="n9-2x3-maps", n=9, h=2, w=3, c=17, kernels=K357, pw=Epi(bias=True)),
]  # fmt: skip
STRIDED = CASES[2]
# Without the second activation: its roundings take torch's own float16 chain past the norm bound.
FLOAT16 = (CASES[0], CASES[11], replace(CASES[15], pw=replace(_FULL, post_activation="none")))


def make_tensors(case: PartsCase, dtype: torch.dtype) -> Tensors:
    gen = generator(case.id)
    params = torch.float32 if case.float_params and dtype == torch.bfloat16 else dtype
    x = draw((case.n, case.c, case.h, case.w), gen, case.data, mean=1.0)
    tensors: Tensors = {"input": lay_out(x, case.layout, dtype)}
    for i, (channels, (kh, kw)) in enumerate(zip(case.channels, case.kernels, strict=True)):
        tensors[f"dw_weight{i}"] = draw((channels, 1, kh, kw), gen, case.data, (kh * kw) ** -0.5).to(dtype)
    mid = sum(case.channels)
    tensors["pw_weight"] = draw((case.k, mid, 1, 1), gen, case.data, mid**-0.5).to(dtype)
    for prefix, epi, channels in (("dw_", case.dw, mid), ("", case.pw, case.k)):
        for name in ("bias", "scale", "shift"):
            drawn = draw((channels,), gen, case.data).to(params)
            tensors[prefix + name] = drawn if getattr(epi, name) else None
    residual = draw((case.n, case.k, *case.output_size), gen, case.data, mean=1.0).to(dtype)
    tensors["residual"] = residual if case.pw.residual else None
    tensors["dw_residual"] = None
    return tensors


def weights_of(tensors: Tensors, case: PartsCase) -> list[Tensor]:
    return [tensors[f"dw_weight{i}"] for i in range(len(case.kernels))]


def oracle(tensors: Tensors, case: PartsCase) -> Tensor:
    """The depthwise convolutions at stride 1, the pointwise one strided: as the papers' authors write it."""
    x = tensors["input"]
    inputs = x.split(case.channels, 1) if case.split else [x] * len(case.kernels)
    bias = tensors["dw_bias"]
    biases = [None] * len(inputs) if bias is None or bias.dtype != x.dtype else bias.split(case.channels)
    parts = [
        F.conv2d(F.pad(part, pad), weight, b, 1, 0, case.dilation, groups=weight.shape[0])
        for part, pad, weight, b in zip(inputs, case.pads, weights_of(tensors, case), biases, strict=True)
    ]
    z = oracle_epilogue(torch.cat(parts, 1), tensors, "dw_", case.dw)
    bias = tensors["bias"]
    own = bias if bias is not None and bias.dtype == x.dtype else None
    return oracle_epilogue(F.conv2d(z, tensors["pw_weight"], own, case.stride), tensors, "", case.pw)


def call(tensors: Tensors, case: PartsCase, backend: str) -> Tensor:
    function = EF.mix_conv2d if case.split else EF.multiception_conv2d
    t = tensors
    return function(
        t["input"], weights_of(t, case), t["pw_weight"], t["dw_bias"], t["bias"], case.stride, case.padding,
        case.dilation, dw_activation=case.dw.activation, dw_negative_slope=case.dw.slope, dw_scale=t["dw_scale"],
        dw_shift=t["dw_shift"], negative_slope=case.pw.slope,
        dw_post_activation=case.dw.post_activation, activation=case.pw.activation, scale=t["scale"],
        shift=t["shift"], residual=t["residual"], post_activation=case.pw.post_activation, backend=backend,
    )  # fmt: skip


# ---- values and gradients -------------------------------------------------------------------------------------------


def check_forward(case: PartsCase, dtype: torch.dtype, backend: str) -> None:
    case = sized_for(case, backend)
    tensors = make_tensors(case, dtype)
    with torch.no_grad():
        out = call(tensors, case, backend)
        truth, yardstick = oracle(to_float64(tensors), case), oracle(tensors, case)
    expected = torch.empty(truth.shape, device="meta", memory_format=memory_format_of(tensors["input"]))
    assert out.dtype == dtype and out.stride() == expected.stride()
    assert_within_budget(out, truth, yardstick, f"{case.id} {backend} output")


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float64), ids=str)
@pytest.mark.parametrize("case", CASES, ids=ids(CASES))
def test_forward(case: PartsCase, dtype: torch.dtype, backend: str) -> None:
    check_forward(case, dtype, backend)


def check_gradients(case: PartsCase, dtype: torch.dtype, backend: str, wanted: list[str] | None = None) -> None:
    case = sized_for(case, backend)
    tensors = make_tensors(case, dtype)
    grad_output = draw((case.n, case.k, *case.output_size), generator(case.id + "/grad"), "normal", mean=0.5) + 1
    _, truth = gradients(lambda t: oracle(t, case), to_float64(tensors), grad_output, wanted)
    _, yardstick = gradients(lambda t: oracle(t, case), tensors, grad_output, wanted)
    _, actual = gradients(lambda t: call(t, case, backend), tensors, grad_output, wanted)
    for name, grad in actual.items():
        assert grad.dtype == tensors[name].dtype
        what = f"{case.id} {backend} gradient of {name}"
        assert_within_budget(grad, truth[name], yardstick[name], what, computed_in=dtype)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
@pytest.mark.parametrize("case", CASES, ids=ids(CASES))
def test_gradients(case: PartsCase, dtype: torch.dtype, backend: str) -> None:
    check_gradients(case, dtype, backend)


@pytest.mark.parametrize("case", CASES, ids=ids(CASES))
def test_gradients_bfloat16(case: PartsCase, cpp: str) -> None:
    check_gradients(case, torch.bfloat16, cpp)


@pytest.mark.parametrize("case", FLOAT16, ids=lambda c: c.id)
def test_float16(case: PartsCase, float16_backend: str) -> None:
    check_forward(case, torch.float16, float16_backend)
    check_gradients(case, torch.float16, float16_backend)


@pytest.mark.parametrize("case", (CASES[10], STRIDED, CASES[15]), ids=lambda c: c.id)
def test_one_gradient_alone(case: PartsCase, backend: str) -> None:
    """Also of one weight of several; interpreted, of every third tensor."""
    for name in present(make_tensors(case, torch.float32))[:: 3 if interpreted(backend) else 1]:
        check_gradients(case, torch.float32, backend, [name])


@pytest.mark.parametrize("case", (CASES[0], CASES[1], CASES[11]), ids=lambda c: c.id)
def test_threads_and_determinism(case: PartsCase, cpp: str) -> None:
    """Bands of rows of three images among two and three threads; the same bits in every call."""
    wide = replace(case, n=3, h=26, w=19)
    tensors, ones = make_tensors(wide, torch.float32), torch.ones(3, wide.k, *wide.output_size)
    for threads in (2, 3):
        torch.set_num_threads(threads)
        check_gradients(wide, torch.float32, cpp)
        first, second = (gradients(lambda t: call(t, wide, cpp), tensors, ones) for _ in range(2))
        assert torch.equal(first[0], second[0])
        assert all(torch.equal(grad, second[1][name]) for name, grad in first[1].items())


TINY = [
    PartsCase(id="tiny-multi", n=1, c=2, h=4, w=3, k=3, kernels=((3, 3), (1, 3)), dw=_DW_FULL, pw=_FULL),
    PartsCase(id="tiny-split-s2", split=True, n=2, c=3, h=4, w=3, k=2, stride=(2, 1), layout="channels_last",
              dw=_BN, pw=Epi(bias=True, activation="sigmoid")),
]  # fmt: skip


@pytest.mark.parametrize("case", TINY, ids=ids(TINY))
def test_gradcheck(case: PartsCase, backend: str) -> None:
    tensors = make_tensors(case, torch.float64)
    names = present(tensors)

    def function(*values: Tensor) -> Tensor:
        return call({**tensors, **dict(zip(names, values, strict=True))}, case, backend)

    leaves = tuple(tensors[name].detach().requires_grad_() for name in names)
    fast = interpreted(backend)  # one random direction instead of the whole Jacobian
    assert gradcheck(function, leaves, fast_mode=fast)
    assert gradgradcheck(function, leaves, fast_mode=fast)


# ---- what the papers say --------------------------------------------------------------------------------------------


def test_only_strided_positions_are_computed(backend: str) -> None:
    """NaN at what no strided window sees does not reach the output: it is never multiplied."""
    x = torch.full((1, 4, 9, 9), float("nan"))
    x[:, :, ::3, ::3] = torch.randn(1, 4, 3, 3)
    weights = [torch.randn(4, 1, 1, 1), torch.randn(4, 1, 1, 1)]
    pw = torch.randn(5, 8, 1, 1)
    out = EF.multiception_conv2d(x, weights, pw, stride=3, backend=backend)
    dense = F.conv2d(torch.cat([F.conv2d(x[:, :, ::3, ::3], w, groups=4) for w in weights], 1), pw)
    torch.testing.assert_close(out, dense)


def test_concatenation_is_scale_major(backend: str) -> None:
    """All channels of the first window come before those of the second."""
    x = torch.randn(1, 3, 4, 4)
    weights = [torch.full((3, 1, 1, 1), 1.0), torch.full((3, 1, 1, 1), 10.0)]
    out = EF.multiception_conv2d(x, weights, torch.eye(6).view(6, 6, 1, 1), backend=backend)
    torch.testing.assert_close(out, torch.cat((x, 10 * x), 1))


def test_more_parameters_in_equation_6_than_there_are() -> None:
    """C sum(k^2) + 3 C N weights, where Eq. 6 has 3 C (sum(k^2) + N)."""
    module = effops.MulticeptionConv2d(16, 32, bias=False, dw_norm=None, norm=None)
    squares = 9 + 25 + 49
    assert sum(p.numel() for p in module.parameters()) == 16 * squares + 3 * 16 * 32 < 3 * 16 * (squares + 32)


# ---- as torch sees the operators ------------------------------------------------------------------------------------


def raw_arguments(channels_last: bool = False, dtype: torch.dtype = torch.float32) -> list[Any]:
    x = torch.randn(2, 6, 7, 5, dtype=dtype)
    x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
    weights = [torch.randn(6, 1, 3, 3, dtype=dtype), torch.randn(6, 1, 5, 5, dtype=dtype)]
    dw = [torch.randn(12, dtype=dtype) for _ in range(3)]
    pw = [torch.randn(4, 12, 1, 1, dtype=dtype), *[torch.randn(4, dtype=dtype) for _ in range(3)]]
    silu = ACTIVATIONS.index("silu")
    geometry = [2, 1, 1, 1, 1, 1, 1, 1, 1, int(channels_last), silu, 0, silu, silu, 0, 2, 2, 2, 2]
    return [x, weights, *dw, *pw, torch.randn(2, 4, 4, 5, dtype=dtype), geometry, [0.1, 0.2]]


@pytest.mark.parametrize("channels_last", (False, True))
def test_opcheck(channels_last: bool, cpp: str) -> None:
    arguments = raw_arguments(channels_last)
    grad = torch.randn(2, 4, 4, 5)
    for operator, args in (
        (ops.dsconv_parts_fwd.default, arguments),
        (ops.dsconv_parts_bwd.default, [grad, None, *arguments, 0b1111111111]),
        (ops.dsconv_parts_bwd.default, [grad, None, *arguments, 0b0001000010]),
    ):
        assert set(torch.library.opcheck(operator, args).values()) == {"SUCCESS"}


def chain(x: Tensor, a: Tensor, b: Tensor, backend: str) -> Tensor:
    pw = a.new_ones(8, 16, 1, 1) * a.view(-1)[:8].view(-1, 1, 1, 1)
    y = EF.multiception_conv2d(x, [a, b], pw, activation="silu", residual=x, backend=backend)
    return EF.mix_conv2d(y, [a[:3], b[3:]], pw[:, :8], stride=2, backend=backend)


def leaves(batch: int) -> list[Tensor]:
    x = torch.randn(batch, 8, 5, 6).contiguous(memory_format=torch.channels_last)
    return [t.requires_grad_() for t in (x, torch.randn(8, 1, 3, 3), torch.randn(8, 1, 5, 5))]


def test_compile_fullgraph_with_a_dynamic_batch(backend: str) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda *t: chain(*t, backend), fullgraph=True, backend=counter)
    for batch in (2, 3, 5):
        tensors = leaves(batch)
        found, expected = compiled(*tensors), chain(*tensors, backend)
        torch.testing.assert_close(found, expected)
        assert found.stride() == expected.stride()
        grad = torch.randn_like(expected)
        pairs = zip(
            torch.autograd.grad(found, tensors, grad), torch.autograd.grad(expected, tensors, grad), strict=True
        )
        for a, b in pairs:
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert counter.frame_count <= 2


def test_export(backend: str) -> None:
    class Net(torch.nn.Module):
        def forward(self, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
            return chain(x, a, b, backend)

    example = tuple(t.detach() for t in leaves(2))
    program = export(Net(), example, dynamic_shapes=({0: Dim("n", max=64)}, None, None))
    other = tuple(t.detach() for t in leaves(4))
    torch.testing.assert_close(program.module()(*other), chain(*other, backend))


def test_autocast(backend: str) -> None:
    case = CASES[0]
    tensors = make_tensors(case, torch.float32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        out = call(tensors, case, backend)
    half = {n: t if t is None or "scale" in n or "shift" in n else t.bfloat16() for n, t in tensors.items()}
    with torch.no_grad():
        expected = call(half, case, backend)
    assert out.dtype == torch.bfloat16 and torch.equal(out, expected)


def test_flops(backend: str) -> None:
    x, weights = torch.randn(2, 6, 8, 8), [torch.randn(6, 1, 3, 3), torch.randn(6, 1, 5, 5)]
    with FlopCounterMode(display=False) as counter:
        EF.multiception_conv2d(x, weights, torch.randn(4, 12, 1, 1), stride=2, backend=backend)
    assert counter.get_total_flops() == 2 * 2 * 16 * (6 * (9 + 25) + 12 * 4)


def test_refusals(cpp: str) -> None:
    x, weights, pw = torch.randn(1, 4, 5, 5), [torch.randn(4, 1, 3, 3)], torch.randn(2, 4, 1, 1)
    with pytest.raises(RuntimeError, match="supports neither functorch transforms"):
        torch.func.vmap(lambda t: DSConvParts2dFunction.apply(
            t, None, None, None, pw, None, None, None, None, [1] * 15, [0.0, 0.0], cpp, *weights))(x[None])  # fmt: skip
    with pytest.raises(ValueError, match="no kernels of a backend 'reference'; accepted: 'triton', 'cuda', 'cpp'"):
        DSConvParts2dFunction.apply(x, *[None] * 8, [1] * 15, [0.0, 0.0], "reference", *weights)
    explained = effops.explain(
        lambda: EF.multiception_conv2d(x, [*weights, pw.new_ones(4, 1, 5, 5)], pw.repeat(1, 2, 1, 1))
    )
    assert [(call.kernel, call.backend) for call in explained.calls] == [("3x3, 5x5 + 1x1", "cpp")]


def test_many_windows(cuda: str) -> None:
    """The CUDA kernels take seven side by side."""
    x, pw = torch.randn(1, 2, 5, 4), torch.randn(3, 16, 1, 1)
    weights = [torch.randn(2, 1, size, 3) for size in (1, 3, 1, 3, 5, 1, 3, 7)]
    found = EF.multiception_conv2d(x, weights[:7], pw[:, :14], backend=cuda)
    torch.testing.assert_close(found, EF.multiception_conv2d(x, weights[:7], pw[:, :14], backend="reference"))
    with pytest.raises(RuntimeError, match="8 windows side by side are more than the 7 that it takes"):
        EF.multiception_conv2d(x, weights, pw, backend=cuda)


# ---- messages -------------------------------------------------------------------------------------------------------


def x(*shape: int, **kwargs: Any) -> Tensor:
    return torch.ones(shape or (2, 8, 9, 10), **kwargs)


def multi(input: Any = None, dw_weights: Any = None, pw_weight: Any = None, *args: Any, **kwargs: Any) -> Any:
    """multiception_conv2d on float32[2,8,9,10], [8,1,3,3] and [8,1,5,5], [6,16,1,1] but for what is given."""
    return EF.multiception_conv2d(
        x() if input is None else input,
        [x(8, 1, 3, 3), x(8, 1, 5, 5)] if dw_weights is None else dw_weights,
        x(6, 16, 1, 1) if pw_weight is None else pw_weight,
        *args,
        **kwargs,
    )


ERRORS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "weights-tensor": (
        lambda: multi(dw_weights=x(8, 1, 3, 3)), TypeError,
        "multiception_conv2d: dw_weights must be a list of tensors [C,1,R,S]; got Tensor",
    ),
    "weights-empty": (
        lambda: multi(dw_weights=[]), ValueError,
        "multiception_conv2d: dw_weights is empty; accepted: a tensor [C,1,R,S] for each part",
    ),
    "weights-element": (
        lambda: multi(dw_weights=[x(8, 1, 3, 3), "blur"]), TypeError,
        "multiception_conv2d: dw_weights[1] must be a tensor [C,1,R,S]; got 'blur' (str)",
    ),
    "weights-dtype": (
        lambda: multi(dw_weights=[x(8, 1, 3, 3, dtype=torch.float64)]), TypeError,
        "multiception_conv2d: dw_weights[0] has dtype torch.float64 but input has torch.float32; accepted: the "
        "input's dtype",
    ),
    "weights-rank": (
        lambda: multi(dw_weights=[x(8, 3, 3)]), ValueError,
        "multiception_conv2d: dw_weights[0] must have 4 dimensions [C,1,R,S]; got 3: [8,3,3]",
    ),
    "weights-channels": (
        lambda: multi(dw_weights=[x(8, 1, 3, 3), x(16, 1, 3, 3)]), ValueError,
        "multiception_conv2d: dw_weights[1] has 16 kernels but input has 8 channels; accepted: one kernel a channel "
        "in each",
    ),
    "weights-split": (
        lambda: EF.mix_conv2d(x(), [x(5, 1, 3, 3), x(4, 1, 5, 5)], x(6, 9, 1, 1)), ValueError,
        "mix_conv2d: dw_weights have 5 + 4 = 9 kernels but input has 8 channels; accepted: one kernel a channel in all",
    ),
    "weights-zero": (
        lambda: EF.mix_conv2d(x(), [x(8, 1, 3, 3), x(0, 1, 5, 5)], x(6, 8, 1, 1)), ValueError,
        "mix_conv2d: dw_weights[1] must have positive sizes, none may be 0; got [0,1,5,5]",
    ),
    "weights-dense": (
        lambda: multi(dw_weights=[x(8, 2, 3, 3)]), ValueError,
        "multiception_conv2d: dw_weights[0] must be [K,1,R,S], one input channel a kernel; got [8,2,3,3]",
    ),
    "sizes": (
        lambda: multi(dw_weights=[x(8, 1, 3, 3), x(8, 1, 4, 4)]), ValueError,
        "multiception_conv2d: the parts must have one output size; got 9x10, 10x11; accepted: odd windows with the "
        "default padding, or a padding for each that makes them equal",
    ),
    "padding-int": (
        lambda: multi(padding=1), TypeError,
        "multiception_conv2d: padding must be None (half the window) or a list with the padding of each part; got 1",
    ),
    "padding-length": (
        lambda: multi(padding=[1]), ValueError,
        "multiception_conv2d: padding has 1 elements for 2 parts; accepted: one a part",
    ),
    "padding-element": (
        lambda: multi(padding=[1, -2]), ValueError, "multiception_conv2d: padding must be at least 0; got -2",
    ),
    "stride": (lambda: multi(stride=0), ValueError, "multiception_conv2d: stride must be at least 1; got 0"),
    "pointwise-channels": (
        lambda: multi(pw_weight=x(6, 8, 1, 1)), ValueError,
        "multiception_conv2d: pw_weight takes 8 channels but the depthwise convolutions give 16 in all; accepted: "
        "[K,16,1,1]",
    ),
    "pointwise-window": (
        lambda: multi(pw_weight=x(6, 16, 3, 3)), ValueError,
        "multiception_conv2d: pw_weight must be [K,C,1,1] with K > 0; got [6,16,3,3]",
    ),
    "dw_bias": (
        lambda: multi(dw_bias=x(8)), ValueError,
        "multiception_conv2d: dw_bias must be [16], one value an output channel; got [8]",
    ),
    "scale": (
        lambda: multi(scale=x(16)), ValueError,
        "multiception_conv2d: scale must be [6], one value an output channel; got [16]",
    ),
    "residual": (
        lambda: multi(residual=x()), ValueError,
        "multiception_conv2d: residual must be [2,6,9,10], the convolution's output shape; got [2,8,9,10]",
    ),
    "activation": (
        lambda: multi(dw_activation="relu8"), ValueError,
        f"multiception_conv2d: unknown dw_activation 'relu8'; accepted: {', '.join(ACTIVATIONS)}",
    ),
    "slope": (
        lambda: multi(dw_negative_slope="a"), TypeError,
        "multiception_conv2d: dw_negative_slope must be a number; got 'a' (str)",
    ),
    "input": (
        lambda: multi(x(2, 8, 0, 4)), ValueError,
        "multiception_conv2d: input must have positive sizes, only the batch may be 0; got [2,8,0,4]",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_messages(name: str) -> None:
    function, kind, message = ERRORS[name]
    with pytest.raises(kind) as raised:
        function()
    assert str(raised.value) == message


# ---- raw operators --------------------------------------------------------------------------------------------------

_GEOMETRY = 10
BAD_RAW: dict[str, Callable[[list[Any]], Any]] = {
    "no_weights": lambda a: a.__setitem__(1, []),
    "fewer_weights_than_pads": lambda a: a[1].pop(),
    "kernels": lambda a: a[1].__setitem__(1, torch.ones(5, 1, 5, 5)),
    "size": lambda a: a[1].__setitem__(1, torch.ones(6, 1, 3, 3)),
    "weight_dtype": lambda a: a[1].__setitem__(1, a[1][1].double()),
    "weight_rank": lambda a: a[1].__setitem__(0, torch.ones(6, 3, 3)),
    "split_without_room": lambda a: a[_GEOMETRY].__setitem__(14, 1),
    "split_2": lambda a: a[_GEOMETRY].__setitem__(14, 2),
    "multiplier": lambda a: a[_GEOMETRY].__setitem__(8, 2),
    "negative_pad": lambda a: a[_GEOMETRY].__setitem__(15, -1),
    "huge_pad": lambda a: a[_GEOMETRY].__setitem__(16, 2**62),
    "stride": lambda a: a[_GEOMETRY].__setitem__(0, 0),
    "activation": lambda a: a[_GEOMETRY].__setitem__(12, 99),
    "short_geometry": lambda a: a[_GEOMETRY].pop(),
    "dw_bias": lambda a: a.__setitem__(2, torch.ones(6)),
    "pw_weight": lambda a: a.__setitem__(5, torch.ones(4, 6, 1, 1)),
    "scale": lambda a: a.__setitem__(7, torch.ones(12)),
    "residual": lambda a: a.__setitem__(9, torch.ones(2, 4, 7, 5)),
    "slopes": lambda a: a[11].pop(),
    "half": lambda a: a.__setitem__(0, a[0].half()),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_RAW)
def test_bad_raw_arguments_raise(name: str, cpp: str) -> None:
    arguments = raw_arguments()
    BAD_RAW[name](arguments)
    with pytest.raises(RuntimeError):
        ops.dsconv_parts_fwd(*arguments)
    with pytest.raises(RuntimeError):
        ops.dsconv_parts_bwd(torch.ones(2, 4, 4, 5), None, *arguments, 1)


def test_bad_raw_backward_raises(cpp: str) -> None:
    arguments, grad = raw_arguments(), torch.ones(2, 4, 4, 5)
    absent = [*arguments[:2], None, *arguments[3:]]
    for head, args, mask in (
        ((grad[:, :3], None), arguments, 1),
        ((grad, grad), arguments, 1),  # a saved output is of no use to silu
        ((grad, None), arguments, 1 << 10),
        ((grad, None), arguments, -1),
        ((grad, None), absent, 1 << 2),
    ):
        with pytest.raises(RuntimeError):
            ops.dsconv_parts_bwd(*head, *args, mask)


def test_random_garbage_never_crashes(cpp: str) -> None:
    """Random integers in the geometry beside weights of random sizes: a result or a RuntimeError."""
    gen = generator("garbage/parts")
    values = torch.tensor([-(2**63), -1, 0, 2, 3, 9, 2**40, 2**62, 2**63 - 1])
    right = refused = 0
    for _ in range(300):
        arguments = raw_arguments()
        sizes = [6, 1, *(torch.randint(1, 8, (2,), generator=gen).tolist())]
        arguments[1][1] = torch.randn(sizes)
        geometry = arguments[_GEOMETRY]
        geometry[15:] = [sizes[2] // 2, (sizes[2] - 1) // 2, sizes[3] // 2, (sizes[3] - 1) // 2]
        for i in range(len(geometry)):
            if torch.rand((), generator=gen) < 0.05:
                geometry[i] = values[torch.randint(0, len(values), (), generator=gen)].item()
        for run in (
            lambda a: ops.dsconv_parts_fwd(*a),
            lambda a: ops.dsconv_parts_bwd(torch.ones(2, 4, 4, 5), None, *a, 0b1111111111),
        ):
            try:
                run(arguments)
                right += 1
            except RuntimeError:
                refused += 1
    assert right > 100 and refused > 100, (right, refused)
