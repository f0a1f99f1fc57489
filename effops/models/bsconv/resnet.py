"""The paper's residual networks: ResNets and WideResNets for CIFAR (section 5.1), ResNets for ImageNet (section 5.2).

    cifar_resnet{20,56,110,302,602}     3x3 stem of 16 channels, stages of 16, 32 and 64; the paper prints 20 and 110
                                        (Table 2), the authors' tables have the others
    wrn_{16,28,40}_{1,2,3,4,8}          pre-activation; stages of 16, 32 and 64 times the width, the stem stays at 16
    resnet{10,18,26,34,68,102}          7x7 stem and max pool, stages of 64 to 512; units of two 3x3 convolutions in all
                                        of them, the deep ones included

each also with `_bsconvu` or `_bsconvs` behind it. The paper does not print the units of ResNet-26, -68 and -102; they
are those of the authors' package.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

from torch import Tensor, nn

from effops.models.bsconv.layers import FORMS, BlueprintClassifier, DropIn, conv_add, conv_norm_act, name_of
from effops.models.classifier import activation_factory
from effops.models.features import Step
from effops.models.registry import register_model

__all__ = ["ResNet"]

Activation = Callable[[], nn.Module]


class _Plan(NamedTuple):
    """A family of networks: stem and stage channels, the kind of stem and unit."""

    stem: int
    stages: tuple[int, ...]
    large_stem: bool
    preact: bool = False


_CIFAR = _Plan(16, (16, 32, 64), large_stem=False)
_WIDE = _CIFAR._replace(preact=True)
_IMAGENET = _Plan(64, (64, 128, 256, 512), large_stem=True)

_CIFAR_UNITS = {20: 3, 56: 9, 110: 18, 302: 50, 602: 100}
_WIDE_UNITS = {16: 2, 28: 4, 40: 6}
_WIDTHS = (1, 2, 3, 4, 8)
_IMAGENET_UNITS = {
    10: (1, 1, 1, 1),
    18: (2, 2, 2, 2),
    26: (3, 3, 3, 3),
    34: (3, 4, 6, 3),
    68: (3, 4, 23, 3),
    102: (3, 8, 36, 3),
}


class _Unit(nn.Module):
    """Two 3x3 convolutions, each with a batch norm, and a shortcut: a 1x1 convolution where the shape changes."""

    def __init__(self, conv: DropIn, act: Activation, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = conv_norm_act(conv(in_channels, out_channels, 3, stride), out_channels, act())
        self.conv2 = conv_add(conv(out_channels, out_channels), nn.BatchNorm2d(out_channels), act())
        self.projection: nn.Module = nn.Identity()
        if in_channels != out_channels or stride != 1:
            self.projection = conv_norm_act(conv(in_channels, out_channels, 1, stride), out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(self.conv1(x), self.projection(x))


class _PreactUnit(nn.Module):
    """Batch norm and activation ahead of the convolutions; a projection reads what they give, an identity x itself."""

    def __init__(self, conv: DropIn, act: Activation, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(in_channels)
        self.act = act()
        self.conv1 = conv_norm_act(conv(in_channels, out_channels, 3, stride), out_channels, act())
        self.conv2 = conv_add(conv(out_channels, out_channels))
        self.projection: nn.Module | None = None
        if in_channels != out_channels or stride != 1:
            self.projection = conv_norm_act(conv(in_channels, out_channels, 1, stride))

    def forward(self, x: Tensor) -> Tensor:
        h = self.act(self.norm(x))
        return self.conv2(self.conv1(h), x if self.projection is None else self.projection(h))


class ResNet(BlueprintClassifier):
    """A residual network of the paper.

    Args:
        layers: `effops.modules` or `effops.stock`.
        plan: stem and stages.
        units: of each stage.
        form, p: as in `DropIn`.
        num_classes: outputs of the classifier; 0 for none.
        in_channels: of the input image.
        width: multiplies the stages' channels (rounded down), not the stem's.
        data_bn: as in `BlueprintClassifier`.

    Shape:
        [N, in_channels, H, W] -> [N, num_classes].

    Raises:
        ValueError: a width that leaves no channels; form and p as in `DropIn`.

    Example:
        >>> model = create_model("cifar_resnet20_bsconvs").eval()
        >>> model(torch.randn(1, 3, 32, 32)).shape
        torch.Size([1, 10])
        >>> effops.orthonormal_loss(model, alpha=0.01).requires_grad
        True
    """

    _renames = ((r"^features\.final_activation\.", "features.final."),)

    def __init__(
        self,
        layers: ModuleType,
        plan: _Plan,
        units: tuple[int, ...],
        form: str = "standard",
        *,
        num_classes: int,
        in_channels: int = 3,
        width: float = 1.0,
        p: float | None = None,
        data_bn: bool = True,
    ) -> None:
        super().__init__(in_channels, data_bn)
        if not int(plan.stages[0] * width) > 0:
            raise ValueError(f"width must leave at least one of {plan.stages[0]} channels, got {width}")
        conv, act = DropIn(layers, form, p), activation_factory(layers, "relu")
        features = _stem(conv, act, in_channels, plan)
        channels = plan.stem
        self.steps += (Step(f"features.{name}", channels, 2 if plan.large_stem else 1) for name in features)
        unit = _PreactUnit if plan.preact else _Unit
        for index, (base, count) in enumerate(zip(plan.stages, units, strict=True), 1):
            stage = OrderedDict()
            for number in range(1, count + 1):
                stride = 2 if index > 1 and number == 1 else 1
                stage[f"unit{number}"] = unit(conv, act, channels, int(base * width), stride)
                channels = int(base * width)
            features[f"stage{index}"] = nn.Sequential(stage)
            self.steps.append(Step(f"features.stage{index}", channels, 2 if index > 1 else 1))
        if plan.preact:
            features["final"] = nn.Sequential(OrderedDict(norm=nn.BatchNorm2d(channels), act=act()))
            self.steps.append(Step("features.final", channels))
        self.features = nn.Sequential(features)
        self._add_classifier(channels, num_classes)


def _stem(conv: DropIn, act: Activation, in_channels: int, plan: _Plan) -> OrderedDict[str, nn.Module]:
    if plan.large_stem:
        stem = conv_norm_act(conv(in_channels, plan.stem, 7, 2), plan.stem, act())
        return OrderedDict(stem=stem, pool=nn.MaxPool2d(3, 2, 1))
    first = conv(in_channels, plan.stem)
    if plan.preact:  # the first unit begins with norm and activation
        return OrderedDict(stem=conv_norm_act(first))
    return OrderedDict(stem=conv_norm_act(first, plan.stem, act()))


def _register(name: str, form: str, plan: _Plan, units: tuple[int, ...], **fixed: Any) -> None:
    defaults = {"num_classes": 1000 if plan.large_stem else 10}

    @register_model(name_of(name, form))
    def build(layers: ModuleType, **kwargs: Any) -> ResNet:
        return ResNet(layers, plan, units, form, **fixed, **defaults | kwargs)


for _form in FORMS:
    for _depth, _count in _CIFAR_UNITS.items():
        _register(f"cifar_resnet{_depth}", _form, _CIFAR, (_count,) * 3)
    for _depth, _count in _WIDE_UNITS.items():
        for _width in _WIDTHS:
            _register(f"wrn_{_depth}_{_width}", _form, _WIDE, (_count,) * 3, width=_width)
    for _depth, _units in _IMAGENET_UNITS.items():
        _register(f"resnet{_depth}", _form, _IMAGENET, _units)
