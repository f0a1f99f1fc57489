"""What is measured on a GPU: problems of benchmarks/problems.py and networks.py, forward and forward + backward.

A task gives the call of a contestant and judges its result against float64. All rivals are stock PyTorch in
channels_last; `wrap(module, inputs)` makes a call of the stock module: eager, or compiled.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from benchmarks import gate, layers, networks, problems, shapes, training

Call = Callable[[], Any]
Wrap = Callable[[nn.Module, tuple[torch.Tensor, ...]], Call]
FORMAT = "channels_last"


def plain(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> Call:
    """Eager mode."""
    return lambda: module(*inputs)


def norm_bound(precision: str) -> float:
    """The relative norm allowed: TF32 keeps ten bits of a float32."""
    return gate.TF32_NORM_BOUND if precision == "tf32" else gate.NORM_BOUND[dtype_of(precision)]


def dtype_of(precision: str) -> torch.dtype:
    return torch.float32 if precision == "tf32" else getattr(torch, precision)


def use_precision(precision: str) -> None:
    """Switches TF32 on for "tf32" and off for everything else (torch's own default for convolutions is on)."""
    torch.backends.cudnn.allow_tf32 = precision == "tf32"
    torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"


class Forward:
    """A problem's forward, without gradients."""

    grad = False

    def __init__(self, problem: problems.DSProblem | problems.DWProblem, precision: str) -> None:
        self._problem, self._bound = problem, norm_bound(precision)

    def stock(self, wrap: Wrap) -> Call:
        return wrap(*self._problem.stock(FORMAT))

    def effops(self, backend: str) -> Call:
        return self._problem.effops(FORMAT, backend)

    forward = effops

    def check(self, fn: Call, own: bool, what: str) -> dict | None:
        problem, out = self._problem, fn()
        if own:
            return gate.check(out, problem.eager_result(FORMAT), problem.truth, what, self._bound)
        gate.check_rival(out, problem.truth, what, self._bound)
        return None

    def facts(self) -> dict[str, int]:
        return {"macs": self._problem.macs()}


_TENSORS = ("x", "left", "bank", "dw_bias", "pw_weight", "pw_bias", "scale", "shift")
_PARAMETERS = {  # of the stock module
    "bank": "dw.weight",
    "dw_bias": "dw.bias",
    "pw_weight": "pw.weight",
    "pw_bias": "pw.bias",
    "scale": "bn.weight",
    "shift": "bn.bias",
}


class ForwardBackward:
    """A chain's forward and the gradients of every input and parameter (learned kernels only).

    Inputs and weights are small integers, biases odd multiples of 1/4: the arguments of both ReLUs come out exact near
    zero in every dtype and summation order, so no rounding moves one across the kink and gradients can be compared.
    """

    grad = True

    def __init__(self, case: shapes.DSCase, batch: int, precision: str, device: torch.device) -> None:
        if case.bank != "learned":
            raise ValueError(f"{case.name}: forward + backward is measured with learned kernels, not {case.bank}")
        self._problem = problems.DSProblem(case, batch, dtype_of(precision), device)
        self._bound = norm_bound(precision)
        self._make_exact()
        shape = (batch, case.keep + case.out, case.out_size, case.out_size)
        # Scaled so that sums over all pixels stay far from float16's largest value.
        self._grad = (torch.randn(shape, device=device) / 64).to(self._problem.dtype)
        self._grad = self._grad.contiguous(memory_format=torch.channels_last)
        self._truth: tuple[torch.Tensor, ...] | None = None

    def _make_exact(self) -> None:
        p = self._problem
        generator = torch.Generator(p.device).manual_seed(0)

        def integers(like: torch.Tensor, most: int, offset: float = 0.0) -> torch.Tensor:
            drawn = torch.randint(-most, most + 1, like.shape, generator=generator, device=p.device)
            return (drawn + offset).to(p.dtype)

        p.x, p.bank, p.pw_weight = integers(p.x, 2), integers(p.bank, 2), integers(p.pw_weight, 1)
        if p.left is not None:
            p.left = integers(p.left, 2)
        if p.case.bias:
            p.dw_bias, p.pw_bias = integers(p.dw_bias, 2, 0.5), integers(p.pw_bias, 2, 0.25)
        for name in ("x", "left"):
            if getattr(p, name) is not None:
                setattr(p, name, getattr(p, name).contiguous(memory_format=torch.channels_last))
        for name in self._names():
            getattr(p, name).requires_grad_()

    def _names(self) -> list[str]:
        return [name for name in _TENSORS if getattr(self._problem, name) is not None]

    def _step(self, call: Call, leaves: list[torch.Tensor]) -> Call:
        def step() -> tuple[torch.Tensor, ...]:
            out = call()
            return (out.detach(), *torch.autograd.grad(out, leaves, self._grad))

        return step

    def stock(self, wrap: Wrap) -> Call:
        module, inputs = self._problem.stock(FORMAT)
        module.requires_grad_(True)
        parameters = dict(module.named_parameters())
        leaves = [*inputs, *(parameters[_PARAMETERS[name]] for name in self._names() if name in _PARAMETERS)]
        return self._step(wrap(module, inputs), leaves)

    def effops(self, backend: str) -> Call:
        leaves = [getattr(self._problem, name) for name in self._names()]
        return self._step(self.forward(backend), leaves)

    def forward(self, backend: str) -> Call:
        return self._problem.effops(FORMAT, backend)

    def _truth64(self) -> tuple[torch.Tensor, ...]:
        double = copy.copy(self._problem)
        for name in self._names():
            setattr(double, name, getattr(double, name).detach().double().requires_grad_())
        out = double._truth()
        leaves = [getattr(double, name) for name in self._names()]
        return (out.detach(), *torch.autograd.grad(out, leaves, self._grad.double()))

    def check(self, fn: Call, own: bool, what: str) -> dict | None:
        """Output and every gradient; of our own figures those nearest to their allowance are returned."""
        if self._truth is None:
            self._truth = self._truth64()
        names, outs = ["output", *self._names()], fn()
        if not own:
            for name, out, truth in zip(names, outs, self._truth, strict=True):
                gate.check_rival(out, truth, f"{what} {name}", self._bound)
            return None
        checked = []
        for name, out, stock, truth in zip(names, outs, self.stock(plain)(), self._truth, strict=True):
            bound = max(self._bound, 2 * gate.relative_norm(stock, truth))
            checked.append(gate.check(out, stock, truth, f"{what} {name}", bound))
        return max(checked, key=lambda figures: figures["error"] / max(figures["allowed"], 1e-300))

    def facts(self) -> dict[str, int]:
        return {"macs": 3 * self._problem.macs()}  # the products of the output, of dx and of dw


class BlockStep:
    """A module of benchmarks/training.py: output and all gradients; half precision by autocast."""

    grad = True

    def __init__(self, name: str, batch: int, precision: str, device: torch.device) -> None:
        self._problem = training.ModuleTraining(name, batch, device)
        self._precision, self._device = precision, device

    def _cast(self) -> contextlib.AbstractContextManager:
        dtype = dtype_of(self._precision)
        return contextlib.nullcontext() if dtype == torch.float32 else torch.autocast(self._device.type, dtype)

    def _under_autocast(self, call: Call) -> Call:
        def run() -> Any:
            with self._cast():
                return call()

        return run

    def stock(self, wrap: Wrap) -> Call:
        return self._under_autocast(self._problem.step("eager", FORMAT, lambda m, x: wrap(m, (x,))))

    def effops(self, backend: str) -> Call:
        return self._under_autocast(self._problem.step("effops", FORMAT, self._on(backend)))

    def forward(self, backend: str) -> Call:
        return self._under_autocast(self._problem.forward("effops", FORMAT, self._on(backend)))

    @staticmethod
    def _on(backend: str) -> Callable[[nn.Module, torch.Tensor], Call]:
        import effops

        def wrap(module: nn.Module, x: torch.Tensor) -> Call:
            def call() -> torch.Tensor:
                with effops.use_backend(backend):
                    return module(x)

            return (lambda: module(x)) if backend == "auto" else call

        return wrap

    def check(self, fn: Call, own: bool, what: str) -> dict | None:
        return self._problem.check(fn, FORMAT, own, max(self._problem.BOUND, 10 * norm_bound(self._precision)))

    def facts(self) -> dict[str, int]:
        return {}


class ModelForward:
    """A whole network in eval mode."""

    grad = False

    def __init__(self, name: str, batch: int, precision: str, device: torch.device) -> None:
        self._problem = networks.ModelProblem(name, batch, dtype_of(precision), device)

    def stock(self, wrap: Wrap) -> Call:
        return wrap(*self._problem.stock(FORMAT))

    def effops(self, backend: str) -> Call:
        return self._problem.effops(FORMAT, backend)

    forward = effops

    def check(self, fn: Call, own: bool, what: str) -> dict | None:
        return self._problem.check(fn, FORMAT, own)

    def facts(self) -> dict[str, int]:
        return {"macs": self._problem.macs()}


class ModelStep:
    """A whole network in training mode: logits and the gradients of all parameters; half precision by autocast."""

    grad = True

    def __init__(self, name: str, batch: int, precision: str, device: torch.device) -> None:
        import effops
        from effops.models.published import input_size

        torch.manual_seed(0)
        own = effops.create_model(name)
        stock = effops.create_model(name, reference=True)
        stock.load_state_dict(own.state_dict())
        self._models = {"effops": own, "stock": stock}
        for model in self._models.values():
            model.to(device, memory_format=torch.channels_last)
            for module in model.modules():
                if isinstance(module, nn.Dropout):
                    module.p = 0.0  # random numbers would differ from side to side
        x = torch.randn(batch, *input_size(name)[1:], device=device)
        self._x = x.contiguous(memory_format=torch.channels_last)
        self._grad = torch.randn(batch, own.num_classes, device=device) / batch
        self._precision, self._device, self._batch = precision, device, batch

    def _autocast(self) -> contextlib.AbstractContextManager:
        dtype = dtype_of(self._precision)
        if dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self._device.type, dtype)

    def _step(self, model: nn.Module, call: Call) -> Call:
        leaves = list(model.parameters())

        def step() -> tuple[torch.Tensor, ...]:
            with self._autocast():
                out = call()
            return (out.detach(), *torch.autograd.grad(out, leaves, self._grad.to(out.dtype)))

        return step

    def stock(self, wrap: Wrap) -> Call:
        model = copy.deepcopy(self._models["stock"]).train()
        return self._step(model, wrap(model, (self._x,)))

    def effops(self, backend: str) -> Call:
        model = copy.deepcopy(self._models["effops"]).train()
        return self._step(model, self._on(model, backend))

    def forward(self, backend: str) -> Call:
        call = self._on(copy.deepcopy(self._models["effops"]).train(), backend)

        def autocast_call() -> torch.Tensor:
            with self._autocast():
                return call()

        return autocast_call

    def _on(self, model: nn.Module, backend: str) -> Call:
        import effops

        def call() -> torch.Tensor:
            with effops.use_backend(backend):
                return model(self._x)

        return plain(model, (self._x,)) if backend == "auto" else call

    def check(self, fn: Call, own: bool, what: str) -> dict | None:
        """Logits and all gradients together by their norm: a network has a kink for every rounding."""
        double = copy.deepcopy(self._models["stock"]).double().train()
        x, model = self._x.double(), double
        out = model(x)
        truth = _flat((out, *torch.autograd.grad(out, list(model.parameters()), self._grad.double())))
        stock = _flat(self.stock(plain)())
        bound = max(norm_bound(self._precision), 2 * gate.relative_norm(stock, truth))
        found = gate.check_norm(_flat(fn()), stock, truth, what, bound if own else 10 * bound)
        return found if own else None

    def facts(self) -> dict[str, int]:
        return {}


def _flat(tensors: tuple[torch.Tensor, ...]) -> torch.Tensor:
    return torch.cat([t.detach().double().flatten() for t in tensors])


def build(request: dict, device: torch.device) -> Forward | ForwardBackward | BlockStep | ModelForward | ModelStep:
    """The task that a request names."""
    name, batch, precision = request["case"], request["batch"], request["precision"]
    both = request["direction"] == "forward+backward"
    if request["kind"] == "model":
        return (ModelStep if both else ModelForward)(name, batch, precision, device)
    if request["kind"] == "block" and both:
        return BlockStep(name, batch, precision, device)
    case = shapes.find(name)
    if isinstance(case, shapes.LayerCase):
        return Forward(layers.LayerProblem(case, batch, dtype_of(precision), device), precision)
    if both:
        return ForwardBackward(case, batch, precision, device)
    dtype = str(dtype_of(precision)).removeprefix("torch.")
    return Forward(problems.build(case, batch, dtype, device), precision)
