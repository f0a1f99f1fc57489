"""Forward + backward: VGNet's half-identity block, and the modules one by one; and what they save for backward.

Rivals get in-place ReLUs, which stock networks use and which are faster; modules and weights are otherwise the same.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

from benchmarks import gate, peak_memory
from benchmarks.networks import in_place
from benchmarks.problems import FORMATS, depthwise64, pointwise64

# No pre-activation this close to ReLU's kink, where float32 and float64 may disagree about the gradient.
_KINK_DISTANCE = 1.5e-6


class TrainingProblem:
    """A VGNet half-identity block (dw, cat, pw, ReLU, training BatchNorm), forward + backward to every leaf."""

    CHAIN = 4

    def __init__(self, channels: int, size: int, batch: int) -> None:
        self._channels = channels
        half = channels // 2
        for seed in range(1000):
            generator = torch.Generator().manual_seed(seed)

            def draw(*shape: int, scale: float = 1.0, generator: torch.Generator = generator) -> torch.Tensor:
                return torch.randn(*shape, generator=generator) * scale

            self._left, self._right = draw(batch, half, size, size), draw(batch, half, size, size)
            self._state = {
                "dw.weight": draw(half, 1, 3, 3, scale=1 / 3),
                "pw.weight": draw(half, channels, 1, 1, scale=channels**-0.5),
                "norm.weight": 1 + draw(half, scale=0.1),
                "norm.bias": draw(half, scale=0.1),
            }
            self._grad = draw(batch, half, size, size)
            left, right = self._left.double(), self._right.double()
            if _preactivation(left, right, *self._weights64()).abs().min() > _KINK_DISTANCE:
                break
        self._truth: tuple[torch.Tensor, ...] | None = None

    def _weights64(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self._state["dw.weight"].double(), self._state["pw.weight"].double()

    def _truth64(self) -> tuple[torch.Tensor, ...]:
        """The new half and the gradients of left, right and the parameters, in float64 from the definition."""
        tensors = (self._left, self._right, *self._state.values())
        leaves = [tensor.double().requires_grad_() for tensor in tensors]
        left, right, dw, pw, gamma, beta = leaves
        v = torch.relu(_preactivation(left, right, dw, pw))
        mean = v.mean((0, 2, 3), keepdim=True)
        var = v.var((0, 2, 3), unbiased=False, keepdim=True)
        new = (v - mean) * (var + 1e-5).rsqrt() * gamma.view(1, -1, 1, 1) + beta.view(1, -1, 1, 1)
        return (new.detach(), *torch.autograd.grad(new, leaves, self._grad.double()))

    def _block(self, kind: type[nn.Module], variant: str) -> nn.Module:
        block = kind(self._channels)
        block.load_state_dict(self._state, strict=False)
        return block.train().to(memory_format=FORMATS[variant])

    def _step(self, block: nn.Module, variant: str) -> Callable[[], tuple[torch.Tensor, ...]]:
        formatted = [x.contiguous(memory_format=FORMATS[variant]) for x in (self._left, self._right, self._grad)]
        left, right, grad = formatted[0].requires_grad_(), formatted[1].requires_grad_(), formatted[2]
        parameters = dict(block.named_parameters())
        leaves = [left, right, *(parameters[name] for name in self._state)]

        def step() -> tuple[torch.Tensor, ...]:
            _, new = block((left, right))
            return (new.detach(), *torch.autograd.grad(new, leaves, grad))

        return step

    def kind(self, peer: str) -> type[nn.Module]:
        """The block's class: ours, or the stock twin."""
        from effops import modules, stock

        return modules.HalfIdentityBlock if peer == "effops" else stock.HalfIdentityBlock

    def candidates(self, peer: str) -> Iterator[tuple[str, Callable[[], object]]]:
        for variant in FORMATS:
            block = self._block(self.kind(peer), variant)
            yield variant, self._step(block if peer == "effops" else in_place(block), variant)

    def check(self, fn: Callable[[], tuple[torch.Tensor, ...]], variant: str, own: bool) -> dict | None:
        """The output and every gradient; the worst share of the budget is returned.

        The trailing BatchNorm is torch's on both sides, and in channels_last its training statistics are off by up to
        4e-5 (plain float32 sums), above the norm bound: where torch's own norm is worse than half the bound, twice
        torch's counts.
        """
        if self._truth is None:
            self._truth = self._truth64()
        names = ("new", "left", "right", *self._state)
        outs = fn()
        if not own:
            for name, out, truth in zip(names, outs, self._truth, strict=True):
                gate.check_rival(out, truth, name)  # ten times the norm bound: its channels_last BatchNorm passes
            return None
        stock = self._step(self._block(self.kind("eager"), variant), variant)()
        results = []
        for name, out, yardstick, truth in zip(names, outs, stock, self._truth, strict=True):
            bound = max(gate.NORM_BOUND[out.dtype], 2 * gate.relative_norm(yardstick, truth))
            results.append(gate.check(out, yardstick, truth, name, bound))
        return max(results, key=lambda result: result["error"] / result["allowed"])

    def saved_bytes(self, peer: str, variant: str) -> int:
        """Unique bytes that autograd keeps for backward over a chain of four blocks, parameters and buffers apart."""
        blocks = nn.Sequential(*(self._block(self.kind(peer), variant) for _ in range(self.CHAIN)))
        if peer != "effops":
            in_place(blocks)
        state = tuple(x.contiguous(memory_format=FORMATS[variant]).requires_grad_() for x in (self._left, self._right))
        return saved_bytes(lambda: blocks(state), [*blocks.parameters(), *blocks.buffers()])


class Trained(NamedTuple):
    """A module that is trained: its maker, which takes `effops.modules` or `effops.stock`, and its input's shape."""

    make: Callable[[Any], nn.Module]
    channels: int
    size: int


# One of each kind, at the sizes of the networks they are from.
MODULES: dict[str, Trained] = {
    "inverted_residual-24-144-56": Trained(lambda m: m.InvertedResidual(24, 24), 24, 56),
    "inverted_residual-64-384-14": Trained(lambda m: m.InvertedResidual(64, 64), 64, 14),
    "multiception-16-32-k357": Trained(lambda m: m.MulticeptionConv2d(16, 16), 16, 32),
    "multiception-64-8-k33": Trained(lambda m: m.MulticeptionConv2d(64, 64, (3, 3)), 64, 8),
    "bsconv_u-16-16-32": Trained(lambda m: m.BSConvU(16, 16, 3, padding=1), 16, 32),
    "bsconv_u-128-128-56": Trained(lambda m: m.BSConvU(128, 128, 3, padding=1), 128, 56),
    "bsconv_s-64-64-32": Trained(lambda m: m.BSConvS(64, 64, 3, padding=1), 64, 32),
    "separable-64-16": Trained(lambda m: m.SeparableConvPool2d(64, norm=nn.BatchNorm2d), 64, 16),
    "effnet_v1-64-128-16": Trained(lambda m: m.EffNetBlock(64, 128), 64, 16),
    "effnet_v2-64-128-16": Trained(lambda m: m.EffNetBlock(64, 128, version=2), 64, 16),
    "ds_conv-128-128-28": Trained(lambda m: m.FusedDSConv(128, 128), 128, 28),
    "shared_depthwise-56-56": Trained(lambda m: m.SharedDepthwiseConv2d(56, share=8, kernel_size=3, padding=1), 56, 56),
    "squeeze_excite-72-28": Trained(lambda m: m.SqueezeExcite(72), 72, 28),
    "blur_max_pool-56-56": Trained(lambda m: m.BlurMaxPool2d(), 56, 56),
}


Wrap = Callable[[nn.Module, torch.Tensor], Callable[[], torch.Tensor]]


def plain(module: nn.Module, x: torch.Tensor) -> Callable[[], torch.Tensor]:
    """Eager mode."""
    return lambda: module(x)


class ModuleTraining:
    """One module in training mode, forward + backward to its input and every parameter."""

    # A gradient has as many terms as the map has pixels, and a few of them flip where a rounding moves an argument
    # across a ReLU's kink. Wrong kernels are further off; the tests are the ones that look closely.
    BOUND = 2e-3

    def __init__(self, name: str, batch: int, device: torch.device | str = "cpu") -> None:
        from effops import modules, stock

        self.name = name
        trained = MODULES[name]
        torch.manual_seed(0)
        own, stock_twin = trained.make(modules), in_place(trained.make(stock))
        self._x = torch.randn(batch, trained.channels, trained.size, trained.size).to(device)
        with torch.no_grad():
            shape = copy.deepcopy(stock_twin).eval()(self._x[:1].cpu()).shape
        stock_twin.load_state_dict(own.state_dict())
        self._modules = {"effops": own.to(device), "stock": stock_twin.to(device)}
        self._grad = torch.randn(batch, *shape[1:]).to(device)
        self._truth: tuple[torch.Tensor, ...] | None = None

    def _module(self, peer: str, variant: str) -> nn.Module:
        module = copy.deepcopy(self._modules["effops" if peer == "effops" else "stock"])
        return module.train().to(memory_format=FORMATS[variant])

    def forward(self, peer: str, variant: str, wrap: Wrap = plain) -> Callable[[], torch.Tensor]:
        """The module alone, as `wrap` calls it."""
        return wrap(self._module(peer, variant), self._x.contiguous(memory_format=FORMATS[variant]))

    def step(self, peer: str, variant: str, wrap: Wrap = plain) -> Callable[[], tuple[torch.Tensor, ...]]:
        """The module and its gradients; `wrap` makes the call of the module."""
        x, grad = (t.contiguous(memory_format=FORMATS[variant]) for t in (self._x, self._grad))
        return _step(self._module(peer, variant), x, grad, wrap)

    def candidates(self, peer: str) -> Iterator[tuple[str, Callable[[], object]]]:
        for variant in FORMATS:
            yield variant, self.step(peer, variant)

    def check(
        self, fn: Callable[[], tuple[torch.Tensor, ...]], variant: str, own: bool, bound: float = BOUND
    ) -> dict | None:
        """The output and every gradient by their norm; the one nearest to its bound is returned."""
        if self._truth is None:
            double = copy.deepcopy(self._modules["stock"]).double().train()
            self._truth = _step(double, self._x.double(), self._grad.double(), plain)()
        names = ("output", "input", *(name for name, _ in self._modules["stock"].named_parameters()))
        every = zip(names, fn(), self.step("eager", variant)(), self._truth, strict=True)
        # A gradient that is zero but for rounding (a shift ahead of a norm) has no relative norm.
        results = [
            gate.check_norm(out, stock, truth, name, bound)
            for name, out, stock, truth in every
            if truth.abs().max() > 1e-6 * self._truth[0].abs().max()
        ]
        return max(results, key=lambda result: result["norm"] / result["allowed_norm"]) if own else None

    def saved_bytes(self, peer: str, variant: str) -> int:
        """Unique bytes that autograd keeps for backward, parameters and buffers apart."""
        module = self._module(peer, variant)
        x = self._x.contiguous(memory_format=FORMATS[variant]).requires_grad_()
        return saved_bytes(lambda: module(x), [*module.parameters(), *module.buffers()])

    def peak_bytes(self, peer: str, variant: str) -> int:
        """How far the memory of a process rises during the step."""
        return peak_memory.of_module(self.name, self._x.shape[0], peer, variant)


def _step(module: nn.Module, x: torch.Tensor, grad: torch.Tensor, wrap: Wrap) -> Callable[[], tuple[torch.Tensor, ...]]:
    x = x.detach().requires_grad_()
    leaves, call = [x, *module.parameters()], wrap(module, x)

    def step() -> tuple[torch.Tensor, ...]:
        y = call()
        return (y.detach(), *torch.autograd.grad(y, leaves, grad.to(y.dtype)))

    return step


def _preactivation(left: torch.Tensor, right: torch.Tensor, dw: torch.Tensor, pw: torch.Tensor) -> torch.Tensor:
    return pointwise64(torch.cat([left, depthwise64(right, dw, 1)], 1), pw)


def saved_bytes(forward: Callable[[], object], known: list[torch.Tensor]) -> int:
    """Bytes of the distinct storages that `forward` saves for backward, without those of the tensors in `known`."""
    storages: dict[int, int] = {}
    kept = []  # a freed storage's address could be given out again

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        kept.append(storage)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kept.append(forward())
    for tensor in known:
        storages.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(storages.values())
