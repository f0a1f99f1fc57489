"""The traffic of the Triton kernels of the rooms se, blurmaxpool and sepconv: see test_triton_traffic.py."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from itertools import product

import pytest
import torch
from helpers import generator, lay_out
from test_blurmaxpool import PoolCase
from test_sepconv import SepCase, make_tensors, raw_arguments
from test_triton_traffic import Index, each_stored_once, of_kernel
from triton_traffic import Program, recorded

from effops.ops.registration import INTERPRETING

pytestmark = pytest.mark.skipif(not INTERPRETING, reason="counts what the interpreter does")

LAYOUTS = ("contiguous", "channels_last")


@pytest.fixture(autouse=True)
def _needs_triton(triton: str) -> None:
    """Skips where there is none."""


def image(shape: Index, layout: str) -> torch.Tensor:
    return lay_out(torch.randn(shape, generator=generator("traffic")), layout, torch.float32)


def several(programs: list[Program], kernel: str) -> list[Program]:
    """Those of the kernel, which must be more than one: what one program alone reads says little."""
    found = of_kernel(programs, kernel)
    assert len(found) > 1
    return found


def each_loaded_by_one(programs: list[Program], x: torch.Tensor) -> None:
    owners = Counter(index for program in programs for index in program.loaded(x))
    assert len(owners) == x.numel() and set(owners.values()) == {1}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_squeeze_excite(layout: str) -> None:
    """A sum's program is the only reader of its pixels; what is scaled is read where it is written."""
    from effops.ops.se.triton import se_bwd, se_fwd

    x, grad = image((2, 20, 13, 17), layout), image((2, 20, 13, 17), layout)
    weights = (torch.randn(5, 20, 1, 1), torch.randn(5), torch.randn(20, 5, 1, 1), torch.randn(20))
    geometry = [int(layout == "channels_last"), 1, 7]
    with recorded() as programs:
        y = se_fwd(x, *weights, None, geometry)
    with recorded() as backward:
        dx = se_bwd(grad, x, *weights, geometry, 0b11111)[0]
    for found, maps, source, result in ((programs, (x,), x, y), (backward, (x, grad), grad, dx)):
        for each in maps:
            each_loaded_by_one(several(found, "_sums_kernel"), each)
        scales = several(found, "_scale_kernel")
        each_stored_once(scales, result)
        assert all(program.loaded(source) == set(program.stored(result)) for program in scales)


# ---- blurmaxpool ----------------------------------------------------------------------------------------------------

POOLS = (
    PoolCase(id="mosaicml", c=8, h=20, w=19),
    PoolCase(id="zhang", c=8, h=20, w=19, size=4, mode="reflect"),
    PoolCase(id="3x3-stride1", c=8, h=9, w=8, kernel=(3, 3), padding=(1, 1), stride=(1, 1)),
    PoolCase(id="1x3-stride3", c=3, h=24, w=29, kernel=(1, 3), padding=(0, 1), stride=(3, 3), size=5, mode="reflect"),
    PoolCase(id="a_loop", c=2, h=8, w=9, kernel=(1, 3), padding=(0, 1), stride=(1, 1), size=7),
)


def pooled_pixels(p: int, stride: int, size: int, reflect: bool, count: int) -> set[int]:
    """Rows (columns) of the pooled map that the blur of output p reads."""
    found = set()
    for position in range(p * stride - (size - 1) // 2, p * stride + size // 2 + 1):
        if reflect:
            position = count - 1 - abs(count - 1 - abs(position))
        if 0 <= position < count:
            found.add(position)
    return found


def window_pixels(pooled: int, window: int, padding: int, count: int) -> set[int]:
    return set(range(max(0, pooled - padding), min(count, pooled - padding + window)))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", POOLS, ids=lambda case: case.id)
def test_blur_max_pool(case: PoolCase, layout: str) -> None:
    """An output's program reads its patch of the input; a pixel's the windows it is in, and what their blurs go to."""
    from effops.ops.blurmaxpool.triton import blur_max_pool_bwd, blur_max_pool_fwd

    x = image((case.n, case.c, case.h, case.w), layout)
    reflect = case.mode == "reflect"
    geometry = [*case.stride, case.size, *case.kernel, *case.padding, int(reflect), int(layout == "channels_last")]
    with recorded() as programs:
        y = blur_max_pool_fwd(x, geometry)
    of_axis = []  # of each axis: the pooled pixels of every output, the input's pixels of every pooled one
    for axis in (0, 1):
        size, outputs = x.shape[2 + axis], y.shape[2 + axis]
        window, padding, stride = case.kernel[axis], case.padding[axis], case.stride[axis]
        pooled = size + 2 * padding - window + 1
        blurs = [pooled_pixels(p, stride, case.size, reflect, pooled) for p in range(outputs)]
        of_axis.append((blurs, [window_pixels(i, window, padding, size) for i in range(pooled)]))

    def under(p: int, axis: int) -> set[int]:
        blurs, windows = of_axis[axis]
        return set().union(*(windows[i] for i in blurs[p]))

    programs = several(programs, "_forward_kernel")
    each_stored_once(programs, y)
    for program in programs:
        assert program.loaded(x) == {
            (n, c, h, w) for n, c, p, q in program.stored(y) for h in under(p, 0) for w in under(q, 1)
        }

    grad = image(tuple(y.shape), layout)
    with recorded() as programs:
        dx = blur_max_pool_bwd(grad, x, geometry)

    def around(h: int, axis: int) -> tuple[set[int], set[int]]:
        """The pixels in windows with h, the outputs that these windows' maxima reach."""
        blurs, windows = of_axis[axis]
        mine = {i for i, window in enumerate(windows) if h in window}
        return set().union(*(windows[i] for i in mine)), {p for p, blur in enumerate(blurs) if blur & mine}

    programs = several(programs, "_backward_kernel")
    each_stored_once(programs, dx)
    for program in programs:
        pixels: set[Index] = set()
        outputs: set[Index] = set()
        for n, c, h, w in program.stored(dx):
            (rows, ps), (columns, qs) = around(h, 0), around(w, 1)
            pixels.update((n, c, i, j) for i, j in product(rows, columns))
            outputs.update((n, c, p, q) for p, q in product(ps, qs))
        assert program.loaded(x) == pixels
        assert program.loaded(grad) == outputs


# ---- sepconv --------------------------------------------------------------------------------------------------------

# Of an even number of rows: a cell's rows are two, and it reads what the second would need, be it there or not.
SEPARABLE = (
    SepCase(id="row", c=8, h=20, w=27),
    SepCase(id="both", c=8, h=20, w=27, pool="both"),
    SepCase(id="both-stride2-multiplier2", c=3, h=49, w=51, multiplier=2, pool="both", stride=(2, 2)),
    SepCase(id="none-dilated", c=8, h=10, w=13, pool="none", dilation=(2, 1), padding=(1, 1, 2, 2)),
    SepCase(id="both-a_loop", n=3, c=4, h=14, w=16, pool="both", kernel=(9, 9), padding=(4, 4, 4, 4)),
)


def taps(p: int, results: int, stride: int, dilation: int, kernel: int, padding: int) -> Iterable[int]:
    """Rows (columns) that the results p * results + [0, results) of a convolution read, the padding's too."""
    for result, tap in product(range(results), range(kernel)):
        yield (p * results + result) * stride + tap * dilation - padding


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", SEPARABLE, ids=lambda case: case.id)
def test_separable(case: SepCase, layout: str) -> None:
    """A program reads what is under the windows of its pixels."""
    from effops.ops.sepconv.triton import sepconv_fwd

    tensors = make_tensors(case, torch.float32)
    tensors["input"] = x = image((case.n, case.c, case.h, case.w), layout)
    arguments = raw_arguments(case, tensors)
    pool_w, pool_h = 1 + (case.pool != "none"), 1 + (case.pool == "both")
    left, _, top, _ = case.padding

    def rows(p: int) -> Iterable[int]:
        return taps(p, pool_h, case.stride[0], case.dilation[0], case.kernel[0], top)

    def columns(q: int) -> Iterable[int]:
        return taps(q, pool_w, case.stride[1], case.dilation[1], case.kernel[1], left)

    with recorded() as programs:
        y = sepconv_fwd(**arguments)
    programs = several(programs, "_forward_kernel")
    each_stored_once(programs, y)
    for program in programs:
        assert program.loaded(x) == {
            (n, o // case.multiplier, h, w)
            for n, o, p, q in program.stored(y) for h, w in product(rows(p), columns(q))
            if 0 <= h < case.h and 0 <= w < case.w
        }  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", [case for case in SEPARABLE if case.pool != "none"], ids=lambda case: case.id)
def test_pairs(case: SepCase, layout: str) -> None:
    """A pair's program reads what is under its two windows; a gradient goes to the pair by its owner alone."""
    from effops.ops.sepconv.triton import convolutions, row_result, through_pool

    tensors = make_tensors(case, torch.float32)
    x = image((case.n, case.c, case.h, case.w), layout)
    arguments = raw_arguments(case, tensors | {"input": x})
    vectors = (None, None, None)
    row, _ = convolutions(
        tensors["row_weight"], vectors, tensors["col_weight"], vectors, arguments["geometry"], arguments["slopes"]
    )
    with recorded() as programs:
        z = row_result(x, row)
    left = case.padding[0]

    def under(pairs: Iterable[Index]) -> set[Index]:
        return {
            (n, o // case.multiplier, h, w)
            for n, o, h, q in pairs for w in taps(q, 2, case.stride[1], case.dilation[1], case.kernel[1], left)
            if 0 <= w < case.w
        }  # fmt: skip

    programs = several(programs, "_pairs_kernel")
    each_stored_once(programs, z)
    for program in programs:
        assert program.loaded(x) == under(program.stored(z))
    grad = image(tuple(z.shape), layout)
    with recorded() as programs:
        routed = through_pool(grad, x, row, 1)
    programs = several(programs, "_pairs_gradient_kernel")
    each_stored_once(programs, routed)
    each_loaded_by_one(programs, grad)
