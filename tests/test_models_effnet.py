"""EffNet's networks and those it is compared with: the paper's FLOPs, agreement with the stock twins, arguments."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers import assert_within_budget
from module_helpers import randomise
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import effops
from effops import backends, modules
from effops.models import create_model, list_models, published
from effops.models.flops import effnet_baseline_slip, effnet_early_pool, effnet_flops

SETS = ("cifar10", "svhn", "gtsrb")
CLASSES = {"cifar10": 10, "svhn": 10, "gtsrb": 43}
KINDS = ("baseline", "large", "mob_imp", "mobilenet", "mobilenetv2", "shufflenet", "v1", "v2")

# Parameters of our builds with batch norms (not published), CIFAR-10.
PARAMETERS = {
    ("baseline", None): 412_234,
    ("mobilenet", None): 86_666,
    ("v1", None): 150_698,
    ("v2", 2): 149_450,
    ("v2", 4): 255_306,
    ("v2", 6): 361_162,
    ("mobilenetv2", 2): 171_466,
    ("mobilenetv2", 4): 299_338,
    ("mobilenetv2", 6): 427_210,
}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def picture(batch: int = 2, size: int = 32) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0))


def build(kind: str, expansion: int | None, data: str, **kwargs: Any) -> nn.Module:
    rate = {} if expansion is None else {"expansion": expansion}
    return create_model(f"effnet_{kind}_{data}", **rate, **kwargs)


def test_every_model_is_counted_here() -> None:
    assert list_models("effnet_*") == sorted(f"effnet_{kind}_{data}" for kind in KINDS for data in SETS)
    assert {figure.model for figure in published.FIGURES} >= set(list_models("effnet_*"))


def test_slips() -> None:
    assert effnet_early_pool(128, 2) == 2 * 16 * 128 * 2 * 3
    assert effnet_baseline_slip(32, 43) == 2 * 240 * 32 * 43


def test_flops_are_those_of_torchs_counter() -> None:
    twin = create_model("effnet_v2_gtsrb", reference=True).to("meta").eval()
    with FlopCounterMode(display=False) as counter:
        twin(torch.empty(1, 3, 32, 32, device="meta"))
    assert counter.get_total_flops() == effnet_flops(twin, (1, 3, 32, 32)) == 1_045_504


@pytest.mark.parametrize("case", PARAMETERS, ids=str)
def test_parameters(case: tuple[str, int | None]) -> None:
    for reference in (False, True):
        model = build(*case, "cifar10", reference=reference)
        assert sum(p.numel() for p in model.parameters()) == PARAMETERS[case]


@pytest.mark.parametrize("kind", KINDS)
def test_agrees_with_its_twin(kind: str, backend: str) -> None:
    torch.manual_seed(0)
    model = create_model(f"effnet_{kind}_svhn")
    twin = create_model(f"effnet_{kind}_svhn", reference=True)
    randomise(model)
    assert list(twin.state_dict()) == list(model.state_dict())
    twin.load_state_dict(model.state_dict())
    truth = copy.deepcopy(twin).double().eval()
    x = picture()
    with torch.no_grad(), effops.use_backend(backend):
        actual = model.eval()(x)
        assert_within_budget(actual, truth(x.double()), twin.eval()(x), f"{kind} logits")
        features = model.forward_features(x.contiguous(memory_format=torch.channels_last))
        assert features.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.slow_interpreted("whole networks take minutes, and batch norms want no fewer values")
@pytest.mark.parametrize("kind", KINDS)
def test_trains_like_its_twin(kind: str, backend: str) -> None:
    """One step in float64: loss, gradients and running statistics."""
    name = f"effnet_{kind}_gtsrb"
    torch.manual_seed(0)
    model, twin = create_model(name).double(), create_model(name, reference=True).double()
    twin.load_state_dict(model.state_dict())
    x, results = picture(4).double(), []
    for network in (model, twin):
        torch.manual_seed(1)  # the same dropout
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


def test_layers_by_the_papers_tables() -> None:
    """Table 1's shapes; v1 replaces the first layer, with its least of 6 channels; the revised block's widths."""
    for kind in KINDS:
        model, x, shapes = create_model(f"effnet_{kind}_gtsrb").eval(), picture(1), []
        for layer in model.features:
            x = layer(x)
            shapes.append(tuple(x.shape[1:]))
        widths = (26, 52, 104) if kind == "large" else (8, 16, 32)
        assert shapes == [(width, size, size) for width, size in zip(widths, (16, 8, 4), strict=True)], kind
    first = create_model("effnet_v1_gtsrb").features[0]
    assert isinstance(first, modules.EffNetBlock) and first.expand.out_channels == 6
    revised = create_model("effnet_v2_svhn", expansion=4).features[2]
    assert (revised.expand.out_channels, revised.dw.row.out_channels, revised.act.negative_slope) == (48, 96, 0.2)
    shuffled = create_model("effnet_shufflenet_svhn").features
    assert [(block.reduce.groups, block.expand.groups) for block in shuffled[1:]] == [(2, 2), (4, 4)]
    pooled = create_model("effnet_mob_imp_svhn").features[1]
    assert (pooled.dw.in_channels, pooled.dw.stride, pooled.act.negative_slope) == (72, (1, 1), 0.2)


def test_dropout_is_gtsrbs() -> None:
    for data in SETS:
        assert create_model(f"effnet_v1_{data}").dropout.p == (0.5 if data == "gtsrb" else 0.0)
        assert create_model(f"effnet_v1_{data}").num_classes == CLASSES[data]
    assert create_model("effnet_v1_gtsrb", dropout=0.1).dropout.p == 0.1
    features = torch.ones(1, 32, 4, 4)
    trained = create_model("effnet_v1_gtsrb").forward_head(features, pre_logits=True)
    assert set(trained.unique().tolist()) == {0.0, 2.0}


def test_fused_blocks() -> None:
    for name, count in {"effnet_v1_svhn": 3, "effnet_v2_svhn": 2, "effnet_mobilenet_svhn": 2}.items():
        model = create_model(name).eval()
        blocks = [block for block in model.features if hasattr(block, "fusion_reasons")]
        assert len(blocks) == count
        assert [block.fusion_reasons() for block in blocks] == [()] * count
    assert str(backends.explain(create_model("effnet_mobilenetv2_svhn").eval(), picture(1))).count("+ 1x1") == 2


@pytest.mark.parametrize("kind", KINDS)
def test_timm_vocabulary(kind: str) -> None:
    model = create_model(f"effnet_{kind}_svhn", num_classes=7, in_channels=1).eval()
    x = picture(1)[:, :1]
    features = model.forward_features(x)
    assert features.shape == (1, model.num_features, 4, 4)
    assert torch.equal(model.forward_head(features), model(x))
    assert model.head_hidden_size == 16 * model.num_features
    assert model.forward_head(features, pre_logits=True).shape == (1, model.head_hidden_size)
    assert model.get_classifier().out_features == 7
    model.double().reset_classifier(3)
    assert model(x.double()).shape == (1, 3)
    model.reset_classifier(0)
    assert model(x.double()).shape == (1, model.head_hidden_size)
    assert create_model(f"effnet_{kind}_svhn", num_classes=0).get_classifier().__class__ is nn.Identity


def test_other_sizes_are_pooled_to_the_same_map() -> None:
    model = create_model("effnet_baseline_gtsrb").eval()
    x = picture(1, 64)
    expected = model.classifier(nn.functional.avg_pool2d(model.forward_features(x), 2).flatten(1))
    torch.testing.assert_close(model(x), expected)


def test_argument_errors() -> None:
    with pytest.raises(ValueError, match="expansion must be at least 1, got 0"):
        create_model("effnet_v2_svhn", expansion=0)
    with pytest.raises(TypeError, match=r"expansion must be an int, got 2\.5"):
        create_model("effnet_mob_imp_svhn", expansion=2.5)
    with pytest.raises(TypeError, match="expansion"):
        create_model("effnet_v1_svhn", expansion=2)
    with pytest.raises(ValueError, match="dropout probability"):
        create_model("effnet_v1_svhn", dropout=2.0)
