"""Determinism, concurrent callers, thread counts, and every instruction set that the library was compiled for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from cases import BS_CASES, DS_CASES, DW_CASES, DsCase, DwCase
from helpers import (
    assert_within_budget,
    call,
    check_forward,
    check_gradients,
    gradients,
    interpreted,
    make_grad_output,
    make_tensors,
    oracle,
    poison_memory,
    sized_for,
    to_float64,
)

from effops import _library

_BY_ID = {case.id: case for case in [*DW_CASES, *DS_CASES]}
_SPLIT = [
    _BY_ID[name]
    for name in (
        "k3s1-c96-64x40-tiles-cl",
        "k5s2-c20-61x47-tiles",
        "k3s1-c96-130-64x40-tiles-cl",
        "k3s2-c40-24-63x33-tiles-nchw",
        "k3s1-c28-28-half_identity",
        "k3s1-c12-16-passthrough-keep",
        "k3s1-c72-88-cl",
    )
]  # large enough to be cut between threads
_IDS = [case.id for case in _SPLIT]


def _run(case: DwCase | DsCase, tensors: dict, grad_output: torch.Tensor, backend: str) -> list[torch.Tensor]:
    out, grads = gradients(lambda t: call(t, case, backend), tensors, grad_output)
    return [out, *grads.values()]


def _set_threads(threads: int, backend: str) -> None:
    if interpreted(backend) and threads > 1:
        pytest.skip("interpreted kernels take one thread whatever torch is told: the case of one thread is the same")
    torch.set_num_threads(threads)


def _inputs(case: DwCase | DsCase, dtype: torch.dtype = torch.float32) -> tuple[dict, torch.Tensor]:
    tensors = make_tensors(case, dtype, kink_free=True)
    return tensors, make_grad_output(case, oracle(to_float64(tensors), case).shape)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("threads", (1, 2, 3))
@pytest.mark.parametrize("case", _SPLIT, ids=_IDS)
def test_bitwise_repeatable(case: DwCase | DsCase, threads: int, dtype: torch.dtype, backend: str) -> None:
    _set_threads(threads, backend)
    case = sized_for(case, backend)
    tensors, grad_output = _inputs(case, dtype)
    first = _run(case, tensors, grad_output, backend)
    for _ in range(1 if interpreted(backend) else 3):
        for again, once in zip(_run(case, tensors, grad_output, backend), first, strict=True):
            assert torch.equal(again, once)


@pytest.mark.parametrize("threads", (1, 2, 4))
@pytest.mark.parametrize("case", _SPLIT, ids=_IDS)
def test_thread_counts_within_budget(case: DwCase | DsCase, threads: int, backend: str) -> None:
    _set_threads(threads, backend)
    check_forward(case, torch.float32, backend)
    check_gradients(case, torch.float32, backend)


def test_concurrent_callers(backend: str) -> None:
    """Four Python threads, each on its own operator and in its own order, as a server or a data loader would."""
    torch.set_num_threads(2)
    work = []
    for case in (sized_for(case, backend) for case in _SPLIT[:4]):
        tensors, grad_output = _inputs(case)
        work.append((case, tensors, grad_output, _run(case, tensors, grad_output, backend)))
    failures: list[str] = []
    start = threading.Barrier(4)

    def caller(index: int) -> None:
        try:
            torch.set_num_threads(2)  # the OpenMP team size is a per-thread setting
            start.wait()
            for step in range(1 if interpreted(backend) else 6):
                case, tensors, grad_output, expected = work[(index + step) % len(work)]
                for again, once in zip(_run(case, tensors, grad_output, backend), expected, strict=True):
                    if not torch.equal(again, once):
                        failures.append(f"{case.id} differs in thread {index}, step {step}")
        except Exception as error:
            failures.append(f"thread {index}: {type(error).__name__}: {error}")

    callers = [threading.Thread(target=caller, args=(i,)) for i in range(4)]
    for thread in callers:
        thread.start()
    for thread in callers:
        thread.join()
    assert not failures, failures


# ---------------------------------------------------------------------------------------------------------------------
# Instruction sets
# ---------------------------------------------------------------------------------------------------------------------

ISAS = ("baseline", "avx2", "avx512", "avx512bf16")
_CPU_FLAGS = {
    "baseline": set(),
    "avx2": {"avx2", "fma"},
    "avx512": {"avx512f", "avx512bw", "avx512dq", "avx512vl"},
    "avx512bf16": {"avx512f", "avx512_bf16"},
}


def _cpu_flags() -> set[str]:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("flags"):
            return set(line.split(":", 1)[1].split())
    return set()


def numerics_of_this_process() -> str:
    """Compact numerics of whatever instruction set this process has chosen; run in a subprocess by test_isa."""
    poison_memory()
    small = [c for c in [*DW_CASES, *DS_CASES, *BS_CASES] if c.h * c.w < 400]
    for case in small:
        check_forward(case, torch.float32, "cpp")
        check_forward(case, torch.bfloat16, "cpp")
        check_gradients(case, torch.float32, "cpp")
    for case in small[::4]:
        check_forward(case, torch.float64, "cpp")
        check_gradients(case, torch.float64, "cpp")
    return json.dumps(_library.build_info())


@pytest.mark.parametrize("isa", ISAS)
def test_isa(isa: str, cpp: str) -> None:
    """Each compiled instruction set that this CPU has, forced by EFFOPS_CPU_ISA."""
    if isa not in _library.build_info()["compiled_isas"]:
        pytest.skip(f"the library was compiled without {isa}")
    missing = _CPU_FLAGS[isa] - _cpu_flags()
    if missing:
        pytest.skip(f"this CPU has no {', '.join(sorted(missing))}")
    here = Path(__file__).resolve().parent
    script = (
        f"import sys; sys.path.insert(0, {str(here)!r}); import test_threads as t; print(t.numerics_of_this_process())"
    )
    environment = {**os.environ, "EFFOPS_CPU_ISA": isa, "PYTHONPATH": os.pathsep.join([str(here.parent), *sys.path])}
    result = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr[-4000:]
    assert json.loads(result.stdout.splitlines()[-1])["isa"] == isa


def test_isas_agree_within_budget(cpp: str) -> None:
    """What this process chose is the best that the CPU has (unless EFFOPS_CPU_ISA says otherwise), and it says so."""
    info = _library.build_info()
    assert info["isa"] in info["compiled_isas"]
    if "EFFOPS_CPU_ISA" not in os.environ:
        usable = [isa for isa in ISAS if isa in info["compiled_isas"] and _CPU_FLAGS[isa] <= _cpu_flags()]
        assert info["isa"] == usable[-1]
    case = _BY_ID["k3s1-c72-88-cl"]
    tensors = make_tensors(case, torch.float32)
    assert_within_budget(
        call(tensors, case, cpp), oracle(to_float64(tensors), case), oracle(tensors, case), info["isa"]
    )
