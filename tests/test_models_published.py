"""What the papers print against what counting gives: every figure, claims of them, `effops list`, docs/models.md."""

from __future__ import annotations

import difflib
import json
import sys
from pathlib import Path

import pytest
import torch

from effops.cli import main
from effops.models import list_models
from effops.models import published as p

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import model_table, report  # noqa: E402 (the benchmarks are no part of the installed package)

# Every figure that rounding does not give, (model, print, classes): the verdict as the network runs, and as the
# table counted where that is known.
DIFFERENT = {
    ("wrn_40_3", "5.0M", 100): ("match (truncated)", None),
    ("multiception_resnet20", "0.2724M", 10): ("match (truncated)", None),
    ("multiception_resnet20", "0.1899M", 10): ("off by -0.25 %", None),
    ("multiception_senet56", "0.5886M", 10): ("off by -0.52 %", None),
    ("multiception_shakenet26_2x96d", "26.78M", 10): ("off by -2.19 %", "match"),
    ("multiception_shakenet26_2x96d", "17.57M", 10): ("off by -3.35 %", "match"),
    ("multiception_shakenet26_2x96d", "26.81M", 100): ("off by -2.17 %", "match"),
    ("multiception_shakenet26_2x96d", "17.59M", 100): ("off by -3.27 %", "off by +0.06 %"),
    ("effnet_baseline_cifar10", "80.3M", None): ("off by -1.47 %", "match"),
    ("effnet_baseline_svhn", "3563.5K", None): ("off by -6.46 %", "match"),
    ("effnet_baseline_gtsrb", "2326.5K", None): ("off by -28.39 %", "match"),
    ("effnet_large_cifar10", "79.8M", None): ("off by -0.17 %", None),
    ("effnet_large_svhn", "3530.7K", None): ("off by +0.40 %", None),
    ("effnet_large_gtsrb", "2171.9K", None): ("off by -0.40 %", None),
    ("effnet_shufflenet_cifar10", "4.7M", None): ("off by -5.05 %", None),
    ("effnet_shufflenet_svhn", "733.1K", None): ("off by -0.32 %", None),
    ("effnet_shufflenet_gtsrb", "540.7K", None): ("off by -6.49 %", None),
    ("effnet_v1_cifar10", "11.4M", None): ("off by -1.05 %", None),
    ("effnet_v2_cifar10", "12.4M", None): ("off by +0.42 %", "match"),
    ("effnet_v2_cifar10", "21.2M", None): ("off by +0.39 %", "match"),
    ("effnet_v2_cifar10", "30.0M", None): ("off by +0.38 %", "match"),
    ("effnet_v2_svhn", "1052.2K", None): ("off by +0.43 %", "match"),
    ("effnet_v2_svhn", "1425.4K", None): ("off by +0.65 %", "match"),
    ("effnet_v2_svhn", "1798.7K", None): ("off by +0.77 %", "match"),
    ("effnet_mob_imp_svhn", "2506.7K", None): ("off by -0.12 %", None),
}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def key(figure: p.Figure) -> tuple[str, str, int | None]:
    return figure.model, figure.printed, figure.arguments.get("num_classes")


# ---------------------------------------------------------------------------------------------------------------------
# Figures
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", dict.fromkeys(figure.model for figure in p.FIGURES))
def test_figures(model: str) -> None:
    for figure in p.figures(model):
        compared = p.compare(figure)
        verdicts = compared.own.verdict, compared.reading and compared.reading.verdict
        assert verdicts == DIFFERENT.get(key(figure), ("match", None)), figure
        assert bool(figure.reason) == (key(figure) in DIFFERENT), figure


def test_different_figures_are_figures() -> None:
    keys = [key(figure) for figure in p.FIGURES if figure.reason]
    assert sorted(keys, key=str) == sorted(DIFFERENT, key=str)


def test_readings_explain_their_prints() -> None:
    """What a table counted comes closer to its print than the network as it runs."""
    for figure in p.FIGURES:
        if figure.reading is not None:
            own, reading = p.compare(figure)[1:]
            printed = float(figure.printed[:-1]) * {"K": 1e3, "M": 1e6}[figure.printed[-1]]
            assert abs(reading.counted - printed) < abs(own.counted - printed), figure


def test_every_table_is_here() -> None:
    """Numbers of figures by table, so that none is lost."""
    found = [figure.source for figure in p.FIGURES]
    expected = {
        "VGNet, Table 3": 8 + 4,
        "VGNet, the repository's results.md": 8,
        "Nuts & Bolts, Table 1": 6,
        "Nuts & Bolts, Table 2": 2,
        "BSConv, Table 2, CIFAR-10": 8,
        "BSConv, Table 2, CIFAR-100": 8,
        "BSConv, the package's README, CIFAR-10": 2 * 20,
        "BSConv, the package's README, CIFAR-100": 2 * 21,
        "Multiception, Table 5, CIFAR-10": 8,
        "Multiception, Table 5, CIFAR-100": 4,
        "Multiception, Table 5, STL-10": 2,
        "Multiception, Table 5, ImageNet32x32": 2,
        **{f"EffNet, Table {number}": 5 if number < 5 else 7 for number in range(2, 8)},
    }
    assert {source: found.count(source) for source in dict.fromkeys(found)} == expected


@pytest.mark.parametrize(
    ("printed", "counted", "truncated", "verdict"),
    [
        ("0.997M", 997_358, False, "match"),
        ("0.997M", 997_500, False, "off by +0.05 %"),
        ("0.998M", 997_500, False, "match"),  # halves go up
        ("0.2724M", 272_474, False, "off by +0.03 %"),
        ("0.2724M", 272_474, True, "match (truncated)"),
        ("0.2725M", 272_474, True, "off by -0.01 %"),
        ("25,144", 25_144, False, "match"),
        ("25,144", 25_145, False, "off by +0.00 %"),
        ("517.6K", 517_632, False, "match"),
        ("41.3M", 41_300_840.5, False, "match"),
        ("5M", 4_499_999, False, "off by -10.00 %"),
        ("2G", 1_500_000_000, False, "match"),
    ],
)
def test_judge(printed: str, counted: float, truncated: bool, verdict: str) -> None:
    assert p.judge(printed, counted, truncated) == (counted, verdict)
    assert p.judge(printed, counted, truncated).agrees == verdict.startswith("match")


@pytest.mark.parametrize("printed", ["", "M", "1.2.3M", "5k", "-5"])
def test_not_a_printed_number(printed: str) -> None:
    with pytest.raises(ValueError, match="not a printed number"):
        p.judge(printed, 1)


# ---------------------------------------------------------------------------------------------------------------------
# Counts
# ---------------------------------------------------------------------------------------------------------------------


def test_counts() -> None:
    """Of each paper; the exact FLOPs by hand or from the tests of their conventions."""
    assert p.counts("mobilenet_v2") == (3_504_872, 300_774_272, None)
    assert p.counts("mnist_25k") == (25_144, 2_353_312, None)
    assert p.counts("cifar_resnet20") == (272_480, 40_813_184, 41_300_840)
    assert p.counts("multiception_resnet20") == (189_434, 32_408_192, None)
    assert p.counts("effnet_v2_gtsrb", expansion=6) == (28_483, 522_752, 1_045_504)
    parameters, macs, flops = p.counts("vgnetg_1_0mp")
    assert (parameters, macs) == (997_358, 141_300_232)
    assert flops > macs and f"{flops / 1e9:.3f}" == "0.144"


def test_counts_of_variants() -> None:
    assert p.counts("cifar_resnet20", num_classes=100).parameters == 272_480 + 90 * 65
    assert p.counts("mobilenetv1", input="cifar").macs == 176_570_368
    thumbnail = p.counts("vgnetg_1_0mp", thumbnail=True)
    assert thumbnail.macs != p.counts("vgnetg_1_0mp").macs
    with pytest.raises(TypeError, match="depth"):
        p.counts("vgnetg_1_0mp", depth=3)
    with pytest.raises(ValueError, match="unknown model 'vgnetg_1_0mpp'"):
        p.counts("vgnetg_1_0mpp")


def test_only_what_is_learned_counts() -> None:
    """VGNet's fixed kernels do not: the banks of the F variants replace learned ones."""
    fixed, learned = p.counts("vgnetf2_1_5mp"), p.counts("vgnetc_1_5mp")
    assert (fixed.parameters, learned.parameters) == (1_485_896, 1_506_344)
    assert fixed.macs == learned.macs


def test_input_sizes() -> None:
    assert p.input_size("vgnetg_1_0mp") == p.input_size("resnet18") == (1, 3, 224, 224)
    assert p.input_size("vgnetg_1_0mp", thumbnail=True) == p.input_size("wrn_16_1") == (1, 3, 32, 32)
    assert p.input_size("mobilenetv2", input="cifar") == p.input_size("cifar_143k") == (1, 3, 32, 32)
    assert p.input_size("mnist_7k") == (1, 1, 28, 28)
    assert p.input_size("multiception_resnet50") == p.input_size("effnet_v1_svhn") == (1, 3, 32, 32)
    assert p.input_size("multiception_mobilenetv2") == (1, 3, 96, 96)
    assert p.input_size("effnet_v1_svhn", in_channels=1) == (1, 1, 32, 32)


def test_every_model_is_from_one_paper() -> None:
    names = {name: paper for paper in p.PAPERS for pattern in paper.patterns for name in list_models(pattern)}
    assert sorted(names) == list_models()
    assert sum(len(list_models(pattern)) for paper in p.PAPERS for pattern in paper.patterns) == len(list_models())
    assert all(p.paper_of(name) is paper for name, paper in names.items())
    with pytest.raises(ValueError, match="no paper is known for the model 'lenet'"):
        p.paper_of("lenet")


# ---------------------------------------------------------------------------------------------------------------------
# Claims
# ---------------------------------------------------------------------------------------------------------------------


def test_vgnet_has_30_to_50_percent_fewer_parameters_than_its_rivals() -> None:
    """Table 3: by our counts every printed ratio comes out, and with them 29 to 53 % ("about 30%~50%")."""
    reductions = []
    for (rival, name), (printed, ratio) in p.VGNET_RIVALS.items():
        ours, theirs = p.counts(name).parameters, float(printed.removesuffix("M")) * 1e6
        assert f"{theirs / ours:.2f}" == ratio, rival
        reductions.append(round(100 * (1 - ours / theirs)))
    assert (min(reductions), max(reductions)) == (29, 53)


def test_rivals_that_are_registered() -> None:
    """The rivals' numbers of Table 3 are those of our MobileNets."""
    figures = [figure for figure in p.FIGURES if figure.source == "VGNet, Table 3" and "vgnet" not in figure.model]
    assert {figure.printed for figure in figures} <= {printed for printed, _ in p.VGNET_RIVALS.values()}
    assert len(figures) == 4


# ---------------------------------------------------------------------------------------------------------------------
# effops list
# ---------------------------------------------------------------------------------------------------------------------


def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list"]) == 0
    assert capsys.readouterr().out.splitlines() == list_models()
    assert main(["list", "mnist_5k*"]) == 0
    assert capsys.readouterr().out == "mnist_5k\nmnist_5k_dw\n"
    assert main(["list", "mnist_5k*", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == ["mnist_5k", "mnist_5k_dw"]


def test_list_with_counts(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "effnet_baseline_*", "--counts"]) == 0
    lines = capsys.readouterr().out.splitlines()
    words = [line.split() for line in lines]
    assert words[0] == ["model", "input", "parameters", "MACs", "published", "counted", "verdict", "table"]
    assert words[4][:5] == ["effnet_baseline_gtsrb", "3x32x32", "28,147", "833,024", "2326.5K"]
    assert " ".join(words[4][5:]) == "FLOPs 1,666,048 off by -28.39 % EffNet, Table 4"
    assert " ".join(words[5]) == "2,326,528 match with its linear layer on a 16 x 16 map"
    assert lines[6].strip().startswith("* Table 1 shows that the linear layer reads a 4 x 4 map")
    assert len(lines) == 1 + 3 * 3
    assert len({line.index("match") for line in lines if "match" in line}) == 1  # columns
    assert len({line.index("EffNet,") for line in lines if "EffNet," in line}) == 1


def test_list_with_counts_where_nothing_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "resnet10", "--counts"]) == 0
    cells = capsys.readouterr().out.splitlines()[1].split()
    assert cells == ["resnet10", "3x224x224", "5,418,798", "889,229,312", "-"]


def test_list_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "effnet_v[12]_svhn", "--counts", "--json"]) == 0
    first, second = json.loads(capsys.readouterr().out)
    assert first["name"] == "effnet_v1_svhn" and first["input"] == [1, 3, 32, 32]
    assert (first["parameters"], first["macs"], first["flops_by_its_paper"]) == (12_040, 258_816, 517_632)
    assert first["published"] == [
        {
            "table": "EffNet, Table 3",
            "quantity": "FLOPs",
            "printed": "517.6K",
            "arguments": {},
            "counted": 517_632,
            "verdict": "match",
        }
    ]
    assert second["published"][2]["arguments"] == {"expansion": 6}
    assert second["published"][2]["as_the_table_counts"] == {
        "what": "with the last 3x1 convolution behind its pool",
        "counted": 1_798_656,
        "verdict": "match",
    }
    assert second["published"][2]["reason"]


@pytest.mark.parametrize(
    ("pattern", "hint"),
    [
        ("vgnetf", "'*vgnetf*' matches 4: vgnetf1_1_5mp, vgnetf2_1_5mp, vgnetf3_1_5mp, vgnetf4_1_5mp"),
        ("vgnetg", "'*vgnetg*' matches 8: vgnetg_1_0mp, "),
        ("wrn_16_1_", "'*wrn_16_1_*' matches 2: wrn_16_1_bsconvs, wrn_16_1_bsconvu"),
        ("mobilnet_v2*", "close names: mobilenet_v2, "),
        ("0000", "`effops list` shows all names"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("more", [[], ["--json"], ["--counts"]], ids=str)
def test_pattern_without_a_match(pattern: str, hint: str, more: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", pattern, *more]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith(f"effops list: no model matches '{pattern}'; {hint}")
    assert printed.err.count("\n") == 1


# ---------------------------------------------------------------------------------------------------------------------
# docs/models.md
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_document_is_what_counting_and_the_results_say() -> None:
    wanted = model_table.content(report.load(ROOT / "benchmarks" / "results"))
    present = (ROOT / model_table.DOCUMENT).read_text(encoding="utf-8")
    diff = difflib.unified_diff(present.splitlines(), wanted.splitlines(), "present", "wanted", lineterm="", n=0)
    assert present == wanted, "\n".join([f"run: {model_table.COMMAND}", *list(diff)[:12]])


def test_document_is_written_and_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "docs").mkdir()
    monkeypatch.setattr(model_table, "ROOT", tmp_path)
    monkeypatch.setattr(model_table, "content", lambda results: f"{len(results)} results")
    assert model_table.main(["--check"]) == 1
    stale = "docs/models.md is not what counting and the results say; run: python benchmarks/model_table.py"
    assert capsys.readouterr().err.strip() == stale
    assert model_table.main([]) == 0
    assert (tmp_path / "docs" / "models.md").read_text() == "0 results"
    assert model_table.main(["--check"]) == 0


def test_every_model_and_every_figure_is_in_the_document() -> None:
    """Without counting, so that a forgotten `make bench` or `model_table.py` shows at once."""
    lines = (ROOT / model_table.DOCUMENT).read_text(encoding="utf-8").splitlines()
    start = lines.index("## What is printed")
    assert [line.split("`")[1] for line in lines[:start] if line.startswith("| `")] == list_models()
    found = [tuple(line.split(" | ")[2:4]) for line in lines[start:] if line.startswith("| `")]
    assert sorted(found) == sorted((figure.source, f"{figure.printed} {figure.quantity}") for figure in p.FIGURES)


def test_document_without_latencies() -> None:
    text = model_table.summary(["mnist_5k"], [])
    assert text.splitlines()[-1] == "| `mnist_5k` | Nuts & Bolts | 1x28x28 | 5,712 | 836,982 | - | 1 of 1 |"


def test_latencies_of_the_document() -> None:
    """Both sides in channels_last; "-" for what failed or was not measured."""

    def row(name: str, **sides: dict) -> dict:
        return {"case": name, "sides": {f"{peer}/channels_last": side for peer, side in sides.items()}}

    stock, ours = {"median_us": 2500.0}, {"median_us": 1250.0}
    result = {
        "machine": {"cpu": "Test CPU"},
        "rows": [
            row("mnist_5k", eager=stock, effops=ours),
            row("mnist_7k", eager=stock, effops={"error": "wrong"}),
        ],
    }
    lines = model_table.summary(["mnist_25k", "mnist_5k", "mnist_7k"], [result]).splitlines()
    assert lines[0].endswith("| stock / effops ms, Test CPU |")
    assert [line.split(" | ")[-1] for line in lines[2:]] == ["- |", "2.5 / 1.25 |", "2.5 / - |"]
