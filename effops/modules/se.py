"""Squeeze-excite."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import effops.functional as EF
from effops.modules._arguments import ActivationLike, check_int, make_activation
from effops.modules._fusion import activation_of, tampered
from effops.ops.epilogue import activate
from effops.ops.se.reference import GATES, SLOPE


def make_divisible(channels: float, divisor: int = 8) -> int:
    """The nearest multiple of `divisor` (at least that) that is not more than 10 % below."""
    rounded = max(divisor, int(channels + divisor / 2) // divisor * divisor)
    return rounded if rounded >= 0.9 * channels else rounded + divisor


class SqueezeExcite(nn.Module):
    """y = x * gate(expand(act(reduce(mean of x over height and width)))), as one kernel.

    `reduce` and `expand` are ordinary 1x1 convolutions. Their width in published networks:

    * VGNet (arXiv 2207.10318): the default, `make_divisible(channels * 0.25)`, biases, ReLU, sigmoid.
    * MobileNetV3 (arXiv 1905.02244): the same with gate="hardsigmoid".
    * mosaicml's, which "Nuts & Bolts" (arXiv 2205.12050) uses: reduced_channels=2, bias=False.
    * EfficientNet (arXiv 1905.11946): reduced_channels of a quarter of the block's input, act="silu".

    Args:
        channels: C.
        reduced_channels: between the products; None for `make_divisible(channels * ratio)`.
        ratio: of the products' inner width to C, where reduced_channels is None.
        bias: both products have one.
        act: the name of an activation or a module, between the products.
        gate: "sigmoid" or "hardsigmoid".
        backend: as in `effops.functional`.

    Shape:
        [N, C, H, W] -> [N, C, H, W].

    Raises:
        TypeError, ValueError: an argument of a wrong kind or value.

    Squeeze-and-Excitation Networks (arXiv 1709.01507, 3).

    Example:
        >>> se, x = effops.SqueezeExcite(64), torch.randn(1, 64, 9, 9)
        >>> gates = torch.sigmoid(se.expand(se.act(se.reduce(x.mean((2, 3), keepdim=True)))))
        >>> se.reduce.out_channels, torch.allclose(se(x), x * gates, atol=1e-6)
        (16, True)
    """

    def __init__(
        self,
        channels: int,
        reduced_channels: int | None = None,
        *,
        ratio: float = 0.25,
        bias: bool = True,
        act: ActivationLike = "relu",
        gate: str = "sigmoid",
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        where = type(self).__name__
        check_int(where, "channels", channels)
        if reduced_channels is None:
            if not ratio > 0:
                raise ValueError(f"{where}: ratio must be above 0, got {ratio!r}")
            reduced_channels = make_divisible(channels * ratio)
        check_int(where, "reduced_channels", reduced_channels)
        if gate not in GATES:
            raise ValueError(f"{where}: unknown gate {gate!r}; accepted: {', '.join(GATES)}")
        factory = {"device": device, "dtype": dtype}
        self.reduce = nn.Conv2d(channels, reduced_channels, 1, bias=bias, **factory)
        self.act = make_activation(where, "act", act)
        self.expand = nn.Conv2d(reduced_channels, channels, 1, bias=bias, **factory)
        self.gate = gate
        self.backend = backend

    def fusion_reasons(self) -> tuple[str, ...]:
        """Why the sub-modules do not run as one kernel; empty where they do."""
        reasons = []
        for name in ("reduce", "expand"):
            module = self._modules[name]
            if type(module) is not nn.Conv2d:
                reasons.append(f"{name} is {type(module).__name__}, not a plain Conv2d")
        known = activation_of(self.act)
        if known is None or (known[0] == "leaky_relu" and known[1] != SLOPE):
            reasons.append(f"act is {self.act!r}, which the kernels do not know")
        for name in ("reduce", "act", "expand"):
            why = tampered(self._modules[name])
            if why:
                reasons.append(f"{name} {why}")
        return tuple(reasons)

    def arguments(self, prefix: str = "") -> dict:
        """The keyword arguments of `squeeze_excite2d`, or with `prefix` those of a function that has them so."""
        named = {
            "reduce_weight": self.reduce.weight,
            "reduce_bias": self.reduce.bias,
            "expand_weight": self.expand.weight,
            "expand_bias": self.expand.bias,
            "activation": activation_of(self.act)[0],
            "gate": self.gate,
        }
        return {prefix + name: value for name, value in named.items()}

    def forward(self, input: Tensor, sums: Tensor | None = None) -> Tensor:
        """[N, C, H, W] -> [N, C, H, W].

        Args:
            input: the map.
            sums: its sums over each image, [N, C], where its producer took them: see `squeeze_excite2d`.
        """
        if self.fusion_reasons():
            return self._forward_unfused(input)
        return EF.squeeze_excite2d(input, **self.arguments(), sums=sums, backend=self.backend)

    def _forward_unfused(self, input: Tensor) -> Tensor:
        gates = self.expand(self.act(self.reduce(input.mean((2, 3), keepdim=True))))
        return input * activate(gates, GATES[self.gate], SLOPE)

    def extra_repr(self) -> str:
        reasons = self.fusion_reasons()
        return f"gate={self.gate!r}" + (f", not fused: {'; '.join(reasons)}" if reasons else "")
