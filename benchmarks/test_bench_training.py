"""Forward + backward of a VGNet half-identity block and of the modules, and the bytes saved for backward."""

import pytest

from benchmarks import shapes, training


@pytest.mark.parametrize("channels, size", shapes.TRAINING, ids=lambda value: str(value))
@pytest.mark.parametrize("peer", ("effops", "eager"))
def test_forward_backward(timed, benchmark, threads, peer, channels, size):
    problem = training.TrainingProblem(channels, size, batch=4)
    for variant, fn in problem.candidates(peer):
        if variant == "channels_last":
            problem.check(fn, variant, own=peer == "effops")
            timed(fn, f"half-{channels}-{size} t{threads}")
            benchmark.extra_info["saved_bytes"] = problem.saved_bytes(peer, variant)


@pytest.mark.parametrize("name", training.MODULES)
@pytest.mark.parametrize("peer", ("effops", "eager"))
def test_module_forward_backward(timed, benchmark, threads, peer, name):
    problem = training.ModuleTraining(name, batch=4)
    for variant, fn in problem.candidates(peer):
        if variant == "channels_last":
            problem.check(fn, variant, own=peer == "effops")
            timed(fn, f"{name} t{threads}")
            benchmark.extra_info["saved_bytes"] = problem.saved_bytes(peer, variant)
