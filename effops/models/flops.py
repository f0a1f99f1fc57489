"""FLOPs as the papers count them: every paper has a convention of its own.

    osmr_flops            BSConv, Table 2: half of what this gives is what the paper prints
    bsconv_readme_flops   BSConv, the tables of the authors' README
    effnet_flops          EffNet, all its tables; effnet_baseline_slip and effnet_early_pool are its counting slips
    vgnet_flops           VGNet, the results.md of the author's repository (the paper prints none)

A convention is a table of rules: operator -> (its arguments, its output) -> FLOPs. A network runs once, without data
(on the meta device), and the rules are applied to each operator that it calls, by a module or by a function. Operators
without a rule count nothing, so a convention that counts additions needs a rule for them. The networks must be stock
PyTorch: `create_model(name, reference=True)`.

Multiply-accumulates alone are half of what `torch.utils.flop_counter` gives.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = [
    "bsconv_readme_flops",
    "count_flops",
    "effnet_baseline_slip",
    "effnet_early_pool",
    "effnet_flops",
    "osmr_flops",
    "vgnet_flops",
]

aten = torch.ops.aten
Rule = Callable[[tuple[Any, ...], Tensor], int]
Rules = Mapping[Any, Rule]

# The operators behind the modules in eval mode, by kind; the rules below are given by kind.
CONV = (aten.convolution,)
LINEAR_WITH_BIAS = (aten.addmm,)
BATCH_NORM = (aten.native_batch_norm, aten._native_batch_norm_legit_no_training)
RELU = (aten.relu, aten.relu_)
RELU6 = (aten.hardtanh, aten.hardtanh_)
MAX_POOL = (aten.max_pool2d_with_indices,)
AVG_POOL = (aten.avg_pool2d,)
GLOBAL_POOL = (aten.mean,)  # what adaptive_avg_pool2d to 1 x 1 is


def rules_of(*kinds: tuple[tuple[Any, ...], Rule]) -> dict[Any, Rule]:
    """A convention's table from (operators of a kind, rule) pairs."""
    return {operator: rule for operators, rule in kinds for operator in operators}


class _Counter(TorchDispatchMode):
    def __init__(self, rules: Rules) -> None:
        super().__init__()
        self.rules = rules
        self.total = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        rule = self.rules.get(func.overloadpacket)
        if rule is not None:
            self.total += rule(args, output[0] if isinstance(output, tuple) else output)
        return output


def count_flops(model: nn.Module, input_size: tuple[int, ...], rules: Rules) -> int:
    """FLOPs of one forward pass in eval mode, by a convention's rules.

    Args:
        model: of stock modules; it is not changed.
        input_size: [N, C, H, W].
        rules: of the convention: operator (such as `torch.ops.aten.relu`, all its overloads) -> function of the
            operator's arguments and its output that gives FLOPs.

    Returns:
        The sum over the operators that have a rule.

    Raises:
        ValueError: the model has fused modules, whose operators no rule knows.

    Example:
        >>> from effops.models.flops import count_flops
        >>> rules = {torch.ops.aten.relu: lambda args, output: output.numel()}
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU())
        >>> count_flops(model, (1, 3, 32, 32), rules) == 8 * 32 * 32
        True
    """
    fused = {
        type(module).__name__ for module in model.modules() if type(module).__module__.startswith("effops.modules")
    }
    if fused:
        raise ValueError(
            f"FLOPs are counted by torch's operators, and {', '.join(sorted(fused))} fuse them; count the twin: "
            "create_model(name, reference=True)"
        )
    twin = model if _runs_without_data(model) else copy.deepcopy(model).to("meta").eval()
    with torch.no_grad(), _Counter(rules) as counter:
        twin(torch.empty(input_size, device="meta"))
    return counter.total


def _runs_without_data(model: nn.Module) -> bool:
    """Whether it is on the meta device and in eval mode: then a copy, which takes long, is not needed."""
    tensors = itertools.chain(model.parameters(), model.buffers())
    return all(tensor.is_meta for tensor in tensors) and not any(module.training for module in model.modules())


def conv_macs(args: tuple[Any, ...], output: Tensor) -> int:
    """Multiply-accumulates of a convolution: C / groups * R * S for each output element."""
    return output.numel() * prod(args[1].shape[1:])


def linear_macs(args: tuple[Any, ...], output: Tensor) -> int:
    """Multiply-accumulates of a linear layer with a bias (addmm: bias, input, weight)."""
    return args[1].numel() * output.shape[-1]


def per_output(flops: int) -> Rule:
    """The rule of so many FLOPs for each output element."""
    return lambda args, output: flops * output.numel()


def per_input(flops: int) -> Rule:
    """The rule of so many FLOPs for each input element."""
    return lambda args, output: flops * args[0].numel()


def _window(args: tuple[Any, ...], output: Tensor) -> int:
    """kernel height * width for each output element of a pool."""
    return prod(args[1]) * output.numel()


# ---------------------------------------------------------------------------------------------------------------------
# osmr (BSConv, Table 2)
# ---------------------------------------------------------------------------------------------------------------------


def _osmr_conv(args: tuple[Any, ...], output: Tensor) -> int:
    """2 a multiply-accumulate; without a bias one addition less for each pair of channels (not of each output)."""
    weight, bias = args[1:3]
    flops = 2 * conv_macs(args, output)
    return flops if bias is not None else flops - output.shape[0] * weight.shape[0] * weight.shape[1]


_OSMR = rules_of(
    (CONV, _osmr_conv),
    (LINEAR_WITH_BIAS, lambda args, output: 2 * linear_macs(args, output)),
    (BATCH_NORM, per_output(4)),
    (RELU + RELU6, per_output(1)),
    (MAX_POOL + AVG_POOL, _window),
    (GLOBAL_POOL, per_input(1)),
)


def osmr_flops(model: nn.Module, input_size: tuple[int, ...]) -> int:
    """FLOPs by the rules of the repository osmr/imgclsmob; Table 2 of the BSConv paper prints the half of them.

    Convolutions without bias (2 R S P Q - 1) C K / groups, with one 2 R S P Q C K / groups; linear layers 2 C K; batch
    norms 4 and ReLUs 1 an element; pools R S an output, global ones 1 an input. Additions of shortcuts do not count.

    Args:
        model: a network of stock modules.
        input_size: [N, C, H, W].

    Returns:
        FLOPs of the whole batch.

    Raises:
        ValueError: as `count_flops`.

    "Rethinking Depthwise Separable Convolutions" (arXiv 2003.13549), Table 2: to all its digits.

    Example:
        >>> from effops.models.flops import osmr_flops
        >>> model = create_model("cifar_resnet20", reference=True)
        >>> f"{osmr_flops(model, (1, 3, 32, 32)) / 2e6:.1f} M"  # as printed
        '41.3 M'
    """
    return count_flops(model, input_size, _OSMR)


# ---------------------------------------------------------------------------------------------------------------------
# The README of BSConv
# ---------------------------------------------------------------------------------------------------------------------


def _readme_conv(args: tuple[Any, ...], output: Tensor) -> int:
    return conv_macs(args, output) + (output.numel() if args[2] is not None else 0)


_BSCONV_README = rules_of(
    (CONV, _readme_conv),
    (LINEAR_WITH_BIAS, lambda args, output: linear_macs(args, output) + output.numel()),
    (BATCH_NORM, per_output(2)),
    (RELU, per_output(1)),
    (MAX_POOL + AVG_POOL + GLOBAL_POOL, per_input(1)),
)


def bsconv_readme_flops(model: nn.Module, input_size: tuple[int, ...]) -> int:
    """FLOPs as the tables in the README of the BSConv authors' package count them (its class ModelProfiler).

    Multiply-accumulates of convolutions and linear layers, and 1 an output where there is a bias; batch norms 2 and
    ReLUs 1 an element, all other activations nothing; pools 1 an input element. Additions of shortcuts do not count.

    Args:
        model: a network of stock modules.
        input_size: [N, C, H, W].

    Returns:
        FLOPs of the whole batch.

    Raises:
        ValueError: as `count_flops`.

    Example:
        >>> from effops.models.flops import bsconv_readme_flops
        >>> model = create_model("mobilenetv1", width=0.25, input="cifar", num_classes=10, reference=True)
        >>> f"{bsconv_readme_flops(model, (1, 3, 32, 32)) / 1e6:.2f} M"  # as printed
        '12.99 M'
    """
    return count_flops(model, input_size, _BSCONV_README)


# ---------------------------------------------------------------------------------------------------------------------
# EffNet
# ---------------------------------------------------------------------------------------------------------------------

_EFFNET = rules_of(
    (CONV, lambda args, output: 2 * conv_macs(args, output)),
    (LINEAR_WITH_BIAS, lambda args, output: 2 * linear_macs(args, output)),
)


def effnet_flops(model: nn.Module, input_size: tuple[int, ...]) -> int:
    """FLOPs as the EffNet paper's tables count them: 2 a multiply-accumulate of convolutions and linear layers.

    The convention is inferred: with it most of the printed figures come out to the last digit.

    Args:
        model: a network of stock modules.
        input_size: [N, C, H, W].

    Returns:
        FLOPs of the whole batch.

    Raises:
        ValueError: as `count_flops`.

    EffNet (arXiv 1801.06434), Tables 2 to 7.

    Example:
        >>> from effops.models.flops import effnet_flops
        >>> model = create_model("effnet_v1_gtsrb", reference=True)
        >>> f"{effnet_flops(model, (1, 3, 32, 32)) / 1e3:.1f} K"  # as printed
        '344.1 K'
    """
    return count_flops(model, input_size, _EFFNET)


def effnet_baseline_slip(channels: int, classes: int) -> int:
    """What the paper's FLOPs of a baseline are too high by.

    Its linear layer is counted on a map of 16 x 16, although Table 1 shows that it reads 4 x 4.

    Args:
        channels: of the last layer.
        classes: outputs of the linear layer.

    Returns:
        FLOPs to be added to those of `effnet_flops`.

    Example:
        >>> from effops.models.flops import effnet_baseline_slip, effnet_flops
        >>> model = create_model("effnet_baseline_svhn", reference=True)
        >>> counted = effnet_flops(model, (1, 3, 32, 32)) + effnet_baseline_slip(48, 10)
        >>> f"{counted / 1e3:.1f} K"  # as printed
        '3563.5 K'
    """
    return 2 * (16 * 16 - 4 * 4) * channels * classes


def effnet_early_pool(in_channels: int, expansion: int) -> int:
    """What the FLOPs of a revised EffNet are too low by in the paper's Tables 5 and 6 (not in Table 7).

    The last block's 3x1 depthwise convolution is counted on the 4 x 4 map behind its pool, not on 8 x 4 as it runs.

    Args:
        in_channels: of the last block; 2 * floor(in_channels * expansion / 2) go through that convolution.
        expansion: the expansion rate.

    Returns:
        FLOPs to be taken from those of `effnet_flops`.

    Example:
        >>> from effops.models.flops import effnet_early_pool, effnet_flops
        >>> model = create_model("effnet_v2_svhn", reference=True)
        >>> counted = effnet_flops(model, (1, 3, 32, 32)) - effnet_early_pool(24, 6)
        >>> f"{counted / 1e3:.1f} K"  # as printed
        '1798.7 K'
    """
    return 2 * (8 * 4 - 4 * 4) * 3 * (2 * (in_channels * expansion // 2))


# ---------------------------------------------------------------------------------------------------------------------
# VGNet
# ---------------------------------------------------------------------------------------------------------------------

_VGNET = rules_of(
    (CONV, conv_macs),
    (LINEAR_WITH_BIAS, linear_macs),
    (BATCH_NORM, per_output(2)),
    (GLOBAL_POOL, per_input(1)),
)


def vgnet_flops(model: nn.Module, input_size: tuple[int, ...]) -> int:
    """FLOPs as the results.md of ffiirree/cv-models counts them (by fvcore); the VGNet paper prints none.

    Multiply-accumulates of convolutions and linear layers; batch norms 2 an element, average pools 1 an input element;
    activations and the squeeze-excites' products nothing.

    Args:
        model: a network of stock modules.
        input_size: [N, C, H, W].

    Returns:
        FLOPs of the whole batch.

    Raises:
        ValueError: as `count_flops`.

    Example:
        >>> from effops.models.flops import vgnet_flops
        >>> model = create_model("vgnetg_1_0mp", reference=True)
        >>> f"{vgnet_flops(model, (1, 3, 224, 224)) / 1e9:.3f} G"  # as printed
        '0.144 G'
    """
    return count_flops(model, input_size, _VGNET)
