"""What measurements are taken with: CUDA events, graph capture and L2 flushes, or the host's clock for a rehearsal."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Protocol

import torch

_LEAST_FLUSH_BYTES = 256 << 20


class Clock(Protocol):
    """A device's clock. Nothing here waits for the device except `wait`."""

    device: torch.device

    def mark(self) -> Any:
        """A point on the device's timeline, after what was launched so far."""

    def microseconds(self, start: Any, end: Any) -> float:
        """Time between two marks; only after `wait`."""

    def wait(self) -> None:
        """Until the device has done everything."""

    def flush(self) -> None:
        """Launch work after which the L2 cache holds nothing of the measured call, and nothing to write back."""

    def capture(self, fn: Callable[[], object], calls: int) -> Callable[[], object]:
        """One launch that does `calls` calls of `fn`."""


class CudaClock:
    """CUDA events on the current stream."""

    def __init__(self) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device())
        l2 = torch.cuda.get_device_properties(self.device).L2_cache_size
        elements = max(_LEAST_FLUSH_BYTES, 4 * l2) // 4
        self._buffer = torch.zeros(elements, device=self.device)
        self._sink = torch.zeros((), device=self.device)

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def microseconds(self, start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        return start.elapsed_time(end) * 1e3

    def wait(self) -> None:
        torch.cuda.synchronize(self.device)

    def flush(self) -> None:
        self._buffer.fill_(1.0)
        # Read it too: the lines just written are dirty, and the measured call would pay for writing them back.
        torch.sum(self._buffer, 0, out=self._sink)

    def capture(self, fn: Callable[[], object], calls: int) -> Callable[[], object]:
        side = torch.cuda.Stream()  # warm-up off the default stream, as torch.cuda.graph asks for
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                fn()
        torch.cuda.current_stream().wait_stream(side)
        graph, kept = torch.cuda.CUDAGraph(), None
        with torch.cuda.graph(graph):
            for _ in range(calls):
                kept = fn()

        def replay(graph: torch.cuda.CUDAGraph = graph, _output: object = kept) -> None:
            graph.replay()

        return replay


class HostClock:
    """The host's clock, for rehearsals and tests without a GPU: work is done when the call returns."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.flushes = 0

    def mark(self) -> float:
        return time.perf_counter()

    def microseconds(self, start: float, end: float) -> float:
        return (end - start) * 1e6

    def wait(self) -> None:
        pass

    def flush(self) -> None:
        self.flushes += 1

    def capture(self, fn: Callable[[], object], calls: int) -> Callable[[], object]:
        def replay() -> None:
            for _ in range(calls):
                fn()

        return replay


class EventTime:
    """A CUDA event as a time stamp whose difference is in seconds: pytest-benchmark's `timer` on a GPU.

    The host waits when the difference is taken, that is after what is timed, not inside it.
    """

    def __init__(self) -> None:
        self._event = torch.cuda.Event(enable_timing=True)
        self._event.record()

    def __sub__(self, start: EventTime) -> float:
        self._event.synchronize()
        return start._event.elapsed_time(self._event) / 1e3
