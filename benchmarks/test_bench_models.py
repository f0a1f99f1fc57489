"""Whole networks, eager forward at their own input sizes."""

import pytest
import torch

from benchmarks import networks, shapes

SIDES = ("effops/nchw", "effops/channels_last", "eager/nchw", "eager/channels_last")


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("name", shapes.MODELS)
def test_forward(timed, name, batch, threads, side):
    peer, variant = side.split("/")
    problem = networks.ModelProblem(name, batch)
    with torch.no_grad():
        if peer == "effops":
            fn = problem.effops(variant)
        else:
            model, inputs = problem.stock(variant)
            fn = lambda: model(*inputs)  # noqa: E731 (the same kind of object as above)
        problem.check(fn, variant, own=peer == "effops")
        timed(fn, f"{name} b{batch} t{threads}")
