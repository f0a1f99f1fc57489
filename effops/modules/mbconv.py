"""Inverted residual blocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import effops.functional as EF
from effops import backends
from effops.modules._arguments import (
    ActivationLike,
    IntOrPair,
    ModuleFactory,
    Padding,
    check_int,
    make_activation,
    make_norm,
)
from effops.modules._fusion import (
    Stage,
    fill_epilogue,
    last_norm_stage,
    norm_stage,
    run_stages,
    tampered,
    why_not_act,
    why_not_norm,
    why_not_pw,
)
from effops.modules._keys import inverted_residual_key_map, rename_keys
from effops.modules._norms import takes_batch_statistics
from effops.modules.dsconv import FusedDSConv
from effops.modules.dwconv import DepthwiseConv2d
from effops.modules.se import SqueezeExcite


def _why_not_expand(name: str, module: nn.Module) -> str | None:
    return None if type(module) is nn.Identity and not tampered(module) else why_not_pw(name, module)


def _why_not_se(name: str, module: nn.Module) -> str | None:
    if type(module) is nn.Identity or type(module) is SqueezeExcite:
        why = tampered(module)
        reasons = module.fusion_reasons() if type(module) is SqueezeExcite else ()
        return f"{name} {why}" if why else f"{name}: {'; '.join(reasons)}" if reasons else None
    return f"{name} is {type(module).__name__}, not a SqueezeExcite"


def _why_not_plain_dw(name: str, module: nn.Module) -> str | None:
    if type(module) not in (nn.Conv2d, DepthwiseConv2d) or module.out_channels != module.in_channels:
        return f"{name} does not have one kernel of its own for each channel"
    if module.padding_mode != "zeros":
        return f"{name} pads by {module.padding_mode!r}"
    return None


class InvertedResidual(FusedDSConv):
    """A widening 1x1 convolution, a depthwise one, perhaps a squeeze-excite, a narrowing 1x1 one: one kernel.

        e = expand_act(expand_norm(expand(x)))
        z = se(dw_act(dw_norm(dw(e))))
        y = norm(pw(z)) [+ x]

    The sub-modules are ordinary modules (nn.Identity where absent); dw and what follows it are a `FusedDSConv`'s, by
    its names. In eval mode everything is one kernel: neither e nor (without a squeeze-excite) z goes to memory. In
    training each batch norm takes its statistics as the convolution before it goes: the expansion and its norm are one
    operator, dw and pw another, as in `FusedDSConv`. On a backend without kernels for the whole the expansion is
    torch's, followed by that other operator.

    `load_state_dict` accepts the keys of torchvision's and timm's blocks: `inverted_residual_key_map`.

    Args:
        in_channels: C.
        out_channels: K.
        kernel_size, stride, padding, dilation: of the depthwise convolution, as in `FusedDSConv`.
        expand_ratio: D = round(C * expand_ratio) expanded channels.
        hidden_channels: D itself, instead. Where D is C there is no expansion.
        norm: None or a factory called with the channel count, after each convolution.
        act: after expansion and depthwise convolution: None, an activation's name, or a module class. A module is used
            in both places.
        se: None, or a factory called with D, such as `effops.SqueezeExcite`.
        residual: adds the input; None for where the shape stays the same.
        backend: as in `effops.functional`.

    Shape:
        [N, C, H, W] -> [N, K, P, Q].

    Raises:
        TypeError, ValueError: an argument of a wrong kind or value, or residual=True where the shape changes.

    MobileNetV2 (arXiv 1801.04381, 3.3), MobileNetV3 (arXiv 1905.02244), EfficientNet (arXiv 1905.11946).

    Example:
        >>> block = effops.InvertedResidual(16, 16, expand_ratio=6, se=effops.SqueezeExcite).eval()
        >>> twin = effops.stock.InvertedResidual(16, 16, expand_ratio=6, se=effops.stock.SqueezeExcite).eval()
        >>> twin.load_state_dict(block.state_dict())
        <All keys matched successfully>
        >>> x = torch.randn(1, 16, 9, 9)
        >>> block.residual, torch.allclose(block(x), twin(x), atol=1e-5)
        (True, True)
    """

    _front = (("expand", _why_not_expand), ("expand_norm", why_not_norm), ("expand_act", why_not_act))
    _order = ("expand", "expand_norm", "expand_act", "dw", "dw_norm", "dw_act", "se", "pw", "norm", "act", "post_act")

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: IntOrPair = 3,
        stride: IntOrPair = 1,
        expand_ratio: float = 6.0,
        *,
        hidden_channels: int | None = None,
        padding: Padding = None,
        dilation: IntOrPair = 1,
        norm: ModuleFactory | None = nn.BatchNorm2d,
        act: ActivationLike = "relu6",
        se: Callable[[int], nn.Module] | None = None,
        residual: bool | None = None,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        where = type(self).__name__
        check_int(where, "in_channels", in_channels)
        if hidden_channels is None:
            if not isinstance(expand_ratio, (int, float)) or not expand_ratio > 0:
                raise ValueError(f"{where}: expand_ratio must be a number above 0, got {expand_ratio!r}")
            hidden_channels = max(1, round(in_channels * expand_ratio))
        check_int(where, "hidden_channels", hidden_channels)
        factory = {"device": device, "dtype": dtype}
        super().__init__(
            hidden_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            dw_norm=norm,
            dw_act=act,
            norm=norm,
            backend=backend,
            **factory,
        )
        expands = hidden_channels != in_channels
        self._add_front(
            nn.Conv2d(in_channels, hidden_channels, 1, bias=False, **factory) if expands else nn.Identity(),
            make_norm(where, "norm", norm, hidden_channels, factory) if expands else nn.Identity(),
            make_activation(where, "act", act) if expands else nn.Identity(),
            make_norm(where, "se", se, hidden_channels, factory),
            residual,
        )

    @classmethod
    def from_modules(
        cls,
        expand: nn.Conv2d | None,
        dw: nn.Module,
        pw: nn.Conv2d,
        expand_norm: nn.Module | None = None,
        expand_act: nn.Module | str | None = None,
        dw_norm: nn.Module | None = None,
        dw_act: nn.Module | str | None = None,
        norm: nn.Module | None = None,
        *,
        se: nn.Module | None = None,
        residual: bool | None = None,
        backend: str = "auto",
    ) -> InvertedResidual:
        """An `InvertedResidual` made of the given modules themselves: parameters and buffers are shared, not copied.

        Args:
            expand: an `nn.Conv2d` with kernel 1x1, stride 1, no padding and one group, or None.
            dw, pw, dw_norm, dw_act, norm, backend: as `FusedDSConv.from_modules`.
            expand_norm, expand_act: of the expansion; None without one.
            se: a module, such as `SqueezeExcite`, or None.
            residual: as in the constructor.

        Returns:
            The module, in the training mode that `dw` is in.

        Raises:
            TypeError: a module of a wrong kind.
            ValueError: convolutions that are not what they should be, channels that do not fit.

        Example:
            >>> expand, pw = nn.Conv2d(16, 64, 1), nn.Conv2d(64, 16, 1)
            >>> dw = nn.Conv2d(64, 64, 3, padding=1, groups=64)
            >>> block = effops.InvertedResidual.from_modules(expand, dw, pw, expand_act="relu", dw_act="relu")
            >>> block.residual, block.expand is expand, block(torch.randn(1, 16, 9, 9)).shape
            (True, True, torch.Size([1, 16, 9, 9]))
        """
        made = super().from_modules(dw, pw, dw_norm, dw_act, norm, backend=backend)
        if expand is None:
            if expand_norm is not None or expand_act is not None:
                raise ValueError(f"{cls.__name__}.from_modules: expand_norm or expand_act given without expand")
        elif not isinstance(expand, nn.Conv2d):
            raise TypeError(f"{cls.__name__}.from_modules: expand must be an nn.Conv2d or None, got {expand!r}")
        elif expand.kernel_size != (1, 1) or expand.stride != (1, 1) or expand.groups != 1 or expand.padding != (0, 0):
            raise ValueError(
                f"{cls.__name__}.from_modules: expand must have kernel 1x1, stride 1, padding 0 and one group, "
                f"got {expand!r}"
            )
        elif expand.out_channels != dw.in_channels:
            raise ValueError(
                f"{cls.__name__}.from_modules: expand gives {expand.out_channels} channels, dw takes {dw.in_channels}; "
                "they must be equal"
            )
        made._add_front(
            nn.Identity() if expand is None else expand,
            nn.Identity() if expand_norm is None else expand_norm,
            make_activation(cls.__name__, "expand_act", expand_act),
            nn.Identity() if se is None else se,
            residual,
        )
        return made

    def _add_front(
        self, expand: nn.Module, expand_norm: nn.Module, expand_act: nn.Module, se: nn.Module, residual: bool | None
    ) -> None:
        self.expand, self.expand_norm, self.expand_act, self.se = expand, expand_norm, expand_act, se
        for name in self._order:  # as they run: so a state dict lists them
            self._modules[name] = self._modules.pop(name)
        self.residual = self._why_no_residual() is None if residual is None else residual
        if self.residual:
            self._check_residual()

    def _input_channels(self) -> int:
        expand = self._modules.get("expand")
        return self.dw.in_channels if expand is None or type(expand) is nn.Identity else expand.in_channels

    # -- running ------------------------------------------------------------------------------------------------------

    def fusion_reasons(self) -> tuple[str, ...]:
        """Why the sub-modules are not, or not all, run as one kernel; empty where they are.

        What a reason does not concern still runs fused: dw to pw, or the expansion with its norm.
        """
        return tuple([*self._front_reasons(), *self._se_reasons(), *super().fusion_reasons()])

    def _front_reasons(self) -> list[str]:
        reasons = [check(name, self._modules[name]) for name, check in self._front]
        return [reason for reason in reasons if reason]

    def _se_reasons(self) -> list[str]:
        reasons = (_why_not_se("se", self._modules["se"]), _why_not_plain_dw("dw", self._modules["dw"]))
        return [reason for reason in reasons if reason]

    def _run(self, input: Tensor, residual: Tensor | None) -> Tensor:
        parts = self._modules
        norms = (parts["expand_norm"], parts["dw_norm"], parts["norm"])
        whole = backends.has_kernels("mbconv", input, self.backend)
        if whole and not any(map(takes_batch_statistics, norms)) and self._runs_as_one():
            return self._run_as_one(input, residual)
        expanded = self._expanded(input, whole)
        if type(parts["se"]) is nn.Identity and not tampered(parts["se"]):
            return super()._run(expanded, residual)
        if len(input) == 0 or not self._fuses():
            return self._forward_unfused(expanded, residual)
        operands, arguments = self._dw_arguments(expanded)
        z = EF.depthwise_conv2d(
            *operands, **{name.removeprefix("dw_"): value for name, value in arguments.items()}, backend=self.backend
        )
        return self._pointwise(parts["se"](z), parts["pw"], self._tail_stages(residual))

    def _runs_as_one(self) -> bool:
        return self._fuses() and not self._front_reasons() and not self._se_reasons()

    def _run_as_one(self, input: Tensor, residual: Tensor | None) -> Tensor:
        parts = self._modules
        expand, se, dw, pw = parts["expand"], parts["se"], parts["dw"], parts["pw"]
        arguments = self._dw_arguments(input)[1]
        if type(expand) is nn.Identity:
            weight = bias = None
        else:
            weight, bias = expand.weight, expand.bias
            stages = [norm_stage(parts["expand_norm"], self.backend), Stage("act", parts["expand_act"])]
            arguments |= {f"expand_{name}": value for name, value in fill_epilogue(stages)[0].items()}
        if type(se) is not nn.Identity:
            arguments |= se.arguments("se_")
        stages = self._tail_stages(residual)
        epilogue, fused = fill_epilogue(stages)
        output = EF.inverted_residual2d(
            input, weight, dw.weight, pw.weight, bias, dw.bias, pw.bias, dw.stride, self.uneven_padding or dw.padding,
            dw.dilation, **arguments, **epilogue, backend=self.backend,
        )  # fmt: skip
        return run_stages(output, stages[fused:])

    def _expanded(self, input: Tensor, with_norm: bool) -> Tensor:
        """The expansion; as one operator with its norm in training, where the backend takes that into its kernel."""
        parts = self._modules
        expand, norm, act = parts["expand"], parts["expand_norm"], parts["expand_act"]
        if not with_norm or type(expand) is nn.Identity or self._front_reasons() or len(input) == 0:
            return act(norm(expand(input)))
        return self._pointwise(input, expand, [last_norm_stage(norm, self.backend), Stage("act", act)])

    def _pointwise(self, input: Tensor, conv: nn.Conv2d, stages: list[Stage]) -> Tensor:
        """A 1x1 convolution and what follows it, a batch norm in training included: as behind a depthwise 1."""
        epilogue, fused = fill_epilogue(stages)
        ones = input.new_ones(input.shape[1], 1, 1, 1)
        output = EF.ds_conv2d(input, ones, conv.weight, None, conv.bias, **epilogue, backend=self.backend)
        return run_stages(output, stages[fused:])

    def _forward_unfused(self, input: Tensor, residual: Tensor | None) -> Tensor:
        """From the depthwise convolution on, one by one."""
        parts = self._modules
        if self.uneven_padding:
            input = nn.functional.pad(input, self.uneven_padding)
        z = parts["se"](parts["dw_act"](parts["dw_norm"](parts["dw"](input))))
        y = parts["act"](parts["norm"](parts["pw"](z)))
        return parts["post_act"](y if residual is None else y + residual)

    # -- state --------------------------------------------------------------------------------------------------------

    def _slots(self) -> list[str]:
        names = ("expand", "expand_norm", "dw", "dw_norm", "se.reduce", "se.expand", "pw", "norm")
        present = {name.rpartition(".")[0] for name in self.state_dict()}
        return [name for name in names if name in present]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        keys = [key[len(prefix) :] for key in state_dict if key.startswith(prefix)]
        rename_keys(state_dict, prefix, inverted_residual_key_map(keys, self._slots()))
        super()._load_from_state_dict(state_dict, prefix, *args)
