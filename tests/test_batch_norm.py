"""An eval batch norm as the scale and shift of an epilogue: the operator, and where it is taken."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from helpers import assert_within_budget, generator
from torch import Tensor, nn

import effops
from effops import _library
from effops.modules._norms import running_affine
from effops.ops import batch_norm

CHANNELS = 37  # no multiple of a vector
EPS = 1e-3
OPERATOR = torch.ops.effops.batch_norm_affine.default


def vectors(dtype: torch.dtype, present: str = "weight bias") -> tuple[Tensor | None, ...]:
    """weight, bias, running_mean, running_var."""
    gen = generator("batch_norm")
    weight, bias, mean = (torch.randn(CHANNELS, generator=gen, dtype=torch.float64) for _ in range(3))
    var = torch.rand(CHANNELS, generator=gen, dtype=torch.float64) + 0.01
    chosen = (weight if "weight" in present else None, bias if "bias" in present else None, mean, var)
    return tuple(None if t is None else t.to(dtype) for t in chosen)


def truth(weight: Tensor | None, bias: Tensor | None, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
    """By what torch's batch norm does to 0 and 1, in float64."""
    wide = [None if t is None else t.double() for t in (mean, var, weight, bias)]
    probes = torch.tensor([[0.0], [1.0]], dtype=torch.float64).expand(2, CHANNELS)
    zero, one = nn.functional.batch_norm(probes, *wide, training=False, eps=EPS)
    return one - zero, zero


@pytest.fixture
def calls(cpp: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Counts the operator's calls."""
    found: list[int] = []

    def spy(*args: object) -> tuple[Tensor, Tensor]:
        found.append(1)
        return OPERATOR(*args)

    monkeypatch.setattr(batch_norm, "_operator", spy)
    return found


@pytest.mark.parametrize("present", ["weight bias", "weight", "bias", ""])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_operator(cpp: str, dtype: torch.dtype, present: str) -> None:
    tensors = vectors(dtype, present)
    copies = [None if t is None else t.clone() for t in tensors]
    actual = OPERATOR(*tensors, EPS)
    yardsticks = batch_norm.reference(*tensors, EPS)
    for name, out, true, yardstick in zip(("scale", "shift"), actual, truth(*tensors), yardsticks, strict=True):
        assert out.dtype == dtype
        assert_within_budget(out, true, yardstick, name)
    for tensor, copy in zip(tensors, copies, strict=True):
        assert tensor is None or torch.equal(tensor, copy)


def test_operator_takes_any_stride(cpp: str) -> None:
    tensors = vectors(torch.float32)
    spread = [torch.stack((t, t), 1)[:, 1] for t in tensors]
    assert not spread[0].is_contiguous()
    for out, expected in zip(OPERATOR(*spread, EPS), OPERATOR(*tensors, EPS), strict=True):
        assert torch.equal(out, expected)


@pytest.mark.parametrize("present", ["weight bias", ""])
def test_opcheck(cpp: str, present: str) -> None:
    result = torch.library.opcheck(OPERATOR, (*vectors(torch.float32, present), EPS))
    assert set(result.values()) == {"SUCCESS"}


@pytest.mark.parametrize(
    ("place", "name", "wrong"),
    [
        (0, "weight", torch.ones(CHANNELS + 1)),
        (1, "bias", torch.ones(CHANNELS, dtype=torch.float64)),
        (1, "bias", torch.ones(1, CHANNELS)),
        (2, "running_mean", torch.ones(CHANNELS, dtype=torch.bfloat16)),
        (2, "running_mean", torch.ones(CHANNELS, 1)),
        (3, "running_var", torch.ones(CHANNELS - 1)),
    ],
)
def test_operator_refuses(cpp: str, place: int, name: str, wrong: Tensor) -> None:
    tensors = list(vectors(torch.float32))
    tensors[place] = wrong
    with pytest.raises(RuntimeError, match=f"batch_norm_affine: {name} must be"):
        OPERATOR(*tensors, EPS)


def test_taken_where_no_gradient_is_needed(calls: list[int]) -> None:
    tensors = vectors(torch.float32)
    batch_norm.affine(*tensors, EPS)
    tensors[0].requires_grad_()
    with torch.no_grad():
        batch_norm.affine(*tensors, EPS)
    assert len(calls) == 2
    scale, shift = batch_norm.affine(*tensors, EPS)
    assert len(calls) == 2
    assert scale.requires_grad and shift.requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_statistics_are_widened(calls: list[int], dtype: torch.dtype) -> None:
    tensors = vectors(dtype)
    for out, true in zip(batch_norm.affine(*tensors, EPS), truth(*tensors), strict=True):
        assert out.dtype == torch.float32
        torch.testing.assert_close(out.double(), true, rtol=1e-5, atol=1e-5)
    assert not calls


def test_not_taken_with_parameters_of_another_dtype(calls: list[int]) -> None:
    weight, bias, mean, var = vectors(torch.float32)
    batch_norm.affine(weight.bfloat16(), bias, mean, var, EPS)
    assert not calls


def test_not_taken_off_the_cpu_or_without_the_library(calls: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = vectors(torch.float32)
    scale, _ = batch_norm.affine(*(t.to("meta") for t in tensors), EPS)
    assert scale.is_meta
    monkeypatch.setattr(_library, "kernels_loaded", False)
    batch_norm.affine(*tensors, EPS)
    assert not calls


def test_not_taken_under_transforms(calls: list[int]) -> None:
    weight, bias, mean, var = vectors(torch.float32)
    means = torch.stack((mean, 2 * mean))
    scales, shifts = torch.vmap(lambda m: batch_norm.affine(weight, bias, m, var, EPS))(means)
    assert not calls
    assert scales.shape == shifts.shape == (2, CHANNELS)


def test_not_taken_by_the_reference_backend(calls: list[int]) -> None:
    norm = nn.BatchNorm2d(CHANNELS).eval().requires_grad_(False)
    with effops.use_backend("reference"):
        running_affine(norm, "auto")
    running_affine(norm, "reference")
    assert not calls
    running_affine(norm, "auto")
    running_affine(norm, "cpp")
    assert len(calls) == 2


def test_not_taken_when_compiling(calls: list[int]) -> None:
    norm = nn.BatchNorm2d(CHANNELS).eval().requires_grad_(False)
    compiled = torch.compile(lambda: running_affine(norm, "auto"), fullgraph=True, backend="eager")
    for out, expected in zip(compiled(), running_affine(norm, "auto"), strict=True):
        torch.testing.assert_close(out, expected)
    assert len(calls) == 1


def test_edits_of_data_are_seen(cpp: str) -> None:
    """Nothing is cached: `.data` edits leave no trace in a tensor's version."""
    norm = nn.BatchNorm2d(CHANNELS).eval().requires_grad_(False)
    before, _ = running_affine(norm, "auto")
    norm.weight.data.mul_(2)
    after, _ = running_affine(norm, "auto")
    assert torch.equal(after, 2 * before)


def test_a_weight_that_is_a_plain_attribute(cpp: str) -> None:
    norm = nn.BatchNorm2d(CHANNELS).eval()
    del norm.weight
    norm.weight = torch.full((CHANNELS,), 3.0)
    with torch.no_grad():
        scale, _ = running_affine(norm, "auto")
    torch.testing.assert_close(scale, (3 * (norm.running_var + norm.eps).rsqrt()))


def test_none_where_the_batch_tells(cpp: str) -> None:
    assert running_affine(nn.BatchNorm2d(CHANNELS), "auto") is None
    assert running_affine(nn.BatchNorm2d(CHANNELS, track_running_stats=False).eval(), "auto") is None
