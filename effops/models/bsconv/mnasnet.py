"""MnasNet (arXiv 1807.11626), B1 and A1, and their BSConv-S forms (section 5.3, Table 4).

    mnasnet_b1      without squeeze-excite (4,383,312 parameters with 1,000 classes)
    mnasnet_a1      with squeeze-excite in three of its stages (3,887,038)

The BSConv paper does not tell which of the two it ran, and the authors' package has neither: both are here, in the
usual PyTorch reading (squeeze-excites of a quarter of a block's input channels, symmetric padding, torch's batch norm
defaults, dropout ahead of the classifier), without a batch norm on the image. `input="cifar"` is ours, by the rule of
the paper's MobileNets.
"""

from __future__ import annotations

from functools import partial
from types import ModuleType
from typing import Any

from effops.models.bsconv.bottlenecks import BottleneckClassifier, Expanded, expanded_plan, register_forms

__all__ = ["MnasNet"]


_B1 = (
    Expanded(16, 1, 3, 1, expansion=1),
    Expanded(24, 3, 3, 2, expansion=3),
    Expanded(40, 3, 5, 2, expansion=3),
    Expanded(80, 3, 5, 2),
    Expanded(96, 2, 3, 1),
    Expanded(192, 4, 5, 2),
    Expanded(320, 1, 3, 1),
)
_A1 = (
    Expanded(16, 1, 3, 1, expansion=1),
    Expanded(24, 2, 3, 2),
    Expanded(40, 3, 5, 2, expansion=3, se=True),
    Expanded(80, 4, 3, 2),
    Expanded(112, 2, 3, 1, se=True),
    Expanded(160, 3, 5, 2, se=True),
    Expanded(320, 1, 3, 1),
)


class MnasNet(BottleneckClassifier):
    """MnasNet-B1 or -A1.

    Args:
        layers: `effops.modules` or `effops.stock`.
        stages: B1's or A1's.
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
        >>> model = create_model("mnasnet_a1")
        >>> sum(p.numel() for p in model.parameters())
        3887038
    """

    def __init__(
        self,
        layers: ModuleType,
        stages: tuple[Expanded, ...],
        *,
        num_classes: int = 1000,
        width: float = 1.0,
        data_bn: bool = False,
        dropout: float = 0.2,
        **kwargs: Any,
    ) -> None:
        plan = expanded_plan(stages, width, "relu")
        super().__init__(layers, plan, num_classes=num_classes, data_bn=data_bn, dropout=dropout, **kwargs)


register_forms("mnasnet_b1", partial(MnasNet, stages=_B1))
register_forms("mnasnet_a1", partial(MnasNet, stages=_A1))
