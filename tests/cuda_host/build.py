"""Compiles the CUDA kernels as plain C++ for the host run (`shim.h`), without a GPU, nvcc or torch.

    python tests/cuda_host/build.py --sanitize thread

prints the path of a shared library of csrc/cuda/kernels.h's functions, which it makes if something changed. Tests call
`library` and, for a driver with a main function, `executable`; both take more sources, torch bindings for example.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SHIM = ROOT / "tests" / "cuda_host" / "shim.cpp"
KERNELS = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
SANITIZERS = ("", "address", "thread", "undefined", "address,undefined")

_COMMON = ("-std=c++20", f"-I{ROOT}", "-fPIC", "-Wall", "-Wextra")
# As a device would see them: sources that know they are on the host, symbols for reports, sums in the order written.
_KERNEL = ("-x", "c++", "-DEFFOPS_CUDA_HOST", "-O2", "-g1", "-fno-semantic-interposition")
# Whatever the sanitizer the scheduler is not watched: it touches what belongs to all fibers. Loops stay loops, because a
# call of memcpy would be watched all the same.
_SCHEDULER = ("-O3", "-g1", "-fno-tree-loop-distribute-patterns", "-fno-semantic-interposition")


def library(name: str, sources: Iterable[Path] = (), *, sanitize: str = "", flags: Sequence[str] = ()) -> Path:
    """A shared library of `sources`, the shim and the kernels; `flags` are for compiling the sources."""
    return _build(f"lib{name}.so", [*KERNELS, *sources], sanitize, flags, ["-shared"])


def executable(
    name: str, sources: Iterable[Path], *, kernels: bool = True, sanitize: str = "", flags: Sequence[str] = ()
) -> Path:
    """A program of `sources`, the shim and, unless told otherwise, the kernels."""
    return _build(name, [*(KERNELS if kernels else ()), *sources], sanitize, flags, [])


def folder(sanitize: str) -> Path:
    """Where everything built with these sanitizers lies."""
    return ROOT / "build" / ("cuda_host" + "".join(f"-{name}" for name in sanitize.split(",") if name))


def _build(output: str, sources: list[Path], sanitize: str, flags: Sequence[str], link: list[str]) -> Path:
    if sanitize not in SANITIZERS:
        raise ValueError(f"sanitize: got {sanitize!r}, expected one of {SANITIZERS}")
    place = folder(sanitize)
    place.mkdir(parents=True, exist_ok=True)
    watch = [f"-fsanitize={sanitize}", "-fno-omit-frame-pointer"] if sanitize else []
    rules = [(SHIM, [*_COMMON, *_SCHEDULER]), *((source, [*_COMMON, *_KERNEL, *watch, *flags]) for source in sources)]
    recipe = place / f"{output}.ninja"
    with _locked(place):
        _write_if_changed(recipe, "\n".join(_recipe(place / output, rules, [*link, *watch, "-lpthread"])))
        command = [_ninja(), "-f", str(recipe), "--quiet", f"-j{os.environ.get('MAX_JOBS', os.cpu_count() or 1)}"]
        done = subprocess.run(command, cwd=place, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the host run of the CUDA kernels could not be built:\n{done.stdout}{done.stderr}")
    return place / output


def _recipe(output: Path, rules: list[tuple[Path, list[str]]], link: list[str]) -> Iterator[str]:
    compiler = os.environ.get("CXX", "g++")
    yield f"rule compile\n  command = {compiler} $flags -MMD -MF $out.d -c $in -o $out\n  depfile = $out.d\n  deps = gcc"
    yield f"rule link\n  command = {compiler} $in -o $out {' '.join(link)}"
    objects = []
    for source, flags in rules:
        told_apart = hashlib.sha256(repr((compiler, str(source), flags)).encode()).hexdigest()[:10]
        objects.append(f"{source.name}.{told_apart}.o")
        yield f"build {objects[-1]}: compile {source}\n  flags = {' '.join(flags)}"
    yield f"build {output}: link {' '.join(objects)}\n"


def _ninja() -> str:
    beside = Path(sys.executable).with_name("ninja")
    found = str(beside) if beside.exists() else shutil.which("ninja")
    if not found:
        raise RuntimeError("the host run of the CUDA kernels is built with ninja: pip install ninja")
    return found


def _write_if_changed(path: Path, text: str) -> None:
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


@contextmanager
def _locked(place: Path) -> Iterator[None]:
    """One process at a time: test workers build what they need when they need it."""
    with open(place / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sanitize", default="", choices=SANITIZERS)
    print(library("effops_cuda_host", sanitize=parser.parse_args().sanitize))


if __name__ == "__main__":
    main()
