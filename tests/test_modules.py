"""What holds for every module: public names, device and dtype, errors of the constructors' arguments."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from module_helpers import BN
from torch import nn

import effops
from effops import modules


def test_device_and_dtype() -> None:
    for make in (
        lambda **kw: modules.FusedDSConv(4, 4, dw_norm=BN, dw_act="silu", norm=BN, act="hardswish", **kw),
        lambda **kw: modules.DepthwiseConv2d(4, **kw),
        lambda **kw: modules.SharedDepthwiseConv2d(8, **kw),
        lambda **kw: modules.FixedFilterConv2d(8, **kw),
        lambda **kw: modules.BlurPool2d(8, **kw),
        lambda **kw: modules.HalfIdentityBlock(4, **kw),
        lambda **kw: modules.DownsamplingBlock(4, 4, **kw),
    ):
        module = make(device="meta", dtype=torch.float64)
        for tensor in (*module.parameters(), *module.buffers()):
            assert tensor.device.type == "meta"
            assert tensor.dtype in (torch.float64, torch.int64)


def test_modules_are_public() -> None:
    for name in modules.__all__:
        assert name.endswith("_key_map") or getattr(effops, name) is getattr(modules, name)


class NotANorm:
    pass


ERRORS: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "channels 0": (lambda: modules.FusedDSConv(0, 4), ValueError, "FusedDSConv: in_channels must be at least 1, got 0"),
    "channels float": (
        lambda: modules.FusedDSConv(4, 4.0),
        TypeError,
        "FusedDSConv: out_channels must be an int, got 4.0 (float)",
    ),
    "bool": (
        lambda: modules.FusedDSConv(True, 4),
        TypeError,
        "FusedDSConv: in_channels must be an int, got True (bool)",
    ),
    "kernel triple": (
        lambda: modules.FusedDSConv(4, 4, (1, 2, 3)),
        ValueError,
        "FusedDSConv: kernel_size must be an int or a pair (height, width), got (1, 2, 3)",
    ),
    "even kernel": (
        lambda: modules.FusedDSConv(4, 4, 2),
        ValueError,
        "FusedDSConv: padding=None means 'same' and needs an odd kernel_size, got (2, 2); give it",
    ),
    "stride 0": (
        lambda: modules.FusedDSConv(4, 4, stride=0),
        ValueError,
        "FusedDSConv: stride must be at least 1, got 0",
    ),
    "dilation": (
        lambda: modules.DepthwiseConv2d(4, dilation=-1),
        ValueError,
        "DepthwiseConv2d: dilation must be at least 1, got -1",
    ),
    "padding word": (
        lambda: modules.FusedDSConv(4, 4, padding="full"),
        ValueError,
        "FusedDSConv: unknown padding 'full'; accepted words: 'same', 'valid'",
    ),
    "padding triple": (
        lambda: modules.FusedDSConv(4, 4, padding=(1, 1, 1)),
        ValueError,
        "FusedDSConv: padding must be an int, (height, width), (left, right, top, bottom), 'same', 'valid' or None, "
        "got (1, 1, 1)",
    ),
    "padding negative": (
        lambda: modules.FusedDSConv(4, 4, padding=-1),
        ValueError,
        "FusedDSConv: padding must be at least 0, got -1",
    ),
    "same with stride": (
        lambda: modules.FusedDSConv(4, 4, padding="same", stride=2),
        ValueError,
        "FusedDSConv: padding='same' needs stride 1, got (2, 2); give the padding as numbers",
    ),
    "uneven reflect": (
        lambda: modules.FusedDSConv(4, 4, padding=(0, 1, 0, 1), padding_mode="reflect"),
        ValueError,
        "FusedDSConv: uneven padding (0, 1, 0, 1) needs padding_mode='zeros', got 'reflect'",
    ),
    "uneven depthwise": (
        lambda: modules.DepthwiseConv2d(4, padding=(0, 1, 0, 1)),
        ValueError,
        "DepthwiseConv2d: uneven padding (0, 1, 0, 1) is not supported here; use F.pad and padding=0",
    ),
    "padding mode": (
        lambda: modules.FusedDSConv(4, 4, padding_mode="mirror"),
        ValueError,
        "FusedDSConv: unknown padding_mode 'mirror'; accepted: zeros, reflect, replicate, circular",
    ),
    "word and mode": (
        lambda: modules.SharedDepthwiseConv2d(8, padding="same", padding_mode="reflect"),
        ValueError,
        "SharedDepthwiseConv2d: padding='same' needs padding_mode='zeros', got 'reflect'",
    ),
    "activation": (
        lambda: modules.FusedDSConv(4, 4, act="swish"),
        ValueError,
        "FusedDSConv: unknown activation 'swish' for act; accepted: none, relu, relu6, leaky_relu, silu, hardswish, "
        "hardsigmoid, sigmoid, gelu, or a module",
    ),
    "activation kind": (
        lambda: modules.FusedDSConv(4, 4, dw_act=3),
        TypeError,
        "FusedDSConv: dw_act must be an activation's name, a module, a module class or None, got 3",
    ),
    "norm instance": (
        lambda: modules.FusedDSConv(4, 4, norm=nn.ReLU()),
        TypeError,
        "FusedDSConv: norm must be None or a factory that is called with the channel count, such as nn.BatchNorm2d, "
        "got ReLU()",
    ),
    "norm factory": (
        lambda: modules.FusedDSConv(4, 4, dw_norm=lambda channels: NotANorm()),
        TypeError,
        "FusedDSConv: dw_norm(4) returned NotANorm, not an nn.Module",
    ),
    "residual channels": (
        lambda: modules.FusedDSConv(4, 6, residual=True),
        ValueError,
        "FusedDSConv: residual=True needs in_channels == out_channels, got 4 and 6",
    ),
    "residual stride": (
        lambda: modules.FusedDSConv(4, 4, stride=2, residual=True),
        ValueError,
        "FusedDSConv: residual=True needs stride 1, got (2, 2)",
    ),
    "residual padding": (
        lambda: modules.FusedDSConv(4, 4, padding=0, residual=True),
        ValueError,
        "FusedDSConv: residual=True needs a padding that keeps height and width; they change by (-2, -2)",
    ),
    "dw not depthwise": (
        lambda: modules.FusedDSConv.from_modules(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 1)),
        ValueError,
        "FusedDSConv.from_modules: dw must be depthwise (groups == in_channels), got groups=1, in_channels=4, "
        "out_channels=4",
    ),
    "dw kind": (
        lambda: modules.FusedDSConv.from_modules(nn.Linear(4, 4), nn.Conv2d(4, 4, 1)),
        TypeError,
        "FusedDSConv.from_modules: dw must be an nn.Conv2d or a depthwise module of effops, got "
        "Linear(in_features=4, out_features=4, bias=True)",
    ),
    "pw kind": (
        lambda: modules.FusedDSConv.from_modules(nn.Conv2d(4, 4, 3, groups=4), None),
        TypeError,
        "FusedDSConv.from_modules: pw must be an nn.Conv2d, got None",
    ),
    "pw 3x3": (
        lambda: modules.FusedDSConv.from_modules(nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 4, 3)),
        ValueError,
        "FusedDSConv.from_modules: pw must have kernel 1x1, stride 1, padding 0 and one group, got "
        "Conv2d(4, 4, kernel_size=(3, 3), stride=(1, 1))",
    ),
    "channels between": (
        lambda: modules.FusedDSConv.from_modules(nn.Conv2d(4, 8, 3, groups=4), nn.Conv2d(4, 4, 1)),
        ValueError,
        "FusedDSConv.from_modules: dw gives 8 channels, pw takes 4; they must be equal",
    ),
    "norm channels": (
        lambda: modules.FusedDSConv.from_modules(nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 6, 1), norm=BN(4)),
        ValueError,
        "FusedDSConv.from_modules: norm has 4 features, its input 6 channels",
    ),
    "norm kind": (
        lambda: modules.FusedDSConv.from_modules(nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 6, 1), dw_norm="bn"),
        TypeError,
        "FusedDSConv.from_modules: dw_norm must be a module or None, got 'bn'",
    ),
    "share": (
        lambda: modules.SharedDepthwiseConv2d(10, 4),
        ValueError,
        "SharedDepthwiseConv2d: channels must be divisible by share=4, got 10",
    ),
    "bank name": (
        lambda: modules.FixedFilterConv2d(4, "sobel"),
        ValueError,
        "FixedFilterConv2d: unknown bank 'sobel'; accepted: 'vgnet8', 'vgnet4', 'vgnet_blur', 'vgnet_blur_alternate', "
        "'binomial3', 'binomial5', or a tensor [K,R,S]",
    ),
    "bank kind": (
        lambda: modules.FixedFilterConv2d(4, [[1.0]]),
        TypeError,
        "FixedFilterConv2d: bank must be a name or a floating-point tensor [K, kh, kw], got list",
    ),
    "bank dtype": (
        lambda: modules.FixedFilterConv2d(4, torch.ones(1, 3, 3, dtype=torch.int32)),
        TypeError,
        "FixedFilterConv2d: bank must be a name or a floating-point tensor [K, kh, kw], got torch.int32",
    ),
    "bank shape": (
        lambda: modules.FixedFilterConv2d(4, torch.ones(3, 3)),
        ValueError,
        "FixedFilterConv2d: bank must have shape [K, kh, kw] with no zero size, got [3, 3]",
    ),
    "filter": (
        lambda: modules.BlurPool2d(4, filter="box"),
        ValueError,
        "BlurPool2d: unknown filter 'box'; accepted: binomial, gaussian",
    ),
    "sigma": (
        lambda: modules.BlurPool2d(4, filter="gaussian", sigma=0),
        ValueError,
        "BlurPool2d: sigma must be above 0, got 0",
    ),
    "odd channels": (
        lambda: modules.HalfIdentityBlock(5),
        ValueError,
        "HalfIdentityBlock: channels must be even, got 5",
    ),
    "odd output": (
        lambda: modules.DownsamplingBlock(4, 5),
        ValueError,
        "DownsamplingBlock: out_channels must be even, got 5",
    ),
    "not a pair": (
        lambda: modules.HalfIdentityBlock(4)(torch.zeros(1, 4, 3, 3)),
        TypeError,
        "HalfIdentityBlock: the input must be a pair (left, right) of tensors, got Tensor",
    ),
    "not a pair either": (
        lambda: modules.DownsamplingBlock(4, 4)([torch.zeros(1, 4, 3, 3)]),
        TypeError,
        "DownsamplingBlock: the input must be a pair (left, right) of tensors, got list",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name: str) -> None:
    call, kind, message = ERRORS[name]
    with pytest.raises(kind) as caught:
        call()
    assert type(caught.value) is kind
    assert str(caught.value) == message
