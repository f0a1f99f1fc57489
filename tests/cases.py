"""Named cases of the two rooms. Each is there to catch one thing, which its id or its comment says.

Ids read kernel, stride, channels, size: ``k3s2-c28-56-odd_w`` is a 3x3 kernel at stride 2 from 28 to 56 channels.
"""

from __future__ import annotations

from dataclasses import dataclass, field

ACTIVATIONS = ("none", "relu", "relu6", "leaky_relu", "silu", "hardswish", "hardsigmoid", "sigmoid", "gelu")

Pair = tuple[int, int]


@dataclass(frozen=True)
class Epi:
    """Which parts of ``post(act(conv + bias) * scale + shift + residual)`` are there."""

    bias: bool = False
    scale: bool = False
    shift: bool = False
    residual: bool = False
    activation: str = "none"
    post_activation: str = "none"
    slope: float = 0.01

    @property
    def parts(self) -> str:
        names = [name for name in ("bias", "scale", "shift", "residual") if getattr(self, name)]
        return "+".join([*names, self.activation, self.post_activation])


FULL = Epi(bias=True, scale=True, shift=True, residual=True, activation="silu", post_activation="relu6")
BIAS_RELU = Epi(bias=True, activation="relu")


@dataclass(frozen=True, kw_only=True)
class _Case:
    id: str
    n: int = 2
    c: int = 8
    h: int = 7
    w: int = 9
    kernel: Pair = (3, 3)
    stride: Pair = (1, 1)
    padding: tuple[int, int, int, int] = (1, 1, 1, 1)  # left, right, top, bottom, as F.pad
    dilation: Pair = (1, 1)
    multiplier: int = 1
    bank: int | None = None  # rows of the depthwise weight; None: one kernel an output channel
    layout: str = "contiguous"
    residual_layout: str = "contiguous"
    float_params: bool = False  # bias, scale and shift stay float32 beside bfloat16 tensors
    data: str = "normal"
    interpreted: Pair | None = None  # h and w for interpreted kernels, whose tiles are small and slow


@dataclass(frozen=True, kw_only=True)
class DwCase(_Case):
    epi: Epi = field(default_factory=Epi)
    prefixes = ("",)


@dataclass(frozen=True, kw_only=True)
class DsCase(_Case):
    k: int = 8
    passthrough: int = 0
    passthrough_layout: str = "contiguous"
    keep: int = 0
    dw: Epi = field(default_factory=Epi)
    pw: Epi = field(default_factory=Epi)
    prefixes = ("dw_", "")


@dataclass(frozen=True, kw_only=True)
class BsCase(_Case):
    k: int = 8
    m: int = 0  # channels between the two pointwise convolutions; 0: there is one
    mid: Epi = field(default_factory=Epi)  # scale and shift alone
    pw: Epi = field(default_factory=Epi)  # no residual
    epi: Epi = field(default_factory=Epi)
    prefixes = ("pw_", "")


DW_CASES = [
    DwCase(id="k3s1-c1-1x1_map", n=1, c=1, h=1, w=1),
    DwCase(id="k3s1-c1", c=1, h=9, w=11, epi=Epi(bias=True)),
    DwCase(id="k3s1-c3-odd_c", c=3, h=8, w=8, layout="channels_last"),
    DwCase(id="k3s1-c17-cl_tail_of_one", c=17, layout="channels_last", epi=BIAS_RELU),
    DwCase(id="k3s1-c28-vgnet", c=28, h=14, w=14, layout="channels_last"),
    DwCase(id="k3s2-c33-odd_w", c=33, h=13, w=15, stride=(2, 2), epi=Epi(bias=True, activation="silu")),
    DwCase(id="k3s2-c56-even_w-cl", c=56, h=10, w=12, stride=(2, 2), layout="channels_last", epi=BIAS_RELU),
    DwCase(id="k3s2-c72-odd_w-cl", c=72, h=9, w=7, stride=(2, 2), layout="channels_last"),
    DwCase(id="k3s3-c16", c=16, h=11, w=13, stride=(3, 3), layout="channels_last"),
    DwCase(id="k3s12-c8-stride_pair", c=8, stride=(1, 2), epi=Epi(shift=True)),
    DwCase(id="k3d2-c16-dilated", c=16, h=12, w=11, dilation=(2, 2), padding=(2, 2, 2, 2), layout="channels_last"),
    DwCase(id="k3s2d2-c5", c=5, h=12, w=11, stride=(2, 2), dilation=(2, 2), padding=(2, 2, 2, 2)),
    DwCase(id="k3d31-c4-dilation_pair", c=4, h=10, w=8, dilation=(3, 1), padding=(1, 1, 3, 3)),
    DwCase(id="k1x3-c24", c=24, kernel=(1, 3), padding=(1, 1, 0, 0), layout="channels_last", epi=Epi(bias=True)),
    DwCase(id="k3x1-c24-two_padded_rows", c=24, kernel=(3, 1), padding=(0, 0, 2, 0)),
    DwCase(id="k5s1-c40", c=40, h=9, w=9, kernel=(5, 5), padding=(2, 2, 2, 2), layout="channels_last"),
    DwCase(id="k5s2-c12", c=12, h=11, w=10, kernel=(5, 5), padding=(2, 2, 2, 2), stride=(2, 2)),
    DwCase(id="k7s1-c6", c=6, h=9, w=10, kernel=(7, 7), padding=(3, 3, 3, 3), epi=Epi(bias=True, activation="gelu")),
    DwCase(id="k9s2-c8-cl", c=8, h=12, kernel=(9, 9), padding=(4, 4, 4, 4), stride=(2, 2), layout="channels_last"),
    DwCase(id="k1x31-c5", c=5, h=3, w=20, kernel=(1, 31), padding=(15, 15, 0, 0)),
    DwCase(id="k2s2-c8-even_kernel", c=8, h=8, w=9, kernel=(2, 2), padding=(0, 1, 0, 0), stride=(2, 2)),
    DwCase(id="k4x2-c8-even_kernel-cl", c=8, kernel=(4, 2), padding=(1, 0, 2, 1), layout="channels_last"),
    DwCase(id="k1s1-c9-scaling", c=9, kernel=(1, 1), padding=(0, 0, 0, 0)),
    DwCase(id="k3s1-c16-w_below_kernel", c=16, h=1, w=2, layout="channels_last"),
    DwCase(id="k7s1-c16-w_below_kernel", c=16, h=3, w=2, kernel=(7, 7), padding=(3, 3, 3, 3)),
    DwCase(id="k3s1-c16-no_padding-cl", c=16, h=6, w=8, padding=(0, 0, 0, 0), layout="channels_last"),
    DwCase(id="k3s1-c8-no_padding-one_output", c=8, h=3, w=3, padding=(0, 0, 0, 0)),
    DwCase(id="k3s2-c8-asymmetric", c=8, h=8, w=8, stride=(2, 2), padding=(0, 1, 0, 1), epi=Epi(bias=True)),
    DwCase(id="k3s1-c8-asymmetric-cl", c=8, padding=(3, 0, 1, 2), layout="channels_last"),
    # Whole output rows and columns see nothing but padding.
    DwCase(id="k3s1-c8-padding_above_kernel", c=8, h=4, w=3, padding=(5, 4, 4, 6), layout="channels_last",
           epi=BIAS_RELU),
    DwCase(id="k3s2-c4-padding_above_kernel", c=4, h=4, w=3, padding=(5, 4, 4, 6), stride=(2, 2)),
    DwCase(id="k3s1-c5-multiplier2", c=5, multiplier=2, epi=FULL),
    DwCase(id="k3s1-c8-multiplier3-cl", c=8, multiplier=3, layout="channels_last", epi=FULL,
           residual_layout="cl_chunk"),
    DwCase(id="k3s2-c1-multiplier16-cl", c=1, multiplier=16, stride=(2, 2), layout="channels_last"),
    DwCase(id="k3s1-c56-shared7", c=56, bank=7, layout="channels_last", epi=Epi(bias=True)),
    DwCase(id="k3s1-c72-shared9", c=72, bank=9),
    DwCase(id="k3s2-c28-fixed8", c=28, bank=8, stride=(2, 2), layout="channels_last"),
    DwCase(id="k3s1-c12-fixed8-nchw", c=12, bank=8),
    DwCase(id="k3s1-c19-one_kernel", c=19, bank=1, layout="channels_last"),
    DwCase(id="k3s1-c3-bank_above_channels", c=3, bank=5),
    DwCase(id="k3s1-c16-batch0", n=0, c=16, epi=FULL),
    DwCase(id="k3s1-c24-cl_chunk", c=24, layout="cl_chunk", epi=Epi(bias=True, scale=True, shift=True)),
    DwCase(id="k3s1-c29-cl_odd_chunk", c=29, layout="cl_odd_chunk"),
    DwCase(id="k3s2-c16-cl_crop", c=16, layout="cl_crop", stride=(2, 2)),
    DwCase(id="k3s1-c7-offset", c=7, layout="offset", epi=Epi(residual=True, post_activation="silu"),
           residual_layout="offset"),
    DwCase(id="k3s1-c8-crop", c=8, layout="crop"),
    DwCase(id="k3s1-c8-every_second", c=8, layout="every_second", epi=Epi(residual=True),
           residual_layout="every_second"),
    DwCase(id="k3s1-c8-transposed", c=8, layout="transposed", epi=Epi(residual=True), residual_layout="transposed"),
    DwCase(id="k3s1-c8-batch_last", c=8, layout="batch_last"),
    DwCase(id="k3s1-c8-expand_batch", n=3, c=8, layout="expand_batch", epi=Epi(residual=True),
           residual_layout="expand_batch"),
    DwCase(id="k3s1-c8-expand_channels", c=8, layout="expand_channels"),
    DwCase(id="k3s1-c8-expand_space", c=8, layout="expand_space", epi=Epi(residual=True),
           residual_layout="expand_space"),
    DwCase(id="k3s1-c96-64x40-tiles-cl", n=1, c=96, h=64, w=40, layout="channels_last", epi=Epi(bias=True, scale=True),
           interpreted=(17, 67)),
    DwCase(id="k5s2-c20-61x47-tiles", n=1, c=20, h=61, w=47, kernel=(5, 5), padding=(2, 2, 2, 2), stride=(2, 2)),
    DwCase(id="k3s1-c368-7x7-many_channels", n=1, c=368, h=7, w=7, layout="channels_last", epi=Epi(bias=True)),
    DwCase(id="k3s1-c24-1x700-one_long_row", n=1, c=24, h=1, w=700, layout="channels_last", epi=BIAS_RELU),
    DwCase(id="k3s2-c24-700x1-one_long_column", n=1, c=24, h=700, w=1, stride=(2, 1)),
    DwCase(id="k3s1-c20-n37-1x1_maps", n=37, c=20, h=1, w=1, layout="channels_last", epi=Epi(bias=True)),
    DwCase(id="k3s1-c16-full_epilogue-cl", c=16, layout="channels_last", epi=FULL, float_params=True),
    DwCase(id="k3s1-c13-full_epilogue-float_params", c=13, epi=FULL, residual_layout="channels_last",
           float_params=True),
    DwCase(id="k3s1-c16-add_then_relu", c=16, layout="channels_last", residual_layout="cl_crop",
           epi=Epi(bias=True, shift=True, residual=True, post_activation="relu")),
    DwCase(id="k3s1-c16-act_bn", c=16, layout="channels_last", epi=Epi(scale=True, shift=True, activation="sigmoid")),
]  # fmt: skip


_VGNET = Epi(activation="silu", scale=True, shift=True)
_MOBILE = Epi(bias=True, activation="relu6")

DS_CASES = [
    DsCase(id="k3s1-c1-1-1x1_map", n=1, c=1, k=1, h=1, w=1),
    DsCase(id="k3s1-c1-17", c=1, k=17, dw=_MOBILE, pw=_MOBILE),
    DsCase(id="k3s1-c17-1-one_output_channel", c=17, k=1, layout="channels_last", dw=_MOBILE, pw=Epi(bias=True)),
    DsCase(id="k3s1-c3-33", c=3, k=33, h=8, w=8, dw=BIAS_RELU, pw=BIAS_RELU),
    DsCase(id="k3s2-c28-56-odd_w", c=28, k=56, h=13, w=15, stride=(2, 2), layout="channels_last", pw=Epi(bias=True)),
    DsCase(id="k3s1-c33-28-nchw", c=33, k=28, h=9, w=9, dw=Epi(bias=True), pw=_VGNET),
    DsCase(id="k3s1-c72-88-cl", c=72, k=88, layout="channels_last", dw=_MOBILE, pw=_MOBILE),
    DsCase(id="k3s1-c112-40-14x14", c=112, k=40, n=1, h=14, w=14, layout="channels_last", dw=_MOBILE,
           pw=Epi(bias=True)),
    DsCase(id="k3s1-c16-130-wide", c=16, k=130, layout="channels_last", pw=Epi(bias=True)),
    DsCase(id="k3s1-c96-130-64x40-tiles-cl", n=1, c=96, k=130, h=64, w=40, layout="channels_last",
           pw=Epi(bias=True, activation="silu"), interpreted=(18, 24)),
    DsCase(id="k3s2-c40-24-63x33-tiles-nchw", n=1, c=40, k=24, h=63, w=33, stride=(2, 2),
           dw=Epi(bias=True, activation="silu")),
    DsCase(id="k3s3-c16-24", c=16, k=24, h=11, w=13, stride=(3, 3), layout="channels_last"),
    DsCase(id="k3s2-c17-9-odd_hw-nchw", c=17, k=9, h=7, w=5, stride=(2, 2), dw=_MOBILE, pw=_MOBILE),
    DsCase(id="k3d2-c16-24-dilated", c=16, k=24, h=12, w=11, dilation=(2, 2), padding=(2, 2, 2, 2),
           layout="channels_last"),
    DsCase(id="k1x3-c24-16", c=24, k=16, kernel=(1, 3), padding=(1, 1, 0, 0), layout="channels_last",
           dw=Epi(bias=True)),
    DsCase(id="k3x1-c8-20", c=8, k=20, kernel=(3, 1), padding=(0, 0, 1, 1), pw=Epi(bias=True)),
    DsCase(id="k5s1-c24-32", c=24, k=32, kernel=(5, 5), padding=(2, 2, 2, 2), layout="channels_last", dw=_MOBILE,
           pw=Epi(bias=True)),
    DsCase(id="k7s2-c8-16", c=8, k=16, h=11, w=10, kernel=(7, 7), padding=(3, 3, 3, 3), stride=(2, 2)),
    DsCase(id="k2s2-c8-16-even_kernel", c=8, k=16, h=8, w=9, kernel=(2, 2), padding=(0, 1, 0, 0), stride=(2, 2),
           layout="channels_last"),
    DsCase(id="k1s1-c9-12-scaling", c=9, k=12, kernel=(1, 1), padding=(0, 0, 0, 0)),
    DsCase(id="k3s1-c16-16-w_below_kernel", c=16, k=16, h=1, w=2, layout="channels_last"),
    DsCase(id="k3s1-c16-24-no_padding", c=16, k=24, padding=(0, 0, 0, 0), layout="channels_last", dw=_MOBILE),
    DsCase(id="k3s2-c8-16-asymmetric", c=8, k=16, h=8, w=8, stride=(2, 2), padding=(0, 1, 0, 1), dw=Epi(bias=True),
           pw=Epi(bias=True)),
    # The border sees bias and activation of the depthwise, not zero: padding is before it, not after.
    DsCase(id="k3s1-c8-16-padding_above_kernel", c=8, k=16, h=4, w=3, padding=(5, 4, 4, 6), layout="channels_last",
           dw=_MOBILE, pw=_MOBILE),
    DsCase(id="k3s1-c5-12-multiplier2", c=5, k=12, multiplier=2, dw=FULL, pw=Epi(bias=True)),
    DsCase(id="k3s2-c8-24-multiplier3-cl", c=8, k=24, multiplier=3, stride=(2, 2), layout="channels_last", dw=_MOBILE,
           pw=FULL),
    DsCase(id="k3s1-c56-40-shared7", c=56, k=40, bank=7, layout="channels_last", pw=_VGNET),
    DsCase(id="k3s1-c28-24-fixed8", c=28, k=24, bank=8, dw=Epi(scale=True, shift=True), pw=_VGNET),
    DsCase(id="k3s1-c6-10-multiplier2-bank4", c=6, k=10, multiplier=2, bank=4, layout="channels_last"),
    DsCase(id="k3s1-c28-28-half_identity", c=28, k=28, passthrough=28, h=14, w=14, layout="cl_chunk",
           passthrough_layout="cl_chunk", pw=_VGNET),
    DsCase(id="k3s1-c12-20-half_identity-nchw", c=12, k=20, passthrough=7, pw=_VGNET),
    DsCase(id="k3s2-c16-24-strided_passthrough", c=16, k=24, passthrough=5, h=9, w=8, stride=(2, 2),
           layout="channels_last", passthrough_layout="cl_odd_chunk",
           dw=_MOBILE, pw=_MOBILE),
    DsCase(id="k3s2-c28-33-downsampling", c=28, k=33, keep=23, h=10, w=12, stride=(2, 2), layout="channels_last",
           pw=_VGNET),
    DsCase(id="k3s2-c13-8-keep_all-nchw", c=13, k=8, keep=13, h=9, w=9, stride=(2, 2), bank=1, pw=BIAS_RELU),
    DsCase(id="k3s1-c12-16-passthrough-keep", c=12, k=16, passthrough=4, keep=5, layout="channels_last", dw=_MOBILE,
           pw=FULL),
    DsCase(id="k3s1-c6-9-passthrough-keep-multiplier2", c=6, k=9, passthrough=3, keep=7, multiplier=2, dw=FULL,
           pw=FULL),
    DsCase(id="k3s1-c16-24-batch0", n=0, c=16, k=24, passthrough=4, keep=3, dw=FULL, pw=FULL),
    DsCase(id="k3s1-c29-32-cl_odd_chunk", c=29, k=32, layout="cl_odd_chunk", dw=_MOBILE, pw=_MOBILE),
    DsCase(id="k3s2-c16-24-cl_crop", c=16, k=24, layout="cl_crop", stride=(2, 2)),
    DsCase(id="k3s1-c7-16-offset", c=7, k=16, layout="offset", pw=Epi(residual=True), residual_layout="offset"),
    DsCase(id="k3s1-c8-16-crop", c=8, k=16, layout="crop", passthrough=3, passthrough_layout="crop"),
    DsCase(id="k3s1-c8-16-every_second", c=8, k=16, layout="every_second", passthrough=3,
           passthrough_layout="every_second"),
    DsCase(id="k3s1-c8-16-transposed", c=8, k=16, layout="transposed", pw=Epi(residual=True),
           residual_layout="transposed"),
    DsCase(id="k3s1-c8-16-batch_last", c=8, k=16, layout="batch_last"),
    DsCase(id="k3s1-c8-16-expanded", n=3, c=8, k=16, layout="expand_batch", passthrough=3,
           passthrough_layout="expand_space"),
    DsCase(id="k3s1-c8-16-expand_channels", c=8, k=16, layout="expand_channels", pw=Epi(residual=True),
           residual_layout="expand_space"),
    DsCase(id="k3s1-c368-376-7x7-many_channels", n=1, c=368, k=376, h=7, w=7, layout="channels_last", dw=_MOBILE,
           pw=Epi(bias=True, activation="silu")),
    DsCase(id="k3s1-c260-513-2x3-odd_panels", n=5, c=260, k=513, h=2, w=3, pw=Epi(bias=True)),
    DsCase(id="k3s1-c600-1-long_sum", n=1, c=600, k=1, h=5, w=5, layout="channels_last", dw=BIAS_RELU),
    DsCase(id="k3s1-c40-48-1x700-one_long_row", n=1, c=40, k=48, h=1, w=700, layout="channels_last", dw=_MOBILE,
           pw=_MOBILE),
    DsCase(id="k3s2-c20-24-700x1-one_long_column", n=1, c=20, k=24, h=700, w=1, stride=(2, 1), pw=Epi(bias=True)),
    DsCase(id="k3s1-c24-40-n37-1x1_maps", n=37, c=24, k=40, h=1, w=1, layout="channels_last", dw=_MOBILE, pw=_MOBILE),
    DsCase(id="k3s1-c28-28-n9-3x3_maps-nchw", n=9, c=28, k=28, h=3, w=3, passthrough=28, pw=_VGNET),
    DsCase(id="k3s1-c16-16-add_then_relu", c=16, k=16, layout="channels_last", residual_layout="channels_last",
           dw=BIAS_RELU,
           pw=Epi(bias=True, shift=True, residual=True, post_activation="relu")),
    DsCase(id="k3s1-c24-32-full-float_params", c=24, k=32, layout="channels_last", dw=FULL, pw=FULL, float_params=True),
    DsCase(id="k3s1-c11-13-full-nchw-float_params", c=11, k=13, dw=FULL, pw=FULL, residual_layout="crop",
           float_params=True),
    # Training with a BN between: statistics folded into scale and shift, the activation after them.
    DsCase(id="k3s1-c16-24-bn_between", c=16, k=24, layout="channels_last",
           dw=Epi(scale=True, shift=True, post_activation="relu")),
]  # fmt: skip


_NORM = Epi(scale=True, shift=True)
_PW = Epi(bias=True, scale=True, shift=True, activation="silu", post_activation="sigmoid")

BS_CASES = [
    BsCase(id="k3s1-c1-1-1x1_map", n=1, c=1, k=1, h=1, w=1),
    BsCase(id="k3s1-c3-16-stem", c=3, k=16, h=8, w=8),
    BsCase(id="k3s1-c17-1-one_output_channel", c=17, k=1, layout="channels_last", epi=Epi(bias=True)),
    BsCase(id="k3s2-c28-56-odd_w-cl", c=28, k=56, h=13, w=15, stride=(2, 2), layout="channels_last", epi=BIAS_RELU),
    BsCase(id="k3s1-c33-29-nchw", c=33, k=29, h=9, w=9, pw=Epi(bias=True), epi=FULL),
    BsCase(id="k3s1-c112-40-14x14", c=112, k=40, n=1, h=14, w=14, layout="channels_last", epi=_MOBILE),
    # Bands, rings and their wrapping; several panels, the last of another width.
    BsCase(id="k3s1-c20-130-64x40-cl", n=1, c=20, k=130, h=64, w=40, layout="channels_last", pw=_NORM,
           epi=Epi(bias=True), interpreted=(12, 17)),
    BsCase(id="k5s2-c12-72-63x33-nchw", n=3, c=12, k=72, h=63, w=33, kernel=(5, 5), stride=(2, 2),
           padding=(2, 2, 2, 2), m=4, mid=_NORM, epi=Epi(bias=True, activation="silu"), interpreted=(17, 13)),
    BsCase(id="k3s3-c16-24", c=16, k=24, h=11, w=13, stride=(3, 3), layout="channels_last"),
    BsCase(id="k3s12-c8-stride_pair-subspace", c=8, k=12, stride=(1, 2), m=3, pw=Epi(shift=True)),
    BsCase(id="k3d2-c16-24-dilated", c=16, k=24, h=12, w=11, dilation=(2, 2), padding=(2, 2, 2, 2),
           layout="channels_last", m=4, epi=Epi(bias=True)),
    BsCase(id="k1x3-c24-16", c=24, k=16, kernel=(1, 3), padding=(1, 1, 0, 0), layout="channels_last"),
    BsCase(id="k2s2-c8-16-even_kernel", c=8, k=16, h=8, w=9, kernel=(2, 2), padding=(0, 1, 0, 0), stride=(2, 2)),
    BsCase(id="k1s3-c8-16-windows_skip_rows", c=8, k=16, h=10, w=8, kernel=(1, 1), padding=(0, 0, 0, 0),
           stride=(3, 2), layout="channels_last"),
    BsCase(id="k3s2-c8-16-asymmetric", c=8, k=16, h=8, w=8, stride=(2, 2), padding=(0, 1, 0, 1), m=5, mid=_NORM),
    # Whole windows in the padding see zeros, whatever the pointwise's bias, shift and activations make of a zero.
    BsCase(id="k3s1-c8-16-padding_above_kernel", c=8, k=16, h=4, w=3, padding=(5, 4, 4, 6), layout="channels_last",
           pw=_PW, epi=_MOBILE),
    BsCase(id="k3s2-c4-9-padding_above_kernel", c=4, k=9, h=4, w=3, padding=(5, 4, 4, 6), stride=(2, 2), pw=_PW,
           m=2, mid=_NORM),
    BsCase(id="k3s1-c16-24-batch0", n=0, c=16, k=24, m=4, mid=_NORM, pw=_PW, epi=FULL),
    BsCase(id="k3s1-c29-32-cl_odd_chunk", c=29, k=32, layout="cl_odd_chunk", m=8, epi=Epi(bias=True)),
    BsCase(id="k3s2-c16-24-cl_crop", c=16, k=24, layout="cl_crop", stride=(2, 2)),
    BsCase(id="k3s1-c8-16-every_second", c=8, k=16, layout="every_second", epi=Epi(residual=True),
           residual_layout="every_second"),
    BsCase(id="k3s1-c8-16-transposed", c=8, k=16, layout="transposed"),
    BsCase(id="k3s1-c8-16-expanded", n=3, c=8, k=16, layout="expand_batch", epi=Epi(residual=True),
           residual_layout="expand_space"),
    BsCase(id="k3s1-c176-376-7x7-many_channels", n=1, c=176, k=376, h=7, w=7, layout="channels_last",
           interpreted=(2, 3)),
    BsCase(id="k3s1-c40-48-1x700-one_long_row", n=1, c=40, k=48, h=1, w=700, layout="channels_last", m=10,
           interpreted=(1, 90)),
    BsCase(id="k3s2-c20-24-700x1-one_long_column", n=1, c=20, k=24, h=700, w=1, stride=(2, 1)),
    BsCase(id="k3s1-c24-40-n37-1x1_maps", n=37, c=24, k=40, h=1, w=1, layout="channels_last", epi=Epi(bias=True)),
    BsCase(id="k3s1-c16-16-add_then_relu", c=16, k=16, layout="channels_last", residual_layout="channels_last",
           epi=Epi(bias=True, shift=True, residual=True, post_activation="relu")),
    BsCase(id="k3s1-c24-32-full-float_params", c=24, k=32, layout="channels_last", m=6, mid=_NORM, pw=_PW, epi=FULL,
           float_params=True),
    BsCase(id="k3s1-c11-13-relu6-relu6", c=11, k=13, pw=_MOBILE, epi=_MOBILE),
]  # fmt: skip


def activation_cases(kind: type[DwCase] | type[DsCase]) -> list[DwCase | DsCase]:
    """Every activation in every place, NCHW and channels_last, with values on both sides of every kink."""
    cases: list[DwCase | DsCase] = []
    for name in ACTIVATIONS[1:]:
        for layout in ("contiguous", "channels_last"):
            sizes = {"c": 11, "h": 6, "w": 7, "layout": layout}
            first = Epi(bias=True, scale=True, shift=True, activation=name, slope=0.2)
            last = Epi(bias=True, shift=True, post_activation=name, slope=0.3)
            alone = Epi(bias=True, activation=name, slope=0.1)  # the form whose derivative comes from the output
            for epi, place in ((alone, "alone"), (first, "act"), (last, "post")):
                case_id = f"{name}-{place}-{layout}"
                if kind is DwCase:
                    cases.append(DwCase(id=case_id, epi=epi, **sizes))
                else:
                    cases.append(DsCase(id="dw-" + case_id, k=9, dw=epi, **sizes))
                    cases.append(DsCase(id="pw-" + case_id, k=9, pw=epi, **sizes))
    return cases


def ids(cases: list) -> list[str]:
    return [case.id for case in cases]
