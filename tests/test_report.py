"""benchmarks/report.py: judging rows, and documents made from results files and from nothing else."""

from __future__ import annotations

import copy
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import peak_memory, report, run  # noqa: E402 (the benchmarks are no part of the installed package)

DOCUMENT = "# Title\n\n<!-- bench:begin {0} -->\nold words\n<!-- bench:end {0} -->\n\nThe end.\n"


def side(median: float, **more) -> dict:
    return {"median_us": median, "p20_us": median * 0.9, "p80_us": median * 1.1, "medians_us": [median]} | more


def pair(case: str, threads: int, sides: dict, **more) -> dict:
    row = {
        "kind": "pair",
        "case": case,
        "batch": 1,
        "threads": threads,
        "dtype": "float32",
        "macs": 5_000_000,
        "traffic": 1_000_000,
        "count": 1,
        "out_size": 14,
    }
    return row | {"sides": sides} | more


def result(suite: str, rows: list[dict], date: str = "2030-01-02T03:04:05Z", cpu: str = "Test CPU (9)") -> dict:
    probe = {"fp32_gflops": 100.0, "bf16_gflops": 200.0, "copy_gbs": 20.0}
    return {
        "suite": suite,
        "date": date,
        "quick": False,
        "seconds": 1,
        "machine": {"cpu": cpu, "cores": 2, "caches": {}, "isa": ["avx2"], "system": "Linux"},
        "versions": {
            "effops": "0.1.0",
            "commit": "0123456789abcdef",
            "dirty": False,
            "torch": "2.13.0",
            "python": "3.12.0",
            "compiler": "g++ 12",
        },
        "env": {},
        "probes": [{"threads": 1} | probe, {"threads": 1} | probe | {"fp32_gflops": 90.0}, {"threads": 2} | probe],
        "rows": rows,
    }


def dsconv() -> dict:
    return result(
        "dsconv",
        [
            # Twice as fast as the best rival, which is Inductor; eager is slower still.
            pair(
                "net-a",
                1,
                {
                    "effops/nchw": side(250.0, backend="cpp"),
                    "effops/channels_last": side(200.0, backend="cpp"),
                    "eager/nchw": side(500.0),
                    "eager/channels_last": side(450.0),
                    "inductor/channels_last": side(400.0),
                },
            ),
            # Slower than eager channels_last: it must stay in the table.
            pair("net-b", 1, {"effops/channels_last": side(400.0), "eager/channels_last": side(300.0)}),
            # 1.1x only, but at 83 % of the peak on one thread: met by the roof.
            pair("net-c", 1, {"effops/nchw": side(120.0), "eager/nchw": side(132.0)}),
            # The same on two threads with a failed rival: the failure is told.
            pair(
                "net-c",
                2,
                {"effops/nchw": side(200.0), "eager/nchw": side(220.0), "inductor/nchw": {"error": "no <compiler>"}},
            ),
            pair("net-a", 1, {"effops/nchw": side(110.0)}, kind="pointwise"),
            pair("net-b", 1, {"effops/nchw": side(200.0)}, kind="pointwise", out_size=7),
        ],
    )


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    return tmp_path


def put(root: Path, name: str, content: dict) -> None:
    (root / "benchmarks" / "results" / f"{name}.json").write_text(json.dumps(content))


def test_entries_take_the_best_of_both_sides():
    entry = report.entries(dsconv(), "pair")[0]
    assert (entry.own, entry.rival) == ("effops/channels_last", "inductor/channels_last")
    assert entry.ratio == pytest.approx(2.0)
    assert entry.share == pytest.approx(2 * 5e6 / 200e-6 / 100e9)
    assert entry.bandwidth == pytest.approx(1e6 / 200e-6 / 20e9)
    assert entry.limit == pytest.approx(400e-6 / (1e7 / 100e9))  # the 10 MFLOP take longer than the bytes do


def test_targets_count_what_lies_beyond_the_machines_limits():
    """1.5x and 1.1x against a goal of 2: of these the second could not have it, as the bytes alone take too long."""

    def row(case: str, us: float, ratio: float) -> dict:
        sides = {"effops/nchw": side(us), "eager/nchw": side(us * ratio)}
        return pair(case, 1, sides, kind="dw", macs=1_000_000)

    rows = [row("blur3-a", 100.0, 1.5), row("fixed3-b", 60.0, 1.1), row("dw3-c", 60.0, 1.1)]
    text = report.BLOCKS["targets"]([result("dwconv", rows)])
    assert "0.642 of the goal (plain geometric mean 1.28x, 0 of 2 met, 1 beyond the machine's limits)" in text
    held = result("dwconv", rows)
    for caches, cache_copy, beyond in (
        ({"L2": "512K", "L3": "1024K"}, None, ""),  # the last cache holds the bytes; its speed is not known
        ({"L2": "512K", "L3": "1024K"}, 30.0, ", 1 beyond the machine's limits"),
        ({"L2": "512K", "L3": "1024K"}, 60.0, ""),
        ({"L2": "1024K", "L3": "2048K"}, 30.0, ""),  # the L2 holds them
    ):
        held["machine"]["caches"] = caches
        for probe in held["probes"]:
            probe |= {} if cache_copy is None else {"cache_copy_gbs": cache_copy}
        assert f"plain geometric mean 1.28x, 0 of 2 met{beyond})" in report.BLOCKS["targets"]([held])


def test_a_ratio_is_met_by_the_goal_or_at_the_roof():
    a, b, c, c2 = report.entries(dsconv(), "pair")
    assert a.met(1.5) and not b.met(1.5)
    assert c.ratio == pytest.approx(1.1) and c.share == pytest.approx(0.833, abs=1e-3) and c.met(1.5)
    assert c2.share == pytest.approx(0.5) and not c2.met(1.5)
    assert [e.term(1.5) for e in (a, b, c, c2)] == pytest.approx([1.0, 0.75 / 1.5, 1.0, 1.1 / 1.5])
    assert report.roof(1) == 0.80 and report.roof(2) == 0.75


def test_peak_is_the_best_probe_of_the_thread_count():
    assert report.peaks(dsconv())[1]["fp32_gflops"] == 100.0


def test_geomean():
    assert report.geomean([1.0, 4.0]) == pytest.approx(2.0)
    assert math.isnan(report.geomean([]))


def test_same_format_losses_are_named():
    assert report.same_format_losses(dsconv()["rows"]) == ["net-b b1 t1 channels_last"]


def test_losing_shapes_and_failed_rivals_stay_in_the_table():
    text = report.BLOCKS["dsconv"]([dsconv()])
    assert re.search(r"\| net-b \| 1 \| 1 .*\*\*0\.75x\*\*.*\*\*no\*\* \|", text)
    assert "Inductor channels_last | 2.00x" in text
    assert "Not measured: pair net-c b1 t2 float32 inductor/nchw: no &lt;compiler&gt;" in text
    assert "effops 0.1.0 at `0123456789`; 2030-01-02" in text


def test_summary_and_pointwise():
    summary = report.BLOCKS["dsconv-summary"]([dsconv()])
    expected = math.exp((math.log(0.5) + math.log(1.1 / 1.5)) / 4)
    assert f"| {expected:.3f} | 2/4 | 1 |" in summary
    assert "bench-dsconv-test-cpu-9.svg" in summary
    pointwise = report.BLOCKS["pointwise"]([dsconv()])
    assert re.search(r"net-a \| 1 \| 1 \| 0\.11 \| 91 % \| yes", pointwise)
    assert re.search(r"net-b .* exempt", pointwise)


def test_targets_say_what_is_met_and_what_is_not_measured():
    overhead = {
        "kind": "overhead",
        "threads": 1,
        "operator": "ds_conv2d",
        "overhead_forward_us": 9.0,
        "overhead_forward_backward_us": 80.0,
    }
    text = report.BLOCKS["targets"]([dsconv(), result("overhead", [overhead])])
    assert "| no shape below 1.0x through `auto` | 1 of 4 below | **no** |" in text
    assert "| pointwise part at 75 % of the FMA peak | 1 of 1 shapes, least 91 % | yes |" in text
    assert "| host overhead, no-grad forward: <= 10 us | 9.0 us | yes |" in text
    assert "| host overhead, forward + backward: <= 75 us | 80.0 us | **no** |" in text
    assert "| training | not measured yet |" in text


def test_bf16_is_judged_against_our_own_fp32():
    rows = [
        pair("net-a", 1, {"effops/nchw": side(100.0), "effops/channels_last": side(90.0)}),
        pair("net-a", 1, {"effops/nchw": side(50.0), "eager/nchw": side(10.0)}, dtype="bfloat16"),
    ]
    (entry,) = report.bf16_entries(result("bf16", rows))
    assert (entry.rival_us, entry.own_us) == (90.0, 50.0)
    assert entry.share == pytest.approx(2 * 5e6 / 50e-6 / 200e9)
    assert "1.80x" in report.BLOCKS["bf16"]([result("bf16", rows)])


def test_training_compares_with_eager_channels_last_and_counts_bytes():
    row = {
        "kind": "training",
        "case": "half-56-56",
        "batch": 16,
        "threads": 1,
        "dtype": "float32",
        "sides": {
            "effops/nchw": side(1000.0, saved_bytes=5_000_000),
            "eager/channels_last": side(2000.0, saved_bytes=10_000_000),
            "eager/nchw": side(1500.0, saved_bytes=10_000_000),
        },
    }
    text = report.BLOCKS["training"]([result("training", [row])])
    assert "| 2.00x | 1.50x | 5.00 | 10.00 | 50 % |" in text
    assert "| chain of four blocks: 40 % fewer bytes saved for backward | least 50 % | yes |" in report.BLOCKS[
        "targets"
    ]([result("training", [row])])


@pytest.mark.parametrize(
    "peaks", [(), (3_000_000, 9_000_000), (9_000_000, 9_000_000)], ids=("unknown", "less", "equal")
)
def test_module_training_shows_peak_memory_where_it_was_measured(peaks):
    own, eager = [{"peak_bytes": peak} for peak in peaks] or [{}, {}]
    sides = {
        "effops/channels_last": side(1000.0, saved_bytes=5_000_000, **own),
        "eager/channels_last": side(2000.0, saved_bytes=10_000_000, **eager),
    }
    row = {"kind": "module-training", "case": "a", "batch": 16, "threads": 1, "dtype": "float32", "sides": sides}
    table = report.BLOCKS["module-training"]([result("training", [row])])
    targets = report.BLOCKS["targets"]([result("training", [row])])
    assert ("| 3.0 | 9.0 |" in table) == (peaks[:1] == (3_000_000,))
    assert ("peak of effops, MB" in table) == ("modules: less peak memory" in targets) == bool(peaks)
    assert ("| modules: less peak memory | 1 of 1 | yes |" in targets) == (peaks[:1] == (3_000_000,))


def test_peak_memory_sees_what_a_step_holds_for_a_while():
    """In a process with the allocator that the measurement takes."""
    code = (
        "import torch; from benchmarks.peak_memory import rise\n"
        "def step():\n    for _ in range(3): torch.ones(4_000_000)\n"
        "step(); print(rise(step), rise(lambda: None))"
    )
    env = os.environ | peak_memory.ALLOCATOR
    done = subprocess.run([sys.executable, "-c", code], env=env, cwd=ROOT, capture_output=True, text=True, check=True)
    held, nothing = map(int, done.stdout.split())
    assert 15_000_000 < held < 20_000_000 and nothing < 1_000_000  # the kernel counts pages a few dozen at a time


def test_models_and_dwconv_tables():
    sides = {"effops/nchw": side(1000.0), "eager/nchw": side(1500.0), "inductor/nchw": {"error": "failed"}}
    model = {"kind": "model", "case": "vgnetg_1_0mp", "batch": 1, "threads": 1, "dtype": "float32", "sides": sides}
    assert "| vgnetg_1_0mp | 1 | 1 | 1 | 1.5 | - | 1.50x | - |" in report.BLOCKS["models"]([result("models", [model])])
    dw = pair("dw3", 1, sides, kind="dw")
    assert "Geometric mean: 1.50x." in report.BLOCKS["dwconv"]([result("dwconv", [dw])])


def model_row(name, batch, eager, **own):
    sides = {"eager/channels_last": side(eager), "effops/channels_last": side(**own) if own else {"error": "wrong"}}
    return {"kind": "model", "case": name, "batch": batch, "threads": 1, "dtype": "float32", "sides": sides}


def test_target_of_the_networks():
    """Against eager in channels_last, whatever Inductor does; networks without a goal do not count."""
    rows = [
        model_row("vgnetg_1_0mp", 1, 3000.0, median=2000.0),
        model_row("vgnetg_1_0mp", 16, 2500.0, median=2000.0),
        model_row("mobilenet_v2", 1, 1000.0, median=2000.0),
        model_row("effnet_v1_cifar10", 1, 1000.0),
    ]
    targets = report.BLOCKS["targets"]([result("models", rows)])
    line = "1 of 2 (geometric mean 1.37x, least 1.25x: vgnetg_1_0mp batch 16 1 thread) | **no** |"
    assert f"| networks of the papers against eager channels_last: 1.5x each | {line}" in targets
    targets = report.BLOCKS["targets"]([result("models", rows[:1])])
    assert "1 of 1 (geometric mean 1.50x, least 1.50x: vgnetg_1_0mp batch 1 1 thread) | yes |" in targets
    assert "networks of the papers" not in report.BLOCKS["targets"]([result("models", rows[2:])])


def test_summary_of_the_latencies():
    rows = [model_row("a", 1, 4000.0, median=1000.0), model_row("b", 1, 1000.0, median=1100.0), model_row("c", 1, 1.0)]
    text = report.BLOCKS["latencies"]([result("latencies", rows)])
    assert text.startswith("2 networks, ") and "geometric mean 1.91x, 0.91x to 4.00x." in text
    assert "Slower than stock PyTorch: `b` 0.91x." in text
    assert "Slower than stock PyTorch: none." in report.BLOCKS["latencies"]([result("latencies", rows[:1])])


def test_operators_are_those_of_the_backends():
    """Every operator that a backend has stands in the table, its functions and modules exist, and no other does."""
    from benchmarks import operators
    from effops import backends, functional, modules

    listed = {operator.op for operator in operators.OPERATORS}
    assert listed == set().union(*(getattr(backend, "operators", ()) for backend in backends.BACKENDS))
    for operator in operators.OPERATORS:
        assert all(hasattr(functional, name) for name in operator.functions)
        assert all(hasattr(modules, name) for name in operator.modules)
    text = report.BLOCKS["operators"]([])
    assert "| - | - | F; fp32 bf16 fp64; CPU |" in text and "on a device they are unverified" in text


@pytest.mark.parametrize(
    ("entry", "named"),
    [
        ({"path": "tests", "passed": 900, "failed": 0}, True),
        ({"path": "tests", "passed": 900, "failed": 1}, False),
        ({"path": "tests", "passed": 0, "failed": 0}, False),
        ({"path": "tests", "passed": 900, "failed": 0, "incomplete": True}, False),
        ({"path": "benchmarks", "passed": 9, "failed": 0}, False),
        ({"path": "tests", "error": "hung"}, False),
    ],
    ids=("passed", "one failed", "none ran", "cut short", "benchmarks", "error"),
)
def test_a_gpu_is_named_where_its_whole_suite_passed(entry, named):
    result = {"suite": "gpu", "machine": {"gpu": "A card", "cpu": ""}, "entries": [{"stage": "tests"} | entry]}
    text = report.BLOCKS["operators"]([result])
    assert ("The tests passed on: A card." in text) == named
    assert ("on a device they are unverified" in text) != named


@pytest.mark.parametrize("block", [name for name in report.BLOCKS if name != "operators"])
def test_every_block_says_when_it_is_not_measured(block):
    assert "ot measured yet" in report.BLOCKS[block]([])


@pytest.mark.parametrize("block", report.BLOCKS)
def test_render_replaces_only_the_block_and_is_idempotent(block):
    text = DOCUMENT.format(block)
    once = report.render(text, [dsconv()])
    assert once.startswith(f"# Title\n\n<!-- bench:begin {block} -->\n") and "old words" not in once
    assert once.endswith(f"\n<!-- bench:end {block} -->\n\nThe end.\n")
    assert report.render(once, [dsconv()]) == once


@pytest.mark.parametrize(
    "text, message",
    [
        ("<!-- bench:begin dsconv -->", "doc: block 'dsconv' has no end"),
        ("<!-- bench:end dsconv -->", "doc: end of block 'dsconv' without its begin"),
        ("<!-- bench:begin dsconv --><!-- bench:end bf16 -->", "doc: end of block 'bf16' without its begin"),
        (
            "<!-- bench:begin dsconv --><!-- bench:begin bf16 -->",
            "doc: block 'dsconv' has no end before block 'bf16' begins",
        ),
        ("<!-- bench:begin speed --><!-- bench:end speed -->", "doc: unknown block 'speed'; there are targets, dsconv"),
    ],
)
def test_bad_markers_are_refused(text, message):
    with pytest.raises(report.ReportError, match=re.escape(message)):
        report.render(text, [], name="doc")


def test_load_takes_the_newest_of_each_machine_and_leaves_smoke_tests_out(root):
    put(root, "a", dsconv())
    put(root, "b", dsconv() | {"date": "2031-01-01T00:00:00Z"})
    put(root, "c", dsconv() | {"date": "2032-01-01T00:00:00Z", "quick": True})
    put(root, "d", result("dsconv", [], date="2029-01-01T00:00:00Z", cpu="Other CPU"))
    found = report.load(root / "benchmarks" / "results")
    assert [(r["machine"]["cpu"], r["date"][:4]) for r in found] == [("Other CPU", "2029"), ("Test CPU (9)", "2031")]


@pytest.mark.parametrize("content", ["not json", "{}", '{"suite": "dsconv", "machine": {}}', "[]"])
def test_a_file_that_is_no_result_is_refused_by_name(root, content):
    (root / "benchmarks" / "results" / "broken.json").write_text(content)
    with pytest.raises(report.ReportError, match=r"broken\.json: not a results file of benchmarks/run\.py"):
        report.load(root / "benchmarks" / "results")


def test_write_then_check_then_stale(root, capsys):
    put(root, "dsconv", dsconv())
    (root / "README.md").write_text(DOCUMENT.format("dsconv-summary"))
    (root / "benchmarks" / "README.md").write_text(DOCUMENT.format("dsconv-summary"))
    assert report.main(["--root", str(root), "--check"]) == 1
    assert "old words" in (root / "README.md").read_text(), "--check writes nothing"
    assert "run: python benchmarks/report.py" in capsys.readouterr().err

    assert report.main(["--root", str(root)]) == 0
    assert "(docs/images/bench-dsconv-test-cpu-9.svg)" in (root / "README.md").read_text()
    assert "(../docs/images/bench-dsconv-test-cpu-9.svg)" in (root / "benchmarks" / "README.md").read_text()
    assert report.main(["--root", str(root), "--check"]) == 0

    image = root / "docs" / "images" / "bench-dsconv-test-cpu-9.svg"
    image.write_text(image.read_text().replace("net-a", "net-z"))
    assert report.main(["--root", str(root), "--check"]) == 1
    assert "docs/images/bench-dsconv-test-cpu-9.svg is not what the results say" in capsys.readouterr().err


def test_check_reports_a_broken_result_without_a_traceback(root, capsys):
    (root / "benchmarks" / "results" / "broken.json").write_text("{")
    assert report.main(["--root", str(root), "--check"]) == 2
    assert "broken.json" in capsys.readouterr().err


def test_plot_is_well_formed_deterministic_and_shows_every_shape():
    svg = report.ratio_plot(dsconv())
    assert svg == report.ratio_plot(copy.deepcopy(dsconv()))
    texts = [node.text for node in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]
    assert {"net-a", "net-b", "net-c", "2.00", "0.75", "batch 1, 2 threads"} <= set(texts)
    assert report.ratio_plot(result("dsconv", []))


def test_a_run_with_more_than_the_peak_is_called_void():
    rows = [pair("net-a", 1, {"effops/nchw": side(90.0), "eager/nchw": side(100.0)})]
    assert report.describe(result("dsconv", rows))[0].startswith("VOID")
    assert not any(line.startswith("VOID") for line in report.describe(dsconv()))


def test_run_keeps_the_best_median_of_the_processes_and_distrusts_a_side_that_failed_once():
    job = run.Job({"kind": "pair"}, ("effops",), {"kind": "pair"})
    job.add("effops", {"sides": {"nchw": side(3.0), "channels_last": side(5.0)}})
    job.add("effops", {"sides": {"nchw": side(2.0), "channels_last": {"error": "wrong result"}}})
    job.add("effops", {"sides": {"nchw": side(4.0), "channels_last": side(1.0)}})
    sides = job.row()["sides"]
    assert sides["effops/nchw"]["median_us"] == 2.0 and sides["effops/nchw"]["medians_us"] == [3.0, 2.0, 4.0]
    assert sides["effops/nchw"]["p20_us"] == pytest.approx(1.8)
    assert sides["effops/channels_last"] == {"error": "wrong result"}


def test_run_fails_on_effops_errors_only():
    sides = {"effops/nchw": {"error": "wrong"}, "inductor/nchw": {"error": "no compiler"}}
    assert run.failures(result("dsconv", [pair("net-a", 1, sides)])) == ["pair net-a b1 t1 float32 effops/nchw: wrong"]


def test_run_writes_what_report_reads(root):
    run.write(dsconv(), root / "benchmarks" / "results" / "dsconv.json")
    assert report.load(root / "benchmarks" / "results") == [dsconv()]


def test_report_needs_nothing_but_the_standard_library():
    """CI may check the documents before anything is installed."""
    code = (
        "import sys; sys.modules.update(dict.fromkeys(('torch', 'numpy', 'matplotlib', 'effops')))\n"
        f"sys.path.insert(0, {str(ROOT)!r}); from benchmarks import report; report.load(report.ROOT / 'none')"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
