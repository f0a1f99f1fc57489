"""Tiles of the Triton kernels of room dwconv: which a kernel takes by dtype, layout, window, channels and offsets."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
from torch import Tensor

from effops.ops import triton_launch as L
from effops.ops.triton_device import Window


class Tile(NamedTuple):
    """A kernel's tile and launch parameters.

    Attributes:
        BLOCK_M, BLOCK_C: cells and channels of a tile.
        ROWS: target rows of a cell; 1 where the window is not unrolled.
        UNROLLED: whether the window is unrolled.
        num_warps: warps a program.
        maxnreg: bound on a thread's registers. Left alone the assembler starts every load of a window at once.
    """

    BLOCK_M: int
    BLOCK_C: int
    ROWS: int
    UNROLLED: bool
    num_warps: int
    maxnreg: int | None


class WeightTile(NamedTuple):
    """The same for the weight gradient, whose threads keep a sum for each tap of a group (see its kernel).

    Attributes:
        BLOCK_M: cells of a tile times PARTS.
        GROUP_R, GROUP_S: rows and columns of a group of taps.
        PARTS: groups that share a tile.
    """

    BLOCK_M: int
    BLOCK_C: int
    ROWS: int
    GROUP_R: int
    GROUP_S: int
    PARTS: int
    num_warps: int
    maxnreg: int | None

    @property
    def cells(self) -> int:
        """Cells of a tile."""
        return self.BLOCK_M // self.PARTS

    def rounds(self, window: Window) -> int:
        """Programs that between them have the taps of a window: how often the maps are read."""
        groups = triton.cdiv(window.R, self.GROUP_R) * triton.cdiv(window.S, self.GROUP_S)
        return triton.cdiv(groups, self.PARTS)


# The shipped table: kernel -> {taps at most: {bytes of an element: (channels_last, NCHW)}}. An entry is (elements of a
# row of a cell a thread, rows of a cell, bound on registers); None, and every larger window, is a loop over the taps.
# Forward, statistics and gradients at the sums keep elements x rows sums a thread, the weight's gradient elements x
# taps. One table for sm_80, sm_90 and sm_100, with bounds at which none of them spills with 32-bit offsets.
_MEDIUM = {2: (None, (2, 2, 128)), 4: (None, (2, 2, 128)), 8: (None, (1, 2, 168))}
_SMALL = {2: ((8, 4, 200), (2, 4, 128)), 4: ((4, 4, 168), (2, 4, 128)), 8: ((2, 4, 168), (1, 4, 128))}
# The running moments stand beside the sums, or the epilogue's vectors.
_SUMS = {9: _SMALL | {4: ((4, 2, 168), (2, 4, 128))}, 25: _MEDIUM}
_FORWARD = {9: _SMALL | {2: ((8, 2, 200), (2, 4, 128))}, 25: _MEDIUM}
_EPILOGUE = {
    9: _FORWARD[9] | {2: ((8, 2, 255), (2, 4, 128)), 8: ((2, 2, 168), (1, 4, 168))},
    25: _MEDIUM | {2: (None, (2, 2, 168)), 4: (None, (2, 2, 168))},
}
_TABLE = {
    "forward": _FORWARD,
    "epilogue_gradient": _EPILOGUE,
    "statistics": _SUMS,
    "input_gradient": {
        9: _SMALL,
        25: {2: ((8, 1, 255), (2, 2, 128)), 4: ((4, 2, 255), (2, 2, 128)), 8: ((2, 2, 168), (1, 2, 128))},
    },
    "weight_gradient": {
        9: {2: ((8, 2, 168), (2, 2, 128)), 4: ((4, 2, 128), (2, 2, 128)), 8: ((2, 2, 128), (1, 2, 128))},
        25: {2: ((4, 1, 168), (2, 1, 128)), 4: ((4, 1, 200), (2, 1, 128)), 8: ((1, 2, 168), (1, 1, 128))},
    },
}
_LOOPED = {2: ((8, 1, 128), (2, 1, 128)), 4: ((4, 1, 128), (2, 1, 128)), 8: ((2, 1, 255), (1, 1, 128))}
# The weight's gradient for a larger window, in groups of so many taps at most.
_GROUPED = {2: ((8, 2, 255), (2, 2, 128)), 4: ((4, 2, 168), (2, 2, 128)), 8: ((2, 2, 200), (1, 2, 128))}
_GROUP_TAPS = 14
_WARPS = 4


def configs() -> dict[str, list[dict[str, Any]]]:
    """What the choosers can return, by kernel, for the ahead-of-time check."""

    def listed(kernel: str) -> list[tuple[int, int]]:
        """Rows and bounds of the table's entries."""
        entries = (e for sizes in _TABLE[kernel].values() for layouts in sizes.values() for e in layouts if e)
        return sorted({entry[1:] for entry in entries})

    def of(kernel: str) -> list[dict[str, Any]]:
        tiles = {(True, *entry) for entry in listed(kernel)}
        tiles |= {(False, rows, bound) for layouts in _LOOPED.values() for _, rows, bound in layouts}
        # The rows of an input gradient's cell follow from the stride too, those of channels read one by one from less.
        found = [
            {"UNROLLED": unrolled, "maxnreg": bound} | ({} if kernel == "input_gradient" else {"ROWS": rows})
            for unrolled, rows, bound in sorted(tiles)
        ]
        return [*found, *({"UNROLLED": unrolled, "maxnreg": 255} for unrolled in (True, False))]

    grouped = {(4, rows, bound) for layouts in _GROUPED.values() for _, rows, bound in layouts}  # 7x7: four groups
    whole = {(1, *entry) for entry in listed("weight_gradient")}
    return {
        "_forward_kernel": of("forward"),
        "_epilogue_gradient_kernel": [*of("epilogue_gradient"), {"ROWS": 1, "RECOMPUTE": False}],
        "_input_gradient_kernel": of("input_gradient"),
        "_weight_gradient_kernel": [
            *({"PARTS": parts, "ROWS": rows, "maxnreg": bound} for parts, rows, bound in sorted(whole | grouped)),
            {"maxnreg": 255},
        ],
        "_statistics_kernel": of("statistics"),
        "_combine_statistics_kernel": [{}],
        "_statistics_gradient_kernel": of("forward"),
    }


def tile(kernel: str, x: Tensor, channels: int, window: Window, channels_last: int, wide: bool) -> Tile:
    """The configuration of a kernel by dtype, layout, window, channels and offsets.

    Args:
        kernel: a key of the table.
        x: a map; only its dtype is read.
        channels: of the tiles.
        channels_last: whether a thread's neighbours are channels or pixels.
        wide: whether offsets are 64-bit, which takes registers.
    """
    layout = _layout(channels, channels_last)
    entry = _listed(kernel, x, window, layout)
    # A cell is a whole number of strides: of a stride above 2 it would be too large to unroll.
    unrolled = entry is not None and max(window.SH, window.SW) <= 2
    elements, rows, maxnreg = entry if unrolled else _LOOPED[x.element_size()][layout]
    rows, maxnreg = _roomy(rows, maxnreg, channels, window, wide)
    if kernel == "epilogue_gradient" and channels % 8:  # beside the epilogue's vectors no room for two rows' addresses
        rows = 1
    if kernel == "input_gradient" and unrolled:
        if max(window.R, window.S) > 5:  # the table's cells are for 3x3: four rows of a 1x9 window spill
            rows = min(rows, 2)
        rows = max(window.SH, rows // window.SW // window.SH * window.SH)
    if L.INTERPRETED:
        return Tile(64, 16, rows, unrolled, _WARPS, None)
    return Tile(*_block(elements, channels, channels_last), rows, unrolled, _WARPS, maxnreg)


def weight_tile(x: Tensor, channels: int, window: Window, channels_last: int, wide: bool) -> WeightTile:
    """The same for the weight gradient; a window that is not in the table is cut into groups of taps."""
    layout = _layout(channels, channels_last)
    entry = _listed("weight_gradient", x, window, layout)
    groups = _groups(window.R, window.S) if entry is None else (window.R, window.S, 1)
    elements, rows, maxnreg = entry or _GROUPED[x.element_size()][layout]
    rows, maxnreg = _roomy(rows, maxnreg, channels, window, wide)
    if entry is None and channels % 8:  # beside fourteen sums an element there is no room for two rows' addresses
        rows = 1
    if L.INTERPRETED:
        return WeightTile(64, 16, rows, *groups, _WARPS, None)
    block_m, block_c = _block(elements, channels, channels_last)
    return WeightTile(max(block_m, groups[2]), block_c, rows, *groups, _WARPS, maxnreg)


def _listed(kernel: str, x: Tensor, window: Window, layout: int) -> tuple[int, int, int] | None:
    """The table's entry for a window, or None."""
    entries, taps = _TABLE[kernel], window.R * window.S
    most = min((most for most in entries if most >= taps), default=None)
    return entries[most][x.element_size()][layout] if most else None


def _layout(channels: int, channels_last: int) -> int:
    """Place in a pair of entries: with fewer channels a thread's elements are pixels in channels_last too."""
    return 0 if channels_last and channels >= 8 else 1


def _roomy(rows: int, maxnreg: int, channels: int, window: Window, wide: bool) -> tuple[int, int]:
    """Rows and bound where addresses take registers too: of channels read one by one, and of 64 bits."""
    if window.MULT > 1 or channels % 8:
        rows, maxnreg = min(rows, 2 if window.MULT == 1 else 1), 255
    if wide:
        rows, maxnreg = max(1, rows // 2), 255
    return rows, maxnreg


def _block(elements: int, channels: int, channels_last: int) -> tuple[int, int]:
    """BLOCK_M and BLOCK_C at which a thread has so many elements."""
    block_c = min(64, triton.next_power_of_2(channels)) if channels_last else 1
    return max(1, elements * 32 * _WARPS // block_c), block_c


def _groups(rows: int, columns: int) -> tuple[int, int, int]:
    """Equal groups of taps: their rows and columns, and how many share a tile, eight at most.

    Windows of up to 49 taps have no more than that. Whole rows need the fewest loads; a long row is cut at 8 columns.
    """
    group_columns = _share(columns, 8)
    group_rows = _share(rows, _GROUP_TAPS // group_columns)
    count = triton.cdiv(rows, group_rows) * triton.cdiv(columns, group_columns)
    return group_rows, group_columns, min(8, triton.next_power_of_2(count))


def _share(length: int, most: int) -> int:
    """The largest of the equal parts, each at most so long, of a length."""
    return triton.cdiv(length, triton.cdiv(length, most))


def steps_of(tiles: int, channel_blocks: int) -> int:
    """Tiles that one program sums up: so many that programs still fill the device several times over."""
    if L.INTERPRETED:
        return 3
    return max(1, min(64, tiles * channel_blocks // 4096))
