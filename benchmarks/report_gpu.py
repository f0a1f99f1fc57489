"""The GPU block of the documents: targets, and every problem against the best rival, from results/gpu-*.json.

A contestant's time is the best of its modes (launched call by call, or as a CUDA graph): both sides may use graphs.
Ratios are given with a warm and a flushed L2 cache; the share of the copy bandwidth is the flushed one's, where the
cache cannot have held the data.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from xml.sax.saxutils import escape

from benchmarks import shapes
from benchmarks.tables import geomean, ms, percent, table, times, yes

PAIR_GOAL, PAIR_BANDWIDTH_GOAL = 2.0, 0.80
HALF_GOAL = 2.5
_PAIRS = ("mnv1-128-128-56-s1", "mnv1-256-256-28-s1")
_HALF = "vgnet-half-56-56"
_OWN = "effops-"
_PROBLEM = ("kind", "case", "batch", "precision", "direction")
MISSING = (
    "_Not measured yet: nothing in this repository has run on a GPU. The tests marked `gpu`, the GPU benchmarks and "
    "the runner's CUDA timing are unverified until `make gpu` has filled this block._"
)


@dataclass(frozen=True)
class Best:
    """The fastest contestant of one kind on a problem, with one state of the cache."""

    side: str
    mode: str
    us: float
    backend: str


@dataclass(frozen=True)
class Judged:
    """One problem: ours and the best rival's, by cache state ("warm", "flushed"); None where there is none."""

    problem: dict
    own: dict[str, Best | None]
    rival: dict[str, Best | None]
    copy_gbs: float

    def ratio(self, cache: str) -> float:
        own, rival = self.own[cache], self.rival[cache]
        return rival.us / own.us if own and rival else math.nan

    @property
    def bandwidth(self) -> float:
        """Share of the copy bandwidth that our time is worth when everything moves once."""
        own = self.own["flushed"]
        if not own or self.problem["direction"] != "forward" or self.problem["kind"] not in ("pair", "dw"):
            return math.nan
        traffic = shapes.find(self.problem["case"]).traffic(self.problem["batch"], self.problem["precision"])
        return traffic / own.us / 1e3 / self.copy_gbs if self.copy_gbs else math.nan


def _best(entries: list[dict], cache: str, wanted: Callable[[dict], bool]) -> Best | None:
    found = [
        Best(entry["side"], mode, summary[cache]["median_us"], entry.get("backend", ""))
        for entry in entries
        if wanted(entry)
        for mode, summary in entry.get("us", {}).items()
    ]
    return min(found, key=lambda best: best.us, default=None)


def _is_rival(entry: dict) -> bool:
    return not entry["side"].startswith(_OWN)


def _is_own_kernel(entry: dict) -> bool:
    """The reference is stock torch; only what ran kernels of ours counts as ours."""
    return not _is_rival(entry) and entry.get("backend", "reference") != "reference"


def judge(result: dict) -> list[Judged]:
    """Every problem of a result, in the order in which they were measured."""
    groups: dict[tuple, list[dict]] = {}
    for entry in result["entries"]:
        if "side" in entry and all(key in entry for key in _PROBLEM):
            groups.setdefault(tuple(entry[key] for key in _PROBLEM), []).append(entry)
    copy_gbs = peaks(result).get("copy_gbs", 0.0)
    return [
        Judged(
            dict(zip(_PROBLEM, key, strict=True)),
            {cache: _best(entries, cache, _is_own_kernel) for cache in ("warm", "flushed")},
            {cache: _best(entries, cache, _is_rival) for cache in ("warm", "flushed")},
            copy_gbs,
        )
        for key, entries in groups.items()
    ]


def peaks(result: dict) -> dict:
    """The measured limits; empty where they are missing."""
    return next((entry for entry in result["entries"] if entry.get("kind") == "peaks" and "copy_gbs" in entry), {})


def _targets(judged: list[Judged]) -> str:
    rows = []
    for name in (*_PAIRS, _HALF):
        goal = HALF_GOAL if name == _HALF else PAIR_GOAL
        words = f"`{name}`, batch 128, float16, forward: {goal}x the best rival"
        if name != _HALF:
            words += f" and {100 * PAIR_BANDWIDTH_GOAL:.0f} % of the copy bandwidth"
        (found,) = [j for j in judged if _is_target(j.problem, name)] or [None]
        if found is None or not found.own["flushed"]:
            rows.append([words, "no kernel of ours has been measured", ""])
            continue
        least = min(found.ratio("warm"), found.ratio("flushed"))
        met = least >= goal and (name == _HALF or found.bandwidth >= PAIR_BANDWIDTH_GOAL)
        measured = f"{times(found.ratio('warm'))} warm, {times(found.ratio('flushed'))} flushed"
        rows.append([words, f"{measured}, {percent(found.bandwidth)} of the copy bandwidth", yes(met)])
    return table(["target", "measured", "met"], rows)


def _is_target(problem: dict, name: str) -> bool:
    wanted = {"kind": "pair", "case": name, "batch": 128, "precision": "float16", "direction": "forward"}
    return problem == wanted


def _rival_cell(best: Best | None) -> str:
    return f"{ms(best.us)} ({best.side}, {best.mode})" if best else "-"


def _own_cell(best: Best | None) -> str:
    return f"{ms(best.us)} ({best.backend}, {best.mode})" if best else "-"


def _table(judged: list[Judged]) -> str:
    rows = []
    for j in judged:
        p = j.problem
        cells = [p["case"], str(p["batch"]), p["precision"], p["direction"]]
        for cache in ("warm", "flushed"):
            ratio = times(j.ratio(cache))
            ratio = f"**{ratio}**" if j.ratio(cache) < 1 else ratio
            cells += [_own_cell(j.own[cache]), _rival_cell(j.rival[cache]), ratio]
        rows.append([*cells, percent(j.bandwidth)])
    header = ["problem", "batch", "precision", "direction", "effops ms, warm", "best rival ms, warm", "ratio, warm"]
    return table([*header, "effops ms, flushed", "best rival ms, flushed", "ratio, flushed", "of copy bandwidth"], rows)


def _means(judged: list[Judged]) -> str:
    ratios = [j.ratio("flushed") for j in judged if not math.isnan(j.ratio("flushed"))]
    if not ratios:
        return "No kernel of ours has been measured; the rivals' times are what there is to win against."
    below = sum(ratio < 1 for ratio in ratios)
    return f"Geometric mean of {len(ratios)} ratios, flushed: {times(geomean(ratios))}; {below} below 1.0x."


def _tests(result: dict) -> str:
    lines = []
    for entry in result["entries"]:
        if entry.get("stage") == "tests":
            counts = f"{entry['passed']} passed, {entry['failed']} failed, {entry['skipped']} skipped"
            unfinished = ", not finished" if entry.get("incomplete") else ""
            lines.append(f"Tests marked gpu in `{entry['path']}`: {counts}{unfinished} (at `{entry['commit'][:10]}`).")
    return "\n\n".join(lines)


def _errors(result: dict) -> str:
    failed = [f"{e['key']}: {e['error']}" for e in result["entries"] if "error" in e]
    return "\n\n".join(f"Failed: {escape(failure)}" for failure in failed)


def provenance(result: dict) -> str:
    """One line that says where the figures come from."""
    m, v, limits = result["machine"], result["versions"], peaks(result)
    commits = sorted({entry["commit"][:10] for entry in result["entries"] if entry["key"] != "environment"})
    named = ", ".join(f"`{commit}`" for commit in commits)
    software = ", ".join(f"{name} {m.get(name, 'unknown')}" for name in ("driver", "cuda", "cudnn"))
    text = f"{m['gpu']}, {software}; torch {v['torch']}, Triton {m.get('triton', 'unknown')}; effops at {named}; "
    text += f"{result['date'][:10]}."
    if limits:
        matrix = ", ".join(f"{limits[f'{p}_tflops']:.0f} {p}" for p in ("float16", "bfloat16", "tf32", "float32"))
        text += f" Measured limits: copy {limits['copy_gbs'] / 1e3:.2f} TB/s; matrix products in TFLOP/s: {matrix}."
    return text


def block(results: list[dict]) -> str:
    """The whole block, a part for each GPU model."""
    parts = []
    for result in results:
        judged = judge(result)
        if judged:
            parts += [_targets(judged), _table(judged), _means(judged)]
            parts += [*filter(None, [_tests(result), _errors(result)]), provenance(result)]
    return "\n\n".join(parts) if parts else MISSING
