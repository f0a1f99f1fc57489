"""DenseNet-121 (arXiv 1608.06993), standard and as the BSConv paper's Table 4 has it (`densenet121_bsconvu`).

The drop-in rule replaces the 3x3 convolution of every dense layer; the 7x7 stem and the 1x1 convolutions stay. The
paper prints no counts of it. The state-dict keys in the standard form are torchvision's.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor, nn

from effops.models.bsconv.layers import BlueprintClassifier, DropIn, register_drop_ins
from effops.models.classifier import activation_factory
from effops.models.features import Step

__all__ = ["DenseNet"]

_LAYERS = (6, 12, 24, 16)
_GROWTH = 32
_BOTTLENECK = 4 * _GROWTH
_STEM = 2 * _GROWTH


class _DenseLayer(nn.Module):
    """A 1x1 and a 3x3 convolution, each behind a batch norm and an activation; the input comes along in front."""

    def __init__(self, conv: DropIn, act: Callable[[], nn.Module], channels: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(channels)
        self.relu1 = act()
        self.conv1 = conv(channels, _BOTTLENECK, 1)
        self.norm2 = nn.BatchNorm2d(_BOTTLENECK)
        self.relu2 = act()
        self.conv2 = conv(_BOTTLENECK, _GROWTH)

    def forward(self, x: Tensor) -> Tensor:
        z = self.conv1(self.relu1(self.norm1(x)))
        return torch.cat([x, self.conv2(self.relu2(self.norm2(z)))], 1)


class DenseNet(BlueprintClassifier):
    """DenseNet-121.

    Args:
        layers: `effops.modules` or `effops.stock`.
        form: as in `DropIn`.
        num_classes: outputs of the classifier; 0 for none. Table 4 has 120 (Stanford Dogs).
        in_channels: of the input image.
        data_bn: as in `BlueprintClassifier`.

    Shape:
        [N, in_channels, H, W] -> [N, num_classes], H and W at least 32.

    Raises:
        ValueError: an unknown form.

    Example:
        >>> model = create_model("densenet121_bsconvu", num_classes=120)
        >>> model.num_features, sum(p.numel() for p in model.parameters())
        (1024, 5193016)
    """

    def __init__(
        self,
        layers: ModuleType,
        form: str = "standard",
        *,
        num_classes: int = 1000,
        in_channels: int = 3,
        data_bn: bool = False,
    ) -> None:
        super().__init__(in_channels, data_bn)
        conv, act = DropIn(layers, form), activation_factory(layers, "relu")
        features = OrderedDict(
            conv0=conv(in_channels, _STEM, 7, 2), norm0=nn.BatchNorm2d(_STEM), relu0=act(), pool0=nn.MaxPool2d(3, 2, 1)
        )
        channels = _STEM
        self.steps += [Step("features.conv0", _STEM, 2), Step("features.norm0", _STEM), Step("features.relu0", _STEM)]
        self.steps.append(Step("features.pool0", _STEM, 2))
        for index, count in enumerate(_LAYERS, 1):
            block = OrderedDict()
            for number in range(1, count + 1):
                block[f"denselayer{number}"] = _DenseLayer(conv, act, channels)
                channels += _GROWTH
            features[f"denseblock{index}"] = nn.Sequential(block)
            self.steps.append(Step(f"features.denseblock{index}", channels))
            if index < len(_LAYERS):
                features[f"transition{index}"] = _transition(conv, act, channels)
                channels //= 2
                self.steps.append(Step(f"features.transition{index}", channels, 2))
        features |= OrderedDict(norm5=nn.BatchNorm2d(channels), relu5=act())
        self.steps += [Step("features.norm5", channels), Step("features.relu5", channels)]
        self.features = nn.Sequential(features)
        self._add_classifier(channels, num_classes)


def _transition(conv: DropIn, act: Callable[[], nn.Module], channels: int) -> nn.Sequential:
    return nn.Sequential(
        OrderedDict(
            norm=nn.BatchNorm2d(channels), relu=act(), conv=conv(channels, channels // 2, 1), pool=nn.AvgPool2d(2, 2)
        )
    )


register_drop_ins("densenet121", DenseNet)
