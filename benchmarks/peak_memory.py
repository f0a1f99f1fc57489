"""Peak memory of a training step: how far a process's resident memory rises above what it held before the step.

The step runs in a process of its own (`python -m benchmarks.peak_memory CASE BATCH PEER VARIANT` prints the bytes),
whose allocator returns what is freed at once, so that scratch inside kernels counts as well as tensors. Code and
libraries are brought in beforehand by a step on a single image. Linux only: the kernel's own high-water mark is reset
and read.
"""

from __future__ import annotations

import ctypes
import gc
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

# Blocks from 64 KB on are mapped and unmapped one by one; what is freed below leaves the heap's end at once.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_TOP_PAD_": "0"}


def of_module(case: str, batch: int, peer: str, variant: str) -> int:
    """The bytes for one of `training.MODULES`, on one thread.

    Raises:
        RuntimeError: the process failed.
    """
    env = {key: value for key, value in os.environ.items() if not key.startswith("MALLOC_")} | ALLOCATOR
    command = [sys.executable, "-m", "benchmarks.peak_memory", case, str(batch), peer, variant]
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run(command, env=env, cwd=root, capture_output=True, text=True, timeout=600)
    if done.returncode:
        raise RuntimeError(f"peak memory of {case} by {peer}: {done.stderr.strip().splitlines()[-1]}")
    return int(done.stdout)


def rise(step: Callable[[], object]) -> int:
    """How many bytes the resident memory rises above the present while `step` runs."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark becomes the present
    before = _status("VmRSS")
    step()
    return max(0, _status("VmHWM") - before)


def _status(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field + ":"))
    return int(line.split()[1]) * 1024


def main() -> None:
    import torch

    from benchmarks.training import ModuleTraining

    case, batch, peer, variant = sys.argv[1:]
    torch.set_num_threads(1)
    ModuleTraining(case, 1).step(peer, variant)()
    step = ModuleTraining(case, int(batch)).step(peer, variant)
    print(rise(step))


if __name__ == "__main__":
    main()
