"""Host time of a call above its kernels: what Python, dispatch, autograd and allocation cost on a tiny input.

    overhead = public call on 1x8x4x4 - time inside the kernels
    time inside the kernels = raw operator on 1x8x4x4 - the same raw operator on 0x8x4x4

The raw operator on an empty batch dispatches and allocates but has no work to do, so exactly the kernels' work is
subtracted. The public call has backend="cpp", so that `auto` cannot choose differently from one machine to the next;
`auto` is listed beside it. Forward + backward is the call and torch.autograd.grad for every tensor. One thread, median
over blocks of calls.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional as F

from benchmarks import gate, timing

CHANNELS, OUT, SIZE = 8, 8, 4
_RELU = 1
# stride, pads, dilation, multiplier, channels_last, activation, post_activation, ..., bank (schemas.inc)
_DW_GEOMETRY = [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, _RELU, 0, 0]
_DS_GEOMETRY = [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, _RELU, 0, 0, 0]
_SLOPES = [0.01, 0.01]


def _tensors(batch: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, CHANNELS, SIZE, SIZE, generator=generator)
    dw = torch.randn(CHANNELS, 1, 3, 3, generator=generator)
    pw = torch.randn(OUT, CHANNELS, 1, 1, generator=generator)
    return x, dw, pw, torch.randn(OUT, generator=generator)


def _raw_ds(batch: int) -> tuple[Callable[[], object], Callable[[], object]]:
    x, dw, pw, bias = _tensors(batch)
    forward, backward = torch.ops.effops.dsconv_fwd.default, torch.ops.effops.dsconv_bwd.default
    tensors = (x, None, dw, None, None, None, None, pw, bias, None, None, None)
    mask = sum(1 << i for i, tensor in enumerate(tensors) if tensor is not None)
    out = forward(*tensors, _DS_GEOMETRY, _SLOPES)
    return (
        lambda: forward(*tensors, _DS_GEOMETRY, _SLOPES),
        lambda: backward(out, out, *tensors, _DS_GEOMETRY, _SLOPES, mask),
    )


def _raw_dw(batch: int) -> tuple[Callable[[], object], Callable[[], object]]:
    x, dw, _, bias = _tensors(batch)
    forward, backward = torch.ops.effops.dwconv_fwd.default, torch.ops.effops.dwconv_bwd.default
    tensors = (x, dw, bias, None, None, None)
    out = forward(*tensors, _DW_GEOMETRY, _SLOPES[0])
    return (
        lambda: forward(*tensors, _DW_GEOMETRY, _SLOPES[0]),
        lambda: backward(out, out, *tensors, _DW_GEOMETRY, _SLOPES[0], 0b111),
    )


def _public(operator: str, backend: str) -> tuple[Callable[..., torch.Tensor], tuple[torch.Tensor, ...]]:
    import effops.functional as EF

    x, dw, pw, bias = _tensors(1)
    if operator == "ds_conv2d":
        return (
            lambda x, dw, pw, bias: EF.ds_conv2d(x, dw, pw, None, bias, 1, 1, activation="relu", backend=backend),
            (x, dw, pw, bias),
        )
    return (
        lambda x, dw, bias: EF.depthwise_conv2d(x, dw, bias, 1, 1, activation="relu", backend=backend),
        (x, dw, bias),
    )


def _stock(operator: str) -> tuple[Callable[..., torch.Tensor], tuple[torch.Tensor, ...]]:
    x, dw, pw, bias = _tensors(1)
    if operator == "ds_conv2d":
        return (
            lambda x, dw, pw, bias: F.relu(F.conv2d(F.conv2d(x, dw, None, 1, 1, 1, CHANNELS), pw, bias)),
            (x, dw, pw, bias),
        )
    return lambda x, dw, bias: F.relu(F.conv2d(x, dw, bias, 1, 1, 1, CHANNELS)), (x, dw, bias)


def _times(call: Callable[..., torch.Tensor], tensors: tuple[torch.Tensor, ...], time) -> tuple[float, float]:
    """Microseconds of the no-grad forward and of forward + backward."""
    with torch.no_grad():
        forward = time(lambda: call(*tensors))
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    grad = torch.ones_like(call(*tensors))
    return forward, time(lambda: torch.autograd.grad(call(*leaves), leaves, grad))


def _check(operator: str) -> None:
    call, tensors = _public(operator, "cpp")
    stock, _ = _stock(operator)
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    truth_leaves = [tensor.double().requires_grad_() for tensor in tensors]
    out, truth = call(*leaves), stock(*truth_leaves)
    gate.check(out.detach(), stock(*tensors), truth.detach(), operator)
    grads = torch.autograd.grad(out, leaves, torch.ones_like(out))
    expected = torch.autograd.grad(truth, truth_leaves, torch.ones_like(truth))
    stock_grads = torch.autograd.grad(stock(*leaves), leaves, torch.ones_like(out))
    for i, (grad, own, true) in enumerate(zip(grads, stock_grads, expected, strict=True)):
        gate.check(grad, own, true, f"{operator}, gradient {i}")


def measure(quick: bool = False) -> list[dict]:
    """One row for each operator; microseconds."""
    effort = timing.QUICK if quick else timing.Effort(min_rounds=400)

    def time(fn: Callable[[], object]) -> float:
        # A sample stays below a millisecond: the scheduler's time slices are a few, and on a busy machine most samples
        # of several milliseconds would contain another process's.
        return float(timing.measure(fn, effort, calls=20)["median_us"])

    rows = []
    for operator, raw in (("ds_conv2d", _raw_ds), ("depthwise_conv2d", _raw_dw)):
        _check(operator)
        with torch.no_grad():
            raw_forward, raw_backward = (time(fn) for fn in raw(1))
            empty_forward, empty_backward = (time(fn) for fn in raw(0))
        forward, both = _times(*_public(operator, "cpp"), time)
        auto_forward, auto_both = _times(*_public(operator, "auto"), time)
        stock_forward, stock_both = _times(*_stock(operator), time)
        body_forward, body_backward = raw_forward - empty_forward, raw_backward - empty_backward
        rows.append(
            {
                "operator": operator,
                "forward_us": forward,
                "forward_backward_us": both,
                "raw_forward_us": raw_forward,
                "raw_backward_us": raw_backward,
                "empty_forward_us": empty_forward,
                "empty_backward_us": empty_backward,
                "overhead_forward_us": round(forward - body_forward, 3),
                "overhead_forward_backward_us": round(both - body_forward - body_backward, 3),
                "auto_forward_us": auto_forward,
                "auto_forward_backward_us": auto_both,
                "stock_forward_us": stock_forward,
                "stock_forward_backward_us": stock_both,
            }
        )
    return rows
