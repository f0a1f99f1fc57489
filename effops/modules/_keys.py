"""State-dict keys of the blocks that a `FusedDSConv` replaces."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

# timm's DepthwiseSeparableConv and SeparableConvNormAct.
_TIMM_KEYS = {"conv_dw": "dw", "bn1": "dw_norm", "conv_pw": "pw", "bn2": "norm", "bn": "norm"}
_NUMERIC_PATH = re.compile(r"(?:conv\.)?(\d+(?:\.\d+)*)")


def ds_conv_key_map(keys: Iterable[str], slots: Sequence[str]) -> dict[str, str]:
    """Maps the state-dict keys of the block that a `FusedDSConv` replaces to the keys of the `FusedDSConv`.

    Three namings are known:

    * `nn.Sequential` and torchvision (MobileNet-like): the module paths are numbers, perhaps nested and perhaps after
      "conv." ("0.weight", "1.running_mean", "0.0.weight", "conv.0.1.bias"). Sorted as numbers they are matched with
      `slots` by order.
    * timm (DepthwiseSeparableConv, SeparableConvNormAct): conv_dw -> dw, bn1 -> dw_norm, conv_pw -> pw, bn2 or bn ->
      norm.
    * `FusedDSConv` itself: unchanged.

    Args:
        keys: the keys of the replaced block, without the prefix of the model around it.
        slots: the sub-modules that have a state, in the order in which they run: dw, dw_norm, pw, norm.

    Returns:
        {old key: new key}. Keys that do not fit are not in it (`load_state_dict` then reports them).

    Example:
        >>> keys = ["0.weight", "1.weight", "1.bias", "3.weight"]
        >>> effops.modules.ds_conv_key_map(keys, ["dw", "dw_norm", "pw"])
        {'0.weight': 'dw.weight', '1.weight': 'dw_norm.weight', '1.bias': 'dw_norm.bias', '3.weight': 'pw.weight'}
    """
    paths = {key: key.rpartition(".")[0] for key in keys}
    named = {path: _TIMM_KEYS[path] for path in paths.values() if path in _TIMM_KEYS}
    numeric = {path: match[1] for path in set(paths.values()) if (match := _NUMERIC_PATH.fullmatch(path))}
    if len(numeric) == len(slots):
        by_order = sorted(numeric, key=lambda path: [int(part) for part in numeric[path].split(".")])
        named.update(zip(by_order, slots, strict=True))
    return {key: named[path] + key[len(path) :] for key, path in paths.items() if path in named}


# timm's InvertedResidual.
_TIMM_INVERTED_KEYS = {
    "conv_pw": "expand",
    "bn1": "expand_norm",
    "conv_dw": "dw",
    "bn2": "dw_norm",
    "se.conv_reduce": "se.reduce",
    "se.conv_expand": "se.expand",
    "conv_pwl": "pw",
    "bn3": "norm",
}
# torchvision's blocks: "conv.0.1" (MobileNetV2), "block.2.fc1" (MobileNetV3, EfficientNet).
_BLOCK_PATH = re.compile(r"(?:conv|block)\.(\d+(?:\.\d+)*)(?:\.fc([12]))?")


def inverted_residual_key_map(keys: Iterable[str], slots: Sequence[str]) -> dict[str, str]:
    """As `ds_conv_key_map` for the block that an `InvertedResidual` replaces: torchvision's and timm's namings.

    Args:
        keys: the keys of the replaced block, without the prefix of the model around it.
        slots: the sub-modules that have a state, in the order in which they run: expand, expand_norm, dw, dw_norm,
            se.reduce, se.expand, pw, norm.

    Returns:
        {old key: new key}. Keys that do not fit are not in it (`load_state_dict` then reports them).

    Example:
        >>> keys = ["conv.0.0.weight", "conv.1.0.weight", "conv.2.weight"]
        >>> effops.modules.inverted_residual_key_map(keys, ["expand", "dw", "pw"])
        {'conv.0.0.weight': 'expand.weight', 'conv.1.0.weight': 'dw.weight', 'conv.2.weight': 'pw.weight'}
    """
    paths = {key: key.rpartition(".")[0] for key in keys}
    named = {path: _TIMM_INVERTED_KEYS[path] for path in paths.values() if path in _TIMM_INVERTED_KEYS}
    numeric = {path: match for path in set(paths.values()) if (match := _BLOCK_PATH.fullmatch(path))}
    if len(numeric) == len(slots):
        by_order = sorted(
            numeric, key=lambda path: ([int(part) for part in numeric[path][1].split(".")], numeric[path][2] or "")
        )
        named.update(zip(by_order, slots, strict=True))
    return {key: named[path] + key[len(path) :] for key, path in paths.items() if path in named}


def rename_keys(state_dict: dict[str, Any], prefix: str, mapping: Mapping[str, str]) -> None:
    """Renames prefix + old to prefix + new in place; a key whose new name is taken already stays."""
    for old, new in mapping.items():
        if prefix + new not in state_dict:
            state_dict[prefix + new] = state_dict.pop(prefix + old)
