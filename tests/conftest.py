"""Fixtures of the whole suite: backends, seeds, poisoned memory, thread counts, GPU skips, hypothesis profiles."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator

import pytest
import torch
from cuda_host import build

# Without a GPU, Triton kernels are interpreted and CUDA kernels run on the host; effops and Triton read this once, at
# their import.
why_no_host_run: str | None = None
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        os.environ["EFFOPS_CUDA_HOST"] = str(build.operators())
    except RuntimeError as error:
        why_no_host_run = str(error)

from helpers import interpreted, poison_memory
from hypothesis import HealthCheck, settings

from effops import _library, backends

# Every test that takes `backend` runs once for each name. A new backend joins by adding its name here and, where it can
# be absent, the reason to why_backend_missing.
BACKENDS = ("reference", "cpp", "triton", "cuda")

settings.register_profile(
    "effops",
    derandomize="EFFOPS_HYPOTHESIS" not in os.environ or "CI" in os.environ,
    database=None,
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.load_profile("effops")


def why_backend_missing(name: str) -> str | None:
    """Why ``name`` cannot be tested here, or None."""
    if name == "cpp" and not _library.kernels_loaded:
        return f"backend cpp: {_library.why_not_loaded}"
    if name in ("triton", "cuda"):
        missing = next(backend for backend in backends.BACKENDS if backend.name == name).missing
        if name == "cuda" and why_no_host_run:
            missing = why_no_host_run
        return missing and f"backend {name}: {missing}"
    return None


def require_backend(name: str) -> None:
    """Skips with the recorded reason; fails instead where the environment says that the backend must be there."""
    reason = why_backend_missing(name)
    if reason is None:
        return
    if os.environ.get(f"EFFOPS_REQUIRE_{name.upper()}") == "1":
        pytest.fail(f"EFFOPS_REQUIRE_{name.upper()}=1, but {reason}", pytrace=False)
    pytest.skip(reason)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA GPU: torch.cuda.is_available() is False")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call() -> Iterator[None]:
    """Skips a test at the one thing that the Triton backend refuses only because it is interpreted."""
    try:
        return (yield)
    except RuntimeError as error:
        if backends.INTERPRETED_BFLOAT16_PRODUCT in str(error):
            pytest.skip(f"{backends.INTERPRETED_BFLOAT16_PRODUCT} (github.com/triton-lang/triton/issues/11584)")
        raise


@pytest.fixture(params=("reference", "triton", "cuda"))
def float16_backend(request: pytest.FixtureRequest) -> str:
    """The backends that take float16 (the C++ kernels do not)."""
    require_backend(request.param)
    return request.param


def why_not_interpreted(node: pytest.Item) -> str | None:
    """Why `make test` leaves this test out where Triton kernels are interpreted."""
    marker = node.get_closest_marker("slow_interpreted")
    if marker:
        return marker.args[0]
    # The cases are there for the C++ kernels' many paths; a Triton kernel has one path for most of them.
    parameters = node.callspec.params.keys() - {"backend"}
    share = 3 if "dtype" in parameters else 2 if parameters else 1
    if zlib.crc32(node.nodeid.encode()) % share:
        return f"one case in {share} is run"
    return None


def require_share(name: str, node: pytest.Item) -> str:
    """`require_backend`, and skips what is left out where kernels are interpreted; returns the name."""
    require_backend(name)
    if interpreted(name) and os.environ.get("EFFOPS_INTERPRET_ALL") != "1":
        reason = why_not_interpreted(node)
        if reason:
            pytest.skip(f"interpreted kernels: {reason}; EFFOPS_INTERPRET_ALL=1 (make test-all) runs it")
    return name


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    """The name of every backend in turn; the Triton kernels are interpreted where there is no GPU."""
    return require_share(request.param, request.node)


@pytest.fixture
def cpp() -> str:
    """For tests of the kernel library itself (raw operators, threads, instruction sets)."""
    require_backend("cpp")
    return "cpp"


@pytest.fixture
def triton() -> str:
    """For tests of the Triton backend itself; they run interpreted where there is no GPU."""
    require_backend("triton")
    return "triton"


@pytest.fixture
def cuda() -> str:
    """For tests of the CUDA backend itself; its kernels run on the host where there is no GPU."""
    require_backend("cuda")
    return "cuda"


@pytest.fixture(autouse=True)
def _clean_state() -> Iterator[None]:
    """Seeds torch, NaN-fills uninitialised memory (an element nobody wrote then fails its test), restores threads.

    float32 is float32: torch's convolutions take TF32 unless told otherwise.
    """
    tf32 = torch.backends.cudnn.conv.fp32_precision == "tf32"
    torch.backends.cudnn.allow_tf32 = False  # after conv.fp32_precision = "ieee" torch.export would raise
    threads = torch.get_num_threads()
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    poison_memory()
    yield
    torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
    torch.utils.deterministic.fill_uninitialized_memory = fill
    torch.set_num_threads(threads)
    torch.backends.cudnn.allow_tf32 = tf32
