"""Installing effops: with and without a compiler, from a checkout and from an sdist; what a failed build says.

Nothing here uses the network, and nothing is built in the checkout itself: the sources are copied first.
"""

from __future__ import annotations

import email
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

import effops
from effops import _library, backends

ROOT = Path(__file__).resolve().parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
BUILD_VARIABLES = (
    *("EFFOPS_BUILD", "EFFOPS_SANITIZE", "CXX", "MAX_JOBS", "PYTHONPATH", "LD_PRELOAD"),
    *("CUDA_HOME", "TORCH_CUDA_ARCH_LIST"),
)
NOT_SOURCES = shutil.ignore_patterns(
    ".*cache", ".git", ".venv", ".hypothesis", "build", "dist", "runs", "*.egg-info", "__pycache__", "*.so", "*.tmp"
)

SHIPPED = ("effops", "csrc", "tests", "benchmarks")  # folders whose every source file is in the sdist

needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="building the kernel library needs a C++ compiler"
)


def run(*command: str | Path, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Runs Python with a clean set of the variables that steer a build; output and errors come back as one text."""
    environment = {name: value for name, value in os.environ.items() if name not in BUILD_VARIABLES} | variables
    return subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=cwd,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def succeed(*command: str | Path, cwd: Path, **variables: str) -> str:
    done = run(*command, cwd=cwd, **variables)
    assert done.returncode == 0, done.stdout
    return done.stdout


def build_wheel(source: Path, **variables: str) -> Path:
    """What `pip wheel --no-build-isolation .` runs, without pip."""
    code = "import setuptools.build_meta as b, sys; sys.argv[1:] = []; print(b.build_wheel('dist'))"
    succeed("-c", code, cwd=source, **variables)
    (wheel,) = (source / "dist").glob("*.whl")
    return wheel


def unpack(wheel: Path, target: Path) -> Path:
    """Puts a wheel where PYTHONPATH finds it, as `pip install --target` does with a package of this kind."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)
    return target


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of the sources as a fresh clone has them."""
    return Path(shutil.copytree(ROOT, tmp_path / "checkout", ignore=NOT_SOURCES))


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked sdist, made without torch's or a compiler's help."""
    folder = tmp_path_factory.mktemp("sdist")
    checkout = Path(shutil.copytree(ROOT, folder / "checkout", ignore=NOT_SOURCES))
    code = "import setuptools.build_meta as b, sys; sys.argv[1:] = []; b.build_sdist('dist')"
    succeed("-c", code, cwd=checkout, EFFOPS_BUILD="cpu", CXX="/nonexistent")
    (archive,) = (checkout / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    return folder / archive.name.removesuffix(".tar.gz")


def test_sdist_is_complete(sdist: Path) -> None:
    """Every source of the package, the kernels, the tests and the benchmarks is in it, and nothing that was built."""

    def files(root: Path) -> set[str]:
        found = {path.relative_to(root) for folder in SHIPPED for path in (root / folder).rglob("*") if path.is_file()}
        return {path.as_posix() for path in found if path.suffix not in (".pyc", ".so", ".tmp")}

    assert files(sdist) == files(ROOT)
    for name in ("setup.py", "pyproject.toml", "LICENSE", "README.md", "CHANGELOG.md", "CITATION.cff", "Makefile"):
        assert (sdist / name).is_file(), name
    assert not list(sdist.rglob("*.so"))


def test_pure_python_install(sdist: Path, tmp_path: Path) -> None:
    """EFFOPS_BUILD=none: a wheel for any platform, whose `info` says what is missing and whose operators work."""
    source = Path(shutil.copytree(sdist, tmp_path / "source"))
    wheel = build_wheel(source, EFFOPS_BUILD="none", CXX="/nonexistent")
    assert wheel.name == f"effops-{effops.__version__}-py3-none-any.whl"
    target = unpack(wheel, tmp_path / "site")
    top_level = {path.name for path in target.iterdir()}
    assert top_level == {"effops", f"effops-{effops.__version__}.dist-info"}
    assert {"py.typed", "schemas.inc"} <= {path.name for path in (target / "effops").iterdir()}

    info = succeed("-m", "effops", "info", cwd=tmp_path, PYTHONPATH=str(target))
    assert "libeffops_kernels.so is not built" in info
    code = (
        "import effops, torch, effops.functional as EF; print(effops.__file__); "
        "x = torch.ones(1, 4, 5, 5); print(EF.depthwise_conv2d(x, torch.ones(4, 1, 3, 3)).sum().item())"
    )
    where, total = succeed("-c", code, cwd=tmp_path, PYTHONPATH=str(target)).split()
    assert Path(where).is_relative_to(target)
    assert float(total) == 4 * 9 * 9


def test_auto_without_a_compiler_says_so_and_builds_pure_python(checkout: Path) -> None:
    said = succeed("setup.py", "--quiet", "bdist_wheel", cwd=checkout, CXX="/nonexistent")
    assert "effops: building without the kernel library: CXX='/nonexistent' is not a program that can be run;" in said
    assert [wheel.name for wheel in (checkout / "dist").iterdir()] == [f"effops-{effops.__version__}-py3-none-any.whl"]


@pytest.mark.slow
@needs_compiler
def test_wheel_with_kernels_is_built_from_the_sdist(sdist: Path, tmp_path: Path) -> None:
    """One wheel for every Python of a platform; the library in it loads."""
    source = Path(shutil.copytree(sdist, tmp_path / "source"))
    objects = ROOT / "build" / "kernels"
    if objects.is_dir() and os.environ.get("EFFOPS_COMPILE_ALL") != "1":
        # The same sources (`test_sdist_is_complete`) and flags: ninja finds the checkout's objects up to date.
        shutil.copytree(objects, source / "build" / "kernels")
    wheel = build_wheel(source, EFFOPS_BUILD="cpu", MAX_JOBS="2")
    assert re.fullmatch(rf"effops-{re.escape(effops.__version__)}-py3-none-\w+\.whl", wheel.name)
    assert not wheel.name.endswith("-any.whl")
    target = unpack(wheel, tmp_path / "site")
    code = "from effops import _library as l; print(l.kernels_loaded, l.why_not_loaded, l.LIBRARY_PATH)"
    loaded = succeed("-c", code, cwd=tmp_path, PYTHONPATH=str(target)).split()
    assert loaded == ["True", "None", str(target / "effops" / "libeffops_kernels.so")]

    # A second build compiles nothing; another time stamp on one source compiles that one.
    assert "no work to do" in succeed("setup.py", "build_ext", cwd=source, EFFOPS_BUILD="cpu")
    (source / "csrc" / "library.cpp").touch()
    assert re.findall(r"compile (\S+)", succeed("setup.py", "build_ext", cwd=source, EFFOPS_BUILD="cpu")) == [
        "csrc/library.cpp"
    ]


INSTALL = "install g++ 11 or newer (Debian and Ubuntu: apt install g++), or set EFFOPS_BUILD=none for pure Python."
STOPS = {
    "unknown-build": ({"EFFOPS_BUILD": "bogus"}, "EFFOPS_BUILD='bogus' is unknown; use one of auto, cpu, cuda, none."),
    "cuda": (
        {"EFFOPS_BUILD": "cuda", "CXX": "true", "CUDA_HOME": "/nonexistent"},
        "the CUDA kernels cannot be built: no CUDA toolkit with bin/nvcc and include/cuda_runtime.h was found in "
        "CUDA_HOME='/nonexistent'; set EFFOPS_BUILD=cpu to build without them.",
    ),
    "missing-cxx": (
        {"EFFOPS_BUILD": "cpu", "CXX": "/nonexistent"},
        f"CXX='/nonexistent' is not a program that can be run: {INSTALL}",
    ),
    "no-compiler": (
        {"EFFOPS_BUILD": "cpu", "PATH": ""},
        f"no C++ compiler (g++, c++ or clang++) was found: {INSTALL}",
    ),
    "failing-compiler": (
        {"EFFOPS_BUILD": "cpu", "CXX": "false"},
        f"compiling the kernel library with false failed (its messages are above): {INSTALL}",
    ),
    "unknown-sanitizer": (
        {"EFFOPS_BUILD": "cpu", "CXX": "true", "EFFOPS_SANITIZE": "adress"},
        "EFFOPS_SANITIZE='adress' is not possible; use a comma-separated list of address, undefined, thread "
        "(thread not together with address).",
    ),
    "sanitizers-that-exclude-each-other": (
        {"EFFOPS_BUILD": "cpu", "CXX": "true", "EFFOPS_SANITIZE": "thread,address"},
        "EFFOPS_SANITIZE='thread,address' is not possible; use a comma-separated list of address, undefined, thread "
        "(thread not together with address).",
    ),
    "unknown-jobs": (
        {"EFFOPS_BUILD": "cpu", "CXX": "true", "MAX_JOBS": "many"},
        "MAX_JOBS='many' is not a positive whole number.",
    ),
}


@pytest.mark.parametrize(("variables", "sentence"), STOPS.values(), ids=STOPS.keys())
def test_a_build_that_cannot_succeed_stops_with_one_sentence(
    checkout: Path, variables: dict[str, str], sentence: str
) -> None:
    done = run("setup.py", "--quiet", "build_ext", cwd=checkout, **variables)
    assert done.returncode == 1
    assert done.stdout.splitlines()[-1] == f"effops: {sentence}"
    assert "Traceback" not in done.stdout


@pytest.mark.parametrize(
    ("hidden", "sentence"),
    [
        (
            "torch",
            "building the kernel library needs torch: `pip install torch`, then `pip install --no-build-isolation .` "
            "(pip's isolated build cannot see an installed torch), or set EFFOPS_BUILD=none for pure Python.",
        ),
        (
            "ninja",
            "building the kernel library needs ninja: `pip install ninja`, or set EFFOPS_BUILD=none for pure Python.",
        ),
    ],
)
def test_a_build_without_its_tools_says_which(checkout: Path, hidden: str, sentence: str) -> None:
    """setup.py as it runs where torch or ninja is not installed."""
    code = (
        "import importlib.util, runpy, shutil, sys; find, which = importlib.util.find_spec, shutil.which; "
        f"importlib.util.find_spec = lambda name, *a: None if name == {hidden!r} else find(name, *a); "
        f"shutil.which = lambda name, *a, **k: None if name == {hidden!r} else which(name, *a, **k); "
        "sys.argv[:] = ['setup.py', '--quiet', 'build_ext']; runpy.run_path('setup.py')"
    )
    done = run("-c", code, cwd=checkout, EFFOPS_BUILD="cpu", CXX="true")
    assert done.returncode == 1
    assert done.stdout.splitlines()[-1] == f"effops: {sentence}"


def test_the_library_needs_torch_but_not_python() -> None:
    """So that one file serves every Python, and a C++ process too; torch is used through its C shim only."""
    if not _library.kernels_loaded:
        pytest.skip(f"there is no library to read: {_library.why_not_loaded}")
    nm = shutil.which("nm")
    if nm is None:
        pytest.skip("nm is not installed (Debian and Ubuntu: apt install binutils)")
    text = subprocess.run([nm, "-D", str(_library.LIBRARY_PATH)], check=True, capture_output=True, text=True).stdout
    symbols = [(line.split()[-2], line.split()[-1]) for line in text.splitlines()]
    undefined = {name for kind, name in symbols if kind == "U"}
    assert any(name.startswith("aoti_torch_") for name in undefined)
    assert not {name for name in undefined if re.match(r"_?Py[A-Z_]", name)}, "Python symbols"
    assert not {name for name in undefined if re.match(r"_ZNK?R?(2at|3c10|5torch)", name)}, "torch's unstable C++ ABI"
    exported = {name for kind, name in symbols if kind == "T"}
    assert exported == {"effops_build_info"}, "only what Python calls is visible"


def test_metadata(sdist: Path) -> None:
    metadata = email.message_from_string((sdist / "PKG-INFO").read_text())
    assert metadata["Version"] == effops.__version__
    required = {
        re.split(r"[^\w-]", line)[0] for line in metadata.get_all("Requires-Dist", []) if "extra ==" not in line
    }
    assert required == {"torch", "numpy", "triton"}
    assert "platform_system" in next(line for line in metadata.get_all("Requires-Dist") if line.startswith("triton"))
    assert "torch" not in " ".join(PYPROJECT["build-system"]["requires"])
    assert f"version: {effops.__version__}" in (ROOT / "CITATION.cff").read_text()
    assert effops.__version__ in (ROOT / "CHANGELOG.md").read_text()


def test_formatters_are_pinned_alike() -> None:
    """Another release formats differently: `make lint` and pre-commit must agree."""
    pinned = dict(requirement.split("==") for requirement in PYPROJECT["project"]["optional-dependencies"]["dev"])
    hooks = re.findall(r"repo: \S+/(\S+)\n\s+rev: v(\S+)", (ROOT / ".pre-commit-config.yaml").read_text())
    names = {"ruff-pre-commit": "ruff", "mirrors-clang-format": "clang-format"}
    assert {names[repository]: version for repository, version in hooks} == pinned


def test_every_environment_variable_is_in_the_readme() -> None:
    sources = [*ROOT.glob("effops/**/*.py"), *ROOT.glob("csrc/**/*.cpp"), ROOT / "setup.py"]
    text = " ".join(path.read_text() for path in sources)
    read = set(re.findall(r"(?:environ(?:\.get)?[\[(]|getenv\()\s*\"(\w+)\"", text))
    read |= set(re.findall(r"^ENV_VARIABLE = \"(\w+)\"", text, re.MULTILINE))
    assert {"EFFOPS_BACKEND", "EFFOPS_BUILD", "EFFOPS_CPU_ISA", "CXX"} <= read, "this test reads the sources wrongly"
    readme = (ROOT / "README.md").read_text()
    (table,) = re.findall(r"## Environment variables\n(.*?)\n## ", readme, re.DOTALL)
    assert read <= set(re.findall(r"^\| `(\w+)`", table, re.MULTILINE))


def test_the_readme_examples_run() -> None:
    examples = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(examples) == 2
    for example in examples:
        exec(compile(example, "README.md", "exec"), {})


def test_the_readme_names_what_exists() -> None:
    """The functions and modules of its operator table, the backends of its backend table."""
    readme = (ROOT / "README.md").read_text()
    (operators,) = re.findall(r"## Operators\n(.*?)\n## ", readme, re.DOTALL)
    rows = [row.split("|")[2:4] for row in re.findall(r"^\| .*", operators, re.MULTILINE)[1:]]
    assert len(rows) >= 5
    for functions, modules in rows:
        for name in re.findall(r"`(\w+)`", functions):
            assert callable(getattr(effops.functional, name)), name
        for name in re.findall(r"`(\w+)`", modules):
            assert issubclass(getattr(effops, name), torch.nn.Module), name
    (table,) = re.findall(r"## Backends\n(.*?)\n## ", readme, re.DOTALL)
    assert tuple(re.findall(r"^\| `(\w+)`", table, re.MULTILINE)) == backends.names()[1:]


# ---- CUDA -----------------------------------------------------------------------------------------------------------

# torch's CPU build lacks one library and, of what is in it, the kernels' library needs one function.
STREAM = "int aoti_torch_get_current_cuda_stream(int index, void** stream) { *stream = 0; return index; }"


@pytest.mark.slow
@pytest.mark.skipif(os.environ.get("EFFOPS_COMPILE_ALL") != "1", reason="takes minutes: EFFOPS_COMPILE_ALL=1")
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
@pytest.mark.skipif(torch.version.cuda is not None, reason="torch has CUDA: `make gpu` builds the library")
def test_cuda_library_builds_links_and_registers(checkout: Path, tmp_path: Path) -> None:
    """Against torch's CPU build with a stand-in for libtorch_cuda.so; nothing is run."""
    real, stand_in = Path(torch.__file__).parent, tmp_path / "stand_in" / "torch"
    (stand_in / "lib").mkdir(parents=True)
    (stand_in / "__init__.py").touch()
    (stand_in / "include").symlink_to(real / "include")
    for library in (real / "lib").iterdir():
        (stand_in / "lib" / library.name).symlink_to(library)
    source = tmp_path / "stream.c"
    source.write_text(STREAM)
    command = ["gcc", "-shared", "-fPIC", "-o", str(stand_in / "lib" / "libtorch_cuda.so"), str(source)]
    subprocess.run(command, check=True)
    succeed(
        "setup.py", "--quiet", "build", "--build-lib", tmp_path / "built", cwd=checkout,
        EFFOPS_BUILD="cuda", TORCH_CUDA_ARCH_LIST="9.0", PYTHONPATH=str(stand_in.parent),
    )  # fmt: skip
    code = (
        "import sys, torch\n"
        "for path in sys.argv[1:]: torch.ops.load_library(path)\n"
        "has = torch._C._dispatch_has_kernel_for_dispatch_key\n"
        "print(*(has(f'effops::{name}', 'CUDA') for name in ('dwconv_fwd', 'dwconv_bwd', 'dwconv_stats',\n"
        "        'dwconv_stats_bwd', 'dsconv_fwd', 'dsconv_bwd')))"
    )
    libraries = [tmp_path / "built" / "effops" / name for name in ("libeffops_kernels.so", "libeffops_cuda.so")]
    found = succeed("-c", code, *libraries, cwd=tmp_path, LD_LIBRARY_PATH=str(stand_in / "lib"))
    assert found.split() == ["True"] * 6


def setup_functions() -> dict[str, Any]:
    """What setup.py defines, without its call of setup()."""
    text = (ROOT / "setup.py").read_text().rpartition("\nsetup(")[0]
    names: dict[str, Any] = {"__file__": str(ROOT / "setup.py")}
    exec(compile(text, "setup.py", "exec"), names)
    return names


@pytest.mark.parametrize(
    ("listed", "flags"),
    [
        ("9.0", ["code=sm_90"]),
        ("8.0;9.0a+PTX", ["code=sm_80", "code=sm_90a", "code=compute_80"]),
        ("8.6, 10.0", ["code=sm_86", "code=sm_100"]),
    ],
)
def test_architectures(listed: str, flags: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", listed)
    assert [flag.split(",")[1] for flag in setup_functions()["architecture_flags"]()] == flags


@pytest.mark.parametrize("listed", ["7.5", "Hopper", "9.0;sm_90"])
def test_architectures_that_are_none(listed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", listed)
    with pytest.raises(SystemExit, match="is not a compute capability of at least 8.0"):
        setup_functions()["architecture_flags"]()
