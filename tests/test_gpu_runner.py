"""`make gpu` without a GPU: plan, budget, results file, lost processes, gates, timing, report, and the dry run."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import gate, report_gpu, shapes  # noqa: E402 (the benchmarks are no part of the installed package)
from benchmarks.gpu import clocks, contestants, plan, process, runner, store, suites, tasks, timing, worker  # noqa: E402

NO_GPU = {"gpu": None, "why_not": "there is none here", "packages": ["pytest"], "backends": ["auto"]}
GPU = {"gpu": "Test GPU 9", "why_not": "", "packages": ["pytest", "hypothesis"], "backends": ["triton", "auto"]}


def describe_as(description: dict) -> Any:
    return lambda _env: dict(description)


# ---- the plan -------------------------------------------------------------------------------------------------------


def test_plan_names_everything_once_and_begins_with_what_tells_most() -> None:
    items = plan.make(("triton", "auto"))
    keys = [key for item in items for key in item.entry_keys()]
    assert len(keys) == len(set(keys))
    assert [item.key for item in items[:4]] == ["environment", "build", "tests", "peaks"]
    heads = items[4:7]
    assert [item.request["case"] for item in heads] == list(shapes.GPU_HEADLINES)
    for item in heads:
        assert item.request["batch"] == 128 and item.request["precision"] == "float16"
        assert item.sides == ("effops-triton", "effops-auto", "eager", "compile-graph", "compile")
    assert items[-1].key == "bench"
    for item in items:
        assert item.seconds > 0
        assert all(item.limit > 2 * plan.side_seconds(side, item.request) for side in item.sides), "too short a limit"


def test_plan_covers_the_table_of_shapes() -> None:
    requests = [item.request for item in plan.make() if item.stage == "measure"]
    pairs = {(r["case"], r["precision"], r["batch"] == 1, r["direction"]) for r in requests if r["kind"] == "pair"}
    for case in shapes.GPU_DSCONV:
        assert shapes.find(case.name) == case
        for precision in ("float16", "float32", "bfloat16"):
            assert (case.name, precision, False, "forward") in pairs
        assert (case.name, "float16", True, "forward") in pairs
        assert ((case.name, "float16", False, "forward+backward") in pairs) is (case.bank == "learned")
    models = {(r["case"], r["precision"], r["direction"]) for r in requests if r["kind"] == "model"}
    assert models == {
        (m, p, d) for m in shapes.GPU_MODELS for p in ("float16", "float32") for d in ("forward", "forward+backward")
    }


def test_selection_by_key_and_by_contestant() -> None:
    items = runner.select(plan.make(), ("vgnet-half-56-56/b128/float16/forward", "peaks"), ("eager", "compile"))
    assert [(item.key, item.sides) for item in items] == [
        ("peaks", ("peaks",)),
        ("pair/vgnet-half-56-56/b128/float16/forward", ("eager", "compile")),
        ("pair/vgnet-half-56-56/b128/float16/forward+backward", ("eager",)),
        ("pair/vgnet-half-56-56/b128/float16/forward+backward", ("compile",)),
    ]
    whole = next(item for item in plan.make() if item.key == items[1].key)
    assert items[1].seconds == whole.seconds - sum(
        plan.side_seconds(side, whole.request) for side in ("effops-auto", "compile-graph")
    )


def test_budget() -> None:
    now = [100.0]
    budget = runner.Budget(60, lambda: now[0])
    assert budget.left() == 60 and budget.fits(60) and not budget.fits(61)
    now[0] = 141.0
    assert budget.left() == 19 and not budget.fits(1), "with so little left nothing is begun"
    assert runner.Budget(None).fits(1e9)


# ---- the results file -----------------------------------------------------------------------------------------------


def entry(key: str, code: str = "c1", **content: Any) -> dict:
    return {"key": key, "code": code, **content}


def test_store_goes_on_where_it_stopped(tmp_path: Path) -> None:
    path = tmp_path / "gpu.json"
    first = store.Store(path, {"suite": "gpu"})
    first.add(entry("a", us=1))
    first.add(entry("b", error="failed"))
    first.add(entry("t", incomplete=True))
    first.add(entry("a", us=2))
    again = store.Store(path, {"suite": "gpu", "date": "later"})
    assert [e["key"] for e in again.entries()] == ["b", "t", "a"] and again.get("a")["us"] == 2
    assert again.done("a", "c1") and not again.done("a", "c2") and not again.done("missing", "c1")
    assert again.done("b", "c1") and not again.done("b", "c1", retry=True)
    assert not again.done("t", "c1"), "tests that were cut short go on"
    again.write()
    assert json.loads(path.read_text())["date"] == "later"
    assert sum(line.startswith("  {") for line in path.read_text().splitlines()) == 3, "one line an entry"


def test_store_starts_from_an_earlier_session(tmp_path: Path) -> None:
    old, new = tmp_path / "old.json", tmp_path / "out" / "new.json"
    store.Store(old, {"suite": "gpu"}).add(entry("a"))
    begun = store.Store(new, {"suite": "gpu"}, start_from=old)
    begun.add(entry("b"))
    assert [e["key"] for e in store.Store(new, {"suite": "gpu"}, start_from=old).entries()] == ["a", "b"]
    assert len(store.Store(old, {"suite": "gpu"}).entries()) == 1


def test_store_never_leaves_half_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "gpu.json"
    results = store.Store(path, {"suite": "gpu"})
    results.add(entry("a"))
    before = path.read_text()

    def fails(*_: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(OSError, match="disk full"):
        results.add(entry("b"))
    assert path.read_text() == before
    assert list(tmp_path.iterdir()) == [path], "no temporary file stays behind"


@pytest.mark.parametrize("content", ["", "[]", '{"suite": "dsconv", "entries": []}', '{"suite": "gpu"}'])
def test_store_refuses_another_file(content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "gpu.json"
    path.write_text(content)
    with pytest.raises(store.StoreError, match=r"gpu\.json: not a results file of `make gpu`"):
        store.Store(path, {})
    assert runner.main(["--rehearse", "--out", str(path)], describe_as(NO_GPU)) == 2
    assert "move it away" in capsys.readouterr().err and path.read_text() == content


def test_slug_and_fingerprint(tmp_path: Path) -> None:
    assert store.slug("NVIDIA H200 (SXM)") == "nvidia-h200-sxm"
    (tmp_path / "a.py").write_text("1")
    before = store.fingerprint(tmp_path, ["*.py"])
    assert before == store.fingerprint(tmp_path, ["*.py", "a.*"])
    (tmp_path / "a.py").rename(tmp_path / "b.py")
    assert before != store.fingerprint(tmp_path, ["*.py"])


def test_a_rivals_time_outlives_a_change_of_our_kernels(tmp_path: Path) -> None:
    for path in ("benchmarks/gpu/timing.py", "benchmarks/problems.py", "effops/kernel.py", "effops/stock.py"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text("1")
    items = plan.make()
    pair = next(item for item in items if item.request.get("kind") == "pair")
    model = next(item for item in items if item.request.get("kind") == "model")

    def codes() -> list[str]:
        found = runner.Codes(tmp_path)
        sides = ((pair, "eager"), (model, "eager"), (pair, "effops-auto"), (items[2], None))
        return [found.of(item, side) for item, side in sides]

    before = codes()
    (tmp_path / "effops/kernel.py").write_text("2")
    assert [a == b for a, b in zip(before, codes(), strict=True)] == [True, True, False, False]
    before = codes()
    (tmp_path / "effops/stock.py").write_text("2")
    assert [a == b for a, b in zip(before, codes(), strict=True)] == [True, False, False, False]
    before = codes()
    (tmp_path / "benchmarks/gpu/timing.py").write_text("2")
    assert [a == b for a, b in zip(before, codes(), strict=True)] == [False, False, False, True]


# ---- processes that are lost ----------------------------------------------------------------------------------------


def alive(pid: int) -> bool:
    """Running, and not a zombie that nobody has waited for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def eventually_gone(pid: int) -> bool:
    end = time.monotonic() + 5
    while alive(pid) and time.monotonic() < end:
        time.sleep(0.02)
    return not alive(pid)


HANGS = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(child.pid, flush=True)
time.sleep(600)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_hanging_command_is_killed_with_its_children() -> None:
    start = time.monotonic()
    finished = process.run([sys.executable, "-c", HANGS], 1.5, dict(os.environ), ROOT)
    assert time.monotonic() - start < 10
    assert not finished.ok and finished.status is None and finished.why == "stopped after 2 s"
    assert eventually_gone(int(finished.tail))


GUARDED = """
import os, sys
from concurrent.futures import ThreadPoolExecutor
from benchmarks.gpu import process

answers_and_hangs = "import json, os, time; print(json.dumps({'pid': os.getpid()}), flush=True); time.sleep(600)"
env, here = dict(os.environ), os.getcwd()
with process.guarded(), ThreadPoolExecutor(1) as pool:
    worker = process.Worker([sys.executable, "-c", answers_and_hangs], env, here)
    command = pool.submit(process.run, [sys.executable, "-c", sys.argv[1]], 600, env, here)
    print(worker.receive(30)["pid"], flush=True)
    command.result()
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_terminated_runner_takes_its_children_along() -> None:
    """Those that it talks to and those that another thread waits for: else that thread would keep it alive."""
    with subprocess.Popen([sys.executable, "-c", GUARDED, HANGS], cwd=ROOT, stdout=subprocess.PIPE, text=True) as runs:
        pid = int(runs.stdout.readline())
        assert alive(pid)
        runs.terminate()
        assert runs.wait(timeout=20) == 143
        assert eventually_gone(pid)


def test_a_command_that_ends_or_is_missing() -> None:
    fine = process.run([sys.executable, "-c", "print('fine')"], 60, dict(os.environ), ROOT)
    assert fine.ok and fine.tail == "fine"
    failed = process.run([sys.executable, "-c", "raise SystemExit(3)"], 60, dict(os.environ), ROOT)
    assert not failed.ok and failed.status == 3
    missing = process.run(["/no/such/program"], 60, {}, ROOT)
    assert not missing.ok and "/no/such/program" in missing.why
    stalled = process.run([sys.executable, "-c", HANGS], 60, dict(os.environ), ROOT, lambda: "nothing happens")
    assert stalled.why == "nothing happens"


# A worker that behaves as the contestant's name says; "pid" files tell which processes there were.
FAKE_WORKER = """
import json, os, sys, time
folder = sys.argv[1]
open(os.path.join(folder, str(os.getpid())), "w").close()
say = lambda message: print(json.dumps(message), flush=True)
if "broken" in os.listdir(folder):
    sys.exit("no driver")
say({"ready": "fake"})
for line in sys.stdin:
    request = json.loads(line)
    if request["case"] == "unbuildable":
        say({"failed": "OutOfMemoryError: too large"})
        os._exit(3)
    say({"facts": {"macs": 7}})
    for side in request["sides"]:
        say({"begin": side})
        if side == "hangs":
            time.sleep(600)
        if side == "dies":
            print("CUDA error: an illegal memory access", file=sys.stderr, flush=True)
            os._exit(9)
        if side == "fails":
            say({"side": side, "result": {"error": "RuntimeError: CUDA error"}})
            os._exit(3)
        say({"side": side, "result": {"us": {"calls": {"warm": {"median_us": 1.0}, "flushed": {"median_us": 2.0}}}}})
    say({"done": True})
"""


class Lab:
    """A session with the fake worker."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "workers"
        self.folder.mkdir()
        self.path = folder / "gpu.json"

    def item(self, *sides: str, case: str = "case", limit: float = 20.0) -> plan.Item:
        request = {"kind": "pair", "case": case, "batch": 1, "precision": "float16", "direction": "forward"}
        return plan.Item(f"pair/{case}", "measure", "a test", 1, sides, request, limit)

    def run(self, *items: plan.Item, budget: float | None = None, options: tuple[str, ...] = ()) -> runner.Session:
        args = runner.parse(list(options))
        args.packages = None
        command = [sys.executable, "-c", FAKE_WORKER, str(self.folder)]
        results = store.Store(self.path, {"suite": "gpu"})
        session = runner.Session(args, GPU, results, runner.Budget(budget), command)
        session.run(list(items))
        return session

    def workers(self) -> list[int]:
        return [int(path.name) for path in self.folder.iterdir() if path.name.isdigit()]


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    return Lab(tmp_path)


def test_a_lost_worker_costs_one_contestant(lab: Lab) -> None:
    session = lab.run(lab.item("eager", "dies", "compile", "fails", "effops-a"), lab.item("last", case="next"))
    entries = {e["key"].rpartition("|")[2]: e for e in session.results.entries()}
    assert list(entries) == ["eager", "dies", "compile", "fails", "effops-a", "last"]
    assert "the process ended (status 9) (CUDA error: an illegal memory access)" in entries["dies"]["error"]
    assert entries["fails"]["error"] == "RuntimeError: CUDA error"
    for side in ("eager", "compile", "effops-a", "last"):
        assert entries[side]["us"] and entries[side]["macs"] == 7 and "error" not in entries[side]
    assert len(lab.workers()) == 3, "one for the start, one after each loss"
    assert not any(alive(pid) for pid in lab.workers())
    assert session.failures == [], "a rival's failure is noted in its entry only"


def test_a_hanging_contestant_is_given_up(lab: Lab) -> None:
    start = time.monotonic()
    session = lab.run(lab.item("eager", "hangs", "compile", limit=2.0))
    assert time.monotonic() - start < 30
    entries = session.results.entries()
    assert [("error" in e) for e in entries] == [False, True, False]
    assert entries[1]["error"].startswith("no answer within 2 s")
    assert not any(alive(pid) for pid in lab.workers())


def test_each_answer_is_in_the_file_at_once(lab: Lab) -> None:
    """What was measured before a session is killed is not lost."""
    seen = []
    real = store.Store.add

    class Watching(store.Store):
        def add(self, entry: dict) -> None:
            real(self, entry)
            seen.append(len(json.loads(self.path.read_text())["entries"]))

    args = runner.parse([])
    args.packages = None
    command = [sys.executable, "-c", FAKE_WORKER, str(lab.folder)]
    results = Watching(lab.path, {"suite": "gpu"})
    runner.Session(args, GPU, results, runner.Budget(None), command).run([lab.item("eager", "compile", "effops-a")])
    assert seen == [1, 2, 3]


def test_a_problem_that_cannot_be_built(lab: Lab) -> None:
    session = lab.run(lab.item("effops-a", "eager", case="unbuildable"), lab.item("eager"))
    errors = [e.get("error") for e in session.results.entries()]
    assert errors == ["not built: OutOfMemoryError: too large"] * 2 + [None]
    assert session.failures == ["pair/unbuildable|effops-a: not built: OutOfMemoryError: too large"]


def test_a_worker_that_does_not_start_fails_nothing_else(lab: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    (lab.folder / "broken").touch()
    session = lab.run(lab.item("effops-a"), lab.item("eager", case="next"))
    assert session.results.entries() == [] and len(lab.workers()) == 1
    assert session.failures == ["the worker does not start: the process ended (status 1) (no driver)"]
    assert capsys.readouterr().out.count("left out pair/") == 2


def test_measurements_are_resumed(lab: Lab) -> None:
    lab.run(lab.item("eager", "dies"))
    assert len(lab.workers()) == 1
    lab.run(lab.item("eager", "dies"))
    assert len(lab.workers()) == 1, "nothing was left to do"
    lab.run(lab.item("eager", "dies", "compile"))
    assert len(lab.workers()) == 2
    before = len(lab.workers())
    session = lab.run(lab.item("eager", "dies", "compile"), options=("--retry",))
    assert len(lab.workers()) == before + 1 and session.results.entries()[-1]["side"] == "dies"
    session = lab.run(lab.item("eager", "compile"), options=("--fresh",))
    assert [e["side"] for e in session.results.entries()[-2:]] == ["eager", "compile"]


def test_the_budget_ends_what_is_under_way(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "_LEAST_S", 0.5)
    start = time.monotonic()
    session = lab.run(lab.item("eager", "hangs", limit=600), lab.item("eager", case="next"), budget=3.0)
    assert time.monotonic() - start < 20
    assert [e["side"] for e in session.results.entries()] == ["eager"], "cut short is not failed"
    assert session.left_out[0] == "pair/case: the budget ended during hangs"
    assert session.left_out[1].startswith("pair/next: needs about ")


def test_an_own_failure_is_the_sessions(lab: Lab) -> None:
    assert lab.run(lab.item("effops-a", case="unbuildable")).failures
    assert not lab.run(lab.item("eager", case="unbuildable")).failures
    assert runner.outcome({"error": "wrong result: x"}) == "FAILED wrong result: x"


# ---- tests that are lost --------------------------------------------------------------------------------------------

SUITE = """
    import os, time
    import pytest

    pytestmark = pytest.mark.gpu

    def test_good(): pass
    def test_bad(): assert 1 == 2, "wrong sum"
    @pytest.mark.skip(reason="needs two GPUs")
    def test_skipped(): pass
    def test_dies(): os.abort()
    def test_after_death(): pass
    def test_hangs():
        if os.environ.get("HANG") == "1":
            time.sleep(600)
    def test_lost(): raise RuntimeError("CUDA error: an illegal memory access was encountered")
    def test_after_loss(): pass
    @pytest.mark.parametrize("i", range(4))
    def test_many(i): pass
"""


def suite_run(tmp_path: Path, seconds: float = 120.0, stall: float = 8.0, **options: Any) -> suites.Run:
    tests, logs = tmp_path / "suite", tmp_path / "logs"
    tests.mkdir(exist_ok=True)
    logs.mkdir(exist_ok=True)
    (tests / "pytest.ini").write_text("[pytest]\nmarkers =\n    gpu\n    slow\n")
    (tests / "test_it.py").write_text(textwrap.dedent(SUITE))
    env = dict(os.environ) | {"PYTHONPATH": str(ROOT)} | options.pop("env", {})
    return suites.Run(str(tests), logs, seconds, env, ROOT, stall=stall, **options)


@pytest.mark.slow
@pytest.mark.parametrize("shards", (1, 2))
def test_suite_survives_what_its_tests_do(shards: int, tmp_path: Path) -> None:
    found = suites.collect(suite_run(tmp_path, shards=shards, env={"HANG": "1"}))
    named = {name.rpartition("::")[2]: reason for name, reason in found["failures"].items()}
    assert named == {
        "test_bad": "AssertionError: wrong sum",
        "test_dies": "the process died of signal 6",
        "test_hangs": "hung: nothing happened for 8 s",
        "test_lost": "RuntimeError: CUDA error: an illegal memory access was encountered",
    }
    assert (found["passed"], found["failed"], found["skipped"]) == (7, 4, 1)
    assert found["skips"] == {"needs two GPUs": 1} and "incomplete" not in found
    assert found["error"] == "4 tests failed"


def test_suite_goes_on_with_what_is_left(tmp_path: Path) -> None:
    run = suite_run(tmp_path)
    names = ["test_good", "test_bad", "test_dies", "test_lost", "test_many[0]"]
    known = [{"test": f"test_it.py::{name}", "outcome": "passed"} for name in names]
    found = suites.collect(run, known)
    assert (found["passed"], found["failed"], found["skipped"]) == (5 + 6, 0, 1)


def test_a_file_that_cannot_be_imported_is_a_failure(tmp_path: Path) -> None:
    run = suite_run(tmp_path)
    Path(run.path, "test_it.py").write_text("import pytest\n\n@pytest.mark.gpu\ndef test_good(): pass\n")
    Path(run.path, "test_other.py").write_text("import no_such_module\n")
    found = suites.collect(run)
    assert found["failures"] == {"test_other.py": "E   ModuleNotFoundError: No module named 'no_such_module'"}
    assert found["passed"] == 1 and "incomplete" not in found


def test_suite_that_cannot_run_is_incomplete(tmp_path: Path) -> None:
    run = suite_run(tmp_path, arguments=("--no-such-option",))
    found = suites.collect(run)
    assert found["incomplete"] and "no-such-option" in found["tail"] and found["passed"] == 0
    assert suites.collect(suite_run(tmp_path, seconds=1.0))["incomplete"], "no time to begin"


# ---- timing ---------------------------------------------------------------------------------------------------------


class TickingClock:
    """A device whose time goes on by what is launched: 10 us a call, 1,000 us a flush; waiting is written down."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.now, self.log = 0.0, []

    def call(self) -> None:
        self.now += 10.0
        self.log.append("call")

    def mark(self) -> float:
        self.log.append("mark")
        return self.now

    def microseconds(self, start: float, end: float) -> float:
        return end - start

    def wait(self) -> None:
        self.log.append("wait")

    def flush(self) -> None:
        self.now += 1000.0
        self.log.append("flush")

    def capture(self, fn: Any, calls: int) -> Any:
        def replay() -> None:
            self.now += 10.0 * calls
            self.log.append(f"replay {calls}")

        return replay


EFFORT = timing.Effort(sample_us=400.0, samples=4, flushed=3, warmup=2)


@pytest.mark.parametrize("mode", timing.MODES)
def test_timing_is_per_call_and_leaves_the_flush_out(mode: str) -> None:
    clock = TickingClock()
    result = timing.MODES[mode](clock.call, clock, EFFORT)
    assert result["warm"] == {"median_us": 10.0, "p20_us": 10.0, "p80_us": 10.0, "rounds": 4}
    assert result["flushed"]["median_us"] == 10.0 and result["flushed"]["rounds"] == 3


def test_nothing_waits_inside_what_is_timed() -> None:
    clock = TickingClock()
    timing.calls(clock.call, clock, EFFORT)
    text = " ".join(clock.log)
    warm = " ".join(["mark", *["call"] * 40, "mark"])
    assert " ".join([warm] * 4) + " wait" in text
    assert " ".join(["flush mark call mark"] * 3) + " wait" in text
    assert clock.log.count("wait") == 4  # after warm-up, after the estimate, and once after each set of samples


def test_graphs_hold_many_calls_warm_and_one_flushed() -> None:
    clock = TickingClock()
    timing.graph(clock.call, clock, EFFORT)
    assert clock.log.count("replay 40") == 1 + EFFORT.samples and clock.log.count("replay 1") == EFFORT.flushed


# ---- gates ----------------------------------------------------------------------------------------------------------


class FakeTask:
    """A task whose contestant does what the test says."""

    grad = False

    def __init__(self, call: Any, check: Any = lambda *_: {"error": 0.0}) -> None:
        self._call, self.check = call, check

    def stock(self, wrap: Any) -> Any:
        return self._call

    def effops(self, backend: str) -> Any:
        return self._call

    forward = effops


def raises(error: Exception) -> Any:
    def fail(*_: Any) -> None:
        raise error

    return fail


def outcome(task: FakeTask, side: str = "effops-auto") -> tuple[dict, bool]:
    return worker.outcome(side, task, clocks.HostClock(), timing.QUICK)


def test_a_wrong_result_is_recorded_and_has_no_time() -> None:
    found, healthy = outcome(FakeTask(lambda: None, raises(gate.GateError("largest error 1.0, allowed 0.1"))))
    assert found == {"error": "wrong result: largest error 1.0, allowed 0.1", "wrong": True} and healthy


def test_an_error_is_recorded_and_ends_the_process() -> None:
    found, healthy = outcome(FakeTask(lambda: None, raises(torch.OutOfMemoryError("CUDA out of memory.\nTried ..."))))
    assert found == {"error": "OutOfMemoryError: CUDA out of memory."} and not healthy


def test_what_a_backend_declines_is_no_failure() -> None:
    import effops.functional as EF

    x = torch.zeros(1, 4, 5, 5, dtype=torch.float16)
    task = FakeTask(lambda: None, lambda *_: EF.depthwise_conv2d(x, x.new_zeros(4, 1, 3, 3), backend="cpp"))
    found, healthy = outcome(task)
    assert (
        list(found) == ["unable"] and "backend 'cpp' cannot run input float16[1,4,5,5]" in found["unable"] and healthy
    )
    assert contestants.unable(RuntimeError("CUDA error")) is None


def test_a_failed_capture_keeps_the_times_before_it() -> None:
    class NoCapture(clocks.HostClock):
        capture = raises(RuntimeError("operation not permitted when stream is capturing"))

    task = FakeTask(lambda: None)
    found, healthy = worker.outcome("eager", task, NoCapture(), timing.QUICK)
    assert list(found["us"]) == ["calls"] and "stream is capturing" in found["graph_error"] and not healthy
    assert "error" not in found


@pytest.fixture
def training() -> tasks.ForwardBackward:
    return tasks.ForwardBackward(shapes.find("vgnet-half-224-14"), 2, "bfloat16", torch.device("cpu"))


def test_forward_backward_is_exact_where_the_relus_bend(training: tasks.ForwardBackward) -> None:
    """In bfloat16 too: no argument of a ReLU is moved across zero, so single gradients can be compared."""
    assert training.check(training.effops("reference"), own=True, what="reference")["error"] >= 0
    training.check(training.stock(tasks.plain), own=False, what="eager")


@pytest.mark.parametrize("wrong", range(6))
def test_forward_backward_finds_each_wrong_gradient(wrong: int, training: tasks.ForwardBackward) -> None:
    step = training.effops("reference")

    def tampered() -> tuple[torch.Tensor, ...]:
        results = list(step())
        results[wrong] = results[wrong] * 1.05
        return tuple(results)

    with pytest.raises(gate.GateError):
        training.check(tampered, own=True, what="tampered")


def test_forward_backward_wants_learned_kernels() -> None:
    with pytest.raises(ValueError, match="learned kernels, not blur"):
        tasks.ForwardBackward(shapes.find("vgnet-down-28-56-112"), 1, "float32", torch.device("cpu"))


def test_norm_gate() -> None:
    truth = torch.ones(100, dtype=torch.float64)
    stock = truth.float() * (1 + 1e-3)
    gate.check_norm(truth.float() * (1 + 1.9e-3), stock, truth, "x", 1e-5)
    for wrong in (truth.float() * (1 + 2.1e-3), truth.float() * math.nan):
        with pytest.raises(gate.GateError):
            gate.check_norm(wrong, stock, truth, "x", 1e-5)


def test_unknown_contestant() -> None:
    with pytest.raises(ValueError, match="no contestant 'fast'"):
        contestants.build("fast", FakeTask(lambda: None))


# ---- the command ----------------------------------------------------------------------------------------------------


def test_dry_run_where_there_is_no_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert runner.main(["--out", str(tmp_path)], describe_as(NO_GPU)) == 0
    text = capsys.readouterr().out
    lines = text.splitlines()
    assert "tests: the tests marked gpu (pytest tests -m gpu)  [not here: needs gpu, hypothesis]" in text
    assert "pair/mnv1-128-128-56-s1/b128/float16/forward: mnv1-128-128-56-s1, batch 128" in text
    assert "not here: no GPU: there is none here" in lines
    assert lines[-1] == "A dry run: nothing was built, tested or measured."
    assert len(lines) == len(plan.make()) + 3 and list(tmp_path.iterdir()) == []


def test_dry_run_where_there_is_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert runner.main(["--dry-run", "--only", "bench,tests", "--out", str(tmp_path)], describe_as(GPU)) == 0
    text = capsys.readouterr().out
    assert "tests: the tests marked gpu (pytest tests -m gpu)\n" in text
    assert "not here: pytest_benchmark not installed (WHEELS=DIR installs carried wheels)" in text
    assert runner.main(["--only", "nonsense"], describe_as(GPU)) == 2


@pytest.mark.slow
def test_make_gpu_here() -> None:
    """The command as people type it, without a stand-in: it ends well whether or not this Python has torch."""
    command = ["make", "--no-print-directory", "gpu", f"GPU_PYTHON={sys.executable}", "ARGS=--dry-run --only peaks"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "peaks: copy bandwidth and matrix peaks" in done.stdout


def test_the_runner_needs_no_torch() -> None:
    code = "import sys; from benchmarks.gpu import runner; runner.print_plan(runner.plan.make(), {'why_not': 'x'})"
    code += "; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, stdout=subprocess.DEVNULL)


def test_describe_says_why_when_the_child_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "run", lambda *_: process.Finished(1, "", "Traceback\nImportError: no libcuda"))
    assert runner.describe({}) == {
        "gpu": None,
        "why_not": "asking for it failed: ImportError: no libcuda",
        "packages": [],
    }


def test_wheels_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"WHEELS: no \*\.whl in "):
        runner.main(["--wheels", str(tmp_path)], describe_as(NO_GPU))


def test_budget_must_be_positive(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        runner.main(["--budget", "0"], describe_as(NO_GPU))
    assert "--budget must be more than 0 seconds, got 0" in capsys.readouterr().err


def test_rehearsal_from_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The real worker on the CPU: peaks, problems of each kind, gates; then nothing is left to do."""
    command = ["--rehearse", "--out", str(tmp_path), "--only", "peaks,dw/,block/,forward+backward,bfloat16"]
    assert runner.main(command, describe_as(NO_GPU)) == 0
    path = tmp_path / "gpu-cpu-rehearsal.json"
    result = json.loads(path.read_text())
    assert result["suite"] == "gpu" and result["rehearsal"] and result["machine"]["gpu"] == "cpu rehearsal"
    by_side: dict[str, list[dict]] = {}
    for found in result["entries"]:
        assert found["commit"] and found["code"] and found["date"] and "error" not in found
        by_side.setdefault(found["side"], []).append(found)
    assert {side: len(found) for side, found in by_side.items()} == {"peaks": 1, "effops-auto": 6, "eager": 6}
    assert by_side["peaks"][0]["copy_gbs"] > 0
    for found in by_side["effops-auto"]:
        assert found["gate"]["norm"] >= 0 and found["backend"]
    for found in (*by_side["effops-auto"], *by_side["eager"]):
        for mode in ("calls", "graph"):
            for cache in ("warm", "flushed"):
                times = found["us"][mode][cache]
                assert 0 < times["p20_us"] <= times["median_us"] <= times["p80_us"]
    before, _ = path.read_text(), capsys.readouterr()
    assert runner.main(command, describe_as(NO_GPU)) == 0
    assert json.loads(path.read_text())["entries"] == json.loads(before)["entries"]
    assert "13 entries in" in capsys.readouterr().out


# ---- the report -----------------------------------------------------------------------------------------------------


def timed(side: str, case: str, warm: float, flushed: float, **more: Any) -> dict:
    us = {"graph": {"warm": {"median_us": warm}, "flushed": {"median_us": flushed}}}
    us["calls"] = {"warm": {"median_us": 2 * warm}, "flushed": {"median_us": 2 * flushed}}
    found = {"kind": "pair", "case": case, "batch": 128, "precision": "float16", "direction": "forward"}
    found |= {"key": f"pair/{case}|{side}", "stage": "measure", "side": side, "us": us, "commit": "0123456789abcdef"}
    return found | ({"backend": "triton"} if side.startswith("effops") else {}) | more


def gpu_result(*entries: dict) -> dict:
    peaks = {f"{p}_tflops": 700.0 for p in ("float16", "bfloat16", "tf32", "float32")}
    peaks |= {"key": "peaks|peaks", "side": "peaks", "kind": "peaks", "copy_gbs": 4000.0, "commit": "0123456789abcdef"}
    machine = {"cpu": "CPU", "gpu": "Test GPU 9", "driver": "1.2", "cuda": "13.0", "cudnn": 91000, "triton": "3.6.0"}
    return {
        "suite": "gpu",
        "date": "2030-01-02T03:04:05Z",
        "machine": machine,
        "versions": {"torch": "2.11.0", "python": "3.12.3"},
        "entries": [peaks, *entries],
    }


def test_report_takes_the_best_mode_of_each_side() -> None:
    pair = "mnv1-128-128-56-s1"
    result = gpu_result(timed("effops-triton", pair, 55.0, 60.0), timed("eager", pair, 150.0, 156.0),
                        timed("compile", pair, 120.0, 126.0))  # fmt: skip
    (judged,) = report_gpu.judge(result)
    assert (judged.own["warm"].mode, judged.rival["warm"].side) == ("graph", "compile")
    assert judged.ratio("warm") == pytest.approx(120 / 55) and judged.ratio("flushed") == pytest.approx(2.1)
    traffic = shapes.find(pair).traffic(128, "float16")
    assert judged.bandwidth == pytest.approx(traffic / 60e-6 / 4e12)
    text = report_gpu.block([result])
    assert f"| {100 * judged.bandwidth:.0f} % of the copy bandwidth | yes |" in text.replace(", ", " | ")
    assert "copy 4.00 TB/s" in text and "Test GPU 9, driver 1.2" in text and "`0123456789`" in text


def test_report_wants_ratio_and_bandwidth() -> None:
    pair, half = "mnv1-256-256-28-s1", "vgnet-half-56-56"
    slow = timed("effops-triton", pair, 50.0, 50.0), timed("eager", pair, 110.0, 110.0)
    block = timed("effops-triton", half, 20.0, 20.0), timed("eager", half, 51.0, 49.0)
    text = report_gpu.block([gpu_result(*slow, *block)])
    rows = [line for line in text.splitlines() if line.startswith(("| `mnv1-256", "| `vgnet-half"))]
    assert rows[0].endswith("2.20x warm, 2.20x flushed, 51 % of the copy bandwidth | **no** |")
    assert "2.55x warm, 2.45x flushed" in rows[1] and rows[1].endswith("| **no** |"), "the worse of the two counts"


def test_report_does_not_count_the_reference_as_ours() -> None:
    pair = "mnv1-128-128-56-s1"
    result = gpu_result(timed("effops-auto", pair, 10.0, 10.0, backend="reference"), timed("eager", pair, 50.0, 50.0))
    text = report_gpu.block([result])
    assert "no kernel of ours has been measured" in text and "5.00x" not in text
    assert "the rivals' times are what there is to win against" in text


def test_report_tells_failures_and_tests() -> None:
    failed = timed("effops-triton", "vgnet-half-56-56", 1, 1) | {"us": {}, "error": "wrong result: <bad>"}
    tests = {"key": "tests", "stage": "tests", "path": "tests", "passed": 5, "failed": 1, "skipped": 2}
    tests |= {"incomplete": True, "commit": "0123456789abcdef", "error": "1 tests failed"}
    text = report_gpu.block([gpu_result(failed, timed("eager", "vgnet-half-56-56", 9, 9), tests)])
    assert "5 passed, 1 failed, 2 skipped, not finished" in text
    assert "Failed: pair/vgnet-half-56-56|effops-triton: wrong result: &lt;bad&gt;" in text
    assert report_gpu.block([]) == report_gpu.MISSING
