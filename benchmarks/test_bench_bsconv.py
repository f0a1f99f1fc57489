"""Pointwise -> depthwise chains: effops and eager torch in both memory formats."""

import pytest

SIDES = ("effops/nchw", "effops/channels_last", "eager/nchw", "eager/channels_last")


@pytest.mark.parametrize("side", SIDES)
def test_forward(timed_case, bs_case, batch, threads, side):
    timed_case(bs_case, batch, threads, side)
