"""The BSConv paper's MobileNets, EfficientNet and MnasNets: counts, twins, the authors' package, arguments."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from helpers import assert_within_budget, interpreted
from module_helpers import randomise
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import effops
from effops import backends
from effops.models import create_model, list_models
from effops.models.bsconv.bottlenecks import stride_plan
from effops.models.bsconv.mobilenetv1 import MobileNetV1
from effops.models.bsconv.mobilenetv3 import MobileNetV3

# name: (parameters with 1,000 classes, multiply-accumulates at 224 x 224, at 32 x 32 with input="cifar").
COUNTS = {
    "mobilenetv1": (4_231_982, 568_740_352, 176_570_368),
    "mobilenetv1_bsconvu": (4_230_990, 884_021_248, 253_468_672),
    "mobilenetv2": (3_505_966, 313_619_328, 90_292_224),
    "mobilenetv3_small": (1_665_292, 58_844_128, 17_905_696),
    "mobilenetv3_large": (3_931_412, 218_250_400, 66_437_728),
    "efficientnet_b0": (5_288_548, 385_814_752, 117_434_368),
    "mnasnet_b1": (4_383_312, 314_415_872, 96_057_344),
    "mnasnet_a1": (3_887_038, 311_579_072, 92_942_624),
}
FULL_HEADS = {"mobilenetv3_small": (2_703_116, 59_881_952), "mobilenetv3_large": (5_480_212, 219_799_200)}
STANFORD_DOGS = {"efficientnet_b0": 4_161_268, "mnasnet_b1": 3_256_032, "mnasnet_a1": 2_759_758}  # 120 classes: Table 4
# Parameters in the widths of Table 1, for CIFAR-10; the prints of the README: test_models_published.py.
WIDTHS = {
    ("mobilenetv1", 1.0): 3_217_232,
    ("mobilenetv1", 0.75): 1_824_256,
    ("mobilenetv1", 0.5): 823_728,
    ("mobilenetv1", 0.25): 215_648,
    ("mobilenetv1_bsconvu", 1.0): 3_216_240,
    ("mobilenetv1_bsconvu", 0.75): 1_823_512,
    ("mobilenetv1_bsconvu", 0.5): 823_232,
    ("mobilenetv1_bsconvu", 0.25): 215_400,
    ("mobilenetv2", 1.0): 2_237_776,
    ("mobilenetv2", 0.75): 1_360_408,
    ("mobilenetv2", 0.5): 697_552,
    ("mobilenetv2", 0.25): 249_208,
    ("mobilenetv3_small", 1.0): 1_094_062,
    ("mobilenetv3_small", 0.75): 715_274,
    ("mobilenetv3_small", 0.5): 435_711,
    ("mobilenetv3_small", 0.35): 313_321,
    ("mobilenetv3_large", 1.0): 2_980_022,
    ("mobilenetv3_large", 0.75): 1_732_303,
    ("mobilenetv3_large", 0.5): 821_963,
    ("mobilenetv3_large", 0.35): 436_036,
}
PACKAGE_WIDTHS = {1.0: "w1", 0.75: "w3d4", 0.5: "w1d2", 0.35: "w7d20", 0.25: "w1d4"}
BLOCKS = {  # linear bottlenecks, or separable and blueprint convolutions
    "mobilenetv1": 13,
    "mobilenetv1_bsconvu": 13,
    "mobilenetv2": 17,
    "mobilenetv3_small": 11,
    "mobilenetv3_large": 15,
    "efficientnet_b0": 16,
    "mnasnet_b1": 17,
    "mnasnet_a1": 16,
}
BOTTLENECKS = [name for name in BLOCKS if not name.startswith("mobilenetv1")]

FAMILIES = ("mobilenetv1", "mobilenetv1_bsconvu", "mobilenetv2", "mobilenetv3_small")  # run on every backend


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def package() -> ModuleType:
    """The authors' package."""
    return pytest.importorskip("bsconv.pytorch", reason="pip install --no-deps bsconv==0.4.0")


def picture(size: int = 32, batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0))


def narrow(name: str) -> dict[str, Any]:
    """Arguments for a quarter of the channels (V3, whose squeeze-excites would vanish, about a third)."""
    return {"width": 0.35 if name.startswith("mobilenetv3") else 0.25, "num_classes": 10}


def liven(model: nn.Module) -> nn.Module:
    """No norm is an identity, and the image is not lost among their shifts."""
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
    randomise(model)
    return model


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def macs(model: nn.Module, size: int) -> int:
    """Of convolutions and linear layers, operator by operator; the model is on meta."""
    with FlopCounterMode(display=False) as counter:
        model.eval()(torch.empty(1, 3, size, size, device="meta"))
    assert counter.get_total_flops() % 2 == 0
    return counter.get_total_flops() // 2


def on_meta(name: str, **kwargs: Any) -> nn.Module:
    with torch.device("meta"):
        return create_model(name, reference=True, **kwargs)


# ---------------------------------------------------------------------------------------------------------------------
# Counts
# ---------------------------------------------------------------------------------------------------------------------


def test_names() -> None:
    expected = {*COUNTS, *(f"{name}_bsconvs" for name in BOTTLENECKS)}
    found = {name for kind in ("mobilenetv[123]*", "efficientnet*", "mnasnet*") for name in list_models(kind)}
    assert found == expected


@pytest.mark.parametrize("name", COUNTS)
def test_counts(name: str) -> None:
    expected, large, small = COUNTS[name]
    assert parameters(create_model(name)) == expected
    assert macs(on_meta(name), 224) == large
    assert macs(on_meta(name, input="cifar"), 32) == small


@pytest.mark.parametrize("name", FULL_HEADS)
def test_counts_with_full_heads(name: str) -> None:
    model = on_meta(name, head="full")
    assert (parameters(model), macs(model, 224)) == FULL_HEADS[name]


@pytest.mark.parametrize("name", STANFORD_DOGS)
def test_counts_with_120_classes(name: str) -> None:
    assert parameters(on_meta(name, num_classes=120)) == STANFORD_DOGS[name]


@pytest.mark.parametrize("name, width", WIDTHS)
def test_counts_by_width(name: str, width: float) -> None:
    assert parameters(on_meta(name, width=width, num_classes=10, input="cifar")) == WIDTHS[name, width]


def test_blueprints_change_the_order_not_the_size() -> None:
    """Section 4.1: V1's pairs of convolutions change places. Pointwise ones then run ahead of the strides."""
    standard, blueprint = COUNTS["mobilenetv1"], COUNTS["mobilenetv1_bsconvu"]
    assert standard[0] - blueprint[0] == 992  # 3x3 kernels and norms of 32 more channels at the end, not the start
    assert blueprint[1] > 1.5 * standard[1]


@pytest.mark.parametrize("name", BOTTLENECKS)
def test_subspace_form_is_the_same_network(name: str) -> None:
    """Section 4.2: only the loss differs, by one term for each linear bottleneck."""
    torch.manual_seed(0)
    model = create_model(f"{name}_bsconvs", **narrow(name))
    torch.manual_seed(0)
    standard = create_model(name, **narrow(name))
    assert list(model.state_dict()) == list(standard.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), standard.parameters(), strict=True))
    projections = [m.pw.weight.flatten(1) for m in model.modules() if isinstance(m, effops.InvertedResidual)]
    assert len(projections) == BLOCKS[name]
    terms = [torch.linalg.matrix_norm(w @ w.T - torch.eye(len(w))) for w in projections]
    torch.testing.assert_close(effops.orthonormal_loss(model, alpha=0.01), 0.01 * sum(terms))


# ---------------------------------------------------------------------------------------------------------------------
# The authors' package
# ---------------------------------------------------------------------------------------------------------------------


def package_name(name: str, width: float, input: str) -> str:
    base, _, form = name.partition("_bsconv")
    suffix = {"": "", "u": "_bsconvu", "s": "_bsconvs_p1d6"}[form]
    return f"{'cifar_' if input == 'cifar' else ''}{base}_{PACKAGE_WIDTHS[width]}{suffix}"


@pytest.mark.parametrize(
    "name, width, input",
    [
        *((name, width, "cifar") for name, width in WIDTHS),
        *((name, 1.0, "imagenet") for name in COUNTS if name.startswith("mobilenet")),
        ("mobilenetv2_bsconvs", 0.25, "cifar"),
        ("mobilenetv3_small_bsconvs", 0.35, "cifar"),
        ("mobilenetv3_large_bsconvs", 0.35, "cifar"),
    ],
)
def test_agrees_with_the_authors_package(package: ModuleType, name: str, width: float, input: str) -> None:
    """Its state dict loads and gives its features and logits; multiply-accumulates and losses are equal."""
    witness = liven(package.get_model(package_name(name, width, input), num_classes=10)).double().eval()
    model = create_model(name, width=width, input=input, num_classes=10).double().eval()
    model.load_state_dict(witness.state_dict())
    x = picture().double()
    with torch.no_grad():
        expected = witness(x)
        pooled = model.forward_head(model.forward_features(x), pre_logits=True)
        torch.testing.assert_close(pooled, witness.backbone(x).flatten(1), rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(model(x), expected, rtol=1e-10, atol=1e-10)
        assert (witness(-x) - expected).norm() > 1e-3 * expected.norm()  # the image matters
    if name.endswith("bsconvs"):
        torch.testing.assert_close(effops.orthonormal_loss(model), witness.reg_loss(alpha=0.1))
    size = 224 if input == "imagenet" else 32
    meta = create_model(name, width=width, input=input, num_classes=10, reference=True).to("meta")
    assert macs(meta, size) == macs(witness.float().to("meta"), size)


def test_full_head_is_the_packages(package: ModuleType) -> None:
    for size in ("small", "large"):
        witness = package.mobilenet.build_mobilenet_v3(10, size, width_multiplier=0.35, use_lightweight_head=False)
        liven(witness).double().eval()
        model = create_model(f"mobilenetv3_{size}", width=0.35, head="full", num_classes=10).double().eval()
        model.load_state_dict(witness.state_dict())
        x = picture().double()
        torch.testing.assert_close(model(x), witness(x), rtol=1e-10, atol=1e-10)


def test_keys_of_the_package() -> None:
    """As above, where the package is not installed."""
    assert MobileNetV3.author_key_map(
        [
            "backbone.init_conv.bn.weight",
            "backbone.stage1.unit1.conv1.conv.weight",
            "backbone.stage1.unit1.conv2.bn.running_mean",
            "backbone.stage1.unit1.se_unit.conv2.bias",
            "backbone.stage1.unit1.conv3.conv.weight",
            "backbone.final_conv1.bn.bias",
            "backbone.final_se.conv1.weight",
            "backbone.final_conv2.conv.weight",
            "classifier.conv.bias",
        ],
    ) == {
        "backbone.init_conv.bn.weight": "features.stem.norm.weight",
        "backbone.stage1.unit1.conv1.conv.weight": "features.stage1.unit1.expand.weight",
        "backbone.stage1.unit1.conv2.bn.running_mean": "features.stage1.unit1.dw_norm.running_mean",
        "backbone.stage1.unit1.se_unit.conv2.bias": "features.stage1.unit1.se.expand.bias",
        "backbone.stage1.unit1.conv3.conv.weight": "features.stage1.unit1.pw.weight",
        "backbone.final_conv1.bn.bias": "features.final.norm.bias",
        "backbone.final_se.conv1.weight": "features.final_se.reduce.weight",
        "backbone.final_conv2.conv.weight": "hidden.conv.weight",
        "classifier.conv.bias": "classifier.bias",
    }
    assert MobileNetV1.author_key_map(
        [
            "backbone.data_bn.weight",
            "backbone.stage2.unit1.conv_dw.bn.weight",
            "backbone.stage2.unit1.conv_pw.conv.weight",
            "backbone.stage3.unit2.0.dw.weight",
            "backbone.stage3.unit2.1.running_var",
        ],
    ) == {
        "backbone.data_bn.weight": "data_bn.weight",
        "backbone.stage2.unit1.conv_dw.bn.weight": "features.stage2.unit1.dw_norm.weight",
        "backbone.stage2.unit1.conv_pw.conv.weight": "features.stage2.unit1.pw.weight",
        "backbone.stage3.unit2.0.dw.weight": "features.stage3.unit2.dw.weight",
        "backbone.stage3.unit2.1.running_var": "features.stage3.unit2.norm.running_var",
    }


# ---------------------------------------------------------------------------------------------------------------------
# Twins
# ---------------------------------------------------------------------------------------------------------------------


def twins(name: str, **kwargs: Any) -> tuple[nn.Module, nn.Module]:
    """A narrow model and its stock twin with the same state."""
    kwargs = narrow(name) | kwargs
    model, twin = liven(create_model(name, **kwargs)), create_model(name, reference=True, **kwargs)
    assert list(twin.state_dict()) == list(model.state_dict())
    twin.load_state_dict(model.state_dict())
    return model, twin


@pytest.mark.parametrize("name", [*FAMILIES, "efficientnet_b0"])
def test_agrees_with_its_twin(name: str, backend: str) -> None:
    model, twin = twins(name)
    truth = create_model(name, reference=True, **narrow(name)).double()
    truth.load_state_dict(model.state_dict())
    x = picture(16, 1) if interpreted(backend) else picture(64)
    with torch.no_grad(), effops.use_backend(backend):
        actual = model.eval()(x)
        expected = truth.eval()(x.double())
        assert_within_budget(actual, expected, twin.eval()(x), f"{name} logits")
        assert (truth(-x.double()) - expected).norm() > 1e-5 * expected.norm()  # the image matters
        features = model.forward_features(x.contiguous(memory_format=torch.channels_last))
        assert features.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("name", COUNTS)
def test_every_network_agrees_with_its_twin(name: str) -> None:
    """In float64, on the backend of choice, with CIFAR's strides."""
    model, twin = (network.double().eval() for network in twins(name, input="cifar"))
    x = picture().double()
    with torch.no_grad():
        torch.testing.assert_close(model.forward_features(x), twin.forward_features(x), rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(model(x), twin(x), rtol=1e-10, atol=1e-10)


def assert_trains_like_its_twin(name: str) -> None:
    """One step in float64: loss with the orthonormal one, gradients and running statistics."""
    results, x = [], picture(16, 8).double()
    for network in twins(name, input="cifar"):
        network.double()
        torch.manual_seed(1)  # the same dropout
        loss = nn.functional.cross_entropy(network(x), torch.arange(8))
        if name in BOTTLENECKS:
            loss = loss + effops.orthonormal_loss(network)
        loss.backward()
        gradients = {f"{key} grad": p.grad for key, p in network.named_parameters()}
        results.append({"loss": loss.detach()} | gradients | dict(network.named_buffers()))
    for key, actual in results[0].items():
        error, size = (actual - results[1][key]).double().norm(), results[1][key].double().norm()
        # A bias ahead of a batch norm has no gradient but rounding: hence the absolute part.
        assert error <= 1e-10 * size + 1e-12, f"{key}: {error:.1e} against {size:.1e}"


@pytest.mark.slow_interpreted("whole networks take minutes, and batch norms want no fewer values")
@pytest.mark.parametrize("name", FAMILIES)
def test_trains_like_its_twin(name: str, backend: str) -> None:
    with effops.use_backend(backend):
        assert_trains_like_its_twin(name)


@pytest.mark.parametrize("name", sorted(set(COUNTS) - set(FAMILIES)))
def test_other_networks_train_like_their_twins(name: str) -> None:
    """On the backend of choice."""
    assert_trains_like_its_twin(name)


@pytest.mark.parametrize("name", BLOCKS)
def test_whole_networks_use_the_fused_functions(name: str) -> None:
    model = create_model(name, **narrow(name)).eval()
    kinds = (effops.FusedDSConv, effops.BSConvU)  # InvertedResidual is a FusedDSConv
    blocks = [module for module in model.modules() if isinstance(module, kinds)]
    assert [block.fusion_reasons() for block in blocks] == [()] * BLOCKS[name]
    assert str(backends.explain(model, picture(32, 1))).count("1x1 +" if "bsconvu" in name else "+ 1x1") == BLOCKS[name]


# ---------------------------------------------------------------------------------------------------------------------
# Layout and arguments
# ---------------------------------------------------------------------------------------------------------------------


def sizes(model: nn.Module, size: int) -> list[int]:
    """Of the feature maps behind the stem and each stage."""
    x, found = torch.empty(1, 3, size, size, device="meta"), []
    for name, part in model.features.named_children():
        x = part(x)
        if name.startswith(("stem", "stage")):
            found.append(x.shape[-1])
    return found


def test_stride_plans() -> None:
    """ImageNet's and CIFAR's, where maps end at 4 x 4."""
    for name in ("mobilenetv1", "mobilenetv1_bsconvu", "mobilenetv2", "mobilenetv3_large"):
        assert sizes(on_meta(name), 224) == [112, 112, 56, 28, 14, 7]
        assert sizes(on_meta(name, input="cifar"), 32) == [32, 32, 32, 16, 8, 4]
    assert sizes(on_meta("mobilenetv3_small"), 224) == [112, 56, 28, 14, 7]
    assert sizes(on_meta("mobilenetv3_small", input="cifar"), 32) == [32, 32, 16, 8, 4]
    for name in ("efficientnet_b0", "mnasnet_b1", "mnasnet_a1"):
        assert sizes(on_meta(name), 224) == [112, 112, 56, 28, 14, 14, 7, 7]
        assert sizes(on_meta(name, input="cifar"), 32) == [32, 32, 32, 16, 8, 8, 4, 4]
    with pytest.raises(ValueError, match="unknown input 'mnist'; accepted: imagenet, cifar"):
        stride_plan((2, 2), "mnist")


def test_first_blocks() -> None:
    """The MobileNets' keep an expansion that does not widen; those of EfficientNet and MnasNet have none."""
    for name, channels in (("mobilenetv2", 32), ("mobilenetv3_small", 16), ("mobilenetv3_large", 16)):
        first = create_model(name).features.stage1.unit1
        assert (first.expand.in_channels, first.expand.out_channels) == (channels, channels)
        assert not isinstance(first.expand_act, nn.Identity)
        assert first.residual == (name == "mobilenetv3_large")
    for name in ("efficientnet_b0", "mnasnet_b1", "mnasnet_a1"):
        assert isinstance(create_model(name).features.stage1.unit1.expand, nn.Identity)


def test_units_of_mobilenetv1() -> None:
    standard = create_model("mobilenetv1").features.stage2.unit1
    assert isinstance(standard, effops.FusedDSConv) and standard.norm_first
    assert isinstance(standard.dw_act, nn.ReLU) and isinstance(standard.act, nn.ReLU)
    blueprint = create_model("mobilenetv1_bsconvu").features.stage2.unit1
    assert isinstance(blueprint, effops.BSConvU) and isinstance(blueprint.norm, nn.BatchNorm2d)
    assert isinstance(blueprint.act, nn.ReLU) and blueprint.fusion_reasons() == ()
    assert isinstance(blueprint.bn, nn.Identity) and blueprint.dw.stride == (2, 2)
    assert isinstance(create_model("mobilenetv1_bsconvu").features.stem.conv, nn.Conv2d)


def test_initialisation() -> None:
    """Convolutions by He's uniform one, as the authors'; blueprint ones stay at torch's, a sixth of its variance."""

    def share(weight: Tensor) -> float:
        """The largest weight over He's bound."""
        return (weight.abs().max() / (6 / weight[0].numel()) ** 0.5).item()

    for name in COUNTS:
        model = create_model(name, num_classes=1)
        blueprints = {id(m.weight) for b in model.modules() if isinstance(b, effops.BSConvU) for m in (b.pw, b.dw)}
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                low, high = (0.35, 0.41) if id(module.weight) in blueprints else (0.9, 1.0)
                assert low < share(module.weight) <= high, f"{name}: {module}"
                assert module.bias is None or not module.bias.any()


def excited(model: nn.Module) -> list[tuple[int, int]]:
    """(channels, reduced channels) of the squeeze-excites."""
    modules = [module for module in model.modules() if isinstance(module, effops.SqueezeExcite)]
    return [(module.reduce.in_channels, module.reduce.out_channels) for module in modules]


def test_squeeze_excites() -> None:
    small, large = create_model("mobilenetv3_small"), create_model("mobilenetv3_large")
    assert [c for c, _ in excited(small)] == [16, 96, 240, 240, 120, 144, 288, 576, 576, 576]  # the last: `final_se`
    assert [c for c, _ in excited(large)] == [72, 120, 120, 480, 672, 672, 960, 960]
    assert all(hidden == channels // 4 for channels, hidden in [*excited(small), *excited(large)])
    assert {m.gate for m in large.modules() if isinstance(m, effops.SqueezeExcite)} == {"hardsigmoid"}
    efficient = create_model("efficientnet_b0")
    assert excited(efficient)[:4] == [(32, 8), (96, 4), (144, 6), (144, 6)]  # of the block's input channels
    assert len(excited(efficient)) == 16
    assert {m.gate for m in efficient.modules() if isinstance(m, effops.SqueezeExcite)} == {"sigmoid"}
    assert isinstance(efficient.features.stage1.unit1.se.act, nn.SiLU)
    assert excited(create_model("mnasnet_b1")) == []
    assert len(excited(create_model("mnasnet_a1"))) == 3 + 2 + 3


@pytest.mark.parametrize("name", [*COUNTS, "mobilenetv3_small full"])
def test_vocabulary(name: str) -> None:
    name, _, head = name.partition(" ")
    kwargs = {"head": head} if head else {}
    model = create_model(name, **narrow(name) | kwargs).eval()
    x = picture(32, 1)
    features = model.forward_features(x)
    assert features.shape[1] == (576 if head else model.num_features)
    pooled = model.forward_head(features, pre_logits=True)
    assert pooled.shape == (1, 1024) if head else (1, model.num_features)
    assert torch.equal(model.get_classifier()(pooled), model(x))
    model.reset_classifier(3)
    assert model(x).shape == (1, 3)
    model.reset_classifier(0)
    assert torch.equal(model(x), pooled)
    assert create_model(name, **narrow(name) | kwargs | {"num_classes": 0}).eval()(x).shape == pooled.shape


@pytest.mark.parametrize("name", COUNTS)
def test_arguments(name: str) -> None:
    default, by_package = parameters(on_meta(name)), name.startswith("mobilenet")
    with_norm, without = (parameters(on_meta(name, data_bn=data_bn)) for data_bn in (True, False))
    assert with_norm - without == 6
    assert default == (with_norm if by_package else without)
    assert create_model(name, **narrow(name), in_channels=1).eval()(picture(32, 1)[:, :1]).shape == (1, 10)
    with pytest.raises(ValueError, match="width must "):
        create_model(name, width=0)
    with pytest.raises(ValueError, match="unknown input 'svhn'"):
        create_model(name, input="svhn")


@pytest.mark.parametrize("name", BOTTLENECKS)
def test_dropout(name: str) -> None:
    default = 0.0 if name.startswith("mobilenet") else 0.2
    assert create_model(name, **narrow(name)).dropout.p == default
    model = create_model(name, **narrow(name), dropout=1.0)
    assert torch.equal(model(picture(32, 4)), model.classifier.bias.expand(4, 10))  # nothing is left of the features


def test_widths_and_heads() -> None:
    assert create_model("mobilenetv2", width=1.5).num_features == 1920
    assert create_model("mobilenetv2", width=0.5).num_features == 1280
    assert create_model("mobilenetv3_small", width=2.0).num_features == 1152
    assert create_model("mnasnet_b1", width=1.5).num_features == 1920
    with pytest.raises(ValueError, match=r"width must leave .* squeeze-excite .*, got 0\.2"):
        create_model("mobilenetv3_small", width=0.2)  # 16 channels become 3
    with pytest.raises(ValueError, match="unknown head 'heavy'; accepted: light, full"):
        create_model("mobilenetv3_small", head="heavy")
