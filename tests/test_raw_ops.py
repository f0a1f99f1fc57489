"""torch.ops.effops.* called directly: right calls by the budget, and bad ones raise RuntimeError, never crash.

The public functions check their arguments; the raw operators are callable from TorchScript, AOTInductor and C++ too, so
they check again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from cases import DS_CASES, DW_CASES, DsCase, DwCase, Epi, ids
from helpers import (
    DS_NAMES,
    DW_NAMES,
    assert_within_budget,
    draw,
    generator,
    geometry_of,
    gradients,
    lay_out,
    make_grad_output,
    make_tensors,
    oracle,
    oracle_stats,
    present,
    to_float64,
)
from torch import Tensor

pytestmark = pytest.mark.usefixtures("cpp")
ops = torch.ops.effops

_ALL = {"bias": True, "scale": True, "shift": True, "residual": True}
DW = DwCase(id="raw-dw", c=6, h=7, w=8, epi=Epi(**_ALL, activation="silu", post_activation="relu"))
DS = DsCase(
    id="raw-ds", c=6, k=9, h=7, w=8, passthrough=3, keep=4, dw=Epi(**_ALL, activation="relu"),
    pw=Epi(**_ALL, activation="silu", post_activation="relu6"),
)  # fmt: skip


def statics_of(case: DwCase | DsCase, x: Tensor) -> dict:
    if isinstance(case, DsCase):
        return {"geometry": geometry_of(case, x), "slopes": [case.dw.slope, case.pw.slope]}
    return {"geometry": geometry_of(case, x), "slope": case.epi.slope}


def forward(case: DwCase | DsCase, tensors: dict, **changes) -> Tensor:
    operator = ops.dsconv_fwd if isinstance(case, DsCase) else ops.dwconv_fwd
    return operator(**{**tensors, **statics_of(case, tensors["input"]), **changes})


def backward(case: DwCase | DsCase, tensors: dict, grad_output: Tensor, mask: int, **changes) -> list[Tensor]:
    operator = ops.dsconv_bwd if isinstance(case, DsCase) else ops.dwconv_bwd
    arguments = {"grad_output": grad_output, "output": None, **tensors, **statics_of(case, tensors["input"])}
    return operator(**{**arguments, "mask": mask, **changes})


def names_of(case: DwCase | DsCase) -> tuple[str, ...]:
    return DS_NAMES if isinstance(case, DsCase) else DW_NAMES


def truth_of(case: DwCase | DsCase, tensors: dict) -> tuple[Tensor, dict, dict]:
    grad_output = make_grad_output(case, oracle(to_float64(tensors), case).shape)
    _, truth = gradients(lambda t: oracle(t, case), to_float64(tensors), grad_output)
    _, yardstick = gradients(lambda t: oracle(t, case), tensors, grad_output)
    return grad_output.to(tensors["input"].dtype), truth, yardstick


def full_mask(case: DwCase | DsCase, tensors: dict) -> int:
    return sum(1 << bit for bit, name in enumerate(names_of(case)) if tensors[name] is not None)


# ---------------------------------------------------------------------------------------------------------------------
# Right calls
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ("contiguous", "channels_last"))
@pytest.mark.parametrize("case", (DW, DS), ids=ids([DW, DS]))
def test_every_mask(case: DwCase | DsCase, layout: str) -> None:
    """Gradients come in schema order, only those asked for, each right whatever else is asked for."""
    case = replace(case, layout=layout)
    tensors = make_tensors(case, torch.float32, kink_free=True)
    grad_output, truth, yardstick = truth_of(case, tensors)
    names = names_of(case)
    masks = range(1 << len(names)) if isinstance(case, DwCase) else [0, *(1 << bit for bit in range(12)), 4095]
    if isinstance(case, DsCase):
        gen = generator("masks")
        masks = [*masks, *torch.randint(1, 4096, (50,), generator=gen).tolist()]
    for mask in masks:
        wanted = [name for bit, name in enumerate(names) if mask >> bit & 1]
        found = backward(case, tensors, grad_output, mask)
        assert len(found) == len(wanted)
        for name, grad in zip(wanted, found, strict=True):
            assert grad.dtype == tensors[name].dtype
            assert_within_budget(grad, truth[name], yardstick[name], f"mask {mask:#x} gradient of {name}")
            if grad.dim() == 4 and name not in ("weight", "dw_weight", "pw_weight"):
                expected = torch.channels_last if layout == "channels_last" else torch.contiguous_format
                assert grad.stride() == torch.empty(grad.shape, memory_format=expected).stride(), name


@pytest.mark.parametrize("channels_last", (0, 1))
@pytest.mark.parametrize("layout", ("contiguous", "channels_last", "transposed"))
@pytest.mark.parametrize("case", (DW, DS), ids=ids([DW, DS]))
def test_memory_format_is_an_argument(case: DwCase | DsCase, layout: str, channels_last: int) -> None:
    """The flag decides, also against the input's own strides, for the output and every image-shaped gradient."""
    case = replace(case, layout=layout)
    tensors = make_tensors(case, torch.float32, kink_free=True)
    statics = statics_of(case, tensors["input"])
    statics["geometry"][9] = channels_last
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    out = forward(case, tensors, **statics)
    assert out.stride() == torch.empty(out.shape, memory_format=memory_format).stride()
    assert_within_budget(out, oracle(to_float64(tensors), case), oracle(tensors, case), "output")
    grad_output, truth, yardstick = truth_of(case, tensors)
    found = backward(case, tensors, grad_output, full_mask(case, tensors), **statics)
    for name, grad in zip(present(tensors), found, strict=True):
        assert_within_budget(grad, truth[name], yardstick[name], f"gradient of {name}")


@pytest.mark.parametrize("layout", ("channels_last", "transposed", "expand_space", "cl_odd_chunk", "offset"))
@pytest.mark.parametrize("case", (DW, DS), ids=ids([DW, DS]))
def test_grad_output_of_any_strides(case: DwCase | DsCase, layout: str) -> None:
    """autograd hands over whatever strides the next layer's backward made: sum() expands, chunk() slices."""
    tensors = make_tensors(case, torch.float32, kink_free=True)
    shape = oracle(to_float64(tensors), case).shape
    grad_output = lay_out(draw(shape, generator("strides"), "normal"), layout, torch.float32)
    _, truth = gradients(lambda t: oracle(t, case), to_float64(tensors), grad_output.double())
    _, yardstick = gradients(lambda t: oracle(t, case), tensors, grad_output)
    found = backward(case, tensors, grad_output, full_mask(case, tensors))
    for name, grad in zip(present(tensors), found, strict=True):
        assert_within_budget(grad, truth[name], yardstick[name], f"gradient of {name}")


@pytest.mark.parametrize("channels_last", (False, True))
@pytest.mark.parametrize("activation", ("relu", "relu6", "leaky_relu", "sigmoid"))
@pytest.mark.parametrize("kind", (DwCase, DsCase))
def test_saved_output_or_recomputed(kind: type, activation: str, channels_last: bool) -> None:
    """Where act' can be had from the output, giving the output and withholding it lead to the same gradients."""
    epi = Epi(bias=True, activation=activation, slope=0.2)
    layout = "channels_last" if channels_last else "contiguous"
    case = kind(
        id=f"saved-{activation}", c=7, layout=layout, **({"epi": epi} if kind is DwCase else {"pw": epi, "keep": 3})
    )
    tensors = make_tensors(case, torch.float32, kink_free=True)
    grad_output, truth, yardstick = truth_of(case, tensors)
    for output in (forward(case, tensors), None):
        found = backward(case, tensors, grad_output, full_mask(case, tensors), output=output)
        for name, grad in zip(present(tensors), found, strict=True):
            how = "recomputed" if output is None else "from the output"
            assert_within_budget(grad, truth[name], yardstick[name], f"{activation} {how}: gradient of {name}")


@pytest.mark.parametrize("channels_last", (False, True))
@pytest.mark.parametrize("mask", range(1, 8))
def test_stats_masks(mask: int, channels_last: bool) -> None:
    case = DwCase(
        id="raw-stats", c=6, bank=4, multiplier=2, stride=(2, 1), epi=Epi(bias=True),
        layout="channels_last" if channels_last else "contiguous",
    )  # fmt: skip
    tensors = {name: t for name, t in make_tensors(case, torch.float32).items() if name in ("input", "weight", "bias")}
    geometry = geometry_of(case, tensors["input"])
    mean, _ = ops.dwconv_stats(**tensors, geometry=geometry)
    grads = [draw((12,), generator(f"stats{i}"), "normal").float() for i in range(2)]

    def combined(t: dict) -> Tensor:
        mean, var = oracle_stats(t, case)
        return (mean * grads[0].to(mean.dtype)).sum() + (var * grads[1].to(mean.dtype)).sum()

    one = torch.ones((), dtype=torch.float64)
    _, truth = gradients(combined, to_float64(tensors), one)
    _, yardstick = gradients(combined, tensors, one)
    wanted = [name for bit, name in enumerate(tensors) if mask >> bit & 1]
    found = ops.dwconv_stats_bwd(*grads, mean, **tensors, geometry=geometry, mask=mask)
    assert len(found) == len(wanted)
    for name, grad in zip(wanted, found, strict=True):
        # mean enters twice: its own rounding reaches the gradient, as in torch's chain.
        assert_within_budget(grad, truth[name], yardstick[name], f"mask {mask} gradient of {name}")


# ---------------------------------------------------------------------------------------------------------------------
# Bad calls
# ---------------------------------------------------------------------------------------------------------------------

BIG = 2**62
BAD_GEOMETRY: dict[str, Callable[[list[int]], list[int]]] = {
    "empty": lambda g: [],
    "one_short": lambda g: g[:-1],
    "one_long": lambda g: [*g, 0],
    **{
        f"{name}={value}": lambda g, i=i, value=value: [*g[:i], value, *g[i + 1 :]]
        for i, name, values in (
            (0, "stride_h", (0, -1, -BIG, 2**31, BIG)),
            (1, "stride_w", (0, -1, 2**31)),
            (2, "pad_top", (-1, -BIG, BIG, 2**63 - 1)),
            (3, "pad_bottom", (-1, BIG)),
            (4, "pad_left", (-1, BIG)),
            (5, "pad_right", (-1, 2**63 - 1)),
            (6, "dilation_h", (0, -1, 2**31, BIG, 2**63 - 1)),
            (7, "dilation_w", (0, -1, BIG)),
            (8, "multiplier", (0, -1, 2, 2**31, BIG)),
            (10, "activation", (-1, 9, 2**32, BIG)),
            (11, "post_activation", (-1, 9, 2**32)),
        )
        for value in values
    },
}
BAD_DS_GEOMETRY = {
    **BAD_GEOMETRY,
    **{
        f"{name}={value}": lambda g, i=i, value=value: [*g[:i], value, *g[i + 1 :]]
        for i, name, values in (
            (12, "pw_activation", (-1, 9, 2**32)),
            (13, "pw_post_activation", (-1, 9)),
            (14, "keep", (-1, 7, BIG, -BIG)),
            (15, "tf32", (-1, BIG)),
        )
        for value in values
    },
}


def _channels(t: Tensor) -> Tensor:
    return torch.randn(t.shape[0], t.shape[1] + 1, *t.shape[2:])


IMAGE_CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "3d": lambda t: t[0],
    "5d": lambda t: t.unsqueeze(0),
    "0d": lambda t: t.new_zeros(()),
    "more_channels": _channels,
    "wider": lambda t: torch.cat([t, t[..., :1]], 3),
    "lower": lambda t: t[:, :, :-1],
    "more_images": lambda t: torch.cat([t, t]),
    "one_image": lambda t: t[:1],
    "float64": lambda t: t.double(),
    "bfloat16": lambda t: t.bfloat16(),
    "int": lambda t: t.int(),
    "complex": lambda t: t.to(torch.complex64),
}
VECTOR_CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "longer": lambda t: torch.cat([t, t[:1]]),
    "shorter": lambda t: t[:-1],
    "one": lambda t: t[:1],
    "empty": lambda t: t[:0],
    "2d": lambda t: t.unsqueeze(0),
    "0d": lambda t: t[0],
    "float64": lambda t: t.double(),
    "half": lambda t: t.half(),
    "int": lambda t: t.int(),
}
DW_WEIGHT_CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "3d": lambda t: t[0],
    "5d": lambda t: t.unsqueeze(0),
    "two_inputs": lambda t: t.expand(-1, 2, -1, -1),
    "no_inputs": lambda t: t[:, :0],
    "no_kernels": lambda t: t[:0],
    "no_rows": lambda t: t[:, :, :0],
    "no_columns": lambda t: t[:, :, :, :0],
    "larger_than_padded_input": lambda t: torch.randn(len(t), 1, 10, 3),
    "wider_than_padded_input": lambda t: torch.randn(len(t), 1, 3, 11),
    "float64": lambda t: t.double(),
    "bfloat16": lambda t: t.bfloat16(),
    "int": lambda t: t.int(),
}
PW_WEIGHT_CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "2d": lambda t: t[:, :, 0, 0],
    "5d": lambda t: t.unsqueeze(0),
    "fewer_inputs": lambda t: t[:, :-1],
    "more_inputs": lambda t: torch.cat([t, t[:, :1]], 1),
    "no_inputs": lambda t: t[:, :0],
    "3x3": lambda t: t.expand(-1, -1, 3, 3),
    "float64": lambda t: t.double(),
    "int": lambda t: t.int(),
}


def _changes_of(name: str) -> dict[str, Callable[[Tensor], Tensor]]:
    if name == "pw_weight":
        return PW_WEIGHT_CHANGES
    if name.endswith("weight"):
        return DW_WEIGHT_CHANGES
    if name == "input":  # other sizes of the input alone are right calls, unless something else fixes them
        return IMAGE_CHANGES
    return IMAGE_CHANGES if name.endswith("residual") or name == "passthrough" else VECTOR_CHANGES


BAD_TENSORS = [
    pytest.param(case, name, change, id=f"{case.id}-{name}-{change}")
    for case in (DW, DS)
    for name in names_of(case)
    for change in _changes_of(name)
]


@pytest.mark.parametrize(("case", "name", "change"), BAD_TENSORS)
def test_bad_tensor_raises(case: DwCase | DsCase, name: str, change: str) -> None:
    tensors = make_tensors(case, torch.float32)
    grad_output = torch.randn(oracle(to_float64(tensors), case).shape)
    mask = full_mask(case, tensors)
    changed = {**tensors, name: _changes_of(name)[change](tensors[name])}
    with pytest.raises(RuntimeError):
        forward(case, tensors, **{name: changed[name]})
    with pytest.raises(RuntimeError):
        backward(case, tensors, grad_output, mask, **{name: changed[name]})


@pytest.mark.parametrize("change", BAD_GEOMETRY)
def test_bad_dwconv_geometry_raises(change: str) -> None:
    tensors = make_tensors(DW, torch.float32)
    geometry = BAD_GEOMETRY[change](geometry_of(DW, tensors["input"]))
    with pytest.raises(RuntimeError):
        forward(DW, tensors, geometry=geometry)
    with pytest.raises(RuntimeError):
        backward(DW, tensors, torch.randn(2, 6, 7, 8), 63, geometry=geometry)


@pytest.mark.parametrize("change", BAD_GEOMETRY)
def test_bad_geometry_without_parameters_raises(change: str) -> None:
    """The same with nothing but input and weight, whose sizes leave more open: a bank is of any size, so a
    multiplier of 2 alone is right."""
    case = DwCase(id="bare", c=6, h=7, w=8)
    tensors = make_tensors(case, torch.float32)
    geometry = BAD_GEOMETRY[change](geometry_of(case, tensors["input"]))
    if change == "multiplier=2":
        assert forward(case, tensors, geometry=geometry).shape == (2, 12, 7, 8)
        return
    with pytest.raises(RuntimeError):
        forward(case, tensors, geometry=geometry)
    with pytest.raises(RuntimeError):
        ops.dwconv_stats(tensors["input"], tensors["weight"], None, geometry)


@pytest.mark.parametrize("change", BAD_DS_GEOMETRY)
def test_bad_dsconv_geometry_raises(change: str) -> None:
    tensors = make_tensors(DS, torch.float32)
    geometry = BAD_DS_GEOMETRY[change](geometry_of(DS, tensors["input"]))
    with pytest.raises(RuntimeError):
        forward(DS, tensors, geometry=geometry)
    with pytest.raises(RuntimeError):
        backward(DS, tensors, torch.randn(2, 13, 7, 8), 4095, geometry=geometry)


def test_largest_strides_are_right() -> None:
    case = DwCase(id="bare", c=6, h=7, w=8)
    tensors = make_tensors(case, torch.float32)
    geometry = geometry_of(case, tensors["input"])
    geometry[:2] = [2**31 - 1, 2**31 - 1]
    out = forward(case, tensors, geometry=geometry)
    torch.testing.assert_close(out, oracle(tensors, case)[:, :, :1, :1])


def _norm_calls() -> tuple[dict, dict]:
    """Arguments of the two operators with a norm, by name."""
    case = DsCase(id="norm", c=6, k=5, keep=2, pw=Epi(bias=True, scale=True, shift=True, activation="relu"))
    tensors = make_tensors(case, torch.float32)
    forward = {"norm_weight": tensors.pop("scale"), "norm_bias": tensors.pop("shift"), **tensors}
    forward |= {"geometry": geometry_of(case, tensors["input"]), "slopes": [0.1, 0.1], "eps": 1e-5}
    output, activated, mean, var = ops.dsconv_norm_fwd(**forward)
    backward = {
        "grad_output": output,
        "activated": activated,
        "mean": mean,
        "var": var,
        **forward,
        "mask": 0b11010000101,
    }
    return forward, backward


NORM_CHANGES = {
    **{("norm_weight", change): VECTOR_CHANGES[change] for change in ("longer", "shorter", "2d", "int")},
    **{("norm_bias", change): VECTOR_CHANGES[change] for change in ("longer", "shorter", "2d", "int")},
    **{("mean", change): VECTOR_CHANGES[change] for change in ("longer", "shorter", "2d", "float64", "int")},
    **{("var", change): VECTOR_CHANGES[change] for change in ("longer", "shorter", "2d", "float64", "int")},
    **{("activated", change): IMAGE_CHANGES[change] for change in IMAGE_CHANGES},
    **{("grad_output", change): IMAGE_CHANGES[change] for change in IMAGE_CHANGES},
    ("eps", "negative"): lambda eps: -eps,
    ("eps", "nan"): lambda eps: float("nan"),
    ("input", "empty batch"): lambda x: x[:0],
    ("slopes", "three"): lambda slopes: [*slopes, 0.1],
    ("mask", "absent residual"): lambda mask: mask | 1 << 11,
    ("mask", "13th tensor"): lambda mask: mask | 1 << 12,
}


@pytest.mark.parametrize("change", NORM_CHANGES, ids=" ".join)
def test_bad_norm_arguments_raise(change: tuple[str, str]) -> None:
    name, kind = change
    taken = False
    for operator, arguments in zip((ops.dsconv_norm_fwd, ops.dsconv_norm_bwd), _norm_calls(), strict=True):
        operator(**arguments)
        if name in arguments:
            taken = True
            with pytest.raises(RuntimeError):
                operator(**{**arguments, name: NORM_CHANGES[change](arguments[name])})
    assert taken


@pytest.mark.parametrize("slopes", ([], [0.1], [0.1, 0.2, 0.3]), ids=len)
def test_bad_slopes_raise(slopes: list[float]) -> None:
    tensors = make_tensors(DS, torch.float32)
    with pytest.raises(RuntimeError):
        forward(DS, tensors, slopes=slopes)
    with pytest.raises(RuntimeError):
        backward(DS, tensors, torch.randn(2, 13, 7, 8), 4095, slopes=slopes)


@pytest.mark.parametrize("change", IMAGE_CHANGES)
@pytest.mark.parametrize("name", ("grad_output", "output"))
@pytest.mark.parametrize("kind", (DwCase, DsCase))
def test_bad_grad_output_raises(kind: type, name: str, change: str) -> None:
    epi = Epi(activation="relu")
    case = kind(id="bad-grad", c=6, **({"epi": epi} if kind is DwCase else {"pw": epi}))
    tensors = make_tensors(case, torch.float32)
    out = forward(case, tensors)
    with pytest.raises(RuntimeError):
        backward(case, tensors, **{"grad_output": out, "mask": 1, "output": out, name: IMAGE_CHANGES[change](out)})


@pytest.mark.parametrize("mask", (1 << 2, 1 << 5, 1 << 6, 1 << 12, -1, 2**63 - 1, -(2**63)))
def test_bad_mask_raises(mask: int) -> None:
    """A bit of a tensor that is absent or that the operator does not have."""
    for case in (DwCase(id="bare", c=6), DsCase(id="bare", c=6)):
        if isinstance(case, DsCase) and mask == 1 << 2:  # dw_weight: there
            continue
        tensors = make_tensors(case, torch.float32)
        out = forward(case, tensors)
        with pytest.raises(RuntimeError):
            backward(case, tensors, out, mask)


@pytest.mark.parametrize("mask", (1 << 2, 1 << 3, -1))
def test_bad_stats_mask_raises(mask: int) -> None:
    case = DwCase(id="bare", c=6)
    tensors = make_tensors(case, torch.float32)
    geometry = geometry_of(case, tensors["input"])
    mean, var = ops.dwconv_stats(tensors["input"], tensors["weight"], None, geometry)
    with pytest.raises(RuntimeError):
        ops.dwconv_stats_bwd(mean, var, mean, tensors["input"], tensors["weight"], None, geometry, mask)


@pytest.mark.parametrize("name", ("grad_mean", "grad_var", "mean"))
@pytest.mark.parametrize("change", ("longer", "shorter", "2d", "float64", "int"))
def test_bad_stats_gradient_raises(name: str, change: str) -> None:
    case = DwCase(id="bare", c=6)
    tensors = make_tensors(case, torch.float32)
    geometry = geometry_of(case, tensors["input"])
    mean, var = ops.dwconv_stats(tensors["input"], tensors["weight"], None, geometry)
    arguments = {"grad_mean": mean, "grad_var": var, "mean": mean}
    arguments[name] = VECTOR_CHANGES[change](arguments[name])
    with pytest.raises(RuntimeError):
        ops.dwconv_stats_bwd(
            **arguments, input=tensors["input"], weight=tensors["weight"], bias=None, geometry=geometry, mask=3
        )


@pytest.mark.parametrize("dtype", (torch.float16, torch.int32, torch.complex64, torch.bool), ids=str)
def test_unsupported_dtype_raises(dtype: torch.dtype) -> None:
    for case in (DwCase(id="bare", c=6), DsCase(id="bare", c=6)):
        tensors = {name: None if t is None else t.to(dtype) for name, t in make_tensors(case, torch.float32).items()}
        with pytest.raises(RuntimeError):
            forward(case, tensors)


@pytest.mark.parametrize("size", ((0, 6, 7, 8), (2, 0, 7, 8), (2, 6, 0, 8), (2, 6, 7, 0)), ids=str)
def test_zero_sizes(size: tuple[int, ...]) -> None:
    """No images are right; no channels, rows or columns are not, padding or no padding."""
    x = torch.randn(size)
    weight, pw_weight = torch.randn(max(size[1], 1), 1, 3, 3), torch.randn(5, size[1], 1, 1)
    geometry = [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0]
    if size[0] == 0:
        assert ops.dwconv_fwd(x, weight, None, None, None, None, geometry, 0.0).shape == size
        return
    with pytest.raises(RuntimeError):
        ops.dwconv_fwd(x, weight, None, None, None, None, geometry, 0.0)
    with pytest.raises(RuntimeError):
        ops.dsconv_fwd(x, None, weight, *[None] * 4, pw_weight, *[None] * 4, [*geometry, 0, 0, 0, 0], [0.0, 0.0])


@pytest.mark.parametrize("name", ("weight", "bias", "residual"))
def test_tensor_without_data_raises(name: str) -> None:
    """A meta tensor among real ones has no memory to read."""
    tensors = make_tensors(DW, torch.float32)
    tensors[name] = tensors[name].to("meta")
    try:
        out = forward(DW, tensors)
    except RuntimeError:
        return
    assert out.is_meta


@pytest.mark.parametrize("case", [DW_CASES[4], DS_CASES[4]], ids=lambda case: case.id)
def test_saved_output_of_another_activation_is_not_misread(case: DwCase | DsCase) -> None:
    """SiLU's derivative cannot be had from its output: given one all the same, it is refused or ignored."""
    epi = Epi(bias=True, activation="silu")
    case = replace(case, id="not-misread", **({"epi": epi} if isinstance(case, DwCase) else {"pw": epi}))
    tensors = make_tensors(case, torch.float32)
    grad_output, truth, yardstick = truth_of(case, tensors)
    try:
        found = backward(case, tensors, grad_output, full_mask(case, tensors), output=forward(case, tensors))
    except RuntimeError:
        return
    for name, grad in zip(present(tensors), found, strict=True):
        assert_within_budget(grad, truth[name], yardstick[name], f"gradient of {name}")


def test_random_garbage_never_crashes() -> None:
    """Geometry of random integers beside tensors of random small shapes: a result or a RuntimeError."""
    gen = generator("garbage")
    # Nothing between 10 and 2^40: that would be right, and gigabytes large.
    values = torch.tensor([-(2**63), -1, 0, 2, 3, 9, 2**40, 2**62, 2**63 - 1])
    sound = [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0]
    right = refused = 0

    def sizes(often: tuple[int, ...]) -> list[int]:
        drawn = torch.randint(0, 4, (len(often),), generator=gen).tolist()
        return [d if torch.rand((), generator=gen) < 0.2 else o for d, o in zip(drawn, often, strict=True)]

    for _ in range(400):
        x = torch.randn(sizes((2, 3, 4, 5)))
        weight = torch.randn(sizes((3, 1, 3, 3)))
        pw_weight = torch.randn(sizes((2, 3, 1, 1)))
        odd = values[torch.randint(0, len(values), (len(sound),), generator=gen)].tolist()
        geometry = [o if torch.rand((), generator=gen) < 0.06 else s for s, o in zip(sound, odd, strict=True)]
        none = [None] * 4
        statistic = torch.rand(sizes((3,)))
        dw, ds = geometry[:13], geometry
        for call in (
            partial(ops.dwconv_fwd, x, weight, *none, dw, 0.1),
            partial(ops.dwconv_bwd, x, None, x, weight, *none, dw, 0.1, 3),
            partial(ops.dwconv_stats, x, weight, None, dw),
            partial(ops.dsconv_fwd, x, None, weight, *none, pw_weight, *none, ds, [0.1, 0.1]),
            partial(ops.dsconv_bwd, x, None, x, None, weight, *none, pw_weight, *none, ds, [0.1, 0.1], 133),
            partial(ops.dsconv_norm_fwd, x, None, weight, *none, pw_weight, *none, ds, [0.1, 0.1], 1e-5),
            partial(
                ops.dsconv_norm_bwd,
                x,
                x,
                statistic,
                statistic,
                x,
                None,
                weight,
                *none,
                pw_weight,
                *none,
                ds,
                [0.1, 0.1],
                1e-5,
                133,
            ),
        ):
            try:
                call()
                right += 1
            except RuntimeError:
                refused += 1
    assert right > 20 and refused > 200, (right, refused)  # neither everything refused nor everything taken
