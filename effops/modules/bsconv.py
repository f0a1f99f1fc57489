"""Blueprint separable convolutions (arXiv 2003.13549) and their orthonormal regularisation."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

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
    fill_epilogue,
    norm_stage,
    run_stages,
    why_not_dw,
    why_not_norm,
    why_not_pw,
)
from effops.modules._norms import running_affine, takes_batch_statistics
from effops.modules.dwconv import pad_for
from effops.ops.bsconv.reference import materialise


class _Blueprint(ResidualBlock):
    """What both blueprint convolutions share: `_pointwise` names their 1x1 convolutions and norms, in order."""

    _pointwise: tuple[tuple[str, str], ...]
    dw: nn.Conv2d

    def _add_tail(
        self,
        norm: ModuleFactory | None,
        act: ActivationLike,
        post_act: ActivationLike,
        norm_first: bool,
        residual: bool,
        factory: dict[str, Any],
    ) -> None:
        """What follows the depthwise convolution; the convolutions are there already."""
        where = type(self).__name__
        self.norm = make_norm(where, "norm", norm, self.dw.out_channels, factory)
        self.act = make_activation(where, "act", act)
        self.post_act = make_activation(where, "post_act", post_act)
        self.norm_first = norm_first
        self.residual = residual
        if residual:
            self._check_residual()

    def _input_channels(self) -> int:
        return self._modules[self._pointwise[0][0]].in_channels

    def _output_channels(self) -> int:
        return self.dw.out_channels

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """[N, C, H, W] -> [N, K, P, Q].

        Args:
            input: [N, C, H, W].
            residual: [N, K, P, Q], added before post_act: the shortcut around a unit, say. Not together with
                `residual=True`, which adds `input`.

        Raises:
            ValueError: residual given although the module adds its input already; one value per channel in training.
        """
        residual = self._residual_of(input, residual)
        if not self._fuses():
            return self._run_behind(self.dw(self._intermediate(input)), residual)
        # The kernels take a norm on running statistics; on those of the batch it runs as torch's behind them.
        stages = self._stages_behind(norm_stage(self._modules["norm"], self.backend), residual)
        epilogue, fused = fill_epilogue(stages)
        if any(takes_batch_statistics(self._modules[norm]) for _, norm in self._pointwise):
            output = self._depthwise(self._intermediate(input), epilogue)
        else:
            output = self._fused(input, epilogue)
        return run_stages(output, stages[fused:])

    def _intermediate(self, input: Tensor) -> Tensor:
        """What the depthwise convolution reads, by the sub-modules one by one."""
        for pw, norm in self._pointwise:
            input = self._modules[norm](self._modules[pw](input))
        return input

    def _depthwise(self, z: Tensor, epilogue: dict[str, Any]) -> Tensor:
        dw = self.dw
        z, padding = pad_for(dw, z)
        return EF.depthwise_conv2d(
            z, dw.weight, dw.bias, dw.stride, padding, dw.dilation, **epilogue, backend=self.backend
        )

    def _fused(self, input: Tensor, epilogue: dict[str, Any]) -> Tensor:
        parts = self._modules
        dw = parts["dw"]
        # A padding mode other than zeros repeats pixels, before the pointwise convolution as well as behind it.
        input, padding = pad_for(dw, input)
        operands: dict[str, Any] = {}
        for prefix, (pw, norm) in zip(("pw", "mid"), reversed(self._pointwise), strict=False):
            operands[f"{prefix}_weight"] = parts[pw].weight
            if type(parts[norm]) is nn.BatchNorm2d:
                scale, shift = running_affine(parts[norm], self.backend)
                operands |= {f"{prefix}_scale": scale, f"{prefix}_shift": shift}
        return EF.bs_conv2d(
            input,
            dw_weight=dw.weight,
            dw_bias=dw.bias,
            stride=dw.stride,
            padding=padding,
            dilation=dw.dilation,
            backend=self.backend,
            **operands,
            **epilogue,
        )

    def extra_repr(self) -> str:
        text = [] if self.norm_first else ["norm_first=False"]
        if self.residual:
            text.append("residual=True")
        return ", ".join([*text, *filter(None, [super().extra_repr()])])

    def to_dense(self) -> nn.Conv2d:
        """The one dense `nn.Conv2d` that pw to dw are in eval mode: kernel k is a blueprint, scaled for each channel.

        W[k, c] = dw[k] * pw[k, c], the paper's Eq. 2; for BSConvS pw is the product of its two matrices. The norms
        between them are folded in from their running statistics. It is the convolution alone: norm, act, the residual
        and post_act are not in it. The parameters are copies.

        Returns:
            A convolution [N, C, H, W] -> [N, K, P, Q], in the training mode that the block is in.

        Raises:
            ValueError: norms that shift, beside zero padding: the padding's zeros come behind the norm, where no dense
                kernel can put them; norms without running statistics.
            TypeError: a norm that is not a BatchNorm2d.

        Example:
            >>> block, x = effops.BSConvU(16, 32, 3, padding=1), torch.randn(1, 16, 9, 9)
            >>> dense = block.to_dense()
            >>> dense.weight.shape, torch.allclose(dense(x), block(x), atol=1e-5)
            (torch.Size([32, 16, 3, 3]), True)
        """
        dw = self.dw
        padded = dw.padding_mode == "zeros" and dw.padding != "valid" and any(_as_sides(dw.padding))
        weight = self._modules[self._pointwise[0][0]].weight.detach().double()
        offset = weight.new_zeros(len(weight))
        for index, (pw, norm) in enumerate(self._pointwise):
            if index:
                following = self._modules[pw].weight.detach().double()
                offset = following[:, :, 0, 0] @ offset
                weight = (following[:, :, 0, 0] @ weight[:, :, 0, 0])[:, :, None, None]
            scale, shift = _folded(type(self).__name__, norm, self._modules[norm], len(weight))
            weight, offset = weight * scale[:, None, None, None], offset * scale + shift
        if padded and offset.any():
            raise ValueError(
                f"{type(self).__name__}.to_dense: the batch norm's shift and zero padding {dw.padding} behind it have "
                "no dense kernel; accepted: with_bn=False, padding 0, or a padding_mode other than 'zeros'"
            )
        kernels = dw.weight.detach().double()
        bias = offset * kernels.sum((1, 2, 3))
        if dw.bias is not None:
            bias = bias + dw.bias.detach().double()
        dense = nn.Conv2d(
            weight.shape[1], dw.out_channels, dw.kernel_size, dw.stride, dw.padding, dw.dilation,
            bias=dw.bias is not None or bool(offset.any()), padding_mode=dw.padding_mode,
            device=dw.weight.device, dtype=dw.weight.dtype,
        )  # fmt: skip
        with torch.no_grad():
            dense.weight.copy_(materialise(weight, kernels))
            if dense.bias is not None:
                dense.bias.copy_(bias)
        return dense.train(self.training)


def _as_sides(padding: str | tuple[int, ...]) -> tuple[int, ...]:
    return (1,) if isinstance(padding, str) else padding


def _folded(where: str, name: str, norm: nn.Module, channels: int) -> tuple[Tensor, Tensor]:
    """The norm as (scale, shift) in float64."""
    if type(norm) is nn.Identity:
        return torch.ones(1, dtype=torch.float64), torch.zeros(channels, dtype=torch.float64)
    if type(norm) is not nn.BatchNorm2d:
        raise TypeError(f"{where}.to_dense: {name} must be a BatchNorm2d, got {type(norm).__name__}")
    if norm.running_mean is None:
        raise ValueError(f"{where}.to_dense: {name} has no running statistics")
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.detach().double()
    shift = -norm.running_mean.double() * scale
    if norm.bias is not None:
        shift = shift + norm.bias.detach().double()
    return scale, shift


class BSConvU(_Blueprint):
    """A 1x1 convolution, then a depthwise one: unconstrained blueprint separable convolution (arXiv 2003.13549, 3.3.1).

        z = dw(bn(pw(x)))
        y = post_act(act(norm(z)) [+ x])           or, with norm_first=False,   post_act(norm(act(z)) [+ x])

    A drop-in for `nn.Conv2d(in_channels, out_channels, ...)`, which is y = z, the default. The sub-modules `pw`, `bn`
    and `dw` have the names of the PyPI package bsconv, whose checkpoints load; `norm`, `act` and `post_act` are what a
    network has behind the convolution (all nn.Identity where absent). Zero padding applies to the pointwise's result.
    In eval mode everything is one kernel, and the pointwise's result does not go to memory (but behind norm, then act
    the kernels take nothing more: a residual is then added by torch). So it is in training, forward and backward,
    except for batch norms: `norm` runs as torch's on the kernel's output, and the rest behind it; `bn` needs the
    pointwise's result in memory.

    Args:
        in_channels: C.
        out_channels: K.
        kernel_size, stride, padding, dilation, padding_mode: of the depthwise convolution; `nn.Conv2d`'s, and padding
            None for (k - 1) // 2 * dilation (odd kernels).
        bias: the depthwise convolution gets a bias.
        with_bn: a batch norm between the two convolutions.
        bn_kwargs: arguments of that `nn.BatchNorm2d`.
        norm: None or a factory called with the channel count, such as `nn.BatchNorm2d`; behind the depthwise.
        act, post_act: None, the name of an activation (none, relu, relu6, leaky_relu, silu, hardswish, hardsigmoid,
            sigmoid, gelu), a module, or a module class.
        norm_first: norm before act, or behind it where False.
        residual: adds the input; needs in_channels == out_channels and unchanged height and width. `forward` takes any
            other residual.
        backend: as in `effops.functional`.

    Shape:
        [N, C, H, W] -> [N, K, P, Q].

    Raises:
        TypeError, ValueError: an argument of a wrong kind or value, or residual where the shape changes.

    Example:
        >>> block = effops.BSConvU(16, 32, 3, padding=1, norm=nn.BatchNorm2d, act="relu").eval()
        >>> x = torch.randn(1, 16, 9, 9)
        >>> stock = F.relu(block.norm(block.dw(block.pw(x))))
        >>> block.fusion_reasons(), torch.allclose(block(x), stock, atol=1e-5)
        ((), True)
    """

    _head = (("pw", why_not_pw), ("bn", why_not_norm), ("dw", why_not_dw))
    _pointwise = (("pw", "bn"),)

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: IntOrPair,
        stride: IntOrPair = 1,
        padding: Padding = 0,
        dilation: IntOrPair = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        with_bn: bool = False,
        bn_kwargs: Mapping[str, Any] | None = None,
        *,
        norm: ModuleFactory | None = None,
        act: ActivationLike = None,
        norm_first: bool = True,
        residual: bool = False,
        post_act: ActivationLike = None,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        where = type(self).__name__
        factory = {"device": device, "dtype": dtype}
        check_int(where, "in_channels", in_channels)
        check_int(where, "out_channels", out_channels)
        window = _window(where, kernel_size, stride, padding, dilation, padding_mode)
        self.pw = nn.Conv2d(in_channels, out_channels, 1, bias=False, **factory)
        self.bn = _norm(where, "bn", with_bn, bn_kwargs, out_channels, factory)
        self.dw = nn.Conv2d(out_channels, out_channels, **window, groups=out_channels, bias=bias, **factory)
        self._add_tail(norm, act, post_act, norm_first, residual, factory)
        self.backend = backend


class BSConvS(_Blueprint):
    """Two 1x1 convolutions, then a depthwise one: subspace blueprint separable convolution (arXiv 2003.13549, 3.3.2).

        z = dw(bn2(pw2(bn1(pw1(x)))))
        y = post_act(act(norm(z)) [+ x])           or, with norm_first=False,   post_act(norm(act(z)) [+ x])

    The matrix of `BSConvU`'s 1x1 as a product through M = min(C, max(min_mid_channels, ceil(p * C))) channels; its
    rows are kept orthonormal by `orthonormal_loss`. The defaults p = 0.25 and min_mid_channels = 4 are the package's;
    the paper's Eq. 8 has no least number of channels: min_mid_channels=1. The sub-modules `pw1`, `bn1`, `pw2`, `bn2`
    and `dw` have the names of the PyPI package bsconv. All else is as in `BSConvU`.

    Args:
        p: channels between the 1x1 convolutions as a share of in_channels, in (0, 1].
        min_mid_channels: their least number.
        with_bn: a batch norm behind each 1x1 convolution (the package's networks have them).
        The others: as in `BSConvU`.

    Shape:
        [N, C, H, W] -> [N, K, P, Q].

    Raises:
        TypeError, ValueError: an argument of a wrong kind or value, or residual where the shape changes.

    Example:
        >>> block = effops.BSConvS(64, 128, 3, padding=1, with_bn=True)
        >>> block.mid_channels, block(torch.randn(2, 64, 9, 9)).shape
        (16, torch.Size([2, 128, 9, 9]))
        >>> loss = effops.orthonormal_loss(block, alpha=0.1)  # added to the task's loss in training
        >>> loss.requires_grad
        True
    """

    _head = (("pw1", why_not_pw), ("bn1", why_not_norm), ("pw2", why_not_pw), ("bn2", why_not_norm), ("dw", why_not_dw))
    _pointwise = (("pw1", "bn1"), ("pw2", "bn2"))

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: IntOrPair,
        stride: IntOrPair = 1,
        padding: Padding = 0,
        dilation: IntOrPair = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        p: float = 0.25,
        min_mid_channels: int = 4,
        with_bn: bool = False,
        bn_kwargs: Mapping[str, Any] | None = None,
        *,
        norm: ModuleFactory | None = None,
        act: ActivationLike = None,
        norm_first: bool = True,
        residual: bool = False,
        post_act: ActivationLike = None,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        where = type(self).__name__
        factory = {"device": device, "dtype": dtype}
        check_int(where, "in_channels", in_channels)
        check_int(where, "out_channels", out_channels)
        check_int(where, "min_mid_channels", min_mid_channels)
        if isinstance(p, bool) or not isinstance(p, (int, float)):
            raise TypeError(f"{where}: p must be a number, got {p!r} ({type(p).__name__})")
        if not 0 < p <= 1:
            raise ValueError(f"{where}: p must be above 0 and at most 1, got {p!r}")
        window = _window(where, kernel_size, stride, padding, dilation, padding_mode)
        mid = min(in_channels, max(min_mid_channels, math.ceil(p * in_channels)))
        self.pw1 = nn.Conv2d(in_channels, mid, 1, bias=False, **factory)
        self.bn1 = _norm(where, "bn1", with_bn, bn_kwargs, mid, factory)
        self.pw2 = nn.Conv2d(mid, out_channels, 1, bias=False, **factory)
        self.bn2 = _norm(where, "bn2", with_bn, bn_kwargs, out_channels, factory)
        self.dw = nn.Conv2d(out_channels, out_channels, **window, groups=out_channels, bias=bias, **factory)
        self._add_tail(norm, act, post_act, norm_first, residual, factory)
        self.backend = backend

    @property
    def mid_channels(self) -> int:
        """M, the channels between the two 1x1 convolutions."""
        return self.pw1.out_channels


def _window(
    where: str, kernel_size: IntOrPair, stride: IntOrPair, padding: Padding, dilation: IntOrPair, padding_mode: str
) -> dict[str, Any]:
    """The depthwise convolution's window as keywords of nn.Conv2d."""
    kernel, stride = check_pair(where, "kernel_size", kernel_size), check_pair(where, "stride", stride)
    dilation = check_pair(where, "dilation", dilation)
    padding = check_padding(where, padding, kernel, dilation)
    if len(padding) == 4 and not isinstance(padding, str):
        raise ValueError(f"{where}: uneven padding {padding} is not supported here; use F.pad and padding=0")
    check_padding_mode(where, padding_mode)
    return {
        "kernel_size": kernel,
        "stride": stride,
        "padding": padding,
        "dilation": dilation,
        "padding_mode": padding_mode,
    }


def _norm(
    where: str, name: str, with_bn: bool, bn_kwargs: Mapping[str, Any] | None, channels: int, factory: dict[str, Any]
) -> nn.Module:
    if not with_bn:
        return nn.Identity()
    return make_norm(where, name, lambda c: nn.BatchNorm2d(c, **(bn_kwargs or {})), channels, factory)


# ---------------------------------------------------------------------------------------------------------------------
# Orthonormal regularisation
# ---------------------------------------------------------------------------------------------------------------------


def orthonormal_loss(model: nn.Module, alpha: float = 0.1) -> Tensor:
    """alpha * sum over matrices W of ||W W^T - I||_F, to be added to the training loss.

    W is the first 1x1 convolution [M, C] of each `BSConvS`, and the projection [K, M] that ends each linear bottleneck:
    a 1x1 expansion and its activation (or neither), a depthwise convolution and its activation, perhaps
    squeeze-excite, and a 1x1 convolution without an activation behind it. Those are found by the order of their
    modules: ours, torchvision's and timm's inverted residual blocks
    (MobileNetV2, V3, MnasNet, EfficientNet), which by this loss alone become BSConv-S networks. The paper uses alpha
    0.1 on ImageNet and 0.01 on CIFAR.

    Args:
        model: any module.
        alpha: weight of the loss.

    Returns:
        A scalar, differentiable.

    Raises:
        TypeError: the model is not a module, alpha not a number.
        ValueError: the model has no such matrix; alpha is negative or not finite.

    "Rethinking Depthwise Separable Convolutions" (arXiv 2003.13549), section 3.3.2, Eq. 9; of bottlenecks, section 4.2.

    Example:
        >>> block = effops.BSConvS(64, 128, 3)
        >>> _ = nn.init.orthogonal_(block.pw1.weight)
        >>> torch.allclose(effops.orthonormal_loss(block), torch.tensor(0.0), atol=1e-4)
        True
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"orthonormal_loss: the model must be an nn.Module, got {type(model).__name__}")
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)):
        raise TypeError(f"orthonormal_loss: alpha must be a number, got {alpha!r} ({type(alpha).__name__})")
    if not 0 <= alpha < math.inf:
        raise ValueError(f"orthonormal_loss: alpha must be finite and at least 0, got {alpha!r}")
    convolutions = _regularised(model)
    if not convolutions:
        raise ValueError(
            f"orthonormal_loss: {type(model).__name__} has neither a BSConvS nor a linear bottleneck; accepted: a "
            "model with at least one"
        )
    return alpha * torch.stack([_distance_to_orthonormal(conv.weight) for conv in convolutions]).sum()


def _distance_to_orthonormal(weight: Tensor) -> Tensor:
    matrix = weight.flatten(1)
    return torch.linalg.matrix_norm(
        matrix @ matrix.T - torch.eye(len(matrix), dtype=weight.dtype, device=weight.device)
    )


def _regularised(model: nn.Module) -> list[nn.Conv2d]:
    """The convolutions whose matrices are regularised, each once, in the order of the modules."""
    found: dict[int, nn.Conv2d] = {}
    for module in model.modules():
        conv = module.pw1 if isinstance(module, BSConvS) else _projection(module)
        if conv is not None:
            found[id(conv)] = conv
    return list(found.values())


def _projection(block: nn.Module) -> nn.Conv2d | None:
    """The projection of a linear bottleneck, or None where the module is none."""
    project = getattr(block, "project", None)
    if isinstance(project, nn.Conv2d) and isinstance(getattr(block, "dw", None), nn.Conv2d):  # ours
        return project
    leaves = [module for module in block.modules() if not next(module.children(), None)]
    order = [index for index, leaf in enumerate(leaves) if isinstance(leaf, nn.Conv2d)]
    depthwise = [index for index in order if _is_depthwise(leaves[index])]
    if len(depthwise) != 1 or order[-1] == depthwise[0]:
        return None
    (middle,), end = depthwise, order[-1]
    dw, last = leaves[middle], leaves[end]
    expansions = [index for index in order if index < middle]
    if not _is_pointwise(last) or last.in_channels != dw.out_channels or len(expansions) > 1:
        return None
    if not _has_activation(leaves[middle:end]) or _has_activation(leaves[end:]):
        return None
    if not expansions:  # the first block of MobileNets; a separable convolution that widens is none
        return last if last.out_channels <= last.in_channels else None
    first = leaves[expansions[0]]
    fits = _is_pointwise(first) and first.out_channels == dw.in_channels
    return last if fits and _has_activation(leaves[expansions[0] : middle]) else None


def _is_depthwise(conv: nn.Conv2d) -> bool:
    return conv.groups == conv.in_channels > 1


def _is_pointwise(conv: nn.Conv2d) -> bool:
    return conv.kernel_size == (1, 1) and conv.groups == 1


def _has_activation(leaves: Sequence[nn.Module]) -> bool:
    """By the place of their classes: torch.nn.modules.activation, timm.layers.activations."""
    return any("activation" in type(leaf).__module__.rpartition(".")[2] for leaf in leaves)
