"""The CUDA kernels compile ahead of time for every architecture and stay within its limits; no GPU is needed.

The work is done by `cuda_compile.py`. It needs nvcc, which EFFOPS_REQUIRE_NVCC=1 makes a matter of failing instead of
skipping. In CI one architecture is assembled, which is most of the time; with EFFOPS_COMPILE_ALL=1 all are.
"""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path

import cuda_compile
import pytest
from cuda_compile import GPUS, Kernel, Launch, Usage

TABLE = cuda_compile.ROOT / "docs" / "cuda_kernels.md"
ARCHS = sorted(GPUS) if os.environ.get("EFFOPS_COMPILE_ALL") == "1" else [90]


@pytest.fixture(scope="module")
def nvcc() -> None:
    if cuda_compile.tool("nvcc") is None or cuda_compile.tool("ptxas") is None:
        if os.environ.get("EFFOPS_REQUIRE_NVCC") == "1":
            pytest.fail("EFFOPS_REQUIRE_NVCC=1, but there is no nvcc with a ptxas", pytrace=False)
        pytest.skip("there is no nvcc with a ptxas")


@pytest.fixture(scope="module")
def kernels(nvcc: None) -> list[Kernel]:
    return cuda_compile.collect(ARCHS)


@pytest.mark.slow
def test_kernels_stay_within_the_limits(kernels: list[Kernel]) -> None:
    assert {kernel.source for kernel in kernels} == {source.name for source in cuda_compile.SOURCES}
    assert all(set(kernel.usage) == set(ARCHS) for kernel in kernels)
    wrong = cuda_compile.complaints(kernels)
    assert not wrong, "\n" + "\n".join(wrong)


@pytest.mark.slow
def test_table_lists_every_kernel(kernels: list[Kernel]) -> None:
    """Neither more nor fewer: a changed kernel asks for `make cuda-kernels`."""
    assert cuda_compile.kernels_in_table(TABLE.read_text()) == {(kernel.source, kernel.name) for kernel in kernels}


# ---- the check can fail ----------------------------------------------------------------------------------------------

# A kernel that is fine, one whose accumulators cannot fit the registers that its bound leaves, one with an array that
# is indexed by what is only known when it runs, one that calls a function with such an array, and one that copies from
# an address whose alignment nobody told.
FAULTY = """
#include "csrc/cuda/device.h"

namespace effops::cuda {

struct Params {
  float* data;
  int n;
};

EFFOPS_KERNEL(256, 4) good_kernel(EFFOPS_PARAMS Params params) { params.data[threadIdx.x] += 1; }

EFFOPS_KERNEL(1024, 2) spilling_kernel(EFFOPS_PARAMS Params params) {
  float sums[64];
  EFFOPS_UNROLL
  for (int i = 0; i < 64; ++i) sums[i] = params.data[i * 1024 + threadIdx.x];
  for (int step = 0; step < params.n; ++step) {
    EFFOPS_UNROLL
    for (int i = 0; i < 64; ++i) sums[i] = sums[i] * params.data[step] + sums[(i + 1) % 64];
  }
  EFFOPS_UNROLL
  for (int i = 0; i < 64; ++i) params.data[i * 1024 + threadIdx.x] = sums[i];
}

EFFOPS_KERNEL(256, 4) indexing_kernel(EFFOPS_PARAMS Params params) {
  float counts[64] = {};
  for (int i = 0; i < params.n; ++i) counts[static_cast<int>(params.data[i]) % 64] += i;
  for (int i = 0; i < 64; ++i) params.data[i] = counts[i];
}

__device__ __noinline__ float count(const float* data, int n) {
  float counts[64] = {};
  for (int i = 0; i < n; ++i) counts[static_cast<int>(data[i]) % 64] += i;
  return counts[n % 64];
}

EFFOPS_KERNEL(256, 4) calling_kernel(EFFOPS_PARAMS Params params) { params.data[0] = count(params.data, params.n); }

EFFOPS_KERNEL(256, 4) bytewise_kernel(EFFOPS_PARAMS Params params) {
  float value;
  memcpy(&value, params.data + params.n, 4);
  params.data[threadIdx.x] = value;
}

}  // namespace effops::cuda
"""


@pytest.mark.parametrize("arch", sorted(GPUS))
def test_faulty_kernels_are_complained_of(nvcc: None, tmp_path: Path, arch: int) -> None:
    source = tmp_path / "faulty.cu"
    source.write_text(FAULTY)
    found = {kernel.name: kernel for kernel in cuda_compile.compile_source(source, [arch])}
    assert set(found) == {"good_kernel", "spilling_kernel", "indexing_kernel", "calling_kernel", "bytewise_kernel"}
    assert found["good_kernel"].bound == 256 and found["good_kernel"].usage[arch].registers > 0
    for name, kernel in found.items():
        wrong = list(cuda_compile.faults(kernel, arch))
        if name == "good_kernel":
            assert not wrong
        elif name == "bytewise_kernel":
            assert wrong == ["4 loads and stores of single bytes"]
        else:
            assert len(wrong) == 1 and re.match(r"spills: [1-9]\d* bytes of stack a thread", wrong[0]), name


def test_kernel_without_bound_is_an_error(nvcc: None, tmp_path: Path) -> None:
    source = tmp_path / "unbound.cu"
    source.write_text("__global__ void unbound_kernel(float* data) { data[threadIdx.x] += 1; }\n")
    with pytest.raises(ValueError, match="without __launch_bounds__: .*unbound_kernel"):
        cuda_compile.compile_source(source, [90])


def test_source_that_does_not_compile_is_an_error(nvcc: None, tmp_path: Path) -> None:
    source = tmp_path / "broken.cu"
    source.write_text("no such thing;\n")
    with pytest.raises(RuntimeError, match="nvcc failed:"):
        cuda_compile.compile_source(source, [90])


USAGE = Usage(registers=64, stack=0, spills=0, local=0, shared=0)
KERNEL = Kernel("forward_kernel<half_t>", "dwconv_forward.cu", 256, {90: USAGE}, {90: {Launch(256, 40 * 1024)}})


@pytest.mark.parametrize(
    ("usage", "launch", "fault"),
    [
        ({}, KERNEL.launches[90], None),
        ({"stack": 8}, set(), "spills: 8 bytes of stack a thread, 0 bytes of spill stores and loads"),
        ({"spills": 4}, set(), "spills: 0 bytes of stack a thread, 4 bytes of spill stores and loads"),
        ({"local": 4}, set(), "4 bytes of local memory a thread"),
        ({}, {Launch(288, 0)}, "launched with 288 threads, its bound is 256"),
        ({"shared": 1}, {Launch(256, 56 * 1024), Launch(256, 0)}, "occupancy 38%, at least 50%"),
        ({"registers": 65}, {Launch(256, 0)}, "occupancy 38%, at least 50%"),
        ({"shared": 1}, {Launch(256, 227 * 1024)}, "launched with 232449 bytes of shared memory, 232448 can be had"),
    ],
)
def test_limits(usage: dict, launch: set[Launch], fault: str | None) -> None:
    kernel = replace(KERNEL, usage={90: replace(USAGE, **usage)}, launches={90: launch})
    found = list(cuda_compile.faults(kernel, 90))
    assert found[0].startswith(fault) if fault else not found


def test_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    """A reason lets a kernel through, one that no kernel needs is a complaint."""
    slow = replace(KERNEL, usage={90: replace(USAGE, registers=255)})
    monkeypatch.setattr(cuda_compile, "REASONS", {})
    assert cuda_compile.complaints([slow]) == [
        "sm_90: dwconv_forward.cu: forward_kernel<half_t>: occupancy 12%, at least 50% or a reason in REASONS is wanted"
    ]
    monkeypatch.setattr(cuda_compile, "REASONS", {"forward_kernel<": "a good one", "none_kernel": "another"})
    assert cuda_compile.complaints([slow]) == ["REASONS: no kernel is called none_kernel"]
    assert "* `forward_kernel<`: a good one" in cuda_compile.table([slow], "nvcc 1")


def test_kernel_that_nothing_launches_is_a_complaint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_compile, "REASONS", {})
    assert cuda_compile.complaints([replace(KERNEL, launches={})]) == [
        "dwconv_forward.cu: forward_kernel<half_t>: no problem of problems.cu launches it"
    ]


@pytest.mark.parametrize(
    ("registers", "threads", "shared", "arch", "blocks"),
    [
        (32, 256, 0, 90, 8),  # by warps
        (32, 32, 0, 90, 32),  # by blocks
        (64, 256, 0, 90, 4),  # by registers: 65536 / 64 / 256
        (65, 256, 0, 90, 3),  # 72 are given
        (168, 128, 0, 80, 3),  # 65536 / 168 / 128 = 3.05
        (40, 384, 0, 80, 4),  # 12 warps in a quarter, whole blocks of 12
        (32, 128, 100 * 1024, 80, 1),  # by shared memory, with the system's KiB
        (32, 128, 81 * 1024, 80, 2),
        (32, 128, 81 * 1024 + 1, 80, 1),
        (32, 128, 113 * 1024, 90, 2),
        (32, 100, 0, 100, 16),  # 4 warps
    ],
)
def test_occupancy(registers: int, threads: int, shared: int, arch: int, blocks: int) -> None:
    usage = replace(USAGE, registers=registers)
    assert cuda_compile.resident_blocks(usage, Launch(threads, shared), GPUS[arch]) == blocks


PTX = """
.visible .entry _Z3onev(
	.param .align 8 .b8 one[16]
)
.maxntid 128, 1, 1
.minnctapersm 4
{
	ret;
}
"""
RESOURCES = """\
ptxas info    : Compiling entry function '_Z3onev' for 'sm_90'
ptxas info    : Function properties for _Z3onev
    8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 32 registers, used 1 barriers, 8 bytes cumulative stack size, 64 bytes smem, 376 bytes cmem[0]
ptxas info    : Compile time = 19.097 ms
"""


def test_reading() -> None:
    hidden = PTX.replace(".visible ", "").replace("one", "two")  # as in an anonymous namespace
    assert cuda_compile.parse_bounds(PTX + hidden) == {"_Z3onev": 128, "_Z3twov": 128}
    assert cuda_compile.parse_resources(RESOURCES, 90, ["_Z3onev"]) == {
        "_Z3onev": Usage(registers=32, stack=8, spills=16, local=0, shared=64)
    }


@pytest.mark.parametrize(
    "text",
    [
        "",
        RESOURCES.replace("stack frame", "stack"),
        RESOURCES.replace("Used 32", "Used some"),
        RESOURCES.replace("sm_90", "sm_80"),
        RESOURCES + RESOURCES.replace("_Z3onev", "_Z3twov"),
    ],
    ids=["nothing", "no_stack", "no_registers", "another_architecture", "another_kernel"],
)
def test_unreadable_resources_are_an_error(text: str) -> None:
    with pytest.raises(ValueError, match="ptxas"):
        cuda_compile.parse_resources(text, 90, ["_Z3onev"])


@pytest.mark.parametrize("text", ["", PTX.replace(".maxntid", ".reqntid")], ids=["nothing", "no_bound"])
def test_unreadable_bounds_are_an_error(text: str) -> None:
    with pytest.raises(ValueError, match="kernel"):
        cuda_compile.parse_bounds(text)


@pytest.mark.parametrize(
    ("demangled", "short"),
    [
        ("void effops::cuda::sum_kernel<float>(effops::cuda::Sum)", "sum_kernel<float>"),
        ("effops::cuda::(anonymous namespace)::count_kernel(effops::cuda::Count)", "count_kernel"),
        ("void effops::cuda::a_kernel<(effops::Activation)1, effops::cuda::Window<3, 3>, (bool)1>(P<(bool)0>)",
         "a_kernel<(Activation)1, Window<3, 3>, (bool)1>"),
    ],
)  # fmt: skip
def test_short_names(demangled: str, short: str) -> None:
    assert cuda_compile.shorten(demangled) == short
