"""The networks of the Multiception paper: counts, agreement with the stock twins, Shake-Shake's noise, arguments."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from conftest import require_backend
from helpers import assert_within_budget
from module_helpers import image, randomise
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import effops
from effops import modules
from effops.models import create_model, list_models, published
from effops.models.multiception import ShakeShake

NETS = ("resnet20", "resnet50", "senet56", "shakenet26_2x96d", "mobilenetv2")
CONVS = ("multiception", "standard", "dsconv", "mixconv", "repo_mixconv")
DEAD = 584_640  # parameters of the shortcuts that ShakeNet's authors build and never call

# (net, conv): (parameters, multiply-accumulates at 32 x 32), 10 classes; the prints: test_models_published.py
COUNTS = {
    ("resnet20", "standard"): (272_474, 40_813_184),
    ("resnet20", "multiception"): (189_434, 32_408_192),
    ("resnet20", "dsconv"): (166_858, 24_754_816),
    ("resnet50", "standard"): (758_554, 111_592_064),
    ("resnet50", "multiception"): (509_434, 85_533_312),
    ("resnet50", "dsconv"): (443_498, 65_366_656),
    ("resnet50", "mixconv"): (458_730, 69_298_304),
    ("resnet50", "repo_mixconv"): (752_188, 109_552_128),
    ("senet56", "standard"): (867_866, 125_759_936),
    ("senet56", "multiception"): (585_530, 96_170_432),
    ("senet56", "dsconv"): (510_922, 73_501_120),
    ("shakenet26_2x96d", "standard"): (26_192_906, 3_776_892_672),
    ("shakenet26_2x96d", "multiception"): (16_980_714, 2_566_246_144),
    ("shakenet26_2x96d", "dsconv"): (15_451_178, 2_252_025_600),
    ("mobilenetv2", "multiception"): (2_252_634, 33_452_032),
    ("mobilenetv2", "dsconv"): (2_236_330, 24_461_312),
}


@pytest.fixture(params=("reference", "cpp"))
def backend(request: pytest.FixtureRequest) -> str:
    """The backends with kernels for it, and the reference."""
    require_backend(request.param)
    return request.param


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def picture(size: int = 16, batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0))


def on_meta(net: str, **kwargs: Any) -> nn.Module:
    with torch.device("meta"):
        return create_model(f"multiception_{net}", **kwargs)


def parameters_of(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def test_every_model_is_counted_here() -> None:
    assert list_models("multiception_*") == sorted(f"multiception_{net}" for net in NETS)
    assert {net for net, _ in COUNTS} == set(NETS)


@pytest.mark.parametrize("case", COUNTS, ids=" ".join)
def test_counts(case: tuple[str, str]) -> None:
    """Parameters of both forms; multiply-accumulates of the twin, counted by torch operator by operator."""
    net, conv = case
    parameters, macs = COUNTS[case]
    assert parameters_of(on_meta(net, conv=conv)) == parameters
    twin = on_meta(net, conv=conv, reference=True).eval()
    assert parameters_of(twin) == parameters
    with FlopCounterMode(display=False) as counter:
        twin(torch.empty(1, 3, 32, 32, device="meta"))
    assert counter.get_total_flops() == 2 * macs


def test_mean_reduction_of_table_5() -> None:
    """Printed as 32.48 %, which is the mean of the printed rows; ours with the dead parameters and without."""
    table = [figure for figure in published.FIGURES if figure.source.startswith("Multiception, Table 5")]
    assert [figure.arguments["conv"] for figure in table] == ["standard", "multiception"] * 8
    compared = [published.compare(figure) for figure in table]

    def mean(values: list[float]) -> str:
        reductions = [100 * (1 - ours / standard) for standard, ours in zip(values[::2], values[1::2], strict=True)]
        return f"{sum(reductions) / len(reductions):.2f}"

    assert mean([float(figure.printed.removesuffix("M")) for figure in table]) == "32.48"
    assert mean([comparison.best.counted for comparison in compared]) == "32.54"
    assert mean([comparison.own.counted for comparison in compared]) == "32.73"
    dead = [c.reading.counted - c.own.counted for c in compared if c.reading is not None]
    assert dead == [DEAD] * 4


def test_last_stage_has_two_banks() -> None:
    """The paper's text ("only 3x3", a DSConv) would give another network than its Table 5."""
    assert parameters_of(on_meta("resnet50", kernel_sizes=((3, 5, 7), (3, 5), (3,)))) == 473_434


def test_dead_shortcuts_are_dead() -> None:
    model = create_model("multiception_shakenet26_2x96d", dead_shortcuts=True)
    dead = {key for key, _ in model.named_parameters() if ".shortcut." in key and ".0.shortcut." not in key}
    assert sum(model.get_parameter(key).numel() for key in dead) == DEAD
    model(picture(8)).sum().backward()
    assert {key for key, p in model.named_parameters() if p.grad is None} == dead


@pytest.mark.parametrize("conv", CONVS)
@pytest.mark.parametrize("net", ["resnet20", "mobilenetv2"])
def test_agrees_with_its_twin(net: str, conv: str, backend: str) -> None:
    check_against_twin(net, backend, conv=conv)


@pytest.mark.parametrize("net", ["senet56", "shakenet26_2x96d"])
def test_others_agree_with_their_twins(net: str, backend: str) -> None:
    check_against_twin(net, backend, size=8)


def check_against_twin(net: str, backend: str, size: int = 16, **kwargs: Any) -> None:
    torch.manual_seed(0)
    model = create_model(f"multiception_{net}", **kwargs)
    twin = create_model(f"multiception_{net}", reference=True, **kwargs)
    randomise(model)
    assert list(twin.state_dict()) == list(model.state_dict())
    twin.load_state_dict(model.state_dict())
    truth = copy.deepcopy(twin).double().eval()
    x = picture(size)
    with torch.no_grad(), effops.use_backend(backend):
        actual = model.eval()(x)
        assert_within_budget(actual, truth(x.double()), twin.eval()(x), f"{net} logits")
        features = model.forward_features(x.contiguous(memory_format=torch.channels_last))
        assert features.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("net", ["resnet20", "mobilenetv2", "shakenet26_2x96d"])
def test_trains_like_its_twin(net: str, backend: str) -> None:
    """One step in float64: loss, gradients and running statistics."""
    torch.manual_seed(0)
    model = create_model(f"multiception_{net}").double()
    twin = create_model(f"multiception_{net}", reference=True).double()
    twin.load_state_dict(model.state_dict())
    x, results = picture(32 if net == "mobilenetv2" else 8, 4).double(), []
    for network in (model, twin):
        torch.manual_seed(1)  # the same dropout, the same shaking
        with effops.use_backend(backend):
            loss = nn.functional.cross_entropy(network(x), torch.tensor([1, 2, 3, 4]))
            loss.backward()
        grads = {f"{key} grad": p.grad for key, p in network.named_parameters()}
        kept = {key: value for key, value in network.state_dict().items() if "running" in key}
        results.append({"loss": loss.detach()} | grads | kept)
    for key, actual in results[0].items():
        expected = results[1][key]
        error = (actual - expected).norm()
        # A bias ahead of a batch norm has no gradient but rounding: hence the absolute part.
        assert error <= 1e-10 * expected.norm() + 1e-12, f"{key}: {error:.1e} against {expected.norm():.1e}"


# ---------------------------------------------------------------------------------------------------------------------
# Shake-Shake
# ---------------------------------------------------------------------------------------------------------------------


def shares(samples: int, seed: int) -> tuple[Tensor, Tensor]:
    """(alpha, beta) of each sample, as the output and the gradient show them."""
    torch.manual_seed(seed)
    a = torch.ones(samples, 2, 1, 3, dtype=torch.float64, requires_grad=True)
    b = torch.zeros(samples, 2, 1, 3, dtype=torch.float64, requires_grad=True)
    y = ShakeShake()(a, b)
    grad_a, grad_b = torch.autograd.grad(y.sum(), (a, b))
    for per_value in (y, grad_a):  # one share for a whole sample
        assert torch.equal(per_value, per_value[:, :1, :, :1].expand_as(per_value))
    torch.testing.assert_close(grad_a + grad_b, torch.ones_like(a))
    return y[:, 0, 0, 0].detach(), grad_a[:, 0, 0, 0]


def test_shares_are_uniform_and_independent() -> None:
    samples = 20_000
    alpha, beta = shares(samples, 3)
    line = (torch.arange(samples) + 0.5) / samples
    for share in (alpha, beta):
        assert share.min() >= 0 and share.max() < 1
        # Kolmogorov and Smirnov: 1.95 / sqrt(n) is exceeded once in a thousand.
        assert (share.sort().values - line).abs().max() < 1.95 / samples**0.5
    assert torch.corrcoef(torch.stack([alpha, beta]))[0, 1].abs() < 4 / samples**0.5
    assert torch.corrcoef(torch.stack([alpha[1:], alpha[:-1]]))[0, 1].abs() < 4 / samples**0.5


def test_a_seed_repeats_the_shares() -> None:
    first, again, other = shares(8, 1), shares(8, 1), shares(8, 2)
    for a, b, c in zip(first, again, other, strict=True):
        assert torch.equal(a, b)
        assert not torch.equal(a, c)


def test_shares_of_eval_are_halves() -> None:
    a, b = (image(3, 2, 4, 5, seed=seed).requires_grad_() for seed in (1, 2))
    shake = ShakeShake().eval()
    state = torch.get_rng_state()
    y = shake(a, b)
    assert torch.equal(y, (a + b) / 2)
    for grad in torch.autograd.grad(y.sum(), (a, b)):
        assert torch.equal(grad, torch.full_like(grad, 0.5))
    assert torch.equal(state, torch.get_rng_state())


def test_the_gradient_has_derivatives() -> None:
    """By its own share: d/dg of (beta g, (1 - beta) g)."""
    a, b = (image(3, 2, 2, 2, seed=seed).requires_grad_() for seed in (1, 2))

    def seeded(a: Tensor, b: Tensor) -> Tensor:
        torch.manual_seed(5)
        return ShakeShake()(a, b)

    assert torch.autograd.gradgradcheck(seeded, (a, b))
    beta = torch.autograd.grad(seeded(a, b).sum(), a)[0]
    grad_a, grad_b = torch.autograd.grad((seeded(a, b) ** 3).sum(), (a, b), create_graph=True)
    mixed = seeded(a, b).detach()
    torch.testing.assert_close(grad_a.detach(), 3 * mixed**2 * beta)
    torch.testing.assert_close(
        torch.autograd.grad(grad_a.sum(), b, retain_graph=True)[0], 6 * mixed * beta * (1 - beta)
    )
    torch.testing.assert_close(torch.autograd.grad(grad_b.sum(), b)[0], 6 * mixed * (1 - beta) ** 2)


def test_shaking_under_vmap() -> None:
    """Per-sample gradients: each sample has its own shares there as well."""

    def loss(a: Tensor, b: Tensor) -> Tensor:
        return ShakeShake()(a[None], b[None]).sum()

    a, b = image(4, 2, 3, 3), image(4, 2, 3, 3, seed=2)
    grads = torch.func.vmap(torch.func.grad(loss), randomness="different")(a, b)
    assert torch.equal(grads, grads[:, :1, :1, :1].expand_as(grads))
    assert len(grads[:, 0, 0, 0].unique()) == 4


def test_shaking_compiles() -> None:
    compiled = torch.compile(ShakeShake(), backend="aot_eager", fullgraph=True)
    a, b = (image(3, 2, 2, 2, seed=seed).requires_grad_() for seed in (1, 2))
    y = compiled(a, b)
    grad_a, grad_b = torch.autograd.grad(y.sum(), (a, b))
    alpha = ((y - b) / (a - b)).detach()
    torch.testing.assert_close(alpha, alpha[:, :1, :1, :1].expand_as(alpha))
    torch.testing.assert_close(grad_a + grad_b, torch.ones_like(a))
    assert not torch.isclose(alpha, grad_a).any()


def test_shaking_of_half_types_and_empty_batches() -> None:
    x = torch.ones(2, 3, 1, 1, dtype=torch.bfloat16, requires_grad=True)
    y = ShakeShake()(x, torch.zeros_like(x))
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert x.grad.dtype == torch.bfloat16
    assert ShakeShake()(torch.zeros(0, 3, 2, 2), torch.zeros(0, 3, 2, 2)).shape == (0, 3, 2, 2)


# ---------------------------------------------------------------------------------------------------------------------
# Structure and arguments
# ---------------------------------------------------------------------------------------------------------------------


def test_which_convolutions_are_replaced() -> None:
    """The first of each block, with the sizes of its stage."""
    model = on_meta("resnet50")
    assert [len(stage) for stage in model.stages] == [8, 8, 8]
    for stage, sizes in zip(model.stages, ((3, 5, 7), (3, 5), (3, 3)), strict=True):
        for index, block in enumerate(stage):
            assert tuple(dw.kernel_size[0] for dw in block.unit.dw) == sizes
            assert block.unit.pw.bias is not None and block.unit.dw[0].stride == (1, 1)
            assert block.unit.pw.stride == ((2, 2) if index == 0 and stage is not model.stages[0] else (1, 1))
            assert block.conv.kernel_size == (3, 3) and block.conv.groups == 1
            assert isinstance(block.shortcut, nn.Identity) == (block.unit.pw.stride == (1, 1))
    branches = [block for stage in on_meta("shakenet26_2x96d").stages for block in stage]
    assert len(branches) == 12 and all(len(block.branch2[0].dw) in (2, 3) for block in branches)
    mobile = on_meta("mobilenetv2")
    units = [m for m in mobile.modules() if isinstance(m, modules.MulticeptionConv2d)]
    assert [tuple(dw.kernel_size[0] for dw in unit.dw) for unit in units] == [(3, 5, 7), (3, 5), (3, 5)]
    assert sum(isinstance(m, modules.InvertedResidual) for m in mobile.modules()) == 14
    assert mobile.features[0][0].stride == (1, 1)
    assert [mobile.features[i].residual for i in (1, 2, 3)] == [False, False, True]


def test_senets_squeeze_excites() -> None:
    excites = [m for m in on_meta("senet56").modules() if isinstance(m, modules.SqueezeExcite)]
    assert len(excites) == 27
    assert {(se.expand.out_channels, se.reduce.out_channels) for se in excites} == {(16, 2), (32, 4), (64, 8)}
    assert all(se.reduce.bias is None and se.expand.bias is None for se in excites)


def test_shifted_shortcut_by_hand() -> None:
    """The second half of its channels reads one pixel further down and right."""
    model = create_model("multiception_shakenet26_2x96d").double().eval()
    shortcut = model.stages[1][0].shortcut
    randomise(shortcut)
    x = image(2, 96, 6, 6)
    straight = nn.functional.conv2d(x[:, :, ::2, ::2], shortcut.straight.weight)
    shifted = nn.functional.conv2d(x[:, :, 1::2, 1::2], shortcut.shifted.weight)
    torch.testing.assert_close(shortcut(x), shortcut.norm(torch.cat([straight, shifted], 1)))
    odd = shortcut(image(1, 96, 5, 5))  # where the shift reads beyond the map it reads zeros
    edge = shortcut.norm.bias - shortcut.norm.running_mean * shortcut.norm.weight * torch.rsqrt(
        shortcut.norm.running_var + shortcut.norm.eps
    )
    torch.testing.assert_close(odd[0, 96:, 2, 2], edge[96:])


def test_initialisation() -> None:
    """He's, by fan-in for the ResNets and by fan-out for ShakeNet; squeeze-excites as torch's linear layers."""
    for net, mode in (("senet56", 0), ("shakenet26_2x96d", 1)):
        model = create_model(f"multiception_{net}")
        conv = next(m for m in model.stages[2][0].modules() if isinstance(m, nn.Conv2d) and m.weight[0, 0].numel() == 9)
        dense = next(m for m in model.stages[2].modules() if isinstance(m, nn.Conv2d) and m.weight[0].numel() > 500)
        for module in (conv, dense):
            fans = nn.init._calculate_fan_in_and_fan_out(module.weight)
            torch.testing.assert_close(module.weight.std(), torch.tensor((2 / fans[mode]) ** 0.5), rtol=0.1, atol=0)
        assert (model.classifier.bias == 0).all() == (net != "senet56")
    excite = create_model("multiception_senet56").stages[2][0].se.reduce
    assert excite.weight.abs().max() <= 64**-0.5


def test_kernel_sizes() -> None:
    """Table 4's other sizes, in the first stage; of MixConv as well."""
    model = on_meta("resnet20", kernel_sizes=((3, 7), (3,), [5, 5]))
    assert [tuple(dw.kernel_size[0] for dw in stage[0].unit.dw) for stage in model.stages] == [(3, 7), (3,), (5, 5)]
    mixed = on_meta("resnet20", conv="mixconv", kernel_sizes=((3, 5), (3, 5), (3, 5, 7, 9)))
    assert [len(stage[0].unit.dw) for stage in mixed.stages] == [2, 2, 4]
    mobile = on_meta("mobilenetv2", kernel_sizes=((3,), (5,)))
    assert mobile.features[3].unit.dw[0].kernel_size == (5, 5)


def test_other_arguments() -> None:
    larger = create_model("multiception_shakenet26_2x96d", first_stride=2).eval()
    assert larger.forward_features(picture(16, 1)).shape == (1, 384, 2, 2)
    assert create_model("multiception_mobilenetv2", dropout=0.5).classifier[0].p == 0.5
    for net in NETS:
        model = create_model(f"multiception_{net}", num_classes=7, in_channels=1).eval()
        x = picture(16, 1)[:, :1]
        features = model.forward_features(x)
        assert features.shape[1] == model.num_features
        assert torch.equal(model.forward_head(features), model(x))
        assert model.get_classifier().out_features == model.num_classes == 7
        model.reset_classifier(0)
        assert model(x).shape == (1, model.num_features)
        assert isinstance(on_meta(net, num_classes=0).get_classifier(), nn.Identity)


@pytest.mark.parametrize("net", ["resnet20", "mobilenetv2"])
def test_argument_errors(net: str) -> None:
    name = f"multiception_{net}"
    with pytest.raises(ValueError, match="unknown conv 'inception'; accepted: multiception, standard, dsconv, mixconv"):
        create_model(name, conv="inception")
    with pytest.raises(ValueError, match="kernel_sizes are for multiception, mixconv and repo_mixconv; conv='dsconv'"):
        create_model(name, conv="dsconv", kernel_sizes=((3,), (3,), (3,)))
    with pytest.raises(TypeError, match="kernel_sizes must be a list with the sizes of each stage, got 3"):
        create_model(name, kernel_sizes=3)
    with pytest.raises(ValueError, match=r"kernel_sizes must have the sizes of [23] stages, got \(\(3,\),\)"):
        create_model(name, kernel_sizes=((3,),))
    with pytest.raises(ValueError, match="kernel_sizes must be odd"):
        create_model(name, kernel_sizes=((4,), (4,), (4,))[: 2 if net == "mobilenetv2" else 3])
    with pytest.raises(ValueError, match="ShakeNet: first_stride must be at least 1, got 0"):
        create_model("multiception_shakenet26_2x96d", first_stride=0)
    with pytest.raises(TypeError, match="dead_shortcuts"):
        create_model(name, dead_shortcuts=True)
