"""Pointwise -> depthwise chains: effops and eager torch in both memory formats, forward, and forward + backward."""

import pytest

from benchmarks import networks, shapes

SIDES = ("effops/nchw", "effops/channels_last", "eager/nchw", "eager/channels_last")


@pytest.mark.parametrize("side", SIDES)
def test_forward(timed_case, bs_case, batch, threads, side):
    timed_case(bs_case, batch, threads, side)


@pytest.mark.parametrize("peer", ("effops", "eager"))
@pytest.mark.parametrize("name", sorted(shapes.BS_TRAINING & shapes.QUICK))
def test_forward_backward(timed, benchmark, batch, threads, peer, name):
    problem = networks.BlueprintTraining(shapes.find(name), batch)
    for variant, fn in problem.candidates(peer):
        if variant == "channels_last":
            problem.check(fn, variant, own=peer == "effops")
            timed(fn, f"{name} b{batch} t{threads} training")
            benchmark.extra_info["saved_bytes"] = problem.saved_bytes(peer, variant)
