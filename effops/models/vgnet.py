"""VGNet ("Efficient CNN Architecture Design Guided by Visualization", arXiv 2207.10318, section 4).

The stem, then four stages of a downsampling block and half-identity blocks, then a depthwise convolution with one bank
of kernels for eight chunks of channels, a pointwise convolution, the average pool and the classifier. The stem and the
pointwise convolutions are followed by the activation and then by a batch norm; the depthwise ones by nothing.

    name                        downsampling    half-identity         last depthwise convolution
    vgnetg_*, vgnetg_*_se       Gaussian        learned               learned
    vgnetc_1_5mp                learned         learned               learned
    vgnetf1_1_5mp               Gaussian        6 edge, 2 Gaussian    learned
    vgnetf2_1_5mp               Gaussian        6 edge, 2 Gaussian    the same 8 kernels
    vgnetf3_1_5mp               Gaussian        2 Sobel, 2 Laplacian  learned
    vgnetf4_1_5mp               Gaussian        2 Sobel, 2 Laplacian  the same 4 kernels

The `_se` nets have a squeeze-excite on the new channels of every downsampling and half-identity block, behind the
norm; its inner activation is ReLU with act="silu" as well.

What the paper leaves open follows its authors' code of December 2021 (ffiirree/cv-models at e14070d): the values of the
kernels, a batch norm behind each fixed kernel of a half-identity block or the last convolution (fixed_bn; the paper's
text has none), and the squeeze-excites' place and width. That code has no F1 and F3: that their last convolution is the
shared learned one, without a norm, is our reading. The paper prints parameters of the G networks alone.

A state dict of that code loads as it is, `vgnet_key_map` says by which names. Its blur alternates in sign: build the
model with alternate_sign=True. Its release of November 2022 is another network, whose last depthwise convolution is
not shared; its weights do not fit.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Iterable
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from effops.models.classifier import ImageClassifier, activation_factory
from effops.models.features import Step
from effops.models.registry import register_model
from effops.modules._keys import rename_keys
from effops.modules.dwconv import FixedFilterConv2d

__all__ = ["VGNet", "vgnet_key_map"]

# Channels of the stem and of stages 1 to 4, half-identity blocks of each stage.
_SIZES = {
    "1_0mp": ((28, 56, 112, 224, 368), (3, 6, 12, 1)),
    "1_5mp": ((32, 64, 128, 256, 512), (2, 6, 13, 1)),
    "2_0mp": ((32, 72, 168, 376, 512), (2, 5, 12, 1)),
    "2_5mp": ((32, 80, 192, 400, 544), (2, 5, 15, 1)),
}

# The authors' names in a block. Fixed kernels and squeeze-excites put a level more around what they stand beside.
_BLOCK_KEYS = (
    (re.compile(r"downsample\.(\w+)"), r"dw.\1"),
    (re.compile(r"half3x3\.(?:0\.)?weight"), "dw.weight"),
    (re.compile(r"half3x3\.1\.(\w+)"), r"dw_norm.\1"),
    (re.compile(r"conv1x1\.(?:0\.)?0\.weight"), "pw.weight"),
    (re.compile(r"conv1x1\.(?:0\.)?2\.(\w+)"), r"norm.\1"),
    (re.compile(r"conv1x1\.1\.((?:reduce|expand)\.\w+)"), r"se.\1"),
)
# What follows the last stage's blocks: a learned (mux) or a fixed depthwise convolution, which has a norm.
_LAST_KEYS = (
    (re.compile(r"0\.(?:mux\.)?weight"), "dw.weight"),
    (re.compile(r"1\.([a-z]\w+)"), r"dw_norm.\1"),
    (re.compile(r"[12]\.0\.weight"), "pw.weight"),
    (re.compile(r"[12]\.2\.(\w+)"), r"norm.\1"),
)
_NET_KEYS = (
    (re.compile(r"features\.stem\.0\.weight"), "stem.conv.weight"),
    (re.compile(r"features\.stem\.2\.(\w+)"), r"stem.norm.\1"),
    (re.compile(r"classifier\.1\.(\w+)"), r"classifier.\1"),
)
_STAGE_KEY = re.compile(r"features\.stage([1-4])\.(\d+)\.(.+)")


def vgnet_key_map(keys: Iterable[str]) -> dict[str, str]:
    """Maps the state-dict keys of the authors' code (ffiirree/cv-models) to those of `VGNet`.

        features.stem.0, .2                               stem.conv, .norm
        features.stageN.0.downsample                      stages.(N-1).0.dw
        features.stageN.I.half3x3                         stages.(N-1).I.dw        fixed: .half3x3.0, .1    dw, dw_norm
        features.stageN.I.conv1x1.0, .2                   stages.(N-1).I.pw, .norm
        features.stageN.I.conv1x1.0.0, .0.2, .1           stages.(N-1).I.pw, .norm, .se    with a squeeze-excite
        features.stage4.L.0.mux, .1.0, .1.2               last.dw, .pw, .norm
        features.stage4.L.0, .1, .2.0, .2.2               last.dw, .dw_norm, .pw, .norm    with fixed kernels

    Args:
        keys: the keys of the state dict.

    Returns:
        {old key: new key}. Keys that do not fit, or are the same, are not in it.

    Example:
        >>> effops.models.vgnet.vgnet_key_map(["features.stage1.1.half3x3.weight"])
        {'features.stage1.1.half3x3.weight': 'stages.0.1.dw.weight'}
    """
    return {key: new for key in keys if (new := _own_key(key)) is not None}


def _own_key(key: str) -> str | None:
    found = _STAGE_KEY.fullmatch(key)
    if found is None:
        return _translated(key, _NET_KEYS)
    stage, index, rest = found.groups()
    own = _translated(rest, _BLOCK_KEYS)
    if own is not None:
        return f"stages.{int(stage) - 1}.{index}.{own}"
    own = _translated(rest, _LAST_KEYS) if stage == "4" else None
    return None if own is None else f"last.{own}"


def _translated(key: str, patterns: tuple[tuple[re.Pattern[str], str], ...]) -> str | None:
    matches = ((pattern.fullmatch(key), new) for pattern, new in patterns)
    return next((found.expand(new) for found, new in matches if found), None)


class _Join(nn.Module):
    """A block's pair of tensors -> one."""

    def forward(self, pair: tuple[Tensor, Tensor]) -> Tensor:
        return torch.cat(pair, 1)


class VGNet(ImageClassifier):
    """A network of the family.

    Args:
        layers: `effops.modules` or `effops.stock`.
        channels: of the stem and of stages 1 to 4.
        halves: the number of half-identity blocks of each stage.
        num_classes: outputs of the classifier; 0 for none.
        in_channels: of the input image.
        act: the activation's name: "relu" (the paper's default) or "silu" (its variant); others work too.
        thumbnail: for small images (CIFAR): stride 1 in the stem and in the first stage, whose downsampling block then
            has a learned depthwise convolution.
        sigma: of the Gaussian in the downsampling blocks.
        alternate_sign: odd channels get the negated Gaussian, as in the authors' first code.
        se: squeeze-excites on the new channels of every block (the `_se` nets).
        blur: the downsampling blocks have the Gaussian; learned kernels where False (the C net).
        bank: the fixed kernels of the half-identity blocks, as in `FixedFilterConv2d`; None for learned ones.
        fixed_last: the last depthwise convolution has those of `bank` as well.
        fixed_bn: a batch norm behind each convolution with kernels of `bank`: in the authors' code, against the
            paper's text. None is True where there are such; it cannot be given where there are none.

    Shape:
        [N, in_channels, H, W] -> [N, num_classes].

    Raises:
        ValueError: fixed_last or fixed_bn without bank.

    Example:
        >>> model = create_model("vgnetg_1_0mp", num_classes=10, thumbnail=True).eval()
        >>> model(torch.randn(1, 3, 32, 32)).shape
        torch.Size([1, 10])
        >>> model.forward_features(torch.randn(1, 3, 32, 32)).shape
        torch.Size([1, 368, 4, 4])
    """

    def __init__(
        self,
        layers: ModuleType,
        channels: tuple[int, ...],
        halves: tuple[int, ...],
        *,
        num_classes: int = 1000,
        in_channels: int = 3,
        act: str = "relu",
        thumbnail: bool = False,
        sigma: float = 1.1,
        alternate_sign: bool = False,
        se: bool = False,
        blur: bool = True,
        bank: str | None = None,
        fixed_last: bool = False,
        fixed_bn: bool | None = None,
    ) -> None:
        super().__init__()
        if bank is None and (fixed_last or fixed_bn is not None):
            raise ValueError(
                "fixed_last and fixed_bn are for the nets with fixed kernels (vgnetf*), whose bank is given"
            )
        make_act = activation_factory(layers, act)
        first = 1 if thumbnail else 2
        stem = nn.Conv2d(in_channels, channels[0], 3, first, 1, bias=False)
        self.stem = nn.Sequential(
            OrderedDict(conv=stem, act=make_act(), norm=nn.BatchNorm2d(channels[0]))  # conv, act, norm: in this order
        )
        fixed_norm = nn.BatchNorm2d if bank is not None and fixed_bn is not False else None
        shared = {"act": make_act, "se": layers.SqueezeExcite if se else None}
        gaussian = {"blur": None if blur else False, "sigma": sigma, "alternate_sign": alternate_sign}
        down = partial(layers.DownsamplingBlock, **gaussian, **shared)
        half = partial(layers.HalfIdentityBlock, bank=bank, dw_norm=fixed_norm, **shared)
        self.steps = [Step("stem", channels[0], first)]
        stages = []
        for before, after, count, stride in zip(channels[:-1], channels[1:], halves, (first, 2, 2, 2), strict=True):
            self.steps.append(Step(f"stages.{len(stages)}", after, stride))
            stages.append(nn.Sequential(down(before, after, stride), *(half(after) for _ in range(count))))
        self.stages = nn.Sequential(*stages)
        self.join = _Join()
        last = channels[-1]
        self.steps += [Step("join", last), Step("last", last)]
        fixed_norm = fixed_norm if fixed_last else None
        self.last = layers.FusedDSConv.from_modules(
            layers.FixedFilterConv2d(last, bank) if fixed_last else layers.SharedDepthwiseConv2d(last, share=8),
            nn.Conv2d(last, last, 1, bias=False),
            dw_norm=fixed_norm and fixed_norm(last),
            norm=nn.BatchNorm2d(last),
            act=make_act(),
            norm_first=False,
        )
        self.num_features = last
        self.num_classes = num_classes
        self.classifier = nn.Linear(last, num_classes) if num_classes else nn.Identity()

    def forward_features(self, x: Tensor) -> Tensor:
        """[N, in_channels, H, W] -> [N, num_features, h, w]."""
        return self.last(self.join(self.stages(self.stem(x))))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        rename_keys(state_dict, prefix, vgnet_key_map(_below(prefix, state_dict)))
        for name, module in self.named_modules():
            key = f"{prefix}{name}.weight"
            if isinstance(module, FixedFilterConv2d) and key in state_dict:
                state_dict[key] = _once(state_dict[key], module.weight.shape[0])
        super()._load_from_state_dict(state_dict, prefix, *args)


def _below(prefix: str, keys: Iterable[str]) -> list[str]:
    return [key[len(prefix) :] for key in keys if key.startswith(prefix)]


def _once(kernels: Tensor, size: int) -> Tensor:
    """The first `size` kernels where the others, one for each channel in the authors' state dicts, repeat them."""
    count = kernels.shape[0] // size
    bank = kernels[:size]
    return bank if count > 1 and torch.equal(kernels, bank.repeat(count, 1, 1, 1)) else kernels


def _register(name: str, size: str, **variant: object) -> None:
    channels, halves = _SIZES[size]

    @register_model(name)
    def build(layers: ModuleType, **kwargs: object) -> VGNet:
        return VGNet(layers, channels, halves, **variant, **kwargs)


for _size in _SIZES:
    _register(f"vgnetg_{_size}", _size)
    _register(f"vgnetg_{_size}_se", _size, se=True)
_register("vgnetc_1_5mp", "1_5mp", blur=False)
_register("vgnetf1_1_5mp", "1_5mp", bank="vgnet8")
_register("vgnetf2_1_5mp", "1_5mp", bank="vgnet8", fixed_last=True)
_register("vgnetf3_1_5mp", "1_5mp", bank="vgnet4")
_register("vgnetf4_1_5mp", "1_5mp", bank="vgnet4", fixed_last=True)
