"""EffNet's block as one kernel: equal to its three operators, to its stock twin within the budget, and checked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from module_helpers import compare, image, randomise
from torch import nn

from effops import explain, modules

ops = torch.ops.effops

# By name: the block and the shape of its input.
BLOCKS: dict[str, tuple[Callable[[Any], nn.Module], tuple[int, ...]]] = {
    "v1-cifar-first": (lambda m: m.EffNetBlock(3, 64), (2, 3, 32, 32)),
    "v1-several_groups_of_images": (lambda m: m.EffNetBlock(64, 128), (9, 64, 16, 16)),
    "v1-one_image": (lambda m: m.EffNetBlock(64, 130), (1, 64, 16, 16)),
    "v1-odd": (lambda m: m.EffNetBlock(5, 35), (3, 5, 11, 9)),
    "v1-leaky": (lambda m: m.EffNetBlock(7, 20, slope=0.3), (2, 7, 8, 8)),
    "v2-several_groups_of_images": (lambda m: m.EffNetBlock(64, 128, version=2), (7, 64, 16, 16)),
    "v2-one_image": (lambda m: m.EffNetBlock(128, 256, version=2, slope=0), (1, 128, 8, 8)),
    "v2-odd": (lambda m: m.EffNetBlock(9, 17, version=2), (2, 9, 11, 13)),
    "v2-residual": (lambda m: m.EffNetBlock(12, 20, version=2, residual=True), (2, 12, 8, 10)),
    "v1-residual-relu": (lambda m: m.EffNetBlock(12, 12, residual=True, dw_act="relu"), (2, 12, 8, 10)),
    "v1-stride": (lambda m: m.EffNetBlock(6, 12, downsample="stride", dw_act="silu"), (2, 6, 9, 11)),
    "v2-stride": (lambda m: m.EffNetBlock(6, 12, version=2, downsample="stride"), (2, 6, 9, 11)),
    "no_norm-smallest": (lambda m: m.EffNetBlock(1, 1, norm=None), (1, 1, 2, 2)),
    "batch0": (lambda m: m.EffNetBlock(6, 12), (0, 6, 8, 8)),
}


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("channels_last", (False, True), ids=("nchw", "cl"))
@pytest.mark.parametrize("name", BLOCKS)
def test_block_matches_its_twin(name: str, channels_last: bool, dtype: torch.dtype, cpp: str) -> None:
    make, shape = BLOCKS[name]

    def seeded(layers: Any) -> nn.Module:
        torch.manual_seed(3)
        return make(layers)

    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        module = compare(seeded, (image(*shape, channels_last=channels_last),), cpp, dtype=dtype)
        with torch.no_grad():
            x = image(*shape, channels_last=channels_last).to(dtype)
            calls = explain(module, x).calls
            first = module(x)
            assert [call.function for call in calls] == ["EffNetBlock"]
            assert not channels_last or first.is_contiguous(memory_format=torch.channels_last) or not first.numel()
            assert torch.equal(first, module(x))


PARTS = {
    "plain": {},
    "v2": {"version": 2},
    "groups": {"groups": 2},
    "unknown act": {"dw_act": nn.Mish},
    "group norm": {"norm": lambda c: nn.GroupNorm(1, c)},
}


@pytest.mark.parametrize("name", PARTS)
def test_what_one_kernel_does_and_what_not(name: str, cpp: str) -> None:
    """Gradients, autocast, a hook or what the kernel does not know: then it runs in parts, with equal results."""
    block = modules.EffNetBlock(8, 16, **PARTS[name]).eval()
    randomise(block)
    x = torch.randn(2, 8, 8, 8)
    with torch.no_grad():
        found, whole = [call.function for call in explain(block, x).calls], block(x)
    assert (found == ["EffNetBlock"]) == (name in ("plain", "v2"))
    with_gradients = block(x)
    assert with_gradients.requires_grad
    torch.testing.assert_close(with_gradients, whole)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert block(x).dtype == torch.bfloat16
    seen = []
    handle = block.dw.register_forward_hook(lambda *_: seen.append(1))
    with torch.no_grad():
        torch.testing.assert_close(block(x), whole)
    handle.remove()
    assert seen == [1]
    block.backend = block.dw.backend = "reference"
    with torch.no_grad():
        torch.testing.assert_close(block(x), whole)


def test_compiled_and_exported(cpp: str) -> None:
    block = modules.EffNetBlock(8, 16).eval()
    randomise(block)
    x = torch.randn(2, 8, 8, 8)
    with torch.no_grad():
        expected = block(x)
        compiled = torch.compile(block, fullgraph=True, backend="aot_eager", dynamic=True)
        torch.testing.assert_close(compiled(x), expected)
        torch.testing.assert_close(compiled(torch.cat([x, x])), torch.cat([expected, expected]))
        exported = torch.export.export(block, (x,)).module()
        torch.testing.assert_close(exported(x), expected)


def test_messages(cpp: str) -> None:
    block = modules.EffNetBlock(8, 16).eval()
    with torch.no_grad():
        with pytest.raises(ValueError) as caught:
            block(torch.randn(2, 9, 8, 8))
        assert str(caught.value) == "EffNetBlock: input has 9 channels; accepted: 8, as expand.weight [8,8,1,1] says"
        with pytest.raises(TypeError, match="EffNetBlock: input must be a tensor"):
            block([1.0])
        with pytest.raises(TypeError, match="EffNetBlock: expand.weight"):
            block(torch.randn(2, 8, 8, 8).double())
        with pytest.raises(ValueError, match="the pool halves a width of 1"):
            block(torch.randn(2, 8, 8, 1))
        with pytest.raises(ValueError, match="where the map before it has two rows"):
            block(torch.randn(2, 8, 1, 8))


GEOMETRY = [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 1, 1, 0, 1, 0]


def arguments(**changes: Any) -> list[Any]:
    named = {
        "input": torch.ones(2, 4, 8, 8),
        "expand": torch.ones(6, 4, 1, 1), "expand_bias": torch.ones(6), "expand_scale": None, "expand_shift": None,
        "row": torch.ones(6, 1, 1, 3), "row_bias": None, "row_scale": None, "row_shift": None,
        "col": torch.ones(6, 1, 3, 1), "col_bias": None, "col_scale": torch.ones(6), "col_shift": None,
        "project": torch.ones(5, 6, 2, 1), "bias": None, "scale": None, "shift": torch.ones(5), "residual": None,
        "geometry": GEOMETRY, "slopes": [0.1] * 4,
    }  # fmt: skip
    return list((named | changes).values())


def test_raw_operator(cpp: str) -> None:
    assert set(torch.library.opcheck(ops.effnet_fwd.default, arguments()).values()) == {"SUCCESS"}
    assert ops.effnet_fwd(*arguments()).shape == (2, 5, 4, 4)
    bad = [
        {"expand": torch.ones(6, 5, 1, 1)}, {"expand": torch.ones(7, 4, 1, 1)}, {"row": torch.ones(5, 1, 1, 3)},
        {"row": torch.ones(6, 1, 3, 3)}, {"col": torch.ones(6, 1, 3, 3)}, {"project": torch.ones(5, 6, 3, 1)},
        {"project": torch.ones(5, 7, 2, 1)}, {"project": torch.ones(0, 6, 2, 1)}, {"geometry": GEOMETRY[:-1]},
        {"slopes": [0.1] * 3}, {"expand_bias": torch.ones(5)}, {"shift": torch.ones(6)},
        {"residual": torch.ones(2, 5, 8, 4)}, {"input": torch.ones(2, 4, 0, 8)}, {"input": torch.ones(2, 4, 1, 8)},
        {"project": torch.ones(5, 6, 2, 1).double()}, {"input": torch.ones(4, 8, 8)},
        {"geometry": [*GEOMETRY[:15], 99, *GEOMETRY[16:]]}, {"input": torch.ones(2, 4, 8, 8).half()},
    ]  # fmt: skip
    for changes in bad:
        with pytest.raises(RuntimeError):
            ops.effnet_fwd(*arguments(**changes))
