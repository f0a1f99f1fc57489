"""The networks of "Depthwise Multiception Convolution for Reducing Network Parameters without Sacrificing Accuracy".

Bao, Graeber and Wang, section IV: CIFAR ResNets, the same with squeeze-excites, Shake-Shake and MobileNetV2, whose
first convolution of each residual block is replaced; the second stays a dense 3x3. The block details are those of the
authors' code (guoqingbao/Multiception). `conv` says by what it is replaced:

    multiception   depthwise convolutions of several sizes side by side, norm, strided 1x1 with bias, norm
    standard       3x3, norm: the networks as they were
    dsconv         depthwise 3x3, 1x1 with bias, norm
    mixconv        MixConv (arXiv 1907.09595): depthwise convolutions of 3, 5 and 7 on a third of the channels each, 1x1
                   with bias, norm
    repo_mixconv   what the authors ran as MixConv: dense convolutions within thirds of the channels, no 1x1, no norm

Multiception's sizes are 3, 5, 7 in the first stage, 3, 5 in the second and twice 3 in the third. The paper says "only
3x3" there; its code has two, and only they give the published ResNet-50.

Of the parameters in Table 5 these do not come out, with this code or any other setting of it that was tried:

* ResNet-20 with Multiception: 189,434, printed 0.1899 M (0.25 % above). SeNet-56: 585,530, printed 0.5886 M (0.5 %).
* ShakeNet: the authors build a shortcut in every block and call it only where the channels change. Table 5 counts
  those 584,640 dead parameters, and so does dead_shortcuts=True: 26.78 M and 17.57 M. The networks that run have 26.19
  and 16.98 M. Multiception's print for CIFAR-100, 17.59 M, is 17.60 M.

The mean reduction over Table 5, printed as 32.48 %, is 32.54 % by these counts, and 32.73 % without dead parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effops.models.classifier import ImageClassifier, activation_factory
from effops.models.features import Step
from effops.models.mobilenetv2 import MobileNetV2
from effops.models.registry import register_model
from effops.modules._arguments import check_int

__all__ = ["CifarResNet", "MulticeptionMobileNetV2", "ShakeNet", "ShakeShake"]

Sizes = Sequence[int]
# What makes the convolution under test, its norm and the ReLU behind: (input channels, output channels, stride).
Unit = Callable[[int, int, int], nn.Module]

_BN = nn.BatchNorm2d
_STAGES = 3
_MULTICEPTION_SIZES = ((3, 5, 7), (3, 5), (3, 3))
_MIXCONV_SIZES = (3, 5, 7)
_CONVS = ("multiception", "standard", "dsconv", "mixconv", "repo_mixconv")


def _multiception(layers: ModuleType, sizes: Sizes, act: Callable[[], nn.Module], c: int, k: int, s: int) -> nn.Module:
    return layers.MulticeptionConv2d(c, k, sizes, s, act=act)


def _standard(layers: ModuleType, sizes: Sizes, act: Callable[[], nn.Module], c: int, k: int, s: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(c, k, 3, s, 1, bias=False), _BN(k), act())


def _dsconv(layers: ModuleType, sizes: Sizes, act: Callable[[], nn.Module], c: int, k: int, s: int) -> nn.Module:
    return layers.FusedDSConv(c, k, 3, s, bias=True, norm=_BN, act=act)


def _mixconv(layers: ModuleType, sizes: Sizes, act: Callable[[], nn.Module], c: int, k: int, s: int) -> nn.Module:
    return layers.MixConv2d(c, k, sizes, s, norm=_BN, act=act)


def _repo_mixconv(layers: ModuleType, sizes: Sizes, act: Callable[[], nn.Module], c: int, k: int, s: int) -> nn.Module:
    return layers.MixConv2d(c, k, sizes, s, dense=True, act=act)


_UNITS = dict(zip(_CONVS, (_multiception, _standard, _dsconv, _mixconv, _repo_mixconv), strict=True))


def _units(layers: ModuleType, conv: str, kernel_sizes: Sequence[Sizes] | None, stages: int) -> list[Unit]:
    """What makes the convolutions of each stage.

    Raises:
        TypeError, ValueError: an unknown `conv`, kernel sizes of a wrong kind or number, or for one that has none.
    """
    if conv not in _UNITS:
        raise ValueError(f"unknown conv {conv!r}; accepted: {', '.join(_CONVS)}")
    if kernel_sizes is None:
        kernel_sizes = (_MULTICEPTION_SIZES if conv == "multiception" else (_MIXCONV_SIZES,) * _STAGES)[:stages]
    elif conv in ("standard", "dsconv"):
        raise ValueError(f"kernel_sizes are for multiception, mixconv and repo_mixconv; conv={conv!r} is 3x3")
    elif not isinstance(kernel_sizes, (tuple, list)):
        raise TypeError(f"kernel_sizes must be a list with the sizes of each stage, got {kernel_sizes!r}")
    elif len(kernel_sizes) != stages:
        raise ValueError(f"kernel_sizes must have the sizes of {stages} stages, got {kernel_sizes!r}")
    act = activation_factory(layers, "relu")
    return [partial(_UNITS[conv], layers, sizes, act) for sizes in kernel_sizes]


def _initialise(model: nn.Module, mode: str) -> None:
    """He initialisation of the convolutions, as the authors do it; not of squeeze-excites, their linear layers."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d) and ".se." not in name:
            nn.init.kaiming_normal_(module.weight, mode=mode)


# ---------------------------------------------------------------------------------------------------------------------
# ResNet and SeNet
# ---------------------------------------------------------------------------------------------------------------------


class _ResidualBlock(nn.Module):
    """relu(se(norm(conv3x3(unit(x)))) + shortcut(x))."""

    def __init__(self, layers: ModuleType, unit: Unit, channels: int, out_channels: int, stride: int, se: bool) -> None:
        super().__init__()
        self.unit = unit(channels, out_channels, stride)
        self.conv = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.norm = _BN(out_channels)
        self.se = layers.SqueezeExcite(out_channels, out_channels // 8, bias=False) if se else nn.Identity()
        self.shortcut = nn.Identity()
        if channels != out_channels:
            self.shortcut = nn.Sequential(nn.Conv2d(channels, out_channels, 1, stride, bias=False), _BN(out_channels))
        self.act = activation_factory(layers, "relu")()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.se(self.norm(self.conv(self.unit(x)))) + self.shortcut(x))


class CifarResNet(ImageClassifier):
    """The ResNet of 6 n + 2 layers for small images, n blocks in each of three stages; with squeeze-excites SeNet.

    Args:
        layers: `effops.modules` or `effops.stock`.
        blocks: n.
        num_classes: outputs of the classifier; 0 for none.
        in_channels: of the input image.
        conv: the first convolution of each block, see above.
        kernel_sizes: of each stage, for `conv` with several; None for the authors'.
        se: squeeze-excites (an eighth of the channels, no biases) ahead of each addition.

    Shape:
        [N, in_channels, H, W] -> [N, num_classes].

    Raises:
        TypeError, ValueError: an argument of a wrong kind or value.

    Example:
        >>> model = create_model("multiception_resnet20")
        >>> sum(p.numel() for p in model.parameters())
        189434
        >>> create_model("multiception_resnet20", conv="dsconv").eval()(torch.randn(1, 3, 32, 32)).shape
        torch.Size([1, 10])
    """

    def __init__(
        self,
        layers: ModuleType,
        blocks: int,
        *,
        num_classes: int = 10,
        in_channels: int = 3,
        conv: str = "multiception",
        kernel_sizes: Sequence[Sizes] | None = None,
        se: bool = False,
    ) -> None:
        super().__init__()
        units = _units(layers, conv, kernel_sizes, _STAGES)
        channels = 16
        act = activation_factory(layers, "relu")
        self.stem = nn.Sequential(nn.Conv2d(in_channels, channels, 3, padding=1, bias=False), _BN(channels), act())
        self.steps = [Step("stem", channels)]
        stages = []
        for unit, out_channels, stride in zip(units, (16, 32, 64), (1, 2, 2), strict=True):
            self.steps.append(Step(f"stages.{len(stages)}", out_channels, stride))
            stage = [_ResidualBlock(layers, unit, channels, out_channels, stride, se)]
            stage += [_ResidualBlock(layers, unit, out_channels, out_channels, 1, se) for _ in range(blocks - 1)]
            stages.append(nn.Sequential(*stage))
            channels = out_channels
        self.stages = nn.Sequential(*stages)
        self.num_features = channels
        self.num_classes = num_classes
        self.classifier = nn.Linear(channels, num_classes) if num_classes else nn.Identity()
        _initialise(self, "fan_in")

    def forward_features(self, x: Tensor) -> Tensor:
        """[N, in_channels, H, W] -> [N, 64, H / 4, W / 4]."""
        return self.stages(self.stem(x))


# ---------------------------------------------------------------------------------------------------------------------
# ShakeNet
# ---------------------------------------------------------------------------------------------------------------------


class _Shake(torch.autograd.Function):
    """alpha a + (1 - alpha) b with the gradient of beta a + (1 - beta) b: plain operations, which have derivatives."""

    generate_vmap_rule = True

    @staticmethod
    def forward(a: Tensor, b: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
        return alpha * a + (1 - alpha) * b

    @staticmethod
    def setup_context(ctx: torch.autograd.function.FunctionCtx, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[3])

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        (beta,) = ctx.saved_tensors
        return beta * grad, (1 - beta) * grad, None, None


class ShakeShake(nn.Module):
    """Mixes two branches: by a random share in training, by another in its backward, half and half in eval.

    Both shares are uniform in [0, 1), one for each sample, drawn in forward from torch's generator of the device: a
    seed repeats them. The derivatives of the gradient, too, have the backward's share.

    Shape:
        two of [N, C, H, W] -> [N, C, H, W].

    Gastaldi, "Shake-Shake regularization" (arXiv 1705.07485), "Shake-Shake-Image".

    Example:
        >>> shake = effops.models.multiception.ShakeShake()
        >>> a, b = torch.ones(2, 8, 4, 4), torch.zeros(2, 8, 4, 4)
        >>> mixed = shake(a, b)  # one share in [0, 1) for each sample
        >>> torch.equal(mixed, mixed[:, :1, :1, :1].expand(2, 8, 4, 4)), shake.eval()(a, b).unique()
        (True, tensor([0.5000]))
    """

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Two branches -> their mixture."""
        if not self.training:
            return (a + b) * 0.5
        alpha, beta = torch.rand(2, a.shape[0], 1, 1, 1, device=a.device, dtype=a.dtype)
        return _Shake.apply(a, b, alpha, beta)


class _ShiftedShortcut(nn.Module):
    """norm(cat[1x1(x), 1x1(x moved up and left by a pixel)]), subsampled by the stride: half of the channels each."""

    def __init__(self, channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.straight = nn.Conv2d(channels, out_channels // 2, 1, stride, bias=False)
        self.shifted = nn.Conv2d(channels, out_channels // 2, 1, stride, bias=False)
        self.norm = _BN(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        shifted = F.pad(x[:, :, 1:, 1:], (0, 1, 0, 1))
        return self.norm(torch.cat([self.straight(x), self.shifted(shifted)], 1))


class _ShakeBlock(nn.Module):
    """shake(branch1(relu(x)), branch2(relu(x))) + x, or + shortcut(relu(x)) where the channels change."""

    def __init__(self, unit: Unit, channels: int, out_channels: int, stride: int, dead_shortcut: bool) -> None:
        super().__init__()
        self.act = nn.ReLU()  # not in place: x is added
        self.branch1 = self._branch(unit, channels, out_channels, stride)
        self.branch2 = self._branch(unit, channels, out_channels, stride)
        self.shake = ShakeShake()
        self.changes = channels != out_channels
        if self.changes or dead_shortcut:
            self.shortcut = _ShiftedShortcut(channels, out_channels, stride)

    @staticmethod
    def _branch(unit: Unit, channels: int, out_channels: int, stride: int) -> nn.Module:
        conv = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        return nn.Sequential(unit(channels, out_channels, stride), conv, _BN(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        active = self.act(x)
        mixed = self.shake(self.branch1(active), self.branch2(active))
        return mixed + (self.shortcut(active) if self.changes else x)


class ShakeNet(ImageClassifier):
    """Shake-Shake 26 2x96d: two branches a block, 4 blocks in each of three stages of 96, 192 and 384 channels.

    Args:
        layers: `effops.modules` or `effops.stock`.
        num_classes: outputs of the classifier; 0 for none.
        in_channels: of the input image.
        conv, kernel_sizes: as in `CifarResNet`.
        first_stride: of the first stage: 1 for images of 32 x 32; the authors have 2 for larger ones.
        dead_shortcuts: builds a shortcut in every block, as the authors do, also where none is called: its parameters
            are in the published counts, get no gradient, and change nothing.

    Shape:
        [N, in_channels, H, W] -> [N, num_classes].

    Raises:
        TypeError, ValueError: an argument of a wrong kind or value.

    Example:
        >>> model = create_model("multiception_shakenet26_2x96d", num_classes=10)
        >>> sum(p.numel() for p in model.parameters())
        16980714
    """

    def __init__(
        self,
        layers: ModuleType,
        *,
        num_classes: int = 10,
        in_channels: int = 3,
        conv: str = "multiception",
        kernel_sizes: Sequence[Sizes] | None = None,
        first_stride: int = 1,
        dead_shortcuts: bool = False,
    ) -> None:
        super().__init__()
        check_int("ShakeNet", "first_stride", first_stride)
        units = _units(layers, conv, kernel_sizes, _STAGES)
        channels = 16
        self.stem = nn.Conv2d(in_channels, channels, 3, padding=1)
        self.steps = [Step("stem", channels)]
        stages = []
        for unit, out_channels, stride in zip(units, (96, 192, 384), (first_stride, 2, 2), strict=True):
            self.steps.append(Step(f"stages.{len(stages)}", out_channels, stride))
            stage = [_ShakeBlock(unit, channels, out_channels, stride, False)]
            stage += [_ShakeBlock(unit, out_channels, out_channels, 1, dead_shortcuts) for _ in range(3)]
            stages.append(nn.Sequential(*stage))
            channels = out_channels
        self.stages = nn.Sequential(*stages)
        self.act = activation_factory(layers, "relu")()
        self.steps.append(Step("act", channels))
        self.num_features = channels
        self.num_classes = num_classes
        self.classifier = nn.Linear(channels, num_classes) if num_classes else nn.Identity()
        _initialise(self, "fan_out")
        if num_classes:
            nn.init.zeros_(self.classifier.bias)

    def forward_features(self, x: Tensor) -> Tensor:
        """[N, in_channels, H, W] -> [N, 384, h, w]."""
        return self.act(self.stages(self.stem(x)))


# ---------------------------------------------------------------------------------------------------------------------
# MobileNetV2
# ---------------------------------------------------------------------------------------------------------------------


class _ReplacedInvertedResidual(nn.Module):
    """norm(relu(unit(expand(x)))) [+ x]: the unit in place of the depthwise convolution and the projection."""

    def __init__(
        self, layers: ModuleType, unit: Unit, channels: int, out_channels: int, stride: int, expansion: int
    ) -> None:
        super().__init__()
        hidden = channels * expansion
        self.expand = nn.Identity()
        if expansion != 1:
            act = activation_factory(layers, "relu6")
            self.expand = nn.Sequential(nn.Conv2d(channels, hidden, 1, bias=False), _BN(hidden), act())
        self.unit = unit(hidden, out_channels, stride)
        self.norm = _BN(out_channels)
        self.residual = stride == 1 and channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.unit(self.expand(x)))
        return x + y if self.residual else y


class MulticeptionMobileNetV2(MobileNetV2):
    """MobileNetV2 whose first two stages have Multiception: `MobileNetV2` with a stem of stride 1 (for STL-10).

    In the stages of 16 and 24 channels the depthwise convolution and the projection are replaced by the unit, a ReLU
    and one more norm. Its parameters (2,252,634; 2,236,330 with conv="dsconv"; 10 classes) are published nowhere.

    Args:
        layers: `effops.modules` or `effops.stock`.
        num_classes: outputs of the classifier; 0 for none.
        in_channels: of the input image.
        conv: as in `CifarResNet`. The paper reports neither the standard convolution nor MixConv here.
        kernel_sizes: of the two stages.
        dropout: ahead of the classifier.

    Shape:
        [N, in_channels, H, W] -> [N, num_classes].

    Raises:
        TypeError, ValueError: an argument of a wrong kind or value.

    Example:
        >>> model = create_model("multiception_mobilenetv2")
        >>> sum(p.numel() for p in model.parameters())
        2252634
        >>> model.eval()(torch.randn(1, 3, 32, 32)).shape
        torch.Size([1, 10])
    """

    def __init__(
        self,
        layers: ModuleType,
        *,
        num_classes: int = 10,
        in_channels: int = 3,
        conv: str = "multiception",
        kernel_sizes: Sequence[Sizes] | None = None,
        dropout: float = 0.2,
    ) -> None:
        units = _units(layers, conv, kernel_sizes, 2)
        super().__init__(layers, num_classes=num_classes, in_channels=in_channels, dropout=dropout)
        self.features[0][0] = nn.Conv2d(in_channels, 32, 3, padding=1, bias=False)
        self.steps[0] = self.steps[0]._replace(stride=1)
        first, second = units
        for index, (unit, channels, out_channels, stride, expansion) in enumerate(
            ((first, 32, 16, 1, 1), (second, 16, 24, 2, 6), (second, 24, 24, 1, 6)), 1
        ):
            self.features[index] = _ReplacedInvertedResidual(layers, unit, channels, out_channels, stride, expansion)
        self._initialise()


def _register_resnet(name: str, blocks: int, se: bool = False) -> None:
    @register_model(name)
    def build(layers: ModuleType, **kwargs: object) -> CifarResNet:
        return CifarResNet(layers, blocks, se=se, **kwargs)


_register_resnet("multiception_resnet20", 3)
_register_resnet("multiception_resnet50", 8)
_register_resnet("multiception_senet56", 9, se=True)
register_model("multiception_shakenet26_2x96d")(ShakeNet)
register_model("multiception_mobilenetv2")(MulticeptionMobileNetV2)
