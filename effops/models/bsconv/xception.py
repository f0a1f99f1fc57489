"""Xception (arXiv 1610.02357), standard and as the BSConv paper's Table 4 has it (`xception_bsconvu`).

Xception consists of depthwise separable convolutions already. Section 4.1 of the BSConv paper calls BSConv-U a reversed
one: here every depthwise-pointwise pair becomes a pointwise-depthwise one. Whether the two 3x3 convolutions of the stem
were replaced too the paper does not say; by its drop-in rule they would be, which is the default here
(`blueprint_stem=False` keeps them: 21,070,688 instead of 21,054,400 parameters with 120 classes).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from types import ModuleType

from torch import Tensor, nn

from effops.models.bsconv.layers import BlueprintClassifier, DropIn, conv_norm_act, dense_conv, register_drop_ins
from effops.models.classifier import activation_factory
from effops.models.features import Step
from effops.modules import BSConvU, FusedDSConv

__all__ = ["Xception"]

# Channels into, between and out of the separable convolutions of each block, and its stride.
_ENTRY = (((64, 128, 128), 2), ((128, 256, 256), 2), ((256, 728, 728), 2))
_MIDDLE = (((728, 728, 728, 728), 1),) * 8
_EXIT = (((728, 728, 1024), 2),)
_FINAL = (1024, 1536, 2048)

# (in_channels, out_channels, activation or None) -> a separable convolution, its batch norm and activation
Separable = Callable[[int, int, nn.Module | None], nn.Module]


def _separable(layers: ModuleType, form: str) -> Separable:
    def fused(in_channels: int, out_channels: int, act: nn.Module | None) -> nn.Module:
        return layers.FusedDSConv(in_channels, out_channels, norm=nn.BatchNorm2d, act=act)

    def reversed_(in_channels: int, out_channels: int, act: nn.Module | None) -> nn.Module:
        return conv_norm_act(DropIn(layers, form)(in_channels, out_channels), out_channels, act)

    return fused if form == "standard" else reversed_


class _Block(nn.Module):
    """Separable convolutions behind activations, and a shortcut around them.

    Args:
        separable: makes the convolutions.
        act: makes the activations between them.
        widths: channels ahead of, between and behind them.
        stride: 2 for a max pool behind them and a 1x1 convolution as the shortcut.
        leading: the activation ahead of the first; not in place, because the shortcut reads the same input.
    """

    def __init__(
        self,
        separable: Separable,
        act: Callable[[], nn.Module],
        widths: tuple[int, ...],
        stride: int,
        leading: nn.Module,
    ) -> None:
        super().__init__()
        last = len(widths) - 2
        self.act = leading
        self.separable = nn.ModuleList(
            separable(before, after, None if index == last else act())
            for index, (before, after) in enumerate(zip(widths[:-1], widths[1:], strict=True))
        )
        self.pool, self.projection = nn.Identity(), nn.Identity()
        if stride != 1:
            self.pool = nn.MaxPool2d(3, stride, 1)
            self.projection = conv_norm_act(dense_conv(widths[0], widths[-1], 1, stride), widths[-1])
        # A fused block takes the shortcut into its kernel; behind a pool it cannot.
        self.adds_within = stride == 1 and isinstance(self.separable[-1], (FusedDSConv, BSConvU))

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(x)
        *others, last = self.separable
        for conv in others:
            y = conv(y)
        if self.adds_within:
            return last(y, x)
        return self.pool(last(y)) + self.projection(x)


class Xception(BlueprintClassifier):
    """Xception.

    Args:
        layers: `effops.modules` or `effops.stock`.
        form: "standard" or "bsconvu".
        num_classes: outputs of the classifier; 0 for none. Table 4 has 120 (Stanford Dogs).
        in_channels: of the input image.
        data_bn: as in `BlueprintClassifier`.
        blueprint_stem: in the form "bsconvu" the stem's two convolutions are blueprint separable ones as well.

    Shape:
        [N, in_channels, H, W] -> [N, num_classes]; Xception's own size is 299 x 299.

    Raises:
        ValueError: an unknown form.

    Example:
        >>> model = create_model("xception_bsconvu", num_classes=120)
        >>> sum(p.numel() for p in model.parameters())
        21054400
    """

    def __init__(
        self,
        layers: ModuleType,
        form: str = "standard",
        *,
        num_classes: int = 1000,
        in_channels: int = 3,
        data_bn: bool = False,
        blueprint_stem: bool = True,
    ) -> None:
        super().__init__(in_channels, data_bn)
        act = activation_factory(layers, "relu")
        conv = DropIn(layers, form if blueprint_stem else "standard")
        separable = _separable(layers, form)
        features = OrderedDict(
            stem1=conv_norm_act(conv(in_channels, 32, 3, 2, padding=0), 32, act()),
            stem2=conv_norm_act(conv(32, 64, 3, padding=0), 64, act()),
        )
        self.steps += [Step("features.stem1", 32, 2), Step("features.stem2", 64)]
        for index, (widths, stride) in enumerate(_ENTRY + _MIDDLE + _EXIT, 1):
            leading = nn.Identity() if index == 1 else nn.ReLU()  # the stem ends in one
            features[f"block{index}"] = _Block(separable, act, widths, stride, leading)
            self.steps.append(Step(f"features.block{index}", widths[-1], stride))
        for index in (1, 2):
            features[f"final{index}"] = separable(*_FINAL[index - 1 : index + 1], act())
            self.steps.append(Step(f"features.final{index}", _FINAL[index]))
        self.features = nn.Sequential(features)
        self._add_classifier(_FINAL[-1], num_classes)


register_drop_ins("xception", Xception)
