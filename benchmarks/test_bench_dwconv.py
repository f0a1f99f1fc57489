"""Depthwise convolutions: learned, shared, fixed banks and blur; effops and eager torch in both memory formats."""

import pytest

from benchmarks.gpu.clocks import EventTime

GPU_SIDES = ("effops-auto", "eager")
SIDES = ("effops/nchw", "effops/channels_last", "eager/nchw", "eager/channels_last")


@pytest.mark.parametrize("side", SIDES)
def test_forward(timed_case, dw_case, batch, threads, side):
    timed_case(dw_case, batch, threads, side)


@pytest.mark.gpu
@pytest.mark.benchmark(timer=EventTime)
@pytest.mark.parametrize("l2", ("warm", "flushed"))
@pytest.mark.parametrize("mode", ("calls", "graph"))
@pytest.mark.parametrize("side", GPU_SIDES)
def test_forward_on_gpu(timed_case_on_gpu, dw_case, batch, side, mode, l2):
    timed_case_on_gpu(dw_case, batch, side, mode, l2)
