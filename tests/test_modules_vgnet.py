"""VGNet's blocks against their stock twins and by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from module_helpers import BN, Inputs, compare, image, randomise
from torch import nn

import effops.functional as EF
from effops import backends, modules
from effops.ops.dwconv import banks

PAIR = (image(2, 16, 7, 5), image(2, 16, 7, 5, seed=2))
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
    "half_bank": (lambda m: m.HalfIdentityBlock(32, bank="vgnet8", act="silu"), PAIR),
    "half_bank_norm": (lambda m: m.HalfIdentityBlock(32, bank="vgnet4", dw_norm=BN, act="silu"), PAIR),
    "half_learned_norm": (lambda m: m.HalfIdentityBlock(32, dw_norm=BN, act="silu"), PAIR),
    "half_group_norm_between": (lambda m: m.HalfIdentityBlock(32, dw_norm=partial(nn.GroupNorm, 1), act="silu"), PAIR),
    "half_se": (lambda m: m.HalfIdentityBlock(32, act="silu", se=m.SqueezeExcite), PAIR),
    "half_se_bank_norm": (
        lambda m: m.HalfIdentityBlock(32, bank="vgnet8", dw_norm=BN, act="silu", se=m.SqueezeExcite),
        PAIR,
    ),
    "half_se_unknown_act": (lambda m: m.HalfIdentityBlock(32, act=nn.Mish, se=m.SqueezeExcite), PAIR),
    "down_se_equal_halves": (
        lambda m: m.DownsamplingBlock(8, 16, act="silu", se=m.SqueezeExcite),
        (image(2, 8, 7, 8),),
    ),
    "down_se_recut": (lambda m: m.DownsamplingBlock(4, 10, act="silu", se=m.SqueezeExcite), (image(2, 4, 7, 8),)),
    "down_se_shrinks": (lambda m: m.DownsamplingBlock(8, 6, act="silu", se=m.SqueezeExcite), (image(2, 8, 7, 8),)),
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


def test_half_identity_with_fixed_kernels_by_hand() -> None:
    block = modules.HalfIdentityBlock(16, bank="vgnet8", dw_norm=BN).double().eval()
    randomise(block)
    left, right = image(2, 8, 6, 5), image(2, 8, 6, 5, seed=2)
    kernels = torch.cat([torch.tensor(kernel).double()[None, None] for kernel in banks.BANKS["vgnet8"]])
    filtered = block.dw_norm(F.conv2d(right, kernels, padding=1, groups=8))
    expected = block.norm(F.relu(F.conv2d(torch.cat([left, filtered], 1), block.pw.weight)))
    torch.testing.assert_close(block((left, right))[1], expected, rtol=1e-6, atol=1e-6)  # the bank is made in float32
    assert "dw.weight" not in dict(block.named_parameters())
    assert block.fusion_reasons() == ()


@pytest.mark.parametrize(("before", "after"), [(8, 16), (8, 20)])
def test_downsampling_scales_the_new_channels_alone(before: int, after: int) -> None:
    torch.manual_seed(0)
    block = modules.DownsamplingBlock(before, after, se=modules.SqueezeExcite).eval()
    plain = modules.DownsamplingBlock(before, after).eval()
    plain.load_state_dict({key: value for key, value in block.state_dict().items() if not key.startswith("se.")})
    x = image(2, before, 6, 6).float()
    ours, theirs = torch.cat(block(x), 1), torch.cat(plain(x), 1)
    keep = block.keep
    assert torch.equal(ours[:, :keep], theirs[:, :keep])
    torch.testing.assert_close(ours[:, keep:], block.se(theirs[:, keep:]))
    assert not torch.allclose(ours[:, keep:], theirs[:, keep:])


def test_squeeze_excite_leaves_the_kernel_fused() -> None:
    """Any module may be one; hooks on it run, and the convolutions stay one kernel."""
    block = modules.HalfIdentityBlock(8, se=lambda channels: nn.Hardswish()).eval()
    left, right = torch.randn(1, 4, 4, 4), torch.randn(1, 4, 4, 4)
    expected = block._forward_unfused(left, right)[1]
    seen = []
    block.se.register_forward_hook(lambda *_: seen.append(1))
    assert str(backends.explain(block, (left, right))).count("+ 1x1") == 1
    seen.clear()
    torch.testing.assert_close(block((left, right))[1], expected)
    assert seen == [1]


def test_dw_norm_in_training_wants_more_than_one_value() -> None:
    block = modules.HalfIdentityBlock(8, dw_norm=BN)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        block((torch.zeros(1, 4, 1, 1), torch.zeros(1, 4, 1, 1)))
    empty = block((torch.zeros(0, 4, 3, 3), torch.zeros(0, 4, 3, 3)))[1]
    assert empty.shape == (0, 4, 3, 3)
    assert block.dw_norm.num_batches_tracked == 1  # as torch counts an empty batch


def test_errors_of_the_new_arguments() -> None:
    with pytest.raises(ValueError, match="FixedFilterConv2d: unknown bank 'sobel'"):
        modules.HalfIdentityBlock(8, bank="sobel")
    with pytest.raises(TypeError, match="HalfIdentityBlock: se must be None or a factory"):
        modules.HalfIdentityBlock(8, se=nn.Identity())
    with pytest.raises(TypeError, match="DownsamplingBlock: se must be None or a factory"):
        modules.DownsamplingBlock(8, 8, se="se")
    with pytest.raises(TypeError, match="HalfIdentityBlock: dw_norm must be None or a factory"):
        modules.HalfIdentityBlock(8, dw_norm=3)


def test_fixed_kernels_and_squeeze_excites_compile_and_export() -> None:
    torch.manual_seed(0)
    blocks = nn.Sequential(
        modules.DownsamplingBlock(16, 32, se=modules.SqueezeExcite),
        modules.HalfIdentityBlock(32, bank="vgnet8", dw_norm=BN, se=modules.SqueezeExcite),
    )
    x = image(2, 16, 12, 12).float()
    for train in (False, True):
        eager, traced = copy.deepcopy(blocks).train(train), copy.deepcopy(blocks).train(train)
        compiled = torch.compile(traced, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), eager(x))
        torch.testing.assert_close(traced.state_dict(), eager.state_dict())
    exported = torch.export.export(blocks.eval(), (x,)).module()
    torch.testing.assert_close(tuple(exported(x)), tuple(blocks(x)))


@pytest.mark.parametrize("make", ("half", "down"))
def test_squeeze_excite_takes_the_sums_over(make: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the kernel in eval; in training, with a hook or with an activation that no kernel knows it takes its own."""
    seen: list[bool] = []
    excite = EF.squeeze_excite2d

    def spy(*args: Any, sums: Any = None, **others: Any) -> torch.Tensor:
        seen.append(sums is not None)
        return excite(*args, sums=sums, **others)

    monkeypatch.setattr(EF, "squeeze_excite2d", spy)

    def run(act: Any = "relu", train: bool = False, hook: bool = False) -> bool:
        block = {
            "half": lambda: modules.HalfIdentityBlock(32, act=act, se=modules.SqueezeExcite),
            "down": lambda: modules.DownsamplingBlock(16, 40, act=act, se=modules.SqueezeExcite),
        }[make]().double()
        if hook:
            block.se.register_forward_hook(lambda *_: None)
        block.train(train)(PAIR if make == "half" else torch.cat(PAIR, 1)[:, :16])
        return seen.pop()

    assert run() and run("silu")
    assert not run(nn.Mish) and not run(train=True) and not run(hook=True)
