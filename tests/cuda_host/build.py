"""Compiles the CUDA kernels as plain C++ for the host run (`shim.h`), without a GPU, nvcc or torch.

    python tests/cuda_host/build.py --sanitize thread

prints the path of a shared library of csrc/cuda/kernels.h's functions, which it makes if something changed. Tests call
`library`, `operators` for one with torch bindings, `executable` for a driver with a main function, and `standalone`.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TORCH_TARGET_VERSION = "0x020b000000000000"  # as in setup.py
SANITIZERS = ("", "address", "thread", "undefined", "address,undefined")

_COMMON = ("-std=c++20", "-I.", "-fPIC", "-fno-semantic-interposition", "-g1", "-Wall", "-Wextra")
_KERNEL = ("-x", "c++", "-DEFFOPS_CUDA_HOST")
# Sanitized code takes two thirds of the compile time at -O1, and that is most of what a sanitized test takes.
_OPTIMISED, _WATCHED = "-O2", "-O1"
# No sanitizer watches the scheduler, which touches what belongs to all fibers. Loops stay loops: a call of memcpy would
# be watched all the same.
_SCHEDULER = ("-O3", "-fno-tree-loop-distribute-patterns")


@dataclass(frozen=True)
class Source:
    """A file and the flags that it alone is compiled with."""

    path: Path
    flags: tuple[str, ...] = ()


SHIM = Source(ROOT / "tests" / "cuda_host" / "shim.cpp", _SCHEDULER)
KERNELS = tuple(Source(path) for path in sorted((ROOT / "csrc" / "cuda").glob("*.cu")))


def library(name: str, *more: Source, sanitize: str = "", link: tuple[str, ...] = ()) -> Path:
    """A shared library of the kernels, the shim and more sources."""
    return _build(f"lib{name}.so", SHIM, KERNELS + more, sanitize, "-shared", *link)


def operators(sanitize: str = "") -> Path:
    """The library that EFFOPS_CUDA_HOST wants: torch operators on the kernels of the host run."""
    if not KERNELS:
        raise RuntimeError(f"the sources of the CUDA kernels are not in {ROOT}")
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise RuntimeError("the operators of the host run are compiled against torch, which is not installed")
    torch = Path(spec.origin).parent
    flags = (f"-isystem{torch / 'include'}", f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}")
    bindings = [ROOT / "tests" / "cuda_host" / "bindings.cpp", *sorted((ROOT / "csrc" / "bindings").glob("*.cpp"))]
    link = ("-lstdc++", f"-L{torch / 'lib'}", "-ltorch_cpu", "-lc10")
    return library("effops_cuda_host", *(Source(path, flags) for path in bindings), sanitize=sanitize, link=link)


def executable(name: str, *sources: Source, sanitize: str = "") -> Path:
    """A program of these sources, the shim and the kernels."""
    return _build(name, SHIM, KERNELS + sources, sanitize)


def standalone(name: str, *sources: Source, shim: Source = SHIM, sanitize: str = "") -> Path:
    """A program of sources that bring kernels of their own, and the shim."""
    return _build(name, shim, sources, sanitize)


def folder(sanitize: str) -> Path:
    """Where everything built with these sanitizers lies."""
    return ROOT / "build" / ("cuda_host" + "".join(f"-{name}" for name in sanitize.split(",") if name))


def _build(name: str, shim: Source, sources: Iterable[Source], sanitize: str, *link: str) -> Path:
    if sanitize not in SANITIZERS:
        raise ValueError(f"sanitize: got {sanitize!r}, expected one of {SANITIZERS}")
    place = folder(sanitize)
    place.mkdir(parents=True, exist_ok=True)
    watch = (f"-fsanitize={sanitize}", "-fno-omit-frame-pointer") if sanitize else ()
    kernel = (*_COMMON, *_KERNEL, _WATCHED if sanitize else _OPTIMISED, *watch)
    compiled = [Source(shim.path, _COMMON + shim.flags)]
    compiled += [Source(source.path, kernel + source.flags) for source in sources]
    recipe = place / f"{name}.ninja"
    with _locked(place):
        recipe.write_text("\n".join(_recipe(place, name, compiled, " ".join([*link, *watch, "-lpthread"]))))
        command = [_ninja(), "-f", str(recipe), "--quiet", f"-j{os.environ.get('MAX_JOBS', os.cpu_count() or 1)}"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the host run of the CUDA kernels could not be built:\n{done.stdout}{done.stderr}")
    return place / name


def _recipe(place: Path, name: str, sources: list[Source], link: str) -> Iterator[str]:
    """The build as ninja text, run in the repository: messages of the host run name files by their paths there."""
    compiler = os.environ.get("CXX", "g++")
    inside = place.relative_to(ROOT)
    yield f"builddir = {inside}"
    command = f"{compiler} $flags -MMD -MF $out.d -c $in -o $out"
    yield f"rule compile\n  command = {command}\n  depfile = $out.d\n  deps = gcc"
    yield f"rule link\n  command = {compiler} $in -o $out {link}"
    objects = []
    for source in sources:
        path = source.path.relative_to(ROOT) if source.path.is_relative_to(ROOT) else source.path
        told_apart = hashlib.sha256(repr((compiler, str(path), source.flags)).encode()).hexdigest()[:10]
        objects.append(f"{inside}/{path.name}.{told_apart}.o")
        yield f"build {objects[-1]}: compile {path}\n  flags = {' '.join(source.flags)}"
    yield f"build {inside}/{name}: link {' '.join(objects)}\n"


def _ninja() -> str:
    beside = Path(sys.executable).with_name("ninja")
    found = str(beside) if beside.exists() else shutil.which("ninja")
    if not found:
        raise RuntimeError("the host run of the CUDA kernels is built with ninja: pip install ninja")
    return found


@contextmanager
def _locked(place: Path) -> Iterator[None]:
    """One process at a time: test workers build what they need when they need it."""
    with open(place / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sanitize", default="", choices=SANITIZERS)
    print(library("effops_cuda_kernels", sanitize=parser.parse_args().sanitize))


if __name__ == "__main__":
    main()
