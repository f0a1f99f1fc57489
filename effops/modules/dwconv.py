"""Single depthwise convolutions: learned, shared and fixed kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.compiler import is_compiling

import effops.functional as EF
from effops._checks import FLOATS
from effops.modules._arguments import IntOrPair, Padding, check_int, check_padding, check_padding_mode, check_pair
from effops.ops.dwconv import banks
from effops.ops.geometry import is_channels_last


class DepthwiseConv2d(nn.Conv2d):
    """y[n, c*m + j] = conv(x[n, c], weight[c*m + j]) + bias[c*m + j]: a depthwise `nn.Conv2d` on effops kernels.

    Parameters, state dict and initialisation are those of `nn.Conv2d(channels, channels * m, ..., groups=channels)`.
    The first half of a depthwise separable convolution (MobileNets, arXiv 1704.04861, 3.1).

    Args:
        channels: input channels C.
        kernel_size: int or (height, width).
        stride: int or (height, width).
        padding: int, (height, width), 'same', 'valid', or None for (k - 1) // 2 * dilation (odd kernels).
        dilation: int or (height, width).
        bias: adds a learnable bias.
        depth_multiplier: m, output channels per input channel.
        padding_mode: 'zeros', 'reflect', 'replicate' or 'circular'.
        backend: as in `effops.functional`.

    Shape:
        [N, C, H, W] -> [N, C * m, P, Q].

    Raises:
        TypeError, ValueError: an argument of a wrong kind or value.

    Example:
        >>> conv, x = effops.DepthwiseConv2d(16, 3, stride=2, bias=True), torch.randn(1, 16, 9, 9)
        >>> stock = nn.Conv2d(16, 16, 3, 2, padding=1, groups=16)
        >>> stock.load_state_dict(conv.state_dict())
        <All keys matched successfully>
        >>> torch.allclose(conv(x), stock(x), atol=1e-5)
        True
    """

    def __init__(
        self,
        channels: int,
        kernel_size: IntOrPair = 3,
        stride: IntOrPair = 1,
        padding: Padding = None,
        dilation: IntOrPair = 1,
        bias: bool = False,
        *,
        depth_multiplier: int = 1,
        padding_mode: str = "zeros",
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        where = type(self).__name__
        check_int(where, "channels", channels)
        check_int(where, "depth_multiplier", depth_multiplier)
        kernel = check_pair(where, "kernel_size", kernel_size)
        dilation = check_pair(where, "dilation", dilation)
        padding = check_padding(where, padding, kernel, dilation)
        if len(padding) == 4 and not isinstance(padding, str):
            raise ValueError(f"{where}: uneven padding {padding} is not supported here; use F.pad and padding=0")
        super().__init__(
            channels,
            channels * depth_multiplier,
            kernel,
            check_pair(where, "stride", stride),
            padding,
            dilation,
            channels,
            bias,
            check_padding_mode(where, padding_mode),
            device,
            dtype,
        )
        self.backend = backend

    def forward(self, input: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, C * m, P, Q]."""
        input, padding = pad_for(self, input)
        return EF.depthwise_conv2d(
            input, self.weight, self.bias, self.stride, padding, self.dilation, backend=self.backend
        )


def pad_for(conv: nn.Module, input: Tensor) -> tuple[Tensor, str | tuple[int, ...]]:
    """Applies a padding mode that the kernels do not have; returns the padding left for the kernel."""
    if conv.padding_mode == "zeros":
        return input, conv.padding
    padded = F.pad(input, conv._reversed_padding_repeated_twice, mode=conv.padding_mode)
    if is_channels_last(input):  # torch's circular padding forgets the format
        padded = padded.contiguous(memory_format=torch.channels_last)
    return padded, (0, 0)


def kernels_of(conv: nn.Module) -> Tensor | banks.NamedBank:
    """The depthwise weight as the functional layer takes it: [K, 1, kh, kw] learned, or a repeated bank."""
    return conv.bank_kernels() if isinstance(conv, BankConv2d) else conv.weight


class BankConv2d(nn.Module):
    """What the convolutions with repeated kernels share: channel c uses kernel `c mod K` of `weight` [K, 1, kh, kw]."""

    def __init__(
        self,
        channels: int,
        kernel_size: tuple[int, int],
        stride: IntOrPair,
        padding: Padding,
        dilation: IntOrPair,
        padding_mode: str,
        backend: str,
    ) -> None:
        super().__init__()
        where = type(self).__name__
        self.channels = self.in_channels = self.out_channels = check_int(where, "channels", channels)
        self.kernel_size = kernel_size
        self.stride = check_pair(where, "stride", stride)
        self.dilation = check_pair(where, "dilation", dilation)
        self.padding = check_padding(where, padding, kernel_size, self.dilation)
        self.padding_mode = check_padding_mode(where, padding_mode)
        if self.padding_mode != "zeros" and isinstance(self.padding, str):
            raise ValueError(f"{where}: padding={self.padding!r} needs padding_mode='zeros', got {padding_mode!r}")
        self.backend = backend

    def bank_kernels(self) -> Tensor | banks.NamedBank:
        """The bank as the functional layer takes it."""
        return self.weight.squeeze(1)

    @property
    def _reversed_padding_repeated_twice(self) -> tuple[int, ...]:
        if len(self.padding) == 4:
            return self.padding
        height, width = self.padding
        return width, width, height, height

    def extra_repr(self) -> str:
        text = f"{self.channels}, kernel_size={self.kernel_size}, stride={self.stride}, padding={self.padding}"
        if self.dilation != (1, 1):
            text += f", dilation={self.dilation}"
        if self.padding_mode != "zeros":
            text += f", padding_mode={self.padding_mode!r}"
        return text


class SharedDepthwiseConv2d(BankConv2d):
    """y[n, c] = conv(x[n, c], weight[c mod (C / share)]) + bias[c]: one learned bank for `share` chunks of channels.

    The gradient of a kernel is the sum over its uses. VGNet's last depthwise convolution (arXiv 2207.10318, Table 1)
    with share 8.

    Args:
        channels: C, divisible by `share`.
        share: how many channels use each kernel.
        kernel_size, stride, padding, dilation, padding_mode, backend: as in `DepthwiseConv2d`; padding may also be
            (left, right, top, bottom).
        bias: adds a learnable bias, one per channel (not shared).

    Shape:
        [N, C, H, W] -> [N, C, P, Q]; weight [C / share, 1, kh, kw].

    Raises:
        TypeError, ValueError: an argument of a wrong kind or value; channels not divisible by share.

    Example:
        >>> conv, x = effops.SharedDepthwiseConv2d(64, share=8), torch.randn(1, 64, 9, 9)
        >>> kernels = conv.weight.repeat(8, 1, 1, 1)
        >>> conv.weight.shape, torch.allclose(conv(x), F.conv2d(x, kernels, padding=1, groups=64), atol=1e-5)
        (torch.Size([8, 1, 3, 3]), True)
    """

    def __init__(
        self,
        channels: int,
        share: int = 8,
        kernel_size: IntOrPair = 3,
        stride: IntOrPair = 1,
        padding: Padding = None,
        dilation: IntOrPair = 1,
        bias: bool = False,
        *,
        padding_mode: str = "zeros",
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        where = type(self).__name__
        kernel = check_pair(where, "kernel_size", kernel_size)
        super().__init__(channels, kernel, stride, padding, dilation, padding_mode, backend)
        self.share = check_int(where, "share", share)
        if channels % share:
            raise ValueError(f"{where}: channels must be divisible by share={share}, got {channels}")
        self.weight = nn.Parameter(torch.empty(channels // share, 1, *kernel, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(channels, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialises as `nn.Conv2d` does: each output sees kh * kw inputs."""
        nn.init.kaiming_uniform_(self.weight, a=5**0.5)
        if self.bias is not None:
            bound = (self.kernel_size[0] * self.kernel_size[1]) ** -0.5
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, input: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, C, P, Q]."""
        input, padding = pad_for(self, input)
        return EF.shared_depthwise_conv2d(
            input, self.weight, self.bias, self.stride, padding, self.dilation, backend=self.backend
        )

    def extra_repr(self) -> str:
        return super().extra_repr() + f", share={self.share}, bias={self.bias is not None}"


def _bank_constants(where: str, bank: str | Tensor) -> Tensor:
    """[K, kh, kw]; float64 for a name."""
    if isinstance(bank, str):
        try:
            return banks.bank(bank, dtype=torch.float64).squeeze(1)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
    if not isinstance(bank, Tensor) or not bank.is_floating_point():
        got = bank.dtype if isinstance(bank, Tensor) else type(bank).__name__
        raise TypeError(f"{where}: bank must be a name or a floating-point tensor [K, kh, kw], got {got}")
    if bank.dim() != 3 or bank.numel() == 0:
        raise ValueError(f"{where}: bank must have shape [K, kh, kw] with no zero size, got {list(bank.shape)}")
    return bank


class _Recognised(NamedTuple):
    """A module's bank at a moment when its tensor was compared with the named banks."""

    bank: banks.NamedBank
    version: int  # of the tensor, which counts its changes


class FixedFilterConv2d(BankConv2d):
    """y[n, c] = conv(x[n, c], bank[c mod K]): a depthwise convolution with constant kernels.

    The bank is a buffer named `weight`, [K, 1, kh, kw]: it moves with the module and is in its state dict, but has no
    gradient. The named banks are VGNet's (arXiv 2207.10318, appendix D), a blur and BlurPool's.

    While the buffer holds a named bank, kernels that have its taps as constants run in eager mode. That is looked up
    when the module is made, moved, cast, copied or loaded; whatever else changes `weight` makes the kernels read it.
    Exceptions, which nobody counts: writing through `weight.data` or a NumPy view of it, and replaying a CUDA graph
    captured before the change. Compiled and exported graphs always read the buffer, which is an input of theirs.

    Args:
        channels: C.
        bank: a name ("vgnet8", "vgnet4", "vgnet_blur", "vgnet_blur_alternate", "binomial3", "binomial5") or constants
            [K, kh, kw].
        stride, padding, dilation, padding_mode, backend: as in `SharedDepthwiseConv2d`.

    Shape:
        [N, C, H, W] -> [N, C, P, Q].

    Raises:
        TypeError, ValueError: an argument of a wrong kind or value.

    Example:
        >>> conv = effops.FixedFilterConv2d(16, "vgnet8")
        >>> list(conv.parameters()), conv.weight.shape, conv(torch.randn(1, 16, 9, 9)).shape
        ([], torch.Size([8, 1, 3, 3]), torch.Size([1, 16, 9, 9]))
    """

    bias: None = None

    def __init__(
        self,
        channels: int,
        bank: str | Tensor = "vgnet8",
        stride: IntOrPair = 1,
        padding: Padding = None,
        dilation: IntOrPair = 1,
        *,
        padding_mode: str = "zeros",
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        constants = _bank_constants(type(self).__name__, bank)
        kernel = (constants.shape[1], constants.shape[2])
        super().__init__(channels, kernel, stride, padding, dilation, padding_mode, backend)
        self.bank = bank if isinstance(bank, str) else f"{constants.shape[0]} given"
        dtype = torch.get_default_dtype() if dtype is None else dtype
        self.register_buffer("weight", constants.detach().unsqueeze(1).to(device=device, dtype=dtype, copy=True))
        self._recognise()

    def _recognise(self) -> None:
        """Notes whether the buffer holds a named bank; on a GPU this waits for the device, so no forward does it."""
        weight = self.weight
        comparable = type(weight) is Tensor and weight.dtype in FLOATS and not weight.is_meta
        code = 0
        if comparable and not weight.is_inference():  # inference tensors do not count their changes
            code = banks.code_of(weight)
        self._recognised = _Recognised(banks.NamedBank(weight, code), weight._version) if code else None

    def bank_kernels(self) -> Tensor | banks.NamedBank:
        """The bank, with its name where the buffer still is the tensor that was recognised, unchanged since."""
        if is_compiling():
            return super().bank_kernels()
        known, weight = self._recognised, self.weight
        if known is None or known.bank.values is not weight or known.version != weight._version:
            return super().bank_kernels()
        return known.bank

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        self._recognise()
        return self

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self._recognise()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_recognised"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._recognise()

    def forward(self, input: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, C, P, Q]."""
        input, padding = pad_for(self, input)
        return EF.fixed_filter_conv2d(
            input, kernels_of(self), self.stride, padding, self.dilation, backend=self.backend
        )

    def extra_repr(self) -> str:
        return super().extra_repr() + f", bank={self.bank!r}"


class BlurPool2d(FixedFilterConv2d):
    """Anti-aliased downsampling: y[n, c] = conv(x[n, c], blur, stride).

    Zhang, "Making Convolutional Networks Shift-Invariant Again" (arXiv 1904.11486) uses the binomial filter.

    Args:
        channels: C.
        kernel_size: edge length of the square filter; odd for the Gaussian.
        stride: int or (height, width).
        padding: as in `DepthwiseConv2d`; an even kernel_size needs it given.
        filter: "binomial" or "gaussian".
        sigma: standard deviation of the Gaussian, in pixels; above 0.
        alternate_sign: odd channels get the negated filter.
        padding_mode, backend: as in `DepthwiseConv2d`.

    Shape:
        [N, C, H, W] -> [N, C, P, Q].

    Raises:
        TypeError, ValueError: an argument of a wrong kind or value.

    Example:
        >>> blur = effops.BlurPool2d(8)
        >>> blur.weight[0, 0] * 16
        tensor([[1., 2., 1.],
                [2., 4., 2.],
                [1., 2., 1.]])
        >>> blur(torch.randn(1, 8, 14, 14)).shape
        torch.Size([1, 8, 7, 7])
    """

    def __init__(
        self,
        channels: int,
        kernel_size: int = 3,
        stride: IntOrPair = 2,
        padding: Padding = None,
        *,
        filter: str = "binomial",
        sigma: float = 1.1,
        alternate_sign: bool = False,
        padding_mode: str = "zeros",
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        where = type(self).__name__
        check_int(where, "kernel_size", kernel_size)
        if filter not in ("binomial", "gaussian"):
            raise ValueError(f"{where}: unknown filter {filter!r}; accepted: binomial, gaussian")
        if not sigma > 0:
            raise ValueError(f"{where}: sigma must be above 0, got {sigma}")
        rows = banks.binomial(kernel_size) if filter == "binomial" else banks.gaussian(sigma, kernel_size, None)
        kernel = torch.tensor(rows, dtype=torch.float64)
        bank = torch.stack([kernel, -kernel]) if alternate_sign else kernel.unsqueeze(0)
        super().__init__(
            channels, bank, stride, padding, padding_mode=padding_mode, backend=backend, device=device, dtype=dtype
        )
        described = filter if filter == "binomial" else f"gaussian, sigma {sigma}"
        self.bank = described + (", alternating sign" if alternate_sign else "")
