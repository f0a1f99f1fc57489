"""Problems that are one module and its stock twin: EffNet's separable convolution and blocks, blurred max pools.

The truth is the chain as EffNet's and Zhang's papers have it, in float64, made of `problems.depthwise64`'s shifted
multiply-adds and `problems.pointwise64`.
"""

from __future__ import annotations

import copy
import zlib
from collections.abc import Callable

import torch
from torch import nn

from benchmarks.problems import FORMATS, pointwise64
from benchmarks.shapes import LayerCase


def _conv64(x: torch.Tensor, conv: nn.Conv2d) -> torch.Tensor:
    """A depthwise convolution of stride 1 as shifted multiply-adds, with conv's padding and multiplier."""
    (kernel_h, kernel_w), (pad_h, pad_w) = conv.kernel_size, conv.padding
    weight = conv.weight.double()
    x = nn.functional.pad(x, (pad_w, pad_w, pad_h, pad_h)).repeat_interleave(conv.out_channels // conv.in_channels, 1)
    rows, columns = x.shape[2] - kernel_h + 1, x.shape[3] - kernel_w + 1
    taps = [(i, j) for i in range(kernel_h) for j in range(kernel_w)]
    return sum(x[:, :, i : i + rows, j : j + columns] * weight[:, 0, i, j].view(1, -1, 1, 1) for i, j in taps)


def _norm64(x: torch.Tensor, norm: nn.BatchNorm2d) -> torch.Tensor:
    scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    shift = norm.bias.double() - norm.running_mean.double() * scale
    return x * scale.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1)


def _width_pairs(x: torch.Tensor) -> torch.Tensor:
    return torch.maximum(x[..., 0::2], x[..., 1::2])


def _separable64(x: torch.Tensor, layer: nn.Module, norm: bool) -> torch.Tensor:
    y = _conv64(_width_pairs(_conv64(x, layer.row)), layer.col)
    y = _norm64(y, layer.norm) if norm else y
    return torch.maximum(y[:, :, 0::2], y[:, :, 1::2]) if layer.pool == "both" else y


def _effnet64(x: torch.Tensor, block: nn.Module) -> torch.Tensor:
    e = _norm64(pointwise64(x, block.expand.weight.double()), block.expand_norm).relu()
    z, weight = _separable64(e, block.dw, norm=True), block.project.weight.double()
    y = pointwise64(z[:, :, :: weight.shape[2]], weight[:, :, :1])
    if weight.shape[2] == 2:
        y = y + pointwise64(z[:, :, 1::2], weight[:, :, 1:])
    return nn.functional.leaky_relu(_norm64(y, block.norm), getattr(block.act, "negative_slope", 0.0))


def _blur64(x: torch.Tensor, _layer: nn.Module) -> torch.Tensor:
    """2x2 maxima, then [1 2 1] / 4 along each axis at every second position."""
    y = torch.maximum(_neighbours(x, 2), _neighbours(x, 2, 1))
    y = torch.maximum(_neighbours(y, 3), _neighbours(y, 3, 1))
    for axis in (2, 3):
        padded = nn.functional.pad(y, (0, 0, 1, 1) if axis == 2 else (1, 1))
        size = (y.shape[axis] - 1) // 2 + 1
        index = 2 * torch.arange(size)
        y = sum(padded.index_select(axis, index + i) * share for i, share in ((0, 0.25), (1, 0.5), (2, 0.25)))
    return y


def _neighbours(x: torch.Tensor, axis: int, offset: int = 0) -> torch.Tensor:
    return x.narrow(axis, offset, x.shape[axis] - 1)


class LayerProblem:
    """One module with seeded weights and batch norm statistics, in eval mode."""

    def __init__(
        self, case: LayerCase, batch: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> None:
        from effops import modules, stock

        seed = zlib.crc32(f"{case.name}/{batch}".encode())
        self._generator = torch.Generator().manual_seed(seed)
        torch.manual_seed(seed)
        self.case = case
        self._effops, self._stock = (_layer(case, namespace) for namespace in (modules, stock))
        for norm in (m for m in self._effops.modules() if isinstance(m, nn.BatchNorm2d)):
            norm.running_mean.normal_(0, 0.2, generator=self._generator)
            norm.running_var.uniform_(0.5, 2, generator=self._generator)
        self._stock.load_state_dict(self._effops.state_dict())
        self._effops, self._stock = (
            m.to(device, dtype).eval().requires_grad_(False) for m in (self._effops, self._stock)
        )
        x = torch.randn(batch, case.channels, case.size, case.size, generator=self._generator)
        self.x = x.to(device, dtype)
        self._truth: torch.Tensor | None = None
        self._batch = batch

    def macs(self) -> int:
        return self.case.macs(self._batch)

    @property
    def truth(self) -> torch.Tensor:
        if self._truth is None:
            layer, x = copy.deepcopy(self._stock), self.x.double()
            truths: dict[str, Callable[[], torch.Tensor]] = {
                "separable": lambda: _separable64(x, layer, norm=False),
                "effnet1": lambda: _effnet64(x, layer),
                "effnet2": lambda: _effnet64(x, layer),
                "blurmaxpool": lambda: _blur64(x, layer),
            }
            self._truth = truths[self.case.layer]()
        return self._truth

    def stock(self, variant: str) -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
        """The stock twin and its input, both in the variant's memory format."""
        memory_format = FORMATS[variant]
        module = copy.deepcopy(self._stock).to(memory_format=memory_format)
        return module, (self.x.contiguous(memory_format=memory_format),)

    def effops(self, variant: str, backend: str = "auto") -> Callable[[], torch.Tensor]:
        """A call of the module, whose weights stay as they are: the kernels take them so for either format."""
        module, x = copy.deepcopy(self._effops), self.x.contiguous(memory_format=FORMATS[variant])
        for part in module.modules():
            if hasattr(part, "backend"):
                part.backend = backend
        return lambda: module(x)

    def eager_result(self, variant: str) -> torch.Tensor:
        """Torch's own result in this dtype and memory format, which sets the error budget."""
        module, inputs = self.stock(variant)
        with torch.no_grad():
            return module(*inputs)


def _layer(case: LayerCase, namespace) -> nn.Module:
    """The case's module from effops.modules or effops.stock."""
    if case.layer == "separable":
        return namespace.SeparableConvPool2d(case.channels, depth_multiplier=case.multiplier, pool=case.pool)
    if case.layer == "blurmaxpool":
        return namespace.BlurMaxPool2d()
    version = int(case.layer.removeprefix("effnet"))
    return namespace.EffNetBlock(case.channels, case.out, version=version)
