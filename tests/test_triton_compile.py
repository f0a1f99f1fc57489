"""The Triton kernels compile ahead of time for every architecture and stay within its limits; no GPU is needed.

The work is done by `triton_compile.py` in processes of their own: the interpreter, which the rest of the suite uses
where there is no GPU, is a property of a process, and so is the Triton it imports. Each is run with the environment's
Triton and, where EFFOPS_OTHER_TRITON names a folder that holds one (`make other-triton`), with that one too.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import triton_compile
from triton_table import kernels_in_table, table_entry

TESTS = Path(__file__).resolve().parent
TABLE = TESTS.parent / "docs" / "triton_kernels.md"
OTHER_TRITON = os.environ.get("EFFOPS_OTHER_TRITON", "")
EVERYTHING = os.environ.get("EFFOPS_COMPILE_ALL") == "1"
IN_CI = 150  # compilations of all runs together; with EFFOPS_COMPILE_ALL=1 there is no such limit
PROCESSES = 2
MINUTES = 8  # for one process in CI


@dataclass(frozen=True)
class Run:
    """One process: an architecture, a Triton, how many launches it compiles in CI and where it starts among them."""

    arch: int
    other: bool
    at_most: int
    part: str

    @property
    def name(self) -> str:
        return f"sm_{self.arch}-{'other' if self.other else 'own'}_triton"


# What another Triton breaks, it breaks in its front end, the same for every architecture: one of them is enough.
RUNS = [Run(80, False, 40, "0/3"), Run(90, False, 40, "1/3"), Run(100, False, 40, "2/3"), Run(90, True, 30, "0/1")]
assert sum(run.at_most for run in RUNS) <= IN_CI

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def _triton_is_there() -> None:
    if importlib.util.find_spec("triton") is None:
        if os.environ.get("EFFOPS_REQUIRE_TRITON") == "1":
            pytest.fail("EFFOPS_REQUIRE_TRITON=1, but triton is not installed", pytrace=False)
        pytest.skip("triton is not installed")


def environment(other: bool, **more: str) -> dict[str, str]:
    """Of a process that imports this checkout and the wanted Triton, and does not interpret unless `more` says so."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
    path = [OTHER_TRITON] * other + [str(TESTS.parent), os.environ.get("PYTHONPATH", "")]
    return kept | {"PYTHONPATH": os.pathsep.join(filter(None, path))} | more


def skip_without_other_triton(other: bool) -> None:
    if other and not OTHER_TRITON:
        pytest.skip("EFFOPS_OTHER_TRITON names no folder with another Triton (make other-triton)")


def run_check(folder: Path, other: bool, *arguments: str) -> tuple[subprocess.CompletedProcess[str], dict]:
    """Runs triton_compile.py with a cache of its own; what it said, and its report."""
    report = folder / "report.json"
    done = subprocess.run(
        [sys.executable, TESTS / "triton_compile.py", "--json", report, *arguments],
        env=environment(other, TRITON_CACHE_DIR=str(folder / "cache")),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=None if EVERYTHING else 60 * MINUTES,
    )
    assert report.is_file(), done.stderr
    return done, json.loads(report.read_text())


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[Run, Future[dict]]]:
    """The reports of all runs, which go on side by side."""

    def report_of(run: Run, folder: Path) -> dict:
        limit = [] if EVERYTHING else ["--at-most", str(run.at_most), "--part", run.part]
        _, report = run_check(folder, run.other, "--arch", str(run.arch), *limit)
        return report

    wanted = [run for run in RUNS if OTHER_TRITON or not run.other]
    # Made here, not in the threads: two that ask pytest for its first folder at once race to make the one above it.
    folders = {run: tmp_path_factory.mktemp(run.name) for run in wanted}
    with ThreadPoolExecutor(PROCESSES) as pool:
        yield {run: pool.submit(report_of, run, folders[run]) for run in wanted}


def own_rows(reports: dict[Run, Future[dict]]) -> list[dict]:
    """The rows of the environment's own Triton."""
    return [row for run, future in reports.items() if not run.other for row in future.result()["rows"]]


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.name)
def test_kernels_stay_within_the_limits(reports: dict[Run, Future[dict]], run: Run) -> None:
    skip_without_other_triton(run.other)
    report = reports[run].result()
    compiled = [row for row in report["rows"] if row["usage"] is not None]
    assert len(compiled) == (len(report["rows"]) if EVERYTHING else run.at_most)
    assert not report["complaints"], "\n" + "\n".join(report["complaints"])


def test_every_kernel_and_config_is_compiled(reports: dict[Run, Future[dict]]) -> None:
    """Every kernel in CI, every config of each with EFFOPS_COMPILE_ALL=1."""

    def name(row: dict) -> tuple[str, ...]:
        return (row["kernel"], row["config"]) if EVERYTHING else (row["kernel"],)

    rows = own_rows(reports)
    compiled = {name(row) for row in rows if row["usage"] is not None}
    assert compiled == {name(row) for row in rows}


def test_every_config_is_reached(reports: dict[Run, Future[dict]]) -> None:
    """A config that no problem reaches on any architecture is one that no compilation has seen."""
    unreached = [set(future.result()["unreached"]) for run, future in reports.items() if not run.other]
    assert not set.intersection(*unreached)


def test_table_lists_every_kernel_and_config(reports: dict[Run, Future[dict]]) -> None:
    """Neither more nor fewer: a changed config or kernel asks for `make kernels`."""
    if not TABLE.exists():
        pytest.skip("docs/triton_kernels.md has not been written yet: make kernels")
    launched = set(map(table_entry, own_rows(reports)))
    assert kernels_in_table(TABLE.read_text()) == launched


@pytest.mark.parametrize("other", [False, True], ids=["own_triton", "other_triton"])
def test_operators_interpreted(other: bool) -> None:
    skip_without_other_triton(other)
    done = subprocess.run(
        [sys.executable, TESTS / "triton_smoke.py"],
        env=environment(other, TRITON_INTERPRET="1"),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60 * MINUTES,
    )
    assert done.returncode == 0, done.stderr
    assert "calls agree with the oracle" in done.stdout


def test_other_triton_is_another(reports: dict[Run, Future[dict]]) -> None:
    """PYTHONPATH chose: else one Triton would have been checked twice."""
    skip_without_other_triton(True)
    versions = {run.other: future.result()["triton"] for run, future in reports.items()}
    assert versions[True] != versions[False]


# ---- the check can fail ---------------------------------------------------------------------------------------------


def test_faulty_kernels_are_complained_of(tmp_path: Path) -> None:
    done, report = run_check(tmp_path, False, "--arch", "90", "--problems", "triton_faulty")
    assert done.returncode == 1
    spilling, atomic = (
        [line for line in report["complaints"] if kernel in line] for kernel in ("_spilling", "_atomic")
    )
    assert len(spilling) == 1 and "spills: " in spilling[0]
    assert [line.split("): ")[-1].split(":")[0] for line in atomic[:2]] == [
        "1 atomic instructions",
        "no load of 16 bytes, which the maps' alignment allows",
    ]
    assert len(atomic) == 3 and atomic[2].endswith("not in its module's configs()")
    assert report["unreached"] == ["triton_faulty._atomic_kernel {'BLOCK_C': 999}"]


GOOD = triton_compile.Usage(
    registers=255, stack=0, local=0, shared=166912, tensor_memory=0, loads={"16": 3}, stores={"16": 1}, atomics=0,
    matrix=["mma.sync"], dots=["f16"],
)  # fmt: skip
ROW = triton_compile.Row(
    "dwconv._kernel", {"BLOCK_M": 64, "num_warps": 4, "num_stages": 2}, "float16", "channels_last", "a", 16, "", GOOD
)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({}, None),
        ({"stack": 8}, "spills: 8 bytes of stack a thread"),
        ({"local": 8}, "8 bytes of local memory a thread"),
        ({"registers": 256}, "256 registers, 255 exist"),
        ({"shared": 166913}, "166913 bytes of shared memory, a program can have 166912"),
        ({"tensor_memory": 1}, "1 columns of tensor memory, there are 0"),
        ({"atomics": 2}, "2 atomic instructions: results would differ from run to run"),
        ({"matrix": []}, "a product of half-precision tiles without tensor cores"),
        ({"matrix": [], "dots": ["f32"]}, None),
        ({"loads": {"8": 1, "2": 9}}, "no load of 16 bytes, which the maps' alignment allows"),
        ({"loads": {}}, None),
    ],
)
def test_limits(change: dict, fault: str | None) -> None:
    row = replace(ROW, usage=replace(GOOD, **change))
    assert list(triton_compile.faults(row, 80)) == ([fault] if fault else [])


def test_order_of_compiling() -> None:
    """Of several parts each its share of the pairs; one of every kernel, kernel and config, dtype, layout; the rest."""

    def row(kernel: str, warps: int, dtype: str, layout: str, signature: str) -> triton_compile.Row:
        return triton_compile.Row(kernel, {"num_warps": warps, "num_stages": 1}, dtype, layout, "", 1, signature)

    rows = [
        row("a", 4, "f", "n", "0"),
        row("a", 4, "f", "n", "1"),
        row("a", 4, "f", "c", "0"),
        row("a", 4, "h", "c", "0"),
        row("a", 8, "f", "n", "0"),
        row("b", 4, "f", "n", "0"),
    ]
    assert triton_compile.by_coverage(rows) == [0, 5, 4, 3, 2, 1]
    assert triton_compile.by_coverage(rows, 1, 2) == [5, 0, 4, 3, 2, 1]


# What cuobjdump and Triton write, and one change to each that must not be read as a zero.
RESOURCES = """
Resource usage:
 Common:
  GLOBAL:0
 Function _kernel:
  REG:42 STACK:8 SHARED:16 LOCAL:0 CONSTANT[0]:656 TEXTURE:0 SURFACE:0 SAMPLER:0
"""
PTX = """
	@%p1 ld.global.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd1 + 0 ];
	ld.global.nc.L1::evict_last.b16 %rs1, [ %rd2 ];
	cp.async.cg.shared.global [ %r5 + 0 ], [ %rd3 + 0 ], 0x10, %r6;
	@!%p2 st.global.v2.b64 [ %rd4 + 0 ], { %rd5, %rd6 };
	atom.global.gpu.acq_rel.add.f32 %r7, [ %rd7 + 0 ], %r8;
"""
TTIR = "%z = tt.dot %x, %w, %acc, inputPrecision = tf32 : tensor<64x32xf16> * tensor<32x64xf16> -> tensor<64x64xf32>"


def test_reading() -> None:
    figures = triton_compile.parse_resources(RESOURCES, "_kernel")
    assert {name: figures[name] for name in ("REG", "STACK", "SHARED", "LOCAL")} == {
        "REG": 42, "STACK": 8, "SHARED": 16, "LOCAL": 0,
    }  # fmt: skip
    assert triton_compile.parse_accesses(PTX) == ({"16": 2, "2": 1}, {"16": 1}, 1)
    assert triton_compile.parse_dots(TTIR) == ["f16"]
    assert triton_compile.parse_dots("") == []


@pytest.mark.parametrize(
    "text",
    [
        "",
        RESOURCES.replace("STACK", "STCK"),
        RESOURCES.replace("_kernel", "_another"),
        RESOURCES.replace("42", "0"),
        RESOURCES + RESOURCES.split("GLOBAL:0")[1],
    ],
    ids=["nothing", "no_stack", "another_function", "no_registers", "two_functions"],
)
def test_unreadable_resources_are_an_error(text: str) -> None:
    with pytest.raises(ValueError, match="_kernel"):
        triton_compile.parse_resources(text, "_kernel")


@pytest.mark.parametrize(
    "text", ["", PTX.replace("v4.b32", "v4.xx"), PTX.replace("0x10", "%r9"), PTX.replace("atom", "mad")]
)
def test_unreadable_accesses_are_an_error(text: str) -> None:
    with pytest.raises(ValueError, match="global memory"):
        triton_compile.parse_accesses(text)


def test_unreadable_products_are_an_error() -> None:
    with pytest.raises(ValueError, match="element type"):
        triton_compile.parse_dots(TTIR.replace("tensor", "vector"))
