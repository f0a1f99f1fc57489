"""VGNet's blocks (arXiv 2207.10318, section 4)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import effops.functional as EF
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
from effops.modules.dwconv import FixedFilterConv2d, kernels_of
from effops.modules.se import SqueezeExcite
from effops.ops.dwconv import banks

Pair = tuple[Tensor, Tensor]


def _as_pair_state(where: str, state: object) -> Pair:
    if isinstance(state, (tuple, list)) and len(state) == 2 and all(isinstance(half, Tensor) for half in state):
        return state[0], state[1]
    raise TypeError(f"{where}: the input must be a pair (left, right) of tensors, got {type(state).__name__}")


class _VGNetBlock(FusedBlock):
    """What both blocks share: what makes the new channels, new = se(norm(act(pw(...)))), and what runs it."""

    _tail = (("act", why_not_act), ("norm", why_not_norm))
    _fixed_filter: type[FixedFilterConv2d] = FixedFilterConv2d

    def _stages(self) -> list[Stage]:
        """What follows the pointwise convolution and may go into its kernel."""
        parts = self._modules
        return [Stage("act", parts["act"]), last_norm_stage(parts["norm"], self.backend)]

    def _excites(self) -> bool:
        se = self._modules["se"]
        return type(se) is not nn.Identity or tampered(se) is not None

    def _pools(self, epilogue: dict[str, Any], rest: Sequence[Stage]) -> bool:
        """Whether the kernel takes the sums that the squeeze-excite wants: of what it stores, if that is the result."""
        se = self._modules["se"]
        return not rest and "batch_norm" not in epilogue and type(se) is SqueezeExcite and tampered(se) is None

    def _finished(self, new: Tensor, rest: Sequence[Stage], sums: Iterable[Tensor] = ()) -> Tensor:
        """The new channels behind the kernel: the stages that it did not take, and the squeeze-excite."""
        new = run_stages(new, rest)
        return self.se(new, *sums) if self._excites() else new

    def _new(self, z: Tensor) -> Tensor:
        """The new channels by the sub-modules, one by one."""
        return self.se(self.norm(self.act(self.pw(z))))


class HalfIdentityBlock(_VGNetBlock):
    """(L, R) -> (R, se(norm(act(pw(cat[L, dw_norm(dw(R))]))))): VGNet's half-identity block (arXiv 2207.10318, 4).

    Half of the channels go through a depthwise convolution, the others through nothing; the pointwise convolution reads
    both where they lie, so neither the concatenation nor the depthwise result goes to memory. In training dw_norm's
    statistics are taken from the depthwise convolution without storing its result. A squeeze-excite takes the sums that
    it needs over from the kernel, where no batch statistics come between.

    Args:
        channels: of both halves together; even.
        kernel_size: of the depthwise convolution, odd.
        bank: fixed kernels in the place of learned ones, as in `FixedFilterConv2d`; kernel_size is then the bank's.
        dw_norm: None or a factory called with channels / 2, behind the depthwise convolution: the authors' code has a
            batch norm behind fixed kernels, and only there; the paper mentions none.
        norm: None or a factory called with channels / 2, such as `nn.BatchNorm2d`.
        act: as in `FusedDSConv`.
        se: None, or a factory called with channels / 2, such as `effops.SqueezeExcite`: on the new channels.
        backend: as in `effops.functional`.

    Shape:
        pair of [N, channels / 2, H, W] -> pair of [N, channels / 2, H, W].

    Raises:
        TypeError, ValueError: an argument of a wrong kind or value; odd channels; one value per channel in training
            with dw_norm.

    Example:
        >>> block, x = effops.HalfIdentityBlock(32).eval(), torch.randn(1, 32, 9, 9)
        >>> left, right = x.chunk(2, 1)
        >>> kept, new = block((left, right))
        >>> stock = block.norm(block.act(block.pw(torch.cat([left, block.dw(right)], 1))))
        >>> torch.equal(kept, right), torch.allclose(new, stock, atol=1e-5)
        (True, True)
    """

    _head = (("dw", why_not_dw), ("dw_norm", why_not_norm), ("pw", why_not_pw))

    def __init__(
        self,
        channels: int,
        kernel_size: IntOrPair = 3,
        *,
        bank: str | Tensor | None = None,
        dw_norm: ModuleFactory | None = None,
        norm: ModuleFactory | None = nn.BatchNorm2d,
        act: ActivationLike = "relu",
        se: ModuleFactory | None = None,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        where = type(self).__name__
        if check_int(where, "channels", channels) % 2:
            raise ValueError(f"{where}: channels must be even, got {channels}")
        kernel = check_pair(where, "kernel_size", kernel_size)
        padding = check_padding(where, None, kernel, (1, 1))
        factory = {"device": device, "dtype": dtype}
        half = channels // 2
        if bank is None:
            self.dw = nn.Conv2d(half, half, kernel, padding=padding, groups=half, bias=False, **factory)
        else:
            self.dw = self._fixed_filter(half, bank, **factory)
        self.dw_norm = make_norm(where, "dw_norm", dw_norm, half, factory)
        self.pw = nn.Conv2d(channels, half, 1, bias=False, **factory)
        self.act = make_activation(where, "act", act)
        self.norm = make_norm(where, "norm", norm, half, factory)
        self.se = make_norm(where, "se", se, half, factory)
        self.backend = backend

    def forward(self, state: Pair) -> Pair:
        """(left, right) -> (right, new)."""
        left, right = _as_pair_state(type(self).__name__, state)
        parts = self._modules
        dw, dw_norm, pw = parts["dw"], parts["dw_norm"], parts["pw"]
        # An empty batch has no statistics; torch lets it pass.
        if not self._fuses() or (len(right) == 0 and takes_batch_statistics(dw_norm)):
            return self._forward_unfused(left, right)
        between = {} if type(dw_norm) is nn.Identity else self._between(right)
        stages = self._stages()
        epilogue, fused = fill_epilogue(stages)
        rest = stages[fused:]
        right, new, *sums = EF.half_identity2d(
            left,
            right,
            kernels_of(dw),
            pw.weight,
            dw.bias,
            pw.bias,
            dw.padding,
            **between,
            **epilogue,
            pool=self._pools(epilogue, rest),
            backend=self.backend,
        )
        return right, self._finished(new, rest, sums)

    def _between(self, right: Tensor) -> dict[str, Tensor]:
        """dw_norm's scale and shift for the kernel; in training on this batch, without dw's result in memory."""
        dw, dw_norm = self._modules["dw"], self._modules["dw_norm"]
        affine = norm_stage(dw_norm, self.backend).affine or self._statistics(right, dw, dw_norm)
        return {"dw_scale": affine[0], "dw_shift": affine[1]}

    def _statistics(self, right: Tensor, dw: nn.Module, dw_norm: nn.BatchNorm2d) -> Affine:
        check_batch_size(right.numel() // right.shape[1], right.shape)
        mean, var = EF.depthwise_stats2d(
            right, kernels_of(dw), dw.bias, dw.stride, dw.padding, dw.dilation, backend=self.backend
        )
        update_running_statistics(dw_norm, mean, var, right.numel() // right.shape[1])
        return affine_of(dw_norm, mean, var)

    def _forward_unfused(self, left: Tensor, right: Tensor) -> Pair:
        return right, self._new(torch.cat([left, self.dw_norm(self.dw(right))], 1))


class DownsamplingBlock(_VGNetBlock):
    """x -> halves of cat[y[-keep:], se(norm(act(pw(y))))], y = dw(x): VGNet's downsampling (arXiv 2207.10318, 4).

    keep = min(out_channels // 2, in_channels), 0 where in_channels > out_channels: the last channels of the depthwise
    result are kept as they are, the pointwise convolution makes the others. The kernel writes both into one tensor; a
    squeeze-excite, which scales the new channels alone, is called on that part of it.

    Args:
        in_channels: C.
        out_channels: of both halves together; even.
        stride: of the depthwise convolution.
        blur: a fixed Gaussian as the depthwise convolution, or a learned 3x3; None is True unless stride is 1 (VGNet).
        sigma: of the Gaussian, rounded to 4 decimals as VGNet's authors print it.
        alternate_sign: odd channels get the negated Gaussian (the code of VGNet's first release).
        norm, act, se, backend: as in `HalfIdentityBlock`; called with the number of new channels.

    Shape:
        [N, C, H, W], or a pair of halves of it, -> pair of [N, out_channels / 2, P, Q].

    Raises:
        TypeError, ValueError: an argument of a wrong kind or value; odd out_channels.

    Example:
        >>> block = effops.DownsamplingBlock(28, 56).eval()
        >>> left, right = block(torch.randn(1, 28, 112, 112))
        >>> block.keep, left.shape, right.shape
        (28, torch.Size([1, 28, 56, 56]), torch.Size([1, 28, 56, 56]))
    """

    _head = (("dw", why_not_dw), ("pw", why_not_pw))

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
        se: ModuleFactory | None = None,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        where = type(self).__name__
        check_int(where, "in_channels", in_channels)
        if check_int(where, "out_channels", out_channels) % 2:
            raise ValueError(f"{where}: out_channels must be even, got {out_channels}")
        stride = check_pair(where, "stride", stride)
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
        self.norm = make_norm(where, "norm", norm, new, factory)
        self.se = make_norm(where, "se", se, new, factory)
        self.backend = backend

    def forward(self, input: Tensor | Pair) -> Pair:
        """[N, C, H, W], or (left, right), -> (left, right)."""
        if not isinstance(input, Tensor):
            input = torch.cat(_as_pair_state(type(self).__name__, input), 1)
        if not self._fuses():
            return self._forward_unfused(input)
        parts = self._modules
        dw, pw = parts["dw"], parts["pw"]
        stages = self._stages()
        epilogue, fused = fill_epilogue(stages)
        rest = stages[fused:]
        pool = self._pools(epilogue, rest)
        output = EF.downsampling2d(
            input,
            kernels_of(dw),
            pw.weight,
            dw.bias,
            pw.bias,
            dw.stride,
            dw.padding,
            keep=self.keep,
            **epilogue,
            pool=pool,
            backend=self.backend,
        )
        output, *sums = output if pool else (output,)
        if not rest and not self._excites():
            return output.chunk(2, 1)
        kept, new = output[:, : self.keep], output[:, self.keep :]
        return self._halves(kept, self._finished(new, rest, sums))

    def _forward_unfused(self, input: Tensor) -> Pair:
        y = self.dw(input)
        return self._halves(y[:, y.shape[1] - self.keep :], self._new(y))

    @staticmethod
    def _halves(kept: Tensor, new: Tensor) -> Pair:
        """cat[kept, new] cut in two; equal halves need no concatenation."""
        if kept.shape[1] == new.shape[1]:
            return kept, new
        return torch.cat([kept, new], 1).chunk(2, 1)

    def extra_repr(self) -> str:
        return ", ".join([f"keep={self.keep}", *filter(None, [super().extra_repr()])])
