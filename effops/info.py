"""What a bug report needs: versions, CPU, backends and why not the others. Standard library and torch; never throws."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Callable
from importlib import metadata
from typing import Any

__all__ = ["collect", "text"]

# Every environment variable that effops or its build reads.
ENVIRONMENT = (
    "EFFOPS_BACKEND",
    "EFFOPS_CPU_ISA",
    "EFFOPS_BUILD",
    "EFFOPS_SANITIZE",
    "EFFOPS_CUDA_HOST",
    "TRITON_INTERPRET",
    "CXX",
    "MAX_JOBS",
    "CUDA_HOME",
    "TORCH_CUDA_ARCH_LIST",
    "OMP_NUM_THREADS",
)


def _safe(function: Callable[[], Any]) -> Any:
    """The function's result, or the error as text: a report of a broken machine is the one that is needed most."""
    try:
        return function()
    except Exception as error:
        return f"unknown ({type(error).__name__}: {error})"


def _cpu() -> str:
    if sys.platform.startswith("linux"):
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _torch() -> dict[str, Any]:
    import torch

    return {
        "torch": torch.__version__,
        "torch cuda build": torch.version.cuda or "no",
        "cpu capability of torch": _safe(torch.backends.cpu.get_cpu_capability),
        "threads": torch.get_num_threads(),
    }


def _backends() -> dict[str, str]:
    """For each backend: works, or why not, judged on a small float32 input on the device it is for."""
    import torch

    from effops import backends

    def verdict(backend: backends.Backend) -> str:
        device = "cuda" if backend.device == "cuda" and torch.cuda.is_available() else "cpu"
        x = torch.zeros(1, 8, 8, 8, device=device)
        geometry = [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0]
        call = backends.Call("dwconv", "info", x, x.new_zeros(8, 1, 3, 3), None, geometry, (1, 8, 8, 8))
        return "; ".join(backend.why_not(call)) or "works"

    return {backend.name: _safe(lambda b=backend: verdict(b)) for backend in backends.BACKENDS}


def _gpus() -> list[str]:
    import torch

    properties = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return [f"{p.name}, capability {p.major}.{p.minor}, {p.total_memory >> 20} MiB" for p in properties] or ["none"]


def _kernels() -> dict[str, Any]:
    from effops import _library

    if not _library.kernels_loaded:
        return {"loaded": False, "why not": _library.why_not_loaded}
    return {"loaded": True, "file": str(_library.LIBRARY_PATH), **_library.build_info()}


def _cuda_kernels() -> dict[str, Any]:
    from effops import _library

    if _library.why_no_cuda:
        return {"loaded": False, "why not": _library.why_no_cuda}
    return {"loaded": True, "file": str(_library.CUDA_LIBRARY_PATH)}


def _effops() -> str:
    import effops

    return effops.__version__


def collect() -> dict[str, Any]:
    """The report as a dictionary of plain values.

    Example:
        >>> from effops import info
        >>> report = info.collect()
        >>> report["effops"] == effops.__version__, report["backends"]["reference"]
        (True, 'works')
    """
    return {
        "effops": _safe(_effops),
        "python": platform.python_version(),
        "platform": _safe(platform.platform),
        "cpu": _safe(_cpu),
        "cores": os.cpu_count(),
        "torch": _safe(_torch),
        "gpus": _safe(_gpus),
        "packages": {name: _safe(lambda name=name: _version(name)) for name in ("numpy", "triton")},
        "kernel library": _safe(_kernels),
        "CUDA kernel library": _safe(_cuda_kernels),
        "backends": _safe(_backends),
        "environment": {name: os.environ.get(name, "(not set)") for name in ENVIRONMENT},
    }


def text(report: dict[str, Any], indent: int = 0) -> str:
    """The report as indented lines.

    Args:
        report: of `collect`, or a part of it.
        indent: spaces ahead of its lines.

    Example:
        >>> from effops import info
        >>> print(info.text({"backends": {"reference": "works"}, "gpus": ["none"]}))
        backends:
          reference: works
        gpus: none
    """
    lines = []
    for key, value in report.items():
        if isinstance(value, dict):
            lines.append(f"{' ' * indent}{key}:")
            lines.append(text(value, indent + 2))
        else:
            shown = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else value
            lines.append(f"{' ' * indent}{key}: {shown}")
    return "\n".join(lines)
