"""What of a block runs as one kernel: which sub-modules fuse, and the stages that fill the kernels' epilogues."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from effops.modules._arguments import ACTIVATION_MODULES
from effops.modules._norms import Affine, batch_norm_of, running_affine
from effops.modules.dwconv import BlurPool2d, DepthwiseConv2d, FixedFilterConv2d, SharedDepthwiseConv2d

_DW_KINDS = (nn.Conv2d, DepthwiseConv2d, SharedDepthwiseConv2d, FixedFilterConv2d, BlurPool2d)
_PW_KINDS = (nn.Conv2d,)
_ACTIVATION_NAMES = {kind: name for name, kind in ACTIVATION_MODULES.items()}


# ---------------------------------------------------------------------------------------------------------------------
# What a sub-module is, as far as fusing is concerned
# ---------------------------------------------------------------------------------------------------------------------


def activation_of(module: nn.Module) -> tuple[str, float] | None:
    """(name, negative slope) of an activation that the kernels know, else None."""
    kind = type(module)
    if kind is nn.LeakyReLU:
        return "leaky_relu", module.negative_slope
    if kind is nn.GELU and module.approximate != "none":
        return None
    name = _ACTIVATION_NAMES.get(kind)
    return None if name is None else (name, 0.01)


def tampered(module: nn.Module) -> str | None:
    """Why calling the module is not the same as reading its parameters, if so."""
    if module._forward_hooks or module._forward_pre_hooks:
        return "has forward hooks"
    if module._backward_hooks or module._backward_pre_hooks:
        return "has backward hooks"
    if "forward" in module.__dict__:
        return "has a replaced forward method"
    return None


def weight_and_bias(conv: nn.Module) -> tuple[Tensor, Tensor | None]:
    """The convolution's parameters; each would take half a microsecond as an attribute."""
    own = conv._parameters
    try:
        return own["weight"], own["bias"]
    except KeyError:  # one is a buffer or a plain attribute, or missing
        return conv.weight, getattr(conv, "bias", None)


def _why_not_conv(name: str, module: nn.Module, kinds: tuple[type, ...]) -> str | None:
    if type(module) not in kinds:
        how = " (parametrized)" if hasattr(module, "parametrizations") else ""
        return f"{name} is {type(module).__name__}{how}, not a plain {kinds[0].__name__}"
    why = tampered(module)
    return f"{name} {why}" if why else None


def why_not_dw(name: str, module: nn.Module) -> str | None:
    return _why_not_conv(name, module, _DW_KINDS)


def why_not_pw(name: str, module: nn.Module) -> str | None:
    return _why_not_conv(name, module, _PW_KINDS)


def why_not_norm(name: str, module: nn.Module) -> str | None:
    kind = type(module)
    if kind is not nn.Identity and kind is not nn.BatchNorm2d:
        return f"{name} is {kind.__name__}, not a plain BatchNorm2d"
    why = tampered(module)
    return f"{name} {why}" if why else None


def why_not_act(name: str, module: nn.Module) -> str | None:
    if activation_of(module) is None:
        return f"{name} is {module!r}, which the kernels do not know"
    why = tampered(module)
    return f"{name} {why}" if why else None


def _is_identity(module: nn.Module) -> bool:
    return type(module) is nn.Identity


# ---------------------------------------------------------------------------------------------------------------------
# Epilogues: filling  post_activation(activation(conv + bias) * scale + shift + residual)  from a list of stages
# ---------------------------------------------------------------------------------------------------------------------

# Where each part stands in the epilogue.
_ACTIVATION_SLOT, _AFFINE_SLOT, _RESIDUAL_SLOT, _POST_SLOT = 1, 2, 3, 4


class Stage:
    """One thing that follows a convolution: `kind` is "norm", "act" or "residual"."""

    __slots__ = ("kind", "value", "affine", "trains")

    def __init__(
        self, kind: str, value: nn.Module | Tensor, affine: Affine | None = None, trains: bool = False
    ) -> None:
        self.kind = kind
        self.value = value
        self.affine = affine
        self.trains = trains


def fill_epilogue(stages: Sequence[Stage]) -> tuple[dict[str, Any], int]:
    """Puts as many stages as fit, in order, into the epilogue of a convolution.

    Args:
        stages: norm stages carry their (scale, shift) in `affine`, or None where they cannot be fused that way;
            `trains` says that they fuse as a batch norm of the operator.

    Returns:
        The keyword arguments of the functional call and how many stages they cover; torch runs the others.
    """
    epilogue: dict[str, Any] = {}
    slot, slope = 0, None
    for done, stage in enumerate(stages):
        if stage.kind == "act":
            known = None if tampered(stage.value) else activation_of(stage.value)
            if known is None:
                return epilogue, done
            name, own_slope = known
            if name == "none":
                continue
            if slot >= _POST_SLOT:
                return epilogue, done
            target = _ACTIVATION_SLOT if slot < _ACTIVATION_SLOT else _POST_SLOT
            if name == "leaky_relu":  # one slope serves both activations
                if slope is not None and slope != own_slope:
                    return epilogue, done
                slope = epilogue["negative_slope"] = own_slope
            epilogue["activation" if target == _ACTIVATION_SLOT else "post_activation"] = name
            slot = target
        elif stage.kind == "norm":
            if _is_identity(stage.value) and not tampered(stage.value):
                continue
            if slot >= _AFFINE_SLOT or not (stage.affine or stage.trains):
                return epilogue, done
            if stage.trains:
                epilogue["batch_norm"] = batch_norm_of(stage.value)
            else:
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
    if not torch._C._is_any_autocast_enabled():  # first: torch.is_autocast_enabled raises for the meta device
        return True
    device = residual.device.type
    return not torch.is_autocast_enabled(device) or residual.dtype == torch.get_autocast_dtype(device)


def run_stages(output: Tensor, stages: Iterable[Stage]) -> Tensor:
    for stage in stages:
        output = output + stage.value if stage.kind == "residual" else stage.value(output)
    return output


def norm_stage(norm: nn.Module, backend: str) -> Stage:
    """A norm stage that is fused where the norm is a plain BatchNorm2d on running statistics."""
    fuses = type(norm) is nn.BatchNorm2d and not tampered(norm)
    return Stage("norm", norm, running_affine(norm, backend) if fuses else None)


def last_norm_stage(norm: nn.Module, backend: str) -> Stage:
    """The stage of a norm behind the pointwise convolution, which fuses on the statistics of the batch as well."""
    stage = norm_stage(norm, backend)
    stage.trains = stage.affine is None and type(norm) is nn.BatchNorm2d and not tampered(norm)
    return stage


# ---------------------------------------------------------------------------------------------------------------------
# Blocks
# ---------------------------------------------------------------------------------------------------------------------


class FusedBlock(nn.Module):
    """What the blocks share: reasons and repr.

    Their fused paths read `self._modules`: an attribute of a module takes half a microsecond, and a block has many.
    """

    backend: str
    # (sub-module, the check that applies) of the part that must fuse as a whole and of the part that may follow.
    _head: tuple[tuple[str, Callable[[str, nn.Module], str | None]], ...]
    _tail: tuple[tuple[str, Callable[[str, nn.Module], str | None]], ...]

    def fusion_reasons(self) -> tuple[str, ...]:
        """Why the sub-modules are not, or not all, run as one kernel; empty where they are.

        A reason that concerns a convolution or what stands between convolutions makes the block call its sub-modules
        one by one. A reason that concerns norm, act or post_act leaves the convolutions fused and calls that module,
        and those after it, behind.
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


class ResidualBlock(FusedBlock):
    """What the blocks share whose convolutions are followed by norm, act, a residual and post_act.

    A subclass sets these three sub-modules, `dw`, `norm_first`, `residual`, and defines the two channel counts.
    """

    _tail = (("norm", why_not_norm), ("act", why_not_act), ("post_act", why_not_act))
    norm_first: bool
    residual: bool
    # (left, right, top, bottom) where the convolution itself cannot pad that way.
    uneven_padding: tuple[int, ...] | None = None

    def _input_channels(self) -> int:
        raise NotImplementedError

    def _output_channels(self) -> int:
        raise NotImplementedError

    def _check_residual(self) -> None:
        why_not = self._why_no_residual()
        if why_not:
            raise ValueError(f"{type(self).__name__}: residual=True needs {why_not}")

    def _why_no_residual(self) -> str | None:
        """What adding the input needs and is not there."""
        if self._input_channels() != self._output_channels():
            return f"in_channels == out_channels, got {self._input_channels()} and {self._output_channels()}"
        if tuple(self.dw.stride) != (1, 1):
            return f"stride 1, got {self.dw.stride}"
        left, right, top, bottom = self._padding_sides()
        grown = (
            (top + bottom - self.dw.dilation[0] * (self.dw.kernel_size[0] - 1)),
            (left + right - self.dw.dilation[1] * (self.dw.kernel_size[1] - 1)),
        )
        return None if grown == (0, 0) else f"a padding that keeps height and width; they change by {grown}"

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

    def _residual_of(self, input: Tensor, residual: Tensor | None) -> Tensor | None:
        """What is added: the input where the module does that, else what was given."""
        if not self.residual:
            return residual
        if residual is not None:
            raise ValueError(f"{type(self).__name__}: residual given, but residual=True already adds the input")
        return input

    def _stages_behind(self, norm: Stage, residual: Tensor | None) -> list[Stage]:
        """What follows the last convolution; `norm` is the stage of the sub-module of that name."""
        act = Stage("act", self._modules["act"])
        stages = [norm, act] if self.norm_first else [act, norm]
        if residual is not None:
            stages.append(Stage("residual", residual))
        stages.append(Stage("act", self._modules["post_act"]))
        return stages

    def _run_behind(self, output: Tensor, residual: Tensor | None) -> Tensor:
        """What follows the last convolution, one by one."""
        output = self.act(self.norm(output)) if self.norm_first else self.norm(self.act(output))
        return self.post_act(output if residual is None else output + residual)
