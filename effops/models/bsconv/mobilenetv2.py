"""MobileNetV2 (arXiv 1801.04381) as the paper's authors built it, and its BSConv-S form (section 4.2).

It is not torchvision's network, which is registered as `mobilenet_v2`: the first block keeps its expansion from 32 to
32 channels although it has t = 1, widths are rounded down, not to multiples of 8, there is a batch norm on the image
and no dropout. Strides are those of the authors' package (0.4.0).
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

from effops.models.bsconv.bottlenecks import BottleneckClassifier, Plan, Unit, register_forms, scaled

__all__ = ["MobileNetV2"]

# (channels that each unit gives, channels in between), stage by stage.
_STAGES = (
    ((16, 32),),
    ((24, 96), (24, 144)),
    ((32, 144), (32, 192), (32, 192)),
    ((64, 192), (64, 384), (64, 384), (64, 384), (96, 384), (96, 576), (96, 576)),
    ((160, 576), (160, 960), (160, 960), (320, 960)),
)


def _plan(width: float) -> Plan:
    return Plan(
        stem=scaled(32, width),
        stages=[[Unit(scaled(out, width), scaled(mid, width)) for out, mid in stage] for stage in _STAGES],
        strides=(2, 1, 2, 2, 2, 2),
        final=scaled(1280, max(1.0, width)),  # never narrowed
        act="relu6",
        always_expand=True,
    )


class MobileNetV2(BottleneckClassifier):
    """MobileNetV2 of the authors' package.

    Args:
        layers: `effops.modules` or `effops.stock`.
        num_classes: outputs of the classifier; 0 for none.
        width: multiplies channel counts (rounded down); the last 1x1 convolution's only above 1.
        The others: as in `BottleneckClassifier`.

    Shape:
        [N, in_channels, H, W] -> [N, num_classes].

    Raises:
        ValueError: an unknown input, or a width that leaves no channels.

    Example:
        >>> model = create_model("mobilenetv2", width=0.5, input="cifar", num_classes=100).eval()
        >>> model(torch.randn(1, 3, 32, 32)).shape
        torch.Size([1, 100])
    """

    def __init__(self, layers: ModuleType, *, num_classes: int = 1000, width: float = 1.0, **kwargs: Any) -> None:
        super().__init__(layers, _plan(width), num_classes=num_classes, **kwargs)


register_forms("mobilenetv2", MobileNetV2)
