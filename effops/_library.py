"""Loads the kernel library, or remembers why it does not load; the operators `torch.ops.effops.*` exist either way.

`libeffops_kernels.so` defines the schemas itself (so that a C++ process can load it without Python). Where it is
missing or does not load, the same strings from `schemas.inc` are defined here: fakes, `torch.export` and error messages
work then too, only the kernels are absent.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
from pathlib import Path
from typing import Any

import torch

_HERE = Path(__file__).resolve().parent
LIBRARY_PATH = _HERE / "libeffops_kernels.so"
CUDA_LIBRARY_PATH = _HERE / "libeffops_cuda.so"
SCHEMAS_PATH = _HERE / "schemas.inc"
_SCHEMA_LINE = re.compile(r'^EFFOPS_SCHEMA\("(.*)"\)\s*$', re.MULTILINE)


def schemas() -> list[str]:
    """The operator schemas of `schemas.inc`, in file order."""
    return _SCHEMA_LINE.findall(SCHEMAS_PATH.read_text(encoding="utf-8"))


def _load() -> str | None:
    """Loads the kernel library; returns None, or the reason why there are no kernels."""
    if not LIBRARY_PATH.exists():
        return (
            f"the kernel library {LIBRARY_PATH.name} is not built (no C++ compiler at install time, or "
            "EFFOPS_BUILD=none); reinstall effops with a C++ compiler"
        )
    try:
        torch.ops.load_library(str(LIBRARY_PATH))
    except Exception as error:  # a library built for another torch or another machine must not break `import effops`
        return f"the kernel library {LIBRARY_PATH} does not load: {type(error).__name__}: {error}"
    return None


why_not_loaded: str | None = _load()
kernels_loaded: bool = why_not_loaded is None

if kernels_loaded:
    lib = torch.library.Library("effops", "FRAGMENT")
else:
    lib = torch.library.Library("effops", "DEF")
    for _schema in schemas():
        lib.define(_schema)


def _load_cuda() -> str | None:
    """Loads the library of CUDA kernels; returns None, or the reason why there are none."""
    if torch.version.cuda is None:
        return "this torch is built without CUDA"
    if not CUDA_LIBRARY_PATH.exists():
        return f"{CUDA_LIBRARY_PATH.name} is not built (EFFOPS_BUILD=cuda builds it; it needs nvcc)"
    try:
        torch.ops.load_library(str(CUDA_LIBRARY_PATH))
    except Exception as error:  # as above
        return f"{CUDA_LIBRARY_PATH} does not load: {type(error).__name__}: {error}"
    return None


why_no_cuda: str | None = _load_cuda()


def define_twin(name: str, twin: str) -> None:
    """Defines operator `twin` with the schema of operator `name`; it is this process's, not the library's."""
    (schema,) = (schema for schema in schemas() if schema.startswith(f"{name}("))
    lib.define(schema.replace(name, twin, 1))


def build_info() -> dict[str, Any]:
    """What the loaded kernel library says of itself: `isa` (in use), `compiled_isas`, `compiler`; empty without one."""
    if not kernels_loaded:
        return {}
    function = ctypes.CDLL(
        str(LIBRARY_PATH), mode=os.RTLD_NOLOAD if hasattr(os, "RTLD_NOLOAD") else 0
    ).effops_build_info
    function.restype = ctypes.c_char_p
    function.argtypes = []
    return json.loads(function().decode("utf-8"))
