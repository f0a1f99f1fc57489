"""Problems larger than one operator: whole models (eager forward) and a half-identity block's forward + backward.

Rivals get in-place ReLUs, which stock networks use and which are faster; modules and weights are otherwise the same.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import torch
from torch import nn

from benchmarks import gate
from benchmarks.problems import FORMATS, BSProblem, depthwise64, pointwise64
from benchmarks.shapes import MODEL_SIZE, BSCase


def in_place(model: nn.Module) -> nn.Module:
    """The model with its ReLUs in place, as stock networks have them."""
    for module in model.modules():
        if isinstance(module, nn.ReLU | nn.ReLU6):
            module.inplace = True
    return model


class ModelProblem:
    """A registered model at 224x224 with seeded random weights, as stock PyTorch and as effops, eval mode."""

    def __init__(
        self, name: str, batch: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> None:
        import effops

        torch.manual_seed(0)
        self._effops = effops.create_model(name).eval().requires_grad_(False)
        spread_statistics(self._effops)
        self._stock = effops.create_model(name, reference=True).eval().requires_grad_(False)
        self._stock.load_state_dict(self._effops.state_dict())
        self._x = torch.randn(batch, 3, MODEL_SIZE, MODEL_SIZE)
        self._effops, self._stock = self._effops.to(device, dtype), self._stock.to(device, dtype)
        self._x = self._x.to(device, dtype)
        self._ends = (
            self._x if batch == 1 else self._x[[0, -1]]
        )  # float64 models are slow: the first and the last image

    def stock(self, variant: str) -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
        model = in_place(copy.deepcopy(self._stock)).to(memory_format=FORMATS[variant])
        return model, (self._x.contiguous(memory_format=FORMATS[variant]),)

    def effops(self, variant: str, backend: str = "auto") -> Callable[[], torch.Tensor]:
        import effops

        model = copy.deepcopy(self._effops).to(memory_format=FORMATS[variant])
        x = self._x.contiguous(memory_format=FORMATS[variant])
        if backend == "auto":
            return lambda: model(x)

        def on_backend() -> torch.Tensor:
            with effops.use_backend(backend):
                return model(x)

        return on_backend

    def check(self, fn: Callable[[], torch.Tensor], variant: str, own: bool) -> dict | None:
        """The logits against the stock model in float64."""
        truth = copy.deepcopy(self._stock).double()(self._ends.double())
        out = fn()
        out = out if len(out) == 1 else out[[0, -1]]
        if own:
            stock, _ = self.stock(variant)
            yardstick = stock(self._ends.contiguous(memory_format=FORMATS[variant]))
            if out.dtype in (torch.float16, torch.bfloat16):
                return gate.check_norm(out, yardstick, truth, "logits", gate.NORM_BOUND[out.dtype])
            return gate.check(out, yardstick, truth, "logits")
        gate.check_rival(out, truth, "logits")
        return None

    def macs(self) -> int:
        """Multiply-adds of convolutions and linear layers, counted on the stock model."""
        from torch.utils.flop_counter import FlopCounterMode

        counter = FlopCounterMode(display=False)
        with torch.no_grad(), counter:
            self._stock(self._x[:1])
        return counter.get_total_flops() // 2 * len(self._x)


def spread_statistics(model: nn.Module) -> None:
    """Running statistics other than 0 and 1, so that a folded BatchNorm that is wrong shows."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)


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


class BlueprintTraining:
    """A BSConvU with bias, forward + backward to every leaf; and what it saves for backward."""

    def __init__(self, case: BSCase, batch: int) -> None:
        self._problem = BSProblem(case, batch)
        shape = (batch, case.out, case.out_size, case.out_size)
        self._grad = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        self._truth: tuple[torch.Tensor, ...] | None = None

    def _module(self, peer: str, variant: str) -> nn.Module:
        from effops import modules, stock

        case, kind = self._problem.case, modules.BSConvU if peer == "effops" else stock.BSConvU
        module = kind(case.channels, case.out, case.kernel, case.stride, case.kernel // 2)
        problem = self._problem
        module.load_state_dict({"pw.weight": problem.pw_weight, "dw.weight": problem.bank, "dw.bias": problem.bias})
        return module.train().to(memory_format=FORMATS[variant])

    def _step(self, peer: str, variant: str) -> Callable[[], tuple[torch.Tensor, ...]]:
        module = self._module(peer, variant)
        x, grad = (t.contiguous(memory_format=FORMATS[variant]) for t in (self._problem.x, self._grad))
        x.requires_grad_()
        leaves = [x, *module.parameters()]

        def step() -> tuple[torch.Tensor, ...]:
            y = module(x)
            return (y.detach(), *torch.autograd.grad(y, leaves, grad))

        return step

    def candidates(self, peer: str) -> Iterator[tuple[str, Callable[[], object]]]:
        for variant in FORMATS:
            yield variant, self._step(peer, variant)

    def _truth64(self) -> tuple[torch.Tensor, ...]:
        """The output and the gradients of input, pointwise weight, depthwise weight and bias, in float64."""
        problem = self._problem
        leaves = [t.double().requires_grad_() for t in (problem.x, problem.pw_weight, problem.bank, problem.bias)]
        x, pw, dw, bias = leaves
        y = depthwise64(pointwise64(x, pw), dw, problem.case.stride) + bias.view(1, -1, 1, 1)
        return (y.detach(), *torch.autograd.grad(y, leaves, self._grad.double()))

    def check(self, fn: Callable[[], tuple[torch.Tensor, ...]], variant: str, own: bool) -> dict | None:
        """The output and every gradient; the worst share of the budget is returned."""
        if self._truth is None:
            self._truth = self._truth64()
        names, outs = ("output", "input", "pw.weight", "dw.weight", "dw.bias"), fn()
        if not own:
            for name, out, truth in zip(names, outs, self._truth, strict=True):
                gate.check_rival(out, truth, name)
            return None
        torchs = self._step("eager", variant)()
        every = zip(names, outs, torchs, self._truth, strict=True)
        results = [gate.check(out, yardstick, truth, name) for name, out, yardstick, truth in every]
        return max(results, key=lambda result: result["error"] / result["allowed"])

    def saved_bytes(self, peer: str, variant: str) -> int:
        """Unique bytes that autograd keeps for backward, parameters apart."""
        module = self._module(peer, variant)
        x = self._problem.x.contiguous(memory_format=FORMATS[variant]).requires_grad_()
        return saved_bytes(lambda: module(x), list(module.parameters()))


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
