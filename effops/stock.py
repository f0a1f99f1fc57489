"""The modules of `effops.modules` in stock PyTorch: same constructors, parameters and state-dict keys, torch's own ops.

They are what the fused modules are compared with, in value and in speed: tests use them, and
`create_model(..., reference=True)` builds a network from them.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effops import modules
from effops.modules import ds_conv_key_map, inverted_residual_key_map
from effops.modules.vgnet import Pair
from effops.ops.dwconv.banks import binomial
from effops.ops.epilogue import activate
from effops.ops.se.reference import GATES, SLOPE

__all__ = [
    "BSConvS",
    "BSConvU",
    "BlurMaxPool2d",
    "BlurPool2d",
    "DepthwiseConv2d",
    "DownsamplingBlock",
    "EffNetBlock",
    "FixedFilterConv2d",
    "FusedDSConv",
    "HalfIdentityBlock",
    "InvertedResidual",
    "MixConv2d",
    "MulticeptionConv2d",
    "SeparableConvPool2d",
    "SharedDepthwiseConv2d",
    "SqueezeExcite",
    "ds_conv_key_map",
    "inverted_residual_key_map",
]


def _repeated(weight: Tensor, channels: int) -> Tensor:
    """[C, 1, kh, kw] with kernel `c mod K` of weight [K, 1, kh, kw] for channel c."""
    return weight.repeat(-(-channels // weight.shape[0]), 1, 1, 1)[:channels]


def _depthwise(conv: nn.Module, input: Tensor, weight: Tensor) -> Tensor:
    """Depthwise convolution with one kernel a channel, weight [C, 1, kh, kw]; all else as in conv."""
    padding = conv.padding
    if not isinstance(padding, str) and (len(padding) == 4 or conv.padding_mode != "zeros"):
        mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
        input = F.pad(input, conv._reversed_padding_repeated_twice, mode=mode)
        padding = (0, 0)
    return F.conv2d(input, weight, conv.bias, conv.stride, padding, conv.dilation, conv.channels)


class _Constant(nn.Module):
    """Repeats constant kernels once, as anyone who uses stock convolutions would.

    The buffer `repeated` is not in the state dict. It follows `.to()` and `load_state_dict`; after any other change of
    `weight` it has to be set anew.
    """

    def __init__(self, channels: int, *args: Any, **kwargs: Any) -> None:
        super().__init__(channels, *args, **kwargs)
        self.register_buffer("repeated", _repeated(self.weight, self.channels).clone(), persistent=False)

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self.repeated = _repeated(self.weight, self.channels).clone()

    def forward(self, input: Tensor) -> Tensor:
        return _depthwise(self, input, self.repeated)


class DepthwiseConv2d(modules.DepthwiseConv2d):
    """`effops.DepthwiseConv2d` as `nn.Conv2d` computes it."""

    def forward(self, input: Tensor) -> Tensor:
        return nn.Conv2d.forward(self, input)


class SharedDepthwiseConv2d(modules.SharedDepthwiseConv2d):
    """`effops.SharedDepthwiseConv2d` on the weight, repeated on each call: its gradient is the sum over the copies."""

    def forward(self, input: Tensor) -> Tensor:
        return _depthwise(self, input, _repeated(self.weight, self.channels))


class FixedFilterConv2d(_Constant, modules.FixedFilterConv2d):
    """`effops.FixedFilterConv2d` on the repeated bank."""


class BlurPool2d(_Constant, modules.BlurPool2d):
    """`effops.BlurPool2d` on the repeated filter."""


class BlurMaxPool2d(modules.BlurMaxPool2d):
    """`effops.BlurMaxPool2d` as `F.max_pool2d`, a padding and a depthwise convolution."""

    def forward(self, input: Tensor) -> Tensor:
        y = F.max_pool2d(input, self.kernel_size, 1, self.padding)
        before, behind = (self.filter_size - 1) // 2, self.filter_size // 2
        mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
        kernel = torch.tensor(binomial(self.filter_size), dtype=y.dtype, device=y.device)
        kernel = kernel.expand(y.shape[1], 1, *kernel.shape)
        y = F.pad(y, (before, behind, before, behind), mode)
        return F.conv2d(y, kernel, None, self.stride, groups=y.shape[1])


class FusedDSConv(modules.FusedDSConv):
    """`effops.FusedDSConv` as its sub-modules compute it one by one: nothing is fused."""

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        z = self.dw(F.pad(input, self.uneven_padding) if self.uneven_padding else input)
        z = self.dw_act(self.dw_norm(z)) if self.norm_first else self.dw_norm(self.dw_act(z))
        return self._run_behind(self.pw(z), self._residual_of(input, residual))


class BSConvU(modules.BSConvU):
    """`effops.BSConvU` as its sub-modules compute it one by one."""

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        return self._run_behind(self.dw(self.bn(self.pw(input))), self._residual_of(input, residual))


class BSConvS(modules.BSConvS):
    """`effops.BSConvS` as its sub-modules compute it one by one."""

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        z = self.bn2(self.pw2(self.bn1(self.pw1(input))))
        return self._run_behind(self.dw(z), self._residual_of(input, residual))


class MulticeptionConv2d(modules.MulticeptionConv2d):
    """`effops.MulticeptionConv2d` as its sub-modules compute it one by one, with the concatenation."""

    def forward(self, input: Tensor) -> Tensor:
        return self.act(self.norm(self.pw(self.dw_norm(torch.cat([dw(input) for dw in self.dw], 1)))))


class MixConv2d(modules.MixConv2d):
    """`effops.MixConv2d` as its sub-modules compute it one by one, with the concatenation."""

    def forward(self, input: Tensor) -> Tensor:
        parts = [dw(x) for dw, x in zip(self.dw, self._inputs(input), strict=True)]
        return self.act(self.norm(self.pw(self.dw_norm(torch.cat(parts, 1)))))


class SqueezeExcite(modules.SqueezeExcite):
    """`effops.SqueezeExcite` as its sub-modules compute it one by one."""

    def forward(self, input: Tensor) -> Tensor:
        gates = self.expand(self.act(self.reduce(F.adaptive_avg_pool2d(input, 1))))
        return input * activate(gates, GATES[self.gate], SLOPE)


class InvertedResidual(modules.InvertedResidual):
    """`effops.InvertedResidual` as its sub-modules compute it one by one: nothing is fused."""

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        e = self.expand_act(self.expand_norm(self.expand(input)))
        z = self.dw(F.pad(e, self.uneven_padding) if self.uneven_padding else e)
        y = self.norm(self.pw(self.se(self.dw_act(self.dw_norm(z)))))
        if self.residual:
            return y + input
        return y if residual is None else y + residual


class HalfIdentityBlock(modules.HalfIdentityBlock):
    """`effops.HalfIdentityBlock` by concatenation."""

    _fixed_filter = FixedFilterConv2d

    def forward(self, state: Pair) -> Pair:
        left, right = state
        z = torch.cat([left, self.dw_norm(self.dw(right))], 1)
        return right, self.se(self.norm(self.act(self.pw(z))))


class DownsamplingBlock(modules.DownsamplingBlock):
    """`effops.DownsamplingBlock` by slicing and concatenation."""

    _fixed_filter = FixedFilterConv2d

    def forward(self, input: Tensor | Pair) -> Pair:
        if not isinstance(input, Tensor):
            input = torch.cat(tuple(input), 1)
        y = self.dw(input)
        new = self.se(self.norm(self.act(self.pw(y))))
        return torch.cat([y[:, y.shape[1] - self.keep :], new], 1).chunk(2, 1)


class SeparableConvPool2d(modules.SeparableConvPool2d):
    """`effops.SeparableConvPool2d` as its sub-modules and `F.max_pool2d` compute it one by one."""

    def forward(self, input: Tensor) -> Tensor:
        z = self.row_act(self.row_norm(self.row(input)))
        if self.pool in ("row", "both"):
            z = F.max_pool2d(z, (1, 2))
        y = self.act(self.norm(self.col(z)))
        return F.max_pool2d(y, (2, 1)) if self.pool == "both" else y


class EffNetBlock(modules.EffNetBlock):
    """`effops.EffNetBlock` as its sub-modules compute it one by one; activations are in place."""

    _separable = SeparableConvPool2d

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.expand_act.inplace = self.act.inplace = True

    def forward(self, input: Tensor) -> Tensor:
        e = self.expand_act(self.expand_norm(self.expand(input)))
        y = self.norm(self.project(self.dw(e)))
        return self.act(y + self.shortcut(F.max_pool2d(input, 2)) if self.residual else y)
