"""Networks of linear bottlenecks, which the paper makes BSConv-S networks of (section 4.2).

Their form `_bsconvs` is the same network with the same parameters: the projection that ends each block and the
expansion and depthwise convolution of the next are a subspace blueprint convolution already, with p = 1/6 where the
expansion is sixfold. What the paper adds is the orthonormal loss on the projections' weights:

    loss = F.cross_entropy(model(x), y) + effops.orthonormal_loss(model, alpha=0.1)     0.01 on CIFAR (section 5.1)
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import ModuleType
from typing import Any, NamedTuple

from torch import Tensor, nn

from effops.models.bsconv.layers import BlueprintClassifier, conv_norm_act, dense_conv
from effops.models.classifier import activation_factory
from effops.models.features import Step
from effops.models.registry import register_model
from effops.modules.se import make_divisible

__all__ = [
    "BottleneckClassifier",
    "Expanded",
    "Plan",
    "Unit",
    "expanded_plan",
    "initialise",
    "register_forms",
    "scaled",
    "stride_plan",
]


class Unit(NamedTuple):
    """A linear bottleneck: channels that it gives, channels in between, and the squeeze-excite's (0 for none)."""

    out: int
    mid: int
    kernel: int = 3
    se: int = 0
    act: str = "relu6"


class Plan(NamedTuple):
    """A network of linear bottlenecks.

    `strides` are the stem's and the stages'; `act` is of the stem and of the last 1x1 convolution to `final` channels;
    `se` are further arguments of the squeeze-excites. With `always_expand` blocks keep a 1x1 expansion that does not
    widen (t = 1), as the authors' MobileNets do.
    """

    stem: int
    stages: Sequence[Sequence[Unit]]
    strides: Sequence[int]
    final: int
    act: str
    se: Mapping[str, Any] = {}
    always_expand: bool = False


def stride_plan(strides: Sequence[int], input: str) -> list[int]:
    """The strides for a kind of input.

    Args:
        strides: of the stem and the stages, for ImageNet's 224 x 224.
        input: "imagenet", or "cifar": the first two halvings are left out, which takes 32 x 32 to 4 x 4 (section 5.1).

    Raises:
        ValueError: another kind.
    """
    if input not in ("imagenet", "cifar"):
        raise ValueError(f"unknown input {input!r}; accepted: imagenet, cifar")
    plan = list(strides)
    if input == "cifar":
        for _ in range(2):
            plan[plan.index(2)] = 1
    return plan


def scaled(channels: int, width: float) -> int:
    """channels * width, rounded down, as the authors' MobileNets have it.

    Raises:
        ValueError: nothing is left.
    """
    if not int(channels * width) > 0:
        raise ValueError(f"width must leave at least one of {channels} channels, got {width}")
    return int(channels * width)


class Expanded(NamedTuple):
    """A stage of equal linear bottlenecks, which widen their input by a factor: EfficientNet's and MnasNet's tables."""

    out: int
    count: int
    kernel: int
    stride: int
    expansion: int = 6
    se: bool = False


def expanded_plan(stages: Sequence[Expanded], width: float, act: str, se: Mapping[str, Any] | None = None) -> Plan:
    """EfficientNet's and MnasNet's plan: a stem of 32 channels and stride 2, the stages, 1,280 channels.

    Args:
        stages: its table.
        width: multiplies channel counts, which are rounded to multiples of 8; the last one's only above 1.
        act: of all convolutions.
        se: further arguments of the squeeze-excites, which take a quarter of a block's input channels.

    Raises:
        ValueError: a width that is not above 0.
    """
    if not width > 0:
        raise ValueError(f"width must be above 0, got {width}")
    channels = stem = make_divisible(32 * width)
    made = []
    for stage in stages:
        out, units = make_divisible(stage.out * width), []
        for _ in range(stage.count):
            excited = channels // 4 if stage.se else 0
            units.append(Unit(out, channels * stage.expansion, stage.kernel, excited, act))
            channels = out
        made.append(units)
    strides = (2, *(stage.stride for stage in stages))
    return Plan(stem, made, strides, make_divisible(1280 * max(1.0, width)), act, se or {})


def initialise(features: nn.Module) -> None:
    """The authors' initialisation of convolutions."""
    for module in features.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


class BottleneckClassifier(BlueprintClassifier):
    """A network of linear bottlenecks.

    Args:
        layers: `effops.modules` or `effops.stock`.
        plan: the network.
        num_classes: outputs of the classifier; 0 for none.
        in_channels: of the input image.
        input: "imagenet" or "cifar", as in `stride_plan`.
        data_bn: as in `BlueprintClassifier`.
        dropout: ahead of the classifier.

    Shape:
        [N, in_channels, H, W] -> [N, num_classes].

    Raises:
        ValueError: an unknown input.

    Example:
        >>> model = create_model("mnasnet_b1", input="cifar", num_classes=10).eval()
        >>> model.forward_features(torch.randn(1, 3, 32, 32)).shape
        torch.Size([1, 1280, 4, 4])
    """

    _renames = (
        (r"\.se_unit\.conv1\.", ".se.reduce."),
        (r"\.se_unit\.conv2\.", ".se.expand."),
        (r"\.conv1\.conv\.", ".expand."),
        (r"\.conv1\.norm\.", ".expand_norm."),
        (r"\.conv2\.conv\.", ".dw."),
        (r"\.conv2\.norm\.", ".dw_norm."),
        (r"\.conv3\.conv\.", ".pw."),
        (r"\.conv3\.norm\.", ".norm."),
        (r"^features\.final_conv1?\.", "features.final."),
    )

    def __init__(
        self,
        layers: ModuleType,
        plan: Plan,
        *,
        num_classes: int,
        in_channels: int = 3,
        input: str = "imagenet",
        data_bn: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(in_channels, data_bn)
        stem_stride, *strides = stride_plan(plan.strides, input)
        act = activation_factory(layers, plan.act)
        stem = dense_conv(in_channels, plan.stem, 3, stem_stride)
        features = OrderedDict(stem=conv_norm_act(stem, plan.stem, act()))
        self.steps.append(Step("features.stem", plan.stem, stem_stride))
        channels = plan.stem
        for index, (units, first) in enumerate(zip(plan.stages, strides, strict=True), 1):
            stage = OrderedDict()
            for number, unit in enumerate(units, 1):
                stage[f"unit{number}"] = _bottleneck(layers, plan, channels, unit, first if number == 1 else 1)
                channels = unit.out
            features[f"stage{index}"] = nn.Sequential(stage)
            self.steps.append(Step(f"features.stage{index}", channels, first))
        self.steps.append(Step("features.final", plan.final))
        features["final"] = conv_norm_act(dense_conv(channels, plan.final, 1), plan.final, act())
        self.features = nn.Sequential(features)
        initialise(self.features)
        self.dropout = nn.Dropout(dropout)
        self._add_classifier(plan.final, num_classes)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """[N, num_features, h, w] -> [N, num_classes], or the pooled features [N, num_features] with `pre_logits`."""
        x = super().forward_head(x, pre_logits=True)
        return x if pre_logits else self.classifier(self.dropout(x))


def _bottleneck(layers: ModuleType, plan: Plan, channels: int, unit: Unit, stride: int) -> nn.Module:
    act = activation_factory(layers, unit.act)
    se = partial(layers.SqueezeExcite, reduced_channels=unit.se, **plan.se) if unit.se else None
    if unit.mid != channels or not plan.always_expand:
        return layers.InvertedResidual(
            channels, unit.out, unit.kernel, stride, hidden_channels=unit.mid, act=act, se=se
        )
    return layers.InvertedResidual.from_modules(
        dense_conv(channels, unit.mid, 1),
        dense_conv(unit.mid, unit.mid, unit.kernel, stride, groups=unit.mid),
        dense_conv(unit.mid, unit.out, 1),
        nn.BatchNorm2d(unit.mid),
        act(),
        nn.BatchNorm2d(unit.mid),
        act(),
        nn.BatchNorm2d(unit.out),
        se=se and se(unit.mid),
    )


def register_forms(name: str, build: Callable[..., nn.Module]) -> None:
    """Registers a network under its name and under that of its BSConv-S form, which is the same network."""
    for each in (name, f"{name}_bsconvs"):
        register_model(each)(build)
