"""Triton kernels of room dsconv (placeholder picture)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from effops.ops import geometry as G
from effops.ops import triton_launch as L
from effops.ops.dwconv import fake_output
from effops.ops.triton_device import (
    Affine,
    Chain,
    Sizes,
    Window,
    accumulator,
    block_of,
    depthwise_tile,
    epilogue,
    load_tile,
    store_tile,
    strip_pixels_of,
)

# Taps whose loads are in flight together: a row of most windows. The dot's sums leave no registers for nine.
_TAPS_IN_FLIGHT = tl.constexpr(7)


class Matrix(NamedTuple):
    """The pointwise weight [K, C]: pointer, strides in elements, K, and how many of its C channels pass through."""

    data: Any
    k: int
    c: int
    K: int
    PASSED: int


class Kept(NamedTuple):
    """Where the last channels of z, from channel `first` on, go to or their gradient comes from; a Map with `first`."""

    data: Any
    n: int
    c: int
    h: int
    w: int
    first: int


class Vectors(NamedTuple):
    """Channels an access may take (constexpr): of z's maps, the output's maps, the kept channels and the matrix."""

    C: int
    K: int
    KEPT: int
    MATRIX: int


# ---- tiles ----------------------------------------------------------------------------------------------------------


@triton.jit
def _channels(block, COUNT, SIZE: tl.constexpr, WIDE: tl.constexpr, VEC: tl.constexpr):
    """Channels of a block of [0, COUNT), and which exist."""
    c = block_of(block, SIZE, WIDE)
    return c, c < COUNT // VEC * VEC  # a hint that COUNT is a multiple of VEC would be folded away


@triton.jit
def _matrix_tile(pw, k, c, FIRST, COUNT, VEC: tl.constexpr):
    """matrix[k, FIRST + c] as [k, c]; 0 where k or c (of COUNT) does not exist."""
    row = tl.multiple_of(k * pw.k, VEC)
    column = (FIRST // VEC * VEC + c) * pw.c
    mask = (k < pw.K)[:, None] & (c < COUNT // VEC * VEC)[None, :]
    return tl.load(pw.data + (row[:, None] + column[None, :]), mask=mask, other=0.0)


@triton.jit
def _kept_pointers(kept, n, p, q, c, VEC: tl.constexpr):
    """Pointers to the kept channels' elements for channels c of z, and which c are kept."""
    pixels = tl.multiple_of(n * kept.n + p * kept.h + q * kept.w, VEC)
    first = kept.first // VEC * VEC
    return kept.data + (pixels[:, None] + ((c - first) * kept.c)[None, :]), c >= first


@triton.jit
def _depthwise_result(
    x, bank, affine, residual, n, p, q, inside, o, live, sizes,
    WINDOW: tl.constexpr, CHAIN: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """The depthwise convolution and its epilogue, [pixels, channels], rounded to the maps' dtype."""
    u = depthwise_tile(x, bank, n, p, q, inside, o, live, sizes, WINDOW, VEC, _TAPS_IN_FLIGHT)
    added = None
    if residual.data is not None:
        added = load_tile(residual, n, p, q, o, inside[:, None] & live[None, :], VEC)
    return epilogue(u, affine, added, o, live, CHAIN).to(x.data.dtype.element_ty)


@triton.jit
def _pointwise_sums(
    x, bank, dw_affine, dw_residual, passed, pw, kept, keeping, n, p, q, inside, k, sizes,
    WINDOW: tl.constexpr, CHAIN: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr, VEC: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """sum over c of z[pixel, c] * matrix[k, c], z computed a block of channels at a time.

    Pixels in the mask `keeping` store their kept channels.
    """
    acc = tl.zeros((n.shape[0], k.shape[0]), accumulator(x.data.dtype.element_ty))
    if passed.data is not None:
        for block in range(tl.cdiv(pw.PASSED, BLOCK_C)):
            c, live = _channels(block, pw.PASSED, BLOCK_C, WIDE, VEC.C)
            z = load_tile(passed, n, p, q, c, inside[:, None] & live[None, :], VEC.C)
            if kept.data is not None:
                pointers, is_kept = _kept_pointers(kept, n, p, q, c, VEC.KEPT)
                tl.store(pointers, z, mask=keeping[:, None] & (live & is_kept)[None, :])
            w = tl.trans(_matrix_tile(pw, k, c, 0, pw.PASSED, VEC.MATRIX))
            acc = tl.dot(z, w, acc, input_precision=PRECISION, out_dtype=acc.dtype)
    for block in range(tl.cdiv(sizes.D, BLOCK_C)):
        c, live = _channels(block, sizes.D, BLOCK_C, WIDE, VEC.C)
        z = _depthwise_result(
            x, bank, dw_affine, dw_residual, n, p, q, inside, c, live, sizes, WINDOW, CHAIN, VEC.C
        )  # fmt: skip
        if kept.data is not None:
            pointers, is_kept = _kept_pointers(kept, n, p, q, pw.PASSED + c, VEC.KEPT)
            tl.store(pointers, z, mask=keeping[:, None] & (live & is_kept)[None, :])
        w = tl.trans(_matrix_tile(pw, k, c, pw.PASSED, sizes.D, VEC.MATRIX))
        acc = tl.dot(z, w, acc, input_precision=PRECISION, out_dtype=acc.dtype)
    return acc


# ---- forward --------------------------------------------------------------------------------------------------------


@triton.jit
def _forward_kernel(
    x, bank, dw_affine, dw_residual, passed, pw, affine, residual, y, kept, sizes,
    WINDOW: tl.constexpr, DW_CHAIN: tl.constexpr, CHAIN: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
    STRIP: tl.constexpr, VEC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    k_blocks = tl.cdiv(pw.K, BLOCK_K)
    k_block = tl.program_id(0) % k_blocks
    m = block_of(tl.program_id(0) // k_blocks, BLOCK_M, WIDE)
    inside = m < sizes.M
    n, p, q = strip_pixels_of(m, sizes, STRIP)
    k, live = _channels(k_block, pw.K, BLOCK_K, WIDE, VEC.K)
    acc = _pointwise_sums(
        x, bank, dw_affine, dw_residual, passed, pw, kept, inside & (k_block == 0), n, p, q, inside, k, sizes,
        WINDOW, DW_CHAIN, PRECISION, WIDE, VEC, BLOCK_C,
    )  # fmt: skip
    mask = inside[:, None] & live[None, :]
    added = None
    if residual.data is not None:
        added = load_tile(residual, n, p, q, k, mask, VEC.K)
    store_tile(y, n, p, q, k, epilogue(acc, affine, added, k, live, CHAIN), mask, VEC.K)


# ---- host -----------------------------------------------------------------------------------------------------------


class _Layer(NamedTuple):
    """The operator's arguments, and what follows from them."""

    input: Tensor
    passthrough: Tensor | None
    dw_weight: Tensor
    dw_affine: Affine
    dw_residual: Tensor | None
    pw_weight: Tensor
    affine: Affine
    residual: Tensor | None
    geometry: list[int]
    slopes: list[float]
    sizes: Sizes
    window: Window

    @property
    def passed(self) -> int:
        """Channels of z that pass through."""
        return 0 if self.passthrough is None else self.passthrough.shape[1]

    @property
    def keep(self) -> int:
        """Channels of z that the output begins with."""
        return self.geometry[G.KEEP]

    @property
    def K(self) -> int:
        """Channels of the pointwise convolution's result."""
        return self.pw_weight.shape[0]

    def map_of(self, channels: int) -> Tensor:
        """An empty map of so many channels and the output's size, laid out as the output is."""
        shape = (self.input.shape[0], channels, self.sizes.P, self.sizes.Q)
        return fake_output(self.input, shape, self.geometry)


def _layer(tensors: Sequence[Tensor | None], geometry: list[int], slopes: list[float]) -> _Layer:
    """From the operator's 12 tensors."""
    input, passthrough, dw_weight, *dw_vectors, dw_residual, pw_weight, bias, scale, shift, residual = tensors
    return _Layer(
        input, passthrough, dw_weight, L.affine(*dw_vectors), dw_residual, pw_weight, L.affine(bias, scale, shift),
        residual, geometry, slopes, L.sizes_of(input, dw_weight, geometry), L.window_of(dw_weight, geometry),
    )  # fmt: skip


def _matrix(layer: _Layer) -> Matrix:
    k, c = layer.pw_weight.stride()[:2]
    return Matrix(layer.pw_weight, k, c, layer.K, layer.passed)


def _kept(x: Tensor, layer: _Layer) -> Kept:
    """The channels of `x` (the output or its gradient) that z's last ones are kept in."""
    first = layer.passed + layer.sizes.D - layer.keep
    return Kept(*L.as_map(x[:, : layer.keep] if layer.keep else None), first)


def _vectors(layer: _Layer, inner: Sequence[Tensor | None], outer: Sequence[Tensor | None], whole: Tensor) -> Vectors:
    """Widths of accesses.

    Args:
        inner: further maps with z's channels. outer: maps with the pointwise result's channels.
        whole: the output or its gradient, kept channels included.
    """
    passed, D = layer.passed, layer.sizes.D
    z = (layer.input, layer.passthrough, layer.dw_residual, *inner)
    return Vectors(
        L.vector_width(z, (layer.input.shape[1], D, passed)),
        L.vector_width(outer, (layer.K,)),
        L.vector_width((whole,), (passed, D, layer.keep)),
        L.vector_width((layer.pw_weight,), (passed, D)),
    )


def _constants(layer: _Layer, window: Window, maps: Sequence[Tensor | None], block_m: int) -> dict[str, Any]:
    """What shapes the code of every kernel here."""
    maps = (layer.input, layer.passthrough, layer.dw_residual, layer.residual, *maps)
    return {
        "WINDOW": window,
        "DW_CHAIN": L.depthwise_chain(layer.geometry, layer.slopes[0]),
        "PRECISION": L.dot_precision(layer.input),
        "WIDE": L.needs_wide(maps, layer.sizes, window),
        "STRIP": L.strip_width(layer.sizes.Q, block_m) if layer.geometry[G.CHANNELS_LAST] else layer.sizes.Q,
    }


def _pointwise_chain(layer: _Layer) -> Chain:
    return Chain(layer.geometry[G.PW_ACTIVATION], layer.geometry[G.PW_POST_ACTIVATION], layer.slopes[1])


def _depthwise_operands(layer: _Layer, bank: Tensor) -> tuple:
    return (
        L.as_map(layer.input), bank, layer.dw_affine, L.as_map(layer.dw_residual), L.as_map(layer.passthrough),
        _matrix(layer),
    )  # fmt: skip


def dsconv_fwd(
    input: Tensor, passthrough: Tensor | None, dw_weight: Tensor, dw_bias: Tensor | None, dw_scale: Tensor | None,
    dw_shift: Tensor | None, dw_residual: Tensor | None, pw_weight: Tensor, bias: Tensor | None, scale: Tensor | None,
    shift: Tensor | None, residual: Tensor | None, geometry: list[int], slopes: list[float],
) -> Tensor:  # fmt: skip
    """The operator `dsconv_fwd` of schemas.inc."""
    tensors = (
        input, passthrough, dw_weight, dw_bias, dw_scale, dw_shift, dw_residual,
        pw_weight, bias, scale, shift, residual,
    )  # fmt: skip
    layer = _layer(tensors, geometry, slopes)
    output = layer.map_of(layer.keep + layer.K)
    y = output[:, layer.keep :]
    vectors = _vectors(layer, (), (residual, y), output)
    bank, window = L.bank_of(dw_weight, layer.window, layer.sizes, vectors.C)
    config = forward_config(layer, vectors.C)
    L.launch(
        _forward_kernel, triton.cdiv(layer.sizes.M, config.BLOCK_M) * triton.cdiv(layer.K, config.BLOCK_K), input,
        *_depthwise_operands(layer, bank), layer.affine, L.as_map(residual), L.as_map(y), _kept(output, layer),
        layer.sizes, CHAIN=_pointwise_chain(layer), VEC=vectors,
        **_constants(layer, window, (output,), config.BLOCK_M), **config._asdict(),
    )  # fmt: skip
    return output


# ---- configurations -------------------------------------------------------------------------------------------------

# (BLOCK_M, BLOCK_K): (BLOCK_C, warps), in order of preference for a given BLOCK_K.
_FORWARD = {
    "half": {
        (64, 256): (32, 8), (32, 256): (32, 8), (16, 256): (64, 8),
        (64, 128): (32, 8), (32, 128): (32, 4), (16, 128): (64, 4),
        (64, 64): (32, 4), (32, 64): (32, 4), (16, 64): (64, 4),
        (64, 32): (32, 4), (32, 32): (32, 4), (16, 32): (64, 4),
    },
    "tf32": {
        (64, 256): (32, 8), (32, 256): (32, 8), (16, 256): (32, 8),
        (64, 128): (32, 8), (32, 128): (32, 4), (16, 128): (32, 4),
        (64, 64): (16, 4), (32, 64): (32, 4), (16, 64): (32, 4),
        (64, 32): (16, 4), (32, 32): (32, 4), (16, 32): (32, 4),
    },
    "ieee": {
        (64, 128): (16, 8), (32, 128): (16, 8), (16, 128): (16, 4),
        (64, 64): (16, 8), (32, 64): (16, 4), (16, 64): (16, 4),
        (64, 32): (16, 4), (32, 32): (16, 4), (16, 32): (16, 4),
    },
    "double": {
        (32, 64): (16, 8), (16, 64): (16, 4),
        (32, 32): (16, 4), (16, 32): (16, 4),
    },
}  # fmt: skip


def _kind(x: Tensor) -> str:
    if x.element_size() == 2:
        return "half"
    return "double" if x.dtype == torch.float64 else L.dot_precision(x)


def _registers(layer: _Layer, vec: int) -> int:
    """The bound on a thread's registers.

    Without one the assembler aims at an occupancy of its own and may spill for it. Half types with a light epilogue
    (no scale, shift or residual) and wide accesses fit 128: two blocks of eight warps a processor, one loading while
    the other computes.
    """
    extras = (*layer.dw_affine[1:], *layer.affine[1:], layer.dw_residual, layer.residual)
    light = all(extra is None for extra in extras)
    return 128 if light and vec > 1 and layer.input.element_size() == 2 else 255


def forward_config(layer: _Layer, vec: int) -> L.Config:
    """The widest tile of the table that gives every processor a program, pixels given up before channels.

    `vec` is how many channels an access to z's maps takes.
    """
    if L.INTERPRETED:
        return L.Config(32, 16, 32, 4, 1)
    table = _FORWARD[_kind(layer.input)]
    widest = max(triton.next_power_of_2(layer.K), min(k for _, k in table))
    deepest = max(triton.next_power_of_2(layer.sizes.D), 16)
    for (m, k), (c, warps) in table.items():
        if k > widest or (vec == 1 and m * k > 64 * 128):  # addresses one by one take the registers of the largest tile
            continue
        config = L.Config(m, min(c, deepest), k, warps, 2, _registers(layer, vec))
        if triton.cdiv(layer.sizes.M, m) * triton.cdiv(layer.K, k) >= L.processors(layer.input):
            break
    return config
