"""Builds what is measured: inputs, the stock module the rivals run, the effops call, and the float64 truth.

Everything is seeded by the case's name, so every process measures the same numbers. The truth is shifted multiply-adds
and a matrix product in float64, so it shares no code with effops and none with torch's convolutions.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from functools import cached_property

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.shapes import BSCase, DSCase, DWCase, MBCase, MultiCase

FORMATS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
_BN_EPS = 1e-5
# VGNet appendix D: six edge kernels and two Gaussians, as printed.
_VGNET8 = (
    ((-1 / 2, -1, -1 / 2), (0, 0, 0), (1 / 2, 1, 1 / 2)),
    ((-1 / 2, 0, 1 / 2), (-1, 0, 1), (-1 / 2, 0, 1 / 2)),
    ((-1 / 12, -2 / 12, -1 / 12), (-2 / 12, 1, -2 / 12), (-1 / 12, -2 / 12, -1 / 12)),
    ((0, -1 / 4, 0), (-1 / 4, 1, -1 / 4), (0, -1 / 4, 0)),
    ((-1, -2 / 3, -1 / 3), (-2 / 3, 0, 2 / 3), (1 / 3, 2 / 3, 1)),
    ((-1 / 3, -2 / 3, -1), (2 / 3, 0, -2 / 3), (1, 2 / 3, 1 / 3)),
    ((0.0811, 0.1226, 0.0811), (0.1226, 0.1853, 0.1226), (0.0811, 0.1226, 0.0811)),
    ((0.0277, 0.1110, 0.0277), (0.1110, 0.4452, 0.1110), (0.0277, 0.1110, 0.0277)),
)


def activation64(x: torch.Tensor, name: str) -> torch.Tensor:
    """The activations the shapes use, on any dtype."""
    return {"none": lambda v: v, "relu": torch.relu, "relu6": F.relu6, "hardswish": F.hardswish}[name](x)


def depthwise64(x: torch.Tensor, weight: torch.Tensor, stride: int) -> torch.Tensor:
    """Depthwise convolution with 'same' padding as kh*kw shifted multiply-adds; weight [C, 1, kh, kw]."""
    kernel = weight.shape[-1]
    pad = kernel // 2
    size = (x.shape[-1] + 2 * pad - kernel) // stride + 1
    padded = F.pad(x, (pad, pad, pad, pad))
    out = 0
    for i in range(kernel):
        for j in range(kernel):
            rows = slice(i, i + stride * (size - 1) + 1, stride)
            columns = slice(j, j + stride * (size - 1) + 1, stride)
            out = out + padded[:, :, rows, columns] * weight[:, 0, i, j].view(1, -1, 1, 1)
    return out


def pointwise64(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """1x1 convolution as a matrix product; weight [K, C, 1, 1]."""
    return torch.matmul(weight.flatten(1), x.flatten(2)).unflatten(2, x.shape[2:])


def _channels(v: torch.Tensor) -> torch.Tensor:
    return v.view(1, -1, 1, 1)


class _Problem:
    """What all kinds share: seeded tensors and the depthwise bank."""

    def __init__(
        self,
        case: DSCase | DWCase | BSCase | MultiCase | MBCase,
        batch: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.case, self.batch, self.dtype, self.device = case, batch, dtype, torch.device(device)
        self._generator = torch.Generator(device).manual_seed(zlib.crc32(f"{case.name}/{batch}".encode()))
        self.x = self._randn(batch, case.channels, case.size, case.size)
        if not isinstance(case, MultiCase):
            self.bank = self._make_bank()

    def _randn(self, *shape: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(*shape, generator=self._generator, device=self.device) * scale).to(self.dtype)

    def _make_bank(self) -> torch.Tensor:
        case = self.case
        if case.bank == "fixed8":
            return torch.tensor(_VGNET8).unsqueeze(1).to(self.device, self.dtype)
        if case.bank == "blur":
            return torch.tensor(_VGNET8[6]).view(1, 1, 3, 3).to(self.device, self.dtype)
        return self._randn(case.bank_size, 1, case.kernel, case.kernel, scale=1 / case.kernel)

    @property
    def dw_weight(self) -> torch.Tensor:
        """The bank repeated to one kernel a channel, as the stock convolution wants it."""
        return self.bank[torch.arange(self.case.channels, device=self.device) % self.bank.shape[0]]

    @cached_property
    def truth(self) -> torch.Tensor:
        return self._truth()

    def eager_result(self, variant: str) -> torch.Tensor:
        """Torch's own result in this dtype and memory format, which sets the error budget."""
        module, inputs = self.stock(variant)
        with torch.no_grad():
            return module(*inputs)

    def macs(self) -> int:
        return self.case.macs(self.batch)


class _StockDW(nn.Module):
    def __init__(self, case: DWCase) -> None:
        super().__init__()
        self.dw = nn.Conv2d(
            case.channels,
            case.channels,
            case.kernel,
            case.stride,
            case.kernel // 2,
            groups=case.channels,
            bias=case.bias,
        )
        self.activation = case.activation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.dw(x)
        if self.activation == "relu":
            y = torch.relu_(y)
        elif self.activation == "hardswish":
            y = F.hardswish(y, inplace=True)
        return y


class DWProblem(_Problem):
    """One depthwise convolution with bias and activation."""

    def __init__(
        self, case: DWCase, batch: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> None:
        super().__init__(case, batch, dtype, device)
        self.bias = self._randn(case.channels) if case.bias else None

    def _truth(self) -> torch.Tensor:
        y = depthwise64(self.x.double(), self.dw_weight.double(), self.case.stride)
        if self.bias is not None:
            y = y + _channels(self.bias.double())
        return activation64(y, self.case.activation)

    def stock(self, variant: str) -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
        """The stock module in eval mode and its inputs, both in the variant's memory format."""
        module = _StockDW(self.case).to(self.device, self.dtype)
        state = {"dw.weight": self.dw_weight}
        if self.bias is not None:
            state["dw.bias"] = self.bias
        module.load_state_dict(state)
        return _formatted(module, (self.x,), variant)

    def effops(self, variant: str, backend: str = "auto") -> Callable[[], torch.Tensor]:
        """A call of the public function: dispatch, checks and weight packing are inside the timing."""
        import effops.functional as EF

        case, bank, bias = self.case, self.bank, self.bias
        x = self.x.contiguous(memory_format=FORMATS[variant])
        if case.bank == "learned":
            return lambda: EF.depthwise_conv2d(
                x, bank, bias, case.stride, case.kernel // 2, activation=case.activation, backend=backend
            )
        if case.bank == "shared8":
            return lambda: EF.shared_depthwise_conv2d(x, bank, None, case.stride, case.kernel // 2, backend=backend)
        constants = bank[:, 0].contiguous()
        return lambda: EF.fixed_filter_conv2d(x, constants, case.stride, case.kernel // 2, backend=backend)


class _StockDS(nn.Module):
    """The chain as networks write it; in-place ReLU, eval-mode BatchNorm where conv-act-BN keeps it from folding."""

    def __init__(self, case: DSCase) -> None:
        super().__init__()
        c = case.channels
        self.dw = nn.Conv2d(c, c, case.kernel, case.stride, case.kernel // 2, groups=c, bias=case.bias)
        self.pw = nn.Conv2d(case.pw_in, case.out, 1, bias=case.bias)
        self.bn = nn.BatchNorm2d(case.out, eps=_BN_EPS) if case.affine else nn.Identity()
        self.case = case

    def forward(self, x: torch.Tensor, left: torch.Tensor | None = None) -> torch.Tensor:
        u = self.dw(x)
        if self.case.dw_activation == "relu":
            u = torch.relu_(u)
        z = u if left is None else torch.cat([left, u], 1)
        y = self.bn(torch.relu_(self.pw(z)))
        return torch.cat([u[:, -self.case.keep :], y], 1) if self.case.keep else y


class DSProblem(_Problem):
    """One depthwise -> pointwise chain with folded epilogues."""

    def __init__(
        self, case: DSCase, batch: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> None:
        super().__init__(case, batch, dtype, device)
        self.left = self._randn(batch, case.passthrough, case.out_size, case.out_size) if case.passthrough else None
        self.pw_weight = self._randn(case.out, case.pw_in, 1, 1, scale=case.pw_in**-0.5)
        self.dw_bias = self._randn(case.channels, scale=0.1) if case.bias else None
        self.pw_bias = self._randn(case.out, scale=0.1) if case.bias else None
        self.scale = (1 + self._randn(case.out, scale=0.1)).to(dtype) if case.affine else None
        self.shift = self._randn(case.out, scale=0.1) if case.affine else None

    def _truth(self) -> torch.Tensor:
        case = self.case
        u = depthwise64(self.x.double(), self.dw_weight.double(), case.stride)
        if self.dw_bias is not None:
            u = u + _channels(self.dw_bias.double())
        u = activation64(u, case.dw_activation)
        z = u if self.left is None else torch.cat([self.left.double(), u], 1)
        y = pointwise64(z, self.pw_weight.double())
        if self.pw_bias is not None:
            y = y + _channels(self.pw_bias.double())
        y = activation64(y, case.activation)
        if self.scale is not None:
            y = y * _channels(self.scale.double()) + _channels(self.shift.double())
        return torch.cat([u[:, -case.keep :], y], 1) if case.keep else y

    def stock(self, variant: str) -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
        """The stock module in eval mode and its inputs, both in the variant's memory format."""
        module = _StockDS(self.case).to(self.device, self.dtype)
        state = {"dw.weight": self.dw_weight, "pw.weight": self.pw_weight}
        if self.case.bias:
            state |= {"dw.bias": self.dw_bias, "pw.bias": self.pw_bias}
        if self.case.affine:
            state |= _folded_norm("bn", self.scale, self.shift)
        module.load_state_dict(state)
        return _formatted(module, (self.x,) if self.left is None else (self.x, self.left), variant)

    def effops(self, variant: str, backend: str = "auto") -> Callable[[], torch.Tensor]:
        """A call of the public function: dispatch, checks and weight packing are inside the timing."""
        import effops.functional as EF

        case, weight, dw_bias, bias = self.case, self.pw_weight, self.dw_bias, self.pw_bias
        bank = self.bank[:, 0].contiguous() if case.bank == "blur" else self.bank  # [B,R,S] is a fixed bank
        x = self.x.contiguous(memory_format=FORMATS[variant])
        left = None if self.left is None else self.left.contiguous(memory_format=FORMATS[variant])
        epilogue = {
            "dw_activation": case.dw_activation,
            "activation": case.activation,
            "scale": self.scale,
            "shift": self.shift,
        }
        extra = {"backend": backend} if left is None else {"backend": backend, "passthrough": left}
        if case.keep:
            extra["keep"] = case.keep
        if case.bank == "shared8":
            extra["dw_share"] = 8
        stride, padding = case.stride, case.kernel // 2
        return lambda: EF.ds_conv2d(x, bank, weight, dw_bias, bias, stride, padding, **extra, **epilogue)


class _StockBS(nn.Module):
    """The chain as networks write it, with a folded BatchNorm and an in-place ReLU."""

    def __init__(self, case: BSCase) -> None:
        super().__init__()
        self.mid = nn.Conv2d(case.channels, case.mid, 1, bias=False) if case.mid else nn.Identity()
        self.pw = nn.Conv2d(case.mid or case.channels, case.out, 1, bias=False)
        self.dw = nn.Conv2d(case.out, case.out, case.kernel, case.stride, case.kernel // 2, groups=case.out)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu_(self.dw(self.pw(self.mid(x))))


class BSProblem(_Problem):
    """One blueprint separable convolution with bias and ReLU."""

    def __init__(
        self, case: BSCase, batch: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> None:
        super().__init__(case, batch, dtype, device)
        read = case.mid or case.channels
        self.mid_weight = self._randn(case.mid, case.channels, 1, 1, scale=case.channels**-0.5) if case.mid else None
        self.pw_weight = self._randn(case.out, read, 1, 1, scale=read**-0.5)
        self.bias = self._randn(case.out, scale=0.1)

    def _truth(self) -> torch.Tensor:
        z = self.x.double()
        for weight in (self.mid_weight, self.pw_weight):
            z = z if weight is None else pointwise64(z, weight.double())
        return torch.relu(depthwise64(z, self.bank.double(), self.case.stride) + _channels(self.bias.double()))

    def stock(self, variant: str) -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
        """The stock module in eval mode and its inputs, both in the variant's memory format."""
        module = _StockBS(self.case).to(self.device, self.dtype)
        state = {"pw.weight": self.pw_weight, "dw.weight": self.bank, "dw.bias": self.bias}
        if self.mid_weight is not None:
            state["mid.weight"] = self.mid_weight
        module.load_state_dict(state)
        return _formatted(module, (self.x,), variant)

    def effops(self, variant: str, backend: str = "auto") -> Callable[[], torch.Tensor]:
        """A call of the public function: dispatch, checks and weight packing are inside the timing."""
        import effops.functional as EF

        case, pw, dw, bias, mid = self.case, self.pw_weight, self.bank, self.bias, self.mid_weight
        x = self.x.contiguous(memory_format=FORMATS[variant])
        return lambda: EF.bs_conv2d(
            x, pw, dw, bias, case.stride, case.kernel // 2, mid_weight=mid, activation="relu", backend=backend
        )


class _StockMulti(nn.Module):
    """Multiception as its authors write it: the depthwise convolutions at stride 1, the pointwise one strided."""

    def __init__(self, case: MultiCase) -> None:
        super().__init__()
        c, mid = case.channels, case.channels * len(case.kernels)
        self.dw = nn.ModuleList(nn.Conv2d(c, c, k, 1, k // 2, groups=c, bias=False) for k in case.kernels)
        self.dw_norm = nn.BatchNorm2d(mid, eps=_BN_EPS)
        self.pw = nn.Conv2d(mid, case.out, 1, case.stride)
        self.norm = nn.BatchNorm2d(case.out, eps=_BN_EPS)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        z = self.dw_norm(torch.cat([dw(x) for dw in self.dw], 1))
        return torch.relu_(self.norm(self.pw(z)))


class MultiProblem(_Problem):
    """One Multiception block in eval, by its module: batch norms are folded in every call."""

    def __init__(
        self, case: MultiCase, batch: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> None:
        super().__init__(case, batch, dtype, device)
        c, mid = case.channels, case.channels * len(case.kernels)
        self.dw_weights = [self._randn(c, 1, k, k, scale=1 / k) for k in case.kernels]
        self.pw_weight = self._randn(case.out, mid, 1, 1, scale=mid**-0.5)
        self.pw_bias = self._randn(case.out, scale=0.1)
        self.norms = {
            name: ((1 + self._randn(size, scale=0.1)).to(dtype), self._randn(size, scale=0.1))
            for name, size in (("dw_norm", mid), ("norm", case.out))
        }

    def _truth(self) -> torch.Tensor:
        z = torch.cat([depthwise64(self.x.double(), w.double(), self.case.stride) for w in self.dw_weights], 1)
        (dw_scale, dw_shift), (scale, shift) = ([v.double() for v in norm] for norm in self.norms.values())
        y = pointwise64(z * _channels(dw_scale) + _channels(dw_shift), self.pw_weight.double())
        return torch.relu((y + _channels(self.pw_bias.double())) * _channels(scale) + _channels(shift))

    def _state(self) -> dict[str, torch.Tensor]:
        state = {f"dw.{i}.weight": weight for i, weight in enumerate(self.dw_weights)}
        state |= {"pw.weight": self.pw_weight, "pw.bias": self.pw_bias}
        for name, (scale, shift) in self.norms.items():
            state |= _folded_norm(name, scale, shift)
        return state

    def stock(self, variant: str) -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
        """The stock module in eval mode and its inputs, both in the variant's memory format."""
        module = _StockMulti(self.case).to(self.device, self.dtype)
        module.load_state_dict(self._state())
        return _formatted(module, (self.x,), variant)

    def effops(self, variant: str, backend: str = "auto") -> Callable[[], torch.Tensor]:
        """A call of the module: folding, dispatch, checks and weight packing are inside the timing."""
        import effops

        case = self.case
        module = effops.MulticeptionConv2d(
            case.channels, case.out, case.kernels, case.stride, act="relu", backend=backend,
            device=self.device, dtype=self.dtype,
        )  # fmt: skip
        module.load_state_dict(self._state())
        module, (x,) = _formatted(module, (self.x,), variant)
        return lambda: module(x)


class _StockMB(nn.Module):
    """The block as networks write it, batch norms folded into biases, ReLU6 in place."""

    def __init__(self, case: MBCase) -> None:
        super().__init__()
        c = case.hidden
        self.expand = nn.Conv2d(case.channels, c, 1) if case.expands else None
        self.dw = nn.Conv2d(c, c, case.kernel, case.stride, case.kernel // 2, groups=c)
        self.pw = nn.Conv2d(c, case.out, 1)
        self.residual = case.residual

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        e = x if self.expand is None else F.relu6(self.expand(x), inplace=True)
        y = self.pw(F.relu6(self.dw(e), inplace=True))
        return y + x if self.residual else y


class MBProblem(_Problem):
    """One inverted residual with folded epilogues."""

    def __init__(
        self, case: MBCase, batch: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> None:
        super().__init__(case, batch, dtype, device)
        c = case.hidden
        self.state = {"dw.weight": self.bank, "dw.bias": self._randn(c, scale=0.1) + 1}
        if case.expands:
            weight = self._randn(c, case.channels, 1, 1, scale=case.channels**-0.5)
            self.state |= {"expand.weight": weight, "expand.bias": self._randn(c, scale=0.1) + 1}
        self.state |= {"pw.weight": self._randn(case.out, c, 1, 1, scale=c**-0.5), "pw.bias": self._randn(case.out)}

    def _truth(self) -> torch.Tensor:
        t = {name: tensor.double() for name, tensor in self.state.items()}
        e = self.x.double()
        if self.case.expands:
            e = activation64(pointwise64(e, t["expand.weight"]) + _channels(t["expand.bias"]), "relu6")
        u = depthwise64(e, t["dw.weight"], self.case.stride) + _channels(t["dw.bias"])
        y = pointwise64(activation64(u, "relu6"), t["pw.weight"]) + _channels(t["pw.bias"])
        return y + self.x.double() if self.case.residual else y

    def stock(self, variant: str) -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
        """The stock module in eval mode and its input, both in the variant's memory format."""
        module = _StockMB(self.case).to(self.device, self.dtype)
        module.load_state_dict(self.state)
        return _formatted(module, (self.x,), variant)

    def effops(self, variant: str, backend: str = "auto") -> Callable[[], torch.Tensor]:
        """A call of the public function: dispatch, checks and weight packing are inside the timing."""
        import effops.functional as EF

        case, t = self.case, self.state
        x = self.x.contiguous(memory_format=FORMATS[variant])
        arguments = {"dw_activation": "relu6", "residual": x if case.residual else None, "backend": backend}
        if case.expands:
            arguments["expand_activation"] = "relu6"
        tensors = (t.get("expand.weight"), t["dw.weight"], t["pw.weight"])
        biases = (t.get("expand.bias"), t["dw.bias"], t["pw.bias"])
        return lambda: EF.inverted_residual2d(x, *tensors, *biases, case.stride, case.kernel // 2, **arguments)


def _folded_norm(name: str, scale: torch.Tensor, shift: torch.Tensor) -> dict[str, torch.Tensor]:
    """The state of a batch norm that is exactly scale and shift: eps + running_var = 1."""
    return {
        f"{name}.weight": scale,
        f"{name}.bias": shift,
        f"{name}.running_mean": torch.zeros_like(shift),
        f"{name}.running_var": torch.full_like(shift, 1 - _BN_EPS),
        f"{name}.num_batches_tracked": torch.tensor(0),
    }


def _formatted(module: nn.Module, inputs: tuple, variant: str) -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    memory_format = FORMATS[variant]
    module = module.eval().requires_grad_(False).to(memory_format=memory_format)
    return module, tuple(x.contiguous(memory_format=memory_format) for x in inputs)


_KINDS = {DSCase: DSProblem, DWCase: DWProblem, BSCase: BSProblem, MultiCase: MultiProblem, MBCase: MBProblem}


def build(
    case: DSCase | DWCase | BSCase | MultiCase | MBCase,
    batch: int,
    dtype: str = "float32",
    device: torch.device | str = "cpu",
) -> DSProblem | DWProblem | BSProblem | MultiProblem | MBProblem:
    """The problem for a case of any kind."""
    kind = _KINDS[type(case)]
    return kind(case, batch, getattr(torch, dtype), device)
