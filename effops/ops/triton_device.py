"""Triton device functions that every room shares: maps in memory, windows, activations, epilogues, the depthwise tile.

Nothing here knows an operator. A kernel sees feature maps as `Map` (pointer and strides), so that NCHW, channels_last,
sliced and expanded tensors are the same code; sizes as `Sizes`; everything that shapes the generated code (`Window`,
activations, slopes) as constexpr.

A tile is [pixels, channels]: pixels are numbered n * P * Q + p * Q + q through the whole batch, so that a block is full
on small maps too. Arithmetic is float32, float64 for float64 maps. Offsets are 32-bit where the host says that all of
them fit (`WIDE`). `VEC` is how many channels of a pixel one access may take in channels_last maps, 16 bytes at most;
Triton by itself only knows multiples of 16 elements, and 28 channels (VGNet) would be read one by one.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

# The codes of effops.ops.epilogue.ACTIVATIONS, as constants a kernel may read.
_NONE = tl.constexpr(0)
_RELU = tl.constexpr(1)
_RELU6 = tl.constexpr(2)
_LEAKY_RELU = tl.constexpr(3)
_SILU = tl.constexpr(4)
_HARDSWISH = tl.constexpr(5)
_HARDSIGMOID = tl.constexpr(6)
_SIGMOID = tl.constexpr(7)
_GELU = tl.constexpr(8)

# A window of at most so many taps is unrolled: all its loads are in flight together. Larger ones are a loop.
_UNROLLED_TAPS = tl.constexpr(25)


class Map(NamedTuple):
    """A feature map [N,C,H,W] in memory: pointer (None: there is none) and strides in elements."""

    data: Any
    n: int
    c: int
    h: int
    w: int


class Sizes(NamedTuple):
    """Sizes of a depthwise convolution: input rows and columns, output rows and columns, pixels N * P * Q, channels."""

    H: int
    W: int
    P: int
    Q: int
    M: int
    D: int


class Window(NamedTuple):
    """What shapes the code of a depthwise convolution (constexpr).

    Attributes:
        R, S: rows and columns of the kernel.
        SH, SW: stride.
        TOP, LEFT: padding.
        DH, DW: dilation.
        MULT: output channels an input channel.
        B: kernels in the bank; output channel o uses kernel o mod B. 0: the bank is packed, taps [R*S, channels].
        TAPS: the bank's values where they are fixed, B tuples of R * S floats; else None.
    """

    R: int
    S: int
    SH: int
    SW: int
    TOP: int
    LEFT: int
    DH: int
    DW: int
    MULT: int
    B: int
    TAPS: tuple | None


class Affine(NamedTuple):
    """The per-channel vectors of an epilogue, contiguous; None where absent."""

    bias: Any
    scale: Any
    shift: Any


class Chain(NamedTuple):
    """The scalars of an epilogue (constexpr): codes of its two activations and the slope of leaky_relu."""

    ACT: int
    POST: int
    SLOPE: float


# ---- arithmetic -----------------------------------------------------------------------------------------------------


@triton.constexpr_function
def accumulator(dtype):
    """The type of sums over elements of this type."""
    return tl.float64 if dtype == tl.float64 else tl.float32


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def activate(x, CODE: tl.constexpr, SLOPE: tl.constexpr):
    """The activation; NaN stays NaN, as in torch."""
    if CODE == _RELU:
        x = tl.where(x < 0, 0.0, x)
    elif CODE == _RELU6:
        x = tl.where(x < 0, 0.0, tl.where(x > 6, 6.0, x))
    elif CODE == _LEAKY_RELU:
        x = tl.where(x > 0, x, x * SLOPE)
    elif CODE == _SILU:
        x = x * _sigmoid(x)
    elif CODE == _HARDSWISH:
        x = x * tl.where(x < -3, 0.0, tl.where(x > 3, 6.0, x + 3)) / 6
    elif CODE == _HARDSIGMOID:
        x = tl.where(x < -3, 0.0, tl.where(x > 3, 6.0, x + 3)) / 6
    elif CODE == _SIGMOID:
        x = _sigmoid(x)
    elif CODE == _GELU:
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    return x


@triton.jit
def activation_slope(x, CODE: tl.constexpr, SLOPE: tl.constexpr):
    """The activation's derivative at x, with torch's choice at the kinks."""
    # Constants of x's own type: between two Python numbers tl.where would be float32, in float64 kernels too.
    zero = tl.full(x.shape, 0.0, x.dtype)
    one = tl.full(x.shape, 1.0, x.dtype)
    if CODE == _RELU:
        return tl.where(x > 0, one, zero)
    elif CODE == _RELU6:
        return tl.where((x > 0) & (x < 6), one, zero)
    elif CODE == _LEAKY_RELU:
        return tl.where(x > 0, one, one * SLOPE)
    elif CODE == _SILU:
        g = _sigmoid(x)
        return g * (1.0 + x * (1.0 - g))
    elif CODE == _HARDSWISH:
        return tl.where(x <= -3, zero, tl.where(x < 3, x / 3 + 0.5, one))
    elif CODE == _HARDSIGMOID:
        return tl.where((x > -3) & (x < 3), one / 6, zero)
    elif CODE == _SIGMOID:
        g = _sigmoid(x)
        return g * (1.0 - g)
    elif CODE == _GELU:
        return 0.5 * (1.0 + tl.erf(x * 0.7071067811865476)) + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    else:
        return one


@triton.jit
def slope_from_output(y, CODE: tl.constexpr, SLOPE: tl.constexpr):
    """The same derivative from the activation's own result, for the activations that allow it."""
    if CODE == _SIGMOID:
        return y * (1.0 - y)
    else:
        return activation_slope(y, CODE, SLOPE)


@triton.jit
def takes_second(first, second):
    """Whether torch's max pool takes the second of two values: it keeps the first of equal ones, and the last NaN."""
    return (second > first) | (second != second)


# ---- addresses and accesses -----------------------------------------------------------------------------------------


@triton.jit
def block_of(block, SIZE: tl.constexpr, WIDE: tl.constexpr):
    """Indices SIZE * block + [0, SIZE), 64-bit where offsets need it."""
    if WIDE:
        block = block.to(tl.int64)
    return block * SIZE + tl.arange(0, SIZE)


@triton.jit
def channels_of(block, COUNT, SIZE: tl.constexpr, WIDE: tl.constexpr, VEC: tl.constexpr):
    """Channels of a block of [0, COUNT), and which exist."""
    o = block_of(block, SIZE, WIDE)
    return o, o < COUNT // VEC * VEC  # a hint that COUNT is a multiple of VEC would be folded away


@triton.jit
def strip_pixels_of(m, sizes, STRIP: tl.constexpr):
    """Pixel numbers as (n, p, q) where images are numbered in column strips of this width, a divisor of Q.

    A block of consecutive pixels is then a near-square patch, whose window reaches fewer pixels beyond it than that of
    a few whole rows: a quarter of the traffic between L2 and L1 at 64 pixels of a 56-wide map.
    """
    column = m % STRIP
    rows = m // STRIP
    strips = rows // sizes.P
    count = sizes.Q // STRIP
    return strips // count, rows % sizes.P, (strips % count) * STRIP + column


@triton.jit
def tile_pointers(x, n, h, w, c, VEC: tl.constexpr):
    """Pointers [pixels, channels] to x[n, c, h, w], for pixel vectors n, h, w and a channel vector c."""
    pixels = n * x.n + h * x.h + w * x.w
    if VEC > 1:  # the hint stands on a computed value: on an argument it is lost when this function is inlined
        pixels = tl.multiple_of(pixels, VEC)
    return x.data + (pixels[:, None] + (c * x.c)[None, :])


@triton.jit
def load_tile(x, n, h, w, c, mask, VEC: tl.constexpr):
    """x[n, c, h, w] as [pixels, channels], 0 where masked."""
    return tl.load(tile_pointers(x, n, h, w, c, VEC), mask=mask, other=0.0)


@triton.jit
def store_tile(x, n, h, w, c, value, mask, VEC: tl.constexpr):
    """x[n, c, h, w] = value, rounded once to the map's dtype."""
    tl.store(tile_pointers(x, n, h, w, c, VEC), value.to(x.data.dtype.element_ty), mask=mask)


@triton.jit
def load_vector(data, c, live, ACC: tl.constexpr):
    """A per-channel vector's elements c."""
    return tl.load(data + c, mask=live, other=0.0).to(ACC)


# ---- epilogue -------------------------------------------------------------------------------------------------------


@triton.jit
def epilogue(u, affine, residual, c, live, CHAIN: tl.constexpr):
    """post(act(u + bias) * scale + shift + residual) of a tile [pixels, channels].

    `residual` is the loaded tile, or None; `live` masks the channels c.
    """
    if affine.bias is not None:
        u += load_vector(affine.bias, c, live, u.dtype)[None, :]
    u = activate(u, CHAIN.ACT, CHAIN.SLOPE)
    if affine.scale is not None:
        u *= load_vector(affine.scale, c, live, u.dtype)[None, :]
    if affine.shift is not None:
        u += load_vector(affine.shift, c, live, u.dtype)[None, :]
    if residual is not None:
        u += residual.to(u.dtype)
    return activate(u, CHAIN.POST, CHAIN.SLOPE)


@triton.jit
def epilogue_gradient(g, u, affine, residual, c, live, CHAIN: tl.constexpr):
    """Gradients of `epilogue` at u and at the residual, and the product that sums to the scale's, from its result's.

    Args:
        g: 0 outside the map and the channels.
        u: what the epilogue was given; None where it has no activation and the scale's gradient is not wanted.
        residual: the loaded tile, or None; read only for the derivative of the outer activation.

    Returns:
        (du, dresidual, product): summed over pixels they are the gradients of bias, shift and scale.
    """
    activated = None
    if u is not None:
        if affine.bias is not None:
            u += load_vector(affine.bias, c, live, u.dtype)[None, :]
        activated = activate(u, CHAIN.ACT, CHAIN.SLOPE)
    scale = None
    if affine.scale is not None:
        scale = load_vector(affine.scale, c, live, g.dtype)[None, :]
    if CHAIN.POST != _NONE:
        result = activated
        if scale is not None:
            result *= scale
        if affine.shift is not None:
            result += load_vector(affine.shift, c, live, u.dtype)[None, :]
        if residual is not None:
            result += residual.to(u.dtype)
        g *= activation_slope(result, CHAIN.POST, CHAIN.SLOPE)
    product = g
    if u is not None:
        product = g * activated
    du = g
    if scale is not None:
        du *= scale
    if CHAIN.ACT != _NONE:
        du *= activation_slope(u, CHAIN.ACT, CHAIN.SLOPE)
    return du, g, product


@triton.jit
def store_vector(partial, row, COUNT, c, live, value):
    """partial[row, c] = value, a vector; nothing where there is no `partial` [rows, COUNT]."""
    if partial is not None:
        tl.store(partial + (row.to(tl.int64) * COUNT + c), value, mask=live)


# ---- the depthwise tile ---------------------------------------------------------------------------------------------


@triton.jit
def tap_vector(weight, o, live, tap, WINDOW: tl.constexpr, ACC: tl.constexpr):
    """Tap number `tap` of the kernels of output channels o, from a contiguous bank [B,1,R,S]."""
    taps: tl.constexpr = WINDOW.R * WINDOW.S
    return tl.load(weight + (o % WINDOW.B) * taps + tap, mask=live, other=0.0).to(ACC)


@triton.jit
def packed_tap_vector(weight, o, live, tap, sizes, VEC: tl.constexpr, ACC: tl.constexpr):
    """The same from a bank packed by `triton_launch.bank_of`: channels lie side by side, as in the map."""
    row = tl.multiple_of(tap * sizes.D, VEC)
    return tl.load(weight + (row + o), mask=live, other=0.0).to(ACC)


@triton.jit
def fixed_tap_vector(o, TAP: tl.constexpr, WINDOW: tl.constexpr, ACC: tl.constexpr):
    """The same for fixed kernels: constants, no load."""
    bank: tl.constexpr = WINDOW.TAPS
    kernels: tl.constexpr = WINDOW.B
    k = o % kernels
    value = tl.full(o.shape, bank[0][TAP], ACC)
    for b in tl.static_range(1, kernels):
        value = tl.where(k == b, tl.full(o.shape, bank[b][TAP], ACC), value)
    return value


@triton.jit
def window_pixels(p, q, r, s, sizes, WINDOW: tl.constexpr):
    """Input row and column that tap (r, s) of output pixels (p, q) reads, and whether they are inside."""
    h = p * WINDOW.SH + r * WINDOW.DH - WINDOW.TOP
    w = q * WINDOW.SW + s * WINDOW.DW - WINDOW.LEFT
    return h, w, (h >= 0) & (h < sizes.H) & (w >= 0) & (w < sizes.W)


@triton.jit
def depthwise_tap(u, x, weight, n, p, q, inside, o, live, r, s, sizes, WINDOW: tl.constexpr, VEC: tl.constexpr):
    """u + weight[o, r, s] * x[n, o // MULT, window pixel]: one tap of the window."""
    h, w, in_map = window_pixels(p, q, r, s, sizes, WINDOW)
    mask = (inside & in_map)[:, None] & live[None, :]
    value = load_tile(x, n, h, w, o // WINDOW.MULT, mask, VEC)
    if WINDOW.TAPS is not None:
        tap = fixed_tap_vector(o, r * WINDOW.S + s, WINDOW, u.dtype)
    elif WINDOW.B == 0:
        tap = packed_tap_vector(weight, o, live, r * WINDOW.S + s, sizes, VEC, u.dtype)
    else:
        tap = tap_vector(weight, o, live, r * WINDOW.S + s, WINDOW, u.dtype)
    return u + value.to(u.dtype) * tap[None, :]


@triton.jit
def depthwise_tile(
    x, weight, n, p, q, inside, o, live, sizes,
    WINDOW: tl.constexpr, VEC: tl.constexpr, UNROLLED: tl.constexpr = _UNROLLED_TAPS,
):  # fmt: skip
    """u[pixel, o] = sum over taps of weight[o mod B, r, s] * x[n, o // MULT, p * SH + r * DH - TOP, ...].

    Args:
        x: the input `Map`. weight: the bank [B,1,R,S], contiguous.
        n, p, q, inside: output pixels of the tile, and which exist.
        o, live: output channels of the tile, and which exist.
        UNROLLED: how many taps may be in flight together. Where the window has more, they are a row's, or one: a tile
            that shares its registers with a dot's sums has none for nine taps' loads.
    """
    rows: tl.constexpr = WINDOW.R
    columns: tl.constexpr = WINDOW.S
    u = tl.zeros((n.shape[0], o.shape[0]), accumulator(x.data.dtype.element_ty))
    if WINDOW.TAPS is not None or rows * columns <= UNROLLED:  # fixed taps are constants, whose number must be one too
        for r in tl.static_range(rows):
            for s in tl.static_range(columns):
                u = depthwise_tap(u, x, weight, n, p, q, inside, o, live, r, s, sizes, WINDOW, VEC)
    elif columns <= UNROLLED:
        for r in range(rows):
            for s in tl.static_range(columns):
                u = depthwise_tap(u, x, weight, n, p, q, inside, o, live, r, s, sizes, WINDOW, VEC)
    else:
        for tap in range(rows * columns):
            u = depthwise_tap(u, x, weight, n, p, q, inside, o, live, tap // columns, tap % columns, sizes, WINDOW, VEC)
    return u


# ---- a window over cells --------------------------------------------------------------------------------------------
#
# A cell is ROWS x COLS neighbouring target pixels of one thread: what it loads from the source serves every pixel of
# the cell whose window covers it. Two problems have this form:
#   forward    target: the sums, source: the input. The cell's origin in the source is (p * SH - TOP, q * SW - LEFT).
#   BACKWARD   target: the gradient of the input, source: the gradient of the sums. ROWS and COLS are multiples of the
#              stride, so that which taps reach which pixel is known when compiling. The origin is (p / SH, q / SW).


@triton.constexpr_function
def _axis(window, along_rows):
    """(taps, stride, padding, dilation) of the window along one axis."""
    rows, columns, sh, sw, top, left, dh, dw = window[:8]  # a bare tuple by now, no Window
    return (rows, sh, top, dh) if along_rows else (columns, sw, left, dw)


@triton.constexpr_function
def _tap(i, offset, axis, backward):
    taps, stride, padding, dilation = axis
    distance = i + padding - offset * stride if backward else offset - i * stride
    return distance // dilation if distance % dilation == 0 and 0 <= distance < taps * dilation else -1


@triton.constexpr_function
def _offsets(count, axis, backward):
    taps, stride, padding, dilation = axis
    if backward:
        steps = [i + padding - tap * dilation for i in range(count) for tap in range(taps)]
        return sorted({step // stride for step in steps if step % stride == 0})
    return sorted({i * stride + tap * dilation for i in range(count) for tap in range(taps)})


@triton.constexpr_function
def tap_between(i, j, y, x, ROWS, COLS, WINDOW, BACKWARD):
    """Number r * S + s of the tap that joins pixel (i, j) of a cell and the cell's source pixel (y, x); -1: none."""
    rows, columns = _axis(WINDOW, True), _axis(WINDOW, False)
    r = _tap(i, _offsets(ROWS, rows, BACKWARD)[y], rows, BACKWARD)
    s = _tap(j, _offsets(COLS, columns, BACKWARD)[x], columns, BACKWARD)
    return -1 if r < 0 or s < 0 else r * columns[0] + s


@triton.constexpr_function
def offset_count(count, WINDOW, ALONG_ROWS, BACKWARD):
    """How many source rows (columns) a cell of `count` target rows (columns) reads."""
    return len(_offsets(count, _axis(WINDOW, ALONG_ROWS), BACKWARD))


@triton.constexpr_function
def offset_at(index, count, WINDOW, ALONG_ROWS, BACKWARD):
    """The offset from the origin of the index-th of those."""
    return _offsets(count, _axis(WINDOW, ALONG_ROWS), BACKWARD)[index]


@triton.jit
def cells_of(m, sizes, ROWS: tl.constexpr, COLS: tl.constexpr):
    """First pixel (n, p, q) of the cells numbered m, row by row through the batch."""
    columns = tl.cdiv(sizes.Q, COLS)
    rows = tl.cdiv(sizes.P, ROWS)
    lines = m // columns
    return lines // rows, lines % rows * ROWS, m % columns * COLS


@triton.jit
def own_cells(
    sizes, cells, ROWS: tl.constexpr, COLS: tl.constexpr,
    WIDE: tl.constexpr, VEC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """First pixels (n, p, q) of this program's cells, which cells exist, its channels, which exist."""
    channel_blocks = tl.cdiv(sizes.D, BLOCK_C)
    m = block_of(tl.program_id(0) // channel_blocks, BLOCK_M, WIDE)
    n, p, q = cells_of(m, sizes, ROWS, COLS)
    o, live = channels_of(tl.program_id(0) % channel_blocks, sizes.D, BLOCK_C, WIDE, VEC)
    return n, p, q, m < cells, o, live


@triton.jit
def put(values, INDEX: tl.constexpr, value):
    """The tuple with one element replaced."""
    return values[:INDEX] + (value,) + values[INDEX + 1 :]


@triton.jit
def zero_tiles(COUNT: tl.constexpr, M: tl.constexpr, C: tl.constexpr, ACC: tl.constexpr):
    """A tuple of COUNT zero tiles [M, C]."""
    tiles = ()
    for _ in tl.static_range(COUNT):
        tiles = tiles + (tl.zeros((M, C), ACC),)
    return tiles


@triton.jit
def add_tap(
    u, INDEX: tl.constexpr, value, weight, o, live, TAP: tl.constexpr, sizes, WINDOW: tl.constexpr, VEC: tl.constexpr
):  # fmt: skip
    """u with value * tap TAP added to the tile INDEX; unchanged where TAP is -1."""
    if TAP >= 0:
        if WINDOW.TAPS is not None:
            tap = fixed_tap_vector(o, TAP, WINDOW, value.dtype)
        elif WINDOW.B == 0:
            tap = packed_tap_vector(weight, o, live, TAP, sizes, VEC, value.dtype)
        else:
            tap = tap_vector(weight, o, live, TAP, WINDOW, value.dtype)
        u = put(u, INDEX, u[INDEX] + value * tap[None, :])
    return u


@triton.jit
def add_window(
    u, source, weight, n, h, w, inside, c, o, live, sizes,
    WINDOW: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, BACKWARD: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """u plus the window's sums over the source, unrolled; each source tile is loaded once for the whole cell.

    Args:
        u: tuple of ROWS * COLS tiles [cells, channels], row by row.
        n, h, w, inside: image and origin of each cell in the source, and which cells exist.
        c, o, live: source channels, the output channels whose kernels are taken, and which exist.
        sizes: H and W are the source's.
    """
    for dx in tl.static_range(offset_count(COLS, WINDOW, False, BACKWARD)):
        x = w + offset_at(dx, COLS, WINDOW, False, BACKWARD)
        in_columns = inside & (x >= 0) & (x < sizes.W)
        for dy in tl.static_range(offset_count(ROWS, WINDOW, True, BACKWARD)):
            y = h + offset_at(dy, ROWS, WINDOW, True, BACKWARD)
            mask = (in_columns & (y >= 0) & (y < sizes.H))[:, None] & live[None, :]
            value = load_tile(source, n, y, x, c, mask, VEC).to(u[0].dtype)
            for i in tl.static_range(ROWS):
                for j in tl.static_range(COLS):
                    # Several rows take the same tap: the compiler loads it once.
                    u = add_tap(
                        u, i * COLS + j, value, weight, o, live,
                        tap_between(i, j, dy, dx, ROWS, COLS, WINDOW, BACKWARD), sizes, WINDOW, VEC,
                    )  # fmt: skip
    return u
