"""VGNet ("Efficient CNN Architecture Design Guided by Visualization", arXiv 2207.10318, section 4): the G networks.

The stem, then four stages of a downsampling block and half-identity blocks, then a depthwise convolution with one bank
of kernels for eight chunks of channels, a pointwise convolution, the average pool and the classifier. The stem and the
pointwise convolutions are followed by the activation and then by a batch norm; the depthwise ones by nothing.
"""

from __future__ import annotations

from collections import OrderedDict
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor, nn

from effops.models.classifier import ImageClassifier, activation_factory
from effops.models.registry import register_model

__all__ = ["VGNet"]


class _Row(NamedTuple):
    """A network of the family: channels of the stem and of stages 1 to 4, half-identity blocks of each stage."""

    channels: tuple[int, int, int, int, int]
    halves: tuple[int, int, int, int]


_NETS = {
    "vgnetg_1_0mp": _Row((28, 56, 112, 224, 368), (3, 6, 12, 1)),
    "vgnetg_1_5mp": _Row((32, 64, 128, 256, 512), (2, 6, 13, 1)),
    "vgnetg_2_0mp": _Row((32, 72, 168, 376, 512), (2, 5, 12, 1)),
    "vgnetg_2_5mp": _Row((32, 80, 192, 400, 544), (2, 5, 15, 1)),
}


class VGNet(ImageClassifier):
    """A VGNetG network.

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

    Shape:
        [N, in_channels, H, W] -> [N, num_classes].
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
    ) -> None:
        super().__init__()
        make_act = activation_factory(layers, act)
        first = 1 if thumbnail else 2
        stem = nn.Conv2d(in_channels, channels[0], 3, first, 1, bias=False)
        self.stem = nn.Sequential(
            OrderedDict(conv=stem, act=make_act(), norm=nn.BatchNorm2d(channels[0]))  # conv, act, norm: in this order
        )
        blur = {"sigma": sigma, "alternate_sign": alternate_sign}
        stages = []
        for before, after, count, stride in zip(channels[:-1], channels[1:], halves, (first, 2, 2, 2), strict=True):
            down = layers.DownsamplingBlock(before, after, stride, **blur, act=make_act)
            stages.append(nn.Sequential(down, *(layers.HalfIdentityBlock(after, act=make_act) for _ in range(count))))
        self.stages = nn.Sequential(*stages)
        last = channels[-1]
        self.last = layers.FusedDSConv.from_modules(
            layers.SharedDepthwiseConv2d(last, share=8),
            nn.Conv2d(last, last, 1, bias=False),
            norm=nn.BatchNorm2d(last),
            act=make_act(),
            norm_first=False,
        )
        self.num_features = last
        self.num_classes = num_classes
        self.classifier = nn.Linear(last, num_classes) if num_classes else nn.Identity()

    def forward_features(self, x: Tensor) -> Tensor:
        """[N, in_channels, H, W] -> [N, num_features, h, w]."""
        left, right = self.stages(self.stem(x))
        return self.last(torch.cat([left, right], 1))


def _register(name: str, row: _Row) -> None:
    @register_model(name)
    def build(layers: ModuleType, **kwargs: object) -> VGNet:
        return VGNet(layers, row.channels, row.halves, **kwargs)


for _name, _row in _NETS.items():
    _register(_name, _row)
