"""Every message that bad input gets: the exception's type and, word for word, its first line."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import effops
import effops.functional as EF
from effops.ops.dwconv import banks
from effops.ops.epilogue import activate

ACTIVATIONS = "none, relu, relu6, leaky_relu, silu, hardswish, hardsigmoid, sigmoid, gelu"
FLOATS = "float32, float64, float16, bfloat16"
PAIR = "an int or a pair (height, width) of ints"
PADDING = "an int, a pair (height, width), four ints (left, right, top, bottom), 'same' or 'valid'"


def x(*shape: int, **kwargs: Any) -> torch.Tensor:
    return torch.ones(shape or (2, 8, 9, 10), **kwargs)


def dw(input: Any = None, weight: Any = None, bias: Any = None, *args: Any, **kwargs: Any) -> Any:
    """depthwise_conv2d on float32[2,8,9,10] and float32[8,1,3,3] but for what is given."""
    return EF.depthwise_conv2d(
        x() if input is None else input, x(8, 1, 3, 3) if weight is None else weight, bias, *args, **kwargs
    )


def ds(input: Any = None, dw_weight: Any = None, pw_weight: Any = None, *args: Any, **kwargs: Any) -> Any:
    """ds_conv2d on float32[2,8,9,10], [8,1,3,3] and [6,8,1,1] but for what is given."""
    tensors = [
        default if given is None else given
        for given, default in ((input, x()), (dw_weight, x(8, 1, 3, 3)), (pw_weight, x(6, 8, 1, 1)))
    ]
    return EF.ds_conv2d(*tensors, *args, **kwargs)


def meta(*shape: int) -> torch.Tensor:
    return torch.ones(shape, device="meta")


# (call, exception, first line)
CASES: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    # -- the input
    "input-list": (lambda: dw([[1.0]]), TypeError, "depthwise_conv2d: input must be a tensor [N,C,H,W]; got list"),
    "input-number": (lambda: ds(3), TypeError, "ds_conv2d: input must be a tensor [N,C,H,W]; got 3 (int)"),
    "input-array": (
        lambda: dw(np.ones((1, 8, 9, 9))), TypeError, "depthwise_conv2d: input must be a tensor [N,C,H,W]; got ndarray",
    ),
    "input-rank3": (
        lambda: dw(x(8, 9, 10)), ValueError,
        "depthwise_conv2d: input must have 4 dimensions [N,C,H,W]; got 3: [8,9,10]",
    ),
    "input-rank5": (
        lambda: ds(x(1, 2, 8, 9, 9)), ValueError,
        "ds_conv2d: input must have 4 dimensions [N,C,H,W]; got 5: [1,2,8,9,9]",
    ),
    "input-int": (
        lambda: dw(x(dtype=torch.int32)), TypeError,
        f"depthwise_conv2d: input has dtype torch.int32; accepted: {FLOATS}",
    ),
    "input-bool": (
        lambda: ds(x(dtype=torch.bool)), TypeError, f"ds_conv2d: input has dtype torch.bool; accepted: {FLOATS}",
    ),
    "input-complex": (
        lambda: dw(x(dtype=torch.complex64)), TypeError,
        f"depthwise_conv2d: input has dtype torch.complex64; accepted: {FLOATS}",
    ),
    "input-sparse": (
        lambda: dw(x().to_sparse()), TypeError,
        "depthwise_conv2d: input has layout torch.sparse_coo; accepted: a dense (strided) tensor",
    ),
    "input-no_channels": (
        lambda: dw(x(2, 0, 9, 9)), ValueError,
        "depthwise_conv2d: input must have positive sizes, only the batch may be 0; got [2,0,9,9]",
    ),
    "input-no_width": (
        lambda: ds(x(2, 8, 9, 0)), ValueError,
        "ds_conv2d: input must have positive sizes, only the batch may be 0; got [2,8,9,0]",
    ),
    "input-under_autocast": (
        lambda: under_autocast(lambda: dw([1.0])), TypeError,
        "depthwise_conv2d: input must be a tensor [N,C,H,W]; got list",
    ),
    # -- the depthwise weight
    "weight-number": (
        lambda: dw(weight=1.5), TypeError,
        "depthwise_conv2d: weight must be a tensor [K,1,R,S], a bank [B,R,S] or a bank's name; got 1.5 (float)",
    ),
    "weight-rank2": (
        lambda: dw(weight=x(3, 3)), ValueError,
        "depthwise_conv2d: weight must have 4 dimensions [K,1,R,S]; got 2: [3,3]",
    ),
    "weight-not_depthwise": (
        lambda: dw(weight=x(8, 8, 3, 3)), ValueError,
        "depthwise_conv2d: weight must be [K,1,R,S], one input channel a kernel; got [8,8,3,3]",
    ),
    "weight-no_kernels": (
        lambda: dw(weight=x(0, 1, 3, 3)), ValueError,
        "depthwise_conv2d: weight must have positive sizes, none may be 0; got [0,1,3,3]",
    ),
    "weight-no_height": (
        lambda: ds(dw_weight=x(8, 1, 0, 3)), ValueError,
        "ds_conv2d: dw_weight must have positive sizes, none may be 0; got [8,1,0,3]",
    ),
    "weight-dtype": (
        lambda: dw(weight=x(8, 1, 3, 3, dtype=torch.float64)), TypeError,
        "depthwise_conv2d: weight has dtype torch.float64 but input has torch.float32; accepted: the input's dtype",
    ),
    "weight-int": (
        lambda: dw(weight=x(8, 1, 3, 3, dtype=torch.int64)), TypeError,
        f"depthwise_conv2d: weight has dtype torch.int64; accepted: {FLOATS}",
    ),
    "weight-device": (
        lambda: dw(weight=meta(8, 1, 3, 3)), ValueError,
        "depthwise_conv2d: weight is on meta but input is on cpu; accepted: one device for all",
    ),
    "weight-sparse": (
        lambda: dw(weight=x(8, 1, 3, 3).to_sparse()), TypeError,
        "depthwise_conv2d: weight has layout torch.sparse_coo; accepted: a dense (strided) tensor",
    ),
    "weight-channels": (
        lambda: dw(weight=x(12, 1, 3, 3)), ValueError,
        "depthwise_conv2d: weight has 12 kernels but input has 8 channels; accepted: a multiple of the channels",
    ),
    "weight-fewer_than_channels": (
        lambda: ds(dw_weight=x(2, 1, 3, 3)), ValueError,
        "ds_conv2d: dw_weight has 2 kernels but input has 8 channels; accepted: a multiple of the channels "
        "(one kernel for 4 channels each: see share)",
    ),
    "weight-share_mismatch": (
        lambda: ds(dw_weight=x(2, 1, 3, 3), dw_share=3), ValueError,
        "ds_conv2d: dw_weight has 2 kernels shared by 3 chunks of channels but input has 8 channels; "
        "accepted: a multiple of the channels (one kernel for 4 channels each: see share)",
    ),
    "shared-not_a_divisor": (
        lambda: EF.shared_depthwise_conv2d(x(), x(3, 1, 3, 3)), ValueError,
        "shared_depthwise_conv2d: weight has 3 kernels but input has 8 channels; accepted: a divisor of the channels",
    ),
    "shared-rank3": (
        lambda: EF.shared_depthwise_conv2d(x(), x(4, 3, 3)), ValueError,
        "shared_depthwise_conv2d: weight must have 4 dimensions [B,1,R,S]; got 3: [4,3,3]",
    ),
    "shared-name": (
        lambda: EF.shared_depthwise_conv2d(x(), "vgnet8"), TypeError,
        "shared_depthwise_conv2d: weight must be a tensor [B,1,R,S]; got 'vgnet8' (str)",
    ),
    "share-float": (
        lambda: ds(dw_share=2.0), TypeError, "ds_conv2d: dw_share must be an int; got 2.0 (float)",
    ),
    "share-zero": (
        lambda: EF.depthwise_stats2d(x(), x(8, 1, 3, 3), share=0), ValueError,
        "depthwise_stats2d: share must be at least 1; got 0",
    ),
    "bank-unknown": (
        lambda: EF.fixed_filter_conv2d(x(), "sobel"), ValueError,
        "fixed_filter_conv2d: unknown bank 'sobel'; accepted: 'vgnet8', 'vgnet4', 'vgnet_blur', "
        "'vgnet_blur_alternate', 'binomial3', 'binomial5', or a tensor [K,R,S]",
    ),
    "bank-multiplier": (
        lambda: EF.fixed_filter_conv2d(x(), "vgnet8", multiplier=0), ValueError,
        "fixed_filter_conv2d: multiplier must be at least 1; got 0",
    ),
    "bank-multiplier_bool": (
        lambda: EF.fixed_filter_conv2d(x(), "vgnet8", multiplier=True), TypeError,
        "fixed_filter_conv2d: multiplier must be an int; got True (bool)",
    ),
    "bank-sigma": (lambda: banks.gaussian(0.0), ValueError, "sigma must be positive; got 0.0"),
    "bank-size": (lambda: banks.gaussian(1.0, 4), ValueError, "size must be a positive odd integer; got 4"),
    # -- the pointwise weight, passthrough, keep
    "pw-list": (lambda: ds(pw_weight=[1]), TypeError, "ds_conv2d: pw_weight must be a tensor [K,C,1,1]; got list"),
    "pw-rank2": (
        lambda: ds(pw_weight=x(6, 8)), ValueError,
        "ds_conv2d: pw_weight must have 4 dimensions [K,C,1,1]; got 2: [6,8]",
    ),
    "pw-not_pointwise": (
        lambda: ds(pw_weight=x(6, 8, 3, 3)), ValueError,
        "ds_conv2d: pw_weight must be [K,C,1,1] with K > 0; got [6,8,3,3]",
    ),
    "pw-no_outputs": (
        lambda: ds(pw_weight=x(0, 8, 1, 1)), ValueError,
        "ds_conv2d: pw_weight must be [K,C,1,1] with K > 0; got [0,8,1,1]",
    ),
    "pw-dtype": (
        lambda: ds(pw_weight=x(6, 8, 1, 1, dtype=torch.bfloat16)), TypeError,
        "ds_conv2d: pw_weight has dtype torch.bfloat16 but input has torch.float32; accepted: the input's dtype",
    ),
    "pw-device": (
        lambda: ds(pw_weight=meta(6, 8, 1, 1)), ValueError,
        "ds_conv2d: pw_weight is on meta but input is on cpu; accepted: one device for all",
    ),
    "pw-channels": (
        lambda: ds(pw_weight=x(6, 9, 1, 1)), ValueError,
        "ds_conv2d: pw_weight takes 9 channels but the depthwise convolution gives 8 channels; accepted: [K,8,1,1]",
    ),
    "pw-channels_beside_passthrough": (
        lambda: ds(pw_weight=x(6, 8, 1, 1), passthrough=x(2, 3, 7, 8)), ValueError,
        "ds_conv2d: pw_weight takes 8 channels but the depthwise convolution gives 8 channels, beside 3 of "
        "passthrough; accepted: [K,11,1,1]",
    ),
    "pw-channels_of_a_bank": (
        lambda: EF.downsampling2d(x(), "vgnet_blur", x(6, 9, 1, 1), keep=2), ValueError,
        "downsampling2d: pw_weight takes 9 channels but the depthwise convolution gives 8 channels; "
        "accepted: [K,8,1,1]",
    ),
    "passthrough-size": (
        lambda: ds(pw_weight=x(6, 11, 1, 1), passthrough=x(2, 3, 9, 10)), ValueError,
        "ds_conv2d: passthrough must be [N,C,P,Q] of the depthwise convolution's output size, [2,C,7,8] with C > 0; "
        "got [2,3,9,10]",
    ),
    "passthrough-dtype": (
        lambda: ds(pw_weight=x(6, 11, 1, 1), passthrough=x(2, 3, 7, 8, dtype=torch.float64)), TypeError,
        "ds_conv2d: passthrough has dtype torch.float64 but input has torch.float32; accepted: the input's dtype",
    ),
    "passthrough-kind": (
        lambda: ds(passthrough=1), TypeError, "ds_conv2d: passthrough must be a tensor [N,C,P,Q]; got 1 (int)",
    ),
    "left-kind": (
        lambda: EF.half_identity2d([1], x(), x(8, 1, 3, 3), x(6, 16, 1, 1)), TypeError,
        "half_identity2d: left must be a tensor [N,C,H,W]; got list",
    ),
    "left-none": (
        lambda: EF.half_identity2d(None, x(), x(8, 1, 3, 3), x(6, 8, 1, 1)), TypeError,
        "half_identity2d: left must be a tensor [N,C,H,W]; got NoneType",
    ),
    "left-size": (
        lambda: EF.half_identity2d(x(2, 8, 8, 8), x(), x(8, 1, 3, 3), x(6, 16, 1, 1)), ValueError,
        "half_identity2d: left must be [N,C,P,Q] of the depthwise convolution's output size, [2,C,9,10] with C > 0; "
        "got [2,8,8,8]",
    ),
    "right-rank": (
        lambda: EF.half_identity2d(x(), x(8, 9, 10), x(8, 1, 3, 3), x(6, 16, 1, 1)), ValueError,
        "half_identity2d: right must have 4 dimensions [N,C,H,W]; got 3: [8,9,10]",
    ),
    "batch_norm-kind": (
        lambda: ds(batch_norm=1e-5), TypeError,
        "ds_conv2d: batch_norm must be an effops.functional.BatchNorm or None; got 1e-05 (float)",
    ),
    "batch_norm-and_scale": (
        lambda: ds(batch_norm=EF.BatchNorm(), shift=x(6)), ValueError,
        "ds_conv2d: batch_norm stands in the place of scale and shift; give one or the other",
    ),
    "batch_norm-weight": (
        lambda: ds(batch_norm=EF.BatchNorm(weight=x(4))), ValueError,
        "ds_conv2d: batch_norm.weight must be [6], one value an output channel; got [4]",
    ),
    "batch_norm-running_var": (
        lambda: ds(batch_norm=EF.BatchNorm(running_var=x(6, dtype=torch.float64))), TypeError,
        "ds_conv2d: batch_norm.running_var has dtype torch.float64; accepted: the input's torch.float32, or "
        "torch.float32",
    ),
    "keep-float": (lambda: ds(keep=1.0), TypeError, "ds_conv2d: keep must be an int; got 1.0 (float)"),
    "keep-negative": (lambda: ds(keep=-1), ValueError, "ds_conv2d: keep must be at least 0; got -1"),
    "keep-too_many": (
        lambda: ds(keep=9), ValueError,
        "ds_conv2d: keep must be from 0 to the depthwise convolution's 8 channels; got 9",
    ),
    # -- per-channel vectors and residuals
    "bias-scalar": (
        lambda: dw(bias=1.0), TypeError,
        "depthwise_conv2d: bias must be a tensor [8], one value an output channel; got 1.0 (float)",
    ),
    "bias-0d": (
        lambda: dw(bias=torch.tensor(1.0)), ValueError,
        "depthwise_conv2d: bias must be [8], one value an output channel; got []",
    ),
    "bias-length": (
        lambda: dw(bias=x(9)), ValueError,
        "depthwise_conv2d: bias must be [8], one value an output channel; got [9]",
    ),
    "bias-dtype": (
        lambda: dw(bias=x(8, dtype=torch.float64)), TypeError,
        "depthwise_conv2d: bias has dtype torch.float64; accepted: the input's torch.float32, or torch.float32",
    ),
    "bias-device": (
        lambda: dw(bias=meta(8)), ValueError,
        "depthwise_conv2d: bias is on meta but input is on cpu; accepted: one device for all",
    ),
    "bias-sparse": (
        lambda: dw(bias=x(8).to_sparse()), TypeError,
        "depthwise_conv2d: bias has layout torch.sparse_coo; accepted: a dense (strided) tensor",
    ),
    "scale-scalar": (
        lambda: dw(scale=2), TypeError,
        "depthwise_conv2d: scale must be a tensor [8], one value an output channel; got 2 (int)",
    ),
    "shift-2d": (
        lambda: dw(shift=x(8, 1)), ValueError,
        "depthwise_conv2d: shift must be [8], one value an output channel; got [8,1]",
    ),
    "dw_bias-length": (
        lambda: ds(dw_bias=x(6)), ValueError,
        "ds_conv2d: dw_bias must be [8], one value an output channel; got [6]",
    ),
    "dw_scale-length": (
        lambda: ds(dw_scale=x(6)), ValueError,
        "ds_conv2d: dw_scale must be [8], one value an output channel; got [6]",
    ),
    "dw_shift-list": (
        lambda: ds(dw_shift=[1.0] * 8), TypeError,
        "ds_conv2d: dw_shift must be a tensor [8], one value an output channel; got list",
    ),
    "pw_bias-length": (
        lambda: ds(pw_bias=x(8)), ValueError,
        "ds_conv2d: pw_bias must be [6], one value an output channel; got [8]",
    ),
    "pw_scale-int": (
        lambda: ds(scale=x(6, dtype=torch.int32)), TypeError,
        "ds_conv2d: scale has dtype torch.int32; accepted: the input's torch.float32, or torch.float32",
    ),
    "pw_shift-length": (
        lambda: ds(shift=x(1)), ValueError, "ds_conv2d: shift must be [6], one value an output channel; got [1]",
    ),
    "stats-bias": (
        lambda: EF.depthwise_stats2d(x(), x(8, 1, 3, 3), x(4)), ValueError,
        "depthwise_stats2d: bias must be [8], one value an output channel; got [4]",
    ),
    "residual-shape": (
        lambda: dw(residual=x()), ValueError,
        "depthwise_conv2d: residual must be [2,8,7,8], the convolution's output shape; got [2,8,9,10]",
    ),
    "residual-broadcast": (
        lambda: ds(residual=x(1, 6, 7, 8)), ValueError,
        "ds_conv2d: residual must be [2,6,7,8], the convolution's output shape; got [1,6,7,8]",
    ),
    "residual-kind": (
        lambda: ds(dw_residual=1.0), TypeError,
        "ds_conv2d: dw_residual must be a tensor [2,8,7,8], the convolution's output shape; got 1.0 (float)",
    ),
    "residual-dtype": (
        lambda: dw(residual=x(2, 8, 7, 8, dtype=torch.bfloat16)), TypeError,
        "depthwise_conv2d: residual has dtype torch.bfloat16 but input has torch.float32; accepted: the input's dtype",
    ),
    "residual-device": (
        lambda: dw(residual=meta(2, 8, 7, 8)), ValueError,
        "depthwise_conv2d: residual is on meta but input is on cpu; accepted: one device for all",
    ),
    "residual-sparse": (
        lambda: dw(residual=x(2, 8, 7, 8).to_sparse()), TypeError,
        "depthwise_conv2d: residual has layout torch.sparse_coo; accepted: a dense (strided) tensor",
    ),
    # -- stride, padding, dilation
    "stride-zero": (lambda: dw(stride=0), ValueError, "depthwise_conv2d: stride must be at least 1; got 0"),
    "stride-negative": (lambda: ds(stride=(1, -2)), ValueError, "ds_conv2d: stride must be at least 1; got (1, -2)"),
    "stride-float": (
        lambda: dw(stride=2.0), TypeError, f"depthwise_conv2d: stride must be {PAIR}; got 2.0 (float)",
    ),
    "stride-float_in_pair": (
        lambda: dw(stride=(1, 1.0)), TypeError, f"depthwise_conv2d: stride must be {PAIR}; got (1, 1.0) (float)",
    ),
    "stride-bool": (lambda: dw(stride=True), TypeError, f"depthwise_conv2d: stride must be {PAIR}; got True (bool)"),
    "stride-none": (lambda: ds(stride=None), TypeError, f"ds_conv2d: stride must be {PAIR}; got None (NoneType)"),
    "stride-word": (lambda: ds(stride="same"), TypeError, f"ds_conv2d: stride must be {PAIR}; got 'same' (str)"),
    "stride-tensor": (
        lambda: dw(stride=torch.tensor(2)), TypeError,
        f"depthwise_conv2d: stride must be {PAIR}; got tensor(2) (Tensor)",
    ),
    "stride-triple": (
        lambda: dw(stride=(1, 1, 1)), ValueError,
        f"depthwise_conv2d: stride has 3 elements: (1, 1, 1); accepted: {PAIR}",
    ),
    "stride-single": (
        lambda: dw(stride=[2]), ValueError, f"depthwise_conv2d: stride has 1 elements: [2]; accepted: {PAIR}",
    ),
    "stride-over_int": (
        lambda: dw(stride=2**31), ValueError,
        "depthwise_conv2d: stride must be at most 2**31 - 1 = 2147483647; got 2147483648",
    ),
    "dilation-zero": (
        lambda: dw(dilation=(0, 1)), ValueError, "depthwise_conv2d: dilation must be at least 1; got (0, 1)",
    ),
    "dilation-float": (lambda: ds(dilation=1.5), TypeError, f"ds_conv2d: dilation must be {PAIR}; got 1.5 (float)"),
    "dilation-over_int": (
        lambda: ds(dilation=2**40), ValueError,
        "ds_conv2d: dilation must be at most 2**31 - 1 = 2147483647; got 1099511627776",
    ),
    "padding-negative": (lambda: dw(padding=-1), ValueError, "depthwise_conv2d: padding must be at least 0; got -1"),
    "padding-negative_side": (
        lambda: dw(padding=(1, 1, -1, 1)), ValueError, "depthwise_conv2d: padding must be at least 0; got (-1, 1)",
    ),
    "padding-float": (
        lambda: dw(padding=(1.0, 1)), TypeError, f"depthwise_conv2d: padding must be {PADDING}; got (1.0, 1) (float)",
    ),
    "padding-triple": (
        lambda: ds(padding=(1, 1, 1)), ValueError, f"ds_conv2d: padding has 3 elements: (1, 1, 1); accepted: {PADDING}",
    ),
    "padding-word": (
        lambda: dw(padding="full"), ValueError,
        "depthwise_conv2d: unknown padding 'full'; accepted: 'same', 'valid', an int, (height, width) or "
        "(left, right, top, bottom)",
    ),
    "padding-same_strided": (
        lambda: dw(stride=2, padding="same"), ValueError,
        "depthwise_conv2d: padding='same' needs stride 1, as in torch; got stride (2, 2); pass the padding as ints",
    ),
    "padding-over_int": (
        lambda: dw(padding=2**31), ValueError,
        "depthwise_conv2d: padding must be at most 2**31 - 1 = 2147483647; got 2147483648",
    ),
    "window-too_large": (
        lambda: dw(x(2, 8, 2, 10)), ValueError,
        "depthwise_conv2d: the window is larger than the padded input: 3x3 (kernel 3x3, dilation 1x1) against 2x10 "
        "(input 2x10, padding left 0, right 0, top 0, bottom 0); accepted: a window no larger than the padded input",
    ),
    "window-too_large_dilated": (
        lambda: ds(dilation=(1, 7), padding=(1, 2, 3, 4)), ValueError,
        "ds_conv2d: the window is larger than the padded input: 3x15 (kernel 3x3, dilation 1x7) against 16x13 "
        "(input 9x10, padding left 1, right 2, top 3, bottom 4); accepted: a window no larger than the padded input",
    ),
    "output-too_many_elements": (
        lambda: dw(padding=2**31 - 1), ValueError,
        "depthwise_conv2d: the output [2,8,4294967301,4294967302] would have more than 2**63 - 1 elements; "
        "accepted: fewer",
    ),
    "output-too_many_elements_pointwise": (
        lambda: ds(meta(1, 1, 2**29, 2**29), meta(1, 1, 1, 1), meta(1, 1, 1, 1).expand(64, 1, 1, 1)), ValueError,
        "ds_conv2d: the output [1,64,536870912,536870912] would have more than 2**63 - 1 elements; accepted: fewer",
    ),
    # -- epilogue settings
    "activation-unknown": (
        lambda: dw(activation="swish"), ValueError,
        f"depthwise_conv2d: unknown activation 'swish'; accepted: {ACTIVATIONS}",
    ),
    "activation-kind": (
        lambda: dw(activation=torch.relu), TypeError,
        "depthwise_conv2d: activation must be a string; got builtin_function_or_method; accepted: " + ACTIVATIONS,
    ),
    "activation-unhashable": (
        lambda: dw(activation=["relu"]), TypeError,
        f"depthwise_conv2d: activation must be a string; got list; accepted: {ACTIVATIONS}",
    ),
    "activation-none": (
        lambda: ds(activation=None), TypeError,
        f"ds_conv2d: activation must be a string; got NoneType; accepted: {ACTIVATIONS}",
    ),
    "post_activation-unknown": (
        lambda: dw(post_activation="tanh"), ValueError,
        f"depthwise_conv2d: unknown post_activation 'tanh'; accepted: {ACTIVATIONS}",
    ),
    "dw_activation-unknown": (
        lambda: ds(dw_activation=""), ValueError, f"ds_conv2d: unknown dw_activation ''; accepted: {ACTIVATIONS}",
    ),
    "dw_post_activation-unknown": (
        lambda: ds(dw_post_activation="RELU"), ValueError,
        f"ds_conv2d: unknown dw_post_activation 'RELU'; accepted: {ACTIVATIONS}",
    ),
    "activation-code": (
        lambda: activate(x(1), 9, 0.0), ValueError,
        f"unknown activation code 9; accepted: 0 to 8, for {ACTIVATIONS}",
    ),
    "slope-string": (
        lambda: dw(negative_slope="0.1"), TypeError,
        "depthwise_conv2d: negative_slope must be a number; got '0.1' (str)",
    ),
    "slope-bool": (
        lambda: ds(dw_negative_slope=True), TypeError, "ds_conv2d: dw_negative_slope must be a number; got True (bool)",
    ),
    "slope-nan": (
        lambda: dw(negative_slope=math.nan), ValueError,
        "depthwise_conv2d: negative_slope must be finite and of magnitude below 1e38; got nan",
    ),
    "slope-inf": (
        lambda: ds(negative_slope=-math.inf), ValueError,
        "ds_conv2d: negative_slope must be finite and of magnitude below 1e38; got -inf",
    ),
    # -- backends
    "backend-unknown": (
        lambda: dw(backend="cudnn"), ValueError,
        "depthwise_conv2d: unknown backend 'cudnn'; accepted: 'auto', 'triton', 'cuda', 'cpp', 'reference'",
    ),
    "backend-kind": (
        lambda: ds(backend=None), TypeError, "ds_conv2d: the backend must be a string; got None (NoneType)",
    ),
    "use_backend-unknown": (
        lambda: effops.use_backend("cudnn").__enter__(), ValueError,
        "use_backend: unknown backend 'cudnn'; accepted: 'auto', 'triton', 'cuda', 'cpp', 'reference'",
    ),
    "use_backend-kind": (
        lambda: effops.use_backend(1).__enter__(), TypeError, "use_backend: the backend must be a string; got 1 (int)",
    ),
    "explain-kind": (
        lambda: effops.explain("model", x()), TypeError,
        "explain: the model must be a module or another callable; got str",
    ),
    # -- transforms on the autograd.Functions themselves
    "function-vmap": (
        lambda: torch.vmap(lambda t: effops.autograd.DepthwiseConv2dFunction.apply(
            t, x(8, 1, 3, 3), None, None, None, None, [1, 1, 0, 0, 0, 0, 1, 1, 1, 0, 0, 0], 0.0))(x(2, 1, 8, 9, 9)),
        RuntimeError,
        "DepthwiseConv2dFunction supports neither functorch transforms (vmap, grad, jvp) nor forward-mode AD: "
        "call effops.functional with backend='reference', which does",
    ),
    "function-forward_ad": (
        lambda: in_dual_level(lambda: effops.autograd.DepthwiseStatsFunction.apply(
            x(), x(8, 1, 3, 3), None, [1, 1, 0, 0, 0, 0, 1, 1, 1, 0, 0, 0])),
        RuntimeError,
        "DepthwiseStatsFunction supports neither functorch transforms (vmap, grad, jvp) nor forward-mode AD: "
        "call effops.functional with backend='reference', which does",
    ),
    "function-backend": (
        lambda: effops.autograd.DSConv2dFunction.apply(
            x(), None, x(8, 1, 3, 3), None, None, None, None, x(6, 8, 1, 1), None, None, None, None,
            [1, 1, 0, 0, 0, 0, 1, 1, 1, 0, 0, 0, 0, 0, 0], [0.0, 0.0], "reference"),
        ValueError,
        "DSConv2dFunction: no kernels of a backend 'reference'; accepted: 'triton', 'cuda', 'cpp'",
    ),
    # -- the fakes, which raw calls under torch.compile meet
    "fake-mask": (
        lambda: torch.ops.effops.dwconv_bwd(
            meta(2, 8, 7, 8), None, meta(2, 8, 9, 10), meta(8, 1, 3, 3), None, None, None, None,
            [1, 1, 0, 0, 0, 0, 1, 1, 1, 0, 0, 0], 0.0, 4),
        RuntimeError,
        "the gradient mask 0x4 asks for tensor 2, which is absent",
    ),
    "package-attribute": (lambda: effops.nothing, AttributeError, "module 'effops' has no attribute 'nothing'"),
}  # fmt: skip


def in_dual_level(call: Callable[[], Any]) -> Any:
    with torch.autograd.forward_ad.dual_level():
        return call()


def under_autocast(call: Callable[[], Any]) -> Any:
    with torch.autocast("cpu"):
        return call()


@pytest.mark.parametrize("case", CASES)
def test_message(case: str) -> None:
    call, exception, first_line = CASES[case]
    with pytest.raises(exception) as caught:
        call()
    assert caught.type is exception
    assert str(caught.value).splitlines()[0] == first_line


@pytest.mark.parametrize("wrong", [1.0, True, (1.0, 1), (True, 1)])
def test_a_cached_call_does_not_hide_a_wrong_kind(wrong: Any) -> None:
    """1 == 1.0 == True to a cache: a correct call first must not make the wrong one pass."""
    for argument in ("stride", "dilation", "padding"):
        dw(**{argument: 1})
        dw(**{argument: (1, 1)})
        with pytest.raises(TypeError, match=f"{argument} must be"):
            dw(**{argument: wrong})


@pytest.mark.parametrize("right", [2, (2, 2), [2, 2], np.int64(2), (np.int32(2), 2)])
def test_what_stands_for_ints_is_accepted(right: Any) -> None:
    assert dw(stride=right, padding=right).shape == (2, 8, 6, 6)


def test_errors_are_the_same_under_autocast_and_compile() -> None:
    with pytest.raises(ValueError, match="weight has 12 kernels but input has 8 channels"):
        under_autocast(lambda: dw(weight=x(12, 1, 3, 3)))
    compiled = torch.compile(EF.depthwise_conv2d, backend="eager")
    with pytest.raises(ValueError, match="weight has 12 kernels but input has 8 channels"):
        compiled(x(), x(12, 1, 3, 3))
