"""The single depthwise convolutions against their stock twins and against plain torch."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from module_helpers import compare, image
from torch import nn

from effops import modules, stock

# torch's own remark on the twin's even kernels.
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")

DEPTHWISE: dict[str, tuple[Callable[[Any], nn.Module], tuple[int, ...]]] = {
    "learned": (lambda m: m.DepthwiseConv2d(6, 3, bias=True), (2, 6, 7, 8)),
    "multiplier_1x5_s2": (lambda m: m.DepthwiseConv2d(3, (1, 5), 2, depth_multiplier=3), (2, 3, 7, 8)),
    "same": (lambda m: m.DepthwiseConv2d(3, 4, padding="same", dilation=2), (2, 3, 9, 8)),
    "circular": (lambda m: m.DepthwiseConv2d(3, 5, padding_mode="circular"), (2, 3, 7, 8)),
    "shared": (lambda m: m.SharedDepthwiseConv2d(16, bias=True), (2, 16, 7, 8)),
    "shared_by_2_uneven": (lambda m: m.SharedDepthwiseConv2d(6, 2, 5, 2, (1, 2, 0, 2)), (2, 6, 7, 8)),
    "shared_replicate": (lambda m: m.SharedDepthwiseConv2d(6, 3, padding_mode="replicate"), (2, 6, 7, 8)),
    "vgnet8": (lambda m: m.FixedFilterConv2d(20), (2, 20, 7, 8)),
    "vgnet4": (lambda m: m.FixedFilterConv2d(6, "vgnet4", 2), (2, 6, 7, 8)),
    "given_bank": (lambda m: m.FixedFilterConv2d(5, torch.arange(18.0).reshape(2, 3, 3), dilation=2), (2, 5, 7, 8)),
    "more_kernels_than_channels": (lambda m: m.FixedFilterConv2d(3, "vgnet8"), (2, 3, 7, 8)),
    "binomial": (lambda m: m.BlurPool2d(5, 5), (2, 5, 9, 8)),
    "gaussian": (lambda m: m.BlurPool2d(5, 3, filter="gaussian", sigma=0.7, alternate_sign=True), (2, 5, 9, 8)),
    "reflect": (lambda m: m.BlurPool2d(5, 4, padding=2, padding_mode="reflect"), (2, 5, 9, 8)),
}


@pytest.mark.parametrize("name", DEPTHWISE)
def test_depthwise_modules_match_their_twins(name: str, backend: str) -> None:
    make, shape = DEPTHWISE[name]

    def seeded(layers: Any) -> nn.Module:
        torch.manual_seed(2)
        return make(layers)

    for dtype in (torch.float64, torch.float32):
        compare(seeded, (image(*shape),), backend, dtype=dtype, grads=True)
    compare(seeded, (image(*shape, channels_last=True),), backend)


def test_depthwise_is_the_grouped_convolution() -> None:
    torch.manual_seed(0)
    ours = modules.DepthwiseConv2d(6, 3, 2, depth_multiplier=2, bias=True)
    torch.manual_seed(0)
    theirs = nn.Conv2d(6, 12, 3, 2, 1, groups=6)
    x = torch.randn(2, 6, 9, 9)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-6)
    theirs.load_state_dict(ours.state_dict())


def test_shared_kernels_repeat_over_chunks(backend: str) -> None:
    """Written out as VGNet does it: the same small convolution on every chunk; the gradient is the sum."""
    module = modules.SharedDepthwiseConv2d(24, share=8, backend=backend).double()
    x = image(2, 24, 6, 5)
    chunks = [F.conv2d(chunk, module.weight, padding=1, groups=3) for chunk in x.chunk(8, 1)]
    expected = torch.cat(chunks, 1)
    torch.testing.assert_close(module(x), expected, rtol=1e-12, atol=1e-12)
    weights = image(*expected.shape, seed=4)
    (ours,) = torch.autograd.grad((module(x) * weights).sum(), module.weight)
    (theirs,) = torch.autograd.grad((expected * weights).sum(), module.weight)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    assert module.weight.numel() == 9 * 24 // 8


def test_fixed_filters_are_constants() -> None:
    fixed = modules.FixedFilterConv2d(8, "vgnet8")
    assert list(fixed.parameters()) == []
    assert list(fixed.state_dict()) == ["weight"]
    assert fixed.weight.dtype == torch.float32
    torch.testing.assert_close(fixed.weight[:6].sum((1, 2, 3)), torch.zeros(6), rtol=0, atol=1e-6)
    sobel = torch.tensor([[-0.5, -1, -0.5], [0, 0, 0], [0.5, 1, 0.5]])
    assert torch.equal(fixed.weight[0, 0], sobel)
    assert fixed.to(torch.bfloat16).weight.dtype == torch.bfloat16


def test_blur_keeps_a_constant_image() -> None:
    for blur in (modules.BlurPool2d(2), modules.BlurPool2d(2, 5, filter="gaussian", sigma=2.0)):
        y = blur(torch.ones(1, 2, 16, 16))
        torch.testing.assert_close(y[:, :, 2:-2, 2:-2], torch.ones(1, 2, 4, 4), rtol=1e-6, atol=0)
    negated = modules.BlurPool2d(4, alternate_sign=True)(torch.ones(1, 4, 8, 8))
    assert (negated[:, 0] > 0).all() and torch.equal(negated[:, 0], -negated[:, 1])


@pytest.mark.parametrize("assign", [False, True])
def test_constants_that_a_twin_repeats_once_follow_the_state_dict_and_the_dtype(assign: bool) -> None:
    twin, other = stock.FixedFilterConv2d(10, "vgnet8", 2), stock.FixedFilterConv2d(10, image(8, 3, 3), 2)
    assert list(twin.state_dict()) == ["weight"]
    x = image(2, 10, 6, 5).float()
    before = twin(x)
    twin.load_state_dict(other.state_dict(), assign=assign)
    assert not torch.equal(twin(x), before)
    assert torch.equal(twin(x), other(x))
    for dtype in (torch.float64, torch.bfloat16):
        converted = copy.deepcopy(twin).to(dtype)
        weight = converted.weight.repeat(2, 1, 1, 1)[:10]
        assert torch.equal(converted(x.to(dtype)), F.conv2d(x.to(dtype), weight, None, 2, 1, 1, 10))
