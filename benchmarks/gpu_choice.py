"""`effops/gpu_choice.json` from results/gpu-*.json: the times of our GPU backends on the problems that all of them ran.

A backend's time is the best of its modes, with a flushed cache.
"""

from __future__ import annotations

import json

from benchmarks import shapes

PATH = "effops/gpu_choice.json"
_OPS = {"pair": "dsconv", "dw": "dwconv"}
_OWN = ("triton", "cuda")


def content(results: list[dict]) -> str:
    """The file's text."""
    rows = [row for result in results for row in _rows(result)]
    lines = ",\n  ".join(json.dumps(row) for row in rows)
    listed = f"[\n  {lines}\n ]" if rows else "[]"
    origin = "python benchmarks/report.py, from benchmarks/results/gpu-*.json"
    return f'{{\n "made by": "{origin}",\n "records": {listed}\n}}\n'


def _rows(result: dict) -> list[dict]:
    times: dict[tuple, dict[str, float]] = {}
    for entry in result["entries"]:
        backend = entry.get("side", "").removeprefix("effops-")
        if backend not in _OWN or entry.get("backend") != backend or entry.get("kind") not in _OPS or not entry["us"]:
            continue
        problem = tuple(entry[key] for key in ("kind", "case", "batch", "precision", "direction"))
        times.setdefault(problem, {})[backend] = min(mode["flushed"]["median_us"] for mode in entry["us"].values())
    (capability,) = {entry["capability"] for entry in result["entries"] if "capability" in entry} or {""}
    return [_row(capability, *problem, us) for problem, us in times.items() if len(us) == len(_OWN)]


def _row(
    capability: str, kind: str, name: str, batch: int, precision: str, direction: str, us: dict[str, float]
) -> dict:
    case = shapes.find(name)
    return {
        "capability": capability,
        "op": _OPS[kind],
        "precision": precision,
        "direction": direction,
        "window": [case.kernel] * 2,
        "stride": [case.stride] * 2,
        "channels": case.channels,
        "out": case.channels if kind == "dw" else case.out,
        "pixels": batch * case.out_size**2,
        "us": us,
    }
