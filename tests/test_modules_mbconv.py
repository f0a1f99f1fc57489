"""InvertedResidual against its stock twin: values, gradients, statistics, what fuses, state dicts."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from module_helpers import BN, compare, image, randomise, trio
from torch import Tensor, nn

import effops
from effops import backends, modules, stock


@pytest.fixture(params=("reference", "cpp"))
def mb_backend(request: pytest.FixtureRequest) -> str:
    """The backends with kernels for it, and the reference."""
    if request.param == "cpp":
        request.getfixturevalue("cpp")
    return request.param


def excited(layers: Any, **arguments: Any) -> Callable[[int], nn.Module]:
    return partial(layers.SqueezeExcite, **arguments)


# id: (positional arguments, keyword arguments, squeeze-excite arguments or None, input shape)
CASES: dict[str, tuple[tuple[int, ...], dict[str, Any], dict[str, Any] | None, tuple[int, ...]]] = {
    "residual": ((6, 6), {}, None, (2, 6, 7, 9)),
    "stride2": ((6, 10, 3, 2), {"act": "silu"}, None, (3, 6, 9, 7)),
    "no_expansion": ((6, 4), {"expand_ratio": 1}, None, (2, 6, 6, 7)),
    "no_norm": ((5, 7), {"norm": None, "act": "gelu"}, None, (2, 5, 6, 7)),
    "k5_hidden": ((4, 4, 5), {"hidden_channels": 18, "act": "hardswish"}, None, (2, 4, 8, 7)),
    "mobilenet_v3": ((6, 6, 5), {"act": "hardswish"}, {"gate": "hardsigmoid"}, (2, 6, 7, 8)),
    "efficientnet_first": ((8, 4), {"expand_ratio": 1, "act": "silu"}, {"act": "silu", "ratio": 0.5}, (2, 8, 7, 8)),
    "uneven_padding": ((4, 6, 3, 2), {"padding": (0, 1, 0, 1), "act": "silu"}, {}, (2, 4, 8, 8)),
    "group_norm": ((4, 4), {"norm": partial(nn.GroupNorm, 2), "act": "silu"}, None, (2, 4, 6, 7)),
    "unknown_activation": ((4, 6), {"act": nn.Mish}, {}, (2, 4, 6, 7)),
}


def maker(name: str) -> tuple[Callable[[Any], nn.Module], Tensor]:
    channels, arguments, se, shape = CASES[name]

    def make(layers: Any) -> nn.Module:
        torch.manual_seed(3)
        extra = {} if se is None else {"se": excited(layers, **se)}
        return layers.InvertedResidual(*channels, **arguments, **extra)

    return make, image(*shape)


@pytest.mark.parametrize("name", CASES)
def test_eval_and_training_match_the_twin(name: str, mb_backend: str) -> None:
    make, x = maker(name)
    compare(make, (x,), mb_backend, grads=True)
    module = compare(make, (x.contiguous(memory_format=torch.channels_last),), mb_backend, train=True, grads=True)
    assert bool(module.fusion_reasons()) == (name in ("group_norm", "unknown_activation"))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("se", (False, True), ids=("plain", "se"))
def test_dtypes(se: bool, dtype: torch.dtype, mb_backend: str) -> None:
    def make(layers: Any) -> nn.Module:
        torch.manual_seed(3)
        return layers.InvertedResidual(24, 24, act="silu", se=excited(layers) if se else None)

    x = image(3, 24, 13, 11)
    compare(make, (x,), mb_backend, dtype=dtype)
    if dtype == torch.float32:
        compare(make, (x,), mb_backend, dtype=dtype, train=True, grads=True)


@pytest.mark.parametrize("momentum", (0.2, None))
def test_running_statistics_over_several_steps(momentum: float | None, mb_backend: str) -> None:
    make, _ = maker("mobilenet_v3")
    module, twin, _ = trio(make, torch.float64, mb_backend)
    for network in (module, twin):
        network.train()
        for norm in (network.expand_norm, network.dw_norm, network.norm):
            norm.momentum = momentum
    for step in range(3):
        x = image(2, 6, 7, 5, seed=step)
        torch.testing.assert_close(module(x), twin(x), rtol=1e-11, atol=1e-11)
    for name, buffer in twin.named_buffers():
        torch.testing.assert_close(dict(module.named_buffers())[name], buffer, rtol=1e-12, atol=1e-12)


def test_eval_is_one_kernel_and_frozen_norms_stay_so(cpp: str) -> None:
    module = effops.InvertedResidual(8, 8, se=effops.SqueezeExcite)
    x = torch.randn(2, 8, 6, 6)
    assert [call.kernel for call in backends.explain(module.eval(), x).calls] == ["1x1 + 3x3 + 1x1"]
    module.train()
    for norm in (module.expand_norm, module.dw_norm, module.norm):
        norm.eval()
    assert len(backends.explain(module, x).calls) == 1
    module.norm.train()
    assert len(backends.explain(module, x).calls) > 1


@pytest.mark.parametrize("name", ("triton", "cuda"))
def test_backends_without_kernels_for_all_of_it_run_the_parts(
    name: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    request.getfixturevalue(name)
    (backend,) = (backend for backend in backends.BACKENDS if backend.name == name)
    monkeypatch.setattr(backend, "operators", backend.operators - {"mbconv"})
    module = effops.InvertedResidual(4, 4, backend=name).eval()
    twin = stock.InvertedResidual(4, 4).eval()
    twin.load_state_dict(module.state_dict())
    x = torch.randn(1, 4, 5, 5)
    torch.testing.assert_close(module(x), twin(x))
    assert [(call.backend, call.kernel) for call in backends.explain(module, x).calls] == [(name, "3x3 + 1x1")]


def test_empty_batch(mb_backend: str) -> None:
    for name in ("residual", "mobilenet_v3"):
        make, _ = maker(name)
        module, twin, _ = trio(make, torch.float32, mb_backend)
        for train in (False, True):
            x = torch.empty(0, 6, 9, 7)
            assert module.train(train)(x).shape == twin.train(train)(x).shape == (0, 6, 9, 7)


@pytest.mark.parametrize("train", (False, True), ids=("eval", "train"))
def test_compiles_without_a_break(train: bool, cpp: str) -> None:
    module = effops.InvertedResidual(4, 4, act="silu", se=effops.SqueezeExcite).train(train)
    compiled = torch.compile(copy.deepcopy(module), fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 4, 6, 5)
    results = []
    for network in (compiled, module):
        leaf = x.clone().requires_grad_()
        out = network(leaf)
        results.append((out, torch.autograd.grad(out.square().sum(), leaf)[0]))
    torch.testing.assert_close(*results)


def test_state_dict_names_and_copies() -> None:
    module = effops.InvertedResidual(4, 6, se=effops.SqueezeExcite).eval()
    parts = list(dict.fromkeys(name.rpartition(".")[0] for name in module.state_dict()))
    assert parts == ["expand", "expand_norm", "dw", "dw_norm", "se.reduce", "se.expand", "pw", "norm"]
    x = torch.randn(1, 4, 5, 5)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(other(x), module(x))


NAMINGS = {
    "torchvision V2": ("conv.0.0", "conv.0.1", "conv.1.0", "conv.1.1", None, None, "conv.2", "conv.3"),
    "torchvision V3": (
        "block.0.0", "block.0.1", "block.1.0", "block.1.1", "block.2.fc1", "block.2.fc2", "block.3.0", "block.3.1",
    ),
    "timm": ("conv_pw", "bn1", "conv_dw", "bn2", "se.conv_reduce", "se.conv_expand", "conv_pwl", "bn3"),
}  # fmt: skip


@pytest.mark.parametrize("naming", NAMINGS)
def test_keys_of_other_packages(naming: str) -> None:
    ours = ("expand", "expand_norm", "dw", "dw_norm", "se.reduce", "se.expand", "pw", "norm")
    names = {mine: theirs for mine, theirs in zip(ours, NAMINGS[naming], strict=True) if theirs}
    se = effops.SqueezeExcite if "se.reduce" in names else None
    source, target = (effops.InvertedResidual(4, 6, se=se) for _ in range(2))
    randomise(source)
    foreign = {}
    for key, value in source.state_dict().items():
        path, _, last = key.rpartition(".")
        foreign[f"{names[path]}.{last}"] = value
    target.load_state_dict(foreign)
    for key, value in source.state_dict().items():
        assert torch.equal(target.state_dict()[key], value)


def test_from_modules_shares_parameters(cpp: str) -> None:
    expand, dw, pw = nn.Conv2d(4, 12, 1), nn.Conv2d(12, 12, 3, padding=1, groups=12), nn.Conv2d(12, 4, 1, bias=False)
    norms = [BN(12), BN(12), BN(4)]
    se = effops.SqueezeExcite(12)
    block = effops.InvertedResidual.from_modules(
        expand, dw, pw, norms[0], "relu6", norms[1], nn.ReLU6(), norms[2], se=se, residual=True
    )
    assert block.expand is expand and block.se is se and block.residual
    for norm in norms:
        randomise(norm)
    x = torch.randn(2, 4, 6, 5)
    block.eval()
    z = nn.functional.relu6(norms[1](dw(nn.functional.relu6(norms[0](expand(x))))))
    torch.testing.assert_close(block(x), norms[2](pw(se(z))) + x, rtol=1e-5, atol=1e-5)
    assert not effops.InvertedResidual.from_modules(None, dw, nn.Conv2d(12, 5, 1)).residual


@pytest.mark.parametrize("part", ("expand", "dw_norm", "se", "pw", "norm"))
def test_hooks_are_called(part: str, cpp: str) -> None:
    module = effops.InvertedResidual(4, 4, se=effops.SqueezeExcite).eval()
    twin = stock.InvertedResidual(4, 4, se=stock.SqueezeExcite).eval()
    twin.load_state_dict(module.state_dict())
    called = []
    getattr(module, part).register_forward_hook(lambda *args: called.append(part))
    x = torch.randn(1, 4, 5, 5)
    torch.testing.assert_close(module(x), twin(x))
    assert called == [part]
    assert any(f"{part} has forward hooks" in reason for reason in module.fusion_reasons())


def test_training_saves_less_than_the_twin(cpp: str) -> None:
    """Neither of the depthwise results is kept, before its norm or behind it: at most 3/4 of the bytes."""

    def saved(layers: Any) -> int:
        torch.manual_seed(0)
        act = "relu6" if layers is modules else partial(nn.ReLU6, inplace=True)
        module = layers.InvertedResidual(16, 16, act=act).to(memory_format=torch.channels_last).train()
        storages: dict[int, tuple[int, Tensor]] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = (storage.nbytes(), tensor)
            return tensor

        x = torch.randn(2, 16, 28, 28).contiguous(memory_format=torch.channels_last).requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = module(x)
        assert out.requires_grad
        return sum(size for size, _ in storages.values())

    assert saved(modules) <= 0.75 * saved(stock)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: effops.InvertedResidual(4, 4, expand_ratio=0), ValueError,
         "InvertedResidual: expand_ratio must be a number above 0, got 0"),
        (lambda: effops.InvertedResidual(4, 4, hidden_channels=0), ValueError,
         "InvertedResidual: hidden_channels must be at least 1, got 0"),
        (lambda: effops.InvertedResidual(4, 4, se=3), TypeError,
         "InvertedResidual: se must be None or a factory that is called with the channel count, such as "
         "nn.BatchNorm2d, got 3"),
        (lambda: effops.InvertedResidual(4, 6, residual=True), ValueError,
         "InvertedResidual: residual=True needs in_channels == out_channels, got 4 and 6"),
        (lambda: effops.InvertedResidual(4, 4, 3, 2, residual=True), ValueError,
         "InvertedResidual: residual=True needs stride 1, got (2, 2)"),
        (lambda: effops.InvertedResidual.from_modules(nn.Conv2d(4, 9, 1), nn.Conv2d(8, 8, 3, groups=8),
                                                      nn.Conv2d(8, 4, 1)), ValueError,
         "InvertedResidual.from_modules: expand gives 9 channels, dw takes 8; they must be equal"),
        (lambda: effops.InvertedResidual.from_modules(nn.Linear(4, 8), nn.Conv2d(8, 8, 3, groups=8),
                                                      nn.Conv2d(8, 4, 1)), TypeError,
         "InvertedResidual.from_modules: expand must be an nn.Conv2d or None, got "
         "Linear(in_features=4, out_features=8, bias=True)"),
        (lambda: effops.InvertedResidual.from_modules(None, nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 4, 1), BN(8)),
         ValueError, "InvertedResidual.from_modules: expand_norm or expand_act given without expand"),
    ],
)  # fmt: skip
def test_errors(make: Callable[[], nn.Module], error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        make()
    assert str(caught.value) == message
