"""Training with batch norms around and between the two convolutions: the stock twin in float64 is the truth.

The fused module takes the statistics of the depthwise result without storing it (or stores it once); outputs, every
gradient, the running statistics over several steps and eval mode afterwards must be the stock modules'.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from helpers import KINKS, assert_within_budget, generator, interpreted
from torch import Tensor, nn

import effops
from effops import stock

BN = nn.BatchNorm2d
STEPS = 3

CONFIGS: dict[str, dict[str, Any]] = {
    # MobileNet: conv, norm, act; twice.
    "mobilenet": {"dw_norm": BN, "dw_act": "relu", "norm": BN, "act": "relu"},
    "mobilenet-stride2": {"dw_norm": BN, "dw_act": "relu6", "norm": BN, "act": "relu6", "stride": 2},
    "mobilenet-k5-residual": {"dw_norm": BN, "dw_act": "hardswish", "norm": BN, "kernel_size": 5, "residual": True},
    "linear-between": {"dw_norm": BN, "norm": BN, "act": "relu"},  # Multiception
    "only-between": {"dw_norm": BN, "dw_act": "silu", "bias": True},
    "only-behind": {"norm": BN, "act": "silu", "dw_bias": True},
    # VGNet, Nuts & Bolts: conv, act, norm.
    "act_first": {"dw_act": "relu", "dw_norm": BN, "act": "relu", "norm": BN, "norm_first": False},
    "act_first-behind": {"act": "silu", "norm": BN, "norm_first": False},
    # (No norm behind the gelu: it would take out most of what the pointwise bias adds, gradient included.)
    "act_first-biases": {
        "dw_act": "leaky_relu", "dw_norm": BN, "act": "gelu", "norm_first": False, "bias": True, "dw_bias": True,
    },
    "act_first-gelu": {"dw_act": "silu", "dw_norm": BN, "act": "gelu", "norm": BN, "norm_first": False},
    "multiplier2-dilation2": {"dw_norm": BN, "dw_act": "silu", "norm": BN, "depth_multiplier": 2, "dilation": 2},
    "asymmetric": {"dw_norm": BN, "dw_act": "silu", "norm": BN, "stride": 2, "padding": (0, 1, 0, 1)},
    "reflect": {"dw_norm": BN, "dw_act": "silu", "norm": BN, "padding_mode": "reflect"},
    "post_act": {"dw_norm": BN, "dw_act": "relu", "norm": BN, "residual": True, "post_act": "relu"},
}  # fmt: skip

NORMS: dict[str, Any] = {
    "momentum0.3-eps": partial(BN, momentum=0.3, eps=1e-2),
    "momentum_none": partial(BN, momentum=None),
    "no_tracking": partial(BN, track_running_stats=False),
    "not_affine": partial(BN, affine=False),
}

CHANNELS = 27  # enough for the largest of the errors not to be left to chance


def _modules(config: dict[str, Any], backend: str) -> tuple[nn.Module, nn.Module, nn.Module]:
    """(fused, stock twin, float64 stock twin) in the same state; norms have weights and biases of their own."""
    out_channels = CHANNELS if config.get("residual") else 34
    twin = stock.FusedDSConv(CHANNELS, out_channels, **config)
    gen = generator("parameters")
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            spread = torch.randn(parameter.shape, generator=gen)
            if "norm" in name or "bias" in name:
                parameter.copy_(1 + 0.3 * spread)
            else:  # of a size that leaves no channel of an activation nearly constant before its norm
                parameter.copy_(spread * max(parameter[0].numel(), 9) ** -0.5)
    fused = effops.FusedDSConv(CHANNELS, out_channels, backend=backend, **config)
    fused.load_state_dict(twin.state_dict())
    return fused, twin, copy.deepcopy(twin).double()


class _KinkDistance:
    """Hooks on a float64 twin's activations: how near their arguments came to a kink."""

    def __init__(self, module: nn.Module) -> None:
        self.nearest = float("inf")
        for child in module.children():
            kinks = KINKS.get(type(child).__name__.lower().replace("leakyrelu", "leaky_relu"), ())
            if kinks:
                child.register_forward_pre_hook(partial(self._look, kinks))

    def _look(self, kinks: tuple[float, ...], module: nn.Module, arguments: tuple[Tensor]) -> None:
        for kink in kinks:
            self.nearest = min(self.nearest, (arguments[0] - kink).abs().min().item())


def _batches(truth: nn.Module, memory_format: torch.memory_format) -> list[Tensor]:
    """One batch a step, drawn again until no activation of the float64 twin is evaluated near a kink."""
    batches = []
    for step in range(STEPS):
        for attempt in range(100):
            gen = generator(f"batch-{step}-{attempt}")
            batch = torch.randn(4, CHANNELS, 9, 8, generator=gen).contiguous(memory_format=memory_format)
            probe = copy.deepcopy(truth)
            distance = _KinkDistance(probe)
            probe(batch.double())
            if distance.nearest > 1e-4:
                batches.append(batch)
                break
        else:
            raise AssertionError("no batch keeps off the kinks")
    return batches


def _step(module: nn.Module, batch: Tensor) -> dict[str, Tensor]:
    """Output, gradients and buffers of one training step without an update."""
    leaf = batch.detach().requires_grad_()
    out = module(leaf)
    weights = torch.randn(out.shape, generator=generator("upstream"), dtype=torch.float64)
    names = [name for name, _ in module.named_parameters()]
    wanted = [leaf, *module.parameters()]
    grads = torch.autograd.grad(out, wanted, weights.to(out.dtype))
    results = {"output": out.detach(), "gradient of input": grads[0]}
    results |= {f"gradient of {name}": grad for name, grad in zip(names, grads[1:], strict=True)}
    results |= {f"buffer {name}": buffer.clone() for name, buffer in module.named_buffers()}
    return results


def _compare(fused: dict[str, Tensor], twin: dict[str, Tensor], truth: dict[str, Tensor], what: str) -> None:
    assert fused.keys() == twin.keys() == truth.keys()
    largest = max(value.abs().max().item() for name, value in truth.items() if name.startswith("gradient"))
    for name, value in fused.items():
        if not value.is_floating_point():
            assert torch.equal(value, truth[name]), f"{what} {name}: {value} instead of {truth[name]}"
            continue
        if name.startswith("gradient") and truth[name].abs().max() < 1e-12 * largest:
            # Zero: the norm that follows takes out what this bias adds. What is left is rounding of the terms.
            assert value.abs().max() <= 1e-5 * largest, f"{what} {name} is zero, got {value}"
            continue
        assert_within_budget(value, truth[name].double(), twin[name], f"{what} {name}")


def _train_and_evaluate(
    config: dict[str, Any], backend: str, memory_format: torch.memory_format, *, interpreted_steps: int = 1
) -> None:
    fused, twin, truth = _modules(config, backend)
    batches = _batches(truth, memory_format)
    for step, batch in enumerate(batches[: interpreted_steps if interpreted(backend) else STEPS]):
        results = _step(fused, batch), _step(twin, batch), _step(truth, batch.double())
        _compare(*results, f"step {step}")
    for module in (fused, twin, truth):
        module.eval()
    with torch.no_grad():
        results = fused(batches[0]), truth(batches[0].double()), twin(batches[0])
    assert results[0].stride() == results[2].stride()
    assert_within_budget(*results, "eval after training")
    for module in (fused, twin, truth):
        module.train()
    _compare(_step(fused, batches[1]), _step(twin, batches[1]), _step(truth, batches[1].double()), "training again")


@pytest.mark.parametrize("memory_format", (torch.contiguous_format, torch.channels_last), ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_training_matches_stock(name: str, memory_format: torch.memory_format, backend: str) -> None:
    _train_and_evaluate(CONFIGS[name], backend, memory_format)


@pytest.mark.parametrize("stored", (True, False), ids=("stored_once", "computed_twice"))
@pytest.mark.parametrize("name", ("mobilenet", "mobilenet-stride2", "linear-between", "multiplier2-dilation2"))
def test_both_ways_to_the_statistics(name: str, stored: bool, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cost model chooses between two ways; both are right, whichever it takes here."""
    monkeypatch.setattr(effops.FusedDSConv, "_store_intermediate", lambda self, input: stored)
    _train_and_evaluate(CONFIGS[name], backend, torch.channels_last)


@pytest.mark.parametrize("order", ("mobilenet", "act_first"))
@pytest.mark.parametrize("norm", NORMS)
def test_norm_options(norm: str, order: str, backend: str) -> None:
    config = {**CONFIGS[order], "dw_norm": NORMS[norm], "norm": NORMS[norm]}
    _train_and_evaluate(config, backend, torch.channels_last, interpreted_steps=2)  # a momentum shows in the second


@pytest.mark.parametrize("frozen", ("dw_norm", "norm", "dw", "pw"))
def test_part_frozen(frozen: str, backend: str) -> None:
    """Fine-tuning: norms in eval mode inside a training module, convolutions without gradients."""
    fused, twin, truth = _modules(CONFIGS["mobilenet"], backend)
    (batch, *_) = _batches(truth, torch.contiguous_format)
    for module in (fused, twin, truth):
        part = getattr(module, frozen)
        if frozen.endswith("norm"):
            part.eval()
    results = _step(fused, batch), _step(twin, batch), _step(truth, batch.double())
    _compare(*results, f"{frozen} frozen")
    for module in (fused, twin, truth):
        getattr(module, frozen).requires_grad_(False)
        module.zero_grad()
        module(batch.to(next(module.parameters()).dtype)).sum().backward()
        with_gradient = {name for name, parameter in module.named_parameters() if parameter.grad is not None}
        assert with_gradient == {name for name, _ in module.named_parameters() if not name.startswith(frozen + ".")}


def test_one_value_a_channel_is_refused(backend: str) -> None:
    """As by torch: variance of one value."""
    fused, twin, _ = _modules(CONFIGS["mobilenet-stride2"], backend)
    single = torch.randn(1, CHANNELS, 2, 2)
    for module in (twin, fused):
        with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
            module(single)


@pytest.mark.parametrize("name", ("mobilenet", "act_first"))
def test_ten_updates_follow_the_stock_twin(name: str, backend: str) -> None:
    """With an optimiser, in float64, where trajectories do not part by rounding."""
    fused, twin, _ = _modules(CONFIGS[name], backend)
    fused, twin = fused.double(), twin.double()
    optimisers = [torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.9) for module in (fused, twin)]
    gen = generator("updates")
    for _ in range(10):
        batch = torch.randn(3, CHANNELS, 7, 6, generator=gen, dtype=torch.float64)
        for module, optimiser in zip((fused, twin), optimisers, strict=True):
            optimiser.zero_grad()
            module(batch).square().mean().backward()
            optimiser.step()
    for key, value in twin.state_dict().items():
        torch.testing.assert_close(fused.state_dict()[key], value, rtol=1e-9, atol=1e-11, msg=key)
