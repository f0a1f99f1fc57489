"""EffNet's separable convolution with pooling, and its blocks (arXiv 1801.06434)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import effops.functional as EF
from effops.functional.effnet import Step, effnet_block
from effops.modules._arguments import (
    ActivationLike,
    IntOrPair,
    ModuleFactory,
    check_int,
    check_padding,
    check_pair,
    make_activation,
    make_norm,
)
from effops.modules._fusion import (
    FusedBlock,
    Stage,
    fill_epilogue,
    last_norm_stage,
    norm_stage,
    run_stages,
    tampered,
    weight_and_bias,
    why_not_act,
    why_not_dw,
    why_not_norm,
    why_not_pw,
)
from effops.modules._norms import (
    Affine,
    affine_of,
    check_batch_size,
    takes_batch_statistics,
    update_running_statistics,
)

_POOLS = ("none", "row", "both")


def _one_of(where: str, name: str, value: object, accepted: tuple[Any, ...]) -> None:
    if value not in accepted:
        raise ValueError(f"{where}: unknown {name} {value!r}; accepted: {', '.join(map(repr, accepted))}")


class SeparableConvPool2d(FusedBlock):
    """A depthwise 1xS convolution, a max pool, a depthwise Rx1 convolution and what follows each, as one kernel.

        z = [pool1x2](row_act(row_norm(row(x))))
        y = [pool2x1](act(norm(col(z))))

    The sub-modules row, row_norm, row_act, col, norm and act are ordinary modules (nn.Identity where absent). In eval
    mode everything is one kernel. In training row_norm takes its statistics from the row convolution without storing
    its result; norm runs as torch's on the kernel's output, and so do act and the second pool behind it.

    EffNet's two linear layers with the pooling between them (arXiv 1801.06434, 4.2).

    Args:
        channels: C.
        kernel_size: (R, S), or an int for both; odd: the padding keeps the size.
        stride: (of col along the height, of row along the width), or an int for both.
        bias: both convolutions get a bias.
        depth_multiplier: of the row convolution; D = C * depth_multiplier.
        pool: "row" halves the width between the convolutions, "both" the height behind them as well, "none" nothing.
        row_norm, norm: None or a factory called with D, such as `nn.BatchNorm2d`.
        row_act, act: None, an activation's name, a module, or a module class.
        backend: as in `effops.functional`.

    Shape:
        [N, C, H, W] -> [N, D, P, Q].

    Raises:
        TypeError, ValueError: an argument of a wrong kind or value.

    Example:
        >>> block, x = effops.SeparableConvPool2d(16, pool="both"), torch.randn(1, 16, 32, 32)
        >>> stock = F.max_pool2d(block.col(F.max_pool2d(block.row(x), (1, 2))), (2, 1))
        >>> block(x).shape, torch.allclose(block(x), stock, atol=1e-5)
        (torch.Size([1, 16, 16, 16]), True)
    """

    _head = (("row", why_not_dw), ("row_norm", why_not_norm), ("row_act", why_not_act), ("col", why_not_dw))
    _tail = (("norm", why_not_norm), ("act", why_not_act))

    def __init__(
        self,
        channels: int,
        kernel_size: IntOrPair = 3,
        stride: IntOrPair = 1,
        bias: bool = False,
        *,
        depth_multiplier: int = 1,
        pool: str = "row",
        row_norm: ModuleFactory | None = None,
        row_act: ActivationLike = None,
        norm: ModuleFactory | None = None,
        act: ActivationLike = None,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        where = type(self).__name__
        check_int(where, "channels", channels)
        made = channels * check_int(where, "depth_multiplier", depth_multiplier)
        kernel_h, kernel_w = check_pair(where, "kernel_size", kernel_size)
        stride_h, stride_w = check_pair(where, "stride", stride)
        pad_h, pad_w = check_padding(where, None, (kernel_h, kernel_w), (1, 1))
        _one_of(where, "pool", pool, _POOLS)
        factory = {"device": device, "dtype": dtype}
        self.row = nn.Conv2d(
            channels, made, (1, kernel_w), (1, stride_w), (0, pad_w), groups=channels, bias=bias, **factory
        )
        self.row_norm = make_norm(where, "row_norm", row_norm, made, factory)
        self.row_act = make_activation(where, "row_act", row_act)
        self.col = nn.Conv2d(made, made, (kernel_h, 1), (stride_h, 1), (pad_h, 0), groups=made, bias=bias, **factory)
        self.norm = make_norm(where, "norm", norm, made, factory)
        self.act = make_activation(where, "act", act)
        self.pool = pool
        self.backend = backend

    def forward(self, input: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, D, P, Q].

        Raises:
            ValueError: one value per channel in training.
        """
        parts = self._modules
        row, row_norm, col = parts["row"], parts["row_norm"], parts["col"]
        batch_statistics = takes_batch_statistics(row_norm)
        # An empty batch has no statistics, but torch lets it pass; a norm takes those of what precedes it.
        if (batch_statistics and input.shape[0] == 0) or not self._fuses():
            return self._forward_unfused(input)
        row_stage = norm_stage(row_norm, self.backend)
        if batch_statistics:
            row_stage.affine = self._row_statistics(input)
        row_epilogue, _ = fill_epilogue([row_stage, Stage("act", parts["row_act"])])
        stages = [norm_stage(parts["norm"], self.backend), Stage("act", parts["act"])]
        epilogue, fused = fill_epilogue(stages)
        whole = fused == len(stages)
        y = EF.separable_conv_pool2d(
            input,
            row.weight,
            col.weight,
            row.bias,
            col.bias,
            pool=self.pool if whole or self.pool == "none" else "row",
            stride=(col.stride[0], row.stride[1]),
            padding=(col.padding[0], row.padding[1]),
            **{f"row_{name}": value for name, value in row_epilogue.items()},
            **epilogue,
            backend=self.backend,
        )
        return y if whole else self._pool_height(run_stages(y, stages[fused:]))

    def _row_statistics(self, input: Tensor) -> Affine:
        """The affine form of row_norm on this batch, without the row convolution's result in memory."""
        row, row_norm = self._modules["row"], self._modules["row_norm"]
        n, _, height, width = input.shape
        width = (width + 2 * row.padding[1] - row.kernel_size[1]) // row.stride[1] + 1
        check_batch_size(n * height * width, (n, row.out_channels, height, width))
        mean, var = EF.depthwise_stats2d(input, row.weight, row.bias, row.stride, row.padding, backend=self.backend)
        update_running_statistics(row_norm, mean, var, n * height * width)
        return affine_of(row_norm, mean, var)

    def _pool_height(self, y: Tensor) -> Tensor:
        return F.max_pool2d(y, (2, 1)) if self.pool == "both" else y

    def _forward_unfused(self, input: Tensor) -> Tensor:
        """The sub-modules, one by one."""
        z = self.row_act(self.row_norm(self.row(input)))
        if self.pool != "none":
            z = F.max_pool2d(z, (1, 2))
        return self._pool_height(self.act(self.norm(self.col(z))))

    def extra_repr(self) -> str:
        return ", ".join([f"pool={self.pool!r}", *filter(None, [super().extra_repr()])])


def _row_taps(conv: nn.Conv2d) -> Tensor:
    """[C * rows, 1, rows, 1]: depthwise kernels of multiplier `rows` that make channels of rows.

    A convolution of `rows` x 1 and stride (rows, 1) over C channels is the pointwise one over these C * rows channels,
    its weight [K, C, rows, 1] seen as [K, C * rows, 1, 1]. For the products 0 * x they have, an infinity in one row
    makes a NaN of the other one, where the convolution itself might give an infinity.
    """
    rows, weight = conv.kernel_size[0], conv.weight
    return torch.eye(rows, device=weight.device, dtype=weight.dtype).repeat(conv.in_channels, 1).view(-1, 1, rows, 1)


class EffNetBlock(FusedBlock):
    """EffNet's block (arXiv 1801.06434): 4.2 as version 1, the revised one of 6.2 as version 2; both halve H and W.

        version 1: act(norm(conv2x1, stride (2, 1), of dw(e)))      e = expand_act(expand_norm(conv1x1(x)))
        version 2: act(norm(conv1x1(dw(e))))
        dw: a `SeparableConvPool2d` with a norm behind its two linear layers; version 1 pools the width alone

    The paper does not say what follows the first pointwise convolution, nor the slope: here a norm and ReLU follow it,
    and the slope is TensorFlow's default. The options are the paper's ablations (sections 3 and 6.2); the defaults are
    its blocks. Version 1's strided 2x1 convolution runs as the pointwise product over two rows (`EF.ds_conv2d`, whose
    depthwise convolution makes two channels of two rows).

    Args:
        in_channels: C.
        out_channels: K.
        version: 1 or 2.
        depth_multiplier: of the 1xS convolution; None is 1 for version 1 and 2 for version 2.
        bottleneck: version 1 has max(6, K // bottleneck) channels behind the first pointwise convolution, version 2
            C * expansion // bottleneck.
        expansion: of version 2.
        dw_act: activation behind both depthwise convolutions; None is linear.
        slope: negative slope of the last activation; None is 0 (ReLU) for version 1 and 0.2 for version 2.
        residual: adds the input before the last activation, max-pooled 2x2 and, where the channels change, through a
            1x1 convolution and a norm.
        groups: of the last convolution; it runs in torch where it is not 1.
        downsample: "pool", or "stride": depthwise convolutions of stride 2 in place of the pools.
        norm: None or a factory called with the channel count.
        backend: as in `effops.functional`.

    Shape:
        [N, C, H, W] -> [N, K, H // 2, W // 2]; with "stride" (H + 1) // 2 and (W + 1) // 2 (version 1: H // 2).

    Raises:
        TypeError, ValueError: an argument of a wrong kind or value.

    Example:
        >>> block, x = effops.EffNetBlock(16, 32, version=2).eval(), torch.randn(1, 16, 32, 32)
        >>> twin = effops.stock.EffNetBlock(16, 32, version=2).eval()
        >>> twin.load_state_dict(block.state_dict())
        <All keys matched successfully>
        >>> block(x).shape, torch.allclose(block(x), twin(x), atol=1e-5)
        (torch.Size([1, 32, 16, 16]), True)
    """

    _head = (("expand", why_not_pw), ("project", why_not_pw))
    _tail = (
        ("expand_norm", why_not_norm),
        ("expand_act", why_not_act),
        ("norm", why_not_norm),
        ("act", why_not_act),
    )
    _separable: type[SeparableConvPool2d] = SeparableConvPool2d

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        version: int = 1,
        depth_multiplier: int | None = None,
        bottleneck: int = 2,
        expansion: int = 2,
        dw_act: ActivationLike = None,
        slope: float | None = None,
        residual: bool = False,
        groups: int = 1,
        downsample: str = "pool",
        norm: ModuleFactory | None = nn.BatchNorm2d,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        where = type(self).__name__
        for name, value in (("in_channels", in_channels), ("out_channels", out_channels), ("groups", groups)):
            check_int(where, name, value)
        check_int(where, "bottleneck", bottleneck)
        _one_of(where, "version", version, (1, 2))
        _one_of(where, "downsample", downsample, ("pool", "stride"))
        first = version == 1
        slope = (0.0 if first else 0.2) if slope is None else slope
        width = max(6, out_channels // bottleneck)
        if not first:
            width = check_int(where, "expansion", expansion) * in_channels // bottleneck
            if width == 0:
                raise ValueError(
                    f"{where}: in_channels * expansion // bottleneck must be at least 1, got "
                    f"{in_channels} * {expansion} // {bottleneck}"
                )
        multiplier = check_int(
            where, "depth_multiplier", (1 if first else 2) if depth_multiplier is None else depth_multiplier
        )
        if (width * multiplier) % groups or out_channels % groups:
            raise ValueError(
                f"{where}: groups must divide the last convolution's {width * multiplier} and {out_channels} channels, "
                f"got {groups}"
            )
        factory = {"device": device, "dtype": dtype}
        pools = downsample == "pool"
        self.expand = nn.Conv2d(in_channels, width, 1, bias=norm is None, **factory)
        self.expand_norm = make_norm(where, "norm", norm, width, factory)
        self.expand_act = nn.ReLU()
        self.dw = self._separable(
            width,
            3,
            1 if pools else (1 if first else 2, 2),
            bias=norm is None,
            depth_multiplier=multiplier,
            pool=("row" if first else "both") if pools else "none",
            row_act=dw_act,
            norm=norm,
            act=dw_act,
            backend=backend,
            **factory,
        )
        rows = 2 if first else 1
        self.project = nn.Conv2d(
            width * multiplier, out_channels, (rows, 1), (rows, 1), groups=groups, bias=norm is None, **factory
        )
        self.norm = make_norm(where, "norm", norm, out_channels, factory)
        self.act = nn.LeakyReLU(slope) if slope else nn.ReLU()
        self.residual = residual
        self.shortcut = nn.Identity()
        if residual and in_channels != out_channels:
            projection = nn.Conv2d(in_channels, out_channels, 1, bias=norm is None, **factory)
            self.shortcut = nn.Sequential(projection, make_norm(where, "norm", norm, out_channels, factory))
        self.backend = backend
        for name, conv in (("_expand_taps", self.expand), ("_project_taps", self.project)):
            self.register_buffer(name, _row_taps(conv), persistent=False)

    def forward(self, input: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, K, P, Q]."""
        if not self._fuses():
            return self._forward_unfused(input)
        shortcut = self._shortcut(input) if self.residual else None
        whole = self._forward_whole(input, shortcut)
        if whole is not None:
            return whole
        parts, buffers = self._modules, self._buffers
        expand, project = parts["expand"], parts["project"]
        stages = [last_norm_stage(parts["expand_norm"], self.backend), Stage("act", parts["expand_act"])]
        e = self._pointwise(input, expand, buffers["_expand_taps"], stages)
        stages = [last_norm_stage(parts["norm"], self.backend)]
        if shortcut is not None:
            stages.append(Stage("residual", shortcut))
        stages.append(Stage("act", parts["act"]))
        z = parts["dw"](e)
        if project.groups != 1:
            return run_stages(project(z), stages)
        return self._pointwise(z, project, buffers["_project_taps"], stages)

    def _forward_whole(self, input: Tensor, shortcut: Tensor | None) -> Tensor | None:
        """The block as one kernel: not with batch statistics or a part for torch, nor where `effnet_block` declines."""
        parts = self._modules
        dw, project = parts["dw"], parts["project"]
        if self.training or project.groups != 1 or tampered(dw) or not dw._fuses():
            return None
        inner = dw._modules
        row, col = inner["row"], inner["col"]
        last = [self._stage("norm"), Stage("act", parts["act"])]
        if shortcut is not None:
            last.insert(1, Stage("residual", shortcut))
        chains = (
            (parts["expand"], [self._stage("expand_norm"), Stage("act", parts["expand_act"])]),
            (row, [norm_stage(inner["row_norm"], self.backend), Stage("act", inner["row_act"])]),
            (col, [norm_stage(inner["norm"], self.backend), Stage("act", inner["act"])]),
            (project, last),
        )
        steps = []
        for conv, stages in chains:
            epilogue, fused = fill_epilogue(stages)
            if fused < len(stages):
                return None
            steps.append(Step(*weight_and_bias(conv), epilogue))
        return effnet_block(
            input,
            *steps,
            pool=dw.pool,
            stride=(col.stride[0], row.stride[1]),
            padding=(col.padding[0], row.padding[1]),
            backend=self.backend,
        )

    def _stage(self, name: str) -> Stage:
        return norm_stage(self._modules[name], self.backend)

    def _pointwise(self, x: Tensor, conv: nn.Conv2d, taps: Tensor, stages: list[Stage]) -> Tensor:
        """The 1x1 convolution, or the 2x1 one of stride (2, 1), and what follows it."""
        epilogue, fused = fill_epilogue(stages)
        weight = conv.weight
        k, c, rows, _ = weight.shape
        weight = weight.reshape(k, c * rows, 1, 1)  # a view, unless the weight is channels_last
        y = EF.ds_conv2d(x, taps, weight, None, conv.bias, conv.stride, **epilogue, backend=self.backend)
        return run_stages(y, stages[fused:])

    def _shortcut(self, input: Tensor) -> Tensor:
        return self.shortcut(F.max_pool2d(input, 2))

    def _forward_unfused(self, input: Tensor) -> Tensor:
        """The sub-modules, one by one."""
        y = self.norm(self.project(self.dw(self.expand_act(self.expand_norm(self.expand(input))))))
        return self.act(y + self._shortcut(input) if self.residual else y)

    def fusion_reasons(self) -> tuple[str, ...]:
        """As of every block; with groups, that the last convolution runs in torch."""
        grouped = (
            ("project has groups, which the kernels' pointwise product has not",) if self.project.groups > 1 else ()
        )
        return (*super().fusion_reasons(), *grouped)
