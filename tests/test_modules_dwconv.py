"""The single depthwise convolutions against their stock twins and against plain torch."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from module_helpers import bank_codes, compare, image
from torch import Tensor, nn

import effops.functional as EF
from effops import modules, stock
from effops.ops.dwconv import banks

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


# ---- named banks: what the kernels are told, and that it is never told of other values ------------------------------

NAMED: dict[str, Callable[[], nn.Module]] = {
    **{name: lambda name=name: modules.FixedFilterConv2d(16, name, 2) for name in banks.BANKS},
    "binomial5 by BlurPool2d": lambda: modules.BlurPool2d(16, 5),
    "vgnet_blur by its block": lambda: modules.DownsamplingBlock(16, 16).dw,
    "vgnet_blur_alternate by its block": lambda: modules.DownsamplingBlock(16, 16, alternate_sign=True).dw,
}
OTHER = torch.arange(8 * 9.0).reshape(8, 1, 3, 3)


def told(module: nn.Module, x: Tensor | None = None) -> int:
    """The code of the named bank with which the module calls its operator, once; 0 for none."""
    with bank_codes() as codes:
        module(torch.zeros(1, 16, 8, 8, dtype=module.weight.dtype) if x is None else x)
    (code,) = codes
    return code


def read(module: nn.Module, x: Tensor) -> Tensor:
    """What the module must give: its operator on the buffer's values, whose name nobody tells."""
    arguments = (module.weight.squeeze(1).clone(), module.stride, module.padding, module.dilation)
    return EF.fixed_filter_conv2d(x, *arguments, backend=module.backend)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NAMED)
def test_a_named_bank_gives_the_same_bits_as_its_values(name: str, dtype: torch.dtype, backend: str) -> None:
    module = NAMED[name]().to(dtype)
    module.backend = backend
    x = image(2, 16, 9, 10, channels_last=True).to(dtype)
    assert torch.equal(module(x), read(module, x))
    by_name = EF.fixed_filter_conv2d(x, name.split()[0], 2, module.padding, backend=backend)
    assert torch.equal(module(x), by_name)
    module.backend = "auto"
    assert told(module) == banks.CODES[name.split()[0]]


def test_the_fused_chain_is_told_the_bank_too() -> None:
    dw = modules.FixedFilterConv2d(16, "vgnet8")
    fused = modules.FusedDSConv.from_modules(dw, nn.Conv2d(16, 8, 1), dw_norm=nn.BatchNorm2d(16)).eval()
    with bank_codes() as codes:
        fused(image(2, 16, 8, 8).float())
        fused.train()(image(2, 16, 8, 8).float())  # statistics, then the chain
    assert codes == [banks.CODES["vgnet8"]] * 3
    with bank_codes() as codes:
        modules.DownsamplingBlock(16, 16)(image(2, 16, 8, 8).float())
    assert codes == [banks.CODES["vgnet_blur"]]


def test_the_gradient_goes_past_a_named_bank(backend: str) -> None:
    module = modules.FixedFilterConv2d(16, "vgnet8", backend=backend).double()
    x = image(2, 16, 7, 8).requires_grad_()
    (ours,) = torch.autograd.grad(module(x).square().sum(), x)
    (theirs,) = torch.autograd.grad(read(module, x).square().sum(), x)
    assert torch.equal(ours, theirs)


CHANGES: dict[str, tuple[Callable[[nn.Module], object], str | None]] = {
    "loaded": (lambda m: m.load_state_dict({"weight": OTHER}), None),
    "loaded and assigned": (lambda m: m.load_state_dict({"weight": OTHER.clone()}, assign=True), None),
    "another bank loaded": (lambda m: m.load_state_dict({"weight": banks.bank("vgnet4").repeat(2, 1, 1, 1)}), None),
    "its own bank loaded": (lambda m: m.load_state_dict({"weight": banks.bank("vgnet8")}), "vgnet8"),
    "loaded and loaded back": (
        lambda m: (m.load_state_dict({"weight": OTHER}), m.load_state_dict({"weight": banks.bank("vgnet8")})),
        "vgnet8",
    ),
    "assigned": (lambda m: setattr(m, "weight", OTHER.clone()), None),
    "in place": (lambda m: m.weight.mul_(2), None),
    "through a view": (lambda m: m.weight[0].zero_(), None),
    "in place in inference mode": (torch.inference_mode()(lambda m: m.weight.mul_(2)), None),
    "by foreach": (lambda m: torch._foreach_add_([m.weight], 1), None),
    "cast": (lambda m: m.double(), None),  # float32 values are not the bank's in float64
    "cast to a half type": (lambda m: m.half(), "vgnet8"),
    "cast to a half type and back": (lambda m: m.half().float(), None),
    "emptied": (lambda m: m.to_empty(device="meta"), None),
    "emptied and loaded": (
        lambda m: m.to_empty(device="meta").load_state_dict({"weight": banks.bank("vgnet8")}, assign=True),
        "vgnet8",
    ),
    "shared": (lambda m: m.share_memory(), "vgnet8"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_of_the_buffer_is_noticed(name: str) -> None:
    change, expected = CHANGES[name]
    module = modules.FixedFilterConv2d(16, "vgnet8")
    change(module)
    if not module.weight.is_meta:
        x = image(2, 16, 7, 8).to(module.weight.dtype)
        assert told(module, x) == banks.CODES.get(expected, 0)
        assert torch.equal(module(x), read(module, x))


def test_another_named_bank_is_recognised_when_loaded() -> None:
    module = modules.FixedFilterConv2d(16, "vgnet_blur")
    module.load_state_dict(modules.BlurPool2d(16, 3).state_dict())
    assert told(module) == banks.CODES["binomial3"]


@pytest.mark.parametrize("changed", [False, True])
@pytest.mark.parametrize("way", ["deepcopy", "copy", "pickle", "save"])
def test_copies_know_their_bank(way: str, changed: bool) -> None:
    module = modules.FixedFilterConv2d(16, "vgnet8")
    if changed:
        module.weight.copy_(OTHER)
    if way == "pickle":
        twin = pickle.loads(pickle.dumps(module))
    elif way == "save":
        file = io.BytesIO()
        torch.save(module, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    else:
        twin = getattr(copy, way)(module)
    x = image(2, 16, 7, 8).float()
    assert told(twin, x) == (0 if changed else banks.CODES["vgnet8"])
    assert torch.equal(twin(x), module(x))
    twin.weight.zero_()
    assert told(twin, x) == 0 and not twin(x).any()
    assert told(module, x) == (0 if changed or way == "copy" else banks.CODES["vgnet8"])  # a shallow copy shares it


def test_tensors_that_count_no_changes_are_read() -> None:
    with torch.inference_mode():
        module = modules.FixedFilterConv2d(16, "vgnet8")
        assert told(module) == 0
        module.weight.zero_()
        assert not module(torch.ones(1, 16, 8, 8)).any()


def test_functional_call_takes_the_given_bank() -> None:
    module = modules.FixedFilterConv2d(16, "vgnet8")
    x = image(2, 16, 7, 8).float()
    y = torch.func.functional_call(module, {"weight": OTHER}, (x,))
    assert torch.equal(y, EF.fixed_filter_conv2d(x, OTHER.squeeze(1)))
    assert told(module, x) == banks.CODES["vgnet8"]


def test_autocast_rounds_a_named_bank_once(backend: str) -> None:
    module = modules.FixedFilterConv2d(16, "vgnet8", backend=backend)
    x = image(2, 16, 7, 8).float()
    with torch.autocast("cpu", torch.bfloat16):
        y = module(x)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, EF.fixed_filter_conv2d(x.bfloat16(), "vgnet8", backend=backend))


def test_compiled_graphs_follow_the_buffer(backend: str) -> None:
    """Neither a compiled nor an exported graph may have the bank's code beside a buffer that can change."""
    module = modules.FixedFilterConv2d(16, "vgnet8", 2, backend=backend)
    x = image(2, 16, 7, 8).float()
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    exported = torch.export.export(module, (x,)).module()
    y = module(x)
    assert torch.equal(compiled(x), y) and torch.equal(exported(x), y)
    for graph in (module, exported):
        graph.weight.copy_(OTHER)
    assert torch.equal(compiled(x), read(module, x)) and torch.equal(exported(x), read(module, x))
