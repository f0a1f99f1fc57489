"""Triton kernels of room mbconv. None has run on a GPU yet: what is said of speed here is calculated.

forward      one program: a patch of output pixels x BLOCK_K output channels (all, up to 256); its region and the ring
             are those of room bsconv (triton_patch.py there)

             a block of BLOCK_E expanded channels at a time:
                 x at the region's pixels [BLOCK_X, BLOCK_C] -> tl.dot with the expansion's block, sums in registers
                 epilogue, rounded -> ring; barrier
                 the window's taps from the ring, sums in registers; epilogue, rounded = z [pixels, BLOCK_E]
                 tl.dot of z with the block of the projection: + [pixels, BLOCK_K] sums, which stay in registers
             epilogue, residual -> y, stored once

             x once from memory plus the halo (from L2), again from L1 for every block of expanded channels; y once. The
             expanded tensor, six times x, is in no memory but the ring's lines in L2.
             Without expansion: room dsconv's kernel.
with a       three steps, since a gate needs the whole map: room bsconv's forward gives z, stored once, and its sums
squeeze-     over each patch; room se's excitation gives the gates; room dsconv's pointwise kernel multiplies z by them
excite       as it loads it, and projects. The expanded tensor itself is not stored here either.
backward     the expanded tensor is computed again, into scratch; room dsconv's backward gives its gradient and all
             behind it, its pointwise gradients the rest. With a squeeze-excite z and z times its gates are scratch too,
             and room se's and room dwconv's backward stand between. Deterministic.

Calculated for fp16, channels_last, batch 128 on an H200 (4.3 TB/s, 790 TFLOP/s), 3x3, stride 1:
             24 -> 144 -> 24 at 56 x 56    x 19 MB + y 19 MB (+ residual): 96 bytes a pixel, 9 us; dots 7 GFLOP with the
             halo's, 9 us; through L1 pass the ring, 10.4 x 116 MB, and x for each of five blocks: 45 us at 128 bytes a
             clock and processor. Three perfect kernels write and read 2 x 231 MB more: 116 us.
             96 -> 576 -> 96 at 14 x 14    x and y 4.8 MB each: 2 us; dots 8 us; L1 10.3 x 29 MB and x: 14 us. Three
             perfect kernels: 29 us.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from effops.ops import geometry as G
from effops.ops import triton_launch as L
from effops.ops.bsconv.triton import Depthwise, depthwise_gradients, matrix_of, pointwise_depthwise
from effops.ops.bsconv.triton_patch import (
    patch_of,
    pixels_of,
    pointwise_into,
    region_of,
    scratch_map,
    scratch_of,
    tiling_of,
)
from effops.ops.dsconv.triton import dsconv_bwd, dsconv_fwd, matrix_tile
from effops.ops.dsconv.triton_pointwise import Pointwise, pointwise_backward, pointwise_forward
from effops.ops.dwconv.triton import dwconv_fwd
from effops.ops.mbconv import EXPAND_ACTIVATION, EXPAND_POST_ACTIVATION, SE_ACTIVATION, SE_GATE, TENSORS
from effops.ops.mbconv.triton_configs import configs as configs  # the ahead-of-time check looks for it here
from effops.ops.mbconv.triton_configs import forward_config
from effops.ops.registration import fake_output
from effops.ops.se.triton import excitation, pixel_sums, se_bwd, se_fwd
from effops.ops.triton_device import (
    Chain,
    accumulator,
    channels_of,
    depthwise_tile,
    epilogue,
    load_tile,
    store_tile,
)

# Taps whose loads are in flight together: a row of most windows. The projection's sums leave no registers for nine.
_TAPS_IN_FLIGHT = tl.constexpr(7)


class Vectors(NamedTuple):
    """Channels an access may take (constexpr): of x, the expanded channels, y's maps and the two matrices."""

    X: int
    E: int
    Y: int
    EXPAND: int
    PROJECT: int


# ---- forward --------------------------------------------------------------------------------------------------------


@triton.jit
def _forward_kernel(
    x, expand, expand_affine, bank, dw_affine, project, affine, residual, y, ring, sizes, capacity, items,
    WINDOW: tl.constexpr, EXPAND_CHAIN: tl.constexpr, DW_CHAIN: tl.constexpr, CHAIN: tl.constexpr,
    PRECISION: tl.constexpr, WIDE: tl.constexpr, VEC: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    BLOCK_X: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    k_blocks = tl.cdiv(project.K, BLOCK_K)
    e_blocks = tl.cdiv(sizes.D, BLOCK_E)
    for turn in range(tl.cdiv(items - tl.program_id(0), tl.num_programs(0))):
        item = tl.program_id(0) + turn * tl.num_programs(0)
        n, first_p, first_q = patch_of(item // k_blocks, sizes, ROWS, COLS, WIDE)
        region = region_of(n, first_p, first_q, sizes, WINDOW, ROWS, COLS)
        n, p, q, inside = pixels_of(n, first_p, first_q, sizes, ROWS, COLS)
        k, k_live = channels_of(item % k_blocks, project.K, BLOCK_K, WIDE, VEC.Y)
        acc = tl.zeros((ROWS * COLS, BLOCK_K), accumulator(x.data.dtype.element_ty))
        for block in range(e_blocks):
            o, live = channels_of(block, sizes.D, BLOCK_E, WIDE, VEC.E)
            buffer = ring + (program * 2 + (turn * e_blocks + block) % 2) * capacity * BLOCK_E
            e = scratch_map(buffer, region, block * BLOCK_E, BLOCK_E)
            pointwise_into(
                e, x, expand, expand_affine, region, o, live,
                EXPAND_CHAIN, PRECISION, WIDE, VEC.X, VEC.EXPAND, VEC.E, BLOCK_X, BLOCK_C,
            )  # fmt: skip
            tl.debug_barrier()
            u = depthwise_tile(e, bank, n, p, q, inside, o, live, sizes, WINDOW, VEC.E, _TAPS_IN_FLIGHT)
            z = epilogue(u, dw_affine, None, o, live, DW_CHAIN).to(x.data.dtype.element_ty)
            w = tl.trans(matrix_tile(project, k, o, 0, sizes.D, VEC.PROJECT))
            acc = tl.dot(z, w, acc, input_precision=PRECISION, out_dtype=acc.dtype)
        mask = inside[:, None] & k_live[None, :]
        added = None
        if residual.data is not None:
            added = load_tile(residual, n, p, q, k, mask, VEC.Y)
        store_tile(y, n, p, q, k, epilogue(acc, affine, added, k, k_live, CHAIN), mask, VEC.Y)


# ---- host -----------------------------------------------------------------------------------------------------------


class _Block(NamedTuple):
    """The operator's convolutions; `expand` and `excitation` are None where they are absent.

    Attributes:
        excitation: the four tensors of the squeeze-excite.
        last: whether maps are channels_last.
        se_geometry: the ints of se_* (schemas.inc).
    """

    expand: Pointwise | None
    dw: Depthwise
    excitation: tuple[Tensor | None, ...] | None
    project: Pointwise
    residual: Tensor | None
    last: int
    se_geometry: list[int]


def _block(tensors: tuple[Tensor | None, ...], geometry: list[int], slopes: list[float]) -> _Block:
    """From the operator's tensors behind its input."""
    *others, project_weight, bias, scale, shift, residual = tensors
    expand = None
    if others[0] is not None:
        expand = Pointwise(
            *others[:4], Chain(geometry[EXPAND_ACTIVATION], geometry[EXPAND_POST_ACTIVATION], slopes[0])
        )  # fmt: skip
    dw = Depthwise(*others[4:8], None, [*geometry[: G.PW_ACTIVATION], 0], slopes[1])
    excitation = None if others[8] is None else tuple(others[8:])
    chain = Chain(geometry[G.PW_ACTIVATION], geometry[G.PW_POST_ACTIVATION], slopes[2])
    project = Pointwise(project_weight, bias, scale, shift, chain)
    last = geometry[G.CHANNELS_LAST]
    return _Block(
        expand, dw, excitation, project, residual, last, [last, geometry[SE_ACTIVATION], geometry[SE_GATE]]
    )  # fmt: skip


def _dsconv_arguments(block: _Block) -> tuple:
    """Those of dsconv_* behind the input, for the depthwise convolution and the projection."""
    weight, bias, scale, shift, _, geometry, slope = block.dw
    chain = block.project.chain
    return (
        None, weight, bias, scale, shift, None, *block.project[:4], block.residual,
        [*geometry[:-1], chain.ACT, chain.POST, 0, 0, 0], [slope, chain.SLOPE],
    )  # fmt: skip


def _fused(x: Tensor, block: _Block) -> Tensor:
    """Expansion, depthwise convolution and projection in one kernel."""
    expand, dw, project = block.expand, block.dw, block.project
    hidden, k = expand.weight.shape[0], project.weight.shape[0]
    sizes = L.sizes_of(x, dw.weight, dw.geometry)._replace(D=hidden)
    window = L.window_of(dw.weight, dw.geometry)
    output = fake_output(x, (x.shape[0], k, sizes.P, sizes.Q), dw.geometry)
    vectors = Vectors(
        L.vector_width((x,), (x.shape[1],)), L.vector_width((), (hidden, 16 // x.element_size())),
        L.vector_width((block.residual, output), (k,)), L.vector_width((expand.weight,), (x.shape[1],)),
        L.vector_width((project.weight,), (hidden,)),
    )  # fmt: skip
    config, pixels = forward_config(x, sizes, k, min(vectors.X, vectors.E, vectors.Y))
    tiling = tiling_of(pixels, config.BLOCK_X, sizes, window)
    items = tiling.patches * triton.cdiv(k, config.BLOCK_K)
    scratch = scratch_of(x, items, tiling.pixels, config.BLOCK_E, config.num_warps)
    bank, window = L.bank_of(dw.weight, window, sizes, vectors.E, torch.promote_types(x.dtype, torch.float32))
    L.launch(
        _forward_kernel, scratch.programs, x,
        L.as_map(x), matrix_of(expand.weight), L.affine(*expand[1:4]), bank, L.affine(*dw[1:4]),
        matrix_of(project.weight), L.affine(*project[1:4]), L.as_map(block.residual), L.as_map(output), scratch.ring,
        sizes, tiling.pixels, items,
        WINDOW=window, EXPAND_CHAIN=expand.chain, DW_CHAIN=L.depthwise_chain(dw.geometry, dw.slope),
        CHAIN=project.chain, PRECISION=L.dot_precision(x),
        WIDE=L.needs_wide((x, block.residual, output), sizes, window), VEC=vectors,
        ROWS=tiling.rows, COLS=tiling.columns, **config._asdict(),
    )  # fmt: skip
    return output


def _excited(x: Tensor, block: _Block) -> Tensor:
    """The block with a squeeze-excite: z and its sums, the gates, the projection of z times its gates."""
    if block.expand is None:
        z = dwconv_fwd(x, *block.dw)
        sums, _ = pixel_sums(z)
    else:
        z, sums = pointwise_depthwise(x, None, block.expand, block.dw, pool=True)
    gates = excitation(sums, z.shape[2] * z.shape[3], *block.excitation, *block.se_geometry[1:])
    return pointwise_forward(z, block.project, block.last, block.residual, gates)


def mbconv_fwd(
    input: Tensor, expand_weight: Tensor | None, expand_bias: Tensor | None, expand_scale: Tensor | None,
    expand_shift: Tensor | None, dw_weight: Tensor, dw_bias: Tensor | None, dw_scale: Tensor | None,
    dw_shift: Tensor | None, se_reduce_weight: Tensor | None, se_reduce_bias: Tensor | None,
    se_expand_weight: Tensor | None, se_expand_bias: Tensor | None, project_weight: Tensor, bias: Tensor | None,
    scale: Tensor | None, shift: Tensor | None, residual: Tensor | None, geometry: list[int], slopes: list[float],
) -> Tensor:  # fmt: skip
    """The operator `mbconv_fwd` of schemas.inc."""
    tensors = (
        expand_weight, expand_bias, expand_scale, expand_shift, dw_weight, dw_bias, dw_scale, dw_shift,
        se_reduce_weight, se_reduce_bias, se_expand_weight, se_expand_bias,
        project_weight, bias, scale, shift, residual,
    )  # fmt: skip
    block = _block(tensors, geometry, slopes)
    if block.excitation is not None:
        return _excited(input, block)
    if block.expand is None:
        return dsconv_fwd(input, *_dsconv_arguments(block))
    return _fused(input, block)


def _in_places(found: list[Tensor], wanted: list[bool]) -> list[Tensor | None]:
    """Gradients that an operator returned, in the places of those asked for."""
    rest = iter(found)
    return [next(rest) if want else None for want in wanted]


def _mask(wanted: list[bool]) -> int:
    return sum(1 << bit for bit, want in enumerate(wanted) if want)


def _separable_gradients(
    grad: Tensor, expanded: Tensor, block: _Block, ahead: bool, wants: list[bool]
) -> list[Tensor | None]:
    """Gradients of the expanded tensor, where `ahead` asks for it, and of the tensors 5 to 17; no squeeze-excite."""
    wanted = [ahead, False, *wants[5:9], False, *wants[13:]]
    mask = _mask(wanted)
    found = dsconv_bwd(grad, None, expanded, *_dsconv_arguments(block), mask) if mask else []
    behind, _, *rest = _in_places(found, wanted)
    return [behind, *rest[:4], None, None, None, None, *rest[5:]]


def _excited_gradients(
    grad: Tensor, expanded: Tensor, block: _Block, ahead: bool, wants: list[bool]
) -> list[Tensor | None]:
    """The same with a squeeze-excite."""
    z = dwconv_fwd(expanded, *block.dw)
    gated = se_fwd(z, *block.excitation, None, block.se_geometry)
    before = ahead or any(wants[5:9])
    wanted = [before or any(wants[9:13]), *wants[13:]]
    behind, *of_projection = pointwise_backward(grad, gated, block.project, block.last, wanted, block.residual)
    del gated
    wanted = [before, *wants[9:13]]
    mask = _mask(wanted)
    found = se_bwd(behind, z, *block.excitation, block.se_geometry, mask) if mask else []
    behind, *of_excitation = _in_places(found, wanted)
    del z
    behind, *of_depthwise, _ = depthwise_gradients(behind, None, expanded, block.dw, [ahead, *wants[5:9], False])
    return [behind, *of_depthwise, *of_excitation, *of_projection]


def mbconv_bwd(
    grad_output: Tensor, input: Tensor, expand_weight: Tensor | None, expand_bias: Tensor | None,
    expand_scale: Tensor | None, expand_shift: Tensor | None, dw_weight: Tensor, dw_bias: Tensor | None,
    dw_scale: Tensor | None, dw_shift: Tensor | None, se_reduce_weight: Tensor | None, se_reduce_bias: Tensor | None,
    se_expand_weight: Tensor | None, se_expand_bias: Tensor | None, project_weight: Tensor, bias: Tensor | None,
    scale: Tensor | None, shift: Tensor | None, residual: Tensor | None, geometry: list[int], slopes: list[float],
    mask: int,
) -> list[Tensor]:  # fmt: skip
    """The operator `mbconv_bwd` of schemas.inc."""
    tensors = (
        expand_weight, expand_bias, expand_scale, expand_shift, dw_weight, dw_bias, dw_scale, dw_shift,
        se_reduce_weight, se_reduce_bias, se_expand_weight, se_expand_bias,
        project_weight, bias, scale, shift, residual,
    )  # fmt: skip
    block = _block(tensors, geometry, slopes)
    wants = [bool(mask >> bit & 1) for bit in range(TENSORS)]
    ahead = any(wants[:5])  # whether the expanded tensor's gradient is needed
    expanded = input if block.expand is None else pointwise_forward(input, block.expand, block.last)
    gradients_behind = _separable_gradients if block.excitation is None else _excited_gradients
    behind, *found = gradients_behind(grad_output, expanded, block, ahead, wants)
    del expanded
    of_expansion: list[Tensor | None] = [behind, None, None, None, None]
    if block.expand is not None and ahead:
        *of_expansion, _ = pointwise_backward(behind, input, block.expand, block.last, [*wants[:5], False])
    gradients = [*of_expansion, *found]
    return [gradient for gradient, want in zip(gradients, wants, strict=True) if want]
