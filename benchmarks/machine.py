"""What a results file says about where it came from: machine, versions, commit, environment, measured limits."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import platform
import subprocess
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
_PROBE = Path(__file__).resolve().parent / "peers" / "probe.cpp"
_ENV_PREFIXES = (
    *("OMP_", "MKL_", "MALLOC_", "GOMP_", "KMP_", "EFFOPS_", "TORCHINDUCTOR_", "ONEDNN_", "LD_PRELOAD"),
    *("CUDA_", "CUDNN_", "CUBLAS_", "NVIDIA_TF32_OVERRIDE", "TRITON_", "PYTORCH_"),
)


def _run(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def _cpu_model() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _caches() -> dict[str, str]:
    caches = {}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        with contextlib.suppress(OSError):
            level, kind = (index / "level").read_text().strip(), (index / "type").read_text().strip()
            if kind != "Instruction":
                caches[f"L{level}"] = (index / "size").read_text().strip()
    return caches


def _isa() -> list[str]:
    wanted = ("avx2", "fma", "avx512f", "avx512_bf16", "amx_bf16")
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("flags"):
                flags = set(line.split())
                return [flag for flag in wanted if flag in flags]
    return []


def machine() -> dict:
    """CPU model, cores usable by this process, caches, instruction sets, operating system."""
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "caches": _caches(),
        "isa": _isa(),
        "system": f"{platform.system()} {platform.release()}",
        "libc": " ".join(platform.libc_ver()),
    }


def commit() -> str:
    return _run("git", "rev-parse", "HEAD") or "unknown"


def dirty() -> bool:
    """Whether the tree differs from the commit, results and plots apart; False where there is no git."""
    return bool(
        _run("git", "status", "--porcelain", "--", ".", ":(exclude)benchmarks/results", ":(exclude)docs/images")
    )


def compiler() -> str:
    """The C++ compiler found first, which builds the probe, Inductor's code and (from source) effops."""
    return _run(os.environ.get("CXX", "g++"), "--version").split("\n")[0]


def versions() -> dict:
    """Versions of everything that has a part in the timings, effops' commit, and whether the tree differs from it."""
    import torch

    import effops

    try:
        from effops import _library

        build = _library.build_info() if _library.kernels_loaded else {"missing": _library.why_not_loaded}
    except Exception as error:  # the report must say so rather than the benchmark stop
        build = {"missing": f"{type(error).__name__}: {error}"}
    return {
        "effops": effops.__version__,
        "commit": commit(),
        "dirty": dirty(),
        "kernels": build,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "compiler": compiler(),
    }


def environment(env: dict[str, str]) -> dict[str, str]:
    """The variables of `env` that can change a timing."""
    return {key: env[key] for key in sorted(env) if key.startswith(_ENV_PREFIXES)}


def date() -> str:
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def build_probe() -> Path:
    """Compile peers/probe.cpp for this machine into a temporary folder."""
    folder = Path(tempfile.mkdtemp(prefix="effops-probe-"))
    binary = folder / "probe"
    command = [os.environ.get("CXX", "g++"), "-O3", "-march=native", "-fopenmp", str(_PROBE), "-o", str(binary)]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise SystemExit(
            f"the probe needs a C++ compiler: {command[0]} was not found; install g++ or set CXX"
        ) from error
    except subprocess.CalledProcessError as error:
        raise SystemExit(f"the probe did not compile:\n{error.stderr}") from error
    return binary


def probe(binary: Path, threads: int) -> dict:
    """Measured FMA peaks and copy bandwidth on that many threads."""
    return json.loads(subprocess.run([binary, str(threads)], check=True, capture_output=True, text=True).stdout)
