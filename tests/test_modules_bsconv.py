"""BSConvU, BSConvS and the orthonormal loss."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from conftest import require_backend
from helpers import assert_within_budget
from module_helpers import BN, compare, image, randomise
from torch import Tensor, nn

import effops
from effops import modules, stock


@pytest.fixture(params=("reference", "cpp"))
def backend(request: pytest.FixtureRequest) -> str:
    """The backends that have the operator."""
    require_backend(request.param)
    return request.param


MAKERS = {
    "u": lambda m: m.BSConvU(12, 20, 3, padding=1),
    "u-stride2-no_bias": lambda m: m.BSConvU(12, 20, (3, 5), (2, 1), (1, 2), bias=False),
    "u-bn": lambda m: m.BSConvU(12, 20, 3, padding=1, bias=False, with_bn=True, bn_kwargs={"eps": 1e-2}),
    "u-reflect-bn": lambda m: m.BSConvU(12, 20, 3, padding=1, padding_mode="reflect", with_bn=True),
    "u-same-dilated": lambda m: m.BSConvU(12, 20, 3, padding="same", dilation=2),
    "s": lambda m: m.BSConvS(12, 20, 3, padding=1, bias=False),
    # Without affine: in training the second norm would leave the gradient of the first one's bias nothing but rounding.
    "s-bn-stride2": lambda m: m.BSConvS(12, 20, 3, 2, 1, p=0.5, with_bn=True, bn_kwargs={"affine": False}),
}


@pytest.mark.parametrize("channels_last", (False, True))
@pytest.mark.parametrize("train", (False, True))
@pytest.mark.parametrize("name", MAKERS)
def test_as_the_unfused_modules(name: str, train: bool, channels_last: bool, backend: str) -> None:
    """Outputs, gradients and running statistics, in evaluation and in training."""
    x = image(3, 12, 9, 8, channels_last=channels_last)
    for dtype in (torch.float64, torch.float32):
        module = compare(MAKERS[name], (x,), backend, dtype=dtype, train=train, grads=True)
    assert module.fusion_reasons() == ()


def test_what_runs_as_one_kernel(cpp: str) -> None:
    x = torch.randn(2, 8, 6, 6)

    def functions(module: nn.Module) -> list[str]:
        return [call.function for call in effops.explain(module, x).calls]

    for module in (modules.BSConvU(8, 8, 3), modules.BSConvS(8, 8, 3)):
        assert functions(module.train()) == functions(module.eval()) == ["bs_conv2d"]
    normed = modules.BSConvS(8, 8, 3, with_bn=True)
    assert functions(normed.eval()) == ["bs_conv2d"]
    assert functions(normed.train()) == ["depthwise_conv2d"]
    normed.eval().pw1.register_forward_hook(lambda *_: None)
    assert functions(normed) == []
    assert normed.fusion_reasons() == ("pw1 has forward hooks",)
    assert "pw1 has forward hooks" in repr(normed)
    assert modules.BSConvU(8, 8, 3).apply(lambda m: None).fusion_reasons() == ()


def test_parameters_have_the_packages_names() -> None:
    def names(module: nn.Module) -> list[str]:
        return [name for name, _ in module.named_parameters()]

    assert names(modules.BSConvU(4, 8, 3)) == ["pw.weight", "dw.weight", "dw.bias"]
    assert names(modules.BSConvU(4, 8, 3, bias=False, with_bn=True)) == [
        "pw.weight",
        "bn.weight",
        "bn.bias",
        "dw.weight",
    ]
    subspace = modules.BSConvS(40, 8, 3, bias=False, with_bn=True)
    assert names(subspace) == [
        "pw1.weight", "bn1.weight", "bn1.bias", "pw2.weight", "bn2.weight", "bn2.bias", "dw.weight",
    ]  # fmt: skip


def test_channels_in_between() -> None:
    """The package's rule, and the paper's Eq. 8 with min_mid_channels=1."""
    widths = [(16, {}), (9, {}), (3, {}), (100, {"p": 1 / 6}), (9, {"min_mid_channels": 1}), (64, {"p": 1.0})]
    assert [modules.BSConvS(c, 8, 3, **given).mid_channels for c, given in widths] == [4, 4, 3, 17, 3, 64]


@pytest.mark.parametrize("name", ("u", "u-stride2-no_bias", "u-reflect-bn", "u-same-dilated", "s"))
def test_to_dense(name: str, backend: str) -> None:
    """The paper's Eq. 2: the module is an ordinary convolution with this kernel."""
    module = MAKERS[name](modules).double().eval()
    randomise(module)
    module.backend = backend
    dense = module.to_dense()
    assert type(dense) is nn.Conv2d and dense.groups == 1 and not dense.training
    x = image(2, 12, 9, 8)
    torch.testing.assert_close(module(x), dense(x), rtol=1e-11, atol=1e-11)


def test_a_shift_behind_the_padding_has_no_dense_kernel() -> None:
    module = modules.BSConvS(12, 20, 3, padding=1, with_bn=True).eval()
    module.to_dense()  # a fresh norm shifts nothing
    randomise(module)
    with pytest.raises(ValueError, match="have no dense kernel; accepted: with_bn=False, padding 0, or a padding_mode"):
        module.to_dense()
    unpadded = modules.BSConvS(12, 20, 3, bias=False, with_bn=True).double().eval()
    randomise(unpadded)
    x = image(2, 12, 9, 8)
    torch.testing.assert_close(unpadded(x), unpadded.to_dense()(x), rtol=1e-11, atol=1e-11)
    with pytest.raises(TypeError, match="bn must be a BatchNorm2d, got GroupNorm"):
        normed = modules.BSConvU(4, 8, 3, with_bn=True)
        normed.bn = nn.GroupNorm(2, 8)
        normed.to_dense()
    with pytest.raises(ValueError, match="bn has no running statistics"):
        modules.BSConvU(4, 8, 3, with_bn=True, bn_kwargs={"track_running_stats": False}).to_dense()


def test_copies() -> None:
    module = modules.BSConvS(8, 12, 3, padding=1, with_bn=True).eval()
    randomise(module)
    x = torch.randn(2, 8, 5, 5)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(twin(x), module(x))


def test_messages() -> None:
    for make, kind, message in (
        (lambda: modules.BSConvU(0, 8, 3), ValueError, "BSConvU: in_channels must be at least 1, got 0"),
        (lambda: modules.BSConvS(8, 8.0, 3), TypeError, "BSConvS: out_channels must be an int, got 8.0 (float)"),
        (lambda: modules.BSConvS(8, 8, 3, p=0), ValueError, "BSConvS: p must be above 0 and at most 1, got 0"),
        (lambda: modules.BSConvS(8, 8, 3, p="1"), TypeError, "BSConvS: p must be a number, got '1' (str)"),
        (
            lambda: modules.BSConvU(8, 8, 3, padding=(1, 1, 0, 0)), ValueError,
            "BSConvU: uneven padding (1, 1, 0, 0) is not supported here; use F.pad and padding=0",
        ),
        (lambda: effops.orthonormal_loss(3), TypeError, "orthonormal_loss: the model must be an nn.Module, got int"),
        (
            lambda: effops.orthonormal_loss(modules.BSConvS(8, 8, 3), -1), ValueError,
            "orthonormal_loss: alpha must be finite and at least 0, got -1",
        ),
        (
            lambda: effops.orthonormal_loss(modules.BSConvS(8, 8, 3), "1"), TypeError,
            "orthonormal_loss: alpha must be a number, got '1' (str)",
        ),
        (
            lambda: effops.orthonormal_loss(nn.Sequential(modules.BSConvU(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1))),
            ValueError,
            "orthonormal_loss: Sequential has neither a BSConvS nor a linear bottleneck; accepted: a model with at "
            "least one",
        ),
    ):  # fmt: skip
        with pytest.raises(kind) as caught:
            make()
        assert str(caught.value) == message


# ---- what follows the depthwise convolution -------------------------------------------------------------------------

UNBIASED = {"padding": 1, "bias": False}  # a bias ahead of a batch norm has no gradient but rounding
ACT_NORM = {"norm": BN, "act": "silu", "norm_first": False}
TAILS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "norm": ("U", 12, {**UNBIASED, "norm": BN}),
    "act": ("U", 12, {"act": "relu6"}),
    "post_act": ("U", 12, {"post_act": "hardswish"}),
    "norm_act": ("U", 20, {**UNBIASED, "stride": 2, "norm": BN, "act": "silu"}),
    "act_norm": ("U", 20, ACT_NORM),
    "residual": ("U", 12, {**UNBIASED, "norm": BN, "residual": True}),
    "residual_post_act": ("U", 12, {**UNBIASED, "norm": BN, "residual": True, "post_act": "silu"}),
    "act_residual_post_act": ("U", 12, {"padding": "same", "act": "sigmoid", "residual": True, "post_act": "gelu"}),
    "act_norm_residual_post_act": ("U", 12, {"padding": None, **ACT_NORM, "residual": True, "post_act": "silu"}),
    "two_slopes": ("U", 12, {"act": partial(nn.LeakyReLU, 0.3), "post_act": partial(nn.LeakyReLU, 0.1)}),
    # The activation ahead of the norm: else that would leave the gradient of bn's weight nothing but rounding.
    "reflect-bn": ("U", 12, {**UNBIASED, **ACT_NORM, "padding_mode": "reflect", "with_bn": True, "residual": True}),
    "s": ("S", 20, {**UNBIASED, "p": 0.5, "norm": BN, "act": "silu"}),
    "s-bn": ("S", 12, {**UNBIASED, "with_bn": True, "bn_kwargs": {"affine": False}, "norm": BN, "residual": True,
                       "post_act": "silu"}),
}  # fmt: skip


def with_tail(name: str) -> Callable[[Any], nn.Module]:
    kind, out_channels, arguments = TAILS[name]
    return lambda m: getattr(m, f"BSConv{kind}")(12, out_channels, 3, **arguments)


class WithShortcut(nn.Module):
    """The block on a pair of its input and what it adds."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, pair: tuple[Tensor, Tensor]) -> Tensor:
        return self.block(*pair)


@pytest.mark.parametrize("train", (False, True))
@pytest.mark.parametrize("name", TAILS)
def test_what_follows(name: str, train: bool, backend: str) -> None:
    """Outputs, gradients and running statistics, in evaluation and in training."""
    x = image(3, 12, 9, 8)
    for dtype in (torch.float64, torch.float32):
        module = compare(with_tail(name), (x,), backend, dtype=dtype, train=train, grads=True)
    assert module.fusion_reasons() == ()


@pytest.mark.parametrize("train", (False, True))
@pytest.mark.parametrize("post_act", (None, "silu"))
@pytest.mark.parametrize("kind", ("U", "S"))
def test_adds_what_it_is_given(kind: str, post_act: str | None, train: bool, backend: str) -> None:
    """A shortcut of the output's shape, which the input has not."""
    pair = image(3, 12, 9, 8), image(3, 20, 5, 4, seed=2)
    arguments = {**UNBIASED, "stride": 2, "norm": BN, "post_act": post_act}
    for dtype in (torch.float64, torch.float32):
        compare(
            lambda m: WithShortcut(getattr(m, f"BSConv{kind}")(12, 20, 3, **arguments)),
            pair, backend, dtype=dtype, train=train, grads=True,
        )  # fmt: skip


@pytest.mark.parametrize("name", TAILS)
def test_in_eval_it_is_one_kernel(name: str, cpp: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No sub-module is called; in training those from the batch norm on are."""
    module = with_tail(name)(modules).eval()
    called = []
    for part in {type(part) for part in module.children()}:
        original = part.forward
        monkeypatch.setattr(part, "forward", lambda self, *args, f=original: called.append(self) or f(self, *args))
    x = torch.randn(2, 12, 9, 8)
    assert [call.function for call in effops.explain(module, x).calls] == ["bs_conv2d"]
    assert called == ([module.post_act] if name == "two_slopes" else [])
    called.clear()
    module.train()(x)
    normed = isinstance(module.norm, nn.BatchNorm2d)
    assert (module.norm in called) == normed and (not called or normed or name == "two_slopes")


@pytest.mark.parametrize("part", ("pw", "bn", "dw", "norm", "act", "post_act"))
def test_hooks_on_every_part_run(part: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind the convolution a hook leaves the convolution fused."""
    arguments = {**ACT_NORM, "residual": True, "post_act": "silu"}
    module = modules.BSConvU(8, 8, 3, padding=1, **arguments, backend=backend)
    randomise(module)
    x = torch.randn(2, 8, 6, 6)
    expected = module.double().eval()(x.double())
    module.float()
    seen = []
    getattr(module, part).register_forward_hook(lambda *_: seen.append(part))
    fused = []
    original = modules.bsconv.EF.bs_conv2d
    monkeypatch.setattr(
        modules.bsconv.EF, "bs_conv2d", lambda *args, **kwargs: fused.append(kwargs) or original(*args, **kwargs)
    )
    torch.testing.assert_close(module(x).double(), expected, rtol=1e-4, atol=1e-5)
    assert seen == [part]
    assert module.fusion_reasons() == (f"{part} has forward hooks",)
    assert len(fused) == (part in ("norm", "act", "post_act"))
    if fused:
        covered = {"act": "activation", "norm": "scale", "post_act": "post_activation"}
        ahead = list(covered)[: list(covered).index(part)]
        assert all((covered[name] in fused[0]) == (name in ahead) for name in covered)
        assert ("residual" in fused[0]) == (part == "post_act")


def test_other_modules_behind_are_called_and_named(backend: str) -> None:
    def make(m: Any) -> nn.Module:
        return m.BSConvS(12, 8, 3, norm=partial(nn.GroupNorm, 2), act=nn.Mish, backend=backend)

    module = compare(make, (image(2, 12, 6, 6),), backend, train=True, grads=True)
    assert module.fusion_reasons() == (
        "norm is GroupNorm, not a plain BatchNorm2d",
        "act is Mish(), which the kernels do not know",
    )


def test_nothing_behind_leaves_the_keys_alone() -> None:
    """A state dict of before fits; what follows adds its own keys behind."""
    plain = modules.BSConvS(8, 12, 3, with_bn=True)
    old = nn.ModuleDict({name: getattr(plain, name) for name in ("pw1", "bn1", "pw2", "bn2", "dw")})
    assert list(plain.state_dict()) == list(old.state_dict())
    statistics = ["norm.running_mean", "norm.running_var", "norm.num_batches_tracked"]
    tailed = modules.BSConvS(8, 12, 3, with_bn=True, norm=BN, act="relu", post_act="relu")
    assert list(tailed.state_dict()) == [*old.state_dict(), "norm.weight", "norm.bias", *statistics]
    missing = tailed.load_state_dict(plain.state_dict(), strict=False)
    assert missing.unexpected_keys == [] and all(key.startswith("norm.") for key in missing.missing_keys)


def test_to_dense_is_the_convolution_alone() -> None:
    module = modules.BSConvU(8, 12, 3, padding=1, norm=BN, act="relu", post_act="silu").double().eval()
    randomise(module)
    x = image(2, 8, 6, 6)
    expected = torch.nn.functional.silu(module.act(module.norm(module.to_dense()(x))))
    torch.testing.assert_close(module(x), expected, rtol=1e-11, atol=1e-11)


def test_an_empty_batch() -> None:
    module = modules.BSConvU(8, 8, 3, padding=1, norm=BN, act="relu", residual=True)
    for mode in (True, False):
        assert module.train(mode)(torch.empty(0, 8, 5, 5)).shape == (0, 8, 5, 5)


def test_what_follows_in_its_repr() -> None:
    assert repr(modules.BSConvU(4, 4, 3)).startswith("BSConvU(\n  (pw)")
    text = repr(modules.BSConvU(4, 4, 3, padding=1, act="relu", norm_first=False, residual=True, backend="cpp"))
    assert text.startswith("BSConvU(\n  norm_first=False, residual=True, backend='cpp'\n")


@pytest.mark.parametrize("namespace", (modules, stock))
def test_messages_about_what_follows(namespace: Any) -> None:
    def same(**arguments: Any) -> nn.Module:
        return namespace.BSConvU(8, 8, 3, **{"padding": 1, **arguments})

    x = torch.randn(1, 8, 5, 5)
    for make, kind, message in (
        (
            lambda: namespace.BSConvS(8, 12, 3, padding=1, residual=True), ValueError,
            "BSConvS: residual=True needs in_channels == out_channels, got 8 and 12",
        ),
        (lambda: same(stride=2, residual=True), ValueError, "BSConvU: residual=True needs stride 1, got (2, 2)"),
        (
            lambda: same(padding=0, residual=True), ValueError,
            "BSConvU: residual=True needs a padding that keeps height and width; they change by (-2, -2)",
        ),
        (
            lambda: same(residual=True)(x, x), ValueError,
            "BSConvU: residual given, but residual=True already adds the input",
        ),
        (
            lambda: same(norm=nn.Identity()), TypeError,
            "BSConvU: norm must be None or a factory that is called with the channel count, such as nn.BatchNorm2d, "
            "got Identity()",
        ),
        (lambda: same(act=3), TypeError,
         "BSConvU: act must be an activation's name, a module, a module class or None, got 3"),
        (
            lambda: same(norm=BN)(torch.randn(1, 8, 1, 1)), ValueError,
            "Expected more than 1 value per channel when training, got input size torch.Size([1, 8, 1, 1])",
        ),
    ):  # fmt: skip
        with pytest.raises(kind) as caught:
            make()
        assert str(caught.value) == message
    with pytest.raises(ValueError, match="BSConvU: unknown activation 'reluu' for post_act; accepted: none, relu, "):
        same(post_act="reluu")


# ---- orthonormal loss -----------------------------------------------------------------------------------------------


def distance(conv: nn.Conv2d) -> Tensor:
    matrix = conv.weight[:, :, 0, 0]
    return (matrix @ matrix.T - torch.eye(len(matrix))).square().sum().sqrt()


def test_orthonormal_loss_of_subspace_convolutions() -> None:
    model = nn.Sequential(modules.BSConvS(16, 24, 3), nn.ReLU(), modules.BSConvU(24, 8, 3), modules.BSConvS(8, 8, 3))
    expected = 0.3 * (distance(model[0].pw1) + distance(model[3].pw1))
    loss = effops.orthonormal_loss(model, 0.3)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert model[0].pw1.weight.grad.abs().sum() > 0 and model[0].pw2.weight.grad is None
    nn.init.orthogonal_(model[0].pw1.weight)
    nn.init.orthogonal_(model[3].pw1.weight)
    assert effops.orthonormal_loss(model) < 1e-5


def cna(channels: tuple[int, int], kernel: int = 1, act: type[nn.Module] | None = nn.ReLU6) -> nn.Sequential:
    """Conv2dNormActivation: torchvision's."""
    groups = channels[0] if kernel > 1 else 1
    parts = [nn.Conv2d(*channels, kernel, padding=kernel // 2, groups=groups, bias=False), nn.BatchNorm2d(channels[1])]
    return nn.Sequential(*parts, *([act()] if act else []))


class TorchvisionBlock(nn.Module):
    def __init__(self, expand: bool, flat: bool, squeeze: bool = False) -> None:
        super().__init__()
        mid = 24 if expand else 8
        layers = [cna((8, mid))] if expand else []
        layers.append(cna((mid, mid), 3))
        if squeeze:
            excite = nn.Module()
            excite.fc1, excite.fc2 = nn.Conv2d(mid, 4, 1), nn.Conv2d(4, mid, 1)
            excite.activation, excite.scale_activation = nn.ReLU(), nn.Hardsigmoid()
            layers.append(excite)
        project = cna((mid, 6), act=None)
        self.conv = nn.Sequential(*layers, *(project if flat else [project]))
        self.projection = lambda: project[0]


class TimmBlock(nn.Module):
    """timm's names, with norms that carry their activation."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_pw, self.bn1 = nn.Conv2d(8, 24, 1, bias=False), self.norm(24, nn.SiLU())
        self.conv_dw, self.bn2 = nn.Conv2d(24, 24, 3, groups=24, bias=False), self.norm(24, nn.SiLU())
        self.aa = self.se = nn.Identity()
        self.conv_pwl, self.bn3 = nn.Conv2d(24, 6, 1, bias=False), self.norm(6, nn.Identity())
        self.drop_path = nn.Identity()
        self.projection = lambda: self.conv_pwl

    @staticmethod
    def norm(channels: int, act: nn.Module) -> nn.Module:
        made = nn.BatchNorm2d(channels)
        made.drop, made.act = nn.Identity(), act
        return made


class OwnBlock(nn.Module):
    """The names of effops.InvertedResidual, in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Conv2d(24, 6, 1)
        self.expand, self.dw = nn.Conv2d(8, 24, 1), nn.Conv2d(24, 24, 3, groups=24)
        self.act = nn.ReLU()
        self.projection = lambda: self.project


BLOCKS = {
    "torchvision-v2": lambda: TorchvisionBlock(expand=True, flat=True),
    "torchvision-v2-first": lambda: TorchvisionBlock(expand=False, flat=True),
    "torchvision-v3": lambda: TorchvisionBlock(expand=True, flat=False, squeeze=True),
    "timm": TimmBlock,
    "effops": OwnBlock,
}


@pytest.mark.parametrize("name", BLOCKS)
def test_orthonormal_loss_of_linear_bottlenecks(name: str) -> None:
    """Each projection once, whatever is around it."""
    first, second = BLOCKS[name](), BLOCKS[name]()
    model = nn.Sequential(cna((3, 8)), nn.Sequential(first, second), cna((6, 12)), nn.AdaptiveAvgPool2d(1))
    expected = 0.1 * (distance(first.projection()) + distance(second.projection()))
    torch.testing.assert_close(effops.orthonormal_loss(model), expected)
    torch.testing.assert_close(effops.orthonormal_loss(nn.Sequential(first)), 0.1 * distance(first.projection()))


def test_orthonormal_loss_leaves_other_blocks_alone() -> None:
    """An activation behind the last 1x1, nothing nonlinear before it, a widening one: no linear bottleneck."""
    separable = nn.Sequential(cna((8, 8), 3), cna((8, 6)))
    without_activation = nn.Sequential(cna((8, 8), 3, act=None), cna((8, 6), act=None))
    widening = nn.Sequential(cna((8, 8), 3), cna((8, 16), act=None))
    for block in (separable, without_activation, widening):
        with pytest.raises(ValueError, match="neither a BSConvS nor a linear bottleneck"):
            effops.orthonormal_loss(block)


def test_stock_twin_is_the_unfused_module() -> None:
    x = torch.randn(2, 8, 6, 6)
    twin = stock.BSConvS(8, 12, 3, padding=1)
    assert torch.equal(twin(x), twin.dw(twin.pw2(twin.pw1(x))))
    assert effops.explain(twin, x).calls == []
    shortcut = torch.randn(2, 12, 6, 6)
    assert torch.equal(twin(x, shortcut), twin(x) + shortcut)
    assert_within_budget(twin(x), twin.double()(x.double()), twin.float()(x), "stock")
