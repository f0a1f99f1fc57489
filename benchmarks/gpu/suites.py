"""Runs a folder of pytest tests marked `gpu` so that a hang, a crash or the end of the time loses one test at most.

Several pytest processes share the tests (compiling kernels takes longer than running them); each writes a log of its
own (pytest_log.py), from which it goes on after it was lost.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from benchmarks.gpu import process

STALL_S = 180.0  # no test starts or ends for so long: hung (compiling a network takes up to two minutes)
_STOP_S = 15.0  # what pytest gets to collect, and to write its summary
_ENDED = (0, 1, 5)  # pytest's status: all passed, some failed, no tests left


@dataclass(frozen=True)
class Run:
    """What a run needs.

    Attributes:
        path: the folder or file of tests.
        folder: for the logs.
        seconds: for everything.
        env: of pytest.
        root: the repository.
        arguments: more arguments for pytest.
        shards: processes that share the tests.
        stall: seconds without progress after which a process is killed.
    """

    path: str
    folder: Path
    seconds: float
    env: Mapping[str, str]
    root: Path
    arguments: tuple[str, ...] = ()
    shards: int = 1
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


def append(log: Path, records: Iterable[dict]) -> None:
    """Records at the end of a log whose last line may be cut off."""
    with log.open("a", encoding="utf-8") as file:
        file.write("".join(f"\n{json.dumps(record)}" for record in records) + "\n")


def collect(run: Run, known: Iterable[dict] = (), say: Callable[[str], None] = lambda _: None) -> dict:
    """Run the tests, leaving out those whose records are `known`; returns the summary of both."""
    known = list(known)
    with ThreadPoolExecutor(run.shards) as pool:
        shards = [pool.submit(_shard, run, index, known, say) for index in range(run.shards)]
        done = [shard.result() for shard in shards]
    records = {test: record for found, _, _ in done for test, record in found.items()}
    tails = [tail for _, complete, tail in done if not complete]
    return summary(list(records.values()), not tails, "\n".join(tails))


def _shard(run: Run, index: int, known: list[dict], say: Callable[[str], None]) -> tuple[dict[str, dict], bool, str]:
    """One process, and another after each that was lost, until its tests are done or the time is up."""
    log = run.folder / f"log{index}.jsonl"
    append(log, known)
    end, tail, complete = time.monotonic() + run.seconds, "", False
    while not complete and not process.ending() and (left := end - time.monotonic()) > _STOP_S:
        before = len(read(log)[0])
        finished = process.run(_command(run, index, left - _STOP_S), left, run.env, run.root, _Stalled(log, run.stall))
        tail, complete = finished.tail, finished.status in _ENDED
        records, running = read(log)
        if running and (why := _why_lost(finished, end)):
            append(log, [{"test": running, "outcome": "failed", "reason": why}])
        elif not complete and len(records) == before:
            break  # pytest itself does not start
        say(f"{run.path}, process {index + 1} of {run.shards}: {len(read(log)[0]) - len(known)} tests")
    return read(log)[0], complete, tail


def _why_lost(finished: process.Finished, end: float) -> str:
    """Why the test under way was lost, if it was its own fault and not that of the end of the time."""
    if finished.why:
        return finished.why if time.monotonic() < end else ""
    return f"the process died of signal {-finished.status}" if finished.status < 0 else ""


def _command(run: Run, index: int, seconds: float) -> list[str]:
    log = ["--gpu-log", str(run.folder / f"log{index}.jsonl"), "--gpu-shard", f"{index}/{run.shards}"]
    options = [*log, "--gpu-seconds", f"{seconds:.0f}", "-p", "no:cacheprovider", "-q", *run.arguments]
    options.append("--continue-on-collection-errors")
    return [sys.executable, "-m", "pytest", "-p", "benchmarks.gpu.pytest_log", run.path, "-m", "gpu", *options]


class _Stalled:
    """Says so when the log has not grown for too long."""

    def __init__(self, log: Path, seconds: float) -> None:
        self._log, self._seconds = log, seconds
        self._size, self._since = log.stat().st_size, time.monotonic()

    def __call__(self) -> str | None:
        size = self._log.stat().st_size
        if size != self._size:
            self._size, self._since = size, time.monotonic()
        stalled = time.monotonic() - self._since > self._seconds
        return f"hung: nothing happened for {self._seconds:.0f} s" if stalled else None


def summary(records: list[dict], complete: bool, tail: str) -> dict:
    """Counts, the failures with their first lines, the reasons for skipping with how often, and what is behind us."""
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
