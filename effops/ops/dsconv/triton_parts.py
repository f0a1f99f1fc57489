"""Triton kernels of room dsconv with several depthwise windows side by side, the parts (Multiception, MixConv).

None has run on a GPU yet: what is said of speed here is calculated.

forward      the tiles of dsconv (triton.py): one program, BLOCK_M pixels x BLOCK_K output channels, all up to 256

                    D channels of z, BLOCK_C at a time                      K channels
                    Multiception: two blocks of each part in turn         +------------+
                     channels 0..63 of x | 64..127 of x        | ...      | columns of |
                   +------+------+------+------+------+------+--+    x    | the block  |   L2 -> registers -> shared
             pixels| 3x3  | 5x5  | 7x7  | 3x3  | 5x5  | 7x7  |            +------------+
                   +------+------+------+------+------+------+--+
                    MixConv: all blocks of a part, whose channels are its own, then the next part's

                    each: a row of taps in flight, sums in registers, epilogue, rounded -> shared -> tl.dot

             x once from memory, y once, and the order of the blocks keeps it so: the first window loads the channels,
             the others find them in L1, where a patch of 8 x 8 pixels under a 7x7 window is 196 pixels x 128 bytes =
             25 KB and nothing but blocks of the matrix passes between two windows. Every part has a loop of its own;
             the largest window's addresses take the registers: two or three programs a processor.
output       the same tiles; the gradient at the pointwise sums instead of the epilogue, as in triton.py
gradient
z's and the  dsconv's kernels, once a part: to them a part is a layer, with its channels of x and its columns of the
matrix's     matrix. du is read for each
taps'        room dwconv's, on each part's gradient at the depthwise sums
input's      MixConv: room dwconv's, each part into its channels of dx. Multiception: a program owns pixels of dx and
             adds, in registers, over the parts and their taps, a loop each; rounded once. Each part's gradient once
             from memory and once a tap from L1, dx once

Calculated for fp16, channels_last, batch 128 on an H200 (4.3 TB/s, 790 TFLOP/s, 30 TB/s from L1):
             Multiception 3x3, 5x5, 7x7, 64 -> 64 channels, 56 x 56    x 51 MB + y 51 MB = 256 bytes a pixel: 24 us; the
             dot 12 us. 83 taps take 4.3 GB from L1: 144 us; at dsconv's 7 instructions an element and tap, 500 us.
             Eager's z, written and read, is 308 MB: 72 us more of memory.
             MixConv 3x3, 5x5, 7x7, 80 + 80 + 80 -> 240 channels, 14 x 14    x and y 12 MB each = 960 bytes a pixel:
             6 us; the dot 4 us; 28 taps a channel take 330 MB from L1, 11 us, and 40 us of instructions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from effops.ops import geometry as G
from effops.ops import triton_launch as L
from effops.ops.dsconv.triton import (
    BIAS,
    DW_BIAS,
    DW_SCALE,
    DW_SHIFT,
    DW_WEIGHT,
    INPUT,
    PW_WEIGHT,
    RESIDUAL,
    SCALE,
    SHIFT,
    TAPS_IN_FLIGHT,
    Gradients,
    Layer,
    Vectors,
    constants_of,
    depthwise_gradient,
    end_output_gradient,
    is_wide,
    layer_of,
    matrix_gradient,
    matrix_of,
    matrix_tile,
    own_tile,
    pointwise_chain,
    vectors_of,
)
from effops.ops.dsconv.triton_configs import pointwise_config, pointwise_configs
from effops.ops.dwconv.triton import gather_taps, input_gradient, weight_gradient
from effops.ops.epilogue import NONE
from effops.ops.registration import fake_output
from effops.ops.triton_device import (
    Affine,
    Map,
    Sizes,
    Window,
    accumulator,
    channels_of,
    depthwise_tile,
    epilogue,
    load_tile,
    own_cells,
    store_tile,
)

# Blocks of channels that every part has its turn with before the next are loaded. Two and not one: each part is a loop,
# whose turns the compiler does not mix; unrolled one behind the other they would want the registers of all at once.
_BLOCKS_TOGETHER = tl.constexpr(2)
_WARPS = 4  # of the input gradient's programs


class Part(NamedTuple):
    """One depthwise window's operands: its bank, its vectors, its channels.

    Attributes:
        D: how many channels it has.
        CHANNEL, COLUMN: the first of them in the input, and among all parts' and so in the matrix.
    """

    bank: Any
    affine: Affine
    D: int
    CHANNEL: int
    COLUMN: int


def configs() -> dict[str, list[dict[str, Any]]]:
    """What the choosers can return, by kernel, for the ahead-of-time check."""
    return {
        "_forward_kernel": pointwise_configs("parts"),
        "_output_gradient_kernel": pointwise_configs("output_gradient"),
        "_input_gradient_kernel": [{"num_warps": _WARPS}],
    }


# ---- forward --------------------------------------------------------------------------------------------------------


@triton.constexpr_function
def _count(windows):
    return len(windows)


@triton.constexpr_function
def _window(windows, i):
    return Window(*windows[i])  # a bare tuple by now


@triton.jit
def _from_channel(x, FIRST, WIDE: tl.constexpr, VEC: tl.constexpr):
    """The map from channel FIRST on, a multiple of VEC."""
    first = FIRST // VEC * VEC
    if WIDE:
        first = tl.cast(first, tl.int64)
    return Map(x.data + first * x.c, x.n, x.c, x.h, x.w)


@triton.jit
def _add_part(
    acc, x, part, pw, block, n, p, q, inside, k, sizes,
    WINDOW: tl.constexpr, CHAIN: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr, VEC: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """acc + the product of a block of the part's channels with its columns of the matrix."""
    c, live = channels_of(block, part.D, BLOCK_C, WIDE, VEC.C)
    own = Sizes(sizes.H, sizes.W, sizes.P, sizes.Q, sizes.M, part.D)
    source = _from_channel(x, part.CHANNEL, WIDE, VEC.C)
    u = depthwise_tile(source, part.bank, n, p, q, inside, c, live, own, WINDOW, VEC.C, TAPS_IN_FLIGHT)
    z = epilogue(u, part.affine, None, c, live, CHAIN).to(x.data.dtype.element_ty)
    w = tl.trans(matrix_tile(pw, k, c, part.COLUMN, part.D, VEC.MATRIX))
    return tl.dot(z, w, acc, input_precision=PRECISION, out_dtype=acc.dtype)


@triton.jit
def _parts_sums(
    x, parts, pw, n, p, q, inside, k, sizes,
    WINDOWS: tl.constexpr, SHARED: tl.constexpr, CHAIN: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
    VEC: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """sum over all parts' channels of z[pixel, c] * matrix[k, c]; SHARED: the parts have the same channels of x."""
    acc = tl.zeros((n.shape[0], k.shape[0]), accumulator(x.data.dtype.element_ty))
    if SHARED:
        blocks = tl.cdiv(parts[0].D, BLOCK_C)
        for first in range(0, blocks, _BLOCKS_TOGETHER):
            for i in tl.static_range(_count(WINDOWS)):
                for block in range(first, tl.minimum(first + _BLOCKS_TOGETHER, blocks)):
                    acc = _add_part(
                        acc, x, parts[i], pw, block, n, p, q, inside, k, sizes,
                        _window(WINDOWS, i), CHAIN, PRECISION, WIDE, VEC, BLOCK_C,
                    )  # fmt: skip
    else:
        for i in tl.static_range(_count(WINDOWS)):
            for block in range(tl.cdiv(parts[i].D, BLOCK_C)):
                acc = _add_part(
                    acc, x, parts[i], pw, block, n, p, q, inside, k, sizes,
                    _window(WINDOWS, i), CHAIN, PRECISION, WIDE, VEC, BLOCK_C,
                )  # fmt: skip
    return acc


@triton.jit
def _forward_kernel(
    x, parts, pw, affine, residual, y, sizes,
    WINDOWS: tl.constexpr, SHARED: tl.constexpr, DW_CHAIN: tl.constexpr, CHAIN: tl.constexpr,
    PRECISION: tl.constexpr, WIDE: tl.constexpr, STRIP: tl.constexpr, VEC: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    _, _, n, p, q, inside, k, live = own_tile(pw.K, sizes, STRIP, WIDE, VEC.K, BLOCK_M, BLOCK_K)
    acc = _parts_sums(
        x, parts, pw, n, p, q, inside, k, sizes, WINDOWS, SHARED, DW_CHAIN, PRECISION, WIDE, VEC, BLOCK_C
    )  # fmt: skip
    mask = inside[:, None] & live[None, :]
    added = None
    if residual.data is not None:
        added = load_tile(residual, n, p, q, k, mask, VEC.K)
    store_tile(y, n, p, q, k, epilogue(acc, affine, added, k, live, CHAIN), mask, VEC.K)


# ---- backward -------------------------------------------------------------------------------------------------------


@triton.jit
def _output_gradient_kernel(
    x, parts, pw, affine, residual, grad, output, du, residual_grad, partial, sizes,
    WINDOWS: tl.constexpr, SHARED: tl.constexpr, DW_CHAIN: tl.constexpr, CHAIN: tl.constexpr,
    PRECISION: tl.constexpr, WIDE: tl.constexpr, STRIP: tl.constexpr, VEC: tl.constexpr, RECOMPUTE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    row, _, n, p, q, inside, k, live = own_tile(pw.K, sizes, STRIP, WIDE, VEC.K, BLOCK_M, BLOCK_K)
    u = None
    if RECOMPUTE:
        u = _parts_sums(
            x, parts, pw, n, p, q, inside, k, sizes, WINDOWS, SHARED, DW_CHAIN, PRECISION, WIDE, VEC, BLOCK_C
        )  # fmt: skip
    end_output_gradient(
        u, affine, residual, grad, output, du, residual_grad, partial, row, n, p, q, inside, k, live, pw.K, CHAIN, VEC
    )  # fmt: skip


@triton.jit
def _input_gradient_kernel(
    grads, banks, dx, sizes, cells,
    WINDOWS: tl.constexpr, WIDE: tl.constexpr, VEC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The gradient of an input that all parts read. sizes: H and W are the sums', P and Q the input's."""
    n, h, w, inside, c, live = own_cells(sizes, cells, 1, 1, WIDE, VEC, BLOCK_M, BLOCK_C)
    u = tl.zeros((BLOCK_M, BLOCK_C), accumulator(dx.data.dtype.element_ty))
    for i in tl.static_range(_count(WINDOWS)):
        u = gather_taps(u, grads[i], banks[i], n, h, w, inside, c, live, sizes, _window(WINDOWS, i), VEC)
    store_tile(dx, n, h, w, c, u, inside[:, None] & live[None, :], VEC)


# ---- host -----------------------------------------------------------------------------------------------------------


class _Parts(NamedTuple):
    """The operator's arguments, and what follows from them.

    Attributes:
        whole: as dsconv sees all of it: the whole input and matrix, the channels of all parts together. Its bank, its
            vectors and its window are the first part's.
        layers: as dsconv sees each part: its channels of the input, its vectors, its columns of the matrix.
        tensors: the 12 tensors of those layers.
        split: each part reads channels of its own.
    """

    whole: Layer
    layers: list[Layer]
    tensors: list[tuple[Tensor | None, ...]]
    split: bool

    @property
    def windows(self) -> tuple[Window, ...]:
        """Each part's window."""
        return tuple(layer.window for layer in self.layers)

    @property
    def widest(self) -> Sizes:
        """Sizes with the most channels that any part has."""
        return self.whole.sizes._replace(D=max(layer.sizes.D for layer in self.layers))

    def operands(self) -> tuple:
        """What the kernels of this file compute the pointwise sums from."""
        places = _places([layer.sizes.D for layer in self.layers])
        parts = tuple(
            Part(layer.bank, layer.dw_affine, layer.sizes.D, place.start if self.split else 0, place.start)
            for layer, place in zip(self.layers, places, strict=True)
        )
        return L.as_map(self.whole.input), parts, matrix_of(self.whole)

    def vectors(self, outer: Sequence[Tensor | None]) -> Vectors:
        """Widths of accesses that suit every part; outer: maps with the pointwise result's channels."""
        every = [vectors_of(layer, (), outer, layer.input) for layer in (self.whole, *self.layers)]
        return Vectors(*(math.gcd(*widths) for widths in zip(*every, strict=True)))

    def constants(self, maps: Sequence[Tensor | None], block_m: int) -> dict[str, Any]:
        """What shapes the code of the kernels of the pointwise sums."""
        constants = constants_of(self.whole, maps, block_m)
        del constants["WINDOW"]
        wide = any(is_wide(layer, (*maps, self.whole.input)) for layer in self.layers)
        return {**constants, "WIDE": wide, "WINDOWS": self.windows, "SHARED": not self.split}


def _places(channels: Sequence[int]) -> list[slice]:
    """Where the parts lie, one behind the other."""
    ends = list(accumulate(channels))
    return [slice(end - count, end) for end, count in zip(ends, channels, strict=True)]


def _layer_geometry(geometry: list[int], part: int) -> list[int]:
    """The ints of a dsconv that is this part: nothing kept, no TF32 (torch's setting says it), no named bank."""
    return [
        *G.part_geometry(geometry, part)[: G.ACTIVATION], *geometry[G.ACTIVATION : G.PW_POST_ACTIVATION + 1], 0, 0, 0,
    ]  # fmt: skip


def _parts(
    input: Tensor, dw_weights: Sequence[Tensor], dw_vectors: Sequence[Tensor | None], pw_weight: Tensor,
    others: Sequence[Tensor | None], geometry: list[int], slopes: list[float],
) -> _Parts:  # fmt: skip
    """From the operator's arguments; `others`: bias, scale, shift and residual of the pointwise convolution."""
    split = bool(geometry[G.SPLIT])
    layers, tensors = [], []
    for i, place in enumerate(_places([weight.shape[0] for weight in dw_weights])):
        x = input[:, place] if split else input
        vectors = [None if vector is None else vector[place] for vector in dw_vectors]
        own = (x, None, dw_weights[i], *vectors, None, pw_weight[:, place], *others)
        tensors.append(own)
        layers.append(layer_of(own, _layer_geometry(geometry, i), slopes))
    sizes = layers[0].sizes._replace(D=pw_weight.shape[1])
    return _Parts(layers[0]._replace(input=input, pw_weight=pw_weight, sizes=sizes), layers, tensors, split)


def dsconv_parts_fwd(
    input: Tensor, dw_weights: Sequence[Tensor], dw_bias: Tensor | None, dw_scale: Tensor | None,
    dw_shift: Tensor | None, pw_weight: Tensor, bias: Tensor | None, scale: Tensor | None, shift: Tensor | None,
    residual: Tensor | None, geometry: list[int], slopes: list[float],
) -> Tensor:  # fmt: skip
    """The operator `dsconv_parts_fwd` of schemas.inc."""
    others = (bias, scale, shift, residual)
    parts = _parts(input, dw_weights, (dw_bias, dw_scale, dw_shift), pw_weight, others, geometry, slopes)
    whole = parts.whole
    output = whole.map_of(whole.K)
    vectors = parts.vectors((residual, output))
    config = pointwise_config("parts", input, parts.widest.M, parts.widest.D, whole.K, vectors.C, plain=False)
    L.launch(
        _forward_kernel, triton.cdiv(whole.sizes.M, config.BLOCK_M) * triton.cdiv(whole.K, config.BLOCK_K), input,
        *parts.operands(), whole.affine, L.as_map(residual), L.as_map(output), whole.sizes,
        CHAIN=pointwise_chain(whole), VEC=vectors, **parts.constants((output,), config.BLOCK_M), **config._asdict(),
    )  # fmt: skip
    return output


def _output_gradient(parts: _Parts, grad: Tensor, output: Tensor | None, gradients: Gradients) -> Tensor:
    """As dsconv's: the gradient at the pointwise convolution's sums, and of its epilogue's tensors."""
    whole, chain = parts.whole, pointwise_chain(parts.whole)
    linear = chain.ACT == chain.POST == NONE
    scaled = not linear or whole.affine.scale is not None
    inner = gradients.wants(*range(BIAS))
    if not gradients.wants(BIAS, SCALE, SHIFT, RESIDUAL) and not (inner and scaled):
        return grad
    du = whole.map_of(whole.K) if scaled and inner else None
    residual_grad = gradients.map_of(RESIDUAL, whole)
    residual = whole.residual if chain.POST != NONE else None
    vectors = parts.vectors((residual, grad, output, du, residual_grad))
    config = pointwise_config(
        "output_gradient", whole.input, parts.widest.M, parts.widest.D, whole.K, vectors.C, plain=False
    )
    rows = triton.cdiv(whole.sizes.M, config.BLOCK_M)
    partial = gradients.partial_sums(BIAS, rows)
    L.launch(
        _output_gradient_kernel, rows * triton.cdiv(whole.K, config.BLOCK_K), whole.input,
        *parts.operands(), whole.affine, L.as_map(residual), L.as_map(grad), L.as_map(output), L.as_map(du),
        L.as_map(residual_grad), partial, whole.sizes,
        CHAIN=chain, VEC=vectors, RECOMPUTE=gradients.wants(SCALE) or not (linear or output is not None),
        **parts.constants((grad, output, du, residual_grad), config.BLOCK_M), **config._asdict(),
    )  # fmt: skip
    gradients.sum_up(BIAS, partial)
    return grad if du is None else du


def _part_gradients(
    layer: Layer, tensors: tuple[Tensor | None, ...], du: Tensor, mask: int
) -> tuple[Gradients, Tensor | None]:
    """One part's gradients but the input's, and that at its depthwise sums, from the one at the pointwise sums."""
    gradients = Gradients(tensors, mask)
    sums_grad = depthwise_gradient(layer, du, du, gradients)
    if gradients.wants(PW_WEIGHT):
        gradients.found[PW_WEIGHT] = matrix_gradient(layer, du)
    if gradients.wants(DW_WEIGHT):
        weight = tensors[DW_WEIGHT]
        gradients.found[DW_WEIGHT] = weight_gradient(sums_grad, layer.input, weight, layer.geometry)
    return gradients, sums_grad


def _split_input_gradient(parts: _Parts, sums_grads: Sequence[Tensor]) -> Tensor:
    """Each part's, side by side."""
    x = parts.whole.input
    dx = fake_output(x, x.shape, parts.whole.geometry)
    for layer, tensors, grad, place in zip(
        parts.layers, parts.tensors, sums_grads, _places([layer.sizes.D for layer in parts.layers]), strict=True
    ):
        input_gradient(grad, tensors[DW_WEIGHT], layer.input, layer.geometry, dx[:, place])
    return dx


def _shared_input_gradient(parts: _Parts, sums_grads: Sequence[Tensor]) -> Tensor:
    """The parts' sum."""
    x = parts.whole.input
    n, c, h, w = x.shape
    dx = fake_output(x, x.shape, parts.whole.geometry)
    weights = [tensors[DW_WEIGHT].contiguous() for tensors in parts.tensors]
    windows = tuple(
        L.window_of(weight, layer.geometry) for weight, layer in zip(weights, parts.layers, strict=True)
    )  # as the weights are: not those of packed banks
    sizes = Sizes(parts.whole.sizes.P, parts.whole.sizes.Q, h, w, n * h * w, c)
    maps = (*sums_grads, dx)
    block_m, block_c = _gathering_tile(x, parts.whole.geometry)
    L.launch(
        _input_gradient_kernel, triton.cdiv(sizes.M, block_m) * triton.cdiv(c, block_c), x,
        tuple(map(L.as_map, sums_grads)), tuple(weights), L.as_map(dx), sizes, sizes.M,
        WINDOWS=windows, WIDE=any(L.needs_wide(maps, sizes, window) for window in windows),
        VEC=L.vector_width(maps, (c,)), BLOCK_M=block_m, BLOCK_C=block_c, num_warps=_WARPS,
    )  # fmt: skip
    return dx


def _gathering_tile(x: Tensor, geometry: list[int]) -> tuple[int, int]:
    """BLOCK_M and BLOCK_C: 16 bytes a thread of channels_last maps, of double 8; a few pixels of others."""
    if L.INTERPRETED:
        return 64, 16
    elements = {2: (8, 2), 4: (4, 2), 8: (1, 1)}[x.element_size()][not geometry[G.CHANNELS_LAST]]
    block_c = min(64, triton.next_power_of_2(x.shape[1])) if geometry[G.CHANNELS_LAST] else 1
    return elements * 32 * _WARPS // block_c, block_c


# dsconv's bits of the gradients that the whole has, in the order of dsconv_parts_*'s tensors and so of its mask.
_PLACES = (INPUT, DW_WEIGHT, DW_BIAS, DW_SCALE, DW_SHIFT, PW_WEIGHT, BIAS, SCALE, SHIFT, RESIDUAL)
_INNER = sum(1 << place for place in _PLACES if place < BIAS)  # they come through the pointwise convolution


def _joined(place: int, found: Sequence[Gradients], like: Tensor) -> Tensor:
    """The parts' gradients of a per-channel vector or of the matrix, side by side."""
    pieces = [gradients.found[place] for gradients in found]
    if place == PW_WEIGHT:
        return torch.cat([piece.flatten(1) for piece in pieces], 1).view(like.shape)
    return torch.cat(pieces)


def dsconv_parts_bwd(
    grad_output: Tensor, output: Tensor | None, input: Tensor, dw_weights: Sequence[Tensor], dw_bias: Tensor | None,
    dw_scale: Tensor | None, dw_shift: Tensor | None, pw_weight: Tensor, bias: Tensor | None, scale: Tensor | None,
    shift: Tensor | None, residual: Tensor | None, geometry: list[int], slopes: list[float], mask: int,
) -> list[Tensor]:  # fmt: skip
    """The operator `dsconv_parts_bwd` of schemas.inc."""
    dw_vectors, others = (dw_bias, dw_scale, dw_shift), (bias, scale, shift, residual)
    parts = _parts(input, dw_weights, dw_vectors, pw_weight, others, geometry, slopes)
    wanted = sum(1 << place for bit, place in enumerate(_PLACES) if mask >> bit & 1)
    gradients = Gradients((input, None, None, *dw_vectors, None, pw_weight, *others), wanted)
    du = _output_gradient(parts, grad_output, output, gradients)
    of_parts = [
        _part_gradients(layer, tensors, du, wanted & _INNER)
        for layer, tensors in zip(parts.layers, parts.tensors, strict=True)
    ]
    found = [own for own, _ in of_parts]
    if gradients.wants(INPUT):
        input_gradient_of = _split_input_gradient if parts.split else _shared_input_gradient
        gradients.found[INPUT] = input_gradient_of(parts, [sums_grad for _, sums_grad in of_parts])
    for place in (DW_BIAS, DW_SCALE, DW_SHIFT, PW_WEIGHT):
        if gradients.wants(place):
            gradients.found[place] = _joined(place, found, gradients.tensors[place])
    in_order = []
    for place in _PLACES:
        if gradients.wants(place):
            in_order += [own.found[place] for own in found] if place == DW_WEIGHT else [gradients.found[place]]
    return in_order
