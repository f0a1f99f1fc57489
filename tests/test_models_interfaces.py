"""What people expect of a registered model: timm's vocabulary, feature maps, formats, state dicts, export.

The networks have cheap random weights and small images: what is looked at is the interface, not the kernels. Shapes and
names are looked at in a share of the models; what compares with the stock twin and whole programs (compile, export,
ONNX), in one network of a family. With EFFOPS_MODELS_ALL=1 (make test-all) every model has all.
"""

from __future__ import annotations

import copy
import math
import os
import pickle
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import assert_within_budget
from torch import Tensor, nn

import effops
from effops.models import (
    FeatureExtractor,
    FeatureInfo,
    create_model,
    list_models,
    load_weights,
    register_model,
    registry,
    save_weights,
)
from effops.models.features import Stage

EVERYTHING = os.environ.get("EFFOPS_MODELS_ALL") == "1"
# Networks of different families, as small as there are.
REPRESENTATIVES = (
    "effnet_v2_gtsrb",
    "mnist_7k_dw",
    "mobilenet_v2",
    "mobilenetv3_small",
    "multiception_resnet20",
    "vgg16_bn_bsconvu",
    "vgnetg_1_0mp",
    "wrn_16_1_bsconvu",
)
VGNET = "vgnetg_1_0mp"
# One network in fifteen, and those above: building and running all of them takes minutes.
MODELS = [
    name for name in list_models() if EVERYTHING or name in REPRESENTATIVES or zlib.crc32(name.encode()) % 15 == 0
]
SIZE = 32
# Convolutions without padding: maps are smaller than the image over the reduction.
UNPADDED = ("mnist", "xception")


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def fill(model: nn.Module) -> None:
    """Random weights that keep hundreds of residual blocks finite; large tensors repeat a million numbers."""
    noise = torch.rand(2**20 - 3, generator=torch.Generator().manual_seed(0))
    state = dict(model.named_parameters()) | dict(model.named_buffers())
    for key, value in state.items():
        if not isinstance(value, nn.Parameter) and not key.endswith(STATISTICS):
            continue  # a constant
        part = noise.repeat(-(-value.numel() // noise.numel()))[: value.numel()].view(value.shape)
        if value.ndim > 1:  # unit gain
            value.copy_((part - 0.5) * math.sqrt(12 / value[0].numel()))
        elif value.ndim == 1:
            value.copy_(part - 0.5 if key.endswith(("bias", "running_mean")) else 0.5 + part / 2)
        else:
            value.zero_()


def build(name: str, reference: bool, in_chans: int = 1) -> nn.Module:
    """7 classes. Not initialised where no buffer is constant: that takes most of the time."""
    arguments = {"num_classes": 7, "in_chans": in_chans, "reference": reference}
    with torch.device("meta"):
        model = create_model(name, **arguments)
    if all(key.endswith(STATISTICS) for key, _ in model.named_buffers()):
        return model.to_empty(device="cpu").eval()
    return create_model(name, **arguments).eval()


def network(name: str) -> nn.Module:
    model = build(name, False)
    with torch.no_grad():
        fill(model)
    return model


def twin_of(model: nn.Module) -> nn.Module:
    twin = build(model.name, True)
    twin.load_state_dict(model.state_dict())
    return twin


def picture(channels: int = 1) -> Tensor:
    return torch.rand(2, channels, SIZE, SIZE, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest) -> nn.Module:
    """7 classes, one channel, in eval mode; shared between tests, which must not change it."""
    return network(request.param)


@pytest.fixture(scope="module", params=list_models() if EVERYTHING else REPRESENTATIVES)
def compared(request: pytest.FixtureRequest) -> tuple[nn.Module, nn.Module]:
    """The same, and its stock twin."""
    model = network(request.param)
    return model, twin_of(model)


@pytest.fixture(scope="module", params=list_models() if EVERYTHING else REPRESENTATIVES)
def program(request: pytest.FixtureRequest) -> nn.Module:
    """As `model`, of which whole programs are made."""
    return network(request.param)


# ---------------------------------------------------------------------------------------------------------------------
# Every model
# ---------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_classifier(model: nn.Module) -> None:
    """Classes, channels, features and head; another classifier and none."""
    x = picture()
    logits, maps = model(x), model.forward_features(x)
    assert logits.shape == (2, 7) and logits.isfinite().all()
    assert model.num_classes == model.get_classifier().out_features == 7
    assert maps.shape[:2] == (2, model.num_features)
    assert torch.equal(model.forward_head(maps), logits)
    pooled = model.forward_head(maps, pre_logits=True)
    assert pooled.shape == (2, model.head_hidden_size)
    changed = copy.deepcopy(model)
    changed.reset_classifier(3)
    assert changed.num_classes == changed.get_classifier().out_features == 3
    assert changed.forward_head(maps).shape == (2, 3)
    assert list(changed.state_dict()) == list(model.state_dict())
    changed.reset_classifier(0)
    assert isinstance(changed.get_classifier(), nn.Identity)
    assert torch.equal(changed.forward_head(maps), pooled)


@torch.no_grad()
def test_feature_maps(model: nn.Module) -> None:
    """Shapes and reductions; the last map is what forward_features gives; parameters are the model's own."""
    x = picture()
    extractor = FeatureExtractor(model)
    info, maps = extractor.feature_info, extractor(x)
    assert [y.shape[1] for y in maps] == info.channels()
    assert info.reduction() == sorted(set(info.reduction())) and len(info) == len(maps) >= 3
    for y, reduction in zip(maps, info.reduction(), strict=True):
        exact = math.ceil(SIZE / reduction)
        assert y.shape[2] == y.shape[3]
        assert y.shape[2] == exact or (model.name.startswith(UNPADDED) and exact / 2 < y.shape[2] < exact)
    assert torch.equal(maps[-1], model.forward_features(x))
    own = dict(model.named_parameters())
    assert all(value is own[key] for key, value in extractor.named_parameters())
    left_out = set(model.state_dict()) - set(extractor.state_dict())
    assert left_out == {key for key in model.state_dict() if key.startswith("classifier.")}


def test_state_dict_fits_the_twin(model: nn.Module) -> None:
    with torch.device("meta"):
        twin = create_model(model.name, num_classes=7, in_chans=1, reference=True)
    state = model.state_dict()
    assert list(state) == list(twin.state_dict())
    twin.load_state_dict(state, assign=True)  # names and shapes


# ---------------------------------------------------------------------------------------------------------------------
# Compared with the twin
# ---------------------------------------------------------------------------------------------------------------------

Pair = tuple[nn.Module, nn.Module]


def test_state_dicts_load_both_ways(compared: Pair) -> None:
    model, twin = compared
    fresh = build(model.name, False)
    fresh.load_state_dict(twin.state_dict())
    for other in (fresh, twin):
        assert all(map(torch.equal, other.state_dict().values(), model.state_dict().values()))


@torch.no_grad()
def test_twins_feature_maps(compared: Pair) -> None:
    """The twin's activations are in place where they may be: they must not write to a map given earlier."""
    _, twin = compared
    x = picture()
    features, maps = twin.forward_intermediates(x)
    assert torch.equal(features, twin.forward_features(x))
    for index, y in enumerate(maps):
        (alone,) = FeatureExtractor(twin, (index,))(x)
        assert torch.equal(alone, y)


@torch.no_grad()
def test_channels_last(compared: Pair) -> None:
    """With three channels: one is in both formats at once."""
    x = picture(3).contiguous(memory_format=torch.channels_last)
    model = create_model(compared[0].name, in_chans=3).eval()
    for y in model.forward_intermediates(x, intermediates_only=True):
        assert y.is_contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def test_bfloat16(compared: Pair) -> None:
    """At most twice as far from the truth as stock PyTorch, and a rounding."""
    model, twin = (copy.deepcopy(each).bfloat16() for each in compared)
    truth = copy.deepcopy(twin).double()
    x = picture().bfloat16()
    actual, stock, expected = model(x), twin(x), truth(x.double())
    assert actual.dtype == torch.bfloat16 and actual.shape == (2, 7) and actual.isfinite().all()
    error, allowed = ((y.double() - expected).abs().max() for y in (actual, stock))
    assert error <= 2 * (allowed + torch.finfo(torch.bfloat16).eps * expected.abs().max())


@torch.no_grad()
def test_copies(compared: Pair) -> None:
    for each in (*compared, FeatureExtractor(compared[0], (0, -1))):
        expected = each(picture())
        for other in (copy.deepcopy(each), pickle.loads(pickle.dumps(each))):
            assert all(map(torch.equal, other(picture()), expected))
            assert not {p.data_ptr() for p in other.parameters()} & {p.data_ptr() for p in each.parameters()}


# ---------------------------------------------------------------------------------------------------------------------
# Whole programs
# ---------------------------------------------------------------------------------------------------------------------


def assert_computes(run: Callable[[Tensor], Tensor], program: nn.Module, what: str) -> None:
    """Within the error budget: traced batch norms and convolutions round in other places than eager ones."""
    twin, x = twin_of(program), picture()
    truth = copy.deepcopy(twin).double()(x.double())
    assert_within_budget(run(x), truth, twin(x), f"{program.name} {what}")


@torch.no_grad()
def test_export(program: nn.Module) -> None:
    assert_computes(torch.export.export(program, (picture(),)).module(), program, "exported")


@torch.no_grad()
def test_compile(program: nn.Module) -> None:
    torch._dynamo.reset()
    assert_computes(torch.compile(program, fullgraph=True, backend="aot_eager"), program, "compiled")


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@torch.no_grad()
def test_onnx(program: nn.Module, tmp_path: Path) -> None:
    """The twin's ONNX program in ONNX Runtime: within the error budget of PyTorch's own result."""
    for package in ("onnx", "onnxscript"):
        pytest.importorskip(package, reason=f"torch.onnx.export needs it: pip install {package}")
    runtime = pytest.importorskip("onnxruntime", reason="runs the ONNX program: pip install onnxruntime")
    path = tmp_path / "network.onnx"
    torch.onnx.export(twin_of(program), (picture(),), path, dynamo=True, verbose=False)
    options = runtime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = runtime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    assert_computes(lambda x: torch.from_numpy(session.run(None, {name: x.numpy()})[0]), program, "in ONNX Runtime")


@pytest.mark.parametrize("name, training", [("effnet_v2_gtsrb", False), ("effnet_v2_gtsrb", True), (VGNET, True)])
def test_feature_programs(name: str, training: bool) -> None:
    """torch.compile in one graph and torch.export of the maps, in eval and in training mode (with gradients)."""
    torch._dynamo.reset()
    extractor = FeatureExtractor(network(name), (0, 1)).train(training)
    state, x = copy.deepcopy(extractor.state_dict()), picture()

    def maps_of(run: nn.Module) -> list[Tensor]:
        extractor.load_state_dict(state)  # the running statistics as they were
        return run(x)

    expected = maps_of(extractor)
    exported = torch.export.export(extractor, (x,)).module()
    with torch.set_grad_enabled(training):
        actual = maps_of(torch.compile(extractor, fullgraph=True, backend="aot_eager"))
    assert len(actual) == len(expected) == 2
    assert all(map(torch.equal, actual, expected))
    if training:
        sum(y.sum() for y in actual).backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in extractor.parameters())
    exported.load_state_dict(state)
    assert all(map(torch.equal, exported(x), expected))


# ---------------------------------------------------------------------------------------------------------------------
# features_only
# ---------------------------------------------------------------------------------------------------------------------

RESNET = "cifar_resnet20_bsconvu"


def test_features_only() -> None:
    backbone = create_model("vgnetg_1_0mp", features_only=True, out_indices=(-2, 1), in_chans=1)
    assert isinstance(backbone, FeatureExtractor) and backbone.training
    info = backbone.feature_info
    assert (info.channels(), info.reduction(), info.module_name()) == ([56, 224], [4, 16], ["stages.0", "stages.2"])
    assert (info.channels(-1), info.reduction(0), info.module_name(4)) == (368, 2, "last")
    assert info.out_indices == (1, 3) and len(info) == 5
    assert str(info) == "FeatureInfo(stages.0: 56 / 4, stages.2: 224 / 16)"
    assert [tuple(y.shape) for y in backbone.eval()(picture())] == [(2, 56, 8, 8), (2, 224, 2, 2)]
    assert not any(key.startswith(("stages.3", "last", "classifier")) for key in backbone.state_dict())
    whole = create_model("vgnetg_1_0mp", in_chans=1).eval()
    backbone.load_state_dict(whole.state_dict(), strict=False)
    expected = whole.forward_intermediates(picture(), (1, 3), intermediates_only=True)
    assert all(map(torch.equal, backbone(picture()), expected))
    assert create_model(RESNET, features_only=True, reference=True).feature_info.reduction() == [1, 2, 4]


def test_options_that_change_the_strides() -> None:
    for name, options, reductions in (
        ("vgnetg_1_0mp", {"thumbnail": True}, [1, 2, 4, 8]),
        ("mobilenetv2", {"input": "cifar"}, [1, 2, 4, 8]),
        ("multiception_shakenet26_2x96d", {"first_stride": 2}, [1, 2, 4, 8]),
        ("mobilenet_v2", {"width": 0.5}, [2, 4, 8, 16, 32]),
        ("mobilenetv3_large", {"head": "full"}, [2, 4, 8, 16, 32]),
    ):
        with torch.device("meta"):
            model = create_model(name, **options).eval()
            maps = model.forward_intermediates(torch.empty(1, 3, 64, 64), intermediates_only=True)
        assert model.feature_info.reduction() == reductions == [64 // y.shape[-1] for y in maps]
        assert model.feature_info.channels() == [y.shape[1] for y in maps]


def test_feature_errors() -> None:
    stages = (Stage(("a",), 8, 2), Stage(("b",), 16, 4))
    for indices, kind, message in (
        ((2,), ValueError, r"must be within the 2 stages \(-2 to 1\), got 2"),
        ((0, -2), ValueError, r"must differ from each other, got \(0, -2\)"),
        ((0.0,), TypeError, r"must be ints, got 0\.0"),
        ((), TypeError, r"must be a list of stages, got \(\)"),
        (1, TypeError, "must be a list of stages, got 1"),
    ):
        with pytest.raises(kind, match=f"out_indices {message}"):
            FeatureInfo(stages, indices)
    with pytest.raises(ValueError, match="out_indices are for features_only=True"):
        create_model(RESNET, out_indices=(1,))
    with pytest.raises(ValueError, match="features_only=True has no classifier, so num_classes=5 has no meaning"):
        create_model(RESNET, features_only=True, num_classes=5)


def test_a_builder_of_another_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_MODELS", dict(registry._MODELS))
    register_model("plain")(lambda layers: nn.Linear(1, 1))
    assert isinstance(create_model("plain"), nn.Linear)
    with pytest.raises(ValueError, match="'plain' is a Linear, not an ImageClassifier: it has no feature stages"):
        create_model("plain", features_only=True)


def test_channel_arguments() -> None:
    for word in ("in_chans", "in_channels"):
        assert create_model("mnist_7k_dw", **{word: 5}).features.conv1.conv.in_channels == 5
        with pytest.raises(TypeError, match=rf"{word} must be an int, got 3\.0"):
            create_model("mnist_7k_dw", **{word: 3.0})
        with pytest.raises(ValueError, match=f"{word} must be at least 1, got 0"):
            create_model("mnist_7k_dw", **{word: 0})
    with pytest.raises(TypeError, match="in_chans and in_channels are the same argument; give one of them"):
        create_model("mnist_7k_dw", in_chans=1, in_channels=1)


# ---------------------------------------------------------------------------------------------------------------------
# Weights
# ---------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_weights_there_and_back(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors", reason="weights in safetensors: pip install safetensors")
    model = network(RESNET).to(memory_format=torch.channels_last)
    path = tmp_path / "own.safetensors"
    for _ in range(2):  # the second time over the first
        save_weights(model, path)
    assert os.listdir(tmp_path) == [path.name]
    with safetensors.safe_open(path, framework="pt") as file:
        assert file.metadata() == {"effops.model": RESNET, "effops.version": effops.__version__, "format": "pt"}
    torch.save(model.state_dict(), tmp_path / "own.pth")
    for file in (path, str(tmp_path / "own.pth")):
        loaded = create_model(RESNET, in_chans=1, pretrained=file).eval()
        assert loaded.num_classes == 7
        assert torch.equal(loaded(picture()), model(picture()))
        other = create_model(RESNET, in_chans=1, pretrained=file, num_classes=3).eval()
        assert torch.equal(other.forward_features(picture()), model.forward_features(picture()))
        assert other(picture()).shape == (2, 3)
        backbone = create_model(RESNET, in_chans=1, features_only=True, pretrained=file).eval()
        untrained = create_model(RESNET, in_chans=1, features_only=True).eval()
        load_weights(untrained, file, strict=False)
        for each in (backbone, untrained):
            assert torch.equal(each(picture())[-1], model.forward_features(picture()))
    headless = copy.deepcopy(model)
    headless.reset_classifier(0)
    save_weights(headless, path)
    assert create_model(RESNET, in_chans=1, pretrained=path).num_classes == 0


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("safetensors", reason="weights in safetensors: pip install safetensors")
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"old")

    def full(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space left"):
        save_weights(nn.Linear(2, 2), path)
    assert os.listdir(tmp_path) == ["a.safetensors"] and path.read_bytes() == b"old"


def test_weight_errors(tmp_path: Path) -> None:
    pytest.importorskip("safetensors", reason="weights in safetensors: pip install safetensors")
    path = tmp_path / "a.safetensors"
    with pytest.raises(ValueError, match=r"must end in \.safetensors, got .*a\.pth"):
        save_weights(nn.Linear(1, 1), tmp_path / "a.pth")
    with pytest.raises(RuntimeError, match=r"the weights file .*a\.safetensors does not exist"):
        create_model(RESNET, pretrained=path)
    save_weights(create_model(RESNET), path)
    whole = path.read_bytes()
    for content in (b"", b"not safetensors", whole[: len(whole) // 2]):
        path.write_bytes(content)
        with pytest.raises(RuntimeError, match=r"the weights file .*a\.safetensors cannot be read as a state dict: \S"):
            create_model(RESNET, pretrained=path)
    path.write_bytes(whole)
    with pytest.raises(
        RuntimeError, match=rf"do not fit 'vgnetg_1_0mp' \(the file was saved from '{RESNET}'\)"
    ) as caught:
        load_weights(create_model("vgnetg_1_0mp"), path)
    assert len(str(caught.value)) < 1500
    with pytest.raises(RuntimeError, match="do not fit 'Linear' .*none of its keys, such as 'weight'"):
        load_weights(nn.Linear(1, 1), path, strict=False)
    with pytest.raises(RuntimeError, match=rf"the weights do not fit '{RESNET}' with {{'in_chans'|.*size mismatch"):
        create_model(RESNET, in_chans=1, pretrained=path)
    with pytest.raises(ValueError, match="no trained weights .* pass pretrained=False, or the path of a file"):
        create_model(RESNET, pretrained=True)
    with pytest.raises(TypeError, match="pretrained must be True, False or a path, got 1"):
        create_model(RESNET, pretrained=1)


def test_without_safetensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    path = tmp_path / "a.safetensors"
    for call in (lambda: save_weights(nn.Linear(1, 1), path), lambda: create_model(RESNET, pretrained=path)):
        with pytest.raises(RuntimeError, match="safetensors is not installed: pip install safetensors"):
            call()


def test_the_names_of_families_cover_the_models() -> None:
    families = registry._families()
    assert {name for family in families for name in list_models(family)} == set(list_models())
    assert {"vgnetg_*", "effnet_*", "wrn_*", "mobilenet_v2"} <= set(families) and len(families) < 20
