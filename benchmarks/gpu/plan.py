"""The list of what `make gpu` does, the most telling first, with what each part costs and what it needs.

Costs are guesses (no run stands behind them yet); the budget is kept by the clock, they only say what still fits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from benchmarks import shapes

# Seconds for one contestant on one problem: gate, warm-up, timing; compiling and autotuning where there is any.
_SIDE_S = {"eager": 3, "compile": 25, "compile-graph": 45}
_OWN_S = 5
_PROBLEM_S = 2
_MODEL_FACTOR = 3
_START_S = 12


@dataclass(frozen=True)
class Item:
    """One part of the run.

    Attributes:
        key: names it in the results and to --only.
        stage: "environment", "build", "tests" (pytest) or "measure" (the worker): who does it (runner.py).
        what: for people.
        seconds: the guess.
        sides: the contestants, each with an entry of its own, `key|side`; empty: one entry, `key`.
        request: what the worker, or pytest, is given.
        limit: seconds after which a contestant, or the part, is given up as hung.
        needs: "gpu", and Python packages by the names they are imported by.
    """

    key: str
    stage: str
    what: str
    seconds: float
    sides: tuple[str, ...] = ()
    request: dict = field(default_factory=dict)
    limit: float = 240.0
    needs: tuple[str, ...] = ("gpu",)

    def entry_keys(self) -> list[str]:
        return [f"{self.key}|{side}" for side in self.sides] or [self.key]


def with_sides(item: Item, sides: Sequence[str]) -> Item:
    """The item with those of its contestants that are named in `sides`."""
    kept = tuple(side for side in item.sides if side in sides)
    dropped = sum(side_seconds(side, item.request) for side in item.sides if side not in kept)
    return replace(item, sides=kept, seconds=item.seconds - dropped)


def side_seconds(side: str, request: dict) -> float:
    factor = _MODEL_FACTOR if request.get("kind") == "model" else 1
    factor *= 1.5 if request.get("direction") == "forward+backward" else 1
    return factor * _SIDE_S.get(side, _OWN_S)


def _measurement(kind: str, case: str, batch: int, precision: str, direction: str, sides: Sequence[str]) -> Item:
    request = {"kind": kind, "case": case, "batch": batch, "precision": precision, "direction": direction}
    sides = tuple(sides)
    return Item(
        f"{kind}/{case}/b{batch}/{precision}/{direction}",
        "measure",
        f"{case}, batch {batch}, {precision}, {direction}: {', '.join(sides)}",
        _PROBLEM_S + sum(side_seconds(side, request) for side in sides),
        sides,
        request,
        limit=max(120.0, 2.5 * max(side_seconds(side, request) for side in sides)),
    )


def _pairs(
    names: Sequence[str], precision: str, direction: str, sides: Sequence[str], batch: int | None = None
) -> list[Item]:
    return [_measurement("pair", name, batch or shapes.gpu_batch(name), precision, direction, sides) for name in names]


def _depthwise(precision: str, sides: Sequence[str]) -> list[Item]:
    return [_measurement("dw", case.name, 128, precision, "forward", sides) for case in shapes.DWCONV]


def _blocks(names: Sequence[str], precision: str, direction: str, sides: Sequence[str], batch: int) -> list[Item]:
    return [_measurement("block", name, batch, precision, direction, sides) for name in names]


def _models(precision: str, direction: str, batch: int, sides: Sequence[str]) -> list[Item]:
    return [_measurement("model", name, batch, precision, direction, sides) for name in shapes.GPU_MODELS]


def _learned(names: Sequence[str]) -> list[str]:
    """Chains whose depthwise kernels are learned one by one: forward + backward is compared on these."""
    return [name for name in names if shapes.find(name).bank == "learned"]


def _measurements(own: tuple[str, ...]) -> list[Item]:
    heads = list(shapes.GPU_HEADLINES)
    rest = [case.name for case in shapes.GPU_DSCONV if case.name not in heads]
    every = heads + rest
    quick = (*own, "eager")
    compiled = ("compile-graph", "compile")
    blocks, trained = [case.name for case in shapes.GPU_BLOCKS], list(shapes.GPU_TRAINING)
    return [
        # Ours against everybody where there is a goal, then ours against eager, then what compiling takes.
        *_pairs(heads, "float16", "forward", (*quick, *compiled)),
        *_pairs(rest, "float16", "forward", quick),
        *_pairs(_learned(heads), "float16", "forward+backward", quick),
        *_pairs(every, "float16", "forward", quick, batch=1),
        *_models("float16", "forward", 128, quick),
        *_models("float16", "forward", 1, quick),
        *_blocks(blocks, "float16", "forward", quick, batch=128),
        *_pairs(rest, "float16", "forward", compiled),
        *_models("float16", "forward", 128, compiled),
        *_blocks(trained, "float16", "forward+backward", quick, batch=128),
        *_pairs(every, "float32", "forward", quick),
        *_blocks(blocks, "float16", "forward", compiled, batch=128),
        *_blocks(blocks, "float16", "forward", quick, batch=1),
        *_pairs(every, "bfloat16", "forward", quick),
        *_pairs(_learned(heads), "float16", "forward+backward", compiled),
        *_pairs(_learned(rest), "float16", "forward+backward", quick),
        *_pairs(_learned(heads), "float32", "forward+backward", quick),
        *_models("float16", "forward+backward", 128, quick),
        *_depthwise("float16", quick),
        *_models("float16", "forward", 1, compiled),
        *_pairs(heads, "float32", "forward", compiled),
        *_pairs(heads, "tf32", "forward", (*quick, *compiled)),
        *_models("float32", "forward", 128, (*quick, *compiled)),
        *_models("float32", "forward+backward", 128, quick),
        *_pairs(every, "float16", "forward", compiled, batch=1),
        *_models("float16", "forward+backward", 128, compiled),
        *_depthwise("float16", compiled),
        *_blocks(blocks, "float32", "forward", quick, batch=128),
        *_pairs(rest, "float32", "forward", compiled),
        *_pairs(rest, "bfloat16", "forward", compiled),
    ]


def make(backends: Sequence[str] = ("auto",)) -> list[Item]:
    """Everything, in order.

    Args:
        backends: those of effops to measure beside the rivals; one that cannot run a call says why in its entry.
    """
    own = tuple(f"effops-{name}" for name in sorted(backends, key=lambda name: name == "auto"))
    return [
        Item("environment", "environment", "the machine and its software", _START_S, needs=()),
        Item("build", "build", "the kernel libraries (EFFOPS_BUILD=auto)", 150, limit=400, needs=()),
        Item(
            "tests",
            "tests",
            "the tests marked gpu (pytest tests -m gpu)",
            240,
            request={"path": "tests"},
            needs=("gpu", "pytest", "hypothesis"),
        ),
        Item("peaks", "measure", "copy bandwidth and matrix peaks", 20, ("peaks",), {"kind": "peaks"}),
        *_measurements(own),
        Item(
            "bench",
            "tests",
            "the pytest-benchmark files on the GPU (pytest benchmarks -m gpu)",
            300,
            request={"path": "benchmarks"},
            needs=("gpu", "pytest", "pytest_benchmark"),
        ),
    ]


def rehearsal() -> list[Item]:
    """A few parts on the CPU with small batches and the host's clock: tries the machinery, measures nothing."""
    sides = ("effops-auto", "eager")
    return [
        Item("environment", "environment", "the machine and its software", _START_S, needs=()),
        Item("peaks", "measure", "peaks", 5, ("peaks",), {"kind": "peaks", "scale": 1 / 32}, needs=()),
        *(
            replace(_measurement("pair", name, 1, precision, direction, sides), needs=())
            for name, precision, direction in (
                ("vgnet-half-368-7", "float32", "forward"),
                ("vgnet-half-368-7", "bfloat16", "forward"),
                ("mnv1-512-512-14-s1", "float32", "forward+backward"),
            )
        ),
        replace(_measurement("dw", "fixed3-128-14", 1, "float32", "forward", sides), needs=()),
        *(
            replace(_measurement("block", name, 1, "float32", direction, sides), needs=())
            for name, direction in (
                ("effnet1-64-128-16", "forward"),
                ("mnv2-64-384-64-14-s1", "forward"),
                ("multiception-64-8-k33", "forward+backward"),
            )
        ),
    ]
