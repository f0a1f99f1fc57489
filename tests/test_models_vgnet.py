"""VGNet's networks: counts, variants, the squeeze-excite nets, state dicts in its authors' names."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers import assert_within_budget, interpreted
from module_helpers import randomise
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import effops
from effops import modules
from effops.models import create_model, list_models
from effops.models.vgnet import vgnet_key_map
from effops.ops.dwconv import banks

# name: (parameters, multiply-accumulates of convolutions and linear layers at 224 x 224), our count
COUNTS = {
    "vgnetg_1_0mp": (997_358, 141_300_232),
    "vgnetg_1_0mp_se": (1_143_190, 141_443_080),
    "vgnetg_1_5mp": (1_502_024, 187_819_008),
    "vgnetg_1_5mp_se": (1_701_680, 188_015_104),
    "vgnetg_2_0mp": (2_006_380, 300_637_784),
    "vgnetg_2_0mp_se": (2_344_696, 300_971_544),
    "vgnetg_2_5mp": (2_492_756, 398_936_736),
    "vgnetg_2_5mp_se": (2_922_284, 399_360_672),
    "vgnetc_1_5mp": (1_506_344, 187_819_008),
    "vgnetf1_1_5mp": (1_485_448, 187_819_008),
    "vgnetf2_1_5mp": (1_485_896, 187_819_008),
    "vgnetf3_1_5mp": (1_485_448, 187_819_008),
    "vgnetf4_1_5mp": (1_485_896, 187_819_008),
}
SLOW = pytest.mark.slow_interpreted("whole networks take long; vgnetf2_1_5mp and the blocks' own tests are run")
NEW = [
    "vgnetf2_1_5mp",
    *(pytest.param(name, marks=SLOW) for name in ("vgnetg_1_0mp_se", "vgnetc_1_5mp", "vgnetf3_1_5mp")),
]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def picture(size: int = 32, batch: int = 1) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0))


def parameters_of(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def test_every_model_is_counted_here() -> None:
    assert sorted(COUNTS) == list_models("vgnet*")


@pytest.mark.parametrize("name", COUNTS)
def test_counts(name: str) -> None:
    """Parameters of both forms; multiply-accumulates of the twin, counted by torch operator by operator."""
    parameters, macs = COUNTS[name]
    with torch.device("meta"):
        assert parameters_of(create_model(name)) == parameters
    twin = create_model(name, reference=True).to("meta").eval()
    assert parameters_of(twin) == parameters
    with FlopCounterMode(display=False) as counter:
        twin(torch.empty(1, 3, 224, 224, device="meta"))
    assert counter.get_total_flops() == 2 * macs


@pytest.mark.parametrize("name", NEW)
def test_agrees_with_its_twin(name: str, backend: str) -> None:
    torch.manual_seed(0)
    model, twin = create_model(name), create_model(name, reference=True)
    randomise(model)
    assert list(twin.state_dict()) == list(model.state_dict())
    twin.load_state_dict(model.state_dict())
    truth = copy.deepcopy(twin).double().eval()
    x = picture() if interpreted(backend) else picture(64, 2)
    with torch.no_grad(), effops.use_backend(backend):
        actual = model.eval()(x)
        assert_within_budget(actual, truth(x.double()), twin.eval()(x), f"{name} logits")


@pytest.mark.slow_interpreted("whole networks take minutes, and batch norms want no fewer values")
@pytest.mark.parametrize("name", ["vgnetg_1_0mp_se", "vgnetf4_1_5mp"])
def test_trains_like_its_twin(name: str, backend: str) -> None:
    """One step in float64: loss, gradients and running statistics."""
    torch.manual_seed(0)
    model, twin = create_model(name).double(), create_model(name, reference=True).double()
    twin.load_state_dict(model.state_dict())
    x, results = picture(64, 4).double(), []  # few values a channel would make batch norms chaotic
    for network in (model, twin):
        with effops.use_backend(backend):
            loss = nn.functional.cross_entropy(network(x), torch.tensor([1, 2, 3, 4]))
            loss.backward()
        grads = {f"{key} grad": p.grad for key, p in network.named_parameters()}
        kept = {key: value for key, value in network.state_dict().items() if "running" in key}
        results.append({"loss": loss.detach()} | grads | kept)
    for key, actual in results[0].items():
        expected = results[1][key]
        error = (actual - expected).norm()
        assert error <= 1e-10 * expected.norm() + 1e-12, f"{key}: {error:.1e} against {expected.norm():.1e}"


def test_where_the_squeeze_excites_are() -> None:
    """Behind every downsampling and half-identity block's norm, on the new channels; a quarter wide; inner ReLU."""
    model = create_model("vgnetg_1_0mp_se", act="silu")
    excites = {name: m for name, m in model.named_modules() if isinstance(m, modules.SqueezeExcite)}
    blocks = [f"stages.{i}.{j}" for i, stage in enumerate(model.stages) for j in range(len(stage))]
    assert list(excites) == [f"{block}.se" for block in blocks]
    for block in blocks:
        assert model.get_submodule(block).pw.out_channels == excites[f"{block}.se"].expand.out_channels
    widths = {se.expand.out_channels: se.reduce.out_channels for se in excites.values()}
    assert widths == {28: 8, 56: 16, 112: 32, 184: 48}
    assert all(type(se.act) is nn.ReLU and se.gate == "sigmoid" for se in excites.values())
    plain = create_model("vgnetg_1_0mp")
    assert [key for key in model.state_dict() if ".se." not in key] == list(plain.state_dict())


VARIANTS: dict[str, tuple[str | None, bool]] = {
    "vgnetf1_1_5mp": ("vgnet8", False),
    "vgnetf2_1_5mp": ("vgnet8", True),
    "vgnetf3_1_5mp": ("vgnet4", False),
    "vgnetf4_1_5mp": ("vgnet4", True),
    "vgnetc_1_5mp": (None, False),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_which_kernels_are_fixed(name: str) -> None:
    bank, fixed_last = VARIANTS[name]
    with torch.device("meta"):
        model = create_model(name)
    for stage in model.stages:
        assert isinstance(stage[0].dw, modules.FixedFilterConv2d) == (name != "vgnetc_1_5mp")
        for half in stage[1:]:
            assert isinstance(half.dw, modules.FixedFilterConv2d) == (bank is not None)
            assert getattr(half.dw, "bank", None) == bank
            assert isinstance(half.dw_norm, nn.BatchNorm2d) == (bank is not None)
    assert isinstance(model.last.dw, modules.FixedFilterConv2d if fixed_last else modules.SharedDepthwiseConv2d)
    assert isinstance(model.last.dw_norm, nn.BatchNorm2d) == fixed_last
    assert isinstance(model.stages[0][0].se, nn.Identity)


@pytest.mark.parametrize("name", ["vgnetf1_1_5mp", "vgnetf4_1_5mp"])
def test_fixed_kernels_without_their_norm(name: str) -> None:
    """As the paper's text has it: a scale and a shift less for each fixed channel."""
    with torch.device("meta"):
        by_text, by_code = create_model(name, fixed_bn=False), create_model(name, fixed_bn=True)
    assert not any("dw_norm" in key for key in by_text.state_dict())
    fixed = 2 * 32 + 6 * 64 + 13 * 128 + 256 + (512 if name == "vgnetf4_1_5mp" else 0)
    assert parameters_of(by_code) - parameters_of(by_text) == 2 * fixed
    assert parameters_of(by_code) == COUNTS[name][0]


def test_arguments_of_the_variants() -> None:
    thumbnail = create_model("vgnetg_1_0mp_se", thumbnail=True, num_classes=10).eval()
    assert thumbnail.forward_features(picture()).shape[-2:] == (4, 4)
    assert create_model("vgnetf1_1_5mp", in_channels=1, num_classes=3, act="silu").eval()(picture()[:, :1]).shape == (
        1,
        3,
    )
    blur = create_model("vgnetg_1_0mp_se", sigma=0.6, alternate_sign=True).stages[1][0].dw
    expected = torch.tensor([banks.GAUSSIAN_0_6, banks.negative(banks.GAUSSIAN_0_6)])
    torch.testing.assert_close(blur.weight[:, 0], expected)


def test_argument_errors() -> None:
    with pytest.raises(ValueError, match=r"fixed_last and fixed_bn are for the nets with fixed kernels \(vgnetf\*\)"):
        create_model("vgnetg_1_0mp", fixed_bn=False)
    with pytest.raises(ValueError, match=r"fixed_last and fixed_bn are for the nets with fixed kernels \(vgnetf\*\)"):
        create_model("vgnetc_1_5mp", fixed_last=True)
    with pytest.raises(ValueError, match="unknown bank 'sobel'"):
        create_model("vgnetg_1_0mp", bank="sobel")
    with pytest.raises(TypeError, match="se"):
        create_model("vgnetg_1_0mp_se", se=False)


# ---------------------------------------------------------------------------------------------------------------------
# The authors' state dicts
# ---------------------------------------------------------------------------------------------------------------------


def authors_state(model: nn.Module, fixed: bool) -> dict[str, Tensor]:
    """The model's state under the authors' names, written down from their modules; a kernel for each channel."""

    def block(source: nn.Module, at: str, dw: str) -> dict[str, Tensor]:
        own = source.state_dict()
        excited = "se.reduce.weight" in own
        unit = f"{at}.conv1x1.0" if excited else f"{at}.conv1x1"
        repeats = source.dw.in_channels // own["dw.weight"].shape[0]
        named = {f"{at}.{dw}.weight": own["dw.weight"].repeat(repeats, 1, 1, 1), f"{unit}.0.weight": own["pw.weight"]}
        for key, value in own.items():
            kind, _, name = key.partition(".")
            if kind == "norm":
                named[f"{unit}.2.{name}"] = value
            elif kind == "dw_norm":
                named[f"{at}.half3x3.1.{name}"] = value
            elif kind == "se":
                named[f"{at}.conv1x1.1.{name}"] = value
        return named

    def under(prefix: str, module: nn.Module) -> dict[str, Tensor]:
        return {f"{prefix}.{name}": value for name, value in module.state_dict().items()}

    state = under("features.stem.0", model.stem.conv) | under("features.stem.2", model.stem.norm)
    for i, stage in enumerate(model.stages, 1):
        for j, part in enumerate(stage):
            dw = "downsample" if j == 0 else "half3x3.0" if fixed else "half3x3"
            state |= block(part, f"features.stage{i}.{j}", dw)
    last, at = model.last, f"features.stage4.{len(model.stages[3]) + 1}"  # a concatenation is between
    if isinstance(last.dw, modules.FixedFilterConv2d):
        repeats = last.dw.in_channels // last.dw.weight.shape[0]
        state |= {f"{at}.0.weight": last.dw.weight.repeat(repeats, 1, 1, 1)} | under(f"{at}.1", last.dw_norm)
        pointwise = f"{at}.2"
    else:
        state |= {f"{at}.0.mux.weight": last.dw.weight}
        pointwise = f"{at}.1"
    state |= under(f"{pointwise}.0", last.pw) | under(f"{pointwise}.2", last.norm)
    return state | under("classifier", model.classifier)


@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize("name", ["vgnetg_1_0mp", "vgnetg_1_0mp_se", "vgnetf2_1_5mp", "vgnetf4_1_5mp", "vgnetc_1_5mp"])
def test_loads_the_authors_state_dicts(name: str, reference: bool) -> None:
    torch.manual_seed(0)
    signs: dict[str, Any] = {} if name == "vgnetc_1_5mp" else {"alternate_sign": True}
    source = create_model(name, **signs)
    randomise(source)
    state = authors_state(source, fixed="vgnetf" in name)
    assert set(vgnet_key_map(state)) == {key for key in state if not key.startswith("classifier")}
    model = create_model(name, reference=reference, **signs)
    model.load_state_dict(state)
    for key, value in source.state_dict().items():
        assert torch.equal(model.state_dict()[key], value), key
    wrapped = nn.Sequential(create_model(name, reference=reference, **signs))
    wrapped.load_state_dict({f"0.{key}": value for key, value in state.items()})
    assert torch.equal(wrapped[0].classifier.weight, source.classifier.weight)


def test_a_blur_of_other_signs_is_refused() -> None:
    state = authors_state(create_model("vgnetg_1_0mp", alternate_sign=True), fixed=False)
    with pytest.raises(RuntimeError, match=r"size mismatch for stages\.0\.0\.dw\.weight"):
        create_model("vgnetg_1_0mp").load_state_dict(state)


def test_key_map_of_the_later_release_and_of_other_keys() -> None:
    assert vgnet_key_map(["classifier.1.weight", "features.stage4.3.1.2.running_mean"]) == {
        "classifier.1.weight": "classifier.weight",
        "features.stage4.3.1.2.running_mean": "last.norm.running_mean",
    }
    assert vgnet_key_map(["classifier.weight", "stem.conv.weight", "features.stage5.0.downsample.weight"]) == {}
    assert vgnet_key_map(["features.stage2.3.1.2.running_mean", "features.stage1.0.other.weight"]) == {}
