"""MobileNetV1 (arXiv 1704.04861) and its BSConv-U form (section 4.1).

    mobilenetv1             units of a depthwise and a pointwise convolution, each with a batch norm and ReLU
    mobilenetv1_bsconvu     units of a pointwise and a depthwise convolution, with one batch norm and one ReLU behind

Both as in the authors' package (0.4.0), with the batch norm on the image. The stem stays a dense 3x3 convolution. They
have about the same number of parameters, but not of multiply-accumulates (569 M and 884 M at 224 x 224): blueprint
pointwise convolutions run ahead of the strides.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from types import ModuleType
from typing import Any

from torch import nn

from effops.models.bsconv.bottlenecks import initialise, scaled, stride_plan
from effops.models.bsconv.layers import BlueprintClassifier, conv_norm_act, dense_conv
from effops.models.classifier import activation_factory
from effops.models.features import Step
from effops.models.registry import register_model

__all__ = ["MobileNetV1"]

_STEM = 32
_STAGES = ((64,), (128, 128), (256, 256), (512,) * 6, (1024, 1024))
_STRIDES = (2, 1, 2, 2, 2, 2)  # of the stem and the stages


class MobileNetV1(BlueprintClassifier):
    """MobileNetV1, standard or with BSConv-U.

    Args:
        layers: `effops.modules` or `effops.stock`.
        blueprint: units are BSConv-U ones. Those start from torch's own initialisation, as in the authors' code.
        num_classes: outputs of the classifier; 0 for none.
        in_channels: of the input image.
        width: multiplies every channel count (rounded down).
        input: "imagenet", or "cifar": without the first two halvings.
        data_bn: as in `BlueprintClassifier`.

    Shape:
        [N, in_channels, H, W] -> [N, num_classes].

    Raises:
        ValueError: an unknown input, or a width that leaves no channels.

    Example:
        >>> standard, blueprint = create_model("mobilenetv1"), create_model("mobilenetv1_bsconvu")
        >>> [sum(p.numel() for p in model.parameters()) for model in (standard, blueprint)]
        [4231982, 4230990]
    """

    _renames = (
        (r"\.conv_dw\.conv\.", ".dw."),
        (r"\.conv_dw\.norm\.", ".dw_norm."),
        (r"\.conv_pw\.conv\.", ".pw."),
        (r"\.conv_pw\.norm\.", ".norm."),
        (r"(\.unit\d+)\.0\.", r"\1."),  # BSConv-U: a Sequential of the convolution, the batch norm and ReLU
        (r"(\.unit\d+)\.1\.", r"\1.norm."),
    )

    def __init__(
        self,
        layers: ModuleType,
        blueprint: bool,
        *,
        num_classes: int = 1000,
        in_channels: int = 3,
        width: float = 1.0,
        input: str = "imagenet",
        data_bn: bool = True,
    ) -> None:
        super().__init__(in_channels, data_bn)
        stem_stride, *strides = stride_plan(_STRIDES, input)
        unit = _blueprint_unit if blueprint else _separable_unit
        act = activation_factory(layers, "relu")
        channels = scaled(_STEM, width)
        stem = conv_norm_act(dense_conv(in_channels, channels, 3, stem_stride), channels, act())
        features = OrderedDict(stem=stem)
        self.steps.append(Step("features.stem", channels, stem_stride))
        for index, (outs, first) in enumerate(zip(_STAGES, strides, strict=True), 1):
            stage = OrderedDict()
            for number, out in enumerate(outs, 1):
                after = scaled(out, width)
                stage[f"unit{number}"] = unit(layers, act, channels, after, first if number == 1 else 1)
                channels = after
            features[f"stage{index}"] = nn.Sequential(stage)
            self.steps.append(Step(f"features.stage{index}", channels, first))
        self.features = nn.Sequential(features)
        self._add_classifier(channels, num_classes)


def _separable_unit(
    layers: ModuleType, act: Callable[[], nn.Module], in_channels: int, out_channels: int, stride: int
) -> nn.Module:
    norms = {"dw_norm": nn.BatchNorm2d, "norm": nn.BatchNorm2d}
    unit = layers.FusedDSConv(in_channels, out_channels, 3, stride, **norms, dw_act=act, act=act)
    initialise(unit)
    return unit


def _blueprint_unit(
    layers: ModuleType, act: Callable[[], nn.Module], in_channels: int, out_channels: int, stride: int
) -> nn.Module:
    return conv_norm_act(layers.BSConvU(in_channels, out_channels, 3, stride, 1, bias=False), out_channels, act())


@register_model("mobilenetv1")
def _mobilenetv1(layers: ModuleType, **kwargs: Any) -> MobileNetV1:
    return MobileNetV1(layers, False, **kwargs)


@register_model("mobilenetv1_bsconvu")
def _mobilenetv1_bsconvu(layers: ModuleType, **kwargs: Any) -> MobileNetV1:
    return MobileNetV1(layers, True, **kwargs)
