"""Arguments of the modules' constructors: checks, and what makes activations and norms of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

ModuleFactory = Callable[[int], nn.Module]
ActivationLike = str | nn.Module | Callable[[], nn.Module] | None
IntOrPair = int | tuple[int, int]
Padding = int | tuple[int, int] | tuple[int, int, int, int] | str | None

_PADDING_MODES = ("zeros", "reflect", "replicate", "circular")

ACTIVATION_MODULES: dict[str, Callable[[], nn.Module]] = {
    "none": nn.Identity,
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "leaky_relu": nn.LeakyReLU,
    "silu": nn.SiLU,
    "hardswish": nn.Hardswish,
    "hardsigmoid": nn.Hardsigmoid,
    "sigmoid": nn.Sigmoid,
    "gelu": nn.GELU,
}


def check_int(where: str, name: str, value: object, least: int = 1) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{where}: {name} must be an int, got {value!r} ({type(value).__name__})")
    if value < least:
        raise ValueError(f"{where}: {name} must be at least {least}, got {value}")
    return value


def check_pair(where: str, name: str, value: object, least: int = 1) -> tuple[int, int]:
    if isinstance(value, (tuple, list)):
        if len(value) != 2:
            raise ValueError(f"{where}: {name} must be an int or a pair (height, width), got {value!r}")
        return (check_int(where, name, value[0], least), check_int(where, name, value[1], least))
    element = check_int(where, name, value, least)
    return element, element


def check_padding(
    where: str, padding: Padding, kernel: tuple[int, int], dilation: tuple[int, int]
) -> str | tuple[int, ...]:
    """Returns (h, w), (left, right, top, bottom) or a word; None is 'same' for odd kernels."""
    if padding is None:
        if not (kernel[0] % 2 and kernel[1] % 2):
            raise ValueError(f"{where}: padding=None means 'same' and needs an odd kernel_size, got {kernel}; give it")
        return (kernel[0] - 1) // 2 * dilation[0], (kernel[1] - 1) // 2 * dilation[1]
    if isinstance(padding, str):
        if padding not in ("same", "valid"):
            raise ValueError(f"{where}: unknown padding {padding!r}; accepted words: 'same', 'valid'")
        return padding
    if isinstance(padding, (tuple, list)) and len(padding) == 4:
        return tuple(check_int(where, "padding", side, 0) for side in padding)
    if isinstance(padding, (tuple, list)) and len(padding) != 2:
        raise ValueError(
            f"{where}: padding must be an int, (height, width), (left, right, top, bottom), 'same', 'valid' or None, "
            f"got {padding!r}"
        )
    return check_pair(where, "padding", padding, 0)


def check_padding_mode(where: str, padding_mode: str) -> str:
    if padding_mode not in _PADDING_MODES:
        raise ValueError(f"{where}: unknown padding_mode {padding_mode!r}; accepted: {', '.join(_PADDING_MODES)}")
    return padding_mode


def make_activation(where: str, name: str, act: ActivationLike) -> nn.Module:
    """The module for a name, a module, a module class (or any factory without arguments), or None."""
    if act is None:
        return nn.Identity()
    if isinstance(act, nn.Module):
        return act
    if isinstance(act, str):
        if act not in ACTIVATION_MODULES:
            raise ValueError(
                f"{where}: unknown activation {act!r} for {name}; "
                f"accepted: {', '.join(ACTIVATION_MODULES)}, or a module"
            )
        return ACTIVATION_MODULES[act]()
    made = act() if callable(act) else None
    if not isinstance(made, nn.Module):
        raise TypeError(f"{where}: {name} must be an activation's name, a module, a module class or None, got {act!r}")
    return made


def make_norm(where: str, name: str, norm: ModuleFactory | None, channels: int, factory: dict[str, Any]) -> nn.Module:
    """`norm(channels)`, moved to the asked-for device and dtype; Identity for None."""
    if norm is None:
        return nn.Identity()
    if isinstance(norm, nn.Module) or not callable(norm):
        raise TypeError(
            f"{where}: {name} must be None or a factory that is called with the channel count, such as nn.BatchNorm2d, "
            f"got {norm!r}"
        )
    made = norm(channels)
    if not isinstance(made, nn.Module):
        raise TypeError(f"{where}: {name}({channels}) returned {type(made).__name__}, not an nn.Module")
    if factory["device"] is not None or factory["dtype"] is not None:
        made = made.to(**factory)
    return made
