"""effops: the convolution chains of efficient CNNs, fused, for PyTorch.

`effops.functional` holds the functions, `effops.FusedDSConv` and its neighbours the modules, `effops.create_model` the
papers' models. `python -m effops info` tells which backends work here, and why the others do not.
"""

from __future__ import annotations

import importlib
from typing import Any

from effops import autograd, functional
from effops.backends import explain, use_backend

__version__ = "0.1.0"

# Loaded when first used, so that `import effops` stays light.
_LAZY = {
    "BSConvS": "effops.modules",
    "BSConvU": "effops.modules",
    "BlurMaxPool2d": "effops.modules",
    "BlurPool2d": "effops.modules",
    "DepthwiseConv2d": "effops.modules",
    "DownsamplingBlock": "effops.modules",
    "EffNetBlock": "effops.modules",
    "FixedFilterConv2d": "effops.modules",
    "FusedDSConv": "effops.modules",
    "HalfIdentityBlock": "effops.modules",
    "InvertedResidual": "effops.modules",
    "MixConv2d": "effops.modules",
    "MulticeptionConv2d": "effops.modules",
    "SeparableConvPool2d": "effops.modules",
    "SharedDepthwiseConv2d": "effops.modules",
    "SqueezeExcite": "effops.modules",
    "create_model": "effops.models",
    "list_models": "effops.models",
    "orthonormal_loss": "effops.modules",
}

__all__ = ["__version__", "autograd", "explain", "functional", "use_backend", *_LAZY]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'effops' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(_LAZY))
