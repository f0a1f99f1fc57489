"""Squeeze-excite (room se)."""

from __future__ import annotations

import torch
from torch import Tensor

from effops import _checks as check
from effops import backends
from effops.functional._gradients import run_kernels
from effops.ops import geometry as G
from effops.ops import se as _se
from effops.ops.registration import sums_dtype
from effops.ops.se.reference import GATES, Excitation
from effops.ops.se.reference import squeeze_excite as _reference


def excitation_codes(op: str, prefix: str, activation: str, gate: str) -> tuple[int, int]:
    """The codes of a squeeze-excite's activation and gate; `prefix` is that of their names in messages."""
    code = check.activation_code(op, f"{prefix}activation", activation)
    if not isinstance(gate, str):
        raise TypeError(f"{op}: {prefix}gate must be a string; got {type(gate).__name__}; accepted: {', '.join(GATES)}")
    if gate not in GATES:
        raise ValueError(f"{op}: unknown {prefix}gate {gate!r}; accepted: {', '.join(GATES)}")
    return code, GATES[gate]


def check_excitation_weights(
    op: str, prefix: str, channels: int, reduce_weight: check.Shape, expand_weight: check.Shape
) -> int:
    """The two products take `channels` to as many again; returns the number in between."""
    for name, shape in (("reduce_weight", reduce_weight), ("expand_weight", expand_weight)):
        check.require_rank(op, prefix + name, shape, "[Cr,C,1,1]" if name == "reduce_weight" else "[C,Cr,1,1]")
    between = reduce_weight[0]
    if between == 0 or reduce_weight != (between, channels, 1, 1):
        what = f"[Cr,{channels},1,1] with Cr > 0"
        raise ValueError(f"{op}: {prefix}reduce_weight must be {what}; got {check.shape_text(reduce_weight)}")
    if expand_weight != (channels, between, 1, 1):
        what = f"[{channels},{between},1,1]"
        raise ValueError(f"{op}: {prefix}expand_weight must be {what}; got {check.shape_text(expand_weight)}")
    return between


def excitation_plan(
    op: str,
    input: check.Shape,
    reduce_weight: check.Shape,
    expand_weight: check.Shape,
    strides: check.Shape,
    activation: str,
    gate: str,
) -> tuple[list[int], int]:
    """Checks shapes and settings; returns the operator's int[] and the number of channels between the products."""
    check.require_rank(op, "input", input, "[N,C,H,W]")
    if 0 in input[1:]:
        raise ValueError(
            f"{op}: input must have positive sizes, only the batch may be 0; got {check.shape_text(input)}"
        )
    between = check_excitation_weights(op, "", input[1], reduce_weight, expand_weight)
    codes = excitation_codes(op, "", activation, gate)
    return [int(G.orders_channels_last(input, strides)), *codes], between


_plan = check.cached(excitation_plan)


def squeeze_excite2d(
    input: Tensor,
    reduce_weight: Tensor,
    reduce_bias: Tensor | None,
    expand_weight: Tensor,
    expand_bias: Tensor | None,
    *,
    activation: str = "relu",
    gate: str = "sigmoid",
    sums: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """y = input * gate(W2 activation(W1 mean(input) + b1) + b2), the mean over height and width, as one kernel.

    Args:
        input: [N,C,H,W]; any strides; N may be 0.
        reduce_weight: W1, [Cr,C,1,1].
        reduce_bias: b1, [Cr], or None.
        expand_weight: W2, [C,Cr,1,1].
        expand_bias: b2, [C], or None.
        activation: what is between the products; leaky_relu has a slope of 0.01.
        gate: "sigmoid" or "hardsigmoid".
        sums: those of the input over height and width, [N,C], float64 for a float64 input, else float32, where what
            made the input took them already (`ds_conv2d(..., pool=True)`): the input is then read once. They are taken
            as they are, without a gradient of their own: that by way of the mean goes to the input all the same.
        backend: "auto" or a backend's name.

    Returns:
        [N,C,H,W] of the input's dtype, channels_last where the input's strides are.

    Raises:
        TypeError: an argument of a wrong kind or dtype.
        ValueError: a wrong shape, size, device or name.
        RuntimeError: the backend asked for by name cannot run this.

    Squeeze-and-Excitation Networks (arXiv 1709.01507, 3); MobileNetV3 (arXiv 1905.02244, 5.3) with gate="hardsigmoid".

    Example:
        >>> x, w1, w2 = torch.randn(2, 16, 9, 9), torch.randn(4, 16, 1, 1), torch.randn(16, 4, 1, 1)
        >>> y = EF.squeeze_excite2d(x, w1, None, w2, None, gate="hardsigmoid")
        >>> gates = F.hardsigmoid(F.conv2d(F.relu(F.conv2d(x.mean((2, 3), keepdim=True), w1)), w2))
        >>> torch.allclose(y, x * gates, atol=1e-5)
        True
    """
    op = "squeeze_excite2d"
    if torch._C._is_any_autocast_enabled() and (dtype := check.autocast_dtype(op, input)) is not None:
        tensors = (input, reduce_weight, reduce_bias, expand_weight, expand_bias)
        input, reduce_weight, reduce_bias, expand_weight, expand_bias = [check.cast(t, dtype) for t in tensors]
    kind = check.check_input(op, input)
    check.check_like(op, "reduce_weight", reduce_weight, kind, "[Cr,C,1,1]")
    check.check_like(op, "expand_weight", expand_weight, kind, "[C,Cr,1,1]")
    geometry, between = _plan(
        op, input.shape, reduce_weight.shape, expand_weight.shape, input.stride(), activation, gate
    )
    if reduce_bias is not None:
        check.check_vector(op, "reduce_bias", reduce_bias, between, kind)
    if expand_bias is not None:
        check.check_vector(op, "expand_bias", expand_bias, input.shape[1], kind)
    if sums is not None:
        _check_sums(op, sums, input)
    call = backends.Call("se", op, input, reduce_weight, expand_weight, geometry, tuple(input.shape))
    taken = backends.choose(call, backend)
    tensors = (input, reduce_weight, reduce_bias, expand_weight, expand_bias)
    if taken == "reference":
        return _reference(input, Excitation(*tensors[1:], *geometry[1:]), geometry[0])
    return run_kernels(_se.SqueezeExcite2dFunction, _se.KERNELS, taken, (*tensors, sums), geometry)


def _check_sums(op: str, sums: Tensor, input: Tensor) -> None:
    """Sums over the pixels of each image that somebody took before."""
    if not isinstance(sums, Tensor):
        raise TypeError(f"{op}: sums must be a tensor [N,C] or None; got {type(sums).__name__}")
    dtype = sums_dtype(input)
    if sums.dtype != dtype or sums.device != input.device:
        raise TypeError(f"{op}: sums must be {dtype} on {input.device}; got {sums.dtype} on {sums.device}")
    if sums.shape != input.shape[:2]:
        raise ValueError(f"{op}: sums must be {check.shape_text(input.shape[:2])}; got {check.shape_text(sums.shape)}")
    if sums.requires_grad:
        raise ValueError(f"{op}: sums must not require a gradient; detach them")
