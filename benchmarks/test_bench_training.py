"""A VGNet half-identity block, forward + backward, and the bytes a chain of four saves for backward."""

import pytest

from benchmarks import networks, shapes


@pytest.mark.parametrize("channels, size", shapes.TRAINING, ids=lambda value: str(value))
@pytest.mark.parametrize("peer", ("effops", "eager"))
def test_forward_backward(timed, benchmark, threads, peer, channels, size):
    problem = networks.TrainingProblem(channels, size, batch=4)
    for variant, fn in problem.candidates(peer):
        if variant == "channels_last":
            problem.check(fn, variant, own=peer == "effops")
            timed(fn, f"half-{channels}-{size} t{threads}")
            benchmark.extra_info["saved_bytes"] = problem.saved_bytes(peer, variant)
