"""Runs a folder of pytest tests marked `gpu` so that a hang, a crash or the end of the time loses one test at most."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.gpu import process

STALL_S = 180.0  # no test starts or ends for so long: hung (compiling a network takes up to two minutes)
_STOP_S = 15.0  # what pytest gets to collect, and to write its summary


@dataclass
class Run:
    """What a run needs: where, for how long, which tests are behind it, and how a child is started.

    Attributes:
        path: the folder of tests.
        log: the plugin's log, resumed where it has records.
        seconds: for everything.
        env: of pytest.
        root: the repository.
        arguments: more arguments for pytest.
    """

    path: str
    log: Path
    seconds: float
    env: Mapping[str, str]
    root: Path
    arguments: list[str] = field(default_factory=list)
    stall: float = STALL_S


def read(path: Path) -> tuple[dict[str, dict], str | None]:
    """The finished tests' records by name, and the test that had started but not ended."""
    finished: dict[str, dict] = {}
    running = None
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            record = json.loads(line)
        except json.JSONDecodeError:  # the last line of a killed process
            continue
        if "outcome" in record:
            finished[record["test"]] = record
        running = None if "outcome" in record else record["test"]
    return finished, running


def collect(run: Run, say: Callable[[str], None] = lambda _: None) -> dict:
    """Run, and again after each lost process, until all tests are done or the time is up; returns the summary."""
    end, tail, complete = time.monotonic() + run.seconds, "", False
    while not complete and (left := end - time.monotonic()) > _STOP_S:
        before = len(read(run.log)[0])
        finished = process.run(_command(run, left - _STOP_S), left, run.env, run.root, _Stalled(run.log, run.stall))
        tail = finished.tail
        complete = finished.status in (0, 1, 5)  # all passed, some failed, nothing left to run
        records, running = read(run.log)
        if finished.why and time.monotonic() < end and running:
            _append_failure(run.log, running, finished.why)
        elif finished.status is not None and finished.status < 0 and running:
            _append_failure(run.log, running, f"the process died of signal {-finished.status}")
        elif not complete and len(records) == before:
            break  # pytest itself does not start
        say(f"{run.path}: {len(records)} tests done, {max(0.0, end - time.monotonic()):.0f} s left")
    return summary(run.log, complete, tail)


def _command(run: Run, seconds: float) -> list[str]:
    options = ["--gpu-log", str(run.log), "--gpu-seconds", f"{seconds:.0f}", "-p", "no:cacheprovider", "-q"]
    plugin = ["-p", "benchmarks.gpu.pytest_log"]
    return [sys.executable, "-m", "pytest", *plugin, run.path, "-m", "gpu", *options, *run.arguments]


class _Stalled:
    """Says so when the log has not grown for too long."""

    def __init__(self, log: Path, seconds: float) -> None:
        self._log, self._seconds = log, seconds
        self._size, self._since = self._measure(), time.monotonic()

    def _measure(self) -> int:
        return self._log.stat().st_size if self._log.exists() else 0

    def __call__(self) -> str | None:
        size = self._measure()
        if size != self._size:
            self._size, self._since = size, time.monotonic()
        stalled = time.monotonic() - self._since > self._seconds
        return f"hung: nothing happened for {self._seconds:.0f} s" if stalled else None


def _append_failure(log: Path, test: str, reason: str) -> None:
    with log.open("a", encoding="utf-8") as file:
        file.write("\n" + json.dumps({"test": test, "outcome": "failed", "reason": reason}) + "\n")


def summary(log: Path, complete: bool, tail: str) -> dict:
    """Counts, the failures with their first lines, the reasons for skipping with how often, and what is behind us."""
    records = list(read(log)[0].values())
    skips: dict[str, int] = {}
    for record in records:
        if record["outcome"] == "skipped":
            skips[record["reason"]] = skips.get(record["reason"], 0) + 1
    failures = {record["test"]: record["reason"] for record in records if record["outcome"] == "failed"}
    found: dict = {
        "passed": sum(record["outcome"] == "passed" for record in records),
        "failed": len(failures),
        "skipped": sum(skips.values()),
        "failures": failures,
        "skips": skips,
    }
    if failures:
        found["error"] = f"{len(failures)} tests failed"
    if not complete:
        found |= {"incomplete": True, "tail": tail, "done": records}
    return found


def timings(path: Path) -> list[dict]:
    """pytest-benchmark's medians, spread and notes; empty where it wrote nothing."""
    if not path.exists() or not path.stat().st_size:
        return []
    benchmarks = json.loads(path.read_text(encoding="utf-8"))["benchmarks"]
    return [{"name": b["fullname"], "group": b["group"], **b["extra_info"]} for b in benchmarks]
