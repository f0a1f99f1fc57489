"""The networks of "Nuts & Bolts": the counts of its Tables 1 and 2, agreement with their stock twins, arguments."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_within_budget, interpreted
from module_helpers import randomise
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import effops
from effops import backends
from effops.models import create_model, list_models, nuts_and_bolts

# name: (parameters, as printed; multiply-accumulates; channels of the feature map; parameters with squeeze-excite).
# Of the last column the paper's authors ran mnist_1_5k_dw's 460 more; none is printed.
COUNTS = {
    "mnist_25k": (25_144, 2_353_312, 64, 25_592),
    "mnist_7k": (7_767, 869_382, 15, 8_127),
    "mnist_7k_dw": (7_611, 558_486, 15, 8_023),
    "mnist_5k": (5_712, 836_982, 15, 6_012),
    "mnist_5k_dw": (5_616, 470_752, 16, 5_964),
    "mnist_1_5k_dw": (1_560, 253_782, 15, 2_020),
    "cifar_143k": (143_208, 10_986_672, 120, 144_520),
    "cifar_143k_dw": (143_396, 9_218_600, 260, 148_276),
}
DEPTHWISE = [name for name in COUNTS if name.endswith("_dw")]
OPTIONS = [{}, {"blurpool": True}, {"se": True}, {"blurpool": True, "se": True}]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def picture(name: str, batch: int = 2) -> Tensor:
    """Of the size of the dataset."""
    shape = (1, 28, 28) if name.startswith("mnist") else (3, 32, 32)
    return torch.randn(batch, *shape, generator=torch.Generator().manual_seed(0))


def parameters(name: str, **kwargs: Any) -> int:
    return sum(p.numel() for p in create_model(name, **kwargs).parameters())


def twins(name: str, **kwargs: Any) -> tuple[nn.Module, nn.Module]:
    """A model and its stock twin with the same state: no norm is an identity, and the image is not lost in shifts."""
    torch.manual_seed(0)
    model, twin = create_model(name, **kwargs), create_model(name, reference=True, **kwargs)
    randomise(model)
    for key, module in model.named_modules():
        if isinstance(module, nn.Conv2d) and ".se." not in key:
            nn.init.kaiming_normal_(module.weight)
            module.weight.data *= 2 if kwargs.get("se") else 1  # gates are about a half
    assert list(twin.state_dict()) == list(model.state_dict())
    twin.load_state_dict(model.state_dict())
    return model, twin


def test_every_network_is_counted_here() -> None:
    assert sorted([*list_models("mnist_*"), *list_models("cifar_143k*")]) == sorted(COUNTS)


@pytest.mark.parametrize("name", COUNTS)
def test_counts(name: str) -> None:
    expected, macs, channels, excited = COUNTS[name]
    assert parameters(name) == parameters(name, blurpool=True) == expected
    assert parameters(name, classifier_bias=True) == expected + 10
    assert parameters(name, se=True) == excited
    twin = create_model(name, reference=True).to("meta").eval()
    x = picture(name, 1).to("meta")
    with FlopCounterMode(display=False) as counter:
        twin(x)
    assert counter.get_total_flops() == 2 * macs
    for options in OPTIONS:
        features = create_model(name, reference=True, **options).to("meta").forward_features(x)
        assert features.shape == (1, channels, 4, 4)


def test_the_runs_of_the_authors() -> None:
    """In Composer: the classifier with a bias, squeeze-excite 460 parameters more; printed are 1,560."""
    assert parameters("mnist_1_5k_dw", classifier_bias=True) == 1_570
    assert parameters("mnist_1_5k_dw", classifier_bias=True, se=True) == 1_570 + 460


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("name", ["mnist_25k", "mnist_1_5k_dw", "cifar_143k_dw"])
def test_agrees_with_its_twin(name: str, options: dict[str, bool], backend: str) -> None:
    model, twin = twins(name, **options)
    truth = create_model(name, reference=True, **options).double()
    truth.load_state_dict(model.state_dict())
    x = picture(name, 1 if interpreted(backend) else 2)
    with torch.no_grad(), effops.use_backend(backend):
        actual = model.eval()(x)
        expected = truth.eval()(x.double())
        assert_within_budget(actual, expected, twin.eval()(x), f"{name} log-probabilities")
        assert (truth(-x.double()) - expected).norm() > 1e-3 * expected.norm()  # the image matters


@pytest.mark.parametrize("name", COUNTS)
def test_every_network_agrees_with_its_twin(name: str) -> None:
    """In float64, on the backend of choice."""
    model, twin = (network.double().eval() for network in twins(name))
    x = picture(name).double()
    torch.testing.assert_close(model.forward_features(x), twin.forward_features(x), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(model(x), twin(x), rtol=1e-12, atol=1e-12)


@pytest.mark.slow_interpreted("a training step takes a minute")
@pytest.mark.parametrize("options", [{}, {"blurpool": True, "se": True}], ids=str)
@pytest.mark.parametrize("name", ["mnist_5k_dw", "cifar_143k_dw"])
def test_trains_like_its_twin(name: str, options: dict[str, bool], backend: str) -> None:
    """One step in float64: loss, gradients and running statistics."""
    results = []
    for network in (network.double() for network in twins(name, **options)):
        torch.manual_seed(1)  # the same dropout
        with effops.use_backend(backend):
            loss = F.nll_loss(network(picture(name, 4).double()), torch.tensor([1, 2, 3, 4]))
            loss.backward()
        gradients = {f"{key} grad": p.grad for key, p in network.named_parameters()}
        results.append({"loss": loss.detach()} | gradients | dict(network.named_buffers()))
    for key, actual in results[0].items():
        error, size = (actual - results[1][key]).double().norm(), results[1][key].double().norm()
        assert error <= 1e-10 * size + 1e-12, f"{key}: {error:.1e} against {size:.1e}"


@pytest.mark.parametrize("name", DEPTHWISE)
def test_depthwise_units_are_fused(name: str) -> None:
    """Each unit is one kernel; with squeeze-excite its depthwise convolution, squeeze-excite and pointwise one are."""
    words = nuts_and_bolts.parse_layers(nuts_and_bolts._NETS[name][1])
    count = sum(word.kind == "d" for word in words)
    for options, kind in (({}, effops.FusedDSConv), ({"se": True}, effops.InvertedResidual)):
        model = create_model(name, **options).eval()
        units = [m for m in model.modules() if type(m) is kind]
        assert [unit.fusion_reasons() for unit in units] == [()] * count
        assert str(backends.explain(model, picture(name, 1))).count("+ 1x1") == count


def test_layers_of_the_tables() -> None:
    """Order, names and paddings of the 1.5K network of Table 1."""
    features = create_model("mnist_1_5k_dw").features
    assert [name for name, _ in features.named_children()] == [
        "conv1", "conv2", "drop2", "transition1", "pool1", "conv3", "conv4", "drop4", "transition2", "pool2", "conv5",
        "drop5",
    ]  # fmt: skip
    assert [type(part).__name__ for part in features.conv1] == ["Conv2d", "ReLU", "BatchNorm2d"]
    assert not features.conv2.norm_first
    assert [features.conv1.conv.padding, features.conv4.dw.padding, features.conv5.dw.padding] == [
        (0, 0),
        (0, 0),
        (1, 1),
    ]
    assert [features.drop2.p, features.drop4.p, features.drop5.p] == [0.05, 0.17, 0.17]
    assert not any(key.endswith("bias") for key in features.state_dict() if "norm" not in key)
    cifar = create_model("cifar_143k_dw").features
    assert not any(isinstance(module, nn.Dropout) for module in cifar.modules())
    convolutions = [module for module in cifar.modules() if isinstance(module, nn.Conv2d)]
    assert all(conv.bias is not None for conv in convolutions)
    assert {conv.padding for conv in convolutions if conv.kernel_size == (3, 3)} == {(1, 1)}


def test_transitions_are_bare() -> None:
    assert type(create_model("mnist_7k").features.transition1) is nn.Conv2d
    excited = create_model("mnist_7k", se=True).features.transition1
    assert [name for name, _ in excited.named_children()] == ["conv", "se"]
    assert excited.conv.bias is None


def test_squeeze_excite_stands_ahead_of_the_activation() -> None:
    """mosaicml's: 2 channels between, no biases, not where a convolution has fewer than 5 channels."""
    features = create_model("mnist_1_5k_dw", se=True).features
    assert [name for name, _ in features.conv1.named_children()] == ["conv", "act", "norm"]  # 1 input channel
    assert [name for name, _ in features.conv2.named_children()] == ["conv", "se", "act", "norm"]
    excites = [module for module in features.modules() if isinstance(module, effops.SqueezeExcite)]
    assert len(excites) == 4 * 2 + 2  # depthwise and pointwise convolutions, transitions
    assert all(se.reduce.out_channels == 2 and se.reduce.bias is None and se.expand.bias is None for se in excites)
    assert all(se.gate == "sigmoid" and isinstance(se.act, nn.ReLU) for se in excites)
    dense = create_model("mnist_7k", se=True).features
    assert [name for name, _ in dense.conv2.named_children()] == ["conv", "se", "act", "norm"]


def test_blurpool_is_mosaicmls() -> None:
    """Max pool of stride 1 without padding (24 -> 23), then the binomial blur of stride 2 with zero padding (-> 12)."""
    pool = create_model("mnist_1_5k_dw", blurpool=True).features.pool1
    x = torch.randn(1, 8, 24, 24, dtype=torch.float64)
    kernel = torch.tensor([[1.0, 2, 1], [2, 4, 2], [1, 2, 1]], dtype=torch.float64) / 16
    expected = F.conv2d(F.max_pool2d(x, 2, 1), kernel.expand(8, 1, 3, 3), None, 2, 1, groups=8)
    assert expected.shape[-1] == 12
    torch.testing.assert_close(pool(x), expected, rtol=1e-12, atol=1e-12)
    assert type(create_model("mnist_1_5k_dw").features.pool1) is nn.MaxPool2d


@pytest.mark.parametrize("name", COUNTS)
def test_vocabulary(name: str) -> None:
    model = create_model(name, num_classes=7).eval()
    x = picture(name)
    features = model.forward_features(x)
    pooled = model.forward_head(features, pre_logits=True)
    assert pooled.shape == (2, model.num_features)
    assert torch.equal(model(x), model.forward_head(features))
    torch.testing.assert_close(model(x), F.log_softmax(model.get_classifier()(pooled), 1))
    torch.testing.assert_close(model(x).exp().sum(1), torch.ones(2))
    target = torch.tensor([1, 2])
    torch.testing.assert_close(F.cross_entropy(model(x), target), F.nll_loss(model(x), target))  # either will do
    model.reset_classifier(3)
    assert model.num_classes == 3 and model.get_classifier().bias is None
    assert model(x).shape == (2, 3)
    model.reset_classifier(0)
    assert torch.equal(model(x), pooled)
    assert create_model(name, num_classes=0).eval()(x).shape == pooled.shape
    biased = create_model(name, classifier_bias=True)
    biased.reset_classifier(4)
    assert biased.get_classifier().bias.shape == (4,)


def test_arguments() -> None:
    x = torch.randn(1, 3, 28, 28)
    assert create_model("mnist_1_5k_dw", in_channels=3).eval()(x).shape == (1, 10)
    assert create_model("cifar_143k", in_channels=1).eval()(x[:, :1]).shape == (1, 10)
    with pytest.raises(TypeError, match="width"):
        create_model("mnist_25k", width=2)


def test_layer_strings() -> None:
    assert nuts_and_bolts.parse_layers("c8 d12 T8  P") == [("c", 8), ("d", 12), ("T", 8), ("P", 0)]
    for word in ("x8", "c", "c0", "P2", "t8", "c8P"):
        with pytest.raises(ValueError, match=f"unknown layer '{word}' in 'c8 {word}'; accepted: cN, dN, TN"):
            nuts_and_bolts.parse_layers(f"c8 {word}")
