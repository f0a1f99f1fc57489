"""Builds the kernel libraries in ``effops/``; all else about the package stands in ``pyproject.toml``.

``libeffops_kernels.so`` has the operators and their CPU kernels, ``libeffops_cuda.so`` the CUDA kernels. They hold
operators, not a Python module: no Python symbols, torch's stable ABI only, loaded by ``torch.ops.load_library``. One
file therefore serves every Python and every torch >= 2.11, and the wheel is tagged ``py3-none-<platform>``.
Environment: EFFOPS_BUILD, EFFOPS_SANITIZE, CXX, MAX_JOBS, CUDA_HOME, TORCH_CUDA_ARCH_LIST (table in README.md).

torch is not a build requirement in ``pyproject.toml``, because pip would then fetch its default build, gigabytes of
CUDA, into an isolated environment: install torch first, then effops with ``--no-build-isolation``.
"""

import importlib.metadata
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
LIBRARY = "effops.libeffops_kernels"
CUDA_LIBRARY = "effops.libeffops_cuda"
MIN_TORCH = (2, 11)
# The C shim of this torch release is what the library may use, whichever release it is compiled against.
TORCH_TARGET_VERSION = "0x{:02x}{:02x}000000000000".format(*MIN_TORCH)
INSTALL_COMPILER = "install g++ 11 or newer (Debian and Ubuntu: apt install g++)"
PURE_PYTHON = "set EFFOPS_BUILD=none for pure Python"

COMPILE_FLAGS = [
    *("-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-fvisibility-inlines-hidden", "-Wall", "-Wextra"),
    # A square root that may set errno is a call, and no loop with a call becomes vector code.
    "-fno-math-errno",
    # ISO mode (-std=c++20) turns contraction off in GCC; the kernels count on a * b + c becoming one FMA.
    "-ffp-contract=fast",
    f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}",
]
# -z defs: a symbol that libtorch does not export is an error here, not at the user's first import.
LINK_FLAGS = ["-shared", "-Wl,--as-needed"]
LINK_CHECK = "-Wl,-z,defs"
# libstdc++ comes first: libtorch_cpu re-exports some of its symbols without a version and must not be taken for their
# home, since the next release of torch need not do so.
LIBRARIES = ["-lstdc++", "-ltorch_cpu", "-lc10"]
CUDA_LIBRARIES = ["-lstdc++", "-ltorch_cuda", "-ltorch_cpu", "-lc10", "-lcudart_static", "-ldl", "-lrt", "-lpthread"]
ARCHITECTURES = "8.0;9.0;10.0+PTX"  # where TORCH_CUDA_ARCH_LIST says nothing
LEAST_ARCHITECTURE = (8, 0)
VIRTUAL = "compute_80"  # one PTX for all of them, as in tests/cuda_compile.py: what ships is what was checked


def stop(sentence: str) -> NoReturn:
    """Ends the build with one sentence and no traceback."""
    raise SystemExit(f"effops: {sentence}")


def find_compiler() -> list[str] | None:
    """The C++ compiler's command ($CXX may carry a launcher: ``CXX="ccache g++"``), or None where there is none."""
    # g++ first: only GCC compiles the AVX2 and AVX-512 sources (csrc/cpu/table.h).
    candidates = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "c++", "clang++"]
    for candidate in candidates:
        command = shlex.split(candidate)
        if shutil.which(command[0]):
            return command
    return None


def missing_compiler() -> str:
    if os.environ.get("CXX"):
        return f"CXX={os.environ['CXX']!r} is not a program that can be run"
    return "no C++ compiler (g++, c++ or clang++) was found"


def wanted_libraries() -> list[str]:
    """The libraries of this build, by EFFOPS_BUILD."""
    mode = os.environ.get("EFFOPS_BUILD", "auto")
    if mode not in ("auto", "cpu", "cuda", "none"):
        stop(f"EFFOPS_BUILD={mode!r} is unknown; use one of auto, cpu, cuda, none.")
    if mode != "auto":
        return {"none": [], "cpu": [LIBRARY], "cuda": [LIBRARY, CUDA_LIBRARY]}[mode]
    reason = None
    if not sys.platform.startswith("linux"):
        reason = f"the kernel library builds on Linux only, not on {sys.platform}"
    elif find_compiler() is None:
        reason = missing_compiler()
    if reason:
        print(f"effops: building without the kernel library: {reason}; {INSTALL_COMPILER}.", file=sys.stderr)
        return []
    reason = why_no_cuda()
    if reason:
        print(f"effops: building without the CUDA kernels: {reason}.", file=sys.stderr)
        return [LIBRARY]
    return [LIBRARY, CUDA_LIBRARY]


def torch_folder() -> Path:
    """Where torch is installed. torch is not imported: that takes seconds and is not needed."""
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        stop(
            "building the kernel library needs torch: `pip install torch`, then `pip install --no-build-isolation .` "
            f"(pip's isolated build cannot see an installed torch), or {PURE_PYTHON}."
        )
    version = importlib.metadata.version("torch")
    numbers = re.match(r"(\d+)\.(\d+)", version)
    if not numbers or tuple(map(int, numbers.groups())) < MIN_TORCH:
        least = ".".join(map(str, MIN_TORCH))
        stop(f"the kernel library needs torch >= {least}, got {version}: `pip install -U torch`.")
    return Path(spec.submodule_search_locations[0])


def find_ninja() -> str:
    """ninja beside this Python (the environment may not be activated), else on PATH, else in the package ninja."""
    beside = shutil.which("ninja", path=str(Path(sys.executable).parent))
    ninja = beside or shutil.which("ninja") or packaged_ninja()
    if ninja is None:
        stop(f"building the kernel library needs ninja: `pip install ninja`, or {PURE_PYTHON}.")
    return ninja


def packaged_ninja() -> str | None:
    """The program in a ninja package that lies in a folder of PYTHONPATH, where nothing puts it on PATH."""
    spec = importlib.util.find_spec("ninja")
    if spec is None or spec.origin is None:
        return None
    folder = Path(spec.origin).parent
    places = (folder / "data" / "bin", folder.parent / "bin")  # of older packages, of newer ones
    return next(filter(None, (shutil.which("ninja", path=str(place)) for place in places)), None)


# ---- CUDA -----------------------------------------------------------------------------------------------------------


def find_toolkit() -> Path | None:
    """The CUDA toolkit's folder: $CUDA_HOME, else the one that nvcc on PATH belongs to, else /usr/local/cuda."""
    if os.environ.get("CUDA_HOME"):
        candidates = [Path(os.environ["CUDA_HOME"])]
    else:
        nvcc = shutil.which("nvcc")
        candidates = [Path(nvcc).resolve().parents[1]] if nvcc else []
        candidates.append(Path("/usr/local/cuda"))
    return next((folder for folder in candidates if (folder / "bin/nvcc").exists() and has_headers(folder)), None)


def has_headers(toolkit: Path) -> bool:
    return (toolkit / "include/cuda_runtime.h").exists()


def why_no_cuda() -> str | None:
    """Why the CUDA kernels cannot be built here, or None."""
    if find_toolkit() is None:
        where = f"in CUDA_HOME={os.environ['CUDA_HOME']!r}" if os.environ.get("CUDA_HOME") else "(or set CUDA_HOME)"
        return f"no CUDA toolkit with bin/nvcc and include/cuda_runtime.h was found {where}"
    if importlib.util.find_spec("torch") is None:
        return "torch is not installed"
    if not (torch_folder() / "lib/libtorch_cuda.so").exists():
        return f"torch {importlib.metadata.version('torch')} is built without CUDA"
    return None


def architecture_flags() -> list[str]:
    """nvcc's -gencode flags for TORCH_CUDA_ARCH_LIST, which lists numbers ("8.0;9.0+PTX"), not names."""
    listed = os.environ.get("TORCH_CUDA_ARCH_LIST") or ARCHITECTURES
    flags = []
    for entry in filter(None, re.split(r"[;, ]+", listed)):
        match = re.fullmatch(r"(\d+)\.(\d)(a?)(\+PTX)?", entry)
        if not match or (int(match[1]), int(match[2])) < LEAST_ARCHITECTURE:
            stop(
                f"TORCH_CUDA_ARCH_LIST={listed!r}: {entry!r} is not a compute capability of at least 8.0 "
                "(examples: 8.0, 9.0, 10.0+PTX)."
            )
        flags.append(f"-gencode=arch={VIRTUAL},code=sm_{match[1]}{match[2]}{match[3]}")
        if match[4]:
            flags.append(f"-gencode=arch={VIRTUAL},code={VIRTUAL}")
    return list(dict.fromkeys(flags))


def cuda_build() -> tuple[list[str], list[str], list[str]]:
    """nvcc's command for a kernel source, and what the C++ compiler and the linker need besides."""
    toolkit = find_toolkit()
    nvcc = [
        *(str(toolkit / "bin/nvcc"), "-std=c++20", "-O3", "-I.", "-Xcompiler=-fPIC,-fvisibility=hidden"),
        *architecture_flags(),
    ]
    folders = [toolkit / name for name in ("lib64", "lib", "targets/x86_64-linux/lib")]
    return nvcc, ["-DUSE_CUDA", f"-isystem{toolkit / 'include'}"], [f"-L{f}" for f in folders if f.is_dir()]


# ---- ninja ----------------------------------------------------------------------------------------------------------


def sanitizers() -> list[str]:
    """EFFOPS_SANITIZE as a sorted list, checked."""
    names = sorted({name.strip() for name in os.environ.get("EFFOPS_SANITIZE", "").split(",")} - {""})
    unknown = set(names) - {"address", "undefined", "thread"}
    if unknown or {"address", "thread"} <= set(names):
        stop(
            f"EFFOPS_SANITIZE={os.environ['EFFOPS_SANITIZE']!r} is not possible; "
            "use a comma-separated list of address, undefined, thread (thread not together with address)."
        )
    return names


def job_limit() -> list[str]:
    jobs = os.environ.get("MAX_JOBS", "")
    if jobs and not (jobs.isdecimal() and int(jobs) > 0):
        stop(f"MAX_JOBS={jobs!r} is not a positive whole number.")
    return ["-j", jobs] if jobs else []


def ninja_file(name: str, compiler: list[str], torch: Path, sources: list[str], sanitize: list[str]) -> str:
    """The build as ninja text, with paths relative to the repository so that no absolute path enters the binary."""

    def command(*words: str) -> str:
        return shlex.join(words).replace("$", "$$")

    cflags = [*COMPILE_FLAGS, "-I.", f"-isystem{torch / 'include'}"]
    ldflags = [*LINK_FLAGS, f"-L{torch / 'lib'}"]
    libraries = LIBRARIES
    if sanitize:
        both = [f"-fsanitize={','.join(sanitize)}", "-fno-sanitize-recover=all"]
        if "clang" in compiler[-1]:
            both.append("-shared-libasan")
        cflags += [*both, "-O1", "-g", "-fno-omit-frame-pointer"]
        ldflags += both
    else:
        ldflags.append(LINK_CHECK)  # the sanitizers' own symbols come from a preloaded runtime
    folder = build_folder(name, sanitize)
    lines = ["ninja_required_version = 1.5", f"builddir = {folder}"]
    if name == CUDA_LIBRARY:
        nvcc, more_cflags, more_ldflags = cuda_build()
        cflags, ldflags, libraries = cflags + more_cflags, ldflags + more_ldflags, CUDA_LIBRARIES
        lines += [
            "rule kernels",
            f"  command = {command(*nvcc)} -MD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "  description = compile $in",
        ]
    lines += [
        "rule compile",
        f"  command = {command(*compiler, *cflags)} -MD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = compile $in",
        "rule link",
        f"  command = {command(*compiler, *ldflags)} $in -o $out {command(*libraries)}",
        "  description = link $out",
    ]
    objects = []
    for source in sources:
        objects.append(f"{folder}/{source}.o")
        lines.append(f"build {objects[-1]}: {'kernels' if source.endswith('.cu') else 'compile'} {source}")
    lines.append(f"build {library_file(name, sanitize)}: link {' '.join(objects)}")
    return "\n".join(lines) + "\n"


def build_folder(name: str, sanitize: list[str]) -> str:
    """Where objects stay between builds, so that only what changed is compiled; sanitized ones have their own folder.

    setuptools' own ``build_temp`` would not do: it is a new temporary folder for each editable install.
    """
    return "-".join(["build/kernels" if name == LIBRARY else "build/cuda", *sanitize])


def library_file(name: str, sanitize: list[str]) -> str:
    return f"{build_folder(name, sanitize)}/{name.split('.')[-1]}.so"


class BuildKernels(build_ext):
    """Compiles the sources with ninja and links them into a plain shared object."""

    def get_ext_filename(self, fullname: str) -> str:
        return f"{os.path.join(*fullname.split('.'))}.so"  # no CPython suffix: it is not a Python module

    def build_extension(self, ext: Extension) -> None:
        compiler = find_compiler()
        if not sys.platform.startswith("linux"):
            stop(f"the kernel library builds on Linux only, not on {sys.platform}; {PURE_PYTHON}.")
        if compiler is None:
            stop(f"{missing_compiler()}: {INSTALL_COMPILER}, or {PURE_PYTHON}.")
        if not (ROOT / "csrc/library.cpp").exists():
            stop(f"csrc/library.cpp is missing: build from a complete checkout or sdist, or {PURE_PYTHON}.")
        if len(self.extensions) > 1 and (reason := why_no_cuda()):  # before minutes go into the first library
            stop(f"the CUDA kernels cannot be built: {reason}; set EFFOPS_BUILD=cpu to build without them.")
        sanitize = sanitizers()
        library = library_file(ext.name, sanitize)
        folder = ROOT / build_folder(ext.name, sanitize)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "build.ninja").write_text(ninja_file(ext.name, compiler, torch_folder(), ext.sources, sanitize))
        command = [find_ninja(), *job_limit(), "-f", str(folder / "build.ninja"), library]
        try:
            subprocess.run(command, cwd=ROOT, check=True, stdin=subprocess.DEVNULL)
        except (OSError, subprocess.CalledProcessError):
            stop(
                f"compiling the kernel library with {shlex.join(compiler)} failed (its messages are above): "
                f"{INSTALL_COMPILER}, or {PURE_PYTHON}."
            )
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        # Written beside and renamed: overwriting a library that a running process has mapped would crash that process.
        shutil.copyfile(ROOT / library, target.with_suffix(".tmp"))
        os.replace(target.with_suffix(".tmp"), target)


class PlatformWheel(bdist_wheel):
    """A wheel with the library fits one platform but any Python; without it, anything."""

    def get_tag(self) -> tuple[str, str, str]:
        python, abi, platform = super().get_tag()
        return (python, abi, platform) if self.root_is_pure else ("py3", "none", platform)


# What each library is compiled from.
SOURCES = {
    LIBRARY: ("csrc/library.cpp", "csrc/bindings/*.cpp", "csrc/cpu/*.cpp"),
    CUDA_LIBRARY: ("csrc/bindings/*.cpp", "csrc/cuda/*.cpp", "csrc/cuda/*.cu"),
}


def extension(name: str) -> Extension:
    paths = [path for pattern in SOURCES[name] for path in sorted(ROOT.glob(pattern))]
    return Extension(name, [path.relative_to(ROOT).as_posix() for path in paths])


setup(
    ext_modules=[extension(name) for name in wanted_libraries()],
    cmdclass={"build_ext": BuildKernels, "bdist_wheel": PlatformWheel},
)
