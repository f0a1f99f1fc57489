"""Options and fixtures of `pytest benchmarks`: in-process measurements of effops and eager torch, gated by correctness.

These are for a quick look while working. The figures in the documents come from run.py, which gives every contestant
processes of its own, and for GPUs from `make gpu`. Tests marked gpu are timed by CUDA events (gpu/clocks.py).
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from benchmarks import gate, layers, machine, problems, shapes, timing
from benchmarks.gpu import clocks, contestants, tasks
from benchmarks.gpu import timing as gpu_timing


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
    if "batch" in metafunc.fixturenames and metafunc.definition.get_closest_marker("gpu") is None:
        metafunc.parametrize("batch", _numbers(metafunc.config, "--bench-batches"), ids=lambda b: f"b{b}")
    gpu = metafunc.definition.get_closest_marker("gpu") is not None
    if "batch" in metafunc.fixturenames and gpu:
        metafunc.parametrize("batch", (128, 1), ids=lambda b: f"b{b}")
    for name, cases in (
        ("ds_case", shapes.GPU_DSCONV if gpu else shapes.DSCONV),
        ("dw_case", shapes.DWCONV),
        ("bs_case", shapes.BSCONV),
        ("multi_case", shapes.MULTICEPTION),
        ("mb_case", shapes.MBCONV),
    ):
        if name in metafunc.fixturenames:
            every = metafunc.config.getoption("--bench-all-shapes")
            few = {*shapes.QUICK, *shapes.GPU_HEADLINES} if gpu else shapes.QUICK
            metafunc.parametrize(name, [c for c in cases if every or c.name in few], ids=lambda case: case.name)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs a CUDA GPU: torch.cuda.is_available() is False")
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(skip)


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


def _layer(case: shapes.LayerCase, batch: int, dtype: str) -> layers.LayerProblem:
    return layers.LayerProblem(case, batch, getattr(torch, dtype))


@pytest.fixture
def timed_case(timed) -> Callable[..., None]:
    """Builds the problem of a case, checks the contestant's result, then times it."""

    def run(case, batch: int, threads: int, side: str, dtype: str = "float32") -> None:
        build = _layer if isinstance(case, shapes.LayerCase) else problems.build
        problem = build(case, batch, dtype)
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


@pytest.fixture(scope="session")
def gpu_clock() -> clocks.CudaClock:
    torch.backends.cudnn.benchmark = True
    return clocks.CudaClock()


@pytest.fixture
def timed_on_gpu(benchmark, gpu_clock: clocks.CudaClock, request: pytest.FixtureRequest) -> Callable[..., None]:
    """Checks a contestant on a task, then times it: launched call by call or as a graph, L2 warm or flushed.

    The benchmark's timer must be clocks.EventTime (a marker of the test): warm, a round is many calls between two
    events, or one replay of a graph of many calls; flushed, it is one call, and the flush lies before the first event.
    """

    def run(task, side: str, mode: str, l2: str, group: str) -> None:
        effort = gpu_timing.QUICK if request.config.getoption("benchmark_disable") else gpu_timing.Effort()
        contestant = contestants.build(side, task)
        benchmark.group = f"{group} {mode} {l2}"
        with torch.set_grad_enabled(task.grad):
            task.check(contestant.call, side.startswith(contestants.OWN), side)
            fn, calls = contestant.call, gpu_timing.calls_per_sample(contestant.call, gpu_clock, effort)
            if mode == "graph":
                fn = gpu_clock.capture(fn, calls if l2 == "warm" else 1)
            if l2 == "flushed":
                benchmark.pedantic(fn, setup=gpu_clock.flush, rounds=effort.flushed, iterations=1)
                calls = 1
            else:
                launches = 1 if mode == "graph" else calls
                benchmark.pedantic(fn, rounds=effort.samples, iterations=launches, warmup_rounds=1)
        if benchmark.stats:
            replayed = calls if mode == "graph" else 1  # pytest-benchmark divides by iterations itself
            benchmark.extra_info |= timing.summary([sample / replayed for sample in benchmark.stats.stats.data])
            benchmark.extra_info |= {"calls_in_a_graph": replayed} if mode == "graph" else {}
        benchmark.extra_info["commit"] = machine.commit()

    return run


@pytest.fixture
def timed_case_on_gpu(timed_on_gpu, gpu_clock: clocks.CudaClock) -> Callable[..., None]:
    """The same for a case of shapes.py; what a backend declines is skipped with its reason."""

    def run(case, batch: int, side: str, mode: str, l2: str, precision: str = "float16") -> None:
        kind = "pair" if isinstance(case, shapes.DSCase) else "dw"
        request = {"kind": kind, "case": case.name, "batch": batch, "precision": precision, "direction": "forward"}
        tasks.use_precision(precision)
        try:
            timed_on_gpu(tasks.build(request, gpu_clock.device), side, mode, l2, f"{case.name} b{batch} {precision}")
        except RuntimeError as error:
            if reason := contestants.unable(error):
                pytest.skip(reason)
            raise

    return run
