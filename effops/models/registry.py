"""The models by name: `create_model`, `list_models`, `is_model`, and how a model joins them.

A builder is a function `builder(layers, num_classes=..., **kwargs) -> nn.Module` where `layers` is the module it takes
its building blocks from: `effops.modules`, or `effops.stock` for the plain-PyTorch twin with the same state dict.
"""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from torch import Tensor, nn

from effops import modules, stock

__all__ = ["create_model", "is_model", "list_models", "register_model"]

Builder = Callable[..., nn.Module]
# Reads trained weights; None looks them up where they are installed, a path reads that file.
WeightsReader = Callable[[Path | None], dict[str, Tensor]]


class _Entry(NamedTuple):
    builder: Builder
    weights: WeightsReader | None


_MODELS: dict[str, _Entry] = {}


def register_model(name: str, *, weights: WeightsReader | None = None) -> Callable[[Builder], Builder]:
    """Decorator that adds a builder to the registry.

    Args:
        name: lower case, the paper's own name where it has one.
        weights: reads the trained state dict, where there is one.

    Raises:
        ValueError: the name is taken.
    """
    if name in _MODELS:
        raise ValueError(f"a model named {name!r} is registered already")

    def register(builder: Builder) -> Builder:
        _MODELS[name] = _Entry(builder, weights)
        return builder

    return register


def list_models(pattern: str = "*") -> list[str]:
    """The names of the registered models that match a shell pattern, sorted: `list_models("vgnetg_*")`."""
    return sorted(fnmatch.filter(_MODELS, pattern))


def is_model(name: str) -> bool:
    """True where `create_model(name)` knows the name."""
    return name in _MODELS


def create_model(
    name: str,
    *,
    num_classes: int | None = None,
    pretrained: bool | str | Path = False,
    reference: bool = False,
    **kwargs: object,
) -> nn.Module:
    """Builds a registered model, in training mode.

    Args:
        name: one of `list_models()`.
        num_classes: outputs of the classifier; None is the model's own default (1,000 for ImageNet's). With
            `pretrained` another number gives a new, untrained classifier on the trained features.
        pretrained: loads trained weights: True from the installed package that holds them, a path from that file.
        reference: builds the twin out of stock PyTorch modules, with the same parameters and state-dict keys.
        **kwargs: the model's own arguments.

    Raises:
        TypeError: an argument that the model does not take.
        ValueError: an unknown name (the message lists close ones), or pretrained where no trained weights are known.
        RuntimeError: the weights are not installed, or cannot be read.

    Example:
        >>> model = create_model("vgnetg_1_0mp", num_classes=10).eval()
    """
    entry = _entry(name)
    layers = stock if reference else modules
    if pretrained is False:
        if num_classes is not None:
            kwargs["num_classes"] = num_classes
        return entry.builder(layers, **kwargs)
    if entry.weights is None:
        raise ValueError(f"no trained weights are known for {name!r}; pass pretrained=False")
    state = entry.weights(None if pretrained is True else Path(pretrained))
    model = entry.builder(layers, **kwargs)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise RuntimeError(f"the weights do not fit {name!r} with {kwargs or 'its defaults'}: {error}") from error
    if num_classes is not None and num_classes != model.num_classes:
        model.reset_classifier(num_classes)
    return model


def _entry(name: str) -> _Entry:
    if not isinstance(name, str):
        raise TypeError(f"create_model: name must be a string, got {type(name).__name__}")
    if name in _MODELS:
        return _MODELS[name]
    close = difflib.get_close_matches(name.lower(), _MODELS, n=5, cutoff=0.5)
    hint = f"close names: {', '.join(close)}" if close else f"known: {', '.join(list_models())}"
    raise ValueError(f"unknown model {name!r}; {hint}")
