"""Random operators, shapes, strides, layouts, dtypes and epilogues, held to the same budget as the named cases.

``EFFOPS_HYPOTHESIS`` sets the number of examples; setting it outside CI also draws new ones each run.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cases import ACTIVATIONS, BsCase, DsCase, DwCase, Epi
from helpers import KINKS, IllConditionedError, check_forward, check_gradients, interpreted, output_size
from hypothesis import assume, given, reject, settings
from hypothesis import strategies as st

LAYOUTS = (
    "contiguous", "channels_last", "cl_chunk", "cl_odd_chunk", "cl_crop", "offset", "crop", "every_second",
    "transposed", "batch_last", "expand_batch", "expand_channels", "expand_space",
)  # fmt: skip
SMOOTH = tuple(name for name in ACTIVATIONS if name not in KINKS)
CHANNELS = st.one_of(st.integers(1, 20), st.sampled_from((24, 28, 31, 33, 40)))


@st.composite
def epilogues(draw, smooth: bool) -> Epi:
    activations = SMOOTH if smooth else ACTIVATIONS
    activation, post = draw(st.sampled_from(activations)), draw(st.sampled_from(activations))
    return Epi(
        # A kinked activation needs a parameter before it that can move its argument away from the kink.
        bias=activation in KINKS or draw(st.booleans()),
        scale=draw(st.booleans()),
        shift=post in KINKS or draw(st.booleans()),
        residual=draw(st.booleans()),
        activation=activation,
        post_activation=post,
        slope=draw(st.sampled_from((0.01, 0.3, 0.0, -0.2, 1.5))),
    )


@st.composite
def cases(draw, dtype: torch.dtype, channel_counts: st.SearchStrategy[int] = CHANNELS) -> DwCase | DsCase:
    smooth = dtype == torch.bfloat16  # elsewhere values can be kept off the kinks
    kernel = draw(st.one_of(st.just((3, 3)), st.tuples(st.integers(1, 5), st.integers(1, 5))))
    dilation = draw(st.one_of(st.just((1, 1)), st.tuples(st.integers(1, 3), st.integers(1, 3))))
    pads = st.integers(0, 4)
    channels = draw(channel_counts)
    multiplier = draw(st.sampled_from((1, 1, 1, 2, 3))) if channels <= 16 else 1
    common = {
        "n": draw(st.sampled_from((0, 1, 2, 2, 2, 3))),
        "c": channels,
        "h": draw(st.integers(1, 12)),
        "w": draw(st.integers(1, 12)),
        "kernel": kernel,
        "stride": draw(st.one_of(st.just((1, 1)), st.just((2, 2)), st.tuples(st.integers(1, 3), st.integers(1, 3)))),
        "padding": draw(st.one_of(st.just((1, 1, 1, 1)), st.tuples(pads, pads, pads, pads))),
        "dilation": dilation,
        "multiplier": multiplier,
        # Beside a multiplier, the public functions take a learned weight only.
        "bank": draw(st.one_of(st.none(), st.integers(1, channels + 2))) if multiplier == 1 else None,
        "layout": draw(st.sampled_from(LAYOUTS)),
        "residual_layout": draw(st.sampled_from(LAYOUTS)),
        "float_params": draw(st.booleans()),
        # Shapes go down to results of one element, whose error is not to be judged after all of it has cancelled.
        "data": "positive",
        "id": f"drawn-{draw(st.integers(0, 10**6))}",
    }
    if draw(st.booleans()):
        case: DwCase | DsCase = DwCase(epi=draw(epilogues(smooth)), **common)
        out_channels = channels * multiplier
    else:
        out_channels = draw(channel_counts)
        case = DsCase(
            k=out_channels,
            passthrough=draw(st.sampled_from((0, 0, 1, 5, 16))),
            passthrough_layout=draw(st.sampled_from(LAYOUTS)),
            keep=draw(st.one_of(st.just(0), st.integers(0, channels * multiplier))),
            dw=draw(epilogues(smooth)),
            pw=draw(epilogues(smooth)),
            **common,
        )
    p, q = output_size(case)
    assume(p > 0 and q > 0)
    return case


@st.composite
def blueprint_cases(draw, dtype: torch.dtype, channel_counts: st.SearchStrategy[int] = CHANNELS) -> BsCase:
    smooth = dtype == torch.bfloat16
    drawn = draw(cases(dtype, channel_counts).filter(lambda case: isinstance(case, DwCase) and case.multiplier == 1))
    common = ("n", "c", "h", "w", "kernel", "stride", "padding", "dilation", "layout", "residual_layout")
    norm = {"scale": draw(st.booleans()), "shift": draw(st.booleans())}
    return BsCase(
        **{name: getattr(drawn, name) for name in (*common, "float_params", "data", "id")},
        k=draw(channel_counts),
        m=draw(st.one_of(st.just(0), st.integers(1, 9))),
        mid=Epi(**norm),
        pw=replace(draw(epilogues(smooth)), residual=False),
        epi=draw(epilogues(smooth)),
    )


def hold_budget(strategy: st.SearchStrategy, dtype: torch.dtype, backend: str, share: int) -> None:
    """Draws one ``share``-th of the profile's examples and holds values and gradients to the budget."""
    profile = settings.get_profile("effops")
    if interpreted(backend):
        share *= 3

    @settings(parent=profile, max_examples=max(profile.max_examples // share, 1))
    @given(case=strategy)
    def hold(case: DwCase | DsCase) -> None:
        # The interpreter has no bfloat16 products (conftest.py); here one would end the whole test as skipped.
        assume(not (interpreted(backend) and dtype == torch.bfloat16 and isinstance(case, DsCase)))
        try:
            check_forward(case, dtype, backend)
            check_gradients(case, dtype, backend)
        except IllConditionedError:  # saturated activations: no implementation has relative precision there
            reject()

    hold()


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float64), ids=str)
def test_drawn_case(dtype: torch.dtype, backend: str) -> None:
    hold_budget(cases(dtype), dtype, backend, share=8)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_drawn_case_of_many_channels(dtype: torch.dtype, backend: str) -> None:
    """Several register tiles, panels and blocks of channels, and what is left over of each."""
    hold_budget(cases(dtype, st.integers(41, 300)), dtype, backend, share=16)


@pytest.mark.parametrize("channels", (CHANNELS, st.integers(41, 300)), ids=("few", "many"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float64), ids=str)
def test_drawn_blueprint_case(dtype: torch.dtype, channels: st.SearchStrategy[int], cpp: str) -> None:
    hold_budget(blueprint_cases(dtype, channels), dtype, cpp, share=8)
