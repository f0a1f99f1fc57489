"""Independent oracle, input factories and the error budget shared by every test.

Nothing here calls effops' own reference: the oracle is written from the operators' documented semantics with
``F.pad``, ``F.conv2d`` and elementwise torch functions, and runs in float64 for the truth and in the dtype under test
for the yardstick ("what torch's own unfused operators would have given").
"""

from __future__ import annotations

import ctypes
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from cases import ACTIVATIONS, BsCase, DsCase, DwCase, Epi
from torch import Tensor

import effops.functional as EF
from effops.ops.registration import INTERPRETING

Tensors = dict[str, "Tensor | None"]

DW_NAMES = ("input", "weight", "bias", "scale", "shift", "residual")
DS_NAMES = (
    "input",
    "passthrough",
    "dw_weight",
    "dw_bias",
    "dw_scale",
    "dw_shift",
    "dw_residual",
    "pw_weight",
    "bias",
    "scale",
    "shift",
    "residual",
)

BS_NAMES = (
    "input",
    "mid_weight",
    "mid_scale",
    "mid_shift",
    "pw_weight",
    "pw_bias",
    "pw_scale",
    "pw_shift",
    "dw_weight",
    "bias",
    "scale",
    "shift",
    "residual",
)

NORM_BOUND = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-2}

# Where the derivative of an activation jumps; gradients are compared only at a distance from these points.
KINKS = {
    "relu": (0.0,),
    "leaky_relu": (0.0,),
    "relu6": (0.0, 6.0),
    "hardswish": (-3.0, 3.0),
    "hardsigmoid": (-3.0, 3.0),
}


# ---------------------------------------------------------------------------------------------------------------------
# Oracle
# ---------------------------------------------------------------------------------------------------------------------


def activate(value: Tensor, name: str, slope: float) -> Tensor:
    """The activation ``name``; ``slope`` is used by leaky_relu alone."""
    if name == "leaky_relu":
        return F.leaky_relu(value, slope)
    if name == "hardsigmoid" and value.dtype == torch.float64:
        return (value + 3).clamp(0, 6) / 6  # F.hardsigmoid's derivative is 1/6 rounded to float32, in float64 too
    functions: dict[str, Callable[[Tensor], Tensor]] = {
        "none": lambda v: v,
        "relu": F.relu,
        "relu6": F.relu6,
        "silu": F.silu,
        "hardswish": F.hardswish,
        "hardsigmoid": F.hardsigmoid,
        "sigmoid": torch.sigmoid,
        "gelu": F.gelu,
    }
    return functions[name](value)


def oracle_epilogue(value: Tensor, tensors: Tensors, prefix: str, epi: Epi, stages: dict | None = None) -> Tensor:
    """``post(act(value + bias) * scale + shift + residual)``, every step rounded to the dtype of ``value``.

    Parameters kept in float32 beside a half-precision value take part in float32, as an unfused mixed-precision chain
    would have it. ``stages`` receives the arguments of both activations.
    """
    dtype = value.dtype

    def param(name: str) -> Tensor | None:
        tensor = tensors[prefix + name]
        return None if tensor is None else tensor.reshape(1, -1, 1, 1)

    if (bias := param("bias")) is not None and bias.dtype != dtype:  # else the convolution has added it
        value = (value + bias).to(dtype)
    if stages is not None:
        stages[prefix + "bias"] = (value.detach(), epi.activation)
    value = activate(value, epi.activation, epi.slope)
    if (scale := param("scale")) is not None:
        value = (value * scale).to(dtype)
    if (shift := param("shift")) is not None:
        value = (value + shift).to(dtype)
    if tensors[prefix + "residual"] is not None:
        value = value + tensors[prefix + "residual"]
    if stages is not None:
        stages[prefix + "shift"] = (value.detach(), epi.post_activation)
    return activate(value, epi.post_activation, epi.slope)


def _own_bias(bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """The bias where F.conv2d takes it: in its own dtype. (torch's own bias gradient, then, is the convolution's.)"""
    return None if bias is None or bias.dtype != dtype else bias


def oracle_depthwise(x: Tensor, weight: Tensor, bias: Tensor | None, case: DwCase | DsCase) -> Tensor:
    """Output channel o reads input channel ``o // multiplier`` with kernel ``weight[o mod B]``; zeros outside."""
    out_channels = x.shape[1] * case.multiplier
    kernels = weight[torch.arange(out_channels, device=weight.device) % weight.shape[0]]
    padded = F.pad(x, case.padding)
    return F.conv2d(padded, kernels, _own_bias(bias, x.dtype), case.stride, 0, case.dilation, groups=x.shape[1])


def oracle_dwconv(tensors: Tensors, case: DwCase, stages: dict | None = None) -> Tensor:
    value = oracle_depthwise(tensors["input"], tensors["weight"], tensors["bias"], case)
    return oracle_epilogue(value, tensors, "", case.epi, stages)


def oracle_dsconv(tensors: Tensors, case: DsCase, stages: dict | None = None) -> Tensor:
    value = oracle_depthwise(tensors["input"], tensors["dw_weight"], tensors["dw_bias"], case)
    z = oracle_epilogue(value, tensors, "dw_", case.dw, stages)
    if tensors["passthrough"] is not None:
        z = torch.cat([tensors["passthrough"], z], 1)
    value = F.conv2d(z, tensors["pw_weight"], _own_bias(tensors["bias"], z.dtype))
    out = oracle_epilogue(value, tensors, "", case.pw, stages)
    return torch.cat([z[:, z.shape[1] - case.keep :], out], 1) if case.keep else out


def oracle_bsconv(tensors: Tensors, case: BsCase, stages: dict | None = None) -> Tensor:
    """Pointwise convolutions first; the padding goes round the last one's result."""
    tensors = {**tensors, "mid_bias": None, "mid_residual": None, "pw_residual": None}
    value = tensors["input"]
    if case.m:
        value = oracle_epilogue(F.conv2d(value, tensors["mid_weight"]), tensors, "mid_", case.mid)
    value = F.conv2d(value, tensors["pw_weight"], _own_bias(tensors["pw_bias"], value.dtype))
    z = F.pad(oracle_epilogue(value, tensors, "pw_", case.pw, stages), case.padding)
    bias = _own_bias(tensors["bias"], z.dtype)
    value = F.conv2d(z, tensors["dw_weight"], bias, case.stride, 0, case.dilation, groups=case.k)
    return oracle_epilogue(value, tensors, "", case.epi, stages)


def oracle(tensors: Tensors, case: DwCase | DsCase | BsCase, stages: dict | None = None) -> Tensor:
    if isinstance(case, BsCase):
        return oracle_bsconv(tensors, case, stages)
    return oracle_dsconv(tensors, case, stages) if isinstance(case, DsCase) else oracle_dwconv(tensors, case, stages)


def oracle_stats(tensors: Tensors, case: DwCase) -> tuple[Tensor, Tensor]:
    """Mean and population variance of conv + bias over batch and space, per output channel, in at least float32."""
    value = oracle_depthwise(tensors["input"], tensors["weight"], None, case)
    if tensors["bias"] is not None:
        value = value + tensors["bias"].reshape(1, -1, 1, 1)
    value = value.to(torch.promote_types(value.dtype, torch.float32))
    return value.mean((0, 2, 3)), value.var((0, 2, 3), unbiased=False)


def memory_format_of(x: Tensor) -> torch.memory_format:
    """The format F.conv2d would give: by stride order. Spelled out here so that it is not effops' own rule."""
    n, c, h, w = x.shape
    smallest = 0
    strides = x.stride()
    if strides[1] == 0:
        return torch.contiguous_format
    for dim in (1, 3, 2, 0):
        if x.shape[dim] == 0 or strides[dim] < smallest:
            return torch.contiguous_format
        if dim == 0 and smallest == strides[1]:  # N x 1 x H x 1 and the like are ambiguous: NCHW
            return torch.contiguous_format
        smallest = strides[dim] * (x.shape[dim] if x.shape[dim] > 1 else 1)
    return torch.channels_last


# ---------------------------------------------------------------------------------------------------------------------
# Error budget
# ---------------------------------------------------------------------------------------------------------------------


class IllConditionedError(AssertionError):
    """The norm bound is missed, but torch's own result misses half of it too: the inputs are at fault.

    A failure like any other of a named case, whose inputs are then to be changed; drawn cases are rejected.
    """


def describe_errors(error: Tensor, allowed: float) -> str:
    """Where an output is wrong: how many elements, the first of them, and the index range in every dimension."""
    wrong = (~(error <= allowed)).nonzero()
    if not len(wrong):
        return "no single element is beyond the allowance"
    spans = []
    for dim in range(wrong.shape[1]):
        values = wrong[:, dim].unique().tolist()
        shown = ",".join(map(str, values[:8])) + ("..." if len(values) > 8 else "")
        spans.append(f"dim{dim}: {len(values)} of {error.shape[dim]} [{shown}]")
    return f"{len(wrong)} of {error.numel()} wrong, first at {tuple(wrong[0].tolist())}; " + "; ".join(spans)


def assert_within_budget(
    actual: Tensor, truth: Tensor, yardstick: Tensor | None, what: str, computed_in: torch.dtype | None = None
) -> None:
    """DESIGN's error budget: ``error <= 2 (torch's error + one rounding of the largest value)`` and a norm bound.

    Args:
        actual: result under test.
        truth: float64 result of the oracle, same shape.
        yardstick: the oracle in ``actual``'s dtype. Not used for float64, where it would be the truth itself: there
            both the largest and the norm-wise error are held to 1e-12 of the truth's.
        what: named in the failure message.
        computed_in: the dtype whose rounding counts where it is not ``actual``'s (float32 statistics of bfloat16).
    """
    dtype = computed_in or actual.dtype
    assert actual.shape == truth.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(truth.shape)}"
    if actual.numel() == 0:
        return
    actual64 = actual.detach().to(device=truth.device, dtype=torch.float64)
    error = (actual64 - truth).abs()
    finite = torch.isfinite(actual64)
    assert finite.all(), f"{what}: not finite; {describe_errors(error, float('inf'))}"
    largest = truth.abs().max().item()
    bound = NORM_BOUND[dtype]
    if dtype == torch.float64:
        allowed = bound * largest
    else:
        assert yardstick is not None and yardstick.dtype == actual.dtype
        yardstick = yardstick.detach().to(device=truth.device, dtype=torch.float64)
        torch_error = (yardstick - truth).abs().max().item()
        allowed = 2 * (torch_error + torch.finfo(dtype).eps * largest)
    worst = error.max().item()
    assert worst <= allowed, f"{what}: error {worst:.3e} > {allowed:.3e}; {describe_errors(error, allowed)}"
    size = truth.norm().item()
    if error.norm().item() > bound * size:
        message = f"{what}: relative norm of the error {error.norm().item() / max(size, 1e-300):.3e} > {bound:.0e}"
        if yardstick is not None and (yardstick.double() - truth).norm().item() > bound * size / 2:
            raise IllConditionedError(message + ", and torch's own result is no better")
        raise AssertionError(message)


# ---------------------------------------------------------------------------------------------------------------------
# Inputs
# ---------------------------------------------------------------------------------------------------------------------


def generator(seed: str) -> torch.Generator:
    return torch.Generator().manual_seed(zlib.crc32(seed.encode()))


def draw(shape: Iterable[int], gen: torch.Generator, data: str, scale: float = 1.0, mean: float = 0.0) -> Tensor:
    """Float64 values of one of three kinds.

    "normal": every bit of the mantissa used. "exact": small integers, whose short sums do not round. "positive": of
    about one sign (where ``mean`` is given) or of one (weights), so that no sum cancels and results of a single element
    can be judged.
    """
    if data == "exact":
        return torch.randint(-2, 3, tuple(shape), generator=gen).double()
    values = torch.randn(tuple(shape), generator=gen, dtype=torch.float64)
    if data == "positive":
        return values + mean if mean else (values.abs() + 0.1) * scale**2  # sums of about one, however long
    return values * scale


def lay_out(values: Tensor, layout: str, dtype: torch.dtype) -> Tensor:
    """``values`` with the strides that ``layout`` names; storage that does not belong to the tensor holds NaN."""
    n, c, h, w = values.shape
    values = values.to(dtype)

    def inside(shape: tuple[int, ...], index: Any, memory_format: torch.memory_format) -> Tensor:
        base = torch.full(shape, float("nan"), dtype=dtype).contiguous(memory_format=memory_format)
        view = base[index]
        view.copy_(values)
        return view

    every = slice(None)
    if layout == "contiguous":
        return values.clone(memory_format=torch.contiguous_format)
    if layout == "channels_last":
        return values.clone(memory_format=torch.channels_last)
    if layout == "cl_chunk":  # VGNet's half: x[:, 8:] of a channels_last tensor
        return inside((n, c + 8, h, w), (every, slice(8, None)), torch.channels_last)
    if layout == "cl_odd_chunk":  # the same, 3 channels in and one out at the end: nothing is aligned
        return inside((n, c + 4, h, w), (every, slice(3, -1)), torch.channels_last)
    if layout == "cl_crop":
        return inside((n, c, h + 2, w + 3), (every, every, slice(1, -1), slice(2, -1)), torch.channels_last)
    if layout == "offset":  # contiguous, but one element past the allocation's alignment
        flat = torch.full((n * c * h * w + 2,), float("nan"), dtype=dtype)
        return flat[1:-1].copy_(values.reshape(-1)).view(n, c, h, w)
    if layout == "crop":
        return inside((n, c, h + 2, w + 3), (every, every, slice(1, -1), slice(2, -1)), torch.contiguous_format)
    if layout == "every_second":
        index = (every, slice(None, None, 2), every, slice(None, None, 2))
        return inside((n, 2 * c, h, 2 * w), index, torch.contiguous_format)
    if layout == "transposed":
        return values.transpose(2, 3).contiguous().transpose(2, 3)
    if layout == "batch_last":
        return values.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2)
    if layout == "expand_batch":
        return values[:1].contiguous().expand(n, c, h, w)
    if layout == "expand_channels":
        return values[:, :1].contiguous().expand(n, c, h, w)
    if layout == "expand_space":
        return values[:, :, :1, :1].contiguous().expand(n, c, h, w)
    raise KeyError(layout)


def output_size(case: DwCase | DsCase) -> tuple[int, int]:
    left, right, top, bottom = case.padding
    sizes = []
    for size, pad, kernel, stride, dilation in (
        (case.h, top + bottom, case.kernel[0], case.stride[0], case.dilation[0]),
        (case.w, left + right, case.kernel[1], case.stride[1], case.dilation[1]),
    ):
        sizes.append((size + pad - dilation * (kernel - 1) - 1) // stride + 1)
    return sizes[0], sizes[1]


def _epilogue_tensors(tensors: Tensors, prefix: str, epi: Epi, channels: int, case: Any, spec: dict) -> None:
    p, q = output_size(case)
    gen, dtype, param_dtype = spec["gen"], spec["dtype"], spec["param_dtype"]
    for name in ("bias", "scale", "shift"):
        wanted = getattr(epi, name)
        tensors[prefix + name] = draw((channels,), gen, case.data, mean=0.5).to(param_dtype) if wanted else None
    residual = draw((case.n, channels, p, q), gen, case.data, mean=1.0) if epi.residual else None
    tensors[prefix + "residual"] = None if residual is None else lay_out(residual, case.residual_layout, dtype)


def make_tensors(case: DwCase | DsCase, dtype: torch.dtype, *, kink_free: bool = False) -> Tensors:
    """The case's tensors, by schema name and in schema order; absent ones are None.

    Args:
        kink_free: moves biases and shifts until no activation's argument is near a kink (see ``clear_kinks``).
    """
    gen = generator(case.id)
    param_dtype = torch.float32 if case.float_params and dtype in (torch.bfloat16, torch.float16) else dtype
    spec = {"gen": gen, "dtype": dtype, "param_dtype": param_dtype}
    kh, kw = case.kernel
    x = lay_out(draw((case.n, case.c, case.h, case.w), gen, case.data, mean=1.0), case.layout, dtype)
    if isinstance(case, BsCase):
        tensors = _bs_tensors(case, x, spec)
        if kink_free:
            clear_kinks(tensors, case)
        return tensors
    dw_channels = case.c * case.multiplier
    weight = draw((case.bank or dw_channels, 1, kh, kw), gen, case.data, (kh * kw) ** -0.5).to(dtype)
    if isinstance(case, DwCase):
        tensors: Tensors = {"input": x, "weight": weight}
        _epilogue_tensors(tensors, "", case.epi, dw_channels, case, spec)
    else:
        p, q = output_size(case)
        passed = draw((case.n, case.passthrough, p, q), gen, case.data, mean=1.0) if case.passthrough else None
        tensors = {
            "input": x,
            "passthrough": None if passed is None else lay_out(passed, case.passthrough_layout, dtype),
            "dw_weight": weight,
        }
        _epilogue_tensors(tensors, "dw_", case.dw, dw_channels, case, spec)
        reduced = dw_channels + case.passthrough
        tensors["pw_weight"] = draw((case.k, reduced, 1, 1), gen, case.data, max(reduced, 1) ** -0.5).to(dtype)
        _epilogue_tensors(tensors, "", case.pw, case.k, case, spec)
    if kink_free:
        clear_kinks(tensors, case)
    return tensors


def _bs_tensors(case: BsCase, x: Tensor, spec: dict) -> Tensors:
    gen, dtype, (kh, kw) = spec["gen"], spec["dtype"], case.kernel
    found: Tensors = {"input": x}
    read = case.c
    if case.m:
        found["mid_weight"] = draw((case.m, read, 1, 1), gen, case.data, read**-0.5).to(dtype)
        _epilogue_tensors(found, "mid_", case.mid, case.m, case, spec)
        read = case.m
    found["pw_weight"] = draw((case.k, read, 1, 1), gen, case.data, read**-0.5).to(dtype)
    _epilogue_tensors(found, "pw_", case.pw, case.k, case, spec)
    found["dw_weight"] = draw((case.k, 1, kh, kw), gen, case.data, (kh * kw) ** -0.5).to(dtype)
    _epilogue_tensors(found, "", case.epi, case.k, case, spec)
    return {name: found.get(name) for name in BS_NAMES}


def clear_kinks(tensors: Tensors, case: DwCase | DsCase) -> None:
    """Moves each channel's bias (or shift, for post_activation) so that no activation is evaluated near a kink.

    Of many small offsets the one is taken whose nearest kink is farthest: beside it a result that differs by rounding
    differs by rounding in its gradient too. Raises where a kinked activation has no bias or shift to move.
    """
    offsets = torch.linspace(-0.75, 0.75, 97, dtype=torch.float64)
    if case.data == "exact":
        offsets = torch.tensor([0.5], dtype=torch.float64)
    for name in [prefix + which for prefix in case.prefixes for which in ("bias", "shift")]:
        for_offsets = _kink_distance(tensors, case, name, offsets)
        if torch.isinf(for_offsets).all():
            continue
        if tensors[name] is None:
            raise ValueError(f"{case.id}: the activation after {name} is kinked, so the case needs {name}")
        tensors[name] += offsets[for_offsets.max(0).indices].to(tensors[name].dtype)
        left = _kink_distance(tensors, case, name, torch.zeros(1, dtype=torch.float64)).min().item()
        assert left > 1e-4, f"{case.id}: the activation after {name} stays at a kink ({left:.1e}), use a smaller case"


def _kink_distance(tensors: Tensors, case: DwCase | DsCase, name: str, offsets: Tensor) -> Tensor:
    """[offset, channel]: how near the argument of the activation after ``name`` comes to a kink, were it moved so."""
    stages: dict = {}
    oracle(to_float64(tensors), case, stages)
    value, activation = stages[name]
    per_channel = value.transpose(0, 1).flatten(1)
    if activation not in KINKS or per_channel.shape[1] == 0:
        return torch.full((len(offsets), len(per_channel)), float("inf"), dtype=torch.float64)
    moved = per_channel + offsets.reshape(-1, 1, 1)
    return torch.stack([(moved - kink).abs().amin(2) for kink in KINKS[activation]]).amin(0)


def move(tensor: Tensor, device: str) -> Tensor:
    """The tensor on another device with its strides, its offset and what lies around it in memory."""
    elements = tensor.untyped_storage().nbytes() // tensor.element_size()
    whole = tensor.new_empty(0).set_(tensor.untyped_storage(), 0, (elements,), (1,))
    return whole.to(device).as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def move_all(tensors: Tensors, device: str) -> Tensors:
    return {name: None if t is None else move(t, device) for name, t in tensors.items()}


def to_float64(tensors: Tensors) -> Tensors:
    return {name: None if t is None else t.detach().double() for name, t in tensors.items()}


def as_leaves(tensors: Tensors, wanted: Iterable[str] | None = None) -> Tensors:
    """Detached tensors with the same strides; those in ``wanted`` (default: all) require a gradient."""
    names = set(tensors if wanted is None else wanted)
    return {
        name: None if t is None else t.detach().requires_grad_(name in names and t.is_floating_point())
        for name, t in tensors.items()
    }


def present(tensors: Tensors) -> list[str]:
    return [name for name, t in tensors.items() if t is not None]


# ---------------------------------------------------------------------------------------------------------------------
# Memory
# ---------------------------------------------------------------------------------------------------------------------


def poison_memory() -> None:
    """Junk-fills what C++ allocates: deterministic mode's NaN fill reaches torch.empty, but not the stable ABI's shims.

    Tensors: c10's CPU allocator writes 0x7fedbeef, a NaN in float32. Kernel scratch: glibc's malloc writes 0x7e.
    """
    _fill_allocations(junk=True)
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        m_perturb = -6
        libc.mallopt(m_perturb, 0x7E ^ 0xFF)


def _fill_allocations(junk: bool) -> None:
    if not sys.platform.startswith("linux"):
        return
    c10 = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    for flag, value in (("junk", junk), ("zero", not junk)):
        ctypes.c_bool.in_dll(c10, f"FLAGS_caffe2_cpu_allocator_do_{flag}_fill").value = value


@contextmanager
def torchs_own_memory() -> Iterator[None]:
    """Zero-filled allocations, for results of torch's own kernels.

    The bfloat16 weight gradient of a strided channels_last depthwise F.conv2d reads memory nobody wrote (torch 2.13: on
    maps of 1 to 3 pixels a gradient in 40 is NaN without any poison, one in 10 with it); zeros there make it right.
    """
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = False
    _fill_allocations(junk=False)
    try:
        yield
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = fill
        _fill_allocations(junk=True)


# ---------------------------------------------------------------------------------------------------------------------
# Calls
# ---------------------------------------------------------------------------------------------------------------------


def call(tensors: Tensors, case: DwCase | DsCase, backend: str, **extra: Any) -> Tensor:
    """The public functional call that the case describes, of a `DsCase` with extra arguments."""
    if isinstance(case, BsCase):
        return _bs_call(tensors, case, backend)
    weight_name = "weight" if isinstance(case, DwCase) else "dw_weight"
    weight, share = _bank_arguments(tensors[weight_name], case)
    geometry: dict[str, Any] = {"stride": case.stride, "padding": case.padding, "dilation": case.dilation}
    if isinstance(case, DsCase):
        return EF.ds_conv2d(
            tensors["input"], weight, tensors["pw_weight"], tensors["dw_bias"], tensors["bias"], **geometry,
            **_epilogue_arguments(tensors, "dw_", case.dw), **_epilogue_arguments(tensors, "", case.pw),
            passthrough=tensors["passthrough"], keep=case.keep, dw_share=share, backend=backend, **extra,
        )  # fmt: skip
    arguments = {**geometry, **_epilogue_arguments(tensors, "", case.epi), "backend": backend}
    if weight.dim() == 3:
        return EF.fixed_filter_conv2d(tensors["input"], weight, bias=tensors["bias"], **arguments)
    function = EF.depthwise_conv2d if share == 1 else EF.shared_depthwise_conv2d
    if share != 1 and case.multiplier != 1:
        raise NotImplementedError(f"{case.id}: a shared bank with a multiplier has no public depthwise function")
    return function(tensors["input"], weight, tensors["bias"], **arguments)


def _bs_call(tensors: Tensors, case: BsCase, backend: str) -> Tensor:
    names = [name for name in BS_NAMES if name not in ("input", "bias")]
    return EF.bs_conv2d(
        tensors["input"], **{name: tensors[name] for name in names}, dw_bias=tensors["bias"],
        stride=case.stride, padding=case.padding, dilation=case.dilation,
        pw_activation=case.pw.activation, pw_negative_slope=case.pw.slope, pw_post_activation=case.pw.post_activation,
        activation=case.epi.activation, negative_slope=case.epi.slope, post_activation=case.epi.post_activation,
        backend=backend,
    )  # fmt: skip


def stats_call(tensors: Tensors, case: DwCase, backend: str) -> tuple[Tensor, Tensor]:
    """Mean and variance by the public functional call."""
    weight, share = _bank_arguments(tensors["weight"], case)
    return EF.depthwise_stats2d(
        tensors["input"],
        weight,
        tensors["bias"],
        case.stride,
        case.padding,
        case.dilation,
        share=share,
        backend=backend,
    )


def _bank_arguments(weight: Tensor, case: DwCase | DsCase) -> tuple[Tensor, int]:
    """The weight and the share that say this bank: a shared one stays 4-D, one that does not divide is a fixed one."""
    channels = case.c * case.multiplier
    if case.bank is None:
        return weight, 1
    if channels % case.bank == 0:
        return weight, channels // case.bank
    return weight.squeeze(1), 1


def _epilogue_arguments(tensors: Tensors, prefix: str, epi: Epi) -> dict[str, Any]:
    arguments = {name: tensors[prefix + name] for name in ("scale", "shift", "residual")}
    arguments |= {
        "activation": epi.activation,
        "post_activation": epi.post_activation,
        "negative_slope": epi.slope,
    }
    return {prefix + name: value for name, value in arguments.items()}


def geometry_of(case: DwCase | DsCase, x: Tensor) -> list[int]:
    """The ``int[] geometry`` of the raw operators."""
    left, right, top, bottom = case.padding
    channels_last = int(memory_format_of(x) == torch.channels_last)
    epi = case.dw if isinstance(case, DsCase) else case.epi
    code = ACTIVATIONS.index
    geometry = [*case.stride, top, bottom, left, right, *case.dilation, case.multiplier, channels_last]
    geometry += [code(epi.activation), code(epi.post_activation)]
    if isinstance(case, DsCase):
        geometry += [code(case.pw.activation), code(case.pw.post_activation), case.keep, 0]
    if isinstance(case, BsCase):
        return [*geometry, code(case.pw.activation), code(case.pw.post_activation)]
    return [*geometry, 0]


def gradients(
    function: Callable[[Tensors], Tensor], tensors: Tensors, grad_output: Tensor, wanted: Iterable[str] | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Output of ``function`` and the gradient of each wanted (default: every present) tensor."""
    names = [name for name in present(tensors) if wanted is None or name in set(wanted)]
    leaves = as_leaves(tensors, names)
    out = function(leaves)
    grads = torch.autograd.grad(out, [leaves[name] for name in names], grad_output.to(out.device, out.dtype))
    return out.detach(), dict(zip(names, grads, strict=True))


def make_grad_output(case: DwCase | DsCase, shape: Iterable[int]) -> Tensor:
    """Random, about one: sums over batch and space do not cancel to nothing, which would leave the budget to chance."""
    return draw(shape, generator(case.id + "/grad"), case.data, mean=0.5) + 1


def interpreted(backend: str) -> bool:
    """Whether the backend's kernels are interpreted here: thousands of times slower than they are compiled."""
    return backend == "triton" and INTERPRETING


def sized_for(case: DwCase | DsCase, backend: str) -> DwCase | DsCase:
    """The case, smaller where it says so for interpreted kernels."""
    if case.interpreted is None or not interpreted(backend):
        return case
    return replace(case, h=case.interpreted[0], w=case.interpreted[1])


def check_forward(case: DwCase | DsCase, dtype: torch.dtype, backend: str, device: str = "cpu") -> None:
    """Values by the budget; dtype, shape and strides by the inputs alone; inputs untouched. The truth is the CPU's."""
    case = sized_for(case, backend)
    on_cpu = make_tensors(case, dtype)
    tensors = on_cpu if device == "cpu" else move_all(on_cpu, device)
    copies = {name: None if t is None else t.clone() for name, t in tensors.items()}
    with torch.no_grad():
        out = call(tensors, case, backend)
        truth = oracle(to_float64(on_cpu), case)
        yardstick = None if dtype == torch.float64 else oracle(tensors, case)
    assert out.dtype == dtype
    expected = torch.empty(truth.shape, dtype=dtype, device="meta", memory_format=memory_format_of(tensors["input"]))
    assert out.shape == expected.shape
    assert out.stride() == expected.stride(), f"strides {out.stride()}, expected {expected.stride()}"
    assert_within_budget(out, truth, yardstick, f"{case.id} {backend} output")
    for name in present(tensors):
        assert torch.equal(tensors[name], copies[name]), f"{name} was written to"


def check_gradients(
    case: DwCase | DsCase,
    dtype: torch.dtype,
    backend: str,
    wanted: Iterable[str] | None = None,
    device: str = "cpu",
) -> None:
    """Every wanted gradient by the budget, torch's own autograd of the unfused chain being the yardstick."""
    case = sized_for(case, backend)
    on_cpu = make_tensors(case, dtype, kink_free=True)
    tensors = on_cpu if device == "cpu" else move_all(on_cpu, device)
    shape = oracle(to_float64(on_cpu), case).shape
    grad_output = make_grad_output(case, shape)
    _, truth = gradients(lambda t: oracle(t, case), to_float64(on_cpu), grad_output, wanted)
    yardstick: dict[str, Tensor | None] = dict.fromkeys(truth)
    with torchs_own_memory():
        if dtype != torch.float64:
            _, yardstick = gradients(lambda t: oracle(t, case), tensors, grad_output, wanted)
        if backend == "reference":
            _, actual = gradients(lambda t: call(t, case, backend), tensors, grad_output, wanted)
    if backend != "reference":
        _, actual = gradients(lambda t: call(t, case, backend), tensors, grad_output, wanted)
    assert list(actual) == list(truth)
    for name, grad in actual.items():
        assert grad.dtype == tensors[name].dtype, f"gradient of {name} is {grad.dtype}"
        what = f"{case.id} {backend} gradient of {name}"
        assert_within_budget(grad, truth[name], yardstick[name], what, computed_in=dtype)
