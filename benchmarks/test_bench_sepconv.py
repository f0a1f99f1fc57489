"""EffNet's separable convolutions and blocks: effops and eager torch in both memory formats."""

import pytest

from benchmarks import shapes

SIDES = ("effops/nchw", "effops/channels_last", "eager/nchw", "eager/channels_last")


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("case", shapes.EFFNET, ids=lambda case: case.name)
def test_forward(timed_case, case, batch, threads, side):
    timed_case(case, batch, threads, side)
