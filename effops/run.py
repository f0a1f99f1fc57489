"""The main job, `python -m effops run`: photographs through two networks, as stock PyTorch and as effops.

(a) MobileNetV2 with its ImageNet weights and (b) VGNetG-1.0MP with random ones. Shows what they see, how far the logits
of the two implementations are apart and how long they take; writes a chart and a JSON. The exit status is 0 where they
agree, 1 where they differ by more than the error budget and 2 where something needed is missing.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from effops import backends, info
from effops.data import Source, imagenet_labels, open_source, preprocess, spread
from effops.models import create_model

__all__ = ["add_arguments", "main"]

T = TypeVar("T")

# DESIGN of the error budget: twice (what torch's own float32 result is off + one rounding of the largest value), and a
# bound on the norm of the error.
NORM_BOUND = 1e-5
QUICK_SIZE, FULL_SIZE = 160, 224
_CALIBRATION_VIEWS = 16
STOCK_NCHW, STOCK_NHWC, EFFOPS = "stock, NCHW", "stock, channels_last", "effops, channels_last"


# ---------------------------------------------------------------------------------------------------------------------
# Results
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Agreement:
    """How far apart the logits are; errors are largest absolute ones against stock PyTorch in float64."""

    difference: float
    effops_error: float
    stock_error: float
    allowed: float
    norm: float
    largest_logit: float
    same_top1: int
    photographs: int
    finite: bool

    @property
    def within_budget(self) -> bool:
        return self.finite and self.effops_error <= self.allowed and self.norm <= NORM_BOUND


@dataclass(frozen=True)
class Latency:
    """Milliseconds of one forward pass: median, 20th and 80th percentile of `rounds` rounds."""

    median: float
    p20: float
    p80: float
    rounds: int


@dataclass(frozen=True)
class Timing:
    """One row of the table: all contenders at one batch size and thread count."""

    network: str
    batch: int
    threads: int
    latencies: dict[str, Latency]

    @property
    def best_stock(self) -> str:
        return min((STOCK_NCHW, STOCK_NHWC), key=lambda name: self.latencies[name].median)

    @property
    def ratio(self) -> float:
        """How many times as fast as the best stock form."""
        return self.latencies[self.best_stock].median / self.latencies[EFFOPS].median


@dataclass(frozen=True)
class Network:
    """A network in its three forms."""

    name: str
    title: str
    weights: str
    stock: nn.Module
    fused: nn.Module
    truth: nn.Module
    has_labels: bool


# ---------------------------------------------------------------------------------------------------------------------
# Progress
# ---------------------------------------------------------------------------------------------------------------------


def progress(items: Iterable[T], total: int, what: str) -> Iterator[T]:
    """Yields the items and draws a bar on stderr; where that is no terminal, one line at the end."""
    terminal = sys.stderr.isatty()
    start = time.perf_counter()
    for done, item in enumerate(items):
        if terminal:
            filled = 30 * done // max(total, 1)
            print(f"\r{what:<34} [{'#' * filled}{'.' * (30 - filled)}] {done}/{total}", end="", file=sys.stderr)
        yield item
    bar = f"\r{what:<34} [{'#' * 30}] {total}/{total}" if terminal else f"{what}: {total} done"
    print(f"{bar}  {time.perf_counter() - start:.1f} s", file=sys.stderr)


# ---------------------------------------------------------------------------------------------------------------------
# Networks
# ---------------------------------------------------------------------------------------------------------------------


def _forms(name: str, title: str, weights: str, stock: nn.Module, backend: str, has_labels: bool) -> Network:
    """The effops and the float64 form of a stock network."""
    fused = create_model(name)
    fused.load_state_dict(stock.state_dict())
    for part in fused.modules():
        if hasattr(part, "backend"):
            part.backend = backend
    truth = create_model(name, reference=True)
    truth.load_state_dict(stock.state_dict())
    return Network(name, title, weights, stock.eval(), fused.eval(), truth.double().eval(), has_labels)


def mobilenet(weights: Path | None, backend: str) -> Network:
    """MobileNetV2, trained."""
    stock = create_model("mobilenet_v2", pretrained=weights or True, reference=True)
    origin = str(weights) if weights else "torchvision's, trained on ImageNet"
    return _forms("mobilenet_v2", "MobileNetV2", origin, stock, backend, has_labels=True)


def vgnet(images: Tensor, seed: int, backend: str) -> Network:
    """VGNetG-1.0MP with random weights, whose batch norms have seen the photographs.

    Without statistics that fit, the activations of a random deep network fade and its logits compare little but biases;
    statistics of too few pixels make it chaotic. So each photograph is seen flipped and turned as well.
    """
    torch.manual_seed(seed)
    stock = create_model("vgnetg_1_0mp", reference=True).train()
    for part in stock.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.momentum = None  # cumulative: the statistics of exactly these images
    views = [torch.rot90(view, turns, (2, 3)) for turns in range(4) for view in (images, images.flip(3))]
    with torch.no_grad():
        stock(torch.cat(views)[:_CALIBRATION_VIEWS])
    origin = f"random (seed {seed}), batch norm statistics of the photographs"
    return _forms("vgnetg_1_0mp", "VGNetG-1.0MP", origin, stock, backend, has_labels=False)


# ---------------------------------------------------------------------------------------------------------------------
# Agreement
# ---------------------------------------------------------------------------------------------------------------------


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def compare(network: Network, images: Tensor, batch: int = 4) -> tuple[Agreement, Tensor]:
    """Runs all three forms on every image; returns their agreement and the logits of the effops form."""
    stock = network.stock.to(memory_format=torch.channels_last)
    fused = network.fused.to(memory_format=torch.channels_last)
    chunks = images.split(batch)
    rows = []
    with torch.inference_mode():
        for chunk in progress(chunks, len(chunks), f"{network.title}: logits"):
            nhwc = _channels_last(chunk)
            rows.append((fused(nhwc), stock(nhwc), network.truth(chunk.double())))
    ours, theirs, truth = (torch.cat(column) for column in zip(*rows, strict=True))
    return agreement(ours, theirs, truth), ours


def agreement(ours: Tensor, theirs: Tensor, truth: Tensor) -> Agreement:
    """The error budget: error <= 2 (torch's own error + one rounding of the largest value), and a bound on its norm.

    Args:
        ours: float32 logits [N, classes] of effops.
        theirs: those of stock PyTorch.
        truth: those of stock PyTorch in float64.
    """
    error, stock_error = (logits.double() - truth for logits in (ours, theirs))
    largest = truth.abs().max().item()
    torch_error = stock_error.abs().max().item()
    return Agreement(
        difference=(ours - theirs).abs().max().item(),
        effops_error=error.abs().max().item(),
        stock_error=torch_error,
        allowed=2 * (torch_error + torch.finfo(torch.float32).eps * largest),
        norm=(error.norm() / truth.norm().clamp_min(1e-300)).item(),
        largest_logit=largest,
        same_top1=int((ours.argmax(1) == theirs.argmax(1)).sum()),
        photographs=len(ours),
        finite=bool(torch.isfinite(ours).all()),
    )


def _describe(network: Network, result: Agreement) -> str:
    verdict = "within the error budget" if result.within_budget else "NOT within the error budget"
    return (
        f"{network.title} ({network.weights}):\n"
        f"  largest logit difference, effops against stock: {result.difference:.2e} (largest logit "
        f"{result.largest_logit:.3g}); same top-1 on {result.same_top1} of {result.photographs}\n"
        f"  error against float64: effops {result.effops_error:.2e}, stock {result.stock_error:.2e}, allowed "
        f"{result.allowed:.2e}; relative norm {result.norm:.1e}, allowed {NORM_BOUND:.0e}: {verdict}"
    )


def _top5(logits: Tensor, labels: Sequence[str]) -> list[list[dict[str, Any]]]:
    values, indices = logits.double().softmax(1).topk(5)
    return [
        [{"label": labels[i], "class": i, "probability": round(p, 4)} for p, i in zip(row, places, strict=True)]
        for row, places in zip(values.tolist(), indices.tolist(), strict=True)
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Latency
# ---------------------------------------------------------------------------------------------------------------------


def keep_freed_memory() -> bool:
    """Keeps glibc from returning memory between passes: else page faults decide who is fast. False without glibc."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    trim_threshold, top_pad, mmap_max = -1, -2, -4
    return all([mallopt(mmap_max, 0), mallopt(trim_threshold, 2**31 - 1), mallopt(top_pad, 1 << 24)])


def _percentile(ordered: Sequence[float], share: float) -> float:
    return ordered[min(len(ordered) - 1, max(0, math.ceil(share * len(ordered)) - 1))]


def take_turns(contenders: dict[str, Callable[[], object]], seconds: float, least: int) -> dict[str, Latency]:
    """Times the contenders one after another, round by round, so that a slow moment of the machine hits all of them.

    Args:
        contenders: what to time, by name; each has run before.
        seconds: no new round after so much time, once there are `least` rounds.
        least: the smallest number of rounds.
    """
    times: dict[str, list[float]] = {name: [] for name in contenders}
    names = list(contenders)
    end = time.perf_counter() + seconds
    rounds = 0
    while rounds < least or (time.perf_counter() < end and rounds < 200):
        turn = rounds % len(names)
        for name in names[turn:] + names[:turn]:
            start = time.perf_counter()
            contenders[name]()
            times[name].append((time.perf_counter() - start) * 1e3)
        rounds += 1
    result = {}
    for name, values in times.items():
        values.sort()
        result[name] = Latency(*(_percentile(values, share) for share in (0.5, 0.2, 0.8)), rounds)
    return result


def measure(
    networks: Sequence[Network], images: Tensor, batches: Sequence[int], threads: Sequence[int], quick: bool
) -> list[Timing]:
    """The latency table. Each network's stock NCHW, stock channels_last and effops channels_last forms take turns."""
    settings = [(n, batch, count) for n in networks for batch in batches for count in threads]
    before = torch.get_num_threads()
    rows = []
    try:
        for network, batch, count in progress(settings, len(settings), "latency"):
            torch.set_num_threads(count)
            rows.append(_measure_one(network, images, batch, count, quick))
    finally:
        torch.set_num_threads(before)
    return rows


def _measure_one(network: Network, images: Tensor, batch: int, threads: int, quick: bool) -> Timing:
    index = torch.arange(batch) % len(images)
    nchw = images[index].contiguous()
    nhwc = _channels_last(nchw)
    stock_nchw = create_model(network.name, reference=True).eval()
    stock_nchw.load_state_dict(network.stock.state_dict())
    contenders = {
        STOCK_NCHW: lambda: stock_nchw(nchw),
        STOCK_NHWC: lambda: network.stock(nhwc),
        EFFOPS: lambda: network.fused(nhwc),
    }
    with torch.inference_mode():
        for contender in contenders.values():
            for _ in range(1 if quick else 3):
                contender()
        latencies = take_turns(contenders, 0 if quick else 4, 2 if quick else 7)
    return Timing(network.title, batch, threads, latencies)


def _table(rows: Sequence[Timing]) -> str:
    lines = [
        "milliseconds a forward pass: median (p20 .. p80); ratio = best stock / effops, above 1 effops is faster",
        f"{'network':<13} {'batch':>5} {'threads':>7}   {STOCK_NCHW:<25} {STOCK_NHWC:<25} {EFFOPS:<25} {'ratio':>6}",
    ]
    for row in rows:
        cells = [
            f"{value.median:7.2f} ({value.p20:.2f} .. {value.p80:.2f})" for value in (row.latencies[n] for n in _ORDER)
        ]
        columns = " ".join(f"{cell:<25}" for cell in cells)
        lines.append(f"{row.network:<13} {row.batch:>5} {row.threads:>7}   {columns} {row.ratio:>6.2f}")
    return "\n".join(lines)


_ORDER = (STOCK_NCHW, STOCK_NHWC, EFFOPS)


# ---------------------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------------------


def output_folder(out: Path | None, overwrite: bool) -> Path:
    """Makes the folder of the results.

    Raises:
        RuntimeError: it holds results already (and they were not asked to be overwritten), or cannot be made.
    """
    folder = out or Path("runs") / datetime.now().strftime("%Y%m%d-%H%M%S")
    present = [name for name in ("run.json", "run.png") if (folder / name).exists()]
    if present and not overwrite:
        raise RuntimeError(f"{folder} holds {' and '.join(present)} already: pass another --out, or --overwrite")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RuntimeError(f"{folder} cannot be made: {error.strerror}") from error
    return folder


def _chart(path: Path, rows: Sequence[Timing], results: dict[str, Agreement]) -> None:
    """Latency relative to the best stock form, and errors beside the budget."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise RuntimeError('the chart needs matplotlib: pip install "effops[run]"') from None
    figure = Figure(figsize=(13, 5), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=[3, 1])
    colours = {STOCK_NCHW: "#9aa5b1", STOCK_NHWC: "#52606d", EFFOPS: "#d64545"}
    for offset, name in enumerate(_ORDER):
        values = [row.latencies[name] for row in rows]
        places = [index + 0.27 * (offset - 1) for index in range(len(rows))]
        per_image = [value.median / row.batch for value, row in zip(values, rows, strict=True)]
        spread_ = [
            [(value.median - value.p20) / row.batch for value, row in zip(values, rows, strict=True)],
            [(value.p80 - value.median) / row.batch for value, row in zip(values, rows, strict=True)],
        ]
        left.bar(places, per_image, 0.25, yerr=spread_, capsize=2, color=colours[name], label=name)
    for index, row in enumerate(rows):
        top = max(value.p80 / row.batch for value in row.latencies.values())
        left.annotate(f"{row.ratio:.2f}x", (index + 0.27, top), ha="center", va="bottom", color=colours[EFFOPS])
    left.set_xticks(
        range(len(rows)),
        [f"{row.network}\nbatch {row.batch}, {row.threads} thread{'s' * (row.threads > 1)}" for row in rows],
        fontsize=7,
    )
    left.set_ylabel("ms per image: median, p20 to p80")
    left.set_title("Latency (and best stock / effops)")
    left.legend()
    names = list(results)
    bars = (
        ("effops_error", "effops", "#d64545"),
        ("stock_error", "stock", "#52606d"),
        ("allowed", "allowed", "#c9d1d9"),
    )
    for offset, (field, label, colour) in enumerate(bars):
        places = [index + 0.27 * (offset - 1) for index in range(len(names))]
        right.bar(places, [max(getattr(results[n], field), 1e-12) for n in names], 0.25, color=colour, label=label)
    right.set_yscale("log")
    right.set_ylim(bottom=min(result.effops_error for result in results.values()) / 10 or 1e-12)
    right.set_xticks(range(len(names)), names, fontsize=8)
    right.set_title("Largest logit error against float64")
    right.legend()
    figure.savefig(path, dpi=120)


def _record(value: Any) -> Any:
    """A dataclass as a dict, with what its properties say."""
    if isinstance(value, Timing):
        return asdict(value) | {"best_stock": value.best_stock, "ratio": round(value.ratio, 4)}
    return asdict(value) | {"within_budget": value.within_budget}


# ---------------------------------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `effops run`."""
    parser.add_argument("--images", type=Path, metavar="DIR", help="folder of images, a tar of them, or one image")
    parser.add_argument("--count", type=int, default=12, help="photographs to use, evenly spread; 0: all (default: 12)")
    parser.add_argument("--weights", type=Path, metavar="FILE", help="another state dict for MobileNetV2")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of the results (default: runs/<time>)")
    parser.add_argument("--overwrite", action="store_true", help="replace the results in --out")
    parser.add_argument("--backend", default="auto", help=f"one of {', '.join(backends.names())}")
    parser.add_argument("--seed", type=int, default=0, help="of VGNetG's random weights (default: 0)")
    parser.add_argument("--quick", action="store_true", help="small images, few rounds: checks that everything runs")


def _say(text: str = "") -> None:
    print(text, flush=True)  # in step with the progress on stderr, also where stdout is a file


def _load(source: Source, count: int, size: int) -> tuple[list[str], Tensor]:
    names = spread(source.names, count)
    pictures = [preprocess(source.read(name), size) for name in progress(names, len(names), "photographs")]
    return names, torch.stack(pictures)


def _check(args: argparse.Namespace) -> None:
    if args.backend not in backends.names():
        raise RuntimeError(f"unknown backend {args.backend!r}; accepted: {', '.join(backends.names())}")
    if args.count < 0:
        raise RuntimeError(f"--count must not be negative, got {args.count}")


def _print_machine(report: dict[str, Any]) -> None:
    kernels = report["kernel library"]
    state = f"kernels for {kernels['isa']}" if kernels["loaded"] else f"no kernels: {kernels['why not']}"
    machine = f"{report['cpu']} ({report['cores']} cores)"
    _say(f"effops {report['effops']}, torch {report['torch']['torch']}, {machine}, {state}")


def _print_top5(names: Sequence[str], tops: Sequence[list[dict[str, Any]]], stock_tops: Sequence[list]) -> None:
    width = min(40, max(len(name) for name in names))
    for name, top, stock_top in zip(names, tops, stock_tops, strict=True):
        words = ", ".join(f"{entry['label']} {100 * entry['probability']:.0f} %" for entry in top)
        same = [entry["class"] for entry in top] == [entry["class"] for entry in stock_top]
        _say(f"  {name[-width:]:<{width}}  {words}{'' if same else '   (stock ranks them otherwise)'}")


def _run(args: argparse.Namespace) -> int:
    _check(args)
    folder = output_folder(args.out, args.overwrite)
    report = info.collect()
    _print_machine(report)
    source = open_source(args.images)
    labels, labels_from = imagenet_labels(source)
    size = QUICK_SIZE if args.quick else FULL_SIZE
    _say(f"{source.description}; labels: {labels_from}")
    names, images = _load(source, min(args.count or 2, 2) if args.quick else args.count, size)
    quiet_memory = keep_freed_memory()
    networks = [mobilenet(args.weights, args.backend), vgnet(images, args.seed, args.backend)]

    results, seen = {}, []
    for network in networks:
        results[network.title], logits = compare(network, images)
        if network.has_labels:
            with torch.inference_mode():
                stock_logits = torch.cat([network.stock(_channels_last(chunk)) for chunk in images.split(4)])
            seen = _top5(logits, labels)
            _say(f"\n{network.title}, top 5 of each photograph:")
            _print_top5(names, seen, _top5(stock_logits, labels))
    _say()
    for network in networks:
        _say(_describe(network, results[network.title]))
    threads = sorted({1, torch.get_num_threads()})
    timings = measure(networks, images, (1, 2) if args.quick else (1, 16), threads, args.quick)
    _say(f"\n{_table(timings)}")

    document = {
        "created": datetime.now().astimezone().isoformat(timespec="seconds"),
        "machine": report,
        "load": os.getloadavg() if hasattr(os, "getloadavg") else None,
        "freed_memory_is_kept": quiet_memory,
        "options": {"backend": args.backend, "seed": args.seed, "quick": args.quick, "image_size": size},
        "photographs": {"source": source.description, "names": names, "labels": labels_from},
        "top5": dict(zip(names, seen, strict=True)),
        "weights": {network.title: network.weights for network in networks},
        "agreement": {title: _record(result) for title, result in results.items()},
        "latency_ms": [_record(row) for row in timings],
    }
    (folder / "run.json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    _chart(folder / "run.png", timings, results)
    _say(f"\nwrote {folder / 'run.json'} and {folder / 'run.png'}")
    failed = [title for title, result in results.items() if not result.within_budget]
    if failed:
        print(f"effops run: {' and '.join(failed)}: effops and stock PyTorch disagree", file=sys.stderr)
    return 1 if failed else 0


def main(args: argparse.Namespace) -> int:
    """Runs the job; 0: they agree, 1: they do not, 2: something needed is missing (one sentence on stderr)."""
    try:
        return _run(args)
    except RuntimeError as error:
        print(f"effops run: {error}", file=sys.stderr)
        return 2
