"""Room bsconv's problems for the ahead-of-time check of its Triton kernels."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from cases import BsCase, Epi
from helpers import geometry_of, make_tensors
from triton_rooms import DTYPES_AND_LAYOUTS, RoomProblem

from effops.ops import geometry as G
from effops.ops.epilogue import output_gives_gradient

_ALL = {"bias": True, "scale": True, "shift": True}
_NORM = Epi(scale=True, shift=True)
_RELU = Epi(bias=True, activation="relu")  # read off the saved output
_HEAVIEST = {
    "mid": _NORM,
    "pw": Epi(**_ALL, activation="gelu", post_activation="silu"),
    "epi": Epi(**_ALL, residual=True, activation="gelu", post_activation="silu"),
}


def same(kernel: int, **others: Any) -> dict[str, Any]:
    """A square window with the padding that keeps the size at stride 1."""
    return {"kernel": (kernel, kernel), "padding": (kernel // 2,) * 4, **others}


CASES = [
    BsCase(id="k3-c128-k128-56x56-every_part", n=32, c=128, k=128, m=32, h=56, w=56, **_HEAVIEST),
    BsCase(id="k5-c64-k240-14x14-every_part", n=32, c=64, k=240, m=24, h=14, w=14, **_HEAVIEST, **same(5)),
    BsCase(id="k3-c32-k64-112x112", n=32, c=32, k=64, h=112, w=112, epi=_RELU),
    BsCase(id="k3s2-c256-k512-14x14", n=32, c=256, k=512, h=14, w=14, stride=(2, 2), pw=_NORM, epi=_RELU),
    BsCase(id="k7-c96-k96-28x28-a_loop", n=32, c=96, k=96, h=28, w=28, pw=_NORM, epi=_RELU, **same(7)),
    BsCase(id="k3-c320-k320-7x7-one_image", n=1, c=320, k=320, m=80, h=7, w=7, mid=_NORM, epi=_RELU),
    BsCase(id="k3-c64-k64-28x28-one_image", n=1, c=64, k=64, h=28, w=28, epi=_RELU),
    BsCase(id="k3-c64-k64-14x14-few_patches", n=32, c=64, k=64, h=14, w=14, epi=_RELU),
    BsCase(id="k3-c17-k13-19x23-one_by_one", n=2, c=17, k=13, m=5, h=19, w=23, **_HEAVIEST),
    BsCase(id="k3-c1-k1-4x4-tiny", n=1, c=1, k=1, h=4, w=4),
    BsCase(id="k3-c64-k64-1024x1024-64_bit", n=64, c=64, k=64, m=16, h=1024, w=1024, **_HEAVIEST),
]
# The backward is kernels of other rooms, compiled for their own problems too: here those forms that only this room has.
BACKWARD = [case for case in CASES if case.id.endswith(("56x56-every_part", "one_by_one", "64_bit"))]


def forward_arguments(case: BsCase, dtype: torch.dtype) -> tuple[Any, ...]:
    """Those of bsconv_fwd."""
    tensors = make_tensors(case, dtype)
    return (*tensors.values(), geometry_of(case, tensors["input"]), [case.pw.slope, case.epi.slope])


def backward_arguments(case: BsCase, dtype: torch.dtype) -> tuple[Any, ...]:
    """Those of bsconv_bwd, every gradient asked for, and the output where autograd saves it."""
    *tensors, geometry, slopes = forward_arguments(case, dtype)
    output = torch.ops.effops.bsconv_fwd(*tensors, geometry, slopes)  # its fake: a shape alone
    codes = geometry[G.ACTIVATION : G.POST_ACTIVATION + 1]
    saves = output_gives_gradient(codes[0], case.epi.slope, codes[1], *tensors[10:])
    mask = sum(1 << bit for bit, tensor in enumerate(tensors) if tensor is not None)
    return output, output if saves else None, *tensors, geometry, slopes, mask


def problems() -> Iterator[RoomProblem]:
    """Every case in every dtype and layout forward, and some backward."""
    for case in CASES:
        operators = [("bsconv_fwd", forward_arguments)]
        if case in BACKWARD:
            operators.append(("bsconv_bwd", backward_arguments))
        for dtype, layout in DTYPES_AND_LAYOUTS:
            laid_out = replace(case, layout=layout, residual_layout=layout)
            for op, arguments in operators:
                for tf32 in (False, True)[: 2 if dtype == torch.float32 else 1]:
                    made = partial(arguments, laid_out, dtype)
                    yield RoomProblem(op, "effops.ops.bsconv.triton", case.id, dtype, layout, made, tf32)
