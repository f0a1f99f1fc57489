"""VGNet's blocks against their stock twins and by hand."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from module_helpers import Inputs, compare, image, randomise
from torch import nn

from effops import modules

VGNET_BLOCKS: dict[str, tuple[Callable[[Any], nn.Module], Inputs]] = {
    "half": (lambda m: m.HalfIdentityBlock(12, act="silu"), (image(2, 6, 7, 5), image(2, 6, 7, 5, seed=2))),
    "half_k5_no_norm": (lambda m: m.HalfIdentityBlock(6, 5, norm=None), (image(2, 3, 6, 5), image(2, 3, 6, 5, seed=2))),
    "down_224_368_like": (lambda m: m.DownsamplingBlock(14, 22, act="silu"), (image(2, 14, 7, 8),)),
    "down_recut": (lambda m: m.DownsamplingBlock(4, 10, act="silu"), (image(2, 4, 7, 8),)),
    "down_pair": (lambda m: m.DownsamplingBlock(8, 12), (image(2, 4, 8, 8), image(2, 4, 8, 8, seed=2))),
    "down_shrinks": (lambda m: m.DownsamplingBlock(8, 6, act="silu"), (image(2, 8, 7, 8),)),
    "down_learned_s1": (lambda m: m.DownsamplingBlock(6, 8, 1, act="silu"), (image(2, 6, 5, 6),)),
    "down_group_norm": (lambda m: m.DownsamplingBlock(4, 10, norm=partial(nn.GroupNorm, 1)), (image(2, 4, 7, 8),)),
    "down_unknown_act": (lambda m: m.DownsamplingBlock(4, 8, act=nn.Mish), (image(2, 4, 7, 8),)),
}


@pytest.mark.parametrize("name", VGNET_BLOCKS)
def test_vgnet_blocks_match_their_twins(name: str, backend: str) -> None:
    make, inputs = VGNET_BLOCKS[name]

    def seeded(layers: Any) -> nn.Module:
        torch.manual_seed(2)
        return make(layers)

    compare(seeded, inputs, backend, grads=True)
    compare(seeded, inputs, backend, train=True, grads=True)
    compare(seeded, inputs, backend, dtype=torch.float32)
    compare(seeded, tuple(x.contiguous(memory_format=torch.channels_last) for x in inputs), backend)


def test_half_identity_by_hand() -> None:
    block = modules.HalfIdentityBlock(8).double().eval()
    randomise(block)
    left, right = image(2, 4, 6, 5), image(2, 4, 6, 5, seed=2)
    mixed = torch.cat([left, F.conv2d(right, block.dw.weight, padding=1, groups=4)], 1)
    expected = block.norm(F.relu(F.conv2d(mixed, block.pw.weight)))
    first, second = block((left, right))
    assert first is right
    torch.testing.assert_close(second, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("before", "after", "keep", "new"), [(224, 368, 184, 184), (32, 72, 32, 40), (376, 512, 256, 256)]
)
def test_downsampling_keeps_the_last_channels(before: int, after: int, keep: int, new: int) -> None:
    block = modules.DownsamplingBlock(before, after).eval()
    assert (block.keep, block.pw.out_channels) == (keep, new)
    x = image(1, before, 4, 4).float()
    left, right = block(x)
    assert left.shape == right.shape == (1, after // 2, 2, 2)
    gauss = torch.tensor([[0.0811, 0.1226, 0.0811], [0.1226, 0.1853, 0.1226], [0.0811, 0.1226, 0.0811]])
    blurred = F.conv2d(x, gauss.expand(before, 1, 3, 3), stride=2, padding=1, groups=before)
    torch.testing.assert_close(torch.cat([left, right], 1)[:, :keep], blurred[:, -keep:], rtol=1e-5, atol=1e-5)


def test_blocks_with_hooks_are_called_part_by_part() -> None:
    for block, x in (
        (modules.HalfIdentityBlock(4).eval(), (torch.randn(1, 2, 4, 4), torch.randn(1, 2, 4, 4))),
        (modules.DownsamplingBlock(4, 6).eval(), torch.randn(1, 4, 4, 4)),
    ):
        fused = block(x)
        seen = []
        block.dw.register_forward_hook(lambda *_, seen=seen: seen.append(1))
        unfused = block(x)
        assert seen == [1]
        assert block.fusion_reasons() == ("dw has forward hooks",)
        for a, b in zip(fused, unfused, strict=True):
            torch.testing.assert_close(a, b)
