"""One documented `torch.autograd.Function` per operator: public API for layers of one's own on the kernels."""

from effops.ops.blurmaxpool import BlurMaxPool2dFunction
from effops.ops.bsconv import BSConv2dFunction
from effops.ops.dsconv import DSConv2dFunction, DSConvNorm2dFunction, DSConvPool2dFunction
from effops.ops.dsconv.parts import DSConvParts2dFunction
from effops.ops.dwconv import DepthwiseConv2dFunction, DepthwiseStatsFunction
from effops.ops.mbconv import InvertedResidual2dFunction
from effops.ops.se import SqueezeExcite2dFunction
from effops.ops.sepconv import SeparableConvPool2dFunction

__all__ = [
    "BSConv2dFunction",
    "BlurMaxPool2dFunction",
    "DSConv2dFunction",
    "DSConvNorm2dFunction",
    "DSConvParts2dFunction",
    "DSConvPool2dFunction",
    "DepthwiseConv2dFunction",
    "DepthwiseStatsFunction",
    "InvertedResidual2dFunction",
    "SeparableConvPool2dFunction",
    "SqueezeExcite2dFunction",
]
