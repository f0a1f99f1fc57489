"""Times a call on a device: launched call by call and as a CUDA graph, with a warm L2 cache and with a flushed one.

    warm     samples of many calls back to back between two marks; the same buffers every time
    flushed  one call between two marks, after a flush (not in it: the marks lie on the device's timeline)

All samples are launched first and read afterwards: the host never waits for the device inside what is timed. A call
that the device finishes faster than the host can launch it is timed at the host's pace when launched call by call,
which is what eager mode costs; its graph shows the device's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.gpu.clocks import Clock
from benchmarks.timing import summary


@dataclass(frozen=True)
class Effort:
    """How long a measurement goes on: `samples` warm samples of about `sample_us`, `flushed` single calls."""

    sample_us: float = 4000.0
    samples: int = 25
    flushed: int = 25
    warmup: int = 5
    most_calls: int = 200


QUICK = Effort(sample_us=200.0, samples=3, flushed=3, warmup=1, most_calls=4)


def once_us(fn: Callable[[], object], clock: Clock, effort: Effort) -> float:
    """A first estimate of one call, after warm-up (and whatever autotuning the first call does)."""
    for _ in range(effort.warmup):
        fn()
    clock.wait()
    calls = 5
    start = clock.mark()
    for _ in range(calls):
        fn()
    end = clock.mark()
    clock.wait()
    return max(clock.microseconds(start, end) / calls, 0.1)


def warm_samples(launch: Callable[[], object], clock: Clock, launches: int, samples: int) -> list[float]:
    """Microseconds of one launch, a value for each sample of `launches` of them."""
    for _ in range(launches):
        launch()
    marks = []
    for _ in range(samples):
        start = clock.mark()
        for _ in range(launches):
            launch()
        marks.append((start, clock.mark()))
    clock.wait()
    return [clock.microseconds(start, end) / launches for start, end in marks]


def _flushed(launch: Callable[[], object], clock: Clock, samples: int) -> list[float]:
    marks = []
    for _ in range(samples):
        clock.flush()
        start = clock.mark()
        launch()
        marks.append((start, clock.mark()))
    clock.wait()
    return [clock.microseconds(start, end) for start, end in marks]


def _summaries(warm: list[float], flushed: list[float]) -> dict[str, dict]:
    return {name: summary([us / 1e6 for us in samples]) for name, samples in (("warm", warm), ("flushed", flushed))}


def calls(fn: Callable[[], object], clock: Clock, effort: Effort) -> dict[str, dict]:
    """`fn` launched call by call."""
    launches = calls_per_sample(fn, clock, effort)
    return _summaries(warm_samples(fn, clock, launches, effort.samples), _flushed(fn, clock, effort.flushed))


def graph(fn: Callable[[], object], clock: Clock, effort: Effort) -> dict[str, dict]:
    """`fn` captured in CUDA graphs: many calls in one graph for the warm time, so that a replay's own cost vanishes."""
    inner = calls_per_sample(fn, clock, effort)
    many, one = clock.capture(fn, inner), clock.capture(fn, 1)
    warm = [us / inner for us in warm_samples(many, clock, 1, effort.samples)]
    return _summaries(warm, _flushed(one, clock, effort.flushed))


def calls_per_sample(fn: Callable[[], object], clock: Clock, effort: Effort) -> int:
    return max(1, min(effort.most_calls, int(effort.sample_us / once_us(fn, clock, effort))))


MODES = {"calls": calls, "graph": graph}
