"""Drop-in modules: they own ordinary sub-modules and parameters, and run them as fused kernels where that is possible.

Every module here reads its parameters on each call; nothing is cached, so in-place edits, `.data` edits, optimiser
steps and `load_state_dict` take effect at once. In eval mode a batch norm becomes the scale and shift of the kernel's
epilogue; in training its batch statistics are taken from the depthwise convolution without storing that one's result.

What cannot be fused runs as the ordinary sub-modules do; `fusion_reasons()` and the module's repr say what and why.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import effops.functional as EF
from effops.ops.dwconv import banks
from effops.ops.geometry import is_channels_last

__all__ = [
    "BlurPool2d",
    "DepthwiseConv2d",
    "DownsamplingBlock",
    "FixedFilterConv2d",
    "FusedDSConv",
    "HalfIdentityBlock",
    "SharedDepthwiseConv2d",
    "ds_conv_key_map",
]

ModuleFactory = Callable[[int], nn.Module]
ActivationLike = str | nn.Module | Callable[[], nn.Module] | None
IntOrPair = int | tuple[int, int]
Padding = int | tuple[int, int] | tuple[int, int, int, int] | str | None

_PADDING_MODES = ("zeros", "reflect", "replicate", "circular")
_HALF_TYPES = (torch.float16, torch.bfloat16)

_ACTIVATION_MODULES: dict[str, Callable[[], nn.Module]] = {
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
_ACTIVATION_NAMES = {kind: name for name, kind in _ACTIVATION_MODULES.items()}


# ---------------------------------------------------------------------------------------------------------------------
# Arguments
# ---------------------------------------------------------------------------------------------------------------------


def _check_int(where: str, name: str, value: object, least: int = 1) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{where}: {name} must be an int, got {value!r} ({type(value).__name__})")
    if value < least:
        raise ValueError(f"{where}: {name} must be at least {least}, got {value}")
    return value


def _check_pair(where: str, name: str, value: object, least: int = 1) -> tuple[int, int]:
    if isinstance(value, (tuple, list)):
        if len(value) != 2:
            raise ValueError(f"{where}: {name} must be an int or a pair (height, width), got {value!r}")
        return (_check_int(where, name, value[0], least), _check_int(where, name, value[1], least))
    element = _check_int(where, name, value, least)
    return element, element


def _check_padding(
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
        return tuple(_check_int(where, "padding", side, 0) for side in padding)
    if isinstance(padding, (tuple, list)) and len(padding) != 2:
        raise ValueError(
            f"{where}: padding must be an int, (height, width), (left, right, top, bottom), 'same', 'valid' or None, "
            f"got {padding!r}"
        )
    return _check_pair(where, "padding", padding, 0)


def _check_padding_mode(where: str, padding_mode: str) -> str:
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
        if act not in _ACTIVATION_MODULES:
            raise ValueError(
                f"{where}: unknown activation {act!r} for {name}; "
                f"accepted: {', '.join(_ACTIVATION_MODULES)}, or a module"
            )
        return _ACTIVATION_MODULES[act]()
    made = act() if callable(act) else None
    if not isinstance(made, nn.Module):
        raise TypeError(f"{where}: {name} must be an activation's name, a module, a module class or None, got {act!r}")
    return made


def _make_norm(where: str, name: str, norm: ModuleFactory | None, channels: int, factory: dict[str, Any]) -> nn.Module:
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


# ---------------------------------------------------------------------------------------------------------------------
# What a sub-module is, as far as fusing is concerned
# ---------------------------------------------------------------------------------------------------------------------


def _activation_of(module: nn.Module) -> tuple[str, float] | None:
    """(name, negative slope) of an activation that the kernels know, else None."""
    kind = type(module)
    if kind is nn.LeakyReLU:
        return "leaky_relu", module.negative_slope
    if kind is nn.GELU and module.approximate != "none":
        return None
    name = _ACTIVATION_NAMES.get(kind)
    return None if name is None else (name, 0.01)


def _tampered(module: nn.Module) -> str | None:
    """Why calling the module is not the same as reading its parameters, if so."""
    if module._forward_hooks or module._forward_pre_hooks:
        return "has forward hooks"
    if module._backward_hooks or module._backward_pre_hooks:
        return "has backward hooks"
    if "forward" in module.__dict__:
        return "has a replaced forward method"
    return None


def _why_not_conv(name: str, module: nn.Module, kinds: tuple[type, ...]) -> str | None:
    if type(module) not in kinds:
        how = " (parametrized)" if hasattr(module, "parametrizations") else ""
        return f"{name} is {type(module).__name__}{how}, not a plain {kinds[0].__name__}"
    why = _tampered(module)
    return f"{name} {why}" if why else None


def _why_not_norm(name: str, module: nn.Module) -> str | None:
    kind = type(module)
    if kind is not nn.Identity and kind is not nn.BatchNorm2d:
        return f"{name} is {kind.__name__}, not a plain BatchNorm2d"
    why = _tampered(module)
    return f"{name} {why}" if why else None


def _why_not_act(name: str, module: nn.Module) -> str | None:
    if _activation_of(module) is None:
        return f"{name} is {module!r}, which the kernels do not know"
    why = _tampered(module)
    return f"{name} {why}" if why else None


def _is_identity(module: nn.Module) -> bool:
    return type(module) is nn.Identity


# ---------------------------------------------------------------------------------------------------------------------
# Batch norm
# ---------------------------------------------------------------------------------------------------------------------


def _takes_batch_statistics(norm: nn.Module) -> bool:
    """torch's rule: in training, or where there are no running statistics."""
    return isinstance(norm, nn.BatchNorm2d) and (norm.training or norm.running_mean is None)


def _affine(norm: nn.BatchNorm2d, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
    """(scale, shift) such that norm(x) = x * scale + shift; at least float32."""
    weight, bias = norm.weight, norm.bias
    if mean.dtype in _HALF_TYPES:
        mean, var = mean.float(), var.float()
    if weight is not None and weight.dtype != mean.dtype:
        weight = weight.to(mean.dtype)
        bias = bias.to(mean.dtype)
    scale = torch.rsqrt(var + norm.eps)
    if weight is None:
        return scale, -mean * scale
    scale = weight * scale
    return scale, torch.addcmul(bias, mean, scale, value=-1)


def _check_batch_size(values_per_channel: int, shape: Sequence[int]) -> None:
    if values_per_channel == 1:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {torch.Size(shape)}")


@torch.no_grad()
def _update_running_statistics(norm: nn.BatchNorm2d, mean: Tensor, var: Tensor, count: int) -> None:
    """What torch's BatchNorm2d does to its buffers in training: unbiased variance, cumulative for momentum None."""
    if not (norm.training and norm.track_running_stats):
        return
    momentum = norm.momentum
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
        if momentum is None:
            momentum = 1.0 / float(norm.num_batches_tracked)
    if norm.running_mean is None:
        return
    momentum = 0.0 if momentum is None else momentum
    unbiased = var * (count / (count - 1))
    for running, batch in ((norm.running_mean, mean), (norm.running_var, unbiased)):
        running.mul_(1 - momentum).add_(batch.to(running.dtype), alpha=momentum)


# ---------------------------------------------------------------------------------------------------------------------
# Epilogues: filling  post_activation(activation(conv + bias) * scale + shift + residual)  from a list of stages
# ---------------------------------------------------------------------------------------------------------------------

Affine = tuple[Tensor, Tensor]
# Where each part stands in the epilogue.
_ACTIVATION_SLOT, _AFFINE_SLOT, _RESIDUAL_SLOT, _POST_SLOT = 1, 2, 3, 4


class _Stage:
    """One thing that follows a convolution: `kind` is "norm", "act" or "residual"."""

    __slots__ = ("kind", "value", "affine")

    def __init__(self, kind: str, value: nn.Module | Tensor, affine: Affine | None = None) -> None:
        self.kind = kind
        self.value = value
        self.affine = affine


def _fill_epilogue(stages: Sequence[_Stage]) -> tuple[dict[str, Any], int]:
    """Puts as many stages as fit, in order, into the epilogue of a convolution.

    Args:
        stages: norm stages carry their (scale, shift) in `affine`, or None where they cannot be fused.

    Returns:
        The keyword arguments of the functional call and how many stages they cover; torch runs the others.
    """
    epilogue: dict[str, Any] = {}
    slot, slope = 0, None
    for done, stage in enumerate(stages):
        if stage.kind == "act":
            known = None if _tampered(stage.value) else _activation_of(stage.value)
            target = _ACTIVATION_SLOT if slot < _ACTIVATION_SLOT else _POST_SLOT
            if known is None or slot >= _POST_SLOT:
                return epilogue, done
            name, own_slope = known
            if name == "none":
                continue
            if name == "leaky_relu":  # one slope serves both activations
                if slope is not None and slope != own_slope:
                    return epilogue, done
                slope = epilogue["negative_slope"] = own_slope
            epilogue["activation" if target == _ACTIVATION_SLOT else "post_activation"] = name
            slot = target
        elif stage.kind == "norm":
            if _is_identity(stage.value) and not _tampered(stage.value):
                continue
            if stage.affine is None or slot >= _AFFINE_SLOT:
                return epilogue, done
            epilogue["scale"], epilogue["shift"] = stage.affine
            slot = _AFFINE_SLOT
        else:
            if slot >= _RESIDUAL_SLOT or not _residual_fuses(stage.value):
                return epilogue, done
            epilogue["residual"] = stage.value
            slot = _RESIDUAL_SLOT
    return epilogue, len(stages)


def _residual_fuses(residual: Tensor) -> bool:
    """Under autocast torch's addition promotes a float32 residual to a float32 result; the kernel would not."""
    device = residual.device.type
    return not torch.is_autocast_enabled(device) or residual.dtype == torch.get_autocast_dtype(device)


def _run_stages(output: Tensor, stages: Iterable[_Stage]) -> Tensor:
    for stage in stages:
        output = output + stage.value if stage.kind == "residual" else stage.value(output)
    return output


def _norm_stage(norm: nn.Module) -> _Stage:
    """A norm stage that is fused where the norm is a plain BatchNorm2d on running statistics."""
    affine = None
    if type(norm) is nn.BatchNorm2d and not _takes_batch_statistics(norm) and not _tampered(norm):
        affine = _affine(norm, norm.running_mean, norm.running_var)
    return _Stage("norm", norm, affine)


# ---------------------------------------------------------------------------------------------------------------------
# Single depthwise convolutions
# ---------------------------------------------------------------------------------------------------------------------


class DepthwiseConv2d(nn.Conv2d):
    """y[n, c*m + j] = conv(x[n, c], weight[c*m + j]) + bias[c*m + j]: a depthwise `nn.Conv2d` on effops kernels.

    Parameters, state dict and initialisation are those of `nn.Conv2d(channels, channels * m, ..., groups=channels)`.

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
        _check_int(where, "channels", channels)
        _check_int(where, "depth_multiplier", depth_multiplier)
        kernel = _check_pair(where, "kernel_size", kernel_size)
        dilation = _check_pair(where, "dilation", dilation)
        padding = _check_padding(where, padding, kernel, dilation)
        if len(padding) == 4 and not isinstance(padding, str):
            raise ValueError(f"{where}: uneven padding {padding} is not supported here; use F.pad and padding=0")
        super().__init__(
            channels,
            channels * depth_multiplier,
            kernel,
            _check_pair(where, "stride", stride),
            padding,
            dilation,
            channels,
            bias,
            _check_padding_mode(where, padding_mode),
            device,
            dtype,
        )
        self.backend = backend

    def forward(self, input: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, C * m, P, Q]."""
        input, padding = _pad_for(self, input)
        return EF.depthwise_conv2d(
            input, self.weight, self.bias, self.stride, padding, self.dilation, backend=self.backend
        )


def _pad_for(conv: nn.Module, input: Tensor) -> tuple[Tensor, str | tuple[int, ...]]:
    """Applies a padding mode that the kernels do not have; returns the padding left for the kernel."""
    if conv.padding_mode == "zeros":
        return input, conv.padding
    padded = F.pad(input, conv._reversed_padding_repeated_twice, mode=conv.padding_mode)
    if is_channels_last(input):  # torch's circular padding forgets the format
        padded = padded.contiguous(memory_format=torch.channels_last)
    return padded, (0, 0)


def _kernels(conv: nn.Module) -> Tensor:
    """The depthwise weight as the functional layer takes it: [K, 1, kh, kw] learned, [K, kh, kw] a repeated bank."""
    return conv.weight.squeeze(1) if isinstance(conv, _BankConv2d) else conv.weight


class _BankConv2d(nn.Module):
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
        self.channels = self.in_channels = self.out_channels = _check_int(where, "channels", channels)
        self.kernel_size = kernel_size
        self.stride = _check_pair(where, "stride", stride)
        self.dilation = _check_pair(where, "dilation", dilation)
        self.padding = _check_padding(where, padding, kernel_size, self.dilation)
        self.padding_mode = _check_padding_mode(where, padding_mode)
        if self.padding_mode != "zeros" and isinstance(self.padding, str):
            raise ValueError(f"{where}: padding={self.padding!r} needs padding_mode='zeros', got {padding_mode!r}")
        self.backend = backend

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


class SharedDepthwiseConv2d(_BankConv2d):
    """y[n, c] = conv(x[n, c], weight[c mod (C / share)]) + bias[c]: one learned bank for `share` chunks of channels.

    The gradient of a kernel is the sum over its uses. VGNet's last depthwise convolution (arXiv 2207.10318, section 4)
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
        kernel = _check_pair(where, "kernel_size", kernel_size)
        super().__init__(channels, kernel, stride, padding, dilation, padding_mode, backend)
        self.share = _check_int(where, "share", share)
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
        input, padding = _pad_for(self, input)
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


class FixedFilterConv2d(_BankConv2d):
    """y[n, c] = conv(x[n, c], bank[c mod K]): a depthwise convolution with constant kernels.

    The bank is a buffer named `weight`, [K, 1, kh, kw]: it moves with the module and is in its state dict, but has no
    gradient. The named banks are VGNet's (arXiv 2207.10318, appendix D), a blur and BlurPool's.

    Args:
        channels: C.
        bank: a name ("vgnet8", "vgnet4", "vgnet_blur", "vgnet_blur_alternate", "binomial3", "binomial5") or constants
            [K, kh, kw].
        stride, padding, dilation, padding_mode, backend: as in `SharedDepthwiseConv2d`.

    Shape:
        [N, C, H, W] -> [N, C, P, Q].

    Raises:
        TypeError, ValueError: an argument of a wrong kind or value.
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

    def forward(self, input: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, C, P, Q]."""
        input, padding = _pad_for(self, input)
        return EF.fixed_filter_conv2d(input, _kernels(self), self.stride, padding, self.dilation, backend=self.backend)

    def extra_repr(self) -> str:
        return super().extra_repr() + f", bank={self.bank!r}"


class BlurPool2d(FixedFilterConv2d):
    """Anti-aliased downsampling: y = depthwise_conv2d(x, blur, stride), zero padding.

    Zhang, "Making Convolutional Networks Shift-Invariant Again" (arXiv 1904.11486) uses the binomial filter.

    Args:
        channels: C.
        kernel_size: edge length of the square filter.
        stride: int or (height, width).
        padding: as in `DepthwiseConv2d`; an even kernel_size needs it given.
        filter: "binomial" or "gaussian".
        sigma: standard deviation of the Gaussian, in pixels.
        alternate_sign: odd channels get the negated filter.

    Shape:
        [N, C, H, W] -> [N, C, P, Q].

    Raises:
        TypeError, ValueError: an argument of a wrong kind or value.
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
        _check_int(where, "kernel_size", kernel_size)
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


# ---------------------------------------------------------------------------------------------------------------------
# Depthwise then pointwise
# ---------------------------------------------------------------------------------------------------------------------

_DW_KINDS = (nn.Conv2d, DepthwiseConv2d, SharedDepthwiseConv2d, FixedFilterConv2d, BlurPool2d)
_PW_KINDS = (nn.Conv2d,)

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
        >>> ds_conv_key_map(["0.weight", "1.weight", "1.bias", "3.weight"], ["dw", "dw_norm", "pw"])
        {'0.weight': 'dw.weight', '1.weight': 'dw_norm.weight', '1.bias': 'dw_norm.bias', '3.weight': 'pw.weight'}
    """
    paths = {key: key.rpartition(".")[0] for key in keys}
    named = {path: _TIMM_KEYS[path] for path in paths.values() if path in _TIMM_KEYS}
    numeric = {path: match[1] for path in set(paths.values()) if (match := _NUMERIC_PATH.fullmatch(path))}
    if len(numeric) == len(slots):
        by_order = sorted(numeric, key=lambda path: [int(part) for part in numeric[path].split(".")])
        named.update(zip(by_order, slots, strict=True))
    return {key: named[path] + key[len(path) :] for key, path in paths.items() if path in named}


def rename_keys(state_dict: dict[str, Any], prefix: str, mapping: Mapping[str, str]) -> None:
    """Renames prefix + old to prefix + new in place; a key whose new name is taken already stays."""
    for old, new in mapping.items():
        if prefix + new not in state_dict:
            state_dict[prefix + new] = state_dict.pop(prefix + old)


class _FusedBlock(nn.Module):
    """What the blocks that end in a pointwise convolution share: reasons, repr, the fused and the unfused path."""

    backend: str
    # (sub-module, the check that applies) of the part that must fuse as a whole and of the part that may follow.
    _head: tuple[tuple[str, Callable[[str, nn.Module], str | None]], ...]
    _tail: tuple[tuple[str, Callable[[str, nn.Module], str | None]], ...]

    def fusion_reasons(self) -> tuple[str, ...]:
        """Why the sub-modules are not, or not all, run as one kernel; empty where they are.

        A reason that concerns dw, dw_norm, dw_act or pw makes the block call its sub-modules one by one. A reason that
        concerns norm, act or post_act leaves the convolutions fused and calls that module, and those after it, behind.
        """
        reasons = [check(name, getattr(self, name)) for name, check in (*self._head, *self._tail)]
        return tuple(reason for reason in reasons if reason)

    def _fuses(self) -> bool:
        return all(check(name, self._modules[name]) is None for name, check in self._head)

    def extra_repr(self) -> str:
        text = [] if self.backend == "auto" else [f"backend={self.backend!r}"]
        reasons = self.fusion_reasons()
        if reasons:
            text.append(f"not fused: {'; '.join(reasons)}")
        return ", ".join(text)


def _why_not_dw(name: str, module: nn.Module) -> str | None:
    return _why_not_conv(name, module, _DW_KINDS)


def _why_not_pw(name: str, module: nn.Module) -> str | None:
    return _why_not_conv(name, module, _PW_KINDS)


class FusedDSConv(_FusedBlock):
    """A depthwise convolution, a pointwise one and what follows each, as one kernel.

        z = dw_act(dw_norm(dw(x)))                 or, with norm_first=False,   dw_norm(dw_act(dw(x)))
        y = post_act(act(norm(pw(z))) [+ x])       or                            post_act(norm(act(pw(z))) [+ x])

    The sub-modules dw, dw_norm, dw_act, pw, norm, act and post_act are ordinary modules (nn.Identity where absent). In
    eval mode everything is one kernel and z never goes to memory. In training a batch norm between the convolutions
    takes its statistics from the first one without storing its result (or stores it once where that is estimated to be
    cheaper); a trailing batch norm runs as torch's on the kernel's output. MobileNets (arXiv 1704.04861, section 3.1)
    have norm_first; VGNet (arXiv 2207.10318) and "Nuts & Bolts" normalise after the activation.

    `load_state_dict` accepts the keys of the `nn.Sequential` that this module replaces and those of timm's and
    torchvision's blocks: `ds_conv_key_map`.

    Args:
        in_channels: C.
        out_channels: K.
        kernel_size: of the depthwise convolution, int or (height, width).
        stride: of the depthwise convolution.
        padding: int, (height, width), (left, right, top, bottom), 'same', 'valid', or None for (k - 1) // 2 * dilation
            (odd kernels).
        dilation: of the depthwise convolution.
        bias: the pointwise convolution gets a bias.
        depth_multiplier: depthwise output channels per input channel.
        dw_bias: the depthwise convolution gets a bias.
        dw_norm, norm: None or a factory called with the channel count, such as `nn.BatchNorm2d`.
        dw_act, act, post_act: None, the name of an activation (none, relu, relu6, leaky_relu, silu, hardswish,
            hardsigmoid, sigmoid, gelu), a module, or a module class.
        norm_first: conv-norm-act, or conv-act-norm where False; holds for both convolutions.
        residual: adds the input; needs in_channels == out_channels and unchanged height and width.
        padding_mode: 'zeros', 'reflect', 'replicate' or 'circular'.
        backend: as in `effops.functional`.

    Shape:
        [N, C, H, W] -> [N, K, P, Q].

    Raises:
        TypeError, ValueError: an argument of a wrong kind or value, or residual where the shape changes.
    """

    _head = (("dw", _why_not_dw), ("dw_norm", _why_not_norm), ("dw_act", _why_not_act), ("pw", _why_not_pw))
    _tail = (("norm", _why_not_norm), ("act", _why_not_act), ("post_act", _why_not_act))

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: IntOrPair = 3,
        stride: IntOrPair = 1,
        padding: Padding = None,
        dilation: IntOrPair = 1,
        bias: bool = False,
        *,
        depth_multiplier: int = 1,
        dw_bias: bool = False,
        dw_norm: ModuleFactory | None = None,
        dw_act: ActivationLike = None,
        norm: ModuleFactory | None = None,
        act: ActivationLike = None,
        norm_first: bool = True,
        residual: bool = False,
        post_act: ActivationLike = None,
        padding_mode: str = "zeros",
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        where = type(self).__name__
        factory = {"device": device, "dtype": dtype}
        for name, value in (("in_channels", in_channels), ("out_channels", out_channels)):
            _check_int(where, name, value)
        mid = in_channels * _check_int(where, "depth_multiplier", depth_multiplier)
        kernel = _check_pair(where, "kernel_size", kernel_size)
        stride = _check_pair(where, "stride", stride)
        dilation = _check_pair(where, "dilation", dilation)
        padding = _check_padding(where, padding, kernel, dilation)
        uneven = padding if isinstance(padding, tuple) and len(padding) == 4 else None
        _check_padding_mode(where, padding_mode)
        if uneven and padding_mode != "zeros":
            raise ValueError(f"{where}: uneven padding {uneven} needs padding_mode='zeros', got {padding_mode!r}")
        if padding == "same" and stride != (1, 1):
            raise ValueError(f"{where}: padding='same' needs stride 1, got {stride}; give the padding as numbers")
        dw = nn.Conv2d(
            in_channels,
            mid,
            kernel,
            stride,
            0 if uneven else padding,
            dilation,
            in_channels,
            dw_bias,
            padding_mode,
            **factory,
        )
        self._assemble(
            dw,
            nn.Conv2d(mid, out_channels, 1, bias=bias, **factory),
            _make_norm(where, "dw_norm", dw_norm, mid, factory),
            make_activation(where, "dw_act", dw_act),
            _make_norm(where, "norm", norm, out_channels, factory),
            make_activation(where, "act", act),
            make_activation(where, "post_act", post_act),
            norm_first,
            residual,
            backend,
            uneven,
        )

    @classmethod
    def from_modules(
        cls,
        dw: nn.Module,
        pw: nn.Conv2d,
        dw_norm: nn.Module | None = None,
        dw_act: nn.Module | str | None = None,
        norm: nn.Module | None = None,
        act: nn.Module | str | None = None,
        *,
        norm_first: bool = True,
        residual: bool = False,
        post_act: nn.Module | str | None = None,
        backend: str = "auto",
    ) -> FusedDSConv:
        """A `FusedDSConv` made of the given modules themselves: parameters and buffers are shared, not copied.

        Args:
            dw: an `nn.Conv2d` with groups == in_channels, or one of effops' depthwise convolutions.
            pw: an `nn.Conv2d` with kernel 1x1, stride 1, no padding and one group.
            dw_norm, norm: modules or None.
            dw_act, act, post_act: modules, activation names or None.
            norm_first, residual, backend: as in the constructor.

        Returns:
            The module, in the training mode that `dw` is in.

        Raises:
            TypeError: a module of a wrong kind.
            ValueError: a dw that is not depthwise, a pw that is not 1x1, channels that do not fit.
        """
        _check_pair_of_convolutions(cls.__name__, dw, pw)
        for name, norm_module in (("dw_norm", dw_norm), ("norm", norm)):
            if norm_module is not None and not isinstance(norm_module, nn.Module):
                raise TypeError(f"{cls.__name__}.from_modules: {name} must be a module or None, got {norm_module!r}")
        _check_norm_channels(cls.__name__, "dw_norm", dw_norm, dw.out_channels)
        _check_norm_channels(cls.__name__, "norm", norm, pw.out_channels)
        made = cls.__new__(cls)
        nn.Module.__init__(made)
        made._assemble(
            dw,
            pw,
            nn.Identity() if dw_norm is None else dw_norm,
            make_activation(cls.__name__, "dw_act", dw_act),
            nn.Identity() if norm is None else norm,
            make_activation(cls.__name__, "act", act),
            make_activation(cls.__name__, "post_act", post_act),
            norm_first,
            residual,
            backend,
            None,
        )
        made.training = dw.training
        return made

    def _assemble(
        self,
        dw: nn.Module,
        pw: nn.Module,
        dw_norm: nn.Module,
        dw_act: nn.Module,
        norm: nn.Module,
        act: nn.Module,
        post_act: nn.Module,
        norm_first: bool,
        residual: bool,
        backend: str,
        uneven_padding: tuple[int, ...] | None,
    ) -> None:
        self.dw, self.dw_norm, self.dw_act = dw, dw_norm, dw_act
        self.pw, self.norm, self.act, self.post_act = pw, norm, act, post_act
        self.norm_first = norm_first
        self.residual = residual
        self.backend = backend
        self.uneven_padding = uneven_padding
        if residual:
            self._check_residual()

    def _check_residual(self) -> None:
        where = f"{type(self).__name__}: residual=True"
        if self.dw.in_channels != self.pw.out_channels:
            raise ValueError(
                f"{where} needs in_channels == out_channels, got {self.dw.in_channels} and {self.pw.out_channels}"
            )
        if tuple(self.dw.stride) != (1, 1):
            raise ValueError(f"{where} needs stride 1, got {self.dw.stride}")
        left, right, top, bottom = self._padding_sides()
        grown = (
            (top + bottom - self.dw.dilation[0] * (self.dw.kernel_size[0] - 1)),
            (left + right - self.dw.dilation[1] * (self.dw.kernel_size[1] - 1)),
        )
        if grown != (0, 0):
            raise ValueError(f"{where} needs a padding that keeps height and width; they change by {grown}")

    def _padding_sides(self) -> tuple[int, int, int, int]:
        """(left, right, top, bottom)."""
        padding = self.uneven_padding or self.dw.padding
        if padding == "valid":
            return 0, 0, 0, 0
        if padding == "same":
            rows, columns = (d * (k - 1) for d, k in zip(self.dw.dilation, self.dw.kernel_size, strict=True))
            return columns, 0, rows, 0  # only the sums matter here
        if len(padding) == 4:
            return padding
        return padding[1], padding[1], padding[0], padding[0]

    # -- running ------------------------------------------------------------------------------------------------------

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """[N, C, H, W] -> [N, K, P, Q].

        Args:
            input: [N, C, H, W].
            residual: [N, K, P, Q], added before post_act: an inverted residual block's own input, say. Not together
                with `residual=True`, which adds `input`.

        Raises:
            ValueError: residual given although the module adds its input already; one value per channel in training.
        """
        if self.residual:
            if residual is not None:
                raise ValueError(f"{type(self).__name__}: residual given, but residual=True already adds the input")
            residual = input
        empty = input.shape[0] == 0 and _takes_batch_statistics(self.dw_norm)  # no statistics; torch lets it pass
        if empty or not self._fuses():
            return self._forward_unfused(input, residual)
        operands, dw_arguments = self._dw_arguments(input)
        stages = self._tail_stages(residual)
        epilogue, fused = _fill_epilogue(stages)
        output = EF.ds_conv2d(
            operands[0],
            operands[1],
            self.pw.weight,
            operands[2],
            self.pw.bias,
            *operands[3:],
            **dw_arguments,
            **epilogue,
            backend=self.backend,
        )
        return _run_stages(output, stages[fused:])

    def _forward_unfused(self, input: Tensor, residual: Tensor | None) -> Tensor:
        """The sub-modules, one by one."""
        if self.uneven_padding:
            input = F.pad(input, self.uneven_padding)
        z = self.dw(input)
        z = self.dw_act(self.dw_norm(z)) if self.norm_first else self.dw_norm(self.dw_act(z))
        y = self.pw(z)
        y = self.act(self.norm(y)) if self.norm_first else self.norm(self.act(y))
        return self.post_act(y if residual is None else y + residual)

    def _tail_stages(self, residual: Tensor | None) -> list[_Stage]:
        norm, act = _norm_stage(self.norm), _Stage("act", self.act)
        stages = [norm, act] if self.norm_first else [act, norm]
        if residual is not None:
            stages.append(_Stage("residual", residual))
        stages.append(_Stage("act", self.post_act))
        return stages

    def _dw_arguments(self, input: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """((input, dw weight, dw bias, stride, padding, dilation), dw_ keywords) of the fused call."""
        dw = self.dw
        input, padding = _pad_for(dw, input)
        operands = (input, _kernels(dw), dw.bias, dw.stride, self.uneven_padding or padding, dw.dilation)
        act = _Stage("act", self.dw_act)
        if not _takes_batch_statistics(self.dw_norm):
            norm = _norm_stage(self.dw_norm)
        else:
            # The statistics of an activated result need that result: it is stored.
            ahead = {} if self.norm_first else _fill_epilogue([act])[0]
            if ahead or self._store_intermediate(input):
                stored = EF.depthwise_conv2d(*operands, **ahead, backend=self.backend)
                norm = _Stage("norm", self.dw_norm, self._statistics_of(stored))
                identity = stored.new_ones(stored.shape[1], 1, 1, 1)
                operands = (stored, identity, None, (1, 1), (0, 0), (1, 1))
                act = _Stage("act", nn.Identity()) if ahead else act
            else:
                norm = _Stage("norm", self.dw_norm, self._statistics(operands))
        epilogue, _ = _fill_epilogue([norm, act] if self.norm_first else [act, norm])
        return operands, {f"dw_{name}": value for name, value in epilogue.items()}

    def _store_intermediate(self, input: Tensor) -> bool:
        """Whether, in training with batch statistics in between, the depthwise result is stored once or computed twice.

        Counted in bytes moved, forward: computing twice reads the input twice. Storing reads the input once, writes the
        result, and reads it twice (statistics, then the fused convolution). A kernel tap costs about as much as 1/4
        byte of traffic per output value (one 16-lane FMA, against some 10 bytes a nanosecond and core).
        """
        kernel_h, kernel_w = self.dw.kernel_size
        stride_h, stride_w = self.dw.stride
        outputs_per_input = self.dw.out_channels / self.dw.in_channels / (stride_h * stride_w)
        width = input.element_size()
        compute = outputs_per_input * kernel_h * kernel_w / 4
        twice = 2 * (width + compute)
        once = width + compute + 3 * width * outputs_per_input
        return once < twice

    def _statistics(self, operands: tuple[Any, ...]) -> Affine:
        """The affine form of dw_norm on this batch, without the depthwise result in memory."""
        input = operands[0]
        height, width = self._output_size(input)
        count = input.shape[0] * height * width
        _check_batch_size(count, (input.shape[0], self.dw.out_channels, height, width))
        mean, var = EF.depthwise_stats2d(*operands, backend=self.backend)
        return self._track(mean, var, count)

    def _statistics_of(self, stored: Tensor) -> Affine:
        """The affine form of dw_norm on this batch, from the stored depthwise result."""
        count = stored.numel() // max(stored.shape[1], 1)
        _check_batch_size(count, stored.shape)
        wide = stored.float() if stored.dtype in _HALF_TYPES else stored
        var, mean = torch.var_mean(wide, dim=(0, 2, 3), correction=0)
        return self._track(mean, var, count)

    def _track(self, mean: Tensor, var: Tensor, count: int) -> Affine:
        _update_running_statistics(self.dw_norm, mean, var, count)
        return _affine(self.dw_norm, mean, var)

    def _output_size(self, input: Tensor) -> tuple[int, int]:
        """(P, Q) of the depthwise convolution of an input whose padding_mode has been applied already."""
        left, right, top, bottom = self._padding_sides() if self.dw.padding_mode == "zeros" else (0, 0, 0, 0)
        (kernel_h, kernel_w), (dilation_h, dilation_w) = self.dw.kernel_size, self.dw.dilation
        height = input.shape[2] + top + bottom - dilation_h * (kernel_h - 1) - 1
        width = input.shape[3] + left + right - dilation_w * (kernel_w - 1) - 1
        return height // self.dw.stride[0] + 1, width // self.dw.stride[1] + 1

    # -- state and text -----------------------------------------------------------------------------------------------

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        first = ("dw", "dw_norm", "dw_act") if self.norm_first else ("dw", "dw_act", "dw_norm")
        second = ("pw", "norm", "act") if self.norm_first else ("pw", "act", "norm")
        slots = [name for name in (*first, *second, "post_act") if self._modules[name].state_dict()]
        keys = [key[len(prefix) :] for key in state_dict if key.startswith(prefix)]
        rename_keys(state_dict, prefix, ds_conv_key_map(keys, slots))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        text = [f"norm_first={self.norm_first}", f"residual={self.residual}"]
        if self.uneven_padding:
            text.append(f"padding={self.uneven_padding}")
        return ", ".join([*text, *filter(None, [super().extra_repr()])])


def _check_pair_of_convolutions(where: str, dw: nn.Module, pw: nn.Module) -> None:
    if not isinstance(dw, (nn.Conv2d, _BankConv2d)):
        raise TypeError(f"{where}.from_modules: dw must be an nn.Conv2d or a depthwise module of effops, got {dw!r}")
    if not isinstance(pw, nn.Conv2d):
        raise TypeError(f"{where}.from_modules: pw must be an nn.Conv2d, got {pw!r}")
    if isinstance(dw, nn.Conv2d) and (dw.groups != dw.in_channels or dw.out_channels % dw.in_channels):
        raise ValueError(
            f"{where}.from_modules: dw must be depthwise (groups == in_channels), got groups={dw.groups}, "
            f"in_channels={dw.in_channels}, out_channels={dw.out_channels}"
        )
    pointwise = pw.kernel_size == (1, 1) and pw.stride == (1, 1) and pw.groups == 1
    if not pointwise or pw.padding not in ((0, 0), "same", "valid"):
        raise ValueError(
            f"{where}.from_modules: pw must have kernel 1x1, stride 1, padding 0 and one group, got {pw!r}"
        )
    if dw.out_channels != pw.in_channels:
        raise ValueError(
            f"{where}.from_modules: dw gives {dw.out_channels} channels, pw takes {pw.in_channels}; they must be equal"
        )


def _check_norm_channels(where: str, name: str, norm: nn.Module | None, channels: int) -> None:
    if isinstance(norm, _BatchNorm) and norm.num_features != channels:
        raise ValueError(
            f"{where}.from_modules: {name} has {norm.num_features} features, its input {channels} channels"
        )


# ---------------------------------------------------------------------------------------------------------------------
# VGNet
# ---------------------------------------------------------------------------------------------------------------------

Pair = tuple[Tensor, Tensor]


def _as_pair_state(where: str, state: object) -> Pair:
    if isinstance(state, (tuple, list)) and len(state) == 2 and all(isinstance(half, Tensor) for half in state):
        return state[0], state[1]
    raise TypeError(f"{where}: the input must be a pair (left, right) of tensors, got {type(state).__name__}")


class HalfIdentityBlock(_FusedBlock):
    """(L, R) -> (R, norm(act(pw(cat[L, dw(R)])))): VGNet's half-identity block (arXiv 2207.10318, section 4).

    Half of the channels go through a depthwise convolution, the others through nothing; the pointwise convolution reads
    both where they lie, so neither the concatenation nor the depthwise result goes to memory.

    Args:
        channels: of both halves together; even.
        kernel_size: of the depthwise convolution, odd.
        norm: None or a factory called with channels / 2, such as `nn.BatchNorm2d`.
        act: as in `FusedDSConv`.
        backend: as in `effops.functional`.

    Shape:
        pair of [N, channels / 2, H, W] -> pair of [N, channels / 2, H, W].

    Raises:
        TypeError, ValueError: an argument of a wrong kind or value; odd channels.
    """

    _head = (("dw", _why_not_dw), ("pw", _why_not_pw))
    _tail = (("act", _why_not_act), ("norm", _why_not_norm))

    def __init__(
        self,
        channels: int,
        kernel_size: IntOrPair = 3,
        *,
        norm: ModuleFactory | None = nn.BatchNorm2d,
        act: ActivationLike = "relu",
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        where = type(self).__name__
        if _check_int(where, "channels", channels) % 2:
            raise ValueError(f"{where}: channels must be even, got {channels}")
        kernel = _check_pair(where, "kernel_size", kernel_size)
        padding = _check_padding(where, None, kernel, (1, 1))
        factory = {"device": device, "dtype": dtype}
        half = channels // 2
        self.dw = nn.Conv2d(half, half, kernel, padding=padding, groups=half, bias=False, **factory)
        self.pw = nn.Conv2d(channels, half, 1, bias=False, **factory)
        self.act = make_activation(where, "act", act)
        self.norm = _make_norm(where, "norm", norm, half, factory)
        self.backend = backend

    def forward(self, state: Pair) -> Pair:
        """(left, right) -> (right, new)."""
        left, right = _as_pair_state(type(self).__name__, state)
        if not self._fuses():
            return self._forward_unfused(left, right)
        dw, pw = self.dw, self.pw
        stages = [_Stage("act", self.act), _norm_stage(self.norm)]
        epilogue, fused = _fill_epilogue(stages)
        right, new = EF.half_identity2d(
            left, right, dw.weight, pw.weight, dw.bias, pw.bias, dw.padding, **epilogue, backend=self.backend
        )
        return right, _run_stages(new, stages[fused:])

    def _forward_unfused(self, left: Tensor, right: Tensor) -> Pair:
        return right, self.norm(self.act(self.pw(torch.cat([left, self.dw(right)], 1))))


class DownsamplingBlock(_FusedBlock):
    """x -> halves of cat[y[-keep:], norm(act(pw(y)))], y = dw(x): VGNet's downsampling (arXiv 2207.10318, section 4).

    keep = min(out_channels // 2, in_channels), 0 where in_channels > out_channels: the last channels of the depthwise
    result are kept as they are, the pointwise convolution makes the others. The kernel writes both into one tensor.

    Args:
        in_channels: C.
        out_channels: of both halves together; even.
        stride: of the depthwise convolution.
        blur: a fixed Gaussian as the depthwise convolution, or a learned 3x3; None is True unless stride is 1 (VGNet).
        sigma: of the Gaussian, rounded to 4 decimals as VGNet's authors print it.
        alternate_sign: odd channels get the negated Gaussian (the code of VGNet's first release).
        norm, act, backend: as in `HalfIdentityBlock`.

    Shape:
        [N, C, H, W], or a pair of halves of it, -> pair of [N, out_channels / 2, P, Q].

    Raises:
        TypeError, ValueError: an argument of a wrong kind or value; odd out_channels.
    """

    _head = (("dw", _why_not_dw), ("pw", _why_not_pw))
    _tail = (("act", _why_not_act), ("norm", _why_not_norm))
    _fixed_filter: type[FixedFilterConv2d] = FixedFilterConv2d

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: IntOrPair = 2,
        *,
        blur: bool | None = None,
        sigma: float = 1.1,
        alternate_sign: bool = False,
        norm: ModuleFactory | None = nn.BatchNorm2d,
        act: ActivationLike = "relu",
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        where = type(self).__name__
        _check_int(where, "in_channels", in_channels)
        if _check_int(where, "out_channels", out_channels) % 2:
            raise ValueError(f"{where}: out_channels must be even, got {out_channels}")
        stride = _check_pair(where, "stride", stride)
        factory = {"device": device, "dtype": dtype}
        self.keep = 0 if in_channels > out_channels else min(out_channels // 2, in_channels)
        if stride != (1, 1) if blur is None else blur:
            blur_kernel = torch.tensor(banks.gaussian(sigma), dtype=torch.float64)
            bank = torch.stack([blur_kernel, -blur_kernel]) if alternate_sign else blur_kernel.unsqueeze(0)
            self.dw = self._fixed_filter(in_channels, bank, stride, **factory)
        else:
            self.dw = nn.Conv2d(in_channels, in_channels, 3, stride, 1, groups=in_channels, bias=False, **factory)
        new = out_channels - self.keep
        self.pw = nn.Conv2d(in_channels, new, 1, bias=False, **factory)
        self.act = make_activation(where, "act", act)
        self.norm = _make_norm(where, "norm", norm, new, factory)
        self.backend = backend

    def forward(self, input: Tensor | Pair) -> Pair:
        """[N, C, H, W], or (left, right), -> (left, right)."""
        if not isinstance(input, Tensor):
            input = torch.cat(_as_pair_state(type(self).__name__, input), 1)
        if not self._fuses():
            return self._forward_unfused(input)
        dw, pw = self.dw, self.pw
        stages = [_Stage("act", self.act), _norm_stage(self.norm)]
        epilogue, fused = _fill_epilogue(stages)
        output = EF.downsampling2d(
            input,
            _kernels(dw),
            pw.weight,
            dw.bias,
            pw.bias,
            dw.stride,
            dw.padding,
            keep=self.keep,
            **epilogue,
            backend=self.backend,
        )
        if fused == len(stages):
            return output.chunk(2, 1)
        kept, new = output[:, : self.keep], output[:, self.keep :]
        return self._halves(kept, _run_stages(new, stages[fused:]))

    def _forward_unfused(self, input: Tensor) -> Pair:
        y = self.dw(input)
        return self._halves(y[:, y.shape[1] - self.keep :], self.norm(self.act(self.pw(y))))

    @staticmethod
    def _halves(kept: Tensor, new: Tensor) -> Pair:
        """cat[kept, new] cut in two; equal halves need no concatenation."""
        if kept.shape[1] == new.shape[1]:
            return kept, new
        return torch.cat([kept, new], 1).chunk(2, 1)

    def extra_repr(self) -> str:
        return ", ".join([f"keep={self.keep}", *filter(None, [super().extra_repr()])])
