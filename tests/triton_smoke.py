"""Every Triton operator once or twice under Triton's interpreter, against the oracle: `python tests/triton_smoke.py`.

It is small because it is run with each Triton that must work; the operators' own tests are thorough with one of them.
TRITON_INTERPRET=1 must be set. bfloat16 is left out: the interpreter's bfloat16 products are garbage.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable

import torch
from cases import DS_CASES, DW_CASES, DsCase, DwCase
from helpers import (
    Tensors,
    assert_within_budget,
    geometry_of,
    gradients,
    make_grad_output,
    make_tensors,
    oracle,
    oracle_stats,
    present,
    to_float64,
)
from torch import Tensor
from triton_problems import backward_arguments, forward_arguments, own_tensors, room

DTYPES = (torch.float32, torch.float16, torch.float64)
CASES = ("k3s1-c8-multiplier3-cl", "k3s2-c33-odd_w", "k3s1-c12-16-passthrough-keep", "k3s2-c17-9-odd_hw-nchw")
STATS_CASES = ("k3s2-c33-odd_w",)


def compare(
    what: str, names: Iterable[str], actual: Iterable[Tensor], truth: Iterable[Tensor], torchs: Iterable
) -> None:
    for name, *results in zip(names, actual, truth, torchs, strict=True):
        assert_within_budget(*results, f"{what} {name}", computed_in=results[0].dtype)


def check_convolution(room_name: str, case: DwCase | DsCase, dtype: torch.dtype) -> None:
    """Output and every gradient."""
    forward, backward = f"{room_name}_fwd", f"{room_name}_bwd"
    tensors = make_tensors(case, dtype, kink_free=True)
    geometry = geometry_of(case, tensors["input"])
    output = getattr(room(forward), forward)(*forward_arguments(forward, case, tensors, geometry))
    grad_output = make_grad_output(case, output.shape).to(dtype)
    called_with = backward_arguments(backward, case, tensors, geometry, output, (grad_output,))
    actual = getattr(room(backward), backward)(*called_with)
    truth, true_gradients = gradients(lambda t: oracle(t, case), to_float64(tensors), grad_output)
    torchs, torchs_gradients = gradients(lambda t: oracle(t, case), tensors, grad_output)
    compare(f"{forward} {case.id}", ["output"], [output], [truth], [torchs])
    compare(f"{backward} {case.id}", present(tensors), actual, true_gradients.values(), torchs_gradients.values())


def check_stats(case: DwCase, dtype: torch.dtype) -> None:
    """Mean and variance, and every gradient of theirs."""
    tensors = make_tensors(case, dtype)
    geometry = geometry_of(case, tensors["input"])
    own = own_tensors("dwconv_stats", tensors)
    module = room("dwconv_stats")
    results = module.dwconv_stats(*forward_arguments("dwconv_stats", case, tensors, geometry))
    grads = tuple(torch.randn_like(result) for result in results)
    called_with = backward_arguments("dwconv_stats_bwd", case, tensors, geometry, results, grads)
    actual = module.dwconv_stats_bwd(*called_with)

    def expected(given: Tensors) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        leaves = {name: None if t is None else t.detach().requires_grad_() for name, t in given.items()}
        stats = oracle_stats(leaves, case)
        wanted = [leaves[name] for name in present(leaves)]
        return stats, torch.autograd.grad(stats, wanted, [grad.to(stats[0].dtype) for grad in grads])

    truth, torchs = expected(to_float64(own)), expected(own)
    compare(f"dwconv_stats {case.id}", ["mean", "var"], results, truth[0], torchs[0])
    compare(f"dwconv_stats_bwd {case.id}", present(own), actual, truth[1], torchs[1])


def main() -> None:
    if os.environ.get("TRITON_INTERPRET") != "1":
        raise SystemExit("TRITON_INTERPRET=1 must be set before Python starts")
    import triton

    torch.manual_seed(0)
    cases = {case.id: case for case in (*DW_CASES, *DS_CASES)}
    checked = 0
    for dtype in DTYPES:
        for name in CASES:
            case = cases[name]
            check_convolution("dwconv" if isinstance(case, DwCase) else "dsconv", case, dtype)
            checked += 2
        for name in STATS_CASES:
            check_stats(cases[name], dtype)
            checked += 2
    print(f"Triton {triton.__version__}, interpreted: {checked} calls agree with the oracle")


if __name__ == "__main__":
    sys.exit(main())
