"""One contestant's process: reads requests as JSON lines, measures, answers as JSON lines. Started by run.py.

A request names a problem; the answer holds a timing for each variant of the contestant, or the reason why not.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import sys
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from benchmarks import gate, layers, networks, overhead, problems, shapes, timing, training


def build(request: dict):
    """The problem that a request names."""
    kind = request["kind"]
    if kind == "model":
        return networks.ModelProblem(request["case"], request["batch"])
    if kind == "training":
        return training.TrainingProblem(request["channels"], request["size"], request["batch"])
    if kind == "module-training":
        return training.ModuleTraining(request["case"], request["batch"])
    case = shapes.find(request["case"])
    if kind == "layer":
        return layers.LayerProblem(case, request["batch"], getattr(torch, request["dtype"]))
    if kind == "pointwise":
        case = case.pointwise_only()
    return problems.build(case, request["batch"], request["dtype"])


def _gate(peer: str, problem, variant: str, fn, rivals_too: bool) -> dict | None:
    """effops is checked in every process; rivals, whose code stays, in the first of a run (the truth is slow)."""
    if peer != "effops" and not rivals_too:
        return None
    if hasattr(problem, "check"):  # networks and training compare more than one tensor
        return problem.check(fn, variant, own=peer == "effops")
    out = fn()
    if peer != "effops":
        gate.check_rival(out, problem.truth, f"{peer}/{variant}")
        return None
    return gate.check(out, problem.eager_result(variant), problem.truth, f"{peer}/{variant}")


def answer(peer: str, module, request: dict, effort: timing.Effort) -> dict:
    """Gate and time every variant of the contestant on the problem of a request."""
    if request["kind"] == "overhead":
        return {"overhead": overhead.measure(request["quick"])}
    problem = build(request)
    trains = request["kind"].endswith("training")
    sides = {}
    iterator = iter(module.candidates(problem))
    while True:
        variant = "?"
        try:
            variant, fn = next(iterator)
            with contextlib.nullcontext() if trains else torch.no_grad():
                checked = _gate(peer, problem, variant, fn, request.get("first", True))
                result = timing.measure(fn, effort)
                if hasattr(module, "note") and not trains:
                    result |= module.note(fn)
            if checked:
                result["gate"] = checked
            if hasattr(problem, "saved_bytes"):
                result["saved_bytes"] = problem.saved_bytes(peer, variant)
            if hasattr(problem, "peak_bytes") and request.get("first", True):  # the same in every process
                result["peak_bytes"] = problem.peak_bytes(peer, variant)
            sides[variant] = result
        except StopIteration:
            return {"sides": sides} | ({"macs": problem.macs()} if request["kind"] == "model" else {})
        except gate.GateError as error:
            sides[variant] = {"error": f"wrong result: {error}", "wrong": True}
        except Exception as error:
            traceback.print_exc()
            sides[variant] = {"error": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"}
            if variant == "?":  # the contestant could not even be built
                return {"sides": sides}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("peer")
    parser.add_argument("threads", type=int)
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    # Answers go to the real stdout; whatever a library prints goes to stderr.
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    torch.set_num_threads(args.threads)
    module = importlib.import_module(f"benchmarks.peers.{args.peer}")
    timing.warm_heap()
    print(json.dumps({"ready": args.peer}), file=replies)
    effort = timing.QUICK if args.quick else timing.Effort()
    for line in sys.stdin:
        try:
            reply = answer(args.peer, module, json.loads(line), effort)
        except Exception as error:
            traceback.print_exc()
            reply = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(reply), file=replies)


if __name__ == "__main__":
    main()
