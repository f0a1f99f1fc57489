"""Depthwise -> pointwise chains: effops and eager torch in both memory formats, and effops in bf16."""

import pytest

SIDES = ("effops/nchw", "effops/channels_last", "eager/nchw", "eager/channels_last")


@pytest.mark.parametrize("side", SIDES)
def test_forward(timed_case, ds_case, batch, threads, side):
    timed_case(ds_case, batch, threads, side)


@pytest.mark.parametrize("side", ("effops/nchw", "effops/channels_last"))
def test_forward_bf16(timed_case, ds_case, batch, threads, side):
    timed_case(ds_case, batch, threads, side, "bfloat16")


def test_pointwise_part(timed_case, ds_case, batch, threads):
    timed_case(ds_case.pointwise_only(), batch, threads, "effops/channels_last")
