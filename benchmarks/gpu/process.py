"""Child processes that can be lost: a deadline on everything, and the whole process group goes with a child."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

_KILL_WAIT_S = 10
_children: set[subprocess.Popen] = set()
_ending = threading.Event()


class ChildError(RuntimeError):
    """A child died or did not answer in time; the message says which, and what it wrote last."""


@contextlib.contextmanager
def guarded() -> Iterator[None]:
    """Inside, a terminated or interrupted program takes its children along: they lead sessions of their own.

    Only in the main thread. Children that other threads wait for end too, and none is started afterwards.
    """

    def end(number: int, _frame: object) -> None:
        _ending.set()
        for child in list(_children):
            kill_group(child)
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _ending.clear()


def ending() -> bool:
    """True once the program is to end: nothing new should be started."""
    return _ending.is_set()


def kill_group(process: subprocess.Popen) -> bool:
    """Kill a child that leads a session, with all its children; False where it does not end (a hung driver)."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    try:
        process.wait(timeout=_KILL_WAIT_S)
    except subprocess.TimeoutExpired:
        return False
    return True


@dataclass(frozen=True)
class Finished:
    """How a command ended: its status, or None where it was killed and `why` says so; the end of what it wrote."""

    status: int | None
    why: str
    tail: str

    @property
    def ok(self) -> bool:
        return self.status == 0


def tail_of(file, lines: int = 15) -> str:
    file.seek(0)
    return "\n".join(file.read().decode(errors="replace").splitlines()[-lines:])


def run(
    command: Sequence[str],
    seconds: float,
    env: Mapping[str, str],
    cwd: Path,
    stalled: Callable[[], str | None] = lambda: None,
) -> Finished:
    """Run a command for at most so many seconds, or until `stalled` gives a reason to stop it."""
    with tempfile.TemporaryFile() as output:
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=env,
                cwd=cwd,
                start_new_session=True,
            )
        except OSError as error:
            return Finished(None, f"{command[0]}: {error}", "")
        _children.add(process)
        try:
            why = _wait(process, seconds, stalled)
        finally:
            if process.poll() is None:
                kill_group(process)
            _children.discard(process)
        return Finished(None if why else process.returncode, why, tail_of(output))


def _wait(process: subprocess.Popen, seconds: float, stalled: Callable[[], str | None]) -> str:
    """Until the process ends (""), or for the reason returned should be killed."""
    end = time.monotonic() + seconds
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=min(0.2, max(0.01, end - time.monotonic())))
        if process.poll() is not None:
            return ""
        if time.monotonic() >= end:
            return f"stopped after {seconds:.0f} s"
        if why := stalled():
            return why


class Worker:
    """A child that takes requests and gives replies as JSON lines."""

    def __init__(self, command: Sequence[str], env: Mapping[str, str], cwd: Path) -> None:
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (closed with the worker)
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=env,
            cwd=cwd,
            start_new_session=True,
        )
        _children.add(self._process)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._process.stdout, selectors.EVENT_READ)
        self._buffer = b""

    def send(self, message: dict) -> None:
        """Raises ChildError where the child is gone."""
        try:
            self._process.stdin.write(json.dumps(message).encode() + b"\n")
            self._process.stdin.flush()
        except (BrokenPipeError, ValueError):
            raise self._died() from None

    def receive(self, seconds: float) -> dict:
        """The next reply. Raises ChildError after so many seconds, or when the child ends."""
        end = time.monotonic() + seconds
        while b"\n" not in self._buffer:
            if not self._selector.select(max(0.0, end - time.monotonic())):
                raise ChildError(f"no answer within {seconds:.0f} s{self._last_words()}")
            chunk = os.read(self._process.stdout.fileno(), 1 << 16)
            if not chunk:
                raise self._died()
            self._buffer += chunk
        line, _, self._buffer = self._buffer.partition(b"\n")
        return json.loads(line)

    def _last_words(self) -> str:
        words = [line for line in tail_of(self._errors).splitlines() if line.strip()]
        return f" ({words[-1].strip()[:300]})" if words else ""

    def _died(self) -> ChildError:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=_KILL_WAIT_S)
        return ChildError(f"the process ended (status {self._process.poll()}){self._last_words()}")

    def close(self) -> None:
        """Kill the child and everything it started."""
        kill_group(self._process)
        _children.discard(self._process)
        self._selector.close()
        for stream in (self._process.stdin, self._process.stdout, self._errors):
            with contextlib.suppress(BrokenPipeError):
                stream.close()
