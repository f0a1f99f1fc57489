"""The host run of the CUDA kernels (tests/cuda_host): it computes what a device would, and it sees what is wrong.

The second half breaks kernels on purpose, one barrier, wait or bound at a time, and asks for the report of the tool
that is there to find it. Nothing here needs a GPU or nvcc.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parent / "cuda_host"
sys.path.insert(0, str(FOLDER))

import build  # noqa: E402

PRIMITIVES = (
    "bfloat16_product", "blocks_take_turns", "buffer_guards", "conversions", "copies", "copy_errors", "divergence",
    "early_return", "half_product", "limits", "places", "shared_overrun", "shuffles", "tf32_product", "tree_sum",
    "vectors",
)  # fmt: skip
# They break something that the sanitizer reports itself.
REPORTED = {"thread": {"blocks_take_turns"}, "address,undefined": {"shared_overrun", "buffer_guards"}}
ORDERS = ("forward", "backward", "shuffled")
KERNELS_H = (build.ROOT / "csrc" / "cuda" / "kernels.h").read_text()


@pytest.fixture(scope="module", autouse=True)
def _compiler_is_there() -> None:
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        if os.environ.get("EFFOPS_REQUIRE_CPP") == "1":
            pytest.fail(f"EFFOPS_REQUIRE_CPP=1, but there is no {compiler}", pytrace=False)
        pytest.skip(f"there is no {compiler}")


@functools.cache
def program(name: str, sanitize: str = "", shim: build.Source = build.SHIM) -> Path:
    marked = f"{name}-{'-'.join(shim.flags[len(build.SHIM.flags) :])}".rstrip("-").replace("-D", "")
    return build.standalone(marked, build.Source(FOLDER / f"{name}.cu"), shim=shim, sanitize=sanitize)


def run(path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "TSAN_OPTIONS": "atexit_sleep_ms=0", "UBSAN_OPTIONS": "halt_on_error=1"}

    def attempt(*prefix: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*prefix, path, *arguments], env=environment, capture_output=True, text=True, timeout=300)

    done = attempt()
    if "ThreadSanitizer: unexpected memory mapping" in done.stderr:
        done = attempt("setarch", "--addr-no-randomize")  # newer kernels place a process where this TSan does not look
    return done


def assert_passes(done: subprocess.CompletedProcess[str]) -> None:
    assert done.returncode == 0, done.stdout + done.stderr


# ---- it computes what a device would ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PRIMITIVES)
def test_primitive(name: str) -> None:
    assert_passes(run(program("primitives"), name))


def test_all_primitives_are_listed() -> None:
    assert run(program("primitives")).stdout.split() == sorted(PRIMITIVES)


@pytest.mark.slow
@pytest.mark.parametrize("sanitize", REPORTED)
def test_primitives_are_clean(sanitize: str) -> None:
    """One process: what a kernel that threw leaves behind is part of it."""
    assert_passes(run(program("primitives", sanitize), *sorted(set(PRIMITIVES) - REPORTED[sanitize])))


def test_portable_context_switch() -> None:
    """What other processors than x86-64 use."""
    shim = build.Source(build.SHIM.path, (*build.SHIM.flags, "-DEFFOPS_CUDA_HOST_UCONTEXT"))
    assert_passes(run(program("primitives", shim=shim), *PRIMITIVES))


def test_library_has_what_is_declared() -> None:
    """The kernels' host functions, for bindings to call."""
    declared = re.findall(r"\b(\w+)\(DType", KERNELS_H)
    assert {*FUNCTIONS[:-2], "dwconv_bwd_scratch", "dsconv_bwd_scratch"} <= set(declared)
    symbols = subprocess.run(
        ["nm", "--dynamic", "--defined-only", "--demangle", build.library("effops_cuda_host")],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert set(re.findall(r" T effops::cuda::(\w+)\(effops::DType", symbols)) >= set(declared)


# ---- the kernels of csrc/cuda, in every way that their host functions tell apart (cuda_host/problems.cu) -------------

ONE_PATCH = "dsconv_fwd f32 1x40x17"  # it is filled again while its block of channels is multiplied
PARTS_ONE_PATCH = "dsconv_parts_fwd f32 1x40x17"
FUNCTIONS = (*re.findall(r"^void (\w+)\(DType", KERNELS_H, re.MULTILINE), ONE_PATCH, PARTS_ONE_PATCH)
PLAIN, WATCHED = "29", "197"  # of so many calls one is made, without and with a sanitizer
FEW = {"se_fwd", "se_bwd", "blur_max_pool_fwd", "blur_max_pool_bwd"}  # with 50 or 100 calls in all: one in five
EVERYTHING = os.environ.get("EFFOPS_HOST_ALL") == "1"


def problems(sanitize: str = "") -> Path:
    return build.executable("problems", build.Source(FOLDER / "problems.cu"), sanitize=sanitize)


def call_kernels(function: str, *options: str, sanitize: str = "") -> subprocess.CompletedProcess[str]:
    every = "1" if EVERYTHING else "5" if function in FEW else WATCHED if sanitize else PLAIN
    return run(problems(sanitize), "--only", f"{function} ", "--every", every, *options)


@pytest.mark.slow
@pytest.mark.parametrize("function", FUNCTIONS)
def test_kernels_do_not_depend_on_order(function: str) -> None:
    """They write all of their results and nothing else, the same bits whichever thread goes first."""
    done = {order: call_kernels(function, "--order", order) for order in ORDERS}
    for result in done.values():
        assert_passes(result)
    assert done["forward"].stdout == done["backward"].stdout == done["shuffled"].stdout


@pytest.mark.slow
@pytest.mark.parametrize("sanitize", ["thread", "address,undefined"])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_kernels_are_clean(function: str, sanitize: str) -> None:
    assert_passes(call_kernels(function, sanitize=sanitize))


def test_blocks_read_what_their_results_need() -> None:
    """The traffic of the kernels' pictures, counted: each input once a block plus halo, each output once."""
    done = run(build.executable("traffic", build.Source(FOLDER / "traffic.cu")))
    assert_passes(done)
    lines = done.stdout.splitlines()
    assert len(lines) > 100
    assert all(line.endswith(": each block loads what its results need") for line in lines)


MUTATED = [
    *("dwconv_bwd f32 2x16x9 window 3/1/1", "dwconv_stats f32 2x16x9 window 3/1/1"),
    *("dsconv_fwd f16 2x16x9 window 3/1/1", "dsconv_bwd f16 2x16x9 window 3/1/1"),
    "se_bwd f32 2x16x9 window 1/1/1",
    ONE_PATCH,
    *("dsconv_parts_fwd f16 2x16x9 window 7/1/1", "dsconv_parts_bwd f32 2x16x9 window 7/1/1", PARTS_ONE_PATCH),
    *("bsconv_fwd f16 2x16x9 window 3/1/1", "mbconv_fwd f16 2x16x9 window 3/1/1"),
]
# Of calls that are dsconv's kernels otherwise: the file of their own.
OWN_FILE = {"dsconv_parts_bwd f32 2x16x9 window 7/1/1": "dsconv_parts_input_gradient.cu"}


@pytest.mark.slow
@pytest.mark.parametrize("calls", MUTATED, ids=lambda calls: calls.split(" 2x16")[0])
def test_every_barrier_and_wait_is_needed(calls: str) -> None:
    """Without any one of them results change, or are not finite, or ThreadSanitizer sees a race."""
    whole = run(problems(), "--only", calls, "--order", "shuffled")
    assert_passes(whole)
    named = run(problems(), "--only", calls, "--sites").stdout.splitlines()
    sites = [line for line in named if re.fullmatch(r"\S+:\d+", line) and OWN_FILE.get(calls, "") in line]
    assert len(sites) >= (1 if calls in OWN_FILE else 2)
    for site in sites:
        without = run(problems(), "--only", calls, "--order", "shuffled", "--without", site)
        if without.stdout == whole.stdout:
            watched = run(problems("thread"), "--only", calls, "--every", "11", "--without", site)
            assert watched.returncode == 66 and "WARNING: ThreadSanitizer: data race" in watched.stderr, site


# ---- it sees what is wrong -------------------------------------------------------------------------------------------


@functools.cache
def line_of(text: str) -> str:
    """The only line of faults.cu that contains this, as reports name it."""
    (number,) = [n for n, line in enumerate((FOLDER / "faults.cu").read_text().splitlines(), 1) if text in line]
    return f"tests/cuda_host/faults.cu:{number}"


WAIT, BARRIERS = (
    "copy_async_wait<1>()",
    ("the tile is there, for all", "nobody reads this stage any more", "for the tree"),
)


@pytest.mark.parametrize("order", ORDERS)
def test_whole_kernels_pass(order: str) -> None:
    assert_passes(run(program("faults"), "--order", order))


@pytest.mark.slow
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("sanitize", ["thread", "address,undefined"])
def test_whole_kernels_are_clean(sanitize: str, order: str) -> None:
    assert_passes(run(program("faults", sanitize), "--order", order))


def test_sites_are_all_there() -> None:
    found = run(program("faults"), "--sites").stdout.split()
    assert found == [line_of(text) for text in (WAIT, *BARRIERS)]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("text", [WAIT, *BARRIERS[:2]])
def test_poison_surfaces(text: str, order: str) -> None:
    """Without the wait or the barrier somebody reads what is not there yet, or is being overwritten: NaN."""
    done = run(program("faults"), "--order", order, "--without", line_of(text))
    assert done.returncode == 1
    assert re.fullmatch(r"-?nan, expected 17215\n", done.stdout)


@pytest.mark.parametrize("order", ORDERS)
def test_order_of_threads_shows(order: str) -> None:
    """A sum without its barriers is another sum, whichever thread goes first."""
    done = run(program("faults"), "--order", order, "--without", line_of(BARRIERS[2]))
    assert done.returncode == 1
    assert re.fullmatch(r"\d+, expected 17215\n", done.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("text", BARRIERS)
def test_race_without_barrier(text: str) -> None:
    done = run(program("faults", "thread"), "--without", line_of(text))
    assert done.returncode == 66
    assert "WARNING: ThreadSanitizer: data race" in done.stderr
    assert "rotate_kernel tests/cuda_host/faults.cu" in done.stderr
    assert re.search(r"Location is heap block of size 1024 .*\n.*\n.* allocate_shared_memory ", done.stderr)


@pytest.mark.slow
def test_race_between_launches() -> None:
    """The sum of the partial results does not wait for them."""
    done = run(program("faults", "thread"), "--overlap")
    assert done.returncode == 66
    assert re.search(r"data race.*\n(.*\n)*.*rotate_kernel " + line_of("params.partial[blockIdx.x] = "), done.stderr)
    assert re.search(r"data race.*\n(.*\n)*.*finish_kernel " + line_of("sum += params.partial[block]"), done.stderr)
    assert re.search(r"Location is heap block .*\n.*\n.* effops::cuda_host::Buffer<float>", done.stderr)


def test_poison_between_launches() -> None:
    done = run(program("faults"), "--overlap")
    assert done.returncode == 1
    assert re.fullmatch(r"-?nan, expected 17215\n", done.stdout)


@pytest.mark.slow
def test_race_between_blocks() -> None:
    """Blocks that are not in flight together may race too: the check that writes down who ran when."""
    done = run(program("primitives", "thread"), "blocks_take_turns")
    assert "WARNING: ThreadSanitizer: data race" in done.stderr
    assert re.search(r"trace_kernel tests/cuda_host/primitives.cu", done.stderr)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("buffer", "access", "text"),
    [("input", "READ", "copy_async<4>(stage"), ("partial", "WRITE", "params.partial[blockIdx.x] = ")],
)
def test_overrun_is_named(buffer: str, access: str, text: str) -> None:
    done = run(program("faults", "address,undefined"), "--short", buffer)
    assert done.returncode == 1
    assert "ERROR: AddressSanitizer: heap-buffer-overflow" in done.stderr
    assert re.search(rf"^{access} of size [14] at", done.stderr, re.MULTILINE)
    assert line_of(text) in done.stderr
    assert "Buffer<float>::Buffer" in done.stderr


@pytest.mark.slow
def test_shared_overrun_is_named() -> None:
    done = run(program("primitives", "address,undefined"), "shared_overrun")
    assert "ERROR: AddressSanitizer: heap-buffer-overflow" in done.stderr
    assert re.search(r"in overrun_kernel .*tests/cuda_host/primitives.cu:\d+", done.stderr)
    assert "allocate_shared_memory" in done.stderr


def test_guards_without_a_sanitizer() -> None:
    """Who reads behind a buffer reads NaN, who writes there is told."""
    read, written = (run(program("faults"), "--short", buffer) for buffer in ("input", "partial"))
    assert read.returncode == 1 and re.match(r"-?nan, expected", read.stdout)
    assert written.returncode == 1 and written.stderr == "written outside of the buffer: partial\n"
