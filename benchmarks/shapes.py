"""Every shape that is measured, written down once. pytest, run.py and report.py all read these lists."""

from __future__ import annotations

from dataclasses import dataclass, replace

BATCHES = (1, 16)
THREADS = (1, 2)
ITEMSIZE = {"float32": 4, "tf32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class DWCase:
    """One depthwise convolution on a square map with 'same' padding.

    bank: "learned" (one kernel a channel), "shared8" (channels / 8 kernels), "fixed8" (VGNet's 6 EK + 2 GK), "blur"
    (one Gaussian).
    """

    name: str
    channels: int
    size: int
    kernel: int = 3
    stride: int = 1
    bank: str = "learned"
    bias: bool = False
    activation: str = "none"
    count: int = 1

    @property
    def out_size(self) -> int:
        return (self.size + 2 * (self.kernel // 2) - self.kernel) // self.stride + 1

    @property
    def bank_size(self) -> int:
        return {"learned": self.channels, "shared8": self.channels // 8, "fixed8": 8, "blur": 1}[self.bank]

    def macs(self, batch: int) -> int:
        return batch * self.channels * self.out_size**2 * self.kernel**2

    def traffic(self, batch: int, dtype: str = "float32") -> int:
        """Bytes that must move when everything is read once and written once."""
        elements = batch * self.channels * (self.size**2 + self.out_size**2) + self.bank_size * self.kernel**2
        return ITEMSIZE[dtype] * elements


@dataclass(frozen=True)
class DSCase:
    """One depthwise -> pointwise chain on a square map: `cat([z[:, -keep:], pw(z)])` with `z = cat([left, dw(right)])`.

    Attributes:
        channels: channels of the depthwise convolution; `out`: channels of the pointwise convolution.
        passthrough: channels that enter the pointwise convolution without a depthwise one (VGNet's left half).
        keep: depthwise channels that are also an output (VGNet's downsampling).
        bias: both convolutions have one (a folded BatchNorm).
        affine: scale and shift after the activation (conv-act-BN).
        count: how often the network holds this shape.
    """

    name: str
    family: str
    channels: int
    out: int
    size: int
    kernel: int = 3
    stride: int = 1
    passthrough: int = 0
    keep: int = 0
    bank: str = "learned"
    dw_activation: str = "none"
    activation: str = "relu"
    bias: bool = False
    affine: bool = False
    count: int = 1

    @property
    def out_size(self) -> int:
        return (self.size + 2 * (self.kernel // 2) - self.kernel) // self.stride + 1

    @property
    def bank_size(self) -> int:
        return {"learned": self.channels, "shared8": self.channels // 8, "blur": 1}[self.bank]

    @property
    def pw_in(self) -> int:
        return self.passthrough + self.channels

    def pw_macs(self, batch: int) -> int:
        return batch * self.pw_in * self.out * self.out_size**2

    def macs(self, batch: int) -> int:
        return self.pw_macs(batch) + batch * self.channels * self.out_size**2 * self.kernel**2

    def traffic(self, batch: int, dtype: str = "float32") -> int:
        """Bytes that must move when everything is read once and written once and the intermediate stays in cache."""
        maps = self.channels * self.size**2 + (self.passthrough + self.keep + self.out) * self.out_size**2
        weights = self.bank_size * self.kernel**2 + self.pw_in * self.out
        return ITEMSIZE[dtype] * (batch * maps + weights)

    def pointwise_only(self) -> DSCase:
        """The same pointwise work behind a 1x1 depthwise convolution: what is left is nearly all pointwise."""
        return replace(self, kernel=1, stride=1, size=self.out_size, bank="learned", keep=0)


@dataclass(frozen=True)
class MBCase:
    """One inverted residual on a square map with folded biases and ReLU6: 1x1, depthwise, 1x1, plus the input.

    Attributes:
        channels, hidden, out: before, between and behind; hidden == channels: there is no expansion.
        residual: the input is added.
        count: how often the network holds this shape.
    """

    name: str
    channels: int
    hidden: int
    out: int
    size: int
    stride: int = 1
    kernel: int = 3
    count: int = 1
    bank: str = "learned"

    @property
    def residual(self) -> bool:
        return self.stride == 1 and self.channels == self.out

    @property
    def expands(self) -> bool:
        return self.hidden != self.channels

    @property
    def out_size(self) -> int:
        return (self.size + 2 * (self.kernel // 2) - self.kernel) // self.stride + 1

    @property
    def bank_size(self) -> int:
        return self.hidden

    def macs(self, batch: int) -> int:
        expansion = self.channels * self.hidden * self.size**2 if self.expands else 0
        return batch * (expansion + self.hidden * (self.kernel**2 + self.out) * self.out_size**2)

    def traffic(self, batch: int, dtype: str = "float32") -> int:
        """Bytes that must move when everything is read once and written once and nothing expanded leaves the cache."""
        maps = self.channels * self.size**2 + self.out * self.out_size**2
        weights = self.hidden * (self.kernel**2 + self.out + (self.channels if self.expands else 0))
        return ITEMSIZE[dtype] * (batch * maps + weights)


@dataclass(frozen=True)
class BSCase:
    """One pointwise [-> pointwise] -> depthwise chain on a square map with 'same' padding, ReLU behind it.

    Attributes:
        channels, out: C and K; `mid`: channels between the two pointwise convolutions of BSConv-S, 0 without.
        bias: a folded BatchNorm's.
        count: how often the network holds this shape.
    """

    name: str
    family: str
    channels: int
    out: int
    size: int
    stride: int = 1
    mid: int = 0
    kernel: int = 3
    bias: bool = True
    activation: str = "relu"
    bank: str = "learned"
    count: int = 1

    @property
    def out_size(self) -> int:
        return (self.size + 2 * (self.kernel // 2) - self.kernel) // self.stride + 1

    @property
    def bank_size(self) -> int:
        return self.out

    def pointwise_weights(self) -> int:
        return self.mid * (self.channels + self.out) if self.mid else self.channels * self.out

    def macs(self, batch: int) -> int:
        depthwise = self.out * self.out_size**2 * self.kernel**2
        return batch * (self.pointwise_weights() * self.size**2 + depthwise)

    def traffic(self, batch: int, dtype: str = "float32") -> int:
        """Bytes that must move when everything is read once and written once and the intermediate stays in cache."""
        maps = self.channels * self.size**2 + self.out * self.out_size**2
        return ITEMSIZE[dtype] * (batch * maps + self.pointwise_weights() + self.out * self.kernel**2)


@dataclass(frozen=True)
class MultiCase:
    """One Multiception block in eval: depthwise windows over all channels, BN, strided pointwise, BN, ReLU."""

    name: str
    channels: int
    out: int
    size: int
    kernels: tuple[int, ...]
    stride: int = 1
    count: int = 1

    @property
    def out_size(self) -> int:
        return (self.size - 1) // self.stride + 1

    def macs(self, batch: int) -> int:
        """At the strided positions, which are all that eval needs."""
        weights = self.channels * (sum(k * k for k in self.kernels) + len(self.kernels) * self.out)
        return batch * self.out_size**2 * weights

    def traffic(self, batch: int, dtype: str = "float32") -> int:
        """Bytes that must move when everything is read once and written once and the concatenation stays in cache."""
        maps = self.channels * self.size**2 + self.out * self.out_size**2
        weights = self.channels * (sum(k * k for k in self.kernels) + len(self.kernels) * self.out)
        return ITEMSIZE[dtype] * (batch * maps + weights)


def _mobilenetv2() -> list[MBCase]:
    """The 17 blocks at 224 (12 distinct shapes)."""
    blocks = [
        (32, 1, 16, 112, 1, 1),
        (16, 6, 24, 112, 2, 1),
        (24, 6, 24, 56, 1, 1),
        (24, 6, 32, 56, 2, 1),
        (32, 6, 32, 28, 1, 2),
        (32, 6, 64, 28, 2, 1),
        (64, 6, 64, 14, 1, 3),
        (64, 6, 96, 14, 1, 1),
        (96, 6, 96, 14, 1, 2),
        (96, 6, 160, 14, 2, 1),
        (160, 6, 160, 7, 1, 2),
        (160, 6, 320, 7, 1, 1),
    ]
    return [
        MBCase(f"mnv2-{c}-{c * t}-{k}-{size}-s{s}", c, c * t, k, size, s, count=count)
        for c, t, k, size, s, count in blocks
    ]


MBCONV = tuple(_mobilenetv2())


def _mobilenetv1() -> list[DSCase]:
    """The 13 pairs at 224 (9 distinct shapes), BatchNorm folded into biases, ReLU after both convolutions."""
    pairs = [
        (32, 64, 112, 1, 1),
        (64, 128, 112, 2, 1),
        (128, 128, 56, 1, 1),
        (128, 256, 56, 2, 1),
        (256, 256, 28, 1, 1),
        (256, 512, 28, 2, 1),
        (512, 512, 14, 1, 5),
        (512, 1024, 14, 2, 1),
        (1024, 1024, 7, 1, 1),
    ]
    return [
        DSCase(
            f"mnv1-{c}-{k}-{size}-s{s}",
            "MobileNetV1",
            c,
            k,
            size,
            stride=s,
            dw_activation="relu",
            bias=True,
            count=count,
        )
        for c, k, size, s, count in pairs
    ]


def _blueprint() -> list[BSCase]:
    """MobileNetV1-BSConvU at 224 (13 blocks, 9 distinct shapes) and CIFAR ResNet-110-U (109 convolutions, 6)."""
    mobile = [
        BSCase(f"bs-mnv1-{c.channels}-{c.out}-{c.size}-s{c.stride}", c.family, c.channels, c.out, c.size, c.stride,
               count=c.count)
        for c in _mobilenetv1()
    ]  # fmt: skip
    cifar = [(3, 16, 32, 1, 1), (16, 16, 32, 1, 36), (16, 32, 32, 2, 1), (32, 32, 16, 1, 35), (32, 64, 16, 2, 1),
             (64, 64, 8, 1, 35)]  # fmt: skip
    return mobile + [
        BSCase(f"bs-cifar-{c}-{k}-{size}-s{s}", "ResNet-110", c, k, size, s, count=count)
        for c, k, size, s, count in cifar
    ]


def _vgnetg_1_0mp() -> list[DSCase]:
    """All chains at 224: blur downsamplings with kept channels, half-identity blocks, the last shared dw + pw."""
    widths, halves, size = (28, 56, 112, 224, 368), (3, 6, 12, 1), 112
    cases = []
    for i, (c, k) in enumerate(zip(widths, widths[1:], strict=False)):
        keep = min(k // 2, c)
        cases.append(
            DSCase(
                f"vgnet-down-{c}-{k}-{size}",
                "VGNetG-1.0MP",
                c,
                k - keep,
                size,
                stride=2,
                keep=keep,
                bank="blur",
                affine=True,
            )
        )
        size, half = size // 2, k // 2
        cases.append(
            DSCase(
                f"vgnet-half-{k}-{size}",
                "VGNetG-1.0MP",
                half,
                half,
                size,
                passthrough=half,
                affine=True,
                count=halves[i],
            )
        )
    last = widths[-1]
    cases.append(DSCase(f"vgnet-last-{last}-{size}", "VGNetG-1.0MP", last, last, size, bank="shared8", affine=True))
    return cases


DSCONV = (*_mobilenetv1(), *_vgnetg_1_0mp())

# The last one is BSConv-S with the package's p = 1/4.
BSCONV = (*_blueprint(), BSCase("bs-subspace-256-256-28-s1", "BSConv-S", 256, 256, 28, mid=64))

# On a GPU (`make gpu`): the chains above, and two that stand for networks not listed here. In this order, the most
# telling first; the first three are the ones with a goal.
_GPU_ONLY = (
    DSCase("pair-64-128-56-s1", "dw + pw", 64, 128, 56, dw_activation="relu", bias=True),
    DSCase("cifar-64-64-32-s1", "dw + pw at 32x32", 64, 64, 32, dw_activation="relu", bias=True),
)
GPU_HEADLINES = ("mnv1-128-128-56-s1", "mnv1-256-256-28-s1", "vgnet-half-56-56")
_GPU_NEXT = ("mnv1-32-64-112-s1", "pair-64-128-56-s1", "mnv1-512-512-14-s1", "mnv1-1024-1024-7-s1", "cifar-64-64-32-s1")
GPU_DSCONV = tuple(
    sorted(
        (*DSCONV, *_GPU_ONLY),
        key=lambda case: [*GPU_HEADLINES, *_GPU_NEXT, case.name].index(case.name),
    )
)


def gpu_batch(name: str) -> int:
    """The large batch of a shape: small maps get more images."""
    return 256 if name.startswith("cifar") else 128


# "The pointwise part" is judged where it has at least 64 channels on both sides; 7x7 maps at batch 1 are exempt:
# packing dominates there.
POINTWISE = tuple(case for case in DSCONV if min(case.pw_in, case.out) >= 64)

# The first convolution of each block of the CIFAR ResNet-50 (8 blocks a stage).
MULTICEPTION = (
    MultiCase("multi-16-16-32-k357", 16, 16, 32, (3, 5, 7), count=8),
    MultiCase("multi-16-32-32-s2-k35", 16, 32, 32, (3, 5), stride=2),
    MultiCase("multi-32-32-16-k35", 32, 32, 16, (3, 5), count=7),
    MultiCase("multi-32-64-16-s2-k33", 32, 64, 16, (3, 3), stride=2),
    MultiCase("multi-64-64-8-k33", 64, 64, 8, (3, 3), count=7),
)

DWCONV = (
    DWCase("dw3-32-112-s1", 32, 112, bias=True, activation="relu"),
    DWCase("dw3-64-112-s2", 64, 112, stride=2, bias=True, activation="relu"),
    DWCase("dw3-128-56-s1", 128, 56, bias=True, activation="relu"),
    DWCase("dw3-256-28-s1", 256, 28, bias=True, activation="relu"),
    DWCase("dw3-512-14-s1", 512, 14, bias=True, activation="relu"),
    DWCase("dw3-1024-7-s1", 1024, 7, bias=True, activation="relu"),
    DWCase("dw5-120-28-s1", 120, 28, kernel=5, bias=True, activation="hardswish"),
    DWCase("dw7-96-56-s1", 96, 56, kernel=7, bias=True),
    DWCase("dw3-28-56-s1", 28, 56),
    DWCase("shared3-368-7", 368, 7, bank="shared8"),
    DWCase("fixed3-64-28", 64, 28, bank="fixed8"),
    DWCase("fixed3-128-14", 128, 14, bank="fixed8"),
    DWCase("blur3-28-112-s2", 28, 112, stride=2, bank="blur"),
    DWCase("blur3-112-28-s2", 112, 28, stride=2, bank="blur"),
)


@dataclass(frozen=True)
class LayerCase:
    """One module on a square map, in eval mode.

    layer: "separable" (1x3, max pool, 3x1), "effnet1" and "effnet2" (whole blocks), "blurmaxpool" (2x2, then a 3x3
    blur of stride 2).
    """

    name: str
    layer: str
    channels: int
    size: int
    out: int = 0
    multiplier: int = 1
    pool: str = "row"
    count: int = 1

    @property
    def out_size(self) -> int:
        return self.size // 2

    @property
    def _inner(self) -> int:
        """Channels of the depthwise convolutions' input in an EffNet block."""
        return {"effnet1": max(6, self.out // 2), "effnet2": self.channels}.get(self.layer, self.channels)

    def macs(self, batch: int) -> int:
        pixels, half, quarter = self.size**2, self.size**2 // 2, self.size**2 // 4
        if self.layer == "blurmaxpool":
            return batch * self.channels * ((self.size - 1) // 2 + 1) ** 2 * 9
        made = self._inner * (2 if self.layer == "effnet2" else self.multiplier)
        depthwise = 3 * made * (pixels + half)
        if self.layer == "separable":
            return batch * depthwise
        rows = 2 if self.layer == "effnet1" else 1
        return batch * (self.channels * self._inner * pixels + depthwise + rows * made * self.out * quarter)

    def traffic(self, batch: int, dtype: str = "float32") -> int:
        """Bytes that must move when the layer's input is read once and its output written once."""
        outputs = {
            "separable": self.channels * self.multiplier * self.size**2 // (4 if self.pool == "both" else 2),
            "blurmaxpool": self.channels * ((self.size - 1) // 2 + 1) ** 2,
        }.get(self.layer, self.out * self.size**2 // 4)
        return ITEMSIZE[dtype] * batch * (self.channels * self.size**2 + outputs)


# EffNet's nets for CIFAR-10 (arXiv 1801.06434, Table 1; the revised blocks of 6.2 at expansion rate 2).
EFFNET = (
    LayerCase("sep1-32-32", "separable", 32, 32),
    LayerCase("sep1-64-16", "separable", 64, 16),
    LayerCase("sep1-128-8", "separable", 128, 8),
    LayerCase("sep2-64-16", "separable", 64, 16, multiplier=2, pool="both"),
    LayerCase("sep2-128-8", "separable", 128, 8, multiplier=2, pool="both"),
    LayerCase("effnet1-3-64-32", "effnet1", 3, 32, 64),
    LayerCase("effnet1-64-128-16", "effnet1", 64, 16, 128),
    LayerCase("effnet1-128-256-8", "effnet1", 128, 8, 256),
    LayerCase("effnet2-64-128-16", "effnet2", 64, 16, 128),
    LayerCase("effnet2-128-256-8", "effnet2", 128, 8, 256),
)
# Blurred max pools in the place of VGNetG-1.0MP's downsamplings.
BLUR_MAX_POOLS = tuple(
    LayerCase(f"blurmax-{c}-{size}", "blurmaxpool", c, size) for c, size in ((28, 112), (56, 56), (112, 28), (224, 14))
)

# Half-identity blocks of VGNetG-1.0MP for forward + backward: (channels of the pair, map size).
TRAINING = ((56, 56), (112, 28), (224, 14), (368, 7))
TRAINING_BATCH = 16

# The other rooms' on a GPU: the ones above where maps and channels differ most, and modules of benchmarks/training.py.
GPU_BLOCKS = (
    *(case for case in MBCONV if case.name in (
        "mnv2-16-96-24-112-s2", "mnv2-24-144-24-56-s1", "mnv2-64-384-64-14-s1", "mnv2-160-960-160-7-s1",
    )),
    *(case for case in EFFNET if case.layer != "separable" or case.name == "sep1-64-16"),
    *(case for case in MULTICEPTION if case.name in ("multi-16-16-32-k357", "multi-32-32-16-k35", "multi-64-64-8-k33")),
    *(case for case in BSCONV if case.name in (
        "bs-mnv1-64-128-112-s2", "bs-mnv1-128-128-56-s1", "bs-mnv1-512-512-14-s1", "bs-cifar-16-16-32-s1",
        "bs-subspace-256-256-28-s1",
    )),
    *BLUR_MAX_POOLS[1:3],
)  # fmt: skip
GPU_TRAINING = (
    "inverted_residual-24-144-56", "multiception-16-32-k357", "bsconv_u-128-128-56", "effnet_v1-64-128-16",
    "squeeze_excite-72-28", "blur_max_pool-56-56",
)  # fmt: skip

# Each at its own input size. The first two are those of `--quick` and of `make gpu`.
MODELS = (
    "vgnetg_1_0mp", "mobilenet_v2", "vgnetg_2_5mp", "mobilenetv1_bsconvu", "multiception_resnet50", "effnet_v1_cifar10",
    "effnet_v2_cifar10",
)  # fmt: skip
GPU_MODELS = QUICK_MODELS = MODELS[:2]

# The subset of `--quick`: one shape of each kind.
QUICK = {
    "mnv1-128-128-56-s1",
    "mnv1-512-512-14-s1",
    "vgnet-down-56-112-56",
    "vgnet-half-224-14",
    "vgnet-last-368-7",
} | {
    "dw3-128-56-s1",
    "shared3-368-7",
    "blur3-28-112-s2",
    "sep1-64-16",
    "effnet2-64-128-16",
    "blurmax-56-56",
    "bs-mnv1-128-128-56-s1",
    "bs-cifar-64-64-8-s1",
    "mnv2-64-384-64-14-s1",
    "multi-32-32-16-k35",
}


def find(name: str) -> DSCase | DWCase | LayerCase | BSCase | MultiCase | MBCase:
    """Return the case of that name; KeyError names what exists."""
    known = (*DSCONV, *DWCONV, *EFFNET, *BLUR_MAX_POOLS, *BSCONV, *MULTICEPTION, *MBCONV, *_GPU_ONLY)
    for case in known:
        if case.name == name:
            return case
    raise KeyError(f"no benchmark shape {name!r}; there are {[case.name for case in known]}")
