"""What the property tests draw: cases of every operator, and how each is held to the budget."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import test_blurmaxpool
import test_mbconv
import test_multiception
import test_se
import test_sepconv
import torch
from cases import ACTIVATIONS, BsCase, DsCase, DwCase, Epi
from helpers import (
    KINKS,
    assert_within_budget,
    check_forward,
    check_gradients,
    lay_out,
    output_size,
)
from hypothesis import assume
from hypothesis import strategies as st
from module_helpers import image, trio

LAYOUTS = (
    "contiguous", "channels_last", "cl_chunk", "cl_odd_chunk", "cl_crop", "offset", "crop", "every_second",
    "transposed", "batch_last", "expand_batch", "expand_channels", "expand_space",
)  # fmt: skip
SMOOTH = tuple(name for name in ACTIVATIONS if name not in KINKS)
FEW = st.one_of(st.integers(1, 20), st.sampled_from((24, 28, 31, 33, 40)))
MANY = st.integers(41, 300)  # several register tiles, panels and blocks of channels, and what is left over of each

Cases = st.SearchStrategy[Any]


@st.composite
def epilogues(draw, smooth: bool, residual: bool = True) -> Epi:
    activations = SMOOTH if smooth else ACTIVATIONS
    activation, post = draw(st.sampled_from(activations)), draw(st.sampled_from(activations))
    return Epi(
        # A kinked activation needs a parameter before it that can move its argument away from the kink.
        bias=activation in KINKS or draw(st.booleans()),
        scale=draw(st.booleans()),
        shift=post in KINKS or draw(st.booleans()),
        residual=residual and draw(st.booleans()),
        activation=activation,
        post_activation=post,
        slope=draw(st.sampled_from((0.01, 0.3, 0.0, -0.2, 1.5))),
    )


def maps(draw, channels: Cases = FEW) -> dict[str, Any]:
    """An input: its sizes and its layout."""
    return {
        "n": draw(st.sampled_from((0, 1, 2, 2, 2, 3))),
        "c": draw(channels),
        "h": draw(st.integers(1, 12)),
        "w": draw(st.integers(1, 12)),
        "layout": draw(st.sampled_from(LAYOUTS)),
        "id": f"drawn-{draw(st.integers(0, 10**6))}",
    }


def windowed(draw, channels: Cases = FEW) -> dict[str, Any]:
    """An input and a window over it."""
    pads = st.integers(0, 4)
    return maps(draw, channels) | {
        "kernel": draw(st.one_of(st.just((3, 3)), st.tuples(st.integers(1, 5), st.integers(1, 5)))),
        "stride": draw(st.one_of(st.just((1, 1)), st.just((2, 2)), st.tuples(st.integers(1, 3), st.integers(1, 3)))),
        "padding": draw(st.one_of(st.just((1, 1, 1, 1)), st.tuples(pads, pads, pads, pads))),
        "dilation": draw(st.one_of(st.just((1, 1)), st.tuples(st.integers(1, 3), st.integers(1, 3)))),
        # Shapes go down to results of one element, whose error is not to be judged after all of it has cancelled.
        "data": "positive",
    }


def depthwise(draw, channels: Cases) -> dict[str, Any]:
    """The parts that the cases of dwconv and dsconv share."""
    found = windowed(draw, channels)
    multiplier = draw(st.sampled_from((1, 1, 1, 2, 3))) if found["c"] <= 16 else 1
    return found | {
        "multiplier": multiplier,
        # Beside a multiplier, the public functions take a learned weight only.
        "bank": draw(st.one_of(st.none(), st.integers(1, found["c"] + 2))) if multiplier == 1 else None,
        "residual_layout": draw(st.sampled_from(LAYOUTS)),
        "float_params": draw(st.booleans()),
    }


def with_pixels(case: Any) -> Any:
    """The case, if it has an output."""
    assume(min(output_size(case)) > 0)
    return case


@st.composite
def dwconv(draw, dtype: torch.dtype, channels: Cases = FEW) -> DwCase:
    smooth = dtype == torch.bfloat16  # elsewhere values can be kept off the kinks
    return with_pixels(DwCase(epi=draw(epilogues(smooth)), **depthwise(draw, channels)))


@st.composite
def dsconv(draw, dtype: torch.dtype, channels: Cases = FEW) -> DsCase:
    smooth = dtype == torch.bfloat16
    common = depthwise(draw, channels)
    return with_pixels(
        DsCase(
            k=draw(channels),
            passthrough=draw(st.sampled_from((0, 0, 1, 5, 16))),
            passthrough_layout=draw(st.sampled_from(LAYOUTS)),
            keep=draw(st.one_of(st.just(0), st.integers(0, common["c"] * common["multiplier"]))),
            dw=draw(epilogues(smooth)),
            pw=draw(epilogues(smooth)),
            **common,
        )
    )


@st.composite
def bsconv(draw, dtype: torch.dtype, channels: Cases = FEW) -> BsCase:
    smooth = dtype == torch.bfloat16
    return with_pixels(
        BsCase(
            **windowed(draw, channels),
            residual_layout=draw(st.sampled_from(LAYOUTS)),
            float_params=draw(st.booleans()),
            k=draw(channels),
            m=draw(st.one_of(st.just(0), st.integers(1, 9))),
            mid=Epi(scale=draw(st.booleans()), shift=draw(st.booleans())),
            pw=draw(epilogues(smooth, residual=False)),
            epi=draw(epilogues(smooth)),
        )
    )


# The cases of the rooms below are not moved off the kinks: where one has any, only its values are compared.


@st.composite
def parts(draw, dtype: torch.dtype) -> test_multiception.PartsCase:
    smooth = draw(st.booleans())
    odd = st.sampled_from((1, 3, 5, 7))
    kernels = draw(st.lists(st.tuples(odd, odd), min_size=1, max_size=3))
    found = maps(draw)
    return test_multiception.PartsCase(
        **found | {"c": max(found["c"], len(kernels))},  # a part has a channel
        split=draw(st.booleans()),
        kernels=tuple(kernels),
        k=draw(FEW),
        stride=draw(st.tuples(st.integers(1, 2), st.integers(1, 3))),
        dilation=draw(st.tuples(st.integers(1, 2), st.integers(1, 2))),
        dw=draw(epilogues(smooth, residual=False)),
        pw=draw(epilogues(smooth)),
        float_params=draw(st.booleans()),
        data="positive",
    )


@st.composite
def sepconv(draw, dtype: torch.dtype) -> test_sepconv.SepCase:
    smooth = draw(st.booleans())
    case = test_sepconv.SepCase(
        **windowed(draw),
        multiplier=draw(st.sampled_from((1, 1, 2, 3))),
        pool=draw(st.sampled_from(("none", "row", "both"))),
        row=draw(epilogues(smooth, residual=False)),
        col=draw(epilogues(smooth, residual=False)),
        float_params=draw(st.booleans()),
    )
    p, q = output_size(case)
    assume(p > (case.pool == "both") and q > (case.pool != "none"))
    return case


@st.composite
def mbconv(draw, dtype: torch.dtype) -> test_mbconv.Case:
    smooth = draw(st.booleans())
    return with_pixels(
        test_mbconv.Case(
            **windowed(draw),
            residual_layout=draw(st.sampled_from(LAYOUTS)),
            d=draw(st.one_of(st.none(), st.integers(1, 60))),
            k=draw(FEW),
            se=draw(st.sampled_from((0, 0, 1, 4, 10))),
            se_activation=draw(st.sampled_from(SMOOTH if smooth else ACTIVATIONS)),
            se_gate="sigmoid" if smooth else draw(st.sampled_from(("sigmoid", "hardsigmoid"))),
            expand=draw(epilogues(smooth, residual=False)),
            dw=draw(epilogues(smooth, residual=False)),
            pw=draw(epilogues(smooth)),
        )
    )


@st.composite
def squeeze_excite(draw, dtype: torch.dtype) -> test_se.Case:
    found = maps(draw)
    return test_se.Case(
        **found,
        between=draw(st.integers(1, 20)),
        bias=draw(st.booleans()),
        activation=draw(st.sampled_from(SMOOTH)),
        gate="sigmoid",
        data="positive",
    )


@st.composite
def blur_max_pool(draw, dtype: torch.dtype) -> test_blurmaxpool.PoolCase:
    window = draw(st.tuples(st.integers(1, 4), st.integers(1, 4)))
    case = test_blurmaxpool.PoolCase(
        **maps(draw),
        kernel=window,
        stride=draw(st.tuples(st.integers(1, 3), st.integers(1, 3))),
        padding=tuple(draw(st.integers(0, size // 2)) for size in window),  # torch's limit
        size=draw(st.integers(1, 7)),
        mode=draw(st.sampled_from(("zeros", "reflect"))),
    )
    pooled = [size + 2 * pad - k + 1 for size, pad, k in zip((case.h, case.w), case.padding, window, strict=True)]
    assume(min(pooled) > (case.size // 2 if case.mode == "reflect" else 0))  # reflection needs as many pixels
    assume(all(p + case.size - 1 >= case.size for p in pooled))
    return case


@dataclass(frozen=True)
class EffNetCase:
    """A block of EffNet, in eval, and its input."""

    n: int
    c: int
    h: int
    w: int
    layout: str
    id: str
    k: int
    options: dict[str, Any]

    def make(self, layers: Any) -> torch.nn.Module:
        torch.manual_seed(zlib.crc32(self.id.encode()))
        return layers.EffNetBlock(self.c, self.k, **self.options).eval()


@st.composite
def effnet(draw, dtype: torch.dtype) -> EffNetCase:
    case = EffNetCase(
        **maps(draw),
        k=draw(FEW),
        options={
            "version": draw(st.sampled_from((1, 2))),
            "bottleneck": draw(st.sampled_from((1, 2))),
            "dw_act": draw(st.sampled_from((None, "relu", "silu"))),
            "slope": draw(st.sampled_from((None, 0.0, 0.3))),
            "residual": draw(st.booleans()),
            "downsample": draw(st.sampled_from(("pool", "stride"))),
            "norm": draw(st.sampled_from((None, torch.nn.BatchNorm2d))),
        },
    )
    assume(min(case.h, case.w) > 1)
    # An odd height is pooled down and strided up: the shortcut's then differs.
    assume(not case.options["residual"] or (case.h % 2 == case.w % 2 == 0))
    return case


# ---- what they are held to ------------------------------------------------------------------------------------------


def has_kinks(*epis: Epi) -> bool:
    return any(name in KINKS for epi in epis for name in (epi.activation, epi.post_activation))


def smooth_squeeze_excite(activation: str, gate: str) -> bool:
    return activation not in KINKS and gate not in KINKS


def smooth_mbconv(case: test_mbconv.Case) -> bool:
    squeezes = not case.se or smooth_squeeze_excite(case.se_activation, case.se_gate)
    return squeezes and not has_kinks(case.expand, case.dw, case.pw)


def hold(case: DwCase | DsCase | BsCase, dtype: torch.dtype, backend: str) -> None:
    check_forward(case, dtype, backend)
    check_gradients(case, dtype, backend)


def hold_parts(case: test_multiception.PartsCase, dtype: torch.dtype, backend: str) -> None:
    test_multiception.check_forward(case, dtype, backend)
    if not has_kinks(case.dw, case.pw):
        test_multiception.check_gradients(case, dtype, backend)


def hold_sepconv(case: test_sepconv.SepCase, dtype: torch.dtype, backend: str) -> None:
    test_sepconv.check_forward(case, dtype, backend)
    # In bfloat16 torch's chain pools rounded values: its choices are not the truth's.
    if not has_kinks(case.row, case.col) and (case.pool == "none" or dtype != torch.bfloat16):
        test_sepconv.check_gradients(case, dtype, backend)


def hold_mbconv(case: test_mbconv.Case, dtype: torch.dtype, backend: str) -> None:
    test_mbconv.test_values(case, dtype, backend)
    if smooth_mbconv(case):
        test_mbconv.check_gradients(case, dtype, backend)


def hold_effnet(case: EffNetCase, dtype: torch.dtype, backend: str) -> None:
    """The one kernel without gradients, against the stock twin's chain."""
    networks = trio(case.make, dtype, backend)
    x = lay_out(image(case.n, case.c, case.h, case.w), case.layout, dtype)
    with torch.no_grad():
        actual, yardstick, truth = (network(i) for network, i in zip(networks, (x, x, x.double()), strict=True))
    assert actual.dtype == dtype
    assert_within_budget(actual, truth, None if dtype == torch.float64 else yardstick, f"{case} {backend} output")


@dataclass(frozen=True)
class Operator:
    """An operator that is drawn.

    Attributes:
        op: its name among a backend's `operators`.
        cases: the strategy for a dtype.
        hold: checks values and gradients of a case.
        products: it multiplies matrices.
    """

    op: str
    cases: Callable[[torch.dtype], Cases]
    hold: Callable[[Any, torch.dtype, str], None]
    products: bool = True


OPERATORS = {
    "dwconv": Operator("dwconv", dwconv, hold, products=False),
    "dwconv of many channels": Operator("dwconv", lambda dtype: dwconv(dtype, MANY), hold, products=False),
    "dsconv": Operator("dsconv", dsconv, hold),
    "dsconv of many channels": Operator("dsconv", lambda dtype: dsconv(dtype, MANY), hold),
    "bsconv": Operator("bsconv", bsconv, hold),
    "bsconv of many channels": Operator("bsconv", lambda dtype: bsconv(dtype, MANY), hold),
    "parts": Operator("dsconv_parts", parts, hold_parts),
    "sepconv": Operator("sepconv", sepconv, hold_sepconv, products=False),
    "mbconv": Operator("mbconv", mbconv, hold_mbconv),
    "se": Operator("se", squeeze_excite, test_se.check_values_and_gradients, products=False),
    "blur_max_pool": Operator(
        "blur_max_pool", blur_max_pool, test_blurmaxpool.check_values_and_gradients, products=False
    ),
    "effnet": Operator("effnet", effnet, hold_effnet),
}
