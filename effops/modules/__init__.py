"""Drop-in modules: they own ordinary sub-modules and parameters, and run them as fused kernels where that is possible.

Every module here reads its parameters on each call; nothing is cached, so in-place edits, `.data` edits, optimiser
steps and `load_state_dict` take effect at once. In eval mode a batch norm becomes the scale and shift of the kernel's
epilogue; in training its batch statistics are taken from the depthwise convolution without storing that one's result.

What cannot be fused runs as the ordinary sub-modules do; `fusion_reasons()` and the module's repr say what and why.

`device` and `dtype` are those of the parameters and buffers, as in torch's modules. What a call cannot do raises as its
function in `effops.functional` does. `effops.stock` has the same modules in stock PyTorch.
"""

from effops.modules._keys import ds_conv_key_map, inverted_residual_key_map
from effops.modules.blurmaxpool import BlurMaxPool2d
from effops.modules.bsconv import BSConvS, BSConvU, orthonormal_loss
from effops.modules.dsconv import FusedDSConv
from effops.modules.dwconv import BlurPool2d, DepthwiseConv2d, FixedFilterConv2d, SharedDepthwiseConv2d
from effops.modules.effnet import EffNetBlock, SeparableConvPool2d
from effops.modules.mbconv import InvertedResidual
from effops.modules.multiception import MixConv2d, MulticeptionConv2d
from effops.modules.se import SqueezeExcite
from effops.modules.vgnet import DownsamplingBlock, HalfIdentityBlock

__all__ = [
    "BSConvS",
    "BSConvU",
    "BlurMaxPool2d",
    "BlurPool2d",
    "DepthwiseConv2d",
    "DownsamplingBlock",
    "EffNetBlock",
    "FixedFilterConv2d",
    "FusedDSConv",
    "HalfIdentityBlock",
    "InvertedResidual",
    "MixConv2d",
    "MulticeptionConv2d",
    "SeparableConvPool2d",
    "SharedDepthwiseConv2d",
    "SqueezeExcite",
    "ds_conv_key_map",
    "inverted_residual_key_map",
    "orthonormal_loss",
]
