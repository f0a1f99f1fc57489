"""Makes the benchmark tables and plots of the documents from benchmarks/results/*.json and from nothing else.

    python benchmarks/report.py            # rewrite the blocks and the plots
    python benchmarks/report.py --check    # exit status 1 unless every document and plot is what this would write

A block is what stands between `<!-- bench:begin NAME -->` and `<!-- bench:end NAME -->`; the names are those of BLOCKS.
Needs the standard library only. Where a suite has no result, its block says so.
"""

from __future__ import annotations

import argparse
import difflib
import json
import math
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from xml.sax.saxutils import escape

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import gpu_choice, operators, report_gpu, shapes  # noqa: E402 (this file is run as a program, too)
from benchmarks.tables import geomean, ms, percent, table, times, yes  # noqa: E402

DOCUMENTS = ("README.md", "benchmarks/README.md")
IMAGES = "docs/images"
COMMAND = "python benchmarks/report.py"

DSCONV_GOAL = 1.5
BSCONV_GOAL = 1.5
MULTICEPTION_GOAL = 2.0
BF16_GOAL = 1.6
MODULE_TRAINING_GOAL = 1.3
TRAINING_GOAL = 1.5
NETWORK_GOAL = 1.5
SEPCONV_GOAL = 2.5
BLUR_GOAL = 2.0
BANKED_GOAL = 2.0
SAVED_GOAL = 0.40
POINTWISE_GOAL = 0.75
OVERHEAD_GOALS_US = {"overhead_forward_us": 10.0, "overhead_forward_backward_us": 75.0}

_BANKED = ("shared", "fixed", "blur")  # how the cases of depthwise convolutions with a bank of kernels are called

_NETWORKS = tuple(name for name in shapes.MODELS if name != "mobilenet_v2")  # the papers' own

_SIDES = {
    "effops/nchw": "effops NCHW",
    "effops/channels_last": "effops channels_last",
    "eager/nchw": "eager NCHW",
    "eager/channels_last": "eager channels_last",
    "inductor/nchw": "Inductor NCHW",
    "inductor/channels_last": "Inductor channels_last",
}


class ReportError(ValueError):
    """A document or a results file that cannot be used; the message says which and why."""


# ---- reading and judging ----


def roof(threads: int) -> float:
    """Share of the FMA peak at which a ratio counts as met: some rivals stand there already, nobody passes the peak."""
    return 0.80 if threads == 1 else 0.75


def load(folder: Path) -> list[dict]:
    """Every full result, the newest of each suite and machine; smoke tests (`--quick`) are left out."""
    newest: dict[tuple[str, str], dict] = {}
    for path in sorted(folder.glob("*.json")):
        try:
            result = json.loads(path.read_text(encoding="utf-8"))
            key = (result["suite"], result["machine"].get("gpu", result["machine"]["cpu"]))
            date = result["date"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ReportError(
                f"{path}: not a results file of benchmarks/run.py ({type(error).__name__}: {error})"
            ) from error
        claims_nothing = result.get("quick") or result.get("rehearsal")
        if not claims_nothing and (key not in newest or date > newest[key]["date"]):
            newest[key] = result
    return sorted(newest.values(), key=lambda r: (r["suite"], r["machine"]["cpu"]))


def peaks(result: dict) -> dict[int, dict[str, float]]:
    """Per thread count the best that the probe saw in this run (an honest share has the largest denominator)."""
    best: dict[int, dict[str, float]] = {}
    sizes = {level: int(size.removesuffix("K")) * 1024 for level, size in result["machine"]["caches"].items()}
    for probe in result["probes"]:
        own = sizes.get("L2", 0) * probe["threads"]
        mine = best.setdefault(
            probe["threads"], {"own_cache_bytes": own, "cache_bytes": max(sizes.values(), default=0)}
        )
        for key in ("fp32_gflops", "bf16_gflops", "copy_gbs", "cache_copy_gbs"):
            mine[key] = max(mine.get(key, 0.0), probe.get(key, 0.0))
    return best


def best(row: dict, own: bool) -> tuple[str, dict] | None:
    """The fastest side of effops (own) or of the rivals."""
    sides = [
        (name, side) for name, side in row["sides"].items() if name.startswith("effops/") == own and "error" not in side
    ]
    return min(sides, key=lambda item: item[1]["median_us"]) if sides else None


@dataclass(frozen=True)
class Entry:
    """One measured row, judged: `rival` is what `ratio` is against."""

    row: dict
    own: str
    own_us: float
    rival: str
    rival_us: float
    share: float
    bandwidth: float
    moving: float  # share of the time in which all bytes move once at the speed of where they lie; 0: in the L2

    @property
    def ratio(self) -> float:
        return self.rival_us / self.own_us

    @property
    def limit(self) -> float:
        """The ratio of a kernel at the machine's limits: all FLOPs at the peak or all bytes at a copy's speed.

        Maps that the L2 can hold are no limit; those that the last cache can hold are copied at its speed, where that
        was probed.
        """
        return self.ratio / max(self.share, self.moving)

    def met(self, goal: float) -> bool:
        return self.ratio >= goal or self.share >= roof(self.row["threads"])

    def term(self, goal: float) -> float:
        """min(ratio / goal, 1), and 1 at the roof."""
        return 1.0 if self.met(goal) else self.ratio / goal


def _entry(row: dict, limits: dict[int, dict[str, float]], rival: tuple[str, dict] | None = None) -> Entry | None:
    own, rival = best(row, own=True), rival or best(row, own=False)
    if own is None:
        return None
    limit = limits.get(row["threads"], {})
    peak = limit.get("bf16_gflops" if row["dtype"] == "bfloat16" else "fp32_gflops", 0.0)
    us, traffic = own[1]["median_us"], row.get("traffic", 0)
    return Entry(
        row,
        own[0],
        us,
        rival[0] if rival else "",
        rival[1]["median_us"] if rival else math.nan,
        2 * row["macs"] / (us * 1e3) / peak if peak and "macs" in row else math.nan,
        row["traffic"] / (us * 1e3) / limit["copy_gbs"] if limit.get("copy_gbs") and "traffic" in row else math.nan,
        traffic / (us * 1e3) / speed if (speed := _copy_speed(traffic, limit)) else 0.0,
    )


def _copy_speed(traffic: int, limit: dict[str, float]) -> float:
    """GB/s of a copy where so many bytes lie, as probed; 0 where that is no limit or not known."""
    if traffic > limit.get("cache_bytes", 0):
        return limit.get("copy_gbs", 0.0)
    return limit.get("cache_copy_gbs", 0.0) if traffic > limit.get("own_cache_bytes", 0) else 0.0


def entries(result: dict, kind: str) -> list[Entry]:
    """The judged rows of a kind that have both an effops timing and a rival's."""
    limits = peaks(result)
    judged = (_entry(row, limits) for row in result["rows"] if row["kind"] == kind)
    return [entry for entry in judged if entry and entry.rival]


def pointwise_entries(result: dict) -> list[Entry]:
    """The rows that are nearly all pointwise; they have no rival, only a share of the peak."""
    limits = peaks(result)
    judged = (_entry(row, limits) for row in result["rows"] if row["kind"] == "pointwise")
    return [entry for entry in judged if entry]


def exempt(row: dict) -> bool:
    """7x7 maps at batch 1: packing the weights dominates there."""
    return row["batch"] == 1 and row["out_size"] <= 7


def bf16_entries(result: dict) -> list[Entry]:
    """bf16 rows whose rival is effops' own fp32 on the same shape."""
    limits, fp32 = peaks(result), {}
    for row in result["rows"]:
        if row["dtype"] == "float32":
            fp32[row["case"], row["batch"], row["threads"]] = best(row, own=True)
    found = []
    for row in result["rows"]:
        own_fp32 = fp32.get((row["case"], row["batch"], row["threads"]))
        if row["dtype"] == "bfloat16" and own_fp32:
            entry = _entry(row, limits, (own_fp32[0], own_fp32[1]))
            found += [entry] if entry else []
    return found


def same_format_losses(rows: Iterable[dict]) -> list[str]:
    """Shapes where effops is slower than eager in the very same memory format, as a user of that format sees it."""
    lost = []
    for row in rows:
        for variant in ("nchw", "channels_last"):
            own, eager = row["sides"].get(f"effops/{variant}", {}), row["sides"].get(f"eager/{variant}", {})
            if "median_us" in own and "median_us" in eager and own["median_us"] > eager["median_us"]:
                lost.append(f"{row['case']} b{row['batch']} t{row['threads']} {variant}")
    return lost


# ---- tables ----


def provenance(result: dict) -> str:
    """One line that says where the figures come from."""
    m, v = result["machine"], result["versions"]
    limits = "; ".join(
        f"{t} thread{'s' if t > 1 else ''}: {p['fp32_gflops']:.0f} GFLOP/s fp32"
        + (f", {p['bf16_gflops']:.0f} bf16" if p["bf16_gflops"] else "")
        + f", copy {p['copy_gbs']:.0f} GB/s"
        + (f" (in the last cache {p['cache_copy_gbs']:.0f})" if p["cache_copy_gbs"] else "")
        for t, p in sorted(peaks(result).items())
    )
    dirty = " (tree changed since)" if v["dirty"] else ""
    return (
        f"{m['cpu']}, {m['cores']} cores ({', '.join(m['isa'])}); "
        f"torch {v['torch']}, Python {v['python']}, {v['compiler']}; "
        f"effops {v['effops']} at `{v['commit'][:10]}`{dirty}; {result['date'][:10]}. Measured limits: {limits}."
    )


def _errors(result: dict) -> str:
    failed = [
        f"{row['kind']} {row['case']} b{row['batch']} t{row['threads']} {row['dtype']} {name}: {side['error']}"
        for row in result["rows"]
        for name, side in row.get("sides", {}).items()
        if "error" in side
    ]
    return "".join(f"\nNot measured: {escape(failure)}\n" for failure in failed)


def _pair_table(judged: list[Entry], goal: float | None, rival: str = "best rival") -> str:
    header = [
        "shape",
        "batch",
        "threads",
        "effops ms (p20-p80)",
        f"{rival} ms",
        rival,
        "ratio",
        "ratio at the limits",
        "of FMA peak",
        "of copy bandwidth",
    ]
    rows = []
    for e in judged:
        side = e.row["sides"][e.own]
        spread = f"{ms(e.own_us)} ({ms(side['p20_us'])}-{ms(side['p80_us'])})"
        backend = "" if side.get("backend", "cpp") == "cpp" else f" by {side['backend']}"
        ratio = times(e.ratio) if e.ratio >= 1 else f"**{times(e.ratio)}**"
        cells = [
            e.row["case"],
            str(e.row["batch"]),
            str(e.row["threads"]),
            spread + backend,
            ms(e.rival_us),
            _SIDES.get(e.rival, e.rival),
            ratio,
            times(e.limit),
            percent(e.share),
            percent(e.bandwidth),
        ]
        rows.append(cells + ([yes(e.met(goal))] if goal else []))
    return table(header + ([f"{goal}x or the roof"] if goal else []), rows)


def _summary_table(judged: list[Entry], goal: float) -> str:
    rows = []
    groups: dict[tuple, list[Entry]] = {}
    for e in judged:
        groups.setdefault((e.row["case"].split("-")[0], e.row["batch"], e.row["threads"]), []).append(e)
    for (family, batch, threads), group in groups.items():
        rows.append([family, str(batch), str(threads), *_summary_cells(group, goal)])
    rows.append(["**all**", "", "", *_summary_cells(judged, goal)])
    header = [
        "family",
        "batch",
        "threads",
        "shapes",
        "geometric mean",
        "range",
        f"mean of min(ratio/{goal}, 1)",
        "met",
        "below 1.0x",
    ]
    return table(header, rows)


def _summary_cells(group: list[Entry], goal: float) -> list[str]:
    ratios = [e.ratio for e in group]
    return [
        str(len(group)),
        times(geomean(ratios)),
        f"{min(ratios):.2f}-{max(ratios):.2f}",
        f"{geomean(e.term(goal) for e in group):.3f}",
        f"{sum(e.met(goal) for e in group)}/{len(group)}",
        str(sum(ratio < 1 for ratio in ratios)),
    ]


def _of_suite(results: list[dict], suite: str) -> list[dict]:
    return [result for result in results if result["suite"] == suite]


def _missing(suite: str) -> str:
    return f"_Not measured yet: `python benchmarks/run.py {suite}`._"


def _section(suite: str, body: Callable[[dict], str]) -> Callable[[list[dict]], str]:
    """A block made of one part for each machine that has a result of the suite."""

    def block(results: list[dict]) -> str:
        found = _of_suite(results, suite)
        return "\n\n".join(f"{body(r)}\n\n{provenance(r)}{_errors(r)}" for r in found) if found else _missing(suite)

    return block


def _dsconv_summary(result: dict) -> str:
    judged = entries(result, "pair")
    lost = same_format_losses(row for row in result["rows"] if row["kind"] == "pair")
    text = _summary_table(judged, DSCONV_GOAL)
    text += "\n\nSlower than eager in the same memory format: " + (", ".join(lost) if lost else "nowhere") + "."
    return f"![ratio to the best rival, shape by shape]({IMAGES}/{image_name(result)})\n\n{text}"


def _dsconv_table(result: dict) -> str:
    return _pair_table(entries(result, "pair"), DSCONV_GOAL)


def _multiception_table(result: dict) -> str:
    return _pair_table(entries(result, "multiception"), MULTICEPTION_GOAL)


def _pointwise_table(result: dict) -> str:
    rows = [
        [
            e.row["case"],
            str(e.row["batch"]),
            str(e.row["threads"]),
            ms(e.own_us),
            percent(e.share),
            "exempt" if exempt(e.row) else yes(e.share >= POINTWISE_GOAL),
        ]
        for e in pointwise_entries(result)
    ]
    return table(
        ["pointwise part of", "batch", "threads", "ms", "of FMA peak", f">= {100 * POINTWISE_GOAL:.0f} %"], rows
    )


def _bf16_table(result: dict) -> str:
    judged = bf16_entries(result)
    return _summary_table(judged, BF16_GOAL) + "\n\n" + _pair_table(judged, BF16_GOAL, "own fp32")


def _dwconv_table(result: dict) -> str:
    judged = entries(result, "dw")
    return _pair_table(judged, None) + f"\n\nGeometric mean: {times(geomean(e.ratio for e in judged))}."


def _layer_table(goal: float) -> Callable[[dict], str]:
    return lambda result: _summary_table(judged := entries(result, "layer"), goal) + "\n\n" + _pair_table(judged, goal)


def _bsconv_table(result: dict) -> str:
    judged = entries(result, "bs")
    text = _pair_table(judged, BSCONV_GOAL)
    text += f"\n\nGeometric mean: {times(geomean(e.ratio for e in judged))}; "
    text += f"of min(ratio/goal, 1): {geomean(e.term(BSCONV_GOAL) for e in judged):.3f}."
    return text


def _models_table(result: dict) -> str:
    names = [name for name in _SIDES if any(name in row["sides"] for row in result["rows"])]
    rows = []
    for row in result["rows"]:
        cells = [
            ms(row["sides"][name]["median_us"]) if "median_us" in row["sides"].get(name, {}) else "-" for name in names
        ]
        e = _entry(row, peaks(result))
        judged = [times(e.ratio), percent(e.share)] if e else ["-", "-"]
        rows.append([row["case"], str(row["batch"]), str(row["threads"]), *cells, *judged])
    return table(
        ["model", "batch", "threads", *(f"{_SIDES[n]} ms" for n in names), "ratio to the best", "of FMA peak"], rows
    )


def _latencies_summary(result: dict) -> str:
    ratios = {row["case"]: ratio for row in result["rows"] if (ratio := channels_last_ratio(row))}
    slower = [f"`{name}` {times(ratio)}" for name, ratio in sorted(ratios.items(), key=lambda i: i[1]) if ratio < 1]
    return (
        f"{len(ratios)} networks, eager against eager in channels_last, batch 1, one thread: geometric mean "
        f"{times(geomean(ratios.values()))}, {times(min(ratios.values()))} to {times(max(ratios.values()))}. Slower "
        f"than stock PyTorch: {', '.join(slower) or 'none'}. Each: [docs/models.md](../docs/models.md)."
    )


def _training_pairs(result: dict, kind: str) -> list[tuple[dict, tuple[str, dict], dict, dict | None]]:
    """(row, best effops side, eager channels_last, best eager side) where both exist."""
    pairs = []
    for row in (row for row in result["rows"] if row["kind"] == kind):
        own, eager = best(row, own=True), row["sides"].get("eager/channels_last", {})
        if own and "median_us" in eager:
            pairs.append((row, own, eager, best(row, own=False)[1]))
    return pairs


def _training_table(kind: str, what: str) -> Callable[[dict], str]:
    return lambda result: _training_rows(_training_pairs(result, kind), what)


def _training_rows(pairs: list[tuple[dict, tuple[str, dict], dict, dict | None]], what: str) -> str:
    rows, with_peaks = [], _have_peaks(pairs)
    for row, (_, own), eager, any_eager in pairs:
        saved = 1 - own["saved_bytes"] / eager["saved_bytes"]
        rows.append(
            [
                row["case"],
                str(row["batch"]),
                str(row["threads"]),
                ms(own["median_us"]),
                ms(eager["median_us"]),
                times(eager["median_us"] / own["median_us"]),
                times(any_eager["median_us"] / own["median_us"]),
                f"{own['saved_bytes'] / 1e6:.2f}",
                f"{eager['saved_bytes'] / 1e6:.2f}",
                percent(saved),
                *([f"{side['peak_bytes'] / 1e6:.1f}" for side in (own, eager)] if with_peaks else []),
            ]
        )
    header = [
        what,
        "batch",
        "threads",
        "effops ms",
        "eager channels_last ms",
        "ratio",
        "ratio to the best eager",
    ]
    header += ["saved by effops, MB", "saved by eager, MB", "fewer bytes"]
    return table(header + (["peak of effops, MB", "peak of eager, MB"] if with_peaks else []), rows)


def _have_peaks(pairs: list[tuple[dict, tuple[str, dict], dict, dict | None]]) -> bool:
    """Whether the peak memory was measured."""
    return all("peak_bytes" in side for _, (_, own), eager, _ in pairs for side in (own, eager))


def _overhead_table(result: dict) -> str:
    columns = {
        "overhead_forward_us": "overhead, forward",
        "overhead_forward_backward_us": "overhead, forward + backward",
        "forward_us": "call, forward",
        "forward_backward_us": "call, forward + backward",
        "auto_forward_us": "through auto, forward",
        "auto_forward_backward_us": "through auto, forward + backward",
        "stock_forward_us": "stock torch, forward",
        "stock_forward_backward_us": "stock torch, forward + backward",
    }
    rows = [[f"`EF.{row['operator']}`", *(f"{row[key]:.1f}" for key in columns)] for row in result["rows"]]
    return table(["microseconds", *columns.values()], rows)


# ---- targets ----


def _targets(results: list[dict]) -> str:
    rows = []
    for result in results:
        make = _TARGETS.get(result["suite"])
        rows += make(result) if make else []
    measured = {result["suite"] for result in results}
    rows += [[f"{suite}", "not measured yet", ""] for suite in _TARGETS if suite not in measured]
    return table(["target", "measured", "met"], rows)


def _dsconv_targets(result: dict) -> list[list[str]]:
    judged = entries(result, "pair")
    pointwise = [e for e in pointwise_entries(result) if not exempt(e.row)]
    if not judged:
        return []
    capped, below = geomean(e.term(DSCONV_GOAL) for e in judged), sum(e.ratio < 1 for e in judged)
    rows = [
        [
            f"`ds_conv2d` against the best rival: {DSCONV_GOAL}x, geometric mean of min(ratio/goal, 1) = 1",
            f"{capped:.3f} (plain geometric mean {times(geomean(e.ratio for e in judged))}, by occurrence "
            f"{times(geomean(e.ratio for e in judged for _ in range(e.row['count'])))}, "
            f"{sum(e.met(DSCONV_GOAL) for e in judged)} of {len(judged)} met)",
            yes(round(capped, 2) >= 1),
        ],
        ["no shape below 1.0x through `auto`", f"{below} of {len(judged)} below", yes(below == 0)],
    ]
    if pointwise:
        least, good = min(e.share for e in pointwise), sum(e.share >= POINTWISE_GOAL for e in pointwise)
        rows.append(
            [
                f"pointwise part at {100 * POINTWISE_GOAL:.0f} % of the FMA peak",
                f"{good} of {len(pointwise)} shapes, least {percent(least)}",
                yes(good == len(pointwise)),
            ]
        )
    return rows


def _bf16_targets(result: dict) -> list[list[str]]:
    judged = bf16_entries(result)
    if not judged:
        return []
    capped = geomean(e.term(BF16_GOAL) for e in judged)
    measured = f"{capped:.3f} of the goal (plain geometric mean {times(geomean(e.ratio for e in judged))})"
    return [[f"bf16 against our own fp32: {BF16_GOAL}x", measured, yes(round(capped, 2) >= 1)]]


def _training_targets(result: dict) -> list[list[str]]:
    return [*_half_identity_targets(result), *_module_training_targets(result)]


def _module_training_targets(result: dict) -> list[list[str]]:
    pairs = _training_pairs(result, "module-training")
    if not pairs:
        return []
    ratios = [eager["median_us"] / own["median_us"] for _, (_, own), eager, _ in pairs]
    met = sum(ratio >= MODULE_TRAINING_GOAL for ratio in ratios)
    fewer = sum(own["saved_bytes"] < eager["saved_bytes"] for _, (_, own), eager, _ in pairs)
    capped = geomean(min(ratio / MODULE_TRAINING_GOAL, 1) for ratio in ratios)
    less = sum(own["peak_bytes"] < eager["peak_bytes"] for _, (_, own), eager, _ in pairs) if _have_peaks(pairs) else 0
    peaks = ["modules: less peak memory", f"{less} of {len(pairs)}", yes(less == len(pairs))]
    return [
        [
            f"modules forward + backward against eager channels_last: {MODULE_TRAINING_GOAL}x each",
            f"{met} of {len(ratios)}, {capped:.3f} of the goal (plain geometric mean {times(geomean(ratios))}, "
            f"least {times(min(ratios))})",
            yes(met == len(ratios)),
        ],
        ["modules: fewer bytes saved for backward", f"{fewer} of {len(pairs)}", yes(fewer == len(pairs))],
        *([peaks] if _have_peaks(pairs) else []),
    ]


def _half_identity_targets(result: dict) -> list[list[str]]:
    pairs = _training_pairs(result, "training")
    if not pairs:
        return []
    ratios = [eager["median_us"] / own["median_us"] for _, (_, own), eager, _ in pairs]
    saved = [1 - own["saved_bytes"] / eager["saved_bytes"] for _, (_, own), eager, _ in pairs]
    capped = geomean(min(ratio / TRAINING_GOAL, 1) for ratio in ratios)
    return [
        [
            f"half-identity block forward + backward against eager channels_last: {TRAINING_GOAL}x",
            f"{capped:.3f} of the goal (plain geometric mean {times(geomean(ratios))}, least {times(min(ratios))})",
            yes(round(capped, 2) >= 1),
        ],
        [
            f"chain of four blocks: {100 * SAVED_GOAL:.0f} % fewer bytes saved for backward",
            f"least {percent(min(saved))}",
            yes(min(saved) >= SAVED_GOAL),
        ],
    ]


def channels_last_ratio(row: dict) -> float | None:
    """Eager's time over effops', both in channels_last."""
    own, eager = (row["sides"].get(f"{peer}/channels_last", {}) for peer in ("effops", "eager"))
    return eager["median_us"] / own["median_us"] if "median_us" in own and "median_us" in eager else None


def _models_targets(result: dict) -> list[list[str]]:
    found = {
        f"{row['case']} batch {row['batch']} {row['threads']} thread{'s' if row['threads'] > 1 else ''}": ratio
        for row in result["rows"]
        if row["case"] in _NETWORKS and (ratio := channels_last_ratio(row))
    }
    if not found:
        return []
    least = min(found, key=found.get)
    met = sum(ratio >= NETWORK_GOAL for ratio in found.values())
    return [
        [
            f"networks of the papers against eager channels_last: {NETWORK_GOAL}x each",
            f"{met} of {len(found)} (geometric mean {times(geomean(found.values()))}, least {times(found[least])}: "
            f"{least})",
            yes(met == len(found)),
        ]
    ]


def _overhead_targets(result: dict) -> list[list[str]]:
    rows = []
    for key, goal in OVERHEAD_GOALS_US.items():
        word = "no-grad forward" if key == "overhead_forward_us" else "forward + backward"
        worst = max(row[key] for row in result["rows"])
        rows.append([f"host overhead, {word}: <= {goal:.0f} us", f"{worst:.1f} us", yes(worst <= goal)])
    return rows


def _ratio_targets(
    kind: str, what: str, goal: float, cases: tuple[str, ...] = ("",)
) -> Callable[[dict], list[list[str]]]:
    """One row: the goal of the shapes of a kind, those whose names start with one of `cases`."""

    def rows(result: dict) -> list[list[str]]:
        judged = [e for e in entries(result, kind) if e.row["case"].startswith(cases)]
        if not judged:
            return []
        capped = geomean(e.term(goal) for e in judged)
        return [
            [
                f"{what} against the best rival: {goal}x, or the roof",
                f"{capped:.3f} of the goal (plain geometric mean {times(geomean(e.ratio for e in judged))}, "
                f"{sum(e.met(goal) for e in judged)} of {len(judged)} met{_beyond_the_limits(judged, goal)})",
                yes(round(capped, 2) >= 1),
            ]
        ]

    return rows


def _beyond_the_limits(judged: list[Entry], goal: float) -> str:
    count = sum(not e.met(goal) and e.limit < goal for e in judged)
    return f", {count} beyond the machine's limits" if count else ""


def _all_passed(entry: dict) -> bool:
    """Whether this is a finished run of the whole suite's GPU tests, and none failed."""
    whole = entry.get("stage") == "tests" and entry.get("path") == "tests" and not entry.get("incomplete")
    return whole and entry.get("passed", 0) > 0 and entry.get("failed") == 0


def _operators(results: list[dict]) -> str:
    header, *rows = operators.rows()
    gpus = [
        result["machine"]["gpu"] for result in _of_suite(results, "gpu") if any(map(_all_passed, result["entries"]))
    ]
    return f"{table(header, rows)}\n\n{operators.legend(gpus)}"


_TARGETS = {
    "dsconv": _dsconv_targets,
    "dwconv": _ratio_targets("dw", "shared and fixed depthwise, blur pools", BANKED_GOAL, _BANKED),
    "mbconv": _ratio_targets("pair", "inverted residuals of MobileNetV2", DSCONV_GOAL),
    "multiception": _ratio_targets("multiception", "Multiception blocks", MULTICEPTION_GOAL),
    "sepconv": _ratio_targets("layer", "EffNet's separable convolutions and blocks", SEPCONV_GOAL),
    "bsconv": _ratio_targets("bs", "blueprint convolutions", BSCONV_GOAL),
    "blurmaxpool": _ratio_targets("layer", "blurred max pools", BLUR_GOAL),
    "bf16": _bf16_targets,
    "models": _models_targets,
    "training": _training_targets,
    "overhead": _overhead_targets,
}

BLOCKS: dict[str, Callable[[list[dict]], str]] = {
    "targets": _targets,
    "dsconv-summary": _section("dsconv", _dsconv_summary),
    "dsconv": _section("dsconv", _dsconv_table),
    "mbconv": _section("mbconv", _dsconv_table),
    "pointwise": _section("dsconv", _pointwise_table),
    "bf16": _section("bf16", _bf16_table),
    "dwconv": _section("dwconv", _dwconv_table),
    "sepconv": _section("sepconv", _layer_table(SEPCONV_GOAL)),
    "blurmaxpool": _section("blurmaxpool", _layer_table(BLUR_GOAL)),
    "bsconv": _section("bsconv", _bsconv_table),
    "multiception": _section("multiception", _multiception_table),
    "models": _section("models", _models_table),
    "latencies": _section("latencies", _latencies_summary),
    "training": _section("training", _training_table("training", "half-identity block")),
    "module-training": _section("training", _training_table("module-training", "module")),
    "overhead": _section("overhead", _overhead_table),
    "gpu": lambda results: report_gpu.block(_of_suite(results, "gpu")),
    "operators": _operators,
}


# ---- plots ----


def image_name(result: dict) -> str:
    slug = re.sub(r"[^a-z0-9]+", "-", result["machine"]["cpu"].lower()).strip("-")
    return f"bench-{result['suite']}-{slug}.svg"


def ratio_plot(result: dict) -> str:
    """SVG with a panel for each batch and thread count: one bar a shape, lines at 1.0x and at the goal."""
    judged = entries(result, "pair")
    panels: dict[tuple[int, int], list[Entry]] = {}
    for e in judged:
        panels.setdefault((e.row["batch"], e.row["threads"]), []).append(e)
    label, width, bar, gap, top = 170, 330, 13, 4, 46
    rows = max((len(group) for group in panels.values()), default=0)
    height = top + rows * (bar + gap) + 24
    limit = max([2.0, *(e.ratio for e in judged)]) * 1.08
    parts = []
    for i, ((batch, threads), group) in enumerate(sorted(panels.items())):
        left = i % 2 * (label + width + 30)
        base = i // 2 * height
        parts.append(
            _text(
                left + label, base + 20, f"batch {batch}, {threads} thread{'s' if threads > 1 else ''}", weight="bold"
            )
        )
        for goal, colour in ((1.0, "#555555"), (DSCONV_GOAL, "#2a7f3f")):
            x = left + label + goal / limit * width
            end = base + top + len(group) * (bar + gap)
            ends = f'x1="{x:.1f}" y1="{base + top - 8}" x2="{x:.1f}" y2="{end}"'
            parts.append(f'<line {ends} stroke="{colour}" stroke-dasharray="3 3"/>')
            parts.append(_text(x, base + top - 12, f"{goal}x", anchor="middle", fill=colour))
        for k, e in enumerate(group):
            y = base + top + k * (bar + gap)
            colour = "#b0413e" if e.ratio < 1 else "#4c72b0" if e.met(DSCONV_GOAL) else "#9fb4d6"
            length = e.ratio / limit * width
            parts.append(_text(left + label - 6, y + bar - 3, e.row["case"], anchor="end"))
            parts.append(f'<rect x="{left + label}" y="{y}" width="{length:.1f}" height="{bar}" fill="{colour}"/>')
            parts.append(_text(left + label + length + 4, y + bar - 3, f"{e.ratio:.2f}"))
    columns, lines = min(2, len(panels)) or 1, -(-len(panels) // 2) or 1
    total_width, total_height = columns * (label + width + 30) + 20, lines * height + 26
    parts.append(
        _text(
            10,
            total_height - 10,
            "best rival's time / effops' time; dark: goal or roof reached, light: not, red: slower",
        )
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {total_width} {total_height}" width="{total_width}" '
        f'height="{total_height}" font-family="sans-serif" font-size="11">\n'
        + '<rect width="100%" height="100%" fill="white"/>\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )


def _text(x: float, y: float, text: str, anchor: str = "start", fill: str = "#222222", weight: str = "normal") -> str:
    style = f'text-anchor="{anchor}" fill="{fill}" font-weight="{weight}"'
    return f'<text x="{x:.1f}" y="{y:.1f}" {style}>{escape(text)}</text>'


# ---- writing ----

_MARKER = re.compile(r"<!-- bench:(begin|end) ([\w-]+) -->")


def render(text: str, results: list[dict], images: str = IMAGES, name: str = "document") -> str:
    """`text` with the inside of every marked block replaced; `images` is the images' path as the document sees it."""
    out, position, opened = [], 0, None
    for marker in _MARKER.finditer(text):
        what, block = marker.groups()
        if what == "begin":
            if opened:
                raise ReportError(f"{name}: block {opened!r} has no end before block {block!r} begins")
            if block not in BLOCKS:
                raise ReportError(f"{name}: unknown block {block!r}; there are {', '.join(BLOCKS)}")
            out.append(text[position : marker.end()])
            out.append("\n" + BLOCKS[block](results).replace(f"({IMAGES}/", f"({images}/") + "\n")
            opened = block
        else:
            if opened != block:
                raise ReportError(f"{name}: end of block {block!r} without its begin")
            opened = None
        position = marker.start() if what == "end" else marker.end()
    if opened:
        raise ReportError(f"{name}: block {opened!r} has no end")
    return "".join(out) + text[position:]


def outputs(root: Path) -> dict[Path, str]:
    """Every file this writes, with its content."""
    results = load(root / "benchmarks" / "results")
    wanted: dict[Path, str] = {}
    for document in DOCUMENTS:
        path = root / document
        if path.exists():
            up = "../" * document.count("/")
            wanted[path] = render(path.read_text(encoding="utf-8"), results, up + IMAGES, document)
    for result in _of_suite(results, "dsconv"):
        wanted[root / IMAGES / image_name(result)] = ratio_plot(result)
    wanted[root / gpu_choice.PATH] = gpu_choice.content(_of_suite(results, "gpu"))
    return wanted


def describe(result: dict) -> list[str]:
    """What run.py prints at the end: the targets this result speaks about, then its table."""
    targets = _TARGETS.get(result["suite"], lambda _: [])(result)
    lines = [f"{target}: {measured} [{met.strip('*')}]" for target, measured, met in targets]
    shares = [e.share for row in result["rows"] if "sides" in row and (e := _entry(row, peaks(result)))]
    if any(share > 1.02 for share in shares):
        lines.insert(
            0, "VOID: more than the measured FMA peak was reached, so the probe was disturbed: machine not quiet"
        )
    return [*lines, *(BLOCKS[result["suite"]]([result]).splitlines())]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 where a file would change")
    parser.add_argument("--root", type=Path, default=ROOT, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    try:
        wanted = outputs(args.root)
    except ReportError as error:
        print(error, file=sys.stderr)
        return 2
    stale = []
    for path, content in wanted.items():
        present = path.read_text(encoding="utf-8") if path.exists() else ""
        if present == content:
            continue
        stale.append(path.relative_to(args.root))
        if args.check:
            diff = difflib.unified_diff(
                present.splitlines(), content.splitlines(), "present", "from results", lineterm="", n=0
            )
            print("\n".join([f"{stale[-1]} is not what the results say:", *list(diff)[:12]]), file=sys.stderr)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content, encoding="utf-8")
            print(f"wrote {stale[-1]}")
    if args.check and stale:
        print(f"run: {COMMAND}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
