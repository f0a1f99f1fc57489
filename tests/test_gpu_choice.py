"""The recorded table by which `auto` picks between the kinds of GPU kernels: made from results, looked up by a call."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import gpu_choice as generator
from effops import backends, gpu_choice
from effops.backends import Call

HALF = "vgnet-half-56-56"  # 28 + 28 -> 28 channels at 56x56


def entry(side: str, us: float, backend: str | None = None, **problem: Any) -> dict:
    own = side.removeprefix("effops-") if side.startswith("effops-") else None
    problem = {"kind": "pair", "case": HALF, "batch": 128, "precision": "float16", "direction": "forward"} | problem
    modes = {"calls": {"flushed": {"median_us": us + 5}}, "graph": {"flushed": {"median_us": us}}}
    return {"side": side, "us": modes, "backend": backend or own, **problem}


def result(*entries: dict) -> dict:
    return {"entries": [{"gpu": "Invented", "capability": "9.0"}, *entries]}


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Puts a table made of these entries in the place of the shipped one."""

    def put(*entries: dict) -> list[gpu_choice.Record]:
        path = tmp_path / "gpu_choice.json"
        path.write_text(generator.content([result(*entries)]))
        monkeypatch.setattr(gpu_choice, "records", gpu_choice.load(path))
        gpu_choice._nearest.cache_clear()
        return gpu_choice.records

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    yield put
    gpu_choice._nearest.cache_clear()


def call(channels: int = 28, out: int = 28, size: int = 56, dtype: torch.dtype = torch.float16, **changes: Any) -> Call:
    """A half-identity block of batch 128 as the backends see it on a GPU; no memory behind it."""
    x = SimpleNamespace(
        shape=(128, channels, size, size), dtype=dtype, requires_grad=False, is_cuda=True, is_cpu=False, device="cuda:0"
    )
    weight = torch.empty(channels, 1, 3, 3, device="meta")
    geometry = [1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0]
    c = Call("dsconv", "half_identity2d", x, weight, None, geometry, (128, out, size, size))
    return c._replace(**changes)


def test_shipped_table_is_what_the_results_say() -> None:
    folder = Path(generator.__file__).parent / "results"
    results = [json.loads(path.read_text()) for path in sorted(folder.glob("gpu-*.json"))]
    assert gpu_choice.TABLE_PATH.read_text() == generator.content(results)


def test_faster_backend_of_a_problem_that_both_ran(table) -> None:
    (record,) = table(entry("effops-triton", 30.0), entry("effops-cuda", 20.0), entry("eager", 10.0))
    assert record.faster == "cuda"
    assert record.sizes == gpu_choice.Sizes(28, 28, 128 * 56 * 56)
    assert gpu_choice.faster(call()) == "cuda"
    assert gpu_choice.faster(call(channels=36, out=36)) == "cuda"


@pytest.mark.parametrize(
    "entries",
    [
        [entry("effops-cuda", 20.0)],
        [entry("effops-cuda", 20.0), entry("effops-triton", 30.0, backend="reference")],
        [entry("effops-cuda", 20.0), entry("effops-triton", 30.0, batch=1)],
    ],
    ids=["one alone", "other fell back", "another problem"],
)
def test_no_record_without_both(table, entries: list[dict]) -> None:
    assert table(*entries) == []
    assert gpu_choice.faster(call()) is None


@pytest.mark.parametrize(
    "other",
    [
        call(channels=512, out=512),
        call(dtype=torch.float32),
        call(weight=torch.empty(28, 1, 5, 5, device="meta")),
        call(geometry=[2, 2, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0]),
        call(geometry=[1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0]),
        call(weight=torch.empty(28, 1, 3, 3, requires_grad=True)),
        call(op="dwconv"),
        call(op="bsconv"),
        call(shape=(0, 28, 56, 56)),
    ],
    ids=["far", "dtype", "window", "stride", "NCHW", "gradient", "operator", "unmeasured room", "empty"],
)
def test_nothing_similar_leaves_the_order(table, other: Call) -> None:
    table(entry("effops-triton", 30.0), entry("effops-cuda", 20.0))
    assert gpu_choice.faster(other) is None


def test_nearest_of_several_counts(table) -> None:
    small = {"case": "vgnet-half-224-14"}
    table(
        entry("effops-triton", 30.0),
        entry("effops-cuda", 20.0),
        entry("effops-triton", 3.0, **small),
        entry("effops-cuda", 4.0, **small),
    )
    assert gpu_choice.faster(call()) == "cuda"
    assert gpu_choice.faster(call(channels=112, out=112, size=14)) == "triton"


def test_auto_yields_only_to_a_backend_that_can_run(table, monkeypatch: pytest.MonkeyPatch) -> None:
    triton, cuda = (next(b for b in backends.BACKENDS if b.name == name) for name in ("triton", "cuda"))
    monkeypatch.setattr(cuda, "why_not", lambda call: (), raising=False)
    assert triton.worth_it(call()) and cuda.worth_it(call())  # an empty table: the order of the list
    table(entry("effops-triton", 30.0), entry("effops-cuda", 20.0))
    assert not triton.worth_it(call()) and cuda.worth_it(call())
    monkeypatch.setattr(cuda, "why_not", lambda call: ("not built",), raising=False)
    assert triton.worth_it(call())
