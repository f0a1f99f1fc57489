"""The correctness gate: a result is timed only after it stood within the error budget of the float64 truth.

The budget: max error <= 2 x (max error of torch's own result in the same dtype + one rounding of the largest value),
everything finite, and a relative norm bound.
"""

from __future__ import annotations

import torch

NORM_BOUND = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-2, torch.float64: 1e-12}
TF32_NORM_BOUND = 1e-3


class GateError(AssertionError):
    """A result is wrong, so its timing means nothing."""


def budget(stock: torch.Tensor, truth: torch.Tensor) -> float:
    """Largest error allowed, from torch's own result `stock` in the dtype under test and the float64 `truth`."""
    own_error = (stock.double() - truth).abs().max().item()
    return 2 * (own_error + torch.finfo(stock.dtype).eps * truth.abs().max().item())


def relative_norm(out: torch.Tensor, truth: torch.Tensor) -> float:
    """Norm of the error over the norm of the truth."""
    return ((out.double() - truth).norm() / truth.norm().clamp_min(torch.finfo(torch.float64).tiny)).item()


def check(
    out: torch.Tensor, stock: torch.Tensor, truth: torch.Tensor, what: str = "result", norm_bound: float | None = None
) -> dict[str, float]:
    """Raise GateError unless `out` is right; return the figures that were compared.

    Args:
        out: the result under test.
        stock: torch's own result in the same dtype and memory format.
        truth: the float64 result.
        what: named in the message.
        norm_bound: instead of NORM_BOUND's.
    """
    if out.shape != truth.shape or out.dtype != stock.dtype:
        raise GateError(f"{what}: {out.dtype}{list(out.shape)} where {stock.dtype}{list(truth.shape)} was expected")
    if not torch.isfinite(out).all():
        raise GateError(f"{what}: not all values are finite")
    error, allowed = (out.double() - truth).abs().max().item(), budget(stock, truth)
    norm, bound = relative_norm(out, truth), NORM_BOUND[out.dtype] if norm_bound is None else norm_bound
    if error > allowed:
        raise GateError(f"{what}: largest error {error:.3e}, allowed {allowed:.3e}")
    if norm > bound:
        raise GateError(f"{what}: relative error norm {norm:.3e}, allowed {bound:.1e}")
    return {"error": error, "allowed": allowed, "norm": norm}


def check_norm(
    out: torch.Tensor, stock: torch.Tensor, truth: torch.Tensor, what: str, norm_bound: float
) -> dict[str, float]:
    """The relative norm alone, against the bound or twice torch's own error: for sums over many ReLUs' kinks.

    Whole networks in half precision and gradients through kinks: single values may be far off in torch's result too,
    because a rounding moved an argument across a kink.
    """
    if not torch.isfinite(out).all():
        raise GateError(f"{what}: not all values are finite")
    norm, bound = relative_norm(out, truth), max(norm_bound, 2 * relative_norm(stock, truth))
    if not norm <= bound:
        raise GateError(f"{what}: relative error norm {norm:.3e}, allowed {bound:.1e}")
    return {"norm": norm, "allowed_norm": bound}


def check_rival(out: torch.Tensor, truth: torch.Tensor, what: str, norm_bound: float | None = None) -> None:
    """A rival must do the same work, not meet our budget: only the relative norm is bounded, ten times wider."""
    norm, bound = relative_norm(out, truth), 10 * (NORM_BOUND[out.dtype] if norm_bound is None else norm_bound)
    if not norm <= bound:
        raise GateError(f"{what}: relative error norm {norm:.3e}, allowed {bound:.0e}")
