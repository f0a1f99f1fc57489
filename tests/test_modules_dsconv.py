"""FusedDSConv against its stock twin: values, gradients, statistics, what fuses, state dicts."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from module_helpers import BN, Inputs, compare, image, randomise, trio
from torch import Tensor, nn

import effops.functional as EF
from effops import modules, stock

# torch's own remark on the twin's even kernels.
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")

# ---------------------------------------------------------------------------------------------------------------------
# Against the twin
# ---------------------------------------------------------------------------------------------------------------------

MOBILENET = {"dw_norm": BN, "dw_act": "relu6", "norm": BN, "act": "relu6"}
SMOOTH = {"dw_norm": BN, "dw_act": "silu", "norm": BN, "act": "hardswish"}


def norm_without_bias(channels: int) -> nn.BatchNorm2d:
    """What `BatchNorm2d(channels, bias=False)` makes in newer versions of torch."""
    norm = BN(channels)
    norm.bias = None
    return norm


# id: (positional and keyword arguments of FusedDSConv, input shape)
CASES: dict[str, tuple[tuple[int, ...], dict[str, Any], tuple[int, ...]]] = {
    "plain": ((6, 10), {}, (2, 6, 7, 9)),
    "biases": ((5, 7), {"bias": True, "dw_bias": True, "dw_act": "relu", "act": "gelu"}, (2, 5, 8, 6)),
    "mobilenet_s2": ((6, 10), {"stride": 2, **MOBILENET}, (3, 6, 9, 7)),
    "smooth_k5_multiplier": ((4, 9), {"kernel_size": 5, "depth_multiplier": 2, **SMOOTH}, (2, 4, 8, 8)),
    "bn_between_only": ((6, 4), {"dw_norm": BN, "bias": True}, (2, 6, 6, 6)),
    "act_norm": ((6, 8), {"norm": BN, "act": "relu", "norm_first": False}, (2, 6, 6, 7)),
    "act_norm_act_norm": ((6, 8), {**SMOOTH, "norm_first": False}, (2, 6, 6, 7)),
    "residual_relu_after": ((6, 6), {**SMOOTH, "act": None, "residual": True, "post_act": "relu"}, (2, 6, 6, 7)),
    "act_then_residual": ((6, 6), {"norm": BN, "act": "silu", "residual": True}, (2, 6, 6, 7)),
    "act_norm_residual": ((6, 6), {**SMOOTH, "norm_first": False, "residual": True, "post_act": "silu"}, (2, 6, 6, 7)),
    "no_norm_residual": ((6, 6), {"act": "silu", "residual": True, "post_act": "hardswish"}, (2, 6, 6, 7)),
    "dilated_1x3": ((3, 5), {"kernel_size": (1, 3), "dilation": (1, 2), **SMOOTH}, (2, 3, 5, 9)),
    "no_padding_s2": ((3, 5), {"padding": 0, "stride": (2, 1), **SMOOTH}, (2, 3, 7, 6)),
    "same": ((3, 5), {"padding": "same", "kernel_size": (2, 4), **SMOOTH}, (2, 3, 7, 6)),
    "valid": ((3, 5), {"padding": "valid", **SMOOTH}, (2, 3, 7, 6)),
    "uneven_padding_s2": ((3, 5), {"padding": (0, 1, 0, 1), "stride": 2, **SMOOTH}, (2, 3, 8, 8)),
    "reflect": ((4, 5), {"padding_mode": "reflect", **SMOOTH}, (2, 4, 6, 7)),
    "replicate_s2": ((4, 5), {"padding_mode": "replicate", "stride": 2, "kernel_size": 5, **SMOOTH}, (2, 4, 7, 8)),
    "circular": ((4, 4), {"padding_mode": "circular", "residual": True, **SMOOTH}, (2, 4, 6, 7)),
    "two_slopes": (
        (4, 4),
        {"act": partial(nn.LeakyReLU, 0.3), "norm": BN, "norm_first": False, "post_act": partial(nn.LeakyReLU, 0.1)},
        (2, 4, 6, 7),
    ),
    "one_slope_twice": (
        (4, 4),
        {"dw_act": partial(nn.LeakyReLU, 0.2), "act": partial(nn.LeakyReLU, 0.3), "residual": True},
        (2, 4, 6, 7),
    ),
    "not_affine": ((4, 6), {"dw_norm": partial(BN, affine=False), "norm": partial(BN, affine=False)}, (2, 4, 6, 7)),
    "no_norm_bias": ((4, 6), {"dw_norm": norm_without_bias, "norm": norm_without_bias, "act": "silu"}, (2, 4, 6, 7)),
    "group_norm_after": ((4, 6), {"dw_norm": BN, "norm": partial(nn.GroupNorm, 2), "act": "silu"}, (2, 4, 6, 7)),
    "group_norm_between": ((4, 6), {"dw_norm": partial(nn.GroupNorm, 2), "norm": BN, "act": "silu"}, (2, 4, 6, 7)),
    "unknown_activation": ((4, 6), {**SMOOTH, "act": partial(nn.GELU, "tanh"), "post_act": "silu"}, (2, 4, 6, 7)),
    "unknown_between": ((4, 6), {**SMOOTH, "dw_act": nn.Mish, "norm_first": False}, (2, 4, 6, 7)),
}


def ds_conv(name: str) -> tuple[Callable[[Any], nn.Module], Inputs]:
    channels, arguments, shape = CASES[name]

    def make(layers: Any) -> nn.Module:
        torch.manual_seed(3)
        return layers.FusedDSConv(*channels, **arguments)

    return make, (image(*shape),)


@pytest.mark.parametrize("name", CASES)
def test_eval_and_training_match_the_twin(name: str, backend: str) -> None:
    make, inputs = ds_conv(name)
    compare(make, inputs, backend, grads=True)
    compare(make, inputs, backend, train=True, grads=True)
    compare(make, inputs, backend, dtype=torch.float32)


@pytest.mark.parametrize("store", [False, True], ids=["recomputed", "stored"])
@pytest.mark.parametrize(
    "name", ["smooth_k5_multiplier", "uneven_padding_s2", "reflect", "circular", "same", "bn_between_only"]
)
def test_both_ways_of_training_with_a_batch_norm_between(
    name: str, store: bool, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(modules.FusedDSConv, "_store_intermediate", lambda self, input: store)
    make, inputs = ds_conv(name)
    compare(make, inputs, backend, train=True, grads=True)
    stored = tuple(x.contiguous(memory_format=torch.channels_last) for x in inputs)
    module = compare(make, stored, backend, train=True)
    assert module(stored[0]).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("store", [False, True], ids=["recomputed", "stored"])
def test_training_in_float32(store: bool, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wide enough that torch's own largest error, the yardstick, is not a matter of luck."""
    monkeypatch.setattr(modules.FusedDSConv, "_store_intermediate", lambda self, input: store)

    def make(layers: Any) -> nn.Module:
        torch.manual_seed(3)
        return layers.FusedDSConv(40, 56, **SMOOTH)

    compare(make, (image(3, 40, 13, 11),), backend, dtype=torch.float32, train=True, grads=True)


@pytest.mark.parametrize("name", ["mobilenet_s2", "act_norm_residual", "residual_relu_after", "biases"])
def test_bfloat16_inference(name: str, backend: str) -> None:
    make, inputs = ds_conv(name)
    compare(make, inputs, backend, dtype=torch.bfloat16)


def test_which_way_is_taken_depends_on_the_window() -> None:
    """Few taps are computed twice; many taps on a strided, hence small, result are stored."""
    small = modules.FusedDSConv(8, 8, 3, dw_norm=BN)
    large = modules.FusedDSConv(8, 8, 11, dw_norm=BN)
    x = torch.zeros(1, 8, 16, 16)
    assert not small._store_intermediate(x)
    assert large._store_intermediate(x)


@pytest.mark.parametrize("momentum", [0.1, 0.37, None])
def test_running_statistics_over_several_steps(momentum: float | None, backend: str) -> None:
    make, _ = ds_conv("mobilenet_s2")
    module, twin, _ = trio(make, torch.float64, backend)
    for network in (module, twin):
        network.train()
        network.dw_norm.momentum = momentum
    for step in range(3):
        x = image(2, 6, 7, 5, seed=step)
        torch.testing.assert_close(module(x), twin(x), rtol=1e-11, atol=1e-11)
    for name, buffer in twin.named_buffers():
        torch.testing.assert_close(dict(module.named_buffers())[name], buffer, rtol=1e-12, atol=1e-12)
    assert module.dw_norm.num_batches_tracked == 3


def test_without_running_statistics_eval_uses_the_batch(backend: str) -> None:
    def make(layers: Any) -> nn.Module:
        torch.manual_seed(3)
        norm = partial(BN, track_running_stats=False)
        return layers.FusedDSConv(4, 6, dw_norm=norm, dw_act="silu", norm=norm, act="silu")

    compare(make, (image(2, 4, 6, 7),), backend, grads=True)
    compare(make, (image(2, 4, 6, 7),), backend, train=True, grads=True)


def test_frozen_batch_norm_in_training(backend: str) -> None:
    """norm.eval() inside a network in training: running statistics are used and left alone."""
    make, (x,) = ds_conv("mobilenet_s2")
    module, twin, _ = trio(make, torch.float64, backend)
    before = module.dw_norm.running_mean.clone()
    for network in (module, twin):
        network.train()
        network.dw_norm.eval()
    torch.testing.assert_close(module(x), twin(x), rtol=1e-12, atol=1e-12)
    assert torch.equal(module.dw_norm.running_mean, before)


def test_one_value_per_channel_is_refused_as_by_torch(backend: str) -> None:
    make, _ = ds_conv("bn_between_only")
    module, twin, _ = trio(make, torch.float64, backend)
    x = image(1, 6, 1, 1)
    for network in (module, twin):
        with pytest.raises(
            ValueError,
            match=r"Expected more than 1 value per channel when training, got input size torch.Size\(\[1, 6, 1, 1\]\)",
        ):
            network.train()(x)
        assert network.dw_norm.num_batches_tracked == (network is twin)  # ours checks before it counts


def test_empty_batch(backend: str) -> None:
    make, _ = ds_conv("mobilenet_s2")
    module, twin, _ = trio(make, torch.float32, backend)
    for train in (False, True):
        x = torch.empty(0, 6, 9, 7)
        assert module.train(train)(x).shape == twin.train(train)(x).shape == (0, 10, 5, 4)
    for name, buffer in twin.named_buffers():
        assert torch.equal(dict(module.named_buffers())[name], buffer), name


def test_nothing_is_cached(backend: str) -> None:
    """Edits that do not touch a version counter take effect in the next call."""
    make, (x,) = ds_conv("mobilenet_s2")
    module, twin, _ = trio(make, torch.float64, backend)
    module.eval()(x)
    for network in (module, twin):
        network.eval()
        network.dw.weight.data.mul_(2)
        network.pw.weight.data = network.pw.weight.data + 1
        network.norm.running_var.data.mul_(3)
        network.dw_norm.eps = 0.1
    torch.testing.assert_close(module(x), twin(x), rtol=1e-12, atol=1e-12)


def test_residual_argument(backend: str) -> None:
    make, (x,) = ds_conv("mobilenet_s2")
    module, twin, _ = trio(make, torch.float64, backend)
    other = image(3, 10, 5, 4, seed=5)
    for network in (module.eval(), twin.eval()):
        assert not torch.equal(network(x), network(x, other))
    torch.testing.assert_close(module(x, other), twin(x, other), rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="residual given, but residual=True already adds the input"):
        modules.FusedDSConv(4, 4, residual=True)(torch.zeros(1, 4, 3, 3), torch.zeros(1, 4, 3, 3))


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("train", [False, True])
def test_autocast_gives_the_dtype_that_stock_gives(train: bool, residual: bool, backend: str) -> None:
    def make(layers: Any) -> nn.Module:
        torch.manual_seed(0)
        return layers.FusedDSConv(8, 8, **SMOOTH, residual=residual)

    module, twin, _ = trio(make, torch.float32, backend)
    x = image(2, 8, 9, 9).float()
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = module.train(train)(x), twin.train(train)(x)
    assert ours.dtype == theirs.dtype == (torch.float32 if residual else torch.bfloat16)
    assert (ours.float() - theirs.float()).norm() <= 2e-2 * theirs.float().norm()


def test_compiles_without_graph_breaks(backend: str) -> None:
    make, (x,) = ds_conv("mobilenet_s2")
    module, _, _ = trio(make, torch.float64, backend)
    for train in (False, True):
        module.train(train)
        expected = copy.deepcopy(module)(x)
        torch._dynamo.reset()
        compiled = torch.compile(copy.deepcopy(module), backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), expected, rtol=1e-12, atol=1e-12)


def test_copies_and_pickles(backend: str) -> None:
    make, (x,) = ds_conv("mobilenet_s2")
    module, _, _ = trio(make, torch.float64, backend)
    module.eval()
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(other(x), module(x))
        other.dw.weight.data.zero_()
        assert not torch.equal(other(x), module(x))


# ---------------------------------------------------------------------------------------------------------------------
# What fuses
# ---------------------------------------------------------------------------------------------------------------------


def mobilenet_block() -> modules.FusedDSConv:
    return modules.FusedDSConv(4, 6, **SMOOTH).eval()


def hook(*_: Any) -> None:
    return None


UNFUSED: dict[str, tuple[Callable[[modules.FusedDSConv], object], str]] = {
    "forward hook": (lambda m: m.pw.register_forward_hook(hook), "pw has forward hooks"),
    "forward pre-hook": (lambda m: m.dw_norm.register_forward_pre_hook(hook), "dw_norm has forward hooks"),
    "backward hook": (lambda m: m.dw_act.register_full_backward_hook(hook), "dw_act has backward hooks"),
    "parametrized": (
        lambda m: nn.utils.parametrizations.weight_norm(m.dw),
        "dw is ParametrizedConv2d (parametrized), not a plain Conv2d",
    ),
    "replaced forward": (lambda m: setattr(m.dw, "forward", m.dw.forward), "dw has a replaced forward method"),
    "SyncBatchNorm": (
        lambda m: setattr(m, "dw_norm", nn.SyncBatchNorm.convert_sync_batchnorm(m.dw_norm)),
        "dw_norm is SyncBatchNorm, not a plain BatchNorm2d",
    ),
    "unknown activation": (
        lambda m: setattr(m, "dw_act", nn.Mish()),
        "dw_act is Mish(), which the kernels do not know",
    ),
    "conv subclass": (
        lambda m: setattr(m, "dw", type("MyConv", (nn.Conv2d,), {})(4, 4, 3, padding=1, groups=4)),
        "dw is MyConv, not a plain Conv2d",
    ),
    "hook on the last norm": (lambda m: m.norm.register_forward_hook(hook), "norm has forward hooks"),
    "group norm at the end": (
        lambda m: setattr(m, "norm", nn.GroupNorm(2, 6)),
        "norm is GroupNorm, not a plain BatchNorm2d",
    ),
}


@pytest.mark.parametrize("name", UNFUSED)
def test_what_cannot_fuse_is_called_and_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    change, reason = UNFUSED[name]
    module = mobilenet_block()
    assert module.fusion_reasons() == ()
    assert "not fused" not in repr(module)
    change(module)
    assert module.fusion_reasons() == (reason,)
    assert f"not fused: {reason}" in repr(module)
    fused = []
    original = EF.ds_conv2d
    monkeypatch.setattr(EF, "ds_conv2d", lambda *args, **kwargs: fused.append(1) or original(*args, **kwargs))
    x = image(2, 4, 5, 5).float()
    y = module(x)
    head = reason.split()[0] in ("dw", "dw_norm", "dw_act", "pw")
    assert len(fused) == (0 if head else 1)
    assert torch.allclose(y, module._forward_unfused(x, None), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("part", ["dw", "dw_norm", "dw_act", "pw", "norm", "act", "post_act"])
def test_hooks_on_every_part_run(part: str) -> None:
    module = mobilenet_block()
    seen = []
    getattr(module, part).register_forward_hook(lambda *_: seen.append(part))
    module(torch.randn(1, 4, 5, 5))
    assert seen == [part]


def test_an_unknown_norm_between_sees_every_batch() -> None:
    """The unfused path must not skip what a subclass of BatchNorm2d does."""

    class Counting(nn.BatchNorm2d):
        calls = 0

        def forward(self, input: Tensor) -> Tensor:
            self.calls += 1
            return super().forward(input)

    module = modules.FusedDSConv(4, 6, dw_norm=Counting)
    module(torch.randn(2, 4, 5, 5))
    assert module.dw_norm.calls == 1
    assert module.fusion_reasons() == ("dw_norm is Counting, not a plain BatchNorm2d",)


# ---------------------------------------------------------------------------------------------------------------------
# from_modules and state dicts
# ---------------------------------------------------------------------------------------------------------------------


def sequential(norm_first: bool = True) -> nn.Sequential:
    torch.manual_seed(11)
    dw, pw = nn.Conv2d(4, 4, 3, 2, 1, groups=4, bias=False), nn.Conv2d(4, 6, 1, bias=False)
    first = [BN(4), nn.SiLU()] if norm_first else [nn.SiLU(), BN(4)]
    second = [BN(6), nn.ReLU6()] if norm_first else [nn.ReLU6(), BN(6)]
    network = nn.Sequential(dw, *first, pw, *second).double()
    randomise(network)
    return network


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("norm_first", [True, False])
def test_from_modules_shares(norm_first: bool, train: bool, backend: str) -> None:
    network = sequential(norm_first).train(train)
    parts = list(copy.deepcopy(network))
    names = ("dw_norm", "dw_act", "norm", "act") if norm_first else ("dw_act", "dw_norm", "act", "norm")
    chosen = dict(zip(names, (parts[1], parts[2], parts[4], parts[5]), strict=True))
    fused = modules.FusedDSConv.from_modules(parts[0], parts[3], **chosen, norm_first=norm_first, backend=backend)
    assert fused.training == train
    assert fused.dw.weight is parts[0].weight
    x = image(2, 4, 7, 8)
    torch.testing.assert_close(fused(x), network(x), rtol=1e-12, atol=1e-12)
    if train:
        torch.testing.assert_close(fused.dw_norm.running_var, network[1 if norm_first else 2].running_var)


BANKED = {
    "shared": lambda layers: layers.SharedDepthwiseConv2d(16, 8),
    "fixed": lambda layers: layers.FixedFilterConv2d(16, "vgnet8", stride=2),
    "fixed_uneven_bank": lambda layers: layers.FixedFilterConv2d(16, torch.randn(5, 3, 3), padding=(0, 1, 2, 1)),
    "blur": lambda layers: layers.BlurPool2d(16, 3, padding_mode="reflect"),
    "depthwise": lambda layers: layers.DepthwiseConv2d(16, 5, 2),
}


@pytest.mark.parametrize("name", BANKED)
def test_from_modules_takes_repeated_kernels(name: str, backend: str) -> None:
    def make(layers: Any) -> nn.Module:
        torch.manual_seed(5)
        return layers.FusedDSConv.from_modules(
            BANKED[name](layers), nn.Conv2d(16, 8, 1), dw_norm=BN(16), norm=BN(8), act="silu", norm_first=False
        )

    module = compare(make, (image(2, 16, 9, 8),), backend, grads=True)
    assert module.fusion_reasons() == ()
    compare(make, (image(2, 16, 9, 8),), backend, train=True, grads=True)


def fused_like_sequential(norm_first: bool = True) -> modules.FusedDSConv:
    return modules.FusedDSConv(
        4, 6, stride=2, dw_norm=BN, dw_act="silu", norm=BN, act="relu6", norm_first=norm_first
    ).double()  # fmt: skip


def torchvision_names(network: nn.Sequential) -> dict[str, Tensor]:
    """conv.0.0, conv.0.1, conv.1, conv.2: torchvision's first MobileNetV2 block."""
    moved = {"0": "conv.0.0", "1": "conv.0.1", "3": "conv.1", "4": "conv.2"}
    return {moved[key[0]] + key[1:]: value for key, value in network.state_dict().items()}


def timm_names(network: nn.Sequential) -> dict[str, Tensor]:
    moved = {"0": "conv_dw", "1": "bn1", "3": "conv_pw", "4": "bn2"}
    return {moved[key[0]] + key[1:]: value for key, value in network.state_dict().items()}


def mobilenetv1_names(network: nn.Sequential) -> dict[str, Tensor]:
    moved = {"0": "0.0", "1": "0.1", "3": "1.0", "4": "1.1"}
    return {moved[key[0]] + key[1:]: value for key, value in network.state_dict().items()}


@pytest.mark.parametrize("naming", [nn.Sequential.state_dict, torchvision_names, timm_names, mobilenetv1_names])
@pytest.mark.parametrize("nested", [False, True])
def test_loads_the_block_it_replaces(naming: Callable[[Any], dict[str, Tensor]], nested: bool) -> None:
    network = sequential().eval()
    fused = fused_like_sequential().eval()
    state = naming(network)
    keys = list(state)
    if nested:
        holder = nn.ModuleDict({"stem": nn.Conv2d(1, 1, 1).double(), "block": fused})
        stem = {f"stem.{key}": value for key, value in holder["stem"].state_dict().items()}
        holder.load_state_dict(stem | {f"block.{key}": value for key, value in state.items()})
    else:
        fused.load_state_dict(state)
    assert list(state) == keys, "the caller's dict was changed"
    x = image(2, 4, 7, 8)
    torch.testing.assert_close(fused(x), network(x), rtol=1e-12, atol=1e-12)


def test_loads_an_act_norm_sequential_and_its_own_state() -> None:
    network = sequential(norm_first=False).eval()
    fused = fused_like_sequential(norm_first=False).eval()
    fused.load_state_dict(network.state_dict())
    x = image(2, 4, 7, 8)
    torch.testing.assert_close(fused(x), network(x), rtol=1e-12, atol=1e-12)
    again = fused_like_sequential(norm_first=False).eval()
    again.load_state_dict(fused.state_dict())
    assert torch.equal(again(x), fused(x))


def test_more_than_ten_positions_sort_as_numbers() -> None:
    keys = ["2.weight", "10.weight"]
    assert modules.ds_conv_key_map(keys, ["dw", "pw"]) == {"2.weight": "dw.weight", "10.weight": "pw.weight"}


def test_a_state_dict_that_does_not_fit_is_reported() -> None:
    state = sequential().state_dict()
    with pytest.raises(RuntimeError, match=r"(?s)Missing key.*dw\.weight.*Unexpected key.*0\.weight"):
        modules.FusedDSConv(4, 6).load_state_dict(state)
    with pytest.raises(RuntimeError, match=r"Missing key.*pw\.weight"):
        fused_like_sequential().load_state_dict({key: value for key, value in state.items() if key[0] != "3"})
    state["9.weight"] = torch.zeros(1)
    with pytest.raises(RuntimeError, match="Unexpected key"):
        fused_like_sequential().load_state_dict(state)


def test_twins_exchange_state_dicts() -> None:
    make, (x,) = ds_conv("mobilenet_s2")
    module, twin = make(modules).double().eval(), make(stock).double().eval()
    for source, target in ((module, twin), (twin, module)):
        randomise(source, seed=id(source) % 1000)
        target.load_state_dict(source.state_dict())
        torch.testing.assert_close(target(x), source(x), rtol=1e-12, atol=1e-12)
