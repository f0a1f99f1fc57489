"""Measures effops against its rivals, each in processes of its own that take turns, and writes one JSON file.

    python benchmarks/run.py dsconv --out benchmarks/results/dsconv.json
    python benchmarks/run.py all --quick                 # smoke test: one shape of each kind, one process, no claims
    python benchmarks/run.py dsconv --shapes half --peers effops,eager --threads 1

Rules: benchmarks/README.md. Exit status 1 when a result of effops was wrong or could not be had.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import machine, report, shapes, timing, training
from benchmarks.peers import NAMES

ROOT = machine.ROOT
WORKER = Path(__file__).resolve().parent / "peers" / "worker.py"
REPLY_LIMIT_S = 900


class WorkerError(RuntimeError):
    """A contestant's process died or did not answer."""


class Worker:
    """A contestant's process, stopped (SIGSTOP) unless it is its turn, so that its spinning threads disturb nobody."""

    def __init__(self, peer: str, threads: int, quick: bool) -> None:
        self.peer = peer
        self._errors = tempfile.TemporaryFile(mode="w+")  # noqa: SIM115 (closed with the worker)
        command = [sys.executable, str(WORKER), peer, str(threads), *(["--quick"] if quick else [])]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            bufsize=1,
            env=worker_env(threads),
            cwd=ROOT,
        )
        self._read()
        self._signal(signal.SIGSTOP)

    def _signal(self, number: int) -> None:
        if self._process.poll() is None:
            self._process.send_signal(number)

    def _fail(self, what: str) -> WorkerError:
        self._errors.seek(0)
        tail = "\n".join(self._errors.read().splitlines()[-15:])
        return WorkerError(f"{self.peer}: {what}\n{tail}")

    def _read(self) -> dict:
        ready, _, _ = select.select([self._process.stdout], [], [], REPLY_LIMIT_S)
        if not ready:
            raise self._fail(f"no answer within {REPLY_LIMIT_S} s")
        line = self._process.stdout.readline()
        if not line:
            raise self._fail(f"the process ended (status {self._process.wait()})")
        return json.loads(line)

    def ask(self, request: dict) -> dict:
        """Give the process its turn for one request."""
        self._signal(signal.SIGCONT)
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            return self._read()
        except BrokenPipeError:
            raise self._fail("the process ended") from None
        finally:
            self._signal(signal.SIGSTOP)

    def close(self) -> None:
        self._signal(signal.SIGCONT)
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._errors.close()


def worker_env(threads: int) -> dict[str, str]:
    """The environment of every contestant, the same for all."""
    cache = Path(tempfile.gettempdir()) / f"effops-bench-inductor-{os.getuid()}"
    env = {"TORCHINDUCTOR_CACHE_DIR": str(cache), "TORCHINDUCTOR_COMPILE_THREADS": "1"} | dict(os.environ)
    return env | timing.MALLOC_ENV | {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}


@dataclass
class Job:
    """One row of the results: a problem, the contestants that run it, and what is known about it beforehand."""

    request: dict
    peers: tuple[str, ...]
    facts: dict
    sides: dict[str, dict] = field(default_factory=dict)
    threads: int = 0

    @property
    def label(self) -> str:
        return f"{self.request.get('case', self.request['kind'])} b{self.request.get('batch', '-')}"

    def add(self, peer: str, reply: dict) -> None:
        """Merge one process's timings: its median joins the list, the best median's figures stand."""
        if "error" in reply:
            reply = {"sides": {"?": {"error": reply["error"]}}}
        if "macs" in reply:
            self.facts["macs"] = reply["macs"]
        for variant, result in reply["sides"].items():
            name = f"{peer}/{variant}"
            known = self.sides.get(name)
            if "error" in result:  # one failure is enough to distrust a side
                self.sides[name] = result
            elif known is None:
                self.sides[name] = result | {"medians_us": [result["median_us"]]}
            elif "error" not in known:
                medians = [*known["medians_us"], result["median_us"]]
                best = result if result["median_us"] < known["median_us"] else known
                self.sides[name] = known | best | {"medians_us": medians}  # what only the first process measured stays

    def row(self) -> dict:
        return {**self.facts, "threads": self.threads, "sides": dict(sorted(self.sides.items()))}


def _case_jobs(cases, kind: str, peers: tuple[str, ...], args: argparse.Namespace, dtype: str = "float32") -> list[Job]:
    jobs = []
    for case in cases:
        if args.shapes and not any(part in case.name for part in args.shapes):
            continue
        if args.quick and not args.shapes and case.name not in shapes.QUICK:
            continue
        for batch in args.batches:
            measured = case.pointwise_only() if kind == "pointwise" else case
            facts = {
                "kind": kind,
                "case": case.name,
                "batch": batch,
                "dtype": dtype,
                "macs": measured.pw_macs(batch) if kind == "pointwise" else measured.macs(batch),
                "traffic": measured.traffic(batch, dtype),
                "count": case.count,
                "out_size": case.out_size,
            }
            jobs.append(Job({"kind": kind, "case": case.name, "batch": batch, "dtype": dtype}, peers, facts))
    return jobs


def dsconv_jobs(args: argparse.Namespace) -> list[Job]:
    return [
        *_case_jobs(shapes.DSCONV, "pair", args.peers, args),
        *_case_jobs(shapes.POINTWISE, "pointwise", ("effops",), args),
    ]


def dwconv_jobs(args: argparse.Namespace) -> list[Job]:
    return _case_jobs(shapes.DWCONV, "dw", args.peers, args)


def sepconv_jobs(args: argparse.Namespace) -> list[Job]:
    return _case_jobs(shapes.EFFNET, "layer", args.peers, args)


def blurmaxpool_jobs(args: argparse.Namespace) -> list[Job]:
    return _case_jobs(shapes.BLUR_MAX_POOLS, "layer", args.peers, args)


def bsconv_jobs(args: argparse.Namespace) -> list[Job]:
    return _case_jobs(shapes.BSCONV, "bs", args.peers, args)


def multiception_jobs(args: argparse.Namespace) -> list[Job]:
    return _case_jobs(shapes.MULTICEPTION, "multiception", args.peers, args)


def mbconv_jobs(args: argparse.Namespace) -> list[Job]:
    return _case_jobs(shapes.MBCONV, "pair", args.peers, args)


def bf16_jobs(args: argparse.Namespace) -> list[Job]:
    """effops in bf16 and in fp32, turn by turn; eager's bf16 stands beside them."""
    jobs = []
    rivals = tuple(peer for peer in args.peers if peer in ("effops", "eager"))
    for bf16, fp32 in zip(
        _case_jobs(shapes.DSCONV, "pair", rivals, args, "bfloat16"),
        _case_jobs(shapes.DSCONV, "pair", ("effops",), args, "float32"),
        strict=True,
    ):
        jobs += [bf16, fp32]
    return jobs


def _network_jobs(
    names: Sequence[str], peers: tuple[str, ...], batches: Sequence[int], wanted: tuple[str, ...]
) -> list[Job]:
    """Networks whose names contain one of `wanted`, or all."""
    requests = [
        {"kind": "model", "case": name, "batch": batch}
        for name in names
        if not wanted or any(part in name for part in wanted)
        for batch in batches
    ]
    return [Job(request, peers, request | {"dtype": "float32"}) for request in requests]


def models_jobs(args: argparse.Namespace) -> list[Job]:
    return _network_jobs(shapes.QUICK_MODELS if args.quick else shapes.MODELS, args.peers, args.batches, args.shapes)


def latencies_jobs(args: argparse.Namespace) -> list[Job]:
    """Every registered model at batch 1, against eager alone: the column of docs/models.md."""
    from effops.models import list_models

    peers = tuple(peer for peer in args.peers if peer in ("effops", "eager"))
    return _network_jobs(shapes.QUICK_MODELS[:1] if args.quick else list_models(), peers, (1,), args.shapes)


def training_jobs(args: argparse.Namespace) -> list[Job]:
    peers = tuple(peer for peer in args.peers if peer in ("effops", "eager"))
    batch = 2 if args.quick else shapes.TRAINING_BATCH
    requests = [
        {"kind": "training", "case": f"half-{channels}-{size}", "channels": channels, "size": size, "batch": batch}
        for channels, size in (shapes.TRAINING[-1:] if args.quick else shapes.TRAINING)
    ]
    names = list(training.MODULES)[1:3] if args.quick else training.MODULES
    requests += [{"kind": "module-training", "case": name, "batch": batch} for name in names]
    return [
        Job(request, peers, {key: request[key] for key in ("kind", "case", "batch")} | {"dtype": "float32"})
        for request in requests
        if not args.shapes or any(part in request["case"] for part in args.shapes)
    ]


def overhead_jobs(args: argparse.Namespace) -> list[Job]:
    return [Job({"kind": "overhead", "quick": args.quick}, ("effops",), {"kind": "overhead"})]


SUITES: dict[str, Callable[[argparse.Namespace], list[Job]]] = {
    "dsconv": dsconv_jobs,
    "dwconv": dwconv_jobs,
    "sepconv": sepconv_jobs,
    "blurmaxpool": blurmaxpool_jobs,
    "bsconv": bsconv_jobs,
    "multiception": multiception_jobs,
    "mbconv": mbconv_jobs,
    "bf16": bf16_jobs,
    "models": models_jobs,
    "latencies": latencies_jobs,
    "training": training_jobs,
    "overhead": overhead_jobs,
}
ONE_THREAD = ("latencies", "overhead")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def take_turns(jobs: list[Job], threads: int, process: int, quick: bool) -> list[dict]:
    """One process for each contestant; job by job, everyone in turn, another one first in each round.

    Timings go into the jobs; overhead rows are returned.
    """
    peers = sorted({peer for job in jobs for peer in job.peers}, key=NAMES.index)
    turn = peers[process % len(peers) :] + peers[: process % len(peers)]
    overhead_rows: list[dict] = []
    workers: dict[str, Worker] = {}
    try:
        for peer in turn:
            workers[peer] = Worker(peer, threads, quick)
        for job in jobs:
            job.threads = threads
            for peer in (peer for peer in turn if peer in job.peers):
                reply = workers[peer].ask(job.request | {"first": process == 0})
                if "overhead" in reply:
                    overhead_rows += reply["overhead"]
                else:
                    job.add(peer, reply)
    finally:
        for worker in workers.values():
            worker.close()
    return overhead_rows


def _best_overheads(rows: list[dict]) -> list[dict]:
    """Of each operator the process with the lowest overhead, with every process's figures beside it."""
    best = []
    for operator in dict.fromkeys(row["operator"] for row in rows):
        mine = [row for row in rows if row["operator"] == operator]
        row = min(mine, key=lambda r: r["overhead_forward_us"] + r["overhead_forward_backward_us"])
        spread = {f"{key}_processes": [r[key] for r in mine] for key in report.OVERHEAD_GOALS_US}
        best.append({"kind": "overhead", "threads": 1} | row | spread)
    return best


def run(suite: str, args: argparse.Namespace) -> dict:
    """Measure one suite and return what its JSON file holds."""
    binary = machine.build_probe()
    started, rows, probes = time.monotonic(), [], []
    thread_counts = (1,) if suite in ONE_THREAD else args.threads
    for threads in thread_counts:
        jobs = SUITES[suite](args)
        if not jobs:
            raise SystemExit(f"{suite}: no shape matches --shapes {','.join(args.shapes)}")
        processes = args.processes if threads > 1 or suite == "overhead" else args.processes_single
        overheads: list[dict] = []
        for process in range(processes):
            probes.append(machine.probe(binary, threads) | {"load": round(os.getloadavg()[0], 2)})
            elapsed = time.monotonic() - started
            round_ = f"process {process + 1}/{processes}"
            _say(f"{suite}: {threads} threads, {round_}, {len(jobs)} jobs, after {elapsed:.0f} s")
            overheads += take_turns(jobs, threads, process, args.quick)
        rows += _best_overheads(overheads) if suite == "overhead" else [job.row() for job in jobs]
    return {
        "suite": suite,
        "date": machine.date(),
        "quick": args.quick,
        "seconds": round(time.monotonic() - started),
        "processes": {
            str(t): args.processes if t > 1 or suite == "overhead" else args.processes_single for t in thread_counts
        },
        "machine": machine.machine(),
        "versions": machine.versions(),
        "env": machine.environment(worker_env(max(thread_counts))),
        "probes": probes,
        "rows": rows,
    }


def write(result: dict, path: Path) -> None:
    """JSON with one line for each row and probe, so that a diff shows what changed."""
    lines = []
    for key, value in result.items():
        if isinstance(value, list):
            inner = ",\n  ".join(json.dumps(item) for item in value)
            lines.append(f" {json.dumps(key)}: [\n  {inner}\n ]")
        else:
            lines.append(f" {json.dumps(key)}: {json.dumps(value)}")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def failures(result: dict) -> list[str]:
    """What effops got wrong or could not do; a rival's failure is only noted in its row."""
    return [
        f"{row['kind']} {row['case']} b{row['batch']} t{row['threads']} {row['dtype']} {name}: {side['error']}"
        for row in result["rows"]
        for name, side in row.get("sides", {}).items()
        if name.startswith("effops") and "error" in side
    ]


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def _names(text: str) -> tuple[str, ...]:
    return tuple(part for part in text.split(",") if part)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suite", choices=[*SUITES, "all"])
    parser.add_argument("--out", type=Path, help="file, or folder for 'all' (default: benchmarks/results)")
    parser.add_argument("--quick", action="store_true", help="one shape of each kind, one process: a smoke test")
    parser.add_argument("--shapes", type=_names, default=(), help="comma-separated parts of shape names")
    parser.add_argument("--peers", type=_names, default=NAMES, help=f"comma-separated, of {','.join(NAMES)}")
    parser.add_argument("--batches", type=_numbers, default=shapes.BATCHES)
    parser.add_argument("--threads", type=_numbers, default=shapes.THREADS)
    parser.add_argument("--processes", type=int, help="processes of each contestant on several threads (default 5)")
    parser.add_argument(
        "--processes-single", type=int, help="the same on one thread, where timings vary little (default 2)"
    )
    args = parser.parse_args(argv)
    unknown = set(args.peers) - set(NAMES)
    if unknown:
        parser.error(f"unknown peers {sorted(unknown)}; there are {', '.join(NAMES)}")
    args.processes = args.processes or (1 if args.quick else 5)
    args.processes_single = args.processes_single or (1 if args.quick else 2)
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    # A smoke test must not overwrite what the README shows.
    default = Path(tempfile.gettempdir()) / "effops-bench-quick" if args.quick else ROOT / "benchmarks" / "results"
    status = 0
    for suite in SUITES if args.suite == "all" else (args.suite,):
        folder = args.out if args.out and args.suite == "all" else default
        path = args.out if args.out and args.suite != "all" else folder / f"{suite}.json"
        result = run(suite, args)
        write(result, path)
        print("\n".join(report.describe(result)))
        _say(f"{suite}: {result['seconds']} s, written to {path}")
        for failure in failures(result):
            _say(f"FAILED {failure}")
            status = 1
    return status


if __name__ == "__main__":
    sys.exit(main())
