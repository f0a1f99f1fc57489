"""Cells and tables of the reports, in Markdown."""

from __future__ import annotations

import math
from collections.abc import Iterable


def geomean(values: Iterable[float]) -> float:
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs)) if logs else math.nan


def table(header: list[str], rows: list[list[str]], left: int = 1) -> str:
    """A table in Markdown; its first `left` columns are text and stand to the left, the others to the right."""
    rule = ["---" if i < left else "---:" for i in range(len(header))]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [header, rule, *rows])


def ms(us: float) -> str:
    return f"{us / 1e3:.3g}" if us < 1e5 else f"{us / 1e3:.0f}"


def percent(share: float) -> str:
    return "-" if math.isnan(share) else f"{100 * share:.0f} %"


def times(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.2f}x"


def yes(met: bool) -> str:
    return "yes" if met else "**no**"
