"""EfficientNet-B0 (arXiv 1905.11946, Table 1) and its BSConv-S form (section 5.3, Table 4).

Neither the paper nor the authors' package describes the network they ran. This is EfficientNet's table in the usual
PyTorch reading (5,288,548 parameters with 1,000 classes): squeeze-excites of a quarter of a block's input channels,
SiLU in them as well, symmetric padding, torch's batch norm defaults, dropout ahead of the classifier. There is no batch
norm on the image and no stochastic depth. `input="cifar"` is ours, by the rule of the paper's MobileNets.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

from effops.models.bsconv.bottlenecks import BottleneckClassifier, Expanded, expanded_plan, register_forms

__all__ = ["EfficientNet"]

_STAGES = (
    Expanded(16, 1, 3, 1, expansion=1, se=True),
    Expanded(24, 2, 3, 2, se=True),
    Expanded(40, 2, 5, 2, se=True),
    Expanded(80, 3, 3, 2, se=True),
    Expanded(112, 3, 5, 1, se=True),
    Expanded(192, 4, 5, 2, se=True),
    Expanded(320, 1, 3, 1, se=True),
)


class EfficientNet(BottleneckClassifier):
    """EfficientNet-B0.

    Args:
        layers: `effops.modules` or `effops.stock`.
        num_classes: outputs of the classifier; 0 for none.
        width: multiplies channel counts (rounded to multiples of 8); the last 1x1 convolution's only above 1.
        data_bn: a batch norm on the image.
        dropout: ahead of the classifier.
        The others: as in `BottleneckClassifier`.

    Shape:
        [N, in_channels, H, W] -> [N, num_classes].

    Raises:
        ValueError: an unknown input, or a width that is not above 0.

    Example:
        >>> model = create_model("efficientnet_b0")
        >>> sum(p.numel() for p in model.parameters())
        5288548
    """

    def __init__(
        self,
        layers: ModuleType,
        *,
        num_classes: int = 1000,
        width: float = 1.0,
        data_bn: bool = False,
        dropout: float = 0.2,
        **kwargs: Any,
    ) -> None:
        plan = expanded_plan(_STAGES, width, "silu", {"act": "silu"})
        super().__init__(layers, plan, num_classes=num_classes, data_bn=data_bn, dropout=dropout, **kwargs)


register_forms("efficientnet_b0", EfficientNet)
