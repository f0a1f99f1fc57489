"""Calls of the Triton operators that between them reach every kernel and every config, for the ahead-of-time check.

A problem is an operator on one case, dtype and layout; its tensors are meta tensors, so a large batch costs nothing.
Cases come in order of what they ask of a register file, the heaviest first: where only some launches are compiled, the
first one of each kernel and config is taken.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import torch
from cases import FULL, DsCase, DwCase, Epi
from helpers import Tensors, geometry_of, make_tensors
from torch import Tensor
from triton_rooms import DTYPES_AND_LAYOUTS, RoomProblem, room_problems

from effops.ops import geometry as G
from effops.ops.dwconv import banks
from effops.ops.epilogue import output_gives_gradient

HEAVIEST = replace(FULL, activation="gelu", post_activation="silu")
SAVED = Epi(bias=True, activation="relu6")  # its derivative is read off the saved output
LINEAR = Epi(bias=True)
VGNET = Epi(activation="silu", scale=True, shift=True)


@dataclass(frozen=True)
class Problem:
    """An operator (a host function of effops/ops/<room>/triton.py) on one case.

    Attributes:
        bank: name of the fixed bank whose values the weight is said to hold, or None.
        tf32: whether torch allows TF32 in float32 convolutions.
    """

    op: str
    case: DwCase | DsCase
    dtype: torch.dtype
    bank: str | None = None
    tf32: bool = False

    @property
    def name(self) -> str:
        parts = (self.op, self.case.id, self.bank, "tf32" if self.tf32 else None)
        return " ".join(part for part in parts if part)

    @property
    def layout(self) -> str:
        return self.case.layout


def room(op: str) -> ModuleType:
    """The module whose host function the operator is."""
    return importlib.import_module(f"effops.ops.{op.split('_')[0]}.triton")


# ---- calls ----------------------------------------------------------------------------------------------------------


def forward_of(op: str) -> str:
    """The forward operator of a *_bwd operator; any other operator itself."""
    return {"dwconv_bwd": "dwconv_fwd", "dwconv_stats_bwd": "dwconv_stats", "dsconv_bwd": "dsconv_fwd"}.get(op, op)


def own_tensors(op: str, tensors: Tensors) -> Tensors:
    """Those of the case's tensors that the operator takes."""
    names = ("input", "weight", "bias") if "stats" in op else tensors
    return {name: tensors[name] for name in names}


def slopes_of(case: DwCase | DsCase) -> Any:
    return case.epi.slope if isinstance(case, DwCase) else [case.dw.slope, case.pw.slope]


def forward_arguments(op: str, case: DwCase | DsCase, tensors: Tensors, geometry: list[int]) -> tuple[Any, ...]:
    """A forward operator's arguments, in the order of effops/schemas.inc."""
    own = tuple(own_tensors(op, tensors).values())
    return (*own, geometry) if "stats" in op else (*own, geometry, slopes_of(case))


def backward_arguments(
    op: str, case: DwCase | DsCase, tensors: Tensors, geometry: list[int], results: Any, gradients: tuple[Tensor, ...]
) -> tuple[Any, ...]:
    """A *_bwd operator's arguments, every gradient asked for.

    Args:
        results: what the forward operator returned.
        gradients: of its results.
    """
    own = own_tensors(op, tensors)
    mask = sum(1 << bit for bit, tensor in enumerate(own.values()) if tensor is not None)
    if "stats" in op:
        return (*gradients, results[0], *own.values(), geometry, mask)
    output = saved_output(case, tensors, geometry, results)
    return (*gradients, output, *own.values(), geometry, slopes_of(case), mask)


def saved_output(case: DwCase | DsCase, tensors: Tensors, geometry: list[int], output: Tensor) -> Tensor | None:
    """The output where autograd saves it: where the last activation's derivative can be read off it."""
    place, epi = (G.ACTIVATION, case.epi) if isinstance(case, DwCase) else (G.PW_ACTIVATION, case.pw)
    activation, post_activation = geometry[place : place + 2]
    others = (tensors["scale"], tensors["shift"], tensors["residual"])
    return output if output_gives_gradient(activation, epi.slope, post_activation, *others) else None


def launch(problem: Problem | RoomProblem) -> None:
    """Calls the operator on meta tensors: its launches are recorded (effops.ops.triton_launch), nothing runs."""
    if isinstance(problem, RoomProblem):
        return problem.launch()
    op, case = problem.op, problem.case
    torch.backends.cudnn.conv.fp32_precision = "tf32" if problem.tf32 else "ieee"
    with torch.device("meta"):
        tensors = make_tensors(case, problem.dtype)
    geometry = geometry_of(case, tensors["input"])
    if problem.bank:
        geometry[G.BANK] = banks.CODES[problem.bank]
    called_with = forward_arguments(op, case, tensors, geometry)
    if op != forward_of(op):
        results = getattr(torch.ops.effops, forward_of(op))(*called_with)  # its fake: shapes alone
        gradients = results if isinstance(results, tuple) else (results,)
        called_with = backward_arguments(op, case, tensors, geometry, results, gradients)
    getattr(room(op), op)(*called_with)


# ---- the list -------------------------------------------------------------------------------------------------------


def same(kernel: int, **others: Any) -> dict[str, Any]:
    """A square kernel with the padding that keeps the size at stride 1."""
    pad = kernel // 2 * others.get("dilation", (1, 1))[0]
    return {"kernel": (kernel, kernel), "padding": (pad,) * 4, **others}


DW_CASES: list[tuple[DwCase, str | None]] = [
    (DwCase(id="k5-c240-14x14-every_part", n=128, c=240, h=14, w=14, epi=HEAVIEST, **same(5)), None),
    (DwCase(id="k3-c128-56x56-every_part", n=32, c=128, h=56, w=56, epi=HEAVIEST), None),
    (DwCase(id="k7-c96-56x56-a_loop", n=32, c=96, h=56, w=56, epi=HEAVIEST, **same(7)), None),
    (DwCase(id="k3-c256-14x14-multiplier2", n=8, c=128, h=14, w=14, multiplier=2, epi=HEAVIEST), None),
    (DwCase(id="k3s2-c144-112x112-mobile", n=32, c=144, h=112, w=112, stride=(2, 2), epi=SAVED), None),
    (DwCase(id="k3-c28-56x56-8_bytes", n=32, c=28, h=56, w=56, epi=VGNET), None),
    (DwCase(id="k3-c17-19x23-one_by_one", n=2, c=17, h=19, w=23, epi=SAVED), None),
    (DwCase(id="k3-c368-7x7-one_image", n=1, c=368, h=7, w=7, epi=LINEAR), None),
    (DwCase(id="k3-c56-28x28-shared7", n=32, c=56, h=28, w=28, bank=7, epi=VGNET), None),
    (DwCase(id="k3-c56-28x28-fixed", n=32, c=56, h=28, w=28, bank=8, epi=VGNET), "vgnet8"),
    (DwCase(id="k5s2-c64-28x28-fixed", n=32, c=64, h=28, w=28, bank=1, **same(5, stride=(2, 2))), "binomial5"),
    (DwCase(id="k3d2-c64-28x28-dilated", n=32, c=64, h=28, w=28, epi=SAVED, **same(3, dilation=(2, 2))), None),
    (DwCase(id="k1x3-c24-14x14", n=8, c=24, h=14, w=14, kernel=(1, 3), padding=(1, 1, 0, 0)), None),
    (DwCase(id="k3-c1-4x4-tiny", n=1, c=1, h=4, w=4, epi=SAVED), None),
    (DwCase(id="k3-c64-1024x1024-64_bit", n=64, c=64, h=1024, w=1024, epi=HEAVIEST), None),
]

STATS_CASES: list[tuple[DwCase, str | None]] = [
    (DwCase(id="k5-c240-14x14-bias", n=32, c=240, h=14, w=14, epi=LINEAR, **same(5)), None),
    (DwCase(id="k3-c128-56x56-bias", n=32, c=128, h=56, w=56, epi=LINEAR), None),
    (DwCase(id="k3s2-c28-57x57", n=32, c=28, h=57, w=57, stride=(2, 2)), None),
    (DwCase(id="k3-c17-19x23-one_by_one", n=2, c=17, h=19, w=23, epi=LINEAR), None),
    (DwCase(id="k3-c368-7x7-one_image", n=1, c=368, h=7, w=7), None),
    (DwCase(id="k3-c56-28x28-fixed", n=32, c=56, h=28, w=28, bank=8), "vgnet8"),
    (DwCase(id="k3-c1-4x4-tiny", n=1, c=1, h=4, w=4, epi=LINEAR), None),
    (DwCase(id="k3-c64-1024x1024-64_bit", n=64, c=64, h=1024, w=1024, epi=LINEAR), None),
]

DS_CASES: list[tuple[DsCase, str | None]] = [
    (DsCase(id="k5-c240-k320-14x14-every_part", n=32, c=240, k=320, h=14, w=14, passthrough=80, keep=96, dw=HEAVIEST,
            pw=HEAVIEST, **same(5)), None),
    (DsCase(id="k3-c128-k128-56x56-every_part", n=32, c=128, k=128, h=56, w=56, dw=HEAVIEST, pw=HEAVIEST), None),
    (DsCase(id="k7-c96-k64-28x28-a_loop", n=32, c=96, k=64, h=28, w=28, dw=SAVED, pw=HEAVIEST, **same(7)), None),
    (DsCase(id="k3-c64-k96-14x14-multiplier2", n=8, c=64, k=96, h=14, w=14, multiplier=2, dw=SAVED, pw=LINEAR), None),
    (DsCase(id="k3-c32-k64-112x112-mobile", n=32, c=32, k=64, h=112, w=112, dw=SAVED, pw=SAVED), None),
    (DsCase(id="k3s2-c512-k1024-14x14-mobile", n=32, c=512, k=1024, h=14, w=14, stride=(2, 2), dw=SAVED, pw=SAVED),
     None),
    (DsCase(id="k3-c28-k28-56x56-half_identity", n=32, c=28, k=28, h=56, w=56, passthrough=28, pw=VGNET), None),
    (DsCase(id="k3-c368-k376-7x7-one_image", n=1, c=368, k=376, h=7, w=7, dw=SAVED, pw=LINEAR), None),
    (DsCase(id="k3s2-c28-k28-56x56-downsampling", n=32, c=28, k=28, h=56, w=56, stride=(2, 2), keep=28, bank=1,
            pw=VGNET), "vgnet_blur"),
    (DsCase(id="k3-c56-k56-28x28-fixed", n=32, c=56, k=56, h=28, w=28, bank=8, passthrough=56, pw=VGNET), "vgnet8"),
    (DsCase(id="k3-c96-k24-56x56-narrow", n=32, c=96, k=24, h=56, w=56, dw=SAVED, pw=LINEAR), None),
    (DsCase(id="k3-c17-k13-19x23-one_by_one", n=2, c=17, k=13, h=19, w=23, dw=SAVED, pw=SAVED), None),
    (DsCase(id="k3-c1-k1-4x4-tiny", n=1, c=1, k=1, h=4, w=4), None),
    *((DsCase(id=f"k3-c64-k{k}-{size}x{size}-few_programs", n=1, c=64, k=k, h=size, w=size, passthrough=64,
              pw=SAVED), None)
      for k in (256, 128, 64, 32) for size in (70, 50)),
    (DsCase(id="k3-c64-k64-1024x1024-64_bit", n=64, c=64, k=64, h=1024, w=1024, dw=HEAVIEST, pw=HEAVIEST), None),
]  # fmt: skip


def _problems() -> Iterator[Problem]:
    lists = (
        (("dwconv_fwd", "dwconv_bwd"), DW_CASES),
        (("dwconv_stats", "dwconv_stats_bwd"), STATS_CASES),
        (("dsconv_fwd", "dsconv_pool_fwd", "dsconv_bwd"), DS_CASES),
    )
    for ops, cases in lists:
        for case, bank in cases:
            for dtype, layout in DTYPES_AND_LAYOUTS:
                laid_out = _laid_out(case, layout)
                for op in ops:
                    yield Problem(op, laid_out, dtype, bank)
                    if op.startswith("dsconv") and dtype == torch.float32:
                        yield Problem(op, laid_out, dtype, bank, tf32=True)


def _laid_out(case: DwCase | DsCase, layout: str) -> DwCase | DsCase:
    layouts = {"layout": layout, "residual_layout": layout}
    if isinstance(case, DsCase):
        layouts["passthrough_layout"] = layout
    return replace(case, **layouts)


PROBLEMS = (*_problems(), *room_problems())
