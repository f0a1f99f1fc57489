"""The networks of the BSConv paper, part 1: residual networks, VGG-16, DenseNet-121, Xception."""

from __future__ import annotations

import importlib.util
import math
import re
from typing import Any

import pytest
import torch
from helpers import assert_within_budget
from module_helpers import randomise
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import effops
from effops.models import create_model, list_models, published
from effops.models.bsconv import layers
from effops.models.flops import bsconv_readme_flops, osmr_flops
from effops.modules import BSConvS, BSConvU, FusedDSConv

PACKAGE = pytest.mark.skipif(
    importlib.util.find_spec("bsconv") is None, reason="the authors' package: pip install --no-deps bsconv==0.4.0"
)

# Of the ImageNet ResNets, 1,000 classes at 224 x 224: parameters and multiply-accumulates, standard and BSConv-U.
# The package bsconv 0.4.0 builds the same; Figure 6 has no printed numbers.
RESNETS = {
    10: ((5_418_798, 889_229_312), (1_241_774, 285_862_912)),
    18: ((11_689_518, 1_814_073_344), (1_959_214, 395_397_120)),
    26: ((17_960_238, 2_738_917_376), (2_676_654, 504_931_328)),
    34: ((21_797_678, 3_663_761_408), (3_122_350, 612_207_616)),
    68: ((41_869_102, 7_594_348_544), (5_446_318, 1_064_293_376)),
    102: ((58_399_534, 11_524_935_680), (7_365_806, 1_519_991_808)),
}

# Table 4 (its 120 classes, at 224 x 224): parameters and multiply-accumulates. It prints neither.
TABLE_4 = {
    "vgg16_bn": (14_784_696, 15_346_692_096),
    "vgg16_bn_bsconvu": (1_746_744, 1_827_170_304),
    "densenet121": (7_076_856, 2_833_260_544),
    "densenet121_bsconvu": (5_193_016, 1_738_294_784),
    "xception": (21_052_832, 4_551_076_832),
    "xception_bsconvu": (21_054_400, 4_376_515_520),
}

# Table 2, name: [(classes, parameters, osmr FLOPs / 2)]. The prints of it and of the README: test_models_published.py.
TABLE_2 = {
    "cifar_resnet20": ((10, 272_480, 41_300_840), (100, 278_330, 41_306_600)),
    "cifar_resnet110_bsconvu": ((10, 238_960, 41_140_352), (100, 244_810, 41_146_112)),
    "wrn_40_3": ((10, 5_038_560, 734_956_264), (100, 5_055_930, 734_973_544)),
    "wrn_40_8_bsconvu": ((10, 4_240_112, 671_583_968), (100, 4_286_282, 671_630_048)),
}

# The forms that have fused modules, at the smallest size of each family.
FUSED = (
    "cifar_resnet20_bsconvu",
    "cifar_resnet20_bsconvs",
    "wrn_16_1_bsconvu",
    "wrn_16_1_bsconvs",
    "resnet10_bsconvu",
    "resnet10_bsconvs",
    "vgg16_bn_bsconvu",
    "densenet121_bsconvu",
    "xception",
    "xception_bsconvu",
)
STANDARD = ("cifar_resnet20", "wrn_16_1", "resnet10", "vgg16_bn", "densenet121", "xception")


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def picture(size: int, batch: int, seed: int = 0) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(seed))


def on_meta(name: str, **kwargs: Any) -> nn.Module:
    """The stock twin without data."""
    with torch.device("meta"):
        return create_model(name, reference=True, **kwargs).eval()


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def macs(model: nn.Module, size: int) -> int:
    with FlopCounterMode(display=False) as counter:
        model(torch.empty(1, 3, size, size, device="meta"))
    return counter.get_total_flops() // 2


# ---------------------------------------------------------------------------------------------------------------------
# Names and counts
# ---------------------------------------------------------------------------------------------------------------------


def test_names() -> None:
    forms = ("", "_bsconvs", "_bsconvu")
    cifar = {f"cifar_resnet{depth}{form}" for depth in (20, 56, 110, 302, 602) for form in forms}
    wide = {f"wrn_{depth}_{width}{form}" for depth in (16, 28, 40) for width in (1, 2, 3, 4, 8) for form in forms}
    large = {f"resnet{depth}{form}" for depth in RESNETS for form in forms}
    assert set(list_models("cifar_resnet*")) == cifar
    assert set(list_models("wrn_*")) == wide
    assert set(list_models("resnet*")) == large
    assert set(TABLE_4) <= set(list_models())


@pytest.mark.parametrize("depth", RESNETS)
def test_imagenet_resnet_counts(depth: int) -> None:
    for form, expected in zip(("standard", "bsconvu"), RESNETS[depth], strict=True):
        model = on_meta(layers.name_of(f"resnet{depth}", form))
        assert (parameters(model), macs(model, 224)) == expected


@pytest.mark.parametrize("name", TABLE_4)
def test_table_4_counts(name: str) -> None:
    model = on_meta(name, num_classes=120)
    assert (parameters(model), macs(model, 224)) == TABLE_4[name]


@pytest.mark.parametrize("name", TABLE_2)
def test_table_2(name: str) -> None:
    for classes, count, flops in TABLE_2[name]:
        model = on_meta(name, num_classes=classes)
        assert (parameters(model), osmr_flops(model, (1, 3, 32, 32)) / 2) == (count, flops)


def test_table_2_fits_without_the_batch_norm_on_the_image() -> None:
    """So the print does not tell whether the paper's networks had it."""
    for name in ("cifar_resnet20", "cifar_resnet110_bsconvu"):
        without = parameters(on_meta(name, data_bn=False))
        assert parameters(on_meta(name)) - without == 6
        figures = [figure for figure in published.figures(name) if figure.source == "BSConv, Table 2, CIFAR-10"]
        (printed,) = (figure.printed for figure in figures if figure.quantity == "parameters")
        assert published.judge(printed, without).agrees


def test_claims_of_the_text() -> None:
    count = {name: values[0] for name, values in TABLE_4.items()}
    # Section 5.3: "up to 8.5x less parameters". 8.46; 8.48 where the convolutions had no biases.
    assert round(count["vgg16_bn"] / count["vgg16_bn_bsconvu"], 2) == 8.46
    # Section 5.2: ResNet-10 and ResNet-68 + BSConv-U "have similar parameter counts".
    assert abs(RESNETS[68][1][0] / RESNETS[10][0][0] - 1) < 0.01
    # Section 5.2: ResNet-34 + BSConv-U "only about one fifth" of ResNet-18. The networks give rather a quarter.
    assert round(RESNETS[34][1][0] / RESNETS[18][0][0], 3) == 0.267


def test_xception_stem() -> None:
    """Whether the stem was replaced the paper does not say; the rest differs by 9 weights a widened channel."""
    kept = on_meta("xception_bsconvu", num_classes=120, blueprint_stem=False)
    assert parameters(kept) == 21_070_688 == TABLE_4["xception"][0] + 9 * 1984
    replaced = on_meta("xception_bsconvu", num_classes=120)
    saved = [(9 * before * after) - (before * after + 9 * after) for before, after in ((3, 32), (32, 64))]
    assert parameters(kept) - parameters(replaced) == sum(saved)


@pytest.mark.parametrize("name", ["cifar_resnet56", "cifar_resnet56_bsconvu", "wrn_28_4"])
def test_the_effops_form_has_the_same_parameters(name: str) -> None:
    with torch.device("meta"):
        assert parameters(create_model(name)) == parameters(on_meta(name))


def test_flops_need_the_stock_twin() -> None:
    with pytest.raises(ValueError, match=r"BSConvU fuse them; count the twin: create_model\(name, reference=True\)"):
        osmr_flops(create_model("cifar_resnet20_bsconvu"), (1, 3, 32, 32))


def test_flop_rules_by_hand() -> None:
    """Every rule on its own: [1, 4, 6, 6] through one module at a time."""
    size = (1, 4, 6, 6)
    conv, grouped, biased = nn.Conv2d(4, 8, 3, bias=False), nn.Conv2d(4, 8, 1, 2, groups=2), nn.Conv2d(4, 8, 3)
    cases = {  # osmr, README
        conv: ((2 * 9 * 16 - 1) * 4 * 8, 9 * 16 * 4 * 8),
        biased: (2 * 9 * 16 * 4 * 8, 9 * 16 * 4 * 8 + 8 * 16),
        grouped: (2 * 9 * 4 * 8 // 2, 9 * 4 * 8 // 2 + 8 * 9),
        nn.BatchNorm2d(4): (4 * 144, 2 * 144),
        nn.ReLU(): (144, 144),
        nn.ReLU(inplace=True): (144, 144),
        nn.ReLU6(inplace=True): (144, 0),
        nn.Hardswish(): (0, 0),
        nn.MaxPool2d(3, 2, 1): (9 * 36, 144),
        nn.AvgPool2d(2): (4 * 36, 144),
        nn.AdaptiveAvgPool2d(1): (144, 144),
        nn.Sequential(nn.Flatten(), nn.Linear(144, 10)): (2 * 1440, 1440 + 10),
    }
    for module, expected in cases.items():
        assert (osmr_flops(module, size), bsconv_readme_flops(module, size)) == expected, module


# ---------------------------------------------------------------------------------------------------------------------
# Values
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow_interpreted("whole networks take minutes; the modules have tests of their own")
@pytest.mark.parametrize("name", FUSED)
def test_agrees_with_its_twin(name: str, backend: str) -> None:
    model, twin, truth = create_model(name), create_model(name, reference=True), create_model(name, reference=True)
    randomise(model)
    for other in (twin, truth):
        assert list(other.state_dict()) == list(model.state_dict())
        other.load_state_dict(model.state_dict())
    truth.double()
    x = picture(32, 2)
    with torch.no_grad(), effops.use_backend(backend):
        actual = model.eval()(x)
        assert_within_budget(actual, truth.eval()(x.double()), twin.eval()(x), f"{name} logits")


@pytest.mark.slow_interpreted("whole networks take minutes, and batch norms want no fewer values")
@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("cifar_resnet20_bsconvs", 32),
        ("wrn_16_1_bsconvu", 32),
        ("resnet10_bsconvs", 64),
        ("vgg16_bn_bsconvu", 32),
        ("densenet121_bsconvu", 64),
        ("xception", 64),
    ],
)
def test_trains_like_its_twin(name: str, size: int, backend: str) -> None:
    """One step in float64: loss, gradients and running statistics."""
    if (name, backend) == ("xception", "cuda") and not torch.cuda.is_available():
        pytest.skip("CUDA kernels on the host take a minute for its 34 wide blocks")
    model, twin = create_model(name, num_classes=5).double(), create_model(name, num_classes=5, reference=True).double()
    twin.load_state_dict(model.state_dict())
    x, results = picture(size, 4).double(), []  # few values a channel would make batch norms chaotic
    for network in (model, twin):
        with effops.use_backend(backend):
            loss = nn.functional.cross_entropy(network(x), torch.tensor([1, 2, 3, 4]))
            if name.endswith("_bsconvs"):
                loss = loss + effops.orthonormal_loss(network, 0.01)
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


@pytest.mark.parametrize(
    ("name", "size"),
    [("cifar_resnet20_bsconvs", 16), ("wrn_16_1_bsconvu", 16), ("densenet121_bsconvu", 64), ("xception", 64)],
)
def test_keeps_channels_last(name: str, size: int, cpp: str) -> None:
    model = create_model(name).eval()
    x = picture(size, 1).contiguous(memory_format=torch.channels_last)
    with torch.no_grad(), effops.use_backend(cpp):
        features = model.forward_features(x)
    assert features.shape[-1] > 1 and features.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("name", STANDARD)
def test_timm_vocabulary(name: str) -> None:
    model = create_model(name, num_classes=7).eval()
    x = picture(32, 1)
    with torch.no_grad():
        features = model.forward_features(x)
        assert features.shape[1] == model.num_features
        assert torch.equal(model.forward_head(features), model(x))
        assert model.forward_head(features, pre_logits=True).shape == (1, model.num_features)
        assert model.get_classifier().out_features == model.num_classes == 7
        model.reset_classifier(0)
        assert model(x).shape == (1, model.num_features)
    assert isinstance(on_meta(name, num_classes=0).get_classifier(), nn.Identity)
    assert parameters(on_meta(name, in_channels=1)) < parameters(on_meta(name))


def test_default_classes() -> None:
    assert [on_meta(name).num_classes for name in STANDARD] == [10, 10, 1000, 1000, 1000, 1000]


# ---------------------------------------------------------------------------------------------------------------------
# Structure
# ---------------------------------------------------------------------------------------------------------------------


def test_what_the_drop_in_rule_replaces() -> None:
    """3x3 convolutions of one group, the CIFAR stem included; 1x1 projections and the 7x7 stem stay."""
    for name, count in (("cifar_resnet20", 19), ("wrn_16_1", 13), ("resnet10", 8), ("vgg16_bn", 13)):
        convolutions = [m for m in on_meta(name).modules() if isinstance(m, nn.Conv2d)]
        assert sum(m.kernel_size == (3, 3) for m in convolutions) == count
        assert len([m for m in on_meta(f"{name}_bsconvu").modules() if isinstance(m, BSConvU)]) == count
    assert len([m for m in on_meta("densenet121_bsconvu").modules() if isinstance(m, BSConvU)]) == 58
    stem = on_meta("cifar_resnet20_bsconvu").features.stem
    assert isinstance(stem, BSConvU) and isinstance(stem.bn, nn.Identity)
    first = on_meta("resnet10_bsconvs").features
    assert first.stem.conv.kernel_size == (7, 7) and isinstance(first.stage2.unit1.projection.conv, nn.Conv2d)
    subspace = first.stage2.unit1.conv1
    assert isinstance(subspace, BSConvS) and subspace.mid_channels == 16
    assert (subspace.dw.stride, subspace.dw.padding) == ((2, 2), (1, 1))
    assert isinstance(subspace.bn1, nn.BatchNorm2d) and isinstance(subspace.bn2, nn.BatchNorm2d)
    vgg = on_meta("vgg16_bn_bsconvu").features[0]
    assert vgg.dw.bias is not None and vgg.pw.bias is None


def test_strides() -> None:
    """Sizes behind each stage."""

    def sizes(name: str, size: int) -> list[int]:
        model, x, found = on_meta(name), torch.empty(1, 3, size, size, device="meta"), []
        x = model.data_bn(x)
        for part, module in model.features.named_children():
            x = module(x)
            if part.startswith(("stage", "denseblock")) or part in ("block1", "block2", "block3", "block11", "block12"):
                found.append(x.shape[-1])
        return found

    assert sizes("cifar_resnet20_bsconvu", 32) == sizes("wrn_16_1", 32) == [32, 16, 8]
    assert sizes("resnet10", 224) == [56, 28, 14, 7]
    assert sizes("densenet121_bsconvu", 224) == [56, 28, 14, 7]
    assert sizes("xception", 299) == sizes("xception_bsconvu", 299) == [74, 37, 19, 19, 10]


def test_width_and_subspace() -> None:
    wide = on_meta("cifar_resnet20", width=2)
    assert wide.num_features == 128 and wide.features.stem.conv.out_channels == 16
    assert parameters(on_meta("cifar_resnet20_bsconvs", p=0.5)) > parameters(on_meta("cifar_resnet20_bsconvs"))
    assert on_meta("resnet10_bsconvs", p=1 / 8).features.stage1.unit1.conv1.mid_channels == 8


# Blueprint convolutions; batch norms, ReLUs and additions that are left to torch in eval mode.
ONE_KERNEL_EACH = {
    "cifar_resnet20_bsconvu": (19, 1 + 2, 0, 0),  # norms: the image's, the projections'
    "cifar_resnet20_bsconvs": (19, 1 + 2, 0, 0),
    "resnet10_bsconvu": (8, 1 + 1 + 3, 1, 0),  # the 7x7 stem's as well
    "wrn_16_1_bsconvu": (13, 1 + 6 + 1, 6 + 1, 0),  # ahead of the units, and behind the last
    "wrn_16_1_bsconvs": (13, 1 + 6 + 1, 6 + 1, 0),
    "vgg16_bn_bsconvu": (13, 0, 0, 0),
    "xception_bsconvu": (2 + 34, 4, 11, 4),  # blocks begin with ReLUs; four end in a pool, then the addition
}


@pytest.mark.parametrize("name", ONE_KERNEL_EACH)
def test_each_blueprint_unit_is_one_kernel(name: str, cpp: str) -> None:
    """In eval mode, with what follows: batch norm, activation, shortcut."""
    seen: list[str] = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    model = create_model(name).eval()
    blocks = [m for m in model.modules() if isinstance(m, (BSConvU, BSConvS))]
    assert [m.fusion_reasons() for m in blocks] == [()] * len(blocks)
    with torch.no_grad(), effops.use_backend(cpp), Recorder():
        model(picture(32, 1))
    norms = seen.count("native_batch_norm") + seen.count("_native_batch_norm_legit_no_training")
    assert (seen.count("bsconv_fwd"), norms, seen.count("relu"), seen.count("add")) == ONE_KERNEL_EACH[name]
    assert len(blocks) == seen.count("bsconv_fwd")


def test_xception_uses_the_fused_blocks() -> None:
    model = create_model("xception").eval()
    blocks = [m for m in model.modules() if isinstance(m, FusedDSConv)]
    assert len(blocks) == 3 * 2 + 8 * 3 + 2 + 2
    assert [m.fusion_reasons() for m in blocks] == [()] * len(blocks)
    assert [index for index in range(1, 13) if getattr(model.features, f"block{index}").adds_within] == [*range(4, 12)]


# ---------------------------------------------------------------------------------------------------------------------
# Orthonormal loss
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "ranks"),
    [  # channels between the 1x1 convolutions: how many of each
        ("cifar_resnet20_bsconvs", {3: 1, 4: 7, 8: 6, 16: 5}),
        ("wrn_16_1_bsconvs", {3: 1, 4: 5, 8: 4, 16: 3}),
        ("resnet10_bsconvs", {16: 3, 32: 2, 64: 2, 128: 1}),
    ],
)
def test_orthonormal_loss(name: str, ranks: dict[int, int]) -> None:
    """One term for each BSConv-S: a matrix of zeros is at the distance sqrt(rank) from orthonormal rows."""
    model = create_model(name)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, BSConvS):
                module.pw1.weight.zero_()
    expected = 0.01 * sum(count * math.sqrt(rank) for rank, count in ranks.items())
    assert effops.orthonormal_loss(model, 0.01).item() == pytest.approx(expected, rel=1e-6)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, BSConvS):
                nn.init.orthogonal_(module.pw1.weight.view(module.mid_channels, -1))
    assert effops.orthonormal_loss(model, 0.01).item() < 1e-5


@pytest.mark.parametrize("name", ["cifar_resnet20", "cifar_resnet20_bsconvu", "xception", "densenet121_bsconvu"])
def test_other_forms_have_no_orthonormal_loss(name: str) -> None:
    with pytest.raises(ValueError, match="has neither a BSConvS nor a linear bottleneck"):
        effops.orthonormal_loss(on_meta(name))


# ---------------------------------------------------------------------------------------------------------------------
# The authors' package
# ---------------------------------------------------------------------------------------------------------------------


def test_key_map() -> None:
    """The package's keys of each kind of module."""
    pairs = {
        "backbone.data_bn.running_mean": "data_bn.running_mean",
        "backbone.init_unit.conv.conv.weight": "features.stem.conv.weight",
        "backbone.init_unit.conv.conv.pw1.weight": "features.stem.pw1.weight",
        "backbone.init_unit.conv.conv.bn1.weight": "features.stem.bn1.weight",
        "backbone.init_unit.conv.bn.weight": "features.stem.norm.weight",
        "backbone.stage1.unit1.bn.bias": "features.stage1.unit1.norm.bias",
        "backbone.stage1.unit1.conv1.conv.dw.weight": "features.stage1.unit1.conv1.dw.weight",
        "backbone.stage1.unit1.conv1.bn.num_batches_tracked": "features.stage1.unit1.conv1.norm.num_batches_tracked",
        "backbone.stage2.unit1.projection.conv.weight": "features.stage2.unit1.projection.conv.weight",
        "backbone.stage2.unit1.projection.bn.weight": "features.stage2.unit1.projection.norm.weight",
        "backbone.final_activation.bn.weight": "features.final.norm.weight",
        "classifier.conv.weight": "classifier.weight",
        "classifier.conv.bias": "classifier.bias",
    }
    model = create_model("wrn_16_1")
    assert model.author_key_map(pairs) == pairs
    assert model.author_key_map(model.state_dict()) == {}


@pytest.mark.parametrize("name", ["wrn_16_1", "wrn_16_1_bsconvu", "cifar_resnet20_bsconvs"])
def test_loads_the_packages_keys(name: str) -> None:
    """A state dict by the package's keys, its classifier a 1x1 convolution; one key wrong is reported."""
    model, other = create_model(name), create_model(name)
    randomise(model)
    state = {}
    for key, value in model.state_dict().items():
        key = re.sub(r"\.(?=(pw[12]?|bn[12]|dw)\.)", ".conv.", key)
        key = re.sub(r"\.norm\.(?=\w+$)", ".bn.", key)
        key = re.sub(r"^features\.stem\.", "backbone.init_unit.conv.", key)
        key = re.sub(r"^features\.final\.", "backbone.final_activation.", key)
        key = re.sub(r"^features\.", "backbone.", key)
        key = re.sub(r"^data_bn\.", "backbone.data_bn.", key)
        key = re.sub(r"^classifier\.", "classifier.conv.", key)
        state[key] = value[:, :, None, None] if key == "classifier.conv.weight" else value
    assert state.keys().isdisjoint(model.state_dict())
    other.load_state_dict(state)
    for key, value in other.state_dict().items():
        assert torch.equal(value, model.state_dict()[key]), key
    state["backbone.stage9.unit1.bn.weight"] = torch.zeros(1)
    with pytest.raises(RuntimeError, match="Unexpected key.*features.stage9.unit1.norm.weight"):
        other.load_state_dict(state)


PACKAGE_NAMES = {
    "cifar_resnet20": "cifar_resnet20",
    "cifar_resnet20_bsconvu": "cifar_resnet20_bsconvu",
    "cifar_resnet20_bsconvs": "cifar_resnet20_bsconvs_p1d4",
    "wrn_16_2": "cifar_wrn16_2",
    "wrn_16_2_bsconvu": "cifar_wrn16_2_bsconvu",
    "wrn_16_2_bsconvs": "cifar_wrn16_2_bsconvs_p1d4",
    "resnet10": "resnet10",
    "resnet10_bsconvu": "resnet10_bsconvu",
    "resnet10_bsconvs": "resnet10_bsconvs_p1d4",
}


@PACKAGE
@pytest.mark.parametrize("name", PACKAGE_NAMES)
def test_loads_the_packages_networks(name: str) -> None:
    """Logits, parameters, the README's FLOPs and the orthonormal loss."""
    import bsconv.pytorch
    from bsconv.pytorch.profile import ModelProfiler

    theirs = bsconv.pytorch.get_model(PACKAGE_NAMES[name], num_classes=10).double().eval()
    randomise(theirs)
    ours = create_model(name, num_classes=10).double().eval()
    ours.load_state_dict(theirs.state_dict())
    x = picture(32, 2).double()
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-10, atol=1e-10)
    profile = ModelProfiler(theirs.float(), (1, 3, 32, 32))
    assert parameters(ours) == profile.total_parameter_count
    twin = on_meta(name, num_classes=10)
    assert bsconv_readme_flops(twin, (1, 3, 32, 32)) == profile.total_flop_count
    if name.endswith("_bsconvs"):
        loss = bsconv.pytorch.BSConvS_ModelRegLossMixin.reg_loss(theirs, alpha=0.1)
        torch.testing.assert_close(effops.orthonormal_loss(ours.float()), loss, rtol=1e-5, atol=0)


# ---------------------------------------------------------------------------------------------------------------------
# Errors
# ---------------------------------------------------------------------------------------------------------------------


def test_errors() -> None:
    with pytest.raises(ValueError, match="unknown form 'bsconv'; accepted: standard, bsconvu, bsconvs"):
        layers.DropIn(effops.modules, "bsconv")
    with pytest.raises(ValueError, match="p=0.5 is the subspace ratio of the form 'bsconvs'; the form 'bsconvu' has"):
        create_model("cifar_resnet20_bsconvu", p=0.5)
    with pytest.raises(ValueError, match="width must leave at least one of 16 channels, got 0"):
        create_model("cifar_resnet20", width=0)
    with pytest.raises(TypeError, match="width"):
        create_model("wrn_16_2", width=4)
    with pytest.raises(TypeError, match="p"):
        create_model("vgg16_bn_bsconvu", p=0.5)
