"""EffNet's blocks against their stock twins, the paper's counts and plain torch."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import require_backend
from module_helpers import BN, compare, image, randomise
from torch import nn

from effops import explain, modules


@pytest.fixture(params=("reference", "cpp", "cuda"))
def backend(request: pytest.FixtureRequest) -> str:
    """The backends that have the operator."""
    require_backend(request.param)
    return request.param


Layer = Callable[[Any], nn.Module]
SMOOTH = {"row_norm": BN, "norm": BN}
# In training the last norm takes away what dw.norm.bias adds, unless something nonlinear stands between: its gradient
# is then zero, and rounding all that is left of it.
ACT = {"dw_act": "silu"}
LINEAR = {"v1", "v2"}
LAYERS: dict[str, tuple[Layer, tuple[int, ...]]] = {
    "row": (lambda m: m.SeparableConvPool2d(6, **SMOOTH), (2, 6, 7, 9)),
    "both": (lambda m: m.SeparableConvPool2d(5, depth_multiplier=2, pool="both", act="silu", **SMOOTH), (2, 5, 8, 7)),
    "acts": (lambda m: m.SeparableConvPool2d(6, 5, row_act="silu", act="gelu", **SMOOTH), (2, 6, 7, 9)),
    "stride": (lambda m: m.SeparableConvPool2d(6, (5, 3), (2, 2), pool="none", **SMOOTH), (2, 6, 8, 10)),
    "bias": (lambda m: m.SeparableConvPool2d(6, bias=True, pool="both", row_act="silu"), (2, 6, 8, 6)),
    "group_norm": (lambda m: m.SeparableConvPool2d(6, pool="both", norm=partial(nn.GroupNorm, 2)), (2, 6, 8, 6)),
    "group_norm_between": (lambda m: m.SeparableConvPool2d(6, row_norm=partial(nn.GroupNorm, 2)), (2, 6, 8, 6)),
    "unknown_act": (lambda m: m.SeparableConvPool2d(6, act=nn.Mish, pool="both", **SMOOTH), (2, 6, 8, 6)),
    "v1": (lambda m: m.EffNetBlock(5, 16), (2, 5, 8, 10)),
    "v2": (lambda m: m.EffNetBlock(6, 16, version=2), (2, 6, 8, 10)),
    "v1_odd": (lambda m: m.EffNetBlock(5, 9, **ACT), (2, 5, 9, 11)),
    "v2_expansion": (lambda m: m.EffNetBlock(5, 12, version=2, expansion=3, slope=0.3, **ACT), (2, 5, 9, 11)),
    "no_norm": (lambda m: m.EffNetBlock(5, 16, norm=None), (2, 5, 8, 10)),
    "residual": (lambda m: m.EffNetBlock(6, 6, residual=True, depth_multiplier=2, **ACT), (2, 6, 8, 10)),
    "residual_projection": (lambda m: m.EffNetBlock(5, 8, version=2, residual=True, **ACT), (2, 5, 8, 10)),
    "groups": (lambda m: m.EffNetBlock(6, 16, groups=4, **ACT), (2, 6, 8, 10)),
    "stride_v1": (lambda m: m.EffNetBlock(6, 12, downsample="stride", **ACT), (2, 6, 8, 10)),
    "stride_v2": (lambda m: m.EffNetBlock(6, 12, version=2, downsample="stride", **ACT), (2, 6, 9, 11)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_modules_match_their_twins(name: str, backend: str) -> None:
    make, shape = LAYERS[name]

    def seeded(layers: Any) -> nn.Module:
        torch.manual_seed(2)
        return make(layers)

    compare(seeded, (image(*shape),), backend, grads=True)
    compare(seeded, (image(*shape),), backend, train=True, grads=name not in LINEAR)
    compare(seeded, (image(*shape, channels_last=True),), backend, dtype=torch.float32)


def effnet(version: int, **options: Any) -> nn.Sequential:
    """The CIFAR-10 net of `version`, as the paper's Table 1 and section 6.2 have it."""
    if version == 1:
        first: list[nn.Module] = [modules.EffNetBlock(3, 64)]
    else:
        first = [nn.Conv2d(3, 64, 3, padding=1, bias=False), BN(64), nn.ReLU(), nn.MaxPool2d(2)]
    blocks = [modules.EffNetBlock(c, k, version=version, **options) for c, k in ((64, 128), (128, 256))]
    return nn.Sequential(*first, *blocks, nn.Flatten(), nn.Linear(4 * 4 * 256, 10))


@pytest.mark.parametrize(
    ("version", "options", "parameters"),
    [
        (1, {}, 150_698),
        (2, {"expansion": 2}, 149_450),
        (2, {"expansion": 4}, 255_306),
        (2, {"expansion": 6}, 361_162),
    ],
)
def test_networks_of_the_paper(version: int, options: dict, parameters: int) -> None:
    net = effnet(version, **options).eval()
    assert sum(p.numel() for p in net.parameters()) == parameters
    assert net(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


def test_first_block_has_at_least_six_channels() -> None:
    assert modules.EffNetBlock(3, 8).expand.out_channels == 6  # GTSRB's first block


def test_effnet_v1_by_hand() -> None:
    """Table 1's first block in torch's words: where the pool sits, and the strided 2x1 convolution."""
    block = modules.EffNetBlock(3, 16).double().eval()
    randomise(block)
    x, dw = image(2, 3, 8, 10), block.dw
    y = F.relu(block.expand_norm(F.conv2d(x, block.expand.weight)))
    y = F.max_pool2d(F.conv2d(y, dw.row.weight, padding=(0, 1), groups=8), (1, 2))
    y = dw.norm(F.conv2d(y, dw.col.weight, padding=(1, 0), groups=8))
    y = F.relu(block.norm(F.conv2d(y, block.project.weight, stride=(2, 1))))
    torch.testing.assert_close(block(x), y, rtol=1e-12, atol=1e-12)
    block.to(memory_format=torch.channels_last)  # the weights too
    torch.testing.assert_close(block(x), y, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("version", (1, 2))
def test_a_block_is_three_kernels(version: int, cpp: str) -> None:
    block = modules.EffNetBlock(8, 16, version=version).eval()
    calls = explain(block, torch.zeros(1, 8, 8, 8)).calls
    assert [call.function for call in calls] == ["ds_conv2d", "separable_conv_pool2d", "ds_conv2d"]
    assert {call.backend for call in calls} == {cpp}


def test_training_saves_no_row_result(cpp: str) -> None:
    """Neither the row convolution's result nor its norm's nor the pool's indices are kept for backward."""
    layer = modules.SeparableConvPool2d(8, row_norm=BN, backend=cpp)
    x = torch.randn(2, 8, 16, 16, requires_grad=True)
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        layer(x)
    assert max(sizes) <= x.numel()
    assert sum(size for size in sizes if size >= 1000) == 2 * x.numel()  # the input, for statistics and for the chain


def test_hooks_are_obeyed() -> None:
    layer, x = modules.SeparableConvPool2d(4).eval(), torch.randn(1, 4, 4, 4)
    fused, seen = layer(x), []
    layer.col.register_forward_hook(lambda *_: seen.append(1))
    torch.testing.assert_close(layer(x), fused)
    assert seen == [1]
    assert layer.fusion_reasons() == ("col has forward hooks",)
    block, x = modules.EffNetBlock(4, 8).eval(), torch.randn(1, 4, 4, 4)
    fused = block(x)
    block.project.register_forward_hook(lambda *_: seen.append(2))
    torch.testing.assert_close(block(x), fused)
    assert seen == [1, 2]
    assert block.fusion_reasons() == ("project has forward hooks",)
    assert "project has groups" in repr(modules.EffNetBlock(4, 8, groups=2))


def test_state_copies_and_errors() -> None:
    block = modules.EffNetBlock(4, 8, version=2).eval()
    names = [name for name in block.state_dict() if name.endswith("weight")]
    assert names == [
        "expand.weight", "expand_norm.weight", "dw.row.weight", "dw.col.weight", "dw.norm.weight", "project.weight",
        "norm.weight",
    ]  # fmt: skip
    x = torch.randn(1, 4, 6, 6)
    for twin in (copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        assert torch.equal(twin(x), block(x))
    for make in (modules.SeparableConvPool2d, partial(modules.EffNetBlock, out_channels=8)):
        made = make(4, device="meta", dtype=torch.float64)
        assert all(t.device.type == "meta" for t in (*made.parameters(), *made.buffers()))
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        modules.SeparableConvPool2d(4, row_norm=BN, pool="none")(torch.ones(1, 4, 1, 1))


ERRORS: dict[str, tuple[Callable[[], object], str]] = {
    "pool": (
        lambda: modules.SeparableConvPool2d(4, pool="col"),
        "SeparableConvPool2d: unknown pool 'col'; accepted: 'none', 'row', 'both'",
    ),
    "even": (
        lambda: modules.SeparableConvPool2d(4, (2, 3)),
        "SeparableConvPool2d: padding=None means 'same' and needs an odd kernel_size, got (2, 3); give it",
    ),
    "version": (lambda: modules.EffNetBlock(4, 8, version=3), "EffNetBlock: unknown version 3; accepted: 1, 2"),
    "downsample": (
        lambda: modules.EffNetBlock(4, 8, downsample="blur"),
        "EffNetBlock: unknown downsample 'blur'; accepted: 'pool', 'stride'",
    ),
    "groups": (
        lambda: modules.EffNetBlock(4, 16, groups=3),
        "EffNetBlock: groups must divide the last convolution's 8 and 16 channels, got 3",
    ),
    "no channels": (
        lambda: modules.EffNetBlock(1, 8, version=2, bottleneck=3),
        "EffNetBlock: in_channels * expansion // bottleneck must be at least 1, got 1 * 2 // 3",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name: str) -> None:
    make, message = ERRORS[name]
    with pytest.raises(ValueError) as caught:
        make()
    assert str(caught.value) == message
