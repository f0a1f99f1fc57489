"""MobileNetV3 (arXiv 1905.02244), small and large, as the paper's authors built them, and their BSConv-S forms (4.2).

What differs from the MobileNetV3 paper is as in the authors' package (0.4.0): its default "light" head ends in the pool
and the classifier (`head="full"` is the other one); the small network has a squeeze-excite behind its last 1x1
convolution; squeeze-excites take a quarter of the channels (rounded down); widths are rounded down; blocks with t = 1
keep their expansion; there is a batch norm on the image.
"""

from __future__ import annotations

from collections import OrderedDict
from functools import partial
from types import ModuleType
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from effops.models.bsconv.bottlenecks import BottleneckClassifier, Plan, Unit, initialise, register_forms, scaled
from effops.models.bsconv.layers import dense_conv
from effops.models.classifier import activation_factory
from effops.models.features import Step

__all__ = ["MobileNetV3"]

_SE = {"gate": "hardsigmoid"}


class _Stage(NamedTuple):
    """`units` are (channels that the unit gives, channels in between); the last `se` of them have squeeze-excites."""

    units: tuple[tuple[int, int], ...]
    kernel: int
    act: str
    se: int


class _Network(NamedTuple):
    """`final` channels of the last 1x1 convolution, `hidden` ones of the full head; `se` behind the former."""

    stages: tuple[_Stage, ...]
    strides: tuple[int, ...]
    final: int
    hidden: int
    se: bool


_SMALL = _Network(
    (
        _Stage(((16, 16),), 3, "relu", 1),
        _Stage(((24, 72), (24, 88)), 3, "relu", 0),
        _Stage(((40, 96), (40, 240), (40, 240), (48, 120), (48, 144)), 5, "hardswish", 5),
        _Stage(((96, 288), (96, 576), (96, 576)), 5, "hardswish", 3),
    ),
    strides=(2, 2, 2, 2, 2),
    final=576,
    hidden=1024,
    se=True,
)
_LARGE = _Network(
    (
        _Stage(((16, 16),), 3, "relu", 0),
        _Stage(((24, 64), (24, 72)), 3, "relu", 0),
        _Stage(((40, 72), (40, 120), (40, 120)), 5, "relu", 3),
        _Stage(((80, 240), (80, 200), (80, 184), (80, 184), (112, 480), (112, 672)), 3, "hardswish", 2),
        _Stage(((160, 672), (160, 960), (160, 960)), 5, "hardswish", 3),
    ),
    strides=(2, 1, 2, 2, 2, 2),
    final=960,
    hidden=1280,
    se=False,
)


def _units(stage: _Stage, width: float) -> list[Unit]:
    units = []
    for index, (out, mid) in enumerate(stage.units):
        mid = scaled(mid, width)
        excites = index >= len(stage.units) - stage.se
        if excites and mid < 4:
            raise ValueError(
                f"width must leave 4 channels at least, of which a squeeze-excite takes a quarter, got {width}"
            )
        units.append(Unit(scaled(out, width), mid, stage.kernel, mid // 4 if excites else 0, stage.act))
    return units


def _plan(network: _Network, width: float) -> Plan:
    return Plan(
        stem=scaled(16, width),
        stages=[_units(stage, width) for stage in network.stages],
        strides=network.strides,
        final=scaled(network.final, max(1.0, width)),  # never narrowed
        act="hardswish",
        se=_SE,
        always_expand=True,
    )


class MobileNetV3(BottleneckClassifier):
    """MobileNetV3 of the authors' package.

    Args:
        layers: `effops.modules` or `effops.stock`.
        network: small or large.
        num_classes: outputs of the classifier; 0 for none.
        width: multiplies channel counts (rounded down); the last 1x1 convolution's only above 1.
        head: "light", or "full": behind the pool another 1x1 convolution (1,024 channels in the small network, 1,280 in
            the large one; without a bias and a batch norm) and hardswish. `num_features` are then its channels, and
            `forward_head(x, pre_logits=True)` its results.
        The others: as in `BottleneckClassifier`.

    Shape:
        [N, in_channels, H, W] -> [N, num_classes].

    Raises:
        ValueError: an unknown head or input, or a width that leaves no channels.

    Example:
        >>> model = create_model("mobilenetv3_small", head="full").eval()
        >>> model.num_features, model(torch.randn(1, 3, 64, 64)).shape
        (1024, torch.Size([1, 1000]))
    """

    _renames = (
        *BottleneckClassifier._renames,
        (r"^features\.final_se\.conv1\.", "features.final_se.reduce."),
        (r"^features\.final_se\.conv2\.", "features.final_se.expand."),
        (r"^features\.final_conv2\.", "hidden."),
    )

    def __init__(
        self,
        layers: ModuleType,
        network: _Network,
        *,
        num_classes: int = 1000,
        width: float = 1.0,
        head: str = "light",
        **kwargs: Any,
    ) -> None:
        if head not in ("light", "full"):
            raise ValueError(f"unknown head {head!r}; accepted: light, full")
        super().__init__(layers, _plan(network, width), num_classes=num_classes, **kwargs)
        final = self.num_features
        if network.se:
            self.features.add_module("final_se", layers.SqueezeExcite(final, final // 4, **_SE))
            initialise(self.features.final_se)
            self.steps.append(Step("features.final_se", final))
        self.hidden: nn.Module = nn.Identity()
        if head == "full":
            act = activation_factory(layers, "hardswish")
            self.hidden = nn.Sequential(OrderedDict(conv=dense_conv(final, network.hidden, 1), act=act()))
            self._add_classifier(network.hidden, num_classes)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Feature maps -> [N, num_classes], or what the classifier reads [N, num_features] with `pre_logits`."""
        x = self.hidden(F.adaptive_avg_pool2d(x, 1)).flatten(1)
        return x if pre_logits else self.classifier(self.dropout(x))


register_forms("mobilenetv3_small", partial(MobileNetV3, network=_SMALL))
register_forms("mobilenetv3_large", partial(MobileNetV3, network=_LARGE))
