"""The one timing function, used by pytest and by every peer's process, and the allocator settings that make it fair."""

from __future__ import annotations

import ctypes
import gc
import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

# glibc gives large blocks back to the system at once, so the next call pays page faults for the same memory: measured
# 2x on whole chains at batch 16. Raised thresholds keep the heap, alike in every process.
MALLOC_ENV = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 32), "MALLOC_TOP_PAD_": str(1 << 24)}
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4
_HEAP_BYTES = 768 << 20


@dataclass(frozen=True)
class Effort:
    """How long one measurement goes on: until `seconds` have passed, within [min_rounds, max_rounds] calls."""

    seconds: float = 0.12
    min_rounds: int = 7
    max_rounds: int = 400
    warmup: int = 3


QUICK = Effort(seconds=0.02, min_rounds=3, max_rounds=20, warmup=1)


def raise_malloc_thresholds() -> None:
    """The settings of MALLOC_ENV for a process that is running already (pytest)."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:  # not glibc
        return
    mallopt(_M_MMAP_MAX, 0)
    mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
    mallopt(_M_TOP_PAD, 1 << 24)


def warm_heap(size: int = _HEAP_BYTES) -> None:
    """Touch the heap once, so that no timed call is the first to use a page (without this up to ten calls fault)."""
    torch.zeros(size, dtype=torch.uint8).fill_(1)


def _faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def rounds_for(fn: Callable[[], object], effort: Effort) -> int:
    """Call `fn` for warm-up and say how many timed calls fit into the effort."""
    for _ in range(effort.warmup):
        fn()
    start = time.perf_counter()
    kept = fn()
    once = max(time.perf_counter() - start, 1e-7)
    del kept
    return max(effort.min_rounds, min(effort.max_rounds, int(effort.seconds / once)))


def summary(samples: list[float]) -> dict[str, float | int]:
    """Median, 20th and 80th percentile in microseconds of samples in seconds."""
    cuts = statistics.quantiles(samples, n=5, method="inclusive") if len(samples) > 1 else [samples[0]] * 4
    return {
        "median_us": round(statistics.median(samples) * 1e6, 3),
        "p20_us": round(cuts[0] * 1e6, 3),
        "p80_us": round(cuts[3] * 1e6, 3),
        "rounds": len(samples),
    }


def measure(fn: Callable[[], object], effort: Effort = Effort(), calls: int = 1) -> dict[str, float | int]:  # noqa: B008 (frozen)
    """Time `fn`; `calls` of it form one sample (for calls too short to be timed alone).

    The previous output stays alive during each call, so the allocator cannot hand back the buffer that is still warm.
    """
    rounds = rounds_for(fn, effort) if calls == 1 else max(effort.min_rounds, 25)
    if calls > 1:
        for _ in range(calls):
            fn()
    samples, kept = [], None
    collecting = gc.isenabled()
    gc.disable()
    faults = _faults()
    try:
        for _ in range(rounds):
            start = time.perf_counter()
            for _ in range(calls):
                kept = fn()
            samples.append((time.perf_counter() - start) / calls)
    finally:
        if collecting:
            gc.enable()
    del kept
    result = summary(samples)
    result["faults"] = round((_faults() - faults) / (rounds * calls), 1)
    return result
