"""What the networks of the paper share: the drop-in convolutions, the base class, the authors' state-dict keys."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from effops.models.classifier import ImageClassifier
from effops.models.features import Step
from effops.models.registry import register_model
from effops.modules import BSConvS, BSConvU
from effops.modules._keys import rename_keys

__all__ = [
    "FORMS",
    "BlueprintClassifier",
    "DropIn",
    "bsconv_key_map",
    "conv_add",
    "conv_norm_act",
    "dense_conv",
    "name_of",
    "register_drop_ins",
]

FORMS = ("standard", "bsconvu", "bsconvs")
# Kernels that the authors' drop-in rule replaces; 1x1 projections and 7x7 stems stay (`bsconv`'s BSConvU_Replacer).
_REPLACED_KERNELS = (3, 5)

Renames = Sequence[tuple[str, str]]


def name_of(base: str, form: str) -> str:
    """The registry's name of a network in one of the forms: the standard one has no suffix."""
    return base if form == "standard" else f"{base}_{form}"


def register_drop_ins(name: str, network: Callable[..., nn.Module]) -> None:
    """Registers a network of standard convolutions and its BSConv-U form; `network` takes the form."""
    for form in ("standard", "bsconvu"):
        register_model(name_of(name, form))(partial(network, form=form))


def dense_conv(
    in_channels: int,
    out_channels: int,
    kernel_size: int,
    stride: int = 1,
    *,
    padding: int | None = None,
    groups: int = 1,
    bias: bool = False,
) -> nn.Conv2d:
    """An `nn.Conv2d` with the authors' initialisation; padding None keeps the size at stride 1."""
    padding = (kernel_size - 1) // 2 if padding is None else padding
    conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, groups=groups, bias=bias)
    nn.init.kaiming_uniform_(conv.weight)
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
    return conv


class DropIn:
    """Makes a network's convolutions in one of the paper's forms: what it would replace a standard network's by.

    The rule is the authors': convolutions of one group with a 3x3 or 5x5 kernel become blueprint separable ones that
    keep stride, padding and bias; the 3x3 stem of the CIFAR networks is one of them. The blueprint convolutions start
    from torch's own initialisation, as in the authors' code, which replaces after having initialised.

    Args:
        layers: `effops.modules` or `effops.stock`.
        form: "standard"; "bsconvu", without a batch norm inside; or "bsconvs", with one behind each of the two 1x1
            convolutions. That is how the authors build their ready-made networks.
        p: of "bsconvs", the subspace ratio; None is 1/4.

    Raises:
        ValueError: an unknown form, or p for a form that has none.

    "Rethinking Depthwise Separable Convolutions" (arXiv 2003.13549), sections 3.3.1, 3.3.2 and 5.1.

    Example:
        >>> conv = effops.models.bsconv.layers.DropIn(effops.modules, "bsconvu")
        >>> [type(conv(16, 32, kernel_size)).__name__ for kernel_size in (1, 3, 5, 7)]
        ['Conv2d', 'BSConvU', 'BSConvU', 'Conv2d']
    """

    def __init__(self, layers: ModuleType, form: str = "standard", p: float | None = None) -> None:
        if form not in FORMS:
            raise ValueError(f"unknown form {form!r}; accepted: {', '.join(FORMS)}")
        if p is not None and form != "bsconvs":
            raise ValueError(f"p={p!r} is the subspace ratio of the form 'bsconvs'; the form {form!r} has none")
        self.layers = layers
        self.form = form
        self.p = 0.25 if p is None else p

    def __call__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        stride: int = 1,
        *,
        padding: int | None = None,
        bias: bool = False,
    ) -> nn.Module:
        """A convolution of one group; padding None keeps the size at stride 1."""
        if self.form == "standard" or kernel_size not in _REPLACED_KERNELS:
            return dense_conv(in_channels, out_channels, kernel_size, stride, padding=padding, bias=bias)
        padding = (kernel_size - 1) // 2 if padding is None else padding
        window = {"kernel_size": kernel_size, "stride": stride, "padding": padding, "bias": bias}
        if self.form == "bsconvu":
            return self.layers.BSConvU(in_channels, out_channels, **window)
        return self.layers.BSConvS(in_channels, out_channels, **window, p=self.p, with_bn=True)


def conv_norm_act(conv: nn.Module, out_channels: int | None = None, act: nn.Module | None = None) -> nn.Module:
    """conv, a batch norm on out_channels (None for none) and perhaps an activation.

    A blueprint separable convolution takes both in, as its sub-modules norm and act: one kernel in eval mode. Others
    become a Sequential by the names conv, norm and act.
    """
    behind: OrderedDict[str, nn.Module] = OrderedDict()
    if out_channels is not None:
        behind["norm"] = nn.BatchNorm2d(out_channels)
    if act is not None:
        behind["act"] = act
    if not isinstance(conv, (BSConvU, BSConvS)):
        return nn.Sequential(OrderedDict(conv=conv, **behind))
    for name, module in behind.items():
        setattr(conv, name, module)
    return conv


def conv_add(conv: nn.Module, norm: nn.Module | None = None, post_act: nn.Module | None = None) -> nn.Module:
    """post_act(norm(conv(x)) + shortcut), called with x and the shortcut.

    As `conv_norm_act`: within a blueprint separable convolution, around any other.
    """
    norm = nn.Identity() if norm is None else norm
    post_act = nn.Identity() if post_act is None else post_act
    if isinstance(conv, (BSConvU, BSConvS)):
        conv.norm, conv.post_act = norm, post_act
        return conv
    return _ConvAdd(conv, norm, post_act)


class _ConvAdd(nn.Module):
    def __init__(self, conv: nn.Module, norm: nn.Module, post_act: nn.Module) -> None:
        super().__init__()
        self.conv, self.norm, self.post_act = conv, norm, post_act

    def forward(self, x: Tensor, shortcut: Tensor) -> Tensor:
        return self.post_act(self.norm(self.conv(x)) + shortcut)


class BlueprintClassifier(ImageClassifier):
    """An image classifier of the paper: perhaps a batch norm on the image, features, average pool, one linear layer.

    A subclass sets `features`, adds to `steps` and then calls `_add_classifier`. `load_state_dict` accepts the keys of
    the authors' PyPI package bsconv (`bsconv_key_map`), whose classifier is a 1x1 convolution with a bias on the pooled
    features: the same numbers.

    Args:
        in_channels: of the input image.
        data_bn: a batch norm on the image, as in the authors' package. The paper does not tell whether its networks
            had it; its printed counts fit both ways.

    Shape:
        [N, in_channels, H, W] -> [N, num_classes].

    Example:
        >>> model = create_model("cifar_resnet20_bsconvu", num_classes=100)
        >>> model.author_key_map(["backbone.stage1.unit1.conv1.bn.weight"])
        {'backbone.stage1.unit1.conv1.bn.weight': 'features.stage1.unit1.conv1.norm.weight'}
    """

    features: nn.Module
    # (pattern, replacement) on top of the common ones, for the keys of this network in the authors' package.
    _renames: Renames = ()

    def __init__(self, in_channels: int, data_bn: bool) -> None:
        super().__init__()
        self.data_bn = nn.BatchNorm2d(in_channels) if data_bn else nn.Identity()
        self.steps = [Step("data_bn", None)]

    def _add_classifier(self, num_features: int, num_classes: int) -> None:
        self.num_features = num_features
        self.num_classes = num_classes
        self.classifier = nn.Linear(num_features, num_classes) if num_classes else nn.Identity()
        if num_classes:
            nn.init.xavier_normal_(self.classifier.weight)

    def forward_features(self, x: Tensor) -> Tensor:
        """[N, in_channels, H, W] -> [N, num_features, h, w]."""
        return self.features(self.data_bn(x))

    @classmethod
    def author_key_map(cls, keys: Iterable[str]) -> dict[str, str]:
        """`bsconv_key_map` for this kind of network."""
        return bsconv_key_map(keys, cls._renames)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        keys = [key[len(prefix) :] for key in state_dict if key.startswith(prefix)]
        rename_keys(state_dict, prefix, self.author_key_map(keys))
        weight = state_dict.get(f"{prefix}classifier.weight")
        if weight is not None and weight.ndim == 4:
            state_dict[f"{prefix}classifier.weight"] = weight.flatten(1)
        super()._load_from_state_dict(state_dict, prefix, *args)


_COMMON_RENAMES: Renames = (
    (r"^backbone\.data_bn\.", "data_bn."),
    (r"^backbone\.(init_unit\.conv|init_conv)\.", "features.stem."),
    (r"^backbone\.", "features."),
    (r"^classifier\.conv\.", "classifier."),
    (r"\.bn\.(?=\w+$)", ".norm."),
    # A blueprint convolution is a unit's convolution itself, with the norm inside: see conv_norm_act.
    (r"\.conv\.(?=(pw|pw1|bn1|pw2|bn2|dw)\.)", "."),
)


def bsconv_key_map(keys: Iterable[str], renames: Renames = ()) -> dict[str, str]:
    """Maps the state-dict keys of a network of the PyPI package bsconv (0.4.0) to the keys of the one here.

    Args:
        keys: of the package's network.
        renames: (regular expression, replacement) of the kind of network, after the common ones.

    Returns:
        {old key: new key}; keys that stay are not in it. The classifier's weight [classes, features, 1, 1] is to be
        reshaped to [classes, features] besides.

    Example:
        >>> effops.models.bsconv.layers.bsconv_key_map(["backbone.stage1.unit1.conv1.bn.weight"])
        {'backbone.stage1.unit1.conv1.bn.weight': 'features.stage1.unit1.conv1.norm.weight'}
    """
    mapping = {}
    for key in keys:
        if not key.startswith(("backbone.", "classifier.conv.")):
            continue
        new = key
        for pattern, replacement in (*_COMMON_RENAMES, *renames):
            new = re.sub(pattern, replacement, new)
        mapping[key] = new
    return mapping
