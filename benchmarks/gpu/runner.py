"""Walks through the plan within the budget and adds an entry to the results after each measurement.

    python -m benchmarks.gpu --budget 540                     # everything that fits, the most telling first
    python -m benchmarks.gpu --only vgnet-half,peaks          # parts of keys; --sides eager,compile narrows further
    python -m benchmarks.gpu --dry-run                        # what it would do; without a GPU that is all it does
    python -m benchmarks.gpu --rehearse                       # the machinery on the CPU with tiny work; claims nothing

A later run goes on where this one stopped: what was measured with the same code is not measured again (--fresh: it is;
--retry: failures are). Exit status 1 when a test failed or a result of effops was wrong or could not be had.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks import machine
from benchmarks.gpu import plan, process, store, suites

ROOT = machine.ROOT
RESULTS = ROOT / "benchmarks" / "results"
_DESCRIBE_S = 180
_LEAST_S = 20.0  # with less than this left, nothing is begun
_TESTS_SHARE = 0.45  # of the budget that is left: the tests come early and must not eat the measurements
_TESTS_LEAST_S = 60.0
_TESTS_S = 1800.0  # without a budget

_HARNESS = ("benchmarks/problems.py", "benchmarks/shapes.py", "benchmarks/gate.py", "benchmarks/timing.py")
_MEASURING = ("clocks", "contestants", "peaks", "tasks", "timing", "worker")  # the others here only run and report
_NETWORKS = ("benchmarks/networks.py", "effops/stock.py", "effops/models/*.py")
_OWN = ("effops/**/*.py", "effops/schemas.inc", "csrc/**/*")


class Budget:
    """Seconds left; without a budget there are always enough."""

    def __init__(self, seconds: float | None, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._end = None if seconds is None else now() + seconds

    def left(self) -> float:
        return float("inf") if self._end is None else self._end - self._now()

    def fits(self, seconds: float) -> bool:
        return self.left() >= max(seconds, _LEAST_S)


class Codes:
    """Fingerprints of the sources that an entry depends on."""

    def __init__(self, root: Path) -> None:
        harness = (*_HARNESS, *(f"benchmarks/gpu/{name}.py" for name in _MEASURING))
        self._rival = store.fingerprint(root, harness)
        self._network = store.fingerprint(root, (*harness, *_NETWORKS))
        self._own = store.fingerprint(root, (*harness, *_NETWORKS, *_OWN))
        self._tests = store.fingerprint(root, (*_OWN, "tests/*.py", "benchmarks/*.py"))
        self._build = store.fingerprint(root, ("csrc/**/*", "setup.py"))

    def of(self, item: plan.Item, side: str | None = None) -> str:
        """A rival's time does not change with our kernels."""
        if item.stage != "measure":
            return {"tests": self._tests, "build": self._build}.get(item.stage, self._own)
        if side is not None and side.startswith("effops-"):
            return self._own
        return self._network if item.request["kind"] == "model" else self._rival


class Session:
    """One run: what it has, and what it does for each stage of the plan."""

    def __init__(
        self,
        args: argparse.Namespace,
        description: dict,
        results: store.Store,
        budget: Budget,
        worker_command: list[str] | None = None,
    ) -> None:
        self._args, self._description, self.results, self._budget = args, description, results, budget
        self._worker_command = worker_command or _worker_command(args.rehearse)
        self._no_worker = ""  # why the worker does not even start
        self._codes = Codes(ROOT)
        self._commit = args.commit or machine.commit()
        self._env = child_env(args.packages)
        self._worker: process.Worker | None = None
        self.failures: list[str] = []
        self.left_out: list[str] = []
        self._started = time.monotonic()

    # ---- the walk ----

    def run(self, items: list[plan.Item]) -> None:
        stages = {
            "environment": self._environment,
            "build": self._build,
            "tests": self._tests,
            "measure": self._measure,
        }
        try:
            for item in items:
                reason = why_not(item, self._description) or (item.stage == "measure" and self._no_worker)
                if reason:
                    self._leave_out(item, reason)
                elif missing := self._missing(item):
                    seconds = remaining_seconds(item, missing)
                    if self._budget.fits(seconds):
                        stages[item.stage](item, missing)
                    else:
                        self._leave_out(item, f"needs about {seconds:.0f} s, {max(0, self._budget.left()):.0f} s left")
        finally:
            self._stop_worker()

    def _missing(self, item: plan.Item) -> list[str]:
        """The keys that are still to be had: environment and build are done anew on every machine."""
        if item.stage in ("environment", "build"):
            return item.entry_keys()
        return [
            key
            for key in item.entry_keys()
            if self._args.fresh or not self.results.done(key, self._code(item, key), self._args.retry)
        ]

    def _code(self, item: plan.Item, key: str) -> str:
        return self._codes.of(item, side_of(item, key))

    def _leave_out(self, item: plan.Item, reason: str) -> None:
        self.left_out.append(f"{item.key}: {reason}")
        self._say(f"left out {item.key}: {reason}")

    def _say(self, text: str) -> None:
        print(f"[{time.monotonic() - self._started:6.1f} s] {text}", flush=True)

    def _add(self, item: plan.Item, key: str, content: dict) -> None:
        side = side_of(item, key)
        entry = {"key": key, "stage": item.stage, **item.request, **({"side": side} if side else {})}
        entry.pop("sides", None)
        entry |= content
        entry |= {"commit": self._commit, "code": self._code(item, key), "date": machine.date()}
        self.results.add(entry)
        self._say(f"{key}: {outcome(entry)}")
        if "error" in entry and (side is None or side.startswith("effops-")):
            self.failures.append(f"{key}: {entry['error']}")

    # ---- stages ----

    def _environment(self, item: plan.Item, missing: list[str]) -> None:
        self._add(item, item.key, {**self._description, "host": machine.machine(), "dirty": machine.dirty()})

    def _build(self, item: plan.Item, missing: list[str]) -> None:
        command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
        seconds = min(item.limit, self._budget.left())
        settings = {"EFFOPS_BUILD": "auto"}
        if "capability" in self._description:  # nvcc takes a minute or two for each of them
            settings["TORCH_CUDA_ARCH_LIST"] = self._description["capability"]
        finished = process.run(command, seconds, self._env | settings, ROOT)
        if finished.ok:
            files = ("libeffops_kernels.so", "libeffops_cuda.so")
            built = [name for name in files if (ROOT / "effops" / name).exists()]
            self._add(item, item.key, {"built": built, "tail": finished.tail})
        else:  # the Triton kernels do not need it, so this is told but fails nothing
            why = finished.why or f"status {finished.status}"
            self._add(item, item.key, {"built": False, "why_not": why, "tail": finished.tail})

    def _tests(self, item: plan.Item, missing: list[str]) -> None:
        self._stop_worker()  # its memory is wanted
        left = self._budget.left()
        seconds = _TESTS_S if left == float("inf") else max(_LEAST_S, _TESTS_SHARE * left)
        if self._args.only:
            seconds = min(left, _TESTS_S)
        before = self.results.get(item.key) or {}
        if self._args.fresh or before.get("code") != self._code(item, item.key):
            before = {}
        timed = item.key == "bench"  # alone on the GPU
        start = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="effops-gpu-tests-") as folder:
            report = Path(folder) / "benchmark.json"
            arguments = (f"--benchmark-json={report}",) if timed else ()
            shards = 1 if timed else max(1, min(4, len(os.sched_getaffinity(0)) // 4))
            run = suites.Run(item.request["path"], Path(folder), seconds, self._env, ROOT, arguments, shards)
            found = suites.collect(run, before.get("done", ()), self._say)
            if timed:
                found["timings"] = [*before.get("timings", []), *suites.timings(report)]
        self._add(item, item.key, found | {"seconds": round(time.monotonic() - start, 1)})

    def _measure(self, item: plan.Item, missing: list[str]) -> None:
        """Ask for the missing contestants; a lost worker costs the one under way, another worker does the rest."""
        waiting = [side_of(item, key) for key in missing]
        facts: dict = {}
        while waiting and self._budget.left() > _LEAST_S:
            if not self._start_worker():
                self._leave_out(item, self._no_worker or "the budget ended")
                return
            current = [waiting[0]]
            try:
                self._ask(item, waiting, facts, current)
            except process.ChildError as error:
                self._stop_worker()
                if self._budget.left() <= 0:
                    self._leave_out(item, f"the budget ended during {current[0]}")
                    return
                if current[0] in waiting:  # else it ended after its answer, to be replaced
                    self._add(item, f"{item.key}|{current[0]}", facts | {"error": str(error)})
                    waiting.remove(current[0])
        if waiting:
            self._leave_out(item, f"no time left for {', '.join(waiting)}")

    def _ask(self, item: plan.Item, waiting: list[str], facts: dict, current: list[str]) -> None:
        """One request; what was answered leaves `waiting`, `current` holds the contestant under way."""
        self._worker.send(item.request | {"sides": waiting})
        while True:
            reply = self._worker.receive(min(item.limit, max(0.0, self._budget.left())))
            current[:] = [reply.get("begin", current[0])]
            facts |= reply.get("facts", {})
            if "result" in reply:
                self._add(item, f"{item.key}|{reply['side']}", facts | reply["result"])
                waiting.remove(reply["side"])
            elif "failed" in reply:  # the problem itself: no contestant can run
                for side in waiting:
                    self._add(item, f"{item.key}|{side}", {"error": f"not built: {reply['failed']}"})
                waiting.clear()
            elif "done" in reply:
                return

    def _start_worker(self) -> bool:
        """False where there is no worker: one that does not start would fail everything that is left."""
        if self._worker is None:
            self._worker = process.Worker(self._worker_command, self._env, ROOT)
            try:
                self._worker.receive(min(_DESCRIBE_S, max(0.0, self._budget.left())))
            except process.ChildError as error:
                self._stop_worker()
                if self._budget.left() > 0:
                    self._no_worker = f"the worker does not start: {error}"
                    self.failures.append(self._no_worker)
                return False
        return True

    def _stop_worker(self) -> None:
        if self._worker is not None:
            self._worker.close()
            self._worker = None


def _worker_command(rehearse: bool) -> list[str]:
    command = [sys.executable, str(Path(__file__).with_name("worker.py"))]
    return [*command, "cpu", "--quick"] if rehearse else [*command, "cuda"]


def side_of(item: plan.Item, key: str) -> str | None:
    return key.removeprefix(f"{item.key}|") if item.sides else None


def remaining_seconds(item: plan.Item, missing: list[str]) -> float:
    """The guess for what is missing of an item. Tests may be cut short anywhere, so they need less than they take."""
    if item.stage == "tests":
        return min(item.seconds, _TESTS_LEAST_S)
    if not item.sides or item.request["kind"] == "peaks":
        return item.seconds
    done = (side for side in item.sides if f"{item.key}|{side}" not in missing)
    return item.seconds - sum(plan.side_seconds(side, item.request) for side in done)


def lacking(item: plan.Item, description: dict) -> list[str]:
    """Which of an item's needs this machine does not have."""
    there = [*description.get("packages", []), *(["gpu"] if description.get("gpu") else [])]
    return [need for need in item.needs if need not in there]


def why_not(item: plan.Item, description: dict) -> str:
    """Why an item cannot run on this machine; empty where it can."""
    missing = lacking(item, description)
    if "gpu" in missing:
        return f"no GPU: {description['why_not']}"
    return f"{', '.join(missing)} not installed (WHEELS=DIR installs carried wheels)" if missing else ""


def outcome(entry: dict) -> str:
    """An entry in one line."""
    if "error" in entry:
        return f"FAILED {entry['error']}"
    if "unable" in entry:
        return f"not run: {entry['unable']}"
    if "us" in entry:
        times = [
            f"{mode} {times['warm']['median_us']:.1f} us warm, {times['flushed']['median_us']:.1f} flushed"
            for mode, times in entry["us"].items()
        ]
        return "; ".join(times) + (f" ({entry['backend']})" if "backend" in entry else "")
    if "passed" in entry:
        counts = f"{entry['passed']} passed, {entry['failed']} failed, {entry['skipped']} skipped"
        return counts + (", not finished" if entry.get("incomplete") else "")
    if "built" in entry:
        return (
            f"built {', '.join(entry['built'])}"
            if entry["built"]
            else f"NOT built: {entry.get('why_not') or 'no compiler'}"
        )
    if "copy_gbs" in entry:
        return ", ".join(f"{key} {value}" for key, value in entry.items() if key.endswith(("_gbs", "_tflops")))
    return "noted"


# ---- starting ----


def child_env(packages: Path | None) -> dict[str, str]:
    """The environment of every child. cuBLAS computes deterministically only with a workspace of fixed size."""
    paths = [str(ROOT), *([str(packages)] if packages else []), *filter(None, [os.environ.get("PYTHONPATH")])]
    defaults = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "PYTHONUNBUFFERED": "1"}
    return defaults | dict(os.environ) | {"PYTHONPATH": os.pathsep.join(paths)}


def describe(env: dict[str, str]) -> dict:
    """What device.py says; its failure is a reason too."""
    command = [sys.executable, str(Path(__file__).with_name("device.py"))]
    finished = process.run(command, _DESCRIBE_S, env, ROOT)
    answers = [line for line in finished.tail.splitlines() if line.startswith("{")]
    if finished.ok and answers:  # libraries' warnings may stand around it
        return json.loads(answers[-1])
    last = finished.tail.splitlines()[-1:] or [""]
    return {"gpu": None, "why_not": f"asking for it failed: {finished.why or last[0]}", "packages": []}


def install_wheels(folder: Path, target: Path) -> None:
    """Install carried wheels into a folder of their own; nothing is fetched and nothing else is touched.

    Raises:
        SystemExit: there are none, or pip refuses them.
    """
    wheels = sorted(str(path) for path in folder.glob("*.whl"))
    if not wheels:
        raise SystemExit(f"WHEELS: no *.whl in {folder}")
    options = ["--quiet", "--no-index", "--no-deps", "--no-compile", "--target", str(target)]
    finished = process.run([sys.executable, "-m", "pip", "install", *options, *wheels], 300, dict(os.environ), ROOT)
    if not finished.ok:
        raise SystemExit(f"WHEELS: pip could not install {folder}/*.whl: {finished.why}\n{finished.tail}")


def print_plan(items: list[plan.Item], description: dict) -> None:
    """The plan item by item, with the guessed cost of each and of all up to it, and what it lacks here."""
    total = 0.0
    print(f"{'s':>6}  {'sum':>6}  part")
    for item in items:
        total += item.seconds
        missing = lacking(item, description)
        line = f"{item.seconds:6.0f}  {total:6.0f}  {item.key}: {item.what}"
        print(line + (f"  [not here: needs {', '.join(missing)}]" if missing else ""))
    for reason in dict.fromkeys(filter(None, (why_not(item, description) for item in items))):
        print(f"not here: {reason}")


def select(items: list[plan.Item], only: tuple[str, ...], sides: tuple[str, ...]) -> list[plan.Item]:
    """The items whose key holds one of `only`, with no other contestants than `sides`; empty: all."""
    chosen = []
    for item in items:
        if only and not any(part in item.key for part in only):
            continue
        if sides and item.sides and item.request.get("kind") != "peaks":
            item = plan.with_sides(item, sides)
            if not item.sides:
                continue
        chosen.append(item)
    return chosen


def _names(text: str) -> tuple[str, ...]:
    return tuple(part for part in text.split(",") if part)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--budget", type=float, help="seconds for everything; default: as long as it takes")
    parser.add_argument("--out", type=Path, help="file (*.json), or folder (default: benchmarks/results)")
    parser.add_argument("--only", type=_names, default=(), help="comma-separated parts of keys")
    parser.add_argument("--sides", type=_names, default=(), help="contestants, comma-separated (eager,compile-graph)")
    parser.add_argument("--fresh", action="store_true", help="measure again what was measured before")
    parser.add_argument("--retry", action="store_true", help="try again what failed before")
    parser.add_argument("--dry-run", action="store_true", help="say what would be done")
    parser.add_argument("--rehearse", action="store_true", help="tiny work on the CPU, results into a temporary folder")
    parser.add_argument("--wheels", type=Path, help="folder of carried wheels for what is missing (pytest)")
    parser.add_argument("--commit", help="the commit, where the tree came without its history")
    args = parser.parse_args(argv)
    if args.budget is not None and args.budget <= 0:
        parser.error(f"--budget must be more than 0 seconds, got {args.budget:g}")
    return args


def result_paths(args: argparse.Namespace, name: str) -> tuple[Path, Path | None]:
    """The file to write, and the file of an earlier session to go on from where that one does not exist."""
    file = f"gpu-{store.slug(name)}.json"
    if args.rehearse:
        folder = args.out or Path(tempfile.gettempdir()) / "effops-gpu-rehearsal"
        return (folder if folder.suffix == ".json" else folder / file), None
    if args.out is None:
        return RESULTS / file, None
    return (args.out if args.out.suffix == ".json" else args.out / file), RESULTS / file


def main(argv: list[str] | None = None, describer: Callable[[dict[str, str]], dict] = describe) -> int:
    """The command; `describer` says what the machine is."""
    args = parse(argv)
    args.budget = Budget(args.budget)
    args.packages = None
    folder = Path(tempfile.mkdtemp(prefix="effops-gpu-"))
    try:
        with process.guarded():
            if args.wheels:
                args.packages = folder / "packages"
                install_wheels(args.wheels, args.packages)
            return _run(args, describer(child_env(args.packages)))
    except store.StoreError as error:
        print(error, file=sys.stderr)
        return 2
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _run(args: argparse.Namespace, description: dict) -> int:
    whole = plan.rehearsal() if args.rehearse else plan.make(description.get("backends", ("auto",)))
    items = select(whole, args.only, args.sides)
    if not items:
        print(f"nothing to do: no part matches --only {','.join(args.only)} --sides {','.join(args.sides)}")
        return 2
    if args.dry_run or not (description.get("gpu") or args.rehearse):
        print_plan(items, description)
        print("A dry run: nothing was built, tested or measured.")
        return 0
    name = "cpu rehearsal" if args.rehearse else description["gpu"]
    path, start_from = result_paths(args, name)
    gpu = {key: value for key, value in description.items() if key not in ("packages", "backends", "why_not", "torch")}
    header = {
        "suite": "gpu",
        "date": machine.date(),
        "rehearsal": args.rehearse,
        "machine": {**machine.machine(), **gpu, "gpu": name},
        "versions": {
            "torch": description.get("torch"),
            "python": sys.version.split()[0],
            "compiler": machine.compiler(),
        },
        "env": machine.environment(child_env(args.packages)),
    }
    session = Session(args, description, store.Store(path, header, start_from), args.budget)
    session.run(items)
    _conclude(session, path)
    return 1 if session.failures else 0


def _conclude(session: Session, path: Path) -> None:
    print(f"\n{len(session.results.entries())} entries in {path}")
    if session.left_out:
        print(f"{len(session.left_out)} parts left out (the lines above say why); run the same command again to go on")
    for failure in session.failures:
        print(f"FAILED {failure}")
