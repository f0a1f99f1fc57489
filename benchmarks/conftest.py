"""Options and fixtures of `pytest benchmarks`: in-process measurements of effops and eager torch, gated by correctness.

These are for a quick look while working. The figures in the documents come from run.py, which gives every contestant
processes of its own.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from benchmarks import gate, machine, problems, shapes, timing


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("effops benchmarks")
    group.addoption("--bench-threads", default="1", help="comma-separated thread counts (default 1)")
    group.addoption("--bench-batches", default="1", help="comma-separated batch sizes (default 1)")
    group.addoption(
        "--bench-all-shapes", action="store_true", help="every shape of shapes.py instead of one of each kind"
    )


def pytest_configure(config: pytest.Config) -> None:
    timing.raise_malloc_thresholds()


def _numbers(config: pytest.Config, option: str) -> list[int]:
    return [int(part) for part in config.getoption(option).split(",")]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "threads" in metafunc.fixturenames:
        metafunc.parametrize(
            "threads", _numbers(metafunc.config, "--bench-threads"), ids=lambda t: f"t{t}", indirect=True
        )
    if "batch" in metafunc.fixturenames:
        metafunc.parametrize("batch", _numbers(metafunc.config, "--bench-batches"), ids=lambda b: f"b{b}")
    for name, cases in (("ds_case", shapes.DSCONV), ("dw_case", shapes.DWCONV)):
        if name in metafunc.fixturenames:
            every = metafunc.config.getoption("--bench-all-shapes")
            chosen = [case for case in cases if every or case.name in shapes.QUICK]
            metafunc.parametrize(name, chosen, ids=lambda case: case.name)


@pytest.fixture(scope="session", autouse=True)
def _warm_heap() -> None:
    timing.warm_heap()


@pytest.fixture
def threads(request: pytest.FixtureRequest):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture
def timed(benchmark, request: pytest.FixtureRequest) -> Callable[[Callable[[], object], str], None]:
    """Times a call by timing.py's plan under pytest-benchmark, with median, p20 and p80 in extra_info."""

    def run(fn: Callable[[], object], group: str) -> None:
        effort = timing.QUICK if request.config.getoption("benchmark_disable") else timing.Effort()
        benchmark.group = group
        benchmark.pedantic(fn, rounds=timing.rounds_for(fn, effort), iterations=1)
        if benchmark.stats:
            benchmark.extra_info |= timing.summary(benchmark.stats.stats.data)
        benchmark.extra_info["commit"] = machine.commit()

    return run


@pytest.fixture
def timed_case(timed) -> Callable[..., None]:
    """Builds the problem of a case, checks the contestant's result, then times it."""

    def run(case, batch: int, threads: int, side: str, dtype: str = "float32") -> None:
        problem = problems.build(case, batch, dtype)
        peer, variant = side.split("/")
        with torch.no_grad():
            if peer == "effops":
                fn = problem.effops(variant)
                gate.check(fn(), problem.eager_result(variant), problem.truth, side)
            else:
                module, inputs = problem.stock(variant)
                fn = lambda: module(*inputs)  # noqa: E731 (the same kind of object as above)
                gate.check_rival(fn(), problem.truth, side)
            timed(fn, f"{case.name} b{batch} t{threads} {dtype}")

    return run
