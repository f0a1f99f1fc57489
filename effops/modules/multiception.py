"""Depthwise convolutions of several window sizes side by side, a pointwise one and what follows, as one kernel."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import effops.functional as EF
from effops.modules._arguments import (
    ActivationLike,
    IntOrPair,
    ModuleFactory,
    check_int,
    check_pair,
    make_activation,
    make_norm,
)
from effops.modules._fusion import (
    FusedBlock,
    Stage,
    fill_epilogue,
    norm_stage,
    run_stages,
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


def _why_not_parts(name: str, convolutions: nn.ModuleList) -> str | None:
    reasons = (why_not_dw(f"{name}.{i}", convolution) for i, convolution in enumerate(convolutions))
    return next(filter(None, reasons), None)


class _PartsBlock(FusedBlock):
    """What both blocks share: act(norm(pw(dw_norm(cat_i dw[i](x_i))))), one kernel where the sub-modules allow it."""

    _head = (("dw", _why_not_parts), ("dw_norm", why_not_norm), ("pw", why_not_pw))
    _tail = (("norm", why_not_norm), ("act", why_not_act))
    _function: Callable[..., Tensor]

    def _assemble(
        self, dw: list[nn.Module], dw_norm: nn.Module, pw: nn.Module, norm: nn.Module, act: nn.Module, backend: str
    ) -> None:
        self.dw = nn.ModuleList(dw)
        self.dw_norm, self.pw, self.norm, self.act = dw_norm, pw, norm, act
        self.backend = backend

    def _inputs(self, input: Tensor) -> Sequence[Tensor]:
        """What each part's convolution reads."""
        raise NotImplementedError

    def forward(self, input: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, K, P, Q]."""
        # An empty batch has no statistics; torch lets it pass.
        empty = input.shape[0] == 0 and takes_batch_statistics(self.dw_norm)
        if empty or not self._fuses():
            return self._forward_unfused(input)
        modules = self._modules
        dw, dw_norm, pw = tuple(modules["dw"]), modules["dw_norm"], modules["pw"]
        between = norm_stage(dw_norm, self.backend)
        if between.affine is None and takes_batch_statistics(dw_norm):
            between = Stage("norm", dw_norm, self._statistics(input))
        dw_epilogue, _ = fill_epilogue([between])
        stages = [norm_stage(modules["norm"], self.backend), Stage("act", modules["act"])]
        epilogue, fused = fill_epilogue(stages)
        weight, bias = weight_and_bias(pw)
        (dw_h, dw_w), (pw_h, pw_w) = dw[0].stride, pw.stride
        output = self._function(
            input,
            [weight_and_bias(convolution)[0] for convolution in dw],
            weight,
            None,
            bias,
            (dw_h * pw_h, dw_w * pw_w),
            [convolution.padding for convolution in dw],
            dw_scale=dw_epilogue.get("scale"),
            dw_shift=dw_epilogue.get("shift"),
            **epilogue,
            backend=self.backend,
        )
        return run_stages(output, stages[fused:])

    def _forward_unfused(self, input: Tensor) -> Tensor:
        """The sub-modules, one by one."""
        parts = [convolution(x) for convolution, x in zip(self.dw, self._inputs(input), strict=True)]
        return self.act(self.norm(self.pw(self.dw_norm(torch.cat(parts, 1)))))

    def _statistics(self, input: Tensor) -> Affine:
        """The affine form of dw_norm on this batch, over the whole maps of the dw, which are not stored."""
        of_parts = [
            EF.depthwise_stats2d(
                x, convolution.weight, None, convolution.stride, convolution.padding, backend=self.backend
            )
            for convolution, x in zip(self.dw, self._inputs(input), strict=True)
        ]
        mean, var = (torch.cat(statistics) for statistics in zip(*of_parts, strict=True))
        first = self.dw[0]
        sizes = zip(input.shape[2:], first.padding, first.kernel_size, first.stride, strict=True)
        height, width = ((size + 2 * pad - kernel) // stride + 1 for size, pad, kernel, stride in sizes)
        count = input.shape[0] * height * width
        check_batch_size(count, (input.shape[0], mean.shape[0], height, width))
        update_running_statistics(self.dw_norm, mean, var, count)
        return affine_of(self.dw_norm, mean, var)


def _windows(where: str, kernel_sizes: Sequence[IntOrPair]) -> list[tuple[int, int]]:
    if not isinstance(kernel_sizes, (tuple, list)):
        raise TypeError(f"{where}: kernel_sizes must be a list of ints or pairs, got {kernel_sizes!r}")
    if not kernel_sizes:
        raise ValueError(f"{where}: kernel_sizes is empty; give at least one")
    windows = [check_pair(where, f"kernel_sizes[{i}]", size) for i, size in enumerate(kernel_sizes)]
    for height, width in windows:
        if height % 2 == 0 or width % 2 == 0:
            raise ValueError(
                f"{where}: kernel_sizes must be odd, so that all parts have one size; got {kernel_sizes!r}"
            )
    return windows


def _convolution(
    channels: int, out_channels: int, groups: int, window: tuple[int, int], stride: IntOrPair, factory: dict[str, Any]
) -> nn.Conv2d:
    padding = (window[0] // 2, window[1] // 2)
    return nn.Conv2d(channels, out_channels, window, stride, padding, groups=groups, bias=False, **factory)


class MulticeptionConv2d(_PartsBlock):
    """Depthwise convolutions of several sizes, each over all channels, side by side; then a pointwise one.

        y = act(norm(pw(dw_norm(cat_k dw[k](x)))))

    The stride is pw's: dw and dw_norm see maps of stride 1. In eval one kernel computes only the strided positions, and
    the concatenation is never in memory. In training dw_norm's statistics cover the whole maps, without storing them;
    the kernel recomputes the strided positions; a trailing batch norm runs as torch's on its output.

    With one kernel size it is still this block, with the batch norm between and the stride on pw: it is not
    `FusedDSConv`, although the paper calls it DSConv then.

    The sub-modules dw (a list), dw_norm, pw, norm and act are ordinary modules (nn.Identity where absent). It has
    C * sum(k * k) weights in dw and len(kernel_sizes) * C * K in pw; the paper's Eq. 6, 3 C (sum(k * k) + K), counts
    the first three times.

    Args:
        in_channels: C.
        out_channels: K.
        kernel_sizes: odd ints or pairs (height, width); one may come twice (the authors' last stage has 3 and 3).
        stride: of the pointwise convolution.
        bias: the pointwise convolution gets a bias.
        dw_norm, norm: None or a factory called with the channel count.
        act: None, an activation's name, a module, or a module class, behind norm.
        backend: as in `effops.functional`.

    Shape:
        [N, C, H, W] -> [N, K, P, Q] with P = (H - 1) // stride + 1.

    Raises:
        TypeError, ValueError: an argument of a wrong kind or value.

    Bao, Graeber and Wang, "Depthwise Multiception Convolution for Reducing Network Parameters without Sacrificing
    Accuracy", section III and Algorithm 1; the stride and the biases as in the authors' code.

    Example:
        >>> block, x = effops.MulticeptionConv2d(16, 32, (3, 5, 7), stride=2).eval(), torch.randn(1, 16, 9, 9)
        >>> parts = torch.cat([dw(x) for dw in block.dw], 1)
        >>> stock = block.norm(block.pw(block.dw_norm(parts)))
        >>> block(x).shape, torch.allclose(block(x), stock, atol=1e-5)
        (torch.Size([1, 32, 5, 5]), True)
    """

    _function = staticmethod(EF.multiception_conv2d)

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_sizes: Sequence[IntOrPair] = (3, 5, 7),
        stride: IntOrPair = 1,
        *,
        bias: bool = True,
        dw_norm: ModuleFactory | None = nn.BatchNorm2d,
        norm: ModuleFactory | None = nn.BatchNorm2d,
        act: ActivationLike = None,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        where = type(self).__name__
        factory = {"device": device, "dtype": dtype}
        check_int(where, "in_channels", in_channels)
        check_int(where, "out_channels", out_channels)
        windows = _windows(where, kernel_sizes)
        stride = check_pair(where, "stride", stride)
        mid = len(windows) * in_channels
        self._assemble(
            [_convolution(in_channels, in_channels, in_channels, window, 1, factory) for window in windows],
            make_norm(where, "dw_norm", dw_norm, mid, factory),
            nn.Conv2d(mid, out_channels, 1, stride, bias=bias, **factory),
            make_norm(where, "norm", norm, out_channels, factory),
            make_activation(where, "act", act),
            backend,
        )

    def _inputs(self, input: Tensor) -> Sequence[Tensor]:
        return [input] * len(self.dw)


class MixConv2d(_PartsBlock):
    """Depthwise convolutions of several sizes, each over channels of its own; then a pointwise one.

        y = act(norm(pw(dw_norm(cat_i dw[i](x_i)))))

    x_i are consecutive channels: C // n for each of the n sizes, the remainder to the first. The stride is dw's. In
    eval it is one kernel; in training as `MulticeptionConv2d`.

    dense=True is what Multiception's authors ran under this name: dense convolutions from group to group, C // n to
    K // n channels each, no pointwise convolution behind. Those run as torch's, and `fusion_reasons()` says so.

    Args:
        in_channels: C, at least one for each size.
        out_channels: K.
        kernel_sizes: odd ints or pairs (height, width).
        stride: of the depthwise convolutions.
        dense: the dense form: no pw, no dw_norm.
        bias: the pointwise convolution gets a bias.
        dw_norm, norm: None or a factory called with the channel count.
        act: None, an activation's name, a module, or a module class, behind norm.
        backend: as in `effops.functional`.

    Shape:
        [N, C, H, W] -> [N, K, P, Q] with P = (H - 1) // stride + 1.

    Raises:
        TypeError, ValueError: an argument of a wrong kind or value; dw_norm together with dense.

    MixConv (arXiv 1907.09595, section 3).

    Example:
        >>> block, x = effops.MixConv2d(16, 32, (3, 5, 7)), torch.randn(1, 16, 9, 9)
        >>> [dw.in_channels for dw in block.dw]
        [6, 5, 5]
        >>> parts = [dw(part) for dw, part in zip(block.dw, x.split((6, 5, 5), 1))]
        >>> torch.allclose(block(x), block.pw(torch.cat(parts, 1)), atol=1e-5)
        True
    """

    _function = staticmethod(EF.mix_conv2d)

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_sizes: Sequence[IntOrPair] = (3, 5, 7),
        stride: IntOrPair = 1,
        *,
        dense: bool = False,
        bias: bool = True,
        dw_norm: ModuleFactory | None = None,
        norm: ModuleFactory | None = None,
        act: ActivationLike = None,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        where = type(self).__name__
        factory = {"device": device, "dtype": dtype}
        windows = _windows(where, kernel_sizes)
        stride = check_pair(where, "stride", stride)
        check_int(where, "in_channels", in_channels, len(windows))
        check_int(where, "out_channels", out_channels, len(windows) if dense else 1)
        if dense and dw_norm is not None:
            raise ValueError(f"{where}: dense=True has no depthwise convolutions for dw_norm; give norm")
        inputs = _split(in_channels, len(windows))
        outputs = _split(out_channels, len(windows)) if dense else inputs
        self._assemble(
            [
                _convolution(c, k, 1 if dense else c, window, stride, factory)
                for c, k, window in zip(inputs, outputs, windows, strict=True)
            ],
            make_norm(where, "dw_norm", dw_norm, in_channels, factory),
            nn.Identity() if dense else nn.Conv2d(in_channels, out_channels, 1, bias=bias, **factory),
            make_norm(where, "norm", norm, out_channels, factory),
            make_activation(where, "act", act),
            backend,
        )
        self.dense = dense

    def _inputs(self, input: Tensor) -> Sequence[Tensor]:
        return input.split([convolution.in_channels for convolution in self.dw], 1)

    def fusion_reasons(self) -> tuple[str, ...]:
        """As of every block; of the dense form, that it is not one for the kernels."""
        if self.dense:
            return ("dense=True: the groups are dense convolutions, which run as torch's",)
        return super().fusion_reasons()

    def _fuses(self) -> bool:
        return not self.dense and super()._fuses()


def _split(channels: int, parts: int) -> list[int]:
    """An even share for each, the remainder to the first."""
    share = channels // parts
    return [channels - share * (parts - 1), *[share] * (parts - 1)]
