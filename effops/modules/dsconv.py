"""A depthwise convolution, a pointwise one and what follows each, as one kernel."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import effops.functional as EF
from effops.modules._arguments import (
    ActivationLike,
    IntOrPair,
    ModuleFactory,
    Padding,
    check_int,
    check_padding,
    check_padding_mode,
    check_pair,
    make_activation,
    make_norm,
)
from effops.modules._fusion import (
    ResidualBlock,
    Stage,
    fill_epilogue,
    last_norm_stage,
    norm_stage,
    run_stages,
    why_not_act,
    why_not_dw,
    why_not_norm,
    why_not_pw,
)
from effops.modules._keys import ds_conv_key_map, rename_keys
from effops.modules._norms import (
    HALF_TYPES,
    Affine,
    affine_of,
    check_batch_size,
    takes_batch_statistics,
    update_running_statistics,
)
from effops.modules.dwconv import BankConv2d, kernels_of, pad_for


class FusedDSConv(ResidualBlock):
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

    Example:
        >>> bn, x = nn.BatchNorm2d, torch.randn(1, 16, 9, 9)
        >>> dw, pw = nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False), nn.Conv2d(16, 32, 1, bias=False)
        >>> stock = nn.Sequential(dw, bn(16), nn.ReLU6(), pw, bn(32), nn.ReLU6()).eval()
        >>> fused = effops.FusedDSConv(16, 32, dw_norm=bn, dw_act="relu6", norm=bn, act="relu6").eval()
        >>> fused.load_state_dict(stock.state_dict())
        <All keys matched successfully>
        >>> torch.allclose(fused(x), stock(x), atol=1e-5)
        True
    """

    _head = (("dw", why_not_dw), ("dw_norm", why_not_norm), ("dw_act", why_not_act), ("pw", why_not_pw))

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
            check_int(where, name, value)
        mid = in_channels * check_int(where, "depth_multiplier", depth_multiplier)
        kernel = check_pair(where, "kernel_size", kernel_size)
        stride = check_pair(where, "stride", stride)
        dilation = check_pair(where, "dilation", dilation)
        padding = check_padding(where, padding, kernel, dilation)
        uneven = padding if isinstance(padding, tuple) and len(padding) == 4 else None
        check_padding_mode(where, padding_mode)
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
            make_norm(where, "dw_norm", dw_norm, mid, factory),
            make_activation(where, "dw_act", dw_act),
            make_norm(where, "norm", norm, out_channels, factory),
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

        Example:
            >>> dw, pw = nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.Conv2d(16, 32, 1)
            >>> fused = effops.FusedDSConv.from_modules(dw, pw, act="silu")
            >>> fused.dw is dw, fused(torch.randn(1, 16, 9, 9)).shape
            (True, torch.Size([1, 32, 9, 9]))
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

    def _input_channels(self) -> int:
        return self.dw.in_channels

    def _output_channels(self) -> int:
        return self.pw.out_channels

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
        return self._run(input, self._residual_of(input, residual))

    def _run(self, input: Tensor, residual: Tensor | None) -> Tensor:
        empty = input.shape[0] == 0 and takes_batch_statistics(self.dw_norm)  # no statistics; torch lets it pass
        if empty or not self._fuses():
            return self._forward_unfused(input, residual)
        operands, dw_arguments = self._dw_arguments(input)
        stages = self._tail_stages(residual)
        epilogue, fused = fill_epilogue(stages)
        pw = self._modules["pw"]
        output = EF.ds_conv2d(
            operands[0],
            operands[1],
            pw.weight,
            operands[2],
            pw.bias,
            *operands[3:],
            **dw_arguments,
            **epilogue,
            backend=self.backend,
        )
        return run_stages(output, stages[fused:])

    def _forward_unfused(self, input: Tensor, residual: Tensor | None) -> Tensor:
        """The sub-modules, one by one."""
        if self.uneven_padding:
            input = F.pad(input, self.uneven_padding)
        z = self.dw(input)
        z = self.dw_act(self.dw_norm(z)) if self.norm_first else self.dw_norm(self.dw_act(z))
        return self._run_behind(self.pw(z), residual)

    def _tail_stages(self, residual: Tensor | None) -> list[Stage]:
        return self._stages_behind(last_norm_stage(self._modules["norm"], self.backend), residual)

    def _dw_arguments(self, input: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """((input, dw weight, dw bias, stride, padding, dilation), dw_ keywords) of the fused call."""
        parts = self._modules
        dw, dw_norm = parts["dw"], parts["dw_norm"]
        input, padding = pad_for(dw, input)
        operands = (input, kernels_of(dw), dw.bias, dw.stride, self.uneven_padding or padding, dw.dilation)
        norm, act = norm_stage(dw_norm, self.backend), Stage("act", parts["dw_act"])
        if norm.affine is None and takes_batch_statistics(dw_norm):
            # The statistics of an activated result need that result: it is stored.
            ahead = {} if self.norm_first else fill_epilogue([act])[0]
            if ahead or self._store_intermediate(input):
                stored = EF.depthwise_conv2d(*operands, **ahead, backend=self.backend)
                norm = Stage("norm", dw_norm, self._statistics_of(stored))
                identity = stored.new_ones(stored.shape[1], 1, 1, 1)
                operands = (stored, identity, None, (1, 1), (0, 0), (1, 1))
                act = Stage("act", nn.Identity()) if ahead else act
            else:
                norm = Stage("norm", dw_norm, self._statistics(operands))
        epilogue, _ = fill_epilogue([norm, act] if self.norm_first else [act, norm])
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
        check_batch_size(count, (input.shape[0], self.dw.out_channels, height, width))
        mean, var = EF.depthwise_stats2d(*operands, backend=self.backend)
        return self._track(mean, var, count)

    def _statistics_of(self, stored: Tensor) -> Affine:
        """The affine form of dw_norm on this batch, from the stored depthwise result."""
        count = stored.numel() // max(stored.shape[1], 1)
        check_batch_size(count, stored.shape)
        wide = stored.float() if stored.dtype in HALF_TYPES else stored
        var, mean = torch.var_mean(wide, dim=(0, 2, 3), correction=0)
        return self._track(mean, var, count)

    def _track(self, mean: Tensor, var: Tensor, count: int) -> Affine:
        update_running_statistics(self.dw_norm, mean, var, count)
        return affine_of(self.dw_norm, mean, var)

    def _output_size(self, input: Tensor) -> tuple[int, int]:
        """(P, Q) of the depthwise convolution of an input whose padding_mode has been applied already."""
        left, right, top, bottom = self._padding_sides() if self.dw.padding_mode == "zeros" else (0, 0, 0, 0)
        (kernel_h, kernel_w), (dilation_h, dilation_w) = self.dw.kernel_size, self.dw.dilation
        height = input.shape[2] + top + bottom - dilation_h * (kernel_h - 1) - 1
        width = input.shape[3] + left + right - dilation_w * (kernel_w - 1) - 1
        return height // self.dw.stride[0] + 1, width // self.dw.stride[1] + 1

    # -- state and text -----------------------------------------------------------------------------------------------

    def _slots(self) -> list[str]:
        """The sub-modules that have a state, in the order in which they run."""
        first = ("dw", "dw_norm", "dw_act") if self.norm_first else ("dw", "dw_act", "dw_norm")
        second = ("pw", "norm", "act") if self.norm_first else ("pw", "act", "norm")
        return [name for name in (*first, *second, "post_act") if self._modules[name].state_dict()]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        slots = self._slots()
        keys = [key[len(prefix) :] for key in state_dict if key.startswith(prefix)]
        rename_keys(state_dict, prefix, ds_conv_key_map(keys, slots))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        text = [f"norm_first={self.norm_first}", f"residual={self.residual}"]
        if self.uneven_padding:
            text.append(f"padding={self.uneven_padding}")
        return ", ".join([*text, *filter(None, [super().extra_repr()])])


def _check_pair_of_convolutions(where: str, dw: nn.Module, pw: nn.Module) -> None:
    if not isinstance(dw, (nn.Conv2d, BankConv2d)):
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
