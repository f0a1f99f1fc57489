"""Random operators, shapes, strides, layouts, dtypes and epilogues, held to the same budget as the named cases.

``EFFOPS_HYPOTHESIS`` sets the number of draws over all tests of this file (`make properties DRAWS=20000`); setting it
outside CI also draws new ones each run.
"""

from __future__ import annotations

import math
import os
from typing import Any

import pytest
import torch
from conftest import require_backend
from draws import OPERATORS, Operator
from helpers import IllConditionedError, interpreted
from hypothesis import given, reject, settings

from effops import backends

DTYPES = (torch.float32, torch.bfloat16, torch.float64)
# How many draws each backend has for one of the first: an interpreted kernel takes a second, the host run 50 ms. The
# reference rounds as torch does, so that float64 tells all.
WEIGHTS = {"cpp": 1.0, "cuda": 0.2, "triton": 0.04, "reference": 0.1}


def weight(backend: str, dtype: torch.dtype) -> float:
    return 0.0 if backend == "reference" and dtype != torch.float64 else WEIGHTS[backend]


RUNS = [(name, dtype, b) for name in OPERATORS for dtype in DTYPES for b in WEIGHTS if weight(b, dtype)]
# Those that every machine with a compiler has: between them they hold the number asked for.
_CERTAIN = sum(weight(b, dtype) for _, dtype, b in RUNS if b in ("cpp", "reference"))


def draws(backend: str, dtype: torch.dtype) -> int:
    """How many of the number asked for one test draws."""
    return math.ceil(int(os.environ.get("EFFOPS_HYPOTHESIS", "2000")) * weight(backend, dtype) / _CERTAIN)


def require_kernels(operator: Operator, dtype: torch.dtype, backend: str) -> None:
    """Skips where the backend has no kernels for the operator."""
    require_backend(backend)
    (found,) = (candidate for candidate in backends.BACKENDS if candidate.name == backend)
    if backend != "reference" and operator.op not in found.operators:
        pytest.skip(f"backend {backend}: it has no kernels for {operator.op}")
    if interpreted(backend) and dtype == torch.bfloat16 and operator.products:
        pytest.skip(f"{backends.INTERPRETED_BFLOAT16_PRODUCT} (github.com/triton-lang/triton/issues/11584)")


@pytest.mark.parametrize(("name", "dtype", "backend"), RUNS, ids=str)
def test_drawn_case(name: str, dtype: torch.dtype, backend: str) -> None:
    operator = OPERATORS[name]
    require_kernels(operator, dtype, backend)

    @settings(parent=settings.get_profile("effops"), max_examples=draws(backend, dtype))
    @given(case=operator.cases(dtype))
    def hold(case: Any) -> None:
        try:
            operator.hold(case, dtype, backend)
        except IllConditionedError:  # saturated activations: no implementation has relative precision there
            reject()

    hold()
