"""The machine's limits as torch reaches them: copy bandwidth, matrix products, and what a pair of events reads."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch

from benchmarks.gpu import tasks
from benchmarks.gpu.clocks import Clock
from benchmarks.gpu.timing import Effort, calls_per_sample, warm_samples

_COPY_BYTES = 2 << 30
_SIZES = {"float16": 8192, "bfloat16": 8192, "tf32": 8192, "float32": 4096}


def measure(clock: Clock, effort: Effort, scale: float = 1.0) -> dict[str, float]:
    """GB/s (bytes read + written) and TFLOP/s on random data; `scale` shrinks the problems for a rehearsal."""
    found = {"copy_gbs": _copy(clock, effort, int(_COPY_BYTES * scale**3))}
    for precision, size in _SIZES.items():
        found[f"{precision}_tflops"] = _matmul(clock, effort, precision, max(64, int(size * scale)))
    start, end = clock.mark(), clock.mark()
    clock.wait()
    found["event_pair_us"] = round(clock.microseconds(start, end), 3)
    return found


def _median_us(fn: Callable[[], object], clock: Clock, effort: Effort) -> float:
    return statistics.median(warm_samples(fn, clock, calls_per_sample(fn, clock, effort), effort.samples))


def _four_digits(value: float) -> float:
    """Significant ones: a rehearsal on a slow CPU is far below what a fixed number of decimals shows."""
    return float(f"{value:.4g}")


def _copy(clock: Clock, effort: Effort, size: int) -> float:
    source = torch.randint(0, 127, (size,), dtype=torch.int8, device=clock.device)
    target = torch.empty_like(source)
    us = _median_us(lambda: target.copy_(source), clock, effort)
    return _four_digits(2 * size / us / 1e3)


def _matmul(clock: Clock, effort: Effort, precision: str, size: int) -> float:
    tasks.use_precision(precision)
    dtype = tasks.dtype_of(precision)
    a, b = (torch.randn(size, size, device=clock.device).to(dtype) for _ in range(2))
    out = torch.empty(size, size, device=clock.device, dtype=dtype)
    us = _median_us(lambda: torch.matmul(a, b, out=out), clock, effort)
    return _four_digits(2 * size**3 / us / 1e6)
