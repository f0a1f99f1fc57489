"""Depthwise -> pointwise chains: effops and eager torch in both memory formats, and effops in bf16."""

import pytest

from benchmarks.gpu.clocks import EventTime

GPU_SIDES = ("effops-auto", "eager")
SIDES = ("effops/nchw", "effops/channels_last", "eager/nchw", "eager/channels_last")


@pytest.mark.parametrize("side", SIDES)
def test_forward(timed_case, ds_case, batch, threads, side):
    timed_case(ds_case, batch, threads, side)


@pytest.mark.parametrize("side", ("effops/nchw", "effops/channels_last"))
def test_forward_bf16(timed_case, ds_case, batch, threads, side):
    timed_case(ds_case, batch, threads, side, "bfloat16")


def test_pointwise_part(timed_case, ds_case, batch, threads):
    timed_case(ds_case.pointwise_only(), batch, threads, "effops/channels_last")


@pytest.mark.gpu
@pytest.mark.benchmark(timer=EventTime)
@pytest.mark.parametrize("l2", ("warm", "flushed"))
@pytest.mark.parametrize("mode", ("calls", "graph"))
@pytest.mark.parametrize("side", GPU_SIDES)
def test_forward_on_gpu(timed_case_on_gpu, ds_case, batch, side, mode, l2):
    timed_case_on_gpu(ds_case, batch, side, mode, l2)
