"""Writes docs/models.md: what every model costs, what is printed about it, and the latencies of results/latencies.json.

python benchmarks/model_table.py            # rewrite it; about half a minute
python benchmarks/model_table.py --check    # exit status 1 unless it is what this would write
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import report  # noqa: E402 (this file is run as a program, too)
from benchmarks.tables import ms, table  # noqa: E402
from effops.models import list_models  # noqa: E402
from effops.models.listing import words_of  # noqa: E402
from effops.models.published import (  # noqa: E402
    PAPERS,
    Comparison,
    Paper,
    compare,
    counts,
    figures,
    input_size,
    paper_of,
)

DOCUMENT = "docs/models.md"
COMMAND = "python benchmarks/model_table.py"

_INTRODUCTION = f"""# The models

Written by `{COMMAND}`, not by hand; `effops list --counts` shows the same on a terminal. The first
table has every registered model with its default arguments at its own input size: learnable parameters,
multiply-accumulates (MACs) of convolutions and linear layers as `torch.utils.flop_counter` counts them, and FLOPs as
its paper counts them: each paper has a convention of its own (`effops/models/flops.py`).

*published* says how many of the numbers printed about a model come out when the network is counted as it runs and
rounded to the printed digits (two prints are cut off after them instead); *+n* are those that come out only as the
table counted, with a slip or with parameters that do nothing. The second part has them one by one, with what is known
where print and count differ.
"""


def content(results: list[dict]) -> str:
    """The whole document.

    Args:
        results: of `report.load`.
    """
    latencies = [result for result in results if result["suite"] == "latencies"]
    parts = [_INTRODUCTION, summary(list_models(), latencies), _sources(latencies), "## What is printed\n"]
    parts += [text for paper in PAPERS if (text := printed(paper))]
    return "\n".join(parts)


def summary(names: Iterable[str], latencies: list[dict]) -> str:
    """A line for each model.

    Args:
        names: of the models.
        latencies: results of the suite `latencies`; each gives a column.
    """
    times = [f"stock / effops ms, {result['machine']['cpu']}" for result in latencies]
    header = ["model", "paper", "input", "parameters", "MACs", "FLOPs", "published", *times]
    return table(header, [_summary_cells(name, latencies) for name in names], left=3)


def _summary_cells(name: str, latencies: list[dict]) -> list[str]:
    count = counts(name)
    return [
        f"`{name}`",
        paper_of(name).name,
        "x".join(map(str, input_size(name)[1:])),
        f"{count.parameters:,}",
        f"{count.macs:,}",
        "-" if count.flops is None else f"{count.flops:,.0f}",
        _share([compare(figure) for figure in figures(name)]),
        *(_latency(name, result) for result in latencies),
    ]


def _share(comparisons: list[Comparison]) -> str:
    if not comparisons:
        return "-"
    own = sum(comparison.own.agrees for comparison in comparisons)
    more = sum(comparison.best.agrees and not comparison.own.agrees for comparison in comparisons)
    return f"{own}{f' +{more}' if more else ''} of {len(comparisons)}"


def _latency(name: str, result: dict) -> str:
    """Batch 1, both sides in channels_last."""
    for row in result["rows"]:
        if row["case"] == name:
            sides = [row["sides"].get(f"{peer}/channels_last", {}) for peer in ("eager", "effops")]
            return " / ".join(ms(side["median_us"]) if "median_us" in side else "-" for side in sides)
    return "-"


def _sources(latencies: list[dict]) -> str:
    """Where the latencies are from."""
    if not latencies:
        return "\nNo latency has been measured.\n"
    where = "\n\n".join(map(report.provenance, latencies))
    return f"\nLatencies are medians of batch 1 in channels_last on one thread, eager.\n\n{where}\n"


def printed(paper: Paper) -> str:
    """The figures of a paper's models, one a line, and the reasons; empty where nothing is printed."""
    found = [compare(f) for name in list_models() if paper_of(name) is paper for f in figures(name)]
    if not found:
        return ""
    header = ["model", "arguments", "table", "printed", "counted", "verdict"]
    rows = table(header, [_figure_cells(comparison) for comparison in found], left=len(header))
    text = f"### {paper.name}\n\n*{paper.title}*\n\n{rows}\n"
    reasons: dict[str, list[str]] = {}
    for figure, *_ in found:
        reasons.setdefault(figure.reason, []).append(f"`{figure.model}`")
    notes = [f"* {', '.join(dict.fromkeys(models))}: {reason}.\n" for reason, models in reasons.items() if reason]
    return "\n".join([text, "".join(notes)]) if notes else text


def _figure_cells(comparison: Comparison) -> list[str]:
    """With a reading: the count and the verdict of it, too."""
    figure, own, reading = comparison
    judged = [own.verdict]
    counted = [f"{own.counted:,.0f}"]
    if reading is not None:
        counted.append(f"{reading.counted:,.0f}")
        judged.append(f"{figure.reading.words}: {reading.verdict}")
    arguments = f"`{words_of(figure.arguments)}`" if figure.arguments else "-"
    print_ = f"{figure.printed} {figure.quantity}"
    return [f"`{figure.model}`", arguments, figure.source, print_, "; ".join(counted), "; ".join(judged)]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 where the file would change")
    args = parser.parse_args(argv)
    path = ROOT / DOCUMENT
    wanted = content(report.load(ROOT / "benchmarks" / "results"))
    if path.exists() and path.read_text(encoding="utf-8") == wanted:
        return 0
    if args.check:
        print(f"{DOCUMENT} is not what counting and the results say; run: {COMMAND}", file=sys.stderr)
        return 1
    path.write_text(wanted, encoding="utf-8")
    print(f"wrote {DOCUMENT}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
