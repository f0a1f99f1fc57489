"""The process that measures: requests as JSON lines in, one JSON line out for each contestant begun and finished.

After any failure but a wrong result it ends, because a CUDA error stays with its process; the runner starts another one
for what is left.

    python benchmarks/gpu/worker.py cuda [--quick]
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from benchmarks import gate
from benchmarks.gpu import clocks, contestants, device, peaks, tasks, timing

_LOAD_US = 250_000  # nvidia-smi takes about a tenth of a second to answer


def first_line(error: BaseException) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0] if text else ''}"


def note_backend(side: str, task) -> dict[str, str]:
    """Which backends run the forward of one of our own contestants."""
    if not side.startswith(contestants.OWN):
        return {}
    from effops import backends

    calls = backends.explain(task.forward(side.removeprefix(contestants.OWN))).calls
    return {"backend": "+".join(sorted({call.backend for call in calls}))}


def note_clocks(call: Callable[[], object], clock: clocks.Clock, us: float) -> dict:
    """Clocks, temperature and power while the call runs again and again."""
    if clock.device.type != "cuda":
        return {}
    for _ in range(max(1, int(_LOAD_US / us))):
        call()
    found = device.smi()
    clock.wait()
    return {"smi": found} if found else {}


def measure(side: str, task, clock: clocks.Clock, effort: timing.Effort) -> tuple[dict, bool]:
    """Gate a contestant, then time it in each of its modes; a mode that fails is named with its reason.

    Returns the result and whether the process may go on: a failed graph capture keeps the times taken before it.
    """
    contestant = contestants.build(side, task)
    with contextlib.nullcontext() if task.grad else torch.no_grad():
        checked = task.check(contestant.call, side.startswith(contestants.OWN), side)
        result = {"us": {}, **note_backend(side, task), **({"gate": checked} if checked else {})}
        for mode in contestant.modes:
            try:
                result["us"][mode] = timing.MODES[mode](contestant.call, clock, effort)
            except Exception as error:
                traceback.print_exc()
                result["error" if not result["us"] else f"{mode}_error"] = first_line(error)
                return result, False
        result |= note_clocks(contestant.call, clock, result["us"][contestant.modes[0]]["warm"]["median_us"])
    return result, True


def outcome(side: str, task, clock: clocks.Clock, effort: timing.Effort) -> tuple[dict, bool]:
    """What goes into the results for a contestant, and whether this process may go on."""
    try:
        return measure(side, task, clock, effort)
    except gate.GateError as error:
        return {"error": f"wrong result: {error}", "wrong": True}, True
    except Exception as error:
        if reason := contestants.unable(error):
            return {"unable": reason}, True
        traceback.print_exc()
        return {"error": first_line(error)}, False


def tidy(clock: clocks.Clock) -> None:
    torch._dynamo.reset()
    gc.collect()
    if clock.device.type == "cuda":
        torch.cuda.empty_cache()


def serve(request: dict, clock: clocks.Clock, effort: timing.Effort, say: Callable[[dict], None]) -> bool:
    """Answer a request line by line; False where the process must end."""
    if request["kind"] == "peaks":
        say({"begin": "peaks"})
        say({"side": "peaks", "result": peaks.measure(clock, effort, request.get("scale", 1.0))})
        return True
    tasks.use_precision(request["precision"])
    say({"begin": request["sides"][0]})  # building the problem counts for the first
    task = tasks.build(request, clock.device)
    say({"facts": task.facts()})
    for side in request["sides"]:
        say({"begin": side})
        start = time.monotonic()
        result, healthy = outcome(side, task, clock, effort)
        say({"side": side, "result": result | {"seconds": round(time.monotonic() - start, 1)}})
        if not healthy:
            return False
        tidy(clock)
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("device", choices=("cuda", "cpu"))
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    # Answers go to the real stdout; whatever a library prints goes to stderr.
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def say(message: dict) -> None:
        print(json.dumps(message), file=replies)

    torch.backends.cudnn.benchmark = True
    clock = clocks.CudaClock() if args.device == "cuda" else clocks.HostClock()
    effort = timing.QUICK if args.quick else timing.Effort()
    say({"ready": str(clock.device)})
    for line in sys.stdin:
        try:
            healthy = serve(json.loads(line), clock, effort, say)
        except Exception as error:  # the problem could not be built
            traceback.print_exc()
            say({"failed": first_line(error)})
            healthy = False
        if not healthy:
            # Not through the interpreter's shutdown: destructors would run into the lost CUDA context.
            replies.flush()
            sys.stderr.flush()
            os._exit(3)
        say({"done": True})
        gc.collect()


if __name__ == "__main__":
    main()
