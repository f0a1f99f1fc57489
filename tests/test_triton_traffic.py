"""The traffic of the Triton kernels is the minimum of their pictures, counted from their own index arithmetic.

For every program: of the map it reads it loads those elements, each counted once, that its own results need, and none
besides. Over all programs: every result is stored exactly once, and what is only read by its owner is loaded once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import pytest
import torch
from cases import BsCase, DsCase, DwCase, Epi
from helpers import geometry_of, make_tensors
from triton_problems import backward_arguments, forward_arguments
from triton_traffic import Program, recorded

from effops.ops import geometry as G
from effops.ops.registration import INTERPRETING

pytestmark = pytest.mark.skipif(not INTERPRETING, reason="counts what the interpreter does")

LAYOUTS = ("contiguous", "channels_last")
WINDOWS = {
    "3x3": {"c": 20, "h": 11, "w": 13},
    "3x3-s2": {"c": 20, "h": 11, "w": 13, "stride": (2, 2)},
    "3x3-multiplier2": {"c": 9, "h": 7, "w": 8, "multiplier": 2},
    "1x5-dilated": {"c": 12, "h": 9, "w": 17, "kernel": (1, 5), "padding": (4, 4, 0, 0), "dilation": (1, 2)},
    "5x5": {"c": 8, "h": 9, "w": 10, "kernel": (5, 5), "padding": (2, 2, 2, 2)},
    "7x7": {"c": 8, "h": 9, "w": 10, "kernel": (7, 7), "padding": (3, 3, 3, 3)},  # a loop over the taps, or groups
}
# Those that the weight's gradient cuts into groups of taps: with a last one that reaches beyond the window, cut along
# both axes, strided, dilated.
WEIGHT_WINDOWS = WINDOWS | {
    "7x7-s2": {"c": 4, "h": 13, "w": 12, "kernel": (7, 7), "padding": (3, 3, 3, 3), "stride": (2, 2)},
    "7x7-s4": {"c": 4, "h": 17, "w": 19, "kernel": (7, 7), "padding": (2, 2, 2, 2), "stride": (4, 4)},
    "7x7-dilated": {"c": 2, "h": 9, "w": 10, "kernel": (7, 7), "padding": (6, 6, 6, 6), "dilation": (2, 2)},
    "5x9": {"c": 3, "h": 6, "w": 11, "kernel": (5, 9), "padding": (4, 4, 2, 2)},
    "1x31": {"c": 4, "h": 3, "w": 36, "kernel": (1, 31), "padding": (15, 15, 0, 0)},
    "31x1": {"c": 4, "h": 36, "w": 3, "kernel": (31, 1), "padding": (0, 0, 15, 15)},
}

Index = tuple[int, ...]


@pytest.fixture(autouse=True)
def _needs_triton(triton: str) -> None:
    """Skips where there is none."""


def under(pixels: Iterable[Index], case: DwCase | DsCase | BsCase, channel: bool = True) -> set[Index]:
    """Input elements under the windows of the output elements (n, o, p, q), without those in the padding.

    `channel=False`: of all input channels, as a pointwise convolution behind needs them.
    """
    (sh, sw), (dh, dw), (r, s) = case.stride, case.dilation, case.kernel
    left, _, top, _ = case.padding
    found = set()
    for n, o, p, q in pixels:
        channels = [o // case.multiplier] if channel else range(case.c)
        for i in range(r):
            for j in range(s):
                h, w = p * sh + i * dh - top, q * sw + j * dw - left
                if 0 <= h < case.h and 0 <= w < case.w:
                    found.update((n, c, h, w) for c in channels)
    return found


def each_stored_once(programs: list[Program], y: torch.Tensor) -> None:
    counts = Counter(index for program in programs for index in program.stored(y))
    assert len(counts) == y.numel() and set(counts.values()) == {1}


def of_kernel(programs: list[Program], name: str) -> list[Program]:
    found = [program for program in programs if program.kernel == name]
    assert found, {program.kernel for program in programs}
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("window", WINDOWS)
def test_depthwise_forward(window: str, layout: str) -> None:
    from effops.ops.dwconv.triton import dwconv_fwd

    case = DwCase(id="traffic", layout=layout, epi=Epi(bias=True, activation="silu"), **WINDOWS[window])
    tensors = make_tensors(case, torch.float32)
    x, geometry = tensors["input"], geometry_of(case, tensors["input"])
    with recorded() as programs:
        y = dwconv_fwd(*forward_arguments("dwconv_fwd", case, tensors, geometry))
    programs = of_kernel(programs, "_forward_kernel")
    assert len(programs) > 1
    each_stored_once(programs, y)
    for program in programs:
        assert program.loaded(x) == under(program.stored(y), case)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("window", WINDOWS)
def test_input_gradient(window: str, layout: str) -> None:
    from effops.ops.dwconv.triton import dwconv_fwd, input_gradient

    case = DwCase(id="traffic", layout=layout, **WINDOWS[window])
    tensors = make_tensors(case, torch.float32)
    x, geometry = tensors["input"], geometry_of(case, tensors["input"])
    grad = torch.randn_like(dwconv_fwd(*forward_arguments("dwconv_fwd", case, tensors, geometry)))
    readers: dict[Index, set[Index]] = {}  # input element -> the output elements whose window covers it
    for output in torch.cartesian_prod(*map(torch.arange, grad.shape)).tolist():
        for element in under([tuple(output)], case):
            readers.setdefault(element, set()).add(tuple(output))
    with recorded() as programs:
        dx = input_gradient(grad, tensors["weight"], x, geometry)
    programs = of_kernel(programs, "_input_gradient_kernel")
    each_stored_once(programs, dx)
    for program in programs:
        assert program.loaded(grad) == set().union(*(readers.get(index, set()) for index in program.stored(dx)))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("window", WEIGHT_WINDOWS)
def test_weight_gradient(window: str, layout: str) -> None:
    from effops.ops.dwconv.triton import dwconv_fwd, weight_gradient

    case = DwCase(id="traffic", layout=layout, **WEIGHT_WINDOWS[window])
    tensors = make_tensors(case, torch.float32)
    x, geometry = tensors["input"], geometry_of(case, tensors["input"])
    grad = torch.randn_like(dwconv_fwd(*forward_arguments("dwconv_fwd", case, tensors, geometry)))
    with recorded() as programs:
        weight_gradient(grad, x, tensors["weight"], geometry)
    owners: Counter[Index] = Counter()
    for program in of_kernel(programs, "_weight_gradient_kernel"):
        owned = program.loaded(grad)
        owners.update(owned)
        assert program.loaded(x) == under(owned, case)
    assert len(owners) == grad.numel() and set(owners.values()) == {1}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize(("k", "keep", "passthrough"), [(24, 0, 0), (70, 5, 3)], ids=["one_block", "every_part"])
def test_separable_forward(window: str, layout: str, k: int, keep: int, passthrough: int) -> None:
    """The programs of the first block of output channels store the kept ones too, without reading anything anew."""
    from effops.ops.dsconv.triton import dsconv_fwd

    case = DsCase(
        id="traffic", layout=layout, passthrough_layout=layout, k=k, keep=keep, passthrough=passthrough,
        dw=Epi(bias=True, activation="relu"), pw=Epi(scale=True, activation="silu"), **WINDOWS[window],
    )  # fmt: skip
    tensors = make_tensors(case, torch.float32)
    x, geometry = tensors["input"], geometry_of(case, tensors["input"])
    with recorded() as programs:
        y = dsconv_fwd(*forward_arguments("dsconv_fwd", case, tensors, geometry))
    programs = of_kernel(programs, "_forward_kernel")
    each_stored_once(programs, y)
    assert geometry[G.KEEP] == keep
    for program in programs:
        stored = program.stored(y)
        pixels = {(n, 0, p, q) for n, _, p, q in stored}
        assert program.loaded(x) == under(pixels, case, channel=False)
        if passthrough:
            assert program.loaded(tensors["passthrough"]) == {
                (n, c, p, q) for n, _, p, q in pixels for c in range(passthrough)
            }


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("window", WINDOWS)
def test_separable_backward(window: str, layout: str) -> None:
    """All channels fit one block here: each program owns its pixels, and reads their gradient and windows once."""
    from effops.ops.dsconv.triton import dsconv_bwd, dsconv_fwd

    case = DsCase(id="traffic", layout=layout, k=24, dw=Epi(activation="silu"), **WINDOWS[window])
    tensors = make_tensors(case, torch.float32)
    x, geometry = tensors["input"], geometry_of(case, tensors["input"])
    grad = torch.randn_like(dsconv_fwd(*forward_arguments("dsconv_fwd", case, tensors, geometry)))
    arguments = backward_arguments("dsconv_bwd", case, tensors, geometry, None, (grad,))
    with recorded() as programs:
        dsconv_bwd(*arguments)
    for kernel in ("_depthwise_gradient_kernel", "_matrix_gradient_kernel"):
        owners: Counter[Index] = Counter()
        for program in of_kernel(programs, kernel):
            owned = program.loaded(grad)
            owners.update(owned)
            assert program.loaded(x) == under({(n, 0, p, q) for n, _, p, q in owned}, case, channel=False)
        assert len(owners) == grad.numel() and set(owners.values()) == {1}, kernel


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("window", WINDOWS)
def test_separable_output_gradient(window: str, layout: str) -> None:
    """Where the sums are computed anew: the gradient by its owner alone, and what a forward tile would read."""
    from effops.ops.dsconv.triton import dsconv_bwd, dsconv_fwd

    case = DsCase(
        id="traffic", layout=layout, passthrough_layout=layout, k=70, passthrough=3, pw=Epi(activation="silu"),
        **WINDOWS[window],
    )  # fmt: skip
    tensors = make_tensors(case, torch.float32)
    x, geometry = tensors["input"], geometry_of(case, tensors["input"])
    grad = torch.randn_like(dsconv_fwd(*forward_arguments("dsconv_fwd", case, tensors, geometry)))
    with recorded() as programs:
        dsconv_bwd(*backward_arguments("dsconv_bwd", case, tensors, geometry, None, (grad,)))
    owners: Counter[Index] = Counter()
    for program in of_kernel(programs, "_output_gradient_kernel"):
        owned = program.loaded(grad)
        owners.update(owned)
        pixels = {(n, 0, p, q) for n, _, p, q in owned}
        assert program.loaded(x) == under(pixels, case, channel=False)
        assert program.loaded(tensors["passthrough"]) == {(n, c, p, q) for n, _, p, q in pixels for c in range(3)}
    assert len(owners) == grad.numel() and set(owners.values()) == {1}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("passed", [7, 40], ids=["one_block", "two_blocks"])
def test_passed_gradient(passed: int, layout: str) -> None:
    """No epilogue: the output's gradient itself is read, all its channels at the program's pixels, and nothing of x."""
    from effops.ops.dsconv.triton import dsconv_bwd, dsconv_fwd

    case = DsCase(id="traffic", layout=layout, passthrough_layout=layout, c=12, h=9, w=13, k=20, passthrough=passed)
    tensors = make_tensors(case, torch.float32)
    x, geometry = tensors["input"], geometry_of(case, tensors["input"])
    grad = torch.randn_like(dsconv_fwd(*forward_arguments("dsconv_fwd", case, tensors, geometry)))
    with recorded() as programs:
        found = dsconv_bwd(*backward_arguments("dsconv_bwd", case, tensors, geometry, None, (grad,)))
    programs = of_kernel(programs, "_passed_gradient_kernel")
    each_stored_once(programs, found[1])
    for program in programs:
        stored = program.stored(found[1])
        assert program.loaded(grad) == {(n, k, p, q) for n, _, p, q in stored for k in range(20)}
        assert not program.loaded(x)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("split", [False, True], ids=["multiception", "mixconv"])
def test_parts(split: bool, layout: str) -> None:
    """Forward: what the largest window covers, and no more for the others. Of an input gradient: every part's once."""
    from effops.ops.dsconv.triton_parts import dsconv_parts_bwd, dsconv_parts_fwd

    case = DwCase(id="traffic", layout=layout, c=6, h=9, w=10, kernel=(5, 5), padding=(2, 2, 2, 2))
    x = make_tensors(case, torch.float32)["input"]
    channels = (2, 4) if split else (6, 6)
    weights = [torch.randn(count, 1, size, size) for count, size in zip(channels, (3, 5), strict=True)]
    pads = [[size // 2] * 4 for size in (3, 5)]
    geometry = [1, 1, *pads[0], 1, 1, 1, int(layout == "channels_last"), 0, 0, 0, 0, int(split), *pads[1]]
    arguments = (x, weights, *[None] * 3, torch.randn(7, sum(channels), 1, 1), *[None] * 4, geometry, [0.0, 0.0])
    with recorded() as programs:
        y = dsconv_parts_fwd(*arguments)
    programs = of_kernel(programs, "_forward_kernel")
    assert len(programs) > 1
    each_stored_once(programs, y)
    small = DwCase(id="small", c=2, h=9, w=10)
    for program in programs:
        pixels = {(n, 0, p, q) for n, _, p, q in program.stored(y)}
        if split:
            large = {index for index in under(pixels, case, channel=False) if index[1] >= 2}
            assert program.loaded(x) == under(pixels, small, channel=False) | large
        else:
            assert program.loaded(x) == under(pixels, case, channel=False)
    with recorded() as programs:
        (dx,) = dsconv_parts_bwd(torch.randn_like(y), None, *arguments, 1)
    programs = of_kernel(programs, "_input_gradient_kernel")
    each_stored_once(programs, dx)


# Windows under which a patch's region has no pixel that no tap reads.
REGIONS = ("3x3", "3x3-s2", "5x5")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("middle", [0, 5], ids=["one_product", "two_products"])
@pytest.mark.parametrize("window", REGIONS)
def test_pointwise_depthwise_forward(window: str, middle: int, layout: str) -> None:
    """What is between the convolutions stays in scratch: a program reads x under its own windows, all channels."""
    from effops.ops.bsconv.triton import bsconv_fwd

    case = BsCase(id="traffic", layout=layout, k=40, m=middle, epi=Epi(bias=True), **WINDOWS[window])
    tensors = make_tensors(case, torch.float32)
    x = tensors["input"]
    with recorded() as programs:
        y = bsconv_fwd(*tensors.values(), geometry_of(case, x), [0.1, 0.2])
    assert {program.kernel for program in programs} == {"_forward_kernel"}
    each_stored_once(programs, y)
    for program in programs:
        assert program.loaded(x) == under(program.stored(y), case, channel=False)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("window", REGIONS)
def test_inverted_residual_forward(window: str, layout: str) -> None:
    """The same with a projection behind; its blocks of output channels each read x anew."""
    from triton_problems_mbconv import Case, forward_arguments

    from effops.ops.mbconv.triton import mbconv_fwd

    case = BsCase(id="traffic", layout=layout, **WINDOWS[window])
    (stride, _), (kernel, _) = case.stride, case.kernel
    sizes = {"n": case.n, "c": case.c, "h": case.h, "w": case.w, "d": 40, "k": 35}
    arguments = forward_arguments(Case(id="", kernel=kernel, stride=stride, layout=layout, **sizes), torch.float32)
    with recorded() as programs:
        y = mbconv_fwd(*arguments)
    assert {program.kernel for program in programs} == {"_forward_kernel"}
    each_stored_once(programs, y)
    for program in programs:
        assert program.loaded(arguments[0]) == under(program.stored(y), case, channel=False)
