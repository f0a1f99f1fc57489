"""What the GPU and its software are; run as a program it prints that as JSON, so that a broken driver hangs only it."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

if __package__ in (None, ""):  # run as a program
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

_TEST_PACKAGES = ("pytest", "pytest_benchmark", "hypothesis")
_SMI = "clocks.sm,clocks.mem,temperature.gpu,power.draw"


def describe() -> dict:
    """{"gpu": name or None, "why_not": reason, "packages": [...], "backends": [...], ...}; never raises."""
    found = {"packages": [name for name in _TEST_PACKAGES if importlib.util.find_spec(name)]}
    try:
        import torch
    except Exception as error:
        return found | _without(f"torch cannot be imported: {type(error).__name__}: {error}")
    found |= {"torch": torch.__version__}
    try:
        found["backends"] = _backends()
    except Exception as error:
        return found | _without(f"effops cannot be imported: {type(error).__name__}: {error}")
    if not torch.version.cuda:
        return found | _without(f"torch {torch.__version__} is not built for CUDA")
    try:
        if not torch.cuda.is_available():
            return found | _without("torch.cuda.is_available() is False: no GPU, or no driver for this torch")
        return found | _gpu(torch)
    except Exception as error:
        return found | _without(f"the GPU cannot be used: {type(error).__name__}: {error}")


def _without(reason: str) -> dict:
    return {"gpu": None, "why_not": reason}


def _backends() -> list[str]:
    """The accelerated backends and "auto"; the reference is measured where auto takes it, cpp is the CPU's."""
    from effops import backends

    return [name for name in backends.names() if name not in ("cpp", "reference")]


def _gpu(torch) -> dict:
    properties = torch.cuda.get_device_properties(0)
    torch.zeros(1, device="cuda").add_(1).item()  # a GPU that is listed may still refuse to work
    return {
        "gpu": properties.name,
        "why_not": "",
        "count": torch.cuda.device_count(),
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "l2_bytes": properties.L2_cache_size,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "triton": _triton(),
        "driver": smi("driver_version").get("driver_version", "unknown"),
    }


def _triton() -> str:
    try:
        import triton
    except ImportError as error:
        return f"none ({error})"
    return triton.__version__


def smi(fields: str = _SMI) -> dict[str, str]:
    """What nvidia-smi says of the first GPU; empty where there is no nvidia-smi. Nothing depends on it."""
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits", "--id=0"]
    try:
        line = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.splitlines()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return {}
    return dict(zip(fields.split(","), (part.strip() for part in line.split(",")), strict=False))


if __name__ == "__main__":
    print(json.dumps(describe()))
