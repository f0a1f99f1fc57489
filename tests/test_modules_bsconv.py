"""BSConvU, BSConvS and the orthonormal loss."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from conftest import require_backend
from helpers import assert_within_budget
from module_helpers import compare, image, randomise
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
    assert_within_budget(twin(x), twin.double()(x.double()), twin.float()(x), "stock")
