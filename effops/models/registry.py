"""The models by name: `create_model`, `list_models`, `is_model`, and how a model joins them.

A builder is a function `builder(layers, num_classes=..., **kwargs) -> nn.Module` where `layers` is the module it takes
its building blocks from: `effops.modules`, or `effops.stock` for the plain-PyTorch twin with the same state dict.
"""

from __future__ import annotations

import difflib
import fnmatch
import itertools
import os
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor, nn

from effops import modules, stock
from effops.models.classifier import ImageClassifier
from effops.models.features import FeatureExtractor
from effops.models.weights import Weights, load_into, read_weights

__all__ = ["create_model", "is_model", "list_models", "register_model"]

Builder = Callable[..., nn.Module]
# Reads the trained weights from where they are installed.
WeightsReader = Callable[[], dict[str, Tensor]]


class _Entry(NamedTuple):
    builder: Builder
    weights: WeightsReader | None


_MODELS: dict[str, _Entry] = {}


def register_model(name: str, *, weights: WeightsReader | None = None) -> Callable[[Builder], Builder]:
    """Decorator that adds a builder to the registry.

    Args:
        name: lower case, the paper's own name where it has one.
        weights: reads the trained state dict, where there is one: what `create_model(name, pretrained=True)` loads.

    Raises:
        ValueError: the name is taken.

    Example:
        >>> @effops.models.register_model("tiny")
        ... class Tiny(effops.models.ImageClassifier):
        ...     def __init__(self, layers, *, num_classes=10, in_channels=3):
        ...         super().__init__()
        ...         self.features = nn.Sequential(nn.Conv2d(in_channels, 8, 3, 2), layers.BSConvU(8, 16, 3))
        ...         self.steps = [effops.models.Step("features.0", 8, 2), effops.models.Step("features.1", 16)]
        ...         self.num_features, self.num_classes = 16, num_classes
        ...         self.classifier = nn.Linear(16, num_classes)
        ...
        ...     def forward_features(self, x):
        ...         return self.features(x)
        >>> create_model("tiny", num_classes=2)(torch.zeros(1, 3, 8, 8)).shape
        torch.Size([1, 2])
    """
    if name in _MODELS:
        raise ValueError(f"a model named {name!r} is registered already")

    def register(builder: Builder) -> Builder:
        _MODELS[name] = _Entry(builder, weights)
        return builder

    return register


def list_models(pattern: str = "*") -> list[str]:
    """The names of the registered models that match a shell pattern, sorted.

    Example:
        >>> list_models("mobilenetv3_*")
        ['mobilenetv3_large', 'mobilenetv3_large_bsconvs', 'mobilenetv3_small', 'mobilenetv3_small_bsconvs']
    """
    return sorted(fnmatch.filter(_MODELS, pattern))


def is_model(name: str) -> bool:
    """True where `create_model(name)` knows the name.

    Example:
        >>> effops.models.is_model("vgnetg_1_0mp"), effops.models.is_model("vgnetg_9_0mp")
        (True, False)
    """
    return name in _MODELS


def create_model(
    name: str,
    *,
    num_classes: int | None = None,
    in_chans: int | None = None,
    pretrained: bool | str | os.PathLike[str] = False,
    features_only: bool = False,
    out_indices: Sequence[int] | None = None,
    reference: bool = False,
    **kwargs: Any,
) -> nn.Module:
    """Builds a registered model, in training mode.

    Args:
        name: one of `list_models()`.
        num_classes: outputs of the classifier. None is the model's own default (1,000 for ImageNet's), or with
            `pretrained` what the weights have; then another number gives a new, untrained classifier on the trained
            features. 0 is no classifier.
        in_chans: channels of the image, as timm says; `in_channels` is the same. None is the model's default.
        pretrained: loads trained weights: True from the installed package that holds them, a path from that file, as
            `load_weights` reads it.
        features_only: the features alone: a `FeatureExtractor`, which gives a list of maps.
        out_indices: with features_only, the stages of which maps are given; negative ones count from the end. None for
            all.
        reference: builds the twin out of stock PyTorch modules, with the same parameters and state-dict keys.
        **kwargs: the model's own arguments.

    Raises:
        TypeError: an argument that the model does not take, or of a wrong kind.
        ValueError: an unknown name (the message lists close ones), or pretrained=True where no trained weights are
            known; arguments that exclude each other.
        RuntimeError: the weights are not installed, or cannot be read, or do not fit.

    Example:
        >>> model = create_model("vgnetg_1_0mp", num_classes=10, in_chans=1).eval()
        >>> model(torch.zeros(2, 1, 64, 64)).shape
        torch.Size([2, 10])
        >>> backbone = create_model("vgnetg_1_0mp", features_only=True).eval()
        >>> [tuple(y.shape[1:]) for y in backbone(torch.zeros(2, 3, 64, 64))]
        [(28, 32, 32), (56, 16, 16), (112, 8, 8), (224, 4, 4), (368, 2, 2)]
    """
    entry = _entry(name)
    build = partial(entry.builder, stock if reference else modules, **_with_channels(kwargs, in_chans))
    if out_indices is not None and not features_only:
        raise ValueError("out_indices are for features_only=True")
    if features_only and num_classes:
        raise ValueError(f"features_only=True has no classifier, so num_classes={num_classes!r} has no meaning")
    if isinstance(pretrained, bool):
        weights = _installed(name, entry) if pretrained else None
    elif isinstance(pretrained, (str, os.PathLike)):
        weights = read_weights(pretrained)
    else:
        raise TypeError(f"pretrained must be True, False or a path, got {pretrained!r}")
    if weights is not None:
        model = _trained(build, weights, f"{name!r} with {kwargs or 'its defaults'}", num_classes)
    else:
        model = build() if num_classes is None else build(num_classes=num_classes)
    if isinstance(model, ImageClassifier):
        model.name = name
    elif features_only:
        raise ValueError(f"{name!r} is a {type(model).__name__}, not an ImageClassifier: it has no feature stages")
    return FeatureExtractor(model, out_indices) if features_only else model


def _with_channels(kwargs: Mapping[str, Any], in_chans: int | None) -> dict[str, Any]:
    """kwargs with `in_chans` under the models' own word for it, checked."""
    given = dict(kwargs)
    if in_chans is not None:
        if "in_channels" in given:
            raise TypeError("create_model: in_chans and in_channels are the same argument; give one of them")
        given["in_channels"] = in_chans
    channels = given.get("in_channels")
    if channels is None:
        return given
    word = "in_channels" if in_chans is None else "in_chans"
    if isinstance(channels, bool) or not isinstance(channels, int):
        raise TypeError(f"{word} must be an int, got {channels!r}")
    if channels < 1:
        raise ValueError(f"{word} must be at least 1, got {channels}")
    return given


def _installed(name: str, entry: _Entry) -> Weights:
    if entry.weights is None:
        raise ValueError(f"no trained weights are known for {name!r}; pass pretrained=False, or the path of a file")
    return Weights(entry.weights(), {})


def _trained(build: Callable[..., nn.Module], weights: Weights, what: str, num_classes: int | None) -> nn.Module:
    """The model with as many classes as the weights have; then with another classifier, where another is wanted."""
    model = build(num_classes=_classes(weights.state))
    load_into(model, weights, what)
    if num_classes is not None and num_classes != model.num_classes:
        model.reset_classifier(num_classes)
    return model


def _classes(state: Mapping[str, Tensor]) -> int:
    """The outputs of a state dict's classifier (0: it has none), in the models' names and the authors'."""
    weights = (value for key, value in state.items() if key.startswith("classifier.") and key.endswith("weight"))
    return next((weight.shape[0] for weight in weights if weight.ndim >= 2), 0)


def _entry(name: str) -> _Entry:
    if not isinstance(name, str):
        raise TypeError(f"create_model: name must be a string, got {type(name).__name__}")
    if name in _MODELS:
        return _MODELS[name]
    close = difflib.get_close_matches(name.lower(), _MODELS, n=5, cutoff=0.5)
    hint = f"close names: {', '.join(close)}" if close else f"families: {', '.join(_families())}"
    raise ValueError(f"unknown model {name!r}; {hint} (effops.list_models() lists all, list_models('vgnetg_*') some)")


def _families() -> list[str]:
    """Patterns that cover all names: those that share their first letters ahead of a digit or an underscore."""
    groups = itertools.groupby(list_models(), lambda name: re.match("[a-z]*", name)[0])
    families = [list(names) for _, names in groups]
    return [f"{os.path.commonprefix(names)}*" if len(names) > 1 else names[0] for names in families]
