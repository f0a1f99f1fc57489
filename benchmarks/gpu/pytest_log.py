"""A pytest plugin for runs that may be cut short: every test is logged as it starts and ends, and the log is resumed.

    pytest -p benchmarks.gpu.pytest_log --gpu-log FILE --gpu-seconds 200 ...

Tests that the log knows already are left out; no test starts after the time is up, or after an error that loses the
CUDA context, since all that follow in the same process would fail.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from benchmarks.gpu.suites import read

_LOST_CONTEXT = (
    "CUDA error: an illegal memory access",
    "CUDA error: unspecified launch failure",
    "CUDA error: device-side assert",
    "CUDA error: misaligned address",
    "CUDA error: an illegal instruction",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("effops gpu log")
    group.addoption("--gpu-log", type=Path, help="JSON lines: one when a test starts, one when it ends")
    group.addoption("--gpu-shard", default="0/1", help="i/n: every n-th test from the i-th on; slow ones in shard 0")
    group.addoption("--gpu-seconds", type=float, default=float("inf"), help="start no test later than this")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--gpu-log"):
        config.pluginmanager.register(_Log(config), "effops-gpu-log")


class _Log:
    def __init__(self, config: pytest.Config) -> None:
        self._path: Path = config.getoption("--gpu-log")
        self._end = time.monotonic() + config.getoption("--gpu-seconds")
        self._known = set(read(self._path)[0])
        self._reports: dict[str, dict] = {}
        self._stop = ""

    def _write(self, record: dict) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        """After `-m gpu` has chosen: this shard's tests that the log does not know."""
        shard, shards = map(int, config.getoption("--gpu-shard").split("/"))
        mine = [item for index, item in enumerate(items) if _shard_of(item, index, shards) == shard]
        kept = [item for item in mine if item.nodeid not in self._known]
        left_out = [item for item in items if item not in kept]
        if left_out:
            config.hook.pytest_deselected(items=left_out)
            items[:] = kept

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """A file that cannot be imported is a failure under its own name."""
        if report.failed:
            self._write({"test": report.nodeid, "outcome": "failed", "reason": _reason(report)})

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._reports[nodeid] = {"test": nodeid, "outcome": "passed"}
        self._write({"test": nodeid})

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        record = self._reports[report.nodeid]
        if report.skipped:
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
            record |= {"outcome": "skipped", "reason": reason.removeprefix("Skipped: ")}
        elif report.failed and record["outcome"] != "failed":
            record |= {"outcome": "failed", "reason": _reason(report)}

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        record = self._reports.pop(nodeid)
        self._write(record)
        if record["outcome"] == "failed" and any(words in record["reason"] for words in _LOST_CONTEXT):
            self._stop = "the CUDA context is lost"

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> None:
        """Before each test: the one under way has ended, so stopping here leaves nothing half done."""
        if self._stop or time.monotonic() > self._end:
            item.session.shouldstop = self._stop or "the time is up"
            raise item.session.Interrupted(item.session.shouldstop)


def _shard_of(item: pytest.Item, index: int, shards: int) -> int:
    """Slow tests may want the whole GPU memory, so they run one after the other, in one process."""
    return 0 if item.get_closest_marker("slow") else index % shards


def _reason(report: pytest.TestReport | pytest.CollectReport) -> str:
    """The error's first line, as pytest's own summary shows it; of a file that cannot be imported the last one."""
    crash = getattr(report.longrepr, "reprcrash", None)
    lines = [line for line in (crash.message if crash else str(report.longrepr)).splitlines() if line.strip()]
    return (lines[0 if crash else -1] if lines else "no message")[:500]
