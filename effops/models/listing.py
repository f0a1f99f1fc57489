"""`effops list`: the names of the registry, and with --counts what the networks cost and what is printed about them."""

from __future__ import annotations

import argparse
import difflib
import json
import sys
from collections.abc import Iterable, Iterator
from typing import Any

from effops.models import list_models
from effops.models.published import Arguments, Comparison, compare, counts, figures, input_size

__all__ = ["add_arguments", "main", "record", "words_of"]

_HEAD = ("input", "parameters", "MACs", "published", "counted", "verdict", "table")
# Of all columns but the first and the last; text to the left, numbers to the right.
_CELLS = ("<9", ">10", ">14", "<18", ">14", "<17")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument("pattern", nargs="?", default="*", help="of the names, as of a shell's files: 'vgnetg_*'")
    parser.add_argument(
        "--counts",
        action="store_true",
        help="parameters, multiply-accumulates at the model's own input size, and the figures of its paper against "
        "what counting gives (all models: most of a minute)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")


def main(args: argparse.Namespace) -> int:
    """Prints the models; 2 where the pattern matches none (one sentence on stderr)."""
    names = list_models(args.pattern)
    if not names:
        print(f"effops list: no model matches {args.pattern!r}; {_hint(args.pattern)}", file=sys.stderr)
        return 2
    if args.json:
        print(json.dumps([record(name) for name in names] if args.counts else names, indent=2))
    else:
        for line in _table(names) if args.counts else names:
            print(line, flush=True)  # counting takes a while: each model as it is done
    return 0


def _hint(pattern: str) -> str:
    within = list_models(f"*{pattern}*")
    if within:
        return f"'*{pattern}*' matches {len(within)}: {', '.join(within[:5])}{', ...' if len(within) > 5 else ''}"
    close = difflib.get_close_matches(pattern.lower().replace("*", ""), list_models(), n=5, cutoff=0.5)
    return f"close names: {', '.join(close)}" if close else "`effops list` shows all names"


def words_of(arguments: Arguments) -> str:
    """A model's arguments as they are written in Python."""
    return ", ".join(f"{key}={value!r}" for key, value in arguments.items())


def record(name: str) -> dict[str, Any]:
    """What --json shows of a model."""
    size, count = input_size(name), counts(name)
    return {
        "name": name,
        "input": list(size),
        "parameters": count.parameters,
        "macs": count.macs,
        "flops_by_its_paper": count.flops,
        "published": [_figure_record(compare(figure)) for figure in figures(name)],
    }


def _figure_record(comparison: Comparison) -> dict[str, Any]:
    figure, own, reading = comparison
    found: dict[str, Any] = {
        "table": figure.source,
        "quantity": figure.quantity,
        "printed": figure.printed,
        "arguments": dict(figure.arguments),
        "counted": own.counted,
        "verdict": own.verdict,
    }
    if reading is not None:
        found["as_the_table_counts"] = {
            "what": figure.reading.words,
            "counted": reading.counted,
            "verdict": reading.verdict,
        }
    return found | ({"reason": figure.reason} if figure.reason else {})


def _table(names: list[str]) -> Iterator[str]:
    width = max(map(len, names))
    yield _line(width, "model", _HEAD)
    for name in names:
        yield from _lines_of(name, width)


def _line(width: int, name: str, cells: Iterable[str]) -> str:
    *fixed, last = cells
    middle = "  ".join(f"{cell:{form}}" for cell, form in zip(fixed, _CELLS, strict=True))
    return f"{name:<{width}}  {middle}  {last}".rstrip()


def _lines_of(name: str, width: int) -> Iterator[str]:
    """The model's own line; a line for each figure, the first in the same; what is known about the differences."""
    count = counts(name)
    start = ("x".join(map(str, input_size(name)[1:])), f"{count.parameters:,}", f"{count.macs:,}")
    comparisons = [compare(figure) for figure in figures(name)]
    rows = [row for comparison in comparisons for row in _figure_rows(comparison)] or [("-", "", "", "")]
    for index, row in enumerate(rows):
        yield _line(width, "" if index else name, (*(("", "", "") if index else start), *row))
    for reason in dict.fromkeys(comparison.figure.reason for comparison in comparisons):
        if reason:
            yield f"{'':<{width}}  * {reason}"


def _figure_rows(comparison: Comparison) -> Iterator[tuple[str, str, str, str]]:
    figure, own, reading = comparison
    table = f"{figure.source} ({words_of(figure.arguments)})" if figure.arguments else figure.source
    yield f"{figure.printed} {figure.quantity}", f"{own.counted:,.0f}", own.verdict, table
    if reading is not None:
        yield "", f"{reading.counted:,.0f}", reading.verdict, figure.reading.words
