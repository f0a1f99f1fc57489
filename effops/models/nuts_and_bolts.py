"""The networks of "Training Efficient CNNs: Tweaking the Nuts and Bolts of Neural Networks" (arXiv 2205.12050).

Tables 1 (MNIST, 28 x 28 x 1) and 2 (CIFAR-10, 32 x 32 x 3): units of a 3x3 convolution, ReLU and a batch norm, in this
order, or of a depthwise and a pointwise convolution, ReLU and a batch norm; bare 1x1 convolutions as transitions; max
pools; the average pool, a linear classifier without a bias, log-softmax. Section III.D's squeeze-excite and III.F's
BlurPool are options.

What the paper leaves out: the tables give channels and parameters only. Their parameter counts fix the rest of the
parameters: of all combinations of biases and batch norms only one gives the six printed counts of MNIST (no bias
anywhere) and only one CIFAR's two (a bias in every convolution but the classifier). The MNIST paddings (0 up to the
second pool, then 1), the order ReLU, batch norm and the dropout rates are those of the authors' published notebooks.
CIFAR's padding 1 and its order are inferred by analogy, and its dropout is not known: there is none here.

Table 1 prints seven columns of layers for six models. The fifth, which would have 5,016 parameters, is none of the
six; `mnist_5k_dw` is the sixth.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Mapping
from types import ModuleType
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from effops.models.classifier import ImageClassifier, activation_factory
from effops.models.features import Step
from effops.models.registry import register_model

__all__ = ["Dataset", "Layer", "NutsAndBolts", "parse_layers"]


class Layer(NamedTuple):
    """One word of a layer string.

    Attributes:
        kind: "c", "d", "T" or "P", as `parse_layers` has them.
        channels: that it gives; 0 for a pool.

    Example:
        >>> kind, channels = effops.models.nuts_and_bolts.parse_layers("T16")[0]
        >>> kind, channels
        ('T', 16)
    """

    kind: str
    channels: int


class Dataset(NamedTuple):
    """What the networks for one dataset share.

    Attributes:
        in_channels: of the image.
        bias: every convolution has one.
        unpadded: so many blocks (up to a pool each) have convolutions without padding.
        dropout: maps the number of a unit to the rate behind it.

    Example:
        >>> from effops.models.nuts_and_bolts import Dataset, NutsAndBolts
        >>> grey = Dataset(in_channels=1, bias=False, unpadded=0, dropout={})
        >>> NutsAndBolts(effops.modules, "c8 P d16", grey).eval()(torch.randn(2, 1, 28, 28)).shape
        torch.Size([2, 10])
    """

    in_channels: int
    bias: bool
    unpadded: int
    dropout: Mapping[int, float]


_MNIST = Dataset(1, bias=False, unpadded=2, dropout={2: 0.05, 4: 0.17, 5: 0.17})
_CIFAR = Dataset(3, bias=True, unpadded=0, dropout={})

_NETS = {
    "mnist_25k": (_MNIST, "c8 c16 P c32 c64 P"),
    "mnist_7k": (_MNIST, "c8 c12 T8 P c12 c16 T12 P c15 c15"),
    "mnist_7k_dw": (_MNIST, "c10 d12 T10 P c13 c16 T12 P c15 c15"),
    "mnist_5k": (_MNIST, "c8 c12 T8 P c12 c16 T12 P c15"),
    "mnist_5k_dw": (_MNIST, "c8 d12 T8 P c13 c18 T12 P c16"),
    "mnist_1_5k_dw": (_MNIST, "c8 d12 T8 P d12 d16 T12 P d15"),
    "cifar_143k": (_CIFAR, "c16 c16 P c32 c32 P c64 c64 P c120"),
    "cifar_143k_dw": (_CIFAR, "c16 c16 P d32 c32 P d64 c64 P d128 d192 d260"),
}

# mosaicml's squeeze-excite as the authors set it: latent_channels and min_channels.
_SE_CHANNELS, _SE_LEAST_CHANNELS = 2, 5


def parse_layers(text: str) -> list[Layer]:
    """Reads a layer string such as "c8 d12 T8 P c15".

    Args:
        text: words between spaces: cN a 3x3 convolution to N channels, dN a depthwise and a pointwise one, TN a
            transition (1x1 convolution), P a pool.

    Returns:
        One `Layer` a word.

    Raises:
        ValueError: a word that is none of these.

    Example:
        >>> effops.models.nuts_and_bolts.parse_layers("c8 d12 P")
        [Layer(kind='c', channels=8), Layer(kind='d', channels=12), Layer(kind='P', channels=0)]
    """
    layers = []
    for word in text.split():
        match = re.fullmatch(r"(?:([cdT])([1-9]\d*)|(P))", word)
        if match is None:
            raise ValueError(f"unknown layer {word!r} in {text!r}; accepted: cN, dN, TN (N channels), P")
        layers.append(Layer(match[1] or match[3], int(match[2] or 0)))
    return layers


class _Builder:
    """Makes the modules of one network; each method knows what comes ahead by `channels`, `unit` and `pool`.

    `steps` are those of `ImageClassifier`.
    """

    def __init__(self, layers: ModuleType, dataset: Dataset, in_channels: int, blurpool: bool, se: bool) -> None:
        self.layers = layers
        self.dataset = dataset
        self.blurpool = blurpool
        self.se = se
        self.relu = activation_factory(layers, "relu")
        self.channels = in_channels
        self.unit = self.pool = 0
        self.steps: list[Step] = []

    def features(self, text: str) -> nn.Sequential:
        modules: OrderedDict[str, nn.Module] = OrderedDict()

        def add(name: str, module: nn.Module, stride: int = 1) -> None:
            modules[name] = module
            self.steps.append(Step(f"features.{name}", self.channels, stride))

        for kind, out in parse_layers(text):
            if kind == "P":
                self.pool += 1
                add(f"pool{self.pool}", self.layers.BlurMaxPool2d() if self.blurpool else nn.MaxPool2d(2), stride=2)
                continue
            if kind != "T":
                self.unit += 1
            made = {"T": self._transition, "c": self._conv_unit, "d": self._depthwise_unit}[kind](out)
            self.channels = out
            add(f"transition{self.pool + 1}" if kind == "T" else f"conv{self.unit}", made)
            if kind != "T" and self.unit in self.dataset.dropout:
                add(f"drop{self.unit}", nn.Dropout(self.dataset.dropout[self.unit]))
        return nn.Sequential(modules)

    @property
    def _padding(self) -> int:
        return int(self.pool >= self.dataset.unpadded)

    def _excite(self, out: int) -> dict[str, nn.Module]:
        """The squeeze-excite behind a convolution to `out` channels, where mosaicml's rule puts one."""
        if not self.se or min(self.channels, out) < _SE_LEAST_CHANNELS:
            return {}
        return {"se": self.layers.SqueezeExcite(out, _SE_CHANNELS, bias=False)}

    def _transition(self, out: int) -> nn.Module:
        conv = nn.Conv2d(self.channels, out, 1, bias=False)
        excite = self._excite(out)
        return nn.Sequential(OrderedDict(conv=conv, **excite)) if excite else conv

    def _conv_unit(self, out: int) -> nn.Sequential:
        conv = nn.Conv2d(self.channels, out, 3, padding=self._padding, bias=self.dataset.bias)
        tail = OrderedDict(act=self.relu(), norm=nn.BatchNorm2d(out))  # the activation first
        return nn.Sequential(OrderedDict(conv=conv, **self._excite(out), **tail))

    def _depthwise_unit(self, out: int) -> nn.Module:
        channels, bias = self.channels, self.dataset.bias
        excite = self._excite(channels)
        if not excite:
            return self.layers.FusedDSConv(
                channels,
                out,
                padding=self._padding,
                bias=bias,
                dw_bias=bias,
                norm=nn.BatchNorm2d,
                act=self.relu,
                norm_first=False,
            )
        # Depthwise, squeeze-excite, pointwise: an inverted residual block without its expansion.
        conv = self.layers.InvertedResidual.from_modules(
            None,
            nn.Conv2d(channels, channels, 3, padding=self._padding, groups=channels, bias=bias),
            nn.Conv2d(channels, out, 1, bias=bias),
            residual=False,
            **excite,
        )
        tail = OrderedDict(act=self.relu(), norm=nn.BatchNorm2d(out))
        return nn.Sequential(OrderedDict(conv=conv, **self._excite(out), **tail))


class NutsAndBolts(ImageClassifier):
    """A network of Table 1 or 2.

    `forward` gives log-probabilities, as the authors' networks do: `F.nll_loss` is the paper's cross-entropy.
    (`F.cross_entropy` gives the same, since the log-softmax of log-probabilities is those themselves.) In timm's words:
    `forward_head(x, pre_logits=True)` are the pooled features, and `classifier` makes logits of them. With
    num_classes=0 `forward` gives the pooled features, without a log-softmax.

    Args:
        layers: `effops.modules` or `effops.stock`.
        text: the layers, as `parse_layers` reads them.
        dataset: what the networks for a dataset share.
        num_classes: outputs of the classifier; 0 for none.
        in_channels: of the input image; None for the dataset's.
        blurpool: max pools become mosaicml's BlurMaxPool2d. (Its strided convolutions would be blurred too; these
            networks have none.)
        se: mosaicml's squeeze-excite (2 channels between, no biases) behind every convolution with at least 5 input and
            output channels, ahead of ReLU and batch norm: 3x3, depthwise, pointwise and transition ones. Names in the
            state dict then differ, as there are more modules.
        classifier_bias: the classifier has a bias, as in the authors' runs with mosaicml's Composer; Table 1 counts
            none.

    Shape:
        [N, in_channels, H, W] -> [N, num_classes].

    Raises:
        ValueError: a word of `text` that `parse_layers` does not know.

    Example:
        >>> model = create_model("mnist_5k_dw").eval()
        >>> sum(p.numel() for p in model.parameters())
        5616
        >>> probabilities = model(torch.randn(1, 1, 28, 28)).exp()
        >>> torch.allclose(probabilities.sum(1), torch.ones(1))
        True
    """

    def __init__(
        self,
        layers: ModuleType,
        text: str,
        dataset: Dataset,
        *,
        num_classes: int = 10,
        in_channels: int | None = None,
        blurpool: bool = False,
        se: bool = False,
        classifier_bias: bool = False,
    ) -> None:
        super().__init__()
        channels = dataset.in_channels if in_channels is None else in_channels
        builder = _Builder(layers, dataset, channels, blurpool, se)
        self.features = builder.features(text)
        self.steps = builder.steps
        self.num_features = builder.channels
        self.num_classes = num_classes
        self.classifier_bias = classifier_bias
        self.classifier = (
            nn.Linear(self.num_features, num_classes, bias=classifier_bias) if num_classes else nn.Identity()
        )

    def forward_features(self, x: Tensor) -> Tensor:
        """[N, in_channels, H, W] -> [N, num_features, h, w]."""
        return self.features(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """[N, num_features, h, w] -> log-probabilities [N, num_classes], or pooled features with `pre_logits`."""
        x = super().forward_head(x, pre_logits=True)
        return x if pre_logits or self.num_classes == 0 else F.log_softmax(self.classifier(x), 1)

    def _set_classifier(self, head: nn.Module) -> None:
        if isinstance(head, nn.Linear) and not self.classifier_bias:
            head.register_parameter("bias", None)
        super()._set_classifier(head)


def _register(name: str, dataset: Dataset, text: str) -> None:
    @register_model(name)
    def build(layers: ModuleType, **kwargs: Any) -> NutsAndBolts:
        return NutsAndBolts(layers, text, dataset, **kwargs)


for _name, (_dataset, _text) in _NETS.items():
    _register(_name, _dataset, _text)
