"""Blurred max pool: values, gradients and choices against torch's chain, errors, raw calls, and how torch sees it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import ids
from conftest import require_share
from helpers import assert_within_budget, draw, generator, interpreted, lay_out, memory_format_of
from module_helpers import compare, image
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import gradcheck, gradgradcheck

import effops
import effops.functional as EF
from effops import modules

ops = torch.ops.effops


@pytest.fixture(params=("reference", "cpp", "triton", "cuda"))
def backend(request: pytest.FixtureRequest) -> str:
    """The backends that have the operator."""
    return require_share(request.param, request.node)


@pytest.fixture(params=("cpp", "triton", "cuda"))
def kernels(request: pytest.FixtureRequest) -> str:
    """Those of them with kernels for it."""
    return require_share(request.param, request.node)


@dataclass(frozen=True, kw_only=True)
class PoolCase:
    id: str
    n: int = 2
    c: int = 8
    h: int = 9
    w: int = 11
    kernel: tuple[int, int] = (2, 2)
    stride: tuple[int, int] = (2, 2)
    padding: tuple[int, int] = (0, 0)
    size: int = 3
    mode: str = "zeros"
    layout: str = "contiguous"


CASES = [
    PoolCase(id="mosaicml-24x24-cl", c=16, h=24, w=24, layout="channels_last"),
    PoolCase(id="mosaicml-8x8-odd_c", c=5, h=8, w=8),
    PoolCase(id="zhang-cl", c=33, h=12, w=14, size=4, mode="reflect", layout="channels_last"),
    PoolCase(id="zhang-resnet", h=13, w=10, kernel=(3, 3), padding=(1, 1), size=4, mode="reflect"),
    PoolCase(id="size5-reflect", size=5, mode="reflect", layout="channels_last"),
    PoolCase(id="size7-reflect-smallest", h=5, w=5, size=7, mode="reflect"),
    PoolCase(id="size7-stride1-reflect", h=8, w=6, size=7, stride=(1, 1), mode="reflect"),
    PoolCase(id="size2", size=2, layout="channels_last"),
    PoolCase(id="size1-only_subsamples", size=1),
    # A row's gradient comes from more rows than a window has: those that saw it, and those that saw its mirror image.
    PoolCase(id="size2-reflect-stride1", h=3, w=2, kernel=(1, 1), stride=(1, 1), size=2, mode="reflect"),
    PoolCase(id="size5-reflect-stride1-nchw", h=4, w=5, kernel=(1, 1), stride=(1, 1), size=5, mode="reflect"),
    PoolCase(id="size6-above_the_map", h=3, w=2, size=6),
    PoolCase(id="kernel1x3", kernel=(1, 3), padding=(0, 1), stride=(1, 2), layout="channels_last"),
    PoolCase(id="kernel4x1", kernel=(4, 1), padding=(2, 0), stride=(3, 1)),
    PoolCase(id="kernel1-blur_alone", kernel=(1, 1), layout="channels_last"),
    PoolCase(id="stride3", stride=(3, 4), h=17, w=19),
    PoolCase(id="1x1_map", h=1, w=1, kernel=(1, 1)),
    PoolCase(id="one_pooled_pixel", h=2, w=2),
    PoolCase(id="batch0", n=0),
    PoolCase(id="cl_odd_chunk", c=29, layout="cl_odd_chunk"),
    PoolCase(id="cl_crop", c=16, layout="cl_crop"),
    PoolCase(id="every_second", layout="every_second"),
    PoolCase(id="expand_channels", layout="expand_channels", n=3),
    PoolCase(id="transposed", layout="transposed"),
    PoolCase(id="many_rows-cl", n=1, c=40, h=70, w=38, layout="channels_last"),
    PoolCase(id="many_images", n=23, c=12, h=4, w=4, size=4, mode="reflect"),
]  # fmt: skip


def call(x: Tensor, case: PoolCase, backend: str) -> Tensor:
    return EF.blur_max_pool2d(
        x, case.kernel, case.stride, case.padding, filter_size=case.size, padding_mode=case.mode, backend=backend
    )


def oracle(x: Tensor, case: PoolCase) -> Tensor:
    """The chain in torch's words."""
    y = F.max_pool2d(x, case.kernel, 1, case.padding)
    before, behind = (case.size - 1) // 2, case.size // 2
    y = F.pad(y, (before, behind, before, behind), "reflect" if case.mode == "reflect" else "constant")
    line = {
        1: [1], 2: [1, 1], 3: [1, 2, 1], 4: [1, 3, 3, 1], 5: [1, 4, 6, 4, 1], 6: [1, 5, 10, 10, 5, 1],
        7: [1, 6, 15, 20, 15, 6, 1],
    }[case.size]  # fmt: skip
    line = torch.tensor(line, dtype=torch.float64) / sum(line)
    kernel = (line[:, None] * line).to(x.dtype).expand(x.shape[1], 1, case.size, case.size)
    return F.conv2d(y, kernel, None, case.stride, groups=x.shape[1])


def make(case: PoolCase, dtype: torch.dtype, data: str = "normal") -> tuple[Tensor, Tensor]:
    """The input and the gradient of the output."""
    x = draw((case.n, case.c, case.h, case.w), generator(case.id), data, mean=1.0)
    x = lay_out(x, case.layout, dtype)
    grad = draw(oracle(x.double(), case).shape, generator(case.id + "/grad"), data, mean=0.5) + 1
    return x, grad.to(dtype)


def with_gradient(function: Callable[[Tensor], Tensor], x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    leaf = x.detach().requires_grad_()
    y = function(leaf)
    return y.detach(), torch.autograd.grad(y, leaf, grad.to(y.dtype))[0]


# The reference is torch's own chain: its rounding is torch's, so that float64 tells all.
DTYPES = (torch.float64, torch.float32, torch.bfloat16)
RUNS = [
    ("reference", torch.float64),
    *((name, dtype) for name in ("cpp", "triton", "cuda") for dtype in DTYPES),
    ("triton", torch.float16),
    ("cuda", torch.float16),
]


@pytest.mark.parametrize(("name", "dtype"), RUNS, ids=str)
@pytest.mark.parametrize("case", CASES, ids=ids(CASES))
def test_values_and_gradients(case: PoolCase, name: str, dtype: torch.dtype, request: pytest.FixtureRequest) -> None:
    check_values_and_gradients(case, dtype, require_share(name, request.node))


def check_values_and_gradients(case: PoolCase, dtype: torch.dtype, name: str) -> None:
    """A max pool of the input itself rounds nothing: choices are the same in every dtype."""
    x, grad = make(case, dtype)
    y, dx = with_gradient(lambda t: call(t, case, name), x, grad)
    truth, dtruth = with_gradient(lambda t: oracle(t, case), x.double(), grad)
    yardsticks = with_gradient(lambda t: oracle(t, case), x, grad) if dtype != torch.float64 else (None, None)
    expected = torch.empty(truth.shape, device="meta", memory_format=memory_format_of(x))
    assert (y.dtype, y.shape, y.stride()) == (dtype, expected.shape, expected.stride())
    assert_within_budget(y, truth, yardsticks[0], f"{case.id} output")
    assert_within_budget(dx, dtruth, yardsticks[1], f"{case.id} gradient")


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("layout", ("contiguous", "channels_last"))
@pytest.mark.parametrize("special", (None, float("nan"), float("inf"), float("-inf")))
def test_pool_chooses_as_torch_does(special: float | None, layout: str, dtype: torch.dtype, kernels: str) -> None:
    """Ties on small integers, NaNs and infinities side by side: gradients go to the same elements, to the bit."""
    for case in (
        PoolCase(id="ties", c=21, h=9, w=11, layout=layout, size=1, stride=(1, 1)),
        PoolCase(id="ties2", c=21, h=9, w=11, layout=layout, size=1, stride=(2, 2)),
        PoolCase(id="ties3", c=21, h=9, w=11, kernel=(3, 3), padding=(1, 1), layout=layout, size=1, stride=(2, 2)),
        PoolCase(id="ties4", c=5, kernel=(4, 5), padding=(2, 1), layout=layout, size=1, stride=(1, 1)),
    ):
        x, grad = make(case, dtype, "exact")
        if special is not None:
            x[torch.rand(x.shape, generator=generator("special")) < 0.3] = special
        actual = with_gradient(lambda t, c=case: call(t, c, kernels), x, grad)
        expected = with_gradient(lambda t, c=case: oracle(t, c), x, grad)
        for a, b in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def test_sizes_of_the_paper(backend: str) -> None:
    """24 -> 23 -> 12 and 8 -> 7 -> 4 ("Nuts & Bolts", mosaicml's semantics); a constant map stays one inside."""
    for size, half in ((24, 12), (8, 4)):
        y = EF.blur_max_pool2d(torch.ones(1, 2, size, size), backend=backend)
        assert y.shape == (1, 2, half, half)
        torch.testing.assert_close(y[:, :, 1:-1, 1:-1], torch.ones(1, 2, half - 2, half - 2))
    y = EF.blur_max_pool2d(torch.ones(1, 2, 9, 9), filter_size=4, padding_mode="reflect", backend=backend)
    torch.testing.assert_close(y, torch.ones(1, 2, 4, 4))


@pytest.mark.parametrize("check", (gradcheck, gradgradcheck), ids=("once", "twice"))
@pytest.mark.parametrize(("size", "mode"), ((3, "zeros"), (4, "reflect")))
def test_gradcheck(size: int, mode: str, check: Callable, backend: str) -> None:
    torch.set_num_threads(1)
    case = PoolCase(id="gradcheck", n=2, c=2, h=4, w=5, size=size, mode=mode)
    x, _ = make(case, torch.float64)
    # One random direction instead of the whole Jacobian for interpreted kernels, as in test_gradcheck.py.
    assert check(lambda t: call(t, case, backend), [x.requires_grad_()], fast_mode=interpreted(backend))


def test_blur_pool_has_both_semantics(backend: str) -> None:
    """mosaicml's blur_2d is BlurPool2d(C); Zhang's BlurPool is filter size 4, padded (1, 2, 1, 2) by reflection."""
    x = image(2, 6, 9, 8)
    ours = modules.BlurPool2d(6, backend=backend).double()
    line = torch.tensor([1.0, 2, 1], dtype=torch.float64) / 4
    kernel = (line[:, None] * line).expand(6, 1, 3, 3)
    torch.testing.assert_close(ours(x), F.conv2d(x, kernel, None, 2, 1, 1, 6), rtol=1e-12, atol=1e-12)
    ours = modules.BlurPool2d(6, 4, padding=(1, 2, 1, 2), padding_mode="reflect", backend=backend).double()
    line = torch.tensor([1.0, 3, 3, 1], dtype=torch.float64) / 8
    kernel = (line[:, None] * line).expand(6, 1, 4, 4)
    padded = F.pad(x, (1, 2, 1, 2), "reflect")
    torch.testing.assert_close(ours(x), F.conv2d(padded, kernel, None, 2, 0, 1, 6), rtol=1e-12, atol=1e-12)
    blurred = modules.BlurMaxPool2d(filter_size=4, padding_mode="reflect", backend=backend)(x)
    torch.testing.assert_close(blurred, ours(F.max_pool2d(x, 2, 1)), rtol=1e-12, atol=1e-12)


def test_module_matches_its_twin(backend: str) -> None:
    layers: list[Callable[[Any], torch.nn.Module]] = [
        lambda m: m.BlurMaxPool2d(),
        lambda m: m.BlurMaxPool2d((3, 2), (1, 2), (1, 0), filter_size=5, padding_mode="reflect"),
    ]
    for make_layer in layers:
        compare(make_layer, (image(2, 5, 9, 8),), backend, grads=True)
        compare(make_layer, (image(2, 5, 9, 8, channels_last=True),), backend, dtype=torch.float32, grads=True)
    assert repr(modules.BlurMaxPool2d()) == (
        "BlurMaxPool2d(kernel_size=(2, 2), stride=(2, 2), padding=(0, 0), filter_size=3, padding_mode='zeros')"
    )


# ---- as torch sees it -----------------------------------------------------------------------------------------------

GEOMETRY = [2, 2, 3, 2, 2, 0, 0, 0, 0]


@pytest.mark.parametrize("channels_last", (0, 1))
def test_opcheck(channels_last: int, cpp: str) -> None:
    x, geometry = torch.randn(2, 5, 8, 9), [*GEOMETRY[:8], channels_last]
    y = ops.blur_max_pool_fwd(x, geometry)
    for operator, given in ((ops.blur_max_pool_fwd, (x,)), (ops.blur_max_pool_bwd, (torch.randn_like(y), x))):
        result = torch.library.opcheck(operator.default, (*given, geometry))
        assert set(result.values()) == {"SUCCESS"}
        real, meta = operator(*given, geometry), operator(*[t.to("meta") for t in given], geometry)
        assert (real.shape, real.dtype, real.stride()) == (meta.shape, meta.dtype, meta.stride())


def test_compile_export_and_determinism(backend: str) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    layer = modules.BlurMaxPool2d(backend=backend)
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    for batch in (2, 3, 5):
        x, grad = torch.randn(batch, 4, 8, 9), torch.randn(batch, 4, 4, 4)
        found, expected = with_gradient(compiled, x, grad), with_gradient(layer, x, grad)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b)
    assert counter.frame_count <= 2
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(layer, (torch.randn(2, 4, 8, 9),), dynamic_shapes=({0: batch},))
    torch.testing.assert_close(program.module()(x), layer(x))
    h, w = (10, 12) if interpreted(backend) else (40, 40)
    x, grad = torch.randn(3, 24, h, w), torch.randn(3, 24, h // 2, w // 2)
    first, second = with_gradient(layer, x, grad), with_gradient(layer, x, grad)
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


def test_autocast_is_that_of_a_convolution(backend: str) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert EF.blur_max_pool2d(torch.ones(1, 2, 6, 6), backend=backend).dtype == torch.bfloat16


def test_explain(cpp: str) -> None:
    x = torch.randn(1, 4, 8, 8)
    (found,) = effops.explain(modules.BlurMaxPool2d(), x).calls
    assert (found.kernel, found.output, found.backend) == ("max pool 2x2 + blur 3x3 stride 2x2", "[1,4,4,4]", cpp)


# ---- errors ---------------------------------------------------------------------------------------------------------


def geometry_with(index: int, value: int) -> list[int]:
    return [*GEOMETRY[:index], value, *GEOMETRY[index + 1 :]]


BIG = 2**62
BAD = [geometry_with(i, v) for i in range(5) for v in (0, -1, BIG)]
BAD += [geometry_with(i, v) for i in (5, 6) for v in (-1, 2, BIG)]
BAD += [
    geometry_with(2, 8),
    geometry_with(3, 9),
    geometry_with(4, 11),
    geometry_with(7, -1),
    GEOMETRY[:-1],
    [],
    [1] * 10,
]
BAD += [[2, 2, 7, 6, 2, 0, 0, 1, 0]]  # 3 pooled rows, which reflect no 3 more


@pytest.mark.parametrize("geometry", BAD, ids=str)
def test_bad_geometry_raises(geometry: list[int], cpp: str) -> None:
    x = torch.randn(2, 5, 8, 9)
    with pytest.raises(RuntimeError):
        ops.blur_max_pool_fwd(x, geometry)
    with pytest.raises(RuntimeError):
        ops.blur_max_pool_bwd(torch.randn(2, 5, 4, 4), x, geometry)


def test_bad_tensor_raises(cpp: str) -> None:
    x, grad = torch.randn(2, 5, 8, 9), torch.randn(2, 5, 4, 4)
    for bad in (x[0], x[:, :0], x[..., :1], x.half(), x.int(), x.to("meta")):
        with pytest.raises((RuntimeError, NotImplementedError)):
            ops.blur_max_pool_bwd(grad, bad, GEOMETRY)
    for bad in (grad[0], grad[..., :-1], grad[:1], grad.double(), grad.to("meta")):
        with pytest.raises(RuntimeError):
            ops.blur_max_pool_bwd(bad, x, GEOMETRY)


def pool(*args: Any, **kwargs: Any) -> Tensor:
    return EF.blur_max_pool2d(torch.ones(2, 4, 6, 7), *args, **kwargs)


ERRORS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "input": (lambda: EF.blur_max_pool2d(3), TypeError, "input must be a tensor [N,C,H,W]; got 3 (int)"),
    "no width": (
        lambda: EF.blur_max_pool2d(torch.ones(2, 4, 6, 0)), ValueError,
        "input must have positive sizes, only the batch may be 0; got [2,4,6,0]",
    ),
    "kernel kind": (
        lambda: pool("2"), TypeError, "kernel_size must be an int or a pair (height, width) of ints; got '2' (str)",
    ),
    "stride": (lambda: pool(2, (1, 0)), ValueError, "stride must be from 1 to 2**31 - 1; got 0"),
    "padding": (lambda: pool(3, 2, 2), ValueError, "padding must be at most half of kernel_size 3; got 2"),
    "filter kind": (lambda: pool(filter_size=3.0), TypeError, "filter_size must be an int; got 3.0 (float)"),
    "filter": (lambda: pool(filter_size=8), ValueError, "filter_size must be at most 7; got 8"),
    "mode": (
        lambda: pool(padding_mode="circular"), ValueError,
        "unknown padding_mode 'circular'; accepted: zeros, reflect",
    ),
    "window": (
        lambda: pool((2, 8)), ValueError,
        "the pool's window is larger than the padded input: 2x8 against 6x7; accepted: a window no larger than the "
        "padded input",
    ),
    "reflection": (
        lambda: pool(5, filter_size=5, padding_mode="reflect"), ValueError,
        "a filter of size 5 reflects 2 rows and columns of the max pool's 2x3 result; accepted: a larger result, a "
        "smaller filter, or padding_mode='zeros'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name: str) -> None:
    function, kind, message = ERRORS[name]
    with pytest.raises(kind) as caught:
        function()
    assert str(caught.value) == f"blur_max_pool2d: {message}"


def test_module_errors() -> None:
    for arguments, message in (
        ({"padding": 2}, "padding must be at most half of kernel_size 2, got 2"),
        ({"filter_size": 9}, "filter_size must be at most 7, got 9"),
        ({"padding_mode": "same"}, "unknown padding_mode 'same'; accepted: zeros, reflect"),
    ):
        with pytest.raises(ValueError) as caught:
            modules.BlurMaxPool2d(**arguments)
        assert str(caught.value) == f"BlurMaxPool2d: {message}"
