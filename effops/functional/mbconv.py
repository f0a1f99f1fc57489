"""Inverted residual blocks (room mbconv)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from effops import _checks as check
from effops import backends
from effops._checks import Ints, Padding, Shape
from effops.functional._gradients import run_kernels
from effops.functional.dsconv import ds_conv2d
from effops.functional.se import check_excitation_weights, excitation_codes
from effops.ops import mbconv as _mbconv
from effops.ops.geometry import CHANNELS_LAST, orders_channels_last

_OP = "inverted_residual2d"
_HIDDEN_VECTORS = (
    "expand_bias", "expand_scale", "expand_shift", "dw_bias", "dw_scale", "dw_shift", "se_expand_bias",
)  # fmt: skip


class InvertedResidualPlan(NamedTuple):
    """A call as its shapes and settings determine it: the operator's int[], hidden channels, result, SE's width."""

    geometry: list[int]
    hidden: int
    shape: Shape
    se_channels: int


def inverted_residual_plan(
    input: Shape,
    expand_weight: Shape | None,
    dw_weight: Shape,
    se_weights: tuple[Shape, Shape] | None,
    project_weight: Shape,
    stride: Ints,
    padding: Padding,
    dilation: Ints,
    strides: Shape,
    activations: tuple[str, str, str, str, str, str],
    se_codes: tuple[str, str],
) -> InvertedResidualPlan:
    """Checks an inverted residual's shapes and settings.

    Args:
        input, expand_weight, dw_weight, project_weight: shapes.
        se_weights: those of the two products of the squeeze-excite, or None.
        stride, padding, dilation: as `check.as_window` returns them.
        strides: the input's, which tell the output's memory format.
        activations: activation and post_activation of expansion, depthwise and projection.
        se_codes: names of the squeeze-excite's activation and gate.

    Raises:
        TypeError: a name that is no string.
        ValueError: what does not fit.
    """
    check.require_rank(_OP, "input", input, "[N,C,H,W]")
    hidden = input[1]
    if expand_weight is not None:
        check.require_rank(_OP, "expand_weight", expand_weight, "[D,C,1,1]")
        hidden = expand_weight[0]
        if hidden == 0 or expand_weight != (hidden, input[1], 1, 1):
            what = f"[D,{input[1]},1,1] with D > 0"
            raise ValueError(f"{_OP}: expand_weight must be {what}; got {check.shape_text(expand_weight)}")
    check.require_rank(_OP, "dw_weight", dw_weight, "[D,1,R,S]")
    if dw_weight[0] != hidden:
        raise ValueError(
            f"{_OP}: dw_weight must be [{hidden},1,R,S], one kernel for each of the {hidden} "
            f"{'input' if expand_weight is None else 'expanded'} channels; got {check.shape_text(dw_weight)}"
        )
    expanded = (input[0], hidden, *input[2:])
    if 0 in input[1:]:
        expanded = input  # its own message
    dw_geometry, (n, _, p, q) = check.depthwise_plan(
        _OP, "dw_weight", expanded, dw_weight, 1, 0, 1, stride, padding, dilation, strides, "none", "none"
    )
    check.require_rank(_OP, "project_weight", project_weight, "[K,D,1,1]")
    k = project_weight[0]
    if k == 0 or project_weight != (k, hidden, 1, 1):
        what = f"[K,{hidden},1,1] with K > 0"
        raise ValueError(f"{_OP}: project_weight must be {what}; got {check.shape_text(project_weight)}")
    between = 0
    if se_weights is not None:
        between = check_excitation_weights(_OP, "se_", hidden, *se_weights)
    check.require_countable(_OP, (n, k, p, q))
    names = [prefix + name for prefix in ("expand_", "dw_", "") for name in ("activation", "post_activation")]
    codes = [check.activation_code(_OP, name, value) for name, value in zip(names, activations, strict=True)]
    last = int(orders_channels_last(input, strides))  # the strides are not those of the expanded tensor
    se = excitation_codes(_OP, "se_", *se_codes)
    geometry = [*dw_geometry[:CHANNELS_LAST], last, *codes[2:4], *codes[4:], *codes[:2], *se, 0]
    return InvertedResidualPlan(geometry, hidden, (n, k, p, q), between)


_plan = check.cached(inverted_residual_plan)


def inverted_residual2d(
    input: Tensor,
    expand_weight: Tensor | None,
    dw_weight: Tensor,
    project_weight: Tensor,
    expand_bias: Tensor | None = None,
    dw_bias: Tensor | None = None,
    project_bias: Tensor | None = None,
    stride: Ints = 1,
    padding: Padding = 0,
    dilation: Ints = 1,
    *,
    expand_activation: str = "none",
    expand_negative_slope: float = 0.01,
    expand_scale: Tensor | None = None,
    expand_shift: Tensor | None = None,
    expand_post_activation: str = "none",
    dw_activation: str = "none",
    dw_negative_slope: float = 0.01,
    dw_scale: Tensor | None = None,
    dw_shift: Tensor | None = None,
    dw_post_activation: str = "none",
    se_reduce_weight: Tensor | None = None,
    se_reduce_bias: Tensor | None = None,
    se_expand_weight: Tensor | None = None,
    se_expand_bias: Tensor | None = None,
    se_activation: str = "relu",
    se_gate: str = "sigmoid",
    activation: str = "none",
    negative_slope: float = 0.01,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    post_activation: str = "none",
    backend: str = "auto",
) -> Tensor:
    """y = project_chain(excite(dw_chain(expand_chain(input)))) as one kernel: the expanded tensor is not stored.

        expand_chain(x) = post_act(act(conv2d(x, expand_weight) + expand_bias) * expand_scale + expand_shift)
        dw_chain(e)     = post_act(act(depthwise_conv2d(e, dw_weight) + dw_bias) * dw_scale + dw_shift)
        excite(z)       = z * gate(W2 act(W1 mean(z) + b1) + b2), where se_reduce_weight is given
        project_chain(z) = post_act(act(conv2d(z, project_weight) + project_bias) * scale + shift + residual)

    each with its own act and post_act. The padding of the depthwise convolution is zero, not what the expansion's
    epilogue makes of zero.

    Args:
        input: [N,C,H,W]; any strides; N may be 0.
        expand_weight: [D,C,1,1], or None: no expansion (D = C).
        dw_weight: [D,1,R,S].
        project_weight: [K,D,1,1].
        expand_bias, expand_scale, expand_shift: [D], or None; only with expand_weight.
        dw_bias, dw_scale, dw_shift: [D], or None.
        project_bias, scale, shift: [K], or None.
        stride, padding, dilation: the depthwise convolution's, as `depthwise_conv2d`.
        expand_activation, expand_negative_slope, expand_post_activation: of the expansion's epilogue.
        dw_activation, dw_negative_slope, dw_post_activation: of the depthwise's.
        se_reduce_weight, se_reduce_bias, se_expand_weight, se_expand_bias: W1 [Dr,D,1,1], b1 [Dr] or None, W2
            [D,Dr,1,1], b2 [D] or None; both weights or neither.
        se_activation, se_gate: as `squeeze_excite2d`'s activation and gate.
        activation, negative_slope, residual, post_activation: of the projection's epilogue; residual is [N,K,P,Q].
        backend: "auto" or a backend's name.

    Returns:
        [N,K,P,Q] of the input's dtype, channels_last where the input's strides are.

    Raises:
        TypeError: an argument of a wrong kind or dtype.
        ValueError: a wrong shape, size, device or name.
        RuntimeError: the backend asked for by name cannot run this.

    Without expansion and squeeze-excite this is `ds_conv2d`. MobileNetV2 (arXiv 1801.04381, 3.3), MobileNetV3 (arXiv
    1905.02244), EfficientNet (arXiv 1905.11946).

    Example:
        >>> x = torch.randn(2, 8, 9, 9)
        >>> expand, dw, project = torch.randn(48, 8, 1, 1), torch.randn(48, 1, 3, 3), torch.randn(8, 48, 1, 1)
        >>> acts = {"expand_activation": "relu6", "dw_activation": "relu6"}
        >>> y = EF.inverted_residual2d(x, expand, dw, project, padding=1, **acts, residual=x)
        >>> stock = F.relu6(F.conv2d(F.relu6(F.conv2d(x, expand)), dw, padding=1, groups=48))
        >>> torch.allclose(y, F.conv2d(stock, project) + x, atol=1e-3)
        True
    """
    if torch._C._is_any_autocast_enabled() and (dtype := check.autocast_dtype(_OP, input)) is not None:
        operands = (
            input, expand_weight, expand_bias, dw_weight, dw_bias, se_reduce_weight, se_reduce_bias, se_expand_weight,
            se_expand_bias, project_weight, project_bias, residual,
        )  # fmt: skip
        (
            input, expand_weight, expand_bias, dw_weight, dw_bias, se_reduce_weight, se_reduce_bias, se_expand_weight,
            se_expand_bias, project_weight, project_bias, residual,
        ) = [check.cast(t, dtype) for t in operands]  # fmt: skip
        affine = (expand_scale, expand_shift, dw_scale, dw_shift, scale, shift)
        expand_scale, expand_shift, dw_scale, dw_shift, scale, shift = [check.cast_affine(t, dtype) for t in affine]
    kind = check.check_input(_OP, input)
    if expand_weight is not None:
        check.check_like(_OP, "expand_weight", expand_weight, kind, "[D,C,1,1]")
    else:
        _refuse_expansion(expand_bias, expand_scale, expand_shift, expand_activation, expand_post_activation)
    check.check_like(_OP, "dw_weight", dw_weight, kind, "[D,1,R,S]")
    check.check_like(_OP, "project_weight", project_weight, kind, "[K,D,1,1]")
    se_weights = _se_shapes(kind, se_reduce_weight, se_reduce_bias, se_expand_weight, se_expand_bias)
    stride, padding, dilation = check.as_window(_OP, stride, padding, dilation)
    geometry, hidden, shape, se_channels = _plan(
        input.shape, None if expand_weight is None else expand_weight.shape, dw_weight.shape, se_weights,
        project_weight.shape, stride, padding, dilation, input.stride(),
        (expand_activation, expand_post_activation, dw_activation, dw_post_activation, activation, post_activation),
        (se_activation, se_gate),
    )  # fmt: skip
    of_hidden = (expand_bias, expand_scale, expand_shift, dw_bias, dw_scale, dw_shift, se_expand_bias)
    check.check_vectors(_OP, zip(_HIDDEN_VECTORS, of_hidden, strict=True), hidden, kind)
    check.check_vectors(_OP, [("se_reduce_bias", se_reduce_bias)], se_channels, kind)
    check.check_vectors(_OP, [("project_bias", project_bias), ("scale", scale), ("shift", shift)], shape[1], kind)
    if residual is not None:
        check.check_residual(_OP, "residual", residual, shape, kind)
    slopes = [
        check.check_slope(_OP, "expand_negative_slope", expand_negative_slope),
        check.check_slope(_OP, "dw_negative_slope", dw_negative_slope),
        check.check_slope(_OP, "negative_slope", negative_slope),
    ]
    if expand_weight is None and se_weights is None:
        return ds_conv2d(
            input, dw_weight, project_weight, dw_bias, project_bias, stride, padding, dilation,
            dw_activation=dw_activation, dw_negative_slope=dw_negative_slope, dw_scale=dw_scale, dw_shift=dw_shift,
            dw_post_activation=dw_post_activation, activation=activation, negative_slope=negative_slope, scale=scale,
            shift=shift, residual=residual, post_activation=post_activation, backend=backend,
        )  # fmt: skip
    taken = backends.choose(backends.Call("mbconv", _OP, input, dw_weight, project_weight, geometry, shape), backend)
    tensors = (
        input, expand_weight, expand_bias, expand_scale, expand_shift, dw_weight, dw_bias, dw_scale, dw_shift,
        se_reduce_weight, se_reduce_bias, se_expand_weight, se_expand_bias,
        project_weight, project_bias, scale, shift, residual,
    )  # fmt: skip
    if taken == "reference":
        return _mbconv.run_reference(tensors, geometry, slopes)
    return run_kernels(_mbconv.InvertedResidual2dFunction, _mbconv.KERNELS, taken, tensors, geometry, slopes)


def _refuse_expansion(bias, scale, shift, activation, post_activation) -> None:
    """Without an expansion there is nothing that its epilogue could follow."""
    vectors = (("expand_bias", bias), ("expand_scale", scale), ("expand_shift", shift))
    given = [name for name, vector in vectors if vector is not None]
    names = (("expand_activation", activation), ("expand_post_activation", post_activation))
    given += [name for name, word in names if word != "none"]
    if given:
        raise ValueError(f"{_OP}: {', '.join(given)} given without expand_weight; accepted: with it")


def _se_shapes(kind, reduce_weight, reduce_bias, expand_weight, expand_bias) -> tuple[Shape, Shape] | None:
    """The shapes of the squeeze-excite's two weights; None where there is none."""
    if reduce_weight is None and expand_weight is None:
        if reduce_bias is not None or expand_bias is not None:
            raise ValueError(f"{_OP}: a bias of the squeeze-excite is given without its weights; accepted: with them")
        return None
    if reduce_weight is None or expand_weight is None:
        missing = "se_reduce_weight" if reduce_weight is None else "se_expand_weight"
        raise ValueError(f"{_OP}: {missing} is missing; accepted: both weights of the squeeze-excite, or neither")
    check.check_like(_OP, "se_reduce_weight", reduce_weight, kind, "[Dr,D,1,1]")
    check.check_like(_OP, "se_expand_weight", expand_weight, kind, "[D,Dr,1,1]")
    return reduce_weight.shape, expand_weight.shape
