"""MulticeptionConv2d and MixConv2d against the same sub-modules called one by one by torch."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from conftest import require_backend
from helpers import assert_within_budget
from module_helpers import BN, randomise
from torch import Tensor, nn

import effops
from effops import MixConv2d, MulticeptionConv2d


@pytest.fixture(params=("reference", "cpp"))
def backend(request: pytest.FixtureRequest) -> str:
    require_backend(request.param)
    return request.param


class Twin(nn.Module):
    """What the block computes, written with torch's modules alone; shares the block's state dict."""

    def __init__(self, block: nn.Module, split: bool) -> None:
        super().__init__()
        self.split = split
        for name in ("dw", "dw_norm", "pw", "norm", "act"):
            setattr(self, name, copy.deepcopy(getattr(block, name)))

    def forward(self, x: Tensor) -> Tensor:
        inputs = x.split([conv.in_channels for conv in self.dw], 1) if self.split else [x] * len(self.dw)
        z = torch.cat([conv(part) for conv, part in zip(self.dw, inputs, strict=True)], 1)
        return self.act(self.norm(self.pw(self.dw_norm(z))))


# id: (class, arguments, keyword arguments, input shape)
BLOCKS: dict[str, tuple[type[nn.Module], tuple, dict[str, Any], tuple[int, ...]]] = {
    "stage1": (MulticeptionConv2d, (6, 8), {"act": "relu"}, (3, 6, 9, 8)),
    "stage2-s2": (MulticeptionConv2d, (6, 12, (3, 5), 2), {"act": "silu"}, (3, 6, 9, 8)),
    "stage3-twice_the_same": (MulticeptionConv2d, (5, 4, (3, 3), (1, 2)), {}, (2, 5, 6, 7)),
    "one_size-s2": (MulticeptionConv2d, (6, 8, (3,), 2), {}, (3, 6, 9, 8)),
    "no_norms": (MulticeptionConv2d, (4, 6, ((1, 3), 5)), {"dw_norm": None, "norm": None, "bias": False}, (2, 4, 6, 7)),
    # Of a size where neither rounding nor cancellation decides the float32 comparison.
    "group_norm_behind": (MulticeptionConv2d, (8, 12), {"norm": lambda c: nn.GroupNorm(2, c)}, (2, 8, 8, 9)),
    "group_norm_between": (MulticeptionConv2d, (4, 6), {"dw_norm": lambda c: nn.GroupNorm(2, c)}, (2, 4, 6, 6)),
    "mix-s2": (MixConv2d, (11, 8), {"stride": 2, "norm": BN, "act": "silu"}, (3, 11, 9, 8)),
    "mix-norm_between": (MixConv2d, (7, 5, (3, 5), (2, 1)), {"dw_norm": BN, "norm": BN}, (3, 7, 9, 8)),
    "mix-dense": (MixConv2d, (7, 11), {"dense": True, "stride": 2}, (2, 7, 9, 8)),
}


def pair(name: str, dtype: torch.dtype, backend: str) -> tuple[nn.Module, nn.Module, Tensor]:
    kind, arguments, keywords, shape = BLOCKS[name]
    torch.manual_seed(1)
    block = kind(*arguments, **keywords, backend=backend)
    randomise(block)
    block.to(dtype)
    x = torch.randn(shape, dtype=torch.float64).to(dtype).contiguous(memory_format=torch.channels_last)
    return block, Twin(block, kind is MixConv2d), x


def run(module: nn.Module, x: Tensor) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """The output, every gradient, the buffers afterwards."""
    x = x.detach().requires_grad_()
    y = module(x)
    names, parameters = zip(*module.named_parameters(), strict=True)
    weights = torch.linspace(0.5, 1.5, y.numel(), dtype=torch.float64).view(y.shape).to(y.dtype)
    grads = torch.autograd.grad(y, (x, *parameters), weights)
    return y.detach(), dict(zip(("input", *names), grads, strict=True)), dict(module.named_buffers())


@pytest.mark.parametrize("train", (False, True), ids=("eval", "train"))
@pytest.mark.parametrize("name", BLOCKS)
def test_matches_the_twin(name: str, train: bool, backend: str) -> None:
    """Output, gradients and running statistics, in float64 to its rounding and in float32 by the budget."""
    results = {}
    for dtype in (torch.float64, torch.float32):
        block, twin, x = pair(name, dtype, backend)
        results[dtype] = (run(block.train(train), x), run(twin.train(train), x))
    (_, truth), (_, yardstick) = results[torch.float64], results[torch.float32]
    for dtype, (actual, _) in results.items():
        assert_within_budget(actual[0], truth[0], yardstick[0], f"{name} output", computed_in=dtype)
        for which in (1, 2):
            for key, value in actual[which].items():
                if not value.is_floating_point():
                    assert torch.equal(value, truth[which][key])
                elif truth[which][key].abs().max() > 1e-9:  # a bias ahead of a batch norm has no gradient but rounding
                    assert_within_budget(
                        value, truth[which][key], yardstick[which][key], f"{name} {key}", computed_in=dtype
                    )


@pytest.mark.parametrize("name", BLOCKS)
def test_fusion_reasons(name: str) -> None:
    block, _, x = pair(name, torch.float32, "auto")
    block.eval()
    reasons = block.fusion_reasons()
    expected = {
        "group_norm_behind": ("norm is GroupNorm, not a plain BatchNorm2d",),
        "group_norm_between": ("dw_norm is GroupNorm, not a plain BatchNorm2d",),
        "mix-dense": ("dense=True: the groups are dense convolutions, which run as torch's",),
    }
    assert reasons == expected.get(name, ())
    assert all(reason in repr(block) for reason in reasons)
    functions = [call.function for call in effops.explain(block, x).calls]
    fused = {MulticeptionConv2d: "multiception_conv2d", MixConv2d: "mix_conv2d"}[type(block)]
    assert functions == ([] if name in ("group_norm_between", "mix-dense") else [fused])


def test_training_never_stores_the_concatenation(cpp: str) -> None:
    """Statistics of each part over the whole map, then one kernel at the strided positions."""
    block, _, x = pair("stage2-s2", torch.float32, cpp)
    calls = effops.explain(block.train(), x).calls
    assert [(call.function, call.kernel) for call in calls] == [
        ("depthwise_stats2d", "3x3"),
        ("depthwise_stats2d", "5x5"),
        ("multiception_conv2d", "3x3, 5x5 stride 2x2 + 1x1"),
    ]


def test_training_saves_less(cpp: str) -> None:
    """For backward: the input once and the pointwise result, where torch keeps the concatenation and its norm too."""
    block = MulticeptionConv2d(8, 8, backend=cpp)
    x = torch.randn(4, 8, 16, 16).requires_grad_()
    saved = {}
    for name, module in (("fused", block), ("twin", Twin(block, False))):
        storages = {}

        def pack(t: Tensor, storages: dict[int, int] = storages) -> Tensor:
            storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            output = module(x)
        saved[name] = sum(storages.values())
        del output
    assert saved["fused"] < 0.4 * saved["twin"], saved


def test_hooks_are_obeyed(cpp: str) -> None:
    block, twin, x = pair("stage1", torch.float32, cpp)
    seen = []
    block.dw[1].register_forward_hook(lambda *_: seen.append("dw"))
    assert block.eval().fusion_reasons() == ("dw.1 has forward hooks",)
    torch.testing.assert_close(block(x), twin.eval()(x))
    assert seen == ["dw"]


def test_state_dict_copies_and_pickles() -> None:
    block, twin, x = pair("stage1", torch.float32, "auto")
    weights = [f"dw.{i}.weight" for i in range(3)]
    norm = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]
    keys = [*weights, *(f"dw_norm.{k}" for k in norm), "pw.weight", "pw.bias", *(f"norm.{k}" for k in norm)]
    assert list(block.state_dict()) == keys == list(twin.state_dict())
    for other in (copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        torch.testing.assert_close(other.eval()(x), block.eval()(x))


def test_an_empty_batch_and_a_single_value(backend: str) -> None:
    block, _, x = pair("stage1", torch.float32, backend)
    for mode in (True, False):
        assert block.train(mode)(x[:0]).shape == (0, 8, 9, 8)
    before = copy.deepcopy(block.state_dict())
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training, got input size"):
        block.train()(x[:1, :, :1, :1])
    torch.testing.assert_close(block.state_dict(), before)


def test_compile(backend: str) -> None:
    block, _, x = pair("stage2-s2", torch.float32, backend)
    block.eval()
    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), block(x))


@pytest.mark.parametrize(
    ("conv", "expected"), [("published", 458_730), ("dense", 752_188), ("multiception", 509_434)]
)  # fmt: skip
def test_published_parameter_counts(conv: str, expected: int) -> None:
    """ResNet-50 for CIFAR-10 of the paper's Table 5, with the sets of sizes of the authors' code."""

    def unit(c: int, k: int, stride: int, sizes: tuple[int, ...]) -> nn.Module:
        if conv == "multiception":
            return MulticeptionConv2d(c, k, sizes, stride)
        dense = conv == "dense"
        return MixConv2d(c, k, stride=stride, dense=dense, norm=None if dense else BN)

    total, c = 3 * 16 * 9 + 2 * 16 + 64 * 10 + 10, 16  # stem and classifier
    for k, stride, sizes in ((16, 1, (3, 5, 7)), (32, 2, (3, 5)), (64, 2, (3, 3))):
        for block in range(8):
            total += sum(p.numel() for p in unit(c, k, stride if block == 0 else 1, sizes).parameters())
            total += 9 * k * k + 2 * k + (c * k + 2 * k if c != k else 0)
            c = k
    assert total == expected


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (lambda: MulticeptionConv2d(8, 8, 3), TypeError,
         "MulticeptionConv2d: kernel_sizes must be a list of ints or pairs, got 3"),
        (lambda: MulticeptionConv2d(8, 8, ()), ValueError,
         "MulticeptionConv2d: kernel_sizes is empty; give at least one"),
        (lambda: MulticeptionConv2d(8, 8, (3, 4)), ValueError,
         "MulticeptionConv2d: kernel_sizes must be odd, so that all parts have one size; got (3, 4)"),
        (lambda: MulticeptionConv2d(8, 0), ValueError, "MulticeptionConv2d: out_channels must be at least 1, got 0"),
        (lambda: MixConv2d(2, 8), ValueError, "MixConv2d: in_channels must be at least 3, got 2"),
        (lambda: MixConv2d(8, 2, dense=True), ValueError, "MixConv2d: out_channels must be at least 3, got 2"),
        (lambda: MixConv2d(8, 8, dense=True, dw_norm=BN), ValueError,
         "MixConv2d: dense=True has no depthwise convolutions for dw_norm; give norm"),
    ],
)  # fmt: skip
def test_messages(make: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind) as raised:
        make()
    assert str(raised.value) == message
