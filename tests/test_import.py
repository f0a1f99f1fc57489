"""`import effops` has no side effects and works with nothing built; measured in processes of their own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import effops

PACKAGE = Path(effops.__file__).parent


def run(code: str, where: Path | None = None, **environment: str) -> str:
    """Runs Python code with effops from `where` (default: this one) and returns its output."""
    variables = {name: value for name, value in os.environ.items() if name != "EFFOPS_BACKEND"}
    variables |= {"PYTHONPATH": str(where or PACKAGE.parent), "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True, cwd=where)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with effops as it is installed where nothing was built."""
    folder = tmp_path_factory.mktemp("bare")
    shutil.copytree(PACKAGE, folder / "effops", ignore=shutil.ignore_patterns("*.so", "*.tmp", "__pycache__"))
    return folder


STATE = """
import json, sys, threading, warnings, os, random
import torch
before = set(sys.modules)
environment = dict(os.environ)
state = lambda: [torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled(), torch.initial_seed(),
    torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark, torch.get_float32_matmul_precision(),
    threading.active_count(), random.getstate(), torch.get_rng_state().sum().item(), list(warnings.filters)]
first = state()
warnings.simplefilter("error")
first = state()
import effops
print(json.dumps({
    "modules": sorted(set(sys.modules) - before),
    "same": state() == first and dict(os.environ) == environment,
    "cuda": torch.cuda.is_initialized(),
}))
"""


@pytest.mark.parametrize("built", [True, False])
def test_import_is_light_and_leaves_no_trace(built: bool, bare: Path) -> None:
    found = json.loads(run(STATE, None if built else bare))
    assert found["same"], "import effops changed the process's state"
    assert not found["cuda"], "import effops initialised CUDA"
    heavy = (  # not triton itself: torch.utils.flop_counter imports it where it is installed (90 ms)
        "effops.ops.triton_device",
        "effops.ops.triton_launch",
        "effops.ops.dwconv.triton",
        "effops.ops.dsconv.triton",
        "torch._dynamo",
        "torch._inductor",
        "torchvision",
        "matplotlib",
        "PIL",
        "effops.models",
        "effops.modules",
    )
    loaded = [m for m in found["modules"] if m.startswith(heavy)]
    assert not loaded, f"import effops loads {loaded}"


def test_works_without_triton() -> None:
    """A stand-in for a platform that has none: the import fails, and the package is not found."""
    out = run(
        """
import importlib.util, sys
sys.modules["triton"] = None
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "triton" else found(name, *rest)
import torch, effops, effops.functional as EF
try:
    EF.depthwise_conv2d(torch.ones(1, 2, 3, 3), torch.ones(2, 1, 3, 3), backend="triton")
except RuntimeError as error:
    print(str(error).splitlines()[0])
print(float(EF.depthwise_conv2d(torch.ones(1, 2, 3, 3), torch.ones(2, 1, 3, 3)).sum()))
"""
    )
    refusal, value = out.splitlines()
    assert "Triton is not installed (pip install 'triton>=3.6'; Linux only)" in refusal
    assert value == "18.0"


def test_every_public_name_is_there() -> None:
    for name in effops.__all__:
        assert getattr(effops, name) is not None
        assert name in dir(effops)


def test_works_with_nothing_built(bare: Path) -> None:
    out = run(
        """
import torch, effops, effops.functional as EF
from effops import _library
x, w, pw = torch.randn(2, 8, 9, 9, requires_grad=True), torch.randn(8, 1, 3, 3), torch.randn(4, 8, 1, 1)
y = EF.ds_conv2d(x, w, pw, padding=1)
y.sum().backward()
expected = torch.nn.functional.conv2d(torch.nn.functional.conv2d(x, w, padding=1, groups=8), pw)
assert torch.equal(y, expected) and x.grad is not None
assert not _library.kernels_loaded and _library.build_info() == {}
# The operators exist, with their fakes, only the kernels are absent.
meta = torch.ops.effops.dwconv_fwd(x.detach().to("meta"), w.to("meta"), None, None, None, None,
                                   [1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0], 0.0)
assert meta.shape == (2, 8, 9, 9) and meta.is_contiguous(memory_format=torch.channels_last)
try:
    EF.depthwise_conv2d(x, w, backend="cpp")
except RuntimeError as error:
    print(error)
""",
        bare,
    )
    first, second, *rest = out.splitlines()
    assert first == (
        "depthwise_conv2d: backend 'cpp' cannot run input float32[2,8,9,9] on cpu: the kernel library "
        "libeffops_kernels.so is not built (no C++ compiler at install time, or EFFOPS_BUILD=none); "
        "reinstall effops with a C++ compiler"
    )
    assert second == "backends, in the order 'auto' tries them:"
    assert [line.split(":")[0].strip() for line in rest] == ["triton", "cuda", "cpp", "reference"]
    assert "can run this: pass backend='reference' or 'auto'" in rest[3]


def test_a_library_that_does_not_load_is_a_reason(bare: Path, tmp_path: Path) -> None:
    shutil.copytree(bare / "effops", tmp_path / "effops")
    (tmp_path / "effops" / "libeffops_kernels.so").write_bytes(b"not a library")
    out = run(
        "from effops import _library; import effops; print(_library.kernels_loaded, _library.why_not_loaded)", tmp_path
    )
    assert out.startswith("False the kernel library ")
    assert "does not load: OSError: " in out
    info = json.loads(run("from effops.cli import main; main(['info', '--json'])", tmp_path))
    assert "does not load" in info["backends"]["cpp"]
    assert info["backends"]["reference"] == "works"


def test_schemas_of_the_library_are_those_of_the_file(cpp: str) -> None:
    import torch

    from effops import _library

    for schema in _library.schemas():
        name = schema.partition("(")[0]
        assert str(getattr(torch.ops.effops, name).default._schema) == f"effops::{schema}"


def test_environment_backend_is_read_at_import() -> None:
    code = """
import effops, effops.functional as EF, torch
print(effops.explain(EF.depthwise_conv2d, torch.ones(1, 2, 4, 4), torch.ones(2, 1, 3, 3)).calls[0].backend)
"""
    assert run(code, EFFOPS_BACKEND="reference") == "reference"
    assert run(code, EFFOPS_BACKEND="") in ("cpp", "reference")


def test_wrong_environment_backend_is_an_error_at_first_use() -> None:
    out = run(
        """
import effops, torch
x, w = torch.ones(1, 2, 4, 4), torch.ones(2, 1, 3, 3)
call = lambda backend: effops.functional.depthwise_conv2d(x, w, backend=backend)
assert call("reference").shape == (1, 2, 2, 2)
try:
    call("auto")
except ValueError as error:
    print(error)
with effops.use_backend("reference"):
    call("auto")
""",
        EFFOPS_BACKEND="fastest",
    )
    assert out == (
        "environment variable EFFOPS_BACKEND: unknown backend 'fastest'; "
        "accepted: 'auto', 'triton', 'cuda', 'cpp', 'reference'"
    )


@pytest.mark.parametrize(
    "command", [["-m", "effops"], ["-c", "import sys; from effops.cli import main; sys.exit(main())"]]
)
def test_info_command(command: list[str]) -> None:
    variables = os.environ | {"PYTHONPATH": str(PACKAGE.parent)}
    done = subprocess.run([sys.executable, *command, "info"], env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for line in ("effops: " + effops.__version__, "python: ", "kernel library:", "backends:", "  reference: works"):
        assert line in done.stdout
