"""docs/triton_kernels.md from the reports of triton_compile.py: `make kernels`."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Entry = tuple[str, str, str, str]  # kernel, config in words, dtype, layout

_HEAD = """\
# What the Triton kernels take of a GPU

Written by `make kernels`, not by hand. Every kernel, with every config its chooser can choose, was compiled ahead of
time with Triton {triton} for {archs}, on a machine without a GPU: **nothing in this table was run on one**, it
is what the compiler says. Each line stands for the launches of that kernel, config, dtype and memory format which the
problems of `tests/triton_problems.py` make, and shows the largest figure among them; *launches* is how many there are
where they are most. The limits, and what is held against them, are in `tests/triton_compile.py`.

* *registers* of a thread (255 at most) / *shared memory* of a program in KiB ({limits});
  *spill* bytes of a thread are shown where there are any.
* *bytes an access*: the widest load of global memory a thread makes.
* *products*: the tensor-core instructions, where the kernel has a matrix product; `FMA` is a product without them.

| kernel | config | dtype | memory format | launches | {columns} | bytes an access | products |
|---|---|---|---|---|{dashes}---|---|
"""


def table_entry(row: dict[str, Any]) -> Entry:
    """A report's row by what names a line of the table."""
    return row["kernel"], row["config"], row["dtype"], row["layout"]


def kernels_in_table(markdown: str) -> set[Entry]:
    """The lines of the table."""
    lines = re.findall(r"^\| `(.*?)` \| (.*?) \| (.*?) \| (.*?) \|", markdown, re.MULTILINE)
    return {(kernel, config, dtype, layout) for kernel, config, dtype, layout in lines}


def _taken(usages: list[dict[str, Any]]) -> str:
    """Registers / shared memory, and spills, of the launches of one line on one architecture."""
    if not usages:
        return "not launched"
    registers, shared, stack = (max(usage[name] for usage in usages) for name in ("registers", "shared", "stack"))
    return f"{registers} / {shared / 1024:.0f}" + (f", **spill {stack}**" if stack else "")


def _products(usages: list[dict[str, Any]]) -> str:
    if not any(usage["dots"] for usage in usages):
        return ""
    return ", ".join(sorted({kind for usage in usages for kind in usage["matrix"] or ["FMA"]}))


def _line(entry: Entry, by_arch: dict[int, list[dict[str, Any]]]) -> str:
    every = [usage for usages in by_arch.values() for usage in usages]
    widest = max((int(size) for usage in every for size in usage["loads"]), default=0)
    launches = max(len(usages) for usages in by_arch.values())
    taken = " | ".join(_taken(usages) for usages in by_arch.values())
    kernel, *rest = entry
    return f"| `{kernel}` | {' | '.join(rest)} | {launches} | {taken} | {widest} | {_products(every)} |"


def table(reports: Iterable[dict[str, Any]]) -> str:
    """The page.

    Raises:
        ValueError: reports of different Tritons, or a launch that was not compiled.
    """
    reports = sorted(reports, key=lambda report: report["arch"])
    versions = {report["triton"] for report in reports}
    if len(versions) != 1:
        raise ValueError(f"the reports must come from one Triton; got {', '.join(sorted(versions))}")
    archs = [report["arch"] for report in reports]
    lines: dict[Entry, dict[int, list[dict[str, Any]]]] = {}
    for report in reports:
        for row in report["rows"]:
            if row["usage"] is None:
                raise ValueError(f"{row['kernel']} [{row['config']}] was not compiled: leave out --at-most")
            lines.setdefault(table_entry(row), {arch: [] for arch in archs})[report["arch"]].append(row["usage"])
    names = [f"sm_{arch}" for arch in archs]
    head = _HEAD.format(
        triton=versions.pop(),
        archs=", ".join(names),
        limits=", ".join(f"{report['limits']['shared'] // 1024} at most on sm_{report['arch']}" for report in reports),
        columns=" | ".join(names),
        dashes="---|" * len(names),
    )
    return head + "".join(_line(entry, by_arch) + "\n" for entry, by_arch in sorted(lines.items()))


def main() -> None:
    *reports, page = map(Path, sys.argv[1:])
    page.write_text(table(json.loads(report.read_text()) for report in reports))


if __name__ == "__main__":
    main()
