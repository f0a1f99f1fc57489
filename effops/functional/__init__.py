"""effops.functional (EF): checked functions over the operators, in torch's argument order and words.

Every function checks its arguments (TypeError: a wrong kind; ValueError: a wrong value; the message says what was
wrong, what was got, what is accepted), casts under autocast as `F.conv2d` does, picks the output's memory format as
`F.conv2d` does, chooses the backend and calls it. Output shape, dtype and memory format depend on the inputs alone.

Shared by all of them:
    epilogue: `post_activation(activation(conv + bias) * scale + shift + residual)`, each part optional. Activations:
        none, relu, relu6, leaky_relu, silu, hardswish, hardsigmoid, sigmoid, gelu; `negative_slope` belongs to
        leaky_relu. bias, scale and shift are [K], of the input's dtype or float32; residual has the convolution's
        output shape.
    tensors: dense, on one device; weights and residuals have the input's dtype (float32, float64, float16 or bfloat16).
        The result has it too, and is channels_last where the input's strides are.
    stride, dilation: an int or (height, width).
    padding: an int, (height, width), (left, right, top, bottom) as `F.pad` orders it, "same" (stride 1) or "valid".
    backend: "auto", or a name of `effops.backends.names()`. One asked for by name never falls back: RuntimeError.

Dimensions: N batch, C input channels, H W input size, R S window, P Q output size, K output channels.
"""

from __future__ import annotations

from effops.functional.blurmaxpool import blur_max_pool2d
from effops.functional.bsconv import bs_conv2d
from effops.functional.dsconv import downsampling2d, ds_conv2d, half_identity2d
from effops.functional.dwconv import (
    depthwise_conv2d,
    depthwise_stats2d,
    fixed_filter_conv2d,
    shared_depthwise_conv2d,
)
from effops.functional.mbconv import inverted_residual2d
from effops.functional.multiception import mix_conv2d, multiception_conv2d
from effops.functional.se import squeeze_excite2d
from effops.functional.sepconv import separable_conv_pool2d
from effops.ops.epilogue import BatchNorm

__all__ = [
    "BatchNorm",
    "blur_max_pool2d",
    "bs_conv2d",
    "depthwise_conv2d",
    "depthwise_stats2d",
    "downsampling2d",
    "ds_conv2d",
    "fixed_filter_conv2d",
    "half_identity2d",
    "inverted_residual2d",
    "mix_conv2d",
    "multiception_conv2d",
    "separable_conv_pool2d",
    "shared_depthwise_conv2d",
    "squeeze_excite2d",
]
