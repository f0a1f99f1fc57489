"""Whole models, eager forward.

Rivals are the stock twins, whose activations are in place wherever nothing else reads their input.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import nn

from benchmarks import gate
from benchmarks.problems import FORMATS


def in_place(model: nn.Module) -> nn.Module:
    """The model with its ReLUs in place, as stock networks have them."""
    for module in model.modules():
        if isinstance(module, nn.ReLU | nn.ReLU6):
            module.inplace = True
    return model


class ModelProblem:
    """A registered model at its own input size, seeded random weights, as stock PyTorch and as effops, eval mode."""

    def __init__(
        self, name: str, batch: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> None:
        import effops
        from effops.models.published import input_size

        torch.manual_seed(0)
        shape = input_size(name)[1:]
        self._effops = effops.create_model(name).requires_grad_(False)
        calibrate(self._effops, shape)
        self._stock = effops.create_model(name, reference=True).eval().requires_grad_(False)
        self._stock.load_state_dict(self._effops.state_dict())
        self._x = torch.randn(batch, *shape)
        self._effops, self._stock = self._effops.to(device, dtype), self._stock.to(device, dtype)
        self._x = self._x.to(device, dtype)
        self._ends = (
            self._x if batch == 1 else self._x[[0, -1]]
        )  # float64 models are slow: the first and the last image

    def stock(self, variant: str) -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
        model = copy.deepcopy(self._stock).to(memory_format=FORMATS[variant])
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
        """The logits against the stock model in float64.

        Hundreds of layers amplify roundings, so torch's own count; by norms, as the largest of ten errors is chance.
        """
        truth = copy.deepcopy(self._stock).double()(self._ends.double())
        out = fn()
        out = out if len(out) == 1 else out[[0, -1]]
        yardstick = self.stock(variant)[0](self._ends.contiguous(memory_format=FORMATS[variant]))
        bound = gate.NORM_BOUND[out.dtype]
        if not own:
            gate.check_rival(out, truth, "logits", max(bound, 2 * gate.relative_norm(yardstick, truth)))
            return None
        return gate.check_norm(out, yardstick, truth, "logits", bound)

    def macs(self) -> int:
        """Multiply-adds of convolutions and linear layers, counted on the stock model."""
        from torch.utils.flop_counter import FlopCounterMode

        counter = FlopCounterMode(display=False)
        with torch.no_grad(), counter:
            self._stock(self._x[:1])
        return counter.get_total_flops() // 2 * len(self._x)


def calibrate(model: nn.Module, shape: tuple[int, ...]) -> None:
    """Gives the model the running statistics of a batch of noise, a little spread, and puts it into eval.

    As after training; with random statistics the activations of hundreds of residual blocks overflow.
    """
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        model.train()(torch.randn(4, *shape))
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
            norm.running_mean += 0.1 * norm.running_var.sqrt() * torch.randn_like(norm.running_mean)
            norm.running_var *= torch.empty_like(norm.running_var).uniform_(0.8, 1.25)
    model.eval()
